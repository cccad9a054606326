"""What ``make help`` and ``make setup`` say and would do."""

import re
import shutil
import subprocess

import pytest

from tests.docs.snippets import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make; would show what its targets say and do")
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture
def would_do(tmp_path):
    """The commands of a target in a fresh clone, printed and not run."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def ask(*arguments: str) -> list[str]:
        command = ["make", "--no-print-directory", "--dry-run", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.splitlines()

    return ask


def test_help_names_every_target():
    (targets,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.M)
    told = "\n".join(re.findall(r'@echo "(.+)"', MAKEFILE))
    assert {name for name in targets.split() if f"make {name}" not in told} == {"help"}


def test_setup_takes_torch_from_where_pip_takes_all_else(would_do):
    pip = [line for line in would_do("setup") if "pip install" in line]
    assert len(pip) == 2
    assert pip[0].endswith("--constraint constraints.txt torch numpy")


def test_setup_takes_torch_alone_from_an_index_that_is_named(would_do):
    pip = [line for line in would_do("setup", "TORCH_INDEX=https://example.org/cpu") if "pip install" in line]
    assert len(pip) == 3
    assert pip[0].endswith('--no-deps --index-url "https://example.org/cpu" torch')
    assert not any("index-url" in line for line in pip[1:])


def test_another_torch_is_tested_in_an_environment_of_its_own_that_goes_again(would_do):
    told = "\n".join(would_do("test-torch", "VERSION=2.9.1", "TORCH_INDEX=https://example.org/cpu"))
    assert ".venv/" not in told
    assert """trap 'rm -rf ".venv-torch-2.9.1"' EXIT""" in told
    assert "s/^torch==.*/torch==2.9.1/" in told
    assert told.count("index-url") == 1
    kept = "\n".join(would_do("test-torch", "VERSION=2.9.1", "KEEP=1"))
    assert "trap '' EXIT" in kept
    assert "index-url" not in kept
