"""Types with names, for annotations."""

from typing import Any

import numpy as np
from jaxtyping import Array, Integer

Step = int | np.integer[Any] | Integer[Array, ""] | Integer[np.ndarray, ""]
"""A step: an integer of any type from 0 to 2^31 - 1, or a traced one."""
