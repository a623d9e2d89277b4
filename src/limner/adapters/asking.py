"""What a command line asks of adapters, and what a picture remembers of them, as files to attach."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from limner.adapters import files
from limner.adapters.attaching import Stack, candidates, find
from limner.errors import FileProblem, UsageError
from limner.text.prompts import TAG, tagged

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A file, and how much of it: `weight` None is for whoever remembers better, and 1 otherwise."""

    path: Path
    weight: float | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return files.name_of(self.path)


def parse(text: str, folders: tuple[Path, ...] = (Path(),)) -> Asked:
    """FILE[:WEIGHT][,BLOCK=WEIGHT...]; a bare name is of a file in `folders`. Raises UsageError, FileProblem."""
    path, weight, blocks = weighted(text)
    return Asked(_file(path, folders), weight, blocks)


def weighted(text: str) -> tuple[str, float | None, dict[str, float]]:
    """FILE[:WEIGHT][,BLOCK=WEIGHT...] as a path, the weight, and those of blocks. Raises UsageError."""
    path, colon, told = text.rpartition(":")
    whole = os.path.exists(text)  # noqa: PTH110 (Path's may raise)
    weight: float | None = None
    blocks: dict[str, float] = {}
    if not colon or whole or "/" in told or "\\" in told:
        return text, weight, blocks
    for n, part in enumerate(told.split(",")):
        block, equals, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise UsageError(
                f"{text!r:.200}: {part!r:.50} is no weight; give FILE:0.8, or FILE:0.8,mid_block=0.5 for one of a block"
            ) from error
        if equals:
            blocks[block] = value
        elif n == 0:
            weight = value
        else:
            raise UsageError(f"{text!r:.200}: {part!r:.50} does not say of which block it is the weight")
    return path, weight, blocks


def with_picture(text: str, example: str) -> tuple[str, str]:
    """FILE=IMAGE... as what is before and after the sign. Raises UsageError."""
    file, equals, rest = text.partition("=")
    if not equals or not file or not rest:
        raise UsageError(f"{text!r:.200} is no FILE=IMAGE, such as {example}")
    return file, rest


def opened(
    name: str, asked: str | Sequence[Any], kind: type[T], parse: Callable[[str], dict[str, Any]], open_one: Any
) -> tuple[T, ...]:
    """Each of what a program asks for by the keyword `name`: one of `kind`, text that `parse` reads, or arguments of
    `open_one`, as keywords or as (file, image) and perhaps a weight. Raises UsageError."""
    ways = "(file, image) or (file, image, weight)"
    if not isinstance(asked, str | list | tuple):
        raise UsageError(f"{name} is {asked!r:.80}: give a list of {ways}")
    found: list[T] = []
    for one in [asked] if isinstance(asked, str) else asked:
        told: Any = parse(one) if isinstance(one, str) else one
        if isinstance(told, kind):
            found.append(told)
            continue
        if isinstance(told, tuple | list) and 2 <= len(told) <= 3:
            told = dict(zip(("file", "image", "weight"), told, strict=False))
        try:
            inspect.signature(open_one).bind(**told)
        except TypeError as error:
            raise UsageError(f"{name} is {one!r:.80}: give {ways}, or keywords of {open_one.func.__name__}") from error
        found.append(open_one(**told))
    return tuple(found)


def _file(text: str, folders: tuple[Path, ...]) -> Path:
    path = Path(text)
    found = path if text and os.path.exists(text) else find(text, folders)  # noqa: PTH110 (Path's may raise)
    if found is None:
        raise FileProblem(f"no file {text!r:.200}: give the path of a LoRA or of another adapter")
    return found


def in_prompt(prompt: str, folders: tuple[Path, ...], negative: str = "") -> tuple[str, list[Asked]]:
    """The prompt without `<lora:name:weight>`, and those; and the files of `embedding:name`, there and in the negative
    prompt, which stays. Files are looked for in `folders`; of a learned word that is not there another file may know.

    Raises UsageError, FileProblem.
    """
    for tag in TAG.finditer(prompt):
        before = re.sub(r"\\.", "", prompt[: tag.start()])
        if before.count("{") > before.count("}"):
            raise UsageError(f"{tag[0][:60]!r} is within a choice, where none is read: put it outside of {{a|b}}")
    text, found = tagged(prompt)
    found += tuple(one for one in tagged(negative)[1] if one.kind == "embedding")
    asked = []
    for one in found:
        path = find(one.name, folders)
        if one.kind == "embedding":
            asked += [Asked(path)] if path else []
            continue
        if one.kind == "hypernet":
            raise UsageError(f"the prompt asks for the hypernetwork {one.name!r}: those are not read")
        if one.second not in (None, one.weight):
            raise UsageError(
                f"the prompt gives {one.name!r} two weights: give one, or --lora FILE:WEIGHT,text_encoder=FACTOR"
            )
        if path is None:
            where = ", ".join(str(folder) for folder in folders)
            raise FileProblem(f"the prompt asks for the {one.kind} {one.name!r}, of which there is no file in {where}")
        asked.append(Asked(path, one.weight))
    kept: dict[tuple[Path, bool], Asked] = {}  # a learned word has no weight
    for new in asked:
        other = kept.setdefault((new.path, new.weight is None), new)
        if other.weight != new.weight:
            raise UsageError(
                f"the prompt asks for {new.name} by {other.weight:g} and by {new.weight:g}: once is enough"
            )
    return text, list(kept.values())


def resolve(
    asked: Sequence[Asked], remembered: Sequence[Mapping[str, Any]], folders: tuple[Path, ...]
) -> tuple[list[Asked], list[str]]:
    """What to attach, and sentences on files that are not those of before.

    `remembered` are settings of a picture. What was asked for goes before what is remembered of the same name; another
    is taken from `folders` if it lies there with the hash it had. Raises FileProblem for one that does not.
    """
    given: dict[str, Asked] = {}
    for new in asked:
        other = given.setdefault(new.name, new)
        if other is new:
            continue
        if other.path.resolve() != new.path.resolve():
            raise UsageError(f"{other.path} and {new.path} have one name: give one, or rename it")
        if other.weight is not None and new.weight is not None:
            raise UsageError(f"{new.name} is asked for twice, by {other.weight:g} and {new.weight:g}: once is enough")
        given[new.name] = other if new.weight is None else replace(other, weight=new.weight)
    found, told = [], []
    for old in remembered:
        name, weight, blocks = old["name"], old.get("weight"), old.get("blocks", {})
        one = given.pop(name, None)
        if one is None:
            here = candidates(name, folders)
            path = next((path for path in here if files.digest(path) == old["hash"]), None)
            if path is None:
                flag = "--lora" if "weight" in old else "--embedding"
                if old["hash"] == "?":
                    reason = "and the picture does not say which file that was"
                else:
                    reason = f"(hash {old['hash']}), and " + (
                        f"{here[0]} is another file" if here else "it is not here"
                    )
                raise FileProblem(f"painted with the adapter {name!r} {reason}: add {flag} FILE")
            found.append(Asked(path, weight, blocks))
        else:
            if old["hash"] not in ("?", files.digest(files.contents_of(one.path).path)):
                told.append(f"{one.path} is not the file painted with (hash {old['hash']}): expect another picture")
            found.append(one if one.weight is not None or one.blocks else Asked(one.path, weight, blocks))
    return found + list(given.values()), told


def attach(stack: Stack, asked: Sequence[Asked]) -> tuple[list[str], list[str]]:
    """Attach all, or none. Returns a sentence on each, and those on what of it does not show."""
    done, vain = [], []
    before = list(stack.on)
    try:
        for one in asked:
            weight = 1.0 if one.weight is None else one.weight
            report = stack.attach(one.path, weight, one.blocks)
            done.append(str(report))
            vain += [*report.assumed, *report.ignored(weight)]
    except BaseException:
        stack.restore(before)
        raise
    return done, vain
