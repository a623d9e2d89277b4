"""Adapters of every kind in every spelling, filled with noise, and what they make of a weight, worked out by loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=generator)


# ----------------------------------------------------------------- the files


def lora(w: Tensor, g: torch.Generator, rank: int = 3) -> Tensors:
    o, i, *k = w.shape
    ones = [1] * len(k)
    return {
        "lora_down.weight": noise(g, rank, i, *k), "lora_up.weight": noise(g, o, rank, *ones),
        "alpha": torch.tensor(2.0),
    }  # fmt: skip


def lora_core(w: Tensor, g: torch.Generator) -> Tensors:
    o, i, *k = w.shape
    return {
        "lora_down.weight": noise(g, 3, i, 1, 1), "lora_mid.weight": noise(g, 3, 3, *k),
        "lora_up.weight": noise(g, o, 3, 1, 1), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def dora(w: Tensor, g: torch.Generator) -> Tensors:
    return lora(w, g) | {"dora_scale": 1 + noise(g, len(w), *[1] * (w.dim() - 1))}


def dora_columns(w: Tensor, g: torch.Generator) -> Tensors:
    return lora(w, g) | {"dora_scale": 1 + noise(g, 1, w.shape[1], *[1] * (w.dim() - 2))}


def loha(w: Tensor, g: torch.Generator) -> Tensors:
    o, flat = len(w), w[0].numel()
    return {
        "hada_w1_a": noise(g, o, 3), "hada_w1_b": noise(g, 3, flat), "hada_w2_a": noise(g, o, 3),
        "hada_w2_b": noise(g, 3, flat), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def loha_core(w: Tensor, g: torch.Generator) -> Tensors:
    o, i, *k = w.shape
    return {"alpha": torch.tensor(2.0)} | {
        name: tensor
        for n in "12"
        for name, tensor in (
            (f"hada_w{n}_a", noise(g, 3, o)), (f"hada_w{n}_b", noise(g, 3, i)), (f"hada_t{n}", noise(g, 3, 3, *k)),
        )
    }  # fmt: skip


def lokr(w: Tensor, g: torch.Generator) -> Tensors:
    o, i, *k = w.shape
    return {"lokr_w1": noise(g, 4, 2), "lokr_w2": noise(g, o // 4, i // 2, *k), "alpha": torch.tensor(2.0)}


def lokr_factored(w: Tensor, g: torch.Generator) -> Tensors:
    o, i, *k = w.shape
    flat = i // 2 * int(np.prod(k))
    return {
        "lokr_w1_a": noise(g, 4, 3), "lokr_w1_b": noise(g, 3, 2), "lokr_w2_a": noise(g, o // 4, 3),
        "lokr_w2_b": noise(g, 3, flat), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def lokr_core(w: Tensor, g: torch.Generator) -> Tensors:
    o, i, *k = w.shape
    return {
        "lokr_w1": noise(g, 4, 2), "lokr_w2_a": noise(g, 3, o // 4), "lokr_w2_b": noise(g, 3, i // 2),
        "lokr_t2": noise(g, 3, 3, *k), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def oft(w: Tensor, g: torch.Generator) -> Tensors:
    return {"oft_blocks": noise(g, len(w) // 8, 8, 8), "alpha": torch.tensor(0.0)}


def oft_bounded(w: Tensor, g: torch.Generator) -> Tensors:
    return oft(w, g) | {"alpha": torch.tensor(1e-3), "rescale": 1 + noise(g, len(w), *[1] * (w.dim() - 1))}


def boft(w: Tensor, g: torch.Generator) -> Tensors:
    return {"oft_blocks": noise(g, 2, len(w) // 8, 8, 8), "alpha": torch.tensor(0.0)}


def glora(w: Tensor, g: torch.Generator) -> Tensors:
    o, i, *k = w.shape
    ones = [1] * len(k)
    return {
        "a1.weight": noise(g, i, 3, *ones), "a2.weight": noise(g, 3, i, *ones), "b1.weight": noise(g, o, 3, *ones),
        "b2.weight": noise(g, 3, i, *k), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def glora_early(w: Tensor, g: torch.Generator) -> Tensors:
    made = glora(w, g)
    return {"alpha": made["alpha"]} | {
        f"{a}{n}.weight": made[f"{a}{3 - n}.weight"] for a, n in itertools.product("ab", (1, 2))
    }


def ia3(w: Tensor, g: torch.Generator) -> Tensors:
    shape = (len(w),) if w.dim() == 2 else (1, len(w), 1, 1)
    return {"weight": noise(g, *shape), "on_input": torch.tensor(0)}


def ia3_columns(w: Tensor, g: torch.Generator) -> Tensors:
    shape = (w.shape[1],) if w.dim() == 2 else (1, w.shape[1], 1, 1)
    return {"weight": noise(g, *shape), "on_input": torch.tensor(1)}


def full(w: Tensor, g: torch.Generator) -> Tensors:
    return {"diff": noise(g, *w.shape), "diff_b": noise(g, len(w))}


LINEAR = [
    lora,
    dora,
    dora_columns,
    loha,
    lokr,
    lokr_factored,
    oft,
    oft_bounded,
    boft,
    glora,
    glora_early,
    ia3,
    ia3_columns,
]
LINEAR += [full]
CONVOLUTION = [*LINEAR, lora_core, loha_core, lokr_core]


# ----------------------------------------------------------------- by loops


def changed(make: Callable[..., Tensors], tensors: Tensors, weight: Tensor) -> np.ndarray:
    """The weight with an adapter in place: float64, element by element, sums over ranks as loops."""
    p = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    w = weight.double().numpy()
    o, i = w.shape[:2]
    flat = w.reshape(o, i, -1)  # o i k
    kind = make.__name__
    s = float(p["alpha"]) / 3 if "alpha" in p else 1.0
    if kind == "full":
        return w + p["diff"]
    if kind.startswith("ia3"):
        factor = p["weight"].reshape(-1)
        return (flat * (1 + (factor[None, :, None] if "columns" in kind else factor[:, None, None]))).reshape(w.shape)
    if "oft" in kind:
        return turned(p, flat, o).reshape(w.shape)
    if kind.startswith("glora"):
        a1, a2, b1, b2 = (
            p[f"{n}.weight"] for n in (("a1", "a2", "b1", "b2") if kind == "glora" else ("a2", "a1", "b2", "b1"))
        )
        a = a1.reshape(i, 3) @ a2.reshape(3, i)
        inner = np.stack([flat[:, :, n] @ a for n in range(flat.shape[2])], 2)
        return (flat + s * (inner + outer(b1.reshape(o, 3), b2.reshape(3, i, -1)))).reshape(w.shape)
    if kind.startswith(("lora", "dora")):
        down, up = p["lora_down.weight"], p["lora_up.weight"].reshape(o, -1)
        delta = s * (
            core(up, p["lora_mid.weight"], down.reshape(3, i)) if "core" in kind else outer(up, down.reshape(3, i, -1))
        )
    elif kind.startswith("loha"):
        halves = [
            core(p[f"hada_w{n}_a"].T, p[f"hada_t{n}"], p[f"hada_w{n}_b"]) if "core" in kind
            else outer(p[f"hada_w{n}_a"], p[f"hada_w{n}_b"].reshape(3, i, -1))
            for n in "12"
        ]  # fmt: skip
        delta = s * halves[0] * halves[1]
    else:
        first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        if "core" in kind:
            second = core(p["lokr_w2_a"].T, p["lokr_t2"], p["lokr_w2_b"])
        elif "lokr_w2" in p:
            second, s = p["lokr_w2"].reshape(o // 4, i // 2, -1), 1.0  # no rank, no scale
        else:
            second = (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(o // 4, i // 2, -1)
        delta = np.zeros_like(flat)
        for a, b in itertools.product(range(4), range(2)):
            delta[a * (o // 4) : (a + 1) * (o // 4), b * (i // 2) : (b + 1) * (i // 2)] = s * first[a, b] * second
    whole = flat + delta
    if "dora_scale" in p:
        m = p["dora_scale"].reshape(-1)
        for n in range(len(m)):
            part = (slice(None), n) if "columns" in kind else (n,)
            whole[part] *= m[n] / np.sqrt((whole[part] ** 2).sum())
    return whole.reshape(w.shape)


def outer(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """b (o, r), a (r, i, k) -> (o, i, k), rank by rank."""
    return sum(b[:, r, None, None] * a[r] for r in range(len(a)))  # type: ignore[return-value]


def core(b: np.ndarray, middle: np.ndarray, a: np.ndarray) -> np.ndarray:
    """b (o, r), middle (r, q, ...), a (q, i) -> (o, i, k)."""
    middle = middle.reshape(*middle.shape[:2], -1)
    total = np.zeros((len(b), a.shape[1], middle.shape[2]))
    for r, q in itertools.product(range(middle.shape[0]), range(middle.shape[1])):
        total += b[:, r, None, None] * a[None, q, :, None] * middle[r, q]
    return total


def turned(p: dict[str, np.ndarray], flat: np.ndarray, o: int) -> np.ndarray:
    """Rows mixed by a matrix (o, o) that is written out whole."""
    q = p["oft_blocks"] - p["oft_blocks"].swapaxes(-1, -2)
    bound, norm = float(p["alpha"]) * o, np.sqrt((q**2).sum())
    q = q * min(1, bound / norm) if bound > 0 else q
    eye = np.eye(8)
    r = (eye + q) @ np.linalg.inv(eye - q)
    whole = np.eye(o)
    for level, blocks in enumerate(r if r.ndim == 4 else r[None]):
        mix = np.zeros((o, o))
        if r.ndim == 3:
            for n, block in enumerate(blocks):
                mix[n * 8 : n * 8 + 8, n * 8 : n * 8 + 8] = block.T
        else:  # a butterfly: row c g k of the picture is row c k g of the blocks, with k of 4 * 2^level
            k = 4 * 2**level
            place = [c * 2 * k + g * k + j for c in range(o // (2 * k)) for j in range(k) for g in range(2)]
            for n, block in enumerate(blocks):
                rows = place[n * 8 : n * 8 + 8]
                mix[np.ix_(rows, rows)] = block
        whole = mix @ whole
    scale = p["rescale"].reshape(o, 1, 1) if "rescale" in p else 1.0
    return scale * np.einsum("ab,bik->aik", whole, flat)


# ----------------------------------------------------------------- spellings

NEW = {"lora_down": "lora_A", "lora_up": "lora_B"}


def kohya(part: str, path: str, ending: str) -> str:
    return f"{'lora_unet' if part == 'unet' else 'lora_te'}_{path.replace('.', '_')}.{ending}"


def lycoris(part: str, path: str, ending: str) -> str:
    return f"lycoris_{path.replace('.', '_')}.{ending}"


def diffusers(part: str, path: str, ending: str) -> str:
    name, _, rest = ending.partition(".")
    return f"{part}.{path}.{NEW.get(name, name)}{'.' * bool(rest)}{rest}"


def peft(part: str, path: str, ending: str) -> str:
    return diffusers("base_model.model", path, ending)


def onetrainer(part: str, path: str, ending: str) -> str:
    return f"{'unet' if part == 'unet' else 'clip_l'}.{path}.{ending}"


def early(part: str, path: str, ending: str) -> str:
    """Which knew LoRA of attention alone."""
    ending = ending.replace("lora_", "lora.", 1)
    if part == "unet":
        head, name = path.removesuffix(".0").rsplit(".", 1)
        return f"unet.{head}.processor.{name}_{ending}"
    return f"text_encoder.{path.replace('_proj', '').replace('self_attn.', 'self_attn.to_')}_{ending}"


SPELLINGS = [kohya, lycoris, diffusers, peft, onetrainer]


def file(
    path: Path,
    modules: dict[str, dict[str, nn.Module]],
    make: Callable[..., Tensors],
    spell: Callable[..., str],
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> dict[tuple[str, str], Tensors]:
    """Write an adapter of `modules` (part -> path -> module); returns its tensors by part and path."""  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    tensors, kept = {}, {}
    for part, rows in modules.items():
        for name, module in rows.items():
            made = make(module.weight.detach(), generator)
            made = {k: v.to(dtype) if v.dim() else v for k, v in made.items()}
            if getattr(module, "bias", None) is None:
                made.pop("diff_b", None)
            if spell is early:
                made.pop("alpha", None)
            kept[part, name] = made
            tensors |= {spell(part, name, ending): tensor.contiguous() for ending, tensor in made.items()}
    save_file(tensors, path, {k: str(v) for k, v in metadata.items()} or None)
    return kept
