"""Flows that are there made straighter by their own pairs, and taught to draw in one step (arXiv:2209.03003)."""

from __future__ import annotations

from dataclasses import replace

from limner.data.batches import DataConfig
from limner.recipes.pixels import flow_matching, small
from limner.systems.objectives import Objective
from limner.training.config import TrainConfig
from limner.training.reflowing import ReflowConfig


def reflow() -> TrainConfig:
    """A straighter flow of a run of `flow-matching` or `sit-32`, and again of a run of this: give --model. Of other
    data or words, too, with --data."""
    return replace(
        flow_matching(),
        name="reflow",
        system=None,
        reflow=ReflowConfig(),
        data=DataConfig(source="icons", size=0, caption_from="style", even=True),
        steps=2_000,
        lr=2e-4,
        warmup=100,
        ema_half_life=50_000,
        save_every=1_000,
        sample_every=1_000,
    )


def one_step() -> TrainConfig:
    """One step in place of all of a flow: give --model, a run of `reflow`."""
    return replace(reflow(), name="one-step", loss=Objective(), reflow=ReflowConfig(one_step=True))


def _tiny(full: TrainConfig, one_step: bool) -> TrainConfig:
    return replace(
        small(full),
        reflow=ReflowConfig(pairs=500, steps=8, one_step=one_step),
        data=DataConfig(source="shapes", size=0),
        steps=300,
        lr=5e-4,
        ema_half_life=1_000,
    )


def reflow_tiny() -> TrainConfig:
    """The same of a run of `flow-matching-tiny` or `sit-32-tiny`: give --model."""
    return _tiny(reflow(), one_step=False)


def one_step_tiny() -> TrainConfig:
    """The same of a run of `reflow-tiny`: give --model."""
    return _tiny(one_step(), one_step=True)
