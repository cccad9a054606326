"""The public names of DeepSeek's package on our interpreter, so that programs written for it run here unchanged.

The interface is that of https://github.com/deepseek-ai/DualPipe: ``DualPipe``, ``DualPipeV``, ``WeightGradStore``,
``set_p2p_tensor_shapes`` and ``set_p2p_tensor_dtype``.  It keeps module-wide state because theirs does; new programs
use ``dualpipe.pipeline``.  ``late_w`` is added here; it is that of ``dualpipe.dualpipe``.

As in DeepSeek's package, ``step`` does not sum the gradients of a stage's two replicas.  The backward of stock
``nn.Linear`` layers is split into B and W without changing the model.  If the modules' class has
``overlapped_forward_backward``, that method runs the F&B pairs (``dualpipe.runtime.overlap``); otherwise F runs, and
then B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.errors import RuleError, StageError
from dualpipe.pipeline import Pipeline
from dualpipe.runtime.modules import Criterion, Feed, StepResult
from dualpipe.runtime.overlap import method_of
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import TensorSpec
from dualpipe.runtime.weightgrad import DeferredGradients, WeightGradError
from dualpipe.schedule import DOWN, UP, Lane
from dualpipe.schedule.generate import generate, with_late_w

_shapes: list[tuple[int, ...]] | None = None
_dtype: torch.dtype | None = None
_active: DeferredGradients | None = None


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """Set the shapes of the tensors that go from a stage to the next, for all pipelines built from now on."""
    global _shapes
    rule, fix = "the shapes of messages must be a sequence of shapes", "write [(2, 3)] for one tensor of 2 by 3"
    try:
        _shapes = [tuple(index(size) for size in shape) for shape in shapes]
    except TypeError as error:
        raise RuleError(rule, f"got {shapes!r}", fix) from error


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Set the dtype of the tensors that go from a stage to the next, for all pipelines built from now on."""
    global _dtype
    _dtype = dtype


class _Enabled(type):
    @property
    def enabled(cls) -> bool:
        """Whether a backward is running whose weight gradients are deferred to W."""
        return _active is not None and _active.key is not None


class WeightGradStore(metaclass=_Enabled):
    """Defers the weight gradient of a custom layer: ``if WeightGradStore.enabled: WeightGradStore.put(f)``."""

    @classmethod
    def put(cls, func: Callable[[], None]) -> None:
        """Defer ``func`` to the W of the microbatch whose backward is running."""
        if _active is None or _active.key is None:
            raise WeightGradError("put() is for a backward that is split: check WeightGradStore.enabled first")
        _active.put(func)


def run_backward(tensors: Sequence[Tensor], grad_tensors: Sequence[Tensor]) -> None:
    """Autograd's backward from ``tensors``."""
    torch.autograd.backward(list(tensors), list(grad_tensors))


class _Stepper(nn.Module, ABC):
    """The common base of ``DualPipe`` and ``DualPipeV``: two modules, one process group, ``step``."""

    name: str
    lanes: tuple[Lane, ...]

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        late_w: str = "none",
    ) -> None:
        super().__init__()
        if len(modules) != 2:
            raise RuleError("a rank holds two modules", f"got {len(modules)}", "give one for each of its two stages")
        if rank_mapping is not None and sorted(rank_mapping) != list(range(len(rank_mapping))):
            raise RuleError(
                "rank_mapping must name each pipeline rank once", f"got {list(rank_mapping)}", "give a permutation"
            )
        self.module = nn.ModuleList(modules)
        self.batch_dim = batch_dim
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        order = None if rank_mapping is None else [rank_mapping.index(r) for r in range(len(rank_mapping))]
        self.overlapped_forward_backward = self.overlaped_forward_backward = (
            type(self.module[0]) is type(self.module[1]) and method_of(self.module[0]) is not None
        )
        self._transport = ProcessGroupTransport(process_group, order, device)
        self._pipelines: dict[int, Pipeline] = {}
        self._schedule = with_late_w(self.name, late_w)

    @abstractmethod
    def held(self) -> dict[tuple[Lane, int], nn.Module]:
        """The module of each lane and stage that this rank holds."""

    def step(
        self,
        *inputs: Tensor | None,
        num_chunks: int = 0,
        criterion: Criterion | None = None,
        labels: Tensor | Sequence[Tensor | None] = (),
        return_outputs: bool = False,
    ) -> tuple[Tensor | None, Any]:
        """Run a training step, or under ``torch.no_grad()`` an evaluation.

        ``inputs`` and ``labels`` are cut into microbatches along ``batch_dim``; only ranks at an end of the pipeline
        need them.  The module and the criterion get a ``None`` among them as it is, and without labels the criterion
        gets the outputs alone.  Returns the losses ``[microbatches]`` and the outputs where a lane ends, else ``None``;
        an evaluation without a criterion has no losses.
        """
        global _active
        pipeline = self._pipeline(num_chunks)
        pipeline.criterion = criterion
        chunks = num_chunks // len(self.lanes)
        data = _cut("inputs", inputs, chunks, self.batch_dim)
        labels = (labels,) if isinstance(labels, Tensor) else tuple(labels)
        answers = _cut("labels", labels, chunks, self.batch_dim) or [labels] * chunks
        feed = Feed(dict.fromkeys(self.lanes, data), dict.fromkeys(self.lanes, answers))
        _active = pipeline.store
        try:
            result = pipeline.step(
                feed,
                forward_only=not torch.is_grad_enabled(),
                reduce_gradients=False,
                keep_outputs=return_outputs,
            )
        finally:
            _active = None
        return _losses(result), _joined(result, self.batch_dim)

    def _pipeline(self, microbatches: int) -> Pipeline:
        if microbatches not in self._pipelines:
            if _shapes is None or _dtype is None:
                raise RuleError(
                    "the shapes and dtype of messages must be declared before a step",
                    "got none",
                    "call set_p2p_tensor_shapes and set_p2p_tensor_dtype",
                )
            schedule = generate(self._schedule, self._transport.ranks, microbatches)
            boundary = [TensorSpec(shape, _dtype) for shape in _shapes]
            self._pipelines[microbatches] = Pipeline(schedule, self.held(), None, boundary, self._transport)
        return self._pipelines[microbatches]


class DualPipe(_Stepper):
    """DualPipe over the ranks of a group: ``modules`` are stage ``rank`` and stage ``ranks - 1 - rank``.

    The first rank's inputs travel up.  Its labels belong to the microbatches that end there, which are the last rank's
    inputs; likewise at the other end.  ``rank_mapping[i]`` is the pipeline rank of group rank ``i``.
    """

    name, lanes = "dualpipe", (UP, DOWN)

    def held(self) -> dict[tuple[Lane, int], nn.Module]:
        rank = self._transport.rank
        return {(UP, rank): self.module[0], (DOWN, self._transport.ranks - 1 - rank): self.module[1]}


class DualPipeV(_Stepper):
    """DualPipeV: ``modules`` are stage ``rank`` and stage ``2 * ranks - 1 - rank`` of one lane."""

    name, lanes = "dualpipev", (UP,)

    def held(self) -> dict[tuple[Lane, int], nn.Module]:
        rank = self._transport.rank
        return {(UP, rank): self.module[0], (UP, 2 * self._transport.ranks - 1 - rank): self.module[1]}


def _cut(what: str, tensors: Sequence[Tensor | None], chunks: int, dim: int) -> list[tuple[Any, ...]]:
    """Cut the tensors into microbatches; a ``None`` is in each.  An inner rank passes none, and gets none.

    Raises ``StageError`` unless all tensors have the batch along ``dim``: sequence lengths, or other data without one
    row for each sample, would be cut apart as well.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return []
    sizes = [tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else None for tensor in present]
    if None in sizes or len(set(sizes)) > 1 or (chunks and sizes[0] % chunks):  # type: ignore[operator] # None is first
        raise StageError(
            f"the {what} are cut into microbatches along dimension {dim}, where all must have the same size, "
            "a multiple of the number of microbatches",
            f"got shapes {[list(tensor.shape) for tensor in present]} for {chunks} microbatches",
            "pad them; put data that does not belong to single samples into the module",
        )
    pieces = [[None] * chunks if tensor is None else tensor.tensor_split(chunks, dim=dim) for tensor in tensors]
    return list(zip(*pieces, strict=True))


def _losses(result: StepResult) -> Tensor | None:
    for losses in result.losses.values():
        return torch.stack([losses[mb] for mb in sorted(losses)])
    return None


def _joined(result: StepResult, dim: int) -> Any:
    for outputs in result.outputs.values():
        joined = tuple(torch.cat(pieces, dim) for pieces in zip(*(outputs[mb] for mb in sorted(outputs)), strict=True))
        return joined[0] if len(joined) == 1 else joined
    return None
