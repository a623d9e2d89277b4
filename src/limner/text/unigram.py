"""T5's tokenizer: words -> ids of the pieces that are likeliest together (Kudo, arXiv:1804.10959).

Text is composed (NFKC and some rules more, a map that comes with the vocabulary), parted at its spaces, and every
word, with "▁" before it, is cut into the pieces whose scores, log-probabilities, have the largest sum. Capitals are
kept; what has no piece is <unk>, as is most of what is not English, French, German or Romanian. The vocabulary ships
with the package. Cutting is the `tokenizers` library's, and ids are those of transformers' T5Tokenizer. SentencePiece,
with which T5 was trained, composes some accents in another way; other programs that draw do as here.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.errors import FileProblem

if TYPE_CHECKING:
    from tokenizers import Encoding

MODEL = Path(__file__).parent.parent / "weights" / "t5" / "spiece.model.gz"
PAD, EOS, UNKNOWN, SPACE = "<pad>", "</s>", "<unk>", "▁"
SENTINELS = 100
"""Ids after the pieces, for gaps in training: they stand for words left out."""
SIGNS = "0942789e0111452f1cc446f70036e26d24458c3c7858c53cc12ca4d87531279b"
"""SHA-256 of T5's map of signs, `nmt_nfkc`. Maps are walked without a look at where they lead, so no other is taken."""
LARGEST_FILE = 64_000_000
MOST_READ = 4
_READ: dict[bytes, T5Tokenizer] = {}


class T5Tokenizer:
    """`pieces` are words with their scores, in the order of their ids, sentinels included; `charsmap` says what signs
    are composed of, as SentencePiece compiles it. `eos` is the id after a text, `pad` that which fills up, `size` how
    many ids there are.

    Raises FileProblem, in the name of `source`, for a vocabulary that does not hold together.
    """

    def __init__(
        self, pieces: Sequence[tuple[str, float]], charsmap: bytes, *, source: Path | str = "the vocabulary"
    ) -> None:
        from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

        if sha256(charsmap).hexdigest() != SIGNS:
            raise FileProblem(f"{source}: its map of signs is not T5's (nmt_nfkc); is it a tokenizer of T5's?")
        places = {word: place for place, (word, _) in enumerate(pieces)}
        for mark in (PAD, EOS, UNKNOWN):
            if mark not in places:
                raise FileProblem(f"{source}: there is no {mark} in its vocabulary; is it T5's?")
        self.tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=places[UNKNOWN], byte_fallback=False))
        self.tokenizer.normalizer = normalizers.Precompiled(charsmap)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
            ]
        )
        marks = [PAD, EOS, UNKNOWN, *(word for word in places if word.startswith("<extra_id_"))]
        self.tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
        self.pad, self.eos, self.unknown = places[PAD], places[EOS], places[UNKNOWN]
        self.size = len(pieces)

    def encode(self, texts: list[str], *, marked: bool = True) -> list[list[int]]:
        """The ids of every text, however long; `marked` puts `eos` after them."""
        return [[*found.ids, self.eos] if marked else found.ids for found in self.encodings(texts)]

    def encodings(self, texts: list[str]) -> list[Encoding]:
        """As `encode` without the mark, with the places of pieces in the texts."""
        return self.tokenizer.encode_batch(texts, add_special_tokens=False)

    def files(self, length: int) -> dict[str, Any]:
        """The files of a folder with this tokenizer, as `from_folder` and transformers read it, for texts of `length`
        ids; text or JSON."""
        marks = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
        settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": SENTINELS}
        return {
            "tokenizer.json": self.tokenizer.to_str(),
            "special_tokens_map.json": marks,
            "tokenizer_config.json": marks | settings,
        }

    @classmethod
    def from_folder(cls, folder: Path) -> T5Tokenizer:
        """The tokenizer of a model folder: `tokenizer.json`, else `spiece.model`. One that was read before is not made
        again. Raises FileProblem."""
        names = ("tokenizer.json", "spiece.model")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise FileProblem(f"{folder} has no tokenizer of T5's: there is no {' and no '.join(names)} in it")
        data = _bytes(path)
        key = sha256(data).digest()
        if key not in _READ:
            made = cls(*(_of_json if path.suffix == ".json" else of_sentencepiece)(data, path), source=path)
            if len(_READ) >= MOST_READ:
                _READ.clear()
            _READ[key] = made
        return _READ[key]


@lru_cache(maxsize=1)
def shipped() -> T5Tokenizer:
    """The tokenizer of every published T5 of English, of Stable Diffusion 3 and FLUX: 32,100 ids."""
    return T5Tokenizer(*of_sentencepiece(gzip.decompress(MODEL.read_bytes()), MODEL), source=MODEL)


# ---------------------------------------------------------------- files of others, which may hold anything

Read = tuple[list[tuple[str, float]], bytes]
"""Pieces with their scores, and the map of signs."""


def of_sentencepiece(data: bytes, source: Path | str) -> Read:
    """What a `spiece.model` holds, and the sentinels that T5 puts after it. It is a message of Protocol Buffers (the
    numbers of its fields are those of SentencePiece's `sentencepiece_model.proto`). Raises FileProblem."""
    pieces: list[tuple[str, float]] = []
    charsmap, kind = b"", 1
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode(), score))
            elif number == 2:
                kind = dict(_fields(value)).get(3, 1)
            elif number == 3:
                charsmap = dict(_fields(value)).get(2, b"")
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise FileProblem(f"{source} is not a whole model of SentencePiece's: get it again") from error
    if kind != 1 or not pieces or not charsmap:
        raise FileProblem(
            f"{source} is a model of SentencePiece's, but not of T5's kind (unigrams, and a map of signs)"
        )
    return [*pieces, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS)))], charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: (number, a whole number or bytes). Raises ValueError, TypeError."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        width, place = _varint(data, place) if key & 7 == 2 else ({1: 8, 5: 4}.get(key & 7, len(data)), place)
        if place + width > len(data):
            raise ValueError("a field does not end")
        yield key >> 3, data[place : place + width]
        place += width


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A whole number in as few bytes as it takes, and the place after it."""
    value = 0
    for step, byte in enumerate(data[place : place + 10]):
        value |= (byte & 127) << 7 * step
        if byte < 128:
            return value, place + step + 1
    raise ValueError("a number does not end")


def _of_json(data: bytes, path: Path) -> Read:
    """What a `tokenizer.json` holds. Raises FileProblem."""
    try:
        stored = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"{path} is not JSON: {str(error)[:100]}") from error
    model, normalizer = (stored.get(name) if isinstance(stored, dict) else None for name in ("model", "normalizer"))
    pieces = model.get("vocab") if isinstance(model, dict) else None
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    steps = steps if isinstance(steps, list) else [normalizer]
    maps = [step.get("precompiled_charsmap") for step in steps if isinstance(step, dict)]
    charsmap = next((text for text in maps if isinstance(text, str)), None)
    if not isinstance(pieces, list) or charsmap is None:
        raise FileProblem(f"{path} is not a tokenizer of T5's kind: no pieces with scores, or no map of signs")
    rows = [tuple(row) if isinstance(row, list) else () for row in pieces]
    if not all(len(row) == 2 and type(row[0]) is str and type(row[1]) in (int, float) for row in rows):
        raise FileProblem(f"{path}: its vocabulary is not pieces with their scores")
    try:
        return [(word, float(score)) for word, score in rows], base64.b64decode(charsmap, validate=True)
    except (ValueError, OverflowError) as error:
        raise FileProblem(f"{path}: its map of signs or its scores are broken") from error


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FileProblem(f"{path} is larger than any tokenizer ({path.stat().st_size / 1e6:.0f} MB)")
        return path.read_bytes()
    except OSError as error:
        raise FileProblem(f"cannot read {path}: {error.strerror}") from error
