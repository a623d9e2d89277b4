"""DiT and SiT end to end: folders against diffusers, files against what their authors' programs compute."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner import catalog, exchange, pipeline
from limner.checkpoints.dit import diffusers_layout, joined
from limner.checkpoints.layouts import read
from limner.errors import Assumed, CheckpointMismatch, UsageError
from limner.metadata import read_settings

from . import stable_diffusion
from .test_graphs import Told

TOLD = {"seed": 3, "steps": 10, "guidance": 4.0}


@dataclass(frozen=True)
class Model:
    """A folder, what diffusers makes of it and what we do, and the network in the names of the authors' files."""

    folder: Path
    theirs: Any
    ours: Any
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    diffusers.utils.logging.set_verbosity_error()
    folder = stable_diffusion.dit(tmp_path_factory.mktemp("dit"))
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.published = pipe.scheduler.config
    ours = catalog.load(folder)
    network = pipe.transformer.state_dict()
    tensors = read(diffusers_layout(ours.network.config), joined(ours.network.config, network, folder), folder)
    return Model(folder, pipe, ours, {name: tensor.contiguous() for name, tensor in tensors.items()})


def expected(pipe: Any, scheduler: str, monkeypatch) -> tuple[Tensor, Image.Image]:
    """Latents and picture of diffusers. Its DiTPipeline forgets to begin with as much noise as a scheduler asks for,
    and to step from what was not yet scaled, both of which matter to Euler and are done here."""
    from diffusers.pipelines.dit import pipeline_dit

    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.published)
    walked = type(pipe.scheduler).from_config(pipe.scheduler.config)
    walked.set_timesteps(TOLD["steps"])
    draw, scale, step = diffusers.utils.torch_utils.randn_tensor, pipe.scheduler.scale_model_input, pipe.scheduler.step
    seen, whole = [], []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_dit, "randn_tensor", lambda *a, **more: draw(*a, **more) * walked.init_noise_sigma)
        patch.setattr(pipe.scheduler, "scale_model_input", lambda x, t: (whole.append(x), scale(x, t))[1])
        patch.setattr(pipe.scheduler, "step", lambda output, t, scaled: step(output, t, whole[-1]))
        decode = pipe.vae.decode
        patch.setattr(pipe.vae, "decode", lambda latents: (seen.append(latents), decode(latents))[1])
        generator = torch.Generator().manual_seed(TOLD["seed"])
        (image,) = pipe([207], TOLD["guidance"], generator, num_inference_steps=TOLD["steps"]).images
    return seen[0] * pipe.vae.config.scaling_factor, image


def drawn(system: Any, monkeypatch, prompt: str = "207", **told: Any) -> tuple[Tensor, Image.Image]:
    seen: list[Tensor] = []
    decode = system.decode
    with monkeypatch.context() as patch:
        patch.setattr(system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])
        image = pipeline.generate(system, prompt, **TOLD | told)[0].image
    return seen[0], image


def assert_same_pixels(ours: Image.Image, theirs: Image.Image) -> None:
    apart = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
    assert apart.shape == (32, 32, 3)
    assert np.asarray(theirs).std() > 10
    assert (apart <= 1).mean() >= 0.999


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ],
)
def test_a_folder_draws_what_diffusers_draws(model, sampler, scheduler, monkeypatch):
    latents, image = expected(model.theirs, scheduler, monkeypatch)
    ours = drawn(model.ours, monkeypatch, sampler=sampler, schedule="auto")
    assert (ours[0] - latents).abs().max() <= 1e-4 * latents.abs().max()
    assert_same_pixels(ours[1], image)


def test_a_folder_says_what_it_draws_with_and_knows_its_names(model, monkeypatch):
    told = exchange.inspect(model.folder)
    assert [told[name] for name in ("model", "family", "predicts", "sampler", "size", "guidance", "classes")] == [
        "dit", "DiT", "eps", "ddim", 32, 4.0, 1000,
    ]  # fmt: skip
    by_number, _ = drawn(model.ours, monkeypatch)
    assert torch.equal(drawn(model.ours, monkeypatch, "Golden Retriever")[0], by_number)
    assert not torch.equal(drawn(model.ours, monkeypatch, "tinca tinca")[0], by_number)
    for prompt, says in (
        ("golden retreiver", "Did you mean 'golden retriever'"),
        ("1000", "no class 1000"),
        (" ", "is empty"),
    ):
        with pytest.raises(UsageError, match=says):
            pipeline.prepare(model.ours, prompt=prompt)
    with pytest.raises(UsageError, match="no class 'blurry'"):
        pipeline.prepare(model.ours, prompt="207", negative="blurry")
    with pytest.raises(UsageError, match="width is 34, not a multiple of 4 pixels"):
        pipeline.prepare(model.ours, prompt="207", width=34)


def as_authors(pipe: Any, monkeypatch) -> None:
    """diffusers' pipeline with the arithmetic of the authors' program: its time, its epsilon, and guidance on three
    channels, for which the fourth without a class is made that with one."""
    for block in pipe.transformer.transformer_blocks:
        monkeypatch.setattr(block.norm1.emb.time_proj, "downscale_freq_shift", 0)
        monkeypatch.setattr(block.norm3, "eps", 1e-6)
    forward = pipe.transformer.forward

    def changed(*given: Any, **told: Any) -> Any:
        out = forward(*given, **told)
        half = len(out.sample) // 2
        out.sample[half:, 3] = out.sample[:half, 3]
        return out

    monkeypatch.setattr(pipe.transformer, "forward", changed)


@pytest.mark.parametrize("kind", ["DiT-S-2.pt", "trained.pt", "dit.safetensors"])
def test_a_file_draws_what_its_authors_draw_on_the_command_line(model, kind, monkeypatch, here, limner):
    from argparse import Namespace

    if kind.endswith(".safetensors"):
        save_file(model.tensors, kind)
    elif kind == "trained.pt":
        early = {name: torch.zeros_like(tensor) for name, tensor in model.tensors.items()}
        optimizer = {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-4}]}
        args = Namespace(model="DiT-S/2", epochs=1400)
        torch.save({"model": early, "ema": model.tensors, "opt": optimizer, "args": args}, kind)
    else:
        torch.save(model.tensors, kind)
    as_authors(model.theirs, monkeypatch)
    _, image = expected(model.theirs, "DPMSolverMultistepScheduler", monkeypatch)
    asked = ("golden retriever", "-m", kind, "-s", 3, "--steps", 10, "-o", "dog.png")
    alone = limner(*asked)
    assert alone.code == 3
    assert f"{kind} holds no autoencoder, but a DiT alone: give Stable Diffusion 1's with --vae FILE" in alone.err
    done = limner(*asked, "--vae", model.folder / "vae")
    assert (done.code, done.out) == (0, "dog.png\n"), done.err
    assert ("no name of a tensor tells a SiT from a DiT: it is taken for a DiT" in done.err) == (kind == "trained.pt")
    assert_same_pixels(Image.open("dog.png"), image)
    told = read_settings(here / "dog.png")
    assert [told[name] for name in ("model", "prompt", "guidance", "prediction", "sampler")] == [
        "dit", "golden retriever", 4.0, "eps", "dpmpp_2m",
    ]  # fmt: skip


def test_an_autoencoder_beside_the_file_is_found_and_a_repeat_draws_the_same(model, here, limner):
    torch.save(model.tensors, "dit.pt")
    Path("vae").symlink_to(model.folder / "vae")
    done = limner("207", "-m", "dit.pt", "-s", 3, "--steps", 2, "-o", "one.png")
    assert done.code == 0, done.err
    again = limner("generate", "-C", "one.png", "-m", "dit.pt", "-o", "two.png")
    assert again.code == 0, again.err
    assert Image.open("one.png").tobytes() == Image.open("two.png").tobytes()


def test_a_sit_is_a_flow_from_noise_to_data_with_guidance_on_three_channels(model, here):
    """Against Euler's steps as its authors take them, on the network that diffusers has in common with it."""
    torch.save(model.tensors, "SiT-S-2.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Assumed)  # its name says it
        system = catalog.load("SiT-S-2.pt", vae=model.folder / "vae")
    assert (system.name, system.interpolant.name, system.prediction.name) == ("sit", "flow", "velocity")
    request = pipeline.prepare(system, prompt="207", sampler="euler", **TOLD)
    with torch.inference_mode():
        cond = system.condition(["207"], request)
        ours = system.sample(cond, request, pipeline.noise_source([3], "cpu"))

    network = model.theirs.transformer
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    for i in range(10):
        t = torch.full((2,), i / 10)
        with torch.no_grad():
            told, not_told = network(x.repeat(2, 1, 1, 1), t, torch.tensor([207, 1000])).sample[:, :4].chunk(2)
        velocity = not_told + 4.0 * (told - not_told)
        velocity[:, 3] = told[:, 3]
        x = x + velocity / 10
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert (ours - x).abs().max() <= 1e-4 * x.abs().max()


def test_a_file_is_named_before_it_has_an_autoencoder_and_is_not_converted(model, here, limner):
    torch.save(model.tensors, "dit.pt")
    told = exchange.inspect("dit.pt")
    assert (told["kind"], told["needs"]) == ("DiT or SiT", "the autoencoder of Stable Diffusion 1")
    assert "--vae FILE" in told["problem"]
    assert "DiT or SiT" in limner("inspect", "dit.pt").out
    with pytest.raises(UsageError, match="is of DiT: only files of Stable Diffusion"):
        exchange.convert(model.folder, "whole.safetensors")
    done = limner("207", "-m", "dit.pt", "--text-encoder", "dit.pt")
    assert (done.code, "reads no words: leave --text-encoder out" in done.err) == (2, True)


def test_a_file_of_ours_keeps_the_names_and_draws_the_same(model, here, monkeypatch):
    from limner.checkpoints import dit

    config = catalog.config_of(dit.of_folder(model.folder))
    catalog.save(model.ours, config, here / "own.safetensors")
    own = catalog.load("own.safetensors")
    assert torch.equal(drawn(own, monkeypatch, "otter")[0], drawn(model.ours, monkeypatch, "360")[0])


def test_what_a_drawing_takes_is_known_without_drawing(model):
    from limner import memory

    request = pipeline.prepare(model.ours, prompt="207", **TOLD)
    found = memory.plan(model.ours, request, 1)
    assert found.weights["text_encoder"] == 0
    assert {stage.name for stage in found.stages} == {"the words", "a step", "the decoding"}
    assert all(stage.made > 0 for stage in found.stages if stage.name != "the words")


def test_recorded_steps_change_no_bit_and_serve_other_classes(model, monkeypatch):
    """On another size than the table of positions is of."""
    told = {"width": 40, "height": 32, "sampler": "euler"}
    plain = [drawn(model.ours, monkeypatch, prompt, **told)[0] for prompt in ("207", "360")]
    monkeypatch.setattr(model.ours, "graphs", Told())
    recorded = [drawn(model.ours, monkeypatch, prompt, **told)[0] for prompt in ("207", "360")]
    assert [one.graph.times for one in model.ours.graphs.made] == [9 + 10]
    assert torch.equal(torch.cat(recorded), torch.cat(plain))
    assert not torch.equal(*plain)


def test_a_folder_from_before_the_class_had_a_name_of_its_own_is_read(model, tmp_path):
    """As the published ones are, with the settings of the class that it was part of."""
    folder = tmp_path / "model"
    shutil.copytree(model.folder, folder)
    early = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
    early |= {"_class_name": "Transformer2DModel", "use_linear_projection": False}
    for file, changes in (("transformer/config.json", early), ("model_index.json", {})):
        told = json.loads((folder / file).read_text())
        told = told | changes if changes else told | {"transformer": ["diffusers", "Transformer2DModel"]}
        (folder / file).write_text(json.dumps({k: v for k, v in told.items() if k != "id2label"}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    system = catalog.load(folder)
    assert system.network.config == model.ours.network.config
    assert system.text_encoder.classes(["macaw"]) == [88]  # ImageNet's, where a folder tells no names
    theirs = model.ours.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in system.state_dict().items())


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("transformer/config.json", {"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ("transformer/config.json", {"num_attention_heads": 3}, r"is \(64, 4, 2, 2\) in the file, \(192, 4, 2, 2\)"),
        ("transformer/config.json", {"sample_size": 15}, "size=15 is not in patches of 2"),
        ("model_index.json", {"id2label": {"x": "cat"}}, "id2label"),
        ("model_index.json", {"id2label": ["cat"]}, "id2label"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderDC"]}, "the part vae is"),
        ("model_index.json", {"transformer": None}, "the part transformer is None"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "'odd'"),
    ],
)
def test_a_folder_with_what_is_not_known_is_refused_in_a_line(model, tmp_path, file, changes, says):
    folder = tmp_path / "model"
    shutil.copytree(model.folder, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointMismatch, match=says) as error:
        catalog.load(folder)
    assert "\n" not in str(error.value)
