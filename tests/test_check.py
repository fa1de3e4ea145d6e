"""The checks of values, and that there is one of each."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import pytest

from natsl import config
from natsl.space import check as module
from natsl.space import policy
from natsl.space.check import check, check_at_least, check_choice, check_count, check_counts, check_number, shown


class Colour(Enum):
    red = "red"
    green = "green"


@pytest.mark.parametrize("value", ["red", Colour.red], ids=["name", "member"])
def test_a_choice_is_a_member_or_its_value(value: Any) -> None:
    assert check_choice("colour", value, Colour) is Colour.red


@pytest.mark.parametrize("value", ["blue", "Red", 1, None, [], {}], ids=repr)
def test_other_choices_are_refused_with_the_list(value: Any) -> None:
    with pytest.raises(ValueError, match=r"colour = .* is not allowed: it must be one of red, green") as error:
        check_choice("colour", value, Colour)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [2.0, True, "3", None, 1])
def test_counts(value: Any) -> None:
    assert check_count("n", 2, 2) == 2
    with pytest.raises(ValueError, match=r"n = .* it must be an integer ≥ 2"):
        check_count("n", value, 2)
    with pytest.raises(ValueError, match=r"b = .* it must be an integer ≥ 2"):
        check_counts(2, {"a": 2, "b": value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bounds(value: float) -> None:
    check_at_least(0, {"x": 0.0})
    with pytest.raises(ValueError, match=r"x = .* it must be ≥ 0"):
        check_at_least(0, {"x": value})


def test_numbers_have_one_form() -> None:
    assert math.copysign(1, check_number("x", -0.0)) == 1
    assert type(check_number("x", 3)) is float
    assert check_number("x", -math.inf) == -math.inf
    for value, bounds in ((math.nan, ()), (True, ()), ("1", ()), (2, (0, 1)), (10**400, ())):
        with pytest.raises(ValueError, match=r"x = .* is not allowed: it must"):
            check_number("x", value, *bounds)


def test_errors_stay_on_one_short_line() -> None:
    with pytest.raises(ValueError, match=r"x = 'y\\ny") as error:
        check(False, "x", "y\n" * 100, "no")
    assert "\n" not in str(error.value)
    assert len(shown("y" * 1000)) == 80
    assert shown(Colour.red) == "'red'"


def test_there_is_one_check() -> None:
    assert vars(config)["check"] is vars(policy)["check"] is module.check
