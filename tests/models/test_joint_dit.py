from __future__ import annotations

import torch

from limner.models.joint_dit import JOINT_DIT_TINY, JointDiT


def test_positions_run_over_the_same_range_whatever_the_size():
    """Angles turn by position x frequency; the lowest pair of frequencies of 16-wide heads is 1 and 0.1 an axis."""
    network = JointDiT(JOINT_DIT_TINY)  # 8 units along the shorter side
    for height, width in ((8, 8), (4, 4), (16, 24)):
        table = network.rope(3, height, width, torch.device("cpu"))
        first, second = torch.atan2(table[1], table[0]).chunk(2, dim=-1)  # of a pair
        assert torch.equal(first, -second)
        angles = second
        assert not angles[:3].any()  # text is at 0
        grid = angles[3:].unflatten(0, (height, width))
        unit = 8 / min(height, width)
        slow = 100 ** (-7 / 8)  # the slowest of an axis' eight frequencies, which never turns round here
        torch.testing.assert_close(grid[:, 0, 7] / slow, unit * (torch.arange(height) - (height - 1) / 2))
        torch.testing.assert_close(grid[0, :, 15] / slow, unit * (torch.arange(width) - (width - 1) / 2))


def test_at_the_trained_size_a_unit_is_a_token():
    network = JointDiT(JOINT_DIT_TINY)
    table = network.rope(0, 8, 8, torch.device("cpu")).unflatten(1, (8, 8))
    torch.testing.assert_close(table[0, 4, 4], torch.cat([torch.cos(0.5 * 100 ** (-torch.arange(8) / 8))] * 4))
