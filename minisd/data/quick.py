"""The sizes of plain JPEG and PNG files by their first bytes, nine times as fast as by Pillow.

Pillow has to read the others: those with EXIF or XMP, which may turn the image, damaged ones, other formats.
"""

import os
import struct
import zlib

from minisd import reading

START = 1 << 14  # bytes that are read of a file
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman coding (ITU T.81, table B.1)
SCAN = 0xDA
PASSED = {0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE}  # tables, comments, APPn but for EXIF's and XMP's
CHUNKS = {b"PLTE", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"bKGD", b"tRNS", b"pHYs", b"tIME"}


def size(path: str, most: int) -> tuple[int, int] | None:
    """Width and height of the image in a file, or None if Pillow has to say. ValueError, naming the file, if
    it is missing, or not a regular file of at most `most` bytes."""
    reading.check_regular(path, most)
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            head = os.read(file, START)
        finally:
            os.close(file)
        found = _jpeg(head) if head.startswith(b"\xff\xd8\xff") else _png(head)
    except (OSError, IndexError, struct.error):
        return None
    return found if found and all(found) else None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    """The size in the last frame header before the image's data begin."""
    at, found = 2, None
    while head[at] == 0xFF:
        kind, length = head[at + 1], head[at + 2] << 8 | head[at + 3]
        if kind == SCAN:
            return found
        if kind in FRAMES:
            bits, height, width, layers = struct.unpack_from(">BHHB", head, at + 4)
            if bits != 8 or layers not in (1, 3, 4):
                return None
            found = width, height
        elif kind not in PASSED or length < 2:
            return None
        at += 2 + length
    return None


def _png(head: bytes) -> tuple[int, int] | None:
    """The size in the first chunk, if no chunk before the image's data says more of it."""
    intact = head.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") and head[29:33] == struct.pack(
        ">I", zlib.crc32(head[12:29])
    )
    at = 33
    while intact and (kind := head[at + 4 : at + 8]) in CHUNKS:
        at += 12 + int.from_bytes(head[at : at + 4])
    known = intact and kind == b"IDAT" and head[24] in (1, 2, 4, 8, 16) and head[25] in (0, 2, 3, 4, 6)
    return struct.unpack_from(">II", head, 16) if known else None
