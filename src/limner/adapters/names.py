"""What other programs call the modules that an adapter changes.

Underscores cannot be parsed back to dots (`to_out_0`, `ff_net_0_proj`), so nobody does: every spelling of every module
is generated from the model, and a file's names are looked up. Where another program keeps apart what is one matrix here
(queries, keys and values of a transformer), its names mean rows of ours.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from limner.checkpoints import dit, flux, mmdit
from limner.checkpoints.layouts import Layout, Place
from limner.checkpoints.unet import ldm_layout
from limner.models.dit import DiT
from limner.models.flux import Flux
from limner.models.mmdit import MMDiT
from limner.models.unet import UNet
from limner.text.clip import CLIPTowers
from limner.text.joined import JoinedText


@dataclass(frozen=True)
class Spelled:
    """A module of ours, such as `network.mid_block.attentions.0.proj_in`, and the program that spells it so. With
    `rows` it is of these rows of the module's weight and bias alone, the last not included; if `swapped`, that program
    has the halves of them the other way round."""

    module: str
    program: str
    rows: tuple[int, int] | None = None
    swapped: bool = False

    @property
    def place(self) -> tuple[str, tuple[int, int] | None, bool]:
        """What is meant, whoever spells it."""
        return self.module, self.rows, self.swapped


KOHYA, LYCORIS, DIFFUSERS, EARLY, PEFT, ONETRAINER, XLABS, COMFYUI, OWN = (
    "kohya", "LyCORIS", "diffusers", "early diffusers", "PEFT", "OneTrainer", "XLabs", "ComfyUI", "the model",
)  # fmt: skip
KEYS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "up_bias": "lora_up.bias",
    "dora": "dora_scale", "blocks": "oft_blocks", "tk2": "lokr_t2", "rows": "weight", "columns": "weight",
    **{part: f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"k{part}": f"lokr_w{part}" for part in ("1", "1_a", "1_b", "2", "2_a", "2_b")},
    **{part: f"{part}.weight" for part in ("a1", "a2", "b1", "b2")},
    **{part: part for part in ("rescale", "w_norm", "b_norm", "diff", "diff_b")},
}  # fmt: skip
"""part -> how kohya's programs, LyCORIS and ComfyUI name it."""
DIFFUSERS_KEYS = {
    "down": "lora_A.weight", "up": "lora_B.weight", "up_bias": "lora_B.bias", "dora": "lora_magnitude_vector"
}  # fmt: skip
NETWORK = {  # prefixes before a path with dots, and before one with underscores
    ".": {
        "unet.": DIFFUSERS, "transformer.": DIFFUSERS, "base_model.model.": PEFT, "base_model.model.unet.": PEFT,
        "": OWN, "network.": OWN, "diffusion_model.": COMFYUI, "model.diffusion_model.": OWN,
    },
    "_": {"lora_unet_": KOHYA, "lora_transformer_": ONETRAINER, "lycoris_": LYCORIS},
}  # fmt: skip
ATTENTION = re.compile(r"(?<=\.attn[12])\.to_(q|k|v|out)(\.0)?$")
TOWER = re.compile(r"(?<=\.self_attn)\.(q|k|v|out)_proj$")
XLABS_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
}
"""In `double_blocks.0.processor`; in single blocks `qkv_lora` and `proj_lora`, of whose names the end is a LoRA's."""
WEIGHTS = ("weight", "scale")
"""What the weight of a module may be called."""
T5 = "t5xxl"


def spellings(system: nn.Module) -> dict[str, Spelled]:
    """Each spelling of each module of `system` (a `DiffusionSystem`) that adapters may change: its network and its text
    encoders. A spelling that would mean two is left out."""
    table: dict[str, Spelled | None] = {}
    for spelling, found in (*_network(system.network), *_towers(system.text_encoder)):  # type: ignore[arg-type]
        known = table.setdefault(spelling, found)
        if known is not None and known.place != found.place:
            table[spelling] = None
    return {spelling: found for spelling, found in table.items() if found is not None}


@dataclass(frozen=True)
class Written:
    """What a program calls a module, or `rows` of one, in its files; a 1 x 1 convolution there if `convolution`."""

    name: str
    rows: tuple[int, int] | None = None
    convolution: bool = False


def written(system: Any, program: str) -> dict[str, list[Written]]:
    """How kohya's programs, diffusers or ComfyUI name each module that adapters change, to write a file: one name, or
    one for each rows of what they keep apart."""
    network, encoder = system.network, system.text_encoder
    of_unet = isinstance(network, UNet)
    layout = {ours.removesuffix(".weight"): p for ours, p in _layout(network).items() if ours.endswith(".weight")}
    original = program == COMFYUI or (program == KOHYA and of_unet and bool(network.config.vector_width))
    start = {KOHYA: "lora_unet_", COMFYUI: "diffusion_model.", DIFFUSERS: "unet." if of_unet else "transformer."}
    found: dict[str, list[Written]] = {}
    for name in modules(network):
        place = layout.get(name)
        rows = [Written(name, convolution=place is not None and place.kept == "1x1")]
        if of_unet and original:
            rows = [] if place is None else [replace(rows[0], name=place.name.removesuffix(".weight"))]
        elif not of_unet and program == DIFFUSERS:
            rows = [] if place is None or place.kept == "swapped" or place.parts > 1 else _apart(place)
        if rows:
            found[f"network.{name}"] = [replace(row, name=start[program] + row.name) for row in rows]
    towers = dict(encoder.named_children()) if isinstance(encoder, CLIPTowers | JoinedText) else {}
    for i, (ours, tower) in enumerate(towers.items()):
        number = "" if len(towers) == 1 else "3" if ours == T5 else str(i + 1)
        theirs = ours if isinstance(encoder, JoinedText) else ("clip_l", "clip_g")[i]
        last = f"_{i + 1}" if i else ""
        start = {
            KOHYA: f"lora_te{number}_",
            COMFYUI: f"text_encoders.{theirs}.transformer.",
            DIFFUSERS: f"text_encoder{last}.",
        }
        for name in modules(tower):
            found[f"text_encoder.{ours}.{name}"] = [Written(start[program] + name)]
    if program == KOHYA:
        found = {name: [replace(row, name=row.name.replace(".", "_")) for row in rows] for name, rows in found.items()}
    return found


def _apart(place: Place) -> list[Written]:
    """The modules of another program that are one of ours."""
    names = [name.removesuffix(".weight") for name in place.names]
    if not place.then:
        return [Written(names[0])]
    ends = list(itertools.accumulate(place.rows))
    return [Written(name, (end - rows, end)) for name, rows, end in zip(names, place.rows, ends, strict=True)]


def modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside that have a weight of their own, quantised or not, by name."""
    return {
        name: child
        for name, child in module.named_modules()
        if any(isinstance(getattr(child, weight, None), nn.Parameter) for weight in WEIGHTS)
        or bool(getattr(child, "code", ""))
    }


def block(module: str) -> str:
    """The block of a module, as reports and weights of blocks name it: `down_blocks.1`, `text_encoder.0`."""
    first, *rest = module.removeprefix("network.").split(".")
    return f"{first}.{rest[0]}" if rest and (rest[0].isdecimal() or first == "text_encoder") else first


def _network(network: nn.Module) -> Iterator[tuple[str, Spelled]]:
    for path, found in dict.fromkeys(_paths(network)):
        flat = path.replace(".", "_")
        for sign, spelled in ((".", path), ("_", flat)):
            for prefix, program in NETWORK[sign].items():
                yield prefix + spelled, replace(found, program=found.program or program)
    for path, found in _processors(network):
        yield from ((prefix + path, found) for prefix in ("", "unet.", "diffusion_model."))


def _paths(network: nn.Module) -> Iterator[tuple[str, Spelled]]:
    """What programs call each module or rows of it after their prefix, which tells the program where nothing does."""
    for name, child in modules(network).items():
        yield name, Spelled(f"network.{name}", "")
        if hasattr(child, "scale"):  # which programs name in full that know weights by no other name
            yield f"{name}.scale", Spelled(f"network.{name}", "")
    for ours, place in _layout(network).items():
        name, _, tensor = ours.rpartition(".")
        if tensor not in WEIGHTS or place.parts > 1:
            continue
        module, end = f"network.{name}", 0
        for i, theirs in enumerate(place.names):
            rows = (end, end := end + place.rows[i]) if place.then else None
            yield theirs.rpartition(".")[0], Spelled(module, "", rows, place.kept == "swapped")
            if rows:
                yield f"{name}.{i}", Spelled(module, ONETRAINER, rows)


def _layout(network: nn.Module) -> Layout:
    """Our name of a tensor -> its place in the files of the other program that trains adapters of such networks."""
    if isinstance(network, UNet):
        return ldm_layout(network.config)
    if isinstance(network, Flux):
        return flux.diffusers_layout(network.config)
    if isinstance(network, MMDiT):
        return mmdit.diffusers_layout(network.config)
    if isinstance(network, DiT):  # whose other blocks have copies of what embeds the time and the class in the first
        rows = dit.diffusers_layout(network.config).items()
        return {ours: place for ours, place in rows if ".emb." not in place.name}
    return {}


def _processors(network: nn.Module) -> Iterator[tuple[str, Spelled]]:
    """Names that have a processor in them, as attention had in early diffusers and in XLabs' programs."""
    if isinstance(network, Flux):
        for i in range(network.config.depth):
            for theirs, ours in XLABS_DOUBLE.items():
                yield f"double_blocks.{i}.processor.{theirs}", Spelled(f"network.double_blocks.{i}.{ours}", XLABS)
        for i in range(network.config.depth_single):
            ours, theirs = f"network.single_blocks.{i}", f"single_blocks.{i}.processor"
            yield f"{theirs}.qkv", Spelled(f"{ours}.linear1", XLABS, (0, 3 * network.config.width))
            yield f"{theirs}.proj", Spelled(f"{ours}.linear2", XLABS)
        return
    for name in modules(network):
        if ATTENTION.search(name):
            yield ATTENTION.sub(r".processor.to_\1", name), Spelled(f"network.{name}", EARLY)


def _towers(encoder: nn.Module) -> Iterator[tuple[str, Spelled]]:
    towers: list[tuple[str, nn.Module, tuple[int, ...]]] = []  # and the numbers that programs give them
    if isinstance(encoder, CLIPTowers):
        alone = len(encoder) == 1  # a lone tower is the refiner's second, too
        towers = [(f"{i}", tower, (1, 2) if alone else (i + 1,)) for i, tower in enumerate(encoder)]
    elif isinstance(encoder, JoinedText):
        alone = "clip_g" not in dict(encoder.named_children())
        numbers = {"clip_l": (1,), "clip_g": (2,), T5: (2, 3) if alone else (3,)}  # kohya's has 3 even if it is second
        towers = [(name, tower, numbers[name]) for name, tower in encoder.named_children()]
    for ours, tower, numbered in towers:
        dotted, flat = {"base_model.model.": PEFT}, {"lycoris_": LYCORIS}
        for number in numbered:
            last = f"_{number}" if number > 1 else ""
            dotted |= {f"text_encoder{last}.": DIFFUSERS, f"base_model.model.text_encoder{last}.": PEFT}
            flat[f"lora_te{number}_"] = KOHYA
        names = ("t5", T5) if ours == T5 else [("clip_l", "clip_g")[number - 1] for number in numbered]
        dotted |= {f"{name}.": ONETRAINER for name in names}
        dotted |= {f"text_encoders.{name}.transformer.": COMFYUI for name in names}
        flat |= {"lora_te_": KOHYA} if alone and ours != T5 else {}
        for name in modules(tower):
            module = f"text_encoder.{ours}.{name}"
            for path in {name, name.removeprefix("text_model.")}:
                yield from ((prefix + path, Spelled(module, program)) for prefix, program in dotted.items())
                under = path.replace(".", "_")
                yield from ((prefix + under, Spelled(module, program)) for prefix, program in flat.items())
                if TOWER.search(path):
                    early = TOWER.sub(r".to_\1", path)
                    yield from ((prefix + early, Spelled(module, EARLY)) for prefix in dotted)
