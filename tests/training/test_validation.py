from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from toy import CONFIG, StopAt, ToyBatches, ToySystem, ending, fit

from limner.data.batches import DataConfig, open_batches
from limner.data.shapes import shapes
from limner.errors import UsageError
from limner.training import validation
from limner.training.loop import PhaseLoss
from limner.training.processes import Processes
from limner.training.validation import chance, hold_out, parted, validate

HELD = replace(CONFIG, validation=0.1, validate_every=10, validation_images=20)


def measured(run) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}


def test_a_picture_is_held_out_by_its_id_whatever_else_there_is():
    ids = shapes(8).ids
    learn, held = hold_out(ids, 0.2)
    assert sorted(learn + held) == list(range(len(ids)))
    assert 0.1 < len(held) / len(ids) < 0.3
    again = hold_out(ids[::2], 0.2)[1]
    assert [2 * i for i in again] == [i for i in held if not i % 2]


@pytest.mark.parametrize("source", ["shapes", "folder"])
def test_what_is_held_out_is_not_learned_from(source, tmp_path):
    for i in range(12 if source == "folder" else 0):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    told = {"folder": str(tmp_path)} if source == "folder" else {}
    whole = open_batches(DataConfig(source=source, size=16, **told), 0, torch.device("cpu"))
    ids = [{name for k in range(80) for name in part.batch(k, 16)["ids"]} for part in parted(whole, 0.3)]
    assert ids[0].isdisjoint(ids[1])
    assert ids[1] <= {
        name for name in (whole.set.ids if source == "shapes" else whole.samples.ids) if chance(name) < 0.3
    }
    assert len(ids[0] | ids[1]) > 0.9 * len(whole)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(UsageError, match="give another share"):
        hold_out(shapes(8).ids, share)


def test_it_is_the_mean_over_the_same_pictures_and_noise_every_time_and_without_dropout():
    system = ToySystem().eval()
    seen = []

    class Held(ToyBatches):
        def batch(self, step, size, **kwargs):
            seen.append((step, size))
            return super().batch(step, size, **kwargs)

    first = validate({"main": PhaseLoss(system, "main")}, Held(), HELD, Processes())
    torch.rand(3)
    assert validate({"main": PhaseLoss(system, "main")}, Held(), HELD, Processes()) == first
    assert seen == [(0, 8), (1, 8), (2, 8)] * 2
    assert set(first) == {"validation/loss", "validation/error"}
    by_hand = []
    for k in range(3):
        generator = validation.seeded(HELD.seed, k, 9000)
        by_hand.append(system.loss(ToyBatches().batch(k, 8), "main", generator)["loss"].item())
    assert first["validation/loss"] == pytest.approx(sum(by_hand) / 3)


def test_measuring_changes_nothing_and_a_resumed_run_measures_the_same(tmp_path):
    held = ToyBatches()
    assert fit(tmp_path / "whole", HELD, held=held) == 0
    assert fit(tmp_path / "plain", HELD) == 0
    for stop in (StopAt(10), StopAt(7), None):  # once right where it measures
        fit(tmp_path / "parts", HELD, held=held, stop=stop)
    assert ending(tmp_path / "whole", HELD) == ending(tmp_path / "plain", HELD) == ending(tmp_path / "parts", HELD)
    assert set(measured(tmp_path / "whole")) == {10, 20, 30}
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert len(set(measured(tmp_path / "whole").values())) == 3


def test_the_averaged_weights_are_measured(tmp_path):
    system = ToySystem()
    assert fit(tmp_path / "run", HELD, system=system, held=ToyBatches()) == 0
    own = validate({"main": PhaseLoss(system.eval(), "main")}, ToyBatches(), HELD, Processes())["validation/loss"]
    assert measured(tmp_path / "run")[30] != pytest.approx(own, rel=1e-4)
