"""The noise scale of a run, from gradients that the run computes anyway: an optax monitor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from msgd_jax import _dtypes, _validate
from msgd_jax._typing import Gradients, OptState, Params, PositiveInt, Updates
from msgd_jax.measure import _draws, _estimates, _scale
from msgd_jax.measure._scale import NoiseScale
from msgd_jax.noise import MNoise


class NoiseScaleState(NamedTuple):
    """What the monitor keeps: one running mean gradient, and a few numbers per leaf.

    Attributes:
        inside: gradients of the present group so far.
        mean: their mean, like the parameters, in float32 or wider.
        spread: the sum of their squared deviations, [leaves + 1].
        groups: complete groups so far.
        weight: the sum of the groups' weights, and that of their squares, [2].
        trace: the weighted mean of the groups' estimates of tr S, [leaves + 1].
        squared: that of ``|grad L|^2``.
        products: weighted sums of the products of their deviations: T T, T U and U U,
            [3, leaves + 1].
    """

    inside: Int[Array, ""]
    mean: Gradients
    spread: Float[Array, " parts"]
    groups: Int[Array, ""]
    weight: Float[Array, "2"]
    trace: Float[Array, " parts"]
    squared: Float[Array, " parts"]
    products: Float[Array, "3 parts"]


def noise_scale_monitor(
    num_microbatches: PositiveInt,
    *,
    batch_size: PositiveInt | None = None,
    law: MNoise | None = None,
    num_examples: PositiveInt | None = None,
    decay: float = 1.0,
) -> optax.GradientTransformation:
    """Watches gradients go by, K to a group, and estimates the noise scale from their spread.

    It changes nothing and computes no gradient. Put it where micro-batch gradients pass one by one,
    in front of what accumulates them, clips them or has momentum::

      optimizer = optax.chain(
          measure.noise_scale_monitor(4, batch_size=32),
          optax.MultiSteps(optax.adam(1e-3), every_k_schedule=4).gradient_transformation(),
      )
      ...
      measure.monitored_noise_scale(state.opt_state)

    The parameters stand still inside a group then, and the group's estimates of tr S and
    ``|grad L|^2`` are unbiased. Without accumulation the K gradients of a group are those of
    consecutive steps: the drift of the mean gradient between them counts as noise, so keep K at 2.
    Groups are averaged, tr S and ``|grad L|^2`` each by itself, then divided (see
    `pooled_noise_scale`); standard errors take the groups as independent.

    The gradients are either means over `batch_size` examples each, or noisy gradients of a `law`
    (from `transform.multiplicative_noise` or `train`), whose exact covariance is then taken out.

    Memory: one gradient in float32 or wider. Costs no gradient evaluation.

    Args:
        num_microbatches: K, the gradients of one group, at least 2.
        batch_size: b, the examples of each gradient; or
        law: the law of the weights of each gradient, its steps independent.
        num_examples: with `batch_size`, N, if the K b examples of a group are distinct ones of N;
            None if they are drawn independently. With `law` it must be None.
        decay: what a group's weight is multiplied by with each group that comes after it; 1 for the
            plain average over the whole run. The window is then about 1 / (1 - decay) groups.

    Raises:
        TypeError, ValueError: if K is below 2, not exactly one of `batch_size` and `law` is given,
            the law has no noise, no covariance of two numbers or steps that depend on each other,
            a group has more examples than there are, or `decay` is not in (0, 1].
    """
    k = _validate.positive_int("num_microbatches", num_microbatches, minimum=2)
    if (batch_size is None) == (law is None):
        raise ValueError(
            "noise_scale_monitor needs batch_size or law, and not both, got "
            f"batch_size = {batch_size} and law = {getattr(law, 'name', law)!s:.100}."
        )
    if law is not None:
        if num_examples is not None:
            raise ValueError("num_examples belongs to batch_size: a law knows its own; leave it.")
        independent = _draws.independent(law, getattr(law, "num_examples", 0))
        of_s, of_mean = _draws.moments_of(independent, law.num_examples)
        n = 0
    else:
        batch_size = _validate.positive_int("batch_size", batch_size, minimum=1)
        of_s, of_mean, n = 1 / batch_size, 0.0, k * batch_size
        if num_examples is not None:
            num_examples = _validate.positive_int("num_examples", num_examples, minimum=n)
    if not 0 < _validate.real("decay", decay) <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}.")

    def unbiased(q: Array, squared: Array) -> tuple[Array, Array]:
        """The two estimates, from the sample variance q of K gradients and their mean, squared."""
        if law is None:
            return _scale.unbiased_of_spread(q / of_s, squared, n, num_examples)
        squared = squared - q / k
        return (q - of_mean * squared) / of_s, squared

    def init(params: Params) -> NoiseScaleState:
        _validate.floating_params(params)
        mean = jax.tree.map(lambda p: jnp.zeros_like(_dtypes.wide(p)), params)
        dtype = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(mean)))
        zeros = jnp.zeros(len(jax.tree.leaves(params)) + 1, dtype)
        none = jnp.zeros((), jnp.int32)
        # Arrays of their own each, so that a state can be donated.
        return NoiseScaleState(
            inside=none,
            mean=mean,
            spread=zeros,
            groups=none + 0,
            weight=jnp.zeros(2, dtype),
            trace=zeros + 0,
            squared=zeros + 0,
            products=jnp.zeros((3, *zeros.shape), dtype),
        )

    def update(
        updates: Updates, state: OptState, params: Params | None = None
    ) -> tuple[Updates, OptState]:
        del params
        state = _added(state, updates)
        complete = state.inside == k
        squared = _estimates.squared_norms(state.mean)
        moments = unbiased(state.spread / (k - 1), squared)
        after = _pooled(state, *moments, decay)
        return updates, jax.tree.map(lambda a, b: jnp.where(complete, a, b), after, state)

    return optax.GradientTransformation(init, update)


def monitored_noise_scale(opt_state: OptState) -> NoiseScale:
    """What a `noise_scale_monitor` has seen so far.

    Args:
        opt_state: the state of an optimizer, or any pytree, with one monitor's state in it.

    Returns:
        The noise scale of all complete groups, with standard errors from two groups on (infinite
        before).

    Raises:
        ValueError: if there is no monitor in it, or more than one; or, outside of `jax.jit`, if no
            group is complete yet.
    """
    is_state = lambda node: isinstance(node, NoiseScaleState)  # noqa: E731
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    if len(found) != 1:
        raise ValueError(
            "opt_state must hold the state of one noise_scale_monitor, got "
            f"{len(found)} of them in {_validate.shown(type(opt_state).__name__)}."
        )
    (state,) = found
    if not isinstance(state.groups, Tracer) and int(state.groups) == 0:
        raise ValueError(
            "opt_state must have seen a complete group of micro-batches, got "
            f"{int(state.inside)} gradients and no complete group."
        )
    total, squares = state.weight
    # 1 / (effective number of groups); without decay 1 / R.
    share = squares / total**2
    single = share >= 1
    variance = state.products / total * share / jnp.where(single, 1, 1 - share)
    variance = jnp.where(single, jnp.asarray([jnp.inf, 0, jnp.inf])[:, None], variance)
    pair = _estimates.MeanPair(state.trace, state.squared, variance[0], variance[1], variance[2])
    return _scale.assembled(state.mean, pair, jnp.maximum(1 / share - 1, 1))


def _added(state: NoiseScaleState, gradients: Gradients) -> NoiseScaleState:
    """One gradient more in the group, by Welford's updates: no large squares cancel."""
    seen = state.inside + 1
    means, spread = [], []
    for leaf, mean in zip(jax.tree.leaves(gradients), jax.tree.leaves(state.mean), strict=True):
        deviation = leaf.astype(mean.dtype) - mean
        new = mean + deviation / seen.astype(mean.dtype)
        means.append(new)
        spread.append((deviation * (leaf.astype(mean.dtype) - new)).sum())
    added = _estimates.with_total(spread).astype(state.spread.dtype)
    return state._replace(
        inside=seen,
        mean=jax.tree.unflatten(jax.tree.structure(state.mean), means),
        spread=state.spread + added,
    )


def _pooled(state: NoiseScaleState, trace: Array, squared: Array, decay: float) -> NoiseScaleState:
    """One group more in the averages, and an empty group begun."""
    dtype = state.trace.dtype
    trace, squared = trace.astype(dtype), squared.astype(dtype)
    weight = state.weight * jnp.asarray([decay, decay**2], dtype) + 1
    t, u = trace - state.trace, squared - state.squared
    new_trace, new_squared = state.trace + t / weight[0], state.squared + u / weight[0]
    products = jnp.stack(
        [t * (trace - new_trace), t * (squared - new_squared), u * (squared - new_squared)]
    )
    return NoiseScaleState(
        inside=jnp.zeros_like(state.inside),
        mean=jax.tree.map(jnp.zeros_like, state.mean),
        spread=jnp.zeros_like(state.spread),
        groups=state.groups + 1,
        weight=weight,
        trace=new_trace,
        squared=new_squared,
        products=decay * state.products + products,
    )
