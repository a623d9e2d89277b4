"""Which noise levels a sampler visits: (steps, interpolant) -> steps + 1 falling sigmas, the last one 0.

Some live on sigma / alpha (Karras) and serve every model; others count the timesteps of a `Discrete` interpolant and
are refused for a model that has none. Where programs differ under one name, what is here is said with it; `plan` adds
what diffusers does for single solvers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from limner import names
from limner.errors import UnknownName, UsageError
from limner.sampling.interpolants import EDM, SDE, Discrete, Interpolant, Preconditioned, Shifted

Schedule = Callable[[int, Interpolant], list[float]]

# ---------------------------------------------------------------------------------------------- of any model


def uniform(steps: int, interpolant: Interpolant) -> list[float]:
    """Evenly spaced in time: in sigma from sigma_max to 0, as `normal` where there are timesteps, or of an SDE from its
    last time to its first, then 0."""
    if isinstance(interpolant, Discrete):
        return normal(steps, interpolant)
    if isinstance(interpolant, SDE):
        first = interpolant.config.floor if steps > 1 else 1.0
        times = torch.linspace(1, first, steps, dtype=torch.float64)
        return [*interpolant.at(times).tolist(), 0.0]
    return [interpolant.sigma_max * (1 - i / steps) for i in range(steps + 1)]


def shifted(steps: int, interpolant: Interpolant) -> list[float]:
    """Uniform, then sigma -> shift * sigma / (1 + (shift - 1) * sigma): more steps at high noise (SD3,
    arXiv:2403.03206, equation 23). The shift is the model's, of those that have none 3; only meaningful for sigma in
    [0, 1], others are scaled to it and back."""
    top, shift = interpolant.sigma_max, interpolant.shift if isinstance(interpolant, Shifted) else 3.0
    return [top * shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]


def karras(steps: int, interpolant: Interpolant, rho: float = 7.0) -> list[float]:
    """Evenly spaced in (sigma/alpha)^(1/rho) (EDM, arXiv:2206.00364, equation 5), then 0."""
    low, high = interpolant.ratio_min ** (1 / rho), interpolant.ratio_max ** (1 / rho)
    ratios = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    return [interpolant.from_ratio(r) for r in ratios] + [0.0]


def exponential(steps: int, interpolant: Interpolant) -> list[float]:
    """Evenly spaced in log(sigma/alpha), then 0; k-diffusion's polyexponential, whose rho is 1 unless it is told."""
    low, high = math.log(interpolant.ratio_min), math.log(interpolant.ratio_max)
    return [interpolant.from_ratio(math.exp(high + i / max(steps - 1, 1) * (low - high))) for i in range(steps)] + [0.0]


def kl_optimal(steps: int, interpolant: Interpolant) -> list[float]:
    """Evenly spaced in the arc tangent of sigma/alpha (arXiv:2404.14507, section 3), then 0."""
    low, high = math.atan(interpolant.ratio_min), math.atan(interpolant.ratio_max)
    return [interpolant.from_ratio(math.tan(high + i / max(steps - 1, 1) * (low - high))) for i in range(steps)] + [0.0]


def beta_sigmas(steps: int, interpolant: Interpolant) -> list[float]:
    """Quantiles of a beta distribution (0.6, 0.6), dense at both ends, between the bounds of sigma/alpha, then 0: what
    diffusers takes from arXiv:2407.12173. `beta` of other programs spreads timesteps so."""
    low, high = interpolant.ratio_min, interpolant.ratio_max
    shares = [_quantile(1 - i / max(steps - 1, 1)) for i in range(steps)]
    return [interpolant.from_ratio(low + share * (high - low)) for share in shares] + [0.0]


def linear_quadratic(steps: int, interpolant: Interpolant) -> list[float]:
    """Half of the steps take sigma down by 2.5 % evenly, half all the rest, ever faster (Movie Gen, arXiv:2410.13720,
    section 3.4.2)."""
    top, half, share = interpolant.sigma_max, steps // 2, 0.025
    if not half:
        return [top, 0.0]
    rest, slope = steps - half, share / half
    bend = (1 - share - slope * rest) / rest**2
    done = [slope * i for i in range(half)] + [share + slope * i + bend * i * i for i in range(rest)]
    return [top * (1 - part) for part in done] + [0.0]


def _quantile(p: float, a: float = 0.6) -> float:
    """Of the beta distribution with both parameters `a`, by halving an interval over its series."""
    if p > 0.5:
        return 1 - _quantile(1 - p, a)
    if p in (0.0, 0.5):
        return p
    terms = list(itertools.accumulate(range(1, 80), lambda term, n: term * (n - a) / n, initial=1.0))
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    low, high = 0.0, 0.5
    for _ in range(60):
        x = (low + high) / 2
        below = x**a * sum(term * x**n / (a + n) for n, term in enumerate(terms)) / whole
        low, high = (x, high) if below < p else (low, x)
    return (low + high) / 2


# ------------------------------------------------------------------------------------ of models with timesteps


def normal(steps: int, interpolant: Interpolant, more: int = 0) -> list[float]:
    """Timesteps evenly from the last to the first, then 0; between two, log sigma is linear (k-diffusion)."""
    model, top = timed("normal", interpolant, steps), steps + more - 1
    first, last = model.span
    return [model.at(last + i / max(top, 1) * (first - last)) for i in range(steps)] + [0.0]


sgm_uniform = partial(normal, more=1)
"""As `normal` for one step more, without the last but one level (Stability's generative-models)."""


def simple(steps: int, interpolant: Interpolant) -> list[float]:
    """Every so many-th timestep from the noisy end, rounded towards it, then 0 (ComfyUI)."""
    sigmas = timed("simple", interpolant, steps).sigmas
    return [sigmas[-1 - int(i * len(sigmas) / steps)] for i in range(steps)] + [0.0]


def ddim_uniform(steps: int, interpolant: Interpolant) -> list[float]:
    """Timesteps at whole distances from the second on, then 0 (Latent Diffusion's DDIM)."""
    return leading(steps, timed("ddim_uniform", interpolant, steps), offset=1)


def beta(steps: int, interpolant: Interpolant) -> list[float]:
    """Timesteps at quantiles of a beta distribution (0.6, 0.6), dense at both ends, then 0 (arXiv:2407.12173, as A1111
    and ComfyUI have it). Steps that fall on one timestep are one step."""
    sigmas = timed("beta", interpolant, steps).sigmas
    times = [round((len(sigmas) - 1) * _quantile(1 - i / steps)) for i in range(steps)]
    return [sigmas[t] for t in dict.fromkeys(times)] + [0.0]


def align_your_steps(levels: Sequence[float]) -> Schedule:
    """Levels found by optimisation for ten steps (arXiv:2404.14507, its published tables), between which log sigma is
    linear for other numbers; the last becomes 0."""

    def schedule(steps: int, interpolant: Interpolant) -> list[float]:
        if isinstance(timed("align_your_steps", interpolant, steps), Shifted):
            raise UsageError("the schedule 'align_your_steps' was made for Stable Diffusion 1 and XL: take 'uniform'")
        places = [i * (len(levels) - 1) / steps for i in range(steps)]
        logs = [math.log(level) for level in levels]
        return [math.exp(_between(logs, place)) for place in places] + [0.0]

    return schedule


AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def consistency(steps: int, interpolant: Interpolant) -> list[float]:
    """Of the 50 timesteps that consistency models are distilled at, evenly from the noisy end, then 0 (diffusers' LCM
    and TCD). With EDM's preconditioning as `karras`, with 0 in place of the lowest level, where nothing is left to do:
    levels of n steps are every second of those of 2n."""
    if isinstance(interpolant, Preconditioned):
        return [*karras(steps + 1, interpolant)[:steps], 0.0]
    sigmas = timed("lcm", interpolant, steps).sigmas
    if steps > 50:
        raise UsageError(f"the schedule 'lcm' has 50 steps at most, not {steps}")
    return [sigmas[(50 - 50 * i // steps) * len(sigmas) // 50 - 1] for i in range(steps)] + [0.0]


def leading(steps: int, interpolant: Interpolant, more: int = 0, offset: int | None = None) -> list[float]:
    """Timesteps at whole distances from the clean end, moved up by the model's offset, then 0 (diffusers).

    `more` is 1 for solvers whose timesteps diffusers lays out as for one step more, and leaves out the cleanest.
    """
    model = timed("leading", interpolant, steps + more)
    stride = len(model.sigmas) // (steps + more)
    offset = min(model.offset if offset is None else offset, len(model.sigmas) - 1 - (steps + more - 1) * stride)
    return [model.sigmas[i * stride + offset] for i in reversed(range(more, steps + more))] + [0.0]


def linspace(steps: int, interpolant: Interpolant, more: int = 0, whole: bool = False) -> list[float]:
    """Timesteps evenly from the last to the first, then 0; between two, sigma is linear. `more` is as in `leading`, and
    with `whole` they are rounded (diffusers). Of flows they are those of `normal`."""
    if isinstance(interpolant, Shifted):
        return normal(steps, interpolant)
    sigmas = timed("linspace", interpolant, steps + more).sigmas
    stride = (len(sigmas) - 1) / max(steps + more - 1, 1)
    times = [i * stride for i in reversed(range(more, steps + more))]
    return [_between(sigmas, round(t) if whole else t) for t in times] + [0.0]


def trailing(steps: int, interpolant: Interpolant) -> list[float]:
    """Timesteps at even distances from the noisy end, rounded, then 0 (arXiv:2305.08891, table 2)."""
    sigmas = timed("trailing", interpolant, steps).sigmas
    return [sigmas[round(len(sigmas) - i * len(sigmas) / steps) - 1] for i in range(steps)] + [0.0]


def hyper(steps: int, interpolant: Interpolant) -> list[float]:
    """Timesteps evenly from 800 of 1000 down, then 0: where Hyper-SD's model of one step begins, as its publishers draw
    (arXiv:2404.13686)."""
    sigmas = timed("hyper", interpolant, steps).sigmas
    first = len(sigmas) * 4 // 5
    if steps > first:
        raise UsageError(f"the schedule 'hyper' has {first} steps at most, not {steps}")
    return [sigmas[round(first * (1 - i / steps))] for i in range(steps)] + [0.0]


def timed(name: str, interpolant: Interpolant, steps: int) -> Discrete | Shifted:
    """The model, which has timesteps, and as many as `steps` or more. Raises UsageError."""
    if not isinstance(interpolant, Discrete | Shifted):
        other = untimed(interpolant)
        raise UsageError(f"the schedule {name!r} counts timesteps, which this model does not have: take {other!r}")
    if steps > len(interpolant.sigmas):
        raise UsageError(f"the schedule {name!r} has {len(interpolant.sigmas)} timesteps at most: ask for fewer steps")
    return interpolant


def untimed(interpolant: Interpolant) -> str:
    """The usual schedule of a model without timesteps: `karras` of an EDM; `uniform` of a flow and of an SDE, that is
    `exponential` of one whose variance explodes."""
    return "karras" if isinstance(interpolant, EDM) and not isinstance(interpolant, SDE) else "uniform"


def _between(values: Sequence[float], place: float) -> float:
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


# --------------------------------------------------------------------------------------------------- by name

SPACINGS: dict[str, Schedule] = {"leading": leading, "linspace": linspace, "trailing": trailing}
TIMED: dict[str, Schedule] = {
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "align_your_steps": align_your_steps(AYS_SD1),
    "align_your_steps_xl": align_your_steps(AYS_SDXL),
    "lcm": consistency,
    "hyper": hyper,
    **SPACINGS,
}
SCHEDULES: dict[str, Schedule] = {
    "uniform": uniform,
    "shifted": shifted,
    "karras": karras,
    "exponential": exponential,
    "kl_optimal": kl_optimal,
    "beta_sigmas": beta_sigmas,
    "linear_quadratic": linear_quadratic,
    **TIMED,
}
USUAL = {
    **dict.fromkeys(("ddim", "ddpm", "ddpm_large", "plms"), "leading"),
    **dict.fromkeys(("dpmpp_2s_a", "dpmpp_sde", "restart"), "karras"),
    "dpmpp_3m_sde": "exponential",
}
"""What solvers are drawn with where nothing else is said, diffusers' or, of what that does not have, A1111's choice;
`linspace` for the others."""
BARE = frozenset(
    {"euler", "euler_a", "heun", "restart", "lms", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_3m_sde"}
)
"""Solvers that k-diffusion brought: they begin with sigma * eps, as if nothing lay under the noise (in diffusers unless
timesteps are `leading`), and walk between timesteps too."""
ONE_MORE = frozenset({"dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "res_multistep", "unipc", "deis"})
"""Solvers whose timesteps diffusers lays out as for one step more."""
CONSISTENT = frozenset({"lcm", "tcd"})
"""Solvers that diffusers gives the timesteps of distillation, whatever the spacing."""
LOOSE, SHORT = frozenset({"ddim", "plms"}), frozenset({"deis", "tcd"})
"""Solvers that end at the first timestep's sigma instead of 0: LOOSE unless the model says otherwise, SHORT always."""


def plan(name: str, sampler: str, steps: int, interpolant: Interpolant) -> list[float]:
    """The sigmas that `sampler` walks. Raises UnknownName, and UsageError for a schedule that the model cannot have."""
    more = int(sampler in ONE_MORE)
    if name == "linspace":
        sigmas = linspace(steps, interpolant, more, whole=sampler not in BARE)
    else:
        sigmas = leading(steps, interpolant, more) if name == "leading" else get(name)(steps, interpolant)
    if isinstance(interpolant, Discrete) and (name in SPACINGS or name == "lcm"):
        sigmas[-1] = interpolant.end if sampler in LOOSE else interpolant.sigmas[0] if sampler in SHORT else 0.0
    return sigmas


def settle(name: str, sampler: str, interpolant: Interpolant | None = None) -> str:
    """Our name of a schedule, by any spelling; "auto" is what is usual for `sampler` or, of a model without timesteps,
    for its noise. Raises UnknownName."""
    ours = find(name)
    if sampler in CONSISTENT and isinstance(interpolant, Preconditioned) and ours in ("auto", untimed(interpolant)):
        return "lcm"
    if ours == "auto" and interpolant is not None and not isinstance(interpolant, Discrete | Shifted):
        return untimed(interpolant)
    if sampler in CONSISTENT and ours in ("auto", *SPACINGS):
        return "lcm"
    return USUAL.get(sampler, "linspace") if ours == "auto" else ours


def find(name: str) -> str:
    """Our name of a schedule, by any spelling, or "auto". Raises UnknownName."""
    ours = names.find(name, names.SCHEDULES)
    if ours is None:
        raise UnknownName("schedule", name, names.SCHEDULES)
    return ours


def get(name: str) -> Schedule:
    return SCHEDULES[find(name)]


def from_strength(sigmas: list[float], strength: float) -> list[float]:
    """The tail of a schedule that img2img walks: about `strength` (0, 1] of its steps, at least one."""
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * strength)) :]
