"""Protects the command line's imports: the user's files cannot replace its own or installed packages.

Python puts the current directory (``python -m``) and ``PYTHONPATH`` before everything else, so that a user's
``json.py``, ``torch.py`` or ``reference.py`` would replace a module that a verdict depends on.  This module sorts the
import path into three parts, each of which keeps its order::

    standard library | folders with installed distributions (``*.dist-info``) | everything else

It also makes ``dualpipe``, ``proofs`` and ``reference`` load from one folder, that of the running ``dualpipe``.

``dualpipe`` imports this module before any other, so it imports only modules that Python has frozen or already loaded.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds this distribution's packages."""
_OWN = frozenset({"dualpipe", "proofs", "reference"})
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))
_ZIP = "python{}{}.zip".format(*sys.version_info[:2])


def ordered(path: list[str]) -> list[str]:
    """The import path in the order given above."""
    return sorted(path, key=_part)


def own_path(path: list[str]) -> list[str]:
    """The import path with the standard library and this distribution in front, for a process that needs only these."""
    library = [folder for folder in ordered(path) if _part(folder) == 0]
    return [*library, ROOT, *ordered(path)[len(library) :]]


def is_installed(file: str) -> bool:
    """Whether a source file belongs to the standard library, an installed package or this distribution.

    So does code without a file, such as ``<string>``.
    """
    parts = os.path.dirname(os.path.abspath(file)).split(os.sep)
    own = any(file.startswith(os.path.join(ROOT, name) + os.sep) for name in _OWN)
    return file.startswith(("<", _LIBRARY + os.sep)) or "site-packages" in parts or "dist-packages" in parts or own


def _part(folder: str) -> int:
    if os.path.basename(folder) == _ZIP or os.path.abspath(folder) in (_LIBRARY, os.path.join(_LIBRARY, "lib-dynload")):
        return 0
    try:
        return 1 if any(name.endswith(".dist-info") for name in os.listdir(folder or ".")) else 2
    except OSError:
        return 2


class _Own:
    """A finder for ``sys.meta_path`` that looks for this distribution's packages only in ``ROOT``."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        """The spec of one of this distribution's packages, ``None`` for every other module."""
        if path is not None or name not in _OWN:
            return None
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [ROOT])


def is_command(original: list[str], arguments: list[str]) -> bool:
    """Whether a process with this ``sys.orig_argv`` and ``sys.argv`` runs the command line, as a script or with ``-m``.

    ``sys.argv`` begins with ``-m`` while Python looks for the module to run, which is when it imports ``dualpipe``.
    """
    if arguments[:1] != ["-m"]:
        return [os.path.basename(word) for word in original[1:2]] == ["dualpipe"]
    word = original[len(original) - len(arguments)]  # the word before the module's own arguments: its name, or -mNAME
    return (word.partition("m")[2] if word.startswith("-") else word) in ("dualpipe", "dualpipe.cli")


class OwnFirst:
    """A context in which imports follow the order above; at its end the import path is restored."""

    def __enter__(self) -> None:
        self._before = sys.path[:]
        sys.path[:] = ordered(sys.path)
        sys.meta_path.insert(0, _Own)  # type: ignore[arg-type] # a class with find_spec is a finder

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(_Own)  # type: ignore[arg-type]
        sys.path[:] = self._before


if is_command(sys.orig_argv, sys.argv):
    sys.path[:] = ordered(sys.path)
