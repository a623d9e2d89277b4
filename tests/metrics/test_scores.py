import math

import pytest
import torch

from limner.metrics.scores import alpha_errors, bootstrap, mean, psnr, ratio, squared_errors, wilson


def test_wilson_known_answers():
    half = wilson(50, 100)  # Wilson 1927; 0.4038 and 0.5962 in any table
    assert (half.value, round(half.low, 4), round(half.high, 4), half.n) == (0.5, 0.4038, 0.5962, 100)
    none = wilson(0, 10)
    assert (none.value, none.low, round(none.high, 4)) == (0.0, 0.0, 0.2775)
    assert wilson(10, 10).high == 1.0


def test_mean_interval_known_answer():
    figure = mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert figure.value == 2.5
    assert math.isclose(figure.high - 2.5, 1.959964 * math.sqrt(5 / 3) / 2, rel_tol=1e-5)
    assert mean(torch.tensor([3.0])).high == math.inf


def test_bootstrap_interval_of_a_mean_is_close_to_the_normal_one():
    x = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    ours, normal = bootstrap(lambda i: float(x[i].mean()), len(x)), mean(x)
    assert ours.value == pytest.approx(normal.value)
    assert ours.low == pytest.approx(normal.low, abs=0.02)
    assert ours.high == pytest.approx(normal.high, abs=0.02)


def test_ratio_of_shares():
    ours, theirs = torch.tensor([1, 1, 0, 0] * 50), torch.tensor([1, 1, 1, 1] * 50)
    found = ratio(ours, theirs)
    assert found.value == 0.5
    assert 0.4 < found.low < 0.46 < 0.54 < found.high < 0.6
    assert ratio(ours, theirs * 0).value == math.inf


def test_psnr_on_white_known_answers():
    black = torch.full((1, 4, 8, 8), -1.0)
    black[:, 3] = 1  # opaque
    clear = torch.full((1, 4, 8, 8), -1.0)  # transparent: white on white
    white = torch.ones(1, 4, 8, 8)
    assert squared_errors(black, white).tolist() == [1.0]
    assert squared_errors(clear, white).tolist() == [0.0]
    assert psnr(squared_errors(black, clear)).tolist() == [0.0]
    assert psnr(torch.tensor([0.01, 0.0])).tolist() == [pytest.approx(20.0), 100.0]
    assert psnr(torch.tensor([0.1, 0.001])).mean() == pytest.approx(20.0)  # not psnr(mean) = 12.97


def test_alpha_error_known_answer():
    a, b = torch.full((2, 4, 4, 4), -1.0), torch.full((2, 4, 4, 4), -1.0)
    b[0, 3, :2] = 1  # half of the places from 0 to 1
    b[1, :3] = 1  # colour alone is no error of alpha
    assert alpha_errors(a, b).tolist() == [0.5, 0.0]
