"""Stable Diffusion 3 and FLUX.1 end to end against diffusers: the same request, the same picture, from every file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from limner import catalog, exchange, metadata, pipeline
from limner.errors import Assumed, CheckpointMismatch, FileProblem, Ignored, UsageError
from sweeps import sweep

from . import flow_models, stable_diffusion

SIZE = {"width": 32, "height": 32}


def make(name: str, folder: Path) -> Path:
    makers: dict[str, Callable[[Path], Path]] = {
        "sd3": flow_models.sd3,
        "sd3 without T5": lambda path: flow_models.sd3(path, with_t5=False),
        "sd3.5": lambda path: flow_models.sd3(path, qk_norm="rms_norm"),
        "sd3.5 medium": lambda path: flow_models.sd3(path, qk_norm="rms_norm", dual_attention_layers=(0,)),
        "dev": flow_models.flux,
        "schnell": lambda path: flow_models.flux(path, guided=False),
        "fill": lambda path: flow_models.flux(path, in_channels=144, kind="FluxFillPipeline"),
        "control": lambda path: flow_models.flux(path, in_channels=128, kind="FluxControlPipeline"),
        "kontext": lambda path: flow_models.flux(path, kind="FluxKontextPipeline"),
    }
    return makers[name](folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    return lru_cache(lambda name: make(name, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def theirs(folders) -> Callable[[str], Any]:
    diffusers.utils.logging.set_verbosity_error()

    def load(name: str) -> Any:
        kept = {"text_encoder_3": None, "tokenizer_3": None} if name.endswith("without T5") else {}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folders(name), **kept)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return lru_cache(load)


def expected(pipe: Any, **told: Any) -> tuple[torch.Tensor, Image.Image]:
    """Latents and picture of diffusers."""
    flux = "Flux" in type(pipe).__name__
    told = {"num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 512 if flux else 256} | told
    if not pipe.transformer.config.get("guidance_embeds", True):
        told["max_sequence_length"] = 256
    found = pipe(
        prompt="a red fox", **SIZE, generator=torch.Generator().manual_seed(3), output_type="latent", **told
    ).images
    latents = pipe._unpack_latents(found, 32, 32, pipe.vae_scale_factor) if flux else found
    codec = pipe.vae.config
    with torch.no_grad():
        images = pipe.vae.decode(latents / codec.scaling_factor + codec.shift_factor).sample
    return latents, pipe.image_processor.postprocess(images)[0]


def drawn(system: Any, **told: Any) -> tuple[torch.Tensor, Image.Image]:
    """The same of ours."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        decode = system.decode
        patch.setattr(system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])
        image = pipeline.generate(system, "a red fox", **SIZE | {"seed": 3, "steps": 4, "guidance": 5.0} | told)[0]
    return seen[0], image.image


def assert_same(ours: tuple[torch.Tensor, Image.Image], wanted: tuple[torch.Tensor, Image.Image]) -> None:
    assert (ours[0] - wanted[0]).abs().max() <= 1e-4 * wanted[0].abs().max()
    apart = np.abs(np.asarray(ours[1], dtype=int) - np.asarray(wanted[1], dtype=int))
    assert apart.shape[-1] == 3
    assert (apart <= 1).mean() >= 0.999


NAMES = {
    "sd3": "sd3-medium", "sd3 without T5": "sd3-medium", "sd3.5": "sd3.5-large", "sd3.5 medium": "sd3.5-medium",
    "dev": "flux-dev", "schnell": "flux-schnell",
}  # fmt: skip


@pytest.mark.parametrize("name", sweep(NAMES, fast=lambda name: name in ("sd3", "sd3.5 medium", "dev")))
def test_a_folder_draws_what_diffusers_draws(folders, theirs, name):
    system = catalog.load(folders(name), dtype=torch.float32)
    assert system.name == NAMES[name]
    if name.startswith("sd3"):
        assert_same(drawn(system, negative="dull"), expected(theirs(name), negative_prompt="dull"))
        return
    told = {} if name == "dev" else {"guidance": 1.0}
    assert_same(drawn(system, **told), expected(theirs(name)))


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_over_a_picture_it_draws_what_diffusers_draws(folders, theirs, name):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    cls = diffusers.StableDiffusion3Img2ImgPipeline if name == "sd3" else diffusers.FluxImg2ImgPipeline
    pipe = cls(**theirs(name).components)
    pipe.set_progress_bar_config(disable=True)
    told = {} if name == "dev" else {"negative_prompt": ""}
    wanted = expected_over(pipe, picture, **told)
    ours = drawn(catalog.load(folders(name), dtype=torch.float32), image=picture, strength=0.5)[0]
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def expected_over(pipe: Any, picture: Image.Image, **told: Any) -> torch.Tensor:
    """diffusers draws the noise after the picture's, which it samples: here it takes the mean."""
    with pytest.MonkeyPatch.context() as patch:
        mode = type(pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist)
        patch.setattr(mode, "sample", lambda self, generator=None: self.mode())
        found = pipe(
            prompt="a red fox", image=picture, strength=0.5, num_inference_steps=4, guidance_scale=5.0, **SIZE,
            generator=torch.Generator().manual_seed(3), output_type="latent", **told,
        ).images  # fmt: skip
    return pipe._unpack_latents(found, 32, 32, pipe.vae_scale_factor) if hasattr(pipe, "_unpack_latents") else found


# -------------------------------------------------------------------- what else FLUX.1 can be


def some_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def test_fill_paints_what_diffusers_paints_and_keeps_the_rest_to_the_bit(folders, theirs):
    picture, mask = some_picture(), Image.new("L", (32, 32))
    mask.paste(255, (8, 4, 24, 28))
    with pytest.MonkeyPatch.context() as patch:
        pipe = theirs("fill")
        kind = type(pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist)
        patch.setattr(kind, "sample", lambda self, generator=None: self.mode())
        wanted = expected(pipe, image=picture, mask_image=mask, strength=1.0)
    system = catalog.load(folders("fill"), dtype=torch.float32)
    assert system.name == "flux-fill"
    latents, image = drawn(system, image=picture, mask=mask)
    assert (latents - wanted[0]).abs().max() <= 1e-4 * wanted[0].abs().max()
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(image)[outside], np.asarray(picture)[outside])


def test_canny_and_depth_follow_a_picture_as_in_diffusers(folders, theirs):
    with pytest.MonkeyPatch.context() as patch:
        pipe = theirs("control")
        kind = type(pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist)
        patch.setattr(kind, "sample", lambda self, generator=None: self.mode())
        wanted = expected(pipe, control_image=some_picture())
    system = catalog.load(folders("control"), dtype=torch.float32)
    assert system.name == "flux-control"
    assert_same(drawn(system, image=some_picture()), wanted)
    with pytest.raises(UsageError, match="follows edges or depth of a picture, but none was given"):
        drawn(system)
    for name, given in (("strength", 0.5), ("mask", Image.new("L", (32, 32), 255))):
        with pytest.raises(UsageError, match=f"flux-control looks at a picture and does not paint .* leave {name} out"):
            drawn(system, image=some_picture(), **{name: given})


def test_kontext_looks_at_a_picture_as_in_diffusers(folders, theirs):
    pipe = theirs("kontext")
    with pytest.MonkeyPatch.context() as patch:
        kind = type(pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist)
        patch.setattr(kind, "sample", lambda self, generator=None: self.mode())
        wanted = expected(pipe, image=some_picture(), _auto_resize=False, max_area=32 * 32)
    system = catalog.load(folders("kontext"), dtype=torch.float32)
    assert system.name == "flux-kontext"
    assert_same(drawn(system, image=some_picture()), wanted)
    assert_same(drawn(system), expected(theirs("dev")))  # which has the same weights, and no picture to look at


# -------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def split(folders, tmp_path_factory) -> Callable[[str], dict[str, Path]]:
    return lru_cache(lambda name: flow_models.split_files(folders(name), tmp_path_factory.mktemp("split")))


def of_folder(folders, name: str, **told: Any) -> tuple[torch.Tensor, Image.Image]:
    return drawn(catalog.load(folders(name), dtype=torch.float32), **told)


def same_bits(ours: tuple[torch.Tensor, Image.Image], other: tuple[torch.Tensor, Image.Image]) -> bool:
    return torch.equal(ours[0], other[0])


@pytest.mark.parametrize(("name", "codec"), [("sd3", "first_stage_model."), ("dev", "vae."), ("schnell", "vae.")])
def test_all_in_one_file_is_the_same_model(folders, tmp_path, name, codec):
    path = flow_models.one_file(folders(name), tmp_path / "model.safetensors", codec)
    system = catalog.load(path, dtype=torch.float32)
    assert system.name == NAMES[name]
    assert system.defaults.width == 1024
    told = {"schedule": system.defaults.schedule, "guidance": 1.0 if name == "schnell" else 5.0}
    assert same_bits(drawn(system, **told), of_folder(folders, name, **told))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["sd3.5 medium", "dev"])
def test_files_of_the_parts_are_the_same_model(folders, tmp_path, name, prefix):
    files = flow_models.split_files(folders(name), tmp_path, prefix)
    texts = [files[part] for part in ("t5xxl", "clip_g", "clip_l") if part in files]  # in any order
    system = catalog.load(files["network"], vae=files["autoencoder"], text_encoders=texts, dtype=torch.float32)
    assert system.name == NAMES[name]
    assert same_bits(drawn(system), of_folder(folders, name))
    assert {"vae", "vae_hash", "text_encoder", "text_encoder_hash"} <= system.vae.keys()


def test_a_network_of_diffusers_and_an_autoencoder_in_a_folder_will_do_too(folders, split):
    folder, files = folders("dev"), split("dev")
    network = next((folder / "transformer").glob("*.safetensors"))
    system = catalog.load(
        network, vae=folder / "vae", text_encoders=[files["clip_l"], folder / "text_encoder_2"], dtype=torch.float32
    )
    assert same_bits(drawn(system), of_folder(folders, "dev"))


def test_stable_diffusion_3_draws_without_t5(folders, split):
    files = split("sd3 without T5")
    texts = [files["clip_l"], files["clip_g"]]
    system = catalog.load(files["network"], vae=files["autoencoder"], text_encoders=texts, dtype=torch.float32)
    assert system.text_encoder.t5xxl is None


def refused(words: str, *args: Any, **told: Any) -> None:
    with pytest.raises(CheckpointMismatch) as caught:
        catalog.load(*args, **told)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert words in message


def test_what_is_missing_is_named_with_the_option_that_gives_it(split):
    flux, sd3 = split("dev"), split("sd3")
    refused("is the network of FLUX.1 alone: give its autoencoder with --vae FILE, and CLIP-L and T5-XXL with "
            "--clip-l FILE and --t5 FILE", flux["network"])  # fmt: skip
    refused("T5-XXL is missing: give --t5 FILE", flux["network"], vae=flux["autoencoder"],
            text_encoders=[flux["clip_l"]])  # fmt: skip
    refused("CLIP-L is missing: give --clip-l FILE", flux["network"], vae=flux["autoencoder"],
            text_encoders=[flux["t5xxl"]])  # fmt: skip
    refused("OpenCLIP's bigG is missing: give --clip-g FILE", sd3["network"], vae=sd3["autoencoder"],
            text_encoders=[sd3["t5xxl"], sd3["clip_l"]])  # fmt: skip
    refused("not with two CLIPs", flux["network"], vae=flux["autoencoder"],
            text_encoders=[flux["t5xxl"], sd3["clip_l"], sd3["clip_g"]])  # fmt: skip


def test_a_part_in_the_wrong_place_is_named(split, tmp_path):
    flux, texts = split("dev"), [split("dev")["t5xxl"], split("dev")["clip_l"]]
    refused("holds no autoencoder", flux["network"], vae=flux["t5xxl"], text_encoders=texts)
    refused("holds no text encoder", flux["network"], vae=flux["autoencoder"], text_encoders=[flux["autoencoder"]])
    codec = stable_diffusion.sd1(tmp_path / "sd1") / "vae"
    refused("scales latents by 0.18215", flux["network"], vae=codec, text_encoders=texts)
    bare = tmp_path / "vae.safetensors"
    shutil.copy(next(codec.glob("*.safetensors")), bare)
    refused("is an autoencoder of 4 channels", flux["network"], vae=bare, text_encoders=texts)


def test_a_text_encoder_that_is_given_stands_in_place_of_the_files_own(folders, split, tmp_path):
    whole = flow_models.one_file(folders("dev"), tmp_path / "whole.safetensors")
    other = {name: 2 * tensor for name, tensor in load_file(split("dev")["clip_l"]).items()}
    save_file(other, tmp_path / "clip_l.safetensors")
    system = catalog.load(whole, text_encoders=[tmp_path / "clip_l.safetensors"] * 2, dtype=torch.float32)
    ours = system.text_encoder.clip_l.state_dict()
    assert all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", {"_class_name": ["FluxPipeline"]}),
        ("transformer/config.json", {"sample_size": "x"}),
        ("scheduler/scheduler_config.json", {"shift": 0}),
        ("text_encoder/config.json", {"hidden_size": "x"}),
    ],
)
def test_a_damaged_folder_is_refused_in_a_line(folders, tmp_path, file, change):
    shutil.copytree(folders("dev"), tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileProblem) as caught:
        catalog.load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


def test_a_turbo_is_told_by_the_name_of_its_folder(folders, tmp_path):
    shutil.copytree(folders("sd3.5"), tmp_path / "sd3.5-large-turbo")
    with pytest.warns(Assumed, match="its name says that it is distilled"):
        defaults = catalog.load(tmp_path / "sd3.5-large-turbo").defaults
    assert (defaults.steps, defaults.guidance) == (4, 1.0)


def test_other_programs_draw_flows_otherwise(folders):
    with pytest.raises(UsageError, match="Stable Diffusion 1, 2 and XL, not sd3-medium: leave compat out"):
        pipeline.generate(catalog.load(folders("sd3")), "a fox", compat="comfyui", **SIZE)


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_half_a_network_is_refused_by_the_key_that_is_missing(split, tmp_path, name):
    files = split(name)
    tensors = load_file(files["network"])
    last = max(key for key in tensors if "blocks.1." in key)
    del tensors[last]
    save_file(tensors, tmp_path / "half.safetensors")
    texts = [files[part] for part in ("t5xxl", "clip_l", "clip_g") if part in files]
    refused(last, tmp_path / "half.safetensors", vae=files["autoencoder"], text_encoders=texts)


def test_what_no_name_tells_is_taken_from_the_files_and_said(split, tmp_path):
    files = split("dev")
    told: Any = {"vae": files["autoencoder"], "text_encoders": [files["t5xxl"], files["clip_l"]]}
    for title, name in (("flux1-kontext-dev", "flux-kontext"), ("flux1-dev", "flux-dev"), ("my-krea", "flux-dev")):
        shutil.copy(files["network"], tmp_path / f"{title}.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert catalog.load(tmp_path / f"{title}.safetensors", **told).name == name
    with pytest.warns(Assumed, match="no name of a tensor tells FLUX.1 dev from Kontext: it is taken for dev"):
        assert catalog.load(files["network"], **told).name == "flux-dev"
    with pytest.raises(UsageError, match="predicts a velocity, as all of its kind"):
        catalog.load(files["network"], prediction="v", **told)


# -------------------------------------------------------------------- guidance, sizes, the command line


def test_a_network_that_is_told_its_guidance_is_not_guided_as_well(folders):
    pipe = pipeline.load(folders("dev"), dtype="fp32")
    rows: list[int] = []
    handle = pipe.system.network.register_forward_hook(lambda network, told, out: rows.append(len(told[0])))
    told = SIZE | {"seed": 3, "steps": 2}
    weak, strong = (pipe.generate("a fox", guidance=g, **told)[0].image.tobytes() for g in (1.0, 5.0))
    assert weak != strong
    with pytest.warns(Ignored, match="the negative prompt: without effect, as flux-dev is told how much to follow"):
        assert pipe.generate("a fox", guidance=5.0, negative="dull", **told)[0].image.tobytes() == strong
    handle.remove()
    assert set(rows) == {1}


@pytest.mark.parametrize("name", ["sd3", "dev", "schnell"])
def test_a_picture_is_the_same_alone_and_in_a_batch(folders, name):
    system = catalog.load(folders(name), dtype=torch.float32)
    told = SIZE | {"steps": 2, "seed": 5}
    batch = pipeline.generate(system, "a fox", batch=3, **told)
    alone = pipeline.generate(system, "a fox", **told | {"seed": 6})
    apart = np.abs(np.asarray(batch[1].image, dtype=int) - np.asarray(alone[0].image, dtype=int))
    assert apart.max() <= 1


def test_other_shapes_and_sizes_off_the_grid(folders):
    system = catalog.load(folders("dev"), dtype=torch.float32)
    assert pipeline.generate(system, "a fox", width=64, height=32, steps=1)[0].image.size == (64, 32)
    with pytest.raises(UsageError, match="width is 34"):
        pipeline.generate(system, "a fox", width=34, height=32, steps=1)


def test_no_larger_than_there_are_positions(folders):
    system = catalog.load(folders("sd3"), dtype=torch.float32)  # 32 tokens of 4 pixels
    told = {"width": 192, "height": 32, "steps": 1}
    with pytest.raises(UsageError, match="192 pixels a side, but sd3-medium has positions for 128: add --tile 64"):
        pipeline.generate(system, "a fox", **told)
    assert pipeline.generate(system, "a fox", **told, tile=64)[0].image.size == (192, 32)


@pytest.mark.parametrize(("name", "layers"), [("sd3", 2), ("dev", 4)])
def test_layers_are_compiled_when_asked(folders, name, layers, monkeypatch):
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(self))
    pipe = pipeline.load(folders(name), dtype="fp32", compile=True)
    assert len(compiled) == layers
    assert not pipe.system.graphs.devices


@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_times_and_words_are_made_once_a_drawing(folders, name):
    system = catalog.load(folders(name), dtype=torch.float32)
    network = system.network
    once = network.asked_once()
    linears = [module for part in once for module in part.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) > 5
    calls: list[Any] = []
    handles = [one.register_forward_hook(lambda module, *_: calls.append(module)) for one in linears]
    pipeline.generate(system, "a fox", steps=4, **SIZE)
    for handle in handles:
        handle.remove()
    assert {calls.count(one) for one in linears} == {1}


@pytest.mark.filterwarnings("ignore")
def test_on_the_command_line(folders, split, limner, here):
    files = split("dev")
    told = ("-W", 32, "-H", 32, "--steps", 2, "-s", 3)
    done = limner("generate", "-m", folders("dev"), "a red fox", *told, "-o", "a.png")
    assert (done.code, done.out) == (0, "a.png\n"), done
    settings = metadata.read_settings(here / "a.png")
    assert [settings[k] for k in ("model", "sampler", "schedule", "guidance")] == ["flux-dev", "euler", "shifted", 3.5]
    given = ("--vae", files["autoencoder"], "--clip-l", files["clip_l"], "--t5", files["t5xxl"])
    done = limner("generate", "-m", files["network"], *given, "a red fox", *told, "-o", "b.png")
    assert done.code == 0, done
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    done = limner("generate", "-m", files["network"], *given, "-C", "b.png", "-o", "c.png")
    assert done.code == 0, done
    assert (here / "b.png").read_bytes() == (here / "c.png").read_bytes()
    done = limner("generate", "-m", files["network"], "a fox", "--t5", files["clip_l"])
    assert (done.code, "--t5 FILE is for T5" in done.err) == (3, True), done


@pytest.mark.parametrize("name", ["sd3", "dev", "fill"])
def test_inspect_says_what_it_is(folders, split, tmp_path, name):
    told = exchange.inspect(folders(name))
    assert told["family"] == ("Stable Diffusion 3" if name == "sd3" else "FLUX.1")
    told = exchange.inspect(split(name)["network"])
    assert told["kind"] == f"network of {'Stable Diffusion 3' if name == 'sd3' else 'FLUX.1'}"
    assert "--vae" in told["needs"]
    assert "T5's kind" in exchange.inspect(split(name)["t5xxl"])["kind"]
    whole = exchange.inspect(flow_models.one_file(folders(name), tmp_path / "whole.safetensors"))
    assert [whole["model"], whole["predicts"]] == [NAMES.get(name, "flux-fill"), "velocity"]
    assert ("sees" in whole) == (name == "fill")


def test_a_negative_prompt_that_nobody_asks_for_is_not_read(folders, monkeypatch):
    for name, guidance, count in (("dev", 3.0, 1), ("sd3", 1.0, 1), ("sd3", 3.0, 2)):
        system = catalog.load(folders(name), dtype=torch.float32)
        read, rows = system.text_encoder.read, []
        monkeypatch.setattr(
            system.text_encoder, "read", lambda turn, *a, rows=rows, read=read: (rows.append(turn), read(turn, *a))[1]
        )
        pipeline.generate(system, "a red fox", batch=2, guidance=guidance, seed=3, steps=1, **SIZE)
        assert [len(row) for row in rows[0]] == [count, count]


def test_a_schedule_of_other_models_levels_is_refused(folders):
    with pytest.raises(UsageError, match="'align_your_steps' was made for Stable Diffusion 1 and XL: take 'uniform'"):
        pipeline.generate(catalog.load(folders("sd3")), "a fox", schedule="align_your_steps_xl", **SIZE)


@pytest.mark.parametrize("prompt", ["a (red:1.3) fox", "a fox AND a dog", "a fox BREAK a dog"])
def test_syntax_of_prompts_that_is_read_as_words_is_told(folders, prompt):
    system = catalog.load(folders("dev"))
    with pytest.warns(Ignored, match="flux-dev reads prompts plainly, whatever the dialect: '.*' is words to it"):
        pipeline.generate(system, prompt, steps=1, **SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Ignored)
        pipeline.generate(system, "a fox (red, or brown: 2 of them)", steps=1, **SIZE)
        pipeline.generate(system, prompt, steps=1, prompt_dialect="plain", **SIZE)


def test_another_clip_is_refused_by_its_size(split, tmp_path):
    dev, other = split("dev"), split("sd3")["clip_g"]
    with pytest.raises(CheckpointMismatch, match=r"reads vectors of 64 from CLIP-L, but .* have 128: .* --clip-l FILE"):
        catalog.load(dev["network"], vae=dev["autoencoder"], text_encoders=[dev["t5xxl"], other])


def test_a_network_alone_is_inspected_and_cannot_be_converted(split, tmp_path):
    told = exchange.inspect(split("fill")["network"])
    assert [told[name] for name in ("model", "guidance", "sees")] == [
        "flux-fill",
        30.0,
        "a mask and what is around it (--mask)",
    ]
    assert told["parameters"].keys() == {"network"}
    assert "--vae FILE" in told["problem"]
    with pytest.raises(UsageError, match=r"is of FLUX\.1: only files of Stable Diffusion 1, 2 and XL"):
        exchange.convert(split("dev")["network"], tmp_path / "folder")
    tensors = load_file(split("sd3")["network"])
    name = next(name for name in tensors if name.endswith("x_block.mlp.fc1.bias"))
    save_file(tensors | {name: torch.zeros(3)}, tmp_path / "odd.safetensors")
    assert name in exchange.inspect(tmp_path / "odd.safetensors")["problem"]
