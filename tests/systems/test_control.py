"""ControlNets: what they add is what diffusers' add, from any file, and nothing stays of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from limner import catalog, hints, metadata, pictures, pipeline
from limner.adapters import control
from limner.checkpoints import controlnet, layouts
from limner.errors import CheckpointMismatch, FileProblem, ImageProblem, UnknownName, UsageError
from limner.models.controlnet import ControlNet
from limner.models.unet import UNET_TINY, UNetConfig
from limner.types import Conditioning
from sweeps import sweep

from . import stable_diffusion

KINDS = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (32, 64),
        "layers_per_block": 1, "cross_attention_dim": 64,
    },
    "sd2_v": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (64, 128),
        "layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": (1, 2), "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "block_out_channels": (64, 128),
        "layers_per_block": 1, "attention_head_dim": (1, 2), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "cross_attention_dim": 64 + 128, "projection_class_embeddings_input_dim": 128 + 6 * 256,
    },
}  # fmt: skip


def theirs(kind: str, seed: int, **changes: Any) -> Any:
    """diffusers' network, whose picture is twice as large as its latents."""
    network = diffusers.ControlNetModel(**KINDS[kind], conditioning_embedding_out_channels=(16, 32), **changes)
    return stable_diffusion.noised(network, seed)


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def systems(tmp_path_factory) -> dict[str, Any]:
    diffusers.utils.logging.set_verbosity_error()
    folders = {kind: getattr(stable_diffusion, kind)(tmp_path_factory.mktemp(kind)) for kind in KINDS}
    return {kind: (folder, pipeline.load(folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[tuple[str, int], tuple[Any, Path]]:
    """Two of each kind, and the folder of each."""
    found = {}
    for kind in KINDS:
        for seed in (5, 6):
            folder = tmp_path_factory.mktemp(f"{kind}-control") / f"net{seed}"
            net = theirs(kind, seed)
            net.save_pretrained(folder)
            found[kind, seed] = net, folder
    return found


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_what_diffusers_adds(systems, nets, kind, dtype, near):
    (net, folder), (_, pipe) = nets[kind, 5], systems[kind]
    ours = control.open_control(pipe.system, folder, picture()).network
    ours, net = ours.to(dtype), net.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 4, 12, 20, generator=generator), torch.rand(2, 3, 24, 40, generator=generator)
    text = torch.randn(2, 7, KINDS[kind]["cross_attention_dim"], generator=generator)
    vector = torch.randn(2, 128, generator=generator)
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    x, hint, text, vector = (v.to(dtype) for v in (x, hint, text, vector))
    t = torch.tensor([3, 700])
    told = {"added_cond_kwargs": {"text_embeds": vector, "time_ids": sizes}} if kind == "sdxl" else {}
    down, mid = net(x, t, text, hint, return_dict=False, **told)
    cond = Conditioning(text, pooled=vector)
    if kind == "sdxl":
        from limner.models.unet import micro_conditioning

        cond = Conditioning(text, vector=micro_conditioning(vector, sizes))
    found = ours(x, t, cond, ours.see(hint))
    net.to(torch.float32), ours.to(torch.float32)
    assert len(found.down) == len(down)
    for a, b in zip([*found.down, found.mid], [*down, mid], strict=True):
        assert (a - b).abs().max() <= near * b.abs().max()


def drawn(pipe: Any, monkeypatch, **settings: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    decode = pipe.system.decode
    with monkeypatch.context() as patch:
        patch.setattr(pipe.system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])
        pipe.generate("a red fox", **{"seed": 3, "steps": 5, "guidance": 5.0, "sampler": "euler"} | settings)
    return seen[0]


def asked(nets: Any, kind: str, **changes: Any) -> list[dict[str, Any]]:
    return [{"file": nets[kind, 5][1], "image": picture(), "weight": 0.7, **changes}]


WAYS = {
    "plain": {},
    "for some of the steps": {"control_guidance_start": 0.2, "control_guidance_end": 0.65},
    "guessing": {"guess_mode": True},
    "two": {"two": True},
}


@pytest.mark.parametrize(("kind", "way"), sweep(KINDS, WAYS, fast=lambda kind, way: kind == "sd1" or way == "plain"))
def test_it_draws_what_diffusers_draws(systems, nets, kind, way, monkeypatch):
    folder, pipe = systems[kind]
    told = dict(WAYS[way])
    two = told.pop("two", False)
    which = [nets[kind, seed][0] for seed in ((5, 6) if two else (5,))]
    cls = (
        diffusers.StableDiffusionXLControlNetPipeline if kind == "sdxl" else diffusers.StableDiffusionControlNetPipeline
    )
    parts = diffusers.DiffusionPipeline.from_pretrained(folder).components
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(parts["scheduler"].config)
    extra = {} if kind == "sdxl" else {"requires_safety_checker": False}
    other = cls(**parts, controlnet=which if two else which[0], **extra)
    other.set_progress_bar_config(disable=True)
    images = [picture(0), picture(1)]
    wanted = other(
        "a red fox", image=images if two else images[0], num_inference_steps=5, guidance_scale=5.0, height=32,
        width=32, controlnet_conditioning_scale=[0.7, -0.4] if two else 0.7, output_type="latent",
        generator=torch.Generator().manual_seed(3), **told,
    ).images  # fmt: skip
    ask = asked(
        nets, kind, start=told.get("control_guidance_start", 0.0), end=told.get("control_guidance_end", 1.0),
        guess=told.get("guess_mode", False),
    )  # fmt: skip
    if two:
        ask.append({"file": nets[kind, 6][1], "image": picture(1), "weight": -0.4})
    found = drawn(pipe, monkeypatch, control=ask)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    without = drawn(pipe, monkeypatch)
    assert (found - without).abs().max() > 0.01 * wanted.abs().max()


def test_each_part_of_a_composed_prompt_is_told_the_same(systems, nets, monkeypatch):
    """AND asks the network part by part: a part of weight 1 alone must come out as without AND."""
    pipe = systems["sd1"][1]
    for guess in (False, True):
        ask = asked(nets, "sd1", guess=guess)
        one = drawn(pipe, monkeypatch, control=ask)
        seen: list[torch.Tensor] = []
        decode = pipe.system.decode
        with monkeypatch.context() as patch:
            patch.setattr(pipe.system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])  # noqa: B023
            pipe.generate("a red fox AND a red fox :0", seed=3, steps=5, guidance=5.0, sampler="euler", control=ask)
        assert (seen[0] - one).abs().max() <= 1e-3 * one.abs().max()


def test_a_fresh_one_changes_no_bit_and_nothing_stays(systems, nets, tmp_path, monkeypatch):
    pipe = systems["sd1"][1]
    config = pipe.system.network.config
    torch.manual_seed(0)
    fresh = ControlNet(config, (16, 32))
    save_file(fresh.state_dict(), tmp_path / "fresh.safetensors")
    before = drawn(pipe, monkeypatch)
    assert torch.equal(drawn(pipe, monkeypatch, control=[(tmp_path / "fresh.safetensors", picture())]), before)
    assert not torch.equal(drawn(pipe, monkeypatch, control=asked(nets, "sd1")), before)
    assert torch.equal(drawn(pipe, monkeypatch), before)


@pytest.fixture
def tiny() -> tuple[UNetConfig, dict[str, torch.Tensor], ControlNet]:
    """A configuration, the U-Net's tensors, and a ControlNet."""
    from limner.models.unet import UNet

    own = stable_diffusion.noised(UNet(UNET_TINY), 1).state_dict()
    return UNET_TINY, own, stable_diffusion.noised(ControlNet(UNET_TINY), 2)  # type: ignore[return-value]


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_file_of_the_authors_is_read(tiny, prefix, tmp_path):
    config, own, net = tiny
    written = layouts.write(controlnet.ldm_layout(net), net.state_dict())
    assert {
        "input_hint_block.14.weight",
        "zero_convs.2.0.bias",
        "middle_block_out.0.weight",
        "time_embed.2.bias",
    } <= written.keys()
    found = controlnet.read(tmp_path, {f"{prefix}{k}": v for k, v in written.items()}, config, own)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in net.state_dict().items())


def test_a_control_lora_is_what_it_adds_to_the_unet(tiny, tmp_path):
    """Weights of two axes and more as products of rank 2, the rest of the U-Net's as it is, or left out."""
    config, own, net = tiny
    written = layouts.write(controlnet.ldm_layout(net), net.state_dict())
    back = {place.name: ours for ours, place in controlnet.ldm_layout(net).items()}
    generator = torch.Generator().manual_seed(0)
    stored = {"lora_controlnet": torch.tensor([])}
    wanted = {}
    for name, tensor in written.items():
        base = own.get(back[name])
        if base is None or name.startswith("input_hint_block"):
            stored[name] = wanted[name] = tensor
        elif tensor.dim() > 1:
            up = torch.randn(len(tensor), 2, generator=generator)
            down = torch.randn(2, *tensor.shape[1:], generator=generator)
            stored[name.replace(".weight", ".up")], stored[name.replace(".weight", ".down")] = up, down
            wanted[name] = base + (up @ down.flatten(1)).view(base.shape)
        else:
            wanted[name] = base  # left out
    found = controlnet.read(tmp_path, stored, config, own).state_dict()
    for name, tensor in wanted.items():
        assert torch.allclose(found[back[name]], tensor, atol=1e-5), name


def test_real_sizes_have_the_published_names_and_shapes():
    """Against the configuration that diffusers builds by default, Stable Diffusion 1's."""
    with torch.device("meta"):
        wanted = diffusers.ControlNetModel(cross_attention_dim=768).state_dict()
        ours = ControlNet(catalog.entry("sd1").config.network).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in wanted.items()}


def test_what_does_not_fit_is_refused_before_any_step(systems, nets, tmp_path, tiny_model):
    system = systems["sd1"][1].system
    tensors = load_file(nets["sdxl", 5][1] / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "xl.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"xl.safetensors is a ControlNet of a model of words 192 wide, this is"
    ):
        control.open_control(system, tmp_path / "xl.safetensors", picture())
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"a.safetensors is no ControlNet or T2I-Adapter: none .* \(first: a\)"
    ):
        control.open_control(system, tmp_path / "a.safetensors", picture())
    whole = load_file(nets["sd1", 5][1] / "diffusion_pytorch_model.safetensors")
    save_file({k: v for k, v in whole.items() if k != "controlnet_mid_block.bias"}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"controlnet_mid_block\.bias"):
        control.open_control(system, tmp_path / "part.safetensors", picture())
    with pytest.raises(FileProblem, match=r"no file 'none\.safetensors'"):
        control.open_control(system, "none.safetensors", picture())
    with pytest.raises(ImageProblem):
        control.open_control(system, nets["sd1", 5][1], tmp_path / "none.png")
    for weight in (True, float("nan"), 101, "1"):
        with pytest.raises(UsageError, match="weight of net5"):
            control.open_control(system, nets["sd1", 5][1], picture(), weight)
    for start, end in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(UsageError, match="rising numbers"):
            control.open_control(system, nets["sd1", 5][1], picture(), start=start, end=end)
    with pytest.raises(UsageError, match="where no step of 2 is"):
        systems["sd1"][1].generate("a", steps=2, control=asked(nets, "sd1", start=0.6, end=0.9))
    with pytest.raises(CheckpointMismatch, match="is no ControlNet of icons, which this is"):
        pipeline.load(tiny_model).generate("a", control=asked(nets, "sd1"))
    with pytest.raises(UsageError, match="control is 3"):
        systems["sd1"][1].generate("a", control=[3])


def test_what_is_asked_for_in_a_line(tmp_path, here):
    (here / "a,b:1.png").touch()
    assert control.parse("net=edges.png") == {"file": "net", "image": "edges.png"}
    assert control.parse("net=a/edges.png:0.8,canny,start=0.1,end=0.7,guess") == {
        "file": "net", "image": "a/edges.png", "weight": 0.8, "maker": "canny", "start": 0.1, "end": 0.7, "guess": True,
    }  # fmt: skip
    assert control.parse("net=a,b:1.png") == {"file": "net", "image": "a,b:1.png"}
    assert control.parse("net=b.png,canny") == {"file": "net", "image": "b.png", "maker": "canny"}
    for text in ("net", "=a.png", "net="):
        with pytest.raises(UsageError, match="is no FILE=IMAGE"):
            control.parse(text)
    with pytest.raises(UsageError, match="'x' is no number"):
        control.parse("net=a.png:x")
    with pytest.raises(UnknownName, match="cany"):
        control.parse("net=a.png:1,cany")


def test_on_the_command_line_and_in_what_a_picture_remembers(limner, here, systems, nets):
    folder, net = systems["sd1"][0], nets["sd1", 5][1]
    picture().save(here / "in.png")
    ask = f"{net}=in.png:0.7,canny,end=0.9"
    done = limner("generate", "a red fox", "-m", folder, "--steps", 4, "--control", ask, "-o", "out.png", "-s", 1)
    assert (done.code, done.out) == (0, "out.png\n"), done.err
    settings = metadata.read_settings(Path("out.png"))
    assert [{k: v for k, v in one.items() if "hash" not in k} for one in settings["control"]] == [
        {"name": "net5", "weight": 0.7, "end": 0.9, "maker": "canny"}
    ]
    assert "ControlNet 0" in Image.open("out.png").text["parameters"]
    again = limner("generate", "-C", "out.png", "-m", folder, "-o", "again.png")
    assert again.code == 2
    assert "painted with the ControlNet 'net5'" in again.err
    for ask_again in (ask, f"{net}=in.png"):  # the rest is remembered
        again = limner("generate", "-C", "out.png", "-m", folder, "-o", "again.png", "--control", ask_again)
        assert again.code == 0, again.err
        assert "limner: net5: ControlNet by 0.7, told canny of a picture, from 0 to 0.9 of the steps\n" in again.err
        assert "expect another picture" not in again.err
        assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
        Path("again.png").unlink()
    picture(1).save(here / "other.png")
    again = limner("generate", "-C", "out.png", "-m", folder, "-o", "x.png", "--control", f"{net}=other.png:0,guess")
    assert again.code == 0, again.err
    assert "the picture of net5 is not the one painted with" in again.err
    assert "net5 has weight 0, and tells nothing" in again.err
    assert metadata.read_settings(Path("x.png"))["control"][0]["guess"] is True
    Image.new("RGB", (64, 32)).save(here / "wide.png")
    cut = limner("generate", "a fox", "-m", folder, "--control", f"{net}=wide.png", "--dry-run")
    assert "50% of net5's picture's width is cut off" in cut.err
    refused = limner("generate", "a fox", "-m", folder, "--control", f"{net}=wide.png", "--dry-run", "--strict")
    assert refused.code == 2
    plain = limner("generate", "a red fox", "-m", folder, "--steps", 4, "-o", "plain.png", "-s", 1)
    assert plain.code == 0
    assert np.any(np.asarray(Image.open("plain.png")) != np.asarray(Image.open("out.png")))
    edited = limner("edit", "in.png", "a red fox", "-m", folder, "--steps", 4, "--control", ask, "--dry-run")
    assert edited.code == 0, edited.err
    assert "net5" in edited.out


def test_one_that_tells_of_the_whole_picture_and_one_of_colours_the_other_way(systems, nets, tmp_path):
    """Of what a folder's configuration says: shuffle's pooling, and blue first."""
    import json
    import shutil

    system, (net, folder) = systems["sd1"][1].system, nets["sd1", 5]
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(1, 4, 8, 8, generator=generator), torch.rand(1, 3, 16, 16, generator=generator)
    text, t = torch.randn(1, 7, 64, generator=generator), torch.tensor([500])
    down, mid = net(x, t, text, hint, return_dict=False)
    for told in ({"global_pool_conditions": True}, {"controlnet_conditioning_channel_order": "bgr"}):
        other = tmp_path / next(iter(told))
        shutil.copytree(folder, other)
        path = other / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
        one = control.open_control(system, other, picture())
        seen = hint.flip(1) if "bgr" in told.values() else hint
        found = one.network(x, t, Conditioning(text), one.network.see(seen))
        assert one.guess == ("global_pool_conditions" in told)
        for a, b in zip([*found.down, found.mid], [*down, mid], strict=True):
            b = b.mean(dim=(2, 3), keepdim=True) if one.guess else b
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
            assert a.shape == b.shape


def test_a_maker_makes_what_the_network_sees_in_the_size_that_is_drawn(systems, nets, here, monkeypatch):
    """depth takes a model that is not here."""
    pipe, photo = systems["sd1"][1], picture(side=100)
    edges = hints.make("canny", pictures.fit(photo, 32, 32))
    photo.save(here / "in.png")
    made = drawn(pipe, monkeypatch, control=f"{nets['sd1', 5][1]}=in.png:0.7,canny")
    given, plain = (drawn(pipe, monkeypatch, control=[(nets["sd1", 5][1], im, 0.7)]) for im in (edges, photo))
    assert torch.equal(made, given)
    assert not torch.equal(made, plain)
    larger = pipe.generate("a fox", seed=1, steps=2, hires=2, control=f"{nets['sd1', 5][1]}=in.png:0.7,canny")
    assert larger[0].image.size == (64, 64)
    with pytest.raises(UsageError, match="depth is found"):
        control.open_control(systems["sd1"][1].system, **control.parse(f"{nets['sd1', 5][1]}=in.png,depth"))
