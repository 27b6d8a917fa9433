"""The code of each page, copied into a file and run as a reader would: `make test-pages`.

Each page is run outside the checkout, with the wheel instead of the checkout, in an environment
that has what the first line of the page installs, and nothing else.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

from docs import pages

ROOT = pathlib.Path(__file__).parent.parent


def build_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Builds the wheel of this checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def environment(
    folder: pathlib.Path, requirements: tuple[str, ...], wheel: pathlib.Path, constraints: str
) -> pathlib.Path:
    """Makes an environment with these requirements, the wheel in place of msgd-jax.

    Returns:
        The Python of the environment.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    wanted = [
        f"{name} @ {wheel.as_uri()}" if name.startswith("msgd-jax") else name
        for name in requirements
    ]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", constraints, *wanted], check=True)
    return python


def processor_seconds() -> float:
    """The processor time, in seconds, of all processes that this one started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(python: pathlib.Path, name: str, text: str, folder: pathlib.Path) -> bool:
    """Runs the code of a page, prints how it went, and says whether it passed."""
    file = folder / f"{name.replace('/', '_')}.py"
    file.write_text(pages.script(text))
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    began, cpu = time.perf_counter(), processor_seconds()
    ran = subprocess.run(
        [str(python), file.name],
        cwd=folder,
        env=outside | {"MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    passed = ran.returncode == 0
    took = f"{time.perf_counter() - began:6.1f} s, {processor_seconds() - cpu:6.1f} s of CPU"
    print(f"{name:34} {'passed' if passed else 'FAILED'} {took}", flush=True)
    if not passed:
        print(ran.stdout[-2000:], ran.stderr[-4000:], sep="\n", flush=True)
    return passed


def main() -> None:
    """Runs all pages, or those that are named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "pages", nargs="*", help="Names of pages, such as tutorials/sde. By default, all are run."
    )
    parser.add_argument(
        "--constraints",
        default=str(ROOT / "constraints.txt"),
        help="The file of versions that pip keeps to. (default: %(default)s)",
    )
    options = parser.parse_args()
    texts = dict(pages.runnable())
    if unknown := set(options.pages) - set(texts):
        parser.error(f"pages must be among {', '.join(texts)}; got {', '.join(sorted(unknown))}.")

    # Pages with the same first line share an environment, which is removed before the next is made.
    alike = defaultdict(list)
    for name in options.pages or texts:
        alike[tuple(pages.requirements(texts[name]) or ())].append(name)
    results = []
    with tempfile.TemporaryDirectory() as wheels:
        wheel = build_wheel(pathlib.Path(wheels))
        for requirements, names in alike.items():
            print(f"pip install {' '.join(requirements)}", flush=True)
            with tempfile.TemporaryDirectory() as made:
                folder = pathlib.Path(made)
                python = environment(folder / "env", requirements, wheel, options.constraints)
                results += [run(python, name, texts[name], folder) for name in names]
    print(f"{sum(results)} of {len(results)} pages passed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
