"""There and back: the loss of a part of a step and its gradient, which a GPU does again as it did them once.

A small batch leaves a fast GPU waiting for the host, which asks for some thousand kernels one by one. Recorded as a
CUDA graph they start together. What is random, and what is made of words, is made anew outside of it and put where the
recording reads it: a system that can be recorded tells them apart, as `examples` and `error`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limner.nn.graphs import Graphs, Leaves, is_tensor
from limner.training.config import TrainConfig
from limner.training.memory import autocast
from limner.training.processes import Processes
from limner.training.state import TrainState
from limner.types import Conditioning

MOST = 64
"""Recordings that are kept: each shape of latents and each length of words has its own. They share their memory."""


class Passes:
    """Forward and backward passes of a system's `losses`, by phase."""

    def __init__(
        self, system: Any, losses: Mapping[str, nn.Module], state: TrainState, config: TrainConfig, processes: Processes
    ) -> None:
        self.system, self.losses, self.state, self.config, self.device = system, losses, state, config, processes.device
        self.records = (
            config.cuda_graphs
            and processes.device.type == "cuda"
            and processes.world == 1
            and len(losses) == 1
            and getattr(system, "recordable", False)
            and not (config.compile or config.gradient_checkpointing)
        )
        self.forget()

    def forget(self) -> None:
        """All recordings, and where they read and write."""
        self.graphs = Graphs()
        self.made: dict[Any, tuple[Leaves, Any, dict[str, Tensor], Any]] = {}
        self.once: set[Any] = set()
        self.first: Any = None
        """The kind of what one recording was made of that puts gradients where they were not; others add to them."""
        self.grads: list[Tensor | None] = []
        self.weights: tuple[int, ...] = ()

    def begin(self, phase: str) -> None:
        """Forget the gradients of the step before."""
        parameters = self.state.parameters[phase]
        if self.records:
            read = (*parameters, *self.system.network.parameters(), *self.system.network.buffers())
            weights = tuple(tensor.data_ptr() for tensor in read)
            if weights != self.weights:  # a recording reads them where they were
                self.forget()
                self.weights = weights
        self.empty = True
        grads = self.grads if self.records and self.grads else [None] * len(parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad

    def __call__(
        self, phase: str, part: dict[str, Any], generator: torch.Generator, weight: float
    ) -> dict[str, Tensor]:
        """The named losses of `part`, scalars without a gradient; adds `weight` times the gradient of "loss" to those
        of the phase's parameters."""
        if not self.records:
            return self.back(lambda: self.losses[phase](part, generator), weight)
        with autocast(self.config, self.device):
            examples: dict[str, Any] = self.system.examples(part, generator)
        told = Leaves({**examples, "cond": examples["cond"].tensors()})
        if any(is_tensor(value) and value.requires_grad for value in told.values):  # the words learn, too
            self.records = False
            return self.back(lambda: self.system.error(examples), weight)
        return self.again(self.state.parameters[phase], told, weight)

    def back(self, loss: Callable[[], dict[str, Tensor]], weight: float) -> dict[str, Tensor]:
        with autocast(self.config, self.device):
            found = loss()
        self.state.scaler.scale(weight * found["loss"]).backward()
        return {name: value.detach() for name, value in found.items()}

    def again(self, parameters: list[nn.Parameter], told: Leaves, weight: float) -> dict[str, Tensor]:
        """By a recording, which is made when the same is asked the second time: kernels are chosen and loaded in the
        first, which cannot be recorded."""
        kind = (weight, str(told.kind))
        fresh = self.empty and self.first in (None, kind)
        if self.empty and not fresh:
            torch._foreach_zero_([grad for grad in self.grads if grad is not None])
        self.empty = False
        key = (*kind, fresh)
        if key not in self.made and (key not in self.once or not (fresh or self.grads)):
            self.once.add(key)
            return self.back(lambda: self.error(told), weight)
        if key not in self.made:
            while len(self.made) >= MOST:  # that which was not asked for longest
                self.made.pop(next(name for name in self.made if not name[-1]))
            if problem := self.record(key, told, parameters):
                warnings.warn(f"passes are not recorded from here on (cuda_graphs): {problem}", stacklevel=2)
                self.records = False
                for parameter in parameters:  # out of the memory that recordings share
                    parameter.grad = None if fresh or parameter.grad is None else parameter.grad.clone()
                self.forget()
                return self.back(lambda: self.error(told), weight)
        self.made[key] = own, graph, found, _ = self.made.pop(key)
        own.put(told)
        graph.replay()
        return {name: value.clone() for name, value in found.items()}

    def record(self, key: Any, told: Leaves, parameters: list[nn.Parameter]) -> str:
        """Make a recording; returns why there is none: what asks the host something cannot be recorded, and there may
        be no room."""
        own = told.own()
        torch.cuda.empty_cache()  # what the same took without a recording
        try:
            graph, found = self.graphs.graph_of(lambda: self.back(lambda: self.error(own), key[0]), self.device)
        except RuntimeError as error:
            return str(error)
        modules = {*self.system.modules(), *self.system.network.modules()}
        held = [dict(module.tables) for module in modules if hasattr(module, "tables")]  # which it reads
        self.made[key] = own, graph, found, held
        if key[-1]:
            self.first, self.grads = key[:-1], [p.grad for p in parameters]
        return ""

    def error(self, told: Leaves) -> dict[str, Tensor]:
        examples = told.tree()
        return self.system.error({**examples, "cond": Conditioning(**examples["cond"])})
