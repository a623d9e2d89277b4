"""What each kind of adapter makes of a weight: the difference that is added to it.

W is the weight (o, i, ...) of a linear layer or a convolution, with the axes after the first laid flat where a formula
has matrices; s is alpha / rank, 1 where a file has no alpha. All is computed in float32.

    LoRA    s B A                                       arXiv:2106.09685
    LoHa    s (B1 A1) * (B2 A2), product by element     arXiv:2108.06098
    LoKr    s kron(C, B A)                              arXiv:2309.14859
    DoRA    m (W + D) / |W + D| - W                     arXiv:2402.09353; D of one of the three above
    OFT     R W - W, R of orthogonal blocks             arXiv:2306.07280; BOFT, butterflies of them, arXiv:2311.06243
    GLoRA   s (W A + B)                                 arXiv:2306.07967
    IA3     W l, row by row or column by column         arXiv:2205.05638
    norm, full: the difference itself; of norms also what they are to be, less what they are

The core of a convolution's A may be kept apart (Tucker; CP in LyCORIS' words): a small convolution among the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scale:
    """rank -> s = alpha / rank, or alpha / sqrt(rank) if `rooted` (rsLoRA, arXiv:2312.03732); 1 without an alpha."""

    alpha: float | None = None
    rooted: bool = False

    def __call__(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / (rank**0.5 if self.rooted else rank)


@dataclass(frozen=True)
class Kind:
    """`needs` are the parts that make it this kind, each a set of which one must be there; `may` others it can have.
    `weight(parts, scale, W)` is the difference, of W's shape up to ones at the end; `rank` the part, and its axis, that
    says the rank."""

    title: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]
    weight: Callable[[Parts, Scale, Tensor], Tensor]
    rank: tuple[tuple[str, int], ...] = ()


def product(b: Tensor, a: Tensor, core: Tensor | None = None) -> Tensor:
    """B (o, r) times A (r, i, ...), or with a core (r, r, k, k) between B (o, r) and A (r, i)."""
    if core is None:
        return b.flatten(1) @ a.flatten(1)
    return torch.einsum("r q ..., o r, q i -> o i ...", core, b.flatten(1), a.flatten(1))


def lora(p: Parts, scale: Scale, weight: Tensor) -> Tensor:
    return scale(len(p["down"])) * product(p["up"], p["down"], p.get("mid"))


def loha(p: Parts, scale: Scale, weight: Tensor) -> Tensor:
    halves = []
    for n in "12":
        b, a, core = p[f"w{n}_a"], p[f"w{n}_b"], p.get(f"t{n}")
        halves.append(product(b if core is None else b.T, a, core))
    return scale(len(p["w1_b"])) * halves[0] * halves[1]


def lokr(p: Parts, scale: Scale, weight: Tensor) -> Tensor:
    c = p["k1"] if "k1" in p else p["k1_a"] @ p["k1_b"]
    if "k2" in p:
        d = p["k2"]
    else:
        d = product(p["k2_a"].T, p["k2_b"], p["tk2"]) if "tk2" in p else product(p["k2_a"], p["k2_b"])
    rank = next((len(p[name]) for name in ("k1_b", "k2_b") if name in p), 0)
    return (scale(rank) if rank else 1.0) * torch.kron(c.contiguous(), d.flatten(1))


def oft(p: Parts, scale: Scale, weight: Tensor) -> Tensor:
    """An alpha above 0 bounds the norm of all blocks, by alpha times the number of rows."""
    blocks, limit = p["blocks"], (scale.alpha or 0) * len(weight)
    q = blocks - blocks.mT
    if limit > 0:
        q = q * (limit / (q.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(q.shape[-1], device=q.device)
    r = torch.linalg.solve(eye - q, eye + q)  # Cayley; the two commute
    x = weight.flatten(1)
    if r.dim() == 3:
        x = (r.mT @ x.unflatten(0, (len(r), -1))).flatten(0, 1)
    else:
        for level, turn in enumerate(r):  # BOFT: neighbours at growing distance
            x = x.unflatten(0, (-1, 2, 2**level * (r.shape[-1] // 2))).transpose(1, 2)  # c g k -> c k g
            shape = x.shape
            x = (turn @ x.flatten(0, 2).unflatten(0, (len(turn), -1))).flatten(0, 1)
            x = x.unflatten(0, shape[:3]).transpose(1, 2).flatten(0, 2)
    if "rescale" in p:
        x = p["rescale"].flatten(1) * x
    return x - weight.flatten(1)


def glora(p: Parts, scale: Scale, weight: Tensor) -> Tensor:
    a, b = (p["a1"].flatten(1), p["a2"].flatten(1)), (p["b1"], p["b2"])
    if a[0].shape[1] != a[1].shape[0] or len(p["b1"]) != len(weight):  # early files have the two the other way
        a, b = a[::-1], b[::-1]
    inner = torch.einsum("o i ..., i j -> o j ...", weight, a[0] @ a[1])
    return scale(len(a[1])) * (inner.flatten(1) + product(*b))


def ia3(p: Parts, scale: Scale, weight: Tensor) -> Tensor:
    """The factor's difference from 1, in LyCORIS' files; PEFT's `ia3_l` is the factor, for columns if it is (1, i)."""
    if "factor" in p:
        factor, columns = p["factor"] - 1, len(p["factor"]) != len(weight)
    else:
        columns = "columns" in p
        factor = p["columns" if columns else "rows"]
    rows = weight.transpose(0, 1) if columns else weight
    if factor.numel() != len(rows):
        raise ValueError("a factor for each row or column is wanted")
    changed = rows * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return changed.transpose(0, 1) if columns else changed


def added(name: str) -> Callable[[Parts, Scale, Tensor], Tensor]:
    return lambda p, scale, weight: p[name] if name in p else torch.zeros_like(weight)


DECOMPOSED = ("dora", "magnitude")
MORE = ("diff_b", *DECOMPOSED)
LOHA, GLORA = ("w1_a", "w1_b", "w2_a", "w2_b"), ("a1", "a2", "b1", "b2")
LOKR = (("k1", "k1_a"), ("k1", "k1_b"), ("k2", "k2_a"), ("k2", "k2_b"))
KINDS = (
    Kind("LoRA", (("down",), ("up",)), ("mid", "up_bias", *MORE), lora, (("down", 0),)),
    Kind("LoHa", tuple((part,) for part in LOHA), ("t1", "t2", *MORE), loha, (("w1_b", 0),)),
    Kind("LoKr", LOKR, ("tk2", *MORE), lokr, (("k1_b", 0), ("k2_b", 0))),
    Kind("OFT", (("blocks",),), ("rescale", "diff_b"), oft, (("blocks", -1),)),
    Kind("GLoRA", tuple((part,) for part in GLORA), ("diff_b",), glora, (("a2", 0),)),
    Kind("IA3", (("rows", "columns", "factor"),), (), ia3),
    Kind("norm", (("w_norm", "b_norm"),), (), added("w_norm")),
    Kind("norm", (("whole",),), (), lambda p, scale, weight: p["whole"].reshape(weight.shape) - weight),
    Kind("full", (("diff", "diff_b"),), (), added("diff")),
)


def find(roles: frozenset[str]) -> Kind | None:
    """The kind that has these parts, and no others."""
    for kind in KINDS:
        known = {role for choice in kind.needs for role in choice} | set(kind.may)
        if roles <= known and all(roles & set(choice) for choice in kind.needs):
            return kind
    return None


def difference(kind: Kind, parts: Parts, scale: Scale, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is added to `base`, the "weight" (o, i, ...) and perhaps the "bias" (o,) of a module, in their shapes and in
    float32. Works on the meta device, to see whether shapes fit. Raises ValueError or RuntimeError where they do not.
    """
    weight = base["weight"].float()
    found = {"weight": _shaped(kind.weight(parts, scale, weight), weight)}
    if parts.keys() & set(DECOMPOSED):
        found["weight"] = _decomposed(parts, found["weight"], weight)
    shift = [parts[name] for name in ("diff_b", "b_norm") if name in parts]
    if "up_bias" in parts:
        shift.append(scale(len(parts["down"])) * parts["up_bias"])
    if "factor" in parts and "bias" in base and len(parts["factor"]) == len(weight):
        shift.append(base["bias"].float() * (parts["factor"].flatten() - 1))
    if shift:
        if "bias" not in base:
            raise ValueError("the module has no bias")
        found["bias"] = _shaped(sum(shift[1:], shift[0]), base["bias"])
    return found


def factors(kind: Kind, parts: Parts, scale: Scale) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Of an adapter that adds nothing but a product of low rank to a matrix, up (o, r) and down (r, i), and what it
    adds to the bias (o,); else None."""
    if kind.title != "LoRA" or not {"up", "down"} <= parts.keys() <= {"up", "down", "up_bias"}:
        return None
    scaled = scale(len(parts["down"]))
    bias = scaled * parts["up_bias"] if "up_bias" in parts else None
    return scaled * parts["up"].flatten(1), parts["down"].flatten(1), bias


def _shaped(delta: Tensor, wanted: Tensor) -> Tensor:
    if (
        delta.dim() == 0
        or delta.flatten(min(1, delta.dim() - 1)).shape != wanted.flatten(min(1, wanted.dim() - 1)).shape
    ):
        raise ValueError(f"it makes {tuple(delta.shape)}")
    return delta.reshape(wanted.shape)


def _decomposed(parts: Parts, delta: Tensor, weight: Tensor) -> Tensor:
    """DoRA: the sum's rows, or columns, get the lengths `m`. PEFT's are of rows; kohya's say it by their shape."""
    whole = weight + delta
    m = parts["magnitude"].flatten() if "magnitude" in parts else parts["dora"]
    rows = m.dim() == 1 or (m.shape[0] == weight.shape[0] and m[0].numel() == 1)
    axis = 0 if rows else 1
    if m.numel() != weight.shape[axis]:
        raise ValueError(f"it has {m.numel()} lengths")
    dims = [d for d in range(weight.dim()) if d != axis]
    length = torch.linalg.vector_norm(whole, dim=dims, keepdim=True)
    tiny = torch.finfo(torch.float32).eps
    return whole * (m.reshape(length.shape) / (length + tiny)) - weight
