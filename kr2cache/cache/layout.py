"""Parse the HDF5 structures of a shard without the HDF5 library.

A shard that ``create.py`` made uses few features of HDF5: one superblock, object headers with checksums, contiguous
data sets, one chunked data set without index or filter, and strings in a global heap. This module parses these features
only. It checks every length, offset and count against the file before it uses them. There are two reasons. The HDF5
library trusts the global heap: one flipped bit there can make it loop for ever. And opening a cache takes only a few
small reads.

For a file with other features, this module raises ``NotPlainError``. ``shard.py`` then lets HDF5 read the file in a
separate process.

Names of structures and fields are those of the HDF5 File Format Specification, version 3.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kr2cache.cache.checksum import checksum
from kr2cache.cache.format import TAIL_MARK
from kr2cache.errors import CacheError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = 2**64 - 1
MAX_HEADER = 2**16
"""Bytes of one chunk of an object header; in this project's files, a chunk has less than 1,000."""
MAX_CONTINUATIONS = 16
MAX_HEAP = 2**26
"""Bytes of one global heap collection: provenance and batch plan."""
MAX_HEAP_OBJECTS = 2**16
"""The number of an object has two bytes."""
MAX_ATTRIBUTE = 2**16
MAX_ATTRIBUTES = 16
"""The format has ten attributes."""
DATASETS = {
    "": ("hidden", "hidden_scale"),
    "examples": ("id", "first_row", "n_tokens", "text_xxh3", "tokens_xxh3", "xxh3", "complete"),
    "tokens": ("input_id", "word_index"),
}
"""The data sets of the format, by group."""

DATASPACE, LINK_INFO, DATATYPE, EXTERNAL_FILES, LINK, LAYOUT, FILTERS, ATTRIBUTE, CONTINUATION, SYMBOL_TABLE = (
    0x01,
    0x02,
    0x03,
    0x07,
    0x06,
    0x08,
    0x0B,
    0x0C,
    0x10,
    0x11,
)
ATTRIBUTE_INFO = 0x15
SHARED = 0x02
"""Flag of a message that is stored elsewhere."""


class NotPlainError(Exception):
    """The file may be valid HDF5, but uses features that this module does not parse."""


@dataclass(frozen=True, kw_only=True)
class StoredDataset:
    """Type, shape and offset of one data set of a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int | None
    """Offset of its first byte if it is one plain array in the file; None if only HDF5 can read it."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A file's data sets by path (``examples/id``), and the attributes of its root."""

    datasets: dict[str, StoredDataset]
    attributes: dict[str, Any]
    plain: bool
    """Whether this module could parse the file; False if HDF5 did."""
    has_tail: bool = False
    """Whether the file continues after HDF5's last byte."""


def read_layout(path: Path, *, skip_damaged: bool = False) -> Layout:
    """Find the data sets and attributes of a shard.

    Args:
        skip_damaged: Leave out the parts that cannot be read instead of raising an error.

    Raises:
        CacheError: If the file is not HDF5, is cut off, or its structures contradict their checksums or its size.
        NotPlainError: If the file uses other features of HDF5; it may be intact or damaged.
        OSError: If the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _File(path, descriptor, os.fstat(descriptor).st_size, skip_damaged).read()
    except CacheError:
        raise
    except (struct.error, IndexError, ValueError, TypeError, OverflowError) as error:
        raise CacheError(f"{path} is damaged: {error}.", REMEDY) from error
    finally:
        os.close(descriptor)


ROOT = 4096
"""Offset of the root group's header; it follows from the alignment that ``create.py`` sets."""
REMEDY = "kr2cache cache verify shows which sequences are intact. The same kr2cache extract command repairs the cache."


class _File:
    """The parser of one open file."""

    def __init__(self, path: Path, descriptor: int, size: int, skip_damaged: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = size
        self.skip_damaged = skip_damaged
        self.has_tail = False

    def damaged(self, what: str) -> CacheError:
        return CacheError(f"{self.path} is damaged: {what}.", REMEDY)

    def take(self, offset: int, count: int, what: str) -> bytes:
        """Read ``count`` bytes at ``offset``; ``what`` names them in the error message."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise self.damaged(f"{what} reaches past the end of the file ({self.size:,} bytes)")
        data = os.pread(self.descriptor, count, offset)
        if len(data) != count:
            raise self.damaged(f"{what} cannot be read")
        return data

    def read(self) -> Layout:
        messages = self.messages(ROOT if self.skip_damaged else self.root())
        datasets: dict[str, StoredDataset] = {}
        links = self.links(messages)
        # Only names of the format are looked up: a hostile file may have any number of other members.
        for group, names in DATASETS.items():
            with self.tolerant():
                members = self.links(self.messages(links[group])) if group in links else {} if group else links
                for name in names:
                    if name in members:
                        with self.tolerant():
                            dataset = self.dataset(self.messages(members[name]))
                            datasets[f"{group}/{name}" if group else name] = dataset
        return Layout(datasets=datasets, attributes=self.attributes(messages), plain=True, has_tail=self.has_tail)

    def tolerant(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.suppress(CacheError, NotPlainError) if self.skip_damaged else contextlib.nullcontext()

    def root(self) -> int:
        """The offset of the root group's header, read from the superblock."""
        start = os.pread(self.descriptor, 48, 0)
        if not start.startswith(SIGNATURE[: len(start)]) or not start:
            raise CacheError(f"{self.path} is not an HDF5 file.", REMEDY)
        if len(start) < 48:
            raise self.damaged(f"it is cut off after {len(start)} bytes")
        version, offset_size, length_size, _ = struct.unpack_from("<4B", start, 8)
        if version not in (2, 3) or (offset_size, length_size) != (8, 8):
            raise NotPlainError("superblock")
        base, extension, end, root = struct.unpack_from("<4Q", start, 12)
        if struct.unpack_from("<I", start, 44)[0] != checksum(start[:44]):
            raise self.damaged("its first bytes do not match their checksum")
        if end > self.size:
            raise self.damaged(f"it is cut off: it has {self.size:,} of {end:,} bytes")
        if base != 0 or extension != UNDEFINED:
            raise NotPlainError("superblock extension")
        self.has_tail = end < self.size
        if self.has_tail and os.pread(self.descriptor, len(TAIL_MARK), self.size - len(TAIL_MARK)) != TAIL_MARK:
            raise self.damaged(f"it is cut off or changed at its end, byte {self.size:,}")
        return int(root)

    def messages(self, address: int) -> list[tuple[int, bytes]]:
        """(type, data) of every message of a version 2 object header."""
        head = self.take(address, min(64, max(0, self.size - address)), "an object header")
        if head[:4] != b"OHDR" or head[4] != 2:
            raise NotPlainError("object header")
        flags, at = head[5], 6
        at += 16 * bool(flags & 0x20)  # times
        at += 4 * bool(flags & 0x10)  # phase change
        width = 1 << (flags & 3)
        count = int.from_bytes(head[at : at + width], "little")
        at += width
        if count > MAX_HEADER:
            raise NotPlainError("a large object header")
        whole = self.take(address, at + count + 4, "an object header")
        tracked = bool(flags & 0x04)
        result: list[tuple[int, bytes]] = []
        blocks = [self.checked(whole)[at:]]
        for _ in range(MAX_CONTINUATIONS):
            if not blocks:
                return result
            for kind, data in _split(blocks.pop(0), tracked):
                if kind == CONTINUATION:
                    where, length = struct.unpack_from("<2Q", data)
                    if length > MAX_HEADER:
                        raise NotPlainError("a large object header")
                    block = self.checked(self.take(where, length, "a header's continuation"))
                    if block[:4] != b"OCHK":
                        raise self.damaged("a header's continuation is missing")
                    blocks.append(block[4:])
                else:
                    result.append((kind, data))
        raise NotPlainError("an object header in many pieces")

    def checked(self, block: bytes) -> bytes:
        """The block without its checksum, which must match."""
        if len(block) < 4 or struct.unpack_from("<I", block, len(block) - 4)[0] != checksum(block[:-4]):
            raise self.damaged("an object header does not match its checksum")
        return block[:-4]

    def links(self, messages: list[tuple[int, bytes]]) -> dict[str, int]:
        """Names and addresses of a group's members."""
        result = {}
        for kind, data in messages:
            if kind == SYMBOL_TABLE:
                raise NotPlainError("an old group")
            if kind == LINK_INFO:
                at = 2 + 8 * bool(data[1] & 1)
                if struct.unpack_from("<Q", data, at)[0] != UNDEFINED:
                    raise NotPlainError("a large group")
            if kind == LINK:
                version, flags, at = data[0], data[1], 2
                if version != 1 or (flags & 0x08 and data[at] != 0):
                    raise NotPlainError("a soft or external link")
                at += bool(flags & 0x08)
                at += 8 * bool(flags & 0x04)  # creation order
                at += bool(flags & 0x10)  # character set
                width = 1 << (flags & 3)
                length = int.from_bytes(data[at : at + width], "little")
                at += width
                result[data[at : at + length].decode("utf-8")] = struct.unpack_from("<Q", data, at + length)[0]
        return result

    def dataset(self, messages: list[tuple[int, bytes]]) -> StoredDataset:
        parts = dict(messages)
        if FILTERS in parts or EXTERNAL_FILES in parts or not {DATASPACE, DATATYPE, LAYOUT} <= set(parts):
            raise NotPlainError("filters or external files")
        dtype, shape = _dtype(parts[DATATYPE]), _shape(parts[DATASPACE])
        if dtype is None:
            raise NotPlainError("strings of variable length")
        layout = parts[LAYOUT]
        version, kind = layout[0], layout[1]
        if version in (3, 4) and kind == 1:
            (offset, stored) = struct.unpack_from("<2Q", layout, 2)
        elif version == 4 and kind == 2:
            offset, stored = self.implicit_chunks(layout, dtype, shape)
        else:
            raise NotPlainError("layout")
        if offset == UNDEFINED:
            raise NotPlainError("space that is not allocated")
        dataset = StoredDataset(dtype=dtype, shape=shape, offset=offset)
        if not self.skip_damaged and (dataset.nbytes > stored or offset + dataset.nbytes > self.size):
            raise self.damaged(
                f"a data set of {dataset.nbytes:,} bytes reaches past the end of the file ({self.size:,} bytes)"
            )
        return dataset

    def implicit_chunks(self, layout: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[int, int]:
        """Offset and size in bytes of a data set whose chunks are stored in order in one block."""
        flags, rank, width = layout[2], layout[3], layout[4]
        if flags or rank != 3 or len(shape) != 2 or width > 8:
            raise NotPlainError("chunks")
        dims = [int.from_bytes(layout[5 + i * width : 5 + (i + 1) * width], "little") for i in range(rank)]
        at = 5 + rank * width
        single, implicit = 1, 2
        # A chunk is a number of whole rows, so all chunks form one array. The last chunk may be larger than needed.
        if layout[at] not in (single, implicit) or dims[1] != shape[1] or dims[2] != dtype.itemsize or dims[0] < 1:
            raise NotPlainError("chunks")
        offset = struct.unpack_from("<Q", layout, at + 1)[0]
        return offset, -(-shape[0] // dims[0]) * dims[0] * dims[1] * dims[2]

    def attributes(self, messages: list[tuple[int, bytes]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for kind, data in messages:
            if kind == ATTRIBUTE_INFO:
                at = 2 + 2 * bool(data[1] & 1)
                if struct.unpack_from("<Q", data, at)[0] != UNDEFINED:
                    raise NotPlainError("attributes outside the header")
            if kind == ATTRIBUTE:
                name, value = self.attribute(data)
                if name in result:
                    raise self.damaged(f"it has the attribute {name} twice")
                result[name] = value
                if len(result) > MAX_ATTRIBUTES:
                    raise NotPlainError("many attributes")
        return result

    def attribute(self, data: bytes) -> tuple[str, Any]:
        version, flags, name_size, type_size, space_size, _ = struct.unpack_from("<BBHHHB", data)
        if version != 3 or flags:
            raise NotPlainError("an attribute")
        at = 9
        name = data[at : at + name_size].rstrip(b"\0").decode("utf-8")
        at += name_size
        dtype = _dtype(data[at : at + type_size])
        at += type_size
        shape = _shape(data[at : at + space_size])
        at += space_size
        if dtype is None:
            if shape:
                raise NotPlainError("an attribute")
            length, address, number = struct.unpack_from("<IQI", data, at)
            return name, self.heap_object(address, number, length).decode("utf-8")
        count = math.prod(shape)
        if count * dtype.itemsize > MAX_ATTRIBUTE:
            raise NotPlainError("a large attribute")
        values = np.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape)
        return name, values if shape else values[()]

    def heap_object(self, address: int, number: int, length: int) -> bytes:
        """Object ``number`` of the global heap collection at ``address``."""
        head = self.take(address, 16, "the heap of attributes")
        size = struct.unpack_from("<Q", head, 8)[0]
        if head[:4] != b"GCOL" or head[4] != 1 or not 16 <= size <= MAX_HEAP:
            raise self.damaged("the heap of its attributes has no valid header")
        heap = self.take(address, size, "the heap of attributes")
        at = 16
        for _ in range(MAX_HEAP_OBJECTS):
            if at + 16 > size:
                break
            index, _, _, stored = struct.unpack_from("<HHIQ", heap, at)
            if index == 0:  # free space, which is always last
                break
            if stored > size - at - 16:
                break
            if index == number:
                if length > stored:
                    break
                return heap[at + 16 : at + 16 + length]
            at += 16 + -(-stored // 8) * 8
        raise self.damaged("an attribute is missing in the heap")


def _split(block: bytes, tracked: bool) -> list[tuple[int, bytes]]:
    """(type, data) of the messages in one block of an object header."""
    result = []
    head = 6 if tracked else 4
    at = 0
    while at + head <= len(block):  # a shorter rest is a gap
        kind, size, flags = struct.unpack_from("<BHB", block, at)
        if flags & SHARED:
            raise NotPlainError("a shared message")
        if at + head + size > len(block):
            raise IndexError("a message reaches past its header")
        result.append((kind, block[at + head : at + head + size]))
        at += head + size
    return result


def _shape(data: bytes) -> tuple[int, ...]:
    version, rank, _, kind = struct.unpack_from("<4B", data)
    simple = 1
    if version != 2 or kind > simple or rank > 2:
        raise NotPlainError("dataspace")
    return struct.unpack_from(f"<{rank}Q", data, 4)


def _dtype(data: bytes) -> np.dtype[Any] | None:
    """The NumPy dtype; None for a string of variable length.

    Raises:
        NotPlainError: For a type that the format does not use.
    """
    kind, bits, size = data[0] & 0x0F, int.from_bytes(data[1:4], "little"), struct.unpack_from("<I", data, 4)[0]
    fixed, floating, string, variable = 0, 1, 3, 9
    if kind == fixed and size in (1, 2, 4, 8) and not bits & ~0x08:
        if struct.unpack_from("<2H", data, 8) == (0, 8 * size):
            return np.dtype(f"<{'i' if bits & 0x08 else 'u'}{size}")
    elif kind == floating and (bits, data[8:20]) in _FLOATS:
        return _FLOATS[bits, data[8:20]]
    elif kind == string and size > 0 and bits & 0x0F == 1:  # padded with NUL
        return np.dtype(f"S{size}")
    elif kind == variable and bits & 0x0F == 1:
        return None
    raise NotPlainError("datatype")


def _float(size: int, exponent: int, mantissa: int) -> tuple[int, bytes]:
    """Class bits and properties of a little-endian IEEE float with an implied leading bit."""
    sign = 8 * size - 1
    properties = struct.pack("<HHBBBBI", 0, 8 * size, mantissa, exponent, 0, mantissa, 2 ** (exponent - 1) - 1)
    return (sign << 8) | 0x20, properties


_FLOATS: dict[tuple[int, bytes], np.dtype[Any]] = {_float(2, 5, 10): np.dtype("<f2"), _float(4, 8, 23): np.dtype("<f4")}
