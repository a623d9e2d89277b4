"""ControlNets and T2I-Adapters on a system: the network in a file, and a picture that it tells the system's of."""

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

from limner import catalog, hints, metadata, pictures
from limner.adapters import asking, makers
from limner.adapters.attaching import check_weights, stack
from limner.adapters.files import BASES, bare, name_of
from limner.checkpoints import (
    controlnet,
    files,
    flow_controlnets,
    folders,
    joint_dit_controlnet,
    parts,
    t2i_adapter,
)
from limner.checkpoints.components import UNETS
from limner.errors import Assumed, CheckpointMismatch, FileProblem, LimnerError, UnknownName, UsageError
from limner.models.controlnet import KINDS, ControlNet
from limner.models.flux import FluxConfig
from limner.models.flux_controlnet import FluxControlNet
from limner.models.joint_dit import JointDiTConfig
from limner.models.joint_dit_controlnet import JointDiTControlNet
from limner.models.mmdit import MMDiTConfig
from limner.models.mmdit_controlnet import MMDiTControlNet
from limner.models.t2i_adapter import T2IAdapter
from limner.models.unet import UNet, UNetConfig
from limner.types import Control, Reference

MOST_KEPT = 4
"""Networks that a system keeps for the next picture."""
MAKES = {maker: maker for maker in hints.MAKERS if maker in KINDS} | {
    "sobel": "softedge", "blur": "tile", "invert": "lineart", "depth": "depth", "pose": "pose",
}  # fmt: skip
"""The kind of picture that a maker makes, to a union that has none of its name."""
KIND = {"--control": "ControlNet", "--ip-adapter": "IP-Adapter"}
Network = ControlNet | T2IAdapter | FluxControlNet | MMDiTControlNet | JointDiTControlNet
Base = UNetConfig | FluxConfig | MMDiTConfig | JointDiTConfig


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
    """The ControlNet or T2I-Adapter in a file or a folder of diffusers, or of the name of one that ships
    (`catalog.CONTROLS`), and the picture it is told, which `maker`, one of `limner.hints.MAKERS`, makes of `image`;
    without, `image` is that picture. `depth` and `pose` are found through `maker_model`: a folder of transformers, a
    file beside its config.json, or hf:owner/name. A union is told its `kind`, one of `limner.models.controlnet.KINDS`,
    or of `flux_controlnet.KINDS` for FLUX.1, which follows from `maker` if there is one.

    Raises FileProblem, CheckpointMismatch for one of another model, ImageProblem, UsageError, UnknownName.
    """
    path = catalog.shipped(str(file)) or Path(file)
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
    if kinds := getattr(network, "kinds", {}):
        kind = _kind(path, kinds, kind or (maker if maker in kinds else MAKES.get(maker, "")), bool(kind))
    elif kind:
        raise UsageError(f"{path.name} knows one kind of picture: leave kind={kind} out")
    if guess and not isinstance(network, ControlNet):
        if isinstance(network, T2IAdapter):
            raise UsageError(f"{path.name} is a T2I-Adapter, and only ControlNets guess")
        raise UsageError(
            f"{path.name} is a ControlNet of {system.family}, and only those of U-Nets guess: leave guess out"
        )
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
    union = " (union)" if getattr(control.network, "kinds", {}) else ""
    what = "T2I-Adapter" if isinstance(control.network, T2IAdapter) else f"ControlNet{union}"
    sees = f"{control.maker} of a picture" if control.maker else "a picture"
    sees += f" as {control.maker_name} finds it" if control.maker_name else ""
    sees += f" of {control.kind}" if control.kind not in ("", control.maker) else ""
    when = "" if (control.start, control.end) == (0, 1) else f", from {control.start:g} to {control.end:g} of the steps"
    return f"{control.name}: {what} by {control.weight:g}, told {sees}{when}{', guessing' * control.guess}"


def is_control(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors of these names are of a network that is read here."""
    ends = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
    of_unet = any(name.endswith(ends) for name in tensors) or t2i_adapter.is_one(tensors)
    return of_unet or bool(flow_controlnets.family(tensors)) or joint_dit_controlnet.is_one(tensors)


def bases(path: Path, tensors: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """The models of the catalogue that a network with these tensors fits, and why it fits none."""
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    found, problem = [], ""
    rows: list[tuple[str, Base, Mapping[str, Tensor], int]] = []
    ours, its = joint_dit_controlnet.is_one(tensors), flow_controlnets.family(tensors)
    if ours or its:
        kind = JointDiTConfig if ours else FluxConfig if its == flow_controlnets.FLUX else MMDiTConfig
        for config in (e.config for e in sorted(catalog.entries(), key=lambda e: e.name.endswith("-tiny"))):
            if isinstance(config, catalog.DiffusionConfig) and isinstance(config.network, kind):
                rows.append((config.name, config.network, {}, config.autoencoder.factor))
    else:
        systems: dict[str, Any] = {name: bare(name) for name in BASES}
        for name, system in systems.items():
            if isinstance(network := system.network, UNet):
                rows.append((name, network.config, network.state_dict(), system.grid))
    for name, base, own, factor in rows:
        try:
            with warnings.catch_warnings(action="ignore"):
                _read(path, meta, base, own, factor)
            found.append(name)
        except LimnerError as error:
            problem = problem or str(error)
    return found, "" if found else problem


def _kind(path: Path, known: Mapping[str, int], kind: str, said: bool) -> str:
    """`kind`, which was `said` or is what a maker makes."""
    if not kind or (kind not in known and not said):
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
    path: Path,
    tensors: Mapping[str, Tensor],
    base: Base,
    own: Mapping[str, Tensor],
    factor: int,
    settings: Mapping[str, Any] | None = None,
) -> Network:
    try:
        if isinstance(base, JointDiTConfig) or joint_dit_controlnet.is_one(tensors):
            return joint_dit_controlnet.read(parts.weights(path)[0], base, factor)
        if not isinstance(base, UNetConfig):
            return flow_controlnets.read(path, tensors, base, factor, settings or {})
        if its := flow_controlnets.family(tensors):
            mine = UNETS.get(base.text_width, "a model of a U-Net")
            raise CheckpointMismatch(f"{path} is a ControlNet of {its}, this is {mine}: take one made for it")
        if t2i_adapter.is_one(tensors):
            return t2i_adapter.read(path, tensors, base, factor)
        return controlnet.read(path, tensors, base, own)
    except (IndexError, TypeError, ValueError, ZeroDivisionError, UsageError) as error:
        raise CheckpointMismatch(f"{path} is like a ControlNet, but its shapes do not fit together") from error


def _network(system: Any, path: Path) -> tuple[Network, str]:
    """The network, and the hash of its file."""
    base: Any = getattr(system, "network", None)
    adapters = stack(system)
    config = getattr(base, "config", None)
    if not isinstance(config, Base):
        raise UsageError(f"{system.name} takes no ControlNets: those are for Stable Diffusion, FLUX.1 and icons")
    if getattr(system, "enlarges", 1) > 1:
        raise UsageError(f"{system.name} takes no ControlNets: it follows the picture that it enlarges")
    settings = folders.Settings(path / "config.json").values if path.is_dir() else {}
    paths = parts.weights(path)
    try:
        key = ((str(path), 0), *((str(p), p.stat().st_mtime_ns) for p in paths))  # a folder says more than its file
    except OSError as error:
        raise FileProblem(f"no file {str(path)!r:.200}: give the path of a ControlNet") from error
    if key not in adapters.controls:
        tensors = files.read_all(paths)
        if isinstance(config, UNetConfig):
            config = replace(config, guidance_width=0)
        own = adapters.bare("network") if isinstance(config, UNetConfig) else {}
        network = _read(path, tensors, config, own, system.grid, settings)
        if isinstance(network, ControlNet):
            _settle(network, path, settings)
        elif isinstance(network, T2IAdapter) and settings.get("downscale_factor", network.config.fold) != (
            network.config.fold
        ):
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
