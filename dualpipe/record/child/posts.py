"""The messages of one rank as they are posted: their numbers, and what each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from .freed import Freed
from .marks import Table, key_of
from .origins import Origins
from .parameters import Parameters

Posted = tuple[str, Tensor, int, Any, int, str]
"""Whether to send or to receive, the tensor, the peer, the group, the tag, and the line of the program.

An empty line is that of the post.
"""


class Posts:
    """Numbers the messages of one rank, and marks the tensors that it receives."""

    def __init__(self, table: Table, origins: Origins, parameters: Parameters, freed: Freed) -> None:
        self._table, self._origins, self._parameters, self._freed = table, origins, parameters, freed
        self._messages = self._posts = 0

    def add(self, messages: Sequence[Posted]) -> list[dict[str, Any]]:
        """Messages that are posted together, as the log has them."""
        posted = [self._message(*message) for message in messages]
        self._posts += 1
        self._origins.posted([message["message"] for message in posted], self._posts)
        return posted

    def _message(self, kind: str, tensor: Tensor, peer: int, group: Any, tag: int, at: str) -> dict[str, Any]:
        number, self._messages = self._messages, self._messages + 1
        group = group or c10d._get_default_group()
        sends = kind == "send"
        weights = self._parameters.with_gradients_in(tensor) if sends else []
        found = {
            "message": number,
            "kind": kind,
            "peer": peer,
            "group": c10d.get_process_group_ranks(group),
            "group_name": group.group_name,
            "tag": tag,
            "marks": self._origins.content(tensor, self._freed.held(tensor)) if sends else [],
            "weights": [self._parameters.name(parameter) for parameter in weights],
            "memory": key_of(tensor),
            "form": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
            "real": tensor.is_floating_point(),
            "at": at,
        }
        if not sends:
            self._table.put(tensor, frozenset({("M", number)}))
        return found
