"""Depth Anything is transformers' own, in what it finds, sees and holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from estimators import DEPTHS, EYE, depth, far, noised
from limner import hints
from limner.checkpoints import estimators
from limner.errors import CheckpointMismatch, UsageError
from limner.models.depth_anything import (
    DEPTH_ANYTHING_LARGE,
    DEPTH_ANYTHING_SMALL,
    DEPTH_ANYTHING_TINY,
    DepthAnything,
    DepthAnythingConfig,
    Sight,
    prepared,
)

PUBLISHED = {
    "patch_size": 14, "keep_aspect_ratio": True, "ensure_multiple_of": 14, "size": {"height": 518, "width": 518},
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
}  # fmt: skip


@pytest.fixture(scope="module", params=DEPTHS)
def pair(request, tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("depth")
    net = noised(depth(DEPTHS[request.param]))
    net.head.conv3.bias.data += 1  # or much would be 0, which says little
    net.save_pretrained(folder)
    return net, folder


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_it_finds_what_transformers_finds(pair, dtype, near):
    """At its own size, and at others, over which positions are stretched."""
    net, ours = pair[0].to(dtype), estimators.read_depth(pair[1]).to(dtype)
    eye = ours.config.eye
    for height, width in ((eye.size, eye.size), (3 * eye.patch, 7 * eye.patch)):
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            found, wanted = ours(images), net(images).predicted_depth
        assert wanted.std() > 0.01
        assert far(found, wanted) <= near, far(found, wanted)
    net.float()


def test_the_published_sizes_have_the_published_names_and_shapes():
    rows = [
        (DEPTH_ANYTHING_SMALL, 384, 12, 6, [3, 6, 9, 12], [48, 96, 192, 384], 64),
        (replace(DEPTH_ANYTHING_SMALL, layers=(9, 10, 11, 12)), 384, 12, 6, [9, 10, 11, 12], [48, 96, 192, 384], 64),
        (DEPTH_ANYTHING_LARGE, 1024, 24, 16, [5, 12, 18, 24], [256, 512, 1024, 1024], 256),
    ]
    for config, width, count, heads, layers, widths, fusion in rows:
        with torch.device("meta"):
            ours = DepthAnything(config).state_dict()
            theirs = depth({
                "backbone_config": EYE | {
                    "hidden_size": width, "num_hidden_layers": count, "num_attention_heads": heads, "image_size": 518,
                    "out_indices": layers,
                },
                "reassemble_hidden_size": width, "neck_hidden_sizes": widths, "fusion_hidden_size": fusion,
            }).state_dict()  # fmt: skip
        assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize("size", [(518, 518), (640, 480), (333, 517), (64, 100), (200, 900)])
def test_it_sees_what_transformers_shows(size):
    """Within one in 255, before colours are moved."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    wanted = DPTImageProcessorPil(**PUBLISHED)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    found = prepared(Image.fromarray(pixels), Sight())
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5


def test_a_folder_says_how_pictures_are_shown(pair, tmp_path):
    shown = PUBLISHED | {"size": {"height": 70, "width": 84}, "keep_aspect_ratio": False, "image_mean": [0.1, 0.2, 0.3]}
    DPTImageProcessorPil(**shown).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(pair[1] / name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    wanted = DPTImageProcessorPil(**shown)(image, return_tensors="pt")["pixel_values"]
    sight = estimators.read_depth(tmp_path).sight
    assert sight == Sight(size=(70, 84), keeps_shape=False, mean=(0.1, 0.2, 0.3))
    assert (prepared(image, sight) - wanted).abs().max() <= 1e-5


def test_a_sliver_is_one_patch_wide():
    assert Sight().sides(2000, 3) == (518, 14)


@pytest.mark.parametrize("metric", [False, True])
def test_near_is_white_in_the_size_of_the_picture(metric, monkeypatch):
    network = DepthAnything(replace(DEPTH_ANYTHING_TINY, metric=metric), Sight(size=(56, 56)))
    ramp = torch.linspace(1, 9, 56).expand(1, 56, 56)  # near at the right, or metres
    monkeypatch.setattr(network, "forward", lambda images: ramp)
    found = np.asarray(network.picture(Image.new("RGB", (90, 60))))
    assert found.shape == (60, 90, 3)
    assert (found == found[..., :1]).all()
    left, right = found[:, 0], found[:, -1]
    assert ((left, right) if metric else (right, left))[0].min() == 255
    assert ((left, right) if metric else (right, left))[1].max() == 0
    assert not np.asarray(hints.shaded(torch.ones(4, 4))).any()
    monkeypatch.setattr(network, "forward", lambda images: ramp * float("nan"))
    with pytest.raises(CheckpointMismatch, match="no number"):
        network.picture(Image.new("RGB", (90, 60)))


@pytest.mark.parametrize(
    "wrong", [{"layers": (1, 1, 2, 3)}, {"layers": (1, 2, 3, 5)}, {"widths": (8,)}, {"factors": (4, 2, 1, 0.3)}]
)
def test_sizes_that_do_not_fit_together_are_refused(wrong):
    told = {"eye": DEPTH_ANYTHING_TINY.eye, "layers": (1, 2, 3, 4), "widths": (8, 12, 16, 20)} | wrong
    with pytest.raises(UsageError):
        DepthAnythingConfig(**told)
