"""Stable Diffusion 3 and FLUX.1 with quantised weights, end to end: they draw what the expanded weights do, and take no
more memory than their file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.test_gguf import LLAMA
from limner import catalog, exchange, memory, pipeline
from limner.adapters import attaching
from limner.checkpoints import folders, parts, single_files
from limner.devices import bytes_of
from limner.errors import CheckpointMismatch, UsageError
from limner.nn.linear import Linear
from limner.nn.quantized import Quantized
from quantized_files import blocks, fp8, gguf, int8, nf4

from . import flow_models

TOLD = {"seed": 3, "steps": 1, "guidance": 2.0}
GENERATOR = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Model:
    """A folder of diffusers, and its parts in files of their own."""

    folder: Path
    files: dict[str, Path]

    def load(self, network: Path, t5: Path | None = None, **told: Any) -> Any:
        texts = [self.files[name] for name in ("clip_l", "clip_g") if name in self.files]
        return catalog.load(
            network, vae=self.files["autoencoder"], text_encoders=[*texts, t5 or self.files["t5xxl"]], **told
        )


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Model:
    folder = flow_models.flux(tmp_path_factory.mktemp("flux"))
    return Model(folder, flow_models.split_files(folder, tmp_path_factory.mktemp("flux-files")))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Model:
    folder = flow_models.sd3(tmp_path_factory.mktemp("sd3"))
    return Model(folder, flow_models.split_files(folder, tmp_path_factory.mktemp("sd3-files")))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """So that a processor with bfloat16 gives the same."""
    monkeypatch.setattr(catalog, "_multiplies_bf16", lambda: False)


def matrices(tensors: dict[str, Tensor], make: Callable[[str, Tensor], dict[str, Any]]) -> dict[str, Any]:
    """Every matrix of blocks changed, the rest as it is."""
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        made |= make(name, tensor) if tensor.dim() == 2 and name.endswith(".weight") else {name: tensor}
    return made


def of_gguf(kind: str) -> Callable[[str, Tensor], dict[str, Any]]:
    """Random blocks where rows are long enough, as such files have, Q8_0 for shorter ones, else float16."""

    def make(name: str, tensor: Tensor) -> dict[str, Any]:
        width = tensor.shape[1]
        fitting = kind if not width % 256 or not kind.endswith("K") else "Q8_0"
        if width % 32 or "relative" in name or "mod" in name or "_in." in name:
            return {name: tensor.half()}
        return {name: blocks(tuple(tensor.shape), fitting, GENERATOR, scale=2e-4 if kind == "Q8_0" else 1e-3)}

    return make


def write(path: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    """A file in which the matrices of `tensors` are in some quantisation."""
    if kind.startswith("Q"):
        return gguf(path.with_suffix(".gguf"), matrices(tensors, of_gguf(kind)), general__architecture="flux")
    makers: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {
        "fp8": lambda name, t: fp8(name, t, "plain"),
        "fp8 scaled": lambda name, t: fp8(name, t, "scaled"),
        "fp8 weight_scale": lambda name, t: fp8(name, t, "weight_scale"),
        "int8": int8,
        "nf4 nested": lambda name, t: nf4(name, t, nested=True, size=32),
    }
    stored = matrices(tensors, makers[kind])
    if kind == "fp8 scaled":
        stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    if kind == "fp8":
        stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    return path


def latents(system: Any, monkeypatch) -> Tensor:
    seen: list[Tensor] = []
    decode = system.decode
    with monkeypatch.context() as patch:
        patch.setattr(system, "decode", lambda latents, tile: (seen.append(latents), decode(latents, tile))[1])
        pipeline.generate(system, "a red fox", width=32, height=32, **TOLD)
    return seen[0]


def codes(module: Any) -> set[str]:
    return {layer.code for layer in module.modules() if isinstance(layer, Linear)}


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("fp8", {"e4m3"}), ("fp8 scaled", {"e4m3"}), ("fp8 weight_scale", {"e4m3"}), ("int8", {"int8"}),
        ("nf4 nested", {"nf4"}), ("Q8_0", {"Q8_0", ""}), ("Q4_K", {"Q4_K", ""}),
    ],
)  # fmt: skip
def test_flux_draws_what_its_expanded_weights_do(flux, kind, kept, tmp_path, monkeypatch):
    system = flux.load(write(tmp_path / "flux.safetensors", kind, load_file(flux.files["network"])))
    assert codes(system.network) == kept
    assert codes(system.text_encoder) == {""}
    made = latents(system, monkeypatch)
    for layer in system.modules():
        if isinstance(layer, Linear) and layer.code:
            layer.weight = torch.nn.Parameter(layer.quantized.whole(), requires_grad=False)
    expected = latents(system, monkeypatch)
    assert expected.isfinite().all()
    assert expected.std() > 0
    assert (made - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["fp8 scaled", "Q5_1"])
def test_so_does_stable_diffusion_3_with_a_small_t5(sd3, kind, tmp_path, monkeypatch):
    network = write(tmp_path / "sd3.safetensors", kind, load_file(sd3.files["network"]))
    five = load_file(sd3.files["t5xxl"])
    if kind.startswith("Q"):
        names = dict(LLAMA)
        names |= {n.replace("k.0.", "k.1.", 1): t.replace("k.0.", "k.1.", 1) for n, t in LLAMA.items()}
        five = {names[name]: tensor for name, tensor in five.items()}
    t5 = write(tmp_path / "t5.safetensors", kind, five)
    small, wide = sd3.load(network, t5), sd3.load(network, t5, dtype=torch.float32)
    assert codes(small.text_encoder) - {""} == codes(small.network) - {""} != set()
    made, expected = latents(small, monkeypatch), latents(wide, monkeypatch)
    assert (made - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert "weights in" in pipeline.computes(small)
    assert "weights in" not in pipeline.computes(wide)


def test_all_in_one_file_stays_small_too(flux, tmp_path, monkeypatch):
    whole = load_file(flow_models.one_file(flux.folder, tmp_path / "whole.safetensors"))
    stored = {name: t if "first_stage" in name else t.to(torch.float8_e4m3fn) for name, t in whole.items()}
    save_file(stored, tmp_path / "fp8.safetensors")
    small = catalog.load(tmp_path / "fp8.safetensors")
    wide = catalog.load(tmp_path / "fp8.safetensors", dtype=torch.float32)
    assert codes(small.network) | codes(small.text_encoder.t5xxl) == {"e4m3"}
    expected = latents(wide, monkeypatch)
    assert (latents(small, monkeypatch) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_folder_of_bitsandbytes_joins_rows_of_what_is_quantised(flux, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(flux.folder, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    stored = matrices(load_file(file), lambda name, t: nf4(name, t, nested=True, size=32))
    save_file({name: t.contiguous() for name, t in stored.items()}, file)
    small, wide = catalog.load(folder), catalog.load(folder, dtype=torch.float32)
    assert codes(small.network) == {"nf4"}
    expected = latents(wide, monkeypatch)
    assert (latents(small, monkeypatch) - expected).abs().max() <= 1e-6 * expected.abs().max()


# ------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["fp8", "fp8 scaled", "int8", "nf4 nested", "Q8_0", "Q4_K", "Q2_K"])
def test_t5_takes_the_memory_of_its_file(kind, flux, tmp_path):
    """But for its table of words, which a real one has little of. All that is no matrix is in half precision."""
    tensors = {n: t.bfloat16() for n, t in load_file(flux.files["t5xxl"]).items()}
    table = tensors["shared.weight"]
    path = write(tmp_path / "t5.safetensors", kind, tensors)
    encoder = flux.load(flux.files["network"], path, dtype=None).text_encoder.t5xxl.bfloat16()
    stored = parts.read(path)["shared.weight"]
    held = stored.codes.numel() if isinstance(stored, Quantized) else stored.numel() * stored.itemsize
    assert bytes_of(encoder) - 2 * table.numel() <= 1.1 * (path.stat().st_size - held)


def test_memory_counts_bytes_as_they_are_kept(flux, tmp_path):
    path = write(tmp_path / "flux.safetensors", "fp8 scaled", load_file(flux.files["network"]))
    small, wide = flux.load(path), flux.load(path, dtype=torch.float32)
    request = pipeline.prepare(small, prompt="fox", width=32, height=32)
    bytes_small, bytes_wide = (memory.weights_of(system, request)["network"] for system in (small, wide))
    assert bytes_small < 0.35 * bytes_wide  # of single precision, but for biases and narrow matrices
    assert bytes_small == bytes_of(small.network)
    planned = memory.plan(small, request, 1)
    assert planned.weights["network"] == bytes_small
    assert all(stage.made > 0 for stage in planned.stages)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8 scaled", "nf4 nested", "Q4_K"])
def test_on_a_gpu_parts_take_turns_and_steps_are_recorded(flux, kind, tmp_path, monkeypatch):
    path = write(tmp_path / "flux.safetensors", kind, load_file(flux.files["network"]))
    system = flux.load(path, device="cuda")
    system.graphs.on = False
    monkeypatch.setattr(memory, "settle", lambda *told: "")
    expected = latents(system, monkeypatch)
    system.graphs.on = True
    assert torch.equal(latents(system, monkeypatch), expected)
    assert torch.equal(latents(system, monkeypatch), expected)
    assert system.graphs.made
    system.offload()
    assert all(buffer.device.type == "cpu" for buffer in system.network.buffers())
    assert torch.equal(latents(system, monkeypatch), expected)


def test_widening_leaves_what_is_kept(flux, tmp_path):
    path = write(tmp_path / "flux.safetensors", "int8", load_file(flux.files["network"]))
    system = flux.load(path)
    system.network.bfloat16()
    layer = system.network.single_blocks[0].linear1
    before = layer.quantized.whole()
    assert system.widen()
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.quantized.whole(), before)


def test_a_model_of_any_file_may_be_kept_in_fp8(flux, monkeypatch, limner, tmp_path):
    wide, small = (pipeline.load(flux.folder, "cpu", dtype=dtype).system for dtype in ("fp32", "fp8"))
    assert codes(small.network) - {""} == codes(small.text_encoder) - {""} == {"e4m3"}
    assert bytes_of(small.network) < 0.35 * bytes_of(wide.network)
    assert "weights in e4m3" in pipeline.computes(small)
    expected = latents(wide, monkeypatch)
    error = (latents(small, monkeypatch) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    size = ["-W", 32, "-H", 32, "--steps", 1]
    done = limner("a red fox", "-m", flux.folder, "--dtype", "fp8", *size, "-o", tmp_path / "a.png")
    assert done.code == 0, done.err


# ----------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_an_adapter_changes_quantised_weights_without_loss_and_comes_off_again(kind, tmp_path, sd1_folder):
    """One of low rank stays beside the codes, which another kind has expanded."""
    stored = single_files.export(folders.recognise(sd1_folder))
    unet = "model.diffusion_model."
    small = {n: t.to(torch.float8_e4m3fn) if n.startswith(unet) else t for n, t in stored.items()}
    save_file({name: t.contiguous() for name, t in small.items()}, tmp_path / "sd1.safetensors")
    system, wide = (
        catalog.load(tmp_path / "sd1.safetensors"),
        catalog.load(tmp_path / "sd1.safetensors", dtype=torch.float32),
    )
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, plain = system.network.get_submodule(name), wide.network.get_submodule(name)
    assert layer.code == "e4m3"
    out, width = plain.weight.shape
    if kind == "LoRA":
        made = {"lora_down.weight": torch.randn(4, width), "lora_up.weight": torch.randn(out, 4)}
    else:
        made = {f"hada_w{n}_{m}": torch.randn(*((out, 4) if m == "a" else (4, width))) for n in "12" for m in "ab"}
    spelled = "lora_unet_" + name.replace(".", "_")
    save_file({f"{spelled}.{part}": t for part, t in made.items()}, tmp_path / "lora.safetensors")
    x = torch.randn(3, width)
    with torch.no_grad():
        before = layer(x)
        reports = [attaching.stack(one).attach(tmp_path / "lora.safetensors", 0.7) for one in (system, wide)]
        assert str(reports[0]) == str(reports[1])
        if kind == "LoRA":
            assert layer.weight is None
            torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(layer.weight, plain.weight)
            assert torch.equal(layer(x), plain(x))
        assert not torch.allclose(layer(x), before)
        bare = system.adapters.bare("network")
        assert torch.equal(bare[f"{name}.weight"], wide.adapters.bare("network")[f"{name}.weight"])
        assert bare.keys() == wide.network.state_dict().keys()
        attaching.stack(system).detach()
        assert layer.weight is None
        assert torch.equal(layer(x), before)


def test_adapters_of_low_rank_stand_beside_the_rows_they_are_for(flux, tmp_path, monkeypatch):
    """Two LoRAs, one of a part of a fused matrix and one of all of it, of other ranks, weights and orders."""
    path = write(tmp_path / "flux.safetensors", "nf4 nested", load_file(flux.files["network"]))
    small, wide = flux.load(path), flux.load(path, dtype=torch.float32)
    out, width = small.network.double_blocks[0].img_attn.qkv.codes.shape[0], 256
    third = "transformer.transformer_blocks.0.attn.to_k.lora_{}.weight"
    whole = "lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight"
    save_file({third.format("A"): torch.randn(3, width), third.format("B"): torch.randn(out // 3, 3)},
              tmp_path / "third.safetensors")  # fmt: skip
    save_file({whole.format("down"): torch.randn(5, width), whole.format("up"): torch.randn(out, 5)},
              tmp_path / "whole.safetensors")  # fmt: skip
    plain = latents(small, monkeypatch)
    before = bytes_of(small.network)
    for system in (small, wide):
        attaching.stack(system).attach(tmp_path / "third.safetensors", 0.05)
        attaching.stack(system).attach(tmp_path / "whole.safetensors", -0.02)
    assert codes(small.network) == {"nf4"}
    assert bytes_of(small.network) - before == 4 * (3 + 5) * (out + width)
    made, expected = latents(small, monkeypatch), latents(wide, monkeypatch)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (made - plain).abs().max() > 1e-2 * plain.abs().max()
    attaching.stack(small).detach("third")
    attaching.stack(wide).detach("third")
    made, expected = latents(small, monkeypatch), latents(wide, monkeypatch)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    attaching.stack(small).detach()
    assert torch.equal(latents(small, monkeypatch), plain)
    assert bytes_of(small.network) == before


# ------------------------------------------------------- what is said of them


@pytest.mark.parametrize(("kind", "precision"), [("fp8 scaled", "e4m3"), ("nf4 nested", "nf4"), ("Q4_K", "Q4_K")])
def test_inspect_knows_them(flux, kind, precision, tmp_path):
    path = write(tmp_path / "flux.safetensors", kind, load_file(flux.files["network"]))
    told = exchange.inspect(path)
    assert precision in told["precision"].split(", ")
    assert told["kind"] == "network of FLUX.1"
    assert "--vae" in told["problem"]


def test_inspect_names_what_is_not_read_and_loading_refuses_it(tmp_path):
    names = ("qweight", "wscales", "smooth_factor")
    save_file({f"transformer_blocks.0.qkv_proj.{n}": torch.ones(2) for n in names}, tmp_path / "svdq.safetensors")
    told = exchange.inspect(tmp_path / "svdq.safetensors")
    assert "SVDQuant (nunchaku)" in told["problem"]
    with pytest.raises(CheckpointMismatch, match="quantised as SVDQuant"):
        catalog.load(tmp_path / "svdq.safetensors")


def test_a_quantised_model_is_not_converted(flux, tmp_path):
    folder = flow_models.one_file(flux.folder, tmp_path / "whole.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder).items():
        quantised = "single_blocks.0.linear1.weight" in name
        stored |= fp8(name, tensor, "scaled") if quantised else {name: tensor}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is quantised"):
        exchange.convert(tmp_path / "model.safetensors", tmp_path / "new.safetensors")
