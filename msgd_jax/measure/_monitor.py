"""An optax monitor for the noise scale, from the gradients that a run computes anyway."""

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
    """The state of the monitor: one running mean gradient, and a few numbers per leaf.

    Attributes:
        inside: the number of gradients so far in the current group.
        mean: their mean, like the parameters, in float32 or wider.
        spread: the sum of their squared deviations from the mean, [leaves + 1].
        groups: the number of complete groups so far.
        weight: the sum of the groups' weights, and the sum of their squares, [2].
        trace: the weighted mean of the groups' estimates T of tr S, [leaves + 1].
        squared: the weighted mean of their estimates U of ``|grad L|^2``, [leaves + 1].
        products: weighted sums of the products of the deviations of T and U from these means: T T,
            T U and U U, [3, leaves + 1].
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
    """Estimates the noise scale from the spread of the gradients passed to it, in groups of K.

    It does not change the gradients and computes none. Put it where the gradients of micro-batches
    are passed one by one, before any accumulation, clipping or momentum::

      optimizer = optax.chain(
          measure.noise_scale_monitor(4, batch_size=32),
          optax.MultiSteps(optax.adam(1e-3), every_k_schedule=4).gradient_transformation(),
      )
      ...
      measure.monitored_noise_scale(state.opt_state)

    With accumulation, the parameters do not change within a group, and the group's estimates of
    tr S and ``|grad L|^2`` are unbiased. Without accumulation, the K gradients of a group are those
    of consecutive steps, and the drift of the mean gradient between them counts as noise: keep K at
    2. The estimates of tr S and of ``|grad L|^2`` are averaged over groups before they are divided
    (see `pooled_noise_scale`). Standard errors assume that groups are independent.

    The gradients are either means over `batch_size` examples each, or noisy gradients of a `law`
    (from `transform.multiplicative_noise` or `train`), whose exact covariance is used.

    It takes memory for one gradient in float32 or wider, and computes no gradient.

    Args:
        num_microbatches: K, the number of gradients per group, at least 2.
        batch_size: b, the number of examples per gradient; give this or `law`.
        law: the law of the weights of each gradient, with independent steps.
        num_examples: N, with `batch_size`, if the K b examples of a group are distinct ones of N;
            None if they are drawn independently. With `law` it must be None.
        decay: the factor by which the weight of a group is multiplied with each later group; 1 for
            the plain average over the whole run. The window is about 1 / (1 - decay) groups.

    Raises:
        TypeError: if K or `batch_size` is not an integer, `law` is not a law, or `decay` is not a
            number.
        ValueError: if K is below 2, not exactly one of `batch_size` and `law` is given, the law has
            no noise, states no covariance or has steps that depend on each other, a group has more
            than `num_examples` examples, or `decay` is not in (0, 1].
    """
    k = _validate.positive_int("num_microbatches", num_microbatches, minimum=2)
    if (batch_size is None) == (law is None):
        raise ValueError(
            "noise_scale_monitor needs batch_size or law, and not both, got "
            f"batch_size = {batch_size} and law = {getattr(law, 'name', law)!s:.100}."
        )
    if law is not None:
        if num_examples is not None:
            raise ValueError("num_examples belongs to batch_size; leave it out, a law has its own.")
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
        """Both estimates, from the sample variance q of K gradients and their mean's square."""
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
        # One new array per attribute, so that the state can be donated.
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
    """The noise scale from the gradients that a `noise_scale_monitor` has seen so far.

    Args:
        opt_state: the state of an optimizer, or any pytree, which contains one monitor's state.

    Returns:
        The noise scale of all complete groups. Its standard errors are infinite for one group.

    Raises:
        ValueError: if `opt_state` contains no monitor or more than one, or, outside of `jax.jit`,
            if no group is complete yet.
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
    # 1 / (effective number of groups), which is 1 / R without decay.
    share = squares / total**2
    single = share >= 1
    variance = state.products / total * share / jnp.where(single, 1, 1 - share)
    variance = jnp.where(single, jnp.asarray([jnp.inf, 0, jnp.inf])[:, None], variance)
    pair = _estimates.MeanPair(state.trace, state.squared, variance[0], variance[1], variance[2])
    return _scale.assembled(state.mean, pair, jnp.maximum(1 / share - 1, 1))


def _added(state: NoiseScaleState, gradients: Gradients) -> NoiseScaleState:
    """Adds a gradient to the group by Welford's update, in which no large squares cancel."""
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
    """Adds the complete group to the averages, and begins an empty one."""
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
