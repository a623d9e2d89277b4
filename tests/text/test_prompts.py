"""What a prompt means: known answers from A1111's wiki and ComfyUI's, and properties over anything people type."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.errors import FileProblem, UnknownName, UsageError
from limner.text import prompts
from limner.text.prompts import Adapter, Wildcards, chunked, expand, parse, unreached


def weighted(text: str, dialect: prompts.Dialect = "a1111") -> list[tuple[str, float]]:
    """The pieces of a prompt without parts, turns and BREAK."""
    (part,) = parse(text, dialect).parts
    (section,) = part.at(0)
    return [(piece.text, pytest.approx(piece.weight)) for piece in section]


def turns(text: str, steps: int = 10) -> list[tuple[int, str]]:
    (part,) = parse(text, "a1111", steps).parts
    return [(until, "|".join("".join(p.text for p in section) for section in words)) for until, words in part.turns]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(word:1.5)", [("word", 1.5)]),
        ("((word))", [("word", 1.21)]),
        ("[word]", [("word", 1 / 1.1)]),
        ("[[word]]", [("word", 1 / 1.21)]),
        ("(a: 0.25 ) b", [("a", 0.25), (" b", 1)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:.5)", [("a", 0.5)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1)]),
        ("[a (b] c:2)", [("a ", 1 / 1.1), ("b", 2 / 1.1), (" c", 2)]),
        ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
        (r"a\\b \c", [(r"a\b \c", 1)]),
        ("(:1.3)", [("", 1)]),
        ("", [("", 1)]),
        ("at 10:30, (16:9:1.2)", [("at 10:30, ", 1), ("16:9", 1.2)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
                ("sky", 1.4641), (".", 1.1),
            ],
        ),
    ],
)  # fmt: skip
def test_a1111_weights(text, pieces):
    assert weighted(text) == pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (word) b", [("a ", 1), ("word", 1.1), (" b", 1)]),
        ("((word))", [("word", 1.21)]),
        ("((word:1.2))", [("word", 1.2)]),  # a number counts alone
        ("((a) b:1.5)", [("a", 1.65), (" b", 1.5)]),
        ("((a:1.3) b)", [("a", 1.3), (" b", 1.1)]),
        ("[a] BREAK b AND c", [("[a] BREAK b AND c", 1)]),
        ("(a b", [("(a b", 1)]),
        ("a) b", [("a) b", 1)]),
        (r"a \(b\) (c:0.5)", [("a (b) ", 1), ("c", 0.5)]),
    ],
)
def test_comfyui_weights(text, pieces):
    assert weighted(text, "comfyui") == pieces


def test_plain_text_is_as_it_is():
    text = r"(a:1.3) [b|c] BREAK \(d\) AND e:2"
    assert weighted(text, "plain") == [(text, 1)]
    assert weighted(r"\{a\|b\} snake\__case__", "plain") == [("{a|b} snake__case__", 1)]


def test_break_parts_what_is_read_at_once_and_keeps_weights():
    assert turns("a BREAK b BREAKER BREAK BREAK c") == [(10, "a | b BREAKER | | c")]
    (part,) = parse("(a BREAK b:1.2)").parts
    assert [[(p.text, p.weight) for p in section] for section in part.at(0)] == [[("a ", 1.2)], [(" b", 1.2)]]


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e9", "100.1", "-101", "9" * 400])
def test_absurd_weights_are_refused(weight):
    for dialect in ("a1111", "comfyui"):
        with pytest.raises(UsageError, match=f"the weight {re.escape(weight)} in .* is absurd"):
            parse(f"a (fox:{weight})", dialect)
    with pytest.raises(UsageError, match="absurd"):
        parse(f"a fox:{weight} AND a dog")
    assert weighted(f"(fox:{weight})", "plain") == [(f"(fox:{weight})", 1)]


def test_brackets_that_multiply_to_an_absurd_weight_are_refused():
    assert weighted("(" * 48 + "fox" + ")" * 48) == [("fox", 1.1**48)]
    for text in ("(" * 50 + "fox", "((fox:20):20)"):
        with pytest.raises(UsageError, match="times its weight: keep within 100"):
            parse(text)
    for opened in "([":
        with pytest.raises(UsageError, match="more than 100 deep"):
            parse(opened * 200)


# ---------------------------------------------------------------- over the steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [b::3]", [(3, "a b"), (10, "a ")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a b")]),
        ("[(a:2):3]", [(3, ""), (10, "a")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:0.29] c", [(2, "a  c"), (10, "a b c")]),
        ("a [b:1.0] c", [(10, "a  c")]),
        ("a [b:0] c", [(10, "a b c")]),
        ("a [b:c:99999999999999999999]", [(10, "a b")]),
        ("[a:b:c:3]", [(10, "a:b:c:3")]),
        ("[a|b:3]", [(10, "a|b:3")]),
        (r"[a\|b] [c\:3]", [(10, "a|b c:3")]),
        ("[cow|horse]", [(k, "horse" if k % 2 == 0 else "cow") for k in range(1, 11)]),
        ("[fe|]male", [(k, "male" if k % 2 == 0 else "female") for k in range(1, 11)]),
        ("[fe|||]male", [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")]),
        ("[a|b:5:0.5]", [(10, "a|b:5:0.5")]),
        ("[[a|b]:0.5]", [(5, ""), (6, "b"), (7, "a"), (8, "b"), (9, "a"), (10, "b")]),
    ],
)
def test_prompts_change_over_the_steps(text, expected):
    assert turns(text) == expected


def test_what_its_steps_never_reach_is_known():
    assert unreached("a [b:30] [c::0] [d:e:5] [f|g|(h:1.2)]", 10) == ["b", "c"]
    assert unreached("[f|g|(h:1.2)]", 2) == ["(h:1.2)"]
    assert unreached("(a:1.2) [b] \\[c|d\\]", 2) == []


# ---------------------------------------------------------------- parts


def test_parts_have_weights_and_turns_of_their_own():
    first, second, third = parse("a cat :1.2 AND a [dog:fox:2] AND a (penguin:1.1) :-2", steps=4).parts
    assert [first.weight, second.weight, third.weight] == [1.2, 1, -2]
    assert [len(part.turns) for part in (first, second, third)] == [1, 2, 1]
    assert first.at(0) == ((prompts.Piece("a cat "),),)
    assert third.at(3)[0][1] == prompts.Piece("penguin", 1.1)


def test_a_prompt_of_one_part_has_no_weight():
    assert weighted("a clock at 10:30") == [("a clock at 10:30", 1)]
    assert len(parse("a SANDY band").parts) == 1
    (part,) = parse("a :2 AND b", composed=False).parts
    assert part == prompts.Part(((1, ((prompts.Piece("a :2 AND b"),),)),))
    with pytest.raises(UsageError, match="17 parts joined by AND: give 16"):
        parse(" AND ".join("a" * 17))


# ---------------------------------------------------------------- adapters


def test_adapters_are_found_and_taken_out():
    prompt = parse("a fox <lora:in ink:0.8> by <lora:b:1:0.5><hypernet:c> (embedding:bad-hands:1.2)")
    assert prompt.adapters == (
        Adapter("lora", "in ink", 0.8),
        Adapter("lora", "b", 1.0, 0.5),
        Adapter("hypernet", "c"),
        Adapter("embedding", "bad-hands"),
    )
    assert prompt.parts[0].at(0)[0][0].text == "a fox  by  "
    assert parse("<lora:a:1> embedding:b", "plain").adapters == (Adapter("lora", "a"),)
    with pytest.raises(UsageError, match=r"for the lora 'in ink' where no tag is read"):
        prompts.refuse(prompt.adapters)
    with pytest.raises(UsageError, match=r"for the embedding 'bad-hands', and there is none here: add --embedding"):
        prompts.refuse(prompt.adapters[-1:], {"good-hands"})
    prompts.refuse(prompt.adapters[-1:], {"bad-hands"})
    assert parse("a < b, <3 and <b>").adapters == ()
    for tag in ("<lora:a:much>", "<lora:a:1:2:3>", "<lora:a:nan>", "<lora:a:1e9>", "<lora:a:>"):
        with pytest.raises(UsageError, match=r"is not <lora:name:weight>|absurd"):
            parse(f"fox {tag}")


# ---------------------------------------------------------------- picking


def picked(text: str, **told) -> set[str]:
    return {expand(text, seed, **told) for seed in range(200)}


def test_a_choice_takes_each_option_by_its_seed():
    assert picked("a {red|{dark |}blue} {fox}") == {"a red {fox}", "a dark blue {fox}", "a blue {fox}"}
    assert picked("{|a}{b|b}") == {"b", "ab"}
    assert expand("{a|b|c|d|e|f}", 7) == expand("{a|b|c|d|e|f}", 7)
    assert picked("{0::a|b}") == {"b"}
    often = [expand("{3::a|b}", seed) for seed in range(1000)].count("a")
    assert 700 < often < 800


def test_what_a_seed_picks_is_the_same_on_every_machine():
    streams = ("prompt", "negative prompt")
    known, other = ("".join(expand("{a|b|c|d|e|f|g|h}", s, stream=stream) for s in range(8)) for stream in streams)
    assert known == "eghaehff"
    assert other != known


@pytest.mark.parametrize(
    "text", ["{fox}", "{a", "a}", "a|b", r"\{a\|b\}", r"\{a|b\}", "____ and __ x __", "}{", "{{a}}"]
)
def test_what_is_no_choice_stays_as_it_is(text):
    assert expand(text, 0) == text


def test_choices_that_cannot_be_are_refused():
    for text, reason in (("{2$$a|b}", "several at once"), ("{0::a|0::b}", "nothing may be taken"), ("{" * 101, "deep")):
        with pytest.raises(UsageError, match=reason):
            expand(text, 0)


@pytest.fixture
def folder(tmp_path):
    files = {
        "animals.txt": "\ufefffox\n# no cat\n\n  owl  \n", "colours/warm.txt": "red\n{dark |}orange\n",
        "beast.txt": "__colours/warm__ __animals__", "loop.txt": "a __pool__", "pool.txt": "__loop__",
        "none.txt": "#\n", "half.txt": "{a|b", "many.txt": "__animals__ " * 200,
        "more.txt": " ".join(["__many__"] * 6),
        "eye_color.txt": "green", "long.txt": "x" * 20_001,
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "cards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "cards" / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "cards" / "link.txt").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "cards"


def test_a_wildcard_is_a_line_of_its_file(folder):
    cards = Wildcards(folder)
    assert picked("a __animals__, __eye_color__", wildcards=cards) == {"a fox, green", "a owl, green"}
    assert picked("__beast__", wildcards=cards) == {
        f"{colour} {animal}" for colour in ("red", "orange", "dark orange") for animal in ("fox", "owl")
    }
    assert picked("{__animals__|cat}", wildcards=cards) == {"fox", "owl", "cat"}
    assert picked("__half__}", wildcards=cards) == {"a", "b"}  # nothing is left to pick
    assert expand(r"\__animals__", 0, cards) == r"\__animals__"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("animal", UnknownName, "no wildcard 'animal'. Did you mean 'animals'?"),
        ("../secret", UnknownName, "no wildcard '../secret'"),
        ("/etc/passwd", UnknownName, "no wildcard '/etc/passwd'"),
        ("link", UnknownName, "no wildcard 'link'"),
        ("loop", UsageError, "the wildcard 'loop' asks for itself: loop > pool > loop"),
        ("none", FileProblem, "has no line to take"),
        ("long", FileProblem, "has a line too long to take"),
        ("bytes", FileProblem, "not UTF-8"),
        ("more", UsageError, "more than 1000 picks"),
    ],
)
def test_wildcards_that_cannot_be_are_refused(folder, name, error, message):
    with pytest.raises(error, match=re.escape(message)):
        expand(f"a __{name}__", 0, Wildcards(folder))


def test_without_a_folder_wildcards_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the wildcard 'animals': say where .*--wildcards FOLDER"):
        expand("a __animals__", 0)
    for path in (tmp_path / "nothing", __file__, "\0"):
        with pytest.raises(FileProblem, match="folder of wildcards"):
            Wildcards(path)


SIGNS = st.text(st.sampled_from("ab :|()[]{}\\_.19,<>\n")) | st.text()


@given(SIGNS, st.sampled_from(prompts.DIALECTS), st.integers(1, 12))
def test_anything_typed_is_read_or_refused(text, dialect, steps):
    with contextlib.suppress(UsageError):
        expanded = expand(text, 3)
        assert expand(expanded, 4) == expanded
        for part in parse(expanded, dialect, steps).parts:
            ends = [until for until, _ in part.turns]
            assert ends == sorted(set(ends))
            assert ends[-1] == steps
            assert all(section for _, words in part.turns for section in words)


@pytest.mark.parametrize(
    "text", ["(", "()", "[a|", "[a|b]", "{a|b}", " ", "__", "_ ", "\\", ":1.2)", "<lora:", ":", "a AND "]
)
def test_ten_thousand_characters_are_read_or_refused_at_once(text):
    start = time.perf_counter()
    for dialect in prompts.DIALECTS:
        with contextlib.suppress(UsageError):
            parse(expand(text * (10_000 // len(text)), 0), dialect, 20)
    assert time.perf_counter() - start < 2


# ---------------------------------------------------------------- chunks of tokens

COMMA = 0


def rows(*ids: int, **told) -> list[list[int]]:
    return [[token for token, _ in chunk] for chunk in chunked([[(i, 1.0) for i in ids]], 75, **told)]


def test_tokens_come_in_chunks():
    assert rows() == []
    assert [len(row) for row in rows(*range(1, 76))] == [75]
    assert [len(row) for row in rows(*range(1, 77))] == [75, 1]
    assert [len(row) for row in rows(*range(1, 200))] == [75, 75, 49]


@pytest.mark.parametrize(("place", "lengths"), [(54, [75, 15]), (55, [56, 34]), (73, [74, 16]), (74, [75, 15])])
def test_a_full_chunk_ends_after_a_comma_near_its_end(place, lengths):
    ids = [*range(1, 91)]
    ids[place] = COMMA
    assert [len(row) for row in rows(*ids, comma=COMMA)] == lengths
    assert [i for row in rows(*ids, comma=COMMA) for i in row] == ids
    assert [len(row) for row in rows(*ids)] == [75, 15]


def test_a_comma_that_does_not_fit_begins_the_next_chunk():
    ids = [*range(1, 61), COMMA, *range(61, 75), COMMA, 99]
    assert [len(row) for row in rows(*ids, comma=COMMA)] == [75, 2]


def test_words_are_not_parted_unless_they_are_long():
    run = lambda n: [(1, 1.0)] * n  # noqa: E731
    assert [len(c) for c in chunked([run(73), run(3)], 75, solid=[True, True])] == [73, 3]
    assert [len(c) for c in chunked([run(73), run(8)], 75, solid=[True, False])] == [75, 6]
    assert [len(c) for c in chunked([run(73), run(3)], 75)] == [75, 1]
