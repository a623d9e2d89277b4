"""safetensors files in and out: whole or not at all, every key accounted for.

Nothing here unpickles. A file's metadata carries the configuration of what it holds under the key "limner", as JSON, so
a weight file needs nothing beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from limner.checkpoints import gguf
from limner.checkpoints.quantization import dequantize, gathered
from limner.errors import CheckpointMismatch, FileProblem

CONFIG_KEY = "limner"
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one, never a part. Raises FileProblem."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise FileProblem(f"cannot write {path}: {error.strerror or error}; nothing was left behind") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors and the configuration they belong to, atomically. Raises FileProblem."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key only: safetensors orders several at random, and the same weights should give the same bytes
    metadata = {CONFIG_KEY: json.dumps(config, sort_keys=True)}
    write_atomically(path, serialise(whole, metadata))


def _reason(path: Path, error: Exception) -> str:
    """Why safetensors does not read a file, and what to do."""
    reason = str(error).splitlines()[0][:200]
    with suppress(OSError):
        with path.open("rb") as file:
            start = file.read(64).lstrip()
        if start.startswith(b"version https://git-lfs"):
            return "but a pointer of Git LFS: run git lfs pull, or download it anew"
        if start.startswith(b"<"):
            return "but a page of the web: log in where it is, or accept its license, and download it anew"
    if unknown := re.search(r"unknown variant `(\w+)`", reason):
        return f"it has numbers of a type {unknown[1]!r}, which is not read: get it in another"
    return f"{reason}: download or train it again"


def read(path: Path, most: int | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file, or the tensors of a torch checkpoint or a GGUF file. They
    are mapped: read from the disk when first looked at. None of a safetensors file of more than `most`. Raises
    FileProblem."""
    if not path.is_file():
        found = f"{path} is a folder" if path.is_dir() else f"no file {path}"
        raise FileProblem(f"{found}: give the path of a .safetensors file")
    try:
        if is_torch(path):
            return _read_torch(path), {}
        if gguf.is_gguf(path):
            return gguf.read(path), {}
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            wanted = names if most is None or len(names) <= most else []
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileProblem(f"{path} is not a whole safetensors file ({_reason(path, error)})") from error


def read_all(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of several files of a model, as `read` has them, what is quantised `gathered`."""
    found: dict[str, Tensor] = {}
    told: dict[str, str] = {}
    first: Path | str = ""
    for path in paths:
        tensors, metadata = read(path)
        found, told, first = found | tensors, told | metadata, first or path
    return gathered(found, told, first)


def is_torch(path: Path) -> bool:
    """Whether a file begins as those of `torch.save` do."""
    with path.open("rb") as opened:
        head = opened.read(9)
    return head[:4] == ZIP or (head[:1] == PICKLE and head[8:] != b"{")


def unpickled(path: Path) -> Any:
    """What is in a file of `torch.save`, through torch's reader that runs no code in it. Raises FileProblem."""
    with path.open("rb") as opened:
        mapped = opened.read(4) == ZIP
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what it was trained with, a bag of values
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the reader raises many kinds
        if "weights_only" not in str(error).lower():
            raise FileProblem(
                f"{path} is not opened: it is not whole, or not a file of torch.save; get it again"
            ) from error
        raise FileProblem(
            f"{path} is not opened (more than tensors in it): it may run code; have a program you trust make a "
            ".safetensors of it"
        ) from error
    _dense(stored, path)
    return stored


def _dense(stored: Any, path: Path, name: Any = "", depth: int = 4) -> None:
    """Raises FileProblem for a tensor that is sparse or holds no values, in tables up to so deep."""
    if isinstance(stored, Tensor) and (stored.layout != torch.strided or stored.device.type == "meta"):
        raise FileProblem(f"{path}: {shown(str(name))} is sparse, or has no values: only whole tensors are read")
    if isinstance(stored, dict | list) and depth:
        for key, value in stored.items() if isinstance(stored, dict) else enumerate(stored):
            _dense(value, path, key, depth - 1)


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`."""
    stored = unpickled(path)
    if isinstance(stored, list) and len(stored) in (4, 5) and isinstance(stored[0], dict):
        stored = stored[4 * (len(stored) > 4)]  # of a training of DDIM's program: its average, or else its weights
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else stored
    if isinstance(stored, dict) and isinstance(stored.get("ema"), dict) and "model" in stored:
        stored = stored["ema"]  # of a training, as DiT's and SiT's programs save it
    if isinstance(stored, dict) and stored and all(isinstance(part, dict) for part in stored.values()):
        stored = {f"{name}.{key}": value for name, part in stored.items() for key, value in part.items()}
    rows = stored.items() if isinstance(stored, dict) else ()
    if not rows or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in rows):
        raise FileProblem(f"{path} is not a table of tensors: what is it?")
    return dict(rows)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of ours: (tensors with quantised ones restored to float32, configuration). Raises FileProblem."""
    tensors, metadata = read(path)
    config = config_in(metadata, path)
    return dequantize(tensors, config.get("quantization", {}), path), config


def config_in(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The configuration in a file of ours. Raises FileProblem."""
    if CONFIG_KEY not in metadata:
        raise FileProblem(f"{path} is a safetensors file of another program: it carries no limner configuration")
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "too deep")
        raise FileProblem(f"{path}: its limner configuration is not JSON ({reason})") from error
    if not isinstance(config, dict):
        raise FileProblem(f"{path}: its limner configuration is not a JSON object")
    return config


def digest(*paths: Path) -> str:
    """The first ten digits of the SHA-256 of a file, or of several one after the other, which name weights wherever
    they lie. Raises FileProblem."""
    hashed = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    hashed.update(block)
        except OSError as error:
            raise FileProblem(f"cannot read {path}: {error.strerror or error}") from error
    return hashed.hexdigest()[:10]


def account(expected: Set[str], found: Set[str], source: Path | str) -> None:
    """Every key must be there and nothing else: CheckpointMismatch names the first that is missing or left over."""
    kinds = ((sorted(expected - found), "missing"), (sorted(found - expected), "unknown"))
    parts = [f"{len(names)} {word} (first: {shown(names[0])})" for names, word in kinds if names]
    if parts:
        raise CheckpointMismatch(
            f"{source}: {' and '.join(parts)} of {len(expected)} keys; is it a file of another model?"
        )


def shown(name: str) -> str:
    """A name out of a file, as one line has room for it."""
    return name if name.isprintable() and len(name) <= 200 else f"{name[:100]!r} ..."


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Give `module` (it may be on the meta device) these weights. Every key and shape must fit: CheckpointMismatch."""
    expected = module.state_dict()
    account(expected.keys(), tensors.keys(), source)
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise CheckpointMismatch(f"{source}: {name} is {found} in the file, {wanted} in the model")
    module.load_state_dict(dict(tensors), assign=True)
