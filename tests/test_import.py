from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

import limner

HEAVY = {"torch", "numpy", "PIL", "pydantic", "rich", "safetensors", "tokenizers", "huggingface_hub", "einops"}


def loaded_by(code: str) -> set[str]:
    """The top-level modules a fresh interpreter holds after running `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


RUN = "import contextlib\nfrom limner.cli.main import main\nwith contextlib.suppress(SystemExit): main({})"
AT_ONCE = ["import limner", "import limner; limner.__version__; dir(limner)"]
AT_ONCE += [RUN.format(args) for args in ([], ["--help"], ["--version"])]


@pytest.mark.parametrize("code", AT_ONCE)
def test_import_and_help_wait_for_nothing_heavy(code):
    assert loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize("command", ["generate", "models", "recipes", "train", "data", "evaluate"])
def test_the_help_of_a_command_does_not_wait_for_torch(command):
    assert loaded_by(RUN.format([command, "--help"])) & (HEAVY - {"pydantic"}) == set()  # typer reads numbers with it


def test_loading_does_not_wait_for_torchs_compiler():
    build = "catalog.build(catalog.entry('icons').config)"
    assert "sympy" not in loaded_by(f"import torch; from limner import catalog\nwith torch.device('meta'): {build}")


def test_the_public_names_are_there():
    from limner import pipeline, types

    assert limner.load is pipeline.load
    assert limner.Pipeline is pipeline.Pipeline
    assert limner.GeneratedImage is types.GeneratedImage
    assert set(limner.__all__) == set(dir(limner))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        limner.laod  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert limner.__version__ == importlib.metadata.version("limner")
