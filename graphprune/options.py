"""Options of a pass: the fields of its dataclass, their types, and conversion from the text form."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from graphprune.errors import UsageError
from graphprune.textform import Bare, Raw, Value, format_value, interpret

if TYPE_CHECKING:
    from graphprune.contract import Pass

__all__ = ["convert_options", "describe_options", "option_types", "spelled_options"]

_SCALARS = (int, float, bool, str)


def option_types(cls: type[Pass]) -> dict[str, Any]:
    """Return option name -> type.

    Raises:
        TypeError: A field has a type that the text form cannot spell; addressed to the author of the pass.
    """
    hints = typing.get_type_hints(cls)
    found = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for name, hint in found.items():
        if not _is_option_type(hint):
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__}.{name}: an option is int, float, bool, str, Literal, "
                f"a tuple of these, or None; found {_type_text(hint)}"
            )
    return found


def convert_options(cls: type[Pass], raw: Mapping[str, Raw]) -> dict[str, Value]:
    """Turn options as written into values of the types that `cls` declares.

    Raises:
        UsageError: An option that the pass does not have or lacks, or a value of another type.
    """
    hints = option_types(cls)
    for name in raw:
        if name not in hints:
            known = ", ".join(hints) or "no options"
            raise UsageError(f"pass {cls.name!r} has no option {name!r}; it takes {known}")
    for field in dataclasses.fields(cls):
        is_required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if is_required and field.name not in raw:
            raise UsageError(
                f"pass {cls.name!r} needs the option {field.name}=<{_type_text(hints[field.name])}>"
            )
    values: dict[str, Value] = {}
    for name, written in raw.items():
        candidates = _readings(written, hints[name])
        if not candidates:
            is_one = typing.get_origin(hints[name]) is tuple and not isinstance(written, tuple)
            hint = f"; one alone stands in brackets too: ({_raw_text(written)})" if is_one else ""
            raise UsageError(
                f"pass {cls.name!r}: option {name} expects {_type_text(hints[name])}, found {_raw_text(written)}{hint}"
            )
        values[name] = candidates[0]
    return values


def spelled_options(instance: Pass) -> dict[str, Value]:
    """Return the options that differ from their defaults, in the order of the fields."""
    spelled: dict[str, Value] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if (
            field.default is dataclasses.MISSING
            or value != field.default
            or type(value) is not type(field.default)
        ):
            spelled[field.name] = value
    return spelled


def describe_options(cls: type[Pass]) -> dict[str, str]:
    """Return option name -> its type and default as text."""
    described: dict[str, str] = {}
    hints = option_types(cls)
    for field in dataclasses.fields(cls):
        text = _type_text(hints[field.name])
        if field.default is not dataclasses.MISSING:
            text += f" = {format_value(field.default)}"
        described[field.name] = text
    return described


def _is_option_type(hint: Any) -> bool:
    if hint in _SCALARS or hint is type(None) or typing.get_origin(hint) is Literal:
        return True
    if _is_union(hint) or typing.get_origin(hint) is tuple:
        return all(_is_option_type(part) for part in typing.get_args(hint) if part is not Ellipsis)
    return False


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _readings(raw: Raw, hint: Any) -> list[Value]:
    """Return every value of type `hint` that the text may mean, the most specific first."""
    if _is_union(hint):
        parts = sorted(
            typing.get_args(hint), key=lambda part: part is str
        )  # a word is a string last of all
        return [value for part in parts for value in _readings(raw, part)]
    if typing.get_origin(hint) is tuple:
        return _tuple_readings(raw, hint) if isinstance(raw, tuple) else []
    if isinstance(raw, tuple):
        return []
    value = interpret(raw)
    text = raw.text if isinstance(raw, Bare) else raw
    if typing.get_origin(hint) is Literal:
        return [
            choice
            for choice in typing.get_args(hint)
            if choice in (value, text) and not _mixes(choice, value)
        ]
    if hint is type(None):
        return [None] if value is None else []
    if hint is str:
        return [text]
    if hint is float and type(value) is int:
        return [float(value)]
    return [value] if type(value) is hint else []


def _mixes(choice: object, value: object) -> bool:
    """Tell 1 from True, which compare as equal."""
    return isinstance(choice, bool) != isinstance(value, bool) and not isinstance(choice, str)


def _tuple_readings(raw: tuple[Bare | str, ...], hint: Any) -> list[Value]:
    parts = typing.get_args(hint)
    if parts[-1:] == (Ellipsis,):
        parts = (parts[0],) * len(raw)
    if len(parts) != len(raw):
        return []
    readings = [_readings(word, part) for word, part in zip(raw, parts, strict=True)]
    return [typing.cast(Value, tuple(r[0] for r in readings))] if all(readings) else []


def _type_text(hint: Any) -> str:
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is Literal:
        return "|".join(format_value(choice) for choice in typing.get_args(hint))
    if _is_union(hint):
        return "|".join(_type_text(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = ["..." if part is Ellipsis else _type_text(part) for part in typing.get_args(hint)]
        return f"({', '.join(parts)})"
    return str(getattr(hint, "__name__", hint))


def _raw_text(raw: Raw) -> str:
    if isinstance(raw, tuple):
        return "(" + ",".join(map(_raw_text, raw)) + ")"
    return raw.text if isinstance(raw, Bare) else repr(raw)
