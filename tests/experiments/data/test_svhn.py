"""SVHN from tiny files in the original format: its draw, its pixels, damaged and missing files."""

import shutil

import numpy as np
import pytest

from experiments import data
from experiments.data import datasets, svhn
from experiments.data._originals import Split
from experiments.data._published import PublishedFile
from tests.experiments.data import source_files
from tests.experiments.data.source_files import (
    DAMAGES,
    NUM_TRAIN,
    check_is_tiny,
    check_same_examples,
    copy_with_other_information,
    published_as,
    serve,
)
from tests.experiments.data.svhn_files import (
    PINNED_SVHN,
    TinySvhn,
    make_tiny_svhn,
    mat_file,
    mat_variables,
    write_tiny_svhn,
)


@pytest.fixture(scope="module")
def tiny() -> TinySvhn:
    return make_tiny_svhn()


# The original files -------------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", [".", "svhn"])
def test_files_in_data_dir_are_read(tiny, tmp_path, subfolder):
    folder = tiny.write(tmp_path / "files" / subfolder)
    dataset = tiny.load(tmp_path / "files")
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"the original files in {folder}"
    assert (dataset.name, dataset.num_classes, dataset.max_value) == ("svhn", 10, 255)
    assert dataset.train.image.shape == (NUM_TRAIN, 32, 32, 3)
    assert dataset.train.image.dtype == dataset.test.image.dtype == np.uint8
    assert dataset.train.label.dtype == dataset.test.label.dtype == np.int32
    assert dataset.train_indices.dtype == np.int64


def test_load_by_name_finds_the_published_files(monkeypatch, tmp_path):
    original, splits = write_tiny_svhn(tmp_path / "files", num_train=20)
    monkeypatch.setattr(datasets, "DATASETS", {"svhn": original})
    dataset = data.load("svhn", data_dir=tmp_path / "files", download=False)
    np.testing.assert_array_equal(dataset.train.image, splits["test"].images[dataset.train_indices])
    assert sorted(dataset.train_indices) == list(range(20))


def test_every_axis_of_the_file_is_where_it_belongs():
    """Each pixel has a value that is computed from its row, column, colour and image."""
    row, column, colour, number = np.indices((32, 32, 3, 2))
    stored = (row + 40 * colour + 100 * number + 3 * (column % 7)).astype(np.uint8)
    images, _ = svhn.parse(mat_file({"X": stored, "y": [[1], [2]]}), 2)
    assert images.flags.c_contiguous
    for i, r, c, rgb in [(0, 31, 0, 0), (0, 0, 6, 0), (1, 0, 0, 0), (0, 0, 0, 2), (1, 2, 4, 1)]:
        assert images[i, r, c, rgb] == r + 40 * rgb + 100 * i + 3 * (c % 7)


def test_label_10_is_the_digit_0_and_the_others_are_themselves():
    variables = {"X": np.zeros((32, 32, 3, 10), np.uint8), "y": np.arange(1, 11)[:, np.newaxis]}
    _, labels = svhn.parse(mat_file(variables), 10)
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert labels.dtype == np.uint8


def test_files_without_compression_are_read_too(tiny):
    content = mat_file(mat_variables(tiny.splits["train"]), do_compression=False)
    images, labels = svhn.parse(content, 12)
    np.testing.assert_array_equal(images, tiny.splits["train"].images)
    np.testing.assert_array_equal(labels, tiny.splits["train"].labels)


def test_seed_decides_which_test_images_are_trained_on(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    first, again, other = (tiny.load(folder, seed=seed) for seed in (1, 1, 2))
    check_same_examples(first, again)
    assert first.train_indices.tolist() != other.train_indices.tolist()
    check_is_tiny(other, tiny)


def test_the_papers_number_of_images_is_drawn_without_replacement(monkeypatch):
    """The images are blank, and random labels tell which of them were drawn."""

    def blank(num_examples: int, seed: int) -> Split:
        labels = np.random.default_rng(seed).integers(0, 10, num_examples, dtype=np.uint8)
        return Split(np.broadcast_to(np.uint8(0), (num_examples, 1, 1, 1)), labels)

    splits = {"train": blank(73_257, seed=0), "test": blank(26_032, seed=1)}
    monkeypatch.setattr(svhn.MatFiles, "read", lambda *_: (splits, "nowhere"))
    dataset = data.load("svhn", seed=0)
    assert dataset.train_indices[:4].tolist() == PINNED_SVHN
    assert len(np.unique(dataset.train_indices)) == 25_000
    assert 0 <= dataset.train_indices.min() < dataset.train_indices.max() < 26_032
    np.testing.assert_array_equal(dataset.train.label, splits["test"].labels[dataset.train_indices])
    np.testing.assert_array_equal(dataset.test.label, splits["train"].labels)


@pytest.mark.parametrize("num_train", [0, 21])
def test_number_of_training_images_out_of_range_is_refused(tiny, tmp_path, num_train):
    with pytest.raises(ValueError, match=f"num_train must be between 1 and 20, got {num_train}"):
        tiny.load(tmp_path, num_train=num_train)


def test_published_files_are_those_that_tfds_registers():
    address = "http://ufldl.stanford.edu/housenumbers/"
    assert svhn.SVHN.files == {
        "train_32x32.mat": PublishedFile(
            name="train_32x32.mat",
            url=address + "train_32x32.mat",
            size=182_040_794,
            sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        "test_32x32.mat": PublishedFile(
            name="test_32x32.mat",
            url=address + "test_32x32.mat",
            size=64_275_384,
            sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    }


# Damaged files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_damaged_file_is_named(tiny, tmp_path, name, damage, complaint):
    path = tiny.write(tmp_path / "files") / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DamagedDatasetError, match=complaint) as error:
        tiny.load(tmp_path / "files")
    assert str(error.value).startswith(f"{path} is damaged")
    assert name in str(error.value)


ZEROS = np.zeros((32, 32, 3, 12), np.uint8)
ONES = np.ones((12, 1), np.uint8)
BLANK = np.moveaxis(ZEROS, -1, 0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no MATLAB file of version 5"),
        (b"\x80\x04K\x00." * 100, "no MATLAB file of version 5"),  # A pickle: never loaded.
        (mat_file({"X": ZEROS, "y": ONES})[:-20], "no MATLAB file of version 5"),
        (mat_file({"X": ZEROS}), "no array 'y'"),
        (mat_file({"x": ZEROS, "y": ONES}), "no array 'X'"),
        (mat_file({"X": ZEROS[..., :11], "y": ONES}), r"X has .*3, 11\), expected .*3, 12\)"),
        (mat_file({"X": ZEROS, "y": ONES[:11]}), r"y has shape \(11, 1\), expected \(12, 1\)"),
        (mat_file({"X": ZEROS, "y": ONES.T}), r"y has shape \(1, 12\), expected \(12, 1\)"),
        (mat_file({"X": BLANK, "y": ONES}), r"X has shape \(12, 32, 32, 3\)"),
        (mat_file({"X": ZEROS + 0.5, "y": ONES}), "types float64 and uint8, expected uint8"),
        (mat_file({"X": ZEROS, "y": np.array([["a"]] * 12)}), r"types uint8 and <U1, expected"),
        (mat_file({"X": ZEROS, "y": 0 * ONES}), "the label 0, expected 1 to 10"),
        (mat_file({"X": ZEROS, "y": 11 * ONES}), "the label 11, expected 1 to 10"),
        (mat_file({"X": ZEROS, "y": 1.5 * ONES}), r"the label 1\.5, expected 1 to 10"),
    ],
)
def test_file_with_wrong_contents_is_named(tiny, tmp_path, content, complaint):
    path = tiny.write(tmp_path / "files") / "train_32x32.mat"
    path.write_bytes(content)
    # The checksum of these contents is taken for the published one, or it would be the error.
    published = tiny.published | {"train": published_as(tiny.published["train"], content)}
    with pytest.raises(data.DamagedDatasetError, match=complaint) as error:
        tiny.load(tmp_path / "files", published=published)
    assert str(error.value).startswith(f"{path} is damaged")


def test_swapped_files_are_named(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    (folder / "train_32x32.mat").rename(folder / "other")
    (folder / "test_32x32.mat").rename(folder / "train_32x32.mat")
    (folder / "other").rename(folder / "test_32x32.mat")
    with pytest.raises(data.DamagedDatasetError, match=r"train_32x32\.mat as published"):
        tiny.load(folder)


def test_damaged_file_is_not_passed_over_for_a_download(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    (folder / "test_32x32.mat").write_bytes(b"")
    with pytest.raises(data.DamagedDatasetError, match="0 bytes"):
        tiny.load(folder, download=True)


# Missing files ------------------------------------------------------------------------------------


def test_missing_data_set_is_named_with_folders_files_and_sizes(tmp_path):
    with pytest.raises(data.DatasetNotFoundError) as error:
        data.load("svhn", data_dir=tmp_path, download=False)
    text = str(error.value)
    for wanted in (
        "svhn was not found",
        "train_32x32.mat (182,040,794 bytes) from http://ufldl.stanford.edu/housenumbers/train_",
        "test_32x32.mat (64,275,384 bytes) from http://ufldl.stanford.edu/housenumbers/test_",
        f"{tmp_path}: none of the files",
        f"{tmp_path / 'svhn'}: no such folder",
        f"{tmp_path / 'svhn_cropped' / '3.1.0'}: not prepared",
        f"{tmp_path / 'downloads'}: no earlier download",
        "downloading is switched off",
        "To get it: load it once on a machine with a network",
        "--data-dir",
    ):
        assert wanted in text
    assert "extra" not in text
    assert "Debian" not in text
    assert list(tmp_path.iterdir()) == []  # The search has made no folder.


def test_file_that_is_missing_beside_the_other_is_named(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    (folder / "test_32x32.mat").unlink()
    with pytest.raises(data.DatasetNotFoundError, match=f"{folder}: test_32x32.mat missing"):
        tiny.load(folder)


def test_without_a_network_loading_fails_at_once(tiny, tmp_path, no_proxy):
    with pytest.raises(data.DatasetNotFoundError, match=r"the network: .*127\.0\.0\.1.*refused"):
        tiny.load(tmp_path, download=True)


# Downloads, by the download manager of tfds -------------------------------------------------------


def test_download_is_read_and_found_again_without_a_network(tmp_path, no_proxy):
    asked_for = []
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served", asked_for) as url:
        tiny = make_tiny_svhn(url)
        for name, content in tiny.contents.items():
            (tmp_path / "served" / name).write_bytes(content)
        dataset = tiny.load(tmp_path / "own", download=True)
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"downloaded now, to {tmp_path / 'own' / 'downloads'}"
    # The 1.3 GB of the split "extra" were not asked for.
    assert asked_for == ["/train_32x32.mat", "/test_32x32.mat"]
    again = tiny.load(tmp_path / "own", download=True)  # The server has stopped.
    check_same_examples(again, dataset)
    assert again.source == f"downloaded before, to {tmp_path / 'own' / 'downloads'}"


def test_download_with_the_wrong_checksum_is_refused(tmp_path, no_proxy):
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as url:
        tiny = make_tiny_svhn(url)
        for name, content in make_tiny_svhn(url, seed=1).contents.items():
            (tmp_path / "served" / name).write_bytes(content)
        with pytest.raises(data.DamagedDatasetError, match=f"{url}.*has wrong checksum"):
            tiny.load(tmp_path / "own", download=True)


# Copies prepared with tensorflow-datasets ---------------------------------------------------------


def row_id(split_name: str, number: int) -> str:
    """The feature "id" of an example, as in tensorflow-datasets."""
    return f"{split_name}_{number:06d}"


def prepare(folder, splits, **kwargs):
    """Prepares splits in a folder, as an SVHN of tensorflow-datasets."""
    kwargs = {"row_id": row_id, **kwargs}
    return source_files.prepare(folder, "svhn_cropped", "3.1.0", splits, **kwargs)


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """The folder of a prepared copy."""
    return prepare(tmp_path_factory.mktemp("prepared"), tiny.splits)


def test_prepared_copy_gives_the_same_as_the_original_files(tiny, prepared, tmp_path):
    dataset = tiny.load(prepared)
    assert dataset.source.startswith("prepared with tensorflow-datasets in ")
    check_same_examples(dataset, tiny.load(tiny.write(tmp_path / "files")))


@pytest.mark.parametrize(
    ("changed_splits", "kwargs", "complaint"),
    [
        ({}, {"row_id": lambda split, number: f"{split}_{number // 2}"}, "order is unknown"),
        ({}, {"row_id": lambda split, number: f"{split}_{number + 1}"}, "order is unknown"),
        ({}, {"row_id": lambda split, number: f"extra_{number}"}, "has the id 'extra_"),
        ({}, {"row_id": None}, "has the id 'None', .*order is unknown"),
        ({"train": Split(BLANK, np.full(12, 10))}, {"num_classes": 11}, "label .* is 10, exp"),
        (
            {
                name: Split(np.zeros((num, 28, 28, 1), np.uint8), np.zeros(num))
                for name, num in (("train", 12), ("test", 20))
            },
            {},
            r"has shape \(28, 28, 3\) .*, expected \(32, 32, 3\)",
        ),
        ({"train": Split(BLANK[:11], ONES[:11, 0])}, {}, "gives 11 rows .* 12 were published"),
    ],
)
def test_prepared_copy_of_something_else_is_refused(
    tiny, tmp_path, changed_splits, kwargs, complaint
):
    folder = prepare(tmp_path / "prepared", tiny.splits | changed_splits, **kwargs)
    with pytest.raises(data.DamagedDatasetError, match=complaint) as error:
        tiny.load(folder)
    assert str(folder) in str(error.value)


def test_prepared_copy_without_a_split_is_passed_over(tiny, tmp_path):
    folder = prepare(tmp_path / "prepared", {"train": tiny.splits["train"]})
    with pytest.raises(data.DatasetNotFoundError, match="prepared without the split test"):
        tiny.load(folder)


def test_prepared_copy_that_needs_tensorflow_is_passed_over(tiny, prepared, tmp_path):
    folder = copy_with_other_information(prepared, tmp_path / "copy", fileFormat="tfrecord")
    with pytest.raises(data.DatasetNotFoundError, match="prepared as tfrecord, which cannot"):
        tiny.load(folder)


def test_prepared_copy_with_a_damaged_file_is_refused(tiny, prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    (path,) = folder.rglob("*-train.array_record-*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(data.DamagedDatasetError, match="split 'train'"):
        tiny.load(folder)


# The real SVHN, if this machine has it ------------------------------------------------------------


def test_real_svhn_has_its_sizes():
    try:
        dataset = data.load("svhn", download=False)
    except data.DatasetNotFoundError:
        pytest.skip("the real SVHN is not in tensorflow-datasets' default folder")
    assert dataset.train.image.shape == (25_000, 32, 32, 3)
    assert dataset.test.image.shape == (73_257, 32, 32, 3)
    assert dataset.train_indices[:4].tolist() == PINNED_SVHN
    for examples in (dataset.train, dataset.test):
        assert np.unique(examples.label).tolist() == list(range(10))
