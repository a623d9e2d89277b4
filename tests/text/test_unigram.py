"""T5's tokenizer against transformers' T5Tokenizer of the same pieces and map of signs."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import struct

import pytest

from limner.errors import FileProblem
from limner.text import unigram
from limner.text.unigram import T5Tokenizer, of_sentencepiece

from .test_bpe import HAND_MADE, random_texts

MARKS = ["a </s> b<extra_id_3>c <pad><unk>x  </s>", "fox</s>", "<extra_id_99><extra_id_100>", "▁a ▁ b", " ▁▁"]
PUBLISHED = gzip.decompress(unigram.MODEL.read_bytes())


@pytest.fixture(scope="module")
def data():
    return of_sentencepiece(PUBLISHED, "file")


def test_the_shipped_file_is_the_published_one(data):
    """The digest that the hub shows of `spiece.model` beside the weights of every T5 1.1."""
    digest = hashlib.sha256(PUBLISHED).hexdigest()
    assert digest == "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
    assert unigram.MODEL.stat().st_size < 450_000
    assert "Apache License" in (unigram.MODEL.parent / "LICENSE.txt").read_text()
    pieces, _ = data
    assert len(pieces) == unigram.shipped().size == 32_100
    assert pieces[:4] == [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0122928619384766)]
    assert (pieces[31_999][1] < -10, pieces[32_000][0], pieces[-1][0]) == (True, "<extra_id_99>", "<extra_id_0>")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Studies have been shown that owning a dog is good for you",
         [6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]),
        ("translate English to German: The house is wonderful.",
         [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]),
        ("", [1]),
        ("  a\n\n猫 ", [3, 9, 3, 2, 1]),
    ],
)  # fmt: skip
def test_ids_that_are_known(text, ids):
    assert unigram.shipped().encode([text]) == [ids]
    assert unigram.shipped().encode([text], marked=False) == [ids[:-1]]


def test_texts_give_the_ids_of_transformers(data):
    from transformers import T5Tokenizer as Oracle

    pieces, charsmap = data
    oracle = Oracle(vocab=pieces, _spm_precompiled_charsmap=charsmap)
    texts = [*HAND_MADE, *MARKS, *random_texts(10_000)]
    assert unigram.shipped().encode(texts) == oracle(texts)["input_ids"]


def test_a_folder_gives_the_same_whichever_file_it_has_and_transformers_reads_it(tmp_path):
    from transformers import AutoTokenizer

    whole, model = tmp_path / "whole", tmp_path / "model"
    for folder in (whole, model):
        folder.mkdir()
    (model / "spiece.model").write_bytes(PUBLISHED)
    for name, content in unigram.shipped().files(77).items():
        (whole / name).write_text(content if isinstance(content, str) else json.dumps(content))
    texts = [*HAND_MADE, *MARKS, *random_texts(200)]
    expected = unigram.shipped().encode(texts)
    assert T5Tokenizer.from_folder(whole).encode(texts) == expected
    assert T5Tokenizer.from_folder(model).encode(texts) == expected
    oracle = AutoTokenizer.from_pretrained(whole)
    assert oracle(texts)["input_ids"] == expected
    assert oracle.model_max_length == 77


def test_pieces_lie_where_they_are_in_the_text():
    text = "Ａ ﬁne   cat"
    (found,) = unigram.shipped().encodings([text])
    assert [text[slice(*place)] for place in found.offsets][-1] == "cat"


# ---------------------------------------------------------------- folders


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of Protocol Buffers, of less than 2^14 bytes."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value) & 127 | 128, len(value) >> 7]) + value


def small(charsmap: bytes, kind: int = 1) -> bytes:
    """A model of SentencePiece's with a few pieces, a field that nobody needs, and this map of signs."""
    words = ["<pad>", "</s>", "<unk>", "▁", "a", "▁fox", "f", "o", "x"]
    pieces = [field(1, field(1, word.encode()) + field(2, -float(i)) + field(3, 1)) for i, word in enumerate(words)]
    size = len(charsmap)
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    inside = bytes([2 << 3 | 2]) + varint + charsmap
    size = len(inside)
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    return b"".join(pieces) + field(2, field(3, kind) + field(9, b"x")) + bytes([3 << 3 | 2]) + varint + inside


def test_a_vocabulary_of_its_own_is_read_once_and_anew_when_it_changes(tmp_path, data):
    _, charsmap = data
    (tmp_path / "spiece.model").write_bytes(small(charsmap))
    tokenizer = T5Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(["a fox xo", "▁猫"]) == [[3, 4, 5, 3, 8, 7, 1], [3, 2, 1]]
    assert (tokenizer.pad, tokenizer.eos, tokenizer.unknown, tokenizer.size) == (0, 1, 2, 109)
    assert T5Tokenizer.from_folder(tmp_path) is tokenizer
    (tmp_path / "spiece.model").write_bytes(small(charsmap).replace(b"\xe2\x96\x81fox", b"\xe2\x96\x81cat"))
    assert T5Tokenizer.from_folder(tmp_path) is not tokenizer


def stored(charsmap: bytes, **changes) -> bytes:
    rows = [[word, -float(i)] for i, word in enumerate(["<pad>", "</s>", "<unk>", "▁", "fox"])]
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    whole = {"model": {"type": "Unigram", "vocab": rows}, "normalizer": {"type": "Sequence", "normalizers": [step]}}
    return json.dumps(whole | changes).encode()


def test_a_tokenizer_json_may_have_its_map_alone_or_in_a_sequence(tmp_path, data):
    _, charsmap = data
    for content in (
        stored(charsmap),
        stored(charsmap, normalizer=json.loads(stored(charsmap))["normalizer"]["normalizers"][0]),
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert T5Tokenizer.from_folder(tmp_path).encode(["fox"]) == [[3, 4, 1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other", b"", "has no tokenizer of T5's: there is no tokenizer.json and no spiece.model in it"),
        ("spiece.model", b"", "is a model of SentencePiece's, but not of T5's kind"),
        ("spiece.model", PUBLISHED[:1003], "spiece.model is not a whole model of SentencePiece's: get it again"),
        ("spiece.model", b"\xff" * 20, "not a whole model"),
        ("spiece.model", b"\x0b" * 20, "not a whole model"),
        ("spiece.model", b"\x08\x01", "not a whole model"),  # a piece that is a number
        ("spiece.model", field(1, field(1, b"\xff")), "not a whole model"),
        ("spiece.model", field(1, field(2, 1.0)), "not a whole model"),
        ("spiece.model", field(1, field(1, b"x") + field(2, 3)), "not a whole model"),
        ("spiece.model", small(b"\0" * 20_000, kind=2), "not of T5's kind"),
        ("spiece.model", small(b"\0" * 20_000), "its map of signs is not T5's"),
        ("tokenizer.json", b"{", "tokenizer.json is not JSON"),
        ("tokenizer.json", b"[" * 100_000, "is not JSON"),
        ("tokenizer.json", b"[]", "not a tokenizer of T5's kind"),
        ("tokenizer.json", stored(b"x", normalizer=None), "no map of signs"),
        ("tokenizer.json", stored(b"x", normalizer={"normalizers": 3}), "no map of signs"),
        ("tokenizer.json", stored(b"x", model={"type": "BPE", "vocab": {"a": 0}}), "not a tokenizer of T5's kind"),
        ("tokenizer.json", stored(b"x", model={"vocab": ["a"]}), "not pieces with their scores"),
        ("tokenizer.json", stored(b"x", model={"vocab": [["a", "b"]]}), "not pieces with their scores"),
        ("tokenizer.json", stored(b"x", normalizer={"precompiled_charsmap": "?"}), "map of signs or its scores are"),
        ("tokenizer.json", stored(b"x"), "its map of signs is not T5's"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileProblem, match=message):
        T5Tokenizer.from_folder(tmp_path)


def test_a_vocabulary_without_its_marks_is_refused(data):
    with pytest.raises(FileProblem, match="file: there is no </s> in its vocabulary; is it T5's"):
        T5Tokenizer([("<pad>", 0.0), ("<unk>", 0.0)], data[1], source="file")
