"""IP-Adapters: pictures as words are what diffusers makes of them, and nothing stays of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from limner import catalog, metadata, pipeline
from limner.adapters import references
from limner.checkpoints import ip_adapter as files_of
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.models.clip_vision import OPENCLIP_BIGG, OPENCLIP_H, CLIPVision, prepared
from limner.models.ip_adapter import attached, attentions
from limner.models.unet import perturbed
from limner.types import Conditioning
from sweeps import sweep

from . import stable_diffusion
from .test_control import drawn, picture

WIDTHS = {"sd1": 64, "sdxl": 64 + 128}
KINDS = ("plain", "plus", "full")
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7, "projection_dim": 48, "hidden_act": "gelu",
}  # fmt: skip


def filled(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        norm = "norm" in name or name.endswith(("proj.3.weight", ".1.0.weight"))
        found[name] = value * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) + (norm and name.endswith("weight"))
    return found


def adapter(kind: str, text: int, widths: list[int], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """A file of the authors of IP-Adapter, its two parts."""
    if kind == "plain":
        shapes = {"proj.weight": (4 * text, 48), "proj.bias": (4 * text,), "norm.weight": (text,), "norm.bias": (text,)}
    elif kind == "full":
        shapes = {
            "proj.0.weight": (64, 64), "proj.0.bias": (64,), "proj.2.weight": (text, 64), "proj.2.bias": (text,),
            "proj.3.weight": (text,), "proj.3.bias": (text,),
        }  # fmt: skip
    else:
        shapes = {
            "latents": (1, 5, 64), "proj_in.weight": (64, 64), "proj_in.bias": (64,), "proj_out.weight": (text, 64),
            "proj_out.bias": (text,), "norm_out.weight": (text,), "norm_out.bias": (text,),
        }  # fmt: skip
        for k in range(4):  # diffusers knows no other number
            one, two = f"layers.{k}.0.", f"layers.{k}.1."
            shapes |= {f"{one}norm{n}.{part}": (64,) for n in (1, 2) for part in ("weight", "bias")}
            shapes |= {f"{one}to_q.weight": (64, 64), f"{one}to_kv.weight": (128, 64), f"{one}to_out.weight": (64, 64)}
            shapes |= {f"{two}0.weight": (64,), f"{two}0.bias": (64,), f"{two}1.weight": (256, 64)}
            shapes |= {f"{two}3.weight": (64, 256)}
    rows = {f"{2 * k + 1}.to_{kv}_ip.weight": (width, text) for k, width in enumerate(widths) for kv in "kv"}
    return {"image_proj": filled(shapes, seed), "ip_adapter": filled(rows, seed + 1)}


def flat(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for part, rows in parts.items() for name, tensor in rows.items()}


@pytest.fixture(scope="module")
def systems(tmp_path_factory) -> dict[str, Any]:
    """Of each kind a folder, our pipeline, diffusers', and the widths of the attentions in the order of files."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    found = {}
    encoder = stable_diffusion.noised(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)), seed=4
    )
    seer = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    eyes = tmp_path_factory.mktemp("models") / "image_encoder"
    encoder.save_pretrained(eyes)
    for kind in WIDTHS:
        folder = getattr(stable_diffusion, kind)(tmp_path_factory.mktemp(kind))
        parts = diffusers.DiffusionPipeline.from_pretrained(folder).components
        parts |= {"image_encoder": encoder, "feature_extractor": seer}
        parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(parts["scheduler"].config)
        name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
        told = {} if kind == "sdxl" else {"requires_safety_checker": False}
        theirs = getattr(diffusers, name)(**parts, **told)
        theirs.set_progress_bar_config(disable=True)
        names = [n for n in theirs.unet.attn_processors if "attn2" in n]
        widths = [theirs.unet.get_submodule(n.removesuffix(".processor")).to_k.out_features for n in names]
        found[kind] = folder, pipeline.load(folder), theirs, widths
    return found | {"eyes": eyes, "encoder": encoder, "seer": seer}


@pytest.mark.parametrize("side", [(224, 224), (300, 401), (1000, 225), (97, 64), (640, 480), (301, 200)], ids=str)
def test_a_picture_is_prepared_as_transformers_prepares_it(side):
    pixels = np.random.default_rng(0).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
    wanted = transformers.CLIPImageProcessor()(Image.fromarray(pixels), return_tensors="pt").pixel_values
    assert (prepared(Image.fromarray(pixels), 224) - wanted).abs().max() <= 1e-5
    clear = Image.new("RGBA", side, (255, 0, 0, 0))
    assert torch.equal(prepared(clear, 224), prepared(Image.new("RGB", side, "white"), 224))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_tower_sees_what_transformers_sees(systems, dtype, near):
    theirs = systems["encoder"].to(dtype)
    tensors = dict(theirs.state_dict())
    ours = files_of.read_encoder(Path("eyes"), tensors, VISION).to(dtype)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        wanted = theirs(images, output_hidden_states=True)
        whole, states = ours(images)
    theirs.float()
    for a, b in ((whole, wanted.image_embeds), (states, wanted.hidden_states[-2])):
        assert (a - b).abs().max() <= near * b.abs().max()


@pytest.mark.parametrize(("config", "millions"), [(OPENCLIP_H, 632), (OPENCLIP_BIGG, 1844)])
def test_real_sizes_have_the_published_names_and_shapes(config, millions):
    with torch.device("meta"):
        ours = CLIPVision(config).state_dict()
        theirs = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=config.width, intermediate_size=config.hidden, num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads, image_size=224, patch_size=14, projection_dim=config.projection,
            )
        ).state_dict()  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in theirs.items() if not k.endswith("position_ids")}
    prefix = "" if any(k.startswith("vision_model.") for k in shapes) else "vision_model."
    wanted = {k if k.startswith("visual_proj") else prefix + k: v for k, v in shapes.items()}
    assert {k: tuple(v.shape) for k, v in ours.items()} == wanted
    assert sum(v.numel() for v in ours.values()) // 10**6 == millions


def expected(systems: Any, theirs: Any, adapters: Any, scale: Any, images: Any) -> torch.Tensor:
    """Latents of diffusers with one adapter or several, from which it is free again afterwards."""
    count = len(adapters) if isinstance(adapters, list) else 0
    theirs.load_ip_adapter(adapters, subfolder=[None] * count or None, weight_name=[""] * count or "")
    theirs.set_ip_adapter_scale(scale)
    latents = theirs(
        "a red fox", ip_adapter_image=images, num_inference_steps=5, guidance_scale=5.0, height=32, width=32,
        output_type="latent", generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    theirs.unload_ip_adapter()
    theirs.image_encoder, theirs.feature_extractor = systems["encoder"], systems["seer"]
    return latents


@pytest.mark.parametrize(
    ("base", "kind"), sweep(WIDTHS, KINDS, fast=lambda base, kind: base == "sd1" or kind == "plain")
)
def test_it_draws_what_diffusers_draws(systems, base, kind, tmp_path, monkeypatch):
    _, pipe, theirs, widths = systems[base]
    parts = adapter(kind, WIDTHS[base], widths)
    wanted = expected(systems, theirs, parts, 0.6, picture(0, 28))
    file = tmp_path / "ip.safetensors"
    save_file(flat(parts), file)
    before = drawn(pipe, monkeypatch)
    ask = {"ip_adapter": [(file, picture(0, 28), 0.6)], "image_encoder": systems["eyes"]}
    found = drawn(pipe, monkeypatch, **ask)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (found - before).abs().max() > 0.01 * wanted.abs().max()
    assert torch.equal(drawn(pipe, monkeypatch), before)
    nothing = {**ask, "ip_adapter": [(file, picture(0, 28), 0.0)]}
    assert (drawn(pipe, monkeypatch, **nothing) - before).abs().max() <= 1e-5 * before.abs().max()


def test_two_add_up_in_their_order_and_torchs_files_are_read(systems, tmp_path, monkeypatch):
    """With diffusers, which takes both at once."""
    _, pipe, theirs, widths = systems["sd1"]
    both = [adapter(kind, 64, widths, seed) for kind, seed in (("plain", 0), ("plus", 7))]
    wanted = expected(systems, theirs, both, [0.6, -0.3], [picture(0, 28), picture(1, 28)])
    for k, parts in enumerate(both):
        torch.save(parts, tmp_path / f"ip{k}.bin")
    ask = [(tmp_path / "ip0.bin", picture(0, 28), 0.6), (tmp_path / "ip1.bin", picture(1, 28), -0.3)]
    found = drawn(pipe, monkeypatch, ip_adapter=ask, image_encoder=systems["eyes"])
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.fixture(scope="module")
def file(systems, tmp_path_factory) -> Path:
    """A plus adapter of sd1 beside its image encoder."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "image_encoder").symlink_to(systems["eyes"])
    save_file(flat(adapter("plus", 64, systems["sd1"][3])), folder / "plus.safetensors")
    return folder / "plus.safetensors"


def test_perturbed_attention_sees_it_too_as_diffusers_has_it(systems, file, monkeypatch):
    folder, pipe, _, widths = systems["sd1"]
    theirs = diffusers.StableDiffusionPAGPipeline.from_pretrained(
        folder, image_encoder=systems["encoder"], feature_extractor=systems["seer"]
    )
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(adapter("plus", 64, widths), subfolder=None, weight_name="")
    theirs.set_ip_adapter_scale(0.8)
    wanted = theirs(
        "a red fox", ip_adapter_image=picture(0, 28), num_inference_steps=5, guidance_scale=5.0, pag_scale=2.0,
        height=32, width=32, output_type="latent", generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    found = drawn(pipe, monkeypatch, ip_adapter=[(file, picture(0, 28), 0.8)], pag_scale=2.0)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_weights_of_blocks_are_those_of_diffusers(systems, file, monkeypatch):
    _, pipe, theirs, widths = systems["sd1"]
    wanted = expected(systems, theirs, adapter("plus", 64, widths), {"up": {"block_1": [0.9, 0.9]}}, picture(0, 28))
    blocks = {"mid_block": 0, "down_blocks": 0, "up_blocks": 0, "up_blocks.1": 0.9}
    ask = {"file": file, "image": picture(0, 28), "blocks": blocks}
    found = drawn(pipe, monkeypatch, ip_adapter=[ask])
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    with pytest.raises(UsageError, match="changes no block 'mid_blok'; it changes mid_block"):
        references.open_reference(pipe.system, file, picture(), blocks={"mid_blok": 1})


def test_a_mask_of_words_hides_no_picture(systems, file):
    """A row whose mask cuts words is the row without them."""
    system = systems["sd1"][1].system
    shown = references.open_reference(system, file, picture())
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 64, generator=generator)
    t = torch.full((1,), 300)
    with torch.no_grad(), attached(system.network, [(shown.network, shown.weight_in)]):
        cut = system.network(x, t, Conditioning(text[:, :4], images=shown.words))
        masked = system.network(x, t, Conditioning(text, torch.arange(7)[None] < 4, images=shown.words))
    assert (cut - masked).abs().max() <= 1e-5 * cut.abs().max()


def test_each_picture_of_a_batch_and_each_part_of_a_prompt_is_told_the_same(systems, file, monkeypatch):
    pipe = systems["sd1"][1]
    ask = [references.open_reference(pipe.system, file, picture())]
    one = drawn(pipe, monkeypatch, ip_adapter=ask)
    batch = drawn(pipe, monkeypatch, ip_adapter=ask, batch=2, seed=2)
    assert (batch[1:] - one).abs().max() <= 1e-4 * one.abs().max()
    with monkeypatch.context() as patch:
        seen: list[torch.Tensor] = []
        decode = pipe.system.decode
        patch.setattr(pipe.system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])
        told = {"seed": 3, "steps": 5, "guidance": 5.0, "sampler": "euler"}
        pipe.generate("a red fox AND a red fox :0", **told, ip_adapter=ask)
    assert (seen[0] - one).abs().max() <= 1e-3 * one.abs().max()


def test_a_guide_of_the_same_kind_is_told_it_too(systems, file, monkeypatch):
    folder = systems["sd1"][0]
    ask = [(file, picture())]
    alone = drawn(pipeline.load(folder), monkeypatch, ip_adapter=ask, guidance=1)
    guided = drawn(pipeline.load(folder, guide_model=folder), monkeypatch, ip_adapter=ask)
    assert (guided - alone).abs().max() <= 1e-4 * alone.abs().max()


def test_a_perturbed_network_shares_the_weights_of_what_is_attached(systems, file):
    network = systems["sd1"][1].system.network
    shown = references.open_reference(systems["sd1"][1].system, file, picture())
    with attached(network, [(shown.network, shown.weight_in)]):
        spoilt = perturbed(network, ["mid_block"])
    own = next(attention.beside[0][1] for attention in attentions(spoilt).values())
    assert own is shown.network.layers[0]
    assert not any(attention.beside for attention in attentions(network).values())


def test_files_in_half_precision_make_words_in_full(systems, file, tmp_path):
    system, tensors = systems["sd1"][1].system, load_file(file)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors")
    save_file({name: tensor.float() for name, tensor in halves.items()}, tmp_path / "full.safetensors")
    half, full = (
        references.open_reference(system, tmp_path / f"{name}.safetensors", picture(), image_encoder=systems["eyes"])
        for name in ("half", "full")
    )
    assert torch.equal(half.words, full.words)


def test_the_authors_folders_are_known(systems, tmp_path):
    """Some in sdxl_models see through ViT-H, which lies in models, and not through ViT-bigG beside them."""
    for folder, projection in (("sdxl_models", 50), ("models", 48)):
        config = transformers.CLIPVisionConfig(**VISION | {"projection_dim": projection, "num_hidden_layers": 1})
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / folder / "image_encoder")
    file = tmp_path / "sdxl_models" / "vit-h.safetensors"
    save_file(flat(adapter("plain", WIDTHS["sdxl"], systems["sdxl"][3])), file)
    assert references.open_reference(systems["sdxl"][1].system, file, picture()).words.shape == (1, 4, WIDTHS["sdxl"])


@pytest.mark.parametrize(("kind", "layers", "first"), [("sd1", 16, (320, 768)), ("sdxl", 70, (640, 2048))])
def test_real_sizes_have_the_layers_of_the_published_files(kind, layers, first):
    """Numbers 1 to 31 of SD1 and 1 to 139 of SDXL, the middle last."""
    with torch.device("meta"):
        found = attentions(catalog.build(catalog.entry(kind).config).network)
    weights = [attention.to_k.weight.shape for attention in found.values()]
    assert (len(weights), weights[0]) == (layers, first)
    assert next(iter(found)).startswith("down_blocks")
    assert next(reversed(found)).startswith("mid_block")


def test_a_lone_tower_of_no_published_size_is_refused(systems):
    tensors = dict(systems["encoder"].state_dict())
    with pytest.raises(CheckpointMismatch, match=r"width=64 .* num_heads=0; is the config\.json"):
        files_of.read_encoder(Path("eyes"), tensors, {})
    with pytest.raises(CheckpointMismatch, match="activation='relu'"):
        files_of.read_encoder(Path("eyes"), tensors, VISION | {"hidden_act": "relu"})


def test_what_does_not_fit_is_refused_before_any_step(systems, tmp_path, tiny_model):
    system, eyes, widths = systems["sd1"][1].system, systems["eyes"], systems["sd1"][3]

    def refused(parts: dict[str, Any], error: type[Exception], match: str, **told: Any) -> None:
        save_file(flat(parts), tmp_path / "ip.safetensors")
        with pytest.raises(error, match=match):
            references.open_reference(system, tmp_path / "ip.safetensors", picture(), **{"image_encoder": eyes} | told)

    good = adapter("plain", 64, widths)
    refused(adapter("plain", 192, systems["sdxl"][3]), CheckpointMismatch, "an IP-Adapter of a model of words 192 wide")
    refused({"image_proj": good["image_proj"]}, CheckpointMismatch, "is no IP-Adapter")
    wide = filled({"proj.weight": (256, 50), "proj.bias": (256,), "norm.weight": (64,), "norm.bias": (64,)}, 0)
    refused(good | {"image_proj": wide}, CheckpointMismatch, "which says 48 numbers of a picture and 64 of its states")
    less = {"proj.bias": torch.zeros(256)}
    refused(good | {"image_proj": less}, CheckpointMismatch, r"not whole: there is no 'image_proj\.proj\.weight'")
    faces = {"0.to_q_lora.down.weight": torch.zeros(2, 2)}
    refused(good | {"ip_adapter": good["ip_adapter"] | faces}, CheckpointMismatch, "faces")
    refused(good | {"ip_adapter": dict(list(good["ip_adapter"].items())[:-1])}, CheckpointMismatch, r"to_v_ip")
    refused(good, FileProblem, "no folder image_encoder near it", image_encoder=None)
    refused(good, CheckpointMismatch, "is no CLIP tower of pictures", image_encoder=tmp_path / "ip.safetensors")
    refused(good, UsageError, "weight of ip.safetensors is nan", weight=float("nan"))
    with pytest.raises(UsageError, match="takes no"):
        pipeline.load(tiny_model).generate("a", ip_adapter=[(tmp_path / "ip.safetensors", picture())])
    for asked in (3, [3], [{"file": "a"}], [{"file": "a", "image": "b", "wait": 1}], [("a",)]):
        with pytest.raises(UsageError, match=r"ip_adapter is .*: give"):
            systems["sd1"][1].generate("a", ip_adapter=asked)
    with pytest.raises(UsageError, match="none was given: give ip_adapter"):
        systems["sd1"][1].generate("a", image_encoder=eyes)
    save_file(flat(good), tmp_path / "a:b.safetensors")
    with pytest.raises(UsageError, match="cannot be remembered"):
        references.open_reference(system, tmp_path / "a:b.safetensors", picture(), image_encoder=eyes)
    for text in ("net", "=a.png", "net="):
        with pytest.raises(UsageError, match="is no FILE=IMAGE"):
            references.parse(text)
    with pytest.raises(UsageError, match="'x' is no weight"):
        references.parse("net=a.png:x")
    assert references.parse("net=a.png:0.5,mid_block=0") == {
        "file": "net", "image": "a.png", "weight": 0.5, "blocks": {"mid_block": 0.0}
    }  # fmt: skip
    assert references.parse("net=a:b/c.png") == {"file": "net", "image": "a:b/c.png"}


def test_on_the_command_line_and_in_what_a_picture_remembers(limner, here, systems):
    folder, _, _, widths = systems["sd1"]
    (here / "models").mkdir()
    save_file(flat(adapter("plain", 64, widths)), here / "models" / "ip.safetensors")
    picture().save(here / "in.png")
    base = ("generate", "a red fox", "-m", folder, "--steps", 3, "-s", 1)
    picture(1).save(here / "other.png")
    ask = ("--ip-adapter", "models/ip.safetensors=in.png:0.5,mid_block=0.5")
    assert "no folder image_encoder" in limner(*base, *ask).err
    (here / "models" / "image_encoder").symlink_to(systems["eyes"])
    done = limner(*base, *ask, "-o", "out.png")
    assert (done.code, done.out) == (0, "out.png\n"), done.err
    settings = metadata.read_settings(Path("out.png"))
    assert [(one["name"], one["weight"], one["blocks"]) for one in settings["ip_adapter"]] == [
        ("ip", 0.5, {"mid_block": 0.5})
    ]
    assert "IP-Adapter 0" in Image.open("out.png").text["parameters"]
    assert "painted with the IP-Adapter 'ip'" in limner("generate", "-C", "out.png", "-m", folder).err
    told = ("generate", "-C", "out.png", "-m", folder, "--ip-adapter")
    again = limner(*told, "models/ip.safetensors=in.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    other = limner(*told, "models/ip.safetensors=other.png", "-o", "other-1.png")
    assert (other.code, "the picture of ip is not the one painted with" in other.err) == (0, True)
    nothing = limner(*base, "--ip-adapter", "models/ip.safetensors=in.png:0", "-o", "nothing.png")
    assert (nothing.code, "ip has weight 0, and shows nothing" in nothing.err) == (0, True)
    assert limner(*base, "-o", "plain.png").code == 0
    assert np.any(np.asarray(Image.open("plain.png")) != np.asarray(Image.open("out.png")))
    assert "add --ip-adapter" in limner(*base, "--image-encoder", systems["eyes"]).err
