"""Stable Diffusion end to end against diffusers: the same request, the same picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limner import catalog, pictures, pipeline
from limner.checkpoints import folders, single_files
from limner.errors import UnknownName
from sweeps import sweep

from . import stable_diffusion

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "plms": ("PNDMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "res_multistep": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


@dataclass(frozen=True)
class Model:
    """A folder and a single file of one model, what diffusers makes of it and what we make of both."""

    folder: Path
    file: Path
    theirs: Any
    ours: Any
    ours_of_file: Any


MODELS = ("sd1", "sd2_v", "sdxl")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Callable[[str], Model]:
    return lru_cache(lambda name: _model(getattr(stable_diffusion, name)(tmp_path_factory.mktemp(name))))


@pytest.fixture
def sd1(models) -> Model:
    return models("sd1")


def _model(folder: Path) -> Model:
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.published = pipe.scheduler.config
    file = folder.parent / "model.safetensors"
    save_file({k: v.contiguous() for k, v in single_files.export(folders.recognise(folder)).items()}, file)
    return Model(folder, file, pipe, catalog.load(folder), catalog.load(file))


def steps_of(sampler: str) -> int:
    """So that timesteps are whole where diffusers tells DPM2's midpoints of others than the levels they lie at."""
    return 10 if sampler.startswith("dpm2") else 5


def expected(pipe: Any, sampler: str) -> tuple[torch.Tensor, Image.Image]:
    """Latents and picture of diffusers, its scheduler made from the one that the folder names."""
    cls, told = SCHEDULERS[sampler]
    pipe.scheduler = getattr(diffusers, cls).from_config(pipe.published, **told)
    latents = pipe(
        "a red fox", num_inference_steps=steps_of(sampler), guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(3), eta=0.3 if sampler == "tcd" else 0.0,
    ).images  # fmt: skip
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents, pipe.image_processor.postprocess(images)[0]


def drawn(system: Any, sampler: str, monkeypatch, **settings) -> tuple[torch.Tensor, Image.Image]:
    """The same of ours."""
    seen: list[torch.Tensor] = []
    decode = system.decode
    monkeypatch.setattr(system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])
    told = {"seed": 3, "steps": steps_of(sampler), "guidance": 5.0, "sampler": sampler}
    image = pipeline.generate(system, "a red fox", **told | settings)[0].image
    return seen[0], image


def assert_same(ours: tuple[torch.Tensor, Image.Image], expected: tuple[torch.Tensor, Image.Image]) -> None:
    assert (ours[0] - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()
    apart = np.abs(np.asarray(ours[1], dtype=int) - np.asarray(expected[1], dtype=int))
    assert apart.shape[-1] == 3
    assert (apart <= 1).mean() >= 0.999


@pytest.mark.parametrize(
    ("name", "sampler"),
    sweep(MODELS, SCHEDULERS, fast=lambda name, sampler: name == "sd1" or sampler == "euler"),
)
def test_a_folder_and_a_single_file_draw_what_diffusers_draws(models, name, sampler, monkeypatch):
    if (name, sampler) == ("sd2_v", "plms"):
        pytest.skip("diffusers extrapolates v, and turns it into eps with another x; Stability's own code does as ours")
    model = models(name)
    wanted = expected(model.theirs, sampler)
    assert_same(drawn(model.ours, sampler, monkeypatch), wanted)
    if sampler not in ("euler", "plms", "dpmpp_2m"):  # what a file is, does not hang on them
        return
    told = {"schedule": model.ours.defaults.schedule, "width": 32, "height": 32}  # which a file does not say
    assert_same(drawn(model.ours_of_file, sampler, monkeypatch, **told), wanted)


def test_the_refiner_paints_over_what_diffusers_paints_over(models):
    """Over grey and with all of the noise, told that what is wanted looks good and what is not does not."""
    model, grey = models("sdxl_refiner"), torch.zeros(1, 4, 16, 16)
    wanted = model.theirs(
        "a red fox", negative_prompt="", image=grey, strength=1.0, num_inference_steps=5, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    for system, told in ((model.ours, {}), (model.ours_of_file, {"width": 32, "height": 32, "schedule": "leading"})):
        request = pipeline.prepare(
            system, prompt="a red fox", seed=3, steps=5, guidance=5.0, image=Image.new("RGB", (32, 32)), strength=1.0,
            **told,
        )  # fmt: skip
        with torch.inference_mode():
            cond = system.condition([request.prompt], request)
            latents = system.sample(cond, request, pipeline.noise_source([3], "cpu"), start=grey)
        assert (latents - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_network_in_half_precision_draws_nearly_the_same_with_its_autoencoder_in_float32(models, name):
    model = models(name)
    system = catalog.load(model.folder, dtype=torch.bfloat16)
    types = {part: {p.dtype for p in getattr(system, part).parameters()} for part in ("network", "autoencoder")}
    assert types == {"network": {torch.bfloat16}, "autoencoder": {torch.float32}}
    request = pipeline.prepare(system, prompt="a red fox", seed=3, steps=2, guidance=1.0)
    with torch.inference_mode():
        half, whole = (
            s.sample(s.condition(["a red fox"], request), request, pipeline.noise_source([3], "cpu"))
            for s in (system, model.ours)
        )
    assert half.dtype == torch.float32
    assert 1e-4 < (half - whole).std() / whole.std() < 0.3
    assert system.decode(half).isfinite().all()


def test_a_device_computes_in_what_it_is_fastest_at_unless_told(sd1, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for stored, best in ((torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16,) * 2):
        assert (catalog._best(stored, gpu), catalog._best(stored, cpu)) == (best, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_multiplies_bf16", lambda: True)
        pipe = pipeline.load(sd1.folder)
        assert pipeline.computes(pipe.system) == "cpu in bf16"
        assert np.std(pipe.generate("a red fox", seed=3, steps=2)[0].image) > 0
    assert pipeline.computes(pipeline.load(sd1.folder).system) == "cpu in fp32"
    assert pipeline.computes(pipeline.load(sd1.folder, dtype="fp16").system) == "cpu in fp16"
    with pytest.raises(UnknownName, match="no dtype 'half'"):
        pipeline.load(sd1.folder, dtype="half")


def test_a_network_that_overflows_in_half_precision_draws_in_float32_and_says_so(sd1, limner, here, monkeypatch):
    """Its first layer is made so large that float16 cannot hold what comes out, and the next one small again."""
    system = catalog.load(sd1.folder)
    with torch.no_grad():
        system.network.conv_in.weight *= 3e4
        system.network.conv_in.bias *= 3e4
    catalog.save(system, catalog.config_of(folders.recognise(sd1.folder)), here / "loud.safetensors")
    told = ("a red fox", "-m", "loud.safetensors", "-s", 3, "--steps", 1)
    half, whole = (limner(*told, "--dtype", dtype, "-o", f"{dtype}.png") for dtype in ("fp16", "fp32"))
    assert half.code == 0, half.err
    assert "overflows in half precision: its network computes in fp32 from here on" in half.err
    assert "overflows" not in whole.err
    one, other = (np.asarray(Image.open(f"{dtype}.png")).astype(int) for dtype in ("fp16", "fp32"))
    assert np.abs(one - other).mean() < 8  # its weights were rounded
    draws, to_latents = [], pipeline.to_latents
    monkeypatch.setattr(pipeline, "to_latents", lambda *given: draws.append(1) or to_latents(*given))
    strict = limner(*told, "--dtype", "fp16", "--strict", "-o", "strict.png")
    assert (strict.code, "overflows in half precision" in strict.err) == (2, True)
    assert draws == [1]  # it is not drawn again in float32 first


def drawn_by_diffusers(pipe: Any, guidance: float = 5.0, **told: Any) -> torch.Tensor:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.published)
    told |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent", "num_inference_steps": 5}
    return pipe(guidance_scale=guidance, **told).images


def test_clip_skip_is_that_of_diffusers_which_counts_from_nought(sd1):
    """Without guidance: diffusers does not skip layers for the negative prompt, other programs do."""
    for skip in (1, 2):
        wanted = drawn_by_diffusers(sd1.theirs, guidance=1.0, prompt="a red fox", clip_skip=skip - 1)
        ours = latents(sd1.ours, "a red fox", clip_skip=skip, guidance=1.0)
        assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max(), skip


@pytest.mark.parametrize("dialect", ["a1111", "comfyui"])
def test_weights_and_chunks_draw_what_diffusers_draws_from_such_states(sd1, dialect):
    """States made here with transformers, by what the programs say of their weights."""
    pipe = sd1.theirs

    def states(text: str, weights: list[float]) -> torch.Tensor:
        ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        empty = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            z, nothing = pipe.text_encoder(ids)[0], pipe.text_encoder(empty)[0]
        w = torch.tensor([1.0, *weights, *[1.0] * (76 - len(weights))])[:, None]
        return z * w * (z.mean() / (z * w).mean()) if dialect == "a1111" else nothing + w * (z - nothing)

    cond = torch.cat([states("red " * 75, [1.5] * 75), states("red " * 5 + "fox", [1.5] * 5 + [1.0])], dim=1)
    dull = states("dull", [0.5])  # A1111 goes on with an empty chunk, ComfyUI with the same again
    uncond = torch.cat([dull, states("", []) if dialect == "a1111" else dull], dim=1)
    wanted = drawn_by_diffusers(pipe, prompt_embeds=cond, negative_prompt_embeds=uncond)
    ours = latents(sd1.ours, f"({'red ' * 80}:1.5) fox", negative="(dull:0.5)", prompt_dialect=dialect)
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def latents(system: Any, prompt: str, **told: Any) -> torch.Tensor:
    told = {"seed": 3, "steps": 5, "guidance": 5.0, "sampler": "euler"} | told
    request = pipeline.prepare(system, prompt=prompt, **told)
    with torch.inference_mode():
        return system.sample(system.condition([prompt], request), request, pipeline.noise_source([3], "cpu"))


def test_generate_takes_a_folder_and_remembers_what_it_is(sd1, here, limner):
    from limner.metadata import read_settings

    done = limner(
        "generate", "-m", sd1.folder, "a red fox", "--steps", 2, "--sampler", "Euler", "-s", 3, "-o", "fox.png"
    )
    assert (done.code, done.out) == (0, "fox.png\n")
    told = read_settings(here / "fox.png")
    assert [told[name] for name in ("model", "sampler", "schedule", "width")] == ["sd1", "euler", "linspace", 32]
    assert len(told["model_hash"]) == 10


def test_a_transparent_picture_goes_onto_white(sd1):
    clear, white = (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), Image.new("RGB", (32, 32), "white"))
    one, other = (sd1.ours.encode(pictures.to_tensor(picture, 32, 32)) for picture in (clear, white))
    assert torch.equal(one, other)
    assert one.shape == (1, 4, 16, 16)
