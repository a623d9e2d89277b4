"""Adapters against the packages that make them, on one weight, where those are: `pip install --no-deps lycoris-lora
toml peft accelerate psutil`. With PEFT diffusers loads adapters itself, as other tests do not expect: run these alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limner.adapters import kinds
from limner.adapters.kinds import Scale

from . import zoo

BASE = {"linear": (20, 24), "blocks": (32, 24), "convolution": (8, 12, 3, 3)}


def layer(shape: tuple[int, ...]) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2], padding=1)
    made.weight.data = torch.randn(shape, generator=generator)
    return made.requires_grad_(False)


def ours(tensors: dict[str, Tensor], module: nn.Module, tmp_path) -> Tensor:
    """The weight with the adapter, as a file of the module alone is read."""
    from safetensors.torch import save_file

    from limner.adapters import files

    save_file({f"lora_unet_it.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "it.safetensors")
    contents = files.contents_of(tmp_path / "it.safetensors")
    keys = {part: key for key, (_, part) in contents.parts.items()}
    entry = files._entry(contents, ("it", None, False), keys)
    assert isinstance(entry.scale, Scale)
    return module.weight + kinds.difference(entry.kind, entry.parts, entry.scale, files.base(module))["weight"]


def lycoris_weight(make: Any, tensors: dict[str, Tensor], module: nn.Module) -> Tensor:
    """By its functions where its modules would scale twice (LoHa), choose other blocks or factors than lie there (OFT,
    LoKr), or do not read their own files (IA3)."""
    functional = pytest.importorskip("lycoris.functional")
    weight, part = module.weight, tensors.get
    if make in (zoo.loha, zoo.loha_core):
        rows = [part(f"hada_{name}") for name in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")]
        scale = tensors["alpha"] / len(tensors["hada_w1_b"])
        return weight + functional.loha.diff_weight(*rows, gamma=scale).view(weight.shape)
    if make in (zoo.lokr, zoo.lokr_factored, zoo.lokr_core):
        rows = [part(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
        low, divisor = [row for row in (rows[2], rows[5]) if row is not None], (rows[1], rows[4])
        if low:  # its function divides by what is the rank but where there is a core
            scale = tensors["alpha"] / len(low[0]) * next(one for one in divisor if one is not None).shape[1]
        return weight + functional.lokr.diff_weight(*rows, gamma=scale if low else 1.0).view(weight.shape)
    if make in (zoo.oft, zoo.oft_bounded, zoo.boft):
        turn = functional.boft if make is zoo.boft else functional.diag_oft
        bound = float(tensors["alpha"]) * len(weight)
        return weight + turn.diff_weight(weight, part("oft_blocks"), part("rescale"), constraint=bound or None)
    modules = pytest.importorskip("lycoris.modules")
    if make is zoo.ia3:
        return modules.ia3._ia3_weight(weight, tensors["weight"], bool(tensors["on_input"]), 1.0, False)
    stored = {f"lora_unet_it.{name}": tensor.clone() for name, tensor in tensors.items()}
    kind, parts = modules.get_module(stored, "lora_unet_it")
    made = modules.make_module(kind, parts, "lora_unet_it", copy.deepcopy(module))
    return made.get_merged_weight(multiplier=1.0, shape=weight.shape)[0]


TURNING = [("blocks", make) for make in (zoo.oft, zoo.oft_bounded, zoo.boft, zoo.ia3)]
MAKERS = [zoo.lora, zoo.dora, zoo.loha, zoo.lokr, zoo.lokr_factored, zoo.glora, zoo.full]
CASES = (
    [("linear", make) for make in MAKERS]
    + TURNING
    + [("convolution", make) for make in (zoo.lora, zoo.loha, zoo.lokr, zoo.lora_core, zoo.loha_core, zoo.lokr_core)]
)


@pytest.mark.parametrize(("shape", "make"), CASES, ids=lambda one: getattr(one, "__name__", one))
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_weight_is_what_lycoris_makes_of_it(shape, make, tmp_path):
    module = layer(BASE[shape])
    tensors = make(module.weight, torch.Generator().manual_seed(1))
    wanted, found = lycoris_weight(make, tensors, module), ours(tensors, module, tmp_path)
    assert (found - module.weight).abs().max() > 0.01
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.filterwarnings("ignore")
def test_a_weight_is_what_peft_makes_of_it(dora, tmp_path):
    peft = pytest.importorskip("peft")
    module = layer(BASE["linear"])
    model = nn.Sequential()
    model.it = layer(BASE["linear"])
    told = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["it"], use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(model, told)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).abs() + 0.1
    state = {k.rpartition("it.")[2]: v.detach() for k, v in peft.get_peft_model_state_dict(model).items()}
    tensors = {name: state[name].clone() for name in state} | {"alpha": torch.tensor(2.0)}
    wanted = model.merge_and_unload().it.weight.detach()
    found = ours(tensors, module, tmp_path)
    assert (found - module.weight).abs().max() > 0.01
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


MADE = [
    ("sd1", "lora", "kohya"), ("sd1", "lora", "diffusers"), ("sd1", "dora", "diffusers"), ("sdxl", "lora", "kohya"),
    ("sdxl", "lora", "diffusers"), ("flux", "lora", "diffusers"), ("sd3", "lora", "diffusers"),
]  # fmt: skip
"""Of FLUX.1 in kohya's names diffusers reads the published size alone."""


@pytest.mark.parametrize(("name", "kind", "spelling"), MADE)
def test_what_is_trained_here_does_in_diffusers_what_it_does_here(name, kind, spelling, tmp_path):
    """The weights of diffusers' network with the adapter merged are ours with it attached."""
    pytest.importorskip("peft")
    import diffusers

    from limner import catalog
    from limner.adapters import trainable
    from limner.adapters.attaching import stack
    from limner.checkpoints import layouts
    from limner.checkpoints.flux import diffusers_layout as of_flux
    from limner.checkpoints.mmdit import diffusers_layout as of_sd3
    from systems import flow_models, stable_diffusion

    makers: dict[str, Any] = {"flux": flow_models.flux, "sd3": flow_models.sd3}
    folder = (makers.get(name) or getattr(stable_diffusion, name))(tmp_path / name)
    system = catalog.load(folder, dtype=torch.float32)
    told: Any = {"kind": kind, "spelling": spelling, "rank": 3, "alpha": 2.0, "bits": 32}
    training = trainable.Training(system, trainable.AdapterConfig(**told), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, part in enumerate(training.parameters()):
            part.add_(0.1 * torch.randn(part.shape, generator=torch.Generator().manual_seed(i)))
    trainable.write(training, tmp_path / "mine.safetensors")
    training.off()
    bare = {key: tensor.clone() for key, tensor in system.network.state_dict().items()}
    stack(system).attach(tmp_path / "mine.safetensors")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "mine.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    theirs = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).state_dict()
    ours = system.network.state_dict()
    if name in makers:
        layout = {"flux": of_flux, "sd3": of_sd3}[name](system.network.config)
        theirs = layouts.read(layout, theirs, "diffusers")
    changed = [key for key in ours if not torch.equal(ours[key], bare[key])]
    assert len(changed) == len(training.named)
    for key in changed:
        difference = (ours[key] - bare[key]).abs().max()
        assert (theirs[key].reshape(ours[key].shape) - ours[key]).abs().max() <= 1e-5 * difference + 1e-6, key
