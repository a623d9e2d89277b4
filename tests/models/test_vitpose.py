"""ViTPose is transformers' own, in its heat maps, what it sees and the joints it finds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

from estimators import POSES, far, noised, pose
from limner import hints
from limner.checkpoints import estimators
from limner.errors import CheckpointMismatch
from limner.models import vitpose
from limner.models.vitpose import VITPOSE_TINY, Colours, ViTPose, ViTPoseConfig


@pytest.fixture(scope="module", params=POSES)
def pair(request, tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("pose")
    net = noised(pose(POSES[request.param]))
    net.save_pretrained(folder)
    return net, folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_its_heat_maps_are_those_of_transformers(pair, dtype, near):
    net, ours = pair[0].to(dtype), estimators.read_pose(pair[1]).to(dtype)
    images = torch.randn(2, 3, *ours.config.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found, wanted = ours(images), net(images).heatmaps
    net.float()
    assert far(found, wanted) <= near, far(found, wanted)


@pytest.mark.parametrize("classic", [False, True])
def test_the_published_sizes_have_the_published_names_and_shapes(classic):
    with torch.device("meta"):
        ours = ViTPose(ViTPoseConfig(classic=classic)).state_dict()
        theirs = pose({"backbone_config": {"out_indices": [12]}, "use_simple_decoder": not classic}).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize("size", [(192, 256), (150, 400), (400, 150), (37, 41)])
def test_it_sees_what_transformers_shows(size):
    """Within one in 255, in the rare place where that falls between two."""
    image = picture(*size)
    box = [[[0, 0, *size]]]
    wanted = VitPoseImageProcessorPil()(image, boxes=box, return_tensors="pt")["pixel_values"]
    found = vitpose.prepared(image, (256, 192), Colours())
    assert found.shape == wanted.shape
    apart = (found - wanted).abs() * torch.tensor(Colours().std)[:, None, None] * 255
    assert apart.max() <= 1.01
    assert (apart > 0.1).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(192, 256), (150, 400), (400, 150)])
def test_its_joints_are_those_of_transformers(size):
    """Of smooth heat maps of random peaks, and of random weights."""
    generator = torch.Generator().manual_seed(2)
    at = torch.rand(1, 17, 2, generator=generator) * torch.tensor([47.0, 63.0])
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    peaks = torch.exp(-((x - at[..., 0, None, None]) ** 2 + (y - at[..., 1, None, None]) ** 2) / 8)
    net = noised(pose({"backbone_config": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                                            "out_indices": [2]}}))  # fmt: skip
    with torch.no_grad():
        random = net(vitpose.prepared(picture(*size), (256, 192), Colours())).heatmaps
    for heat, sub_pixel in ((peaks, True), (random, False)):
        shown = SimpleNamespace(heatmaps=heat.clone())
        wanted = VitPoseImageProcessorPil().post_process_pose_estimation(shown, boxes=[[[0, 0, *size]]])[0][0]
        points, sure = vitpose.peaks(heat)
        found = vitpose.in_picture(points, (64, 48), size, (256, 192))[0]
        assert torch.allclose(sure[0].float(), wanted["scores"])
        there = sure[0] > 0  # of others transformers says nothing
        assert there.sum() > 7
        assert (found - wanted["keypoints"])[there].abs().max() <= 0.1  # of float32
        if sub_pixel:
            exact = vitpose.in_picture(at.double(), (64, 48), size, (256, 192))[0]
            inner = ((at[0] > 3) & (at[0] < torch.tensor([44.0, 60.0]))).all(-1)
            assert (found - exact)[inner].abs().max() < 0.05 * max(size) / 48


def test_a_body_is_openposes_with_its_neck_amid_the_shoulders():
    points, sure = torch.arange(34.0).view(17, 2), torch.full((17,), 0.9)
    found = vitpose.body(points, sure, (100, 100))
    assert found[0] == (0, 1)
    assert found[1] == (11, 12)  # of (10, 11) and (12, 13)
    right, left = [found[k] for k in (2, 3, 4, 8, 9, 10, 14, 16)], [found[k] for k in (5, 6, 7, 11, 12, 13, 15, 17)]
    assert right == [tuple(points[k].tolist()) for k in (6, 8, 10, 12, 14, 16, 2, 4)]
    assert left == [tuple(points[k].tolist()) for k in (5, 7, 9, 11, 13, 15, 1, 3)]
    sure[5], sure[9] = 0.29, 0.31
    unsure = vitpose.body(points, sure, (100, 30))
    assert unsure[5] is None is unsure[1]  # no neck without a shoulder
    assert unsure[7] is not None
    assert unsure[10] is None  # below the edge


def test_a_person_is_drawn_where_the_peaks_are(monkeypatch):
    """A nose in the middle, of a picture of another shape than the heat maps."""
    network = ViTPose(VITPOSE_TINY)
    heat = torch.zeros(1, 17, 16, 12)
    heat[0, 0, 7:9, 5:7] = 1
    monkeypatch.setattr(network, "forward", lambda images: heat)
    found = np.asarray(network.picture(Image.new("RGB", (512, 1024))))
    assert found.shape == (1024, 512, 3)
    ys, xs = np.nonzero(found.any(-1))
    assert abs(ys.mean() - 512) < 2
    assert abs(xs.mean() - 256) < 2
    assert {tuple(c) for c in found[found.any(-1)]} == {hints.COLOURS[0]}
    heat *= 0.1
    assert not np.asarray(network.picture(Image.new("RGB", (40, 40)))).any()
    heat *= float("nan")
    with pytest.raises(CheckpointMismatch, match="no number"):
        network.picture(Image.new("RGB", (40, 40)))
