"""What can go wrong, and the exit code each kind ends the command line with.

    LimnerError                 3   anything below; a message of one line
    ├── UsageError              2   an argument that cannot be meant: unknown name, size off the grid, NaN
    ├── UnknownName             2   no such model, recipe, sampler, schedule, field; names the nearest (3 for a model)
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
from collections.abc import Iterable

INTERRUPTED = 130


class LimnerError(Exception):
    """Base of all errors meant for the person at the keyboard; `exit_code` is what the command ends with."""

    exit_code = 3


class UsageError(LimnerError):
    exit_code = 2


class UnknownName(UsageError):
    """`kind` "sampler", `name` what was asked, `known` what exists: the message names the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        if kind == "model":
            self.exit_code = 3
        names = sorted(known)
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
        nearest = next((n for n in names if near and n.lower() == near[0]), None)
        listing = f"Did you mean {nearest!r}?" if nearest else f"Known: {', '.join(names) or 'none'}."
        super().__init__(f"no {kind} {name!r}. {listing}{' ' + hint if hint else ''}")


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


class Assumed(UserWarning):
    """A file does not tell what must be known, and the usual was taken."""


class WordsCut(UserWarning):
    """The end of a prompt did not fit into what the model reads."""
