"""Other programs' names for the tensors of a network, usable in both directions.

A layout is a table with a row for every tensor of the network: our name, and the place where the other file has it. It
is generated from the network's configuration, never guessed from the file, so what is missing or left over is known by
name; and since reading and writing use the same table, writing what was read gives the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from limner.checkpoints.files import account
from limner.errors import CheckpointMismatch
from limner.nn import quantized
from limner.nn.quantized import Quantized


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in another file, and how it is kept there.

    `part` of `parts`: one of so many equal slices along the first axis of a tensor that joins several of ours (fused
    queries, keys and values); with `heads`, so many rounds of slices: those of the first head, then those of the next.
    `kept` "1x1": a matrix is kept as a 1 x 1 convolution (out, in, 1, 1), "1": as one over a sequence (out, in, 1);
    either is read. "transposed": a matrix is kept as (in, out). "swapped": its halves along the first axis are the
    other way round.
    `then`: further tensors that follow it in ours along the first axis, `rows` of each, the first included.
    """

    name: str
    part: int = 0
    parts: int = 1
    heads: int = 1
    kept: Literal["as it is", "1x1", "1", "transposed", "swapped"] = "as it is"
    then: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.then)

    def named(self, name: Callable[[str], str]) -> Place:
        """The same of what bears another name."""
        return replace(self, name=name(self.name), then=tuple(map(name, self.then)))


def names(layout: Layout) -> set[str]:
    """Of all that a file of the layout has."""
    return {name for place in layout.values() for name in place.names}


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
    return {ours + name: place.named(lambda own: theirs + own) for name, place in layout.items()}


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
    """The tensors of a file under our names, as views where that is possible; what is quantised stays so where it can.

    Every row must be there and nothing else: CheckpointMismatch names the first that is missing or left over.
    """
    account(names(layout), tensors.keys(), source)
    return {name: _whole(tensors, place, source) for name, place in layout.items()}


def write(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our `tensors`, all that the layout has rows for, as the other program keeps them: the inverse of `read`."""
    joined: dict[str, dict[int, Tensor]] = {}
    heads: dict[str, int] = {}
    for ours, place in layout.items():
        pieces = tensors[ours].split(place.rows) if place.then else (tensors[ours],)
        for name, tensor in zip(place.names, pieces, strict=True):
            joined.setdefault(name, {})[place.part] = _theirs(tensor, place)
            heads[name] = place.heads
    return {
        name: parts[0] if len(parts) == 1 else _join([parts[k] for k in sorted(parts)], heads[name])
        for name, parts in joined.items()
    }


def _join(parts: list[Tensor], heads: int) -> Tensor:
    if heads == 1:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _whole(tensors: Mapping[str, Tensor], place: Place, source: Path | str) -> Tensor:
    for name, rows in zip(place.names, place.rows, strict=False):
        if tensors[name].shape[:1] != (rows,):
            raise CheckpointMismatch(f"{source}: {name} is {tuple(tensors[name].shape)}, of which {rows} rows are ours")
    pieces = [_ours(tensors[name], place, source) for name in place.names]
    return _rows(pieces) if place.then else pieces[0]


def _rows(pieces: list[Tensor]) -> Tensor:
    """One after the other: of those that are quantised in different ways, the numbers."""
    small: list[Quantized] = [cast(Quantized, piece) for piece in pieces if isinstance(piece, Quantized)]
    if len(small) == len(pieces) and all(small[0].joins(piece) for piece in small):
        return quantized.joined(small)  # type: ignore[return-value]
    return torch.cat([piece.float() if small else piece for piece in pieces])


def _ours(tensor: Tensor, place: Place, source: Path | str) -> Tensor:
    if tensor.dim() and tensor.shape[0] % (place.parts * place.heads):
        raise CheckpointMismatch(
            f"{source}: {place.name} is {tuple(tensor.shape)}, which is not {place.parts * place.heads} equal parts"
        )
    if isinstance(tensor, Quantized):
        if tensor.in_rows and place.heads == 1 and place.kept != "transposed":
            return _slice(tensor, place)
        tensor = tensor.whole()
    if place.heads > 1:
        tensor = tensor.unflatten(0, (place.heads, place.parts, -1))[:, place.part].flatten(0, 1)
    elif place.parts > 1:
        tensor = tensor.chunk(place.parts)[place.part]
    if place.kept in ("1x1", "1") and tensor.shape[2:] in ((1, 1), (1,)):
        return tensor.flatten(1)
    return _turned(tensor, place)


def _slice(q: Quantized, place: Place) -> Quantized:
    size = q.shape[0] // place.parts
    q = q.rows(place.part * size, (place.part + 1) * size)
    if place.kept != "swapped":
        return q
    middle = -(-size // 2)
    return quantized.joined([q.rows(middle, size), q.rows(0, middle)])


def _theirs(tensor: Tensor, place: Place) -> Tensor:
    if place.kept == "1x1":
        return tensor[:, :, None, None]
    if place.kept == "1":
        return tensor[:, :, None]
    return _turned(tensor, place)


def _turned(tensor: Tensor, place: Place) -> Tensor:
    if place.kept == "swapped":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.T if place.kept == "transposed" else tensor
