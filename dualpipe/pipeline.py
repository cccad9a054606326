"""One rank's end of a pipeline: the object a training loop holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Self

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dualpipe.errors import RuleError
from dualpipe.runtime.executor import Boundary, Observer, StepError, Worker, run_step
from dualpipe.runtime.modules import Criterion, Feed, ModuleComputation, Stages, StepResult
from dualpipe.runtime.replicas import Replicas
from dualpipe.runtime.split_linear import split_linears
from dualpipe.runtime.transport import MessageError, ProcessGroupTransport, TensorSpec, Transport
from dualpipe.runtime.weightgrad import WeightGradStore
from dualpipe.schedule import MESSAGES, Lane, Schedule
from dualpipe.schedule.text import digest

_SUMMED: MutableMapping[nn.Parameter, bool] = WeakIdKeyDictionary()
"""The parameters whose gradients a pipeline has summed over the lanes since its last step on them."""

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
        microbatch and returns a tensor or a tuple of tensors.
    criterion:
        ``criterion(*outputs, *labels)``: a scalar loss, scaled as its gradient shall be (by one over the number of
        microbatches for their mean).  May be ``None`` on a rank that holds no last stage.
    boundary:
        Shapes and dtypes of the tensors that go from a stage to the next one; a function of the sending stage
        where they differ.
    transport:
        How messages travel, and which pipeline rank this is.
    blocking:
        Wait for every message of a slot before going on, as a plain batch-and-wait program does.
    observe:
        Called after every op with when it began and ended (see ``dualpipe.runtime.executor.Observer``).
    split_backward:
        Leave the weight gradients of linear layers to W.  If false every backward is whole, and W does nothing.
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
    ) -> None:
        _require_stages(schedule, transport.rank, stages)
        _require_own_ops(schedule, transport.rank)
        _require_no_weights(schedule, criterion, stages)
        self.stages, self.store, self.criterion = stages, WeightGradStore(), criterion
        self._worker = Worker(
            schedule,
            boundary if callable(boundary) else lambda stage: boundary,
            transport,
            self.store,
            {
                (lane, stage): split_linears(module, self.store, f"stage {stage} of lane {lane}")
                for (lane, stage), module in stages.items()
                if split_backward
            },
            blocking,
            observe,
        )
        self._replicas = Replicas(schedule, stages, transport)
        self._earlier: dict[nn.Parameter, Tensor] = {}
        self._agreed = False

    def step(
        self, feed: Feed, forward_only: bool = False, reduce_gradients: bool = True, keep_outputs: bool = False
    ) -> StepResult:
        """Run one step.

        Gradients are added to ``.grad``, and summed over the lanes after the last W.  To accumulate over several
        steps, pass ``reduce_gradients=False`` to all but the last, which sends fewer messages, or leave the default:
        a gradient that is summed already is set aside until the next sum.  ``forward_only`` runs the forwards alone.

        Raises ``DisagreementError`` at the first step if the ranks were set up differently, ``StepError`` when a
        message does not come within the transport's timeout or the schedule asks for the impossible.  Any exception
        within a step, a criterion's or Ctrl-C too, ends the step on every rank, and spoils pipeline and transport:
        later calls raise ``SpoiledError``, and gradients are incomplete.
        """
        self._agree()
        computation = ModuleComputation(self._worker.schedule, self.stages, self.criterion, feed, keep_outputs)
        with self._worker.transport.phase("evaluation" if forward_only else "step"):
            feed.require(self._worker.schedule, self._worker.transport.rank, self.criterion is not None)
            if not forward_only:
                self._set_aside()
            run_step(self._worker, computation, forward_only)
        if reduce_gradients and not forward_only:
            self.reduce_gradients()
        return computation.result

    def reduce_gradients(self) -> None:
        """Sum the gradients of a stage's copies over the lanes; ``step`` does so unless told not to."""
        self._agree()
        with self._exchange("reduction of gradients", "adding up the gradients of the copies of its stages"):
            self._replicas.reduce_gradients()
        for parameter in self._parameters():
            earlier = self._earlier.pop(parameter, None)
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier + parameter.grad
            _SUMMED[parameter] = True

    def copy_weights(self) -> None:
        """Make the copies of every stage equal: that of the first lane counts."""
        self._agree()
        with self._exchange("copy of weights", "copying the weights of its stages"):
            self._replicas.copy_weights()

    def _set_aside(self) -> None:
        """Keep gradients that are summed over the lanes already from being summed again with those of the next step."""
        for parameter in self._parameters():
            if _SUMMED.pop(parameter, False) and parameter.grad is not None:
                self._earlier[parameter], parameter.grad = parameter.grad, None

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for stage in self.stages.values() for parameter in stage.parameters())

    def close(self) -> None:
        """Close the transport, which ends its threads and connections; calling it again does nothing."""
        self._worker.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _exchange(self, phase: str, doing: str) -> Iterator[None]:
        with self._worker.transport.phase(phase):
            try:
                yield
            except MessageError as error:
                raise StepError(self._worker.transport.rank, -1, None, None, f"{doing}: {error}") from error

    def _agree(self) -> None:
        """Before the first message of any kind: compare the ranks' set-ups."""
        if not self._agreed:
            self._worker.transport.agree(self._record())
            self._agreed = True

    def _record(self) -> dict[str, str]:
        """What every rank must have alike, short enough to compare at a glance."""
        schedule = self._worker.schedule
        shapes = [", ".join(map(str, self._worker.boundary(stage))) for stage in range(schedule.stages - 1)]
        same = len(set(shapes)) == 1
        weights = {f"weights of stage {stage}": _weights(module) for (_, stage), module in self.stages.items()}
        return {
            "schedule": f"{schedule.name or 'unnamed'} of {schedule.ranks} ranks and "
            f"{sum(schedule.microbatches.values())} microbatches, digest {digest(schedule)[:16]}",
            "boundary between stages": shapes[0] if same else f"digest {_digest(shapes)} of {shapes[:3]}...",
            "way of waiting": "blocking" if self._worker.blocking else "at use",
            **weights,
        }


def _weights(module: nn.Module) -> str:
    """The names, shapes and dtypes of a module's parameters and buffers, in brief."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    told = [f"{name} {list(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors]
    numbers = sum(t.numel() for _, t in tensors)
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for _, t in tensors}))
    return f"{len(tensors)} tensors of {numbers} numbers in {dtypes or 'no dtype'}, digest {_digest(told)}"


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("; ".join(texts).encode()).hexdigest()[:16]


def _require_stages(schedule: Schedule, rank: int, stages: Mapping[tuple[Lane, int], nn.Module]) -> None:
    placed = {(lane, s) for lane, route in schedule.routes.items() for s, holder in enumerate(route) if holder == rank}
    if placed != set(stages):
        raise RuleError(
            f"rank {rank} holds the stages that the schedule places on it",
            f"it was given {_names(stages)}, and the schedule places {_names(placed)} there",
            "build those",
        )


def _require_no_weights(schedule: Schedule, criterion: Criterion | None, stages: Stages) -> None:
    """Weights of a criterion would be trained on each lane apart."""
    if len(schedule.routes) < 2 or not isinstance(criterion, nn.Module):
        return
    held = {id(parameter) for module in stages.values() for parameter in module.parameters()}
    own = [name for name, p in criterion.named_parameters() if p.requires_grad and id(p) not in held]
    if own:
        raise RuleError(
            "with two lanes a criterion has no weights of its own",
            f"got {type(criterion).__name__} with {', '.join(own[:3])}",
            "put them into the module of the last stage",
        )


def _require_own_ops(schedule: Schedule, rank: int) -> None:
    for slot in schedule.programs[rank]:
        for op in slot:
            if schedule.rank_of(op) != rank:
                got = f"rank {rank} is to run {op}, whose stage is on rank {schedule.rank_of(op)}"
                raise RuleError("a rank runs the ops of its own stages", got, "move the op there")
            if op.kind in MESSAGES and schedule.neighbour(op) is None:
                got = f"rank {rank} is to run {op}, where the lane ends"
                raise RuleError("a message goes to the next stage or the previous one", got, "leave it out")


def _names(stages: Mapping[tuple[Lane, int], nn.Module] | set[tuple[Lane, int]]) -> str:
    return ", ".join(f"{stage}{lane}" for lane, stage in sorted(stages)) or "none"
