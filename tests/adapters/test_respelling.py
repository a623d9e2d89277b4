"""Adapters in the names of other programs: the same numbers there and back, and nothing lost unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner import exchange
from limner.adapters import files
from limner.adapters.attaching import difference
from limner.adapters.names import modules
from limner.adapters.respelling import respelled
from limner.catalog import build
from limner.catalog import entry as row
from limner.errors import UsageError

from . import zoo

KINDS = {make.__name__: make for make in zoo.CONVOLUTION}
SD1 = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1")
HELD = {"lora", "dora"}
"""What diffusers' names hold."""


@pytest.fixture(scope="module")
def systems() -> dict[str, Any]:
    torch.manual_seed(0)
    made = {name: build(row(f"{name}-tiny").config) for name in ("sd1", "flux", "sd3", "sdxl")}
    for system in made.values():
        for parameter in system.network.parameters():
            parameter.data.normal_()
    return made


def written(path: Path, tensors: dict[str, Tensor], told: dict[str, str] | None = None) -> files.Contents:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, told)
    return files.contents_of(path)


def turned(system: Any, contents: files.Contents, spelling: str, path: Path) -> files.Contents:
    """The same in another spelling, which does the same."""
    adapter = files.read(contents.path, system)
    found = written(path, *respelled(adapter, contents, system, spelling))
    again = files.read(path, system)
    assert again.matched == again.total
    assert again.entries.keys() == adapter.entries.keys()
    for module in adapter.entries:
        own = files.base(system.get_submodule(module))
        before, after = difference(adapter, module, own), difference(again, module, own)
        assert before.keys() == after.keys()
        assert all((before[k] - after[k]).abs().max() <= 1e-6 * before[k].abs().max() for k in before)
    return found


def same(one: files.Contents, other: files.Contents) -> bool:
    a, b = one.tensors, other.tensors
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_there_and_back_or_is_refused(systems, kind, tmp_path):
    system = systems["sd1"]
    rows = {"unet": {name: system.network.get_submodule(name) for name in SD1[kind.endswith("core") :]}}
    zoo.file(tmp_path / "own.safetensors", rows, KINDS[kind], zoo.kohya, dtype=torch.float16)
    contents = files.contents_of(tmp_path / "own.safetensors")
    for spelling in ("comfyui", "diffusers"):
        if spelling == "diffusers" and kind not in HELD:
            with pytest.raises(UsageError, match="diffusers has no place for "):
                respelled(files.read(contents.path, system), contents, system, spelling)
            continue
        there = turned(system, contents, spelling, tmp_path / f"{spelling}.safetensors")
        assert not there.tensors.keys() & contents.tensors.keys()
        back = turned(system, there, "kohya", tmp_path / f"back-{spelling}.safetensors")
        alphas = [name for name in contents.tensors if name.endswith(".alpha")]
        if spelling == "diffusers":  # which keeps alphas as numbers
            assert all(back.tensors[name] == contents.tensors[name] for name in alphas)
            back = files.Contents(back.path, {**back.tensors, **{name: contents.tensors[name] for name in alphas}})
        assert same(back, contents)


@pytest.mark.parametrize("name", ["flux", "sd3", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_one_matrix_here_and_several_there_is_cut_and_joined(systems, name, kind, tmp_path):
    system = systems[name]
    shapes = modules(system.network)
    chosen = [path for path in shapes if path.endswith(("qkv", "linear1", "to_q")) and "_block" in path][:3]
    assert chosen
    rows = {"unet": {path: shapes[path] for path in chosen}}
    zoo.file(
        tmp_path / "own.safetensors", rows, KINDS[kind], lambda part, path, ending: f"diffusion_model.{path}.{ending}"
    )
    own = turned(system, files.contents_of(tmp_path / "own.safetensors"), "comfyui", tmp_path / "own2.safetensors")
    apart = turned(system, own, "diffusers", tmp_path / "apart.safetensors")
    assert len(apart.tensors) >= len(own.tensors) - len(chosen)
    assert same(turned(system, apart, "comfyui", tmp_path / "again.safetensors"), own)
    if name != "flux" or kind != "lora":
        return
    with torch.no_grad():  # first factors of their own
        unlike = {k: t + i * t if k.endswith("lora_A.weight") else t for i, (k, t) in enumerate(apart.tensors.items())}
    with safe_open(apart.path, "pt") as file:
        told = file.metadata()
    apart = written(tmp_path / "unlike.safetensors", unlike, told)
    joined = turned(system, apart, "kohya", tmp_path / "joined.safetensors")
    assert max(len(t) for k, t in joined.tensors.items() if k.endswith("down.weight")) > 3
    assert same(turned(system, joined, "diffusers", tmp_path / "cut.safetensors"), apart)


def test_parts_of_a_matrix_that_are_not_alike_are_refused(systems, tmp_path):
    system = systems["flux"]
    head = "transformer.transformer_blocks.0.attn"
    low = {f"{head}.{n}.lora_A.weight": torch.ones(r, 64) for n, r in (("to_q", 2), ("to_k", 4))}
    up = {f"{head}.{n}.lora_B.weight": torch.ones(64, r) for n, r in (("to_q", 2), ("to_k", 4))}
    alphas = {f"{head}.{n}.alpha": torch.tensor(2.0) for n in ("to_q", "to_k")}
    contents = written(tmp_path / "a.safetensors", low | up | alphas)
    with pytest.raises(UsageError, match="not alike"):
        respelled(files.read(contents.path, system), contents, system, "kohya")
    contents = written(tmp_path / "b.safetensors", low | up)
    turned(system, contents, "comfyui", tmp_path / "c.safetensors")


def test_halves_that_lie_the_other_way_round_are_turned(systems, tmp_path):
    system, name = systems["flux"], "transformer.norm_out.linear"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_A.weight": zoo.noise(generator, 2, 64),
        f"{name}.lora_B.weight": zoo.noise(generator, 128, 2),
    }
    there = turned(system, written(tmp_path / "a.safetensors", tensors), "kohya", tmp_path / "b.safetensors")
    up = there.tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(up, torch.cat(tensors[f"{name}.lora_B.weight"].chunk(2)[::-1]))


@pytest.mark.parametrize("spelling", ["kohya", "comfyui"])
def test_the_command_writes_the_file_and_keeps_what_it_says_of_itself(limner, here, tiny_model, spelling):
    name = {"kohya": "lora_unet_blocks_0_qkv", "comfyui": "diffusion_model.blocks.0.qkv"}[spelling]
    tensors = {
        "lycoris_blocks_0_qkv.lora_down.weight": torch.ones(2, 64),
        "lycoris_blocks_0_qkv.alpha": torch.tensor(1.0),
    }
    save_file(
        tensors | {"lycoris_blocks_0_qkv.lora_up.weight": torch.ones(192, 2)}, "a.safetensors", {"ss_tags": "fox"}
    )
    done = limner("convert", "a.safetensors", "b.safetensors", "--to", spelling, "-m", tiny_model)
    assert (done.code, done.out) == (0, "b.safetensors\n"), done.err
    assert f"{name}.lora_down.weight" in load_file("b.safetensors")
    with safe_open("b.safetensors", "pt") as file:
        assert file.metadata()["ss_tags"] == "fox"
    for asked, why in (
        (("b.safetensors", "--to", spelling, "-m", tiny_model), "is there already"),
        (("c", "--to", spelling, "-m", tiny_model), "let the name end in .safetensors"),
        (("c.safetensors", "--to", "a1111", "-m", tiny_model), "no spelling 'a1111'"),
        (("c.safetensors", "--to", "diffusers", "-m", tiny_model), "diffusers has no name for network.blocks.0.qkv"),
        (("c.safetensors", "-m", tiny_model), "give --to"),
        (("c.safetensors",), "say in whose names, --to"),
    ):
        done = limner("convert", "a.safetensors", *asked)
        assert done.code in (2, 3), asked
        assert why in done.err, asked
    assert {path.name for path in here.iterdir()} == {"a.safetensors", "b.safetensors"}


@pytest.mark.slow
def test_a_file_of_a_model_that_is_known_needs_no_name_of_it(tmp_path):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 1280), f"{name}.lora_up.weight": torch.ones(1280, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    exchange.respell(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert load_file(tmp_path / "b.safetensors").keys() == {f"{path}.lora_A.weight", f"{path}.lora_B.weight"}
    save_file({"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(UsageError, match="fits no model that Limner knows by itself"):
        exchange.respell(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "diffusers")


def test_what_means_nothing_is_not_lost_unsaid(systems, tmp_path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 64, 3, 3), f"{name}.lora_up.weight": torch.ones(64, 2, 1, 1)}
    contents = written(tmp_path / "a.safetensors", tensors | {"lora_unet_elsewhere.alpha": torch.tensor(1.0)})
    adapter, _ = files.survey(contents, systems["sd1"])
    with pytest.raises(UsageError, match=r"1 tensors that mean nothing in sd1-tiny, and would be lost: .*elsewhere"):
        respelled(adapter, contents, systems["sd1"], "comfyui")
