"""One call that looks for silent mistakes in a user's loss vector function."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _narrow, _validate
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Batch, Data, Gradients, LossVectorFn, Params
from msgd_jax.loss import _outputs

# The largest relative difference of two evaluations that differ by rounding only.
_TOLERANCES = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-3, "float64": 1e-6}
# Smaller losses are compared as if they were this large: they are differences of larger numbers.
_SMALL = 0.01
_SHOWN = 8  # the number of examples that a message names

Compared = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def check(
    loss_vector_fn: LossVectorFn,
    params: Params,
    data: Data,
    key: Key[Array, ""],
    *,
    has_keys: bool = False,
    tolerance: float | None = None,
) -> None:
    """Looks for mistakes in a loss vector function, and raises one error that names all it finds.

    Call it once, at the start of a script, on some tens or hundreds of examples that fit one pass.
    It finds:

    * a mean, a sum, or an array of another shape instead of one loss per example, and losses that
      are not floating point;
    * losses that change from one evaluation to the next (numpy's random numbers, a counter);
    * losses that are not finite; a gradient that is not finite although all losses are;
    * losses that are divided by the number of examples;
    * losses that depend on the other examples of the batch (batch norm in training mode,
      contrastive losses), on their position in the batch, or on the number of examples;
    * a function that does not work on a batch of one example;
    * with `has_keys`, keys that are not used, or are used for other examples.

    It warns if the gradient is exactly zero, as for losses that do not depend on `params`.

    The examples are split into parts and permuted by the key, so a second key tests other parts.
    Losses of two evaluations count as equal if they agree to `tolerance`, relative to the larger of
    the loss and the mean of all losses. This allows for rounding, and so a dependence smaller than
    that is not found.

    It costs 5.5 N losses and one gradient of N losses (with `has_keys`, 6.5 N losses and two
    gradients), in four programs that are compiled for this call: two for N examples, one for half
    of them, and one for the gradient. They use the full precision of the types (no TF32).

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]. Give
          a function with mutable statistics at fixed statistics, in evaluation mode. With
          `has_keys` it is ``loss_vector_fn(params, batch, keys)`` with one typed PRNG key per
          example, keys [B].
        params: a pytree of floating-point arrays.
        data: a pytree of arrays [N, ...], N at least 2.
        key: a typed PRNG key, for the parts, the order, and the keys of the examples.
        has_keys: whether `loss_vector_fn` takes one key per example. An example has the same key in
          all evaluations.
        tolerance: None for 1e-3; for 0.05 or 0.01 if anything is computed in bfloat16 or float16;
          and for 1e-6 if everything is computed in float64.

    Raises:
        TypeError: if `loss_vector_fn` is not a function, a leaf of `params` is not floating point,
            a leaf of `data` holds neither numbers nor PRNG keys, or `key` is not a typed PRNG key.
        ValueError: if `data` has fewer than 2 examples, `tolerance` is not above 0, or the check
            finds something: one line per finding says what it is and what to do.

    Example:
        >>> from msgd_jax import loss
        >>> x, key = jnp.asarray([0.0, 1.0, 3.0, 4.0]), jax.random.key(0)
        >>> loss.check(lambda theta, x: (theta - x) ** 2, jnp.asarray(2.5), x, key)
        >>> loss.check(lambda theta, x: (theta - x) ** 2 / len(x), jnp.asarray(2.5), x, key)
        Traceback (most recent call last):
        ValueError: loss_vector_fn: ...are divided by the number of examples...
    """
    _validate.function("loss_vector_fn", loss_vector_fn)
    _outputs.check_takes(loss_vector_fn, _outputs.Takes(has_keys=has_keys))
    _validate.floating_params(params)
    _validate.prng_key("key", key)
    size = _validate.leading_axis("data", data)
    if size < 2:
        raise ValueError(f"data must have at least 2 examples to be compared, got {size}.")
    if tolerance is not None:
        _validate.positive_scalar("tolerance", tolerance)
    data, others = jax.tree.map(jnp.asarray, data), None
    own_key, *keys_keys = jax.random.split(derive(key, Stream.CHECK), 3)
    if has_keys:
        # Keys become part of the examples, as words, since a key may not be used twice.
        data, others = ((data, _words(keys_key, size)) for keys_key in keys_keys)
        loss_vector_fn = _of_words(loss_vector_fn, own_key)
    findings = list(_findings(loss_vector_fn, params, data, others, own_key, tolerance))
    if findings:
        raise ValueError("loss_vector_fn: " + "\n".join(findings))


def _findings(
    loss_vector_fn: LossVectorFn,
    params: Params,
    data: Data,
    others: Data | None,
    key: Key[Array, ""],
    tolerance: float | None,
) -> Iterator[str]:
    """Yields what is wrong and what to do about it; `others` are the data with other keys.

    A finding that makes further tests meaningless is the only one.
    """
    size = _validate.leading_axis("data", data)
    if (wrong := _wrong_result(loss_vector_fn, params, data, size)) is not None:
        yield wrong
        return
    if tolerance is None:
        tolerance = _rounding(loss_vector_fn, params, data)

    # An impure function gives other losses when it is traced a second time.
    evaluate = _program(loss_vector_fn, params)
    losses, again = evaluate(data), _program(loss_vector_fn, params)(data)
    scale = _scale(losses)
    if not _same(losses, again, scale, tolerance).all():
        yield (
            "two evaluations at the same params and examples differ. A loss must be a pure "
            "function: take randomness from a jax key, not from numpy.random, time, or a counter."
        )
        return
    order_key, weights_key = jax.random.split(key)
    gradient = _gradient(loss_vector_fn, params, size, weights_key)
    grads = gradient(data)
    yield from _not_finite(losses, grads)
    # Losses and gradient are compared, since noise at the outputs changes the gradient only.
    if others is not None and (
        np.array_equal(evaluate(others), losses) and _equal(gradient(others), grads)
    ):
        yield (
            "the keys are not used: with other keys, losses and gradient are the same. Is the "
            "model in evaluation mode, or does the loss make a key of its own?"
        )

    order = np.asarray(jax.random.permutation(order_key, size))

    def compared(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The losses of these examples as a batch, and where they differ from those among all."""
        new = evaluate(_taken(data, batch))
        return new, ~_same(new, losses[batch], scale, tolerance)

    found = list(_couplings(compared, order))
    yield from found
    unfit = list(_unfit_sizes(lambda part: loss_vector_fn(params, _taken(data, part)), order))
    yield from unfit
    if not unfit:
        yield from _scalings(compared, losses, order, tolerance, known=bool(found))


def _couplings(compared: Compared, order: Int[np.ndarray, " N"]) -> Iterator[str]:
    """Finds losses that depend on the other examples, or else on the position in the batch."""
    half = len(order) // 2
    # Keep one half of the examples in place and replace the others by copies of it.
    coupled = []
    for kept, others in ((order[:half], order[half:]), (order[half:], order[:half])):
        batch = np.arange(len(order))
        batch[others] = np.resize(kept, len(others))
        coupled.extend(kept[compared(batch)[1][kept]])
    if coupled:
        yield (
            f"losses depend on the other examples of the batch: {_number(coupled, 'example')} when "
            "others are replaced. Each loss must depend on its own example only: use layer or "
            "group norm, or batch norm in evaluation mode, and no sums over the batch or keys that "
            "examples share."
        )
        return
    moved = order[compared(order)[1]]
    if len(moved):
        yield (
            f"losses depend on the position in the batch: {_number(moved, 'example')} when the "
            "examples are put in another order. Weights, labels and masks of the examples must be "
            "part of the data, not arrays from outside that are read by position."
        )


def _unfit_sizes(
    losses_of: Callable[[np.ndarray], Any], order: Int[np.ndarray, " N"]
) -> Iterator[str]:
    """Finds batch sizes that the function does not take: half of the examples, or one."""
    for part in (order[: len(order) // 2], order[:1]):
        try:
            shape = jax.eval_shape(lambda part=part: losses_of(part)).shape
        except Exception as error:  # the user's function may raise anything
            yield (
                f"it fails on a batch of {len(part)} of the {len(order)} examples: "
                f"{type(error).__name__}: {str(error)[:120]}. It must take any number of examples, "
                "since micro-batches and devices have different numbers."
            )
            return
        if shape != (len(part),):
            yield (
                f"for a batch of {len(part)} it returns shape {shape} instead of ({len(part)},). "
                "If it calls jnp.squeeze without an axis, use jnp.squeeze(x, axis=-1)."
            )
            return


def _scalings(
    compared: Compared,
    losses: Float[np.ndarray, " N"],
    order: Int[np.ndarray, " N"],
    tolerance: float,
    *,
    known: bool,
) -> Iterator[str]:
    """Finds losses that change with the number of examples.

    If `known`, a dependence on other examples has been found already and may be the reason.
    """
    half = len(order) // 2
    alone, differ = compared(order[:half])
    factor = _factor(alone, losses[order[:half]], tolerance)
    if differ.any() and factor is not None:
        yield (
            f"losses of {half} of the {len(order)} examples are {factor:.3g} times what they are "
            "among all of them: they are divided by the number of examples. Do not divide: the "
            "weights have mean 1/N, so that L . W is a mean already."
        )
    elif differ.any() and not known:
        yield (
            "losses depend on how many examples there are: "
            f"{_number(order[:half][differ], 'example')} when half of them are a batch of their "
            "own. Each loss must depend on its own example only."
        )


def _wrong_result(
    loss_vector_fn: LossVectorFn, params: Params, data: Data, size: int
) -> str | None:
    """What is wrong with the shape or type of the result, or None; computes nothing."""
    result = jax.eval_shape(loss_vector_fn, params, data)
    if not hasattr(result, "shape"):
        kind = type(result).__name__
        return (
            f"it returns a {kind} instead of an array of losses. With mutable statistics, check "
            "lambda params, batch: loss_vector_fn(params, batch, statistics)[0]."
        )
    shape = result.shape
    if shape == ():
        return (
            f"it returns one number for {size} examples, a mean or a sum: return the loss of each, "
            f"shape ({size},), without mean() or sum(). The weights make the mean."
        )
    if shape != (size,):
        more = (
            "sum or average over the axes behind the first (tokens, outputs)"
            if shape[0] == size
            else "loss.per_example makes such a function from the loss of one example"
        )
        return f"it returns shape {shape} for {size} examples instead of ({size},): {more}."
    if not jnp.issubdtype(result.dtype, jnp.floating):
        return f"it returns {result.dtype}: losses must be floating point to be differentiated."
    return None


def _not_finite(losses: Float[np.ndarray, " N"], grads: Gradients) -> Iterator[str]:
    """Finds losses and gradients that are not finite; warns if the gradient is exactly zero."""
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        found = ", ".join(f"{losses[i]} at {i}" for i in wrong[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        yield (
            f"losses are not finite: {found}{more} (numbers of examples). Look at these examples, "
            "and at logarithms, roots and divisions of zero."
        )
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if not jnp.isfinite(leaf).all():
            yield (
                f"the gradient is not finite at {_validate.place('params', path)}, although all "
                "losses are. jnp.where does not keep a NaN out of a gradient: make the argument of "
                "a root, logarithm or division safe beforehand."
            )
            return
    if not any(jnp.any(leaf) for leaf in jax.tree.leaves(grads)):
        warnings.warn(
            "The gradient of loss_vector_fn is exactly zero at params: does it use its argument "
            "params, or other parameters from outside?",
            stacklevel=4,
        )


def _gradient(
    loss_vector_fn: LossVectorFn, params: Params, size: int, key: Key[Array, ""]
) -> Callable[[Data], Gradients]:
    """The gradient of the losses with random weights, which do not cancel as in a plain sum."""
    weights = jax.random.uniform(key, (size,), minval=0.5, maxval=1.5)

    @jax.jit
    @jax.grad
    def gradient(params: Params, data: Data) -> Float[Array, ""]:
        return jnp.sum(loss_vector_fn(params, data).astype(weights.dtype) * weights)

    return lambda data: gradient(params, data)


def _equal(grads: Gradients, others: Gradients) -> bool:
    return jax.tree.all(jax.tree.map(jnp.array_equal, grads, others))


def _words(key: Key[Array, ""], size: int) -> Array:
    """The words of one key per example."""
    return jax.random.key_data(jax.random.split(key, size))


def _of_words(loss_vector_fn: LossVectorFn, like: Key[Array, ""]) -> LossVectorFn:
    """A loss that takes keys, as a loss whose examples are pairs with the words of their keys."""
    implementation = jax.random.key_impl(like)

    def of_words(params: Params, batch: Batch) -> Any:
        examples, words = batch
        keys = jax.random.wrap_key_data(words, impl=implementation)
        return loss_vector_fn(params, examples, keys)

    return of_words


def _taken(data: Data, indices: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[jnp.asarray(indices)], data)


def _program(loss_vector_fn: LossVectorFn, params: Params) -> Callable[[Batch], np.ndarray]:
    """A newly traced program for the losses of a batch, in float64 for comparisons."""
    program = jax.jit(lambda params, batch: loss_vector_fn(params, batch))

    def evaluate(batch: Batch) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(program(params, batch)).astype(np.float64)

    return evaluate


def _rounding(loss_vector_fn: LossVectorFn, params: Params, data: Data) -> float:
    """The tolerance for the narrowest type that losses are computed in."""
    jaxpr = jax.make_jaxpr(loss_vector_fn)(params, data).jaxpr
    names = _narrow.float_types(jaxpr) & set(_TOLERANCES)
    return max((_TOLERANCES[name] for name in names), default=_TOLERANCES["float32"])


def _scale(losses: Float[np.ndarray, " N"]) -> float:
    finite = np.abs(losses[np.isfinite(losses)])
    return max(float(finite.mean()) if len(finite) else 0.0, _SMALL)


def _same(
    losses: Float[np.ndarray, " B"],
    others: Float[np.ndarray, " B"],
    scale: float,
    tolerance: float,
) -> Bool[np.ndarray, " B"]:
    """Which losses are equal up to rounding; those that are not finite must be equal exactly."""
    return np.isclose(losses, others, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _factor(
    losses: Float[np.ndarray, " B"], others: Float[np.ndarray, " B"], tolerance: float
) -> float | None:
    """The factor, other than 1, by which all `losses` differ from the `others`; None if none."""
    finite = np.isfinite(losses) & np.isfinite(others)
    losses, others = losses[finite], others[finite]
    if not others.any():
        return None
    factor = float(losses @ others / (others @ others))
    bound = tolerance * max(np.abs(losses).mean(), _SMALL * abs(factor))
    one_factor = np.abs(losses - factor * others).max() <= 3 * bound
    return factor if one_factor and not np.isclose(factor, 1, rtol=10 * tolerance) else None


def _number(examples: Any, noun: str) -> str:
    """How many examples change, and the numbers of the first ones."""
    numbers = sorted(int(i) for i in examples)
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = ", ..." if len(numbers) > _SHOWN else ""
    plural = "s" if len(numbers) > 1 else ""
    return f"{len(numbers)} {noun}{plural} change{'' if plural else 's'} ({shown}{more})"
