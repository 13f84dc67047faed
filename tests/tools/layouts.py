"""Makes small projects in the layouts that people use, and renders each by povray and by povfarm.

    python tests/tools/layouts.py [--keep DIRECTORY] [PART OF A NAME ...]

Each is made twice; in one copy povray runs, in the other one `povfarm.py render`, with the same
arguments, in the same directory below, one command after the other. Both must end alike and leave
the same behind: files, pixels, directories, links, and the contents of all that a scene wrote.
Prints how they differ. Needs povray.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple, Union

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.base import POVFARM
from helpers.pictures import png_apart, png_of

SIZE = ["+W32", "+H24"]
DATE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ")  # as POV-Ray writes it into pictures
LONG = 300  # seconds after which something hangs
FONTS = "/usr/share/fonts/truetype/povray"
INCLUDES = "/usr/share/povray-3.7/include"


class Link(str):
    """A symbolic link to this target."""


class Pipe(str):
    """A named pipe."""


class Sparse(int):
    """A file of so many bytes, none of which takes room."""


Content = Union[str, bytes, Link, Pipe, Sparse, None]  # None: an empty directory


@dataclasses.dataclass(frozen=True)
class Layout:
    """What lies there, and what is typed. ``@`` is the top of the project, as an absolute path.

    ``told``: where a farm must differ, what it says; then it changes nothing. ``says``: what it
    prints though all else is the same. ``growing``: a file that something else writes meanwhile.
    """

    files: Mapping[str, Content]
    runs: Tuple[str, ...]
    cwd: str = "."
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    told: str = ""
    says: str = ""
    growing: str = ""
    stdout: bool = False  # the picture goes there
    kinder: bool = False  # POV-Ray fails, and a farm need not


def png(color: int, width: int = 8, height: int = 8) -> bytes:
    """Return a picture of two colours, made of a number."""
    pair = bytes([color & 255, color >> 8 & 255, color >> 16 & 255, 255, 200, 40])
    rows = (b"\0" + pair * (width // 2)) * height
    return png_of(rows, width, height)


HEAD = """#version 3.7;
global_settings { assumed_gamma 1 }
camera { location <0, 0, -5> look_at 0 }
light_source { <2, 4, -3> 1 }
"""
BALL = HEAD + "sphere { 0, 1 pigment { rgb 1 } }\n"
MOVES = HEAD + "sphere { <clock - 0.5, 0, 0>, 1 pigment { rgb <1, clock, 0.5> } }\n"
COLORED = HEAD + "sphere { 0, 1 pigment { rgb C } }\n"


def lib(color: str = "<1, 0, 0>") -> str:
    """Return an include file that sets the colour of COLORED."""
    return f"#declare C = {color};\n"


def uses(*includes: str, scene: str = COLORED) -> str:
    """Return a scene that includes files."""
    return "".join(f'#include "{name}"\n' for name in includes) + scene


def shows(name: str, kind: str = "png") -> str:
    """Return a scene with a picture, whose name is an expression."""
    return HEAD + (f"box {{ <-1, -1, 0>, 1 texture {{ pigment {{ image_map {{ {kind} {name} }} }} "
                   "finish { ambient 1 } } }\n")


def row_of(name: str) -> str:
    """Return a scene with four pictures whose names are computed."""
    return HEAD + (
        "#for (I, 1, 4) box { <I - 3, -1, 0>, <I - 2.1, 1, 1> texture { pigment { image_map { png "
        f'concat("{name}", str(I, 0, 0), ".png") }} }} finish {{ ambient 1 }} }} }}\n#end\n')


def four(name: str) -> Dict[str, Content]:
    """Return the four pictures of ``row_of``."""
    return {f"{name}{number}.png": png(number * 0x302010) for number in range(1, 5)}


def writes(name: str, text: str, how: str = "write") -> str:
    """Return the statements that write a text file; name and text are expressions."""
    return f"#fopen F {name} {how} #write (F, {text}) #fclose F\n"


NUMBER = "str(frame_number, 0, 0)"
AT = HEAD + "sphere { <Pos - 1, 0, 0>, 0.5 pigment { rgb 1 } }\n"
STATE = ('#if (file_exists("pos.txt")) #fopen F "pos.txt" read #read (F, Pos) #fclose F '
         "#else #declare Pos = 0; #end\n#declare Pos = Pos + 0.2;\n" + writes('"pos.txt"', "Pos"))
LOG = writes('"log.txt"', f'"frame ", {NUMBER}, "\\n"', "append")
RADIOSITY = BALL + (
    "global_settings { radiosity { pretrace_end 0.04 count 20 } }\nplane { y, -1 pigment { rgb 1 } }\n")
PHOTONS = BALL + ("global_settings { photons { spacing 0.2 %s } }\nsphere { <2, 0, 0>, 0.5 photons { "
                  "target reflection on refraction on } pigment { rgbt 1 } interior { ior 1.5 } }\n")
LETTER = HEAD + 'text { ttf "%s" "A" 0.1, 0 pigment { rgb 1 } }\n'
TREE = ('#if (!file_exists("tree.inc"))\n#declare S = seed(frame_number);\n'
        '#fopen F "tree.inc" write #write (F, "#declare Tree = union {")\n#for (I, 1, 9) '
        '#write (F, "sphere { <", rand(S) * 2 - 1, ",", rand(S) * 2 - 1, ",0>, 0.3 }") #end\n'
        '#write (F, "}") #fclose F\n#end\n#include "tree.inc"\n'
        + HEAD + "object { Tree pigment { rgb 1 } }\n")

# --- what was seen in the field

FIELD: Dict[str, Layout] = {
    "01a state in a text file": Layout({"walk.pov": STATE + AT}, ("walk.pov +KFF12",)),
    "01b state in an include": Layout({"walk.pov": (
        '#if (frame_number > 1) #include "state.inc" #else #declare Pos = 0; #end\n'
        "#declare Pos = Pos + 0.2;\n"
        + writes('"state.inc"', '"#declare Pos = ", str(Pos, 0, 4), ";\\n"') + AT)},
        ("walk.pov +KFF12",)),
    "01d a cache made once": Layout({"forest.pov": TREE}, ("forest.pov +KFF12",)),
    "02 an include in the parent": Layout(
        {"scenes/ball.pov": uses("../lib.inc"), "lib.inc": lib()}, ("ball.pov",), "scenes"),
    "03a a scene in a subdirectory": Layout(
        {"scenes/row.pov": row_of("textures/t"), **four("textures/t")}, ("scenes/row.pov",)),
    "03b computed names in a library path": Layout(
        {"proj/row.pov": row_of("w"), **four("lib/w")}, ("row.pov +L../lib",), "proj"),
    "03c a directory called frames": Layout(
        {"row.pov": row_of("video-frames/f"), **four("video-frames/f")}, ("row.pov",)),
    "03e a hidden directory": Layout({"row.pov": row_of(".tex/t"), **four(".tex/t")}, ("row.pov",)),
    "03g an include header": Layout(
        {"sub/ball.pov": COLORED, "common.inc": lib()}, ("sub/ball.pov +HIcommon.inc",)),
    "03h a font with its full path": Layout(
        {"letter.pov": LETTER % f"{FONTS}/timrom.ttf"}, ("letter.pov",)),
    "03h a font with its full path in a condition": Layout(
        {"letter.pov": LETTER.replace("text", "#if (1) text") % f"{FONTS}/timrom.ttf" + "#end"},
        ("letter.pov",)),
    "03h a standard include with its full path": Layout(
        {"a.pov": uses(f"{INCLUDES}/colors.inc", scene=COLORED.replace("rgb C", "Red"))},
        ("a.pov",)),
    "04a a file beside the project": Layout({
        "proj/ball.pov": '#declare C = 1;\n#if (file_exists("../site.inc")) #include "../site.inc" '
        "#end\n" + COLORED, "site.inc": lib()}, ("ball.pov",), "proj"),
    "04a a computed name beside the scene's directory": Layout({
        "sc/ball.pov": '#declare C = 1;\n#declare N = "site";\n#if (file_exists(concat(N, ".inc")))'
        ' #include concat(N, ".inc") #end\n' + COLORED, "site.inc": lib()}, ("sc/ball.pov",)),
    "05 a log of a still": Layout({"ball.pov": LOG + BALL, "log.txt": "old\n"}, ("ball.pov",)),
    "05 a log of an animation": Layout(
        {"ball.pov": LOG + MOVES, "log.txt": "old\n"}, ("ball.pov +KFF4",)),
    "05 a log of an animation that is there not yet": Layout(
        {"ball.pov": LOG + MOVES}, ("ball.pov +KFF12",)),
    "06 radiosity that is saved": Layout(
        {"room.pov": RADIOSITY}, ("room.pov +W64 +H48 +WT1 +RFO +RFs.rca",)),
    "06 radiosity of an animation that is saved": Layout(
        {"room.pov": RADIOSITY}, ("room.pov +KFF2 +WT1 +RFO +RFs.rca",)),
    "07 an empty directory": Layout(
        {"mesh.pov": writes('"meshes/m.inc"', '"// made\\n"') + BALL, "meshes": None},
        ("mesh.pov",)),
    "07 a directory with a .gitkeep": Layout(
        {"mesh.pov": writes('"meshes/m.inc"', '"// made\\n"') + BALL, "meshes/.gitkeep": ""},
        ("mesh.pov",)),
    "07 radiosity saved into an empty directory": Layout(
        {"room.pov": RADIOSITY, "cache": None}, ("room.pov +WT1 +RFO +RFcache/s.rca",)),
    "08 a file that grows meanwhile": Layout(
        {"ball.pov": BALL}, ("ball.pov", "ball.pov", "ball.pov"), growing="live.log"),
    "09 what is there is not rendered again": Layout(
        {"ball.pov": MOVES.replace("clock - 0.5", "X")},
        ("ball.pov +KFF5 +SF1 +EF3 Declare=X=0", "ball.pov +KFF5 Declare=X=1 +C")),
    "11 a scene that writes 1200 files": Layout({"many.pov": BALL + (
        "#for (I, 1, 1200)\n" + writes('concat("p", str(I, 0, 0), ".inc")', '"x"') + "#end\n")},
        ("many.pov",)),
    "11 a scene that writes a hidden file": Layout(
        {"dot.pov": writes('".cache"', '"x"') + BALL}, ("dot.pov",)),
    "12 debug text of a still": Layout(
        {"a.pov": '#debug "volume: 4.18\\n"\n#warning "the wall is thin"\n' + BALL}, ("a.pov",),
        says=r"volume: 4\.18(.|\n)*the wall is thin"),
    "13 a Windows path in an INI file": Layout({"ball.pov": BALL, "ball.ini": (
        'Input_File_Name=ball.pov\nOutput_File_Name="D:\\My Pics\\"\n')}, ("ball.ini",),
        told=r"ball\.ini.*2.*Windows"),
    "14 an INI file with a byte order mark": Layout({"ball.pov": BALL, "ball.ini": (
        b"\xef\xbb\xbf; by Notepad\r\nInput_File_Name=ball.pov\r\n")}, ("ball.ini",),
        says="byte order mark", kinder=True),
    "14 an INI file in Latin-1": Layout({"ball.pov": BALL, "latin1.ini": (
        b"; gr\xf6\xdfer\r\nInput_File_Name=ball.pov\r\nOutput_File_Name=gr\xf6\xdfe\r\n")},
        ("latin1.ini",), kinder=True),
    "15 a picture to stdout": Layout({"ball.pov": BALL}, ("ball.pov +FP +O-",), stdout=True),
}

# --- where files are

PLACES: Dict[str, Layout] = {
    "library beside the examples": Layout(
        {"examples/a.pov": uses("box.inc"), "src/mylib/box.inc": uses("mylib/deep.inc", scene=""),
         "src/mylib/deep.inc": lib()}, ("a.pov +L../src +L../src/mylib",), "examples"),
    "library beside the examples, written out": Layout(
        {"examples/a.pov": uses("../src/box.inc"),
         "src/box.inc": '#declare D = "../src/";\n#include concat(D, "deep.inc")\n',
         "src/deep.inc": lib()}, ("a.pov",), "examples"),
    "scenes, textures, includes": Layout(
        {"scenes/a.pov": uses("my.inc", scene=shows("concat(N, Suffix)")), "textures/wood.png": png(7),
         "includes/my.inc": '#declare N = "textures/wood";\n#declare Suffix = ".png";\n'},
        ("+Iscenes/a.pov +Lincludes +Orenders/",), environ={}),
    "scenes, textures, includes, with a directory for the pictures": Layout(
        {"scenes/a.pov": uses("my.inc", scene=shows("concat(N, Suffix)")), "textures/wood.png": png(7),
         "includes/my.inc": '#declare N = "wood";\n#declare Suffix = ".png";\n', "renders": None},
        ("+Iscenes/a.pov +Lincludes +Ltextures +Orenders/",)),
    "inside of scenes": Layout(
        {"scenes/a.pov": shows('concat("../textures/", N)').replace(HEAD, uses("my.inc", scene=HEAD)),
         "textures/wood.png": png(7), "includes/my.inc": '#declare N = "wood.png";\n'},
        ("a.pov +L../includes",), "scenes"),
    "INI file in the parent directory": Layout(
        {"scenes/a.pov": MOVES, "film.ini": "Final_Frame=3\nOutput_File_Name=../out/\n", "out": None},
        ("../film.ini +Ia.pov",), "scenes"),
    "INI file beside the scene, started above": Layout(
        {"scenes/a.pov": MOVES, "scenes/film.ini": "Input_File_Name=scenes/a.pov\nFinal_Frame=3\n"},
        ("scenes/film.ini",)),
    "INI file that names the scene from its own place, started above": Layout(
        {"scenes/a.pov": MOVES, "scenes/film.ini": "Input_File_Name=a.pov\nFinal_Frame=3\n"},
        ("scenes/film.ini",)),
    "the same with a library path": Layout(
        {"scenes/a.pov": MOVES, "scenes/film.ini": "Input_File_Name=a.pov\nFinal_Frame=3\n"},
        ("scenes/film.ini +Lscenes",)),
    "one INI file for many scenes": Layout(
        {"one.pov": MOVES, "two.pov": BALL, "all.ini": (
            "Width=32\nHeight=24\n[one]\nInput_File_Name=one.pov\nFinal_Frame=2\n"
            "[two]\nInput_File_Name=two.pov\nOutput_File_Name=second\n")},
        ("all.ini[one]", "all.ini[two]", "all[two] +Othird")),
    "two INI files and a scene": Layout(
        {"a.pov": MOVES, "small.ini": "Width=16\nHeight=12\n", "fine.ini": "Antialias=On\n+A0.1\n"},
        ("fine.ini small a.pov",)),
    "an INI file that names another": Layout(
        {"a.pov": MOVES, "base.ini": "Final_Frame=2\n", "film.ini": "base.ini\nInput_File_Name=a.pov\n"},
        ("film.ini",)),
    "textures by a link to a directory outside": Layout(
        {"proj/row.pov": row_of("textures/t"), "proj/textures": Link("../shared/textures"),
         **four("shared/textures/t")}, ("row.pov",), "proj"),
    "an include by a link with its full path": Layout(
        {"proj/a.pov": uses("lib.inc"), "proj/lib.inc": Link("@/shared/lib.inc"),
         "shared/lib.inc": lib()}, ("a.pov",), "proj"),
    "a scene that is a link": Layout(
        {"proj/a.pov": Link("../shared/b.pov"), "shared/b.pov": uses("lib.inc"),
         "proj/lib.inc": lib()}, ("a.pov",), "proj"),
    "a current directory that is a link": Layout(
        {"here": Link("deep/proj"), "deep/proj/a.pov": uses("../lib.inc"), "deep/lib.inc": lib(),
         "lib.inc": lib("<0, 1, 0>")}, ("a.pov",), "here"),
    "a picture that is a link": Layout(
        {"proj/a.pov": BALL, "proj/a.png": Link("../gallery/a.png"), "gallery/a.png": png(1),
         "proj/b.png": Link("../gallery/b.png")}, ("a.pov", "a.pov +Ob"), "proj"),
    "a directory for pictures that is a link": Layout(
        {"proj/a.pov": MOVES, "proj/out": Link("../disk"), "disk": None},
        ("a.pov +Oout/ +KFF3",), "proj"),
    "a directory for written files that is a link": Layout(
        {"proj/a.pov": writes('"cache/n.txt"', '"x"') + BALL, "proj/cache": Link("../disk"),
         "disk": None}, ("a.pov",), "proj"),
    "a written file that is a link": Layout(
        {"proj/a.pov": LOG + writes('"n.txt"', '"x"') + BALL, "proj/log.txt": Link("../disk/l.txt"),
         "proj/n.txt": Link("../disk/n.txt"), "disk/l.txt": "old\n", "disk/n.txt": "old\n"},
        ("a.pov",), "proj"),
    "a scene with its full path": Layout(
        {"scenes/a.pov": uses("lib.inc"), "work/lib.inc": lib()}, ("@/scenes/a.pov",), "work"),
    "a scene in the parent directory": Layout(
        {"a.pov": uses("lib.inc"), "work/lib.inc": lib()}, ("../a.pov",), "work"),
    "an include with its full path": Layout(
        {"proj/a.pov": uses("@/other/lib.inc"), "other/lib.inc": lib()}, ("a.pov",), "proj"),
    "a computed name with its full path": Layout(
        {"proj/a.pov": shows('concat("@/other/", "w", ".png")'), "other/w.png": png(9)},
        ("a.pov",), "proj"),
    "pictures to a full path": Layout(
        {"proj/a.pov": MOVES, "out": None}, ("a.pov +O@/out/ +KFF2", "a.pov +O@/out/still"), "proj"),
    "pictures beside the project": Layout(
        {"proj/a.pov": MOVES, "out": None}, ("a.pov +O../out/ball +KFF2",), "proj"),
    "a written file beside the project": Layout(
        {"proj/a.pov": writes('"../log/n.txt"', '"x"') + BALL, "log": None}, ("a.pov",), "proj"),
    "a written file with its full path": Layout(
        {"proj/a.pov": writes('"@/log/n.txt"', '"x"') + BALL, "log": None}, ("a.pov",), "proj",
        told="--unconfined"),
    "a log beside the project": Layout(
        {"proj/a.pov": LOG.replace("log.txt", "../log.txt") + MOVES, "log.txt": "old\n"},
        ("a.pov +KFF3",), "proj"),
    "hidden names everywhere": Layout(
        {".w/.a.pov": uses(".l/.lib.inc"), ".w/.l/.lib.inc": lib()}, (".a.pov +O.b.png",), ".w"),
    "frames into a directory called frames": Layout(
        {"a.pov": MOVES, "a-frames/old.txt": "mine\n"}, ("a.pov +Oa-frames/ +KFF3",)),
    "frames made of frames": Layout(
        {"a.pov": MOVES, "b.pov": shows(f'concat("a-frames/a", {NUMBER}, ".png")'), "a-frames": None},
        ("a.pov +KFF3 +Oa-frames/", "b.pov +KFF3")),
    "a texture called as a picture of the scene": Layout(
        {"tile.pov": shows('concat("tile", "1", ".png")'), "tile1.png": png(5)}, ("tile.pov",)),
    "a scene that shows its own last picture": Layout(
        {"a.pov": shows('concat("a", ".png")'), "a.png": png(5)}, ("a.pov", "a.pov")),
    "pictures of one scene are textures of another": Layout(
        {"tex.pov": BALL, "main.pov": shows('"tex.png"')}, ("tex.pov", "main.pov")),
    "a library path in the environment": Layout(
        {"proj/a.pov": uses("lib.inc"), "lib/lib.inc": lib()}, ("a.pov",), "proj",
        {"POVINC": "@/lib"}),
    "a povray.ini in the current directory": Layout(
        {"a.pov": uses("lib.inc"), "lib/lib.inc": lib(),
         "povray.ini": "Width=20\nHeight=10\nLibrary_Path=lib\n"}, ("a.pov",)),
    "an INI file named by POVINI": Layout(
        {"a.pov": uses("lib.inc"), "etc/lib.inc": lib(), "etc/my.ini": "Library_Path=@/etc\n"},
        ("a.pov",), environ={"POVINI": "@/etc/my.ini"}),
    "an INI file in the home": Layout(
        {"work/a.pov": uses("lib.inc"), "lib/lib.inc": lib(),
         ".povray/3.7/povray.ini": "Library_Path=@/lib\nOutput_File_Type=P\n"}, ("a.pov",), "work",
        {"HOME": "@"}),
    "a library in the home": Layout(
        {"work/a.pov": uses("lib.inc"), "povlib/lib.inc": lib(), ".secret/x": "x"},
        ("a.pov +L@/povlib",), "work", {"HOME": "@"}),
    "a font of the home": Layout(
        {"work/a.pov": LETTER % "@/.fonts/mine.ttf", ".fonts/mine.ttf": Path(
            FONTS, "timrom.ttf").read_bytes() if Path(FONTS).exists() else b""}, ("a.pov",), "work",
        {"HOME": "@"}),
    "a scene in the home itself": Layout(
        {"a.pov": uses("lib.inc"), "lib.inc": lib(), ".bashrc": "x"}, ("a.pov",), ".", {"HOME": "@"}),
    "a project in a hidden directory of the home": Layout(
        {".work/proj/a.pov": uses("lib.inc"), ".work/proj/lib.inc": lib()}, ("a.pov",), ".work/proj",
        {"HOME": "@"}),
    "a library path of the positional kind": Layout(
        {"a.pov": uses("lib.inc"), "lib/lib.inc": lib()}, ("lib/ a.pov",)),
    "library paths that are not there": Layout(
        {"a.pov": BALL, "film.ini": "Input_File_Name=a.pov\nLibrary_Path=/povlib\nLibrary_Path=gone\n"},
        ("film.ini",)),
    "a dangling link, a pipe and a loop": Layout(
        {"row.pov": row_of("tex/t"), **four("tex/t"), "gone": Link("nowhere"), "pipe": Pipe(),
         "loop": Link("loop"), "tex/up": Link("..")}, ("row.pov",)),
    "a film of 3 GB beside the scene": Layout(
        {"row.pov": row_of("tex/t"), **four("tex/t"), "film.mkv": Sparse(3 << 30)}, ("row.pov",)),
    "1200 files beside the scene": Layout(
        {"row.pov": row_of("tex/t"), **four("tex/t"),
         **{f"photos/{number}.jpg": "x" for number in range(1200)}}, ("row.pov",)),
    "thirty directories deep": Layout(
        {"d/" * 30 + "a.pov": uses("../" * 30 + "lib.inc"), "lib.inc": lib()}, ("a.pov",), "d/" * 30),
}

# --- names

NAMES: Dict[str, Layout] = {
    "blanks": Layout(
        {"my scene.pov": uses("my stuff/my lib.inc"), "my stuff/my lib.inc": lib()},
        ("""'+I"my scene.pov"' '+O"my picture.png"'""", """'"my scene.pov"' +KFF2""")),
    "blanks in an INI file": Layout(
        {"my scene.pov": uses("lib.inc"), "my lib/lib.inc": lib(), "my film.ini": (
            'Input_File_Name="my scene.pov"\nLibrary_Path="my lib"\nOutput_File_Name=my out/\n'),
         "my out": None}, ("""'"my film.ini"'""", "'my film.ini'")),
    "quotes": Layout(
        {"it's.pov": uses("o'neil/l'ib.inc"), "o'neil/l'ib.inc": lib()}, ("""'+I"it'"'"'s.pov"'""",)),
    "umlauts above the project": Layout(
        {"Büro/Entwürfe/a.pov": uses("../lib.inc"), "Büro/lib.inc": lib()}, ("a.pov",),
        "Büro/Entwürfe"),
    "umlauts in a library path": Layout(
        {"a.pov": uses("lib.inc"), "möbel/lib.inc": lib()}, ("a.pov +Lmöbel",), kinder=True),
    "umlauts in a written name": Layout(
        {"a.pov": writes('"größe.txt"', '"x"') + BALL}, ("a.pov",)),
    "Latin-1 names beside the scene": Layout(
        {"a.pov": BALL, "caf\udce9.txt": "x", "b\udcfcro/\udce4.png": png(1)}, ("a.pov",)),
    "a directory with a Latin-1 name": Layout(
        {"b\udcfcro/a.pov": uses("../lib.inc"), "lib.inc": lib()}, ("a.pov",), "b\udcfcro",
        told="is not UTF-8: rename it"),
    "a Latin-1 name written by a scene": Layout(
        {"a.pov": b'#fopen F "caf\xe9.txt" write #write (F, "x") #fclose F\n' + BALL.encode()},
        ("a.pov",)),
    "a Latin-1 name in a scene": Layout(
        {"a.pov": b'#include "t\xfcr.inc"\n' + COLORED.encode(), "t r.inc": lib(),
         "t\udcfcr.inc": lib("<0, 1, 0>")}, ("a.pov",)),
    "Latin-1 comments": Layout(
        {"a.pov": b"// gr\xf6\xdfer\n" + uses("lib.inc").encode(),
         "lib.inc": b"/* f\xfcr alle */ " + lib().encode(),
         "film.ini": b"; f\xfcr alle\nInput_File_Name=a.pov\n"}, ("film.ini",)),
    "Latin-1 text": Layout(
        {"a.pov": HEAD.encode() + b'text { ttf "cyrvetic.ttf" "\xe4\xf6" 0.1, 0 pigment { rgb 1 } }'},
        ("a.pov",)),
    "lines of Windows": Layout(
        {"a.pov": uses("lib.inc").replace("\n", "\r\n"), "lib.inc": lib().replace("\n", "\r\n"),
         "film.ini": "; film\r\nInput_File_Name=a.pov\r\n[wide]\r\nWidth=40\r\n"},
        ("film.ini[wide]",)),
    "lines of an old Mac": Layout(
        {"a.pov": uses("lib.inc").replace("\n", "\r"), "lib.inc": lib().replace("\n", "\r")},
        ("a.pov",)),
    "the end sign of DOS": Layout(
        {"a.pov": uses("lib.inc") + "\x1a", "lib.inc": lib() + "\x1a"}, ("a.pov",)),
    "a byte order mark in a scene": Layout(
        {"a.pov": "\ufeff" + uses("lib.inc"), "lib.inc": lib()}, ("a.pov",)),
    "capital letters": Layout(
        {"BALL.POV": uses("LIB.INC", scene=shows('"TEX.PNG"')), "LIB.INC": lib(), "TEX.PNG": png(3),
         "FILM.INI": "INPUT_FILE_NAME=BALL.POV\nFINAL_FRAME=2\n"}, ("+IBALL.POV", "FILM.INI")),
    "capital letters that are completed": Layout(
        {"a.pov": uses("LIB", scene=shows('"tex"')), "LIB.INC": lib(), "tex.PNG": png(3)},
        ("a.pov",)),
    "a scene named without its extension": Layout({"a.pov": BALL}, ("+Ia", "+Ia +Ob")),
    "a scene of another extension": Layout(
        {"a.inc": BALL, "b.txt": BALL}, ("+Ia.inc", "+Ib.txt +KFF2")),
    "signs of shells and INI files": Layout(
        {f"{name}.pov": BALL for name in ("a (copy)", "b&c", "50%", "d$e", "f+g", "h~", "i,j", "k@l")},
        ("""'+I"a (copy).pov"'""", "+Ib\\&c.pov", "+I50%.pov", "'+Id$e.pov'", "+If+g.pov", "+Ih~.pov",
         "+Ii,j.pov", "+Ik@l.pov")),
    "brackets": Layout({"a[1].pov": BALL}, ("""'+I"a[1].pov"'""",)),
    "comment signs in names": Layout(
        {"a;b.pov": BALL, "c#d.pov": BALL}, ("""'+I"a;b.pov"'""", """'+I"c#d.pov"'""")),
    "dots in names": Layout(
        {"v1.2.pov": MOVES}, ("v1.2.pov", "v1.2.pov +Oo1.3 +KFF2", "v1.2.pov +O./o.png")),
    "long names": Layout(
        {f"{'n' * 150}.pov": uses(f"{'l' * 200}.inc"), f"{'l' * 200}.inc": lib()},
        (f"+I{'n' * 150}.pov +KFF2",)),
    "names of commands": Layout(
        {"work.pov": BALL, "render": None, "serve.ini": "Input_File_Name=work.pov\n"},
        ("work.pov", "serve.ini", "serve +Ox")),
    "a file called povray": Layout(
        {"a.pov": BALL, "povray": "#!/bin/sh\nexit 3\n", "povfarm.py": "raise SystemExit(3)\n",
         "json.py": "raise SystemExit(3)\n"}, ("a.pov",)),
}

# --- what a scene writes and reads again

FILES: Dict[str, Layout] = {
    "a counter of stills": Layout(
        {"a.pov": STATE + AT}, ("a.pov", "a.pov +Ob", "a.pov +Oc")),
    "a counter in an include that is there": Layout(
        {"a.pov": '#include "n.inc"\n' + writes('"n.inc"', '"#declare Pos = ", Pos + 1, ";"') + AT,
         "n.inc": "#declare Pos = 0;"}, ("a.pov", "a.pov +Ob")),
    "a state over two runs": Layout(
        {"a.pov": STATE + AT}, ("a.pov +KFF6 +EF3", "a.pov +KFF6 +SF4")),
    "a state in numbered files": Layout(
        {"a.pov": ('#declare N = concat("s", str(frame_number - 1, 0, 0), ".txt");\n'
                   "#if (file_exists(N)) #fopen F N read #read (F, Pos) #fclose F "
                   "#else #declare Pos = 0; #end\n#declare Pos = Pos + 0.2;\n"
                   + writes(f'concat("s", {NUMBER}, ".txt")', "Pos") + AT)}, ("a.pov +KFF8",)),
    "a state in numbered includes": Layout(
        {"a.pov": ("#if (frame_number > 1) #include concat(\"s\", str(frame_number - 1, 0, 0), "
                   '".inc") #else #declare Pos = 0; #end\n#declare Pos = Pos + 0.2;\n'
                   + writes(f'concat("s", {NUMBER}, ".inc")', '"#declare Pos = ", Pos, ";"') + AT)},
        ("a.pov +KFF8",)),
    "a state in a file of a computed name": Layout(
        {"a.pov": '#declare N = concat("po", "s.txt");\n' + STATE.replace('"pos.txt"', "N") + AT},
        ("a.pov +KFF8",)),
    "a state kept by a library": Layout(
        {"film/a.pov": uses("state.inc", scene=AT), "lib/state.inc": STATE}, ("a.pov +KFF8 +L../lib",),
        "film"),
    "a state kept by a macro": Layout(
        {"a.pov": "#macro Step(N, V) #if (file_exists(N)) #fopen F N read #read (F, V) #fclose F #end\n"
         "#declare V = V + 0.2; #fopen F N write #write (F, V) #fclose F #end\n"
         '#declare Pos = 0;\nStep("pos.txt", Pos)\n' + AT}, ("a.pov +KFF8",)),
    "a state in an existing directory": Layout(
        {"a.pov": STATE.replace("pos.txt", "state/pos.txt") + AT, "state": None}, ("a.pov +KFF8",)),
    "a state that is there": Layout(
        {"a.pov": STATE + AT, "pos.txt": "0.5"}, ("a.pov +KFF8",)),
    "all computed in the first frame": Layout(
        {"a.pov": "#if (frame_number = 1)\n" + writes('"points.txt"', '"0.3, 0.7"') + "#end\n"
         '#fopen F "points.txt" read #read (F, Pos, B) #fclose F\n' + AT}, ("a.pov +KFF8",)),
    "all computed in the first frame, by its clock": Layout(
        {"a.pov": "#if (clock = 0)\n" + writes('"tab.inc"', '"#declare Pos = 0.7;"') + "#end\n"
         '#include "tab.inc"\n' + AT}, ("a.pov +KFF8",)),
    "a cache of another name in every frame": Layout(
        {"a.pov": f'#declare N = concat("c", {NUMBER}, ".inc");\n#if (!file_exists(N))\n'
         + writes("N", '"#declare Pos = ", clock, ";"') + "#end\n#include N\n" + AT},
        ("a.pov +KFF4", "a.pov +KFF4")),
    "a file that all frames write and read": Layout(
        {"a.pov": writes('"t.inc"', '"#declare Pos = ", clock, ";"') + '#include "t.inc"\n' + AT},
        ("a.pov +KFF6",)),
    "a file that is there, written anew and read": Layout(
        {"a.pov": writes('"t.inc"', '"#declare Pos = ", clock, ";"') + '#include "t.inc"\n' + AT,
         "t.inc": "#declare Pos = 9;"}, ("a.pov +KFF3",)),
    "the picture before": Layout(
        {"a.pov": "#if (frame_number > 1)\n" + shows(
            'concat("a", str(frame_number - 1, 0, 0), ".png")') + "#else\n" + BALL + "#end\n"},
        ("a.pov +KFF6",)),
    "the picture before, if it is there": Layout(
        {"a.pov": '#declare N = concat("a", str(frame_number - 1, 0, 0), ".png");\n'
         "#if (file_exists(N))\n" + shows("N") + "#else\n" + BALL + "#end\n"}, ("a.pov +KFF6",)),
    "the picture before, in a directory": Layout(
        {"a.pov": "#if (frame_number > 1)\n" + shows(
            'concat("out/f", str(frame_number - 1, 0, 0), ".png")') + "#else\n" + BALL + "#end\n",
         "out": None}, ("a.pov +KFF6 +Oout/f",)),
    "a log with a heading": Layout(
        {"a.pov": '#if (!file_exists("l.csv")) ' + writes('"l.csv"', '"frame,clock\\n"') + "#end\n"
         + writes('"l.csv"', f'{NUMBER}, ",", str(clock, 0, 3), "\\n"', "append") + MOVES},
        ("a.pov +KFF12",)),
    "a log of two runs": Layout(
        {"a.pov": LOG + MOVES}, ("a.pov +KFF6 +EF3", "a.pov +KFF6 +SF4")),
    "a log of a computed name": Layout(
        {"a.pov": '#declare N = concat("log", ".txt");\n' + LOG.replace('"log.txt"', "N") + MOVES,
         "log.txt": "old\n"}, ("a.pov +KFF6",)),
    "a log in a directory": Layout(
        {"a.pov": LOG.replace("log.txt", "logs/a/l.txt") + MOVES, "logs/a/l.txt": "old\n"},
        ("a.pov +KFF6",)),
    "a log in an empty directory": Layout(
        {"a.pov": LOG.replace("log.txt", "logs/l.txt") + MOVES, "logs": None}, ("a.pov +KFF6",)),
    "a log of every frame": Layout(
        {"a.pov": LOG.replace('"log.txt"', f'concat("l", {NUMBER}, ".txt")') + MOVES,
         "l2.txt": "old\n"}, ("a.pov +KFF4", "a.pov +KFF4")),
    "a log written by a macro": Layout(
        {"a.pov": '#macro Log(N, T) #fopen F N append #write (F, T, "\\n") #fclose F #end\n'
         'Log("log.txt", "one")\nLog("log.txt", str(clock, 0, 3))\n' + MOVES, "log.txt": "old\n"},
        ("a.pov +KFF6",)),
    "a log that is read": Layout(
        {"a.pov": writes('"n.txt"', '"1,"', "append") + '#fopen F "n.txt" read #declare Pos = -0.1;\n'
         "#while (defined(F)) #read (F, V) #declare Pos = Pos + V / 10; #end\n" + AT},
        ("a.pov +KFF6",)),
    "a file in every frame": Layout(
        {"a.pov": writes('concat("data/f", str(frame_number, -3, 0), ".csv")', "clock") + MOVES,
         "data": None}, ("a.pov +KFF6",)),
    "a file that gets shorter": Layout(
        {"a.pov": writes('"n.txt"', '"short"') + BALL, "n.txt": "something longer\n"}, ("a.pov",)),
    "a file that becomes empty": Layout(
        {"a.pov": '#fopen F "n.txt" write #fclose F\n' + BALL, "n.txt": "something\n"}, ("a.pov",)),
    "a file that is not closed": Layout(
        {"a.pov": '#fopen F "n.txt" write #write (F, "x")\n' + BALL}, ("a.pov",)),
    "a file that is opened for more and not written": Layout(
        {"a.pov": '#fopen F "n.txt" append #fclose F\n' + BALL, "n.txt": "old\n"}, ("a.pov",)),
    "a file whose directory is missing": Layout(
        {"a.pov": writes('"gone/n.txt"', '"x"') + BALL}, ("a.pov",)),
    "written and failed": Layout(
        {"a.pov": writes('"n.txt"', '"x"') + LOG + '#error "no"\n' + BALL, "log.txt": "old\n"},
        ("a.pov",)),
    "written by a scene that makes no picture": Layout(
        {"a.pov": writes('"n.txt"', '"x"') + BALL}, ("a.pov -F",)),
    "a written scene that is rendered then": Layout(
        {"gen.pov": writes('"made.pov"', '"sphere { 0, 1 pigment { rgb x } finish { ambient 1 } } '
                           'camera { location -3 * z look_at 0 }"') + BALL}, ("gen.pov", "made.pov")),
    "photons saved and loaded": Layout(
        {"a.pov": '#if (file_exists("p.ph"))\n' + PHOTONS % 'load_file "p.ph"' + "#else\n"
         + PHOTONS % 'save_file "p.ph"' + "#end\n"}, ("a.pov +WT1", "a.pov +WT1 +Ob")),
    "photons of an animation saved once": Layout(
        {"a.pov": '#if (file_exists("p.ph"))\n' + PHOTONS % 'load_file "p.ph"' + "#else\n"
         + PHOTONS % 'save_file "p.ph"' + "#end\n"}, ("a.pov +WT1 +KFF4",)),
    "photons in a directory": Layout(
        {"a.pov": PHOTONS % 'save_file "maps/p.ph"', "b.pov": PHOTONS % 'load_file "maps/p.ph"',
         "maps": None}, ("a.pov +WT1", "b.pov +WT1")),
    "photons of a computed name": Layout(
        {"a.pov": PHOTONS % f'save_file concat("p", {NUMBER}, ".ph")',
         "b.pov": PHOTONS % f'load_file concat("p", {NUMBER}, ".ph")'},
        ("a.pov +WT1 +KFF2", "b.pov +WT1 +KFF2")),
    "photons in a library path": Layout(
        {"lib/a.pov": PHOTONS % 'save_file "lib/p.ph"', "b.pov": PHOTONS % 'load_file "p.ph"'},
        ("lib/a.pov +WT1", "b.pov +WT1 +Llib")),
    "photons that are missing": Layout({"a.pov": PHOTONS % 'load_file "p.ph"'}, ("a.pov +WT1",)),
    "radiosity saved and loaded": Layout(
        {"a.pov": RADIOSITY, "s": None}, ("a.pov +WT1 +RFO +RFs/a.rca", "a.pov +WT1 +RFI +RFs/a.rca +Ob")),
    "radiosity loaded and added to": Layout(
        {"a.pov": RADIOSITY}, ("a.pov +WT1 +RFO +RFa.rca", "a.pov +W48 +H36 +WT1 +RFI +RFO +RFa.rca")),
    "radiosity saved beside the project": Layout(
        {"p/a.pov": RADIOSITY, "c": None}, ("a.pov +WT1 +RFO +RF../c/a.rca",), "p"),
    "radiosity saved under its full path": Layout(
        {"p/a.pov": RADIOSITY, "c": None}, ("a.pov +WT1 +RFO +RF@/c/a.rca",), "p"),
    "photons saved under their full path": Layout(
        {"p/a.pov": PHOTONS % 'save_file "@/c/p.ph"', "c": None}, ("a.pov +WT1",), "p",
        told="--unconfined"),
    "the log of a computed directory, of two runs": Layout(
        {"a.pov": '#declare D = "logs/";\n' + LOG.replace('"log.txt"', 'concat(D, "l.txt")') + MOVES,
         "logs/l.txt": "old\n"}, ("a.pov +KFF4", "a.pov +Ob")),
    "a picture of pictures": Layout(
        {"a.pov": "#if (frame_number > 2)\n" + shows(
            'concat("a", str(frame_number - 2, -2, 0), ".png")') + "#else\n" + BALL + "#end\n"},
        ("a.pov +KFF12 +EF6", "a.pov +KFF12 +SF7")),
    "a file that every second frame writes": Layout(
        {"a.pov": "#if (mod(frame_number, 2) = 1)\n" + writes('"h.inc"', '"#declare Pos = ", clock, ";"')
         + '#end\n#include "h.inc"\n' + AT}, ("a.pov +KFF6",)),
    "radiosity by an INI file": Layout(
        {"a.pov": RADIOSITY, "save.ini": "Radiosity_To_File=On\nRadiosity_File_Name=a.rca\n",
         "load.ini": "Radiosity_From_File=On\nRadiosity_File_Name=a.rca\n"},
        ("save.ini a.pov +WT1", "load.ini a.pov +WT1 +KFF3")),
    "radiosity without a name": Layout(
        {"a.pov": RADIOSITY}, ("a.pov +WT1 +RFO", "a.pov +WT1 +RFI +Ob")),
    "radiosity of an animation added to": Layout(
        {"a.pov": RADIOSITY}, ("a.pov +WT1 +RFI +RFO +RFa.rca +KFF3",)),
    "a state that goes on": Layout(
        {"a.pov": MOVES, "a.pov-state": b"junk"}, ("a.pov +C",)),
}

# --- options

OPTIONS: Dict[str, Layout] = {
    **{f"type {kind}": Layout({"a.pov": MOVES}, (f"a.pov {kind}", f"a.pov {kind} +KFF2 +Ob"))
       for kind in ("+FN", "+FN16", "+FNG", "+FP", "+FP16", "+FPG", "+FT", "+FC", "+FB", "+FJ",
                    "+FJ40", "+FE", "+FH", "+UA", "+FN16 +UA", "+FE +UA", "+FT +UA")},
    "gamma and dither": Layout(
        {"a.pov": MOVES}, ("a.pov File_Gamma=1.8 +TH", "a.pov +THB3 +Ob", "a.pov +FG2.0 +Oc")),
    "a part of the picture": Layout(
        {"a.pov": BALL}, ("a.pov +SR5 +ER20 +SC3 +EC30", "a.pov +SR0.25 +ER0.75 +Ob",
                          "a.pov +SC0.5 +Oc +FP")),
    "the frames": Layout(
        {"a.pov": MOVES}, ("a.pov +KFF10 +SF2 +EF3", "a.pov +KFI0 +KFF3 +Ob", "a.pov +KFF4 +KC +Oc",
                           "a.pov +KFI998 +KFF1001 +Od", "a.pov +KFF10 +SF0.8 +Oe",
                           "a.pov +KI-1 +KF2 +KFF3 +Of", "a.pov +K0.3 +Og", "a.pov +KFI3 +KFF3 +Oh")),
    "frames by an INI file": Layout(
        {"a.pov": MOVES, "film.ini": (
            "; a film\nInput_File_Name = a.pov   ; the scene\n\nInitial_Frame=1\nFinal_Frame = 4\n"
            "Initial_Clock=0.0\nFinal_Clock=2.0\nCyclic_Animation=on\n# size\n+W32 +H24 +A0.3\n")},
        ("film.ini",)),
    "declared": Layout(
        {"a.pov": COLORED.replace("rgb C", 'rgb <A, B, strcmp(S, "x y")>')},
        ("""a.pov Declare=A=0.5 Declare=B=.25 'Declare=S="x y"'""",)),
    "declared by an INI file": Layout(
        {"a.pov": COLORED.replace("rgb C", "rgb <A, B, 0>"), "d.ini": "Declare=A=0.1\nDeclare=B=1\n"},
        ("d.ini a.pov", "d.ini a.pov Declare=A=1 +Ob")),
    "an include header with a blank": Layout(
        {"a.pov": COLORED, "my header.inc": lib()}, ("""a.pov '+HI"my header.inc"'""",)),
    "an include header in a library path": Layout(
        {"a.pov": COLORED, "lib/h.inc": lib()}, ("a.pov +HIh.inc +Llib",)),
    "an include header of the standard library": Layout(
        {"a.pov": COLORED.replace("rgb C", "Red")}, ("a.pov +HIcolors.inc",)),
    "quality": Layout({"a.pov": MOVES}, ("a.pov +Q3", "a.pov +A0.1 +AM2 +R2 -J +Ob", "a.pov +BS8 +RP1 +Oc",
                                         "a.pov +MB1 +UV +Od", "a.pov +SP16 +EP4 +Oe")),
    "an old scene": Layout(
        {"a.pov": BALL.partition("\n")[2].replace("global_settings { assumed_gamma 1 }", "")},
        ("a.pov", "a.pov +MV3.5 +Ob", "a.pov Version=3.6 +Oc")),
    "told to be quiet": Layout({"a.pov": BALL}, ("a.pov -V -P -X +WL0 -GA",)),
    "text files": Layout(
        {"a.pov": '#debug "one\\n"\n' + BALL}, ("a.pov +GDd.txt", "a.pov Debug_File=e.txt +Ob")),
    "an INI file of all that was said": Layout(
        {"a.pov": MOVES, "film.ini": "Final_Frame=3\nInput_File_Name=a.pov\n+A0.123456789 -UV\n",
         "old.ini": "Width=5\n", "s": None},
        ("a.pov -D +GIa.ini", "-D film.ini +GIs/film.ini +SF2 +EF0.5 +Lnone -F 'Declare=A=1e7'",
         "a.pov -D +GIold.ini +D1b", "a.pov -D Create_Ini=On +KFI1 +KFF1 +K0.1", "a.pov -D +GI@/b.ini +Os/",
         "a.pov +GIgone/a.ini", "a.pov +GI")),
    "an INI file of what fails": Layout({"a.pov": "no scene"}, ("a.pov -D +GIa.ini +FT",)),
    "links in a circle": Layout({"a.pov": BALL, "loop": Link("loop"), "a.png": Link("a.png")},
                                ("a.pov +Lloop +Ob", "a.pov", "a.pov +Oloop", "loop/a.pov")),
    "a picture over another": Layout({"a.pov": BALL, "a.png": png(1)}, ("a.pov", "a.pov +W16 +H12")),
    "a picture whose directory is missing": Layout({"a.pov": BALL}, ("a.pov +Ogone/a.png",)),
    "a picture of the wrong extension": Layout({"a.pov": BALL}, ("a.pov +Oa.jpg", "a.pov +Oa.tga +FT")),
    "pictures called by dots, or by their numbers only": Layout(
        {"a.pov": MOVES, "s": None}, ("a.pov +O.. +KFF2", "a.pov +Os/. +KFF2", "a.pov +O.")),
    "an empty word": Layout({"a.pov": BALL}, ("'' a.pov",)),
    "no scene": Layout({"a.txt": "x"}, ("a.pov", "+Igone", "film.ini")),
    "a section that is not there": Layout(
        {"a.pov": BALL, "a.ini": "Input_File_Name=a.pov\n[one]\nWidth=20\n"}, ("a.ini[two]", "a.ini[ONE] +Ob")),
    "a mistake in frame three": Layout(
        {"a.pov": '#if (frame_number = 3) #error "no" #end\n' + MOVES}, ("a.pov +KFF3",)),
}

# --- what scenes are made of

CONTENTS: Dict[str, Layout] = {
    "pictures by number": Layout(
        {"a.pov": shows('concat("seq/img", str(frame_number, -3, 0), ".png")'),
         **{f"seq/img{number:03}.png": png(number * 999) for number in range(1, 5)}}, ("a.pov +KFF4",)),
    "height field": Layout(
        {"a.pov": HEAD + 'height_field { png "h.png" translate -0.5 scale 2 pigment { rgb 1 } }',
         "h.png": png(0x803010)}, ("a.pov",)),
    "height field that was rendered": Layout(
        {"h.pov": BALL, "a.pov": HEAD + 'height_field { png "h.png" smooth translate -0.5 scale 2 '
         "pigment { rgb 1 } }"}, ("h.pov +FN16", "a.pov")),
    "density file": Layout(
        {"a.pov": HEAD + 'box { -1, 1 hollow pigment { rgbt 1 } interior { media { emission 1 density '
         '{ density_file df3 concat("d", str(frame_number, 0, 0), ".df3") translate -0.5 scale 2 } } } }',
         **{f"d{number}.df3": struct.pack(">HHH", 2, 2, 2) + bytes(range(0, 256, 32 + number))[:8].ljust(8)
            for number in (1, 2)}}, ("a.pov +KFF2",)),
    "pictures of all kinds": Layout(
        {"make.pov": BALL, "a.pov": HEAD + "".join(
            f"box {{ <{at}, -1, 0>, <{at + 0.9}, 1, 1> texture {{ pigment {{ image_map {{ {kind} "
            f'"m.{end}" }} }} finish {{ ambient 1 }} }} }}\n' for at, (kind, end) in enumerate(
                (("tga", "tga"), ("jpeg", "jpg"), ("ppm", "ppm"), ("hdr", "hdr"), ("exr", "exr")), -2))},
        ("make.pov +FT +Om", "make.pov +FJ +Om", "make.pov +FP +Om", "make.pov +FH +Om",
         "make.pov +FE +Om", "a.pov")),
    "fonts in a directory": Layout(
        {"a.pov": LETTER % "mine.ttf", "my fonts/mine.ttf": (
            Path(FONTS, "timrom.ttf").read_bytes() if Path(FONTS).exists() else b"")},
        ("""a.pov '+L"my fonts"'""",)),
    "parts by number": Layout(
        {"a.pov": '#for (I, 1, 3) #include concat("parts/p", str(I, 0, 0)) #end\n' + HEAD,
         **{f"parts/p{number}.inc": f"sphere {{ <{number - 2}, 0, 0>, 0.4 pigment {{ rgb 1 }} }}\n"
            for number in range(1, 4)}}, ("a.pov",)),
    "nested includes": Layout(
        {"scene/a.pov": uses("inc/one.inc"), "scene/inc/one.inc": uses("inc/../../two.inc", scene=""),
         "two.inc": uses("./inc//three.inc", scene=""), "scene/inc/three.inc": lib()}, ("a.pov",),
        "scene"),
    "a table of numbers": Layout(
        {"a.pov": '#fopen F "data/t.csv" read #while (defined(F)) #read (F, Pos, B) #end\n' + AT,
         "data/t.csv": "0.1, 1,\r\n0.7, 2\r\n"}, ("a.pov",)),
    "the standard library": Layout(
        {"a.pov": uses("colors.inc", "textures.inc", "shapes.inc", "functions.inc",
                       scene=COLORED.replace("pigment { rgb C }", "texture { DMFWood4 }"))}, ("a.pov",)),
    "an include of one's own called as a standard one": Layout(
        {"a.pov": uses("colors.inc", scene=COLORED.replace("rgb C", "Red")),
         "colors.inc": "#declare Red = rgb <0, 0, 1>;\n"}, ("a.pov",)),
    "a library of one's own called as a standard one": Layout(
        {"a.pov": uses("colors.inc", scene=COLORED.replace("rgb C", "Red")),
         "lib/colors.inc": "#declare Red = rgb <0, 0, 1>;\n"}, ("a.pov +Llib",)),
    "a standard include that finds one's own": Layout(
        {"a.pov": uses("textures.inc", scene=COLORED.replace("pigment { rgb C }", "texture { Chrome_Metal }")),
         "finish.inc": '#debug "mine"\n#include "' + INCLUDES + '/finish.inc"\n'}, ("a.pov",)),
}

# --- what strangers do besides

HABITS: Dict[str, Layout] = {
    "counter in an include with a macro": Layout(
        {"inc/count.inc": '#macro Next(File)\n#if (file_exists(File)) #fopen C File read #read (C, N) #fclose C #else #declare N = 0; #end\n#declare N = N + 1; #fopen C File write #write (C, N) #fclose C\n#end\n', "a.pov": '#include "count.inc"\nNext("n.txt")\n' + HEAD + "sphere { <N/4 - 1, 0, 0>, 0.5 pigment { rgb 1 } }\n"},
        ("a.pov +Linc +KFF5", "a.pov +Linc +KFF3 +Ob")),
    "a log with a computed name in a directory": Layout(
        {"logs": None, "a.pov": '#declare D = "logs/";\n' + writes('concat(D, "r", ".csv")', f'{NUMBER}, ",", clock, "\\n"', "append") + MOVES, "logs/r.csv": "frame,clock\n"},
        ("a.pov +KFF3", "a.pov +KFF3 +SF2 +Ob")),
    "each frame writes and reads its own": Layout(
        {"a.pov": writes('concat("t", str(frame_number,0,0), ".inc")', '"#declare C = <1,0,", clock, ">;\\n"') + '#include concat("t", str(frame_number,0,0), ".inc")\n' + COLORED},
        ("a.pov +KFF4",)),
    "previous picture as a texture": Layout(
        {"a.pov": '#if (frame_number > 1) #declare P = concat("a", str(frame_number - 1, 0, 0), ".png"); #end\n' + HEAD + '#ifdef (P) box { <-1,-1,0>, 1 pigment { image_map { png P } translate -0.5 scale 2 } finish { ambient 1 } } #else sphere { 0, 1 pigment { rgb <1,0,0> } } #end\n'},
        ("a.pov +KFF4", "a.pov +KFF4 +C")),
    "particle positions kept by frame": Layout(
        {"a.pov": '#declare F1 = concat("p", str(frame_number - 1, -3, 0), ".dat");\n#declare X = 0;\n#if (file_exists(F1)) #fopen F F1 read #read (F, X) #fclose F #end\n#declare X = X + 0.2;\n' + writes('concat("p", str(frame_number, -3, 0), ".dat")', "X") + HEAD + "sphere { <X - 1, 0, 0>, 0.5 pigment { rgb 1 } }\n"},
        ("a.pov +KFF6",)),
    "radiosity saved once and loaded": Layout(
        {"r.pov": RADIOSITY},
        ("r.pov +WT1 +RFO +RFr.rad", "r.pov +WT1 -RFO +RFI +RFr.rad +Ob", "r.pov +WT1 +RFO +RFI +RFr.rad +Oc")),
    "photons saved then loaded": Layout(
        {"s.pov": PHOTONS % 'save_file "ph.map"', "l.pov": PHOTONS % 'load_file "ph.map"'},
        ("s.pov +WT1", "l.pov +WT1")),
    "makefile style out dir": Layout(
        {"src/a.pov": uses("colors.inc", "../inc/my.inc", scene=COLORED), "inc/my.inc": lib(), "build": None},
        ("+Isrc/a.pov +Obuild/a +FN8", "src/a.pov +Obuild/")),
    "a scene of many kinds of declares": Layout(
        {"a.pov": "#ifndef (Shot) #declare Shot = 1; #end\n#switch (Shot) #case (1) #declare C = <1,0,0>; #break #case (2) #declare C = <0,1,0>; #break #end\n" + COLORED},
        ("a.pov Declare=Shot=2", "Declare=Shot=1 a.pov +Ob", "a.pov +Oc Declare=Shot=2 Declare=Shot=1")),
    "ini with a section per shot": Layout(
        {"film.ini": "Input_File_Name=a.pov\nWidth=32\nHeight=24\n[shot1]\nFinal_Frame=3\nOutput_File_Name=s1_\n[shot2]\nFinal_Frame=12\nSubset_Start_Frame=10\nOutput_File_Name=s2_\n[still]\nClock=0.7\nOutput_File_Name=cover\n", "a.pov": MOVES},
        ("film.ini[shot1]", "film.ini[shot2]", "'film.ini[still]'", "film[nope]")),
    "ini with DOS ends, capital letters and an old key": Layout(
        {"RENDER.INI": "INPUT_FILE_NAME=A.POV\r\nWIDTH=32\r\nHEIGHT=24\r\nANTIALIAS=ON\r\nANTIALIAS_THRESHOLD=0.2\r\nBUFFER_OUTPUT=ON\r\n", "A.POV": BALL},
        ("RENDER.INI", "RENDER")),
    "names with blanks and dots": Layout(
        {"my scene v1.2.pov": MOVES, "out dir": None},
        ("""'"my scene v1.2.pov"' +KFF2""", """'+I"my scene v1.2.pov"' '+O"out dir/"'""", """'+I"my scene v1.2.pov"' '+O"out dir/x.y"' +KFF2""")),
    "percent and hash in names": Layout(
        {"50%.pov": BALL, "a+b.pov": BALL, "-x.pov": BALL},
        ("50%.pov", "a+b.pov", "+I-x.pov")),
    "umlauts in written files": Layout(
        {"a.pov": writes('"gr\xfc\xdfe.txt"', '"x"') + BALL},
        ("a.pov",)),
    "jpeg texture by relative path from library": Layout(
        {"lib/tex/t.png": png(0x402010), "sc/a.pov": shows('"tex/t.png"')},
        ("a.pov +L../lib",), "sc"),
    "a symlinked library": Layout(
        {"real/lib/c.inc": lib(), "proj/lib": Link("../real/lib"), "proj/a.pov": uses("lib/c.inc")},
        ("a.pov",), "proj"),
    "a log in the parent": Layout(
        {"proj/a.pov": writes('"../log.txt"', '"x\\n"', "append") + BALL, "log.txt": "old\n"},
        ("a.pov",), "proj"),
    "a write into a directory beside": Layout(
        {"proj/a.pov": writes('"../shared/n.inc"', '"// x\\n"') + BALL, "shared": None},
        ("a.pov",), "proj"),
    "a huge loop of debug": Layout(
        {"a.pov": '#for (I, 1, 9000) #debug concat("line ", str(I, 0, 0), "\\n") #end\n' + BALL},
        ("a.pov",), says="line 9000"),
    "tga with alpha and compression": Layout(
        {"a.pov": BALL},
        ("a.pov +FT +UA", "a.pov +FC +UA +Ob", "a.pov +FN +UA +Oc", "a.pov +FN16 +UA +Od", "a.pov +FE +UA +Oe")),
    "grey height field 16": Layout(
        {"a.pov": BALL},
        ("a.pov +FNg", "a.pov Grayscale_Output=On Bits_Per_Color=16 +Ob", "a.pov +FPg +Oc")),
    "partial render": Layout(
        {"a.pov": BALL},
        ("a.pov +SR5 +ER10", "a.pov +SC0.25 +EC0.75 +Ob", "a.pov +SC1 +EC10 +SR1 +ER10 +KFF2 +Oc")),
    "cyclic with step": Layout(
        {"a.pov": MOVES},
        ("a.pov +KC +KFF9 +STP4", "a.pov +KFI3 +KFF11 +KI2 +KF5 +Ob", "a.pov +KFF10 +SF0.5 +EF0.75 +Oc")),
    "frame zero": Layout(
        {"a.pov": MOVES},
        ("a.pov +KFI0 +KFF3", "a.pov +KFI0 +KFF1 +Ob", "a.pov +KFI1 +KFF1 +Oc", "a.pov +KFI5 +KFF5 +Od")),
    "read by whole path": Layout(
        {"proj/a.pov": uses("@/lib/c.inc"), "lib/c.inc": lib()},
        ("a.pov",), "proj"),
    "two writers of one file in a still": Layout(
        {"a.pov": writes('"n.txt"', '"1\\n"') + writes('"n.txt"', '"2\\n"', "append") + BALL, "n.txt": "old\n"},
        ("a.pov", "a.pov +Ob")),
    "first frame writes others append": Layout(
        {"a.pov": '#if (frame_number = 1) #fopen F "n.txt" write #else #fopen F "n.txt" append #end #write (F, ' + NUMBER + ', "\\n") #fclose F\n' + MOVES, "n.txt": "old\n"},
        ("a.pov +KFF4",)),
    "an empty file appended": Layout(
        {"a.pov": LOG + BALL, "log.txt": ""},
        ("a.pov", "a.pov +Ob")),
    "a picture overwritten by the scene's own name": Layout(
        {"a.pov": writes('"a.txt"', '"x"') + BALL, "a.png": png(3), "a.txt": "longer old text"},
        ("a.pov",)),
    "a binary bump map missing extension": Layout(
        {"b.png": png(0x10203), "a.pov": shows('"b"')},
        ("a.pov",)),
    "a mistyped include": Layout(
        {"Lib.inc": lib(), "a.pov": uses("lib.inc")},
        ("a.pov",)),
}

FARM = [*POVFARM, "render"]
LAYOUTS: Dict[str, Layout] = {**FIELD, **PLACES, **NAMES, **FILES, **OPTIONS, **CONTENTS,
                             **HABITS}


def make(root: Path, layout: Layout) -> None:
    """Write the files of a layout below ``root``."""
    for name, content in layout.files.items():
        path = root / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.replace("@", str(root)))
        elif isinstance(content, Pipe):
            os.mkfifo(path)
        elif isinstance(content, Sparse):
            with open(path, "wb") as file:
                file.truncate(content)
        elif content is not None:
            text = content.replace("@", str(root)).encode() if isinstance(content, str) else content
            path.write_bytes(text)


def looked_at(path: Path, root: str) -> Union[str, bytes]:
    """Return what a file is: its bytes, but of a picture without the time when it was made."""
    mode, size = path.lstat().st_mode, path.lstat().st_size
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path).replace(root, '@')}"
    if not stat.S_ISREG(mode) or size > 1 << 30:
        return f"{stat.S_IFMT(mode)}, {size if stat.S_ISREG(mode) else 0} bytes"
    data = path.read_bytes()
    if path.name.endswith(".png") and data[:4] == b"\x89PNG":
        return png_picture(data)
    if path.suffix == ".ph":  # a copy of memory, its gaps included
        return f"{size} bytes"
    if data[-18:-2] == b"TRUEVISION-XFILE":
        extension = struct.unpack_from("<I", data, size - 26)[0]
        data = data[:extension + 367] + data[extension + 379:]
    return DATE.sub(b"then", data).replace(os.fsencode(root), b"@")


def png_picture(data: bytes) -> bytes:
    """Return the size, kind and rows of a PNG, not filtered, whatever its chunks are."""
    chunks, rows = png_apart(data)
    kinds = (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"sRGB")
    return b"".join(kind + body for kind, body in chunks if kind in kinds) + rows


def everything(root: Path) -> Dict[str, Union[str, bytes]]:
    """Return all that lies below a directory, links not followed."""
    found: Dict[str, Union[str, bytes]] = {}
    for place, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(place, name)
            found[str(path.relative_to(root))] = looked_at(path, str(root))
    return found


@contextlib.contextmanager
def growing(path: Path) -> Iterator[None]:
    """Let a file grow, and others come and go beside it; both are gone at the end."""
    stop = threading.Event()
    other = path.with_suffix(".tmp")

    def write() -> None:
        while not stop.wait(0.002):
            with open(path, "a") as file:
                file.write("one more line\n")
            other.touch()
            other.unlink()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink()


def run(command: List[str], root: Path, home: Path, layout: Layout,
        arguments: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a command as a person would who has this home and these arguments."""
    for name in ("tmp", "home"):
        (home / name).mkdir(parents=True, exist_ok=True)
    own = {name: value.replace("@", str(root)) for name, value in layout.environ.items()}
    # pytest changes its own variable from another thread.
    inherited = {key: os.environ.get(key, "") for key in list(os.environ)}
    environ = {**inherited, "HOME": str(home / "home"), "TMPDIR": str(home / "tmp"),
               "POVFARM_DATA": str(home / "farm"), "PWD": str(root / layout.cwd), **own}
    words = [*shlex.split(arguments.replace("@/", f"{root}/"))]
    while True:
        done = subprocess.run([*command, *SIZE, *words], cwd=root / layout.cwd, env=environ,
                              timeout=LONG, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if b"Timed out waiting for worker thread" not in done.stderr:  # on a computer far too busy
            return done


def difference(layout: Layout, place: Path) -> str:
    """Render a layout by both; return how they differ, or nothing."""
    plain, ours = place / "plain" / "p", place / "ours" / "p"  # paths of the same length
    for root in (plain, ours):
        root.mkdir(parents=True)
        make(root, layout)
    before = everything(ours)
    for arguments in layout.runs:
        with growing(ours / layout.growing) if layout.growing else contextlib.nullcontext():
            made = run(FARM, ours, place, layout, arguments)
        said = made.stderr.decode(errors="replace")
        if layout.told:
            wrong = "" if made.returncode == 2 and re.search(layout.told, said) else (
                f"exit code {made.returncode}, {said[-500:]}")
            wrong = wrong or compared(before, everything(ours))
        else:
            expected = run(["povray", "-D"], plain, place, layout, arguments)
            wrong = differs(layout, expected, made, said)
            if not wrong and not layout.kinder:
                # The log of a frame that failed stays, the state that POV-Ray leaves does not.
                besides = ("", ".log", ".pov-state")[:3 if made.returncode else 1]
                wrong = compared(everything(plain), everything(ours), besides)
                if wrong:
                    wrong += f"; exit code {made.returncode}, {said[-500:]}"
        if wrong:
            return f"{arguments}: {wrong}"
    left = list((place / "tmp").iterdir())
    return f"left behind: {left}" if left else ""


def differs(layout: Layout, expected: "subprocess.CompletedProcess[bytes]",
            made: "subprocess.CompletedProcess[bytes]", said: str) -> str:
    """Return how the end of a run, and what was printed, differs."""
    failed = bool(expected.returncode) and not layout.kinder
    if "Traceback" in said or failed != bool(made.returncode):
        return f"exit code {made.returncode} instead of {expected.returncode}, {said[-900:]}"
    if layout.says and not re.search(layout.says, said):
        return f"says {said[-500:]}"
    same = not layout.stdout or DATE.sub(b"", made.stdout) == DATE.sub(b"", expected.stdout)
    return "" if same else "another picture on stdout"


def compared(expected: Mapping[str, Union[str, bytes]], made: Mapping[str, Union[str, bytes]],
             besides: Tuple[str, ...] = ("",)) -> str:
    """Return how what was left differs, files of some endings apart."""
    return ", ".join(
        f"{name!r} is {'missing' if name not in made else 'too many' if name not in expected else 'another'}"
        for name in sorted({*expected, *made}) if expected.get(name) != made.get(name)
        and not name.endswith(besides[1:]))[:1500]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, help="where the projects are made, and stay")
    parser.add_argument("parts", nargs="*", help="only layouts whose names hold one of these")
    options = parser.parse_args()
    names = [name for name in LAYOUTS
             if not options.parts or any(part in name for part in options.parts)]
    wrong = 0
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(10) as pool:
        root = options.keep or Path(directory)
        for future in as_completed([pool.submit(tried, name, root) for name in names]):
            wrong += bool(future.result())
            print(future.result(), end="", flush=True)
    print(f"{len(names) - wrong} the same, {wrong} different")
    return 0 if names and not wrong else 1


def tried(name: str, root: Path) -> str:
    """Return how a layout differs, in words for a person."""
    text = difference(LAYOUTS[name], root / name.replace(" ", "-"))
    return f"{name}: {text.strip()}\n\n" if text else ""


if __name__ == "__main__":
    sys.exit(main())
