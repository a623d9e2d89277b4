"""Learned words against diffusers, in the files of every program."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limner import catalog, exchange, metadata, pipeline
from limner.adapters.attaching import stack
from limner.errors import FileProblem, Ignored, UsageError
from limner.text.prompts import Piece
from systems import stable_diffusion

PROMPT = "a Fox by my-style, red"


def vectors(n: int, width: int = 64) -> torch.Tensor:
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(n))


def a1111(path: Path, value: torch.Tensor) -> Path:
    told = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": value},
        "name": "x",
        "step": 3,
        "sd_checkpoint": None,
    }
    torch.save(told, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def kohya(path: Path, value: torch.Tensor) -> Path:
    save_file({"emb_params": value}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def of_diffusers(path: Path, value: torch.Tensor) -> Path:
    save_file({"my-style": value if len(value) > 1 else value[0]}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stable_diffusion.sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Path:
    return stable_diffusion.sdxl(tmp_path_factory.mktemp("sdxl"))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("write", [a1111, kohya, of_diffusers])
def test_a_word_is_read_as_diffusers_reads_it(folder, write, count, tmp_path):
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.load_textual_inversion({"my-style": vectors(count)}, token="my-style")
    theirs = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    system = catalog.load(folder)
    plain = system.text_encoder.encode([PROMPT]).tokens
    before = dict(system.named_parameters())
    report = stack(system).attach(write(tmp_path / "my-style", vectors(count)))
    ours = system.text_encoder.encode([PROMPT, PROMPT.replace("my-style", "embedding:My-Style"), "a fox"])
    assert same(ours.tokens[:1], theirs)
    assert torch.equal(ours.tokens[0], ours.tokens[1])
    assert not same(plain, theirs)
    assert str(report) == f"my-style: a learned word of {count} vectors; say my-style in the prompt"
    stack(system).detach()
    assert all(parameter is before[name] for name, parameter in system.named_parameters())
    assert torch.equal(system.text_encoder.encode([PROMPT]).tokens, plain)


def test_a_pair_is_read_by_both_towers_of_xl(xl, tmp_path):
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.DiffusionPipeline.from_pretrained(xl)
    pair = {"clip_g": vectors(2, 128), "clip_l": vectors(2, 64)}
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            {"my-style": pair[key]}, token="my-style", text_encoder=getattr(pipe, f"text_encoder{number}"),
            tokenizer=getattr(pipe, f"tokenizer{number}"),
        )  # fmt: skip
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    save_file(pair, tmp_path / "my-style.safetensors")
    system = catalog.load(xl)
    stack(system).attach(tmp_path / "my-style.safetensors")
    ours = system.text_encoder.encode([PROMPT])
    assert same(ours.tokens, theirs)
    assert same(ours.pooled, pooled)


def test_words_and_lora_stand_side_by_side(folder, tmp_path):
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{key}.lora_down.weight": vectors(2), f"{key}.lora_up.weight": vectors(128, 2)}, tmp_path / "x.safetensors"
    )
    files = [kohya(tmp_path / "one", vectors(1)), tmp_path / "x.safetensors", kohya(tmp_path / "Two", vectors(2))]
    systems = [catalog.load(folder) for _ in range(2)]
    for system, order in zip(systems, (files, files[::-1]), strict=True):
        for file in order:
            stack(system).attach(file)
    one, other = (system.text_encoder.encode(["two of one"]).tokens for system in systems)
    assert same(one, other)
    before = catalog.load(folder).text_encoder.encode(["two of one"]).tokens
    for name in ("x", "one"):
        stack(systems[0]).detach(name)
    alone = catalog.load(folder)
    stack(alone).attach(files[2])
    assert torch.equal(*(s.text_encoder.encode(["two of one"]).tokens for s in (systems[0], alone)))
    stack(systems[0]).detach()
    assert torch.equal(systems[0].text_encoder.encode(["two of one"]).tokens, before)


def test_a_word_of_many_vectors_goes_on_in_the_next_chunk(folder, tmp_path):
    system = catalog.load(folder)
    stack(system).attach(kohya(tmp_path / "long", vectors(70)))
    assert system.words_cut("a red long one two three four five") == ""
    tower = system.text_encoder[0]
    chunks = tower.chunks(((Piece("one two three four five six long seven"),),), "a1111")
    assert [len(chunk) for chunk in chunks] == [6, 71]  # whole, as A1111 has it
    assert [i for i, _ in chunks[1]][:70] == tower.learned["long"]


def test_a_word_that_is_not_said_is_told(folder, tmp_path):
    system = catalog.load(folder)
    stack(system).attach(kohya(tmp_path / "long", vectors(3)))
    pipe = pipeline.Pipeline(system, "x")
    with pytest.warns(Ignored, match="long is a learned word that the prompt does not say"):
        pipe.generate("an oblong fox", seed=1, steps=1)


def test_a_picture_remembers_the_word(limner, here, folder):
    kohya(here / "my-style", vectors(3))
    told = ("-m", folder, "-s", 1, "--steps", 1)
    done = limner("generate", PROMPT, *told, "--embedding", "my-style.safetensors", "-o", "x.png")
    assert done.err.splitlines()[0] == "limner: my-style: a learned word of 3 vectors; say my-style in the prompt"
    (kept,) = metadata.read_settings(here / "x.png")["adapters"]
    assert kept == {"name": "my-style", "hash": kept["hash"]}
    assert f'TI hashes: "my-style: {kept["hash"]}"' in Image.open("x.png").info["parameters"]
    assert limner("generate", "-C", "x.png", "-m", folder, "-o", "y.png").code == 0
    assert Image.open("x.png").tobytes() == Image.open("y.png").tobytes()
    (here / "my-style.safetensors").unlink()
    assert "add --embedding FILE" in limner("generate", "-C", "x.png", "-m", folder, "-o", "z.png").err


@pytest.mark.parametrize(
    ("widths", "base"),
    [((768,), "sd1"), ((1024,), "sd2"), ((768, 1280), "sdxl"), ((1280,), "sdxl-refiner"), ((5,), "")],
)
def test_words_for_another_model_are_refused_by_its_name(folder, widths, base, tmp_path):
    names = ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")
    save_file({n: torch.ones(2, w) for n, w in zip(names, widths, strict=True)}, tmp_path / "x.safetensors")
    with pytest.raises(FileProblem, match=f"made for {base}" if base else "are 5 wide, and 64 are read"):
        stack(catalog.load(folder)).attach(tmp_path / "x.safetensors")
    told = exchange.inspect(tmp_path / "x.safetensors")
    assert (told["kind"], told["base"], told["vectors"]) == (
        "textual inversion",
        [base] * bool(base),
        ["2"] * len(widths),
    )


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_hostile_words_are_refused(folder, tiny_model, here):
    system = catalog.load(folder)
    for value in (vectors(76), vectors(1) * float("nan"), torch.zeros(0, 64)):
        with pytest.raises(FileProblem, match="not 1 to 75"):
            stack(system).attach(kohya(here / "x", value))
    for content in (
        {"string_to_param": {"*": Evil()}},
        Evil(),
        {"string_to_param": {"*": 1}},
        {"string_to_param": 1},
        [1],
    ):
        torch.save(content, here / "x.pt")
        with pytest.raises(FileProblem, match=r"x\.pt"):
            stack(system).attach(here / "x.pt")
        (here / "x.pt").write_bytes(pickle.dumps(content))
        with pytest.raises(FileProblem, match=r"x\.pt"):
            stack(system).attach(here / "x.pt")
    assert not (here / "ran").exists()
    with pytest.raises(FileProblem, match="which icons-tiny does not read with"):
        stack(catalog.load(tiny_model)).attach(kohya(here / "x", vectors(1)))
    with pytest.raises(UsageError, match="no weight but"):
        stack(system).attach(here / "x.safetensors", 0.5)


def test_inspect_opens_words_of_a1111(here):
    told = exchange.inspect(a1111(here / "x", vectors(3, 768)))
    assert (told["kind"], told["base"], told["vectors"]) == ("textual inversion", ["sd1"], ["3"])


def test_a_word_against_is_found_in_the_folder_and_its_file_may_be_named(limner, here, folder):
    kohya(here / "bad", vectors(3))
    told = ("generate", "-m", folder, "-s", 1, "--steps", 1)
    done = limner(*told, "a fox", "-n", "embedding:bad", "-o", "a.png")
    assert done.code == 0, done.err
    assert metadata.read_settings(here / "a.png")["adapters"][0]["name"] == "bad"
    assert limner(*told, "a fox", "-n", "embedding:bad.safetensors", "-o", "b.png").code == 0
    assert limner(*told, "a fox", "-n", "bad", "--embedding", "bad.safetensors", "-o", "c.png").code == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes() == Image.open("c.png").tobytes()
    assert metadata.from_infotext(Image.open("a.png").info["parameters"])["adapters"][0]["name"] == "bad"


def test_letters_that_fold_together_are_words_like_others(folder, tmp_path):
    system = catalog.load(folder)
    stack(system).attach(kohya(tmp_path / "kis", vectors(3)))
    tower = system.text_encoder[0]
    assert tower.pieces("k\u0131s")[1][1] != tower.learned["kis"]
    assert tower.pieces("KIS")[1][1] == tower.learned["kis"]


def test_a_picture_names_no_files_to_load(limner, here, folder):
    """Only what was typed is looked for: a prompt that a picture carries may be anybody's."""
    kohya(here / "bad", vectors(3))
    picture = Image.new("RGB", (32, 32))
    settings = {"prompt": "a fox embedding:bad", "negative": "", "steps": 1, "seed": 1, "width": 32, "height": 32}
    metadata.save_png(picture, settings, here / "crafted.png")
    done = limner("generate", "-C", "crafted.png", "-m", folder)
    assert (done.code, "asks for the embedding 'bad', and there is none here" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "dialect", "read"),
    [
        ("my cat", "a1111", True), ("my cat", "comfyui", False), ("old(v2)", "a1111", False),
        ("old(v2)", "comfyui", False), ("old(v2)", "plain", True),
    ],
)  # fmt: skip
def test_a_name_that_a_dialect_does_not_read_is_told(folder, tmp_path, name, dialect, read):
    system = catalog.load(folder)
    save_file({"emb_params": vectors(3)}, tmp_path / f"{name}.safetensors")
    stack(system).attach(tmp_path / f"{name}.safetensors")
    request = pipeline.prepare(system, prompt=f"a {name}, red", prompt_dialect=dialect)
    assert bool(stack(system).unused(request)) is not read
