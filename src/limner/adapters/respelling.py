"""An adapter's file in the names of another program: the same numbers, where that program has a place for them.

What is one matrix in one program and several in another, as queries, keys and values of FLUX.1, is cut and joined, for
LoRA and DoRA: apart, all have the first factor of the whole; joined, first factors that differ stand below each other,
and each second one has zeros for those of the others, which go away again where it is cut.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limner.adapters.files import Adapter, Contents, Entry, base
from limner.adapters.kinds import DECOMPOSED, Scale
from limner.adapters.names import DIFFUSERS, DIFFUSERS_KEYS, KEYS, Written, written
from limner.adapters.trainable import METADATA, PROGRAMS
from limner.errors import UsageError

OF_ROWS = ("up", "up_bias", *DECOMPOSED)
"""Parts that have a row for each of the weight's."""


def respelled(
    adapter: Adapter, contents: Contents, system: Any, spelling: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter, read for `system` from `contents`, in the names that a `spelling` of
    `limner.adapters.trainable` has, and what a file says beside them. Raises UsageError where those have no place for
    something."""
    if adapter.unknown:
        raise UsageError(
            f"{adapter.path} has {len(adapter.unknown)} tensors that mean nothing in {system.name}, and would be lost: "
            f"the first is {adapter.unknown[0]:.120}"
        )
    program = PROGRAMS[spelling]
    names, owners = written(system, program), dict(system.named_modules())
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float | None] = {}
    for module, entries in adapter.entries.items():
        if module not in names:
            raise UsageError(
                f"{spelling} has no name for {module} of {system.name}, which {adapter.path} changes: give another, as "
                "kohya"
            )
        weight = base(owners[module])["weight"]
        ours = [plain(entry, weight.dim() == 2) for entry in entries]
        for row, entry in placed(ours, names[module], len(weight), adapter):
            parts, keys = dict(entry.parts), DIFFUSERS_KEYS if program == DIFFUSERS else KEYS
            if row.convolution:
                parts |= {name: parts[name][..., None, None] for name in ("up", "down", "dora") if name in parts}
            if "dora" in parts and program == DIFFUSERS:
                if not of_rows(parts["dora"], len(parts.get("up", weight))):
                    raise UsageError(f"{spelling} has no place for lengths of columns, as {adapter.path} has")
                parts["dora"] = parts["dora"].flatten()
            if lost := sorted(parts.keys() - keys.keys()):
                what = "DoRA of no LoRA" if lost == ["dora"] else entry.kind.title
                raise UsageError(f"{spelling} has no place for {what} ({lost[0]}), as {adapter.path} has for {module}")
            tensors |= {f"{row.name}.{keys[name]}": part.contiguous().clone() for name, part in parts.items()}
            alphas[row.name] = entry.scale.alpha
            if program == DIFFUSERS:
                continue
            if "on_input" in entry.keys:
                tensors[f"{row.name}.on_input"] = contents.tensors[entry.keys["on_input"]]
            if (alpha := entry.scale.alpha) is not None:
                kept = contents.tensors.get(entry.keys.get("alpha", ""))
                same = kept is not None and kept.item() == alpha
                like = next(iter(parts.values()))
                tensors[f"{row.name}.alpha"] = kept if same else torch.tensor(alpha, dtype=like.dtype)  # type: ignore[assignment]
    return tensors, settings(tensors, alphas, adapter) if program == DIFFUSERS else {}


def plain(entry: Entry, linear: bool) -> Entry:
    """As ours lie: halves in our order, no axes of a 1 x 1 convolution on a matrix, one name for DoRA's lengths, and
    the alpha that alone says the scale."""
    parts = dict(entry.parts)
    if "magnitude" in parts:
        length = parts.pop("magnitude").flatten()
        parts["dora"] = length.reshape(-1, *[1] * (1 if linear else 3))
    if linear:
        parts |= {k: v.flatten(1) for k, v in parts.items() if k in ("up", "down", "dora") and v.dim() == 4}
    if entry.swapped:
        if parts.keys() - {"up", "down", "up_bias", "dora", "diff", "diff_b"}:
            raise UsageError(
                f"{entry.kind.title} on {entry.module} has its halves the other way round: it stays as it is"
            )
        turned = {k: torch.cat(v.chunk(2)[::-1]) for k, v in parts.items() if k != "down"}
        parts |= turned
    scale = entry.scale
    if scale.rooted and scale.alpha is not None:
        scale = Scale(scale.alpha * entry.rank**0.5)
    return replace(entry, parts=parts, scale=scale, swapped=False)


def of_rows(lengths: Tensor, height: int) -> bool:
    """Whether DoRA's lengths are of so many rows, and not of columns."""
    return len(lengths) == height and lengths[0].numel() == 1


def placed(
    entries: Sequence[Entry], rows: Sequence[Written], height: int, adapter: Adapter
) -> list[tuple[Written, Entry]]:
    """What there is for each of the names of a module. Raises UsageError."""
    mine = {entry.rows: entry for entry in entries}
    theirs = {row.rows: row for row in rows}
    if mine.keys() <= theirs.keys():
        return [(theirs[where], entry) for where, entry in mine.items()]
    first = entries[0]
    if any(entry.parts.keys() - {"up", "down", "up_bias", "dora"} for entry in entries) or any(
        "dora" in entry.parts and not of_rows(entry.parts["dora"], len(entry.parts["up"])) for entry in entries
    ):
        raise UsageError(
            f"{first.kind.title} on {first.module} cannot be {'cut' if first.rows is None else 'joined'} as the other "
            f"program has its rows, and {adapter.path} has one"
        )
    whole = first if first.rows is None else joined(entries, height, adapter)
    if None in theirs:
        return [(theirs[None], whole)]
    made = [(row, cut(whole, row.rows)) for row in rows if row.rows is not None]
    return [(row, entry) for row, entry in made if entry is not None]


def cut(whole: Entry, rows: tuple[int, int]) -> Entry | None:
    """An adapter for these rows of a matrix alone, None where it does nothing there."""
    parts = {name: part[slice(*rows)] if name in OF_ROWS else part for name, part in whole.parts.items()}
    used = parts["up"].flatten(1).any(0)
    if not used.any() and "dora" not in parts and not parts.get("up_bias", used).any():
        return None
    scale = whole.scale
    if used.any() and not used.all():
        parts |= {"up": parts["up"][:, used], "down": parts["down"][used]}
        if scale.alpha is not None:
            scale = Scale(scale.alpha * int(used.sum()) / len(used))
    return replace(whole, parts=parts, scale=scale, rows=rows)


def joined(entries: Sequence[Entry], height: int, adapter: Adapter) -> Entry:
    """One adapter for a matrix of so many rows, of those for some of them. Raises UsageError."""
    first, parts = entries[0], [entry.parts for entry in entries]
    alike = all(p.keys() == parts[0].keys() for p in parts)
    whole = sum(len(p["up"]) for p in parts) == height
    if len({entry.scale(entry.rank) for entry in entries}) > 1 or not alike or ("dora" in parts[0] and not whole):
        raise UsageError(
            f"what {adapter.path} has for parts of {first.module} is not alike (alpha over rank, biases, or DoRA on "
            "some): the other program has one adapter for all of it"
        )
    shared = all(torch.equal(p["down"], parts[0]["down"]) for p in parts)
    made = {name: part.new_zeros(height, *part.shape[1:]) for name, part in parts[0].items() if name in OF_ROWS}
    made["down"] = parts[0]["down"] if shared else torch.cat([p["down"] for p in parts])
    made["up"] = parts[0]["up"].new_zeros(height, len(made["down"]))
    place = 0
    for entry, p in zip(entries, parts, strict=True):
        assert entry.rows is not None
        columns = slice(0, None) if shared else slice(place, place := place + entry.rank)
        for name in made.keys() & set(OF_ROWS):
            target = made[name][slice(*entry.rows)]
            (target[:, columns] if name == "up" else target).copy_(p[name])
    scale = first.scale
    if scale.alpha is not None:
        scale = Scale(scale.alpha / first.rank * len(made["down"]))
    return replace(first, parts=made, scale=scale, rows=None)


def settings(tensors: Mapping[str, Tensor], alphas: Mapping[str, float | None], adapter: Adapter) -> dict[str, str]:
    """The alphas that diffusers' names have no place for; nothing if there are none. Raises UsageError."""
    told: dict[str, Any] = {}
    doras = {name: f"{name}.lora_magnitude_vector" in tensors for name in alphas}
    if len(set(doras.values())) > 1:
        raise UsageError(f"diffusers has DoRA on all of an adapter or none, and {adapter.path} has it on some")
    if not any(doras.values()) and all(alpha is None for alpha in alphas.values()):
        return {}
    for name, alpha in sorted(alphas.items()):
        prefix, _, path = name.partition(".")
        rank = len(tensors[f"{name}.lora_A.weight"])
        told.setdefault(f"{prefix}.target_modules", []).append(path)
        told.setdefault(f"{prefix}.rank_pattern", {})[path] = rank
        told.setdefault(f"{prefix}.alpha_pattern", {})[path] = rank if alpha is None else alpha
    for prefix in {name.partition(".")[0] for name in alphas}:
        told[f"{prefix}.use_dora"] = any(doras.values())
        for usual, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            rows = told[f"{prefix}.{pattern}"]
            told[f"{prefix}.{usual}"] = most = Counter(rows.values()).most_common(1)[0][0]
            told[f"{prefix}.{pattern}"] = {path: value for path, value in rows.items() if value != most}
    return {METADATA: json.dumps(told, sort_keys=True)}
