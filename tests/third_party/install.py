"""Installs packages for a test: a folder with modules and metadata, put on sys.path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    package: str,
    passes: Mapping[str, str],
    modules: Mapping[str, str] | None = None,
) -> None:
    """Make a distribution `package` importable that registers `passes` and holds `modules`."""
    root = folder / package
    info = root / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in passes.items())
    (info / "entry_points.txt").write_text(f"[graphprune.passes]\n{lines}")
    for name, text in (modules or {}).items():
        (root / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(root)


def install_count_nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package of count_nodes.py under the name third-party."""
    source = (HERE / "count_nodes.py").read_text()
    install(
        folder,
        monkeypatch,
        package="third_party_passes",
        passes={"count-nodes": "third_party_count_nodes:CountNodes"},
        modules={"third_party_count_nodes": source},
    )
