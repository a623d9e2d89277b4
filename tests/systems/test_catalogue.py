"""Properties of every system in the catalogue, at the size of its tiny sibling."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from limner import catalog, pictures, pipeline, recipes
from limner.data.batches import open_batches
from limner.models.pixels import PixelsConfig
from limner.systems import diffusion

TINY = [name for name in catalog.names() if name.endswith("-tiny")]
DRAWS = [name for name in TINY if catalog.entry(name).task != "classification"]
TILED = [
    pytest.param(name, marks=[pytest.mark.slow] * (alike and name not in ("ddpm-tiny", "sit-32-tiny")))
    for name in DRAWS
    for alike in [isinstance(getattr(catalog.entry(name).config, "autoencoder", None), PixelsConfig)]
    if catalog.entry(name).task != "unconditional"  # which refuse tiles
]


def noisy(name: str):
    """Zero-initialised layers would make every test vacuous, so all parameters are noise."""
    torch.manual_seed(0)
    system = catalog.build(catalog.entry(name).config)
    for p in system.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.05)
    return system


def test_every_recipe_has_a_model_and_a_tiny_sibling():
    beside = {name for name in recipes.names() if recipes.get(name).system is None}
    alone = {"word", "t2i-adapter"}  # for models that do not ship
    pairs = ("lora", "dreambooth", "finetune", "control", "lcm", "lcm-lora", "guidance-distillation")
    pairs += ("consistency", "progressive", "reflow", "one-step")
    assert beside == alone | {f"{name}{tiny}" for name in pairs for tiny in ("", "-tiny")}
    trained = {entry.recipe or entry.name for entry in catalog.entries() if entry.recipe is not None}
    others = {"consistency-training", "consistency-training-tiny"}  # of the rows of EDM
    assert trained == set(recipes.names()) - beside - others
    whole = [name for name in recipes.names() if not name.endswith(("-tiny", "-mini")) and name not in alone]
    assert all(f"{name}-tiny" in recipes.names() for name in whole)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_receives_a_gradient(name):
    system, config = noisy(name), recipes.get(name)
    batch = open_batches(config.data, 0, torch.device("cpu")).batch(0, 8)
    sum(system.loss(batch, phase, torch.Generator().manual_seed(0))["loss"] for phase in system.phases).backward()
    silent = [n for n, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # a rotary table leaves keys' and queries' gains alive; nothing may be silent, but what SD3's words ask at last
    assert silent == ["network.joint_blocks.1.context_block.attn.ln_q.weight"] * (name == "sd3-tiny")


def test_an_image_is_the_same_alone_and_anywhere_in_a_batch():
    system = noisy("icons-tiny").eval()
    for sampler in ("euler", "euler_a", "dpmpp_2m_sde"):
        for guidance in (1.0, 3.0):
            settings = {"steps": 4, "sampler": sampler, "guidance": guidance}
            together = pipeline.generate(system, "red circle", seed=5, batch=5, **settings)
            for i in (0, 3, 4):
                alone = pipeline.generate(system, "red circle", seed=5 + i, **settings)[0]
                assert furthest(alone.image, together[i].image) <= 1, (sampler, guidance, i)  # of 255
                assert alone.settings == together[i].settings


def test_words_that_do_not_fit_are_a_warning_each():
    import warnings

    from limner.errors import Ignored

    pipe, words = pipeline.Pipeline(noisy("icons-tiny").eval(), "icons-tiny"), "one two three four five six"
    with pytest.warns(Ignored) as told:
        pipe.generate(f"{words} seven", negative=f"{words} eight", steps=1, batch=2)
    assert [re.findall(r"the (.*) is longer.*('.*') is left out", str(w.message)) for w in told] == [
        [("prompt", "'seven'")],
        [("negative prompt", "'eight'")],
    ]
    assert {w.filename for w in told} == {__file__}
    with warnings.catch_warnings(action="error"):
        pipe.generate(words, negative=f"{words} \n", steps=1)


def test_what_will_not_show_is_a_warning_each():
    import warnings

    from PIL import Image

    from limner.errors import Ignored

    pipe = pipeline.Pipeline(noisy("icons-tiny").eval(), "icons-tiny")
    wide, tall, square = (Image.new("RGB", size) for size in ((640, 480), (30, 60), (1000, 999)))
    with pytest.warns(Ignored) as told:
        pipe.generate("赤い狐 🦊", negative="blue", guidance=1, image=wide, steps=1)
    with pytest.warns(Ignored) as told_too:
        pipe.generate("red", negative="лиса fox", image=tall, width=32, height=16, steps=1)
    assert [str(w.message) for w in (*told, *told_too)] == [
        "the model does not know '赤い狐 🦊' of the prompt: say it in English words",
        "the negative prompt has no effect at guidance 1: ask for more guidance",
        "25% of the picture's width is cut off, equally at both ends, to make its 640 x 480 pixels 32 x 32: "
        "ask for a width and height of its shape",
        "the model does not know 'лиса' of the negative prompt: say it in English words",
        "75% of the picture's height is cut off, equally at both ends, to make its 30 x 60 pixels 32 x 16: "
        "ask for a width and height of its shape",
    ]
    with warnings.catch_warnings(action="error"):
        pipe.generate("red", guidance=1, image=square, steps=1)
        pipe.generate("red", negative="blue", guidance=1.5, image=wide, width=64, height=48, steps=1)


def test_an_autoencoder_gives_a_picture_back_and_reads_no_words():
    from PIL import Image

    from limner.errors import Ignored, UsageError

    system, red = noisy("icons-autoencoder-tiny").eval(), Image.new("RGBA", (32, 32), (200, 30, 30, 255))
    for prompt, values in (("fox", {}), ("", {"negative": "fox", "image": red}), ("fox", {"image": red})):
        with pytest.raises(UsageError, match="icons-autoencoder-tiny is an autoencoder: it reads no words"):
            pipeline.generate(system, prompt, **values)
    (back,) = pipeline.generate(system, "", image=red)
    with torch.inference_mode():
        rebuilt = system.decode(system.encode(pictures.to_tensor(red, 32, 32))).clamp(-1, 1)
    assert back.image.tobytes() == pictures.to_pil(rebuilt[0]).tobytes()
    with pytest.warns(Ignored, match="only gives the picture back, whatever steps and strength may be"):
        pipeline.generate(system, "", image=red, steps=2, strength=0.1)


def test_steps_outside_the_guidance_interval_ask_for_one_row_a_picture(monkeypatch):
    system = noisy("icons-tiny").eval()
    rows: list[int] = []
    system.network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))

    def latents(guidance: float, interval: tuple[float, float], prompt: str = "red circle") -> torch.Tensor:
        rows.clear()
        system.defaults = replace(system.defaults, guidance_interval=interval)
        request = pipeline.prepare(system, prompt=prompt, seed=1, steps=4, guidance=guidance)
        with torch.inference_mode():
            cond = system.condition([request.prompt], request)
            return system.sample(cond, request, pipeline.noise_source([1], "cpu"))

    nowhere, plain = latents(3.0, (0.5, 0.5)), latents(1.0, (0.0, 1.0))
    assert rows == [1, 1, 1, 1]
    assert torch.equal(nowhere, plain)
    everywhere = latents(3.0, (0.0, 1.0))
    assert rows == [2, 2, 2, 2]
    middle = latents(3.0, (0.25, 0.75))  # sigma is 1, 0.75, 0.5 and 0.25
    assert rows == [1, 2, 2, 1]
    assert (middle - everywhere).abs().max() > 1e-3
    assert (middle - plain).abs().max() > 1e-3
    assert (latents(1.0, (0.0, 1.0), "blue square") - plain).abs().max() > 1e-3
    monkeypatch.setattr(diffusion, "within", lambda interval, guided, plain, interpolant: guided)
    assert torch.equal(latents(3.0, (0.5, 0.5)), everywhere)


def furthest(a, b) -> int:
    from PIL import ImageChops

    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def test_noise_is_that_of_a_cpu_generator_whatever_the_batch():
    noise = pipeline.noise_source([7, 8], "cpu")
    first, second = noise((3, 5, 7)), noise((3, 5, 7))
    generator = torch.Generator().manual_seed(8)
    assert torch.equal(first[1], torch.randn(3, 5, 7, generator=generator))
    assert torch.equal(second[1], torch.randn(3, 5, 7, generator=generator))


@pytest.mark.parametrize(("width", "height"), [(16, 64), (64, 16), (32, 48)])
def test_any_size_on_the_grid_can_be_drawn(width, height):
    image = pipeline.generate(noisy("icons-tiny").eval(), "red circle", seed=0, steps=2, width=width, height=height)[
        0
    ].image
    assert image.size == (width, height)
    assert image.mode == "RGBA"


def test_a_little_strength_keeps_the_picture_and_a_lot_does_not():
    from PIL import Image, ImageChops, ImageStat

    system = noisy("icons-tiny").eval()
    drawing = Image.new("RGBA", (32, 32), (200, 30, 30, 255))
    plain = pictures.to_pil(system.decode(system.encode(pictures.to_tensor(drawing, 32, 32)))[0].detach())

    def distance(strength: float) -> float:
        out = pipeline.generate(system, "red circle", seed=0, steps=20, image=drawing, strength=strength)[0].image
        return sum(ImageStat.Stat(ImageChops.difference(out, plain)).mean)

    assert distance(0.05) < distance(1.0) / 2


def test_a_picture_of_a_camera_held_sideways_is_turned(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (64, 32))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "phone.jpg", exif=exif)
    assert pictures.open_image(tmp_path / "phone.jpg").size == (32, 64)


def test_pixels_survive_the_way_to_a_tensor_and_back():
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    rgba[..., 3] = np.where(rgba[..., 3] < 128, 0, 255)
    rgba[rgba[..., 3] == 0] = 0
    back = np.asarray(pictures.to_pil(pictures.to_tensor(Image.fromarray(rgba), 32, 32)[0]))
    assert (abs(back.astype(int) - rgba) <= 1).all()


def test_what_nobody_sees_is_transparent():
    import numpy as np

    alpha = torch.tensor([0.0, 11.0, 15.0, 16.0, 17.0, 255.0]).expand(4, 1, 6) / 127.5 - 1  # white, premultiplied
    image = pictures.to_pil(alpha)
    assert np.asarray(image)[0, :, 3].tolist() == [0, 0, 0, 16, 17, 255]
    assert image.getchannel("A").getbbox() == (3, 0, 6, 1)


def drawing_of(name: str, **told):
    """(system, what it is asked for): a picture of its own size over another."""
    import numpy as np
    from PIL import Image

    system = noisy(name).eval()
    side = system.defaults.max_size
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8))
    prompt = "red circle" if system.task == "text-to-image" else ""
    steps = {"text-to-image": {"steps": 2, "strength": 0.8}, "unconditional": {"strength": 0.02}}.get(system.task, {})
    return system, {"prompt": prompt, "image": picture, "width": side, "height": side, "seed": 4, **steps, **told}


@pytest.mark.filterwarnings("ignore::limner.errors.Ignored")
@pytest.mark.parametrize("name", TILED)
def test_tiles_as_large_as_the_picture_change_nothing_and_smaller_ones_do(name):
    system, told = drawing_of(name)
    side = told["width"]
    whole = pipeline.generate(system, **told)[0].image
    for more in ({"tile": side}, {"vae_tile": side}, {"tile": 0, "vae_tile": 0}):
        assert pipeline.generate(system, **told, **more)[0].image.tobytes() == whole.tobytes(), more
    half = side // 2 // system.grid * system.grid
    for more in ({"tile": half}, {"vae_tile": half}):
        cut = pipeline.generate(system, **told, **more)[0]
        assert cut.image.size == whole.size
        changed = cut.image.tobytes() != whole.tobytes()
        assert changed == ((system.grid > 1) if "vae_tile" in more else system.task != "autoencoding"), more


@pytest.mark.filterwarnings("ignore::limner.errors.Ignored")
@pytest.mark.parametrize("name", TILED)
def test_pictures_in_tiles_are_the_same_alone_and_in_a_batch_and_redone_from_their_settings(name):
    system, told = drawing_of(name)
    half = told["width"] // 2 // system.grid * system.grid
    together = pipeline.generate(system, **told, tile=half, vae_tile=half, batch=3)
    last = together[2]
    assert (last.settings["tile"], last.settings["vae_tile"]) == (half, half)
    again = {k: v for k, v in last.settings.items() if k not in ("limner", "model", "model_hash")}
    alone = pipeline.generate(system, image=told["image"], **again)[0]
    assert alone.settings == last.settings
    assert furthest(alone.image, last.image) <= 1


@pytest.mark.filterwarnings("ignore::limner.errors.Ignored")
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("padding", [0, 7, 500])
def test_what_a_mask_keeps_is_kept_of_pictures_of_any_size(name, padding):
    import numpy as np
    from PIL import Image

    system, told = drawing_of(name, only_masked=True, padding=padding, mask_blur=0)
    side = system.defaults.width
    rng = np.random.default_rng(padding)
    for size in ((3 * side + 1, side // 2), (side + 5, 2 * side + 3)):
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        left, top = (int(rng.integers(0, n - 7)) for n in size)
        mask = Image.new("L", size)
        mask.paste(255, (left, top, left + 8, top + 6))
        asked = told | {"image": picture, "mask": mask, "width": side, "height": side}
        painted = np.asarray(pipeline.generate(system, **asked)[0].image.convert("RGB"))
        white = np.asarray(mask) > 0
        assert painted.shape[:2] == (size[1], size[0])
        assert (painted == np.asarray(picture))[~white].all()
        assert (painted != np.asarray(picture))[white].any()
