"""Reads the gzip-compressed IDX files in which MNIST and its relatives are published.

An IDX file is two zero bytes, one byte for the type of the values (8: unsigned bytes), one byte
for the number of axes, the length of every axis as a big-endian 32-bit integer, and then the
values in row-major order.
"""

import dataclasses
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.data._originals import DamagedDatasetError, PublishedFile

_UNSIGNED_BYTES = 8

# Bits of the flag byte of a gzip header (RFC 1952); each announces one optional field.
_HAS_HEADER_CRC, _HAS_EXTRA, _HAS_NAME, _HAS_COMMENT = 2, 4, 8, 16
_GZIP_MAGIC_AND_METHOD = b"\x1f\x8b\x08"
_GZIP_FIXED_HEADER_LENGTH = 10
_GZIP_DEFAULT_LEVEL_ON_UNIX = b"\x00\x03"


@dataclasses.dataclass(frozen=True)
class IdxFile(PublishedFile):
    """What one published file has to be; its name ends in ".gz".

    Attributes:
        modified: time in the gzip header of the published file, in seconds since 1970 (UTC).
        shape: shape of the uint8 array that it holds; the first axis counts the examples.
    """

    modified: int
    shape: tuple[int, ...]


def read(path: str | os.PathLike[str], published: IdxFile) -> np.ndarray:
    """Reads one file and checks everything about it before handing its values out.

    A file passes when its bytes have the published checksum, or have it once their gzip header is
    replaced by the published one: distributions repack the files without the name and the time,
    which changes the header and nothing else.

    Args:
        path: the file to read; its own name does not matter.
        published: what it has to be.

    Returns:
        uint8 array of shape `published.shape`, read-only.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedDatasetError: if the file is cut short, does not unpack, is not an IDX file of the
            published shape, or holds other bytes than the published file. The text names the file.
    """
    compressed = Path(path).read_bytes()
    try:
        content = _decompress(compressed, limit=_content_length(published.shape))
        array = parse(content, published.shape)
        _check_published(compressed, published)
    except (ValueError, zlib.error) as reason:
        raise DamagedDatasetError(f"{path} is damaged: {reason}") from reason
    return array


def parse(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Parses an unpacked IDX file of unsigned bytes.

    Args:
        content: the whole file.
        shape: the shape that it has to have.

    Returns:
        uint8 array of that shape, a read-only view of `content`.

    Raises:
        ValueError: if the file has another type of values, another shape or another length.
    """
    num_axes = len(shape)
    expected_magic = bytes([0, 0, _UNSIGNED_BYTES, num_axes])
    if content[:4] != expected_magic:
        raise ValueError(
            f"it starts with 0x{content[:4].hex()}, but an IDX file of unsigned bytes with "
            f"{num_axes} axes starts with 0x{expected_magic.hex()}"
        )
    header_length = 4 + 4 * num_axes
    if len(content) < header_length:
        raise ValueError(f"it holds {len(content)} bytes, fewer than its header alone needs")
    found_shape = struct.unpack(f">{num_axes}I", content[4:header_length])
    if found_shape != shape:
        raise ValueError(f"it holds an array of shape {found_shape}, expected {shape}")
    if len(content) != _content_length(shape):
        raise ValueError(f"its contents are longer or shorter than shape {shape} needs")
    return np.frombuffer(content, dtype=np.uint8, offset=header_length).reshape(shape)


def _content_length(shape: tuple[int, ...]) -> int:
    """Length in bytes of an unpacked IDX file of unsigned bytes of this shape."""
    return 4 + 4 * len(shape) + math.prod(shape)


def _decompress(compressed: bytes, limit: int) -> bytes:
    """Unpacks a gzip file, checks its CRC, and stops one byte after `limit` bytes.

    The one byte more lets the parser see that a file is too long, however long it would become.
    """
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # 16: gzip, and nothing else
    content = decompressor.decompress(compressed, limit + 1)
    if not decompressor.eof and len(content) <= limit:
        raise ValueError(f"its {len(compressed):,} bytes end before the compressed data do")
    return content


def _check_published(compressed: bytes, published: IdxFile) -> None:
    """Raises ValueError unless the bytes are the published ones, the gzip header set aside."""
    payload = memoryview(compressed)[_gzip_header_length(compressed) :]
    for header in (compressed[: len(compressed) - len(payload)], _published_header(published)):
        if len(header) + len(payload) != published.size:
            continue
        digest = hashlib.sha256(header)
        digest.update(payload)
        if digest.hexdigest() == published.sha256:
            return
    raise ValueError(
        f"its {len(compressed):,} bytes have sha256 {hashlib.sha256(compressed).hexdigest()}, but "
        f"{published.name} as published has {published.size:,} bytes and sha256 "
        f"{published.sha256} (and the gzip header alone does not explain the difference)"
    )


def _published_header(published: IdxFile) -> bytes:
    """The gzip header of the published file: it stores the file's name and time."""
    return (
        _GZIP_MAGIC_AND_METHOD
        + bytes([_HAS_NAME])
        + struct.pack("<I", published.modified)
        + _GZIP_DEFAULT_LEVEL_ON_UNIX
        + published.name.removesuffix(".gz").encode("ascii")
        + b"\x00"
    )


def _gzip_header_length(compressed: bytes) -> int:
    """Length in bytes of the header of a gzip file that is known to unpack."""
    flags = compressed[3]
    length = _GZIP_FIXED_HEADER_LENGTH
    if flags & _HAS_EXTRA:
        length += 2 + int.from_bytes(compressed[length : length + 2], "little")
    for flag in (_HAS_NAME, _HAS_COMMENT):  # in the file in this order, each ended by a zero byte
        if flags & flag:
            length = compressed.index(b"\x00", length) + 1
    if flags & _HAS_HEADER_CRC:
        length += 2
    return length
