"""A linear layer that is quick on CPUs of any make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """torch's, except that float32 without gradients on a CPU goes through oneDNN: torch would ask MKL, which does not
    use AVX-512 on AMD's processors and is half as fast there."""

    _pack: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        single = x.dtype == self.weight.dtype == torch.float32
        here = x.device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()
        if torch.is_grad_enabled() or not single or not here:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed(), self.bias, "none", [], "")

    def _packed(self) -> Tensor:
        """The weight in oneDNN's own order, kept until the weight changes: else oneDNN reorders it in every product,
        for 7 % of the time. What comes out is the same to the bit."""
        weight = self.weight
        if weight.is_inference():  # no version tells when such a tensor changes
            return weight
        if self._pack is None or self._pack[0].data_ptr() != weight.data_ptr() or self._pack[1] != weight._version:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self._pack = (weight.detach(), weight._version, packed)  # held, so that its address is not used again
        return self._pack[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pack": None}  # oneDNN's tensors cannot be copied
