"""What a drawing takes of memory: found without drawing, as it is when drawn; and parts that take turns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from limner import catalog, memory, pipeline
from limner.adapters.attaching import stack
from limner.errors import UsageError
from limner.memory import Plan, Stage
from limner.nn.linear import Linear
from limner.systems.diffusion import PARTS, DiffusionSystem

from . import flow_models, stable_diffusion


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: getattr(stable_diffusion, name)(tmp_path_factory.mktemp(name)) for name in ("sdxl", "sdxl_refiner")}


def test_the_bytes_of_a_chain_are_those_alive_together():
    weight = torch.zeros(100, 100, device="meta")

    def chain():
        a = torch.zeros(10, 100, device="meta")  # 4,000 bytes
        b = F.linear(a, weight)  # and as many again: the weight counts for nothing, nor does its transpose
        a = b.view(1000)
        c = a.double()  # 8,000 more, and the first are gone
        del a, b
        return c[:10] + 1  # 80 beside 8,000

    assert memory.made_by(chain) == round(memory.SLACK * 12_000)
    assert memory.made_by(lambda: F.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 50, 2, device="meta"))) < 4_000


@pytest.mark.parametrize("name", ["sd1-tiny", "icons-tiny"])
def test_a_plan_tells_what_a_drawing_makes(name, monkeypatch):
    config = catalog.entry(name).config
    system = catalog.build(replace(config, autoencoder_from="")).eval().requires_grad_(False)
    request = pipeline.prepare(system, prompt="a red fox", batch=3, steps=3)
    found = memory.plan(system, request, 3)
    for part in PARTS:  # and buffers, which are few
        assert found.weights[part] == pytest.approx(
            sum(4 * p.numel() for p in getattr(system, part).parameters()), rel=0.05
        )
    cond = system.condition(list(request.prompts), request)
    cond[0][1]()
    drawn = {}

    def sample():
        drawn["latents"] = system.sample(cond, request, pipeline.noise_source([1, 2, 3], "cpu"))

    made = {stage.name: stage.made for stage in found.stages}
    assert made["a step"] == pytest.approx(memory.made_by(sample), rel=0.1)
    assert made["the decoding"] == pytest.approx(memory.made_by(lambda: system.decode(drawn["latents"])), rel=0.1)
    assert not any(p.is_meta for p in system.parameters())
    larger = memory.plan(system, replace(request, width=2 * request.width), 3)
    assert larger.peak(False)[0] > 1.2 * found.peak(False)[0] - 0.2 * sum(found.weights.values())


def test_parts_take_turns_where_all_at_once_are_too_much():
    stages = Stage("the words", ("text",), 1), Stage("a step", ("network",), 5), Stage("the decoding", ("vae",), 20)
    plan = Plan({"text": 10, "network": 30, "vae": 2}, stages)
    assert plan.peak(False) == (62, stages[2])
    assert plan.peak(True) == (35, stages[1])
    assert plan.peak(False, recorded=True) == (67, stages[2])  # and what the step made is still there
    system = catalog.build(catalog.entry("icons-tiny").config)
    assert not memory.takes_turns(system, plan, 62)
    assert memory.takes_turns(system, plan, 61)
    assert "not fit" not in memory.offloading(plan, 35, torch.device("cuda"))
    assert "a step, and may not fit either" in memory.offloading(plan, 34, torch.device("cuda"))
    system.stays = True
    assert not memory.takes_turns(system, plan, 61)


def test_a_plan_knows_all_that_takes_part(folders):
    system = pipeline.load(folders["sdxl"], "cpu", refiner=folders["sdxl_refiner"]).system
    request = pipeline.prepare(system, prompt="a red fox", steps=3, control=())
    plan = memory.plan(system, request, 1)
    assert plan.weights["refiner"] == pytest.approx(sum(4 * p.numel() for p in system.refiner.parameters()), rel=0.05)
    assert [stage.name for stage in plan.stages] == ["the words", "a step", "a step of the refiner", "the decoding"]


def test_only_parts_at_work_are_on_the_device(folders):
    """The device is a processor of another name: parts are copied to it, so where they are can be seen."""
    system = pipeline.load(folders["sdxl"], "cpu", refiner=folders["sdxl_refiner"]).system
    told = {"prompt": "a [red:blue:0.5] fox", "seed": 3, "steps": 4, "switch_at": 0.5}
    alone = pipeline.generate(system, **told)[0].image.tobytes()
    both = {"": system, "refiner's ": system.refiner}
    resting = {weight: weight.data_ptr() for one in both.values() for weight in one.parameters()}
    before = [weight.clone() for weight in resting]
    seen = []

    def there(*_):
        seen.append({
            f"{whose}{part}"
            for whose, one in both.items() for part in PARTS
            if any(p.data_ptr() != resting[p] for p in getattr(one, part).parameters())
        })  # fmt: skip

    for one in both.values():
        one.works_on = torch.device("cpu:0")
        for part in PARTS:
            for module in getattr(one, part).children():
                module.register_forward_pre_hook(there)
    assert pipeline.generate(system, **told)[0].image.tobytes() == alone
    order = [next(iter(parts)) for k, parts in enumerate(seen) if not k or parts != seen[k - 1]]
    assert all(len(parts) == 1 for parts in seen)
    assert order[-3:] == ["network", "refiner's network", "autoencoder"]
    assert set(order[:-3]) == {"text_encoder", "refiner's text_encoder"}
    assert [weight.data_ptr() for weight in resting] == list(resting.values())
    assert all(map(torch.equal, resting, before))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_what_a_drawing_asks_once_is_not_there_with_the_rest(name, tmp_path, monkeypatch):
    """Of a network that takes turns the modulations, a third of it, come one by one and leave again."""
    system = pipeline.load(getattr(flow_models, name)(tmp_path), "cpu").system
    told = {"prompt": "a red fox", "seed": 3, "steps": 3, "width": 32, "height": 32}
    alone = pipeline.generate(system, **told)[0].image.tobytes()
    resting = {weight: weight.data_ptr() for weight in system.network.parameters()}
    once = system.network.asked_once()
    passing = {weight for module in once for weight in module.parameters()}
    steps, asked = [], []

    def come():
        return [weight for weight in resting if weight.data_ptr() != resting[weight]]

    def at_a_step(*_):
        steps.append((len(come()) == len(resting) - len(passing), any(weight in passing for weight in come())))

    def when_asked(linear, x):
        if linear.weight in passing:
            (module,) = (one for one in once if linear in one.modules())
            asked.append({weight for weight in come() if weight in passing} == set(module.parameters()))
        return forward(linear, x)

    blocks = system.network.double_blocks if name == "flux" else system.network.joint_blocks
    blocks[0].register_forward_pre_hook(at_a_step)
    system.works_on = torch.device("cpu:0")
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", when_asked)
    assert pipeline.generate(system, **told)[0].image.tobytes() == alone
    assert steps == [(True, False)] * 3
    assert len(asked) >= len([m for m in once if any(isinstance(part, Linear) for part in m.modules())])
    assert all(asked)
    assert [weight.data_ptr() for weight in resting] == list(resting.values())
    assert all("forward" not in vars(module) for module in once)
    request = pipeline.prepare(system, prompt="a red fox", steps=3, width=32, height=32)
    found = memory.plan(system, request, 1)
    sizes = [sum(4 * weight.numel() for weight in module.parameters()) for module in once]
    step = replace(found, stages=tuple(stage for stage in found.stages if stage.name == "a step"))
    assert step.peak(True)[0] == step.stages[0].made + found.weights["network"] - sum(sizes) + max(sizes)


def test_weights_that_adapters_hide_rest_too(tmp_path, monkeypatch):
    """What comes back when an adapter goes is where the others are, in this stand-in of their type."""
    system = pipeline.load(stable_diffusion.sd1(tmp_path / "sd1"), "cpu").system
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = system.network.get_submodule(name).weight.shape[0]
    lora = {"lora_down": torch.randn(2, width), "lora_up": torch.randn(width, 2)}
    spelled = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{spelled}.{part}.weight": t for part, t in lora.items()}, tmp_path / "lora.safetensors")
    stack(system).attach(tmp_path / "lora.safetensors")
    monkeypatch.setattr(DiffusionSystem, "cpu", lambda self: self.to(torch.float64))
    system.offload()
    assert [one.adapter.name for one in system.adapters.on] == ["lora"]
    stack(system).detach()
    assert {weight.dtype for weight in system.parameters()} == {torch.float64}


def test_nothing_takes_turns_on_a_cpu(tiny_model, limner):
    with pytest.raises(UsageError, match="at work on the CPU"):
        pipeline.load(tiny_model, "cpu", offload="always")
    assert limner("fox", "-m", tiny_model, "--device", "cpu", "--offload", "always").code == 2
    assert limner("fox", "-m", tiny_model, "--offload", "sometimes").code == 2


def test_a_dry_run_tells_what_would_be_loaded_and_why(limner, folders, monkeypatch):
    result = limner(
        "generate", "fox", "-m", folders["sdxl"], "--refiner", folders["sdxl_refiner"], "--dry-run", "--json"
    )
    plan = json.loads(result.out)
    assert set(plan["weights_mb"]) == {*PARTS, "refiner"}
    assert plan["offload"] is False
    assert "all parts stay" in plan["memory_why"]
    monkeypatch.setattr(DiffusionSystem, "device", torch.device("cuda"))
    monkeypatch.setattr("limner.memory.free_of", lambda device: 1.0)
    plan = json.loads(limner("generate", "fox", "-m", folders["sdxl"], "--device", "cpu", "--dry-run", "--json").out)
    assert plan["offload"] is True
    assert "take turns there" in plan["memory_why"]
