"""What adapters make of a weight: known answers, then loops that write every sum out."""

from __future__ import annotations

import pytest
import torch

from limner.adapters import kinds
from limner.adapters.kinds import Scale

from . import zoo

W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def made(roles: dict[str, list], alpha: float | None = None, rooted: bool = False, weight=W, **base) -> torch.Tensor:
    parts = {name: torch.tensor(value) for name, value in roles.items()}
    kind = kinds.find(frozenset(parts))
    return kinds.difference(kind, parts, Scale(alpha, rooted), {"weight": weight, **base})


def weight(*args, **kwargs) -> list[list[float]]:
    return made(*args, **kwargs)["weight"].tolist()


A, B = [[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 3.0]]


def test_lora_is_the_product_by_alpha_over_rank():
    assert weight({"down": A, "up": B}) == [[1, 2], [0, 6]]
    assert weight({"down": A, "up": B}, alpha=1.0) == [[0.5, 1], [0, 3]]
    rooted = made({"down": A, "up": B}, alpha=2.0, rooted=True)["weight"]
    torch.testing.assert_close(rooted, 2**0.5 * torch.tensor([[1.0, 2.0], [0.0, 6.0]]))


def test_loha_is_a_product_by_element():
    assert weight({"w1_a": B, "w1_b": A, "w2_a": [[1.0], [2.0]], "w2_b": [[3.0, 5.0]]}) == [[3, 10], [0, 60]]


def test_lokr_is_kroneckers_product_and_has_a_scale_only_with_a_rank():
    four = torch.zeros(4, 4)
    one = weight({"k1": [[1.0, 2.0], [0.0, 3.0]], "k2": A}, alpha=5.0, weight=four)
    assert one == [[1, 0, 2, 0], [0, 2, 0, 4], [0, 0, 3, 0], [0, 0, 0, 6]]
    two = weight({"k1": [[1.0, 2.0], [0.0, 3.0]], "k2_a": A, "k2_b": A}, alpha=1.0, weight=four)
    assert two == [[0.5, 0, 1, 0], [0, 2, 0, 4], [0, 0, 1.5, 0], [0, 0, 0, 6]]


def test_dora_gives_rows_or_columns_their_lengths():
    rows = W + made({"down": A, "up": B, "magnitude": [5.0, 7.0]})["weight"]
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([5.0, 7.0]))
    whole = torch.tensor([[2.0, 4.0], [3.0, 10.0]])
    torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), whole / whole.norm(dim=1, keepdim=True))
    columns = W + made({"down": A, "up": B, "dora": [[5.0, 7.0]]})["weight"]
    torch.testing.assert_close(columns.norm(dim=0), torch.tensor([5.0, 7.0]))


def test_oft_turns_and_changes_no_length():
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    for make in (zoo.oft, zoo.boft):
        blocks = make(weight, torch.Generator().manual_seed(1))["oft_blocks"]
        kind = kinds.find(frozenset({"blocks"}))
        turned = weight + kinds.difference(kind, {"blocks": blocks}, Scale(0.0), {"weight": weight})["weight"]
        assert (turned - weight).abs().max() > 0.1
        torch.testing.assert_close(turned.T @ turned, weight.T @ weight, atol=1e-4, rtol=1e-4)


def test_ia3_multiplies_rows_or_columns():
    assert weight({"rows": [1.0, 2.0]}) == [[1, 2], [6, 8]]
    assert weight({"columns": [1.0, 2.0]}) == [[1, 4], [3, 8]]
    told = made({"factor": [[2.0], [3.0]]}, bias=torch.tensor([1.0, 1.0]))
    assert told["weight"].tolist() == [[1, 2], [6, 8]]
    assert told["bias"].tolist() == [1, 2]
    assert weight({"factor": [[2.0, 3.0]]}, bias=torch.ones(2)) == [[1, 4], [3, 8]]


def test_glora_reads_the_weight():
    parts = {"a1": [[1.0], [0.0]], "a2": [[0.0, 1.0]], "b1": [[1.0], [0.0]], "b2": [[10.0, 0.0]]}
    assert weight(parts) == [[10, 1], [0, 3]]


def test_norms_and_whole_differences_are_added():
    told = made({"w_norm": [1.0, 2.0], "b_norm": [3.0, 4.0]}, weight=torch.ones(2), bias=torch.ones(2))
    assert {k: v.tolist() for k, v in told.items()} == {"weight": [1, 2], "bias": [3, 4]}
    assert weight({"diff": A}) == A
    alone = made({"diff_b": [3.0, 4.0]}, bias=torch.ones(2))
    assert alone["bias"].tolist() == [3, 4]
    assert not alone["weight"].any()


def test_a_bias_is_scaled_as_the_rest():
    told = made({"down": A, "up": B, "up_bias": [1.0, 2.0], "diff_b": [1.0, 0.0]}, alpha=1.0, bias=torch.ones(2))
    assert told["bias"].tolist() == [1.5, 1.0]
    with pytest.raises(ValueError, match="no bias"):
        made({"down": A, "up": B, "up_bias": [1.0, 2.0]})


SHAPES = {"linear": (32, 24), "square": (16, 16), "1x1": (16, 24, 1, 1), "3x3": (32, 24, 3, 3)}
CASES = [(shape, make) for shape in SHAPES for make in (zoo.CONVOLUTION if len(SHAPES[shape]) > 2 else zoo.LINEAR)]


@pytest.mark.parametrize(("shape", "make"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_every_kind_is_what_loops_make_of_it(shape, make):
    from limner.adapters.files import split

    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(SHAPES[shape], generator=generator)
    tensors = make(weight, generator)
    names = {f"x.{name}" for name in tensors}
    parts = {split(f"x.{name}", names)[1]: tensor for name, tensor in tensors.items()}
    alpha = parts.pop("alpha", None)
    if "on_input" in parts:
        parts["columns" if parts.pop("on_input") else "rows"] = parts.pop("weight")
    base = {"weight": weight, "bias": torch.zeros(len(weight))}
    kind = kinds.find(frozenset(parts))
    delta = kinds.difference(kind, parts, Scale(None if alpha is None else alpha.item()), base)["weight"]
    wanted = torch.from_numpy(zoo.changed(make, tensors, weight)).float()
    assert delta.abs().max() > 1e-3
    assert (weight + delta - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_parts_of_two_kinds_are_none():
    assert kinds.find(frozenset({"down"})) is None
    assert kinds.find(frozenset({"down", "up", "w1_a"})) is None
    assert kinds.find(frozenset({"weight"})) is None
    assert kinds.find(frozenset({"down", "up"})).title == "LoRA"
