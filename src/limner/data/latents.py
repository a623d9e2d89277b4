"""Pictures encoded once, a few views each, so that a latent model trains without its autoencoder in the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from limner.data import transforms
from limner.data.batches import ImageBatches, seeded, sent
from limner.types import Autoencoder


class LatentBatches:
    """Batches of {"latents" (b, c, h, w), "captions", "ids"} over `views` encodings of every picture.

    View 0 is the picture as it is; the others are `transforms.view`s. Held in float16 on the batches' device. Under
    torch.distributed each rank encodes its share and all ranks end with the whole.
    """

    def __init__(self, batches: ImageBatches, autoencoder: Autoencoder, views: int, chunk: int = 256) -> None:
        self.batches, self.views = batches, views
        self.latents = torch.stack([self.encode(v, autoencoder, chunk) for v in range(views)])

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def encode(self, view: int, autoencoder: Autoencoder, chunk: int) -> Tensor:
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        n, device = len(self.batches), self.batches.device
        share = -(-n // world)
        parts = []
        for start in range(rank * share, (rank + 1) * share, chunk):
            index = torch.arange(start, min(start + chunk, (rank + 1) * share)).clamp(max=n - 1)
            images = self.batches.pictures(index)
            if view:
                generator = seeded(self.batches.seed, start, 1000 + view, device)
                images = transforms.view(images, self.batches.set.mirror[index].to(device), generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                parts.append(autoencoder.encode(images).to(torch.float16))
        mine = torch.cat(parts)
        if world == 1:
            return mine[:n]
        whole = mine.new_empty((world * share, *mine.shape[1:]))
        distributed.all_gather_into_tensor(whole, mine)
        return whole[:n]

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        draw = self.batches.draw(step, size, rank=rank, world=world)
        device = self.latents.device
        view = (draw.chance * self.views).long()
        latents = self.latents[sent(view, device), sent(draw.index, device)].float()
        ids = [self.batches.set.ids[i] for i in draw.index.tolist()]
        return {"latents": latents, "captions": draw.captions, "ids": ids}
