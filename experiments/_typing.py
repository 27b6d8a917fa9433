"""Named types for annotations in the experiments.

Shapes are given by jaxtyping's annotations; types without a shape are pytrees.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, Num

from msgd_jax import noise

Tree: TypeAlias = Any
"""A pytree of arrays, for which Python has no type."""
Params: TypeAlias = dict[str, Any]
"""The parameters of a net: a nested dict of arrays."""
Statistics: TypeAlias = dict[str, Any]
"""The running statistics of batch norm: a nested dict of arrays; {} for a net without any."""
Batch: TypeAlias = Tree
"""Some examples: a pytree of arrays with a leading axis of examples."""
Data: TypeAlias = Tree
"""All examples, in the same form."""
Images: TypeAlias = Num[Array, "batch height width channels"]
"""Images as data sets store them and as nets take them."""
ImageShape: TypeAlias = tuple[int, int, int]
"""Height and width (pixels) and channels of one image."""
Logits: TypeAlias = Float[Array, "batch num_classes"]
"""The outputs of a net for a batch of images."""
Law: TypeAlias = noise.MNoise
"""A law of weight vectors."""
Record: TypeAlias = dict[str, Any]
"""A JSON object."""
