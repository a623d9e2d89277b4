"""ControlNets of FLUX.1 against diffusers', with every parameter filled with noise."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_flux

from limner.checkpoints.flux import controlnet_config_of, controlnet_layout
from limner.checkpoints.layouts import read, write
from limner.errors import CheckpointMismatch
from limner.models import flux
from limner.models.flux import Flux, FluxConfig
from limner.models.flux_controlnet import FluxControlNet
from models.test_flux import _DEV, SCALES, SIZE, difference, fill, inputs, packed, turned

CONFIGS = {  # and the number of kinds
    "of one kind": (replace(_DEV, depth=2, depth_single=0), 0),
    "union": (replace(_DEV, depth=1, depth_single=2), 4),
    "union, of schnell": (replace(_DEV, depth=2, depth_single=1, guidance_embedded=False), 7),
}


@pytest.fixture(autouse=True)
def in_its_own_precision(monkeypatch):
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", turned)


def reference(config: FluxConfig, num_kinds: int) -> diffusers.FluxControlNetModel:
    return diffusers.FluxControlNetModel(
        in_channels=config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single,
        attention_head_dim=config.width // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_width,
        pooled_projection_dim=config.pooled_width,
        guidance_embeds=config.guidance_embedded,
        axes_dims_rope=list(config.axes),
        num_mode=num_kinds or None,
    )


def pair(config, num_kinds, dtype):
    ours, theirs = FluxControlNet(config, num_kinds).to(dtype), reference(config, num_kinds).to(dtype)
    values = fill(ours)
    ours.load_state_dict(values)
    theirs.load_state_dict(write(controlnet_layout(config, num_kinds), values))
    return ours, theirs


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_adds_and_every_gradient_equal_diffusers(name, dtype, most):
    config, num_kinds = CONFIGS[name]
    ours, theirs = pair(config, num_kinds, dtype)
    x, t, cond = inputs(config, dtype)
    hint = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(3)).to(dtype)
    added = ours(x, t, cond, ours.see(hint, 2))
    double, single = theirs(
        hidden_states=packed(x),
        controlnet_cond=packed(hint),
        controlnet_mode=torch.full((3, 1), 2) if num_kinds else None,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        timestep=t,
        img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(1, SIZE[0] // 2, SIZE[1] // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
        guidance=SCALES if config.guidance_embedded else None,
        return_dict=False,
    )
    found, wanted = [*added.double, *added.single], [*(double or ()), *(single or ())]
    assert len(found) == config.depth + config.depth_single
    assert max(map(difference, found, wanted)) <= most
    if dtype == torch.float32:
        return

    for outputs in (found, wanted):
        sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs).backward()
    gradients = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    unused = {key: torch.zeros_like(value) for key, value in theirs.named_parameters() if value.grad is None}
    assert all(".ff_context." in key or ".to_add_out." in key for key in unused)  # nothing is made of the last words
    gradients = read(controlnet_layout(config, num_kinds), gradients | unused, "gradients")
    for key, parameter in ours.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (grad - gradients[key]).abs().max() <= 1e-8 * gradients[key].abs().max(), key


@torch.no_grad()
def test_a_fresh_one_changes_nothing():
    network, control = Flux(_DEV), FluxControlNet(*CONFIGS["union"])
    network.load_state_dict({name: value.float() for name, value in fill(network).items()})
    x, t, cond = inputs(_DEV, torch.float32)
    added = control(x, t, cond, control.see(torch.randn(1, 3, *SIZE), 3))
    assert torch.equal(network(x, t, cond, added), network(x, t, cond))


@torch.no_grad()
def test_times_made_at_once_will_do_in_their_place():
    config, num_kinds = CONFIGS["union"]
    network, _ = pair(config, num_kinds, torch.float64)
    x, _, cond = inputs(config, torch.float64)
    seen = network.see(torch.randn(1, 3, *SIZE).double(), 1)
    row = network.times(torch.tensor([0.3]), len(x), cond)[0]
    kept = replace(cond, kept={})
    network.tell(kept)
    wanted = network(x, torch.full((3,), 0.3), cond, seen)
    for _ in range(2):
        found = network(x, row, kept, seen)
        assert all(difference(a, b) <= 1e-12 for a, b in zip(found.single, wanted.single, strict=True))


@pytest.mark.parametrize(
    ("changes", "num_kinds"), [({"depth": 5, "depth_single": 10}, 10), ({"depth": 6, "depth_single": 0}, 0)]
)
def test_names_and_shapes_are_those_of_diffusers_and_tell_the_configuration(changes, num_kinds):
    """Of Shakker's union, and of its second."""
    config = replace(flux.FLUX_DEV, **changes)
    with torch.device("meta"):
        ours, theirs = FluxControlNet(config, num_kinds), reference(config, num_kinds)
    written = write(controlnet_layout(config, num_kinds), ours.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert controlnet_config_of(shapes) == (config, num_kinds)
    with pytest.raises(CheckpointMismatch, match=r"a\.safetensors is no FLUX\.1: context_embedder\.weight is missing"):
        controlnet_config_of({k: v for k, v in shapes.items() if k != "context_embedder.weight"}, "a.safetensors")
