"""The table of the gate: which checks and tests each path of the tree needs.

The row with the longest prefix of a path counts (``ci.selector``).  tests/ci/test_selection.py checks that a row lists
every test that imports its files, and that each planted fault still reaches the test that must refuse it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CHECKS = ("prove", "trial", "trial, Megatron", "theorems")
"""The checks that a path can need, besides the tests and those that always run."""


@dataclass(frozen=True)
class Row:
    """The checks and tests that a file needs.

    ``near`` are its own tests, which run first and on each of its mutants; ``far`` those that also reach it.  Both are
    files and folders.
    """

    checks: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()


_PAGES = "tests/docs/test_documentation.py"
PAGE_TESTS = (
    f"{_PAGES}::test_the_commands_of_the_page_work[{{page}}]",
    f"{_PAGES}::test_every_link_leads_somewhere",
    f"{_PAGES}::test_snippets_that_do_not_run_have_a_reason_and_are_listed",
    "tests/docs/test_links.py",
)
"""The tests of one page of the documentation.  Links of other pages may lead to a heading that is gone."""

# The command line reaches nearly everything, by imports within functions; so do the pages of the documentation.
_CLI = (
    "tests/cli",
    "tests/docs",
    "tests/proofs/test_findings.py",  # reads the marks of the page
    "tests/record/test_collectives.py",
    "tests/record/test_command.py",
    "tests/record/test_deepseek.py",
    "tests/record/test_hand_written.py",
    "tests/record/test_processes.py",
    "tests/record/test_testing.py",
    "tests/record/test_torch.py",
    "tests/page/test_proofs.py",
    "tests/pictures/test_commands.py",
    "tests/pictures/test_measured.py",
    "tests/production/test_deepseek_names.py",
    "tests/production/test_faults.py",
    "tests/test_bench.py",
    "tests/gpu/test_equivalence.py",
)
# Names under which other code imports the package.
_PUBLIC = (
    "tests/docs",
    "tests/cli/test_help_and_completion.py",
    "tests/cli/test_other_repositories.py",
    "tests/cli/test_verify.py",
    "tests/record/test_deepseek.py",
    "tests/production/test_faults.py",
)
_PROVED = (
    "tests/schedule/test_adapters.py",
    "tests/schedule/test_comparison.py",
    "tests/schedule/test_normalise.py",
    "tests/schedule/test_torchcsv.py",
    "tests/schedule/test_zero_bubble.py",
    "tests/page/test_browser.py",
    "tests/megatron/test_random_streams.py",
    "tests/megatron/test_replicas.py",
    "tests/megatron/test_schedule.py",
    "tests/record/test_arrivals.py",
    "tests/record/test_buffers.py",
    "tests/record/test_completion.py",
    "tests/record/test_conclusions.py",
    "tests/record/test_cut_short.py",
    "tests/record/test_failures.py",
    "tests/record/test_functions.py",
    "tests/record/test_megatron.py",
    "tests/record/test_merges.py",
    "tests/record/test_other_tensors.py",
    "tests/record/test_passed_on.py",
    "tests/record/test_pipelines.py",
    "tests/record/test_surplus.py",
    "tests/record/test_weights.py",
    *_CLI,
    "tests/ci",
)

TABLES = Row(
    ("theorems",),
    ("tests/schedule", "tests/proofs"),
    (
        "tests/page/test_browser.py",
        "tests/page/test_changes.py",
        "tests/page/test_colours.py",
        "tests/page/test_drawing.py",
        "tests/page/test_render.py",
        "tests/pictures/test_cells.py",
        "tests/pictures/test_picture.py",
        "tests/pictures/test_terminal.py",
        "tests/pictures/test_trace.py",
        "tests/reference",
        "tests/megatron/test_iterators.py",
    ),
)
"""For a change that touches only phase tables.

The changed schedules are proved and trained with anyway, so the tests of the runtime, which runs any schedule, and
those of the command line are left out.
"""

# Modules of proofs that no theorem imports, and of reference that nothing on Megatron imports.
_WITHOUT_THEOREMS = [
    "against",
    "deadlock_smt",
    "deadlock_story",
    "departure_story",
    "difference",
    "prefix",
    "prove",
    "report",
    "search",
    "smt",
    "solver",
    "story",
    "waivers",
    "words",
    "z3child",
]
_WITHOUT_MEGATRON = ["case", "fake", "fault", "ledger", "mailbox", "model", "production", "rank", "replica", "verify"]
_PROOFS = Row(("prove",), ("tests/proofs", "tests/soundness"), _PROVED)
_REFERENCE = Row(
    ("trial",),
    ("tests/reference", "tests/production", "tests/cli/test_verify.py"),
    ("tests/soundness", "tests/proofs/test_memory.py", *_CLI),
)

ROWS: dict[str, Row] = {
    "dualpipe/": Row(CHECKS, ("tests/schedule", "tests/proofs/test_checks.py", "tests/pictures"), ("tests",)),
    "dualpipe/timeline/": Row(
        (),
        ("tests/pictures", "tests/schedule", "tests/page"),
        (
            "tests/proofs/test_optimal.py",
            "tests/proofs/theorems/test_lower_bound.py",
            "tests/proofs/theorems/test_times.py",
            "tests/record/test_traces.py",
            *_CLI,
            "tests/ci",
        ),
    ),
    "dualpipe/page/": Row((), ("tests/page",), (*_CLI, "tests/ci")),
    "dualpipe/runtime/": Row(
        ("trial", "trial, Megatron"),
        ("tests/production",),
        ("tests/soundness", "tests/megatron", "tests/gpu", *_CLI),
    ),
    **dict.fromkeys(
        ("dualpipe/pipeline.py", "dualpipe/runtime/replicas.py"),
        Row(("trial",), ("tests/production",), ("tests/soundness", *_CLI)),
    ),
    "dualpipe/megatron/": Row(
        ("trial, Megatron",), ("tests/megatron",), ("tests/record/test_megatron.py", "tests/gpu", *_CLI)
    ),
    "dualpipe/record/": Row((), ("tests/record",), ("tests/megatron/test_expert_overlap.py", *_CLI)),
    "dualpipe/testing/": Row(
        (), ("tests/record",), ("tests/megatron/test_expert_overlap.py", "tests/docs/test_reference.py")
    ),
    **dict.fromkeys(
        ("dualpipe/testing/launch.py", "dualpipe/record/child/ranks.py"),  # every process of a trial is forked here
        Row(
            ("trial", "trial, Megatron"),
            ("tests/production", "tests/record"),
            ("tests/reference", "tests/megatron", "tests/soundness", "tests/gpu", *_CLI),
        ),
    ),
    "dualpipe/cli/": Row(
        (),
        ("tests/cli", "tests/docs/test_snippets.py"),
        ("tests/page/test_browser.py", *_CLI, "tests/ci"),
    ),
    "dualpipe/_imports.py": Row((), ("tests/cli",), _CLI),
    "dualpipe/comm.py": Row((), ("tests/production/test_deepseek_names.py",), _PUBLIC),
    "dualpipe/utils.py": Row((), ("tests/production/test_deepseek_names.py",), _PUBLIC),
    "dualpipe/lower.py": Row((), ("tests/schedule/test_lower.py",), _PUBLIC),
    "dualpipe/picture.py": Row((), ("tests/pictures/test_picture.py",), _PUBLIC),
    "dualpipe/simulate.py": Row((), ("tests/schedule/test_simulate.py",), _PUBLIC),
    "dualpipe/torchcsv.py": Row((), ("tests/schedule/test_torchcsv.py",), _PUBLIC),
    "proofs/": replace(_PROOFS, checks=("prove", "theorems")),
    **{f"proofs/{name}.py": _PROOFS for name in _WITHOUT_THEOREMS},
    "proofs/optimal.py": Row((), ("tests/proofs/test_optimal.py",), ("tests/page/test_browser.py", *_CLI)),
    "proofs/theorems/": Row(
        ("theorems",),
        ("tests/proofs/theorems",),
        ("tests/proofs/test_optimal.py", "tests/page/test_browser.py", *_CLI),
    ),
    "reference/": replace(
        _REFERENCE,
        checks=("trial", "trial, Megatron"),
        far=(*_REFERENCE.far, "tests/record/test_steps.py", "tests/megatron", "tests/gpu"),
    ),
    **{f"reference/{name}.py": _REFERENCE for name in _WITHOUT_MEGATRON},
    "reference/measured.py": Row((), ("tests/pictures",), _CLI),
    "reference/stopwatch.py": Row(
        ("trial", "trial, Megatron"),
        ("tests/pictures",),
        ("tests/production", "tests/soundness", "tests/megatron", *_CLI),
    ),
    "reference/megatron/": Row(
        ("trial, Megatron",),
        ("tests/megatron", "tests/cli/test_verify_megatron.py"),
        ("tests/record/test_megatron.py", "tests/gpu", *_CLI),
    ),
    "examples/": Row(
        (),
        ("tests/megatron/test_example.py", "tests/megatron/test_checkpoint.py"),
        ("tests/record/test_megatron.py", "tests/gpu"),
    ),
    "bench/": Row((), ("tests/test_bench.py",)),
    "tests/cli/": Row(
        (),
        ("tests/cli",),
        ("tests/page/test_proofs.py", "tests/pictures/test_commands.py", "tests/pictures/test_measured.py"),
    ),
    "tests/docs/": Row(
        (),
        ("tests/docs",),
        (
            "tests/cli/test_other_repositories.py",
            "tests/cli/test_verify.py",
            "tests/production/test_faults.py",
            "tests/ci",
        ),
    ),
    "tests/gpu/": Row((), ("tests/gpu",), ("tests/production/test_settings.py",)),
    "tests/megatron/": Row((), ("tests/megatron",), ("tests/docs/test_museum.py", "tests/record/test_megatron.py")),
    "tests/megatron/test_groups.py": Row(
        (),
        (
            "tests/megatron/test_groups.py",
            "tests/megatron/test_model.py",
            "tests/megatron/test_training_loop.py",
        ),
    ),
    "tests/megatron/test_planted_faults.py": Row(
        (),
        (
            "tests/megatron/test_embedding.py",
            "tests/megatron/test_placement.py",
            "tests/megatron/test_planted_faults.py",
        ),
    ),
    "tests/page/": Row((), ("tests/page",), ("tests/cli/test_compare.py",)),
    "tests/pictures/": Row((), ("tests/pictures",), ("tests/page",)),
    "tests/production/": Row(
        (),
        ("tests/production",),
        (
            "tests/soundness",
            "tests/test_bench.py",
            "tests/cli/test_other_repositories.py",
            "tests/cli/test_prove.py",
            "tests/cli/test_verify.py",
            "tests/page/test_proofs.py",
        ),
    ),
    "tests/production/test_pipeline.py": Row(
        (), ("tests/production/test_pipeline.py", "tests/production/test_widths.py")
    ),
    "tests/production/test_weightgrad.py": Row(
        (), ("tests/production/test_weightgrad.py", "tests/production/test_unsplit.py")
    ),
    "tests/proofs/": Row((), ("tests/proofs",), ("tests/page", "tests/docs/test_museum.py")),
    "tests/proofs/test_against.py": Row((), ("tests/proofs/test_against.py", "tests/proofs/test_channels.py")),
    "tests/record/": Row((), ("tests/record",)),
    "tests/record/megatron.py": Row((), ("tests/record",), ("tests/megatron/test_megatron_lm.py",)),
    "tests/record/test_limits.py": Row((), ("tests/record",)),
    "tests/reference/": Row((), ("tests/reference",), ("tests/proofs/test_memory.py",)),
    "tests/schedule/": Row((), ("tests/schedule",), ("tests/cli/test_entry_points.py", "tests/record/test_torch.py")),
    "tests/soundness/": Row((), ("tests/soundness",), ("tests/test_bench.py",)),
    "tests/golden/": Row(
        (), ("tests/schedule",), ("tests/cli", "tests/docs", "tests/record/test_torch.py", "tests/ci")
    ),
    "tests/mutations.py": Row(
        (), ("tests/proofs", "tests/soundness"), ("tests/page", "tests/docs", "tests/test_bench.py")
    ),
    "tests/strategies.py": Row((), ("tests/schedule", "tests/proofs/test_agreement.py")),
    "docs/": Row((), PAGE_TESTS),
    "docs/pictures/": Row((), ("tests/pictures/test_commands.py",)),
    "docs/reference/cli.md": Row((), (*PAGE_TESTS, "tests/docs/test_reference.py")),
    "docs/reference/python.md": Row((), (*PAGE_TESTS, "tests/docs/test_reference.py")),
    "docs/reference/museum.md": Row((), (*PAGE_TESTS, "tests/docs/test_museum.py")),
    "docs/how-to/other-repositories.md": Row((), (*PAGE_TESTS, "tests/cli/test_other_repositories.py")),
    "docs/how-to/when-a-run-fails.md": Row((), (*PAGE_TESTS, "tests/production/test_faults.py")),
    "README.md": Row((), PAGE_TESTS),
    "CONTRIBUTING.md": Row((), (*PAGE_TESTS, "tests/ci/test_contributing.py")),
    "CHANGELOG.md": Row((), ("tests/docs/test_links.py",)),
    "Makefile": Row((), ("tests/docs", "tests/ci/test_gate.py")),
    ".github/": Row((), ("tests/cli/test_other_repositories.py",)),
    ".pre-commit-hooks.yaml": Row((), ("tests/cli/test_other_repositories.py",)),
    ".gitignore": Row((), ("tests/ci/test_repository.py", "tests/record/test_deepseek.py")),
    "LICENSE": Row(),
}
"""The rows by path prefix.  If a path has several of these prefixes, the longest one counts."""

OWN = ("ci/", "tests/ci/", ".ci/", "pyproject.toml", "constraints.txt", "tests/conftest.py", "tests/__init__.py")
"""The gate and the build: everything else runs on them."""
