"""The frozen list of held-out prompts, each with the 199 wrong captions it must be told from.

Nothing here is drawn from a random generator: whatever is "any" is ordered or picked by SHA-256, so that the list
depends only on the records, on every machine and in every version of Python.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from typing import Protocol

HELD_OUT = ("val", "test_style", "test_compose")
STYLE_CAPTION = 1
"""Which of a record's captions is the prompt: the label with the style named, "3d emoji: a red apple"."""
DISTRACTORS = 199
HARD = 100
COLOURS = (
    *("light blue", "navy blue", "black", "white", "gray", "red", "orange", "yellow", "green", "teal", "blue"),
    *("purple", "pink", "brown"),
)
"""The colour words of the icon captions, two-word ones first. Gold, lime, olive, peach and the like name things."""
SAME_COLOUR = {"grey": "gray"}
SMALL_WORDS = frozenset(("", "a", "an", "the", "of"))


class Record(Protocol):
    """What is read of a record of the icon set (`limner.data.icons`)."""

    @property
    def id(self) -> str: ...
    @property
    def style(self) -> str: ...
    @property
    def concept(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def tone(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def captions(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Prompt:
    """One held-out picture's prompt. `kind` "val", "test_style", "compose_tone" or "compose_concept"."""

    id: str
    kind: str
    style: str
    text: str
    distractors: tuple[str, ...]


def held_out_prompts(records: Sequence[Record]) -> list[Prompt]:
    """Every record of val, test_style and test_compose in the order of `records`, with its distractors.

    The skin-tone pairs of test_compose (concept seen in other tones) are kept apart from its composed concepts, which
    are not in the train split at all. Of the 199 distractors up to 100 are hard, taken in this order until there are
    100: the same picture in another tone; the caption with another colour word (up to 5); members of the same style
    and group; members of the same style. The others are captions of any records.
    None is the concept itself in the same tone, in whatever style (another colour of it apart), and no two texts of
    the 200 are of the same words (`meaning`).
    """
    trained = {r.concept for r in records if r.split == "train"}
    index = Index(records)
    prompts = []
    for r in records:
        if r.split in HELD_OUT:
            kind = r.split
            if r.split == "test_compose":
                kind = "compose_tone" if r.tone and r.concept in trained else "compose_concept"
            text = r.captions[STYLE_CAPTION]
            hard = take(hard_distractors(r, index), HARD, [text])
            easy = take(any_captions(r, records), DISTRACTORS - len(hard), [text, *hard])
            prompts.append(Prompt(r.id, kind, r.style, text, (*hard, *easy)))
    return prompts


class Index:
    """Records by style, concept and group, each list in the order of its hashes."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.places = {r.id: number(r.id) for r in records}
        self.lists: dict[tuple[str, ...], list[Record]] = defaultdict(list)
        for r in sorted(records, key=lambda r: self.places[r.id]):
            for key in (r.style,), (r.style, "concept", r.concept), (r.style, "group", r.group):
                self.lists[key].append(r)

    def around(self, r: Record, *key: str) -> Iterator[Record]:
        """All records of a list but `r`'s own thing, from `r`'s place on and round: another order for each prompt."""
        some = self.lists[key]
        start = bisect(some, self.places[r.id], key=lambda o: self.places[o.id])
        return (o for o in chain(some[start:], some[:start]) if not same_thing(o, r))


def sha256_of(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of the whole list, as canonical JSON."""
    text = json.dumps([asdict(p) for p in prompts], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hard_distractors(r: Record, index: Index) -> Iterator[str]:
    yield from (o.captions[STYLE_CAPTION] for o in index.around(r, r.style, "concept", r.concept))
    yield from recoloured(r)
    yield from (o.captions[STYLE_CAPTION] for o in index.around(r, r.style, "group", r.group))
    yield from (o.captions[STYLE_CAPTION] for o in index.around(r, r.style))


def recoloured(r: Record, most: int = 5) -> Iterator[str]:
    """The prompt with one colour word replaced by others; nothing where the label is that colour word alone.

    A colour outside the label is that of the whole picture (a green silhouette of a red apple): it goes first.
    """
    text = r.captions[STYLE_CAPTION]
    words = re.compile(rf"\b({'|'.join((*COLOURS, *SAME_COLOUR))})\b")
    found = words.search(text.replace(r.label, "_" * len(r.label))) or words.search(text)
    if found and r.label != found.group():
        own = SAME_COLOUR.get(found.group(), found.group())
        others = sorted((c for c in COLOURS if c != own), key=lambda c: number(r.id, c))
        for colour in others[:most]:
            article = "an" if colour[0] in "aeiou" else "a"
            before = re.sub(r"\ban? $", f"{article} ", text[: found.start()])
            yield before + colour + text[found.end() :]


def any_captions(r: Record, records: Sequence[Record]) -> Iterator[str]:
    """Captions of other things, in any style, picked by hash; ends after 20 picks a record (small sets)."""
    for k in range(20 * len(records)):
        other = records[number(r.id, str(k)) % len(records)]
        if not same_thing(other, r):
            yield other.captions[STYLE_CAPTION]


def same_thing(a: Record, b: Record) -> bool:
    return (meaning(a.concept), a.tone) == (meaning(b.concept), b.tone) or meaning(a.label) == meaning(b.label)


@cache
def meaning(text: str) -> tuple[str, ...]:
    """The words of a caption in alphabetical order, without articles and "of": "3d emoji of a red apple" and "a red
    apple, 3d emoji" are one thing; "family, man, boy" and "family, man, boy, boy" are two."""
    words = re.split(r"[\s,:;()-]+", text.lower())
    return tuple(sorted(SAME_COLOUR.get(word, word) for word in words if word not in SMALL_WORDS))


def number(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest())


def take(texts: Iterable[str], most: int, seen: Iterable[str]) -> list[str]:
    """The first `most` of `texts` that mean neither what one of `seen` means nor what was taken before."""
    known = {meaning(text) for text in seen}
    taken: list[str] = []
    for text in texts:
        if len(taken) == most:
            break
        if meaning(text) not in known:
            known.add(meaning(text))
            taken.append(text)
    return taken


GRID_PROMPTS = (
    "3d emoji of a red fox",
    "3d emoji: slice of watermelon",
    "a 3d emoji of a rocket",
    "3d emoji of a woman cook, dark skin tone",
    "3d emoji: thumbs up, medium-light skin tone",
    "a 3d emoji of a treasure chest",
    "3d emoji of a purple heart",
    "smiling face with sunglasses, 3d emoji",
    "glossy gradient emoji of a penguin",
    "glossy gradient emoji: cup of coffee",
    "a glossy gradient emoji of a guitar",
    "glossy gradient emoji: waving hand, medium skin tone",
    "a bold flat emoji of an owl",
    "bold flat emoji: birthday cake",
    "bold flat emoji: crying face",
    "man farmer, dark skin tone, bold flat emoji",
    "flat emoji of a tiger face",
    "flat emoji: bouquet of flowers",
    "a flat emoji of a hot air balloon",
    "flat emoji: flag of japan",
    "woman scientist, medium skin tone, flat emoji",
    "soft shaded emoji of a turtle",
    "soft shaded emoji: hamburger",
    "a soft shaded emoji of a lighthouse",
    "old man, light skin tone, soft shaded emoji",
    "soft shaded emoji: alarm clock",
    "blob emoji: face with tears of joy",
    "blob emoji of a green dragon",
    "cat with heart eyes, blob emoji",
    "rounded flat emoji of a bicycle",
    "rounded flat emoji: strawberry",
    "rounded flat emoji: sleeping face",
    "firefox os emoji of a whale",
    "firefox os emoji: ice cream",
    "outlined cartoon emoji of a ghost",
    "outlined cartoon emoji: angry face",
    "outlined cartoon emoji of a pizza",
    "a blue outline icon of a camera",
    "blue outline icon: shopping cart",
    "blue outline icon of a house",
    "hand drawn doodle icon of a light bulb",
    "hand drawn doodle icon: umbrella",
    "pastel outline icon of a microscope",
    "pastel outline icon: laptop",
    "flat color icon of a calendar",
    "flat color icon: padlock",
    "weather icon: thunderstorm with rain",
    "weather icon: partly cloudy night",
    "round flag of brazil",
    "round flag: italy",
    "gradient app icon of an envelope",
    "gradient app icon: folder",
    "a black silhouette icon of a dragon head",
    "red silhouette icon: crossed swords",
    "a green silhouette icon of an oak tree",
    "a purple duotone icon of headphones",
    "teal duotone icon: airplane",
    "an orange glyph emoji of a pumpkin",
    "pink glyph emoji: butterfly",
    "a brown monochrome emoji of a bear face",
    "pixel art icon of a blue potion",
    "a yellow pixel art icon of a key",
    "clip art of a sailing boat",
    "clip art: brown dog",
)
"""64 prompts written before any training, over all styles, groups, tones and colours; picture k has seed k."""
