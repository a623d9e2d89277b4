"""A style that `icons` never saw, and how much of it a LoRA brings, and at what price for the others.

    python style.py pictures SPRITES FOLDER COUNT         so many sprites of monsters as pictures and captions
    python style.py others ICONS FOLDER COUNT             so many drawings of the model itself, of training captions
    python style.py measure SPRITES ICONS OUT [LORA ...]  a JSON line for the model alone, and for each LoRA at each
                                                          of WEIGHTS (1)

The style is that of the sprites of Dungeon Crawl (32 pixels, shown eightfold), called "dungeon sprite of ...". Whether
a picture is of it says a linear probe on EffLite0's features that knows it from 22 styles of icons: it learns from
sprites and icons as the autoencoder gives them back, and is tried on others. The price: prompts of other styles, the
same seeds with and without, KID against the real pictures of these prompts, and the share whose style the judge of
`limner evaluate` recognises. A sheet of 20 sprites and 20 icons for each is left as OUT/NAME.png.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from limner import evaluation, pipeline
from limner.adapters.attaching import stack
from limner.data.classics import open_classic
from limner.data.icons import open_icons
from limner.data.images import ImageSet
from limner.metrics import retrieval
from limner.metrics.distances import kid
from limner.metrics.features import EffLite0
from limner.metrics.prompts import held_out_prompts

SIDE = 256
DRAWN, OTHERS, LEARNED = (int(n) for n in os.environ.get("SIZES", "200 400 600").split())
WEIGHTS = [float(w) for w in os.environ.get("WEIGHTS", "1").split()]


def monsters(sprites: Path, split: str) -> tuple[ImageSet, list[str]]:
    """They, and what they are called, in an order of chance."""
    every = open_classic("sprites32", sprites, split=split)
    found = [k for k, captions in enumerate(every.captions) if "monster" in captions[1]]
    random.Random(0).shuffle(found)
    return every.select(found), [f"dungeon sprite of {every.captions[k][0]}" for k in found]


def enlarged(images: Tensor) -> Tensor:
    """Each pixel a square."""
    return F.interpolate(images, (SIDE, SIDE), mode="nearest")


def pictures(sprites: str, folder: str, count: str) -> None:
    """Not premultiplied, as PNG is."""
    images, names = monsters(Path(sprites), "train")
    Path(folder).mkdir(parents=True)
    for k in range(int(count)):
        picture = evaluation.to_picture(enlarged(images.images[k : k + 1])[0])
        picture.save(Path(folder, f"{k:04}.png"))
        Path(folder, f"{k:04}.txt").write_text(names[k] + "\n")


def others(icons: str, folder: str, count: str) -> None:
    """What the LoRA is to leave as it is, as the model draws it (prior preservation, arXiv:2208.12242)."""
    system, pack = pipeline.load("icons").system, open_icons(Path(icons))
    records = [r for r in pack.records if r.split == "train"]
    random.Random(0).shuffle(records)
    captions = [random.Random(k).choice(r.captions) for k, r in enumerate(records[: int(count)])]
    seeds = [10_000 + k for k in range(len(captions))]
    for k, image in enumerate(evaluation.draw(system, captions, seeds, 128)):
        evaluation.to_picture(image).save(Path(folder, f"other-{k:04}.png"))
        Path(folder, f"other-{k:04}.txt").write_text(captions[k] + "\n")


def probe(sprites: Tensor, icons: Tensor) -> Any:
    """Whether features (n, d) are of sprites: logistic regression with a little decay."""
    x = torch.cat([sprites, icons])
    mean, std = x.mean(0), x.std(0) + 1e-6
    weight = torch.zeros(x.shape[1] + 1, device=x.device, requires_grad=True)
    y = torch.cat([torch.ones(len(sprites)), torch.zeros(len(icons))]).to(x)
    share = torch.where(y == 1, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (x - mean) / std @ weight[1:] + weight[0]
        value = F.binary_cross_entropy_with_logits(logits, y, share) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weight.detach()
    return lambda seen: (seen - mean) / std @ found[1:] + found[0] > 0


def measure(sprites: str, icons: str, out: str, *loras: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    system, pack = pipeline.load("icons").system, open_icons(Path(icons))
    device = next(system.parameters()).device
    features = EffLite0(device)

    def seen(images: Tensor) -> Tensor:
        return features(evaluation.reconstructed(system.autoencoder, images, 64, device)).final.to(device)

    train, _ = monsters(Path(sprites), "train")
    test, names = monsters(Path(sprites), "test")
    of_icons = pack.image_set("val", SIDE)
    of_icons = of_icons.select(evaluation.evenly(len(of_icons), LEARNED))
    half = torch.arange(len(of_icons)) % 2 == 0
    pictured = seen(of_icons.images)
    judges = probe(seen(enlarged(train.images[300 : 300 + LEARNED])), pictured[half.to(device)])
    real_sprites = seen(enlarged(test.images[:DRAWN]))
    report = {
        "held-out sprites": round(float(judges(real_sprites).float().mean()), 4),
        "held-out icons": round(float(judges(pictured[~half.to(device)]).float().mean()), 4),
    }
    print(json.dumps({"the probe says sprite of": report}), flush=True)

    every = held_out_prompts(pack.records)
    seeds = evaluation.evenly(len(every), OTHERS)
    prompts = [every[k] for k in seeds]
    held = evaluation.held_out_images(pack, prompts, SIDE, None)
    held_final = features(held.images).final.to(device)
    frozen = json.loads((evaluation.JUDGE / "judge.json").read_text())
    judge = retrieval.load(evaluation.JUDGE / "judge.safetensors", device)
    asked = [names[k % len(names)] for k in range(DRAWN)]

    def drawn(what: list[str], numbers: list[int]) -> Tensor:
        return evaluation.draw(system, what, numbers, 64)

    for file, weight in [(None, 0.0), *((file, weight) for file in loras for weight in WEIGHTS)]:
        if file is not None:
            stack(system).attach(Path(file), weight)
        of_style, others = drawn(asked, list(range(DRAWN))), drawn([p.text for p in prompts], seeds)
        row = {
            "lora": None if file is None else Path(file).parent.name,
            "weight": weight,
            "bytes": 0 if file is None else Path(file).stat().st_size,
            "style accuracy": float(judges(features(of_style).final.to(device)).float().mean()),
            "KID of sprites": kid(features(of_style).final.to(device), real_sprites).value,
            "KID of others": kid(features(others).final.to(device), held_final, paired=True).value,
            "style accuracy of others": float(
                retrieval.styled(
                    judge, evaluation.judged_features(others, features, frozen["wear"]), [p.style for p in prompts]
                ).float().mean()
            ),
            "others taken for sprites": float(judges(features(others).final.to(device)).float().mean()),
        }  # fmt: skip
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        some = torch.cat([of_style[:20], others[:: OTHERS // 20][:20]])
        name = "none" if file is None else f"{Path(file).parent.name}-{weight:g}"
        sheet: Image.Image = evaluation.draw_grid(some, columns=10)
        sheet.resize((sheet.width // 2, sheet.height // 2)).save(Path(out, f"{name}.png"))
        stack(system).restore([])


if __name__ == "__main__":
    {"pictures": pictures, "others": others, "measure": measure}[sys.argv[1]](*sys.argv[2:])
