"""Reads the gzip-compressed IDX files in which MNIST and its relatives are published.

An IDX file is two zero bytes, one byte for the type of the values (8: unsigned bytes), one byte
for the number of axes, the length of every axis as a big-endian 32-bit integer, and then the
values in row-major order. (None of the packages we use reads the format.)
"""

import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.data._originals import DamagedDatasetError

_UNSIGNED_BYTES = 8


def read(path: str | os.PathLike[str], shape: tuple[int, ...]) -> np.ndarray:
    """Reads one file whose name ends in ".gz".

    Args:
        path: the file.
        shape: the shape of the array that the file must hold; the first axis counts the examples.

    Returns:
        uint8 array of that shape, read-only.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedDatasetError: if the file is cut short, cannot be unpacked, or is not an IDX file of
            this shape; the text names the file. The values are not compared with the published
            ones here.
    """
    compressed = Path(path).read_bytes()
    try:
        return parse(_decompress(compressed, limit=_content_length(shape)), shape)
    except (ValueError, zlib.error) as reason:
        raise DamagedDatasetError(f"{path} is damaged: {reason}") from reason


def parse(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Parses an unpacked IDX file of unsigned bytes.

    Args:
        content: the whole file.
        shape: the shape that the array must have.

    Returns:
        uint8 array of that shape, a read-only view of `content`.

    Raises:
        ValueError: if the type of the values, the shape or the length of the file is wrong.
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
    """The length in bytes of an unpacked IDX file of unsigned bytes of this shape."""
    return 4 + 4 * len(shape) + math.prod(shape)


def _decompress(compressed: bytes, limit: int) -> bytes:
    """Unpacks a gzip file, checks its CRC, and stops one byte after `limit` bytes.

    (`gzip.decompress` has no limit, so a small file could fill the memory.) The additional byte
    shows the parser that a file is too long.
    """
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # The 16 stands for gzip alone.
    content = decompressor.decompress(compressed, limit + 1)
    if not decompressor.eof and len(content) <= limit:
        raise ValueError(f"its {len(compressed):,} bytes end before the compressed data do")
    if decompressor.unused_data:
        raise ValueError(f"{len(decompressor.unused_data):,} bytes follow the compressed data")
    return content
