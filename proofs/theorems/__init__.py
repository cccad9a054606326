"""Theorems about a named schedule at every size, proved with Z3 over free integers.

They read the tables that ``dualpipe.schedule.generate`` expands, with the sizes left open; see
``docs/explanation/theorems.md``.
"""

from proofs.theorems.constraint import TableError as TableError
from proofs.theorems.prove import THEOREMS as THEOREMS
from proofs.theorems.prove import families as families
from proofs.theorems.prove import prove as prove
from proofs.theorems.prove import prove_all as prove_all
from proofs.theorems.result import Counterexample as Counterexample
from proofs.theorems.result import TheoremResult as TheoremResult
