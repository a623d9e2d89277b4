"""ControlNets on FLUX.1 and Stable Diffusion 3: what diffusers draws with them, from any file, and nothing stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner import catalog, exchange, memory, metadata, pipeline
from limner.adapters import control
from limner.checkpoints import flux, layouts, mmdit
from limner.errors import Assumed, CheckpointMismatch, UnknownName, UsageError
from limner.models import flux_controlnet, mmdit_controlnet
from limner.models.flux import Flux, Residuals, spread
from limner.models.flux_controlnet import FluxControlNet
from limner.models.mmdit import MMDiT
from limner.models.mmdit_controlnet import MMDiTControlNet

from . import flow_models
from .stable_diffusion import noised
from .test_control import picture
from .test_graphs import Told

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = 2
SMALL: dict[str, Any] = {"width": 32, "height": 32}
GUIDANCE = {"flux": 5.0, "schnell": 1.0, "sd3": 5.0}


def flux_net(
    seed: int, guided: bool = True, depths: tuple[int, int] = (1, 2), pixels: bool = False, **more: Any
) -> Any:
    net = diffusers.FluxControlNetModel(
        patch_size=2 if pixels else 1, in_channels=64, num_layers=depths[0], num_single_layers=depths[1],
        attention_head_dim=128, num_attention_heads=2, joint_attention_dim=flow_models.T5_WIDTH,
        pooled_projection_dim=flow_models.CLIP_WIDTH, guidance_embeds=guided,
        conditioning_embedding_channels=16 if pixels else None, **more,
    )  # fmt: skip
    if pixels:  # for an autoencoder of two pixels a latent
        net.input_hint_block = ControlNetConditioningEmbedding(16, block_out_channels=(16, 16))
    return noised(net, seed)


def sd3_net(seed: int, depth: int = 2, **changes: Any) -> Any:
    values = {
        "sample_size": 16, "patch_size": 2, "in_channels": 16, "num_layers": depth, "attention_head_dim": 64,
        "num_attention_heads": 2, "joint_attention_dim": flow_models.T5_WIDTH, "caption_projection_dim": 128,
        "pooled_projection_dim": flow_models.CLIP_WIDTH + flow_models.BIG_WIDTH, "out_channels": 16,
        "pos_embed_max_size": 32,
    }  # fmt: skip
    return noised(diffusers.SD3ControlNetModel(**values | changes), seed)


LARGE = {  # Stability's for 3.5 large
    "joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None, "pos_embed_max_size": None,
    "force_zeros_for_pooled_projection": False,
}  # fmt: skip
NETS = {
    "flux": lambda: flux_net(5),
    "flux, too": lambda: flux_net(6),
    "union": lambda: flux_net(7, guided=False, num_mode=10),
    "xlabs": lambda: flux_net(8, guided=False, depths=(2, 0), pixels=True),
    "sd3": lambda: sd3_net(5),
    "sd3, too": lambda: sd3_net(6),
    "told the prompt": lambda: sd3_net(7, depth=3, force_zeros_for_pooled_projection=False),
    "large": lambda: sd3_net(8, **LARGE),
}


@pytest.fixture(scope="module")
def systems(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    diffusers.utils.logging.set_verbosity_error()
    make = tmp_path_factory.mktemp
    folders = {
        "flux": flow_models.flux(make("flux")),
        "schnell": flow_models.flux(make("schnell"), guided=False),
        "sd3": flow_models.sd3(make("sd3"), num_layers=4),
    }
    return {name: (folder, pipeline.load(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Each of NETS, and its folder."""
    made = {}
    for name, make in NETS.items():
        net, folder = make(), tmp_path_factory.mktemp("nets") / name.replace(",", "").replace(" ", "-")
        net.save_pretrained(folder)
        made[name] = net, folder
    return made


TIMES = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
WAYS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "flux, two": ("flux", ["flux", "flux, too"], TIMES),
    "union of gray": ("flux", ["union"], {"control_mode": 5}),
    "union on schnell": ("schnell", ["union"], {"control_mode": 0}),
    "xlabs": ("schnell", ["xlabs"], {}),
    "sd3, two": ("sd3", ["sd3", "sd3, too"], TIMES),
    "sd3, told the prompt": ("sd3", ["told the prompt"], {}),
    "sd3, large": ("sd3", ["large"], {}),
}


@pytest.fixture(scope="module")
def parts(systems) -> dict[str, dict[str, Any]]:
    """Of each system, as diffusers has them."""
    pipes = {"sd3": diffusers.StableDiffusion3Pipeline}
    rows = {
        name: pipes.get(name, diffusers.FluxPipeline).from_pretrained(folder) for name, (folder, _) in systems.items()
    }
    return {name: pipe.components for name, pipe in rows.items()}


def theirs(base: str, parts: dict[str, Any], which: list[Any], images: list[Any], weights: list[float], **told: Any):
    """Latents (1, c, h, w) of diffusers, and the picture."""
    cls = diffusers.StableDiffusion3ControlNetPipeline if base == "sd3" else diffusers.FluxControlNetPipeline
    one = len(which) == 1
    pipe = cls(**parts, controlnet=which[0] if one else which)
    pipe.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    images = pipe(
        "a red fox", control_image=images[0] if one else images, num_inference_steps=STEPS, height=32, width=32,
        guidance_scale=GUIDANCE[base], controlnet_conditioning_scale=weights[0] if one else weights, output_type="np",
        generator=torch.Generator().manual_seed(3), max_sequence_length=512 if base == "flux" else 256, **told,
    ).images  # fmt: skip
    hook.remove()
    vae = pipe.vae.config
    return (seen[0] - vae.shift_factor) * vae.scaling_factor, images[0]


def ours(pipe: Any, ask: Any = (), **settings: Any) -> tuple[Tensor, Image.Image]:
    """Latents and the picture of a system."""
    seen: list[Tensor] = []
    hook = pipe.system.autoencoder.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    guidance = GUIDANCE["schnell" if pipe.system.name == "flux-schnell" else "flux"]
    told = {"seed": 3, "steps": STEPS, "guidance": guidance, "sampler": "euler", **SMALL} | settings
    image = pipe.generate("a red fox", control=ask, **told)[0].image
    hook.remove()
    return pipe.system.autoencoder.to_latents(seen[0]), image


@pytest.fixture(scope="module")
def plain(systems) -> dict[str, Tensor]:
    """Latents without a control."""
    return {name: ours(pipe)[0] for name, (_, pipe) in systems.items()}


@pytest.mark.parametrize("way", WAYS)
def test_it_draws_what_diffusers_draws(systems, parts, nets, plain, way, monkeypatch):
    """Of the picture diffusers takes a random latent near the one that is taken here: the middle is that one."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    base, names, told = WAYS[way]
    images, weights = [picture(0), picture(1)][: len(names)], [0.7, -0.4][: len(names)]
    wanted, pixels = theirs(base, parts[base], [nets[name][0] for name in names], images, weights, **told)
    kinds = {number: kind for kind, number in flux_controlnet.KINDS.items()}
    starts, ends = ([*told.get(f"control_guidance_{name}", [which])] for name, which in (("start", 0.0), ("end", 1.0)))
    rows = zip(names, images, weights, starts, ends, strict=True)
    ask = [
        {"file": nets[name][1], "image": image, "weight": weight, "start": start, "end": end,
         "kind": kinds.get(told.get("control_mode"), "")}
        for name, image, weight, start, end in rows
    ]  # fmt: skip
    found, image = ours(systems[base][1], ask)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    apart = np.abs(np.asarray(image)[..., :3].astype(int) - (255 * pixels).round().astype(int))
    assert (apart <= 1).mean() >= 0.999
    assert (found - plain[base]).abs().max() > 0.01 * wanted.abs().max()


def test_a_union_is_told_which_kind_it_sees(systems, nets):
    pipe, file = systems["schnell"][1], nets["union"][1]
    gray, pose, other = (
        ours(pipe, [{"file": file, "image": picture(), "kind": kind}])[0] for kind in ("gray", "pose", "gray")
    )
    assert torch.equal(gray, other)
    assert (gray - pose).abs().max() > 1e-3 * gray.abs().max()
    assert control.open_control(pipe.system, file, picture(), maker="blur").kind == "blur"
    for told in ({}, {"maker": "sobel"}):
        with pytest.raises(UsageError, match="knows several kinds of pictures: say which, kind=canny or tile or"):
            control.open_control(pipe.system, file, picture(), **told)
    with pytest.raises(UnknownName, match="kind of picture 'mlsd'"):
        control.open_control(pipe.system, file, picture(), kind="mlsd")
    with pytest.raises(UsageError, match="flux knows one kind of picture: leave kind=pose out"):
        control.open_control(systems["flux"][1].system, nets["flux"][1], picture(), kind="pose")


def fresh(system: Any) -> Any:
    torch.manual_seed(0)
    if isinstance(system.network, Flux):
        net: Any = FluxControlNet(replace(system.network.config, depth=1, depth_single=1))
        return layouts.write(flux.controlnet_layout(net.config), net.state_dict())
    size = replace(system.network.config, depth=1)
    net = MMDiTControlNet(mmdit_controlnet.MMDiTControlNetConfig(size=size, hint_channels=16))
    return layouts.write(mmdit.control_layout(net.control), net.state_dict())


@pytest.mark.parametrize(("base", "name"), [("schnell", "xlabs"), ("sd3", "sd3")])
@pytest.mark.filterwarnings("ignore::limner.errors.Assumed")
def test_a_fresh_one_changes_no_bit_and_nothing_stays(systems, nets, plain, base, name, tmp_path):
    pipe = systems[base][1]
    save_file(fresh(pipe.system), tmp_path / "fresh.safetensors")
    assert torch.equal(ours(pipe, [(tmp_path / "fresh.safetensors", picture())])[0], plain[base])
    assert not torch.equal(ours(pipe, [(nets[name][1], picture())])[0], plain[base])
    assert torch.equal(ours(pipe)[0], plain[base])


# ------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["flux", "union", "xlabs", "sd3", "large"])
@pytest.mark.filterwarnings("ignore::limner.errors.Assumed")
def test_every_spelling_of_a_file_is_the_same_network(systems, nets, name, tmp_path):
    system = systems["flux" if name in ("flux", "union", "xlabs") else "sd3"][1].system
    told = {"kind": "depth"} if name == "union" else {}
    wanted = control.open_control(system, nets[name][1], picture(), **told).network
    spellings = {"diffusers": load_file(nets[name][1] / WEIGHTS)}
    if name == "xlabs":
        layout = flux.xlabs_layout(wanted.config, (16, 16))
        spellings["XLabs"] = layouts.write(layout, wanted.state_dict())
        assert {"pos_embed_input.weight", "input_hint_block.6.bias", "input_hint_block.4.weight"} <= layouts.names(
            layout
        )
    if name == "large":
        layout = mmdit.stability_control_layout(wanted.control)
        spellings["Stability"] = layouts.write(layout, wanted.state_dict())
    for spelling, tensors in spellings.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{spelling}.safetensors")
        found = control.open_control(system, tmp_path / f"{spelling}.safetensors", picture(), **told).network
        assert found.state_dict().keys() == wanted.state_dict().keys()
        assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.state_dict().items())
        assert (found.sees, getattr(found, "kinds", {})) == (wanted.sees, getattr(wanted, "kinds", {}))


def test_what_no_tensor_tells_is_said_or_told_by_the_folder(systems, nets, tmp_path):
    system = systems["sd3"][1].system
    with pytest.warns(Assumed, match="is taken for one like InstantX's"):
        assumed = control.open_control(system, nets["told the prompt"][1] / WEIGHTS, picture()).network
    told = control.open_control(system, nets["told the prompt"][1], picture()).network
    assert (assumed.sees, told.sees) == ("scaled", "latents")
    (tmp_path / "config.json").write_text(json.dumps({"force_zeros_for_pooled_projection": "no"}))
    save_file(load_file(nets["sd3"][1] / WEIGHTS), tmp_path / WEIGHTS)
    with pytest.raises(CheckpointMismatch, match="force_zeros_for_pooled_projection is 'no', not true or false"):
        control.open_control(system, tmp_path, picture())


@pytest.mark.filterwarnings("ignore::limner.errors.Assumed")
def test_one_for_another_model_is_refused_before_any_step(systems, nets, tmp_path):
    def refused(base: str, tensors: Any, match: str) -> None:
        path = tmp_path / "net.safetensors"
        if not isinstance(tensors, Path):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(CheckpointMismatch, match=match):
            control.open_control(systems[base][1].system, tensors if isinstance(tensors, Path) else path, picture())

    of_flux, of_sd3 = (load_file(nets[name][1] / WEIGHTS) for name in ("flux", "sd3"))
    refused("flux", nets["sd3"][1], r"sd3 is a ControlNet of Stable Diffusion 3, this is FLUX\.1: take one made for it")
    refused("sd3", nets["flux"][1], r"flux is a ControlNet of FLUX\.1, this is Stable Diffusion 3")
    hint = {"controlnet_cond_embedding.conv_in.weight": torch.zeros(16, 3, 3, 3)}
    words = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(640, 2048)}
    refused("flux", hint | words, r"is a ControlNet of Stable Diffusion XL, this is FLUX\.1")
    refused(
        "sd3", {"input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)}, "is a ControlNet of a U-Net, this is Stable"
    )
    refused("sd3", {"adapter.body.0.resnets.0.block1.weight": torch.zeros(1)}, "is a T2I-Adapter of a U-Net")
    refused("flux", {"a": torch.zeros(2)}, r"is no ControlNet: none of its 1 tensors is one's \(first: a\)")
    refused("schnell", nets["flux"][1], "that is told the scale of guidance, such as dev, which this one is not")
    wide = noised(diffusers.FluxControlNetModel(**dict(nets["flux"][0].config) | {"joint_attention_dim": 64}), 1)
    refused("flux", wide.state_dict(), r"a ControlNet of another FLUX\.1 than this: width of words 64, here 256")
    refused("sd3", sd3_net(1, num_attention_heads=1, caption_projection_dim=64).state_dict(), "width 64, here 128")
    refused("sd3", sd3_net(1, extra_conditioning_channels=1).state_dict(), "is a ControlNet for inpainting")
    masked = of_flux | {"controlnet_x_embedder.weight": torch.zeros(256, 68)}
    refused("flux", masked, "is a ControlNet for inpainting, which sees a mask too")
    refused(
        "flux", {k: v for k, v in of_flux.items() if k != "context_embedder.bias"}, r"missing .*context_embedder\.bias"
    )
    refused("sd3", of_sd3 | {"more": torch.zeros(1)}, r"read as a ControlNet of Stable Diffusion 3: 1 unknown .*more")
    lost = {k: v for k, v in of_sd3.items() if k != "time_text_embed.text_embedder.linear_1.weight"}
    refused("sd3", lost, "is like a ControlNet of Stable Diffusion 3, but not whole: no 'time_text_embed")
    eight = flux_net(1, pixels=True)
    eight.input_hint_block = ControlNetConditioningEmbedding(16, block_out_channels=(16,) * 4)
    refused("flux", eight.state_dict(), "pixels a latent 8, here 2")
    for name in ("flux", "xlabs"):
        with pytest.raises(CheckpointMismatch, match=r"no whole model .*: it is ControlNet of FLUX\.1"):
            pipeline.load(nets[name][1] / WEIGHTS)


@pytest.mark.filterwarnings("ignore::limner.errors.Assumed")
def test_what_cannot_be_done_is_refused(systems, nets):
    pipe, sd3 = systems["flux"][1], systems["sd3"][1]
    with pytest.raises(UsageError, match=r"flux is a ControlNet of FLUX\.1, and only those of U-Nets guess"):
        control.open_control(pipe.system, nets["flux"][1], picture(), guess=True)
    one = control.open_control(sd3.system, nets["sd3"][1], picture())
    one.network.largest = 4
    with pytest.raises(UsageError, match="sd3 has positions for 16 pixels a side: draw less, or in tiles"):
        sd3.generate("a fox", steps=2, control=[one], **SMALL)
    one.network.largest = 32


def test_inspect_names_them_and_their_models(nets, tmp_path):
    told = exchange.inspect(nets["union"][1] / WEIGHTS)
    assert told["kind"] == "ControlNet of FLUX.1 for several kinds (union)"
    assert told["base"] == []  # it is too small
    assert "width 256, here 3072" in told["problem"]
    kinds = {"flux": "FLUX.1", "xlabs": "FLUX.1", "sd3": "Stable Diffusion 3", "large": "Stable Diffusion 3"}
    for name, whose in kinds.items():
        assert exchange.inspect(nets[name][1] / WEIGHTS)["kind"] == f"ControlNet of {whose}"

    with torch.device("meta"):
        guided = FluxControlNet(replace(config_of("flux-dev"), depth=5, depth_single=10), 10)
        plain = FluxControlNet(replace(config_of("flux-schnell"), depth=2, depth_single=0), 0, (16,) * 4)
        large, medium = (
            MMDiTControlNet(config)
            for config in (mmdit_controlnet.SD35_LARGE_CONTROLNET, mmdit_controlnet.SD3_CONTROLNET)
        )
    dev = {"flux-dev", "flux-fill", "flux-control", "flux-kontext"}
    rows = [
        (flux.controlnet_layout(guided.config, 10), guided, dev),
        (flux.xlabs_layout(plain.config, (16,) * 4), plain, dev | {"flux-schnell"}),
        (mmdit.stability_control_layout(large.control), large, {"sd3.5-large"}),
        (mmdit.control_layout(medium.control), medium, {"sd3-medium", "sd3.5-medium"}),
    ]
    for layout, net, wanted in rows:
        found, problem = control.bases(tmp_path, layouts.write(layout, net.state_dict()))
        assert (set(found), problem) == (wanted, "")


def config_of(name: str) -> Any:
    return catalog.entry(name).config.network


# ------------------------------------------------------------------- drawing


def test_what_is_added_after_few_blocks_is_spread_over_all():
    made = [torch.tensor(float(n)) for n in range(3)]
    assert [int(one) for one in spread(made[:2], 5, cycled=True)] == [0, 1, 0, 1, 0]
    assert spread((), 5, cycled=True) == []
    with torch.device("meta"):
        base = Flux(replace(catalog.entry("flux-dev").config.network, width=128, num_heads=1, depth=4, depth_single=2))
        medium = MMDiT(replace(catalog.entry("sd3-medium").config.network, num_heads=1, depth=4))
    turns, spreads = Residuals(made[:2], cycled=True), Residuals(made[:2], made[:1])
    assert base.together([turns]) == Residuals(tuple(made[:2]), (), cycled=True)
    assert base.together([turns, turns]) == Residuals((0, 2), (), cycled=True)
    both = base.together([turns, spreads])
    assert ([int(n) for n in both.double], [int(n) for n in both.single]) == ([0, 1, 1, 2], [0, 0])
    assert not both.cycled
    assert [int(n) for n in medium.together([made[:2], made[1:]])] == [1, 3]
    assert [int(n) for n in medium.together([made[:2], made[1:2]])] == [1, 1, 2, 2]


def test_in_tiles_each_sees_its_place_of_one_encoding(systems, nets, monkeypatch):
    pipe = systems["schnell"][1]
    for name in ("union", "xlabs"):
        told = {"kind": "gray"} if name == "union" else {}
        one = control.open_control(pipe.system, nets[name][1], picture(0, 96).resize((96, 32)), **told)
        seen, encoded = [], []
        see, encode = one.network.see, pipe.system.encode
        with monkeypatch.context() as patch:
            patch.setattr(one.network, "see", lambda hint, kind: (seen.append(hint), see(hint, kind))[1])  # noqa: B023
            patch.setattr(pipe.system, "encode", lambda *told: (encoded.append(told), encode(*told))[1])  # noqa: B023
            pipe.generate("a fox", steps=1, guidance=1.0, width=96, height=32, tile=64, control=[one])
        whole = pipe.system.shown(one, pipeline.prepare(pipe.system, prompt="a", width=96, height=32))
        unit = 1 if name == "union" else 2
        assert len(seen) > 1
        assert len(encoded) == (name == "union")
        assert torch.equal(seen[0], whole[..., : 32 * unit])
        assert torch.equal(seen[-1], whole[..., -32 * unit :])


@pytest.mark.parametrize("name", ["xlabs", "large"])
def test_replays_of_what_was_recorded_change_no_bit(systems, nets, name, monkeypatch):
    pipe = systems["schnell" if name == "xlabs" else "sd3"][1]
    ask = [(nets[name][1], picture(), 0.7)]
    wanted = ours(pipe, ask)[0]
    monkeypatch.setattr(pipe.system, "graphs", Told())
    assert torch.equal(ours(pipe, ask)[0], wanted)
    assert [one.graph.times for one in pipe.system.graphs.made] == [STEPS - 1] * 2


def test_the_autoencoder_is_there_to_see_the_picture_and_rests_while_steps_are_drawn(systems, nets, monkeypatch):
    """The device is a processor of another name, as in test_memory."""
    pipe = systems["sd3"][1]
    ask = [(nets["sd3"][1], picture(), 0.7)]
    wanted = ours(pipe, ask)[0]
    parts = {name: next(getattr(pipe.system, name).parameters()) for name in ("network", "autoencoder")}
    resting = {name: weight.data_ptr() for name, weight in parts.items()}
    seen: list[set[str]] = []

    def there(*_: Any) -> None:
        seen.append({name for name, weight in parts.items() if weight.data_ptr() != resting[name]})

    hooks = [m.register_forward_pre_hook(there) for m in (pipe.system.autoencoder.encoder, pipe.system.network)]
    monkeypatch.setattr(pipe.system, "works_on", torch.device("cpu:0"))
    found = ours(pipe, ask)[0]
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, wanted)
    assert seen == [{"autoencoder"}] + [{"network"}] * STEPS
    assert {name: weight.data_ptr() for name, weight in parts.items()} == resting


def test_a_plan_tells_of_the_picture_that_is_encoded(systems, nets):
    system = systems["flux"][1].system
    ask = [(nets["flux"][1], picture(), 0.7), (nets["xlabs"][1], picture())]
    request = pipeline.prepare(system, prompt="a fox", control=control.opened(system, ask), **SMALL)
    plan = memory.plan(system, request, 1)
    assert [stage.name for stage in plan.stages] == ["the words", "the pictures of controls", "a step", "the decoding"]
    assert plan.stages[2].parts == ("network", "control 1", "control 2")
    assert not any(parameter.is_meta for one in request.control for parameter in one.network.parameters())


def test_on_the_command_line_and_in_what_a_picture_remembers(limner, here, systems, nets):
    folder, net = systems["schnell"][0], nets["union"][1]
    picture().save(here / "in.png")
    ask = f"{net}=in.png:0.7,canny,end=0.5"
    done = limner(
        "generate", "a red fox", "-m", folder, "-W", 32, "-H", 32, "--steps", 2, "--control", ask, "-o", "out.png"
    )
    assert (done.code, done.out) == (0, "out.png\n"), done.err
    settings = metadata.read_settings(Path("out.png"))
    assert [{k: v for k, v in one.items() if "hash" not in k} for one in settings["control"]] == [
        {"name": "union", "weight": 0.7, "end": 0.5, "maker": "canny", "kind": "canny"}
    ]
    again = limner("generate", "-C", "out.png", "-m", folder, "-o", "again.png", "--control", f"{net}=in.png")
    assert again.code == 0, again.err
    assert "union: ControlNet (union) by 0.7, told canny of a picture, from 0 to 0.5 of the steps\n" in again.err
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("out.png")))
