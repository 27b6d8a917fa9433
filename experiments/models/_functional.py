"""Turns a flax module into pure functions, which is what the library trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from experiments._typing import Images, Logits, Params, Statistics


class Model(NamedTuple):
    """A network as pure functions, for `jax.jit`, `jax.grad` and `jax.vmap`.

    Attributes:
        init: maps a PRNG key to parameters: a nested dict of arrays. The same key gives the same
            parameters; `jax.vmap(init)(keys)` stacks those of several keys.
        init_stats: makes the initial running statistics of batch norm: a nested dict of arrays,
            the same for every key; {} for a network without batch norm.
        apply: ``apply(params, stats, images, *, training=False) -> (logits, stats)`` maps images
            [B, H, W, C] to logits [B, num_classes]. In training, batch norm normalises with the
            statistics of these images, by ghost batches, and moves the running ones;
            otherwise it uses the running ones and leaves them. Raises ValueError if parameters or
            statistics do not have the names and shapes of the initial ones.
    """

    init: Callable[[Key[Array, ""]], Params]
    init_stats: Callable[[], Statistics]
    apply: Callable[..., tuple[Logits, Statistics]]


def functional(module_class: Callable[..., nnx.Module], **kwargs: Any) -> Model:
    """Turns a module class into pure functions.

    Args:
        module_class: makes a module from ``rngs=nnx.Rngs(key)`` and `kwargs`. The module's state
            must be `nnx.Param` and `nnx.BatchStat` (no dropout). The module is called with images,
            and with ``training=`` if it has `nnx.BatchStat`, and returns logits.
        **kwargs: passed to `module_class`.

    Returns:
        A `Model`.

    Raises:
        ValueError: if the module has other state.
    """

    def build(key: Any) -> nnx.Module:
        return module_class(rngs=nnx.Rngs(key), **kwargs)

    abstract = nnx.eval_shape(lambda: build(0))
    graphdef, *templates, other = nnx.split(abstract, nnx.Param, nnx.BatchStat, ...)
    if jax.tree.leaves(other):
        names = sorted(nnx.to_pure_dict(other))
        raise ValueError(
            "all state of the module must be nnx.Param or nnx.BatchStat, got other state in "
            f"{names}."
        )
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(template)) for template in templates]

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    @jax.jit  # The parameters are not returned, and so they are not drawn.
    def constants() -> Statistics:
        return nnx.to_pure_dict(nnx.state(build(0), nnx.BatchStat))

    def init_stats() -> Statistics:
        return dict(constants()) if shapes[1] else {}

    def apply(
        params: Params,
        stats: Statistics,
        images: Images,
        *,
        training: bool = False,
    ) -> tuple[Logits, Statistics]:
        states = [
            _filled(name, template, wanted, values)
            for name, template, wanted, values in zip(
                ("params", "stats"), templates, shapes, (params, stats), strict=True
            )
        ]
        module = nnx.merge(graphdef, *states)
        if not shapes[1]:
            return module(images), {}
        logits = module(images, training=training)
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return Model(init, init_stats, apply)


def _filled(name: str, template: Any, wanted: Any, values: Any) -> Any:
    """The state of a module with these values in it."""
    got = jax.tree.map(jnp.shape, values)
    if got != wanted:
        raise ValueError(f"{name} must have the names and shapes {wanted}, got {got}.")
    state = jax.tree.map(lambda leaf: leaf, template)  # A copy, which the next line changes.
    nnx.replace_by_pure_dict(state, values)
    return state


def num_parameters(params: Any) -> int:
    """The number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
