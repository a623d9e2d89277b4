"""The sets: which icons of each package become pictures, and what they are called at first."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from limner.data.rebuild.naming import EmojiNames, is_tag, normal
from limner.data.rebuild.packages import CLIPART, EMOJI_3D, Package

EMOJI, MONO_EMOJI, ICON, FLAG, MONO, CLIP = "emoji", "mono emoji", "icon", "flag", "mono", "clipart"
PARTS = {EMOJI: "emoji", MONO_EMOJI: "mono", ICON: "icon", FLAG: "icon", MONO: "mono", CLIP: "clipart"}
SHARE_ALIKE = ("openmoji", "emojione-v1")
"""Their licence asks for share-alike, so they lend names and decide about splits, but no picture is taken."""


@dataclass(frozen=True)
class IconSet:
    """`style` the group label, `phrases` three ways to say it, `kind` how its names are to be read."""

    style: str
    phrases: tuple[str, str, str]
    kind: str


# fmt: off
SETS = {  # in this order: of two equal pictures the first stays
    "noto": IconSet("noto", ("soft shaded emoji", "noto emoji", "emoji with smooth gradients"), EMOJI),
    "noto-v1": IconSet("blob", ("blob emoji", "cute blob style emoji", "android blob emoji"), EMOJI),
    "twemoji": IconSet("twemoji", ("flat emoji", "simple flat vector emoji", "twemoji style emoji"), EMOJI),
    "fluent-emoji": IconSet("glossy", ("glossy gradient emoji", "fluent color emoji", "shiny vector emoji"), EMOJI),
    "fluent-emoji-flat": IconSet("fluent-flat", ("bold flat emoji", "fluent flat emoji", "modern flat emoji"), EMOJI),
    "emojione": IconSet("emojione", ("rounded flat emoji", "emojione style emoji", "classic flat emoji"), EMOJI),
    "fxemoji": IconSet("fxemoji", ("firefox os emoji", "playful flat emoji", "fxemoji style emoji"), EMOJI),
    "streamline-emojis": IconSet(
        "cartoon-outline",
        ("outlined cartoon emoji", "cartoon emoji with thick outlines", "streamline emoji"), EMOJI),
    "fluent-emoji-high-contrast": IconSet(
        "glyph", ("glyph emoji", "monochrome high contrast emoji", "solid glyph emoji"), MONO_EMOJI),
    "emojione-monotone": IconSet(
        "mono-line", ("monochrome emoji", "single color emoji glyph", "monotone emoji"), MONO_EMOJI),
    "flat-color-icons": IconSet("flat-icon", ("flat color icon", "simple flat icon", "material flat icon"), ICON),
    "fluent-color": IconSet("fluent-icon", ("gradient app icon", "fluent ui color icon", "modern gradient icon"), ICON),
    "icon-park": IconSet(
        "line-fill", ("blue outline icon", "two tone outline icon with blue fill", "icon park style icon"), ICON),
    "streamline-ultimate-color": IconSet(
        "ultimate-color", ("pastel outline icon", "colored line icon", "streamline color icon"), ICON),
    "streamline-freehand-color": IconSet(
        "freehand", ("hand drawn doodle icon", "freehand sketch icon", "hand drawn marker icon"), ICON),
    "meteocons": IconSet("weather", ("weather icon", "meteo icon", "weather forecast icon"), ICON),
    "circle-flags": IconSet("circle-flag", ("round flag", "circular flag badge", "circle flag icon"), FLAG),
    "game-icons": IconSet("silhouette", ("silhouette icon", "fantasy game icon", "solid silhouette symbol"), MONO),
    "ph": IconSet("duotone", ("duotone icon", "two tone line icon", "thin duotone icon"), MONO),
    "streamline-pixel": IconSet("pixel", ("pixel art icon", "8-bit pixel icon", "pixelated icon"), MONO),
    "openmoji": IconSet(
        "openmoji", ("outlined flat emoji", "openmoji style emoji", "emoji with black outlines"), EMOJI),
    "emojione-v1": IconSet(
        "emojione-v1", ("glossy classic emoji", "emojione 1 style emoji", "shaded vintage emoji"), EMOJI),
    "fluent-emoji-3d": IconSet("3d", ("3d emoji", "3d rendered emoji", "glossy 3d clay render"), EMOJI),
    "openclipart": IconSet("clipart", ("clip art", "vector clip art drawing", "clipart illustration"), CLIP),
}
TINTS = {
    "black": "#111111", "red": "#e02b2b", "orange": "#f58a1f", "yellow": "#f2c314", "green": "#2ea043",
    "teal": "#14a3a0", "blue": "#2f6fe4", "navy blue": "#1f2a6b", "purple": "#8439c9", "pink": "#ee5fa7",
    "brown": "#7a4a25", "gray": "#7d848c",
}
# fmt: on
_UNTINTED = "#222222"

_BRAND_WORDS = """
    logo brand facebook twitter google apple_logo instagram youtube tiktok linkedin whatsapp github gitlab amazon
    paypal microsoft android windows chrome figma dribbble behance pinterest reddit slack snapchat spotify skype
    telegram twitch discord medium_logo steam stripe netflix wechat alipay weibo mastercard visa bitcoin ethereum vk
    xbox playstation nintendo angular codepen dropbox soundcloud patreon messenger notion mastodon meta threads
    onlyfans openai adobe photoshop illustrator uber airbnb ikea tesla nvidia intel pokemon mcdonalds starbucks
"""
_BRANDS = re.compile(rf"\b({'|'.join(_BRAND_WORDS.split()).replace('_', ' ')})\b")
_COMPONENT = re.compile(r"regional indicator|keycap digit|^u[0-9a-f]{4}|^e[0-9a-f]{3}\b")
_TWO_TONES = re.compile(
    r"(light|medium|dark) skin tone.*(light|medium|dark) skin tone"
    r"|(light|medium|dark) (medium |light |dark )*(light|medium|dark)$"
)

_CLIPART_ROOT = "openclipart/svg/"
_CLIPART_MAX_BYTES = 600_000
_CLIPART_SKIPPED = (
    "computer/", "shapes/stars", "shapes/flowchart", "shapes/callouts", "shapes/jigsaw", "signs_and_symbols/flags",
    "special", "logos", "signs_and_symbols/map_symbols", "unsorted", "buttons", "decorations", "transportation/aiga",
    "recreation/religion", "signs_and_symbols/led", "transportation/roadsigns", "tools/weapons",
)  # fmt: skip
_CLIPART_IN_PUBLIC_DOMAIN = re.compile(r"web\.resource\.org/cc/PublicDomain|creativecommons.org/licenses/publicdomain")
_CLIPART_IDLE_TAGS = {
    "hash", "unsorted", "", "clip art", "clipart", "image", "svg", "png", "media", "public domain", "icon", "icons",
    "signs and symbols",
}  # fmt: skip
_CLIPART_IDLE_TITLE = re.compile(
    r"clipart|part of|collection|svg|http|@|openclip|submission|theme|\bby\b|drawing|untitled|aiga|gerald",
    re.IGNORECASE,
)
_CLIPART_AUTHOR = re.compile(
    r"_(gerald|jon|johnny|ganson|benji|jaim|archi|architetto|architett|francesco|nicu|nicubunu|lumen|ger|g|gg|hans"
    r"|stylized)(_.*)?$"
)


@dataclass(kw_only=True)
class Candidate:
    """A picture on its way into the pack. `source` is SVG text or WebP bytes; for clip art the bytes of an SVG file."""

    set: str
    name: str
    source: str | bytes
    style: str
    licence: str
    concept: str
    label: str
    group: str
    tags: list[str]
    hex: str | None = None
    tone: int | None = None
    tint: str | None = None
    also: list[str] = field(default_factory=list)
    """Labels of equal pictures that were merged into this one."""

    @property
    def id(self) -> str:
        return f"{self.set}/{self.name}"

    @property
    def kind(self) -> str:
        return SETS[self.set].kind


def number_of(text: str) -> int:
    """A number that depends on the text alone: stands in for chance wherever a choice must be the same every time."""
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:8], 16)


def candidates(packages: Mapping[str, Package], names: EmojiNames) -> list[Candidate]:
    """Every picture of the packages that has a name, in the order of SETS."""
    found: list[Candidate] = []
    for key in SETS:
        if f"@iconify-json/{key}" in packages:
            found += _iconify(key, packages[f"@iconify-json/{key}"], names)
    found += _emoji_3d(packages[EMOJI_3D], names)
    if CLIPART in packages:
        found += _clipart(packages[CLIPART], names)
    return found


def _iconify(key: str, package: Package, names: EmojiNames) -> Iterator[Candidate]:
    icons = package.read_json("icons.json")
    licence = package.read_json("info.json")["license"]["spdx"]
    chars = {name: normal(code) for code, name in package.read_json("chars.json").items()}
    kind = SETS[key].kind
    for name in _chosen(key, [n for n, icon in icons["icons"].items() if not icon.get("hidden")]):
        tint = None
        if kind in (MONO, MONO_EMOJI):
            tint = list(TINTS)[number_of(key + name) % len(TINTS)] if number_of(name + key) % 3 else "black"
        icon = {k: icons["icons"][name].get(k, icons.get(k, v)) for k, v in _BOX.items()}
        body = icons["icons"][name]["body"].replace("currentColor", TINTS[tint] if tint else _UNTINTED)
        candidate = Candidate(
            set=key,
            name=name,
            source=_SVG.format(**icon, body=body),
            style=SETS[key].style,
            licence=licence,
            concept="",
            label="",
            group="",
            tags=[],
            tint=tint,
        )
        if _name(candidate, chars.get(name), names):
            yield candidate


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # iconify's defaults
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{left} {top} {width} {height}" width="128" height="128">{body}</svg>'
)


def _chosen(key: str, names: list[str]) -> list[str]:
    if key == "ph":
        return [name for name in names if name.endswith("-duotone")]
    if key != "fluent-color":
        return names
    largest: dict[str, int] = {}  # "add-circle-16", "add-circle-24": the same picture in several sizes
    for stem, _, size in (name.rpartition("-") for name in names):
        largest[stem] = max(largest.get(stem, 0), int(size))
    return [f"{stem}-{size}" for stem, size in largest.items()]


def _name(candidate: Candidate, code: str | None, names: EmojiNames) -> bool:
    """Fill in what the picture shows; False if it is to be left out."""
    if candidate.kind in (EMOJI, MONO_EMOJI):
        return _name_emoji(candidate, code, names)
    if candidate.kind == FLAG:
        return _name_flag(candidate, names)
    return _name_icon(candidate, names)


def _name_emoji(candidate: Candidate, code: str | None, names: EmojiNames) -> bool:
    key, name = candidate.set, candidate.name
    if code not in names.by_hex:
        code = names.find(name)
    if code is None and key == "fxemoji":
        code = names.find_squeezed(name)
    if code is not None:
        return _is_emoji(candidate, code, names)
    words = " ".join(names.segment(name) or []) if key == "fxemoji" else name.replace("-", " ")
    if not words or _COMPONENT.search(words) or _TWO_TONES.search(words):
        return False
    if key in ("noto", "twemoji") and "skin tone" in words:
        return False
    candidate.concept = candidate.label = words
    candidate.group = "other"
    return True


def _is_emoji(candidate: Candidate, code: str, names: EmojiNames) -> bool:
    emoji = names.by_hex[code]
    if emoji.mixed or emoji.group == "component":
        return False
    candidate.hex, candidate.tone = code, emoji.tone
    candidate.concept, candidate.label = names.by_hex[emoji.base].label, emoji.label
    candidate.group, candidate.tags = emoji.group, list(emoji.tags)
    return True


def _name_flag(candidate: Candidate, names: EmojiNames) -> bool:
    name = candidate.name
    if re.fullmatch("[a-z]{2}", name):
        code = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):X}" for letter in name)
        if code in names.by_hex:
            return _is_emoji(candidate, code, names)
    if len(name) < 5 or re.match(r"[a-z]{2}-[a-z0-9]{1,3}$", name):  # "us-ca": a region by its code
        return False
    candidate.concept = candidate.label = "flag of " + name.replace("-", " ")
    candidate.group, candidate.tags = "flag", ["flag"]
    return True


def _name_icon(candidate: Candidate, names: EmojiNames) -> bool:
    name = candidate.name
    if candidate.set == "fluent-color":
        name = name.rpartition("-")[0]
    if candidate.set == "ph":
        name = name.removesuffix("-duotone")
    if candidate.set == "meteocons":
        candidate.style = "weather-fill" if name.endswith("-fill") else "weather-line"
        name = name.removesuffix("-fill")
    name = re.sub(r"-\d$", "", re.sub(r"-(alternate|alt|icon)$", "", name))
    words = name.replace("-", " ").strip()
    if _BRANDS.search(words) and candidate.set != "game-icons":
        return False
    emoji = names.named(words)
    candidate.concept = emoji.label if emoji and not emoji.tone else words
    candidate.label = words
    candidate.group, candidate.tags = (emoji.group, list(emoji.tags)) if emoji else ("icon", [])
    return True


def _emoji_3d(package: Package, names: EmojiNames) -> Iterator[Candidate]:
    for path, data in sorted(package.members("assets/", ".webp")):
        name = PurePosixPath(path).stem
        candidate = Candidate(
            set="fluent-emoji-3d",
            name=name,
            source=data,
            style="3d",
            licence="MIT",
            concept="",
            label="",
            group="",
            tags=[],
        )
        if normal(name) in names.by_hex and _is_emoji(candidate, normal(name), names):
            yield candidate


def _clipart(package: Package, names: EmojiNames) -> Iterator[Candidate]:
    for path, data in sorted(package.members(_CLIPART_ROOT, ".svg")):
        name = path.removeprefix(_CLIPART_ROOT)
        text = data.decode("utf-8", "ignore")
        if name.startswith(_CLIPART_SKIPPED) or len(data) > _CLIPART_MAX_BYTES:
            continue
        if not _CLIPART_IN_PUBLIC_DOMAIN.search(text):
            continue
        label = _clipart_label(name, text)
        if len(label) < 3 or len(label.split()) > 7:
            continue
        tags = (
            t.strip().lower().replace("_", " ") for t in re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", text, re.DOTALL)
        )
        kept = dict.fromkeys(t for t in tags if t not in _CLIPART_IDLE_TAGS and not t.startswith("hash") and is_tag(t))
        emoji = names.named(label)
        yield Candidate(
            set="openclipart",
            name=name,
            source=data,
            style="clipart",
            licence="CC-PDDC (public domain)",
            concept=emoji.label if emoji and not emoji.tone else label,
            label=label,
            group="clipart",
            tags=list(kept)[:8],
        )


def _clipart_label(name: str, text: str) -> str:
    """The title inside the file if it says something, else the file's name without author and number."""
    titles = re.findall(r"<dc:title>(.*?)</dc:title>", text, re.DOTALL)
    words = titles[0].strip() if titles else ""
    if not words or _CLIPART_IDLE_TITLE.search(words) or len(words) > 60 or not words.isascii():
        stem = PurePosixPath(name).name.removesuffix(".svg").lower()
        words = _CLIPART_AUTHOR.sub("", re.sub(r"(_[a-z]+)?_\d+[a-z]?_?$", "", stem))
    words = re.sub(r"[^a-z0-9 ']", " ", re.sub(r"[_\-]+", " ", words.lower()))
    return " ".join(re.sub(r"\b\d+\b", "", words).split())
