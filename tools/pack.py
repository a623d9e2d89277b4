"""Store the final weights of a run as they ship: python tools/pack.py RUN_OR_FILE OUT.safetensors [--bits 8|16]."""

import argparse
from pathlib import Path

from limner import catalog
from limner.checkpoints import files

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(8, 16, 32), default=8)
    options = parser.parse_args()
    path = catalog.find(options.source)
    _, stored = files.load(path)
    stored.pop("quantization", None)
    catalog.save(catalog.load(path), catalog.parse(stored, path), options.out, bits=options.bits)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB")
