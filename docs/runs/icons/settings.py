"""Figures of several ways to draw, a JSON line each, until the time is up:
python docs/runs/icons/settings.py FILE DATA CACHE PART PARTS SECONDS. PART of PARTS: every PARTS-th of them."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from limner import evaluation, pipeline
from limner.data.icons import open_icons

SETTINGS: list[dict[str, Any]] = [
    {"guidance": 2.5},
    {"guidance": 3.0},
    {"guidance": 2.0},
    {"guidance": 3.5},
    {"guidance": 2.5, "steps": 16},
    {"guidance": 4.0, "steps": 16},
    {"guidance": 4.0, "guidance_rescale": 0.7},
    {"guidance": 3.0, "steps": 16},
    {"guidance": 5.0},
]


def main(file: str, data: str, cache: str, part: str, parts: str, seconds: str) -> None:
    end = time.monotonic() + float(seconds)
    system, pack = pipeline.load(file).system, open_icons(Path(data))
    device = next(system.parameters()).device
    for settings in SETTINGS[int(part) :: int(parts)]:
        if time.monotonic() > end - 25:
            break
        with tempfile.TemporaryDirectory() as folder:
            report = evaluation.evaluate_system(
                system,
                pack,
                Path(folder),
                device,
                batch=128,
                cache=Path(cache),
                copying=False,
                **settings,
            )
        rows = [r for r in report["figures"] if not r["name"].startswith(("autoencoder", "reconstruction"))]
        figures = {r["name"]: round(r["value"], 4) for r in rows}
        figures |= {f"{r['name']}, of real": round(r["ratio"]["value"], 4) for r in rows if "ratio" in r}
        print(json.dumps(report["settings"] | figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
