"""Which modules the command line gets: its own packages and installed ones, before files of the user's with such names.

Python puts the current directory (``python -m``) and ``PYTHONPATH`` before everything else, so that a user's
``json.py``, ``torch.py`` or ``reference.py`` would be imported in place of what a verdict depends on.  Here the import
path is put into this order, each part in the order it had::

    standard library | folders with installed distributions (``*.dist-info``) | everything else

and ``dualpipe``, ``proofs`` and ``reference`` come from one folder, that of the ``dualpipe`` which runs.

``dualpipe`` imports this module first of all, so it imports nothing itself that Python has not frozen or loaded.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of the packages of this distribution."""
_OWN = frozenset({"dualpipe", "proofs", "reference"})
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))
_ZIP = "python{}{}.zip".format(*sys.version_info[:2])


def ordered(path: list[str]) -> list[str]:
    """An import path in the order given above."""
    return sorted(path, key=_part)


def own_path(path: list[str]) -> list[str]:
    """The import path of a process that needs this distribution and the standard library."""
    library = [folder for folder in ordered(path) if _part(folder) == 0]
    return [*library, ROOT, *ordered(path)[len(library) :]]


def is_installed(file: str) -> bool:
    """Whether a source file is of the standard library, an installed package or this distribution, or of no file."""
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
    """A finder for ``sys.meta_path``: this distribution's packages from ``ROOT`` alone."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        """The spec of one of the own packages, found as usual but in ``ROOT``; ``None`` for every other module."""
        if path is not None or name not in _OWN:
            return None
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [ROOT])


def is_command(arguments: list[str]) -> bool:
    """Whether a process with these arguments, Python's own included, is the command line: its script or ``-m``."""
    modules = [arguments[at + 1 : at + 2] for at, word in enumerate(arguments) if word == "-m"]
    script = [os.path.basename(word) for word in arguments[1:2]]
    return ["dualpipe.cli"] in modules or "-mdualpipe.cli" in arguments or script == ["dualpipe"]


class OwnFirst:
    """A context in which imports follow the order above; the import path is restored afterwards."""

    def __enter__(self) -> None:
        self._before = sys.path[:]
        sys.path[:] = ordered(sys.path)
        sys.meta_path.insert(0, _Own)  # type: ignore[arg-type] # a class with find_spec is a finder

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(_Own)  # type: ignore[arg-type]
        sys.path[:] = self._before


if is_command(sys.orig_argv):
    sys.path[:] = ordered(sys.path)
