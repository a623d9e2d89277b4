"""How data and noise mix: x = alpha * x0 + sigma * eps, written as alpha(sigma).

Two cases carry every diffusion and flow model (design after k-diffusion's EDM coordinates and SiT, arXiv:2401.08740):
`EDM` has alpha = 1 and sigma from 0 to infinity, `Flow` has alpha = 1 - sigma and sigma from 0 to 1 (rectified flow,
SD3, FLUX; `Shifted` is one whose schedules are moved). Both are straight lines in sigma, so dx/dsigma = (x - x0) /
sigma in either. `Discrete` is EDM for networks that were trained at numbered timesteps and see x with its variance kept
at one (DDPM, Stable Diffusion), and `SDE` one for networks of a continuous time (score SDE).
"""

from __future__ import annotations

import itertools
import math
import operator
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from limner.errors import UnknownName, UsageError

Level = TypeVar("Level", float, Tensor)


@dataclass(frozen=True, kw_only=True)
class VPConfig:
    """The noise that a DDPM was trained with: `steps` timesteps whose `betas` run from `first` to `last`, evenly, or
    with evenly spaced roots (`scaled_linear`, Stable Diffusion), or by a cosine (arXiv:2102.09672) that needs neither.

    `zero_snr` rescales them so that the last timestep is pure noise (arXiv:2305.08891, algorithm 1).
    `offset` is added to timesteps spaced from the clean end, as diffusers does; `to_zero` lets DDIM end there, and not
    at the first timestep.
    """

    type: Literal["vp"] = "vp"
    betas: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    first: float = 0.00085
    last: float = 0.012
    steps: int = 1000
    zero_snr: bool = False
    offset: int = 1
    to_zero: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.first <= self.last < 1 and 2 <= self.steps <= 100_000 and 0 <= self.offset < self.steps):
            raise UsageError(
                f"no noise has betas {self.first:g} to {self.last:g} at {self.steps} timesteps, offset {self.offset}"
            )


@dataclass(frozen=True, kw_only=True)
class EDMConfig:
    """Noise from `low` to `high` of which a network is told as EDM does (arXiv:2206.00364, table 1), for data of the
    standard deviation `data`: Playground 2.5, and with 1 models such as CosXL."""

    type: Literal["edm"] = "edm"
    low: float = 0.002
    high: float = 80.0
    data: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < 1e6 and 0 < self.data < 1e3):
            raise UsageError(f"no noise goes from {self.low:g} to {self.high:g} over data of {self.data:g}")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """A straight path from data to noise whose schedules are moved towards noise by `shift` (SD3, arXiv:2403.03206,
    equation 23), 1 not at all; where `by_tokens`, by e^mu instead, of mu linear in the number of image tokens, `least`
    at 256 and `most` at 4096 (FLUX.1)."""

    type: Literal["flow"] = "flow"
    shift: float = 1.0
    by_tokens: bool = False
    least: float = 0.5
    most: float = 1.15

    def __post_init__(self) -> None:
        if not (0 < self.shift < 1e3 and -10 < self.least < 10 and -10 < self.most < 10):
            raise UsageError(f"no flow is shifted by {self.shift:g}, or by mu of {self.least:g} to {self.most:g}")

    def at(self, tokens: int) -> float:
        """The shift of pictures of so many tokens."""
        if not self.by_tokens:
            return self.shift
        return math.exp(self.least + (tokens - 256) / (4096 - 256) * (self.most - self.least))


@dataclass(frozen=True, kw_only=True)
class SDEConfig:
    """The noise of a stochastic differential equation in a continuous time t from 0 to 1 (score SDE, arXiv:2011.13456,
    equation 29 and appendix C), of a `kind`: `vp` and `subvp` of beta(t) even from `beta_min` to `beta_max`, whose
    integral B leaves e^(-B/2) of x0 under noise of which 1 - e^-B is the variance or, of a `subvp`, the deviation; `ve`
    of sigma(t) from `sigma_min` to `sigma_max`, geometrically (published for pixels in [0, 1]: those of ours want twice
    as much).
    Nothing is learned or drawn at times below `floor`: published as 1e-5 to learn, and 1e-3 to draw a `vp`."""

    type: Literal["sde"] = "sde"
    kind: Literal["vp", "subvp", "ve"] = "vp"
    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    floor: float = 1e-5

    def __post_init__(self) -> None:
        betas, sigmas = (self.beta_min, self.beta_max), (self.sigma_min, self.sigma_max)
        if not (0 < betas[0] <= betas[1] <= 60 and 0 < sigmas[0] < sigmas[1] < 1e6 and 1e-6 <= self.floor < 0.5):
            raise UsageError(
                f"no SDE has betas {betas[0]:g} to {betas[1]:g}, sigmas {sigmas[0]:g} to {sigmas[1]:g} "
                f"and times from {self.floor:g} on"
            )


@pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Times:
    """At which times u in (0, 1), from data to noise, a network learns, by their `kind`: `default` as the interpolant
    has it; all alike; or logit-normal with this `mean` and `std`. Then moved towards noise by `shift`, as schedules
    are, 1 not at all (arXiv:2403.03206, section 3.1 and equation 23)."""

    kind: Literal["default", "uniform", "logit_normal"] = "default"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """So many times u (count,); `default` is logit-normal."""
        if self.kind == "uniform":
            u = torch.rand(count, generator=generator, device=device)
        else:
            u = (self.mean + self.std * torch.randn(count, generator=generator, device=device)).sigmoid()
        return u if self.shift == 1 else self.shift * u / (1 + (self.shift - 1) * u)


AS_EVER = Times()
SMALL_NOISE = VPConfig(first=0.0001, last=0.02)
"""Of the picture that Stable Diffusion's x4 upscaler enlarges, and of that upscaler's latents."""


@dataclass(frozen=True)
class Interpolant:
    """`ratio_min` and `ratio_max` bound sigma/alpha where a schedule lives on ratios (Karras, exponential)."""

    name: str
    sigma_max: float
    ratio_min: float
    ratio_max: float

    def alpha(self, sigma: float) -> float:
        raise AssertionError("an interpolant defines alpha")

    def from_ratio(self, ratio: float) -> float:
        """The sigma at which sigma/alpha is `ratio`."""
        raise AssertionError("an interpolant defines from_ratio")

    def input_scale(self, sigma: Level) -> Level:
        """What x is multiplied by before the network sees it."""
        return sigma * 0 + 1

    def time(self, sigma: float, linear: bool = False) -> float:
        """What the network is told of sigma. `linear`: of one that lies between two timesteps linearly, as those of
        the schedule `linspace` do, not in its logarithm."""
        return sigma

    def own_scale(self, sigma: float) -> float:
        """What x is multiplied by to be in the coordinates of the process's own paper."""
        return 1.0

    def start(self, eps: Tensor, sigma: float) -> Tensor:
        """Where sampling from nothing begins."""
        return sigma * eps

    def sized(self, tokens: int) -> Interpolant:
        """As it is for pictures of so many tokens, each of 2 x 2 latents."""
        return self

    def draw(
        self, count: int, generator: torch.Generator, device: torch.device, times: Times = AS_EVER
    ) -> tuple[Tensor, Tensor]:
        """Times and sigmas (b,) to train at: logit-normal (arXiv:2403.03206, section 3.1), or as `times` says. Raises
        UsageError where it has no times that could be drawn otherwise."""
        sigma = times.draw(count, generator, device)
        return sigma, sigma

    def half_log_snr(self, sigma: float) -> float:
        """lambda = log(alpha / sigma): minus infinity for pure noise, plus infinity for clean data."""
        alpha = self.alpha(sigma)
        if sigma == 0:
            return math.inf
        return -math.inf if alpha == 0 else math.log(alpha / sigma)

    def mix(self, x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
        """alpha * x0 + sigma * eps; sigma may be a tensor that broadcasts."""
        return self.alpha(sigma) * x0 + sigma * eps  # type: ignore[arg-type]


@dataclass(frozen=True)
class EDM(Interpolant):
    """alpha = 1 (arXiv:2206.00364)."""

    name: str = "edm"
    sigma_max: float = 80.0
    ratio_min: float = 0.002
    ratio_max: float = 80.0

    def alpha(self, sigma: float) -> float:
        return sigma * 0 + 1.0

    def from_ratio(self, ratio: float) -> float:
        return ratio


@dataclass(frozen=True)
class Flow(Interpolant):
    """alpha = 1 - sigma (arXiv:2209.03003, arXiv:2210.02747)."""

    name: str = "flow"
    sigma_max: float = 1.0
    ratio_min: float = 0.02
    ratio_max: float = 500.0

    def alpha(self, sigma: float) -> float:
        return 1.0 - sigma

    def from_ratio(self, ratio: float) -> float:
        return ratio / (1 + ratio)


@dataclass(frozen=True, kw_only=True)
class Shifted(Flow):
    """A flow of which programs know a thousand levels, those at t of 0.001 to 1, shifted."""

    config: FlowConfig
    shift: float
    offset: int = 0
    end: float = 0.0

    def sized(self, tokens: int) -> Interpolant:
        return replace(self, shift=self.config.at(tokens))

    def at(self, time: float) -> float:
        """The sigma of a time of 0 to 1000."""
        t = time / 1000
        return self.shift * t / (1 + (self.shift - 1) * t)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(self.at(time) for time in range(1, 1001))

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last time. The first is shifted, and as a time will be once more: so do Stability's own
        code, diffusers and ComfyUI."""
        return 1000 * self.at(1), 1000 * self.at(1000)


@dataclass(frozen=True, kw_only=True)
class Discrete(EDM):
    """A variance-preserving model in EDM's coordinates: its own alpha * x0 + sigma * eps, divided by its alpha.

    `sigmas` are those of its timesteps, rising from the clean end; between two, time is linear in log sigma, but where
    `time` is told otherwise.
    """

    sigmas: tuple[float, ...]
    offset: int
    end: float

    def input_scale(self, sigma: Level) -> Level:
        return (sigma * sigma + 1) ** -0.5

    def own_scale(self, sigma: float) -> float:
        return self.input_scale(sigma)

    def time(self, sigma: float, linear: bool = False) -> float:
        i = min(max(bisect_left(self.sigmas, sigma), 1), len(self.sigmas) - 1)
        low, high = self.sigmas[i - 1 : i + 1]
        if not linear:
            low, high, sigma = math.log(low), math.log(high), math.log(sigma)
        return min(max(i - 1 + (sigma - low) / (high - low), 0.0), len(self.sigmas) - 1.0)

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last time."""
        return 0.0, len(self.sigmas) - 1.0

    def at(self, time: float) -> float:
        """The sigma of a time, the inverse of `time`."""
        i = min(int(time), len(self.sigmas) - 2)
        low, high = (math.log(s) for s in self.sigmas[i : i + 2])
        return self.sigmas[int(time)] if time == int(time) else math.exp(low + (time - i) * (high - low))

    def start(self, eps: Tensor, sigma: float) -> Tensor:
        """Noise alone, of the variance that a picture would have under it."""
        return math.hypot(1, sigma) * eps

    def draw(
        self, count: int, generator: torch.Generator, device: torch.device, times: Times = AS_EVER
    ) -> tuple[Tensor, Tensor]:
        """Every timestep as often (arXiv:2006.11239, algorithm 1)."""
        steps = len(self.sigmas)
        if times == AS_EVER:
            t = torch.randint(steps, (count,), generator=generator, device=device)
        else:
            even = replace(times, kind="uniform") if times.kind == "default" else times
            t = (even.draw(count, generator, device) * steps).long().clamp(max=steps - 1)
        return t, torch.tensor(self.sigmas, device=device)[t]


@dataclass(frozen=True, kw_only=True)
class SDE(EDM):
    """The process of an `SDEConfig` in EDM's coordinates, which is its own divided by its alpha: sigma is the root of
    e^B - 1 of a `vp`, 2 sinh(B/2) of a `subvp`. A network sees x in the process's own coordinates, and is told 999 t,
    or log sigma of a `ve` (as in its authors' code)."""

    config: SDEConfig

    def at(self, t: Tensor) -> Tensor:
        """The sigmas of times from 0 to 1."""
        how = self.config
        if how.kind == "ve":
            return how.sigma_min * (how.sigma_max / how.sigma_min) ** t
        integral = how.beta_min * t + (how.beta_max - how.beta_min) / 2 * t * t
        return integral.expm1().sqrt() if how.kind == "vp" else 2 * (integral / 2).sinh()

    def clock(self, sigma: float) -> float:
        """The inverse of `at`."""
        how = self.config
        if how.kind == "ve":
            return math.log(sigma / how.sigma_min) / math.log(how.sigma_max / how.sigma_min)
        integral = math.log1p(sigma**2) if how.kind == "vp" else 2 * math.asinh(sigma / 2)
        root = math.sqrt(how.beta_min**2 + 2 * (how.beta_max - how.beta_min) * integral)
        return 2 * integral / (how.beta_min + root)

    def own_scale(self, sigma: float) -> float:
        return self.input_scale(sigma)

    def input_scale(self, sigma: Level) -> Level:
        if self.config.kind == "subvp":
            return (sigma / 2 + (sigma * sigma / 4 + 1) ** 0.5) ** -1
        return (sigma * sigma + 1) ** -0.5 if self.config.kind == "vp" else sigma * 0 + 1

    def time(self, sigma: float, linear: bool = False) -> float:
        return math.log(sigma) if self.config.kind == "ve" else 999 * self.clock(sigma)

    def start(self, eps: Tensor, sigma: float) -> Tensor:
        """Noise alone: of a `ve` as much as sigma says, of the others that of unit variance in their coordinates."""
        return sigma * eps if self.config.kind == "ve" else eps / self.input_scale(sigma)

    def draw(
        self, count: int, generator: torch.Generator, device: torch.device, times: Times = AS_EVER
    ) -> tuple[Tensor, Tensor]:
        """Times alike from `floor` to 1 (arXiv:2011.13456, equation 7)."""
        even = replace(times, kind="uniform") if times.kind == "default" else times
        t = self.config.floor + (1 - self.config.floor) * even.draw(count, generator, device)
        sigma = self.at(t)
        return (sigma.log() if self.config.kind == "ve" else 999 * t), sigma


@dataclass(frozen=True, kw_only=True)
class Preconditioned(EDM):
    """EDM's coordinates for networks with its preconditioning: x is scaled to unit variance, the time is a quarter of
    log sigma (arXiv:2206.00364, table 1)."""

    data: float = 0.5

    def input_scale(self, sigma: Level) -> Level:
        return (sigma * sigma + self.data**2) ** -0.5

    def time(self, sigma: float, linear: bool = False) -> float:
        return math.log(sigma) / 4

    def start(self, eps: Tensor, sigma: float) -> Tensor:
        """Noise alone, of the variance that diffusers begins with."""
        return math.hypot(1, sigma) * eps

    def draw(
        self, count: int, generator: torch.Generator, device: torch.device, times: Times = AS_EVER
    ) -> tuple[Tensor, Tensor]:
        """Log-normal (arXiv:2206.00364, table 1), of sigma over the deviation of the data, which is 0.5 there."""
        if times != AS_EVER:
            raise UsageError(
                "an EDM learns at a log-normal sigma, which has no end to count times from: leave times out"
            )
        log = 1.2 * torch.randn(count, generator=generator, device=device) - 1.2 + math.log(self.data / 0.5)
        return log / 4, log.exp()


@lru_cache
def discrete(config: VPConfig) -> Discrete:
    steps = range(config.steps)
    if config.betas == "cosine":
        kept = [math.cos((i / config.steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(config.steps + 1)]
        betas = [min(1 - kept[i + 1] / kept[i], 0.999) for i in steps]
    else:
        power = 2 if config.betas == "scaled_linear" else 1
        first, last = config.first ** (1 / power), config.last ** (1 / power)
        betas = [(first + i / (config.steps - 1) * (last - first)) ** power for i in steps]
    alphas = [math.sqrt(bar) for bar in itertools.accumulate((1 - beta for beta in betas), operator.mul)]
    if config.zero_snr:
        alphas = [(alpha - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1]) for alpha in alphas]
        alphas[-1] = 2**-12  # not 0, so that the last sigma is a number; as in diffusers
    sigmas = tuple(math.sqrt(alpha**-2 - 1) for alpha in alphas)
    return Discrete(
        name="vp", sigma_max=sigmas[-1], ratio_min=sigmas[0], ratio_max=sigmas[-1], sigmas=sigmas,
        offset=config.offset, end=0.0 if config.to_zero else sigmas[0],
    )  # fmt: skip


def continuous(config: SDEConfig) -> SDE:
    made = SDE(name=f"sde_{config.kind}", config=config)
    ends = torch.tensor([config.floor, 1.0], dtype=torch.float64, device="cpu")  # whatever a system is built on
    low, high = made.at(ends).tolist()
    return replace(made, sigma_max=high, ratio_min=low, ratio_max=high)


INTERPOLANTS: dict[str, Interpolant] = {"edm": EDM(), "flow": Flow()}


def get(name: str | VPConfig | EDMConfig | FlowConfig | SDEConfig) -> Interpolant:
    if isinstance(name, SDEConfig):
        return continuous(name)
    if isinstance(name, FlowConfig):
        return Shifted(config=name, shift=name.shift)
    if isinstance(name, EDMConfig):
        return Preconditioned(sigma_max=name.high, ratio_min=name.low, ratio_max=name.high, data=name.data)
    if isinstance(name, VPConfig):
        return discrete(name)
    if name not in INTERPOLANTS:
        raise UnknownName("interpolant", name, INTERPOLANTS)
    return INTERPOLANTS[name]
