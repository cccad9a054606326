"""Runs git in a work tree, even if the environment names another repository."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
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
"""What git sets for its hooks.  In a scratch clone these would lead back to the repository of the hook."""


def environment() -> dict[str, str]:
    """The environment without the variables that bind git to one repository."""
    return {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES}


def git(root: Path, *arguments: str, may_fail: bool = False, more: Mapping[str, str] | None = None) -> bytes:
    """The output of git in ``root``; with ``may_fail`` also if it fails.  Raises ``GateError``."""
    command = ["git", *arguments]
    variables = environment() | dict(more or {})
    process = subprocess.run(command, cwd=root, capture_output=True, timeout=LIMIT_S, env=variables, check=False)
    if process.returncode and not may_fail:
        said = process.stderr.decode(errors="replace").strip().splitlines()
        raise GateError(
            "the gate needs a git work tree",
            f"git {arguments[0]} in {root} says: {said[0] if said else 'nothing'}",
            "run it from the repository's root",
        )
    return process.stdout
