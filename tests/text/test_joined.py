"""What SD3 and FLUX read with against diffusers' pipelines of the same small towers, every parameter noise."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from limner.errors import UsageError
from limner.text import bpe, unigram
from limner.text.clip import CLIP_TINY
from limner.text.joined import (
    FLUX_DEV_TEXT,
    FLUX_SCHNELL_TEXT,
    SD3_TEXT,
    FluxText,
    FluxTextConfig,
    SD3Text,
    SD3TextConfig,
)
from limner.text.prompts import parse
from limner.text.t5 import T5_TINY

from . import test_clip, test_t5

BARE = replace(CLIP_TINY, projection=None)
WIDE = replace(CLIP_TINY, width=20, num_heads=2, depth=4, projection=24, activation="gelu", pad=0)
T5 = replace(T5_TINY, width=60, num_heads=3)
SD3 = SD3TextConfig(clip_l=BARE, clip_g=WIDE, t5xxl=T5, tokens=21, width=60)
SD3_ODD = SD3TextConfig(
    clip_l=CLIP_TINY, clip_g=replace(WIDE, width=24), t5xxl=replace(T5, width=56), tokens=90, width=56
)
FLUX = FluxTextConfig(clip_l=BARE, t5xxl=T5, tokens=30)
PROMPTS = ["a red fox", "", "a (very:1.3) long one, " * 40, "a 猫 café <extra_id_3> BREAK [a|b]", "a red fox"]


def noisy(module):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.eval().named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 * parameter.shape[-1] ** -0.5 if name.endswith("q.weight") else parameter.shape[-1] ** -0.5
        parameter.data = noise * scale if parameter.dim() > 1 else 1 + 0.5 * noise
    return module


@pytest.fixture(scope="module")
def tokenizers():
    """transformers' of CLIP-L, CLIP-G and T5."""
    from transformers import CLIPTokenizer, T5Tokenizer

    model = json.loads(bpe.shipped().tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    first, second = (
        CLIPTokenizer(vocab=model["vocab"], merges=merges, pad_token=pad) for pad in ("<|endoftext|>", "!")
    )
    stored = json.loads(unigram.shipped().tokenizer.to_str())
    pieces, charsmap = unigram._of_json(json.dumps(stored).encode(), "file")
    return first, second, T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap)


def clip(tower, projected: bool):
    """transformers' tower, whose projection is the identity where ours has none and one is asked for."""
    config = (
        tower.config
        if tower.config.projection or not projected
        else replace(tower.config, projection=tower.config.width)
    )
    model = test_clip.oracle(config)
    weights = dict(tower.state_dict())
    if config.projection != tower.config.projection:
        weights["text_projection.weight"] = torch.eye(config.width)
    model.load_state_dict(weights)
    return model


def t5(encoder):
    model = test_t5.oracle(encoder.config)
    model.load_state_dict(encoder.state_dict(), strict=False)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def sd3_oracle(ours, tokenizers):
    from types import SimpleNamespace

    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.__new__(StableDiffusion3Pipeline)
    first, second, third = tokenizers
    pipe.__dict__.update(
        tokenizer=first, tokenizer_2=second, tokenizer_3=third, tokenizer_max_length=77,
        text_encoder=clip(ours.clip_l, True), text_encoder_2=clip(ours.clip_g, True),
        text_encoder_3=None if ours.t5xxl is None else t5(ours.t5xxl),
        transformer=SimpleNamespace(config=SimpleNamespace(joint_attention_dim=ours.config.width)),
    )  # fmt: skip
    return pipe


def close(found, expected, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def groups(prompts):
    return [[parse(prompt, "plain").parts[0].turns[0][1]] for prompt in prompts]


@pytest.mark.parametrize("config", [SD3, SD3_ODD, replace(SD3, t5xxl=None)], ids=["unprojected", "projected", "no T5"])
@pytest.mark.parametrize("clip_skip", [None, 2, 3])
def test_sd3_is_told_what_diffusers_tells(config, clip_skip, tokenizers):
    ours = noisy(SD3Text(config))
    with torch.no_grad():
        tokens, _, pooled, _ = sd3_oracle(ours, tokenizers).encode_prompt(
            PROMPTS, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False,
            max_sequence_length=config.tokens, clip_skip=None if clip_skip is None else clip_skip - 2,
        )  # fmt: skip
    found = ours.read(groups(PROMPTS), "plain", clip_skip)
    assert found.tokens.shape == (5, 77 + config.tokens, config.width)
    assert close(found.tokens[:, :77], tokens[:, :77])
    assert close(found.tokens[:, 77:], tokens[:, 77:])
    assert close(found.pooled, pooled)
    assert found.pooled.shape[1] == config.pooled_width
    assert found.mask is None


def test_flux_is_told_what_diffusers_tells(tokenizers):
    from diffusers import FluxPipeline

    ours = noisy(FluxText(FLUX))
    pipe = FluxPipeline.__new__(FluxPipeline)
    first, _, second = tokenizers
    pipe.__dict__.update(
        tokenizer=first, tokenizer_2=second, tokenizer_max_length=77,
        text_encoder=clip(ours.clip_l, False), text_encoder_2=t5(ours.t5xxl),
    )  # fmt: skip
    with torch.no_grad():
        tokens, pooled, _ = pipe.encode_prompt(PROMPTS, None, torch.device("cpu"), max_sequence_length=30)
    found = ours.read(groups(PROMPTS), "plain", None)
    assert found.tokens.shape == (5, 30, 60)
    assert close(found.tokens, tokens)
    assert close(found.pooled, pooled)
    assert found.mask is None


def test_sizes_are_those_of_the_published_models():
    assert (SD3_TEXT.width, SD3_TEXT.pooled_width, SD3_TEXT.tokens) == (4096, 2048, 256)
    assert (FLUX_DEV_TEXT.width, FLUX_DEV_TEXT.pooled_width, FLUX_DEV_TEXT.tokens) == (4096, 768, 512)
    assert replace(FLUX_DEV_TEXT, tokens=256) == FLUX_SCHNELL_TEXT
    with torch.device("meta"):
        names = SD3Text(SD3_TEXT).state_dict().keys()
    assert {
        "clip_l.text_model.encoder.layers.11.mlp.fc1.weight",
        "clip_g.text_projection.weight",
        "t5xxl.encoder.block.23.layer.1.DenseReluDense.wo.weight",
    } <= names
    assert not any(name.startswith("clip_l.text_projection") for name in names)


def test_rows_are_those_of_the_texts_in_their_order():
    ours = noisy(FluxText(FLUX))
    both = ours.read([groups(["a fox"])[0] + groups([""])[0], groups(["a fox"])[0]], "plain", None, zero=False)
    assert both.tokens.shape[0] == 3
    assert torch.equal(both.tokens[0], both.tokens[2])
    assert close(both.pooled[1:2], ours.encode([""]).pooled)
    assert both.pooled[1].abs().max() > 0


def test_what_nothing_reads_is_told_and_what_t5_alone_reads_is_known():
    long = " ".join(f"word{k}" for k in range(60))
    sd3, bare, flux = SD3Text(SD3), SD3Text(replace(SD3, t5xxl=None)), FluxText(replace(FLUX, tokens=300))
    assert long.endswith(sd3.words_cut(long))
    assert 0 < len(sd3.words_cut(long)) < len(long)
    assert bare.words_cut(long) == bare.words_beyond_clip(long) == flux.words_beyond_clip(long)
    assert bare.words_cut("fox " * 75) == ""
    assert bare.words_cut("fox " * 77).split() == ["fox"] * 2
    assert flux.words_cut(long) == ""
    assert flux.words_unknown("a 猫") == "猫"
    assert sd3.words_unknown("a 猫") == ""


def test_prompts_are_read_plainly():
    assert SD3Text.dialects == FluxText.dialects == ("plain",)
    assert SD3Text(SD3).clip_skip == 2
    assert FluxText.clip_skip is None
    assert SD3Text.learned == frozenset()


@pytest.mark.parametrize("skip", [0, 4])
def test_a_clip_skip_beyond_the_layers_is_refused(skip):
    with pytest.raises(UsageError, match=f"clip skip is {skip}: this model's text encoders .* can stop 1 to 3 from"):
        SD3Text(replace(SD3, t5xxl=None)).encode(["a"], skip)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SD3, width=64), "width=64: it must hold 52 of CLIP's, and be T5's, 60"),
        (lambda: replace(SD3, width=40, t5xxl=None), "width=40: it must hold 52 of CLIP's"),
        (lambda: replace(SD3, tokens=0), "tokens=0"),
        (lambda: replace(FLUX, tokens=10**9), "tokens=1000000000"),
        (lambda: replace(FLUX, clip_l=CLIP_TINY), "projection=16: FLUX takes CLIP's vector without one"),
    ],
)
def test_what_no_model_reads_with_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
