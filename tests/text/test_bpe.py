"""CLIP's tokenizer against transformers' CLIPTokenizer of the same vocabulary and merges."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from limner.errors import FileProblem
from limner.text import bpe
from limner.text.bpe import CLIPTokenizer

HAND_MADE = [
    "",
    " ",
    " \t\r\n\v\f\u00a0\u2003\u3000\u200b\ufeff\x1c\x85",
    "a photo of a cat",
    "A  Photo\tOF\na CAT ",
    "it's we've I'M you'll they'd don't 'tis ''' '''s o'clock's 'S 'LL '",
    "rock'n'roll'll've",
    "3d 4k 8K 1234567890 ½ ² ⅷ ① ٣ ९ 𝟛",
    "!!! ?!?... -- --- __init__ (a), [b]; {c}: <d> e/f\\g |h| ~i~ `j` @k #l $m %n ^o &p *q =r +s",
    "&amp; &lt;b&gt; &#39; &quot;x&quot; &nbsp;&copy;",
    "<|startoftext|> <|endoftext|>x<|endoftext|> <|ENDOFTEXT|> <|endoftext |> </w> a</w> <start_of_text>",
    "🦊 👨‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ ☺︎ 🦊🦊🦊 x🦊y 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "猫の写真 貓 고양이 ひらがなカタカナ ｶﾀｶﾅ ＡＢＣ１２３",
    "ﬁ ﬂ ﬀ ﬃ ﬅ Æ œ ß ẞ ŉ ǆ Ǆ ǅ",
    "e\u0301 \u00e9 a\u030a \u212b \u00c5 \u1e9b\u0323 q\u0307\u0323 \u0344 \u0958 \u1100\u1161\u11a8",
    "İstanbul I ı Σίσυφος ΣΑΣ Ὀδυσσεύς ǰ ΐ K Å",
    "a\u0300\u0301\u0302\u0303b \u0301 \u0301x",
    "\x00\x01\x02\x1f\x7f\x80\x9f a\x00b \u2028\u2029 \u202ea\u202c \u00ad",
    "\ue000 \uf8ff \ufffd \uffff \U000f0000 \U0010ffff \u0378",
    "שָׁלוֹם مرحبا नमस्ते สวัสดี ქართული 𐍈 𝒳𝓎𝔷 ᎠᎡ ꭰ",
    "“curly” ‘quotes’ ’s ‘s – — … • ™ ® © € £ ¥ § ¶ ° ± × ÷",
    "a" * 1000,
    "supercalifragilisticexpialidocious" * 20,
    "ab12cd 12ab a1b2c3 x²y³",
    "猫" * 200 + "🦊" * 200 + "!" * 200 + "1" * 200,
    "http://example.org/a?b=c&d=e#f mail@example.org C:\\x\\y",
    "(red:1.3) [blue] ((green)) <lora:x:0.5> BREAK :: --ar 16:9",
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ",
    "abcxyzABCXYZ0123456789 '.,!?-\n\t",
    "'sStTrRvVeEmMlLdD ",
    "".join(map(chr, range(0x300))),
    "éèêëe\u0301\u0300\u0302ıİſßẞΣσςǅﬁﬂ'’ ",
    "🦊👍🏽🇩🇪❤\ufe0f\u200d👩 a1",
    "猫犬字ひカ한글ﾊﾟ　 ",
    "<|>startofexndSTARTOFEXND/w ",
]


def random_texts(count: int) -> list[str]:
    """Half of signs from anywhere in Unicode, half of signs that meet in words."""
    rng = random.Random(0)
    whole = [*range(0xD800), *range(0xE000, 0x3200), *range(0xE000, 0x20000)]
    texts = []
    for i in range(count):
        length = rng.randrange(40)
        if i % 2:
            texts.append("".join(rng.choices(ALPHABETS[i // 2 % len(ALPHABETS)], k=length)))
        else:
            top = rng.choice([0x80, 0x250, 0x3000, len(whole)])
            texts.append("".join(chr(whole[rng.randrange(top)]) for _ in range(length)))
    return texts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The shipped vocabulary as transformers keeps it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = json.loads(bpe.shipped().tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))
    return folder


@pytest.fixture(scope="module")
def oracle(files):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(files)


def test_the_shipped_merges_are_those_that_were_published():
    import gzip

    plain = gzip.decompress(bpe.MERGES.read_bytes())
    digest = hashlib.sha256(plain).hexdigest()
    assert digest == "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
    assert bpe.shipped().size == 49408
    assert bpe.MERGES.stat().st_size < 700_000


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("Hello, World!", [49406, 3306, 267, 1002, 256, 49407]),
        ("", [49406, 49407]),
    ],
)
def test_ids_that_are_known(text, ids):
    assert bpe.shipped().encode([text]) == [ids]
    assert bpe.shipped().encode([text], marked=False) == [ids[1:-1]]


def test_hand_made_texts_give_the_ids_of_transformers(oracle):
    assert bpe.shipped().encode(HAND_MADE) == oracle(HAND_MADE)["input_ids"]


def test_random_texts_give_the_ids_of_transformers(oracle):
    texts = random_texts(10_000)
    assert bpe.shipped().encode(texts, marked=False) == oracle(texts, add_special_tokens=False)["input_ids"]


def test_every_id_but_the_marks_can_come_out_of_a_text():
    tokenizer = bpe.shipped()
    letters = {word: i for word, i in tokenizer.tokenizer.get_vocab().items() if word.removesuffix("</w>").isascii()}
    words = [word.removesuffix("</w>") for word in letters if word.endswith("</w>") and word[0].isalpha()]
    found = tokenizer.encode(words, marked=False)
    assert len(words) > 30_000
    assert sum(ids == [letters[f"{word}</w>"]] for word, ids in zip(words, found, strict=True)) > 0.999 * len(words)


# ---------------------------------------------------------------- folders

SMALL = ["l o", "lo w</w>", "e r</w>", "lo w", "low er</w>"]


def small_vocabulary() -> dict[str, int]:
    """A vocabulary with no bytes but letters, the marks first: whatever else there is, is unknown."""
    letters = "abcdefghijklmnopqrstuvwxyz!"
    return {
        w: i
        for i, w in enumerate(
            ["<s>", "</s>", *letters, *(a + "</w>" for a in letters), *("".join(m.split()) for m in SMALL)]
        )
    }


def write_small(folder, whole: bool) -> None:
    marks = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "unk_token": "</s>",
        "pad_token": "!",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(marks | {"tokenizer_class": "CLIPTokenizer"}))
    first = len(small_vocabulary())
    added = {"<cat-toy>": first, "<Cat-Toy>_1": first + 1}
    if whole:
        model = {"type": "BPE", "vocab": small_vocabulary(), "merges": [m.split() for m in SMALL], "unk_token": "</s>"}
        model |= {"end_of_word_suffix": "</w>", "continuing_subword_prefix": "", "fuse_unk": False}
        rows = [{"content": w, "id": i, "special": False, "normalized": False} for w, i in reversed(added.items())]
        rows.append({"content": "!", "id": small_vocabulary()["!"], "special": True, "normalized": False})
        rows = [row | {"single_word": False, "lstrip": False, "rstrip": False} for row in rows]
        stored = {"version": "1.0", "added_tokens": sorted(rows, key=lambda row: row["id"]), "model": model}
        stored |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        (folder / "tokenizer.json").write_text(json.dumps(stored))
    else:
        (folder / "vocab.json").write_text(json.dumps(small_vocabulary()))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *SMALL, ""]))
        (folder / "added_tokens.json").write_text(json.dumps(added))


def test_a_tokenizer_is_made_once_of_the_same_files_and_anew_of_others(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write_small(folder, whole=False)
    one, two = map(CLIPTokenizer.from_folder, folders)
    assert one is two
    config = folders[1] / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"!"', '"</s>"'))
    other = CLIPTokenizer.from_folder(folders[1])
    assert (other is not one, other.pad == one.pad) == (True, False)
    (folders[1] / "merges.txt").unlink()
    with pytest.raises(FileProblem, match="merges"):
        CLIPTokenizer.from_folder(folders[1])


def test_the_shipped_vocabulary_read_from_a_folder_is_the_same(files, tmp_path):
    tokenizer = CLIPTokenizer.from_folder(files)
    bpe.shipped().tokenizer.save(str(tmp_path / "tokenizer.json"))
    whole = CLIPTokenizer.from_folder(tmp_path)
    texts = [*HAND_MADE, *random_texts(200)]
    assert tokenizer.encode(texts) == whole.encode(texts) == bpe.shipped().encode(texts)
    assert (tokenizer.bot, tokenizer.eot, tokenizer.pad, tokenizer.size) == (49406, 49407, 49407, 49408)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_its_own_vocabulary_gives_the_ids_of_transformers(tmp_path, whole):
    from transformers import CLIPTokenizer as Oracle

    write_small(tmp_path, whole)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    oracle = Oracle.from_pretrained(tmp_path)
    added = len(small_vocabulary())
    texts = [
        "lower",
        "low LOWER slow é🦊 4",
        "a <cat-toy> on <cat-toy>s",
        "x<Cat-Toy>_1",
        "<CAT-TOY> <cat-toy>_1",
        "<s> low</s>er",
        "lo w er",
    ]
    ids = tokenizer.encode(texts)
    assert ids == oracle(texts)["input_ids"]
    assert added in ids[2]
    assert added + 1 in ids[3]
    assert (tokenizer.bot, tokenizer.eot, tokenizer.size) == (0, 1, added + 2)
    assert tokenizer.pad == small_vocabulary()["!"]


@pytest.mark.parametrize("whole", [True, False])
def test_the_sign_that_fills_up_stays_a_sign_of_the_text(tmp_path, whole):
    """SD2 and SDXL pad with "!": transformers takes every "!" for padding then, OpenCLIP, their trainer, does not."""
    write_small(tmp_path, whole)
    assert CLIPTokenizer.from_folder(tmp_path).encode(["low!"], marked=False) == [
        [small_vocabulary()["low</w>"], small_vocabulary()["!</w>"]]
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "cannot read .*vocab.json: No such file.* tokenizer is tokenizer.json or vocab.json"),
        ("merges.txt", None, "cannot read .*merges.txt"),
        ("vocab.json", b"\xff", "cannot read .*not UTF-8"),
        ("vocab.json", b"{", "vocab.json is not JSON"),
        ("vocab.json", b"[" * 100_000, "vocab.json is not JSON"),
        ("vocab.json", b"[]", "is not a JSON object"),
        ("vocab.json", b"{}", "not words with their numbers"),
        ("vocab.json", b'{"a": "b"}', "not words with their numbers"),
        ("vocab.json", b'{"a": -1}', "not words with their numbers"),
        ("vocab.json", b'{"a": true}', "not words with their numbers"),
        ("vocab.json", b'{"a": 1, "b": 1}', "have the same number"),
        ("vocab.json", b'{"a": 1}', "merges are not of its vocabulary"),
        ("merges.txt", b"l o\nlow", "merges are not pairs of words"),
        ("merges.txt", b"l o w", "merges are not pairs of words"),
        ("merges.txt", b"x y", "merges are not of its vocabulary"),
        (
            "tokenizer_config.json",
            b'{"bos_token": "<s>", "eos_token": "</end>"}',
            "there is no '</end>' in its vocabulary",
        ),
        ("tokenizer_config.json", b"{}", "there is no '<|startoftext|>'"),
        ("added_tokens.json", b'{"<x>": 1000}', "has id 1000, which is not the next free"),
        ("added_tokens.json", b'{"<x>": "1"}', "added words are not words with their numbers"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "not a tokenizer of CLIP's kind"),
        ("tokenizer.json", b'{"model": {"end_of_word_suffix": "</w>"}}', "not words with their numbers"),
        ("tokenizer.json", b'{"model": {"end_of_word_suffix": "</w>", "vocab": {"a": 0}}}', "not pairs of words"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    write_small(tmp_path, whole=False)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileProblem, match=message.replace("|", r"\|")):
        CLIPTokenizer.from_folder(tmp_path)
