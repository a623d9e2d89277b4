"""The icon set's making, on small packages of our own that a stand-in for npm and apt-get hands out."""

import gzip
import hashlib
import io
import json
import lzma
import stat
import tarfile

import numpy as np
import pytest
from PIL import Image

from limner.data import rebuild
from limner.data.icons import open_icons
from limner.data.rebuild import packages, rebuild_icons, records, sets
from limner.data.rebuild.naming import EmojiNames, is_tag, normal, slug
from limner.data.rebuild.packages import CLIPART, EMOJI_3D, EMOJI_KEYWORDS, EMOJI_NAMES
from limner.data.rebuild.pictures import Look, color_name, look_at
from limner.data.rebuild.sets import Candidate
from limner.errors import FileProblem

WAVE, APPLE, FLAG = "1F44B", "1F34E", "1F1E6-1F1E9"
EMOJI_DATA = [
    {
        "hexcode": WAVE, "label": "waving hand", "group": 1, "tags": ["Hello", "waving hand", "no 1"],
        "skins": [
            {"hexcode": f"{WAVE}-1F3FB", "label": "waving hand: light skin tone", "tone": 1},
            {"hexcode": f"{WAVE}-1F3FF", "label": "waving hand: dark skin tone", "tone": 5},
            {"hexcode": f"{WAVE}-200D-{WAVE}", "label": "two hands", "tone": [1, 5]},
        ],
    },
    {"hexcode": f"{APPLE}-FE0F", "label": "red apple", "group": 4, "tags": ["fruit", "sexy fruit"]},
    {"hexcode": FLAG, "label": "flag: Andorra", "group": 9, "tags": ["AD"]},
    {"hexcode": "1F4CC", "label": "push pin", "group": 7},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]  # fmt: skip
SQUARE = '<path fill="{}" d="M2 2h12v12H2z"/>'


def icon_set(bodies, chars=None, spdx="MIT", **more):
    return {
        "icons.json": {"icons": {name: {"body": body} for name, body in bodies.items()}, **more},
        "info.json": {"license": {"spdx": spdx}},
        "chars.json": chars or {},
    }


def tar_of(files, root="package/", links=()):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(root + path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for path, target in links:
            member = tarfile.TarInfo(root + path)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return file.getvalue()


def deb_of(tar):
    out = b"!<arch>\n"
    for name, data in ((b"debian-binary", b"2.0"), (b"data.tar.xz", lzma.compress(tar))):
        out += name.ljust(16) + b" " * 32 + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
    return out


def webp(color):
    file = io.BytesIO()
    Image.new("RGBA", (256, 256), color).save(file, "WEBP", lossless=True)
    return file.getvalue()


def clipart(title, fill, rights="http://web.resource.org/cc/PublicDomain"):
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="d" xmlns:rdf="r" width="100mm" height="100mm">'
        f'<metadata><dc:title>{title}</dc:title><rdf:li>fruit</rdf:li><a b="{rights}"/></metadata>'
        f'<circle cx="20" cy="20" r="15" fill="{fill}"/></svg>'
    ).encode()


NPM_FILES = {
    EMOJI_NAMES: {
        "en/data.json": EMOJI_DATA,
        "en/shortcodes/cldr.json": {WAVE: "wave"},
        **{f"en/shortcodes/{name}.json": {} for name in ("emojibase", "github", "iamcal")},
    },
    EMOJI_KEYWORDS: {"dist/emoji-en-US.json": {"👋": ["waving_hand", "good_bye"], "🍎": ["red_apple"]}},
    "@iconify-json/noto": icon_set(
        {
            "waving-hand": SQUARE.format("#e00000"),
            "waving-hand-dark-skin-tone": SQUARE.format("#502000"),
            "mystery": SQUARE.format("#00c000"),
            "light-skin-tone": SQUARE.format("#0000e0"),
            "blank": "",
        },
        {"1f34e": "mystery"},
        "Apache-2.0",
    ),
    "@iconify-json/twemoji": icon_set({"wave": SQUARE.format("#e0e000"), "red-apple": SQUARE.format("#e0e000")}),
    "@iconify-json/openmoji": icon_set({"wave": SQUARE.format("#00e0e0")}, spdx="CC-BY-SA-4.0"),
    "@iconify-json/game-icons": icon_set({"broad-sword": SQUARE.format("currentColor")}, width=16, height=16),
    EMOJI_3D: {"assets/1f34e.webp": webp((200, 30, 30, 255)), "assets/ffff.webp": b"never opened"},
}
DEBIAN_FILES = {
    "fruit/apple_bob_01.svg": clipart("red apple", "#d01010"),
    "fruit/pear_bob_01.svg": clipart("By Bob", "#10d010"),
    "fruit/fig.svg": clipart("fig of Bob", "#10d010", rights="none stated"),
    "computer/red_apple.svg": clipart("red apple", "#1010d0"),
}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Pins for the small packages, and clients on the PATH that copy them out of a folder."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    npm = {}
    for name, files in NPM_FILES.items():
        file = shelf / f"{name.lstrip('@').replace('/', '-')}-1.0.tgz"
        file.write_bytes(gzip.compress(tar_of(files)))
        npm[name] = ("1.0", hashlib.sha256(file.read_bytes()).hexdigest())
    root = "./usr/share/openclipart/svg/"
    deb = shelf / f"{CLIPART}_1%3a2_all.deb"
    deb.write_bytes(deb_of(tar_of(DEBIAN_FILES, root, [("fruit/same_apple.svg", "apple_bob_01.svg")])))
    monkeypatch.setattr(packages, "NPM", npm)
    monkeypatch.setattr(packages, "DEBIAN", {CLIPART: ("1:2", hashlib.sha256(deb.read_bytes()).hexdigest())})
    clients = tmp_path / "bin"
    clients.mkdir()
    for client, ending in (("npm", "tgz"), ("apt-get", "deb")):
        (clients / client).write_text(f"#!/bin/sh\n/bin/cp '{shelf}'/*.{ending} .\n")
        (clients / client).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(clients))
    return shelf


@pytest.fixture
def names(registry, tmp_path):
    return EmojiNames(packages.download(tmp_path, clipart=False))


def test_the_pack_is_made_from_what_the_clients_fetch(registry, tmp_path, monkeypatch):
    lines = []
    out = rebuild_icons(tmp_path / "made" / "icons", workers=1, say=lines.append)
    pack = open_icons(out)
    found = {r.id: r for r in pack.records}
    assert list(found) == [
        "fluent-emoji-3d/1f34e", "game-icons/broad-sword", "noto/waving-hand", "noto/waving-hand-dark-skin-tone",
        "noto/mystery", "openclipart/fruit/apple_bob_01.svg", "openclipart/fruit/pear_bob_01.svg", "twemoji/wave",
    ]  # fmt: skip
    wave = found["noto/waving-hand-dark-skin-tone"]
    assert (wave.concept, wave.label, wave.tone) == ("waving hand", "waving hand, dark skin tone", "dark skin tone")
    assert (wave.group, wave.part, wave.licence, wave.hex) == ("people", "emoji", "Apache-2.0", f"{WAVE}-1F3FF")
    assert wave.weight == 0.707
    assert wave.tags == ("hello", "good bye")
    assert found["noto/mystery"].label == "red apple"
    assert found["noto/mystery"].tags == ("fruit",)
    assert found["noto/mystery"].colors == ("green",)
    assert found["twemoji/wave"].captions[4:] == ("red apple, flat emoji",)
    assert found["openclipart/fruit/pear_bob_01.svg"].label == "fruit"
    sword = found["game-icons/broad-sword"]
    assert sword.captions[0] == f"{sword.tint} broad sword"
    assert sets.TINTS[sword.tint] in pack.svgs[1]
    assert pack.source(0) == webp((200, 30, 30, 255))
    ink = pack.render(5, 128)
    assert ink[64, 64].tolist() == pytest.approx([208, 16, 16, 255], abs=6)
    assert ink[:, :4].max() == 0
    assert lines[:2] == ["fetching packages", "drawing 12 pictures"]
    assert "differ from the shipped model" in lines[-1]
    monkeypatch.setattr(rebuild, "RECORDS_SHA256", rebuild.fingerprint(pack.records))
    lines.clear()
    rebuild_icons(tmp_path / "again", workers=1, say=lines.append)
    assert "differ" not in lines[-1]
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["icons"]


def test_the_same_packages_give_the_same_pack(registry, tmp_path):
    first, second = (open_icons(rebuild_icons(tmp_path / name, workers=1)).digest for name in "ab")
    assert first == second


def test_clip_art_is_left_out_only_when_asked(registry, tmp_path):
    (tmp_path / "bin" / "apt-get").unlink()
    with pytest.raises(FileProblem, match=r"no apt-get.*--without-clipart"):
        rebuild_icons(tmp_path / "a", workers=1)
    pack = open_icons(rebuild_icons(tmp_path / "b", clipart=False, workers=1))
    assert "openclipart" not in {r.set for r in pack.records}
    assert len(pack) == 6


def test_nothing_is_left_behind_by_a_failure(registry, tmp_path):
    place = tmp_path / "place"
    npm = tmp_path / "bin" / "npm"
    working = npm.read_text()
    npm.write_text("#!/bin/sh\necho 'npm warn old\nnpm error network is down\nnpm error no route' >&2\nexit 1\n")
    with pytest.raises(
        FileProblem, match="npm could not fetch the packages, it said: npm error network is down; npm error no route"
    ):
        rebuild_icons(place / "icons")
    npm.write_text(working)
    spoilt = registry / "emojilib-1.0.tgz"
    spoilt.write_bytes(spoilt.read_bytes() + b"!")
    with pytest.raises(FileProblem, match=r"emojilib-1\.0\.tgz has SHA-256 .*pinned is"):
        rebuild_icons(place / "icons")
    spoilt.unlink()
    with pytest.raises(FileProblem, match=r"left no emojilib-1\.0\.tgz"):
        rebuild_icons(place / "icons")
    npm.unlink()
    with pytest.raises(FileProblem, match="there is no npm"):
        rebuild_icons(place / "icons")
    assert list(place.iterdir()) == []


def test_a_client_that_never_answers_is_given_up(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_TIMEOUT", 0.2)
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\nexec /bin/sleep 5\n")
    with pytest.raises(FileProblem, match="npm got no answer within"):
        rebuild_icons(tmp_path / "icons")


def test_an_existing_folder_is_not_overwritten(registry, tmp_path):
    (tmp_path / "icons").mkdir()
    (tmp_path / "icons" / "mine.txt").write_text("keep")
    with pytest.raises(FileProblem, match="exists already"):
        rebuild_icons(tmp_path / "icons")
    assert (tmp_path / "icons" / "mine.txt").read_text() == "keep"


def test_emoji_are_found_by_many_names(names):
    assert names.find("waving-hand") == names.find("wave") == WAVE
    assert names.find("waving-hand-dark") == names.find("waving-hand-dark-skin-tone") == f"{WAVE}-1F3FF"
    assert names.find("flag-andorra") == names.find("flag-for-andorra") == FLAG
    assert names.find("waving-hand-tone") is None
    assert names.find_squeezed("redapple") == APPLE
    assert names.by_hex[FLAG].label == "flag of andorra"
    assert names.by_hex[f"{WAVE}-200D-{WAVE}"].mixed
    assert names.named("Red Apple") is names.by_hex[APPLE]
    assert "1F1E6" not in names.by_hex


def test_run_together_names_are_cut_into_the_fewest_known_words(names):
    assert names.segment("redapplehand") == ["red", "apple", "hand"]
    assert names.segment("redpushpin") == ["red", "pushpin"]
    assert names.segment("redxyz") is None
    assert names.segment("") is None


@pytest.mark.parametrize(
    ("text", "wanted"), [("Côte d’Ivoire", "cote-divoire"), ("A & B's: c.", "a-and-bs-c"), ("--x--", "x")]
)
def test_slugs_are_plain(text, wanted):
    assert slug(text) == wanted


def test_code_points_and_tags_have_one_form():
    assert normal("2764-fe0f-200d") == "2764-200D"
    assert is_tag("good bye")
    assert not is_tag("a1")


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "gray"), ((230, 20, 20), "red"),
        ((245, 140, 30), "orange"), ((120, 70, 40), "brown"), ((240, 220, 40), "yellow"), ((30, 160, 60), "green"),
        ((20, 160, 160), "teal"), ((40, 100, 230), "blue"), ((30, 40, 100), "navy blue"), ((130, 60, 200), "purple"),
        ((240, 90, 170), "pink"), ((170, 200, 240), "light blue"), ((240, 200, 165), "beige"),
    ],
)  # fmt: skip
def test_colours_have_plain_names(rgb, name):
    assert color_name(*rgb) == name


def svg(body):
    return sets._SVG.format(left=0, top=0, width=16, height=16, body=body)


def test_what_cannot_be_seen_is_a_flaw():
    def flaw(source, clipart=False):
        return look_at((0, source, clipart))[1].flaw

    assert flaw(svg(SQUARE.format("#f00"))) == ""
    assert flaw(svg('<path d="M0 0h1v1z"/>')) == "blank"
    assert flaw(svg(SQUARE.format("#fff"))) == "white on white"
    assert flaw("<svg").startswith("cannot be drawn")
    assert flaw(b"no picture").startswith("cannot be drawn")
    assert flaw(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', True).endswith("blank page")
    assert flaw(b"\xff", True).startswith("cannot be drawn")


def test_pictures_that_look_the_same_have_the_same_fingerprint():
    looks = [look_at((0, svg(SQUARE.format(c)), False))[1].fingerprint for c in ("#f00", "#ff0000", "#fe0000", "#00f")]
    assert looks[0] == looks[1] == looks[2] != looks[3]


def test_small_ink_on_a_large_page_fills_the_picture():
    page = b'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="900"><circle cx="9" cy="9" r="8"/></svg>'
    picture = np.array(Image.open(io.BytesIO(look_at((0, page, True))[1].webp)).convert("RGBA"))
    box = Image.fromarray(picture).getchannel("A").point(lambda a: 255 * (a > 128)).getbbox()
    assert box == pytest.approx((4, 4, 124, 124), abs=2)


def a_candidate(number, label, **fields):
    base = {
        "set": "noto", "name": f"n{number}", "source": "", "style": "noto", "licence": "MIT", "concept": label,
        "label": label, "group": "food", "tags": [], "hex": "1",
    }  # fmt: skip
    return Candidate(**(base | fields))


def split(items):
    looks = [Look("", bytes([i // 256, i % 256])) for i in range(len(items))]
    return {p.candidate.id: (p, r) for p, r in records.make_records(items, looks)}


def test_a_held_out_concept_leaves_no_trace_in_training():
    styles = ("noto", "twemoji", "emojione", "fluent-emoji")
    items = [a_candidate(i, "otter", set=s, style=s) for i, s in enumerate(styles)]
    items += [
        a_candidate(4, "two otters", hex=None, concept="pair"),
        a_candidate(5, "pond", hex=None, tags=["sea otter", "water"]),
        a_candidate(6, "trotter", hex=None),
    ]
    made = split(items)
    assert [made[c.id][1].split for c in items[:5]] == ["test_concept"] * 5
    assert made["noto/n5"][1].split in ("train", "val")
    if made["noto/n5"][1].split == "train":
        assert made["noto/n5"][1].tags == ("water",)
    assert made["noto/n6"][1].split != "test_concept"


def test_composed_concepts_are_held_out_in_every_style_and_share_alike_art_is_not_taken():
    items = [a_candidate(i, "green heart", set=s, style=s) for i, s in enumerate(("noto", "twemoji", "openmoji"))]
    made = split(items)
    assert set(made) == {"noto/n0", "twemoji/n1"}
    assert {r.split for _, r in made.values()} == {"test_compose"}


def test_an_equal_picture_is_merged_and_its_name_kept():
    items = [
        a_candidate(0, "norway", group="flag"),
        a_candidate(1, "svalbard"),
        a_candidate(2, "norway", set="twemoji"),
    ]
    made = records.make_records(items, [Look("", b"same", ("red", "blue"))] * 3)
    assert len(made) == 1
    record = made[0][1]
    assert record.weight == 0.5
    assert record.captions[0] == "norway"
    assert record.captions[4:] == ("svalbard, soft shaded emoji",)
    assert record.captions[3].endswith("norway, red and blue")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("apple", "an apple"), ("fox", "a fox"), ("scissors", "scissors"), ("glass", "a glass"),
        ("flag of peru", "the flag of peru"), ("keycap 1", "keycap 1"), ("the moon", "the moon"),
    ],
)  # fmt: skip
def test_captions_have_articles(words, wanted):
    assert records.with_article(words) == wanted


def test_every_pin_is_a_whole_hash_of_an_exact_version():
    pins = packages.NPM | packages.DEBIAN
    assert {f"@iconify-json/{name}" for name in sets.SETS} - set(pins) == {
        "@iconify-json/fluent-emoji-3d", "@iconify-json/openclipart",
    }  # fmt: skip
    for version, sha256 in pins.values():
        assert version[0].isdigit()
        assert len(bytes.fromhex(sha256)) == 32
