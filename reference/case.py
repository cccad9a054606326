"""What is verified: a schedule, a model, data and a number of steps, the same for every implementation."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dualpipe.errors import RuleError
from dualpipe.schedule import COLLECTIVES, Lane, Schedule, overlapped_pairs
from reference.data import Steps, training_data
from reference.model import ModelConfig, build_stage, criterion

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_LEARNING_RATE = 3e-3
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class SettingsError(RuleError):
    """Settings under which two runs on a GPU may give different bits."""


@dataclass(frozen=True)
class Case:
    """One verification.

    ``device``: where production and the oracle compute, ``cpu`` or ``cuda``.  ``staged``: messages go through host
    memory.  ``blocking``: a rank waits for all messages of a slot before it goes on, as after ``batch_isend_irecv``.
    ``timeout``: seconds to wait for a message before reporting a hang.  ``timed``: production records when its ops ran.
    ``overlap``: the class of production's stages has ``overlapped_forward_backward``, which runs B within F.

    Raises ``RuleError`` for a number of steps, a device or a timeout that is not valid.
    """

    schedule: Schedule
    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 3
    seed: int = 0
    device: str = "cpu"
    staged: bool = False
    blocking: bool = False
    timeout: float = 60.0
    timed: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RuleError("a verification must train for at least one step", f"got {self.steps}", "use 1 or more")
        together = next((placed for placed in self.schedule if placed.op.kind in COLLECTIVES), None)
        if together is not None:
            got = f"rank {together.rank} has the collective {together.op} in slot {together.slot}"
            raise RuleError(
                "a verification must have only computes and messages", got, "use schedule.only(COMPUTE | MESSAGES)"
            )
        if self.overlap and not any(overlapped_pairs(slot) for program in self.schedule.programs for slot in program):
            raise RuleError(
                "an overlap needs a schedule with an F and a B of two chunks in one slot",
                f"{self.schedule.name or 'the schedule'} has none",
                "use dualpipe or dualpipev, or leave the overlap off",
            )
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise RuleError("the device must be cpu or cuda", f"got {self.device}", "use one of them")
        if not 0 < self.timeout < 1e6:
            raise RuleError("the timeout must be a positive number of seconds", f"got {self.timeout}", "use 60")

    @property
    def on_gpu(self) -> bool:
        return self.device.partition(":")[0] == "cuda"

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.schedule.lanes

    @property
    def microbatches(self) -> int:
        return sum(self.schedule.microbatches.values())

    def stage(self, stage: int) -> nn.Module:
        return build_stage(self.model, stage, self.schedule.stages, self.seed, self.device)

    def data(self) -> Steps:
        """``[step][lane][microbatch]``, lanes ``>`` before ``<``, on ``device``."""
        counts = [self.schedule.microbatches[lane] for lane in self.lanes]
        steps = training_data(self.steps, counts, self.model.batch, self.model.sequence, self.seed)
        return [[[batch.to(self.device) for batch in lane] for lane in step] for step in steps]

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy divided by the number of all microbatches of the step."""
        return criterion(logits, targets, 1 / self.microbatches)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        # foreach kernels would group the parameters differently in each implementation
        return torch.optim.AdamW(parameters, lr=_LEARNING_RATE, foreach=False)


def make_deterministic(device: str) -> None:
    """Choose the settings with which a GPU gives the same bits in every run; a CPU needs none."""
    if torch.device(device).type != "cuda":
        return
    os.environ.setdefault(*_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    require_deterministic()


def require_deterministic() -> None:
    """Raise ``SettingsError`` naming every setting with which a GPU may give different bits in a second run."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    wanted = {
        "torch.use_deterministic_algorithms(True)": torch.are_deterministic_algorithms_enabled(),
        f"{_WORKSPACE[0]}=:4096:8 or :16:8": os.environ.get(_WORKSPACE[0]) in (":4096:8", ":16:8"),
        "torch.backends.cuda.matmul.allow_tf32 = False": not matmul.allow_tf32,
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False": (
            not matmul.allow_bf16_reduced_precision_reduction
        ),
        "torch.backends.cudnn.allow_tf32 = False": not cudnn.allow_tf32,
        "torch.backends.cudnn.benchmark = False": not cudnn.benchmark,
    }
    missing = [setting for setting, holds in wanted.items() if not holds]
    if missing:
        raise SettingsError(
            "bitwise comparison on a GPU needs deterministic settings",
            f"not set: {', '.join(missing)}",
            "set them before the first CUDA call",
        )
