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
    """A dense GPT, one with four experts in each layer, or a miniature of DeepSeek-V3."""

    GPT = "gpt"
    MOE = "moe"
    DEEPSEEK = "deepseek"


class Part(StrEnum):
    """A part of the miniature of DeepSeek-V3.  In addition to sigmoid routing it has multi-head latent attention,
    routing to groups of experts, a shared expert, a router bias that balances experts, a dense first layer, a
    multi-token prediction layer, and stages with different numbers of layers."""

    MLA = "mla"
    GROUPS = "groups"
    SHARED = "shared"
    BIAS = "bias"
    DENSE = "dense"
    MTP = "mtp"
    LAYOUT = "layout"


@dataclass(frozen=True)
class Case:
    """One verification, the same for every implementation; the sizes are those of DualPipe.

    ``pp`` ranks in a pipeline, ``dp`` pipelines, ``tp`` ranks that share a layer, ``cp`` that share a
    sequence; ``microbatches`` for each pipeline.
    ``schedule`` is dualpipe or dualpipev.  Under dualpipe half of the microbatches are for each lane.  A lane is a
    data-parallel replica, so the ground truth, Megatron's 1F1B, has 2 x ``dp`` replicas with ``microbatches`` / 2 each.
    Under dualpipev it has the same replicas and microbatches, on twice the pipeline ranks.

    ``instances`` is the number of instances of the distributed optimizer over all replicas, each with a whole copy of
    its state.  With ``variable_lengths`` microbatches have sequences of different lengths.  ``mtp`` is the number of
    multi-token prediction layers, ``tied`` ties the output layer to the embedding; ``layout`` distributes the
    layers over the stages as Megatron's ``pipeline_model_parallel_layout`` does,
    by default evenly.  ``without`` has the parts to leave out of the miniature of DeepSeek-V3.  ``clip`` is the norm to
    which gradients are clipped, 0 for no clipping; by default small enough to clip at every step, or 0 under the
    distributed optimizer.  ``late_w``: that of ``dualpipe.dualpipe``.  ``overlap_moe``: the drop-in runs F&B pairs
    through Megatron's plan, and every implementation sends tokens by all-to-all.  ``global_aux_loss``:
    every router balances its experts over the tokens of all replicas.  ``qk_clip``: after each step, the
    query and key weights of each head with an attention logit above ``qk_threshold`` are scaled down.  ``timeout``:
    seconds to wait for a message before reporting a hang.
    """

    model: Model = Model.GPT
    pp: int = 2
    dp: int = 1
    tp: int = 1
    ep: int = 1
    cp: int = 1
    microbatches: int | None = None
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = False
    instances: int = 1
    recompute: bool = False
    dtype: str = "fp32"
    clip: float | None = None
    dropout: float = 0.0
    per_token_loss: bool = False
    expert_bias: bool = False
    global_aux_loss: bool = False
    variable_lengths: bool = False
    qk_clip: bool = False
    mtp: int = 0
    tied: bool = False
    layout: str | None = None
    without: tuple[Part, ...] = ()
    schedule: str = "dualpipe"
    late_w: str = "none"
    overlap_moe: bool = False
    steps: int = 3
    seed: int = 1234
    timeout: float = 60.0

    hidden = 32
    heads = 4
    sequence = 16
    vocabulary = 64
    batch = 2
    learning_rate = 1e-2
    weight_decay = 0.1
    qk_threshold = 0.02

    def __post_init__(self) -> None:
        for rule, holds, got, fix in self._rules():
            if not holds:
                raise RuleError(rule, got, fix)

    def _rules(self) -> list[tuple[str, bool, str, str]]:
        """Each rule, whether it holds, what was given, and how to fix it."""
        pp, dp, tp, count, parallel = self.pp, self.dp, self.tp, self.count, self.sequence_parallel
        return [
            (
                "the schedule must be dualpipe or dualpipev",
                self.schedule in ("dualpipe", "dualpipev"),
                f"got {self.schedule}",
                "use one of them",
            ),
            (
                "a pipeline must have an even number of ranks",
                pp > 1 and pp % self.lanes == 0,
                f"got {pp}",
                "use 2 or 4",
            ),
            (
                "the number of microbatches must be even and at least twice the ranks of a pipeline",
                count % self.lanes == 0 and count >= 2 * pp,
                f"got {count} for {pp} ranks",
                f"use {2 * pp} or a larger even number",
            ),
            ("data and tensor parallel sizes must be positive", min(dp, tp) > 0, f"got {dp} and {tp}", "use 1"),
            (
                "the instances of the distributed optimizer must divide the data parallel ranks, of experts, too",
                self.instances == 1
                or (self.distributed_optimizer and self.instances > 1 and dp // self.ep % self.instances == 0),
                f"got {self.instances} instances for dp {dp} and ep {self.ep}",
                "use 1, or --distributed-optimizer with a multiple of instances times ep as dp",
            ),
            (
                "tensor parallel ranks must divide the number of heads",
                tp < 1 or self.heads % tp == 0,
                f"got {self.heads} heads for {tp} ranks",
                "use 1, 2 or 4",
            ),
            (
                "context parallelism needs latent attention, tensor parallel size 1 and one sequence length",
                self.cp == 1 or (self.cp > 1 and Part.MLA in self.parts and tp == 1 and not self.variable_lengths),
                f"got cp {self.cp} for {self.model}, tp {tp}",
                "use 1, or --model deepseek --cp 2",
            ),
            ("sequence parallelism needs tensor parallelism", tp > 1 or not parallel, f"got tp {tp}", "use tp 2"),
            (
                "Megatron trains experts under tensor parallelism only with sequence parallelism",
                not self.has_experts or tp == 1 or parallel,
                f"got tp {tp} without it",
                "set sequence parallelism",
            ),
            (
                "the expert parallel size must divide the numbers of experts and of data parallel ranks",
                self.ep == 1 or (self.has_experts and dp % self.ep == 0 and self.experts % self.ep == 0),
                f"got ep {self.ep} for dp {dp} and {self.experts} experts of {self.model}",
                "use 1, or --model moe with a multiple of it as dp",
            ),
            (
                "F&B pairs overlap with experts on several ranks, without recompute and multi-token prediction",
                not self.overlap_moe or (self.ep > 1 and not self.recompute and not self.mtp_layers),
                f"got ep {self.ep}, recompute {self.recompute} and {self.mtp_layers} multi-token prediction layers",
                "set ep 2 and leave the others out",
            ),
            (
                "an expert bias and a global load-balancing loss need experts",
                self.has_experts or not (self.expert_bias or self.global_aux_loss),
                f"got {self.model}",
                "use --model moe",
            ),
            (
                "queries and keys are clipped in latent attention in bf16, without the distributed optimizer",
                self.can_clip_logits or not self.qk_clip,
                f"got {self.model} in {self.dtype}, distributed optimizer {self.distributed_optimizer}",
                "use --model deepseek --dtype bf16 and leave the distributed optimizer out",
            ),
            (
                "Megatron cannot overlap the reduction of gradients with tied embeddings and multi-token prediction",
                not (self.overlap_grad_reduce and self.tied and self.mtp_layers),
                f"got {self.mtp_layers} multi-token prediction layers",
                "leave one of the three out",
            ),
            (
                "the number of multi-token prediction layers must not be negative",
                self.mtp >= 0,
                f"got {self.mtp}",
                "use 0 for none",
            ),
            (
                "a layout must have one part for each stage, separated by |",
                self.layers_of_stages is None or self.layers_of_stages.count("|") == self.stages - 1,
                f"got {self.layout} for {self.stages} stages",
                "such as Et|tt|tt|ttL for 4",
            ),
            (
                "only the miniature of DeepSeek-V3 has parts to leave out",
                self.model is Model.DEEPSEEK or not self.without,
                f"got {', '.join(self.without)} for {self.model}",
                "use --model deepseek",
            ),
            (f"the dtype must be {' or '.join(DTYPES)}", self.dtype in DTYPES, f"got {self.dtype}", "use fp32"),
            ("a verification must train for at least one step", self.steps > 0, f"got {self.steps}", "use 3"),
            ("dropout must be a probability below 1", 0 <= self.dropout < 1, f"got {self.dropout}", "use 0"),
            ("the clipping norm must not be negative", self.clip_norm >= 0, f"got {self.clip}", "use 0 for none"),
            ("a timeout must be a positive number of seconds", 0 < self.timeout < 1e6, f"got {self.timeout}", "use 60"),
        ]

    @property
    def can_clip_logits(self) -> bool:
        """Whether queries and keys can be clipped: Megatron's own code needs 16 bits and whole weights."""
        return Part.MLA in self.parts and self.dtype == "bf16" and not self.distributed_optimizer

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
        """Whether one process can compute the result: no layer is split, no number depends on how it is sharded, and
        no forward on other replicas."""
        return self.tp == self.ep == self.cp == 1 and not self.clips_by_shards and not self.global_aux_loss

    @property
    def clips_by_shards(self) -> bool:
        """Whether weights depend on a norm that the distributed optimizer adds up shard by shard."""
        return self.distributed_optimizer and self.clip_norm > 0

    @property
    def norm_rounding(self) -> float:
        """The largest relative difference of a gradient norm between 1F1B and the oracle that is rounding.

        The oracle sums the squares of whole gradients.  The distributed optimizer sums those of all ranks' shards in
        float32.  n positive numbers summed in two orders differ by at most 2 (n - 1) roundings of 2**-24, their roots
        by half of that; each stage's root is squared again, 4 more.
        """
        ranks = self.replicas * self.stages * self.tp * self.cp
        return (ranks + 4) * 2.0**-24 if self.distributed_optimizer else 0.0

    @property
    def lanes(self) -> int:
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def per_lane(self) -> int:
        return self.count // self.lanes

    @property
    def replicas(self) -> int:
        """The number of replicas of the model: as many as lanes in each pipeline."""
        return self.lanes * self.dp

    @property
    def stages(self) -> int:
        return self.pp if self.lanes == 2 else 2 * self.pp

    @property
    def layers(self) -> int:
        """The layers of the decoder, two for each rank, without those of multi-token prediction."""
        return 2 * self.pp if self.layers_of_stages is None else self.layers_of_stages.count("t")

    @property
    def experts(self) -> int:
        """The experts of a layer; in the miniature of DeepSeek-V3 the two chosen ones are not a whole group."""
        return 8 if self.model is Model.DEEPSEEK else 4

    @property
    def has_experts(self) -> bool:
        return self.model is not Model.GPT

    @property
    def parts(self) -> frozenset[Part]:
        """The parts of the miniature of DeepSeek-V3 that the model has."""
        return frozenset(Part) - frozenset(self.without) if self.model is Model.DEEPSEEK else frozenset()

    @property
    def balances_by_bias(self) -> bool:
        return self.expert_bias or Part.BIAS in self.parts

    @property
    def mtp_layers(self) -> int:
        """The number of multi-token prediction layers."""
        return max(self.mtp, int(Part.MTP in self.parts))

    @property
    def layers_of_stages(self) -> str | None:
        """The layout as given; for the miniature of DeepSeek-V3 one with a short first stage; or ``None``."""
        if self.layout is not None or Part.LAYOUT not in self.parts:
            return self.layout
        return "|".join(["Et", *["tt"] * (self.stages - 2), f"tt{'m' * self.mtp_layers}L"])

    @property
    def embedding_is_shared(self) -> bool:
        """Whether the last stage has a copy of the embedding, which gets the sum of both gradients."""
        return self.tied or self.mtp_layers > 0

    @property
    def unused_weight(self) -> str | None:
        """A parameter without a use: Megatron allocates an output layer that is tied to the embedding of its stage."""
        return "output_layer.weight" if self.tied and self.mtp_layers else None

    @property
    def has_main_weights(self) -> bool:
        """Whether the optimizer keeps float32 copies of the weights."""
        return self.dtype != "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
