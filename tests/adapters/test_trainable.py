"""Adapters in training: they begin as nothing, every part learns, and their file does what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from limner import catalog
from limner.adapters import trainable
from limner.adapters.attaching import stack
from limner.adapters.trainable import AdapterConfig, Training
from limner.errors import UsageError
from systems import flow_models, stable_diffusion


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    paths = {"icons": tiny_model, "sd1": stable_diffusion.sd1(tmp_path_factory.mktemp("sd1"))}
    paths |= {"sdxl": stable_diffusion.sdxl(tmp_path_factory.mktemp("sdxl"))}
    paths |= {"flux": flow_models.flux(tmp_path_factory.mktemp("flux"))}
    paths |= {"sd3": flow_models.sd3(tmp_path_factory.mktemp("sd3"))}
    return {name: catalog.load(path, dtype=torch.float32) for name, path in paths.items()}


def said(system: Any) -> Tensor:
    """What the network says in the loss, whose gradients go where they go."""
    seen: list[Tensor] = []
    hook = system.network.register_forward_hook(lambda module, given, out: seen.append(out))
    torch.manual_seed(0)
    images = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    terms = system.loss({"images": images, "captions": ["a red fox", "a blue square"]}, "main", seeded(2))
    if terms["loss"].requires_grad:
        terms["loss"].backward()
    hook.remove()
    return seen[0].detach()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(system: Any, **told: Any) -> Training:
    return Training(system, AdapterConfig(**{"rank": 3, "bits": 32} | told), seeded(0))


def fill(training: Training) -> None:
    with torch.no_grad():
        for i, part in enumerate(training.parameters()):
            part.add_(0.1 * torch.randn(part.shape, generator=seeded(i)))


SOME = [
    ("icons", "lora", "kohya"), ("sd1", "lora", "kohya"), ("sd1", "dora", "diffusers"), ("sd1", "loha", "kohya"),
    ("sd1", "oft", "kohya"), ("sd1", "lokr", "kohya"), ("sdxl", "lora", "kohya"), ("flux", "lora", "diffusers"),
    ("sd3", "dora", "diffusers"),
]  # fmt: skip
MORE = [
    ("icons", "lokr", "comfyui"), ("sd1", "lora", "comfyui"), ("sd1", "lora", "diffusers"), ("sdxl", "dora", "comfyui"),
    ("sdxl", "lora", "diffusers"), ("flux", "lora", "kohya"), ("flux", "dora", "diffusers"),
    ("flux", "loha", "comfyui"), ("sd3", "lora", "kohya"), ("sd3", "dora", "kohya"), ("sd3", "lora", "diffusers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "spelling"), [*SOME, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)]
)
def test_its_file_does_what_it_did(models, name, kind, spelling, tmp_path):
    system = models[name]
    plain = said(system)
    alpha = 2.0 if kind != "oft" else 0.0
    told = {"conv_rank": 2} if name == "sd1" and kind in ("lora", "loha") and spelling == "kohya" else {}
    training = made(system, kind=kind, spelling=spelling, alpha=alpha, text_encoder=name == "sd1", **told)
    try:
        assert (said(system) - plain).abs().max() <= 1e-5 * plain.abs().max()  # as it begins
        fill(training)
        training.zero_grad()
        trained = said(system)
    finally:
        training.off()
    assert (trained - plain).abs().max() > 1e-2 * plain.abs().max()
    silent = [n for n, p in training.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    trainable.write(training, tmp_path / "mine.safetensors")
    assert torch.equal(said(system), plain)
    report = stack(system).attach(tmp_path / "mine.safetensors")
    try:
        assert report.matched == report.total
        assert (said(system) - trained).abs().max() <= 1e-5 * trained.abs().max()
    finally:
        stack(system).detach()


def test_targets_are_named_by_patterns(models):
    system = models["sd1"]
    training = made(system, targets=("attn1", r"ff\.net\.2"))
    assert training.named
    assert all("attn1" in name or "ff.net.2" in name for name in training.named)
    training.off()
    with pytest.raises(UsageError, match=r"no module of sd1 fits 'attn9'; there are .*network\.down_blocks\.N"):
        made(system, targets=("attn1", "attn9"))
    assert "forward" not in vars(system.network.get_submodule("mid_block.attentions.0.proj_in"))


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"rank": 0}, "adapter.rank=0: give 1 to 4096"),
        ({"conv_rank": 5000}, "adapter.conv_rank=5000"),
        ({"kind": "loha", "spelling": "diffusers"}, "has no names for loha: give kohya"),
    ],
)
def test_what_cannot_be_is_refused(models, told, why):
    with pytest.raises(UsageError, match=why):
        made(models["icons"], **told)


def test_a_file_says_its_alpha(models, tmp_path):
    for spelling, name in (("kohya", "alpha"), ("diffusers", "lora_adapter_metadata")):
        training = made(models["sd1"], spelling=spelling, alpha=5.0)
        trainable.write(training, tmp_path / "mine.safetensors")
        training.off()
        with safe_open(tmp_path / "mine.safetensors", "pt") as file:
            keys, metadata = list(file.keys()), file.metadata()
        assert any(key.endswith(".alpha") for key in keys) == (name == "alpha")
        assert ('"unet.lora_alpha": 5.0' in metadata.get("lora_adapter_metadata", "")) == (name != "alpha")
