"""The sources of FashionMNIST: damaged, missing, downloaded and prepared copies."""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.data import fashion_mnist
from tests.experiments.data import source_files
from tests.experiments.data.fashion_files import (
    TinyFashion,
    idx_file,
    make_tiny_fashion,
    published_gzip,
)
from tests.experiments.data.source_files import (
    NO_SERVER,
    check_is_tiny,
    check_same_examples,
    copy_with_other_information,
    flip_middle_byte,
    serve,
)


def damage_crc(packed: bytes) -> bytes:
    """A gzip file with a wrong bit in the checksum of its contents."""
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
        (flip_middle_byte, "is damaged"),  # zlib has several messages for this.
        (damage_crc, "incorrect data check"),
        (lambda packed: packed + b"more", "4 bytes follow the compressed data"),
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
        # Other labels of the right shape, such as those of MNIST: only a checksum finds them.
        (idx_file(np.zeros(12, np.uint8)), "other images or labels .* sha256"),
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


# Missing files ------------------------------------------------------------------------------------


def test_missing_data_set_is_named_with_folders_files_sizes_and_package(tmp_path):
    with pytest.raises(data.DatasetNotFoundError) as error:
        dataclasses.replace(
            fashion_mnist.FASHION_MNIST, other_folders=(tmp_path / "no-debian",)
        ).load(data_dir=tmp_path, download=False)
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
    assert text.count("the network:") == 1  # No server was asked.
    assert isinstance(error.value, FileNotFoundError)
    assert list(tmp_path.iterdir()) == []  # The search has made no folder.


def test_files_that_are_missing_among_others_are_named(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        data.DatasetNotFoundError, match=f"{folder}: t10k-labels-idx1-ubyte.gz missing"
    ):
        tiny.load(folder)


def test_without_a_network_loading_fails_at_once(tiny, tmp_path, no_proxy):
    with pytest.raises(data.DatasetNotFoundError, match=r"the network: .*127\.0\.0\.1.*refused"):
        tiny.load(tmp_path, download=True)


# Downloads from a server on this machine, by the download manager of tfds -------------------------


def test_download_is_read_and_found_again_without_a_network(tmp_path, no_proxy):
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as url:
        tiny = make_tiny_fashion(url)
        for name, content in tiny.contents().items():
            (tmp_path / "served" / name).write_bytes(published_gzip(name, content))
        dataset = tiny.load(tmp_path / "own", download=True)
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"downloaded now, to {tmp_path / 'own' / 'downloads'}"
    for download in (False, True):  # The server has stopped.
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
    # No other download has begun. It could take minutes, for which Python would wait.
    assert asked_for == ["/train-images-idx3-ubyte.gz"]


def test_server_without_the_files_counts_as_not_found(tmp_path, no_proxy):
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as url:
        tiny = make_tiny_fashion(url)
        with pytest.raises(data.DatasetNotFoundError, match="the network: 404"):
            tiny.load(tmp_path / "own", download=True)


# Copies prepared with tensorflow-datasets ---------------------------------------------------------


def prepare(tiny: TinyFashion, folder: Path, shuffled: bool) -> Path:
    """Prepares the tiny data set in a folder."""
    return source_files.prepare(folder, "fashion_mnist", "3.0.1", tiny.splits, shuffled=shuffled)


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory) -> Path:
    """The folder of a prepared copy."""
    return prepare(tiny, tmp_path_factory.mktemp("prepared"), shuffled=True)


@pytest.mark.parametrize("shuffled", [True, False])
def test_prepared_copy_gives_the_same_as_the_original_files(tiny, tmp_path, shuffled):
    dataset = tiny.load(prepare(tiny, tmp_path / "prepared", shuffled))
    check_is_tiny(dataset, tiny)
    assert dataset.source.startswith("prepared with tensorflow-datasets in ")
    from_files = tiny.load(tiny.write(tmp_path / "files"))
    check_same_examples(dataset, from_files)


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


@pytest.mark.parametrize("damage", [lambda packed: packed[: len(packed) // 2], flip_middle_byte])
def test_prepared_copy_with_a_damaged_file_is_refused(tiny, prepared, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    (path,) = folder.rglob("*-train.array_record-*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DamagedDatasetError, match="split 'train'") as error:
        tiny.load(folder)
    assert str(folder) in str(error.value)


def test_prepared_copy_of_other_images_is_refused(prepared):
    other = make_tiny_fashion(NO_SERVER, seed=1)
    with pytest.raises(data.DamagedDatasetError, match="other images or labels"):
        other.load(prepared)


def test_prepared_copy_in_an_order_that_it_does_not_tell_is_refused(tiny, prepared, tmp_path):
    # The copy says that it was not shuffled, which is not true.
    folder = copy_with_other_information(prepared, tmp_path / "copy", disableShuffling=True)
    with pytest.raises(data.DamagedDatasetError, match="in an order"):
        tiny.load(folder)


def test_prepared_copy_that_needs_tensorflow_is_passed_over(tiny, prepared, tmp_path):
    folder = copy_with_other_information(prepared, tmp_path / "copy", fileFormat="tfrecord")
    with pytest.raises(data.DatasetNotFoundError, match="prepared as tfrecord, which cannot"):
        tiny.load(folder)
    debian = tiny.write(tmp_path / "debian", repacked=True)
    check_is_tiny(tiny.load(folder, debian_folder=debian), tiny)
