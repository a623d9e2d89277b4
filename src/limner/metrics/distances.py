"""Distances between sets of pictures, on features (n, d): how alike two sets are, and whether one copies the other.

Sums run block by block in float64 on the device the features lie on, so 40,000 rows fit anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from limner.metrics.scores import Z95, Figure, bootstrap

BLOCK = 1024


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x.y / d + 1)^3, the kernel of KID (arXiv:1801.01401, section 4): (n, d), (m, d) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor, *, paired: bool = False) -> Figure:
    """Kernel Inception Distance (arXiv:1801.01401): the unbiased squared MMD under the cubic kernel, over all rows.

    `x` (n, d), `y` (m, d). With `paired`, row i of y is made from row i of x (a reconstruction, a drawing of its
    caption): the two are dependent, so the pairs i = i leave the cross term too and pairs are what the interval
    resamples. The 95 % interval is the estimate +- 1.96 standard errors of the delete-one jackknife (pictures; pairs
    if `paired`).
    """
    n, m = len(x), len(y)
    assert min(n, m) >= 3
    assert x.shape[1] == y.shape[1]
    xx, yy = off_diagonal_sums(x), off_diagonal_sums(y)
    xy, yx, diagonal = cross_sums(x, y)
    if paired:
        assert n == m
        rows = (
            xx + yy - (xy - diagonal) - (yx - diagonal)
        )  # sum over j != i of h(i, j), Gretton et al. 2012, equation 4
        value = rows.sum() / (n * (n - 1))
        left_out = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2))
        return jackknifed(value, [left_out])
    sx, sy, sxy = xx.sum(), yy.sum(), xy.sum()
    a, b, c = sx / (n * (n - 1)), sy / (m * (m - 1)), sxy / (n * m)
    without_x = (sx - 2 * xx) / ((n - 1) * (n - 2)) + b - 2 * (sxy - xy) / ((n - 1) * m)
    without_y = a + (sy - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (sxy - yx) / (n * (m - 1))
    return jackknifed(a + b - 2 * c, [without_x, without_y])


def jackknifed(value: Tensor, left_out: list[Tensor]) -> Figure:
    """An estimate with 1.96 jackknife standard errors; `left_out[s]` (n_s,) the estimate without row i of sample s."""
    variance = sum(float((len(e) - 1) / len(e) * (e - e.mean()).square().sum()) for e in left_out)
    half = Z95 * math.sqrt(variance)
    return Figure(float(value), float(value) - half, float(value) + half, min(len(e) for e in left_out))


def blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x), BLOCK):
        yield slice(start, start + BLOCK), x[start : start + BLOCK].double()


def off_diagonal_sums(x: Tensor) -> Tensor:
    """(n,) sums of k(x_i, x_j) over j != i."""
    sums = -(cubic_diagonal(x, x))
    for here, a in blocks(x):
        for _, b in blocks(x):
            sums[here] += cubic_kernel(a, b).sum(1)
    return sums


def cross_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of k(x_i, y_j) over j (n,), over i (m,), and k(x_i, y_i) for the rows that both have."""
    over_y = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    over_x = torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for here, a in blocks(x):
        for there, b in blocks(y):
            kernel = cubic_kernel(a, b)
            over_y[here] += kernel.sum(1)
            over_x[there] += kernel.sum(0)
    both = min(len(x), len(y))
    return over_y, over_x, cubic_diagonal(x[:both], y[:both])


def cubic_diagonal(x: Tensor, y: Tensor) -> Tensor:
    return ((x.double() * y.double()).sum(1) / x.shape[1] + 1) ** 3


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two Gaussians (arXiv:1706.08500, equation 6) fitted to (n, d) and (m, d) features.

    |mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)), sample covariances, float64. With S_x = A^T A and S_y = B^T B
    the trace of the root is the sum of the singular values of A B^T, which is small where there are few rows. Biased
    upwards in small samples: n >= 10 d, or use `kid`.
    """

    def factor(rows: Tensor) -> Tensor:
        rows = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
        return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows

    x, y = x.double(), y.double()
    a, b = factor(x), factor(y)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def precision_recall(real: Tensor, drawn: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991, equations 1 and 2), k-th nearest neighbour balls.

    Precision: the share of `drawn` (m, d) inside a ball around some row of `real` (n, d) that reaches that row's k-th
    nearest other real row; recall: the same with the roles exchanged.
    """
    assert min(len(real), len(drawn)) > k

    def inside(points: Tensor, centres: Tensor) -> float:
        radii = torch.cat([squared_distances(a, centres).kthvalue(k + 1, dim=1).values for _, a in blocks(centres)])
        hits = [(squared_distances(a, centres) <= radii).any(1) for _, a in blocks(points)]
        return float(torch.cat(hits).double().mean())

    return inside(drawn, real), inside(real, drawn)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def nearest(x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `x` (n, d) the cosine distance 1 - cos to the nearest row of `bank` (m, d), and its position."""
    x = torch.nn.functional.normalize(x.float(), dim=1)
    bank = torch.nn.functional.normalize(bank.float(), dim=1)
    best = [(x[start : start + BLOCK] @ bank.T).max(1) for start in range(0, len(x), BLOCK)]
    return 1 - torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def copying(drawn: Tensor, real: Tensor, quantile: float = 0.05) -> tuple[Figure, Figure]:
    """How often drawings come nearer to the training set than held-out real pictures do: (share, ratio).

    `drawn` and `real` (n,) are distances of each prompt's drawing, and of its real picture, to their nearest training
    picture. The threshold is the `quantile` of the real ones; the share of drawings strictly below it, and that share
    over the share of real pictures below it (about `quantile`): 1 means no nearer than unseen pictures are.
    Intervals by bootstrap over prompts, the threshold found anew in each.
    """
    assert drawn.shape == real.shape

    def shares(index: Tensor) -> tuple[float, float]:
        threshold = real[index].double().quantile(quantile)
        return (
            float((drawn[index].double() < threshold).double().mean()),
            float((real[index].double() < threshold).double().mean()),
        )

    def over(index: Tensor) -> float:
        ours, theirs = shares(index)
        return ours / theirs if theirs else (math.inf if ours else 1.0)

    return bootstrap(lambda index: shares(index)[0], len(real)), bootstrap(over, len(real))
