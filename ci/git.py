"""Runs git in a work tree, whatever the environment or the user's settings say of another one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ci.errors import GateError

LIMIT_S = 120.0
PLACES = (
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
"""What git tells its hooks of their repository; in a scratch clone it would lead back to that one."""


def anywhere() -> dict[str, str]:
    """The environment without what binds git to one repository."""
    return {name: value for name, value in os.environ.items() if name not in PLACES}


def git(root: Path, *arguments: str, may_fail: bool = False, more: Mapping[str, str] | None = None) -> bytes:
    """What git prints in ``root``; with ``may_fail`` also where it fails.  Raises ``GateError``."""
    command = ["git", *arguments]
    environment = anywhere() | dict(more or {})
    process = subprocess.run(command, cwd=root, capture_output=True, timeout=LIMIT_S, env=environment, check=False)
    if process.returncode and not may_fail:
        said = process.stderr.decode(errors="replace").strip().splitlines()
        raise GateError(
            "the gate looks at a git work tree",
            f"git {arguments[0]} in {root} says: {said[0] if said else 'nothing'}",
            "run it from the repository's root",
        )
    return process.stdout
