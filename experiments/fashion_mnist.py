"""Finds the original FashionMNIST on this machine or downloads it, and checks every byte of it.

tensorflow-datasets (tfds) is the source of truth for names, addresses, sizes and checksums; the
files themselves are parsed here with NumPy, so that TensorFlow is not needed.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import idx
from experiments.idx import DamagedDatasetError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"

_CONNECTION_TIMEOUT_SECONDS = 10.0


class DatasetNotFoundError(FileNotFoundError):
    """A data set is in none of the places looked in and cannot be downloaded."""


class PublishedSplit(NamedTuple):
    """What one split of FashionMNIST has to be.

    Attributes:
        images: the file of images, of shape (N, H, W).
        labels: the file of labels, of shape (N,).
        sha256: checksum, in hexadecimal digits, of all pixels and then all labels as bytes, in the
            published order; for copies that no longer consist of the published files.
    """

    images: idx.IdxFile
    labels: idx.IdxFile
    sha256: str


class Split(NamedTuple):
    """One original split in its published order.

    Attributes:
        images: uint8 array of shape [N, H, W], pixels from 0 to 255.
        labels: uint8 array of shape [N].
    """

    images: np.ndarray
    labels: np.ndarray


# Both are keyed by tfds's names of the splits, "train" and "test".
Published = Mapping[str, PublishedSplit]
Splits = Mapping[str, Split]


class _NotHereError(Exception):
    """One place does not hold the data set; the text names the place and says what is missing."""


def published_files() -> dict[str, PublishedSplit]:
    """Returns what was published, with the addresses, sizes and checksums that tfds registers."""
    import tensorflow_datasets as tfds

    registered: Any = tfds.builder_cls("fashion_mnist").url_infos
    url_of = {url.rpartition("/")[2]: url for url in registered}

    def file(name: str, modified: int, shape: tuple[int, ...]) -> idx.IdxFile:
        url = url_of[name]
        size, sha256 = int(registered[url].size), registered[url].checksum
        return idx.IdxFile(name, url, size, sha256, modified, shape)

    # tfds does not register the times in the gzip headers and the checksums of the contents;
    # both are properties of the files that have the registered checksums.
    return {
        "train": PublishedSplit(
            file("train-images-idx3-ubyte.gz", 1504176606, (60000, 28, 28)),
            file("train-labels-idx1-ubyte.gz", 1504176606, (60000,)),
            "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
        ),
        "test": PublishedSplit(
            file("t10k-images-idx3-ubyte.gz", 1504176627, (10000, 28, 28)),
            file("t10k-labels-idx1-ubyte.gz", 1504176627, (10000,)),
            "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
        ),
    }


def read(
    published: Published,
    *,
    data_dir: Path | None = None,
    download: bool = True,
    debian_folder: Path = DEBIAN_FOLDER,
) -> tuple[Splits, str]:
    """Reads the original splits from the first place that holds them.

    The places, in this order: the original files in `data_dir` or its folder "fashion_mnist"; a
    copy prepared with tfds; Debian's package; an earlier download by tfds; the network.

    Args:
        published: what the splits have to be, usually `published_files()`.
        data_dir: folder to look in and to download into; None means tfds's default folder.
        download: whether the network may be used.
        debian_folder: where Debian's package puts the original files.

    Returns:
        The splits, and where they came from in words.

    Raises:
        DatasetNotFoundError: if no place holds them and they cannot be downloaded.
        DamagedDatasetError: if the first place that holds them does not hold what was published.
    """
    folders = [] if data_dir is None else [data_dir, data_dir / "fashion_mnist"]
    places: list[Callable[[], tuple[Splits, str]]] = [
        *(functools.partial(_from_folder, published, folder) for folder in folders),
        functools.partial(_from_prepared_copy, published, data_dir),
        functools.partial(_from_folder, published, debian_folder),
        functools.partial(_from_earlier_download, published, data_dir),
    ]
    if download:
        places.append(functools.partial(_from_network, published, data_dir))
    reasons = []
    for place in places:
        try:
            return place()
        except _NotHereError as reason:
            reasons.append(str(reason))
    if not download:
        reasons.append("the network: not asked, since downloading is switched off")
    raise DatasetNotFoundError(_not_found_text(published, reasons))


def _not_found_text(published: Published, reasons: list[str]) -> str:
    wanted = "\n".join(f"  {file.name} ({file.size:,} bytes)" for file in _files(published))
    looked_in = "\n".join(f"  {reason}" for reason in reasons)
    return (
        f"fashion_mnist was not found. Wanted are its four original files\n{wanted}\n"
        f"or a copy prepared with tensorflow-datasets. Looked in\n{looked_in}\n"
        f"To get it: `apt-get install {DEBIAN_PACKAGE}` on Debian or Ubuntu; or load it once on a "
        "machine with a network, with downloading switched on; or put the four files into a "
        "folder and name that folder (data_dir, --data-dir)."
    )


def _files(published: Published) -> Iterator[idx.IdxFile]:
    for split in published.values():
        yield from (split.images, split.labels)


def _read_files(published: Published, paths: Mapping[str, Path]) -> Splits:
    """Reads and checks the four original files; `paths` is keyed by their published names."""
    return {
        name: Split(
            images=idx.read(paths[split.images.name], split.images),
            labels=idx.read(paths[split.labels.name], split.labels),
        )
        for name, split in published.items()
    }


def _from_folder(published: Published, folder: Path) -> tuple[Splits, str]:
    """Reads the original files from a folder that holds them under their published names."""
    paths = {file.name: folder / file.name for file in _files(published)}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if not folder.is_dir():
        raise _NotHereError(f"{folder}: no such folder")
    if len(missing) == len(paths):
        raise _NotHereError(f"{folder}: none of the files")
    if missing:
        raise _NotHereError(f"{folder}: {', '.join(missing)} missing")
    return _read_files(published, paths), f"the original files in {folder}"


def _builder(data_dir: Path | None) -> Any:
    """The tfds builder of FashionMNIST for a folder, or for tfds's default folder."""
    import tensorflow_datasets as tfds

    return tfds.builder("fashion_mnist", data_dir=data_dir)


def _from_prepared_copy(published: Published, data_dir: Path | None) -> tuple[Splits, str]:
    """Reads a copy that was prepared with tfds before, whoever did it."""
    builder = _builder(data_dir)
    folder = builder.data_path
    if not (folder.exists() and builder.is_prepared()):
        raise _NotHereError(f"{folder}: not prepared with tensorflow-datasets")
    try:
        data_sources = {name: builder.as_data_source(name) for name in published}
    except NotImplementedError:
        raise _NotHereError(
            f"{folder}: prepared as {builder.info.file_format.value}, which cannot be read without "
            "TensorFlow (file_format='array_record' can)"
        ) from None
    splits = {}
    for name, data_source in data_sources.items():
        num_wanted = published[name].labels.shape[0]
        num_registered = builder.info.splits[name].num_examples
        # Stored as parquet, a copy can give fewer rows than it says it has, without an error.
        if not len(data_source) == num_registered == num_wanted:
            raise DamagedDatasetError(
                f"{folder} is damaged: split {name!r} gives {len(data_source):,} rows and says "
                f"that it has {num_registered:,}; {num_wanted:,} were published"
            )
        try:
            splits[name] = _read_rows(data_source, name, builder.info.disable_shuffling)
            _check_contents(splits[name], published[name])
        except (RuntimeError, OSError, ValueError, LookupError) as reason:
            raise DamagedDatasetError(f"{folder} is damaged: split {name!r}: {reason}") from reason
    return splits, f"prepared with tensorflow-datasets in {folder}"


def _read_rows(data_source: Any, split_name: str, in_published_order: bool) -> Split:
    """Reads all rows of a prepared split and puts them back into the published order.

    tfds stores rows sorted by a hash of their key, which here is the example's number. Left in
    that order, the same seed would draw other images than it draws from the original files.
    """
    from tensorflow_datasets.core import hashing

    rows = data_source.__getitems__(range(len(data_source)))
    numbers = list(range(len(rows)))  # the published number of every row
    if not in_published_order:
        numbers.sort(key=hashing.Hasher(split_name).hash_key)
    rows_in_order = [rows[position] for position in np.argsort(numbers)]
    return Split(
        images=np.stack([row["image"][..., 0] for row in rows_in_order]),
        labels=np.stack([row["label"] for row in rows_in_order]).astype(np.uint8),
    )


def _check_contents(split: Split, published: PublishedSplit) -> None:
    """Raises ValueError unless these are the published examples in their order."""
    digest = hashlib.sha256(split.images.tobytes() + split.labels.tobytes())
    if digest.hexdigest() != published.sha256:
        raise ValueError(
            "it holds other images or labels than the published ones, or holds them in an order "
            "that tensorflow-datasets does not give them"
        )


def _from_earlier_download(published: Published, data_dir: Path | None) -> tuple[Splits, str]:
    """Reads the original files where tfds's download manager left them; needs no network."""
    from tensorflow_datasets.core.download import resource

    builder = _builder(data_dir)
    downloads = Path(builder.data_dir_root) / "downloads"
    paths = {}
    missing = []
    for file in _files(published):
        stored_name = resource.get_dl_fname(file.url, file.sha256)
        # Versions of tfds differ in whether downloads have a folder for each data set.
        for path in (downloads / builder.name / stored_name, downloads / stored_name):
            if path.is_file():
                paths[file.name] = path
                break
        else:
            missing.append(file.name)
    if missing:
        names = "the files" if not paths else ", ".join(missing)
        raise _NotHereError(f"{downloads}: no earlier download of {names}")
    return _read_files(published, paths), f"downloaded before, to {downloads}"


def _from_network(published: Published, data_dir: Path | None) -> tuple[Splits, str]:
    """Downloads the original files with tfds's download manager, then reads and checks them."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import units
    from tensorflow_datasets.core.download import checksums, download_manager

    builder = _builder(data_dir)
    downloads = Path(builder.data_dir_root) / "downloads"
    files = list(_files(published))
    try:
        # Without a network the manager tries again for minutes, so one short question goes first.
        requests.head(files[0].url, timeout=_CONNECTION_TIMEOUT_SECONDS).raise_for_status()
        manager = tfds.download.DownloadManager(
            download_dir=downloads,
            dataset_name=builder.name,
            url_infos={
                file.url: checksums.UrlInfo(units.Size(file.size), file.sha256, file.name)
                for file in files
            },
            force_checksums_validation=True,
        )
        # One file at a time: of several at once, those under way when one fails would go on, and
        # keep Python from ending. Not `download_and_extract`: unpacking needs TensorFlow.
        paths = {file.name: Path(manager.download(file.url)) for file in files}
    except download_manager.NonMatchingChecksumError as reason:
        raise DamagedDatasetError(str(reason)) from reason
    except (requests.RequestException, tfds.download.DownloadError) as reason:
        raise _NotHereError(f"the network: {reason}") from reason
    return _read_files(published, paths), f"downloaded now, to {downloads}"
