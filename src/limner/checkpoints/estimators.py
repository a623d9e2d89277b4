"""Networks that find depth or a pose in a picture, in folders of transformers: config.json tells their sizes,
preprocessor_config.json how a picture is shown to them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn

from limner.checkpoints import layouts, parts
from limner.checkpoints.files import assign
from limner.checkpoints.folders import Settings
from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.models.depth_anything import DepthAnything, DepthAnythingConfig, Sight
from limner.models.dinov2 import DINOv2Config
from limner.models.vitpose import JOINTS, Colours, ViTPose, ViTPoseConfig

CONFIG, SHOWN = "config.json", "preprocessor_config.json"
MOST_LAYERS, MOST_PIXELS = 100, 2048
M = TypeVar("M", bound=nn.Module)


def read_depth(path: Path) -> DepthAnything:
    """The Depth Anything in a folder, or in a file beside its config.json. Raises FileProblem, CheckpointMismatch."""
    settings = _settings(path, "depth", "depth_anything")
    eye = _eye(settings, "dinov2", {"use_swiglu_ffn": False, "apply_layernorm": True})
    metric = settings.take("depth_estimation_type", "relative")
    if metric not in ("relative", "metric"):
        raise settings.wrong("depth_estimation_type", metric)
    if (at := settings.values.get("head_in_index", -1)) != -1:
        raise settings.wrong("head_in_index", at)
    patch = settings.each("patch_size", 2, 14, most=MOST_PIXELS)
    factors = settings.values.get("reassemble_factors") or [4, 2, 1, 0.5]
    if not isinstance(factors, list) or not all(_number(f) and 0 < f <= 32 for f in factors):
        raise settings.wrong("reassemble_factors", factors)
    reach = settings.values.get("max_depth") or 1
    if not _number(reach) or not 0 < reach <= 1e6:
        raise settings.wrong("max_depth", reach)
    seen, sight = _shown(path), Sight()
    if seen is not None:
        sight = Sight(
            size=_size(seen, sight.size), multiple=seen.each("ensure_multiple_of", 1, sight.multiple)[0],
            keeps_shape=_flag(seen, "keep_aspect_ratio", True), resample=_resample(seen), **_colours(seen),
        )  # fmt: skip
        _fixed(seen, {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False})
    tensors = parts.read(path)
    token = "backbone.embeddings.mask_token" in tensors

    def make() -> DepthAnything:
        config = DINOv2Config(**_sizes(eye, 1e-6), size=_square(eye, "image_size", 518), patch=patch[0], masked=token)
        if _square(eye, "patch_size", 14) != patch[0] or patch[0] != patch[1] or sight.multiple % patch[0]:
            raise UsageError(f"its patches are {patch[0]} pixels, and those of its backbone or its pictures are not")
        return DepthAnything(
            DepthAnythingConfig(
                eye=config, layers=_layers(eye, config.depth), factors=tuple(factors), metric=metric == "metric",
                widths=settings.each("neck_hidden_sizes", None, [48, 96, 192, 384]), reach=float(reach),
                fusion=settings.each("fusion_hidden_size", 1, 64)[0], head=settings.each("head_hidden_size", 1, 32)[0],
            ), sight,
        )  # fmt: skip

    return _filled(path, settings, make, tensors, "Depth Anything")


def read_pose(path: Path) -> ViTPose:
    """As `read_depth` of ViTPose."""
    settings = _settings(path, "pose", "vitpose")
    eye = _eye(settings, "vitpose_backbone", {})
    if (experts := eye.values.get("num_experts") or 1) != 1:
        raise CheckpointMismatch(
            f"{eye.path}: num_experts is {experts!r:.40}: ViTPose+ with its mixture of experts is not read, take a "
            "plain one such as usyd-community/vitpose-base-simple"
        )
    tensors = parts.read(path)
    if "head.conv.weight" in tensors and (found := tensors["head.conv.weight"].shape[:1]) != (JOINTS,):
        raise CheckpointMismatch(
            f"{path} finds {found[0] if found else 'no'} key points, and COCO's {JOINTS} are drawn"
        )
    size, seen, colours = eye.each("image_size", 2, [256, 192], most=MOST_PIXELS), _shown(path), Colours()
    if seen is not None:
        if (shown := _size(seen, (size[0], size[1]))) != size:
            raise CheckpointMismatch(f"{seen.path}: size is {shown}, and the network's pictures are {size}")
        colours = Colours(**_colours(seen))
        _fixed(seen, {"do_affine_transform": True, "do_rescale": True, "do_normalize": True})

    def make() -> ViTPose:
        config = ViTPoseConfig(
            **_sizes(eye, 1e-12), size=(size[0], size[1]), patch=_square(eye, "patch_size", 16),
            classic=not _flag(settings, "use_simple_decoder", True),
            scale=settings.each("scale_factor", 1, 4, most=32)[0],
        )  # fmt: skip
        if _layers(eye, config.depth)[-1] != config.depth:
            raise UsageError("its head does not follow its last layer")
        return ViTPose(config, colours)

    return _filled(path, settings, make, tensors, "ViTPose")


READERS: dict[str, Callable[[Path], Any]] = {"depth": read_depth, "pose": read_pose}
FINDS = {"depth_anything": "depth", "vitpose": "pose"}
"""What models find, by the type that their settings name."""


def maker_of(path: Path) -> str:
    """What the model in a file finds, by the settings beside it; "" if these do not say."""
    try:
        return FINDS.get(json.loads((path.parent / CONFIG).read_text())["model_type"], "")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""


# -------------------------------------------------------------------- settings


def _settings(path: Path, finds: str, kind: str) -> Settings:
    """Of a model that must be of this kind."""
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileProblem(
            f"no file or folder {str(path)!r:.200}: {finds} is found by a model in the folder of transformers, or by "
            "hf:owner/name"
        )
    if not (folder / CONFIG).is_file():
        raise FileProblem(
            f"{path} has no {CONFIG} {'in' if path.is_dir() else 'beside'} it, which tells the model's sizes: get it "
            "from where the weights came from"
        )
    settings = Settings(folder / CONFIG)
    if (found := settings.values.get("model_type")) != kind:
        raise CheckpointMismatch(
            f"{settings.path}: model_type is {found!r:.60}, and {finds} is found by one that says {kind!r}"
        )
    return settings


def _eye(settings: Settings, kind: str, fixed: dict[str, Any]) -> Settings:
    """The settings of its backbone."""
    eye = Settings(settings.path)
    eye.values = settings.values.get("backbone_config")  # type: ignore[assignment]
    if not isinstance(eye.values, dict) or eye.values.get("model_type") != kind:
        raise CheckpointMismatch(f"{settings.path}: its backbone_config is of no {kind}, which is all that is read")
    _fixed(eye, fixed | {"qkv_bias": True, "hidden_act": "gelu", "num_channels": 3})
    return eye


def _fixed(settings: Settings, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if (found := settings.values.get(name)) not in (None, value):
            raise settings.wrong(name, found)


def _sizes(eye: Settings, eps: float) -> dict[str, Any]:
    width = eye.each("hidden_size", 1, 768)[0]
    return {
        "width": width,
        "depth": eye.each("num_hidden_layers", 1, 12, most=MOST_LAYERS)[0],
        "num_heads": eye.each("num_attention_heads", 1, 12)[0],
        "hidden": int(width * eye.take("mlp_ratio", 4.0)),
        "norm_eps": eye.take("layer_norm_eps", eps),
    }


def _layers(eye: Settings, depth: int) -> tuple[int, ...]:
    """Those that are listened to, counted from 1: by their numbers or names, else the last."""
    named, numbers = eye.values.get("out_features"), eye.values.get("out_indices")
    if isinstance(named, list) and named:
        numbers = [int(n.removeprefix("stage")) if isinstance(n, str) and n[5:].isdecimal() else 0 for n in named]
    if not numbers:
        return (depth,)
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise eye.wrong("out_indices", numbers)
    return tuple(n % (depth + 1) if -depth <= n < 0 else n for n in numbers)


def _square(settings: Settings, name: str, usual: int) -> int:
    sides = settings.each(name, 2, usual, most=MOST_PIXELS)
    if sides[0] != sides[1]:
        raise settings.wrong(name, list(sides))
    return sides[0]


def _shown(path: Path) -> Settings | None:
    file = (path if path.is_dir() else path.parent) / SHOWN
    if not file.is_file():
        return None
    settings = Settings(file)
    if not math.isclose(settings.take("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-4):
        raise settings.wrong("rescale_factor", settings.values.get("rescale_factor"))
    return settings


def _size(seen: Settings, usual: tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    said = seen.values.get("size", {"height": usual[0], "width": usual[1]})
    sides: list[Any] = [said.get("height"), said.get("width")] if isinstance(said, dict) else [said, said]
    if any(type(n) is not int or not 0 < n <= MOST_PIXELS for n in sides):
        raise seen.wrong("size", said)
    return sides[0], sides[1]


def _resample(seen: Settings) -> int:
    way = seen.values.get("resample", Image.Resampling.BICUBIC.value)
    if type(way) is not int or way not in set(Image.Resampling):
        raise seen.wrong("resample", way)
    return way


def _colours(seen: Settings) -> dict[str, tuple[float, ...]]:
    found = {}
    for name, ours, least in (("image_mean", "mean", -1e3), ("image_std", "std", 1e-6)):
        if (values := seen.values.get(name)) is not None:
            if (
                not isinstance(values, list)
                or len(values) != 3
                or not all(_number(v) and least <= v < 1e3 for v in values)
            ):
                raise seen.wrong(name, values)
            found[ours] = tuple(map(float, values))
    return found


def _flag(settings: Settings, name: str, usual: bool) -> bool:
    value = settings.values.get(name, usual)
    if not isinstance(value, bool):
        raise settings.wrong(name, value)
    return value


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# -------------------------------------------------------------------- weights


def _filled(path: Path, settings: Settings, make: Callable[[], M], tensors: dict[str, torch.Tensor], what: str) -> M:
    """A network with these weights, all of them and no others, in float32."""
    try:
        with torch.device("meta"):
            network = make()
    except (UsageError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointMismatch(f"{settings.path}: the sizes of {what} do not fit together ({reason})") from error
    held = {name: t.float() if name.endswith(".num_batches_tracked") else t for name, t in tensors.items()}
    layout = {name: Place(name) for name in network.state_dict()}
    layouts.fit(layout, network.state_dict(), held, f"{path}, read as {what}")
    assign(network, layouts.read(layout, held, path), path)
    return network.float().requires_grad_(False).eval()
