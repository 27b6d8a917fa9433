"""What users install: the wheel, the sdist and the types that come with them."""

import email
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from typing import NamedTuple

import pytest

import msgd_jax

ROOT = pathlib.Path(__file__).parent.parent
CLIENTS = pathlib.Path(__file__).parent / "clients"


class Package(NamedTuple):
    """The wheel and the sdist, built from the checkout."""

    wheel: pathlib.Path
    sdist: pathlib.Path


def build(source: pathlib.Path, out: pathlib.Path, *targets: str) -> None:
    """Builds "wheel" or "sdist" from a folder into another."""
    wanted = [word for target in targets for word in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *wanted]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Package:
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out, "wheel", "sdist")
    return Package(next(out.glob("*.whl")), next(out.glob("*.tar.gz")))


def contents(wheel: pathlib.Path) -> dict[str, bytes]:
    """The files of a wheel, by name."""
    with zipfile.ZipFile(wheel) as files:
        return {name: files.read(name) for name in files.namelist()}


def test_the_wheel_has_the_library_and_nothing_else(package):
    files = contents(package.wheel)
    library = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "msgd_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = f"msgd_jax-{msgd_jax.__version__}.dist-info"
    assert {name for name in files if not name.startswith(about)} == library
    assert "msgd_jax/py.typed" in library
    assert f"{about}/licenses/LICENSE" in files


def test_without_extras_only_the_core_is_asked_for(package):
    files = contents(package.wheel)
    (name,) = (name for name in files if name.endswith("METADATA"))
    about = email.message_from_bytes(files[name])
    core = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0] for line in core}
    assert names == {"jax", "jaxtyping", "numpy", "optax", "scipy"}
    assert all(">=" in line for line in core)
    extras = set(about.get_all("Provides-Extra", []))
    # Extras are for users; what only a checkout needs is in dependency groups.
    assert extras == {"cuda", "flax", "solvers", "streaming", "tpu"}
    assert about["Requires-Python"] == ">=3.11"
    assert about["Version"] == msgd_jax.__version__


def test_the_page_on_a_package_index_has_no_link_or_picture_that_leads_nowhere(package):
    """Links of the README lead into the repository, where an index has nothing."""
    files = contents(package.wheel)
    (name,) = (name for name in files if name.endswith("METADATA"))
    about = email.message_from_bytes(files[name])
    assert about["Description-Content-Type"] == "text/markdown"
    page = about.get_payload()
    relative = re.compile(r"\[[^\]]*\]\((?!https?:)[^)]*\)")
    readme = (ROOT / "README.md").read_text()
    assert len(relative.findall(readme)) > 20
    assert not relative.findall(page)
    # Its text is whole: what links say stays, and so do the blocks of code.
    assert "Which noise should I use?" in page
    assert re.findall(r"```python.*?```", page, re.S) == re.findall(
        r"```python.*?```", readme, re.S
    )
    assert 0.8 * len(readme.split()) < len(page.split()) < len(readme.split())


def test_the_sdist_has_the_whole_and_builds_the_same_wheel(package, tmp_path):
    with tarfile.open(package.sdist) as files:
        files.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in (
        "tests/support/noises.py",
        "docs/index.md",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "SECURITY.md",
    ):
        assert (source / name).is_file(), name
    build(source, tmp_path / "dist", "wheel")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert contents(wheel) == contents(package.wheel)


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory) -> dict[str, str]:
    """The environment variables of a Python that has the wheel, and not the checkout.

    Other packages are linked from the environment of the tests, so that nothing is downloaded.
    """
    home = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    for path in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "msgd_jax" not in path.name and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    with zipfile.ZipFile(package.wheel) as files:
        files.extractall(site)
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return outside | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def pyright(environment: dict[str, str], folder: pathlib.Path, *arguments: str) -> dict:
    """What pyright reports, as JSON."""
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", ["right.py", "wrong.py"])
def test_a_type_checker_sees_what_is_right_and_what_is_wrong(name, installed, tmp_path):
    shutil.copy(CLIENTS / name, tmp_path)
    found = pyright(installed, tmp_path, name)["generalDiagnostics"]
    lines = {entry["range"]["start"]["line"] + 1 for entry in found}
    text = (CLIENTS / name).read_text().splitlines()
    assert lines == {i for i, line in enumerate(text, 1) if line.endswith("# error")}, found


def test_every_public_type_is_known(installed, tmp_path):
    found = pyright(installed, tmp_path, "--verifytypes", "msgd_jax", "--ignoreexternal")
    complete = found["typeCompleteness"]
    assert str(ROOT) not in complete["packageRootDirectory"]  # It has checked the wheel.
    assert complete["pyTypedPath"].endswith("py.typed")
    unknown = {entry["name"] for entry in complete["symbols"] if not entry["isTypeKnown"]}
    # Its return type is optax's, which pyright does not follow through `optax.experimental`.
    assert unknown <= {"msgd_jax.transform.aggregate_per_example"}
    assert len(complete["symbols"]) > 100
