"""The contestants of `against_torch` compute the same, and its processes follow their tasks."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import against_torch, problems, rows, torch_gradients, workers
from benchmarks.workers import (
    AS_IS,
    HUGE,
    KEPT,
    OURS,
    TORCH,
    Contestant,
    Settings,
    Task,
    Worker,
)
from experiments import huge_pages
from msgd_jax import loss, noise

NO_TORCH = "PyTorch, the contestant, is not installed (pip install -e . --group benchmarks)"


def gradient_of_ours(row, reference):
    """The weighted loss, the statistics and the gradient at the reference.

    Examples are in the order of the first step, since ghost batches depend on it.
    """
    data = tuple(jnp.asarray(a[reference.order]) for a in (reference.images, reference.labels))
    weights = noise.Weights(jnp.asarray(reference.weights[reference.order]), None, row.num_examples)
    value_and_grad = loss.weighted_value_and_grad(
        rows.loss_vector_fn(row), microbatch_size=row.microbatch_size, has_state=row.normalises
    )
    params = jax.tree.map(jnp.asarray, reference.params)
    state = (rows.model(row).init_stats(),) if row.normalises else ()
    value, grads = value_and_grad(params, data, weights, *state)
    return (value[0], value[1], grads) if row.normalises else (value, {}, grads)


@pytest.mark.parametrize("name", ["lenet", "vgg11-16", "resnet18-8"])
def test_the_nets_are_the_same_functions(name):
    """At the same parameters, PyTorch's loss, gradient and statistics are ours up to rounding."""
    torch_nets = pytest.importorskip("benchmarks.torch_nets", reason=NO_TORCH)
    row = rows.TINY[name]
    reference = rows.reference(row)
    value, stats, grads = gradient_of_ours(row, reference)
    expected = torch_nets.in_torch_layout(jax.tree.map(np.asarray, grads))
    running = torch_nets.in_torch_layout(jax.tree.map(np.asarray, stats))
    for microbatched, channels_last in ((True, False), (False, True)):
        step = torch_nets.Step(
            row,
            reference,
            device="cpu",
            microbatched=microbatched,
            channels_last=channels_last,
            compiled=None,
        )
        assert step.check(reference.weights)[0] == pytest.approx(float(value), rel=1e-4)
        found = torch_nets.gradients(step.net)
        assert found.keys() == expected.keys()
        largest = max(np.abs(leaf).max() for leaf in expected.values())
        for key, leaf in expected.items():
            np.testing.assert_allclose(found[key], leaf, rtol=1e-4, atol=1e-4 * largest)
        buffers = dict(step.net.named_buffers())
        for key, leaf in running.items():
            theirs = buffers[
                key.replace(".mean", ".running_mean").replace(".variance", ".running_var")
            ]
            np.testing.assert_allclose(theirs.numpy(), leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(rows.ROWS))
def test_the_nets_have_as_many_parameters_in_full_size(name):
    torch_nets = pytest.importorskip("benchmarks.torch_nets", reason=NO_TORCH)
    row = rows.ROWS[name]
    shapes = jax.eval_shape(rows.model(row).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    net = torch_nets.build(row, params)  # This raises if a name or a shape is missing.
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", list(torch_gradients.NAMES))
def test_gradients_of_each_example_are_ours(name):
    if why := torch_gradients.missing(name):
        pytest.skip(f"{name} is not installed: {why}")
    problem = problems.two_layer_net(100, 7)
    expected = jax.jacrev(problem.loss_vector_fn)(problem.params, problem.data)
    gradients = torch_gradients.per_example(name, problem)
    gradients()  # A first call must leave nothing behind for the second.
    for key, found in zip(("w1", "b1", "w2", "b2"), gradients(), strict=True):
        leaf = np.asarray(expected[key])
        leaf = leaf.swapaxes(1, 2) if leaf.ndim == 3 else leaf
        np.testing.assert_allclose(found.detach().numpy(), leaf, rtol=1e-4, atol=1e-5)
    draws = torch_gradients.draw_function(name, problem)()
    assert [d.shape for d in draws] == [g.shape[1:] for g in gradients()]


@pytest.mark.slow
def test_the_reference_has_the_order_of_the_first_step():
    """The members of each ghost batch are drawn, and are found here by sums over them."""
    row = rows.TINY["resnet18-8"]
    order = rows.reference(row).order
    assert sorted(order) == list(range(row.num_examples)) != list(order)
    data = jnp.arange(row.num_examples, dtype=jnp.float32)

    def sums(params, batch, state):
        return params * batch, jnp.append(state[1:], batch.sum())

    (_, seen), _ = loss.noisy_value_and_grad(
        sums, rows.law(row), microbatch_size=row.microbatch_size, has_state=True
    )(jnp.float32(1), data, rows.key(), 0, jnp.zeros(2))
    np.testing.assert_array_equal(seen, order.reshape(2, -1).sum(1))


def settings(library=OURS, allocator=AS_IS):
    """The settings of a process on one core."""
    return Settings(library, "cpu", allocator, 1)


def test_a_process_has_huge_pages_or_says_that_there_are_none():
    worker = Worker(settings(allocator=HUGE))
    try:
        if huge_pages.are_available():
            assert worker.ask("prepare", [], 1.0, 1, timeout=60) == []
        else:
            with pytest.raises(workers.WorkerError, match="no huge pages on request"):
                worker.ask("prepare", [], 1.0, 1, timeout=60)
    finally:
        worker.close()


@pytest.fixture
def worker():
    """A process, which is ended after the test."""
    worker = Worker(settings(allocator=KEPT))
    yield worker
    worker.close()


@pytest.mark.slow
def test_a_process_prepares_measures_and_says_what_is_wrong(worker):
    row = rows.Row("lenet", None, 6, 3)
    reference = rows.reference(row)
    broken = reference._replace(params={})
    tasks = [
        Task("good", Contestant(OURS, True), row, reference),
        Task("bad", Contestant(OURS, True), row, broken),
    ]
    good, bad = worker.ask("prepare", tasks, 120.0, 1, timeout=120)
    assert good["parameters"] == 11_330
    value, _, grads = gradient_of_ours(row, reference)
    assert good["loss"] == pytest.approx(float(value), rel=1e-5)
    norm = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grads)) ** 0.5
    assert good["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert "Error" in bad
    assert 0 < worker.ask("measure", "good", 2, timeout=60) < 60
    assert worker.ask("prepare", tasks[:1], -1.0, 1, timeout=60) == [workers.NO_TIME]
    with pytest.raises(workers.WorkerError, match="KeyError: 'bad'"):
        worker.ask("measure", "bad", 1, timeout=60)
    with pytest.raises(workers.OutOfTimeError, match="too long"):
        worker.ask("prepare", tasks[:1], 60.0, 1, timeout=0.01)
    with pytest.raises(workers.WorkerError):  # The process that took too long was ended.
        worker.ask("measure", "good", 1, timeout=60)


def measured(**seconds):
    """Made-up times of contestants, in seconds, and the contestants by short names."""
    names = {
        "ours": (Contestant(OURS, True), AS_IS),
        "huge": (Contestant(OURS, True), HUGE),
        "whole": (Contestant(OURS, False), AS_IS),
        "natural": (Contestant(TORCH, False), AS_IS),
        "kept": (Contestant(TORCH, False), KEPT),
    }
    found = against_torch.Measured(rows.ROWS["lenet"])
    found.seconds = {names[key]: np.array(values) for key, values in seconds.items()}
    found.checks = {name: {"setup": 1.0} for name in found.seconds}
    return found, names


def test_the_headline_is_against_the_best_contestant_by_medians_and_by_minima():
    found, names = measured(
        ours=[2.0, 2.0, 1.0], whole=[1.0, 1.0, 0.9], natural=[9.0, 8.0, 0.5], kept=[4.0, 4.0, 4.0]
    )
    assert found.best(TORCH) == names["kept"]
    headline = against_torch._headline(found)
    assert headline.measured.startswith("0.50 (quartiles 0.38 to 0.50); of the minima 2.00")
    assert headline.measured.endswith("whole batch, as it is): 0.25")
    assert headline.met
    lines = against_torch._lines(found)
    assert [line["ms per step"] for line in lines] == ["1e+03", "2e+03", "4e+03", "8e+03"]


def test_our_step_is_shown_as_the_experiments_make_it_in_huge_pages_if_there_are_any():
    found, names = measured(whole=[1.0], ours=[2.0], huge=[3.0])
    assert found.ours() == names["huge"]
    del found.seconds[names["huge"]]
    assert found.ours() == names["ours"]


def test_a_contestant_that_computes_something_else_is_left_out():
    found, names = measured(ours=[1.0], natural=[1.0], kept=[1.0])
    right = {"parameters": 5, "loss": 2.0, "gradient_norm": 3.0, "setup": 1.0}
    found.checks = {
        names["ours"]: right,
        names["natural"]: right | {"setup": 50.0, "loss": 2.001},
        names["kept"]: right | {"gradient_norm": 3.1},
    }
    against_torch._check(found, 1e-2)
    assert list(found.left_out) == [names["kept"]]
    assert "gradient_norm in the first step is 3.1, ours 3" in found.left_out[names["kept"]]


def test_contestants_are_every_way_that_computes_the_same():
    names = against_torch.contestants(rows.ROWS["lenet"], "cpu")
    assert len(names) == len(set(names)) == 3 * (2 + 6)
    ours = [
        c for c, _ in against_torch.contestants(rows.ROWS["resnet18-8"], "cpu") if c.library == OURS
    ]
    # With batch norm, the whole batch at once would be another function.
    assert {c.microbatched for c in ours} == {True}
    assert {a for _, a in against_torch.contestants(rows.ROWS["lenet"], "cuda")} == {AS_IS}


def test_bad_configurations_are_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match=r"rows must name some of .*got \('alexnet',\)"):
        against_torch.Config(rows=("alexnet",))
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        against_torch.Config(device="tpu")


@pytest.mark.slow
def test_contestants_that_have_no_time_left_are_named(capsys, tmp_path):
    from benchmarks import step_overhead

    start = time.monotonic()
    config = step_overhead.Config(
        examples=12,
        batch_size=2,
        support_size=4,
        microbatch_size=4,
        repeats=1,
        sparse_steps=1,
        seconds=1e-3,
        out=tmp_path / "out",
    )
    headlines = step_overhead.main(config)
    said = capsys.readouterr().out
    assert "no time to compile: " in said
    assert "no time: sparse_fisher, sparse_cov, svag" in said
    assert len(headlines) == 1
    assert "largest of the dense noises" in headlines[0].figure
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_the_plain_step_in_microbatches_is_the_plain_step():
    from benchmarks import step_overhead
    from msgd_jax import train

    problem = problems.lenet(12)
    states = []
    for size in (None, 4):
        step = step_overhead.plain_step(problem, 12, replace=False, microbatch_size=size)
        state = train.init(problem.params, step_overhead.optax.sgd(0.01), jax.random.key(0))
        states.append(jax.jit(step)(state, problem.data))
    (one, metrics), (parts, other) = states
    assert float(metrics.loss) == pytest.approx(float(other.loss), rel=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
