from __future__ import annotations

import json
import math

from graphprune.check import Check


def test_json_leaves_out_what_was_not_said() -> None:
    check = Check(max_abs_err=0.5, tolerance=1.0, passed=True)
    assert check.to_json() == {"max_abs_err": 0.5, "tolerance": 1.0, "passed": True}


def test_json_holds_detail_and_provider() -> None:
    check = Check(
        max_abs_err=None, tolerance=1.0, passed=False, detail="shapes differ", provider="CPU"
    )
    assert check.to_json()["detail"] == "shapes differ"
    assert check.to_json()["provider"] == "CPU"


def test_an_infinite_error_is_valid_json() -> None:
    check = Check(max_abs_err=math.inf, tolerance=1.0, passed=False)
    assert json.loads(json.dumps(check.to_json(), allow_nan=False))["max_abs_err"] is None
