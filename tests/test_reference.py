"""Reference texts: made from the program, and noticed when they drift."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune import registry
from graphprune.cli import COMMANDS
from graphprune.reference import BEGIN, END, cli_page, not_installed, passes_table, stale


def test_the_table_names_every_pass_of_ours_and_its_file() -> None:
    rows = passes_table().splitlines()[2:]
    assert len(rows) == len(registry.names())
    root = Path(__file__).parents[1]
    for row in rows:
        path = row.partition("](")[2].partition(")")[0]
        assert (root / path).is_file()


def test_the_page_holds_the_help_of_every_command() -> None:
    page = cli_page()
    for command in COMMANDS:
        assert f"## graphprune {command}\n\n```\nUsage: graphprune {command} " in page


def test_the_page_is_as_wide_on_every_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    page = cli_page()
    monkeypatch.setenv("COLUMNS", "40")
    assert cli_page() == page


def test_drift_is_noticed_and_mended(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    texts = stale(tmp_path)
    assert set(texts) == {readme, tmp_path / "docs" / "cli.md"}
    assert texts[readme] == f"before\n{BEGIN}\n{passes_table()}\n{END}\nafter\n"
    (tmp_path / "docs").mkdir()
    for path, text in texts.items():
        path.write_text(text)
    assert stale(tmp_path) == {}


def test_a_readme_without_the_marks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="expected the lines"):
        stale(tmp_path)


def test_passes_that_are_not_installed_are_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project.entry-points."graphprune.passes"]\nobs = "a:A"\nnot-there = "b:B"\n'
    )
    assert not_installed(tmp_path) == ["not-there"]
