"""Folders and files that are whole or not there."""

import os
from pathlib import Path

import pytest

from vpfast._files import new_file, new_folder, refusal, write_file


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


def test_a_draft_ends_as_its_file_does_and_every_writer_has_its_own(tmp_path):
    path = tmp_path / "film.gif"
    with new_file(path) as one, new_file(path) as other:
        assert {one.suffix, other.suffix} == {".gif"}
        assert len({one, other, path}) == 3
        for draft in (one, other):
            assert draft.name[0] == "."
            draft.write_text(draft.name)
        first = one.name
        assert not path.exists()
    assert path.read_text() == first  # which ended last


@pytest.fixture
def events(monkeypatch, tmp_path):
    """What is forced to the disk and what gets its name, in order; drafts are called so."""
    told = []

    def name(path):
        parts = Path(path).relative_to(tmp_path).parts
        return "/".join("draft" if ".partial" in part else part for part in parts)

    def fsync(handle, flush=os.fsync):
        told.append(("flush", name(os.readlink(f"/proc/self/fd/{handle}"))))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for verb in ("rename", "replace"):
        real = getattr(Path, verb)

        def renamed(path, target, real=real):
            told.append(("name", name(target)))
            return real(path, target)

        monkeypatch.setattr(Path, verb, renamed)
    return told


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell the names of open files")
def test_content_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, events):
    with new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_text("x")
        assert events == [("flush", "a"), ("flush", "")]  # that the new folders above are entered there
        events.clear()
    named = events.index(("name", "a/b/out"))
    assert sorted(events[:named]) == [("flush", f"a/b/draft{inside}") for inside in ("", "/inner", "/inner/x")]
    assert events[named + 1 :] == [("flush", "a/b")]
    events.clear()
    write_file(tmp_path / "a" / "x.json", "1")
    assert events == [("flush", "a/draft"), ("name", "a/x.json"), ("flush", "a")]


def test_a_file_that_cannot_be_written_leaves_no_draft(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match=r"a\.json"):
        write_file(tmp_path / "a.json", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_only_known_names_are_replaced(tmp_path):
    out = tmp_path / "out"
    (out / "weights").mkdir(parents=True)
    (out / "weights" / "config.json").touch()
    known = {"weights", "weights/config.json", "strip.png"}
    assert refusal(out, known) is None
    for foreign in ("thesis.tex", "weights/notes"):
        (out / foreign).write_text("x")
        with pytest.raises(FileExistsError, match=f"{foreign} in it"), new_folder(out, known):
            pass
        assert (out / foreign).read_text() == "x"
        (out / foreign).unlink()
    with new_folder(out, known) as folder:
        (folder / "strip.png").touch()
    assert [path.name for path in out.iterdir()] == ["strip.png"]


def test_what_can_be_no_folder_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file", True) == "exists already and is not a folder"
    assert refusal(tmp_path / "file" / "a" / "out") == f"cannot be made: {tmp_path / 'file'} is a file"
    assert refusal(tmp_path / "a" / "out") is None


def test_the_current_folder_is_no_place_to_replace(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(FileExistsError, match="current folder"), new_folder(Path("."), replace=True):
        pass
    assert list(tmp_path.rglob("*")) == [here]


def test_the_old_folder_returns_where_the_new_one_cannot_come(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no rename"), new_folder(out, replace=True):
        pass
    assert sorted(tmp_path.rglob("*")) == [out, out / "old"]
