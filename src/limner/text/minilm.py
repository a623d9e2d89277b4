"""all-MiniLM-L6-v2: prompt -> token states and a sentence vector.

A six-layer BERT (Devlin et al., arXiv:1810.04805), distilled (MiniLM, arXiv:2002.10957) and trained to place sentences
of like meaning together. The weights ship with the package in 8 bits (its word table in 4), Apache-2.0; attribute names
are those of the published file. WordPiece tokens through the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.nn.embeddings import embedding, sent
from limner.text.prompts import Dialect, Text
from limner.types import Conditioning

if TYPE_CHECKING:
    from tokenizers import Encoding

WIDTH, DEPTH, HEADS, HIDDEN, VOCABULARY, POSITIONS = 384, 6, 12, 1536, 30522, 512
PADDING = 0
MOST_KNOWN = 500_000
"""Prompts whose tokens are remembered: training meets the same captions again and again."""


class MiniLM(nn.Module):
    """`max_tokens` bounds a prompt, [CLS] and [SEP] included; what is longer is cut at the end."""

    dialects: tuple[Dialect, ...] = ("plain",)
    clip_skip = None
    learned: frozenset[str] = frozenset()

    def __init__(self, tokenizer: Path, max_tokens: int = 24) -> None:
        super().__init__()
        from tokenizers import Tokenizer

        self.max_tokens = max_tokens
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.known: dict[str, list[int]] = {}
        self.embeddings = Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(DEPTH))})

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """ids (b, max_tokens) and a mask that is True on real tokens."""
        known = self.known  # by this name nothing goes away, whatever other threads do
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if len(known) + len(new) > MOST_KNOWN:
            known, new = {}, list(dict.fromkeys(prompts))
            self.known = known
        known.update(zip(new, map(self._fitted, self.tokenizer.encode_batch(new)), strict=True))
        ids = torch.tensor([known[prompt] for prompt in prompts])
        return ids, ids != PADDING

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token states (b, l, 384)."""
        x = self.embeddings(ids)
        for layer in self.encoder["layer"]:  # type: ignore[attr-defined]
            x = layer(x, mask)
        return x

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Token states, their mask, and as `pooled` the unit sentence vectors (b, 384), scaled to unit variance."""
        device = self.embeddings.word_embeddings.weight.device
        ids, mask = (sent(tensor, device) for tensor in self.tokenize(prompts))
        states = self(ids, mask)
        return Conditioning(tokens=states, mask=mask, pooled=sentence(states, mask) * WIDTH**0.5)

    def read(self, groups: Sequence[Sequence[Text]], dialect: Dialect, clip_skip: int | None) -> Conditioning:
        """A row for each text of each group, without weights: there is one dialect, and no layer to skip."""
        texts = ["".join(piece.text for section in text for piece in section) for group in groups for text in group]
        unique = list(dict.fromkeys(texts))
        return self.encode(unique).map(lambda value: value[[unique.index(text) for text in texts]])

    @torch.no_grad()
    def sentences(self, texts: list[str], batch: int = 512) -> Tensor:
        """Unit sentence vectors (n, 384) on the CPU: cosine similarity is closeness of meaning."""
        parts = [self.encode(texts[i : i + batch]).pooled for i in range(0, len(texts), batch)]
        return torch.cat([F.normalize(part, dim=-1).cpu() for part in parts if part is not None])

    def words_cut(self, prompt: str) -> str:
        """The end of `prompt` that does not fit, "" when all does."""
        encoded = self.tokenizer.encode(prompt)
        if len(encoded.ids) <= self.max_tokens:
            return ""
        return prompt[encoded.offsets[self.max_tokens - 1][0] :]

    def words_unknown(self, prompt: str) -> str:
        """The words of `prompt` without a letter or digit of English, which have no token or only foreign letters."""
        unknown, words = [], prompt.split()
        for word, encoded in zip(words, self.tokenizer.encode_batch(words), strict=True):
            tokens = [token.strip("#") for token in encoded.tokens[1:-1]]
            english = any(token.isascii() and token.isalnum() for token in tokens)
            if not english and any(token == "[UNK]" or token.isalpha() for token in tokens):
                unknown.append(word)
        return " ".join(unknown)

    def _fitted(self, encoded: Encoding) -> list[int]:
        """The ids of a prompt, cut before [SEP] or filled up with padding to `max_tokens`. Not by the tokenizer, whose
        state all threads share."""
        ids = encoded.ids
        if len(ids) > self.max_tokens:
            ids = [*ids[: self.max_tokens - 1], ids[-1]]
        return [*ids, *[PADDING] * (self.max_tokens - len(ids))]


def sentence(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens' states, at unit length (b, d)."""
    weight = mask[..., None].to(states.dtype)
    return F.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [embedding(rows, WIDTH) for rows in (VOCABULARY, POSITIONS, 2)]
        self.word_embeddings, self.position_embeddings, self.token_type_embeddings = tables
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        return self.LayerNorm(x + self.position_embeddings.weight[: ids.shape[1]])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict(
                    {"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)}
                ),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, HIDDEN)})
        self.output = nn.ModuleDict({"dense": nn.Linear(HIDDEN, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        project = self.attention["self"]
        q, k, v = (
            rearrange(project[name](x), "b l (h e) -> b h l e", h=HEADS)  # type: ignore[index]
            for name in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        out = self.attention["output"]
        x = out["LayerNorm"](x + out["dense"](rearrange(attended, "b h l e -> b l (h e)")))  # type: ignore[index]
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))
