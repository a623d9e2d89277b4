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
from limner.text.prompts import parse

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


# ---------------------------------------------------------------- weights and chunks, against a second implementation


def noisy(config: CLIPTowersConfig) -> CLIPTowers:
    towers = CLIPTowers(config, [bpe.shipped()] * len(config.towers)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in towers.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5) + 0.1
    return towers


def theirs(towers: CLIPTowers, chunks: list[list[tuple[str, float]]], dialect: str, back: int) -> torch.Tensor:
    """By transformers, from what the wikis say: pieces' ids between marks, the states `back` from the last, A1111's
    product with the mean restored or ComfyUI's way from the empty prompt, chunk after chunk."""
    sides = []
    for tower in towers:
        model = oracle(tower.config)
        model.load_state_dict(tower.state_dict())
        model.config.pad_token_id = None

        def states(ids: list[int], model=model, tower=tower) -> torch.Tensor:
            filled = [49406, *ids, 49407]
            filled += [tower.config.pad] * (77 - len(filled))
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([filled]), output_hidden_states=True).hidden_states[-back]
                return model.text_model.final_layer_norm(hidden)[0] if tower.normed else hidden[0]

        side = []
        for pieces in chunks:
            ids = [bpe.shipped().encode([text], marked=False)[0] for text, _ in pieces]
            weights = torch.ones(77)
            weights[1 : 1 + sum(map(len, ids))] = torch.tensor(
                [w for row, (_, w) in zip(ids, pieces, strict=True) for _ in row]
            )
            z = states([i for row in ids for i in row])
            if dialect == "a1111" and (weights != 1).any():
                y = z * weights[:, None]
                z = y * (z.mean() / y.mean())
            elif dialect == "comfyui":
                empty = states([])
                z = empty + (z - empty) * weights[:, None]
            side.append(z)
        sides.append(torch.cat(side))
    return torch.cat(sides, dim=-1)


TWO = CLIPTowersConfig(towers=(CLIP_TINY, replace(CLIP_TINY, width=48, num_heads=3, pad=0)), skip=1, normed=False)
ONE = CLIPTowersConfig(towers=(replace(CLIP_TINY, projection=None),))
CAT, LONG = [("a ", 1.0), ("red", 1.3), (" cat, ", 1.0), ("night", 0.5)], "fox, " * 30


@pytest.mark.parametrize("config", [ONE, TWO], ids=["one tower", "two towers"])
@pytest.mark.parametrize("dialect", ["a1111", "comfyui"])
def test_weights_are_those_of_their_program(config, dialect):
    towers = noisy(config)
    text = parse("a (red:1.3) cat, (night:0.5)", dialect).parts[0].at(0)
    cond = towers.read([[text]], dialect, None)
    assert close(cond.tokens[0], theirs(towers, [CAT], dialect, 1 + config.skip), 1e-5)
    plain = towers.encode(["a red cat, night"])
    assert not close(cond.tokens, plain.tokens, 1e-2)
    assert close(cond.pooled, plain.pooled, 1e-6)  # has no weights


@pytest.mark.parametrize("dialect", ["a1111", "comfyui", "plain"])
def test_a_text_without_weights_is_read_as_ever(dialect):
    towers = noisy(TWO)
    cond, plain = (
        towers.read([[parse("a red fox", dialect).parts[0].at(0)]], dialect, None),
        towers.encode(["a red fox"]),
    )
    assert torch.equal(cond.tokens, plain.tokens)
    assert torch.equal(cond.pooled, plain.pooled)
    assert cond.mask is None


def test_a_long_text_is_read_in_chunks_and_nothing_is_cut():
    towers = noisy(ONE)
    text = parse(f"a {LONG}({'dog ' * 60}:1.4)").parts[0].at(0)
    wanted = {
        "a1111": [[("a " + LONG, 1.0)], [("dog " * 60, 1.4)]],  # the comma is 15 tokens before the end
        "comfyui": [[("a " + LONG, 1.0), ("dog " * 14, 1.4)], [("dog " * 46, 1.4)]],
    }
    for dialect, chunks in wanted.items():
        (row,) = towers.read([[text]], dialect, None).tokens
        assert row.shape == (154, 32)
        assert close(row, theirs(towers, chunks, dialect, 1), 1e-5), dialect
    long = parse("fox, " * 200, "plain").parts[0].at(0)
    assert [len(chunk) for chunk in towers[0].chunks(long, "plain")] == [75, 75, 75, 75, 75, 25]
    words = parse("fox " * 74 + "antidisestablish fox", "comfyui").parts[0].at(0)  # of four tokens
    assert [len(chunk) for chunk in towers[0].chunks(words, "comfyui")] == [74, 5]


def test_break_ends_a_chunk():
    towers = noisy(ONE)
    words = lambda text: [len(chunk) for chunk in towers[0].chunks(parse(text).parts[0].at(0), "a1111")]  # noqa: E731
    assert words("a red fox BREAK night") == [3, 1]
    assert words("BREAK night") == [0, 1]
    assert words("a BREAK BREAK b BREAK") == [1, 0, 1]
    assert words("") == [0]
    (row,) = towers.read([[parse("a red fox BREAK (night:1.2)").parts[0].at(0)]], "a1111", None).tokens
    assert close(row, theirs(towers, [[("a red fox", 1.0)], [("night", 1.2)]], "a1111", 1), 1e-5)


def test_texts_of_a_group_are_as_long_as_its_longest_and_a_mask_tells_groups_apart():
    towers = noisy(replace(TWO, zero_empty=True))
    short, long, empty = (parse(text).parts[0].at(0) for text in ("a red fox", "fox " * 80, ""))
    cond = towers.read([[short, empty], [long, short]], "a1111", None)
    assert cond.mask.sum(1).tolist() == [77, 77, 154, 154]
    assert cond.mask[:, :77].all()
    for row, chunks in ((0, [[("a red fox", 1.0)]]), (3, [[("a red fox", 1.0)], [("", 1.0)]])):
        assert close(cond.tokens[row][cond.mask[row]], theirs(towers, chunks, "a1111", 2), 1e-5)
    assert not cond.tokens[1].any()
    assert not cond.pooled[1].any()
    assert towers.read([[long, empty]], "a1111", None).mask is None
    assert torch.equal(cond.pooled[3], cond.pooled[0])  # of the first chunk


def test_clip_skip_counts_layers_from_the_last():
    towers = noisy(replace(ONE, towers=(replace(CLIP_TINY, depth=4, projection=None),)))
    text = parse("a red fox").parts[0].at(0)
    for skip in (1, 2, 4):
        (row,) = towers.read([[text]], "a1111", skip).tokens
        assert close(row, theirs(towers, [[("a red fox", 1.0)]], "a1111", skip), 1e-5), skip
    assert towers.clip_skip == 1
    for skip in (0, 5):
        with pytest.raises(
            UsageError, match=f"clip skip is {skip}: this model's text encoder can stop 1 to 4 from its"
        ):
            towers.checked(skip)
    with torch.device("meta"):
        whole, short = (
            CLIPTowers(CLIPTowersConfig(towers=(tower,), skip=skip), [bpe.shipped()])
            for tower, skip in ((OPENCLIP_H, 1), (OPENCLIP_H_SD2, 0))
        )
    assert whole.clip_skip == short.clip_skip == 2  # the file of the latter lacks the last layer
    assert (whole.clip_skips, short.clip_skips) == (range(1, 25), range(2, 25))


def test_clip_skip_means_the_same_where_a_file_lacks_the_last_layer():
    tower, text = replace(CLIP_TINY, projection=None), parse("a red fox").parts[0].at(0)
    whole = noisy(CLIPTowersConfig(towers=(tower,), skip=1))
    short = CLIPTowers(CLIPTowersConfig(towers=(replace(tower, depth=2),)), [bpe.shipped()]).eval()
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if ".layers.2." not in k})
    short.left_out, short.clip_skip, short.clip_skips = 1, 2, range(2, 4)  # as those of Stable Diffusion 2 have it
    for skip in (None, 2, 3):
        one, other = (towers.read([[text]], "a1111", skip).tokens for towers in (whole, short))
        assert torch.equal(one, other), skip
