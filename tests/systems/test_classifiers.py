"""Classifiers of noisy pictures: files against their authors' program, what they learn, and how they lead a drawing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from limner import catalog, exchange, memory, metadata, pipeline
from limner.checkpoints import pixels
from limner.checkpoints.layouts import write
from limner.checkpoints.unet import classifier_layout
from limner.errors import Assumed, CheckpointMismatch, Ignored, UnknownName, UsageError
from limner.models import classifier
from limner.models.classifier import Classifier, ClassifierConfig
from parity import difference

from .test_catalogue import furthest, noisy
from .test_pixel_files import formula

SMALL = ClassifierConfig(num_classes=10, size=16, widths=(64, 64, 128), num_blocks=2, depths=(0, 1, 1))
LOGITS = (
    -0.420687, 0.255893, -0.719733, -0.202764, -0.206702, -0.358978, 0.495141, -0.483447, -0.868315, -1.178257,
    -0.548491, -0.176205, -0.609613, 0.058665, -0.21943, -0.410595, 0.676008, -0.23389, -0.693234, -0.752367,
)  # fmt: skip
GRADIENT = (-0.0630467, -0.1603988, 0.1864145, 0.0076356, 0.0348829, -0.0684623, 0.0092365, 0.0634283)
"""What guided_diffusion makes of the formula at timesteps 123 and 900, and every 219th part of the gradient of the
logarithm of the probability of class 7."""


def contents(config: ClassifierConfig, make: Any = formula) -> dict[str, Tensor]:
    """Of a file of such a network."""
    with torch.device("meta"):
        ours = Classifier(config).state_dict()
    return {n: make(n, tuple(t.shape)) for n, t in write(classifier_layout(config.unet), ours).items()}


def test_a_file_computes_what_its_authors_program_computes(here):
    save_file(contents(SMALL), "classifier.safetensors")
    with pytest.warns(Assumed, match="cosine betas of 1000 timesteps, heads 64 wide"):
        system = catalog.load_classifier("classifier.safetensors")
    assert system.network.config == SMALL
    x = formula("x", (2, 3, 16, 16)).requires_grad_()
    logits = system.network(x, torch.tensor([123.0, 900.0]))
    assert difference(logits.flatten(), torch.tensor(LOGITS)) <= 1e-5
    gradient = torch.autograd.grad(logits.log_softmax(1)[:, 7].sum(), x)[0].flatten()
    assert difference(gradient[:: len(gradient) // 7], torch.tensor(GRADIENT)) <= 1e-5
    sigma = system.interpolant.sigmas[123]
    told = system.likelihood(x[:1], sigma, torch.tensor([7]))
    assert torch.allclose(told, torch.tensor(LOGITS)[:10].log_softmax(0)[7:8], atol=1e-5)


@pytest.mark.parametrize("name", ["ADM_CLASSIFIER_64", "ADM_CLASSIFIER_128", "ADM_CLASSIFIER_256"])
def test_published_classifiers_are_known_by_names_and_shapes(name):
    config = getattr(classifier, name)
    found = pixels.classifier(Path("c.pt"), contents(config, lambda _, shape: torch.empty(shape, device="meta")))
    assert found is not None
    assert found[0] == config
    assert found[1].betas == ("cosine" if config.size == 64 else "linear")


def test_what_is_no_whole_classifier_is_told_in_a_line(here):
    whole = contents(SMALL)
    (here / "whole").mkdir()
    save_file(whole, "whole/c.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"classifier of ADM.*--classifier FILE"):
        catalog.load("whole/c.safetensors")
    assert exchange.inspect("whole/c.safetensors")["kind"] == "classifier of ADM"
    for name, change, match in (
        ("lacks", {"out.2.c_proj.weight": None}, "not whole: there is no 'out.2.c_proj.weight'"),
        ("time", {"time_embed.0.weight": torch.zeros(256, 128)}, "time is told in 128 numbers"),
        ("blocks", {"input_blocks.5.1.qkv.weight": None}, "do not fit|not levels|not whole|are not"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, f"{name}.safetensors")
        with pytest.raises(CheckpointMismatch, match=match):
            catalog.load_classifier(f"{name}.safetensors")


# -------------------------------------------------------------------- leading


class Bright(torch.nn.Module):
    """Says of a picture that it is of class k by 1000 times as much as its mean is near to k / 20 - 1."""

    config = classifier.CLASSIFIER_TINY

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        levels = torch.arange(40, device=x.device) / 20 - 1
        return -100 * (x.mean((1, 2, 3))[:, None] - levels).square()


@pytest.fixture
def led() -> Any:
    system: Any = noisy("adm-tiny").eval()
    classes: Any = noisy("adm-classifier-tiny").eval().requires_grad_(False)
    system.led_by(classes)
    return system


def image_of(system: Any, prompt: str = "red circle", **told: Any) -> np.ndarray:
    asked = {"steps": 3, "seed": 1} | told
    return np.asarray(pipeline.generate(system, prompt, **asked)[0].image, dtype=float)


@pytest.mark.parametrize("name", ["ddpm", "adm", "edm", "flow-matching", "dit-32", "sit-32"])
def test_a_drawing_is_led_to_the_class_of_its_prompt(name):
    system: Any = noisy(f"{name}-tiny").eval()
    classes: Any = catalog.build(catalog.entry("adm-classifier-tiny").config)
    classes.network = Bright()
    system.led_by(classes)
    plain, dark, bright = (
        image_of(system, prompt, steps=6, classifier_scale=scale).mean() for prompt, scale in (("20", 0), ("2", 8), ("38", 8))
    )
    assert dark < bright - 20
    assert plain != dark
