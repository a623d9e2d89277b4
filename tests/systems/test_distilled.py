"""Models with ways of their own to be drawn with: LCM, Turbo, Lightning, Hyper, Playground 2.5, CosXL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from limner import catalog, exchange, pipeline
from limner.checkpoints import folders, single_files
from limner.errors import Assumed, CheckpointMismatch, Ignored
from limner.metadata import read_settings
from limner.models.unet import guidance_embedding

from . import stable_diffusion
from .test_stable_diffusion import latents


def theirs(folder: Path, **told: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and pixels of diffusers."""
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        pipe("a red fox", generator=torch.Generator().manual_seed(3), output_type=kind, **told).images
        for kind in ("latent", "pt")
    ]
    return drawn[0], drawn[1] * 2 - 1


def single_file(folder: Path, name: str = "model.safetensors") -> Path:
    path = folder.parent / name
    save_file({k: v.contiguous() for k, v in single_files.export(folders.recognise(folder)).items()}, path)
    return path


def assert_same(system: Any, wanted: tuple[torch.Tensor, torch.Tensor], **told: Any) -> None:
    ours = latents(system, "a red fox", width=32, height=32, **told)
    assert (ours - wanted[0]).abs().max() <= 1e-4 * wanted[0].abs().max()
    with torch.inference_mode():
        assert (system.decode(ours).clamp(-1, 1) - wanted[1]).abs().max() < 2e-3


@pytest.fixture(scope="module")
def sdxl_file(tmp_path_factory) -> Path:
    return single_file(stable_diffusion.sdxl(tmp_path_factory.mktemp("sdxl")))


# ------------------------------------------------------------------- consistency models


@pytest.fixture(scope="module")
def lcm(tmp_path_factory) -> Path:
    return stable_diffusion.lcm(tmp_path_factory.mktemp("lcm"))


@pytest.mark.parametrize(("steps", "guidance"), [(1, 8.5), (4, 8.5), (4, 1.0), (7, 3.0)])
def test_a_consistency_model_draws_what_diffusers_draws_and_is_told_its_guidance(lcm, steps, guidance):
    wanted = theirs(lcm, num_inference_steps=steps, guidance_scale=guidance)
    system = catalog.load(lcm, dtype=torch.float32)
    defaults = system.defaults
    assert (defaults.steps, defaults.guidance, defaults.sampler) == (4, 8.5, "lcm")
    assert_same(system, wanted, steps=steps, guidance=guidance, sampler="lcm")
    of_file = catalog.load(single_file(lcm), dtype=torch.float32)
    assert (of_file.defaults.steps, of_file.defaults.guidance, of_file.defaults.sampler) == (4, 8.5, "lcm")
    assert_same(of_file, wanted, steps=steps, guidance=guidance, sampler="lcm")


def test_guidance_is_told_in_sinusoids_of_a_thousand_times_what_is_more_than_one():
    told = guidance_embedding(torch.tensor([1.0, 2.0]), 4)
    assert told[0].tolist() == [0, 0, 1, 1]
    angles = torch.tensor([1000.0, 0.1])
    assert told[1].tolist() == pytest.approx([*angles.sin().tolist(), *angles.cos().tolist()], abs=1e-4)


def test_what_guides_in_vain_is_told_of_a_model_that_is_told_its_guidance(lcm):
    system = catalog.load(lcm)
    with pytest.warns(Ignored, match=r"guidance_rescale and the negative prompt: without effect"):
        pipeline.generate(system, "a fox", negative="dull", guidance_rescale=0.5, steps=1, seed=1)


def test_a_consistency_model_is_converted_there_and_back(lcm, tmp_path):
    file, _ = exchange.convert(lcm, tmp_path / "lcm.safetensors")
    folder, _ = exchange.convert(file, tmp_path / "again")
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        one, other = load_file(lcm / name), load_file(folder / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 32
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"


# ------------------------------------------------------------------- turbo, lightning, hyper


def test_turbo_is_told_by_its_scheduler_and_draws_what_diffusers_draws(tmp_path):
    """Euler a over `trailing` timesteps, at 512 pixels (here the config says so of a smaller network)."""
    folder = stable_diffusion.sdxl(tmp_path)
    told = stable_diffusion.SDXL_SCHEDULER | {
        "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 256}))
    defaults = catalog.load(folder).defaults
    assert (defaults.steps, defaults.guidance, defaults.width) == (1, 1.0, 512)
    assert (defaults.sampler, defaults.schedule) == ("euler_a", "trailing")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = told["_class_name"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for steps in (1, 2, 4):
        wanted = theirs(folder, num_inference_steps=steps, guidance_scale=0.0, width=32, height=32)
        system = catalog.load(folder, dtype=torch.float32)
        assert_same(system, wanted, steps=steps, guidance=1.0, sampler="euler_a", schedule="trailing")


@pytest.mark.parametrize(("kind", "steps"), [("sd1", 30), ("sd2_v", 1)])
def test_only_a_stable_diffusion_2_with_turbos_scheduler_is_one(tmp_path, kind, steps):
    """Euler over `trailing` timesteps at 512 pixels is what anybody may save with a Stable Diffusion 1."""
    folder = getattr(stable_diffusion, kind)(tmp_path)
    told = stable_diffusion.SD1_SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 256}))
    defaults = catalog.load(folder).defaults
    assert (defaults.steps, defaults.width, defaults.schedule) == (steps, 512, "trailing")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd_xl_turbo_1.0_fp16", ("euler_a", "trailing", 1, 1.0, 512)),
        ("dreamshaperXLTurbo_v2", ("euler_a", "trailing", 1, 1.0, 512)),
        ("sdxl_lightning_4step", ("euler", "trailing", 4, 1.0, 1024)),
        ("juggernautXL_lightning", ("euler", "trailing", 4, 1.0, 1024)),
        ("Hyper-SDXL-8steps", ("ddim", "trailing", 8, 1.0, 1024)),
        ("Hyper-SDXL-12steps-CFG", ("ddim", "trailing", 12, 5.0, 1024)),
        ("Hyper-SDXL-1step-Unet", ("lcm", "hyper", 1, 1.0, 1024)),
        ("some_lcm-merge", ("lcm", "lcm", 4, 1.0, 1024)),
        ("hyperrealism_v1", None),
        ("turbocharged", None),
        ("thunder-hyper-v2", None),
    ],
)
def test_the_name_of_a_file_is_a_hint_that_is_told(tmp_path, sdxl_file, name, expected):
    file = tmp_path / f"{name}.safetensors"
    file.symlink_to(sdxl_file)
    if expected is None:
        defaults = catalog.load(file).defaults
        assert (defaults.steps, defaults.guidance) == (30, 5.0)
        return
    with pytest.warns(Assumed, match=r"its name says \w+: \d+ steps? of \w+ at guidance .* taken"):
        defaults = catalog.load(file).defaults
    sampler, schedule, steps, guidance, side = expected
    assert (defaults.sampler, defaults.steps, defaults.guidance, defaults.width) == (sampler, steps, guidance, side)
    assert defaults.schedule == schedule


def test_hypers_one_step_begins_where_its_publishers_begin(tmp_path):
    """Diffusers' LCMScheduler at timestep 800, as ByteDance's card has it."""
    folder = stable_diffusion.sdxl(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    wanted = [
        pipe("a red fox", guidance_scale=0, timesteps=[800], num_inference_steps=1, output_type=kind, height=32,
             width=32, generator=torch.Generator().manual_seed(3)).images for kind in ("latent", "pt")
    ]  # fmt: skip
    file = single_file(folder, "Hyper-SDXL-1step-Unet.safetensors")
    with pytest.warns(Assumed, match="its name says Hyper: 1 step of lcm at guidance 1 is taken"):
        system = catalog.load(file, dtype=torch.float32)
    told = {name: getattr(system.defaults, name) for name in ("steps", "guidance", "sampler", "schedule")}
    assert_same(system, (wanted[0], wanted[1] * 2 - 1), **told)


def test_lightnings_one_step_predicts_x0(tmp_path, sdxl_file):
    file = tmp_path / "sdxl_lightning_1step_x0.safetensors"
    file.symlink_to(sdxl_file)
    with pytest.warns(Assumed, match="Lightning: 1 step of euler"):
        assert catalog.load(file).prediction.name == "x0"


def test_a_picture_remembers_what_no_weight_says_the_network_predicts(sdxl_file, limner, here):
    """Neither a file's name nor a flag is there when it is drawn again, by a file of the same weights."""
    told = ("-s", 1, "--steps", 1, "-W", 32, "-H", 32)
    file = here / "sdxl_lightning_1step_x0.safetensors"
    file.symlink_to(sdxl_file)
    assert limner("fox", "-m", file, *told, "-o", "named.png").code == 0
    assert limner("fox", "-m", sdxl_file, "--prediction", "v", *told, "-o", "asked.png").code == 0
    assert limner("fox", "-m", sdxl_file, *told, "-o", "plain.png").code == 0
    for name, predicts in (("named", "x0"), ("asked", "v"), ("plain", None)):
        assert read_settings(here / f"{name}.png").get("prediction") == predicts
        done = limner("-C", f"{name}.png", "-m", sdxl_file, "-o", f"{name}-again.png")
        assert done.code == 0, done.err
        assert (here / f"{name}.png").read_bytes() == (here / f"{name}-again.png").read_bytes()
    assert limner("-C", "asked.png", "-m", sdxl_file, "--prediction", "x0", "-o", "other.png").code == 0
    assert read_settings(here / "other.png")["prediction"] == "x0"


def test_what_other_weights_predict_is_not_asked_of_a_picture(sdxl_file, sd1_folder, tiny_model, limner, here):
    told = ("--prediction", "v", "-s", 1, "--steps", 1, "-W", 32, "-H", 32, "-o", "v.png")
    assert limner("fox", "-m", sdxl_file, *told).code == 0
    for other in (sd1_folder, tiny_model):
        done = limner(
            "-C", "v.png", "-m", other, "-o", f"{other.name}.png", "--sampler", "euler", "--schedule", "uniform"
        )
        assert (done.code, "was painted with another file of weights" in done.err) == (0, True), done.err
        assert "prediction" not in read_settings(here / f"{other.name}.png")


# ------------------------------------------------------------------- Playground 2.5 and CosXL


@pytest.mark.parametrize(
    "cls", ["EDMDPMSolverMultistepScheduler", pytest.param("EDMEulerScheduler", marks=pytest.mark.slow)]
)
def test_playground_draws_what_diffusers_draws(tmp_path, cls):
    folder = stable_diffusion.playground(tmp_path, _class_name=cls)
    sampler = "euler" if cls == "EDMEulerScheduler" else "dpmpp_2m"
    wanted = theirs(folder, num_inference_steps=5, guidance_scale=3.0)
    for source in (folder, single_file(folder)):
        system = catalog.load(source, dtype=torch.float32)
        defaults = system.defaults
        assert (defaults.steps, defaults.guidance, defaults.schedule) == (50, 3.0, "karras")
        assert_same(system, wanted, guidance=3.0, sampler=sampler)


def test_playground_encodes_as_it_decodes(tmp_path):
    system = catalog.load(stable_diffusion.playground(tmp_path), dtype=torch.float32)
    codec, z = system.autoencoder, torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(row)[:, None, None] for row in (codec.config.mean, codec.config.std))
    assert (codec.to_latents(z) - (z - mean) / std * 0.5).abs().max() < 1e-6
    assert (codec.from_latents(codec.to_latents(z)) - z).abs().max() < 1e-5


def test_playground_is_converted_there_and_back(tmp_path):
    folder = stable_diffusion.playground(tmp_path)
    file, _ = exchange.convert(folder, tmp_path / "one.safetensors")
    again, _ = exchange.convert(file, tmp_path / "again")
    told = json.loads((again / "scheduler" / "scheduler_config.json").read_text())
    assert (told["_class_name"], told["sigma_data"]) == ("EDMDPMSolverMultistepScheduler", 0.5)
    assert json.loads((again / "vae" / "config.json").read_text())["latents_std"] == pytest.approx([8.4, 5.9, 4.3, 3.8])
    assert exchange.inspect(file)["noise"] == "EDM's, 0.002 to 80"


def test_cosxl_predicts_v_over_the_noise_its_marks_say(tmp_path):
    told = {
        "sigma_data": 1.0,
        "prediction_type": "v_prediction",
        "sigma_max": 120.0,
        "_class_name": "EDMEulerScheduler",
    }
    folder = stable_diffusion.playground(tmp_path, **told)
    path = folder / "vae" / "config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"latents_mean": None, "latents_std": None, "scaling_factor": 0.13025}
        )
    )
    wanted = theirs(folder, num_inference_steps=5, guidance_scale=3.0)
    for source in (folder, single_file(folder)):
        system = catalog.load(source, dtype=torch.float32)
        assert (system.prediction.name, system.interpolant.sigma_max) == ("v", 120.0)
        assert_same(system, wanted, guidance=3.0, sampler="euler", schedule="karras")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("edm_std", [1.0, 1.0, 1.0, float("nan")]), ("edm_std", [1.0, 0.0, 1.0, 1.0]), ("edm_mean", [1.0] * 3),
        ("edm_mean", []), ("edm_vpred.sigma_max", [1.0, 2.0]), ("edm_vpred.sigma_max", [float("nan")]),
        ("edm_vpred.sigma_max", [-1.0]),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_are_refused_by_name(sdxl_file, name, value):
    tensors = load_file(sdxl_file)
    tensors |= {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)} if "vpred" not in name else {}
    with pytest.raises(CheckpointMismatch, match=r"file: its marks edm_\* are of no model"):
        single_files.recognise(Path("file"), tensors | {name: torch.tensor(value)})


@pytest.mark.parametrize(
    "told",
    [{"sigma_data": 0.7}, {"prediction_type": "sample"}, {"sigma_schedule": "odd"}, {"rho": 5.0}, {"sigma_min": 0}],
)
def test_noise_of_edm_that_is_none_of_ours_is_refused(tmp_path, told):
    folder = stable_diffusion.playground(tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    with pytest.raises(CheckpointMismatch, match="noise"):
        catalog.load(folder)
