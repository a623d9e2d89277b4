"""Unions of ControlNets, T2I-Adapters and control-LoRAs: what diffusers makes of them, from any file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from limner import exchange, metadata, pipeline
from limner.adapters import control
from limner.checkpoints import controlnet, layouts, t2i_adapter
from limner.errors import CheckpointMismatch, Ignored, UnknownName, UsageError
from limner.models.controlnet import ControlNet, ControlNetUnion
from limner.models.t2i_adapter import T2I_SD1, T2I_SD1_LIGHT, T2I_SDXL, T2IAdapter
from limner.models.unet import SD1, SDXL, UNET_TINY, Residuals, UNet, micro_conditioning
from limner.types import Conditioning

from . import stable_diffusion
from .test_control import KINDS, drawn, picture

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLD = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
ADAPTERS = {  # arguments of diffusers' networks, whose pictures are twice as large as latents, or four times
    "full": {"channels": [32, 64], "num_res_blocks": 2, "downscale_factor": 2, "adapter_type": "full_adapter"},
    "grey": {"in_channels": 1, "channels": [32, 64], "downscale_factor": 2, "adapter_type": "full_adapter"},
    "light": {"channels": [32, 64], "num_res_blocks": 3, "downscale_factor": 2, "adapter_type": "light_adapter"},
    "xl": {"channels": [64, 128], "num_res_blocks": 2, "downscale_factor": 4, "adapter_type": "full_adapter_xl"},
}


def close(found: torch.Tensor, wanted: torch.Tensor, near: float) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= near * wanted.abs().max())


@pytest.fixture(scope="module")
def systems(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    diffusers.utils.logging.set_verbosity_error()
    makers = {"sd1": stable_diffusion.sd1, "sd2": stable_diffusion.sd2_v, "sdxl": stable_diffusion.sdxl}
    folders = {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in makers.items()}
    return {kind: (folder, pipeline.load(folder)) for kind, folder in folders.items()}


def theirs_of(cls: Any, folder: Path, **parts: Any) -> Any:
    found = diffusers.DiffusionPipeline.from_pretrained(folder).components
    if cls is diffusers.StableDiffusionAdapterPipeline:
        del found["image_encoder"]
    found["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(found["scheduler"].config)
    pipe = cls(**found, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# ------------------------------------------------------------------- unions


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> tuple[Any, Path]:
    net = diffusers.ControlNetUnionModel(
        **KINDS["sdxl"], conditioning_embedding_out_channels=(16, 32), num_trans_channel=64, num_trans_head=8,
        num_proj_channel=64, num_trans_layer=2,
    )  # fmt: skip
    net = stable_diffusion.noised(net, 7)
    net.save_pretrained(folder := tmp_path_factory.mktemp("union") / "union")
    return net, folder


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_a_union_adds_what_diffusers_adds_of_each_kind(systems, union, dtype, near):
    net, folder = union[0].to(dtype), union[1]
    ours = controlnet.read(folder, load_file(folder / WEIGHTS), systems["sdxl"][1].system.network.config, {}).to(dtype)
    assert isinstance(ours, ControlNetUnion)
    generator = torch.Generator().manual_seed(1)
    x, hint, text, vector = (
        torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((4, 12, 20), (3, 24, 40), (7, 192), (128,))
    )
    sizes, t = torch.tensor([[32.0, 32, 0, 0, 32, 32]]), torch.tensor([700])
    cond = Conditioning(text, vector=micro_conditioning(vector, sizes))
    for kind in (0, 3, 5):
        marks = torch.zeros(1, 6).scatter_(1, torch.tensor([[kind]]), 1)
        told = {"text_embeds": vector, "time_ids": sizes}
        down, mid = net(x, t, text, [hint], marks, [kind], added_cond_kwargs=told, return_dict=False)
        found = ours(x, t, cond, ours.see(hint, kind))
        assert all(close(a, b, near) for a, b in zip([*found.down, found.mid], [*down, mid], strict=True))
    net.to(torch.float32)


def test_a_union_draws_what_diffusers_draws(systems, union, monkeypatch):
    """Not guessing: there diffusers' pipeline gives its network rows of unlike number."""
    (net, path), (folder, pipe) = union, systems["sdxl"]
    other = theirs_of(diffusers.StableDiffusionXLControlNetUnionPipeline, folder, controlnet=net)
    wanted = other(
        "a red fox", control_image=[picture()], control_mode=[1], height=32, width=32, generator=seed(),
        controlnet_conditioning_scale=0.7, control_guidance_end=0.65, **TOLD,
    ).images  # fmt: skip
    ask = {"file": path, "image": picture(), "weight": 0.7, "end": 0.65, "kind": "depth"}
    found, of_another_kind = (drawn(pipe, monkeypatch, control=[ask | {"kind": kind}]) for kind in ("depth", "pose"))
    assert close(found, wanted, 1e-4)
    assert not torch.equal(found, of_another_kind)
    assert not close(drawn(pipe, monkeypatch), wanted, 1e-2)


def test_a_union_that_is_used_twice_is_two_networks(systems, union, tmp_path, monkeypatch):
    path, pipe = union[1], systems["sdxl"][1]
    source = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    copy = shutil.copy(source, tmp_path / "copy.safetensors")
    rows = [{"image": picture(), "weight": 0.7, "kind": kind} for kind in ("depth", "pose")]
    twice, apart = (
        drawn(pipe, monkeypatch, control=[rows[0] | {"file": path}, rows[1] | {"file": other}])
        for other in (path, copy)
    )
    assert torch.equal(twice, apart)


def test_a_union_is_told_the_kind_that_a_maker_makes_and_asks_otherwise(systems, union, here):
    system, path = systems["sdxl"][1].system, union[1]
    picture().save(here / "in.png")
    assert control.open_control(system, **control.parse(f"{path}=in.png,canny")).kind == "canny"
    assert control.open_control(system, **control.parse(f"{path}=in.png,sobel")).kind == "softedge"
    assert control.open_control(system, **control.parse(f"{path}=in.png,canny,kind=pose")).kind == "pose"
    with pytest.raises(UsageError, match="knows several kinds of pictures: say which, kind=pose or depth"):
        control.open_control(system, path, picture())
    with pytest.raises(UnknownName, match="no kind of picture 'tile'"):  # which only those of eight kinds know
        control.open_control(system, path, picture(), kind="tile")
    with pytest.raises(CheckpointMismatch, match=r"union is a ControlNet of a model of words 192 wide"):
        control.open_control(systems["sd1"][1].system, path, picture(), kind="pose")


def test_another_maker_makes_another_kind_than_a_picture_remembers():
    old = {"name": "union", "hash": "?", "weight": 0.5, "maker": "canny", "kind": "canny"}
    rows = [control.resolve([control.parse(f"union=in.png{more}")], [old])[0] for more in ("", ",blur", ",kind=pose")]
    assert [(row["maker"], row.get("kind"), row["weight"]) for row in rows] == [
        ("canny", "canny", 0.5), ("blur", None, 0.5), ("canny", "pose", 0.5)
    ]  # fmt: skip


# ------------------------------------------------------------------- T2I-Adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Callable[[str, int], tuple[Any, Path]]:
    def make(name: str, noise: int = 5) -> tuple[Any, Path]:
        net = stable_diffusion.noised(diffusers.T2IAdapter(**ADAPTERS[name]), noise)
        net.save_pretrained(folder := tmp_path_factory.mktemp(name) / f"{name}{noise}")
        return net, folder

    return make


def original(net: Any, name: str) -> dict[str, torch.Tensor]:
    """The names that the authors' code has, of two blocks a level, or light."""
    stored = {}
    for key, tensor in net.state_dict().items():
        parts = key.removeprefix("adapter.").split(".")
        if parts[0] == "body" and name == "light":
            parts = [part.replace("resnets", "body") for part in parts]
        elif parts[0] == "body":
            k = int(parts[3]) if parts[2] == "resnets" else 0
            parts = ["body", f"{2 * int(parts[1]) + k}", *(parts[4:] if parts[2] == "resnets" else parts[2:])]
        stored[".".join(parts)] = tensor
    return stored


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_a_t2i_adapter_tells_what_diffusers_tells_in_both_spellings(systems, adapter, name, dtype, near):
    net, folder = adapter(name)
    base = systems["sdxl" if name == "xl" else "sd1"][1].system.network.config
    base = replace(base, widths=(32, 64, 64), depths=(1, 1, 0)) if name == "light" else base
    hint = torch.rand(1, ADAPTERS[name].get("in_channels", 3), 24, 40, generator=seed(), dtype=torch.float64).to(dtype)
    wanted = net.to(dtype)(hint)
    for tensors in (net.float().state_dict(), original(net.float(), name)):
        found = t2i_adapter.read(folder, tensors, base, 2).to(dtype).see(hint.expand(-1, 3, -1, -1))
        assert all(close(a, b, near) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["full", "grey", "xl", "two"])
def test_a_t2i_adapter_draws_what_diffusers_draws(systems, adapter, name, monkeypatch):
    folder, pipe = systems["sdxl" if name == "xl" else "sd1"]
    nets = [adapter("full", 5), adapter("full", 6)] if name == "two" else [adapter(name)]
    images, weights = [picture(0), picture(1)][: len(nets)], [0.7, -0.4][: len(nets)]
    images = [images[0].convert("L")] if name == "grey" else images
    cls = diffusers.StableDiffusionXLAdapterPipeline if name == "xl" else diffusers.StableDiffusionAdapterPipeline
    extra = {} if name == "xl" else {"requires_safety_checker": False}
    one = len(nets) == 1
    other = theirs_of(cls, folder, adapter=nets[0][0] if one else [net for net, _ in nets], **extra)
    told = {"adapter_conditioning_factor": 0.65} if name == "xl" else {}
    wanted = other(
        "a red fox", image=images[0] if one else images, height=32, width=32, generator=seed(),
        adapter_conditioning_scale=weights[0] if one else weights, **told, **TOLD,
    ).images  # fmt: skip
    end = 0.65 if name == "xl" else 1.0
    ask = [
        {"file": path, "image": image, "weight": weight, "end": end}
        for (_, path), image, weight in zip(nets, images, weights, strict=True)
    ]
    found, without = drawn(pipe, monkeypatch, control=ask), drawn(pipe, monkeypatch)
    assert close(found, wanted, 1e-4)
    assert not close(found, without, 1e-2)


def test_it_adds_to_what_a_controlnet_does(systems, adapter, tmp_path, monkeypatch):
    """One that tells nothing changes no bit of the other."""
    pipe = systems["sd1"][1]
    net = stable_diffusion.noised(ControlNet(pipe.system.network.config, (16, 32)), 4)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    silent, folder = adapter("full")
    for parameter in silent.parameters():
        parameter.data.zero_()
    save_file(silent.state_dict(), tmp_path / "silent.safetensors")
    one, quiet, loud = ((path, picture()) for path in (tmp_path / "net.safetensors", tmp_path / "silent.safetensors",
                                                       folder))  # fmt: skip
    alone, both, other = (drawn(pipe, monkeypatch, control=ask) for ask in ([one], [one, quiet], [one, loud]))
    assert torch.equal(alone, both)
    assert not close(other, alone, 1e-2)


def test_one_that_tells_the_middle_goes_with_one_that_does_not():
    one, other = (tuple(torch.full((1,), float(k)) for k in range(1, n)) for n in (3, 4))
    found = Residuals.sum([Residuals(levels=one), Residuals(levels=other), Residuals(one, one[0])])
    assert [x.item() for x in found.levels] == [2, 4, 3]
    assert [x.item() for x in found.down] == [1, 2]


def test_a_size_that_is_not_folded_evenly_is_stretched(systems):
    network = T2IAdapter(T2I_SDXL).eval()
    assert [tuple(level.shape[2:]) for level in network.see(torch.rand(1, 3, 40, 72))] == [(3, 5)] * 2 + [(2, 3)] * 2


# ------------------------------------------------------------------- files


def on_meta(make: Callable[[], torch.nn.Module]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return make().state_dict()


def test_real_sizes_have_the_names_and_shapes_of_diffusers():
    """Of its default configurations, which are the published ones."""
    rows = [
        (on_meta(lambda: T2IAdapter(T2I_SD1)), on_meta(diffusers.T2IAdapter)),
        (
            on_meta(lambda: T2IAdapter(T2I_SD1_LIGHT)),
            on_meta(
                lambda: diffusers.T2IAdapter(channels=[320, 640, 1280], num_res_blocks=4, adapter_type="light_adapter")
            ),
        ),
        (
            on_meta(lambda: T2IAdapter(T2I_SDXL)),
            on_meta(lambda: diffusers.T2IAdapter(downscale_factor=16, adapter_type="full_adapter_xl")),
        ),
        (
            on_meta(lambda: ControlNetUnion(SDXL)),
            on_meta(
                lambda: diffusers.ControlNetUnionModel(
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
                    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
                    addition_embed_type="text_time", addition_time_embed_dim=256,
                    projection_class_embeddings_input_dim=2816,
                )
            ),
        ),
    ]  # fmt: skip
    for ours, theirs in rows:
        wanted = {k.removeprefix("adapter."): tuple(v.shape) for k, v in theirs.items()}
        assert {k: tuple(v.shape) for k, v in ours.items()} == wanted


def test_t2i_adapters_of_the_authors_have_the_published_names(tmp_path):
    """As diffusers' script of conversion lists them."""
    full = {"conv_in", "body.2.in_conv", "body.4.in_conv", *(f"body.{k}.block{b}" for k in range(8) for b in (1, 2))}
    light = {f"body.{i}.{name}" for i in range(4) for name in ("in_conv", "out_conv")}
    light |= {f"body.{i}.body.{k}.block{b}" for i in range(4) for k in range(4) for b in (1, 2)}
    for config, names in ((T2I_SD1, full), (T2I_SD1_LIGHT, light)):
        ours = on_meta(lambda config=config: T2IAdapter(config))
        stored = {}
        for name in names:
            match name.split("."):
                case ["body", i, "body", k, block]:
                    name_here = f"body.{i}.resnets.{k}.{block}"
                case ["body", k, part] if config is T2I_SD1:
                    level, at = divmod(int(k), 2)
                    name_here = f"body.{level}.in_conv" if part == "in_conv" else f"body.{level}.resnets.{at}.{part}"
                case _:
                    name_here = name
            stored |= {f"{name}.{tensor}": ours[f"{name_here}.{tensor}"] for tensor in ("weight", "bias")}
        assert t2i_adapter.read(tmp_path, stored, SD1, 8).config == config


@pytest.mark.parametrize(("name", "config"), [("sd1", SD1), ("sdxl", SDXL)])
def test_inspect_says_whose_they_are(name, config, tmp_path):
    """At the published sizes, on the meta device, and as a small file on the command line."""
    net = on_meta(lambda: ControlNet(config))
    with torch.device("meta"):
        theirs = layouts.write(controlnet.ldm_layout(ControlNet(config)), net)
    rows = [net, {f"control_model.{k}": v for k, v in theirs.items()}]
    rows.append(on_meta(lambda: T2IAdapter(T2I_SD1 if name == "sd1" else T2I_SDXL)))
    rows += [on_meta(lambda: ControlNetUnion(config))]
    for tensors in rows:
        found, problem = control.bases(tmp_path / "x.safetensors", tensors)
        assert name in found, problem
        assert set(found) <= {name, "sd2"}  # whose T2I-Adapters are those of the first
        assert found == [name] or "conv_in.weight" in tensors
    del tensors["conv_in.weight"]
    assert control.bases(tmp_path / "x.safetensors", tensors)[0] == []


def test_inspect_of_a_file(systems, union, adapter, limner, here):
    done = limner("inspect", union[1])
    assert done.code == 0, done.err
    assert "ControlNet of several kinds (union)" in done.out
    assert "problem" in done.out  # it is of no published size
    told = exchange.inspect(adapter("full")[1])
    assert told["kind"] == "T2I-Adapter as diffusers writes it"
    assert len(told["hash"]) == 10
    net = stable_diffusion.noised(ControlNet(UNET_TINY), 1)
    written = layouts.write(controlnet.ldm_layout(net), net.state_dict())
    save_file({f"control_model.{k}": v for k, v in written.items()}, here / "ldm.safetensors")
    assert exchange.inspect(here / "ldm.safetensors")["kind"] == "ControlNet as its authors write it"


def test_a_wrong_base_is_refused_by_name_before_any_step(systems, adapter, tmp_path):
    with pytest.raises(
        CheckpointMismatch, match=r"xl5 is a T2I-Adapter of .*: it tells 64 at 1/4, .*, this model has 32"
    ):
        control.open_control(systems["sd1"][1].system, adapter("xl")[1], picture())
    with pytest.raises(CheckpointMismatch, match=r"full5 is a T2I-Adapter of Stable Diffusion 1 or 2"):
        control.open_control(systems["sdxl"][1].system, adapter("full")[1], picture())
    meta = on_meta(lambda: ControlNet(SDXL))
    with pytest.raises(CheckpointMismatch, match="is a ControlNet of Stable Diffusion XL, this is Stable Diffusion 1"):
        controlnet.read(tmp_path, meta, SD1, {})
    upscaler = pipeline.load(stable_diffusion.upscaler(tmp_path / "x4"))
    with pytest.raises(UsageError, match="x4-upscaler takes no ControlNets: it follows the picture that it enlarges"):
        upscaler.upscale(picture(side=8), "a fox", control=[(adapter("full")[1], picture())])
    with pytest.raises(UsageError, match="only ControlNets guess"):
        control.open_control(systems["sd1"][1].system, adapter("full")[1], picture(), guess=True)
    with pytest.raises(UsageError, match="knows one kind of picture: leave kind=depth out"):
        control.open_control(systems["sd1"][1].system, adapter("full")[1], picture(), kind="depth")


@pytest.fixture
def tiny() -> tuple[dict[str, torch.Tensor], ControlNet, dict[str, torch.Tensor], dict[str, str]]:
    """A U-Net's tensors, a ControlNet, its tensors in the authors' names, and our names for those."""
    own = stable_diffusion.noised(UNet(UNET_TINY), 1).state_dict()
    net = stable_diffusion.noised(ControlNet(UNET_TINY), 2)
    layout = controlnet.ldm_layout(net)  # type: ignore[arg-type]
    return own, net, layouts.write(layout, net.state_dict()), {p.name: ours for ours, p in layout.items()}  # type: ignore[return-value]


def test_models_that_are_told_more_take_the_same_controlnets(tiny, tmp_path):
    """Those for inpainting, and consistency models."""
    own, net, written, _ = tiny
    base = replace(UNET_TINY, in_channels=9, guidance_width=16)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, UNET_TINY.text_width)
    cond = Conditioning(text, guidance=torch.randn(1, 16))
    for tensors in (written, net.state_dict()):
        found = controlnet.read(tmp_path, tensors, base, own)
        seen = found.see(torch.rand(1, 3, 64, 64))
        assert torch.equal(found(x, t, cond, seen).mid, net(x, t, Conditioning(text), seen).mid)


def test_one_kept_as_differences_from_its_model_is_added_to_it(tiny, tmp_path):
    own, net, written, ours = tiny
    stored = {name: t - own[ours[name]] if ours[name] in own else t for name, t in written.items()}
    stored = {f"control_model.{name}": t for name, t in stored.items()} | {"difference": torch.zeros(0)}
    found = controlnet.read(tmp_path, stored, UNET_TINY, own).state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in net.state_dict().items())


def test_a_whole_model_beside_it_is_left_out_and_told(tiny, tmp_path):
    own, net, written, _ = tiny
    stored = {f"control_model.{name}": t for name, t in written.items()}
    stored |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(9)}
    with pytest.warns(Ignored, match="2 tensors beside the ControlNet are left out"):
        found = controlnet.read(tmp_path, stored, UNET_TINY, own).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_every_key_of_a_control_lora_is_accounted_for(tiny, tmp_path):
    own, _, written, ours = tiny
    stored = {name: t for name, t in written.items() if ours[name] not in own} | {"lora_controlnet": torch.zeros(0)}
    controlnet.read(tmp_path, stored, UNET_TINY, own)
    for more, said in (
        ({"middle_block.9.up": torch.zeros(4, 2)}, "1 of its keys are of no module"),
        ({"time_embed.0.up": torch.zeros(128, 2)}, "time_embed.0"),
        ({"time_embed.0.up": torch.zeros(9, 2), "time_embed.0.down": torch.zeros(2, 32)}, r"make no \(128, 32\)"),
        ({"spare": torch.zeros(1)}, "unknown"),
    ):
        with pytest.raises(CheckpointMismatch, match=said):
            controlnet.read(tmp_path, stored | more, UNET_TINY, own)
    attention = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.down"
    with pytest.raises(CheckpointMismatch, match="is a ControlNet of Stable Diffusion XL, this is"):
        controlnet.read(tmp_path, stored | {attention: torch.zeros(2, 2048)}, UNET_TINY, own)


def test_control_loras_have_the_names_that_diffusers_reads():
    from diffusers.utils import convert_sai_sd_control_lora_state_dict_to_peft

    with torch.device("meta"):
        network = ControlNet(SD1)
    hint = {name for name in network.state_dict() if name.startswith("controlnet")}
    stored = {}
    for ours, place in controlnet.ldm_layout(network).items():
        matrix = ours.endswith("weight") and network.state_dict()[ours].dim() > 1 and ours not in hint
        for name in [f"{place.name[:-7]}.up", f"{place.name[:-7]}.down"] if matrix else [place.name]:
            stored[name] = torch.tensor([float(len(stored))])
    theirs = convert_sai_sd_control_lora_state_dict_to_peft(dict(stored))
    spelled = {"lora_B.weight": "up", "lora_A.weight": "down"}
    back = {place.name: ours for ours, place in controlnet.ldm_layout(network).items()}
    for name, value in stored.items():
        module, _, last = name.rpartition(".")
        ours = back[f"{module}.weight"][:-7] if last in ("up", "down") else back[name]
        wanted = {k for k, v in theirs.items() if v is not None and torch.equal(v, value)}
        endings = {f"{ours}.{peft}" for peft, part in spelled.items() if part == last} or {ours}
        assert wanted & endings, (name, wanted)


def test_an_infotext_says_what_controlled_it():
    """In A1111's words, whose pictures ask for the file again."""
    text = (
        'fox\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, ControlNet 0: "Module: canny, Model: '
        "control_v11p_sd15_canny [d14c016b], Weight: 0.8, Resize Mode: Crop and Resize, Processor Res: 512, Guidance "
        'Start: 0.1, Guidance End: 0.9, Pixel Perfect: False, Control Mode: Balanced", Version: v1.10.0'
    )
    (told,) = metadata.from_infotext(text)["control"]
    assert told == {"name": "control_v11p_sd15_canny", "hash": "d14c016b", "weight": 0.8, "start": 0.1, "end": 0.9}
    with pytest.raises(UsageError, match="painted with the ControlNet 'control_v11p_sd15_canny'"):
        control.resolve([], [told])
    asked = control.resolve([control.parse("control_v11p_sd15_canny.pth=a.png,end=0.5"), {"file": "b"}], [told])
    assert [(one.get("weight"), one.get("start"), one.get("end")) for one in asked] == [(0.8, 0.1, 0.5), (None,) * 3]


def test_all_of_them_compute_in_half_precision(systems, union, adapter):
    told = {"seed": 3, "steps": 2, "guidance": 3.0}
    for kind, ask in (("sdxl", {"file": union[1], "kind": "depth"}), ("sd1", {"file": adapter("full")[1]})):
        half = pipeline.load(systems[kind][0], dtype="bf16")
        (found,), (whole,) = (
            pipe.generate("fox", **told, control=[{"image": picture(), **ask}]) for pipe in (half, systems[kind][1])
        )
        apart = np.abs(np.asarray(found.image, dtype=int) - np.asarray(whole.image, dtype=int))
        assert 0 < apart.mean() < 16


@pytest.mark.parametrize(
    "kind", ["t2i", "light", "lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("union", "ldm"))]
)
def test_tensors_of_other_shapes_are_refused_in_a_line(systems, union, adapter, tiny, kind):
    base, path = systems["sdxl" if kind == "union" else "sd1"][1].system.network.config, Path("file")
    own, _, written, ours = tiny
    tensors = {
        "union": lambda: load_file(union[1] / WEIGHTS),
        "t2i": lambda: original(adapter("full")[0], "full"),
        "light": lambda: original(adapter("light")[0], "light"),
        "ldm": lambda: written,
        "lora": lambda: {k: t for k, t in written.items() if ours[k] not in own}
        | {"lora_controlnet": torch.zeros(0), "time_embed.0.up": torch.zeros(128, 2),
           "time_embed.0.down": torch.zeros(2, 32)},
    }[kind]()  # fmt: skip
    base = UNET_TINY if kind in ("ldm", "lora") else base
    for name in [*sorted(tensors)[::9], *(n for n in tensors if n.startswith(("task", "conv_in", "time", "input_hi")))]:
        for shape in ((), (0,), (1, 0, 2), (7, 7, 7, 7)):
            if name == "lora_controlnet":
                continue
            damaged = tensors | {name: torch.zeros(shape)}
            with pytest.raises(CheckpointMismatch) as error:
                control._read(path, damaged, base, own, 2)
            assert "\n" not in str(error.value)
