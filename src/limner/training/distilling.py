"""A model that is there taught to draw in a few steps, or without a second evaluation for guidance.

Consistency distillation (LCM, arXiv:2310.04378; as an adapter, arXiv:2311.05556): the student says of every x on a
trajectory of the guided teacher where that ends, by learning at one level of noise what it says itself one of the
teacher's steps below. Guidance distillation (arXiv:2210.03142, stage one): the student says at once what the guided
teacher says in two evaluations.

The student is a copy of the teacher's network, or an adapter on it. Many scales of guidance are for a network that is
told one: a copy of a U-Net or of a FLUX.1 gets the place for it. All others learn one scale, for good.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from limner import catalog
from limner.adapters.trainable import AdapterConfig
from limner.errors import UsageError
from limner.models import flux, unet
from limner.models.flux import Flux
from limner.models.unet import UNet
from limner.nn.graphs import compile_blocks
from limner.nn.initialization import zero
from limner.sampling.interpolants import Discrete, Flow, Interpolant, Shifted
from limner.systems.objectives import Objective, counted
from limner.training import tuning
from limner.training.adapting import Adapting, Beside
from limner.training.memory import kept_in
from limner.types import Conditioning

if TYPE_CHECKING:
    from limner.training.config import TrainConfig

TOLD_WIDTH = 256
"""Of what a U-Net is told of guidance, as in the models that LCM's authors published."""
STEPS = 4
"""What a consistency model draws in if nobody says."""
DATA, TIME_SCALE = 0.5, 10.0
"""Of the boundary scalings: the deviation of data, and how many times as long as it is a time counts."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """`kind` is what is learned: to draw in few steps (`consistency`), or without a second evaluation for guidance.
    `guidance` is one scale, 1 for none, or the least and the most of many that the student is told. Of `consistency`
    alone: the teacher's trajectory has so many `steps`; the `loss` of a difference d is sqrt(d^2 + `huber`^2) - huber,
    or d^2; the target is said by the student's average, which keeps `average` of itself a step, or with 0 by the
    student."""

    kind: Literal["consistency", "guidance"] = "consistency"
    guidance: tuple[float, ...] = (3.0,)
    steps: int = 50
    loss: Literal["huber", "l2"] = "huber"
    huber: float = 0.001
    average: float = 0.95


class Distilling(Beside):
    """What both students have in common; `base` is the teacher."""

    recordable = False
    how: DistillationConfig
    told: Any = None
    """What the student is told of a scale of guidance, None for nothing."""
    averages: nn.Module | None
    """Of its parameters, under their names with : for each dot."""
    followed = -1
    """The step at which the averages were moved last."""

    def begin(self, how: DistillationConfig) -> None:
        """To be called when the parameters are there. Raises UsageError for what cannot be distilled so."""
        check(self.base, how, self.told is not None)
        self.how, self.averages = how, None
        if how.kind == "consistency" and how.average:
            averages = nn.Module()
            for name, p in self.named_parameters():
                averages.register_buffer(name.replace(".", ":"), p.detach().clone())
            self.averages = averages

    def student(self, x: Tensor, t: Tensor, level: Tensor, cond: Any, scale: Tensor) -> Tensor:
        """What the student's network says."""
        return self.ask(self.learning, x, t, level, cond, self.told, scale)

    @property
    @abstractmethod
    def learning(self) -> Any:
        """The student's network."""

    @contextmanager
    def taught(self) -> Iterator[Any]:
        """The teacher's network, as it was before the student."""
        yield self.base.network

    def ask(self, network: Any, x: Tensor, t: Tensor, level: Tensor, cond: Any, told: Any, scale: Tensor) -> Tensor:
        """What a network says of x, in float32, without a variance beside it."""
        dtype = next(network.parameters()).dtype
        if told is not None:
            cond = replace(cond, guidance=told(scale))
        cond = cond.map(lambda v: v.to(dtype) if v.is_floating_point() else v)
        seen = (self.base.interpolant.input_scale(level) * x).to(dtype)
        return network(seen, t, cond)[:, : x.shape[1]].float()

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, level: Tensor, cond: Any, nothing: Any, scale: Tensor) -> Tensor:
        """What the guided teacher says: uncond + scale * (cond - uncond), or what it says when it is told the scale."""
        base: Any = self.base
        with self.taught() as network:
            if base.told_guidance is not None:
                return self.ask(network, x, t, level, cond, base.told_guidance, scale)
            both, (xx, tt, levels) = Conditioning.cat([nothing, cond]), (torch.cat([v, v]) for v in (x, t, level))
            unwanted, wanted = self.ask(network, xx, tt, levels, both, None, scale).chunk(2)
        few = getattr(network.config, "guided_channels", 0) or x.shape[1]
        guided = torch.lerp(unwanted[:, :few], wanted[:, :few], scale[:, None, None, None])
        return torch.cat([guided, wanted[:, few:]], dim=1)

    def read(self, captions: list[str], x0: Tensor, score: float = 6.0) -> Any:
        base: Any = self.base
        with torch.no_grad():
            read = (base.texts or base.text_encoder.encode)(captions)
            return base.sized(read, x0.shape[3] * base.grid, x0.shape[2] * base.grid, score)

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """`batch` is that of `limner.systems.diffusion.DiffusionSystem.loss`; no caption is dropped, since the teacher
        has been guided already."""
        if "step" in batch:
            self.follow(batch["step"])
        x0 = batch["latents"] if "latents" in batch else self.base.encode(batch["images"])
        cond, nothing = self.read(batch["captions"], x0), None
        if self.base.told_guidance is None:
            nothing = self.read([""], x0, 2.5).map(lambda v: v.expand(len(x0), *v.shape[1:]))
        low, high = self.how.guidance[0], self.how.guidance[-1]
        scale = low + (high - low) * torch.rand(len(x0), generator=generator, device=x0.device)
        counts = batch.get("mask"), batch.get("weight")
        if self.how.kind == "guidance":
            return {"loss": self.guided(x0, cond, nothing, scale, generator, *counts)}
        error = self.inconsistency(x0, cond, nothing, scale, generator)
        if self.how.loss == "huber":
            error = (error.square() + self.how.huber**2).sqrt() - self.how.huber
        else:
            error = error.square()
        return {"loss": counted(error, *counts).mean()}

    def guided(
        self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator, *counts: Tensor | None
    ) -> Tensor:
        """The error of the student's prediction, where the guided teacher's is right, as the objective counts it."""
        base: Any = self.base
        t, sigma = base.interpolant.draw(len(x0), generator, x0.device, base.objective.times)
        level = sigma[:, None, None, None]
        alpha = base.interpolant.alpha(level)
        x = alpha * x0 + level * base.objective.noise(x0, generator)
        target = self.teacher(x, t, level, cond, nothing, scale)
        output = self.student(x, t, level, cond, scale)
        return base.objective.error(output, target, base.prediction, alpha, level, *counts)

    def inconsistency(self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator) -> Tensor:
        """How far what the student says of x lies from what it says, or its average, of where one step of the guided
        teacher leads from x (arXiv:2310.04378, equation 16; the step is DDIM's, which for a flow is Euler's)."""
        base: Any = self.base
        interpolant = base.interpolant.sized(x0.shape[2] * x0.shape[3] // 4)
        times, sigmas = (torch.tensor(row, device=x0.device) for row in levels(interpolant, self.how.steps))
        place = torch.randint(1, len(times), (len(x0),), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        (t, level), (end, below) = ((times[k], sigmas[k][:, None, None, None]) for k in (place, place - 1))
        alpha = interpolant.alpha(level)
        x = alpha * x0 + level * eps
        with torch.no_grad():
            says = self.teacher(x, t, level, cond, nothing, scale)
            guess = base.prediction.to_x0(says, x, alpha, level)
            lower = interpolant.alpha(below) * guess + below / level * (x - alpha * guess)
            with self.averaged():
                target = self.consistent(lower, end, below, cond, scale)
        return self.consistent(x, t, level, cond, scale) - target

    def consistent(self, x: Tensor, t: Tensor, level: Tensor, cond: Any, scale: Tensor) -> Tensor:
        """Where the trajectory through x ends, as the student says: of a flow x0 = x - sigma * v, which at sigma = 0 is
        x by itself, of timesteps a mixture of x and x0 that is x at the first (equation 9)."""
        base: Any = self.base
        alpha = base.interpolant.alpha(level)
        x0 = base.prediction.to_x0(self.student(x, t, level, cond, scale), x, alpha, level)
        if not isinstance(base.interpolant, Discrete):
            return torch.where(level > 0, x0, x)
        time = TIME_SCALE * t[:, None, None, None].float()
        length = time.square() + DATA**2
        return DATA**2 / length * base.interpolant.input_scale(level) * x + time / length.sqrt() * x0

    def follow(self, step: int) -> None:
        """Move the averages, once a step, towards what the step before left."""
        if self.averages is None or step == self.followed:
            return
        keep = self.how.average if step else 0.0  # what training begins with may have been put in since
        self.followed = step
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.buffers()), list(self.parameters()), 1 - keep)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with its averages, if it has any, in place of its parameters."""
        if self.averages is None:
            yield
            return
        parameters = list(self.parameters())
        own = [p.data for p in parameters]
        try:
            for p, average in zip(parameters, self.averages.buffers(), strict=True):
                p.data = average
            yield
        finally:
            for p, data in zip(parameters, own, strict=True):
                p.data = data

    @property
    def draws(self) -> dict[str, Any]:
        """What the student draws with if nobody says, where that is not what the teacher does."""
        how, usual = self.how, self.base.defaults
        guidance = 1.0
        if self.told is not None:
            guidance = min(max(usual.guidance, how.guidance[0]), how.guidance[-1])
        plain: dict[str, Any] = {"guidance": guidance, "guidance_kind": "cfg", "guidance_rescale": 0.0}
        if how.kind == "guidance":
            return plain
        timed = isinstance(self.base.interpolant, Discrete)
        return {**plain, "steps": STEPS, "sampler": "lcm", "schedule": "lcm" if timed else usual.schedule}

    @contextmanager
    def by_default(self) -> Iterator[Any]:
        """The model with the defaults of the student."""
        base: Any = self.base
        usual = base.defaults
        base.defaults = replace(usual, **self.draws)
        try:
            yield base
        finally:
            base.defaults = usual

    @contextmanager
    def as_drawn(self, name: str) -> Iterator[Any]:
        with self.by_default(), super().as_drawn(name) as model:
            yield model


class DistillingAdapter(Distilling, Adapting):
    """An adapter that has the teacher's network do what the student does."""

    def __init__(self, base: Any, how: DistillationConfig, adapter: AdapterConfig, seed: int) -> None:
        Adapting.__init__(self, base, adapter, seed)
        self.told = base.told_guidance
        self.begin(how)

    @property
    def learning(self) -> Any:
        return self.base.network

    @contextmanager
    def taught(self) -> Iterator[Any]:
        self.off()
        try:
            yield self.base.network
        finally:
            self.on()


class DistillingNetwork(Distilling):
    """A copy of the teacher's network, in float32, and told of guidance if it is to know many scales of it."""

    def __init__(self, base: Any, how: DistillationConfig, source: str) -> None:
        super().__init__(base)
        self.source = source
        self.told = base.told_guidance
        self.network: Any = copy.deepcopy(base.network).float().requires_grad_(True)
        if self.told is None and len(how.guidance) > 1:
            self.told = grow(self.network)
        self.begin(how)

    @property
    def learning(self) -> Any:
        return self.network

    @property
    def passed(self) -> list[nn.Module]:
        return [self]

    def compile(self, **how: Any) -> None:
        for network in (self.network, self.base.network):
            compile_blocks(network, **how)

    @property
    def notes(self) -> list[str]:
        """What there is to tell of a run."""
        told = self.how.kind == "guidance" and self.told is not None and isinstance(self.network, UNet)
        if not told or catalog.recognise(catalog.find(self.source)) is None:
            return []
        return [
            "its file will pass for a consistency model, as all U-Nets do that are told guidance: draw with --sampler "
            f"{self.base.defaults.sampler} --steps {self.base.defaults.steps}"
        ]

    def opened(self, path: Path) -> nn.Module:
        """A student in a file, to begin from. Raises FileProblem, CheckpointMismatch."""
        found: Any = catalog.load(path, dtype=torch.float32)
        return nn.ModuleDict({"network": found.network})

    def on(self) -> None:
        """The student is no part of the model."""

    def off(self) -> None:
        """As `on`."""

    def write(self, path: Path) -> None:
        with self.as_drawn("") as model:
            tuning.write(model, self.source, path)

    @contextmanager
    def as_drawn(self, name: str) -> Iterator[Any]:
        """The model with the student for its network, as its file is."""
        with self.by_default() as base:
            kept = base.network, base.told_guidance
            base.network, base.told_guidance = self.network, self.told
            try:
                yield base
            finally:
                base.network, base.told_guidance = kept
                base.graphs.clear()


def loaded(config: TrainConfig, device: torch.device) -> Distilling:
    """The student of `config.model`, and with it that. Raises UsageError, FileProblem."""
    how = config.distillation
    assert how is not None
    if config.word is not None:
        raise UsageError(f"{config.name} distils a network: leave word out")
    if config.control is not None:
        raise UsageError(f"{config.name} distils what draws from words alone: leave control out")
    if config.adapter is not None and config.adapter.text_encoder:
        raise UsageError(f"{config.name} reads words as its teacher does: leave adapter.text_encoder out")
    if config.sharding == "fsdp":
        raise UsageError("sharding=fsdp is for networks that learn alone: leave it out, or distillation")
    if how.kind == "consistency" and config.loss != Objective():
        raise UsageError("loss.… is of what learns from noise, a consistency model has distillation.loss: leave it out")
    dtype = kept_in(config, device, casts=True)
    if config.adapter is not None:
        base = catalog.load(config.model, device, dtype=dtype)
        return DistillingAdapter(base, how, config.adapter, config.seed)
    tuning.check_kept(dtype)
    student = DistillingNetwork(catalog.load(config.model, device, dtype=torch.float32), how, config.model)
    tuning.check_name(config, student.base)
    student.base.network.to(dtype)
    return student


def check(base: Any, how: DistillationConfig, told: bool) -> None:
    """Raises UsageError for what cannot be."""
    if not hasattr(base, "network") or base.sees or base.small_noise is not None:
        raise UsageError(f"{base.name} draws from more than words: a model that draws from words alone is distilled")
    scales = how.guidance
    if not 1 <= len(scales) <= 2 or not all(1 <= s <= 100 for s in scales) or scales[0] > scales[-1]:
        raise UsageError(
            f"distillation.guidance={scales}: give one scale from 1 to 100, or the least and the most of many"
        )
    if len(scales) > 1 and not told:
        raise UsageError(
            f"distillation.guidance={scales[0]:g},{scales[1]:g} is for a student that is told its guidance, which "
            f"this one of {base.name} is not: give one scale"
        )
    if how.kind == "guidance":
        if base.told_guidance is not None:
            raise UsageError(f"{base.name} is told its guidance already, and draws without a second evaluation")
        return
    if not 0 <= how.average < 1 or not (0 < how.huber < math.inf):
        raise UsageError(f"distillation.average={how.average:g}, huber={how.huber:g}: give 0 to below 1, and above 0")
    levels(base.interpolant, how.steps)


def levels(interpolant: Interpolant, steps: int) -> tuple[list[float], list[float]]:
    """Times and sigmas of the teacher's trajectory, rising from its end: of timesteps the first and every so many-th,
    as LCM has them, of a flow evenly spaced ones, shifted as its schedules are. Raises UsageError."""
    if not 1 <= steps <= 1000:
        raise UsageError(f"distillation.steps={steps}: give 1 to 1000")
    if isinstance(interpolant, Discrete):
        count = len(interpolant.sigmas)
        if 2 * steps > count:
            raise UsageError(f"distillation.steps={steps}: give {count // 2} at most, this model has {count} timesteps")
        places = [max(0, round(count * k / steps) - 1) for k in range(steps + 1)]
        return [float(k) for k in places], [interpolant.sigmas[k] for k in places]
    if not isinstance(interpolant, Flow):
        raise UsageError("consistency is learned along timesteps or a flow, and this model has neither")
    sigmas = [k / steps for k in range(steps + 1)]
    if isinstance(interpolant, Shifted):
        sigmas = [interpolant.at(1000 * sigma) for sigma in sigmas]
    return sigmas, sigmas


def grow(network: Any) -> Any:
    """Give a network a place for the scale of guidance, of which it makes nothing yet; what it is told of one. None
    where there can be no place."""
    device = next(network.parameters()).device
    if isinstance(network, UNet):
        network.config = replace(network.config, guidance_width=TOLD_WIDTH)
        made = nn.Linear(TOLD_WIDTH, network.config.widths[0], bias=False, device=device)
        network.time_embedding.cond_proj = made
        zero(made)
        return partial(unet.guidance_embedding, width=TOLD_WIDTH)
    if isinstance(network, Flux):
        network.config = replace(network.config, guidance_embedded=True)
        network.guidance_in = flux.EmbeddingMLP(flux.FREQUENCIES, network.config.width).to(device)
        zero(network.guidance_in.out_layer)
        return flux.guidance_embedding
    return None
