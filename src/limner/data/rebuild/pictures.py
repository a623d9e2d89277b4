"""What each picture looks like: drawn once at 128 pixels to sort out blanks and doubles and to name its colours."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from limner.data.icons import render_svg

SIZE = 128
_MARGIN = 4  # pixels round clip art
_CLIPART_WIDTH = 384  # it is drawn on its page so wide, then cropped to its ink
_BLANK = 0.015  # share of pixels that show anything
_PALE = 1.2  # mean distance from white, of 255


@dataclass(frozen=True)
class Look:
    """`flaw` says why the picture is of no use ("" if it is). `fingerprint` is equal for pictures that look the same.

    `colors` up to three names, the commonest first. `webp` is the picture itself where the pack keeps pixels of it.
    """

    flaw: str
    fingerprint: bytes = b""
    colors: tuple[str, ...] = ()
    webp: bytes = b""


def look_at(job: tuple[int, str | bytes, bool]) -> tuple[int, Look]:
    """(number, source, whether it is clip art) -> (number, what was seen)."""
    number, source, clipart = job
    try:
        if clipart:
            assert isinstance(source, bytes)
            picture = _draw_clipart(source.decode())
        elif isinstance(source, str):
            picture = _fit(render_svg(source, SIZE, SIZE), SIZE)
        else:
            picture = _fit(Image.open(io.BytesIO(source), formats=["WEBP"]), SIZE)
    except (ValueError, OSError) as error:
        return number, Look(f"cannot be drawn: {error}")
    webp = _encode(picture) if clipart else source if isinstance(source, bytes) else b""
    return number, _describe(np.array(picture), webp)


def _describe(rgba: np.ndarray, webp: bytes) -> Look:
    """uint8 (128, 128, 4), straight alpha."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    if (rgba[..., 3] > 16).mean() < _BLANK:
        return Look("blank")
    on_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    if np.abs(on_white - 255).mean() < _PALE:
        return Look("white on white")
    premultiplied = np.concatenate([rgba[..., :3] * alpha, rgba[..., 3:]], axis=-1)
    half = premultiplied.reshape(SIZE // 2, 2, SIZE // 2, 2, 4).mean((1, 3))
    coarse = ((half + 4) // 8).astype(np.uint8)
    fingerprint = hashlib.md5(coarse.tobytes(), usedforsecurity=False).digest()
    sample = rgba[4::8, 4::8].reshape(-1, 4)
    sample = sample[sample[:, 3] > 128, :3] // 16 * 16 + 8
    names = Counter(color_name(int(r), int(g), int(b)) for r, g, b in sample)
    colors = tuple(name for name, count in names.most_common(3) if count / len(sample) >= 0.14)
    return Look("", fingerprint, colors, webp)


@cache
def color_name(red: int, green: int, blue: int) -> str:
    """The plain English word for an sRGB colour, 0 to 255 each."""
    r, g, b = red / 255, green / 255, blue / 255
    value, low = max(r, g, b), min(r, g, b)
    chroma = value - low
    saturation = chroma / value if value else 0.0
    if value < 0.2 or (value < 0.33 and saturation < 0.35):
        return "black"
    if saturation < 0.13:
        return "white" if value > 0.86 else "gray" if value > 0.3 else "black"
    sector = ((g - b) / chroma) % 6 if value == r else (b - r) / chroma + 2 if value == g else (r - g) / chroma + 4
    hue = sector * 60
    if hue < 14 or hue >= 345:
        return "brown" if value < 0.5 else "pink" if saturation < 0.5 and value > 0.8 else "red"
    if hue < 42:
        return "brown" if value < 0.74 else "beige" if saturation < 0.35 else "orange"
    if hue < 68:
        return "olive" if value < 0.5 else "cream" if saturation < 0.25 else "yellow"
    if hue < 165:
        return "green"
    if hue < 192:
        return "teal"
    if hue < 255:
        return "navy blue" if value < 0.42 else "light blue" if saturation < 0.42 else "blue"
    if hue < 292:
        return "purple"
    return "pink" if value > 0.55 else "purple"


def _fit(picture: Image.Image, size: int) -> Image.Image:
    """RGBA within a transparent square of `size`, as large as fits, resampled with colours premultiplied."""
    if picture.mode == "RGBA" and picture.size == (size, size):
        return picture
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.convert("RGBA").convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(small, ((size - width) // 2, (size - height) // 2))
    return canvas


def _draw_clipart(svg: str) -> Image.Image:
    """Clip art lies anywhere on its page: crop to the ink, fit it in with a margin."""
    ink = _ink(render_svg(svg, _CLIPART_WIDTH))
    if max(ink.size) < 40:  # a small drawing on a large page: draw the page larger
        ink = _ink(render_svg(svg, int(min(_CLIPART_WIDTH * 110 / max(ink.size), 4000))))
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(_fit(ink, SIZE - 2 * _MARGIN), (_MARGIN, _MARGIN))
    return canvas


def _ink(page: Image.Image) -> Image.Image:
    box = page.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise ValueError("blank page")
    return page.crop(box)


def _encode(picture: Image.Image) -> bytes:
    """WebP, lossless where that costs little more than quality 80."""
    lossy, lossless = io.BytesIO(), io.BytesIO()
    picture.save(lossy, "WEBP", quality=80, alpha_quality=90, method=3, use_sharp_yuv=True)
    picture.save(lossless, "WEBP", lossless=True, quality=60, method=3, exact=False)
    best = lossless if len(lossless.getvalue()) <= 1.12 * len(lossy.getvalue()) else lossy
    return best.getvalue()
