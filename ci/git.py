"""Runs git in a work tree, even if the environment names another repository."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ci import GateError

LIMIT_S = 120.0
REPOSITORY_VARIABLES = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_NAMESPACE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
)
"""The variables that git sets for its hooks.  In a scratch clone they would lead back to the hook's own repository."""


def environment() -> dict[str, str]:
    """The environment without the variables that bind git to one repository."""
    return {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES}


def git(root: Path, *arguments: str, may_fail: bool = False) -> bytes:
    """The output of git in ``root``.  Raises ``GateError`` if git fails, unless ``may_fail``."""
    command = ["git", *arguments]
    process = subprocess.run(command, cwd=root, capture_output=True, timeout=LIMIT_S, env=environment(), check=False)
    if process.returncode and not may_fail:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        raise GateError(
            "the gate needs a git work tree",
            f"git {arguments[0]} in {root} says: {lines[0] if lines else 'nothing'}",
            "run it from the repository's root",
        )
    return process.stdout
