"""The base, and what counts as a change."""

import pytest

from ci.errors import GateError
from ci.repository import Repository


def test_on_a_branch_the_base_is_where_it_left_main(scratch):
    left = scratch.commit()
    scratch.git("checkout", "--quiet", "-b", "mine")
    scratch.commit()
    scratch.commit()
    assert scratch.repository.resolve(None) == left


def test_on_main_the_base_is_the_commit_before(scratch):
    before = scratch.commit()
    scratch.commit()
    assert scratch.repository.resolve(None) == before


def test_a_base_that_went_on_is_compared_from_where_the_branch_left_it(scratch):
    left = scratch.commit()
    scratch.git("checkout", "--quiet", "-b", "mine")
    scratch.write(mine="1")
    scratch.commit()
    scratch.git("checkout", "--quiet", "main")
    scratch.write(theirs="1")
    scratch.commit()
    scratch.git("checkout", "--quiet", "mine")
    base = scratch.repository.resolve("main")
    assert base == left
    assert [change.path for change in scratch.repository.changes(base)] == ["mine.py"]


def test_a_shallow_clone_is_bad_input_rather_than_all_new(scratch, tmp_path):
    scratch.commit()
    scratch.commit()
    scratch.git("clone", "--quiet", "--depth", "1", f"file://{scratch.root}", str(tmp_path / "shallow"))
    with pytest.raises(GateError, match="shallow and ends at HEAD; git fetch --unshallow, or fetch-depth: 0"):
        Repository(tmp_path / "shallow").resolve(None)


def test_of_the_first_commit_everything_is_new(scratch):
    scratch.write(a="1")
    scratch.commit()
    changed = scratch.repository.changes(scratch.repository.resolve(None))
    assert [(change.path, change.what) for change in changed] == [("a.py", "added")]


def test_a_base_that_does_not_exist_is_bad_input(scratch):
    scratch.commit()
    with pytest.raises(GateError, match="--base is a revision of this repository: got nowhere; fetch it or correct it"):
        scratch.repository.resolve("nowhere")


def test_what_is_no_repository_is_bad_input(tmp_path):
    with pytest.raises(GateError, match="the gate looks at a git work tree"):
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
