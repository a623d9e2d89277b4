"""FLUX.1, by configuration: dev, schnell, Krea and Kontext, Fill, and the models that follow edges or depth.

Black Forest Labs published code and weights in 2024, and a description with FLUX.1 Kontext, arXiv:2506.15742 (section
2). A rectified-flow transformer as Stable Diffusion 3's (arXiv:2403.03206): text and image tokens attend to each other,
first with weights of their own (double blocks), then with the same (single blocks, whose attention and MLP run side by
side, arXiv:2302.05442), and time, guidance and the pooled prompt modulate every block. Unusual: the scale of guidance
is an input (distillation, arXiv:2210.03142), so that one evaluation does; positions are rotary over three axes, of
which the first tells a picture to look at from the one that is drawn; padding in the text is attended to, as it was in
training. Names are those of the published files, which therefore load as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn.embeddings import sinusoid
from limner.nn.fused import gated, modulate, turned, turns
from limner.nn.linear import Linear
from limner.types import Conditioning

PATCH = 2
"""Latents a token, along each side."""
TABLES = 4
"""Tables of positions that are kept."""
FREQUENCIES = 256
"""Sinusoids of the time, and of the scale of guidance."""


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """`in_channels` and `out_channels` are those of tokens, four times those of latents. Tokens have `width`, blocks
    `num_heads` heads and MLPs `mlp_ratio` times as wide; after the double blocks come `depth_single` single ones.
    `text_width` is that of T5's tokens, `pooled_width` that of CLIP's vector; `theta` is the base of the positions'
    angles."""

    type: Literal["flux"] = "flux"
    in_channels: int = 64
    out_channels: int = 64
    width: int = 3072
    depth: int = 19
    """Double blocks."""
    depth_single: int = 38
    num_heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    """How much of a head's width turns with each axis of a position: picture, row, column."""
    theta: int = 10_000
    text_width: int = 4096
    pooled_width: int = 768
    mlp_ratio: float = 4.0
    guidance_embedded: bool = True
    """Whether it is told `cond.guidance`."""

    @property
    def patch(self) -> int:
        """Side in latents of what becomes a token."""
        return PATCH

    @property
    def latents_in(self) -> int:
        """Channels of latents and of what comes beside them."""
        return self.in_channels // PATCH**2

    def sees(self, latent_channels: int) -> Literal["", "hint", "mask"]:
        """What comes beside latents of so many channels: nothing, latents of a picture to follow, or latents of the
        picture around a mask and all pixels of that, as channels."""
        beside = self.latents_in - latent_channels
        return "" if not beside else "hint" if beside == latent_channels else "mask"

    @property
    def hidden(self) -> int:
        """Width of the MLPs."""
        return int(self.width * self.mlp_ratio)


FLUX_DEV = FluxConfig()  # 11,901M parameters; Krea and Kontext too
FLUX_SCHNELL = FluxConfig(guidance_embedded=False)  # 11,891M; four steps
FLUX_FILL = FluxConfig(in_channels=384)  # 11,902M; beside the latents, those of the picture around a mask, and the mask
FLUX_CONTROL = FluxConfig(in_channels=128)  # 11,902M; Canny and Depth: beside the latents, those of edges or of depth

FLUX_TINY = FluxConfig(width=64, depth=2, depth_single=3, num_heads=4, axes=(4, 6, 6), text_width=32, pooled_width=24)


class Residuals(NamedTuple):
    """What a second network adds to the image tokens (b, n, d), n of the picture that is drawn: after double blocks and
    after single ones. Fewer than there are blocks are spread over them, see `spread`; those after double blocks in
    turns if `cycled`."""

    double: Sequence[Tensor] = ()
    single: Sequence[Tensor] = ()
    cycled: bool = False

    @staticmethod
    def sum(parts: Sequence[Residuals], config: FluxConfig) -> Residuals:
        """Of several networks at once, each of which may add after as many blocks as it likes."""
        if not (alike := len({(len(p.double), len(p.single), p.cycled) for p in parts}) == 1):
            parts = [
                Residuals(spread(p.double, config.depth, p.cycled), spread(p.single, config.depth_single))
                for p in parts
            ]
        rows = ([p.double for p in parts], [p.single for p in parts])
        double, single = (
            tuple(sum(same[1:], same[0]) for same in zip(*[row for row in some if row], strict=True)) for some in rows
        )
        return Residuals(double, single, cycled=alike and parts[0].cycled)


def spread(made: Sequence[Tensor], depth: int, cycled: bool = False) -> list[Tensor]:
    """One for each of `depth` blocks: as many neighbours share one as must, of which the last may go unused, as in
    diffusers; or all take turns."""
    if cycled:
        return [made[i % len(made)] for i in range(depth)] if made else []
    share = -(-depth // max(len(made), 1))
    return [made[i // share] for i in range(depth)] if made else []


class Streams(nn.Module):
    """What FLUX is but for its output, and a ControlNet of it too."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        width = config.width
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = EmbeddingMLP(FREQUENCIES, width)
        self.vector_in = EmbeddingMLP(config.pooled_width, width)
        self.guidance_in = EmbeddingMLP(FREQUENCIES, width) if config.guidance_embedded else None
        self.txt_in = Linear(config.text_width, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single))
        self.modulations: list[nn.Linear] = [module.lin for module in self.modules() if isinstance(module, Modulation)]
        """All that make something of the time, in the order in which they are asked."""
        self.tables: dict[Any, Tensor] = {}
        """Of the sizes drawn last."""

    def reset_parameters(self) -> None:
        """Xavier for matrices, zero for biases; every block starts as the identity (adaLN-zero, arXiv:2212.09748)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in self.modulations:
            nn.init.zeros_(linear.weight)

    def asked_once(self) -> list[nn.Module]:
        """What is not asked again after `times` and `tell`: more than a quarter of all weights."""
        told = (self.time_in, self.vector_in, self.guidance_in, self.txt_in, *self.modulations)
        return [module for module in told if module is not None]

    def embed(self, t: Tensor, cond: Conditioning) -> Tensor:
        """What every modulation is told of the time, the guidance and the pooled prompt (b, d), after the SiLU that all
        of them begin with."""
        assert cond.pooled is not None, "the network wants cond.pooled"
        dtype = self.img_in.weight.dtype
        vec = self.time_in(sinusoid(1000 * t.float(), FREQUENCIES).to(dtype)) + self.vector_in(cond.pooled)
        if self.guidance_in is not None:
            assert cond.guidance is not None, "the network wants cond.guidance"
            vec = vec + self.guidance_in(cond.guidance.to(dtype))
        return F.silu(vec)

    def told(self, t: Tensor, cond: Conditioning) -> Iterator[Tensor]:
        """What each of `modulations` makes (b, k d) of times t (b,), or of what `times` made of them (b, n)."""
        if t.ndim == 2:
            return iter(t.split([linear.out_features for linear in self.modulations], dim=1))
        vec = self.embed(t, cond)
        return iter([linear(vec) for linear in self.modulations])

    def times(self, t: Tensor, rows: int, cond: Conditioning) -> Tensor:
        """All modulations at each of the times t (k,), side by side: (k, rows, n). A drawing makes it once, and
        `forward` takes a time of it (rows, n) in place of times."""
        told = Conditioning(pooled=cond.pooled, guidance=cond.guidance).map(lambda v: v.repeat(len(t), 1))
        vec = self.embed(t.repeat_interleave(rows), told)
        return torch.cat([linear(vec) for linear in self.modulations], dim=1).unflatten(0, (len(t), rows))

    def tell(self, cond: Conditioning) -> None:
        """Keep in `cond` what every evaluation would make of it alone: its words, projected."""
        self.words(cond)

    def words(self, cond: Conditioning) -> Tensor:
        """(b, l, d)."""
        assert cond.tokens is not None, "the network wants cond.tokens"
        return cond.keep(self.txt_in, partial(self.txt_in, cond.tokens))

    def table(self, text: int, pictures: Sequence[Tensor]) -> Tensor:
        """`rope_table` of so many words and of latents (b, c, h, w), in their order; the last few are kept."""
        sizes = tuple((x.shape[-2] // PATCH, x.shape[-1] // PATCH) for x in pictures)
        key = (text, sizes, pictures[0].device)
        made = self.tables.get(key)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = rope_table(positions(*key), self.config.axes, self.config.theta)
            self.tables = dict([*self.tables.items(), (key, made)][-TABLES:])
        return made


class Flux(Streams):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        self.final_layer = LastLayer(config)
        self.modulations.append(self.final_layer.modulation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The output starts at zero too."""
        super().reset_parameters()
        nn.init.zeros_(self.final_layer.linear.weight)

    def together(self, parts: Sequence[Residuals]) -> Residuals:
        """What several networks add at once."""
        return Residuals.sum(parts, self.config)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        residuals: Residuals | None = None,
        reference: Sequence[Tensor] = (),
    ) -> Tensor:
        """Latents (b, c, h, w) of even sides at times t (b,) in [0, 1], 1 is noise -> velocity, from data to noise (b,
        c, h, w). What `times` made of a time (b, n) will do in its place.

        Of `cond`, `tokens` are T5's (Redux: and those of a picture, behind), `pooled` is CLIP's, `guidance` is what
        `guidance_embedding` makes. What comes with x are channels of it, after the first: for Fill the latents of the
        picture around the mask, and the mask, 8 x 8 pixels a latent as 64 channels, row by row; for Canny and Depth the
        latents of those. `reference` are latents of pictures to look at, each (b, c, h, w) or (1, c, h, w) of any size
        (Kontext).
        """
        told = self.told(t, cond)
        pictures = [x, *(picture.expand(len(x), -1, -1, -1) for picture in reference)]
        drawn = x.shape[-2] * x.shape[-1] // PATCH**2  # tokens
        img = self.img_in(torch.cat([patches(picture) for picture in pictures], dim=1))  # b n d
        txt = self.words(cond)  # b l d
        table = self.table(txt.shape[1], pictures)
        residuals = residuals or Residuals()

        double = spread(residuals.double, self.config.depth, residuals.cycled)
        for block, added in itertools.zip_longest(self.double_blocks, double):
            img, txt = block(img, txt, next(told), next(told), table)
            if added is not None:
                img[:, :drawn].add_(added)

        words, tokens = txt.shape[1], torch.cat([txt, img], dim=1)  # b (l + n) d
        single = spread(residuals.single, self.config.depth_single)
        for block, added in itertools.zip_longest(self.single_blocks, single):
            tokens = block(tokens, next(told), table)
            if added is not None:
                tokens[:, words : words + drawn].add_(added)

        out = self.final_layer(tokens[:, words : words + drawn], next(told))
        h = x.shape[-2] // PATCH
        return rearrange(out, "b (h w) (c i j) -> b c (h i) (w j)", h=h, i=PATCH, j=PATCH)


def patches(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, n, 4 c)."""
    return rearrange(x, "b c (h i) (w j) -> b (h w) (c i j)", i=PATCH, j=PATCH)


# ---------------------------------------------------------------------- blocks


class DoubleStreamBlock(nn.Module):
    """Text and image with weights of their own, which meet in attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.img_mod, self.txt_mod = Modulation(config.width, 6), Modulation(config.width, 6)
        self.img_attn, self.txt_attn = SelfAttention(config), SelfAttention(config)
        self.img_mlp, self.txt_mlp = mlp(config), mlp(config)

    def forward(self, img: Tensor, txt: Tensor, of_img: Tensor, of_txt: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """`of_img` and `of_txt` are what the two modulations make."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = parts_of(of_img, 6)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = parts_of(of_txt, 6)
        of_img = self.img_attn.qkv(modulate(img, img_shift1, img_scale1))
        of_txt = self.txt_attn.qkv(modulate(txt, txt_shift1, txt_scale1))
        attended = attend([(of_txt, self.txt_attn.norm), (of_img, self.img_attn.norm)], self.num_heads, table)
        to_txt, to_img = attended.split([txt.shape[1], img.shape[1]], dim=1)

        img = gated(img, img_gate1, self.img_attn.proj(to_img))
        img = gated(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = gated(txt, txt_gate1, self.txt_attn.proj(to_txt))
        txt = gated(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, within_half(txt)


class SingleStreamBlock(nn.Module):
    """Attention and MLP of the same input, over all tokens; one matrix goes in and one out (arXiv:2302.05442)."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.widths = [3 * config.width, config.hidden]
        self.linear1 = Linear(config.width, sum(self.widths))
        self.linear2 = Linear(config.width + config.hidden, config.width)
        self.norm = QKNorm(config.width // config.num_heads)
        self.modulation = Modulation(config.width, 3)

    def forward(self, x: Tensor, told: Tensor, table: Tensor) -> Tensor:
        """`told` is what the modulation makes."""
        shift, scale, gate = parts_of(told, 3)
        qkv, hidden = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        attended = attend([(qkv, self.norm)], self.num_heads, table)
        made = torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1)
        return within_half(gated(x, gate, self.linear2(made)))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))

    @property
    def modulation(self) -> Any:
        return self.adaLN_modulation[1]

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale = parts_of(told, 2)
        return self.linear(modulate(x, shift, scale))


class Modulation(nn.Module):
    """Shifts, scales and gates of a block, `count` in all."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.lin = Linear(width, count * width)


def parts_of(told: Tensor, count: int) -> tuple[Tensor, ...]:
    """Each (b, 1, d) of (b, count d)."""
    return told[:, None].chunk(count, dim=-1)


def within_half(x: Tensor) -> Tensor:
    """x, cut where float16 ends: some tokens grow larger in FLUX.1, and would be infinite (diffusers cuts too)."""
    return x.clamp_(-65504, 65504) if x.dtype == torch.float16 else x


def mlp(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        Linear(config.width, config.hidden), nn.GELU(approximate="tanh"), Linear(config.hidden, config.width)
    )


# ------------------------------------------------------------------- attention


class SelfAttention(nn.Module):
    """What comes before attention, and after."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.width, 3 * config.width)
        self.norm = QKNorm(config.width // config.num_heads)
        self.proj = Linear(config.width, config.width)


class QKNorm(nn.Module):
    """Queries and keys of one length, which keeps attention from growing sharp (arXiv:2302.05442, section 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, 3 d) -> three of (b, n, heads, head width)."""
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
        return self.query_norm(q), self.key_norm(k), v


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467), in float32 whatever x is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, 1e-6)


def attend(parts: Sequence[tuple[Tensor, QKNorm]], num_heads: int, table: Tensor) -> Tensor:
    """All to all, where each is: of sequences behind each other what makes queries, keys and values (b, n, 3 d), and
    how they are normalised -> (b, n, d)."""
    weights = [(qkv, norm.query_norm.scale, norm.key_norm.scale) for qkv, norm in parts]
    if turns(table, *weights):
        q, k, v = turned(table, weights)
    else:
        q, k, v = (torch.cat(same, dim=1) for same in zip(*(norm(qkv, num_heads) for qkv, norm in parts), strict=True))
        q, k = rotate(q, table), rotate(k, table)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------- positions


def positions(text: int, sizes: Sequence[tuple[int, int]], device: torch.device | str) -> Tensor:
    """Picture, row and column of every token (text + n, 3) of so many words and of pictures (rows, columns) large.

    Words are all at 0, and there the first picture begins, the one that is drawn. The others are picture 1 and lie side
    by side: each right of those before or below them, whichever makes the longer side of all the shorter.
    """
    places = [torch.zeros(text, 3, device=device)]
    down = across = 0  # where those that are placed end
    for i, (h, w) in enumerate(sizes):
        top = left = 0
        if i and down + h > across + w:
            left = across
        elif i:
            top = down
        if i:
            down, across = max(down, top + h), max(across, left + w)
        rows, columns = torch.arange(top, top + h, device=device), torch.arange(left, left + w, device=device)
        places.append(F.pad(torch.cartesian_prod(rows, columns).float(), (1, 0), value=float(i > 0)))
    return torch.cat(places)


def rope_table(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Rotary angles (arXiv:2104.09864) of positions (n, axes) -> (2, n, 1, head width): the cosine of every pair twice,
    then its sine with the sign that each of the two takes. Angles are computed in float64 and kept in float32."""
    angles = []
    for place, width in zip(positions.double().unbind(1), axes, strict=True):
        powers = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(place[:, None] / theta**powers)
    turns = torch.cat(angles, dim=1)[:, None]
    cos, sin = turns.cos(), turns.sin()
    pairs = (torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1))
    return torch.stack([pair.flatten(-2) for pair in pairs]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (b, n, heads, e) by `table`, in its precision or in that of x, whichever is
    higher."""
    cos, sin = table
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


# ------------------------------------------------------------------ embeddings


class EmbeddingMLP(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_width, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def guidance_embedding(scale: Tensor) -> Tensor:
    """`cond.guidance`, (b, 256) in float32, of scales (b,) of guidance: 2.5 to 4 for dev, 30 for Fill, 10 for Depth."""
    return sinusoid(1000 * scale.float(), FREQUENCIES)


# ---------------------------------------------------------------------- checks


def check(config: FluxConfig) -> None:
    """Raises UsageError where a configuration contradicts itself."""
    width, heads = config.width, config.num_heads
    if heads < 1 or width < 1 or width % heads:
        raise UsageError(f"width={width} does not divide into num_heads={heads}")
    if len(config.axes) != 3 or sum(config.axes) != width // heads or any(a < 0 or a % 2 for a in config.axes):
        raise UsageError(
            f"axes={config.axes} must be three even numbers that add up to a head's width, {width // heads}"
        )
    if config.in_channels % PATCH**2 or config.out_channels % PATCH**2:
        found = f"in_channels={config.in_channels}, out_channels={config.out_channels}"
        raise UsageError(f"{found}: both are of tokens, and must be in fours")
    if min(config.depth, config.depth_single) < 0 or config.hidden < 1:
        found = f"depth={config.depth}, depth_single={config.depth_single}, mlp_ratio={config.mlp_ratio}"
        raise UsageError(f"{found}: depths are 0 or more, and mlp_ratio is more than 0")
