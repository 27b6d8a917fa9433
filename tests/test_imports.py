"""What the library imports and exports, and who may import whom: the table in CONTRIBUTING.md."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import msgd_jax

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [
    "complexity",
    "covariance",
    "flax_nnx",
    "loss",
    "measure",
    "noise",
    "sde",
    "sharding",
    "streaming",
    "train",
    "transform",
]
# Private files of the library that every module may use.
SHARED = {
    "_dtypes",
    "_estimate",
    "_loaders",
    "_mesh",
    "_narrow",
    "_optimizers",
    "_programs",
    "_sources",
    "_streams",
    "_typing",
    "_validate",
    "_values",
}
# Packages that only extras and dependency groups install, and folders that the wheel does not have.
FORBIDDEN = (
    "flax",
    "orbax",
    "tensorflow",
    "tensorflow_datasets",
    "matplotlib",
    "sklearn",
    "tyro",
    "tqdm",
    "diffrax",
    "equinox",
    "lineax",
    "psutil",
    "torch",
    "grain",
    "experiments",
    "benchmarks",
    "pytest",
    "hypothesis",
    "beartype",
)


# The core is imported once, and each module in a copy of that process.
ALONE = """
import importlib, os, sys, warnings
import jax, jaxtyping, numpy, optax
core = {name for name in sys.modules if "pallas" in name}
warnings.simplefilter("ignore")  # of copies of a process that has threads: it has none yet
for module in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(module)
        names = {name.split(".")[0] for name in sys.modules}
        names |= {name for name in sys.modules if "pallas" in name} - core
        print(module, *names, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, module
"""


def test_each_module_alone_pulls_in_the_core_only():
    modules = ["msgd_jax", *(f"msgd_jax.{name}" for name in MODULES)]
    command = [sys.executable, "-c", ALONE, *modules]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    pulled = {line.split()[0]: set(line.split()[1:]) for line in ran.stdout.splitlines()}
    assert list(pulled) == modules
    for module, names in pulled.items():
        assert "msgd_jax" in names
        assert not set(FORBIDDEN) & names, module
        # It takes longer than the whole library, and jax.extend imports it.
        assert not [name for name in names if "pallas" in name], module


def allowed_imports() -> dict[str, set[str]]:
    """Which modules of the library each of them may import, by the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `msgd_jax/([a-z][a-z_]*)(?:/|\.py)` \|.*\| (.*) \|$", text, re.M)
    return {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}


def imported(path: pathlib.Path) -> set[tuple[str, ...]]:
    """All imports of a file, those in functions too: ("msgd_jax", "noise", "cov"), ("jax",), ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {(*(node.module or "").split("."), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    return found


def ours(path: pathlib.Path) -> set[tuple[str, ...]]:
    """The imports of a file that are of this repository: ("noise", "_types"), ("experiments",)."""
    found = imported(path)
    library = {name[1:] for name in found if name[0] == "msgd_jax"}
    return library | {name[:1] for name in found if name[0] in ("experiments", "benchmarks")}


def files_of(module: str) -> list[pathlib.Path]:
    """The files of a module, which is a folder or one file."""
    folder = ROOT / "msgd_jax" / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_help_has_a_line_for_every_module():
    lines = re.findall(r"^\* `(\w+)`: .+\.$", msgd_jax.__doc__ or "", re.M)
    assert sorted(lines) == sorted(MODULES)
    assert len(re.findall(r"^>>> ", msgd_jax.__doc__ or "", re.M)) <= 7


def test_the_table_of_the_house_has_every_module():
    assert set(allowed_imports()) == set(MODULES) == set(msgd_jax.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_where_the_table_says(module):
    allowed = allowed_imports()[module] | {module} | SHARED
    if "noise" in allowed:
        allowed |= {"_laws"}
    for path in files_of(module):
        for first, *rest in ours(path):
            assert first in allowed, f"{path.name} imports {first}"
            private = [name for name in rest if name.startswith("_")]
            assert first == module or not private, f"{path.name} imports {private} of {first}"


def test_what_is_shared_stands_on_nothing():
    for path in (ROOT / "msgd_jax").glob("_*.py"):
        if path.stem not in ("__init__", "_laws"):
            assert {name[0] for name in ours(path)} <= SHARED, path.name


def test_tests_of_the_library_stand_on_it_alone():
    for path in (ROOT / "tests" / "library").rglob("*.py"):
        others = {name[0] for name in imported(path)} & {"experiments", "benchmarks", "docs"}
        assert not others, f"{path.name} imports {others}"


# The files of `experiments` outside its rooms: those for all rooms, and those that use all rooms.
COMMON = {"_typing", "figures", "huge_pages", "records", "styles", "tables", "terminal"}
COMMAND_LINE = {"__main__", "commands"}


def rooms() -> dict[str, set[str]]:
    """Which rooms of the experiments each of them may use, by the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^\| `experiments/([a-z_]+)/` \|.*\| the library(.*) \|$", text, re.M)
    return {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in found}


def in_experiments(path: pathlib.Path) -> set[tuple[str, ...]]:
    """The imports of a file from `experiments`: ("training", "runs"), ("figures", "save"), ..."""
    return {name[1:] for name in imported(path) if name[0] == "experiments"}


def test_the_table_of_the_house_has_every_room_and_file_of_the_experiments():
    folder = ROOT / "experiments"
    assert set(rooms()) == {path.parent.name for path in folder.glob("*/__init__.py")}
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == COMMON | COMMAND_LINE


@pytest.mark.parametrize("room", sorted(rooms()))
def test_arrows_between_rooms_point_where_the_table_says(room):
    assert ast.get_docstring(ast.parse((ROOT / "experiments" / room / "__init__.py").read_text()))
    for path in (ROOT / "experiments" / room).rglob("*.py"):
        assert ("benchmarks",) not in ours(path), path.name
        for first, *rest in in_experiments(path):
            assert first in rooms()[room] | {room} | COMMON, f"{path.name} imports {first}"
            private = [name for name in rest if name.startswith("_")]
            assert first == room or not private, f"{path.name} imports {private} of {first}"


def test_what_the_rooms_share_stands_on_none_of_them():
    for name in COMMON:
        used = {first for first, *_ in in_experiments(ROOT / "experiments" / f"{name}.py")}
        assert used <= COMMON, name
    for name in COMMAND_LINE:
        path = ROOT / "experiments" / f"{name}.py"
        assert ("benchmarks",) not in ours(path)
        assert not [part for _, *rest in in_experiments(path) for part in rest if part[0] == "_"]


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_has_at_most_five_files_for_others(room):
    """Files for others have no underscore, and only they are imported from outside the room.

    Tests are the exception: they may import files with an underscore.
    """
    files = [path.stem for path in (ROOT / "experiments" / room).glob("*.py")]
    assert len([name for name in files if not name.startswith("_")]) <= 5
    outside = [
        path
        for folder in ("experiments", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent != ROOT / "experiments" / room and "_build" not in path.parts
    ]
    for path in outside:
        for first, *rest in in_experiments(path):
            assert first != room or not rest or not rest[0].startswith("_"), path.name


@pytest.mark.parametrize("room", sorted(rooms()))
def test_what_a_face_hands_out_is_there_and_documented(room):
    face = importlib.import_module(f"experiments.{room}")
    assert len(set(face.__all__)) == len(face.__all__)
    for public in face.__all__:
        value = getattr(face, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, public


def test_the_tests_of_the_experiments_mirror_their_rooms():
    folder = ROOT / "tests" / "experiments"
    assert {path.parent.name for path in folder.glob("*/__init__.py")} == set(rooms())


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name):
    module = getattr(msgd_jax, name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, public
