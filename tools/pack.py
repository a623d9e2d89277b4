"""Store the weights of a run as they ship: python tools/pack.py SOURCE OUT.safetensors [--bits 8|16].

SOURCE is a run, a weight file, or a checkpoint, RUN/checkpoints/step-000123, of which it takes the averages, or where
there are none the weights: what a run that was cut short would have ended with.
"""

import argparse
from pathlib import Path

import torch

from limner import catalog
from limner.checkpoints import files
from limner.training import tuning
from limner.training.adapting import Beside
from limner.training.config import from_json
from limner.training.loop import loaded
from limner.training.state import CONFIG, MANIFEST, warm_start

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(8, 16, 32), default=8)
    options = parser.parse_args()
    checkpoint = Path(options.source)
    weights = next(
        (checkpoint / f"{n}.safetensors" for n in ("ema", "model") if (checkpoint / f"{n}.safetensors").is_file()), None
    )
    if (checkpoint / MANIFEST).is_file() and weights:
        trained = from_json((checkpoint / CONFIG).read_text(), str(checkpoint / CONFIG))
        config = trained.system
        system = catalog.build(config) if config else loaded(trained, torch.device("cpu"))
        warm_start(system, weights, catalog.load)
    else:
        path = catalog.find(options.source)
        _, stored = files.load(path)
        stored.pop("quantization", None)
        system, config = catalog.load(path), catalog.parse(stored, path)
    if config:
        catalog.save(system, config, options.out, bits=options.bits)
    elif isinstance(system, Beside):  # in the bits that its run says
        system.write(options.out)
    else:
        tuning.export(system, trained, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB")
