from __future__ import annotations

import pytest
import torch

from limner.checkpoints.layouts import Place, read, write
from limner.errors import CheckpointMismatch

LAYOUT = {
    "q.weight": Place("attn.in_proj_weight", 0, 3),
    "k.weight": Place("attn.in_proj_weight", 1, 3),
    "v.weight": Place("attn.in_proj_weight", 2, 3),
    "out.weight": Place("proj", kept="transposed"),
    "in.weight": Place("conv.weight", kept="1x1"),
    "in.bias": Place("conv.bias"),
    "a.weight": Place("by_head.weight", 0, 2, heads=3, kept="1"),
    "b.weight": Place("by_head.weight", 1, 2, heads=3, kept="1"),
    "fused.weight": Place("apart_1", then=("apart_2", "apart_3"), rows=(1, 2, 1)),
    "shift_scale": Place("scale_shift", kept="swapped"),
}
THEIRS = {
    "attn.in_proj_weight": torch.arange(24.0).view(12, 2),
    "proj": torch.arange(6.0).view(2, 3),
    "conv.weight": torch.arange(8.0).view(4, 2, 1, 1),
    "conv.bias": torch.arange(4.0),
    "by_head.weight": torch.arange(24.0).view(12, 2, 1),
    "apart_1": torch.arange(2.0).view(1, 2),
    "apart_2": torch.arange(2.0, 6.0).view(2, 2),
    "apart_3": torch.arange(6.0, 8.0).view(1, 2),
    "scale_shift": torch.arange(4.0),
}


def test_tensors_are_found_where_the_layout_says():
    ours = read(LAYOUT, THEIRS, "file")
    assert list(ours) == list(LAYOUT)
    assert torch.equal(ours["k.weight"], torch.arange(8.0, 16.0).view(4, 2))
    assert torch.equal(ours["out.weight"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert torch.equal(ours["in.weight"], torch.arange(8.0).view(4, 2))
    assert torch.equal(ours["b.weight"][:, 0], torch.tensor([4.0, 6.0, 12.0, 14.0, 20.0, 22.0]))
    assert torch.equal(ours["fused.weight"], torch.arange(8.0).view(4, 2))
    assert torch.equal(ours["shift_scale"], torch.tensor([2.0, 3.0, 0.0, 1.0]))


def test_writing_is_the_inverse_of_reading():
    again = write(LAYOUT, read(LAYOUT, THEIRS, "file"))
    assert again.keys() == THEIRS.keys()
    assert all(torch.equal(again[name], THEIRS[name]) for name in THEIRS)


def test_a_convolution_of_one_pixel_may_be_kept_as_a_matrix():
    plain = THEIRS | {"conv.weight": THEIRS["conv.weight"][:, :, 0, 0]}
    assert torch.equal(read(LAYOUT, plain, "file")["in.weight"], plain["conv.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({k: v for k, v in THEIRS.items() if k != "proj"}, r"file: 1 missing \(first: proj\) of 9 keys"),
        (THEIRS | {"more": torch.zeros(1)}, r"file: 1 unknown \(first: more\) of 9 keys"),
        (THEIRS | {"attn.in_proj_weight": torch.zeros(11, 2)}, r"attn.in_proj_weight is \(11, 2\), which is not 3"),
        (THEIRS | {"by_head.weight": torch.zeros(8, 2)}, r"by_head.weight is \(8, 2\), which is not 6"),
        (THEIRS | {"apart_2": torch.zeros(3, 2)}, r"file: apart_2 is \(3, 2\), of which 2 rows are ours"),
    ],
)
def test_what_does_not_fit_is_named(tensors, message):
    with pytest.raises(CheckpointMismatch, match=message):
        read(LAYOUT, tensors, "file")
