"""What several test files share: a small model, and the command line run inside the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def limner(capsys) -> Callable[..., Result]:
    """Run `limner ARGS` in this process."""
    from limner.cli.main import main

    def run(*args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Result(exit.value.code, out, err)

    return run


@pytest.fixture(scope="session", autouse=True)
def float32():
    """Models of other programs compute in float32 by default, whatever the processor at hand is fastest at."""
    from limner import catalog

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_multiplies_bf16", lambda: False)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A weight file of `icons-tiny` with fixed random weights: it draws noise, at once and always the same."""
    return _noisy_model(tmp_path_factory.mktemp("model") / "icons-tiny.safetensors", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """As `tiny_model`, with other weights."""
    return _noisy_model(tmp_path_factory.mktemp("model") / "icons-tiny.safetensors", seed=1)


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    """A small Stable Diffusion 1 as diffusers saves it."""
    from systems import stable_diffusion

    return stable_diffusion.sd1(tmp_path_factory.mktemp("sd1"))


def _noisy_model(path: Path, seed: int) -> Path:
    import torch

    from limner import catalog

    config = replace(catalog.entry("icons-tiny").config, autoencoder_from="")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        system = catalog.build(config)
        for parameter in system.network.parameters():  # so that nothing is left at zero and every setting matters
            parameter.normal_(std=0.1)
    catalog.save(system, config, path)
    return path


@pytest.fixture
def pictures(here) -> Path:
    """A folder of three, with captions."""
    (here / "pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (40, 32), color).save(here / "pictures" / f"{i}.png")
        (here / "pictures" / f"{i}.txt").write_text(f"a {color} square")
    return here / "pictures"
