"""Encoded views: what a batch holds, sizes beside the main one, and many processes that must end with the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limner.data.batches import DataConfig, ImageBatches, open_images
from limner.data.latents import LatentBatches
from limner.errors import UsageError


class Shrink(nn.Module):
    """Four pixels a latent, through a convolution that keeps the memory layout it is given."""

    grid = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 4, stride=4, bias=False)
        nn.init.dirac_(self.conv.weight)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images.contiguous(memory_format=torch.channels_last))


def opened(views: int = 2, **fields: object) -> LatentBatches:
    config = DataConfig(source="shapes", size=32, limit=10, latent_views=views, **fields)
    batches = ImageBatches(open_images(config), config, 0, torch.device("cpu"))
    return LatentBatches(batches, Shrink().to(memory_format=torch.channels_last), views, chunk=4)


def test_view_0_is_the_picture_as_it_is_and_the_next_is_another_look():
    latents = opened()
    plain = Shrink().encode(latents.batches.pictures(torch.arange(10))).half()
    assert torch.equal(latents.latents[0][0], plain)
    assert not torch.equal(latents.latents[0][1], plain)


def test_each_step_has_one_size_and_a_larger_one_holds_fewer_pictures():
    latents = opened(other_sizes=((16, 16, 0.3), (64, 32, 0.3)))
    seen = {tuple(latents.batch(step, 8)["latents"].shape) for step in range(40)}
    assert seen == {(8, 4, 8, 8), (8, 4, 4, 4), (4, 4, 8, 16)}
    batch = latents.batch(3, 8)
    assert len(batch["captions"]) == len(batch["ids"]) == len(batch["latents"])


def test_two_ranks_share_a_step_of_any_size():
    latents = opened(other_sizes=((16, 16, 0.3), (64, 32, 0.3)))
    for step in range(20):
        whole = latents.batch(step, 8)
        parts = [latents.batch(step, 8, rank=rank, world=2) for rank in range(2)]
        assert torch.equal(torch.cat([p["latents"] for p in parts]), whole["latents"])
        assert [i for p in parts for i in p["ids"]] == whole["ids"]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (((30, 32, 0.1),), "not in multiples of 4"),
        (((0, 32, 0.1),), "not in multiples of 4"),
        (((16, 16, 1.0),), "add up to less than 1"),
        (((16, 16, 0.0),), "add up to less than 1"),
    ],
)
def test_sizes_and_shares_that_cannot_be_are_refused(sizes, reason):
    with pytest.raises(UsageError, match=reason):
        opened(other_sizes=sizes)


def test_processes_end_with_what_one_would_have(monkeypatch):
    """NCCL gathers memory as it lies: channels-last latents came out scrambled, and a run on two GPUs learned nothing
    but texture."""
    alone = opened(views=1).latents[0][0]
    for rank in range(2):

        def gathered(whole: torch.Tensor, mine: torch.Tensor, rank: int = rank) -> None:
            assert mine.is_contiguous(memory_format=torch.channels_last) or mine.is_contiguous()
            memory = mine.as_strided((mine.numel(),), (1,))
            whole.view(-1)[rank * memory.numel() : (rank + 1) * memory.numel()] = memory

        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
        monkeypatch.setattr("torch.distributed.all_gather_into_tensor", gathered)
        share = slice(rank * 5, (rank + 1) * 5)
        assert torch.equal(opened(views=1).latents[0][0][share], alone[share])
        monkeypatch.undo()
