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
from limner.types import Conditioning
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
        ("blocks", {"input_blocks.5.1.qkv.weight": None}, "do not fit together .9 blocks are not levels of"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, f"{name}.safetensors")
        with pytest.raises(CheckpointMismatch, match=match):
            catalog.load_classifier(f"{name}.safetensors")


# -------------------------------------------------------------------- leading


class Bright(torch.nn.Module):
    """Takes pictures for a higher class the brighter they are."""

    config = classifier.CLASSIFIER_TINY

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 20 * x.mean((1, 2, 3))[:, None] * (torch.arange(40) / 20 - 1)


def led(name: str, network: Any = None) -> Any:
    """A system, and a classifier that leads it."""
    system: Any = noisy(name).eval()
    classes: Any = noisy("adm-classifier-tiny").eval().requires_grad_(False)
    classes.network = network or classes.network
    system.led_by(classes)
    return system


def drawn(system: Any, prompt: str = "red circle", **told: Any) -> Image.Image:
    return pipeline.generate(system, prompt, **{"steps": 3, "seed": 1} | told)[0].image


@pytest.mark.parametrize(
    "name", ["adm", "edm", "sit-32", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddpm", "flow-matching"))]
)
def test_a_drawing_is_led_to_the_class_of_its_prompt(name):
    system: Any = catalog.build(catalog.entry(f"{name}-tiny").config).eval()
    system.led_by(led("adm-tiny", Bright()).classifier)
    told = {"classifier_scale": 8, "sampler": "ddim"}
    dark, bright = (np.asarray(drawn(system, prompt, **told)).mean() for prompt in ("2", "38"))
    assert dark < bright - 20


def test_pictures_are_led_alone_as_in_a_batch_and_redone_from_their_settings():
    system = led("adm-tiny")
    together = pipeline.generate(system, "{red|blue} circle", steps=3, seed=1, batch=3, classifier_scale=40.0)
    assert len({one.settings["prompt"] for one in together}) == 2
    last = together[2].settings
    assert (last["classifier"], last["classifier_scale"]) == ("adm-classifier-tiny", 40.0)
    again = {k: v for k, v in last.items() if k not in ("limner", "model", "classifier", "classifier_hash")}
    assert furthest(pipeline.generate(system, **again)[0].image, together[2].image) <= 1
    assert furthest(drawn(system, seed=3, classifier_scale=40.0), drawn(system, seed=3)) > 1
    left = drawn(system, guidance_interval=(0.5, 0.5))
    with pytest.warns(Ignored, match="adm-classifier-tiny leads nowhere at classifier_scale 0"):
        assert drawn(system, classifier_scale=0).tobytes() == left.tobytes() != drawn(system).tobytes()
    both = drawn(system, seed=3, guidance=3.0, classifier_scale=40.0)
    del system.__dict__["classifier"]
    assert drawn(system).tobytes() == left.tobytes()
    assert drawn(system, seed=3, guidance=3.0).tobytes() != both.tobytes()
    with pytest.warns(Ignored, match="no effect without a classifier"):
        drawn(system, classifier_scale=2)


def test_the_memory_of_a_classifier_is_planned():
    system = led("adm-tiny")
    request = pipeline.prepare(system, prompt="red circle", steps=2)
    found = memory.plan(system, request, 1)
    assert found.weights["classifier"] == memory.bytes_of(system.classifier)
    assert next(s.parts for s in found.stages if s.name == "a step") == ("network", "classifier")


def test_a_network_that_is_told_nothing_draws_the_class_that_its_classifier_is_told():
    row: Any = catalog.entry("adm-tiny").config
    nothing = replace(row.text_encoder, num_classes=0, names=())
    alone = replace(
        row, network=replace(row.network, num_classes=0), text_encoder=nothing,
        defaults=replace(row.defaults, prompted=False),
    )  # fmt: skip
    torch.manual_seed(0)
    system: Any = catalog.build(alone).eval()
    classes: Any = catalog.build(catalog.entry("adm-classifier-tiny").config)
    classes.network = Bright()
    system.led_by(classes)
    dark, bright = (np.asarray(drawn(system, prompt, classifier_scale=8)).mean() for prompt in ("2", "38"))
    assert dark < bright - 20
    with pytest.raises(UsageError, match="the prompt is empty: name the class that adm-classifier-tiny leads to"):
        drawn(system, "")
    with pytest.raises(UnknownName, match="no class 'fox'"):
        drawn(system, "fox")


def test_what_no_classifier_can_lead_is_refused_in_a_line(tiny_model):
    system = led("adm-tiny")
    for told, match in (
        ({"prompt": "red circle AND blue square"}, "no class 'red circle AND blue square'"),
        ({"width": 32}, "32 x 16 pixels, but adm-classifier-tiny sees 16 x 16"),
        ({"hires": 2.0}, "32 x 32 pixels, but adm-classifier-tiny sees 16 x 16"),
        ({"classifier_scale": -1.0}, "classifier_scale is -1.0"),
        ({"classifier_scale": float("nan")}, "classifier_scale is nan"),
    ):
        with pytest.raises(UsageError, match=match):
            drawn(system, **told)
    classes = system.classifier
    with pytest.raises(UsageError, match="adm-classifier-tiny draws nothing, it tells classes"):
        drawn(classes, "")
    with pytest.raises(CheckpointMismatch, match="knows classes of pixels, but icons-tiny draws otherwise"):
        pipeline.load(tiny_model).system.led_by(classes)
    with torch.device("meta"):
        large: Any = catalog.build(catalog.entry("adm").config)
    with pytest.raises(CheckpointMismatch, match=r"40 classes of adm-classifier-tiny are not the 23 of adm\b"):
        large.led_by(classes)
    with pytest.raises(CheckpointMismatch, match="draws: give a classifier of noisy pictures"):
        pipeline.load(tiny_model, classifier=tiny_model)
    row: Any = classes.text_encoder.config
    classes.text_encoder = type(classes.text_encoder)(replace(row, names=row.names[::-1]))
    with pytest.raises(CheckpointMismatch, match="40 classes of adm-classifier-tiny are not the 40"):
        system.led_by(classes)


# -------------------------------------------------------------------- learning


def test_the_accuracy_of_each_quarter_of_the_timesteps_is_told():
    system: Any = catalog.build(catalog.entry("adm-classifier-tiny").config)
    t = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    labels = torch.arange(8)
    right = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1])
    system.network.forward = lambda x, t: 9.0 * torch.eye(40)[torch.where(right == 1, labels, labels + 1)]
    cond = Conditioning(labels=labels)
    told = system.error({"x": torch.zeros(8), "t": t, "cond": cond})
    assert [float(told[f"accuracy_{k}"]) for k in (1, 2, 3, 4)] == [1.0, 0.5, 0.0, 1.0]  # of two each
    assert float(told["accuracy"]) == 5 / 8


def test_a_run_resumes_bit_for_bit_and_leads_a_drawing_by_commands_alone(limner, here):
    few = ("batch_size=2", "data.limit=16", "save_every=1", "--device", "cpu")
    done = limner("train", "adm-classifier-tiny", "-o", "whole", "steps=2", "log_every=1", *few)
    assert done.code == 0, done.err
    assert "accuracy_4" in json.loads((here / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    limner("train", "adm-classifier-tiny", "-o", "half", "steps=2", "log_every=1", *few)
    for left in (here / "half" / "checkpoints").glob("step-000002"):
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    assert limner("train", "--resume", "half", "--device", "cpu").code == 0
    final = "final/adm-classifier-tiny.safetensors"
    assert (here / "whole" / final).read_bytes() == (here / "half" / final).read_bytes()
    model: Any = catalog.entry("adm-tiny").config
    catalog.save(catalog.build(model), model, here / "adm.safetensors")
    asked = ("red circle", "-m", "adm.safetensors", "--steps", 2, "-s", 3)
    painted = limner(*asked, "--classifier", "whole", "--classifier-scale", 2, "-o", "a.png")
    assert painted.code == 0, painted.err
    settings = metadata.read_settings(here / "a.png")
    assert (settings["classifier"], settings["classifier_scale"]) == ("adm-classifier-tiny", 2.0)
    refused = limner("generate", "-C", "a.png", "-m", "adm.safetensors", "-o", "b.png")
    assert "painted with the classifier 'adm-classifier-tiny' (add --classifier FILE)" in refused.err
    again = limner("generate", "-C", "a.png", "-m", "adm.safetensors", "--classifier", "half", "-o", "b.png")
    assert again.code == 0, again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert limner("generate", "-m", "whole").err.strip().startswith("limner: adm-classifier-tiny draws nothing")
    for field, match in (
        ("data.size=32", "sees 16: give data.size=16"),
        ("system.network.num_classes=7", "network.num_classes=7 are not the 40 classes"),
    ):
        bad = limner("train", "adm-classifier-tiny", "-o", "bad", field, *few)
        assert bad.code == 2, bad.err
        assert match in bad.err
        assert bad.err.count("\n") == 1
