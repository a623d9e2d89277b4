"""SigLIP's tower of pictures and Redux: what transformers and diffusers make of the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from limner.checkpoints import redux
from limner.errors import CheckpointMismatch
from limner.models.redux import REDUX_DEV, Redux, ReduxConfig
from limner.models.siglip import SIGLIP_TINY, SO400M_384, SigLIPConfig, SigLIPVision, prepared
from parity import assert_same_gradients, backward, difference, gradients_of
from systems.stable_diffusion import noised

CONFIGS = [SIGLIP_TINY, SigLIPConfig(width=40, depth=3, num_heads=5, hidden=36, size=30, patch=6, norm_eps=1e-3)]


def theirs(config: SigLIPConfig) -> nn.Module:
    return transformers.SiglipVisionModel(settings(config))


def settings(config: SigLIPConfig) -> Any:
    return transformers.SiglipVisionConfig(
        hidden_size=config.width, intermediate_size=config.hidden, num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads, image_size=config.size, patch_size=config.patch,
        layer_norm_eps=config.norm_eps,
    )  # fmt: skip


def pair(config: SigLIPConfig, dtype: torch.dtype) -> tuple[SigLIPVision, nn.Module]:
    net = noised(theirs(config), seed=1).to(dtype)
    ours = redux.read_encoder(Path("eyes"), dict(net.state_dict()), settings(config).to_dict())
    assert ours.config == config
    return ours.to(dtype), net


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_tower_sees_what_transformers_sees(config, dtype, near):
    ours, net = pair(config, dtype)
    images = torch.randn(2, 3, config.size, config.size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        assert difference(ours(images), net(images).last_hidden_state) <= near


def test_gradients_are_those_of_transformers():
    ours, net = pair(SIGLIP_TINY, torch.float64)
    ours.requires_grad_(True)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    backward(ours(images), net(images).last_hidden_state)
    wanted = {key: gradient for key, gradient in gradients_of(net).items() if ".head." not in key}
    assert_same_gradients(gradients_of(ours), wanted, lambda key: key.endswith("k_proj.bias"))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_words_are_those_of_diffusers(dtype, near):
    net = noised(diffusers.ReduxImageEncoder(redux_dim=48, txt_in_features=20), seed=2)
    ours = redux.read(Path("redux"), dict(net.state_dict()), 20).to(dtype)
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        assert difference(ours(x), net.to(dtype)(x).image_embeds) <= near


def test_published_sizes_have_the_published_names_and_shapes():
    with torch.device("meta"):
        tower, wanted = SigLIPVision(SO400M_384).state_dict(), theirs(SO400M_384).state_dict()
        words, wanted_words = Redux(REDUX_DEV).state_dict(), diffusers.ReduxImageEncoder().state_dict()
    kept = {key: value for key, value in wanted.items() if ".head." not in key and not key.endswith("position_ids")}
    for found, published in ((tower, kept), (words, wanted_words)):
        assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in published.items()}
    count = sum(value.numel() for value in tower.values())
    assert sum(value.numel() for key, value in wanted.items() if not key.endswith("position_ids")) == 428_225_600
    assert [round(count / 1e6), round(sum(value.numel() for value in words.values()) / 1e5)] == [413, 645]
    assert (SO400M_384.size // SO400M_384.patch) ** 2 == 729
    assert redux.HEADS[SO400M_384.width] == SO400M_384.num_heads


@pytest.mark.parametrize("side", [(384, 384), (301, 200), (97, 640)], ids=str)
def test_a_picture_is_prepared_as_transformers_prepares_it(side):
    pixels = np.random.default_rng(0).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
    process = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    wanted = process(Image.fromarray(pixels), return_tensors="pt").pixel_values
    assert (prepared(Image.fromarray(pixels), 384) - wanted).abs().max() <= 1e-5
    clear = Image.new("RGBA", side, (255, 0, 0, 0))
    assert torch.equal(prepared(clear, 384), prepared(Image.new("RGB", side, "white"), 384))


def test_what_is_not_whole_is_refused_by_its_key():
    own = dict(theirs(SIGLIP_TINY).state_dict())
    whole = own | {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1)}
    assert redux.read_encoder(Path("whole"), whole, {"num_attention_heads": 3}).config == SIGLIP_TINY
    del own["vision_model.encoder.layers.1.mlp.fc2.bias"]
    with pytest.raises(CheckpointMismatch, match=r"layers\.1\.mlp\.fc2\.bias"):
        redux.read_encoder(Path("eyes"), own, {"num_attention_heads": 3})
    with pytest.raises(CheckpointMismatch, match=r"num_heads=0; is the config\.json of transformers beside it"):
        redux.read_encoder(Path("eyes"), own, {})
    flat = {"vision_model.embeddings.patch_embedding.weight": torch.ones(48, 3, 0, 0)}
    with pytest.raises(CheckpointMismatch, match="size=0 is not a patch of 0"):
        redux.read_encoder(Path("eyes"), dict(theirs(SIGLIP_TINY).state_dict()) | flat, {"num_attention_heads": 3})
    with pytest.raises(CheckpointMismatch, match="is no SigLIP tower of pictures: there is no"):
        redux.read_encoder(Path("eyes"), {"a": torch.ones(1)}, {})
    words = dict(Redux(ReduxConfig(width=48, text_width=32)).state_dict())
    with pytest.raises(CheckpointMismatch, match=r"is \(96, 48\): it has 60 rows for words of 20"):
        redux.read(Path("redux"), words, 20)
    del words["redux_down.bias"]
    with pytest.raises(CheckpointMismatch, match=r"redux_down\.bias"):
        redux.read(Path("redux"), words, 32)
