"""Systems that diffuse pixels, told classes or nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import ImageChops

from limner import catalog, pipeline
from limner.data.batches import DataConfig, open_images
from limner.errors import Ignored, UnknownName, UsageError
from limner.metrics.likelihood import variational_bits
from limner.sampling import bounds
from limner.sampling.interpolants import VPConfig
from limner.systems import previews
from limner.systems.objectives import Objective

from .test_catalogue import noisy
from .test_inverting import built as known

DDPM: Any = catalog.entry("ddpm-tiny").config


def built(**changes: Any) -> Any:
    torch.manual_seed(0)
    return catalog.build(replace(DDPM, **changes)).eval()


def test_pixels_are_their_own_latents_and_previews():
    system = built()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert system.encode(x) is not None
    assert torch.equal(system.decode(system.encode(x)), x)
    shown = previews.show(x, previews.of(system.autoencoder))
    assert torch.equal(torch.tensor(shown[1].get_flattened_data())[5], ((x[1, :, 0, 5] + 1) * 127.5).round().long())


def test_noise_added_on_the_way_is_asked_for_and_remembered():
    pipe = pipeline.Pipeline(known("ddpm-tiny"), "ddpm-tiny")
    asked: Any = {"steps": 4, "seed": 0, "schedule": "trailing"}
    draw = lambda **more: pipe.generate("red circle", **asked, **more)[0]  # noqa: E731
    some, none, most = (draw(sampler="ddim", eta=eta) for eta in (0.5, 0.0, 1.0))
    assert ImageChops.difference(most.image, draw(sampler="ddpm").image).getextrema()[0][1] <= 1
    assert ImageChops.difference(most.image, some.image).getextrema()[0][1] > 8
    assert none.image.tobytes() == draw(sampler="ddim").image.tobytes() != some.image.tobytes()
    assert some.settings["eta"] == 0.5
    churned = draw(sampler="euler", churn=2.0)
    assert churned.image.tobytes() != draw(sampler="euler").image.tobytes()
    assert churned.settings["churn"] == 2.0
    with pytest.raises(UsageError, match="the sampler 'heun' takes no eta: it is for euler_a, "):
        draw(sampler="heun", eta=0.5)
    with pytest.raises(UsageError, match="the sampler 'ddim' takes no churn: it is for euler, heun, flow_euler"):
        draw(sampler="ddim", churn=1.0)


def test_tiles_of_an_autoencoder_that_is_none_are_told():
    with pytest.warns(Ignored, match="ddpm-tiny has no autoencoder to see tiles of 16 pixels"):
        pipeline.Pipeline(built(), "ddpm-tiny").generate("red circle", steps=1, vae_tile=16)


def test_transparent_pictures_are_learned_on_white():
    system, nothing = built(), -torch.ones(1, 4, 16, 16)
    torch.manual_seed(0)
    asked = system.examples({"images": nothing, "captions": ["red circle"]}, torch.Generator().manual_seed(0))
    sigma = asked["sigma"]
    x = asked["x"] / system.interpolant.input_scale(sigma)
    assert torch.allclose(x - sigma * asked["target"], torch.ones_like(x), atol=1e-4 * float(sigma))


def test_a_class_changes_the_picture_and_none_is_what_guidance_leads_away_from():
    system = noisy("ddpm-tiny").eval()
    draw = {"steps": 3, "seed": 1}
    red, blue = (pipeline.generate(system, p, **draw)[0].image.tobytes() for p in ("red circle", "blue circle"))
    assert red != blue
    assert pipeline.generate(system, "red circle", guidance=3.0, **draw)[0].image.tobytes() != red
    with pytest.raises(UnknownName, match="no class 'fox'"):
        pipeline.generate(system, "fox", **draw)


def test_without_a_class_for_none_there_is_no_guidance():
    with pytest.raises(UsageError, match=r"no class for none: give caption_dropout=0, or network.num_classes=41"):
        catalog.check(replace(DDPM, network=replace(DDPM.network, num_classes=40)))
    system = built(network=replace(DDPM.network, num_classes=40), caption_dropout=0.0)
    pipeline.generate(system, "red circle", steps=2)
    with pytest.raises(UsageError, match="guidance is 2, but ddpm-tiny has no class for none"):
        pipeline.generate(system, "red circle", steps=2, guidance=2.0)
    loss = system.loss(
        {"images": torch.rand(8, 4, 16, 16), "captions": ["yellow cross"] * 8}, "main", torch.Generator()
    )
    assert loss["loss"].isfinite()


def test_one_that_knows_no_classes_is_told_nothing():
    nothing = replace(DDPM.text_encoder, num_classes=0, names=())
    alone = replace(DDPM.defaults, prompted=False)
    system = built(network=replace(DDPM.network, num_classes=0), text_encoder=nothing, defaults=alone)
    pictures = pipeline.generate(system, "", steps=2, batch=2, seed=3)
    assert pictures[0].image.size == (16, 16)
    assert pictures[0].image.tobytes() != pictures[1].image.tobytes()
    with pytest.raises(UsageError, match="it reads no words: leave the prompt out"):
        pipeline.generate(system, "red circle", steps=2)
    with pytest.raises(UsageError, match=r"guidance is 2"):
        pipeline.generate(system, "", steps=2, guidance=2.0)
    with pytest.raises(UsageError, match=r"network.num_classes=7 are not the 0 classes"):
        catalog.check(replace(DDPM, network=replace(DDPM.network, num_classes=7), text_encoder=nothing, defaults=alone))


def test_flows_tell_their_time_in_thousandths():
    flow: Any = catalog.build(catalog.entry("flow-matching-tiny").config)
    plain: Any = catalog.build(replace(catalog.entry("flow-matching-tiny").config, network=DDPM.network))
    torch.manual_seed(0)
    for parameter in flow.network.parameters():
        parameter.data.normal_(std=0.1)
    plain.network.load_state_dict(flow.network.state_dict())
    x, cond = torch.randn(2, 3, 16, 16), flow.text_encoder.encode(["red circle", "0"])
    t = torch.tensor([0.25, 0.75])
    assert torch.equal(flow.network.eval()(x, t, cond), plain.network.eval()(x, 1000 * t, cond))


def test_a_group_of_the_data_may_stand_for_captions():
    images = open_images(DataConfig(source="shapes", size=16, caption_from="concept"))
    assert images.captions[0] == ("circle",)
    assert len({c for (c,) in images.captions}) == 5
    with pytest.raises(UnknownName, match=r"no data.caption_from 'shap'.*concept"):
        open_images(DataConfig(source="shapes", size=16, caption_from="shap"))
    with pytest.raises(UsageError, match=r"no effect on data.source=folder"):
        open_images(DataConfig(source="folder", folder="x", caption_from="style"))


def test_the_styles_of_the_rows_are_those_of_the_data():
    pytest.importorskip("resvg_py")
    from limner.data.icons import default_folders, open_icons
    from limner.errors import FileProblem

    try:
        pack = open_icons()
    except FileProblem:
        pytest.skip(f"no icon pack in {default_folders()}")
    assert {record.style for record in pack.records} == set(catalog.STYLES.names)


def learner(**changes: Any) -> Any:
    config: Any = catalog.entry("iddpm-tiny").config
    torch.manual_seed(0)
    system: Any = catalog.build(replace(config, **changes)).eval()
    for parameter in system.network.parameters():
        parameter.data.normal_(std=0.05)
    system.objective = Objective(variance_weight=0.001)
    return system


def test_the_variational_bound_is_that_which_is_measured():
    """Every timestep of a short chain, against the one that takes float64 and the whole chain."""
    system = learner(interpolant=VPConfig(betas="cosine", steps=6, offset=0, to_zero=True))
    image = (torch.rand(1, 3, 16, 16) * 255).round() / 127.5 - 1
    told = system.text_encoder.encode(["red circle"])
    sigmas = system.interpolant.sigmas
    noise = torch.Generator().manual_seed(0)
    said: dict[float, torch.Tensor] = {}

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        scaled = system.interpolant.input_scale(sigma) * x
        out = system.network(scaled.float(), torch.tensor([system.interpolant.time(sigma)]), told).double()
        said[sigma] = (out[:, 3:] + 1) / 2
        return system.prediction.to_x0(out[:, :3], x.double(), 1.0, sigma)

    with torch.no_grad():
        measured = variational_bits(denoise, image, system.interpolant, noise, variance=said.__getitem__, clip=False)
        noise.manual_seed(0)
        terms = []
        for t, sigma in enumerate(sigmas):
            e = torch.randn(image.shape, generator=noise)
            level = torch.full((1, 1, 1, 1), sigma)
            x = system.interpolant.input_scale(level) * (image + level * e)
            asked = {"x": x, "t": torch.tensor([t]), "cond": told, "target": e, "alpha": torch.ones_like(level)}
            asked |= {"sigma": level, **bounds.step(system.interpolant, torch.tensor([t]))}
            terms.append(float(system.error(asked)["bits"]) / len(sigmas))
    assert terms == pytest.approx(measured.terms[0].tolist(), rel=2e-3)


def test_the_bound_teaches_the_variance_alone():
    system = learner()
    batch = {"images": torch.rand(8, 4, 16, 16) * 2 - 1, "captions": ["red circle"] * 8}
    whole = system.loss(batch, "main", torch.Generator().manual_seed(1))
    assert set(whole) == {"loss", "error", "bits"}
    whole["bits"].backward()
    grad = system.network.conv_out.weight.grad
    assert not grad[:3].any()
    assert grad[3:].abs().amin() > 0
    assert float(whole["loss"]) == pytest.approx(float(whole["error"]) + 0.001 * float(whole["bits"]), rel=1e-5)


def test_a_variance_that_was_learned_is_drawn_with():
    system = learner()
    seen = [pipeline.generate(system, "red circle", steps=4, seed=1, sampler=s)[0].image.tobytes()
            for s in ("ddpm", "ddpm_large", "ddim")]  # fmt: skip
    assert seen[0] == seen[1]  # it says more than either
    system.network.conv_out.weight.data[3:] *= -1
    system.network.conv_out.bias.data[3:] *= -1
    others = [pipeline.generate(system, "red circle", steps=4, seed=1, sampler=s)[0].image.tobytes()
              for s in ("ddpm", "ddim")]  # fmt: skip
    assert others[0] != seen[0]
    assert others[1] == seen[2]
    system.network.conv_out.weight.data[3:] = 0
    system.network.conv_out.bias.data[3:] = -1  # the smaller, whatever x is
    smallest = pipeline.generate(system, "red circle", steps=4, seed=1, sampler="ddpm")[0].image
    system.learned_variance = False
    assert (
        smallest.tobytes()
        == pipeline.generate(system, "red circle", steps=4, seed=1, sampler="ddpm")[0].image.tobytes()
    )


def test_that_tiles_leave_a_learned_variance_out_is_said():
    system = learner()
    tiled = {"prompt": "red circle", "steps": 2, "width": 32, "height": 16, "tile": 16}
    (said,) = pipeline.ignored(system, pipeline.prepare(system, **tiled, sampler="ddpm"))
    assert said == "in tiles the variance that iddpm-tiny learned is not drawn with: the sampler's own is"
    assert not pipeline.ignored(system, pipeline.prepare(system, **tiled, sampler="ddim"))
    assert not pipeline.ignored(system, pipeline.prepare(system, prompt="red circle", sampler="ddpm"))


def test_what_is_foreseen_is_kept_to_what_pixels_can_be():
    system = noisy("ddpm-tiny").eval()
    system.network.conv_out.weight.data *= 20
    request = pipeline.prepare(system, prompt="red circle", steps=4, seed=1, sampler="ddim")
    found = {}
    for system.clip in (True, False):
        with torch.inference_mode():
            cond = system.condition([request.prompt], request)
            found[system.clip] = system.sample(cond, request, pipeline.noise_source([1], "cpu")).abs().max()
    assert found[True] <= 1
    assert found[False] > 2


def test_edm_is_preconditioned_for_the_data_that_it_is_told_of():
    """Inputs and targets of unit variance (arXiv:2206.00364, appendix B.6), and c_skip and c_out of table 1."""
    system: Any = catalog.build(catalog.entry("edm-tiny").config)
    data, generator = system.interpolant.data, torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(100_000, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in (0.01, 0.84, 50.0):
        x = data * x0 + sigma * eps
        assert float((system.interpolant.input_scale(sigma) * x).std()) == pytest.approx(1, abs=0.01)
        assert float(system.prediction.target(data * x0, eps, 1.0, sigma).std()) == pytest.approx(1, abs=0.01)
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    assert torch.allclose(system.prediction.to_x0(eps, x, 1.0, sigma), skip * x + out * eps)
