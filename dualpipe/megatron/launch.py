"""Runs an unchanged training script of Megatron-LM with DualPipe's flags.

    torchrun --nproc-per-node 8 -m dualpipe.megatron.launch pretrain_gpt.py --use-dualpipe ...
    torchrun --nproc-per-node 8 -m dualpipe.megatron.launch --on-cpu pretrain_gpt.py --use-dualpipe ...

The second command rehearses the job on CPUs over gloo, as a small model allows (``dualpipe.megatron.on_cpu``).

The script accepts the options of ``add_dualpipe_args`` in addition to its own, and ``dualpipe.megatron.install``
replaces Megatron's functions by stand-ins.  Without ``--use-dualpipe`` or ``--use-dualpipev`` the script runs as if it
were started directly.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualpipe.errors import RuleError

_LOOP = ("megatron.training.arguments", "megatron.training.training", "megatron.training.checkpointing")
_FLAGSCALE = "flagscale.train.train"
_IMPORTS_FLAGSCALE = re.compile(r"^\s*(from|import)\s+flagscale\b", re.MULTILINE)
_INITIALIZE = "megatron.training.initialize"
_ON_CPU = "--on-cpu"
_USAGE = f"python -m dualpipe.megatron.launch [{_ON_CPU}] SCRIPT [OPTIONS OF THE SCRIPT]"


def prepare(script: str, options: Sequence[str], *, on_cpu: bool = False) -> Path:
    """Install DualPipe for a script that is about to run as the main program with these options; returns its path.

    With ``on_cpu``, also install the stand-ins for the GPU.

    Raises ``RuleError`` if there is no such file, or if ``megatron.training`` cannot be imported from its folder.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise RuleError("the script must be a file", f"got {script}", f"use {_USAGE}")
    sys.argv = [script, *options]
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU
        from dualpipe.megatron.on_cpu.loop import install_loop_standins

        install_loop_standins()
    _import_loop(path)
    from dualpipe.megatron.installation import install, replace_everywhere

    original = sys.modules[_LOOP[0]].parse_args
    replace_everywhere([(original, with_dualpipe_args(original, on_cpu=on_cpu))])
    if on_cpu:
        from dualpipe.megatron.on_cpu.loop import adapt_loop

        adapt_loop(importlib.import_module(_INITIALIZE), replace_everywhere)
    install()
    return path


def _import_loop(path: Path) -> None:
    """Import the training loop first, since only functions that exist can be replaced."""
    own = (_FLAGSCALE,) if _IMPORTS_FLAGSCALE.search(path.read_text(encoding="utf-8")) else ()
    for name in (*_LOOP, *own):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuleError(
                "the script must be one of Megatron-LM's, whose folder has the package megatron.training",
                f"importing {name} for {path} fails: {error}",
                _fix(error.name),
            ) from error


def _fix(missing: str | None) -> str:
    """What to do if something in this module cannot be imported."""
    if missing is None or missing.startswith("megatron"):
        return "use a script in a clone of Megatron-LM, or add the clone to PYTHONPATH"
    if missing in sys.stdlib_module_names:
        return f"use the version of Python that this Megatron-LM needs: this is {sys.version.partition(' ')[0]}"
    return f"install {missing}"


def with_dualpipe_args(parse_args: Callable[..., Any], *, on_cpu: bool = False) -> Callable[..., Any]:
    """Megatron-LM's ``parse_args`` with DualPipe's options in addition to those that the script adds itself.

    With ``on_cpu``, options that need a GPU get the values that a CPU needs.
    """

    @functools.wraps(parse_args)
    def parse(extra_args_provider: Callable[[Any], Any] | None = None, *args: Any, **options: Any) -> Any:
        from dualpipe.megatron.arguments import add_dualpipe_args

        def both(parser: Any) -> Any:
            return add_dualpipe_args(parser if extra_args_provider is None else extra_args_provider(parser))

        parsed = parse_args(both, *args, **options)
        if on_cpu:
            from dualpipe.megatron.on_cpu.loop import with_cpu_arguments

            return with_cpu_arguments(parsed)
        return parsed

    return parse


def main(arguments: Sequence[str]) -> int:
    """Run the script; an error in the command line is printed, with exit code 2."""
    on_cpu = _ON_CPU in arguments
    arguments = [each for each in arguments if each != _ON_CPU]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\n{__doc__}")
        return 0 if arguments else 2
    try:
        path = prepare(arguments[0], arguments[1:], on_cpu=on_cpu)
    except RuleError as error:
        print(f"dualpipe: {error}", file=sys.stderr)
        return 2
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
