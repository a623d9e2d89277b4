"""CLIP's text tower: prompt -> token states and a vector that lies near that of a fitting picture.

A causal transformer (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, section 2.4): layer norm comes before attention and MLP, positions are learned, and the state at the
mark of the end, EOT, stands for the whole text. Unusual: attention looks at padding too, after EOT, and so do the
networks that are told of the states; which id fills up is therefore part of a model (OpenAI's is EOT, OpenCLIP's is 0).
Attribute names are those of the published files, as transformers writes them.

What systems take: Stable Diffusion 1 the last states after the final norm, 2 those of the layer before with the norm,
XL those of the layer before without it, from two towers side by side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limner.errors import UsageError
from limner.nn.clip import ACTIVATIONS, Layer
from limner.nn.embeddings import embedding, sent
from limner.text.bpe import CLIPTokenizer
from limner.text.prompts import DIALECTS, ENDINGS, LONG_WORD, Dialect, Piece, Text, Token, chunked
from limner.types import Conditioning, Tokens

Chunk = tuple[Token, ...]
AT_ONCE = 32
"""Chunks that go through a tower together."""


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """`depth` blocks on tokens of `width`, with `num_heads` heads and MLPs of width `hidden`, whose nonlinearity is
    `activation`; `norm_eps` is of their norms. `vocabulary` counts the ids, `context` the tokens of a text.
    `eot` None finds EOT as the largest id of a text, as OpenAI's program does. `pad` is the id texts are filled up
    with. `projection` is the width of the space shared with pictures, None for a file without the matrix to it."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = None
    vocabulary: int = 49408
    context: int = 77
    eot: int | None = 49407
    pad: int = 49407
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % self.num_heads:
            raise UsageError(f"width={self.width} is not in equal parts over num_heads={self.num_heads}")
        if self.context < 2:
            raise UsageError(f"context={self.context}: the marks of the beginning and the end alone are 2")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.pad < self.vocabulary or (self.eot is not None and not 0 <= self.eot < self.vocabulary):
            raise UsageError(f"pad={self.pad} and eot={self.eot} are not both of vocabulary={self.vocabulary}")


CLIP_L = CLIPTextConfig()  # of ViT-L/14, without its projection: Stable Diffusion 1 and XL, FLUX
OPENCLIP_H = CLIPTextConfig(
    width=1024, depth=24, num_heads=16, hidden=4096, activation="gelu", projection=1024, pad=0
)  # arXiv:2212.07143
OPENCLIP_H_SD2 = replace(OPENCLIP_H, depth=23, projection=None)  # as transformers' files of Stable Diffusion 2 keep it
OPENCLIP_BIGG = CLIPTextConfig(
    width=1280, depth=32, num_heads=20, hidden=5120, activation="gelu", projection=1280, pad=0
)  # Stable Diffusion XL and 3
CLIP_TINY = CLIPTextConfig(width=32, depth=3, num_heads=2, hidden=64, projection=16)


@dataclass(frozen=True, kw_only=True)
class CLIPTowersConfig:
    """What a system reads prompts with: `towers`, one, or several side by side.

    Tokens are the states after all layers but the last `skip`, through the final norm if `normed`; `skip` 1 is what
    users call clip skip 2. `zero_empty` gives zeros for an empty prompt.
    """

    type: Literal["clip"] = "clip"
    towers: tuple[CLIPTextConfig, ...] = (CLIP_L,)
    skip: int = 0
    normed: bool = True
    zero_empty: bool = False

    @property
    def width(self) -> int:
        return sum(tower.width for tower in self.towers)

    @property
    def pooled_width(self) -> int:
        last = self.towers[-1]
        return last.projection or last.width


SD1_TEXT = CLIPTowersConfig()
SD2_TEXT = CLIPTowersConfig(towers=(OPENCLIP_H,), skip=1)
SDXL_TEXT = CLIPTowersConfig(towers=(CLIP_L, OPENCLIP_BIGG), skip=1, normed=False, zero_empty=True)
SDXL_REFINER_TEXT = CLIPTowersConfig(towers=(OPENCLIP_BIGG,), skip=1, normed=False)


@dataclass(frozen=True)
class CLIPStates:
    """`hidden` are the states before the first layer and after each, none normed; `last` is the last of them after the
    final norm; `pooled` is `last` at EOT, projected where the model has a projection."""

    hidden: tuple[Tokens, ...]
    last: Tokens
    pooled: Float[Tensor, "b p"]


class CLIPText(nn.Module):
    """One class for CLIP's and OpenCLIP's text towers of any size."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = None
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)
        if not self.text_model.final_layer_norm.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The deviations of OpenAI's program; biases start at zero."""
        width, depth = self.config.width, self.config.depth
        residual = width**-0.5 * (2 * depth) ** -0.5
        deviations = {"out_proj": residual, "fc1": (2 * width) ** -0.5, "fc2": residual}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviations.get(name.rpartition(".")[2], width**-0.5))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)

    def forward(self, ids: Int[Tensor, "b l"]) -> CLIPStates:
        """`ids` with both marks, at most `context` of them, filled up with `pad`."""
        hidden = self.text_model(ids)
        last = self.norm(hidden[-1])
        pooled = last[torch.arange(len(ids), device=ids.device), self.eot_positions(ids)]  # b d
        return CLIPStates(hidden, last, pooled if self.text_projection is None else self.text_projection(pooled))

    def norm(self, states: Tokens) -> Tokens:
        return self.text_model.final_layer_norm(states)

    def eot_positions(self, ids: Tensor) -> Tensor:
        """Where the first EOT of every text is (b,)."""
        return (ids if self.config.eot is None else (ids == self.config.eot).int()).argmax(dim=-1)


class CLIPTextEncoder(CLIPText):
    """A tower with its tokenizer: prompts -> Conditioning. Its weights have the names of `CLIPText`; `skip` and
    `normed` are those of `CLIPTowersConfig`."""

    def __init__(self, config: CLIPTextConfig, tokenizer: CLIPTokenizer, *, skip: int = 0, normed: bool = True) -> None:
        super().__init__(config if config.eot is not None else replace(config, eot=tokenizer.eot))
        if not 0 <= skip <= config.depth:
            raise UsageError(f"skip={skip}: the text encoder has {config.depth} layers")
        if tokenizer.size > config.vocabulary or self.config.eot != tokenizer.eot:
            raise UsageError(
                f"the tokenizer has {tokenizer.size} ids and EOT {tokenizer.eot}, the text encoder "
                f"{config.vocabulary} and {self.config.eot}: they are not of one model"
            )
        self.tokenizer, self.skip, self.normed = tokenizer, skip, normed
        self.learned: dict[str, list[int]] = {}

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "b l"]:
        """Prompts between their marks, filled up or cut to `context`, as captions are in training."""
        return self.marked([[i for _, ids in self.pieces(prompt) for i in ids] for prompt in prompts])

    def marked(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "b l"]:
        """Ids between their marks, filled up or cut to `context`."""
        context, bot, eot = self.config.context, self.tokenizer.bot, self.tokenizer.eot
        marked = [[bot, *ids[: context - 2], eot] for ids in rows]
        return torch.tensor([row + [self.config.pad] * (context - len(row)) for row in marked])

    def pieces(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The parts of a prompt with their ids: each word of `learned` (a name in lower case -> its ids), which may
        begin with "embedding:", and what lies between."""
        if not self.learned:
            return [(prompt, self.tokenizer.encode([prompt], marked=False)[0])]
        names = "|".join(re.escape(name) for name in sorted(self.learned, key=len, reverse=True))
        file = f"(?:{'|'.join(map(re.escape, ENDINGS))})?"
        parts = re.split(rf"(?:\bembedding:)?(?<!\w)({names})(?!\w){file}", prompt, flags=re.IGNORECASE)
        known = [self.learned.get(part.lower()) if i % 2 else None for i, part in enumerate(parts)]
        words = iter(
            self.tokenizer.encode([p for p, ids in zip(parts, known, strict=True) if ids is None], marked=False)
        )
        return [(part, next(words) if ids is None else ids) for part, ids in zip(parts, known, strict=True)]

    def encode(self, prompts: list[str]) -> Conditioning:
        """Token states and the pooled vectors, without a mask: published networks were trained to attend to all tokens,
        those after EOT too."""
        tokens, pooled = self.states(self.tokenize(prompts), self.skip)
        return Conditioning(tokens=tokens, pooled=pooled)

    def states(self, ids: Int[Tensor, "b l"], skip: int) -> tuple[Tokens, Float[Tensor, "b p"]]:
        """The states after all layers but the last `skip`, and the pooled vectors."""
        states = self(sent(ids, self.text_model.final_layer_norm.weight.device))
        tokens = states.hidden[-1 - skip]
        return self.norm(tokens) if self.normed else tokens, states.pooled

    def chunks(self, text: Text, dialect: Dialect) -> list[Chunk]:
        """The tokens of a text in chunks that fit between the marks, at least one; every BREAK ends a chunk."""
        size, comma = self.config.context - 2, self.tokenizer.comma if dialect == "a1111" else None
        chunks: list[Chunk] = []
        for section in text:
            found = self.parts(section, dialect)
            runs = [[(token, weight) for token in ids] for ids, _, weight in found]
            short = LONG_WORD if dialect == "comfyui" else 0  # ComfyUI parts no word of few tokens, A1111 none learned
            solid = [len(ids) < short or said.lower() in self.learned for ids, said, _ in found]
            chunks += chunked(runs, size, comma, solid) or [()]
        return chunks[:-1] if len(text) > 1 and not chunks[-1] else chunks

    def parts(self, section: Sequence[Piece], dialect: Dialect) -> list[tuple[list[int], str, float]]:
        """The `pieces` of a section, (ids, words, weight): ComfyUI reads it word by word."""
        words = [(word, p.weight) for p in section for word in (p.text.split() if dialect == "comfyui" else [p.text])]
        return [(ids, said, weight) for text, weight in words for said, ids in self.pieces(text)]

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[Chunk]], dialect: Dialect, skip: int) -> tuple[list[Tensor], Tensor]:
        """Weighted states of every row, its chunks one after another (chunks * context, d), and the pooled vectors of
        their first chunks (b, p), which have no weight."""
        every = dict.fromkeys(chunk for row in rows for chunk in row)
        if dialect == "comfyui" and any(map(_weighs, every)):
            every[()] = None
        place = {chunk: k for k, chunk in enumerate(every)}
        ids = self.marked([[token for token, _ in chunk] for chunk in every])
        parts = [self.states(some, skip) for some in ids.split(AT_ONCE)]
        plain, pooled = (torch.cat(some) for some in zip(*parts, strict=True))
        states = dict(zip(every, plain, strict=True))  # l d each
        for chunk in filter(_weighs, every):
            weights = plain.new_ones(self.config.context, 1)
            weights[1 : 1 + len(chunk), 0] = weights.new_tensor([weight for _, weight in chunk])
            if dialect == "a1111":
                states[chunk] = emphasised(states[chunk], weights)
            else:
                states[chunk] = torch.lerp(states[()], states[chunk], weights)
        return [torch.cat([states[chunk] for chunk in row]) for row in rows], pooled[[place[row[0]] for row in rows]]


class CLIPTowers(nn.ModuleList):
    """One tower, or several side by side: states joined along the width, `pooled` from the last (SDXL)."""

    dialects = DIALECTS

    def __init__(self, config: CLIPTowersConfig, tokenizers: Sequence[CLIPTokenizer]) -> None:
        super().__init__(
            CLIPTextEncoder(tower, tokenizer, skip=config.skip, normed=config.normed)
            for tower, tokenizer in zip(config.towers, tokenizers, strict=True)
        )
        self.zero_empty = config.zero_empty
        first = config.towers[0]
        self.left_out = int((first.width, first.depth) == (OPENCLIP_H_SD2.width, OPENCLIP_H_SD2.depth))
        self.clip_skip = 1 + config.skip + self.left_out
        """The layer whose states are taken, counted from the last as A1111 and ComfyUI do; SD2's files may lack it."""
        self.clip_skips = range(1 + self.left_out, min(tower.depth for tower in config.towers) + self.left_out + 1)

    @property
    def learned(self) -> frozenset[str]:
        """The names, in lower case, of words that adapters taught."""
        return frozenset(name for tower in self for name in tower.learned)  # type: ignore[union-attr]

    def encode(self, prompts: list[str]) -> Conditioning:
        towers = [tower.encode(prompts) for tower in self]  # type: ignore[operator]
        tokens, pooled = torch.cat([tower.tokens for tower in towers], dim=-1), towers[-1].pooled
        if self.zero_empty:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=tokens.device)
            tokens, pooled = tokens * said[:, None, None], pooled * said[:, None]
        return Conditioning(tokens=tokens, pooled=pooled)

    @torch.no_grad()
    def read(
        self, groups: Sequence[Sequence[Text]], dialect: Dialect, clip_skip: int | None, zero: bool = True
    ) -> Conditioning:
        """A row for each text of each group. The texts of a group get as many chunks as the longest, with empty ones
        (A1111), or keep their own (ComfyUI); where rows differ, the rest is zeros that the mask hides. `pooled` is that
        of the first chunk.

        A1111's weights multiply a chunk's states, whose mean is then restored; ComfyUI's go from the states of the
        empty prompt through the state at the same place. `zero` False reads empty prompts as any. Raises UsageError for
        a clip skip not in `clip_skips`.
        """
        skip = self.checked(clip_skip) - 1 - self.left_out
        chunks = {text: [tower.chunks(text, dialect) for tower in self] for group in groups for text in group}  # type: ignore[operator]
        texts = [text for group in groups for text in group]
        own = {text: max(map(len, some)) for text, some in chunks.items()}
        counts = [own[t] if dialect == "comfyui" else max(own[u] for u in group) for group in groups for t in group]
        sides = []
        for k, tower in enumerate(self):
            rows = [[*chunks[t][k], *[()] * (n - len(chunks[t][k]))] for t, n in zip(texts, counts, strict=True)]
            side, pooled = tower.read(rows, dialect, skip)  # type: ignore[operator]
            sides.append(side)
        tokens = [torch.cat(row, dim=-1) for row in zip(*sides, strict=True)]  # l d
        if self.zero_empty and zero:
            said = [any(piece.text for section in text for piece in section) for text in texts]
            tokens = [states * known for states, known in zip(tokens, said, strict=True)]
            pooled = pooled * pooled.new_tensor(said)[:, None]
        lengths = torch.tensor([len(row) for row in tokens])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return Conditioning(
            tokens=nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            mask=None if mask.all() else mask.to(pooled.device),
            pooled=pooled,
        )

    def checked(self, clip_skip: int | None) -> int:
        """This clip skip, or the model's own for None. Raises UsageError for one that its layers do not allow."""
        if clip_skip is not None and clip_skip not in self.clip_skips:
            low, high = self.clip_skips[0], self.clip_skips[-1]
            raise UsageError(
                f"clip skip is {clip_skip}: this model's text encoder can stop {low} to {high} from its end"
            )
        return self.clip_skip if clip_skip is None else clip_skip

    def words_cut(self, prompt: str) -> str:
        return ""  # chunks hold any number

    def words_unknown(self, prompt: str) -> str:
        return ""  # tokens are made of bytes, so every word has some


def emphasised(states: Tokens, weights: Tensor) -> Tokens:
    """States (l, d) times weights (l, 1), with the mean that all of them had before."""
    weighted = states * weights
    ratio = states.mean() / weighted.mean()
    return weighted * ratio if ratio.isfinite() else weighted


def _weighs(chunk: Chunk) -> bool:
    return any(weight != 1 for _, weight in chunk)


class TextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config, causal=True) for _ in range(config.depth))})
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        hidden = [self.embeddings(ids)]
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            hidden.append(layer(hidden[-1]))  # b l d
        return tuple(hidden)


class Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = embedding(config.vocabulary, config.width)
        self.position_embedding = embedding(config.context, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
