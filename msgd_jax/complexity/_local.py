"""The local complexity of a loss: Monte Carlo over multipliers, with the supremum by ascent."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _dtypes, _validate, loss
from msgd_jax._estimate import Estimate
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Params, PositiveInt, PyTree, Scalar
from msgd_jax.complexity import _ascent, _multipliers
from msgd_jax.complexity._ascent import Ascent
from msgd_jax.noise import MNoise, Weights

AGREEMENT = 0.01  # two ascents agree if their heights differ by less than this share


class LocalComplexity(NamedTuple):
    """The results of `local_complexity` per draw of v; all of them include the factor 1/N.

    Attributes:
        draws: the largest ``|sum v_i l_i| / N`` found in the ball, [draws]: a lower bound on the
            supremum, no lower than `at_centre`.
        probabilities: those of the draws, [draws]: equal, unless all draws were enumerated.
        exhaustive: whether these are all possible draws, so that only the suprema are uncertain.
        at_centre: ``|sum v_i l_i| / N`` at the centre of the ball, [draws].
        first_order: ``at_centre + radius * ||sum v_i grad l_i|| / N``, [draws]: the supremum of
            the losses' linearisation, exact for affine losses.
        upper: ``first_order + smoothness radius^2 sum |v_i| / (2 N)``, [draws]: an upper bound on
            the supremum; None without a smoothness constant.
        last_gain: the gain of the best ascent in its last step, relative to `draws`, [draws].
        gap: the largest further gain of the linearisation at the end of the best ascent, relative
            to `draws`, [draws]: 0 at a stationary point. If the objective is concave, `draws` is
            too low by at most this share. Infinite if `draws` is 0 and the gradient is not.
        agreeing: the number of ascents with the sign of the best one that came within 1 % of it,
            [draws]: from 1 (itself) to `num_starts`.
        num_starts: the number of ascents per sign.
    """

    draws: Float[Array, " draws"]
    probabilities: Float[Array, " draws"]
    exhaustive: bool
    at_centre: Float[Array, " draws"]
    first_order: Float[Array, " draws"]
    upper: Float[Array, " draws"] | None
    last_gain: Float[Array, " draws"]
    gap: Float[Array, " draws"]
    agreeing: Int[Array, " draws"]
    num_starts: int

    @property
    def mean(self) -> Float[Array, ""]:
        """The complexity R(V, theta, radius, N), with the suprema that the ascents reached."""
        return self.probabilities @ self.draws

    @property
    def standard_error(self) -> Float[Array, ""]:
        """The standard error of `mean` over draws; 0 if all draws were enumerated."""
        if self.exhaustive:
            return jnp.zeros_like(self.mean)
        size = self.draws.size
        return _dtypes.norm(self.draws - self.draws.mean()) / np.sqrt((size - 1) * size)

    @property
    def estimate(self) -> Estimate:
        """Mean and standard error as numbers, with an interval by Student's t of the logarithm."""
        draws, chances = (np.asarray(x, np.float64) for x in (self.draws, self.probabilities))
        mean = float(chances @ draws / chances.sum())
        if self.exhaustive:
            return Estimate(mean, 0.0, positive=True)
        error = float(draws.std(ddof=1) / np.sqrt(draws.size))
        return Estimate(mean, error, draws.size - 1, positive=True)


LossVectors = loss.LossVector | Callable[[Key[Array, ""]], loss.LossVector]
"""A loss vector, or a function from a PRNG key to a loss vector with random data."""


def local_complexity(
    losses: LossVectors,
    params: Params,
    multipliers: _multipliers.Multipliers | MNoise,
    *,
    radius: Scalar,
    num_draws: PositiveInt | None,
    key: Key[Array, ""] | None = None,
    ascent: Ascent = Ascent(),  # noqa: B008 (frozen)
    smoothness: float | None = None,
) -> LocalComplexity:
    """The local complexity of section 3, ``E_v sup |sum v_i l_i(theta')| / N`` over a ball.

    The ball is the set of parameters theta' with ``||theta' - theta||_2 <= radius``. For each draw
    of v the supremum is sought by projected gradient ascents of both signs, from several points:
    the first where the linearised losses are largest (which is enough for affine losses), the
    others random on the sphere. The result is a lower bound; its `first_order`, `upper`,
    `last_gain`, `gap` and `agreeing` say how good the bound is.

    An ascent costs ``num_steps + 2`` forward and backward passes and a forward pass over the N
    examples (b, for `rademacher` on subsets). A constant in all losses costs no digits.

    Each eager call compiles a program and frees it: put the function under `jax.jit` to call it
    more than once.

    Args:
        losses: the loss vector; or a function from a PRNG key to one, which is called for each
            draw: then the expectation is over the examples too, as in the paper's definition.
        params: the centre theta: a pytree of float32 or float64 arrays.
        multipliers: the law of v: `rademacher`, `gaussian`, `sgd` or any `noise.MNoise`, whose v is
            N W - 1.
        radius: delta, at least 0.
        num_draws: the number of draws of v, at least 2; or None for all possible v, for small N.
        key: a typed PRNG key, needed if anything is random. Draw j is ``multipliers.sample(key,
            j)``, so equal keys pair the draws, and the data, of different multipliers.
        ascent: the settings of the search for the supremum.
        smoothness: a Lipschitz constant of all grad l_i on the ball, for `upper`; None for none.

    Returns:
        The draws, their mean and standard error, and how the ascents ended. Under `jax.jit`, where
        values cannot be checked, draws with losses that are not finite are NaN.

    Raises:
        TypeError: if `losses` is neither a `loss.LossVector` nor a function that returns one,
            `params` are not float32 or float64, `multipliers` is not a law, or `key` is not a typed
            PRNG key.
        ValueError: if the law is for another number of examples, `radius` or `smoothness` is
            negative, `num_draws` is below 2, the draws cannot be enumerated, a key is needed, or a
            loss is not finite.

    Example:
        >>> from msgd_jax import complexity, loss
        >>> fn = loss.per_example(lambda theta, x: theta * x)  # affine: the supremum is known
        >>> losses = loss.LossVector(fn, jnp.asarray([1.0, 2.0]))
        >>> local = complexity.local_complexity(
        ...     losses, jnp.asarray(0.0), complexity.rademacher(2), radius=1.0, num_draws=None
        ... )
        >>> round(float(local.mean), 6)  # E |v1 + 2 v2| / 2
        1.0
    """
    (result,) = local_complexities(
        losses,
        params,
        (multipliers,),
        radius=radius,
        num_draws=num_draws,
        key=key,
        ascent=ascent,
        smoothness=smoothness,
    )
    return result


def local_complexities(
    losses: LossVectors,
    params: Params,
    multipliers: Sequence[_multipliers.Multipliers | MNoise],
    *,
    radius: Scalar,
    num_draws: PositiveInt | None,
    key: Key[Array, ""] | None = None,
    ascent: Ascent = Ascent(),  # noqa: B008 (frozen)
    smoothness: float | None = None,
) -> list[LocalComplexity]:
    """`local_complexity` of several multipliers; equal shapes of draws share a program."""
    example = looked_at(losses)
    loss.checked(example, params, wide=True)
    laws = [_multipliers.of(law, example.num_examples) for law in multipliers]
    _validate.nonnegative_scalar("radius", radius)
    _ascent.checked(ascent)
    if smoothness is not None:
        smoothness = _validate.finite_nonnegative("smoothness", smoothness)
    if num_draws is None:
        if not isinstance(losses, loss.LossVector):
            raise ValueError(
                "num_draws = None takes every v once, so losses must be a loss.LossVector, not a "
                "function of a key: give num_draws."
            )
    else:
        num_draws = _validate.positive_int("num_draws", num_draws, minimum=2)
    if key is None:
        if num_draws is not None:
            raise ValueError("key is needed to draw at random, such as key=jax.random.key(0).")
        key = jax.random.key(0)  # used for the starts after the first only
    _validate.prng_key("key", key)

    # One program for all laws whose draws have the same structure, shapes and dtypes.
    params = jax.tree.map(jnp.asarray, params)
    dtype = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    ball = _Ball(losses, params, jnp.asarray(radius, dtype), ascent)
    groups: dict[Any, list[int]] = {}
    for i, law in enumerate(laws):
        groups.setdefault(i if num_draws is None else _multipliers.looks(law), []).append(i)
    results: dict[int, LocalComplexity] = {}
    for group in groups.values():
        alike = [laws[i] for i in group]
        found = _of_group(ball, alike, key, num_draws, smoothness)
        results |= dict(zip(group, found, strict=True))
    return [results[i] for i in range(len(laws))]


def looked_at(losses: LossVectors) -> loss.LossVector:
    """The loss vector, or the result of the function with shapes as data; raises TypeError."""
    if isinstance(losses, loss.LossVector) or not callable(losses):
        return loss.checked_kind(losses)
    # In a new function, since jax caches the shapes of functions that it has seen.
    try:
        drawn = jax.eval_shape(lambda key: losses(key), jax.random.key(0))
    except TypeError as error:
        error.add_note("losses must be a loss.LossVector, or a function from a PRNG key to one.")
        raise
    if not isinstance(drawn, loss.LossVector):
        raise TypeError(
            "losses must be a loss.LossVector, or a function from a PRNG key to one, got a "
            f"function that returns {_validate.shown(drawn)}."
        )
    return drawn


class _Ball(NamedTuple):
    """The loss, the ball and the settings of the search. Not a pytree for jax: see `_of_group`."""

    losses: LossVectors
    params: Params
    radius: Float[Array, ""]
    ascent: Ascent

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of values: float64 if a parameter is float64, else float32."""
        return self.radius.dtype

    def drawn(self, key: Key[Array, ""]) -> loss.LossVector:
        """The loss vector; its data are drawn from `key` if they are random."""
        return self.losses if isinstance(self.losses, loss.LossVector) else self.losses(key)


def _of_group(
    ball: _Ball,
    laws: Sequence[_multipliers.Multipliers],
    key: Key[Array, ""],
    num_draws: int | None,
    smoothness: float | None,
) -> list[LocalComplexity]:
    """Measures laws whose draws have equal shapes by one program; one law if all are enumerated."""
    vectors = None
    if num_draws is None:
        every, chances = _multipliers.all_draws(laws[0])
        vectors = jnp.asarray(every, ball.dtype)
    else:
        chances = np.full(num_draws, 1 / num_draws)
    fixed = ball.losses if isinstance(ball.losses, loss.LossVector) else None

    # jax may keep the static arguments of a program. So this function of one call closes over the
    # user's functions: with it, the program and they are freed.
    def measured(
        arrays: PyTree, vectors: Array | None, key: Key[Array, ""], which: Int[Array, ""]
    ) -> LocalComplexity:
        params, data, radius = arrays
        losses = ball.losses if fixed is None else fixed.replace(data=data)
        own = _Ball(losses, params, radius, ball.ascent)
        draws = Draws(laws, which, vectors, len(chances))
        return _measured(own, draws, key, smoothness or 0.0)

    program = jax.jit(measured)
    arrays = ball.params, None if fixed is None else fixed.data, ball.radius
    results = []
    for i in range(len(laws)):
        result = program(arrays, vectors, jax.random.clone(key), jnp.asarray(i, jnp.int32))
        result = result._replace(
            probabilities=jnp.asarray(chances, ball.dtype),
            exhaustive=vectors is not None,
            upper=None if smoothness is None else result.upper,
            num_starts=ball.ascent.num_starts,
        )
        _check_finite(result.at_centre, result.draws)
        results.append(result)
    return results


class Draws(NamedTuple):
    """The source of the draws: one of several laws, or given vectors.

    Attributes:
        laws: laws whose draws have equal shapes.
        which: the index of the law that is measured.
        vectors: all draws of the only law, [draws, N]; None if they are drawn at random.
        num_draws: the number of draws.
    """

    laws: Sequence[_multipliers.Multipliers]
    which: Int[Array, ""]
    vectors: Float[Array, "draws N"] | None
    num_draws: int

    def weights(self, key: Key[Array, ""], draw: Int[Array, ""]) -> tuple[Weights, Bool[Array, ""]]:
        """A draw divided by N, and whether its law is centred."""
        n, centred = self.laws[0].num_examples, jnp.array([law.centred for law in self.laws])
        if self.vectors is not None:
            v = Weights(self.vectors[draw], None, n)
        elif len(self.laws) == 1:
            v = self.laws[0].drawn(key, draw)
        else:
            v = jax.lax.switch(self.which, [law.drawn for law in self.laws], key, draw)
        return Weights(v.values / n, v.indices, n), centred[self.which]


class _Ascents(NamedTuple):
    """The numbers of every draw at the centre, and of its ascents by sign and start."""

    centre: Float[Array, " draws"]
    slope: Float[Array, " draws"]
    mean_size: Float[Array, " draws"]
    value: Float[Array, "draws 2 starts"]
    last_gain: Float[Array, "draws 2 starts"]
    gap: Float[Array, "draws 2 starts"]
    finite: Bool[Array, "draws 2 starts"]


def _ascents(ball: _Ball, draws: Draws, key: Key[Array, ""]) -> _Ascents:
    """All ascents of all draws; parameters, data, vectors and radius are traced."""
    num_draws, num_starts, dtype = draws.num_draws, ball.ascent.num_starts, ball.dtype

    def one_ascent(position: Int[Array, ""]) -> tuple[Array, ...]:
        # The draw, the sign and the start are functions of the position.
        draw, ascent = jnp.divmod(position, 2 * num_starts)
        sign = jnp.where(ascent < num_starts, 1, -1).astype(dtype)
        index = ascent % num_starts
        weights, centred = draws.weights(key, draw)
        losses = ball.drawn(derive(key, Stream.COMPLEXITY_DATA, draw))
        # The objective without its constant, and the ascent from one start.
        value_and_grad = _ascent.objective(losses, ball.params, weights, dtype, centred)
        centre = _ascent.Centre.of(value_and_grad, ball.params)
        start_key = derive(key, Stream.ASCENTS, position)
        start = _ascent.start(centre, sign, index, num_starts, start_key)
        peak = _ascent.climb(
            value_and_grad, ball.params, ball.radius, sign, centre, start, ball.ascent
        )
        mean_size = jnp.abs(weights.values).sum().astype(dtype)
        of_draw = jnp.abs(centre.value), centre.norm.astype(dtype), mean_size
        return *of_draw, peak.value, peak.last_gain, peak.gap, peak.finite

    total = num_draws * 2 * num_starts
    positions = jnp.arange(total)
    at_once = ball.ascent.at_once
    if at_once is None or at_once >= total:
        outcome = jax.vmap(one_ascent)(positions)
    else:
        at_once = None if at_once == 1 else at_once  # a plain scan, not a `vmap` of one
        outcome = jax.lax.map(one_ascent, positions, batch_size=at_once)
    of_draws, of_ascents = outcome[:3], outcome[3:]
    return _Ascents(
        *(x.reshape(num_draws, -1)[:, 0] for x in of_draws),
        *(x.reshape(num_draws, 2, num_starts) for x in of_ascents),
    )


def _measured(ball: _Ball, drawn: Draws, key: Key[Array, ""], smoothness: float) -> LocalComplexity:
    """Runs the ascents and takes the best one per draw; static attributes are set later."""
    ascents, num_draws = _ascents(ball, drawn, key), drawn.num_draws
    best = ascents.value.reshape(num_draws, -1).argmax(-1)

    def of_best(values: Float[Array, "draws 2 starts"]) -> Float[Array, " draws"]:
        return jnp.take_along_axis(values.reshape(num_draws, -1), best[:, None], 1)[:, 0]

    draws, gap = of_best(ascents.value), of_best(ascents.gap)
    same_sign = ascents.value[jnp.arange(num_draws), best // ball.ascent.num_starts]
    first_order = ascents.centre + ball.radius * ascents.slope
    return LocalComplexity(
        draws=jnp.where(ascents.finite.all((1, 2)), draws, jnp.nan),
        probabilities=None,  # type: ignore[arg-type]
        exhaustive=False,
        at_centre=ascents.centre,
        first_order=first_order,
        upper=first_order + smoothness * ball.radius**2 / 2 * ascents.mean_size,
        last_gain=of_best(ascents.last_gain),
        gap=jnp.where(draws > 0, gap, jnp.where(gap > 0, jnp.inf, 0))
        / jnp.where(draws > 0, draws, 1),
        agreeing=(same_sign >= (1 - AGREEMENT) * draws[:, None]).sum(-1),
        num_starts=0,
    )


def _check_finite(at_centre: Float[Array, " draws"], draws: Float[Array, " draws"]) -> None:
    if isinstance(draws, Tracer):
        return
    wrong = np.flatnonzero(~np.isfinite(np.asarray(draws)))
    if wrong.size:
        first = wrong[0]
        inside = np.isfinite(np.asarray(at_centre)[first])
        where = "inside the ball: choose a smaller radius" if inside else "at params"
        raise ValueError(
            f"losses has values or gradients that are not finite {where} (in draw {first}"
            f"{f' and {wrong.size - 1} others' if wrong.size > 1 else ''})."
        )
