"""Pictures by the books and not by povfarm: made, read, and cut and joined as bytes."""

from __future__ import annotations

import re
import statistics
import struct
import tempfile
import zlib
from pathlib import Path
from typing import List, Sequence, Tuple

import povfarm

WIDTH, HEIGHT = 4, 3  # of a picture in tests to which pictures are all one


def png(shade: int = 0, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A real picture of one colour, different for every shade."""
    row = b"\0" + bytes([shade % 256, shade // 256 % 256, 0]) * width
    return png_of(row * height, width, height)


def png_of(rows: bytes, width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    """A whole PNG of filtered rows; colours as RFC 2083 counts them, 2 are three values each."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return png_file(chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))


def png_file(*chunks: bytes) -> bytes:
    """A PNG of these chunks, whatever they are."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks_of(data: bytes) -> List[Tuple[bytes, bytes]]:
    """The chunks of a PNG, each by its kind and its body."""
    chunks, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8:at + 8 + length]))
        at += 12 + length
    return chunks


def png_apart(data: bytes) -> Tuple[List[Tuple[bytes, bytes]], bytes]:
    """The chunks but for IDAT, and what IDAT unpacks to."""
    chunks = chunks_of(data)
    packed = b"".join(body for kind, body in chunks if kind == b"IDAT")
    return [each for each in chunks if each[0] != b"IDAT"], zlib.decompress(packed)


def png_rows(data: bytes) -> List[bytes]:
    """Each row's own bytes, unfiltered as section 9 of the PNG specification says."""
    chunks, filtered = png_apart(data)
    width, height, depth, color = struct.unpack_from(">IIBB", chunks[0][1])
    step = {0: 1, 2: 3, 4: 2, 6: 4}[color] * depth // 8
    rows, above = [], [0] * (width * step)
    for start in range(0, height * (1 + len(above)), 1 + len(above)):
        row: List[int] = []
        for at, value in enumerate(filtered[start + 1:start + 1 + len(above)]):
            a, b = row[at - step] if at >= step else 0, above[at]
            c = above[at - step] if at >= step else 0
            near = sorted((a, b, c), key=lambda near, p=a + b - c: abs(p - near))[0]  # type: ignore
            row.append((value + [0, a, b, (a + b) // 2, near][filtered[start]]) % 256)
        rows.append(bytes(row))
        above = row
    return rows


def pixels(path: Path) -> bytes:
    """Return the part of a PNG that is the picture: its size and its data."""
    return b"".join(body for kind, body in chunks_of(path.read_bytes()) if kind in (b"IHDR", b"IDAT"))


def pixels_of(path: Path) -> Tuple[int, bytes]:
    """The width of a PPM picture, and its pixels: three bytes or three pairs of bytes each."""
    data = path.read_bytes()
    header = re.match(rb"P6\s+(?:#.*\n)*(\d+)\s+\d+\s+\d+\s", data)
    assert header, data[:50]
    return int(header[1]), data[header.end() :]


def rows_of(path: Path) -> List[bytes]:
    """The rows of a PPM, a PNG or a TGA picture as POV-Ray writes them."""
    data = path.read_bytes()
    if path.suffix == ".png":
        return png_rows(data)
    if path.suffix == ".ppm":
        header = re.match(rb"P[56]\s+(?:#.*\n)*(\d+)\s+(\d+)\s+\d+\s", data)
        assert header, data[:50]
        height, body = int(header[2]), data[header.end():]
    else:
        assert path.suffix == ".tga" and data[2] == 2, "only pictures that are not compressed"
        width, height, bits = struct.unpack_from("<HHB", data, 12)
        body = data[18 + data[0]:][:width * height * bits // 8]
    step = len(body) // height
    return [body[y * step:(y + 1) * step] for y in range(height)]


def crop_rows(data: bytes, extension: str, top: int, rows: int) -> bytes:
    """Return the rows of a picture as one of its own."""
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, "made")
        povfarm.crop_rows(data, extension, top, rows, made)
        return made.read_bytes()


def join_rows(strips: Sequence[bytes], extension: str) -> bytes:
    """Return the picture that strips make, each of them a file as on a coordinator."""
    with tempfile.TemporaryDirectory() as place:
        made, files = Path(place, "made"), [Path(place, str(at)) for at in range(len(strips))]
        for file, strip in zip(files, strips):
            file.write_bytes(strip)
        povfarm.join_rows(files, extension, made)
        return made.read_bytes()


def jump(upper: bytes, lower: bytes) -> float:
    return sum(abs(a - b) for a, b in zip(upper, lower)) / len(upper)


def seams(rows: Sequence[bytes], starts: Sequence[int]) -> List[float]:
    """How much more than its neighbours the step at each start of a slice is."""
    jumps = {row: jump(rows[row - 1], rows[row]) for row in range(1, len(rows))}
    return [jumps[at] / statistics.median(
        jumps[row] for row in range(at - 8, at + 9) if row != at and row in jumps)
        for at in starts[1:]]
