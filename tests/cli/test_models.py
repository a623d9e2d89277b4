from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from limner import catalog, recipes


def test_models_lists_the_catalogue(limner):
    rows = json.loads(limner("models", "--json").out)
    assert [row["name"] for row in rows] == catalog.names()
    for row in rows:
        assert all(isinstance(row[key], str) and row[key] for key in ("name", "family", "task", "weights"))
        assert row["weights"] in ("bundled", "needed")


def test_bundled_means_that_the_file_is_there(limner, tmp_path, monkeypatch):
    def weights() -> list[str]:
        return [row["weights"] for row in json.loads(limner("models", "--json").out)]

    file = tmp_path / "icons.safetensors"
    monkeypatch.setattr(catalog, "CATALOG", {"icons": replace(catalog.entry("icons"), file=file)})
    assert weights() == ["needed"]
    file.touch()
    assert weights() == ["bundled"]


def test_recipes_lists_the_recipes(limner):
    rows = json.loads(limner("recipes", "--json").out)
    assert [row["name"] for row in rows] == list(recipes.names())
    for row in rows:
        assert all(isinstance(row[key], str) and row[key] for key in ("name", "family", "task"))


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


@pytest.mark.parametrize(("typed", "meant"), [("limner mod", "models"), ("limner generate --samp", "--sampler")])
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
