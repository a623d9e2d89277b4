"""Pictures encoded once, a few views each, so that a latent model trains without its autoencoder in the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from limner.data import transforms
from limner.data.batches import ImageBatches, seeded
from limner.data.hinted import GREY, made, to_hints
from limner.data.images import Batches
from limner.data.stored import StoredLatents
from limner.data.streams import Stream
from limner.errors import UsageError
from limner.nn.embeddings import sent
from limner.types import System


def encoded(batches: ImageBatches | Stream, system: System) -> Batches:
    """Batches of latents, encoded now, if the config asks for them; else the batches as they are."""
    views = batches.config.latent_views
    if isinstance(batches, Stream):
        return StoredLatents(batches, system) if views or batches.config.cache else batches
    return LatentBatches(batches, system, views) if views else batches


class LatentBatches:
    """Batches of {"latents" (b, c, h, w), "captions", "ids"}, with data.hints also "hints" (b, 3, H, W), over `views`
    encodings of every picture.

    View 0 is the picture as it is; the others are `transforms.view`s. Each of the config's `other_sizes` has one view
    more, fitted into its canvas; a batch has one size. Held in float16 on the batches' device; hints, made of the very
    pictures that are encoded, in bytes, there too if they fit in a third of its free memory. Under torch.distributed
    each rank encodes its share and all ranks end with the whole.
    """

    def __init__(self, batches: ImageBatches, system: System, views: int, chunk: int = 256) -> None:
        self.batches = batches
        size, others = batches.config.size, batches.config.other_sizes
        check_sizes(others, system.grid)
        self.room = self.room_for_hints(views * size**2 + sum(width * height for width, height, _ in others))
        found = [self.encode(v, size, size, system, chunk) for v in range(views)]
        base = torch.stack([kept["latents"] for kept in found])
        self.kept = [{name: torch.stack([kept[name] for kept in found]) for name in found[0]}]
        for k, (width, height, _) in enumerate(others):
            smaller = max(1, chunk * size * size // max(size * size, width * height))
            found = [self.encode(views + k, height, width, system, smaller)]
            self.kept.append({name: tensor[None] for name, tensor in found[0].items()})
        shares = [share for *_, share in others]
        self.shares = torch.tensor([1.0 - sum(shares), *shares])
        self.fill = [min(1.0, base[0, 0].numel() / stack[0, 0].numel()) for stack in self.latents]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def latents(self) -> list[Tensor]:
        """Of each size (views, n, c, h, w)."""
        return [kept["latents"] for kept in self.kept]

    @torch.no_grad()
    def encode(self, view: int, height: int, width: int, system: System, chunk: int) -> dict[str, Tensor]:
        """{"latents" (n, c, h, w), and "hints" (n, 1 or 3, H, W) if there are any} of one view."""
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        n, device = len(self.batches), self.batches.device
        share = -(-n // world)
        latents, seen = [], []
        maker = self.batches.config.hints
        for start in range(rank * share, (rank + 1) * share, chunk):
            index = torch.arange(start, min(start + chunk, (rank + 1) * share)).clamp(max=n - 1)
            images = self.batches.pictures(index)
            if view:
                generator = seeded(self.batches.seed, start, 1000 + view, device)
                images = transforms.view(images, self.batches.set.mirror[index].to(device), generator)
            images = transforms.fitted(images, height, width)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                latents.append(system.encode(images).to(torch.float16))
            if maker != "none":
                seen.append(made(maker, images).to(self.room))

        def whole(parts: list[Tensor]) -> Tensor:
            mine = torch.cat(parts).contiguous()  # gathering copies memory as it lies: channels-last would be scrambled
            if world == 1:
                return mine[:n]
            found = mine.new_empty((world * share, *mine.shape[1:]), device=device)
            distributed.all_gather_into_tensor(found, mine.to(device))
            return found.to(mine.device)[:n]

        return {"latents": whole(latents)} | ({"hints": whole(seen)} if seen else {})

    def room_for_hints(self, pixels: int) -> torch.device:
        """The device, if hints of so many pixels a picture fit in a third of its free memory."""
        device = self.batches.device
        need = len(self.batches) * pixels * (1 if self.batches.config.hints in GREY else 3)
        fits = device.type == "cuda" and need < torch.cuda.mem_get_info(device)[0] / 3
        return device if fits else torch.device("cpu")

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        which = int(torch.multinomial(self.shares, 1, generator=seeded(self.batches.seed, step, 500)))
        kept = self.kept[which]
        size = max(1, int(size * self.fill[which]) // world) * world
        draw = self.batches.draw(step, size, rank=rank, world=world)
        view = (draw.chance * len(kept["latents"])).long()
        picked = {n: tensor[sent(view, tensor.device), sent(draw.index, tensor.device)] for n, tensor in kept.items()}
        ids = [self.batches.set.ids[i] for i in draw.index.tolist()]
        batch = {"latents": picked["latents"].float(), "captions": draw.captions, "ids": ids}
        return batch | ({"hints": to_hints(picked["hints"].to(self.batches.device))} if "hints" in picked else {})


def check_sizes(others: tuple[tuple[int, int, float], ...], factor: int) -> None:
    """Raises UsageError for sizes off the autoencoder's grid, or shares that do not leave a part for the main size."""
    for width, height, _ in others:
        if min(width, height) < factor or width % factor or height % factor:
            raise UsageError(f"data.other_sizes: {width} x {height} is not in multiples of {factor} pixels")
    if any(share <= 0 for *_, share in others) or sum(share for *_, share in others) >= 1:
        raise UsageError("data.other_sizes: give shares above 0 that add up to less than 1; data.size takes the rest")
