"""Files of DDPM, Improved DDPM and ADM: folders against diffusers, files against numbers that their authors' programs
gave."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from limner import catalog, exchange, pipeline
from limner.checkpoints import pixels
from limner.checkpoints.layouts import write
from limner.checkpoints.unet import ddpm_layout, ldm_layout, old_diffusers_layout
from limner.errors import Assumed, CheckpointMismatch, FileProblem, LimnerError, UsageError
from limner.models import unet
from limner.models.unet import UNet, UNetConfig
from limner.types import Conditioning
from parity import difference

from .stable_diffusion import noised

SMALL = {  # in diffusers' words, the network of google/ddpm-cifar10-32, narrow
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
DDPM = replace(unet.DDPM_CIFAR, widths=(32, 64), num_blocks=1, depths=(0, 1), dropout=0.0)
ADM = UNetConfig(
    in_channels=3, out_channels=6, widths=(64, 64, 128), num_blocks=1, depths=(0, 0, 1), head_width=64,
    scale_shift=True, resample="block",
)  # fmt: skip
CLASSES = replace(ADM, widths=(64, 128), depths=(0, 1), num_classes=10)
IMPROVED = replace(ADM, widths=(32, 64), depths=(0, 1), num_heads=4, head_width=0, resample="conv", time_scale=0.25)


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights that any program can make again: no norm at one and no bias at zero."""
    count = torch.Size(shape).numel()
    value = torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5 + zlib.crc32(name.encode()) % 1000).reshape(shape)
    if len(shape) > 1:
        return (value * (2 / value[0].numel()) ** 0.5).float()
    return (0.2 * value + name.endswith("weight")).float()


def contents(config: UNetConfig, layout: Any) -> dict[str, Tensor]:
    """Of a file of such a network."""
    with torch.device("meta"):
        ours = UNet(config).state_dict()
    return {name: formula(name, tuple(tensor.shape)) for name, tensor in write(layout(config), ours).items()}


@pytest.mark.parametrize(
    ("config", "layout", "label", "golden"),
    [  # every seventh part of what guided_diffusion, improved_diffusion and DDIM's repository make of the formula
        pytest.param(
            ADM, ldm_layout, None,
            (0.055253, -0.191678, 0.064681, 0.57957, 0.835604, 0.310866, 0.459789, -0.860771),
            id="ADM, its later order of attention",
        ),
        pytest.param(
            CLASSES, ldm_layout, 7,
            (-0.169081, 0.698924, -0.378443, 0.030015, 0.573511, 0.898473, -0.427284, 0.69925),
            id="ADM, told a class",
        ),
        pytest.param(
            IMPROVED, ldm_layout, None,
            (-0.175427, 0.280337, -0.340043, 0.3286, 0.234874, 0.191944, 0.028311, -0.110559),
            id="Improved DDPM, told a quarter of its time",
        ),
        pytest.param(
            DDPM, ddpm_layout, None,
            (-0.011293, 0.097174, -0.180035, -0.915822, 0.434818, -0.114394, 1.546915, -0.27028),
            id="DDPM",
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_file_computes_what_its_authors_program_computes(config, layout, label, golden, here):
    save_file(contents(config, layout), "model.safetensors")
    with pytest.warns(Assumed, match="no name of a tensor tells"):
        system: Any = catalog.load("model.safetensors")
    assert system.network.config == config
    cond = Conditioning(labels=None if label is None else torch.tensor([label]))
    output = system.network(formula("x", (1, 3, 8, 8)), torch.tensor([123.0]), cond).flatten()
    assert difference(output[:: len(output) // 7], torch.tensor(golden)) <= 1e-5


@torch.no_grad()
def test_a_file_of_ddpm_is_the_network_that_diffusers_has(here):
    theirs: Any = noised(diffusers.UNet2DModel(**SMALL), seed=1)
    save_file(write(ddpm_layout(DDPM), theirs.state_dict()), "model.safetensors")
    x, t = formula("x", (2, 3, 8, 8)).double(), torch.tensor([999, 3])
    with pytest.warns(Assumed):
        system: Any = catalog.load("model.safetensors")
    assert difference(system.network.double()(x, t, Conditioning()), theirs.double()(x, t).sample) <= 1e-10


@pytest.mark.parametrize(
    ("name", "layout", "size", "steps", "betas"),
    [
        ("DDPM_CIFAR", ddpm_layout, 32, 1000, "linear"),
        ("DDPM_256", ddpm_layout, 256, 1000, "linear"),
        ("IDDPM_CIFAR", ldm_layout, 32, 4000, "cosine"),
        ("IDDPM_64", ldm_layout, 64, 4000, "cosine"),
        ("ADM_64", ldm_layout, 64, 1000, "cosine"),
        ("ADM_128", ldm_layout, 128, 1000, "linear"),
        ("ADM_256", ldm_layout, 256, 1000, "linear"),
    ],
)
def test_published_networks_are_known_by_names_and_shapes(name, layout, size, steps, betas):
    config = replace(getattr(unet, name), dropout=0.0)
    with torch.device("meta"):
        tensors = write(layout(config), UNet(config).state_dict())
    found = pixels.recognise(Path("model.pt"), tensors)
    assert found is not None
    assert found.network == replace(config, time_scale=0.25 if steps == 4000 else 1.0)
    assert (found.size, found.noise.steps, found.noise.betas) == (size, steps, betas)
    assert catalog.fitted(found).defaults.width == size
    later = {place.heads for place in found.layout.values() if place.parts == 3} == {1}
    assert later == (name == "ADM_64")


def test_the_other_published_networks_of_improved_ddpm():
    """That of classes is told all of its time; that of LSUN has one head, and linear betas."""
    classes = replace(unet.IDDPM_64, widths=(192, 384, 576, 768), num_classes=1000)
    bedrooms = replace(
        unet.IDDPM_CIFAR, widths=unet.DDPM_256.widths, num_blocks=2, depths=unet.DDPM_256.depths, scale_shift=False,
        num_heads=1, dropout=0.0,
    )  # fmt: skip
    for config, told in ((classes, (64, 4000, "cosine")), (bedrooms, (256, 1000, "linear"))):
        with torch.device("meta"):
            tensors = write(ldm_layout(config), UNet(config).state_dict())
        found = pixels.recognise(Path("model.pt"), tensors)
        assert found is not None
        assert found.network == config
        assert (found.size, found.noise.steps, found.noise.betas) == told


def test_what_a_training_saved_is_read_and_its_average_taken(here):
    average = contents(DDPM, ddpm_layout)
    weights = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in average.items()}
    optimizer = {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save([weights, optimizer, 3, 790_000, average], "ckpt.pth")
    torch.save([weights, optimizer, 3, 790_000], "ckpt.ckpt")
    for file, mean in (("ckpt.pth", average["conv_in.weight"].mean()), ("ckpt.ckpt", torch.tensor(0.0))):
        with pytest.warns(Assumed):
            assert torch.equal(catalog.load(file).network.conv_in.weight.mean(), mean)  # type: ignore[union-attr]
    torch.save([{"x": torch.zeros(2, 2).to_sparse()}, optimizer, 3, 4], "sparse.ckpt")
    with pytest.raises(FileProblem, match="x is sparse"):
        catalog.load("sparse.ckpt")


def test_an_adm_without_a_variance_may_be_a_consistency_model_which_is_said():
    found = [pixels.recognise(Path("m.pt"), contents(replace(ADM, out_channels=n), ldm_layout)) for n in (3, 6)]
    assert [pixels.THREE in one.assumed for one in found if one is not None] == [True, False]


# -------------------------------------------------------------------- folders of diffusers


def folder_of(path: Path, kind: str = "DDIM", classes: int | None = None, **scheduler: Any) -> Path:
    network = noised(diffusers.UNet2DModel(**SMALL, num_class_embeds=classes), seed=1)
    told = {"clip_sample": False} | scheduler
    walk = getattr(diffusers, f"{kind}Scheduler")(**told)
    getattr(diffusers, f"{kind}Pipeline")(network, walk).save_pretrained(path)
    saved = {"_class_name": f"{kind}Scheduler", "num_train_timesteps": 1000} | told  # DDIMPipeline makes it DDIM's
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(saved))
    return path


def at_the_root(folder: Path) -> Path:
    """As the first that were published: flat, pickled, in the names of then."""
    ours = UNet(DDPM).state_dict()
    theirs: Any = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    tensors = write(old_diffusers_layout(DDPM), {name: theirs.state_dict()[name] for name in ours})
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    config = json.loads((folder / "unet" / "config.json").read_text())
    early = {"act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "down_block_types",
             "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block",
             "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "sample_size",
             "time_embedding_type", "up_block_types", "_class_name"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in early}))
    shutil.move(folder / "scheduler" / "scheduler_config.json", folder)
    for part in ("unet", "scheduler"):
        shutil.rmtree(folder / part)
    return folder


def drawn(system: Any, monkeypatch, prompt: str = "", **told: Any) -> Tensor:
    seen: list[Tensor] = []
    decode = system.decode
    with monkeypatch.context() as patch:
        patch.setattr(system, "decode", lambda latents, tile: (seen.append(latents), decode(latents, tile))[1])
        pipeline.generate(system, prompt, seed=3, **told)
    return seen[0]


def walked(pipe: Any, steps: int, **told: Any) -> Tensor:
    """What diffusers' pipelines draw, before it is cut to what a picture can show."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            x = pipe.scheduler.step(pipe.unet(x, t, **told).sample, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize(("kind", "sampler"), [("DDIM", "ddim"), ("DDPM", "ddpm")])
def test_a_folder_draws_what_diffusers_draws(kind, sampler, root, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "model", kind, clip_sample=kind == "DDPM")
    pipe = getattr(diffusers, f"{kind}Pipeline").from_pretrained(folder)
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_pretrained(folder, subfolder="scheduler")
    folder = at_the_root(folder) if root else folder
    with warnings.catch_warnings():
        warnings.simplefilter("error" if kind == "DDIM" else "ignore", Assumed)  # all of it is told
        system = catalog.load(folder)
    part = folder / ("diffusion_pytorch_model.bin" if root else "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointMismatch, match="is of a folder of diffusers, which says how to draw with it"):
        catalog.load(part)
    ours = drawn(system, monkeypatch, steps=10, sampler=sampler)
    assert difference(ours, walked(pipe, 10)) <= (1e-5 if kind == "DDIM" else 3e-5)  # more where it is clipped
    assert ours.std() > 0.1


def test_classes_of_a_folder_are_given_by_number_or_its_names(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "model", classes=5)
    index = json.loads((folder / "model_index.json").read_text())
    pipe = diffusers.DDIMPipeline.from_pretrained(folder)
    system = catalog.load(folder)
    assert difference(drawn(system, monkeypatch, "4", steps=5), walked(pipe, 5, class_labels=torch.tensor([4]))) <= 1e-5
    for asked, says in ((("5",), "0 to 4"), (("cat",), "no names here"), (("",), "is empty")):
        with pytest.raises(UsageError, match=says):
            pipeline.prepare(system, prompt=asked[0])
    with pytest.raises(UsageError, match="no class for none"):
        pipeline.generate(system, "4", steps=2, guidance=2.0)
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"4": "otter"}}))
    assert catalog.load(folder).text_encoder.classes(["otter"]) == [4]  # type: ignore[union-attr]


def test_what_a_folder_asks_for_and_does_not_get_is_said(tmp_path):
    folder = folder_of(tmp_path / "model", "DDPM", clip_sample=True, beta_schedule="squaredcos_cap_v2")
    told = exchange.inspect(folder)
    assert [told[name] for name in ("model", "family", "predicts", "size", "steps", "guidance", "sampler")] == [
        "ddpm", "DDPM", "eps", 8, 50, 1.0, "ddim",
    ]  # fmt: skip
    assert told["assumed"] == [pixels.ANCESTRAL]
    assert exchange.inspect(folder_of(tmp_path / "ddim", clip_sample=True))["assumed"] == [pixels.CLIPPED]
    assert (
        pixels.VARIANCE.format("fixed_large")
        in exchange.inspect(folder_of(tmp_path / "large", "DDPM", variance_type="fixed_large"))["assumed"]
    )
    assert catalog.recognise(folder).noise.betas == "cosine"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("unet/config.json", {"center_input_sample": True}, "center_input_sample is True"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet/config.json", {"mid_block_type": None}, "mid_block_type is None"),
        ("unet/config.json", {"attn_norm_num_groups": 16}, "attn_norm_num_groups is not 32"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "differ in what Limner has alike"),
        ("unet/config.json", {"downsample_padding": 2}, "downsample_padding is 2"),
        ("unet/config.json", {"attention_head_dim": "8"}, "attention_head_dim is '8'"),
        ("unet/config.json", {"attention_head_dim": 24}, "head_width=24"),
        ("unet/config.json", {"in_channels": 1}, "1 channels in"),
        ("unet/config.json", {"layers_per_block": 2}, "missing"),
        ("unet/config.json", {"new_setting": 3}, "new_setting is 3"),
        ("model_index.json", {"_class_name": "ConsistencyModelPipeline"}, "'ConsistencyModelPipeline'"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "the part text_encoder"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "'odd'"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding is True"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "the scheduler is"),
    ],
)
def test_a_folder_with_what_is_not_known_is_refused_in_a_line(file, changes, says, tmp_path):
    folder = folder_of(tmp_path / "model")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointMismatch, match=says) as error:
        catalog.load(folder)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- on the command line


def test_a_file_is_inspected_and_drawn_with(here, limner):
    save_file(contents(CLASSES, ldm_layout), "adm.safetensors")
    told = exchange.inspect("adm.safetensors")
    assert [told[name] for name in ("kind", "model", "family", "classes", "size", "sampler", "steps", "guidance")] == [
        "single file", "ddpm", "ADM", 10, 32, "ddim", 50, 1.0,
    ]  # fmt: skip
    (sentence,) = told["assumed"]
    assert "cosine betas of 1000 timesteps, heads 64 wide and 32 px" in sentence
    assert "ADM" in limner("inspect", "adm.safetensors").out
    done = limner("7", "-m", "adm.safetensors", "--steps", 2, "-o", "one.png")
    assert (done.code, done.out) == (0, "one.png\n"), done.err
    assert sentence in done.err
    again = limner("generate", "-C", "one.png", "-m", "adm.safetensors", "-o", "two.png")
    assert again.code == 0, again.err
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    with pytest.raises(UsageError, match="is of ADM: only files of Stable Diffusion"):
        exchange.convert("adm.safetensors", "out.safetensors")
    refused = limner("7", "-m", "adm.safetensors", "--vae", "adm.safetensors")
    assert (refused.code, "draws pixels and reads no words: leave --vae" in refused.err) == (2, True)


@pytest.mark.parametrize(("config", "layout"), [(DDPM, ddpm_layout), (ADM, ldm_layout), (CLASSES, ldm_layout)])
@pytest.mark.filterwarnings("ignore::limner.errors.Assumed")
@torch.no_grad()
def test_a_file_is_made_into_a_folder_that_diffusers_and_we_read(config, layout, here):
    save_file(contents(config, layout), "model.safetensors")
    exchange.convert("model.safetensors", "folder")
    before: Any = catalog.load("model.safetensors")
    after: Any = catalog.load("folder")
    assert after.network.config == config
    assert (after.defaults, after.interpolant, after.family) == (before.defaults, before.interpolant, before.family)
    assert all(torch.equal(t, after.network.state_dict()[name]) for name, t in before.network.state_dict().items())
    pipe = (diffusers.DDIMPipeline if config is DDPM else diffusers.DDPMPipeline).from_pretrained("folder")
    x, t, labels = formula("x", (2, 3, 8, 8)).double(), torch.tensor([999, 3]), torch.tensor([7, 2])
    cond, told = (Conditioning(labels=labels), {"class_labels": labels}) if config.num_classes else (Conditioning(), {})
    assert difference(before.network.double()(x, t, cond), pipe.unet.double()(x, t, **told).sample) <= 1e-10


def test_what_diffusers_has_no_word_for_is_not_made_into_a_folder(here):
    save_file(contents(IMPROVED, ldm_layout), "model.safetensors")
    with pytest.raises(UsageError, match="has its time scaled, for which diffusers has no word"):
        exchange.convert("model.safetensors", "folder")
    assert not Path("folder").exists()


@pytest.mark.parametrize(
    ("config", "layout", "changes", "says"),
    [
        (DDPM, ddpm_layout, {"conv_out.weight": None}, "is like DDPM, but not whole: there is no 'conv_out.weight'"),
        (DDPM, ddpm_layout, {"up.0.block.1.conv2.bias": None}, "1 missing (first: up.0.block.1.conv2.bias)"),
        (DDPM, ddpm_layout, {"extra": (3,)}, "1 unknown (first: extra)"),
        (DDPM, ddpm_layout, {"mid.attn_1.q.weight": (64, 32, 1, 1)}, "mid.attn_1.q.weight is (64, 32, 1, 1)"),
        (DDPM, ddpm_layout, {"conv_in.weight": (32, 1, 3, 3)}, "1 channels in and 3 out"),
        (DDPM, ddpm_layout, {"down.1.attn.0.q.weight": None}, "no level of the first seven has attention"),
        (ADM, ldm_layout, {"time_embed.0.weight": (256, 128)}, "its time is told in 128 numbers"),
        (ADM, ldm_layout, {"input_blocks.0.0.weight": (64, 6, 3, 3)}, "such as one to enlarge"),
        (ADM, ldm_layout, {"out.2.weight": (7, 64, 3, 3)}, "7 out: known are 3, and 3 or 6"),
        (ADM, ldm_layout, {"out.2.bias": (3,)}, "out.2.bias is (3,) in the file"),
        (ADM, ldm_layout, {"input_blocks.3.0.in_layers.2.weight": None}, "not whole: there is no 'input_blocks.3"),
        (IMPROVED, ldm_layout, {"output_blocks.1.2.conv.weight": None}, "nothing in it doubles a picture"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_a_line(config, layout, changes, says, here):
    tensors = contents(config, layout)
    for name, shape in changes.items():
        tensors.pop(name, None)
        tensors |= {name: torch.zeros(shape)} if shape else {}
    save_file(tensors, "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Assumed)
        with pytest.raises(LimnerError) as error:
            catalog.load("model.safetensors")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert says in exchange.inspect("model.safetensors")["problem"]
