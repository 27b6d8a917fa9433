"""Code that tests of all data sets share: damaged files, a server, copies prepared by tfds."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from experiments import data
from experiments.data._originals import Split
from experiments.data._published import PublishedFile

NUM_TRAIN = 5  # The number of images that are drawn from the 20 of a tiny original test set.
# Nothing listens on port 9 of this machine, so that a request fails at once.
NO_SERVER = "http://127.0.0.1:9/"


def published_as(file: PublishedFile, content: bytes) -> PublishedFile:
    """The same file, as if it had been published with these contents."""
    sha256 = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(file, size=len(content), sha256=sha256)


def flip_middle_byte(content: bytes) -> bytes:
    """The same contents, with all bits of one byte flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


# Kinds of damage to a file whose size and checksum are known, and the message for each.
DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda content: content[: len(content) // 2], "bytes, but .* as published has"),
    (lambda content: content[:-1], "bytes, but .* as published has"),
    (lambda content: content + b"more", "bytes, but .* as published has"),
    (lambda content: b"", "it has 0 bytes, but"),
    (lambda content: b"<html>404 Not Found</html>", "it has 26 bytes, but"),
    (flip_middle_byte, "it has sha256 .*, but .* as published has sha256"),
]


def check_same_examples(one: data.Dataset, other: data.Dataset) -> None:
    """Checks that both data sets have exactly the same training and test examples."""
    np.testing.assert_array_equal(one.train_indices, other.train_indices)
    for ours, theirs in zip(
        jax.tree.leaves((one.train, one.test)),
        jax.tree.leaves((other.train, other.test)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@contextlib.contextmanager
def serve(folder: Path, asked_for: list[str] | None = None) -> Iterator[str]:
    """Serves a folder, yields its address, and appends each request to `asked_for`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if asked_for is not None:
                asked_for.append(self.path)
            super().do_GET()

        def log_message(self, format, *args):
            del format, args

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _png(image: np.ndarray) -> io.BytesIO:
    """An image as a file in the PNG format, in which tensorflow-datasets keeps images."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    file.seek(0)
    return file


def prepare(
    folder: Path,
    tfds_name: str,
    version: str,
    splits: Mapping[str, Split],
    *,
    shuffled: bool = True,
    row_id: Callable[[str, int], str] | None = None,
    num_classes: int = 10,
) -> Path:
    """Lets tensorflow-datasets itself prepare a tiny data set in a folder.

    Args:
        folder: where it is prepared.
        tfds_name: the name that the builder in tensorflow-datasets has.
        version: the version that the builder has.
        splits: the images and labels of each split.
        shuffled: whether the builder shuffles the examples.
        row_id: maps a split's name and an example's number to the feature "id"; None for data sets
            that do not have this feature.
        num_classes: the number of classes that the builder states.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            """A builder whose original files are the arrays."""

            name = tfds_name
            VERSION = tfds.core.Version(version)
            pkg_dir_path = epath.Path(folder)

            def _info(self):
                shape = splits["train"].images.shape[1:]
                features: dict[str, Any] = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(num_classes=num_classes),
                }
                if row_id is not None:
                    features["id"] = tfds.features.Text()
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=not shuffled,
                )

            def _split_generators(self, dl_manager):
                del dl_manager
                return {name: self._generate_examples(name) for name in splits}

            def _generate_examples(self, name):
                for key, (image, label) in enumerate(zip(*splits[name], strict=True)):
                    row = {"image": _png(image), "label": int(label)}
                    yield key, row if row_id is None else row | {"id": row_id(name, key)}

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def copy_with_other_information(prepared: Path, folder: Path, **changes: object) -> Path:
    """Copies a prepared data set, and changes what it says about itself."""
    shutil.copytree(prepared, folder)
    (path,) = folder.rglob("dataset_info.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def check_is_tiny(dataset: data.Dataset, tiny: Any) -> None:
    """Checks that it tests on the original training set and trains on five of the test images."""
    np.testing.assert_array_equal(dataset.test.image, tiny.splits["train"].images)
    np.testing.assert_array_equal(dataset.test.label, tiny.splits["train"].labels)
    drawn = dataset.train_indices
    assert len(set(drawn.tolist())) == NUM_TRAIN
    np.testing.assert_array_equal(dataset.train.image, tiny.splits["test"].images[drawn])
    np.testing.assert_array_equal(dataset.train.label, tiny.splits["test"].labels[drawn])
