"""``make help`` lists the targets, and the commands of ``make setup`` and ``make test-torch`` are right."""

import re
import shutil
import subprocess

import pytest

from tests.docs.snippets import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make; would show that its targets are right")
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture
def would_do(tmp_path):
    """A function that lists the commands of a target in a fresh clone, without running them."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def ask(*arguments: str) -> list[str]:
        command = ["make", "--no-print-directory", "--dry-run", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.splitlines()

    return ask


def test_help_names_every_target():
    (targets,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.M)
    shown = "\n".join(re.findall(r'@echo "(.+)"', MAKEFILE))
    assert {name for name in targets.split() if f"make {name}" not in shown} == {"help"}


def test_setup_installs_torch_from_the_default_index(would_do):
    pip = [line for line in would_do("setup") if "pip install" in line]
    assert len(pip) == 2
    assert pip[0].endswith("--constraint constraints.txt torch numpy")


def test_setup_installs_only_torch_from_a_given_index(would_do):
    pip = [line for line in would_do("setup", "TORCH_INDEX=https://example.org/cpu") if "pip install" in line]
    assert len(pip) == 3
    assert pip[0].endswith('--no-deps --index-url "https://example.org/cpu" torch')
    assert not any("index-url" in line for line in pip[1:])


def test_another_torch_is_tested_in_its_own_environment_which_is_removed(would_do):
    commands = "\n".join(would_do("test-torch", "VERSION=2.9.1", "TORCH_INDEX=https://example.org/cpu"))
    assert ".venv/" not in commands
    assert """trap 'rm -rf ".venv-torch-2.9.1"' EXIT""" in commands
    assert "s/^torch==.*/torch==2.9.1/" in commands
    assert commands.count("index-url") == 1
    kept = "\n".join(would_do("test-torch", "VERSION=2.9.1", "KEEP=1"))
    assert "trap '' EXIT" in kept
    assert "index-url" not in kept
