"""T5's encoder against transformers' T5EncoderModel, every parameter noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from limner.errors import UsageError
from limner.text import unigram
from limner.text.t5 import T5_TINY, T5_XXL, T5Config, T5Encoder, T5TextEncoder, bucket_edges

ODD = {
    "wide heads": T5Config(width=24, hidden=40, depth=3, num_heads=3, head_width=10, vocabulary=99),
    "narrow heads": T5Config(
        width=50, hidden=36, depth=2, num_heads=4, head_width=6, vocabulary=61, buckets=12, max_distance=20
    ),
}


class Exact(TorchFunctionMode):
    """transformers takes means and softmaxes in float32 whatever it is given; here float64 stays what it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rounds = func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,))
        if rounds and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def oracle(config: T5Config):
    from transformers import T5Config as Config
    from transformers import T5EncoderModel

    theirs = Config(
        vocab_size=config.vocabulary,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.hidden,
        num_layers=config.depth,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(theirs).eval()


def noisy(config: T5Config, dtype: torch.dtype) -> T5Encoder:
    ours = T5Encoder(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        noise = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + noise / 2
        parameter.data = (noise * config.head_width**-0.5 if name.endswith("q.weight") else noise).to(dtype)
    return ours


def pair(config: T5Config, dtype: torch.dtype):
    """Ours and theirs with the same noise in every parameter."""
    ours, theirs = noisy(config, dtype), oracle(config).to(dtype)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing.missing_keys) <= {"encoder.embed_tokens.weight"}
    assert not missing.unexpected_keys
    theirs.encoder.embed_tokens.weight = theirs.shared.weight
    return ours, theirs


def some_ids(config: T5Config, length: int = 67) -> torch.Tensor:
    """Texts longer than all distances, one of padding alone after its end, one without any."""
    ids = torch.randint(3, config.vocabulary, (3, length), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((5, length - 1)):
        ids[row, end] = 1
        ids[row, end + 1 :] = 0
    return ids


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("length", [1, 67, 300])
def test_states_equal_those_of_transformers(name, dtype, tolerance, length):
    ours, theirs = pair(ODD[name], dtype)
    ids = some_ids(ODD[name], length) if length > 5 else torch.tensor([[1]])
    with torch.no_grad(), Exact():
        expected = theirs(input_ids=ids).last_hidden_state
    with torch.no_grad():
        assert error(ours(ids), expected) <= tolerance


@pytest.mark.parametrize("name", ODD)
def test_gradients_equal_those_of_transformers_and_none_is_missing(name):
    ours, theirs = pair(ODD[name], torch.float64)
    ids = some_ids(ODD[name])
    ours(ids).pow(3).mean().backward()
    with Exact():
        theirs(input_ids=ids).last_hidden_state.pow(3).mean().backward()
    others = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, key
        assert error(parameter.grad, others[key].grad) <= 1e-10, key


def test_all_attend_to_padding():
    ours, ids = noisy(ODD["wide heads"], torch.float64), torch.tensor([[5, 6, 1, 0, 0]])
    with torch.no_grad():
        assert error(ours(ids)[:, :3], ours(ids[:, :3])) > 1e-3


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (12, 20), (14, 33), (16, 64), (32, 200), (4, 9)])
def test_every_distance_is_in_the_bucket_of_transformers(buckets, most):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-2 * most, 2 * most + 1)
    expected = T5Attention._relative_position_bucket(distance, num_buckets=buckets, max_distance=most)
    edges = bucket_edges(buckets, most)
    found = [sum(abs(d) >= edge for edge in edges) + (buckets // 2) * (d > 0) for d in distance.tolist()]
    assert found == expected.tolist()
    assert len(edges) == buckets // 2 - 1


def test_the_edges_of_published_buckets():
    assert bucket_edges(32, 128) == (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)


def test_names_and_shapes_of_xxl_equal_those_of_transformers_and_so_does_their_number():
    with torch.device("meta"):
        ours, theirs = T5Encoder(T5_XXL), oracle(T5_XXL)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert shapes == {name: shape for name, shape in expected.items() if name != "encoder.embed_tokens.weight"}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 4_762_310_656
    assert shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == (32, 64)
    assert not any("relative" in name for name in shapes if ".block.0." not in name)


@pytest.mark.slow
def test_it_compiles_whole():
    ours, ids = noisy(ODD["wide heads"], torch.float32), some_ids(ODD["wide heads"])
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert error(compiled(ids), ours(ids)) <= 1e-6


def test_a_fresh_model_starts_as_t5_does():
    config = replace(T5_TINY, width=64, hidden=128, head_width=16, vocabulary=500)
    torch.manual_seed(0)
    weights = T5Encoder(config).state_dict()
    block = "encoder.block.1.layer."
    for name, deviation in {
        "shared.weight": 1,
        block + "0.SelfAttention.q.weight": (64 * 16) ** -0.5,
        block + "0.SelfAttention.k.weight": 64**-0.5,
        block + "0.SelfAttention.o.weight": 32**-0.5,
        block + "1.DenseReluDense.wi_1.weight": 64**-0.5,
        block + "1.DenseReluDense.wo.weight": 128**-0.5,
    }.items():
        assert weights[name].std() == pytest.approx(deviation, rel=0.1), name
    assert torch.equal(weights["encoder.final_layer_norm.weight"], torch.ones(64))


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_near_single(dtype, tolerance):
    ids = some_ids(T5_TINY)
    rounded = noisy(T5_TINY, torch.float32).to(dtype)
    exact = T5Encoder(T5_TINY)
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    with torch.no_grad():
        found = rounded(ids)
        assert found.dtype == dtype
        assert error(found.float(), exact(ids)) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_of_all_blocks_is_in_single_precision_from_the_first_on(dtype):
    t5, seen = noisy(T5_TINY, torch.float32).to(dtype), []
    for block in t5.encoder.block:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad():
        t5(some_ids(T5_TINY))
    assert seen == [torch.float32] * T5_TINY.depth


@pytest.mark.parametrize("times", [1.0, 150.0, 300.0])
def test_float16_holds_where_gates_and_sums_go_beyond_its_range(times):
    """`wi_0` and `wi_1` that large make numbers beyond 65504 of gate times value, of `wo` and of the sum."""
    weights = noisy(T5_TINY, torch.float32).half().state_dict()
    for name in weights:
        if ".wi_" in name:
            weights[name] = (weights[name] * times).half()
    half, exact = T5Encoder(T5_TINY).half(), T5Encoder(T5_TINY)
    half.load_state_dict(weights)
    exact.load_state_dict(weights)
    ids = some_ids(T5_TINY)
    sizes = []
    for block in exact.encoder.block:
        mlp = block.layer[1].DenseReluDense
        mlp.wo.register_forward_hook(lambda _, args, out: sizes.append((args[0].abs().max(), out.abs().max())))
    with torch.no_grad():
        expected, found = exact(ids), half(ids)
    assert found.isfinite().all()
    assert error(found.float(), expected) <= 5e-3
    assert (min(map(max, sizes)) > 65504) == (times > 1)


# ---------------------------------------------------------------- with the tokenizer


def encoder(tokens: int = 12) -> T5TextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5TextEncoder(T5_TINY, unigram.shipped(), tokens).eval()


def test_prompts_are_marked_and_filled_up_or_cut():
    assert encoder(6).tokenize(["a photo of a cat", "", "fox " * 9]).tolist() == [
        [3, 9, 1202, 13, 3, 1],
        [1, 0, 0, 0, 0, 0],
        [3, 20400, 3, 20400, 3, 1],
    ]


def test_prompts_are_encoded_without_a_mask_many_as_well_as_one():
    t5, prompts = encoder(), [f"a red fox {k}" for k in range(11)]
    cond = t5.encode(prompts)
    assert cond.tokens.shape == (11, 12, 32)
    assert cond.mask is cond.pooled is None
    assert error(cond.tokens[9:10], t5.encode(prompts[9:10]).tokens) <= 1e-6


def test_what_does_not_fit_is_told():
    t5 = encoder(6)
    assert t5.words_cut("the photo of the cat") == ""  # 5, and the mark
    assert t5.words_cut("the photo of the cat in the sun") == "in the sun"
    assert t5.words_cut("") == ""


def test_what_has_no_piece_is_told():
    assert encoder().words_unknown("a 猫 and 🦊 on a café ~ {x} Straße été") == "猫 🦊"


def test_the_weights_have_the_names_of_the_encoder():
    assert encoder().state_dict().keys() == T5Encoder(T5_TINY).state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0.*every size must be 1 or more"),
        ({"buckets": 7}, "buckets=7, max_distance=128: buckets must be in twos"),
        ({"buckets": 2}, "buckets=2"),
        ({"max_distance": 8}, "max_distance=8"),
        ({"vocabulary": 32099}, "the tokenizer has 32100 ids, T5 32099: they are not of one model"),
    ],
)
def test_what_no_t5_can_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        T5TextEncoder(replace(T5_TINY, **changes), unigram.shipped())


def test_no_tokens_at_all_are_refused():
    with pytest.raises(UsageError, match="tokens=0: the mark of the end alone is 1"):
        encoder(0)
