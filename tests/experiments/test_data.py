"""Tests of experiments.data, with the real digits and with tiny archives in the original format."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets
from etils import epath
from PIL import Image

from experiments import data, fashion_mnist, idx

MODIFIED = 1504176606
# The first examples that seed 0 draws. Written down once; they may never change, or old runs could
# no longer be repeated.
PINNED_DIGITS = [1153, 1439, 652, 293]
PINNED_FASHION = [3600, 1153, 8005, 4790]
NUM_TRAIN = 5  # drawn from the 20 images of the tiny original test set


def idx_file(array: np.ndarray, type_code: int = 8) -> bytes:
    header = bytes([0, 0, type_code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def gzip_payload(content: bytes) -> bytes:
    """What follows the header in a gzip file: the compressed data, the CRC and the length."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    compressed = compressor.compress(content) + compressor.flush()
    return compressed + struct.pack("<II", zlib.crc32(content), len(content))


def published_gzip(name: str, content: bytes) -> bytes:
    """A gzip file as FashionMNIST publishes them: its header has the file's name and time."""
    stored_name = name.removesuffix(".gz").encode() + b"\x00"
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", MODIFIED) + b"\x00\x03" + stored_name
    return header + gzip_payload(content)


def repacked_gzip(content: bytes) -> bytes:
    """The same file as Debian packs it: no name, another time."""
    return b"\x1f\x8b\x08\x00" + struct.pack("<I", 1591347949) + b"\x00\x03" + gzip_payload(content)


@dataclasses.dataclass(frozen=True)
class TinyFashion:
    """A FashionMNIST of 12 training and 20 test images: the arrays and the original files."""

    splits: dict[str, fashion_mnist.Split]
    published: dict[str, fashion_mnist.PublishedSplit]

    def contents(self) -> dict[str, bytes]:
        """The unpacked original files by their names."""
        contents = {}
        for name, split in self.published.items():
            contents[split.images.name] = idx_file(self.splits[name].images)
            contents[split.labels.name] = idx_file(self.splits[name].labels)
        return contents

    def write(self, folder: Path, repacked: bool = False) -> Path:
        folder.mkdir(parents=True)
        for name, content in self.contents().items():
            packed = repacked_gzip(content) if repacked else published_gzip(name, content)
            (folder / name).write_bytes(packed)
        return folder

    def load(self, folder: Path, **kwargs) -> data.Dataset:
        """Loads it with nothing but `folder` to look in and no network, unless told otherwise."""
        kwargs = {"seed": 0, "download": False, "debian_folder": folder / "absent", **kwargs}
        return data.load_fashion_mnist(
            data_dir=folder, num_train=NUM_TRAIN, **{"published": self.published, **kwargs}
        )


def make_tiny_fashion(base_url: str, seed: int = 0) -> TinyFashion:
    random = np.random.default_rng(seed)
    splits, published = {}, {}

    def publish(name: str, array: np.ndarray) -> idx.IdxFile:
        packed = published_gzip(name, idx_file(array))
        sha256 = hashlib.sha256(packed).hexdigest()
        return idx.IdxFile(name, base_url + name, len(packed), sha256, MODIFIED, array.shape)

    for name, prefix, num_examples in (("train", "train", 12), ("test", "t10k", 20)):
        images = random.integers(0, 256, (num_examples, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, num_examples, dtype=np.uint8)
        splits[name] = fashion_mnist.Split(images, labels)
        published[name] = fashion_mnist.PublishedSplit(
            images=publish(f"{prefix}-images-idx3-ubyte.gz", images),
            labels=publish(f"{prefix}-labels-idx1-ubyte.gz", labels),
            sha256=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        )
    return TinyFashion(splits, published)


@pytest.fixture(scope="module")
def tiny() -> TinyFashion:
    # Port 9 of this machine: nothing listens there, so that asking it fails at once.
    return make_tiny_fashion("http://127.0.0.1:9/")


def check_is_tiny(dataset: data.Dataset, tiny: TinyFashion) -> None:
    """Checks that it tests on the original training split and trains on some of the test split."""
    np.testing.assert_array_equal(dataset.test.image[..., 0], tiny.splits["train"].images)
    np.testing.assert_array_equal(dataset.test.label, tiny.splits["train"].labels)
    drawn = dataset.train_indices
    assert len(set(drawn.tolist())) == NUM_TRAIN
    np.testing.assert_array_equal(dataset.train.image[..., 0], tiny.splits["test"].images[drawn])
    np.testing.assert_array_equal(dataset.train.label, tiny.splits["test"].labels[drawn])


# What every data set has in common.


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"digits, fashion_mnist, got 'mnist'"):
        data.load("mnist")


@pytest.mark.parametrize("name", sorted(data.DATASETS))
def test_negative_seed_is_refused(name):
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        data.load(name, seed=-1)


def test_import_does_not_import_the_heavy_packages():
    code = (
        "import sys, experiments.data; "
        "print([m for m in ('tensorflow_datasets', 'sklearn', 'jax', 'requests', 'PIL') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(data.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_examples_are_a_pytree_with_a_leading_example_axis():
    train = data.load("digits").train
    assert [leaf.shape for leaf in jax.tree.leaves(train)] == [(1000, 8, 8, 1), (1000,)]
    first_two = jax.tree.map(lambda leaf: leaf[:2], train)
    assert isinstance(first_two, data.Examples)
    assert first_two.image.shape == (2, 8, 8, 1)


def test_seed_draws_the_same_examples_for_ever():
    assert data.load("digits", seed=0).train_indices[:4].tolist() == PINNED_DIGITS


def test_global_random_state_is_left_alone():
    _, key_before, position_before, *_ = np.random.get_state()  # noqa: NPY002
    data.load("digits")
    _, key_after, position_after, *_ = np.random.get_state()  # noqa: NPY002
    assert position_after == position_before
    np.testing.assert_array_equal(key_after, key_before)


# The real digits.


def test_digits_shapes_types_and_range():
    digits = data.load("digits")
    assert (digits.name, digits.num_classes, digits.max_value) == ("digits", 10, 16)
    assert digits.train.image.shape == (1000, 8, 8, 1)
    assert digits.test.image.shape == (797, 8, 8, 1)
    assert digits.train_indices.dtype == np.int64
    for examples in (digits.train, digits.test):
        assert examples.image.dtype == np.uint8
        assert examples.label.dtype == np.int32
        assert (examples.image.min(), examples.image.max()) == (0, 16)
    assert "scikit-learn" in digits.source


def test_digits_train_and_test_are_disjoint_and_together_everything():
    digits = data.load("digits", seed=3)
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    originals = np.column_stack([pixels, labels])

    def rows(examples: data.Examples) -> np.ndarray:
        return np.column_stack([examples.image.reshape(-1, 64), examples.label])

    np.testing.assert_array_equal(rows(digits.train), originals[digits.train_indices])
    rest = np.setdiff1d(np.arange(1797), digits.train_indices)
    assert len(rest) == 797
    # Sorted, since the order within the test set means nothing.
    assert sorted(map(tuple, rows(digits.test))) == sorted(map(tuple, originals[rest]))


def test_digits_class_counts_are_those_of_scikit_learn():
    digits = data.load("digits")
    counts = np.bincount(digits.train.label, minlength=10)
    counts += np.bincount(digits.test.label, minlength=10)
    _, labels = sklearn.datasets.load_digits(return_X_y=True)
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=10))


def test_digits_split_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (data.load("digits", seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.train_indices, again.train_indices)
    np.testing.assert_array_equal(first.train.image, again.train.image)
    np.testing.assert_array_equal(first.test.image, again.test.image)
    # Two independent draws share 1000 * 1000 / 1797 = 556 of their examples, give or take 10.
    shared = np.intersect1d(first.train_indices, other.train_indices)
    assert 500 < len(shared) < 610


# FashionMNIST's original files, through the real parser.


@pytest.mark.parametrize("subfolder", [".", "fashion_mnist"])
@pytest.mark.parametrize("repacked", [False, True])
def test_files_in_data_dir_are_read(tiny, tmp_path, subfolder, repacked):
    folder = tiny.write(tmp_path / "files" / subfolder, repacked)
    dataset = tiny.load(tmp_path / "files")
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"the original files in {folder}"
    assert dataset.train.image.shape == (NUM_TRAIN, 28, 28, 1)
    assert dataset.train.image.dtype == dataset.test.image.dtype == np.uint8
    assert dataset.train.label.dtype == dataset.test.label.dtype == np.int32
    assert (dataset.num_classes, dataset.max_value) == (10, 255)


def test_repacked_files_of_debian_are_read(tiny, tmp_path):
    folder = tiny.write(tmp_path / "debian", repacked=True)
    dataset = tiny.load(tmp_path / "empty", debian_folder=folder)
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"the original files in {folder}"


def test_data_dir_is_looked_in_before_the_folder_of_debian(tiny, tmp_path):
    debian = tiny.write(tmp_path / "debian", repacked=True)
    own = tiny.write(tmp_path / "own")
    assert str(own) in tiny.load(own, debian_folder=debian).source


def test_published_checksum_is_enough_whatever_the_header(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    other_header = dataclasses.replace(tiny.published["train"].labels, modified=1)
    labels = idx.read(folder / other_header.name, other_header)
    np.testing.assert_array_equal(labels, tiny.splits["train"].labels)


def test_every_optional_field_of_a_gzip_header_is_set_aside(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    name = "train-labels-idx1-ubyte.gz"
    header = b"\x1f\x8b\x08\x1e" + b"\x00" * 4 + b"\x02\x03"
    header += b"\x03\x00abc" + b"a name\x00" + b"a comment\x00"
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    (folder / name).write_bytes(header + gzip_payload(tiny.contents()[name]))
    check_is_tiny(tiny.load(folder), tiny)


def test_seed_decides_which_test_images_are_trained_on(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    first, again, other = (tiny.load(folder, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.train_indices, again.train_indices)
    np.testing.assert_array_equal(first.train.image, again.train.image)
    assert first.train_indices.tolist() != other.train_indices.tolist()
    check_is_tiny(other, tiny)


@pytest.mark.parametrize("num_train", [0, 21])
def test_number_of_training_images_out_of_range_is_refused(tiny, tmp_path, num_train):
    folder = tiny.write(tmp_path / "files")
    with pytest.raises(ValueError, match=f"num_train must be between 1 and 20, got {num_train}"):
        data.load_fashion_mnist(0, folder, published=tiny.published, num_train=num_train)


def damage_payload(packed: bytes) -> bytes:
    middle = len(packed) // 2
    return packed[:middle] + bytes([packed[middle] ^ 0xFF]) + packed[middle + 1 :]


def damage_crc(packed: bytes) -> bytes:
    return packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda packed: packed[: len(packed) // 2], "end before the compressed data do"),
        (lambda packed: packed[:-1], "end before the compressed data do"),
        (lambda packed: packed[:6], "end before the compressed data do"),
        (lambda packed: b"", "0 bytes end before"),
        (lambda packed: b"<html>404 Not Found</html>", "incorrect header check"),
        (lambda packed: zlib.compress(packed), "incorrect header check"),
        (damage_payload, "is damaged"),  # zlib says one of several things
        (damage_crc, "incorrect data check"),
        (lambda packed: packed + b"more", "sha256"),
    ],
)
def test_damaged_gzip_file_is_named(tiny, tmp_path, name, damage, complaint):
    path = tiny.write(tmp_path / "files") / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DamagedDatasetError, match=complaint) as error:
        tiny.load(tmp_path / "files")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"starts with 0x, .* 0x00000801"),
        (b"\x00\x00\x08\x01\x00", "fewer than its header alone needs"),
        (idx_file(np.zeros(12, np.int8), type_code=9), r"0x00000901, .* 0x00000801"),
        (idx_file(np.zeros((12, 1), np.uint8)), r"0x00000802, .* 0x00000801"),
        (idx_file(np.zeros(11, np.uint8)), r"shape \(11,\), expected \(12,\)"),
        (idx_file(np.zeros(10**6, np.uint8)), r"shape \(1000000,\), expected \(12,\)"),
        (idx_file(np.zeros(12, np.uint8)) + b"more", "longer or shorter"),
        (idx_file(np.zeros(12, np.uint8))[:-1], "longer or shorter"),
        # The right shape but other labels, as MNIST's own files would have: only a checksum tells.
        (idx_file(np.zeros(12, np.uint8)), "sha256 .* as published has"),
    ],
)
def test_file_with_wrong_contents_is_named(tiny, tmp_path, content, complaint):
    name = "train-labels-idx1-ubyte.gz"
    path = tiny.write(tmp_path / "files") / name
    path.write_bytes(published_gzip(name, content))
    with pytest.raises(data.DamagedDatasetError, match=complaint) as error:
        tiny.load(tmp_path / "files")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    ],
)
def test_swapped_files_are_named(tiny, tmp_path, one, other):
    folder = tiny.write(tmp_path / "files")
    swapped = (folder / other).read_bytes(), (folder / one).read_bytes()
    (folder / one).write_bytes(swapped[0])
    (folder / other).write_bytes(swapped[1])
    with pytest.raises(data.DamagedDatasetError, match=one):
        tiny.load(folder)


def test_damaged_file_is_not_passed_over_for_a_good_copy_elsewhere(tiny, tmp_path):
    good = tiny.write(tmp_path / "debian")
    bad = tiny.write(tmp_path / "own")
    (bad / "t10k-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(data.DamagedDatasetError, match=str(bad)):
        tiny.load(bad, debian_folder=good)


# FashionMNIST is not there.


def test_missing_data_set_is_named_with_folders_files_sizes_and_package(tmp_path):
    with pytest.raises(data.DatasetNotFoundError) as error:
        data.load_fashion_mnist(
            seed=0, data_dir=tmp_path, download=False, debian_folder=tmp_path / "no-debian"
        )
    text = str(error.value)
    for wanted in (
        "fashion_mnist was not found",
        f"{tmp_path}: none of the files",
        f"{tmp_path / 'fashion_mnist'}: no such folder",
        f"{tmp_path / 'fashion_mnist' / '3.0.1'}: not prepared",
        f"{tmp_path / 'no-debian'}: no such folder",
        f"{tmp_path / 'downloads'}: no earlier download",
        "downloading is switched off",
        "train-images-idx3-ubyte.gz (26,421,880 bytes)",
        "train-labels-idx1-ubyte.gz (29,515 bytes)",
        "t10k-images-idx3-ubyte.gz (4,422,102 bytes)",
        "t10k-labels-idx1-ubyte.gz (5,148 bytes)",
        "apt-get install dataset-fashion-mnist",
        "--data-dir",
    ):
        assert wanted in text
    assert text.count("the network:") == 1  # it was not asked
    assert isinstance(error.value, FileNotFoundError)
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_files_that_are_missing_among_others_are_named(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        data.DatasetNotFoundError, match=f"{folder}: t10k-labels-idx1-ubyte.gz missing"
    ):
        tiny.load(folder)


def test_without_a_network_loading_fails_at_once(tiny, tmp_path, no_proxy):
    started = time.monotonic()
    with pytest.raises(data.DatasetNotFoundError, match=r"the network: .*127\.0\.0\.1.*refused"):
        tiny.load(tmp_path, download=True)
    assert time.monotonic() - started < 10  # tensorflow-datasets alone goes on for minutes


# Downloading, from a server on this machine, through tfds's own download manager.


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextlib.contextmanager
def serve(folder: Path, asked_for: list[str] | None = None) -> Iterator[str]:
    """Serves a folder, yields its address, and lists the files that were asked for."""

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


def test_download_is_read_and_found_again_without_a_network(tmp_path, no_proxy):
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as url:
        tiny = make_tiny_fashion(url)
        for name, content in tiny.contents().items():
            (tmp_path / "served" / name).write_bytes(published_gzip(name, content))
        dataset = tiny.load(tmp_path / "own", download=True)
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"downloaded now, to {tmp_path / 'own' / 'downloads'}"
    for download in (False, True):  # the server is gone by now
        again = tiny.load(tmp_path / "own", download=download)
        check_is_tiny(again, tiny)
        assert again.source == f"downloaded before, to {tmp_path / 'own' / 'downloads'}"
    # tfds itself does not check what it finds in its folder of downloads.
    (stored,) = (tmp_path / "own" / "downloads").rglob("*t10k-images*.gz")
    stored.write_bytes(stored.read_bytes()[:-9])
    with pytest.raises(data.DamagedDatasetError, match="t10k-images"):
        tiny.load(tmp_path / "own")


def test_download_with_the_wrong_checksum_is_refused(tmp_path, no_proxy):
    (tmp_path / "served").mkdir()
    asked_for = []
    with serve(tmp_path / "served", asked_for) as url:
        tiny = make_tiny_fashion(url)
        for name, content in make_tiny_fashion(url, seed=1).contents().items():
            (tmp_path / "served" / name).write_bytes(published_gzip(name, content))
        with pytest.raises(data.DamagedDatasetError, match=f"{url}.*has wrong checksum"):
            tiny.load(tmp_path / "own", download=True)
    # No other download is left under way: it could go on for minutes, and Python waits for it.
    assert asked_for == ["/train-images-idx3-ubyte.gz"]


def test_server_without_the_files_counts_as_not_found(tmp_path, no_proxy):
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as url:
        tiny = make_tiny_fashion(url)
        with pytest.raises(data.DatasetNotFoundError, match="the network: 404"):
            tiny.load(tmp_path / "own", download=True)


# A copy that was prepared with tensorflow-datasets.


def prepare(tiny: TinyFashion, folder: Path, shuffled: bool) -> Path:
    """Lets tensorflow-datasets itself prepare the tiny data set in a folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    def png(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        return file

    with registered.skip_registration():

        class FashionMNIST(tfds.core.GeneratorBasedBuilder):
            """The same features, version and keys as the builder in tensorflow-datasets."""

            VERSION = tfds.core.Version("3.0.1")
            pkg_dir_path = epath.Path(folder)

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1)),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                )
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=not shuffled
                )

            def _split_generators(self, dl_manager):
                del dl_manager
                return {name: self._generate_examples(name) for name in tiny.splits}

            def _generate_examples(self, name):
                for key, (image, label) in enumerate(zip(*tiny.splits[name], strict=True)):
                    yield key, {"image": png(image), "label": int(label)}

    FashionMNIST(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory) -> Path:
    return prepare(tiny, tmp_path_factory.mktemp("prepared"), shuffled=True)


def copy_with_other_information(prepared: Path, folder: Path, **changes) -> Path:
    """A copy of the prepared data set with changes to what it says about itself."""
    shutil.copytree(prepared, folder)
    (path,) = folder.rglob("dataset_info.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("shuffled", [True, False])
def test_prepared_copy_gives_the_same_as_the_original_files(tiny, tmp_path, shuffled):
    dataset = tiny.load(prepare(tiny, tmp_path / "prepared", shuffled))
    check_is_tiny(dataset, tiny)
    assert dataset.source.startswith("prepared with tensorflow-datasets in ")
    from_files = tiny.load(tiny.write(tmp_path / "files"))
    np.testing.assert_array_equal(dataset.train_indices, from_files.train_indices)
    for ours, theirs in zip(
        jax.tree.leaves((dataset.train, dataset.test)),
        jax.tree.leaves((from_files.train, from_files.test)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_prepared_copy_that_lost_rows_is_refused(tiny, prepared, tmp_path):
    (path,) = prepared.rglob("dataset_info.json")
    splits = json.loads(path.read_text())["splits"]
    for split in splits:
        if split["name"] == "test":
            split["shardLengths"] = ["19"]
    folder = copy_with_other_information(prepared, tmp_path / "copy", splits=splits)
    with pytest.raises(data.DamagedDatasetError, match=r"'test' gives 19 rows .* 20 were") as error:
        tiny.load(folder)
    assert str(folder) in str(error.value)


def test_prepared_copy_with_fewer_rows_than_it_says_is_refused(tiny, prepared, tmp_path):
    (path,) = prepared.rglob("dataset_info.json")
    splits = json.loads(path.read_text())["splits"]
    for split in splits:
        split["shardLengths"] = [str(int(split["shardLengths"][0]) + 1)]
    folder = copy_with_other_information(prepared, tmp_path / "copy", splits=splits)
    with pytest.raises(data.DamagedDatasetError, match="12 were published"):
        tiny.load(folder)


@pytest.mark.parametrize("damage", [lambda packed: packed[: len(packed) // 2], damage_payload])
def test_prepared_copy_with_a_damaged_file_is_refused(tiny, prepared, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    (path,) = folder.rglob("*-train.array_record-*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DamagedDatasetError, match="split 'train'") as error:
        tiny.load(folder)
    assert str(folder) in str(error.value)


def test_prepared_copy_of_other_images_is_refused(prepared):
    other = make_tiny_fashion("http://127.0.0.1:9/", seed=1)
    with pytest.raises(data.DamagedDatasetError, match="other images or labels"):
        other.load(prepared)


def test_prepared_copy_in_an_order_that_it_does_not_tell_is_refused(tiny, prepared, tmp_path):
    # It says that it was not shuffled, but it was.
    folder = copy_with_other_information(prepared, tmp_path / "copy", disableShuffling=True)
    with pytest.raises(data.DamagedDatasetError, match="in an order"):
        tiny.load(folder)


def test_prepared_copy_that_needs_tensorflow_is_passed_over(tiny, prepared, tmp_path):
    folder = copy_with_other_information(prepared, tmp_path / "copy", fileFormat="tfrecord")
    with pytest.raises(data.DatasetNotFoundError, match="prepared as tfrecord, which cannot"):
        tiny.load(folder)
    debian = tiny.write(tmp_path / "debian", repacked=True)
    check_is_tiny(tiny.load(folder, debian_folder=debian), tiny)


# The real FashionMNIST, where it is on this machine.


@pytest.fixture(scope="module")
def real_fashion() -> data.Dataset:
    try:
        return data.load("fashion_mnist", seed=0, download=False)
    except data.DatasetNotFoundError:
        pytest.skip(
            f"the real FashionMNIST is not on this machine ({fashion_mnist.DEBIAN_PACKAGE}, or a "
            "copy in tensorflow-datasets' default folder)"
        )


def test_real_fashion_mnist_has_the_sizes_of_the_paper(real_fashion):
    assert real_fashion.train.image.shape == (1000, 28, 28, 1)
    assert real_fashion.test.image.shape == (60000, 28, 28, 1)
    assert real_fashion.train.label.shape == (1000,)
    np.testing.assert_array_equal(np.bincount(real_fashion.test.label), np.full(10, 6000))


def test_real_fashion_mnist_has_the_right_pixels(real_fashion):
    # 72.9404 / 255 = 0.2860 is the mean by which this data set is usually centred.
    assert real_fashion.test.image.mean() == pytest.approx(72.9404, abs=5e-5)
    assert (real_fashion.test.image.min(), real_fashion.test.image.max()) == (0, 255)
    # An image's mean has a standard deviation of 32, so the mean over 1,000 images has one of 1.
    assert real_fashion.train.image.mean() == pytest.approx(73.1466, abs=4)


def test_real_fashion_mnist_is_drawn_without_replacement(real_fashion):
    indices = real_fashion.train_indices
    assert indices.dtype == np.int64
    assert len(np.unique(indices)) == 1000
    assert indices.min() >= 0
    assert indices.max() < 10000
    assert indices[:4].tolist() == PINNED_FASHION
    # Every class has 1,000 of the 10,000 images; 100 +- 9 of each are expected among the drawn.
    counts = np.bincount(real_fashion.train.label, minlength=10)
    assert counts.sum() == 1000
    assert np.all(np.abs(counts - 100) < 45)
