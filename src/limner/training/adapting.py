"""An adapter as what is trained: a system of which all else stays as it was loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from limner.adapters import trainable
from limner.adapters.attaching import stack
from limner.adapters.trainable import AdapterConfig
from limner.errors import UsageError
from limner.training.config import TrainConfig


class Adapting(nn.Module):
    """A system as the loop knows it, whose only weights are an adapter's; `base` is the model, which is not a part of
    it. What it has no answer to, the model answers."""

    phases = ("main",)

    def __init__(self, base: Any, config: AdapterConfig, seed: int) -> None:
        super().__init__()
        if not hasattr(base, "adapters"):
            raise UsageError(f"{base.name} takes no adapters: they are for models that draw from words")
        self.__dict__["base"] = base
        self.adapter = trainable.Training(base, config, torch.Generator().manual_seed(seed))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    @property
    def identity(self) -> str:
        """Of all that is not trained."""
        return self.base.model_hash

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        return self.base.loss(batch, phase, generator)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.adapter.parameters())

    @contextmanager
    def as_drawn(self, name: str) -> Iterator[Any]:
        """The model with the adapter as users attach it: from the file that the run would leave now."""
        adapters = stack(self.base)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.safetensors"
            trainable.write(self.adapter, file)
            self.adapter.off()
            try:
                if any(part.detach().any() for part in self._differences()):
                    adapters.attach(file)
                yield self.base
            finally:
                adapters.restore([])
                self.adapter.on()

    def _differences(self) -> Iterator[Tensor]:
        """Tensors that are 0 where nothing was learned yet, which is no adapter."""
        for name in self.adapter.named:
            parts = self.adapter[name].parts
            yield from (part for key, part in parts.items() if key in ("up", "w2_a", "k2_a", "k2", "blocks"))


def draw(system: Adapting, config: TrainConfig) -> list[Image.Image]:
    """As `loop.draw_prompts`, by the model with the adapter attached."""
    from limner.training.loop import draw_prompts

    with system.as_drawn(config.name) as model:
        return draw_prompts(model, config)


def export(system: Adapting, config: TrainConfig, path: Path) -> None:
    trainable.write(system.adapter, path)
