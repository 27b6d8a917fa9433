"""Each draw of the experiments has a stream of its own, derived from the key of the run."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import experiments
from experiments import data, training
from experiments.data import _draws
from experiments.training import _augmentation, _optimizers, loop
from experiments.training.config import TrainConfig
from msgd_jax._streams import Stream, derive
from tests.support.statistics import assert_agree

FILES = sorted(pathlib.Path(experiments.__file__).parent.rglob("*.py"))
# These make a key from a seed, copy a key, or look at it, and draw nothing.
NOT_DRAWN = {"key", "clone", "key_data", "key_impl", "wrap_key_data"}
# This file has an initialiser for flax, which calls it with a key derived from the parameters' key.
OF_FLAX = {"layers.py"}
# The recorded studies split the key of a stream, and draw from the keys of a stream in a loop.
INSIDE_A_STREAM = {
    "split",
    "normal",
    "permutation",
    "randint",
    "choice",
    "uniform",
    "exponential",
    "rademacher",
}


def key_calls(source):
    """Calls of `jax.random` in a source: their names, and whether `derive` made their keys."""
    tree = ast.parse(source)
    # First the names that are assigned from an expression with a call of `derive`.
    derived = set()
    for node in ast.walk(tree):
        targets, value = [], None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.comprehension):
            targets, value = [node.target], node.iter
        if value is not None and any(
            isinstance(part, ast.Call)
            and isinstance(part.func, ast.Name)
            and part.func.id == "derive"
            for part in ast.walk(value)
        ):
            derived |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    # Then the calls, whose first argument must be such a name.
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("jax.random."):
            key = node.args[0] if node.args else None
            yield node.func.attr, isinstance(key, ast.Name) and key.id in derived


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_keys_that_are_drawn_with_are_made_by_derive_alone(path):
    source = path.read_text(encoding="utf-8")
    # Other ways to import `jax.random` would hide its calls.
    assert "jax.random import" not in source
    assert "jax import random" not in source
    for name, from_derive in key_calls(source):
        if path.parent.name in ("decide", "noise_study") and name in INSIDE_A_STREAM:
            continue
        assert name not in ("split", "fold_in"), path.name
        assert name in NOT_DRAWN or from_derive or path.name in OF_FLAX, (path.name, name)


def test_the_reader_of_sources_sees_a_draw_with_the_runs_own_key():
    found = "a = derive(key, 1)\nb, c = (derive(key, i) for i in range(2))\n"
    drawn = key_calls(found + "jax.random.normal(a, ())\njax.random.normal(c, ())")
    assert list(drawn) == [("normal", True)] * 2
    for wrong in ("jax.random.normal(key, ())", "jax.random.normal(jax.random.key(0))"):
        assert ("normal", False) in list(key_calls(found + wrong))


def test_what_a_run_draws_is_not_what_its_user_draws():
    """No key of a stream is the run's key, or one that `split` or `fold_in` makes from it."""
    key = jax.random.key(3)
    with jax.debug_key_reuse(False):
        keys = [key, *jax.random.split(key, 50), *jax.random.split(key, 3)]
        keys += [
            jax.random.fold_in(key, np.uint32(i))
            for i in (*range(50), 2**31, 2**32 - 1, 2**32 - 2, 2**32 - 3)
        ]
        users = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
    of_run = [derive(key, s) for s in Stream]
    of_run += [derive(key, Stream.AUGMENTATION, 5, i) for i in range(2)]
    of_run += [derive(key, Stream.LANGEVIN, step, i) for step in range(3) for i in range(4)]
    own = [tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in of_run]
    assert len(set(own)) == len(own)
    assert not users & set(own)


def test_a_run_has_the_key_of_its_seed_and_streams_of_it():
    """Initial parameters and the regulariser's key of two seeds are those of each seed alone."""

    def keeps_its_key(key):
        return optax.GradientTransformation(
            lambda params: jnp.copy(key), lambda updates, state, params=None: (updates, state)
        )

    plan = TrainConfig(dataset="digits", algorithm="gd", steps=1, seeds=2, seed=7, eval_every=1)
    state = training.make_trainer(plan, data.load("digits"), keeps_its_key).start()
    init_params = training.model_functions("digits_net", 16).init_params
    for i, seed in enumerate((7, 8)):
        key = jax.random.key(seed)
        params = init_params(derive(key, Stream.PARAMETERS)[None])
        same = jax.tree.map(lambda a, b, i=i: np.array_equal(a[i], b[0]), state.params, params)
        assert all(jax.tree.leaves(same))
        found = [state.key[i], state.opt_state[0][i]]
        for own, wanted in zip(found, [key, derive(key, Stream.REGULARIZER)], strict=True):
            np.testing.assert_array_equal(jax.random.key_data(own), jax.random.key_data(wanted))


def test_langevin_noise_is_not_the_runs_other_draws():
    """The noise of step 0 shares no number with normals from the run's key or keys made from it."""
    key, params = jax.random.key(0), {"a": jnp.zeros(5), "b": jnp.zeros(5)}
    transform = _optimizers.additive_noise(key, "diagonal-fisher", batch_size=1)
    losses = lambda params, data: data @ (params["a"] + params["b"])  # noqa: E731
    state = transform.init(params)
    noise, _ = transform.update(
        params, state, params, loss_vector_fn=losses, data=jnp.eye(5) * np.sqrt(5)
    )
    drawn = np.stack([noise["a"], noise["b"]])
    assert abs(drawn).min() > 0
    assert (drawn[0] != drawn[1]).all()
    with jax.debug_key_reuse(False):
        step_key = jax.random.fold_in(key, 0)
        others = [key, *jax.random.split(key), *jax.random.split(step_key), step_key]
        for other in others:
            for shape in ((5,), (2, 5)):
                normals = np.asarray(jax.random.normal(other, shape)).reshape(-1, 5)
                assert not np.isclose(drawn[:, None], normals, rtol=1e-4).any()
    # The state has a key of its own, so that a loop may give both away.
    found, given = (jax.random.key_data(k).unsafe_buffer_pointer() for k in (state.key, key))
    assert found != given


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["augmentation", "langevin", "examples"])
def test_draws_are_the_same_with_64_bit_types(kind):
    def draw():
        key = jax.random.key(1)
        if kind == "examples":
            return data.load("digits", seed=1).train_indices
        if kind == "augmentation":
            batch = _augmentation.draw(
                key, jnp.int32(2), data.Examples(np.zeros((50, 8, 8, 1), np.uint8), np.zeros(50))
            )
            return np.concatenate([np.asarray(batch.shift), np.asarray(batch.flip)[:, None]], 1)
        params = {"a": jnp.zeros(5, jnp.float32)}
        transform = _optimizers.additive_noise(key, "diagonal-fisher", batch_size=1)
        noise, _ = transform.update(
            params,
            transform.init(params),
            params,
            loss_vector_fn=lambda p, data: data @ p["a"],
            data=jnp.eye(5, dtype=jnp.float32),
        )
        return np.asarray(noise["a"])

    narrow = draw()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(), narrow)


def test_a_subset_is_not_the_order_that_the_split_was_drawn_in():
    """A subset of images that were drawn is uniform among them, and not those drawn first.

    The number among the first 500 of 1,000 is hypergeometric, with a standard error of 6.3.
    """
    assert (_draws.permutation(1_000, 0, 0) != _draws.permutation(1_000, 0, 1)).mean() > 0.9
    whole = data.load("digits", seed=4)
    train = data.subset(whole, 300, 300, seed=4)
    other_test = data.subset(whole, 300, 300, seed=5)
    np.testing.assert_array_equal(train.test.image, other_test.test.image)
    # The images of the subset, counted by their places in the order in which the split was drawn.
    drawn = np.searchsorted(np.sort(whole.train_indices), train.train_indices)
    assert len(set(drawn)) == 300
    order = {index: place for place, index in enumerate(whole.train_indices)}
    first = sum(order[index] < 500 for index in train.train_indices)
    assert_agree(first, 150, np.sqrt(300 * 0.25 * 700 / 999))


def test_another_draw_of_the_noise_starts_from_the_same_weights_and_images():
    """This is SGD with another key, the noise floor of the figures. Two such draws differ too."""
    plans = [
        TrainConfig(dataset="digits", steps=1, seeds=2, subset_per_seed=True, noise_draw=draw)
        for draw in range(3)
    ]
    runs = [list(training.train_seeds(plan, loop.load(plan))) for plan in plans]
    starts, ends = ([run[i][1].train_loss for run in runs] for i in (0, 1))
    for start in starts[1:]:
        np.testing.assert_array_equal(start, starts[0])
    assert len({float(end[0]) for end in ends}) == len({float(end[1]) for end in ends}) == 3
    assert plans[1].label == "SGD-50, another key"
