"""A pack made here of a few SVG texts and WebP bytes is read, drawn, kept and told apart."""

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limner.data import icons
from limner.data.batches import caption_weights
from limner.data.icons import CAPTION_WEIGHTS, GROUPS, PART_SHARES, IconRecord, mirrors, open_icons
from limner.errors import FileProblem, ImageProblem, MissingExtra, UnknownName, UsageError

HALF_RED = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8" width="128" height="128">'
    '<rect width="4" height="8" fill="#ff0000" fill-opacity="0.5"/></svg>'
)


def row(number: int, **fields) -> dict:
    base = {
        "id": f"toy/{number}", "set": "toy", "style": "toy style", "concept": "mirror", "label": "mirror",
        "group": "object", "tone": None, "tint": None, "colors": ["red"], "tags": ["glass"],
        "captions": ["mirror", "mirror, toy style", "mirror, glass", "mirror, red"], "split": "train", "weight": 1.0,
        "licence": "MIT", "part": "emoji", "core": True, "hex": None,
    }  # fmt: skip
    assert set(fields) <= set(base)
    return base | fields


def webp(rgba: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


def write(folder: Path, rows: list[dict], sources: list[str | bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    rasters = [b"" if isinstance(source, str) else source for source in sources]
    (folder / "svgs.json.xz").write_bytes(
        lzma.compress(json.dumps([s if isinstance(s, str) else None for s in sources]).encode())
    )
    offsets = np.cumsum([0, *map(len, rasters)])
    np.savez(folder / "raster.npz", blob=np.frombuffer(b"".join(rasters), np.uint8), offsets=offsets)
    (folder / "captions.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    return folder


def one_record(**fields) -> IconRecord:
    values = row(0, **fields)
    return IconRecord(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def test_an_svg_is_drawn_at_any_size_with_premultiplied_colours(tmp_path):
    pack = open_icons(write(tmp_path / "p", [row(0)], [HALF_RED]))
    for size in (8, 100):
        picture = pack.render(0, size)
        assert picture.shape == (size, size, 4)
        assert picture.dtype == np.uint8
        assert (picture[:, : size // 2] == [128, 0, 0, 128]).all()  # a sharp edge: drawn at this size, not resized
        assert (picture[:, size // 2 :] == 0).all()


def test_a_raster_is_resampled_without_the_colour_of_transparent_pixels(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = (255, 0, 0, 255)
    rgba[:, 8:] = (0, 255, 0, 0)  # green that nobody can see
    pack = open_icons(write(tmp_path / "p", [row(0)], [webp(rgba)]))
    for size in (3, 16, 40):
        picture = pack.render(0, size)
        assert picture[..., 1].max() == 0
        assert picture[..., 0].max() == 255
        assert (picture[..., :3] <= picture[..., 3:]).all()


def test_a_raster_that_is_not_square_is_shown_whole(tmp_path):
    rgba = np.full((8, 16, 4), 255, np.uint8)
    picture = open_icons(write(tmp_path / "p", [row(0)], [webp(rgba)])).render(0, 16)
    assert picture[:, :, 3].tolist() == [[0] * 16] * 4 + [[255] * 16] * 8 + [[0] * 16] * 4


def test_an_image_set_holds_the_split_and_the_selection_in_the_order_of_the_pack(tmp_path):
    rows = [row(0), row(1, split="val"), row(2, style="other"), row(3, tone="dark skin tone")]
    pack = open_icons(write(tmp_path / "p", rows, [HALF_RED] * 4))
    images = pack.image_set("train", size=8)
    assert images.ids == ["toy/0", "toy/2", "toy/3"]
    assert images.images.shape == (3, 4, 8, 8)
    assert images.images.dtype == torch.uint8
    assert (images.images[0, 0] == torch.tensor([128] * 4 + [0] * 4)).all()  # channel, row, column
    assert images.images[0, 1:, 0, 0].tolist() == [0, 0, 128]
    assert images.captions[0] == ("mirror", "mirror, toy style", "mirror, glass", "mirror, red")
    assert set(images.groups) == set(GROUPS)
    assert images.groups["tone"] == ["", "", "dark skin tone"]
    assert pack.image_set(None, size=8).ids == [r["id"] for r in rows]
    assert pack.image_set("train", size=8, select=lambda r: r.style == "other").ids == ["toy/2"]


def test_each_part_gets_its_share_of_the_draws_and_weights_decide_inside(tmp_path):
    parts = ["emoji"] * 3 + ["icon"] + ["mono"] * 2 + ["clipart"]
    rows = [row(i, part=part, weight=2.0 if i == 0 else 1.0) for i, part in enumerate(parts)]
    weights = open_icons(write(tmp_path / "p", rows, [HALF_RED] * 7)).image_set(size=4).weights
    share = weights / weights.sum()
    for part, wanted in PART_SHARES.items():
        assert share[[p == part for p in parts]].sum().item() == pytest.approx(wanted)
    assert weights[0] == 2 * weights[1]
    assert weights.mean().item() == pytest.approx(1)


def test_the_part_shares_and_the_caption_shares_are_whole():
    assert sum(PART_SHARES.values()) == pytest.approx(1)
    assert sum(CAPTION_WEIGHTS) == pytest.approx(1)


def test_drawn_pictures_are_kept_and_not_drawn_again(tmp_path, monkeypatch):
    pack = open_icons(write(tmp_path / "p", [row(0), row(1)], [HALF_RED] * 2))
    cache = tmp_path / "cache"
    first = pack.image_set(size=8, cache=cache)
    monkeypatch.setattr(icons, "draw", lambda *_: pytest.fail("drawn again"))
    again = pack.image_set(size=8, cache=cache)
    assert torch.equal(first.images, again.images)
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".npy"]


def test_another_size_selection_or_pack_is_kept_apart(tmp_path):
    pack = open_icons(write(tmp_path / "p", [row(0), row(1)], [HALF_RED] * 2))
    blue = open_icons(write(tmp_path / "q", [row(0), row(1)], [HALF_RED.replace("#ff0000", "#0000ff")] * 2))
    cache = tmp_path / "cache"
    assert pack.image_set(size=8, cache=cache).images[0, 0, 0, 0] == 128
    assert pack.image_set(size=4, cache=cache).images.shape[-1] == 4
    assert pack.image_set(size=8, cache=cache, select=lambda r: r.id == "toy/1").ids == ["toy/1"]
    assert blue.image_set(size=8, cache=cache).images[0, 2, 0, 0] == 128
    assert len(list(cache.glob("*.npy"))) == 4
    with pytest.raises(FileProblem, match=r"npy is a file: give the folder to keep"):
        pack.image_set(size=8, cache=next(cache.glob("*.npy")))


def test_workers_draw_what_one_process_draws(tmp_path):
    svgs = [HALF_RED.replace("0.5", f"{i / 80:.3f}") for i in range(80)]
    pack = open_icons(write(tmp_path / "p", [row(i) for i in range(80)], svgs))
    alone, together = (pack.image_set(size=8, workers=n).images for n in (1, 2))
    assert torch.equal(alone, together)
    assert len(set(alone[:, 3, 0, 0].tolist())) == 80


def test_a_picture_that_cannot_be_drawn_is_left_out_by_name(tmp_path, capsys):
    sources = [HALF_RED, "<svg", HALF_RED.replace("#ff0000", "#0000ff")]
    pack = open_icons(write(tmp_path / "p", [row(0), row(1), row(2)], sources))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        images = pack.image_set(size=8, cache=cache)
        assert images.ids == ["toy/0", "toy/2"]
        assert images.images[:, :3, 0, 0].tolist() == [[128, 0, 0], [0, 0, 128]]
        assert len(images.captions) == len(images.weights) == len(images.mirror) == len(images.images) == 2
        assert "1 of 3 icons cannot be drawn and are left out: toy/1" in capsys.readouterr().err
    with pytest.raises(ImageProblem, match="toy/1"):
        pack.render(1, 8)


def test_a_pack_of_nothing_but_broken_pictures_is_an_error(tmp_path):
    pack = open_icons(write(tmp_path / "p", [row(0)], ["<svg"]))
    with pytest.raises(ImageProblem, match="none of 1"):
        pack.image_set(size=8, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_crash_inside_the_renderer_costs_one_picture(tmp_path, monkeypatch, capsys):
    class PanicException(BaseException):  # what Rust code raises; no Exception
        pass

    def crash(**options):
        raise PanicException("index out of bounds")

    pack = open_icons(write(tmp_path / "p", [row(0), row(1)], [HALF_RED, webp(np.zeros((8, 8, 4), np.uint8))]))
    monkeypatch.setattr(icons, "svg_renderer", lambda: crash)
    assert pack.image_set(size=8).ids == ["toy/1"]
    assert "toy/0" in capsys.readouterr().err


def test_without_the_renderer_the_message_names_the_extra(tmp_path, monkeypatch):
    pack = open_icons(write(tmp_path / "p", [row(0)], [HALF_RED]))
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(icons, "in_parallel", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(MissingExtra, match=r"resvg_py.*limner\[data\]"):
        pack.image_set(size=8)


@pytest.mark.parametrize("name", ["svgs.json.xz", "raster.npz", "captions.json.gz"])
def test_a_torn_pack_is_named(tmp_path, name):
    folder = write(tmp_path / "p", [row(0)], [HALF_RED])
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(FileProblem, match=r"torn.*limner data icons"):
        open_icons(folder)


def test_a_pack_whose_files_do_not_belong_together_is_named(tmp_path):
    with pytest.raises(FileProblem, match="1 SVG texts, 1 rasters and 2 records"):
        open_icons(write(tmp_path / "p", [row(0), row(1)], [HALF_RED]))


def test_the_pack_is_looked_for_in_the_usual_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIMNER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileProblem, match="run `limner data icons`"):
        open_icons()
    (tmp_path / "cache" / "limner").mkdir(parents=True)
    write(tmp_path / "cache" / "limner" / "icons", [row(0, label="from the cache")], [HALF_RED])
    assert open_icons().records[0].label == "from the cache"
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "icons", [row(0, label="from here")], [HALF_RED])
    assert open_icons().records[0].label == "from here"
    monkeypatch.setenv("LIMNER_DATA", str(write(tmp_path / "given", [row(0, label="as told")], [HALF_RED])))
    assert open_icons().records[0].label == "as told"


def test_batches_draw_the_captions_by_their_shares(tmp_path):
    weights = caption_weights(open_icons(write(tmp_path / "p", [row(0)], [HALF_RED])).image_set(size=4))
    assert weights[0].tolist() == pytest.approx(CAPTION_WEIGHTS)


def test_an_unknown_split_an_empty_selection_and_no_pixels_are_refused(tmp_path):
    pack = open_icons(write(tmp_path / "p", [row(0)], [HALF_RED]))
    with pytest.raises(UnknownName, match="Did you mean 'train'"):
        pack.image_set("trian")
    with pytest.raises(UsageError, match="no icon"):
        pack.image_set("val")
    with pytest.raises(UsageError, match="0 pixels"):
        pack.image_set(size=0)


@pytest.mark.parametrize(
    ("label", "group", "tags"),
    [
        ("flag of andorra", "flag", ()),
        ("andorra", "flag", ()),
        ("peace", "symbol", ()),
        ("zodiac leo", "symbol", ()),
        ("backhand index pointing left", "people", ()),
        ("man kneeling, facing right, dark skin tone", "people", ()),
        ("leftwards hand", "people", ()),
        ("three o'clock", "travel", ()),
        ("mantelpiece clock", "travel", ()),
        ("stop sign", "travel", ()),
        ("arrow circle", "icon", ()),
        ("ok button", "object", ()),
        ("letter q", "icon", ()),
        ("dna2", "icon", ()),
        ("waxing crescent moon", "travel", ()),
        ("globe showing americas", "travel", ()),
        ("chart increasing", "object", ()),
        ("pendulum", "object", ("clock",)),
    ],
)
def test_sides_signs_times_and_writing_are_not_mirrored(label, group, tags):
    assert not mirrors(one_record(label=label, group=group, tags=list(tags)))


@pytest.mark.parametrize(
    "label",
    ["red apple", "grinning face", "man artist, dark skin tone", "t-shirt", "bright sun", "upper body", "a fox"],
)
def test_most_things_are_mirrored(label):
    assert mirrors(one_record(label=label))


@pytest.mark.skipif("LIMNER_DATA" not in os.environ, reason="LIMNER_DATA names no icon pack")
def test_the_full_pack_is_the_one_that_the_figures_are_about():
    pack = open_icons()
    assert len(pack) == 38_816
    assert sum(r.split == "train" for r in pack.records) == 36_196
    assert len({r.id for r in pack.records}) == len(pack)
    assert {r.part for r in pack.records} == set(PART_SHARES)
    assert all(len(r.captions) >= len(CAPTION_WEIGHTS) for r in pack.records)
    assert not any(mirrors(r) for r in pack.records if "flag of" in r.label)
    assert pack.render(0, 64)[32, 32, 3] == 255


@pytest.mark.parametrize("kept_from_it", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_script_that_starts_itself_again_in_every_process_is_told_so(tmp_path, kept_from_it):
    script = tmp_path / "script.py"
    script.write_text(
        f"from limner.data.icons import in_parallel\nif {not kept_from_it} or __name__ == '__main__':\n"
        "    print(*in_parallel(len, ['ab'] * 70, 2, 'measuring'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) is kept_from_it
    assert ("measuring: a process ended before its time" in done.stderr) is not kept_from_it
    assert done.stdout.split() == ["2"] * 70 * kept_from_it
