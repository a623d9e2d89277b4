"""What a training run is told, and how `field=value` on the command line changes it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass

from limner.adapters.trainable import AdapterConfig
from limner.catalog import SystemConfig
from limner.data.batches import DataConfig
from limner.errors import FileProblem, UnknownName, UsageError, complaint, wanted
from limner.systems.objectives import Objective
from limner.training.adapting import WordConfig
from limner.training.controlling import ControlConfig
from limner.training.distilling import DistillationConfig
from limner.training.prior import PriorConfig
from limner.training.reflowing import ReflowConfig

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^\w[\w.-]*$")]
Count = Annotated[int, Field(gt=0, lt=10**12)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainConfig:
    """One training run, complete: a recipe returns it, every checkpoint holds it.

    Every value is checked when the config is made; pydantic's ValidationError names the field.
    """

    name: Name
    """Of the recipe; the final weights are RUN/final/NAME.safetensors."""
    system: SystemConfig | None = None
    """What is trained from nothing, or from `init_from`."""
    model: str = ""
    """Or a model that is there, by name, file or folder. An `adapter`, a `word` or a `control` is trained beside it,
    without one its network."""
    adapter: AdapterConfig | None = None
    """LoRA and its kin, trained beside `model`."""
    word: WordConfig | None = None
    """A name for what pictures show, trained beside `model`."""
    control: ControlConfig | None = None
    """A ControlNet or T2I-Adapter, trained beside `model`."""
    distillation: DistillationConfig | None = None
    """`model` teaches its network, a copy of it, or an `adapter`, to draw with fewer evaluations."""
    reflow: ReflowConfig | None = None
    """A copy of the network of `model`, a flow, learns the pairs of noise and picture that `model` makes."""
    keep_model_in: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """What the weights of `model` are kept in where they stay as they are; "auto" is what `precision` is."""
    prior: PriorConfig = Field(default_factory=PriorConfig)
    """Pictures of what a `model` knows already, learned beside its own; a step has as many again as `batch_size`."""
    data: DataConfig
    steps: Count
    """Updates of the weights, from the first to the last."""
    batch_size: Count
    """Images a step, over all processes together."""
    accumulate: Count = 1
    """Parts into which each process cuts its share of a step, to hold one in memory at a time; one update for all."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "muon"] = "adamw"
    """One for everything, or Muon for the matrices of repeated blocks and AdamW for the rest."""
    loss: Objective = Field(default_factory=Objective)
    """Of diffusion and flows."""
    lr: Positive = 3e-4
    """The learning rate, after `warmup`."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """What the optimizer's averages of gradients and of their squares keep of themselves a step."""
    eps: Positive = 1e-8
    """What the optimizer adds to the root of the latter, not to divide by 0."""
    weight_decay: PositiveOrZero = 0.01
    """Of matrices; vectors and embeddings do not decay."""
    muon_lr_scale: Positive = 1.0
    """Muon's learning rate over `lr`."""
    warmup: CountOrZero = 0
    """Steps over which the learning rate rises from 0."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """What becomes of the learning rate after `warmup`, until the last step."""
    lr_final: Fraction = 0.0
    """What the cosine ends at, as a fraction of `lr`."""
    ema_half_life: PositiveOrZero = 50_000.0
    """Images after which a weight counts half in the moving average; 0 for no average: the weights are what is left."""
    ema_warmup: PositiveOrZero = 0.05
    """The half-life is never more than this fraction of the images seen so far; 0 for the full half-life at once."""
    grad_clip: PositiveOrZero = 1.0
    """Longest gradient (2-norm over a phase's parameters); 0 for no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass (autocast); weights, gradients, optimizer and EMA stay as they are, fp32. "auto" is bf16 on a
    GPU that has it, else fp32. With fp16 the loss
    is multiplied so that small gradients survive, by less once large ones do not (arXiv:1710.03740, section 3.2)."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where a loss or gradient is not finite no update is made, and the run stops, or goes on with the next step."""
    max_skips: Count = 10
    """With on_nan=skip: how many such steps in a row may be left out."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Several processes have each the whole network, or cut it among them, with its averages and moments."""
    gradient_checkpointing: bool = False
    """Compute the repeated blocks once more on the way back instead of keeping what is inside them (arXiv:1604.06174):
    a third more work for far less memory."""
    compile: bool = False
    """Compile the repeated blocks first (torch.compile)."""
    cuda_graphs: bool = True
    """On one GPU, record the passes of a diffusion or flow and replay them, which spares a small batch the waiting for
    the host; not with `compile` or `gradient_checkpointing`."""
    seed: CountOrZero = 0
    """Of all that is drawn at random: first weights, order of the data, noise."""
    log_every: Count = 50
    """Steps between lines of the log, each the mean of those since the last."""
    sample_every: CountOrZero = 0
    """Steps between sample grids; 0 for none but the last."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the pictures that are not learned from, but measured with the averaged weights; by their ids."""
    validate_every: Count = 500
    """Steps between such measurements."""
    validation_images: Count = 256
    """How many are drawn from them, and with what noise, is the same every time."""
    save_every: Count = 1000
    """Steps between checkpoints; the last step has one, too."""
    keep: Count = 2
    """How many of the newest checkpoints are kept."""
    sample_prompts: tuple[str, ...] = ()
    """One drawing each in a grid, with a `control` beside its hint; none, no grid, or with a `control` the captions of
    the first pictures."""
    init_from: str = ""
    """A checkpoint's model.safetensors or ema.safetensors to start the weights from, or but for an adapter or a word a
    final weights file."""

    @property
    def file_name(self) -> str:
        """Of the final weights, without its ending: a word's is what prompts say."""
        return self.word.name if self.word else self.name


def parse_overrides(config: TrainConfig, overrides: Iterable[str]) -> TrainConfig:
    """`config` with `field=value` changes such as "lr=3e-4", "system.network.depth=4" or 'sample_prompts=["a fox"]'.

    A value is read as the field's type; lists are JSON, or numbers joined by commas. Raises UnknownName for a field
    that does not exist (naming the nearest) and UsageError for a value that is not of the field's type or range.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r} is not a field=value pair; write for example lr=3e-4")
        try:
            config = _replaced(config, path.strip().split("."), text.strip())
        except _NoSuchField:
            raise UnknownName("field", path, fields_of(config), "`limner recipes NAME` shows all.") from None
        except ValidationError as error:
            raise UsageError(f"{path}={text}: {wanted(error.errors()[0])}") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path}={text}: {error}") from None
    return config


def fields_of(config: TrainConfig) -> list[str]:
    """The dotted paths of everything that can be changed, in order."""
    return [path for path, _ in _leaves(_plain(config))]


def described(config: TrainConfig) -> list[dict[str, Any]]:
    """{"field", "type", "value", "means"} of everything that can be changed, in order."""
    return [
        {"field": path, "type": type_, "value": value, "means": means}
        for path, value in _leaves(_plain(config))
        for type_, means in [_type_and_meaning(config, path.split("."))]
    ]


def _type_and_meaning(section: Any, path: list[str]) -> tuple[str, str]:
    head, *rest = path
    if rest:
        return _type_and_meaning(getattr(section, head), rest)
    hint = get_type_hints(type(section))[head]
    if get_origin(hint) is Literal and len(get_args(hint)) == 1:
        return _type_words(hint), "What this section is; it is nothing else"
    return _type_words(hint), meanings(section.__class__).get(head, "")


@cache
def meanings(section: type) -> dict[str, str]:
    """What the fields of a section mean: the first sentence below each, or else the first clause of the section's own
    docstring that has its name in backticks."""
    found: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, reversed(section.__mro__)):
        tree = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0])
        for clause in reversed(_split(ast.get_docstring(tree) or "", r"[.;]")):
            found |= dict.fromkeys(re.findall(r"`(\w+)`", clause), clause)
        for field, told in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(told, ast.Expr):
                found[ast.unparse(field.target)] = _split(ast.literal_eval(told.value), r"\.")[0]
    return found


def _split(text: str, ends: str) -> list[str]:
    return [part.rstrip(".;") for part in re.split(rf"(?<={ends})\s+", " ".join(text.split()))]


def _type_words(hint: Any) -> str:
    """int, number, text, a choice, or list and {} for JSON: what is typed after `field=`."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return "|".join(dict.fromkeys(map(_type_words, get_args(hint))))
    if get_origin(hint) is tuple:
        return "list"
    if dataclasses.is_dataclass(hint):
        return "{}"
    names = {"float": "number", "str": "text", "bool": "true|false", "NoneType": "null"}
    return names.get(getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint)))


def to_json(config: TrainConfig) -> str:
    """The resolved config, readable: two spaces an indent, fields in order of declaration."""
    return json.dumps(_plain(config), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str | bytes, source: str) -> TrainConfig:
    """The inverse of `to_json`; `source` is the file's name for messages. Raises FileProblem."""
    try:
        return TypeAdapter(TrainConfig).validate_json(text)
    except ValidationError as error:
        raise FileProblem(f"{source} is no training config of this version: {complaint(error.errors()[0])}") from None


class _NoSuchField(Exception):
    pass


def _replaced(value: Any, path: list[str], text: str) -> Any:
    """`value` with the entry at `path` set to `text`, read as the type that the entry has."""
    if not path:
        raise ValueError("this is a whole section; name one of its fields")
    head, *rest = path
    if dataclasses.is_dataclass(value):
        if head not in {field.name for field in dataclasses.fields(value)}:
            raise _NoSuchField
        hints = get_type_hints(type(value), include_extras=True)
        child, hint = getattr(value, head), hints[head]
    elif isinstance(value, dict) and head in value:
        child, hint = value[head], type(value[head])
    else:
        raise _NoSuchField
    is_section = dataclasses.is_dataclass(child) or (isinstance(child, dict) and child)
    new = _replaced(child, rest, text) if rest or is_section else _read(hint, text)
    changed = {**value, head: new} if isinstance(value, dict) else dataclasses.replace(value, **{head: new})
    if not rest and not is_pydantic_dataclass(type(value)):
        _check_range(new)
    return changed


def _read(hint: Any, text: str) -> Any:
    """`text` as the type `hint`: as it stands, as JSON, or as the inside of a JSON list."""
    adapter = TypeAdapter(hint)
    errors = []
    for read, document in (
        (adapter.validate_python, text),
        (adapter.validate_json, text),
        (adapter.validate_json, f"[{text}]"),
    ):
        try:
            return read(document)
        except ValidationError as error:
            errors.append(error)
    if text.startswith("["):
        raise errors[1]  # of the JSON that was meant
    firsts = [error.errors()[0] for error in errors]
    furthest = max(firsts, key=lambda first: (len(first["loc"]), first["type"] == "too_long"))
    raise errors[firsts.index(furthest)]


def _check_range(value: Any) -> None:
    """Numbers must be finite and not negative, also in sections that do not check their own."""
    for number in value if isinstance(value, tuple | list) else [value]:
        if isinstance(number, int | float) and not 0 <= number < math.inf:
            raise ValueError(f"{number:g} cannot be; give a number from 0")


def _plain(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and numbers, as JSON will hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
