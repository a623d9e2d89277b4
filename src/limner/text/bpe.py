"""CLIP's tokenizer: words -> byte-pair ids (Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2).

Text is composed (NFC), lower-cased, cut into words, digits and runs of signs, and every piece is merged from its bytes;
the last byte of a piece is written with "</w>". The merges ship with the package and the vocabulary follows from them.
Splitting and merging are the `tokenizers` library's, and ids are those of transformers' CLIPTokenizer. OpenAI's program
repairs text first (ftfy, HTML entities), and Python's lower-casing differs from Rust's (a sigma at the end of a word);
on printable ASCII without entities all three agree.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from limner.errors import FileProblem

MERGES = Path(__file__).parent.parent / "weights" / "clip" / "merges.txt.gz"
BOT, EOT, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LARGEST_FILE = 64_000_000
FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)
MOST_READ = 4
_READ: dict[Any, CLIPTokenizer] = {}


class CLIPTokenizer:
    """`bot` and `eot` are the ids around a text, `pad` is what this vocabulary's own program fills up with, `size` is
    one more than the largest id. `added` are words that are never split, such as those of textual inversions.

    Raises FileProblem, in the name of `source`, for a vocabulary that does not hold together.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        bot: str = BOT,
        eot: str = EOT,
        pad: str | None = None,
        added: Iterable[Mapping[str, Any]] = (),
        source: Path | str = "the vocabulary",
    ) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

        try:
            model = models.BPE(
                dict(vocabulary),
                list(merges),
                continuing_subword_prefix="",
                end_of_word_suffix=END_OF_WORD,
                unk_token=eot,
            )
        except Exception as error:  # the library raises nothing more special
            raise FileProblem(f"{source}: its merges are not of its vocabulary ({str(error)[:100]})") from error
        self.tokenizer = Tokenizer(model)
        self.tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        for row in added:
            word, place = row["content"], row["id"]
            if word in vocabulary:  # a mark: SD2 and SDXL pad with "!", and it stays a sign of the text nevertheless
                continue
            flags = {key: bool(row.get(key, default)) for key, default in _FLAGS.items()}
            self.tokenizer.add_tokens([AddedToken(word, special=bool(row.get("special", False)), **flags)])
            if self.tokenizer.token_to_id(word) != place:
                raise FileProblem(f"{source}: the added word {word[:40]!r} has id {place}, which is not the next free")
        known = self.tokenizer.get_vocab()
        for mark in (bot, eot, pad or eot):
            if mark not in known:
                raise FileProblem(f"{source}: there is no {mark[:40]!r} in its vocabulary; is it CLIP's?")
        self.tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (bot, eot)])
        self.bot, self.eot, self.pad = known[bot], known[eot], known[pad or eot]
        self.size = max(known.values()) + 1
        self.comma = known.get("," + END_OF_WORD)

    def encode(self, texts: list[str], *, marked: bool = True) -> list[list[int]]:
        """The ids of every text, however long; `marked` puts `bot` before and `eot` after them."""
        encoded = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [[self.bot, *ids, self.eot] for ids in encoded] if marked else encoded

    def files(self, pad: int, context: int) -> dict[str, Any]:
        """The files of a folder with this tokenizer, as `from_folder` and transformers read it; text or JSON."""
        stored = json.loads(self.tokenizer.to_str())
        words = {place: word for word, place in self.tokenizer.get_vocab().items()}
        marks = {"bos_token": words[self.bot], "eos_token": words[self.eot], "unk_token": words[self.eot]}
        marks["pad_token"] = words[pad]
        added = {row["content"]: row["id"] for row in stored["added_tokens"] if not row["special"]}
        return {
            "vocab.json": stored["model"]["vocab"],
            "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in stored["model"]["merges"])]) + "\n",
            "special_tokens_map.json": marks,
            "tokenizer_config.json": marks | {"tokenizer_class": "CLIPTokenizer", "model_max_length": context},
        } | ({"added_tokens.json": added} if added else {})

    @classmethod
    def from_folder(cls, folder: Path) -> CLIPTokenizer:
        """The tokenizer of a model folder: `tokenizer.json`, else `vocab.json` and `merges.txt`, with the words of
        `added_tokens.json`; which words are the marks, `tokenizer_config.json` or `special_tokens_map.json` may say.

        One that was read before is not made again. Raises FileProblem.
        """
        key = _contents(folder)
        if key not in _READ:
            made = cls._read(folder)
            if len(_READ) >= MOST_READ:
                _READ.clear()
            _READ[key] = made
        return _READ[key]

    @classmethod
    def _read(cls, folder: Path) -> CLIPTokenizer:
        whole, path = folder / "tokenizer.json", folder / "vocab.json"
        added: list[dict[str, Any]] = []
        if whole.is_file():
            path, stored = whole, _json(whole)
            model = stored.get("model")
            if not isinstance(model, dict) or model.get("end_of_word_suffix") != END_OF_WORD:
                raise FileProblem(f"{whole} is not a tokenizer of CLIP's kind: no pairs of bytes that end in </w>")
            vocabulary, merges = model.get("vocab"), model.get("merges")
            added = stored.get("added_tokens") or []
        else:
            vocabulary = _json(path)
            lines = _text(folder / "merges.txt").split("\n")
            merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
        if (folder / "added_tokens.json").is_file():
            more = _json(folder / "added_tokens.json")
            added = [*added, *({"content": word, "id": place} for word, place in more.items() if not whole.is_file())]
        marks: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            found = _json(folder / name) if (folder / name).is_file() else {}
            for mark in ("bos_token", "eos_token", "pad_token"):
                value = found.get(mark)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    marks[mark] = value
        return cls(
            _vocabulary(vocabulary, path),
            _merges(merges, path),
            bot=marks.get("bos_token", BOT),
            eot=marks.get("eos_token", EOT),
            pad=marks.get("pad_token"),
            added=_added(added, path),
            source=path,
        )


@lru_cache(maxsize=1)
def shipped() -> CLIPTokenizer:
    """The tokenizer of every published CLIP, OpenCLIP and Stable Diffusion: 49,408 ids."""
    merges = [_pair(line) for line in gzip.decompress(MERGES.read_bytes()).decode().split("\n")]
    return CLIPTokenizer(vocabulary_of(merges), merges, source=MERGES)


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The vocabulary that follows from the merges: bytes, bytes at the end of a word, a row a merge, and the two marks.

    A byte is written as its character in Latin-1 where that can be seen, the other 68 as those from U+0100 on.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = [chr(code) for code in (*seen, *range(0x100, 0x100 + 256 - len(seen)))]
    words = [*signs, *(sign + END_OF_WORD for sign in signs), *(a + b for a, b in merges), BOT, EOT]
    return {word: place for place, word in enumerate(words)}


# ---------------------------------------------------------------- files of others, which may hold anything

_FLAGS = {"normalized": True, "single_word": False, "lstrip": False, "rstrip": False}


def _fits(path: Path) -> bool:
    return path.stat().st_size <= LARGEST_FILE


def _contents(folder: Path) -> tuple[Any, ...]:
    """What a folder's tokenizer follows from; None stands for a file that cannot be read, which is told by who needs
    it."""
    found: list[Any] = []
    for path in (folder / name for name in FILES):
        digest = None
        with suppress(OSError):
            digest = sha256(path.read_bytes()).digest() if _fits(path) else None
        found.append(digest)
    return tuple(found)


def _text(path: Path) -> str:
    try:
        if not _fits(path):
            raise FileProblem(f"{path} is larger than any tokenizer ({path.stat().st_size / 1e6:.0f} MB)")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FileProblem(
            f"cannot read {path}: {reason}; a tokenizer is tokenizer.json or vocab.json and merges.txt"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"{path} is not JSON: {str(error)[:100]}") from error
    if not isinstance(stored, dict):
        raise FileProblem(f"{path} is not a JSON object")
    return stored


def _pair(merge: str) -> tuple[str, str]:
    first, second = merge.split(" ")
    return first, second


def _vocabulary(stored: Any, path: Path) -> dict[str, int]:
    if not isinstance(stored, dict) or not stored or not all(_is_id(place) for place in stored.values()):
        raise FileProblem(f"{path}: its vocabulary is not words with their numbers")
    if len(set(stored.values())) < len(stored):
        raise FileProblem(f"{path}: two words of its vocabulary have the same number")
    return stored


def _merges(stored: Any, path: Path) -> list[tuple[str, str]]:
    rows = stored if isinstance(stored, list) else [None]
    pairs = [
        tuple(row.split(" ")) if isinstance(row, str) else tuple(row) if isinstance(row, list) else () for row in rows
    ]
    if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise FileProblem(f"{path}: its merges are not pairs of words")
    return pairs  # type: ignore[return-value]


def _added(stored: Any, path: Path) -> list[dict[str, Any]]:
    rows = stored if isinstance(stored, list) else [None]
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("content"), str) or not _is_id(row.get("id")):
            raise FileProblem(f"{path}: its added words are not words with their numbers")
    return sorted(rows, key=lambda row: row["id"])


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
