"""Scratch clones: the work tree as it is now, committed once and copied for each planted fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ci.checks.records import CHANGELOG
from ci.git import git as run_git
from ci.golden import DIGESTS, FOLDER
from ci.process import python, run
from ci.repository import PLAIN_DIFF, Repository

GOLDEN_LIMIT_S = 120.0
OWN_TESTS = "tests/ci/"
_AUTHOR = ("-c", "user.name=faults", "-c", "user.email=faults@localhost", "-c", "commit.gpgsign=false")


def make_template(root: Path, folder: Path) -> None:
    """Make a repository of one commit with the files of the work tree at ``root``, without the gate's own tests.

    Those check that each planted fault finds the text it replaces.  In a clone that text is replaced already, so they
    would refuse every fault, and the harmless changes too.
    """
    for path in Repository(root).files():
        if path.startswith(OWN_TESTS):
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, folder / path)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all", "--force")
    git(folder, *_AUTHOR, "commit", "--quiet", "--message", "as it is")


@contextmanager
def clone(template: Path, folder: Path) -> Iterator[Path]:
    """A copy of the template, removed afterwards."""
    shutil.copytree(template, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def update_records(root: Path) -> None:
    """Do what the author of a change does: write the goldens, and a changelog entry for each schedule that changed.

    If the generator fails, nothing is written; the gate reports the failure.
    """
    run(python("-m", "ci.golden", "--no-theorems"), root, GOLDEN_LIMIT_S)
    names = changed_names(git(root, "diff", "--unified=0", *PLAIN_DIFF, "--", FOLDER))
    if names:
        with (root / CHANGELOG).open("a") as file:
            file.write("".join(f"- {name} changes.\n" for name in names))


def changed_names(diff: str) -> list[str]:
    """The schedules that a diff of the golden files changes."""
    names = []
    inside = ""
    for line in diff.splitlines():
        if line.startswith("diff --git "):
            inside = line.rpartition(" b/")[2]
            if inside.endswith(".txt") and inside != DIGESTS:
                names.append(Path(inside).stem)
        elif inside == DIGESTS and line[:1] in ("+", "-") and line[:3] not in ("+++", "---"):
            names.append(line[1:].split()[0])
    return list(dict.fromkeys(names))


def git(root: Path, *arguments: str) -> str:
    """Run git in a scratch clone.  Raises ``GateError``."""
    return run_git(root, *arguments).decode(errors="replace")
