"""CLIP's text tower against transformers' CLIPTextModel and CLIPTextModelWithProjection, every parameter noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from limner.errors import UsageError
from limner.text import bpe
from limner.text.clip import (
    CLIP_L,
    CLIP_TINY,
    OPENCLIP_BIGG,
    OPENCLIP_H,
    OPENCLIP_H_SD2,
    CLIPText,
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPTowers,
    CLIPTowersConfig,
)

EOT = 98
ODD = {
    "quick_gelu": CLIPTextConfig(
        width=48, depth=3, num_heads=4, hidden=80, projection=None, vocabulary=99, context=13, eot=EOT, pad=EOT
    ),
    "gelu": CLIPTextConfig(
        width=30, depth=4, num_heads=3, hidden=104, activation="gelu", projection=22, vocabulary=99, context=11,
        eot=EOT, pad=0, norm_eps=1e-3,
    ),
    "eot in the middle": CLIPTextConfig(
        width=20, depth=1, num_heads=5, hidden=16, activation="gelu", projection=24, vocabulary=131, context=9, eot=40,
        pad=3,
    ),
    "largest id": CLIPTextConfig(
        width=32, depth=2, num_heads=1, hidden=128, projection=8, vocabulary=99, context=13, eot=None, pad=0
    ),
}  # fmt: skip


def oracle(config: CLIPTextConfig):
    """transformers' model of the same shape, with a projection where ours has one."""
    from transformers import CLIPTextConfig as Config
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    theirs = Config(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        projection_dim=config.projection or 512,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.context,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_eps,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2 if config.eot is None else config.eot,
        attn_implementation="sdpa",
    )
    return (CLIPTextModelWithProjection if config.projection else CLIPTextModel)(theirs).eval()


def pair(config: CLIPTextConfig, dtype: torch.dtype):
    """Ours and theirs with the same noise in every parameter."""
    ours = CLIPText(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)).to(dtype)
    theirs = oracle(config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def some_ids(config: CLIPTextConfig) -> torch.Tensor:
    """Texts of several lengths with pads after EOT, one with two EOTs, one that fills the context."""
    eot = config.vocabulary - 1 if config.eot is None else config.eot
    words = [i for i in range(4, config.vocabulary) if i != eot]
    generator = torch.Generator().manual_seed(1)
    pick = torch.randint(len(words), (5, config.context), generator=generator)
    ids = torch.tensor(words)[pick]
    for row, end in enumerate((1, 3, config.context - 2, config.context - 1, 4)):
        ids[row, end] = eot
        ids[row, end + 1 :] = config.pad
    ids[4, config.context - 1] = eot
    return ids


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_states_and_pooled_vectors_equal_those_of_transformers(name, dtype, tolerance):
    config = ODD[name]
    ours, theirs = pair(config, dtype)
    ids = some_ids(config)
    with torch.no_grad():
        found = ours(ids)
        expected = theirs(input_ids=ids, output_hidden_states=True)
    assert len(found.hidden) == len(expected.hidden_states) == config.depth + 1
    for mine, other in zip(found.hidden, expected.hidden_states, strict=True):
        assert close(mine, other, tolerance)
    assert close(found.last, expected.last_hidden_state, tolerance)
    assert close(found.pooled, expected.text_embeds if config.projection else expected.pooler_output, tolerance)


@pytest.mark.parametrize("name", ODD)
def test_gradients_equal_those_of_transformers_and_none_is_missing(name):
    config = ODD[name]
    ours, theirs = pair(config, torch.float64)
    ids = some_ids(config)
    found = ours(ids)
    expected = theirs(input_ids=ids)
    weight = torch.linspace(-1, 1, found.pooled.numel(), dtype=torch.float64).view_as(found.pooled)
    ((found.pooled * weight).sum() + found.last.pow(3).mean()).backward()
    pooled = expected.text_embeds if config.projection else expected.pooler_output
    ((pooled * weight).sum() + expected.last_hidden_state.pow(3).mean()).backward()
    others = dict(theirs.named_parameters())
    scale = max(parameter.grad.abs().max() for parameter in others.values())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0 or key.endswith("k_proj.bias"), key  # moves all of a softmax alike
        assert (parameter.grad - others[key].grad).abs().max() <= 1e-10 * scale, key


@pytest.mark.parametrize("name", ODD)
def test_single_precision_gradients_equal_those_of_transformers(name):
    ours, theirs = pair(ODD[name], torch.float32)
    ids = some_ids(ODD[name])
    ours(ids).last.pow(3).mean().backward()
    theirs(input_ids=ids).last_hidden_state.pow(3).mean().backward()
    others = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if not key.startswith("text_projection"):
            expected = others[key].grad
            bias = key.endswith("k_proj.bias")  # its gradient is a rounding error
            assert bias or close(parameter.grad, expected, 1e-4), key


@pytest.mark.parametrize(
    "config",
    [CLIP_L, replace(CLIP_L, projection=768), OPENCLIP_H, OPENCLIP_H_SD2, OPENCLIP_BIGG],
    ids=["L", "L projected", "H", "H of SD2", "bigG"],
)
def test_names_and_shapes_of_the_released_sizes_equal_those_of_transformers(config):
    with torch.device("meta"):
        ours, theirs = CLIPText(config), oracle(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in shapes


@pytest.mark.parametrize(
    ("config", "millions"), [(CLIP_L, 123.06), (OPENCLIP_H, 354.03), (OPENCLIP_H_SD2, 340.39), (OPENCLIP_BIGG, 694.66)]
)
def test_the_released_sizes_have_the_parameters_that_are_known(config, millions):
    with torch.device("meta"):
        model = CLIPText(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_fresh_model_starts_as_openai_says():
    config = replace(CLIP_TINY, width=64, depth=8, vocabulary=500, eot=499, pad=499)
    torch.manual_seed(0)
    weights = CLIPText(config).state_dict()
    layer = "text_model.encoder.layers.1."
    for name, deviation in {
        "text_model.embeddings.token_embedding.weight": 0.02,
        "text_model.embeddings.position_embedding.weight": 0.01,
        layer + "self_attn.k_proj.weight": 64**-0.5,
        layer + "self_attn.out_proj.weight": 64**-0.5 * 16**-0.5,
        layer + "mlp.fc1.weight": 128**-0.5,
        layer + "mlp.fc2.weight": 64**-0.5 * 16**-0.5,
        "text_projection.weight": 64**-0.5,
    }.items():
        assert weights[name].std() == pytest.approx(deviation, rel=0.1), name
    assert weights[layer + "mlp.fc1.bias"].abs().max() == 0


# ---------------------------------------------------------------- with the tokenizer


def encoder(**changes) -> CLIPTextEncoder:
    options = {name: changes.pop(name) for name in ("skip", "normed") if name in changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPTextEncoder(replace(CLIP_TINY, **changes), bpe.shipped(), **options).eval()


@pytest.mark.parametrize("pad", [49407, 0])
def test_prompts_are_marked_and_filled_up_with_the_models_own_pad(pad):
    ids = encoder(pad=pad).tokenize(["a photo of a cat", ""])
    assert ids.tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70],
        [49406, 49407, *[pad] * 75],
    ]


@pytest.mark.parametrize("config", [{}, {"pad": 0}])
def test_prompts_get_the_ids_and_the_cut_of_transformers(config, tmp_path):
    import json

    from transformers import CLIPTokenizer

    model = json.loads(bpe.shipped().tokenizer.to_str())["model"]
    oracle = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    prompts = ["", "a red fox", "fox " * 75, "fox " * 76, "fox " * 200, "fox " * 74 + "<|endoftext|> fox", "🦊" * 80]
    expected = oracle(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    filled = torch.where(expected["attention_mask"].bool(), expected["input_ids"], config.get("pad", 49407))
    assert torch.equal(encoder(**config).tokenize(prompts), filled)


def test_a_prompt_is_cut_at_its_end_and_the_cut_is_told():
    clip = encoder()
    (word,) = clip.tokenizer.encode(["word"], marked=False)[0]
    assert clip.tokenize(["word " * 100]).tolist() == [[49406, *[word] * 75, 49407]]
    assert clip.words_cut("word " * 100).split() == ["word"] * 25
    assert clip.words_cut("word " * 75) == ""
    assert clip.words_cut("Word " * 75 + "END") == "END"


def test_layers_are_skipped_and_normed_as_asked():
    prompts = ["a red fox", ""]
    states = encoder()(encoder().tokenize(prompts))
    norm = encoder().norm
    for skip, normed, expected in [
        (0, True, states.last),
        (1, True, norm(states.hidden[-2])),
        (1, False, states.hidden[-2]),
        (3, False, states.hidden[0]),
    ]:
        cond = encoder(skip=skip, normed=normed).encode(prompts)
        assert torch.equal(cond.tokens, expected)
        assert torch.equal(cond.pooled, states.pooled)
        assert cond.tokens.shape == (2, 77, 32)
        assert cond.pooled.shape == (2, 16)


def test_the_weights_of_an_encoder_have_the_names_of_its_tower():
    assert encoder().state_dict().keys() == CLIPText(CLIP_TINY).state_dict().keys()


def test_the_last_layers_skipped_are_as_if_they_were_not_there():
    """Stable Diffusion 2 is published with all layers, of which the last is skipped, and without the last."""
    whole, short = encoder(pad=0, skip=1), encoder(pad=0, depth=2)
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if ".layers.2." not in k})
    assert torch.equal(whole.encode(["a red fox"]).tokens, short.encode(["a red fox"]).tokens)


def test_towers_stand_side_by_side():
    config = CLIPTowersConfig(towers=(CLIP_TINY, replace(CLIP_TINY, width=48, num_heads=3, pad=0)), skip=1)
    towers, prompts = CLIPTowers(config, [bpe.shipped()] * 2), ["a red fox", "word " * 100, ""]
    one, two = (tower.encode(prompts) for tower in towers)
    both = towers.encode(prompts)
    assert config.width == 80
    assert both.tokens.shape == (3, 77, 80)
    assert torch.equal(both.tokens, torch.cat([one.tokens, two.tokens], dim=-1))
    assert torch.equal(one.tokens, towers[0].norm(towers[0](towers[0].tokenize(prompts)).hidden[-2]))
    assert torch.equal(both.pooled, two.pooled)
    assert one.mask is both.mask is None  # the networks attend to what follows EOT


def test_towers_may_give_zeros_for_an_empty_prompt():
    config, prompts = CLIPTowersConfig(towers=(CLIP_TINY,), zero_empty=True), ["", "a red fox"]
    cond = CLIPTowers(config, [bpe.shipped()]).encode(prompts)
    assert cond.tokens.abs().amax((1, 2)).bool().tolist() == [False, True]
    assert cond.pooled.abs().amax(1).bool().tolist() == [False, True]


def test_eot_comes_from_the_tokenizer_where_the_model_does_not_know_it():
    """With the largest id, a word added by textual inversion would be taken for the end."""
    tokenizer = bpe.CLIPTokenizer(
        bpe.shipped().tokenizer.get_vocab(), [], added=[{"content": "<cat-toy>", "id": 49408}]
    )
    clip = CLIPTextEncoder(replace(CLIP_TINY, vocabulary=49409, eot=None), tokenizer)
    ids = clip.tokenize(["<cat-toy>"])
    assert ids[0, :4].tolist() == [49406, 49408, 49407, 49407]
    assert clip.eot_positions(ids).tolist() == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "width=32 is not in equal parts over num_heads=5"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"activation": "relu"}, "activation='relu' is not one of quick_gelu, gelu"),
        ({"pad": 49408}, "pad=49408 and eot=49407 are not both of vocabulary=49408"),
        ({"eot": -1}, "eot=-1"),
        ({"context": 1}, "context=1"),
        ({"skip": 4}, "skip=4: the text encoder has 3 layers"),
        ({"skip": -1}, "skip=-1"),
        ({"vocabulary": 49407, "pad": 0, "eot": 5}, "the tokenizer has 49408 ids and EOT 49407, .* 49407 and 5"),
        ({"eot": 5}, "they are not of one model"),
    ],
)
def test_what_no_tower_can_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        encoder(**changes)
