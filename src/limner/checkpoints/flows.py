"""Stable Diffusion 3 and FLUX.1 in the files of others: a network alone, all in one file, or a folder of diffusers.

What a file is follows from names and shapes. What those do not tell is taken from the name of the file and said: which
of FLUX.1's networks of one shape it is. A network alone needs an autoencoder and text encoders, in files of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from limner.checkpoints import files, flux, folders, mmdit, parts, t5, text
from limner.checkpoints.folders import INDEX, Settings
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Place, names, prefixed
from limner.checkpoints.parts import Held
from limner.errors import CheckpointMismatch, UsageError
from limner.models.autoencoder import KL_FLUX, KL_SD3, KLConfig
from limner.models.flux import FluxConfig
from limner.models.mmdit import MMDiTConfig
from limner.sampling.interpolants import FlowConfig
from limner.text import bpe, unigram
from limner.text.bpe import CLIPTokenizer
from limner.text.clip import CLIPTextConfig
from limner.text.joined import FluxTextConfig, SD3TextConfig
from limner.text.unigram import T5Tokenizer

CONTROLNET = "controlnet_blocks.0.weight"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
BESIDE_PREFIXES = ("text_encoders.", "first_stage_model.", "vae.", "model.", "cond_stage_model.")
SD3_NOISE = FlowConfig(shift=3.0)
FLUX_NOISE = FlowConfig(by_tokens=True)
SCHNELL_NOISE = FlowConfig()


@dataclass(frozen=True)
class Kind:
    """A family: the keys that tell it, in the authors' names and in diffusers', and what belongs to it."""

    title: str
    marks: tuple[str, ...]
    theirs: tuple[str, ...]
    codec: KLConfig
    towers: tuple[str, ...]


SD3 = Kind(
    "Stable Diffusion 3",
    ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"),
    ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
    KL_SD3,
    ("CLIP-L", "OpenCLIP's bigG", "T5-XXL"),
)
FLUX = Kind(
    "FLUX.1",
    ("double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
    ("transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    KL_FLUX,
    ("CLIP-L", "T5-XXL"),
)
KINDS = (SD3, FLUX)


def network(tensors: Mapping[str, Tensor]) -> tuple[Kind, Held] | None:
    """The network of a file, whatever else is in it; None where there is none of these, or a ControlNet for one."""
    if CONTROLNET in tensors:
        return None
    for kind in KINDS:
        for marks in (kind.marks, kind.theirs):
            for prefix in PREFIXES:
                if all(prefix + mark in tensors for mark in marks):
                    held = parts.under(tensors, prefix)
                    if not prefix:
                        mine = {n: t for n, t in held.tensors.items() if not n.startswith(BESIDE_PREFIXES)}
                        held = Held(mine, held.full)
                    return kind, held
    return None


def network_config(kind: Kind, held: Held, source: Path) -> tuple[FluxConfig | MMDiTConfig, dict[str, Place]]:
    """The network, and the places of its tensors."""
    config: FluxConfig | MMDiTConfig
    try:
        theirs = kind.theirs[0] in held.tensors
        if kind is FLUX:
            config = flux.config_of(held.shapes, source)
            layout = flux.diffusers_layout(config) if theirs else None
        else:
            config = mmdit.config_of(held.shapes)
            layout = mmdit.diffusers_layout(config) if theirs else None
    except KeyError as error:
        raise CheckpointMismatch(f"{source} is like {kind.title}, but not whole: there is no {error}") from error
    except (ValueError, IndexError, ZeroDivisionError, UsageError) as error:
        raise CheckpointMismatch(f"{source} is like {kind.title}, but its shapes do not fit together") from error
    return config, held.placed(layout or {name: Place(name) for name in own_names(config)})


def own_names(config: FluxConfig | MMDiTConfig) -> list[str]:
    """Of the network's tensors, which are those of its authors."""
    return list((flux if isinstance(config, FluxConfig) else mmdit).diffusers_layout(config))


# -------------------------------------------------------------------- what belongs to a network


@dataclass
class Parts:
    """Tensors and places of a whole system, put together part by part."""

    rows: dict[str, Place]
    tensors: dict[str, Tensor]

    def put(self, ours: str, held: Held, layout: Mapping[str, Place]) -> None:
        """A part, whose `layout` names the file's tensors. Those that it has no place for are kept, so that they are
        refused by name, but for what nobody needs."""
        self.rows |= prefixed(layout, ours, "")
        self.tensors |= {held.full(name): tensor for name, tensor in held.tensors.items()}


def codec_config(kind: Kind, held: Held, source: Path) -> tuple[KLConfig, dict[str, Place]]:
    config, layout = parts.codec_config(held, kind.codec.scale)
    config = replace(config, shift=kind.codec.shift)
    if config.latent_channels != kind.codec.latent_channels:
        raise CheckpointMismatch(
            f"{source} is an autoencoder of {config.latent_channels} channels, {kind.title} draws latents of "
            f"{kind.codec.latent_channels}: give {kind.title}'s (ae.safetensors)"
        )
    return config, layout


def clip_towers(found: Sequence[Held], source: str) -> dict[str, Held]:
    """CLIP's text towers by what they are called in a joined text encoder. Raises CheckpointMismatch."""
    rows = {width_of(held): held for held in found}
    if len(rows) < len(found):
        raise CheckpointMismatch(f"{source}: the same text encoder of CLIP's kind is given twice")
    if len(rows) > 2:
        raise CheckpointMismatch(f"{source}: {len(rows)} text encoders of CLIP's kind are more than any model has")
    return dict(zip(("clip_l", "clip_g"), (rows[width] for width in sorted(rows)), strict=False))


def width_of(clip: Held) -> int:
    return next(shape[1] for name, shape in clip.shapes.items() if name.endswith("token_embedding.weight"))


def put_words(
    kind: Kind,
    whole: Parts,
    clips: Mapping[str, Held],
    five: Held | None,
    source: str,
    network: FluxConfig | MMDiTConfig,
) -> FluxTextConfig | SD3TextConfig:
    """The text encoder of a system, of the towers that were found. Raises CheckpointMismatch for one that is missing
    or too many."""
    wanted = ("clip_l", "clip_g") if kind is SD3 else ("clip_l",)
    lacks = [name for tower, name in zip(wanted, kind.towers, strict=False) if tower not in clips]
    lacks += ["T5-XXL"] if kind is FLUX and five is None else []
    if lacks:
        options = {"CLIP-L": "--clip-l FILE", "OpenCLIP's bigG": "--clip-g FILE", "T5-XXL": "--t5 FILE"}
        raise CheckpointMismatch(
            f"{source}: {kind.title} reads with {' and '.join(kind.towers)}, of which {' and '.join(lacks)} "
            f"{'is' if len(lacks) == 1 else 'are'} missing: give {' and '.join(options[name] for name in lacks)}"
        )
    if len(clips) > len(wanted):
        raise CheckpointMismatch(f"{source}: {kind.title} reads with {' and '.join(kind.towers)}, not with two CLIPs")
    configs: dict[str, CLIPTextConfig] = {}
    tokens = tokens_of(network)
    for tower in wanted:
        held = clips[tower]
        if kind is FLUX:  # which takes the vector as it is
            mine = {
                n: t for n, t in held.tensors.items() if not n.endswith(("text_projection.weight", "text_projection"))
            }
            held = Held(mine, held.full)
        configs[tower], layout = parts.tower_config(held, openclip=tower == "clip_g")
        whole.put(f"text_encoder.{tower}.", held, layout)
    t5_config = None
    if five is not None:
        t5_config, layout = t5.tower(five, source)
        whole.put("text_encoder.t5xxl.", five, layout)
    if kind is FLUX:
        assert t5_config is not None
        return FluxTextConfig(clip_l=configs["clip_l"], t5xxl=t5_config, tokens=tokens)
    width = network.text_width if t5_config is None else t5_config.width
    return SD3TextConfig(
        clip_l=configs["clip_l"], clip_g=configs["clip_g"], t5xxl=t5_config, width=width, tokens=tokens
    )


def told(config: FluxConfig | MMDiTConfig, path: Path) -> tuple[dict[str, Any], list[str]]:
    """How a network is drawn with, as `Foreign` has it, and sentences on what its tensors do not tell."""
    name = called(path)
    if isinstance(config, MMDiTConfig):
        turbo = "turbo" in name
        few = {"steps": 4, "guidance": 1.0} if turbo else {}
        said = "its name says that it is distilled, a turbo" if turbo else "it is taken for one that is not distilled"
        return {"noise": SD3_NOISE, **few}, [f"no name of a tensor tells a turbo: {said}"] if turbo else []
    if not config.guidance_embedded:
        said = "its name says so" if "schnell" in name else "it is taken for schnell, in four steps"
        sentence = f"no name of a tensor tells FLUX.1 schnell from others that are not told their guidance: {said}"
        return {"noise": SCHNELL_NOISE}, [] if "schnell" in name else [sentence]
    if config.sees(KL_FLUX.latent_channels) == "hint":
        guidance, assumed = followed(path)
        return {"noise": FLUX_NOISE, "guidance": guidance}, assumed
    if config.sees(KL_FLUX.latent_channels):
        return {"noise": FLUX_NOISE}, []
    sentence = (
        "no name of a tensor tells FLUX.1 dev from Kontext: it is taken for dev; a Kontext has kontext in the name of "
        "its file"
    )
    named = any(known in name for known in ("kontext", "dev", "krea"))
    return {"noise": FLUX_NOISE, "looks": "kontext" in name}, [] if named else [sentence]


def called(path: Path) -> str:
    """The name of a model's file, in small letters: a cache of the Hub has the model's name above a number."""
    parents = (part for part in path.parts[-4:-1] if part.startswith("models--"))
    return " ".join((path.name, *parents)).lower()


def followed(path: Path) -> tuple[float, list[str]]:
    """The guidance of a FLUX.1 that follows edges or depth, by the name of its file, and a sentence where that does not
    say which."""
    says = [kind for kind in ("depth", "canny") if kind in called(path)]
    sentence = "no name of a tensor tells FLUX.1 Canny from Depth: it is taken for Canny, guidance 30"
    return 10.0 if says == ["depth"] else 30.0, [] if len(says) == 1 else [sentence]


# -------------------------------------------------------------------- files


def recognise(
    path: Path,
    tensors: Mapping[str, Tensor],
    vae: Path | None = None,
    text_encoders: Sequence[Path] = (),
) -> Foreign | None:
    """What a file with these tensors is, None where it is none of these. `vae` and `text_encoders` are files that hold
    what it lacks, or what is to stand in place of what it has. Raises FileProblem, CheckpointMismatch."""
    found = network(tensors)
    if found is None:
        return None
    kind, held = found
    config, rows = network_config(kind, held, path)
    whole = Parts({}, {})
    whole.put("network.", held, rows)
    own = next((h for p in parts.CODECS[:-1] if (h := parts.under(tensors, p)).tensors), None)
    clips = parts.clips_in(tensors)
    five = t5.held(tensors, path) if any(t5.MARK.fullmatch(name) for name in tensors) else None
    others = f" with {vae}" * (vae is not None) + "".join(f" and {file}" for file in text_encoders)
    if vae is None and own is None:
        options = " and ".join(["--clip-l FILE"] + ["--clip-g FILE"] * (kind is SD3) + ["--t5 FILE"])
        texts = "" if clips or text_encoders else f", and {' and '.join(kind.towers)} with {options}"
        raise CheckpointMismatch(
            f"{path} is the network of {kind.title} alone: give its autoencoder with --vae FILE{texts}"
        )
    with parts.whole(f"{path}{others}", kind.title):
        given = own if vae is None else parts.codec(vae, kind.codec.scale, str(path))
        assert given is not None
        codec, layout = codec_config(kind, given, vae or path)
        whole.put("autoencoder.", given, layout)
        given_clips: list[Held] = []
        for file in dict.fromkeys(text_encoders):
            inside = parts.read(file)
            more = parts.clips_in(inside, f"{file}/")
            given_clips += more
            if any(t5.MARK.fullmatch(name) for name in inside):
                five = t5.encoder(file)
            elif not more:
                raise CheckpointMismatch(f"{file} holds no text encoder: there is none of CLIP's kind in it, nor T5")
        clips = [own for own in clips if all(width_of(own) != width_of(one) for one in given_clips)] + given_clips
        words = put_words(kind, whole, clip_towers(clips, f"{path}{others}"), five, f"{path}{others}", config)
        if isinstance(config, FluxConfig) and words.pooled_width != config.pooled_width:
            said = (
                f"vectors of {config.pooled_width} from CLIP-L, but those of its text encoder have {words.pooled_width}"
            )
            raise CheckpointMismatch(f"{path}{others}: {kind.title} reads {said}: give another with --clip-l FILE")
    wanted = names(whole.rows)
    needed = {name: tensor for name, tensor in whole.tensors.items() if name in wanted or not superfluous(name)}
    drawn, assumed = told(config, path)
    return Foreign(
        source=path, network=config, autoencoder=codec, text=words, prediction="velocity",
        tokenizers=(bpe.shipped(),) * (2 if kind is SD3 else 1), layout=whole.rows, tensors=needed, files=(path,),
        beside=Counter(name.split(".")[0] for name in tensors if name not in needed), assumed=tuple(assumed), **drawn,
    )  # fmt: skip


def alone(tensors: Mapping[str, Tensor], path: Path) -> Foreign | None:
    """The network in a file without what else a model has, as if that were as published; None where there is none.
    Raises CheckpointMismatch."""
    found = network(tensors)
    if found is None:
        return None
    kind, held = found
    config, rows = network_config(kind, held, path)
    drawn, assumed = told(config, path)
    return Foreign(
        source=path, network=config, autoencoder=kind.codec, text=SD3TextConfig() if kind is SD3 else FluxTextConfig(),
        tokenizers=(), prediction="velocity", layout=prefixed(rows, "network.", ""),
        tensors={held.full(name): tensor for name, tensor in held.tensors.items()}, files=(path,),
        assumed=tuple(assumed), **drawn,
    )  # fmt: skip


def held_by(file: Path) -> set[str]:
    """Whether a file holds text encoders of CLIP's kind, "CLIP", and "T5". Raises FileProblem."""
    tensors = parts.read(file)
    five = any(t5.MARK.fullmatch(name) for name in tensors)
    return ({"CLIP"} if parts.clips_in(tensors) else set()) | ({"T5"} if five else set())


def superfluous(name: str) -> bool:
    """Whether a tensor of this name says nothing that we need."""
    return name.rpartition(".")[2] in ("position_ids", "logit_scale") or name.startswith(("model_ema.", "denoiser."))


def tokens_of(config: FluxConfig | MMDiTConfig) -> int:
    """How many tokens of T5 a network was trained to read."""
    return 512 if isinstance(config, FluxConfig) and config.guidance_embedded else 256


# -------------------------------------------------------------------- folders of diffusers

PIPELINES = {
    "StableDiffusion3Pipeline": SD3, "StableDiffusion3Img2ImgPipeline": SD3, "StableDiffusion3InpaintPipeline": SD3,
    "FluxPipeline": FLUX, "FluxImg2ImgPipeline": FLUX, "FluxInpaintPipeline": FLUX, "FluxFillPipeline": FLUX,
    "FluxControlPipeline": FLUX, "FluxKontextPipeline": FLUX,
}  # fmt: skip


def is_folder(folder: Path) -> bool:
    """Whether a folder with an index is one of these. Raises FileProblem."""
    return Settings(folder / INDEX).take("_class_name", "") in PIPELINES


def of_folder(folder: Path) -> Foreign:
    """What such a folder holds. Raises FileProblem, CheckpointMismatch."""
    try:
        return _of_folder(folder)
    except KeyError as error:
        raise CheckpointMismatch(f"{folder} is not whole: there is no {error}") from error
    except (ValueError, TypeError, IndexError, UsageError) as error:
        raise CheckpointMismatch(f"{folder}: its parts do not fit together ({error})") from error


def _of_folder(folder: Path) -> Foreign:
    index = Settings(folder / INDEX)
    kind = PIPELINES[index.values["_class_name"]]
    there = {name for name, value in index.values.items() if isinstance(value, list) and value[-1:] not in ([None], [])}
    towers = ["text_encoder", "text_encoder_2"] + ["text_encoder_3"] * (kind is SD3)
    optional = {"text_encoder_3"} if kind is SD3 else set()
    for name in ("transformer", "vae", "scheduler", *towers):
        if name not in there and name not in optional:
            raise CheckpointMismatch(f"{index.path}: there is no {name}; a whole model has one")
    towers = [name for name in towers if name in there]
    settings = Settings(folder / "transformer" / "config.json")
    config: FluxConfig | MMDiTConfig
    if kind is FLUX:
        config = flux.from_diffusers_config(settings.values, settings.path)
    else:
        config = mmdit.from_diffusers_config(settings.values, settings.path)
    codec = folders.autoencoder_config(Settings(folder / "vae" / "config.json"))
    noise, sampler = noise_config(Settings(folder / "scheduler" / "scheduler_config.json"))
    paths = {name: folders.weights(folder / name) for name in ("transformer", "vae", *towers)}
    found = {name: files.read_all(paths[name]) for name in paths}
    whole = Parts({}, {})

    def part(name: str) -> Held:
        return parts.under({f"{name}/{key}": tensor for key, tensor in found[name].items()}, f"{name}/")

    module = flux if kind is FLUX else mmdit
    transformer = part("transformer")
    whole.put("network.", transformer, transformer.placed(module.diffusers_layout(config)))
    whole.put("autoencoder.", part("vae"), parts.codec_layout(part("vae"), codec))
    fives = [name for name in towers if any(t5.MARK.fullmatch(key) for key in found[name])]
    clips = {}
    tokenizers: list[CLIPTokenizer] = []
    for ours, name in zip(("clip_l", "clip_g"), (n for n in towers if n not in fives), strict=False):
        held = part(name)
        clips[ours] = Held(text.text_tower(held.tensors), held.full)
        tokenizers.append(CLIPTokenizer.from_folder(folder / name.replace("text_encoder", "tokenizer")))
    five = part(fives[0]) if fives else None
    five = None if five is None else t5.held(five.tensors, folder / fives[0], f"{fives[0]}/")
    reads: T5Tokenizer = unigram.shipped()
    if fives:
        reads = T5Tokenizer.from_folder(folder / fives[0].replace("text_encoder", "tokenizer"))
    words = put_words(kind, whole, clips, five, str(folder), config)
    for i, (ours, name) in enumerate(zip(clips, (n for n in towers if n not in fives), strict=True)):
        told_by = Settings(folder / name / "config.json")
        said = text.transformers_config(told_by.values, pad=tokenizers[i].pad, source=told_by.path)
        said = replace(said, projection=getattr(words, ours).projection)
        words = replace(words, **cast(Any, {ours: said}))
    side = int(settings.values.get("sample_size") or 128) * codec.factor
    wanted = names(whole.rows)
    needed = {name: tensor for name, tensor in whole.tensors.items() if name in wanted or not superfluous(name)}
    drawn, assumed = told(config, folder.absolute())
    drawn |= {"noise": noise, "looks": index.values["_class_name"] == "FluxKontextPipeline"}
    return Foreign(
        source=folder, network=config, autoencoder=codec, text=words, tokenizers=(*tokenizers, reads),
        prediction="velocity", sampler=sampler, size=side, layout=whole.rows, tensors=needed,
        assumed=tuple(assumed) if isinstance(config, MMDiTConfig) else (), **drawn,
        files=tuple(path for some in paths.values() for path in some),
    )  # fmt: skip


def noise_config(settings: Settings) -> tuple[FlowConfig, str]:
    """The flow, and the folder's sampler. Raises CheckpointMismatch for levels moved as none of ours are."""
    take = settings.take
    cls = take("_class_name", "")
    sampler = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}.get(cls)
    if sampler is None:
        raise settings.wrong("_class_name", cls)
    config = FlowConfig(
        shift=take("shift", 1.0), by_tokens=take("use_dynamic_shifting", False), least=take("base_shift", 0.5),
        most=take("max_shift", 1.15),
    )  # fmt: skip
    fixed = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "num_train_timesteps": 1000}
    settings.done(ignored={"time_shift_type"}, fixed=fixed)
    if settings.values.get("time_shift_type", "exponential") != "exponential":
        raise settings.wrong("time_shift_type", settings.values["time_shift_type"])
    return config, sampler
