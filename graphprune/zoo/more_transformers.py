"""More models of transformers, of every kind that is there: built as in `graphprune.zoo.transformers`, no part named.

more_transformers.json holds them: what differs from a base configuration, and the inputs by name or by shape. Those
that cannot be cut to half are there, too: their rows say why.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphprune.zoo.transformers import (
    BOTH,
    DECODER,
    ENCODER,
    IMAGE,
    SOUND,
    TEXT,
    TEXTS,
    VISION,
    WAVE,
    TransformersModel,
    model,
)

__all__ = ["TABLE", "more_transformers_models"]

TABLE = Path(__file__).with_name("more_transformers.json")
"""Name -> architecture, base, options beside it, inputs, outputs."""

_BASES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "encoder": ENCODER,
    "decoder": DECODER,
    "vision": VISION,
    "both": BOTH,
    "sound": SOUND,
}
_INPUTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "text": TEXT,
    "texts": TEXTS,
    "image": IMAGE,
    "large image": {"pixel_values": (3, 64, 64)},
    "sound": WAVE,
}


@functools.cache
def more_transformers_models() -> tuple[TransformersModel, ...]:
    """Return one model of each architecture."""
    return tuple(_read(n, e) for n, e in json.loads(TABLE.read_text(encoding="utf-8")).items())


def _read(name: str, entry: Mapping[str, Any]) -> TransformersModel:
    given = entry.get("inputs", "text")
    return model(
        name,
        entry["architecture"],
        {**_BASES[entry.get("base", "")], **_configurations(entry.get("options", {}))},
        inputs=_INPUTS[given]
        if isinstance(given, str)
        else {key: tuple(shape) for key, shape in given.items()},
        outputs=tuple(entry.get("outputs", ["logits"])),
    )


def _configurations(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with pairs (class, options) where the table has a configuration of a part."""
    return {
        key: (value["class"], _configurations(value["options"]))
        if isinstance(value, dict) and "class" in value
        else value
        for key, value in options.items()
    }
