"""DATA → CHECKPOINT: `train` sets the run up, `fit` is the loop.

The loop knows no models: a system returns named losses for each of its phases (a GAN has two, most have one). Step k
depends on nothing but the state after step k-1 and on (seed, k, rank), so a run that was killed and resumed ends with
the same bits as one that was not, on the same machine and with the same number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from limner import catalog, pictures, pipeline
from limner.data.batches import SAMPLED, open_batches
from limner.data.images import Batches
from limner.data.latents import encoded
from limner.errors import TrainingDiverged, UsageError
from limner.training import adapting, tuning
from limner.training.config import TrainConfig
from limner.training.ema import ema_decay
from limner.training.memory import check_batch, check_parameters
from limner.training.optimizers import clip_gradients, lr_at, step_unless
from limner.training.processes import STOPS, Processes, StopRequests, join
from limner.training.report import Report
from limner.training.state import (
    TrainState,
    checkpoint_name,
    checkpoints,
    claim,
    final_file,
    newest_checkpoint,
    read_checkpoint,
    reading,
    remove_temporaries,
    save_checkpoint,
    warm_start,
    write_final,
)

MOST_PIXELS = 4096
"""A side of a picture to learn from."""
Draw = Callable[[Any, TrainConfig], list[Image.Image]]
"""(system, config) -> one picture for each of config.sample_prompts."""
Export = Callable[[Any, TrainConfig, Path], object]
"""(system, config, path): write the final weights there."""


def train(
    config: TrainConfig, run: Path, *, resume: bool = False, device: str = "auto", stop_after: float | None = None
) -> int:
    """Train `config` in the folder `run` and leave the averaged weights in RUN/final/NAME.safetensors.

    `resume` goes on from the newest checkpoint, or from the beginning where none was saved. `device` is auto, cpu or
    cuda; under torchrun every process takes one. `stop_after` seconds of wall time the state is saved and the loop
    left. Returns 0 when finished, else a key of `processes.STOPS`. Raises LimnerError.
    """
    if config.system and config.model:
        raise UsageError(f"{config.name} trains a system of its own: leave model out")
    if config.adapter and config.word:
        raise UsageError(f"{config.name} trains an adapter and a word: leave one of them out")
    config, given = replace(config, system=catalog.settled(config.system) if config.system else None), config
    with StopRequests(stop_after) as stop, ExitStack() as held:
        processes = join(device)
        held.callback(processes.leave)
        processes.lead(lambda: held.enter_context(claim(run, None if resume else config)))
        if processes.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(config.seed)
        system: Any = built(config, processes.device) if config.system else loaded(config, processes.device)
        if not config.data.size:
            config = replace(config, data=replace(config.data, size=system.defaults.width))
        pipeline.check(system.defaults, system.grid, prompt="any")  # the defaults, before anything is spent
        for prompt in config.sample_prompts:
            pipeline.prepare(system, prompt=prompt)
        check(config, system.grid, config.data.size)
        check_samples(config, system)
        if config.init_from:
            warm_start(system, Path(config.init_from), partial(catalog.load, dtype=torch.float32))
        system.to(processes.device, memory_format=torch.channels_last)
        images = open_batches(config.data, config.seed, processes.device)
        side = images.side
        if not config.data.latent_views:  # classic sets have a size of their own
            check(config, system.grid, side)
        batches: Batches = encoded(images, system)
        check_batch(system, batches, config, processes)
        if config.compile:
            system.compile(dynamic=False)
        notes = [*vain(config, side), *getattr(images, "notes", ())]
        if getattr(images, "masked", False) and config.system is not None and config.system.kind == "autoencoding":
            notes.append(f"masks have no effect on {config.name}: data.masks=none does not look for them")
        if config.system != given.system:
            notes.append("system.autoencoder is that of the file which system.autoencoder_from names")
        how: Any = {"export": tuning.export} if config.model else {}
        if isinstance(system, adapting.Beside):
            how = {"draw": adapting.draw, "export": adapting.export}
        return fit(system, batches, config, run, resume=resume, processes=processes, stop=stop, notes=notes, **how)


def built(config: TrainConfig, device: torch.device) -> Any:
    """The system of `config.system` with fresh weights. Raises UsageError, OutOfMemory."""
    assert config.system is not None
    check_pretrained(config)
    check_parameters(config, device)
    return catalog.build(config.system)


def loaded(config: TrainConfig, device: torch.device) -> Any:
    """The model of `config.model` with what is trained of it. Raises UsageError, FileProblem."""
    if not config.model:
        raise UsageError(f"{config.name} is for a model that is there: give --model NAME or FILE")
    if config.adapter is None and config.word is None:
        return tuning.loaded(config, device)
    base = catalog.load(config.model, device, dtype=pipeline.DTYPES[config.keep_model_in])
    if config.word is not None:
        return adapting.Wording(base, config.word, config.seed)
    assert config.adapter is not None
    return adapting.Adapting(base, config.adapter, config.seed)


def check_pretrained(config: TrainConfig) -> None:
    """Raises UsageError if nobody says what trained a network that stays as it is."""
    system = config.system
    if system is None or system.kind != "diffusion" or config.init_from:
        return
    parts = {"autoencoder_from": system.autoencoder_from}
    parts |= {"text_encoder_from": system.text_encoder_from} if system.text_encoder != "minilm" else {}
    if missing := [f"system.{name}=FILE" for name, source in parts.items() if not source]:
        raise UsageError(
            f"{config.name} learns with an autoencoder and a text encoder that are trained already: name a file or "
            f"folder that has them, such as one of {system.family}, with {' and '.join(missing)}"
        )


def check(config: TrainConfig, grid: int, size: int) -> None:
    """Raises UsageError where the system cannot learn from pictures of this size, or in this form."""
    data = config.data
    if data.other_sizes and not data.latent_views:
        raise UsageError("data.other_sizes are sizes of kept latents: give data.latent_views=1 or more")
    if config.system is not None and config.system.kind == "autoencoding":
        grid *= 2 if config.system.loss.type == "pixels" else 1  # it learns from latents of half the size too
        if data.latent_views:
            raise UsageError("data.latent_views are latents, an autoencoder learns from pictures: give 0")
    if data.augment != "none" and data.latent_views:
        raise UsageError(
            f"data.augment={data.augment} changes pictures as they are drawn, data.latent_views have changes of their "
            "own: give one of them"
        )
    if size > MOST_PIXELS:
        raise UsageError(f"data.size={size}: give {MOST_PIXELS} pixels at most")
    if size < grid or size % grid:
        raise UsageError(
            f"pictures of {size} pixels are not in multiples of {grid}, which {config.name} needs: give another "
            "data.size or data.source"
        )


def check_samples(config: TrainConfig, system: Any) -> None:
    """Raises UsageError where the system cannot learn from samples in this form."""
    data, unit = config.data, getattr(system, "unit", system.grid)
    autoencoding = config.system is not None and config.system.kind == "autoencoding"
    if data.source in SAMPLED and data.cache and autoencoding:
        raise UsageError(f"data.cache={data.cache} keeps latents, an autoencoder learns from pictures: leave it out")
    if data.masks == "alpha" and autoencoding:
        raise UsageError(f"data.masks=alpha has no effect on {config.name}: leave it out")
    unit *= 2 if autoencoding else 1
    if data.buckets and data.bucket_step % unit:
        raise UsageError(
            f"data.bucket_step={data.bucket_step} is not in multiples of {unit}, which {config.name} needs"
        )
    if data.source in SAMPLED and data.augment != "none" and data.cache:
        raise UsageError(f"data.augment={data.augment} changes pictures as they are drawn: leave data.cache out")


def vain(config: TrainConfig, side: int) -> list[str]:
    """A sentence for each field that changes nothing in this run, whose pictures have `side` pixels."""
    told = []
    if config.optimizer != "muon" and config.muon_lr_scale != 1:
        told.append(f"muon_lr_scale={config.muon_lr_scale:g} has no effect with optimizer={config.optimizer}")
    data = config.data
    if data.source in SAMPLED and data.latent_views > 1 and data.crop == "center" and not data.mirror:
        told.append(
            f"data.latent_views={data.latent_views} would be one view: data.crop=random or data.mirror=true make more"
        )
    if data.source in SAMPLED and data.cache and data.latent_views < 2 and (data.crop == "random" or data.mirror):
        told.append("data.crop and data.mirror have no effect on one view that is kept: give data.latent_views=2")
    if not config.data.latent_views and config.data.size != side:
        told.append(
            f"data.size={config.data.size} has no effect: the pictures of {config.data.source} have {side} pixels"
        )
    return told


def draw_prompts(system: Any, config: TrainConfig) -> list[Image.Image]:
    """Prompt i with seed i, by the very code that draws for users."""
    prompts = list(config.sample_prompts)
    request = pipeline.prepare(system, prompt=prompts[0], seed=0)
    return [pictures.to_pil(x) for x in pipeline.draw(system, prompts, list(range(len(prompts))), request)]


def save_weights(system: Any, config: TrainConfig, path: Path) -> None:
    assert config.system is not None
    catalog.save(system, config.system, path)


def fit(
    system: Any,
    batches: Batches,
    config: TrainConfig,
    run: Path,
    *,
    resume: bool = False,
    draw: Draw = draw_prompts,
    export: Export = save_weights,
    processes: Processes | None = None,
    stop: StopRequests | None = None,
    notes: Sequence[str] = (),
) -> int:
    """Train `system`, a types.System that is an nn.Module, to `config.steps`, from the newest checkpoint if `resume`.

    Tells `notes` at the beginning. Returns 0 when finished, else a key of `processes.STOPS`. Raises TrainingDiverged,
    FileProblem, UsageError.
    """
    processes, stop = processes or Processes(), stop or StopRequests(None)
    if config.batch_size % processes.world:
        raise UsageError(f"batch_size={config.batch_size} cannot be shared by {processes.world} processes evenly")
    state, ledger = TrainState(system, config), Ledger()
    notes = [*notes, *(restore(state, run, processes) if resume else ())]
    losses = {phase: processes.share(PhaseLoss(state, phase)) for phase in system.phases}
    start = state.step
    saved = start if start else -1
    system.train()

    def every(steps: int) -> bool:
        return steps > 0 and state.step > 0 and state.step % steps == 0

    with stop, Report(run, config.steps, start, state.images, silent=not processes.first) as report:
        for note in notes:
            report.say(note)
        report.say(f"{config.name}: step {start} of {config.steps} on {processes.world} x {processes.device.type}")
        while True:
            finished, stopping = state.step == config.steps, processes.agree(stop.asked())
            halt = finished or stopping > 0

            # once in a while: report, save, sample
            log, draw_now, save = (
                every(config.log_every),
                finished or every(config.sample_every),
                every(config.save_every),
            )
            if ledger.records and (halt or log or draw_now or save or processes.device.type == "cpu"):
                ledger.check(run)
            if ledger.records and (halt or log):
                report.log(state.step, state.images, ledger.means(), list(getattr(batches, "bad", {}).values()))
            if processes.first and state.step != saved and (halt or save):
                with report.aside():
                    save_checkpoint(run / "checkpoints", state.step, state.files(), config.keep)
                saved = state.step
            if processes.first and config.sample_prompts and draw_now and state.step > start:
                with report.aside(), state.ema.applied(), evaluating(system):
                    report.draw(checkpoint_name(state.step), draw(system, config))
            if halt:
                break

            # -----------------------------------------------------------------------------------------
            # a single step
            generator = randomness(config.seed, state.step, processes)
            batch = batches.batch(state.step, config.batch_size, rank=processes.rank, world=processes.world)
            batch = {k: v.to(processes.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            batch["step"] = state.step
            lr = lr_at(state.step, config)
            ledger.begin(state.step, lr, list(batch["ids"]))
            for phase in system.phases:
                state.only(phase)
                parameters = state.parameters[phase]
                for parameter in parameters:
                    parameter.grad = None
                with torch.autocast(processes.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    terms = losses[phase](batch, generator)
                terms["loss"].backward()
                norm = clip_gradients(parameters, config.grad_clip)
                bad = ledger.add(terms, norm, phase if len(system.phases) > 1 else "", processes)
                for optimizer in state.optimizers[phase]:
                    step_unless(optimizer, lr, bad)
            # a step of a larger size has fewer than config.batch_size, and some ranks may have rows that do not count
            count = batch.get("count", len(batch["ids"]) * processes.world)
            state.ema.update(ema_decay(config.ema_half_life, count, state.images, config.ema_warmup))
            state.step, state.images = state.step + 1, state.images + count
            # -----------------------------------------------------------------------------------------

        if finished and processes.first:
            with state.ema.applied(), evaluating(system):
                if hasattr(system, "finish"):
                    system.finish(batches)
                write_final(final_file(run, config), lambda path: export(system, config, path))
        report.say(
            str(final_file(run, config))
            if finished
            else f"{STOPS[stopping]}: saved at step {state.step}; to go on: limner train --resume {run}"
        )
    return 0 if finished else stopping


def randomness(seed: int, step: int, processes: Processes) -> torch.Generator:
    """The generator of this step and process, on its device; seeds torch's global ones alike."""
    digest = hashlib.sha256(f"{seed}/{step}/{processes.rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    torch.manual_seed(number)
    return torch.Generator(processes.device).manual_seed(number)


def restore(state: TrainState, run: Path, processes: Processes) -> list[str]:
    """Bring `state` to the newest whole checkpoint of `run`; returns what there is to tell."""
    notes: list[str] = []
    folder = run / "checkpoints"

    def newest() -> tuple[int, dict[str, bytes] | None]:
        notes.extend(f"removed {name}, left half-written" for name in remove_temporaries(run))
        files = newest_checkpoint(folder, notes.append)
        with reading(f"the newest in {folder}"):
            return int(json.loads(files["state.json"])["step"]) if files else -1, files

    step, files = processes.lead(newest) or (-1, None)
    step = processes.agree(step)
    if step < 0:
        return [*notes, f"{run} never saved a checkpoint: starting anew"]
    source = folder / checkpoint_name(step)
    state.restore(files or read_checkpoint(source), str(source))
    return notes


class PhaseLoss(nn.Module):
    """A system's loss for one phase as a forward pass, which is what DistributedDataParallel can wrap."""

    def __init__(self, state: TrainState, phase: str) -> None:
        super().__init__()
        state.only(phase)
        self.system, self.phase = state.system, phase

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return cast(Any, self.system).loss(batch, self.phase, generator)


@contextmanager
def evaluating(system: nn.Module) -> Iterator[None]:
    system.eval()
    yield
    system.train()


@dataclass
class Record:
    """What one step said: scalars on the device, and what they were about."""

    step: int
    lr: float
    ids: list[str]
    terms: dict[str, Tensor] = field(default_factory=dict)
    bad: Tensor | None = None


class Ledger:
    """The steps since the last report. Their numbers stay on the device until somebody looks."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.bad: Tensor | None = None

    def begin(self, step: int, lr: float, ids: list[str]) -> None:
        self.records.append(Record(step, lr, ids))

    def add(self, terms: dict[str, Tensor], norm: Tensor, phase: str, processes: Processes) -> Tensor:
        """Note a phase's terms; returns 1 from the first loss or gradient that is not finite on, 0 before it."""
        values = torch.stack([t.detach().float() for t in terms.values()] + [norm.to(terms["loss"].device).float()])
        values = processes.mean(values)
        names = [f"{phase}/{name}" if phase else name for name in [*terms, "grad_norm"]]
        named = dict(zip(names, values.unbind(), strict=True))
        prefix = f"{phase}/" if phase else ""
        bad = (~torch.isfinite(named[f"{prefix}loss"] + named[f"{prefix}grad_norm"])).float()
        self.bad = bad if self.bad is None else torch.maximum(self.bad, bad)
        self.records[-1].terms |= named
        self.records[-1].bad = self.bad
        return self.bad

    def check(self, run: Path) -> None:
        """Raises TrainingDiverged for the first step that was bad."""
        flags = torch.stack([r.bad for r in self.records if r.bad is not None]).tolist()
        if not any(flags):
            return
        record = self.records[flags.index(1.0)]
        terms = ", ".join(f"{name}={float(value):.4g}" for name, value in record.terms.items())
        folder = run / "checkpoints"
        advice = f"the last checkpoint in {folder} is good: start from it with a lower lr (init_from=…)"
        more = f" and {len(record.ids) - 8} more" if len(record.ids) > 8 else ""
        raise TrainingDiverged(
            f"step {record.step} diverged: {terms}, lr={record.lr:.3g}, samples {' '.join(record.ids[:8])}{more}; its "
            f"update was not made, {advice if checkpoints(folder) else 'no checkpoint was saved yet: lower the lr'}"
        )

    def means(self) -> dict[str, float]:
        """Of each term over the records, and the last learning rate; then starts afresh."""
        names = dict.fromkeys(name for record in self.records for name in record.terms)
        values = {n: torch.stack([r.terms[n] for r in self.records if n in r.terms]).mean() for n in names}
        means = {name: float(value) for name, value in values.items()} | {"lr": self.records[-1].lr}
        self.records.clear()
        return means
