import pytest

from proofs.theorems import TheoremResult, prove_all
from tests.proofs.theorems.cases import FAMILIES


class Proofs:
    """The theorems of each family, proved once for all tests, when the first one needs them."""

    def __init__(self) -> None:
        self._results: dict[str, dict[str, TheoremResult]] = {}

    def of(self, family: str) -> dict[str, TheoremResult]:
        """The results of a family by name of the theorem."""
        if family not in self._results:
            self._results[family] = {result.name: result for result in prove_all(of=[FAMILIES[family]])}
        return self._results[family]

    def __getitem__(self, theorem: str) -> TheoremResult:
        return self.of(theorem.partition(":")[0])[theorem]


@pytest.fixture(scope="session")
def proved() -> Proofs:
    return Proofs()
