import math

import pytest
import torch

from limner.metrics import distances
from limner.metrics.distances import copying, frechet, kid, nearest, precision_recall


def features(n, d=6, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() + shift


def naive_kid(x, y, paired):
    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = [k(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return xx + yy - 2 * sum(cross) / len(cross)


@pytest.mark.parametrize(("n", "m", "paired"), [(7, 9, False), (8, 8, False), (8, 8, True)])
@pytest.mark.parametrize("block", [3, 1024])
def test_kid_and_its_jackknife_match_the_definition(monkeypatch, n, m, paired, block):
    monkeypatch.setattr(distances, "BLOCK", block)
    x, y = features(n), features(m, seed=1, shift=0.3)
    found = kid(x, y, paired=paired)
    assert found.value == pytest.approx(naive_kid(x, y, paired), rel=1e-12)

    def without(z, i):
        return torch.cat([z[:i], z[i + 1 :]])

    if paired:
        samples = [[naive_kid(without(x, i), without(y, i), True) for i in range(n)]]
    else:
        samples = [
            [naive_kid(without(x, i), y, False) for i in range(n)],
            [naive_kid(x, without(y, i), False) for i in range(m)],
        ]
    variance = 0.0
    for left_out in samples:
        average = sum(left_out) / len(left_out)
        variance += (len(left_out) - 1) / len(left_out) * sum((e - average) ** 2 for e in left_out)
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)


def test_kid_of_equal_distributions_is_about_zero_and_of_shifted_ones_is_not():
    same, other = kid(features(600), features(500, seed=1)), kid(features(600), features(500, seed=1, shift=0.5))
    assert same.low < 0 < same.high
    assert other.low > 0.1


def test_paired_kid_is_unbiased_where_the_plain_one_is_not():
    """Copies are of one distribution, so zero; the pairs i = i pull the plain estimate below."""
    x = features(300)
    assert kid(x, x, paired=True).value == pytest.approx(0, abs=1e-12)
    assert kid(x, x).value < -0.01


def test_jackknife_interval_covers_the_truth_about_95_times_in_100():
    truth = kid(features(4000, 3, 98), features(4000, 3, 99, 0.4)).value
    hits = 0
    for s in range(100):
        found = kid(features(150, 3, 2 * s), features(150, 3, 2 * s + 1, 0.4))
        hits += found.low < truth < found.high
    assert 86 <= hits <= 100


def test_frechet_known_answers():
    x = features(5000, 4)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(16, rel=1e-9)  # only the means differ: 4 * 2^2
    assert frechet(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    """The trace of the root from the eigenvalues of the plain product, which is not symmetric."""
    x = features(400, 5) @ features(5, 5, 7)
    y = features(300, 5, 1) @ features(5, 5, 8) + 1
    sx, sy = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(sx @ sy).real.clamp(min=0).sqrt().sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * root
    assert frechet(x, y) == pytest.approx(float(want), rel=1e-8)


def test_precision_and_recall_match_the_definition_and_tell_the_two_apart(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 17)
    real, drawn = features(40, 2), features(30, 2, 1) * 0.3  # all typical, little variety

    def inside(points, centres):
        hits = 0
        for p in points:
            reach = [sorted(float((c - o).norm()) for o in centres)[3] for c in centres]  # [0] is itself
            hits += any(float((p - c).norm()) <= r for c, r in zip(centres, reach, strict=True))
        return hits / len(points)

    precision, recall = precision_recall(real, drawn)
    assert precision == pytest.approx(inside(drawn, real))
    assert recall == pytest.approx(inside(real, drawn))
    assert precision > 0.9 > 0.6 > recall


def test_nearest_finds_a_scaled_copy():
    bank = features(40, 5)
    distance, place = nearest(bank[[7, 31]] * 5, bank)
    assert place.tolist() == [7, 31]
    assert distance.abs().max() < 1e-6
    assert nearest(-bank[:1], bank[:1])[0].item() == pytest.approx(2)


def test_copying_known_answers():
    real = torch.linspace(0.1, 1, 1000)
    share, over = copying(real, real)
    assert share.value == pytest.approx(0.05)
    assert over.value == pytest.approx(1)
    share, over = copying(torch.zeros(1000), real)  # every drawing is a training picture
    assert share.value == 1
    assert over.value == pytest.approx(20)
    assert copying(real + 1, real)[1].value == 0
    tenth = torch.where(torch.arange(1000) % 10 == 0, 0.0, 2.0)  # one in ten is a copy: twice the 5 % of real ones
    _, over = copying(tenth, real)
    assert over.value == pytest.approx(2)
    assert 1.4 < over.low < 2 < over.high < 3
