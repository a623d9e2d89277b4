"""A model that is there taught to draw in a few steps, or without a second evaluation for guidance.

Consistency distillation (arXiv:2303.01469, algorithm 2; LCM, arXiv:2310.04378; as an adapter, arXiv:2311.05556): the
student says of every x on a trajectory of the guided teacher where that ends, by learning at one level of noise what it
says itself one of the teacher's steps below. Consistency training (the same, algorithm 3, as improved in
arXiv:2310.14189) knows no teacher: below x lies the same picture under less of the same noise. Progressive distillation
(arXiv:2202.00512, algorithm 2): the student does in one step what its teacher does in two, then teaches the next.
Guidance distillation (arXiv:2210.03142, stage one): the student says at once what the guided teacher says in two
evaluations.

The student is a copy of the teacher's network, or an adapter on it. Many scales of guidance are for a network that is
told one: a copy of a U-Net or of a FLUX.1 gets the place for it. All others learn one scale, for good.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
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
from limner.sampling import schedules
from limner.sampling.interpolants import Discrete, Flow, Interpolant, Preconditioned, Shifted
from limner.systems.objectives import Objective, counted
from limner.training import tuning
from limner.training.adapting import Adapting, Beside
from limner.training.memory import kept_in
from limner.types import Conditioning, Defaults

if TYPE_CHECKING:
    from limner.training.config import TrainConfig

TOLD_WIDTH = 256
"""Of what a U-Net is told of guidance, as in the models that LCM's authors published."""
STEPS, STEPS_OF_EDM = 4, 2
"""What a consistency model draws in if nobody says, and one with EDM's preconditioning."""
DATA, TIME_SCALE = 0.5, 10.0
"""Of the boundary scalings of timesteps: the deviation of data, and how many times as long as it is a time counts."""
FIRST = 10
"""Steps of the trajectory that consistency training begins with (arXiv:2310.14189, table 1)."""
MEAN, STD = -1.1, 2.0
"""Of the logarithm of the sigmas that it draws (the same)."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """`kind` is what is learned: to draw in few steps, by a teacher (consistency) or without one
    (consistency-training), or in fewer and fewer (progressive); or without a second evaluation for guidance.
    `guidance` is one scale, 1 for none, or the least and the most of many that the student is told. The trajectory
    has so many `steps`, of consistency-training so many at last, of progressive those of the first teacher; these are
    halved until `least` are left. Of consistency alone: the `loss` of a difference d, of a pixel or with EDM's
    preconditioning the root of its mean square over a picture, is sqrt(d^2 + `huber`^2) - huber, or d^2. What the
    student's average keeps of itself a step is `average`, which says the target of consistency and is the next teacher
    of progressive; with 0 the student itself is."""

    kind: Literal["consistency", "consistency-training", "progressive", "guidance"] = "consistency"
    guidance: tuple[float, ...] = (3.0,)
    steps: int = 50
    least: int = 1
    loss: Literal["huber", "l2"] = "huber"
    huber: float = 0.001
    average: float = 0.95


class Distilling(Beside):
    """What both students have in common; `base` is the teacher."""

    how: DistillationConfig
    told: Any = None
    """What the student is told of a scale of guidance, None for nothing."""
    averages: nn.Module | None
    """Of its parameters, under their names with : for each dot."""
    followed = -1
    """The step at which the averages were moved last."""
    total = 1
    """Steps of the whole run."""

    def begin(self, how: DistillationConfig) -> None:
        """To be called when the parameters are there. Raises UsageError for what cannot be distilled so."""
        check(self.base, how, self.told is not None)
        self.how, self.averages = how, None
        self.rows: dict[Any, tuple[Tensor, ...]] = {}
        if how.kind in ("consistency", "progressive") and how.average:
            self.averages = copied(self.named_parameters())

    def train(self, mode: bool = True) -> Any:
        """Nothing is dropped out: what is compared would have lost different parts (arXiv:2303.01469, table 3)."""
        return super().train(False)

    def table(self, key: Any, device: torch.device, make: Callable[[], Iterable[list[float]]]) -> tuple[Tensor, ...]:
        """Rows of numbers on a device, made and sent there once."""
        if (key, device) not in self.rows:
            self.rows[key, device] = tuple(torch.tensor(row, device=device) for row in make())
        return self.rows[key, device]

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
        """What the guided teacher says: uncond + scale * (cond - uncond), or what it says when it is told the scale, or
        of `cond` alone where there is `nothing` to lead away from."""
        base: Any = self.base
        with self.taught() as network:
            if base.told_guidance is not None or nothing is None:
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

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """What the student is asked, x, t, "level", "cond" and "scale", and what the teacher, or the student's average,
        says it should be. `batch` is that of `limner.systems.diffusion.DiffusionSystem.loss`; no caption is dropped,
        since the teacher has been guided already."""
        if "step" in batch:
            self.follow(batch["step"])
        x0 = batch["latents"] if "latents" in batch else self.base.encode(batch["images"])
        cond, nothing = self.read(batch["captions"], x0), None
        if self.base.told_guidance is None and self.guides:
            nothing = self.read([""], x0, 2.5).map(lambda v: v.expand(len(x0), *v.shape[1:]))
        low, high = self.how.guidance[0], self.how.guidance[-1]
        scale = low + (high - low) * torch.rand(len(x0), generator=generator, device=x0.device)
        counts: dict[str, Any] = {name: batch[name] for name in ("mask", "weight") if name in batch}
        ask = {
            "guidance": self.guided, "progressive": self.halved, "consistency": self.inconsistency,
            "consistency-training": self.untaught,
        }[self.how.kind]  # fmt: skip
        with torch.no_grad():
            asked = ask(x0, cond, nothing, scale, generator)
        torch.clear_autocast_cache()  # of parameters in 16 bits that may know of no gradient
        if "worth" in asked:
            worth = asked.pop("worth")
            counts["weight"] = worth * counts["weight"] if "weight" in counts else worth
        return {**asked, "cond": cond, "scale": scale, **counts}

    def error(self, examples: dict[str, Any]) -> dict[str, Tensor]:
        base, mask, weight = self.base, examples.get("mask"), examples.get("weight")
        x, t, level, target = (examples[name] for name in ("x", "t", "level", "target"))
        cond, scale = examples["cond"], examples["scale"]
        if self.how.kind in ("consistency", "consistency-training"):
            return {"loss": self.judged(self.consistent(x, t, level, cond, scale) - target, mask, weight)}
        output, alpha = self.student(x, t, level, cond, scale), base.interpolant.alpha(level)
        if self.how.kind == "guidance":
            return {"loss": base.objective.error(output, target, base.prediction, alpha, level, mask, weight)}
        missed = base.prediction.to_x0(output, x, alpha, level) - target
        worth = (alpha / level).square().clamp(min=1)  # max(SNR, 1): arXiv:2202.00512, section 4
        return {"loss": counted(worth * missed.square(), mask, weight).mean()}

    @property
    def guides(self) -> bool:
        """Whether the teacher is guided, and not told so."""
        return self.how.guidance != (1.0,)

    def judged(self, error: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
        """The loss of differences (b, c, h, w); a picture's as one is the pseudo-Huber metric of arXiv:2310.14189,
        section 3.3, over the root of its dimensions. LPIPS, which consistency distillation was published with besides,
        is not among them: its weights do not ship."""
        error, huber = error.square(), self.how.huber
        if self.how.loss == "huber":
            if isinstance(self.base.interpolant, Preconditioned):
                error, mask = counted(error, mask, None).mean((1, 2, 3), keepdim=True), None
            error = (error + huber**2).sqrt() - huber
        return counted(error, mask, weight).mean()

    def guided(
        self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The student's prediction is to be the guided teacher's, as the objective counts it."""
        base: Any = self.base
        t, sigma = base.interpolant.draw(len(x0), generator, x0.device, base.objective.times)
        level = sigma[:, None, None, None]
        x = base.interpolant.alpha(level) * x0 + level * base.objective.noise(x0, generator)
        return {"x": x, "t": t, "level": level, "target": self.teacher(x, t, level, cond, nothing, scale)}

    def inconsistency(
        self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What the student says of x is to be what it says, or its average, of where one step of the guided teacher
        leads from x (arXiv:2310.04378, equation 16; the step is DDIM's, which for a flow is Euler's, and with EDM's
        preconditioning Heun's, arXiv:2303.01469, section 6.1)."""
        base: Any = self.base
        interpolant, steps = base.interpolant.sized(x0.shape[2] * x0.shape[3] // 4), self.how.steps
        times, sigmas = self.table((interpolant, steps), x0.device, lambda: levels(interpolant, steps))
        place = torch.randint(1, len(times), (len(x0),), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        (t, level), (end, below) = ((times[k], sigmas[k][:, None, None, None]) for k in (place, place - 1))
        alpha = interpolant.alpha(level)
        x = alpha * x0 + level * eps
        says = self.teacher(x, t, level, cond, nothing, scale)
        guess = base.prediction.to_x0(says, x, alpha, level)
        lower = interpolant.alpha(below) * guess + below / level * (x - alpha * guess)
        if isinstance(interpolant, Preconditioned):
            says = self.teacher(lower, end, below, cond, nothing, scale)
            slopes = (x - guess) / level + (lower - base.prediction.to_x0(says, lower, 1.0, below)) / below
            lower = x + (below - level) * slopes / 2
        with self.averaged():
            return {"x": x, "t": t, "level": level, "target": self.consistent(lower, end, below, cond, scale)}

    def untaught(
        self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What the student says of x is to be what it says of the same picture under the same noise, one level below
        (arXiv:2303.01469, equation 10, with the student itself for its average); it counts one over the distance of
        the levels, its "worth" (arXiv:2310.14189, section 3.1)."""
        base: Any = self.base
        steps = curriculum(max(self.followed, 0), self.total, self.how.steps)
        times, sigmas, shares = self.table(steps, x0.device, lambda: weighed(base.interpolant, steps))
        drawn = torch.rand(len(x0), generator=generator, device=x0.device)
        place = torch.searchsorted(shares, drawn, right=True).clamp(max=steps - 1)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        (t, level), (end, below) = ((times[k], sigmas[k][:, None, None, None]) for k in (place + 1, place))
        target = self.consistent(x0 + below * eps, end, below, cond, scale)
        worth = 1 / (level - below)[:, 0, 0, 0]
        return {"x": x0 + level * eps, "t": t, "level": level, "target": target, "worth": worth}

    def halved(
        self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The student's x0 is to be the one that leads in one step to where two of the teacher's lead
        (arXiv:2202.00512, algorithm 2)."""
        raise AssertionError("what is halved is a whole network")

    def consistent(self, x: Tensor, t: Tensor, level: Tensor, cond: Any, scale: Tensor) -> Tensor:
        """Where the trajectory through x ends, as the student says: of a flow x0 = x - sigma * v, which at sigma = 0 is
        x by itself, of timesteps a mixture of x and x0 that is x at the first (equation 9).

        With EDM's preconditioning c_skip * x + c_out * F, which is x at the lowest level, eps (arXiv:2303.01469,
        appendix C): c_skip = data^2 / ((sigma - eps)^2 + data^2), c_out = (sigma - eps) * data / sqrt(sigma^2 +
        data^2). Drawn is EDM's own D, where eps is 0. At any sigma that moves a pixel by no more than eps times the sum
        of |F| and of |x| as the network sees it, which with eps = 0.002 is within rounding to 256 greys: so a file need
        not say that it is of a consistency model."""
        base: Any = self.base
        alpha = base.interpolant.alpha(level)
        x0 = base.prediction.to_x0(self.student(x, t, level, cond, scale), x, alpha, level)
        if isinstance(base.interpolant, Preconditioned):
            data, low = base.interpolant.data**2, base.interpolant.ratio_min
            rest = (1 - low / level) * (x0 - data / (level**2 + data) * x)
            return data / ((level - low) ** 2 + data) * x + rest
        if not isinstance(base.interpolant, Discrete):
            return torch.where(level > 0, x0, x)
        time = TIME_SCALE * t[:, None, None, None].float()
        length = time.square() + DATA**2
        return DATA**2 / length * base.interpolant.input_scale(level) * x + time / length.sqrt() * x0

    def follow(self, step: int) -> None:
        """Move the averages, once a step, towards what the step before left."""
        if step == self.followed:
            return
        self.followed = step
        if self.averages is None:
            return
        keep = self.how.average if step else 0.0  # what training begins with may have been put in since
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.buffers()), list(self.parameters()), 1 - keep)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with its averages, if it has any, in place of its parameters."""
        if self.averages is None:
            yield
            return
        with holding(self.parameters(), self.averages):
            yield

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
        timed = isinstance(self.base.interpolant, Discrete | Preconditioned)
        steps = STEPS_OF_EDM if isinstance(self.base.interpolant, Preconditioned) else STEPS
        return {**plain, "steps": steps, "sampler": "lcm", "schedule": "lcm" if timed else usual.schedule}

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
    """An adapter that has the teacher's network do what the student does; the run has `total` steps."""

    def __init__(self, base: Any, how: DistillationConfig, adapter: AdapterConfig, seed: int, total: int = 1) -> None:
        Adapting.__init__(self, base, adapter, seed)
        self.told, self.total = base.told_guidance, total
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
    """A copy of the teacher's network, in float32, and told of guidance if it is to know many scales of it. `source` is
    where the model is from, or the system that it is new of; the run has `total` steps."""

    walked: Tensor
    """In how many steps the student of this round draws."""

    def __init__(self, base: Any, how: DistillationConfig, source: str | catalog.SystemConfig, total: int = 1) -> None:
        super().__init__(base)
        self.source, self.total = source, total
        self.told = base.told_guidance
        self.network: Any = copy.deepcopy(base.network).float().requires_grad_(True)
        if self.told is None and len(how.guidance) > 1:
            self.told = grow(self.network)
        self.begin(how)
        self.teachers: nn.Module | None = None
        if how.kind == "progressive":
            self.rounds = (how.steps // how.least).bit_length() - 1
            if total < self.rounds:
                raise UsageError(f"steps={total}: give one for each of the {self.rounds} rounds at least")
            self.teachers = copied(self.named_parameters())
            self.now = how.steps // 2
            self.register_buffer("walked", torch.tensor(self.now))

    @property
    def learning(self) -> Any:
        return self.network

    @property
    def guides(self) -> bool:
        """A teacher that was a student before has learned its guidance."""
        return super().guides and (self.teachers is None or self.now == self.how.steps // 2)

    @contextmanager
    def taught(self) -> Iterator[Any]:
        if self.teachers is None:
            yield self.base.network
            return
        with holding(self.base.network.parameters(), self.teachers):
            yield self.base.network

    def follow(self, step: int) -> None:
        """As for all, and at the end of a round its student becomes the teacher of the next, which begins as that."""
        before = self.followed
        super().follow(step)
        if self.teachers is None or step == before:
            return
        done = step * self.rounds // self.total
        if step and done > (step - 1) * self.rounds // self.total:
            with torch.no_grad():
                last = list(self.parameters() if self.averages is None else self.averages.buffers())
                torch._foreach_copy_(list(self.teachers.buffers()), last)
                if self.averages is not None:
                    torch._foreach_copy_(list(self.parameters()), last)
        self.now = self.how.steps >> (done + 1)
        self.walked.fill_(self.now)

    def halved(
        self, x0: Tensor, cond: Any, nothing: Any, scale: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        base: Any = self.base
        interpolant = base.interpolant.sized(x0.shape[2] * x0.shape[3] // 4)
        times, sigmas = self.table(
            (interpolant, self.now), x0.device, lambda: walk(interpolant, 2 * self.now, base.defaults)
        )
        place = 2 * torch.randint(self.now, (len(x0),), generator=generator, device=x0.device)
        (t, level), (half, middle), (_, below) = (
            (times[k], sigmas[k][:, None, None, None]) for k in (place, place + 1, place + 2)
        )
        alpha = interpolant.alpha(level)
        x = alpha * x0 + level * torch.randn(x0.shape, generator=generator, device=x0.device)

        def said(output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
            found = base.prediction.to_x0(output, x, interpolant.alpha(sigma), sigma)
            return found.clamp(-1, 1) if base.clip else found

        first = said(self.teacher(x, t, level, cond, nothing, scale), x, level)
        between = interpolant.alpha(middle) * first + middle / level * (x - alpha * first)
        second = said(self.teacher(between, half, middle, cond, nothing, scale), between, middle)
        target = torch.lerp(first, second, share(interpolant, level, middle, below))
        return {"x": x, "t": t, "level": level, "target": target}

    @property
    def draws(self) -> dict[str, Any]:
        found = super().draws
        if self.teachers is None:
            return found
        schedule, sampler = walked_by(self.base.interpolant, self.base.defaults)
        return {**found, "steps": int(self.walked), "sampler": sampler, "schedule": schedule}

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
        if not told or not isinstance(self.source, str) or catalog.recognise(catalog.find(self.source)) is None:
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
            if isinstance(self.source, str):
                tuning.write(model, self.source, path)
            else:
                catalog.save(model, replace(self.source, defaults=model.defaults), path)

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
    how = checked(config)
    dtype = kept_in(config, device, casts=True)
    if config.adapter is not None:
        base = catalog.load(config.model, device, dtype=dtype)
        return DistillingAdapter(base, how, config.adapter, config.seed, config.steps)
    tuning.check_kept(dtype)
    base = catalog.load(config.model, device, dtype=torch.float32)
    student = DistillingNetwork(base, how, config.model, config.steps)
    tuning.check_name(config, student.base)
    student.base.network.to(dtype)
    return student


def begun(config: TrainConfig, system: Any) -> Distilling:
    """The student that a new system is, where it learns without a teacher. Raises UsageError."""
    how = checked(config)
    if how.kind != "consistency-training":
        raise UsageError(f"{config.name} trains a system of its own, which has no teacher: leave distillation out")
    assert config.system is not None
    return DistillingNetwork(system, how, config.system, config.steps)


def checked(config: TrainConfig) -> DistillationConfig:
    """Raises UsageError for what a run cannot be told besides."""
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
    if how.kind == "progressive" and config.adapter is not None:
        raise UsageError("a student that becomes a teacher is a whole network: leave adapter out, or progressive")
    if how.kind == "progressive" and config.on_nan == "skip":
        raise UsageError("on_nan=skip may leave out the step at which a student becomes the teacher: give stop")
    if how.kind != "guidance" and config.loss != Objective():
        raise UsageError(f"loss.… is of what learns from noise, and {config.name} has a loss of its own: leave it out")
    return how


def check(base: Any, how: DistillationConfig, told: bool) -> None:
    """Raises UsageError for what cannot be."""
    if not hasattr(base, "network") or base.sees or base.small_noise is not None:
        raise UsageError(f"{base.name} draws from more than words: a model that draws from words alone is distilled")
    scales = how.guidance
    if not 1 <= len(scales) <= 2 or not all(1 <= s <= 100 for s in scales) or scales[0] > scales[-1]:
        raise UsageError(
            f"distillation.guidance={scales}: give one scale from 1 to 100, or the least and the most of many"
        )
    if len(scales) > 1 and (not told or how.kind == "progressive"):
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
    if how.kind == "progressive":
        check_walk(base, how)
        return
    if how.kind == "consistency-training":
        if not isinstance(base.interpolant, Preconditioned):
            raise UsageError(f"{base.name} has no preconditioning of EDM's, with which alone consistency is trained")
        if scales != (1.0,):
            raise UsageError("consistency-training has no teacher that could be guided: give distillation.guidance=1")
        if how.steps < FIRST:
            raise UsageError(f"distillation.steps={how.steps}: give {FIRST} to 10000")
    levels(base.interpolant, how.steps)


def check_walk(base: Any, how: DistillationConfig) -> None:
    """Raises UsageError where steps cannot be halved, or an x0 not be said."""
    if base.prediction.name == "eps":
        raise UsageError(
            f"{base.name} says eps, which at much noise says nothing of x0: progressive distillation is of models that "
            "predict x0, v, velocity or as EDM"
        )
    most, rest = divmod(how.steps, max(how.least, 1))
    if how.least < 1 or rest or most < 2 or most & (most - 1) or how.steps > 1024:
        raise UsageError(
            f"distillation.steps={how.steps}, least={how.least}: give steps of least times 2, 4, 8, ..., 1024 at most"
        )
    walk(base.interpolant, how.steps, base.defaults)


def copied(parameters: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """Buffers of what these are now, under their names with : for each dot."""
    made = nn.Module()
    for name, p in parameters:
        made.register_buffer(name.replace(".", ":"), p.detach().float().clone())
    return made


@contextmanager
def holding(parameters: Iterable[Tensor], values: nn.Module) -> Iterator[None]:
    """Parameters with what the buffers of `values` are, in their order, in place of what they are."""
    parameters = list(parameters)
    own = [p.data for p in parameters]
    torch.clear_autocast_cache()  # which knows a parameter in 16 bits by its place, whatever is there
    try:
        for p, value in zip(parameters, values.buffers(), strict=True):
            p.data = value
        yield
    finally:
        for p, data in zip(parameters, own, strict=True):
            p.data = data
        torch.clear_autocast_cache()


def walked_by(interpolant: Interpolant, usual: Defaults) -> tuple[str, str]:
    """The schedule and the sampler of a student of progressive distillation: such that the levels of n steps are every
    second of those of 2n. Raises UsageError where there are none."""
    if isinstance(interpolant, Flow):
        return ("shifted" if isinstance(interpolant, Shifted) or usual.schedule == "shifted" else "uniform"), "euler"
    if not isinstance(interpolant, Discrete | Preconditioned):
        raise UsageError("steps are halved along timesteps, a flow or with EDM's preconditioning: this model has none")
    return ("trailing" if isinstance(interpolant, Discrete) else "lcm"), "ddim"


def walk(interpolant: Interpolant, steps: int, usual: Defaults) -> tuple[list[float], list[float]]:
    """Times and sigmas, falling, of what is drawn in so many steps by `walked_by`; that of no noise has no time.
    Raises UsageError."""
    sigmas = schedules.plan(*walked_by(interpolant, usual), steps, interpolant)
    return [interpolant.time(sigma) if sigma else 0.0 for sigma in sigmas], sigmas


def share(interpolant: Interpolant, level: Tensor, middle: Tensor, below: Tensor) -> Tensor:
    """How much of the x0 of the second of two steps of DDIM, from `level` over `middle` to `below`, is in that x0 with
    which one step comes to the same place; the rest is of the first. It is the target of arXiv:2202.00512, algorithm 2
    and appendix G, written so that no two x are subtracted that hardly differ."""
    alpha: Any = interpolant.alpha
    return (alpha(below) - below / middle * alpha(middle)) / (alpha(below) - below / level * alpha(level))


def curriculum(step: int, total: int, most: int) -> int:
    """Steps of the trajectory of consistency training at a `step` of `total`: `FIRST`, then twice as many for as long
    again, until `most` (arXiv:2310.14189, section 3.4)."""
    stage = max(1, int(total / (math.log2(most // FIRST) + 1)))
    return min(FIRST * 2 ** min(step // stage, 20), most)


def weighed(interpolant: Preconditioned, steps: int) -> tuple[list[float], list[float], list[float]]:
    """`levels`, and how often the lower end of a step is one of the first so many: sigmas are log-normal
    (arXiv:2310.14189, section 3.5), relative to the data's deviation, which was 0.5."""
    times, sigmas = levels(interpolant, steps)
    mean = MEAN + math.log(interpolant.data / 0.5)
    places = [math.erf((math.log(sigma) - mean) / (math.sqrt(2) * STD)) for sigma in sigmas]
    return times, sigmas, [(place - places[0]) / (places[-1] - places[0]) for place in places[1:]]


def levels(interpolant: Interpolant, steps: int) -> tuple[list[float], list[float]]:
    """Times and sigmas of the teacher's trajectory, rising from its end: of timesteps the first and every so many-th,
    as LCM has them, of a flow evenly spaced ones, shifted as its schedules are, with EDM's preconditioning Karras'
    (N of arXiv:2303.01469 is one more than `steps`). Raises UsageError."""
    most = 10_000 if isinstance(interpolant, Preconditioned) else 1000
    if not 1 <= steps <= most:
        raise UsageError(f"distillation.steps={steps}: give 1 to {most}")
    if isinstance(interpolant, Discrete):
        count = len(interpolant.sigmas)
        if 2 * steps > count:
            raise UsageError(f"distillation.steps={steps}: give {count // 2} at most, this model has {count} timesteps")
        places = [max(0, round(count * k / steps) - 1) for k in range(steps + 1)]
        return [float(k) for k in places], [interpolant.sigmas[k] for k in places]
    if isinstance(interpolant, Preconditioned):
        sigmas = schedules.karras(steps + 1, interpolant)[-2::-1]
        return [interpolant.time(sigma) for sigma in sigmas], sigmas
    if not isinstance(interpolant, Flow):
        raise UsageError(
            "consistency is learned along timesteps, a flow or with EDM's preconditioning: this model has none"
        )
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
