"""The shape of gradient noise: its alignment with the Hessian, and its number of directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate, covariance
from msgd_jax import loss as loss_lib
from msgd_jax._estimate import Estimate
from msgd_jax._typing import Data, Gradients, Params, PositiveInt, Step
from msgd_jax.measure import _draws, _estimates, _hessian
from msgd_jax.noise import Exchangeable, MNoise

_HIGHEST = jax.lax.Precision.HIGHEST


class Alignment(NamedTuple):
    """The alignment of the noise of a law, with covariance C, with the Hessian H of the mean loss.

    Attributes:
        trace_hc: ``tr(H C)``, which is ``E v^T H v`` for the noise v.
        trace_hs: ``tr(H S)``, the same for the gradient of one example; it does not depend on the
            law.
        trace_c: ``tr C = E|v|^2``.
        squared_norm_c: ``|C|_F^2``.
        trace_h: tr H.
        squared_norm_h: ``|H|_F^2``.
        alignment: ``D tr(HC) / (tr H tr C)``, 1 for isotropic noise. It is meaningful only if
            tr H > 0, since it changes sign with tr H; see `cosine`.
        cosine: ``tr(HC) / (|H|_F |C|_F)``, from -1 to 1, for any sign of tr H.
        participation_ratio: ``(tr C)^2 / |C|_F^2``, the effective number of directions of the
            noise.
    """

    trace_hc: Estimate
    trace_hs: Estimate
    trace_c: Estimate
    squared_norm_c: Estimate
    trace_h: Estimate
    squared_norm_h: Estimate
    alignment: Estimate
    cosine: Estimate
    participation_ratio: Estimate


class _Parts(NamedTuple):
    """The numbers from K draws of the noise v, and from P probes of H."""

    hc: Float[Array, " K"]
    hs: Float[Array, " K"]
    gram: Float[Array, "K K"]
    h: Float[Array, " P"]
    h2: Float[Array, " P"]


def alignment(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise,
    key: Key[Array, ""],
    *,
    num_draws: PositiveInt,
    num_probes: PositiveInt,
    first_step: Step = 0,
    draws_per_pass: PositiveInt = 1,
) -> Alignment:
    """The alignment of the noise of any law with the Hessian, from K draws of the noise.

    Traces and squared norms are unbiased: ``|C|_F^2`` comes from pairs of different draws.
    Quotients are biased by order 1/K (the participation ratio upwards); their standard errors are
    those of the jackknife over draws and over probes.

    It costs one forward pass and K + 1 backward passes over the N examples, 1 + K + P
    Hessian-vector products of about three gradients each, and memory for K + 1 gradients. Each
    eager call compiles a program: put the function under `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: a law for N examples with independent steps.
        key: a typed PRNG key; draw k is ``law.sample(key, first_step + k)``, and probe p is a
            function of (key, p).
        num_draws: K, at least 3.
        num_probes: P, the number of probes for the trace and the norm of H, at least 3.
        first_step: the step of the first draw.
        draws_per_pass: the number of draws whose backward passes run at once.

    Raises:
        TypeError, ValueError: as `noise_scale_from_draws`, or if there are fewer than 3 draws or
            probes.
    """
    loss_lib.checked(losses, params)
    num_draws = _validate.positive_int("num_draws", num_draws, minimum=3)
    num_probes = _validate.positive_int("num_probes", num_probes, minimum=3)
    n = losses.num_examples
    of_s = _draws.moments_of(_draws.independent(law, n), n).of_s
    _validate.prng_key("key", key)

    def measured(params: Params, data: Data, key: Key[Array, ""]) -> _Parts:
        own = losses.replace(data=data)
        drawn = _draws.draw(
            own,
            params,
            law,
            key,
            first_step=first_step,
            num_draws=num_draws,
            draws_per_pass=draws_per_pass,
        )
        hc, hs = _quadratic(own, params, drawn)
        h, h2 = _hessian.probed(losses, params, data, key, num_probes=num_probes, kind="rademacher")
        return _Parts(hc, hs / of_s, _gram(drawn.noise()), h, h2)

    parts = jax.jit(measured)(params, losses.data, key)
    _estimates.check_finite(losses, params, parts)
    dim = sum(leaf.size for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, params)))
    return _of_parts(parts, dim)


def _quadratic(
    losses: loss_lib.LossVector, params: Params, drawn: _draws.Draws
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """v^T H v and u^T H u of each draw: v is the noise, and u is `Draws.centred`."""

    def product(vector: Gradients) -> Gradients:
        typed = jax.tree.map(lambda v, p: v.astype(jnp.result_type(p)), vector, params)
        return losses.hessian_product(params, typed)

    g = drawn.mean_gradient
    hg = product(g)
    along = _hessian.dot(g, hg)

    def one(given: tuple[Gradients, Array]) -> tuple[Array, Array]:
        u, total = given
        across = _hessian.dot(u, product(u))
        # v = u + (sum of the weights - 1) g, so that one product is enough for both.
        excess = (total - 1).astype(along.dtype)
        return across + 2 * excess * _hessian.dot(u, hg) + excess**2 * along, across

    return jax.lax.map(one, (drawn.centred(), drawn.sums))


def _gram(noise: Gradients) -> Float[Array, "K K"]:
    """The inner products of all pairs of draws."""
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(noise)]
    dtype = _dtypes.accumulator(*(leaf.dtype for leaf in leaves))
    wide = [leaf.astype(dtype) for leaf in leaves]
    return jnp.stack([jnp.matmul(leaf, leaf.T, precision=_HIGHEST) for leaf in wide]).sum(0)


def _of_parts(parts: _Parts, dim: int) -> Alignment:
    squares = jnp.diag(parts.gram)
    k, p, dtype = parts.hc.shape[0], parts.h.shape[0], parts.gram.dtype
    # Quotients have no unit: they are computed in units of the noise and of the Hessian.
    of_noise, of_hessian = squares.max(), jnp.sqrt(parts.h2.max())
    of_noise = jnp.where(of_noise > 0, of_noise, 1)
    of_hessian = jnp.where(of_hessian > 0, of_hessian, 1)
    own = parts._replace(
        hc=parts.hc / of_noise / of_hessian,
        gram=parts.gram / of_noise,
        h=parts.h / of_hessian,
        h2=parts.h2 / of_hessian / of_hessian,
    )
    pairs = jnp.square(own.gram)

    def of_draws(w: Float[Array, " K"]) -> dict[str, Array]:
        """Unbiased numbers from the draws with weight 1."""
        total = w.sum()
        different = w @ pairs @ w - jnp.square(w) @ jnp.diag(pairs)
        return {
            "hc": w @ own.hc / total,
            "c": w @ jnp.diag(own.gram) / total,
            "c2": different / (total * (total - 1)),
        }

    def of_probes(w: Float[Array, " P"]) -> dict[str, Array]:
        return {"h": w @ own.h / w.sum(), "h2": w @ own.h2 / w.sum()}

    def quotient(a: dict[str, Array], b: dict[str, Array], name: str) -> Array:
        if name == "alignment":
            return dim * a["hc"] / (b["h"] * a["c"])
        if name == "cosine":
            # With few draws, the estimate of |C|_F^2 may be below 0: then the cosine is not finite.
            return a["hc"] / jnp.sqrt(b["h2"] * jnp.maximum(a["c2"], 0))
        return jnp.square(a["c"]) / a["c2"]

    draws, probes = of_draws(jnp.ones(k, dtype)), of_probes(jnp.ones(p, dtype))

    def both(name: str, *, positive: bool = False) -> Estimate:
        value, of_k = _estimates.jackknife(lambda w: quotient(of_draws(w), probes, name), k, dtype)
        _, of_p = _estimates.jackknife(lambda w: quotient(draws, of_probes(w), name), p, dtype)
        return _estimates.estimate(value, jnp.hypot(of_k, of_p), min(k, p) - 1, positive=positive)

    norm, norm_error = _estimates.jackknife(lambda w: of_draws(w)["c2"], k, dtype)
    return Alignment(
        trace_hc=_estimates.of_sample(parts.hc),
        trace_hs=_estimates.of_sample(parts.hs),
        trace_c=_estimates.of_sample(squares, positive=True),
        squared_norm_c=_estimates.estimate(
            norm * of_noise * of_noise, norm_error * of_noise * of_noise, k - 1, positive=True
        ),
        trace_h=_estimates.of_sample(parts.h),
        squared_norm_h=_estimates.of_sample(parts.h2, positive=True),
        alignment=both("alignment"),
        cosine=both("cosine"),
        participation_ratio=both("participation_ratio", positive=True),
    )


class Ranks(NamedTuple):
    """The effective number of directions of a covariance by three counts, each at most the next.

    Attributes:
        over_largest: the trace divided by the largest eigenvalue.
        participation_ratio: the squared trace divided by the sum of the squared eigenvalues.
        effective: the exponential of the entropy of the eigenvalues as shares of the trace.
    """

    over_largest: Float[Array, ""]
    participation_ratio: Float[Array, ""]
    effective: Float[Array, ""]


def ranks(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise | Exchangeable | str = "sgd_covariance",
) -> Ranks:
    """The exact effective rank and participation ratio of S or of the covariance of a law.

    They are computed from the eigenvalues of the N x N Gram matrix if N < D
    (`covariance.spectrum`). They cost N per-example gradients, memory for all of them, and O(N^2 D)
    operations. A subset of n examples gives much smaller numbers, at most n - 1. For large D use
    the participation ratio of `alignment`.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: as in `covariance.noise_covariance`.

    Returns:
        Three scalars; NaN under `jax.jit` if there is no noise.

    Raises:
        TypeError: as `covariance.noise_covariance`.
        ValueError: as `covariance.noise_covariance`; or, outside of `jax.jit`, if a loss or a
            gradient is not finite, or all eigenvalues are 0.
    """
    values = covariance.spectrum(losses, params, law).eigenvalues
    _estimates.check_finite(losses, params, values)
    trace = values.sum()
    if not isinstance(trace, Tracer) and float(trace) == 0:
        raise ValueError("losses must have gradient noise to have ranks, got a covariance of 0.")
    shares = values / trace
    logarithms = jnp.log(jnp.where(shares > 0, shares, 1))
    return Ranks(
        1 / shares.max(), 1 / jnp.square(shares).sum(), jnp.exp(-(shares * logarithms).sum())
    )


class BatchSharpness(NamedTuple):
    """Batch sharpness of a law by its two definitions, which are not interchangeable.

    g_W is the gradient and H_W the Hessian of the same weighted loss L . W.

    Attributes:
        ratio_of_expectations: ``E[g_W^T H_W g_W] / E|g_W|^2``. If it is 2 / eta and losses are
            quadratic, one step with learning rate eta does not change the weighted loss on average.
        expectation_of_ratios: ``E[g_W^T H_W g_W / |g_W|^2]``. NaN if a gradient was 0 (as with an
            empty batch of `noise.bernoulli`), since it is not defined then.
        curvature: ``E[g_W^T H_W g_W]``.
        squared_gradient: ``E|g_W|^2``.
        zero_gradients: the number of gradients that were 0.
    """

    ratio_of_expectations: Estimate
    expectation_of_ratios: Estimate
    curvature: Estimate
    squared_gradient: Estimate
    zero_gradients: Int[Array, ""]


def batch_sharpness(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise,
    key: Key[Array, ""],
    *,
    num_draws: PositiveInt,
    first_step: Step = 0,
) -> BatchSharpness:
    """Batch sharpness (Andreyev and Beneventano 2024, arXiv:2412.20553) of any law of weights.

    It is the curvature of the weighted loss along its own gradient: the Hessian has the same
    weights as the gradient. Both definitions in use are measured; at batch size 1 they may differ
    by an order of magnitude.

    A draw costs one gradient and one Hessian-vector product, about four gradients in all, of the
    examples that have weights: b for `noise.sgd`, N for dense laws. Each eager call compiles a
    program: put the function under `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: a law for N examples with independent steps; it need not state a covariance.
        key: a typed PRNG key; draw k is ``law.sample(key, first_step + k)``.
        num_draws: K, at least 2.
        first_step: the step of the first draw.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, `law`
            is not a `noise.MNoise`, or `key` is not a typed PRNG key.
        ValueError: if `law` is for another number of examples or has steps that depend on each
            other, `num_draws` is below 2, or, outside of `jax.jit`, a loss or a gradient is not
            finite.
    """
    loss_lib.checked(losses, params)
    num_draws = _validate.positive_int("num_draws", num_draws, minimum=2)
    _draws.independent(law, losses.num_examples)
    _validate.prng_key("key", key)
    first = _validate.step(first_step, "first_step")

    def measured(
        params: Params, data: Data, key: Key[Array, ""], first: Int[Array, ""]
    ) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
        own = losses.replace(data=data)

        def one(step: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            weights = law.sample(key, step)
            gradient = own.gradient(params, weights)
            # Along a direction of length 1, since products of two small gradients may underflow.
            gradient, length = _dtypes.with_norm(gradient)
            unit = jnp.where(length > 0, length, 1)
            along = jax.tree.map(lambda g: (g / unit.astype(g.dtype)).astype(g.dtype), gradient)
            image = own.hessian_product(params, along, weights)
            return _hessian.dot(along, image), length

        return jax.lax.map(one, first + jnp.arange(num_draws, dtype=jnp.int32))

    sharpness, lengths = jax.jit(measured)(params, losses.data, key, first)
    _estimates.check_finite(losses, params, (sharpness, lengths))
    # Weights of the ratio of sums, which has no unit.
    shares = jnp.square(_dtypes.in_unit(lengths))
    total = (sharpness * shares).sum(), shares.sum()
    # The jackknife: the ratio of the sums without each draw in turn.
    without = (total[0] - sharpness * shares) / (total[1] - shares)
    squares = jnp.square(lengths)
    return BatchSharpness(
        _estimates.estimate(total[0] / total[1], _estimates.spread_without(without), num_draws - 1),
        _estimates.of_sample(jnp.where(lengths == 0, jnp.nan, sharpness)),
        _estimates.of_sample(sharpness * squares),
        _estimates.of_sample(squares, positive=True),
        (lengths == 0).sum(),
    )
