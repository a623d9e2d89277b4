"""The judge of prompts: does a picture show what its caption says, among 200 captions, and in the style it names?

A dual encoder after CLIP (arXiv:2103.00020, figure 3): two small heads on frozen picture features (`Features.whole`:
EfficientNet-Lite0 at four depths, and colours) and frozen MiniLM sentence vectors, trained on the train split only, and
a classifier of styles on the same picture features. Neither network has seen the generator, and the generator has not
seen them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from limner.checkpoints.files import write_atomically
from limner.errors import FileProblem
from limner.metrics.features import FEATURES, full_precision
from limner.metrics.prompts import Prompt

SENTENCE = 384


class Judge(nn.Module):
    """Heads on picture features (n, FEATURES) and sentence vectors (n, 384); `styles` names the classes of `style`."""

    mean: Tensor
    std: Tensor

    def __init__(self, styles: Sequence[str], width: int = 256, hidden: int = 768) -> None:
        super().__init__()
        self.styles, self.width, self.hidden = tuple(styles), width, hidden
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        self.image = head(FEATURES, hidden, width)
        self.text = head(SENTENCE, hidden, width)
        self.style = head(FEATURES, hidden // 2, len(self.styles))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def standardise(self, features: Tensor) -> Tensor:
        """What is rare in training (a colour, a sharp edge) stays within 8 standard deviations."""
        return ((features.float() - self.mean) / self.std).clamp(-8, 8)

    def images(self, features: Tensor) -> Tensor:
        """(n, FEATURES) -> (n, width) unit vectors."""
        return F.normalize(self.image(self.standardise(features)), dim=-1)

    def texts(self, sentences: Tensor) -> Tensor:
        """(n, 384) -> (n, width) unit vectors."""
        return F.normalize(self.text(sentences.float() * math.sqrt(SENTENCE)), dim=-1)

    def style_logits(self, features: Tensor) -> Tensor:
        """(n, FEATURES) -> (n, styles)."""
        return self.style(self.standardise(features))


def head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.2), nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(0.2), nn.Linear(hidden, outputs)
    )


@dataclass(frozen=True)
class JudgeData:
    """n training pictures: `features` (n, views, FEATURES) of several renderings of each; `captions` (n, k) positions
    into `sentences` (m, 384), the vectors of all captions; `things` what each shows (concept, tone and tint), `styles`
    how.
    """

    features: Tensor
    captions: Tensor
    sentences: Tensor
    things: Sequence[str]
    styles: Sequence[str]


def train_judge(
    data: JudgeData,
    *,
    steps: int = 6000,
    batch: int = 2048,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Callable[[int, float], None] | None = None,
) -> Judge:
    """Train both heads by the symmetric CLIP loss, the style head by cross-entropy.

    Each step draws `batch` pictures, one rendering and one caption of each. Two pictures of the same thing in a batch
    (one emoji in two styles) are not each other's negatives: a caption without its style fits both. Half of the
    batches are drawn from the whole set, half from a single style, where only the subject tells captions apart;
    those teach no style. AdamW, linear warm-up over 5 % of the steps, cosine to 0. `report(step, clip loss)` every 100
    steps.
    """
    torch.manual_seed(seed)
    device = torch.device(device)
    names = sorted(set(data.styles))
    judge = Judge(names).to(device)
    features, captions, sentences = data.features.to(device), data.captions.to(device), data.sentences.to(device)
    known: dict[str, int] = {}
    things = torch.tensor([known.setdefault(t, len(known)) for t in data.things], device=device)
    styles = torch.tensor([names.index(s) for s in data.styles], device=device)
    of_style = [(styles == k).nonzero().squeeze(1) for k in range(len(names))]
    n, views = features.shape[:2]
    judge.mean.copy_(features[:, 0].float().mean(0))
    judge.std.copy_(features[:, 0].float().std(0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([float(len(members)) for members in of_style])

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    for step in range(steps):
        if step % 2:
            members = of_style[int(torch.multinomial(shares, 1, generator=generator))]
            index = members[torch.randperm(len(members), generator=generator)[:batch].to(device)]
        else:
            index = torch.randperm(n, generator=generator)[:batch].to(device)
        x = features[index, draw(views, len(index))]
        text = judge.texts(sentences[captions[index, draw(captions.shape[1], len(index))]])
        logits = judge.log_scale.exp() * judge.images(x) @ text.T
        same = things[index, None] == things[index]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -math.inf)
        target = torch.arange(len(index), device=device)
        clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        mixed = step % 2 == 0  # a batch of one style would only teach its name as the answer to everything
        style = F.cross_entropy(judge.style_logits(x), styles[index]) if mixed else torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.zero_grad(set_to_none=True)
        (clip + style).backward()
        optimizer.step()
        with torch.no_grad():
            judge.log_scale.clamp_(max=math.log(100))
        if report and step % 100 == 99:
            report(step + 1, clip.item())
    return judge.eval().requires_grad_(False)


def picked(
    judge: Judge, features: Tensor, prompts: Sequence[Prompt], texts: Sequence[str], sentences: Tensor
) -> Tensor:
    """(n,) True where, for `features` (n, FEATURES) of a picture of each prompt, its text beats all its distractors.

    `sentences` (m, 384) are the vectors of `texts`, which hold every prompt and distractor. A tie counts as wrong.
    """
    assert len(features) == len(prompts)
    assert len(texts) == len(sentences)
    device = judge.mean.device
    position = {text: k for k, text in enumerate(texts)}
    own = torch.tensor([[position[p.text]] for p in prompts], device=device)
    wrong = [torch.tensor([position[text] for text in p.distractors], dtype=torch.long) for p in prompts]
    others = nn.utils.rnn.pad_sequence(wrong, batch_first=True, padding_value=-1).to(device)
    with torch.inference_mode(), full_precision():
        scores = judge.images(features.to(device)) @ judge.texts(sentences.to(device)).T
        best = scores.gather(1, others.clamp(min=0)).masked_fill(others < 0, -math.inf).amax(1)
        return (scores.gather(1, own).squeeze(1) > best).cpu()


def styled(judge: Judge, features: Tensor, styles: Sequence[str]) -> Tensor:
    """(n,) True where the style head names the style asked for; a style that it does not know is never right."""
    with torch.inference_mode():
        best = judge.style_logits(features.to(judge.mean.device)).argmax(1).tolist()
    return torch.tensor([judge.styles[b] == s for b, s in zip(best, styles, strict=True)])


def save(judge: Judge, path: Path) -> None:
    """Write the heads as fp16 safetensors, their sizes in the metadata."""
    config = {"styles": judge.styles, "width": judge.width, "hidden": judge.hidden}
    tensors = {k: v.half().contiguous().cpu() for k, v in judge.state_dict().items()}
    write_atomically(path, serialise(tensors, {"judge": json.dumps(config)}))


def load(path: Path, device: torch.device | str = "cpu") -> Judge:
    """The heads that `save` wrote, in fp32. Raises FileProblem if they are missing or not a judge's."""
    if not path.is_file():
        raise FileProblem(f"no judge at {path}: train it with `limner evaluate --prepare-judge`, or reinstall limner")
    try:
        with safe_open(path, "pt") as file:
            judge = Judge(**json.loads((file.metadata() or {})["judge"]))
            judge.load_state_dict({k: file.get_tensor(k).float() for k in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FileProblem(f"{path} is not a judge that this version can read ({str(error).splitlines()[0]})") from error
    return judge.eval().requires_grad_(False).to(device)
