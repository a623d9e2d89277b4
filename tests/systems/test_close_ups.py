"""Painting what is around a mask closely: which part is drawn, and that it comes back to where it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from limner import catalog, metadata, pictures, pipeline
from limner.errors import UsageError
from limner.types import Control

SIDES = st.integers(1, 200)


def noise(width: int, height: int, mode: str = "RGBA") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


@pytest.fixture(scope="module")
def systems(tiny_model, sd1_folder):
    """One that draws with transparency, one without."""
    return [catalog.load(tiny_model), catalog.load(sd1_folder)]


@pytest.mark.parametrize(
    ("white", "padding", "size", "part", "place"),
    [
        ((40, 30, 60, 50), 0, (32, 32), (40, 30, 60, 50), (0, 0, 32, 32)),
        ((40, 30, 60, 50), 10, (32, 32), (30, 20, 70, 60), (0, 0, 32, 32)),
        ((40, 30, 60, 50), 10, (64, 32), (10, 20, 90, 60), (0, 0, 64, 32)),  # widened
        ((40, 30, 60, 50), 10, (32, 64), (30, 0, 70, 80), (0, 0, 32, 64)),  # and moved down into the picture
        ((80, 0, 100, 10), 5, (32, 32), (75, 0, 100, 25), (0, 0, 32, 32)),  # in a corner
        ((0, 0, 100, 80), 32, (32, 32), (0, 0, 100, 80), (0, 3, 32, 29)),  # no room for the shape
        ((0, 79, 100, 80), 0, (64, 32), (0, 30, 100, 80), (0, 0, 64, 32)),
    ],
)
def test_the_part_around_a_mask(white, padding, size, part, place):
    assert pictures.close_up(box((100, 80), *white), padding, *size) == (part, place)


@settings(deadline=None, max_examples=300)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 60), st.data())
def test_the_part_holds_the_mask_and_has_the_shape_of_the_drawing(across, down, width, height, padding, data):
    left, top = data.draw(st.integers(0, across - 1)), data.draw(st.integers(0, down - 1))
    right, bottom = data.draw(st.integers(left + 1, across)), data.draw(st.integers(top + 1, down))
    mask = box((across, down), left, top, right, bottom)
    part, place = pictures.close_up(mask, padding, width, height)
    assert 0 <= part[0] <= max(0, left - padding) < min(across, right + padding) <= part[2] <= across
    assert 0 <= part[1] <= max(0, top - padding) < min(down, bottom + padding) <= part[3] <= down
    sides, drawn = ([where[k + 2] - where[k] for k in (0, 1)] for where in (part, place))
    if min(drawn) > 4:  # one scale both ways, but for half a pixel of the part and of the drawing
        apart = (drawn[0] / sides[0]) / (drawn[1] / sides[1])
        assert max(apart, 1 / apart) <= (1 + 0.5 / (min(sides) - 0.5)) * (1 + 1 / min(drawn)) + 1e-9
    if place != (0, 0, width, height):  # then the picture is seen from edge to edge
        assert (part[0], part[2]) == (0, across) or (part[1], part[3]) == (0, down)
    seen = pictures.cut(noise(across, down), part, place, width, height)
    assert seen.size == (width, height)
    assert pictures.put(seen, part, place, across, down).size == (across, down)


def test_what_is_cut_and_not_scaled_comes_back_as_it_was():
    image = noise(50, 20)
    part, place = pictures.close_up(box(image.size, 0, 0, 50, 20), 0, 50, 40)
    assert place == (0, 10, 50, 30)
    seen = pictures.cut(image, part, place, 50, 40)
    assert seen.crop(place).tobytes() == image.tobytes()
    assert (np.asarray(seen)[:10] == np.asarray(image)[0]).all()  # its edges are drawn out
    assert (np.asarray(seen)[30:] == np.asarray(image)[-1]).all()
    assert pictures.put(seen, part, place, 50, 20).tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(101, 67), (300, 20), (40, 90), (17, 23)])
@pytest.mark.parametrize("blur", [0, 4])
def test_outside_the_mask_every_pixel_is_kept_and_inside_none(systems, size, blur):
    image = noise(*size)
    mask = box(size, size[0] // 3, size[1] // 3, size[0] // 3 + 10, size[1] // 3 + 9)
    for system in systems:
        told = {"seed": 3, "steps": 2, "strength": 1.0, "mask_blur": blur, "padding": 5, "only_masked": True}
        picture = image if system is systems[0] else image.convert("RGB")
        painted = pipeline.generate(system, "red circle", image=picture, mask=mask, **told)[0].image
        assert painted.size == size
        old, new, white = np.asarray(picture), np.asarray(painted), np.asarray(mask) > 0
        assert (old == new)[~white].all()
        if not blur:
            assert (old != new)[white].any(-1).mean() > 0.9


def test_a_padding_that_takes_in_all_draws_as_without(systems):
    for system in systems:
        side = system.defaults.width
        image, mask = noise(side, side), box((side, side), 9, 5, 20, 17)
        told = {"seed": 3, "steps": 2, "strength": 0.9, "image": image, "mask": mask}
        whole = pipeline.generate(system, "red circle", **told)[0]
        near = pipeline.generate(system, "red circle", **told, only_masked=True, padding=side)[0]
        assert whole.image.tobytes() == near.image.tobytes()
        assert near.settings == whole.settings | {"only_masked": True, "padding": side}


@pytest.mark.parametrize("times", [1, 2])
def test_it_paints_what_is_painted_over_the_part_alone(systems, times):
    """Scaled by hand: a part of 16 or 32 px, drawn at 32, whatever else the picture shows."""
    for system in systems:
        image, side = noise(90, 70), 32 // times
        left, top = 40, 30
        mask = box(image.size, left + 4, top + 4, left + side - 4, top + side - 4)
        told = {"seed": 3, "steps": 2, "strength": 0.8, "mask_blur": 0, "width": 32, "height": 32}
        if system is systems[1]:
            image = image.convert("RGB")
        ours = pipeline.generate(system, "red circle", image=image, mask=mask, only_masked=True, padding=4, **told)
        part, inner = (left, top, left + side, top + side), (left + 4, top + 4, left + side - 4, top + side - 4)
        large = image.crop(part).resize((32, 32), Image.Resampling.LANCZOS)
        seen = mask.crop(part).resize((32, 32), Image.Resampling.BILINEAR)
        request = pipeline.prepare(system, prompt="red circle", image=large, mask=seen, **told)
        alone = pictures.to_pil(pipeline.draw(system, ["red circle"], [3], request)[0])
        wanted = image.convert(alone.mode)
        small = alone.resize((side, side), Image.Resampling.LANCZOS)
        wanted.paste(small.crop((4, 4, side - 4, side - 4)), inner[:2])
        assert np.abs(np.asarray(ours[0].image).astype(int) - np.asarray(wanted)).max() <= 1


def test_a_control_sees_the_same_part_of_its_picture(systems):
    image, mask = noise(90, 60, "RGB"), box((90, 60), 20, 10, 40, 30)
    told = {"image": image, "mask": mask, "only_masked": True, "padding": 6}
    request = pipeline.prepare(systems[1], prompt="fox", **told)
    half = image.resize((45, 30))
    request = replace(request, control=(Control(None, image), Control(None, half)))
    seen = pipeline.drawn(request)
    size = (request.width, request.height)
    assert seen.control[0].image.tobytes() == seen.image.tobytes()
    wanted = (
        half.resize((90, 60), Image.Resampling.LANCZOS).crop((14, 4, 46, 36)).resize(size, Image.Resampling.LANCZOS)
    )
    assert seen.control[1].image.convert("RGB").tobytes() == wanted.tobytes()
    assert pipeline.describe(systems[1], request)["control"][0] == request.control[0].settings()


def test_the_command_remembers_it_and_redoes_it(limner, here, tiny_model):
    picture, mask = noise(90, 60), box((90, 60), 20, 10, 40, 30)
    picture.save("fox.png")
    mask.save("mask.png")
    told = ("-m", tiny_model, "-s", 1, "--steps", 2)
    done = limner("edit", "fox.png", "red circle", *told, "--mask", "mask.png", "--only-masked", "-o", "a.png")
    assert (done.code, done.out) == (0, "a.png\n"), done.err
    assert "draws 72 x 60 pixels from 0, 0 on as 32 x 32" in done.err
    painted = Image.open("a.png")
    kept = np.asarray(mask) == 0
    assert (np.asarray(painted)[kept] == np.asarray(picture)[kept]).all()
    text = painted.info["parameters"]
    assert "Size: 32x32" in text
    assert "Mask blur: 4" in text
    assert "Inpaint area: Only masked" in text
    assert "Masked area padding: 32" in text
    remembered = metadata.from_infotext(text)
    assert (remembered["only_masked"], remembered["padding"]) == (True, 32)
    given = ("-i", "fox.png", "--mask", "mask.png")
    again = limner("generate", "-C", "a.png", "-m", tiny_model, *given, "-o", "b.png")
    assert again.code == 0, again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    same = limner("generate", "red circle", *told, *given, "--only-masked", "-o", "c.png")
    assert (here / "a.png").read_bytes() == (here / "c.png").read_bytes(), same.err
    pipe = pipeline.load(tiny_model, "cpu")
    (ours,) = pipe.edit("fox.png", "red circle", mask="mask.png", seed=1, steps=2, only_masked=True)
    assert ours.image.tobytes() == painted.tobytes()
    done = limner("edit", "fox.png", "red circle", *told, "--mask", "mask.png", "--only-masked", "--padding", 3,
                  "-W", 64, "-H", 32, "-o", "d.png")  # fmt: skip
    assert "draws 52 x 26 pixels from 4, 7 on as 64 x 32" in done.err
    assert Image.open("d.png").size == (90, 60)
    lost = limner("generate", "-C", "d.png", "-m", tiny_model, "-i", "fox.png")
    assert (lost.code, "add --mask MASK" in lost.err) == (2, True)


def test_infotexts_of_whole_pictures_have_no_padding():
    line = "Steps: 2, Sampler: Euler, Seed: 1, Inpaint area: Whole picture, Masked area padding: 32"
    assert not {"only_masked", "padding"} & metadata.from_infotext(f"fox\n{line}").keys()


def test_what_cannot_be_asked_for(systems):
    pipe, image = pipeline.Pipeline(systems[0], "x"), noise(40, 40)
    mask = box((40, 40), 0, 0, 9, 9)
    for told, message in (
        ({"only_masked": True}, "no mask was given: add --mask IMAGE"),
        ({"mask": mask, "padding": 3}, "padding is what is seen around a mask"),
        ({"mask": mask, "only_masked": True, "padding": -1}, "padding is -1: give a whole number from 0 to 65536"),
        ({"mask": mask, "only_masked": "yes"}, "only_masked is 'yes': give True or False"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe.generate("fox", image=image, steps=1, **told)
