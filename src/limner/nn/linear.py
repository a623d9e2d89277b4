"""A linear layer that is quick on CPUs of any make, and may keep its matrix in few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.nn.quantized import Quantized

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """torch's, except that float32 without gradients on a CPU goes through oneDNN: torch would ask MKL, which does not
    use AVX-512 on AMD's processors and is half as fast there.

    One that was told to `keep` a quantised matrix has that in place of `weight`, which is None, and expands it at every
    product. A weight that is put there after all comes first; taken away, it leaves the quantised one. What an adapter
    of low rank adds to it stands `beside`, so that the matrix stays in few bits.
    """

    code = ""
    """What its matrix is kept in (see `limner.nn.quantized`), "" for a plain `weight`."""
    down: Tensor | None
    up: Tensor | None
    codes: Tensor
    scale_bits: Tensor | None
    table: Tensor | None

    def keep(self, q: Quantized) -> None:
        """Take a quantised matrix (out, in) for the weight."""
        assert q.shape == (self.out_features, self.in_features), "a matrix of another shape"
        assert q.in_rows, "codes that are not in its rows"
        self.weight = None  # type: ignore[assignment]
        self.code = q.code
        # float32 as whole numbers, and so are all codes: `module.to(dtype)` leaves those as they are
        bits = None if q.scales is None else q.scales.contiguous().view(torch.int32)
        table = None if q.table is None else q.table.view(torch.int32)
        for name, tensor in (("codes", q.codes), ("scale_bits", bits), ("table", table)):
            self.register_buffer(name, tensor, persistent=False)
        self.beside(None, None)

    def beside(self, up: Tensor | None, down: Tensor | None) -> None:
        """Add up (out, rank) times down (rank, in) to the quantised matrix, or None for nothing more."""
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)

    @property
    def quantized(self) -> Quantized:
        """The matrix that it was told to keep."""
        scales, table = (None if t is None else t.view(torch.float32) for t in (self.scale_bits, self.table))
        return Quantized(self.code, self.codes, scales, table, torch.Size((self.out_features, self.in_features)))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is None:
            made = self.product(x, self.quantized.whole(x.dtype))
            return made if self.up is None or self.down is None else made + F.linear(F.linear(x, self.down), self.up)
        return self.product(x, weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x times a weight, and the bias."""
        single = x.dtype == weight.dtype == torch.float32
        compiled = torch.compiler.is_compiling()  # which chooses itself
        if compiled or not single or torch.is_grad_enabled() or x.device.type != "cpu" or not HAS_ONEDNN:
            return F.linear(x, weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
