"""The U-Net against diffusers' two, with every parameter filled with noise, and at the published sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from limner.errors import UsageError
from limner.models import unet
from limner.models.unet import Residuals, UNet, UNetConfig, micro_conditioning
from limner.types import Conditioning
from parity import assert_same_gradients, backward, difference, gradients_of
from sweeps import sweep

SIZE = (20, 12)

# Every family at two odd configurations: widths that are no powers of two, levels of unlike depth, several heads.
_SD1 = UNetConfig(widths=(12, 20, 28), depths=(1, 1, 0), num_heads=4, groups=4, text_width=10)
_SD2 = UNetConfig(
    widths=(12, 24, 36), depths=(1, 1, 0), num_blocks=1, head_width=6, groups=3, text_width=14, linear_projection=True
)
_SDXL = replace(_SD2, depths=(0, 2, 3), mid_depth=3, vector_width=18 + 6 * 256)
_REFINER = replace(
    _SD2, widths=(6, 18, 24, 24), depths=(0, 2, 2, 0), mid_depth=2, text_width=18, vector_width=18 + 5 * 256
)
_UPSCALER = UNetConfig(
    in_channels=7,
    widths=(20, 40, 40, 60),
    depths=(0, 1, 1, 1),
    num_blocks=1,
    num_heads=5,
    groups=10,
    text_width=14,
    text_only=(True, True, True, False),
    linear_projection=True,
    num_classes=9,
)
_DDPM = replace(unet.DDPM_CIFAR, widths=(12, 24, 24), depths=(0, 1, 0), groups=6, dropout=0.0)
_ADM = UNetConfig(
    in_channels=3,
    out_channels=6,
    widths=(12, 24, 36),
    depths=(0, 1, 1),
    head_width=6,
    groups=6,
    num_classes=9,
    scale_shift=True,
    resample="block",
)
CONFIGS = {
    "sd1": _SD1,
    "sd1, four levels": replace(_SD1, in_channels=9, widths=(8, 16, 24, 24), depths=(1, 1, 1, 0), num_blocks=1),
    "sd2": _SD2,
    "sd2, depth": replace(_SD2, in_channels=5, widths=(18, 30, 42), num_blocks=2),
    "sdxl": _SDXL,
    "sdxl, deeper": replace(_SDXL, widths=(18, 18, 30), depths=(0, 1, 4), mid_depth=4, num_blocks=2),
    "refiner": _REFINER,
    "refiner, more blocks": replace(_REFINER, num_blocks=2, depths=(0, 1, 3, 0), mid_depth=1),
    "upscaler": _UPSCALER,
    "upscaler, more blocks": replace(_UPSCALER, widths=(10, 20, 30, 30), groups=5, num_blocks=2, text_only=()),
    "ddpm": _DDPM,
    "ddpm, attention last": replace(_DDPM, widths=(14, 14, 28), depths=(1, 0, 1), groups=7, num_blocks=1, pad="around"),
    "ddpm, no attention in the middle": replace(_DDPM, mid_depth=0),
    "improved ddpm": replace(_DDPM, out_channels=6, scale_shift=True, sines_first=False, freq_shift=0, eps=1e-5),
    "adm": _ADM,
    "adm, unconditional": replace(_ADM, widths=(14, 14, 28), depths=(1, 0, 1), head_width=7, groups=7, num_classes=0),
}


def reference(config: UNetConfig) -> nn.Module:
    """diffusers' network of the configuration, in its words."""
    common: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_blocks,
        "norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "flip_sin_to_cos": not config.sines_first,
        "freq_shift": config.freq_shift,
        "downsample_padding": 1 if config.pad == "around" else 0,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.num_classes or None,
    }
    if config.text_width:
        depths = [
            *(max(depth, 1) for depth in config.depths[:-1]),
            config.mid_depth,
        ]  # the last is the middle's as well
        return diffusers.UNet2DConditionModel(
            **common,
            down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
            up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
            transformer_layers_per_block=depths,
            attention_head_dim=[config.heads(width) for width in config.widths],  # means their number
            cross_attention_dim=config.text_width,
            only_cross_attention=list(config.text_only) or False,
            use_linear_projection=config.linear_projection,
            **ADDED | {"projection_class_embeddings_input_dim": config.vector_width} if config.vector_width else {},
        )
    blocks = config.resample == "block"
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if blocks else ("DownBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        **common,
        down_block_types=["AttnDownBlock2D" if depth else down for depth in config.depths],
        up_block_types=["AttnUpBlock2D" if depth else up for depth in reversed(config.depths)],
        downsample_type="resnet" if blocks else "conv",
        upsample_type="resnet" if blocks else "conv",
        attention_head_dim=config.head_width or None,
        attn_norm_num_groups=config.groups,
        add_attention=config.mid_depth > 0,
    )


ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}


def fill(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise for every parameter, norms and biases too: what starts at zero or one would hide what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            noise /= parameter[0].numel() ** 0.5
        values[name] = 0.3 * noise + ("norm" in name and name.endswith("weight")) if parameter.dim() == 1 else noise
    return values


def pair(config: UNetConfig, dtype: torch.dtype) -> tuple[UNet, nn.Module]:
    ours, theirs = UNet(config).to(dtype).eval(), reference(config).to(dtype).eval()
    values = fill(ours)
    assert values.keys() == theirs.state_dict().keys()
    ours.load_state_dict(values)
    theirs.load_state_dict(values)
    return ours, theirs


def inputs(
    config: UNetConfig, dtype: torch.dtype, batch: int = 3
) -> tuple[torch.Tensor, torch.Tensor, Conditioning, dict]:
    """x, t, what we are told, and the same in diffusers' words."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, t = draw(batch, config.in_channels, *SIZE), torch.tensor([999, 0, 123][:batch])
    cond, told = Conditioning(), {}
    if config.text_width:
        cond = replace(cond, tokens=draw(batch, 7, config.text_width))
        told["encoder_hidden_states"] = cond.tokens
    if config.num_classes:
        cond = replace(cond, labels=torch.tensor([8, 0, 5][:batch]))
        told["class_labels"] = cond.labels
    if config.vector_width:
        numbers = torch.tensor([[512, 768, 0, 5, 1024, 999], [64, 64, 3, 0, 2, 6], [1, 2, 3, 4, 5, 7]])[:batch]
        numbers = numbers[:, : (config.vector_width - 18) // 256]
        pooled = draw(batch, 18)
        cond = replace(cond, vector=micro_conditioning(pooled, numbers))
        told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": numbers}
    return x, t, cond, told


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_equal_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    x, t, cond, told = inputs(config, torch.float64)
    a, b = ours(x, t, cond), theirs(x, t, **told).sample
    assert difference(a, b) <= 1e-10

    backward(a, b)
    idle = lambda key: key.endswith("to_k.bias")  # noqa: E731 (adds the same to all that a softmax weighs)
    assert_same_gradients(gradients_of(ours), gradients_of(theirs), idle)


@pytest.mark.parametrize("name", sweep(CONFIGS, fast=lambda name: "," not in name and name != "sd2"))
@torch.no_grad()
def test_times_made_at_once_will_do_in_their_place(name):
    config = CONFIGS[name]
    network, _ = pair(config, torch.float64)
    x, _, cond, _ = inputs(config, torch.float64)
    made = network.times(torch.tensor([999.0, 0.0, 123.5, 7.0]), len(x), cond)
    for time, row in zip((999.0, 0.0, 123.5, 7.0), made, strict=True):
        assert difference(network(x, row, cond), network(x, torch.full((len(x),), time), cond)) <= 1e-12
    assert difference(network(x, made[0], cond), network(x, made[1], cond)) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_output_equals_that_of_diffusers_in_single_precision(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float32)
    x, t, cond, told = inputs(config, torch.float32)
    assert difference(ours(x, t, cond), theirs(x, t, **told).sample) <= 1e-5


# What the model cards' config.json say, beside the defaults of diffusers.
SD = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
SD_2 = SD | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
XL = ADDED | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 2816,
}
XL_REFINER = ADDED | {
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 2560,
}
X4 = {
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "num_class_embeds": 1000,
}
PIXELS = {
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
PIXELS_256 = PIXELS | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
IMAGENET_64 = {  # as published for the consistency models, whose network is ADM's but for the channels out
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "block_out_channels": [192, 384, 576, 768],
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "resnet_time_scale_shift": "scale_shift",
    "out_channels": 6,
}
CONDITION, PLAIN = diffusers.UNet2DConditionModel, diffusers.UNet2DModel


PUBLISHED = [
    ("SD1", CONDITION, SD, 859.5),
    ("SD1_INPAINT", CONDITION, SD | {"in_channels": 9}, 859.5),
    ("SD1_EDIT", CONDITION, SD | {"in_channels": 8}, 859.5),
    ("SD2", CONDITION, SD_2, 865.9),
    ("SD2_INPAINT", CONDITION, SD_2 | {"in_channels": 9}, 865.9),
    ("SD2_DEPTH", CONDITION, SD_2 | {"in_channels": 5}, 865.9),
    ("SDXL", CONDITION, XL, 2567.5),
    ("SDXL_INPAINT", CONDITION, XL | {"in_channels": 9}, 2567.5),
    ("SDXL_REFINER", CONDITION, XL_REFINER, 2259.5),
    ("X4_UPSCALER", CONDITION, X4, 473.4),
    ("DDPM_CIFAR", PLAIN, PIXELS, 35.7),
    ("DDPM_256", PLAIN, PIXELS_256, 113.7),
    ("ADM_64", PLAIN, IMAGENET_64, 295.9),
]


@pytest.mark.parametrize(("name", "kind", "published", "millions"), PUBLISHED)
def test_released_sizes_are_built_as_diffusers_builds_them(name, kind, published, millions):
    with torch.device("meta"):
        ours, theirs = UNet(getattr(unet, name)), kind(**published)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e6, 1) == millions

    # What no shape tells: the number of heads, what is added to a variance, where zeros are, how time is spelled.
    modules = dict(theirs.named_modules())
    for key, module in ours.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            assert module.eps == modules[key].eps, key
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == modules[key].num_groups, key
        if isinstance(module, nn.Conv2d):
            assert (module.padding, module.stride) == (modules[key].padding, modules[key].stride), key
        if isinstance(module, unet.Attention):
            assert module.num_heads == modules[key].heads, key
    assert ours.config.sines_first != theirs.time_proj.flip_sin_to_cos
    assert ours.config.freq_shift == theirs.time_proj.downscale_freq_shift


@pytest.mark.parametrize(("name", "millions"), [("IDDPM_64", 121), ("ADM_128", 422), ("ADM_256", 554)])
def test_sizes_that_diffusers_has_no_file_of_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        network = UNet(getattr(unet, name))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions


@torch.no_grad()
def test_a_mask_hides_what_is_not_text():
    ours, theirs = pair(_SD1, torch.float64)
    x, t, cond, told = inputs(_SD1, torch.float64)
    mask = torch.arange(7) < torch.tensor([[3], [7], [1]])
    masked = ours(x, t, replace(cond, mask=mask))
    assert difference(masked, theirs(x, t, **told, encoder_attention_mask=mask).sample) <= 1e-10
    assert cond.tokens is not None
    noise = torch.where(mask[..., None], cond.tokens, torch.randn_like(cond.tokens))
    assert difference(ours(x, t, replace(cond, tokens=noise, mask=mask)), masked) <= 1e-12


@torch.no_grad()
def test_a_network_without_text_does_not_read_any():
    network = UNet(_DDPM).eval()
    network.load_state_dict(fill(network))
    x, t, cond, _ = inputs(_DDPM, torch.float32)
    text = Conditioning(tokens=torch.randn(3, 60, 24), mask=torch.arange(60) < torch.tensor([[3], [7], [1]]))
    assert torch.equal(network(x, t, text), network(x, t, cond))


@torch.no_grad()
def test_residuals_are_added_where_a_controlnet_adds_them():
    ours, theirs = pair(_SD2, torch.float64)
    x, t, cond, told = inputs(_SD2, torch.float64)
    made, mids = [], []
    ours.conv_in.register_forward_hook(lambda module, args, out: made.append(out))
    for level in ours.down_blocks:
        level.register_forward_hook(lambda module, args, out: made.extend(out[1]))
    ours.mid_block.register_forward_hook(lambda module, args, out: mids.append(out))
    plain = ours(x, t, cond)
    down, mid = tuple(torch.randn_like(value) for value in made), torch.randn_like(mids[0])
    controlled = ours(x, t, cond, Residuals(down, mid))
    told |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert difference(controlled, theirs(x, t, **told).sample) <= 1e-10
    assert difference(controlled, plain) > 1e-3
    nothing = Residuals(tuple(torch.zeros_like(value) for value in down), torch.zeros_like(mid))
    assert torch.equal(ours(x, t, cond, nothing), plain)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_levels_are_told_where_a_t2i_adapter_tells_them(name):
    """Those of XL, whose first has no attention, after they are halved; and what is left, after the middle."""
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    x, t, cond, told = inputs(config, torch.float64)
    sides = [(20, 12), (10, 6), (5, 3)] if name == "sd1" else [(10, 6), (10, 6), (5, 3), (5, 3)]
    widths = [*config.widths, config.widths[-1]]
    levels = tuple(torch.randn(1, width, *side).double() for width, side in zip(widths, sides, strict=False))
    plain, found = (ours(x, t, cond, Residuals(levels=told)) for told in ((), levels))
    told["down_intrablock_additional_residuals"] = [level.expand(3, -1, -1, -1).clone() for level in levels]
    assert difference(found, theirs(x, t, **told).sample) <= 1e-10
    assert difference(found, plain) > 1e-3


@pytest.mark.parametrize("name", ["ddpm", "adm"])
@torch.no_grad()
def test_any_size_comes_out_as_it_went_in(name):
    network = UNet(CONFIGS[name]).eval()
    _, t, cond, _ = inputs(CONFIGS[name], torch.float32)
    for height, width in ((17, 9), (5, 6)):
        x = torch.randn(3, 3, height, width)
        assert network(x, t, cond).shape == (3, network.config.out_channels, height, width)


@pytest.mark.parametrize("config", [unet.UNET_TINY, unet.UNET_TINY_PIXELS, _ADM])
@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_its_blocks_are_shortcuts(config):
    network = UNet(config).eval()
    x, t, cond, _ = inputs(config, torch.float32)
    assert not network(x, t, cond).any()
    assert all(not block.conv2.weight.any() for block in network.modules() if isinstance(block, unet.ResBlock))


@torch.no_grad()
def test_half_precision_stays_half_and_time_does_not():
    """bfloat16 has no 999, so that the sinusoids must be made before."""
    network = UNet(unet.UNET_TINY).eval()
    network.load_state_dict(fill(network))
    x, t, cond, _ = inputs(unet.UNET_TINY, torch.float32)
    whole = network(x, t, cond)
    half = network.bfloat16()(x.bfloat16(), t, cond.map(lambda value: value.bfloat16()))
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), whole) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1,)}, "names 2 levels"),
        ({"widths": (32, 60)}, "60 does not divide into groups=8"),
        ({"num_heads": 4}, "either num_heads or head_width"),
        ({"head_width": 0}, "either num_heads or head_width"),
        ({"head_width": 24}, "does not divide into num_heads=0 or head_width=24"),
        ({"text_width": 0, "mid_depth": 2}, "without text_width"),
        ({"num_blocks": 0}, "num_blocks=0"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        UNet(replace(unet.UNET_TINY, **changes))
