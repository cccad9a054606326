"""The losses of multi-token prediction (MTP) layers, which Megatron keeps apart from the results of the loss function.

Megatron adds each such loss to a tracker on the rank that computed it, and its training loop logs the tracker of the
last rank.  With two lanes half of these losses are computed on the first rank, and in a V all of them.  So after each
step the losses are moved to the last rank's tracker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from dualpipe.megatron.losses import collect_losses
from dualpipe.runtime.transport import Transport
from dualpipe.schedule import Lane


def collect_mtp_losses(ends: Sequence[tuple[Lane, int]], transport: Transport, device: torch.device) -> None:
    """Move the tracked losses, float32 ``[layers]``, to the last rank and sum them in its tracker.

    ``ends`` names for each lane the rank of its last stage, which has tracked the losses of that lane.
    """
    tracker = MTPLossLoggingHelper.tracker
    mine = tracker.pop("values", None)
    own = {lane: [mine] for lane, rank in ends if rank == transport.rank and mine is not None}
    found: list[Tensor] = collect_losses(own, ends, transport, device)
    if found:
        tracker["values"] = torch.stack(found).sum(dim=0)
        tracker["reduce_group"] = None
        tracker["avg_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
