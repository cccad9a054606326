"""What happens on one rank, concluded from where its tensors come from.

A *forward* is a connected part of an autograd graph that begins at leaves: tensors that were received, loaded, or
detached from the previous stage.  It gets a number when the first module is called on those leaves, and every later
call on its output belongs to it.  Its *backward* is the first run of the autograd engine that starts from its output.
Its *weight gradient* is everything that adds to the ``.grad`` of a parameter, in that run or later.

One rank alone does not show the stage, the microbatch and the lane of a forward.  They are concluded afterwards from
the events of all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.utils._pytree import tree_leaves

from . import graph
from .buffers import Buffers
from .forwards import Forwards, Trials
from .log import Sink, call_path, line_of, program_line
from .marks import NONE, Key, Mark, Marks, Table, key_of
from .parameters import Parameters, state_of
from .runs import Runs

_DURING = "_dualpipe_during"  # an attribute of an error
_REPLACED = frozenset({"copy_", "set_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"})


def _only_shaped_like(operator: str) -> bool:
    """Whether an operator uses the shape of a tensor and none of its values."""
    return operator.endswith("_like") or operator.startswith("new_")


def _is_leaf(tensor: Tensor) -> bool:
    """Whether autograd begins at a tensor or at the one that it is a view of."""
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad


def marks(letter: str, numbers: Iterable[int]) -> Marks:
    return frozenset((letter, number) for number in numbers)


@dataclass
class Call:
    """An outermost call of a module.

    ``made`` are the marks of its results.  It is ``None`` for a call without tensors, which is no forward, until the
    module reads a tensor that was received or detached for it, or a parameter of its own.
    """

    module: nn.Module
    made: Marks | None = None
    left: Marks | None = None
    is_open: bool = False  # whether everything that happens belongs to it
    communicates: bool = False

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor is parameter for parameter in self.module._parameters.values())


class Flow:
    """The state of one rank; every method handles one thing that the program does."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._table = Table()
        self._forwards = Forwards()
        self._trials = Trials()
        self._parameters = Parameters()
        self._input_of: dict[int, int] = {}  # message -> the forward that takes its tensor
        self._next: dict[int, int] = {}  # forward -> the one on this rank that takes its detached output
        self._messages = 0
        self._posts = 0
        self.posted: list[int] = []  # the messages of the last post
        self._post_of: dict[int, int] = {}  # message -> the call of ``post`` that it was in
        # (forward, module, with gradients) -> the inputs of its calls
        self._given: dict[tuple[int, int, bool], set[tuple[Key | None, ...]]] = {}
        self._calls: list[Call] = []  # those that have not returned
        self._engine_runs = Runs(self.write, self._table, self._forwards, self._parameters)
        self._context: Marks | None = None
        self.calling = 0  # depth of module calls
        self.running = 0  # depth of runs of the engine
        self._thread = threading.get_ident()
        self.buffers = Buffers(self.write)
        self.caller = ""  # the class of the module that is being called

    def write(self, event: str, **fields: Any) -> None:
        self._sink({"event": event, "at": program_line(), **fields})

    def on_own_thread(self) -> bool:
        """Whether this is the thread that computes, or a helper thread that waits on its behalf."""
        waiting_for = getattr(threading.current_thread(), "on_behalf_of", None)  # set by dualpipe's transport
        return (waiting_for or threading.get_ident()) == self._thread

    def within(self, context: Marks | None) -> Marks | None:
        """Enter a context, whose marks every new tensor gets; returns the previous context."""
        left, self._context = self._context, context
        return left

    @property
    def context(self) -> Marks | None:
        """The marks of the module call or the run of the engine that is in progress."""
        return self._context

    # module calls

    def begin(self, module: nn.Module, inputs: Sequence[Tensor] | None) -> Call:
        """A module is called outside of other calls: with ``inputs``, to infer shapes (``[]``) or without tensors."""
        call = Call(module)
        self._calls.append(call)
        if inputs is not None:
            self._open(call, inputs)
        return call

    def _open(self, call: Call, inputs: Sequence[Tensor]) -> None:
        call.made = self.call(call.module, inputs) if inputs else None
        call.left, call.is_open = self.within(call.made), True
        self.calling, self.caller = 1, type(call.module).__qualname__

    def _open_inside(self, inputs: Sequence[Tensor]) -> None:
        """An operator runs in a module call without tensors, which may have its input as an attribute."""
        call = self._calls[-1]
        if call.is_open or call.communicates:
            return
        given = [tensor for tensor in inputs if tensor not in self._parameters]
        if any(map(call.holds, inputs)) or any(letter in "MC" for t in given for letter, _ in self._carried_by(t)):
            self._open(call, given or inputs)

    def end(self, call: Call) -> None:
        """The call has returned or raised."""
        self._calls.pop()
        if call.is_open:
            self.calling = 0
            self.within(call.left)

    def call(self, module: nn.Module, inputs: Sequence[Tensor]) -> Marks:
        """An outermost module call begins; returns the marks of its results."""
        number, held = self._parameters.number(module)
        if held is not None:
            self.write("module", module=number, name=type(module).__qualname__, holds=held)
            for tensor in state_of(module):  # received weights are not input data
                self._table.put(tensor, NONE)
        continued: set[int] = set()
        messages: set[int] = set()
        detached_from: set[int] = set()
        detached: set[int] = set()
        find = self._forwards.find
        for tensor in inputs:
            for letter, n in self._carried_by(tensor):
                if letter == "M":
                    messages.add(n)
                elif letter == "C":
                    detached_from.add(find(n))
                elif letter == "F":
                    continued.add(find(n))
                    if tensor.is_floating_point() and not self._is_joined_by_graph(tensor, n):
                        detached.add(find(n))
        continued |= {find(self._input_of[m]) for m in messages if m in self._input_of}
        continued -= detached_from  # with a leaf from its output a new stage begins, whatever else it takes from there
        continued |= {find(self._next[c]) for c in detached_from if c in self._next}
        continued = self._join(continued)
        if len(continued) > 1:  # a module that reads several microbatches at once is not a stage
            return marks("F", continued)
        forward = next(iter(continued)) if continued else self._forwards.open()
        again = None if continued or messages else self._trials.earlier(number, inputs, forward)
        self._forwards.called(forward, number)
        fresh, after = self._take(forward, messages, detached_from)
        if not continued or fresh or after:
            began = {"first": not continued, "again": again, "grad": torch.is_grad_enabled()}
            self.write("forward", forward=forward, module=number, messages=fresh, after=after, **began)
        if detached and torch.is_grad_enabled() and self._parameters.trainable({number}):
            self.write("doubt", what="detached", forward=forward)
        earlier = self._given.setdefault((forward, number, torch.is_grad_enabled()), set())
        given = tuple(map(key_of, inputs))
        if given in earlier:
            self.write("doubt", what="called again", forward=forward)
        earlier.add(given)
        return marks("F", {forward})

    def _take(self, forward: int, messages: Iterable[int], detached_from: Iterable[int]) -> tuple[list[int], list[int]]:
        """Assign to a forward the messages, and the forwards its leaves are detached from, that had no taker yet."""
        fresh = sorted(m for m in messages if m not in self._input_of)
        after = sorted(c for c in detached_from if c not in self._next and c != forward)
        self._input_of |= dict.fromkeys(fresh, forward)
        self._next |= dict.fromkeys(after, forward)
        for earlier in after:
            self._forwards.follows(forward, earlier)
        for message in fresh:
            self._forwards.takes(forward, self._post_of[message])
        return fresh, after

    def _take_inside(self, found: Marks) -> None:
        """The running module call has read tensors that are not among its arguments."""
        if not self.calling or self._context is None or len(self._context) != 1:
            return
        ((_, forward),) = self._context
        forward = self._forwards.find(forward)
        messages = (n for letter, n in found if letter == "M")
        detached_from = (self._forwards.find(n) for letter, n in found if letter == "C")
        fresh, after = self._take(forward, messages, detached_from)
        if fresh or after:
            began = {"first": False, "again": None, "grad": torch.is_grad_enabled()}
            module = min(self._forwards.modules(forward))
            self.write("forward", forward=forward, module=module, messages=fresh, after=after, **began)

    def called(self, made: Marks, output: Any) -> None:
        """The outermost module call has returned."""
        if len(made) == 1:
            ((_, forward),) = made
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    graph.mark(leaf.grad_fn, forward)
                    leaf.grad_fn.register_prehook(partial(self._reach, forward))
                    self._forwards.put_in_graph(self._forwards.find(forward))
            roots = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self.buffers.called(roots, self._forwards.find(forward))

    def _join(self, forwards: set[int]) -> set[int]:
        for first, part in list(self._forwards.join(forwards)):
            self.write("join", forward=first, part=part)
        return {self._forwards.find(f) for f in forwards}

    # runs of the autograd engine

    def run(self, roots: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> Marks:
        """The engine is about to run from ``roots``; returns the marks of its results."""
        held = frozenset(mark for g in grads if isinstance(g, Tensor) for mark in self._table.get(g))
        found = self._engine_runs.begin(roots, grads, inputs, lambda: self._owners(held, None))
        self._forwards.interrupt()
        return marks("B", found)

    def ran(self, completed: bool) -> None:
        """The engine has returned, or raised."""
        self._engine_runs.end(completed)

    def _reach(self, forward: int, gradients: Sequence[Any]) -> None:
        """The engine is about to run the node of an output of a forward."""
        if self.running and (alone := self._engine_runs.reach(forward, gradients)):
            self._context = marks("B", alone)

    # operators and gradients

    def operator(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator has run: its results get the marks of the context, or else of its inputs."""
        if self._calls and not self.calling and not self.running:
            self._open_inside(inputs)
        mutable, name = func._schema.is_mutable, func._schema.name.rpartition("::")[2]
        memory = {key[0]: tensor for tensor in inputs if (key := key_of(tensor))}
        for output in outputs:
            key = key_of(output)
            if key is None:
                continue
            aliased = memory.get(key[0])
            if aliased is None:
                found = NONE if _only_shaped_like(name) else self._carried(inputs)
                self._take_inside(found)
                transit = self._engine_runs.in_transit()
                received = frozenset(mark for mark in found if mark[0] == "M" and mark[1] in transit)
                self._table.put(output, found if self._context is None else self._context | received)
            elif not mutable:
                if not self._table.get(output):
                    self._table.put(output, self._carried_by(aliased))
            elif self._context is not None:
                self._take_inside(self._carried(inputs))
                self._table.put(output, self._context)
                if self.running and (parameter := self._parameters.with_gradient_at(key)) is not None:
                    self._parameters.add_to(parameter)
            else:
                self._written(name, output, inputs)

    def _written(self, name: str, output: Tensor, inputs: list[Tensor]) -> None:
        """An operator outside of every context has written to a tensor in place."""
        key = key_of(output)
        carried = self._carried([tensor for tensor in inputs if key_of(tensor) != key])
        parameter = self._parameters.with_gradient_at(key)
        if parameter is not None:
            self._weights(parameter, carried)
        else:
            self._table.put(output, carried if name in _REPLACED else self._table.get(output) | carried)

    def _carried(self, inputs: list[Tensor]) -> Marks:
        """The marks of all inputs but parameters and their gradients, which forwards share."""
        carried = [
            (tensor, self._carried_by(tensor))
            for tensor in inputs
            if tensor not in self._parameters and self._parameters.with_gradient_at(key_of(tensor)) is None
        ]
        found = frozenset(mark for _, held in carried for mark in held)
        if len(found) > 1 and not any(letter == "B" for letter, _ in found):
            self._join(
                {
                    self._forwards.find(number)
                    for tensor, held in carried
                    for letter, number in held
                    if letter == "F" and self._is_joined_by_graph(tensor, number)
                }
            )
        return found

    def _carried_by(self, tensor: Tensor) -> Marks:
        """The marks that one tensor passes on to results."""
        found = self._table.get(tensor)
        if found and _is_leaf(tensor):
            return frozenset(("C" if letter == "F" else letter, number) for letter, number in found)
        return found

    def _is_joined_by_graph(self, tensor: Tensor, forward: int) -> bool:
        """Whether a computation on a tensor belongs to the forward that made the tensor.

        The autograd graph shows this.  If the forward has no graph (frozen, or without gradients), it always belongs.
        """
        within = tensor.requires_grad and torch.is_grad_enabled()
        return within or not self._forwards.is_in_graph(self._forwards.find(forward))

    def assigned(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The program has set ``parameter.grad``."""
        if gradient is None or parameter not in self._parameters:
            return
        if self._parameters.with_gradient_at(key_of(gradient)) == id(parameter):
            return  # the second half of `p.grad += g`
        found = self._table.get(gradient)
        self._parameters.note_gradient(parameter)
        if self.running:
            self._parameters.add_to(id(parameter))
        else:
            self._weights(id(parameter), found)

    def _weights(self, parameter: int, found: Marks) -> None:
        forwards = self._owners(found, self._parameters.holders(parameter))
        if forwards:
            self.write("weights", forwards=sorted(forwards), run=None)

    def _content(self, mark: Mark) -> Mark:
        """What a mark says about a tensor that is sent.  One computed from a leaf is of the forward that took it."""
        letter, number = mark
        if letter == "M":
            return mark
        if letter == "C":
            letter, number = "F", self._next.get(number, number)
        return letter, self._forwards.find(number)

    def _owners(self, found: Marks, holders: set[int] | None) -> set[int]:
        """The forwards of the marks among those of ``holders``: by gradients if possible, else by activations."""
        by_letter: dict[str, set[int]] = {"B": set(), "F": set()}
        for letter, number in found:
            if letter == "M":
                if number in self._engine_runs.gradient_of:
                    by_letter["B"].add(self._forwards.find(self._engine_runs.gradient_of[number]))
                elif number in self._input_of:
                    by_letter["F"].add(self._forwards.find(self._input_of[number]))
            elif letter == "C":
                by_letter["F"].add(self._forwards.find(self._next.get(number, number)))
            else:
                by_letter[letter].add(self._forwards.find(number))
        for forwards in by_letter.values():
            kept = {f for f in forwards if holders is None or self._forwards.calls_one_of(f, holders)}
            if kept:
                return kept
        return set()

    def stop(self) -> None:
        """Take back what was changed in the program's objects."""
        self._parameters.stop_listening()

    # errors

    def broke(self, error: BaseException, what: str, numbers: Iterable[int]) -> None:
        """An error has left a module call (F), a run of the engine (B) or a message (M)."""
        if not hasattr(error, _DURING):
            with suppress(AttributeError, TypeError):  # a class without attributes of its own
                setattr(error, _DURING, (what, sorted(numbers)))

    def raised(self, error: BaseException) -> None:
        """The program ends by an error."""
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        if isinstance(error, SystemExit):  # as torch.multiprocessing ends a process after an error
            error = next((other for other in chain[1:] if isinstance(other, Exception)), error)
        during = next((found for other in chain if (found := getattr(other, _DURING, None)) is not None), None)
        at = line_of(error)
        self.write("raised", error=type(error).__name__, text=str(error), during=during, time=time.time(), place=at)

    # messages

    def post(self, messages: list[tuple[str, Tensor, int, Any, int]]) -> list[int]:
        """Messages are about to be posted together: (send or receive, tensor, peer, group, tag)."""
        numbers, posted = [], []
        self._posts += 1
        for kind, tensor, peer, group, tag in messages:
            number = self._messages
            self._messages += 1
            self._post_of[number] = self._posts
            group = group or c10d._get_default_group()
            numbers.append(number)
            held = self._table.get(tensor) if kind == "send" else NONE
            posted.append(
                {
                    "message": number,
                    "kind": kind,
                    "peer": peer,
                    "group": c10d.get_process_group_ranks(group),
                    "group_name": group.group_name,
                    "tag": tag,
                    "marks": sorted(set(map(self._content, held))),
                    "memory": key_of(tensor),
                    "form": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                    "real": tensor.is_floating_point(),
                }
            )
            if kind == "receive":
                self._table.put(tensor, frozenset({("M", number)}))
        self._forwards.interrupt()
        self.posted = numbers
        self._engine_runs.post(numbers)
        for call in self._calls:
            call.communicates = True
        inside = self.caller if self.calling else "backward" if self.running else ""
        self.write("post", messages=posted, inside=inside, at=call_path())
        return numbers
