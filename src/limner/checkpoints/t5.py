"""Where other programs keep the tensors of T5's encoder: transformers' names are ours, under a prefix or in shards.

The table of ids has two names, of which files hold one or both; what a whole T5 has besides, its decoder, is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from limner.checkpoints import components, parts
from limner.checkpoints.layouts import Place
from limner.checkpoints.parts import Held, Shapes
from limner.errors import CheckpointMismatch, UsageError
from limner.text.t5 import T5Config

SHARED, EARLY = "shared.weight", "encoder.embed_tokens.weight"
BLOCK = "encoder.block.{}.layer."
MARK = re.compile(r"(.*?)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight")
BESIDE = ("decoder.", "lm_head.")
TRANSFORMERS: dict[str, tuple[str, Any]] = {  # our names, transformers', and what it takes when a config.json is silent
    "width": ("d_model", 512),
    "hidden": ("d_ff", 2048),
    "depth": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "head_width": ("d_kv", 64),
    "vocabulary": ("vocab_size", 32128),
    "buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
}
LARGEST, DEEPEST = 1_000_000, 200


def encoder(source: Path) -> Held:
    """The T5 encoder in a file, or in a folder that may hold it in shards, alone or in whatever it is a part of. Raises
    FileProblem, CheckpointMismatch."""
    return held(parts.read(source), source, f"{source}/")


def held(tensors: Mapping[str, Tensor], source: Path | str, file: str = "") -> Held:
    """The T5 encoder among the tensors of a file, `file` named before every name. Raises CheckpointMismatch."""
    prefix = next((match[1] for name in sorted(tensors) if (match := MARK.fullmatch(name))), None)
    if prefix is None:
        what = components.recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        raise CheckpointMismatch(
            f"{source} holds no text encoder of T5's kind" + (f": it is {what.what}; " if what else ", ")
            + "give a file of T5's encoder, such as t5xxl_fp16.safetensors"
        )  # fmt: skip
    found = parts.under(tensors, prefix, file)
    beside = BESIDE if SHARED not in found.tensors else (*BESIDE, EARLY)
    return Held({name: t for name, t in found.tensors.items() if not name.startswith(beside)}, found.full)


def tower(found: Held, source: Path | str) -> tuple[T5Config, dict[str, Place]]:
    """What was found, and the places of its tensors. Raises CheckpointMismatch."""
    try:
        config = config_of(found.shapes)
    except KeyError as error:
        if error.args[0].endswith("wi_0.weight") and BLOCK.format(0) + "1.DenseReluDense.wi.weight" in found.tensors:
            raise CheckpointMismatch(f"{source} is a T5 of version 1.0, without gates: give one of 1.1") from error
        raise CheckpointMismatch(f"{source} is like T5's encoder, but not whole: there is no {error}") from error
    except (ValueError, IndexError, ZeroDivisionError, UsageError) as error:
        raise CheckpointMismatch(f"{source} is like T5's encoder, but its shapes do not fit together") from error
    if BLOCK.format(1) + "0.SelfAttention.relative_attention_bias.weight" in found.tensors:
        raise CheckpointMismatch(f"{source} is UMT5, with distances of its own in every block, which is not read")
    return config, found.placed(layout(config, early=SHARED not in found.tensors))


def layout(config: T5Config, early: bool = False) -> dict[str, Place]:
    """A `T5Encoder` in the files of others, `early` with the other name of the table of ids."""
    attention = [f"0.SelfAttention.{name}.weight" for name in ("q", "k", "v", "o")]
    mlp = [f"1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")]
    norms = ["0.layer_norm.weight", "1.layer_norm.weight"]
    rows = {SHARED: Place(EARLY if early else SHARED)}
    for i in range(config.depth):
        biased = ["0.SelfAttention.relative_attention_bias.weight"] * (i == 0)
        rows |= {(name := BLOCK.format(i) + part): Place(name) for part in (*attention, *biased, *mlp, *norms)}
    return rows | {(name := "encoder.final_layer_norm.weight"): Place(name)}


def config_of(shapes: Shapes) -> T5Config:
    """The configuration of an encoder with these names and shapes; the largest distance, which none tells, is 128 in
    all that were published. Raises KeyError for a name that every one has."""
    first = BLOCK.format(0)
    vocabulary, width = shapes[SHARED if SHARED in shapes else EARLY]
    buckets, num_heads = shapes[first + "0.SelfAttention.relative_attention_bias.weight"]
    inner, _ = shapes[first + "0.SelfAttention.q.weight"]
    return T5Config(
        width=width,
        hidden=shapes[first + "1.DenseReluDense.wi_0.weight"][0],
        depth=next(i for i in itertools.count() if BLOCK.format(i) + "0.SelfAttention.q.weight" not in shapes),
        num_heads=num_heads,
        head_width=inner // num_heads,
        vocabulary=vocabulary,
        buckets=buckets,
    )


def transformers_settings(config: T5Config) -> dict[str, Any]:
    """The inverse of `transformers_config`."""
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in TRANSFORMERS.items()}
    kind = {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return (
        kind | values | marks | {"layer_norm_epsilon": 1e-6, "is_encoder_decoder": True, "tie_word_embeddings": False}
    )


def transformers_config(settings: Mapping[str, Any], source: Path | str) -> T5Config:
    """The config of a `config.json` of transformers, of T5's encoder or of a whole T5. Raises CheckpointMismatch."""
    kinds: Sequence[Any] = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
    found = settings.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in kinds:
        raise CheckpointMismatch(f"{source}: its architectures are {found!r:.100}, not [T5EncoderModel]")
    if settings.get("feed_forward_proj", "relu") != "gated-gelu" or settings.get("layer_norm_epsilon", 1e-6) != 1e-6:
        raise CheckpointMismatch(f"{source}: its MLPs or norms are not those of T5 1.1 (feed_forward_proj gated-gelu)")
    values = {}
    for name, (theirs, default) in TRANSFORMERS.items():
        value = settings.get(theirs, default)
        if type(value) is not int or not 0 < value < (DEEPEST if name == "depth" else LARGEST):
            raise CheckpointMismatch(f"{source}: {theirs} is {value!r:.100}, which no T5 has")
        values[name] = value
    try:
        return T5Config(**values)
    except UsageError as error:
        raise CheckpointMismatch(f"{source}: {error}") from error
