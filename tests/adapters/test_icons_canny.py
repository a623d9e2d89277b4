"""The ControlNet that ships: drawings keep to the edges that it is told, and without it they do not."""

import numpy as np
from PIL import Image, ImageDraw

from limner import catalog, hints, pipeline

SIDE = 192


def edges(image: Image.Image) -> np.ndarray:
    return np.array(hints.make("canny", hints.on_white(image)))[..., 0] > 0


def near(mask: np.ndarray, most: int = 2) -> np.ndarray:
    """What is so many pixels from it at most."""
    padded = np.pad(mask, most)
    around = [(y, x) for y in range(2 * most + 1) for x in range(2 * most + 1)]
    return np.any([padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y, x in around], axis=0)


def test_icons_canny_is_followed():
    assert catalog.shipped("icons") is None
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).ellipse((20, 60, 172, 150), fill="orange")
    pipe, told = pipeline.load("icons"), edges(picture)
    recall = {}
    for name, control in (("with", ["icons-canny"]), ("without", [])):
        asked = [{"file": file, "image": picture, "maker": "canny", "weight": 2.5} for file in control]
        (drawn,) = pipe.generate("orange circle, flat emoji", width=SIDE, height=SIDE, steps=6, seed=1, control=asked)
        found = edges(drawn.image)
        recall[name] = (told & near(found)).sum() / told.sum()
    assert recall["with"] > 0.8 > 0.4 > recall["without"], recall
