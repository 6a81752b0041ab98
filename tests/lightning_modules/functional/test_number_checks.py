"""Numbers in settings."""

import dataclasses
import math
import typing

import pytest

from malleable.callbacks.self_play.phases import PhaseSettings
from malleable.lightning_modules.editing.evaluation import Protocol
from malleable.lightning_modules.editing.fine_tune import FineTuneSettings
from malleable.lightning_modules.editing.known import KnownFacts
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.statistics import StatisticsSettings
from malleable.lightning_modules.editing.targets import TargetSettings
from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init, LinkRanking
from malleable.lightning_modules.language.config import LoRA, Scratch
from malleable.lightning_modules.language.tuning import Tuning

SETTINGS = (
    EditSettings,
    EmbeddingTuning,
    FineTuneSettings,
    Init,
    KnownFacts,
    LinkRanking,
    LoRA,
    PhaseSettings,
    Protocol,
    Scratch,
    StatisticsSettings,
    TargetSettings,
    Tuning,
)


def numbers(settings):
    """Return the names of the fields that are numbers, except seeds."""
    kinds = typing.get_type_hints(settings)
    allowed = ({int}, {float}, {int, type(None)})
    return [field.name for field in dataclasses.fields(settings) if {*(typing.get_args(kinds[field.name]) or [kinds[field.name]])} in allowed]


@pytest.mark.parametrize(("settings", "name"), [(settings, name) for settings in SETTINGS for name in numbers(settings) if name != "seed"])
@pytest.mark.parametrize("value", [-1, math.nan, -math.inf])
def test_settings_refuse_numbers_out_of_range(settings, name, value):
    with pytest.raises(ValueError, match=rf"{name} .*must be .*got {value}"):
        settings(**{name: value})


def test_messages_name_the_range_and_the_value():
    class Options:
        rate, size, share, unset = 0.0, 3, 0.5, None

    check_numbers(Options, above={"share": 0}, at_least={"size": 3, "rate": 0, "unset": 7}, below={"share": 1}, at_most={"size": 3})
    with pytest.raises(ValueError, match=r"^options\.rate must be > 0, got 0\.0$"):
        check_numbers(Options, "options.", above={"rate": 0})
    with pytest.raises(ValueError, match=r"^share must be >= 0 and < 0\.5, got 0\.5$"):
        check_numbers(Options, at_least={"share": 0}, below={"share": 0.5})


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match=r"scratch\.num_heads must divide scratch\.hidden_size, got 3 heads and a width of 128"):
        Scratch(num_heads=3)
