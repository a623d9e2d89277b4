"""Rectified flow's second act (arXiv:2209.03003): a flow that learns its own pairs of noise and picture.

Where a flow leads from noise eps to a picture, its paths cross nothing, so that a flow which learns those pairs in
place of random ones has straighter paths (reflow, section 2.2), and once more with its own pairs straighter still. Of
straight paths one Euler step finds the end, and a network may learn that step alone (distillation, section 2.1).
"""

from __future__ import annotations

import copy
import random
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from limner import catalog, pipeline
from limner.data.batches import DataConfig, ImageBatches, seeded
from limner.data.streams import Stream
from limner.devices import free_of
from limner.errors import UsageError
from limner.nn.embeddings import sent
from limner.sampling import odes
from limner.sampling.interpolants import Flow
from limner.systems.objectives import Objective
from limner.training import tuning
from limner.training.adapting import Beside
from limner.training.distilling import DistillingNetwork
from limner.training.memory import kept_in
from limner.training.processes import Processes

if TYPE_CHECKING:
    from limner.training.config import TrainConfig

MOST_WHOLE = 4e9
"""Bytes of pairs in float32; more are kept in float16."""
UNREAD = ("latent_views", "other_sizes", "augment", "mirror", "crop", "buckets", "masks")
"""What says how pictures are seen, of which captions alone are read here."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ReflowConfig:
    """So many `pairs` of noise and what `model` makes of it are made before the first step, `at_once` together, of
    captions as frequent as in the data. `sampler` solves the ordinary differential equation in so many `steps`;
    `guidance` is the scale at which it is followed, 1 for none, and what learns it is drawn with 1; `one_step` learns
    at noise alone, to draw in one step of Euler's method."""

    pairs: Annotated[int, Field(gt=0, le=10_000_000)] = 50_000
    steps: Annotated[int, Field(gt=0, le=1000)] = 20
    sampler: Literal["euler", "heun", "rk4", "dopri5"] = "heun"
    guidance: Annotated[float, Field(ge=1, le=100)] = 1.0
    at_once: Annotated[int, Field(gt=0)] = 500
    one_step: bool = False


class Reflowing(DistillingNetwork):
    """A copy of the teacher's network, in float32, that learns from `Pairs`; `base` is the teacher."""

    def __init__(self, base: Any, how: ReflowConfig, source: str) -> None:
        Beside.__init__(self, base)
        check(base)
        self.reflow, self.source, self.told = how, source, None
        self.network = copy.deepcopy(base.network).float().requires_grad_(True)

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """x between the ends of each pair of "noise" and "latents" (b, c, h, w), and the velocity of the straight line
        (equation 1), at times as the objective has them, or at noise alone. No caption is dropped: what it leads to
        was made with it."""
        base: Any = self.base
        x0, eps = batch["latents"], batch["noise"]
        t, sigma = base.interpolant.draw(len(x0), generator, x0.device, base.objective.times)
        t, sigma = (torch.ones_like(t), torch.ones_like(sigma)) if self.reflow.one_step else (t, sigma)
        level = sigma[:, None, None, None]
        alpha = base.interpolant.alpha(level)
        return {
            "x": alpha * x0 + level * eps,
            "t": t,
            "cond": self.read(batch["captions"], x0),
            "target": base.prediction.target(x0, eps, alpha, level),
            "alpha": alpha,
            "sigma": level,
        }

    def error(self, examples: dict[str, Any]) -> dict[str, Tensor]:
        """Of the velocity, which at noise alone is that of the picture that one step of Euler's method gives."""
        judged = dict(examples)
        output = self.network(judged.pop("x"), judged.pop("t"), judged.pop("cond")).float()
        output = output[:, : judged["target"].shape[1]]  # without a variance beside it
        return {"loss": self.base.objective.error(output, prediction=self.base.prediction, **judged)}

    @property
    def draws(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"guidance": 1.0, "guidance_kind": "cfg", "guidance_rescale": 0.0}
        return plain | ({"steps": 1, "sampler": "euler", "schedule": "uniform"} if self.reflow.one_step else {})

    @property
    def notes(self) -> list[str]:
        return []


class Pairs:
    """Batches of {"noise", "latents" (b, c, h, w), "captions", "ids"} of what the teacher of a student makes of noise;
    see `limner.data.images.Batches`.

    They are made now, each process its own share, from its seed, its rank and `at_once`, so that a run that goes on
    with as many processes on the same kind of device has them again, and another has others; in float32, or float16
    where they are many, on the device if they fit in a third of its free memory.
    """

    def __init__(self, student: Reflowing, images: ImageBatches | Stream, config: TrainConfig, processes: Processes):
        how, base, device = student.reflow, student.base, processes.device
        count = -(-how.pairs // processes.world)
        side = config.data.size // base.grid
        shape = (count, base.autoencoder.channels, side, side)
        self.seed, self.device = config.seed, device
        self.captions: list[str] = []
        whole = 8 * torch.Size(shape).numel()  # of both in float32
        dtype, need = (torch.float32, whole) if whole <= MOST_WHOLE else (torch.float16, whole // 2)
        place = device if need < free_of(device) / 3 else torch.device("cpu")
        self.noise, self.latents = (torch.empty(shape, dtype=dtype, device=place) for _ in range(2))
        begun = told = time.monotonic()
        for first in range(0, count, how.at_once):
            some = slice(first, min(first + how.at_once, count))
            captions = said(images, (first // how.at_once) * processes.world + processes.rank, some.stop - first)
            generator = seeded(config.seed, first, 7000 + processes.rank, device)
            self.noise[some] = torch.randn((some.stop - first, *shape[1:]), generator=generator, device=device)
            self.latents[some] = ends(base, how, captions, self.noise[some].to(device).float())
            self.captions += captions
            if processes.first and (time.monotonic() - told > 10 or some.stop == count):
                told = time.monotonic()
                took = f"{told - begun:.0f} s"
                made = min(processes.world * some.stop, how.pairs)
                print(f"{base.name} makes pairs: {made} of {how.pairs} in {took}", flush=True)
        if not self.latents.isfinite().all():
            raise UsageError(
                f"{base.name} makes what is not finite of noise: give keep_model_in=fp32, or another model"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        index = torch.randint(len(self), (size // world,), generator=seeded(self.seed, step, 8000 + rank))
        there, rows = sent(index, self.latents.device), index.tolist()
        picked = {"noise": self.noise[there], "latents": self.latents[there]}
        return {
            **{name: value.to(self.device).float() for name, value in picked.items()},
            "captions": [self.captions[i] for i in rows],
            "ids": [f"{rank}/{i}" for i in rows],
        }


def said(images: ImageBatches | Stream, place: int, count: int) -> list[str]:
    """So many captions of the data, as often as they are learned there; those of another `place` are others."""
    if isinstance(images, ImageBatches):
        return images.draw(place, count).captions
    coin = random.Random(f"{images.seed}/reflow/{place}")
    members = [i for bucket in images.buckets for i in bucket.members]
    return [images.caption(coin.choice(members), coin) for _ in range(count)]


@torch.inference_mode()
def ends(base: Any, how: ReflowConfig, captions: list[str], eps: Tensor) -> Tensor:
    """Where the flow leads from noise eps (b, c, h, w). Raises UsageError."""
    height, width = (base.grid * side for side in eps.shape[2:])
    dialect = {"prompt_dialect": "plain"} if "plain" in base.dialects else {}
    said = min(filter(str.strip, captions), key=len, default="anything")  # a caption may be what no prompt may
    request = pipeline.prepare(
        base, prompt=said, width=width, height=height, steps=how.steps, sampler=how.sampler,
        guidance=how.guidance, **dialect,
    )  # fmt: skip
    return base.sample(base.condition(captions, request), request, lambda shape: eps)


def loaded(config: TrainConfig, device: torch.device) -> Reflowing:
    """The student of `config.model`, and with it that. Raises UsageError, FileProblem, MissingExtra."""
    how = config.reflow
    assert how is not None
    for name in ("adapter", "word", "control", "distillation"):
        if getattr(config, name) is not None:
            raise UsageError(f"{config.name} reflows a network: leave {name} out")
    if config.sharding == "fsdp":
        raise UsageError("sharding=fsdp is for networks that learn alone: leave it out, or reflow")
    for name in UNREAD:
        if (value := getattr(config.data, name)) != getattr(DataConfig, name):
            raise UsageError(
                f"data.{name}={value} has no effect on {config.name}, which reads captions alone: leave it out"
            )
    if config.validation or config.prior.wanted:
        name = "validation" if config.validation else "prior"
        raise UsageError(f"{name} is of pictures, and {config.name} learns pairs that its model makes: leave it out")
    if how.one_step and config.loss != Objective():
        raise UsageError("loss.… is of many times and noises, reflow.one_step learns at noise alone: leave it out")
    if config.loss.offset_noise or config.loss.coupling != "independent":
        raise UsageError(
            "loss.offset_noise and loss.coupling are of noise that is drawn, a pair has its own: leave them out"
        )
    if how.sampler == "dopri5":
        odes.require()
    dtype = kept_in(config, device, casts=True)
    tuning.check_kept(dtype)
    student = Reflowing(catalog.load(config.model, device, dtype=torch.float32), how, config.model)
    if catalog.recognise(catalog.find(config.model)) is not None:
        tuning.check_name(config, student.base)
    student.base.network.to(dtype)
    return student


def check(base: Any) -> None:
    """Raises UsageError for a model that is no flow along straight paths, or draws from more than words."""
    if getattr(base, "told_guidance", None) is not None:
        raise UsageError(f"{base.name} is told its guidance: reflow is for models that are not")
    if not hasattr(base, "network") or base.sees or base.small_noise is not None:
        raise UsageError(f"{base.name} draws from more than words: reflow is for models that draw from words alone")
    if not isinstance(base.interpolant, Flow) or base.prediction.name != "velocity":
        raise UsageError(
            f"reflow makes straight paths straighter: {base.name} has noise of the kind {base.interpolant.name} and "
            f"predicts {base.prediction.name}, give a model of a flow that predicts its velocity"
        )
