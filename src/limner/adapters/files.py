"""An adapter's file: its tensors sorted by module and part, read with the names and shapes of the model it is for.

Nothing is taken on trust: every key must mean a module of the model, every part must fit its weight, ranks and alphas
must be numbers that can be. A file for another model is refused by that model's name.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner import catalog
from limner.adapters import kinds
from limner.adapters.kinds import Kind, Scale
from limner.adapters.names import WEIGHTS, Spelled, spellings
from limner.checkpoints import files
from limner.errors import CheckpointMismatch, FileProblem
from limner.models.flux import FLUX_CONTROL, FLUX_DEV, Flux
from limner.nn.linear import Linear

LARGEST_RANK, LARGEST_ALPHA, LARGEST_JSON = 16_384, 1e6, 4_000_000
MOST_UNKNOWN = 0.1
"""A file of which more is unknown is refused; less is told."""
BASES = (
    "sd1", "sd2", "sdxl", "sdxl-refiner", "flux-dev", "sd3-medium", "sd3.5-medium", "sd3.5-large", "dit", "icons",
)  # fmt: skip
PEFT_FILE, PEFT_CONFIG, DIFFUSERS_CONFIG = "adapter_model.safetensors", "adapter_config.json", "lora_adapter_metadata"
CONTROL_LORA = "control-LoRA of FLUX.1"
INPUT = "network.img_in"
"""What a control-LoRA widens, so that the network sees a picture beside the latents."""
NORM = re.compile(r"(.+[._](?:(?:query|key)_norm|norm_(?:added_)?[qk]))\.(?:scale|weight)")
"""A norm of queries or keys, which control-LoRAs hold whole."""
SCALARS = {"on_input", "k1"}  # parts that may be one number


def _endings() -> dict[str, str]:
    """How the name of a tensor ends -> which part of an adapter it is."""
    found = {".alpha": "alpha", ".dora_scale": "dora", ".lora_mid.weight": "mid", ".on_input": "on_input"}
    for new, kohya, early in (("A", "down", "down"), ("B", "up", "up")):
        for ending in (f".lora_{new}", f".lora_{new}.default", f".lora_{kohya}", f"_lora.{early}", f".lora.{early}",
                       f".lora_linear_layer.{early}"):  # fmt: skip
            found[f"{ending}.weight"] = kohya
            if kohya == "up":
                found[f"{ending}.bias"] = "up_bias"
    for adapter in ("", ".default"):
        found[f".lora_magnitude_vector{adapter}"] = found[f".lora_magnitude_vector{adapter}.weight"] = "magnitude"
        found[f".ia3_l{adapter}"] = "factor"
        found |= {f".hada_{part}{adapter}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
        found |= {f".lokr_w{part}{adapter}": f"k{part}" for part in ("1", "1_a", "1_b", "2", "2_a", "2_b")}
        found[f".lokr_t2{adapter}"] = "tk2"
    found |= {f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")}
    found |= {f".{part}": part for part in ("w_norm", "b_norm", "diff", "diff_b", "rescale")}
    return found | {".oft_blocks": "blocks", ".weight": "weight", ".down.weight": "down", ".up.weight": "up"}


ENDINGS = _endings()
LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)


def split(key: str, names: Container[str]) -> tuple[str, str]:
    """The spelling of a module and the part that a key means, "" for a key of no adapter. `names` are all keys: a
    weight is IA3's only beside its mark. XLabs numbers LoRAs, of the image and of the text."""
    ending = next((ending for ending in LONGEST_FIRST if key.endswith(ending)), "")
    spelling = key.removesuffix(ending)
    if not ending or (ending == ".weight" and f"{spelling}.on_input" not in names):
        return key, ""
    if ending in (".down.weight", ".up.weight") and not spelling.endswith(("_lora1", "_lora2")):
        return key, ""
    return spelling, ENDINGS[ending]


@dataclass(frozen=True)
class Entry:
    """What a file holds for one module of ours, `module`, or for `rows` of it, which lie there with their halves the
    other way round if `swapped`; `keys` are the names of `parts` there."""

    module: str
    kind: Kind
    parts: Mapping[str, Tensor]
    keys: Mapping[str, str]
    scale: Scale
    rows: tuple[int, int] | None = None
    swapped: bool = False
    columns: int = 0
    """How wide the module must be made for it, 0 where it fits as it is."""

    @property
    def rank(self) -> int:
        """0 for kinds without."""
        return next((self.parts[part].shape[axis] for part, axis in self.kind.rank if part in self.parts), 0)

    def theirs(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the `own` weight and bias of the module, what the program that made the file has for a module."""
        found = {"weight" if name in WEIGHTS else name: self._turned(self.part(t)) for name, t in own.items()}
        return found | {"weight": widened(found["weight"], self.columns)}

    def difference(self, parts: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is added to `part` of the module's `own` weight and bias, or to what `widened` makes of the weight;
        `parts` are those of the entry, in float32. Raises as `kinds.difference`."""
        named = {"weight" if name in WEIGHTS else name: name for name in own}
        made = kinds.difference(self.kind, parts, self.scale, self.theirs(own))
        return {named[name]: self._turned(delta) for name, delta in made.items()}

    def factors(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Of an adapter of low rank on a matrix of so many rows, up (rows, rank) and down (rank, columns), in float32,
        and what it adds to the bias (rows,), where it does; else None."""
        found = kinds.factors(
            self.kind, {name: part.to(device, torch.float32) for name, part in self.parts.items()}, self.scale
        )
        if found is None:
            return None
        up, bias = found[0].new_zeros(rows, found[0].shape[1]), None
        self.part(up).copy_(self._turned(found[0]))
        if found[2] is not None:
            bias = found[2].new_zeros(rows)
            self.part(bias).copy_(self._turned(found[2]))
        return up, found[1], bias

    def part(self, whole: Tensor) -> Tensor:
        """The rows that it is for, as a view."""
        return whole if self.rows is None else whole[slice(*self.rows)]

    def _turned(self, tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2)[::-1]) if self.swapped else tensor


def widened(weight: Tensor, columns: int) -> Tensor:
    """A matrix with columns of zeros behind its own, where it has fewer than so many."""
    return F.pad(weight, (0, columns - weight.shape[-1])) if weight.shape[-1] < columns else weight


@dataclass(frozen=True)
class Adapter:
    """A file read for a model: `entries` by module, several where they are for different rows of it, and the keys that
    mean nothing there."""

    path: Path
    name: str
    hash: str
    entries: Mapping[str, tuple[Entry, ...]]
    programs: tuple[str, ...]
    total: int
    unknown: tuple[str, ...]

    @property
    def all(self) -> tuple[Entry, ...]:
        return tuple(itertools.chain(*self.entries.values()))

    @property
    def widens(self) -> bool:
        """Whether it is a control-LoRA."""
        return any(entry.columns for entry in self.entries.get(INPUT, ()))

    @property
    def matched(self) -> int:
        return self.total - len(self.unknown)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(title for title, _ in Counter(map(_title, self.all)).most_common())

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({entry.rank for entry in self.all} - {0}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({e.scale.alpha for e in self.all if e.scale.alpha is not None}))


def _title(entry: Entry) -> str:
    return "DoRA" if entry.kind.title == "LoRA" and entry.parts.keys() & set(kinds.DECOMPOSED) else entry.kind.title


@dataclass(frozen=True)
class Contents:
    """The tensors and settings of an adapter's file, not yet read for a model."""

    path: Path
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[str, tuple[str, str]]:
        """What `split` says of every key; and beside a LoRA norms are what they are to be."""
        found = {key: split(key, self.tensors) for key in self.tensors}
        if any(part == "down" for _, part in found.values()):
            found |= {key: (norm[1], "whole") for key in found if (norm := NORM.fullmatch(key))}
        return found

    def scale(self, program_path: str, alpha: float | None) -> Scale:
        """Of a module as the file spells it: its own alpha, or what the settings of PEFT say of it."""
        prefix = next((p for p in self.settings if program_path.startswith(f"{p}.")), "")
        told = self.settings.get(prefix)
        if alpha is not None or told is None:
            return Scale(alpha)
        patterns = told.get("alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if f".{program_path}".endswith(f".{pattern}"):
                return Scale(self.number("alpha_pattern", value), bool(told.get("use_rslora")))
        found = told.get("lora_alpha", told.get("alpha"))
        return Scale(None if found is None else self.number("lora_alpha", found), bool(told.get("use_rslora")))

    def number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_ALPHA:
            raise CheckpointMismatch(f"{self.path}: {name} is {value!r:.40}, not a number up to {LARGEST_ALPHA:g}")
        return float(value)


# -------------------------------------------------------------------- reading


def contents_of(path: str | Path) -> Contents:
    """The contents of a file, or of a folder of PEFT. Raises FileProblem."""
    path = Path(path)
    if (path / PEFT_FILE).is_file():
        path = path / PEFT_FILE
    tensors, metadata = files.read(path)
    settings: dict[str, Any] = {}
    beside = path.parent / PEFT_CONFIG
    if DIFFUSERS_CONFIG in metadata:
        for name, value in _json(metadata[DIFFUSERS_CONFIG], path).items():
            part, _, setting = name.partition(".")
            settings.setdefault(part, {})[setting] = value
    elif path.name == PEFT_FILE and beside.is_file() and beside.stat().st_size < LARGEST_JSON:
        settings["base_model"] = _json(beside.read_text(encoding="utf-8", errors="replace"), beside)
    return Contents(path, tensors, settings)


def name_of(path: Path) -> str:
    """What an adapter is called: its file without the ending, or PEFT's folder."""
    with suppress(OSError, RuntimeError):  # links in a circle
        path = path.resolve()
    return path.name if path.is_dir() else path.parent.name if path.name == PEFT_FILE else path.stem


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"{path}: its settings of PEFT are not JSON") from error
    if not isinstance(found, dict):
        raise FileProblem(f"{path}: its settings of PEFT are not a JSON object")
    return found


def digest(path: Path) -> str:
    """The first 12 digits of the SHA-256 of a safetensors file's tensors, without its header (A1111's and CivitAI's
    AutoV3); of the whole of another file."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(0 if files.is_torch(path) else 8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()[:12]


def is_adapter(contents: Contents) -> bool:
    """Whether any of its keys can be of one."""
    return any(part for _, part in contents.parts.values())


def read(path: str | Path, system: nn.Module) -> Adapter:
    """The adapter in a file, for `system` (a `DiffusionSystem`, on any device).

    Raises FileProblem, and CheckpointMismatch where it is for another model: by that one's name if it is known.
    """
    contents = contents_of(path)
    adapter, misfit = survey(contents, system)
    # one that was trained on a network as wide has no norms whole
    astray = widens(contents) and not _takes_control(system) and any("whole" in entry.parts for entry in adapter.all)
    if astray or misfit or len(adapter.unknown) > MOST_UNKNOWN * adapter.total or not adapter.entries:
        raise CheckpointMismatch(_refusal(contents, adapter, misfit, system))
    return adapter


def survey(contents: Contents, system: nn.Module, table: Mapping[str, Spelled] | None = None) -> tuple[Adapter, str]:
    """What of a file means something in `system`, and a sentence on the first part that does not fit, "" if all do.
    `table` are the system's `spellings`, where they are known.

    Raises CheckpointMismatch for what fits no model: a rank or alpha that cannot be, parts that make no kind.
    """
    table = spellings(system) if table is None else table
    groups: dict[Any, dict[str, str]] = {}  # place -> part -> key
    programs: Counter[str] = Counter()
    unknown = []
    for key, (spelling, part) in contents.parts.items():
        found = table.get(spelling) if part else None
        if found is None:
            unknown.append(key)
            continue
        parts = groups.setdefault(found.place, {})
        if part in parts:
            raise CheckpointMismatch(f"{contents.path}: {parts[part]} and {key} mean the same")
        parts[part] = key
        programs[found.program] += 1
    entries: dict[str, tuple[Entry, ...]] = {}
    misfit = ""
    owners = dict(system.named_modules())
    for place, keys in groups.items():
        entry = _entry(contents, place, keys)
        own = base(owners[entry.module])
        if entry.module == INPUT:
            own |= {"weight": _unwidened(system)}
            if widens(contents) and _takes_control(system):
                entry = replace(entry, columns=FLUX_CONTROL.in_channels)
        problem = _problem(entry, own)
        if problem:
            unknown += keys.values()
            misfit = misfit or problem
        else:
            beside = entries.get(entry.module, ())
            for other in beside:
                if _overlap(entry.rows, other.rows):
                    first, second = (next(iter(one.keys.values())) for one in (other, entry))
                    raise CheckpointMismatch(f"{contents.path}: {first} and {second} mean the same")
            entries[entry.module] = (*beside, entry)
    path = contents.path
    return (
        Adapter(
            path, name_of(path), digest(path), entries, tuple(p for p, _ in programs.most_common()),
            len(contents.tensors), tuple(unknown),
        ),
        misfit,
    )  # fmt: skip


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])


def base(module: nn.Module) -> dict[str, Tensor]:
    """The weight and the bias of a module, as it has them now, by its own names; of a quantised weight the shape alone,
    on the meta device."""
    found = {name: getattr(module, name, None) for name in (*WEIGHTS, "bias")}
    if isinstance(module, Linear) and found["weight"] is None:
        found["weight"] = torch.empty(module.out_features, module.in_features, device="meta")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _entry(contents: Contents, place: tuple[str, Any, bool], keys: dict[str, str]) -> Entry:
    """Raises CheckpointMismatch for parts that are not one adapter, or numbers that cannot be."""
    path = contents.path
    parts = {part: contents.tensors[key] for part, key in keys.items()}
    alpha = None
    for part in ("alpha", "on_input"):
        if part in parts and (parts[part].numel() != 1 or not math.isfinite(number := parts[part].double().item())):
            raise CheckpointMismatch(f"{path}: {keys[part]} is {_brief(parts[part])}, where one number is wanted")
        if part in parts and part == "alpha":
            alpha = contents.number(keys["alpha"], number)
    parts.pop("alpha", None)
    for part, tensor in parts.items():
        if tensor.dim() == 0 and part not in SCALARS:
            raise CheckpointMismatch(f"{path}: {keys[part]} is one number, where a matrix or a vector is wanted")
    if "weight" in parts and "on_input" in parts:
        parts["columns" if parts.pop("on_input") else "rows"] = parts.pop("weight")
    kind = kinds.find(frozenset(parts))
    if kind is None:
        first = next(iter(keys.values()))
        raise CheckpointMismatch(
            f"{path}: {first} and the {len(keys) - 1} tensors beside it are not one of "
            f"{', '.join(kind.title for kind in kinds.KINDS)}: is the file whole?"
        )
    for part, tensor in parts.items():
        key = keys.get(part, keys.get("weight", part))
        if not tensor.is_floating_point():
            raise CheckpointMismatch(f"{path}: {key} is of {tensor.dtype}, which are no fractions")
    spelling = contents.parts[next(iter(keys.values()))][0].removeprefix("base_model.model.unet.")
    module, rows, swapped = place
    entry = Entry(module, kind, parts, keys, contents.scale(spelling, alpha), rows, swapped)
    if kind.rank and not 0 < entry.rank <= LARGEST_RANK and not (kind.title == "LoKr" and entry.rank == 0):
        raise CheckpointMismatch(f"{path}: {next(iter(keys.values()))} has rank {entry.rank}, not 1 to {LARGEST_RANK}")
    return entry


def _brief(tensor: Tensor) -> str:
    return f"{tensor.item()}" if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"


def _problem(entry: Entry, own: Mapping[str, Tensor]) -> str:
    """Why an entry does not fit the weight it is for, "" if it does; nothing is computed."""
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    parts = {name: torch.empty(t.shape, device="meta", dtype=torch.float32) for name, t in entry.parts.items()}
    try:
        entry.difference(parts, meta)
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(
            f"{key} {tuple(entry.parts[part].shape)}" for part, key in entry.keys.items() if part in entry.parts
        )
        reason = f": {error}" if isinstance(error, ValueError) else ""
        lines = "" if entry.rows is None else f" (rows {entry.rows[0]} to {entry.rows[1] - 1})"
        wanted = tuple(entry.theirs(meta)["weight"].shape)
        return f"{shapes} does not fit {entry.module}{lines}, which is {wanted} in the model{reason}"
    return ""


# -------------------------------------------------------------------- whose


@lru_cache(maxsize=len(BASES))
def bare(name: str) -> nn.Module:
    with torch.device("meta"):
        return catalog.build(catalog.entry(name).config)


@lru_cache(maxsize=len(BASES))
def _spelled(name: str) -> dict[str, Spelled]:
    return spellings(bare(name))


def bases(contents: Contents) -> list[tuple[str, Adapter]]:
    """The models of the catalogue that all of a file but a few keys means something in, the best first."""
    found = []
    for name in BASES if is_adapter(contents) else ():
        adapter, misfit = survey(contents, bare(name), _spelled(name))
        if adapter.entries and not misfit and len(adapter.unknown) <= MOST_UNKNOWN * adapter.total:
            found.append((name, adapter))
    return sorted(found, key=lambda row: len(row[1].unknown))


def widens(contents: Contents) -> bool:
    """Whether it is a control-LoRA of FLUX.1, of Black Forest Labs' names or diffusers'."""
    return any(
        part == "down"
        and spelling.rpartition(".")[2] in ("img_in", "x_embedder")
        and contents.tensors[key].shape[1:] == (FLUX_CONTROL.in_channels,)
        for key, (spelling, part) in contents.parts.items()
    )


def _unwidened(system: Any) -> Tensor:
    """The weight of `INPUT` without adapters, one of which may have made it wider."""
    hidden = {} if system.adapters is None else system.adapters.hidden
    return hidden.get((INPUT, "weight"), system.network.img_in.weight)


def _takes_control(system: Any) -> bool:
    """Whether control-LoRAs are for a system: FLUX.1 dev and Krea."""
    if not isinstance(network := getattr(system, "network", None), Flux) or system.looks:
        return False
    return network.config.guidance_embedded and _unwidened(system).shape[-1] == FLUX_DEV.in_channels


def _refusal(contents: Contents, adapter: Adapter, misfit: str, system: nn.Module) -> str:
    """One line: what a file that does not fit is, or the first thing in it that does not."""
    own = str(getattr(system, "name", "this model"))
    if widens(contents) and not _takes_control(system):
        return (
            f"{contents.path} is a {CONTROL_LORA} (Canny or Depth), with which the network sees a picture beside the "
            f"latents: that is for FLUX.1 dev, not for {own}"
        )
    fits = [name for name, _ in bases(contents)]
    begin = f"{contents.path} does not fit {own}"
    if fits and own not in fits:
        names = " or ".join(f"{name} ({catalog.entry(name).family})" for name in fits)
        return f"{begin}: it was made for {names}; {adapter.matched} of its {adapter.total} keys fit here"
    if misfit:
        return f"{begin}: {misfit}"
    if not is_adapter(contents):
        first = min(contents.tensors, default="none")
        return (
            f"{contents.path} is no adapter: of its {adapter.total} keys (first: {files.shown(first)}) none is of one"
        )
    first = adapter.unknown[0]
    spelling, part = contents.parts[first]
    near = difflib.get_close_matches(spelling, spellings(system), n=1, cutoff=0.6)
    hint = f"; nearest: {near[0]}{first[len(spelling) :]}" if near and part else ""
    return (
        f"{begin}: {len(adapter.unknown)} of its {adapter.total} keys mean no module of {own} "
        f"(first: {first:.200}{hint})"
    )
