"""Makes a stand-in for POV-Ray that sleeps instead of rendering, so that speed can be set.

It reads the INI file that POVINI names, as povfarm writes it, prints POV-Ray's progress, keeps
a .pov-state of its blocks, goes on from one, and writes a black PNG.
"""

from __future__ import annotations

import inspect
import struct
import sys
from pathlib import Path
from typing import Sequence

STATE_HEADER = (b"POV-Ray Render State File\0\0\0" + b"0001").ljust(512, b"\0")


def make_block(number: int, top: int, bottom: int, width: int) -> bytes:
    """Return the message of a .pov-state for black rows, ``bottom`` not one of them."""
    pixels = (bottom - top) * width
    fields = [(b"MIDE", b"WXYZ", b"PxBS"), (b"PBlo", b"VFL4", bytes(20 * pixels))]
    fields += [(key, b"SIN4", struct.pack(">i", value)) for key, value in (
        (b"PiId", number), (b"PiSi", 1), (b"Left", 0), (b"Top ", top), (b"Righ", width - 1),
        (b"Bott", bottom - 1))]
    body = b"".join(struct.pack(">4s4sI", key, kind, len(data) // (4 if kind == b"VFL4" else 1))
                    + data for key, kind, data in fields)
    return struct.pack(">8sII8xI", b"POVRAYMS", 1, len(body) + 8, len(fields)) + body


SOURCE = '''#!{python} -SE
import fcntl, os, struct, sys, time, zlib
if "--version" in sys.argv:
    sys.exit(print("POV-Ray 3.7.0.99"))
ROWS, SPEED, PARSE = {rows!r}, {speed!r}, {parse!r}
ini = dict(line.strip().split("=", 1) for line in open(os.environ["POVINI"]))
width, height = int(ini["Width"]), int(ini["Height"])
top, bottom = int(ini.get("Start_Row", 1)) - 1, int(ini.get("End_Row", height))
size = int(ini.get("Render_Block_Size", 32))
name = ini["Output_File_Name"].strip('"')
state = os.path.splitext(name)[0] + ".pov-state"
assert width <= size, "one column of blocks"

{block}
blocks = [(first, min(first + size, bottom)) for first in range(top, bottom, size)]
time.sleep(0.3 + PARSE / SPEED)
done, total = 0, sum(last - first for first, last in blocks)
have = b""
if ini["Continue_Trace"] == "On":
    have = open(state, "rb").read()[512:]
else:
    open(state, "wb").write({header!r})
core = open(__file__)
fcntl.flock(core, fcntl.LOCK_EX)  # two runs of a worker do not render at once: it has one core
due = time.monotonic()
with open(state, "ab", 0) as kept:
    for number, (first, last) in enumerate(blocks):
        done += last - first
        data = make_block(number, first, last, width)
        if data in have:
            continue
        due += sum(ROWS[first:last]) / SPEED
        time.sleep(max(due - time.monotonic(), 0))
        kept.write(data)
        sys.stderr.write(f"Rendered {{done * width}} of {{total * width}} pixels "
                         f"({{100 * done // total}}%)\\r")
        sys.stderr.flush()
core.close()
rows = (b"\\0" + bytes(3 * width)) * height
chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
          (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
os.unlink(state)
sys.stderr.write("\\nTrace Time: done\\n")
sys.stderr.flush()
with open(name, "wb") as image:
    image.write(b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks))
time.sleep(0.3)
'''


def make_standin(directory: Path, rows: Sequence[float], speed: float, parse: float) -> Path:
    """Write a renderer that takes ``rows`` seconds for each row, divided by ``speed``."""
    directory.mkdir(parents=True)
    program = directory / "povray"
    program.write_text(SOURCE.format(
        python=sys.executable, header=STATE_HEADER, block=inspect.getsource(make_block),
        rows=[round(row, 6) for row in rows], speed=speed, parse=parse), encoding="utf-8")
    program.chmod(0o755)
    return program
