"""Puts pictures together from slices and compares them with the whole ones, by POV-Ray itself.

    python tests/identity.py [--size WxH] [--slices N,N...] [--types LETTERS] [SCENE ...]

Every slice is a run of its own with the values that povfarm gives it. Prints a Markdown
table: the scenes, and for each kind of anti-aliasing how far the worst of its pictures is from
the whole (largest difference of a value, share of the values that differ), then the same for
a whole picture by two threads beside one by one thread. Needs povray and povray-examples.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Sequence, Tuple

from conftest import EXAMPLES, run_povray

from povfarm import PovOptions, read_command_line, region_of, slice_values

SCENES = """
    advanced/sombrero.pov advanced/teapot/teapot4.pov advanced/whiltile.pov advanced/wineglass.pov
    advanced/woodbox.pov objects/blob.pov objects/chesmsh.pov objects/isosurfaces.pov
    objects/lathe2.pov textures/patterns/crackle1.pov lights/arealit1.pov lights/spotlite.pov
    camera/fisheye.pov camera/focalblur.pov interior/fog_ft.pov interior/iortest.pov
    advanced/mist.pov advanced/object_pattern.pov advanced/quilt1.pov interior/media/media1.pov
    animations/raddem/raddem.pov
""".split()
# Small blocks, so that even a small picture has many places where a slice may begin.
KINDS = {
    "none": ["-A"],
    "+AM1, +BS4": ["+A0.1", "+AM1", "+R2", "+BS4"],
    "+AM1": ["+A0.02", "+AM1", "+R3", "-J"],
    "+AM2": ["+A0.1", "+AM2", "+R2"],
}

Rows = List[bytes]
Difference = Tuple[int, float]  # the largest, and the share of the values that differ


def rows_of(path: Path) -> Rows:
    """The rows of a PPM, a PNG or a TGA picture as POV-Ray writes them."""
    data = path.read_bytes()
    if path.suffix == ".ppm":
        header = re.match(rb"P[56]\s+(?:#.*\n)*(\d+)\s+(\d+)\s+\d+\s", data)
        assert header, data[:50]
        height, body = int(header[2]), data[header.end() :]
    elif path.suffix == ".tga":
        assert data[2] == 2, "only pictures that are not compressed"
        width, height, bits = struct.unpack_from("<HHB", data, 12)
        body = data[18 + data[0] :][: width * height * bits // 8]
    else:
        height, body = struct.unpack_from(">I", data, 20)[0], unfiltered(data)
    step = len(body) // height
    return [body[y * step : (y + 1) * step] for y in range(height)]


def unfiltered(png: bytes) -> bytes:
    """The values of a PNG without the filters of its rows."""
    width, height, bits, colour = struct.unpack_from(">IIBB", png, 16)
    size = {0: 1, 2: 3, 6: 4}[colour] * bits // 8
    packed, at = b"", 8
    while at < len(png):
        length = struct.unpack_from(">I", png, at)[0]
        packed += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    raw, step, above, result = zlib.decompress(packed), width * size, bytes(width * size), b""
    for y in range(height):
        line = bytearray(raw[y * (step + 1) + 1 : (y + 1) * (step + 1)])
        for i in range(step):
            a, b = line[i - size] if i >= size else 0, above[i]
            c = above[i - size] if i >= size else 0
            near = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, near)[raw[y * (step + 1)]]) % 256
        above = bytes(line)
        result += above
    return result


def render(scene: Path, args: Sequence[str], kind: str = "P") -> Rows:
    """The rows of one picture by plain POV-Ray, started in the scene's directory."""
    suffix = {"P": ".ppm", "N": ".png", "T": ".tga"}[kind]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        done = run_povray([scene.name, *args, f"+F{kind}", f"+O{out}"], scene.parent)
        assert done.returncode == 0, done.stderr[-900:]
        return rows_of(out.with_suffix(suffix))


def options_of(scene: Path, args: Sequence[str]) -> PovOptions:
    """What povfarm makes of the command line; the system's INI file has no say in slices."""
    return read_command_line([scene.name, *args], scene.parent, {}, [])


def cuts(scene: Path, args: Sequence[str], count: int) -> List[int]:
    """Rows at which ``count`` slices begin (fewer when there are not as many blocks), and the end."""
    region = region_of(options_of(scene, args))
    blocks = -(-(region.bottom - region.top) // region.block)
    count = min(count, blocks)
    starts = [region.top + blocks * i // count * region.block for i in range(count)]
    return [*starts, region.bottom]


def together(scene: Path, args: Sequence[str], marks: Sequence[int], kind: str = "P") -> Rows:
    """The rows of the picture made of slices, some of which are rendered at a time."""
    options = options_of(scene, args)

    def slice_of(top: int, bottom: int) -> Rows:
        extra = [f"{key}={value}" for key, value in slice_values(options, top, bottom).items()]
        return render(scene, [*args, *extra], kind)[top:bottom]

    with ThreadPoolExecutor(4) as pool:  # POV-Ray sleeps most of its time in small pictures
        return [row for rows in pool.map(slice_of, marks, marks[1:]) for row in rows]


def difference(one: Rows, other: Rows) -> Difference:
    """How far two pictures are from each other."""
    assert [len(row) for row in one] == [len(row) for row in other]
    apart = [abs(a - b) for a, b in zip(b"".join(one), b"".join(other))]
    return max(apart), sum(map(bool, apart)) / len(apart)


def compared(scene: Path, args: Sequence[str], count: int, kind: str = "P") -> Difference:
    """How far a picture in ``count`` slices is from the whole one."""
    marks = cuts(scene, args, count)
    return difference(render(scene, args, kind)[marks[0] : marks[-1]], together(scene, args, marks, kind))


def table_row(scene: Path, size: List[str], counts: List[int], types: str) -> str:
    """One line of the table."""
    cells = []
    one, name = [*size, "+WT1"], scene.relative_to(EXAMPLES).with_suffix("")
    try:
        for more in KINDS.values():
            worst = max(compared(scene, [*one, *more], n, t) for n in counts for t in types)
            cells.append(worst)
        cells.append(difference(render(scene, [*one, "-A"]), render(scene, [*size, "+WT2", "-A"])))
    except AssertionError as error:
        return f"| {name} | failed: {' '.join(str(error).split()[-12:])} |"
    said = ["same" if not most else f"{most} ({share:.1%})" for most, share in cells]
    return f"| {name} | {' | '.join(said)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--size", default="80x61")
    parser.add_argument("--slices", default="2,3,7,16")
    parser.add_argument("--types", default="PNT")
    parser.add_argument("scenes", nargs="*", default=SCENES, metavar="SCENE")
    asked = parser.parse_args()
    width, height = asked.size.split("x")
    counts = [int(n) for n in asked.slices.split(",")]
    os.nice(10)
    print(f"| {asked.size}, {asked.slices} slices, {asked.types} | {' | '.join(KINDS)} | two threads |")
    print("|---" * (len(KINDS) + 2) + "|")
    with ThreadPoolExecutor(6) as pool:
        lines = pool.map(
            lambda name: table_row(EXAMPLES / name, [f"+W{width}", f"+H{height}"], counts, asked.types),
            asked.scenes,
        )
        for line in lines:
            print(line)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
