"""T5's encoder in the files of others: known names, prefixes, shards, and what is no T5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from limner.checkpoints import layouts, parts
from limner.checkpoints.t5 import config_of, encoder, held, layout, tower, transformers_config, transformers_settings
from limner.errors import CheckpointMismatch, FileProblem
from limner.text.clip import CLIP_TINY, CLIPText
from limner.text.t5 import T5_TINY, T5_XXL, T5Config, T5Encoder

TINY = replace(T5_TINY, vocabulary=70)
ODD = T5Config(width=24, hidden=40, depth=3, num_heads=3, head_width=10, vocabulary=99, buckets=12)
SINGLE = "text_encoders.t5xxl.transformer."


def noisy() -> T5Encoder:
    model = T5Encoder(TINY)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(source) -> dict[str, torch.Tensor]:
    """What a file holds under our names, all of it accounted for."""
    found = encoder(source)
    config, places = tower(found, source)
    assert config == TINY
    tensors = {found.full(name): tensor for name, tensor in found.tensors.items()}
    layouts.fit(places, noisy().state_dict(), tensors, source)
    return layouts.read(places, tensors, source)


@pytest.mark.parametrize("config", [T5_XXL, TINY, ODD])
def test_every_tensor_has_a_row_and_the_configuration_follows_from_shapes(config):
    with torch.device("meta"):
        tensors = T5Encoder(config).state_dict()
    assert layout(config).keys() == tensors.keys()
    assert {ours: place.name for ours, place in layout(config).items()} == {name: name for name in tensors}
    assert config_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}) == config


def test_names_and_shapes_of_xxl_are_the_published_ones():
    """Of t5xxl_fp16.safetensors, and after the prefix in single files of Stable Diffusion 3."""
    with torch.device("meta"):
        theirs = layouts.write(layout(T5_XXL), T5Encoder(T5_XXL).state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    expected = {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    expected["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for i in range(24):
        block = f"encoder.block.{i}.layer."
        expected |= {block + f"0.SelfAttention.{name}.weight": (4096, 4096) for name in "qkvo"}
        expected |= {block + f"1.DenseReluDense.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
        expected |= {block + "1.DenseReluDense.wo.weight": (4096, 10240)}
        expected |= {block + f"{k}.layer_norm.weight": (4096,) for k in range(2)}
    assert shapes == expected
    assert len(shapes) == 219


@pytest.mark.parametrize("prefix", ["", SINGLE, "t5xxl.transformer.", "text_encoder_3."])
@pytest.mark.parametrize("tables", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_a_file_is_read_under_any_prefix_and_either_name_of_its_table(tmp_path, prefix, tables):
    weights = noisy().state_dict()
    stored = {prefix + name: tensor for name, tensor in weights.items() if name != "shared.weight"}
    stored |= {f"{prefix}{table}.weight": weights["shared.weight"].clone() for table in tables}
    if prefix == SINGLE:
        stored |= {"text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(3)}
    save_file(stored, tmp_path / "t5.safetensors")
    found = read(tmp_path / "t5.safetensors")
    assert same(found, weights)
    _, places = tower(held(stored, "file"), "file")
    written = layouts.write(places, found)
    inside = {name: tensor for name, tensor in stored.items() if name.startswith(prefix) and "clip_l" not in name}
    if len(tables) == 2:
        inside.pop(f"{prefix}encoder.embed_tokens.weight")
    assert same({prefix + name.removeprefix(prefix): tensor for name, tensor in written.items()}, inside)


def test_shards_of_a_folder_are_read_and_a_whole_t5_gives_its_encoder(tmp_path):
    from transformers import T5Config as Config
    from transformers import T5EncoderModel, T5ForConditionalGeneration

    theirs = Config(
        vocab_size=70, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(theirs)
    model.load_state_dict(noisy().state_dict(), strict=False)
    model.encoder.embed_tokens.weight = model.shared.weight
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(read(tmp_path / "shards"), noisy().state_dict())

    whole = T5ForConditionalGeneration(theirs)
    names = {name for name in whole.state_dict() if name.startswith(("decoder.", "lm_head."))}
    assert len(names) > 10
    assert held(whole.state_dict(), "file").tensors.keys() == noisy().state_dict().keys()


def clip() -> dict[str, torch.Tensor]:
    return CLIPText(replace(CLIP_TINY, vocabulary=60, eot=59, pad=0)).state_dict()


def test_a_file_of_clip_is_no_t5_and_a_file_of_t5_no_clip(tmp_path):
    save_file(clip(), tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointMismatch, match="T5's kind: it is text encoder of CLIP's kind; give a file of T5's"):
        encoder(tmp_path / "clip.safetensors")
    save_file(noisy().state_dict(), tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointMismatch, match="CLIP's kind: it is text encoder of T5's kind, 32 wide"):
        parts.towers(tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointMismatch, match="no text encoder of T5's kind, give a file of T5's encoder, such as"):
        held({"x": torch.zeros(1)}, "file")
    with pytest.raises(FileProblem, match="no file"):
        encoder(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("shared.weight"), "not whole: there is no 'encoder.embed_tokens.weight'"),
        (lambda t: t.pop("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"), "not whole"),
        (
            lambda t: t.update({"encoder.block.0.layer.1.DenseReluDense.wi.weight":
                                t.pop("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")}),
            "file is a T5 of version 1.0, without gates: give one of 1.1",
        ),
        (
            lambda t: t.update({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight":
                                torch.ones(32, 2)}),
            "file is UMT5",
        ),
        (lambda t: t.update({"shared.weight": torch.ones(3)}), "its shapes do not fit together"),
        (
            lambda t: t.update({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":
                                torch.ones(32, 0)}),
            "its shapes do not fit together",
        ),
    ],
)  # fmt: skip
def test_what_is_like_t5_and_is_not_is_refused(change, message):
    tensors = dict(noisy().state_dict())
    change(tensors)
    with pytest.raises(CheckpointMismatch, match=message):
        tower(held(tensors, "file"), "file")


def test_what_is_missing_or_left_over_is_named(tmp_path):
    tensors = dict(noisy().state_dict())
    tensors["encoder.block.0.layer.2.weight"] = torch.ones(1)
    del tensors["encoder.block.1.layer.1.layer_norm.weight"]
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"1 missing .*block.1.layer.1.layer_norm.* 1 unknown .*layer.2.weight"
    ):
        read(tmp_path / "t5.safetensors")


# ---------------------------------------------------------------- config.json


def test_a_config_of_transformers_is_understood_and_written():
    from transformers import T5Config as Config

    theirs = Config(d_model=24, d_ff=40, num_layers=3, num_heads=3, d_kv=10, vocab_size=99,
                    relative_attention_num_buckets=12, feed_forward_proj="gated-gelu").to_dict()  # fmt: skip
    theirs["architectures"] = ["T5EncoderModel"]
    assert transformers_config(theirs, "file") == ODD
    settings = transformers_settings(T5_XXL)
    assert transformers_config(settings, "file") == T5_XXL
    again = Config.from_dict(settings)
    assert (again.d_model, again.is_gated_act, again.dense_act_fn) == (4096, True, "gelu_new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["UMT5EncoderModel"]},
            r"its architectures are \['UMT5EncoderModel'\], not \[T5EncoderModel",
        ),
        ({"architectures": None}, "its architectures are None"),
        ({"architectures": [["T5EncoderModel"]]}, "its architectures are"),
        ({"feed_forward_proj": "relu"}, "its MLPs or norms are not those of T5 1.1"),
        ({"layer_norm_epsilon": 1e-5}, "its MLPs or norms"),
        ({"d_model": "4096"}, "file: d_model is '4096', which no T5 has"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_heads": True}, "num_heads is True"),
        ({"relative_attention_num_buckets": 3}, "file: buckets=3"),
    ],
)
def test_a_config_that_no_t5_has_is_refused(changes, message):
    with pytest.raises(CheckpointMismatch, match=message):
        transformers_config(transformers_settings(T5_XXL) | changes, "file")
