"""Runs an unchanged training script of Megatron-LM with DualPipe's flags.

    torchrun --nproc-per-node 8 -m dualpipe.megatron.launch pretrain_gpt.py --use-dualpipe ...

The script's command line gets the options of ``add_dualpipe_args`` beside its own, and the functions of Megatron that
``dualpipe.megatron.install`` names are replaced by stand-ins.  Without ``--use-dualpipe`` or ``--use-dualpipev`` the
script runs as it is.
"""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualpipe.errors import RuleError

_LOOP = ("megatron.training.arguments", "megatron.training.training", "megatron.training.checkpointing")
_USAGE = "python -m dualpipe.megatron.launch SCRIPT [OPTIONS OF THE SCRIPT]"


def prepare(script: str, options: Sequence[str]) -> Path:
    """Install DualPipe for a script that is about to run as the main program with these options; returns its path.

    Raises ``RuleError`` if there is no such file, or if ``megatron.training`` cannot be imported from its folder.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise RuleError("the script must be a file", f"got {script}", f"use {_USAGE}")
    sys.argv = [script, *options]
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    _import_loop(path)
    from dualpipe.megatron.installation import install, replace_everywhere

    original = sys.modules[_LOOP[0]].parse_args
    replace_everywhere([(original, with_dualpipe_args(original))])
    install()
    return path


def _import_loop(path: Path) -> None:
    """Import the training loop first, since only functions that exist can be replaced."""
    for name in _LOOP:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuleError(
                "the script must be one of Megatron-LM's, whose folder has the package megatron.training",
                f"importing {name} for {path} fails: {error}",
                f"install {error.name}"
                if error.name and not error.name.startswith("megatron")
                else "use a script in a clone of Megatron-LM, or add the clone to PYTHONPATH",
            ) from error


def with_dualpipe_args(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-LM's ``parse_args`` with DualPipe's options beside those that the script adds itself."""

    @functools.wraps(parse_args)
    def parse(extra_args_provider: Callable[[Any], Any] | None = None, *args: Any, **options: Any) -> Any:
        from dualpipe.megatron.arguments import add_dualpipe_args

        def both(parser: Any) -> Any:
            return add_dualpipe_args(parser if extra_args_provider is None else extra_args_provider(parser))

        return parse_args(both, *args, **options)

    return parse


def main(arguments: Sequence[str]) -> int:
    """Run the script; an error in the command line is printed, with exit code 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\n{__doc__}")
        return 0 if arguments else 2
    try:
        path = prepare(arguments[0], arguments[1:])
    except RuleError as error:
        print(f"dualpipe: {error}", file=sys.stderr)
        return 2
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
