from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from toy import CONFIG, Players, StopAt, ToyBatches, ToySystem, Uneven, ending, fit, save_toy

from limner.errors import TrainingDiverged, UsageError
from limner.sampling.interpolants import Times
from limner.systems.objectives import Objective
from limner.training import loop, state
from limner.training.processes import Processes, StopRequests


def lines(run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(tmp_path):
    assert fit(tmp_path / "run", replace(CONFIG, steps=100, log_every=10, save_every=100)) == 0
    rows = lines(tmp_path / "run")
    assert rows[-1]["error"] < 0.6 * rows[0]["error"]


def test_metrics_tell_what_happened_once_a_step_also_after_a_resume(tmp_path):
    assert fit(tmp_path / "run", stop=StopAt(13)) == 1
    assert fit(tmp_path / "run") == 0
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [5, 10, 13, 15, 20, 25, 30]
    assert [row["images"] for row in rows] == [8 * row["step"] for row in rows]
    for row in rows:
        assert {"loss", "error", "grad_norm", "lr", "images_per_second", "seconds_left", "memory_gb"} < set(row)
        assert row["loss"] > row["error"] > 0
        assert min(row["images_per_second"], row["grad_norm"], row["memory_gb"]) > 0
    assert rows[-1]["seconds_left"] == 0


def test_images_are_those_that_were_seen_also_by_the_averages(tmp_path, monkeypatch):
    decays, true_decay = [], loop.ema_decay
    monkeypatch.setattr(loop, "ema_decay", lambda *told: decays.append(told[1:3]) or true_decay(*told))
    for name, stops in (("whole", (None,)), ("parts", (StopAt(7), StopAt(9), None))):
        for stop in stops:
            fit(tmp_path / name, batches=Uneven(), stop=stop)
    counts = [4 if step % 3 == 1 else 8 for step in range(30)]
    assert decays == [(count, sum(counts[:step])) for step, count in enumerate(counts)] * 2
    for name in ("whole", "parts"):
        assert all(row["images"] == sum(counts[: row["step"]]) for row in lines(tmp_path / name))
    assert ending(tmp_path / "whole") == ending(tmp_path / "parts")


def test_the_state_before_the_bad_step_is_what_remains(tmp_path):
    system = ToySystem()
    reference = ToySystem()
    reference.load_state_dict(system.state_dict())
    with pytest.raises(
        TrainingDiverged, match=r"step 12 diverged: .*error=nan, grad_norm=nan.*samples toy-\d"
    ) as caught:
        fit(tmp_path / "bad", system=system, batches=ToyBatches(poison=12))
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert fit(tmp_path / "good", system=reference, stop=StopAt(12)) == 1
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), reference.parameters(), strict=True))
    assert [p.name for p in state.checkpoints(tmp_path / "bad" / "checkpoints")] == ["step-000005", "step-000010"]


def test_a_gradient_may_diverge_while_the_loss_is_finite(tmp_path):
    class Root(ToySystem):
        def loss(self, batch, phase, generator):
            terms = super().loss(batch, phase, generator)
            return {"loss": terms["loss"] + (0 * self.table.weight[0, 0]).sqrt() ** 1}

    with pytest.raises(TrainingDiverged, match=r"step 0 diverged: loss=\d.*grad_norm=nan"):
        fit(tmp_path / "run", system=Root())


class Poisoned(ToyBatches):
    """NaN at some steps, in what a norm's buffers see too."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def batch(self, step, *args, **kwargs):
        batch = super().batch(step, *args, **kwargs)
        return {**batch, "x": batch["x"] * float("nan")} if step in self.steps else batch


SKIP = replace(CONFIG, on_nan="skip", max_skips=2, ema_warmup=0.0)


def test_a_bad_step_is_skipped_told_and_changes_nothing(tmp_path, capsys, monkeypatch):
    kept = []
    original = state.Ema.update

    def update(self, decay):
        original(self, decay)
        kept.append({name: t.clone() for name, t in state.tensors_of(system).items()})

    monkeypatch.setattr(state.Ema, "update", update)
    system = ToySystem()
    assert fit(tmp_path / "run", SKIP, system=system, batches=Poisoned(12, 13, 20)) == 0
    for step in (12, 13, 20):
        assert all(torch.equal(kept[step][name], kept[step - 1][name]) for name in kept[0])
    assert not torch.equal(kept[14]["table.weight"], kept[13]["table.weight"])
    out = capsys.readouterr().out
    assert [step for step in range(30) if f"step {step}: no update, loss=nan" in out] == [12, 13, 20]
    assert "samples toy-" in out
    rows = lines(tmp_path / "run")
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 2, 0, 1, 0]
    assert all(row["loss"] > 0 for row in rows)


@pytest.mark.parametrize("seen", [1, 5])
def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_last_good_state(tmp_path, monkeypatch, seen):
    """Looked at every step as on a CPU, and every fifth as on a GPU."""
    original = loop.Ledger.check
    monkeypatch.setattr(
        loop.Ledger, "check", lambda self, *told: (self.records[-1].step + 1) % seen or original(self, *told)
    )
    system, reference = ToySystem(), ToySystem()
    reference.load_state_dict(system.state_dict())
    with pytest.raises(TrainingDiverged, match="step 14, the last of 3 steps in a row, diverged: loss=nan"):
        fit(tmp_path / "bad", SKIP, system=system, batches=Poisoned(5, 6, 8, 12, 13, 14))
    monkeypatch.undo()
    fit(tmp_path / "good", SKIP, system=reference, batches=Poisoned(5, 6, 8), stop=StopAt(12))
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), reference.parameters(), strict=True))


def test_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    assert fit(tmp_path / "run", SKIP, batches=Poisoned(12, 13, 14), stop=StopAt(14)) == 1
    with pytest.raises(TrainingDiverged, match="step 14, the last of 3"):
        fit(tmp_path / "run", SKIP, batches=Poisoned(12, 13, 14))


def test_a_loss_that_leaps_is_told_with_its_samples(tmp_path, capsys):
    class Leaping(ToyBatches):
        def batch(self, step, *args, **kwargs):
            batch = super().batch(step, *args, **kwargs)
            return {**batch, "y": batch["y"] * (9 if step in (25, 35) else 1)}

    config = replace(CONFIG, steps=80, log_every=80, save_every=80, lr=1e-4)
    assert fit(tmp_path / "run", config, batches=Leaping()) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "leaps to" in line]
    assert [line.split(",")[0].split()[1] for line in told] == ["25:", "35:"]
    assert re.match(r"step 25: loss leaps to \d+\S*, \d+ deviations over its mean \d\S*, samples toy-\d", told[0])


class Overflowing(ToySystem):
    """At some steps the gradient is too large for float16 while the loss is as ever."""

    def __init__(self, *steps: int, by: float = 1e36) -> None:
        super().__init__()
        self.steps, self.by, self.calls = steps, by, 0

    def loss(self, batch, phase, generator):
        terms = super().loss(batch, phase, generator)
        self.calls += 1
        weight = self.table.weight[0, 0]
        return {
            **terms,
            "loss": terms["loss"] + (self.by * (weight - weight.detach()) if self.calls - 1 in self.steps else 0),
        }


FP16 = replace(CONFIG, precision="fp16")


def test_fp16_halves_its_scale_where_gradients_overflow_and_makes_no_update(tmp_path, monkeypatch, capsys):
    seen, moved = set(), []
    original = loop.step_unless

    def watching(optimizer, lr, bad):
        before = system.table.weight.detach().clone()
        original(optimizer, lr, bad)
        moved.append(not torch.equal(before, system.table.weight))

    class Watching(Overflowing):
        def loss(self, batch, phase, generator):
            seen.add(self.net[0](batch["x"]).dtype)
            return super().loss(batch, phase, generator)

    monkeypatch.setattr(loop, "step_unless", watching)
    system = Watching(12, 20)
    assert fit(tmp_path / "run", FP16, system=system) == 0
    assert seen == {torch.float16}
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    still = [step for step, yes in enumerate(moved) if not yes]
    assert {12, 20} <= set(still)
    assert len(still) <= 4  # the toy's own gradients are large at first
    told = json.loads(ending(tmp_path / "run", FP16)["state.json"])
    assert told["scaler"]["scale"] == 65536 / 2 ** len(still)
    assert told["scaler"]["_growth_tracker"] == 9
    assert "step 12: no update, loss=1." in capsys.readouterr().out


def test_fp16_gradients_that_overflow_at_any_scale_have_diverged(tmp_path):
    system = Overflowing(*range(100), by=3e38)
    with pytest.raises(TrainingDiverged, match=r"step 16 diverged: loss=\d.*grad_norm=inf"):
        fit(tmp_path / "run", replace(FP16, steps=100), system=system)


def test_where_nobody_looks_for_a_while_no_bad_update_is_made(tmp_path, monkeypatch):
    """As on a GPU, whose numbers are read at log time only."""
    original, looked = loop.Ledger.check, []

    def check(self, *told):
        if self.records[-1].step % 5 == 4:
            looked.append(self.records[-1].step)
            original(self, *told)

    monkeypatch.setattr(loop.Ledger, "check", check)
    system, reference = ToySystem(), ToySystem()
    reference.load_state_dict(system.state_dict())
    with pytest.raises(TrainingDiverged, match="step 12 diverged"):
        fit(tmp_path / "bad", system=system, batches=ToyBatches(poison=12))
    assert looked == [4, 9, 14]
    monkeypatch.undo()
    fit(tmp_path / "good", system=reference, stop=StopAt(12))
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), reference.parameters(), strict=True))


def test_each_phase_moves_only_its_own_parameters(tmp_path, monkeypatch):
    system, moved = Players(), []
    original = loop.step_unless

    def watching(optimizer, lr, bad):
        before = {name: p.detach().clone() for name, p in system.named_parameters()}
        original(optimizer, lr, bad)
        moved.append({name.split(".")[0] for name, p in system.named_parameters() if not torch.equal(p, before[name])})

    monkeypatch.setattr(loop, "step_unless", watching)
    assert fit(tmp_path / "run", replace(CONFIG, steps=3), system=system) == 0
    assert moved == [{"generator"}, {"discriminator"}] * 3
    assert {"generator/loss", "discriminator/loss", "generator/grad_norm"} < set(lines(tmp_path / "run")[-1])


def test_a_run_of_two_phases_resumes_exactly(tmp_path):
    start = Players()
    for name, stops in (("whole", []), ("parts", [StopAt(7), StopAt(9)])):
        system = Players()
        system.load_state_dict(start.state_dict())
        for stop in stops:
            assert fit(tmp_path / name, system=system, stop=stop) == 1
            system = Players()
        assert fit(tmp_path / name, system=system) == 0
    final = [state.final_file(tmp_path / name, CONFIG).read_bytes() for name in ("whole", "parts")]
    assert final[0] == final[1]


def test_samples_are_drawn_with_the_averages_and_training_goes_on_as_if_they_were_not(tmp_path):
    drawn = []

    def draw(system: nn.Module, config: Any) -> list[Image.Image]:
        assert not system.training
        torch.rand(10)
        drawn.append(state._pack(state.tensors_of(system)))
        return [Image.new("RGBA", (8, 8))] * len(config.sample_prompts)

    config = replace(CONFIG, sample_every=10, sample_prompts=("a", "b"))
    assert fit(tmp_path / "run", config, draw=draw) == 0
    assert fit(tmp_path / "plain") == 0
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        f"step-{step:06d}.png" for step in (10, 20, 30)
    ]
    final = [state.final_file(tmp_path / name, CONFIG).read_bytes() for name in ("run", "plain")]
    assert final[0] == final[1]
    pictured, exported = safetensors.torch.load(drawn[-1]), safetensors.torch.load(final[0])
    assert all(torch.equal(pictured[name], exported[name]) for name in exported)


def test_a_system_may_finish_with_the_averaged_weights_before_it_is_exported(tmp_path):
    class Finishing(ToySystem):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(()))

        def finish(self, batches: Any) -> None:
            assert len(batches) == 64
            self.total.copy_(self.table.weight.detach().sum())

    assert fit(tmp_path / "run", system=Finishing()) == 0
    final = safetensors.torch.load_file(state.final_file(tmp_path / "run", CONFIG))
    assert final["total"] == final["table.weight"].sum() != 0


def test_the_time_given_ends_the_run_with_a_checkpoint(tmp_path):
    class Slow(ToyBatches):
        def batch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            time.sleep(0.02)
            return super().batch(*args, **kwargs)

    start = time.monotonic()
    config = replace(CONFIG, steps=10_000, save_every=10_000)
    assert fit(tmp_path / "run", config, batches=Slow(), stop=StopRequests(0.3)) == 1
    assert time.monotonic() - start < 5
    assert len(state.checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_bf16_is_for_the_forward_pass_only(tmp_path):
    seen = set()

    class Watching(ToySystem):
        def loss(self, batch, phase, generator):
            seen.add(self.net[0](batch["x"]).dtype)
            return super().loss(batch, phase, generator)

    system = Watching()
    assert fit(tmp_path / "run", replace(CONFIG, precision="bf16", steps=5), system=system) == 0
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in system.parameters()} == {torch.float32}


class Still(ToySystem):
    """Without noise and without a norm over the batch: the loss of a batch is the mean of those of its rows."""

    def __init__(self) -> None:
        super().__init__(noise=0.0)
        self.net[1] = nn.Identity()


@pytest.mark.parametrize("batches", [ToyBatches(), Uneven()])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch, batches):
    norms, start = [], Still()
    original = loop.clip_gradients

    def noting(parameters, longest):
        norms.append([p.grad.clone() for p in parameters])
        return original(parameters, longest)

    monkeypatch.setattr(loop, "clip_gradients", noting)
    for accumulate in (1, 2, 8):
        system = Still()
        system.load_state_dict(start.state_dict())
        config = replace(CONFIG, accumulate=accumulate, steps=2, lr=1e-9)
        assert fit(tmp_path / str(accumulate), config, system=system, batches=batches) == 0
    for step in (0, 1):
        for parts in (2, 4):
            for whole, summed in zip(norms[step], norms[step + parts], strict=True):
                torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-6)
    rows = [lines(tmp_path / str(k))[-1] for k in (1, 2, 8)] if (tmp_path / "1" / "metrics.jsonl").exists() else []
    assert len(rows) == 3
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) == pytest.approx(rows[2]["loss"], rel=1e-5)


def test_each_part_of_a_step_has_noise_of_its_own(tmp_path):
    drawn = []

    class Watching(ToySystem):
        def loss(self, batch, phase, generator):
            drawn.append((len(batch["ids"]), generator.initial_seed(), float(torch.rand(()))))
            return super().loss(batch, phase, generator)

    assert fit(tmp_path / "run", replace(CONFIG, accumulate=4, steps=2), system=Watching()) == 0
    assert [rows for rows, *_ in drawn] == [2] * 8
    assert len({seed for _, seed, _ in drawn}) == len({own for *_, own in drawn}) == 8


def test_a_share_that_cannot_be_cut_evenly_is_refused(tmp_path):
    with pytest.raises(UsageError, match="accumulate=3 does not cut the 8 images of a process into parts of one size"):
        fit(tmp_path / "run", replace(CONFIG, accumulate=3))


def test_a_batch_is_shared_evenly_or_not_at_all(tmp_path):
    with pytest.raises(UsageError, match="batch_size=8 cannot be shared by 3 processes"):
        loop.fit(ToySystem(), ToyBatches(), CONFIG, tmp_path, export=save_toy, processes=Processes(world=3))


def test_randomness_depends_on_seed_step_and_rank_only():
    def drawn(seed: int, step: int, rank: int) -> tuple[float, float]:
        generator = loop.randomness(seed, step, Processes(rank=rank))
        return float(torch.rand((), generator=generator)), float(torch.rand(()))

    assert drawn(0, 0, 0) == drawn(0, 0, 0)
    assert len({drawn(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 0), (0, 1, 1))}) == 6


def test_fields_that_change_nothing_are_told_or_refused():
    told = [
        replace(CONFIG, optimizer="prodigy", lr=0.1),
        replace(CONFIG, optimizer="adafactor", betas=(0.5, 0.5)),
        replace(CONFIG, validate_every=7),
        replace(CONFIG, loss=Objective(times=Times(mean=1.0))),
    ]
    for config, field in zip(told, ("lr=0.1", "betas", "validate_every=7", "loss.times.mean"), strict=True):
        assert [field in note for note in loop.vain(config, CONFIG.data.size)] == [True]
    assert loop.vain(CONFIG, CONFIG.data.size) == []
    with pytest.raises(UsageError, match="is of diffusion and flows"):
        loop.check(replace(CONFIG, loss=Objective(offset_noise=0.1)), 16, 64)


def test_a_loss_that_was_0_until_now_does_not_leap():
    """As that of a discriminator before its first step."""
    ledger = loop.Ledger(CONFIG, {}, torch.device("cpu"))
    assert [ledger.leap("discriminator/loss", 0.0) for _ in range(60)] == [""] * 60
    assert ledger.leap("discriminator/loss", 1.0) == ""
    assert [ledger.leap("discriminator/loss", 1.0 + k % 2 / 10) for k in range(60)] == [""] * 60
    assert "deviations over its mean" in ledger.leap("discriminator/loss", 100.0)
