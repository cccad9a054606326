"""A verification case on Megatron: the model, its layout over ranks, and how it is trained."""

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
    """One verification, the same for every implementation; the sizes are those of DualPipe.

    ``pp`` ranks in a pipeline, ``dp`` pipelines, ``tp`` ranks that share a layer; ``microbatches`` for each
    pipeline, half of them for each lane.  A lane is a data-parallel replica, so the ground truth, Megatron's 1F1B, has
    2 x ``dp`` replicas with ``microbatches`` / 2 each.  ``clip`` is the norm to which gradients are clipped, 0 for no
    clipping; by default small enough to clip at every step, or 0 under the distributed optimizer.  ``late_w``: that of
    ``dualpipe.dualpipe``.  ``timeout``: seconds
    to wait for a message before reporting a hang.
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
    late_w: str = "none"
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
        """Each rule, whether it holds, what was given, and how to fix it."""
        pp, dp, tp, count, parallel = self.pp, self.dp, self.tp, self.count, self.sequence_parallel
        return [
            ("a pipeline must have an even number of ranks", pp > 1 and pp % 2 == 0, f"got {pp}", "use 2 or 4"),
            (
                "the number of microbatches must be even and at least twice the ranks of a pipeline",
                count % 2 == 0 and count >= 2 * pp,
                f"got {count} for {pp} ranks",
                f"use {2 * pp} or a larger even number",
            ),
            ("data and tensor parallel sizes must be positive", min(dp, tp) > 0, f"got {dp} and {tp}", "use 1"),
            (
                "tensor parallel ranks must divide the number of heads",
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
                "the expert parallel size must divide the numbers of experts and of data parallel ranks",
                self.ep == 1 or (self.model is Model.MOE and dp % self.ep == 0 and self.experts % self.ep == 0),
                f"got ep {self.ep} for dp {dp} and {self.experts} experts of {self.model}",
                "use 1, or --model moe with a multiple of it as dp",
            ),
            (
                "an expert bias needs experts",
                self.model is Model.MOE or not self.expert_bias,
                f"got {self.model}",
                "use --model moe",
            ),
            (f"the dtype must be {' or '.join(DTYPES)}", self.dtype in DTYPES, f"got {self.dtype}", "use fp32"),
            ("a verification must train for at least one step", self.steps > 0, f"got {self.steps}", "use 3"),
            ("dropout must be a probability below 1", 0 <= self.dropout < 1, f"got {self.dropout}", "use 0"),
            ("the clipping norm must not be negative", self.clip_norm >= 0, f"got {self.clip}", "use 0 for none"),
            (
                "the distributed optimizer sums the norm of the gradients in another order, so weights agree bitwise "
                "only without clipping",
                not self.distributed_optimizer or self.clip_norm == 0,
                f"got a clipping norm of {self.clip}",
                "use 0; the norm itself is compared",
            ),
            ("a timeout must be a positive number of seconds", 0 < self.timeout < 1e6, f"got {self.timeout}", "use 60"),
        ]

    @property
    def limit(self) -> float:
        """Seconds after which an implementation that still runs is killed: time for its work and two hangs."""
        return _SPARE + 2 * self.timeout

    @cached_property
    def count(self) -> int:
        """Microbatches of a pipeline: as given, or 2 x ``pp`` + 2, so that the steady state of the schedule repeats."""
        return 2 * self.pp + 2 if self.microbatches is None else self.microbatches

    @property
    def clip_norm(self) -> float:
        """The norm to which gradients are clipped; 0 for no clipping."""
        if self.clip is not None:
            return self.clip
        return 0.0 if self.distributed_optimizer else _CLIP

    @property
    def has_oracle(self) -> bool:
        """Whether one process can compute the result: no layer is split, no router uses all replicas' token counts."""
        return self.tp == self.ep == 1 and not self.expert_bias

    @property
    def norm_rounding(self) -> float:
        """The largest relative difference of a gradient norm between 1F1B and DualPipe that is rounding.

        The plain optimizer sums the same numbers in the same order.  The distributed one sums the squares of all
        ranks' shards in float32: under 1F1B one by one, under DualPipe in pairs first.  n positive numbers summed in
        two orders differ by at most 2 (n - 1) roundings of 2**-24, their roots by half of that; DualPipe takes the root
        of each pair's sum and squares it again, 4 more.
        """
        return (self.replicas * self.pp * self.tp + 4) * 2.0**-24 if self.distributed_optimizer else 0.0

    @property
    def per_lane(self) -> int:
        return self.count // 2

    @property
    def replicas(self) -> int:
        """The number of replicas of the model: two lanes in each pipeline."""
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
