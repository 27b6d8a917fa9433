"""The user's own data sets: one NumPy archive, FILE.npz, in the format of Keras' data sets.

It holds four arrays: `x_train` and `x_test`, the images, [N, H, W] or [N, H, W, C] with one or
three channels, uint8 or other integers from 0 to 255; `y_train` and `y_test`, the classes, integers
from 0, [N] or [N, 1].
"""

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.data._originals import Original, Split, Splits

SUFFIX = ".npz"
_IMAGES = "images of shape [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
_PIXELS = "pixels that are integers from 0 to 255"
_CLASSES = "labels that are integers from 0"
_NAMES = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NpzFile(Original):
    """A file that has been read and checked; all images of one part are trained on.

    Attributes:
        path: the file.
        splits: the splits that it holds.
    """

    path: Path
    splits: Splits

    def read(self, data_dir: Path | None, download: bool) -> tuple[Splits, str]:
        """Returns the splits of the file; no other place is searched."""
        del data_dir, download
        return self.splits, f"the file {self.path} (sha256 {self.sha256})"


def open_npz(path: str | Path) -> NpzFile:
    """Reads and checks a file.

    Args:
        path: the file, whose name ends in ".npz".

    Returns:
        The data set; its `sha256` is that of the arrays and does not depend on the name and the
        compression of the file.

    Raises:
        ValueError: if there is no such file, if it cannot be read without running code in it
            (pickles), if an array is missing or has a wrong rank, shape, type or range, or if the
            numbers of images and labels differ. The text names the file, the array and the problem.
    """
    path = Path(path).expanduser()
    arrays = _arrays(path)
    splits = {}
    for name in ("train", "test"):
        images = _images(path, f"x_{name}", arrays[f"x_{name}"])
        labels = _labels(path, f"y_{name}", arrays[f"y_{name}"])
        if len(images) != len(labels):
            raise _wrong(
                path,
                f"x_{name} with {len(images):,} images and y_{name} with {len(labels):,} labels",
                "as many images as labels",
            )
        splits[name] = Split(images, labels)
    train, test = splits["train"], splits["test"]
    if train.images.shape[1:] != test.images.shape[1:]:
        raise _wrong(
            path,
            f"x_train with images of shape {train.images.shape[1:]} and x_test with "
            f"{test.images.shape[1:]}",
            "images of one shape",
        )
    height, width, channels = train.images.shape[1:]
    return NpzFile(
        name=path.stem,
        image_shape=(height, width, channels),
        num_examples={name: len(split.labels) for name, split in splits.items()},
        net=None,
        num_classes=_num_classes(path, splits),
        sha256=_digest(splits),
        path=path,
        splits=splits,
    )


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The four arrays, unchecked; other arrays in the file are not read."""
    if not path.is_file():
        what = "which is no file" if path.exists() else "which does not exist"
        raise ValueError(f"dataset must be a name or a file, got {_brief(path)}, {what}.")
    try:
        file = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array and no names")
        with file:
            missing = [name for name in _NAMES if name not in file.files]
            if missing:
                raise _wrong(
                    path, f"no {' and no '.join(missing)}", f"the arrays {', '.join(_NAMES)}"
                )
            return {name: file[name] for name in _NAMES}
    except _WrongArrayError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as reason:
        text = " ".join(str(reason).split())[:150]
        raise ValueError(
            f"dataset must be a NumPy archive without pickles, got {_brief(path)}: {text}"
        ) from None


def _images(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Images as uint8 of shape [N, H, W, C]."""
    if array.ndim == 3:
        array = array[..., np.newaxis]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise _wrong(
            path, f"{name} of shape {array.shape}", "[N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        )
    if array.dtype.kind not in "iu":
        raise _wrong(path, f"{name} of type {array.dtype}", _PIXELS)
    smallest, largest = array.min(), array.max()
    if smallest < 0 or largest > 255:
        raise _wrong(
            path, f"{name} with values from {smallest} to {largest}", "integers from 0 to 255"
        )
    return np.ascontiguousarray(array.astype(np.uint8))


def _labels(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Labels as int32 of shape [N]."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) == 0:
        raise _wrong(path, f"{name} of shape {array.shape}", "labels of shape [N] or [N, 1]")
    if array.dtype.kind not in "iu":
        raise _wrong(path, f"{name} of type {array.dtype}", _CLASSES)
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise _wrong(
            path, f"{name} with labels from {array.min()} to {array.max()}", "integers from 0"
        )
    return array.astype(np.int32)


def _num_classes(path: Path, splits: Splits) -> int:
    labels = np.concatenate([split.labels for split in splits.values()])
    smallest, largest = int(labels.min()), int(labels.max())
    # A label far above all others is a mistake, and would give the net that many outputs.
    if smallest > 0 or not 1 <= largest < len(labels):
        raise _wrong(
            path,
            f"labels from {smallest} to {largest}",
            "labels that are integers from 0, of two classes or more",
        )
    return largest + 1


def _digest(splits: Splits) -> str:
    """The sha256 of shapes and values."""
    digest = hashlib.sha256()
    for name in ("train", "test"):
        for array in splits[name]:
            digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


class _WrongArrayError(ValueError):
    """An array of the file is not what it has to be."""


def _wrong(path: Path, got: str, wanted: str) -> _WrongArrayError:
    return _WrongArrayError(f"dataset must hold {wanted}, got {_brief(path)} with {got}.")


def _brief(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:40]} ... {text[-75:]}"
