"""ControlNets of Stable Diffusion 3 against diffusers', and their layouts."""

from __future__ import annotations

import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.checkpoints.layouts import names, read, write
from limner.checkpoints.mmdit import control_config_of, control_layout, stability_control_layout
from limner.models import mmdit_controlnet
from limner.models.mmdit import MMDiTConfig
from limner.models.mmdit_controlnet import MMDiTControlNet, MMDiTControlNetConfig
from limner.types import Conditioning
from parity import difference

_SIZE = MMDiTConfig(
    channels=5, depth=2, num_heads=1, head_width=64, text_width=14, pooled_width=10, pos_embed_max=11, base_grid=7
)
_MEDIUM = replace(_SIZE, depth=3, num_heads=3, head_width=12, qk_norm="rms", dual_blocks=(0, 1), patch=3)
CONFIGS = {
    "sd3": MMDiTControlNetConfig(size=_SIZE, hint_channels=5),
    "sd3, inpainting": MMDiTControlNetConfig(size=replace(_SIZE, depth=3), hint_channels=6, zero_pooled=False),
    "3.5 medium": MMDiTControlNetConfig(size=_MEDIUM, hint_channels=5),
    "3.5 large": MMDiTControlNetConfig(
        size=replace(_SIZE, num_heads=2, depth=3), reads_text=False, embeds=False, hint_channels=5, zero_pooled=False
    ),
}


def reference(config: MMDiTControlNetConfig) -> nn.Module:
    size = config.size
    return diffusers.SD3ControlNetModel(
        sample_size=size.patch * size.base_grid,
        patch_size=size.patch,
        in_channels=size.channels,
        num_layers=size.depth,
        attention_head_dim=size.head_width,
        num_attention_heads=size.num_heads,
        joint_attention_dim=size.text_width if config.reads_text else None,
        caption_projection_dim=size.width,
        pooled_projection_dim=size.pooled_width,
        out_channels=size.channels,
        pos_embed_max_size=size.pos_embed_max if config.embeds else None,
        extra_conditioning_channels=config.hint_channels - size.channels,
        dual_attention_layers=size.dual_blocks,
        qk_norm="rms_norm" if size.qk_norm else None,
        pos_embed_type="sincos" if config.embeds else None,
        use_pos_embed=config.embeds,
        force_zeros_for_pooled_projection=config.zero_pooled,
    )


def filled(config: MMDiTControlNetConfig, dtype: torch.dtype) -> MMDiTControlNet:
    network = MMDiTControlNet(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for _, tensor in sorted(network.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(noise / (tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 3))
    return network


def pair(config: MMDiTControlNetConfig, dtype: torch.dtype) -> tuple[MMDiTControlNet, nn.Module]:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    ours, theirs = filled(config, dtype), reference(config).to(dtype).eval()
    layout = control_layout(config)
    assert layout.keys() == ours.state_dict().keys()
    assert names(layout) == theirs.state_dict().keys()
    theirs.load_state_dict(write(layout, ours.state_dict()))
    for module in theirs.modules():  # diffusers' squares in float32, whatever is asked
        if type(module).__name__ == "RMSNorm":
            module.forward = lambda x, norm=module: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return ours, theirs


def inputs(config: MMDiTControlNetConfig, dtype: torch.dtype):
    """x, t, what it is told, and a picture."""
    generator, size = torch.Generator().manual_seed(1), config.size
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    sides = (9 * size.patch, 4 * size.patch)
    x = draw(3, size.channels, *sides) if config.embeds else draw(3, 36, size.width)
    cond = Conditioning(tokens=draw(3, 7, size.text_width), pooled=draw(3, size.pooled_width))
    return x, torch.tensor([1.0, 0.0, 0.123]), cond, draw(1, config.hint_channels, *sides)


def theirs_of(network: nn.Module, config: MMDiTControlNetConfig, x, t, cond, hint) -> list[torch.Tensor]:
    pooled = torch.zeros_like(cond.pooled) if config.zero_pooled else cond.pooled
    tokens = cond.tokens if config.reads_text else None
    return network(x, hint, 1.0, tokens, pooled, 1000 * t).controlnet_block_samples


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_residuals_equal_those_of_diffusers(name, dtype, bound):
    config = CONFIGS[name]
    ours, theirs = pair(config, dtype)
    x, t, cond, hint = inputs(config, dtype)
    found, expected = ours(x, t, cond, ours.see(hint)), theirs_of(theirs, config, x, t, cond, hint)
    assert len(found) == len(expected) == config.size.depth
    assert max(map(difference, found, expected)) <= bound
    assert difference(ours(x, t, cond, ours.see(hint * 0))[0], found[0]) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_equals_that_of_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    x, t, cond, hint = inputs(config, torch.float64)
    for made in (ours(x, t, cond, ours.see(hint)), theirs_of(theirs, config, x, t, cond, hint)):
        sum((i + 2) * (residual * residual.detach()).sum() for i, residual in enumerate(made)).backward()
    mine = {key: parameter.grad for key, parameter in ours.named_parameters() if parameter.grad is not None}
    rows = {key: place for key, place in control_layout(config).items() if key != "pos_embed"}
    nobody = f"joint_blocks.{config.size.depth - 1}.context_block."  # reads what the text is in the end
    assert all(key.startswith(nobody) for key in rows.keys() - mine.keys())
    mine = write({key: place for key, place in rows.items() if key in mine}, mine)
    told_nothing = config.zero_pooled and "time_text_embed.text_embedder.linear_1.weight"
    for key, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert key not in mine or not mine[key].any(), key
            continue
        scale = parameter.grad.abs().max().item()
        if key == told_nothing:
            assert scale == 0 == mine[key].abs().max()
        elif scale > 1e-9:  # but the queries of the last text, and keys' biases, which add the same to all
            assert (mine[key] - parameter.grad).abs().max() <= 1e-8 * scale, key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_times_made_at_once_will_do_in_their_place(name):
    network = filled(CONFIGS[name], torch.float64)
    x, t, cond, hint = inputs(CONFIGS[name], torch.float64)
    drawing, seen = replace(cond, kept={}), network.see(hint)
    whole = network(x, t[2:].repeat(3), cond, seen)
    network.tell(drawing)
    row = network.times(t, 3, drawing)[2]
    for module in network.asked_once():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert max(map(difference, network(x, row, drawing, seen), whole)) <= 1e-12


@torch.no_grad()
def test_a_fresh_one_adds_nothing():
    config = mmdit_controlnet.SD3_CONTROLNET_TINY
    network = MMDiTControlNet(config).eval()
    x, t, cond, hint = inputs(config, torch.float32)
    assert not network.see(hint).any()
    assert not any(residual.any() for residual in network(x, t, cond, network.see(hint)))


@pytest.mark.parametrize(
    ("config", "millions"), [(mmdit_controlnet.SD3_CONTROLNET, 539), (mmdit_controlnet.SD35_LARGE_CONTROLNET, 2154)]
)
def test_published_sizes_are_built_as_diffusers_builds_them(config, millions):
    with torch.device("meta"):
        ours, theirs = MMDiTControlNet(config), reference(config)
    assert round(sum(parameter.numel() for parameter in ours.parameters()) / 1e6) == millions
    written = write(control_layout(config), ours.state_dict())
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert control_config_of({k: tuple(v.shape) for k, v in written.items()}) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_both_layouts_are_told_and_read_again(name):
    config = CONFIGS[name]
    ours = filled(config, torch.float32).state_dict()
    for layout in (control_layout(config), *([] if config.embeds else [stability_control_layout(config)])):
        theirs = write(layout, ours)
        again = read(layout, theirs, "file")
        assert again.keys() == ours.keys()
        assert all(torch.equal(again[key], ours[key]) for key in ours)
        found = control_config_of({key: tuple(tensor.shape) for key, tensor in theirs.items()})
        usual = MMDiTConfig()
        size = replace(config.size, base_grid=usual.base_grid)
        if not config.embeds:
            size = replace(
                size, channels=usual.channels, text_width=usual.text_width, pos_embed_max=usual.pos_embed_max
            )
        assert found == replace(config, size=size, zero_pooled=config.embeds)


def test_stabilitys_own_names_are_the_published_ones():
    """After its own code, and the table by which it is loaded there."""
    with torch.device("meta"):
        config = mmdit_controlnet.SD35_LARGE_CONTROLNET
        written = write(stability_control_layout(config), MMDiTControlNet(config).state_dict())
    sizes = {f"time_text_embed.{name}_embedder.linear_2": (2432, 2432) for name in ("timestep", "text")}
    sizes["time_text_embed.timestep_embedder.linear_1"] = (2432, 256)
    sizes["time_text_embed.text_embedder.linear_1"] = (2432, 2048)
    sizes["pos_embed_input.proj"] = (2432, 16, 2, 2)
    for i in range(19):
        sizes[f"controlnet_blocks.{i}"] = sizes[f"transformer_blocks.{i}.attn.proj"] = (2432, 2432)
        sizes[f"transformer_blocks.{i}.attn.qkv"] = (3 * 2432, 2432)
        sizes[f"transformer_blocks.{i}.adaLN_modulation.1"] = (6 * 2432, 2432)
        sizes[f"transformer_blocks.{i}.mlp.fc1"] = (4 * 2432, 2432)
        sizes[f"transformer_blocks.{i}.mlp.fc2"] = (2432, 4 * 2432)
    published = {f"{name}.weight": shape for name, shape in sizes.items()}
    published |= {f"{name}.bias": shape[:1] for name, shape in sizes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == published
