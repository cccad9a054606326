"""The command-line flag, and the check that DualPipe can train with the other settings."""

from __future__ import annotations

import argparse
import logging
from typing import Any, TypeVar

from dualpipe.megatron.checks import Settings
from dualpipe.megatron.overlap_rules import OVERLAP_RULES
from dualpipe.megatron.placement import Schedules, schedule_of
from dualpipe.megatron.rules import refused_upstream, violations
from dualpipe.megatron.violations import SettingsError, Violation, broken
from dualpipe.schedule.generate import LateW

logger = logging.getLogger(__name__)

FLAG, FLAG_V, LATE_W = "--use-dualpipe", "--use-dualpipev", "--dualpipe-late-w"
OVERLAP_MOE = "--dualpipe-overlap-moe"
Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_dualpipe_args(parser: Parser) -> Parser:
    """Add ``--use-dualpipe``, ``--use-dualpipev`` and the flags for them to a parser and return it.

    Megatron-LM's ``extra_args_provider`` must return the parser.  If the parser already has one of the flags, as
    FlagScale's may, that flag is left unchanged.
    """
    group = parser.add_argument_group("dualpipe", "bidirectional pipeline")
    present = parser._option_string_actions  # argparse has no public way to ask
    if FLAG not in present:
        group.add_argument(
            FLAG,
            action="store_true",
            help="run the pipeline in both directions at once (DualPipe); each rank then holds two stages",
        )
    if FLAG_V not in present:
        group.add_argument(
            FLAG_V,
            action="store_true",
            help="run the pipeline as a V (DualPipeV): each rank holds one stage of each half, and each stage once",
        )
    if LATE_W not in present:
        group.add_argument(
            LATE_W,
            choices=[each.value for each in LateW],
            default=LateW.none.value,
            help="with one of these flags, run weight gradients after the messages of their backward, in the last "
            "phases (tail) or always (all); the gradients stay the same bit for bit",
        )
    if OVERLAP_MOE not in present:
        group.add_argument(
            OVERLAP_MOE,
            action="store_true",
            help="with one of these flags, run each F&B pair of the schedule through Megatron's plan, which overlaps "
            "the all-to-all of experts in one with the computation of the other; the gradients stay the same",
        )
    return parser


def validate_dualpipe_args(args: Any) -> None:
    """Raise if the schedule cannot train with these arguments; without a flag that selects one, do nothing.

    Args:
        args: Megatron's arguments, a plain namespace, after Megatron's own ``validate_args`` (which computes
            ``data_parallel_size`` and the batch sizes).  It is not changed.  Settings that the upstream pull request
            refuses, and that are trained exactly here, are logged as warnings.

    Raises:
        SettingsError: A ``RuleError`` that lists every broken rule, the setting that breaks it and how to fix it.
    """
    schedule = schedule_of(args)
    if schedule is not None:
        overlap = OVERLAP_RULES if getattr(args, "dualpipe_overlap_moe", False) else ()
        _raise_if_any(schedule, args, more=broken(overlap, Settings(args)))
        for each in refused_upstream(args):
            logger.warning("dualpipe: %s", each)


def validate_dualpipe_config(config: Any, ddp_config: Any = None, schedule: str = "dualpipe") -> None:
    """Apply the same rules to the configs of a model that is about to be built with DualPipe.

    Args:
        config: A ``TransformerConfig``, or any object with its attributes.
        ddp_config: A ``DistributedDataParallelConfig`` likewise, or ``None`` without DDP.
        schedule: ``"dualpipe"`` or ``"dualpipev"``.

    Raises:
        SettingsError: As ``validate_dualpipe_args`` does.
    """
    _raise_if_any(schedule, config, ddp_config)


def validate_overlap(config: Any) -> None:
    """Raise ``SettingsError`` if the F&B pairs of a model with this config cannot overlap."""
    found = broken(OVERLAP_RULES, Settings(config))
    if found:
        raise SettingsError(found, OVERLAP_MOE)


def _raise_if_any(schedule: str, *settings: Any, more: tuple[Violation, ...] = ()) -> None:
    found = violations(*settings, schedule=schedule) + more
    if found:
        raise SettingsError(found, FLAG_V if schedule == Schedules.DUALPIPEV else FLAG)
