"""Other programs' names for the tensors of a network, usable in both directions.

A layout is a table with a row for every tensor of the network: our name, and the place where the other file has it. It
is generated from the network's configuration, never guessed from the file, so what is missing or left over is known by
name; and since reading and writing use the same table, writing what was read gives the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from limner.checkpoints.files import account
from limner.errors import CheckpointMismatch


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in another file, and how it is kept there.

    `part` of `parts`: one of so many equal slices along the first axis of a tensor that joins several of ours (fused
    queries, keys and values); with `heads`, so many rounds of slices: those of the first head, then those of the next.
    `kept` "1x1": a matrix is kept as a 1 x 1 convolution (out, in, 1, 1), "1": as one over a sequence (out, in, 1);
    either is read. "transposed": a matrix is kept as (in, out).
    """

    name: str
    part: int = 0
    parts: int = 1
    heads: int = 1
    kept: Literal["as it is", "1x1", "1", "transposed"] = "as it is"


Layout = Mapping[str, Place]


EARLY = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def early_diffusers(names: Iterable[str]) -> dict[str, Place]:
    """The layout of files that diffusers wrote before 2023 and in part until the middle of that year: its names, which
    are ours, but for attention without text."""
    layout = {}
    for ours in names:
        theirs = ours
        for new, early in EARLY.items():
            theirs = theirs.replace(new, early)
        layout[ours] = Place(theirs)
    return layout


def prefixed(layout: Layout, ours: str, theirs: str) -> dict[str, Place]:
    """`layout` as a part of a larger model, whose names begin with `ours` here and with `theirs` in the file."""
    return {ours + name: replace(place, name=theirs + place.name) for name, place in layout.items()}


def fit(layout: Layout, ours: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raises CheckpointMismatch, with names as the file has them, unless it holds all of `ours` (on any device) and
    nothing else, in the shapes that they have there."""
    expected = write(layout, ours)
    account(expected.keys(), tensors.keys(), source)
    for name, tensor in expected.items():
        found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
        if _plain(found) != _plain(wanted):
            raise CheckpointMismatch(f"{source}: {name} is {found} in the file, {wanted} in the model")
        if not tensors[name].is_floating_point():
            raise CheckpointMismatch(f"{source}: {name} is of {tensors[name].dtype}, which are no fractions")


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones at the end, which matrices kept as convolutions have."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def read(layout: Layout, tensors: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The tensors of a file under our names, as views where that is possible.

    Every row must be there and nothing else: CheckpointMismatch names the first that is missing or left over.
    """
    account({place.name for place in layout.values()}, tensors.keys(), source)
    return {name: _ours(tensors[place.name], place, source) for name, place in layout.items()}


def write(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our `tensors`, all that the layout has rows for, as the other program keeps them: the inverse of `read`."""
    joined: dict[str, dict[int, Tensor]] = {}
    heads: dict[str, int] = {}
    for name, place in layout.items():
        joined.setdefault(place.name, {})[place.part] = _theirs(tensors[name], place)
        heads[place.name] = place.heads
    return {
        name: parts[0] if len(parts) == 1 else _join([parts[k] for k in sorted(parts)], heads[name])
        for name, parts in joined.items()
    }


def _join(parts: list[Tensor], heads: int) -> Tensor:
    if heads == 1:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _ours(tensor: Tensor, place: Place, source: Path | str) -> Tensor:
    if tensor.dim() and tensor.shape[0] % (place.parts * place.heads):
        raise CheckpointMismatch(
            f"{source}: {place.name} is {tuple(tensor.shape)}, which is not {place.parts * place.heads} equal parts"
        )
    if place.heads > 1:
        tensor = tensor.unflatten(0, (place.heads, place.parts, -1))[:, place.part].flatten(0, 1)
    elif place.parts > 1:
        tensor = tensor.chunk(place.parts)[place.part]
    if place.kept in ("1x1", "1") and tensor.shape[2:] in ((1, 1), (1,)):
        return tensor.flatten(1)
    return tensor.T if place.kept == "transposed" else tensor


def _theirs(tensor: Tensor, place: Place) -> Tensor:
    if place.kept == "1x1":
        return tensor[:, :, None, None]
    if place.kept == "1":
        return tensor[:, :, None]
    return tensor.T if place.kept == "transposed" else tensor
