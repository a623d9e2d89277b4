"""What other programs call the modules that an adapter changes.

Underscores cannot be parsed back to dots (`to_out_0`, `ff_net_0_proj`), so nobody does: every spelling of every module
is generated from the model, and a file's names are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from limner.checkpoints.unet import ldm_layout
from limner.models.unet import UNet
from limner.text.clip import CLIPTextEncoder, CLIPTowers


@dataclass(frozen=True)
class Spelled:
    """A module of ours, such as `network.mid_block.attentions.0.proj_in`, and the program that spells it so."""

    module: str
    program: str


KOHYA, LYCORIS, DIFFUSERS, EARLY, PEFT, ONETRAINER, OWN = (
    "kohya", "LyCORIS", "diffusers", "early diffusers", "PEFT", "OneTrainer", "its own names",
)  # fmt: skip
NETWORK = {  # prefixes before a path with dots, and before one with underscores
    ".": {
        "unet.": DIFFUSERS, "transformer.": DIFFUSERS, "base_model.model.": PEFT, "base_model.model.unet.": PEFT,
        "": OWN, "network.": OWN, "diffusion_model.": OWN, "model.diffusion_model.": OWN,
    },
    "_": {"lora_unet_": KOHYA, "lora_transformer_": ONETRAINER, "lycoris_": LYCORIS},
}  # fmt: skip
ATTENTION = re.compile(r"(?<=\.attn[12])\.to_(q|k|v|out)(\.0)?$")
TOWER = re.compile(r"(?<=\.self_attn)\.(q|k|v|out)_proj$")


def spellings(system: nn.Module) -> dict[str, Spelled]:
    """Each spelling of each module of `system` (a `DiffusionSystem`) that adapters may change: its network and CLIP's
    towers. A spelling that would mean two modules is left out."""
    table: dict[str, Spelled | None] = {}
    for spelling, found in (*_network(system.network), *_towers(system.text_encoder)):  # type: ignore[arg-type]
        known = table.setdefault(spelling, found)
        if known is not None and known.module != found.module:
            table[spelling] = None
    return {spelling: found for spelling, found in table.items() if found is not None}


def modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside that have a weight of their own, by name."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(getattr(child, "weight", None), nn.Parameter)
    }


def block(module: str) -> str:
    """The block of a module, as reports and weights of blocks name it: `down_blocks.1`, `text_encoder.0`."""
    first, *rest = module.removeprefix("network.").split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() else first


def _network(network: nn.Module) -> Iterator[tuple[str, Spelled]]:
    original = {}
    if isinstance(network, UNet):
        rows = ldm_layout(network.config).items()
        original = {ours.rpartition(".")[0]: place.name.rpartition(".")[0] for ours, place in rows if place.parts == 1}
    for name in modules(network):
        module = f"network.{name}"
        for path in {name, original.get(name, name)}:
            yield from ((prefix + path, Spelled(module, program)) for prefix, program in NETWORK["."].items())
            flat = path.replace(".", "_")
            yield from ((prefix + flat, Spelled(module, program)) for prefix, program in NETWORK["_"].items())
        if ATTENTION.search(name):
            early = ATTENTION.sub(r".processor.to_\1", name)
            yield from ((prefix + early, Spelled(module, EARLY)) for prefix in ("unet.", ""))


def _towers(encoder: nn.Module) -> Iterator[tuple[str, Spelled]]:
    if not isinstance(encoder, CLIPTowers):
        return
    for i, tower in enumerate(encoder):
        assert isinstance(tower, CLIPTextEncoder)
        dotted, flat = {"base_model.model.": PEFT}, {"lycoris_": LYCORIS}
        for number in (i + 1,) if len(encoder) > 1 else (1, 2):  # a lone tower is the refiner's second, too
            last = f"_{number}" if number > 1 else ""
            dotted |= {f"text_encoder{last}.": DIFFUSERS, f"base_model.model.text_encoder{last}.": PEFT}
            dotted[f"{'clip_l' if number == 1 else 'clip_g'}."] = ONETRAINER
            flat[f"lora_te{number}_"] = KOHYA
        flat |= {"lora_te_": KOHYA} if len(encoder) == 1 else {}
        for name in modules(tower):
            module = f"text_encoder.{i}.{name}"
            for path in {name, name.removeprefix("text_model.")}:
                yield from ((prefix + path, Spelled(module, program)) for prefix, program in dotted.items())
                under = path.replace(".", "_")
                yield from ((prefix + under, Spelled(module, program)) for prefix, program in flat.items())
                if TOWER.search(path):
                    early = TOWER.sub(r".to_\1", path)
                    yield from ((prefix + early, Spelled(module, EARLY)) for prefix in dotted)
