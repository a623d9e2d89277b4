"""Store the weights of a run as they ship: python tools/pack.py SOURCE OUT.safetensors [--bits 8|16].

SOURCE is a run, a weight file, or a checkpoint, RUN/checkpoints/step-000123, of which it takes the averages: what a run
that was cut short would have ended with.
"""

import argparse
from pathlib import Path

from limner import catalog
from limner.checkpoints import files
from limner.training.config import from_json
from limner.training.state import CONFIG, warm_start

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(8, 16, 32), default=8)
    options = parser.parse_args()
    checkpoint = Path(options.source)
    if (checkpoint / "ema.safetensors").is_file():
        config = from_json((checkpoint / CONFIG).read_text(), str(checkpoint / CONFIG)).system
        system = catalog.build(config)
        warm_start(system, checkpoint / "ema.safetensors", catalog.load)
    else:
        path = catalog.find(options.source)
        _, stored = files.load(path)
        stored.pop("quantization", None)
        system, config = catalog.load(path), catalog.parse(stored, path)
    catalog.save(system, config, options.out, bits=options.bits)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB")
