import sys

import pytest
import torch

from limner.errors import MissingExtra
from limner.metrics.features import EffLite0, full_precision, resize


@pytest.fixture(scope="module")
def features():
    return EffLite0()


def pictures(n=3, size=64, seed=0):
    images = torch.randint(0, 256, (n, 4, size, size), generator=torch.Generator().manual_seed(seed))
    images[:, :3] = images[:, :3] * images[:, 3:] // 255  # premultiplied
    return images.to(torch.uint8)


def test_bytes_and_floats_of_a_picture_have_the_same_features_in_any_batch(features):
    images = pictures()
    whole = features(images)
    assert whole.shape == (3, 1280)
    assert torch.allclose(features(images / 127.5 - 1), whole, atol=1e-4)
    assert torch.allclose(features(images, batch=2), whole, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.01


def test_only_what_is_seen_on_white_counts_and_is_scaled_as_the_network_wants_it(features, monkeypatch):
    seen = []
    monkeypatch.setattr(features.network, "extract_features", lambda x: seen.append(x) or x)
    images = torch.zeros(2, 4, 224, 224, dtype=torch.uint8)  # transparent: white
    images[1, 3] = 255  # opaque black
    images[1, 0] = 51  # a dark red
    features.forward(images)
    assert seen[0][0].unique().tolist() == [1.0]  # (255 - 127) / 128
    assert seen[0][1, :, 0, 0].tolist() == pytest.approx([(51 - 127) / 128, -127 / 128, -127 / 128], abs=1e-5)


def test_features_are_means_over_the_last_map(features):
    white = torch.zeros(1, 4, 224, 224, dtype=torch.uint8)
    last = features.network.extract_features(torch.ones(1, 3, 224, 224))
    assert last.shape == (1, 1280, 7, 7)
    assert torch.allclose(features(white), last.mean((2, 3)), atol=1e-4)


def test_resizing_keeps_a_plain_ground_and_averages_what_is_finer_than_a_pixel():
    assert torch.allclose(resize(torch.full((1, 3, 256, 256), 0.3), 224), torch.full((1, 3, 224, 224), 0.3), atol=1e-6)
    board = (torch.arange(448)[:, None] + torch.arange(448)) % 2 * 2.0 - 1
    assert resize(board.expand(1, 3, -1, -1), 224)[..., 8:-8, 8:-8].abs().max() < 0.02  # without antialiasing: 1
    assert resize(board.expand(1, 3, -1, -1), 300).abs().max() <= 1


def test_the_precision_of_a_training_run_is_set_aside_and_given_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
            assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.float32
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match="eval"):
        EffLite0()
