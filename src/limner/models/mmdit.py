"""The multimodal diffusion transformer (MMDiT) of Stable Diffusion 3 and 3.5.

Scaling Rectified Flow Transformers, Esser et al., arXiv:2403.03206 (section 4, figure 2): text and image tokens have
weights of their own in every block and attend to each other; time and the pooled prompt shift, scale and gate all that
a block does (adaLN-zero, arXiv:2212.09748); the output is a velocity.
Unusual: the width is 64 x depth; positions are a table of sinusoids for a large square, of which a picture sees the
middle; the last block does not go on with the text; padding of the text is attended to, as the published networks were
trained, so that `cond.mask` is not read. Stable Diffusion 3.5 normalises queries and keys (arXiv:2010.04245), and its
medium network has a second attention, among the image tokens alone, in its first 13 blocks (MMDiT-X). Names are those
of Stability's files, which load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn import fused
from limner.nn.embeddings import sinusoid
from limner.nn.initialization import zero
from limner.nn.linear import Linear
from limner.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Latents of `channels`; `depth` blocks with `num_heads` heads of `head_width`: published networks have as many
    heads as blocks, each 64 wide. `text_width` is that of the text's tokens, `pooled_width` that of its vector; with
    `qk_norm` "rms" queries and keys are normed."""

    type: Literal["mmdit"] = "mmdit"
    channels: int = 16
    patch: int = 2
    """Side in latents of what becomes a token."""
    depth: int = 24
    num_heads: int = 24
    head_width: int = 64
    text_width: int = 4096
    pooled_width: int = 2048
    pos_embed_max: int = 192
    """Side in tokens of the largest picture that there are positions for."""
    base_grid: int = 64
    """Positions of a fresh network run over this many units along that side. No tensor's shape tells it, and what is
    loaded brings its table."""
    qk_norm: Literal["", "rms"] = ""
    dual_blocks: tuple[int, ...] = ()
    """Blocks whose image tokens attend to each other alone besides."""

    @property
    def width(self) -> int:
        return self.num_heads * self.head_width


SD3_MEDIUM = MMDiTConfig()  # 2,028M parameters, and 57M numbers of the table
SD35_MEDIUM = replace(SD3_MEDIUM, pos_embed_max=384, qk_norm="rms", dual_blocks=tuple(range(13)))  # 2,243M + 226M
SD35_LARGE = replace(SD3_MEDIUM, depth=38, num_heads=38, qk_norm="rms")  # 8,057M + 90M; and its turbo
SD3_TINY = MMDiTConfig(
    channels=4,
    depth=2,
    num_heads=2,
    head_width=16,
    text_width=32,
    pooled_width=24,
    pos_embed_max=32,
    base_grid=16,
    qk_norm="rms",
    dual_blocks=(0,),
)


class Trunk(nn.Module):
    """What an MMDiT and a ControlNet for it have alike: what latents, words and times become before the blocks. One may
    not read the words, or work on image tokens that another has made."""

    pos_embed: Tensor
    parts: list[int]
    """Of each of `modulations`; known when all blocks are there."""

    def __init__(self, config: MMDiTConfig, reads_text: bool = True, embeds: bool = True) -> None:
        super().__init__()
        check(config)
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.channels, config.patch, width) if embeds else None
        if embeds:
            self.register_buffer("pos_embed", position_table(width, config.pos_embed_max, config.base_grid))
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = Embedder(config.pooled_width, width)
        self.context_embedder = Linear(config.text_width, width) if reads_text else None

    def reset_parameters(self) -> None:
        """As a DiT (arXiv:2212.09748): Xavier for matrices, zero for biases, and blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for layer in self.modulations():
            zero(layer)

    def embed(self, x: Tensor) -> Tensor:
        """Image tokens (b, n, d) of latents, with their positions: those of the middle of the table."""
        most, patch = self.config.pos_embed_max, self.config.patch
        height, width = (side // patch for side in x.shape[2:])
        assert x.shape[2:] == (height * patch, width * patch), f"latents {tuple(x.shape[2:])} are not in {patch}s"
        assert max(height, width) <= most, f"{height} x {width} tokens, of {most} x {most} that have positions"
        top, left = (most - height) // 2, (most - width) // 2
        positions = self.pos_embed.unflatten(1, (most, most))[:, top : top + height, left : left + width]
        assert self.x_embedder is not None
        return (self.x_embedder(x).unflatten(1, (height, width)) + positions).flatten(1, 2)

    def text(self, cond: Conditioning) -> Tensor:
        """Text tokens (b, l, d)."""
        embedder, tokens = self.context_embedder, cond.tokens
        assert embedder is not None
        assert tokens is not None, "the network wants cond.tokens"
        return cond.keep(embedder, lambda: embedder(tokens))

    def pooled(self, cond: Conditioning) -> Tensor:
        assert cond.pooled is not None, "the network wants cond.pooled"
        return cond.pooled

    def tell(self, cond: Conditioning) -> None:
        """Keep in `cond` what every evaluation would make of it alone: its words as wide as the network."""
        if self.context_embedder is not None:
            self.text(cond)

    def modulations(self) -> list[Modulation]:
        """Those of the text and of the image in each block, and of the output, in this order."""
        return [module for module in self.modules() if isinstance(module, Modulation)]

    def modulated(self, c: Tensor) -> Tensor:
        """What all of them make of c (b, d), side by side (b, n)."""
        return torch.cat([layer(c) for layer in self.modulations()], dim=1)

    def told(self, t: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """Of each of `modulations` what it makes (b, parts, 1, d), of times t (b,) or of what `times` made (b, n)."""
        if t.ndim == 1:
            t = self.modulated(self.t_embedder(t) + self.y_embedder(self.pooled(cond)))
        return t.unflatten(1, (sum(self.parts), 1, self.config.width)).split(self.parts, dim=1)

    def times(self, t: Tensor, rows: int, cond: Conditioning) -> Tensor:
        """What the blocks are told of each of the times t (k,), side by side: (k, rows, n). A drawing makes it once,
        and `forward` takes a time of it (rows, n) in place of times."""
        c = self.t_embedder(t)[:, None] + self.y_embedder(self.pooled(cond))  # k b d
        return self.modulated(c.flatten(0, 1)).unflatten(0, c.shape[:2]).expand(-1, rows, -1)

    def asked_once(self) -> list[nn.Module]:
        """The modules that only `times` and `tell` ask, a third of all parameters: where memory is short they may stay
        elsewhere while steps are drawn."""
        words = [] if self.context_embedder is None else [self.context_embedder]
        return [self.t_embedder, self.y_embedder, *words, *self.modulations()]


class MMDiT(Trunk):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_blocks, ends=i + 1 == config.depth) for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        self.parts = [layer.parts for layer in self.modulations()]
        self.reset_parameters()
        zero(self.final_layer.linear)

    def together(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What several networks add at once, each after as many blocks as it likes."""
        most = len(parts[0]) if len({len(part) for part in parts}) == 1 else self.config.depth
        rows = [[part[int(i / (most / len(part)))] for i in range(most)] for part in parts]
        return [sum(same[1:], same[0]) for same in zip(*rows, strict=True)]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        residuals: Sequence[Tensor] | None = None,
        skip_layers: Sequence[int] = (),
    ) -> Tensor:
        """Latents (b, c, h, w), whose sides are multiples of `patch` and at most `patch` x `pos_embed_max`, at times t
        (b,) in [0, 1], or what `times` made of one (b, n) -> velocity (b, c, h, w), of noise less latents.

        `cond` has `tokens` (b, l, `text_width`) and `pooled` (b, `pooled_width`). `residuals` of a ControlNet, each
        (b, n, d), are added to the image tokens after the blocks, the first of k after the first depth / k of them, and
        so on. `skip_layers` are left out: the network that skip-layer guidance leads away from.
        """
        config = self.config
        told = self.told(t, cond)
        text, image = self.text(cond), self.embed(x)  # b l d, b n d

        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                text, image = block(text, image, told[2 * i], told[2 * i + 1])
            if residuals and i + 1 < config.depth:
                image = image + residuals[int(i / (config.depth / len(residuals)))]

        image = self.final_layer(image, told[-1])
        h = x.shape[2] // config.patch
        return rearrange(image, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=config.patch, q=config.patch)


# ---------------------------------------------------------------------- blocks


class JointBlock(nn.Module):
    """Attention of text and image together, then an MLP for each."""

    def __init__(self, config: MMDiTConfig, dual: bool = False, ends: bool = False) -> None:
        super().__init__()
        self.context_block = Block(config, pre_only=ends)
        self.x_block = Block(config, dual=dual)

    def forward(self, text: Tensor, image: Tensor, of_text: Tensor, of_image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, l, d) and (b, n, d), and what they are told (b, parts, 1, d) -> the same, the text unchanged where
        nothing reads on."""
        told_text, told_image = of_text.unbind(1), of_image.unbind(1)
        words = self.context_block.attn.qkv_of(modulate(text, *told_text[:2]))
        pixels = self.x_block.attn.qkv_of(modulate(image, *told_image[:2]))
        both = attend(*(torch.cat(pair, dim=1) for pair in zip(words, pixels, strict=True)))  # b (l + n) d
        alone = self.x_block.attend_alone(image, told_image)
        seen, mine = both[:, : text.shape[1]].contiguous(), both[:, text.shape[1] :].contiguous()
        if not self.context_block.pre_only:
            text = self.context_block.after(text, seen, told_text)
        return text, self.x_block.after(image, mine, told_image, alone)


class Block(nn.Module):
    """One side of a joint block. It is told shift, scale and gate for its attention, for its MLP, and for its second
    attention if it is `dual`; for the first two alone, without gate, if `pre_only`, when it only is attended to."""

    def __init__(self, config: MMDiTConfig, pre_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        width = config.width
        self.pre_only = pre_only
        self.attn = SelfAttention(config, pre_only)
        self.attn2 = SelfAttention(config) if dual else None
        self.mlp = None if pre_only else MLP(width)
        self.adaLN_modulation = Modulation(width, 2 if pre_only else 9 if dual else 6)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """Without another side: (b, n, d), told (b, 6, 1, d) -> (b, n, d)."""
        parts = told.unbind(1)
        return self.after(x, attend(*self.attn.qkv_of(modulate(x, *parts[:2]))), parts)

    def attend_alone(self, x: Tensor, told: Sequence[Tensor]) -> Tensor | None:
        return None if self.attn2 is None else attend(*self.attn2.qkv_of(modulate(x, *told[6:8])))

    def after(self, x: Tensor, attended: Tensor, told: Sequence[Tensor], alone: Tensor | None = None) -> Tensor:
        assert self.mlp is not None
        x = fused.gated(x, told[2], self.attn.proj(attended))
        if self.attn2 is not None and alone is not None:
            x = fused.gated(x, told[8], self.attn2.proj(alone))
        return fused.gated(x, told[5], self.mlp(modulate(x, *told[3:5])))


class SelfAttention(nn.Module):
    def __init__(self, config: MMDiTConfig, pre_only: bool = False) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_width)
        self.qkv = Linear(config.width, 3 * config.width)
        if not pre_only:
            self.proj = Linear(config.width, config.width)
        self.normed = config.qk_norm == "rms"
        if self.normed:
            self.ln_q = nn.RMSNorm(config.head_width, eps=1e-6)
            self.ln_k = nn.RMSNorm(config.head_width, eps=1e-6)

    def qkv_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, d) -> queries, keys and values (b, n, heads, e)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.heads)).unbind(2)
        if self.normed:
            q, k = self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype)
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each (b, n, heads, e) -> (b, n, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.width, config.patch**2 * config.channels)
        self.adaLN_modulation = Modulation(config.width, 2)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.linear(modulate(x, *told.unbind(1)))


class Modulation(nn.Sequential):
    """c (b, d) -> (b, parts d): shift, 1 + scale and gate of each thing that is modulated; two parts have no gate."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), Linear(width, parts * width))
        self.parts = parts

    def forward(self, c: Tensor) -> Tensor:
        made = super().forward(c).unflatten(1, (self.parts, -1))
        made[:, 1::3].add_(1)
        return made.flatten(1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x, normalised; `scale` is 1 more than what published networks call so."""
    return fused.modulate(x, shift, scale, plus=0.0)


# ------------------------------------------------------------------ embeddings


class PatchEmbed(nn.Module):
    """Latents (b, c, h, w) -> tokens (b, n, d): a convolution whose patches do not overlap is one matrix product."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Embedder(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(in_width, width), nn.SiLU(), Linear(width, width))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class TimeEmbedder(Embedder):
    """Of t (b,) in [0, 1], of which published networks are told 1000 t."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__(frequencies, width)
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(sinusoid(1000 * t.float(), self.frequencies).to(self.dtype))


def position_table(width: int, side: int, units: int) -> Tensor:
    """Sinusoids (1, side², width) of the places in a square: sines and cosines of the column, then of the row, both
    running over so many units from 0."""
    if torch.get_default_device().type == "meta":  # where sinusoids import a compiler, for seconds
        return torch.empty(1, side**2, width)
    places = torch.arange(side, dtype=torch.float64) * units / side
    frequencies = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = places[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # side, width / 2
    row, column = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)[None]


# ---------------------------------------------------------------------- checks


def check(config: MMDiTConfig) -> None:
    """Raises UsageError where a configuration contradicts itself."""
    for name in (
        "channels",
        "patch",
        "depth",
        "num_heads",
        "head_width",
        "text_width",
        "pooled_width",
        "pos_embed_max",
    ):
        if getattr(config, name) < 1:
            raise UsageError(f"{name}={getattr(config, name)}: it must be 1 or more")
    if config.width % 4:
        raise UsageError(
            f"num_heads={config.num_heads} x head_width={config.head_width} is not in fours (two-dimensional sinusoids)"
        )
    if any(not 0 <= i < config.depth for i in config.dual_blocks):
        raise UsageError(f"dual_blocks={config.dual_blocks}: of depth={config.depth} blocks, the first is 0")
