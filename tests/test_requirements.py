"""Extras for users, dependency groups for checkouts, and the lower bounds of both."""

import pathlib
import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = SETTINGS["dependency-groups"]
MAKEFILE = (ROOT / "Makefile").read_text()


def parsed(lists: dict[str, list]) -> dict[str, list[Requirement]]:
    """The requirements of each list by its name, without the groups that it includes."""
    return {
        name: [Requirement(entry) for entry in entries if isinstance(entry, str)]
        for name, entries in lists.items()
    }


CORE = parsed({"core": SETTINGS["project"]["dependencies"]})["core"]
EXTRAS = parsed(SETTINGS["project"]["optional-dependencies"])
OWN = parsed(GROUPS)  # The requirements of each group, without those of the groups it includes.


def texts() -> dict[str, str]:
    """The files that tell people or machines what to install."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    for folder, ending in (
        ("docs", "md"),
        *((name, "py") for name in ("msgd_jax", "experiments", "benchmarks", "tests")),
    ):
        files += (ROOT / folder).rglob(f"*.{ending}")
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in files
        if "_build" not in path.parts and path != pathlib.Path(__file__)
    }


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    names = ("flax", "solvers", "streaming")
    wanted = CORE + [entry for name in names for entry in EXTRAS[name]] + OWN["experiments"]
    for requirement in wanted:
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        tested = Version(oldest[requirement.name])
        assert Version(bound.version) == tested, requirement


def test_extras_and_groups_agree():
    assert not set(EXTRAS) & set(OWN)
    bounds: dict[str, set[str]] = {}
    for requirement in (entry for some in (*EXTRAS.values(), *OWN.values()) for entry in some):
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}
    # No list has the package itself, which comes from the checkout and never from an index.
    assert "msgd-jax" not in bounds


def test_groups_include_groups_that_exist():
    for name, entries in GROUPS.items():
        included = {entry["include-group"] for entry in entries if not isinstance(entry, str)}
        assert included <= set(GROUPS), name


def test_the_makefile_installs_every_group():
    assert set(re.findall(r"\$\(VENV\)/\.([a-z]+)", MAKEFILE)) == set(GROUPS)


def test_whatever_is_to_be_installed_exists():
    """Extras and groups that documents, docstrings and messages name are in `pyproject.toml`.

    They are named as in `msgd-jax[solvers]` and `--group docs`.
    """
    extras, groups = set(), set()
    for where, text in texts().items():
        for names in re.findall(r"(?:msgd-jax|'\.|:= )\\?\[([a-z,]+)\\?\]", text):
            extras |= {(name, where) for name in names.split(",")}
        groups |= {(name, where) for name in re.findall(r"--group ([a-z]+)", text)}
    assert {name for name, _ in extras} >= {"flax", "solvers", "streaming"}
    assert {name for name, _ in groups} >= {"benchmarks", "experiments"}
    assert [pair for pair in extras if pair[0] not in EXTRAS] == []
    assert [pair for pair in groups if pair[0] not in GROUPS] == []
