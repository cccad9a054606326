"""What breaks a rule for settings: functions that read settings by name and describe the one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], "str | None"]
"""Describes the setting that breaks a rule, or returns ``None``."""


class Settings:
    """Several objects read as one: an attribute is that of the first object that has it, else ``None``."""

    def __init__(self, *objects: object | None) -> None:
        self._objects = [each for each in objects if each is not None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((getattr(each, name) for each in self._objects if hasattr(each, name)), None)


def first(wrong: Callable[[Any], bool], *names: str) -> Check:
    """The first of these settings whose value is wrong, with its value."""

    def describe(settings: Any) -> str | None:
        values = ((name, getattr(settings, name)) for name in names)
        return next((f"{name} is {value!r}" for name, value in values if wrong(value)), None)

    return describe


def is_set(*names: str) -> Check:
    return first(bool, *names)


def is_given(*names: str) -> Check:
    """Not ``None``; 0 counts as given."""
    return first(lambda value: value is not None, *names)


def is_above_one(*names: str) -> Check:
    return first(lambda value: (value or 1) > 1, *names)


def is_other_than(name: str, *allowed: object) -> Check:
    return first(lambda value: value is not None and value not in allowed, name)


def has_any(name: str, *words: str) -> Check:
    """One of these words, or a list with one of them."""
    return first(lambda value: not {*words}.isdisjoint([value] if isinstance(value, str) else value or ()), name)


def either(*checks: Check) -> Check:
    return lambda settings: next(filter(None, (check(settings) for check in checks)), None)


def odd_pipeline(settings: Any) -> str | None:
    size = int(settings.pipeline_model_parallel_size or 1)
    return None if size > 1 and size % 2 == 0 else f"pipeline_model_parallel_size is {size}"


def virtual_pipeline(settings: Any) -> str | None:
    """Megatron's parser counts a layout with two parts for each rank, as DualPipeV has, as a virtual pipeline of 2."""
    layout = settings.pipeline_model_parallel_layout
    counted = settings.use_dualpipev and not settings.use_dualpipe and layout is not None
    given = is_given("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage")(settings)
    if counted and settings.num_layers_per_virtual_pipeline_stage is None:
        given = is_other_than("virtual_pipeline_model_parallel_size", 2)(settings)
    return given or is_above_one("num_virtual_stages_per_pipeline_rank")(settings)


def fp8_history(settings: Any) -> str | None:
    delayed = settings.fp8 and settings.fp8_recipe in (None, "delayed")
    return f"fp8 is {settings.fp8!r} with fp8_recipe {settings.fp8_recipe!r}" if delayed else None


def checkpoint_format(settings: Any) -> str | None:
    writes = settings.save or settings.load or settings.pretrained_checkpoint
    return is_other_than("ckpt_format", "torch_dist")(settings) if writes else None


def clips_shards(settings: Any) -> str | None:
    return is_set("qk_clip")(settings) if settings.use_distributed_optimizer else None


def mtp_before_last_stage(settings: Any) -> str | None:
    layout = settings.pipeline_model_parallel_layout
    if layout is None:
        return None
    text = str(layout)
    return f"pipeline_model_parallel_layout is {text!r}" if "m" in text.rpartition("|")[0] else None


def ties_and_predicts(*names: str) -> Check:
    """One of these settings is used with tied embeddings and multi-token prediction together."""

    def describe(settings: Any) -> str | None:
        tied = settings.untie_embeddings_and_output_weights is False or settings.share_embeddings_and_output_weights
        return is_set(*names)(settings) if tied and settings.mtp_num_layers else None

    return describe
