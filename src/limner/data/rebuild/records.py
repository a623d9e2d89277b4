"""From named and drawn pictures to the pack's records: tidy labels, no doubles, splits without leaks, captions."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from limner.data.icons import IconRecord
from limner.data.rebuild.naming import TONES, tone_name
from limner.data.rebuild.pictures import Look
from limner.data.rebuild.sets import PARTS, SETS, SHARE_ALIKE, Candidate, number_of

PART_WEIGHTS = {"emoji": 1.0, "icon": 1.0, "mono": 0.5, "clipart": 0.7}
NUM_HELD_OUT = 60
HELD_OUT_GROUPS = ("nature", "food", "travel", "object", "activity", "people", "smiley")
COMPOSED = (
    "green heart", "purple heart", "orange square", "purple circle", "blue square", "green book", "pouting cat",
    "grinning cat with smiling eyes", "cat with wry smile", "woman astronaut", "man cook", "woman firefighter",
    "man artist", "woman scientist", "green apple", "white flower", "dog face", "mouse face",
    "smiling face with sunglasses", "two-hump camel", "last quarter moon", "snowman without snow",
    "sun behind rain cloud", "person swimming", "man superhero",
)  # fmt: skip
"""Concepts whose parts are seen in training, but never together."""

_COMPANIES = """
    ikea nike google facebook twitter instagram starbucks mcdonalds disney lego pokemon marvel tesla uber netflix
    nintendo
    playstation xbox youtube tiktok
"""
_CRUDE = """
    hitler nazi trump sexy sex porn boobs boob dick penis vagina horny nude naked xxx fuck fucked fucking shit ass
    asshole
    butt bitch slut thot cum weed suicide bj blowjob hooker milf drugs
"""
_UNWANTED_TAG = re.compile(rf"\b({'|'.join((_COMPANIES + _CRUDE).split())})\b")
_UNWANTED_LABEL = re.compile(r"\b(bbc|cnn|ikea|lego|shell logo|nasa)\b")

_PIXEL_SECTIONS = re.compile(
    r"^(interface essential|business products?|coding apps websites|content files|internet network|social rewards"
    r"|shopping shipping|entertainment events hobbies|food drink|business product|user|phone|photography|design|ecology"
    r"|health|weather|travel|multimedia|music|email|pet animals|romance|video movies|video|constellation|map navigation"
    r"|building real eastate|construction|transportation|logo)\s+(?=\w)"
)
_SHORT_WORDS = ("on", "in", "of", "to", "up", "tv", "cd", "ok", "no", "at")
_CLIPART_NOISE = re.compile(r"\b(aj|bw|b and w|c|jh|ii|iii|nicu|ganson|francesco|rollandin|gerald|architetto|archi)\b")
_CLIPART_DULL = re.compile(r"\b(map|maps|kanji|logo|button|coastline|states|cursor|template)\b")
_CLIPART_SECTIONS = ("food", "sign", "symbol", "shape", "people", "recreation", "tool", "transport")
_MAX_PLAYING_CARDS = 30
_TONE_AT_END = re.compile(r"(.*?)[ -](medium light|medium dark|light|medium|dark)( skin tone)?$")
_LOOSELY_NAMED = ("streamline-emojis", "icon-park", "emojione", "noto-v1", "fluent-emoji")
_NUMBERED = ("streamline-emojis", "icon-park")  # "smile 1", "smile two"


@dataclass
class Picture:
    """A candidate that is kept. `place` is its position among the candidates."""

    place: int
    candidate: Candidate
    look: Look
    split: str = ""


def make_records(candidates: list[Candidate], looks: Sequence[Look]) -> list[tuple[Picture, IconRecord]]:
    """The pack's pictures, sorted by set. Labels and tags of `candidates` are tidied in place."""
    weak = tidy(candidates)
    pictures = _distinct([Picture(i, c, looks[i]) for i, c in enumerate(candidates) if i not in weak])
    held_out = assign_splits(pictures)
    _hide(held_out, pictures)
    tones = Counter((p.candidate.set, p.candidate.concept) for p in pictures)
    kept = sorted((p for p in pictures if p.candidate.set not in SHARE_ALIKE), key=lambda p: p.candidate.set)
    return [(p, _record(p, tones[p.candidate.set, p.candidate.concept])) for p in kept]


def tidy(candidates: list[Candidate]) -> set[int]:
    """Better labels and tags, in place; returns the places of those that nothing sensible can be said about."""
    labelled = (c for c in candidates if c.set != "openclipart")
    known = {w for c in labelled for text in (c.label, *c.tags) for w in re.findall(r"[a-z]{2,}", text)}
    weak, cards = set(), 0
    for i, c in enumerate(candidates):
        if c.set == "fxemoji" and not c.hex and _badly_cut(c.label):
            weak.add(i)
        elif c.set == "streamline-pixel":
            label = _PIXEL_SECTIONS.sub("", c.label)
            c.label = c.concept = _PIXEL_SECTIONS.sub("", label) if len(label.split()) > 3 else label
        elif c.set == "openclipart":
            label = _clipart_label(c, known)
            if label and ("game/" in c.name or "/cards/" in c.name or ("games" in c.name and _has(label, "card"))):
                cards += 1
                label = label if cards <= _MAX_PLAYING_CARDS else ""
            if not label or _CLIPART_DULL.search(label):
                weak.add(i)
            else:
                c.label = c.concept = label
    emoji = {c.label: c for c in candidates if c.hex and not c.tone}
    for i, c in enumerate(candidates):
        c.tags = [tag for tag in c.tags if not _UNWANTED_TAG.search(tag)]
        if c.hex is None and c.set in _LOOSELY_NAMED:
            _recognise(c, emoji)
        c.concept = re.sub(rf", ({'|'.join(TONES.values())}) skin tone$", "", c.concept)
        if _UNWANTED_LABEL.search(c.label):
            weak.add(i)
    return weak


def _badly_cut(label: str) -> bool:
    words = label.split()
    short = any(len(word) <= 2 and word not in _SHORT_WORDS for word in words)
    return short or (len(words) > 3 and sum(map(len, words)) / len(words) < 3.2)


def _has(label: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", label) is not None


def _clipart_label(c: Candidate, known: set[str]) -> str:
    """The label without authors and numbers; where half of its words are strange, two tags; "" if there are none."""
    label = " ".join(_CLIPART_NOISE.sub("", re.sub(r"(?<=[a-z])\d+", "", c.label)).split())
    words = re.findall(r"[a-z]{2,}", label)
    if words and sum(word in known or word.rstrip("s") in known for word in words) / len(words) >= 0.5:
        return label
    plain = [tag for tag in c.tags if all(word in known for word in tag.split()) and tag not in _CLIPART_SECTIONS]
    return " ".join(plain[:2])


def _recognise(c: Candidate, emoji: dict[str, Candidate]) -> None:
    """A picture whose file name led to no emoji may still have the label of one, perhaps with a skin tone."""
    label = re.sub(r" (\d|one|two|three|four|five)$", "", c.label) if c.set in _NUMBERED else c.label
    label = re.sub(r"^(tone|skin type) .*", "", label) or c.label
    c.label = c.concept = label
    if c.set == "icon-park":
        return
    toned = _TONE_AT_END.match(label)
    same = emoji.get(toned[1]) if toned else None
    if toned and same:
        c.tone = next(number for number, name in TONES.items() if name == toned[2].replace(" ", "-"))
        c.label = f"{same.label}, {tone_name(c.tone)}"
    else:
        same = emoji.get(label)
    if same:
        c.concept, c.tags, c.group, c.hex = same.label, same.tags, same.group, same.hex


def _distinct(pictures: list[Picture]) -> list[Picture]:
    """Drop what cannot be drawn or seen, and all but the first of pictures that look the same."""
    first: dict[tuple[bool, bytes], Candidate] = {}
    kept = []
    for picture in pictures:
        c = picture.candidate
        if picture.look.flaw:
            continue
        original = first.setdefault((c.set in SHARE_ALIKE, picture.look.fingerprint), c)
        if original is c:
            kept.append(picture)
        elif original.label != c.label and original.set == c.set and not c.tone:
            original.also.append(c.label)
    return kept


def assign_splits(pictures: list[Picture]) -> list[str]:
    """Set every picture's split; returns the held-out concepts. Choices hang on names alone, not on chance.

    test_concept  whole concepts, with every picture whose label contains the words
    test_compose  COMPOSED, and one in twenty pairs of concept and skin tone, in every style
    test_style    for one in eight concepts one of its styles
    val           1.5 % of the rest
    """
    by_concept: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_concept[picture.candidate.concept].append(picture)
    widespread = [
        concept
        for concept, shown in by_concept.items()
        if shown[0].candidate.hex and len({p.candidate.style for p in shown}) >= 4
    ]
    held_out = _hold_out(widespread, by_concept, pictures)
    for concept in COMPOSED:
        _mark(by_concept[concept], "test_compose")
    for p in pictures:
        tone, concept = p.candidate.tone, p.candidate.concept
        if tone and number_of(f"tone{concept}{tone}") % 100 < 5:
            _mark([p], "test_compose")
    for concept in widespread:
        styles = sorted({p.candidate.style for p in by_concept[concept] if not p.split})
        if len(styles) >= 4 and number_of("style" + concept) % 100 < 12:
            style = styles[number_of("which" + concept) % len(styles)]
            _mark([p for p in by_concept[concept] if p.candidate.style == style], "test_style")
    for p in pictures:
        _mark([p], "val" if number_of("val" + p.candidate.set + p.candidate.name) % 1000 < 15 else "train")
    return held_out


def _mark(pictures: list[Picture], split: str) -> None:
    """Put pictures into a split unless they are in one already."""
    for picture in pictures:
        picture.split = picture.split or split


def _hold_out(concepts: list[str], by_concept: dict[str, list[Picture]], pictures: list[Picture]) -> list[str]:
    suited = [
        concept
        for concept in concepts
        if by_concept[concept][0].candidate.group in HELD_OUT_GROUPS
        and not re.search(r"o'clock|thirty|moon|button", concept)
    ]
    labels = [(picture, _spaced(picture.candidate.label)) for picture in pictures]
    held_out: list[str] = []
    for concept in sorted(suited, key=lambda concept: number_of("hold" + concept)):
        phrase = re.sub(r" face $", " ", _spaced(concept))
        plural = phrase.rstrip() + "s "
        named = [picture for picture, label in labels if phrase in label or plural in label]
        if 4 <= len(named) <= 70:
            held_out.append(concept)
            _mark([*named, *by_concept[concept]], "test_concept")
        if len(held_out) == NUM_HELD_OUT:
            break
    return held_out


def _hide(held_out: list[str], pictures: list[Picture]) -> None:
    """Take held-out concepts out of the tags of training pictures."""
    phrases = [_spaced(concept) for concept in held_out]
    for picture in pictures:
        if picture.split == "train":
            tags = picture.candidate.tags
            picture.candidate.tags = [tag for tag in tags if not any(p in _spaced(tag) for p in phrases)]


def _spaced(text: str) -> str:
    """Words between single spaces, one at each end, so that phrases can be found as substrings."""
    return f" {' '.join(re.findall('[a-z0-9]+', text))} "


def _record(picture: Picture, tones: int) -> IconRecord:
    c = picture.candidate
    part = PARTS[c.kind]
    weight = tones**-0.5 * PART_WEIGHTS[part] * (0.5 if c.group == "flag" else 1)
    turn = number_of(c.set + c.concept) % 5  # which two of five tones a smaller pack keeps
    return IconRecord(
        id=c.id,
        set=c.set,
        style=c.style,
        concept=c.concept,
        label=c.label,
        group=c.group,
        tone=tone_name(c.tone) if c.tone else None,
        tint=c.tint,
        colors=picture.look.colors,
        tags=tuple(c.tags),
        captions=captions(c, picture.look.colors),
        split=picture.split,
        weight=round(weight, 3),
        licence=c.licence,
        part=part,
        core=c.tone is None or (c.tone - 1 - turn) % 5 in (0, 2),
        hex=c.hex,
    )


def captions(c: Candidate, colors: tuple[str, ...]) -> tuple[str, ...]:
    """Four ways to say what the picture shows (see CAPTION_WEIGHTS), and up to two names of equal pictures."""
    label, number = c.label, number_of(c.set + c.name)
    phrases = [f"{c.tint} {phrase}" if c.tint else phrase for phrase in SETS[c.set].phrases]
    thing = with_article(label)
    if c.set == "circle-flags":  # "round flag of andorra", not "a round flag of the flag of andorra"
        label = thing = label.removeprefix("flag of ")
        opening = phrases[0]
    else:
        opening = with_article(phrases[0])
    tags = [tag for tag in c.tags if tag not in label][:12]
    some = random.Random(number).sample(tags, min(3, len(tags)))
    styled = (f"{opening} of {thing}", f"{label}, {phrases[0]}", f"{phrases[0]}: {label}")
    colored = f"{phrases[number // 7 % 3]} of {thing}, {' and '.join(colors)}"
    return (
        f"{c.tint} {label}" if c.tint else label,
        styled[number % 3],
        ", ".join([label, *some, phrases[1]]),
        colored if colors and not c.tint else f"{phrases[2]} of {thing}",
        *(f"{other}, {phrases[0]}" for other in c.also[:2]),
    )


def with_article(words: str) -> str:
    if words.startswith("flag of"):
        return "the " + words
    plural = words.endswith("s") and not words.endswith("ss")
    if plural or re.match(r"(the|a|an|flag|keycap)\b", words):
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words
