from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from limner import catalog, recipes
from limner.cli.main import COMMANDS
from limner.errors import INTERRUPTED, FileProblem, OutOfMemory, TrainingDiverged, UsageError
from limner.training.config import fields_of


def test_models_lists_the_catalogue(limner):
    rows = json.loads(limner("models", "--json").out)
    assert [row["name"] for row in rows] == [*catalog.names(), *catalog.CONTROLS]
    for row in rows:
        assert all(isinstance(row[key], str) and row[key] for key in ("name", "family", "task", "weights"))
        assert row["weights"] in ("bundled", "needed")


def test_bundled_means_that_the_file_is_there(limner, tmp_path, monkeypatch):
    def weights() -> list[str]:
        return [row["weights"] for row in json.loads(limner("models", "--json").out)]

    file = tmp_path / "icons.safetensors"
    monkeypatch.setattr(catalog, "CATALOG", {"icons": replace(catalog.entry("icons"), file=file)})
    monkeypatch.setattr(catalog, "CONTROLS", {})
    assert weights() == ["needed"]
    file.touch()
    assert weights() == ["bundled"]


def test_recipes_lists_the_recipes(limner):
    rows = json.loads(limner("recipes", "--json").out)
    assert [row["name"] for row in rows] == list(recipes.names())
    for row in rows:
        assert all(isinstance(row[key], str) and row[key] for key in ("name", "family", "task"))
    families = {row["name"]: row["family"] for row in rows}
    assert families["lora"] == "any, such as icons"
    assert families["word"] == "Stable Diffusion 1, 2, XL"
    assert families["t2i-adapter"] == "Stable Diffusion 1, 2, XL"
    assert families["control"] == "Stable Diffusion, FLUX.1, icons"


def test_recipes_lists_the_fields_of_one(limner):
    rows = {row["field"]: row for row in json.loads(limner("recipes", "sd1-tiny", "--json").out)}
    config = recipes.get("sd1-tiny")
    assert list(rows) == fields_of(config)
    means = "Updates of the weights, from the first to the last"
    assert rows["steps"] == {"field": "steps", "type": "int", "value": config.steps, "means": means}
    types = {
        "lr": "number",
        "optimizer": "adamw|adamw8bit|adafactor|prodigy|muon",
        "betas": "list",
        "system.text_encoder": "minilm|{}",
    }
    types |= {"compile": "true|false", "system.name": "text", "system.interpolant.zero_snr": "true|false"}
    assert {name: rows[name]["type"] for name in types} == types
    lines = limner("recipes", "sd1-tiny").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(rows)
    assert limner("recipes", "sd1-tin").code == 2


def test_tables_are_the_json_for_people(limner):
    for command in ("models", "recipes"):
        head, *lines = limner(command).out.splitlines()
        rows = json.loads(limner(command, "--json").out)
        assert head.split()[:2] == ["NAME", "FAMILY"]
        assert [line.split()[0] for line in lines] == [row["name"] for row in rows]


def test_words_too_many_are_pointed_to_the_help(limner):
    result = limner("models", "icons")
    assert (result.code, result.out) == (2, "")
    assert result.err == "limner: Got unexpected extra argument(s) (icons); see `limner models --help`\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("modls", "models"),
        ("model", "models"),
        ("Models", "models"),
        ("recipe", "recipes"),
        ("trian", "train"),
        ("genrate", "generate"),
    ],
)
def test_a_slip_in_a_command_is_asked_about(limner, here, typed, meant):
    result = limner(typed, "--steps", "3")
    assert (result.code, result.out) == (2, "")
    question = f"limner: no command '{typed}'. Did you mean `limner {meant}`? To paint it: limner generate {typed}\n"
    assert result.err == question


@pytest.mark.parametrize("prompt", ["rain", "trains", "brain", "date", "a train", "train!", "fox", "Rain"])
def test_what_can_be_drawn_is_no_slip(limner, here, tiny_model, prompt):
    assert limner(prompt, "-m", tiny_model, "--steps", "1").code == 0


def test_every_help_has_the_exit_codes(limner):
    codes = [*(c.exit_code for c in (UsageError, FileProblem, OutOfMemory, TrainingDiverged)), INTERRUPTED]
    for command in ([], *([name] for name in COMMANDS)):
        told = " ".join(limner(*command, "--help").out.partition("Exit codes:")[2].split())
        assert all(f"{code} " in told for code in codes), command


def test_the_help_says_what_each_command_does_in_whole_sentences(limner):
    lines = limner("--help").out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) == len(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP")
@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "0"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000", marks=pytest.mark.slow),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
    ],
)
def test_threads_that_wait_leave_the_cores_to_others_unless_told(given, spins):
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    told = bare | given | {"OMP_DISPLAY_ENV": "verbose"}  # OpenMP says on stderr what it was started with

    def spin_count(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=told, check=True)
        return re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[1]

    assert spin_count("-m", "limner", "models") == spins
    assert (spin_count("-c", "import limner.cli.main, torch") == spins) == bool(given)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("limner mod", "models"), ("limner generate --samp", "--sampler"), ("limner fox --samp", "--sampler")],
)
def test_the_shell_completes_commands_and_options(typed, meant):
    told = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_LIMNER_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "limner"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | told, check=True)
    assert (done.stdout.split(), done.stderr) == ([meant], "")


def test_a_reader_that_went_away_is_no_error_message():
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "limner", "models"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=buffered, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
