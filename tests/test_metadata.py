from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from limner import metadata
from limner.errors import FileProblem

FOX = {
    "limner": "0.1.0",
    "model": "icons",
    "prompt": "a red fox",
    "negative": "blue",
    "seed": 7,
    "width": 256,
    "height": 128,
    "steps": 16,
    "guidance": 4.0,
    "sampler": "dpmpp_2m",
    "schedule": "uniform",
}


def picture(colour: tuple[int, int, int, int] = (200, 80, 20, 255)) -> Image.Image:
    return Image.new("RGBA", (8, 8), colour)


def png_with(tmp_path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    path = tmp_path / "other.png"
    picture().save(path, pnginfo=chunks)
    return path


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG file, read without Pillow."""
    found, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def test_settings_come_back_as_they_were(tmp_path):
    path = metadata.save_png(picture(), FOX, tmp_path / "fox.png")
    assert metadata.read_settings(path) == FOX
    assert Image.open(path).convert("RGBA").tobytes() == picture().tobytes()


def test_same_settings_and_pixels_give_the_same_bytes_whatever_the_image_carried(tmp_path):
    carried = picture()
    carried.info = {"dpi": (300, 300), "comment": "me", "icc_profile": b"profile"}
    first = metadata.save_png(picture(), FOX, tmp_path / "a.png")
    other = metadata.save_png(carried, dict(reversed(FOX.items())), tmp_path / "sub" / "b.png")
    assert first.read_bytes() == other.read_bytes()
    assert b"tIME" not in first.read_bytes()
    assert {kind for kind, _ in chunks_of(first.read_bytes())} == {b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"}


def test_the_mark_of_a_generated_picture_is_plain_xmp(tmp_path):
    data = metadata.save_png(picture(), FOX, tmp_path / "fox.png").read_bytes()
    (xmp,) = [body for kind, body in chunks_of(data) if kind == b"iTXt"]
    head, packet = xmp[:22], xmp[22:]
    assert head == b"XML:com.adobe.xmp\0" + b"\0\0" + b"\0" + b"\0"  # not compressed, no language, no translation
    from xml.etree import ElementTree

    (description,) = ElementTree.fromstring(packet.decode()).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    mark = description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert mark == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def test_infotext_is_what_web_ui_writes():
    assert metadata.to_infotext(FOX | {"strength": 0.6, "model_hash": "0123456789abcdef"}) == (
        "a red fox\n"
        "Negative prompt: blue\n"
        "Steps: 16, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 4, Seed: 7, Size: 256x128, "
        "Model hash: 0123456789, Model: icons, Denoising strength: 0.6, Version: limner 0.1.0"
    )


def test_infotext_quotes_values_that_would_end_early():
    assert 'Model: "a, b: \\"c\\""' in metadata.to_infotext(FOX | {"model": 'a, b: "c"'})


def test_infotext_of_another_program_is_understood(tmp_path):
    text = (
        "a castle,\non a hill\nNegative prompt: blurry,\nugly\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4294967295, Size: 512x768, "
        'Model hash: abc, Model: deliberate, Lora hashes: "x: 12, y: 34", Denoising strength: 0.7, Version: v1.10.1'
    )
    assert metadata.read_settings(png_with(tmp_path, parameters=text)) == {
        "prompt": "a castle,\non a hill",
        "negative": "blurry,\nugly",
        "steps": 20,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance": 6.5,
        "seed": 4294967295,
        "width": 512,
        "height": 768,
        "strength": 0.7,
        "model": "deliberate",
        "model_hash": "abc",
    }


def test_infotext_without_numbers_is_a_prompt(tmp_path):
    assert metadata.read_settings(png_with(tmp_path, parameters="just: words")) == {
        "prompt": "just: words",
        "negative": "",
    }


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(prompt=WORDS, negative=WORDS, seed=st.integers(0, 2**64 - 1), guidance=st.floats(0, 1e6))
def test_any_words_survive_the_file(tmp_path_factory, prompt, negative, seed, guidance):
    settings = FOX | {"prompt": prompt, "negative": negative, "seed": seed, "guidance": guidance}
    path = metadata.save_png(picture(), settings, tmp_path_factory.mktemp("any") / "p.png")
    assert metadata.read_settings(path) == settings


@pytest.mark.parametrize("prompt", ["a fox", "ein Füchslein", "狐 🦊", "two\nlines", 'a "quoted", thing: here'])
def test_words_survive_infotext_alone(tmp_path, prompt):
    text = Image.open(metadata.save_png(picture(), FOX | {"prompt": prompt}, tmp_path / "p.png")).info["parameters"]
    back = metadata.read_settings(png_with(tmp_path, parameters=text))
    assert back == {k: v for k, v in (FOX | {"prompt": prompt}).items() if k != "limner"}


def test_half_a_surrogate_pair_does_not_stop_saving(tmp_path):
    path = metadata.save_png(picture(), FOX | {"prompt": "bad \udcff byte"}, tmp_path / "p.png")
    assert metadata.read_settings(path)["prompt"] == "bad \udcff byte"


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_taken_name_gets_a_number(tmp_path):
    for name in ("fox.png", "fox-2.png", "fox-3.png"):
        assert metadata.save_png(picture(), FOX, tmp_path / "fox.png") == tmp_path / name
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert metadata.save_png(picture(), FOX, tmp_path / "dangling.png").name == "dangling-2.png"


@pytest.mark.parametrize("hard_links", [True, False])
def test_twenty_writers_of_one_name_write_twenty_files(tmp_path, monkeypatch, hard_links):
    def no_link(source, target):
        if Path(target).exists():  # Linux looks for the name first
            raise FileExistsError(errno.EEXIST, "taken")
        raise OSError(errno.EPERM, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_link)
    barrier = threading.Barrier(20)

    def write(seed: int) -> None:
        barrier.wait()
        metadata.save_png(picture(), FOX | {"seed": seed}, tmp_path / "fox.png")

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted(tmp_path.iterdir())
    assert {f.name for f in files} == {"fox.png"} | {f"fox-{n}.png" for n in range(2, 21)}
    assert {metadata.read_settings(f)["seed"] for f in files} == set(range(20))


def test_the_file_gets_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    saved = metadata.save_png(picture(), FOX, tmp_path / "fox.png")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("step", ["fsync", "link"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_nothing_behind(tmp_path, monkeypatch, step, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((FileProblem, KeyboardInterrupt)) as caught:
        metadata.save_png(picture(), FOX, tmp_path / "fox.png")
    if isinstance(failure, OSError):
        assert "no space left on device; free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_will_be_full_is_seen_before_painting(tmp_path):
    metadata.check_writable(tmp_path / "new" / "fox.png", size=1000)
    with pytest.raises(FileProblem, match="no space left"):
        metadata.check_writable(tmp_path / "fox.png", size=2**60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [lambda path: metadata.save_png(picture(), FOX, path), metadata.check_writable])
def test_places_that_cannot_be_written_say_so_in_one_line(tmp_path, write):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.png").mkdir()
    wrong = {
        "file/fox.png": "not a directory",
        "file/deeper/fox.png": "not a directory",
        "folder.png": "it is a folder",
        "fox.jpg": "let the name end in .png",
        "fox": "let the name end in .png",
        f"{'x' * 300}.png": "file name too long",
    }
    before = sorted(tmp_path.rglob("*"))
    for name, reason in wrong.items():
        with pytest.raises(FileProblem, match=re.escape(reason)) as caught:
            write(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_known_settings_are_written(tmp_path):
    with pytest.raises(ValueError, match="'user' is no setting"):
        metadata.save_png(picture(), FOX | {"user": "me"}, tmp_path / "fox.png")
    assert list(tmp_path.iterdir()) == []


# --- reading what others made ----------------------------------------------------------------------------------------


def test_every_setting_is_checked_for_type_and_range(tmp_path):
    wrong = {
        "seed": ["7", -1, 2**64, 1.0, True, None, [7], 10**400],
        "width": [0, -5, 65_537],
        "guidance": [-0.1, 1e7, "4", False],
        "strength": [1.01, -0.5],
        "prompt": ["x" * 20_001, 5, ["a"], {"a": 1}],
        "model": ["", 1],
        "torch": ["new"],
    }
    for name, values in wrong.items():
        for value in values:
            path = png_with(tmp_path, limner=json.dumps(FOX | {name: value}))
            with pytest.raises(FileProblem, match=f"cannot be: .*{name}") as caught:
                metadata.read_settings(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"guidance": NaN}',
        '{"guidance": 1e999}',
        '{"guidance": Infinity}',
        "[" * 90_000,
        '{"seed": ' + "9" * 5000 + "}",
        '{"seed": 1' + " " * metadata.MAX_TEXT + "}",
        '{"prompt": "a\nb"}',
    ],
)
def test_foreign_json_is_refused(tmp_path, text):
    with pytest.raises(FileProblem, match="cannot be"):
        metadata.read_settings(png_with(tmp_path, limner=text))


@pytest.mark.parametrize(
    "pairs", ["Steps: many, Seed: 1, Size: 8x8", "Steps: 2, Seed: 1, Size: 8", "Steps: -2, Seed: 1, Size: 8x8"]
)
def test_foreign_infotext_is_refused(tmp_path, pairs):
    with pytest.raises(FileProblem, match="cannot be"):
        metadata.read_settings(png_with(tmp_path, parameters=f"fox\n{pairs}"))


def test_what_is_no_picture_of_ours_says_so(tmp_path):
    good = metadata.save_png(picture(), FOX, tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(good[:40])
    (tmp_path / "text.png").write_text("hello")
    picture().save(tmp_path / "bare.png")
    picture().convert("RGB").save(tmp_path / "photo.jpg")
    for name in ("torn.png", "text.png", "bare.png", "photo.jpg", "missing.png", "."):
        with pytest.raises(FileProblem, match=re.escape(str(tmp_path / name))) as caught:
            metadata.read_settings(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_flipped_byte_never_gives_wrong_settings(tmp_path):
    good = metadata.save_png(picture(), FOX, tmp_path / "good.png").read_bytes()
    for at in range(len(good)):
        (tmp_path / "bad.png").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with contextlib.suppress(FileProblem):
            assert metadata.read_settings(tmp_path / "bad.png") == FOX
