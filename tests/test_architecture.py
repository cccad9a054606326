"""The directions of import, read from the sources.

dualpipe  <-  reference, proofs        dualpipe knows neither (the command line reaches them lazily)
reference <-/-> proofs                 two independent checks of a schedule
oracle                                 knows no schedule at all
ci                                     the gate imports none of what it checks
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = sys.stdlib_module_names


@cache
def imports(path: Path, lazily: bool = True) -> frozenset[str]:
    """The modules that a file names in its imports, in full; without ``lazily`` only those at its top level."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "child" in path.parts, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def packages(path: Path, lazily: bool = True) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, lazily)}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} has no files to look at"
    return found


PICTURES = tuple(f"dualpipe/timeline/{name}.py" for name in ("picture", "rows", "side_by_side"))
DRAWN_BY_LIBRARIES = (*PICTURES, "dualpipe/timeline/terminal.py")
PURE = [path for folder in ("schedule", "timeline", "page") for path in files(f"dualpipe/{folder}")]
PURE += [ROOT / f"dualpipe/{name}.py" for name in ("_imports", "errors", "files", "progress")]
PURE += [ROOT / f"dualpipe/{name}.py" for name in ("lower", "simulate", "torchcsv")]


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_schedule_and_pure_computations_on_it_need_only_the_standard_library(path):
    if str(path.relative_to(ROOT)) not in DRAWN_BY_LIBRARIES:
        assert packages(path) <= STANDARD | {"dualpipe"}


def own_parts(path: Path) -> set[str]:
    """The parts of ``dualpipe`` that a file imports: ``schedule`` of ``dualpipe.schedule.text``."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("dualpipe.")}


def test_the_parts_of_production_import_in_one_direction():
    """errors <- schedule <- timeline <- page;  schedule <- runtime <- megatron;  the recorder apart."""
    may_import = {
        "schedule": {"errors", "files", "schedule"},
        "timeline": {"errors", "files", "schedule", "timeline"},
        "page": {"errors", "schedule", "timeline", "page"},
        "runtime": {"errors", "schedule", "runtime", "pipeline"},
        "megatron": {"errors", "schedule", "runtime", "megatron"},
        "record": {"errors", "files", "schedule", "record"},
    }
    for part, allowed in may_import.items():
        for path in files(f"dualpipe/{part}"):
            assert own_parts(path) <= allowed, path


def test_production_imports_neither_reference_nor_proofs():
    for path in files("dualpipe"):
        if "cli" not in path.parts:
            assert not packages(path) & {"reference", "proofs", "z3"}, path


def test_only_pictures_import_matplotlib():
    for folder in ("dualpipe", "reference", "proofs"):
        for path in files(folder):
            if str(path.relative_to(ROOT)) not in PICTURES:
                assert "matplotlib" not in packages(path), path


def test_only_the_command_line_and_the_terminal_import_rich():
    for folder in ("dualpipe", "reference", "proofs"):
        for path in files(folder):
            if "cli" not in path.parts and path != ROOT / "dualpipe/timeline/terminal.py":
                assert not packages(path) & {"rich", "typer"}, path


def test_only_the_drop_in_imports_megatron():
    for folder in ("dualpipe", "reference", "proofs"):
        for path in files(folder):
            if "megatron" not in path.parts:
                assert "megatron" not in packages(path), path


def test_code_inside_a_recorded_program_imports_only_torch_and_itself():
    """The program may have another package called dualpipe."""
    for path in files("dualpipe/record/child"):
        absolute = ast.parse(path.read_text())
        for node in ast.walk(absolute):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] in STANDARD | {"torch"}, path
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= STANDARD | {"torch"}, path


def test_what_a_recording_is_made_of_needs_no_torch():
    for path in sorted((ROOT / "dualpipe/record").glob("*.py")):
        assert packages(path) <= STANDARD | {"dualpipe", "psutil"}, path


def test_the_oracle_imports_no_schedule():
    for name in ("oracle", "model", "data"):
        found = imports(ROOT / "reference" / f"{name}.py")
        own = {module for module in found if module.startswith(("dualpipe", "proofs"))}
        assert own <= {"dualpipe.errors", "dualpipe.errors.RuleError"}


def test_fake_ranks_share_only_the_schedule_value_with_production():
    allowed = {"dualpipe.errors", "dualpipe.schedule", "dualpipe.schedule.text"}
    for name in ("fake", "fault", "ledger", "mailbox", "rank", "replica", "trace"):
        modules = {m for m in imports(ROOT / "reference" / f"{name}.py") if m.startswith("dualpipe")}
        assert {".".join(m.split(".")[:2]) for m in modules} <= allowed


def test_in_the_verification_on_megatron_only_production_imports_the_drop_in():
    allowed = (  # which know no schedule and no model
        "dualpipe.errors",
        "dualpipe.progress",
        "dualpipe.testing.launch",
        "dualpipe.megatron.on_cpu",
    )
    for path in files("reference/megatron"):
        if path.name != "production.py":
            found = {module for module in imports(path) if module.startswith(("dualpipe", "proofs"))}
            assert {module for module in found if not module.startswith(allowed)} == set(), path


def test_the_stand_ins_for_the_gpu_know_nothing_else_of_the_drop_in():
    for path in files("dualpipe/megatron/on_cpu"):
        found = {module for module in imports(path) if module.startswith("dualpipe")}
        assert all(module.startswith("dualpipe.megatron.on_cpu") for module in found), path


def test_the_launcher_of_ranks_knows_no_schedule():
    found = {module for module in imports(ROOT / "dualpipe/testing/launch.py") if module.startswith("dualpipe")}
    assert {".".join(module.split(".")[:4]) for module in found} == {"dualpipe.record.child.ranks"}


def test_the_oracle_on_megatron_imports_neither_other_implementations_nor_megatrons_schedules():
    others = ("production", "training", "truth", "verify", "comparison")
    for name in ("oracle", "reduction"):
        found = imports(ROOT / "reference" / "megatron" / f"{name}.py")
        assert not {module for module in found for other in others if f"reference.megatron.{other}" in module}
        assert not {
            module for module in found if re.match(r"megatron\.core\.(pipeline_parallel|distributed|optim)", module)
        }


def test_proofs_read_the_schedule_and_never_the_simulator_or_the_runtime():
    value = {"errors", "progress", "schedule"}
    makers = {f"dualpipe.schedule.{name}" for name in ("generate", "lower", "phase_table", "torch_table", "entrypoint")}
    tables = {"dualpipe.schedule.generate", "dualpipe.schedule.phase_table"}
    for path in files("proofs"):
        assert own_parts(path) <= value, path
        assert not imports(path) & (makers - tables if "theorems" in path.parts else makers), path
        assert "reference" not in packages(path)


HEAVY = {"torch", "z3", "megatron", "matplotlib", "scipy"}


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [("dualpipe", HEAVY), ("dualpipe.cli", HEAVY | {"proofs", "reference"})],
    ids=["dualpipe", "dualpipe.cli"],
)
def test_importing_loads_nothing_heavy(module, unloaded):
    """The command line reaches the heavy packages when a command needs them."""
    code = f"import sys, {module}; print(*sorted({unloaded} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []


def test_the_gate_imports_nothing_of_the_tree_except_in_child_processes():
    for path in files("ci"):
        imported = packages(path, lazily=path.parent.name != "child") & {"dualpipe", "reference", "proofs", "tests"}
        assert not imported, path


def test_a_forbidden_import_is_seen(tmp_path):
    planted = tmp_path / "execute.py"
    planted.write_text("def run():\n    from reference.oracle import train\n")
    assert packages(planted) == {"reference"}
