"""Pictures for ControlNets, made of pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from limner import hints
from limner.errors import UnknownName, UsageError


def shades(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    assert array.shape[2] == 3
    assert (array == array[..., :1]).all()
    return array[..., 0]


def slow_canny(image: Image.Image, low: int = 100, high: int = 200) -> np.ndarray:
    """OpenCV's, pixel by pixel, in whole numbers (its documentation and Canny's paper)."""
    rgb = np.pad(np.asarray(image, dtype=int), ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = image.height, image.width
    dx, dy, size = (np.zeros((height, width), int) for _ in range(3))
    for y in range(height):
        for x in range(width):
            best = -1
            for c in range(3):
                p = rgb[y : y + 3, x : x + 3, c]
                gx = (p[0, 2] + 2 * p[1, 2] + p[2, 2]) - (p[0, 0] + 2 * p[1, 0] + p[2, 0])
                gy = (p[2, 0] + 2 * p[2, 1] + p[2, 2]) - (p[0, 0] + 2 * p[0, 1] + p[0, 2])
                if abs(gx) + abs(gy) > best:
                    best = abs(gx) + abs(gy)
                    dx[y, x], dy[y, x], size[y, x] = gx, gy, best
    around = np.pad(size, 1)
    state = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            m, gx, gy = size[y, x], dx[y, x], dy[y, x]
            if m <= low:
                continue
            if abs(gy) < abs(gx) * np.tan(np.pi / 8):
                keep = m > around[y + 1, x] and m >= around[y + 1, x + 2]
            elif abs(gy) > abs(gx) * np.tan(3 * np.pi / 8):
                keep = m > around[y, x + 1] and m >= around[y + 2, x + 1]
            else:
                s = -1 if (gx < 0) != (gy < 0) else 1
                keep = m > around[y, x + 1 - s] and m > around[y + 2, x + 1 + s]
            if keep:
                state[y, x] = 2 if m > high else 1
    stack = list(zip(*np.nonzero(state == 2), strict=True))
    while stack:
        y, x = stack.pop()
        for v in range(max(0, y - 1), min(height, y + 2)):
            for u in range(max(0, x - 1), min(width, x + 2)):
                if state[v, u] == 1:
                    state[v, u] = 2
                    stack.append((v, u))
    return (state == 2) * 255


@pytest.mark.parametrize("seed", range(4))
def test_canny_is_opencvs(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(seed / 2))
    found = shades(hints.make("canny", image))
    assert (found == slow_canny(image)).all()
    assert 0.005 < (found > 0).mean() < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_canny_is_that_of_opencv_where_it_is_installed(seed):
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(seed / 2))
    assert (shades(hints.make("canny", image)) == cv2.Canny(np.asarray(image), 100, 200)).all()


def test_canny_finds_the_outline_of_a_square_and_nothing_in_a_ramp():
    square = Image.new("RGB", (32, 32))
    ImageDraw.Draw(square).rectangle((8, 8, 23, 23), fill="white")
    found = shades(hints.make("canny", square)) > 0
    rows, columns = np.nonzero(found)
    assert {rows.min(), columns.min()} <= {7, 8}
    assert {rows.max(), columns.max()} <= {23, 24}
    assert not found[10:22, 10:22].any()
    ramp = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None], 64, axis=0)).convert("RGB")
    assert not shades(hints.make("canny", ramp)).any()


def test_other_makers():
    square = Image.new("RGBA", (256, 256), (0, 0, 0, 0))  # transparent is white
    ImageDraw.Draw(square).rectangle((64, 64, 191, 191), fill="black")
    steep = shades(hints.make("sobel", square))
    assert steep.max() == 255
    assert steep[128, 64] > 200
    assert steep[128, 128] == steep[10, 10] == 0
    lines = shades(hints.make("scribble", square))
    assert set(np.unique(lines)) == {0, 255}
    assert lines[128, 60:68].any()
    assert not lines[128, 100:150].any()
    blurred = np.asarray(hints.make("blur", square))
    assert 50 < blurred[128, 64, 0] < 205
    assert np.array_equal(
        np.asarray(hints.make("tile", square)), np.asarray(hints.make("invert", hints.make("invert", square)))
    )
    assert hints.make("invert", square).getpixel((0, 0)) == (0, 0, 0)


def test_what_takes_a_model_or_is_unknown_is_said():
    with pytest.raises(UsageError, match="depth is found in a picture by a model of its own"):
        hints.make("depth", Image.new("RGB", (8, 8)))
    with pytest.raises(UnknownName, match="cany"):
        hints.make("cany", Image.new("RGB", (8, 8)))


def test_a_skeleton_has_its_colours_where_its_joints_and_limbs_are():
    """Four pixels thick at 512, limbs darker than joints, and only between joints that are there."""
    joints: list[tuple[float, float] | None] = [None] * 18
    joints[0], joints[1], joints[2] = (256, 100), (256, 200), (156, 200)
    found = np.asarray(hints.skeleton(joints, 512, 768))
    assert found.shape == (768, 512, 3)
    for (x, y), colour in (
        (joints[0], (255, 0, 0)), (joints[1], (255, 85, 0)), (joints[2], (255, 170, 0)),  # nose, neck, right shoulder
        ((256, 150), (0, 0, 153)), ((206, 200), (153, 0, 0)), ((306, 200), (0, 0, 0)),
    ):  # fmt: skip
        assert tuple(found[y, x]) == colour
    across, down = found[150].any(-1).nonzero()[0], found[:, 206].any(-1).nonzero()[0]
    for limb, middle in ((across, 256), (down, 200)):
        assert abs(limb.mean() - middle) <= 1
        assert 7 <= len(limb) <= 9
    assert 7 <= len(found[:, 157:170].any(-1).any(0).nonzero()[0]) <= 13
    thick = np.asarray(hints.skeleton([None if p is None else (2 * p[0], 2 * p[1]) for p in joints], 1024, 1536))
    assert 15 <= len(thick[300].any(-1).nonzero()[0]) <= 18
    assert not np.asarray(hints.skeleton([None] * 18, 64, 64)).any()
    alone = np.asarray(hints.skeleton([None] * 17 + [(30, 30)], 64, 64))
    assert {tuple(c) for c in alone[alone.any(-1)]} == {(255, 0, 85)}
