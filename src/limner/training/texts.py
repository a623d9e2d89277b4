"""Captions read once: what a text encoder that stays as it is makes of them is kept, and a large one leaves the GPU."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limner.data.batches import SAMPLED, DataConfig, ImageBatches
from limner.data.stored import digest, keep_in, kept_in
from limner.data.streams import Stream
from limner.devices import memory_of
from limner.errors import FileProblem
from limner.systems.diffusion import brought, tensors_of
from limner.training.config import TrainConfig
from limner.training.memory import autocast, precision_of
from limner.training.processes import Processes
from limner.types import Conditioning

VERSION = 1
"""To be raised when the same words become other numbers by what this package does."""
AT_ONCE = 4
"""Captions are read so many at a time, no more and no fewer: what one becomes may depend on how many are read with it
(a product of one to three rows is rounded otherwise than one of more), and must not depend on which."""
LARGE = 1e9
"""Bytes of weights from which on a text encoder does not stay on a GPU that has no more need of it."""
PROBES = ["", "a photo of a red fox, 3d; Zwölf 猫 🦊 (1.2)"]
"""What tells tokenizers and settings apart that no weight tells of."""


class TextCache:
    """`captions -> Conditioning` as the `encoder` gives it, each read once.

    The last that were asked for are kept, up to `limit` bytes, on the `place`; all of them in `folder` if there is one,
    in files that know by their `key` when they are stale. The encoder may rest on the CPU and is brought to `device`
    when there is something new to read.
    """

    def __init__(
        self, encoder: Any, config: TrainConfig, device: torch.device, folder: Path | None = None, identity: str = ""
    ) -> None:
        """`identity` tells of the file that the encoder was read from, where its weights are kept in few bits."""
        self.encoder, self.config, self.device = encoder, config, device
        self.limit = int(config.data.text_cache * 1e9)
        self.place = device if memory_of(device) > 20 * self.limit else torch.device("cpu")
        self.kept: OrderedDict[str, Conditioning] = OrderedDict()
        self.size = 0
        self.folder = folder
        self.key = self._key(identity) if folder else ""

    def __call__(self, captions: list[str]) -> Conditioning:
        """A row for each, on the device."""
        rows = self.read(captions)
        return Conditioning.cat([rows[caption] for caption in captions]).map(lambda value: value.to(self.device))

    def read(self, captions: Iterable[str]) -> dict[str, Conditioning]:
        """Each of them, as one row."""
        rows: dict[str, Conditioning] = {}
        new = []
        for caption in dict.fromkeys(captions):
            found = self.kept.pop(caption, None)
            if found is None and (found := self._stored(caption)) is not None:
                self.size += bytes_of(found)
            if found is None:
                new.append(caption)
            else:
                rows[caption] = self.kept[caption] = found
        if new:
            with brought(tensors_of(self.encoder), self.device):
                for start in range(0, len(new), AT_ONCE):
                    rows |= self._encode(new[start : start + AT_ONCE])
        while self.size > self.limit and self.kept:
            self.size -= bytes_of(self.kept.popitem(last=False)[1])
        return rows

    def fill(self, captions: list[str], some: int = 64) -> None:
        """Read all of them, so many at a time: where there is a folder, the memory need not hold all."""
        for start in range(0, len(captions), some):
            self.read(captions[start : start + some])

    def _encode(self, captions: list[str]) -> dict[str, Conditioning]:
        made = self._made([*captions, *[""] * (AT_ONCE - len(captions))])
        rows = {}
        for k, caption in enumerate(captions):
            rows[caption] = row = made.map(partial(self._row, k))
            self.kept[caption] = row
            self.size += bytes_of(row)
            if self.folder is not None:
                tensors = {name: value.cpu() for name, value in row.tensors().items() if value is not None}
                keep_in(self._file(caption), tensors, self.key)
        return rows

    def _row(self, k: int, value: torch.Tensor) -> torch.Tensor:
        return value[k : k + 1].to(self.place, copy=True)

    def _made(self, captions: list[str]) -> Conditioning:
        """As in a step of training: some layers compute otherwise where no gradient is asked for."""
        with torch.enable_grad(), autocast(self.config, self.device):
            return self.encoder.encode(captions).map(torch.detach)

    def _key(self, identity: str) -> str:
        with brought(tensors_of(self.encoder), self.device):
            probes = {k: v for k, v in self._made(PROBES).tensors().items() if v is not None}
        own = dict(self.encoder.named_parameters()) | dict(self.encoder.named_buffers())
        told = [
            VERSION,
            identity,
            precision_of(self.config, self.device),
            self.device.type,
            digest(own),
            digest(probes),
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _file(self, caption: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(caption.encode(errors="surrogateescape")).hexdigest()[:32]
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _stored(self, caption: str) -> Conditioning | None:
        """What the folder has of it, if that is whole and of this encoder."""
        if self.folder is None or not self._file(caption).exists():
            return None
        try:
            tensors, key = kept_in(self._file(caption))
        except FileProblem:
            return None
        row: dict[str, Any] = {name: value.to(self.place) for name, value in tensors.items()}
        return Conditioning(**row) if key == self.key else None


def bytes_of(row: Conditioning) -> int:
    return sum(value.nbytes for value in row.tensors().values() if value is not None)


def keep(
    system: Any, model: Any, config: TrainConfig, sources: Iterable[ImageBatches | Stream], processes: Processes
) -> list[str]:
    """Have `model` read captions through a cache, where nothing of its text encoder learns. On a GPU, where all the
    captions that there can be are known from the `sources` of pictures, and fit, they are read now, and a large encoder
    rests on the CPU from here on. Returns what there is to tell.

    `system` is what is trained, `model` or something beside it.
    """
    data, device = config.data, processes.device
    encoder = getattr(model, "text_encoder", None)
    learns = config.word is not None or (config.adapter is not None and config.adapter.text_encoder)
    if learns or encoder is None or not any(True for _ in encoder.parameters()):
        idle = data.text_cache not in (0, DataConfig.text_cache)
        why = "its text encoder learns" if learns else "it reads no words"
        return [f"data.text_cache={data.text_cache:g} has no effect on {config.name}: {why}"] if idle else []
    if not data.text_cache:
        return []
    captions = [source.words() for source in sources]
    if any(one is None for one in captions):  # new ones at every step, which are best read with it
        return []
    wanted = list(dict.fromkeys(["", *(caption for one in captions for caption in one or ())]))
    folder = Path(data.cache) / "texts" if data.cache and data.source in SAMPLED else None
    cache = TextCache(encoder, config, device, folder, model.model_hash if folder else "")
    need = len(wanted) * bytes_of(cache.read([""])[""])
    if need > cache.limit and folder is None:
        more = f"data.text_cache={need / 1e9 + 0.1:.1f}, or data.cache=FOLDER, would keep what is made of them"
        return [f"{len(wanted)} captions are read as they come, they take {need / 1e9:.1f} GB: {more}"]
    model.texts = cache
    apart = processes.world == 1 or system is not model  # DDP wants all of a system on one device
    weights = sum(tensor.nbytes for tensor in tensors_of(encoder))
    if device.type == "cpu" or weights < LARGE or not apart:
        return []
    cache.fill(wanted)
    rest(model)
    return [f"{len(wanted)} captions are read: the text encoder, {weights / 1e9:.1f} GB, rests on the CPU"]


def rest(model: Any) -> None:
    """The text encoder goes to the CPU, and comes back when a drawing asks it something."""
    model.works_on = model.device
    model.graphs.clear()
    with model.bare():
        model.text_encoder.cpu()
    if model.works_on.type == "cuda":
        torch.cuda.empty_cache()
