"""The repository names commands that exist, versions that agree, and has no long file."""

import pathlib
import re

import pytest
import yaml

import msgd_jax

ROOT = pathlib.Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [
    path
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    if path.name != "config.yml"
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
PYTHON = [
    path
    for folder in ("msgd_jax", "experiments", "benchmarks", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if "_build" not in path.parts
]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {
        target for step in steps for target in re.findall(r"make ([a-z-]+)", step.get("run", ""))
    }
    assert steps
    assert called <= TARGETS


# Documents that name commands.
TELLING = ["README.md", "CONTRIBUTING.md", "docs/start.md", "docs/support.md", ".ci/run"]


@pytest.mark.parametrize("name", [*TELLING, ".github/PULL_REQUEST_TEMPLATE.md"])
def test_documents_name_targets_that_exist(name):
    called = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", (ROOT / name).read_text(), re.M))
    assert called
    assert called <= TARGETS


def test_hooks_are_the_checks_of_make_lint():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # Local hooks download nothing.
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    checks = set(re.findall(r"\$\(BIN\)/(ruff \w+|pyright)", recipe))
    hooks = {
        " ".join(re.findall(r"\.venv/bin/(ruff \w+|pyright)", hook["entry"])[:1])
        for hook in local["hooks"]
    }
    assert hooks == checks == {"ruff check", "ruff format", "pyright"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    questions = [entry for entry in form["body"] if entry["type"] != "markdown"]
    assert len({entry["id"] for entry in questions}) == len(questions) > 1
    assert all(entry["attributes"]["label"] for entry in questions)


def test_help_tells_of_every_target():
    told = set(re.findall(r'echo "make ([a-z-]+)', (ROOT / "Makefile").read_text()))
    assert told == TARGETS - {"help", "clean"}


def test_versions_agree():
    version = msgd_jax.__version__
    section = "Unreleased\n" if ".dev" in version else f"{version} - "
    assert f"\n## {section}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_file_is_long():
    assert len(PYTHON) > 100
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
