"""How long a Stable Diffusion 1.5 of random weights in one fp16 file (2 GB) takes to load, and what memory.

    python benchmarks/loading.py -n 3 --json

Each time in a fresh process, once to each dtype: `read` is reading the file's bytes through once (so that what comes
after does not wait for the disk), `ready` is `limner.load` then, `peak` the most memory that it added, in sizes of the
file, without what is only mapped from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys, time
from limner import pipeline
from limner.models import unet, autoencoder
from limner.text import clip, bpe
bpe.shipped()
path, dtype = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
begin = time.perf_counter()
with open(path, "rb") as file:
    while file.read(1 << 24): pass
read, before = time.perf_counter() - begin, peak()
begin = time.perf_counter()
system = pipeline.load(path, "cpu", dtype=dtype).system
ready = time.perf_counter() - begin
own = sum(p.numel() * p.element_size() for p in system.parameters())
print(json.dumps({"read": read, "ready": ready, "peak": peak() - before, "weights": own}))
import os
os._exit(0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=3, help="fresh processes for each dtype (default 3)")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "sd15.safetensors"))
        size = path.stat().st_size
        rows = []
        for dtype in ("fp16", "fp32") * asked.n:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, path, dtype], capture_output=True, text=True, check=True
            )
            rows.append({"dtype": dtype, **json.loads(done.stdout)})
    found = {
        dtype: {
            key: round(statistics.median(row[key] for row in rows if row["dtype"] == dtype) / scale, 3)
            for key, scale in (("read", 1), ("ready", 1), ("peak", size), ("weights", size))
        }
        for dtype in ("fp16", "fp32")
    }
    if asked.json:
        print(json.dumps({"bytes": size, **found}, indent=2))
        return
    print(f"a file of {size / 1e9:.2f} GB, medians of {asked.n}")
    for dtype, row in found.items():
        print(f"{dtype}: read {row['read']:.2f} s, ready {row['ready']:.2f} s, peak {row['peak']:.2f} x the file")


def write(path: Path) -> Path:
    """A whole Stable Diffusion 1.5 of random weights in the names of Latent Diffusion's code, in fp16."""
    import torch
    from safetensors.torch import save_file

    from limner import catalog
    from limner.checkpoints import single_files, text
    from limner.checkpoints.layouts import write as written

    config = catalog.entry("sd1").config
    with torch.device("meta"):
        state = catalog.build(config).state_dict()
    words = text.transformers_layout(config.text_encoder.towers[0])
    rows = single_files.layout(config.network, config.autoencoder, {"cond_stage_model.transformer.": words})
    filled = {name: torch.randn(t.shape, dtype=torch.float32).mul_(0.02).half() for name, t in state.items()}
    save_file({k: v.contiguous() for k, v in written(rows, filled).items()}, path)
    return path


if __name__ == "__main__":
    main()
