"""The data-parallel wrapper of a chunk, and the checks before and after it reduces a step's gradients.

The replicas of a stage train on different microbatches.  Only the reduction over both keeps them equal, and only
``config.finalize_model_grads_func`` starts it.  So a training step is refused if nothing would reduce its gradients,
and fails if nothing did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_dualpipe_config

_WHERE = "set it on get_model_config(model[0]), the config that the schedule reads, not on a copy of it"
_PER_CHUNK = ("no_sync_func", "grad_sync_func", "param_sync_func")


class StageDDP(DistributedDataParallel):  # type: ignore[misc] # Megatron has no types
    """Megatron's ``DistributedDataParallel`` with a count of its finished reductions.

    ``finished`` is called after each of them.
    """

    def __init__(self, config: Any, ddp_config: Any, module: nn.Module, **options: Any) -> None:
        super().__init__(config, ddp_config, module, **options)
        self.reductions = 0
        self.finished: Callable[[], None] = lambda: None
        self.per_token_loss = bool(config.calculate_per_token_loss)

    def finish_grad_sync(self, *args: Any, **options: Any) -> None:
        super().finish_grad_sync(*args, **options)
        self.reductions += 1
        self.finished()


def wrapper_of(module: nn.Module | None) -> StageDDP | None:
    """The ``StageDDP`` of a chunk, under any wrappers that the caller has added; ``None`` without one."""
    while module is not None and not isinstance(module, StageDDP):
        module = getattr(module, "module", None)
    return module


def require_trainable(model: Sequence[nn.Module], config: Any, optimizer: Any, schedule: str = "dualpipe") -> None:
    """Raise ``RuleError`` if a training step of ``schedule`` would give wrong results.  Sends no message.

    ``optimizer`` is the one that ``build_dualpipe_optimizer`` built over the chunks, or ``None``.  The settings are
    read at each step, since a program may change them after building.
    """
    wrappers = [wrapper for wrapper in map(wrapper_of, model) if wrapper is not None]
    if len(wrappers) < len(model):
        raise RuleError(
            "training needs the wrapper that build_dualpipe_model adds, which reduces over all replicas of a stage",
            "got a chunk without it",
            "leave wrap_with_ddp on, and add no DistributedDataParallel of your own",
        )
    if not callable(config.finalize_model_grads_func):
        raise RuleError(
            "finalize_model_grads_func reduces the gradients over the replicas of each stage, so training needs it",
            f"got {config.finalize_model_grads_func!r}",
            f"use megatron.core.distributed.finalize_model_grads, and {_WHERE}",
        )
    for name in _PER_CHUNK:
        _require_functions(name, getattr(config, name, None), len(model))
    for wrapper in wrappers:
        validate_dualpipe_config(config, wrapper.ddp_config, schedule)
        _require_settings(config, wrapper)
        _require_reduced(wrapper)
    if optimizer is None and any(wrapper.ddp_config.use_distributed_optimizer for wrapper in wrappers):
        raise RuleError(
            "the distributed optimizer shards each chunk over all replicas of its stage",
            "got a model without an optimizer from build_dualpipe_optimizer",
            "build it with that before the first step, instead of get_megatron_optimizer, and keep it",
        )
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if config.grad_scale_func is None and any(getattr(part, "grad_scaler", None) is not None for part in parts):
        raise RuleError(
            "an optimizer that divides gradients by its loss scale needs losses multiplied by it",
            "got no grad_scale_func",
            f"use optimizer.scale_loss, and {_WHERE}",
        )


def _require_functions(name: str, given: Any, chunks: int) -> None:
    if given is None or callable(given):
        return
    if not isinstance(given, (list, tuple)) or len(given) != chunks or not all(map(callable, given)):
        got = f"{len(given)} of {given!r}" if isinstance(given, (list, tuple)) else repr(given)
        raise RuleError(
            f"{name} must be None, one function, or a list of {chunks}, one for each chunk of the rank",
            f"got {got}",
            f"set [chunk.{'no_sync' if name == 'no_sync_func' else 'start_' + name.removesuffix('_func')} "
            "for chunk in model]",
        )


def _require_settings(config: Any, wrapper: StageDDP) -> None:
    if bool(config.calculate_per_token_loss) != wrapper.per_token_loss:
        raise RuleError(
            "calculate_per_token_loss must not change after the model was wrapped, as the wrapper averages gradients "
            "by it",
            f"it was {wrapper.per_token_loss} and is {config.calculate_per_token_loss}",
            "set it before building the model",
        )
    if config.grad_sync_func is not None and not wrapper.ddp_config.overlap_grad_reduce:
        raise RuleError(
            "gradients must be reduced once per step",
            "got grad_sync_func without overlap_grad_reduce, under which finalize_model_grads_func reduces them again",
            "leave grad_sync_func out, or set overlap_grad_reduce",
        )


def _require_reduced(wrapper: StageDDP) -> None:
    """Refuse trainable parameters that the wrapper does not reduce: added, replaced or unfrozen after wrapping."""
    known = wrapper.param_to_bucket_group
    missing = [name for name, p in wrapper.module.named_parameters() if p.requires_grad and p not in known]
    if missing:
        raise RuleError(
            "every trainable parameter must have been there and trainable when build_dualpipe_model wrapped the model",
            f"{missing[0]} did not" + f", nor did {len(missing) - 1} more" * (len(missing) > 1),
            "add, replace and unfreeze parameters in the model provider",
        )


@contextmanager
def reduced_once(model: Sequence[nn.Module], stages: Sequence[int]) -> Iterator[None]:
    """Raise ``RuleError`` at the end of the block unless the gradients of each chunk were reduced once within it."""
    wrappers = [wrapper for wrapper in map(wrapper_of, model) if wrapper is not None]
    before = [wrapper.reductions for wrapper in wrappers]
    yield
    for stage, wrapper, count in zip(stages, wrappers, before, strict=True):
        times = wrapper.reductions - count
        if times != 1:
            raise RuleError(
                "finalize_model_grads_func must reduce the gradients of each chunk once, by its finish_grad_sync()",
                f"those of stage {stage} were reduced {times} times, so its replicas "
                + ("have different gradients" if times == 0 else "have multiples of their gradients"),
                "use megatron.core.distributed.finalize_model_grads, or call it in your own function",
            )
