"""Checks of arguments: every error names the argument, its value, and what is allowed."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

MAX_EXAMPLES = 2**31 - 1
MAX_STEP = 2**31 - 1


def positive_int(name: str, value: Any, maximum: int | None = None, minimum: int = 1) -> int:
    """Returns `value` as an int in [minimum, maximum]; raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {shown(value)}.")
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {value}.")
    return int(value)


def optional_positive_int(name: str, value: Any) -> int | None:
    """Returns `value` as an int above 0, or None; raises TypeError or ValueError."""
    return None if value is None else positive_int(name, value)


def num_examples(name: str, value: Any, minimum: int = 1) -> int:
    """Returns `value` as an int in [minimum, 2^31 - 1]; raises TypeError or ValueError."""
    if isinstance(value, (int, np.integer)) and value > MAX_EXAMPLES:
        raise ValueError(
            f"{name} must be at most 2^31 - 1 = {MAX_EXAMPLES}, since the indices of examples are "
            f"int32, got {value}."
        )
    return positive_int(name, value, minimum=minimum)


def positions(name: str, value: Any, size: int) -> Int[Array, "*shape"]:
    """Returns integers in [0, size) as an int32 array; raises TypeError or ValueError otherwise.

    Traced integers cannot be checked and are clipped.
    """
    dtype = integer_dtype(name, value)
    indices(name, value, size)
    # Types that cannot hold `size` are widened first; wider types are clipped before they are cut.
    if dtype.itemsize < 4:
        value = jnp.asarray(value, jnp.int32)
    return jnp.clip(jnp.asarray(value), 0, size - 1).astype(jnp.int32)


def indices(name: str, value: Any, size: int) -> None:
    """Raises ValueError unless all indices are in [0, size); traced ones are not checked."""
    if not isinstance(value, Tracer) and np.size(value):
        # Evaluated here even while a program that reads the array from outside is traced.
        with jax.ensure_compile_time_eval():
            low, high = int(np.min(value)), int(np.max(value))
        if low < 0 or high >= size:
            raise ValueError(f"{name} must be in [0, {size}), got values from {low} to {high}.")


def integer_dtype(name: str, value: Any) -> jnp.dtype:
    """The integer type of `value`, a number or an array; raises TypeError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return np.dtype("int64")
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer, got {shown(value)}.")
    return dtype


def shown(value: Any) -> str:
    """A value as error messages show it: shortened, with its type; an array by shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"
    return text if value is None else f"{text} of type {type(value).__name__}"


def instance(name: str, value: Any, kind: type, called: str) -> None:
    """Raises TypeError unless `value` is a `kind`, a class that users know as `called`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {called}, got {shown(value)}.")


def real(name: str, value: Any) -> float:
    """Returns `value` as a float, finite or not; raises TypeError unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}.")
    return float(value)


def finite_nonnegative(name: str, value: Any) -> float:
    """Returns `value` as a finite float >= 0; raises TypeError or ValueError."""
    real(name, value)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value}.")
    return float(value)


def positive_scalar(name: str, value: Any) -> None:
    """Raises unless `value` is a finite real scalar above 0; a traced value is not checked."""
    _real_scalar(name, value)
    if not isinstance(value, Tracer) and not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}.")


def nonnegative_scalar(name: str, value: Any) -> None:
    """Raises unless `value` is a finite real scalar >= 0; a traced value is not checked."""
    _real_scalar(name, value)
    if not isinstance(value, Tracer) and not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}.")


def _real_scalar(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        raise TypeError(f"{name} must be a number, got {shown(value)}.")
    kind = jnp.result_type(value)
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {shown(value)} and dtype {kind}.")
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}; use jax.vmap.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Returns `value` if it is one of `allowed`; raises ValueError."""
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}."
        )
    return value


def function(name: str, value: Any) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}.")


def optimizer(name: str, value: Any) -> None:
    """Raises TypeError unless `value` has the functions ``init`` and ``update``."""
    if not all(callable(getattr(value, part, None)) for part in ("init", "update")):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation such as optax.sgd(0.1), "
            f"got {shown(value)}."
        )


def passed_to_update(transformation: str, hint: str = "", **arguments: Any) -> None:
    """Raises ValueError if one of these arguments of an optax ``update`` was left out."""
    for name, value in arguments.items():
        if value is None:
            raise ValueError(f"{transformation} needs {name}: update(..., {name}=...).{hint}")


def float_dtype(name: str, dtype: Any, allowed: str = "a floating-point type") -> jnp.dtype:
    """Returns a floating-point dtype; raises TypeError or ValueError."""
    try:
        # numpy reads None as float64, which is hardly ever meant.
        resolved = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None:
        raise TypeError(f"{name} must be {allowed}, got {shown(dtype)}.")
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"{name} must be {allowed}, got {resolved}.")
    return resolved


def wide_float_dtype(name: str, dtype: Any) -> jnp.dtype:
    """Returns float32 or float64 (only with x64 enabled); raises TypeError or ValueError."""
    resolved = float_dtype(name, dtype, "float32 or float64")
    if resolved not in (jnp.dtype("float32"), jnp.dtype("float64")):
        raise ValueError(
            f"{name} must be float32 or float64, got {resolved}: weights are coefficients of sums "
            "and stay wide even if the model computes in a narrower type."
        )
    if jax.dtypes.canonicalize_dtype(resolved) != resolved:
        raise ValueError(f"{name} {resolved} needs jax.config.update('jax_enable_x64', True).")
    return resolved


def prng_key(name: str, key: Any) -> None:
    """Raises TypeError unless `key` is a typed PRNG key, ValueError unless it is a single one."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = "None" if key is None else f"{type(key).__name__} {_shape_and_dtype(key)}".strip()
        raise TypeError(
            f"{name} must be a typed PRNG key such as jax.random.key(0), got {got}. "
            "Keys made by jax.random.PRNGKey can be converted with jax.random.wrap_key_data."
        )
    if key.shape != ():
        raise ValueError(
            f"{name} must be a single key, got an array of keys with shape {key.shape}; "
            "use jax.vmap to draw for several keys at once."
        )


def step(value: Any, name: str = "step") -> Int[Array, ""]:
    """Returns a step as an int32 scalar; raises TypeError or ValueError.

    All integer types are allowed, and the type makes no difference. A step must be between 0 and
    2^31 - 1; of a traced step only the type and the shape are checked.
    """
    integer_dtype(name, value)
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}; use jax.vmap.")
    if not isinstance(value, Tracer) and not 0 <= int(value) <= MAX_STEP:
        raise ValueError(f"{name} must be between 0 and 2^31 - 1 = {MAX_STEP}, got {value}.")
    return jnp.asarray(value, jnp.int32)


def leaf_dtype(where: str, leaf: Any) -> Any:
    """The type of a leaf, an array or a number; raises TypeError for anything else."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(leaf)
    if dtype is None:
        raise TypeError(
            f"{where} must be an array, got {shown(leaf)}. Pass only the arrays of a model, as "
            "given by equinox.partition(model, equinox.is_inexact_array) or flax.nnx.split."
        )
    return dtype


def arrays(params: Any, name: str = "params") -> None:
    """Raises TypeError if a leaf is neither an array nor a number. The error names the leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf_dtype(place(name, path), leaf)


def floating_params(params: Any, name: str = "params") -> None:
    """Raises ValueError if `params` has no leaves, TypeError if a leaf is not real floating point.

    The error names the leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"{name} has no leaves: there is nothing to differentiate, got {shown(params)}."
        )
    for path, leaf in leaves:
        where = place(name, path)
        dtype = leaf_dtype(where, leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{where} must be floating point to be differentiated, got {dtype}.")


def leading_axis(name: str, tree: Any) -> int:
    """Returns the leading axis that all leaves of `tree` share; raises TypeError or ValueError."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} has no leaves: expected arrays with a leading example axis.")
    first, size = "", None
    for path, leaf in leaves:
        where = place(name, path)
        dtype = leaf_dtype(where, leaf)
        kind = getattr(dtype, "type", None)  # numpy's dtypes and those of keys have one
        if not (isinstance(kind, type) and issubclass(kind, np.generic | jax.dtypes.extended)):
            raise TypeError(
                f"{where} must be an array of numpy or jax, got {type(leaf).__name__} of dtype "
                f"{str(dtype)[:40]}. Convert tensors in memory by "
                "jax.tree.map(numpy.asarray, batch); streaming.batches does that for a loader."
            )
        if isinstance(dtype, np.dtype) and (dtype.kind in "OSUMm" or dtype.type is np.void):
            raise TypeError(f"{where} must hold numbers or PRNG keys, got dtype {dtype}.")
        if not jnp.shape(leaf):
            raise ValueError(f"{where} is a scalar: every leaf needs a leading example axis.")
        if size is None:
            first, size = where, jnp.shape(leaf)[0]
        if jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"All leaves of {name} must share the leading axis, got {size} at {first} and "
                f"{jnp.shape(leaf)[0]} at {where}."
            )
    if not size:
        raise ValueError(f"{name} must have at least 1 example, got a leading axis of length 0.")
    return size


def fits_int32(name: str, array: Any) -> None:
    """Raises ValueError if jax would cut 64-bit integers of numpy that 32 bits do not hold.

    Without its x64 flag, jax drops the high bits without a word: 2^40 becomes 0.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or not array.size:
        return
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow == array.dtype:
        return
    low, high = int(array.min()), int(array.max())
    if low < np.iinfo(narrow).min or high > np.iinfo(narrow).max:
        raise ValueError(
            f"{name} must hold integers that fit {narrow}, got {array.dtype} from {low} to {high}: "
            "map them to smaller numbers, or jax.config.update('jax_enable_x64', True)."
        )


def same_kind(function: str, name: str, given: Any, returned: Any) -> None:
    """Raises ValueError unless two pytrees have the same structure, shapes and dtypes."""
    if (difference := first_difference(name, given, returned)) is not None:
        raise ValueError(
            f"{function} must return {name} with the structure, shapes and dtypes it was given: "
            f"given {difference[0]}, returned {difference[1]}."
        )


def first_difference(name: str, one: Any, other: Any) -> tuple[str, str] | None:
    """Descriptions, one per pytree, of the first leaf whose place, shape or dtype differs.

    None if there is no such leaf.
    """
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other)]
    for (path, leaf), (path_2, leaf_2) in zip(*leaves, strict=False):
        kinds = [(leaf_dtype(name, x), np.shape(x)) for x in (leaf, leaf_2)]
        if path != path_2 or kinds[0] != kinds[1]:
            texts = [f"{dtype}{list(shape)} at " for dtype, shape in kinds]
            return texts[0] + place(name, path), texts[1] + place(name, path_2)
    if len(leaves[0]) != len(leaves[1]):
        return f"{len(leaves[0])} leaves", f"{len(leaves[1])} leaves"
    structures = [jax.tree.structure(tree) for tree in (one, other)]
    if structures[0] != structures[1]:
        return _cut(str(structures[0]), 90), _cut(str(structures[1]), 90)
    return None


def place(name: str, path: Any) -> str:
    """The place of a leaf in an argument, for a message: params['w'], for example."""
    return name + _cut(jax.tree_util.keystr(path), 70)


def _cut(text: str, length: int) -> str:
    """The text, with its middle left out if it is longer than `length`."""
    half = length // 2 - 3
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def loss_vector(losses: Any, size: int) -> None:
    """Raises TypeError or ValueError unless `losses` is what a loss vector function returns."""
    if not isinstance(losses, jax.Array):
        raise TypeError(
            f"loss_vector_fn must return an array of losses, got {type(losses).__name__}."
        )
    if losses.shape != (size,):
        raise ValueError(
            f"loss_vector_fn must return one loss per example, shape ({size},), got shape "
            f"{losses.shape}; do not reduce over the batch (loss.per_example can build it)."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"loss_vector_fn must return floating-point losses, got {losses.dtype}.")


def _shape_and_dtype(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"of shape {value.shape} and dtype {value.dtype}"
    return ""
