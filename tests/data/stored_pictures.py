"""The same few pictures and captions as a folder, shards, Parquet and a saved dataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = [(32, 32), (64, 32), (32, 64), (40, 40), (48, 24), (24, 48), (33, 31), (32, 30), (96, 32), (30, 60)]


def picture(i: int, width: int, height: int) -> bytes:
    """A PNG whose red says which it is; green falls from left to right, blue from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 10 * i
    pixels[..., 1] = np.linspace(255, 0, width)[None]
    pixels[..., 2] = np.linspace(255, 0, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def all_of(sizes: list[tuple[int, int]] = SIZES) -> list[tuple[str, bytes, str]]:
    """(name, PNG, caption) of each."""
    return [(f"p{i:02d}", picture(i, *size), f"picture {i}, red, blue, of {size}") for i, size in enumerate(sizes)]


def folder(path: Path, rows: Any = None) -> Path:
    path.mkdir(parents=True)
    for name, data, caption in rows or all_of():
        (path / f"{name}.png").write_bytes(data)
        (path / f"{name}.txt").write_text(caption)
    return path


def table_folder(path: Path) -> Path:
    path.mkdir()
    for name, data, _ in all_of():
        (path / f"{name}.png").write_bytes(data)
    lines = [json.dumps({"file_name": f"{name}.png", "text": caption}) for name, _, caption in all_of()]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def shards(path: Path) -> Path:
    path.mkdir()
    rows = all_of()
    for number, part in enumerate((rows[:4], rows[4:])):
        members = {}
        for i, (name, data, caption) in enumerate(part):
            text = {"txt": caption.encode()} if i % 2 else {"json": json.dumps({"caption": caption}).encode()}
            members |= {f"./{name}.PNG": data} | {f"./{name}.{ending}": said for ending, said in text.items()}
        tar(path / f"shard-{number:03d}.tar", members)
    return path


def table(rows: Any, struct: bool) -> Any:
    import pyarrow as pa

    pictures = [{"bytes": data, "path": None} if struct else data for _, data, _ in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    return pa.table({"image": pa.array(pictures, kind), "text": [caption for *_, caption in rows]})


def parquet(path: Path) -> Path:
    from pyarrow import parquet as pq

    path.mkdir()
    rows = all_of()
    pq.write_table(table(rows[:3], struct=True), path / "a.parquet", row_group_size=2)
    pq.write_table(table(rows[3:], struct=False), path / "b.parquet")
    return path


def saved(path: Path, splits: tuple[str, ...] = ()) -> Path:
    """As `datasets` 4.0 writes it: state.json, and Arrow files as streams."""
    import pyarrow as pa

    for split in splits or ("",):
        (path / split).mkdir(parents=True)
        files = []
        for number, rows in enumerate((all_of()[:6], all_of()[6:])):
            files.append({"filename": f"data-0000{number}-of-00002.arrow"})
            made = table(rows, struct=True)
            with pa.ipc.new_stream(str(path / split / files[-1]["filename"]), made.schema) as writer:
                writer.write_table(made, max_chunksize=2)
        (path / split / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
    if splits:
        (path / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return path
