"""Students that draw with fewer evaluations: what they learn by hand, by the published script, and as a run's file."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import StopAt

from limner import catalog, recipes
from limner.adapters.trainable import AdapterConfig
from limner.errors import UsageError
from limner.nn.graphs import Leaves
from limner.sampling import interpolants, samplers, schedules
from limner.sampling.interpolants import EDMConfig, FlowConfig, SDEConfig, VPConfig
from limner.systems.objectives import Objective
from limner.training import adapting, distilling, loop, state
from limner.training.distilling import DistillationConfig, DistillingAdapter, DistillingNetwork
from limner.types import Conditioning
from systems import flow_models, stable_diffusion

SPREAD, MEANS = 0.6, (0.4, -0.3)
"""Of latents that are normal: their deviation, and their mean with a caption and without."""
SHAPE = (64, 8, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Normal(nn.Module):
    """The network that is right about normal latents, (b, c, h, w); `does` makes something else of what it says."""

    def __init__(self, interpolant: Any, prediction: Any) -> None:
        super().__init__()
        self.interpolant, self.prediction, self.does = interpolant, prediction, denoised
        self.config = SimpleNamespace(text_width=1)
        self.bend = nn.Parameter(torch.zeros(2))

    def forward(self, seen: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        sigma = t
        if isinstance(self.interpolant, interpolants.Discrete):
            sigma = torch.tensor(self.interpolant.sigmas)[t.long()]
        elif isinstance(self.interpolant, interpolants.Preconditioned):
            sigma = (4 * t).exp()
        level = sigma[:, None, None, None]
        x, alpha = seen / self.interpolant.input_scale(level), self.interpolant.alpha(level)
        said = cond.pooled[:, 0, None, None, None]
        mean = MEANS[0] * said + MEANS[1] * (1 - said)
        x0 = self.does(self.interpolant, x, level, mean) + self.bend[0] + self.bend[1] * x
        return self.prediction.from_x0(x0, x, alpha, level.clamp(min=1e-6))


class Words(nn.Module):
    """Told whether there is a caption, and no more."""

    dialects, clip_skip = ("plain",), None

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning(pooled=torch.tensor([[float(bool(prompt))] for prompt in prompts]))


def denoised(interpolant: Any, x: Tensor, level: Tensor, mean: Tensor) -> Tensor:
    """The mean of x0 given x."""
    alpha = interpolant.alpha(level)
    return mean + SPREAD**2 * alpha / (alpha**2 * SPREAD**2 + level**2) * (x - alpha * mean)


def ending(scale: float) -> Any:
    """x0 for which the consistency function is where the trajectory of the teacher ends that is guided by `scale`.
    Guidance moves the mean alone, and on a trajectory (x - alpha * mean) / sqrt(alpha^2 spread^2 + sigma^2) stays what
    it is."""

    def does(interpolant: Any, x: Tensor, level: Tensor, mean: Tensor) -> Tensor:
        mean = MEANS[1] + scale * (MEANS[0] - MEANS[1])
        alpha = interpolant.alpha(level)
        timed = isinstance(interpolant, interpolants.Discrete)
        last = interpolant.ratio_min if isinstance(interpolant, interpolants.EDM) else 0.0
        place = (x - alpha * mean) / (alpha**2 * SPREAD**2 + level**2).sqrt()
        end = mean + math.hypot(SPREAD, last) * place
        if not last:
            return end
        if not timed:  # the x0 for which c_skip * x + c_out * F is `end`
            data = interpolant.data**2
            rest = (end - data / ((level - last) ** 2 + data) * x) / (1 - last / level).clamp(min=1e-6)
            return data / (level**2 + data) * x + rest
        t = 10 * torch.tensor([interpolant.time(s) for s in level.flatten().tolist()])[:, None, None, None].float()
        skip, out = 0.25 / (t**2 + 0.25), t / (t**2 + 0.25).sqrt()
        scaled = interpolant.input_scale
        return (scaled(last) * end - skip * scaled(level) * x) / out.clamp(min=1e-6)

    return does


def base_of(noise: Any, prediction: str) -> Any:
    config = replace(catalog.entry("icons-tiny").config, interpolant=noise, prediction=prediction, autoencoder_from="")
    base = catalog.build(config).requires_grad_(False)
    base.text_encoder, base.network = Words(), Normal(base.interpolant, base.prediction)
    return base


def student_of(base: Any, does: Any, **how: Any) -> DistillingNetwork:
    student = DistillingNetwork(base, DistillationConfig(**{"loss": "l2", "average": 0.0} | how), "")
    student.network.does = does
    return student


def batch() -> dict[str, Any]:
    x0 = MEANS[0] + SPREAD * torch.randn(SHAPE, generator=seeded(1))
    return {"latents": x0, "captions": ["a fox"] * len(x0), "ids": ["0"] * len(x0)}


KINDS = [
    ("flow", "velocity"), (FlowConfig(shift=3.0), "velocity"), (VPConfig(), "eps"), (VPConfig(), "v"),
    (EDMConfig(data=0.7), "edm"),
]  # fmt: skip


@pytest.mark.parametrize(("noise", "prediction"), KINDS)
def test_what_a_student_learns_is_where_the_guided_teacher_ends(noise, prediction):
    base = base_of(noise, prediction)

    def learning(does: Any, steps: int) -> tuple[float, float]:
        """The loss, and the length of its gradient."""
        student = student_of(base, does, guidance=(2.5,), steps=steps)
        loss = student.loss(batch(), "main", seeded())["loss"]
        loss.backward()
        return loss.item(), student.network.bend.grad.norm().item()

    (coarse, _), (right, slope) = (learning(ending(2.5), steps) for steps in (20, 200))
    assert right < min(1e-5, 1e-2 * coarse)  # the teacher's step is first order: its error falls with its length
    for wrong in (ending(1.0), denoised):
        loss, steep = learning(wrong, 200)
        assert loss > 10 * right
        assert steep > 10 * slope


@pytest.mark.parametrize(("noise", "prediction"), KINDS)
def test_the_student_of_guidance_says_what_the_guided_teacher_says(noise, prediction):
    base = base_of(noise, prediction)
    base.objective = Objective()

    def guided(scale: float) -> Any:
        return lambda interpolant, x, level, mean: denoised(
            interpolant, x, level, MEANS[1] + scale * (MEANS[0] - MEANS[1])
        )

    def loss(scale: float) -> float:
        student = student_of(base, guided(scale), kind="guidance", guidance=(2.5,))
        return student.loss(batch(), "main", seeded())["loss"].item()

    assert loss(2.5) < 1e-6
    assert loss(2.4) > 100 * loss(2.5)


@pytest.mark.parametrize(("noise", "prediction"), [*KINDS, ("flow", "x0")])
def test_at_the_end_a_student_says_what_it_is_given(noise, prediction):
    base = base_of(noise, prediction)
    student = student_of(base, lambda interpolant, x, level, mean: 3 * x + 1)
    x, cond = torch.randn(SHAPE, generator=seeded()), base.text_encoder.encode(["a"] * SHAPE[0])
    times, sigmas = distilling.levels(base.interpolant, 50)
    t, level = torch.full((SHAPE[0],), times[0]), torch.full((SHAPE[0], 1, 1, 1), sigmas[0])
    says = student.consistent(x, t, level, cond, torch.ones(SHAPE[0]))
    own = 1 if noise == KINDS[-1][0] else base.interpolant.input_scale(level)  # EDM's x is scaled for the network alone
    assert torch.equal(says, own * x)


def test_the_levels_are_those_of_the_published_models():
    times, sigmas = distilling.levels(interpolants.get(VPConfig()), 50)
    assert times == [0, *range(19, 1000, 20)]
    assert sigmas[-1] == interpolants.get(VPConfig()).sigmas[999]
    for steps in (3, 300, 500):
        places = distilling.levels(interpolants.get(VPConfig()), steps)[0]
        assert (len(set(places)), places[0], places[-1]) == (steps + 1, 0, 999)
    with pytest.raises(UsageError, match=r"distillation\.steps=501: give 500 at most"):
        distilling.levels(interpolants.get(VPConfig()), 501)
    levels = distilling.levels(interpolants.get(FlowConfig(shift=3.0)), 4)[1]
    assert levels == pytest.approx([0, 0.5, 0.75, 0.9, 1])


def test_with_edm_levels_are_those_of_karras_and_consistency_draws_at_them():
    """N of arXiv:2303.01469 is 18."""
    edm = interpolants.get(EDMConfig())
    roots = 0.002 ** (1 / 7), 80 ** (1 / 7)
    times, sigmas = distilling.levels(edm, 17)
    assert sigmas == pytest.approx([(roots[0] + i / 17 * (roots[1] - roots[0])) ** 7 for i in range(18)])
    assert times == pytest.approx([math.log(sigma) / 4 for sigma in sigmas])
    known = distilling.levels(edm, 16)[1]
    for steps in (1, 2, 4, 8, 16):
        *drawn, last = schedules.plan(schedules.settle("auto", "lcm"), "lcm", steps, edm)
        assert (set(drawn) <= set(known), drawn[0], last) == (True, pytest.approx(80), 0)


def test_consistency_distillation_is_of_second_order_with_edm():
    """The exact consistency function errs by what a step of Heun does, the third power of its length, squared."""
    base = base_of(EDMConfig(data=0.7), "edm")
    losses = [
        student_of(base, ending(1.0), guidance=(1.0,), steps=n).loss(batch(), "main", seeded())["loss"].item()
        for n in (24, 48)
    ]
    assert 50 < losses[0] / losses[1] < 80  # of Euler's step 16


def test_a_consistency_function_with_edm_keeps_what_has_no_noise_and_is_drawn_within_rounding():
    base = base_of(EDMConfig(data=0.7), "edm")
    student, (_, sigmas) = student_of(base, denoised), distilling.levels(base.interpolant, 100)
    level = torch.tensor(sigmas)[:, None, None, None]
    x = (0.7**2 + level**2).sqrt() * torch.randn(len(level), 8, 4, 4, generator=seeded())
    student.network.does = lambda interpolant, x, level, mean: base.prediction.to_x0(out, x, 1.0, level)
    out = 2 * torch.rand(x.shape, generator=seeded(1)) - 1
    cond, one = student.read(["a"] * len(x), x), torch.ones(len(x))
    with torch.no_grad():
        found = student.consistent(x, level[:, 0, 0, 0].log() / 4, level, cond, one)
    drawn = base.prediction.to_x0(out, x, 1.0, level)
    assert torch.allclose(found[0], x[0], atol=1e-6)
    apart = (found - drawn).square().mean((1, 2, 3)).sqrt()
    assert 0.001 < apart.max() < 1 / 255  # half a grey level


# ------------------------------------------------------------------- consistency training


def training(does: Any, step: int, **how: Any) -> DistillingNetwork:
    told = {"kind": "consistency-training", "guidance": (1.0,), "steps": 80, "loss": "l2"}
    config = DistillationConfig(**told | how)
    student = DistillingNetwork(base_of(EDMConfig(data=0.7), "edm"), config, "", total=100)
    student.network.does = does
    student.follow(step)
    return student


@pytest.mark.parametrize(
    ("most", "counts"), [(1280, [10, 20, 40, 80, 160, 320, 640, 1280]), (10, [10]), (25, [10, 20])]
)
def test_the_trajectory_of_consistency_training_is_doubled(most, counts):
    """K' = floor(K / (log2 floor(s1 / s0) + 1)) steps each (arXiv:2310.14189, section 3.4)."""
    total = 800
    each = total // len(counts)
    found = [distilling.curriculum(step, total, most) for step in range(total)]
    assert found == [counts[step // each] for step in range(total)]


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_consistency_training_is_by_its_equations(loss):
    """As arXiv:2310.14189 writes them, sums for each picture alone."""
    student = training(denoised, 30, loss=loss, huber=0.00054)  # of the second of four stages: N - 1 = 20
    told = batch() | {"step": 30, "weight": torch.linspace(0.5, 2, SHAPE[0])}
    found = student.loss(told, "main", seeded(3))["loss"].item()

    generator = seeded(3)
    torch.rand(len(told["ids"]), generator=generator)  # the scale of guidance
    drawn = torch.rand(len(told["ids"]), generator=generator)
    eps = torch.randn(SHAPE, generator=generator)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = [(low + i / 20 * (high - low)) ** 7 for i in range(21)]
    mean = -1.1 + math.log(0.7 / 0.5)  # published for data of 0.5
    odds = [
        math.erf((math.log(b) - mean) / (2**0.5 * 2.0)) - math.erf((math.log(a) - mean) / (2**0.5 * 2.0))
        for a, b in itertools.pairwise(sigmas)
    ]

    def f(x: Tensor, sigma: float) -> Tensor:
        data = 0.7**2
        scaled = x / math.sqrt(sigma**2 + data)
        x0 = denoised(student.base.interpolant, x, torch.tensor(sigma), MEANS[0])
        says = (x0 - data / (sigma**2 + data) * x) / (sigma * 0.7 / math.sqrt(sigma**2 + data))
        assert scaled.shape == says.shape
        return data / ((sigma - 0.002) ** 2 + data) * x + 0.7 * (sigma - 0.002) / math.sqrt(sigma**2 + data) * says

    losses = []
    for u, x0, z, weight in zip(drawn.tolist(), told["latents"], eps, told["weight"], strict=True):
        i = next(i for i in range(20) if u < sum(odds[: i + 1]) / sum(odds) or i == 19)
        gap, d = f(x0 + sigmas[i + 1] * z, sigmas[i + 1]) - f(x0 + sigmas[i] * z, sigmas[i]), x0.numel()
        c = 0.00054 * math.sqrt(d)
        far = (gap.square().sum() + c**2).sqrt() - c if loss == "huber" else gap.square().sum()
        scale = math.sqrt(d) if loss == "huber" else d
        losses.append(weight * far / scale / (sigmas[i + 1] - sigmas[i]))
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-3)


def test_consistency_training_ends_where_distillation_does():
    """The exact consistency function, that a teacher would teach, does not move; what is none does."""

    def slope(does: Any) -> float:
        student = training(does, 99)
        for k in range(8):
            (student.loss(batch() | {"step": 99}, "main", seeded(k))["loss"] / 8).backward()
        return student.network.bend.grad.norm().item()

    assert slope(ending(1.0)) < 0.1 * slope(denoised)


# ------------------------------------------------------------------- progressive distillation

WALKS = [
    ("flow", "velocity"), (FlowConfig(shift=3.0), "velocity"), (VPConfig(), "v"), (VPConfig(to_zero=True), "x0"),
    (EDMConfig(data=0.7), "edm"),
]  # fmt: skip


def halving(noise: Any, prediction: str, **how: Any) -> DistillingNetwork:
    config = DistillationConfig(**{"kind": "progressive", "guidance": (1.0,), "steps": 16, "least": 2} | how)
    base = base_of(noise, prediction)
    base.defaults = replace(base.defaults, schedule="uniform")
    return DistillingNetwork(base, config, "", total=9)


@pytest.mark.parametrize(("noise", "prediction"), WALKS)
def test_one_step_of_what_is_learned_goes_where_two_of_the_teacher_go(noise, prediction):
    student = halving(noise, prediction)
    interpolant = student.base.interpolant
    usual = student.base.defaults
    sigmas = schedules.plan(*distilling.walked_by(interpolant, usual), 16, interpolant)

    def solved(interpolant: Any, x: Tensor, level: Tensor, mean: Tensor) -> Tensor:
        """x0 of arXiv:2202.00512, algorithm 2, where a sampler leads in two steps."""
        rows = []
        for one, sigma in zip(x.double(), level.flatten().tolist(), strict=True):
            k = min(range(16), key=lambda k: abs(sigmas[k] - sigma))
            assert k % 2 == 0
            denoise = lambda x, s: denoised(interpolant, x, torch.tensor(s, dtype=x.dtype), MEANS[0])  # noqa: E731
            two = samplers.ddim(denoise, one, sigmas[k : k + 3], interpolant)
            ratio = sigmas[k + 2] / sigmas[k]
            x0 = (two - ratio * one) / (interpolant.alpha(sigmas[k + 2]) - ratio * interpolant.alpha(sigmas[k]))
            again = samplers.euler(lambda x, s, x0=x0: x0, one, [sigmas[k], sigmas[k + 2]], interpolant)
            assert torch.allclose(again, two, atol=1e-6)
            rows.append(x0)
        return torch.stack(rows).float()

    told = {**batch(), "step": 0}
    wrong = student.loss(told, "main", seeded())["loss"].item()
    student.network.does = solved
    assert student.loss(told, "main", seeded())["loss"].item() < 1e-5 * wrong


@pytest.mark.parametrize(("noise", "prediction"), WALKS)
def test_what_is_drawn_walks_the_levels_that_were_learned_and_students_become_teachers(noise, prediction):
    student = halving(noise, prediction, average=0.5)
    interpolant, ask, seen = student.base.interpolant, student.student, []
    last = torch.zeros(2)
    student.student = lambda x, t, level, *more: seen.append((level, t)) or ask(x, t, level, *more)
    for step, (steps, teacher) in enumerate([(8, 0), (8, 0), (8, 0), (4, 1), (4, 1), (4, 1), (2, 2), (2, 2), (2, 2)]):
        with torch.no_grad():
            student.network.bend.add_(1)
        before = student.averages.get_buffer("network:bend").clone()
        student.loss({**batch(), "step": step}, "main", seeded(step))
        drawn = student.draws
        assert drawn["steps"] == steps
        *walked, _ = schedules.plan(drawn["schedule"], drawn["sampler"], steps, interpolant)
        levels, times = seen.pop()
        assert sorted(set(levels.flatten().tolist())) == pytest.approx(sorted(walked), rel=1e-4)
        told = [interpolant.time(min(walked, key=lambda s, v=v: abs(s - v))) for v in levels.flatten().tolist()]
        assert times.tolist() == pytest.approx(told, abs=1e-4)
        taught = student.teachers.get_buffer("network:bend")
        if step in (3, 6):  # of the average, which all begin with
            average = torch.lerp(before, last + 1, 0.5)
            assert torch.allclose(taught, average)
            assert torch.equal(student.network.bend, taught)
            with student.taught() as network:
                assert torch.equal(network.bend, taught)
        assert bool(taught.any()) == bool(teacher)
        last = student.network.bend.detach().clone()


def test_a_guided_teacher_guides_in_the_first_round_alone():
    student = halving("flow", "velocity", guidance=(2.0,))
    asked, teacher = [], student.teacher
    student.teacher = lambda *told: asked.append(told[4] is not None) or teacher(*told)
    for step in (0, 3):
        student.loss({**batch(), "step": step}, "main", seeded())
    assert asked == [True, True, False, False]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return stable_diffusion.sd1(tmp_path_factory.mktemp("sd1"))


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_the_loss_is_that_of_the_published_script(sd1, loss):
    """As diffusers' example trains an LCM: in variance-preserving coordinates, with a DDIM solver of 50 timesteps."""
    import diffusers

    base = catalog.load(sd1, dtype=torch.float32)
    student = DistillingNetwork(base, DistillationConfig(guidance=(3.0, 15.0), loss=loss), str(sd1))
    with torch.no_grad():
        for k, p in enumerate(student.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=seeded(k)))
        for k, p in enumerate(student.averages.buffers()):
            p.add_(0.02 * torch.randn(p.shape, generator=seeded(k)))
    captions, x0 = ["a red fox", "a blue square", "a"], torch.randn(3, 4, 8, 8, generator=seeded())
    found = student.loss({"latents": x0, "captions": captions}, "main", seeded(5))["loss"]

    generator = seeded(5)
    w = 2 + 12 * torch.rand(3, generator=generator)  # one less than our scale
    index = torch.randint(1, 51, (3,), generator=generator) - 1
    noise = torch.randn(x0.shape, generator=generator)
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    bars = scheduler.alphas_cumprod
    grid = torch.arange(1, 51) * 20 - 1
    start, end = grid[index], (grid[index] - 20).clamp(min=0)
    noisy = scheduler.add_noise(x0, noise, start)
    said, empty = (base.text_encoder.encode(words) for words in (captions, [""] * 3))
    told = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)

    def wide(row: Tensor) -> Tensor:
        return row[:, None, None, None]

    def parts(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (x - wide((1 - bars[t]).sqrt()) * eps) / wide(bars[t].sqrt())

    def mixed(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        time = wide(10.0 * t)
        return 0.25 / (time**2 + 0.25) * x + time / (time**2 + 0.25) ** 0.5 * x0

    with torch.no_grad():
        eps = student.network(noisy, start, replace(said, guidance=told))
        mine = mixed(noisy, parts(noisy, eps, start), start)
        wanted, unwanted = (base.network(noisy, start, cond) for cond in (said, empty))
        x0s = [parts(noisy, eps, start) for eps in (wanted, unwanted)]
        pred_x0 = x0s[0] + wide(w) * (x0s[0] - x0s[1])
        pred_eps = wanted + wide(w) * (wanted - unwanted)
        before = torch.cat([bars[:1], bars[grid[:-1]]])[index]
        lower = wide(before.sqrt()) * pred_x0 + wide((1 - before).sqrt()) * pred_eps
        with student.averaged():
            eps = student.network(lower, end, replace(said, guidance=told))
        target = mixed(lower, parts(lower, eps, end), end)
        error = (mine - target) ** 2
        by_script = error.mean() if loss == "l2" else ((error + 0.001**2).sqrt() - 0.001).mean()
    assert found.item() == pytest.approx(by_script.item(), rel=1e-4)


# ------------------------------------------------------------------- students


def flux_of(tmp_path: Any) -> Any:
    return flow_models.flux(tmp_path, guided=False)


@pytest.mark.parametrize(
    ("model", "how", "adapter"),
    [
        ("icons", {}, False), ("icons", {"average": 0.0}, True), ("icons", {"kind": "guidance"}, True),
        ("sd1", {"guidance": (3.0, 15.0)}, False), ("sd1", {"kind": "guidance", "guidance": (1.0, 8.0)}, False),
        ("flux", {"kind": "guidance", "guidance": (1.0, 5.0)}, False),
    ],
)  # fmt: skip
def test_a_student_begins_as_its_teacher_and_all_of_it_learns(model, how, adapter, sd1, tiny_model, tmp_path):
    source = {"icons": tiny_model, "sd1": sd1}.get(model) or flux_of(tmp_path)
    base = catalog.load(source, dtype=torch.float32)
    config = DistillationConfig(**how)
    made: Any = DistillingAdapter(base, config, AdapterConfig(rank=2), 0) if adapter else None
    made = made or DistillingNetwork(base, config, str(source))
    channels = base.autoencoder.channels
    x, t = torch.randn(2, channels, 8, 8, generator=seeded()), torch.tensor([0.3, 0.8])
    cond, level = made.read(["a red fox", "a"], x), torch.full((2, 1, 1, 1), 0.5)
    with torch.no_grad(), made.taught() as network:
        plain = made.ask(network, x, t, level, cond, base.told_guidance, torch.ones(2))
    assert torch.allclose(made.student(x, t, level, cond, torch.tensor([2.0, 4.0])), plain, atol=1e-5)
    with torch.no_grad():
        for k, p in enumerate(made.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(k)))
    with torch.no_grad(), made.taught() as network:  # which knows nothing of it
        again = made.ask(network, x, t, level, cond, base.told_guidance, torch.ones(2))
    assert torch.equal(again, plain)
    made.loss({"latents": x, "captions": ["a red fox", "a"], "step": 0}, "main", seeded())["loss"].backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in base.parameters())
    if made.told is not None:
        says = made.student(x, t, level, cond, torch.tensor([2.0, 4.0]))
        assert not torch.allclose(says, made.student(x, t, level, cond, torch.tensor([4.0, 2.0])), atol=1e-4)


def test_a_student_in_16_bits_is_asked_with_its_own_weights_after_its_averages(tiny_model):
    student = DistillingNetwork(catalog.load(tiny_model, dtype=torch.float32), DistillationConfig(), str(tiny_model))
    with torch.no_grad():
        torch._foreach_mul_(list(student.averages.buffers()), 0.5)
    told = {"latents": torch.randn(2, 8, 8, 8, generator=seeded()), "captions": ["a", "a"]}
    with torch.autocast("cpu", torch.bfloat16):
        found = student.loss(told, "main", seeded())["loss"]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(found, student.loss(told, "main", seeded())["loss"])


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("consistency", False), ("consistency", True), ("progressive", False), ("guidance", False), ("guidance", True)],
)
def test_all_that_a_student_is_judged_by_is_in_its_examples(kind, adapter, tiny_model):
    """Which a recording reads where it was made; it draws nothing, and asks no teacher."""
    base = catalog.load(tiny_model, dtype=torch.float32)
    how = DistillationConfig(kind=kind, steps=16)
    made: Any = DistillingAdapter(base, how, AdapterConfig(rank=2), 0) if adapter else None
    made = made or DistillingNetwork(base, how, str(tiny_model), total=8)
    with torch.no_grad():
        for k, p in enumerate(made.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(k)))
    mask = torch.rand(2, 1, 32, 32, generator=seeded())
    told = {"latents": torch.randn(2, 8, 8, 8, generator=seeded()), "captions": ["a", "a"], "mask": mask, "step": 0}
    expected = made.loss(told | {"weight": torch.tensor([1.0, 2.0])}, "main", seeded(1))["loss"]
    examples = made.examples(told | {"weight": torch.tensor([1.0, 2.0])}, seeded(1))
    leaves = Leaves({**examples, "cond": examples["cond"].tensors()})
    assert not any(value.requires_grad for value in leaves.values if isinstance(value, Tensor))
    made.teacher = made.averaged = None
    tree = leaves.own().tree()
    found = made.error({**tree, "cond": Conditioning(**tree["cond"])})["loss"]
    assert torch.equal(found, expected)
    assert found.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["consistency", "consistency-training", "progressive", "guidance-distillation", "lcm-lora"]
)
def test_recorded_students_learn_as_others_do(name, tmp_path):
    config = replace(recipes.get(f"{name}-tiny"), steps=12, save_every=10**6, sample_every=0)
    weights = {}
    for graphs in (False, True):
        run = tmp_path / str(graphs)
        loop.train(replace(config, cuda_graphs=graphs), run, device="cuda")
        weights[graphs] = load_file(next(run.rglob(f"{config.name}.safetensors")))
    assert weights[True].keys() == weights[False].keys()
    for key, weight in weights[False].items():
        torch.testing.assert_close(weights[True][key].float(), weight.float(), rtol=1e-3, atol=1e-4)


def test_averages_follow_once_a_step(tiny_model):
    base = catalog.load(tiny_model)
    student = DistillingNetwork(base, DistillationConfig(average=0.75), str(tiny_model))
    weight = student.network.image_in.weight
    average = student.averages.get_buffer("network:image_in:weight")
    with torch.no_grad():
        weight.fill_(1.0)  # as weights to go on from are put in
    student.follow(0)
    assert average.eq(1).all()
    with torch.no_grad():
        weight.fill_(5.0)
    for _ in range(2):  # parts of a step
        student.follow(1)
    assert average.eq(2).all()
    with student.averaged():
        assert student.network.image_in.weight.eq(2).all()
    assert weight.eq(5).all()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"guidance": ()}, "one scale from 1 to 100, or the least and the most"),
        ({"guidance": (5.0, 2.0)}, "one scale from 1 to 100"),
        ({"guidance": (0.5,)}, "one scale from 1 to 100"),
        ({"guidance": (2.0, 5.0)}, "told its guidance, which this one of icons-tiny is not: give one scale"),
        ({"average": 1.0}, "distillation.average=1"),
        ({"huber": 0.0}, "huber=0"),
        ({"steps": 0}, "distillation.steps=0: give 1 to 1000"),
        ({"kind": "consistency-training", "guidance": (1.0,)}, "icons-tiny has no preconditioning of EDM's"),
        ({"kind": "progressive", "steps": 12}, "steps=12, least=1: give steps of least times 2, 4, 8"),
        ({"kind": "progressive", "steps": 8, "least": 0}, "least=0"),
        ({"kind": "progressive", "steps": 4, "least": 4}, "steps=4, least=4"),
        ({"kind": "progressive", "steps": 8}, "steps=1: give one for each of the 3 rounds"),
    ],
)
def test_what_cannot_be_is_refused(tiny_model, told, why):
    with pytest.raises(UsageError, match=why):
        DistillingNetwork(catalog.load(tiny_model), DistillationConfig(**told), "")


def test_a_model_without_timesteps_or_a_flow_or_told_already_is_refused(tmp_path):
    with pytest.raises(UsageError, match="timesteps, a flow or with EDM's"):
        distilling.levels(interpolants.get("edm"), 50)
    with pytest.raises(UsageError, match="no teacher that could be guided"):
        training(denoised, 0, guidance=(2.0,))
    with pytest.raises(UsageError, match="steps=9: give 10 to 10000"):
        training(denoised, 0, steps=9)
    with pytest.raises(UsageError, match="says eps, which at much noise"):
        halving(VPConfig(), "eps")
    with pytest.raises(UsageError, match="steps are halved along timesteps"):
        halving(SDEConfig(), "v")
    base = catalog.load(flow_models.flux(tmp_path), dtype=torch.float32)
    with pytest.raises(UsageError, match="is told its guidance already"):
        DistillingNetwork(base, DistillationConfig(kind="guidance"), "")


# ------------------------------------------------------------------- runs


FEW = [
    "batch_size=2",
    "log_every=2",
    "warmup=0",
    "ema_half_life=2",
    "data.size=32",
    "distillation.steps=8",
    "precision=fp32",
]


def distilled(limner, recipe, model, pictures, out, *more):
    done = limner("train", recipe, "-m", model, "-d", pictures, "-o", out, "--device", "cpu", *FEW, *more)
    assert done.code == 0, done.err
    return done.out.splitlines()[-1]


@pytest.mark.parametrize("recipe", ["lcm", "lcm-lora", "progressive", "guidance-distillation"])
def test_a_file_draws_what_the_run_showed(recipe, limner, here, tiny_model, pictures, monkeypatch):
    shown, draw = [], adapting.draw
    monkeypatch.setattr(adapting, "draw", lambda *told: shown.extend(draw(*told)) or shown)
    told = ["distillation.guidance=4", "steps=3", "lr=0.003", 'sample_prompts=["a blue square"]']
    told += ["adapter.rank=2"] if recipe == "lcm-lora" else []
    told += ["distillation.kind=progressive"] if recipe == "progressive" else []
    file = distilled(limner, {"progressive": "lcm"}.get(recipe, recipe), tiny_model, pictures, "run", *told)
    asked = ["generate", "a blue square", "-s", 0, "-o", "drawn.png"]
    if recipe == "lcm-lora":
        asked += ["-m", tiny_model, "--lora", file, "--sampler", "lcm", "--steps", 4, "--guidance", 1]
    else:
        asked += ["-m", file]
        defaults = catalog.load(file).defaults
        wanted = {"lcm": (4, 1.0, "lcm"), "progressive": (1, 1.0, "euler")}.get(recipe, (12, 1.0, "euler"))
        assert (defaults.steps, defaults.guidance, defaults.sampler) == wanted
    assert limner(*asked).code == 0
    assert Image.open("drawn.png").tobytes() == shown[0].tobytes()
    asked = ["generate", "a blue square", "-s", 0, "-m", tiny_model, "--guidance", 1, "-o", "plain.png"]
    asked += ["--sampler", "lcm", "--steps", 4] if "lcm" in recipe else ["--steps", wanted[0]]
    assert limner(*asked).code == 0
    assert Image.open("plain.png").tobytes() != shown[0].tobytes()


def test_a_run_that_was_stopped_ends_with_the_same_bits(limner, here, tiny_model, pictures, monkeypatch):
    """With averages, and teachers that were students: rounds begin at steps 2 and 4."""
    told = (
        "distillation.kind=progressive",
        "steps=6",
        "save_every=2",
        "accumulate=2",
        "distillation.average=0.5",
        "distillation.guidance=4",
        "lr=0.003",
    )
    distilled(limner, "lcm", tiny_model, pictures, "whole", *told)
    for k, steps in enumerate((1, 3)):
        with monkeypatch.context() as patch:
            stop = StopAt(steps)
            patch.setattr(loop, "StopRequests", lambda *_, stop=stop: stop)
            if k:
                limner("train", "--resume", "parts", "--device", "cpu")
            else:
                new = ("train", "lcm", "-m", tiny_model, "-d", pictures, "-o", "parts", "--device", "cpu")
                limner(*new, *FEW, *told)
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    for name in ("final/lcm.safetensors", "checkpoints/step-000006/model.safetensors"):
        assert (here / "parts" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_consistency_is_trained_from_nothing_or_from_a_model_that_is_there(limner, here, monkeypatch):
    shown, draw = [], adapting.draw
    monkeypatch.setattr(adapting, "draw", lambda *told: shown.extend(draw(*told)) or shown)
    few = ("batch_size=2", "steps=2", "log_every=1", "warmup=0", "data.limit=4", 'sample_prompts=["red circle"]')
    train = ("train", "consistency-training-tiny", "--device", "cpu", *few)
    assert limner(*train, "-o", "new").code == 0
    file = here / "new" / "final" / "consistency-training-tiny.safetensors"
    found = catalog.load(file).defaults
    assert (found.steps, found.sampler, found.schedule, found.guidance) == (2, "lcm", "lcm", 1.0)
    assert limner("generate", "red circle", "-s", 0, "-m", "new", "-o", "drawn.png").code == 0
    assert Image.open("drawn.png").tobytes() == shown[0].tobytes()
    config = recipes.get("consistency-training-tiny")
    student = distilling.begun(config, catalog.build(config.system))
    state.warm_start(student, file, student.opened)  # as init_from
    saved = load_file(file)
    assert all(torch.equal(value, saved[name]) for name, value in student.named_parameters())
    done = limner(*train, "-o", "none", "distillation.kind=consistency")
    assert (done.code, "has no teacher: leave distillation out" in done.err) == (2, True)
    assert not (here / "none").exists()


def test_a_stable_diffusion_that_is_told_guidance_is_read_and_drawn(limner, here, sd1, pictures):
    file = distilled(limner, "lcm", sd1, pictures, "run", "steps=2", "lr=0.01")
    system = catalog.load(file, dtype=torch.float32)
    assert (system.network.config.guidance_width, system.defaults.sampler, system.defaults.steps) == (256, "lcm", 4)
    assert system.network.time_embedding.cond_proj.weight.any()
    pictures = [f"{guidance}.png" for guidance in (3, 12)]
    for name in pictures:
        asked = ("generate", "a fox", "-m", file, "-W", 32, "-H", 32, "-s", 0, "--guidance", name[:-4], "-o", name)
        assert limner(*asked).code == 0
    assert len({(here / name).read_bytes() for name in pictures}) == 2


@pytest.mark.slow
def test_a_flux_that_is_told_guidance_is_read(limner, here, pictures, tmp_path):
    source = flux_of(tmp_path / "flux")
    told = ("steps=2", "lr=0.01", "distillation.guidance=1,5")
    file = distilled(limner, "guidance-distillation", source, pictures, "run", *told)
    files = flow_models.split_files(source, tmp_path / "files")
    system = catalog.load(
        file, dtype=torch.float32, vae=files["autoencoder"], text_encoders=[files["clip_l"], files["t5xxl"]]
    )
    assert system.network.config.guidance_embedded
    assert system.told_guidance is not None


def test_what_has_no_teacher_or_another_aim_is_refused(limner, here, tiny_model, pictures):
    for told, why in (
        (("loss.min_snr_gamma=5", "distillation.guidance=4"), "lcm has a loss of its own: leave it out"),
        (("sharding=fsdp", "distillation.guidance=4"), "sharding=fsdp is for networks that learn alone"),
        (("keep_model_in=fp8", "distillation.guidance=4"), "keep_model_in=fp8 is for adapters"),
        (("control={}", "data.hints=canny", "distillation.guidance=4"), "leave control out"),
        (('adapter={"text_encoder": true}', "distillation.guidance=4"), "leave adapter.text_encoder out"),
        ((), "give one scale"),
        (("distillation.kind=progressive", "on_nan=skip"), "on_nan=skip may leave out the step"),
        (("distillation.kind=progressive", "adapter={}"), "is a whole network: leave adapter out"),
    ):
        done = limner("train", "lcm", "-m", tiny_model, "-d", pictures, "-o", "run", "--device", "cpu", *FEW, *told)
        assert (done.code, why in done.err) == (2, True), done.err
        assert not (here / "run").exists()
