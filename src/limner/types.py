"""The nouns of the package and the seams between its parts.

Shapes: b batch, c channels, h w height and width, l text tokens, d width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from limner import metadata

Images = Float[Tensor, "b c h w"]
"""Pixels in [-1, 1]; with four channels the colours are premultiplied by alpha, so (-1, -1, -1, -1) is transparent."""
Latents = Float[Tensor, "b c h w"]
"""What a diffusion network works on: scaled to about unit variance."""
Tokens = Float[Tensor, "b l d"]

Preview = Callable[[], list[Image.Image]]
"""Makes, when it is called, small pictures of what is being drawn, as x0 was predicted last: one for each picture drawn
at once, a pixel a latent, with transparency where the model knows it."""
OnStep = Callable[[int, int, Preview], None]
"""Called after every sampling step with (steps done, steps in all, what shows how far it is)."""
Noise = Callable[[], Tensor]
"""Each call draws fresh standard normal noise of the shape being sampled."""
Denoise = Callable[[Tensor, float], Tensor]
"""(x (b c h w), sigma) -> x0: the one contract every solver and every guidance works on."""


@dataclass(frozen=True)
class Conditioning:
    """What a network is told beside x and t. `mask` is True where `tokens` are real; `vector` is SDXL's pooled prompt
    and sizes, as `models.unet.micro_conditioning` makes it; `labels` are classes; `guidance` is a scale, as
    `models.unet.guidance_embedding` makes it of what a distilled network is told; `images` are pictures as words more
    (IP-Adapter). A drawing, in which weights stay what they are, keeps in `kept` what follows from this alone, such as
    keys and values, under the module that computed it; None keeps nothing."""

    tokens: Tokens | None = None
    mask: Bool[Tensor, "b l"] | None = None
    pooled: Float[Tensor, "b d"] | None = None
    vector: Float[Tensor, "b d"] | None = None
    labels: Int[Tensor, " b"] | None = None
    images: Tokens | None = None
    guidance: Float[Tensor, "b d"] | None = None
    kept: dict[Any, Any] | None = field(default=None, compare=False)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for each `key` if anything is kept."""
        if self.kept is None:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every tensor present; nothing is kept of what it was."""
        values: dict[str, Any] = {k: None if v is None else function(v) for k, v in self.tensors().items()}
        return Conditioning(**values)

    def tensors(self) -> dict[str, Any]:
        """All but what is kept."""
        return {name: value for name, value in vars(self).items() if name != "kept"}

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """Join along the batch axis; every part must fill the same slots."""
        names = parts[0].tensors()
        values: dict[str, Any] = {
            k: None if names[k] is None else torch.cat([getattr(p, k) for p in parts]) for k in names
        }
        return Conditioning(**values)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model draws with when the request does not say; each has its own, in `limner.catalog`. `width` and
    `height` are in pixels, and a side has `min_size` to `max_size`; `sampler` and `schedule` walk so many `steps`
    through the noise. `guidance` is the scale, 1 for none, and acts at noise levels in `guidance_interval`, in sigma of
    the flow (see `limner.sampling.guidance.within`); `guidance_kind` is its way, and `guidance_rescale`, 0 to 1, pulls
    the spread of its colours back. `image_guidance` is 1, none, but for models that edit a picture; `strength` is how
    far a drawing moves from a picture given. A prompt has at most `max_prompt_chars` signs."""

    width: int
    height: int
    steps: int
    guidance: float
    min_size: int
    max_size: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: str = "euler"
    schedule: str = "uniform"
    strength: float = 0.6
    guidance_kind: Literal["cfg", "apg", "cfg_zero"] = "cfg"
    guidance_rescale: float = 0.0
    image_guidance: float = 1.0
    max_prompt_chars: int = 2000
    prompted: bool = True
    """Whether it must be told what to draw, by words or a picture."""

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is {low:g} to {high:g}: give two rising numbers from 0 to 1")
        if not 0 < self.max_prompt_chars <= metadata.MAX_PROMPT:
            raise ValueError(f"max_prompt_chars is {self.max_prompt_chars}: give 1 to {metadata.MAX_PROMPT}")


@dataclass(frozen=True)
class Control:
    """A network that tells the system's of `image` (ControlNet, T2I-Adapter), by `weight`, at the steps from `start` to
    `end` of all, 0 to 1. `guess` leaves the negative prompt out and tells more the deeper it goes. `name` and `hash`
    are its file's; `maker`, of `limner.hints.MAKERS`, makes what it sees of `image`, and `kind` says what that is where
    the network knows several, its `kinds`. `image_hash` is that of the picture given. A maker of
    `limner.hints.WITH_MODELS` looks through `finder`, whose file has `maker_name` and `maker_hash`."""

    network: Any = field(compare=False)
    image: Image.Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    name: str = ""
    hash: str = ""
    maker: str = ""
    kind: str = ""
    image_hash: str = ""
    finder: Callable[[Image.Image], Image.Image] | None = field(default=None, compare=False)
    maker_name: str = ""
    maker_hash: str = ""

    def at(self, step: int, steps: int) -> bool:
        """Whether it is told in a step, counted from 0, of so many (as diffusers has it)."""
        return step / steps >= self.start and (step + 1) / steps <= self.end

    def settings(self) -> dict[str, Any]:
        """What a picture remembers of it."""
        usual = {"start": 0.0, "end": 1.0, "guess": False, "maker": "", "kind": "", "image_hash": ""}
        usual |= {"maker_name": "", "maker_hash": ""}
        told = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return {"name": self.name, "hash": self.hash, "weight": self.weight, **told}


@dataclass(frozen=True)
class Reference:
    """A picture that a network is told of as words. A U-Net attends to them apart (IP-Adapter): `network` by `weight`
    adds `words` (1, n, d) to those of the prompt and `nothing`, of no picture, to those of the negative prompt.
    `blocks` are factors of blocks, of which the longest name that a module begins with counts. Where there is no
    `network`, `weight` times `words` stand behind those of the prompt (Redux). `image_hash` is that of the picture."""

    network: Any = field(compare=False)
    words: Tensor = field(compare=False)
    nothing: Tensor = field(compare=False)
    weight: float = 1.0
    name: str = ""
    hash: str = ""
    blocks: Mapping[str, float] = field(default_factory=dict)
    image_hash: str = ""

    @property
    def behind(self) -> bool:
        """Whether its words stand behind those of the prompt."""
        return self.network is None

    def weight_in(self, module: str) -> float:
        """How much it counts in a module of the network."""
        fitting = [block for block in self.blocks if f"{module}.".startswith(f"{block}.")]
        return self.weight * (self.blocks[max(fitting, key=len)] if fitting else 1.0)

    def settings(self) -> dict[str, Any]:
        """What a picture remembers of it."""
        told = {"name": self.name, "hash": self.hash, "weight": self.weight, "image_hash": self.image_hash}
        return told | ({"blocks": dict(self.blocks)} if self.blocks else {})


@dataclass(frozen=True, kw_only=True)
class Request:
    """A picture asked for, complete: `pipeline.prepare` has filled in the model's defaults and checked every value.

    `prompts` and `negatives` are those of each picture of the batch, expanded by its seed. `prompt_dialect` and
    `clip_skip` are None where the model's own will do. `mask` has the size of `image`, white where it is painted,
    and its edges fade over `mask_blur` pixels. `depth` is a depth map, as `limner.pictures.open_depth` reads it,
    and `image_guidance` is `picture` of `limner.sampling.guidance.Guidance`. With `only_masked` the part of the
    picture around the white, and `padding` pixels of it more, is drawn at `width` x `height` and put back.
    `guidance_kind`, `_rescale` and `_mimic` are `way`, `rescale` and `mimic` of
    `limner.sampling.guidance.Guidance`. `variation` is how much of the first noise is that of `variation_seed` +
    place, or, where they have `shares` of their own, of `variation_seed` alone; all pictures have the same seed then.
    `invert` says what `image` shows: what is drawn begins with the noise from which that comes back, turned by the
    `shares` to that of `variation_image`. `eta` and `churn` are those of samplers that
    take them. `pag_scale` is `push` there, away from a network whose pixels
    attend to themselves alone in `pag_layers`. `classifier_scale` is `scale` of `limner.sampling.guidance.classified`,
    where a classifier leads. `hires` times the size is what is drawn in the end: over what was
    drawn first, with a strength and steps of its own. `switch_at` is the share of the noise after which a refiner
    takes over. `noise_level` is the timestep whose noise an upscaler puts over the picture first. `compat` is a
    program of `limner.sampling.compat` to do as, `noise_delta` A1111's number of the name, `place` that of the
    first picture in a batch of ComfyUI's. `tile` is the side in pixels of what the network sees at once, `vae_tile`
    that of what the autoencoder does; 0 is all of it, None what the size asks for."""

    prompt: str
    negative: str
    seed: int
    batch: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    schedule: str
    image: Image.Image | None = None
    strength: float | None = None
    mask: Image.Image | None = None
    mask_blur: float = 0.0
    depth: Image.Image | None = None
    image_guidance: float = 1.0
    only_masked: bool = False
    padding: int = 0
    guidance_kind: str = "cfg"
    guidance_rescale: float = 0.0
    guidance_mimic: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    eta: float | None = None
    churn: float = 0.0
    pag_scale: float = 0.0
    pag_layers: tuple[str, ...] = ("mid_block",)
    classifier_scale: float = 1.0
    variation: float = 0.0
    variation_seed: int = 0
    shares: tuple[float, ...] = ()
    invert: str | None = None
    variation_image: Image.Image | None = None
    switch_at: float = 0.8
    hires: float = 1.0
    hires_strength: float = 0.5
    hires_steps: int = 1
    prompts: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    prompt_dialect: str | None = None
    clip_skip: int | None = None
    noise_level: int = 0
    compat: str = ""
    noise_delta: int = 0
    place: int = 0
    control: tuple[Control, ...] = ()
    ip_adapter: tuple[Reference, ...] = ()
    tile: int = 0
    vae_tile: int | None = None
    on_step: OnStep | None = field(default=None, compare=False)


@dataclass(frozen=True)
class GeneratedImage:
    """A finished picture with the seed and the settings that give it again."""

    image: Image.Image
    seed: int
    settings: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries its settings and the mark of a generated image; never overwrites.

        A taken name gets a number (`fox.png`, `fox-2.png`). Returns the path written. Raises FileProblem.
        """
        return metadata.save_png(self.image, self.settings, Path(path))


@runtime_checkable
class Autoencoder(Protocol):
    """Images <-> latents, scaling included. `factor` pixels a latent, `channels` of a latent."""

    factor: int
    channels: int

    def encode(self, images: Images) -> Latents: ...
    def decode(self, latents: Latents) -> Images: ...


class System(Protocol):
    """What can be trained and sampled: an nn.Module with these besides."""

    name: str
    family: str
    task: str
    phases: tuple[str, ...]
    defaults: Defaults
    model_hash: str
    """The first digits of the weight file's SHA-256, "" for weights that come from no file."""
    device: torch.device
    """Where it computes."""
    vae: dict[str, str]
    """What a picture remembers of what was put in beside the model's file: `vae` and `vae_hash`, `text_encoder` and
    `text_encoder_hash`, names and hashes of parts that are not its own, and `prediction` where it does not say that."""
    grid: int
    """Width and height must be multiples of this many pixels."""
    dialects: tuple[str, ...]
    """The meanings of prompts that it can read, its own first (see `limner.text.prompts`)."""
    clip_skip: int | None
    """The layer of CLIP whose states it takes, counted from the last, 1; None without CLIP."""

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """{"loss": what is minimised in this phase, and named terms to report}, each a scalar. In training, `batch`
        has the number of the "step", from 0."""
        ...

    def phase_parameters(self, phase: str) -> list[torch.nn.Parameter]: ...

    def check(self, request: Request) -> None:
        """Raises UsageError for a request that this system cannot do."""
        ...

    def condition(self, prompts: list[str], request: Request, negatives: list[str] | None = None) -> Any:
        """What `sample` is told of expanded prompts and negative ones (one a picture, or that of the request) and the
        size; computed once a request."""
        ...

    def words_cut(self, text: str) -> str:
        """The end of a prompt that does not fit into what the system reads, "" when all does."""
        ...

    def words_unknown(self, text: str) -> str:
        """The words of a prompt that say nothing to the system, "" when all do."""
        ...

    def words_unreached(self, text: str, request: Request) -> list[str]:
        """What a prompt keeps for steps that do not come."""
        ...

    def widen(self) -> bool:
        """Compute in float32 what was computed in half precision; False if nothing was."""
        ...

    def given(self, request: Request, count: int) -> dict[str, Tensor]:
        """What `sample` is given, as keywords, of the picture and the mask of a request, for `count` pictures."""
        ...

    def sample(self, cond: Any, request: Request, noise: Callable[[tuple[int, ...]], Tensor], **given: Any) -> Tensor:
        """Latents of one picture a row; `noise(shape)` draws fresh noise for every row, shape without the batch."""
        ...

    def encode(self, images: Images, tile: int | None = None) -> Latents:
        """Latents of RGBA images, of which a system without transparency sees what is left on white."""
        ...

    def decode(self, latents: Tensor, tile: int | None = None) -> Images:
        """`tile` pixels at once, 0 for all, None for what the size asks for."""
        ...
