"""Programs that train on a CPU are started again with huge pages, where the system has them."""

import os
import subprocess
import sys

import pytest

from experiments import huge_pages


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Sets what the system says about huge pages; a GNU C library is assumed."""
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path / "enabled")
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    return lambda text: (tmp_path / "enabled").write_text(text)


@pytest.fixture
def started(monkeypatch):
    """The programs that would be started in place of this one."""
    found = []
    monkeypatch.setattr(os, "execv", lambda *arguments: found.append(arguments))
    return found


def test_a_program_is_started_again_with_its_own_arguments(system, started, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments", "demo"])
    system("always [madvise] never\n")
    huge_pages.restart()
    assert started == [(sys.executable, ["python", "-m", "experiments", "demo"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert huge_pages.are_requested()
    huge_pages.restart()  # as the new program does
    assert len(started) == 1


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n"])
def test_programs_stay_where_pages_cannot_be_asked_for(system, started, text):
    system(text)
    huge_pages.restart()
    assert not started
    assert huge_pages.VARIABLE not in os.environ


def test_programs_stay_on_systems_that_say_nothing(system, started, monkeypatch):
    huge_pages.restart()  # The file does not exist.
    system("always [madvise] never\n")
    monkeypatch.delattr(os, "confstr")  # as on Windows
    huge_pages.restart()
    assert not started


def test_a_users_own_settings_are_left_alone(system, started, monkeypatch):
    system("always [madvise] never\n")
    monkeypatch.setenv(huge_pages.VARIABLE, "glibc.malloc.arena_max=1")
    huge_pages.restart()
    assert not started
    assert os.environ[huge_pages.VARIABLE] == "glibc.malloc.arena_max=1"
    with huge_pages.requested():
        assert os.environ[huge_pages.VARIABLE].split(":") == [
            "glibc.malloc.arena_max=1",
            "glibc.malloc.hugetlb=1",
        ]
    assert os.environ[huge_pages.VARIABLE] == "glibc.malloc.arena_max=1"


def test_a_real_program_runs_once_and_has_what_the_system_offers():
    environment = {k: v for k, v in os.environ.items() if k != huge_pages.VARIABLE}
    code = (
        "from experiments import huge_pages; import os, sys; huge_pages.restart(); "
        "print(os.environ.get(huge_pages.VARIABLE), sys.argv)"
    )
    command = [sys.executable, "-c", code, "--an", "argument with spaces"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wanted = huge_pages.SETTING if huge_pages.are_available() else None
    assert ran.stdout == f"{wanted} ['-c', '--an', 'argument with spaces']\n"
