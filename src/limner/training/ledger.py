"""What each step said of itself: means for the log, updates withheld, and when a run must stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import TrainingDiverged
from limner.training.config import TrainConfig
from limner.training.processes import Processes
from limner.training.state import checkpoints

SPIKE = 6.0
"""Standard deviations over the mean from which on a loss is told of."""
MEMORY = 50
"""Steps that mean and deviation look back."""
FIRST = 20
"""Steps that they wait before they tell."""


@dataclass
class Record:
    """What one step said: scalars on the device, and what they were about."""

    step: int
    lr: float
    ids: list[str]
    bad: Tensor
    """1 where the update was withheld."""
    row: Tensor
    """Steps in a row, with this one, whose loss or gradient was not finite."""
    stop: Tensor
    """1 where the run has to end."""
    terms: dict[str, Tensor] = field(default_factory=dict)

    def samples(self) -> str:
        more = f" and {len(self.ids) - 8} more" if len(self.ids) > 8 else ""
        return f"samples {' '.join(self.ids[:8])}{more}"


class Ledger:
    """The steps since the last report. Their numbers stay on the device until somebody looks.

    `kept` is what a checkpoint remembers of them: {"row": steps in a row without an update, "losses": {name: (mean,
    variance, steps seen)}}.
    """

    def __init__(self, config: TrainConfig, kept: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.kept = kept
        kept.setdefault("row", 0)
        kept.setdefault("losses", {})
        self.most = config.max_skips if config.on_nan == "skip" else 0
        self.records: list[Record] = []
        self.looked = 0
        self.no = torch.zeros((), device=device)
        self.before = self.row = self.no + kept["row"]
        self.stop = self.no

    def begin(self, step: int, lr: float, ids: list[str]) -> None:
        self.before = self.row
        self.records.append(Record(step, lr, ids, self.no, self.no, self.stop))

    def add(
        self, terms: dict[str, Tensor], norm: Tensor, phase: str, processes: Processes, scale: Tensor | None = None
    ) -> Tensor:
        """Note a phase's terms; returns 1 where this step's updates must not be made, else 0 (scalar on the device).

        They must not be made where a loss or the gradient's `norm` is not finite, nor ever after too many such steps in
        a row. `scale` is what the loss was multiplied by for float16: too large a gradient at more than 1 is for the
        scaler to mend, and no divergence.
        """
        values = torch.stack([t.detach().float() for t in terms.values()] + [norm.to(terms["loss"].device).float()])
        values = processes.mean(values)
        prefix = f"{phase}/" if phase else ""
        names = [f"{prefix}{name}" for name in [*terms, "grad_norm"]]
        named = dict(zip(names, values.unbind(), strict=True))
        loss = named[f"{prefix}loss"]
        bad = ~torch.isfinite(loss + named[f"{prefix}grad_norm"])
        diverged = bad if scale is None else bad & ~(torch.isfinite(loss) & (scale > 1))
        record = self.records[-1]
        record.terms |= named
        record.row = self.row = torch.maximum(record.row, (self.before + 1) * diverged)
        record.stop = self.stop = torch.maximum(self.stop, (self.row > self.most).float())
        record.bad = torch.maximum(torch.maximum(record.bad, bad.float()), self.stop)
        return record.bad

    def check(self, run: Path, tell: Callable[[str], None]) -> None:
        """Tell of the steps since the last look whose update was withheld, or whose loss leapt. Raises TrainingDiverged
        for the first of too many steps in a row that were not finite."""
        new, self.looked = self.records[self.looked :], len(self.records)
        if not new:
            return
        losses = [name for name in new[0].terms if name.rpartition("/")[2] == "loss"]
        rows = torch.stack([torch.stack([r.bad, r.row, r.stop, *(r.terms[n] for n in losses)]) for r in new]).tolist()
        for record, (bad, row, stop, *values) in zip(new, rows, strict=True):
            self.kept["row"] = int(row)
            if stop:
                raise self.diverged(record, int(row), run)
            if bad:
                told = ", ".join(f"{name}={float(value):.4g}" for name, value in record.terms.items())
                tell(f"step {record.step}: no update, {told}, {record.samples()}")
                continue
            for name, value in zip(losses, values, strict=True):
                if leap := self.leap(name, value):
                    tell(f"step {record.step}: {name} leaps to {value:.4g}, {leap}, {record.samples()}")

    def leap(self, name: str, value: float) -> str:
        """How far this loss lies above those before it, if that is more than `SPIKE`; counts it among them, but never
        as more than that."""
        mean, variance, seen = self.kept["losses"].get(name, (value, 0.0, 0))
        deviation = max(math.sqrt(variance), 1e-3 * abs(mean))
        if not deviation:  # all were 0, as those of a discriminator before its start: they tell nothing of what comes
            seen = 0
        far = seen >= FIRST and value > mean + SPIKE * deviation
        said = f"{(value - mean) / deviation:.0f} deviations over its mean {mean:.4g}" if far else ""
        difference = (mean + SPIKE * deviation if far else value) - mean
        share = max(1 / (seen + 1), 1 / MEMORY)
        variance = (1 - share) * (variance + share * difference**2)
        self.kept["losses"][name] = (mean + share * difference, variance, seen + 1)
        return said

    def diverged(self, record: Record, row: int, run: Path) -> TrainingDiverged:
        terms = ", ".join(f"{name}={float(value):.4g}" for name, value in record.terms.items())
        folder = run / "checkpoints"
        advice = f"the last checkpoint in {folder} is good: start from it with a lower lr (init_from=…)"
        many = f", the last of {row} steps in a row," if row > 1 else ""
        return TrainingDiverged(
            f"step {record.step}{many} diverged: {terms}, lr={record.lr:.3g}, {record.samples()}; its update was not "
            f"made, {advice if checkpoints(folder) else 'no checkpoint was saved yet: lower the lr'}"
        )

    def means(self) -> dict[str, float]:
        """Of each term over the records in which it is finite, and the last learning rate; then starts afresh."""
        names = dict.fromkeys(name for record in self.records for name in record.terms)
        means = {}
        for name in names:
            values = torch.stack([r.terms[name] for r in self.records if name in r.terms])
            value = float(values[torch.isfinite(values)].mean())
            if math.isfinite(value):
                means[name] = value
        if skipped := int(torch.stack([r.bad for r in self.records]).sum()):
            means["skipped"] = skipped
        means["lr"] = self.records[-1].lr
        self.records.clear()
        self.looked = 0
        return means
