"""Captions are read once, and what is learned is as if they were read at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from toy import StopAt

from limner import catalog, recipes
from limner.text import bpe
from limner.text.clip import SDXL_TEXT, CLIPTextConfig, CLIPTowers, CLIPTowersConfig
from limner.training import loop, texts
from limner.training.config import parse_overrides
from limner.training.processes import Processes
from limner.training.texts import AT_ONCE, TextCache

CPU = torch.device("cpu")
WORDS = ["a red fox", "", "a blue square of glass on a table", "pizza", "a fox", "green", "a dog that sleeps"]
FEW = ["steps=4", "batch_size=2", "log_every=2", "save_every=2", "warmup=0", "data.size=32", "adapter.rank=2"]


@pytest.fixture
def pictures(here):
    (here / "pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green", "black", "white")):
        Image.new("RGB", (32, 32), color).save(here / "pictures" / f"{i}.png")
        (here / "pictures" / f"{i}.txt").write_text(f"a {color} square\n{color}")
    return here / "pictures"


def config(*changes: str):
    return parse_overrides(recipes.get("lora"), changes)


def same(a, b) -> bool:
    a, b = ({name: v for name, v in one.tensors().items() if v is not None} for one in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def minilm():
    return catalog.minilm()


@pytest.fixture(scope="module")
def towers():
    """Two of CLIP's, whose last has a projection, as SDXL's."""
    torch.manual_seed(0)
    small = CLIPTextConfig(width=64, depth=2, num_heads=2, hidden=128)
    wide = CLIPTextConfig(width=96, depth=2, num_heads=2, hidden=128, projection=96)
    told = CLIPTowersConfig(towers=(small, wide), skip=SDXL_TEXT.skip, normed=False, zero_empty=True)
    return CLIPTowers(told, [bpe.shipped()] * 2).requires_grad_(False)


@pytest.mark.parametrize("kind", ["minilm", "towers"])
def test_what_is_kept_is_what_the_encoder_says_of_a_batch(kind, request):
    encoder = request.getfixturevalue(kind)
    cache = TextCache(encoder, config(), CPU)
    for some in (WORDS[:5], WORDS[3:], WORDS[::-1], WORDS[:1] * 4):
        assert same(cache(some), encoder.encode(some))


def test_it_depends_on_the_caption_alone(towers):
    whole = TextCache(towers, config(), CPU)(WORDS)
    one_by_one = TextCache(towers, config(), CPU)
    rows = [one_by_one([caption]) for caption in WORDS[::-1]][::-1]
    assert same(whole, type(whole).cat(rows))


def test_each_is_read_once_and_the_last_asked_for_stay(minilm, monkeypatch):
    read, plain = [], minilm.encode

    def encode(some):
        assert torch.is_grad_enabled()  # as in a step: layers compute otherwise where it is not
        read.append(some)
        return plain(some)

    monkeypatch.setattr(minilm, "encode", encode)
    cache = TextCache(minilm, config(), CPU)
    with torch.no_grad():  # as where a run is validated
        first = cache(WORDS)
    assert same(cache(WORDS), first)
    assert read == [WORDS[:4], [*WORDS[4:], ""]]
    row = cache.size // len(WORDS)
    assert row == sum(v[0].nbytes for v in first.tensors().values() if v is not None)
    cache.limit = 3 * row
    cache([WORDS[1]])
    assert list(cache.kept) == [*WORDS[-2:], WORDS[1]]
    assert cache.size == 3 * row
    cache(WORDS[2:3])
    assert list(cache.kept) == [WORDS[-1], WORDS[1], WORDS[2]]
    assert same(cache(WORDS), first)
    assert all(len(some) == AT_ONCE for some in read)


def test_files_are_read_by_another_run_and_know_when_they_are_stale(minilm, tmp_path, monkeypatch):
    def opened(encoder=minilm, *changes) -> TextCache:
        return TextCache(encoder, config(*changes), CPU, tmp_path)

    first = opened()(WORDS)
    with monkeypatch.context() as patch:
        again = opened()
        patch.setattr(minilm, "encode", lambda _: pytest.fail("it was read again"))
        assert same(again(WORDS), first)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(WORDS)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    assert same(opened()(WORDS), first)
    shorter = catalog.minilm(max_tokens=6)
    keys = {opened().key, opened(shorter).key, opened(minilm, "precision=bf16").key}
    weight = minilm.embeddings.word_embeddings.weight[29_000]  # of a word that nobody says
    with torch.no_grad():
        weight[0] += 1
    keys.add(opened().key)
    with torch.no_grad():
        weight[0] -= 1
    plain = minilm.tokenizer.encode_batch
    monkeypatch.setattr(minilm.tokenizer, "encode_batch", lambda some: plain([f"{text}x" for text in some]))
    minilm.known.clear()
    keys.add(opened().key)
    minilm.known.clear()
    assert len(keys) == 5
    assert same(opened(shorter)(WORDS), shorter.encode(WORDS))


def test_more_than_the_memory_may_hold_is_read_into_a_folder(minilm, tmp_path, monkeypatch):
    cache, most = TextCache(minilm, config("data.text_cache=0.0001"), CPU, tmp_path), []
    monkeypatch.setattr(cache, "read", lambda some, plain=cache.read: most.append(len(plain(some))))
    cache.fill(WORDS, some=3)
    assert most == [3, 3, 1]
    assert 0 < cache.size <= cache.limit < len(WORDS) * cache.size // len(cache.kept)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(WORDS)


def trained(limner, model, out, *more):
    done = limner("train", "lora", "-m", model, "-d", "pictures", "-o", out, "--device", "cpu", *FEW, *more)
    assert done.code == 0, done.err
    return [(Path(out) / "checkpoints" / "step-000004" / f"{n}.safetensors").read_bytes() for n in ("model", "ema")]


@pytest.mark.parametrize("model", ["tiny_model", pytest.param("sd1_folder", marks=pytest.mark.slow)])
def test_a_run_ends_with_the_same_bits_with_and_without_and_resumed(
    limner, here, pictures, monkeypatch, request, model
):
    model = request.getfixturevalue(model)
    without = trained(limner, model, "without", "data.text_cache=0")
    assert trained(limner, model, "kept", "data.cache=cache", "data.text_cache=0.00001") == without
    assert len(list((here / "cache" / "texts").rglob("*.safetensors"))) > 4
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequests", lambda *_: StopAt(3))
        limner("train", "lora", "-m", model, "-d", "pictures", "-o", "parts", "--device", "cpu", *FEW)
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    assert (here / "parts/checkpoints/step-000004/model.safetensors").read_bytes() == without[0]


def test_what_a_text_encoder_that_learns_says_is_not_kept(tiny_model):
    model = catalog.load(tiny_model)
    for changes in (["adapter.text_encoder=true"], []):
        told = config("data.text_cache=2", *changes)
        notes = texts.keep(None, model, told, [], Processes())
        assert (model.texts is None, len(notes)) == (bool(changes), len(changes))
    model.texts = None
    word = parse_overrides(recipes.get("word"), ["data.text_cache=2"])
    assert texts.keep(None, model, word, [], Processes()) == [
        "data.text_cache=2 has no effect on word: its text encoder learns"
    ]
    assert model.texts is None
    assert texts.keep(None, model, config("data.text_cache=0"), [], Processes()) == []
    assert model.texts is None


def test_captions_that_are_known_are_those_that_batches_have(here, pictures):
    from limner.data.batches import DataConfig, open_batches

    told = {"source": "folder", "folder": str(pictures), "size": 32, "trigger": "sks"}
    stream = open_batches(DataConfig(**told), 0, CPU)
    assert {c for k in range(20) for c in stream.batch(k, 4)["captions"]} == set(stream.words())
    assert "sks, red" in stream.words()
    assert open_batches(DataConfig(shuffle_tags=True, **told), 0, CPU).words() is None
    shapes = open_batches(DataConfig(source="shapes", size=16, limit=4), 0, CPU)
    assert {c for k in range(20) for c in shapes.batch(k, 4)["captions"]} == set(shapes.words())


def test_a_text_encoder_that_rests_comes_back_for_a_drawing(tiny_model):
    from limner.pipeline import generate

    model = catalog.load(tiny_model)
    (before,) = generate(model, "a red fox", seed=1, steps=2)
    texts.rest(model)
    assert model.works_on == CPU
    (after,) = generate(model, "a red fox", seed=1, steps=2)
    assert before.image.tobytes() == after.image.tobytes()


@pytest.mark.gpu
def test_on_a_gpu_a_large_text_encoder_leaves_after_all_is_read(limner, here, pictures, tiny_model, monkeypatch):
    monkeypatch.setattr(texts, "LARGE", 0)
    seen = []
    monkeypatch.setattr(texts, "rest", lambda model, plain=texts.rest: plain(model) or seen.append(model))
    told = ("-m", tiny_model, "-d", "pictures", "--device", "cuda", *FEW, 'sample_prompts=["a fox"]')
    done = limner("train", "lora", *told, "-o", "run")
    assert done.code == 0, done.err
    assert "captions are read: the text encoder" in done.out
    assert {p.device.type for p in seen[0].text_encoder.parameters()} == {"cpu"}
    assert {p.device.type for p in seen[0].network.parameters()} == {"cuda"}
    assert limner("train", "lora", *told, "data.text_cache=0", "-o", "plain").code == 0
    a, b = (torch.tensor([float(part) for part in loss]) for loss in (
        [row.split('"loss": ')[1].split(",")[0] for row in (here / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "plain")
    ))  # fmt: skip
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
