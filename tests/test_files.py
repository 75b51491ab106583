from __future__ import annotations

import os
from pathlib import Path

import pytest

from graphprune.errors import OutputError
from graphprune.files import prepare_out, write_atomic


def test_a_written_file_is_whole_and_alone(tmp_path: Path) -> None:
    with write_atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")

    def write_half() -> None:
        with write_atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"expected to write .*nowhere.*No such file"),
        write_atomic(tmp_path / "nowhere" / "a.txt"),
    ):
        pass


def test_the_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with write_atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_prepare_out_creates_folders_and_leaves_them_empty(tmp_path: Path) -> None:
    folder = prepare_out(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_prepare_out_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="expected an output folder that can be written"):
        prepare_out(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_prepare_out_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        prepare_out(tmp_path)


def test_prepare_out_refuses_a_place_that_takes_no_folder() -> None:
    with pytest.raises(OutputError, match="choose another with --out"):
        prepare_out("/proc/graphprune")
