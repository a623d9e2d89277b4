"""Guidance away from spoilt and from weaker networks: perturbed attention (against diffusers) and autoguidance."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from limner import metadata, pipeline
from limner.errors import CheckpointMismatch, Ignored, UsageError
from limner.models import unet
from limner.models.unet import UNET_TINY, UNet
from sweeps import sweep

from . import stable_diffusion


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    diffusers.utils.logging.set_verbosity_error()
    return {kind: getattr(stable_diffusion, kind)(tmp_path_factory.mktemp(kind)) for kind in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def weak(folders, tmp_path_factory):
    """The same Stable Diffusion 1 with other weights in its network."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders["sd1"])
    stable_diffusion.noised(pipe.unet, seed=9)
    return stable_diffusion.saved(pipe, tmp_path_factory.mktemp("weak"), stable_diffusion.SD1_SCHEDULER)


def latents(system, **told):
    request = pipeline.prepare(system, prompt="a red fox", negative="dull", seed=3, **{"sampler": "euler"} | told)
    with torch.inference_mode():
        cond = system.condition(["a red fox"], request, ["dull"])
        return system.sample(cond, request, pipeline.noise_source([3], "cpu"))


# ------------------------------------------------------------------- perturbed


def test_a_perturbed_network_shares_its_weights_and_leaves_the_other_alone():
    network = stable_diffusion.noised(UNet(UNET_TINY), 1)
    spoilt = unet.perturbed(network, ["mid_block"])
    assert [p.data_ptr() for p in network.parameters()] == [p.data_ptr() for p in spoilt.parameters()]
    assert [name for name, a in unet.self_attentions(spoilt).items() if a.identity] == [
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]
    assert not any(attention.identity for attention in unet.self_attentions(network).values())


def test_a_pixel_that_attends_to_itself_alone_gets_its_own_value():
    network = stable_diffusion.noised(UNet(UNET_TINY), 1)
    (attention,) = (a for n, a in unet.self_attentions(network).items() if n.startswith("mid_block"))
    x = torch.randn(2, 6, 64)
    attention.identity = True
    assert torch.allclose(attention(x), attention.to_out(attention.to_v(x)))
    attention.identity = False
    assert torch.allclose(attention(x[:, :1]), attention.to_out(attention.to_v(x[:, :1])), atol=1e-6)
    assert not torch.allclose(attention(x), attention.to_out(attention.to_v(x)), atol=1e-2)


WAYS = {
    "with the other": {"guidance": 5.0},
    "alone": {"guidance": 1.0},
    "rescaled": {"guidance": 5.0, "guidance_rescale": 0.7},
    "in another block": {"guidance": 5.0, "pag_layers": "up_blocks"},
}


@pytest.mark.parametrize(
    ("kind", "way"), sweep(["sd1", "sdxl"], WAYS, fast=lambda kind, way: kind == "sd1" or way == "with the other")
)
def test_perturbed_attention_guidance_draws_what_diffusers_draws(folders, kind, way):
    cls = diffusers.StableDiffusionXLPAGPipeline if kind == "sdxl" else diffusers.StableDiffusionPAGPipeline
    told = WAYS[way]
    layers = told.get("pag_layers", "mid_block").replace("_blocks", "")
    theirs = cls.from_pretrained(folders[kind], pag_applied_layers="mid" if "mid" in layers else layers)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    wanted = theirs(
        "a red fox", negative_prompt="dull", num_inference_steps=5, guidance_scale=told["guidance"], pag_scale=3.0,
        guidance_rescale=told.get("guidance_rescale", 0.0), height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    system = pipeline.load(folders[kind]).system
    ours = latents(system, steps=5, pag_scale=3.0, **told)
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    without = {k: v for k, v in told.items() if k != "pag_layers"}
    assert (latents(system, steps=5, **without) - ours).abs().max() > 0.01 * wanted.abs().max()


def test_where_perturbing_cannot_be_is_refused_by_one_line(folders, tiny_model):
    with pytest.raises(UsageError, match="pag_scale is for U-Nets"):
        pipeline.load(tiny_model).generate("fox", pag_scale=3)
    pipe = pipeline.load(folders["sd1"])
    with pytest.raises(UsageError, match=r"in 'mid_blok': it is in mid_block"):
        pipe.generate("fox", pag_scale=3, pag_layers="mid_blok")
    with pytest.raises(UsageError, match=r"in 'down_blocks.1': it is in down_blocks.0"):
        pipe.generate("fox", pag_scale=3, pag_layers=["mid_block", "down_blocks.1"])
    with pytest.raises(UsageError, match="of which pag_scale is 0"):
        pipe.generate("fox", pag_layers="mid_block")
    for layers in (3, [], [1]):
        with pytest.raises(UsageError, match="give names of blocks"):
            pipe.generate("fox", pag_scale=3, pag_layers=layers)
    for scale in (-1, 101, float("nan"), "3"):
        with pytest.raises(UsageError, match="pag_scale is"):
            pipe.generate("fox", pag_scale=scale)


def test_an_interval_is_of_perturbed_guidance_too(folders, recwarn):
    """At guidance 1, where other kinds of guidance are told to be without effect."""
    pipe = pipeline.load(folders["sd1"])
    told = {"guidance": 1.0, "steps": 4, "seed": 3, "sampler": "euler"}
    plain, whole, part = (
        np.asarray(pipe.generate("a fox", **told, **more)[0].image)
        for more in ({}, {"pag_scale": 3.0}, {"pag_scale": 3.0, "guidance_interval": (0.0, 0.5)})
    )
    assert (plain != part).any()
    assert (whole != part).any()
    assert not [w for w in recwarn if issubclass(w.category, Ignored)]
    with pytest.warns(Ignored, match="guidance_rescale and guidance_interval have no effect"):
        pipe.generate("a fox", **told, guidance_rescale=0.5, guidance_interval=(0.0, 0.5))
    with pytest.warns(Ignored, match="guidance_rescale have no effect at guidance 1"):
        pipe.generate("a fox", **told, guidance_rescale=0.5, pag_scale=3.0)


def test_a_guide_need_not_have_the_blocks_that_are_perturbed(folders, weak):
    system = pipeline.load(folders["sd1"], guide_model=weak).system
    guide, told = system.guide, {"steps": 2, "guidance": 3.0, "pag_scale": 2.0, "pag_layers": "up_blocks.1"}
    wanted = latents(system, **told)
    smaller = replace(guide.network.config, depths=(0, 1), text_width=64)
    guide.network, own = UNet(smaller).eval(), guide.network
    try:
        assert not unet.self_attentions(guide.network).keys() & {"up_blocks.1.attentions.0.transformer_blocks.0.attn1"}
        assert latents(system, **told).shape == wanted.shape
    finally:
        guide.network = own


def test_a_picture_remembers_how_it_was_perturbed(folders, limner, here):
    told = ("-m", folders["sd1"], "-s", 1, "--steps", 3)
    assert limner("generate", "fox", *told, "--pag-scale", 2.5, "--pag-layers", "up_blocks.1", "-o", "a.png").code == 0
    settings = metadata.read_settings(here / "a.png")
    assert (settings["pag_scale"], settings["pag_layers"]) == (2.5, ["up_blocks.1"])
    text = Image.open("a.png").info["parameters"]
    assert "PAG Scale: 2.5" in text
    assert metadata.from_infotext(text)["pag_scale"] == 2.5
    assert limner("generate", "-C", "a.png", "-m", folders["sd1"], "-o", "b.png").code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_a_network_that_is_told_its_guidance_is_perturbed_alone(tmp_path, weak):
    system = pipeline.load(stable_diffusion.lcm(tmp_path), guide_model=weak).system
    told = {"steps": 1, "guidance": 8.0, "sampler": "euler"}
    strong, pushed = latents(system, **told), latents(system, pag_scale=2.0, **told)
    own, system.network = system.network, unet.perturbed(system.network, ["mid_block"])
    poor = latents(system, **told)
    system.network = own
    assert (pushed - (strong + 2.0 * (strong - poor))).abs().max() <= 1e-4 * pushed.abs().max()
    with pytest.warns(Ignored, match="sd1 guides nothing, as .* is told its guidance"):
        pipeline.generate(system, "fox", steps=1)


# ---------------------------------------------------------------- autoguidance


def test_a_guide_is_led_away_from_as_the_paper_has_it(folders, weak):
    """Equation 4 at one step from the noise, with the two networks asked apart."""
    system = pipeline.load(folders["sd1"], guide_model=weak).system
    alone = [pipeline.load(folder).system for folder in (folders["sd1"], weak)]
    strong, poor = (latents(one, guidance=1, steps=1) for one in alone)
    found = latents(system, guidance=3.0, steps=1)
    assert (found - (poor + 3.0 * (strong - poor))).abs().max() <= 1e-4 * found.abs().max()
    assert torch.equal(latents(system, guidance=1, steps=1), strong)


def test_a_guide_that_is_the_model_itself_changes_nothing(folders):
    system = pipeline.load(folders["sd1"], guide_model=folders["sd1"]).system
    plain = latents(system, guidance=1.0, steps=4)
    assert (latents(system, guidance=6.0, steps=4) - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_a_guide_goes_with_other_ways_with_a_composed_prompt_and_with_turns(folders, weak):
    pipe = pipeline.load(folders["sd1"], guide_model=weak)
    told = {"seed": 3, "steps": 4, "guidance": 3.0}
    plain = pipe.generate("a red fox", **told)[0].image
    for prompt, more in (
        ("a red fox", {"guidance_kind": "apg"}),
        ("a red fox", {"pag_scale": 2.0}),
        ("a red fox AND snow", {}),
        ("a [red|blue] fox", {}),
        ("a [red:blue:0.5] fox", {}),
    ):
        other = pipe.generate(prompt, **told | more)[0].image
        assert np.any(np.asarray(other) != np.asarray(plain)), (prompt, more)


def test_a_guide_of_other_latents_or_prediction_is_refused(folders, tiny_model, tmp_path):
    with pytest.raises(CheckpointMismatch, match="sdxl cannot guide what sd1 draws"):
        pipeline.load(folders["sd1"], guide_model=folders["sdxl"])
    with pytest.raises(CheckpointMismatch, match=r"cannot guide what sd1 draws.* prediction v and eps"):
        pipeline.load(folders["sd1"], guide_model=stable_diffusion.sd2_v(tmp_path))
    with pytest.raises(CheckpointMismatch, match="cannot guide what"):
        pipeline.load(tiny_model, guide_model=folders["sd1"])


def test_what_a_guide_takes_the_place_of_is_told(folders, weak):
    pipe = pipeline.load(folders["sd1"], guide_model=weak)
    with pytest.warns(Ignored, match="the negative prompt has no effect: sd1 guides in its place"):
        pipe.generate("fox", negative="dull", steps=1)
    with pytest.warns(Ignored, match="sd1 guides nothing, at guidance 1"):
        pipe.generate("fox", guidance=1, steps=1)


def test_icons_are_guided_by_other_icons(tiny_model, other_model):
    plain, guided = (pipeline.load(tiny_model, guide_model=guide) for guide in (None, other_model))
    told = {"seed": 3, "steps": 3}
    assert guided.generate("fox", **told)[0].image.tobytes() != plain.generate("fox", **told)[0].image.tobytes()


def test_a_picture_names_its_guide(folders, weak, limner, here):
    told = ("-m", folders["sd1"], "-s", 1, "--steps", 3)
    assert limner("generate", "fox", *told, "--guide-model", weak, "-o", "a.png").code == 0
    settings = metadata.read_settings(here / "a.png")
    assert settings["guide_model"] == "sd1"
    assert settings["guide_model_hash"] != settings["model_hash"]
    done = limner("generate", "-C", "a.png", "-m", folders["sd1"])
    assert (done.code, "with the guide 'sd1' (add --guide-model FILE" in done.err) == (2, True)
    again = ("generate", "-C", "a.png", "-m", folders["sd1"], "--guide-model")
    assert limner(*again, weak, "-o", "b.png").code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert "was painted with another guide" in limner(*again, folders["sd1"], "-o", "c.png").err
