"""Small steps for many chips as the compilers of TPUs and H100s make them, without running them.

`make test-pods` installs the compilers. Tests that need one are skipped where it is missing.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compilers, pods, pods_nets

pytestmark = pytest.mark.optimized

CHIPS, N, B = 16, 2**16, 2**11
FLAT = functools.partial(pods_nets.flat, 2048, 128)
BFLOAT16 = functools.partial(pods_nets.flat, 2048, 128, jnp.bfloat16)


def images() -> pods_nets.Net:
    """The same net on images as uint8. It compiles in a tenth of the time of convolutions."""

    def loss_vector_fn(params, batch):
        pixels, labels = batch
        return FLAT().loss_vector_fn(params, (pixels.reshape(len(pixels), -1) / 255, labels))

    example = (jax.ShapeDtypeStruct((32, 32, 2), jnp.uint8), jax.ShapeDtypeStruct((), jnp.int32))
    return FLAT()._replace(loss_vector_fn=loss_vector_fn, example=example)


def compiles_for(*chips: str) -> pytest.MarkDecorator:
    """Skips a test where a compiler for these chips is missing."""
    reasons = [reason for chip in chips if (reason := compilers.missing(chip)) is not None]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def compared(net, chip, laws, **case) -> list[pods.Compared]:
    """Steps with these laws, each compared with the plain step on the same chips."""
    settings = {"chips": CHIPS, "num_examples": N, "microbatch_size": None, "batch_size": B} | case
    return pods.compare(pods.Case(net, chip, laws=tuple(laws), **settings))


def assert_nothing_moves(one: pods.Compared, batch_size: int = B) -> None:
    """Asserts that chips send one gradient in float32 and two numbers per example of a batch."""
    assert one.ours.sent >= one.gradient
    assert one.besides <= 8 * batch_size, one
    types = {dtype for kind, dtype in one.ours.collectives if "reduce" in kind}
    assert not types & {"bf16", "f16"}, one


@compiles_for("v5e")
def test_every_law_costs_what_a_plain_step_costs():
    for one in compared(FLAT, "v5e", pods.LAWS):
        assert_nothing_moves(one)
        if not one.sparse:
            assert one.ratio("flops") <= pods.MOST_OPERATIONS, one
            assert one.ratio("bytes") <= pods.MOST_BYTES, one
            assert one.ratio("peak") <= pods.MOST_MEMORY, one


@compiles_for("v5e")
def test_images_in_micro_batches_are_sliced_not_copied():
    """This holds where the last micro-batch is not full; memory depends on a chip's share alone.

    The compiler counts one micro-batch of several, so that has to be as large as a chip's share in
    the other tests.
    """
    size = N // CHIPS
    (dense,) = compared(images, "v5e", ("cov",), num_examples=2 * N + 5, microbatch_size=size)
    assert_nothing_moves(dense)
    assert dense.ratio("flops") <= pods.MOST_OPERATIONS, dense
    assert dense.ratio("bytes") <= pods.MOST_BYTES, dense
    assert dense.ratio("peak") <= pods.MOST_MEMORY, dense
    (four_times,) = compared(
        images, "v5e", ("cov",), chips=4 * CHIPS, num_examples=8 * N + 5, microbatch_size=size
    )
    assert four_times.ours.peak <= 1.01 * dense.ours.peak


@compiles_for("v5e")
def test_narrow_parameters_are_added_up_in_float32():
    for one in compared(BFLOAT16, "v5e", ("sgd",), microbatch_size=512):
        assert_nothing_moves(one)


@compiles_for("v5e")
def test_parameters_in_parts_are_gathered_and_reduced_as_by_the_plain_step():
    (one,) = compared(FLAT, "v5e", ("cov",), fsdp=True)
    assert abs(one.besides) <= 64, one


@compiles_for("v5e")
def test_weights_in_float64_compile():
    for one in compared(FLAT, "v5e", ("student_t", "sparse_fisher"), wide=True):
        assert_nothing_moves(one)


@compiles_for("H100")
@pytest.mark.parametrize("net", [FLAT, BFLOAT16], ids=["float32", "bfloat16"])
def test_on_h100s_every_law_costs_what_a_plain_step_costs(net):
    for one in compared(net, "H100", ("cov", "student_t", "sparse_cov"), microbatch_size=512):
        assert_nothing_moves(one)
        assert one.sparse or one.ratio("peak") <= pods.MOST_MEMORY, one


@compiles_for("v5e")
def test_the_benchmark_says_that_nothing_is_run(tmp_path, capsys):
    headlines = pods.main(pods.Config(quick=True, out=tmp_path / "pods"))
    record = json.loads((tmp_path / "pods" / "result.json").read_text())
    assert record["headlines"] == [headline._asdict() for headline in headlines] != []
    assert "not a run" in record["said_by"]
    assert "The compiler's account of one chip's program, not a run" in capsys.readouterr().out


TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = (f32[8]{0:T(128)}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %y), to_apply=%add
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %gathered = (f32[8]{0}, f32[128]{0}) all-gather-start(%p), dimensions={0}
  %done = f32[128]{0} all-gather-done(%gathered)
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body%TRIPS%
}
"""


def test_collectives_in_loops_count_times_their_iterations():
    known = TEXT.replace("%TRIPS%", ', backend_config={"known_trip_count":{"n":"5"}}')
    found = {("all-gather", "f32"): 512, ("all-reduce", "f32"): 160, ("all-reduce", "bf16"): 60}
    assert compilers.collectives_of(known) == found
    assert compilers.collectives_of(TEXT.replace("%TRIPS%", ""))["all-reduce", "f32"] == math.inf


def test_cases_that_are_not_known_are_named():
    with pytest.raises(ValueError, match=r"only must name cases .* got \['vgg19'\]"):
        pods.Config(only=("vgg19",))
