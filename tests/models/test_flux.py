"""FLUX.1 against diffusers', with every parameter filled with noise, and at the published sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_flux
from torch import nn

from limner.checkpoints.flux import diffusers_config, diffusers_layout
from limner.checkpoints.layouts import read, write
from limner.errors import UsageError
from limner.models import flux
from limner.models.flux import Flux, FluxConfig, Residuals, guidance_embedding, positions, rope_table, rotate
from limner.types import Conditioning
from parity import assert_same_gradients, backward, difference, gradients_of

SIZE = (8, 6)

# Two odd configurations and what is beside them: widths that are no powers of two, axes of unlike share.
_DEV = FluxConfig(
    in_channels=12,
    out_channels=12,
    width=36,
    depth=3,
    depth_single=5,
    num_heads=3,
    axes=(2, 4, 6),
    text_width=10,
    pooled_width=7,
)
CONFIGS = {
    "dev": _DEV,
    "schnell": replace(_DEV, width=40, depth=2, depth_single=3, num_heads=2, axes=(8, 2, 10), guidance_embedded=False),
    "fill": replace(_DEV, in_channels=32, width=20, depth=1, depth_single=2, num_heads=1, axes=(4, 10, 6)),
}


def turned(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], sequence_dim: int) -> torch.Tensor:
    cos, sin = (part[:, None] for part in table)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


@pytest.fixture(autouse=True)
def in_its_own_precision(monkeypatch):
    """diffusers turns queries and keys in float32, whatever they are, by tables that are made in float64, then kept in
    float32."""
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", turned)


def fill(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise for every parameter: what starts at zero or one would hide what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            noise /= parameter[0].numel() ** 0.5
        values[name] = 0.3 * noise + name.endswith("scale") if parameter.dim() == 1 else noise
    return values


def pair(config: FluxConfig, dtype: torch.dtype) -> tuple[Flux, nn.Module]:
    ours = Flux(config).to(dtype).eval()
    theirs = diffusers.FluxTransformer2DModel.from_config(diffusers_config(config)).to(dtype).eval()
    values = fill(ours)
    ours.load_state_dict(values)
    theirs.load_state_dict(write(diffusers_layout(config), values))
    return ours, theirs


def inputs(config: FluxConfig, dtype: torch.dtype, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, t = draw(batch, config.in_channels // 4, *SIZE), torch.tensor([1.0, 0.0, 0.3125][:batch])
    cond = Conditioning(tokens=draw(batch, 5, config.text_width), pooled=draw(batch, config.pooled_width))
    if config.guidance_embedded:
        cond = replace(cond, guidance=guidance_embedding(SCALES[:batch]))
    return x, t, cond


SCALES = torch.tensor([3.5, 1.0, 30.0])


def packed(x: torch.Tensor) -> torch.Tensor:
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


def asked(theirs: Any, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, **more: Any) -> torch.Tensor:
    """What diffusers' network gives, with the ids that its pipelines make; of `reference`, Kontext's."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    ids_of = diffusers.FluxPipeline._prepare_latent_image_ids
    tokens, ids = packed(x), ids_of(1, height, width, "cpu", torch.float32)
    reference = more.pop("reference", None)
    if reference is not None:
        beside = ids_of(1, reference.shape[-2] // 2, reference.shape[-1] // 2, "cpu", torch.float32)
        beside[..., 0] = 1
        tokens, ids = torch.cat([tokens, packed(reference)], dim=1), torch.cat([ids, beside])
    assert cond.tokens is not None
    out = theirs(
        hidden_states=tokens,
        timestep=t,
        guidance=SCALES[: len(x)] if theirs.config.guidance_embeds else None,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        img_ids=ids,
        txt_ids=torch.zeros(cond.tokens.shape[1], 3),
        **more,
    ).sample
    return diffusers.FluxPipeline._unpack_latents(out[:, : height * width], 8 * x.shape[-2], 8 * x.shape[-1], 8)


# ------------------------------------------------------------------ known answers


def test_patches_are_channel_by_channel_and_row_by_row():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    assert flux.patches(x)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_words_are_nowhere_and_pictures_have_rows_and_columns():
    found = positions(2, [(2, 3), (1, 2)], "cpu").tolist()
    assert found[:2] == [[0, 0, 0]] * 2
    assert found[2:8] == [[0, row, column] for row in (0, 1) for column in (0, 1, 2)]
    assert found[8:] == [[1, 0, 0], [1, 0, 1]]


def test_pictures_to_look_at_do_not_lie_on_one_another():
    sizes = [(9, 9), (4, 4), (4, 4), (2, 6), (5, 1)]
    found = [tuple(place) for place in positions(3, sizes, "cpu")[3 + 81 :].tolist()]
    assert len(set(found)) == len(found) == 16 + 16 + 12 + 5
    assert {place[0] for place in found} == {1}
    assert found[16] == (1, 4, 0)  # below the first


def test_a_pair_turns_by_its_place_times_its_frequency():
    axes, theta = (2, 4, 2), 100.0
    table = rope_table(torch.tensor([[0.0, 0, 0], [1, 3, 5]]), axes, theta)
    x = torch.tensor([1.0, 0.0] * 4).view(1, 1, 1, 8).expand(1, 2, 1, 8)
    still, turned = rotate(x, table)[0, :, 0]
    assert torch.equal(still, x[0, 0, 0])
    angles = [1, 3, 3 / 10, 5]  # 100^(-2/4) is a tenth
    wanted = [part(angle) for angle in angles for part in (math.cos, math.sin)]
    assert torch.allclose(turned, torch.tensor(wanted), atol=1e-6)


def test_few_residuals_are_shared_by_neighbours():
    made = [torch.tensor(float(i)) for i in range(4)]
    assert [int(i) for i in flux.spread(made[:2], 5)] == [0, 0, 0, 1, 1]
    assert [int(i) for i in flux.spread(made, 5)] == [0, 0, 1, 1, 2]
    assert [int(i) for i in flux.spread(made, 4)] == [0, 1, 2, 3]
    assert flux.spread([], 5) == []
    config = replace(_DEV, depth=2, depth_single=4)
    summed = Residuals.sum([Residuals(made[1:2]), Residuals(made[2:4], made[1:3]), Residuals((), made)], config)
    assert [int(i) for i in summed.double] == [3, 4]
    assert [int(i) for i in summed.single] == [1, 2, 4, 5]


@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity():
    network = Flux(flux.FLUX_TINY)
    x, t, cond = inputs(flux.FLUX_TINY, torch.float32)
    assert not network(x, t, cond).any()
    img, txt = torch.randn(3, 12, 64), torch.randn(3, 5, 64)
    told, table = list(network.told(t, cond)), network.table(5, [x])
    after = network.double_blocks[1](img, txt, told[2], told[3], table)
    assert torch.equal(after[0], img)
    assert torch.equal(after[1], txt)
    tokens = torch.cat([txt, img], dim=1)
    assert torch.equal(network.single_blocks[2](tokens, told[6], table), tokens)


# ------------------------------------------------------------ second implementation


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_equal_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    x, t, cond = inputs(config, torch.float64)
    a, b = ours(x, t, cond), asked(theirs, x, t, cond)
    assert difference(a, b) <= 1e-10

    backward(a, b)
    gradients = read(diffusers_layout(config), gradients_of(theirs), "gradients")
    assert_same_gradients(gradients_of(ours), gradients)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_output_equals_that_of_diffusers_in_single_precision(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float32)
    x, t, cond = inputs(config, torch.float32)
    assert difference(ours(x, t, cond), asked(theirs, x, t, cond)) <= 1e-5


@pytest.mark.parametrize("counts", [(3, 5), (2, 0), (1, 2), (0, 4)])
@torch.no_grad()
def test_residuals_are_added_where_diffusers_adds_those_of_a_controlnet(counts):
    ours, theirs = pair(_DEV, torch.float64)
    x, t, cond = inputs(_DEV, torch.float64)
    double, single = ([torch.randn(3, 12, 36).double() for _ in range(count)] for count in counts)
    plain, found = ours(x, t, cond), ours(x, t, cond, Residuals(double, single))
    told = {"controlnet_block_samples": double or None, "controlnet_single_block_samples": single or None}
    assert difference(found, asked(theirs, x, t, cond, **told)) <= 1e-10
    assert difference(found, plain) > 1e-3
    nothing = Residuals([torch.zeros_like(r) for r in double], [torch.zeros_like(r) for r in single])
    assert torch.equal(ours(x, t, cond, nothing), plain)


@torch.no_grad()
def test_a_picture_to_look_at_is_where_kontext_has_it():
    ours, theirs = pair(_DEV, torch.float64)
    x, t, cond = inputs(_DEV, torch.float64)
    reference = torch.randn(3, 3, 4, 10).double()
    found = ours(x, t, cond, None, [reference])
    assert difference(found, asked(theirs, x, t, cond, reference=reference)) <= 1e-10
    assert difference(found, ours(x, t, cond)) > 1e-3
    shared = ours(x, t, cond, None, [reference[:1]])
    assert torch.equal(shared, ours(x, t, cond, None, [reference[:1].repeat(3, 1, 1, 1)]))


@torch.no_grad()
def test_residuals_leave_a_picture_to_look_at_alone():
    network, _ = pair(_DEV, torch.float64)
    x, t, cond = inputs(_DEV, torch.float64)
    reference = [torch.randn(3, 3, 4, 10).double()]
    nothing = Residuals([torch.zeros(3, 12, 36).double()], [torch.zeros(3, 12, 36).double()])
    assert torch.equal(network(x, t, cond, nothing, reference), network(x, t, cond, None, reference))


# ------------------------------------------------------------------ once a drawing


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_times_made_at_once_will_do_in_their_place(name):
    config = CONFIGS[name]
    network, _ = pair(config, torch.float64)
    x, _, cond = inputs(config, torch.float64)
    times = [1.0, 0.0, 0.375, 0.7]
    made = network.times(torch.tensor(times), len(x), cond)
    for time, row in zip(times, made, strict=True):
        assert difference(network(x, row, cond), network(x, torch.full((len(x),), time), cond)) <= 1e-12
    assert difference(network(x, made[0], cond), network(x, made[1], cond)) > 1e-3


@torch.no_grad()
def test_what_is_kept_is_not_made_again_and_changes_nothing():
    network, _ = pair(_DEV, torch.float64)
    x, t, cond = inputs(_DEV, torch.float64)
    plain, wide = network(x, t, cond), torch.cat([x, x], dim=3)
    plain_wide = network(wide, t, cond)
    kept = replace(cond, kept={})
    network.tell(kept)
    assert kept.kept is not None
    assert set(kept.kept) == {network.txt_in}
    row = network.times(t, len(x), kept)[0]
    for _ in range(2):
        assert torch.equal(network(x, t, kept), plain)
        assert torch.equal(network(wide, t, kept), plain_wide)
    assert len(kept.kept) == 1
    assert len(network.tables) == 2  # of positions
    before = network(x, row, kept)
    for module in network.asked_once():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(network(x, row, kept), before)


def test_a_quarter_of_the_weights_is_asked_once():
    with torch.device("meta"):
        network = Flux(flux.FLUX_DEV)
    once = sum(parameter.numel() for module in network.asked_once() for parameter in module.parameters())
    assert round(once / sum(parameter.numel() for parameter in network.parameters()), 3) == 0.277


@torch.no_grad()
def test_nothing_depends_on_the_numbers_in_tensors():
    """On the meta device there are none; and in one graph there is no way back to Python."""
    with torch.device("meta"):
        network = Flux(flux.FLUX_TINY)
        x, t, cond = (
            torch.empty(1, 16, *SIZE),
            torch.empty(1),
            Conditioning(tokens=torch.empty(1, 5, 32), pooled=torch.empty(1, 24), guidance=torch.empty(1, 256)),
        )
        residuals = Residuals([torch.empty(1, 12, 64)], [torch.empty(1, 12, 64)])
        assert network(x, t, cond, residuals, [x]).shape == x.shape


@pytest.mark.slow  # to load the compiler
@torch.no_grad()
def test_one_graph_holds_all_of_it():
    network, _ = pair(replace(_DEV, depth=1, depth_single=1), torch.float64)
    x, t, cond = inputs(_DEV, torch.float64)
    row = network.times(t, len(x), cond)[0]
    residuals = Residuals([torch.randn(3, 12, 36).double()], [torch.randn(3, 12, 36).double()])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    asked = (x, row, cond, residuals, [x[:1]])
    assert torch.equal(compiled(*asked), network(*asked))
    kept = replace(cond, kept={})
    assert torch.equal(compiled(x, row, kept), network(x, row, kept))


@torch.no_grad()
def test_half_precision_stays_half_and_times_and_places_do_not():
    """bfloat16 has no 999, and no 257: sinusoids and tables must be made before."""
    config = replace(_DEV, width=72, axes=(4, 8, 12))
    network = Flux(config).eval()
    network.load_state_dict(fill(network))
    x, t, cond = inputs(config, torch.float32)
    whole = network(x, t, cond)
    half = network.bfloat16()(x.bfloat16(), t, cond.map(lambda value: value.bfloat16()))
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), whole) < 0.05
    table = network.table(0, [torch.empty(1, 1, 600, 2, dtype=torch.bfloat16)])
    assert table.dtype == torch.float32
    assert torch.unique(table[0, :, 0, 4]).numel() == 300


@torch.no_grad()
def test_words_too_large_for_float16_do_not_spoil_a_picture():
    network = Flux(_DEV)
    network.load_state_dict(fill(network))
    for block in network.double_blocks:
        block.txt_mlp[2].bias.fill_(60_000)
    x, t, cond = inputs(_DEV, torch.float16)
    assert network.half()(x, t, cond).isfinite().all()


# ---------------------------------------------------------------- released sizes


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def published(config_in: int, guidance: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in Black Forest Labs' files, as the module in their repository has them."""
    d = 3072
    rows = linear("img_in", d, config_in) | linear("txt_in", d, 4096)
    for name, width in {"time_in": 256, "vector_in": 768, **({"guidance_in": 256} if guidance else {})}.items():
        rows |= linear(f"{name}.in_layer", d, width) | linear(f"{name}.out_layer", d, d)
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            rows |= linear(f"{block}_mod.lin", 18432, d)
            rows |= linear(f"{block}_attn.qkv", 9216, d) | linear(f"{block}_attn.proj", d, d)
            rows |= linear(f"{block}_mlp.0", 12288, d) | linear(f"{block}_mlp.2", d, 12288)
            rows |= {f"{block}_attn.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    for i in range(38):
        block = f"single_blocks.{i}"
        rows |= linear(f"{block}.linear1", 21504, d) | linear(f"{block}.linear2", d, 15360)
        rows |= linear(f"{block}.modulation.lin", 9216, d)
        rows |= {f"{block}.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    return rows | linear("final_layer.linear", 64, d) | linear("final_layer.adaLN_modulation.1", 6144, d)


@pytest.mark.parametrize(
    ("name", "channels", "guidance", "count"),
    [
        ("FLUX_DEV", 64, True, 11_901_408_320),
        ("FLUX_SCHNELL", 64, False, 11_891_178_560),
        ("FLUX_FILL", 384, True, 11_902_391_360),
        ("FLUX_CONTROL", 128, True, 11_901_604_928),
    ],
)
def test_released_sizes_have_the_published_names_and_shapes(name, channels, guidance, count):
    with torch.device("meta"):
        network = Flux(getattr(flux, name))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes == published(channels, guidance)
    assert len(shapes) == (780 if guidance else 776)
    assert sum(math.prod(shape) for shape in shapes.values()) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 63}, "width=63 does not divide into num_heads=4"),
        ({"axes": (4, 6, 8)}, "add up to a head's width, 16"),
        ({"axes": (5, 5, 6)}, "three even numbers"),
        ({"in_channels": 66}, "in_channels=66, out_channels=64: both are of tokens"),
        ({"depth": -1}, "depth=-1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is more than 0"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        Flux(replace(flux.FLUX_TINY, **changes))
