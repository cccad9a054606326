"""Whether gradients are clipped by the norm of all gradients of the model, each parameter once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison, Clipping
from dualpipe.record.phrases import names_of
from dualpipe.record.plain.names import unique
from dualpipe.schedule import Chunk, Task

if TYPE_CHECKING:
    from dualpipe.record.plain.step import Step

_NEAR = 1e-3
"""Up to this relative difference two norms are the same: sums of squares are rounded."""
_SAME = 1e-4
"""The same for a value that the program computed, which may be something else than a norm."""


def judge(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
    limit: float | None = None,
    others: bool = False,
) -> Clipping:
    """What is wrong with the clipping of a step, if there was any.

    ``limit`` is the norm to which the user says that the program clips.  With ``others`` there are ranks outside
    of the pipeline.  Unless all gradients are summed over their pipelines, they may hold parts of the model or of the
    gradients, and nothing is concluded.

    A factor of all gradients alike may be that of the clipping, or have in it a number by which they were divided
    before.  Only the norm that the program computes in between can tell: it is searched for among its values.
    """
    if others and any(each.pipelines == 1 for each in chunks):
        return Clipping()
    if any(each.faults or each.unknown for each in chunks):
        return Clipping()
    by_stage = {each.chunk.stage: each for each in reversed(chunks)}
    each_once = [_finals(each, files, forwards) for _, each in sorted(by_stage.items())]
    in_shards = any(each.squares is not None for each in chunks)
    faults = [] if in_shards else [*_of_calls(chunks, files, forwards, each_once)]
    scales = {each.rank: each.scale for each in chunks}
    if all(abs(scale - 1) <= _NEAR for scale in scales.values()):
        return Clipping(tuple(faults))
    if max(scales.values()) - min(scales.values()) > _NEAR * max(map(abs, scales.values())):
        shown = ", ".join(f"by {scale:.4g} on rank {rank}" for rank, scale in sorted(scales.items()))
        faults.append(
            f"the gradients are scaled by different factors ({shown}): is the norm of each rank's own gradients used "
            "in place of that of the whole model?"
        )
        return Clipping(tuple(faults))
    scale, shards = next(iter(scales.values())), [each.squares for each in by_stage.values()]
    if scale <= 0:
        return Clipping((*faults, f"the gradients are scaled by {scale:.4g} on every rank"), scale=None)
    norm = math.sqrt(sum(filter(None, shards))) if None not in shards else _norm(each_once)
    replicas = len(chunks) // len(by_stage)
    whole = max(each.microbatches for each in chunks)
    counts = {a * b * c for a in (1, 2) for b in (1, whole) for c in (1, chunks[0].pipelines)}
    shrinking = [by for by in sorted(counts) if scale * by < 1 + _NEAR]
    by = next((by for by in shrinking if _all_computed(norm / scale / by, files, scales)), 0)
    scaled = f"divided by {by} and scaled by {scale * by:.4g}" if by > 1 else f"scaled by {scale:.4g}"
    was = f"{norm / scale / (by or 1):.4g}{', as every rank computes it,' if by else ''}"
    shown = (
        f"the gradients are {scaled} on every rank; their norm over all stages, each parameter once, was {was} and is "
        f"{norm:.4g}"
    )
    clipped = Clipping(tuple(faults), (), (shown,), scale * by if by else None)
    if limit is None:
        asks = f"{shown}: if they are clipped, give the limit with --clip-norm"
        return clipped if by and _is_round(norm) else replace(clipped, unknown=(asks,), notes=())
    if abs(norm - limit) <= _NEAR * limit:
        return clipped
    reason = _reason(limit / norm, norm, [] if in_shards else [*by_stage.values()], replicas, files, forwards)
    wrong = f"{shown}, and not {limit:g}: {reason}"
    return replace(clipped, faults=(*faults, wrong), notes=())


def changed_later(step: Step, chunk: Chunk) -> list[str]:
    """What to say of gradients that the program has changed after a call of ``clip_grad_norm_``."""
    file, names = step.file(chunk), step.names(chunk)
    found = [names[number] for number in file.get("later", ()) if number in names]
    at = (file.get("clipped") or {}).get("at", "")
    say = f"the program changes the gradient between clip_grad_norm_ at {at} and the optimizer's step"
    return [f"{names_of(found)}: {say}, which is not compared"] if found else []


def beyond_limits(step: Step, chunks: Iterable[ChunkComparison]) -> tuple[str, ...]:
    """What to ask if some gradients are clipped by value, and others are larger than the limit."""
    limit = max(step.limits, default=math.inf)
    for each in chunks:
        final = step.file(each.chunk).get("final", {}) if step.has(each.chunk) else {}
        for number, name in step.names(each.chunk).items() if final else ():
            if final[number] is not None and float(final[number].abs().max()) > limit * (1 + _SAME):
                where = f"{name} of stage {each.chunk.stage} on rank {each.rank}"
                return (f"gradients are clipped to values up to {limit:.4g}, and that of {where} is not: are all?",)
    return ()


def _of_calls(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
    each_once: Sequence[Iterable[Tensor]],
) -> Iterator[str]:
    """What is wrong with the calls of ``torch.nn.utils.clip_grad_norm_``."""
    for rank in sorted({each.rank for each in chunks}):
        call = files[rank].get("clipped")
        if not call:
            continue
        whole = _norm(each_once, call["type"])
        used, limit = call["norm"], call["limit"]
        if abs(_factor(used, limit) - _factor(whole, limit)) <= _NEAR * _factor(whole, limit):
            continue
        own = _norm([_finals(each, files, forwards) for each in chunks if each.rank == rank], call["type"])
        alone = ", which is that of the rank's own gradients" if abs(own - used) <= _NEAR * own else ""
        yield (
            f"rank {rank} clips at {call['at']} by a norm of {used:.4g}{alone}; over all stages, each parameter once, "
            f"it is {whole:.4g}"
        )


def _all_computed(norm: float, files: Mapping[int, Mapping[str, Any]], ranks: Iterable[int]) -> bool:
    """Whether a norm or its square is among the values that each rank computed after its last backward."""
    return all(
        any(
            abs(value - each) <= _SAME * each
            for each in (norm, norm * norm)
            for value in files[rank].get("scalars", ())
        )
        for rank in ranks
    )


def _is_round(norm: float) -> bool:
    """Whether a norm is near a number of two digits, as a limit is."""
    return norm > 0 and abs(float(f"{norm:.2g}") - norm) <= _SAME * norm


def _factor(norm: float, limit: float) -> float:
    return min(1.0, limit / (norm + 1e-6))


def _finals(
    each: ChunkComparison, files: Mapping[int, Mapping[str, Any]], forwards: Mapping[Task, Mapping[str, Any]]
) -> list[Tensor]:
    """The gradients of a chunk's parameters."""
    final, numbers = files[each.rank]["final"], _numbers(each, forwards)
    return [final[number] for number in sorted(numbers - each.copies) if final[number] is not None]


def _numbers(each: ChunkComparison, forwards: Mapping[Task, Mapping[str, Any]]) -> set[int]:
    """The numbers of a chunk's parameters."""
    return {n for task, found in forwards.items() if task.chunk == each.chunk for n in found.get("weights", {})}


def _norm(gradients: Iterable[Iterable[Tensor]], kind: float = 2.0) -> float:
    values = [float(gradient.double().norm(kind)) for each in gradients for gradient in each]
    return max(values, default=0.0) if math.isinf(kind) else sum(value**kind for value in values) ** (1 / kind)


def _reason(
    ratio: float,
    norm: float,
    stages: Sequence[ChunkComparison],
    replicas: int,
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> str:
    """Why the norm that is used is ``ratio`` times that of all gradients, ``norm``.

    ``stages`` has each stage once, unless its gradients are in shards.
    """
    if replicas > 1 and abs(ratio - math.sqrt(replicas)) <= _NEAR * ratio:
        return "the norm counts every parameter twice, once for each replica of its stage"
    wanted = (ratio * norm) ** 2
    terms: dict[str, float] = {}
    for each in stages:
        own = f"stage {each.chunk.stage}"
        terms[own] = _norm([_finals(each, files, forwards)]) ** 2
        for number, name in unique(_numbers(each, forwards), files[each.rank]["names"]).items():
            if (final := files[each.rank]["final"][number]) is not None:
                terms[f"{name} of {own}"] = _norm([[final]]) ** 2
    sums = {f"is it that of {name} alone": term for name, term in terms.items()}
    sums |= {f"does it leave out {name}": norm**2 - term for name, term in terms.items()}
    sums |= {f"does it count {name} twice": norm**2 + term for name, term in terms.items()}
    used = f"the norm that is used is {ratio:.4g} times that"
    if not sums:
        return used
    best = min(sums, key=lambda each: round(abs(sums[each] - wanted) / wanted, 6))
    return f"{used}: {best}?" if abs(sums[best] - wanted) <= _SAME * wanted else used
