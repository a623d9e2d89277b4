"""MMDiT against diffusers', with every parameter filled with noise, and properties of its own."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.checkpoints.layouts import names, write
from limner.checkpoints.mmdit import diffusers_config, diffusers_layout
from limner.errors import UsageError
from limner.models import mmdit
from limner.models.mmdit import MMDiT, MMDiTConfig
from limner.types import Conditioning
from parity import assert_same_gradients, backward, difference, gradients_of

# Every family at two odd configurations: heads of unlike width and number, patches of 2 and 3, several dual blocks.
_SD3 = MMDiTConfig(
    channels=5, depth=3, num_heads=3, head_width=12, text_width=14, pooled_width=10, pos_embed_max=11, base_grid=7
)
_LARGE = replace(_SD3, qk_norm="rms")
_MEDIUM = replace(_LARGE, dual_blocks=(0, 1), pos_embed_max=14)
CONFIGS = {
    "sd3": _SD3,
    "sd3, deeper": replace(_SD3, depth=5, num_heads=1, head_width=20, patch=3, channels=3),
    "3.5 large": _LARGE,
    "3.5 large, one block": replace(_LARGE, depth=1, num_heads=5, head_width=4),
    "3.5 medium": _MEDIUM,
    "3.5 medium, others": replace(_MEDIUM, depth=4, dual_blocks=(1, 3), num_heads=2, head_width=10, patch=3),
}


def fill(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise for every tensor, the table too: what starts at zero or one would hide what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in sorted(network.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() > 1:
            noise /= tensor[0].numel() ** (0.5 * (name != "pos_embed"))
        values[name] = 0.3 * noise + (".ln_" in name) if tensor.dim() == 1 else noise
    return values


def filled(config: MMDiTConfig, dtype: torch.dtype) -> MMDiT:
    network = MMDiT(config).to(dtype).eval()
    network.load_state_dict(fill(network))
    return network


def pair(config: MMDiTConfig, dtype: torch.dtype) -> tuple[MMDiT, nn.Module]:
    ours = filled(config, dtype)
    theirs = diffusers.SD3Transformer2DModel.from_config(diffusers_config(config)).to(dtype).eval()
    layout = diffusers_layout(config)
    assert names(layout) == theirs.state_dict().keys()
    theirs.load_state_dict(write(layout, ours.state_dict()))
    for module in theirs.modules():  # diffusers' squares in float32, whatever is asked
        if type(module).__name__ == "RMSNorm":
            module.forward = lambda x, norm=module: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return ours, theirs


def inputs(config: MMDiTConfig, dtype: torch.dtype, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x = draw(batch, config.channels, 9 * config.patch, 4 * config.patch)
    tokens, pooled = draw(batch, 7, config.text_width), draw(batch, config.pooled_width)
    return x, torch.tensor([1.0, 0.0, 0.123][:batch]), Conditioning(tokens=tokens, pooled=pooled)


def in_diffusers(theirs: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, **more) -> torch.Tensor:
    return theirs(x, cond.tokens, cond.pooled, 1000 * t, **more).sample


def test_one_block_on_one_word_and_one_patch_is_a_formula():
    """Every matrix is zero but what is set: adaLN, attention over the two and the gate, computed by hand."""
    config = MMDiTConfig(
        channels=1, depth=1, num_heads=1, head_width=4, text_width=1, pooled_width=1, pos_embed_max=1, base_grid=1
    )
    network = MMDiT(config).double().eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    values = torch.arange(1.0, 5).double()  # of the image token
    image, text = network.joint_blocks[0].x_block, network.joint_blocks[0].context_block
    network.pos_embed.copy_(values)
    network.context_embedder.bias.data.copy_(torch.tensor([3.0, -1, -1, -1]))
    image.adaLN_modulation[1].bias.data.copy_(torch.tensor([0.5, 1, 2, 0, 0, 0]).repeat_interleave(4))
    text.adaLN_modulation[1].bias.data.copy_(torch.tensor([-0.5, 0]).repeat_interleave(4))
    for side in (image, text):  # queries and keys are the tokens, values too
        side.attn.qkv.weight.data.copy_(torch.eye(4).repeat(3, 1))
    image.attn.proj.weight.data.copy_(torch.eye(4))
    network.final_layer.linear.weight.data.copy_(torch.eye(4))
    cond = Conditioning(tokens=torch.ones(1, 1, 1).double(), pooled=torch.ones(1, 1).double())
    found = network(torch.ones(1, 1, 2, 2).double(), torch.tensor([0.5]), cond)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()

    pixel = 0.5 + 2 * norm(values)
    word = norm(torch.tensor([3.0, -1, -1, -1]).double()) - 0.5
    weights = (torch.stack([pixel @ word, pixel @ pixel]) / 2).softmax(0)
    expected = norm(values + 2 * (weights[0] * word + weights[1] * pixel))
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_equal_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    x, t, cond = inputs(config, torch.float64)
    a, b = ours(x, t, cond), in_diffusers(theirs, x, t, cond)
    assert difference(a, b) <= 1e-10

    backward(a, b)
    layout = {key: place for key, place in diffusers_layout(config).items() if key != "pos_embed"}
    mine = write(layout, gradients_of(ours))
    last = f"transformer_blocks.{config.depth - 1}.attn"
    idle = lambda key: key.startswith(last) and ("add_q" in key or "added_q" in key)  # noqa: E731 (asked for nobody)
    assert_same_gradients(mine, gradients_of(theirs), idle)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_output_equals_that_of_diffusers_in_single_precision(name):
    ours, theirs = pair(CONFIGS[name], torch.float32)
    x, t, cond = inputs(CONFIGS[name], torch.float32)
    assert difference(ours(x, t, cond), in_diffusers(theirs, x, t, cond)) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_times_made_at_once_will_do_in_their_place(name):
    network = filled(CONFIGS[name], torch.float64)
    x, _, cond = inputs(CONFIGS[name], torch.float64)
    t = torch.tensor([1.0, 0.0, 0.1235, 0.007])
    made = network.times(t, len(x), cond)
    for time, row in zip(t, made, strict=True):
        assert difference(network(x, row, cond), network(x, time.repeat(len(x)), cond)) <= 1e-12
    assert difference(network(x, made[0], cond), network(x, made[1], cond)) > 1e-3


@torch.no_grad()
def test_after_times_and_tell_nothing_asks_what_is_asked_once():
    network = filled(_MEDIUM, torch.float64)
    x, t, cond = inputs(_MEDIUM, torch.float64)
    whole = network(x, t[:1].repeat(3), cond)
    drawing = replace(cond, kept={})
    network.tell(drawing)
    row = network.times(t, 3, drawing)[0]
    for module in network.asked_once():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert difference(network(x, row, drawing), whole) <= 1e-12
    rest = {id(p) for p in network.parameters()} - {id(p) for m in network.asked_once() for p in m.parameters()}
    assert len(rest) == len(list(network.parameters())) - sum(len(list(m.parameters())) for m in network.asked_once())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_residuals_are_spread_over_the_blocks_as_diffusers_spreads_them(count):
    config = replace(_SD3, depth=4)
    ours, theirs = pair(config, torch.float64)
    x, t, cond = inputs(config, torch.float64)
    generator = torch.Generator().manual_seed(3)
    residuals = [torch.randn(3, 36, config.width, generator=generator, dtype=torch.float64) for _ in range(count)]
    controlled = ours(x, t, cond, residuals)
    assert difference(controlled, in_diffusers(theirs, x, t, cond, block_controlnet_hidden_states=residuals)) <= 1e-10
    assert difference(controlled, ours(x, t, cond)) > 1e-3


@pytest.mark.parametrize("skipped", [(0,), (1, 2), (3,)])
@torch.no_grad()
def test_blocks_are_skipped_as_diffusers_skips_them(skipped):
    config = replace(_MEDIUM, depth=4)
    ours, theirs = pair(config, torch.float64)
    x, t, cond = inputs(config, torch.float64)
    found = ours(x, t, cond, skip_layers=skipped)
    assert difference(found, in_diffusers(theirs, x, t, cond, skip_layers=list(skipped))) <= 1e-10
    assert difference(found, ours(x, t, cond)) > 1e-3


@torch.no_grad()
def test_padding_is_attended_to_whatever_the_mask_says():
    network = filled(_LARGE, torch.float32)
    x, t, cond = inputs(_LARGE, torch.float32)
    masked = replace(cond, mask=torch.arange(7) < torch.tensor([[3], [7], [1]]))
    assert torch.equal(network(x, t, masked), network(x, t, cond))


@torch.no_grad()
def test_a_picture_sees_the_middle_of_the_table():
    """Positions are columns, then rows; of eleven, three begin at the fourth and four at the third."""
    network = filled(_SD3, torch.float64)
    nn.init.zeros_(network.x_embedder.proj.weight)
    nn.init.zeros_(network.x_embedder.proj.bias)
    seen = network.embed(torch.ones(1, 5, 6, 8).double()).unflatten(1, (3, 4))
    assert torch.equal(seen, network.pos_embed.unflatten(1, (11, 11))[:, 4:7, 3:7])
    whole = network.embed(torch.ones(1, 5, 22, 22).double())
    assert torch.equal(whole, network.pos_embed)
    for size in ((24, 4), (4, 24), (5, 4)):
        with pytest.raises(AssertionError):
            network.embed(torch.ones(1, 5, *size).double())


def test_a_fresh_table_has_a_unit_of_the_grid_to_a_turn_of_one():
    """The fastest pair of sinusoids turns by one a unit; 7 units are over 14 places here."""
    table = MMDiT(replace(_SD3, pos_embed_max=14)).pos_embed.unflatten(1, (14, 14))[0]
    column, row = torch.arange(14) / 2, torch.arange(14)[:, None] / 2
    pairs = _SD3.width // 4
    for first, place in ((0, column), (2 * pairs, row)):
        torch.testing.assert_close(table[..., first], place.sin().expand(14, 14))
        torch.testing.assert_close(table[..., first + pairs], place.cos().expand(14, 14))
        slowest = place * 10_000 ** (-(pairs - 1) / pairs)
        torch.testing.assert_close(table[..., first + pairs - 1], slowest.sin().expand(14, 14))
    theirs = diffusers.SD3Transformer2DModel.from_config(diffusers_config(_SD3)).pos_embed.pos_embed
    torch.testing.assert_close(MMDiT(_SD3).pos_embed, theirs, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_its_blocks_are_shortcuts():
    network = MMDiT(mmdit.SD3_TINY).eval()
    x, t, cond = inputs(mmdit.SD3_TINY, torch.float32)
    assert not network(x, t, cond).any()
    text, image, told = network.text(cond), network.embed(x), network.told(t, cond)
    assert torch.equal(network.joint_blocks[0](text, image, told[0], told[1])[1], image)
    assert all(layer.weight.any() for layer in (network.joint_blocks[0].x_block.mlp.fc1, network.context_embedder))


@torch.no_grad()
def test_half_precision_stays_half_and_time_does_not():
    """bfloat16 has no 0.999, so that the sinusoids must be made before."""
    network = filled(mmdit.SD3_TINY, torch.float32)
    x, _, cond = inputs(mmdit.SD3_TINY, torch.float32)
    t = torch.tensor([0.999, 0.501, 0.123])
    whole = network(x, t, cond)
    half = network.bfloat16()(x.bfloat16(), t, cond.map(lambda value: value.bfloat16()))
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), whole) < 0.1


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_whole():
    torch._dynamo.reset()
    network = filled(mmdit.SD3_TINY, torch.float64)
    x, t, cond = inputs(mmdit.SD3_TINY, torch.float64)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    residuals = [torch.ones(3, 36, network.config.width).double()]
    for time in (t, network.times(t, 3, cond)[2]):
        assert difference(compiled(x, time, cond, residuals), network(x, time, cond, residuals)) <= 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"num_heads": 1, "head_width": 6}, "not in fours"),
        ({"dual_blocks": (2,)}, "of depth=2 blocks"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        MMDiT(replace(mmdit.SD3_TINY, **changes))
