"""Control-LoRAs of FLUX.1 (Canny, Depth): what diffusers draws with a network that was widened by hand, and with its
own loader of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limner import catalog, exchange, metadata, pipeline
from limner.adapters import files
from limner.adapters.attaching import stack
from limner.adapters.names import spellings
from limner.checkpoints import flux
from limner.errors import Assumed, CheckpointMismatch, UsageError
from limner.nn.linear import Linear
from limner.nn.quantized import of_bytes
from systems import flow_models
from systems.test_flow_models import drawn, expected, some_picture

from . import zoo

CANNY = "flux1-canny-dev-lora.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return flow_models.flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def kept(folder) -> Any:
    return catalog.load(folder, dtype=torch.float32)


@pytest.fixture
def system(kept) -> Iterator[Any]:
    yield kept
    stack(kept).detach()


@pytest.fixture(scope="module")
def stored(kept, tmp_path_factory) -> dict[str, Path]:
    """A file in the names of Black Forest Labs, and the same in those of diffusers."""
    out = tmp_path_factory.mktemp("loras")
    network, own = kept.network, published(kept.network)
    layout = flux.diffusers_layout(network.config)
    theirs = {}
    for key, tensor in own.items():
        module, _, kind = key.partition(".lora_")
        if not kind:
            theirs[f"transformer.{layout[key].name}"] = tensor
            continue
        place, end = layout[f"{module}.weight"], 0
        for i, name in enumerate(place.names):
            rows = tensor
            if kind != "A.weight" and place.then:
                rows = tensor[end : (end := end + place.rows[i])]
            elif kind != "A.weight" and place.kept == "swapped":
                rows = torch.cat(tensor.chunk(2)[::-1])
            theirs[f"transformer.{name.removesuffix('.weight')}.lora_{kind}"] = rows.clone()
    made = {}
    for spelling, tensors in (("bfl", own), ("diffusers", theirs)):
        made[spelling] = out / spelling / CANNY
        made[spelling].parent.mkdir()
        save_file(tensors, made[spelling])
    return made


def published(network: nn.Module, rank: int = 5) -> dict[str, Tensor]:
    """A control-LoRA for a network, in its own names."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            into = 2 * module.in_features if name == "img_in" else module.in_features
            tensors[f"{name}.lora_A.weight"] = zoo.noise(draw, rank, into) / into**0.5
            tensors[f"{name}.lora_B.weight"] = zoo.noise(draw, module.out_features, rank)
            tensors[f"{name}.lora_B.bias"] = zoo.noise(draw, module.out_features)
        elif hasattr(module, "scale"):
            tensors[f"{name}.scale"] = 1 + zoo.noise(draw, len(module.scale))
    return tensors


@pytest.fixture(scope="module")
def theirs(folder) -> Callable[..., Any]:
    """diffusers' pipeline, with a network whose weights were changed by hand."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    parts = lru_cache(lambda: diffusers.FluxControlPipeline.from_pretrained(folder).components)

    def made(*adapters: dict[str, Tensor]) -> Any:
        wide = flow_models.flux_transformer(True, 128)
        own = {key: tensor.clone() for key, tensor in parts()["transformer"].state_dict().items()}
        own["x_embedder.weight"] = nn.functional.pad(own["x_embedder.weight"], (0, 64))
        for tensors in adapters:
            for key, tensor in tensors.items():
                module, _, kind = key.removeprefix("transformer.").partition(".lora_")
                if kind == "A.weight":
                    delta = tensors[key.replace("lora_A", "lora_B")] @ tensor
                    own[f"{module}.weight"][:, : delta.shape[1]] += delta
                elif kind == "B.bias":
                    own[f"{module}.bias"] += tensor
                elif not kind:
                    own[module] = tensor
        wide.load_state_dict(own)
        pipe = diffusers.FluxControlPipeline(**parts() | {"transformer": wide})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


def followed(pipe: Any, **told: Any) -> Tensor:
    """The latents that it draws after a picture, of whose latents it takes the mean."""
    with pytest.MonkeyPatch.context() as patch:
        kind = type(pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist)
        patch.setattr(kind, "sample", lambda self, generator=None: self.mode())
        return expected(pipe, control_image=some_picture(), **{"num_inference_steps": 2} | told)[0]


def ours(system: Any, steps: int = 2) -> Tensor:
    return drawn(system, image=some_picture(), steps=steps)[0]


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


@pytest.fixture(scope="module")
def wanted(theirs, stored) -> Tensor:
    return followed(theirs(of_file(stored["diffusers"])))


def of_file(path: Path) -> dict[str, Tensor]:
    return dict(files.contents_of(path).tensors)


# ------------------------------------------------------------------- drawing


@pytest.mark.parametrize("spelling", ["bfl", "diffusers"])
def test_it_draws_what_diffusers_draws(system, stored, wanted, spelling):
    report = stack(system).attach(stored[spelling])
    assert (report.matched, report.ranks, report.assumed) == (report.total, (5,), ())
    assert near(ours(system), wanted)


def test_diffusers_own_loader_of_it_draws_the_same(system, stored, folder):
    pytest.importorskip("peft")
    import diffusers

    pipe = diffusers.FluxControlPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(stored["diffusers"])
    stack(system).attach(stored["bfl"])
    assert near(ours(system), followed(pipe))


def test_ordinary_loras_go_with_it_in_any_order(system, stored, theirs, tmp_path):
    """One of them changes the input too, in the width that the network has without it."""
    draw = torch.Generator().manual_seed(4)
    rows = {"transformer.x_embedder": (256, 64), "transformer.transformer_blocks.1.attn.to_k": (256, 256)}
    style = {}
    for name, (out, into) in rows.items():
        style |= {f"{name}.lora_A.weight": zoo.noise(draw, 3, into), f"{name}.lora_B.weight": zoo.noise(draw, out, 3)}
    save_file(style, tmp_path / "style.safetensors")
    wanted = followed(theirs(of_file(stored["diffusers"]), style), num_inference_steps=1)
    for order in ((stored["bfl"], tmp_path / "style.safetensors"), (tmp_path / "style.safetensors", stored["bfl"])):
        for path in order:
            stack(system).attach(path)
        assert near(ours(system, steps=1), wanted)
        stack(system).detach("flux1-canny-dev-lora")
        assert system.sees == ""
        assert system.network.img_in.weight.shape == (256, 64)
        stack(system).detach()


def test_taken_off_it_leaves_the_system_as_it_was(system, stored):
    own = dict(system.named_parameters())
    looks = (system.network.config, system.defaults, system.network.img_in.in_features, system.beside, system.sees)
    stack(system).attach(stored["bfl"], 0.5)
    assert (system.sees, system.beside) == ("hint", 16)
    assert [getattr(system.defaults, name) for name in ("strength", "steps", "guidance")] == [1.0, 50, 30.0]
    assert (system.network.img_in.weight.shape, system.network.img_in.in_features) == ((256, 128), 128)
    stack(system).detach()
    assert all(parameter is own[key] for key, parameter in system.named_parameters())
    after = (system.network.config, system.defaults, system.network.img_in.in_features, system.beside, system.sees)
    assert all(new is old for new, old in zip(after[:2], looks[:2], strict=True))
    assert after == looks


def test_half_of_it_is_half_of_every_difference(system, stored):
    tensors, own = of_file(stored["bfl"]), {k: p.detach().clone() for k, p in system.network.named_parameters()}
    stack(system).attach(stored["bfl"], 0.5)
    new = dict(system.network.named_parameters())
    name = "double_blocks.0.txt_attn.norm.key_norm.scale"
    torch.testing.assert_close(new[name].data, (own[name] + tensors[name]) / 2)
    wide = nn.functional.pad(own["img_in.weight"], (0, 64))
    wanted = wide + tensors["img_in.lora_B.weight"] @ tensors["img_in.lora_A.weight"] / 2
    torch.testing.assert_close(new["img_in.weight"].data, wanted)
    torch.testing.assert_close(new["img_in.bias"].data, own["img_in.bias"] + tensors["img_in.lora_B.bias"] / 2)


def test_by_weight_0_nothing_is_seen(system, stored):
    assert stack(system).attach(stored["bfl"], 0.0).ignored(0.0)
    assert (system.sees, system.network.img_in.weight.shape) == ("", (256, 64))


def test_quantised_weights_take_it_as_their_expanded_ones_do(folder, stored):
    small, tensors = catalog.load(folder, dtype=torch.float32), of_file(stored["bfl"])
    linears = {name: one for name, one in small.network.named_modules() if isinstance(one, Linear)}
    for one in linears.values():
        one.keep(of_bytes(one.weight.to(torch.float8_e4m3fn)))
    before = {name: one.bias.data.clone() for name, one in linears.items()}
    stack(small).attach(stored["bfl"])
    for name, one in linears.items():
        down, up, bias = (tensors[f"{name}.lora_{part}"] for part in ("A.weight", "B.weight", "B.bias"))
        wanted = one.quantized.whole()
        if name == "img_in":
            wanted = nn.functional.pad(wanted, (0, 64)) + up @ down
            torch.testing.assert_close(one.weight.data, wanted)
            continue
        x = torch.randn(3, wanted.shape[1])
        with torch.no_grad():
            assert one.weight is None
            torch.testing.assert_close(one(x), x @ (wanted + up @ down).T + before[name] + bias, rtol=1e-4, atol=1e-4)
    assert (small.sees, ours(small, steps=1).isfinite().all()) == ("hint", True)
    stack(small).detach()
    assert small.sees == ""
    assert all(one.weight is None and torch.equal(one.bias, before[name]) for name, one in linears.items())


# ------------------------------------------------------------------- names, and what is refused


def test_depth_is_told_by_its_name_and_what_is_no_name_is_said(system, stored, tmp_path):
    for name, guidance in (("flux1-depth-dev-lora", 10.0), ("flux1-canny-dev-lora", 30.0), ("mine", 30.0)):
        (tmp_path / f"{name}.safetensors").write_bytes(stored["bfl"].read_bytes())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", Assumed)
            pipeline.Pipeline(system, "dev").attach(tmp_path / f"{name}.safetensors")
        said = ["no name of a tensor tells FLUX.1 Canny from Depth: it is taken for Canny, guidance 30"]
        assert [str(one.message).partition(": ")[2] for one in told] == (said if name == "mine" else [])
        assert system.defaults.guidance == guidance
        stack(system).detach()


def test_a_control_that_would_see_nothing_is_refused(system, stored):
    with pytest.raises(UsageError, match="sees its picture through img_in, whose weight is 0"):
        stack(system).attach(stored["bfl"], 1.0, {"img_in": 0.0})
    assert system.sees == ""


def test_the_published_names_are_read_whole(tmp_path, monkeypatch):
    """Those of the released size, as they are published and as diffusers converts them."""
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers as converted

    dev = files.bare("flux-dev")
    with torch.device("meta"):
        tensors = {}
        for name, module in dev.network.named_modules():
            if isinstance(module, nn.Linear):
                into = 128 if name == "img_in" else module.in_features
                shapes = {
                    "A.weight": (128, into),
                    "B.weight": (module.out_features, 128),
                    "B.bias": (len(module.bias),),
                }
                tensors |= {f"{name}.lora_{end}": torch.empty(shape) for end, shape in shapes.items()}
            elif hasattr(module, "scale"):
                tensors[f"{name}.scale"] = torch.empty(128)
        assert len(tensors) == 1094
        theirs = converted(dict(tensors))
    monkeypatch.setattr(files, "digest", lambda path: "")
    adapter, misfit = files.survey(files.Contents(tmp_path, theirs), dev)
    assert (misfit, adapter.unknown, adapter.widens) == ("", (), True)
    own, table = files.Contents(tmp_path, tensors), spellings(dev)
    assert {table[spelling].module for spelling, _ in own.parts.values()} == adapter.entries.keys()


def test_without_a_picture_it_draws_nothing(system, stored):
    stack(system).attach(stored["bfl"])
    with pytest.raises(UsageError, match="flux-dev follows edges or depth of a picture, but none was given: add -i"):
        drawn(system)
    with pytest.raises(UsageError, match=r"flux-dev looks at a picture and does not paint .* leave strength out"):
        drawn(system, image=some_picture(), strength=0.5)


def test_one_is_enough_and_neither_refiner_nor_guide_sees_what_it_shows(system, stored, tmp_path):
    other = tmp_path / "flux1-canny-two.safetensors"
    other.write_bytes(stored["bfl"].read_bytes())
    for does in ("refiner", "guide"):
        system.__dict__[does] = system
        with pytest.raises(UsageError, match=f"which its {does} does not: leave the {does} out"):
            stack(system).attach(other)
        del system.__dict__[does]
    stack(system).attach(stored["bfl"])
    with pytest.raises(UsageError, match="two and flux1-canny-dev-lora are both control-LoRAs"):
        stack(system).attach(other)


@pytest.mark.parametrize(
    ("own", "spell"),
    [
        ("sd1", "img_in.lora_{}.weight"), ("flux-schnell", "img_in.lora_{}.weight"),
        ("flux-kontext", "transformer.x_embedder.lora_{}.weight"), ("flux-control", "img_in.lora_{}.weight"),
    ],
)  # fmt: skip
def test_it_is_for_flux_dev_alone(own, spell, tmp_path):
    tensors = {spell.format("A"): torch.ones(128, 128), spell.format("B"): torch.ones(3072, 128)}
    tensors |= {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(128)}
    save_file(tensors, tmp_path / CANNY)
    with pytest.raises(CheckpointMismatch) as caught:
        files.read(tmp_path / CANNY, meta(own))
    assert str(caught.value).endswith(
        f"{CANNY} is a control-LoRA of FLUX.1 (Canny or Depth), with which the network sees a picture beside the "
        f"latents: that is for FLUX.1 dev, not for {own}"
    )


def test_inspect_knows_it_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BASES", ("flux-dev", "dit"))
    save_file(
        {"img_in.lora_A.weight": torch.ones(8, 128), "img_in.lora_B.weight": torch.ones(3072, 8)}, tmp_path / CANNY
    )
    told = exchange.inspect(tmp_path / CANNY)
    assert (told["kind"], told["base"], told["assumed"]) == ("control-LoRA of FLUX.1", ["flux-dev"], [])
    assert told["sees"] == exchange.SEES["hint"]


@lru_cache
def meta(name: str) -> Any:
    with torch.device("meta"):
        return catalog.build(catalog.entry(name).config)


def test_on_the_command_line(folder, stored, limner, here):
    some_picture().save(here / "edges.png")
    told = ("-W", 32, "-H", 32, "--steps", 1, "-s", 3, "-m", folder, "a red fox")
    done = limner("generate", *told, "--lora", stored["bfl"], "-i", "edges.png", "-o", "a.png")
    assert (done.code, done.out) == (0, "a.png\n"), done
    settings = metadata.read_settings(here / "a.png")
    assert [settings[k] for k in ("model", "guidance", "strength")] == ["flux-dev", 30.0, 1.0]
    assert [one["name"] for one in settings["adapters"]] == ["flux1-canny-dev-lora"]
    done = limner("generate", *told, "--lora", stored["bfl"], "-o", "c.png")
    assert (done.code, "but none was given: add -i" in done.err) == (2, True), done
