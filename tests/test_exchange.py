"""Looking at models of other programs, and making one kind of file of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from checkpoints.test_single_files import tensors
from limner import catalog, exchange, pipeline
from limner.checkpoints import folders, single_files
from limner.checkpoints.files import read
from limner.errors import CheckpointMismatch, FileProblem, UnknownName, UsageError
from systems import stable_diffusion


@pytest.fixture(scope="module", params=["sd1", "sd2_v", "sdxl", "sdxl_refiner"])
def folder(request, tmp_path_factory) -> Path:
    return getattr(stable_diffusion, request.param)(tmp_path_factory.mktemp(request.param))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_there_and_back_is_the_same_model(folder, tmp_path):
    file, _ = exchange.convert(folder, tmp_path / "model.safetensors")
    again, _ = exchange.convert(file, tmp_path / "again")
    file_again, _ = exchange.convert(again, tmp_path / "again.safetensors")
    before, after = folders.recognise(folder), folders.recognise(again)
    assert same(before.tensors, after.tensors)
    assert exchange.inspect(folder)["parameters"] == exchange.inspect(file)["parameters"]
    assert same(read(file)[0], read(file_again)[0])
    for name in ("network", "text", "prediction"):
        assert getattr(before, name) == getattr(after, name)
    assert [t.encode(["A  red fox!", ""]) for t in before.tokenizers] == [
        t.encode(["A  red fox!", ""]) for t in after.tokenizers
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "again.safetensors", "model.safetensors"]


def test_diffusers_loads_what_is_written_and_draws_the_same(folder, tmp_path):
    diffusers.utils.logging.set_verbosity_error()
    file, _ = exchange.convert(folder, tmp_path / "model.safetensors")
    again, _ = exchange.convert(file, tmp_path / "again")
    pipes = [diffusers.DiffusionPipeline.from_pretrained(path) for path in (folder, again)]
    told = {"image": torch.zeros(1, 4, 16, 16)} if "Img2Img" in type(pipes[0]).__name__ else {"width": 32, "height": 32}
    latents = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        generator = torch.Generator().manual_seed(0)
        out = pipe("a red fox", num_inference_steps=3, generator=generator, output_type="latent", **told)
        latents.append(out.images)
    assert type(pipes[0]) is type(pipes[1])
    assert torch.equal(*latents)


def test_a_folder_of_stable_diffusion_2_lacks_the_layer_that_is_skipped():
    """As the published one does, unlike the single file."""
    found = single_files.recognise(Path("file"), tensors("sd2"), "v")
    contents, parts = folders.export(replace(found, size=768))
    assert found.text.towers[0].depth == 24
    assert contents["text_encoder/config.json"]["num_hidden_layers"] == 23
    layers = {name.split(".")[3] for name in parts["text_encoder/model"] if ".layers." in name}
    assert layers == {str(i) for i in range(23)}
    assert "text_projection.weight" not in parts["text_encoder/model"]


def test_a_file_says_what_it_is_and_what_it_is_not_told(sd1_folder, tmp_path):
    file, _ = exchange.convert(sd1_folder, tmp_path / "model.safetensors")
    of_folder, of_file = exchange.inspect(sd1_folder), exchange.inspect(file)
    parameters = sum(p.numel() for p in catalog.load(sd1_folder).parameters())
    for told in (of_folder, of_file):
        assert (told["model"], told["family"], told["predicts"]) == ("sd1", "Stable Diffusion 1", "eps")
        assert sum(told["parameters"].values()) == parameters
        assert told["precision"] == "float32"
        assert "problem" not in told
    assert (of_folder["kind"], of_folder["sampler"], of_folder["size"]) == ("folder of diffusers", "plms", 32)
    assert (of_file["kind"], of_file["sampler"], of_file["size"]) == ("single file", "euler", 512)
    assert json.loads(json.dumps(of_file)) == of_file


PARTS = {
    "LoRA as kohya": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)},
    "LoRA as PEFT": {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": (4, 320)},
    "LoHa": {"lora_unet_x.hada_w1_a": (4, 4)},
    "ControlNet as diffusers": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.bias": (9,)},
    "ControlNet as its authors": {"control_model.input_hint_block.0.weight": (16, 3, 3, 3)},
    "IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (320, 768), "image_proj.proj.weight": (3072, 1024)},
    "image encoder": {"vision_model.embeddings.class_embedding": (1280,)},
    "textual inversion": {"emb_params": (2, 768)},
    "network of FLUX.1": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "U-Net of Stable Diffusion XL": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    },
    "U-Net of Stable Diffusion 1, for inpainting": {
        "conv_in.weight": (320, 9, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    },
    "autoencoder of Stable Diffusion 1, 2 or XL": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "text encoder": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "unknown": {"some.weight": (2, 2), "other.weight": (2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_is_named_and_what_it_needs(kind, tmp_path):
    save_file(
        {name: torch.zeros(shape, dtype=torch.float16) for name, shape in PARTS[kind].items()},
        tmp_path / "x.safetensors",
    )
    told = exchange.inspect(tmp_path / "x.safetensors")
    assert told["kind"].startswith(kind)
    assert told["precision"] == "float16"
    assert "first" in told if kind == "unknown" else told["needs"]
    with pytest.raises(CheckpointMismatch, match=r"x\.safetensors") as refused:
        catalog.load(tmp_path / "x.safetensors")
    if not kind.startswith(("unknown", "U-Net of Stable Diffusion XL")):  # which lies where a whole model has it
        assert f"it is {kind}" in str(refused.value)


def test_our_own_files_are_known(tiny_model):
    told = exchange.inspect(tiny_model)
    assert (told["kind"], told["model"], told["precision"]) == ("file of limner", "icons-tiny", "float32")


def test_a_file_that_does_not_fit_is_told_with_its_problem(sd1_folder, tmp_path):
    file, _ = exchange.convert(sd1_folder, tmp_path / "model.safetensors")
    tensors = read(file)[0] | {"more": torch.zeros(1)}
    save_file(tensors, tmp_path / "more.safetensors")
    assert "1 unknown (first: more)" in exchange.inspect(tmp_path / "more.safetensors")["problem"]
    with pytest.raises(FileProblem, match="more"):
        exchange.convert(tmp_path / "more.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_nobody_needs_is_left_out_and_said(sd1_folder, tmp_path):
    file, _ = exchange.convert(sd1_folder, tmp_path / "model.safetensors")
    more = {"model_ema.decay": torch.zeros(1), "model_ema.x": torch.zeros(1), "betas": torch.zeros(3)}
    save_file(read(file)[0] | more, tmp_path / "more.safetensors")
    _, beside = exchange.convert(tmp_path / "more.safetensors", tmp_path / "less.safetensors")
    assert beside == {"model_ema": 2, "betas": 1}
    assert same(read(tmp_path / "less.safetensors")[0], read(file)[0])


def test_what_cannot_be_converted_is_refused(sd1_folder, tiny_model, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileProblem, match="there already"):
        exchange.convert(sd1_folder, tmp_path / "there")
    with pytest.raises(UsageError, match="Limner's own"):
        exchange.convert(tiny_model, tmp_path / "x")
    with pytest.raises(UsageError, match=r"end in \.safetensors"):
        exchange.convert(sd1_folder, tmp_path / "x.ckpt")
    with pytest.raises(FileProblem, match="no file"):
        exchange.convert(tmp_path / "missing.safetensors", tmp_path / "x")


def test_the_commands(sd1_folder, here, limner):
    done = limner("convert", sd1_folder, "fox.safetensors")
    assert (done.code, done.out, done.err) == (0, "fox.safetensors\n", "")
    told = json.loads(limner("inspect", "fox.safetensors", "--json").out)
    lines = dict(line.split(maxsplit=1) for line in limner("inspect", "fox.safetensors").out.splitlines())
    assert lines["family"] == told["family"] == "Stable Diffusion 1"
    assert lines["kind"] == "single file"
    refused = limner("convert", sd1_folder, "fox.safetensors")
    assert (refused.code, refused.out) == (3, "")
    assert refused.err == "limner: fox.safetensors is there already: give another name\n"


def test_what_was_assumed_is_said_when_it_is_drawn_with(here, limner, tmp_path):
    folder = stable_diffusion.sd2_v(tmp_path / "sd2")
    exchange.convert(folder, here / "sd2.safetensors")
    told = ("-W", 32, "-H", 32, "--steps", 1, "-s", 0)
    done = limner("generate", "a red fox", "-m", "sd2.safetensors", *told)
    assert done.err.splitlines()[0].startswith("limner: sd2.safetensors: names do not tell what a Stable Diffusion 2")
    assert limner("generate", "a red fox", "-m", folder, *told).err.startswith("seed 0, ")


def test_what_a_model_predicts_can_be_said(tmp_path, tiny_model):
    folder = stable_diffusion.sd2_v(tmp_path / "sd2")
    file, _ = exchange.convert(folder, tmp_path / "sd2.safetensors")
    for model in (folder, file):
        systems = [pipeline.load(model, "cpu", prediction).system for prediction in ("v", "eps")]
        assert [system.prediction.name for system in systems] == ["v", "eps"]
        assert [system.name for system in systems] == ["sd2-v", "sd2"]
    with pytest.raises(UsageError, match="says what it predicts"):
        pipeline.load(tiny_model, "cpu", "v")
    with pytest.raises(UnknownName, match="no prediction 'noise'"):
        pipeline.load(file, "cpu", "noise")
