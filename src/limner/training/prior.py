"""Prior preservation (DreamBooth, arXiv:2208.12242, section 3.2): beside its own pictures a model goes on learning
pictures of their class, which it drew itself before the first step, so that it does not forget what else there is."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from limner import metadata, pipeline
from limner.checkpoints.files import write_atomically
from limner.data.batches import DataConfig
from limner.data.epochs import Bucket
from limner.data.folders import open_folder
from limner.data.images import Batches, to_float
from limner.data.streams import Look, Stream
from limner.errors import FileProblem, UsageError
from limner.training.adapting import Beside

if TYPE_CHECKING:
    from limner.training.config import TrainConfig
    from limner.training.processes import Processes

AT_ONCE = 4
"""Class pictures drawn together, whichever of them are there already: a picture may differ by its neighbours."""
KNOWN = {"images", "latents", "captions", "ids", "mask", "weight", "count"}
"""What batches may have that this adds to."""
MOST_KEPT = 4096
"""Latents of class pictures that are kept."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PriorConfig:
    """`prompt` names the class ("a dog" where a certain dog is learned); None, and no folder, is no prior. So many
    `images` of it are drawn into RUN/prior, picture i with seed i, or they lie in a `folder`, where `prompt` is the
    caption of those without one. Each step has as many of them as own pictures, and its loss is that of the own ones
    plus `weight` times that of these."""

    prompt: str | None = None
    folder: str = ""
    images: Annotated[int, Field(gt=0, le=100_000)] = 100
    weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def wanted(self) -> bool:
        return self.prompt is not None or bool(self.folder)


def check(config: TrainConfig) -> None:
    """Raises UsageError for a prior that is of nothing, or has no effect."""
    prior = config.prior
    if not prior.wanted:
        for name in ("images", "weight"):
            if getattr(prior, name) != getattr(PriorConfig, name):
                raise UsageError(
                    f"prior.{name}={getattr(prior, name):g} is of pictures of what? Give prior.prompt=TEXT"
                )
        return
    if config.system is not None:
        raise UsageError(
            f"{config.name} trains a system of its own, and prior is for models that can draw: leave it out"
        )
    if config.control is not None:
        raise UsageError(f"{config.name} learns from hints, which pictures of a class have none of: leave prior out")
    if not prior.folder and not (prior.prompt or "").strip():
        raise UsageError(
            f"{config.name} learns beside pictures of a class: name it, prior.prompt='a dog', or give prior.folder=PATH"
        )
    if prior.folder and prior.images != PriorConfig.images:
        raise UsageError(f"prior.images={prior.images} are drawn where there is no prior.folder: leave one of them out")


def drawn(system: Any, config: TrainConfig, run: Path, processes: Processes) -> Path:
    """The folder of the class pictures; those that are to be drawn and are not there yet are drawn now, by the model
    as it is without what is learned, each process a share. Raises UsageError, FileProblem."""
    prior = config.prior
    if prior.folder:
        return Path(prior.folder)
    folder, prompt = run / "prior", str(prior.prompt)
    model = system.base if isinstance(system, Beside) else system
    pipeline.prepare(model, prompt=prompt)
    groups = [range(k, min(k + AT_ONCE, prior.images)) for k in range(0, prior.images, AT_ONCE)]
    mine = groups[processes.rank :: processes.world]
    todo = [group for group in mine if not all(_whole(folder, i) for i in group)]
    if isinstance(system, Beside):
        system.off()
    training = model.training
    model.eval()
    for done, group in enumerate(todo):
        if done % 5 == 0 and processes.first:
            print(
                f"drawing {prompt!r} into {folder}: {sum(map(len, todo[done:]))} of {prior.images} pictures to go",
                flush=True,
            )
        for i, image in zip(group, pipeline.generate(model, prompt, seed=group[0], batch=len(group)), strict=True):
            if not _whole(folder, i):
                _picture(folder, i).unlink(missing_ok=True)
                write_atomically(_picture(folder, i).with_suffix(".txt"), f"{image.settings['prompt']}\n".encode())
                metadata.save_png(image.image, image.settings, _picture(folder, i))
    model.train(training)
    if isinstance(system, Beside):
        system.on()
    processes.agree(0)
    if lost := [i for i in range(prior.images) if not _whole(folder, i)]:
        raise FileProblem(f"{_picture(folder, lost[0])} is not there: all processes must see the same {folder}")
    return folder


def _picture(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def _whole(folder: Path, i: int) -> bool:
    """Both files appear whole or not at all, the picture last."""
    return _picture(folder, i).is_file() and _picture(folder, i).with_suffix(".txt").is_file()


def opened(folder: Path, config: TrainConfig, device: torch.device) -> Stream:
    """The class pictures. Raises FileProblem, UsageError."""
    samples = open_folder(folder)
    if samples.masks:
        raise UsageError(f"{folder} has masks, but pictures of a class are learned whole: take the masks away")
    if config.prior.prompt is None and ("",) in samples.captions:
        raise UsageError(f"pictures in {folder} have no captions: say what they show, prior.prompt=TEXT")
    prompt = config.prior.prompt or ""
    samples.captions = [tuple(caption or prompt for caption in captions) for captions in samples.captions]
    told = DataConfig(source="folder", folder=str(folder), size=config.data.size, bad=config.data.bad)
    return Stream(samples, told, config.seed, device)


class WithPrior:
    """The batches of `own`, and after their rows as many of pictures of the class, fitted to the size of the step.

    Each row's "weight" makes the mean over all rows loss_own + weight * loss_prior, "prior" says which rows are of the
    class, and "count" counts the own ones alone. Latents of the class are made when they are first asked for, one by
    one, so that they do not depend on their neighbours, and kept in float16.
    """

    def __init__(self, own: Batches, stream: Stream, weight: float, system: Any) -> None:
        self.own, self.stream, self.weight, self.system = own, stream, weight, system
        self.latents = lru_cache(MOST_KEPT)(self._latents)

    def __len__(self) -> int:
        return len(self.own)

    @property
    def bad(self) -> dict[Any, str]:
        return {**getattr(self.own, "bad", {}), **{("prior", i): why for i, why in self.stream.bad.items()}}

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        own, stream = self.own.batch(step, size, rank=rank, world=world), self.stream
        assert own.keys() <= KNOWN, "what is told of each row must be known of the class, too"
        n, kind = len(own["ids"]), "latents" if "latents" in own else "images"
        height, width = (side * (self.system.grid if kind == "latents" else 1) for side in own[kind].shape[-2:])
        bucket = Bucket(width, height, stream.buckets[0].members)
        _, order = stream.epochs.step(step, size)
        rows = range(rank * n, (rank + 1) * n)
        looks = [Look((0.5, 0.5), False, 0.0, random.Random(f"{stream.seed}/prior/{step}/{row}")) for row in rows]
        read = self.encoded if kind == "latents" else self.pixels
        found = [
            stream.good(order[row % len(order)], bucket, look, read) for row, look in zip(rows, looks, strict=True)
        ]
        stream.note({})
        captions = [stream.caption(i, look.captions) for (i, _), look in zip(found, looks, strict=True)]
        theirs = torch.stack([tensor for _, tensor in found]).to(stream.device).float()
        weight = own.get("weight", torch.ones(n, device=stream.device))
        batch = {
            **own,
            kind: torch.cat([own[kind], theirs]),
            "captions": own["captions"] + captions,
            "ids": own["ids"] + [f"prior/{stream.samples.ids[i]}" for i, _ in found],
            "weight": torch.cat([2 * weight, 2 * self.weight * weight]),
            "prior": [False] * n + [True] * n,
            "count": own.get("count", n * world),
        }
        if "mask" in own:
            batch["mask"] = torch.cat([own["mask"], torch.ones_like(own["mask"])])
        return batch

    def pixels(self, i: int, bucket: Bucket, look: Look) -> Tensor:
        return to_float(torch.from_numpy(self.stream.read(i, bucket, look)))

    def encoded(self, i: int, bucket: Bucket, look: Look) -> Tensor:
        return self.latents(i, bucket.width, bucket.height)

    def _latents(self, i: int, width: int, height: int) -> Tensor:
        device = self.stream.device
        picture = torch.from_numpy(self.stream.picture(i, width, height, (0.5, 0.5), False))[None].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self.system.encode(to_float(picture))[0].to("cpu", torch.float16)
