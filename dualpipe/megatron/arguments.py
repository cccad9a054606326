"""The command line flag, and the check that what else is set can be trained with it."""

from __future__ import annotations

import argparse
from typing import Any, TypeVar

from dualpipe.megatron.rules import SettingsError, violations

FLAG = "--use-dualpipe"
Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_dualpipe_args(parser: Parser) -> Parser:
    """Add ``--use-dualpipe`` to a parser, which is also returned, as Megatron-LM's ``extra_args_provider`` wants it.

    A parser that has the flag already, like FlagScale's, stays as it is.
    """
    if FLAG not in parser._option_string_actions:  # argparse offers no public way to ask
        parser.add_argument_group("dualpipe", "bidirectional pipeline").add_argument(
            FLAG,
            action="store_true",
            help="run the pipeline in both directions at once (DualPipe); each rank then holds two stages",
        )
    return parser


def validate_dualpipe_args(args: Any) -> None:
    """Raise unless DualPipe trains right with these arguments; without ``args.use_dualpipe`` nothing happens.

    Args:
        args: Megatron's arguments, a plain namespace, after Megatron's own ``validate_args`` (which computes
            ``data_parallel_size`` and the batch sizes).  They are read only.

    Raises:
        SettingsError: A ``RuleError`` that tells every broken rule, what came and what to set.
    """
    if getattr(args, "use_dualpipe", False):
        _raise_if_any(args)


def validate_dualpipe_config(config: Any, ddp_config: Any = None) -> None:
    """The same rules for the configs of a model about to be built with DualPipe.

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
