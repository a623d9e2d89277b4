"""A refiner that does the last steps, against diffusers' two pipelines."""

from __future__ import annotations

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limner import metadata, pipeline
from limner.errors import CheckpointMismatch, Ignored

from . import stable_diffusion


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return (
        stable_diffusion.sdxl(tmp_path_factory.mktemp("base")),
        stable_diffusion.sdxl_refiner(tmp_path_factory.mktemp("refiner")),
    )


@pytest.mark.parametrize("switch_at", [0.8, pytest.param(0.5, marks=pytest.mark.slow)])
def test_it_goes_on_as_that_of_diffusers(folders, switch_at):
    diffusers.utils.logging.set_verbosity_error()
    base, refiner = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in folders)
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent", "negative_prompt": "dull"}
    half = base("a red fox", denoising_end=switch_at, generator=torch.Generator().manual_seed(3), **told).images
    wanted = refiner("a red fox", image=half, denoising_start=switch_at, **told).images
    system = pipeline.load(folders[0], refiner=folders[1]).system
    request = pipeline.prepare(
        system, prompt="a red fox", negative="dull", seed=3, steps=5, guidance=5.0, switch_at=switch_at
    )
    assert 1 <= system.switch(request) < 5
    with torch.inference_mode():
        cond = system.condition(["a red fox"], request, ["dull"])
        ours = system.sample(cond, request, pipeline.noise_source([3], "cpu"))
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_the_whole_noise_leaves_it_nothing_to_do(folders):
    plain, refined = (pipeline.load(folders[0], refiner=refiner) for refiner in (None, folders[1]))
    told = {"seed": 3, "steps": 3}
    alone = plain.generate("a red fox", **told)[0].image.tobytes()
    assert refined.generate("a red fox", **told, switch_at=1)[0].image.tobytes() == alone
    assert refined.generate("a red fox", **told)[0].image.tobytes() != alone
    with pytest.warns(Ignored, match="switch_at has no effect without a refiner"):
        plain.generate("a red fox", **told, switch_at=0.5)


def test_a_picture_names_its_refiner(folders, limner, here):
    told = ("-m", folders[0], "-s", 1, "--steps", 3)
    given = ("--refiner", folders[1])
    assert limner("generate", "fox", *told, *given, "--switch-at", 0.6, "-o", "a.png").code == 0
    settings = metadata.read_settings(here / "a.png")
    assert (settings["refiner"], settings["switch_at"]) == ("sdxl-refiner", 0.6)
    text = Image.open("a.png").info["parameters"]
    assert f"Refiner: sdxl-refiner [{settings['refiner_hash']}]" in text
    assert "Refiner switch at: 0.6" in text
    assert metadata.from_infotext(text)["refiner_hash"] == settings["refiner_hash"]
    done = limner("generate", "-C", "a.png", "-m", folders[0])
    assert (done.code, "with the refiner 'sdxl-refiner' (add --refiner FILE" in done.err) == (2, True)
    assert limner("generate", "-C", "a.png", "-m", folders[0], *given, "-o", "b.png").code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_what_cannot_go_on_is_refused(folders, tiny_model, tmp_path):
    with pytest.raises(CheckpointMismatch, match="cannot go on where sdxl stops"):
        pipeline.load(folders[0], refiner=stable_diffusion.sd2_v(tmp_path))
    with pytest.raises(CheckpointMismatch, match="cannot go on where sdxl stops"):  # its latents have another scale
        pipeline.load(folders[0], refiner=stable_diffusion.sd1(tmp_path / "sd1"))
    with pytest.raises(CheckpointMismatch, match="cannot go on where"):
        pipeline.load(tiny_model, refiner=folders[1])


def test_a_refiner_is_no_part_of_the_model(folders):
    system = pipeline.load(folders[0], refiner=folders[1]).system
    assert not any(name.startswith("refiner") for name in system.state_dict())


def test_a_learned_word_of_the_base_is_no_matter_to_the_refiner(folders, tmp_path):
    pair = {name: torch.randn(2, width) for name, width in (("clip_l", 64), ("clip_g", 128))}
    save_file(pair, tmp_path / "ink.safetensors")
    pipe = pipeline.load(folders[0], refiner=folders[1])
    told = {"seed": 3, "steps": 3}
    said = pipe.generate("a fox by embedding:ink", **told, embedding=tmp_path / "ink.safetensors")[0]
    assert said.image.tobytes() != pipe.generate("a fox by", **told)[0].image.tobytes()
