from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from limner import __version__, catalog, metadata, pipeline
from limner.cli.generate import slug
from limner.cli.main import main
from limner.data.rebuild.sets import SETS, SHARE_ALIKE
from limner.metrics.prompts import GRID_PROMPTS
from limner.sampling import samplers, schedules
from limner.text.prompts import DIALECTS

SEED_1 = "seed 1, icons-tiny on cpu in fp32"


def painted(result) -> list[str]:
    """The paths a successful command printed, and nothing but the seed on stderr."""
    assert result.code == 0, result.err
    assert re.fullmatch(r"seed \d+, [\w-]+ on cpu in fp32\n", result.err)
    return result.out.splitlines()


def pixels(path) -> bytes:
    return Image.open(path).tobytes()


def test_a_prompt_becomes_a_png_named_after_it(limner, here, tiny_model):
    assert painted(limner("generate", "A red fox!", "-m", tiny_model, "-s", 7)) == ["a-red-fox-7.png"]
    assert [f.name for f in here.iterdir()] == ["a-red-fox-7.png"]
    image = Image.open("a-red-fox-7.png")
    assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (32, 32))


def test_the_short_form_takes_its_options_on_either_side(limner, here, tiny_model):
    assert painted(limner("fox", "-m", tiny_model, "-s", 1)) == ["fox-1.png"]
    assert painted(limner("-m", tiny_model, "-s", 2, "fox")) == ["fox-2.png"]
    assert pixels("fox-1.png") != pixels("fox-2.png")


def test_command_names_win_over_prompts_unless_told(limner, here, tiny_model):
    assert "icons-tiny" in limner("models").out
    assert painted(limner("-m", tiny_model, "-s", 3, "--", "models")) == ["models-3.png"]
    assert painted(limner("generate", "-m", tiny_model, "-s", 4, "train")) == ["train-4.png"]


def test_a_leading_double_dash_paints(limner, here, tiny_model, monkeypatch):
    monkeypatch.setattr("limner.cli.generate.DEFAULT_MODEL", str(tiny_model))
    (path,) = painted(limner("--", "models"))
    assert metadata.read_settings(here / path)["prompt"] == "models"


def test_nothing_asks_for_help(limner):
    alone = limner()
    assert (alone.code, alone.err) == (0, "")
    assert alone.out == limner("--help").out == limner("-h").out
    assert "generate" in alone.out


def test_the_drawing_is_that_of_the_pipeline(limner, here, tiny_model):
    wanted = {"negative": "blue", "width": 48, "height": 16, "steps": 3, "guidance": 3.5, "seed": 11}
    wanted |= {"sampler": "dpmpp_2m", "schedule": "karras"}
    flags = [word for name, value in wanted.items() for word in (f"--{name}", value)]
    (path,) = painted(limner("fox", "-m", tiny_model, *flags))
    (image,) = pipeline.load(tiny_model, "cpu").generate("fox", **wanted)
    assert pixels(path) == image.image.tobytes()
    assert metadata.read_settings(here / path) == image.settings
    assert {name: image.settings[name] for name in wanted} == wanted
    assert image.settings["limner"] == __version__
    others = {"strength", "mask_blur", "prompt_dialect", "clip_skip", "adapters", "noise_level", "variation_seed"}
    others |= {"hires", "hires_strength", "hires_steps", "vae", "vae_hash", "text_encoder", "text_encoder_hash"}
    others |= {"refiner", "refiner_hash", "switch_at", "control", "ip_adapter", "guide_model", "guide_model_hash"}
    others |= {"depth_hash", "prediction", "padding", "variation_image_hash"}
    others |= {"classifier", "classifier_hash", "classifier_scale"}
    assert metadata.SETTINGS.keys() - image.settings.keys() == others | pipeline.SELDOM.keys()


def test_aliases_mean_the_same(limner, here, tiny_model):
    common = ("fox", "-m", tiny_model, "--seed", 1, "--steps", 2)
    (a,) = painted(limner(*common, "--guidance", 6, "--schedule", "karras"))
    (b,) = painted(limner(*common, "--cfg-scale", 6, "--scheduler", "karras"))
    assert (a, b) == ("fox-1.png", "fox-1-2.png")
    assert (here / a).read_bytes() == (here / b).read_bytes()


def test_pictures_between_two_noises_are_redone_from_their_files(limner, here, tiny_model):
    draw = ("-m", tiny_model, "--steps", 2, "-s", 1)
    row = painted(limner("fox", *draw, "--variation", "0:1", "--variation-seed", 5, "-b", 3, "-o", "row.png"))
    (again,) = painted(limner("-C", row[1], "-m", tiny_model, "-o", "again.png"))
    difference = max(abs(a - b) for a, b in zip(pixels(again), pixels(row[1]), strict=True))
    assert difference <= 1
    assert metadata.read_settings(here / again)["variation"] == 0.5
    ends = ("edit", row[0], "cat", *draw, "--invert", "fox", "--variation", "0.5", "--variation-image", row[2])
    (turned,) = painted(limner(*ends, "-o", "turned.png"))
    told = metadata.read_settings(here / turned)
    assert (told["invert"], told["sampler"], told["strength"], told["variation"]) == ("fox", "ddim", 1.0, 0.5)
    redo = ("-C", turned, "-m", tiny_model, "-i", row[0], "-o", "redone.png")
    assert "add --variation-image" in limner(*redo).err
    assert "is not the picture turned to" in limner(*redo, "--variation-image", row[0]).err
    (redone,) = painted(limner(*redo[:-1], "twice.png", "--variation-image", row[2]))
    assert (here / redone).read_bytes() == (here / turned).read_bytes()
    assert "give a number from 0 to 1, or two" in limner("fox", *draw, "--variation", "a:1").err


def test_a_random_seed_is_printed_embedded_and_in_the_name(limner, here, tiny_model):
    seeds = []
    for _ in range(2):
        result = limner("fox", "-m", tiny_model, "--steps", 1)
        (path,) = painted(result)
        seed = int(result.err.split()[1].rstrip(","))
        assert path == f"fox-{seed}.png"
        assert metadata.read_settings(here / path)["seed"] == seed
        seeds.append(seed)
    assert seeds[0] != seeds[1]


def test_a_batch_has_following_seeds_each_as_if_alone(limner, here, tiny_model):
    assert painted(limner("fox", "-m", tiny_model, "-s", 5, "-b", 3)) == ["fox-5.png", "fox-6.png", "fox-7.png"]
    painted(limner("fox", "-m", tiny_model, "-s", 6, "-o", "alone.png"))
    difference = max(abs(a - b) for a, b in zip(pixels("fox-6.png"), pixels("alone.png"), strict=True))
    assert difference <= 1
    assert metadata.read_settings(here / "fox-6.png") == metadata.read_settings(here / "alone.png")


def test_output_is_a_file_a_folder_or_numbered_files(limner, here, tiny_model):
    run = lambda *args: painted(limner("fox", "-m", tiny_model, "-s", 1, "--steps", 1, *args))  # noqa: E731
    assert run("-o", "new/deep/x.png") == ["new/deep/x.png"]
    assert run("-o", "new/deep/x.png") == ["new/deep/x-2.png"]
    assert run("-o", "new") == ["new/fox-1.png"]
    assert run("-o", "other/") == ["other/fox-1.png"]
    assert run("-o", "x.png", "-b", 2) == ["x-1.png", "x-2.png"]
    assert all((here / f).is_file() for f in ("new/deep/x.png", "new/deep/x-2.png", "new/fox-1.png", "x-1.png"))


def test_standard_output_carries_the_png(here, tiny_model):
    command = [sys.executable, "-m", "limner", "fox", "-m", tiny_model, "-s", "1", "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert Image.open(io.BytesIO(done.stdout)).size == (32, 32)
    assert done.stderr == b"seed 1, icons-tiny on cpu in fp32\n"
    assert list(here.iterdir()) == []


def test_settings_of_a_picture_give_it_again_and_flags_override_them(limner, here, tiny_model):
    flags = ("-n", "blue", "-W", 48, "--steps", 3, "--sampler", "heun", "-s", 11)
    (path,) = painted(limner("a fox, running", "-m", tiny_model, *flags))
    (again,) = painted(limner("-C", path, "-m", tiny_model, "-o", "again.png"))
    assert (here / path).read_bytes() == (here / again).read_bytes()
    (other,) = painted(limner("-C", path, "-m", tiny_model, "a cat", "--steps", 2, "-s", 12))
    told = metadata.read_settings(here / path) | {"prompt": "a cat", "steps": 2, "seed": 12}
    assert metadata.read_settings(here / other) == told


def test_settings_name_the_weights_and_other_weights_are_told(limner, here, tiny_model, other_model):
    (path,) = painted(limner("fox", "-m", tiny_model, "-s", 1))
    settings = metadata.read_settings(here / path)
    assert settings["model_hash"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()[:10]
    assert f", Model hash: {settings['model_hash']}, Model: icons-tiny" in Image.open(path).info["parameters"]

    shutil.copy(tiny_model, "moved.safetensors")
    (moved,) = painted(limner("-C", path, "-m", "moved.safetensors", "-o", "moved.png"))
    assert (here / moved).read_bytes() == (here / path).read_bytes()
    whole = settings | {"model_hash": hashlib.sha256(tiny_model.read_bytes()).hexdigest()}
    metadata.save_png(Image.new("RGBA", (8, 8)), whole, here / "whole.png")
    painted(limner("-C", "whole.png", "-m", tiny_model))

    result = limner("-C", path, "-m", other_model, "-o", "other.png")
    told, seed = result.err.splitlines()
    assert (result.code, result.out, seed) == (0, "other.png\n", SEED_1)
    assert told.startswith("limner: 'fox-1.png' was painted with another file of weights (model hash")
    here_now = metadata.read_settings(here / "other.png")["model_hash"]
    assert settings["model_hash"] in told
    assert here_now in told
    assert here_now != settings["model_hash"]


def test_painting_over_a_picture(limner, here, tiny_model):
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save("red.png")
    common = ("fox", "-m", tiny_model, "-s", 1)
    (weak,) = painted(limner(*common, "-i", "red.png", "--strength", 0.1))
    (default,) = painted(limner(*common, "-i", "red.png"))
    assert metadata.read_settings(here / weak)["strength"] == 0.1
    assert metadata.read_settings(here / default)["strength"] == 0.6
    assert pixels(weak) != pixels(default)
    (again,) = painted(limner("-C", weak, "-i", "red.png", "-m", tiny_model))
    assert pixels(again) == pixels(weak)


def test_weights_are_not_loaded_because_a_picture_names_them(limner, here, tiny_model):
    settings = {"prompt": "fox", "model": str(tiny_model), "seed": 1}
    metadata.save_png(Image.new("RGBA", (8, 8)), settings, here / "bait.png")
    refused = limner("-C", "bait.png")
    assert refused.code == 2
    assert "which is not in `limner models`: add -m" in refused.err
    assert painted(limner("-C", "bait.png", "-m", tiny_model)) == ["fox-1.png"]


def test_a_model_that_another_program_names_is_not_taken_for_icons(limner, here, tiny_model):
    chunks = PngInfo()
    chunks.add_text("parameters", "fox\nSteps: 2, Seed: 1, Size: 32x32, Model hash: 0123456789, Model: deliberate_v6")
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=chunks)
    refused = limner("-C", "theirs.png")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "was painted by 'deliberate_v6', which is not in `limner models`: add -m FILE, or -m icons" in refused.err
    result = limner("-C", "theirs.png", "-m", tiny_model)
    assert (result.code, result.out) == (0, "fox-1.png\n")
    assert "painted with another file of weights (model hash '0123456789', here" in result.err


def test_json_says_what_was_painted(limner, here, tiny_model):
    result = limner("fox", "-m", tiny_model, "-s", 4, "-b", 2, "--json")
    images = json.loads(result.out)["images"]
    assert [(i["path"], i["seed"]) for i in images] == [("fox-4.png", 4), ("fox-5.png", 5)]
    assert all(i["settings"] == metadata.read_settings(here / i["path"]) for i in images)


def test_words_that_do_not_fit_are_told_and_change_no_settings(limner, here, tiny_model):
    words = "one two three four five six"  # all that the tiny model reads
    common = ("-m", tiny_model, "-s", 1, "--steps", 1, "-n", f"{words} seven\neight", "--json")
    result = limner(f"{words} {'seven ' * 100}", *common, "-b", 2)
    prompt, negative, seed = result.err.splitlines()
    assert re.match(r"limner: the prompt is longer than the model reads: 'seven [seven ]* \.\.\.' is left out", prompt)
    assert negative.startswith(
        r"limner: the negative prompt is longer than the model reads: 'seven\neight' is left out"
    )
    assert seed == SEED_1
    settings = json.loads(result.out)["images"][0]["settings"]
    assert settings["prompt"] == f"{words} {'seven ' * 100}"
    fits = limner(words, *common[:-3])
    assert fits.err == SEED_1 + "\n"
    assert settings.keys() == metadata.read_settings(here / fits.out.strip()).keys()
    assert limner(f"{words} seven", *common, "--dry-run").err.count("is left out") == 2


def test_what_will_not_show_is_told_on_stderr(limner, here, tiny_model):
    Image.new("RGB", (64, 32)).save("wide.png")
    flags = ("-m", tiny_model, "-s", 1, "--steps", 1, "-n", "blue", "--guidance", 1, "-i", "wide.png")
    result = limner("🦊", *flags)
    *told, seed = result.err.splitlines()
    assert (result.code, result.out, seed) == (0, "picture-1.png\n", SEED_1)
    for line, reason in zip(told, ("does not know '🦊'", "no effect at guidance 1", "50% of the pict"), strict=True):
        assert line.startswith("limner: ")
        assert reason in line


def test_an_autoencoder_gives_a_picture_back_and_paints_no_words(limner, here):
    config = catalog.entry("icons-autoencoder-tiny").config
    catalog.save(catalog.build(config), config, here / "ae.safetensors")
    Image.new("RGBA", (32, 32), (255, 0, 0, 255)).save("red.png")
    for words in (["fox"], ["fox", "-i", "red.png"], ["-i", "red.png", "-n", "fox"]):
        result = limner("generate", *words, "-m", "ae.safetensors")
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert "it reads no words, it gives a picture back: -i IMAGE without a prompt" in result.err
    assert painted(limner("-i", "red.png", "-m", "ae.safetensors", "-s", 1)) == ["picture-1.png"]


def test_the_help_names_what_there_is_and_the_defaults(limner):
    text = " ".join(limner("generate", "--help").out.split())
    assert set(re.search(r"Solver: (.*?)\.", text)[1].split(", ")) == set(samplers.SAMPLERS)
    assert set(re.search(r"How noise falls: (.*?)\.", text)[1].split(", ")) == {"auto", *schedules.SCHEDULES}
    assert re.search(r"What brackets mean: (.*?)\.", text)[1].replace(" or ", ", ").split(", ") == list(DIALECTS)
    icons = catalog.entry("icons").config
    low, high, grid = re.search(r"(\d+) to (\d+) pixels in steps of (\d+)", text).groups()
    assert [int(low), int(high)] == [icons.defaults.min_size, icons.defaults.max_size]
    assert int(grid) == icons.autoencoder.factor
    for option in ("width", "height", "steps", "guidance", "sampler", "schedule", "strength"):
        told = re.search(rf"--{option}\W.*?\[default: (.*?)\]", text)[1]
        assert told == f"{getattr(icons.defaults, option)}".removesuffix(".0"), option


def test_help_speaks_of_i_only_where_it_is_an_option(limner):
    said = {command: " ".join(limner(command, "--help").out.split()) for command in ("generate", "edit", "upscale")}
    assert ["With -i" in text for text in said.values()] == [True, False, False]
    assert "White where to paint" in said["edit"]


def test_the_help_shows_every_style_in_a_prompt(limner):
    shown = limner("generate", "--help").out.partition("Styles that icons knows")[2].splitlines()[2:]
    prompts = [prompt for line in shown for prompt in (line[2:42].strip(), line[42:].strip())]
    assert set(prompts) <= set(GRID_PROMPTS)
    phrases = {s.phrases[0] for name, s in SETS.items() if name not in SHARE_ALIKE}
    found = [max((p for p in phrases if p in prompt), key=len) for prompt in prompts]
    assert sorted(found) == sorted(phrases)


def test_numbered_files_sort_in_the_order_of_their_seeds(limner, here, tiny_model):
    plan = json.loads(limner("fox", "-m", tiny_model, "-o", "x.png", "-b", 12, "--dry-run", "--json").out)
    assert plan["output"] == sorted(plan["output"]) == [f"x-{i:02}.png" for i in range(1, 13)]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(limner, here, tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline, "draw", lambda *_: pytest.fail("painted"))
    flags = ("fox", "-m", tiny_model, "-s", 4, "-b", 2, "-W", 48, "-o", "new/", "--dry-run")
    result = limner(*flags, "--json")
    plan = json.loads(result.out)
    told = {"model": "icons-tiny", "prompt": "fox", "width": 48, "height": 32, "steps": 12, "seed": 4, "batch": 2}
    assert {key: plan[key] for key in told} == told
    assert plan["output"] == ["new/fox-4.png", "new/fox-5.png"]
    assert plan["parameters"] == sum(p.numel() for p in pipeline.load(tiny_model, "cpu").system.parameters())
    assert 300 < plan["memory_mb"] < 1000
    lines = dict(re.split(r" +", line, maxsplit=1) for line in limner(*flags).out.splitlines())
    assert lines["output"] == "new/fox-4.png, new/fox-5.png"
    assert lines["parameters"] == str(plan["parameters"])
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red fox!", "a-red-fox"),
        ("../../etc/passwd", "etc-passwd"),
        ("狐 🦊", "狐"),
        ("🦊", "picture"),
        ("a_b/c\\d\0e", "a-b-c-d-e"),
        ("ein Füchslein", "ein-füchslein"),
        ("x" * 100, "x" * 60),
        ("狐" * 100, "狐" * 20),
    ],
)
def test_names_are_safe_and_short(prompt, name):
    assert slug(prompt) == name


def test_a_terminal_sees_a_bar_with_rate_and_time_left(here, tiny_model):
    reader, terminal = pty.openpty()
    command = [sys.executable, "-m", "limner", "fox", "-m", tiny_model, "--steps", "60"]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    out, _ = done.communicate()
    os.close(reader)
    assert re.fullmatch(rb"fox-\d+\.png\n", out)
    assert b"60/60" in seen
    assert re.search(rb"\d\.\d steps/s", seen)
    assert re.search(rb"0:00:0\d", seen)


def test_ctrl_c_while_painting_leaves_nothing(here, tiny_model):
    command = [sys.executable, "-m", "limner", "fox", "-m", tiny_model, "--steps", "1000", "-b", "64"]
    # a shell's background job inherits an ignored SIGINT, and this run may be one
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("seed ")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "limner: interrupted\n")
    assert list(here.iterdir()) == []


def test_from_recipe_to_picture_by_commands_alone(limner, here):
    trained = limner("train", "icons-tiny", "--out", "run", "--device", "cpu", "steps=2")
    assert trained.code == 0, trained.err
    assert len(list((here / "run" / "samples").glob("*.png"))) == 1
    (path,) = painted(limner("red circle", "-m", "run", "-s", 1))
    settings = metadata.read_settings(here / path)
    assert (settings["model"], settings["steps"]) == ("icons-tiny", 12)
    assert pixels(path) == pipeline.load("run", "cpu").generate("red circle", seed=1)[0].image.tobytes()
    assert pixels(painted(limner("-C", path, "-m", "run", "-o", "again.png"))[0]) == pixels(path)


def test_garbage_is_collected_again_when_loading_failed(tmp_path):
    with pytest.raises(SystemExit):
        main(["generate", "a fox", "-m", str(tmp_path / "none.safetensors")])
    assert gc.isenabled()


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_seed_picks_from_choices_and_wildcards_and_the_picture_remembers(limner, here, tiny_model):
    (here / "cards").mkdir()
    (here / "cards" / "animals.txt").write_text("fox\nowl\ncat\n")
    common = ("-m", tiny_model, "--steps", 1)
    words = ("a {red|blue} __animals__", "--wildcards", "cards", "-n", "{red|blue}")
    paths = painted(limner(*words, *common, "-s", 1, "-b", 8))
    told = [metadata.read_settings(here / path) for path in paths]
    assert {t["prompt"] for t in told} <= {f"a {c} {a}" for c in ("red", "blue") for a in ("fox", "owl", "cat")}
    assert len({t["prompt"] for t in told}) > 2
    assert {t["negative"] for t in told} == {"red", "blue"}
    assert paths == [f"{t['prompt'].replace(' ', '-')}-{k + 1}.png" for k, t in enumerate(told)]
    (alone,) = painted(limner(*words, *common, "-s", 4, "-o", "alone.png"))
    assert metadata.read_settings(here / alone) == told[3]
    (again,) = painted(limner("-C", alone, "-m", tiny_model, "-o", "again.png"))
    assert (here / again).read_bytes() == (here / alone).read_bytes()
    plan = json.loads(limner(*words, *common, "-s", 1, "-b", 8, "--dry-run", "--json").out)
    assert plan["prompts"] == [t["prompt"] for t in told]


def test_settings_of_a_prompt_with_a_structure_give_its_picture_again(limner, here, sd1_folder):
    common = ("-m", sd1_folder, "-W", 32, "-H", 32, "--steps", 2)
    words = r"a (red:1.3) {fox|owl} [cat:dog:1] \(x\) \{a\|b\} BREAK night AND day :0.5"
    flags = ("--clip-skip", 2, "--prompt-dialect", "a1111", "-n", "(dull:1.2)")
    (path,) = painted(limner(words, *common, *flags, "-s", 3, "-o", "a.png"))
    text = Image.open(path).info["parameters"]
    assert ", Clip skip: 2, Prompt dialect: a1111, " in text
    (again,) = painted(limner("-C", path, "-m", sd1_folder, "-o", "b.png"))
    assert (here / path).read_bytes() == (here / again).read_bytes()
    told = metadata.read_settings(here / path)
    read = metadata.from_infotext(text)
    assert {key: read[key] for key in ("prompt", "negative", "clip_skip", "prompt_dialect")} == {
        key: told[key] for key in ("prompt", "negative", "clip_skip", "prompt_dialect")
    }
    (comfy,) = painted(limner("-C", path, "-m", sd1_folder, "--prompt-dialect", "comfyui", "-o", "c.png"))
    assert pixels(comfy) != pixels(path)


def test_brackets_are_plain_words_to_icons(limner, here, tiny_model):
    """And their pictures carry no settings but those they had."""
    (path,) = painted(limner("(a|b)", "-m", tiny_model, "-s", 1, "--steps", 1))
    assert metadata.read_settings(here / path)["prompt"] == "(a|b)"
    assert not {"clip_skip", "prompt_dialect"} & metadata.read_settings(here / path).keys()


def test_a_preview_is_put_in_place_whole_at_every_step_and_changes_no_picture(limner, here, tiny_model, monkeypatch):
    versions, replace = [], Path.replace

    def watched(temporary, path):
        replace(temporary, path)
        with Image.open(path) as image:
            versions.append((temporary.parent == path.parent, image.mode, image.size, image.tobytes()))

    args = ("generate", "fox", "-m", tiny_model, "-s", 1, "--steps", 3, "-b", 2)
    painted(limner(*args, "-o", "plain/"))
    monkeypatch.setattr(Path, "replace", watched)
    (here / "beside.png").write_bytes(b"kept")
    painted(limner(*args, "-o", "watched/", "--preview", "new/now.png"))
    assert [version[:3] for version in versions] == [(True, "RGBA", (64, 32))] * 3
    assert len({version[3] for version in versions}) == 3
    assert [file.name for file in (here / "new").iterdir()] == ["now.png"]
    for file in (here / "plain").iterdir():
        assert file.read_bytes() == (here / "watched" / file.name).read_bytes()
    painted(limner(*args, "--preview", "new/now.png"))  # a preview may be replaced
    assert (here / "beside.png").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("photo.png", "is there and is no preview, so it is kept"),
        ("fox.jpg", "let the name end in .png"),
        ("out.png", "--preview and -o are both 'out.png'"),
        ("folder.png", "it is a folder"),
        ("pipe.png", "is there and is no preview"),
    ],
)
def test_a_preview_replaces_nothing_but_previews(limner, here, tiny_model, name, reason):
    Image.new("RGB", (4, 4)).save("photo.png")
    (here / "folder.png").mkdir()
    os.mkfifo("pipe.png")
    before = (here / "photo.png").read_bytes()
    result = limner("generate", "fox", "-m", tiny_model, "-o", "out.png", "--preview", name)
    assert result.code != 0
    assert reason in result.err
    assert (here / "photo.png").read_bytes() == before
    assert not (here / "out.png").exists()


def test_an_autoencoder_has_no_steps_to_preview(limner, here, tmp_path):
    config = catalog.entry("icons-autoencoder-tiny").config
    catalog.save(catalog.build(config), config, tmp_path / "codec.safetensors")
    Image.new("RGB", (32, 32), "red").save("photo.png")
    args = ("generate", "-m", tmp_path / "codec.safetensors", "-i", "photo.png", "--preview", "now.png")
    assert "--preview has no effect: icons-autoencoder-tiny takes no steps" in limner(*args).err
    assert limner(*args, "--strict").code == 2
    assert not (here / "now.png").exists()
