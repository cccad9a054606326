"""The messages of a rank that were posted and have not completed.

A wait of gloo cannot be interrupted, and one that times out closes the connections.  So the main thread waits by itself
only for what has arrived (``dualpipe.runtime.wire``), and otherwise for a helper thread that waits for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta

from dualpipe.runtime.helper_thread import NO_TIMEOUT, Job
from dualpipe.runtime.peers import Peers
from dualpipe.runtime.transport import Message, MessageError
from dualpipe.runtime.wire import Marks

_POLL_SECONDS = 0.002
_LOOK_SECONDS = 1.0
"""How often a wait looks whether the pipeline has failed; it ends at the second look that finds so."""
_TURNS = 10
"""How often other processes get a turn before a wait is left to the helper thread, which takes longer."""


class Outstanding:
    """Waits for messages, each within ``timeout`` seconds.  ``in_stream_order``: their works end in a stream."""

    def __init__(self, peers: Peers, timeout: float, in_stream_order: bool) -> None:
        self._peers, self._timeout, self._limit = peers, timeout, timedelta(seconds=timeout)
        self._in_stream_order = in_stream_order
        self._helper = peers.helper("dualpipe-waits")
        self._messages: dict[Message, None] = {}  # in the order posted

    def add(self, messages: Sequence[Message]) -> None:
        """Messages that are about to be posted."""
        if self._in_stream_order:  # polled, as the arrival of others does not show on the host
            for message in [message for message in self._messages if _completed(message)]:
                del self._messages[message]
        self._messages.update(dict.fromkeys(messages))

    def clear(self) -> None:
        """Forget all messages."""
        self._messages.clear()

    def wait(self, message: Message) -> None:
        """Wait for a message, and let go of the sends that it proves to have been received.

        Raises ``MessageError``, and ``StageError`` if the tensor of a send was written to.
        """
        if self._in_stream_order:
            self._complete(message)
            message.completed = not message.sends
            return
        if message.marks is not None and _arrives(message.marks):
            self._finish(message)
        else:
            self._await([message])
        for send in message.proves:
            self._finish(send)
        message.proves = ()

    def drain(self) -> None:
        """Wait for all messages."""
        deadline = time.monotonic() + self._timeout
        if not self._in_stream_order:
            self._await(list(self._messages))
        for message in self._messages:
            if not message.completed:
                self._complete(message)
        for message in self._messages:
            self._poll(message, deadline)
            message.release()
        self._messages.clear()

    def explain(self, message: Message, started: float, cause: BaseException | None) -> MessageError:
        """The error of a message, with the reason for which its peer failed if the peer gave one."""
        seconds = time.monotonic() - started
        reason = self._peers.reason(message.peer)
        return MessageError(message, seconds, cause if reason is None else RuntimeError(reason))

    def _complete(self, message: Message, limit: timedelta = NO_TIMEOUT) -> None:
        """Wait for the message's works, once: a second wait on gloo would wait for the next message."""
        started = time.monotonic()
        try:
            for work in message.works:
                if self._in_stream_order:
                    work.wait()  # with a timeout the host would wait, and nothing could run ahead
                else:
                    work.wait(limit)
        except RuntimeError as error:
            raise MessageError(message, time.monotonic() - started, error) from error
        if not self._in_stream_order:
            message.works.clear()
            message.release()
            self._drop(message)

    def _drop(self, message: Message) -> None:
        message.completed, message.marks = True, None
        self._messages.pop(message, None)

    def _finish(self, message: Message) -> None:
        """Complete a message that is known to have arrived, in this thread."""
        if message.posted and not message.completed:
            started = time.monotonic()
            try:
                self._complete(message, self._limit)
            except MessageError as error:
                self._fail(error, started)

    def _await(self, messages: Sequence[Message]) -> None:
        """Wait for messages that the helper thread completes, one after another."""
        left, started = [message for message in messages if not message.completed], time.monotonic()
        while left:
            job = self._helper.submit(self._complete_all, left, caller_waits=True)
            self._watch(job, left, started)
            try:
                job.result(0.0)
            except MessageError as error:
                self._fail(error, started)
            left = [message for message in left if not message.completed]

    def _watch(self, job: Job, messages: Sequence[Message], started: float) -> None:
        """Return when the job is done.  Raises ``MessageError`` after the timeout, or if the pipeline has failed.

        A failure closes the connections, which ends most waits at once.  gloo can miss a message that is posted at that
        moment.
        """
        deadline, failed = time.monotonic() + self._timeout, False
        while not job.wait(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
            late = next((message for message in messages if not message.completed), messages[0])
            if failed:
                raise self.explain(late, started, None)
            if time.monotonic() >= deadline:
                raise MessageError(late, self._timeout, None)
            failed = self._peers.failure is not None

    def _complete_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._complete(message)

    def _fail(self, error: MessageError, started: float) -> None:
        """Raise the error of a message with its reason, unless its peer has received it and ended."""
        message = error.message
        explained = self.explain(message, started, error.__cause__)
        if not (message.sends and message.peer in self._peers.ended):
            raise explained from error
        self._drop(message)

    def _poll(self, message: Message, deadline: float) -> None:
        """Block the host until the message's works have completed: in stream order ``wait`` does not."""
        while not _completed(message):
            if why := self._peers.failure or self._peers.disconnected.get(message.peer):
                raise MessageError(message, 0.0, RuntimeError(why))
            if time.monotonic() > deadline:
                raise MessageError(message, self._timeout, None)
            time.sleep(_POLL_SECONDS)


def _completed(message: Message) -> bool:
    return all(work.is_completed() for work in message.works)


def _arrives(marks: Marks) -> bool:
    """Whether a message has arrived, or does so while other processes get a turn."""
    for _ in range(_TURNS):
        if marks.gone():
            return True
        os.sched_yield()
    return marks.gone()
