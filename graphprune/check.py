"""Check: the outcome of one comparison of real numbers, as it goes into the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Check"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was compared, how far apart it was, and whether that is near enough."""

    max_abs_err: float | None
    """Largest absolute difference found; None where it could not be measured."""
    tolerance: float
    """Largest difference that passes."""
    passed: bool
    """Whether every condition of the check holds, the tolerance among them."""
    detail: str = ""
    """What was compared, or why it fell short."""
    provider: str | None = None
    """ONNX Runtime execution provider that computed one side, where there is one."""

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain data; a non-finite error becomes null, because JSON has no word for it."""
        error = self.max_abs_err
        data: dict[str, Any] = {
            "max_abs_err": error if error is not None and math.isfinite(error) else None,
            "tolerance": self.tolerance,
            "passed": self.passed,
        }
        if self.detail:
            data["detail"] = self.detail
        if self.provider is not None:
            data["provider"] = self.provider
        return data
