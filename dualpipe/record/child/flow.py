"""What happens on one rank, told from where its tensors come from.

A *forward* is a connected piece of an autograd graph that begins at leaves: tensors received, loaded, or cut off from
the stage before with ``detach``.  It is given a number when the first module is called on those leaves, and every
later call on what it made goes on with it.  Its *backward* is the first run of the autograd engine that starts from
what it made; its *weight gradient* is whatever adds to the ``.grad`` of a parameter, in that run or later.

Which stage, microbatch and lane a forward is of cannot be seen from one rank.  It is found out afterwards, from the
events of all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from .forwards import Forwards, Parameters, Trials
from .log import Sink, place
from .tags import NONE, Marks, Table, key_of

_NODE = "dualpipe.record"  # the name of a forward's number in a graph node's metadata
_REPLACED = frozenset({"copy_", "set_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"})


def _only_shaped_like(operator: str) -> bool:
    """Whether an operator takes from a tensor its shape and none of its values."""
    return operator.endswith("_like") or operator.startswith("new_")


def marks(letter: str, numbers: Iterable[int]) -> Marks:
    return frozenset((letter, number) for number in numbers)


class Flow:
    """The state of the watch on one rank; every method is one thing that the program does."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._table = Table()
        self._forwards = Forwards()
        self._trials = Trials()
        self._parameters = Parameters()
        self._input_of: dict[int, int] = {}  # message -> the forward that takes it
        self._gradient_of: dict[int, int] = {}  # message -> the forward whose backward takes it
        self._cut: dict[int, int] = {}  # forward -> the one on this rank that takes its output
        self._messages = 0
        self._runs = 0
        self._context: Marks | None = None
        self.calling = 0  # depth of module calls
        self.running = 0  # depth of runs of the engine
        self._thread = threading.get_ident()
        self.caller = ""  # the class of the module that is being called

    def write(self, event: str, **fields: Any) -> None:
        self._sink({"event": event, **fields, "at": place()})

    def on_own_thread(self) -> bool:
        """Whether this is the thread that computes, and no helper that waits for messages beside it."""
        waiting_for = getattr(threading.current_thread(), "on_behalf_of", None)  # dualpipe's own, which waits for it
        return (waiting_for or threading.get_ident()) == self._thread

    def within(self, context: Marks | None) -> Marks | None:
        """Enter a context, whose marks everything made gets; returns the one left."""
        left, self._context = self._context, context
        return left

    # module calls

    def call(self, module: nn.Module, inputs: Sequence[Tensor]) -> Marks:
        """A module is about to be called, from outside any other; the marks of what it will make."""
        number, held = self._parameters.number(module)
        if held is not None:
            self.write("module", module=number, name=type(module).__qualname__, holds=held)
        going_on: set[int] = set()
        messages: set[int] = set()
        cuts: set[int] = set()
        find = self._forwards.find
        for tensor in inputs:
            cut = tensor.is_leaf and tensor.requires_grad
            for letter, n in self._table.get(tensor):
                if letter == "M":
                    messages.add(n)
                elif letter == "F":
                    (cuts if cut else going_on).add(find(n))
        going_on |= {find(self._input_of[m]) for m in messages if m in self._input_of}
        going_on |= {find(self._cut[c]) for c in cuts if c in self._cut}
        going_on = self._join(going_on)
        if len(going_on) > 1:  # a module that looks at several microbatches at once is no stage
            return marks("F", going_on)
        forward = next(iter(going_on)) if going_on else self._forwards.open()
        again = None if going_on or messages else self._trials.earlier(number, inputs, forward)
        self._forwards.called(forward, number)
        fresh = sorted(m for m in messages if m not in self._input_of)
        new_cuts = sorted(c for c in cuts if c not in self._cut and c != forward)
        self._input_of |= dict.fromkeys(fresh, forward)
        self._cut |= dict.fromkeys(new_cuts, forward)
        if not going_on or fresh or new_cuts:
            began = {"first": not going_on, "again": again, "grad": torch.is_grad_enabled()}
            self.write("forward", forward=forward, module=number, messages=fresh, after=new_cuts, **began)
        return marks("F", {forward})

    def called(self, made: Marks, output: Any) -> None:
        """The module has returned."""
        if len(made) == 1:
            ((_, forward),) = made
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    leaf.grad_fn.metadata[_NODE] = forward  # type: ignore[index] # typed as a method, and a property

    def _join(self, forwards: set[int]) -> set[int]:
        for first, part in list(self._forwards.join(forwards)):
            self.write("join", forward=first, part=part)
        return {self._forwards.find(f) for f in forwards}

    # runs of the autograd engine

    def run(self, roots: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> tuple[Marks, dict[int, Any]]:
        """The engine is about to run from ``roots``; the marks of what it will make, and the gradients before."""
        self._runs += 1
        held = frozenset(mark for g in grads if isinstance(g, Tensor) for mark in self._table.get(g))
        found = {forward for root in roots for forward in self._made_by(root)}
        if found:
            messages = sorted(number for letter, number in held if letter == "M")
            for message in messages:
                self._gradient_of.setdefault(message, min(found))
            fresh = sorted(found - self._forwards.behind)
            if fresh and not (inputs and all(map(self._is_weight, inputs))):
                self._forwards.behind.update(fresh)
                weightless = [f for f in fresh if not self._parameters.trainable(self._forwards.modules(f))]
                self.write("backward", forwards=fresh, messages=messages, run=self._runs, weightless=weightless)
            if any(map(self._is_weight, inputs)):
                self.write("weighed", forwards=sorted(found), run=self._runs)
        else:
            found = self._owners(held, None)
        self._forwards.interrupt()
        return marks("B", found), self._parameters.versions()

    def ran(self, made: Marks, before: dict[int, Any]) -> None:
        """The engine has returned."""
        holders = self._parameters.changed(before)
        changed = {f for _, f in made if any(self._forwards.calls_one_of(f, held) for held in holders)}
        if changed:
            self.write("weights", forwards=sorted(changed), run=self._runs)

    def _made_by(self, root: Tensor | GradientEdge) -> set[int]:
        """The forwards that a tensor was made by: over the graph, since a sent tensor's memory may be gone by now."""
        found: set[int] = set()
        seen: set[Any] = set()
        nodes: list[Any] = [root.node if isinstance(root, GradientEdge) else root.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            number = node.metadata.get(_NODE)
            if number is None:
                nodes.extend(following for following, _ in node.next_functions)
            else:
                found.add(self._forwards.find(number))
        if found or isinstance(root, GradientEdge):
            return found
        return {self._forwards.find(n) for letter, n in self._table.get(root) if letter == "F"}

    def _is_weight(self, wanted: Any) -> bool:
        if isinstance(wanted, GradientEdge):
            wanted = getattr(wanted.node, "variable", None)
        return wanted in self._parameters

    # operators and gradients

    def operator(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator has run: its results get the marks of the work that it belongs to, or else of its inputs."""
        mutable, name = func._schema.is_mutable, func._schema.name.rpartition("::")[2]
        memory = {key[0]: tensor for tensor in inputs if (key := key_of(tensor))}
        for output in outputs:
            key = key_of(output)
            if key is None:
                continue
            aliased = memory.get(key[0])
            if aliased is None:
                found = NONE if _only_shaped_like(name) else self._carried(inputs)
                self._table.put(output, found if self._context is None else self._context)
            elif not mutable:
                if not self._table.get(output):
                    self._table.put(output, self._table.get(aliased))
            elif self._context is not None:
                self._table.put(output, self._context)
            else:
                self._written(name, output, inputs)

    def _written(self, name: str, output: Tensor, inputs: list[Tensor]) -> None:
        """An operator outside all work has written to a tensor in place."""
        key = key_of(output)
        carried = self._carried([tensor for tensor in inputs if key_of(tensor) != key])
        parameter = self._parameters.with_gradient_at(key)
        if parameter is not None:
            self._weights(parameter, carried)
        else:
            self._table.put(output, carried if name in _REPLACED else self._table.get(output) | carried)

    def _carried(self, inputs: list[Tensor]) -> Marks:
        """The marks that results get from inputs; a parameter's gradient, the sum over microbatches, gives none."""
        found = frozenset(
            mark
            for tensor in inputs
            if self._parameters.with_gradient_at(key_of(tensor)) is None
            for mark in self._table.get(tensor)
        )
        if len(found) > 1 and not any(letter == "B" for letter, _ in found):
            self._join({self._forwards.find(number) for letter, number in found if letter == "F"})
        return found

    def assigned(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The program has set ``parameter.grad``."""
        if gradient is None or parameter not in self._parameters:
            return
        if self._parameters.with_gradient_at(key_of(gradient)) == id(parameter):
            return  # the second half of `p.grad += g`
        found = self._table.get(gradient)
        self._parameters.note_gradient(parameter)
        if self.running == 0:
            self._weights(id(parameter), found)

    def _weights(self, parameter: int, found: Marks) -> None:
        forwards = self._owners(found, self._parameters.holders(parameter))
        if forwards:
            self.write("weights", forwards=sorted(forwards), run=None)

    def _owners(self, found: Marks, holders: set[int] | None) -> set[int]:
        """The forwards that marked tensors belong to, by gradients before activations, among those of a parameter."""
        by_letter: dict[str, set[int]] = {"B": set(), "F": set()}
        for letter, number in found:
            if letter == "M":
                if number in self._gradient_of:
                    by_letter["B"].add(self._forwards.find(self._gradient_of[number]))
                elif number in self._input_of:
                    by_letter["F"].add(self._forwards.find(self._input_of[number]))
            else:
                by_letter[letter].add(self._forwards.find(number))
        for forwards in by_letter.values():
            kept = {f for f in forwards if holders is None or self._forwards.calls_one_of(f, holders)}
            if kept:
                return kept
        return set()

    # messages

    def post(self, messages: list[tuple[str, Tensor, int, list[int], int]]) -> list[int]:
        """Messages are about to be posted together: (send or receive, tensor, peer, ranks of the group, tag)."""
        numbers, told = [], []
        for kind, tensor, peer, group, tag in messages:
            number = self._messages
            self._messages += 1
            numbers.append(number)
            held = self._table.get(tensor) if kind == "send" else NONE
            told.append(
                {
                    "message": number,
                    "kind": kind,
                    "peer": peer,
                    "group": group,
                    "tag": tag,
                    "marks": sorted((letter, n if letter == "M" else self._forwards.find(n)) for letter, n in held),
                    "form": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                    "real": tensor.is_floating_point(),
                }
            )
            if kind == "receive":
                self._table.put(tensor, frozenset({("M", number)}))
        self._forwards.interrupt()
        inside = self.caller if self.calling else "backward" if self.running else ""
        self.write("post", messages=told, inside=inside)
        return numbers
