"""Redux: FLUX.1 draws after pictures what diffusers draws after them, and nothing stays of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from limner import catalog, exchange, memory, metadata, pipeline
from limner.adapters import files, references
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.systems.diffusion import Prompts
from limner.types import Conditioning, Reference

from . import flow_models, stable_diffusion
from .test_flow_models import drawn

STEPS = 2
VISION = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 30,
    "patch_size": 7,
}  # fmt: skip


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """A folder of FLUX.1 and diffusers' pipeline of it, a folder as that of Redux, and diffusers' of that."""
    diffusers.utils.logging.set_verbosity_error()
    folder = flow_models.flux(tmp_path_factory.mktemp("dev"))
    theirs = diffusers.FluxPipeline.from_pretrained(folder)
    tower = stable_diffusion.noised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)), seed=4)
    words = stable_diffusion.noised(
        diffusers.ReduxImageEncoder(redux_dim=48, txt_in_features=flow_models.T5_WIDTH), seed=5
    )
    redux = tmp_path_factory.mktemp("redux")
    tower.save_pretrained(redux / "image_encoder")
    save_file(words.state_dict(), redux / "flux1-redux-dev.safetensors")
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=tower, image_embedder=words,
        feature_extractor=SiglipImageProcessorPil(size={"height": 30, "width": 30}),
        **{name: getattr(theirs, name) for name in names},
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    return {"folder": folder, "theirs": theirs, "prior": prior, "file": redux / "flux1-redux-dev.safetensors"}


@pytest.fixture(scope="module")
def system(made) -> Any:
    return catalog.load(made["folder"], dtype=torch.float32)


def expected(made: dict[str, Any], **words: Any) -> torch.Tensor:
    """The latents that diffusers draws of these words."""
    found = made["theirs"](
        **words, num_inference_steps=STEPS, guidance_scale=5.0, height=32,
        width=32, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    return made["theirs"]._unpack_latents(found, 32, 32, made["theirs"].vae_scale_factor)


def ours(system: Any, made: dict[str, Any], *shown: tuple[Image.Image, float]) -> torch.Tensor:
    told = tuple(references.open_reference(system, made["file"], image, weight) for image, weight in shown)
    return drawn(system, steps=STEPS, ip_adapter=told)[0]


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def test_a_picture_tells_what_it_tells_diffusers(system, made):
    tokens, pooled = made["prior"](picture(0), prompt="a red fox", return_dict=False)
    assert tokens.shape == (1, 512 + 16, flow_models.T5_WIDTH)
    found = ours(system, made, (picture(0), 1.0))
    assert near(found, expected(made, prompt_embeds=tokens, pooled_prompt_embeds=pooled))


def test_pictures_stand_behind_one_another_each_by_its_weight(system, made):
    both = [made["prior"](picture(n), prompt="a red fox", return_dict=False) for n in (0, 1)]
    (one, pooled), (two, _) = both
    tokens = torch.cat([one[:, :512], 0.5 * one[:, 512:], -0.25 * two[:, 512:]], dim=1)
    assert near(
        ours(system, made, (picture(0), 0.5), (picture(1), -0.25)),
        expected(made, prompt_embeds=tokens, pooled_prompt_embeds=pooled),
    )


def test_a_picture_alone_is_drawn_after_with_no_words(system, made):
    tokens, pooled = made["prior"](picture(0), prompt="", return_dict=False)
    told = references.opened(system, [(made["file"], picture(0))])
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        decode = system.decode
        patch.setattr(system, "decode", lambda latents, tile: (seen.append(latents), decode(latents))[1])
        asked: Any = {"width": 32, "height": 32, "seed": 3, "steps": STEPS, "guidance": 5.0}
        pipeline.generate(system, "", ip_adapter=told, **asked)
    assert near(seen[0], expected(made, prompt_embeds=tokens, pooled_prompt_embeds=pooled))
    with pytest.raises(UsageError, match="the prompt is empty"):
        pipeline.generate(system, "", **asked)


def test_what_is_planned_for_has_its_words_too(system, made):
    told = references.opened(system, [(made["file"], picture(0))] * 4)
    plain = pipeline.prepare(system, prompt="a fox", width=32, height=32, steps=1)
    shown = pipeline.prepare(system, prompt="a fox", width=32, height=32, steps=1, ip_adapter=told)
    most = [memory.plan(system, request, 1).peak(False)[0] for request in (plain, shown)]
    assert most[1] > most[0]


def test_a_negative_prompt_is_told_nothing_in_their_place():
    """As many words, of zeros, for as many pictures as there are."""
    yes, no, words = (torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 3, 1))
    told = [Reference(None, words * k, 0 * words, weight=0.5) for k in (1, 2)]
    prompts = Prompts((Conditioning(tokens=yes),), ((1.0,) * 3,), Conditioning(tokens=no))
    (cond, uncond), every = prompts.ready(torch.float32, told, False)
    shown = torch.cat([0.5 * words, words], dim=1).expand(3, -1, -1)
    assert torch.equal(cond.tokens, torch.cat([yes, shown], dim=1))
    assert torch.equal(uncond.tokens, torch.cat([no, 0 * shown], dim=1))
    assert torch.equal(every.tokens, torch.cat([cond.tokens, uncond.tokens]))
    assert cond.images is None


def test_what_cannot_be_is_told_in_a_line(system, made, tmp_path):
    def refused(error: type[Exception], words: str, *args: Any, **told: Any) -> None:
        with pytest.raises(error, match=words) as caught:
            references.open_reference(*args, **told)
        assert "\n" not in str(caught.value)

    file, sd1 = made["file"], files.bare("sd1")
    refused(CheckpointMismatch, "is Redux, whose words are for FLUX.1: sd1 does not take it", sd1, file, picture(0))
    refused(UsageError, "told to no block apart: leave double_blocks out", system, file, picture(0),
            blocks={"double_blocks": 1.0})  # fmt: skip
    refused(UsageError, "the weight of flux1-redux-dev.safetensors is 101", system, file, picture(0), 101)
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    refused(CheckpointMismatch, "is no Redux, the one kind for FLUX.1: flux-dev does not", system,
            tmp_path / "alone.safetensors", picture(0))  # fmt: skip
    alone = tmp_path / "redux.safetensors"
    alone.write_bytes(file.read_bytes())
    refused(FileProblem, "there is no folder image_encoder near it", system, alone, picture(0))
    small = tmp_path / "image_encoder"
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION | {"hidden_size": 24})).save_pretrained(
        small
    )
    refused(CheckpointMismatch, "is told 48 numbers of each part of a picture, not 24", system, alone, picture(0))
    told = references.opened(system, [(file, picture(0), 0.0)])
    request = pipeline.prepare(system, prompt="a fox", ip_adapter=told, width=32, height=32)
    assert pipeline.ignored(system, request) == ["flux1-redux-dev has weight 0, and shows nothing"]
    assert torch.equal(ours(system, made, (picture(0), 0.0)), ours(system, made))
    with pytest.raises(UsageError, match="the prompt is empty"):
        pipeline.generate(system, "", ip_adapter=told, width=32, height=32)


def test_inspect_knows_it_and_what_it_sees_with(made):
    told = exchange.inspect(made["file"])
    assert (told["kind"], told["needs"]) == ("Redux of FLUX.1", "a whole model and an image encoder of SigLIP's kind")
    tower = exchange.inspect(Path(made["file"]).parent / "image_encoder" / "model.safetensors")
    assert (tower["kind"], tower["needs"]) == ("image encoder of SigLIP's kind", "Redux")


def test_on_the_command_line(made, limner, here):
    picture(0).save(here / "photo.png")
    told = ("-m", made["folder"], "-W", 32, "-H", 32, "--steps", 1, "-s", 3)
    done = limner("generate", *told, "--ip-adapter", f"{made['file']}=photo.png:0.5", "-o", "a.png")
    assert (done.code, done.out) == (0, "a.png\n"), done
    kept = metadata.read_settings(here / "a.png")["ip_adapter"]
    assert [(one["name"], one["weight"]) for one in kept] == [("flux1-redux-dev", 0.5)]
    again = (
        "generate",
        "-m",
        made["folder"],
        "-C",
        "a.png",
        "--ip-adapter",
        f"{made['file']}=photo.png",
        "-o",
        "b.png",
    )
    assert limner(*again).code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    done = limner("generate", *told, "--image-encoder", "eyes", "a fox")
    assert (done.code, "what an IP-Adapter or Redux sees with" in done.err) == (2, True), done
