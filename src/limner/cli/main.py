"""The `limner` command: which words are commands, and what each kind of failure looks like.

Exit codes: 0 done, or training stopped as asked · 1 a bug (with a traceback), or whoever read our output went away ·
2 usage · 3 a model or file · 4 out of memory · 5 training diverged · 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException
from typer.models import CommandInfo

import limner
from limner.cli.convert import convert_command
from limner.cli.data import data_command
from limner.cli.edit import edit_command
from limner.cli.evaluate import evaluate_command
from limner.cli.generate import STYLES, generate_command
from limner.cli.inspect import inspect_command
from limner.cli.models import models_command, recipes_command
from limner.cli.runs import runs_command
from limner.cli.train import train_command
from limner.cli.upscale import upscale_command
from limner.errors import INTERRUPTED, FileProblem, LimnerError, OutOfMemory, UsageError, wanted

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate_command,
    "edit": edit_command,
    "upscale": upscale_command,
    "models": models_command,
    "recipes": recipes_command,
    "inspect": inspect_command,
    "convert": convert_command,
    "train": train_command,
    "runs": runs_command,
    "data": data_command,
    "evaluate": evaluate_command,
}
OPTIONS = ("-h", "--help", "--version", "--install-completion", "--show-completion")

EXIT_CODES = """
Exit codes: 0 done, or stopped as asked (--stop-after, SIGTERM) with everything saved; 2 usage; 3 a model or file;
4 out of memory; 5 training diverged (NaN); 130 interrupted; 1 a bug.
"""

app = typer.Typer(
    name="limner",
    help='Paint pictures from words, train the models that do. `limner "PROMPT"` is `limner generate "PROMPT"`.',
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"limner {limner.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _not_asked() -> None:
    """In place of a command of which only the first line of help is wanted: to build all options takes 0.1 s."""


def _commands(asked: str | None) -> list[CommandInfo]:
    """Every command with its help; options only where it is the one `asked` for, or None is known to be."""
    return [
        CommandInfo(
            name,
            callback=command if asked in (name, None) else _not_asked,
            help=inspect.getdoc(command),
            epilog=f"{EXIT_CODES}{STYLES if name == 'generate' else ''}",
        )
        for name, command in COMMANDS.items()
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: the process's) and exit with its code."""
    code = 0
    completes = "_LIMNER_COMPLETE" in os.environ
    if completes:
        _complete_short_form()
    if args is None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait spinning starve where cores are shared
    try:
        line = _with_command(sys.argv[1:] if args is None else args)
        app.registered_commands = _commands(None if completes else line[0])
        code = app(line, "limner", standalone_mode=False) or 0
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()
    except TyperException as error:
        for problem in getattr(error.__cause__, "errors", list)():  # pydantic's
            error.message = f"{problem['input']!r:.50}: {wanted(problem)}"
        code = _complain(f"{error.format_message().rstrip('.')}{_usage_hint(error)}", 2)
    except LimnerError as error:
        code = _complain(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own flush at exit is quiet
            reason = f"cannot write {error.filename or 'the output'}: no space left on the device; free some"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG):
            reason = f"cannot use {error.filename or 'a file'}: {str(error.strerror).lower()}"
        else:
            raise
        code = 1 if error.errno == errno.EPIPE else _complain(reason, FileProblem.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _complain("out of memory: ask for less at a time (size, --batch, batch_size)", OutOfMemory.exit_code)
    if code == INTERRUPTED:
        _complain("interrupted", code)
    if args is None:
        gc.freeze()  # the process ends: Python would look through all of torch for garbage first
    sys.exit(code)


def _with_command(args: list[str]) -> list[str]:
    """What is not a command nor an option of `limner` itself is meant for `generate`; nothing at all asks for help."""
    if not args:
        return ["--help"]
    if args[0] in COMMANDS or args[0].split("=")[0] in OPTIONS:
        return args
    if command := _misspelt(args[0]):
        asked = f"no command {args[0]!r}. Did you mean `limner {command}`?"
        raise UsageError(f"{asked} To paint it: limner generate {args[0]}")
    return ["generate", *args]


def _complete_short_form() -> None:
    """Where the shell asks what may follow `limner "PROMPT"`, let it ask about `limner generate "PROMPT"`."""
    for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"):
        typed = re.fullmatch(r"(\S+\s+)((\S+)\s.*)", os.environ.get(name, ""), re.DOTALL)
        if typed and typed[3] not in COMMANDS and typed[3].split("=")[0] not in OPTIONS:
            os.environ[name] = f"{typed[1]}generate {typed[2]}"
            os.environ["COMP_CWORD"] = str(int(os.environ.get("COMP_CWORD") or 0) + 1)


def _misspelt(word: str) -> str | None:
    """The command that `word` is close to, unless it is an English word: `limner rain` paints, `limner trian` asks."""
    word = word.lower()
    near = get_close_matches(word, COMMANDS, n=1, cutoff=0.8) if word.isalpha() else []
    if near and near[0] not in (word, f"{word}s"):
        tokenizer = Path(limner.__file__).parent / "weights" / "minilm" / "tokenizer.json"
        near = [] if word in json.loads(tokenizer.read_bytes())["model"]["vocab"] else near
    return near[0] if near else None


def _complain(message: str, code: int) -> int:
    print(f"limner: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage_hint(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    if "unexpected extra argument" in str(error) and context and context.info_name == "generate":
        return "; put a prompt of several words in quotes"
    return f"; see `{context.command_path} --help`" if context else ""


def _is_out_of_memory(error: BaseException) -> bool:
    """torch's error of that name on a GPU; on a CPU a RuntimeError that only its text tells apart."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
