"""Folders of pictures, kind and unkind."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from limner.data import samples as samples_module
from limner.data.folders import open_folder, square
from limner.data.samples import Piece, covering, told_bare
from limner.errors import FileProblem, ImageProblem


def paint(path, width=8, height=8, color=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), color).save(path, **options)


def planes(samples, i, size=4):
    """(4, size, size), premultiplied."""
    return torch.from_numpy(covering(samples.load(i), size, size).transpose(2, 0, 1).copy())


def test_pictures_come_in_the_order_of_their_names_with_the_text_beside_them(tmp_path):
    paint(tmp_path / "b.png", color=(0, 0, 255))
    paint(tmp_path / "a.JPG", quality=100)
    paint(tmp_path / "deep" / "c.webp", color=(0, 255, 0), lossless=True)
    (tmp_path / "b.txt").write_text("a blue square\n\n  blue  \n")
    (tmp_path / "a.txt").write_text("rojo, 赤", encoding="utf-8")
    (tmp_path / "deep" / "c.txt").write_text("green")
    samples = open_folder(tmp_path)
    assert samples.ids == ["a.JPG", "b.png", "deep/c.webp"]
    assert samples.captions == [("rojo, 赤",), ("a blue square", "blue"), ("green",)]
    assert planes(samples, 1)[:, 0, 0].tolist() == [0, 0, 255, 255]
    assert planes(samples, 2)[:, 3, 3].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.jsonl"])
def test_captions_may_lie_in_a_table(tmp_path, table):
    for name in ("a.png", "sub/b.png", "c.png"):
        paint(tmp_path / name)
    rows = [
        {"file_name": "sub/b.png", "text": "second", "fr": "deux"},
        {"file_name": "a.png", "text": ["first", "one"], "fr": "un"},
        {"file_name": "a.png", "text": "1", "fr": "1"},
    ]
    (tmp_path / table).write_text("\n".join(map(json.dumps, rows)) + "\n")
    samples = open_folder(tmp_path)
    assert samples.captions == [("first", "one", "1"), ("",), ("second",)]
    assert told_bare(samples) == "1 of 3 pictures have no caption: c.png"
    assert open_folder(tmp_path, "fr").captions == [("un", "1"), ("",), ("deux",)]


def test_pictures_without_any_captions_are_a_set_without_words(tmp_path):
    paint(tmp_path / "a.png")
    samples = open_folder(tmp_path)
    assert samples.captions == [("",)]
    assert told_bare(samples) == ""


def test_a_mask_lies_beside_its_picture_and_is_no_sample(tmp_path):
    for name in ("a.png", "a-mask.png", "b.jpg", "b.mask.png", "c.png", "lone-mask.png"):
        paint(tmp_path / name, color=(255, 255, 255) if "mask" in name else (9, 9, 9))
    samples = open_folder(tmp_path)
    assert samples.ids == ["a.png", "b.jpg", "c.png", "lone-mask.png"]
    assert [samples.mask(i) is not None for i in range(4)] == [True, True, False, False]
    assert samples.mask(0).getpixel((0, 0)) == 255
    assert len(open_folder(tmp_path, masks=False)) == 6


def test_a_picture_covers_its_shape_and_what_is_over_is_cut_off(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (0, 200, 0)
    wide[:, 8:] = (0, 0, 99)
    Image.fromarray(wide).save(tmp_path / "a.png")
    picture = open_folder(tmp_path).load(0)
    middle = covering(picture, 4, 4)
    assert middle.shape == (4, 4, 4)
    assert (middle == (0, 200, 0, 255)).all()
    assert (covering(picture, 4, 4, (1, 1)) == (0, 0, 99, 255)).all()
    assert (covering(picture, 4, 4, (0, 0)) == (0, 0, 0, 255)).all()
    assert covering(picture, 8, 2).shape == (2, 8, 4)
    grey = covering(picture.convert("L"), 4, 4)
    assert grey.shape == (4, 4, 1)
    assert (grey == 117).all()


def test_opaque_pictures_are_scaled_as_others_are():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 200, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    opaque = covering(Image.fromarray(pixels), 16, 16)
    pixels[0, 0, 3] = 0  # far from the middle
    assert np.abs(covering(Image.fromarray(pixels), 16, 16).astype(int) - opaque).max() == 0


def test_the_whole_may_be_kept_on_transparent_ground():
    wide = np.zeros((4, 12, 4), np.uint8)
    wide[...] = (0, 200, 0, 255)
    whole = square(Image.fromarray(wide), 12)
    assert whole[6, 6].tolist() == [0, 200, 0, 255]
    assert whole[:, 0, 3].tolist() == [0] * 4 + [255] * 4 + [0] * 4


def test_colours_are_premultiplied_and_stay_below_alpha(tmp_path):
    paint(tmp_path / "a.png", color=(100, 0, 0, 128), mode="RGBA")
    edge = np.zeros((32, 32, 4), np.uint8)
    edge[..., 3] = 128
    edge[:, 16:, :3] = 255  # a hard edge, where resampling overshoots
    Image.fromarray(edge).save(tmp_path / "b.png")
    hidden = np.zeros((32, 32, 4), np.uint8)
    hidden[:, :16] = (255, 0, 0, 255)
    hidden[:, 16:] = (0, 255, 0, 0)  # green that nobody can see
    Image.fromarray(hidden).save(tmp_path / "c.png")
    samples = open_folder(tmp_path)
    images = torch.stack([planes(samples, i, 12) for i in range(3)])
    assert images[0, :, 0, 0].tolist() == [50, 0, 0, 128]
    assert (images[:, :3] <= images[:, 3:]).all()
    assert images[1, 3].unique().tolist() == [128]
    assert images[2, 1].max() == 0
    assert planes(samples, 0, 8)[:, 0, 0].tolist() == [50, 0, 0, 128]


def test_a_photo_is_turned_upright_and_deep_grey_is_not_clipped(tmp_path):
    sideways = np.zeros((8, 12, 3), np.uint8)
    sideways[:, :6] = 255  # white on the left; orientation 6: the camera was turned, so white belongs on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(sideways).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(sideways).save(tmp_path / "b.jpg", exif=exif)
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "c.png")
    samples = open_folder(tmp_path)
    for i in range(2):
        assert samples.size(i) == samples.load(i).size == (8, 12)
        assert planes(samples, i, 8)[0, 0].min() > 250
        assert planes(samples, i, 8)[0, 7].max() < 5
    assert planes(samples, 2, 8)[:, 0, 0].tolist() == [128, 128, 128, 255]


def test_a_size_is_found_in_the_header_also_behind_long_metadata(tmp_path, monkeypatch):
    paint(tmp_path / "a.png", 30, 20)
    paint(tmp_path / "b.jpg", 20, 30, icc_profile=bytes(200_000))
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    samples = open_folder(tmp_path)
    read, asked = Piece.read, []
    monkeypatch.setattr(Piece, "read", lambda self, most=-1: asked.append((self.path.name, most)) or read(self, most))
    assert [samples.size(i) for i in range(2)] == [(30, 20), (20, 30)]
    assert asked == [("a.png", 65536), ("b.jpg", 65536), ("b.jpg", -1)]
    with pytest.raises(ImageProblem, match=r"^c\.png cannot be read"):
        samples.load(2)


@pytest.mark.parametrize("name", ["torn.png", "text.jpg", "disguised.png", "gone.png"])
def test_a_picture_that_cannot_be_read_is_named_and_nothing_of_this_machine_is(tmp_path, name):
    paint(tmp_path / "torn.png", 64, 64)
    paint(tmp_path / "gone.png")
    data = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[:60])
    (tmp_path / "text.jpg").write_text("no picture")
    paint(tmp_path / "disguised.png", format="GIF")
    samples = open_folder(tmp_path)
    (tmp_path / "gone.png").unlink()
    with pytest.raises(ImageProblem, match=rf"^{name} cannot be read") as caught:
        samples.load(samples.ids.index(name))
    assert "0x" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_picture_of_too_many_pixels_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "MAX_PIXELS", 63)
    paint(tmp_path / "a.png", 8, 8)
    for ask in (open_folder(tmp_path).load, open_folder(tmp_path).size):
        with pytest.raises(ImageProblem, match="8 x 8 pixels, more than"):
            ask(0)


def test_a_caption_that_is_no_text_makes_its_picture_unfit(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("fine")
    samples = open_folder(tmp_path)
    assert samples.problems == {0: "a.txt is not UTF-8 text: unexpected end of data at byte 3"}
    assert samples.captions[1] == ("fine",)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no picture in"),
        ({"lost.txt": "words"}, r"1 captions in .* have no picture: lost\.txt"),
        ({"a.png": None, "lost.txt": "words"}, r"1 captions in .* have no picture: lost\.txt"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "b.png", "text": "x"}'}, r"have no picture: b\.png"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png"}'}, "line 1 of"),
        ({"a.png": None, "metadata.jsonl": "{"}, "line 1 of"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": 3}'}, "line 1 of .* has no text"),
        ({"a.png": None, "metadata.jsonl": b"\xff\xfe\xfa"}, "UTF-8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, files, said):
    for name, content in files.items():
        if content is None:
            paint(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileProblem, match=said):
        open_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileProblem, match="nowhere is not a folder"):
        open_folder(tmp_path / "nowhere")
