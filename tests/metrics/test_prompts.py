import os
import re
from dataclasses import dataclass, replace

import pytest

from limner.metrics.prompts import COLOURS, GRID_PROMPTS, held_out_prompts, meaning, sha256_of

TINTS = ("black", "blue", "navy blue", "teal", "purple", "pink", "gray", "orange", "yellow", "green", "brown", "red")
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
    rows += [make("mono", f"tool {k}", "object", tint=TINTS[k % 12]) for k in range(130)]
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


def test_the_same_words_in_another_order_or_with_other_articles_are_one_thing(records):
    val = records[5]
    said = ("animal 5, flat emoji", "a flat emoji of an animal 5", "the animal 5, flat emoji")
    twins = [replace(val, id=t, split="train", concept=t, label=t, captions=(t, t)) for t in said]
    pairs = [replace(val, id=t, split="train", concept=t, label=t, captions=(t, t)) for t in ("a dog", "dog")]
    (found,) = [p for p in held_out_prompts([*(twins + pairs) * 40, *records]) if p.id == val.id]
    assert not set(said) & set(found.distractors)
    assert len({"a dog", "dog"} & set(found.distractors)) == 1
    assert len({meaning(t) for t in (found.text, *found.distractors)}) == 200


def test_meanings_known_answers():
    assert meaning("3d emoji of a red apple") == meaning("a red apple, 3D emoji") == meaning("3d emoji: the red apple")
    assert meaning("grey heart") == meaning("gray heart")
    assert meaning("keycap: #") != meaning("keycap: *")
    assert meaning("family, man, boy") != meaning("family, man, boy, boy")
    assert meaning("red apple") != meaning("green apple")


@pytest.mark.parametrize(
    ("label", "text", "kept", "own"),
    [
        ("gray taxi", "gray taxi, flat emoji", "{} taxi, flat emoji", {"gray"}),
        ("grey heart", "flat emoji: grey heart", "flat emoji: {} heart", {"gray"}),
        ("light blue heart", "flat emoji: light blue heart", "flat emoji: {} heart", {"light blue"}),
        ("red apple", "red apple, green silhouette icon", "red apple, {} silhouette icon", {"green"}),
    ],
)
def test_a_colour_is_replaced_whole_and_by_another_and_that_of_the_picture_goes_first(records, label, text, kept, own):
    row = replace(records[5], id="odd", concept=label, label=label, captions=(label, text))
    (found,) = [p for p in held_out_prompts([*records, row]) if p.id == "odd"]
    assert sum(d in {kept.format(c) for c in set(COLOURS) - own} for d in found.distractors) == 5
    assert set(found.distractors[:5]) <= {kept.format(c) for c in set(COLOURS) - own}


def test_an_article_follows_the_colour_it_stands_before(records):
    row = make("mono", "axe", "object", split="val", tint="blue")
    row = replace(row, captions=("axe", "a blue monochrome emoji of an axe"))
    (found,) = [p for p in held_out_prompts([*records, row]) if p.text == row.captions[1]]
    swapped = [d for d in found.distractors if d.endswith("monochrome emoji of an axe")]
    assert len(swapped) == 5
    assert all(d.startswith("an orange " if "orange" in d else "a ") for d in swapped)


def test_the_list_is_the_same_on_every_machine(records):
    prompts = held_out_prompts(records)
    assert sha256_of(prompts) == "7de7f82b3dfbd799e3473976bb3359c03798545f1560f49e014bc346b67b1104"
    assert sha256_of(prompts) != sha256_of(prompts[::-1])
    turned = replace(prompts[0], distractors=prompts[0].distractors[::-1])
    assert sha256_of(prompts) != sha256_of([turned, *prompts[1:]])


@pytest.mark.slow
@pytest.mark.skipif("LIMNER_DATA" not in os.environ, reason="needs the icon pack")
def test_the_list_of_the_icon_pack_is_the_frozen_one():
    from limner.data.icons import open_icons

    prompts = held_out_prompts(open_icons().records)
    assert len(prompts) == 1661
    assert sha256_of(prompts) == "0757fdcf70028d12938a554ed6a6047159bb5e4a9b1284db7d90430d58a154c9"


def test_grid_prompts_are_64_different_ones():
    assert len(GRID_PROMPTS) == len(set(GRID_PROMPTS)) == 64
