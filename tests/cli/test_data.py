"""`limner data` prints the folder it made, and one line for what it cannot do."""

import pytest

from limner.cli.main import main
from limner.errors import FileProblem


def run(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["data", *args])
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


def test_the_folder_goes_to_stdout_and_the_progress_to_stderr(tmp_path, monkeypatch, capsys):
    asked = {}

    def stand_in(out, clipart, workers, say):
        asked.update(clipart=clipart, workers=workers)
        say("fetching packages")
        return out

    monkeypatch.setattr("limner.data.rebuild.rebuild_icons", stand_in)
    folder = str(tmp_path / "icons")
    assert run(capsys, "icons", "--out", folder) == (0, folder + "\n", "fetching packages\n")
    assert asked == {"clipart": True, "workers": None}
    run(capsys, "icons", "--out", folder, "--without-clipart", "--workers", "3")
    assert asked == {"clipart": False, "workers": 3}


def test_without_out_it_goes_where_training_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("limner.data.rebuild.rebuild_icons", lambda out, **_: out)
    assert run(capsys, "icons")[1] == f"{tmp_path / 'limner' / 'icons'}\n"


def test_a_failure_is_one_line_and_exit_code_3(tmp_path, monkeypatch, capsys):
    def fail(out, **_):
        raise FileProblem("there is no npm")

    monkeypatch.setattr("limner.data.rebuild.rebuild_icons", fail)
    code, out, err = run(capsys, "icons")
    assert (code, out) == (3, "")
    assert err.strip().endswith("there is no npm")
    assert err.count("\n") == 1


def test_an_unknown_set_names_the_nearest(capsys):
    code, out, err = run(capsys, "icon")
    assert (code, out) == (2, "")
    assert "Did you mean 'icons'?" in err


@pytest.mark.parametrize("args", [(), ("icons", "--workers", "-1"), ("icons", "--clipart")])
def test_what_cannot_be_meant_is_a_usage_error_of_one_line(args, monkeypatch, capsys):
    monkeypatch.setattr("limner.data.rebuild.rebuild_icons", lambda *_, **__: pytest.fail("started"))
    code, out, err = run(capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
