import os
import re
from dataclasses import dataclass, replace

import pytest

from limner.metrics.prompts import COLOURS, GRID_PROMPTS, held_out_prompts, sha256_of

TONES = (None, "light skin tone", "dark skin tone")


@dataclass(frozen=True)
class Row:
    id: str
    style: str
    concept: str
    label: str
    group: str
    tone: str | None
    split: str
    captions: tuple[str, ...]


def make(style, concept, group, tone=None, split="train", tint=""):
    label = f"{concept}, {tone}" if tone else concept
    text = f"{style} emoji: {tint + ' ' if tint else ''}{label}"
    return Row(f"{style}/{label}/{tint}", style, concept, label, group, tone, split, (label, text))


@pytest.fixture
def records():
    rows = [make(s, f"animal {k}", "nature") for s in ("flat", "3d") for k in range(120)]
    rows += [make(s, f"job {k}", "people", t) for s in ("flat", "3d") for k in range(40) for t in TONES]
    rows += [make("mono", f"tool {k}", "object", tint=COLOURS[k % 12]) for k in range(130)]
    rows[5] = replace(rows[5], split="val")
    rows[241] = replace(rows[241], split="test_compose")  # a tone of a job that is trained in others
    rows += [make("flat", "job astronaut", "people", "dark skin tone", "test_compose")]
    rows += [make("flat", "green heart", "symbol", split="test_compose")]
    rows += [make("mono", "tool 500", "object", split="test_style", tint="orange")]
    rows += [make("flat", "animal unseen", "nature", split="test_concept")]
    return rows


def test_prompts_are_the_held_out_records_and_tones_are_apart_from_compositions(records):
    prompts = held_out_prompts(records)
    assert [(p.text, p.kind) for p in prompts] == [
        ("flat emoji: animal 5", "val"),
        ("flat emoji: job 0, light skin tone", "compose_tone"),
        ("flat emoji: job astronaut, dark skin tone", "compose_concept"),
        ("flat emoji: green heart", "compose_concept"),
        ("mono emoji: orange tool 500", "test_style"),
    ]


def test_there_are_199_distractors_all_different_and_none_is_the_thing_itself(records):
    what = {r.captions[1]: (r.concept, r.tone) for r in records}
    for p in held_out_prompts(records):
        assert len(p.distractors) == len({*p.distractors, p.text}) - 1 == 199
        assert all(what.get(d) != what[p.text] for d in p.distractors)
        assert sum(d.startswith(p.style) for d in p.distractors) >= 100


def test_hard_distractors_come_first_tones_colours_then_the_group(records):
    _, tone, _, heart, tool = held_out_prompts(records)
    assert set(tone.distractors[:2]) == {"flat emoji: job 0", "flat emoji: job 0, dark skin tone"}
    assert all(d.startswith("flat emoji: job") for d in tone.distractors[2:100])
    assert all(re.fullmatch(rf"flat emoji: ({'|'.join(COLOURS)}) heart", d) for d in heart.distractors[:5])
    assert "flat emoji: green heart" not in heart.distractors
    assert all(d.endswith(" tool 500") for d in tool.distractors[:5])
    assert all(d.startswith("mono emoji") for d in tool.distractors[5:100])


def test_another_picture_of_the_same_thing_is_no_distractor(records):
    """The same concept and tone under another name, in the same style (hard) and in another (easy)."""
    val = records[5]
    twins = [
        replace(
            val, id=f"twin {style}", style=style, split="train", label="beast", captions=("beast", f"{style} beast")
        )
        for style in ("flat", "3d")
    ]
    (found,) = [p for p in held_out_prompts([*twins * 40, *records]) if p.id == val.id]
    assert not {"flat beast", "3d beast"} & set(found.distractors)


def test_an_article_follows_the_colour_it_stands_before(records):
    row = make("mono", "axe", "object", split="val", tint="blue")
    row = replace(row, captions=("axe", "a blue monochrome emoji of an axe"))
    (found,) = [p for p in held_out_prompts([*records, row]) if p.text == row.captions[1]]
    swapped = [d for d in found.distractors if d.endswith("monochrome emoji of an axe")]
    assert len(swapped) == 5
    assert all(d.startswith("an orange " if "orange" in d else "a ") for d in swapped)


def test_the_list_is_the_same_on_every_machine(records):
    prompts = held_out_prompts(records)
    assert sha256_of(prompts) == "f354aed3a5c04c21fc273c3928895b3d4fafed4dfa8cddb5671e814596eb021f"
    assert sha256_of(prompts) != sha256_of(prompts[::-1])
    turned = replace(prompts[0], distractors=prompts[0].distractors[::-1])
    assert sha256_of(prompts) != sha256_of([turned, *prompts[1:]])


@pytest.mark.slow
@pytest.mark.skipif("LIMNER_DATA" not in os.environ, reason="needs the icon pack")
def test_the_list_of_the_icon_pack_is_the_frozen_one():
    from limner.data.icons import open_icons

    prompts = held_out_prompts(open_icons().records)
    assert len(prompts) == 1661
    assert sha256_of(prompts) == "d73aeb423915926ce430de1f9c93c05079cafadc3471cdc93db39e6041483591"


def test_grid_prompts_are_64_different_ones():
    assert len(GRID_PROMPTS) == len(set(GRID_PROMPTS)) == 64
