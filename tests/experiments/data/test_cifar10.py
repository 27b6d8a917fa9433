"""CIFAR-10 from a tiny archive in the original format: its pixels, damaged and missing archives."""

import tarfile

import numpy as np
import pytest

from experiments import data
from experiments.data import cifar10, datasets
from experiments.data._originals import Split
from experiments.data._published import PublishedFile
from tests.experiments.data import source_files
from tests.experiments.data.cifar_files import (
    NUM_RECORDS,
    TinyCifar10,
    binary_file,
    make_tiny_cifar10,
    tar_archive,
    write_tiny_cifar10,
)
from tests.experiments.data.source_files import DAMAGES, check_same_examples, published_as, serve

TRAIN_2 = "cifar-10-batches-bin/data_batch_2.bin"
TEST = "cifar-10-batches-bin/test_batch.bin"


@pytest.fixture(scope="module")
def tiny() -> TinyCifar10:
    return make_tiny_cifar10()


def check_is_tiny(dataset: data.Dataset, tiny: TinyCifar10) -> None:
    """Checks that it has all images of both splits, in the published order."""
    for ours, original in (
        (dataset.train, tiny.splits["train"]),
        (dataset.test, tiny.splits["test"]),
    ):
        np.testing.assert_array_equal(ours.image, original.images)
        np.testing.assert_array_equal(ours.label, original.labels)
    assert dataset.train_indices.tolist() == list(range(5 * NUM_RECORDS))


# The original archive -----------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", [".", "cifar10"])
def test_archive_in_data_dir_is_read(tiny, tmp_path, subfolder):
    folder = tiny.write(tmp_path / "files" / subfolder)
    dataset = tiny.load(tmp_path / "files")
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"the original files in {folder}"
    assert (dataset.name, dataset.num_classes, dataset.max_value) == ("cifar10", 10, 255)
    assert dataset.train.image.shape == (5 * NUM_RECORDS, 32, 32, 3)
    assert dataset.test.image.shape == (NUM_RECORDS, 32, 32, 3)
    assert dataset.train.image.dtype == dataset.test.image.dtype == np.uint8
    assert dataset.train.label.dtype == dataset.test.label.dtype == np.int32
    assert dataset.train_indices.dtype == np.int64
    # Nothing was unpacked beside the archive.
    assert [path.name for path in folder.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_load_by_name_finds_the_published_archive_whatever_the_seed(monkeypatch, tmp_path):
    original, splits = write_tiny_cifar10(tmp_path / "files")
    monkeypatch.setattr(datasets, "DATASETS", {"cifar10": original})
    first, other = (
        data.load("cifar10", seed=seed, data_dir=tmp_path / "files", download=False)
        for seed in (0, 1)
    )
    check_same_examples(first, other)
    np.testing.assert_array_equal(first.train.image, splits["train"].images)


def test_every_byte_of_a_record_is_where_it_belongs(tiny):
    """The places of the bytes are those of the published description of the format."""
    record = np.zeros((NUM_RECORDS, 3073), np.uint8)
    record[0, 0] = 7  # label
    record[0, 1] = 10  # red, row 0, column 0
    record[0, 1 + 31] = 20  # red, row 0, column 31
    record[0, 1 + 32 * 5] = 30  # red, row 5, column 0
    record[0, 1 + 1024] = 40  # green
    record[0, 1 + 2048 + 32 * 31 + 2] = 50  # blue, row 31, column 2
    content = tar_archive((tiny.members | {TEST: record.tobytes()}).items())
    images, labels = cifar10.parse(content, NUM_RECORDS)["test"]
    assert labels.tolist() == [7, 0, 0]
    assert images.flags.c_contiguous
    places = [(0, 0, 0), (0, 31, 0), (5, 0, 0), (0, 0, 1), (31, 2, 2)]
    assert [images[0][place] for place in places] == [10, 20, 30, 40, 50]
    assert images.sum() == 150


def test_published_archive_is_the_one_that_tfds_registers():
    assert set(cifar10.CIFAR10.files) == {cifar10.ARCHIVE_NAME}
    assert cifar10.CIFAR10.files[cifar10.ARCHIVE_NAME] == PublishedFile(
        name="cifar-10-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    )


# Damaged archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_damaged_archive_is_named(tiny, tmp_path, damage, complaint):
    path = tiny.write(tmp_path / "files") / "cifar-10-binary.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DamagedDatasetError, match=complaint) as error:
        tiny.load(tmp_path / "files")
    assert str(error.value).startswith(f"{path} is damaged")


def load_published_as(tiny, tmp_path, content):
    """The error for other contents, whose checksum is taken for the published one."""
    path = tiny.write(tmp_path / "files") / "cifar-10-binary.tar.gz"
    path.write_bytes(content)
    with pytest.raises(data.DamagedDatasetError) as error:
        tiny.load(tmp_path / "files", published=published_as(tiny.published, content))
    assert str(error.value).startswith(f"{path} is damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]  # Nothing was unpacked.
    return str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no archive" * 100,
        lambda content: content[: len(content) // 2],
        lambda content: b"\x80\x04K\x00." * 100,  # A pickle must not be unpickled.
    ],
)
def test_archive_that_does_not_unpack_is_named(tiny, tmp_path, damage):
    text = load_published_as(tiny, tmp_path, damage(tiny.content))
    assert "no gzip-compressed tar archive" in text


def test_missing_members_are_named(tiny, tmp_path):
    members = {name: content for name, content in tiny.members.items() if name != TRAIN_2}
    text = load_published_as(tiny, tmp_path, tar_archive(members.items()))
    assert text.endswith(f"it does not hold {TRAIN_2}")


@pytest.mark.parametrize("name", [TRAIN_2, TEST])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-3073],
        lambda content: content + content[:3073],
        lambda content: content[:-1],
        lambda content: b"",
    ],
)
def test_member_of_the_wrong_length_is_named(tiny, tmp_path, name, change):
    content = change(tiny.members[name])
    text = load_published_as(tiny, tmp_path, tar_archive((tiny.members | {name: content}).items()))
    assert f"{name} in it has {len(content):,} bytes" in text
    assert "expected 9,219 bytes" in text


def test_member_with_a_label_above_9_is_named(tiny, tmp_path):
    content = binary_file(tiny.splits["test"].images, np.array([1, 10, 2], np.uint8))
    text = load_published_as(tiny, tmp_path, tar_archive((tiny.members | {TEST: content}).items()))
    assert f"{TEST} holds the label 10, expected 0 to 9" in text


def test_member_that_is_there_twice_is_named(tiny, tmp_path):
    members = [*tiny.members.items(), (TEST, tiny.members[TEST])]
    assert f"it holds {TEST} twice" in load_published_as(tiny, tmp_path, tar_archive(members))


@pytest.mark.parametrize(
    "path", ["/{}", "../{}", "cifar-10-batches-bin/../{}", "other/{}", "{}/", "test_batch.bin"]
)
def test_member_elsewhere_in_the_archive_is_not_taken_for_the_wanted_one(tiny, tmp_path, path):
    members = {name: content for name, content in tiny.members.items() if name != TEST}
    members[path.format(TEST).rstrip("/") + ("x" if path.endswith("/") else "")] = tiny.members[
        TEST
    ]
    text = load_published_as(tiny, tmp_path, tar_archive(members.items()))
    assert f"it does not hold {TEST}" in text


@pytest.mark.parametrize(
    ("member_type", "target"),
    [
        (tarfile.SYMTYPE, "data_batch_1.bin"),
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "cifar-10-batches-bin/data_batch_1.bin"),
        (tarfile.DIRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_member_that_is_no_file_is_refused(tiny, tmp_path, member_type, target):
    members = [(name, content) for name, content in tiny.members.items() if name != TEST]
    trick = tarfile.TarInfo(TEST)
    trick.type, trick.linkname = member_type, target
    text = load_published_as(tiny, tmp_path, tar_archive([*members, (trick, b"")]))
    assert f"{TEST} in it has 0 bytes and type {member_type!r}" in text


# Missing archives ---------------------------------------------------------------------------------


def test_missing_data_set_is_named_with_folders_file_and_size(tmp_path):
    with pytest.raises(data.DatasetNotFoundError) as error:
        data.load("cifar10", data_dir=tmp_path, download=False)
    text = str(error.value)
    for wanted in (
        "cifar10 was not found",
        "cifar-10-binary.tar.gz (170,052,171 bytes) from https://www.cs.toronto.edu/~kriz/",
        f"{tmp_path}: none of the files",
        f"{tmp_path / 'cifar10'}: no such folder",
        f"{tmp_path / 'cifar10' / '3.0.2'}: not prepared",
        f"{tmp_path / 'downloads'}: no earlier download",
        "downloading is switched off",
        "load it once on a machine with a network",
        "--data-dir",
    ):
        assert wanted in text
    assert list(tmp_path.iterdir()) == []  # The search has made no folder.


def test_unpacked_files_are_not_accepted_and_the_text_says_why(tiny, tmp_path):
    for name, content in tiny.members.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(data.DatasetNotFoundError, match=r"files already unpacked are not accep"):
        tiny.load(tmp_path)


def test_without_a_network_loading_fails_at_once(tiny, tmp_path, no_proxy):
    with pytest.raises(data.DatasetNotFoundError, match=r"the network: .*127\.0\.0\.1.*refused"):
        tiny.load(tmp_path, download=True)


# Downloads, by the download manager of tfds -------------------------------------------------------


def test_download_is_read_and_found_again_without_a_network(tmp_path, no_proxy):
    with serve(tmp_path) as url:
        tiny = make_tiny_cifar10(url)
        (tmp_path / tiny.published.name).write_bytes(tiny.content)
        dataset = tiny.load(tmp_path / "own", download=True)
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"downloaded now, to {tmp_path / 'own' / 'downloads'}"
    again = tiny.load(tmp_path / "own", download=True)  # The server has stopped.
    check_same_examples(again, dataset)
    assert again.source == f"downloaded before, to {tmp_path / 'own' / 'downloads'}"


def test_download_with_the_wrong_checksum_is_refused(tmp_path, no_proxy):
    with serve(tmp_path) as url:
        tiny = make_tiny_cifar10(url)
        (tmp_path / tiny.published.name).write_bytes(make_tiny_cifar10(url, seed=1).content)
        with pytest.raises(data.DamagedDatasetError, match=f"{url}.*has wrong checksum"):
            tiny.load(tmp_path / "own", download=True)


# Copies prepared with tensorflow-datasets ---------------------------------------------------------


def row_id(split_name: str, number: int) -> str:
    """The feature "id" of an example, as in tensorflow-datasets."""
    return f"{split_name}_{number:05d}"


@pytest.mark.parametrize("shuffled", [True, False])
def test_prepared_copy_gives_the_same_as_the_original_archive(tiny, tmp_path, shuffled):
    folder = source_files.prepare(
        tmp_path / "prepared", "cifar10", "3.0.2", tiny.splits, shuffled=shuffled, row_id=row_id
    )
    dataset = tiny.load(folder)
    assert dataset.source.startswith("prepared with tensorflow-datasets in ")
    check_same_examples(dataset, tiny.load(tiny.write(tmp_path / "files")))


def test_prepared_copy_that_lost_rows_is_refused(tiny, tmp_path):
    splits = tiny.splits | {"train": Split(*(array[:-1] for array in tiny.splits["train"]))}
    folder = source_files.prepare(tmp_path / "prepared", "cifar10", "3.0.2", splits, row_id=row_id)
    with pytest.raises(data.DamagedDatasetError, match=r"gives 14 rows .* 15 were published"):
        tiny.load(folder)


# The real CIFAR-10, if this machine has it --------------------------------------------------------


def test_real_cifar10_has_its_sizes_and_as_many_images_of_every_class():
    try:
        dataset = data.load("cifar10", download=False)
    except data.DatasetNotFoundError:
        pytest.skip("the real CIFAR-10 is not in tensorflow-datasets' default folder")
    assert dataset.train.image.shape == (50_000, 32, 32, 3)
    assert dataset.test.image.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.train.label).tolist() == [5_000] * 10
    assert np.bincount(dataset.test.label).tolist() == [1_000] * 10
