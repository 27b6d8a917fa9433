"""Examples that are read when they are needed give the same bits as data on the device."""

import sys
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import noise, sharding, streaming, train
from tests.library.test_train import identical
from tests.support.mistakes import assert_told
from tests.support.problems import Regression, loss_vector_fn, regression

N, STEPS = 203, 12
PROBLEM = regression(N)
DATA = jax.tree.map(np.asarray, PROBLEM.data)
OPTIMIZER = optax.sgd(0.2, momentum=0.9)
LAWS = {
    "sgd": noise.sgd(N, 20),
    "sgd with replacement": noise.sgd(N, 21, replace=True),
    "random_reshuffling": noise.random_reshuffling(N, 29),
    "sparse_cov": noise.sparse_cov(N, 10, support_size=45),
}


def start() -> train.TrainState:
    return train.init(PROBLEM.params, OPTIMIZER, jax.random.key(3))


def spread(num_devices: int) -> NamedSharding:
    mesh = jax.make_mesh((num_devices,), ("data",), devices=jax.devices()[:num_devices])
    return NamedSharding(mesh, PartitionSpec("data"))


def on_the_device(law, **options):
    """Trains with all data on the device, or on the devices of a sharding."""
    step = train.make_step(loss_vector_fn, OPTIMIZER, law, **options)
    rows = options.get("sharding")
    data = PROBLEM.data if rows is None else sharding.shard_examples(PROBLEM.data, rows)
    return train.make_loop(step, max_steps=STEPS)(start(), data, STEPS)


def assert_same_training(found, expected, spread: bool = False):
    """Asserts that two trainings end in the same state, bit for bit, with nearly the same losses.

    Losses are sums, which two programs may order differently. On several devices, data that are all
    there are computed where they are, and data that are read in equal parts: the sums of the
    gradient have another order too, and states are only nearly the same.
    """
    if not spread:
        assert identical(found[0], expected[0])
    numbers = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]  # noqa: E731
    for a, b in zip(numbers(found), numbers(expected), strict=True):
        tolerance = 2e-6 if spread else 3e-7
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class Recorder(streaming.ArraySource):
    """A source that remembers which examples were read, and by which threads."""

    def __init__(self, data):
        super().__init__(data)
        self.read = []
        self.threads = set()

    def read_batch(self, indices):
        self.read.append(np.array(indices))
        self.threads.add(threading.get_ident())
        return super().read_batch(indices)


@pytest.mark.optimized
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 8}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("name", LAWS)
def test_training_has_the_bits_of_training_with_data_on_the_device(name, options):
    expected = on_the_device(LAWS[name], **options)
    source = streaming.ArraySource(DATA)
    loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, LAWS[name], source, **options)
    assert_same_training(loop(start(), STEPS), expected)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_training_on_many_devices_is_that_with_data_on_them(num_devices):
    """On 8 devices, batches of 20 are filled up to 24."""
    options = {"sharding": spread(num_devices), "microbatch_size": 2}
    expected = on_the_device(LAWS["sgd"], **options)
    source = streaming.ArraySource(DATA)
    loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, LAWS["sgd"], source, **options)
    assert_same_training(loop(start(), STEPS), expected, spread=True)


def test_stopping_changes_no_bit_and_only_used_examples_are_read():
    source = Recorder(DATA)
    law = LAWS["random_reshuffling"]
    loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, law, source)
    straight, metrics = loop(start(), STEPS, prefetch=2, num_threads=3)
    draws = [law.sample(jax.random.key(3), step) for step in range(STEPS)]
    asked = [tuple(np.asarray(draw.indices).tolist()) for draw in draws]
    size = len(asked[0])
    read = [tuple(step.tolist()) for indices in source.read for step in indices.reshape(-1, size)]
    assert sorted(read) == sorted(asked)
    # The first step is read before there is a plan, the others by threads, several at a time.
    assert np.array_equal(source.read[0], asked[0])
    assert len(source.read) < STEPS
    assert source.threads - {threading.get_ident()}
    state, first = loop(start(), 5)
    state, rest = loop(state, STEPS - 5)
    assert identical(state, straight)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, rest)
    assert identical(both, metrics)


def test_sources_may_have_single_examples():
    """One is a plain sequence, the other a data set of grain with a transformation."""
    loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, LAWS["sgd"], streaming.ArraySource(DATA))
    expected = loop(start(), 4)
    halves = [{"x": x / 2, "y": y} for x, y in zip(DATA["x"], DATA["y"], strict=True)]
    double = grain.MapDataset.source(halves).map(lambda e: {"x": e["x"] * 2, "y": e["y"]})
    plain = [{"x": x, "y": y} for x, y in zip(DATA["x"], DATA["y"], strict=True)]
    for source in (double, plain):
        loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, LAWS["sgd"], source)
        assert identical(loop(start(), 4), expected)


class Counting(list):
    """A list of examples with a method ``batch`` that means something else."""

    def batch(self, batch_size):
        raise AssertionError("the library must not call this")


def test_a_method_batch_of_another_meaning_is_not_called():
    """Data sets of grain have one, and so may classes of users: their examples are read singly."""
    examples = [{"x": x, "y": y} for x, y in zip(DATA["x"], DATA["y"], strict=True)]
    loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, LAWS["sgd"], streaming.ArraySource(DATA))
    expected = loop(start(), 2)
    for source in (Counting(examples), grain.MapDataset.source(examples)):
        assert not isinstance(source, streaming.BatchSource)
        loop = streaming.make_loop(loss_vector_fn, OPTIMIZER, LAWS["sgd"], source)
        assert identical(loop(start(), 2), expected)
    assert isinstance(streaming.ArraySource(DATA), streaming.BatchSource)


KEYED = {**PROBLEM.data, "key": jax.random.split(jax.random.key(8), N)}


def dropped_out(params, batch):
    """Losses with dropout, whose keys are part of the examples."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (5,)))(batch["key"])
    return loss_vector_fn(params, {"x": batch["x"] * keep, "y": batch["y"]})


class KeysInBatches(streaming.ArraySource):
    """A source that reads keys as arrays of jax, on the default device."""

    def read_batch(self, indices):
        return {**super().read_batch(indices), "key": KEYED["key"][indices]}


# An example has the same key at every step, which the checker of keys takes for a reuse.
@pytest.mark.usefixtures("unchecked_key_reuse")
@pytest.mark.parametrize(
    "options",
    [{}, {"microbatch_size": 8}, {"sharding": spread(8)}],
    ids=["whole", "runs", "spread"],
)
@pytest.mark.parametrize(
    "make",
    [
        streaming.ArraySource,
        KeysInBatches,
        lambda data: [jax.tree.map(lambda leaf, i=i: leaf[i], data) for i in range(N)],
    ],
    ids=["arrays", "batches", "examples"],
)
def test_keys_may_be_part_of_the_examples(make, options):
    """Training has the bits of training with the keys on the device."""
    step = train.make_step(dropped_out, OPTIMIZER, LAWS["sgd"], **options)
    rows = options.get("sharding")
    data = KEYED if rows is None else sharding.shard_examples(KEYED, rows)
    expected = train.make_loop(step, max_steps=3)(start(), data, 3)
    loop = streaming.make_loop(dropped_out, OPTIMIZER, LAWS["sgd"], make(KEYED), **options)
    assert_same_training(loop(start(), 3), expected, spread=rows is not None)


@pytest.mark.usefixtures("unchecked_key_reuse")
def test_an_array_source_gives_single_examples():
    example = streaming.ArraySource(KEYED)[3]
    np.testing.assert_array_equal(example["x"], DATA["x"][3])
    found, given = (
        jax.random.key_data(keys["key"]) for keys in (example, {"key": KEYED["key"][3]})
    )
    np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_options_may_be_integers_of_any_type(dtype):
    source, two = streaming.ArraySource(DATA), dtype(2)
    loop = streaming.make_loop(
        loss_vector_fn, OPTIMIZER, noise.sgd(N, 2), source, microbatch_size=two
    )
    assert int(loop(start(), two, prefetch=two, num_threads=two)[0].step) == 2


def test_arrays_may_be_memory_mapped_files(tmp_path):
    np.save(tmp_path / "x.npy", DATA["x"])
    mapped = {"x": np.load(tmp_path / "x.npy", mmap_mode="r"), "y": DATA["y"]}
    loop = streaming.make_loop(
        loss_vector_fn, OPTIMIZER, LAWS["sgd"], streaming.ArraySource(mapped)
    )
    assert_same_training(loop(start(), STEPS), on_the_device(LAWS["sgd"]))


class Computed:
    """A source of up to 2^31 - 1 examples, each of which is computed from its number."""

    def __init__(self, size: int = 2**31 - 1):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        x = np.cos(float(index) * np.arange(1, 6)).astype(np.float32)
        return {"x": x, "y": np.float32(1.0 if x.sum() > 0 else -1.0)}


@pytest.mark.parametrize("make", [noise.random_reshuffling, noise.sgd])
def test_training_on_the_largest_number_of_examples(make):
    source = Computed() if make is noise.random_reshuffling else Computed(10_000)
    options = {"drop_remainder": True} if make is noise.random_reshuffling else {}
    law = make(len(source), 32, **options)
    loop = streaming.make_loop(loss_vector_fn, optax.sgd(1.0), law, source, microbatch_size=10)
    _, metrics = loop(train.init(PROBLEM.params, optax.sgd(1.0), jax.random.key(4)), 60)
    assert metrics.loss.shape == (60,)
    assert metrics.loss[-10:].mean() < 0.7 * metrics.loss[:5].mean()
    # The reference of the last loss is the mean over the 32 examples of step 59, by numpy.
    before, _ = loop(train.init(PROBLEM.params, optax.sgd(1.0), jax.random.key(4)), 59)
    indices = law.sample(jax.random.key(4), 59).indices.tolist()
    examples = jax.tree.map(lambda *leaves: np.stack(leaves), *[source[i] for i in indices])
    losses = Regression(before.params, examples).losses()
    np.testing.assert_allclose(metrics.loss[-1], losses.mean(), rtol=1e-4)


def test_statistics_are_those_with_data_on_the_device():
    """The statistics are a running mean of x over ghost batches."""

    def with_mean(params, batch, model_state):
        return loss_vector_fn(params, batch), 0.9 * model_state + 0.1 * batch["x"].mean(0)

    options = {"microbatch_size": 5, "has_state": True}
    step = train.make_step(with_mean, OPTIMIZER, LAWS["sgd"], **options)
    first = train.init(PROBLEM.params, OPTIMIZER, jax.random.key(3), jnp.zeros(5))
    expected = train.make_loop(step, max_steps=STEPS)(first, PROBLEM.data, STEPS)
    source = streaming.ArraySource(DATA)
    loop = streaming.make_loop(with_mean, OPTIMIZER, LAWS["sgd"], source, **options)
    first = train.init(PROBLEM.params, OPTIMIZER, jax.random.key(3), jnp.zeros(5))
    assert_same_training(loop(first, STEPS), expected)
    assert np.abs(expected[0].model_state).max() > 0


def make(source=None, law=LAWS["sgd"], **options):
    source = streaming.ArraySource(DATA) if source is None else source
    return streaming.make_loop(loss_vector_fn, OPTIMIZER, law, source, **options)


def examples(wrong, at=7):
    """Ten examples, of which the one at 7 is of another kind."""
    return [{f"leaf_{j}": wrong if i == at else np.zeros(3) for j in range(60)} for i in range(10)]


ALL_TEN = noise.sgd(10, 10)
# The name of the argument, a call, and what the message says is wrong with it.
MISTAKES = [
    ("source", lambda: make(3), "got int"),
    ("prefetch", lambda: make()(start(), 1, prefetch=np.uint8(0)), "at least 1, got 0"),
    ("prefetch", lambda: make()(start(), 1, prefetch=2.5), "2.5 of type float"),
    ("num_threads", lambda: make()(start(), 1, num_threads=True), "True of type bool"),
    ("num_threads", lambda: make()(start(), 1, num_threads=np.zeros(3)), "shape (3,)"),
    (
        "optimizer",
        lambda: streaming.make_loop(
            loss_vector_fn, optax.adam, LAWS["sgd"], streaming.ArraySource(DATA)
        ),
        "optax.sgd(0.1)",
    ),
    ("state", lambda: make()({"params": PROBLEM.params}, 2), "train.TrainState, got {"),
    ("num_steps", lambda: make()(start(), 2**31), "between 1 and 2147483647"),
    ("num_steps", lambda: make()(start(), "3"), "'3' of type str"),
    ("source[7]", lambda: make(examples(np.zeros(4)), ALL_TEN)(start(), 1), "float64[4]"),
    ("source[7]", lambda: make(examples(np.zeros(3, np.int8)), ALL_TEN)(start(), 1), "int8[3]"),
    ("source[7]", lambda: make(examples({}), ALL_TEN)(start(), 1), "0 leaves"),
    ("source[7]", lambda: make(examples("cat"), ALL_TEN)(start(), 1), "<U3[]"),
    ("['name'] must hold", lambda: make([{"name": "cat"}] * 10, ALL_TEN)(start(), 1), "<U3"),
    ("data['name']", lambda: streaming.ArraySource({"name": "cats"}), "of type str"),
    ("data['name']", lambda: streaming.ArraySource({"name": np.array(["cat"])}), "<U3"),
]


class TestBadInput:
    pytestmark = pytest.mark.usefixtures("user_errors")

    def make(self, law=LAWS["sgd"], source=None, **options):
        source = streaming.ArraySource(DATA) if source is None else source
        return streaming.make_loop(loss_vector_fn, OPTIMIZER, law, source, **options)

    def test_dense_laws_are_refused(self):
        with pytest.raises(ValueError, match=r"law must list the examples that it uses.*got cov"):
            self.make(noise.cov(N, 20))

    def test_the_law_must_be_for_the_number_of_examples(self):
        with pytest.raises(ValueError, match="num_examples = 100, but source has 203"):
            self.make(noise.sgd(100, 20))

    def test_arguments_of_wrong_types_are_refused(self):
        with pytest.raises(TypeError, match=r"law must be a noise\.MNoise, got .* int"):
            self.make(3)
        with pytest.raises(TypeError, match="source must have __len__ and __getitem__"):
            self.make(source=iter([1, 2]))
        with pytest.raises(TypeError, match=r"sharding must be a jax\.sharding\.NamedSharding"):
            self.make(sharding="data")

    def test_integers_that_jax_would_cut_are_refused(self):
        source = streaming.ArraySource({**DATA, "id": np.full(203, 2**40)})
        with pytest.raises(ValueError, match="source must hold integers that fit int32"):
            self.make(source=source)(start(), 1)

    def test_sizes_must_be_at_least_one(self):
        with pytest.raises(ValueError, match="microbatch_size must be at least 1"):
            self.make(microbatch_size=0)
        for name in ("prefetch", "num_threads"):
            with pytest.raises(ValueError, match=f"{name} must be at least 1"):
                self.make()(start(), 1, **{name: 0})

    def test_arrays_must_share_the_leading_axis(self):
        with pytest.raises(ValueError, match="share the leading axis, got 3 at"):
            streaming.ArraySource({"x": np.zeros((3, 2)), "y": np.zeros(4)})

    def test_examples_must_have_the_same_shape(self):
        ragged = [{"x": np.zeros(5 + (i == 7), np.float32), "y": np.float32(1)} for i in range(10)]
        loop = self.make(noise.sgd(10, 10), ragged)
        with pytest.raises(ValueError, match=r"source\[7\] has float32\[6\] at example\['x'\]"):
            loop(start(), 1)

    def test_a_batch_that_is_too_short_is_refused(self):
        class Short(streaming.ArraySource):
            def read_batch(self, indices):
                return super().read_batch(indices[:-1])

        with pytest.raises(ValueError, match=r"must return 20 examples.*got 19"):
            self.make(source=Short(DATA))(start(), 1)

    def test_errors_of_reading_are_raised(self):
        class Broken(streaming.ArraySource):
            def read_batch(self, indices):
                raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            self.make(source=Broken(DATA))(start(), 3)

    def test_the_state_stays_usable_when_reading_fails(self):
        class Flaky(streaming.ArraySource):
            reads = 0

            def read_batch(self, indices):
                self.reads += 1
                if self.reads == 4:
                    raise OSError("for once")
                return super().read_batch(indices)

        # The failed run has made two calls of 16 steps by then, but not with the arrays of the
        # caller's state.
        loop = self.make(source=Flaky(DATA))
        state = start()
        with pytest.raises(OSError, match="for once"):
            loop(state, 40, num_threads=1, prefetch=1)
        expected = self.make()(start(), STEPS)
        assert identical(loop(state, STEPS), expected)

    @pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
    def test_messages_name_the_argument_and_are_short(self, name, call, wrong):
        assert_told(call, name, wrong)

    def test_num_steps_out_of_range(self):
        with pytest.raises(ValueError, match="num_steps must be between 1 and 2147483647, got 0"):
            self.make()(start(), 0)

    def test_without_grain_the_error_states_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "grain", None)
        with pytest.raises(ImportError, match=r"pip install 'msgd-jax\[streaming\]'"):
            self.make()
