from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from limner import types
from limner.errors import UsageError
from limner.models.autoencoder import (
    KL_FLUX,
    KL_SD1,
    KL_SD3,
    KL_SDXL,
    KL_TINY,
    KL_UPSCALER,
    VQ_F4,
    VQ_TINY,
    AutoencoderConfig,
    Codebook,
    KLAutoencoder,
    KLConfig,
    VQAutoencoder,
    VQConfig,
)

KL_ODD = {
    "4 channels": (KLConfig(widths=(8, 16, 24), blocks=1, groups=4, scale=0.3, shift=0.2), (27, 38)),
    "16 channels, no quant convs": (
        KLConfig(image_channels=1, latent_channels=16, widths=(12, 12, 18, 18), groups=6, quant_convs=False),
        (40, 21),
    ),
    "attention": (
        KLConfig(image_channels=4, latent_channels=5, widths=(8, 16), groups=4, attention_levels=(1,)),
        (9, 14),
    ),
}
kl_odd = pytest.mark.parametrize(("config", "size"), KL_ODD.values(), ids=KL_ODD)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the largest value of the reference
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def reference(config: AutoencoderConfig) -> nn.Module:
    """The network of diffusers with the same sizes."""
    levels = [i in config.attention_levels for i in range(len(config.widths))]
    common = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in levels],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(levels)],
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
    }
    if isinstance(config, VQConfig):
        return VQModel(**common, num_vq_embeddings=config.codes)
    return AutoencoderKL(**common, use_quant_conv=config.quant_convs, use_post_quant_conv=config.quant_convs)


def fill(network: nn.Module, seed: int = 0) -> None:
    """Noise in every parameter, such that activations neither vanish nor grow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.2 + ("norm" in name and name.endswith("weight")))


def pair(config: AutoencoderConfig, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    theirs = reference(config).to(dtype)
    fill(theirs)
    ours = (VQAutoencoder if isinstance(config, VQConfig) else KLAutoencoder)(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    most = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max()
        if "to_k.bias" in name:  # adds the same to every key, which the softmax takes away
            assert scale < 1e-5 * most
            assert parameter.grad.abs().max() < 1e-5 * most
        else:
            assert scale > 0, name
            assert (parameter.grad - gradients[name]).abs().max() <= tolerance * scale, name


@kl_odd
@dtypes
def test_the_posterior_is_that_of_diffusers(config, size, dtype):
    ours, theirs = pair(config, dtype)
    images = noise(2, config.image_channels, *size, dtype=dtype)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.posterior(images)
    assert_close(mean, posterior.mean, TOLERANCE[dtype])
    assert_close(logvar, posterior.logvar, TOLERANCE[dtype])
    assert mean.shape[2:] == tuple(side // config.factor for side in size)


@kl_odd
@dtypes
def test_pictures_are_decoded_as_by_diffusers(config, size, dtype):
    ours, theirs = pair(config, dtype)
    latents = noise(2, config.latent_channels, 5, 3, dtype=dtype)
    with torch.no_grad():
        assert_close(
            ours.decode(latents), theirs.decode(latents / config.scale + config.shift).sample, TOLERANCE[dtype]
        )


@kl_odd
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_every_gradient_is_that_of_diffusers(config, size, dtype, tolerance):
    ours, theirs = pair(config, dtype)
    images, eps = noise(1, config.image_channels, *size, dtype=dtype), noise(1, config.latent_channels, 1, 1)
    mean, logvar = ours.posterior(images)
    z = mean + torch.exp(0.5 * logvar) * eps.to(dtype)
    ours.decode(ours.to_latents(z)).square().sum().backward()
    posterior = theirs.encode(images).latent_dist
    z = posterior.mean + posterior.std * eps.to(dtype)
    theirs.decode(z).sample.square().sum().backward()
    assert_same_gradients(ours, theirs, tolerance)


def test_scale_and_shift_are_part_of_the_latents():
    config = replace(KL_TINY, scale=0.25, shift=3.0)
    scaled, raw = KLAutoencoder(config), KLAutoencoder(replace(config, scale=1.0, shift=0.0))
    raw.load_state_dict(scaled.state_dict())
    images, latents = noise(1, 3, 16, 16), noise(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(scaled.encode(images), (raw.encode(images) - 3) / 4)
        torch.testing.assert_close(scaled.decode(latents), raw.decode(latents * 4 + 3))
        torch.testing.assert_close(scaled.from_latents(scaled.to_latents(latents)), latents)


def test_a_sample_is_the_one_diffusers_draws():
    config, size = KL_ODD["4 channels"]
    ours, theirs = pair(config, torch.float64)
    images = noise(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        drawn = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(5))
        eps = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        assert_close(ours.sample(images, eps), (drawn - 0.2) * 0.3, 1e-10)
        assert torch.equal(ours.sample(images, torch.zeros_like(eps)), ours.encode(images))


def test_the_log_variance_is_kept_within_bounds():
    network = KLAutoencoder(KL_TINY)
    with torch.no_grad():
        network.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-1e3, 1e3, -1e3, 1e3]))
        _, logvar = network.posterior(noise(1, 3, 8, 8))
    assert logvar.amin((0, 2, 3)).tolist() == logvar.amax((0, 2, 3)).tolist() == [-30, 20, -30, 20]


@pytest.mark.parametrize("network", [KLAutoencoder(KL_TINY), VQAutoencoder(VQ_TINY)], ids=["kl", "vq"])
def test_it_is_an_autoencoder(network):
    assert isinstance(network, types.Autoencoder)
    with torch.no_grad():
        latents = network.encode(noise(1, 3, 24, 16))
        assert latents.shape == (1, network.channels, 24 // network.factor, 16 // network.factor)
        assert network.decode(latents).shape == (1, 3, 24, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (16, 20)}, r"widths=\(16, 20\) are not all multiples of groups=8"),
        ({"groups": 0}, "groups=0"),
        ({"widths": ()}, r"widths=\(\)"),
        ({"scale": 0.0}, "scaled by 0"),
        ({"shift": float("nan")}, "shifted by nan"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        KLAutoencoder(replace(KL_TINY, **change))


PUBLISHED = {  # (ours, what its config.json says that matters here, parameters)
    "sd1": (KL_SD1, {}, 83_653_863),
    "sdxl": (KL_SDXL, {"scaling_factor": 0.13025}, 83_653_863),
    "sd3": (
        KL_SD3,
        {
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        83_819_683,
    ),
    "flux": (
        KL_FLUX,
        {
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        83_819_683,
    ),
    "x4-upscaler": (KL_UPSCALER, {"block_out_channels": [128, 256, 512], "scaling_factor": 0.08333}, 55_325_927),
}


@pytest.mark.parametrize(("config", "published", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_released_sizes_have_the_tensors_of_diffusers(config, published, parameters):
    settings = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4} | published
    levels = len(settings["block_out_channels"])
    with torch.device("meta"):
        ours = KLAutoencoder(config)
        theirs = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **settings
        )
    assert shapes(ours) == shapes(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert (ours.scale, ours.shift) == (theirs.config.scaling_factor, theirs.config.shift_factor or 0)
    assert ours.factor == 2 ** (levels - 1)


def test_vq_f4_has_the_tensors_of_diffusers():
    with torch.device("meta"):
        assert shapes(VQAutoencoder(VQ_F4)) == shapes(reference(VQ_F4))


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


VQ_ODD = VQConfig(latent_channels=3, widths=(8, 16, 16), blocks=1, groups=4, codes=40, scale=0.5, shift=0.1)


@dtypes
def test_the_vq_bottleneck_is_that_of_diffusers(dtype):
    ours, theirs = pair(VQ_ODD, dtype)
    images = noise(2, 3, 22, 35, dtype=dtype)
    z = theirs.encode(images).latents
    assert_close(ours.from_latents(ours.encode(images)), z, TOLERANCE[dtype])
    decoded, _ = theirs.decode(z, return_dict=False)
    assert_close(ours.decode(ours.to_latents(z)), decoded, TOLERANCE[dtype])
    ids = theirs.quantize(z)[2][2].view(2, 5, 8)
    assert torch.equal(ours.encode_ids(images), ids)
    assert ids.unique().numel() > 5
    assert_close(ours.decode_ids(ids), decoded, TOLERANCE[dtype])


def test_gradients_pass_straight_through_the_codebook():
    ours, theirs = pair(VQ_ODD, torch.float64)
    images = noise(1, 3, 16, 16, dtype=torch.float64)
    quantized = ours.quantize(ours.to_moments(images))
    (ours.to_images(quantized.z).square().sum() + quantized.loss).backward()
    z = theirs.encode(images).latents
    codes = theirs.quantize.embedding(theirs.quantize(z)[2][2]).view(1, 4, 4, 3).movedim(-1, 1)
    loss = 0.25 * (z - codes.detach()).square().mean() + (codes - z.detach()).square().mean()
    (theirs.decode(z).sample.square().sum() + loss).backward()
    torch.testing.assert_close(quantized.loss, loss)
    assert_same_gradients(ours, theirs, 1e-10)


def test_the_loss_of_the_codebook_weighs_commitment():
    codebook = Codebook(codes=2, channels=2, commitment=0.25)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    z = torch.tensor([3.0, 2.0]).view(1, 2, 1, 1).requires_grad_()
    quantized = codebook(z)
    assert quantized.ids.tolist() == [[[1]]]
    assert quantized.z.flatten().tolist() == [4, 0]
    assert quantized.loss.item() == pytest.approx(1.25 * (1 + 4) / 2)
    quantized.loss.backward()
    assert z.grad.flatten().tolist() == [-0.25, 0.5]  # commitment * (z - e), for a mean over two
    assert codebook.embedding.weight.grad.tolist() == [[0, 0], [1, -2]]


def test_half_precision_finds_the_codes_that_single_does():
    codebook = Codebook(codes=64, channels=3, commitment=0.25)
    z = (noise(1, 3, 16, 16) / 64).bfloat16()
    codebook.embedding.weight.data = codebook.embedding.weight.data.bfloat16().float()
    ids = codebook(z.float()).ids
    assert torch.equal(codebook.bfloat16()(z).ids, ids)
