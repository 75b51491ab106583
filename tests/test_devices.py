"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from graphprune.devices import pick_device
from graphprune.errors import UsageError


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "xpu:0"])
def test_a_device_that_is_not_there_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="device"):
        pick_device(device)


def test_device_auto_takes_the_gpu_if_there_is_one() -> None:
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"
