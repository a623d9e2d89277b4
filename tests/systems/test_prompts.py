"""What a prompt's structure does to a picture: known answers by recording what the network is told at each step."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image, ImageChops

from limner import catalog, pipeline
from limner.errors import Ignored, UsageError
from limner.text.prompts import parse

from . import stable_diffusion

STEPS = 4


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return catalog.load(stable_diffusion.sd1(tmp_path_factory.mktemp("sd1")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return catalog.load(stable_diffusion.sdxl(tmp_path_factory.mktemp("sdxl")))


def latents(system, prompt: str, negative: str = "", seed: int = 1, start=None, **told) -> torch.Tensor:
    told = {"steps": STEPS, "sampler": "euler", "guidance": 3.0, "width": 32, "height": 32} | told
    if start is not None:
        told |= {"image": Image.new("RGB", (32, 32))}
    request = pipeline.prepare(system, prompt=prompt, negative=negative, seed=seed, **told)
    with torch.inference_mode():
        cond = system.condition(list(request.prompts), request, list(request.negatives))
        return system.sample(cond, request, pipeline.noise_source([seed], "cpu"), start=start)


def heard(system, monkeypatch, prompt: str, **told) -> list[torch.Tensor]:
    """The tokens of every call of the network."""
    calls: list[torch.Tensor] = []
    forward = system.network.forward
    monkeypatch.setattr(
        system.network, "forward", lambda x, t, cond: (calls.append(cond.tokens), forward(x, t, cond))[1]
    )
    latents(system, prompt, **told)
    monkeypatch.undo()
    return calls


def tokens(system, text: str, dialect="a1111") -> torch.Tensor:
    return system.text_encoder.read([[parse(text, dialect).parts[0].at(0)]], dialect, None).tokens[0]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2", "dpmpp_2m"])
def test_every_step_is_told_its_own_words(sd1, monkeypatch, sampler):
    """However often a sampler asks in a step; the picture is that of the steps done one after another."""
    cat, dog = (tokens(sd1, f"a {animal}") for animal in ("cat", "dog"))
    for prompt, order in (("a [cat:dog:2]", "ccdd"), ("a [cat|dog]", "cdcd"), ("a [cat:dog:0.25]", "cddd")):
        calls = heard(sd1, monkeypatch, prompt, sampler=sampler)
        told = "".join("c" if torch.allclose(call[0], cat, atol=1e-5) else "d" for call in calls)
        assert all(
            torch.allclose(call[0], dog, atol=1e-5) for call, name in zip(calls, told, strict=True) if name == "d"
        )
        twice = 1 if len(calls) == STEPS else 2
        assert told == "".join(name * twice for name in order)[: len(calls)], sampler


def test_negative_prompts_change_too(sd1, monkeypatch):
    cat, dog = (tokens(sd1, animal) for animal in ("cat", "dog"))
    calls = heard(sd1, monkeypatch, "fox", negative="[cat:dog:3]")
    assert [torch.allclose(call[1], cat if k < 3 else dog, atol=1e-5) for k, call in enumerate(calls)] == [True] * 4


def test_over_a_picture_the_steps_that_are_walked_count(sd1, monkeypatch):
    cat, dog = (tokens(sd1, animal) for animal in ("cat", "dog"))
    start = torch.zeros(1, 4, 16, 16)
    calls = heard(sd1, monkeypatch, "[cat:dog:0.5]", start=start, steps=8, strength=0.5)
    assert [torch.allclose(call[0], cat if k < 2 else dog, atol=1e-5) for k, call in enumerate(calls)] == [True] * 4


def test_parts_are_composed_by_their_weights(sd1):
    """One Euler step: x0 is uncond + guidance * sum of weight * (part - uncond), each learned from a picture alone."""
    draw = lambda prompt, guidance=1.0: latents(sd1, prompt, "dull", steps=1, guidance=guidance)  # noqa: E731
    cat, dog, dull = draw("cat"), draw("dog"), draw("dull")
    for prompt, weights in (
        ("cat AND dog", (1, 1)),
        ("cat :1.5 AND dog:-0.5", (1.5, -0.5)),
        ("cat AND cat :0 AND dog :.5", (1, 0.5)),
    ):
        composed = weights[0] * (cat - dull) + weights[1] * (dog - dull)
        for guidance in (1.0, 3.0):
            wanted = dull + guidance * composed
            assert (draw(prompt, guidance) - wanted).abs().max() < 1e-3 * wanted.abs().max(), (prompt, guidance)


def furthest(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_picture_is_the_same_alone_and_in_a_batch_whatever_its_neighbours_are_told(name, request):
    """Of more chunks, more parts, other turns and other negative prompts."""
    system = request.getfixturevalue(name)
    long = "fox, " * 40
    prompt = "a {cat|[dog:owl:2]|cat AND dog :0.5|" + long + "} {red|(blue:1.3)}"
    told = {"negative": "{dull|" + long + "}", "steps": 3, "width": 32, "height": 32, "guidance": 4.0}
    together = pipeline.generate(system, prompt, seed=5, batch=8, **told)
    said = [(p.settings["prompt"], p.settings["negative"]) for p in together]
    assert len({len(p) > 100 for p, _ in said}) == len({len(n) > 100 for _, n in said}) == 2
    assert len(set(said)) > 4
    for place in range(8):
        (alone,) = pipeline.generate(system, prompt, seed=5 + place, **told)
        assert furthest(alone.image, together[place].image) <= 1, place
        assert alone.settings == together[place].settings
        words = {key: alone.settings[key] for key in ("prompt", "negative", "prompt_dialect", "clip_skip", "seed")}
        (again,) = pipeline.generate(system, **(told | words))
        assert again.image.tobytes() == alone.image.tobytes()
        assert again.settings == alone.settings


def test_dialect_clip_skip_and_every_weight_change_the_picture(sd1):
    draw = lambda prompt, **told: pipeline.generate(sd1, prompt, seed=1, steps=2, **told)[0]  # noqa: E731
    words = "a (red:1.5) fox"
    pictures = {
        dialect: draw(words, prompt_dialect=dialect).image.tobytes() for dialect in ("a1111", "comfyui", "plain")
    }
    pictures |= {prompt: draw(prompt).image.tobytes() for prompt in ("a red fox", "a [red] fox", "a red BREAK fox")}
    pictures["skipped"] = draw(words, clip_skip=2).image.tobytes()
    assert len(set(pictures.values())) == len(pictures)
    assert (
        draw(words).image.tobytes()
        == draw(words, clip_skip=1, prompt_dialect="a1111").image.tobytes()
        == pictures["a1111"]
    )
    settings = draw(words, clip_skip=2, prompt_dialect="comfyui").settings
    assert (settings["clip_skip"], settings["prompt_dialect"]) == (2, "comfyui")
    assert [draw(words).settings[name] for name in ("clip_skip", "prompt_dialect")] == [1, "a1111"]


def test_the_own_clip_skip_of_sdxl_is_two(sdxl):
    picture, same, other = (
        pipeline.generate(sdxl, "fox", seed=1, steps=1, width=32, height=32, clip_skip=skip)[0] for skip in (None, 2, 1)
    )
    assert picture.settings["clip_skip"] == 2
    assert picture.image.tobytes() == same.image.tobytes() != other.image.tobytes()


def test_what_is_kept_for_no_step_and_and_in_negative_prompts_is_a_warning_each(sd1):
    with pytest.warns(Ignored) as told:
        pipeline.generate(sd1, "a [cat:(owl:1.2):9] [x::0]", negative="a AND b", steps=2, seed=1)
    assert [str(w.message) for w in told] == [
        "'(owl:1.2)' of the prompt is kept for steps that do not come: ask for it sooner, or for more steps",
        "'x' of the prompt is kept for steps that do not come: ask for it sooner, or for more steps",
        "AND composes prompts, not negative ones: it is a word of the negative prompt",
    ]
    with warnings.catch_warnings(action="error"):
        pipeline.generate(sd1, "fox " * 200, negative="owl " * 200, steps=1, seed=1)


def test_a_model_that_reads_plainly_says_so():
    system = catalog.build(catalog.entry("icons-tiny").config).eval()
    with pytest.warns(Ignored) as told:
        (picture,) = pipeline.generate(system, "a (red:2) fox", steps=1, prompt_dialect="a1111", clip_skip=2, seed=1)
    assert [str(w.message) for w in told][-2:] == [
        "icons-tiny reads prompts plainly, whatever the dialect: '(red:2)' is words to it",
        "clip skip has no effect: icons-tiny takes nothing from CLIP's layers",
    ]
    assert not {"prompt_dialect", "clip_skip"} & picture.settings.keys()
    assert picture.settings["prompt"] == "a (red:2) fox"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"prompt": "a (fox:nan)"}, "the weight nan in '\\(fox:nan\\)' is absurd"),
        ({"prompt": "fox", "negative": "(a:1e9)"}, "the weight 1e9"),
        ({"prompt": "{fox|}", "batch": 64}, "the prompt is empty"),
        ({"prompt": "a <lora:ink:0.8>"}, "the lora 'ink' where no tag is read"),
        ({"prompt": "an embedding:bad"}, "the embedding 'bad'"),
        ({"prompt": "fox", "clip_skip": 3}, "clip skip is 3: this model's text encoder can stop 1 to 2 from its end"),
        ({"prompt": "fox", "clip_skip": 0}, "clip_skip is 0: give a whole number from 1"),
        ({"prompt": "fox", "clip_skip": 1.5}, "clip_skip is 1.5"),
        ({"prompt": "fox", "prompt_dialect": "comfy"}, "no prompt dialect 'comfy'. Did you mean 'comfyui'?"),
        ({"prompt": "fox", "prompt_dialect": 3}, "no prompt dialect '3'"),
        ({"prompt": "fox", "wildcards": 3}, "wildcards is int"),
        ({"prompt": "{a|}{|b}" * 600 + "{a|b}" * 40}, "more than 1000 picks"),
        (
            {"prompt": "[a|b|c|d|e|f|g] [a|b|c|d|e] [a|b|c|d|e|f|g|h|i|j|k]", "steps": 999},
            "becomes 385 texts",
        ),
        ({"prompt": "x" * 10_001}, "10001 characters; at most 10000"),
    ],
)
def test_prompts_that_cannot_be_are_refused_in_a_line(sd1, told, message):
    with pytest.raises(UsageError, match=message) as refused:
        pipeline.generate(sd1, **told)
    assert "\n" not in str(refused.value)


def test_ten_thousand_characters_are_drawn(sd1):
    (picture,) = pipeline.generate(sd1, "fox, " * 2000, steps=1, seed=1)
    assert len(picture.settings["prompt"]) == 10_000


def test_what_changes_at_every_step_is_read_when_it_is_its_turn_and_parts_go_one_by_one(sd1, monkeypatch):
    """So memory grows neither with the steps nor with the parts of a prompt."""
    request = pipeline.prepare(sd1, prompt="a [b|c|d|e|f|g] AND h AND i", seed=3, steps=12)
    read, rows = [], []
    true_read, true_forward = sd1.text_encoder.read, sd1.network.forward
    monkeypatch.setattr(sd1.text_encoder, "read", lambda *told: read.append(1) or true_read(*told))
    monkeypatch.setattr(sd1.network, "forward", lambda x, *told: rows.append(len(x)) or true_forward(x, *told))
    cond = sd1.condition(["a [b|c|d|e|f|g] AND h AND i"], request)
    assert len(cond) == 12
    assert read == []
    with torch.inference_mode():
        sd1.sample(cond, request, pipeline.noise_source([3], "cpu"))
    assert len(read) == 12
    assert set(rows) == {1}
