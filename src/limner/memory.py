"""What a drawing takes of a device's memory, found without drawing: the system runs on tensors that hold no data.

Every tensor that a stage makes is counted while it lives, and so are the weights at work. Attention counts as its
result, for fused kernels keep no more; what kernels take beside is not known, and `SLACK` stands for it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limner.devices import bytes_of, free_of
from limner.systems.diffusion import PARTS, DiffusionSystem
from limner.types import Request, System

SLACK = 1.15
CONVOLVING = 1.6
"""In place of it for an autoencoder on a GPU: cuDNN copies what a convolution in float32 reads and writes (measured on
an H200: 1.59 for Stable Diffusion 1's decoder at 512 and at 1024 px)."""
LIBRARIES = 64_000_000
"""Bytes that cuBLAS, cuDNN and the rounding of the allocator take on a GPU besides."""
ROUGH = 12_288
"""More bytes a pixel than drawings here take beside weights, recordings of steps among them."""
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stage:
    """Of a drawing: the parts of the system at work, and the bytes of all that is made in it at its height."""

    name: str
    parts: tuple[str, ...]
    made: int


@dataclass(frozen=True)
class Plan:
    """Bytes of the weights of every part, and the stages of a drawing. `passing` are bytes of a part that are not there
    with the rest of it where parts take turns, for a drawing asks them once."""

    weights: Mapping[str, int]
    stages: tuple[Stage, ...]
    passing: Mapping[str, int] = field(default_factory=dict)

    def peak(self, offload: bool, recorded: bool = False) -> tuple[int, Stage]:
        """Bytes at the height of the drawing, and its stage then; with `offload` only parts at work are there, and a
        step that is `recorded` (see `limner.nn.graphs`) keeps what it made."""
        kept = {s.name: s.made for s in self.stages if recorded and s.parts[0] in ("network", "refiner")}
        rows = []
        for stage in self.stages:
            if offload:
                weights = sum(self.weights[part] - self.passing.get(part, 0) for part in stage.parts)
            else:
                weights = sum(self.weights.values())
            others = sum(made for name, made in kept.items() if name != stage.name)
            rows.append((weights + stage.made + others, stage))
        return max(rows, key=lambda row: row[0])


@dataclass(frozen=True)
class Room:
    """Bytes on a device for weights and all that a drawing makes, and whether they are more than enough by far."""

    free: float
    ample: bool


def plan(system: System, request: Request, count: int) -> Plan:
    """What drawing `count` pictures at once takes; `request` is of the size that they have in the end."""
    ghost: Any = without_data(system)
    size = (ghost.autoencoder.channels, request.height // ghost.grid, request.width // ghost.grid)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(count, *shape, device="meta")

    gpu = system.device.type == "cuda"

    def stage(name: str, parts: tuple[str, ...], call: Callable[[], Any]) -> Stage:
        slack = CONVOLVING if gpu and parts == ("autoencoder",) else SLACK
        return Stage(name, parts, made_by(call, slack) + LIBRARIES * gpu)

    decoding = stage("the decoding", ("autoencoder",), lambda: ghost.decode(noise(size), request.vae_tile))
    if not isinstance(system, DiffusionSystem):
        found = (
            [stage("a step", ("network",), lambda: ghost.network(noise(size)))] if hasattr(system, "network") else []
        )
        return Plan(weights_of(system, request), (*found, decoding))
    others = joined(system)
    ghost.__dict__ |= {name: without_data(other) for name, other in others.items()}
    if (classifier := system.classifier) is not None:
        ghost.__dict__["classifier"] = without_data(classifier)
    controls = [f"control {k}" for k, _ in enumerate(request.control, 1)]
    plain: dict[str, Any] = {"start": 0.0, "end": 1.0, "maker": "", "finder": None}
    told = tuple(replace(one, network=ghost_of(one.network), **plain) for one in request.control)
    behind = tuple(
        replace(one, words=one.words.to("meta"), nothing=one.nothing.to("meta"))
        for one in request.ip_adapter
        if one.behind and one.weight
    )
    request = replace(request, control=told, ip_adapter=behind, compat="", hires=1.0, on_step=_enough)
    prompts = [*request.prompts, *[request.prompt] * count][:count]
    negatives = [*request.negatives, *[request.negative] * count][:count]
    cond = ghost.condition(prompts, request, negatives)
    begun: dict[str, Tensor] = {}

    def step() -> None:
        with suppress(_Enough):
            ghost.sample(cond, request, noise, **begun)

    stages = [stage("the words", ("text_encoder",), lambda: cond[0][1]())]
    if request.image is not None or ghost.beside:
        give = lambda: begun.update(ghost.given(request, count))  # noqa: E731
        stages.append(stage("the picture given", ("autoencoder",), give))
    guide = ("guide",) if "guide" in others else ()
    if any(getattr(one.network, "sees", "pixels") != "pixels" for one in told):
        shown: list[Tensor] = []
        look = lambda: shown.extend(ghost.shown(one, request) for one in told if one.weight)  # noqa: E731
        stages.append(stage("the pictures of controls", ("autoencoder",), look))
        ghost.__dict__["shown"] = lambda *_: shown.pop(0)  # and not again in a step
    leads = ("classifier",) if classifier is not None else ()
    stages.append(stage("a step", ("network", *guide, *leads, *controls), step))
    if "refiner" in others:
        stages.append(Stage("a step of the refiner", ("refiner",), stages[-1].made))
    return Plan(weights_of(system, request), (*stages, decoding), passing_of(system))


def joined(system: DiffusionSystem) -> dict[str, DiffusionSystem]:
    """The systems that draw with this one, by what they are to it."""
    return {name: other for name in ("refiner", "guide") if (other := getattr(system, name)) is not None}


def weights_of(system: Any, request: Request) -> dict[str, int]:
    """Bytes of the weights of every part of a drawing."""
    if not isinstance(system, DiffusionSystem):
        return {part: bytes_of(getattr(system, part)) for part in PARTS if hasattr(system, part)}
    parts = {part: getattr(system, part) for part in PARTS} | joined(system)
    parts |= {} if system.classifier is None else {"classifier": system.classifier}
    parts |= {f"control {k}": one.network for k, one in enumerate(request.control, 1)}
    return {name: bytes_of(part) for name, part in parts.items()}


def passing_of(system: DiffusionSystem) -> dict[str, int]:
    """Of parts that have what a drawing asks but once, its bytes; all but the largest, which is there alone."""
    found = {}
    for part in PARTS:
        if hasattr(module := getattr(system, part), "asked_once") and (
            sizes := [bytes_of(m) for m in module.asked_once()]
        ):
            found[part] = sum(sizes) - max(sizes)
    return found


def room(system: Any, request: Request, count: int) -> Room:
    """What there is for a drawing of `count` pictures at once."""
    weights, device = sum(weights_of(system, request).values()), system.device
    if device.type != "cuda":
        return Room(free_of(device), ample=False)
    free = free_of(device) + (0 if system.works_on else weights)
    records = isinstance(system, DiffusionSystem) and not system.works_on
    return Room(free, records and weights + ROUGH * request.width * request.height * count < free)


def settle(system: System, request: Request, count: int) -> str:
    """Have the parts of a system take turns on its GPU where a drawing would not fit otherwise, or its steps recorded
    where there is room for that too. Returns what takes turns and why, "" for nothing."""
    if not isinstance(system, DiffusionSystem) or system.device.type != "cuda":
        return ""
    there = room(system, request, count)
    for one in (system, *joined(system).values()):
        one.graphs.on = there.ample
        if not there.ample:
            one.graphs.clear()
    if there.ample or system.stays or system.works_on:
        return ""
    found = plan(system, request, count)
    if not takes_turns(system, found, there.free):
        return ""
    system.offload()
    return offloading(found, there.free, system.device)


def takes_turns(system: Any, found: Plan, free: float) -> bool:
    """Whether the parts of a system are on the CPU, or must be, while they are not at work on a device with so many
    bytes for it."""
    return bool(system.works_on) or (not system.stays and found.peak(False)[0] > free)


def offloading(found: Plan, free: float, device: torch.device) -> str:
    """Why parts take turns, in a sentence."""
    whole, (turns, stage) = found.peak(False)[0], found.peak(True)
    return (
        f"all parts at once take {whole / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}: they take turns "
        f"there, which takes {turns / 1e9:.1f} GB, most in {stage.name}"
        + ("" if turns <= free else ", and may not fit either")
    )


def made_by(call: Callable[[], Any], slack: float = SLACK) -> int:
    """Bytes of the tensors that a call makes, at its height, and what kernels take beside."""
    count = _Count()
    with torch.inference_mode(False), torch.no_grad(), count, _FusedAttention():
        kept = call()
    del kept
    return round(slack * count.most)


def without_data(system: System) -> System:
    """A system alike whose weights hold no data."""
    ghost: Any = copy.copy(system)
    ghost.__dict__ = dict(system.__dict__)
    ghost.works_on = None
    ghost._modules = {name: ghost_of(module) for name, module in ghost._modules.items()}
    return ghost


def ghost_of(module: M) -> M:
    """A module alike whose weights hold no data; what else it has is shared."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            of_modules = isinstance(value, list) and all(isinstance(one, nn.Module) for one in value)
            if not isinstance(value, dict | nn.Module) and not of_modules:
                memo[id(value)] = value
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)


class _Enough(Exception):
    pass


def _enough(done: int, total: int, preview: Any = None) -> None:
    raise _Enough


class _Count(TorchDispatchMode):
    """Counts the bytes of the tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:  # a view of a weight is no news
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention makes its result only, as fused kernels do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
