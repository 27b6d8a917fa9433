"""What every transformation must do: these tests run over the table of transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.support.transforms import (
    PROBLEM,
    assert_trees_close,
    assert_trees_identical,
    everywhere,
    fresh_key,
)


@everywhere
def test_updates_are_like_params_and_change_with_the_step(row):
    tx = row.make(fresh_key())
    state = tx.init(PROBLEM.params)
    updates = []
    for _ in range(4):
        update, state = row.update(tx, state, PROBLEM.params)
        chex.assert_trees_all_equal_shapes_and_dtypes(update, PROBLEM.params)
        updates.append(update)
    assert (updates[1]["w"] != updates[3]["w"]).any()


@everywhere
def test_update_is_pure(row):
    tx = row.make(fresh_key())
    _, state = row.update(tx, tx.init(PROBLEM.params), PROBLEM.params)
    assert_trees_identical(
        row.update(tx, state, PROBLEM.params), row.update(tx, state, PROBLEM.params)
    )


@everywhere
def test_jit_and_scan_give_the_same_updates(row):
    tx = row.make(fresh_key())

    def step(state, _):
        update, state = row.update(tx, state, PROBLEM.params)
        return state, update

    state, eager = tx.init(PROBLEM.params), []
    for _ in range(3):
        state, update = step(state, None)
        eager.append(update)
    _, scanned = jax.lax.scan(step, tx.init(PROBLEM.params), length=3)
    _, jitted = jax.jit(step)(tx.init(PROBLEM.params), None)
    assert_trees_close(jitted, eager[0])
    assert_trees_close(scanned, jax.tree.map(lambda *x: jnp.stack(x), *eager))


@everywhere
def test_vmap_over_keys_draws_different_noise(row):
    def two_updates(key):
        tx = row.make(key)
        state = tx.init(PROBLEM.params)
        for _ in range(2):
            update, state = row.update(tx, state, PROBLEM.params)
        return update

    seeds = jnp.arange(3)
    mapped = jax.vmap(lambda seed: two_updates(jax.random.key(seed)))(seeds)
    for i in range(3):
        alone = two_updates(jax.random.key(i))
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], mapped), alone)
    assert np.unique(np.asarray(mapped["w"]), axis=0).shape[0] == 3


@everywhere
def test_second_update_does_not_recompile(row):
    tx = row.make(fresh_key())
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(1)
        update, state = row.update(tx, state, params)
        return optax.apply_updates(params, update), state

    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    for _ in range(3):
        params, state = step(state, params)
    assert len(traces) == 1


@everywhere
def test_state_keeps_shape_dtype_and_sharding(row):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    tx = row.make(fresh_key())
    params = jax.device_put(PROBLEM.params, replicated)
    state = jax.device_put(tx.init(params), replicated)
    _, new = jax.jit(lambda state, params: row.update(tx, state, params))(state, params)
    chex.assert_trees_all_equal_structs(state, new)
    for old_leaf, new_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert (old_leaf.shape, old_leaf.dtype) == (new_leaf.shape, new_leaf.dtype)
        assert new_leaf.sharding.is_equivalent_to(replicated, new_leaf.ndim)


@everywhere
def test_a_donated_state_does_not_delete_the_callers_key(row):
    key = fresh_key()
    tx = row.make(key)
    step = jax.jit(lambda s, p: row.update(tx, s, p), donate_argnums=0)
    first, _ = step(tx.init(PROBLEM.params), PROBLEM.params)
    again, _ = step(tx.init(PROBLEM.params), PROBLEM.params)
    assert_trees_identical(first, again)
    assert not key.is_deleted()
    assert jax.random.key_data(key).tolist() == jax.random.key_data(fresh_key()).tolist()


@everywhere
def test_state_survives_an_orbax_checkpoint(row, tmp_path):
    tx = row.make(fresh_key())
    _, state = row.update(tx, tx.init(PROBLEM.params), PROBLEM.params)
    expected, _ = row.update(tx, state, PROBLEM.params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(PROBLEM.params))
    assert_trees_identical(restored, state)
    assert_trees_identical(row.update(tx, restored, PROBLEM.params)[0], expected)
