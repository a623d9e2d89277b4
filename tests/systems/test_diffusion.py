"""A known answer: a network that knows the picture of every caption makes no error in training, and draws it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from limner import catalog, pipeline
from limner.errors import FileProblem, UsageError
from limner.sampling.interpolants import Discrete

CAPTIONS = ["red circle", "blue square", "green triangle"]
SHAPE = (8, 8, 8)


class Oracle(nn.Module):
    """Answers without error for the picture that belongs to the words it is told, and to nothing else."""

    def __init__(self, system, pictures: torch.Tensor) -> None:
        super().__init__()
        self.config = system.network.config
        self.anything = nn.Parameter(torch.zeros(1))
        self.interpolant, self.prediction, self.pictures = system.interpolant, system.prediction, pictures
        self.known = system.text_encoder.encode(CAPTIONS).tokens

    def forward(self, x, t, cond):
        place = (cond.tokens[:, None] - self.known).flatten(2).square().sum(-1).argmin(1)
        x0, answers = self.pictures[place], []
        for k, time in enumerate(t.tolist()):
            sigma = self.interpolant.at(time) if isinstance(self.interpolant, Discrete) else time
            alpha, whole = self.interpolant.alpha(sigma), x[k] / self.interpolant.input_scale(sigma)
            answers.append(self.prediction.target(x0[k], (whole - alpha * x0[k]) / sigma, alpha, sigma))
        return torch.stack(answers)


@pytest.fixture(params=["icons-tiny", "sd1-tiny"])
def knowing(request):
    system = catalog.build(catalog.entry(request.param).config).eval()
    pictures = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    system.network, system.caption_dropout = Oracle(system, pictures), 0.0
    return system, pictures


def loss(system, latents, captions) -> float:
    batch = {"latents": latents, "captions": captions}
    return float(system.loss(batch, "main", torch.Generator().manual_seed(0))["loss"])


def test_who_knows_the_pictures_makes_no_error_in_training(knowing):
    system, pictures = knowing
    assert loss(system, pictures, CAPTIONS) < 1e-3
    assert loss(system, pictures, CAPTIONS[::-1]) > 0.1  # another's caption


def test_who_knows_the_pictures_draws_them(knowing):
    system, pictures = knowing
    for sampler in ("euler", "dpmpp_2m", "heun"):
        request = pipeline.prepare(system, prompt="any", sampler=sampler, steps=4, guidance=1.0)
        noise = pipeline.noise_source([1, 2, 3], "cpu")
        with torch.inference_mode():
            drawn = system.sample(system.condition(CAPTIONS, request), request, noise)
        assert torch.allclose(drawn, pictures, atol=1e-2), sampler


def test_a_picture_is_painted_over_with_words(knowing):
    system, _ = knowing
    with pytest.raises(UsageError, match="prompt is empty"):
        pipeline.prepare(system, prompt=" ", image=Image.new("RGBA", (32, 32)))


def test_what_is_no_picture_is_refused(knowing):
    system, pictures = knowing
    pictures[0, 0, 0, 0] = torch.nan
    with pytest.raises(FileProblem, match="no picture"):
        pipeline.generate(system, CAPTIONS[0], steps=1)


def test_guidance_goes_from_the_negative_prompt_through_the_prompt(knowing):
    system, pictures = knowing
    request = pipeline.prepare(
        system, prompt="any", negative=CAPTIONS[1], sampler="euler", schedule="uniform", steps=1, guidance=3.0
    )
    with torch.inference_mode():
        drawn = system.sample(system.condition(CAPTIONS[:1], request), request, pipeline.noise_source([1], "cpu"))
    assert torch.allclose(drawn[0], pictures[1] + 3 * (pictures[0] - pictures[1]), atol=1e-2)
