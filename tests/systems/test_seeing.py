"""Networks that see a picture to edit (InstructPix2Pix) or a depth map beside the latents, against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file

from limner import catalog, exchange, metadata, pictures, pipeline
from limner.checkpoints import single_files
from limner.errors import CheckpointMismatch, Ignored, ImageProblem, UsageError
from sweeps import sweep

from . import stable_diffusion

EDITS, DEPTH = ("instruct_pix2pix", "instruct_pix2pix_xl", "cosxl_edit"), "sd2_depth"
SCHEDULERS: dict[str, Any] = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
COSXL_SCHEDULER = stable_diffusion.PLAYGROUND_SCHEDULER | {
    "_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0,
}  # fmt: skip


class Model:
    """A folder and a single file of one model, what diffusers makes of it and what we make of both."""

    def __init__(self, name: str, tmp: Path) -> None:
        diffusers.utils.logging.set_verbosity_error()
        self.folder = getattr(stable_diffusion, name.replace("cosxl_edit", "instruct_pix2pix_xl"))(tmp)
        told = {}
        if name == "cosxl_edit":  # which no folder that diffusers saves says
            scheduler = self.folder / "scheduler" / "scheduler_config.json"
            scheduler.write_text(json.dumps(COSXL_SCHEDULER))
            index = json.loads((self.folder / "model_index.json").read_text())
            index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
            (self.folder / "model_index.json").write_text(json.dumps(index))
            told = {"is_cosxl_edit": True}
        self.file, _ = exchange.convert(self.folder, tmp / f"{name}.safetensors")
        self.theirs = diffusers.DiffusionPipeline.from_pretrained(self.folder, **told)
        self.theirs.set_progress_bar_config(disable=True)
        self.published = self.theirs.scheduler.config
        self.ours, self.of_file = catalog.load(self.folder), catalog.load(self.file)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = Model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def means(monkeypatch):
    """Latents that are the means: diffusers draws some at random."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def noise(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def grey(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("L"), dtype=np.float32))[None]


def expected(model: Model, sampler: str = "euler", **told: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and pixels of diffusers."""
    pipe = model.theirs
    if not model.published.get("sigma_data"):
        pipe.scheduler = SCHEDULERS[sampler].from_config(model.published)
    latents = pipe(
        "a red fox", negative_prompt="dull", num_inference_steps=5, generator=torch.Generator().manual_seed(3),
        output_type="latent", **told,
    ).images  # fmt: skip
    with torch.no_grad():
        return latents, pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


def drawn(system: Any, prompt: str = "a red fox", **told: Any) -> torch.Tensor:
    told = {"seed": 3, "steps": 5, "sampler": "euler", "negative": "dull", "width": 32, "height": 32} | told
    request = pipeline.prepare(system, prompt=prompt, **told)
    with torch.inference_mode():
        cond = system.condition([prompt], request)
        return system.sample(cond, request, pipeline.noise_source([3], "cpu"), **system.given(request, 1))


def assert_same(system: Any, wanted: tuple[torch.Tensor, torch.Tensor], **told: Any) -> None:
    ours = drawn(system, **told)
    assert (ours - wanted[0]).abs().max() <= 1e-4 * wanted[0].abs().max()
    with torch.inference_mode():
        pixels, theirs = (pictures.to_pil(x.clamp(-1, 1)[0]) for x in (system.decode(ours), wanted[1]))
    apart = np.abs(np.asarray(pixels, dtype=int) - np.asarray(theirs, dtype=int))
    assert (apart <= 1).mean() >= 0.999


# ------------------------------------------------------------------- editing


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ("euler", {"guidance": 7.5, "image_guidance": 1.5}), ("euler_a", {"guidance": 3.0, "image_guidance": 2.5}),
        ("ddim", {"guidance": 7.5, "image_guidance": 1.0}), ("dpmpp_2m", {"guidance": 5.0, "image_guidance": 1.2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["instruct_pix2pix", *(pytest.param(name, marks=pytest.mark.slow) for name in EDITS if name != "instruct_pix2pix")],
)
def test_a_folder_and_a_single_file_edit_as_diffusers_does(models, name, sampler, told):
    model, size = models(name), {} if name == "instruct_pix2pix" else {"width": 32, "height": 32}
    if name == "cosxl_edit" and sampler != "euler":
        pytest.skip("diffusers has EDM's noise with Euler and DPM++ 2M only, and the folder names Euler")
    theirs = {"guidance_scale": told["guidance"], "image_guidance_scale": told["image_guidance"]}
    wanted = expected(model, sampler, image=noise(), **theirs, **size)
    schedule = {"schedule": model.ours.defaults.schedule}  # which a file does not say
    for system, more in ((model.ours, {}), (model.of_file, schedule)):
        assert_same(system, wanted, image=noise(), sampler=sampler, **told, **more)


def test_guidance_rescale_counts_what_the_prompt_and_the_picture_say(models):
    model, told = models("instruct_pix2pix_xl"), {"guidance": 5.0, "image_guidance": 1.5, "guidance_rescale": 0.7}
    wanted = expected(
        model, image=noise(), width=32, height=32, guidance_scale=5.0, image_guidance_scale=1.5, guidance_rescale=0.7
    )
    assert_same(model.ours, wanted, image=noise(), **told)


def test_one_batch_asks_for_as_many_rows_as_the_guidances_need(models):
    system, rows = models("instruct_pix2pix").ours, []
    hook = system.network.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    for told, count in (((7.5, 1.5), 3), ((1.0, 1.5), 3), ((7.5, 1.0), 2), ((1.0, 1.0), 1)):
        rows.clear()
        drawn(system, image=noise(), steps=2, guidance=told[0], image_guidance=told[1])
        assert [len(x) for x in rows] == [count, count], told
        seen = [bool(x[4:].any()) for x in rows[0]]
        assert seen == ([True, True, False] if count == 3 else [True] * count)
    hook.remove()


def test_equation_3_of_the_paper_holds_of_one_step(models):
    """x0 is linear in it, and one step of Euler to 0 is x0: the three are drawn plainly."""
    system = models("instruct_pix2pix").ours
    told = {"image": noise(), "steps": 1, "guidance": 1.0, "image_guidance": 1.0, "negative": ""}
    both, picture = drawn(system, **told), drawn(system, prompt="dull", **told)
    with pytest.MonkeyPatch.context() as patch:
        given = system.given
        patch.setattr(system, "given", lambda *a: {k: v * (k != "beside") for k, v in given(*a).items()})
        neither = drawn(system, prompt="dull", **told)
    wanted = neither + 2.5 * (picture - neither) + 6.0 * (both - picture)
    told |= {"guidance": 6.0, "image_guidance": 2.5, "negative": "dull"}
    found = drawn(system, **told)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    composed = drawn(system, prompt="a red fox AND a red fox :0", **told)
    assert (composed - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("kind", [{"guidance_kind": "apg"}, {"guidance_mimic": 4.0}, {"pag_scale": 3.0}])
def test_other_guidances_take_the_picture_s_beside_them(models, kind):
    """What it adds is the same whatever they do, but for what is clipped."""
    system = models("instruct_pix2pix").ours
    told = {"image": noise(), "steps": 1, "guidance": 5.0}
    added = [
        drawn(system, **told, **more, image_guidance=2.0) - drawn(system, **told, **more, image_guidance=1.0)
        for more in ({}, kind)
    ]
    assert added[0].abs().max() > 0.01
    if "guidance_mimic" in kind:
        assert (added[0] - added[1]).abs().max() > 0.01
    else:
        assert (added[0] - added[1]).abs().max() <= 1e-4 * added[0].abs().max()


def test_less_strength_begins_over_the_picture_and_a_mask_keeps_it(models):
    system = models("instruct_pix2pix").ours
    assert system.defaults.strength == 1.0
    start = system.encode(pictures.to_tensor(noise(), 32, 32))
    whole, little = (drawn(system, image=noise(), strength=s) - start for s in (1.0, 0.1))
    assert little.abs().mean() < 0.5 * whole.abs().mean()
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    (painted,) = pipeline.generate(
        system, "fox", image=noise(), mask=mask, mask_blur=0, steps=2, width=32, height=32, seed=1
    )
    same = np.asarray(painted.image) == np.asarray(noise())
    assert same[:, 16:].all()
    assert same[:, :16].mean() < 0.5
    latents = drawn(system, image=noise(), mask=mask)
    assert torch.allclose(latents[..., 8:], start[..., 8:], atol=1e-4)
    assert not torch.allclose(latents[..., :8], start[..., :8], atol=1e-1)


def test_pictures_are_edited_alike_alone_and_in_a_batch(models):
    pipe = pipeline.Pipeline(models("instruct_pix2pix").ours, "x")
    together = pipe.edit(noise(), "make it red", seed=5, steps=2, batch=3)
    for i in (0, 2):
        (alone,) = pipe.edit(noise(), "make it red", seed=5 + i, steps=2)
        assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(together[i].image)).max() <= 1


def test_the_command_edits_remembers_and_redoes(models, limner, here, sd1_folder):
    folder = models("instruct_pix2pix").folder
    noise(48, 32).save("in.png")
    told = ("-m", folder, "--steps", 2, "-s", 3)
    assert limner("edit", "in.png", "make it red", *told, "-o", "a.png").code == 0
    assert Image.open("a.png").size == (48, 32)
    settings = metadata.read_settings(here / "a.png")
    assert [settings[name] for name in ("model", "image_guidance", "guidance", "strength")] == [
        "instruct-pix2pix", 1.5, 7.5, 1.0,
    ]  # fmt: skip
    done = limner("edit", "in.png", "make it red", *told, "--image-guidance", 2, "-o", "b.png")
    assert done.code == 0, done.err
    text = Image.open("b.png").info["parameters"]
    assert ", Image CFG scale: 2, " in text
    assert metadata.from_infotext(text)["image_guidance"] == 2
    again = limner("generate", "-C", "b.png", "-i", "in.png", "-m", folder, "-o", "c.png")
    assert again.code == 0, again.err
    assert (here / "b.png").read_bytes() == (here / "c.png").read_bytes() != (here / "a.png").read_bytes()
    assert "add -i PICTURE" in limner("generate", "-C", "b.png", "-m", folder).err
    other = limner("generate", "-C", "b.png", "-i", "in.png", "-m", sd1_folder, "-W", 32, "-H", 32, "-o", "d.png")
    assert (other.code, "the image_guidance painted with is left out" in other.err) == (0, True), other.err


# ------------------------------------------------------------------- depth


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.8, None])
def test_a_folder_and_a_single_file_draw_after_depth_as_diffusers_does(models, strength, sampler, monkeypatch):
    """Over a picture; and from nothing, which diffusers does not: its noise is put in place of the picture under it."""
    model, depth = models(DEPTH), noise(40, 40, seed=1)
    told: dict[str, Any] = {"image": noise(), "strength": strength} if strength else {}
    if not strength:
        alone = lambda *given: torch.randn((1, 4, 16, 16), generator=given[-1])  # noqa: E731
        monkeypatch.setattr(
            model.theirs, "prepare_latents", lambda *given: alone(*given) * model.theirs.scheduler.init_noise_sigma
        )
    wanted = expected(
        model, sampler, image=noise(), depth_map=grey(depth), strength=strength or 1.0, guidance_scale=5.0
    )
    schedule = {"schedule": model.ours.defaults.schedule}
    for system, more in ((model.ours, {}), (model.of_file, schedule)):
        assert_same(system, wanted, depth=depth, sampler=sampler, guidance=5.0, **told, **more)


def test_depth_goes_from_the_farthest_to_the_nearest_in_the_shape_of_the_picture():
    ramp = Image.fromarray(np.tile(np.arange(100, 140, dtype=np.uint8), (20, 1)))  # 40 x 20
    found = pictures.depth_tensor(pictures.open_depth(ramp), 64, 64, 8)
    assert found.shape == (1, 1, 8, 8)
    assert (found.min(), found.max()) == (-1, 1)
    assert (found.diff(dim=3) > 0).all()
    middle = ramp.crop((10, 0, 30, 20))
    assert torch.allclose(found, pictures.depth_tensor(pictures.open_depth(middle), 64, 64, 8), atol=1e-5)
    assert not torch.allclose(found, pictures.depth_tensor(pictures.open_depth(ramp.rotate(90)), 64, 64, 8), atol=0.1)
    one = Image.new("L", (40, 20))
    one.putpixel((0, 0), 9)  # what is cut off is all there was
    assert (pictures.depth_tensor(pictures.open_depth(one), 64, 64, 8) == -1).all()


def test_depth_of_16_bits_keeps_them_and_transparency_is_far(tmp_path):
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) + 30_000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = pictures.open_depth(tmp_path / "deep.png")
    assert (np.asarray(found) == deep).all()
    assert len(np.unique(pictures.depth_tensor(found, 64, 64, 1).numpy())) == 64 * 64
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((1, 0), (90, 90, 90, 255))
    assert np.asarray(pictures.open_depth(clear)).tolist() == [[0.0, 90.0]]
    with pytest.raises(ImageProblem, match="the depth map says nothing: it has one shade everywhere"):
        pictures.open_depth(Image.new("RGB", (4, 4), "white"))


def test_depth_is_seen_at_the_size_of_a_second_pass(models, monkeypatch):
    system, seen = models(DEPTH).ours, []
    forward = system.network.forward
    monkeypatch.setattr(system.network, "forward", lambda x, *more: (seen.append(x), forward(x, *more))[1])
    depth = noise(64, 64, seed=1)
    pipeline.generate(system, "fox", depth=depth, width=32, height=32, steps=1, hires=2, hires_strength=1, seed=1)
    for x, side in zip(seen, (32, 64), strict=True):
        assert torch.equal(x[0, 4], pictures.depth_tensor(pictures.open_depth(depth), side, side, 2)[0, 0])


def test_the_command_draws_after_depth_remembers_and_redoes(models, limner, here):
    folder = models(DEPTH).folder
    noise(32, 32, seed=1).save("depth.png")
    noise(32, 32, seed=2).save("other.png")
    told = ("-m", folder, "--steps", 2, "-s", 3)
    done = limner("generate", "a fox", *told, "--depth", "depth.png", "-o", "a.png")
    assert done.code == 0, done.err
    settings = metadata.read_settings(here / "a.png")
    assert (settings["model"], len(settings["depth_hash"])) == ("sd2-depth", 12)
    assert "strength" not in settings
    again = limner("generate", "-C", "a.png", "-m", folder, "--depth", "depth.png", "-o", "b.png")
    assert (again.code, "expect another" in again.err) == (0, False), again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    lost = limner("generate", "-C", "a.png", "-m", folder)
    assert (lost.code, "painted after a depth map, which it does not hold: add --depth IMAGE" in lost.err) == (2, True)
    other = limner("generate", "-C", "a.png", "-m", folder, "--depth", "other.png", "-o", "c.png")
    assert "other.png is not the depth map painted with" in other.err
    assert (here / "a.png").read_bytes() != (here / "c.png").read_bytes()
    over = limner("edit", "other.png", "a fox", *told, "--depth", "depth.png", "-o", "d.png")
    assert over.code == 0, over.err
    assert metadata.read_settings(here / "d.png")["strength"] == 0.8
    wide = limner("generate", "a fox", *told, "--depth", "depth.png", "-W", 64, "-H", 32, "-o", "e.png")
    assert "50% of the depth map's height is cut off" in wide.err


# ------------------------------------------------------------------- files


@pytest.mark.parametrize("name", [*EDITS, DEPTH])
def test_what_they_are_is_told_from_folder_and_file(models, name):
    model = models(name)
    row = {"sd2_depth": "sd2-depth", "instruct_pix2pix": "instruct-pix2pix"}.get(name, "instruct-pix2pix-xl")
    for source in (model.folder, model.file):
        told = exchange.inspect(source)
        assert told["model"] == row
        assert told["sees"] == ("a depth map (--depth)" if name == DEPTH else "a picture to edit (-i)")
        assert told.get("image_guidance") == (None if name == DEPTH else 1.5)
        assert ("problem" in told, told["assumed"]) == (False, [])


@pytest.mark.parametrize("name", sweep([*EDITS, DEPTH], fast=lambda name: name in ("instruct_pix2pix", "cosxl_edit")))
def test_diffusers_loads_what_is_written(models, name, tmp_path):
    model = models(name)
    folder, _ = exchange.convert(model.file, tmp_path / "again")
    missing = {"depth_estimator": None, "feature_extractor": None} if name == DEPTH else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **missing)
    assert type(pipe) is type(model.theirs)
    assert getattr(pipe, "is_cosxl_edit", False) is (name == "cosxl_edit")
    for key, tensor in model.theirs.unet.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[key]), key
    told = {"depth": noise()} if name == DEPTH else {"image": noise()}
    wanted = drawn(model.of_file, **told)
    assert (drawn(catalog.load(folder), **told) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_finds_depth_is_left_out_of_a_file(models, tmp_path):
    tensors = load_file(models(DEPTH).file) | {"depth_model.model.pretrained.model.cls_token": torch.zeros(1, 1, 4)}
    found = single_files.recognise(Path("file"), tensors)
    assert found.beside == {"depth_model": 1}
    catalog.fitted(found)
    save_file(tensors, tmp_path / "whole.safetensors")
    assert exchange.inspect(tmp_path / "whole.safetensors")["model"] == "sd2-depth"


def test_a_network_alone_takes_its_other_parts(models, limner, here):
    folder = models("instruct_pix2pix").folder
    noise().save("in.png")
    parts = ("--vae", folder / "vae", "--text-encoder", folder / "text_encoder", "-W", 32, "-H", 32)
    network = folder / "unet" / "diffusion_pytorch_model.safetensors"
    told = ("make it red", "-s", 3, "--steps", 2, "--sampler", "euler", "-i", "in.png")
    assert "U-Net" in (alone := limner("generate", *told, "-m", network)).err
    assert alone.code == 3
    done = limner("generate", *told, "-m", network, *parts, "-o", "a.png")
    assert done.code == 0, done.err
    assert metadata.read_settings(here / "a.png")["model"] == "instruct-pix2pix"


def test_a_folder_that_contradicts_itself_is_refused(models, tmp_path):
    index = json.loads((models("instruct_pix2pix_xl").folder / "model_index.json").read_text())
    for part in models("instruct_pix2pix_xl").folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"is_cosxl_edit": True}))
    with pytest.raises(CheckpointMismatch, match="is_cosxl_edit is true, but its scheduler's noise is not CosXL's"):
        catalog.load(tmp_path)


def test_what_is_missing_or_too_much_is_said_in_a_line(models, sd1_folder, tiny_model):
    edits, depth = models("instruct_pix2pix").ours, models(DEPTH).ours
    plain, icons = catalog.load(sd1_folder), pipeline.load(tiny_model).system
    for system, told, message in (
        (edits, {}, "instruct-pix2pix edits a picture, but none was given: limner edit IMAGE, or -i IMAGE"),
        (depth, {}, "sd2-depth draws after a depth map, but none was given: add --depth IMAGE, near is white"),
        (depth, {"image": noise()}, "sd2-depth draws after a depth map, but none was given"),
        (edits, {"image": noise(), "depth": noise()}, "instruct-pix2pix is told of no depth: leave depth out"),
        (plain, {"depth": noise()}, "sd1 is told of no depth: leave depth out"),
        (icons, {"depth": noise()}, "icons-tiny is told of no depth"),
        (plain, {"image_guidance": 1.5}, r"image_guidance is for models that edit pictures \(.*\), not sd1: leave it"),
        (icons, {"image_guidance": 0.0}, "image_guidance is for models that edit pictures"),
        (depth, {"depth": noise(), "image_guidance": 2.0}, "image_guidance is for models that edit pictures"),
        (edits, {"image": noise(), "image_guidance": -1}, "image_guidance is -1: give a number from 0"),
        (edits, {"image": noise(), "image_guidance": "2"}, "image_guidance is '2': give a number from 0"),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.prepare(system, prompt="fox", **told)
    with pytest.raises(ImageProblem, match=r"no picture nowhere\.png"):
        pipeline.prepare(depth, prompt="fox", depth="nowhere.png")
    with pytest.raises(CheckpointMismatch, match="instruct-pix2pix is guided by the picture that it edits"):
        pipeline.load(models("instruct_pix2pix").folder, guide_model=models("instruct_pix2pix").folder)
    with pytest.raises(CheckpointMismatch, match="see pictures beside the latents: neither refines"):
        pipeline.load(models(DEPTH).folder, refiner=models(DEPTH).folder)


def test_a_negative_prompt_counts_where_either_guidance_does(models, recwarn):
    pipe = pipeline.Pipeline(models("instruct_pix2pix").ours, "x")
    told = {"negative": "dull", "image": noise(), "guidance": 1.0, "width": 32, "height": 32, "steps": 1, "seed": 1}
    pipe.generate("fox", **told, image_guidance=1.5)
    assert not [w for w in recwarn if issubclass(w.category, Ignored)]
    with pytest.warns(Ignored) as warned:
        pipe.generate("fox", **told, image_guidance=1.0)
    assert [str(w.message) for w in warned] == [
        "the negative prompt has no effect at guidance 1: ask for more guidance"
    ]
