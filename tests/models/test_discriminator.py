"""The discriminator of VQGAN and latent diffusion, its losses and its weight, by hand."""

from __future__ import annotations

from math import log

import pytest
import torch

from limner.errors import UsageError
from limner.models.discriminator import PatchGAN, adaptive_weight, hinge_loss, vanilla_loss


def test_names_and_shapes_are_those_of_taming_transformers_files():
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in PatchGAN().state_dict().items()}
    norms = {
        f"main.{k}.{name}": shape
        for k, width in ((3, 128), (6, 256), (9, 512))
        for name, shape in (
            *((name, (width,)) for name in ("weight", "bias", "running_mean", "running_var")),
            ("num_batches_tracked", ()),
        )
    }
    assert found == norms | {
        "main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,), "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4), "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,),
    }  # fmt: skip


def test_a_logit_sees_a_patch_of_70_pixels():
    """arXiv:1611.07004, section 3.2.2 and appendix 6.1.2."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = PatchGAN(width=4).eval()(images)
    assert logits.shape == (1, 1, 18, 18)
    logits[0, 0, 9, 9].backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (70, 70)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_picture_as_small_as_can_be_gets_one_logit_and_a_smaller_one_is_refused(layers):
    network = PatchGAN(channels=4, width=2, layers=layers)
    assert network(torch.randn(2, 4, network.least, network.least)).shape == (2, 1, 1, 1)
    with pytest.raises(UsageError, match="pictures of 64 x 5 pixels are too small for the discriminator, which looks"):
        network(torch.randn(2, 4, 5, 64))


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    nothing = torch.zeros(2)
    assert vanilla_loss(nothing, nothing).item() == pytest.approx(log(2))
    assert vanilla_loss(torch.tensor([log(3)]), nothing).item() == pytest.approx(0.5 * (log(4 / 3) + log(2)))


def test_the_adaptive_weight_is_the_quotient_of_gradients_at_the_last_layer():
    last = torch.zeros(2, requires_grad=True)
    pull = lambda *by: (torch.tensor(by) * last).sum()  # noqa: E731 (its gradient is `by`)
    weight = adaptive_weight(pull(3.0, 4.0), pull(0.0, 2.0), last)
    assert weight.item() == pytest.approx(5 / 2.0001)
    assert not weight.requires_grad
    assert adaptive_weight(pull(3.0, 4.0), pull(0.0, 0.0), last).item() == 1e4
    assert adaptive_weight(pull(0.0, 0.0), pull(3.0, 4.0), last).item() == 0
