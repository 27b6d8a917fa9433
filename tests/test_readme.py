"""The README's example runs as it is printed, and its links and its table are complete."""

import pathlib
import re

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_learns():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(example, names)
    final = names["loss_vector_fn"](names["params"], names["data"]).mean()
    # At the start, with all parameters zero, each loss is ln 2.
    assert float(final) < 0.7 * np.log(2)


def test_files_that_the_readme_points_to_exist():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert len(targets) > 10
    for target in targets:
        assert "://" in target or (ROOT / target).exists(), target


def test_every_law_is_in_the_table():
    from msgd_jax import noise

    for name in noise.__all__:
        if name[0].islower() and name not in ("matching_scale", "permute"):
            assert re.search(rf"`{name}\([N\[L]", README), name
