"""CONTRIBUTING names files that exist.

The test is one of the gate's own, as the scratch clones of ``make museum`` lack files that CONTRIBUTING names.
"""

import re

from tests.docs.snippets import ROOT


def test_the_files_that_contributing_names_exist():
    names = re.findall(r"`([\w./]+/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []
