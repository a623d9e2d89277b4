r"""What people write into a prompt, and what it means: pure text, without torch.

First `expand` replaces `{a|b}` and `__wildcards__` by what the picture's seed picks, in every dialect. The result,
which a picture remembers, has nothing left to pick. `parse` then reads it by dialect:

`a1111`    `(word)` 1.1 times, `(word:1.3)`, `[word]` a 1.1th; `BREAK`; `[a:b:0.5]`, `[a:0.5]`, `[a::0.5]` change over
           the steps, `[a|b]` at every step; `a :1.2 AND b` are parts of one picture. Brackets multiply. Those that are
           not closed reach to the end, those that were never opened are signs
`comfyui`  `(word)` and `(word:1.3)`, where the innermost number alone counts; unbalanced brackets are signs
`plain`    the text as it is

`\` before a bracket, bar or underscore makes it a sign. `<lora:name:0.8>` is found in every dialect, `embedding:name`
in the first two. Written from the descriptions in the wikis of stable-diffusion-webui and ComfyUI.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from limner.errors import FileProblem, UnknownName, UsageError

Dialect = Literal["a1111", "comfyui", "plain"]
DIALECTS: tuple[Dialect, ...] = ("a1111", "comfyui", "plain")
HEAVIEST = 100.0
DEEPEST = 100
MOST_PARTS = 16
MOST_TEXTS = 256  # over the steps; all are read before the first
MOST_PICKS = 1000
LARGEST_FILE, LONGEST_LINE = 10_000_000, 20_000

NUMBER = r"[+-]?(?:\d++\.?\d*+|\.\d++)(?:e[+-]?\d++)?|[+-]?(?:nan|inf)"  # possessive: else long ones take their square
ENDINGS = (".safetensors", ".pt", ".bin", ".ckpt")
"""Of files of adapters."""
AND = re.compile(r"\bAND\b")
SYNTAX = re.compile(r"\([^():\d][^():]*+:\s*+(?:\d++\.?\d*+|\.\d++)\s*+\)|\b(?:AND|BREAK)\b")
"""What a prompt has that is meant for programs that weigh words, most likely."""


@dataclass(frozen=True)
class Piece:
    text: str
    weight: float = 1.0


Text = tuple[tuple[Piece, ...], ...]
"""What is read at once: the pieces between one BREAK and the next."""


@dataclass(frozen=True)
class Part:
    """What stands between one AND and the next: (n, text), where text is read until n steps are done, n rising up to
    the number of steps."""

    turns: tuple[tuple[int, Text], ...]
    weight: float = 1.0

    def at(self, step: int) -> Text:
        """What is read in a step, the first of which is 0."""
        return next(text for until, text in self.turns if step < until)


@dataclass(frozen=True)
class Adapter:
    """`<kind:name:weight:second>`; `second` is the weight of the network where `weight` is that of the text encoder."""

    kind: str
    name: str
    weight: float = 1.0
    second: float | None = None


@dataclass(frozen=True)
class Prompt:
    parts: tuple[Part, ...]
    adapters: tuple[Adapter, ...] = ()


def parse(text: str, dialect: Dialect = "a1111", steps: int = 1, composed: bool = True) -> Prompt:
    """What an expanded prompt means over `steps` steps. `composed` False reads AND as a word, as in negative prompts.

    Raises UsageError for weights beyond ±100 or that are none, more than 16 parts or 256 texts, and brackets more than
    100 deep.
    """
    text, adapters = tagged(text, dialect)
    if dialect != "a1111":
        pieces = (Piece(unescaped(text)),) if dialect == "plain" else _weighted(text, dialect)
        return Prompt((Part(((steps, (pieces,)),)),), adapters)
    said = AND.split(text) if composed else [text]
    if len(said) > MOST_PARTS:
        raise UsageError(f"the prompt has {len(said)} parts joined by AND: give {MOST_PARTS} at most")
    parts: list[Part] = []
    read: dict[str, Text] = {}
    for part in said:
        words, _, number = part.rpartition(":")
        weighed = len(said) > 1 and _is_number(number)
        turns = list(_turns(words if weighed else part, steps))
        if (count := len({*read, *(text for _, text in turns)})) > MOST_TEXTS:
            raise UsageError(f"the prompt becomes {count} texts over its steps: {MOST_TEXTS} at most are read")
        read |= {text: _sections(text) for text in {text for _, text in turns} - read.keys()}
        weight = _weight(number, part) if weighed else 1.0
        parts.append(Part(tuple((until, read[text]) for until, text in turns), weight))
    return Prompt(tuple(parts), adapters)


def refuse(adapters: Sequence[Adapter], learned: Collection[str] = ()) -> None:
    """Raises UsageError for the first that a prompt still asks for, other than words `learned` (in lower case)."""
    for adapter in adapters:
        if adapter.kind == "embedding" and without_ending(adapter.name).lower() in learned:
            continue
        asks = f"the prompt asks for the {adapter.kind} {adapter.name!r}"
        if adapter.kind == "embedding":
            raise UsageError(f"{asks}, and there is none here: add --embedding FILE, or leave it out")
        raise UsageError(f"{asks} where no tag is read (out of a wildcard, or against): say it in the prompt itself")


def without_ending(name: str) -> str:
    """The name of a learned word, whose file ComfyUI's prompts may say whole."""
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


# -------------------------------------------------------------------- brackets


@dataclass(frozen=True)
class Frame:
    """What is between brackets: fields of nodes, and the marks between them."""

    opener: str
    fields: list[list[Node]]
    marks: list[str]

    def literal(self, closer: str = "") -> list[Node]:
        """As it was written, but for what was replaced within."""
        nodes: list[Node] = [self.opener]
        for mark, field in zip(["", *self.marks], self.fields, strict=True):
            nodes += [mark, *field]
        return [*nodes, closer]


@dataclass(frozen=True)
class Switch:
    """One of `options`: by turns, or the second after `when`, a number of steps or (with a point) a share of them."""

    options: list[list[Node]]
    when: str | None = None

    def turn(self, steps: int) -> int:
        """How many steps are done with the first option."""
        if self.when is None:
            return 1
        return int(min(steps, float(self.when) * (steps if "." in self.when else 1)))


Node = str | Switch


def _tree(
    signs: re.Pattern[str],
    text: str,
    pairs: dict[str, str],
    marks: dict[str, str],
    close: Callable[[Frame, str], list[Node]],
) -> list[Node]:
    """Brackets inside brackets; `marks` are the signs that part the fields within a kind of them. What is not closed
    is literal. Raises UsageError for brackets too deep."""
    stack = [Frame("", [[]], [])]
    for sign in signs.findall(text):
        frame = stack[-1]
        if sign in pairs:
            stack.append(Frame(sign, [[]], []))
            _check_depth(len(stack) - 1)
        elif sign == pairs.get(frame.opener):
            stack.pop()
            stack[-1].fields[-1].extend(close(frame, sign))
        elif sign in marks.get(frame.opener, ""):
            frame.marks.append(sign)
            frame.fields.append([])
        else:
            frame.fields[-1].append(sign)
    while len(stack) > 1:
        frame = stack.pop()
        stack[-1].fields[-1].extend(frame.literal())
    return stack[0].fields[0]


def _check_depth(depth: int) -> None:
    if depth > DEEPEST:
        raise UsageError(f"the prompt has brackets more than {DEEPEST} deep: close or leave out some")


# -------------------------------------------------------------------- over the steps

WHEN = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*")
SQUARE = re.compile(r"\\.|[^\\()\[\]:|]+|.", re.DOTALL)


def _switches(text: str) -> list[Node]:
    return _tree(SQUARE, text, {"[": "]", "(": ")"}, {"[": ":|"}, _switch)


def _switch(frame: Frame, closer: str) -> list[Node]:
    """`[a|b]`, `[b:3]`, `[a:b:3]`; other brackets stay what they are."""
    if frame.opener == "[" and frame.marks:
        if set(frame.marks) == {"|"}:
            return [Switch(frame.fields)]
        last = frame.fields[-1]
        when = WHEN.fullmatch("".join(n for n in last if isinstance(n, str)))
        if set(frame.marks) == {":"} and len(frame.marks) <= 2 and when and all(isinstance(n, str) for n in last):
            return [Switch([[], *frame.fields][-3:-1], when[1])]
    return frame.literal(closer)


def _turns(text: str, steps: int) -> Iterator[tuple[int, str]]:
    """(n, the text until n steps are done); neighbours differ."""
    nodes = _switches(text)
    ends = {steps}
    for switch in _all(nodes):
        ends |= set(range(1, steps)) if switch.when is None else {switch.turn(steps)} - {0}
    turns = ((end, _at(nodes, end - 1, steps)) for end in sorted(ends))
    for words, same in groupby(turns, key=lambda turn: turn[1]):
        yield max(end for end, _ in same), words


def _at(nodes: list[Node], step: int, steps: int) -> str:
    words = ""
    for node in nodes:
        if isinstance(node, str):
            words += node
        else:
            place = step % len(node.options) if node.when is None else int(step >= node.turn(steps))
            words += _at(node.options[place], step, steps)
    return words


def _all(nodes: list[Node]) -> Iterator[Switch]:
    for node in nodes:
        if isinstance(node, Switch):
            yield node
            for option in node.options:
                yield from _all(option)


def unreached(text: str, steps: int) -> list[str]:
    """Of a prompt in the dialect of A1111, what its own schedule shows in none of `steps` steps."""
    missed = []
    for switch in _all(_switches(text)):
        turn = switch.turn(steps)
        if switch.when is None:
            options = switch.options[steps:]
        else:
            options = switch.options[1:] if turn >= steps else switch.options[:1] if turn < 1 else []
        missed += [words for option in options if (words := _at(option, 0, steps).strip())]
    return missed


# -------------------------------------------------------------------- weights

ROUND = re.compile(rf"\\.|\s*:\s*(?:{NUMBER})\s*\)|[^\\()\[\]:\s]+|\s+|.", re.DOTALL | re.IGNORECASE)
BREAK = re.compile(r"\bBREAK\b")


@dataclass
class _Run:
    text: str
    weight: float = 1.0
    settled: bool = False
    """Whether brackets further out count no more."""


def _sections(text: str) -> Text:
    """Weighted pieces in the dialect of A1111, cut at every BREAK."""
    sections: list[list[Piece]] = [[]]
    for piece in _weighted(text, "a1111"):
        for place, words in enumerate(BREAK.split(piece.text)):
            if place:
                sections.append([])
            if words or not place:
                sections[-1].append(Piece(words, piece.weight))
    return tuple(_joined(section) for section in sections)


def _weighted(text: str, dialect: Dialect) -> tuple[Piece, ...]:
    """The text in pieces of one weight each, brackets and backslashes gone. Raises UsageError for absurd weights."""
    runs: list[_Run] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where a bracket stands that is not closed

    def close(bracket: str, factor: float, settled: bool = False) -> None:
        start = opened[bracket].pop()
        runs[start].text = ""
        for run in runs[start:]:
            if not run.settled:
                run.weight *= factor
                run.settled = settled

    square = dialect == "a1111"
    for sign in ROUND.findall(text):
        if sign == "(" or (sign == "[" and square):
            opened[sign].append(len(runs))
            _check_depth(len(opened[sign]))
            runs.append(_Run(sign))
        elif sign == "]" and square and opened["["]:
            close("[", 1 / 1.1)
        elif sign == ")" and opened["("]:
            close("(", 1.1)
        elif len(sign) > 1 and sign[-1] == ")" and sign[0] != "\\" and opened["("]:
            where = "".join(run.text for run in runs[opened["("][-1] :]) + sign
            close("(", _weight(sign.strip()[1:-1], where), settled=not square)
        else:
            runs.append(_Run(unescaped(sign, "()[]{}|_:\\")))
    if square:  # these reach to the end
        for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
            while opened[bracket]:
                close(bracket, factor)
    heaviest = max((abs(run.weight) for run in runs if run.text), default=0)
    if heaviest > HEAVIEST:
        raise UsageError(f"brackets give a word of the prompt {heaviest:.4g} times its weight: keep within 100")
    return _joined([Piece(run.text, run.weight) for run in runs])


def _joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Neighbours of one weight as one; never none at all."""
    parted = groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.weight)
    return tuple(Piece("".join(p.text for p in same), weight) for weight, same in parted) or (Piece(""),)


def _is_number(text: str) -> bool:
    return re.fullmatch(NUMBER, text.strip(), re.IGNORECASE) is not None


def _weight(said: str, where: str) -> float:
    weight = float(said)
    if not abs(weight) <= HEAVIEST:  # NaN is not
        raise UsageError(f"the weight {said.strip()} in {where.strip()[-40:]!r} is absurd: give a number within 100")
    return weight


def unescaped(text: str, signs: str = "{}|_") -> str:
    """The text without the backslashes before these signs; in the dialect `plain` they are those of `expand`."""
    return re.sub(rf"\\([{re.escape(signs)}])", r"\1", text)


# -------------------------------------------------------------------- adapters

TAG = re.compile(r"<(lora|lyco|hypernet):([^<>:]+)((?::[^<>:]*)*)>")
EMBEDDING = re.compile(r"\bembedding:([\w./-]+)")


def tagged(text: str, dialect: Dialect = "a1111") -> tuple[str, tuple[Adapter, ...]]:
    """The text without tags, and the adapters that they name; `embedding:name` stays. Raises UsageError."""
    found = []
    for kind, name, said in TAG.findall(text):
        tag = f"<{kind}:{name}{said}>"
        numbers = said.split(":")[1:]
        if len(numbers) > 2 or not all(map(_is_number, numbers)):
            raise UsageError(f"{tag[:60]!r} is not <{kind}:name:weight> or <{kind}:name:weight:weight>")
        found.append(Adapter(kind, name.strip(), *(_weight(value, tag) for value in numbers)))
    text = TAG.sub("", text)
    if dialect != "plain":
        found += [Adapter("embedding", name.rstrip("./-")) for name in EMBEDDING.findall(text)]
    return text, tuple(found)


# -------------------------------------------------------------------- picking

CURLY = re.compile(r"\\.|__(?! )(?:[^\s_{}|\\]|_(?!_)| (?!_)){1,100}__|[^\\{}|_]+|.", re.DOTALL)
SHARE = re.compile(r"\s*(\d{1,6}(?:\.\d{0,6})?)::")


class Wildcards:
    """The .txt files of a folder and those in it, by name ("animals", "colours/warm"); a line is an option, one that
    begins with # a comment. Only what is in the folder is read, wherever links point.

    Raises FileProblem.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            if not self.folder.is_dir():
                raise FileProblem(f"no folder of wildcards {str(folder)!r}: name one with .txt files in it")
            root = self.folder.resolve()
            files = [p for p in sorted(self.folder.rglob("*.txt")) if p.resolve().is_relative_to(root) and p.is_file()]
        except (OSError, ValueError) as error:
            raise FileProblem(f"cannot read the folder of wildcards {str(folder)[:100]!r}: {error}") from error
        self.files = {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in files}
        self.read: dict[str, list[str]] = {}

    def options(self, name: str) -> list[str]:
        """The lines of one, read once. Raises UnknownName, FileProblem."""
        if name not in self.files:
            raise UnknownName("wildcard", name, self.files)
        if name not in self.read:
            self.read[name] = self._options(self.files[name])
        return self.read[name]

    def _options(self, path: Path) -> list[str]:
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise FileProblem(f"{path} is larger than {LARGEST_FILE // 1_000_000} MB: part it")
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise FileProblem(f"cannot read the wildcard {path}: {reason}") from error
        options = [line for line in lines if line and not line.startswith("#")]
        if not options or max(map(len, options)) > LONGEST_LINE:
            raise FileProblem(f"the wildcard {path} has {'a line too long' if options else 'no line'} to take")
        return options


def expand(text: str, seed: int, wildcards: Wildcards | None = None, stream: str = "prompt") -> str:
    """`text` with one option of every `{a|b}` (`{3::a|b}` takes a three times as often) and a line of every wildcard,
    as `seed` and the name of the `stream` pick them. What comes out expands to itself.

    Raises UsageError, UnknownName and FileProblem.
    """
    picks, before = _Picks(random.Random(f"{stream} {seed}"), wildcards), -1
    while picks.count != before:  # what was picked may make a new choice with what stands beside it
        before, text = picks.count, picks.expand(text, ())
    return text


class _Picks:
    def __init__(self, source: random.Random, wildcards: Wildcards | None) -> None:
        self.source, self.wildcards, self.count = source, wildcards, 0

    def expand(self, text: str, within: tuple[str, ...]) -> str:
        return self.join(_tree(CURLY, text, {"{": "}"}, {"{": "|"}, _choice), within)

    def join(self, nodes: list[Node], within: tuple[str, ...]) -> str:
        return "".join(
            self.one(node, within) if isinstance(node, Switch) else
            self.line(node[2:-2], within) if len(node) > 4 and node[:2] == node[-2:] == "__" else node
            for node in nodes
        )  # fmt: skip

    def one(self, switch: Switch, within: tuple[str, ...]) -> str:
        self.counted()
        options, shares = [list(option) for option in switch.options], []
        for option in options:
            share = SHARE.match(option[0]) if option and isinstance(option[0], str) else None
            shares.append(float(share[1]) if share else 1.0)
            if share:
                option[0] = str(option[0])[share.end() :]
        if not sum(shares):
            raise UsageError("the prompt has a choice of which nothing may be taken, each 0::")
        return self.join(self.source.choices(options, shares)[0], within)

    def line(self, name: str, within: tuple[str, ...]) -> str:
        self.counted()
        if self.wildcards is None:
            raise UsageError(
                rf"the prompt asks for the wildcard {name!r}: say where such files are (--wildcards FOLDER), or write "
                rf"\__{name}__ for the words themselves"
            )
        if name in within:
            raise UsageError(f"the wildcard {name!r} asks for itself: {' > '.join([*within, name])}")
        return self.expand(self.source.choice(self.wildcards.options(name)), (*within, name))

    def counted(self) -> None:
        self.count += 1
        if self.count > MOST_PICKS:
            raise UsageError(f"the prompt asks for more than {MOST_PICKS} picks, with what its wildcards ask for")


def _choice(frame: Frame, closer: str) -> list[Node]:
    if any(isinstance(node, str) and re.match(r"\s*[\d-]*\$\$", node) for node in frame.fields[0][:1]):
        raise UsageError("the prompt has a choice of several at once ({2$$a|b}), which is not read: write {a|b} twice")
    return [Switch(frame.fields)] if frame.marks else frame.literal(closer)


# -------------------------------------------------------------------- chunks of tokens

Token = tuple[int, float]
"""An id and its weight."""
COMMA_REACH = 20
LONG_WORD = 8


def chunked(
    runs: Sequence[Sequence[Token]], size: int, comma: int | None = None, solid: Sequence[bool] = ()
) -> list[tuple[Token, ...]]:
    """Tokens in chunks of `size` at most, none for no tokens.

    With `comma`, the id of one, a chunk that is full ends after a comma among its last 20 tokens (A1111). A run that is
    `solid` is not parted: it goes into the next chunk whole, if it fits there.
    """
    chunks: list[list[Token]] = []
    for run, whole in zip(runs, solid or [False] * len(runs), strict=True):
        if whole and chunks and len(run) <= size < len(chunks[-1]) + len(run):
            chunks.append([])
        for token in run:
            if not chunks:
                chunks.append([])
            if len(chunks[-1]) == size:
                chunks.append(_after_comma(chunks[-1], comma) if token[0] != comma else [])
            chunks[-1].append(token)
    return [tuple(chunk) for chunk in chunks if chunk]


def _after_comma(chunk: list[Token], comma: int | None) -> list[Token]:
    """Takes from the chunk what follows its last comma, if that is near its end."""
    places = [place for place, (token, _) in enumerate(chunk) if token == comma]
    if not places or len(chunk) - places[-1] > COMMA_REACH:
        return []
    moved = chunk[places[-1] + 1 :]
    del chunk[places[-1] + 1 :]
    return moved
