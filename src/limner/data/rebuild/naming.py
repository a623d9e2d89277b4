"""What each picture shows: names of icon files -> emoji, labels, tags, groups."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limner.data.rebuild.packages import EMOJI_KEYWORDS, EMOJI_NAMES, Package

GROUPS = (
    "smiley", "people", "component", "nature", "food", "travel", "activity", "object", "symbol", "flag",
)  # fmt: skip
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
_NAMED_BY_CODE_POINT = ("noto", "twemoji", "openmoji")  # sets whose file names are also good names of emoji

# Parts of the run-together names of Firefox OS emoji that are no words of any emoji's name.
_EXTRA_WORDS = """
    a left right writing networked three lower upper tip hand with text picture document documents screen
    desktop touchtone pocket calculator folder stamped envelope lighthing lightning mouse trackball button one two stock
    chart page empty notes note pages pad frame tiles oldpc hard disk cartridge tape optical disc icon fax bouquet black
    white pushpin sideways victory reversed raised thumbs down speech bubbles mood anger lips musical keyboard jacks
    ascending descending wired network printer
"""


def tone_name(tone: int) -> str:
    return f"{TONES[tone]} skin tone"


@dataclass(frozen=True)
class Emoji:
    """`base` the code points without skin tone; `tone` 1 to 5; `mixed` if two people have different tones."""

    label: str
    tags: tuple[str, ...]
    group: str
    base: str
    tone: int | None = None
    mixed: bool = False


class EmojiNames:
    """Unicode's emoji, found by code points ("1F44B-1F3FD") or by the many names that icon sets give them."""

    def __init__(self, packages: Mapping[str, Package]) -> None:
        self.by_hex: dict[str, Emoji] = {}
        self.by_slug: dict[str, str] = {}
        names, keywords = packages[EMOJI_NAMES], packages[EMOJI_KEYWORDS].read_json("dist/emoji-en-US.json")
        words = {_from_text(character): list(value) for character, value in keywords.items()}
        for entry in names.read_json("en/data.json"):
            if "group" in entry:
                self._add(entry, words)
        for source in ("cldr", "emojibase", "github", "iamcal"):
            for code, codes in names.read_json(f"en/shortcodes/{source}.json").items():
                for name in codes if isinstance(codes, list) else [codes]:
                    self._name(slug(name), normal(code))
        for source in _NAMED_BY_CODE_POINT:
            for code, name in packages[f"@iconify-json/{source}"].read_json("chars.json").items():
                self._name(name, normal(code))
        for code in self.by_hex:
            if "-" not in code:
                self._name(slug(unicodedata.name(chr(int(code, 16)), "")), code)
        for code, value in words.items():
            if value:
                self._name(slug(value[0]), code)
        self._by_base_and_tone: dict[tuple[str, int | None], str] = {}
        for code, emoji in self.by_hex.items():
            self._by_base_and_tone.setdefault((emoji.base, emoji.tone), code)
        self._squeezed: dict[str, str] = {}
        for name, code in self.by_slug.items():
            self._squeezed.setdefault(name.replace("-", ""), code)
        for point in (*range(0x2000, 0x3300), *range(0x1F000, 0x1FB00)):
            if name := unicodedata.name(chr(point), ""):
                self._squeezed.setdefault(slug(name).replace("-", ""), normal(f"{point:X}"))
        self._words = {word for name in self.by_slug for word in name.split("-") if len(word) > 1} | {
            *_EXTRA_WORDS.split()
        }

    def _add(self, entry: dict[str, Any], words: dict[str, list[str]]) -> None:
        code = normal(entry["hexcode"])
        label = _readable(entry["label"])
        found = [*entry.get("tags", []), *(word.replace("_", " ") for word in words.get(code, [])[1:])]
        tags = dict.fromkeys(t for t in (tag.lower().strip() for tag in found) if is_tag(t))
        tags.pop(entry["label"].lower(), None)
        emoji = Emoji(label, tuple(tags)[:14], GROUPS[entry["group"]], code)
        self.by_hex[code] = emoji
        self._name(slug(entry["label"]), code)
        for skin in entry.get("skins", []):
            tones = skin["tone"] if isinstance(skin["tone"], list) else [skin["tone"]]
            mixed = len(set(tones)) > 1
            tone = None if mixed else tones[0]
            toned = f"{label}, {tone_name(tone)}" if tone else _readable(skin["label"])
            self.by_hex[normal(skin["hexcode"])] = Emoji(toned, emoji.tags, emoji.group, code, tone, mixed)
            self._name(slug(skin["label"]), normal(skin["hexcode"]))

    def _name(self, name: str, code: str) -> None:
        if name and code in self.by_hex:
            self.by_slug.setdefault(name, code)

    def find(self, name: str) -> str | None:
        """Code points of the emoji that an icon file is named after."""
        for spelt in (name, name.replace("flag-for-", "flag-"), name.replace("-tone", "-skin-tone")):
            if spelt in self.by_slug:
                return self.by_slug[spelt]
        for tone in (2, 4, 1, 3, 5):  # "-medium-light" before "-light"
            for ending in (f"-{TONES[tone]}", f"-{TONES[tone]}-skin-tone"):
                base = self.by_slug.get(name.removesuffix(ending)) if name.endswith(ending) else None
                if base and (base, tone) in self._by_base_and_tone:
                    return self._by_base_and_tone[base, tone]
        return None

    def find_squeezed(self, name: str) -> str | None:
        """Code points of a name without spaces ("womansboots")."""
        code = self._squeezed.get(name)
        return code if code in self.by_hex else None

    def named(self, words: str) -> Emoji | None:
        """The emoji of exactly this name."""
        code = self.by_slug.get(slug(words))
        return self.by_hex[code] if code else None

    def segment(self, name: str) -> list[str] | None:
        """A name without spaces as the fewest known words, None if there is no such cut."""
        best: list[list[str] | None] = [[]]
        for end in range(1, len(name) + 1):
            cuts = (
                [*before, name[start:end]]
                for start in range(max(0, end - 16), end)
                if (before := best[start]) is not None and name[start:end] in self._words
            )
            best.append(min(cuts, key=len, default=None))
        return best[-1] or None


def normal(code: str) -> str:
    """Code points in capitals without the variation selector FE0F."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    plain = plain.replace("&", " and ").replace("'", "").replace(".", "")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def is_tag(text: str) -> bool:
    return re.fullmatch(r"[a-z][a-z '\-]{2,24}", text) is not None


def _from_text(character: str) -> str:
    return normal("-".join(f"{ord(c):X}" for c in character))


def _readable(label: str) -> str:
    label = label.replace("“", "").replace("”", "").replace("’", "'").lower()
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    return label.replace("keycap: ", "keycap ").replace(": ", ", ")
