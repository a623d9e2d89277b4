"""What the loss of diffusion and flows is by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from limner import catalog
from limner.errors import UsageError
from limner.sampling import interpolants, predictions
from limner.sampling.interpolants import EDMConfig, Times, VPConfig
from limner.systems.objectives import Objective, coupled, min_snr

COUNT = 20_000
CPU = torch.device("cpu")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("prediction", "sigma", "by_hand"),
    [
        *(("eps", 0.25, 5 / 16), ("eps", 0.5, 1.0), ("eps", 2.0, 1.0)),  # SNR 16, 4, 1/4
        *(("v", 0.25, 5 / 17), ("v", 2.0, 0.25 / 1.25)),
        *(("x0", 0.25, 5.0), ("x0", 2.0, 0.25)),
    ],
)
def test_min_snr_of_a_variance_preserving_model(prediction, sigma, by_hand):
    weight = min_snr(predictions.get(prediction), 1.0, torch.tensor([sigma]), 5.0)
    assert weight.item() == pytest.approx(by_hand)


@pytest.mark.parametrize(("sigma", "by_hand"), [(0.2, 5 * 0.04), (0.5, 0.25), (0.8, 0.0625 * 0.64), (0.0, 0.0)])
def test_min_snr_of_a_flow(sigma, by_hand):
    weight = min_snr(predictions.get("velocity"), 1 - torch.tensor([sigma]), torch.tensor([sigma]), 5.0)
    assert weight.item() == pytest.approx(by_hand)


def test_an_error_of_x0_counts_min_snr_whatever_is_predicted():
    x0, eps, off = (torch.randn(1, 3, 2, 2, generator=seeded()) for _ in range(3))
    alpha, sigma = torch.full((1, 1, 1, 1), 0.8), torch.full((1, 1, 1, 1), 0.3)
    x = alpha * x0 + sigma * eps
    for name in predictions.PREDICTIONS:
        prediction = predictions.get(name)
        output, target = (prediction.from_x0(y, x, alpha, sigma) for y in (x0 + off, x0))
        loss = Objective(min_snr_gamma=5.0).error(output, target, prediction, alpha, sigma)
        torch.testing.assert_close(loss, 5.0 * off.square().mean())


def test_the_loss_of_an_objective_that_says_nothing_is_what_it_was():
    system = catalog.build(catalog.entry("icons-tiny").config)
    system.caption_dropout = 0.0
    x0 = torch.randn(3, 8, 8, 8, generator=seeded())
    captions = ["red circle", "blue square", ""]
    generator = seeded()
    sigma = torch.randn(3, generator=generator).sigmoid()
    eps = torch.randn(x0.shape, generator=generator)
    level = sigma[:, None, None, None]
    output = system.network((1 - level) * x0 + level * eps, sigma, system.text_encoder.encode(captions))
    found = system.loss({"latents": x0, "captions": captions}, "main", seeded())["loss"]
    assert torch.equal(found, F.mse_loss(output, eps - x0))


def test_what_a_mask_leaves_out_does_not_count():
    output, target = torch.zeros(2, 1, 2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(2, 1, 2, 2)
    mask = torch.ones(2, 1, 4, 4)
    mask[0, :, :, 2:] = 0  # the right half: 2 and 4
    mask[1, :, :2, :2] = 0.5  # a half of the 1
    loss = Objective().error(output, target, predictions.get("eps"), 1.0, torch.ones(2, 1, 1, 1), mask)
    assert loss.item() == pytest.approx(((1 + 9) / 2 + (0.5 + 4 + 9 + 16) / 3.5) / 2)
    nothing = Objective().error(output, target, predictions.get("eps"), 1.0, torch.ones(2, 1, 1, 1), 0 * mask)
    assert nothing == 0


def test_a_system_heeds_the_mask_and_the_objective():
    system = catalog.build(catalog.entry("sd1-tiny").config)
    x0 = torch.randn(2, 8, 8, 8, generator=seeded())
    batch = {"latents": x0, "captions": ["red circle", "blue square"]}
    half = torch.zeros(2, 1, 64, 64)
    half[:, :, :32] = 1

    def loss(objective: Objective = Objective(), **more) -> float:  # noqa: B008
        system.objective = objective
        return float(system.loss({**batch, **more}, "main", seeded())["loss"])

    whole, top, bottom = loss(), loss(mask=half), loss(mask=1 - half)
    assert top != pytest.approx(bottom)
    assert (top + bottom) / 2 == pytest.approx(whole, rel=1e-5)
    others = [{"min_snr_gamma": 1.0}, {"offset_noise": 0.3}, {"times": Times(kind="logit_normal")}]
    assert len({whole, *(loss(Objective(**other)) for other in others)}) == 4


def test_offset_noise_moves_each_channel_as_one():
    x0 = torch.zeros(400, 5, 8, 8)
    means = Objective(offset_noise=0.3).noise(x0, seeded()).mean((2, 3))
    assert means.var().item() == pytest.approx(0.3**2 + 1 / 64, rel=0.1)
    rest = Objective(offset_noise=0.3).noise(x0, seeded()) - means[:, :, None, None]
    assert rest.var().item() == pytest.approx(63 / 64, rel=0.02)
    assert torch.equal(Objective().noise(x0, seeded()), torch.randn(x0.shape, generator=seeded()))


@pytest.mark.parametrize(
    ("times", "quartiles"),
    [
        (Times(), (0.3375, 0.5, 0.6625)),  # of a normal variable, 0.6745 deviations from its mean
        (Times(kind="uniform"), (0.25, 0.5, 0.75)),
        (Times(kind="logit_normal", mean=-0.5, std=2.0), (0.1360, 0.3775, 0.7003)),
        (Times(kind="uniform", shift=3.0), (0.5, 0.75, 0.9)),
        (Times(shift=3.0), (0.6045, 0.75, 0.8549)),
    ],
)
def test_the_times_of_a_flow(times, quartiles):
    t, sigma = interpolants.get("flow").draw(COUNT, seeded(), CPU, times)
    assert torch.equal(t, sigma)
    found = sigma.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert found == pytest.approx(quartiles, abs=0.012)


def test_the_times_of_numbered_timesteps():
    vp = interpolants.get(VPConfig())
    even, _ = vp.draw(COUNT, seeded(), CPU)
    assert torch.equal(even, torch.randint(1000, (COUNT,), generator=seeded()))
    moved, sigma = vp.draw(COUNT, seeded(), CPU, Times(shift=3.0))
    assert moved.float().median().item() == pytest.approx(750, abs=12)
    assert torch.equal(sigma, torch.tensor(vp.sigmas)[moved])
    low, _ = vp.draw(COUNT, seeded(), CPU, Times(kind="logit_normal", mean=-1.0))
    assert low.float().median().item() == pytest.approx(1000 * 0.2689, abs=12)
    last, _ = vp.draw(COUNT, seeded(), CPU, replace(Times(kind="logit_normal"), mean=60.0))
    assert last.max() == 999


def test_times_of_what_has_none_to_choose_are_refused():
    with pytest.raises(UsageError, match="leave times out"):
        interpolants.get(EDMConfig()).draw(2, seeded(), CPU, Times(kind="uniform"))


def test_optimal_transport_pairs_what_is_near_within_a_caption():
    pytest.importorskip("scipy")
    line = torch.randn(40, 1, 1, 1, generator=seeded())
    paired = Objective(coupling="optimal").noise(line, torch.Generator().manual_seed(1))
    assert torch.equal(paired.flatten().argsort(), line.flatten().argsort())  # on a line it is monotone
    x0, captions = torch.randn(12, 3, 2, 2, generator=seeded()), ["a"] * 7 + ["b"] * 4 + ["c"]
    eps = Objective().noise(x0, torch.Generator().manual_seed(1))
    order = coupled(x0, eps, captions)
    with torch.autocast("cpu", torch.bfloat16):  # in which a run draws its noise
        assert torch.equal(coupled(x0, eps, captions), order)
    assert sorted(order[:7].tolist()) == list(range(7))
    assert sorted(order[7:11].tolist()) == list(range(7, 11))
    assert int(order[11]) == 11

    def cost(pairs):
        return float((x0[7:11] - eps[7:][list(pairs)]).square().sum())

    least = min(itertools.permutations(range(4)), key=cost)
    assert tuple((order[7:11] - 7).tolist()) == least


@pytest.mark.parametrize("data", [0.5, 0.84])
def test_edm_learns_at_sigmas_of_its_data(data):
    model = interpolants.get(EDMConfig(data=data))
    _, sigma = model.draw(COUNT, seeded(), CPU)
    log = (sigma * 0.5 / data).log()
    assert (float(log.mean()), float(log.std())) == pytest.approx((-1.2, 1.2), abs=0.03)
