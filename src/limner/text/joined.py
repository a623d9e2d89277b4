"""What Stable Diffusion 3 and FLUX read prompts with: CLIP's towers and T5, joined as one text encoder.

SD3 (arXiv:2403.03206, section 4.1 and figure 2) is told token states of all, CLIP's first, and a vector of both CLIPs';
FLUX token states of T5 alone, and CLIP's vector. Unusual: CLIP's states are narrower than T5's, and zeros fill them up;
no token is hidden from the network, padding included.

Prompts are read plainly: T5 was told of no weights, and brackets are signs to it. CLIP reads 77 tokens, T5 as many as
is said; what T5 does not read, `words_cut` tells, and what it alone reads, `words_beyond_clip`. Attribute names are
those of published single files, after `text_encoders.` and before `.transformer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.text import bpe, unigram
from limner.text.bpe import CLIPTokenizer
from limner.text.clip import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig, CLIPTextEncoder
from limner.text.prompts import Dialect, Text
from limner.text.t5 import T5_XXL, T5Config, T5TextEncoder
from limner.text.unigram import T5Tokenizer
from limner.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class SD3TextConfig:
    """Without `t5xxl`, in whose place are zeros then, the model needs 10 GB less and knows less of long prompts and
    letters. `tokens` are T5's: 256, 77 in the reference code. `width` is that of the joined tokens, which is T5's.
    CLIP-L has no projection in the reference code, and in diffusers' folders one that changes nothing."""

    type: Literal["sd3"] = "sd3"
    clip_l: CLIPTextConfig = CLIP_L
    clip_g: CLIPTextConfig = OPENCLIP_BIGG
    t5xxl: T5Config | None = T5_XXL
    tokens: int = 256
    width: int = 4096

    def __post_init__(self) -> None:
        both = self.clip_l.width + self.clip_g.width
        if both > self.width or (self.t5xxl is not None and self.t5xxl.width != self.width):
            raise UsageError(
                f"width={self.width}: it must hold {both} of CLIP's"
                + (f", and be T5's, {self.t5xxl.width}" if self.t5xxl else "")
            )
        _check_tokens(self.tokens)

    @property
    def pooled_width(self) -> int:
        return sum(tower.projection or tower.width for tower in (self.clip_l, self.clip_g))


@dataclass(frozen=True, kw_only=True)
class FluxTextConfig:
    """`tokens` are T5's: 512 in dev, 256 in schnell. CLIP's vector is not projected, whatever its file has."""

    type: Literal["flux"] = "flux"
    clip_l: CLIPTextConfig = CLIP_L
    t5xxl: T5Config = T5_XXL
    tokens: int = 512

    def __post_init__(self) -> None:
        if self.clip_l.projection is not None:
            raise UsageError(f"projection={self.clip_l.projection}: FLUX takes CLIP's vector without one, so give None")
        _check_tokens(self.tokens)

    @property
    def width(self) -> int:
        return self.t5xxl.width

    @property
    def pooled_width(self) -> int:
        return self.clip_l.width


def _check_tokens(tokens: int) -> None:
    if not 1 <= tokens <= 4096:
        raise UsageError(f"tokens={tokens}: T5 reads 1, which is the mark of the end, to 4096")


SD3_TEXT = SD3TextConfig()
FLUX_DEV_TEXT = FluxTextConfig()
FLUX_SCHNELL_TEXT = FluxTextConfig(tokens=256)


class JoinedText(nn.Module, ABC):
    """What both have. `t5xxl` may be None."""

    dialects: tuple[Dialect, ...] = ("plain",)
    learned: frozenset[str] = frozenset()
    clip_skip: int | None = None
    clip_l: CLIPTextEncoder
    t5xxl: T5TextEncoder | None

    @abstractmethod
    def encode(self, prompts: list[str], clip_skip: int | None = None) -> Conditioning:
        """Token states of all, without a mask, and the vectors of CLIP."""

    def read(
        self, groups: Sequence[Sequence[Text]], dialect: Dialect, clip_skip: int | None, zero: bool = True
    ) -> Conditioning:
        """A row for each text of each group, each read once, without weights; an empty one as any."""
        texts = ["".join(piece.text for section in text for piece in section) for group in groups for text in group]
        unique = list(dict.fromkeys(texts))
        rows = [unique.index(text) for text in texts]
        return self.encode(unique, clip_skip).map(lambda value: value[rows])

    def words_cut(self, prompt: str) -> str:
        """The end of `prompt` that nothing reads, "" when all is read."""
        return self.words_beyond_clip(prompt) if self.t5xxl is None else self.t5xxl.words_cut(prompt)

    def words_beyond_clip(self, prompt: str) -> str:
        """The end of `prompt` that CLIP does not read, so that its vector does not know of it."""
        encoded = self.clip_l.tokenizer.tokenizer.encode(prompt, add_special_tokens=False)
        room = self.clip_l.config.context - 2
        return prompt[encoded.offsets[room][0] :] if len(encoded.ids) > room else ""

    def words_unknown(self, prompt: str) -> str:
        return ""  # CLIP's tokens are made of bytes, so every word has some


class SD3Text(JoinedText):
    """`tokens` (b, 77 + tokens, width): the states of both CLIPs beside each other, then those of T5."""

    def __init__(
        self, config: SD3TextConfig, tokenizers: Sequence[CLIPTokenizer] = (), t5: T5Tokenizer | None = None
    ) -> None:
        """`tokenizers` are of CLIP-L and -G, `t5` is T5's; those that ship where none are given."""
        super().__init__()
        self.config = config
        first, second = tokenizers or (bpe.shipped(), bpe.shipped())
        self.clip_l = CLIPTextEncoder(config.clip_l, first, skip=1, normed=False)
        self.clip_g = CLIPTextEncoder(config.clip_g, second, skip=1, normed=False)
        self.t5xxl = None
        if config.t5xxl is not None:
            self.t5xxl = T5TextEncoder(config.t5xxl, t5 or unigram.shipped(), config.tokens)
        self.clip_skip = 2
        """The layer whose states are taken, counted from the last, as in `CLIPTowers`."""
        self.clip_skips = range(1, min(config.clip_l.depth, config.clip_g.depth) + 1)

    def encode(self, prompts: list[str], clip_skip: int | None = None) -> Conditioning:
        """Raises UsageError for a clip skip not in `clip_skips`."""
        skip = self.checked(clip_skip) - 1
        read = [tower.states(tower.tokenize(prompts), skip) for tower in (self.clip_l, self.clip_g)]
        sides, pooled = (torch.cat(some, dim=-1) for some in zip(*read, strict=True))
        missing = self.config.width - sides.shape[-1]
        if self.t5xxl is None:
            tokens = F.pad(sides, (0, missing, 0, self.config.tokens))
        else:
            words = self.t5xxl.encode(prompts).tokens
            assert words is not None
            tokens = torch.cat([F.pad(sides, (0, missing)), words], dim=1)  # b l d
        return Conditioning(tokens=tokens, pooled=pooled)

    def checked(self, clip_skip: int | None) -> int:
        """As `CLIPTowers.checked`."""
        if clip_skip is not None and clip_skip not in self.clip_skips:
            raise UsageError(
                f"clip skip is {clip_skip}: this model's text encoders of CLIP's kind can stop 1 to "
                f"{self.clip_skips[-1]} from their end"
            )
        return clip_skip or 2


class FluxText(JoinedText):
    """`tokens` (b, tokens, width) of T5, `pooled` (b, width of CLIP-L)."""

    t5xxl: T5TextEncoder

    def __init__(
        self, config: FluxTextConfig, tokenizers: Sequence[CLIPTokenizer] = (), t5: T5Tokenizer | None = None
    ) -> None:
        """As `SD3Text`, of CLIP-L alone."""
        super().__init__()
        self.config = config
        (first,) = tokenizers or (bpe.shipped(),)
        self.clip_l = CLIPTextEncoder(config.clip_l, first)
        self.t5xxl = T5TextEncoder(config.t5xxl, t5 or unigram.shipped(), config.tokens)

    def encode(self, prompts: list[str], clip_skip: int | None = None) -> Conditioning:
        """`clip_skip` has no effect: no states of CLIP's are taken."""
        return Conditioning(tokens=self.t5xxl.encode(prompts).tokens, pooled=self.clip_l.encode(prompts).pooled)

    def words_unknown(self, prompt: str) -> str:
        return self.t5xxl.words_unknown(prompt)
