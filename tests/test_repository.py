"""What the repository says about itself: commands that exist, versions that agree, short files."""

import pathlib
import re

import pytest
import yaml

import msgd_jax

ROOT = pathlib.Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
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


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/start.md", ".ci/run"])
def test_documents_name_targets_that_exist(name):
    called = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", (ROOT / name).read_text(), re.M))
    assert called
    assert called <= TARGETS


def test_help_tells_of_every_target():
    told = set(re.findall(r'echo "make ([a-z-]+)', (ROOT / "Makefile").read_text()))
    assert told == TARGETS - {"help", "clean"}


def test_versions_agree():
    version = msgd_jax.__version__
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_file_is_long():
    assert len(PYTHON) > 100
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
