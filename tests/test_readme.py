"""The README's example runs as printed, and learns."""

import pathlib
import re

import numpy as np

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run_and_learn():
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    for example in examples:
        exec(example, names)
    final = names["loss_vector_fn"](names["params"], names["data"]).mean()
    assert float(final) < 0.7 * np.log(2)  # it starts at ln 2
    assert names["values"].shape == (100,)
    assert names["gradients"].shape == (100, 20)
    distance = np.linalg.norm(names["fine"].last_params - names["msgd"].last_params)
    assert 0 < distance < 0.05 * np.linalg.norm(names["fine"].last_params - names["params"])
    local = names["local"]
    assert np.all(local.draws > local.at_centre)
    assert 0 <= float(local.gap.max()) < 0.01
    assert len(names["trained"].params.sharding.device_set) == 8
    assert names["metrics"].loss[-1] < names["metrics"].loss[0]


def test_every_noise_is_in_the_table():
    from msgd_jax import noise

    for name in noise.__all__:
        if name[0].islower() and name not in ("matching_scale", "permute"):
            assert f"`{name}(N" in README, name
