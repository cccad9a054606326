"""Selects DualPipe or one of Megatron's own schedules, and installs the choice in a training loop.

Your own training script calls ``get_forward_backward_func(config_or_args)``.  For a training loop that imports
Megatron's selector by name (Megatron-LM, FlagScale), ``install()`` replaces each of the functions below with a stand-in
that reads ``use_dualpipe`` and ``use_dualpipev`` on every call, in every module that holds the function.

===========================================  =======================================================
function                                     in
===========================================  =======================================================
``get_forward_backward_func``                ``megatron.core.pipeline_parallel.schedules``
``get_megatron_optimizer``                   ``megatron.core.optimizer``
``get_model``                                ``megatron.training.training``, if it is imported
``get_model``                                ``flagscale.train.train``, if it is imported
``unimodal_build_distributed_models``        ``megatron.training.models.dist_utils``, if it is imported
``_build_sharded_state_dict_metadata``       ``megatron.training.checkpointing``, if it is imported
``load_checkpoint``, ``save_checkpoint``     ``megatron.training.checkpointing``, if it is imported
===========================================  =======================================================
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from dualpipe.megatron import training_loop
from dualpipe.megatron.placement import schedule_of
from dualpipe.megatron.training_loop import Function, StandIn, Switch
from dualpipe.schedule.generate import LateW

_OWN_PACKAGE = "dualpipe."
_installed: list[tuple[Function, Function]] = []  # Megatron's functions with their stand-ins, in this process
_source: Callable[[], Any] = lambda: None  # noqa: E731 - returns the arguments that have the flag


def get_forward_backward_func(config_or_args: Any, *args: Any, **kwargs: Any) -> Function:
    """``forward_backward_dualpipe`` if ``use_dualpipe`` or ``use_dualpipev`` is set, else Megatron's own schedule.

    If set, ``config_or_args.dualpipe_late_w`` and ``.dualpipe_overlap_moe`` are passed to ``forward_backward_dualpipe``
    as ``late_w`` and ``overlap_moe``.  The other arguments are for Megatron's selector, which is called without either
    flag and whose result is returned unchanged.
    """
    if schedule_of(config_or_args) is not None:
        from dualpipe.megatron.schedule import forward_backward_dualpipe

        late_w = getattr(config_or_args, "dualpipe_late_w", None) or LateW.none
        options: dict[str, Any] = {} if late_w == LateW.none else {"late_w": late_w}
        if getattr(config_or_args, "dualpipe_overlap_moe", False):
            options["overlap_moe"] = True
        return functools.partial(forward_backward_dualpipe, **options) if options else forward_backward_dualpipe
    selected: Function = _original_selector()(*args, **kwargs)
    return selected


def install(args: Any = None) -> None:
    """Replace Megatron's functions by stand-ins in every module imported so far.

    Call it after importing the training loop and before running it.  A module that later imports one of the replaced
    functions by name gets the stand-in.  A function whose own module is imported later, such as FlagScale's
    ``get_model``, needs a second call.  That call also takes the new ``args``; nothing is replaced twice.

    Args:
        args: The arguments whose ``use_dualpipe`` or ``use_dualpipev`` decides.  ``None`` means Megatron-LM's global
            arguments, which exist once the program has parsed its command line.
    """
    global _source
    _source = _global_args if args is None else lambda: args
    importlib.import_module("dualpipe.megatron.optimizer")  # it must import Megatron's function, not the stand-in
    known = {id(function) for pair in _installed for function in pair}
    for module, name, make in _REPLACED:
        original = getattr(sys.modules.get(module), name, None)
        if original is not None and id(original) not in known:
            _installed.append((original, make(original, _switch)))
    replace_everywhere(_installed)


def uninstall() -> None:
    """Put Megatron's own functions back in every module that holds a stand-in."""
    global _source
    replace_everywhere([(ours, original) for original, ours in _installed])
    _installed.clear()
    _source = lambda: None  # noqa: E731


@contextmanager
def installed(args: Any = None) -> Iterator[None]:
    """Call ``install(args)`` at the start of a block and ``uninstall()`` at its end."""
    install(args)
    try:
        yield
    finally:
        uninstall()


def _switch() -> Any:
    args = _source()
    return args if schedule_of(args) is not None else None


def _global_args() -> Any:
    """Megatron-LM's arguments, or ``None`` if they are not parsed yet."""
    variables = sys.modules.get("megatron.training.global_vars")
    if variables is None:
        return None
    try:
        return variables.get_args()
    except AssertionError:  # Megatron-LM's error if they are not set
        return None


def _selector(original: Function, switch: Switch) -> Function:
    @functools.wraps(original)
    def switched(*args: Any, **kwargs: Any) -> Any:
        on = switch()
        return original(*args, **kwargs) if on is None else get_forward_backward_func(on)

    return switched


def _original_selector() -> Function:
    from megatron.core.pipeline_parallel import schedules

    current: Function = schedules.get_forward_backward_func
    return next((original for original, ours in _installed if ours is current), current)


def replace_everywhere(pairs: Sequence[tuple[Function, Function]]) -> None:
    """In every module outside this package, replace the first of each pair by the second, under whatever name."""
    replacement = {id(old): new for old, new in pairs}
    if not replacement:  # so that thousands of modules are not searched in vain
        return
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and not name.startswith(_OWN_PACKAGE):
            for attribute, value in list(vars(module).items()):
                if id(value) in replacement:
                    setattr(module, attribute, replacement[id(value)])


_REPLACED: tuple[tuple[str, str, StandIn], ...] = (
    ("megatron.core.pipeline_parallel.schedules", "get_forward_backward_func", _selector),
    ("megatron.core.optimizer", "get_megatron_optimizer", training_loop.get_megatron_optimizer),
    ("megatron.training.training", "get_model", training_loop.get_model),
    ("flagscale.train.train", "get_model", training_loop.get_flagscale_model),
    (
        "megatron.training.models.dist_utils",
        "unimodal_build_distributed_models",
        training_loop.build_distributed_models,
    ),
    (
        "megatron.training.checkpointing",
        "_build_sharded_state_dict_metadata",
        training_loop.sharded_state_dict_metadata,
    ),
    ("megatron.training.checkpointing", "load_checkpoint", training_loop.load_checkpoint),
    ("megatron.training.checkpointing", "save_checkpoint", training_loop.save_checkpoint),
)
