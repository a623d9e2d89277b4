"""Adapters on a model and off again: `attach`, `detach`, and a report of what each does.

A model with adapters has W + sum of weight * difference in place of W, every difference computed from W itself in
float32 and the sum rounded once to W's precision: their order does not matter, and one more loses nothing. W is kept,
and it is that very tensor that comes back. A quantised W stays as it is, and differences of low rank stand beside it,
as factors in the type that the model computes in. For others it is expanded, and the sum rounded to that type: while
they are on, the matrices that they change take the room of that. A control-LoRA adds columns to the W of FLUX.1's
input, zeros before its difference: while it is on, the system sees a picture beside the latents.
"""

from __future__ import annotations

import difflib
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner import catalog, metadata
from limner.adapters import files, words
from limner.adapters.files import Adapter
from limner.adapters.names import block
from limner.adapters.words import Words
from limner.checkpoints import flows
from limner.errors import FileProblem, UsageError
from limner.nn.linear import Linear
from limner.text.prompts import ENDINGS
from limner.types import Request

LARGEST_WEIGHT = 100.0
TABLE = "text_model.embeddings.token_embedding"
TEXTUAL = "textual inversion"
LONGEST_NAME = metadata.ADAPTER["name"][2]


@dataclass(frozen=True)
class Report:
    """What an adapter does to a model. `changes` is, for each block, the norm of the difference at weight 1 by that of
    the weights it is added to; `matched` of `total` keys of the file mean something, `unknown` are the others.
    `assumed` are sentences on what the file does not tell."""

    name: str
    hash: str
    kinds: tuple[str, ...]
    programs: tuple[str, ...]
    ranks: tuple[int, ...]
    matched: int
    total: int
    unknown: tuple[str, ...]
    changes: Mapping[str, float]
    assumed: tuple[str, ...] = ()

    def ignored(self, weight: float = 1.0) -> list[str]:
        """A sentence for each thing that will not show."""
        told = [f"{self.name} has weight 0, and changes nothing"] if not weight else []
        if self.unknown:
            keys = f"{len(self.unknown)} of its {self.total} keys"
            told.append(
                f"{self.name}: {keys} mean nothing in this model and are left out (first: {self.unknown[0]:.200})"
            )
        return told

    def __str__(self) -> str:
        """In one line."""
        if not self.changes:
            return f"{self.name}: a learned word of {self.total} vectors; say {self.name} in the prompt"
        ranks = f", rank {' '.join(map(str, self.ranks))}" if self.ranks else ""
        most = sorted(self.changes.items(), key=lambda row: -row[1])[:3]
        told = ", ".join(f"{name} by {change:.2%}" for name, change in most)
        count = "1 block" if len(self.changes) == 1 else f"{len(self.changes)} blocks"
        return (
            f"{self.name}: {'/'.join(self.kinds)} in the names of {'/'.join(self.programs)}{ranks}, {self.matched} of "
            f"{self.total} keys; changes {count}, most {told}"
        )


@dataclass(frozen=True)
class Attached:
    """An adapter in use: `weight` times what `blocks` says of the block that a module is in, 1 if nothing."""

    adapter: Adapter | Words
    weight: float
    blocks: Mapping[str, float]

    def strength(self, module: str) -> float:
        path = module.removeprefix("network.")
        fitting = [name for name in self.blocks if f"{path}.".startswith(f"{name}.")]
        return self.weight * (self.blocks[max(fitting, key=len)] if fitting else 1.0)

    def settings(self) -> dict[str, Any]:
        """What a picture remembers of it."""
        if isinstance(self.adapter, Words):
            return {"name": self.adapter.name, "hash": self.adapter.hash}
        blocks = {"blocks": dict(self.blocks)} if self.blocks else {}
        return {"name": self.adapter.name, "hash": self.adapter.hash, "weight": self.weight, **blocks}


class Stack:
    """The adapters on one system, in `on`, and the weights they hide."""

    def __init__(self, system: Any) -> None:
        self.system = system
        self.on: list[Attached] = []
        self.lock = threading.RLock()
        """Held while adapters change, and while something is drawn with them."""
        self.hidden: dict[tuple[str, str], nn.Parameter | None] = {}
        """None is a weight that the module keeps quantised."""
        self.beside: set[str] = set()
        """Modules beside whose quantised weights something stands."""
        self.controls: dict[tuple[tuple[str, int], ...], tuple[Any, str]] = {}
        """Networks of ControlNets and hashes of their files, by these and the times of their last change."""
        self.encoders: dict[str, Any] = {}
        """Towers of pictures, by their place."""
        self.finders: dict[str, tuple[Any, Any]] = {}
        """What makers of control pictures look through, by maker: its files, and it."""
        self.plain: tuple[Any, int, Any] | None = None
        """While a control-LoRA is on: the network's configuration, the width of its input, and the system's defaults
        without it."""

    def attach(self, path: str | Path, weight: float = 1.0, blocks: Mapping[str, float] | None = None) -> Report:
        """Add the adapter in a file, `weight` (-100 to 100) times what it does; `blocks` are factors of blocks, such as
        {"mid_block": 0.5}, of which the longest name that a module begins with counts.

        Raises FileProblem for what is no adapter, is damaged or would do nothing, CheckpointMismatch for one of another
        model, UsageError for a weight or block that cannot be, or a name that is attached already.
        """
        path = Path(path)
        if problem := metadata.misnamed(name := files.name_of(path)):
            raise UsageError(f"an adapter called {name!r:.60} cannot be remembered by a picture ({problem}): rename it")
        learned = words.stored(path) if not path.is_dir() else {}
        adapter = words.read(path, learned, self.system) if learned else files.read(path, self.system)
        if any(other.adapter.name == adapter.name for other in self.on):
            raise UsageError(f"an adapter {adapter.name!r} is attached already: detach it first")
        blocks = dict(blocks or {})
        assumed: tuple[str, ...] = ()
        if isinstance(adapter, Adapter) and adapter.widens:
            self._check_control(adapter)
            assumed = tuple(f"{path}: {sentence}" for sentence in flows.followed(adapter.path)[1])
        if isinstance(adapter, Words):
            if weight != 1 or blocks:
                raise UsageError(f"{adapter.name} is a learned word, which has no weight but what the prompt gives it")
            count = len(adapter.vectors[0])
            self._change([*self.on, Attached(adapter, 1.0, {})])
            return Report(adapter.name, adapter.hash, (TEXTUAL,), (), (), count, count, (), {})
        check_weights(adapter.name, weight, blocks, adapter.entries)
        if adapter.widens and weight and not Attached(adapter, float(weight), blocks).strength(files.INPUT):
            raise UsageError(f"{adapter.name} sees its picture through img_in, whose weight is 0: give it another")
        changes = self._change([*self.on, Attached(adapter, float(weight), blocks)], new=adapter)
        return Report(
            adapter.name, adapter.hash, adapter.kinds, adapter.programs, adapter.ranks, adapter.matched, adapter.total,
            adapter.unknown, changes, assumed,
        )  # fmt: skip

    def detach(self, name: str | None = None) -> None:
        """Take the adapter of this name off, or all. Raises UsageError for one that is not on."""
        kept = [] if name is None else [one for one in self.on if one.adapter.name != name]
        if name is not None and len(kept) == len(self.on):
            names = ", ".join(one.adapter.name for one in self.on) or "none"
            raise UsageError(f"no adapter {name!r} is attached; attached: {names}")
        self._change(kept)

    def restore(self, on: list[Attached]) -> None:
        """As it was when `on` was all."""
        self._change(on)

    def settings(self) -> list[dict[str, Any]]:
        return [one.settings() for one in self.on]

    def own(self, module: str) -> dict[str, Tensor]:
        """The weight and bias of a module without any adapter."""
        found = files.base(owner := self.system.get_submodule(module))
        own = {name: self.hidden.get((module, name), tensor) for name, tensor in found.items()}
        kept = bool(getattr(owner, "code", ""))
        return {name: whole(owner) if t is None or (kept and t.is_meta) else t for name, t in own.items()}

    def bare(self, part: str) -> dict[str, Tensor]:
        """All weights of a part of the system without any adapter."""
        found = self.system.get_submodule(part).state_dict()
        modules = self.system.get_submodule(part).named_modules()
        found |= {
            f"{name}.weight": whole(module) for name, module in modules if isinstance(module, Linear) and module.code
        }
        hidden = {f"{module}.{name}".removeprefix(f"{part}."): t for (module, name), t in self.hidden.items()}
        kept = {name: t for name, t in hidden.items() if t is not None}
        return {name: kept.get(name, tensor) for name, tensor in found.items()}

    @torch.no_grad()
    def _change(self, on: list[Attached], new: Adapter | None = None) -> dict[str, float]:
        """Make the system one with the adapters `on`. Whole or not at all: new weights are put in when all are made.

        Returns what `new`, one of them, changes (see `Report`). Raises FileProblem if that is nothing.
        """
        squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # block -> of differences, of weights
        modules = {module for one in on for module in one.adapter.entries}
        made: dict[tuple[str, str], nn.Parameter] = {}
        beside: dict[str, tuple[Tensor, Tensor]] = {}
        for module in sorted(modules):
            mine = [
                (one.adapter, one.strength(module))
                for one in on
                if isinstance(one.adapter, Adapter) and module in one.adapter.entries
            ]
            if (factors := self._factors(module, mine)) is not None:
                up, down, added = factors
                beside[module] = up, down
                if added is not None:
                    was = self.own_bias(module)
                    changed = (was.float() + added).to(was.dtype)
                    made[module, "bias"] = nn.Parameter(changed, requires_grad=was.requires_grad)
                if not any(adapter is new for adapter, _ in mine):
                    continue
            own = self.own(module)
            sums: dict[str, Tensor] = {}
            for adapter, strength in mine:
                if adapter is not new and (not strength or factors is not None):
                    continue
                for name, delta in difference(adapter, module, own).items():
                    if adapter is new:
                        both = squares[block(module)]
                        both[0] += torch.linalg.vector_norm(delta).item() ** 2
                        both[1] += torch.linalg.vector_norm(own[name], dtype=torch.float32).item() ** 2
                    if not strength or factors is not None:
                        continue
                    if name in sums:
                        longest = max(delta.shape[-1], sums[name].shape[-1])
                        delta, sums[name] = files.widened(delta, longest), files.widened(sums[name], longest)
                        sums[name].add_(delta, alpha=strength)
                    else:
                        sums[name] = delta * strength
            for name, delta in sums.items():
                new_weight = files.widened(own[name].float(), delta.shape[-1]).add(delta)
                new_weight = new_weight.to(self._rounded_to(module, own[name]))
                made[module, name] = nn.Parameter(new_weight, requires_grad=own[name].requires_grad)
        changes = {name: math.sqrt(d / max(w, 1e-30)) for name, (d, w) in sorted(squares.items()) if d}
        if new is not None and not changes:
            raise FileProblem(f"{new.path} would do nothing: every difference that it makes is 0; was it trained?")
        learned = [one.adapter for one in on if isinstance(one.adapter, Words)]
        if learned or self._learned():
            rows = [f"text_encoder.{i}.{TABLE}" for i in range(len(self.system.text_encoder))]
            tables = [made.get((row, "weight"), self.own(row)["weight"]) for row in rows]
            put = words.put(self.system, learned, tables)
            made |= {
                (row, "weight"): nn.Parameter(t, requires_grad=False)
                for row, t in zip(rows, put, strict=True)
                if learned
            }
        for (module, name), parameter in self.hidden.items():
            setattr(self.system.get_submodule(module), name, parameter)
        self.hidden = {key: getattr(self.system.get_submodule(key[0]), key[1]) for key in made}
        for (module, name), parameter in made.items():
            setattr(self.system.get_submodule(module), name, parameter)
        for module in self.beside - beside.keys():
            self._linear(module).beside(None, None)
        for module, (up, down) in beside.items():
            self._linear(module).beside(up, down)
        self.beside = set(beside)
        self.on = on
        self._look()
        return changes

    def _linear(self, module: str) -> Linear:
        found = self.system.get_submodule(module)
        assert isinstance(found, Linear)
        return found

    def own_bias(self, module: str) -> Tensor:
        """That of a module without any adapter."""
        found = self.hidden.get((module, "bias")) if (module, "bias") in self.hidden else self._linear(module).bias
        assert found is not None
        return found

    def _factors(self, module: str, mine: list[tuple[Adapter, float]]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What stands beside the quantised matrix of a module, up (out, rank) and down (rank, in), and what is added to
        its bias (out,), where all that adapters do to it at their weights is of low rank."""
        owner = self.system.get_submodule(module)
        mine = [(adapter, strength) for adapter, strength in mine if strength]
        if not isinstance(owner, Linear) or not owner.code or not mine:
            return None
        ups, downs, biases = [], [], []
        for adapter, strength in mine:
            for entry in adapter.entries[module]:
                if entry.columns or (found := entry.factors(owner.out_features, owner.codes.device)) is None:
                    return None
                ups.append(strength * found[0])
                downs.append(found[1])
                biases += [] if found[2] is None else [strength * found[2]]
        dtype = self._rounded_to(module, ups[0])
        added = sum(biases[1:], biases[0]) if biases else None
        return torch.cat(ups, dim=1).to(dtype), torch.cat(downs).to(dtype), added

    def _look(self) -> None:
        """Have the system see a picture beside the latents while the input of its network is widened for one, and draw
        with the defaults of whole models that do."""
        system, key = self.system, (files.INPUT, "weight")
        if self.plain is not None:
            system.network.config, system.network.img_in.in_features, system.defaults = self.plain
            self.plain = None
        own = self.hidden.get(key)
        if own is None or (columns := system.network.img_in.weight.shape[1]) == own.shape[1]:
            return
        network, defaults = system.network, system.defaults
        self.plain = network.config, network.img_in.in_features, defaults
        follows = next(one.adapter.path for one in self.on if isinstance(one.adapter, Adapter) and one.adapter.widens)
        network.config = replace(network.config, in_channels=columns)
        network.img_in.in_features = columns
        system.defaults = replace(defaults, **catalog.BESIDE["hint"] | {"guidance": flows.followed(follows)[0]})

    def _check_control(self, adapter: Adapter) -> None:
        """Raises UsageError for a control-LoRA beside what sees no picture, or another one."""
        name = self.system.name
        for one in self.on:
            if isinstance(one.adapter, Adapter) and one.adapter.widens:
                raise UsageError(
                    f"{adapter.name} and {one.adapter.name} are both control-LoRAs, and {name} sees one picture beside "
                    "the latents: give one of them"
                )
        for does in ("refiner", "guide"):
            if getattr(self.system, does) is not None:
                raise UsageError(
                    f"{adapter.name} has {name} see a picture beside the latents, which its {does} does not: leave the "
                    f"{does} out"
                )

    def _rounded_to(self, module: str, own: Tensor) -> torch.dtype:
        """The type of a changed weight: its own, or of a quantised one what the part that it is in computes in."""
        if not getattr(self.system.get_submodule(module), "code", ""):
            return own.dtype
        return next(self.system.get_submodule(module.partition(".")[0]).parameters()).dtype

    def _learned(self) -> list[Words]:
        return [one.adapter for one in self.on if isinstance(one.adapter, Words)]

    def unused(self, request: Request) -> list[str]:
        """A sentence for each learned word that is not read in the prompts of a request, in their dialect."""
        if not (learned := self._learned()):
            return []
        system: Any = self.system
        rows = [*system.parsed(request.prompts, request), *system.parsed(request.negatives, request, composed=False)]
        sections = {section for row in rows for part in row for _, text in part.turns for section in text}
        dialect, tower = system.dialect(request), system.text_encoder[0]
        said = {words.lower() for section in sections for _, words, _ in tower.parts(section, dialect)}
        unsaid = [word.name for word in learned if said.isdisjoint(name.lower() for name in word.names)]
        return [f"{name} is a learned word that the prompt does not say" for name in unsaid]


def whole(module: Any) -> Tensor:
    """The numbers of a weight that a module keeps quantised, in float32."""
    return module.quantized.whole()


def difference(adapter: Adapter, module: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter adds to the `own` weight and bias of a module, in float32 where they are.

    Raises FileProblem where that is no number.
    """
    found: dict[str, Tensor] = {}
    for entry in adapter.entries[module]:
        device = next(iter(own.values())).device
        parts = {name: part.to(device, torch.float32) for name, part in entry.parts.items()}
        for name, delta in entry.difference(parts, own).items():
            if not delta.isfinite().all():
                raise FileProblem(
                    f"{adapter.path}: what {next(iter(entry.keys.values()))} makes is no number (NaN): it is damaged"
                )
            if entry.rows is None:
                found[name] = delta
            else:
                whole = found.setdefault(name, torch.zeros_like(own[name], dtype=torch.float32))
                entry.part(whole).copy_(delta)
    return found


def check_weights(
    adapter: str, weight: float, blocks: Mapping[str, float] | None = None, modules: Iterable[str] = ()
) -> None:
    """Raises UsageError for a weight that cannot be, or a block in which an adapter of this name changes none of its
    `modules`."""
    blocks, modules = blocks or {}, list(modules)
    for name, value in (("weight", weight), *blocks.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_WEIGHT:
            limits = f"-{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            raise UsageError(f"the {name} of {adapter} is {value!r:.40}: give a number from {limits}")
    paths = [module.removeprefix("network.") for module in modules]
    for name in blocks:
        if not any(f"{path}.".startswith(f"{name}.") for path in paths):
            known = sorted({block(module) for module in modules})
            near = difflib.get_close_matches(name, known, n=1) or known
            raise UsageError(f"{adapter} changes no block {name!r:.80}; it changes {', '.join(near)}")


def stack(system: Any) -> Stack:
    """The adapters on `system`. Raises UsageError for a system that takes none."""
    if not hasattr(system, "adapters"):
        raise UsageError(f"{system.name} takes no adapters: they are for models that draw from words")
    if system.adapters is None:
        system.adapters = Stack(system)
    return system.adapters


def find(name: str, folders: tuple[Path, ...]) -> Path | None:
    """The file of an adapter of this name in the first of `folders` that has one; `name` is no path."""
    return next(iter(candidates(name, folders)), None)


def candidates(name: str, folders: tuple[Path, ...]) -> list[Path]:
    """All of them. The ending may be said, as ComfyUI's prompts do."""
    if Path(name).name != name or "\\" in name or "\0" in name or len(name) > LONGEST_NAME:
        return []
    names = [name] if name.endswith(ENDINGS) else [f"{name}{ending}" for ending in ENDINGS]
    return [file for folder in folders for said in names if os.path.isfile(file := folder / said)]  # noqa: PTH113 (Path's may raise)
