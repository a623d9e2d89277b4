"""Guidance and variations as they are asked for."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limner import catalog, metadata, pipeline
from limner.checkpoints import autoencoder as kl
from limner.checkpoints import layouts
from limner.errors import CheckpointMismatch, FileProblem, Ignored, UnknownName, UsageError

from . import stable_diffusion

TOLD = {"seed": 3, "steps": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return catalog.load(stable_diffusion.sd1(tmp_path_factory.mktemp("sd1")))


def pixels(system, **told) -> np.ndarray:
    return np.asarray(pipeline.generate(system, "a red fox", **TOLD | told)[0].image).astype(float)


def test_rescaled_guidance_draws_what_diffusers_draws(tmp_path):
    folder = stable_diffusion.sd1(tmp_path)
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    wanted = pipe(
        "a red fox", num_inference_steps=5, guidance_scale=7.0, guidance_rescale=0.7, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    system = catalog.load(folder)
    request = pipeline.prepare(
        system, prompt="a red fox", seed=3, steps=5, guidance=7.0, guidance_rescale=0.7, sampler="euler"
    )
    with torch.inference_mode():
        ours = system.sample(system.condition(["a red fox"], request), request, pipeline.noise_source([3], "cpu"))
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    "told",
    [
        {"guidance_kind": "apg"},
        {"guidance_kind": "cfg_zero"},
        {"guidance_rescale": 0.7},
        {"guidance_mimic": 2.0},
        {"guidance_interval": (0.8, 1.0)},
        {"variation": 0.3, "variation_seed": 5},
    ],
)
def test_each_way_draws_something_else_remembers_it_and_redoes_it(tiny, told, tmp_path):
    plain = pixels(tiny)
    (picture,) = pipeline.generate(tiny, "a red fox", **TOLD | told)
    assert np.abs(np.asarray(picture.image).astype(float) - plain).max() > 2
    path = picture.save(tmp_path / "x.png")
    settings = metadata.read_settings(path)
    remembered = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    assert told.items() <= remembered.items()
    again = {k: v for k, v in remembered.items() if k not in ("limner", "model", "model_hash")}
    prompt = again.pop("prompt")
    assert pipeline.generate(tiny, prompt, **again)[0].image.tobytes() == picture.image.tobytes()


def test_a_second_pass_draws_larger_over_the_first(tiny, tmp_path):
    told = TOLD | {"width": 32, "height": 48}
    (picture,) = pipeline.generate(tiny, "a red fox", **told, hires=2, hires_strength=0.3, hires_steps=5)
    assert picture.image.size == (64, 96)
    settings = metadata.read_settings(picture.save(tmp_path / "x.png"))
    wanted = {"width": 32, "height": 48, "hires": 2, "hires_strength": 0.3, "hires_steps": 5}
    assert wanted.items() <= settings.items()
    text = metadata.to_infotext(settings)
    assert "Denoising strength: 0.3" in text
    assert "Hires upscale: 2, Hires steps: 5" in text
    assert wanted.items() <= metadata.from_infotext(text).items()
    again = {k: v for k, v in settings.items() if k not in ("limner", "model", "model_hash", "prompt")}
    assert pipeline.generate(tiny, "a red fox", **again)[0].image.tobytes() == picture.image.tobytes()


@pytest.mark.slow
def test_with_hardly_any_strength_the_second_pass_gives_the_first_enlarged():
    pipe = pipeline.load("icons", "cpu")
    told = {"seed": 7, "steps": 4, "width": 128, "height": 128}
    small = pipe.generate("3d emoji of a red fox", **told)[0].image
    like = np.asarray(small.convert("RGBa").resize((192, 192), Image.Resampling.BICUBIC))
    near, far = (
        np.asarray(pipe.generate("3d emoji of a red fox", **told, hires=1.5, hires_strength=share)[0].image)
        for share in (0.1, 1.0)
    )
    distances = [np.abs(x.astype(float) - like)[..., 3].mean() for x in (near, far)]
    assert distances[0] < 3 < 6 < distances[1]


def test_a_batch_is_enlarged_picture_by_picture(tiny):
    told = {"width": 32, "height": 32, "hires": 2, "steps": 2}
    batch = pipeline.generate(tiny, "a red fox", seed=3, batch=2, **told)
    alone = pipeline.generate(tiny, "a red fox", seed=4, **told)[0]
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(batch[1].image)).max() <= 1


def test_what_was_not_asked_for_is_not_remembered(tiny):
    (picture,) = pipeline.generate(tiny, "a red fox", **TOLD)
    assert not picture.settings.keys() & {*pipeline.SELDOM, "variation_seed"}


def test_variations_are_of_one_seed_and_grow_with_their_share(tiny):
    plain = pixels(tiny)
    near, far, other = (
        np.abs(pixels(tiny, variation=share, variation_seed=9) - plain).mean() for share in (0.05, 0.3, 1.0)
    )
    assert 0 < near < far < other
    assert np.array_equal(pixels(tiny, variation=1.0, variation_seed=9), pixels(tiny, seed=9))
    batch = pipeline.generate(tiny, "a red fox", **TOLD, variation=0.2, variation_seed=9, batch=2)
    assert [p.seed for p in batch] == [3, 3]
    assert [p.settings["variation_seed"] for p in batch] == [9, 10]
    alone = pipeline.generate(tiny, "a red fox", **TOLD, variation=0.2, variation_seed=10)[0]
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(batch[1].image)).max() <= 1


def test_a_turned_noise_keeps_its_variance_and_its_angle():
    a, b = (torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    for share in (0.0, 0.25, 0.5, 1.0):
        turned = pipeline.slerp(a, b, share)
        assert (turned.flatten(1).std(1) - 1).abs().max() < 0.03
        whole, part = (torch.cosine_similarity(a.flatten(1), x.flatten(1)).acos() for x in (b, turned))
        assert torch.allclose(part, share * whole, atol=0.01)  # their lengths differ a little
    assert torch.equal(pipeline.slerp(a, a, 0.5), a)


def test_amounts_that_cannot_be(tiny):
    for told, message in (
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5: give a number from 0, at most 1"),
        ({"guidance_interval": (0.8, 0.2)}, "two rising numbers"),
        ({"guidance_interval": 0.5}, "two rising numbers"),
        ({"variation": 2}, "variation is 2"),
        ({"hires": 1.01}, "hires 1.01 gives 32 x 32 pixels: the sides must grow"),
        ({"hires": 0.5}, "hires is 0.5: give a number from 1"),
        ({"hires_steps": 9}, "ask for it with hires"),
        ({"hires": 2, "image": Image.new("RGB", (32, 32))}, "hires enlarges what is drawn from nothing"),
        ({"variation_seed": 3}, "by variation, which is 0"),
        ({"variation": 0.1, "variation_seed": -1}, "variation_seed is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.prepare(tiny, prompt="fox", **told)
    with pytest.raises(UnknownName, match="Did you mean 'cfg_zero'"):
        pipeline.prepare(tiny, prompt="fox", guidance_kind="cfg-zero")
    with pytest.warns(Ignored, match="guidance_rescale have no effect at guidance 1"):
        pipeline.generate(tiny, "fox", **TOLD, guidance=1, guidance_rescale=0.5)


@pytest.mark.parametrize("spelling", ["diffusers", "early", "ldm", "whole", "folder"])
def test_another_autoencoder_draws_what_diffusers_draws_with_it(tmp_path, spelling):
    """One filled with other noise, in the files of every program."""
    folder = stable_diffusion.sd1(tmp_path)
    theirs = stable_diffusion.noised(stable_diffusion.autoencoder(0.18215), seed=77)
    ours = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    layout = kl.ldm_layout(catalog.load(folder).autoencoder.config)
    path = tmp_path / "other.safetensors"
    if spelling == "folder":
        theirs.save_pretrained(tmp_path / "other" / "vae")
        path = tmp_path / "other"
    elif spelling == "diffusers":
        save_file(ours, path)
    else:
        rows = kl.early_diffusers_layout(catalog.load(folder).autoencoder.config) if spelling == "early" else layout
        prefix = "first_stage_model." if spelling == "whole" else ""
        save_file({prefix + name: t.contiguous() for name, t in layouts.write(rows, ours).items()}, path)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    system = pipeline.load(folder, vae=path).system
    with torch.no_grad():
        wanted = theirs.decode(latents / 0.18215).sample
        found = system.decode(latents)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not torch.allclose(catalog.load(folder).decode(latents), wanted, atol=0.1)
    assert system.vae.keys() == {"vae", "vae_hash"}


def test_an_autoencoder_that_does_not_fit_is_refused_by_name(tmp_path, tiny_model):
    folder = stable_diffusion.sd1(tmp_path)
    theirs = stable_diffusion.autoencoder(0.18215).state_dict()
    save_file({name: t for name, t in theirs.items() if "mid_block" not in name}, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"torn.safetensors, read as the autoencoder of sd1: .* missing"):
        pipeline.load(folder, vae=tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointMismatch, match="an autoencoder of another kind"):
        pipeline.load(tiny_model, vae=folder)
    with pytest.raises(FileProblem, match="no file"):
        pipeline.load(folder, vae=tmp_path / "nothing.safetensors")
    stable_diffusion.autoencoder(0.13025).save_pretrained(tmp_path / "xl")
    with pytest.raises(CheckpointMismatch, match=r"scales latents by 0\.13025, sd1 by 0\.18215: another family's"):
        pipeline.load(folder, vae=tmp_path / "xl")


def test_an_autoencoder_in_several_files_is_read_whole(tmp_path):
    folder, theirs = stable_diffusion.sd1(tmp_path), stable_diffusion.noised(stable_diffusion.autoencoder(0.18215), 77)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    system = pipeline.load(folder, vae=tmp_path / "parts").system
    assert all(torch.equal(system.autoencoder.state_dict()[name], t) for name, t in theirs.state_dict().items())
    assert system.vae["vae"] == "parts"


def test_a_picture_names_its_autoencoder_and_strict_takes_warnings_for_errors(limner, here, tmp_path):
    folder = stable_diffusion.sd1(tmp_path)
    theirs = stable_diffusion.noised(stable_diffusion.autoencoder(0.18215), seed=77)
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, here / "other.safetensors")
    told = ("-m", folder, "-s", 1, "--steps", 1)
    assert limner("generate", "fox", *told, "--vae", "other.safetensors", "-o", "a.png").code == 0
    assert metadata.read_settings(here / "a.png")["vae"] == "other"
    done = limner("generate", "-C", "a.png", "-m", folder)
    assert (done.code, "painted with the autoencoder 'other' (add --vae FILE" in done.err) == (2, True)
    assert limner("generate", "-C", "a.png", "-m", folder, "--vae", "other.safetensors", "-o", "b.png").code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    vain = ("generate", "fox", *told, "-n", "cat", "--guidance", 1, "-o", "c.png")
    done = limner(*vain, "--strict")
    assert (done.code, "has no effect at guidance 1: ask for more guidance (--strict)" in done.err) == (2, True)
    assert not (here / "c.png").exists()
    assert limner(*vain).code == 0
