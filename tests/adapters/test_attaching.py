"""Adapters on whole models: every spelling and kind draws what diffusers draws with the weights changed by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limner import catalog
from limner.adapters import files
from limner.adapters.attaching import find, stack
from limner.errors import CheckpointMismatch, FileProblem, LimnerError, UsageError
from limner.types import Conditioning
from sweeps import sweep
from systems import stable_diffusion

from . import zoo

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """A folder and the pipeline that diffusers makes of it."""

    def make(name: str) -> tuple[Path, Any]:
        folder = getattr(stable_diffusion, name)(tmp_path_factory.mktemp(name))
        diffusers.utils.logging.set_verbosity_error()
        return folder, diffusers.DiffusionPipeline.from_pretrained(folder)

    return lru_cache(make)


@pytest.fixture
def system(models) -> Any:
    return catalog.load(models("sd1")[0])


def chosen(pipe: Any, part: str, ends: tuple[str, ...] = ATTENTION) -> dict[str, nn.Module]:
    """The modules of a part, by the names that diffusers and transformers have for them."""
    rows = {n: m for n, m in getattr(pipe, part).named_modules() if n.endswith(ends) and hasattr(m, "weight")}
    if part != "unet":  # transformers 5 leaves a level out that all files have
        rows = {
            n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": m for n, m in rows.items()
        }
    return rows


def seen(unet: nn.Module, ours: Any = None) -> torch.Tensor:
    """What a U-Net of SD1's kind says of fixed input."""
    g = torch.Generator().manual_seed(0)
    x, text, t = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 64, generator=g), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        return unet(x, t, text).sample if ours is None else ours.network(x, t, Conditioning(tokens=text))


def states(system: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in system.named_parameters()}


KINDS = {make.__name__: make for make in zoo.CONVOLUTION}


def _usual(spell: Any, make: Any) -> bool:
    """Every kind in one spelling, and one kind in every spelling."""
    return spell is zoo.kohya or make is zoo.lora


@pytest.mark.parametrize(
    ("spell", "make"),
    [*sweep(zoo.SPELLINGS, zoo.LINEAR, fast=_usual), pytest.param(zoo.early, zoo.lora, id="early-lora")],
)
def test_every_kind_in_every_spelling_draws_what_diffusers_draws(models, system, spell, make, tmp_path):
    pipe = models("sd1")[1]
    unet, tower = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    parts = {"unet": unet, "text_encoder": tower}
    holder = type("Parts", (), parts)
    ends = ATTENTION if spell is zoo.early else (*ATTENTION, "proj_in", "conv1", "ff.net.2", "fc1")
    rows = {part: chosen(holder, part, ends) for part in parts if not (part == "text_encoder" and spell is zoo.peft)}
    before, own = seen(unet), states(system)
    kept = zoo.file(tmp_path / "style.safetensors", rows, make, spell)
    report = stack(system).attach(tmp_path / "style.safetensors")
    for (part, name), tensors in kept.items():
        module = rows[part][name]
        told = (
            tensors if "lora_up.weight" not in tensors or "alpha" in tensors else tensors | {"alpha": torch.tensor(3.0)}
        )
        module.weight.data = torch.from_numpy(zoo.changed(make, told, module.weight.data)).float()
        if "diff_b" in tensors and module.bias is not None:
            module.bias.data += tensors["diff_b"]
    wanted = seen(unet)
    assert (wanted - before).abs().max() > 0.01 * before.abs().max()
    assert (seen(unet, system) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    ids = system.text_encoder[0].tokenize(["a red fox"])
    with torch.no_grad():
        theirs, ours = tower(ids).last_hidden_state, system.text_encoder[0](ids).last
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert report.matched == report.total == sum(map(len, kept.values()))
    stack(system).detach()
    assert all(torch.equal(parameter, own[name]) for name, parameter in system.named_parameters())


@pytest.mark.parametrize("make", [zoo.lora_core, zoo.loha_core, zoo.lokr_core], ids=lambda f: f.__name__)
def test_cores_of_convolutions_draw_what_diffusers_draws(models, system, make, tmp_path):
    unet = copy.deepcopy(models("sd1")[1].unet)
    rows = {"unet": chosen(type("Parts", (), {"unet": unet}), "unet", ("conv1", "conv2"))}
    kept = zoo.file(tmp_path / "style.safetensors", rows, make, zoo.kohya)
    for (part, name), tensors in kept.items():
        module = rows[part][name]
        module.weight.data = torch.from_numpy(zoo.changed(make, tensors, module.weight.data)).float()
    stack(system).attach(tmp_path / "style.safetensors")
    wanted = seen(unet)
    assert (seen(unet, system) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["sd2_v", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("original", [False, True], ids=["diffusers' names", "the authors' names"])
def test_all_parts_of_larger_models_take_lora_in_kohyas_spelling(models, name, original, tmp_path):
    """Which for XL has the authors' names of the network; weights are compared one by one."""
    from limner.checkpoints.unet import ldm_layout

    folder, pipe = models(name)
    system = catalog.load(folder)
    places = {k.rpartition(".")[0]: v.name.rpartition(".")[0] for k, v in ldm_layout(system.network.config).items()}
    towers = ["text_encoder", "text_encoder_2"][: len(system.text_encoder)]
    tensors, wanted = {}, {}
    generator = torch.Generator().manual_seed(0)
    for part in ("unet", *towers):
        for path, module in chosen(pipe, part, (*ATTENTION, "proj_out", "conv2", "fc2", "text_projection")).items():
            made = zoo.lora(module.weight.detach(), generator)
            number = f"{1 + towers.index(part)}" * (name == "sdxl") if part != "unet" else ""
            prefix = "lora_unet_" if part == "unet" else f"lora_te{number}_"
            spelled = places[path] if part == "unet" and original else path
            tensors |= {f"{prefix}{spelled.replace('.', '_')}.{k}": v for k, v in made.items()}
            ours = f"network.{path}" if part == "unet" else f"text_encoder.{towers.index(part)}.{path}"
            wanted[f"{ours}.weight"] = torch.from_numpy(zoo.changed(zoo.lora, made, module.weight.detach())).float()
    save_file(tensors, tmp_path / "style.safetensors")
    own = states(system)
    stack(system).attach(tmp_path / "style.safetensors")
    for key, parameter in system.named_parameters():
        expected = wanted.get(key, own[key])
        assert (parameter - expected).abs().max() <= 1e-5 * expected.abs().max(), key
    assert len(wanted) > 20


# ------------------------------------------------------------------- on and off


@pytest.fixture
def style(models, tmp_path) -> Callable[..., Path]:
    """A LoRA of the network's attention."""

    def make(name: str = "style", rank: int = 3, seed: int = 5, dtype: torch.dtype = torch.float32) -> Path:
        tensors, generator = {}, torch.Generator().manual_seed(seed)
        for path, module in chosen(models("sd1")[1], "unet").items():
            made = zoo.lora(module.weight.detach(), generator, rank)
            tensors |= {zoo.kohya("unet", path, k): v.to(dtype) for k, v in made.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return make


def test_what_was_attached_leaves_the_very_tensors(system, style):
    before = dict(system.named_parameters())
    adapters = stack(system)
    for name in ("a", "b", "c"):
        adapters.attach(style(name, seed=ord(name)), weight=0.7)
    assert sum(p is not before[name] for name, p in system.named_parameters()) > 10
    for name in ("b", "a", "c"):
        adapters.detach(name)
    assert all(parameter is before[name] for name, parameter in system.named_parameters())
    assert adapters.settings() == []


def test_weights_add_up_in_any_order_and_one_taken_off_was_never_there(models, style):
    folder = models("sd1")[0]
    one, other, third = (catalog.load(folder) for _ in range(3))
    a, b, c = (style(name, seed=ord(name)) for name in "abc")
    for system, rows in (
        (one, ((a, 0.5), (b, -0.3))),
        (other, ((b, -0.3), (a, 0.5))),
        (third, ((a, 0.5), (c, 2.0), (b, -0.3))),
    ):
        for path, weight in rows:
            stack(system).attach(path, weight)
    stack(third).detach("c")
    for p, q, r in zip(one.parameters(), other.parameters(), third.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert torch.equal(p, r)
    base = catalog.load(folder)
    key = "network.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    delta = [_delta(load_file(path)) for path in (a, b)]
    wanted = base.get_parameter(key) + 0.5 * delta[0] - 0.3 * delta[1]
    torch.testing.assert_close(one.get_parameter(key).data, wanted)


def _delta(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    down, up, alpha = (
        tensors[f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.{k}"]
        for k in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    return alpha / len(down) * up @ down


def test_a_file_is_not_changed_by_its_use(models, system, style, tmp_path):
    """A whole difference in float32 is used as it lies in the file, and again when another adapter comes."""
    rows = {"unet": chosen(models("sd1")[1], "unet", ("attn1.to_q",))}
    zoo.file(tmp_path / "full.safetensors", rows, zoo.full, zoo.kohya)
    stack(system).attach(tmp_path / "full.safetensors", 0.5)
    once = states(system)
    stack(system).attach(style(), 0)
    assert all(torch.equal(parameter, once[name]) for name, parameter in system.named_parameters())


def test_half_precision_rounds_once(models, style):
    """Ten adapters of which each alone is lost in the rounding of float16 are not lost together."""
    folder = models("sd1")[0]
    system, exact = catalog.load(folder), catalog.load(folder)
    system.network.half()
    exact.network.load_state_dict({k: v.float() for k, v in system.network.state_dict().items()})
    for n in range(10):
        for each in (system, exact):
            stack(each).attach(style(f"s{n}", seed=1), weight=1e-4)
    key = "network.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(system.get_parameter(key), exact.get_parameter(key).half())
    assert system.get_parameter(key).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_in_other_precisions_are_read(system, style, dtype):
    assert stack(system).attach(style(dtype=dtype)).changes


def test_blocks_have_weights_of_their_own(models, system, style):
    own, path = states(system), style()
    adapters = stack(system)
    adapters.attach(
        path,
        0.5,
        blocks={"down_blocks": 0, "down_blocks.0.attentions.0.transformer_blocks.0.attn2": 2, "mid_block": -1},
    )
    full = catalog.load(models("sd1")[0])
    stack(full).attach(path)
    for key, parameter in system.named_parameters():
        factor = 0.5
        if "network.down_blocks" in key:
            factor = 1.0 if "down_blocks.0.attentions.0.transformer_blocks.0.attn2" in key else 0.0
        factor = -0.5 if "mid_block" in key else factor
        wanted = own[key] + factor * (full.get_parameter(key) - own[key])
        torch.testing.assert_close(parameter.data, wanted, rtol=1e-5, atol=1e-6)
    assert adapters.settings()[0]["blocks"]["mid_block"] == -1


def test_the_report_measures_each_block(system, style):
    own, report = states(system), stack(system).attach(style(), weight=0.25)
    assert set(report.changes) == {"down_blocks.0", "mid_block", "up_blocks.1"}
    keys = [key for key in own if "network.mid_block" in key and any(f"{end}.weight" in key for end in ATTENTION)]
    change = sum((system.get_parameter(key) - own[key]).square().sum().item() for key in keys)
    weight = sum(own[key].square().sum().item() for key in keys)
    assert report.changes["mid_block"] == pytest.approx((change / weight) ** 0.5 / 0.25, rel=1e-4)
    assert (report.kinds, report.programs, report.ranks) == (("LoRA",), ("kohya",), (3,))
    assert str(report).startswith("style: LoRA in the names of kohya, rank 3, ")


def test_icons_take_lora_by_its_own_names(tiny_model, tmp_path):
    for prefix in ("", "network.", "base_model.model.", "transformer."):
        system = catalog.load(tiny_model)
        weight = system.network.blocks[1].qkv.weight
        a, b = torch.randn(4, weight.shape[1]), torch.randn(len(weight), 4)
        path = tmp_path / "style.safetensors"
        save_file({f"{prefix}blocks.1.qkv.lora_A.weight": a, f"{prefix}blocks.1.qkv.lora_B.weight": b}, path)
        report = stack(system).attach(path)
        torch.testing.assert_close(system.network.blocks[1].qkv.weight.data, weight + b @ a)
        assert list(report.changes) == ["blocks.1"]


# ------------------------------------------------------------------- PEFT's settings


def test_the_alpha_of_a_file_of_diffusers_is_in_its_metadata(models, system, tmp_path):
    rows = {"unet": chosen(models("sd1")[1], "unet", ("attn1.to_q", "attn2.to_k"))}
    kept = zoo.file(tmp_path / "x.safetensors", rows, zoo.lora, zoo.diffusers)
    bare = {k: v for k, v in load_file(tmp_path / "x.safetensors").items() if not k.endswith("alpha")}
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn2.to_k": 1.5}, "unet.use_rslora": True}
    save_file(bare, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    own = states(system)
    stack(system).attach(tmp_path / "x.safetensors")
    for (_, path), tensors in kept.items():
        alpha = 1.5 if path.endswith("attn2.to_k") else 6
        delta = tensors["lora_up.weight"] @ tensors["lora_down.weight"] * alpha / 3**0.5
        key = f"network.{path}.weight"
        torch.testing.assert_close(system.get_parameter(key).data, own[key] + delta)


def test_the_alpha_of_a_folder_of_peft_is_beside_it(models, system, tmp_path):
    rows = {"unet": chosen(models("sd1")[1], "unet", ("attn1.to_q",))}
    folder = tmp_path / "style"
    folder.mkdir()
    kept = zoo.file(folder / "adapter_model.safetensors", rows, zoo.lora, zoo.peft)
    bare = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if not k.endswith("alpha")}
    save_file(bare, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 12}))
    own, report = states(system), stack(system).attach(folder)
    (_, path), tensors = next(iter(kept.items()))
    delta = 4 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    torch.testing.assert_close(
        system.get_parameter(f"network.{path}.weight").data, own[f"network.{path}.weight"] + delta
    )
    assert report.name == "style"


# ------------------------------------------------------------------- refusals


def refused(system: Any, path: Path, *words: str, kind: type[LimnerError] = FileProblem, **told: Any) -> str:
    before = dict(system.named_parameters())
    with pytest.raises(kind) as caught:
        stack(system).attach(path, **told)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, message
    assert all(word in message for word in words), message
    assert all(parameter is before[name] for name, parameter in system.named_parameters())
    assert not stack(system).on
    return message


def attention_lora(
    width: int, text: int, spell: str = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
) -> dict:
    return {f"{spell}.lora_down.weight": torch.ones(4, text), f"{spell}.lora_up.weight": torch.ones(width, 4)}


@pytest.mark.parametrize(
    ("base", "tensors"),
    [
        ("sd1", attention_lora(1280, 768)),
        ("sd2", attention_lora(1280, 1024)),
        ("sdxl", attention_lora(1280, 2048)),
        ("sdxl", attention_lora(1280, 2048, "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k")),
        ("sdxl-refiner", attention_lora(1536, 1280)),
        (
            "icons",
            {"blocks.9.qkv.lora_A.weight": torch.ones(2, 512), "blocks.9.qkv.lora_B.weight": torch.ones(1536, 2)},
        ),
    ],
)
def test_a_file_for_another_model_is_refused_by_its_name(system, base, tensors, tmp_path):
    save_file(tensors, tmp_path / "style.safetensors")
    system.name = "sd2" if base == "sd1" else "sd1"
    refused(system, tmp_path / "style.safetensors", "style.safetensors", f"made for {base} (", kind=CheckpointMismatch)
    assert [name for name, _ in files.bases(files.contents_of(tmp_path / "style.safetensors"))] == [base]


def change(path: Path, **changes: Any) -> None:
    tensors = load_file(path)
    first = next(key for key in tensors if key.endswith("attn1_to_q.lora_down.weight"))
    stem = first.removesuffix(".lora_down.weight")
    for ending, value in changes.items():
        key = f"{stem}.{ending.replace('__', '.')}"
        if value is None:
            tensors.pop(key)
        else:
            tensors[key] = value(tensors.get(key)) if callable(value) else value
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


HOSTILE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "alpha NaN": ({"alpha": torch.tensor(float("nan"))}, ("alpha is nan", "one number")),
    "alpha infinite": ({"alpha": torch.tensor(float("inf"))}, ("alpha is inf",)),
    "alpha large": ({"alpha": torch.tensor(1e9)}, ("alpha is 1000000000.0", "up to 1e+06")),
    "alpha of many": ({"alpha": torch.ones(3)}, ("alpha is of shape (3,)",)),
    "no up": ({"lora_up__weight": None}, ("attn1_to_q.", "not one of LoRA")),
    "rank 0": ({"lora_down__weight": lambda t: t[:0], "lora_up__weight": lambda t: t[:, :0]}, ("has rank 0",)),
    "rank 10^6": (
        {
            "lora_down__weight": lambda t: torch.zeros(10**6, 1).half(),
            "lora_up__weight": lambda t: torch.zeros(1, 10**6).half(),
        },
        ("has rank 1000000", "16384"),
    ),
    "ranks apart": (
        {"lora_down__weight": lambda t: t[:1]},
        ("lora_down.weight (1, 32)", "does not fit network.", "(32, 32)"),
    ),
    "another width": ({"lora_up__weight": lambda t: t[:5]}, ("(5, 3)", "does not fit network.", "it makes (5, 32)")),
    "flat": ({"lora_up__weight": lambda t: t[0]}, ("does not fit",)),
    "a scalar": ({"lora_up__weight": lambda t: t[0, 0]}, ("lora_up.weight is one number",)),
    "deep": ({"lora_up__weight": lambda t: t[None]}, ("does not fit",)),
    "whole numbers": ({"lora_up__weight": lambda t: t.to(torch.int32)}, ("lora_up.weight is of torch.int32",)),
    "complex": ({"lora_up__weight": lambda t: t.to(torch.complex64)}, ("lora_up.weight is of torch.complex64",)),
    "NaN inside": ({"lora_up__weight": lambda t: t * float("nan")}, ("attn1_to_q.", "is no number (NaN)")),
    "too large for float32": ({"lora_up__weight": lambda t: t * 1e38 * 1e3}, ("is no number",)),
    "twice": ({"lora_B__weight": lambda t: torch.ones(32, 3)}, ("mean the same",)),
    "two kinds": ({"hada_w1_a": lambda t: torch.ones(32, 3)}, ("not one of LoRA",)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_parts_are_refused_by_key(system, style, name):
    path = style()
    changes, words = HOSTILE[name]
    change(path, **changes)
    refused(system, path, "style.safetensors", *words)


def test_unknown_keys_are_refused_with_the_nearest_or_told_if_few(system, style):
    path = style()
    tensors = load_file(path)
    save_file(tensors | {"lora_unet_mid_block_attentions_0_proj_inn.alpha": torch.tensor(1.0)}, path)
    report = stack(system).attach(path)
    assert report.unknown == ("lora_unet_mid_block_attentions_0_proj_inn.alpha",)
    assert report.matched == report.total - 1
    stack(system).detach()
    save_file({k.replace("attn2_to_k", "attn2_to_key"): v for k, v in tensors.items()}, path)
    refused(system, path, "attn2_to_key.", "nearest: lora_unet_", "attn2_to_k.alpha", f"of its {len(tensors)} keys")


def test_an_adapter_that_does_nothing_is_refused(system, style):
    path = style()
    save_file({k: v * ("lora_up" not in k) for k, v in load_file(path).items()}, path)
    refused(system, path, "would do nothing")


def test_what_is_no_adapter_is_refused(system, models, tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    refused(system, tmp_path / "a.safetensors", "is no adapter", "a.weight")
    whole = models("sd1")[0] / "unet" / "diffusion_pytorch_model.safetensors"
    refused(system, whole, "is no adapter")
    refused(system, tmp_path / "missing.safetensors", "no file")
    refused(system, tmp_path, "is a folder")


def test_a_name_that_no_model_knows_is_looked_at_once(system, tmp_path, monkeypatch):
    """However many models are asked whether it is theirs: files can have very many names."""
    path, seen, split = tmp_path / "many.safetensors", [], files.split
    save_file({f"lora_unet_nothing_{k}.lora_down.weight": torch.zeros(1) for k in range(50)}, path)
    monkeypatch.setattr(files, "split", lambda key, names: seen.append(key) or split(key, names))
    with pytest.raises(CheckpointMismatch, match="50 of its 50 keys mean no module"):
        stack(system).attach(path)
    assert len(seen) == 50


def test_torn_files_are_refused(system, style):
    data = style().read_bytes()
    for torn in (b"", data[:7], data[:100], data[:-1], data + b"x", b"\x80\x04x", b"PK\x03\x04" + data):
        path = style()
        path.write_bytes(torn)
        refused(system, path, "style.safetensors")


@pytest.mark.parametrize(
    "settings",
    ["x", "[]", "[" * 100_000, json.dumps({"unet.lora_alpha": "1"}), json.dumps({"unet.lora_alpha": True}),
     json.dumps({"unet.lora_alpha": 1e30}), json.dumps({"unet.alpha_pattern": {"to_q": None}, "unet.lora_alpha": 1})],
    ids=lambda s: s[:30],
)  # fmt: skip
def test_hostile_settings_of_peft_are_refused(models, system, settings, tmp_path):
    path = tmp_path / "x.safetensors"
    zoo.file(path, {"unet": chosen(models("sd1")[1], "unet", ("attn1.to_q",))}, zoo.lora, zoo.diffusers)
    bare = {k: v for k, v in load_file(path).items() if not k.endswith("alpha")}
    save_file(bare, path, {"lora_adapter_metadata": settings})
    refused(system, path, "x.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 101, True, "1", None])
def test_weights_that_cannot_be_are_refused(system, style, value):
    refused(system, style(), "weight of style", kind=UsageError, weight=value)
    refused(system, style(), "mid_block of style", kind=UsageError, blocks={"mid_block": value})


def test_other_slips_are_refused(system, style):
    path = style()
    refused(system, path, "no block 'midblock'", "mid_block", kind=UsageError, blocks={"midblock": 1})
    with pytest.raises(UsageError, match="takes no adapters"):
        stack(catalog.build(catalog.entry("icons-autoencoder-tiny").config))
    stack(system).attach(path)
    with pytest.raises(UsageError, match="attached already"):
        stack(system).attach(path)
    with pytest.raises(UsageError, match="no adapter 'stile' is attached; attached: style"):
        stack(system).detach("stile")


def test_a_name_finds_a_file_and_leads_nowhere_else(style, tmp_path):
    path = style()
    (tmp_path / "inner").mkdir()
    assert find("style", (tmp_path / "inner", tmp_path)) == path
    for name in ("../style", "inner/../style", str(path.with_suffix("")), "..", "", "stile", "a\\style"):
        assert find(name, (tmp_path / "inner", tmp_path)) is None, name
