"""IMAGE: whole pictures of POV-Ray's are accepted, and nothing else; rows, films."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import struct
import subprocess
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import pytest

import povfarm
from helpers.base import need, run_povray, tried
from helpers.pictures import chunk, crop_rows, join_rows, png_apart, png_file, png_of, png_rows

NOISE = """#version 3.7; global_settings { assumed_gamma 1 }
plane { z, 1 pigment { cells scale 0.001 } finish { emission 1 diffuse 0 } }
"""
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


def test_a_tga_whose_rows_begin_at_the_bottom_is_refused(pictures: Dict[str, bytes]) -> None:
    data = pictures["+FT +W37 +H29"]
    assert not accepted(data[:17] + bytes([data[17] ^ 0x20]) + data[18:], ".tga", 37, 29)


def test_a_bmp_whose_header_has_another_length_is_refused(pictures: Dict[str, bytes]) -> None:
    data = pictures["+FB +W37 +H29"]
    assert "another length" in refused(data[:2] + b"\7" + data[3:], ".bmp", 37, 29)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_never_ends_in_another_error(pictures: Dict[str, bytes], kind: str) -> None:
    data, extension, size = pictures[kind], WRITTEN[kind][0], size_of(kind)
    for at in range(min(len(data), 600)):
        for byte in (0, 255, data[at] ^ 0x80, data[at] ^ 1):
            accepted(data[:at] + bytes([byte]) + data[at + 1:], extension, *size)


HEAD = struct.pack(">IIBBBBB", 8, 4, 8, 2, 0, 0, 0)
ROWS = b"".join(bytes([row]) + bytes(24) for row in range(4))  # filters None, Sub, Up, Average


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
    refused(png_file(*BAD_PNGS[what]), ".png", 8, 4)
    tried("pictures made wrong")


def test_a_png_in_many_small_pieces_is_accepted() -> None:
    pieces = [chunk(b"IDAT", DATA[at:at + 1]) for at in range(len(DATA))]
    assert accepted(png_file(chunk(b"IHDR", HEAD), SOFT, *pieces, SOFT, END), ".png", 8, 4)


def test_a_png_that_inflates_without_end_costs_no_memory() -> None:
    bomb = zlib.compressobj(9)
    body = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(100)) + bomb.flush()
    data = png_file(chunk(b"IHDR", HEAD), chunk(b"IDAT", body), END)
    tracemalloc.start()
    assert "more pixels" in refused(data, ".png", 8, 4)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def exr(channels: bytes, *fields: bytes) -> bytes:
    """A picture of 8 by 4 as OpenEXR lays it out, of one block that unpacks to very much."""
    named = {b"channels": channels, b"compression": b"\3",
             **dict.fromkeys([b"dataWindow", b"displayWindow"], struct.pack("<4i", 0, 0, 7, 3))}
    head = b"\x76\x2f\x31\x01\2\0\0\0" + b"".join(
        name + b"\0x\0" + struct.pack("<I", len(body)) + body
        for name, body in [*named.items(), *[(field, b"") for field in fields]]) + b"\0"
    pixels = zlib.compress(bytes(20_000_000))
    return head + struct.pack("<QiI", len(head) + 8, 0, len(pixels)) + pixels


def many() -> List[bytes]:
    return [b"%d" % number for number in range(50_000)]


LYING: Dict[str, Callable[[], Tuple[bytes, str]]] = {
    "a PPM header of blanks": lambda: (b"P6" + b" " * 5_000_000, ".ppm"),
    "a PPM header of comments": lambda: (b"P6" + b"#\n" * 2_000_000, ".ppm"),
    "an HDR header of formats": lambda: (
        b"#?RADIANCE\n" + b"FORMAT=32-bit_rle_rgbe\n" * 10_000, ".hdr"),
    "an EXR picture of many channels": lambda: (
        exr(b"".join(each + b"\0" + struct.pack("<I12x", 2) for each in many()) + b"\0"), ".exr"),
    "an EXR picture of no channels": lambda: (exr(b"\0"), ".exr"),
    "an EXR header of many fields": lambda: (exr(b"\0", *many()), ".exr"),
}


@pytest.mark.parametrize("what", LYING)
def test_a_lying_header_costs_neither_time_nor_memory(what: str) -> None:
    data, extension = LYING[what]()
    before = time.process_time()
    tracemalloc.start()
    refused(data, extension, 8, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert time.process_time() - before < 2


@pytest.mark.slow
def test_a_png_of_very_many_pieces_costs_no_memory() -> None:
    data = png_file(chunk(b"IHDR", HEAD), GOOD + chunk(b"IDAT", b"") * 30_000, END)
    tracemalloc.start()
    assert accepted(data, ".png", 8, 4) and povfarm.is_black(data, ".png")
    assert tracemalloc.get_traced_memory()[1] < 600_000
    join_rows([crop_rows(data, ".png", 0, 2), data], ".png")
    assert tracemalloc.get_traced_memory()[1] < 600_000
    tracemalloc.stop()


def test_a_large_png_is_checked_fast() -> None:
    row = b"\1" + bytes(range(250)) * 48
    head = struct.pack(">IIBBBBB", 4000, 3000, 8, 2, 0, 0, 0)
    data = png_file(chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(row * 3000, 1)), END)
    before = time.process_time()
    povfarm.check_image(data, ".png", 4000, 3000)
    assert time.process_time() - before < 0.5


def test_every_output_type_has_a_name_and_a_check(tmp_path: Path) -> None:
    assert set(povfarm.IMAGE_TYPES) == set("NTCPBJEH")
    for kind in povfarm.IMAGE_TYPES.values():
        assert "not a picture that POV-Ray writes" not in refused(b"x" * 99, kind.extension, 1, 1)


# Rows cut out and joined again.

def strips_of(data: bytes, extension: str, edges: Sequence[int]) -> List[bytes]:
    return [crop_rows(data, extension, top, end - top)
            for top, end in zip(edges, edges[1:])]


def undated(data: bytes) -> bytes:
    """The file without the time at which it was written (TGA 2.0 has it in numbers)."""
    data = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", b"", data)
    if data[-18:] == b"TRUEVISION-XFILE.\0":
        data = data[:-154] + data[-142:]
    return data


def exr_rows(data: bytes, height: int) -> List[bytes]:
    """Each row's own bytes, by the blocks that the offset table names (OpenEXR file layout)."""
    at, fields = 8, {}
    while data[at]:
        name, kind, rest = data[at:].split(b"\0", 2)
        size = struct.unpack_from("<i", rest)[0]
        fields[name] = rest[4:4 + size]
        at += len(name) + len(kind) + 6 + size
    assert fields[b"dataWindow"] == fields[b"displayWindow"]
    assert struct.unpack_from("<4xi4xi", fields[b"dataWindow"]) == (0, height - 1)
    rows: List[bytes] = []
    for offset in struct.unpack_from(f"<{-(-height // 16)}Q", data, at + 1):
        row, size = struct.unpack_from("<ii", data, offset)
        assert row == len(rows)
        packed = data[offset + 8:offset + 8 + size]
        count = min(16, height - row)
        try:
            order = bytearray(zlib.decompress(packed))
        except zlib.error:  # stored
            raw = packed
        else:
            for at in range(1, len(order)):
                order[at] = (order[at] + order[at - 1] - 128) % 256
            half = (len(order) + 1) // 2
            raw = bytes(order[at // 2 + at % 2 * half] for at in range(len(order)))
        rows += [raw[len(raw) // count * at:len(raw) // count * (at + 1)] for at in range(count)]
    return rows


ROW_KINDS = [kind for kind in KINDS if WRITTEN[kind][0] != ".jpg"]
CUTS = [[0, 4, 12, 20, 21, 29], [0, 16, 29], [0, 1, 29], [0, 29]]


def cuts_for(height: int) -> List[List[int]]:
    return CUTS if height == 29 else [[0, height], list(range(height + 1))]


@pytest.mark.parametrize("kind", [kind for kind in ROW_KINDS if WRITTEN[kind][0] != ".png"])
def test_strips_of_a_picture_join_to_the_same_file(pictures: Dict[str, bytes], kind: str) -> None:
    data, extension, (width, height) = pictures[kind], WRITTEN[kind][0], size_of(kind)
    for edges in cuts_for(height):
        strips = strips_of(data, extension, edges)
        for strip, top, end in zip(strips, edges, edges[1:]):
            povfarm.check_image(strip, extension, width, end - top)
        joined = join_rows(strips, extension)
        if extension == ".exr":  # another zlib could pack the rows otherwise
            assert [exr_rows(strip, end - top)
                    for strip, top, end in zip(strips, edges, edges[1:])] == [
                exr_rows(data, height)[top:end] for top, end in zip(edges, edges[1:])]
            assert exr_rows(joined, height) == exr_rows(data, height)
            assert len(edges) > 3 or joined == data  # blocks of 16 rows are copied
        else:
            assert joined == data


@pytest.mark.parametrize("kind", [kind for kind in ROW_KINDS if WRITTEN[kind][0] == ".png"])
def test_strips_of_a_png_join_to_its_pixels_and_notes(
    pictures: Dict[str, bytes], kind: str
) -> None:
    data, (width, height) = pictures[kind], size_of(kind)
    for edges in cuts_for(height):
        strips = strips_of(data, ".png", edges)
        for strip, top, end in zip(strips, edges, edges[1:]):
            povfarm.check_image(strip, ".png", width, end - top)
            assert png_rows(strip) == png_rows(data)[top:end]
        joined = join_rows(strips, ".png")
        assert png_rows(joined) == png_rows(data)
        assert png_apart(joined)[0] == png_apart(data)[0]
        assert len(joined) < len(data) + 40 * len(edges) + 0.1 * len(data)


def test_exr_rows_that_do_not_get_smaller_are_stored(pictures: Dict[str, bytes]) -> None:
    data = pictures["+FE +W1 +H1"]
    joined = join_rows([data, data], ".exr")
    assert exr_rows(joined, 2) == exr_rows(data, 1) * 2
    assert len(joined) == len(data) + 6  # of three channels, two bytes each


def test_a_strip_can_be_cut_again(pictures: Dict[str, bytes]) -> None:
    for kind in ROW_KINDS:
        extension = WRITTEN[kind][0]
        if size_of(kind)[1] == 29:
            strip = crop_rows(pictures[kind], extension, 7, 20)
            once = crop_rows(pictures[kind], extension, 11, 9)
            assert crop_rows(strip, extension, 4, 9) == once


# Switches, and the rows of each slice.
SLICED = ["+FN", "+FN16 +UA", "+FNg", "+FP16", "+FPg", "+FT +UA", "+FC", "+FB", "+FE +UA", "+FH"]
PARTS = [(0, 20), (20, 24), (24, 71)]


@pytest.fixture(scope="module")
def rendered(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, bytes]:
    """Whole pictures of 53 x 71 pixels, and the same rendered in slices, by their switches."""
    place = tmp_path_factory.mktemp("rendered")
    (place / "s.pov").write_text(SCENE)
    wanted = [" ".join([kind, rows]) for kind in SLICED
              for rows in ["", "+SR1 +ER20", "+SR21 +ER24", "+SR25 +ER71"]]
    wanted += [" ".join([kind, rows, "+SC5 +EC40"]) for kind in SLICED
               for rows in ["+SR21 +ER60", "+SR21 +ER40", "+SR41 +ER60"]]

    def render(number: int) -> bytes:
        extension = povfarm.IMAGE_TYPES[wanted[number][2]].extension
        done = run_povray(["+Is.pov", f"+O{number}{extension}", "+W53", "+H71",
                           *wanted[number].split()], place)
        assert done.returncode == 0, done.stderr
        return (place / f"{number}{extension}").read_bytes()

    with ThreadPoolExecutor(12) as pool:
        return dict(zip(wanted, pool.map(render, range(len(wanted)))))


def same_picture(one: bytes, other: bytes, extension: str) -> bool:
    if extension == ".png":
        notes = [[each for each in png_apart(data)[0] if each[0] not in (b"tIME", b"tEXt")]
                 for data in (one, other)]
        return png_rows(one) == png_rows(other) and notes[0] == notes[1]
    if extension == ".exr":
        return exr_rows(one, 71) == exr_rows(other, 71)
    return undated(one) == undated(other)


@pytest.mark.parametrize("kind", SLICED)
def test_slices_that_povray_rendered_join_to_its_whole_picture(
    rendered: Dict[str, bytes], kind: str
) -> None:
    extension = povfarm.IMAGE_TYPES[kind[2]].extension
    slices = [rendered[f"{kind} +SR{top + 1} +ER{end}"] for top, end in PARTS]
    strips = [crop_rows(data, extension, top, end - top)
              for data, (top, end) in zip(slices, PARTS)]
    assert same_picture(join_rows(strips, extension), rendered[f"{kind} "], extension)


@pytest.mark.parametrize("kind", SLICED)
def test_slices_of_a_users_own_region_keep_the_rows_around_it(
    rendered: Dict[str, bytes], kind: str
) -> None:
    extension = povfarm.IMAGE_TYPES[kind[2]].extension
    upper = crop_rows(rendered[f"{kind} +SR21 +ER40 +SC5 +EC40"], extension, 0, 40)
    lower = crop_rows(rendered[f"{kind} +SR41 +ER60 +SC5 +EC40"], extension, 40, 31)
    whole = rendered[f"{kind} +SR21 +ER60 +SC5 +EC40"]
    assert same_picture(join_rows([upper, lower], extension), whole, extension)


def filtered_png(filters: Sequence[int], color: int, depth: int, width: int = 9) -> bytes:
    """A picture of noise whose rows have these filters; random bytes are valid rows."""
    size = width * {0: 1, 2: 3, 4: 2, 6: 4}[color] * depth // 8
    noise = random.Random(f"{filters} {color} {depth}")
    rows = b"".join(bytes([each]) + bytes(noise.randrange(256) for _ in range(size))
                    for each in filters)
    head = struct.pack(">IIBBBBB", width, len(filters), depth, color, 0, 0, 0)
    return png_file(chunk(b"IHDR", head), chunk(b"gAMA", b"\0\0\xb1\x8f"),
               chunk(b"IDAT", zlib.compress(rows)), chunk(b"tEXt", b"after\0pixels"), END)


@pytest.mark.parametrize("color, depth", [(0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (6, 16)])
def test_every_row_filter_can_begin_a_strip(color: int, depth: int) -> None:
    pairs = list(itertools.chain.from_iterable(itertools.product(range(5), repeat=2)))
    for filters in (pairs, pairs[::-1], [4, 3, 2, 4, 3, 3]):
        data = filtered_png(filters, color, depth)
        rows = png_rows(data)
        strips = strips_of(data, ".png", range(len(filters) + 1))
        assert [png_rows(strip) for strip in strips] == [[row] for row in rows]
        joined = join_rows(strips, ".png")
        assert png_rows(joined) == rows
        assert png_apart(joined)[0] == png_apart(data)[0]


def test_strips_that_others_made_join_whatever_filter_they_begin_with() -> None:
    strips = [filtered_png([first, 4, 3], 2, 8) for first in range(5)]
    rows = [row for strip in strips for row in png_rows(strip)]
    joined = join_rows(strips, ".png")
    assert png_rows(joined) == rows
    assert png_rows(join_rows([strips[4], joined, strips[3]], ".png")) == (
        png_rows(strips[4]) + rows + png_rows(strips[3]))


def test_strips_that_only_seem_to_end_at_a_whole_byte_make_no_broken_picture() -> None:
    rows = bytes([0]) + bytes(20) + b"\0\0\xff\xff\3\0"
    stored = struct.pack("<BHH", 1, len(rows), len(rows) ^ 65535) + rows  # the last block
    data = b"\x78\x9c" + stored + struct.pack(">I", zlib.adler32(rows))
    head = struct.pack(">IIBBBBB", len(rows) - 1, 1, 8, 0, 0, 0, 0)
    strip = png_file(chunk(b"IHDR", head), *(chunk(b"IDAT", each) for each in (
        data[:2], data[2:-6], data[-6:])), END)
    povfarm.check_image(strip, ".png", len(rows) - 1, 1)
    not_joined([strip, strip], ".png")


@pytest.mark.parametrize("kind", range(5))
def test_a_packed_strip_is_copied_only_when_no_row_above_matters(kind: int) -> None:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    rows = bytes([kind, 9, 8, 7, 6])
    data = deflate.compress(rows) + deflate.flush(zlib.Z_SYNC_FLUSH)
    end = b"\3\0" + struct.pack(">I", zlib.adler32(rows))
    head = struct.pack(">IIBBBBB", 4, 1, 8, 0, 0, 0, 0)
    strip = png_file(chunk(b"IHDR", head), *(chunk(b"IDAT", each) for each in (
        b"\x78\x9c", data, end)), END)
    assert (2 * chunk(b"IDAT", data) in join_rows([strip, strip], ".png")) == (kind < 2)
    assert png_rows(join_rows([strip, strip], ".png")) == png_rows(strip) * 2


def test_joining_copies_packed_rows() -> None:
    """A picture of 4000 x 3000 is joined faster than zlib could pack it again."""
    row = bytes([0]) + random.Random(1).randbytes(12000)
    data = png_file(chunk(b"IHDR", struct.pack(">IIBBBBB", 4000, 750, 8, 2, 0, 0, 0)),
               chunk(b"IDAT", zlib.compress(row * 750, 1)), END)
    strip = crop_rows(data, ".png", 0, 750)
    packing, joining = [], []
    for _ in range(3):  # the garbage of other tests may be collected meanwhile
        before = time.process_time()
        zlib.compress(row * 750, 6)
        packing.append(time.process_time() - before)
        before = time.process_time()
        whole = join_rows([strip] * 4, ".png")
        joining.append(time.process_time() - before)
        povfarm.check_image(whole, ".png", 4000, 3000)
    assert min(joining) < min(packing)


WIDE = ["+FN", "+FN16 +UA", "+FP", "+FC", "+FB", "+FH", "+FE"]


@pytest.mark.parametrize("kind", WIDE)
def test_joining_needs_no_more_memory_for_a_larger_picture(
        povray: str, tmp_path: Path, kind: str) -> None:
    """Eight times as many rows, cut into as many strips that begin anywhere."""
    extension, made = povfarm.IMAGE_TYPES[kind[2]].extension, tmp_path / "made"
    (tmp_path / "s.pov").write_text(NOISE)
    done = run_povray(["+Is.pov", f"+Oone{extension}", "+W1500", "+H9", "-A", *kind.split()],
                      tmp_path)
    assert done.returncode == 0, done.stderr
    peaks = []
    for times in (8, 64):
        povfarm.join_rows([tmp_path / f"one{extension}"] * times, extension, made)
        strips = [tmp_path / f"{number}{extension}" for number in range(4)]
        for number, strip in enumerate(strips):
            povfarm.crop_rows(made, extension, 2 * times * number, 2 * times + 3, strip)
        tracemalloc.start()
        povfarm.join_rows(strips, extension, made)
        assert not povfarm.is_black(made, extension)
        assert povfarm.same_pixels(made, made, extension)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert made.stat().st_size > 4 * povfarm.BUFFER
    assert peaks[1] < 1.2 * peaks[0] + 50_000


def not_joined(strips: Sequence[bytes], extension: str) -> str:
    with pytest.raises(povfarm.ImageError) as error:
        join_rows(strips, extension)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_strips_of_another_kind_are_not_joined(pictures: Dict[str, bytes]) -> None:
    for one, other in itertools.permutations(ROW_KINDS, 2):
        if WRITTEN[one][0] == WRITTEN[other][0]:
            pair = [pictures[one], pictures[other]]
            same = {"+FN +W37 +H29", "+FN5 +W37 +H29"} == {one, other}  # 5 bits are written as 8
            if not same:
                assert "strip 2 does not fit the first" in not_joined(pair, WRITTEN[one][0])
    assert "no strips" in not_joined([], ".png")
    assert "cannot be cut and joined" in not_joined([pictures["+FJ +W37 +H29"]], ".jpg")
    with pytest.raises(povfarm.ImageError, match=r"away\.png cannot be read"):
        povfarm.join_rows([Path("away.png")], ".png", Path("made.png"))
    gamma = filtered_png([0], 2, 8).replace(chunk(b"gAMA", b"\0\0\xb1\x8f"), b"")
    assert "gamma" in not_joined([filtered_png([0], 2, 8), gamma], ".png")


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_rows_that_are_not_there_are_refused(pictures: Dict[str, bytes], kind: str) -> None:
    data, extension, (_, height) = pictures[kind], WRITTEN[kind][0], size_of(kind)
    for top, rows in [(-1, 1), (0, 0), (0, height + 1), (height, 1), (0, -1)]:
        with pytest.raises(povfarm.ImageError, match=f"of {height} rows has no rows"):
            crop_rows(data, extension, top, rows)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_what_passes_the_check_can_be_cut_and_joined(
        pictures: Dict[str, bytes], kind: str, pytestconfig: pytest.Config) -> None:
    """Every third byte of the first is another, or all with ``--long``."""
    data, extension, (width, height) = pictures[kind], WRITTEN[kind][0], size_of(kind)
    for at in range(0, min(len(data), 600), 1 if pytestconfig.getoption("long") else 3):
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
        if accepted(damaged, extension, width, height):
            edges = sorted({0, height // 2, height})
            join_rows(strips_of(damaged, extension, edges), extension)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_strip_cut_off_or_too_long_is_refused(pictures: Dict[str, bytes], kind: str) -> None:
    extension, (width, height) = WRITTEN[kind][0], size_of(kind)
    rows = max(1, height - 4)
    strip = crop_rows(pictures[kind], extension, height - rows, rows)
    assert [n for n in range(len(strip)) if accepted(strip[:n], extension, width, rows)] == []
    assert "after its end" in refused(strip + b"\0", extension, width, rows)
    assert f"not {width} x {rows + 1}" in refused(strip, extension, width, rows + 1)


def test_a_png_strip_with_any_bit_flipped_is_refused(pictures: Dict[str, bytes]) -> None:
    strip = crop_rows(pictures["+FN16 +UA +W37 +H29"], ".png", 8, 5)
    for at in range(len(strip)):
        damaged = strip[:at] + bytes([strip[at] ^ 1 << at % 8]) + strip[at + 1:]
        assert not accepted(damaged, ".png", 37, 5), at


# Frames as an animated PNG.

def animated(frames: Sequence[bytes], delay: Fraction = Fraction(1, 25)) -> bytes:
    return b"".join(povfarm.animated_png(iter(frames), len(frames), delay))


def frames_of(animation: bytes) -> Tuple[List[List[bytes]], List[Tuple[bytes, bytes]]]:
    """Each frame's rows, by its packed pixels alone, and all chunks but those."""
    chunks, _ = png_apart(animation)
    head = animation[8:33]
    packed = [b""]
    at = 8
    while at < len(animation):
        length, kind = struct.unpack_from(">I4s", animation, at)
        body = animation[at + 8:at + 8 + length]
        packed += [b""] * (kind == b"fcTL")
        packed[-1] += {b"IDAT": body, b"fdAT": body[4:]}.get(kind, b"")
        at += 12 + length
    assert packed[0] == b""
    pngs = [png_file(head, chunk(b"IDAT", each), END) for each in packed[1:]]
    return [png_rows(each) for each in pngs], [each for each in chunks if each[0] != b"fdAT"]


def test_an_animated_png_shows_the_frames_pixel_by_pixel(rendered: Dict[str, bytes]) -> None:
    for kind in ("+FN", "+FN16 +UA", "+FNg"):
        frames = [rendered[f"{kind} {rows}"] for rows in ["", "+SR1 +ER20", "+SR25 +ER71"]]
        shown, chunks = frames_of(animated(frames))
        assert shown == [png_rows(frame) for frame in frames]
        notes = png_apart(frames[0])[0]
        made = dict(chunks)
        assert [each for each in chunks if each[0] not in (b"acTL", b"fcTL")] == notes
        assert chunks[1] == (b"acTL", struct.pack(">II", 3, 0))
        assert made[b"fcTL"][4:20] == struct.pack(">IIII", 53, 71, 0, 0)


def test_the_chunks_of_an_animated_png_are_numbered_in_turn() -> None:
    frames = [filtered_png([0, 1, 2], 2, 8)] * 3
    chunks, _ = png_apart(animated(frames))
    kinds = b" ".join(kind for kind, _ in chunks).decode()
    assert kinds == "IHDR acTL gAMA fcTL fcTL fdAT fcTL fdAT tEXt IEND"
    assert [struct.unpack_from(">I", body)[0] for kind, body in chunks
            if kind in (b"fcTL", b"fdAT")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("delay", [
    Fraction(1, 25), Fraction(1001, 30000), Fraction(3), Fraction(2199114857, 10**8),
    Fraction(123456789, 10**10), Fraction(65535)])
def test_the_time_of_a_frame_fits_the_format(delay: Fraction) -> None:
    body = dict(png_apart(animated([filtered_png([0], 0, 8)], delay))[0])[b"fcTL"]
    shown = Fraction(*struct.unpack_from(">HH", body, 20))
    assert abs(shown / delay - 1) < 1e-5
    assert shown == delay or max(delay.numerator, delay.denominator) > 65535


def test_frames_that_do_not_fit_are_told_by_their_number() -> None:
    good = filtered_png([0, 0], 2, 8)
    others = [filtered_png([0], 2, 8), filtered_png([0, 0], 2, 8, width=10),
              filtered_png([0, 0], 6, 8), filtered_png([0, 0], 2, 16)]
    for other in others:
        with pytest.raises(povfarm.ImageError, match="picture 3 does not fit the first"):
            animated([good, good, other, good])
    for count, frames in [(2, [good]), (1, [good, good]), (0, [])]:
        with pytest.raises(povfarm.ImageError, match=f"{len(frames)} pictures, not {count}"):
            list(povfarm.animated_png(frames, count, Fraction(1)))
    with pytest.raises(povfarm.ImageError):
        animated([good, good[:-20]])
    with pytest.raises(povfarm.ImageError, match="no pixels"):
        animated([png_file(chunk(b"IHDR", HEAD), END)])


def test_a_long_animation_needs_the_memory_of_a_frame() -> None:
    frame = filtered_png([0] * 100, 2, 16, width=1000)
    tracemalloc.start()
    size = sum(map(len, povfarm.animated_png((frame for _ in range(300)), 300, Fraction(1))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 200 * len(frame) > 10 * peak


def test_ffmpeg_decodes_the_animation(rendered: Dict[str, bytes], tmp_path: Path) -> None:
    need("ffmpeg", shutil.which("ffmpeg") is not None, "apt-get install ffmpeg")
    frames = [rendered[f"+FN {rows}"] for rows in ["", "+SR1 +ER20", "+SR25 +ER71"]]
    (tmp_path / "film.png").write_bytes(animated(frames, Fraction(1, 5)))
    raw = subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-f", "apng", "-i", "film.png", "-f", "rawvideo",
         "-pix_fmt", "rgb24", "-"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert raw == b"".join(row for frame in frames for row in png_rows(frame))


# --- small pictures for browsers

def shown(data: bytes, extension: str, width: int = 4096) -> List[bytes]:
    return png_rows(povfarm.small_png(data, extension, width))


def apart(one: List[bytes], other: List[bytes]) -> int:
    """The largest difference of two pictures' bytes."""
    assert [len(row) for row in one] == [len(row) for row in other]
    return max(abs(a - b) for mine, theirs in zip(one, other) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("kind, most", [
    ("+FN", 0), ("+FP", 0), ("+FT", 0), ("+FB", 0), ("+FC", 1), ("+FP16", 1), ("+FP12", 1),
    ("+FE", 1), ("+FH", 3)])
def test_every_kind_of_picture_is_shown_as_povray_makes_a_png_of_it(
        pictures: Dict[str, bytes], kind: str, most: int) -> None:
    """EXR and HDR hold rounded light: what sRGB's curve makes of that is as near as they are."""
    switches = f"{kind} +W37 +H29"
    wanted = png_rows(pictures["+FN +W37 +H29"])
    assert apart(shown(pictures[switches], WRITTEN[switches][0]), wanted) <= most


@pytest.mark.parametrize("kind, most", [("+FE", 4), ("+FH", 6)])
@pytest.mark.parametrize("stops", [1, -1])
def test_light_is_shown_brighter_and_darker(
        pictures: Dict[str, bytes], kind: str, most: int, stops: int) -> None:
    """As near as what povray's PNG has of it, where that is not white."""
    switches = f"{kind} +W37 +H29"
    made = b"".join(png_rows(povfarm.small_png(pictures[switches], WRITTEN[switches][0], 99, stops)))

    def exposed(byte: int) -> float:
        value = byte / 255
        light = 2.0 ** stops * (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
        return 255 * min(12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055, 1)
    plain = b"".join(png_rows(pictures["+FN +W37 +H29"]))
    seen = [(exposed(byte), mine) for byte, mine in zip(plain, made) if byte < 255]
    assert len(seen) > 1000 and max(abs(wanted - mine) for wanted, mine in seen) <= most
    assert sum(abs(byte - mine) for byte, mine in zip(plain, made)) > 10 * len(plain)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if WRITTEN[kind][0] != ".jpg"])
def test_what_povray_writes_gets_small(pictures: Dict[str, bytes], kind: str) -> None:
    extension, (width, height) = WRITTEN[kind][0], size_of(kind)
    small = povfarm.small_png(pictures[kind], extension, 10)
    info = povfarm.check_image(small, ".png", min(width, 10), max(round(height * min(width, 10) / width), 1))
    assert (info.channels, info.depth) == (3, 8)
    if kind.endswith("+W37 +H29") and "+UA" not in kind and "g" not in kind:
        assert apart(png_rows(small), shown(pictures["+FN +W37 +H29"], ".png", 10)) <= 3


def test_a_pixel_of_a_small_picture_is_the_mean_of_four() -> None:
    rows = b"".join(b"\0" + bytes([shade, 0, 9] * 2 + [shade + 40, 0, 9] * 2) for shade in (0, 0, 80, 80))
    assert shown(png_of(rows, 4, 4), ".png", 2) == [bytes([0, 0, 9, 40, 0, 9]), bytes([80, 0, 9, 120, 0, 9])]
    assert shown(png_of(rows, 4, 4), ".png", 1) == [bytes([60, 0, 9])]


def test_a_jpeg_is_not_made_small(pictures: Dict[str, bytes]) -> None:
    with pytest.raises(povfarm.ImageError):
        povfarm.small_png(pictures["+FJ +W37 +H29"], ".jpg", 10)
