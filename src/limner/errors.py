"""What can go wrong, and the exit code each kind ends the command line with.

    LimnerError                 3   anything below; a message of one line
    ├── UsageError              2   an argument that cannot be meant: unknown name, size off the grid, NaN
    ├── UnknownName             2   no such model, recipe, sampler, schedule, field; names one near it (3 for a model)
    ├── FileProblem             3   a file or folder that is missing, foreign, torn, full or not writable
    │   ├── CheckpointMismatch  3   a weight file whose keys or shapes are not the network's
    │   └── ImageProblem        3   a picture that cannot be read
    ├── MissingExtra            3   an optional dependency is not installed; says what to install
    ├── OutOfMemory             4   the device's memory is too small for what was asked
    └── TrainingDiverged        5   the loss or a gradient became NaN or infinite; the last good state is kept

Every message says what was asked, what was found and what to do, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

INTERRUPTED = 130


class LimnerError(Exception):
    """Base of all errors meant for the person at the keyboard; `exit_code` is what the command ends with."""

    exit_code = 3


class UsageError(LimnerError):
    exit_code = 2


class UnknownName(UsageError):
    """`kind` "sampler", `name` what was asked, `known` what exists: the message names one that is near, or else says
    with `hint` where all are, or lists them."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        if kind == "model":
            self.exit_code = 3
        names = sorted(known)
        plain = {n: n.lower().partition("=")[0] for n in (name, *names)}
        near = difflib.get_close_matches(plain[name], [plain[n] for n in names], n=1, cutoff=0.6)
        found = [repr(n) for n in names if plain[n] in near or n.endswith(f".{name}")]
        listing = [f"Did you mean {' or '.join(found[:3])}?"] if found else []
        if not listing and not (hint and len(names) > 12):
            more = f" and {len(names) - 40} more" if len(names) > 40 else ""
            listing = [f"Known: {', '.join(names[:40]) or 'none'}{more}."]
        super().__init__(" ".join([f"no {kind} {name!r}.", *listing, *([hint] if hint else [])]))


class FileProblem(LimnerError):
    pass


class CheckpointMismatch(FileProblem):
    pass


class ImageProblem(FileProblem):
    pass


class MissingExtra(LimnerError):
    """`package` is what could not be imported, `extra` the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'limner[{extra}]'")


class OutOfMemory(LimnerError):
    exit_code = 4


class TrainingDiverged(LimnerError):
    exit_code = 5


WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string_too_short": "a name",
    "string_too_long": "{max_length} signs or fewer",
    "string_pattern": "letters, digits, dots, - and _ alone",
    "string": "text",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
    "literal": "{expected}",
    "union_tag_invalid": "{expected_tags} as its {discriminator}",
    "union_tag_not_found": "its {discriminator}",
    "dataclass": "a section of fields",
    "too_long": "{max_length} values, not {actual_length}",
    "missing": "the value that is missing",
    "tuple": "a list in [ ]",
    "json": "JSON ({error})",
}


def wanted(problem: Mapping[str, Any]) -> str:
    """What to give instead, in our words, of an entry of pydantic's `ValidationError.errors()`."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return "there is no such field: leave it out"
    words = next((words for start, words in WANTED.items() if kind.startswith(start)), None)
    return f"give {words.format(**context)}" if words else str(context.get("error", problem["msg"])).replace("\n", " ")


def complaint(problem: Mapping[str, Any]) -> str:
    """As `wanted`, after the field and what it was given: "data.size='big': give a whole number"."""
    field, value = ".".join(map(str, problem["loc"])), problem["input"]
    given = f"={value!r:.40}" if isinstance(value, str | int | float) else ""
    return f"{field}{given}: {wanted(problem)}" if field else wanted(problem)


class Ignored(UserWarning):
    """Something that was asked for will not show in the picture."""


class Assumed(UserWarning):
    """A file does not tell what must be known, or what it tells does not do, and the usual was taken."""
