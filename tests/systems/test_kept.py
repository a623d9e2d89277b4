"""What a drawing keeps of its words: keys and values, computed once, and the same bits as if they were not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adapters import zoo
from limner import pipeline
from limner.models.ip_adapter import IPAdapter, attentions
from limner.models.unet import DownPath
from limner.types import Conditioning, Reference
from sweeps import sweep

from . import stable_diffusion
from .test_control import picture, theirs


class Words(nn.Module):
    count = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory, sd1_folder) -> dict[str, Any]:
    return pipelines(tmp_path_factory, sd1_folder, "cpu")


def pipelines(tmp_path_factory, sd1_folder, device: str) -> dict[str, Any]:
    """Pipelines of every kind, and what is put beside them."""
    folder = tmp_path_factory.mktemp("kept")
    paths = {"sd1": sd1_folder}
    for kind in ("sdxl", "sdxl_refiner", "lcm"):
        paths[kind] = getattr(stable_diffusion, kind)(tmp_path_factory.mktemp(kind))
    found: dict[str, Any] = {kind: pipeline.load(path, device, dtype="fp32") for kind, path in paths.items()}
    found["refined"] = pipeline.load(paths["sdxl"], device, dtype="fp32", refiner=paths["sdxl_refiner"])
    theirs("sd1", 5).save_pretrained(folder / "net")
    modules = attentions(found["sd1"].system.network)
    rows = {f"{name}.{part}": getattr(module, part) for name, module in modules.items() for part in ("to_k", "to_v")}
    zoo.file(folder / "style.safetensors", {"unet": rows}, zoo.lora, zoo.diffusers)
    widths = [module.to_k.out_features for module in modules.values()]
    network = stable_diffusion.noised(IPAdapter(Words(), widths, 64), seed=7)
    words = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(8))
    words = words.to(device)
    shown = Reference(network, words[:1], words[1:], weight=0.7, blocks={"mid_block": 0.0})
    return found | {"net": folder / "net", "lora": folder / "style.safetensors", "shown": shown}


LONG = ", ".join(f"a red fox number {n}" for n in range(30))
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("sd1", "a red fox", {}),
    "unguided": ("sd1", "a red fox", {"guidance": 1.0}),
    "at some levels": ("sd1", "a red fox", {"guidance_interval": (0.3, 0.8)}),
    "a change": ("sd1", "[a red fox:a blue whale:0.5]", {}),
    "taking turns": ("sd1", "a [red|blue] fox", {}),
    "regions": ("sd1", "a red fox AND a blue whale:0.7", {}),
    "chunks": ("sd1", LONG, {"batch": 2}),
    "chunks with a mask": ("sd1", LONG, {"prompt_dialect": "comfyui"}),
    "turns of a batch": ("sd1", "{a red fox|a whale}", {"batch": 10, "steps": 2}),
    "perturbed": ("sd1", "a red fox", {"pag_scale": 3.0}),
    "two calls a step": ("sd1", "a red fox", {"sampler": "heun"}),
    "lora": ("sd1", "a red fox", {"lora": "lora"}),
    "control": ("sd1", "a red fox", {"control": [{"weight": 0.7}]}),
    "guesses": ("sd1", "a red fox", {"control": [{"weight": 0.7, "guess": True, "end": 0.6}]}),
    "a picture as words": ("sd1", "a red fox", {"ip_adapter": "shown", "control": [{"weight": 0.7}]}),
    "second pass": ("sd1", "a red fox", {"hires": 2.0, "hires_steps": 3}),
    "sizes": ("sdxl", "a red fox", {}),
    "sizes of the refiner": ("refined", "a red fox", {"steps": 8}),
    "told guidance": ("lcm", "a red fox", {}),
    "tiles": ("sd1", "a red fox", {"width": 128, "tile": 64}),
}


ALIKE = ("unguided", "at some levels", "taking turns", "guesses", "sizes of the refiner", "second pass")


def drawn(made: dict[str, Any], way: str) -> list[bytes]:
    kind, prompt, told = WAYS[way]
    told = dict(told)
    if "lora" in told:
        told["lora"] = [made["lora"]]
    if "control" in told:
        told["control"] = [{"file": made["net"], "image": picture(), **row} for row in told["control"]]
    if "ip_adapter" in told:
        told["ip_adapter"] = [made["shown"]]
    asked = {"seed": 3, "steps": 4, "guidance": 5.0, "sampler": "euler", "negative": "dull"}
    return [one.image.tobytes() for one in made[kind].generate(prompt, **asked | told)]


@pytest.mark.parametrize("way", sweep(WAYS, fast=lambda way: way not in ALIKE))
@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_changes_no_bit(made, way, monkeypatch):
    calls: list[int] = []
    keep = Conditioning.keep
    monkeypatch.setattr(Conditioning, "keep", lambda *told: (calls.append(1), keep(*told))[1])
    kept = drawn(made, way)
    assert calls
    monkeypatch.setattr(Conditioning, "keep", lambda self, key, make: make())
    assert drawn(made, way) == kept


def counts(made: dict[str, Any], way: str, modules: list[nn.Module]) -> list[int]:
    calls: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in modules]
    drawn(made, way)
    for handle in handles:
        handle.remove()
    return [calls.count(module) for module in modules]


@pytest.mark.parametrize(
    ("way", "times"),
    [("plain", 1), ("unguided", 1), ("at some levels", 2), ("a change", 2), ("regions", 3), ("two calls a step", 1),
     ("turns of a batch", 2), ("second pass", 2), ("lora", 1)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_keys_and_values_are_computed_once_for_each_conditioning(made, way, times):
    modules = [part for one in attentions(made["sd1"].system.network).values() for part in (one.to_k, one.to_v)]
    assert counts(made, way, modules) == [times] * len(modules)


@pytest.mark.parametrize(
    ("way", "told", "times"),
    [("plain", {}, 1), ("at some levels", {}, 2), ("two calls a step", {}, 1), ("second pass", {}, 2),
     ("plain", {"image": "picture"}, 1), ("plain", {"sampler": "dpm2", "steps": 3}, 3), ("tiles", {}, 1)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_times_are_embedded_once_a_drawing_and_only_those_between_the_steps_by_themselves(
    made, way, told, times, monkeypatch
):
    kind, prompt, asked = WAYS[way]
    monkeypatch.setitem(
        WAYS, way, (kind, prompt, asked | {k: picture() if k == "image" else v for k, v in told.items()})
    )
    network = made["sd1"].system.network
    modules = [network.time_embedding, *(block.time_emb_proj for block in network.resblocks)]
    assert counts(made, way, modules) == [times] * len(modules)


@pytest.mark.filterwarnings("ignore")
def test_a_control_embeds_the_times_once_too(made, monkeypatch):
    whose, times = [], DownPath.times
    monkeypatch.setattr(DownPath, "times", lambda self, *told: (whose.append(type(self)), times(self, *told))[1])
    drawn(made, "control")
    assert sorted(one.__name__ for one in whose) == ["ControlNet", "UNet"]


@pytest.mark.filterwarnings("ignore")
def test_sizes_and_pictures_as_words_are_read_once(made):
    assert counts(made, "sizes", [made["sdxl"].system.network.add_embedding]) == [1]
    first, *_, last = made["shown"].network.layers
    assert list(attentions(made["sd1"].system.network))[-1].startswith("mid_block")  # of weight 0
    assert counts(made, "a picture as words", [first["to_v_ip"], last["to_k_ip"]]) == [1, 0]


def test_adapters_between_two_drawings_are_seen(made):
    before = drawn(made, "plain")
    made["sd1"].attach(made["lora"])
    after = drawn(made, "plain")
    made["sd1"].detach()
    assert after == drawn(made, "lora") != before == drawn(made, "plain")


def test_nothing_is_kept_unless_asked_for_or_of_another_conditioning():
    cond = Conditioning(torch.zeros(2, 3, 4))
    assert [cond.keep("key", object) is cond.keep("key", object), cond.kept] == [False, None]
    kept = Conditioning(torch.zeros(2, 3, 4), kept={})
    assert kept.keep("key", object) is kept.keep("key", object)
    assert kept.map(lambda v: v + 1).kept is None
    assert Conditioning.cat([kept, kept]).kept is None
