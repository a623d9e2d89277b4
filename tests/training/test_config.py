"""What a run is told, and what `field=value` does to it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import toy
from pydantic import ValidationError

from limner import recipes
from limner.catalog import DiffusionConfig
from limner.errors import FileProblem, UnknownName, UsageError
from limner.training.config import described, from_json, parse_overrides, to_json

CONFIG = replace(toy.CONFIG, system=DiffusionConfig())


def test_overrides_are_read_as_the_type_of_their_field():
    changes = ["lr=3e-4", "steps=7", "compile=true", "precision=bf16", "betas=0.5,0.75", 'sample_prompts=["a, b", "c"]']
    config = parse_overrides(CONFIG, [*changes, "name=123", "init_from=a=b", "lr_schedule=constant"])
    expected = {"lr": 3e-4, "steps": 7, "compile": True, "precision": "bf16", "betas": (0.5, 0.75)}
    expected |= {"sample_prompts": ("a, b", "c"), "name": "123", "init_from": "a=b", "lr_schedule": "constant"}
    assert config == replace(CONFIG, **expected)


def test_dotted_paths_reach_into_sections():
    config = parse_overrides(CONFIG, ["system.network.depth=4", "data.augment=view"])
    assert config.system.network == replace(CONFIG.system.network, depth=4)
    assert config.data == replace(CONFIG.data, augment="view")
    assert CONFIG.data.augment == "none"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("stepps=3", "'steps'"),
        ("network.depth=4", "'system.network.depth'"),
        ("system.network.dpeth=4", "'system.network.depth'"),
        ("lr.x=3", "'lr'"),
        ("latent_channels=3", "'system.autoencoder.latent_channels'"),  # by its last part
        ("=3", "no field ''. `limner recipes NAME` shows all."),
        ("learning_speed=3", "no field 'learning_speed'. `limner recipes NAME` shows all."),
    ],
)
def test_an_unknown_field_names_the_nearest_if_it_is_near(override, nearest):
    with pytest.raises(UnknownName, match="no field") as raised:
        parse_overrides(CONFIG, [override])
    assert nearest in str(raised.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("steps", "not a field=value pair"),
        ("steps=0", "give more than 0"),
        ("steps=-1", "give more than 0"),
        ("steps=1.5", "give a whole number"),
        ("steps=many", "give a whole number"),
        ("batch_size=0", "give more than 0"),
        ("save_every=0", "give more than 0"),
        ("log_every=0", "give more than 0"),
        ("keep=0", "give more than 0"),
        ("sample_every=-1", "give 0 or more"),
        ("lr=nan", "give more than 0"),
        ("lr=inf", "give a finite number"),
        ("lr=fast", "give a number"),
        ("lr=-1", "give more than 0"),
        ("betas=1,0.9", "give less than 1"),
        ("betas=0.9", "give the value that is missing"),
        ("betas=0.9,0.9,0.9", "give 2 values, not 3"),
        ("precision=fp8", "give 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("compile=perhaps", "give true or false"),
        ("system.network.depth=deep", "give a whole number"),
        ("system.network=deep", "whole section"),
        ("data={}", "whole section"),
        ("name=", "give a name"),
        ("name=../other", "give letters, digits, dots, - and _ alone"),
        ("lr_final=2", "give 1 or less"),
        ("sample_prompts=[1]", "give text"),
        ("sample_prompts=[a]", "give JSON (expected value"),
    ],
)
def test_a_bad_value_is_one_line_that_names_field_and_reason(override, reason):
    with pytest.raises(UsageError) as raised:
        parse_overrides(CONFIG, [override])
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert override.partition("=")[0].split(".")[-1] in str(raised.value)


def test_every_field_of_every_recipe_says_what_it_means():
    fields = [(name, field) for name in recipes.names() for field in described(recipes.get(name))]
    assert not [f"{name}: {field['field']}" for name, field in fields if not field["means"]]
    told = {field["field"]: field["means"] for _, field in fields}
    assert told["lr"] == "The learning rate, after `warmup`"  # below the field; of several sentences the first
    assert told["keep_model_in"].endswith('; "auto" is what `precision` is')
    assert told["precision"].endswith("stay as they are, fp32")
    assert told["data.limit"] == "`limit` > 0 keeps the first so many"  # a clause of the section's docstring
    assert told["system.autoencoder.groups"] == "norms are over so many `groups` of channels"  # that of its base


def test_a_recipe_with_a_bad_value_does_not_come_to_be():
    with pytest.raises(ValidationError, match="batch_size"):
        replace(CONFIG, batch_size=0)


def test_json_gives_the_same_config_back():
    config = parse_overrides(CONFIG, ["betas=0.5,0.75", "lr=0.1", "system.caption_dropout=0.3"])
    assert from_json(to_json(config), "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "of this version: steps=-1: give more than 0"),
        ({"colour": "red"}, "colour='red': there is no such field"),
        ({"data": {"source": "icons", "sise": 3}}, "data.sise"),
        (
            {"system": {"kind": "painting"}},
            "system: give 'autoencoding', 'diffusion', 'nonequilibrium', 'classifying' as its 'kind'",
        ),
        ({"system": {}}, "system: give its 'kind'"),
        ({"data": 3}, "data=3: give a section of fields"),
    ],
)
def test_a_config_file_that_was_edited_badly_is_refused(change, message):
    text = json.dumps(json.loads(to_json(CONFIG)) | change)
    with pytest.raises(FileProblem, match=r"^RUN/config\.json ") as raised:
        from_json(text, "RUN/config.json")
    assert message in str(raised.value)


def test_a_torn_config_file_is_refused():
    with pytest.raises(FileProblem, match=r"RUN/config\.json"):
        from_json(to_json(CONFIG)[:100], "RUN/config.json")
