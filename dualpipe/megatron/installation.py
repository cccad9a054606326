"""The choice between DualPipe and Megatron's own schedules, and its installation in a training loop.

A program of one's own asks ``get_forward_backward_func(config_or_args)``.  A training loop that imports Megatron's
selector by name (Megatron-LM, FlagScale) gets it by ``install()``: wherever a module holds one of the functions below,
it then holds a stand-in that asks for ``use_dualpipe`` on every call.

===========================================  =======================================================
function                                     in
===========================================  =======================================================
``get_forward_backward_func``                ``megatron.core.pipeline_parallel.schedules``
``get_megatron_optimizer``                   ``megatron.core.optimizer``
``get_model``                                ``megatron.training.training``, if it is imported
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
from dualpipe.megatron.training_loop import Function, Switch

_OWN_PACKAGE = "dualpipe."
_standing_in: list[tuple[Function, Function]] = []  # (Megatron's, ours): what is patched in this process
_source: Callable[[], Any] = lambda: None  # noqa: E731 - gives the arguments that hold the flag


def get_forward_backward_func(config_or_args: Any, *args: Any, **kwargs: Any) -> Function:
    """``forward_backward_dualpipe`` where ``config_or_args.use_dualpipe`` is set, else Megatron's own schedule.

    The rest is passed on to Megatron's selector, whose answer is returned as it is.
    """
    if getattr(config_or_args, "use_dualpipe", False):
        from dualpipe.megatron.schedule import forward_backward_dualpipe

        return forward_backward_dualpipe
    selected: Function = _megatrons_selector()(*args, **kwargs)
    return selected


def install(args: Any = None) -> None:
    """Put the stand-ins in place, in every module imported so far and in those imported later.

    Call it after importing the training loop and before it runs.  A second call replaces nothing twice; it covers what
    was imported in between and takes the new ``args``.

    Args:
        args: The arguments whose ``use_dualpipe`` decides.  ``None`` stands for Megatron-LM's global arguments, which
            exist once the program has parsed its command line.
    """
    global _source
    _source = _global_args if args is None else lambda: args
    importlib.import_module("dualpipe.megatron.optimizer")  # holds Megatron's function before it is replaced
    known = {id(own) for own, _ in _standing_in} | {id(ours) for _, ours in _standing_in}
    for module, name, stand_in in _REPLACED:
        own = getattr(sys.modules.get(module), name, None)
        if own is not None and id(own) not in known:
            _standing_in.append((own, stand_in(own, _switch)))
    _swap(_standing_in)


def uninstall() -> None:
    """Put Megatron's own functions back wherever a stand-in is held."""
    global _source
    _swap([(ours, own) for own, ours in _standing_in])
    _standing_in.clear()
    _source = lambda: None  # noqa: E731


@contextmanager
def installed(args: Any = None) -> Iterator[None]:
    """``install(args)`` at the start of a block, ``uninstall()`` at its end."""
    install(args)
    try:
        yield
    finally:
        uninstall()


def _switch() -> Any:
    args = _source()
    return args if getattr(args, "use_dualpipe", False) else None


def _global_args() -> Any:
    """Megatron-LM's arguments, or ``None`` as long as there are none."""
    variables = sys.modules.get("megatron.training.global_vars")
    if variables is None:
        return None
    try:
        return variables.get_args()
    except AssertionError:  # how Megatron-LM says that they are not set
        return None


def _selector(own: Function, switch: Switch) -> Function:
    @functools.wraps(own)
    def chosen(*args: Any, **kwargs: Any) -> Function:
        config_or_args = switch()
        if config_or_args is None:
            selected: Function = own(*args, **kwargs)
            return selected
        return get_forward_backward_func(config_or_args)

    return chosen


def _megatrons_selector() -> Function:
    from megatron.core.pipeline_parallel import schedules

    current: Function = schedules.get_forward_backward_func
    return next((own for own, ours in _standing_in if ours is current), current)


def _swap(pairs: Sequence[tuple[Function, Function]]) -> None:
    """Let every module outside this package that holds the first of a pair, under whatever name, hold the second."""
    replacement = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and not name.startswith(_OWN_PACKAGE):
            for attribute, value in list(vars(module).items()):
                if id(value) in replacement:
                    setattr(module, attribute, replacement[id(value)])


_REPLACED: tuple[tuple[str, str, Callable[[Function, Switch], Function]], ...] = (
    ("megatron.core.pipeline_parallel.schedules", "get_forward_backward_func", _selector),
    ("megatron.core.optimizer", "get_megatron_optimizer", training_loop.get_megatron_optimizer),
    ("megatron.training.training", "get_model", training_loop.get_model),
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
