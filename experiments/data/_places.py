"""Finds the published files of a data set on this machine or downloads them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.data import _tfds_copies
from experiments.data._originals import DamagedDatasetError, DatasetNotFoundError, Splits
from experiments.data._tfds_copies import NotHereError

if TYPE_CHECKING:
    from experiments.data._published import Published

_CONNECTION_TIMEOUT_SECONDS = 10.0


def read(
    original: "Published", *, data_dir: Path | None = None, download: bool = True
) -> tuple[Splits, str]:
    """Reads the original splits from the first place that holds them.

    The places, in this order: the published files in `data_dir` or its folder named as the data
    set; a copy prepared with tensorflow-datasets (tfds); the folders where packages of the
    operating system put the published files; an earlier download by tfds; the network.

    Args:
        original: the data set.
        data_dir: the folder to search and to download to; None means tfds's default folder.
        download: whether the network may be used.

    Returns:
        The splits, and a text that says where they came from.

    Raises:
        DatasetNotFoundError: if no place holds them and they cannot be downloaded.
        DamagedDatasetError: if the first place that holds them does not hold the published data.
    """
    own_folders = [] if data_dir is None else [data_dir, data_dir / original.name]
    places: list[Callable[[], tuple[Splits, str]]] = [
        *(functools.partial(_from_folder, original, folder) for folder in own_folders),
        functools.partial(_tfds_copies.read, original, data_dir),
        *(functools.partial(_from_folder, original, folder) for folder in original.other_folders),
        functools.partial(_from_earlier_download, original, data_dir),
    ]
    if download:
        places.append(functools.partial(_from_network, original, data_dir))
    reasons = []
    for place in places:
        try:
            return place()
        except NotHereError as reason:
            reasons.append(str(reason))
    if not download:
        reasons.append("the network: not asked, since downloading is switched off")
    raise DatasetNotFoundError(_not_found_text(original, reasons))


def _not_found_text(original: "Published", reasons: list[str]) -> str:
    wanted = "\n".join(
        f"  {file.name} ({file.size:,} bytes) from {file.url}" for file in original.files.values()
    )
    looked_in = "\n".join(f"  {reason}" for reason in reasons)
    ways = (
        *original.advice,
        "load it once on a machine with a network, with downloading switched on",
        "put the original files, all of them, into a folder and name that folder (data_dir, "
        "--data-dir)",
    )
    return (
        f"{original.name} was not found. Wanted are its original files\n{wanted}\n"
        f"or a copy prepared with tensorflow-datasets. Looked in\n{looked_in}\n"
        f"To get it: {'; or '.join(ways)}. {original.remark}"
    ).rstrip()


def _from_folder(original: "Published", folder: Path) -> tuple[Splits, str]:
    """Reads the original files from a folder that holds them under their published names."""
    paths = {file.name: folder / file.name for file in original.files.values()}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if not folder.is_dir():
        raise NotHereError(f"{folder}: no such folder")
    if len(missing) == len(paths):
        raise NotHereError(f"{folder}: none of the files")
    if missing:
        raise NotHereError(f"{folder}: {', '.join(missing)} missing")
    return original.read_files(paths), f"the original files in {folder}"


def _from_earlier_download(original: "Published", data_dir: Path | None) -> tuple[Splits, str]:
    """Reads the original files where tfds's download manager left them; needs no network."""
    from tensorflow_datasets.core.download import resource

    builder = original.builder(data_dir)
    downloads = Path(builder.data_dir_root) / "downloads"
    paths = {}
    missing = []
    for file in original.files.values():
        stored_name = resource.get_dl_fname(file.url, file.sha256)
        # Some versions of tfds have one folder of downloads per data set, others do not.
        for path in (downloads / builder.name / stored_name, downloads / stored_name):
            if path.is_file():
                paths[file.name] = path
                break
        else:
            missing.append(file.name)
    if missing:
        names = "the files" if not paths else ", ".join(missing)
        raise NotHereError(f"{downloads}: no earlier download of {names}")
    return original.read_files(paths), f"downloaded before, to {downloads}"


def _from_network(original: "Published", data_dir: Path | None) -> tuple[Splits, str]:
    """Downloads the original files with tfds's download manager, then reads and checks them."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import units
    from tensorflow_datasets.core.download import checksums, download_manager

    builder = original.builder(data_dir)
    downloads = Path(builder.data_dir_root) / "downloads"
    files = list(original.files.values())
    try:
        # Without a network the manager retries for minutes, so test the connection first.
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
        # One file at a time: if one of several failed, the other downloads would continue and keep
        # Python from exiting. Not `download_and_extract`, since unpacking needs TensorFlow.
        paths = {file.name: Path(manager.download(file.url)) for file in files}
    except download_manager.NonMatchingChecksumError as reason:
        raise DamagedDatasetError(str(reason)) from reason
    except (requests.RequestException, tfds.download.DownloadError) as reason:
        raise NotHereError(f"the network: {reason}") from reason
    return original.read_files(paths), f"downloaded now, to {downloads}"
