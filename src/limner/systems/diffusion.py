"""Diffusion and flow systems: a network that denoises latents, told of words by a text encoder."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from limner import hints, pictures
from limner.errors import CheckpointMismatch, UsageError
from limner.models import flux, ip_adapter, tiling, unet
from limner.models.pixels import Pixels
from limner.models.unet import Residuals, UNet, UNetConfig, micro_conditioning
from limner.nn.graphs import Graphs, compile_blocks
from limner.sampling import bounds, compat, samplers, schedules
from limner.sampling.guidance import (
    Combine,
    Guidance,
    classified,
    classifier_free,
    combining,
    composed,
    guided,
    on_first,
    within,
)
from limner.sampling.interpolants import Discrete, Interpolant, Preconditioned
from limner.sampling.predictions import Prediction
from limner.systems import previews
from limner.systems.classifying import ClassifyingSystem
from limner.systems.objectives import Objective
from limner.text.labels import Labels
from limner.text.prompts import Dialect, Part, Text, parse, refuse, unescaped, unreached
from limner.types import Conditioning, Control, Defaults, Denoise, Images, Latents, Reference, Request

MOST_TIMES = 100
"""What is made of so many times at once is kept for a drawing: of a large transformer 2 MB each and row."""
Clock = Callable[..., Tensor]
"""`(network, rows, cond, ...)` -> what the network is told of the time, as `told_time` says."""


More = Callable[[Tensor, Tensor, Conditioning], Sequence[Any]]
"""(x, t, cond) -> what a network is told after these, such as the residuals of a control."""


def told_time(
    time: float, walk: Mapping[float, float], network: Any, rows: int, cond: Conditioning, *more: Tensor
) -> Tensor:
    """The time of each row (rows,); for networks that make something of times alone, one row each of what they make
    (rows, n), of all times of the walk at once and kept in `cond`."""
    device = next((weight.device for weight in network.parameters()), None)
    if not hasattr(network, "times"):
        return torch.full((rows,), time, device=device)
    known: dict[float, Tensor] = cond.keep(("times", network, *map(id, more)), dict)
    if time in known:
        return known[time]
    walked = list(dict.fromkeys([*walk.values(), time]))
    times = [time] if known or len(walked) > MOST_TIMES else walked  # some samplers ask between the steps too
    made = dict(zip(times, network.times(torch.tensor(times, device=device), rows, cond, *more), strict=True))
    if times is walked:
        known.update(made)
    return made[time]


def controlled(
    control: Control,
    seen: Any,
    x: Tensor,
    clock: Clock,
    cond: Conditioning,
    wanted: int,
    evaluate: Graphs,
    network: Any = None,
) -> Any:
    """What a control adds at x to a `network`, which has `seen` its picture: one that guesses only to the first
    `wanted` rows, a tenth of its weight at the first level of detail and rising to all of it in the middle
    (arXiv:2302.05543, its code's guess mode)."""
    if not getattr(control.network, "embeds", True):
        x = network.embed(x)
    rows = wanted if control.guess else len(x)
    if not rows:
        return Residuals()
    if rows < len(x):
        cond = cond.keep(rows, lambda: replace(cond.map(lambda v: v[:rows]), kept={}))
    t = clock(control.network, rows, cond, *([seen[1]] if isinstance(seen, tuple) else []))
    asked = (x[:rows], t, cond, seen)
    computes = hasattr(control.network, "tell")  # not so a T2I-Adapter, which gives back what it saw
    added = evaluate(control.network, *asked) if computes else control.network(*asked)
    if not isinstance(added, Residuals) or added.levels:
        return added if control.weight == 1 else tree_map_only(Tensor, lambda one: control.weight * one, added)
    count = len(added.down) + 1
    scales = torch.logspace(-1, 0, count).tolist() if control.guess else [1.0] * count

    def scaled(residual: Tensor, scale: float) -> Tensor:
        residual = residual * (scale * control.weight)
        return F.pad(residual, (0, 0, 0, 0, 0, 0, 0, len(x) - rows))

    assert added.mid is not None
    return Residuals(tuple(map(scaled, added.down, scales)), scaled(added.mid, scales[-1]))


@dataclass(frozen=True)
class Prompts:
    """The words of a batch: each of the `parts` of AND, and `uncond`, have one row a picture, and so have the parts'
    `weights`; a picture with fewer parts than its neighbours has some of weight 0. `guide` are they as a guide reads
    them."""

    parts: tuple[Conditioning, ...]
    weights: tuple[tuple[float, ...], ...]
    uncond: Conditioning
    guide: Prompts | None = None
    labels: Tensor | None = None
    """The class of every picture (b,), which a classifier leads to."""
    kept: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What `ready` gave."""

    @property
    def alone(self) -> bool:
        """Whether there is nothing to compose."""
        return self.weights == ((1.0,) * len(self.weights[0]),)

    def ready(
        self, dtype: torch.dtype, references: Sequence[Reference], pictured: bool
    ) -> tuple[list[Conditioning], Conditioning]:
        """What networks of a `dtype` are told, made once: each part and `uncond`, with pictures as words, and, where
        there is nothing to compose, all of them as rows of one, `uncond` twice if `pictured`."""
        references = [one for one in references if one.weight or not one.behind]  # which would be words of nothing
        key = (dtype, bool(references), pictured)
        if key not in self.kept:
            told = [*self.parts, self.uncond]
            if references:
                behind = references[0].behind
                seen = torch.cat([r.weight * r.words if behind else r.words for r in references], dim=1)
                none = torch.cat([r.nothing for r in references], dim=1)
                told = [*(_shown(c, seen, behind) for c in self.parts), _shown(self.uncond, none, behind)]
            told = [replace(c.map(lambda v: v.to(dtype) if v.is_floating_point() else v), kept={}) for c in told]
            every = replace(Conditioning.cat(told + told[-1:] * pictured), kept={}) if self.alone else told[0]
            self.kept[key] = told, every
        return self.kept[key]


def _shown(cond: Conditioning, words: Tensor, behind: bool) -> Conditioning:
    """`cond` with pictures as words (1, n, d), for attention of their own or `behind` those of the prompt."""
    assert cond.tokens is not None
    words = words.to(cond.tokens.device).expand(len(cond.tokens), -1, -1)
    return replace(cond, tokens=torch.cat([cond.tokens, words], dim=1)) if behind else replace(cond, images=words)


Turns = list[tuple[int, Callable[[], Prompts], "DiffusionSystem"]]
"""(n, what is told until n steps are done, read when it is asked for, who is told), n rising to the number of steps."""
PARTS = ("text_encoder", "network", "autoencoder")
"""What a system has weights of."""
MOST_KNOWN = 4
MOST_SMALL_NOISE = 350
"""The highest of the levels that Stable Diffusion's x4 upscaler was trained with."""


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def brought(weights: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Copies of the weights on a device in their place, for as long as this lasts."""
    resting = [(weight, weight.data) for weight in weights if weight.device != device]
    try:
        with torch.inference_mode(False):
            for weight, data in resting:
                weight.data = data.to(device, copy=True)
        yield
    finally:
        for weight, data in resting:
            weight.data = data


@contextlib.contextmanager
def brought_to_be_asked(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on a device whenever it is asked something, and no longer, for as long as this lasts."""
    forward = module.forward

    def asked(*told: Any) -> Any:
        with brought(tensors_of(module), device):
            return forward(*told)

    module.forward = asked
    try:
        yield
    finally:
        del module.forward


class DiffusionSystem(nn.Module):
    """Trained with the loss of rectified flow or diffusion on latents, sampled by any solver of `limner.sampling`."""

    network: Any
    autoencoder: Any
    text_encoder: Any
    grid: int
    vae: dict[str, str] = {}  # noqa: RUF012 (put anew, never changed)
    """What a picture remembers of what the model's file does not hold (see `limner.types.System`)."""
    weights_hash: Callable[[], str] = staticmethod(lambda: "")
    """Where it was read from files: waits for their hash, which is made beside the drawing."""
    refiner: DiffusionSystem | None = None
    guide: DiffusionSystem | None = None
    """A weaker model, which guidance leads away from in place of the negative prompt."""
    classifier: ClassifyingSystem | None = None
    """Leads every step to the class of the prompt."""
    refuses = True
    """Whether a prompt may not ask for adapters that are not here: what another model knows, a refiner need not."""
    latent_rgb: Tensor | None = None
    """The map of `limner.systems.previews`, once it is known."""
    adapters: Any = None
    """What `limner.adapters` keeps of those attached."""
    works_on: torch.device | None = None
    """The device that a part is brought to when it is at work, from the CPU, where it rests; None if all stay where
    they are."""
    task = "text-to-image"
    phases = ("main",)
    objective = Objective()
    """What it learns by."""
    recordable = True
    """Whether its loss is the `error` of its `examples`."""
    texts: Callable[[list[str]], Conditioning] | None = None
    """What reads captions in training, if not the text encoder itself."""

    def __init__(
        self,
        network: nn.Module,
        autoencoder: nn.Module,
        text_encoder: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        defaults: Defaults,
        name: str,
        family: str,
        caption_dropout: float = 0.1,
        small_noise: Discrete | None = None,
        looks: bool = False,
        learned_variance: bool = False,
        clip: bool = False,
    ) -> None:
        """`learned_variance` and `clip` are as `limner.catalog.DiffusionConfig` has them; `looks` is whether the
        network takes pictures to look at, as FLUX.1 Kontext does."""
        super().__init__()
        self.small_noise = small_noise
        self.graphs = Graphs()
        self.name, self.family, self.defaults = name, family, defaults
        self.network = network
        self.autoencoder = autoencoder.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)
        self.interpolant, self.prediction, self.caption_dropout = interpolant, prediction, caption_dropout
        self.grid = self.autoencoder.factor
        self.unit: int = self.grid * getattr(network.config, "patch", 1)
        """What widths and heights are multiples of, in pixels."""
        self.learned_variance, self.clip = learned_variance, clip
        self.looks = looks
        """As for `limner.catalog.DiffusionConfig`."""
        config: Any = network.config
        self.told_guidance: Callable[[Tensor], Tensor] | None = None
        """What the network is told of the scale of guidance, instead of being guided; None for most."""
        if getattr(config, "guidance_width", 0):
            self.told_guidance = partial(unet.guidance_embedding, width=config.guidance_width)
        elif getattr(config, "guidance_embedded", False):
            self.told_guidance = flux.guidance_embedding
        classes = text_encoder.config.num_classes if isinstance(text_encoder, Labels) else -1
        self.knows_none = not isinstance(config, UNetConfig) or config.num_classes != classes
        """Whether the network can be told of no class."""
        self.enlarges = self.grid if small_noise is not None else 1
        """How many times larger than the picture given what it draws must be."""
        self.dialects: tuple[Dialect, ...] = text_encoder.dialects  # type: ignore[assignment]
        self.clip_skip: int | None = text_encoder.clip_skip  # type: ignore[assignment]

    @property
    def model_hash(self) -> str:
        return self.weights_hash()

    @property
    def beside(self) -> int:
        """Channels that the network sees beside the latents."""
        config, channels = self.network.config, self.autoencoder.channels
        return getattr(config, "latents_in", getattr(config, "in_channels", channels)) - channels

    @property
    def sees(self) -> str:
        """What they are, as `sees` of the network's configuration says; "" for an upscaler, whose `small_noise` does;
        "reference" where it looks at pictures that are not beside the latents, but behind them."""
        if self.looks:
            return "reference"
        seeing = hasattr(self.network.config, "sees") and self.small_noise is None
        return self.network.config.sees(self.autoencoder.channels) if seeing else ""

    @property
    def inverts(self) -> bool:
        """Whether a picture given is where its drawing begins, and not only seen."""
        return self.small_noise is None and self.sees in ("", "mask", "depth")

    # ---------------------------------------------------------------- training

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the prediction, as `objective` says.

        `batch` has "captions" and either "latents" (b, c, h, w) or "images" (b, 4, H, W); it may have a "mask"
        (b, 1, H, W) of what counts and a "weight" (b,) of how much each row does.
        """
        return self.error(self.examples(batch, generator))

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """What the network is asked of a batch, x, t and "cond", and what `error` needs to judge its answer."""
        x0 = batch["latents"] if "latents" in batch else self.encode(batch["images"])
        n, device = len(x0), x0.device
        coin = random.Random(generator.initial_seed())  # on the host: asking the device would wait for it
        captions = ["" if coin.random() < self.caption_dropout else caption for caption in batch["captions"]]
        t, sigma = self.interpolant.draw(n, generator, device, self.objective.times)
        eps = self.objective.noise(x0, generator, captions)

        level = sigma[:, None, None, None]
        alpha = self.interpolant.alpha(level)  # type: ignore[arg-type]
        x = self.interpolant.input_scale(level) * (alpha * x0 + level * eps)
        cond = self.sized(
            (self.texts or self.text_encoder.encode)(captions), x0.shape[3] * self.grid, x0.shape[2] * self.grid
        )
        if self.told_guidance is not None:
            cond = replace(cond, guidance=self.told_guidance(torch.ones(n, device=device)))
        target = self.prediction.target(x0, eps, alpha, level)
        asked = {"x": x, "t": t, "cond": cond, "target": target, "alpha": alpha, "sigma": level}
        if self.objective.variance_weight:
            assert isinstance(self.interpolant, Discrete)
            asked |= bounds.step(self.interpolant, t)
        return asked | {name: batch[name] for name in ("mask", "weight") if name in batch}

    def error(self, examples: dict[str, Any], more: More = lambda x, t, cond: ()) -> dict[str, Tensor]:
        """The loss of the network's answers to `examples`. `more` gives what the network is told besides."""
        judged = dict(examples)
        asked = judged.pop("x"), judged.pop("t"), judged.pop("cond")
        step = {name: judged.pop(name) for name in bounds.STEP if name in judged}
        output, variance = self.network(*asked, *more(*asked)).float().tensor_split([judged["target"].shape[1]], dim=1)
        error = self.objective.error(output, prediction=self.prediction, **judged)
        if not step:
            return {"loss": error}
        bits = self.bound(asked[0], output.detach(), variance, judged, **step)
        return {"loss": error + self.objective.variance_weight * bits, "error": error, "bits": bits}

    def bound(
        self, x: Tensor, output: Tensor, variance: Tensor, judged: dict[str, Tensor], small: Tensor, large: Tensor,
        kept: Tensor,
    ) -> Tensor:  # fmt: skip
        """Bits a dimension of the steps of the whole chain, as those of this batch are (arXiv:2102.09672, section 3.1):
        the variance lies between the `small` and the `large`, along a line in the logarithm, where the network says."""
        alpha, sigma = judged["alpha"], judged["sigma"]
        x = x.float() / self.interpolant.input_scale(sigma)
        x0, said = (self.prediction.to_x0(one, x, alpha, sigma) for one in (judged["target"], output))
        nats = bounds.nats(x0, said, torch.lerp(small, large, (variance + 1) / 2), small, kept)
        return nats.mean() * len(self.interpolant.sigmas) / math.log(2)  # type: ignore[attr-defined]

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def compile(self, **how: Any) -> None:
        self.graphs.devices = ()  # which cannot be recorded while it compiles
        compile_blocks(self.network, **how)

    # ---------------------------------------------------------------- where its parts are

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.works_on or next(self.network.parameters()).device

    stays = False
    """Whether its parts stay on a GPU even if they and a drawing do not fit."""

    def offload(self) -> None:
        """Let parts rest on the CPU, and those of a refiner and a guide, while they are not at work where they are."""
        for system in (self, self.refiner, self.guide):
            if system is not None and system.works_on is None:
                system.works_on = system.device
                system.graphs.clear()
                with system.bare():
                    system.cpu()

    @contextlib.contextmanager
    def at_work(self, part: str) -> Iterator[None]:
        """One of `PARTS` where it computes, for as long as this lasts; of it what a drawing asks but once is there only
        while it is asked."""
        if self.works_on is None:
            yield
            return
        module, device = getattr(self, part), self.works_on
        away = any(weight.device != device for weight in tensors_of(module))
        passing = module.asked_once() if hasattr(module, "asked_once") else []
        apart = {weight for one in passing for weight in tensors_of(one)}
        try:
            with contextlib.ExitStack() as there:
                there.enter_context(brought([weight for weight in tensors_of(module) if weight not in apart], device))
                for one in passing:
                    there.enter_context(brought_to_be_asked(one, device))
                yield
        finally:
            if device.type == "cuda" and away:
                torch.cuda.empty_cache()  # torch would keep what the part took, beside what the next one takes

    # ---------------------------------------------------------------- sampling

    def widen(self) -> bool:
        """Make the network and the text encoder compute in float32; False if they did."""
        if any(other.widen() for other in (self.refiner, self.guide) if other is not None):
            self.widen()
            return True
        parts = (self.network, self.text_encoder)
        if all(p.dtype == torch.float32 for part in parts for p in part.parameters()):
            return False
        with self.bare():
            for part in parts:
                part.float()
        return True

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Without adapters, which hide weights of its own, for as long as this lasts."""
        on = list(self.adapters.on) if self.adapters else []
        if on:
            self.adapters.restore([])
        yield
        if on:
            self.adapters.restore(on)

    def check(self, request: Request) -> None:
        if self.small_noise is not None:
            self.check_small(request)
        elif self.defaults.prompted and not all(
            prompt.strip() or any(r.behind and r.weight for r in request.ip_adapter) for prompt in request.prompts
        ):
            raise UsageError("the prompt is empty: say what to draw")
        if self.sees == "picture" and request.image is None:
            raise UsageError(f"{self.name} edits a picture, but none was given: limner edit IMAGE, or -i IMAGE")
        if self.sees == "hint" and request.image is None:
            raise UsageError(f"{self.name} follows edges or depth of a picture, but none was given: add -i IMAGE")
        if self.sees == "depth" and request.depth is None:
            raise UsageError(
                f"{self.name} draws after a depth map, but none was given: add --depth IMAGE, near is white"
            )
        if isinstance(self.text_encoder, Labels):
            words = self.text_encoder if self.classifier is None else self.classifier.text_encoder
            words.classes([*request.prompts, *request.negatives, request.invert or ""])
            if not self.unguided(request) and not (self.defaults.prompted and self.knows_none):
                raise UsageError(
                    f"guidance is {request.guidance:g}, but {self.name} has no class for none, to lead away from: "
                    "give 1"
                )
        if self.classifier is not None:
            self.check_classified(request, self.classifier)
        seen: int = self.unit * getattr(self.network.config, "pos_embed_max", 0)
        longest = max(min(n, request.tile or n) for n in (request.width, request.height))
        if seen and longest > seen:
            raise UsageError(
                f"{longest} pixels a side, but {self.name} has positions for {seen}: add --tile {seen // 2}"
            )
        if request.tile % self.unit:
            raise UsageError(f"tile is {request.tile}: {self.name} draws in patches of {self.unit} pixels")
        if self.sees in ("hint", "reference") and request.image is not None:
            over = [name for name, there in (("mask", request.mask is not None), ("strength", request.strength != 1),
                                             ("hires", request.hires != 1)) if there]  # fmt: skip
            if over:
                raise UsageError(
                    f"{self.name} looks at a picture and does not paint over it: leave {' and '.join(over)} out"
                )
        if self.sees == "reference" and request.tile:
            raise UsageError(f"tile is {request.tile}, but {self.name} looks at a picture as a whole: leave tile out")
        if self.clip_skip is not None:
            self.text_encoder.checked(request.clip_skip)
        steps = len(self.sigmas(request)) - 1
        for one in request.control:
            if not any(one.at(step, steps) for step in range(steps)):
                raise UsageError(f"{one.name} is told from {one.start:g} to {one.end:g}, where no step of {steps} is")
            side = request.tile or request.hires * max(request.width, request.height)
            most = self.unit * getattr(one.network, "largest", 0)
            if most and side > most:
                raise UsageError(f"{one.name} has positions for {most} pixels a side: draw less, or in tiles (--tile)")
        self.parsed(request.prompts, request)
        self.parsed(request.negatives, request, composed=False)
        self.parsed([request.invert or ""], request)
        if request.pag_scale:
            self.check_perturbed(request)
        if self.guide is not None:
            self.guide.check(replace(request, control=(), pag_scale=0.0))  # it is not perturbed
        if self.refiner is not None:
            self.refiner.check(replace(request, clip_skip=None))

    def check_classified(self, request: Request, classifier: ClassifyingSystem) -> None:
        if not request.classifier_scale:
            return
        if self.refiner is not None:
            raise UsageError(f"{classifier.name} does not lead a refiner: leave one of them out")
        if not all(map(str.strip, request.prompts)):
            raise UsageError(f"the prompt is empty: name the class that {classifier.name} leads to")
        size = classifier.network.config.size
        if (request.width, request.height) != (size, size):
            raise UsageError(
                f"{request.width} x {request.height} pixels, but {classifier.name} sees {size} x {size}: draw that size"
            )

    def check_small(self, request: Request) -> None:
        if request.image is None:
            raise UsageError(f"{self.name} enlarges pictures, but none was given: limner upscale IMAGE, or -i IMAGE")
        if request.mask is not None or request.strength != 1 or request.variation:
            raise UsageError(f"{self.name} draws all of a larger picture anew: leave mask, strength and variation out")
        if request.noise_level > (most := min(MOST_SMALL_NOISE, self.network.config.num_classes - 1)):
            raise UsageError(f"noise_level is {request.noise_level}: {self.name} knows 0 to {most}")

    def sigmas(self, request: Request) -> list[float]:
        """What the sampler walks; over a picture, the end of it. Raises UsageError for a schedule that the interpolant
        cannot have."""
        if request.compat:
            return self.levels(request)[0]
        tokens = request.width * request.height // (2 * self.grid) ** 2
        sigmas = schedules.plan(request.schedule, request.sampler, request.steps, self.interpolant.sized(tokens))
        return sigmas if request.strength is None else schedules.from_strength(sigmas, request.strength)

    def levels(self, request: Request) -> tuple[list[float], list[float]]:
        """What another program walks, and the schedule that it is the end of."""
        again = request.image is None and request.strength is not None
        schedule = request.schedule
        if schedule == "align_your_steps" and request.compat != "comfyui" and self.network.config.vector_width:
            schedule = "align_your_steps_xl"  # A1111's choice
        return compat.sigmas(
            request.compat, schedule, request.sampler, request.steps, request.strength, self.interpolant, again
        )

    def parsed(self, texts: Sequence[str], request: Request, composed: bool = True) -> list[tuple[Part, ...]]:
        """The parts of every text. Raises UsageError for what cannot be meant or done."""
        steps = len(self.sigmas(request)) - 1
        read = {text: parse(text, self.dialect(request), steps, composed) for text in dict.fromkeys(texts)}
        for prompt in read.values() if self.refuses else ():
            refuse(prompt.adapters, self.text_encoder.learned)
        return [read[text].parts for text in texts]

    def dialect(self, request: Request) -> Dialect:
        """What the request says, if it can be read, else the model's own."""
        return request.prompt_dialect if request.prompt_dialect in self.dialects else self.dialects[0]

    def condition(self, prompts: list[str], request: Request, negatives: list[str] | None = None) -> Turns:
        """`negatives` are the negative prompts of the pictures, where they are not that of the request."""
        said = self.parsed(prompts, request)
        negatives = negatives or [request.negative] * len(prompts)
        against = [part for (part,) in self.parsed(negatives, request, composed=False)]
        most = max(map(len, said))
        # for each picture: its parts, as many as its neighbours have, and its negative prompt
        rows = [[*parts, *[negative] * (most + 1 - len(parts))] for parts, negative in zip(said, against, strict=True)]
        ends = sorted({end for row in rows for part in row for end, _ in part.turns})
        turns = {end: tuple(tuple(part.at(end - 1) for part in row) for row in rows) for end in ends}
        weights = tuple(tuple(p[k].weight if k < len(p) else 0.0 for p in said) for k in range(most))

        def told(system: DiffusionSystem, turn: tuple[tuple[Text, ...], ...]) -> Prompts:
            labels = None
            if self.classifier is not None:
                labels = self.classifier.text_encoder.read(tuple(row[:1] for row in turn), "plain", None).labels
                if not system.defaults.prompted:  # the classifier alone reads
                    turn = tuple(tuple(() for _ in row) for row in turn)
            empty = {"zero": False} if request.compat == "comfyui" else {}
            each = 1 if most == 1 and system.unguided(request) else most + 1  # nobody asks for the negative prompt then
            with system.at_work("text_encoder"):
                read = system.text_encoder.read(
                    tuple(row[:each] for row in turn), system.dialect(request), request.clip_skip, **empty
                )
            count, device = len(prompts) * each, system.device
            if system.small_noise is not None:
                read = replace(read, labels=torch.full((count,), request.noise_level, device=device))
            if system.told_guidance is not None:
                scale = torch.full((count,), request.guidance, device=device)
                read = replace(read, guidance=system.told_guidance(scale))
            parts = [read.map(lambda v, k=k: v[k::each]) for k in range(each)]
            parts, uncond = parts[:most], parts[-1]
            width, height = (min(n, request.tile or n) for n in (request.width, request.height))
            guide = None if system.guide is None else told(system.guide, turn)
            sized = tuple(system.sized(part, width, height) for part in parts)
            return Prompts(sized, weights, system.sized(uncond, width, height, score=2.5), guide, labels)

        known = lru_cache(maxsize=MOST_KNOWN)(told)  # a long prompt that changes at every step would fill the memory
        mine: Turns = [(end, partial(known, self, turn), self) for end, turn in turns.items()]
        if self.refiner is None:
            return mine
        switch = self.switch(request)
        theirs = self.refiner.condition(prompts, replace(request, clip_skip=None), negatives)
        ends = [min(end, switch) for end, *_ in mine]
        mine = [(end, *turn[1:]) for end, before, turn in zip(ends, [0, *ends], mine, strict=False) if end > before]
        return mine + [turn for turn in theirs if turn[0] > switch]

    def switch(self, request: Request) -> int:
        """How many steps are done before the refiner takes over: those at timesteps of the first `switch_at` of noise,
        as diffusers counts them."""
        sigmas = self.sigmas(request)[:-1]
        if not isinstance(self.interpolant, Discrete):
            return round(request.switch_at * len(sigmas))
        last = len(self.interpolant.sigmas)
        return sum(round(self.interpolant.time(s)) >= round(last - request.switch_at * last) for s in sigmas)

    def refine(self, refiner: DiffusionSystem) -> None:
        """Let another system do the last steps of a drawing (the ensemble of expert denoisers of Stable Diffusion XL,
        arXiv:2307.01952, section 2.5). Raises CheckpointMismatch for one of other latents, noise or prediction."""
        self.alike(refiner, "go on where", "stops")
        if self.beside or refiner.beside:
            raise CheckpointMismatch(f"{self.name} and {refiner.name} see pictures beside the latents: neither refines")
        refiner.refuses = False
        self.__dict__["refiner"] = refiner  # not a part of this module: it has weights and adapters of its own

    def guided_by(self, guide: DiffusionSystem) -> None:
        """Let guidance lead away from what a weaker model says of the same prompt, in place of the negative prompt
        (autoguidance, arXiv:2406.02070, equation 4). Raises CheckpointMismatch for one of other latents, noise or
        prediction."""
        if self.sees == "picture":
            raise CheckpointMismatch(f"{self.name} is guided by the picture that it edits: leave {guide.name} out")
        self.alike(guide, "guide what", "draws")
        guide.refuses = False
        self.__dict__["guide"] = guide

    def led_by(self, classifier: ClassifyingSystem) -> None:
        """Let a classifier of noisy pictures lead every step to the class of the prompt (arXiv:2105.05233, section 4),
        which a network that is told no class draws then, too. Raises CheckpointMismatch for one of other pictures or
        classes."""
        mine, its = self.text_encoder, classifier.text_encoder
        if not isinstance(mine, Labels) or not isinstance(self.autoencoder, Pixels) or self.autoencoder.channels != 3:
            raise CheckpointMismatch(
                f"{classifier.name} knows classes of pixels, but {self.name} draws otherwise: it leads models of "
                "pixels that are told a class or nothing"
            )
        names = [words.known for words in (mine, its) if words.known]
        if mine.config.num_classes and (mine.config.num_classes != its.config.num_classes or names[1:] != names[:-1]):
            raise CheckpointMismatch(
                f"the {its.config.num_classes} classes of {classifier.name} are not the {mine.config.num_classes} of "
                f"{self.name}: give a classifier that learned the same"
            )
        self.__dict__["classifier"] = classifier  # not a part of this module

    def alike(self, other: DiffusionSystem, does: str, that: str) -> None:
        """Raises CheckpointMismatch unless the two can take turns with the same latents."""
        mine, its = (
            {
                "channels of latents": s.autoencoder.channels,
                "pixels a latent": s.grid,
                "scale of latents": getattr(s.autoencoder, "scale", 1.0),
                "kind of noise": s.interpolant.name,
                "most noise": s.interpolant.sigma_max,
                "prediction": s.prediction.name,
                "channels seen beside": s.beside,
            }
            for s in (self, other)
        )
        if mine != its:
            apart = (f"{name} {its[name]} and {mine[name]}" for name in mine if mine[name] != its[name])
            raise CheckpointMismatch(
                f"{other.name} cannot {does} {self.name} {that}, they are of different kinds: {', '.join(apart)}"
            )

    def sized(self, cond: Conditioning, width: int, height: int, score: float = 6.0) -> Conditioning:
        """`cond` with what SDXL is told of sizes in pixels, or its refiner of sizes and of how good pictures look."""
        vector_width = getattr(self.network.config, "vector_width", 0)
        if not vector_width:
            return cond
        assert cond.pooled is not None
        last = [height, width] if vector_width == cond.pooled.shape[1] + 6 * 256 else [score]
        numbers = torch.tensor([height, width, 0, 0, *last], device=cond.pooled.device)
        return replace(cond, vector=micro_conditioning(cond.pooled, numbers.expand(len(cond.pooled), -1)))

    def words_cut(self, text: str) -> str:
        return self.text_encoder.words_cut(unescaped(text))

    def words_unknown(self, text: str) -> str:
        return self.text_encoder.words_unknown(unescaped(text))

    def words_unreached(self, text: str, request: Request) -> list[str]:
        return unreached(text, len(self.sigmas(request)) - 1) if self.dialect(request) == "a1111" else []

    def denoiser(
        self,
        prompts: Prompts,
        combine: Combine | None,
        interval: tuple[float, float],
        times: Mapping[float, float] | None = None,
        beside: Tensor | None = None,
        controls: Callable[[], list[tuple[Control, Any]]] = list,
        references: Sequence[Reference] = (),
        network: nn.Module | None = None,
        against: Denoise | None = None,
        spoilt: Denoise | None = None,
        pictured: bool = False,
        reference: Latents | None = None,
        variance: dict[float, Tensor] | None = None,
    ) -> Denoise:
        """The denoiser a solver asks, guided by `combine` (None is not at all) within an `interval`: a row of the
        network for each part and the negative prompt of a picture there, one row elsewhere and without guidance if
        there is nothing to compose. `times` are what the network is told of most sigmas that it will be asked at.
        `controls` gives those of the step, each with what it saw of its picture. `network` stands for this system's
        own; `against` says what the negative prompt would, and `spoilt` what guidance pushes away from besides.
        `pictured` asks for one row more, of the negative prompt with nothing beside, for `combine`. `reference` are
        latents that the network looks at. In `variance` is left what the network said of it, of each sigma, where it
        learned to: 0 for DDPM's smaller to 1 for its larger.
        """
        network = self.network if network is None else network
        first = next(network.parameters())
        dtype = first.dtype
        told, every = prompts.ready(dtype, references, pictured)
        weights = torch.tensor(prompts.weights, device=first.device)

        times = {} if times is None else times

        def predict(x: Tensor, sigma: float, cond: Conditioning, wanted: int | None = None, blind: int = 0) -> Tensor:
            """x0 of every row of x, of which the first `wanted`, all without, are told what is wanted, and the last
            `blind` see nothing beside x."""
            scaled = (self.interpolant.input_scale(sigma) * x).to(dtype)
            seen = scaled
            if beside is not None:
                shown = beside.repeat(len(x) // len(beside), 1, 1, 1)
                shown[len(x) - blind :] = 0
                seen = torch.cat([seen, shown.to(dtype)], dim=1)
            clock = partial(told_time, times.get(sigma) or self.interpolant.time(sigma), times)
            rows = len(x) if wanted is None else wanted
            told: list[Any] = []
            if now := controls():
                asks = (scaled, clock, cond, rows, self.graphs, network)
                told = [self.network.together([controlled(control, hint, *asks) for control, hint in now])]
            if reference is not None:
                told = [*(told or [None]), [reference.to(dtype).repeat(len(x) // len(reference), 1, 1, 1)]]
            asked: tuple[Any, ...] = (seen, clock(network, len(x), cond), cond, *told)
            # a copy of the network would be recorded anew in each drawing
            output = self.graphs(network, *asked) if network is self.network else network(*asked)
            output, beside_it = output.to(x.dtype).tensor_split([x.shape[1]], dim=1)
            if variance is not None:
                variance.clear()
                variance[sigma] = (beside_it[: rows or None] + 1) / 2
            return self.prediction.to_x0(output, x, self.interpolant.alpha(sigma), sigma)

        def pair(x: Tensor, sigma: float) -> tuple[Tensor, ...]:
            if prompts.alone:
                rows = 2 + pictured
                return predict(torch.cat([x] * rows), sigma, every, len(x), len(x) * pictured).chunk(rows)
            *parts, uncond = told  # one after another, for the memory's sake
            negative = predict(x, sigma, uncond, 0)
            more = [predict(x, sigma, uncond, 0, len(x))] if pictured else []
            return composed([predict(x, sigma, part) for part in parts], list(weights), negative), negative, *more

        def plain(x: Tensor, sigma: float) -> Tensor:
            return predict(x, sigma, told[0]) if prompts.alone else pair(x, sigma)[0]

        if combine is None:
            return plain
        both = pair if against is None else lambda x, sigma: (plain(x, sigma), against(x, sigma))
        return within(interval, guided(both, combine, spoilt), plain, self.interpolant)

    def given(self, request: Request, count: int) -> dict[str, Tensor]:
        """What `sample` is given of the picture and the mask of a request, for `count` pictures."""
        device, found = self.device, {}
        width, height = request.width // self.enlarges, request.height // self.enlarges
        picture = None
        if request.image is not None:
            picture = pictures.to_tensor(request.image, width, height).to(device)
        if picture is not None and self.small_noise is None:
            found["start"] = self.encode(picture, request.vae_tile)
        if self.small_noise is not None:
            assert picture is not None
            found["beside"] = self.opaque(picture)
        elif self.sees == "mask":
            found["beside"] = self.seen(picture, request)
        elif self.sees == "picture":  # as it comes out of the encoder, but for CosXL
            cosxl = isinstance(self.interpolant, Preconditioned) and self.prediction.name == "v"
            found["beside"] = found["start"] if cosxl else self.autoencoder.from_latents(found["start"])
        elif self.sees == "hint":
            found["beside"] = found.pop("start")
        elif self.sees == "reference" and "start" in found:
            found["reference"] = found.pop("start")
        elif self.sees == "depth":
            assert request.depth is not None
            found["beside"] = pictures.depth_tensor(request.depth, width, height, self.grid).to(device)
        if request.mask is not None and self.sees != "mask":
            found["paint"] = pictures.to_latents(request.mask, width, height, self.grid).to(device)
        return {name: value.expand(count, -1, -1, -1) for name, value in found.items()}

    def seen(self, picture: Tensor | None, request: Request) -> Latents:
        """What an inpainting network sees beside x: the mask, and the latents of the picture without what is under it
        (1, 1 + channels, h, w), of FLUX.1 Fill these and then the mask, pixel by pixel (1, channels + 64, h, w).
        Without a mask, or a picture, all is to be painted."""
        width, height, device = request.width, request.height, self.device
        mask = torch.ones(1, 1, height, width, device=device)
        kept = torch.zeros(1, 3, height, width, device=device)
        if picture is not None and request.mask is not None:
            mask = (pictures.mask_tensor(request.mask, width, height).to(device) >= 0.5).float()
            kept = self.opaque(picture) * (1 - mask)
        around = self.encode(kept, request.vae_tile)
        if self.beside > 1 + self.autoencoder.channels:  # every pixel of the mask
            return torch.cat([around, F.pixel_unshuffle(mask, self.grid)], dim=1)
        small = F.interpolate(mask, (height // self.grid, width // self.grid), mode="nearest")
        return torch.cat([small, around], dim=1)

    def inverted(self, request: Request) -> Latents:
        """The x (1, c, h, w) at the first of its levels from which the picture of a request comes back, told what
        `request.invert` says and not guided (DDIM inversion, arXiv:2010.02502, section 4.3)."""
        told = replace(request, guidance=1.0, image_guidance=1.0, pag_scale=0.0, classifier_scale=0.0)
        given = self.given(told, 1)
        given.pop("paint", None)
        cond = self.condition([request.invert or ""], told, [""])
        return self.sample(cond, told, lambda shape: torch.zeros(1, *shape, device=self.device), **given, upward=True)

    def sample(
        self,
        cond: Turns,
        request: Request,
        noise: Callable[[tuple[int, ...]], Tensor],
        start: Latents | None = None,
        paint: Tensor | None = None,
        beside: Tensor | None = None,
        reference: Latents | None = None,
        begun: Latents | None = None,
        upward: bool = False,
    ) -> Latents:
        """`start` are latents to begin from (img2img), walked from `request.strength` of the way into noise; `paint`
        (b, 1, h, w) is 0 where they stay what they are. `beside` are channels that the network sees beside x,
        `reference` are latents of a picture that it looks at; a small picture to be enlarged gets noise first. What is
        told changes with the steps done, however often a sampler asks in a step. With `request.tile` the network sees
        overlapping tiles, and each step goes on from what it says of them, blended (MultiDiffusion, arXiv:2302.08113,
        equation 5, with weights that fade). `begun` is x where it begins, if that is not to be made of noise; `upward`
        goes from `start` to it."""
        shape = (self.autoencoder.channels, request.height // self.grid, request.width // self.grid)
        side = request.tile // self.grid or max(shape[1:])
        overlap = tiling.overlap_of(side)
        places = tiling.tiles(*shape[1:], side, overlap)
        sigmas = self.sigmas(request)
        if self.small_noise is not None and beside is not None:
            sigma = self.small_noise.sigmas[request.noise_level]
            small = self.small_noise.mix(beside, noise(tuple(beside.shape[1:])), sigma)
            beside = self.small_noise.input_scale(sigma) * small
        eps = noise(shape)
        # all of it anew: x knows nothing of what was there; A1111 begins over what it edits
        anew = request.mask is not None and not request.compat
        anew |= self.sees == "picture" and not request.compat.startswith("a1111")
        over = None if anew and request.strength == 1 else start
        draw: Any = lambda: noise(shape)  # noqa: E731
        x: Tensor
        if upward:
            assert start is not None
            x = start / self.interpolant.input_scale(sigmas[-1]) if sigmas[-1] else start
        elif begun is not None:
            x = begun
        elif request.compat:
            levels = self.levels(request)
            x = compat.begin(request.compat, request.sampler, self.interpolant, over, eps, levels)
            if request.sampler in compat.BROWNIAN:
                draw = noise.brownian(shape, levels[request.compat != "comfyui"])  # type: ignore[attr-defined]
        elif over is None:
            bare = request.sampler in schedules.BARE and request.schedule != "leading"
            bare = bare and isinstance(self.interpolant, Discrete)
            x = sigmas[0] * eps if bare else self.interpolant.start(eps, sigmas[0])
        else:
            x = self.interpolant.mix(over, eps, sigmas[0])
        sampler = compat.solver(request.compat, request.sampler) if request.compat else samplers.get(request.sampler)
        stirred = {
            name: value for name, value in (("eta", request.eta), ("churn", request.churn or None)) if value is not None
        }
        sampler = samplers.invert if upward else partial(sampler, **stirred)
        linear = request.schedule == "linspace" and not request.compat
        times = {sigma: self.interpolant.time(sigma, linear) for sigma in sigmas if sigma}
        interval = request.guidance_interval or self.defaults.guidance_interval
        combine = [self.combine(request) for _ in places]
        push = classifier_free(1 + request.pag_scale) if request.pag_scale else None
        perturbed = lru_cache(maxsize=None)(lambda system: unet.perturbed(system.network, request.pag_layers))
        seeing = [self]  # controls and pictures as words, and a guide that can
        if self.guide is not None and self.guide.network.config == self.network.config:
            seeing.append(self.guide)
        told = [(one, self.shown(one, request)) for one in request.control if one.weight]
        controls = [[(one, self.see(one, hint, place)) for one, hint in told] for place in places]
        last = len(sigmas) - 1
        steps = last - 1 if upward else 0  # done when a drawing is here
        newest = x
        variance: dict[float, Tensor] | None = {} if self.learned_variance and len(places) == 1 else None

        there = contextlib.ExitStack()
        if self.works_on is not None:
            for _, tell, _ in cond:  # the words before the networks, which need not be there together
                tell()

        present: DiffusionSystem | None = None

        def bring(system: DiffusionSystem) -> None:
            nonlocal present
            if present is not system:
                there.close()
                for one in (system, system.guide):
                    if one is not None:
                        there.enter_context(one.at_work("network"))
            present = system

        @lru_cache(maxsize=len(places))
        def denoiser(turn: int, tile: int) -> Denoise:
            _, told, system = cond[turn]
            prompts = told()
            bring(system)
            top, bottom, left, right = places[tile]
            near = None if beside is None else beside[:, :, top:bottom, left:right]

            def now() -> list[tuple[Control, Any]]:
                return [row for row in controls[tile] if row[0].at(steps, last)]

            def sees(other: DiffusionSystem) -> tuple[Any, Sequence[Reference]]:
                return (now, request.ip_adapter) if any(other is one for one in seeing) else (list, ())

            def plain(other: DiffusionSystem, said: Prompts, network: nn.Module | None = None) -> Denoise:
                return other.denoiser(said, None, interval, times, near, *sees(other), network)

            against, spoilt = None, plain(system, prompts, perturbed(system)) if request.pag_scale else None
            if system.unguided(request):
                return system.denoiser(
                    prompts, push, interval, times, near, *sees(system), None, against=spoilt, reference=reference,
                    variance=variance,
                )  # fmt: skip
            if prompts.guide is not None:
                assert system.guide is not None
                against = plain(system.guide, prompts.guide)
            pictured = request.image_guidance != 1
            more: Any = {"against": against, "spoilt": spoilt, "pictured": pictured, "reference": reference}
            more["variance"] = variance
            return system.denoiser(prompts, combine[tile], interval, times, near, *sees(system), **more)

        def on_step(done: int, total: int) -> None:
            nonlocal steps
            steps = last - 1 - done if upward else done
            if request.on_step is not None:
                request.on_step(done, total, partial(self.preview, newest))

        def foreseen(x: Tensor, sigma: float) -> Tensor:
            turn = next(k for k, (until, *_) in enumerate(cond) if steps < until)
            x0 = tiling.blended(lambda tile, part: denoiser(turn, tile)(part, sigma), x, side, overlap)
            return x0.clamp(-1, 1) if self.clip else x0

        led: Denoise = foreseen
        if (classifier := self.classifier) is not None and request.classifier_scale:
            with torch.inference_mode(False):  # a tensor of its mode could not be differentiated with
                labels = cond[0][1]().labels.clone()  # type: ignore[union-attr]
            likelihood = partial(classifier.likelihood, labels=labels)
            most = classifier.interpolant.ratio_max
            led = classified(foreseen, likelihood, request.classifier_scale, self.interpolant, most)
            led = within(interval, led, foreseen, self.interpolant)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            nonlocal newest
            x0 = led(x, sigma)
            newest = x0 if paint is None else torch.lerp(start, x0, paint)  # type: ignore[arg-type]
            return newest

        dtype = next(self.network.parameters()).dtype
        apart = [one for one in request.ip_adapter if not one.behind]
        references = [(one.network.to(self.device, dtype), one.weight_in) for one in apart]
        with contextlib.ExitStack() as attached:
            attached.enter_context(there)
            for system in seeing:
                attached.enter_context(ip_adapter.attached(system.network, references))
            told_too: Any = {} if variance is None else {"spread": variance.__getitem__}
            x = sampler(denoise, x, sigmas, self.interpolant, noise=draw, on_step=on_step, **told_too)
        if self.works_on is not None:
            for network in (*(c.network for c in request.control), *(r.network for r in apart)):
                network.cpu()
        return self.interpolant.input_scale(sigmas[-1]) * x if sigmas[-1] and not upward else x

    def hint(self, control: Control, request: Request) -> Tensor:
        """The picture of a control, on white, (1, 3, h, w) in [0, 1] and of the size of the request."""
        image = pictures.fit(hints.on_white(control.image), request.width, request.height)
        image = hints.make(control.maker, image, control.finder) if control.maker else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

    def shown(self, control: Control, request: Request) -> Tensor:
        """All that a control may see of it: the picture, or (1, c, h, w) its latents, which some take `scaled` alone,
        and not shifted."""
        return self.as_seen(control.network, self.hint(control, request), request.vae_tile)

    def as_seen(self, network: nn.Module, hint: Tensor, tile: int | None = None) -> Tensor:
        """The same of hints (b, 3, h, w) in [0, 1] for a control's network."""
        sees = getattr(network, "sees", "pixels")
        if sees == "pixels":
            return hint
        latents = self.encode(2 * hint.to(self.device) - 1, tile)
        return self.autoencoder.scale * self.autoencoder.from_latents(latents) if sees == "scaled" else latents

    def see(self, control: Control, hint: Tensor, place: tuple[int, int, int, int]) -> Any:
        """What a control sees of what is `shown` to it at a place in latents: top, bottom, left, right."""
        network, dtype = control.network, next(self.network.parameters()).dtype
        network.to(self.device, dtype)  # which may have been widened since it was opened
        unit = self.grid if getattr(network, "sees", "pixels") == "pixels" else 1
        top, bottom, left, right = (n * unit for n in place)
        near = hint[:, :, top:bottom, left:right].to(self.device, dtype)
        return network.see(near, getattr(network, "kinds", {}).get(control.kind, 0))

    def check_perturbed(self, request: Request) -> None:
        if not isinstance(self.network, UNet):
            raise UsageError(
                f"{self.name} has no attention among pixels alone to perturb: pag_scale is for U-Nets, such as Stable "
                "Diffusion's"
            )
        unet.within(self.network, request.pag_layers)

    def unguided(self, request: Request) -> bool:
        """Whether the prompt is followed plainly: as asked for, or since the network is told the guidance instead."""
        return request.guidance == 1 == request.image_guidance or self.told_guidance is not None

    def combine(self, request: Request) -> Combine:
        """The guidance that a request asks for, which may remember: one for each drawing."""
        way = Guidance(
            scale=request.guidance, way=request.guidance_kind, rescale=request.guidance_rescale,  # type: ignore[arg-type]
            mimic=request.guidance_mimic, push=request.pag_scale, picture=request.image_guidance,
        )  # fmt: skip
        combine = combining(way, self.prediction, self.interpolant)
        few = getattr(self.network.config, "guided_channels", 0)
        return on_first(combine, few) if few else combine

    def opaque(self, images: Images) -> Images:
        """Transparency goes onto white where the autoencoder knows none."""
        return pictures.opaque(images, self.autoencoder.config.image_channels)

    def encode(self, images: Images, tile: int | None = None) -> Latents:
        """In tiles of so many pixels, where None leaves it to the size of the pictures."""
        with torch.no_grad(), self.at_work("autoencoder"):
            height, width = images.shape[2:]
            return tiling.through(self.autoencoder, width, height, tile).encode(self.opaque(images))

    def decode(self, latents: Latents, tile: int | None = None) -> Images:
        """As `encode`."""
        height, width = (n * self.grid for n in latents.shape[2:])
        with self.at_work("autoencoder"):
            return tiling.through(self.autoencoder, width, height, tile).decode(latents)

    @torch.no_grad()
    def preview(self, latents: Latents) -> list[Image.Image]:
        """A small picture of each row, a pixel a latent, without decoding (see `limner.systems.previews`)."""
        if self.latent_rgb is None:
            self.latent_rgb = previews.of(self.autoencoder)
        return previews.show(latents, self.latent_rgb)
