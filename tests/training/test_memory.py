from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limner import catalog, recipes
from limner.errors import OutOfMemory
from limner.models.dit import DIT_TINY, DiT
from limner.models.flux import FLUX_TINY, Flux
from limner.models.joint_dit import JOINT_DIT_TINY, JointDiT
from limner.models.mmdit import SD3_TINY, MMDiT
from limner.models.unet import UNET_TINY, UNet
from limner.training import memory
from limner.training.memory import kept_by, recompute_blocks, repeated_blocks
from limner.types import Conditioning

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "dit": (lambda: DiT(DIT_TINY), DIT_TINY.channels, 1, 1),
    "joint dit": (lambda: JointDiT(JOINT_DIT_TINY), JOINT_DIT_TINY.channels, JOINT_DIT_TINY.text_width, 384),
    "mmdit": (lambda: MMDiT(SD3_TINY), SD3_TINY.channels, SD3_TINY.text_width, SD3_TINY.pooled_width),
    "flux": (
        lambda: Flux(replace(FLUX_TINY, guidance_embedded=False)),
        FLUX_TINY.in_channels // 4,
        FLUX_TINY.text_width,
        FLUX_TINY.pooled_width,
    ),
    "unet": (lambda: UNet(UNET_TINY), UNET_TINY.in_channels, UNET_TINY.text_width, 1),
}
"""How to build each, and the widths of what it is told: latents, words, their pool."""


class Learner(nn.Module):
    """A network as a system of a fixed loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        build, *self.widths = NETWORKS[name]
        torch.manual_seed(0)
        self.network = build()
        for p in self.network.parameters():
            p.data += 0.02 * torch.randn_like(p)  # what starts at zero would hide what it multiplies

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        channels, text, pooled = self.widths
        x, tokens, pool = torch.randn(2, channels, 8, 8), torch.randn(2, 5, text), torch.randn(2, pooled)
        mask = torch.ones(2, 5, dtype=torch.bool)
        cond = Conditioning(tokens=tokens, mask=mask, pooled=pool, labels=torch.tensor([0, 1]))
        return {"loss": self.network(x, torch.tensor([0.3, 0.7]), cond).square().mean()}


def measured(system: Any) -> tuple[list[Tensor], int]:
    """Gradients, and bytes kept for them."""
    trained = list(system.parameters())
    torch.manual_seed(1)
    found = torch.autograd.grad(system.loss({}, "", torch.Generator())["loss"], trained, allow_unused=True)
    return [g for g in found if g is not None], kept_by(system, {}, "", torch.device("cpu"))


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_computed_again_give_the_same_gradients_and_keep_less(name):
    system = Learner(name)
    names = list(system.state_dict())
    gradients, kept = measured(system)
    assert recompute_blocks(system) > 1
    again, less = measured(system)
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
    assert less < 0.6 * kept
    assert list(system.state_dict()) == names


def test_what_is_computed_again_drops_the_same_values():
    system = nn.ModuleDict({"net": nn.Module()})
    system["net"].blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2))
    assert recompute_blocks(system) == 2
    x = torch.ones(3, 4)
    for block in system["net"].blocks:
        x = block(x)
    (gradient,) = torch.autograd.grad(x.sum(), system["net"].blocks[1][0].bias)
    assert torch.equal(gradient, 2.0 * (x != 0).sum(0))


def test_parts_that_stay_as_they_are_are_not_computed_again_but_where_something_learns_beside_them():
    system: Any = catalog.build(catalog.bare(catalog.entry("sd1-tiny").config))
    learning = set(system.network.modules())
    blocks = set(repeated_blocks(system))
    assert blocks < learning
    assert set(repeated_blocks(system.requires_grad_(False))) == blocks


def test_weights_that_are_cut_need_less_memory(monkeypatch):
    config = recipes.get("icons-tiny")
    with torch.device("meta"):
        count = sum(p.numel() for p in catalog.build(catalog.bare(config.system)).parameters() if p.requires_grad)
    monkeypatch.setattr(memory, "memory_of", lambda device: 8 * count)
    memory.check_parameters(config, torch.device("cpu"), pieces=2)
    with pytest.raises(OutOfMemory, match="make the network smaller"):
        memory.check_parameters(config, torch.device("cpu"))


@pytest.mark.parametrize("name", ["icons-tiny", "kl-f8-tiny"])
def test_what_was_measured_does_not_stay(name):
    """A tensor that its own function keeps would stay, with all before it, until Python looks for circles. The loss of
    the second asks for gradients of its parts."""
    system: Any = catalog.build(catalog.bare(catalog.entry(name).config))
    data = {"latents": torch.randn(2, 8, 4, 4), "images": torch.rand(2, 4, 64, 64)}
    batch = {**data, "captions": ["a", "b"], "ids": ["a", "b"]}
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(one, Tensor) for one in gc.get_objects())
        assert kept_by(system, batch, system.phases[0], torch.device("cpu")) > 0
        assert sum(isinstance(one, Tensor) for one in gc.get_objects()) == before
    finally:
        gc.enable()
