"""Faults of the Megatron drop-in."""

from ci.museum.exhibit import fault

LAYERS, ITERATORS, LOSSES = (
    "dualpipe/megatron/layers.py",
    "dualpipe/megatron/iterators.py",
    "dualpipe/megatron/losses.py",
)

FAULTS = (
    fault(
        12,
        "Megatron: a weight counted twice in the split",
        LAYERS,
        "        call.store.put(call.key, lambda: _accumulate(x, dy, call))\n",
        "        for _ in range(2):\n            call.store.put(call.key, lambda: _accumulate(x, dy, call))\n",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        13,
        "Megatron: W adds to the gradient past the data-parallel hooks",
        LAYERS,
        "    torch.autograd.backward(leaves, gradients)\n",
        "    for leaf, gradient in zip(leaves, gradients, strict=True):\n"
        "        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient\n",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        27,
        "Megatron: the data of the two lanes swapped",
        ITERATORS,
        "        owner = LANES[self.read % len(LANES)]\n",
        "        owner = LANES[-1 - self.read % len(LANES)]\n",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        22,
        "Megatron: the losses of lane < lost on the way to the last rank",
        LOSSES,
        "zip_longest(collected.get(UP, []), down, fillvalue=_ABSENT)",
        "zip_longest(collected.get(UP, []), [], fillvalue=_ABSENT)",
        check="tests",
        rule="test",
        says="",
    ),
)
