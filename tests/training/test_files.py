"""Folders that are whole or not there."""

import pytest

from vpfast.training.files import new_folder, write_file


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_whole_or_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(FileExistsError, match="exists already"), new_folder(out):
        pass
    with pytest.raises(RuntimeError), new_folder(out, replace=True) as folder:
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["old"]
    with new_folder(out, replace=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_replaced_at_once(tmp_path):
    write_file(tmp_path / "a.json", "1")
    write_file(tmp_path / "a.json", "2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "2")]
