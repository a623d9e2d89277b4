"""Evaluations of a network that a GPU does again as it did them once, by CUDA graphs.

A small network on a fast GPU waits for the host, which asks for some thousand kernels one by one: recorded, they start
together. A recording reads its inputs and what was made of the words at addresses of its own, where each evaluation
puts what it is about; so it serves other prompts and other drawings too, as long as the shapes and the weights are the
same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from limner.types import Conditioning

MOST = 4
"""Recordings that are kept."""
RECORDING = RLock()
"""A process records one graph at a time."""


@dataclass
class Recording:
    """What a graph was recorded of, and the tensors that it reads and writes. `cond` is whose words it holds. Neither
    that nor the network is kept alive by it."""

    network: weakref.ref[nn.Module]
    weights: tuple[Any, ...]
    inputs: Leaves
    words: Leaves
    output: Any
    graph: Any
    held: Any
    """Tables that the network keeps for itself, which the graph reads."""
    cond: weakref.ref[Conditioning]

    def replay(self, inputs: Leaves) -> Any:
        self.inputs.put(inputs)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.output)


class Leaves:
    """The tensors, and what else there is, in lists, tuples and dictionaries."""

    def __init__(self, tree: Any) -> None:
        self.values, self.spec = tree_flatten(tree)
        self.kind = (self.spec, [(x.shape, x.stride(), x.dtype) if is_tensor(x) else x for x in self.values])
        """What a recording depends on beside the numbers in tensors."""

    def tree(self) -> Any:
        return tree_unflatten(self.values, self.spec)

    def own(self) -> Leaves:
        """The same in tensors of their own, for whatever is of this kind."""
        mine = Leaves(tree_map_only(Tensor, lambda x: torch.empty_like(x).copy_(x), self.tree()))
        mine.kind = self.kind
        return mine

    def put(self, new: Leaves) -> None:
        for mine, value in zip(self.values, new.values, strict=True):
            if is_tensor(mine):
                mine.copy_(value)


class Graphs:
    """Evaluates networks: `graphs(network, x, t, cond, ...)` is `network(x, t, cond, ...)`, which on a GPU, without
    gradients and while `on`, is recorded when it is asked the second time and replayed from then on."""

    on = False
    devices: tuple[str, ...] = ("cuda",)

    def __init__(self) -> None:
        self.made: list[Recording] = []
        self.once: list[Any] = []
        """What was asked once, the newest last."""
        self.pool: Any = None
        self.lock = RLock()

    def clear(self) -> None:
        """Give back the memory of all recordings."""
        with self.lock:
            self.made, self.once, self.pool = [], [], None

    def __call__(self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, *more: Any) -> Any:
        if not self.on or x.device.type not in self.devices or cond.kept is None or torch.is_grad_enabled():
            return network(x, t, cond, *more)
        with self.lock:
            try:
                return self.evaluate(network, x, t, cond, *more)
            except torch.OutOfMemoryError:  # for a recording, perhaps, and not without
                self.clear()
                self.on = False
                return network(x, t, cond, *more)

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, *more: Any) -> Any:
        inputs = Leaves((x, t, more))
        mine = [made for made in self.made if made.network() is network and made.inputs.kind == inputs.kind]
        for made in mine:
            if made.cond() is cond:
                return made.replay(inputs)
        words = Leaves((cond.tensors(), told(network, cond)))
        # an address alone may be that of one freed, which had another shape
        weights = tuple((w.data_ptr(), w.shape, w.dtype) for w in (*network.parameters(), *network.buffers()))
        for made in mine:
            if made.weights == weights and made.words.kind == words.kind:
                made.words.put(words)
                made.cond = weakref.ref(cond)
                return made.replay(inputs)
        asked = (weakref.ref(network), weights, inputs.kind, words.kind)
        if asked not in self.once:  # kernels are chosen and loaded, which cannot be recorded
            self.once = [*self.once[1 - MOST :], asked]
            return network(x, t, cond, *more)
        others = [made for made in self.made if made.network() is not network and made.network() is not None]
        mine = [made for made in self.made if made.network() is network and made.weights == weights]
        self.made = [*others, *mine][1 - MOST :]
        self.made.append(self.record(network, weights, inputs, words, cond))
        return self.made[-1].replay(inputs)

    def record(
        self, network: nn.Module, weights: tuple[Any, ...], inputs: Leaves, words: Leaves, cond: Conditioning
    ) -> Recording:
        with torch.inference_mode(False), torch.no_grad():
            inputs, words = inputs.own(), words.own()
            (x, t, more), (tensors, kept) = inputs.tree(), words.tree()
            modules = list(network.modules())
            said = Conditioning(**tensors, kept={modules[place]: value for place, value in kept.items()})
            graph, output = self.graph_of(lambda: network(x, t, said, *more), x.device)
        held = dict(getattr(network, "tables", {}))
        return Recording(weakref.ref(network), weights, inputs, words, output, graph, held, weakref.ref(cond))

    def graph_of(self, call: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
        """A graph of what a call does, and what each replay of it overwrites with what the call would give."""
        with RECORDING, torch.cuda.device(device):
            graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
            # of this device: torch's own stream for graphs stays on the one that it was first asked on
            stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                    output = call()
            finally:  # a recording that failed leaves its stream on
                torch.cuda.set_stream(before)
        return graph, output


BLOCKS = ("blocks", "double_blocks", "single_blocks", "joint_blocks")
"""What transformers call their layers."""


def compile_blocks(network: nn.Module, **how: Any) -> None:
    """Have torch compile each layer of a transformer, which takes seconds as they are alike, or all of another
    network."""
    layers = [block for name in BLOCKS for block in getattr(network, name, ())]
    for module in layers or [network]:
        module.compile(**how)


def told(network: Any, cond: Conditioning) -> dict[int, Any]:
    """What a network keeps of `cond`, by the place of the module."""
    if hasattr(network, "tell"):
        network.tell(cond)
    assert cond.kept is not None
    return {place: cond.kept[module] for place, module in enumerate(network.modules()) if module in cond.kept}


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
