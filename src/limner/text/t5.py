"""T5's encoder: prompt -> token states, of Stable Diffusion 3 and FLUX.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv:1910.10683, in
its version 1.1, whose MLPs are gated (Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, GEGLU). Positions
are distances alone: a learned number for each head and each bucket of distances is added to what attention weighs
(section 2.1), in the first block, and is the same in all. Unusual: attention is not scaled by 1/√d, the norms are of
roots of mean squares without a bias, nothing has a bias, and a head may have any width. Attribute names are those of
transformers' files.

Half precision: the sum that all blocks add to is kept in float32. In float16 what a gate lets through, and what `wo`
makes of it, go beyond 65504 in T5-XXL, so it is multiplied in float32 and passes `wo` as a 64th. (transformers keeps
`wo` in float32 instead, twice the memory and slower.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn.embeddings import embedding, sent
from limner.nn.linear import Linear
from limner.text.unigram import SPACE, UNKNOWN, T5Tokenizer
from limner.types import Conditioning, Tokens

HEADROOM = 64
"""A power of 2, so that only numbers too small to matter are rounded by it."""
AT_ONCE = 8
"""Texts that go through the encoder together."""


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """`depth` blocks on tokens of `width`, with `num_heads` heads. `hidden` is the width of the MLPs, `head_width` that
    of a head. `vocabulary` counts the pieces of words. Half of `buckets` are for what lies before, half
    for what lies after; distances of `max_distance` and more share the last of each."""

    width: int = 4096
    hidden: int = 10240
    depth: int = 24
    num_heads: int = 64
    head_width: int = 64
    vocabulary: int = 32128
    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if min(self.width, self.hidden, self.depth, self.num_heads, self.head_width, self.vocabulary) < 1:
            raise UsageError(f"{self}: every size must be 1 or more")
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 4:
            raise UsageError(
                f"buckets={self.buckets}, max_distance={self.max_distance}: buckets must be in twos, 4 at least, and "
                "the largest distance more than a quarter of them"
            )


T5_XXL = T5Config()  # 4,762,310,656 parameters: Stable Diffusion 3 and FLUX
T5_TINY = T5Config(width=32, hidden=64, depth=2, num_heads=2, head_width=8)


class T5Encoder(nn.Module):
    """One class for encoders of T5 v1.1 of any size."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocabulary, config.width)
        self.encoder = Stack(config)
        if not self.shared.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The deviations of Mesh TensorFlow, with which T5 was trained: queries are as small as they are since they are
        not scaled later."""
        config = self.config
        inner = config.num_heads * config.head_width
        deviations = {"shared": 1.0, "o": inner**-0.5, "wo": config.hidden**-0.5}
        deviations["q"] = (config.width * config.head_width) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviations.get(name.rpartition(".")[2], config.width**-0.5))

    def forward(self, ids: Int[Tensor, "b l"]) -> Tokens:
        """States of ids (b, l), any number of them, with `pad` where a text has ended: all attend to it too."""
        return self.encoder(self.shared(ids))


class T5TextEncoder(T5Encoder):
    """The encoder with its tokenizer: prompts -> Conditioning. Prompts are filled up, or cut, to `tokens` ids, the mark
    of their end included. Its weights have the names of `T5Encoder`."""

    def __init__(self, config: T5Config, tokenizer: T5Tokenizer, tokens: int = 256) -> None:
        super().__init__(config)
        if tokenizer.size > config.vocabulary:
            raise UsageError(
                f"the tokenizer has {tokenizer.size} ids, T5 {config.vocabulary}: they are not of one model"
            )
        if tokens < 1:
            raise UsageError(f"tokens={tokens}: the mark of the end alone is 1")
        self.tokenizer, self.tokens = tokenizer, tokens

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "b l"]:
        """Prompts with their mark, filled up or cut to `tokens`."""
        return torch.tensor([self.fitted(ids) for ids in self.tokenizer.encode(prompts, marked=False)])

    def fitted(self, ids: Sequence[int]) -> list[int]:
        marked = [*ids[: self.tokens - 1], self.tokenizer.eos]
        return marked + [self.tokenizer.pad] * (self.tokens - len(marked))

    def encode(self, prompts: list[str]) -> Conditioning:
        """Token states (b, tokens, d), without a mask: published networks were trained to attend to padding too."""
        ids = sent(self.tokenize(prompts), self.shared.weight.device)
        return Conditioning(tokens=torch.cat([self(some) for some in ids.split(AT_ONCE)]))

    def words_cut(self, prompt: str) -> str:
        """The end of `prompt` that does not fit, "" when all does."""
        (found,) = self.tokenizer.encodings([prompt])
        return prompt[found.offsets[self.tokens - 1][0] :] if len(found.ids) >= self.tokens else ""

    def words_unknown(self, prompt: str) -> str:
        """The words of `prompt` that have no piece, such as those in Chinese signs; marks of ASCII are no words."""
        words = [word for word in prompt.split() if not word.isascii()]
        found = zip(words, self.tokenizer.encodings(words), strict=True)
        tokens = self.tokenizer.tokenizer
        return " ".join(word for word, row in found if {tokens.id_to_token(i) for i in row.ids} <= {SPACE, UNKNOWN})


class Stack(nn.Module):
    """All blocks and the norm after them."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, biased=i == 0) for i in range(config.depth))
        self.final_layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.block[0].layer[0].SelfAttention.bias(x.shape[1])  # type: ignore[union-attr, index]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.block:
            x = block(x, bias)  # b l d
        return self.final_layer_norm(x)


class Block(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SelfAttentionLayer(config, biased), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, biased)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class SelfAttention(nn.Module):
    """The `biased` one has the numbers of distances that all take."""

    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.head_width
        self.num_heads = config.num_heads
        self.edges = bucket_edges(config.buckets, config.max_distance)
        self.q, self.k, self.v = (Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.width, bias=False)
        if biased:
            self.relative_attention_bias = embedding(config.buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h e) -> b h l e", h=self.num_heads) for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(attended, "b h l e -> b l (h e)"))

    def bias(self, length: int) -> Tensor:
        """What is added for every place (row) and every place it attends to (1, h, l, l)."""
        table = self.relative_attention_bias.weight
        distance = torch.arange(1 - length, length, device=table.device)
        bucket = sum((distance.abs() >= edge).long() for edge in self.edges)
        bucket = bucket + (distance > 0) * (len(self.edges) + 1)
        windows = table[bucket].T.unfold(1, length, 1)  # h l l: the row of the last place, then of those before it
        return windows.flip(1)[None]


class GatedMLP(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.wo = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """In float32 where x is in float16."""
        gate, value = F.gelu(self.wi_0(x), approximate="tanh"), self.wi_1(x)
        if x.dtype != torch.float16:
            return self.wo(gate * value)
        passed = (gate.float() * value / HEADROOM).to(x.dtype)
        return self.wo(passed).float() * HEADROOM


class RMSNorm(nn.Module):
    """Of x in float32 or more; what comes out is of the weight's type."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6).to(self.weight.dtype) * self.weight


def bucket_edges(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Where, of distances to one side, every bucket but the first begins: half of them at 1, 2, 3 and so on, those
    after them further and further from each other (T5's code)."""
    side = buckets // 2
    near = side // 2
    far = (near * (max_distance / near) ** (k / (side - near)) for k in range(1, side - near))
    return (*range(1, near + 1), *(math.ceil(edge - 1e-6) for edge in far))
