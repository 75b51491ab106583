"""The text of a data SPEC: a name, and options after commas."""

from __future__ import annotations

import re
from collections.abc import Mapping

from graphprune.errors import DataError

__all__ = ["DataOptions", "Statistics", "split_spec"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Means and standard deviations, one per channel or one for all."""

_NORMALIZE: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "none": ((0.0,), (1.0,)),
}


class DataOptions:
    """The options of one spec; every one must be known."""

    def __init__(self, spec: str, given: Mapping[str, str], *, default: str) -> None:
        known = ("normalize", "size")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise DataError(
                f"data {spec!r}: unknown option {unknown[0]!r}; known: {', '.join(known)}, holdout"
            )
        self.spec = spec
        self.given = given
        self.default = default

    @property
    def size(self) -> int | None:
        """Images' height and width, if it is given."""
        text = self.given.get("size")
        if text is None:
            return None
        if not text.isdigit() or int(text) < 1:
            raise DataError(
                f"data {self.spec!r}: expected size=N with N at least 1, found size={text}"
            )
        return int(text)

    def statistics(self, channels: int) -> Statistics:
        """Return mean and standard deviation per channel."""
        text = self.given.get("normalize", self.default)
        mean, std = _NORMALIZE[text] if text in _NORMALIZE else self._numbers(text)
        found = sorted({len(mean), len(std)} - {1, channels})
        if found:
            raise DataError(
                f"data {self.spec!r}: normalize={text} gives {found[0]} channels, the images have {channels}"
            )
        if min(std) <= 0:
            raise DataError(
                f"data {self.spec!r}: normalize={text} needs positive standard deviations"
            )
        return mean, std

    def _numbers(self, text: str) -> Statistics:
        means, _, stds = text.partition(":")
        try:
            mean = tuple(float(value) for value in means.split("/"))
            std = tuple(float(value) for value in (stds or means).split("/"))
        except ValueError:
            raise DataError(
                f"data {self.spec!r}: expected normalize= one of {', '.join(_NORMALIZE)}, a number that is both mean "
                f"and deviation, or m1/m2/m3:s1/s2/s3; found {text!r}"
            ) from None
        return mean, std


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Return the name, and option -> value.

    Raises:
        DataError: An option is given twice.
    """
    # A folder's name may hold commas: options are the pieces at the end that read name=value.
    pieces = spec.split(",")
    options: dict[str, str] = {}
    while len(pieces) > 1 and (match := re.fullmatch(r"\s*([A-Za-z_-]+)=(.*)", pieces[-1])):
        if match[1] in options:
            raise DataError(f"data {spec!r}: option {match[1]!r} is given twice")
        options[match[1]] = match[2].strip()
        pieces.pop()
    return ",".join(pieces).strip(), dict(reversed(options.items()))
