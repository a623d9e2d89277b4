"""DATA → CHECKPOINT: `train` sets the run up, `fit` is the loop.

The loop knows no models: a system returns named losses for each of its phases (a GAN has two, most have one). Step k
depends on nothing but the state after step k-1 and on (seed, k, rank), so a run that was killed and resumed ends with
the same bits as one that was not, on the same machine and with the same number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from limner.data.streams import Stream
from limner.errors import FileProblem, UsageError
from limner.systems.objectives import Objective
from limner.text.labels import LabelsConfig
from limner.training import adapting, controlling, distilling, prior, reflowing, texts, tuning
from limner.training.config import TrainConfig
from limner.training.ema import ema_decay
from limner.training.ledger import Ledger
from limner.training.memory import check_batch, check_parameters, kept_in, recompute_blocks
from limner.training.optimizers import clip_gradients, lr_at, step_unless
from limner.training.passes import Passes
from limner.training.processes import STOPS, Processes, StopRequests, join, restarted
from limner.training.report import Report
from limner.training.sharding import check_sharding, resting, shard, twin, whole
from limner.training.state import (
    CONFIG,
    TrainState,
    changed,
    check_room,
    checkpoint_name,
    claim,
    config_of,
    copy_tensors,
    final_file,
    newest_checkpoint,
    read_checkpoint,
    reading,
    remove_temporaries,
    save_checkpoint,
    tensors_of,
    warm_start,
    write_final,
)
from limner.training.validation import parted, validate

MOST_PIXELS = 4096
"""A side of a picture to learn from."""
NOUNS = {
    "autoencoding": "an autoencoder",
    "nonequilibrium": "a model of pixels",
    "classifying": "a classifier",
}
"""What learns from pictures themselves, not from latents, by a loss of its own, by the kind of system."""
Draw = Callable[[Any, TrainConfig], list[Image.Image]]
"""(system, config) -> one picture for each of config.sample_prompts."""
Export = Callable[[Any, TrainConfig, Path], object]
"""(system, config, path): write the final weights there."""


def train(
    config: TrainConfig,
    run: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    stop_after: float | None = None,
    data_changed: bool = False,
) -> int:
    """Train `config` in the folder `run` and leave the averaged weights in RUN/final/NAME.safetensors.

    `resume` goes on from the newest checkpoint, or from the beginning where none was saved. `device` is auto, cpu or
    cuda; under torchrun every process takes one. `stop_after` seconds of wall time the state is saved and the loop
    left. With other data than before a run is not resumed, unless they may have `data_changed`. Returns 0 when
    finished, else a key of `processes.STOPS`. Raises LimnerError.
    """
    if config.system and config.model:
        raise UsageError(f"{config.name} trains a system of its own: leave model out")
    if len(beside := [name for name in ("adapter", "word", "control") if getattr(config, name)]) > 1:
        raise UsageError(f"{config.name} trains {' and '.join(beside)}: leave all but one of them out")
    if config.system and config.reflow:
        raise UsageError(f"{config.name} trains a system of its own, which makes no pairs yet: leave reflow out")
    prior.check(config)
    config, given = replace(config, system=catalog.settled(config.system) if config.system else None), config
    with StopRequests(stop_after) as stop, ExitStack() as held:
        processes = join(device)
        held.callback(processes.leave)
        stop.waits = False
        again = processes.lead(lambda: restarted() and (run / CONFIG).exists() and config_of(run) == config)
        resume = processes.agree(int(resume or again or False)) > 0
        processes.lead(lambda: held.enter_context(claim(run, None if resume else config)))
        if processes.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(config.seed)
        system: Any = built(config, processes) if config.system else loaded(config, processes.device)
        if not config.data.size:
            config = replace(config, data=replace(config.data, size=system.defaults.width))
        pipeline.check(system.defaults, system.grid, prompt="any")  # the defaults, before anything is spent
        for prompt in config.sample_prompts:
            pipeline.prepare(system, prompt=prompt)
        unit = getattr(system, "unit", system.grid)
        check(config, unit, config.data.size)
        check_samples(config, system)
        model: Any = system.base if isinstance(system, adapting.Beside) else system
        model.stays = True  # a drawing that has no room may not move what learns
        if hasattr(model, "objective"):
            model.objective = config.loss
        if config.init_from:
            opened = getattr(system, "opened", partial(catalog.load, dtype=torch.float32))
            warm_start(system, Path(config.init_from), opened)
        system.to(processes.device, memory_format=torch.channels_last)
        images = open_batches(config.data, config.seed, processes.device)
        side, read = images.side, [images]
        data = {"data": images.account()} if processes.first else {}
        if not config.data.latent_views:  # classic sets have a size of their own
            check(config, unit, side)
        unlearned: Batches | None = None
        if config.validation:
            images, out = parted(images, config.validation)
            unlearned = encoded(out, system)
        if isinstance(system, controlling.Controlling):
            system.show(out if config.validation else images)
        batches: Batches
        if isinstance(system, reflowing.Reflowing):
            batches = reflowing.Pairs(system, images, config, processes)
        else:
            batches = encoded(images, system)
        if config.prior.wanted:
            of_class = prior.opened(prior.drawn(system, config, run, processes), config, processes.device)
            batches = prior.WithPrior(batches, of_class, config.prior.weight, model)
            data |= {"prior": of_class.account()} if processes.first else {}
            read.append(of_class)
        if config.gradient_checkpointing and not sum(map(recompute_blocks, getattr(system, "passed", [system]))):
            raise UsageError(
                f"gradient_checkpointing is for networks of repeated blocks, and {config.name} has none: leave it out"
            )
        told = texts.keep(system, model, config, read, processes)
        check_batch(system, batches, config, processes)
        if config.compile:
            system.compile(dynamic=False)
        notes = [*vain(config, side), *getattr(images, "notes", ()), *getattr(system, "notes", ()), *told]
        wordless = config.word is not None or of_pixels(config)
        if isinstance(images, Stream) and not wordless and images.bare:
            notes.append(
                f"none of {len(images)} pictures has a caption: put NAME.txt beside NAME, or say what all show, "
                "data.trigger=TEXT"
            )
        if isinstance(batches, prior.WithPrior):
            notes.append(f"beside {len(batches.stream)} pictures of the class, in {batches.stream.samples.name}")
        if getattr(images, "masked", False) and of_pixels(config):
            notes.append(f"masks have no effect on {config.name}: data.masks=none does not look for them")
        if config.system != given.system:
            notes.append("system.autoencoder is that of the file which system.autoencoder_from names")
        how: Any = {"export": tuning.export} if config.model else {}
        if isinstance(system, adapting.Beside):
            draw = controlling.draw if config.control else adapting.draw
            how = {"draw": draw, "export": adapting.export}
        return fit(
            system, batches, config, run, resume=resume, processes=processes, stop=stop, notes=notes, held=unlearned,
            data=data, data_changed=data_changed, **how,
        )  # fmt: skip
    on = f"to go on: limner train --resume {run}" if (run / CONFIG).exists() else "nothing was begun"
    print(f"{STOPS[stop.noted]} before the first step; {on}")
    return stop.noted


def built(config: TrainConfig, processes: Processes) -> Any:
    """The system of `config.system` with fresh weights. Raises UsageError, OutOfMemory."""
    assert config.system is not None
    check_pretrained(config)
    check_parameters(config, processes.device, processes.world if config.sharding == "fsdp" else 1)
    system = catalog.build(config.system)
    return distilling.begun(config, system.to(processes.device)) if config.distillation else system


def loaded(config: TrainConfig, device: torch.device) -> Any:
    """The model of `config.model` with what is trained of it. Raises UsageError, FileProblem."""
    if not config.model:
        raise UsageError(f"{config.name} is for a model that is there: give --model NAME or FILE")
    if config.reflow is not None:
        return reflowing.loaded(config, device)
    if config.distillation is not None:
        return distilling.loaded(config, device)
    if config.adapter is None and config.word is None and config.control is None:
        return tuning.loaded(config, device)
    if config.sharding == "fsdp":
        raise UsageError("sharding=fsdp is for whole networks: leave it out, or adapter, word and control")
    base = catalog.load(config.model, device, dtype=kept_in(config, device))
    if config.word is not None:
        return adapting.Wording(base, config.word, config.seed)
    if config.control is not None:
        return controlling.Controlling(base, config.control, config.seed)
    assert config.adapter is not None
    return adapting.Adapting(base, config.adapter, config.seed)


def of_pixels(config: TrainConfig) -> bool:
    """Whether a system is trained that learns from pictures alone."""
    return config.system is not None and config.system.kind in NOUNS


def check_pretrained(config: TrainConfig) -> None:
    """Raises UsageError if nobody says what trained a network that stays as it is."""
    system = config.system
    if system is None or system.kind != "diffusion" or config.init_from:
        return
    parts = {} if system.autoencoder.type == "pixels" else {"autoencoder_from": system.autoencoder_from}
    if system.text_encoder != "minilm" and not isinstance(system.text_encoder, LabelsConfig):
        parts["text_encoder_from"] = system.text_encoder_from
    words = {"autoencoder_from": "an autoencoder", "text_encoder_from": "a text encoder"}
    if missing := [f"system.{name}=FILE" for name, source in parts.items() if not source]:
        raise UsageError(
            f"{config.name} learns with {' and '.join(words[name] for name in parts)} trained already: name "
            f"a file or folder of them, such as one of {system.family}, with {' and '.join(missing)}"
        )


def check(config: TrainConfig, grid: int, size: int) -> None:
    """Raises UsageError where the system cannot learn from pictures of this size, or in this form."""
    data = config.data
    if config.control and data.hints == "none":
        raise UsageError("a control learns what hints say: give data.hints=canny, or another maker, or beside")
    if data.hints != "none" and not config.control:
        raise UsageError(
            f"data.hints={data.hints} has no effect on {config.name}, which trains no control: leave it out"
        )
    if data.other_sizes and not data.latent_views:
        raise UsageError("data.other_sizes are sizes of kept latents: give data.latent_views=1 or more")
    if config.system is not None and config.system.kind == "autoencoding":
        grid *= 2 if config.system.loss.type == "pixels" else 1  # it learns from latents of half the size too
    if config.system is not None and of_pixels(config):
        what = NOUNS[config.system.kind]
        if config.loss != Objective():
            raise UsageError(f"loss.… is of diffusion and flows, {what} learns by its own: leave it out")
        if data.latent_views:
            raise UsageError(f"data.latent_views are latents, {what} learns from pictures: give 0")
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
    learned, weight = getattr(system, "learned_variance", False), config.loss.variance_weight
    if weight and not learned:
        raise UsageError(f"loss.variance_weight={weight:g}, but {config.name} says no variance: leave it out")
    if learned and not weight and config.system is not None:
        raise UsageError(f"{config.name} learns a variance by the bound alone: give loss.variance_weight=0.001")
    autoencoding = config.system is not None and config.system.kind == "autoencoding"
    if data.source in SAMPLED and data.cache and config.system is not None and of_pixels(config):
        what = NOUNS[config.system.kind]
        raise UsageError(f"data.cache={data.cache} keeps latents, {what} learns from pictures: leave it out")
    if data.masks == "alpha" and of_pixels(config):
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
    if config.warmup > config.steps:
        told.append(
            f"warmup={config.warmup} is longer than the {config.steps} steps: the learning rate never gets to "
            f"lr={config.lr:g}"
        )
    if config.optimizer != "muon" and config.muon_lr_scale != 1:
        told.append(f"muon_lr_scale={config.muon_lr_scale:g} has no effect with optimizer={config.optimizer}")
    data = config.data
    if data.source in SAMPLED and data.latent_views > 1 and data.crop == "center" and not data.mirror:
        told.append(
            f"data.latent_views={data.latent_views} would be one view: data.crop=random or data.mirror=true make more"
        )
    if data.source in SAMPLED and data.cache and data.latent_views < 2 and (data.crop == "random" or data.mirror):
        told.append("data.crop and data.mirror have no effect on one view that is kept: give data.latent_views=2")
    if config.ema_half_life == 0 and config.ema_warmup != TrainConfig.ema_warmup:
        told.append(f"ema_warmup={config.ema_warmup:g} has no effect with ema_half_life=0")
    if (how := config.distillation) is not None:
        idle = {
            "guidance": ("steps", "least", "loss", "huber", "average"), "progressive": ("loss", "huber"),
            "consistency-training": ("least", "average"), "consistency": ("least",),
        }[how.kind]  # fmt: skip
        of = dict.fromkeys(idle, f"kind={how.kind}") | ({"huber": "loss=l2"} if how.loss == "l2" else {})
        told += [
            f"distillation.{name}={getattr(how, name)} has no effect with distillation.{why}"
            for name, why in of.items()
            if getattr(how, name) != getattr(type(how), name)
        ]
    times = config.loss.times
    if times.kind != "logit_normal" and (times.mean, times.std) != (0, 1):
        told.append(f"loss.times.mean and std have no effect with loss.times.kind={times.kind}")
    if config.validation == 0 and config.validate_every != TrainConfig.validate_every:
        told.append(f"validate_every={config.validate_every} has no effect with validation=0")
    if config.optimizer == "adafactor" and config.betas != TrainConfig.betas:
        told.append("betas have no effect with optimizer=adafactor")
    if config.optimizer == "prodigy" and config.lr != 1:
        told.append(f"optimizer=prodigy finds its learning rate and multiplies it by lr={config.lr:g}: 1 is usual")
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
    held: Batches | None = None,
    data: dict[str, Any] | None = None,
    data_changed: bool = False,
) -> int:
    """Train `system`, a types.System that is an nn.Module, to `config.steps`, from the newest checkpoint if `resume`.

    Measures the loss on `held`, if any, now and then. `data` tells the data from others, by what they are for: a run
    that had others before is not resumed, unless they may have `data_changed`. Tells `notes` at the beginning. Returns
    0 when finished, else a key of `processes.STOPS`. Raises TrainingDiverged, FileProblem, UsageError.
    """
    processes, stop = processes or Processes(), stop or StopRequests(None)
    if config.batch_size % processes.world:
        raise UsageError(f"batch_size={config.batch_size} cannot be shared by {processes.world} processes evenly")
    if config.batch_size // processes.world % config.accumulate:
        share = f"the {config.batch_size // processes.world} images of a process"
        raise UsageError(f"accumulate={config.accumulate} does not cut {share} into parts of one size: give a divisor")
    losses: dict[str, nn.Module] = {phase: PhaseLoss(system, phase) for phase in system.phases}
    sharded, whole_system = config.sharding == "fsdp" and processes.world > 1, system
    if sharded:
        check_sharding(config, len(losses))
        whole_system = twin(system) if processes.first else system
        shard(losses[system.phases[0]], system, processes)
    state = TrainState(system, config, processes.device)
    processes.lead(lambda: check_room(run / "checkpoints", state.least))
    state.data = data or {}
    notes = [*notes, *(restore(state, run, processes, data_changed) if resume else ())]
    ledger = Ledger(config, state.ledger, processes.device)
    if config.sharding == "fsdp" and not sharded:
        notes.append("sharding=fsdp has no effect with one process")
    for phase in losses if not sharded else ():
        state.only(phase)
        losses[phase] = processes.share(losses[phase])
    passes = Passes(system, losses, state, config, processes)
    one = torch.ones((), device=processes.device)
    start = state.step
    saved = start if start else -1
    system.train()

    def every(steps: int) -> bool:
        return steps > 0 and state.step > 0 and state.step % steps == 0

    @contextmanager
    def averaged() -> Iterator[Any]:
        """The system with the averaged weights, for the first process to use; all enter."""
        with state.ema.applied(), evaluating(system):
            if sharded:
                tensors = {name: whole(tensor) for name, tensor in state.tensors.items()}
                if processes.first:
                    own = tensors_of(whole_system)
                    copy_tensors(tensors, {name: own[name] for name in tensors}, "the processes")
                    whole_system.eval().to(processes.device)
            yield whole_system
            if sharded and processes.first:
                resting(whole_system)

    stop.waits = True
    with stop, Report(run, config.steps, start, state.images, silent=not processes.first) as report:
        report.begin(processes.world, processes.device)
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
                ledger.check(run, report.say)
            if ledger.records and (halt or log):
                bad_samples = list(getattr(batches, "bad", {}).values())
                report.log(state.step, state.images, ledger.means(), bad_samples)
            if held is not None and state.step > start and (finished or every(config.validate_every)):
                with report.aside(), state.ema.applied(), evaluating(system):
                    plain = losses if sharded else {phase: PhaseLoss(system, phase) for phase in losses}
                    measured = validate(plain, held, config, processes)
                report.validated(state.step, measured)
            if (processes.first or sharded) and state.step != saved and (halt or save):
                with report.aside():
                    files = state.files(processes.first)
                    if processes.first:
                        save_checkpoint(run / "checkpoints", state.step, files, config.keep)
                saved = state.step
            prompts = config.sample_prompts or getattr(system, "prompts", ())
            if (processes.first or sharded) and prompts and draw_now and state.step > start:
                with report.aside(), averaged() as drawing:
                    if processes.first:
                        report.draw(checkpoint_name(state.step), draw(drawing, config))
            if halt:
                break

            # -----------------------------------------------------------------------------------------
            # a single step
            generator = randomness(config.seed, state.step, processes)
            batch = batches.batch(state.step, config.batch_size, rank=processes.rank, world=processes.world)
            batch = {k: v.to(processes.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            batch["step"] = state.step
            lr = lr_at(state.step, config)
            parts = cut(batch, config.accumulate)
            ledger.begin(state.step, lr, list(batch["ids"]))
            before = [(b, b.clone()) for b in state.buffers] if config.on_nan == "skip" else []
            scale = state.scaler.scale(one) if config.precision == "fp16" else None
            for phase in system.phases:
                state.only(phase)
                parameters = state.parameters[phase]
                passes.begin(phase)
                terms: dict[str, Tensor] = {}
                for k, (part, weight) in enumerate(parts):
                    if k:  # noise of its own
                        generator = randomness(config.seed, state.step, processes, f"/{phase}/{k}")
                    with processes.gathering(losses[phase], last=k == len(parts) - 1):
                        found = passes(phase, part, generator, weight)
                    for name, value in found.items():
                        terms[name] = terms.get(name, 0) + weight * value
                for optimizer in state.optimizers[phase] if scale is not None else ():
                    state.scaler.unscale_(optimizer)
                norm = clip_gradients(parameters, config.grad_clip)
                bad = ledger.add(terms, norm, phase if len(system.phases) > 1 else "", processes, scale)
                for optimizer in state.optimizers[phase]:
                    step_unless(optimizer, lr, bad)
            if scale is not None:
                state.scaler.update()
            for buffer, value in before:
                buffer.copy_(torch.where(bad > 0, value, buffer))
            # a step of a larger size has fewer than config.batch_size, and some ranks may have rows that do not count
            count = batch.get("count", len(batch["ids"]) * processes.world)
            state.ema.update(ema_decay(config.ema_half_life, count, state.images, config.ema_warmup))
            state.step, state.images = state.step + 1, state.images + count
            # -----------------------------------------------------------------------------------------

        if finished and (processes.first or sharded):
            with averaged() as final:
                if processes.first:
                    if hasattr(final, "finish"):
                        final.finish(batches)
                    write_final(final_file(run, config), lambda path: export(final, config, path))
        report.say(
            str(final_file(run, config))
            if finished
            else f"{STOPS[stopping]}: saved at step {state.step}; to go on: limner train --resume {run}"
        )
    return 0 if finished else stopping


def cut(batch: dict[str, Any], count: int) -> list[tuple[dict[str, Any], float]]:
    """`batch` in `count` parts (fewer where it has fewer rows), each with its share of the rows."""
    rows = len(batch["ids"])
    count = min(count, rows)
    bounds = [rows * k // count for k in range(count + 1)]
    return [
        ({k: v[first:end] if isinstance(v, Tensor | list) else v for k, v in batch.items()}, (end - first) / rows)
        for first, end in itertools.pairwise(bounds)
    ]


def randomness(seed: int, step: int, processes: Processes, part: str = "") -> torch.Generator:
    """The generator of this step, process and part of the step, on its device; seeds torch's global ones alike."""
    digest = hashlib.sha256(f"{seed}/{step}/{processes.rank}{part}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    torch.manual_seed(number)
    return torch.Generator(processes.device).manual_seed(number)


def restore(state: TrainState, run: Path, processes: Processes, data_changed: bool = False) -> list[str]:
    """Bring `state` to the newest whole checkpoint of `run`; returns what there is to tell. Raises FileProblem where
    that had other data, unless they may have changed."""
    notes: list[str] = []
    folder = run / "checkpoints"

    def newest() -> tuple[int, dict[str, bytes] | None]:
        notes.extend(f"removed {name}, left half-written" for name in remove_temporaries(run))
        files = newest_checkpoint(folder, notes.append)
        if not files:
            return -1, None
        with reading(f"the newest in {folder}"):
            told = json.loads(files["state.json"])
            step, other = int(told["step"]), changed(told.get("data", {}), state.data)
        if other and not data_changed:
            raise FileProblem(
                f"the data are not those of step {step} of {run}, {other}: put them back as they were, or go on with "
                f"these, to another end: limner train --resume {run} --data-changed"
            )
        if data_changed:
            same = "the data are what they were" if told.get("data") else "what its data were is not known"
            notes.append(f"from step {step} on with other data: {other}" if other else same)
        return step, files

    step, files = processes.lead(newest) or (-1, None)
    step = processes.agree(step)
    if step < 0:
        return [*notes, f"{run} never saved a checkpoint: starting anew"]
    source = folder / checkpoint_name(step)
    state.restore(files or read_checkpoint(source), str(source))
    return notes


class PhaseLoss(nn.Module):
    """A system's loss for one phase as a forward pass, which is what DDP and FSDP can wrap."""

    def __init__(self, system: nn.Module, phase: str) -> None:
        super().__init__()
        self.system, self.phase = system, phase

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return cast(Any, self.system).loss(batch, self.phase, generator)


@contextmanager
def evaluating(system: nn.Module) -> Iterator[None]:
    system.eval()
    yield
    system.train()
