"""Laws that a user wrote: one draw, when the law is made, says what is wrong with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import noise

N, B = 10, 4
NONE = noise.Exchangeable(0.0, 0.0)


def own(draw, support_size=B, **kwargs):
    return noise.MNoise("own", N, support_size, NONE, draw, **kwargs)


def returning(values, indices, num_examples=N):
    """A draw in which the arrays are traced, as those of every compiled draw are."""

    def draw(key, step=0):
        zero = jax.random.key_data(key)[0] * 0
        listed = None if indices is None else jnp.asarray(indices) + zero.astype(jnp.int32)
        return noise.Weights(jnp.asarray(values) + zero, listed, num_examples)

    return draw


FULL, FIT = np.full(B, 1 / B, np.float32), np.arange(B)
MISTAKES = {
    "an index too large": (returning(FULL, FIT + N - B + 1), r"must be in \[0, 10\), got .* 7 to"),
    "an index below 0": (returning(FULL, FIT - 1), r"that draw returns must be in \[0, 10\)"),
    "too few": (returning(FULL[1:], FIT[1:]), r"must return 4 weights of 10 .* of shape \(3,\)"),
    "fewer indices": (returning(FULL, FIT[1:]), r"\(4,\) with indices of shape \(3,\)"),
    "some, without indices": (returning(FULL, None), "must return 10 weights of 10 examples"),
    "of others": (returning(FULL, FIT, N + 1), "got weights of 11 examples"),
    "NaN": (returning(FULL * np.nan, FIT), "must return finite weights"),
    "a column": (returning(FULL[:, None], FIT[:, None]), r"got weights .* of shape \(4, 1\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("user_errors")
def test_a_draw_that_does_not_fit_is_refused(name):
    draw, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        own(draw)
    # The draws of steps that depend on each other, too.
    with pytest.raises(ValueError, match=message.replace("draw ", "draw_at ")):
        own(returning(FULL, FIT), draw_at=draw, between=lambda s, t: NONE)


def test_a_draw_that_is_no_weights_is_refused():
    with pytest.raises(TypeError, match=r"draw must return a noise\.Weights, got .*float32"):
        own(lambda key: jnp.ones(N) / N)


@pytest.mark.parametrize(("indices", "size"), [(FIT, B), (None, N)])
def test_draws_that_fit_are_drawn(indices, size):
    law = own(returning(np.full(size, 1 / size, np.float32), indices))
    np.testing.assert_allclose(law.sample(jax.random.key(0), 1).dense().sum(), 1, rtol=1e-6)


def test_a_law_that_is_made_while_a_program_is_traced_is_checked_as_well():
    @jax.jit
    def program(key):
        return own(returning(FULL, FIT + N)).sample(key, 0).values

    with pytest.raises(ValueError, match=r"must be in \[0, 10\)"):
        program(jax.random.key(0))


def test_a_law_may_use_what_is_traced():
    @jax.jit
    def program(key, scale):
        law = own(lambda key: noise.Weights(scale * jnp.asarray(FULL), jnp.asarray(FIT), N))
        return law.draw(key).values

    np.testing.assert_array_equal(program(jax.random.key(0), 2.0), 2 * FULL)
