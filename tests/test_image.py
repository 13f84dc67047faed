"""IMAGE: whole pictures of POV-Ray's are accepted, and nothing else."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

import pytest
from conftest import run_povray

import povfarm

SCENE = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location -z*3 look_at 0 } light_source { <2, 3, -5> 1 }
sphere { 0, 1 pigment { checker rgb x rgb <0.2, 1, 0.4> scale 0.3 } }
plane { y, -1 pigment { bozo } }
"""

# POV-Ray's switches and size: extension, channels and depth of what it writes.
WRITTEN = {
    "+FN +W37 +H29": (".png", 3, 8),
    "+FN5 +W37 +H29": (".png", 3, 8),
    "+FN16 +UA +W37 +H29": (".png", 4, 16),
    "+FNg +W37 +H29": (".png", 1, 16),
    "+FNg +UA +W37 +H29": (".png", 2, 16),
    "+FN +W1 +H1": (".png", 3, 8),
    "+FP +W37 +H29": (".ppm", 3, 8),
    "+FP16 +W37 +H29": (".ppm", 3, 16),
    "+FP12 +W37 +H29": (".ppm", 3, 16),
    "+FPg +W37 +H29": (".ppm", 1, 16),  # POV-Ray's header says 8 bits and it writes 16
    "+FT +W37 +H29": (".tga", 3, 8),
    "+FT +UA +W37 +H29": (".tga", 4, 8),
    "+FC +W37 +H29": (".tga", 3, 8),
    "+FC +UA +W37 +H29": (".tga", 4, 8),
    "+FC +W300 +H5": (".tga", 3, 8),
    "+FB +W37 +H29": (".bmp", 3, 8),
    "+FB +UA +W37 +H29": (".bmp", 4, 8),
    "+FJ +W37 +H29": (".jpg", 3, 8),
    "+FJ100 +W37 +H29": (".jpg", 3, 8),
    "+FE +W37 +H29": (".exr", 3, 16),
    "+FE +UA +W37 +H29": (".exr", 4, 16),
    "+FE +W1 +H1": (".exr", 3, 16),
    "+FH +W37 +H29": (".hdr", 3, 8),
    "+FH +W7 +H2": (".hdr", 3, 8),  # too narrow for run lengths
    "+FH +W300 +H5": (".hdr", 3, 8),
}
KINDS = list(WRITTEN)


def size_of(switches: str) -> List[int]:
    return [int(word[2:]) for word in switches.split() if word[:2] in ("+W", "+H")]


@pytest.fixture(scope="module")
def pictures(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, bytes]:
    place = tmp_path_factory.mktemp("pictures")
    (place / "s.pov").write_text(SCENE)

    def render(switches: str) -> bytes:
        name = switches.replace(" ", "").replace("+", "_") + WRITTEN[switches][0]
        done = run_povray(["+Is.pov", f"+O{name}", *switches.split()], place)
        assert done.returncode == 0, done.stderr
        return (place / name).read_bytes()

    with ThreadPoolExecutor(8) as pool:  # POV-Ray sleeps most of the time
        return dict(zip(KINDS, pool.map(render, KINDS)))


def refused(data: bytes, extension: str, width: int, height: int) -> str:
    with pytest.raises(povfarm.ImageError) as error:
        povfarm.check_image(data, extension, width, height)
    assert "\n" not in str(error.value)
    return str(error.value)


def accepted(data: bytes, extension: str, width: int, height: int) -> bool:
    try:
        povfarm.check_image(data, extension, width, height)
    except povfarm.ImageError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_what_povray_writes_is_accepted(pictures: Dict[str, bytes], kind: str) -> None:
    extension, channels, depth = WRITTEN[kind]
    info = povfarm.check_image(pictures[kind], extension, *size_of(kind))
    assert [info.width, info.height, info.channels, info.depth] == [*size_of(kind), channels, depth]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_cut_off_anywhere_is_refused(pictures: Dict[str, bytes], kind: str) -> None:
    data, extension, size = pictures[kind], WRITTEN[kind][0], size_of(kind)
    assert [n for n in range(len(data)) if accepted(data[:n], extension, *size)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_another_size_or_more_data_is_refused(pictures: Dict[str, bytes], kind: str) -> None:
    data, extension, (width, height) = pictures[kind], WRITTEN[kind][0], size_of(kind)
    assert f"not {width + 1} x {height}" in refused(data, extension, width + 1, height)
    assert f"not {width} x {height - 1}" in refused(data, extension, width, height - 1)
    for more in (b"\0", b"\n", data):
        assert "after its end" in refused(data + more, extension, width, height)


def test_another_type_is_refused(pictures: Dict[str, bytes]) -> None:
    for kind in KINDS:
        for other in {row[0] for row in WRITTEN.values()} - {WRITTEN[kind][0]}:
            assert not accepted(pictures[kind], other, *size_of(kind)), (kind, other)
    assert "is empty" in refused(b"", ".png", 1, 1)
    assert "'.gif' is not a picture that POV-Ray writes" in refused(b"GIF89a", ".gif", 1, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if WRITTEN[kind][0] == ".png"])
def test_a_png_with_any_bit_flipped_is_refused(pictures: Dict[str, bytes], kind: str) -> None:
    data = pictures[kind]
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        assert not accepted(bytes(damaged), ".png", *size_of(kind)), at


def test_exr_pixels_with_a_flipped_bit_are_refused(pictures: Dict[str, bytes]) -> None:
    data = pictures["+FE +W37 +H29"]
    taken = 0
    for at in range(len(data) - 1000, len(data)):  # well inside the second block of rows
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        taken += accepted(bytes(damaged), ".exr", 37, 29)
    assert taken < 20  # some bits of the packed form mean nothing, and Adler-32 is weak


def test_a_bmp_whose_header_has_another_length_is_refused(pictures: Dict[str, bytes]) -> None:
    data = pictures["+FB +W37 +H29"]
    assert "another length" in refused(data[:2] + b"\7" + data[3:], ".bmp", 37, 29)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_never_ends_in_another_error(pictures: Dict[str, bytes], kind: str) -> None:
    data, extension, size = pictures[kind], WRITTEN[kind][0], size_of(kind)
    for at in range(min(len(data), 600)):
        for byte in (0, 255, data[at] ^ 0x80, data[at] ^ 1):
            accepted(data[:at] + bytes([byte]) + data[at + 1:], extension, *size)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HEAD = struct.pack(">IIBBBBB", 8, 4, 8, 2, 0, 0, 0)
ROWS = b"".join(bytes([row]) + bytes(24) for row in range(4))  # filters None, Sub, Up, Average


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


GOOD, END, SOFT = chunk(b"IDAT", zlib.compress(ROWS)), chunk(b"IEND", b""), chunk(b"tEXt", b"a\0b")
DATA = zlib.compress(ROWS)
BAD_PNGS = {
    "no pixels": [chunk(b"IHDR", HEAD), END],
    "pixels before the header": [GOOD, chunk(b"IHDR", HEAD), END],
    "no end": [chunk(b"IHDR", HEAD), GOOD],
    "an end with contents": [chunk(b"IHDR", HEAD), GOOD, chunk(b"IEND", b"x")],
    "a row too few": [chunk(b"IHDR", HEAD), chunk(b"IDAT", zlib.compress(ROWS[:-25])), END],
    "a byte too few": [chunk(b"IHDR", HEAD), chunk(b"IDAT", zlib.compress(ROWS[:-1])), END],
    "a byte too many": [chunk(b"IHDR", HEAD), chunk(b"IDAT", zlib.compress(ROWS + b"\0")), END],
    "no checksum of the pixels": [chunk(b"IHDR", HEAD), chunk(b"IDAT", DATA[:-4]), END],
    "a wrong checksum": [chunk(b"IHDR", HEAD), chunk(b"IDAT", DATA[:-1] + b"\0"), END],
    "more after the pixels": [chunk(b"IHDR", HEAD), chunk(b"IDAT", DATA + b"x"), END],
    "more after them, apart": [chunk(b"IHDR", HEAD), GOOD, chunk(b"IDAT", b"x"), END],
    "an unknown filter": [
        chunk(b"IHDR", HEAD), chunk(b"IDAT", zlib.compress(ROWS[:75] + b"\5" + ROWS[76:])), END],
    "pixels in two pieces": [
        chunk(b"IHDR", HEAD), chunk(b"IDAT", DATA[:9]), SOFT, chunk(b"IDAT", DATA[9:]), END],
    "interlaced": [chunk(b"IHDR", HEAD[:-1] + b"\1"), GOOD, END],
    "an unknown colour type": [chunk(b"IHDR", HEAD[:9] + b"\5" + HEAD[10:]), GOOD, END],
    "a header too short": [chunk(b"IHDR", HEAD[:-1]), GOOD, END],
}


@pytest.mark.parametrize("what", BAD_PNGS)
def test_a_png_made_wrong_is_refused(what: str) -> None:
    refused(png(*BAD_PNGS[what]), ".png", 8, 4)


def test_a_png_in_many_small_pieces_is_accepted() -> None:
    pieces = [chunk(b"IDAT", DATA[at:at + 1]) for at in range(len(DATA))]
    assert accepted(png(chunk(b"IHDR", HEAD), SOFT, *pieces, SOFT, END), ".png", 8, 4)


def test_a_png_that_inflates_without_end_costs_no_memory() -> None:
    bomb = zlib.compressobj(9)
    body = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(100)) + bomb.flush()
    data = png(chunk(b"IHDR", HEAD), chunk(b"IDAT", body), END)
    tracemalloc.start()
    assert "more pixels" in refused(data, ".png", 8, 4)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_a_large_png_is_checked_fast() -> None:
    row = b"\1" + bytes(range(250)) * 48
    head = struct.pack(">IIBBBBB", 4000, 3000, 8, 2, 0, 0, 0)
    data = png(chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(row * 3000, 1)), END)
    before = time.process_time()
    povfarm.check_image(data, ".png", 4000, 3000)
    assert time.process_time() - before < 0.5


def test_every_output_type_has_a_name_and_a_check(tmp_path: Path) -> None:
    assert set(povfarm.IMAGE_TYPES) == set("NTCPBJEH")
    for kind in povfarm.IMAGE_TYPES.values():
        assert "not a picture that POV-Ray writes" not in refused(b"x" * 99, kind.extension, 1, 1)
