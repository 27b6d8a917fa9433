"""Operators on parameters of several dtypes; it imports lineax, so it is imported when needed."""

import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float

from msgd_jax import _dtypes


class MixedLinearOperator(lineax.FunctionLinearOperator):
    """A linear function of a pytree whose leaves have different dtypes, with a matrix.

    (The ``as_matrix`` of lineax needs all leaves in one dtype.)
    """

    def as_matrix(self) -> Float[Array, "D D"]:
        """The dense matrix, one block of columns per leaf, in float32 or wider."""
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
