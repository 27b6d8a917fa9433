"""`slow_cases.txt` lists cases that exist, and of each of their tests other cases always run.

A test that is slow as a whole has the mark `slow` in the code instead, and no single case has it
there. Only files that this run has collected can be compared: `make test` collects all of them.
"""

import pathlib
import re

import pytest

from tests.conftest import SLOW_CASES

ROOT = pathlib.Path(__file__).parent.parent
LISTED = SLOW_CASES.read_text().splitlines()


def path_of(case: str) -> str:
    """The file of a case."""
    return case.partition("::")[0]


def name_of(case: str) -> str:
    """The file and the test of a case."""
    return case.partition("[")[0]


@pytest.fixture
def compared(collected) -> list[str]:
    """The listed cases of the files that were collected."""
    paths = {path_of(case) for case in collected}
    found = [case for case in LISTED if path_of(case) in paths]
    if not found:
        pytest.skip("no file that has listed cases was collected")
    return found


def test_lines_are_sorted_and_there_is_none_twice():
    assert sorted(set(LISTED)) == LISTED


def test_no_case_is_marked_in_the_code():
    """The exception is a file whose cases depend on the version of another library."""
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if re.search(r"marks=.*pytest\.mark\.slow", path.read_text())
    ]
    assert marked == ["tests/library/test_optax.py"]


def test_listed_files_exist():
    assert {path for path in map(path_of, LISTED) if not (ROOT / path).exists()} == set()


def test_listed_cases_exist(collected, compared):
    assert [case for case in compared if case not in collected] == []


def test_of_each_listed_test_a_case_always_runs(collected, compared):
    quick = {name_of(case) for case, is_slow in collected.items() if not is_slow}
    assert {name_of(case) for case in compared} - quick == set()
