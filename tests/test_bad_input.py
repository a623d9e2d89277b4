"""What people and machines get wrong: one line on stderr, the exit code of its kind, and nothing left behind."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from limner import metadata, pipeline
from limner.errors import UnknownName, UsageError

USAGE, FILE, MEMORY, INTERRUPTED = 2, 3, 4, 130


@pytest.fixture
def refused(limner, here):
    """Run `limner ARGS`, which must fail with this code in one line that matches, and change no file."""

    def run(code: int, message: str, *args: object) -> None:
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        result = limner(*args)
        assert result.code == code, result
        assert result.out == ""
        *seed, line = result.err.splitlines()
        assert seed == [] or re.fullmatch(r"seed \d+, .*", *seed)  # told before painting began
        assert line.startswith("limner: ")
        assert re.search(message, line), line
        assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before

    return run


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("no prompt", []),
        ("the prompt is empty", [""]),
        ("the prompt is empty", [" \n\t"]),
        ("the prompt has 10000 characters; at most 2000", ["x" * 10_000]),
        ("the negative prompt has 10000 characters", ["fox", "-n", "x" * 10_000]),
        ("asks for the wildcard 'animals'", ["a __animals__"]),
        ("no wildcard '../x'", ["a __../x__", "--wildcards", "."]),
        ("'<lora:ink:0.8>' is within a choice, where none is read", ["a {<lora:ink:0.8>|fox}"]),
        ("no prompt dialect 'a111'. Did you mean 'a1111'", ["fox", "--prompt-dialect", "a111"]),
        ("clip_skip is 0: give a whole number from 1", ["fox", "--clip-skip", "0"]),
        ("more than 100 deep", ["{" * 200]),
        ("not valid UTF-8", ["fox \udcff"]),
        ("not valid UTF-8", ["fox", "-n", "\udcff"]),
        ("guidance is nan: give a number from 0", ["fox", "--guidance", "nan"]),
        ("guidance is -1.0", ["fox", "--guidance", "-1"]),
        ("guidance is inf", ["fox", "--cfg-scale", "inf"]),
        ("'--guidance' / '--cfg-scale': 'much': give a number; see", ["fox", "--guidance", "much"]),
        ("steps is 0: give a whole number from 1", ["fox", "--steps", "0"]),
        ("steps is -3", ["fox", "--steps", "-3"]),
        ("'--steps': '1.5': give a whole number; see", ["fox", "--steps", "1.5"]),
        ("'--steps'", ["fox", "--steps", "nan"]),
        ("seed is -1", ["fox", "-s", "-1"]),
        ("seed is 1", ["fox", "-s", str(2**70)]),
        ("'--seed'", ["fox", "-s", "9" * 5000]),
        ("batch is 0", ["fox", "-b", "0"]),
        ("batch is -2", ["fox", "-b", "-2"]),
        ("width is 33, not a multiple of", ["fox", "-W", "33"]),
        ("height is 0", ["fox", "-H", "0"]),
        ("height is -32", ["fox", "-H", "-32"]),
        ("width is 100000", ["fox", "-W", "100000"]),
        ("no sampler 'eulr'. Did you mean 'euler'", ["fox", "--sampler", "eulr"]),
        ("no schedule 'karas'. Did you mean 'karras'", ["fox", "--schedule", "karas"]),
        ("no sampler ''. Known: ddim, ddpm, ", ["fox", "--sampler", ""]),
        ("no schedule ''. Known: align_your_steps, ", ["fox", "--schedule", ""]),
        ("without a picture to paint over: add -i", ["fox", "--strength", "0.5"]),
        ("No such option: --stepz", ["fox", "--stepz", "3"]),
        ("'--steps' requires an argument", ["fox", "--steps"]),
        ("put a prompt of several words in quotes", ["a", "red", "fox"]),
        ("let the name end in .png", ["fox", "-o", "fox.jpg"]),
        ("let the name end in .png", ["fox", "-o", "fox"]),
        ("writes one PNG", ["fox", "-o", "-", "-b", "2"]),
        ("writes one PNG", ["fox", "-o", "-", "--json"]),
    ],
)
def test_arguments_that_cannot_be_meant(refused, tiny_model, message, args):
    refused(USAGE, re.escape(message), "generate", "-m", tiny_model, *args)


@pytest.mark.parametrize("strength", ["nan", "-0.5", "0", "1.5", "inf"])
def test_strengths_that_cannot_be_meant(refused, here, tiny_model, strength):
    Image.new("RGB", (32, 32)).save("red.png")
    refused(
        USAGE, "strength is .*: give a number above 0", "fox", "-m", tiny_model, "-i", "red.png", "--strength", strength
    )


def test_names_that_do_not_exist_name_the_nearest(refused):
    refused(FILE, "no model 'icon-tiny'. Did you mean 'icons-tiny'", "fox", "-m", "icon-tiny")
    refused(FILE, "no model ''", "fox", "-m", "")
    refused(FILE, f"no model '{'x' * 300}'. `limner models` lists all", "fox", "-m", "x" * 300)
    refused(FILE, "no file (y/)+y: give", "fox", "-m", "y/" * 3000 + "y")
    refused(USAGE, "no recipe 'icons-tny'", "train", "icons-tny", "--out", "run")


def test_a_device_that_is_not_here(refused, tiny_model):
    refused(USAGE, "no device 'gpu'", "fox", "-m", tiny_model, "--device", "gpu")
    refused(USAGE, "no device 'meta'", "fox", "-m", tiny_model, "--device", "meta")
    refused(USAGE, "no device 'cuda:99' here: give auto or one of cpu", "fox", "-m", tiny_model, "--device", "cuda:99")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "", "cpu:-1", None])
def test_a_device_that_is_not_here_is_named_in_python_too(tiny_model, name):
    with pytest.raises(UsageError, match=f"no device '{name}' here: give auto or one of cpu"):
        pipeline.load(tiny_model, name)
    assert pipeline.load(tiny_model, torch.device("cpu")).generate("fox", steps=1)


# --- files -----------------------------------------------------------------------------------------------------------


def test_keywords_are_shown_and_a_slip_names_the_nearest(tiny_model):
    pipe = pipeline.load(tiny_model, "cpu")
    known = set(inspect.signature(pipeline.check).parameters) - {"defaults", "grid", "interpolant"}
    assert set(inspect.signature(pipe.generate).parameters) == known | {"lora", "embedding", "adapter_folder"}
    assert set(inspect.signature(pipeline.generate).parameters) == known | {"system"}
    assert "Raises UsageError" in pipe.generate.__doc__
    with pytest.raises(UnknownName, match=r"no keyword 'guidence'\. Did you mean 'guidance'"):
        pipe.generate("fox", guidence=3)


@pytest.mark.parametrize("model", [None, 3, b"icons"])
def test_a_model_that_is_neither_name_nor_path(model):
    with pytest.raises(UsageError, match=f"the model is {type(model).__name__}, not a name or a path"):
        pipeline.load(model)


def test_a_folder_of_wildcards_that_is_none(refused, tiny_model):
    refused(FILE, "no folder of wildcards 'nothing'", "fox", "-m", tiny_model, "--wildcards", "nothing")


def test_adapters_of_a_prompt_that_are_not_here(refused, here, tiny_model):
    missing = r"asks for the lora 'ink', of which there is no file in \."
    refused(FILE, missing, "a <lora:ink:0.8>", "-m", tiny_model)
    (here / "ink.safetensors").write_bytes(b"")
    (here / "empty").mkdir()
    refused(
        FILE,
        r"lora '\.\./ink', of which there is no file in empty",
        "a <lora:../ink>",
        "--adapter-folder",
        "empty",
        "-m",
        tiny_model,
    )


def test_weight_files_that_are_none(refused, here, tiny_model):
    whole = tiny_model.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    bad = {
        "empty": b"",
        "truncated": whole[:-100],
        "header-only": whole[: 8 + header],
        "half-a-header": whole[:50],
        "text": b"these are no weights",
        "zeros": bytes(1000),
        "huge-header": (2**62).to_bytes(8, "little") + b"{}",
        "picture": metadata.encode_png(Image.new("RGBA", (8, 8)), {"prompt": "", "seed": 1}),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
        "foreign": (2).to_bytes(8, "little") + b"{}",
    }
    for name, data in bad.items():
        (here / f"{name}.safetensors").write_bytes(data)
        refused(FILE, f"{name}.safetensors", "fox", "-m", f"{name}.safetensors")


def test_weights_of_another_network(refused, here):
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.weight": torch.zeros(2)}, here / "sd.safetensors")
    refused(FILE, "sd.safetensors", "fox", "-m", "sd.safetensors")


def test_weight_files_that_are_not_there(refused, here):
    (here / "nothing").mkdir()
    refused(FILE, "no file missing.safetensors", "fox", "-m", "missing.safetensors")
    refused(FILE, "nothing holds no .safetensors", "fox", "-m", "nothing")


def test_pictures_that_cannot_be_read(refused, here, tiny_model):
    Image.effect_noise((64, 64), 50).save("whole.png")
    Image.effect_noise((64, 64), 50).save("whole.jpg")
    Image.effect_noise((64, 64), 50).save("other.tiff")
    Image.new("1", (9000, 9000)).save("bomb.png")
    (here / "torn.png").write_bytes((here / "whole.png").read_bytes()[:500])
    (here / "torn.jpg").write_bytes((here / "whole.jpg").read_bytes()[:500])
    (here / "text.png").write_text("no picture")
    (here / "empty.png").touch()
    (here / "folder.png").mkdir()
    for name in (
        "torn.png",
        "torn.jpg",
        "text.png",
        "empty.png",
        "folder.png",
        "missing.png",
        "bomb.png",
        "other.tiff",
    ):
        refused(FILE, re.escape(name), "fox", "-m", tiny_model, "-i", name)
    for name in ("other.tiff", "text.png", "empty.png"):
        told = f"{name} is no PNG, JPEG or WebP picture, or not whole: make one of it"
        refused(FILE, told, "fox", "-m", tiny_model, "-i", name)
    refused(FILE, "folder.png is a folder: give the path of one PNG", "fox", "-m", tiny_model, "-i", "folder.png")


def test_settings_that_cannot_be_read(refused, here, tiny_model):
    Image.new("RGB", (8, 8)).save("bare.png")
    (here / "text.png").write_text("no picture")
    for name in ("bare.png", "text.png", "missing.png"):
        refused(FILE, re.escape(name), "-m", tiny_model, "-C", name)
    refused(FILE, "from '.': it is a folder; name a picture", "-m", tiny_model, "-C", ".")


def test_a_file_where_a_folder_is_wanted(refused, here):
    (here / "file").touch()
    for option in ("--data", "--out", "--cache"):
        refused(FILE, "file is a file: give (a|the) folder", "evaluate", option, "file")


def test_a_model_without_weights_says_what_they_will_do(refused):
    refused(FILE, "train icons-tiny --out RUN` and give -m RUN; or", "fox", "-m", "icons-tiny")
    told = "train icons-autoencoder --out RUN` and give -m RUN -i IMAGE, which gives the picture back; or"
    refused(FILE, told, "fox", "-m", "icons-autoencoder")


def test_settings_that_no_model_can_draw(refused, here, tiny_model):
    metadata.save_png(Image.new("RGBA", (8, 8)), {"prompt": "fox", "sampler": "DPM adaptive"}, here / "other.png")
    refused(USAGE, "no sampler 'DPM adaptive'", "-m", tiny_model, "-C", "other.png")
    metadata.save_png(Image.new("RGBA", (8, 8)), {"prompt": "fox", "strength": 0.5}, here / "over.png")
    refused(USAGE, "painted over another picture.*add -i", "-m", tiny_model, "-C", "over.png")


def test_places_that_cannot_be_written_are_seen_before_painting(refused, here, tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline, "draw", lambda *_, **__: pytest.fail("painted"))
    (here / "file").write_text("no folder")
    (here / "folder.png").mkdir()
    refused(FILE, "file/fox.png': not a directory", "fox", "-m", tiny_model, "-o", "file/fox.png")
    refused(FILE, "not a directory", "fox", "-m", tiny_model, "-o", "file/")
    refused(FILE, "file name too long", "fox", "-m", tiny_model, "-o", f"{'x' * 300}.png")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 4000))
    refused(FILE, "no space left on device; free some", "fox", "-m", tiny_model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refused, here, tiny_model):
    (here / "locked").mkdir(mode=0o555)
    refused(FILE, "locked/fox.png': permission denied", "fox", "-m", tiny_model, "-o", "locked/fox.png")


def test_a_disk_that_fills_while_painting(refused, here, tiny_model, monkeypatch):
    painted, draw, sync = [], pipeline.draw, os.fsync

    def fail_after_painting(handle: int) -> None:
        if painted:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(pipeline, "draw", lambda *args, **told: painted.append(1) or draw(*args, **told))
    monkeypatch.setattr(os, "fsync", fail_after_painting)
    refused(FILE, "no space left on device", "fox", "-m", tiny_model, "-o", "fox.png")
    assert painted


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("args", [["fox", "-o", "-"], ["models"]])
def test_a_full_standard_output(here, tiny_model, args):
    command = [sys.executable, "-m", "limner", *args, *(["-m", str(tiny_model)] if args[0] == "fox" else [])]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    assert done.returncode == FILE
    *_, line = done.stderr.splitlines()
    assert line == "limner: cannot write the output: no space left on the device; free some"
    assert "Traceback" not in done.stderr


# --- the machine -----------------------------------------------------------------------------------------------------


def out_of_memory_errors() -> list[BaseException]:
    text = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to..."
    return [MemoryError(), RuntimeError(text), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]


@pytest.mark.parametrize("error", out_of_memory_errors(), ids=["Python", "CPU", "CUDA"])
def test_too_little_memory(refused, tiny_model, monkeypatch, error):
    monkeypatch.setattr(pipeline, "draw", raising(error))
    refused(MEMORY, "out of memory: ask for less", "fox", "-m", tiny_model)


def test_the_error_torch_really_raises_without_memory(refused, tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline, "draw", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    refused(MEMORY, "out of memory: ask for less", "fox", "-m", tiny_model)


def test_an_interruption(refused, tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline, "draw", raising(KeyboardInterrupt()))
    refused(INTERRUPTED, "interrupted", "fox", "-m", tiny_model)
    monkeypatch.setattr("limner.cli.main.app", raising(KeyboardInterrupt()))  # outside of any command
    refused(INTERRUPTED, "interrupted", "fox", "-m", tiny_model)


def test_a_bug_shows_its_traceback(limner, here, tiny_model, monkeypatch):
    from limner.cli.main import main

    monkeypatch.setattr(pipeline, "draw", raising(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        main(["fox", "-m", str(tiny_model)])


def raising(error: BaseException):
    def raise_(*_, **__):
        raise error

    return raise_


# --- a process of its own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (USAGE, "the prompt is empty", [b""]),
        (USAGE, "not valid UTF-8", [b"fox \xff\xfe"]),
        (USAGE, "no sampler 'x'", [b"fox", b"--sampler", b"x"]),
        (FILE, "no file gone.safetensors", [b"fox", b"-m", b"gone.safetensors"]),
    ],
)
def test_the_process_ends_with_the_code(here, tiny_model, code, message, args):
    command = [os.fsencode(sys.executable), b"-m", b"limner", b"-m", os.fsencode(tiny_model), *args]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (code, b"")
    (line,) = done.stderr.decode().splitlines()
    assert re.match(f"limner: .*{re.escape(message)}", line)
    assert list(here.iterdir()) == []


def test_errors_are_text_even_when_json_is_asked_for(limner, here, tiny_model):
    result = limner("fox", "-m", tiny_model, "--sampler", "x", "--json")
    assert (result.code, result.out) == (USAGE, "")
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.err)


def test_a_file_that_may_not_be_touched_is_one_line(refused, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "secret")

    monkeypatch.setattr("limner.catalog.entries", forbidden)
    refused(FILE, "cannot use secret: permission denied", "models")
