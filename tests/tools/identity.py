"""Puts pictures together from slices and compares them with the whole ones, by POV-Ray itself.

    python tests/tools/identity.py [--size WxH] [--slices N,N...] [--types LETTERS] [SCENE ...]

Every slice is a run of its own with the values that povfarm gives it. Prints a Markdown
table: the scenes, and for each kind of anti-aliasing how far the worst of its pictures is from
the whole (largest difference of a value, share of the values that differ), then the same for
a whole picture by two threads beside one by one thread. Ends with 1 when slices differ of a scene
that is the same by two threads, or a scene failed. Needs povray and povray-examples.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Sequence, Tuple

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.base import EXAMPLES, run_povray
from helpers.pictures import rows_of
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
    assert len(marks) > 2, "the picture is too small to be cut"
    return difference(render(scene, args, kind)[marks[0] : marks[-1]], together(scene, args, marks, kind))


def table_row(scene: Path, size: List[str], counts: List[int], types: str) -> Tuple[str, bool]:
    """One line of the table, and whether all is as it must be."""
    cells = []
    one, name = [*size, "+WT1"], scene.relative_to(EXAMPLES).with_suffix("")
    try:
        for more in KINDS.values():
            worst = max(compared(scene, [*one, *more], n, t) for n in counts for t in types)
            cells.append(worst)
        # On a busy computer one thread may make all of a picture before the other one begins.
        tries = 5 if any(most for most, _ in cells) else 1
        cells.append(max(difference(render(scene, [*one, "-A"]), render(scene, [*size, "+WT2", "-A"]))
                         for _ in range(tries)))
    except AssertionError as error:
        return f"| {name} | failed: {' '.join(str(error).split()[-12:])} |", False
    said = ["same" if not most else f"{most} ({share:.1%})" for most, share in cells]
    return f"| {name} | {' | '.join(said)} |", cells[-1][0] > 0 or not any(most for most, _ in cells)


def main() -> int:
    """Run the command line."""
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
        wrong = 0
        for line, good in lines:
            print(line if good else f"{line} WRONG", flush=True)
            wrong += not good
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
