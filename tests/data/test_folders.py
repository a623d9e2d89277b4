"""Folders of pictures, kind and unkind."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from limner.data import folders
from limner.data.folders import open_folder
from limner.errors import FileProblem, ImageProblem


def paint(path, width=8, height=8, color=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), color).save(path, **options)


def test_pictures_come_in_the_order_of_their_names_with_the_text_beside_them(tmp_path):
    paint(tmp_path / "b.png", color=(0, 0, 255))
    paint(tmp_path / "a.JPG", quality=100)
    paint(tmp_path / "deep" / "c.webp", color=(0, 255, 0), lossless=True)
    (tmp_path / "b.txt").write_text("a blue square\n\n  blue  \n")
    (tmp_path / "a.txt").write_text("rojo, 赤", encoding="utf-8")
    (tmp_path / "deep" / "c.txt").write_text("green")
    images = open_folder(tmp_path, 4)
    assert images.ids == ["a.JPG", "b.png", "deep/c.webp"]
    assert images.captions == [("rojo, 赤",), ("a blue square", "blue"), ("green",)]
    assert images.images.shape == (3, 4, 4, 4)
    assert images.images.dtype == torch.uint8
    assert images.images[1, :, 0, 0].tolist() == [0, 0, 255, 255]
    assert images.images[2, :, 3, 3].tolist() == [0, 255, 0, 255]


def test_captions_may_lie_in_metadata_jsonl(tmp_path, capsys):
    for name in ("a.png", "sub/b.png", "c.png"):
        paint(tmp_path / name)
    rows = [{"file_name": "sub/b.png", "text": "second"}, {"file_name": "a.png", "text": "first", "more": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert open_folder(tmp_path, 4).captions == [("first",), ("",), ("second",)]
    assert "1 of 3 pictures have no caption: c.png" in capsys.readouterr().err


def test_pictures_without_any_captions_are_a_set_without_words(tmp_path, capsys):
    paint(tmp_path / "a.png")
    assert open_folder(tmp_path, 4).captions == [("",)]
    assert capsys.readouterr().err == ""


def test_the_middle_is_kept_or_the_whole_on_transparent_ground(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (0, 200, 0)
    Image.fromarray(wide).save(tmp_path / "a.png")
    middle = open_folder(tmp_path, 4).images[0]
    assert middle[:, 0, 0].tolist() == [0, 200, 0, 255]
    assert middle[:, 3, 3].tolist() == [0, 200, 0, 255]
    whole = open_folder(tmp_path, 12, fit="pad").images[0]
    assert whole[:, 6, 6].tolist() == [0, 200, 0, 255]
    assert whole[3, 0].tolist() == [0] * 12
    assert whole[3, 4].tolist() == [255] * 12


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
    images = open_folder(tmp_path, 12).images
    assert images[0, :, 0, 0].tolist() == [50, 0, 0, 128]
    assert (images[:, :3] <= images[:, 3:]).all()
    assert images[1, 3].unique().tolist() == [128]
    assert images[2, 1].max() == 0


def test_a_photo_is_turned_upright_and_deep_grey_is_not_clipped(tmp_path):
    sideways = np.zeros((8, 8, 3), np.uint8)
    sideways[:, :4] = 255  # white on the left; orientation 6: the camera was turned, so white belongs on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(sideways).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "b.png")
    turned, grey = open_folder(tmp_path, 8).images
    assert turned[0, 0].tolist() == [255] * 8
    assert turned[0, 7].tolist() == [0] * 8
    assert grey[:, 0, 0].tolist() == [128, 128, 128, 255]


def test_unreadable_pictures_are_left_out_by_name(tmp_path, capsys):
    paint(tmp_path / "good.png")
    paint(tmp_path / "torn.png", 64, 64)
    data = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[:60])
    (tmp_path / "text.jpg").write_text("no picture")
    paint(tmp_path / "disguised.png", format="GIF")
    assert open_folder(tmp_path, 4).ids == ["good.png"]
    said = capsys.readouterr().err
    assert said.startswith("3 of 4 pictures are left out")
    assert all(name in said for name in ("torn.png", "text.jpg", "disguised.png"))
    (tmp_path / "good.png").unlink()
    with pytest.raises(ImageProblem, match="none of 3"):
        open_folder(tmp_path, 4)


def test_a_picture_of_too_many_pixels_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_PIXELS", 63)
    paint(tmp_path / "a.png", 8, 8)
    with pytest.raises(ImageProblem, match="8 x 8 pixels, more than"):
        open_folder(tmp_path, 4)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no picture in"),
        ({"lost.txt": "words"}, r"1 captions in .* have no picture: lost\.txt"),
        ({"a.png": None, "lost.txt": "words"}, r"1 captions in .* have no picture: lost\.txt"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "b.png", "text": "x"}'}, r"have no picture: b\.png"),
        ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png"}'}, "line 1 of"),
        ({"a.png": None, "metadata.jsonl": "{"}, "line 1 of"),
        ({"a.png": None, "a.txt": b"\xff\xfe\xfa"}, "UTF-8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, files, said):
    for name, content in files.items():
        if content is None:
            paint(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileProblem, match=said):
        open_folder(tmp_path, 4)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileProblem, match="nowhere is not a folder"):
        open_folder(tmp_path / "nowhere", 4)
