"""Pictures between files and tensors, and masks: where to paint, white, and what to keep, black."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from limner.errors import ImageProblem, LimnerError

MAX_PIXELS = 64_000_000


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A PNG, JPEG or WebP file, or a Pillow image, as RGBA. Raises ImageProblem."""
    return _opened(source).convert("RGBA")


def _opened(source: str | Path | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    path = Path(source)
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ImageProblem(f"{path} has {file.width} x {file.height} pixels, more than 64 million: shrink it")
            return ImageOps.exif_transpose(file)  # as cameras mean it
    except LimnerError:
        raise
    except FileNotFoundError as error:
        raise ImageProblem(f"no picture {path}: give the path of a PNG, JPEG or WebP file") from error
    except IsADirectoryError as error:
        raise ImageProblem(f"{path} is a folder: give the path of one PNG, JPEG or WebP file in it") from error
    except UnidentifiedImageError as error:
        raise ImageProblem(f"{path} is no PNG, JPEG or WebP picture, or not whole: make one of it") from error
    except Exception as error:  # Pillow's plugins raise many kinds
        raise ImageProblem(f"{path} cannot be read as a PNG, JPEG or WebP picture: is it whole?") from error


def digest(image: Image.Image) -> str:
    """Twelve digits that tell a picture's pixels from others."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:12]


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to cover the size, cropped to its middle; RGBA becomes premultiplied RGBa, so that edges keep
    their colour."""
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.convert("RGBa") if image.mode == "RGBA" else image
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """An RGBA picture as `fit` makes it, premultiplied (1, 4, height, width) in [-1, 1]."""
    pixels = np.asarray(fit(image.convert("RGBA"), width, height))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def opaque(images: Tensor, channels: int = 3) -> Tensor:
    """Premultiplied RGBA (b, 4, h, w) in [-1, 1] on white, where `channels` is 3; other images as they are."""
    return images[:, :3] + 1 - images[:, 3:] if channels == 3 and images.shape[1] == 4 else images


FAINT = 16
"""Of 255: less alpha than nobody sees, which drawings have in places and trimming would stop at."""


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [-1, 1] -> RGB; (4, h, w) premultiplied -> straight RGBA, where alpha under `FAINT` becomes 0."""
    pixels = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
    if len(image) == 3:
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    alpha = pixels[..., 3:]
    colour = np.where(alpha > 0, pixels[..., :3] * 255 / np.maximum(alpha, 1), 0)
    alpha = np.where(alpha < FAINT - 0.5, 0, alpha)
    colour = np.where(alpha == 0, 0, colour)
    rgba = np.concatenate([colour, alpha], -1).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgba)


# -------------------------------------------------------------------- masks


def open_mask(source: str | Path | Image.Image, image: Image.Image) -> Image.Image:
    """A picture as shades of grey, transparent black, of the size of `image`. Raises ImageProblem."""
    mask = open_image(source)
    if mask.size != image.size:
        raise ImageProblem(
            f"the mask has {mask.width} x {mask.height} pixels, the picture {image.width} x {image.height}: "
            "give one of the same size"
        )
    grey = _on_black(mask)
    if grey.getextrema()[1] == 0:
        raise ImageProblem("the mask is black everywhere, so nothing would be painted: make white what is to change")
    return grey


def _on_black(image: Image.Image) -> Image.Image:
    """An RGBA picture as shades of grey."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L")


def expanded(
    image: Image.Image, by: tuple[int, int, int, int], mask: Image.Image | None = None
) -> tuple[Image.Image, Image.Image]:
    """The RGBA picture with so many pixels more at the left, top, right and bottom, its edges drawn out there, and a
    mask that is white there and elsewhere what `mask` is, or black."""
    left, top, right, bottom = by
    pixels = np.asarray(image)
    wide = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    whole = Image.new("L", (wide.shape[1], wide.shape[0]), 255)
    whole.paste(mask if mask is not None else 0, (left, top, left + image.width, top + image.height))
    return Image.fromarray(wide), whole


def mask_tensor(mask: Image.Image, width: int, height: int) -> Tensor:
    """A mask as `fit` makes it, (1, 1, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(fit(mask, width, height), dtype=np.float32))[None, None] / 255


def open_depth(source: str | Path | Image.Image) -> Image.Image:
    """A depth map, white near and black far, as shades of grey (mode F) in all the precision that it has. Raises
    ImageProblem."""
    image = _opened(source)
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    grey = np.asarray(image if deep else _on_black(image.convert("RGBA")), dtype=np.float32)
    if not np.isfinite(grey).all() or grey.min() == grey.max():
        raise ImageProblem("the depth map says nothing: it has one shade everywhere; let what is near be white")
    return Image.fromarray(grey)


def depth_tensor(depth: Image.Image, width: int, height: int, factor: int) -> Tensor:
    """The middle of a depth map in the shape of the size, (1, 1, height / factor, width / factor), from -1, what is
    farthest, to 1, what is nearest: as Stable Diffusion 2's depth model was trained."""
    scale = min(depth.width / width, depth.height / height)
    across, down = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (depth.width - across) // 2, (depth.height - down) // 2
    pixels = torch.from_numpy(np.array(depth.crop((left, top, left + across, top + down))))[None, None]
    small = F.interpolate(pixels, (height // factor, width // factor), mode="bicubic", align_corners=False)
    far, near = small.aminmax()
    return 2 * (small - far) / (near - far).clamp(min=torch.finfo(small.dtype).tiny) - 1


def to_latents(mask: Image.Image, width: int, height: int, factor: int) -> Tensor:
    """(1, 1, height / factor, width / factor), 1 for each latent of which a pixel may change, else 0."""
    return (F.max_pool2d(mask_tensor(mask, width, height), factor) > 0).float()


Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels; the last two are outside."""


def close_up(mask: Image.Image, padding: int, width: int, height: int) -> tuple[Box, Box]:
    """The part of a picture to be drawn at width x height so that its white pixels are seen closely, and where in the
    drawing it lies: they and `padding` pixels around them, widened to the shape of the drawing and moved into the
    picture. A part that is all of the picture's width or height, and yet not of that shape, fills the middle."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(0, left - padding), max(0, top - padding)
    right, bottom = min(mask.width, right + padding), min(mask.height, bottom + padding)
    across, down = right - left, bottom - top
    if across * height > down * width:
        down = round(across * height / width)
    else:
        across = round(down * width / height)
    (left, right, begin, end), (top, bottom, first, last) = (
        _widened(left, right, across, mask.width, width),
        _widened(top, bottom, down, mask.height, height),
    )
    return (left, top, right, bottom), (begin, first, end, last)


def _widened(start: int, end: int, side: int, length: int, drawn: int) -> tuple[int, int, int, int]:
    """`start` to `end` made `side` pixels, as far as there are `length`; and where they lie in `drawn` pixels."""
    if side > length:
        size = max(1, round(length * drawn / side))
        return 0, length, (drawn - size) // 2, (drawn - size) // 2 + size
    start = min(max(0, start - (side - (end - start)) // 2), length - side)
    return start, start + side, 0, drawn


def cut(image: Image.Image, part: Box, place: Box, width: int, height: int) -> Image.Image:
    """The part of a picture or a mask scaled into its place of width x height pixels; its edges are drawn out to what
    is left of them."""
    scale = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS  # which rings beside edges
    left, top, right, bottom = place
    inner = np.asarray(image.crop(part).resize((right - left, bottom - top), scale))
    around = [(top, height - bottom), (left, width - right), (0, 0)]
    return Image.fromarray(np.pad(inner, around[: inner.ndim], mode="edge"))


def put(painted: Image.Image, part: Box, place: Box, width: int, height: int) -> Image.Image:
    """What `cut` took, painted, back where it was in a picture of that size, which is black elsewhere."""
    left, top, right, bottom = part
    whole = Image.new(painted.mode, (width, height))
    whole.paste(painted.crop(place).resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    return whole


def softened(mask: Image.Image, blur: float) -> np.ndarray:
    """(h, w) in [0, 1], how much of a pixel is new: edges fade over `blur` pixels inwards, so what is black stays."""
    hard = np.asarray(mask, dtype=np.float32) / 255
    if not blur:
        return hard
    wide = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur / 2)), dtype=np.float32) / 255
    return np.minimum(hard, np.clip(2 * wide - 1, 0, 1))


def paste(painted: Image.Image, image: Image.Image, mask: Image.Image, blur: float) -> Image.Image:
    """`painted` over `image` where the mask says so. What it keeps is the picture's own, bit for bit where that was of
    this size already; a transparent picture goes onto white under a painting without transparency."""
    size = painted.size
    if painted.mode == "RGB":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    whole = image if image.size == size else fit(image, *size).convert(painted.mode)
    new = softened(fit(mask, *size), blur)[..., None]
    old, top = (np.asarray(picture, dtype=np.float32) for picture in (whole, painted))
    if painted.mode == "RGBA":  # colours count by their alpha
        alpha = (1 - new) * old[..., 3:] + new * top[..., 3:]
        mixed = (1 - new) * old[..., :3] * old[..., 3:] + new * top[..., :3] * top[..., 3:]
        mixed = np.concatenate([mixed / np.maximum(alpha, 1e-6), alpha], axis=-1)
    else:
        mixed = (1 - new) * old + new * top
    pixels = np.where(new > 0, mixed.round().clip(0, 255), old).astype(np.uint8)
    return Image.fromarray(pixels)
