"""Single files of Stable Diffusion: what they are, at the sizes of the published ones, from names and shapes alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from limner import catalog
from limner.checkpoints import layouts, single_files
from limner.checkpoints.foreign import Foreign
from limner.errors import CheckpointMismatch
from limner.models.unet import UNetConfig
from limner.text import bpe

ROWS = [
    entry.name
    for entry in catalog.entries()
    if not entry.name.endswith("-tiny")
    and entry.name != "sd1"
    and isinstance(network := getattr(entry.config, "network", None), UNetConfig)
    and network.text_width  # those of pixels are in files of other programs
]


@lru_cache(maxsize=1)
def tensors(name: str) -> dict[str, torch.Tensor]:
    """Of a published file, without their values."""
    config = catalog.entry(name).config
    with torch.device("meta"):
        system = catalog.build(config)
    towers = config.text_encoder.towers
    model = Foreign(
        source=Path(name), network=config.network, autoencoder=config.autoencoder, text=config.text_encoder,
        tokenizers=(bpe.shipped(),) * len(towers), noise=config.interpolant, prediction=config.prediction, layout={},
        tensors={}, files=(),
    )  # fmt: skip
    places = zip(single_files.prefixes(model), towers, strict=True)
    named = {prefix: single_files.tower_layout(prefix, tower) for prefix, tower in places}
    rows = single_files.layout(config.network, config.autoencoder, named)
    return layouts.write(rows, system.state_dict())


BESIDE = {
    "sd1": ["betas", "cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.decay"],
    "sd2": ["alphas_cumprod", "cond_stage_model.model.logit_scale"],
    "sdxl": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
        "denoiser.sigmas",
    ],
}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_file_is_the_row_of_the_catalogue(name):
    row = catalog.entry(name).config
    beside = {key: torch.zeros(()) for key in BESIDE.get(name, [])}
    found = single_files.recognise(Path("file"), tensors(name) | beside, row.prediction)
    assert catalog.config_of(found) == row
    assert found.tensors.keys() == {place.name for place in found.layout.values()} == tensors(name).keys()


@pytest.mark.parametrize(("name", "count"), [("sd1", 1131 - 1), ("sdxl", 2515 - 2)])
def test_a_published_file_has_so_many_tensors(name, count):
    """Of v1-5-pruned-emaonly and sd_xl_base_1.0, without the buffers of their text encoders."""
    assert len(tensors(name)) == count


def test_early_merges_leave_out_a_level_of_the_text_encoder():
    long, short = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    flat = {key.replace(long, short): tensor for key, tensor in tensors("sd1").items()}
    more = {"cond_stage_model.transformer.embeddings.position_ids": torch.zeros(1)}
    found = single_files.recognise(Path("file"), flat | more)
    assert catalog.config_of(found) == catalog.entry("sd1").config
    assert found.tensors.keys() == {place.name for place in found.layout.values()} == flat.keys()
    assert catalog.fitted(found).name == "sd1"


def test_marks_tell_what_is_predicted_and_that_the_last_timestep_is_noise():
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    plain, marked = (single_files.recognise(Path("file"), tensors("sdxl") | more) for more in ({}, marks))
    assert (plain.prediction, plain.noise.zero_snr) == ("eps", False)
    assert (marked.prediction, marked.noise.zero_snr) == ("v", True)


@pytest.mark.parametrize(("spread", "expected"), [(0.2, "v"), (0.02, "eps")])
def test_a_bias_tells_what_stable_diffusion_2_predicts(spread, expected):
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    bias = torch.randn(tensors("sd2")[name].shape, generator=torch.Generator().manual_seed(0)) * spread
    told = tensors("sd2") | {name: bias}
    assert single_files.recognise(Path("file"), told).prediction == expected
    assert single_files.recognise(Path("file"), told, "eps").prediction == "eps"


def without(name: str, prefix: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors(name).items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict, "file holds no network that is known .*'none'"),
        (lambda: {"lora_te_x.alpha": torch.zeros(1)}, "no network .*the first of its 1 tensors is 'lora_te_x.alpha'"),
        (lambda: without("sd1", "first_stage_model."), "file holds no autoencoder"),
        (lambda: without("sd1", "cond_stage_model."), "file holds no text encoder"),
        (lambda: without("sd1", "model.diffusion_model.out.2.weight"), "not whole: there is no 'out.2.weight'"),
        (
            lambda: tensors("sd1") | {"first_stage_model.encoder.conv_in.weight": torch.zeros(4)},
            "file is like Stable Diffusion, but its shapes do not fit together",
        ),
        (
            lambda: tensors("sd1") | {"first_stage_model.quant_conv.weight": torch.zeros(())},
            r"file: first_stage_model.quant_conv.weight is \(\) in the file, \(8, 8, 1, 1\) in the model",
        ),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_by_name(change, message):
    def load(tensors: dict[str, torch.Tensor]) -> None:
        found = single_files.recognise(Path("file"), tensors)
        with torch.device("meta"):
            system = catalog.build(catalog.config_of(found))
        layouts.fit(found.layout, system.state_dict(), found.tensors, "file")

    with pytest.raises(CheckpointMismatch, match=message):
        load(change())
