"""Figures of several ways to draw, a JSON line each, until the time is up:
python docs/runs/icons/settings.py FILE DATA CACHE PART SECONDS. PART 0 or 1 of them."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from limner import evaluation, pipeline
from limner.data.icons import open_icons

PROMPTS = 464
EVERYWHERE = (0.0, 1.0)
PARTS = [
    [
        (12, 4.5, EVERYWHERE, "dpmpp_2m", "uniform"),
        (12, 6.0, EVERYWHERE, "dpmpp_2m", "uniform"),
        (16, 5.0, EVERYWHERE, "dpmpp_2m", "uniform"),
        (12, 3.0, EVERYWHERE, "dpmpp_2m", "uniform"),
    ],
    [
        (12, 7.0, EVERYWHERE, "dpmpp_2m", "uniform"),
        (12, 5.0, (0.1, 1.0), "dpmpp_2m", "uniform"),
        (50, 5.0, EVERYWHERE, "euler", "uniform"),
        (12, 5.0, EVERYWHERE, "dpmpp_2m", "shifted"),
    ],
]


def main(file: str, data: str, cache: str, part: str, seconds: str) -> None:
    end = time.monotonic() + float(seconds)
    system, pack = pipeline.load(file).system, open_icons(Path(data))
    device = next(system.parameters()).device
    defaults = system.defaults
    for steps, guidance, interval, sampler, schedule in PARTS[int(part)]:
        if time.monotonic() > end - 25:
            break
        system.defaults = replace(defaults, guidance_interval=interval)
        settings = {"steps": steps, "guidance": guidance, "sampler": sampler, "schedule": schedule}
        with tempfile.TemporaryDirectory() as folder:
            report = evaluation.evaluate_system(
                system,
                pack,
                Path(folder),
                device,
                limit=PROMPTS,
                batch=128,
                cache=Path(cache),
                copying=False,
                **settings,
            )
        rows = [r for r in report["figures"] if not r["name"].startswith(("autoencoder", "reconstruction"))]
        figures = {r["name"]: round(r["value"], 4) for r in rows}
        figures |= {f"{r['name']}, of real": round(r["ratio"]["value"], 4) for r in rows if "ratio" in r}
        print(json.dumps(settings | {"guidance_interval": interval} | figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
