import sys

import pytest
import torch

from limner.errors import MissingExtra
from limner.metrics.features import BLOCKS, FEATURES, EffLite0, colours, full_precision, resize


@pytest.fixture(scope="module")
def features():
    return EffLite0()


def pictures(n=3, size=64, seed=0):
    images = torch.randint(0, 256, (n, 4, size, size), generator=torch.Generator().manual_seed(seed))
    images[:, :3] = images[:, :3] * images[:, 3:] // 255  # premultiplied
    return images.to(torch.uint8)


def test_bytes_and_floats_of_a_picture_have_the_same_features_in_any_batch(features, monkeypatch):
    images = pictures()
    whole = features(images).whole
    assert whole.shape == (3, FEATURES)
    assert torch.allclose(features(images / 127.5 - 1).whole, whole, atol=1e-3)
    monkeypatch.setattr(features, "batch", 2)
    assert torch.allclose(features(images).whole, whole, atol=1e-3)
    assert (whole[0] - whole[1])[:1280].abs().max() > 0.01


def test_only_what_is_seen_on_white_counts_and_is_scaled_as_the_network_wants_it(features, monkeypatch):
    seen = []
    true_network = features.network.extract_features
    monkeypatch.setattr(features.network, "extract_features", lambda x: seen.append(x) or true_network(x))
    images = torch.zeros(2, 4, 224, 224, dtype=torch.uint8)  # transparent: white
    images[1, 3] = 255  # opaque black
    images[1, 0] = 51  # a dark red
    features.forward(images)
    assert seen[0][0].unique().tolist() == [1.0]  # (255 - 127) / 128
    assert seen[0][1, :, 0, 0].tolist() == pytest.approx([(51 - 127) / 128, -127 / 128, -127 / 128], abs=1e-5)


def test_features_are_means_over_the_last_map_and_means_and_maxima_of_maps_on_the_way(features):
    red = torch.zeros(1, 4, 224, 224, dtype=torch.uint8)
    red[:, 0, 50:, :90] = red[:, 3, 50:, :90] = 255
    x = torch.ones(1, 3, 224, 224)
    x[:, 1:, 50:, :90] = -127 / 128
    found = features(red)
    last = features.network.extract_features(x)
    assert last.shape == (1, 1280, 7, 7)
    assert torch.allclose(found.final, last.mean((2, 3)), atol=1e-4)
    want = []
    x = features.network._bn0(features.network._conv_stem(x)).clamp(0, 6)
    for k, block in enumerate(features.network._blocks):
        x = block(x)
        if k in BLOCKS:
            assert x.shape[1] == BLOCKS[k]
            want += [x.mean((2, 3)), x.amax((2, 3))]
    assert torch.allclose(found.detail, torch.cat([*want, colours(red / 127.5 - 1)], 1), atol=1e-3)


def test_colours_are_counted_by_what_they_cover_and_placed_in_a_thumbnail():
    images = torch.full((2, 4, 128, 128), -1.0)  # transparent
    images[0, 0, :, :64] = images[0, 3, :, :64] = 1  # the left half pure red
    images[0, :, :32, 64:] = images[0, 3:, :32, 64:] = 0.0  # an eighth grey-white at half alpha: straight white
    found = colours(images)
    shades, thumbnail = found[:, :64].square().unflatten(1, (4, 4, 4)), found[:, 64:].unflatten(1, (4, 4, 4))
    assert shades[0, 3, 0, 0] == pytest.approx(1 / 2)
    assert shades[0, 3, 3, 3] == pytest.approx(1 / 8 / 2)
    assert shades[0].sum() == pytest.approx(1 / 2 + 1 / 16)
    assert found[1].abs().max() == 0
    assert thumbnail[0, 0].tolist() == [[1, 1, 0.5, 0.5], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert thumbnail[0, 1, :, :2].max() == 0


def test_a_colour_between_two_shades_is_shared_by_both():
    images = torch.ones(1, 4, 8, 8)
    images[:, 0] = 2 * (1.25 / 3) - 1  # a quarter of the way from shade 1 to shade 2 of red
    shades = colours(images)[0, :64].square().unflatten(0, (4, 4, 4))
    assert shades[:, 3, 3].tolist() == pytest.approx([0, 0.75, 0.25, 0], abs=1e-5)


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
