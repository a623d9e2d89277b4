"""ControlNets and T2I-Adapters on a system: the network in a file, and a picture that it tells the U-Net of."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from limner import hints, metadata, pictures
from limner.adapters import asking, makers
from limner.adapters.attaching import check_weights, stack
from limner.adapters.files import BASES, bare, name_of
from limner.checkpoints import controlnet, files, folders, parts, t2i_adapter
from limner.errors import Assumed, CheckpointMismatch, FileProblem, LimnerError, UnknownName, UsageError
from limner.models.controlnet import KINDS, ControlNet, ControlNetUnion
from limner.models.t2i_adapter import T2IAdapter
from limner.models.unet import UNet, UNetConfig
from limner.types import Control, Reference

MOST_KEPT = 4
"""Networks that a system keeps for the next picture."""
MAKES = {maker: maker for maker in hints.MAKERS if maker in KINDS} | {
    "sobel": "softedge", "blur": "tile", "invert": "lineart", "depth": "depth", "pose": "pose",
}  # fmt: skip
"""The kind of picture that a maker makes."""
KIND = {"--control": "ControlNet", "--ip-adapter": "IP-Adapter"}
Network = ControlNet | T2IAdapter


def open_control(
    system: Any,
    file: str | Path,
    image: str | Path | Image.Image,
    weight: float = 1.0,
    *,
    start: float = 0.0,
    end: float = 1.0,
    guess: bool = False,
    maker: str = "",
    maker_model: str | Path | None = None,
    kind: str = "",
) -> Control:
    """The ControlNet or T2I-Adapter in a file or a folder of diffusers and the picture it is told, which `maker`, one
    of `limner.hints.MAKERS`, makes of `image`; without, `image` is that picture. `depth` and `pose` are found through
    `maker_model`: a folder of transformers, a file beside its config.json, or hf:owner/name. A union is told its
    `kind`, one of `limner.models.controlnet.KINDS`, which follows from `maker` if there is one.

    Raises FileProblem, CheckpointMismatch for one of another model, ImageProblem, UsageError, UnknownName.
    """
    path = Path(file)
    check_weights(path.name, weight)
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in (start, end)) or not 0 <= start < end <= 1:
        raise UsageError(f"{path.name} is told from {start!r:.40} to {end!r:.40}: give rising numbers from 0 to 1")
    if maker:
        hints.known(maker, maker_model is not None)
    elif maker_model is not None:
        raise UsageError(
            f"{str(maker_model)!r:.80} is a model of which maker? Say maker= {' or '.join(hints.WITH_MODELS)}"
        )
    if problem := metadata.misnamed(name_of(path)):
        raise UsageError(f"{name_of(path)!r:.60} cannot be remembered by a picture ({problem}): rename it")
    network, found = _network(system, path)
    if isinstance(network, ControlNetUnion):
        kind = _kind(path, network, kind or MAKES.get(maker, ""))
    elif kind:
        raise UsageError(f"{path.name} knows one kind of picture: leave kind={kind} out")
    if guess and isinstance(network, T2IAdapter):
        raise UsageError(f"{path.name} is a T2I-Adapter, and only ControlNets guess")
    picture = pictures.open_image(image)
    finder = None if maker_model is None else makers.open_finder(stack(system).finders, maker, maker_model)
    guess = guess or (isinstance(network, ControlNet) and network.pooled)
    return Control(
        network,
        picture,
        float(weight),
        float(start),
        float(end),
        guess,
        name_of(path),
        found,
        maker,
        kind,
        pictures.digest(picture),
        finder,
        finder.name if finder else "",
        finder.hash if finder else "",
    )


def opened(system: Any, asked: str | Sequence[Any]) -> tuple[Control, ...]:
    """Each of what a program asks for as control: a Control, the text that `parse` reads, or arguments of
    `open_control`, as keywords or as (file, image) and perhaps a weight."""
    return asking.opened("control", asked, Control, parse, partial(open_control, system))


def parse(text: str) -> dict[str, Any]:
    """FILE=IMAGE[:WEIGHT][,canny][,depth=MODEL][,start=0.2][,end=0.8][,kind=depth][,guess] as keywords of
    `open_control`. Raises UsageError."""
    file, rest = asking.with_picture(text, "canny.safetensors=edges.png:0.8")
    told: dict[str, Any] = {"file": file}
    image, comma, options = rest, "", ""
    if not os.path.exists(rest):  # noqa: PTH110 (Path's may raise)
        image, comma, options = rest.partition(",")
        before, colon, number = image.rpartition(":")
        if colon and not os.path.exists(image) and "/" not in number and "\\" not in number:  # noqa: PTH110
            image, told["weight"] = before, _fraction(text, number)
    told["image"] = image
    for option in options.split(",") if comma else ():
        name, equals, value = option.strip().partition("=")
        if name in ("start", "end") and equals:
            told[name] = _fraction(text, value)
        elif name == "kind" and equals:
            told[name] = value
        elif name == "guess" and not equals:
            told["guess"] = True
        elif (equals and name in hints.WITH_MODELS) or (
            not equals and name in (*hints.MAKERS, *hints.WITH_MODELS, *hints.NEED_MODELS)
        ):
            if "maker" in told:
                raise UsageError(
                    f"{text!r:.120} asks for {told['maker']} and {name} of one picture: give one, or --control twice"
                )
            told |= {"maker": name} | ({"maker_model": value} if equals else {})
        else:
            found = (f"{name}=MODEL" for name in hints.WITH_MODELS)
            known = ("start=0.2", "end=0.8", "kind=depth", "guess", *hints.MAKERS, *found)
            raise UnknownName("option of --control", option, known)
    return told


def resolve(
    asked: Sequence[dict[str, Any]], remembered: Sequence[Mapping[str, Any]], flag: str = "--control"
) -> list[dict[str, Any]]:
    """What is asked for, with what a picture remembers of a file of the same name where nothing else is said. Raises
    UsageError where the picture remembers one that is not asked for: it does not hold its picture."""
    rest, found = list(remembered), []
    for one in asked:
        old = next((row for row in rest if row["name"] == name_of(Path(one["file"]))), None)
        if old is not None:
            rest.remove(old)
            maker = old.get("maker")
            if maker in hints.WITH_MODELS and "maker_model" not in one and one.get("maker", maker) == maker:
                raise UsageError(
                    f"painted after the {maker} that the model {old.get('maker_name', '?')!r} (hash "
                    f"{old.get('maker_hash', '?')}) finds, which the picture does not hold: add ,{maker}=MODEL to "
                    f"{flag} {old['name']}=IMAGE"
                )
        kept = ["weight", "start", "end", "guess", "maker", "blocks"]
        kept += [] if "maker" in one else ["kind"]  # which follows from another maker
        found.append({name: old[name] for name in kept if old and name in old} | one)
    if rest:
        raise UsageError(
            f"painted with the {KIND[flag]} {rest[0]['name']!r} (hash {rest[0]['hash']}) and a picture, which is not "
            f"held: add {flag} FILE=IMAGE"
        )
    return found


def differing(controls: Sequence[Control | Reference], remembered: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each file or picture that is not the one remembered."""
    told, rest = [], list(remembered)
    for one in controls:
        old = next((row for row in rest if row["name"] == one.name), None)
        if old is None:
            continue
        rest.remove(old)
        rows = [("file", "hash", one.hash), ("picture", "image_hash", one.image_hash)]
        if isinstance(one, Control) and one.finder is not None and one.maker == old.get("maker"):
            rows.append((f"model of {one.maker}", "maker_hash", one.maker_hash))
        for what, key, mine in rows:
            its = old.get(key, "?")
            if its != "?" and not mine.startswith(its) and not its.startswith(mine):
                told.append(
                    f"the {what} of {one.name} is not the one painted with (hash {its}): expect another picture"
                )
    return told


def report(control: Control) -> str:
    """In one line, what a control does."""
    what = {ControlNetUnion: "ControlNet (union)", T2IAdapter: "T2I-Adapter"}.get(type(control.network), "ControlNet")
    sees = f"{control.maker} of a picture" if control.maker else "a picture"
    sees += f" as {control.maker_name} finds it" if control.maker_name else ""
    sees += f" of {control.kind}" if control.kind not in ("", control.maker) else ""
    when = "" if (control.start, control.end) == (0, 1) else f", from {control.start:g} to {control.end:g} of the steps"
    return f"{control.name}: {what} by {control.weight:g}, told {sees}{when}{', guessing' * control.guess}"


def is_control(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors of these names are of a network that is read here."""
    ends = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
    return any(name.endswith(ends) for name in tensors) or t2i_adapter.is_one(tensors)


def bases(path: Path, tensors: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """The models of the catalogue that a network with these tensors fits, and why it fits none."""
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    found, problem = [], ""
    for name in BASES:
        system: Any = bare(name)
        if isinstance(system.network, UNet):
            try:
                with warnings.catch_warnings(action="ignore"):
                    _read(path, meta, system.network.config, system.network.state_dict(), system.grid)
                found.append(name)
            except LimnerError as error:
                problem = problem or str(error)
    return found, "" if found else problem


def _kind(path: Path, network: ControlNetUnion, kind: str) -> str:
    known = [name for name, number in KINDS.items() if number < len(network.task_embedding)]
    if not kind:
        raise UsageError(f"{path.name} knows several kinds of pictures: say which, kind={' or '.join(known)}")
    if kind not in known:
        raise UnknownName("kind of picture", kind, known)
    return kind


def _fraction(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise UsageError(
            f"{text!r:.200}: {number!r:.50} is no number; give FILE=IMAGE:0.8, or FILE=IMAGE:0.8,end=0.7"
        ) from error


def _read(
    path: Path, tensors: Mapping[str, Tensor], base: UNetConfig, own: Mapping[str, Tensor], factor: int
) -> Network:
    try:
        if t2i_adapter.is_one(tensors):
            return t2i_adapter.read(path, tensors, base, factor)
        return controlnet.read(path, tensors, base, own)
    except (IndexError, TypeError, ValueError, ZeroDivisionError, UsageError) as error:
        raise CheckpointMismatch(f"{path} is like a ControlNet, but its shapes do not fit together") from error


def _network(system: Any, path: Path) -> tuple[Network, str]:
    """The network, and the hash of its file."""
    base, adapters = getattr(system, "network", None), stack(system)
    if not isinstance(base, UNet):
        raise UsageError(f"{system.name} takes no ControlNets: those are for U-Nets, such as Stable Diffusion's")
    if getattr(system, "enlarges", 1) > 1:
        raise UsageError(f"{system.name} takes no ControlNets: it follows the picture that it enlarges")
    settings = folders.Settings(path / "config.json").values if path.is_dir() else {}
    paths = parts.weights(path)
    try:
        key = tuple((str(p), p.stat().st_mtime_ns) for p in paths)
    except OSError as error:
        raise FileProblem(f"no file {str(path)!r:.200}: give the path of a ControlNet") from error
    if key not in adapters.controls:
        tensors = files.read_all(paths)
        network = _read(path, tensors, replace(base.config, guidance_width=0), adapters.bare("network"), system.grid)
        if isinstance(network, ControlNet):
            _settle(network, path, settings)
        elif settings.get("downscale_factor", network.config.fold) != network.config.fold:
            raise CheckpointMismatch(f"{path}: its downscale_factor is not that of its weights")
        if len(adapters.controls) >= MOST_KEPT:
            adapters.controls.pop(next(iter(adapters.controls)))
        adapters.controls[key] = network, files.digest(*paths)
    network, found = adapters.controls[key]
    like = next(base.parameters())
    return network.to(like.device, like.dtype), found


def _settle(network: ControlNet, path: Path, settings: Mapping[str, Any]) -> None:
    """What no tensor tells."""
    network.pooled = bool(settings.get("global_pool_conditions", False))
    if not settings and "shuffle" in path.stem:
        network.pooled = True
        warnings.warn(f"{path}: its name says that it shuffles, so it tells of the picture as a whole", Assumed, 2)
    if settings.get("controlnet_conditioning_channel_order", "rgb") == "bgr":
        first = network.controlnet_cond_embedding.conv_in
        first.weight.data = first.weight.data.flip(1)
