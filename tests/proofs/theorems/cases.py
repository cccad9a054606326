"""The families by name, as parameters of tests."""

import pytest

from proofs.theorems import families

FAMILIES = {family.name: family for family in families()}


def each_family(name, *values):
    """Parameters that begin with a family's name.

    DualPipeV and the variants with late W are marked as long: most of their rows are those of DualPipe, and the gate
    proves them with every change of a table.
    """
    return pytest.param(name, *values, marks=[pytest.mark.long] * (name == "dualpipev" or "-late-" in name))


BY_NAME = [each_family(name) for name in FAMILIES]
