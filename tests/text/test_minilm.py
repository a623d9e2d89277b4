"""The text encoder against transformers' BertModel with the same weights, all of them noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from limner import catalog
from limner.text import minilm
from limner.text.minilm import MiniLM

TEXTS = ["3d emoji of a red fox", "", "zzz", "Größe: 猫 🦊 naïve", "a " * 60]


@pytest.fixture(scope="module")
def noisy() -> MiniLM:
    encoder = MiniLM(catalog.WEIGHTS / "minilm" / "tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return encoder.eval()


def test_token_states_equal_transformers(noisy):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    oracle = BertModel(config, add_pooling_layer=False).eval()
    oracle.load_state_dict(noisy.state_dict())
    ids, mask = noisy.tokenize(TEXTS)
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        found = noisy(ids, mask)
    assert (found - expected)[mask].abs().max() <= 1e-5 * expected.abs().max()


def test_a_prompt_is_cut_at_its_end_and_the_cut_is_told(noisy):
    ids, mask = noisy.tokenize(["word " * 50])
    assert ids.shape == (1, 24)
    assert mask.all()
    assert noisy.words_cut("word " * 50).split() == ["word"] * 28
    assert noisy.words_cut("a red fox") == ""


def test_prompts_are_cut_and_filled_up_as_the_tokenizer_would(noisy):
    ids, _ = noisy.tokenize(TEXTS)
    theirs = type(noisy.tokenizer).from_str(noisy.tokenizer.to_str())
    theirs.enable_truncation(24)
    theirs.enable_padding(length=24)
    assert ids.tolist() == [encoded.ids for encoded in theirs.encode_batch(TEXTS)]


def test_threads_may_share_it(noisy, monkeypatch):
    monkeypatch.setattr(minilm, "MOST_KNOWN", 20)
    wanted = noisy.tokenize(TEXTS)[0]

    def use(k: int) -> bool:
        noisy.words_unknown(f"{k} {TEXTS[3]}")
        noisy.words_cut(f"{k} {TEXTS[4]}")
        ids, _ = noisy.tokenize([f"{k} cat", *TEXTS])
        return torch.equal(ids[1:], wanted)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(1000)))


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red fox", ""),
        ("", ""),
        ("🦊!", "🦊!"),
        ("赤い狐 と fox🦊", "赤い狐 と fox🦊"),
        ("красная лиса, fox", "красная лиса,"),
        ("Größe naïve café", ""),
        ("5° — “hi” & # ½ ♥ → €", ""),
        ("fox狐 " * 30 + "狐", "狐"),
    ],
)
def test_words_of_other_scripts_and_pictures_are_unknown(noisy, prompt, unknown):
    assert noisy.words_unknown(prompt) == unknown
    assert noisy.tokenize([prompt])[0].shape == (1, 24)


def test_the_shipped_encoder_knows_what_is_near():
    vectors = catalog.minilm().sentences(["3d emoji of a red apple", "fruit", "locomotive"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_prompts_tokenised_before_give_the_same_ids_again(monkeypatch):
    encoder = MiniLM(catalog.WEIGHTS / "minilm" / "tokenizer.json")
    fresh = [MiniLM(catalog.WEIGHTS / "minilm" / "tokenizer.json").tokenize([text]) for text in TEXTS]
    monkeypatch.setattr("limner.text.minilm.MOST_KNOWN", len(TEXTS) - 1)  # so that some are forgotten on the way
    for order in ([0, 1], [1, 2, 3, 0], [4, 4, 3, 0], [0, 1, 2, 3, 4]):
        ids, mask = encoder.tokenize([TEXTS[i] for i in order])
        assert torch.equal(ids, torch.cat([fresh[i][0] for i in order]))
        assert torch.equal(mask, torch.cat([fresh[i][1] for i in order]))
