"""A classifier of noisy pictures as a system: trained at every timestep, asked by the guidance of one that draws."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from limner import pictures
from limner.errors import UsageError
from limner.models.classifier import Classifier
from limner.models.pixels import Pixels, PixelsConfig
from limner.nn.embeddings import sent
from limner.sampling.interpolants import Discrete
from limner.systems.wordless import Wordless
from limner.text.labels import Labels
from limner.types import Conditioning, Defaults, Images, Latents, Request

QUARTERS = 4
"""Of the timesteps, from the clean end, whose accuracies are told."""


class ClassifyingSystem(Wordless, nn.Module):
    """Learns p(y | x_t) of pictures under the noise of a diffusion (arXiv:2105.05233, section 4); it draws nothing."""

    task = "classification"
    phases = ("main",)
    grid = 1
    recordable = True
    """Its loss is the `error` of its `examples`."""

    def __init__(
        self,
        network: Classifier,
        text_encoder: Labels,
        interpolant: Discrete,
        defaults: Defaults,
        name: str,
        family: str,
    ) -> None:
        super().__init__()
        self.network, self.text_encoder, self.autoencoder = network, text_encoder, Pixels(PixelsConfig())
        self.interpolant, self.defaults, self.name, self.family = interpolant, defaults, name, family

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def likelihood(self, x: Images, ratio: float, labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """log p(y | x) of pictures of unit variance whose noise is `ratio` times what is left of them."""
        t = torch.full((len(x),), self.interpolant.time(ratio), device=x.device)
        return self.network(x, t).log_softmax(1).gather(1, labels[:, None])[:, 0]

    # ---------------------------------------------------------------- training

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the captions' classes, and how often the likeliest is right: of all, and by quarter of the
        timesteps. A batch may have more or fewer than a quarter of its pictures there, so that only means of many are
        shares. `batch` has "captions" and "images" (b, 4, size, size). Raises UsageError for a caption that is no
        class."""
        return self.error(self.examples(batch, generator))

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """What the network is asked of a batch, x and t, and as labels in "cond" what it ought to say."""
        x0, device, size = self.encode(batch["images"]), self.device, self.network.config.size
        if x0.shape[2:] != (size, size):
            raise UsageError(f"pictures of {x0.shape[3]} x {x0.shape[2]} pixels, but {self.name} sees {size}: give "
                             f"data.size={size}, or system.network.size")  # fmt: skip
        if not all(map(str.strip, batch["captions"])):
            raise UsageError(f"a picture has no caption, of which {self.name} learns the class")
        labels = sent(torch.tensor(self.text_encoder.classes(batch["captions"])), device)
        t, sigma = self.interpolant.draw(len(x0), generator, device)
        level = sigma[:, None, None, None]
        eps = torch.randn(x0.shape, generator=generator, device=device)
        return {
            "x": self.interpolant.input_scale(level) * (x0 + level * eps),
            "t": t,
            "cond": Conditioning(labels=labels),
        }

    def error(self, examples: dict[str, Any]) -> dict[str, Tensor]:
        t, labels = examples["t"], examples["cond"].labels
        logits = self.network(examples["x"], t).float()
        right = (logits.argmax(1) == labels).float()
        quarter = t * QUARTERS // len(self.interpolant.sigmas)
        told = {f"accuracy_{k + 1}": QUARTERS * (right * (quarter == k)).mean() for k in range(QUARTERS)}
        return {"loss": F.cross_entropy(logits, labels), "accuracy": right.mean(), **told}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.network.compile(*args, **kwargs)

    # ---------------------------------------------------------------- drawing

    def check(self, request: Request) -> None:
        raise UsageError(
            f"{self.name} draws nothing, it tells classes: name a model that draws, and this with --classifier"
        )

    def encode(self, images: Images, tile: int | None = None) -> Latents:
        """On white."""
        return pictures.opaque(images)
