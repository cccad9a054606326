"""The workflow and the hooks for other repositories, run step by step and by pre-commit."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dualpipe.schedule import RF, UP, Op
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps
from tests.docs.snippets import blocks_of
from tests.production.cases import without

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
PROVE = yaml.safe_load((WORKFLOWS / "prove.yml").read_text())
INPUTS = PROVE[True]["workflow_call"]["inputs"]  # YAML 1.1 reads the key `on` as a truth value
REQUIRED = {name for name, each in INPUTS.items() if each.get("required")}
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
GOOD, BROKEN = generate("dualpipe", 2, 4), without(generate("1f1b", 2, 2), 1, Op(RF, UP, 1, 1))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Somebody else's repository, and a ``dualpipe`` on its path."""
    shims, here = tmp_path / "bin", tmp_path / "theirs"
    shims.mkdir()
    (here / "schedules" / "deep").mkdir(parents=True)
    (shims / "dualpipe").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dualpipe.cli "$@"\n')
    (shims / "dualpipe").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(here)
    (here / "schedules" / "good.txt").write_text(dumps(GOOD))
    (here / "schedules" / "deep" / "good too.txt").write_text(dumps(generate("zb1p", 2, 4)))
    (here / "broken.schedule").write_text(dumps(BROKEN))
    (here / "plan.py").write_text("import dualpipe\n\n\ndef build():\n    return dualpipe.zb1p(2, 4)\n")
    return here


def step(name):
    return next(step for step in PROVE["jobs"]["prove"]["steps"] if step.get("name") == name)


def prove(repository, schedules, options=""):
    """Run the steps Prove and Tell of the workflow as GitHub's runner does; exit code, log and summary."""
    summary = repository / "summary.md"
    environment = os.environ | {"SCHEDULES": schedules, "OPTIONS": options, "GITHUB_STEP_SUMMARY": str(summary)}
    script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Prove")["run"]]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60, check=False)
    told = [sys.executable, "-c", step("Summarise")["run"]]
    subprocess.run(told, env=environment, check=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, summary.read_text()


def test_the_workflow_proves_files_globs_and_entry_points(repository):
    code, log, summary = prove(repository, "schedules/**/*.txt\nplan:build\n", "--model blocking")
    assert (code, log) == (0, "")
    for name in ("schedules/good.txt", "schedules/deep/good too.txt", "plan:build"):
        assert f"| `{name}` | proved |  |" in summary
    assert len((repository / "proofs.jsonl").read_text().splitlines()) == 3


def test_the_workflow_rejects_a_broken_schedule_with_its_story_and_keeps_a_page_that_draws_it(repository):
    code, _, summary = prove(repository, "schedules/good.txt\nbroken.schedule\n")
    assert code == 1
    assert "| `schedules/good.txt` | proved |" in summary
    assert re.search(r"\| `broken\.schedule` \| refuted \| .*deadlock.* \|", summary)
    assert "rank 0 waits forever" in summary
    assert "rank 0 waits forever" in (repository / "proofs.html").read_text()
    kept = next(each["with"]["path"] for each in PROVE["jobs"]["prove"]["steps"] if "upload" in each.get("uses", ""))
    assert kept.split() == ["proofs.jsonl", "proofs.html"]


def test_the_workflow_installs_what_the_caller_chose_before_the_package(repository, tmp_path):
    pip = tmp_path / "bin" / "pip"
    pip.write_text('#!/bin/sh\necho pip "$@"\n')
    pip.chmod(0o755)
    environment = os.environ | {"INSTALL": "pip install torch==2.9.1", "PACKAGE": "git+somewhere"}
    script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Install")["run"]]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["pip install torch==2.9.1", "pip install git+somewhere"]


def test_the_workflow_reports_bad_input(repository):
    (repository / "bad.txt").write_text("lane > 0\nrank 0: 0X\n")
    code, log, summary = prove(repository, "bad.txt")
    assert code == 2
    assert "bad.txt:2:9" in log
    assert "bad.txt:2:9" in summary


def test_a_glob_that_finds_nothing_does_not_pass(repository):
    code, log, _ = prove(repository, "missing/*.txt\n")
    assert code != 0
    assert "no match: missing/*.txt" in log


def test_an_option_that_does_not_exist_does_not_pass(repository):
    assert prove(repository, "plan:build", "--modle blocking")[0] == 2


def test_text_from_callers_reaches_the_shell_through_the_environment_alone():
    for each in PROVE["jobs"]["prove"]["steps"]:
        assert "${{" not in each.get("run", ""), "an expression in a script is open to injection"


def test_ci_calls_what_exists():
    jobs = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())["jobs"]
    scripts = [each["run"] for job in jobs.values() for each in job.get("steps", []) if "run" in each]
    assert ".ci/run" in scripts
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert REQUIRED <= jobs["prove"]["with"].keys() <= INPUTS.keys()
    for pattern in jobs["prove"]["with"]["schedules"].split():
        assert list(ROOT.glob(pattern)), f"{pattern} matches nothing here"


def test_the_page_names_inputs_and_hooks_that_exist():
    page = ROOT / "docs" / "how-to" / "other-repositories.md"
    examples = [
        yaml.safe_load(block.text) for block in blocks_of(page.read_text(), page.name) if block.language == "yaml"
    ]
    jobs = [job for example in examples for job in example.get("jobs", {}).values()]
    hooks = [hook for example in examples for repo in example.get("repos", []) for hook in repo["hooks"]]
    assert len(jobs) == 2
    for job in jobs:
        assert job["uses"].partition("/.github/workflows/")[2].partition("@")[0] == "prove.yml"
        assert REQUIRED <= job["with"].keys() <= INPUTS.keys()
    assert [hook["id"] for hook in hooks] == list(HOOKS)
    for name, each in INPUTS.items():
        assert f"| `{name}` | " in page.read_text()
        assert str(each.get("default", "required") or "none") in page.read_text()


ACTIONLINT = shutil.which("actionlint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_actionlint = pytest.mark.skipif(
    ACTIONLINT is None,
    reason="no actionlint in this environment or on the path; would show that the workflows are well-formed",
)


PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "uses: " in path.read_text()]


def lint(*files):
    return subprocess.run([ACTIONLINT, *files], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


@needs_actionlint
def test_actionlint_accepts_the_workflows():
    done = lint(*map(str, WORKFLOWS.glob("*.yml")))
    assert done.returncode == 0, done.stdout


@needs_actionlint
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_actionlint_accepts_the_examples(page, tmp_path):
    found = [block.text for block in blocks_of(page.read_text(), page.name) if "uses: " in block.text]
    for number, text in enumerate(found):
        (tmp_path / f"{number}.yml").write_text(text if "\non:" in f"\n{text}" else f"on: push\n{text}")
    done = lint(*map(str, tmp_path.glob("*.yml")))
    assert done.returncode == 0, done.stdout
    assert found


@needs_actionlint
@pytest.mark.parametrize(
    ("planted", "instead", "message"),
    [
        ("inputs.schedules", "inputs.schedule", 'property "schedule" is not defined'),
        ("runs-on: ${{ inputs.runner }}", "runs-om: x", "unexpected key"),
        ("!cancelled()", "!canceled()", "undefined function"),
    ],
)
def test_actionlint_catches_a_planted_fault(tmp_path, planted, instead, message):
    text = (WORKFLOWS / "prove.yml").read_text()
    assert planted in text
    (tmp_path / "prove.yml").write_text(text.replace(planted, instead))
    done = lint(str(tmp_path / "prove.yml"))
    assert done.returncode == 1
    assert message in done.stdout


def git(*arguments, cwd):
    quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    names = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-c", "init.defaultBranch=main")
    subprocess.run(
        ["git", *names, *arguments], cwd=cwd, env=os.environ | quiet, check=True, capture_output=True, timeout=60
    )


@pytest.fixture
def pre_commit(repository, tmp_path, monkeypatch):
    """``pre-commit try-repo`` of our hooks, from a scratch repository that holds them, on somebody else's files."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    for folder in (hooks, repository):
        git("init", "-q", cwd=folder)
        git("add", "-A", cwd=folder)
        git("commit", "-q", "-m", "scratch", cwd=folder)
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))

    def run(hook, *files):
        command = [sys.executable, "-m", "pre_commit", "try-repo", str(hooks), hook, "--verbose", "--color", "never"]
        return subprocess.run(
            [*command, "--files", *files], cwd=repository, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def test_the_hook_lets_a_good_schedule_through_and_refuses_a_broken_one(pre_commit):
    passed = pre_commit("dualpipe-prove", "schedules/good.txt", "plan.py")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "dualpipe on 2 ranks: proved" in passed.stdout
    refused = pre_commit("dualpipe-prove", "schedules/good.txt", "broken.schedule")
    assert refused.returncode == 1
    assert "rank 0 waits forever" in refused.stdout
    assert "exit code: 1" in refused.stdout


def test_the_hook_leaves_other_files_alone(pre_commit):
    done = pre_commit("dualpipe-prove", "plan.py")
    assert done.returncode == 0
    assert "no files to check" in done.stdout


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("schedules/a.txt", True),
        ("parallel/schedules/a.csv", True),
        ("anywhere/a.schedule", True),
        ("notes.txt", False),
        ("schedules/README.md", False),
        ("old_schedules/a.txt", False),
    ],
)
def test_the_files_that_the_hook_takes(path, taken):
    assert (re.search(HOOKS["dualpipe-prove"]["files"], path) is not None) == taken


def test_the_hook_for_entry_points_proves_what_its_arguments_name(repository, pre_commit):
    config = repository / "hook.yaml"
    config.write_text(
        yaml.safe_dump(
            {"repos": [{"repo": "local", "hooks": [HOOKS["dualpipe-prove-entry"] | {"args": ["plan:build"]}]}]}
        )
    )
    command = [sys.executable, "-m", "pre_commit", "run", "--config", str(config), "--verbose", "--files", "plan.py"]

    def run():
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)

    passed = run()
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "zb1p on 2 ranks: proved" in passed.stdout
    (repository / "plan.py").write_text(f"def build():\n    return {dumps(BROKEN)!r}\n")
    assert run().returncode == 1
