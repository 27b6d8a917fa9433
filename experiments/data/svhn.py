"""SVHN, the cropped digits, and how its MATLAB files are read and checked."""

import dataclasses
import io
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.data._originals import DamagedDatasetError, Split, Splits
from experiments.data._published import Published, read_bytes

_IMAGE_SHAPE = (32, 32, 3)
_LABEL_OF_DIGIT_0 = 10


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MatFiles(Published):
    """A data set with one MATLAB file for each of the splits "train" and "test", in this order.

    A copy prepared with tfds is checked less thoroughly: see `_tfds_copies.in_order_of_ids`.
    """

    def read_files(self, paths: Mapping[str, Path]) -> Splits:
        """Reads and checks both original files; `paths` is keyed by their published names."""
        splits = {}
        for split_name, name in zip(("train", "test"), self.file_names, strict=True):
            # Checked before it is parsed, since the parser is not safe for untrusted files.
            content = read_bytes(paths[name], self.files[name])
            try:
                splits[split_name] = parse(content, self.num_examples[split_name])
            except ValueError as reason:
                raise DamagedDatasetError(f"{paths[name]} is damaged: {reason}") from reason
        return splits


SVHN = MatFiles(
    name="svhn",
    tfds_name="svhn_cropped",
    image_shape=_IMAGE_SHAPE,
    num_examples={"train": 73_257, "test": 26_032},
    # The third file, extra_32x32.mat, is not used here and never fetched.
    file_names=("train_32x32.mat", "test_32x32.mat"),
    # Appendix B.2 of the paper. (It says that it tests on 75,000, which is more than there are.)
    trained_on="test",
    num_train=25_000,
    net="vgg11",
)
"""SVHN, split as in appendix B.2: 25,000 of the original test images are trained on, and all 73,257
original training images, in their order, are tested on. Labels are digits."""


def parse(content: bytes, num_examples: int) -> Split:
    """Parses a MATLAB file (version 5) with images X and labels y, in which 10 is the digit 0.

    Args:
        content: the whole file.
        num_examples: the number of images that it must hold.

    Returns:
        The split; images have shape [N, 32, 32, 3].

    Raises:
        ValueError: if it is not such a file, or X or y has a wrong shape, type or label.
    """
    variables = _variables(content)
    expected_shapes = {"X": (*_IMAGE_SHAPE, num_examples), "y": (num_examples, 1)}
    for name, expected in expected_shapes.items():
        if name not in variables:
            raise ValueError(f"it holds no array {name!r}")
        if variables[name].shape != expected:
            raise ValueError(f"{name} has shape {variables[name].shape}, expected {expected}")
    images, labels = variables["X"], variables["y"][:, 0]
    if images.dtype != np.uint8 or labels.dtype.kind not in "iuf":
        raise ValueError(
            f"X and y hold values of types {images.dtype} and {labels.dtype}, expected uint8 and "
            "numbers"
        )
    wrong_labels = labels[~np.isin(labels, np.arange(1, _LABEL_OF_DIGIT_0 + 1))]
    if len(wrong_labels):
        raise ValueError(f"y holds the label {wrong_labels[0]}, expected 1 to {_LABEL_OF_DIGIT_0}")
    return Split(
        # In MATLAB the last axis counts examples; the copy makes every image contiguous.
        images=np.ascontiguousarray(np.moveaxis(images, -1, 0)),
        labels=(labels % _LABEL_OF_DIGIT_0).astype(np.uint8),
    )


def _variables(content: bytes) -> dict[str, np.ndarray]:
    """Those of the arrays X and y that a MATLAB file holds."""
    import scipy.io
    from scipy.io.matlab import MatReadError

    try:
        variables = scipy.io.loadmat(io.BytesIO(content), variable_names=("X", "y"))
    except (MatReadError, NotImplementedError, OSError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"it is no MATLAB file of version 5: {error}") from error
    arrays = {name: variables.get(name) for name in ("X", "y")}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
