"""Checks of loss vectors, for the functions that take one."""

from typing import Any

import jax
import jax.numpy as jnp

from msgd_jax import _validate
from msgd_jax._typing import Params
from msgd_jax.loss._vector import LossVector


def checked_kind(losses: Any, name: str = "losses") -> LossVector:
    """Returns `losses` if it is a `LossVector`; else raises TypeError."""
    if not isinstance(losses, LossVector):
        raise TypeError(
            f"{name} must be a loss.LossVector, such as loss.LossVector(loss_vector_fn, data), got "
            f"{_validate.shown(losses)}."
        )
    return losses


def checked(losses: Any, params: Params, *, wide: bool = False) -> LossVector:
    """Returns `losses` if it is a `LossVector` and `params` can be its parameters.

    Raises:
        TypeError: if `losses` is not a `LossVector`, or a parameter is not floating point or, with
            `wide`, narrower than float32.
        ValueError: if `params` has no leaves.
    """
    checked_kind(losses)
    _validate.floating_params(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if wide and jnp.finfo(jnp.result_type(leaf)).bits < 32:
            raise TypeError(
                f"{_validate.place('params', path)} must be float32 or float64, got "
                f"{jnp.result_type(leaf)}: small moves would be rounded away."
            )
    return losses
