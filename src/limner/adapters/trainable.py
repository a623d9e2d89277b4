"""Adapters in training: parts that begin as no change at all, beside the modules that they change, and their file.

What a module computes while one is on is what `limner.adapters.attaching` makes of the file, but for rounding: a plain
LoRA of a linear layer is added as two small products, which leaves the large weight alone; every other kind makes the
weight at each step.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from limner.adapters import kinds
from limner.adapters.kinds import Kind, Scale
from limner.adapters.names import COMFYUI, DIFFUSERS, DIFFUSERS_KEYS, KEYS, KOHYA, written
from limner.checkpoints.files import write_atomically
from limner.errors import UsageError
from limner.nn.linear import Linear

LARGEST_RANK = 4096
BESIDE_BLOCKS = re.compile(r"modulation|adaLN|time_emb_proj|\bmod\b|_mod\b|norm")
"""Linear layers of blocks that tell them of the time: nobody adapts those unless asked to."""
KINDS = {"lora": "LoRA", "dora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
Spelling = Literal["kohya", "diffusers", "comfyui"]
PROGRAMS: dict[str, str] = {"kohya": KOHYA, "diffusers": DIFFUSERS, "comfyui": COMFYUI}
METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained in place of a model's own weights. `kind` is the formula; `rank` is that of a change, OFT's size
    of a block and LoKr's rank of the larger factor; `alpha` scales the difference by alpha / rank (0 for the rank
    itself, a scale of 1); `targets` are regular expressions for names of modules (none for the linear layers of all
    blocks, but for those that tell them the time); `conv_rank` above 0 takes their convolutions, too. `text_encoder`
    adapts CLIP's towers as well; `spelling` is whose names the file has, `bits` 16 or 32 what of its numbers."""

    kind: Literal["lora", "dora", "loha", "lokr", "oft"] = "lora"
    rank: int = 16
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    conv_rank: int = 0
    text_encoder: bool = False
    spelling: Spelling = "kohya"
    bits: Literal[16, 32] = 16


class Trainable(nn.Module):
    """The parts of an adapter on one module."""

    owner: Any

    def __init__(self, owner: nn.Module, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        weight = whole_weight(owner)
        rank = config.rank if isinstance(owner, nn.Linear) else config.conv_rank
        self.__dict__["owner"] = owner  # which is not a part of this
        self.kind: Kind = next(kind for kind in kinds.KINDS if kind.title == KINDS[config.kind])
        self.scale = Scale(config.alpha or None)
        self.parts = nn.ParameterDict(beginning(config.kind, weight, rank, generator))
        self.plain = config.kind == "lora" and isinstance(owner, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        """What the module makes of x, changed."""
        owner: Any = self.owner
        if self.plain:
            down, up = self.parts["down"], self.parts["up"]
            low = F.linear(x, down.to(x.dtype))
            return type(owner).forward(owner, x) + self.scale(len(down)) * F.linear(low, up.to(x.dtype))
        weight = whole_weight(owner)
        delta = kinds.difference(self.kind, dict(self.parts), self.scale, {"weight": weight})["weight"]
        changed = (weight.float() + delta).to(weight.dtype)
        if isinstance(owner, nn.Conv2d):
            return owner._conv_forward(x, changed, owner.bias)
        return F.linear(x, changed, owner.bias)


def whole_weight(module: Any) -> Tensor:
    """The weight of a linear layer or a convolution, expanded if it is kept in few bits."""
    quantized = isinstance(module, Linear) and module.code and module.weight is None
    return (module.quantized.whole() if quantized else module.weight).detach()


def beginning(kind: str, weight: Tensor, rank: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Parts whose difference from the weight (o, i, ...) is 0: one factor of each product is, and the others are random
    as those who published the kind have them (LoRA: arXiv:2106.09685, section 4.1; the others as LyCORIS)."""
    out, into, *kernel = weight.shape
    flat = into * math.prod(kernel)

    def uniform(*shape: int) -> Tensor:
        """Kaiming's with a slope of sqrt(5)."""
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return (2 * torch.rand(*shape, generator=generator) - 1) * bound

    def normal(std: float, *shape: int) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    made: dict[str, Tensor]
    if kind in ("lora", "dora"):
        rank = min(rank, out, flat)
        made = {"down": uniform(rank, into, *kernel), "up": torch.zeros(out, rank, *(1 for _ in kernel))}
        if kind == "dora":
            lengths = torch.linalg.vector_norm(weight.float().cpu().flatten(1), dim=1)
            made["dora"] = lengths.reshape(out, *(1 for _ in weight.shape[1:]))
    elif kind == "loha":
        made = {
            "w1_a": normal(0.1, out, rank), "w1_b": normal(1.0, rank, flat),
            "w2_a": torch.zeros(out, rank), "w2_b": normal(1.0, rank, flat),
        }  # fmt: skip
    elif kind == "lokr":
        a, b = factors(out), factors(into)
        made = {"k1": uniform(a, b)}
        rows, columns = out // a, into // b
        if rank < min(rows, columns) / 2 and not kernel:
            made |= {"k2_a": torch.zeros(rows, rank), "k2_b": uniform(rank, columns)}
        else:
            made["k2"] = torch.zeros(rows, columns, *kernel)
    else:
        size = max(n for n in range(1, rank + 1) if out % n == 0)
        made = {"blocks": torch.zeros(out // size, size, size)}
    return {name: nn.Parameter(tensor.to(weight.device)) for name, tensor in made.items()}


def factors(n: int) -> int:
    """The larger of two factors of n that is at most its root: how many times LoKr's small matrix repeats."""
    return max(k for k in range(1, math.isqrt(n) + 1) if n % k == 0)


class Training(nn.Module):
    """All of an adapter in training on a system, on from the beginning; `named` by module."""

    def __init__(self, system: Any, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.__dict__["system"] = system
        self.named = targets(system, config)
        made = {name: Trainable(system.get_submodule(name), config, generator) for name in sorted(self.named)}
        self.parts = nn.ModuleDict({name.replace(".", ":"): part for name, part in made.items()})
        tensors(self)  # whose names are all there
        self.on()

    def __getitem__(self, module: str) -> Trainable:
        found = self.parts[module.replace(".", ":")]
        assert isinstance(found, Trainable)
        return found

    def on(self) -> None:
        """Have the modules compute with it."""
        for name in self.named:
            part = self[name]
            part.owner.forward = part.__call__

    def off(self) -> None:
        for name in self.named:
            del self[name].owner.forward


def check(config: AdapterConfig) -> None:
    """Raises UsageError for what cannot be."""
    if not 1 <= config.rank <= LARGEST_RANK:
        raise UsageError(f"adapter.rank={config.rank}: give 1 to {LARGEST_RANK}")
    if not 0 <= config.conv_rank <= LARGEST_RANK:
        raise UsageError(f"adapter.conv_rank={config.conv_rank}: give 0 to {LARGEST_RANK}")
    if config.spelling == "diffusers" and config.kind not in ("lora", "dora"):
        raise UsageError(f"adapter.spelling=diffusers has no names for {config.kind}: give kohya")


def targets(system: Any, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that are adapted, by name. Raises UsageError where there is none, or a pattern fits none."""
    found: dict[str, nn.Module] = {}
    unused = set(config.targets)
    for name, module in adaptable(system, config.text_encoder).items():
        if isinstance(module, nn.Conv2d) and not config.conv_rank:
            continue
        fitting = {pattern for pattern in config.targets if re.search(pattern, name)}
        unused -= fitting
        if fitting or (not config.targets and not BESIDE_BLOCKS.search(name)):
            found[name] = module
    if unused:
        some = ", ".join(sorted({re.sub(r"\d+", "N", name) for name in adaptable(system, config.text_encoder)})[:12])
        raise UsageError(f"adapter.targets: no module of {system.name} fits {min(unused)!r}; there are {some}, ...")
    if not found:
        raise UsageError(f"{system.name} has no blocks with linear layers to adapt")
    return found


def adaptable(system: Any, text_encoder: bool) -> dict[str, nn.Module]:
    """Linear layers and convolutions in the repeated blocks of the network, and of CLIP."""
    found: dict[str, nn.Module] = {}
    for part in ("network", "text_encoder") if text_encoder else ("network",):
        for name, module in getattr(system, part).named_modules():
            if re.search(r"\.\d+\.", f"{name}.") and isinstance(module, nn.Linear | nn.Conv2d):
                found[f"{part}.{name}"] = module
    return found


# -------------------------------------------------------------------- its file


def tensors(training: Training) -> dict[str, Tensor]:
    """What a file has of an adapter, in the names of its configuration's program. Raises UsageError for a module that
    the program has no name for."""
    config = training.config
    program = PROGRAMS[config.spelling]
    names = written(training.system, program)
    dtype = torch.float16 if config.bits == 16 else torch.float32
    made: dict[str, Tensor] = {}
    for name in training.named:
        if name not in names:
            raise UsageError(
                f"adapter.spelling={config.spelling} has no name for {name} of this model: give another, as kohya"
            )
        part = training[name]
        for row in names[name]:
            values = {key: value.detach() for key, value in part.parts.items()}
            if row.rows is not None:
                values |= {key: values[key][slice(*row.rows)] for key in ("up", "dora") if key in values}
            if row.convolution:
                values |= {key: values[key][..., None, None] for key in ("up", "down") if key in values}
            keys = DIFFUSERS_KEYS if program == DIFFUSERS else KEYS
            if program == DIFFUSERS and "dora" in values:
                values["dora"] = values["dora"].flatten()
            made |= {f"{row.name}.{keys[key]}": value.to("cpu", dtype).clone() for key, value in values.items()}
            if program != DIFFUSERS:
                made[f"{row.name}.alpha"] = torch.tensor(_alpha(part, config), dtype=dtype)
    return made


def _alpha(part: Trainable, config: AdapterConfig) -> float:
    """What a file says, which is the rank where the scale is 1; of OFT how far blocks may turn, 0 for any."""
    if config.kind == "oft" or config.alpha:
        return config.alpha
    rank = next((part.parts[name].shape[axis] for name, axis in part.kind.rank if name in part.parts), 1)
    return float(rank)


def settings(training: Training, made: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file says of itself: the alpha that diffusers' names have no place for."""
    config = training.config
    if config.spelling != "diffusers":
        return {"format": "pt"}
    found: dict[str, Any] = {}
    for key in made:
        if key.endswith("lora_A.weight"):
            prefix, _, path = key.removesuffix(".lora_A.weight").partition(".")
            ranks = found.setdefault(f"{prefix}.rank_pattern", {})
            ranks[path] = len(made[key])
            found.setdefault(f"{prefix}.target_modules", []).append(path)
    for name in [name for name in found if name.endswith(".rank_pattern")]:
        prefix, ranks = name.removesuffix(".rank_pattern"), found[name]
        found[f"{prefix}.r"] = rank = max(ranks.values())
        found[f"{prefix}.lora_alpha"] = config.alpha or rank
        found[f"{prefix}.use_dora"] = config.kind == "dora"
        if not config.alpha:
            found[f"{prefix}.alpha_pattern"] = {path: r for path, r in ranks.items() if r != rank}
        found[name] = {path: r for path, r in ranks.items() if r != rank}
    return {METADATA: json.dumps(found)}  # of several, safetensors would have an order at random


def write(training: Training, path: Path) -> None:
    """Write an adapter's file, whole or not at all. Raises FileProblem."""
    made = tensors(training)
    write_atomically(path, save(made, settings(training, made)))
