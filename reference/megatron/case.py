"""What is to be verified on Megatron: a model, how it is laid out over ranks, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch

from dualpipe.errors import RuleError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CLIP = 0.1
_SPARE = 60.0


class Model(StrEnum):
    """A dense GPT, or one with four experts a layer."""

    GPT = "gpt"
    MOE = "moe"


@dataclass(frozen=True)
class Case:
    """One verification.  The same for every party; sizes are DualPipe's.

    ``pp`` ranks in a pipeline, ``dp`` pipelines, ``tp`` ranks that share a layer; ``microbatches`` for each
    pipeline, half of them for each lane.  A lane is a data-parallel replica, so that the truth, Megatron's 1F1B, has
    2 x ``dp`` replicas of ``microbatches`` / 2 each.  ``clip`` is the norm to which gradients are clipped, 0 for not at
    all; by default small enough to clip at every step, or 0 under the distributed optimizer.  ``timeout``: the
    seconds after which a wait is a hang.
    """

    model: Model = Model.GPT
    pp: int = 2
    dp: int = 1
    tp: int = 1
    ep: int = 1
    microbatches: int | None = None
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    dtype: str = "fp32"
    clip: float | None = None
    dropout: float = 0.0
    per_token_loss: bool = False
    expert_bias: bool = False
    steps: int = 3
    seed: int = 1234
    timeout: float = 60.0

    hidden = 32
    heads = 4
    sequence = 16
    vocabulary = 64
    batch = 2
    experts = 4
    learning_rate = 1e-2
    weight_decay = 0.1

    def __post_init__(self) -> None:
        for rule, holds, got, fix in self._rules():
            if not holds:
                raise RuleError(rule, got, fix)

    def _rules(self) -> list[tuple[str, bool, str, str]]:
        """Each rule with whether it holds, what came, and what to do."""
        pp, dp, tp, count, parallel = self.pp, self.dp, self.tp, self.count, self.sequence_parallel
        return [
            ("a pipeline has an even number of ranks", pp > 1 and pp % 2 == 0, f"got {pp}", "use 2 or 4"),
            (
                "microbatches are even and at least twice the ranks of a pipeline",
                count % 2 == 0 and count >= 2 * pp,
                f"got {count} for {pp} ranks",
                f"use {2 * pp} or a larger even number",
            ),
            ("data and tensor parallel sizes are positive", min(dp, tp) > 0, f"got {dp} and {tp}", "use 1"),
            (
                "heads divide among tensor parallel ranks",
                tp < 1 or self.heads % tp == 0,
                f"got {self.heads} heads for {tp} ranks",
                "use 1, 2 or 4",
            ),
            ("sequence parallelism needs tensor parallelism", tp > 1 or not parallel, f"got tp {tp}", "use tp 2"),
            (
                "Megatron trains experts under tensor parallelism only with sequence parallelism",
                self.model is Model.GPT or tp == 1 or parallel,
                f"got tp {tp} without it",
                "set sequence parallelism",
            ),
            (
                "expert parallelism divides experts and data parallel ranks",
                self.ep == 1 or (self.model is Model.MOE and dp % self.ep == 0 and self.experts % self.ep == 0),
                f"got ep {self.ep} for dp {dp} and {self.experts} experts of {self.model}",
                "use 1, or --model moe with a multiple of it as dp",
            ),
            (
                "a bias of experts needs experts",
                self.model is Model.MOE or not self.expert_bias,
                f"got {self.model}",
                "use --model moe",
            ),
            (f"the number format is {' or '.join(DTYPES)}", self.dtype in DTYPES, f"got {self.dtype}", "use fp32"),
            ("a verification trains for at least one step", self.steps > 0, f"got {self.steps}", "use 3"),
            ("dropout is a probability below 1", 0 <= self.dropout < 1, f"got {self.dropout}", "use 0"),
            ("the clipping norm is not negative", self.clip_norm >= 0, f"got {self.clip}", "use 0 for none"),
            (
                "under the distributed optimizer the norm of the gradients is added up in another order, so that "
                "weights agree bitwise only without clipping",
                not self.distributed_optimizer or self.clip_norm == 0,
                f"got a clipping norm of {self.clip}",
                "use 0; the norm itself is compared",
            ),
            ("a timeout is a number of seconds", 0 < self.timeout < 1e6, f"got {self.timeout}", "use 60"),
        ]

    @property
    def limit(self) -> float:
        """Seconds after which a party that has not ended by itself is ended: time for its work and two hangs."""
        return _SPARE + 2 * self.timeout

    @cached_property
    def count(self) -> int:
        """Microbatches of a pipeline: as asked for, or 2 x ``pp`` + 2, so that the middle of the schedule repeats."""
        return 2 * self.pp + 2 if self.microbatches is None else self.microbatches

    @property
    def clip_norm(self) -> float:
        """The norm to which gradients are clipped; 0 for not at all."""
        if self.clip is not None:
            return self.clip
        return 0.0 if self.distributed_optimizer else _CLIP

    @property
    def has_oracle(self) -> bool:
        """Whether one process can tell the truth: no layer is split, no router steered by all replicas' tokens."""
        return self.tp == self.ep == 1 and not self.expert_bias

    @property
    def norm_rounding(self) -> float:
        """By how much, relatively, the gradient norms of truth and production may differ.

        The plain optimizer sums the same numbers in the same order.  The distributed one sums a square for each shard,
        all ranks' in float32: over the truth's ranks one by one, over production's in pairs first.  n positive numbers
        summed in two orders differ by at most 2 (n - 1) roundings of 2**-24, their roots by half of that; production
        takes the root of each pair's sum and squares it again, 4 more.
        """
        return (self.replicas * self.pp * self.tp + 4) * 2.0**-24 if self.distributed_optimizer else 0.0

    @property
    def per_lane(self) -> int:
        return self.count // 2

    @property
    def replicas(self) -> int:
        """How many copies of the model train: two lanes in each pipeline."""
        return 2 * self.dp

    @property
    def layers(self) -> int:
        return 2 * self.pp

    @property
    def has_main_weights(self) -> bool:
        """Whether the optimizer keeps float32 copies of the weights."""
        return self.dtype != "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
