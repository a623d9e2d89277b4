"""Models of other programs: what a file is, and one kind of file made of another."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from limner import catalog
from limner.adapters import control, words
from limner.adapters import files as adapters
from limner.adapters.names import block
from limner.adapters.respelling import respelled
from limner.adapters.trainable import METADATA, PROGRAMS
from limner.checkpoints import (
    components,
    estimators,
    files,
    flows,
    folders,
    joint_dit_controlnet,
    layouts,
    pixels,
    single_files,
)
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.quantization import gathered
from limner.errors import CheckpointMismatch, FileProblem, UnknownName, UsageError
from limner.models.flux import Flux, FluxConfig
from limner.models.mmdit import MMDiT
from limner.models.pixels import PixelsConfig
from limner.models.unet import UNetConfig
from limner.nn.quantized import Quantized
from limner.sampling.interpolants import EDMConfig, FlowConfig, VPConfig
from limner.text.labels import LabelsConfig

PARTS = ("network", "autoencoder", "text_encoder")
SEES = {
    "depth": "a depth map (--depth)",
    "picture": "a picture to edit (-i)",
    "hint": "edges or depth to follow (-i)",
    "reference": "a picture to edit, if one is given (-i)",
    "mask": "a mask and what is around it (--mask)",
    "else": "a small picture to enlarge (-i)",
}
CONVERTED = "{} is of {}: only files of Stable Diffusion 1, 2 and XL are converted, and of DDPM and ADM into folders"


def inspect(source: str | Path) -> dict[str, Any]:
    """What a file or folder is, from its header alone: what it can be drawn with, or what it is a part of.

    Raises FileProblem for what is no container of tensors at all.
    """
    path = catalog.find(source)
    told: dict[str, Any] = {"path": str(path), "kind": "folder of diffusers"}
    if path.is_dir():
        found = catalog.recognise(path)
        assert found is not None
        return told | _model(found)
    if learned := words.stored(path):
        return told | {"bytes": path.stat().st_size, "precision": _precision(learned), **_word(learned)}
    tensors, metadata = files.read(path)
    told |= {"bytes": path.stat().st_size, "tensors": len(tensors), "precision": _precision(tensors)}
    if files.CONFIG_KEY in metadata and not control.is_control(tensors):
        config = catalog.parse(files.config_in(metadata, path), path)
        return told | {"kind": "file of limner", "model": config.name, "family": config.family}
    if (run := catalog.run_of(path)) is not None:
        return told | {"kind": "checkpoint of a training run", "needs": f"the run to finish, then -m {run}"}
    told["kind"] = "single file"
    with suppress(CheckpointMismatch):  # which is told below
        tensors = gathered(tensors, metadata, path)
    told["precision"] = _precision(tensors)
    if control.is_control(tensors):
        return told | _control(path, tensors)
    try:
        found = catalog.recognise(path)
        assert found is not None
        return told | _model(found)
    except CheckpointMismatch as error:
        part = components.recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if adapter := _adapter(path):
            return told | {"kind": part.what if part else "adapter", "needs": components.MODEL} | adapter
        if part is None and (maker := estimators.maker_of(path)):
            needs = f"a ControlNet: --control CONTROLNET=IMAGE,{maker}={path.parent}"
            return told | {"kind": f"model that finds {maker} in pictures", "needs": needs}
        if part is None:
            return told | {"kind": "unknown", "first": sorted(tensors)[:3], "problem": str(error)}
        told |= {"kind": part.what, "needs": part.needs or "a program that draws with it", "problem": str(error)}
        return told | _network(path, tensors)


def convert(source: str | Path, target: str | Path) -> tuple[Path, Mapping[str, int]]:
    """Make a single file (`target` ends in .safetensors) or a folder of diffusers of a Stable Diffusion, or a folder of
    a DDPM, Improved DDPM or ADM, whole or not at all. Returns its path, and how many tensors of each kind were left out
    because no program needs them.

    Raises UsageError, FileProblem.
    """
    path, target = catalog.find(source), Path(target)
    try:
        found = catalog.recognise(path)
    except CheckpointMismatch:  # for want of its other parts, perhaps, which would not help
        if path.is_file() and adapters.is_adapter(adapters.contents_of(path)):
            raise UsageError(f"{path} is an adapter: say in whose names, --to kohya, diffusers or comfyui") from None
        if path.is_file() and (alone := flows.alone(files.read(path)[0], path)):
            raise UsageError(CONVERTED.format(path, catalog.config_of(alone).family)) from None
        raise
    if found is None:
        raise UsageError(f"{path} is a file of Limner's own: give a model of another program")
    if target.exists():
        raise FileProblem(f"{target} is there already: give another name")
    if any(isinstance(tensor, Quantized) for tensor in found.tensors.values()):
        raise UsageError(f"{path} is quantised ({_precision(found.tensors)}): give the file that it was made from")
    draws_pixels = isinstance(found.autoencoder, PixelsConfig)
    if not isinstance(found.network, UNetConfig) or (draws_pixels and target.suffix):
        raise UsageError(CONVERTED.format(path, catalog.config_of(found).family))
    catalog.fitted(found)
    if target.suffix == ".safetensors":
        tensors = single_files.export(found)
        _placed(target, lambda temporary: _save(tensors, temporary))
    elif target.suffix:
        raise UsageError(f"cannot write {target}: let the name end in .safetensors, or in no such way for a folder")
    else:
        defaults = catalog.config_of(found).defaults
        whole = replace(found, size=defaults.width, sampler=defaults.sampler, schedule=defaults.schedule)
        _placed(target, lambda temporary: _save_folder(whole, temporary))
    return target, found.beside


def respell(source: str | Path, target: str | Path, spelling: str, model: str | Path | None = None) -> Path:
    """Write an adapter's file (`target` ends in .safetensors) in the names of `spelling`: kohya, diffusers or comfyui,
    whole or not at all. Its `model` is found by its names where it is one of the catalogue's. Returns the path.

    Raises UsageError, UnknownName, FileProblem, CheckpointMismatch.
    """
    path, target = Path(source), Path(target)
    if spelling not in PROGRAMS:
        raise UnknownName("spelling", spelling, PROGRAMS)
    contents = adapters.contents_of(path)
    if not adapters.is_adapter(contents):
        raise UsageError(f"{path} is no adapter: --to is for LoRA and its kin")
    system: Any
    if model is not None:
        system = catalog.skeleton(model)
        adapter = adapters.read(path, system)
    else:
        found = adapters.bases(contents)
        if not found:
            raise UsageError(f"{path} fits no model that Limner knows by itself: name it with -m MODEL")
        system, adapter = adapters.bare(found[0][0]), found[0][1]
    if target.exists():
        raise FileProblem(f"{target} is there already: give another name")
    if target.suffix != ".safetensors":
        raise UsageError(f"cannot write {target}: let the name end in .safetensors")
    tensors, told = respelled(adapter, contents, system, spelling)
    kept = {name: text for name, text in files.read(contents.path)[1].items() if name != METADATA}
    _placed(target, lambda temporary: _save(tensors, temporary, {"format": "pt", **kept, **told}))
    return target


def _model(found: Foreign) -> dict[str, Any]:
    """Of a whole model: what it is like, how large it is and what it draws with."""
    try:
        catalog.fitted(found)
        problem = {}
    except CheckpointMismatch as error:
        problem = {"problem": str(error)}
    return _drawn(found) | {"beside": found.beside} | problem


def _network(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of the network of a Stable Diffusion 3 or a FLUX.1 without its other parts; nothing of any other file."""
    try:
        found = flows.alone(tensors, path)
        if found is None:
            return {}
        with torch.device("meta"):
            network: Any = (Flux if isinstance(found.network, FluxConfig) else MMDiT)(found.network)
        whole = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        layouts.fit(found.layout, whole, found.tensors, f"{path}, read as {catalog.config_of(found).name}")
    except CheckpointMismatch as error:
        return {"problem": str(error)}
    return _drawn(found)


def _drawn(found: Foreign) -> dict[str, Any]:
    """What a model is, how large, and how it is drawn with."""
    config = catalog.config_of(found)
    sizes: Counter[str] = Counter()
    for name, place in found.layout.items():
        held = [found.tensors[one] for one in place.names if one in found.tensors]
        sizes[name.split(".")[0]] += sum(tensor.numel() for tensor in held) // place.parts
    defaults = config.defaults
    return {
        "model": config.name,
        "family": config.family,
        "parameters": {part: sizes[part] for part in PARTS if sizes[part]},
        "precision": _precision(found.tensors),
        "predicts": found.prediction,
        **_sees(found),
        **_noise(found.noise),
        "size": defaults.width,
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        **({"image_guidance": defaults.image_guidance} if defaults.image_guidance != 1 else {}),
        "sampler": defaults.sampler,
        "schedule": defaults.schedule,
        "assumed": list(found.assumed),
    }


def _sees(found: Foreign) -> dict[str, Any]:
    if isinstance(found.text, LabelsConfig):
        return {"classes": found.text.num_classes}
    if not hasattr(found.network, "sees"):
        return {}
    sees = "reference" if found.looks else found.network.sees(found.autoencoder.latent_channels)
    return {"sees": SEES[sees]} if sees else {}


def _noise(noise: VPConfig | EDMConfig | FlowConfig | Literal["flow"]) -> dict[str, Any]:
    if noise == "flow":
        return {"noise": "a flow's"}
    if isinstance(noise, FlowConfig):
        moved = "by the size of the picture" if noise.by_tokens else f"by {noise.shift:g}"
        return {"noise": "a flow's" + f", shifted {moved}" * (noise != FlowConfig())}
    if isinstance(noise, VPConfig):
        return {"timesteps": noise.steps, "zero_snr": noise.zero_snr}
    return {"noise": f"EDM's, {noise.low:g} to {noise.high:g}"}


def _word(learned: Mapping[str, Tensor]) -> dict[str, Any]:
    name = words.base(learned)
    vectors = [str(len(tensor) if tensor.dim() > 1 else 1) for tensor in learned.values()]
    return {"kind": "textual inversion", "needs": components.MODEL, "vectors": vectors, "base": [name] if name else []}


def _control(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a ControlNet or a T2I-Adapter: whose."""
    part = components.recognise({name.removeprefix("control_model."): tuple(t.shape) for name, t in tensors.items()})
    found, problem = control.bases(path, tensors)
    known = part is not None and not joint_dit_controlnet.is_one(tensors)
    told = {"kind": part.what if part and known else "ControlNet", "needs": components.MODEL, "base": found}
    return told | {"hash": files.digest(path)} | ({"problem": problem} if problem else {})


def _adapter(path: Path) -> dict[str, Any]:
    """Of an adapter: what it is made of and for, nothing for another file."""
    contents = adapters.contents_of(path)
    if not adapters.is_adapter(contents):
        return {}
    try:
        found = adapters.bases(contents)
    except CheckpointMismatch as error:
        return {"problem": str(error)}
    if not found:
        return {"problem": "it fits no model that Limner knows"}
    best = found[0][1]
    beside = {"sees": SEES["hint"], "assumed": flows.followed(path)[1]} if best.widens else {}
    return {
        "kind": adapters.CONTROL_LORA if best.widens else "/".join(best.kinds),
        "spelling": "/".join(best.programs),
        "base": [name for name, _ in found],
        "modules": len(best.entries),
        "rank": [str(rank) for rank in best.ranks],
        "alpha": [f"{alpha:g}" for alpha in best.alphas],
        "keys": f"{best.matched} of {best.total} known",
        "blocks": sorted({block(module) for module in best.entries}),
        "hash": best.hash,
        **beside,
    }


def _precision(tensors: Mapping[str, Tensor]) -> str:
    """The types of the numbers, that of the most first."""
    count: Counter[str] = Counter()
    for tensor in tensors.values():
        count[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return ", ".join(name for name, _ in count.most_common())


# -------------------------------------------------------------------- writing


def _placed(target: Path, write: Callable[[Path], None]) -> None:
    """What `write` makes at a temporary place is moved to `target` when it is whole. Raises FileProblem."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", suffix=".tmp") as folder:
            temporary = Path(folder) / target.name
            write(temporary)
            temporary.rename(target)
    except OSError as error:
        raise FileProblem(f"cannot write {target}: {error.strerror or error}; nothing was left behind") from error


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {"format": "pt"}))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _save_folder(found: Foreign, folder: Path) -> None:
    export = pixels.export if isinstance(found.autoencoder, PixelsConfig) else folders.export
    contents, parts = export(found)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
    for name, tensors in parts.items():
        _save(tensors, folder / f"{name}.safetensors")
