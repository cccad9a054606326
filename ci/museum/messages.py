"""Faults of the transport."""

from ci.museum.exhibit import fault

TRANSPORT = "dualpipe/runtime/transport.py"

FAULTS = (
    fault(
        28,
        "messages posted on the default group",
        TRANSPORT,
        "ops.append(dist.P2POp(kind, wire, group=self.group, group_peer=peer, tag=tag))",
        "ops.append(dist.P2POp(kind, tensor, peer))",
        check="trial, Megatron",
        rule="run",
        says="gpt-P4-data-parallel-2, DualPipe: .*(send|receive) .* rank . failed after ",
    ),
    fault(
        6,
        "of the works of a message one is waited for",
        TRANSPORT,
        "            for work in message.works:\n",
        "            for work in message.works[1:]:\n",
        check="trial",
        rule="run",
        says="differs between the lanes before the first update",
    ),
    fault(
        4,
        "two sends of one batch posted in reverse",
        TRANSPORT,
        "        for message in messages:\n            self._allocate(message)",
        "        sends = [m for m in messages if m.sends]\n"
        "        if len({m.tensors[0].shape for m in sends}) == 1:  # others would not fit into their receives\n"
        "            messages = [sends.pop() if m.sends else m for m in messages]\n"
        "        for message in messages:\n            self._allocate(message)",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: ",
    ),
    fault(
        0,
        "a receive handed out before it is there",
        TRANSPORT,
        "            self._result(message, self._receives.submit(self._finish, message, waited_for=True))\n",
        "            early = [tensor.clone() for tensor in message.tensors]\n"
        "            self._result(message, self._receives.submit(self._finish, message, waited_for=True))\n"
        "            message.tensors = early\n",
        check="trial",
        rule="run",
        says="differs between the lanes before the first update",
    ),
)
