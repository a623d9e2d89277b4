"""Adapters on the command line, in Python and in pictures."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limner import catalog, exchange, metadata, pipeline
from limner.adapters import asking, files
from limner.errors import CheckpointMismatch, FileProblem, Ignored, UsageError

TOLD = ("-s", 3, "--steps", 2)


@pytest.fixture
def style(here) -> Path:
    """A LoRA of icons-tiny in the current folder."""
    return _style(here / "style.safetensors", 0)


def _style(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, 64), (192, 2)))
    save_file({"blocks.0.qkv.lora_A.weight": a, "blocks.0.qkv.lora_B.weight": b}, path)
    return path


def pixels(path: str) -> bytes:
    return Image.open(path).tobytes()


def test_a_lora_changes_the_picture_and_the_picture_remembers_it(limner, here, tiny_model, style):
    limner("fox", "-m", tiny_model, *TOLD, "-o", "plain.png")
    done = limner("fox", "-m", tiny_model, *TOLD, "--lora", f"{style}:0.5", "-o", "styled.png")
    assert done.code == 0, done.err
    assert done.err.startswith("limner: style: LoRA in the names of the model, rank 2, 2 of 2 keys; changes 1 block,")
    assert pixels("plain.png") != pixels("styled.png")
    settings = metadata.read_settings(here / "styled.png")
    assert settings["adapters"] == [{"name": "style", "hash": files.digest(style), "weight": 0.5}]
    text = Image.open("styled.png").info["parameters"]
    assert text.startswith("fox <lora:style:0.5>\n")
    assert f'Lora hashes: "style: {files.digest(style)}"' in text
    assert "adapters" not in metadata.read_settings(here / "plain.png")


def test_a_prompt_asks_for_a_lora_as_a_flag_does(limner, here, tiny_model, style):
    limner("fox", "-m", tiny_model, *TOLD, "--lora", f"{style}:0.5", "-o", "flag.png")
    done = limner("fox<lora:style:0.5>", "-m", tiny_model, *TOLD, "-o", "tag.png")
    assert done.code == 0, done.err
    assert (here / "flag.png").read_bytes() == (here / "tag.png").read_bytes()
    (here / "loras").mkdir()
    style.rename(here / "loras" / style.name)
    pipe = pipeline.load(tiny_model)
    told = {"seed": 3, "steps": 2}
    (tagged,) = pipe.generate("fox<lora:style:0.5>", adapter_folder="loras", **told)
    assert tagged.image.tobytes() == pixels("flag.png")
    (plain,) = pipe.generate("fox", **told)
    assert plain.image.tobytes() != tagged.image.tobytes()
    with pytest.raises(UsageError, match="two weights"):
        pipe.generate("fox<lora:style:0.5:1>", adapter_folder="loras", **told)
    with pytest.raises(UsageError, match="hypernetwork 'style': those are not read"):
        pipe.generate("fox<hypernet:style:1>", adapter_folder="loras", **told)


def test_a_dry_run_names_the_adapters(limner, here, tiny_model, style):
    done = limner("generate", "fox", "-m", tiny_model, *TOLD, "--lora", f"{style}:0.5", "--dry-run")
    assert done.code == 0, done.err
    assert "adapters    style:0.5\n" in done.out


def test_c_redoes_it_from_the_file_at_hand(limner, here, tiny_model, style):
    limner("fox", "-m", tiny_model, *TOLD, "--lora", "style:0.5,blocks.0=-2", "-o", "styled.png")
    assert limner("generate", "-C", "styled.png", "-m", tiny_model, "-o", "again.png").code == 0
    assert pixels("styled.png") == pixels("again.png")
    settings = metadata.read_settings(here / "again.png")
    assert settings == metadata.read_settings(here / "styled.png")
    assert settings["adapters"][0]["blocks"] == {"blocks.0": -2}

    (here / "elsewhere").mkdir()
    style.rename(here / "elsewhere" / "style.safetensors")
    missing = limner("generate", "-C", "styled.png", "-m", tiny_model, "-o", "no.png")
    assert missing.code == 3
    assert (
        f"painted with the adapter 'style' (hash {settings['adapters'][0]['hash']}), and it is not here" in missing.err
    )
    assert "add --lora FILE" in missing.err
    given = ("--lora", "elsewhere/style.safetensors")
    assert limner("generate", "-C", "styled.png", "-m", tiny_model, *given, "-o", "given.png").code == 0
    assert pixels("styled.png") == pixels("given.png")
    done = limner(
        "generate", "-C", "styled.png", "-m", tiny_model, "--lora", "elsewhere/style.safetensors:0", "-o", "x.png"
    )
    assert "style has weight 0, and changes nothing" in done.err

    _style(here / "style.safetensors", 1)
    other = limner("generate", "-C", "styled.png", "-m", tiny_model, "-o", "no.png")
    assert (other.code, "is another file" in other.err) == (3, True)
    told = limner("generate", "-C", "styled.png", "-m", tiny_model, "--lora", "style.safetensors", "-o", "no.png")
    assert (told.code, "expect another picture" in told.err) == (0, True)


def test_several_add_up_and_python_draws_the_same(limner, here, tiny_model, style):
    other = _style(here / "other.safetensors", 1)
    limner("fox", "-m", tiny_model, *TOLD, "--lora", f"{style}:0.5", "--lora", other, "-o", "both.png")
    pipe = pipeline.load(tiny_model, "cpu")
    told = {"seed": 3, "steps": 2}
    (plain,) = pipe.generate("fox", **told)
    (for_once,) = pipe.generate("fox", lora=[(style, 0.5), other], **told)
    assert for_once.image.tobytes() == pixels("both.png")
    assert for_once.settings == metadata.read_settings(here / "both.png")
    assert pipe.generate("fox", **told)[0].image.tobytes() == plain.image.tobytes()
    pipe.attach(other)
    assert pipe.attach(style, 0.5).ranks == (2,)
    assert pipe.generate("fox", **told)[0].image.tobytes() == for_once.image.tobytes()
    with pytest.raises(FileProblem):
        pipe.generate("fox", lora=[here / "missing.safetensors"], **told)
    pipe.detach("other")
    pipe.detach()
    assert pipe.generate("fox", **told)[0].image.tobytes() == plain.image.tobytes()


def test_what_will_not_show_is_told(here, tiny_model, style):
    pipe = pipeline.load(tiny_model, "cpu")
    with pytest.warns(Ignored, match="weight 0"):
        pipe.attach(style, 0)
    pipe.detach()
    tensors = {}
    for name, (o, i) in {"qkv": (192, 64), "mlp_in": (256, 64), "mlp_out": (64, 128), "proj": (64, 64)}.items():
        for block in (0, 1):
            a, b = torch.ones(1, i), torch.ones(o, 1)
            tensors |= {f"blocks.{block}.{name}.lora_A.weight": a, f"blocks.{block}.{name}.lora_B.weight": b}
    save_file(tensors | {"more.alpha": torch.ones(())}, here / "more.safetensors")
    with pytest.warns(Ignored, match=r"1 of its 17 keys mean nothing in this model.*first: more.alpha"):
        pipe.attach(here / "more.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.attach(style)


def test_flags_are_read_as_a_file_a_weight_and_blocks(style):
    name = "style.safetensors"
    assert asking.parse("style") == asking.Asked(Path(name))
    assert asking.parse(f"{name}:-0.5") == asking.Asked(Path(name), -0.5)
    assert asking.parse(f"{style}:1,blocks.0=2,text_encoder=0") == asking.Asked(
        style, 1.0, {"blocks.0": 2, "text_encoder": 0}
    )
    assert asking.parse(f"{name}:blocks=2") == asking.Asked(Path(name), None, {"blocks": 2.0})
    for text in (f"{name}:much", f"{name}:1,2", f"{name}:", f"{name}:blocks=x"):
        with pytest.raises(UsageError, match="weight"):
            asking.parse(text)
    for text in ("missing", "missing.safetensors:0.5", "", ":1", "../style:1", "a/b:1/c"):
        with pytest.raises(FileProblem, match="no file"):
            asking.parse(text)


@pytest.mark.parametrize(
    "adapters",
    [
        [], "style", [1], [{}], [{"name": "x"}], [{"name": "../x", "hash": "a"}], [{"name": "a\\b", "hash": "a"}],
        [{"name": "x", "hash": 1}], [{"name": "x", "hash": "a", "weight": 1e9}],
        [{"name": "x", "hash": "a", "blocks": []}],
        [{"name": "x", "hash": "a", "blocks": {"a": "1"}}], [{"name": "x", "hash": "a", "more": 1}],
        [{"name": "x", "hash": "a"}] * 101,
    ],
    ids=repr,
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(adapters):
    with pytest.raises(ValueError, match=r"adapter|weight|name|hash|blocks|more"):
        metadata.check_settings({"adapters": adapters})


def test_tags_and_hashes_of_another_program_are_read():
    text = "a fox <lora:ink:0.7>, <lora:line art:1> red\nSteps: 20, Sampler: Euler, Seed: 1, "
    text += 'Lora hashes: "ink: 0123456789ab, x: 1"'
    settings = metadata.from_infotext(text)
    assert settings["prompt"] == "a fox, red"
    assert settings["adapters"] == [
        {"name": "ink", "hash": "0123456789ab", "weight": 0.7}, {"name": "line art", "hash": "?", "weight": 1.0},
    ]  # fmt: skip
    metadata.check_settings(settings)


def test_inspect_says_what_an_adapter_is_of_and_for(limner, here, tmp_path):
    key = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"
    tensors = {
        f"{key}.lora_down.weight": torch.ones(4, 2048),
        f"{key}.lora_up.weight": torch.ones(1280, 4),
        f"{key}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, "x.safetensors")
    told = json.loads(limner("inspect", "x.safetensors", "--json").out)
    wanted = {
        "kind": "LoRA",
        "spelling": "kohya",
        "base": ["sdxl"],
        "modules": 1,
        "rank": ["4"],
        "alpha": ["2"],
        "blocks": ["mid_block"],
    }
    assert {name: told[name] for name in wanted} == wanted
    assert told["hash"] == files.digest(here / "x.safetensors")
    lines = limner("inspect", "x.safetensors").out
    assert "base        sdxl\n" in lines
    save_file(tensors | {f"{key}.alpha": torch.tensor(float("nan"))}, "x.safetensors")
    assert "alpha is nan" in exchange.inspect("x.safetensors")["problem"]


def test_a_lora_for_another_model_stops_before_anything_is_drawn(limner, here, tiny_model):
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(4, 768), f"{key}.lora_up.weight": torch.ones(1280, 4)}, "sd.safetensors"
    )
    done = limner("fox", "-m", tiny_model, *TOLD, "--lora", "sd.safetensors")
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        "limner: sd.safetensors does not fit icons-tiny: it was made for sd1 (Stable Diffusion 1); "
        "0 of its 2 keys fit here\n"
    )
    assert [path.name for path in here.iterdir()] == ["sd.safetensors"]


def test_two_files_of_one_name_or_two_weights_of_one_file_are_refused(limner, here, tiny_model, style):
    (here / "other").mkdir()
    _style(here / "other" / "style.safetensors", 1)
    told = ("generate", "-m", tiny_model, *TOLD)
    done = limner(*told, "fox", "--lora", "style", "--lora", "other/style.safetensors")
    assert (done.code, done.out) == (2, "")
    assert "have one name: give one, or rename it" in done.err
    done = limner(*told, "fox <lora:style:0.8>", "--lora", "style:0.5")
    assert (done.code, "style is asked for twice, by 0.5 and 0.8" in done.err) == (2, True)
    assert limner(*told, "fox <lora:style:0.5>", "--lora", "style", "-o", "a.png").code == 0
    assert metadata.read_settings(here / "a.png")["adapters"][0]["weight"] == 0.5


@pytest.mark.parametrize("name", ["ink v1:2", "x" * 201])
def test_a_name_that_no_picture_can_remember_is_refused_before_drawing(limner, here, tiny_model, style, name):
    style.rename(here / f"{name}.safetensors")
    done = limner("generate", "fox", "-m", tiny_model, *TOLD, "--lora", f"./{name}.safetensors")
    assert (done.code, done.out) == (2, "")
    assert "cannot be remembered by a picture" in done.err


def test_the_folder_of_peft_is_called_by_its_own_name(here, monkeypatch, tiny_model):
    (here / "ink").mkdir()
    _style(here / "ink" / "adapter_model.safetensors", 0)
    assert files.name_of(here / "ink") == files.name_of(here / "ink" / "adapter_model.safetensors") == "ink"
    monkeypatch.chdir(here / "ink")
    assert files.name_of(Path()) == "ink"
    assert asking.parse(".").name == "ink"


def test_a_part_that_is_one_number_is_refused(tiny_model, tmp_path):
    a, b = torch.randn(2, 64), torch.randn(192, 2)
    for parts in (
        {"lora_A.weight": torch.tensor(1.0), "lora_B.weight": b},
        {"hada_w1_a": b, "hada_w1_b": torch.tensor(1.0), "hada_w2_a": b.clone(), "hada_w2_b": a},
        {"ia3_l": torch.tensor(1.0)},
        {"oft_blocks": torch.tensor(1.0)},
    ):
        save_file({f"blocks.0.qkv.{name}": value for name, value in parts.items()}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointMismatch, match="is one number, where a matrix or a vector is wanted"):
            pipeline.load(tiny_model).attach(tmp_path / "x.safetensors")


def test_adapters_of_two_threads_do_not_meet(tiny_model, here, style):
    """Each draws with its own alone, and none stays on."""
    other = _style(here / "other.safetensors", 1)
    pipe = pipeline.load(tiny_model, "cpu")
    told = {"seed": 3, "steps": 6}
    wanted = [pipe.generate("fox", **told, lora=[file])[0] for file in (style, other)]
    plain = pipe.generate("fox", **told)[0].image.tobytes()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda file: pipe.generate("fox", **told, lora=[file])[0], [style, other] * 4))
    for picture, same in zip(found, wanted * 4, strict=True):
        assert picture.image.tobytes() == same.image.tobytes()
        assert picture.settings == same.settings
    assert pipe.generate("fox", **told)[0].image.tobytes() == plain


def test_a_lone_file_is_one_file_and_an_autoencoder_takes_none(tiny_model, here, style):
    pipe = pipeline.load(tiny_model, "cpu")
    listed, alone = (pipe.generate("fox", seed=3, steps=1, lora=given)[0] for given in ([style], str(style)))
    assert listed.image.tobytes() == alone.image.tobytes()
    assert pipe.generate("fox<lora:style:1>", seed=3, steps=1, adapter_folder=None)[0].settings == listed.settings
    with pytest.raises(UsageError, match="takes no adapters"):
        pipeline.Pipeline(catalog.build(catalog.entry("icons-autoencoder-tiny").config), "x").generate("", lora=style)


def test_a_prompt_that_asks_twice_by_two_weights_is_refused(style):
    with pytest.raises(UsageError, match=r"style by 0.5 and by 0.8"):
        asking.in_prompt("a <lora:style:0.5> <lora:style:0.8>", (Path(),))
    assert len(asking.in_prompt("a <lora:style:0.5> <lora:style:0.5>", (Path(),))[1]) == 1
    assert len(asking.in_prompt("a <lora:style:0.5> embedding:style", (Path(),))[1]) == 2


def test_a_name_of_more_bytes_than_a_file_can_have_is_of_no_file(here):
    with pytest.raises(FileProblem, match="there is no file"):
        asking.in_prompt("a <lora:" + "\u732b" * 200 + ":1>", (Path(),))
