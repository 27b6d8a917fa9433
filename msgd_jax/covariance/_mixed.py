"""Operators on parameters of several types; imports lineax, so it is imported where one is made."""

import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float

from msgd_jax import _dtypes


class MixedLinearOperator(lineax.FunctionLinearOperator):
    """A linear function of a pytree whose leaves have different types, with a matrix.

    lineax takes the columns of one basis, in one type.
    """

    def as_matrix(self) -> Float[Array, "D D"]:
        """The dense matrix, a block of columns for each leaf, in float32 or wider."""
        leaves, structure = jax.tree.flatten(self.in_structure())
        dtype = _dtypes.accumulator(*(leaf.dtype for leaf in leaves))

        def column(number: int, basis: Float[Array, " size"]) -> Float[Array, " D"]:
            vector = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
            vector[number] = basis.reshape(vector[number].shape)
            product = self.mv(jax.tree.unflatten(structure, vector))
            return jnp.concatenate([x.ravel().astype(dtype) for x in jax.tree.leaves(product)])

        blocks = [
            jax.vmap(lambda basis, i=i: column(i, basis))(jnp.eye(leaf.size, dtype=leaf.dtype))
            for i, leaf in enumerate(leaves)
        ]
        return jnp.concatenate(blocks).T
