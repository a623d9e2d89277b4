"""The systems that draw icons in 32 pixels by their style, measured alike.

    python theory.py reference DATA CACHE OUT            what real pictures are like: OUT, a .pt
    python theory.py measure REFERENCE MODEL OUT [FIELD=VALUE ...] ...
                                                         a JSON line to OUT for each further argument, such as
                                                         "steps=10 sampler=ddim" or "classifier=RUN classifier_scale=2",
                                                         or for each of FIGURES for a run of the name of OUT
    python theory.py sheet MODEL OUT.png [FIELD=VALUE ...]
    python theory.py straightness REFERENCE MODEL OUT    a JSON line to OUT: how straight the paths of a flow are
    python theory.py bits DATA CACHE MODEL OUT           a JSON line to OUT for each way there is: bits per dimension of
                                                         held-out pictures on white, or of the digits in DATA
    python theory.py inversion DATA CACHE MODEL OUT      a JSON line to OUT for each number of steps: how far from 100
                                                         held-out pictures DDIM ends, from the noise it inverts them to
    python theory.py table FOLDER                        FOLDER/*/{measured,metrics,bits}.jsonl -> FOLDER/theory.md
    python theory.py figure FOLDER OUT.png               of the same and FOLDER/theory.json, which `reference` printed;
                                                         needs matplotlib

Several go in one process with -- between them.

COUNT (5,000) pictures of styles as frequent as in the data. FD is the Frechet distance of EffLite0's features to those
of all training pictures: its floor is that of COUNT training pictures to the others, its ceilings those of the same
blurred and of noise. "style" is the share of pictures that a linear probe of the same features takes for their style
(of held-out pictures it knows what `reference` says). "ms" is of a picture, in batches of BATCH (500). NFE counts what
a sampler asks: guidance asks the network for twice the rows, and a classifier as often and once back. Networks are in
bfloat16 on a GPU, if a row says nothing else, but where straightness, bits and inversion are measured.
Straightness is of HELD (555) paths of STEPS (100) steps. Bits are of HELD held-out pictures, told their style and
unguided, with the standard error over pictures: those of the variational bound, with all timesteps or, for EVERY n, one
of n for what it stands for, and of the flow, by dopri5 within TOLERANCE (1e-4) from noise of LOWEST (0.01) on, or the
least that the model knows, with DDPM's decoder below it and one draw of signs for each picture. A looser tolerance
gives too few: 1e-4 perhaps 0.015.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limner import catalog, evaluation, pipeline
from limner.catalog import STYLES
from limner.data.batches import DataConfig, open_images
from limner.data.classics import open_classic
from limner.data.images import to_float
from limner.metrics.distances import frechet, precision_recall
from limner.metrics.features import EffLite0
from limner.metrics.likelihood import flow_bits, variational_bits
from limner.metrics.straightness import straightness
from limner.models.pixels import PixelsConfig
from limner.sampling import samplers
from limner.sampling.interpolants import Discrete
from limner.types import Denoise

COUNT, BATCH = int(os.environ.get("COUNT", "5000")), int(os.environ.get("BATCH", "500"))
HELD = int(os.environ.get("HELD", "555"))
STEPS, EVERY = int(os.environ.get("STEPS", "100")), int(os.environ.get("EVERY", "1"))
TOLERANCE, LOWEST = float(os.environ.get("TOLERANCE", "1e-4")), float(os.environ.get("LOWEST", "1e-2"))
FEW = [f"steps={n}" for n in (1, 2, 4)]
LED = "sampler=ddim steps=50"
EULER = [f"sampler=euler steps={n}" for n in (1, 2, 5, 10, 50)]
FLOW = ["", *EULER, "sampler=dopri5 steps=1"]
SDE = ["steps=100", "sampler=heun steps=50"]
FIGURES = {
    "ddpm": ["", *(f"sampler=ddim steps={n}" for n in (5, 10, 20, 50, 100)), "sampler=ddim steps=10 eta=0.5",
             "sampler=ddim steps=10 eta=1", f"{LED} eta=0.5", f"{LED} eta=1", "steps=1000",
             "sampler=ddpm_large steps=1000", "sampler=ddim steps=1000"],
    "iddpm": ["", LED, "steps=50"],
    "adm": ["", LED, *(f"{LED} guidance={s}" for s in (1.5, 3, 5)),
            *(f"{LED} classifier={{}}/adm-classifier classifier_scale={s}" for s in (1, 2, 4))],
    "edm": ["", "steps=9", "steps=40", "churn=10", "steps=40 churn=20"],
    "dit-32": ["", LED],
    **dict.fromkeys(("vp-sde", "subvp-sde", "ve-sde"), SDE),
    **dict.fromkeys(("flow-matching", "ot-flow-matching", "sit-32", "reflow", "reflow-2"), FLOW),
    "one-step": [""], "consistency": FEW, "consistency-training": FEW, "lcm": FEW, "progressive": [""],
}  # fmt: skip
"""Settings to measure a run with; {} is the folder that it is in."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
warnings.simplefilter("ignore")


def on_white(images: Tensor) -> Tensor:
    """uint8 (n, 4, h, w), premultiplied, opaque."""
    return torch.cat([images[:, :3] + (255 - images[:, 3:]), torch.full_like(images[:, 3:], 255)], 1)


def probe(x: Tensor, y: Tensor, steps: int = 500) -> dict[str, Tensor]:
    """Logistic regression of classes y (n,) on features x (n, d)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    weight = torch.zeros(x.shape[1], len(STYLES.names), device=x.device, requires_grad=True)
    bias = torch.zeros(len(STYLES.names), device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy((x - mean) / std @ weight + bias, y) + 1e-3 * weight.square().sum()
        loss.backward()
        optimizer.step()
    return {"mean": mean, "std": std, "weight": weight.detach(), "bias": bias.detach()}


def classes(found: dict[str, Tensor], x: Tensor) -> Tensor:
    found = {name: value.to(x) for name, value in found.items()}
    return ((x - found["mean"]) / found["std"] @ found["weight"] + found["bias"]).argmax(1)


def reference(data: str, cache: str, out: str) -> None:
    features = EffLite0(DEVICE)

    def seen(images: Tensor) -> Tensor:
        return features(images).final

    def of(split: str) -> tuple[Tensor, Tensor]:
        config = DataConfig(source="icons", folder=data, cache=cache, split=split, size=32, caption_from="style")
        found = open_images(config)
        labels = [STYLES.names.index(caption) for (caption,) in found.captions]
        return on_white(found.images[:].clone()), torch.tensor(labels)

    (images, labels), (held, wanted) = of("train"), of("val")
    x = seen(images)
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:COUNT]
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[some] = False
    blurred = F.avg_pool2d(images[some, :3].float(), 3, 1, 1, count_include_pad=False).round().to(torch.uint8)
    blurred = torch.cat([blurred, images[some, 3:]], 1)
    noise = torch.randint(0, 256, (COUNT, 4, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise[:, 3] = 255
    found = probe(x.to(DEVICE), labels.to(DEVICE))
    report = {
        "pictures": len(images),
        "floor": frechet(x[some].to(DEVICE), x[rest].to(DEVICE)),
        "held-out pictures": frechet(seen(held).to(DEVICE), x.to(DEVICE)),
        "blurred": frechet(seen(blurred).to(DEVICE), x.to(DEVICE)),
        "noise": frechet(seen(noise).to(DEVICE), x.to(DEVICE)),
        "style of held-out pictures": float((classes(found, seen(held)) == wanted).float().mean()),
    }
    print(json.dumps(report))
    torch.save({"features": x, "labels": labels, "probe": found, "report": report}, out)


def parsed(settings: str) -> dict[str, Any]:
    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    return {name: value(text) for name, text in (word.split("=", 1) for word in settings.split())}


def opened(model: str, dtype: str = "bf16") -> Any:
    return pipeline.load(model, DEVICE, dtype=dtype if DEVICE == "cuda" else "auto")  # type: ignore[arg-type]


def led(system: Any, settings: str) -> dict[str, Any]:
    """What is asked by settings, with their classifier, or none, on the system."""
    asked = parsed(settings)
    system.__dict__.pop("classifier", None)
    if (source := asked.pop("classifier", None)) is not None:
        catalog.put_classifier(system, source, DEVICE)
    return asked


@contextmanager
def counted() -> Iterator[list[float]]:
    """The sigmas that samplers ask at, while this lasts."""
    asked: list[float] = []
    find = samplers.get

    def get(name: str) -> samplers.Sampler:
        @functools.wraps(find(name))  # whose options samplers.takes reads
        def sampler(denoise: Denoise, *told: Any, **more: Any) -> Tensor:
            def noted(x: Tensor, sigma: float) -> Tensor:
                asked.append(sigma)
                return denoise(x, sigma)

            return find(name)(noted, *told, **more)

        return sampler

    samplers.get = get
    try:
        yield asked
    finally:
        samplers.get = find


def measure(source: str, model: str, out: str, *settings: str) -> None:
    known = torch.load(source)
    pipe, features = opened(model), EffLite0(DEVICE)
    real = known["features"].to(DEVICE)
    chosen = random.Random(0).choices(known["labels"].tolist(), k=COUNT)
    prompts = [STYLES.names[k] for k in chosen]
    folder = str(Path(out).parent)
    for words in settings or [words.format(folder) for words in FIGURES.get(Path(out).stem, [""])]:
        told = led(pipe.system, words)
        evaluation.draw(
            pipe.system, prompts[:BATCH], list(range(min(BATCH, COUNT))), BATCH, **told | {"steps": 2}
        )  # to record
        with counted() as asked:
            begun = time.monotonic()
            drawn = evaluation.draw(pipe.system, prompts, list(range(COUNT)), BATCH, **told)
            took = time.monotonic() - begun
        drawn = drawn if drawn.shape[1] == 4 else torch.cat([drawn, torch.full_like(drawn[:, :1], 255)], 1)
        x = features(drawn).final
        precision, recall = precision_recall(real[:: max(1, len(real) // COUNT)], x.to(DEVICE))
        row = {
            "model": Path(model).name, "settings": words, "NFE": len(asked) / -(-COUNT // BATCH),
            "FD": frechet(x.to(DEVICE), real), "precision": precision, "recall": recall,
            "style": float((classes(known["probe"], x) == torch.tensor(chosen)).float().mean()),
            "ms": 1000 * took / COUNT, "pictures": COUNT,
            "dtype": str(next(pipe.system.network.parameters()).dtype).removeprefix("torch."),
        }  # fmt: skip
        note(out, row)


def note(out: str, row: dict[str, Any]) -> None:
    row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(row), flush=True)
    with Path(out).open("a") as file:
        file.write(json.dumps(row) + "\n")


def unguided(system: Any, prompts: list[str], **more: Any) -> Denoise:
    """What the model says of pictures of so many prompts, one each."""
    request = pipeline.prepare(system, prompt=prompts[0], guidance=1.0)
    ((_, told, _),) = system.condition(prompts, request)
    return system.denoiser(told(), None, (0.0, 1.0), **more)


def of(model: str, figures: Tensor) -> dict[str, Any]:
    """The mean of a figure of each picture, and its standard error."""
    error = figures.std() / len(figures) ** 0.5
    return {"model": Path(model).name, "mean": figures.mean().item(), "error": error.item(), "pictures": len(figures)}


def bent(source: str, model: str, out: str) -> None:
    system, known = opened(model, "fp32").system, torch.load(source)
    prompts = [STYLES.names[k] for k in random.Random(0).choices(known["labels"].tolist(), k=HELD)]
    draws, found = torch.Generator().manual_seed(0), []
    side = system.defaults.width // system.grid
    for first in range(0, HELD, BATCH):
        some = prompts[first : first + BATCH]
        eps = torch.randn(len(some), system.autoencoder.channels, side, side, generator=draws).to(DEVICE)
        found.append(straightness(unguided(system, some), eps, system.interpolant, STEPS).cpu())
    note(out, of(model, torch.cat(found)) | {"figure": "straightness", "steps": STEPS})


@torch.no_grad()
def of_digits(system: Any, data: str) -> dict[str, Tensor]:
    """The bound of the system of 2015 for each 100 digits that it did not learn from, over 10 draws, and the Gaussian's
    beside it."""
    images = open_classic("mnist", Path(data), "test").images.to(DEVICE)
    draws = torch.Generator(DEVICE).manual_seed(0)
    found = [system.loss({"images": to_float(some)}, "main", draws) for _ in range(10) for some in images.split(100)]
    return {
        name: torch.stack([one[key] for one in found]).view(10, -1).mean(0)
        for name, key in (("bound", "loss"), ("Gaussian", "gaussian"))
    }


def held_out(data: str, cache: str, count: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of so many pictures (b, 3, 32, 32) in -1..1 and their styles."""
    config = DataConfig(source="icons", folder=data, cache=cache, split="val", size=32, caption_from="style")
    held = open_images(config)
    for places in torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:count].split(BATCH):
        images = on_white(held.images[places])[:, :3].float().to(DEVICE) / 127.5 - 1
        yield images, [held.captions[i][0] for i in places.tolist()]


@torch.no_grad()
def inversion(data: str, cache: str, model: str, out: str) -> None:
    system = opened(model, "fp32").system
    ((images, prompts),) = held_out(data, cache, min(BATCH, 100))
    denoise = unguided(system, prompts)
    for steps in (10, 20, 50, 100, 200, 500, 1000):
        sigmas = system.sigmas(pipeline.prepare(system, prompt=prompts[0], guidance=1.0, steps=steps, sampler="ddim"))
        eps = samplers.invert(denoise, images, sigmas, system.interpolant)
        back = samplers.get("ddim")(denoise, eps, sigmas, system.interpolant)
        errors = ((back - images) / 2).square().mean((1, 2, 3))
        note(out, of(model, errors.cpu()) | {"figure": "square error of 0..1", "steps": steps})


def bits(data: str, cache: str, model: str, out: str) -> None:
    system = opened(model, "fp32").system
    if system.task == "unconditional":
        for figure, found in of_digits(system, data).items():
            note(out, of(model, found) | {"figure": figure, "each of": 100})
        return
    if not isinstance(system.autoencoder.config, PixelsConfig):
        sys.exit(f"{model} draws latents: bits are of pixels")
    noise = system.interpolant
    ways: list[Any] = ["flow"]
    if isinstance(noise, Discrete):
        ways += ["learned"] if system.learned_variance else ["small", "large"]
    for way in ways:
        found, asked = [], []
        for k, (images, prompts) in enumerate(held_out(data, cache, HELD)):
            draws, spread = torch.Generator().manual_seed(k), {}
            denoise = unguided(system, prompts, variance=spread if way == "learned" else None)
            if way == "flow":
                told: Any = {"rtol": TOLERANCE, "atol": TOLERANCE, "lowest": LOWEST, "noise": "gaussian"}
                made = flow_bits(denoise, images, noise, draws, **told)
                figures, evaluations = made.bits, made.evaluations
            else:
                variance = spread.__getitem__ if way == "learned" else way
                bound = variational_bits(
                    denoise, images, noise, draws, variance=variance, every=EVERY, clip=system.clip
                )
                figures, evaluations = bound.total, len(bound.times)
            found.append(figures.cpu())
            asked.append(evaluations)
        figure = "bits of the flow" if way == "flow" else f"bound, {way} variance"
        by = {"from": LOWEST, "tolerance": TOLERANCE} if way == "flow" else {}
        note(out, of(model, torch.cat(found)) | {"figure": figure, "NFE": sum(asked) / len(asked)} | by)


def sheet(model: str, out: str, settings: str = "") -> None:
    pipe = opened(model)
    prompts = [name if pipe.system.task == "text-to-image" else "" for name in STYLES.names for _ in range(2)]
    drawn = evaluation.draw(pipe.system, prompts, list(range(len(prompts))), BATCH, **led(pipe.system, settings))
    drawn = drawn if drawn.shape[1] == 4 else torch.cat([drawn, torch.full_like(drawn[:, :1], 255)], 1)
    evaluation.draw_grid(drawn, columns=16, gap=4).save(out)


def measured(folder: str) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(Path(folder).glob("*/measured.jsonl")):
        found = [{"run": file.parent.name} | json.loads(line) for line in file.read_text().splitlines()]
        rows += [row for row in found if "FD" in row]
    return rows


FEW_STEPS = ("flow", "ot-flow", "sit", "reflow", "one-step", "consistency", "lcm", "progressive")
"""How runs begin whose lines go to a panel of their own."""


def figure(folder: str, out: str) -> None:
    from matplotlib import pyplot
    from PIL import Image

    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    led: dict[str, list[tuple[float, float, float]]] = {}
    for row in measured(folder):
        asked = parsed(row["settings"])
        scales = {"classifier": asked.get("classifier_scale"), "classifier-free": asked.get("guidance")}
        for how in [how for how, scale in scales.items() if scale is not None]:
            led.setdefault(how, []).append((scales[how], row["FD"], row["style"]))
        if any(scales.values()):
            continue
        if row["run"] == "adm" and asked.get("steps") == 50:  # a scale of 1 is that of no guidance, 0 of no classifier
            led.setdefault("classifier", []).append((0, row["FD"], row["style"]))
            led.setdefault("classifier-free", []).append((1, row["FD"], row["style"]))
        said = [str(asked[k]) for k in ("sampler", "schedule") if k in asked]
        said += [f"eta {asked['eta']}"] if "eta" in asked else ["churn"] if "churn" in asked else []
        run = "progressive" if row["run"].startswith("progressive") else row["run"]  # a run for each number of steps
        lines.setdefault(run, {}).setdefault(" ".join(said), []).append((row["NFE"], row["FD"]))
    rows = 2 if led else 1
    _, ((many, few), *below) = pyplot.subplots(rows, 2, figsize=(15, 5.5 * rows), squeeze=False, layout="constrained")
    colours = {axis: itertools.cycle(pyplot.get_cmap("tab10").colors) for axis in (many, few)}
    for run, ways in lines.items():
        axis = few if run.startswith(FEW_STEPS) else many
        colour = next(colours[axis])
        for (how, points), mark in zip(sorted(ways.items()), itertools.cycle("os^vDP"), strict=False):
            axis.loglog(
                *zip(*sorted(points), strict=True), f"{mark}-", color=colour, label=f"{run} {how}".strip(), markersize=5
            )
    real = json.loads(Path(folder, "theory.json").read_text())
    for axis, title in ((many, "diffusion"), (few, "flows and few steps")):
        for name in ("floor", "blurred"):
            axis.axhline(real[name], color="grey", linestyle=":")
            axis.text(axis.get_xlim()[1], real[name], f"real, {name} ", color="grey", ha="right", va="bottom")
        axis.set(title=title, xlabel="evaluations of the network", ylabel="Fréchet distance")
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for axes in below:
        for axis, column, what in zip(
            axes, (1, 2), ("Fréchet distance", "share of drawings in their style"), strict=True
        ):
            for name, found in led.items():
                axis.plot([s[0] for s in sorted(found)], [s[column] for s in sorted(found)], "o-", label=name)
            axis.set(title="adm, 50 steps of DDIM", xlabel="scale of guidance", ylabel=what)
            axis.legend(frameon=False)
    pyplot.savefig(out, dpi=90)
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)


def table(folder: str) -> None:
    rows = measured(folder)
    lines = [
        "| run | settings | NFE | FD | precision | recall | style | ms | in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['run']} | {row['settings'] or 'as it is'} | {row['NFE']:g} | {row['FD']:.1f} | "
            f"{row['precision']:.2f} | {row['recall']:.2f} | {row['style']:.3f} | {row['ms']:.2f} | {row['dtype']} |"
        )
    lines += ["", "| run | images learned from | images/s | GB | bits and straightness |", "|---|---|---|---|---|"]
    for file in sorted(Path(folder).glob("*/metrics.jsonl")):
        steps = [row for row in map(json.loads, file.read_text().splitlines()) if "images_per_second" in row]
        more = file.with_name("bits.jsonl")
        said = [json.loads(line) for line in more.read_text().splitlines()] if more.exists() else []
        rate = median(row["images_per_second"] for row in steps)
        lines.append(
            f"| {file.parent.name} | {steps[-1]['images']:,} | {rate:,.0f} | {steps[-1]['memory_gb']:.1f} | "
            + ", ".join(f"{s['figure']} {s['mean']:.4g}" for s in said)
            + " |"
        )
    Path(folder, "theory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    commands = {
        "reference": reference, "measure": measure, "sheet": sheet, "straightness": bent, "bits": bits,
        "inversion": inversion, "table": table, "figure": figure,
    }  # fmt: skip
    for told, words in itertools.groupby(sys.argv[1:], "--".__ne__):
        if told:
            name, *rest = words
            commands[name](*rest)
