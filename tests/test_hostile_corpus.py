"""A corpus of broken and hostile files, given to everything that reads one: none crashes, hangs or runs code; each is
refused in one line that names the file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from checkpoints.test_hostile_files import BYTES, CONTENTS, ENTRY, WRITERS, Evil, header, write
from limner import catalog, exchange
from limner.adapters.attaching import stack
from limner.adapters.control import open_control
from limner.checkpoints import folders, single_files
from limner.errors import FileProblem

LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CORPUS: dict[str, tuple[str, Callable[[Path], Any]]] = {}
"""What it is -> the name of its file, and what makes it."""


def torn(spoil: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        write(path, header({"a": [4, 4], "b": [8]}))
        path.write_bytes(spoil(path.read_bytes()))

    return make


def lying(change: dict[str, Any]) -> Callable[[Path], Any]:
    entries = header({"a": [4, 4], "b": [8]})
    entries["b"] |= change
    return lambda path: write(path, entries, size=48)


def shaped(shapes: dict[str, list[int]]) -> Callable[[Path], Any]:
    return lambda path: write(path, header(shapes))


def kohya(value: float = 1.0, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = {"lora_down__weight": torch.full((2, 32), value), "lora_up__weight": torch.full((32, 2), value)}
    parts |= {"alpha": torch.tensor(1.0)} | changes
    return {f"{LORA}.{name.replace('__', '.')}": tensor for name, tensor in parts.items()}


for ending in ("safetensors", "ckpt", "pt"):
    CORPUS |= {f"{what}, .{ending}": (f"bad.{ending}", torn(spoil)) for what, spoil in BYTES.items()}
CORPUS |= {what: ("bad.safetensors", lying(change)) for what, change in ENTRY.items()}
CORPUS |= {
    f"{writer.__name__}, code {what}": ("bad.ckpt", lambda p, w=writer, c=content: w(c(Evil(p.parent / "ran")), p))
    for writer in WRITERS for what, content in CONTENTS.items()
}  # fmt: skip
NAMES = (
    "", "a\nb", "\x1b[31mred", "../../secret", "/etc/passwd", "token_embedding.weight", "model_ema.diffusion_model",
    "text_model.embeddings.token_embedding.weight", "model_ema.diffusion_modelinput_blocks00weight", "emb_params",
    "clip_l", "<word>", "input_hint_block.0.weight", "lora_controlnet", "controlnet_cond_embedding.conv_in.weight",
    "decoder.conv_in.weight", "input_blocks.0.0.weight", "conv_in.weight", "edm_mean", "lora_up.weight",
)  # fmt: skip
CORPUS |= {
    f"{name!r} alone, {shape}": ("bad.safetensors", shaped({name: shape}))
    for name in NAMES for shape in ([4], [], [0, 0], [4, 4, 3, 3])
}  # fmt: skip
CORPUS |= {what: ("bad.safetensors", shaped(shapes)) for what, shapes in {
    "a name of 10^6 letters": {"x" * 10**6: [4]},
    **{f"{n} names": {f"layer.{i}": [1] for i in range(n)} for n in (1000, 10_000)},
    "a tensor of 8 GB": {"a": [2**32]},
    "60 dimensions": {"a": [1] * 60},
    "rank 10^6": {f"{LORA}.lora_down.weight": [10**6, 32], f"{LORA}.lora_up.weight": [32, 10**6]},
    "10^6 vectors": {"emb_params": [10**6, 64]},
}.items()}  # fmt: skip
NAN = torch.tensor(float("nan"))
CORPUS |= {what: ("bad.pt", lambda path, held=held: torch.save(held, path)) for what, held in {
    "alpha NaN": kohya(alpha=NAN),
    "weights NaN": kohya(float("nan")),
    "whole numbers": kohya(lora_up__weight=torch.ones(32, 2, dtype=torch.int64)),
    "complex": kohya(lora_up__weight=torch.ones(32, 2, dtype=torch.complex64)),
    "nothing done": kohya(0.0),
    "sparse": {name: t.to_sparse() if t.dim() else t for name, t in kohya().items()},
    "a sparse word": {"string_to_param": {"*": torch.ones(2, 64).to_sparse()}},
    "without values": {name: t.to("meta") for name, t in kohya().items()},
    "a word without values": {"emb_params": torch.empty(2, 64, device="meta")},
    "one number 10^9 times": {"a": torch.zeros(1).expand(10**9)},
    "quantised": {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    "a list": [torch.zeros(1)] * 3,
}.items()}  # fmt: skip
CORPUS |= {f"settings {text[:40]!r}": ("bad.safetensors", lambda path, text=text: save_file(
    {"a": torch.zeros(2)}, path, {"limner": text})) for text in (
    "", "x", "[]", "null", "[" * 100_000, '{"kind": "x"}',
    json.dumps({"kind": "diffusion", "network": {"type": "unet", "widths": [10**9]}}),
    json.dumps({"quantization": {"a": 1}}),
)}  # fmt: skip
CORPUS |= {what: ("bad.safetensors", make) for what, make in {
    "a pipe that nobody writes to": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: None,
}.items()}  # fmt: skip


def sharded(leads: str) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text("{}")
        index = path / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": leads}}))

    return make


CORPUS |= {f"shards at {at!r}": ("bad", sharded(at)) for at in ("../x.safetensors", "/etc/passwd", "..", "x\0y")}


@pytest.fixture(scope="module")
def system(sd1_folder):
    return catalog.load(sd1_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def parts(sd1_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A U-Net and an autoencoder in files of their own."""
    folder = tmp_path_factory.mktemp("parts")
    tensors = single_files.export(folders.recognise(sd1_folder))
    for name, prefix in (("unet", "model.diffusion_model."), ("codec", "first_stage_model.")):
        mine = {k: v.contiguous() for k, v in tensors.items() if k.startswith(prefix)}
        save_file(mine, folder / f"{name}.safetensors")
    return folder / "unet.safetensors", folder / "codec.safetensors"


def test_the_corpus_has_more_than_two_hundred_files():
    assert len(CORPUS) > 200


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow) if what == "10000 names" else what for what in CORPUS]
)
def test_nothing_that_reads_files_crashes_hangs_or_runs_code(what, system, parts, tmp_path):
    name, make = CORPUS[what]
    path, (unet, codec) = tmp_path / name, parts
    make(path)
    readers = {
        "load": lambda: catalog.load(path),
        "lora or embedding": lambda: stack(system).attach(path),
        "vae": lambda: catalog.put_autoencoder(system, path),
        "vae of a U-Net": lambda: catalog.load(unet, vae=path, text_encoders=[path]),
        "text encoder": lambda: catalog.load(unet, vae=codec, text_encoders=[path]),
        "control": lambda: open_control(system, path, Image.new("RGB", (32, 32))),
    }
    for reader, read in readers.items():
        began = time.monotonic()
        with pytest.raises(FileProblem) as caught:
            read()
        message = str(caught.value)
        assert time.monotonic() - began < 10, reader
        assert "\n" not in message, (reader, message)
        assert len(message) < 2000, (reader, message)
        assert name in message, (reader, message)
    told: dict[str, Any] = {"kind": "refused"}
    try:
        told = exchange.inspect(path)
    except FileProblem as error:
        told["problem"] = str(error)
    assert told["kind"]
    assert json.dumps(told)
    assert not (tmp_path / "ran").exists()
