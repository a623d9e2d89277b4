"""Pictures that a run does not learn from, and its loss on them: the same pictures, noise and times every time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from limner.data.batches import ImageBatches, seeded
from limner.data.images import Batches
from limner.data.streams import Stream
from limner.errors import UsageError
from limner.training.config import TrainConfig
from limner.training.memory import autocast
from limner.training.processes import Processes

Opened = ImageBatches | Stream


def parted(images: Opened, share: float) -> tuple[Opened, Opened]:
    """Those to learn from and about `share` of all that are not, chosen by their ids alone, so that a picture stays
    what it is when others come. Raises UsageError if none are left for either."""
    learn, held = hold_out(images.samples.ids if isinstance(images, Stream) else images.set.ids, share)
    if isinstance(images, Stream):
        return images.only(learn), images.only(held, "held")
    whole, told = images.set, (images.config, images.seed, images.device)
    return ImageBatches(whole.select(learn), *told), ImageBatches(whole.select(held), *told)


def hold_out(ids: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """The places of those to learn from, and of those that are not. Raises UsageError if none are left for either."""
    out = [chance(name) < share for name in ids]
    learn, held = ([i for i, is_out in enumerate(out) if is_out is wanted] for wanted in (False, True))
    if not learn or not held:
        raise UsageError(
            f"validation={share:g} of {len(ids)} pictures leaves {len(learn)} to learn from and {len(held)} to "
            "measure with: give another share, or more pictures"
        )
    return learn, held


def chance(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


@torch.no_grad()
def validate(
    losses: Mapping[str, nn.Module], held: Batches, config: TrainConfig, processes: Processes
) -> dict[str, float]:
    """Means of the `losses`, by phase, of `config.validation_images` pictures drawn from `held`, over all processes."""
    size, device = config.batch_size // config.accumulate, processes.device
    total: dict[str, Tensor] = {}
    rows = 0
    for k in range(math.ceil(config.validation_images / size)):
        batch = held.batch(k, size, rank=processes.rank, world=processes.world)
        batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        generator = seeded(config.seed, k, 9000 + processes.rank, device)
        torch.manual_seed(generator.initial_seed())
        rows += len(batch["ids"])
        for phase, loss in losses.items():
            with autocast(config, device):
                terms = loss(batch, generator)
            for name, value in terms.items():
                key = f"validation/{phase}/{name}" if len(losses) > 1 else f"validation/{name}"
                total[key] = total.get(key, 0) + len(batch["ids"]) * value.float()
    means = processes.mean(torch.stack(list(total.values())) / rows)
    return dict(zip(total, means.tolist(), strict=True))
