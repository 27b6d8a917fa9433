"""The names of what the experiments pass around.

Shapes are those of the annotations of jaxtyping; what has none here is a pytree.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, Num

from msgd_jax import noise

Tree: TypeAlias = Any
"""A pytree of arrays. Python has no type for it."""
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
"""What a net makes of images."""
Law: TypeAlias = noise.MNoise
"""A law of weight vectors."""
Record: TypeAlias = dict[str, Any]
"""A JSON object."""
