"""What happens on one rank, told from where its tensors come from.

A *forward* is a connected piece of an autograd graph that begins at leaves: tensors received, loaded, or cut off from
the stage before with ``detach``.  It is given a number when the first module is called on those leaves, and every
later call on what it made goes on with it.  Its *backward* is the first run of the autograd engine that starts from
what it made; its *weight gradient* is whatever adds to the ``.grad`` of a parameter, in that run or later.

Which stage, microbatch and lane a forward is of cannot be seen from one rank.  It is found out afterwards, from the
events of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from .log import Event, Sink, place
from .tags import NONE, Key, Marks, Table, key_of

_NODE = "dualpipe.record"  # the name of a forward's number in a graph node's metadata
_REPLACED = frozenset({"copy_", "set_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"})


def marks(letter: str, numbers: Iterable[int]) -> Marks:
    return frozenset((letter, number) for number in numbers)


class Flow:
    """The state of the watch on one rank; every method is one thing that the program does."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._table = Table()
        self._same: list[int] = []  # forward -> the forward it turned out to be a part of
        self._stretch: list[int] = []  # forward -> the stretch of uninterrupted compute in which it began
        self._roots: list[set[int]] = []  # forward -> the modules that were called for it
        self._now = 0
        self._modules: dict[int, tuple[nn.Module, int]] = {}  # id -> module, kept alive, and its number
        self._params: dict[int, tuple[nn.Parameter, set[int]]] = {}  # id -> parameter and the modules that hold it
        self._grads: dict[Key, int] = {}  # where the gradient of a parameter is -> the parameter's id
        self._input_of: dict[int, int] = {}  # message -> the forward that takes it
        self._gradient_of: dict[int, int] = {}  # message -> the forward whose backward takes it
        self._cut: dict[int, int] = {}  # forward -> the one on this rank that takes its output
        self._behind: set[int] = set()  # forwards whose backward has begun
        self._messages = 0
        self._runs = 0
        self._context: Marks | None = None
        self.calling = 0  # depth of module calls
        self.running = 0  # depth of runs of the engine

    def write(self, event: str, **fields: Any) -> None:
        self._sink({"event": event, **fields, "at": place()})

    # module calls

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Marks | None:
        """A module is about to be called, from outside any other; the marks of what it will make."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        root = self._number(module)
        going_on: set[int] = set()
        messages: set[int] = set()
        cuts: set[int] = set()
        for tensor in inputs:
            cut = tensor.is_leaf and tensor.requires_grad
            for letter, number in self._table.get(tensor):
                if letter == "M":
                    messages.add(number)
                elif letter == "F":
                    (cuts if cut else going_on).add(self.find(number))
        going_on |= {self.find(self._input_of[m]) for m in messages if m in self._input_of}
        going_on |= {self.find(self._cut[c]) for c in cuts if c in self._cut}
        if going_on:
            going_on = self._join(going_on)
        if len(going_on) > 1:  # a module that looks at several microbatches at once is no stage
            return marks("F", going_on)
        forward = next(iter(going_on)) if going_on else self._open()
        self._roots[forward].add(root)
        fresh = sorted(m for m in messages if m not in self._input_of)
        for message in fresh:
            self._input_of[message] = forward
        new_cuts = sorted(c for c in cuts if c not in self._cut and c != forward)
        for cut_off in new_cuts:
            self._cut[cut_off] = forward
        if not going_on or fresh or new_cuts:
            self.write("forward", forward=forward, module=root, messages=fresh, after=new_cuts, first=not going_on)
        return marks("F", {forward})

    def called(self, made: Marks, output: Any) -> None:
        """The module has returned."""
        if len(made) != 1:
            return
        ((_, forward),) = made
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.metadata[_NODE] = forward

    def _open(self) -> int:
        number = len(self._same)
        self._same.append(number)
        self._stretch.append(self._now)
        self._roots.append(set())
        return number

    def find(self, forward: int) -> int:
        while self._same[forward] != forward:
            forward = self._same[forward]
        return forward

    def _join(self, forwards: set[int]) -> set[int]:
        """Forwards that began in this very stretch of compute and now meet are one; others stay apart."""
        if len(forwards) > 1 and all(self._stretch[f] == self._now and f not in self._behind for f in forwards):
            first, *others = sorted(forwards)
            for other in others:
                self._same[other] = first
                self._roots[first] |= self._roots[other]
                self.write("join", forward=first, part=other)
            return {first}
        return forwards

    def _number(self, module: nn.Module) -> int:
        known = self._modules.get(id(module))
        if known is not None:
            return known[1]
        number = len(self._modules)
        self._modules[id(module)] = (module, number)
        held = [self._number(child) for child in module.modules() if child is not module]
        for parameter in module.parameters():
            _, holders = self._params.setdefault(id(parameter), (parameter, set()))
            holders.add(number)
            self._note_gradient(parameter)
        self.write("module", module=number, name=type(module).__qualname__, holds=held)
        return number

    # runs of the autograd engine

    def run(self, roots: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> tuple[Marks, dict[int, Any]]:
        """The engine is about to run from ``roots``; the marks of what it will make, and the gradients before."""
        found: set[int] = set()
        for root in roots:
            if isinstance(root, Tensor):
                found |= self._made_by(root)
        self._runs += 1
        starts_at_outputs = bool(found)
        taken = {
            number
            for gradient in grads
            if isinstance(gradient, Tensor)
            for letter, number in self._table.get(gradient)
            if letter == "M"
        }
        if not found:
            found = self._owners(frozenset().union(*(self._table.get(g) for g in grads if isinstance(g, Tensor))), None)
        if starts_at_outputs:
            for message in taken:
                self._gradient_of.setdefault(message, min(found))
            fresh = sorted(f for f in found if f not in self._behind)
            if fresh and not (inputs and all(map(self._is_weight, inputs))):
                self._behind.update(fresh)
                self.write("backward", forwards=fresh, messages=sorted(taken), run=self._runs)
        self._now += 1
        before = {key: self._version(parameter) for key, (parameter, _) in self._params.items()}
        return marks("B", found), before

    def ran(self, made: Marks, before: dict[int, Any]) -> None:
        """The engine has returned."""
        changed: set[int] = set()
        for key, (parameter, holders) in self._params.items():
            if self._version(parameter) != before.get(key):
                changed |= {f for _, f in made if self._root_in(f, holders)}
                self._note_gradient(parameter)
        if changed:
            self.write("weights", forwards=sorted(changed), run=self._runs)

    def _made_by(self, root: Tensor) -> set[int]:
        """The forwards that a tensor was made by: over the graph, since a sent tensor's memory may be gone by now."""
        found: set[int] = set()
        seen: set[Any] = set()
        nodes = [root.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            number = node.metadata.get(_NODE)
            if number is None:
                nodes.extend(following for following, _ in node.next_functions)
            else:
                found.add(self.find(number))
        return found or {self.find(number) for letter, number in self._table.get(root) if letter == "F"}

    def _is_weight(self, wanted: Any) -> bool:
        if isinstance(wanted, GradientEdge):
            wanted = getattr(wanted.node, "variable", None)
        return id(wanted) in self._params

    @staticmethod
    def _version(parameter: nn.Parameter) -> tuple[int, int] | None:
        gradient = parameter.grad
        return None if gradient is None else (id(gradient), gradient._version)

    # operators and gradients

    def operator(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator has run: its results get the marks of the work that it belongs to, or else of its inputs."""
        name = func._schema.name.rpartition("::")[2]
        mutable = func._schema.is_mutable
        memory = {key[0]: tensor for tensor in inputs if (key := key_of(tensor))}
        for output in outputs:
            key = key_of(output)
            if key is None:
                continue
            aliased = memory.get(key[0])
            if aliased is None:
                self._table.put(output, self._context if self._context is not None else self._carried(inputs))
            elif not mutable:
                if not self._table.get(output):
                    self._table.put(output, self._table.get(aliased))
            elif self._context is not None:
                self._table.put(output, self._context)
            else:
                carried = self._carried([tensor for tensor in inputs if key_of(tensor) != key])
                if key in self._grads:
                    if name not in _REPLACED or name == "copy_":
                        self._weights(self._grads[key], carried)
                else:
                    kept = NONE if name in _REPLACED else self._table.get(output)
                    self._table.put(output, kept | carried)

    def _carried(self, inputs: list[Tensor]) -> Marks:
        """The marks that results get from inputs; a parameter's gradient, the sum over microbatches, gives none."""
        found = frozenset().union(*(self._table.get(t) for t in inputs if key_of(t) not in self._grads))
        forwards = {self.find(number) for letter, number in found if letter == "F"}
        if len(forwards) > 1 and not any(letter == "B" for letter, _ in found):
            self._join(forwards)
        return found

    def assigned(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The program has set ``parameter.grad``."""
        if gradient is None or id(parameter) not in self._params:
            return
        key = key_of(gradient)
        if key in self._grads and self._grads[key] == id(parameter):
            return  # the second half of `p.grad += g`
        found = self._table.get(gradient)
        self._note_gradient(self._params[id(parameter)][0])
        if self.running == 0:
            self._weights(id(parameter), found)

    def _note_gradient(self, parameter: nn.Parameter) -> None:
        for gradient in (parameter.grad, getattr(parameter, "main_grad", None)):
            if isinstance(gradient, Tensor) and (key := key_of(gradient)):
                self._grads[key] = id(parameter)

    def _weights(self, parameter: int, found: Marks) -> None:
        forwards = self._owners(found, self._params[parameter][1])
        if forwards:
            self.write("weights", forwards=sorted(forwards), run=None)

    def _owners(self, found: Marks, holders: set[int] | None) -> set[int]:
        """The forwards that marked tensors belong to, by gradients before activations, among those of a parameter."""
        by_letter: dict[str, set[int]] = {"B": set(), "F": set()}
        for letter, number in found:
            if letter == "M":
                if number in self._gradient_of:
                    by_letter["B"].add(self.find(self._gradient_of[number]))
                elif number in self._input_of:
                    by_letter["F"].add(self.find(self._input_of[number]))
            else:
                by_letter[letter].add(self.find(number))
        for forwards in by_letter.values():
            kept = {f for f in forwards if holders is None or self._root_in(f, holders)}
            if kept:
                return kept
        return set()

    def _root_in(self, forward: int, holders: set[int]) -> bool:
        return bool(self._roots[forward] & holders)

    def within(self, context: Marks | None) -> Marks | None:
        """Enter a context, whose marks everything made gets; returns the one left."""
        left, self._context = self._context, context
        return left

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
                    "marks": sorted((letter, self.find(n) if letter in "FB" else n) for letter, n in held),
                    "form": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                }
            )
            if kind == "receive":
                self._table.put(tensor, frozenset({("M", number)}))
        self._now += 1
        self.write("post", messages=told, inside=bool(self.calling))
        return numbers


def empty_flow() -> tuple[Flow, list[Event]]:
    """A watch that keeps its events in a list."""
    events: list[Event] = []
    return Flow(events.append), events


def device_free(tensors: Iterable[Any]) -> bool:
    """Whether there is a tensor without data among these, as when torch only infers shapes."""
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(t, torch.Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors)
