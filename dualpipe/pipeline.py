"""One rank's part of a pipeline: the object that a training loop holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Self

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from dualpipe.errors import RuleError, StageError
from dualpipe.runtime.arguments import boundary_of, require_callable, require_feed, require_modules
from dualpipe.runtime.boundary import Boundary
from dualpipe.runtime.executor import Executor, Observer, StepError, require_size
from dualpipe.runtime.modules import Criterion, Feed, ModuleComputation, Stages, StepResult
from dualpipe.runtime.overlap import find_overlaps
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.replicas import Replicas
from dualpipe.runtime.split_linear import split_linears
from dualpipe.runtime.transport import MessageError, TensorSpec, Transport
from dualpipe.runtime.weightgrad import DeferredGradients
from dualpipe.schedule import COLLECTIVES, MESSAGES, Chunk, Lane, Schedule
from dualpipe.schedule.shapes import with_shape_exchange
from dualpipe.schedule.text import fingerprints

_SUMMED: MutableMapping[nn.Parameter, TensorWeakRef] = WeakIdKeyDictionary()
"""The parameters whose ``.grad`` is already summed over the lanes, with that sum: no step has added to it since."""

__all__ = ["Feed", "Pipeline", "ProcessGroupTransport", "StepResult", "TensorSpec"]


class Pipeline:
    """Runs a schedule's steps on this rank.

    ::

        schedule = dualpipe(ranks=4, microbatches=8)
        transport = ProcessGroupTransport(group)
        pipeline = Pipeline(schedule, {(UP, rank): up, (DOWN, 3 - rank): down}, loss, [TensorSpec(...)], transport)
        pipeline.copy_weights()
        result = pipeline.step(Feed(inputs, labels))      # gradients are in .grad, summed over the lanes
        optimizer.step()

    Parameters
    ----------
    schedule:
        The same value on every rank; compared at the first step.
    stages:
        The module of each (lane, stage) that the schedule places on this rank.  A module takes the tensors of a
        microbatch and returns a tensor or a tuple of tensors.  It must not write to them in place.
    criterion:
        ``criterion(*outputs, *labels)``: a scalar loss, scaled as its gradient should be (for the mean, divided by the
        number of microbatches).  May be ``None`` on a rank that holds no last stage.
    boundary:
        Shapes and dtypes of the tensors that go from a stage to the next one; a function of the sending stage
        where they differ.
    variable_shapes:
        Microbatches have shapes of their own.  Each activation's shape is sent before it, and waited for
        (see ``dualpipe.schedule.shapes``).  Of the boundary's shapes the numbers of dimensions count alone.
    transport:
        Carries the messages, and knows which pipeline rank this is.
    blocking:
        Wait for every message of a slot before going on, as a plain batch-and-wait program does.
    observe:
        Called after every op with its start and end times (see ``dualpipe.runtime.executor.Observer``).
    split_backward:
        Defer the weight gradients of linear layers to W.  If false every backward is full, and W does nothing.
    overlap:
        Run the F&B pairs of the schedule as one unit where a module's class has ``overlapped_forward_backward`` (see
        ``dualpipe.runtime.overlap``).  If false, and for all other classes, F runs before B.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[tuple[Lane, int], nn.Module],
        criterion: Criterion | None,
        boundary: Sequence[TensorSpec] | Boundary,
        transport: Transport,
        blocking: bool = False,
        observe: Observer | None = None,
        split_backward: bool = True,
        overlap: bool = True,
        variable_shapes: bool = False,
    ) -> None:
        self.schedule, self.transport, self.criterion = schedule, transport, criterion
        self.stages: Stages = require_modules(stages)
        self.store = DeferredGradients()
        require_size(schedule, transport)
        _require_stages(schedule, transport.rank, self.stages)
        _require_own_ops(schedule, transport.rank)
        require_callable(criterion)
        _require_no_weights(schedule, criterion, self.stages)
        self._run = with_shape_exchange(schedule) if variable_shapes else schedule
        self._boundary: Boundary = boundary_of(boundary)
        self._blocking, self._observe = blocking, observe
        self._splits = {
            chunk: split_linears(module, self.store, str(chunk))
            for chunk, module in self.stages.items()
            if split_backward
        }
        self._overlaps = find_overlaps(self.stages) if overlap else frozenset()
        self._warned: set[Chunk] = set()
        self._replicas = Replicas(schedule, self.stages, transport)
        self._earlier: dict[nn.Parameter, Tensor] = {}
        self._agreed = False

    def step(
        self, feed: Feed, forward_only: bool = False, reduce_gradients: bool = True, keep_outputs: bool = False
    ) -> StepResult:
        """Run one step.

        Gradients are added to ``.grad``, and summed over the lanes after the last W.  To accumulate over several
        steps, pass ``reduce_gradients=False`` to all but the last, which sends fewer messages, or keep the default:
        a gradient that is already summed is set aside until the next sum.  ``forward_only`` runs only the forwards.

        Raises ``DisagreementError`` at the first step if the ranks were set up differently, ``StepError`` when a
        message does not complete within the transport's timeout or the schedule cannot be run, and ``StageError`` for
        stages, a criterion or data that cannot be trained on.  Any exception within a step, a criterion's or Ctrl-C
        too, ends the step on every rank, and spoils pipeline and transport: later calls raise ``SpoiledError``, and
        gradients are incomplete.
        """
        self._agree()
        computation = ModuleComputation(self.schedule, self.stages, self.criterion, feed, keep_outputs)
        executor = Executor(
            self._run,
            computation,
            self._boundary,
            self.transport,
            self.store,
            self._splits,
            forward_only=forward_only,
            blocking=self._blocking,
            observe=self._observe,
            warned=self._warned,
            overlaps=dict.fromkeys(self._overlaps, computation.overlap),
        )
        with self.transport.phase("evaluation" if forward_only else "step"):
            require_feed(feed, self.schedule, self.transport.rank, self.criterion is not None)
            if not forward_only:
                self._set_aside(copies=True)
            executor.run()
        if reduce_gradients and not forward_only:
            self.reduce_gradients()
        return computation.result

    def reduce_gradients(self) -> None:
        """Sum the gradients of a stage's replicas over the lanes; ``step`` does so by default.

        A gradient that is already summed is not summed again, unless another tensor has been put into ``.grad`` since.
        """
        self._agree()
        with self._exchange("reduction of gradients", "summing the gradients of its stages' replicas"):
            self._set_aside(copies=False)
            self._replicas.reduce_gradients()
        for parameter in self._parameters():
            earlier = self._earlier.pop(parameter, None)
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier + parameter.grad
            if parameter.grad is not None:
                _SUMMED[parameter] = TensorWeakRef(parameter.grad)

    def copy_weights(self) -> None:
        """Copy the weights and buffers of each stage's replica on the first lane to its other replicas."""
        self._agree()
        with self._exchange("copy of weights", "copying the weights of its stages"):
            self._replicas.copy_weights()

    def close(self) -> None:
        """Close the transport, which ends its threads and connections; a second call does nothing."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _set_aside(self, copies: bool) -> None:
        """Set aside gradients that are summed over the lanes: the next sum must not include them again.

        Another tensor in ``.grad`` may be a copy of the sum, which a clipping library made, or the gradient of a
        backward outside the pipeline, after ``zero_grad()``.  With ``copies`` it counts as the sum.
        """
        for parameter in self._parameters():
            summed, gradient = _SUMMED.pop(parameter, None), parameter.grad
            if summed is not None and gradient is not None and (copies or summed() is gradient):
                self._earlier[parameter], parameter.grad = gradient, None

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for stage in self.stages.values() for parameter in stage.parameters())

    @contextmanager
    def _exchange(self, phase: str, doing: str) -> Iterator[None]:
        with self.transport.phase(phase):
            try:
                yield
            except MessageError as error:
                raise StepError(self.transport.rank, -1, None, None, f"{doing}: {error}") from error

    def _agree(self) -> None:
        """Compare the ranks' set-ups before the first message of any kind."""
        if not self._agreed:
            self.transport.agree(self._record())
            self._agreed = True

    def _record(self) -> dict[str, str]:
        """What must be the same on every rank, short enough to compare at a glance."""
        schedule = self._run
        shapes = [", ".join(map(str, self._boundary(stage))) for stage in range(schedule.stages - 1)]
        same = len(set(shapes)) == 1
        weights = {f"weights of stage {stage}": _describe_weights(module) for (_, stage), module in self.stages.items()}
        return {
            **fingerprints(schedule, self.transport.rank),
            "boundary between stages": shapes[0] if same else f"digest {_digest(shapes)} of {shapes[:3]}...",
            "way of waiting": "blocking" if self._blocking else "at use",
            **weights,
        }


def _describe_weights(module: nn.Module) -> str:
    """The number, size and dtypes of a module's parameters and buffers, and a digest of their names and shapes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lines = [f"{name} {list(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors]
    numbers = sum(t.numel() for _, t in tensors)
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for _, t in tensors}))
    return f"{len(tensors)} tensors of {numbers} numbers in {dtypes or 'no dtype'}, digest {_digest(lines)}"


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("; ".join(texts).encode()).hexdigest()[:16]


def _require_stages(schedule: Schedule, rank: int, stages: Stages) -> None:
    placed = {Chunk(lane, s) for lane, route in schedule.routes.items() for s, on in enumerate(route) if on == rank}
    if placed != set(stages):
        raise RuleError(
            f"rank {rank} must hold the stages that the schedule places on it",
            f"it was given {_names(stages)}, and the schedule places {_names(placed)} there",
            "build those",
        )


def _require_no_weights(schedule: Schedule, criterion: Criterion | None, stages: Stages) -> None:
    """Refuse a criterion with weights on two lanes: each lane would train its own."""
    if len(schedule.routes) < 2 or not isinstance(criterion, nn.Module):
        return
    known = {id(parameter) for module in stages.values() for parameter in module.parameters()}
    own = [name for name, p in criterion.named_parameters() if p.requires_grad and id(p) not in known]
    if own:
        raise StageError(
            "with two lanes a criterion must have no weights of its own",
            f"got {type(criterion).__name__} with {', '.join(own[:3])}",
            "put them into the module of the last stage",
        )


def _require_own_ops(schedule: Schedule, rank: int) -> None:
    for slot in schedule.programs[rank]:
        for op in slot:
            if op.kind in COLLECTIVES:
                got = f"rank {rank} is to run the collective {op}"
                raise RuleError("a pipeline runs computes and messages", got, "use schedule.only(COMPUTE | MESSAGES)")
            if schedule.rank_of(op) != rank:
                got = f"rank {rank} has {op}, whose stage is on rank {schedule.rank_of(op)}"
                raise RuleError("a rank may only run ops of its own stages", got, "move the op there")
            if op.kind in MESSAGES and schedule.neighbour(op) is None:
                got = f"rank {rank} has {op}, but the lane ends there"
                raise RuleError("a message must go to the next stage or the previous one", got, "remove it")


def _names(chunks: Iterable[Chunk]) -> str:
    return ", ".join(f"{stage}{lane}" for lane, stage in sorted(chunks)) or "none"
