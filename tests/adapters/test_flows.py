"""Adapters on FLUX.1 and Stable Diffusion 3: what diffusers draws with its own, unfused weights changed by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limner import catalog
from limner.adapters import files
from limner.adapters.attaching import stack
from limner.errors import CheckpointMismatch
from limner.models.flux import guidance_embedding
from limner.types import Conditioning
from sweeps import sweep
from systems import flow_models

from . import zoo

MODELS = {
    "sd3": (flow_models.sd3, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, flow_models.sd3_transformer),
    "flux": (flow_models.flux, {}, lambda: flow_models.flux_transformer(True)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], tuple[Path, nn.Module]]:
    """A folder, and diffusers' network of it."""

    def make(name: str) -> tuple[Path, nn.Module]:
        save, changes, network = MODELS[name]
        return save(tmp_path_factory.mktemp(name), **changes), network(**changes)  # type: ignore[operator]

    return lru_cache(make)


@pytest.fixture(scope="module")
def kept(models) -> Callable[[str], Any]:
    return lru_cache(lambda name: catalog.load(models(name)[0]))


@pytest.fixture
def load(kept) -> Iterator[Callable[[str], Any]]:
    """The one system of a name, which is as it was after each test."""
    used = {}
    yield lambda name: used.setdefault(name, kept(name))
    for system in used.values():
        stack(system).detach()


def layers(network: nn.Module, *ends: str) -> dict[str, nn.Module]:
    """All that is a matrix or a convolution; those whose names end so, if any are told."""
    return {
        n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n.endswith(ends or ("",))
    }


def seen(network: nn.Module, ours: Any = None) -> torch.Tensor:
    """What a network says of fixed input."""
    flux = type(network).__name__.startswith("Flux")
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 8, 4, generator=draw), torch.randn(2, 7, flow_models.T5_WIDTH, generator=draw)
    pooled = torch.randn(2, flow_models.CLIP_WIDTH + (0 if flux else flow_models.BIG_WIDTH), generator=draw)
    t, guidance = torch.tensor([0.9, 0.25]), torch.tensor([3.5, 1.0])
    with torch.no_grad():
        if ours is not None:
            return ours(x, t, Conditioning(tokens=text, pooled=pooled, guidance=guidance_embedding(guidance)))
        if not flux:
            return network(x, text, pooled, 1000 * t).sample
        import diffusers

        packed = diffusers.FluxPipeline._pack_latents(x, 2, 16, 8, 4)
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 2, "cpu", torch.float32)
        out = network(
            hidden_states=packed, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, img_ids=ids,
            txt_ids=torch.zeros(7, 3), guidance=guidance,
        ).sample  # fmt: skip
        return diffusers.FluxPipeline._unpack_latents(out, 64, 32, 8)


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


# ------------------------------------------------------------------- diffusers' modules, in every program's names


def diffusers(part: str, path: str, ending: str) -> str:
    return zoo.diffusers("transformer", path, ending)


def onetrainer(part: str, path: str, ending: str) -> str:
    return f"lora_transformer_{path.replace('.', '_')}.{ending}"


def comfyui(part: str, path: str, ending: str) -> str:
    return f"diffusion_model.{path}.{ending}"


SPELLINGS = [diffusers, zoo.peft, onetrainer, zoo.kohya, zoo.lycoris, comfyui]
TURNS = (zoo.oft, zoo.oft_bounded, zoo.boft)  # which take long by loops
FEW = ("to_q", "to_v", "add_k_proj", "norm_out.linear")


def _usual(name: str, spell: Any, make: Any) -> bool:
    """LoRA in every spelling of one model, and every kind in one."""
    if make is zoo.lora:
        return name == "flux" or spell is onetrainer
    return spell is onetrainer and (name == "sd3" or make in (zoo.dora_columns, zoo.lokr))


@pytest.mark.parametrize(("name", "spell", "make"), sweep(MODELS, SPELLINGS, zoo.LINEAR, fast=_usual))
def test_every_kind_in_every_spelling_draws_what_diffusers_draws(models, load, name, spell, make, tmp_path):
    """Of every matrix there: queries, keys and values each on their own, and the norm whose halves are swapped."""
    system, network = load(name), copy.deepcopy(models(name)[1])
    own, before = dict(system.named_parameters()), seen(network)
    rows = layers(network, *(FEW if make in TURNS else ()))
    kept = zoo.file(tmp_path / "style.safetensors", {"unet": rows}, make, spell)
    report = stack(system).attach(tmp_path / "style.safetensors")
    for (_, path), tensors in kept.items():
        module = rows[path]
        module.weight.data = torch.from_numpy(zoo.changed(make, tensors, module.weight.data)).float()
        if "diff_b" in tensors:
            module.bias.data += tensors["diff_b"]
    wanted = seen(network)
    assert not near(before, wanted)
    assert near(seen(network, system.network), wanted)
    assert report.matched == report.total == sum(map(len, kept.values()))
    stack(system).detach()
    assert all(parameter is own[key] for key, parameter in system.named_parameters())


# ------------------------------------------------------------------- the authors' modules


def lora(weight: torch.Tensor, seed: int, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return zoo.noise(draw, rank, weight[0].numel()), zoo.noise(draw, len(weight), rank)


@pytest.mark.parametrize(
    ("name", "prefix", "flat", "down", "up"),
    [
        ("flux", "lora_unet_", True, "lora_down", "lora_up"), ("sd3", "lora_unet_", True, "lora_down", "lora_up"),
        ("flux", "diffusion_model.", False, "lora_A", "lora_B"), ("flux", "", False, "lora_A", "lora_B"),
        ("flux", "base_model.model.", False, "lora_A", "lora_B"), ("flux", "lycoris_", True, "lora_down", "lora_up"),
        ("sd3", "diffusion_model.", False, "lora_A", "lora_B"),
    ],
)  # fmt: skip
def test_fused_matrices_take_what_is_for_them_as_it_is(load, name, prefix, flat, down, up, tmp_path):
    system = load(name)
    tensors, wanted = {}, {}
    for seed, (path, module) in enumerate(layers(system.network).items()):
        a, b = lora(module.weight, seed)
        spelled = prefix + (path.replace(".", "_") if flat else path)
        tensors |= {f"{spelled}.{down}.weight": a, f"{spelled}.{up}.weight": b, f"{spelled}.alpha": torch.tensor(1.5)}
        wanted[path] = module.weight + (0.5 * b @ a).reshape(module.weight.shape)
    save_file(tensors, tmp_path / "style.safetensors")
    report = stack(system).attach(tmp_path / "style.safetensors")
    assert report.matched == report.total
    for path, module in layers(system.network).items():
        torch.testing.assert_close(module.weight.data, wanted[path])


def test_xlabs_names_are_of_image_text_and_single_blocks(load, tmp_path):
    system = load("flux")
    d, net = system.network.config.width, system.network
    rows = {
        "double_blocks.1.processor.qkv_lora1": (net.double_blocks[1].img_attn.qkv, 3 * d),
        "double_blocks.1.processor.qkv_lora2": (net.double_blocks[1].txt_attn.qkv, 3 * d),
        "double_blocks.0.processor.proj_lora1": (net.double_blocks[0].img_attn.proj, d),
        "double_blocks.0.processor.proj_lora2": (net.double_blocks[0].txt_attn.proj, d),
        "single_blocks.1.processor.qkv_lora": (net.single_blocks[1].linear1, 3 * d),
        "single_blocks.1.processor.proj_lora": (net.single_blocks[1].linear2, d),
    }
    tensors, wanted = {}, {}
    for seed, (key, (module, count)) in enumerate(rows.items()):
        a, b = lora(module.weight[:count], seed)
        tensors |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
        wanted[key] = module.weight.detach().clone()
        wanted[key][:count] += b @ a
    save_file(tensors, tmp_path / "xlabs.safetensors")
    report = stack(system).attach(tmp_path / "xlabs.safetensors")
    assert (report.programs, report.matched) == (("XLabs",), 12)
    for key, (module, _) in rows.items():
        torch.testing.assert_close(module.weight.data, wanted[key])


def test_rows_of_one_matrix_have_ranks_and_alphas_of_their_own(load, tmp_path):
    """OneTrainer numbers them, diffusers names them; what a file leaves out stays what it is."""
    d = 256
    spans = {"q": (0, d), "v": (2 * d, 3 * d), "mlp": (3 * d, 7 * d)}
    spellings = {
        "diffusers": {n: f"transformer.single_transformer_blocks.0.{p}" for n, p in
                      (("q", "attn.to_q"), ("v", "attn.to_v"), ("mlp", "proj_mlp"))},
        "onetrainer": {n: f"transformer.single_blocks.0.linear1.{i}" for n, i in (("q", 0), ("v", 2), ("mlp", 3))},
    }  # fmt: skip
    for program, paths in spellings.items():
        system = load("flux")
        weight = system.network.single_blocks[0].linear1.weight
        tensors, wanted = {}, weight.detach().clone()
        for rank, (part, (first, end)) in enumerate(spans.items(), 2):
            a, b = lora(weight[first:end], rank, rank)
            tensors |= {f"{paths[part]}.lora_A.weight": a, f"{paths[part]}.lora_B.weight": b}
            if part != "v":
                tensors[f"{paths[part]}.alpha"] = torch.tensor(3.0)
            wanted[first:end] += (1.0 if part == "v" else 3.0 / rank) * b @ a
        save_file(tensors, tmp_path / f"{program}.safetensors")
        report = stack(system).attach(tmp_path / f"{program}.safetensors")
        assert (report.ranks, report.matched) == ((2, 3, 4), 8)
        torch.testing.assert_close(system.network.single_blocks[0].linear1.weight.data, wanted)
        assert torch.equal(weight[d : 2 * d], system.network.single_blocks[0].linear1.weight[d : 2 * d])
        stack(system).detach()


def test_the_alpha_of_a_file_of_diffusers_is_of_rows_too(load, tmp_path):
    system = load("sd3")
    weight = system.network.joint_blocks[1].context_block.attn.qkv.weight
    wanted, tensors = weight.detach().clone(), {}
    for i, part in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        a, b = lora(weight[:128], i)
        key = f"transformer.transformer_blocks.1.attn.{part}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        wanted[128 * i : 128 * i + 128] += (3.0 if part == "add_k_proj" else 2.0) * b @ a
    told = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"add_k_proj": 9}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    stack(system).attach(tmp_path / "x.safetensors")
    torch.testing.assert_close(system.network.joint_blocks[1].context_block.attn.qkv.weight.data, wanted)


@pytest.mark.parametrize(
    ("name", "key", "module"),
    [
        ("flux", "transformer.transformer_blocks.0.attn.norm_added_q.diff", "double_blocks.0.txt_attn.norm.query_norm"),
        ("flux", "diffusion_model.single_blocks.1.norm.key_norm.scale.diff", "single_blocks.1.norm.key_norm"),
        ("flux", "lycoris_single_transformer_blocks_0_attn_norm_k.w_norm", "single_blocks.0.norm.key_norm"),
        ("sd3", "transformer.transformer_blocks.0.attn2.norm_k.diff", "joint_blocks.0.x_block.attn2.ln_k"),
    ],
)
def test_norms_take_whole_differences(load, name, key, module, tmp_path):
    system = load(name)
    (parameter,) = system.network.get_submodule(module).parameters()
    save_file({key: torch.full_like(parameter, 0.25)}, tmp_path / "norm.safetensors")
    stack(system).attach(tmp_path / "norm.safetensors", 2.0)
    (found,) = system.network.get_submodule(module).parameters()
    torch.testing.assert_close(found.data, parameter + 0.5)


# ------------------------------------------------------------------- text encoders

CLIP, T5 = "text_model.encoder.layers.1.mlp.fc1", "encoder.block.1.layer.0.SelfAttention.q"
BIG = "text_model.encoder.layers.2.self_attn.out_proj"
TEXTS = {
    "flux": {
        "clip_l": [f"lora_te1_{CLIP}", f"lora_te_{CLIP}", f"text_encoder.{CLIP}", f"clip_l.{CLIP}",
                   f"base_model.model.text_encoder.{CLIP}", f"text_encoders.clip_l.transformer.{CLIP}"],
        "t5xxl": [f"lora_te3_{T5}", f"lora_te2_{T5}", f"t5.{T5}", f"text_encoder_2.{T5}",
                  f"text_encoders.t5xxl.transformer.{T5}"],
    },
    "sd3": {
        "clip_l": [f"lora_te1_{CLIP}", f"text_encoder.{CLIP}"],
        "clip_g": [f"lora_te2_{BIG}", f"text_encoder_2.{BIG}", f"clip_g.{BIG}"],
        "t5xxl": [f"lora_te3_{T5}", f"text_encoder_3.{T5}", f"t5.{T5}"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders_are_named_as_programs_name_them(load, name, tmp_path):
    system = load(name)
    for part, spellings in TEXTS[name].items():
        path = next(own for own in (CLIP, BIG, T5) if spellings[0].endswith(own))
        module = system.text_encoder.get_submodule(f"{part}.{path}")
        weight = module.weight
        a, b = lora(weight, 0)
        for spelled in spellings:
            flat = spelled.replace(".", "_") if spelled.startswith("lora_te") else spelled
            save_file({f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}, tmp_path / "x.safetensors")
            report = stack(system).attach(tmp_path / "x.safetensors")
            assert list(report.changes) == [f"text_encoder.{part}"], spelled
            torch.testing.assert_close(module.weight.data, weight + b @ a)
            stack(system).detach()
            assert module.weight is weight


# ------------------------------------------------------------------- several, weights of blocks


def test_several_add_up_in_any_order_and_blocks_have_weights(models, tmp_path):
    folder, network = models("flux")
    one, other = (catalog.load(folder) for _ in range(2))
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    zoo.file(a, {"unet": layers(network, "to_q", "to_v", "proj_mlp")}, zoo.lora, onetrainer)
    zoo.file(b, {"unet": layers(network, "to_k", "to_v", "norm_out.linear")}, zoo.lokr, diffusers)
    blocks = {"single_blocks": 0.0, "double_blocks.1": 2.0}
    before = dict(one.named_parameters())
    stack(one).attach(a, 0.5, blocks)
    stack(one).attach(b, -0.3)
    stack(other).attach(b, -0.3)
    stack(other).attach(a, 0.5, blocks)
    for (key, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=key)
    alone = catalog.load(folder)
    stack(alone).attach(b, -0.3)
    single = "network.single_blocks.0.linear1.weight"
    assert torch.equal(one.get_parameter(single), alone.get_parameter(single))
    double = "network.double_blocks.1.img_attn.qkv.weight"
    assert not torch.equal(one.get_parameter(double), alone.get_parameter(double))
    stack(one).detach("a")
    for p, q in zip(one.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)
    stack(one).detach()
    assert all(parameter is before[key] for key, parameter in one.named_parameters())


# ------------------------------------------------------------------- refusals


def wide(spell: str, width: int, into: int, rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{spell}.lora_down.weight": torch.ones(rank, into), f"{spell}.lora_up.weight": torch.ones(width, rank)}


ATTN2 = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
FILES = {
    "sd1": wide(ATTN2, 1280, 768),
    "sdxl": wide(ATTN2, 1280, 2048),
    "flux-dev": wide("lora_unet_double_blocks_3_img_attn_qkv", 9216, 3072),
    "flux-dev in diffusers' names": wide("transformer.transformer_blocks.3.attn.to_q", 3072, 3072),
    "sd3-medium": wide("lora_unet_joint_blocks_3_x_block_attn_qkv", 4608, 1536),
    "sd3.5-large": wide("transformer.transformer_blocks.37.attn.add_k_proj", 2432, 2432),
    "dit": wide("blocks.3.attn.qkv", 3456, 1152),
}


@pytest.mark.parametrize(("own", "count"), [("flux-dev", 7), ("sdxl", 4), ("sd3-medium", 4)])
def test_a_file_for_another_family_is_refused_by_its_name(own, count, tmp_path):
    system = files.bare(own)
    for name, tensors in list(FILES.items())[:count]:
        made = name.split()[0]
        path = tmp_path / "style.safetensors"
        save_file(tensors, path)
        if made == own:
            assert files.read(path, system).matched == 2
            continue
        with pytest.raises(CheckpointMismatch, match=rf"does not fit {own}: it was made for .*\b{made} \(") as caught:
            files.read(path, system)
        assert "\n" not in str(caught.value)


def test_what_does_not_fit_rows_is_told_with_them(load, tmp_path):
    system = load("flux")
    save_file(wide("transformer.transformer_blocks.1.attn.to_k", 255, 256), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"img_attn.qkv \(rows 256 to 511\), which is \(256, 256\)"):
        stack(system).attach(tmp_path / "x.safetensors")
    both = {"transformer.transformer_blocks.1.attn.to_k": 256, "lora_unet_double_blocks_1_img_attn_qkv": 768}
    tensors = {k: t for spell, width in both.items() for k, t in wide(spell, width, 256).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatch, match="mean the same"):
        stack(system).attach(tmp_path / "x.safetensors")


def test_a_learned_word_is_refused_where_none_is_learned(load, tmp_path):
    save_file({"emb_params": torch.ones(2, 64)}, tmp_path / "word.safetensors")
    with pytest.raises(CheckpointMismatch, match="learned word for CLIP's text encoders, of which those of"):
        stack(load("flux")).attach(tmp_path / "word.safetensors")


# ------------------------------------------------------------------- what diffusers' own loader makes of it


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_loads_the_same(models, name, tmp_path):
    pytest.importorskip("peft")
    import diffusers as theirs

    folder, network = models(name)
    rows = layers(network, "to_q", "to_k", "to_v", "add_k_proj", "proj_mlp", "ff.net.2", "norm1.linear")
    zoo.file(tmp_path / "x.safetensors", {"unet": rows}, zoo.lora, diffusers)
    bare = {k: v for k, v in load_file(tmp_path / "x.safetensors").items() if not k.endswith("alpha")}
    save_file(bare, tmp_path / "x.safetensors")
    pipe = theirs.DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    system = catalog.load(folder)
    stack(system).attach(tmp_path / "x.safetensors")
    assert near(seen(pipe.transformer.base_model if hasattr(pipe.transformer, "peft_type") else pipe.transformer,
                     system.network), seen(pipe.transformer))  # fmt: skip
