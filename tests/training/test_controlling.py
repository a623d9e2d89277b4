"""Control networks in training: what they learn by is what is drawn with them, and the file is what others read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy import StopAt

from limner import catalog, recipes
from limner.adapters.control import open_control
from limner.checkpoints import joint_dit_controlnet
from limner.errors import CheckpointMismatch, UsageError
from limner.models.joint_dit import JOINT_DIT_ICONS
from limner.models.joint_dit_controlnet import JOINT_DIT_ICONS_CONTROLNET, JointDiTControlNet, config_for
from limner.nn.graphs import Graphs
from limner.systems.diffusion import controlled
from limner.training import controlling, loop
from limner.training.controlling import ControlConfig, Controlling
from limner.training.memory import autocast, kept_in
from limner.types import Conditioning, Request
from systems import flow_models, stable_diffusion
from systems.stable_diffusion import noised

KINDS = [
    ("icons", "controlnet"),
    ("sd1", "controlnet"),
    ("sd1", "t2i_adapter"),
    *(pytest.param(*row, marks=pytest.mark.slow)
      for row in (("sdxl", "controlnet"), ("flux", "controlnet"), ("sd3", "controlnet"))),
]  # fmt: skip


@pytest.fixture
def base(tiny_model, tmp_path):
    def load(model):
        made = {"icons": lambda _: tiny_model, "flux": flow_models.flux, "sd3": flow_models.sd3}
        source = (made.get(model) or getattr(stable_diffusion, model))(tmp_path / model)
        return catalog.load(source, dtype=torch.float32)

    return load


def batch_of(system, count=3, side=32):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(
        count, system.autoencoder.channels, side // system.grid, side // system.grid, generator=generator
    )
    hints = torch.randint(0, 256, (count, 3, side, side), generator=generator) / 255
    return {"latents": latents, "captions": ["a fox", "", "a red house"][:count], "hints": hints}


def asked(system, batch):
    """The loss, and what the model's network was told for it, and said."""
    seen, network = [], system.base.network
    forward = network.forward
    network.forward = lambda *told: (seen.append([*told, forward(*told)]), seen[-1][-1])[1]
    loss = system.loss(batch, "main", torch.Generator().manual_seed(1))["loss"]
    del network.forward
    (told,) = seen
    return loss, told


def parts(residuals):
    """The tensors in residuals, in order."""
    rows = (
        residuals
        if isinstance(residuals, list)
        else [x for one in residuals for x in (one if isinstance(one, tuple) else [one])]
    )
    return [x for x in rows if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_it_learns_by_what_is_drawn_with_its_file(model, kind, base, tmp_path):
    system = Controlling(base(model), ControlConfig(kind=kind, bits=32, caption_dropout=0.0), 0)
    batch = batch_of(system.base)
    plain = system.base.loss(batch, "main", torch.Generator().manual_seed(1))["loss"]
    assert kind == "t2i_adapter" or torch.equal(asked(system, batch)[0], plain)  # a fresh one adds nothing
    noised(system.control, 3)
    loss, (x, t, cond, residuals, said) = asked(system, batch)
    assert not torch.equal(loss, plain)
    loss.backward()
    unmoved = [n for n, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unmoved == (["control.y_embedder.mlp.0.weight"] if model == "sd3" else [])  # which is told zeros
    assert all(p.grad is None for p in system.base.parameters())
    system.write(tmp_path / "net.safetensors")
    size = {"prompt": "", "negative": "", "seed": 0, "batch": 1, "width": 32, "height": 32, "steps": 1, "guidance": 1.0}
    request = Request(**size, sampler="euler", schedule="uniform")
    with torch.no_grad():
        for i, hint in enumerate(batch["hints"]):
            image = Image.fromarray((255 * hint).round().byte().permute(1, 2, 0).numpy())
            control = open_control(system.base, tmp_path / "net.safetensors", image)
            hint = system.base.see(control, system.base.shown(control, request), (0, x.shape[2], 0, x.shape[3]))
            row, told = slice(i, i + 1), cond.map(lambda v, i=i: v[i : i + 1])
            found = controlled(control, hint, x[row], lambda *_, i=i: t[i : i + 1], told, 1, Graphs())
            for mine, its in zip(parts(residuals), parts(system.base.network.together([found])), strict=True):
                assert (mine[row] - its).abs().max() <= 2e-5 * its.abs().max()
        assert (system.base.network(x, t, cond, residuals) - said).abs().max() <= 1e-5 * said.abs().max()


@pytest.mark.parametrize(("model", "kind"), KINDS[2:])
def test_of_a_model_kept_in_16_bits_it_learns_about_the_same_in_32(model, kind, base):
    whole, device, losses = base(model), torch.device("cpu"), []
    for precision in ("fp32", "bf16"):
        config = replace(recipes.get("control"), precision=precision)
        system = Controlling(whole.to(kept_in(config, device)), ControlConfig(kind=kind, caption_dropout=0.0), 0)
        assert {p.dtype for p in system.parameters()} == {torch.float32}
        noised(system.control, 3)
        with autocast(config, device):
            losses.append(system.loss(batch_of(whole), "main", torch.Generator().manual_seed(1))["loss"])
    losses[-1].backward()
    assert torch.bfloat16 in {p.dtype for p in whole.parameters()}
    assert all(p.grad.isfinite().all() for p in system.parameters() if p.grad is not None)
    assert torch.isclose(losses[1], losses[0], rtol=0.05)
    assert recipes.get("control").precision == recipes.get("t2i-adapter").precision == "auto"


def test_the_loss_is_that_of_diffusers_networks(base, tmp_path):
    system = Controlling(base("sd1"), ControlConfig(bits=32), 0)
    noised(system.control, 3)
    batch = batch_of(system.base)
    loss, (x, t, cond, *_) = asked(system, batch)
    config = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 64,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}  # fmt: skip
    net = diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32))
    system.write(tmp_path / "net.safetensors")
    net.load_state_dict(load_file(tmp_path / "net.safetensors"))
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "sd1" / "model" / "unet")
    generator = torch.Generator().manual_seed(1)
    times, _ = system.base.interpolant.draw(len(x), generator, torch.device("cpu"), system.base.objective.times)
    eps = torch.randn(x.shape, generator=generator)
    assert torch.equal(times, t)
    with torch.no_grad():
        down, mid = net(x, t, cond.tokens, batch["hints"], return_dict=False)
        said = unet(x, t, cond.tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert abs(loss.item() - torch.nn.functional.mse_loss(said, eps).item()) <= 1e-5 * loss.item()


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter"])
def test_it_begins_as_its_paper_has_it_and_its_file_is_read_bit_for_bit(kind, base, tmp_path):
    system = Controlling(base("sd1"), ControlConfig(kind=kind, bits=32), 0)
    if kind == "controlnet":
        own, mine = system.base.network.state_dict(), system.control.state_dict()
        copied = [name for name in mine if name in own]
        assert all(torch.equal(mine[name], own[name]) for name in copied)
        assert {"conv_in.weight", "mid_block.resnets.1.conv2.bias"} <= set(copied)
    begun = [Controlling(system.base, ControlConfig(kind=kind), seed).state_dict().values() for seed in (0, 0, 1)]
    same = [all(map(torch.equal, begun[0], others)) for others in begun[1:]]
    assert same == [True, False]
    noised(system.control, 4)
    system.write(tmp_path / "net.safetensors")
    read = open_control(system.base, tmp_path / "net.safetensors", Image.new("RGB", (8, 8))).network.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in system.control.state_dict().items())
    if kind == "t2i_adapter":
        net = diffusers.T2IAdapter(3, [32, 64], 2, downscale_factor=2, adapter_type="full_adapter")
        net.load_state_dict(load_file(tmp_path / "net.safetensors"))


# ------------------------------------------------------------------- that of icons


def test_that_of_icons_is_small_and_adds_before_the_blocks_it_says(tmp_path):
    network = noised(JointDiTControlNet(JOINT_DIT_ICONS_CONTROLNET), 0)
    assert config_for(JOINT_DIT_ICONS, 4) == JOINT_DIT_ICONS_CONTROLNET
    assert sum(p.numel() for p in network.parameters()) < 4e6
    joint_dit_controlnet.save(network, tmp_path / "net.safetensors", 8)
    assert (tmp_path / "net.safetensors").stat().st_size < 4 * 2**20
    again = joint_dit_controlnet.read(tmp_path / "net.safetensors", JOINT_DIT_ICONS, 16).state_dict()
    for name, tensor in network.state_dict().items():
        assert (again[name] - tensor).abs().max() <= tensor.abs().max() / 127
    cond = Conditioning(pooled=torch.randn(2, 384))
    added = network(torch.randn(2, 32, 4, 6), torch.rand(2), cond, network.see(torch.rand(1, 3, 64, 96)))
    assert [i for i, one in enumerate(added) if one is not None] == [0, 2, 5, 7]
    assert all(one.shape == (2, 24, 512) for one in added if one is not None)


def test_what_is_added_goes_to_the_image_tokens_before_the_block(base):
    network, seen = base("icons").network, []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, told: seen.append(told[0]))
    cond = Conditioning(torch.randn(2, 5, 384), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 384))
    x, t, more = torch.randn(2, 8, 4, 4), torch.rand(2), torch.randn(2, 16, 64)
    plain = network(x, t, cond)
    assert torch.equal(network(x, t, cond, [None, None]), plain)
    told = network(x, t, cond, network.together([[None, more], [None, more]]))
    (_, before), (_, after) = seen[:2], seen[4:]
    assert torch.equal(after, torch.cat([before[:, :5], before[:, 5:] + 2 * more], 1))
    assert not torch.equal(told, plain)


# ------------------------------------------------------------------- runs

FEW = [
    "steps=4",
    "batch_size=2",
    "log_every=2",
    "save_every=2",
    "warmup=0",
    "lr=0.01",
    "data.size=32",
    "ema_half_life=2",
]


@pytest.fixture
def pictures(here):
    (here / "pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green")):
        squares = np.kron(np.random.default_rng(i).integers(0, 2, (5, 5)), np.ones((8, 8)))
        Image.fromarray(squares.astype(np.uint8) * 255).save(here / "pictures" / f"{i}.png")
        (here / "pictures" / f"{i}.txt").write_text(f"a {color} square")
    return here / "pictures"


def trained(limner, out, model, pictures, *more, recipe="control"):
    done = limner("train", recipe, "-m", model, "-d", pictures, "-o", out, "--device", "cpu", *FEW, *more)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("model", ["icons", pytest.param("sd1", marks=pytest.mark.slow)])
def test_a_folder_of_pictures_becomes_a_file_that_draws_what_the_run_showed(
    model, limner, here, tiny_model, pictures, tmp_path, monkeypatch
):
    source = tiny_model if model == "icons" else stable_diffusion.sd1(tmp_path / "sd1")
    shown, draw = [], controlling.draw
    monkeypatch.setattr(controlling, "draw", lambda *told: shown.extend(draw(*told)) or shown)
    recipe = {"icons": "control", "sd1": "t2i-adapter"}[model]
    done = trained(limner, "run", source, pictures, "sample_every=0", "control.bits=32", recipe=recipe)
    assert done.out.splitlines()[-1] == f"run/{recipe}.safetensors"
    width, height = shown[0].width // 2, shown[0].height
    shown[0].crop((0, 0, width, height)).save("hint.png")
    asked = ("generate", "a red square", "-m", source, "-s", 0, "-W", width, "-H", height)
    assert limner(*asked, "--control", f"run/{recipe}.safetensors=hint.png", "-o", "drawn.png").code == 0
    assert limner(*asked, "--control", f"run/{recipe}.safetensors=pictures/0.png:1,canny", "-o", "canny.png").code == 0
    assert limner(*asked, "-o", "plain.png").code == 0
    drawn, canny, plain = (Image.open(f"{name}.png").convert("RGBA") for name in ("drawn", "canny", "plain"))
    assert (
        shown[0].crop((width, 0, 2 * width, height)).tobytes() == drawn.tobytes() == canny.tobytes() != plain.tobytes()
    )
    (row,) = json.loads(limner("runs", "run", "--json").out)
    assert (row["recipe"], row["state"]) == (recipe, "finished")
    told = json.loads(limner("inspect", f"run/{recipe}.safetensors", "--json").out)
    assert told["kind"].startswith({"icons": "ControlNet", "sd1": "T2I-Adapter"}[model])
    again = trained(limner, "again", source, pictures, f"init_from=run/{recipe}.safetensors", "control.bits=32",
                    "steps=1", "lr=1e-12", recipe=recipe)  # fmt: skip
    assert again.out.splitlines()[-1] == f"again/{recipe}.safetensors"
    before, after = (load_file(f"{run}/{recipe}.safetensors") for run in ("run", "again"))
    assert all(torch.allclose(before[name], after[name]) for name in before)


def test_a_run_that_was_stopped_ends_with_the_same_bits(limner, here, tiny_model, pictures, monkeypatch):
    more = ("validation=0.4", "data.mirror=true", "data.latent_views=2", "data.cache=cache")
    trained(limner, "whole", tiny_model, pictures, *more)
    for steps in (1, 2):
        with monkeypatch.context() as patch:
            stop = StopAt(steps)
            patch.setattr(loop, "StopRequests", lambda *_, stop=stop: stop)
            if steps > 1:
                limner("train", "--resume", "parts", "--device", "cpu")
            else:
                limner(
                    "train", "control", "-m", tiny_model, "-d", pictures, "-o", "parts", "--device", "cpu", *FEW, *more
                )
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    for name in ("control.safetensors", "checkpoints/step-000004/ema.safetensors"):
        assert (here / "parts" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_what_cannot_be_is_told_before_the_first_step(limner, here, tiny_model, pictures, base, tmp_path):
    def said(*more, model=tiny_model, recipe="control"):
        done = limner("train", recipe, "-m", model, "-d", pictures, "-o", "run", "--device", "cpu", *FEW, *more)
        assert not (here / "run").exists()
        return done.code, done.err

    for more, code, why in (
        (["data.hints=none"], 2, "a control learns what hints say: give data.hints=canny"),
        (["data.hints=cany"], 2, "no maker 'cany'. Did you mean 'canny'?"),
        (["data.hints=beside"], 3, "no picture in"),
        (["control.kind=t2i_adapter"], 2, "takes no T2I-Adapter"),
        (["control.depth=3"], 2, "control.depth=3"),
        (["control.caption_dropout=1.5"], 2, "control.caption_dropout=1.5: give 0 to 1"),
    ):
        found = said(*more)
        assert (found[0], why in found[1]) == (code, True), found
    found = said("data.hints=canny", "adapter.rank=2", recipe="lora")
    assert (found[0], "data.hints=canny has no effect on lora" in found[1]) == (2, True), found
    sd1 = base("sd1")
    for told, why in (({"bits": 8}, "control.bits=8"), ({"depth": 2}, "is a U-Net")):
        with pytest.raises(UsageError, match=why):
            Controlling(sd1, ControlConfig(**told), 0)
    system = Controlling(sd1, ControlConfig(), 0)
    system.write(tmp_path / "sd1.safetensors")
    ours = Controlling(base("icons"), ControlConfig(), 0)
    ours.write(tmp_path / "ours.safetensors")
    for to, file, why in (
        (ours.base, "sd1", "is no ControlNet of icons"),
        (sd1, "ours", "is a ControlNet of icons, this is another"),
        (catalog.load("icons"), "ours", "is a ControlNet of another network than this: of 2 blocks 64 wide"),
    ):
        with pytest.raises(CheckpointMismatch, match=why):
            open_control(to, tmp_path / f"{file}.safetensors", Image.new("RGB", (8, 8)))
    assert math.isclose(sd1.caption_dropout, 0.5)


def test_captions_that_cannot_be_drawn_are_no_prompts_but_their_hints_are_drawn_with(base):
    system = Controlling(base("icons"), ControlConfig(), 0)
    hint = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for captions, prompts in (
        (("a fox", "a house"), ("a fox", "a house")),
        (("a fox", " "), ()),
        (("a fox", "x" * 3000), ()),
        (("", ""), ()),
    ):
        system.prompts = ()
        system.show(SimpleNamespace(first=lambda count, told=captions: [(caption, hint) for caption in told]))
        assert (system.prompts, len(system.hints)) == (prompts, 2)
