"""Fixtures of every test: a seed of its own, one thread, the shared data where it is there."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Keep workers from fighting over cores, and sums from depending on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed everything random from the test's id; a test neither sees nor disturbs another's numbers."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the legacy generator is what libraries under test use
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared data sets and weights; the test is skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    return folder
