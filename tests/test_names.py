"""One name a thing, whoever spells it."""

from __future__ import annotations

import itertools

import pytest

from limner import catalog, names, pipeline
from limner.errors import UsageError
from limner.sampling import samplers, schedules

TABLES = [(names.SAMPLERS, samplers), (names.SCHEDULES, schedules)]


def test_the_tables_name_what_there_is():
    assert names.SAMPLERS.keys() == samplers.SAMPLERS.keys()
    assert names.SCHEDULES.keys() == schedules.SCHEDULES.keys() | {"auto"}


@pytest.mark.parametrize(("table", "module"), TABLES)
def test_every_spelling_is_of_one_thing(table, module):
    spellings = [(spelling, ours) for ours, others in table.items() for spelling in (ours, *others)]
    for (spelling, ours), change in itertools.product(spellings, (str, str.upper, lambda s: s.replace(" ", "_"))):
        assert module.find(change(spelling)) == ours


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("DPM++ 2M Karras", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M SDE Exponential", ("DPM++ 2M SDE", "Exponential")),
        ("DPM++ 2M SDE", ("DPM++ 2M SDE", None)),
        ("Euler a", ("Euler a", None)),
        ("DPM adaptive", ("DPM adaptive", None)),
    ],
)
def test_a_schedule_may_stand_at_the_end_of_a_sampler(spelling, expected):
    assert names.split(spelling) == expected


SD1, ICONS = (catalog.entry(name).config.defaults for name in ("sd1", "icons"))


@pytest.mark.parametrize(
    ("defaults", "said", "expected"),
    [
        (ICONS, {}, ("dpmpp_2m", "uniform")),
        (SD1, {}, ("euler", "linspace")),
        (SD1, {"sampler": "k_dpmpp_2m"}, ("dpmpp_2m", "linspace")),
        (SD1, {"sampler": "DDIM"}, ("ddim", "leading")),
        (SD1, {"sampler": "DPM++ SDE"}, ("dpmpp_sde", "karras")),
        (SD1, {"sampler": "DPM++ 3M SDE"}, ("dpmpp_3m_sde", "exponential")),
        (SD1, {"sampler": "DPM++ 2M Karras"}, ("dpmpp_2m", "karras")),
        (SD1, {"sampler": "DPM++ 2M Karras", "schedule": "SGM Uniform"}, ("dpmpp_2m", "sgm_uniform")),
        (SD1, {"sampler": "LCM", "schedule": "leading"}, ("lcm", "lcm")),
        (SD1, {"schedule": "Automatic"}, ("euler", "linspace")),
    ],
)
def test_a_request_ends_with_our_names(defaults, said, expected):
    request = pipeline.check(defaults, 8, prompt="a red fox", **said)
    assert (request.sampler, request.schedule) == expected


def test_a_schedule_that_a_model_cannot_have_is_refused_before_anything_is_drawn(tiny_model):
    with pytest.raises(UsageError, match=r"the schedule 'leading' counts timesteps.* take 'uniform'"):
        pipeline.prepare(catalog.load(tiny_model), prompt="a red circle", schedule="Leading")
