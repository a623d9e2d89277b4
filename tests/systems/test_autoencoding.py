"""KL and VQ autoencoders as latent diffusion trains them: the terms of their loss by hand, and what a run leaves."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from limner import catalog, pictures, recipes
from limner.data.batches import open_batches
from limner.errors import CheckpointMismatch, UsageError
from limner.models.lpips import LPIPS
from limner.systems.autoencoding import AutoencodingSystem, kl_to_normal
from limner.training.config import parse_overrides
from limner.training.memory import check_counts
from limner.training.state import TrainState

NAMES = ("kl-f8-tiny", "vq-f4-tiny")
START = catalog.entry(NAMES[0]).config.loss.disc_start
RUN = (
    *("--out", "run", "--device", "cpu", "log_every=20", "save_every=100", "data.limit=32"),
    *("steps=40", "lr=4e-3", "ema_half_life=50", "system.loss.disc_start=35"),
)


def built(name: str, **changes) -> AutoencodingSystem:
    torch.manual_seed(0)
    config = catalog.entry(name).config
    return catalog.build(replace(config, loss=replace(config.loss, **changes)))


def batch(name: str, count: int = 8) -> dict:
    return open_batches(recipes.get(name).data, 0, torch.device("cpu")).batch(0, count)


def loss(system, told: dict, phase: str = "generator") -> dict[str, float]:
    return {k: v.item() for k, v in system.loss(told, phase, torch.Generator().manual_seed(0)).items()}


def test_the_kl_of_known_normal_distributions():
    mean, logvar = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    assert kl_to_normal(mean, logvar).item() == 0
    assert kl_to_normal(mean + 3, logvar).item() == pytest.approx(60 * 4.5)
    logvar[0] = log(4)
    assert kl_to_normal(mean, logvar).item() == pytest.approx(60 * 0.5 * (4 - 1 - log(4)) / 2)


class Grey(nn.Module):
    def forward(self, a, b):
        return torch.full((len(a), 1, 1, 1), 3.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_before_the_discriminator_by_hand(name, monkeypatch):
    """White pictures of 32 pixels that come back grey: an L1 of 1, and LPIPS of 3, everywhere."""
    system = built(name, kl_weight=0.5, codebook_weight=2.0, perceptual_weight=0.1)
    system.perceptual = Grey()
    held = {"kl": torch.tensor(10.0), "codebook": torch.tensor(10.0)}
    monkeypatch.setattr(system, "rebuild", lambda images, generator: (torch.zeros_like(images), held))
    told = {"images": torch.cat([torch.full((2, 3, 32, 32), -1.0), torch.full((2, 1, 32, 32), -1.0)], 1), "step": 0}
    if system.logvar is None:
        assert loss(system, told)["loss"] == pytest.approx(1.3 + 2 * 10)
    else:
        system.logvar.data.fill_(log(2))
        assert loss(system, told)["loss"] == pytest.approx(3 * 32 * 32 * (1.3 / 2 + log(2)) + 0.5 * 10, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_discriminator_pulls_from_its_first_step_on_as_hard_as_it_is_told(name):
    system, told = built(name, disc_weight=0.25), batch(name)
    before = loss(system, told | {"step": START - 1})
    after = loss(system, told | {"step": START})
    assert "adversarial" not in before
    assert loss(system, told) == after  # where nobody counts
    pull = 0.25 * after["adaptive_weight"] * after["adversarial"]
    assert after["loss"] == pytest.approx(before["loss"] + pull, abs=1e-4)
    assert abs(pull) > 1e-3

    last = system.autoencoder.decoder.conv_out.weight
    terms = system.loss(told, "generator", torch.Generator().manual_seed(0))
    nll, pulled = (torch.autograd.grad(terms[k], last, retain_graph=True)[0].norm() for k in ("nll", "adversarial"))
    assert after["adaptive_weight"] == pytest.approx((nll / (pulled + 1e-4)).item(), rel=1e-5)
    assert loss(system, told | {"step": START - 1}, "discriminator") == {"loss": 0}
    assert loss(system, told | {"step": START}, "discriminator")["loss"] > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_phase_moves_all_of_its_own_and_nothing_else(name):
    system, told = built(name), batch(name)
    state = TrainState(system, recipes.get(name))
    own = {phase: {id(p) for p in parameters} for phase, parameters in state.parameters.items()}
    assert own["generator"].isdisjoint(own["discriminator"])
    assert own["generator"] | own["discriminator"] == {id(p) for p in system.parameters()}
    for phase in system.phases:
        state.only(phase)
        system.zero_grad()
        system.loss(told, phase, torch.Generator().manual_seed(0))["loss"].backward()
        moved = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {n for n, p in system.named_parameters() if id(p) in own[phase]}


def test_without_weight_there_is_no_discriminator_and_one_phase():
    system = built("vq-f4-tiny", disc_weight=0.0)
    assert system.phases == ("generator",)
    assert {id(p) for p in system.phase_parameters("generator")} == {id(p) for p in system.parameters()}
    assert loss(system, batch("vq-f4-tiny"))["loss"] > 0


def test_losses_belong_to_their_autoencoders():
    kl, dcae = (catalog.entry(name).config for name in ("kl-f8-tiny", "icons-autoencoder-tiny"))
    for config in (replace(kl, loss=dcae.loss), replace(dcae, loss=kl.loss)):
        with pytest.raises(UsageError, match=r"of type (kl|dcae) is not trained with a loss of (pixels|adversarial)"):
            catalog.build(config)


def test_lpips_comes_out_of_a_file_and_is_not_saved(tmp_path):
    torch.manual_seed(0)
    weights = LPIPS().state_dict()
    save_file({f"loss.perceptual_loss.{k}": v for k, v in weights.items()}, tmp_path / "training.safetensors")
    save_file({k: v for k, v in weights.items() if "lin" in k}, tmp_path / "linear.safetensors")
    with pytest.raises(CheckpointMismatch, match="has no weights of LPIPS, VGG16's beside the linear ones: save"):
        built("vq-f4-tiny", perceptual_from=str(tmp_path / "linear.safetensors"))
    source = str(tmp_path / "training.safetensors")
    system, plain = built("vq-f4-tiny", perceptual_from=source), built("vq-f4-tiny")
    with torch.no_grad():
        system.perceptual.lin0.model[1].weight.abs_()
    told = batch("vq-f4-tiny", 2) | {"step": 0}
    terms = loss(system, told)
    assert terms["lpips"] != 0
    assert terms["loss"] == pytest.approx(loss(plain, told)["loss"] + terms["lpips"], abs=1e-5)
    config = catalog.entry("vq-f4-tiny").config
    catalog.save(system, replace(config, loss=system.terms), tmp_path / "model.safetensors")
    again = catalog.load(tmp_path / "model.safetensors")
    assert again.perceptual is None
    assert again.terms == config.loss


def psnr(a: Image.Image, b: Image.Image) -> float:
    x, y = (np.asarray(image.convert("RGB"), np.float64) for image in (a, b))
    return 10 * np.log10(255**2 / ((x - y) ** 2).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_to_give_pictures_back_and_other_networks_learn_on_its_latents(name, limner, here):
    data = open_batches(recipes.get(name).data, 1, torch.device("cpu"))
    picture = pictures.to_pil(pictures.opaque(data.batch(0, 1)["images"])[0])
    picture.save("picture.png")
    system = built(name).eval()
    with torch.no_grad():
        first = pictures.to_pil(system.decode(system.encode(pictures.to_tensor(picture, 32, 32)))[0].clamp(-1, 1))
    assert limner("train", name, *RUN).code == 0
    assert limner("generate", "-m", "run", "-i", "picture.png", "-o", "back.png").code == 0
    assert psnr(Image.open("back.png"), picture) > psnr(first, picture) + 5

    final = f"run/final/{name}.safetensors"
    trained, images = catalog.load(final), data.batch(0, 64)["images"]
    assert trained.autoencoder.config.scale != 1
    assert trained.encode(images).std().item() == pytest.approx(1, abs=0.15)

    channels = trained.autoencoder.channels
    beside = (f"system.network.in_channels={channels}", f"system.network.out_channels={channels}")
    few = ("--device", "cpu", "steps=1", "batch_size=4", "sample_prompts=[]", "data.limit=8")
    told = limner("train", "sd1-tiny", "--out", "drawing", f"system.autoencoder_from={final}", *beside, *few)
    assert told.code == 0
    assert "system.autoencoder is that of the file which system.autoencoder_from names" in told.out
    drawn = catalog.load("drawing")
    assert drawn.autoencoder.config == trained.autoencoder.config
    assert torch.equal(drawn.encode(images), trained.encode(images))
    if name == "kl-f8-tiny":
        catalog.put_autoencoder(drawn, final)  # as --vae does
        assert torch.equal(drawn.encode(images), trained.encode(images))


def test_the_recipes_have_the_published_sizes():
    kl, vq = recipes.get("kl-f8"), recipes.get("vq-f4")
    for recipe, million in ((kl, 83.7), (vq, 55.3)):
        with torch.device("meta"):
            system = catalog.build(recipe.system)
        assert round(sum(p.numel() for p in system.autoencoder.parameters()) / 1e6, 1) == million
        assert recipe.lr == pytest.approx(4.5e-6 * recipe.batch_size)
    assert (kl.system.autoencoder.factor, vq.system.autoencoder.factor) == (8, 4)
    assert (kl.system.loss.kl_weight, kl.system.loss.disc_weight, kl.system.loss.disc_start) == (1e-6, 0.5, 50_001)
    assert (vq.system.loss.codebook_weight, vq.system.loss.disc_weight, vq.system.loss.disc_start) == (1.0, 0.75, 0)
    check_counts(parse_overrides(kl, ["system.loss.disc_start=250000"]).system, "system")
