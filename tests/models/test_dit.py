"""DiT and SiT against diffusers' network, with every parameter filled with noise, and at the published sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import diffusers
import pytest
import torch
from torch import Tensor, nn

from limner.checkpoints.dit import diffusers_layout, joined
from limner.checkpoints.layouts import read
from limner.errors import UsageError
from limner.models import dit
from limner.models.dit import DiT, DiTConfig
from limner.types import Conditioning
from parity import assert_same_gradients, backward, difference, gradients_of

# Odd ones: widths that are no powers of two, heads of unlike width, tokens of unlike size.
ODD = DiTConfig(
    width=36, depth=3, num_heads=3, num_classes=9, size=6, guided_channels=0, freq_shift=1, eps=1e-5
)  # as diffusers computes
CONFIGS = {
    "a learned variance": ODD,
    "none, larger patches": replace(
        ODD, channels=3, out_channels=3, patch=4, width=40, depth=2, num_heads=5, size=12, eps=1e-2
    ),
}


def reference(config: DiTConfig) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.width // config.num_heads,
        in_channels=config.channels, out_channels=config.out_channels, num_layers=config.depth,
        sample_size=config.size, patch_size=config.patch, num_embeds_ada_norm=config.num_classes, norm_eps=config.eps,
    )  # fmt: skip


def noised(network: nn.Module, seed: int = 0) -> nn.Module:
    """The copies of what embeds time and class are the same in every block of diffusers."""
    generator, first = torch.Generator().manual_seed(seed), {}
    for name, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        noise = 0.3 * noise if parameter.dim() == 1 else noise / parameter[0].numel() ** 0.5
        _, copy, rest = name.partition(".norm1.emb.")
        parameter.data = (first.setdefault(rest, noise) if copy else noise).to(parameter.dtype)
    return network


def pair(config: DiTConfig, dtype: torch.dtype) -> tuple[DiT, nn.Module]:
    theirs = noised(reference(config)).to(dtype).eval()
    ours = DiT(config).to(dtype).eval()
    ours.load_state_dict(read(diffusers_layout(config), joined(config, theirs.state_dict(), "file"), "file"))
    return ours, theirs


def inputs(config: DiTConfig, dtype: torch.dtype, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, times and labels; the last is no class."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.channels, *(size or (config.size,) * 2), generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor([999, 0, 123]), torch.tensor([8, 0, config.num_classes])


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_equal_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    x, t, labels = inputs(config, torch.float64)
    a, b = ours(x, t, Conditioning(labels=labels)), theirs(x, t, labels).sample
    assert difference(a, b) <= 1e-10

    backward(a, b)
    gradients: dict[str, Tensor] = {}
    for key, parameter in theirs.named_parameters():  # of copies, their sum; the last layer reads those of block 0
        before, copy, rest = key.partition(".norm1.emb.")
        key = f"transformer_blocks.0{copy}{rest}" if copy else before
        gradients[key] = gradients.get(key, 0) + parameter.grad
    gradients["pos_embed"] = torch.zeros_like(ours.pos_embed)
    expected = read(diffusers_layout(config), gradients, "gradients")
    expected.pop("pos_embed")
    assert_same_gradients(gradients_of(ours), expected)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_output_equals_that_of_diffusers_in_single_precision(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float32)
    x, t, labels = inputs(config, torch.float32)
    assert difference(ours(x, t, Conditioning(labels=labels)), theirs(x, t, labels).sample) <= 1e-5


@torch.no_grad()
def test_time_and_norms_are_those_of_the_authors_unless_diffusers_are_asked_for():
    """Their program, as they published it, divides by as many frequencies as there are, and has one epsilon."""
    config = replace(ODD, freq_shift=0, eps=1e-6)
    ours, theirs = pair(config, torch.float64)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    x, t, labels = inputs(config, torch.float64)
    assert difference(ours(x, t, Conditioning(labels=labels)), theirs(x, t, labels).sample) <= 1e-10
    assert config == DiTConfig(width=36, depth=3, num_heads=3, num_classes=9, size=6, guided_channels=0)


@pytest.mark.parametrize("to_data", [False, True])
@torch.no_grad()
def test_times_made_at_once_will_do_in_their_place(to_data):
    network = noised(DiT(replace(ODD, to_data=to_data)).double())
    x, _, labels = inputs(ODD, torch.float64)
    cond, asked = Conditioning(labels=labels), (0.9, 0.0, 0.5, 0.25)
    made = network.times(torch.tensor(asked), len(x), cond)
    assert made.shape == (4, 3, (6 * 3 + 2) * 36)
    for time, row in zip(asked, made, strict=True):
        assert difference(network(x, row, cond), network(x, torch.full((len(x),), time), cond)) <= 1e-12
    assert difference(network(x, made[0], cond), network(x, made[1], cond)) > 1e-3


@torch.no_grad()
def test_a_sit_counts_from_noise_to_data_and_its_velocity_points_there():
    plain, turned = (noised(DiT(replace(ODD, to_data=to_data)).double()) for to_data in (False, True))
    x, t, labels = inputs(ODD, torch.float64)
    t, cond = t.double() / 1000, Conditioning(labels=labels)
    assert torch.equal(turned(x, 1 - t, cond), -plain(x, 1 - (1 - t), cond)[:, :4])


@torch.no_grad()
def test_positions_are_the_published_table_and_elsewhere_the_same_picture_on_another_grid():
    """Columns come first; on a grid twice as fine every second place is one of the table."""
    network = DiT(DiTConfig(width=8, depth=1, num_heads=1, size=6))
    # at row 1, column 2: sines of 2 and 2 / 100, their cosines, then those of the row
    known = torch.tensor([2, 0.02, 2, 0.02, 1, 0.01, 1, 0.01])
    known = torch.cat([known[:2].sin(), known[2:4].cos(), known[4:6].sin(), known[6:].cos()])
    table = network.positions(3, 3)
    assert table is network.pos_embed
    assert (table[0, 3 + 2] - known).abs().max() < 1e-7
    fine = network.positions(6, 12).unflatten(1, (6, 12))
    assert (fine[:, ::2, :6:2].flatten(1, 2) - table).abs().max() < 1e-6
    x = torch.zeros(2, 4, 12, 24)
    assert network(x, torch.zeros(2), Conditioning(labels=torch.zeros(2, dtype=torch.long))).shape == (2, 8, 12, 24)


@torch.no_grad()
def test_it_starts_by_saying_nothing():
    network = DiT(dit.DIT_TINY)
    x, t, labels = inputs(dit.DIT_TINY, torch.float32)
    assert not network(x, t, Conditioning(labels=labels)).any()
    assert all(p.isfinite().all() for p in network.parameters())
    for name, p in network.named_parameters():
        assert p.dim() == 1 or p.any() == ("adaLN" not in name and name != "final_layer.linear.weight"), name


# What the authors' names for them say: width, depth, heads, and millions of parameters, as the paper's table 1.
NAMED = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


@lru_cache
def on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", NAMED)
def test_released_sizes_are_those_of_the_paper(size, patch):
    config = getattr(dit, f"DIT_{size}_{patch}")
    width, depth, heads, millions = NAMED[size]
    assert (config.width, config.depth, config.num_heads, config.patch) == (width, depth, heads, patch)
    parameters = sum(p.numel() for p in on_meta(config).parameters())
    assert abs(parameters / 1e6 - millions) < 1.2


def published(side: int) -> dict[str, tuple[int, ...]]:
    """Of DiT-XL-2-256x256.pt and DiT-XL-2-512x512.pt, every name and shape."""
    d, linear = 1152, lambda n, m: {"weight": (n, m), "bias": (n,)}
    modules = {
        "x_embedder.proj": {"weight": (d, 4, 2, 2), "bias": (d,)},
        "t_embedder.mlp.0": linear(d, 256),
        "t_embedder.mlp.2": linear(d, d),
        "y_embedder.embedding_table": {"weight": (1001, d)},
        "final_layer.linear": linear(32, d),
        "final_layer.adaLN_modulation.1": linear(2 * d, d),
    }
    for i in range(28):
        modules |= {
            f"blocks.{i}.attn.qkv": linear(3 * d, d),
            f"blocks.{i}.attn.proj": linear(d, d),
            f"blocks.{i}.mlp.fc1": linear(4 * d, d),
            f"blocks.{i}.mlp.fc2": linear(d, 4 * d),
            f"blocks.{i}.adaLN_modulation.1": linear(6 * d, d),
        }
    named = {f"{module}.{name}": shape for module, shapes in modules.items() for name, shape in shapes.items()}
    return named | {"pos_embed": (1, (side // 2) ** 2, d)}


@pytest.mark.parametrize(("name", "side"), [("DIT_XL_2", 32), ("DIT_XL_2_512", 64), ("SIT_XL_2", 32)])
def test_names_and_shapes_are_the_published_ones(name, side):
    network = on_meta(getattr(dit, name))
    found = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert found == published(side)
    assert len(found) == 292


@pytest.mark.slow
def test_it_is_compiled_as_one_graph():
    network = noised(DiT(dit.DIT_TINY))
    x, t, labels = inputs(dit.DIT_TINY, torch.float32, (8, 12))
    cond = Conditioning(labels=labels)
    made = network.times(torch.tensor([0.5]), 3, cond)[0]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for told in (t, made):
        assert torch.equal(compiled(x, told, cond), network(x, told, cond))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 30}, "width=30 is not in fours"),
        ({"width": 40, "num_heads": 3}, "not in parts over num_heads=3"),
        ({"size": 33}, "size=33 is not in patches of 2"),
        ({"out_channels": 5}, "out_channels=5 is neither channels=4 nor twice as many"),
    ],
)
def test_what_is_no_network_is_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        DiT(replace(dit.DIT_TINY, **changes))
