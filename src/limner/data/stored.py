"""Latents of samples, encoded once and kept in files that know when they are stale."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn

from limner.checkpoints.files import write_atomically
from limner.data.epochs import Bucket
from limner.data.hinted import to_hints
from limner.data.images import to_float
from limner.data.streams import Look, Stream
from limner.errors import FileProblem, ImageProblem
from limner.types import System

VERSION = 1
"""To be raised when the same picture becomes other latents by what this package does."""


class StoredLatents:
    """Batches of {"latents" (b, c, h, w), "captions", "ids"} and what else a Stream has, over `data.latent_views`
    encodings of every picture, at least one.

    View 0 is cut out of the middle, not mirrored; the others follow `data.crop` and `data.mirror`. Held in float16:
    in memory, or with `data.cache` a file a sample in that folder, which belongs to one data set. A file's key is of
    the picture's place, size and time, the parts of it that are seen, the autoencoder's weights and `VERSION`: with
    another key, or torn, it is made again. `pixels` are encoded at once. Under torch.distributed each rank encodes its
    share where there are files, and everything where there are none.
    """

    def __init__(self, stream: Stream, system: System, pixels: int = 1 << 22) -> None:
        config = stream.config
        self.stream, self.system = stream, system
        self.folder = Path(config.cache) if config.cache else None
        self.views = max(1, config.latent_views) if config.crop == "random" or config.mirror else 1
        self.model = fingerprint(system.autoencoder)  # type: ignore[attr-defined]
        self.held: dict[int, dict[str, Tensor]] = {}
        self.count = dict.fromkeys(("new", "stale", "torn"), 0)
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        for bucket in stream.buckets:
            members = bucket.members[rank::world] if self.folder else bucket.members
            states = list(stream.mapped(partial(self.state, bucket=bucket), members))
            todo = [i for i, state in zip(members, states, strict=True) if state != "whole"]
            for state in self.count:
                self.count[state] += states.count(state)
            chunk = max(1, pixels // (bucket.width * bucket.height))
            for start in range(0, len(todo), chunk):
                self.encode(todo[start : start + chunk], bucket)
        if world > 1:
            distributed.barrier()
        stream.note({})
        if remade := [f"{self.count[state]} {state}" for state in ("stale", "torn") if self.count[state]]:
            print(f"latents in {self.folder} were made again: {', '.join(remade)}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def bad(self) -> dict[int, str]:
        return self.stream.bad

    def look(self, i: int, view: int) -> tuple[tuple[float, float], bool]:
        """Where view `view` of a sample is cut out, and whether it is mirrored."""
        config, coin = self.stream.config, random.Random(f"{self.stream.seed}/{self.stream.samples.ids[i]}/{view}")
        place, mirror = (coin.random(), coin.random()), coin.random() < 0.5
        random_place = view > 0 and config.crop == "random"
        return place if random_place else (0.5, 0.5), view > 0 and mirror and config.mirror

    def key(self, i: int, bucket: Bucket) -> str:
        """Raises ImageProblem if the picture is not there."""
        try:
            samples = self.stream.samples
            blobs = [samples.pictures[i], samples.masks[i] if samples.masks else None]
            blobs += [samples.hints[i]] if samples.hints else []
            stamps = [blob and blob.stamp() for blob in blobs]
        except OSError as error:
            raise ImageProblem(f"{self.stream.samples.ids[i]} cannot be read: {error.strerror}") from error
        looks = [self.look(i, view) for view in range(self.views)]
        told = [VERSION, stamps, bucket.width, bucket.height, looks, self.stream.config.masks, self.model]
        if (hints := self.stream.config.hints) != "none":  # those without stay what they were
            told.append(hints)
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def file(self, i: int) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(self.stream.samples.ids[i].encode(errors="surrogateescape")).hexdigest()[:32]
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def state(self, i: int, bucket: Bucket) -> str:
        """Whether what is kept of the sample is "whole", "stale", "torn", or "new", which is not there yet."""
        if self.folder is None or not self.file(i).exists():
            return "new"
        try:
            return "whole" if self.read(i)[1] == self.key(i, bucket) else "stale"
        except ImageProblem:
            return "stale"  # the picture is gone
        except FileProblem:
            return "torn"

    def read(self, i: int) -> tuple[dict[str, Tensor], str]:
        """{"latents": (views, c, h, w)} of a sample, and their key; where there are any, also "masks", uint8 (views, 1,
        H, W), and "hints", uint8 (views, 1 or 3, H, W). Raises FileProblem."""
        try:
            return kept_in(self.file(i))
        except FileProblem:
            name = self.stream.samples.ids[i]
            raise FileProblem(f"{self.file(i)}, latents of {name}, is torn: --resume makes it again") from None

    @torch.no_grad()
    def encode(self, members: Sequence[int], bucket: Bucket) -> None:
        """Encode all views of these samples, and keep them; what cannot be read is noted as bad."""
        stream, device = self.stream, self.stream.device

        def views_of(i: int) -> np.ndarray | None:
            try:
                looks = [self.look(i, view) for view in range(self.views)]
                return np.stack([stream.picture(i, bucket.width, bucket.height, *look) for look in looks])
            except ImageProblem as problem:
                stream.refuse(str(problem))
                stream.bad[i] = str(problem)
                return None

        found = dict(zip(members, stream.pool.map(views_of, members), strict=True))
        for i in (i for i, views in found.items() if views is None and self.folder):
            self.file(i).unlink(missing_ok=True)  # of a picture that was good once
        seen = {i: torch.from_numpy(views) for i, views in found.items() if views is not None}
        if not seen:
            return
        pictures = torch.stack(list(seen.values()))  # b views c h w
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = [self.system.encode(to_float(pictures[:, v, :4].to(device))) for v in range(self.views)]
        kept = {"latents": torch.stack(latents, 1).to(torch.float16).cpu()}
        if stream.masked:
            kept["masks"] = pictures[:, :, 4:5]
        if stream.config.hints != "none":
            hints = [stream.hints_of(to_float(pictures[:, v].to(device))) for v in range(self.views)]
            kept["hints"] = torch.stack(hints, 1).cpu()
        for k, i in enumerate(seen):
            one = {name: tensor[k].contiguous() for name, tensor in kept.items()}
            if self.folder is None:
                self.held[i] = one
            else:
                keep_in(self.file(i), one, self.key(i, bucket))

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        stream = self.stream
        _, indices, rows, weights = stream.plan(step, size, rank, world)
        taken = stream.fetched(step, size, rank, world, self._read)
        latents = torch.stack([kept["latents"] for _, kept in taken]).to(stream.device).float()
        batch = {"latents": latents} | stream.told_of(step, [i for i, _ in taken], rows, weights, len(indices))
        if stream.masked:
            batch["mask"] = torch.stack([kept["masks"] for _, kept in taken]).to(stream.device).float() / 255
        if "hints" in taken[0][1]:
            batch["hints"] = to_hints(torch.stack([kept["hints"] for _, kept in taken]).to(stream.device))
        return batch

    def _read(self, i: int, bucket: Bucket, look: Look) -> dict[str, Tensor]:
        """One view of a sample."""
        if self.folder is None:
            kept = self.held[i]
        elif self.file(i).exists():
            kept, _ = self.read(i)
        else:
            self.stream.picture(i, bucket.width, bucket.height, (0.5, 0.5), False)  # raises what was wrong with it
            raise FileProblem(f"latents of {self.stream.samples.ids[i]} are gone from {self.folder}: resume makes them")
        return {name: tensor[int(look.view * self.views)] for name, tensor in kept.items()}


def keep_in(path: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Write a file that knows by its key when it is stale, and when it is torn. Raises FileProblem."""
    told = json.dumps({"key": key, "sha256": digest(tensors)})
    write_atomically(path, safetensors.torch.save(dict(tensors), {"kept": told}))


def kept_in(path: Path) -> tuple[dict[str, Tensor], str]:
    """What `keep_in` wrote: the tensors and their key. Raises FileProblem if it is torn."""
    try:
        with safe_open(path, "pt") as file:
            kept, told = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["kept"])  # noqa: SIM118
        if told["sha256"] == digest(kept):
            return kept, told["key"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    raise FileProblem(f"{path} is torn")


def digest(kept: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(kept.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw(tensor))
    return hashed.hexdigest()


def fingerprint(autoencoder: nn.Module) -> str:
    """Another text for other weights or settings."""
    settings = repr(getattr(autoencoder, "config", ""))
    return hashlib.sha256((settings + digest(autoencoder.state_dict())).encode()).hexdigest()


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
