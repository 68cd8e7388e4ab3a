"""Files that are legal and small, and yet would keep a decoder busy for minutes; told by their structure alone.

JPEG   thousands of progressive scans of a few bytes each, every one of which visits all pixels;
       hundreds of megabytes of EXIF, which Pillow joins piece by piece
PNG    millions of chunks without content
"""

from __future__ import annotations

import re
import struct
from io import BufferedReader

from mvcr_cli.errors import BadImage

MAX_SCANS = 100  # encoders write about ten
MAX_JPEG_METADATA = 16 << 20  # bytes before the first scan
MAX_CHUNKS = 100_000  # of a PNG ...
MEAN_CHUNK_BYTES = 4096  # ... or more where the file is so large: encoders write one for every 8 KiB and more
_CHUNK_BYTES = 12  # the least: length, kind and checksum
_BLOCK = 1 << 20
_MAX_JPEG = 256 << 20  # bytes looked at closely
_SOS, _EOI = 0xDA, 0xD9
_SCAN = re.compile(rb"\xff\xda")  # twice as fast as bytes.count
# Any marker but stuffing, fill and restart, which stand inside a scan.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)


def check_structure(file: BufferedReader, file_bytes: int) -> None:
    """Refuse what would take minutes; the position of `file` is 0 before and after.

    Raises: BadImage.
    """
    head = file.read(8)
    if head.startswith(b"\xff\xd8\xff"):
        _check_jpeg(file)
    elif head == b"\x89PNG\r\n\x1a\n" and file_bytes > MAX_CHUNKS * _CHUNK_BYTES:
        _check_png(file, max(MAX_CHUNKS, file_bytes // MEAN_CHUNK_BYTES))
    file.seek(0)


def _check_jpeg(file: BufferedReader) -> None:
    position = 2
    while position <= MAX_JPEG_METADATA:
        file.seek(position)
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF or marker[1] == _SOS:
            break
        # Between segments a marker may be filled up with more 0xFF; those without a length do not stand in a header.
        position += 1 if marker[1] == 0xFF else 2 + struct.unpack(">H", marker[2:])[0]
    else:
        raise BadImage("corrupt", f"more than {MAX_JPEG_METADATA >> 20} MiB of metadata before the pixels")
    file.seek(position)
    if _scan_marks(file) > MAX_SCANS:  # also of thumbnails and of what is appended, such as a film
        file.seek(position)
        if _scans(file.read(_MAX_JPEG)) > MAX_SCANS:
            raise BadImage("corrupt", f"more than {MAX_SCANS} scans")


def _scan_marks(file: BufferedReader) -> int:
    found, tail = 0, b""
    while block := file.read(_BLOCK):
        found += len(_SCAN.findall(tail + block))
        tail = block[-1:] if block.endswith(b"\xff") else b""
    return found


def _scans(data: bytes) -> int:
    """How many scans the picture has that begins before `data`."""
    scans, position = 0, 0
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == _EOI or len(data) < position + 2:
            break
        scans += marker == _SOS
        position += struct.unpack(">H", data[position : position + 2])[0]
    return scans


def _check_png(file: BufferedReader, most: int) -> None:
    position = 8
    for _ in range(most):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            return
        position += _CHUNK_BYTES + struct.unpack(">I", header[:4])[0]
    raise BadImage("corrupt", f"more than {most:,} chunks")
