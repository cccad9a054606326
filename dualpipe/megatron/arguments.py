"""The command-line flag, and the check that DualPipe can train with the other settings."""

from __future__ import annotations

import argparse
from typing import Any, TypeVar

from dualpipe.megatron.rules import SettingsError, violations
from dualpipe.schedule.generate import LateW

FLAG, LATE_W = "--use-dualpipe", "--dualpipe-late-w"
Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_dualpipe_args(parser: Parser) -> Parser:
    """Add ``--use-dualpipe`` and ``--dualpipe-late-w`` to a parser and return it.

    Megatron-LM's ``extra_args_provider`` requires that.  A flag that the parser already has, as FlagScale's has the
    first, stays as it is.
    """
    group = parser.add_argument_group("dualpipe", "bidirectional pipeline")
    present = parser._option_string_actions  # argparse has no public way to ask
    if FLAG not in present:
        group.add_argument(
            FLAG,
            action="store_true",
            help="run the pipeline in both directions at once (DualPipe); each rank then holds two stages",
        )
    if LATE_W not in present:
        group.add_argument(
            LATE_W,
            choices=[each.value for each in LateW],
            default=LateW.none.value,
            help="with --use-dualpipe, run weight gradients after the messages of their backward, in the last phases "
            "(tail) or always (all); the gradients stay the same bit for bit",
        )
    return parser


def validate_dualpipe_args(args: Any) -> None:
    """Raise if DualPipe cannot train with these arguments; without ``args.use_dualpipe``, do nothing.

    Args:
        args: Megatron's arguments, a plain namespace, after Megatron's own ``validate_args`` (which computes
            ``data_parallel_size`` and the batch sizes).  It is not changed.

    Raises:
        SettingsError: A ``RuleError`` that lists every broken rule, the setting that breaks it and how to fix it.
    """
    if getattr(args, "use_dualpipe", False):
        _raise_if_any(args)


def validate_dualpipe_config(config: Any, ddp_config: Any = None) -> None:
    """Apply the same rules to the configs of a model that is about to be built with DualPipe.

    Args:
        config: A ``TransformerConfig``, or any object with its attributes.
        ddp_config: A ``DistributedDataParallelConfig`` likewise, or ``None`` without DDP.

    Raises:
        SettingsError: As ``validate_dualpipe_args`` does.
    """
    _raise_if_any(config, ddp_config)


def _raise_if_any(*settings: Any) -> None:
    found = violations(*settings)
    if found:
        raise SettingsError(found)
