"""Scratch git repositories: a small one, and a copy of this one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ci.faults.clone import make_template
from ci.repository import Repository

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_summary_of_a_job(monkeypatch):
    """Keep the reports of these tests out of the summary of the job that runs them."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


class Scratch:
    """A git work tree in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repository = Repository(root)

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false", *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True, timeout=30).stdout

    def write(self, **files: str) -> None:
        for name, text in files.items():
            self.put(f"{name}.py", text)

    def put(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "a commit")
        return self.git("rev-parse", "HEAD").strip()


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "work").mkdir()
    made = Scratch(tmp_path / "work")
    made.git("init", "--quiet", "--initial-branch=main")
    return made


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """This repository as it is now, in one commit."""
    folder = tmp_path_factory.mktemp("template")
    make_template(ROOT, folder)
    return folder


@pytest.fixture
def clone(template, tmp_path):
    """A copy of it, to change at will."""
    return Scratch(Path(shutil.copytree(template, tmp_path / "clone")))
