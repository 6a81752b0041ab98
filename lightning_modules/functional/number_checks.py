"""Checks of the numbers in settings."""

from __future__ import annotations

from collections.abc import Mapping


def check_numbers(
    settings: object,
    prefix: str = "",
    *,
    above: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
    below: Mapping[str, float] | None = None,
) -> None:
    """Check that attributes are in a range. An attribute that is ``None`` is not checked; ``nan`` is in no range.

    Args:
        settings: Object with the attributes.
        prefix: Text before the name of an attribute in a message, e.g. ``tuning.``.
        above: Exclusive lower bounds by attribute.
        at_least: Inclusive lower bounds by attribute.
        at_most: Inclusive upper bounds by attribute.
        below: Exclusive upper bounds by attribute.

    Raises:
        ValueError: If a value is out of range; the message contains its name, its value and the range.
    """
    ranges: dict[str, list[str]] = {}
    wrong = []
    for sign, bounds in ((">", above), (">=", at_least), ("<=", at_most), ("<", below)):
        for name, bound in (bounds or {}).items():
            value = getattr(settings, name)
            ranges.setdefault(name, []).append(f"{sign} {bound:g}")
            inside = value is None or {">": value > bound, ">=": value >= bound, "<=": value <= bound, "<": value < bound}[sign]
            if not inside:
                wrong.append(name)
    if wrong:
        raise ValueError(f"{prefix}{wrong[0]} must be {' and '.join(ranges[wrong[0]])}, got {getattr(settings, wrong[0])}")
