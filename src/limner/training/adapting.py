"""Adapters and words as what is trained: systems of which all else stays as it was loaded."""

from __future__ import annotations

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from limner.adapters import trainable
from limner.adapters.attaching import stack
from limner.adapters.trainable import AdapterConfig
from limner.adapters.words import MOST, PAIR
from limner.checkpoints.files import write_atomically
from limner.errors import UsageError
from limner.text.clip import CLIPTowers


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    """A word that is learned (textual inversion, arXiv:2208.01618): `name` is what prompts say, and the file; of so
    many `vectors`, which begin as those of `like`."""

    name: str = "my-word"
    vectors: int = 4
    like: str = "picture"


class Beside(nn.Module, ABC):
    """A system as the loop knows it, whose only weights are what is learned beside a model; `base` is that model, which
    is not a part of it. What it has no answer to, the model answers."""

    phases = ("main",)
    recordable = True
    """As for `limner.systems.diffusion.DiffusionSystem`."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        if not hasattr(base, "adapters"):
            raise UsageError(f"{base.name} takes no adapters: they are for models that draw from words")
        self.__dict__["base"] = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    @property
    def identity(self) -> str:
        """Of all that is not trained."""
        return self.base.model_hash

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        return self.error(self.examples(batch, generator))

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return self.base.examples(batch, generator)

    def error(self, examples: dict[str, Any]) -> dict[str, Tensor]:
        return self.base.error(examples)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.parameters())

    @property
    def passed(self) -> list[nn.Module]:
        """What a gradient goes through, by whose blocks memory can be spared."""
        return [self.base]

    def compile(self, **how: Any) -> None:
        """As the model does."""
        self.base.compile(**how)

    def opened(self, path: Path) -> nn.Module:
        """What is learned, in a file for users, to begin from."""
        name = "RUN/checkpoints/step-…/ema.safetensors"
        raise UsageError(f"init_from={path} is no file of a checkpoint, with which alone this begins: give {name}")

    @abstractmethod
    def on(self) -> None:
        """Have the model compute with what is learned."""

    @abstractmethod
    def off(self) -> None:
        """Have the model compute as it did before."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """The file that users attach, whole or not at all."""

    def changes(self) -> bool:
        """Whether anything was learned yet: what is nothing cannot be attached."""
        return True

    @contextmanager
    def as_drawn(self, name: str) -> Iterator[Any]:
        """The model with what is learned attached as users attach it: from the file that the run would leave now."""
        adapters = stack(self.base)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.safetensors"
            self.write(file)
            self.off()
            try:
                if self.changes():
                    adapters.attach(file)
                yield self.base
            finally:
                adapters.restore([])
                self.on()


class Adapting(Beside):
    """An adapter in training."""

    def __init__(self, base: Any, config: AdapterConfig, seed: int) -> None:
        super().__init__(base)
        self.adapter = trainable.Training(base, config, torch.Generator().manual_seed(seed))

    def on(self) -> None:
        self.adapter.on()

    def off(self) -> None:
        self.adapter.off()

    def write(self, path: Path) -> None:
        trainable.write(self.adapter, path)

    def changes(self) -> bool:
        zeros = ("up", "w2_a", "k2_a", "k2", "blocks")  # one of them is 0 in each until something is learned
        parts = [self.adapter[name].parts for name in self.adapter.named]
        return any(bool(part[key].detach().any()) for part in parts for key in zeros if key in part)


class Wording(Beside):
    """A learned word in training. A caption that does not say it gets it in front."""

    def __init__(self, base: Any, config: WordConfig, seed: int) -> None:
        super().__init__(base)
        if not isinstance(base.text_encoder, CLIPTowers):
            raise UsageError(f"{base.name} learns no words: that is for text encoders of CLIP's kind")
        if not re.fullmatch(r"\w[\w.-]*", config.name):
            raise UsageError(f"word.name={config.name!r}: give letters, digits, dots and hyphens")
        if not 1 <= config.vectors <= MOST:
            raise UsageError(f"word.vectors={config.vectors}: give 1 to {MOST}")
        self.config = config
        self.vectors = nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        towers: Any = base.text_encoder
        for tower in towers:
            ids = tower.tokenizer.encode([config.like], marked=False)[0]
            if not ids:
                raise UsageError(f"word.like={config.like!r} has no words to begin from")
            table = tower.text_model.embeddings.token_embedding.weight.detach()
            first = table[[ids[i % len(ids)] for i in range(config.vectors)]].float()
            noise = torch.randn(first.shape, generator=generator).to(first) * table.float().std()
            self.vectors.append(nn.Parameter(first + 0.01 * noise))  # so that no two are alike
        self.said = re.compile(rf"(?<!\w){re.escape(config.name)}(?!\w)", re.IGNORECASE)
        self.on()

    def on(self) -> None:
        for tower, vectors in zip(self.base.text_encoder, self.vectors, strict=True):
            embedding = tower.text_model.embeddings.token_embedding
            count = len(embedding.weight)
            tower.learned = {self.config.name.lower(): list(range(count, count + len(vectors)))}
            embedding.forward = partial(self.embed, embedding, vectors)

    def off(self) -> None:
        for tower in self.base.text_encoder:
            tower.learned = {}
            del tower.text_model.embeddings.token_embedding.forward

    @staticmethod
    def embed(embedding: nn.Embedding, vectors: Tensor, ids: Tensor) -> Tensor:
        """Rows of the table, and of the word's vectors where ids go beyond it."""
        count = len(embedding.weight)
        known = F.embedding(ids.clamp(max=count - 1), embedding.weight)
        own = F.embedding((ids - count).clamp(min=0), vectors.to(known.dtype))
        return torch.where((ids >= count)[..., None], own, known)

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        name, captions = self.config.name, batch["captions"]
        of_class = batch.get("prior", [False] * len(captions))  # which say nothing of the word
        said = [
            c if other or self.said.search(c) else f"{name}, {c}" if c else name
            for c, other in zip(captions, of_class, strict=True)
        ]
        return self.base.examples(batch | {"captions": said}, generator)

    def write(self, path: Path) -> None:
        names = [self.config.name] if len(self.vectors) == 1 else list(PAIR)
        made = {name: v.detach().cpu().float().clone() for name, v in zip(names, self.vectors, strict=True)}
        write_atomically(path, save(made))


def draw(system: Beside, config: Any) -> list[Image.Image]:
    """As `loop.draw_prompts`, by the model with what is learned attached."""
    from limner.training.loop import draw_prompts

    with system.as_drawn(config.file_name) as model:
        return draw_prompts(model, config)


def export(system: Beside, config: Any, path: Path) -> None:
    system.write(path)
