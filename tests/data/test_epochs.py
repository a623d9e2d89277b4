"""Which samples a step sees: by hand, and over epochs, sizes of batches and numbers of processes."""

from __future__ import annotations

from collections import Counter

import pytest

from limner.data.epochs import Bucket, Epochs, bucket_sizes, nearest, share


def one(n: int, seed: int = 0) -> Epochs:
    return Epochs([Bucket(8, 8, tuple(range(n)))], seed)


def several(seed: int = 0) -> Epochs:
    """17 samples in buckets of 9, 1 and 7."""
    return Epochs([Bucket(8, 8, tuple(range(9))), Bucket(4, 16, (20,)), Bucket(16, 4, tuple(range(30, 37)))], seed)


def test_one_bucket_is_a_sequence_of_shuffled_epochs_however_it_is_cut():
    sequence = [i for step in range(30) for i in one(10).step(step, 1)[1]]
    assert sequence[:10] == [6, 4, 2, 9, 7, 0, 8, 1, 5, 3]  # known: a change of it changes what a resumed run sees
    for epoch in range(3):
        assert sorted(sequence[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert sequence[:10] != sequence[10:20]
    for size in (2, 4, 6, 25):
        assert [i for step in range(-(-30 // size)) for i in one(10).step(step, size)[1]][:30] == sequence
    assert [one(10, seed=1).step(k, 1)[1][0] for k in range(10)] != sequence[:10]


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_of_several_buckets_an_epoch_has_each_sample_once_and_a_step_one_bucket(size):
    epochs = several()
    steps = epochs.steps(size)
    assert steps == {1: 17, 2: 5 + 1 + 4, 4: 3 + 1 + 2, 16: 3}[size]
    orders = []
    for epoch in range(3):
        plan = [epochs.step(epoch * steps + k, size) for k in range(steps)]
        assert Counter(i for _, seen in plan for i in seen) == Counter([*range(9), 20, *range(30, 37)])
        assert all(set(seen) <= set(bucket.members) and len(seen) <= size for bucket, seen in plan)
        orders.append([seen for _, seen in plan])
    assert orders[0] != orders[1]
    assert orders[1] == [several().step(steps + k, size)[1] for k in range(steps)]
    assert orders[0] != [several(seed=1).step(k, size)[1] for k in range(steps)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_what_cannot_be_shared_evenly_by_rows_that_weigh_nothing(world):
    for count in range(1, 20):
        shares = [share(count, rank, world) for rank in range(world)]
        assert len({len(rows) for rows, _ in shares}) == 1
        weighed = [
            (row, weight)
            for rows, weights in shares
            for row, weight in zip(rows, weights or [1.0] * len(rows), strict=True)
        ]
        assert sorted(row for row, weight in weighed if weight) == list(range(count))
        each = len(shares[0][0])
        mean = (
            sum(sum(row * w for row, w in zip(r, ws or [1.0] * each, strict=True)) / each for r, ws in shares) / world
        )
        assert mean == pytest.approx(sum(range(count)) / count)
        assert all((weights is None) == (count % world == 0) for _, weights in shares)


def test_shapes_are_as_high_or_wide_as_the_pixels_allow():
    assert bucket_sizes(512, 64, 2.0) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert bucket_sizes(1024, 64, 1.5)[:2] == [(832, 1216), (896, 1152)]
    assert bucket_sizes(32, 32, 4.0) == [(32, 32)]
    high = [(16, 64), (16, 56), (16, 48), (24, 40)]
    assert bucket_sizes(32, 8, 4.0) == [*high, (32, 32), *[(w, h) for h, w in reversed(high)]]
    assert bucket_sizes(32, 64, 2.0) == []
    for width, height in bucket_sizes(768, 32, 3.0):
        assert width * height <= 768 * 768
        assert width % 32 == height % 32 == 0
        assert max(width, height) <= 3 * min(width, height)
    assert len(set(bucket_sizes(768, 32, 3.0))) == len(bucket_sizes(768, 32, 3.0))


@pytest.mark.parametrize(
    ("picture", "shape"),
    [
        ((100, 100), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((10, 5000), (384, 640)),
        ((1075, 1000), (512, 512)),  # the ratio between 1 and 9 / 7 is their geometric mean, 1.134
        ((1140, 1000), (576, 448)),
    ],
)
def test_a_picture_has_the_shape_nearest_its_own(picture, shape):
    assert nearest(*picture, bucket_sizes(512, 64, 2.0)) == shape
