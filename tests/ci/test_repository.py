"""The base, and what counts as a change."""

import os

import pytest

from ci import GateError
from ci.repository import Base, Repository
from tests.ci.conftest import Scratch


def test_on_a_branch_the_base_is_where_it_left_main(scratch):
    left = scratch.commit()
    scratch.git("checkout", "--quiet", "-b", "mine")
    scratch.commit()
    scratch.commit()
    assert scratch.repository.resolve(None) == Base(left, "where HEAD left main")


def test_on_main_the_base_is_the_commit_before(scratch):
    before = scratch.commit()
    scratch.commit()
    assert scratch.repository.resolve(None) == Base(before, "the commit before, as all of HEAD is in main")


def test_on_a_main_that_is_ahead_the_base_is_what_was_pushed(scratch):
    pushed = scratch.commit()
    scratch.git("update-ref", "refs/remotes/origin/main", pushed)
    scratch.commit()
    scratch.commit()
    assert scratch.repository.resolve(None) == Base(pushed, "where HEAD left origin/main")


def test_without_a_main_the_base_must_be_given(scratch):
    base = scratch.commit()
    scratch.git("checkout", "--quiet", "-b", "mine")
    scratch.git("branch", "--quiet", "-D", "main")
    scratch.commit()
    with pytest.raises(GateError, match=r"none of main, origin/main, .* is here; fetch it, or give --base"):
        scratch.repository.resolve(None)
    assert scratch.repository.resolve(base).revision == base


def test_a_base_that_is_ahead_is_compared_as_it_is(scratch):
    scratch.write(kept="1", lost="1")
    scratch.commit()
    scratch.write(lost="2")
    ahead = scratch.commit()
    scratch.git("reset", "--quiet", "--hard", "HEAD~1")
    base = scratch.repository.resolve(ahead)
    assert base == Base(ahead, f"--base {ahead}")
    assert [change.path for change in scratch.repository.changes(base.revision)] == ["lost.py"]


def test_a_folder_within_the_work_tree_is_bad_input(scratch):
    scratch.put("inner/a.py", "1")
    scratch.commit()
    with pytest.raises(GateError, match="the gate checks a whole work tree"):
        Repository(scratch.root / "inner").resolve(None)


def test_a_change_of_mode_is_a_change(scratch):
    scratch.write(a="1", b="1")
    base = scratch.commit()
    (scratch.root / "a.py").chmod(0o755)
    (change,) = scratch.repository.changes(base)
    assert (change.path, change.mode) == ("a.py", "100644 -> 100755")


def test_an_empty_file_is_a_file(scratch):
    scratch.write(a="")
    base = scratch.commit()
    assert scratch.repository.at(base, "a.py") == b""
    assert scratch.repository.at(base, "b.py") is None


def test_a_file_name_need_not_be_text(scratch):
    (scratch.root / os.fsdecode(b"\xff.py")).write_text("1")
    base = scratch.commit()
    (scratch.root / os.fsdecode(b"\xff.py")).write_text("2")
    (change,) = scratch.repository.changes(base)
    assert (os.fsencode(change.path), change.before, change.after) == (b"\xff.py", b"1", b"2")


def test_settings_of_the_user_or_of_a_hook_are_ignored(scratch, tmp_path, monkeypatch):
    scratch.write(a="1\n2\n")
    base = scratch.commit()
    scratch.write(a="1\nx\n")
    scratch.git("config", "diff.external", "true")
    scratch.git("config", "diff.noprefix", "true")
    other = Scratch(tmp_path / "other")
    other.root.mkdir()
    other.git("init", "--quiet", "--initial-branch=main")
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    assert scratch.repository.changed_lines(base, "a.py") == (2,)
    assert [change.path for change in scratch.repository.changes(base)] == ["a.py"]


def test_a_base_that_has_moved_on_is_compared_at_the_merge_base(scratch):
    left = scratch.commit()
    scratch.git("checkout", "--quiet", "-b", "mine")
    scratch.write(mine="1")
    scratch.commit()
    scratch.git("checkout", "--quiet", "main")
    scratch.write(theirs="1")
    scratch.commit()
    scratch.git("checkout", "--quiet", "mine")
    base = scratch.repository.resolve("main")
    assert base == Base(left, "where HEAD left --base main")
    assert [change.path for change in scratch.repository.changes(base.revision)] == ["mine.py"]


def test_a_shallow_clone_is_bad_input(scratch, tmp_path):
    scratch.commit()
    scratch.commit()
    scratch.git("clone", "--quiet", "--depth", "1", f"file://{scratch.root}", str(tmp_path / "shallow"))
    with pytest.raises(GateError, match="shallow and ends before it; git fetch --unshallow, or fetch-depth: 0"):
        Repository(tmp_path / "shallow").resolve(None)


def test_a_clone_that_is_cut_off_before_the_branch_left_main_is_bad_input(scratch, tmp_path):
    scratch.commit()
    scratch.git("checkout", "--quiet", "-b", "mine")
    for _ in range(4):
        scratch.commit()
    cut = tmp_path / "cut"
    scratch.git("clone", "--quiet", "--depth", "2", "--no-single-branch", f"file://{scratch.root}", str(cut))
    for asked in (None, "origin/main"):
        with pytest.raises(GateError, match="this clone is shallow and ends before it"):
            Repository(cut).resolve(asked)


def test_a_folder_is_no_file(scratch):
    scratch.put("inner/a.py", "1")
    base = scratch.commit()
    assert scratch.repository.at(base, "inner") is None


def test_in_the_first_commit_every_file_is_new(scratch):
    scratch.write(a="1")
    scratch.commit()
    changed = scratch.repository.changes(scratch.repository.resolve(None).revision)
    assert [(change.path, change.what) for change in changed] == [("a.py", "added")]


def test_a_base_that_does_not_exist_is_bad_input(scratch):
    scratch.commit()
    with pytest.raises(
        GateError, match="--base must be a revision of this repository: got nowhere; fetch it or correct it"
    ):
        scratch.repository.resolve("nowhere")


def test_a_folder_without_a_repository_is_bad_input(tmp_path):
    with pytest.raises(GateError, match="the gate needs a git work tree"):
        Repository(tmp_path).changes("HEAD")


def test_uncommitted_and_untracked_files_are_changes_and_ignored_ones_are_not(scratch):
    scratch.write(kept="1", edited="1", gone="1")
    scratch.put(".gitignore", "cache/\n")
    base = scratch.commit()
    scratch.write(edited="2", new="1")
    scratch.put("cache/x.py", "1")
    (scratch.root / "gone.py").unlink()
    found = {change.path: change.what for change in scratch.repository.changes(base)}
    assert found == {"edited.py": "changed", "gone.py": "deleted", "new.py": "added"}


def test_changed_lines_are_those_of_the_file_as_it_is_now(scratch):
    scratch.write(a="1\n2\n3\n4\n")
    base = scratch.commit()
    scratch.write(a="1\nx\ny\n3\n4\nz\n")
    assert scratch.repository.changed_lines(base, "a.py") == (2, 3, 6)
