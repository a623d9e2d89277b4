"""Models whose parts lie in files of their own, and files with averaged weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner import catalog, pipeline
from limner.checkpoints import folders, single_files, unet
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.metadata import read_settings
from limner.models.unet import SD1, SD2, SDXL, SDXL_REFINER, UNet
from systems import stable_diffusion

UNET, VAE = "model.diffusion_model.", "first_stage_model."
Tensors = dict[str, Tensor]


class Model:
    """A folder, the tensors of a single file of it, and the system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        exported = single_files.export(folders.recognise(folder))
        self.tensors = {name: tensor.contiguous() for name, tensor in exported.items()}
        self.system = catalog.load(folder, dtype=torch.float32)

    def part(self, prefix: str) -> Tensors:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def without(self, *prefixes: str) -> Tensors:
        return {name: t for name, t in self.tensors.items() if not name.startswith(prefixes)}

    def of_folder(self, part: str, stem: str = "model") -> Tensors:
        return load_file(self.folder / part / f"{stem}.safetensors")


@pytest.fixture(scope="module")
def sd1(sd1_folder) -> Model:
    return Model(sd1_folder)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory) -> Model:
    return Model(stable_diffusion.sd2_v(tmp_path_factory.mktemp("sd2")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Model:
    return Model(stable_diffusion.sdxl(tmp_path_factory.mktemp("sdxl")))


def written(tmp_path: Path, **parts: Tensors) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.safetensors" for name in parts}
    for name, tensors in parts.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, paths[name])
    return paths


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, its = (system.text_encoder.encode(["a red fox", ""]) for system in (one, other))
    assert (mine.tokens - its.tokens).abs().max() < 1e-5
    assert (mine.pooled - its.pooled).abs().max() < 1e-5
    assert one.network.config == other.network.config
    assert one.autoencoder.config == other.autoencoder.config
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


UNETS: dict[str, Callable[[Model], Tensors]] = {
    "as in a whole model": lambda model: {UNET + k: v for k, v in model.part(UNET).items()},
    "bare": lambda model: model.part(UNET),
    "as diffusers": lambda model: model.of_folder("unet", "diffusion_pytorch_model"),
}
VAES: dict[str, Callable[[Model], Tensors]] = {
    "as in a whole model": lambda model: model.without(UNET, "cond_stage_model.", "conditioner."),
    "bare, with its loss": lambda model: model.part(VAE) | {"loss.logvar": torch.zeros(1)},
    "as diffusers": lambda model: model.of_folder("vae", "diffusion_pytorch_model"),
}
CLIP = "cond_stage_model.transformer."
TEXTS: dict[str, Callable[[Model], Tensors]] = {
    "as in a whole model": lambda model: {CLIP + k: v for k, v in model.part(CLIP).items()},
    "as transformers": lambda model: model.of_folder("text_encoder"),
    "flat": lambda model: {k.removeprefix("text_model."): v for k, v in model.of_folder("text_encoder").items()},
    "with pictures": lambda model: model.of_folder("text_encoder") | {
        "vision_model.x": torch.zeros(1), "logit_scale": torch.zeros(())
    },
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("network", UNETS)
def test_three_files_in_any_spelling_are_the_whole_model(sd1, network, vae, text, tmp_path):
    files = written(tmp_path, network=UNETS[network](sd1), codec=VAES[vae](sd1), words=TEXTS[text](sd1))
    system = catalog.load(
        files["network"], dtype=torch.float32, vae=files["codec"], text_encoders=[files["words"]]
    )  # fmt: skip
    assert_same(system, sd1.system)
    assert (system.vae["vae"], system.vae["text_encoder"]) == ("codec", "words")


BIGG: dict[str, Callable[[Model], Tensors]] = {
    "as transformers": lambda model: model.of_folder("text_encoder_2"),
    "as OpenCLIP": lambda model: model.part("conditioner.embedders.1.model."),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("bigg", BIGG)
def test_stable_diffusion_xl_takes_both_text_encoders_in_any_order(sdxl, bigg, order, tmp_path):
    files = written(tmp_path, network=UNETS["as diffusers"](sdxl), codec=VAES["as diffusers"](sdxl),
                    clip_l=sdxl.of_folder("text_encoder"), clip_g=BIGG[bigg](sdxl))  # fmt: skip
    both = [files["clip_l"], files["clip_g"]][::order]
    system = catalog.load(files["network"], dtype=torch.float32, vae=files["codec"], text_encoders=both)
    assert_same(system, sdxl.system)


def test_the_order_of_text_encoders_is_nothing_to_remember(sdxl, tmp_path):
    files = written(tmp_path, whole=sdxl.tensors)
    both = [sdxl.folder / "text_encoder", sdxl.folder / "text_encoder_2"]
    one, other = (catalog.load(files["whole"], text_encoders=texts).vae for texts in (both, both[::-1]))
    assert one["text_encoder_hash"] == other["text_encoder_hash"]


def test_folders_of_parts_will_do(sdxl, tmp_path):
    file = written(tmp_path, network=UNETS["bare"](sdxl))["network"]
    texts = [sdxl.folder / "text_encoder_2", sdxl.folder / "text_encoder"]
    system = catalog.load(file, dtype=torch.float32, vae=sdxl.folder / "vae", text_encoders=texts)
    assert_same(system, sdxl.system)


def test_stable_diffusion_2_of_parts_predicts_what_is_said(sd2, tmp_path):
    files = written(tmp_path, network=UNETS["as diffusers"](sd2), codec=VAES["bare, with its loss"](sd2),
                    words=sd2.of_folder("text_encoder"))  # fmt: skip
    system = catalog.load(files["network"], "cpu", "v", torch.float32, files["codec"], [files["words"]])
    assert_same(system, sd2.system)
    assert system.prediction.name == "v"


def test_a_whole_model_takes_another_text_encoder(sd1, tmp_path):
    other = {name: tensor + 1 for name, tensor in sd1.of_folder("text_encoder").items()}
    files = written(tmp_path, whole=sd1.tensors, words=other)
    system = catalog.load(files["whole"], dtype=torch.float32, text_encoders=[files["words"]])
    own = sd1.system.state_dict()
    for name, tensor in system.state_dict().items():
        assert torch.equal(tensor, own[name] + name.startswith("text_encoder.")), name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "holds no autoencoder and no text encoder of .*, but a U-Net of .*: give its autoencoder with "
             "--vae FILE and CLIP-L, 64 wide and OpenCLIP's bigG, 128 wide with --text-encoder FILE"),
        (("vae",), "holds no text encoder .* give CLIP-L, 64 wide and OpenCLIP's bigG"),
        (("clip_l", "clip_g"), "holds no autoencoder .* give its autoencoder with --vae FILE"),
        (("vae", "clip_l"), "reads with CLIP-L, 64 wide and OpenCLIP's bigG, 128 wide, but .* given are 64 wide"),
        (("vae", "clip_l", "clip_l"), "given are 64 and 64 wide"),
        (("vae", "clip_l", "vae_"), "vae_.safetensors holds no text encoder of CLIP's kind"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_the_way_to_give_it(sdxl, parts, message, tmp_path):
    codec = VAES["as diffusers"](sdxl)
    files = written(tmp_path, network=UNETS["bare"](sdxl), vae=codec, vae_=codec,
                    clip_l=sdxl.of_folder("text_encoder"), clip_g=sdxl.of_folder("text_encoder_2"))  # fmt: skip
    vae, *texts = parts if "vae" in parts else (None, *parts)
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        catalog.load(files["network"], vae=vae and files[vae], text_encoders=[files[name] for name in texts])
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_names_the_file_and_the_key(sd1, tmp_path):
    broken = {k: v for k, v in VAES["as diffusers"](sd1).items() if k != "decoder.conv_out.bias"}
    wide = sd1.of_folder("text_encoder") | {"text_model.final_layer_norm.bias": torch.zeros(3)}
    files = written(tmp_path, network=UNETS["bare"](sd1), codec=VAES["as diffusers"](sd1), broken=broken,
                    words=sd1.of_folder("text_encoder"), wide=wide)  # fmt: skip
    for vae, text, key in (
        ("broken", "words", r"broken.safetensors/decoder.conv_out.bias"),
        ("codec", "wide", r"wide.safetensors/text_model.final_layer_norm.bias is \(3,\) in the file"),
        ("words", "words", r"words.safetensors holds no autoencoder: there is no 'decoder.conv_in.weight'"),
    ):
        with pytest.raises(CheckpointMismatch, match=key):
            catalog.load(files["network"], vae=files[vae], text_encoders=[files[text]])


@pytest.mark.parametrize("given", ["whole file", "folder", "folder of a part", "file of a folder"])
def test_the_autoencoder_of_another_family_is_refused_where_anything_tells(sd1, sdxl, given, tmp_path):
    """Their tensors have the same names and shapes, and another scale."""
    files = written(tmp_path, whole=sdxl.tensors, network=UNETS["bare"](sd1), mine=sd1.tensors)
    vae = {
        "whole file": files["whole"],
        "folder": sdxl.folder,
        "folder of a part": sdxl.folder / "vae",
        "file of a folder": sdxl.folder / "vae" / "diffusion_pytorch_model.safetensors",
    }[given]
    texts = [sd1.folder / "text_encoder"]
    for model, more in ((files["network"], texts), (files["mine"], []), (sd1.folder, [])):
        with pytest.raises(CheckpointMismatch, match=r"scales latents by 0\.13025, .* by 0\.18215: another family's"):
            catalog.load(model, vae=vae, text_encoders=more)


def test_a_whole_model_in_a_folder_or_file_lends_its_autoencoder(sd1, tmp_path):
    files = written(tmp_path, network=UNETS["bare"](sd1), whole=sd1.tensors)
    for vae in (sd1.folder, files["whole"]):
        system = catalog.load(
            files["network"], dtype=torch.float32, vae=vae, text_encoders=[sd1.folder / "text_encoder"]
        )
        assert_same(system, sd1.system)
        assert system.vae["vae"] in ("model", "whole")


def test_text_encoders_where_none_can_be_put_are_refused(sd1, tiny_model, tmp_path):
    file = written(tmp_path, words=sd1.of_folder("text_encoder"))["words"]
    for model in (sd1.folder, tiny_model):
        with pytest.raises(UsageError, match="which has its text encoder"):
            catalog.load(model, text_encoders=[file])
    with pytest.raises(FileProblem, match="no file"):
        catalog.load(written(tmp_path, network=sd1.part(UNET))["network"], vae=tmp_path / "x", text_encoders=[file])


def test_a_picture_remembers_the_parts_and_asks_for_them_again(sd1, limner, here):
    files = written(here, network=UNETS["bare"](sd1), codec=VAES["as diffusers"](sd1),
                    words=sd1.of_folder("text_encoder"))  # fmt: skip
    told = ("-m", files["network"], "--vae", files["codec"], "--text-encoder", files["words"])
    done = limner("a fox", *told, "--steps", 1, "-W", 32, "-H", 32, "-s", 3, "-o", "fox.png")
    assert done.code == 0, done.err
    settings = read_settings(here / "fox.png")
    assert (settings["vae"], settings["text_encoder"]) == ("codec", "words")
    assert {len(settings[name]) for name in ("vae_hash", "text_encoder_hash", "model_hash")} == {10}
    again = limner("-C", "fox.png", *told, "-o", "again.png")
    assert again.code == 0, again.err
    assert (here / "again.png").read_bytes() == (here / "fox.png").read_bytes()
    asked = limner("-C", "fox.png", *told[:4])
    assert "was painted with the text encoders 'words' (add --text-encoder FILE" in asked.err
    inspected = limner("inspect", files["network"])
    assert "give its autoencoder with --vae FILE" in inspected.out


# ------------------------------------------------------------------- averages


@pytest.mark.parametrize("config", [SD1, SD2, SDXL, SDXL_REFINER])
def test_dots_are_put_back_into_every_name(config):
    names = [place.name for place in unet.ldm_layout(config).values()]
    assert [unet.dotted(name.replace(".", "")) for name in names] == names
    assert len({name.replace(".", "") for name in names}) == len(names)


@pytest.mark.parametrize("config", [SD1, SD2, SDXL, SDXL_REFINER])
def test_diffusers_names_tell_the_configuration(config):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in UNet(config).state_dict().items()}
    assert unet.own_config(shapes) == config


def averages(model: Model) -> Tensors:
    """As Latent Diffusion's training keeps them."""
    named = {f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in model.part(UNET).items()}
    return named | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_file_with_averages_alone_is_drawn_from(name, request, tmp_path):
    model = request.getfixturevalue(name)
    file = written(tmp_path, averaged=model.without(UNET) | averages(model))["averaged"]
    assert_same(catalog.load(file, dtype=torch.float32), model.system)


def test_averages_beside_the_weights_are_left_out(sd1, tmp_path):
    other = {name: tensor + 1 for name, tensor in averages(sd1).items()}
    file = written(tmp_path, both=sd1.tensors | other)["both"]
    assert_same(catalog.load(file, dtype=torch.float32), sd1.system)


def test_an_average_too_many_or_too_few_is_refused_by_name(sd1, tmp_path):
    tensors = sd1.without(UNET) | averages(sd1)
    few = {k: v for k, v in tensors.items() if k != "model_ema.diffusion_modelout2bias"}
    for name, held in (("few", few), ("many", tensors | {"model_ema.diffusion_modelmore": torch.zeros(1)})):
        with pytest.raises(CheckpointMismatch, match="out2bias" if name == "few" else "modelmore"):
            catalog.load(written(tmp_path, **{name: held})[name])


def test_a_pipeline_takes_the_same(sd1, tmp_path):
    files = written(tmp_path, network=UNETS["bare"](sd1), codec=VAES["as diffusers"](sd1),
                    words=sd1.of_folder("text_encoder"))  # fmt: skip
    pipe = pipeline.load(files["network"], dtype="fp32", vae=files["codec"], text_encoder=files["words"])
    assert_same(pipe.system, sd1.system)
