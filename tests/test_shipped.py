"""The files that ship are whole, are those that the card is about, and fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import limner
from limner import catalog, evaluation
from limner.metrics import retrieval

WEIGHTS = Path(limner.__file__).parent / "weights"
CARD = (WEIGHTS / "icons" / "MODEL_CARD.md").read_text()


def test_the_shipped_model_draws_with_the_defaults_that_help_names():
    icons = catalog.entry("icons")
    for name in ("icons", icons.file):
        pipe = limner.load(name, "cpu")
        assert pipe.system.defaults == icons.config.defaults
    (picture,) = pipe.generate("red heart", seed=0, width=128, height=128, steps=1)
    assert picture.image.getbbox()


def test_the_shipped_judge_is_that_of_its_report_and_of_the_card():
    report = json.loads((WEIGHTS / "judge" / "judge.json").read_text())
    assert evaluation.read_frozen(WEIGHTS / "judge", report["prompts_sha256"]) == report
    assert len(retrieval.load(WEIGHTS / "judge" / "judge.safetensors").styles) == 23
    assert f"judge {report['judge_sha256'][:12]}" in CARD
    assert f"held-out prompts {report['prompts_sha256'][:12]}" in CARD
    (style,) = re.findall(r"\| style accuracy \|.*", CARD)
    assert style.split(" | ")[6] == f"{report['ceilings']['style']['value']:.4g}"


def test_the_card_draws_as_the_model_does():
    defaults = catalog.entry("icons").config.defaults
    assert f"{defaults.steps} steps" in CARD
    assert f"Drawn with steps {defaults.steps}, guidance {defaults.guidance}, sampler {defaults.sampler}" in CARD


def test_the_bundle_is_small():
    size = sum(file.stat().st_size for name in ("icons", "minilm") for file in (WEIGHTS / name).iterdir())
    assert size < 60 * 2**20
