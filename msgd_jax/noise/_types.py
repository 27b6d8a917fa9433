"""Laws of weight vectors: `MNoise`, its draws `Weights`, and its covariance `Exchangeable`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Integer, Key

from msgd_jax import _validate
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Step
from msgd_jax._values import Bound


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Weights:
    """One draw of a law: the weight of each example whose loss is computed.

    Attributes:
        values: the weights, [support]; float32 or float64.
        indices: the indices of their examples, [support]; the weights of an example that is listed
          several times add up. None means all examples in order; then support = num_examples.
        num_examples: N, the length of the full weight vector.

    Raises:
        TypeError: if `num_examples` is not an integer, `values` are not a floating-point array, or
            `indices` are not integers.
        ValueError: if `num_examples` is not positive or `indices` are not in [0, num_examples);
            traced indices are not checked.
    """

    values: Float[Array, "*batch support"]
    indices: Integer[Array, "*batch support"] | None
    num_examples: int

    def __post_init__(self) -> None:
        _validate.num_examples("num_examples", self.num_examples)
        if not jnp.issubdtype(getattr(self.values, "dtype", bool), jnp.floating):
            raise TypeError(
                f"values must be a floating-point array, got {_validate.shown(self.values)}."
            )
        if self.indices is not None:
            _validate.integer_dtype("indices", self.indices)
            _validate.indices("indices", self.indices, self.num_examples)

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], int]:
        """For jax: values and indices are leaves, and the number of examples is static."""
        names = ("values", "indices")
        keyed = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names)
        return keyed, self.num_examples

    @classmethod
    def tree_unflatten(cls, num_examples: int, leaves: Any) -> "Weights":
        """For jax. Leaves are not checked, since jax also puts other objects in place of arrays."""
        made = object.__new__(cls)
        for name, value in zip(
            ("values", "indices", "num_examples"), (*leaves, num_examples), strict=True
        ):
            object.__setattr__(made, name, value)
        return made

    def dense(self) -> Float[Array, "*batch num_examples"]:
        """The full weight vector W in R^N, [N], zeros included; of K draws, [K, N].

        Traced indices outside [0, N) are ignored.

        Example:
            >>> from msgd_jax import noise
            >>> weights = noise.sgd(5, batch_size=5).sample(jax.random.key(0), step=0)
            >>> weights.dense()
            Array([0.2, 0.2, 0.2, 0.2, 0.2], dtype=float32)
        """
        values = jnp.asarray(self.values)
        if self.indices is None:
            return values

        def of_one(values: Array, indices: Array) -> Array:
            zeros = jnp.zeros(self.num_examples, values.dtype)
            indices = indices.astype(jnp.int32)
            return zeros.at[indices].add(values, mode="drop", wrap_negative_indices=False)

        return jnp.vectorize(of_one, signature="(b),(b)->(n)")(values, self.indices)


@dataclasses.dataclass(frozen=True)
class Exchangeable:
    """The covariance of an exchangeable weight vector: one number on the diagonal, one off it.

    Attributes:
        diagonal: Var(W_i).
        off_diagonal: Cov(W_i, W_j) for i != j; 0 if there is only one example.
    """

    diagonal: float
    off_diagonal: float

    @property
    def alpha(self) -> float:
        """The coefficient of I in ``Cov(W) = alpha I + beta 1 1^T``."""
        return self.diagonal - self.off_diagonal

    @property
    def beta(self) -> float:
        """The coefficient of 1 1^T in ``Cov(W) = alpha I + beta 1 1^T``."""
        return self.off_diagonal

    def __add__(self, other: "Exchangeable") -> "Exchangeable":
        """The covariance of a sum of uncorrelated vectors."""
        return Exchangeable(self.diagonal + other.diagonal, self.off_diagonal + other.off_diagonal)

    def __rmul__(self, factor: float | int) -> "Exchangeable":
        """The covariance of the vector multiplied by the square root of `factor`."""
        return Exchangeable(factor * self.diagonal, factor * self.off_diagonal)

    def eigenvalues(self, num_examples: int) -> tuple[float, float]:
        """The two eigenvalues of Cov(W): across the all-ones vector, and along it.

        They are alpha and ``alpha + N beta``.

        Raises:
            ValueError: if an eigenvalue is negative or not finite: no N weights have this
                covariance.
        """
        num_examples = _validate.positive_int("num_examples", num_examples)
        across, along = self.alpha, self.alpha + num_examples * self.beta
        tiny = 1e-12 * num_examples * (abs(self.diagonal) + abs(self.off_diagonal))
        finite = math.isfinite(across) and math.isfinite(along)
        if not finite or (num_examples > 1 and across < -tiny) or along < -tiny:
            raise ValueError(
                "noise must have finite alpha >= 0 and alpha + N beta >= 0 to be a covariance of "
                f"N = {num_examples} weights, got alpha = {self.alpha}, beta = {self.beta}."
            )
        if along < 1e-12 * across:  # 0 up to the rounding of two Python floats: centred
            along = 0.0
        return max(across, 0.0), max(along, 0.0)

    def matrix(self, num_examples: int) -> Float[np.ndarray, "N N"]:
        """The dense covariance, [N, N] in float64; meant for small N."""
        num_examples = _validate.positive_int("num_examples", num_examples)
        identity = np.eye(num_examples)
        return self.off_diagonal + self.alpha * identity


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MNoise:
    """A law of weight vectors W in R^N with mean 1/N, drawn by a pure function of (key, step).

    The constructors of this module make laws, and so can you: only `draw` has to be written. One
    weight vector of a law of your own is drawn when it is made, to check its form. A law holds no
    arrays, and jit treats it as a constant. Laws compare by value: two laws that one constructor
    made with the same arguments are equal, and two of yours are equal if all their attributes are
    (functions compare by identity). A law owns the compiled program that draws from it, so build a
    law once, outside the training loop.

    Attributes:
        name: the constructor and its arguments, for messages.
        num_examples: N, the number of examples.
        support_size: the number of per-example losses that one step computes.
        moments: the `covariance`; None if two numbers cannot state it, because the weights are not
            exchangeable or it changes from step to step. Functions that need it refuse such a law.
        draw: maps one PRNG key to `Weights`. It must be called with keys that nothing else draws
            from: call `sample`, which makes such keys.
        draw_at: for steps that depend on each other: maps (key of the run, step) to `Weights`; each
            single step has the law of `draw`. None if the steps are independent: each of them then
            calls `draw` with a key of its own.
        between: with `draw_at`, the exact Cov(W_s, W_t) of two different steps, and without
            `moments` also that of a step with itself; see `covariance_between`. It may be None
            if `moments` are None.

    Raises:
        TypeError: if a number is not an integer, `draw`, `draw_at` or `between` is not a function,
            `moments` are neither an `Exchangeable` nor None, or a draw is no `Weights`.
        ValueError: if a number is below 1, or only one of `draw_at` and `between` is given (without
            `moments`, `between` may be left out), or the draws are not of `support_size` finite
            weights of `num_examples` examples, with indices in [0, num_examples).
    """

    name: str
    num_examples: int
    support_size: int
    moments: Exchangeable | None
    draw: Callable[[Key[Array, ""]], Weights] = dataclasses.field(repr=False)
    draw_at: Callable[[Key[Array, ""], Int[Array, ""]], Weights] | None = dataclasses.field(
        default=None, repr=False
    )
    between: Callable[[int, int], Exchangeable] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        _validate.positive_int("num_examples", self.num_examples)
        _validate.positive_int("support_size", self.support_size)
        _validate.function("draw", self.draw)
        missing = self.between is None and self.moments is not None
        if (self.draw_at is None and self.between is not None) or (self.draw_at and missing):
            raise ValueError("draw_at and between must be given together, or neither.")
        for name in ("draw_at", "between"):
            if getattr(self, name) is not None:
                _validate.function(name, getattr(self, name))
        if self.moments is not None and not isinstance(self.moments, Exchangeable):
            got = type(self.moments).__name__
            raise TypeError(f"moments must be a noise.Exchangeable or None, got {got}.")
        for name in ("draw", "draw_at"):
            if not isinstance(getattr(self, name), Bound | None):  # else, it is of this module
                _check_own(name, self)

    @property
    def covariance(self) -> Exchangeable:
        """The exact Cov(W) of every step.

        Raises:
            ValueError: if the law states none, because the weights are not exchangeable or the
                covariance changes from step to step.
        """
        if self.moments is None:
            raise ValueError(
                "law must have one covariance of two numbers, Cov(W) = alpha I + beta 1 1^T, at "
                f"every step, got {self.name[:200]}, which states none."
            )
        return self.moments

    def covariance_between(self, step: int, other: int) -> Exchangeable:
        """The covariance of the weights of two steps: Cov(W_s,i, W_t,i) and Cov(W_s,i, W_t,j).

        Raises:
            TypeError: if a step is not an integer.
            ValueError: if a step is negative, or the law states no covariance.
        """
        step, other = (
            _validate.positive_int(name, value, minimum=0)
            for name, value in (("step", step), ("other", other))
        )
        if self.between is not None and (self.moments is None or step != other):
            return self.between(step, other)
        covariance = self.covariance
        return covariance if step == other else Exchangeable(0.0, 0.0)

    def sample(self, key: Key[Array, ""], step: Step) -> Weights:
        """Draws the weight vector of one step.

        The same key and step give the same weights: under jit or not, under vmap over keys, on any
        number of devices, before and after a resume. (This holds for jax's default threefry keys;
        the other implementations promise less under vmap.)

        Args:
            key: a typed PRNG key, the same for the whole run. You may use it for other things too:
                the weights are independent of what `jax.random` draws from it.
            step: the number of the step, from 0 to 2^31 - 1, of any integer type; it may be traced.

        Raises:
            TypeError: if `key` is not a typed PRNG key or `step` is not an integer.
            ValueError: if `key` is an array of keys, or `step` is out of range or not a scalar.

        Example:
            >>> from msgd_jax import noise
            >>> law, key = noise.fisher(100, batch_size=10), jax.random.key(0)
            >>> bool((law.sample(key, 3).values == jax.jit(law.sample)(key, 3).values).all())
            True
            >>> jax.vmap(law.sample, in_axes=(None, 0))(key, jnp.arange(4)).values.shape
            (4, 100)
        """
        _validate.prng_key("key", key)
        return self._compiled(key, _validate.step(step))

    @functools.cached_property
    def _compiled(self) -> Callable[[Key[Array, ""], Int[Array, ""]], Weights]:
        # Compiled also for eager calls, and behind a barrier, so that XLA does not fuse it with the
        # code that uses the weights: different fusion rounds differently.
        draw, draw_at = self.draw, self.draw_at

        def one_step(key: Key[Array, ""], step: Int[Array, ""]) -> Weights:
            weights = weights_of_step(draw, draw_at, derive(key, Stream.WEIGHTS), step)
            return jax.lax.optimization_barrier(weights)

        return jax.jit(one_step)


def _check_own(name: str, law: MNoise) -> None:
    """Draws once from a function of the user's, and raises unless its weights fit the law."""
    draw = getattr(law, name)
    # Evaluated here even while a program that makes the law is traced.
    with jax.ensure_compile_time_eval():
        key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
        drawn = jax.jit(draw)(key) if name == "draw" else jax.jit(draw)(key, step)
    if not isinstance(drawn, Weights):
        raise TypeError(f"{name} must return a noise.Weights, got {_validate.shown(drawn)}.")
    size = law.num_examples if drawn.indices is None else law.support_size
    shapes = [x.shape for x in (drawn.values, drawn.indices) if x is not None]
    if drawn.num_examples != law.num_examples or any(shape != (size,) for shape in shapes):
        raise ValueError(
            f"{name} must return {size} weights of {law.num_examples} examples, as many indices or "
            f"none, got weights of {drawn.num_examples} examples of shape {shapes[0]}"
            f"{f' with indices of shape {shapes[1]}' if shapes[1:] else ''}."
        )
    if drawn.indices is not None:
        _validate.indices(f"the indices that {name} returns", drawn.indices, law.num_examples)
    if not isinstance(drawn.values, Tracer) and not np.isfinite(np.asarray(drawn.values)).all():
        raise ValueError(f"{name} must return finite weights, got {drawn.values}.")


def weights_of_step(
    draw: Callable[[Key[Array, ""]], Weights],
    draw_at: Callable[[Key[Array, ""], Int[Array, ""]], Weights] | None,
    key: Key[Array, ""],
    step: Int[Array, ""],
) -> Weights:
    """The weights of a step by `draw` or `draw_at`, from the key of the stream of weights."""
    return draw(jax.random.fold_in(key, step)) if draw_at is None else draw_at(key, step)


def is_sparse(law: MNoise) -> bool:
    """Whether the draws of `law` list only some of the examples; computes nothing."""
    return jax.eval_shape(lambda: law.draw(jax.random.key(0)).indices) is not None
