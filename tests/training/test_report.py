from __future__ import annotations

import json
import sys
from platform import python_version

import pytest
import torch
from PIL import Image

import limner
from limner.errors import FileProblem
from limner.training.report import CHECKER, Report, duration, grid

RED, CLEAR = (255, 0, 0, 255), (0, 0, 0, 0)


def test_a_grid_shows_pictures_in_rows_and_what_is_transparent_on_a_checker_board():
    half = Image.new("RGBA", (40, 40), CLEAR)
    half.paste(RED, (0, 0, 20, 40))
    sheet = grid([Image.new("RGBA", (40, 40), RED), half, Image.new("RGB", (40, 40), "blue")], gap=4)
    assert sheet.mode == "RGB"
    assert sheet.size == (2 * 44 + 4, 2 * 44 + 4)
    assert sheet.getpixel((4, 4)) == (255, 0, 0)
    assert sheet.getpixel((4 + 44, 4)) == (255, 0, 0)
    assert {sheet.getpixel((4 + 44 + x, 4 + y)) for x in range(20, 40) for y in range(40)} == {
        (c,) * 3 for c in CHECKER
    }
    assert sheet.getpixel((4, 4 + 44)) == (0, 0, 255)
    assert sheet.getpixel((4 + 44, 4 + 44)) == (255, 255, 255)  # nothing there


def test_a_transparent_colour_is_blended_over_the_board():
    sheet = grid([Image.new("RGBA", (8, 8), (255, 0, 0, 128))], gap=0)
    assert sheet.getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (75, "1m15s"), (3600, "1h00m"), (7260, "2h01m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_resumed_report_forgets_steps_that_will_be_done_again_and_a_torn_line(tmp_path):
    with Report(tmp_path, 10, 0, 0) as report:
        for step in (2, 4, 6):
            report.log(step, 2 * step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo\xff')
    with Report(tmp_path, 10, 4, 8) as report:
        report.log(6, 12, {"loss": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 1), (4, 1), (6, 2)]


def test_a_report_without_a_place_for_its_files_says_so(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with Report(tmp_path, 10, 0, 0) as report, pytest.raises(FileProblem, match=r"cannot write .*tensorboard: File"):
        report.log(2, 4, {"loss": 1.0})


def test_time_aside_does_not_count_in_the_rate(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("limner.training.report.time.perf_counter", lambda: now[0])
    with Report(tmp_path, 40, 0, 0) as report:
        now[0] = 2.0
        with report.aside():
            now[0] = 102.0
        report.log(20, 100, {})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["images_per_second"] == pytest.approx(50)
    assert row["seconds_left"] == pytest.approx(2)


def test_without_tensorboard_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("limner.training.report.importlib.util.find_spec", lambda name: None)
    with Report(tmp_path, 10, 0, 0):
        pass
    assert "pip install 'limner[train]'" in capsys.readouterr().out


def test_with_tensorboard_event_files_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    with Report(tmp_path, 10, 0, 0) as report:
        report.log(1, 2, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_silent_report_writes_and_says_nothing(tmp_path, capsys):
    with Report(tmp_path, 10, 0, 0, silent=True) as report:
        report.say("hello")
        report.log(1, 2, {"loss": 1.0})
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_what_is_said_is_kept_with_what_the_run_was_made_with(tmp_path, capsys):
    for step in (0, 4):
        with Report(tmp_path, 10, step, 2 * step) as report:
            report.begin(1, torch.device("cpu"))
            report.say("first")
            report.log(step + 2, 2 * step + 4, {"loss": 1.0})
            report.draw("step-000002", [Image.new("RGB", (4, 4))])
            report.log(step + 4, 2 * step + 8, {"loss": 1.0})
    out = [line for line in capsys.readouterr().out.splitlines() if "TensorBoard" not in line]
    kept = [
        line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines() if "TensorBoard" not in line
    ]
    assert kept == out
    assert [line.split("  ")[0] for line in out] == [
        "first",
        "step 2/10",
        "step 4/10",
        "first",
        "step 6/10",
        "step 8/10",
    ]
    assert out[2].endswith(f"left  {tmp_path / 'samples' / 'step-000002.png'}")
    assert out[1].endswith("left")
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 4]
    assert starts[0]["versions"] == {
        "limner": limner.__version__,
        "torch": torch.__version__,
        "python": python_version(),
    }
    assert starts[0]["command"] == sys.argv


def test_why_a_run_ended_is_in_its_log(tmp_path):
    problem = FileProblem("the disk is full: free some")
    report = Report(tmp_path, 10, 0, 0).__enter__()
    report.log(2, 4, {"loss": 1.0})
    report.__exit__(FileProblem, problem, None)
    assert (tmp_path / "log.txt").read_text().endswith("the disk is full: free some\n")
