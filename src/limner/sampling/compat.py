"""Drawing as A1111 and ComfyUI draw, where they do otherwise than Limner: noise, levels and where they begin.

From the published behaviour of A1111's web UI 1.10 and ComfyUI 0.3; README's table says it in words. What they do on a
graphics card is done here on any device: torch's generator there is Philox4x32-10 (Salmon et al. 2011), which is a
function of the seed, the place and the number of the draw.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner.errors import MissingExtra, UsageError
from limner.sampling import samplers, schedules
from limner.sampling.interpolants import Interpolant

PROGRAMS = {"a1111": "a1111", "a1111-cpu": "a1111", "comfyui": "comfyui"}
"""Programs, and the dialect in which each reads prompts. `a1111-cpu` is A1111 with the setting RNG: CPU."""
BROWNIAN = frozenset({"dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"})
"""Solvers whose fresh noise is that of one Brownian path for all numbers of steps."""
TIMED = frozenset({"ddim", "plms", "unipc"})
"""Solvers that A1111 took from Latent Diffusion, with timesteps of their own, and not from k-diffusion."""
SHORTENED = {"a1111": frozenset({"dpm2", "dpm2_a", "dpmpp_3m_sde"}), "comfyui": frozenset({"dpm2", "dpm2_a", "unipc"})}
"""Solvers for which they drop the level before the last of a schedule of one step more."""
_OURS = ("ddpm_large", "rk4", "dopri5", "pc", "pc_a")
OTHERS = {
    "a1111": frozenset({"unipc", "lcm", "tcd", "deis", "res_multistep", "ddpm", "flow_euler", *_OURS}),
    "comfyui": frozenset({"unipc", "tcd", "deis", "plms", "restart", "flow_euler", *_OURS}),
}
"""Solvers with other formulas there, or none."""
SCHEDULES = {
    "a1111": frozenset({"uniform", "normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform",
                        "beta_sigmas", "kl_optimal", "align_your_steps"}),
    "comfyui": frozenset({"normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta",
                          "kl_optimal", "linear_quadratic", "align_your_steps", "align_your_steps_xl"}),
}  # fmt: skip
"""Schedules that they have."""
MOST_STEPS = 10_000
"""Of a schedule of which little is walked."""
AUTOMATIC = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a", "restart"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential"),
    **dict.fromkeys(TIMED, "ddim_uniform"),
}
"""A1111's choice of schedule; `normal` for the rest, and for all in ComfyUI, where there is none."""


# ------------------------------------------------------------------------------------------------------------ levels


def settle(schedule: str, sampler: str, program: str) -> str:
    """Our name of the schedule that `program` means. Raises UnknownName."""
    ours = schedules.find(schedule)
    if program == "comfyui":
        return "normal" if ours == "auto" else ours
    ours = AUTOMATIC.get(sampler, "normal") if ours == "auto" else ours
    return {"beta": "beta_sigmas"}.get(ours, ours)


def solver(program: str, sampler: str) -> samplers.Sampler:
    """The solver of this name, as `program` has it where `differing` says nothing."""
    if PROGRAMS[program] == "comfyui" and sampler == "lcm":
        return partial(samplers.lcm, trace=False)
    return samplers.get(sampler)


def differing(program: str, schedule: str, sampler: str) -> list[str]:
    """A sentence for each of a solver and a schedule (as `settle` gives it) that `program` has not as it is here."""
    told, kind = [], PROGRAMS[program]
    if sampler in OTHERS[kind]:
        told.append(f"{sampler} is Limner's: {program} has other formulas for it, or none")
    if kind == "a1111" and sampler in TIMED and schedule != AUTOMATIC[sampler]:
        told.append(f"the schedule {schedule} has no effect: {program} has timesteps of its own for {sampler}")
    elif schedule not in SCHEDULES[kind]:
        told.append(f"the schedule {schedule} is Limner's: {program} has none of that name")
    return told


def sigmas(
    program: str, schedule: str, sampler: str, steps: int, strength: float | None, interpolant: Interpolant, again: bool
) -> tuple[list[float], list[float]]:
    """The levels that are walked, one step of them at least, and those of the whole schedule of which they are the end.
    `again` is A1111's second, larger pass. Raises UsageError."""
    kind, asked = PROGRAMS[program], steps
    if strength is not None and (again or kind == "comfyui") and not (kind == "comfyui" and strength > 0.9999):
        steps = int(steps / min(strength, 0.999 if kind == "a1111" else 1.0))
    if steps > MOST_STEPS:
        raise UsageError(
            f"a strength of {strength:g} makes {steps} steps of {asked} as {program} counts them: ask for more of it"
        )
    done = asked - 1 if again else int(min(strength or 0, 0.999) * steps)  # A1111's, but for one
    if kind == "a1111" and sampler in TIMED:
        whole = _timesteps(steps, interpolant)
        return whole if strength is None else whole[-max(done, 2) :], whole
    shortened = sampler in SHORTENED[kind]
    whole = _whole(kind, schedule, steps + shortened, interpolant)
    whole = [*whole[:-2], whole[-1]] if shortened else whole
    if strength is None:
        return whole, whole
    return whole[-1 - asked :] if kind == "comfyui" else whole[steps - done - 1 :], whole


def _timesteps(steps: int, interpolant: Interpolant) -> list[float]:
    """A1111's for Latent Diffusion's solvers, as many as fit, which end at the first but one; of a single one no step
    could be walked, so it goes to the first."""
    model = schedules.timed("ddim_uniform", interpolant, steps)
    last = len(model.sigmas) - 1
    times = [min(t + 1, last) for t in range(0, last + 1, (last + 1) // steps)]
    return [model.sigmas[t] for t in reversed(times if len(times) > 1 else [0, *times])]


def _whole(kind: str, schedule: str, steps: int, interpolant: Interpolant) -> list[float]:
    if schedule == "ddim_uniform":  # as many as fit, which may be more than asked for
        model = schedules.timed(schedule, interpolant, steps).sigmas
        return [*model[1 :: len(model) // steps][::-1], 0.0]
    if kind == "comfyui":
        return schedules.get(schedule)(steps, interpolant)
    if schedule == "kl_optimal":  # which ends at the lowest level, above 0
        return schedules.kl_optimal(steps + 1, interpolant)[:-1]
    if schedule in ("align_your_steps", "align_your_steps_xl"):  # whose last of eleven levels is walked too
        table = schedules.AYS_SD1 if schedule == "align_your_steps" else schedules.AYS_SDXL
        logs = np.interp(np.linspace(0, 10, steps), np.arange(11), np.log(table))
        return [*np.exp(logs).tolist(), 0.0]
    return schedules.get(schedule)(steps, interpolant)


def begin(
    program: str,
    sampler: str,
    interpolant: Interpolant,
    start: Tensor | None,
    eps: Tensor,
    levels: tuple[list[float], list[float]],
) -> Tensor:
    """x at the highest of the levels that are walked (as `sigmas` gives them), over the latents `start` or nothing."""
    walked, whole = levels
    sigma, full = walked[0], math.hypot(1, walked[0]) * eps
    if program != "comfyui" and sampler in TIMED and start is not None:  # noise of the level above, taken for this one
        above = whole[max(len(whole) - len(walked) - 1, 0)]
        return math.hypot(1, sigma) / math.hypot(1, above) * (start + above * eps)
    if program == "comfyui":
        top = sigma > interpolant.sigma_max or math.isclose(sigma, interpolant.sigma_max, rel_tol=1e-5)
        noise = full if top else sigma * eps
    else:
        noise = full if sampler in TIMED else sigma * eps
    return noise if start is None else start + noise


# ------------------------------------------------------------------------------------------------------------- noise


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a to b (b, c, h, w) as A1111 turns noise towards its variation: every column of every channel for itself."""
    low, high = a / a.norm(dim=2, keepdim=True), b / b.norm(dim=2, keepdim=True)
    dot = (low * high).sum(2, keepdim=True)
    angle = dot.acos()
    turned = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    same = dot.mean(dim=(1, 2, 3), keepdim=True) > 0.9995
    return torch.where(same, a * share + b * (1 - share), turned)


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): counters (4, n) of 32 bits and a key of 64 -> (4, n)."""
    low = np.uint64(0xFFFFFFFF)
    c = [row.astype(np.uint64) for row in counter]
    for turn in range(10):
        key = [np.uint64((half + turn * weyl) & 0xFFFFFFFF) for half, weyl in zip(
            (seed & 0xFFFFFFFF, seed >> 32), (0x9E3779B9, 0xBB67AE85), strict=True)]  # fmt: skip
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(two >> np.uint64(32)) ^ c[1] ^ key[0], two & low, (one >> np.uint64(32)) ^ c[3] ^ key[1], one & low]
    return np.stack(c)


class CardGenerator:
    """Draws what torch's generator on a graphics card of this seed draws (curand's Box and Muller; each of its threads
    makes one number, as in draws of up to about a hundred thousand)."""

    def __init__(self, seed: int) -> None:
        self.seed, self.draws = seed, 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        counter = np.zeros((4, count), np.uint64)
        counter[0], counter[2] = self.draws, np.arange(count)
        self.draws += 1
        x, y, *_ = (philox(counter, self.seed).astype(np.float64) + 0.5) * 2.0**-32
        drawn = np.sqrt(-2 * np.log(x)) * np.sin(2 * np.pi * y)
        return torch.from_numpy(drawn.astype(np.float32)).reshape(tuple(shape))


def cpu_generator(seed: int) -> Callable[[Sequence[int]], Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=generator)


class Source:
    """The noise of a program for pictures of these seeds: each call draws some of a shape for every one. `delta` is
    A1111's eta noise seed delta, `place` that of the first picture in the batch that ComfyUI would draw."""

    def __init__(
        self, program: str, seeds: Sequence[int], device: torch.device | str, delta: int = 0, place: int = 0
    ) -> None:
        self.program, self.seeds, self.device, self.place = program, list(seeds), device, place
        make: Callable[[int], Any] = CardGenerator if program == "a1111" else cpu_generator
        self.first = [make(seed) for seed in (self.seeds[:1] if program == "comfyui" else self.seeds)]
        if program == "comfyui":
            self.later: list[Any] = [CardGenerator(self.seeds[0])]
        else:
            self.later = [make(seed + delta) for seed in self.seeds] if delta else self.first
        self.began = False

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        makers, self.began = self.later if self.began else self.first, True
        if self.program == "comfyui":  # all of a batch at once, of which these are the last
            return makers[0]((self.place + len(self.seeds), *shape))[self.place :].to(self.device)
        return torch.stack([maker(shape) for maker in makers]).to(self.device)

    def brownian(self, shape: tuple[int, ...], levels: Sequence[float]) -> Brownian:
        """The noise of `BROWNIAN` solvers between these levels."""
        rows = self.place + len(self.seeds)
        seeds = self.seeds[:1] if self.program == "comfyui" else self.seeds
        size = (rows, *shape) if self.program == "comfyui" else shape
        skip = self.place if self.program == "comfyui" else 0
        return Brownian(seeds, size, [s for s in levels if s > 0], self.device, skip, self.program == "a1111")


class Brownian:
    """Noise by increments of Brownian paths over sigma, one a seed (torchsde's tree, as k-diffusion asks it). `card`:
    its numbers are those of a graphics card."""

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], levels: Sequence[float], device: Any, skip: int, card: bool
    ) -> None:
        require("dpmpp_sde")
        tree = importlib.import_module("torchsde").BrownianTree
        self.device, self.skip, self.card, self.one = device, skip, card, len(seeds) == 1 and len(shape) > 3
        low, high = (torch.tensor(end(levels)) for end in (min, max))
        with self.numbers():
            self.trees = [tree(low, torch.zeros(tuple(shape)), high, entropy=seed) for seed in seeds]

    def between(self, sigma: float, following: float) -> Tensor:
        """Unit noise of the way from one level down to another."""
        low, high = (torch.tensor(float(level)) for level in (following, sigma))
        with self.numbers():
            drawn = [tree(low, high) for tree in self.trees]
        noise = drawn[0][self.skip :] if self.one else torch.stack(drawn)
        return -(noise / (high - low).abs().sqrt()).to(self.device)

    @contextmanager
    def numbers(self) -> Any:
        """torchsde draws from torch's generators on the processor, or here from those of a graphics card."""
        module: Any = importlib.import_module("torchsde._brownian.brownian_interval")
        own = module._randn
        if self.card:
            module._randn = lambda size, dtype, device, seed: CardGenerator(int(seed))(size).to(device, dtype)
        try:
            yield
        finally:
            module._randn = own


def require(sampler: str) -> None:
    """Raises MissingExtra where `sampler` needs a package that is not here."""
    if sampler in BROWNIAN and find_spec("torchsde") is None:
        raise MissingExtra("torchsde", "compat", "noise of the SDE samplers as A1111 and ComfyUI draw it")
