"""The layouts of text encoders: known names, the inverse, and OpenCLIP's own arithmetic on its own tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from limner.checkpoints.layouts import read, write
from limner.checkpoints.text import openclip_layout, text_tower, transformers_config, transformers_layout
from limner.errors import CheckpointMismatch
from limner.text.clip import CLIP_L, CLIP_TINY, OPENCLIP_BIGG, OPENCLIP_H, OPENCLIP_H_SD2, CLIPText

TINY = replace(CLIP_TINY, vocabulary=60, context=9, eot=59, pad=0, activation="gelu")
SIZES = [CLIP_L, OPENCLIP_H, OPENCLIP_H_SD2, OPENCLIP_BIGG, TINY, replace(TINY, projection=None)]


def noisy() -> CLIPText:
    model = CLIPText(TINY)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", SIZES)
def test_every_tensor_has_a_row_and_every_row_a_tensor(config):
    with torch.device("meta"):
        tensors = CLIPText(config).state_dict()
    for layout in (openclip_layout(config), transformers_layout(config), transformers_layout(config, flat=True)):
        assert sorted(layout) == sorted(tensors)
        again = read(layout, write(layout, tensors), "file")
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in tensors.items()}


def test_openclips_names_and_shapes_are_the_published_ones():
    """Of bigG in a file of Stable Diffusion XL, after `conditioner.embedders.1.model.`."""
    with torch.device("meta"):
        theirs = write(openclip_layout(OPENCLIP_BIGG), CLIPText(OPENCLIP_BIGG).state_dict())
    assert len(theirs) == 5 + 32 * 12
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    block = "transformer.resblocks.31."
    assert {
        "token_embedding.weight": (49408, 1280),
        "positional_embedding": (77, 1280),
        "ln_final.weight": (1280,),
        "ln_final.bias": (1280,),
        "text_projection": (1280, 1280),
        block + "ln_1.weight": (1280,),
        block + "ln_1.bias": (1280,),
        block + "ln_2.weight": (1280,),
        block + "ln_2.bias": (1280,),
        block + "attn.in_proj_weight": (3840, 1280),
        block + "attn.in_proj_bias": (3840,),
        block + "attn.out_proj.weight": (1280, 1280),
        block + "attn.out_proj.bias": (1280,),
        block + "mlp.c_fc.weight": (5120, 1280),
        block + "mlp.c_fc.bias": (5120,),
        block + "mlp.c_proj.weight": (1280, 5120),
        block + "mlp.c_proj.bias": (1280,),
    }.items() <= shapes.items()


def test_writing_what_was_read_gives_the_same_tensors():
    ours = noisy().state_dict()
    for layout in (openclip_layout(TINY), transformers_layout(TINY), transformers_layout(TINY, flat=True)):
        theirs = write(layout, ours)
        assert same(read(layout, theirs, "file"), ours)
        assert same(write(layout, read(layout, theirs, "file")), theirs)


def test_our_tower_computes_what_openclip_does_with_its_tensors():
    """OpenCLIP's text tower in torch's own MultiheadAttention, as its `in_proj_weight` is meant."""
    model = noisy()
    theirs = write(openclip_layout(TINY), model.state_dict())
    ids = torch.tensor([[58, 4, 5, 59, 0, 0, 0, 0, 0], [58, 7, 8, 9, 10, 11, 12, 13, 59]])
    x = theirs["token_embedding.weight"][ids] + theirs["positional_embedding"]
    norm = lambda x, name: F.layer_norm(x, (32,), theirs[f"{name}.weight"], theirs[f"{name}.bias"])  # noqa: E731
    mask = torch.full((9, 9), -torch.inf).triu(1)
    for i in range(TINY.depth):
        block = f"transformer.resblocks.{i}."
        attention = torch.nn.MultiheadAttention(32, TINY.num_heads, batch_first=True)
        prefix = block + "attn."
        attention.load_state_dict({k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)})
        y = norm(x, block + "ln_1")
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.linear(norm(x, block + "ln_2"), theirs[block + "mlp.c_fc.weight"], theirs[block + "mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(y), theirs[block + "mlp.c_proj.weight"], theirs[block + "mlp.c_proj.bias"])
    last = norm(x, "ln_final")
    pooled = last[torch.arange(2), ids.argmax(dim=-1)] @ theirs["text_projection"]
    found = model(ids)
    assert (found.last - last).abs().max() <= 1e-5 * last.abs().max()
    assert (found.pooled - pooled).abs().max() <= 1e-5 * pooled.abs().max()


def test_flat_names_are_those_of_newer_transformers():
    names = {place.name for place in transformers_layout(TINY, flat=True).values()}
    assert {"embeddings.token_embedding.weight", "final_layer_norm.bias", "text_projection.weight"} <= names
    assert {place.name for place in transformers_layout(TINY).values()} == noisy().state_dict().keys()


def test_of_a_whole_clip_the_text_tower_is_taken():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"vocab_size": 60, "max_position_embeddings": 9}
    vision = small | {"image_size": 8, "patch_size": 4}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).state_dict()
    whole["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    assert read(transformers_layout(TINY), text_tower(whole), "file").keys() == noisy().state_dict().keys()

    theirs = write(openclip_layout(TINY), noisy().state_dict())
    more = {name: torch.zeros(1) for name in ("visual.proj", "visual.conv1.weight", "logit_scale", "attn_mask")}
    assert same(read(openclip_layout(TINY), text_tower(theirs | more), "file"), noisy().state_dict())
    with pytest.raises(CheckpointMismatch, match="1 unknown"):
        read(openclip_layout(TINY), text_tower(theirs | {"logit": torch.zeros(1)}), "file")


# ---------------------------------------------------------------- config.json

SD2 = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "vocab_size": 49408,
}


def test_a_config_of_transformers_is_understood():
    assert transformers_config(SD2, pad=0, source="file") == replace(OPENCLIP_H_SD2, eot=None)
    other = SD2 | {"architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 49407}
    assert transformers_config(other, pad=0, source="file") == replace(OPENCLIP_H_SD2, projection=512)


def test_what_a_config_of_transformers_leaves_out_is_what_transformers_takes():
    from transformers import CLIPTextConfig

    theirs = CLIPTextConfig().to_dict() | {"architectures": ["CLIPTextModelWithProjection"]}
    kind = {"architectures": ["CLIPTextModelWithProjection"]}
    assert transformers_config(kind, pad=7, source="file") == transformers_config(theirs, pad=7, source="file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["CLIPModel"]}, r"file: its architectures are \['CLIPModel'\]"),
        ({"architectures": None}, "its architectures are None"),
        ({"hidden_size": "1024"}, "file: hidden_size is '1024', which no text encoder has"),
        ({"hidden_size": 1000}, "file: width=1000 is not in equal parts over num_heads=16"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"hidden_act": "relu"}, "file: activation='relu'"),
        ({"hidden_act": ["x" * 1000]}, "hidden_act is ...?x{1,100}, which"),
        ({"eos_token_id": 49408}, "file: pad=0 and eot=49408 are not both of vocabulary=49408"),
    ],
)
def test_a_config_that_no_text_encoder_has_is_refused(changes, message):
    with pytest.raises(CheckpointMismatch, match=message):
        transformers_config(SD2 | changes, pad=0, source="file")
