from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from limner import recipes
from limner.training.config import parse_overrides, to_json


@pytest.fixture
def runs(tmp_path) -> Path:
    """One that is finished, one that only began, and what is no run."""
    tiny = recipes.get("icons-tiny")
    for name, config in (("a", tiny), ("b", replace(tiny, lr=1e-4, compile=True))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(config))
    lines: list[dict] = [{"step": 400, "loss": 0.5}, {"step": 800, "validation/loss": 0.4}]
    lines += [{"step": step, "loss": loss} for step, loss in ((720, 5.0), (740, 0.2), (780, 0.1))]
    lines += [{"step": 800, "loss": 0.3, "images_per_second": 90.0}]
    for name, captions in (("a", "3f2a"), ("b", "1b0c")):
        for step, count in ((999_999, 8), (1_000_000, 16)):
            (tmp_path / name / "checkpoints" / f"step-{step}").mkdir(parents=True)
            told = {"data": {"data": {"samples": count, "captions": captions}}}
            (tmp_path / name / "checkpoints" / f"step-{step}" / "state.json").write_text(json.dumps(told))
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"loss": 9')
    (tmp_path / "a" / "final").mkdir()
    (tmp_path / "a" / "final" / "icons-tiny.safetensors").touch()
    (tmp_path / "samples").mkdir()
    return tmp_path


def test_runs_lists_how_far_each_came(limner, runs):
    a, b = json.loads(limner("runs", runs, "--json").out)
    when = a.pop("when")
    assert a == {
        "run": "a",
        "recipe": "icons-tiny",
        "learns": "",
        "data": a["data"],
        "step": "800/800",
        "loss_last_tenth": 0.2,  # of the steps after 720
        "validation/loss": 0.4,
        "images_per_second": 90.0,
        "state": "finished",
    }
    assert len(when) == len("2026-01-01 12:00")
    assert (b["run"], b["step"], b["loss_last_tenth"], b["state"]) == ("b", "0/800", "", "unfinished")
    assert [re.fullmatch(r"16 of shapes, [0-9a-f]{4}", row["data"]) is None for row in (a, b)] == [False, False]
    assert a["data"] != b["data"]
    assert [line.split()[0] for line in limner("runs", runs).out.splitlines()] == ["RUN", "a", "b"]
    assert [row["run"] for row in json.loads(limner("runs", runs / "b", "--json").out)] == ["b"]


def test_runs_that_are_compared_show_the_fields_that_differ(limner, runs):
    rows = json.loads(limner("runs", runs / "a", runs / "b", "--json").out)
    found = {row["field"]: (row[str(runs / "a")], row[str(runs / "b")]) for row in rows}
    found.pop("when", None)
    told = found.pop("data")
    assert told[0] != told[1]
    assert found == {
        "lr": (2e-3, 1e-4),
        "compile": (False, True),
        "step": ("800/800", "0/800"),
        "loss_last_tenth": (0.2, ""),
        "validation/loss": (0.4, ""),
        "images_per_second": (90.0, ""),
        "state": ("finished", "unfinished"),
    }


def test_runs_beside_a_model_say_what_they_learn_for_which(limner, tmp_path):
    changes = {
        "lora": ["adapter.kind=oft", "model=models/sd1.safetensors"],
        "dreambooth": ["prior.prompt=a dog"],
        "word": ["word.name=my-mug"],
        "finetune": [],
    }
    for name, more in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(parse_overrides(recipes.get(name), more)))
    control = json.loads((tmp_path / "finetune" / "config.json").read_text()) | {"control": {"kind": "t2i_adapter"}}
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "config.json").write_text(json.dumps(control))
    rows = json.loads(limner("runs", tmp_path, "--json").out)
    assert {row["run"]: row["learns"] for row in rows} == {
        "dreambooth": "lora for icons beside its class",
        "finetune": "network for icons",
        "lora": "oft for sd1.safetensors",
        "word": "my-mug for sd1",
        "z": "t2i_adapter for icons",
    }
    assert rows[0]["data"] == "folder"  # before a checkpoint it is not known which
    rows = json.loads(limner("runs", tmp_path / "lora", tmp_path / "dreambooth", "--json").out)
    found = {row["field"]: [row[str(tmp_path / name)] for name in ("lora", "dreambooth")] for row in rows}
    assert found["adapter.kind"] == ["oft", "lora"]
    assert found["prior.prompt"] == [None, "a dog"]
    assert found["model"] == ["models/sd1.safetensors", "icons"]
    assert not {"learns", "word", "prior"} & found.keys()


def test_where_there_are_no_runs_it_says_how_to_start_one(limner, tmp_path, runs):
    result = limner("runs", runs / "samples")
    assert result.code == 3
    assert "no training run in" in result.err
    assert "limner train RECIPE --out" in result.err
    (runs / "a" / "config.json").write_text("{")
    for asked in ([runs], [runs / "a", runs / "b"]):
        broken = limner("runs", *asked)
        assert broken.code == 3
        assert "a holds no training run: config.json cannot be read" in broken.err
