"""POV-Ray's command lines and INI files: what we read is what POV-Ray itself says.

Every case is given to the real program, with a scene that prints its frame, clock
and size, and with Create_Ini, which makes POV-Ray write down the options it read.
All runs start together, since POV-Ray sleeps most of its time.
"""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import pytest

import povfarm
from helpers.base import EXAMPLES, run_povray
from helpers.pictures import pixels_of
from povfarm import (
    STANDARD,
    PovOptions,
    Region,
    UserError,
    check_ini,
    plan_frames,
    read_command_line,
    region_of,
    slice_values,
    to_ini,
)

SCENE = """#version 3.7; global_settings { assumed_gamma 1 }
#debug concat("@@", str(frame_number, 0, 0), " ", str(clock, 0, 9), " ",
    str(image_width, 0, 0), "x", str(image_height, 0, 0), "\\n")
#ifdef (number) #debug concat("@number ", str(number, 0, 9), "\\n") #end
#ifdef (words) #debug concat("@words ", words, "\\n") #end
"""
INCLUDES = ["/usr/share/povray-3.7", "/usr/share/povray-3.7/ini", "/usr/share/povray-3.7/include"]
SMALL = ["+W4", "+H3"]


@dataclass(frozen=True)
class Case:
    """One command line in a directory of its own."""

    name: str
    args: Sequence[str]
    files: Dict[str, str] = field(default_factory=dict)  # ~/ is the user's home, / ends a directory
    env: Dict[str, str] = field(default_factory=dict)


def case(
    name: str,
    args: str | List[str],
    x_ini: str = "",
    files: Dict[str, str] | None = None,
    **env: str,
) -> Case:
    """A case with s.pov, and x.ini when its text is given; ``args`` are parted at blanks."""
    named = {"s.pov": SCENE, **({"x.ini": x_ini} if x_ini else {}), **(files or {})}
    return Case(name, args.split() if isinstance(args, str) else args, named, env)


def scene(name: str, args: List[str]) -> Case:
    """A case with a scene of that name and nothing else."""
    return Case(f"scene {args[0]}", args, {name: SCENE})


def ini(name: str, text: str, files: Dict[str, str] | None = None) -> Case:
    """A case whose command line is s.pov x.ini, with that text in x.ini."""
    return case(name, "s.pov x.ini", text, files)


# Command lines that POV-Ray takes: options, frames, clocks, names and size must be the same.
HARD = [
    # the command line
    case("still", "s.pov"),
    case("case of switches", "+is.pov +kff3 -A0.3 +Am2 +a +r4"),
    case("threshold swallows its zero", "s.pov +A00.5 +J0.2 -J"),
    case("key on the command line", "s.pov Width=7 HEIGHT=5 antialias=on"),
    case("several options in one argument", ["s.pov +Q3", "Quality=4 +KFF2 Jitter=off"]),
    case("quotes within an argument", ["s.pov", "+O'my out'", 'Radiosity_File_Name="a b"']),
    case("equals sign in a value", ["s.pov", "Output_File_Name=a=b"]),
    case("comma on the command line is text", "s.pov Output_File_Name=a,b"),
    case("minus of a switch with a value", "s.pov -Oz -Q5 -WT1"),
    case("library paths", ["+Lown", "sub/", "+Lown", "s.pov", "+L./other"]),
    case("sampling, blocks, rows", "s.pov +BS8 +RS1 +RP2 +SR0.2 +ER0.9 +SC1 +EC2 +MB5 -B +MI64"),
    case("dither, gamma, version", "s.pov +THb2 +MV3.5 File_Gamma=1.8 Display_Gamma=srgb"),
    case("switches of radiosity", "s.pov +RFr.rca -RFI -RFO +RVP +HR +SU -UL +UV"),
    case("window and text output", "s.pov +D0G +P +X5 +GAx.txt -GW +SP8 +EP2 +WL0 +V"),
    # file types and names
    *[case(f"type {t}", f"s.pov +F{t} +KFF2")
      for t in ("T", "C", "P", "B", "J", "J85", "E", "H", "N16", "n5", "Ng", "PG")],
    case("type key ignores the bits", "s.pov Output_File_Type=n16"),
    case("no file", "s.pov -FT"),
    case("directory", "s.pov +Oout/ +KFF2", files={"out/": ""}),
    case("directory without slash is a name", "s.pov +Oout", files={"out/": ""}),
    case("foreign extension stays", "s.pov +Oframe.tga +KFF2"),
    case("own extension goes", "s.pov +Oframe.png +KFF2"),
    case("own extension in capitals stays", "s.pov +Oframe.PNG +KFF2"),
    case("trailing dot goes", "s.pov +Oframe. +KFF2"),
    case("only an extension is no name", "sub/t.pov +O.png", files={"sub/t.pov": SCENE}),
    case("only a foreign extension is one", "s.pov +O.tga"),
    case("scene in a directory", "sub//t.pov", files={"sub/t.pov": SCENE}),
    case("scene in a directory above", "../home/t.pov +Oup", files={"~/t.pov": SCENE}),
    case("output in a directory above", "./s.pov +O../home/x"),
    case("empty output name", ["s.pov", "Output_File_Name="]),
    scene("my.v2.pov", ["my.v2.pov"]),
    scene("S.POV", ["+IS"]),
    scene("s.x", ["+Is.x"]),
    scene("my scene.pov", ['"my scene.pov"', "+KFF2"]),
    scene("it's.pov", ["+I\"it's.pov\""]),
    scene('q"q.pov', ["'q\"q.pov'"]),
    scene("a#b;c.pov", ["'a#b;c.pov'"]),
    scene("a[1],b.pov", ["a[1],b.pov"]),
    # frames and clocks
    *[case(f"frames {a}", f"s.pov {a}") for a in (
        "+K0.3", "+KFF12", "+KFF1", "+KFI1 +KFF1 +K2", "+KFI0 +KFF0", "+KFI0", "+KFI0 +KFF1",
        "+KFI1", "+KFI3 +KFF3", "+KFI-2 +KFF1", "+KFF5 +KC", "+KFF9 +KC +SF8", "+KFI0 +KFF0 +KC",
        "+KFF7 +KI0.1 +KF0.7", "+KFF7 +KI-3.3 +KF1e3 +KC +K5", "+KFF10 +SF0.5",
        "+KFF10 +SF0.25 +EF0.55", "+KFF10 +KC +SF0.5", "+KFI10 +KFF19 +EF0.5", "+KFF10 +SF8 +EF3",
        "+KFF10 +SF20", "+KFF10 +SF9 +EF12", "+KFF10 +STP3", "+KFF10 +STP3 +SF2 +EF9",
        "+KFF3 +STP0", "+KFF3 +STP-2", "+KFF10 +SF9.5", "+KFF3 +EF0", "+KFF3 +SF0 +EF1",
        "+KFF9 +EF05 +SF4", "+KFF3 +EF-1", "+SF1 +EF1", "+KFF100 +SF100", "+KFF4 +KI2 +KF2")],
    case("subset key takes fractions of frames", "s.pov +KFF10 Subset_Start_Frame=9.5"),
    # INI files
    ini("one option a line", "Quality=3 Jitter=Off +KFF2\nWidth = 9 ; c\n\tHEIGHT\t=\t8\t# c"),
    ini("switches, then an option", "+Q3 +KFF2 -J Declare=number=0.5 +Q4\n"),
    ini("switch and comment", "+Q3;x\n#y\n  ; z\n+KFF2#"),
    ini("switch with quotes", "+O\"a b\"+Q3 +L'c d'\n"),
    ini("quotes of both kinds", "Output_File_Name = \"it's\"\nRadiosity_File_Name='q\"q'  +Q3\n"),
    ini("quote is not closed at the end", 'Output_File_Name="my'),
    ini("blanks without quotes", "Output_File_Name=my out Quality=3\nQuality=4"),
    ini("blank before a comment", "Output_File_Name=my out   ; c\n"),
    ini("blank before a switch", "Output_File_Name=my +Q3\n"),
    ini("blank before a plus", "Output_File_Name=my + Q3\n"),
    ini("blank before a mistaken key", "Output_File_Name=my xQuality=3\n"),
    ini("blank at the end, then a key", "Output_File_Name=my \nQuality=3\n"),
    ini("blank at the end, then a comment", "Output_File_Name=my \n;Quality=3\n"),
    ini("blank at the end, then a switch", "Output_File_Name=my \n+Q3\n"),
    ini("value ends at a quote", "Output_File_Name=my'x'\n"),
    ini("lists", "Quality=3 , 4,5\nLibrary_Path=a,'b c' , d\nDeclare=a=1, number=2 ,b=3\n"),
    ini("numbers end where they end", "Quality=3.7\nClock=.5.5\nWidth= 0x10 , 9\nHeight=+5x\n"),
    ini("booleans", "Jitter=\nAntialias=o\nField_Render=of\nBounding=2\nOdd_Field=10\n"
        "Split_Unions=ye\nVista_Buffer=nonsense\nHigh_Reproducibility='T'\n"),
    ini("declare without a value", "Declare=number\nDeclare==number==5\nDeclare=number=6\n"),
    ini("first declare wins", "Declare=number=5\nDeclare=number=6\n"),
    ini("declare keeps six digits", "Declare=number=0.123456789\n"),
    ini("declare of a text", "Declare='words=\"a b;c#d\"'\n"),
    ini("deprecated keys", "Buffer_Output=on\nHistogram_Type=x +Q3\nQuality=4\n"),
    ini("colour", "bits_per_colour=16"),
    ini("empty commands", "Pre_Scene_Command=\nPost_Frame_Command=   ; c\nPost_Frame_Return=-F\n"),
    ini("line ends of Windows and old Macs", "+Q3\r\n+KFF2\r\nJitter=off\r+R2"),
    ini("comment in another encoding", "; \udcfc\n+Q3\n"),
    ini("words", "y.ini +Q5\nlib/\n'l m/' +R3", {"y.ini": "+Q4\n+KFF2"}),
    ini("scene with a blank", "my s.pov", {"my s.pov": SCENE}),
    ini("first character of a path is lost", "/lib/\n"),
    ini("no section asked for", "+Q2\n[a]\n+Q3\n+KFF2\n"),
    case("section", "s.pov x.ini[A]", "+Q2\n [a]+R3\n[b]\n+Q9\n[a] +KFF2\nJitter=off"),
    case("section that is not there", "s.pov x[c]", "+Q2\n[a]\n+Q3\n"),
    case("section with a blank", ["s.pov", "'x[ b ]'"], "[b]\n+Q2\n[ b ]\n+Q3\n"),
    case("section that is not closed", "s.pov x[a]", "+Q2\n[a\n+Q3\n"),
    case("later wins", "x.ini +Q5 y.ini s.pov y[b] +KFF3", "Quality=1\nWidth=5\nt.pov",
         {"y.ini": "Quality=2\n+KFF2\n[b]\nQuality=3\n"}),
    ini("nested", "y[b]\nInclude_Ini=z\nQuality=5", {"y.ini": "[b] +R3 z", "z.INI": "+Q4 +J"}),
    ini("nested through the library path", "+Lsub\ny\n", {"sub/y.ini": "Quality=4"}),
    ini("extension of three letters", "y.set", {"y.set": "+Q4"}),
    case("INI of the system by its name", ["s.pov", '"quickres[160x120, AA 0.3]"']),
    # the base INI
    case("./povray.ini", "s.pov +Lown", files={
        "povray.ini": "Quality=1\nLibrary_Path=lib1\n", "~/.povray/3.7/povray.ini": "+Q2"}),
    case("the user's povray.ini", "s.pov", files={
        "~/.povray/3.7/povray.ini": "+Q2 lib2/", "~/.povrayrc": "+Q9"}),
    case("POVINI", "s.pov", files={"my.ini": "+Q4", "povray.ini": "+Q1"}, POVINI="my.ini"),
    case("POVINI that is not there", "s.pov", files={"povray.ini": "+Q1"}, POVINI="no.ini"),
    case("POVINC", "s.pov +Lown", POVINC="incs"),
]

# What POV-Ray refuses we refuse, and our one line says why.
REFUSED = [
    (case("no scene", "+Q3"), "no scene"),
    (case("unknown switch", "s.pov +ZZ"), "+ZZ"),
    (case("switch without its value", "s.pov +Q"), "+Q needs a number right behind it: +Q1"),
    (case("width without its number", "s.pov +W 640"), "+W needs a number right behind it: +W640, "
     "without a blank"),
    (case("name apart from its switch", "s.pov -o out"), "-o needs a value right behind it: -oNAME"),
    (case("switch with a value too many", "s.pov +B5"), "+B5"),
    (case("threshold of one", "s.pov +A1.5"), "+A1.5"),
    (case("threshold of nought", "s.pov +A0"), "+A0"),
    (case("equals sign after a switch", "s.pov +Oa=b"), "option"),
    (case("continue log of 3.8", "s.pov +CC"), "+CC"),
    (case("unknown key", "s.pov Greyscale_Output=on"), "Greyscale_Output"),
    (case("unknown key in an INI", "s.pov x", "+Q3\nNonsense=3"), "x.ini, line 2"),
    (case("bad integer", "s.pov Width=wide"), "Width cannot be 'wide'"),
    (case("bad float", "s.pov +Jx"), "Jitter_Amount"),
    (case("bad count", "s.pov +XQ"), "Test_Abort_Count"),
    (case("empty number", "s.pov x", "Final_Frame=\n+Q3"), "x.ini, line 1: Final_Frame"),
    (case("blanks around =", ["s.pov", "Width = 5"]), "Width"),
    (case("missing INI", "s.pov nope"), "nope"),
    (case("missing nested INI", "s.pov x", "nope.ini"), "named in x.ini"),
    (case("INI without extension", "s.pov y", files={"y": "+Q3"}), "'y'"),
    (case("section is not closed", "s.pov x[a", "[a]"), "x[a"),
    (scene("my scene.pov", ["my scene.pov"]), "'\"my scene.pov\"'"),
    (case("picture with a blank", ["s.pov", "+Omy picture.png"]), "'+O\"my picture.png\"'"),
    (scene("it's.pov", ["it's.pov"]), "quotes inside the quotes"),
    (case("file type", "s.pov +FS"), "Output_File_Type cannot be 'S'"),
    (case("file type, nothing", "s.pov Output_File_Type="), "Output_File_Type"),
    (case("file type, more", "s.pov +FN8g"), "N8g"),
    (case("grey TGA", "s.pov +FTg"), "Tg"),
    (case("grey TGA later", "s.pov Grayscale_Output=on +FT"), "grey"),
    (case("gamma", "s.pov File_Gamma=0"), "File_Gamma"),
    (case("gamma too small", "s.pov File_Gamma=0.0001"), "File_Gamma"),
    (case("dither", "s.pov +THxx"), "Dither_Method"),
    (case("block size", "s.pov +BS2"), "Render_Block_Size"),
    (case("quoted option", ["s.pov", '"Quality=3"']), "Quality=3"),
    (case("path in an INI loses a letter", "s.pov x", "./y.ini", {"y.ini": ""}), "'/y.ini'"),
    (case("bad base INI", "s.pov", files={"povray.ini": "Nonsense=1"}), "Nonsense"),
]

# What povfarm refuses though POV-Ray takes it (or hangs, or writes where nobody looks).
OUR_OWN = [
    (case("program", "s.pov x", "Pre_Scene_Command=echo hi ; c\n"),
     "Pre_Scene_Command in x.ini, line 1 starts a program; povfarm does not run programs from INI "
     "files: remove that line"),
    (case("program on the command line", ["s.pov", "Post_Frame_Command=ls"]), "Post_Frame_Command"),
    (case("program in quotes", "s.pov x", "user_abort_command = 'x'"), "User_Abort_Command"),
    (case("program in the section", "s.pov x[a]", "[a]\nFatal_Error_Command=x"), "a program"),
    (case("window only", "s.pov +RTR"), "Real_Time_Raytracing"),
    (case("nothing to see", "s.pov +W0"), "Width=0"),
    (case("too wide a PNG", "s.pov +W1000001 +H1"), "most is 1000000; +FP"),
    (case("too high a TGA", "s.pov +W1 +H65536 +FC"), "Height=65536 is too large for a .tga"),
    (case("too wide a JPEG", "s.pov +W65501 +H1 +FJ"), "most is 65500"),
    (case("negative height hangs POV-Ray", "s.pov +H-3"), "Height=-3"),
    (case("number beyond 32 bits", "s.pov +KFF99999999999"), "Final_Frame"),
    (case("hexadecimal float", "s.pov +K0x10"), "Clock"),
    (case("infinite clock", "s.pov +K1e99"), "Clock"),
    (case("quote is not closed", "s.pov x", 'Output_File_Name="a\n+Q3\n'), "close its quotes"),
    (case("name in another encoding", "s.pov x", "Output_File_Name=\udc81\n"), "UTF-8"),
    (case("INI that includes itself", "s.pov x", "x.ini"), "without end"),
    (case("standard error", "s.pov +Ostderr"), "to stderr"),
    (case("reversed frames", "s.pov +KFI5 +KFF3"), "no frames"),
    (case("too many frames", "s.pov +KFF2000000"), "too many"),
    (case("frame number wider than its place", "s.pov +KFF10 +SF100"), "frame 100"),
    (case("help", "s.pov -h"), "-h"),
    (case("benchmark", "--benchmark"), "--benchmark"),
    (case("line break in an argument", ["s.pov", "+Q\n5"]), "+Q"),
    (case("reversed rows hang POV-Ray", "s.pov +SR90 +ER20"), "no row to render: Start_Row=90"),
    (case("reversed columns", "s.pov +SC0.5 +EC0.25"), "no column to render: Start_Column=0.5"),
    (case("rows below the picture", "s.pov +H40 +ER41"), "End_Row=41 must be in order, from 1 to 40"),
    (case("frame numbers beyond single precision", "s.pov +KFI16777216 +KFF16777217"), "too many"),
]


@dataclass
class Answer:
    """What POV-Ray said: options as it wrote them down (None: refused), frames, pictures."""

    code: int
    text: str
    written: str | None
    pictures: List[str]
    gamma: List[bytes]

    @property
    def frames(self) -> List[Tuple[int, float]]:
        return [(int(n), float(c)) for n, c in re.findall(r"@@(\S+) (\S+)", self.text)]

    @property
    def sizes(self) -> List[str]:
        return sorted(set(re.findall(r"@@\S+ \S+ (\S+)", self.text)))

    @property
    def library(self) -> List[str]:
        block = re.search(r"Library paths:\n((?:    .*\n)*)", self.text)
        return [line[4:] for line in block[1].splitlines()] if block else []

    @property
    def declared(self) -> List[str]:
        return re.findall(r"^(?:@number|@words) .*", self.text, re.MULTILINE)


def lay_out(case: Case, root: Path) -> Tuple[Path, Dict[str, str]]:
    """Write a case's files; return its working directory and its environment."""
    work, home = root / "work", root / "home"
    for name, text in {"./": "", "~/": "", **case.files}.items():
        path = home / name[2:] if name.startswith("~") else work / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return work, {"HOME": str(home), **case.env}


def ask_povray(args: Sequence[str], work: Path, environ: Dict[str, str]) -> Answer:
    """Run the real program and gather what it said and did."""
    before = set(work.parent.rglob("*"))
    done = subprocess.run(
        ["povray", "+GIasked.ini", *args, "-D"], cwd=work, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], **environ}, capture_output=True, timeout=120, check=False,
    )
    asked = work / "asked.ini"
    new = sorted(
        path for path in set(work.parent.rglob("*")) - before
        if path.suffix in {kind.extension for kind in povfarm.IMAGE_TYPES.values()}
    )
    written = asked.read_text() if asked.exists() else None
    gamma = [data[i + 4 : i + 8] for data in map(Path.read_bytes, new)
             for i in [data.find(b"gAMA")] if i > 0]
    text = done.stderr.decode(errors="replace")
    return Answer(done.returncode, text, written, [str(path) for path in new], gamma)


Bounds = Optional[Tuple[int, int, int, int]]  # rows and columns, half open
Renders = Callable[[Sequence[Sequence[str]]], List[Bounds]]
Answers = Dict[str, Tuple[Path, Answer]]


@pytest.fixture(scope="module")
def answers(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """POV-Ray's answers to all cases, by name, with the directories that they were run in.

    All start with a tiny size: with the system's 800x600 they would take minutes.
    """
    cases = [*HARD, *(refused for refused, _ in REFUSED)]
    assert len({case.name for case in cases}) == len(cases)
    places = [lay_out(case, tmp_path_factory.mktemp("case")) for case in cases]
    with ThreadPoolExecutor(14) as pool:
        found = pool.map(lambda c, p: ask_povray([*SMALL, *c.args], *p), cases, places)
    return {c.name: (p[0], answer) for c, p, answer in zip(cases, places, found)}


def read(case: Case, work: Path, *more: str) -> PovOptions:
    home = {"HOME": str(work.parent / "home"), **case.env}
    return read_command_line([*more, *case.args], work, home)


NOT_KEPT = re.compile(
    r"(Fatal|Render)_Console=|(All|Debug|Fatal|Render|Statistic|Warning)_File="
    r"|(Create_Ini|Display|Pause_When_Done|Draw_Vistas|Append_File|Real_Time_Raytracing)="
    r"|(Palette|Video_Mode|Preview_\w+|Test_Abort\w*|\w+_Command|\w+_Return|Library_Path)="
)


def kept(written: str, options: PovOptions) -> List[str]:
    """POV-Ray's lines without those that povfarm leaves out by intent."""
    lines = [line for line in written.splitlines() if not NOT_KEPT.match(line)]
    if "Work_Threads" not in options.values:
        lines = [line for line in lines if not line.startswith("Work_Threads=")]
    return sorted(lines)


def real_library(options: PovOptions, standard: List[str]) -> List[str]:
    return [d for entry in options.library for d in (standard if entry == STANDARD else [entry])]


def same_frames(options: PovOptions, work: Path, answer: Answer) -> None:
    plan = plan_frames(options)
    assert [n for n, _ in answer.frames] == list(plan.frames)
    for frame, clock in answer.frames:
        assert plan.clock(frame) == pytest.approx(clock, abs=6e-10, rel=0, nan_ok=True)
    names = sorted(str((work / plan.output_name(n)).resolve()) for n in plan.frames)
    assert answer.pictures == (names if options.to_file else [])
    assert answer.sizes == [f"{options.width}x{options.height}"]


@pytest.mark.parametrize("case", HARD, ids=lambda c: c.name)
def test_hard_command_line(case: Case, answers: Answers) -> None:
    work, answer = answers[case.name]
    assert answer.written is not None and answer.code == 0, answer.text[-500:]
    options = read(Case("", [*case.args, "-D"], {}, case.env), work, "+GIasked.ini", *SMALL)
    assert options.creates == ("asked.ini", answer.written)
    system = INCLUDES[0] in answer.written  # or another base INI was read
    assert real_library(options, INCLUDES if system else []) == answer.library
    same_frames(options, work, answer)


@pytest.mark.parametrize(("case", "why"), REFUSED, ids=lambda c: getattr(c, "name", ""))
def test_refused_by_povray(
    case: Case, why: str, answers: Answers
) -> None:
    work, answer = answers[case.name]
    assert answer.written is None and answer.code != 0
    with pytest.raises(UserError) as error:
        plan_frames(read(case, work))
    assert why in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("case", "why"), OUR_OWN, ids=lambda c: getattr(c, "name", ""))
def test_refused_by_povfarm(case: Case, why: str, tmp_path: Path) -> None:
    work, _ = lay_out(case, tmp_path)
    with pytest.raises(UserError) as error:
        plan_frames(read(case, work))
    assert why in str(error.value) and "\n" not in str(error.value)


def test_our_ini_says_the_same_to_povray(
    answers: Answers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through to_ini and POVINI, POV-Ray reads the same options and writes the same pictures."""
    jobs = []
    for case in HARD:
        answer = answers[case.name][1]
        work, environ = lay_out(case, tmp_path_factory.mktemp("again"))
        options = read(case, work, *SMALL)
        values, library = {**options.values, "Display": "Off"}, real_library(options, INCLUDES)
        text = to_ini(values, options.declares, library)
        check_ini(text)
        (work.parent / "job.ini").write_text(text)
        jobs.append((case, options, answer, work, {**environ, "POVINI": "../job.ini"}))
    with ThreadPoolExecutor(14) as pool:
        found = pool.map(lambda job: ask_povray([], job[3], job[4]), jobs)
    for (case, options, before, *_), after in zip(jobs, found):
        assert before.written is not None and after.written is not None, case.name
        assert kept(after.written, options) == kept(before.written, options), case.name
        assert after.declared == before.declared and after.gamma == before.gamma, case.name
        assert str(after.frames) == str(before.frames), case.name
        assert re.findall("Dithering.*", after.text) == re.findall("Dithering.*", before.text)
        assert [Path(p).name for p in after.pictures] == [Path(p).name for p in before.pictures]


INIS = sorted(EXAMPLES.rglob("*.ini")) if EXAMPLES.is_dir() else []


@pytest.fixture(scope="module")
def example_answers(
    povray: str, examples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Dict[Path, Tuple[Path, Answer, Answer]]:
    """For every example INI: all options and the size, and four frames of a scene of that name."""

    def ask(path: Path, root: Path) -> Tuple[Path, Answer, Answer]:
        text = path.read_text(errors="replace")
        name = re.search(r"(?mi)^\s*Input_File_Name\s*=\s*(\S+)", text)
        plain = Case("", [path.name], {path.name: text})
        work, environ = lay_out(plain, root)
        options = ask_povray([path.name], work, environ)
        (work / (name[1] if name else "none")).write_text(SCENE)
        return work, options, ask_povray(sparse(path), work, environ)

    roots = [tmp_path_factory.mktemp("example") for _ in INIS]
    with ThreadPoolExecutor(14) as pool:
        return dict(zip(INIS, pool.map(ask, INIS, roots)))


def sparse(path: Path) -> List[str]:
    """The command line of an example, small and with about four of its frames."""
    last = re.search(r"(?i)(?:Final_Frame=|\+kff)(\d+)", path.read_text(errors="replace"))
    return [path.name, *SMALL, "+F", f"+STP{max((int(last[1]) if last else 1) // 3, 1)}"]


@pytest.mark.parametrize("path", INIS, ids=lambda p: p.stem)
def test_example_ini(
    path: Path, example_answers: Dict[Path, Tuple[Path, Answer, Answer]]
) -> None:
    work, whole, small = example_answers[path]
    environ = {"HOME": str(work.parent / "home")}
    if whole.written is None:
        with pytest.raises(UserError, match=r"^__empty\.ini, line"):
            read_command_line([path.name], work, environ)
        return
    options = read_command_line(["+GIasked.ini", path.name, "-D"], work, environ)
    assert options.creates == ("asked.ini", whole.written)
    assert options.ini_files == ("/etc/povray/3.7/povray.ini", path.name)
    same_frames(read_command_line(sparse(path), work, environ), work, small)


def test_examples_are_all_there(examples: Path) -> None:
    assert len(INIS) == 41


def test_left_out_with_a_warning(tmp_path: Path) -> None:
    work, environ = lay_out(Case("", [], {"x.ini": "Buffer_Size=5\nPalette=g"}), tmp_path)
    line = "s.pov +GAall.txt +GIout.ini -D +X +P x Debug_File= Declare=a"
    options = read_command_line(line.split(), work, environ)
    assert not {"All_File", "Create_Ini", "Display", "Palette"} & set(options.values)
    assert options.texts == {"All_File": "all.txt", "Debug_File": "debug.out"}
    assert options.creates[0] == "out.ini"
    assert len(options.warnings) == 2
    for said in ("x.ini, line 1: POV-Ray does not use Buffer", "=a has no"):
        assert said in " ".join(options.warnings)


@pytest.mark.parametrize("args, text, frames, listed", [
    ("+KFF50", "", [*range(1, 51)], "1-50"),
    ("+KFF50", "50,1-3, 2 - 5,3,50", [1, 2, 3, 4, 5, 50], "1-5,50"),
    ("+KFI5 +KFF60", "7", [7], "7"),
    ("+KFF50 +SF10 +EF20", "10-12,20", [10, 11, 12, 20], "10-12,20"),
    ("+KFF50 +STP3", "1-9,48-50", [1, 4, 7, 49], "1-7,49"),
    ("+KFI0 +KFF9", "0", [0], "0"),
])
def test_chosen_frames(args: str, text: str, frames: List[int], listed: str,
                       tmp_path: Path) -> None:
    plan = plan_frames(read_command_line(["a.pov", *args.split()], tmp_path, {}, ()))
    assert plan.chosen(text) == frames
    assert plan.listed(frames) == listed and plan.chosen(listed) == frames


@pytest.mark.parametrize("args, text, why", [
    ("+KFF9", "10", "'10' names no frames of this animation: it has 1 to 9"),
    ("+KFF9", "1,8-10", "'8-10' names no frames"), ("+KFF9", "0-3", "'0-3' names no frames"),
    ("+KFF9", "5-3", "'5-3' names no frames"),
    ("+KFF9 +STP4", "2-4", "it has 1 to 9 in steps of 4"),
    ("+KFF9 +SF3", "2", "it has 3 to 9"), ("", "1", "this is a still"), ("", "0", "still"),
    *(("+KFF9", text, "is neither a frame nor a range") for text in (
        ",", "1,", "a", "-3", "3-", "1..3", "+1", "1-2-3", "1;2", "9" * 20, " ", "²")),
])
def test_frames_that_cannot_be_chosen(args: str, text: str, why: str, tmp_path: Path) -> None:
    plan = plan_frames(read_command_line(["a.pov", *args.split()], tmp_path, {}, ()))
    with pytest.raises(UserError, match=re.escape(why)):
        plan.chosen(text)


def test_names_beyond_ascii_are_taken_as_they_are(tmp_path: Path) -> None:
    """POV-Ray 3.7.0.10 turns them into rubbish, so that a worker has to give such files aliases."""
    options = read_command_line(["Bücher/größe.pov", "+Oüben", "+KFF2"], tmp_path, {}, [])
    assert [plan_frames(options).output_name(n) for n in (1, 2)] == ["üben1.png", "üben2.png"]
    with pytest.raises(UserError, match=r"Output_File_Name.*üben"):
        to_ini({"Output_File_Name": "üben"}, [], [])


@pytest.mark.parametrize(("files", "system", "expected"), [
    ({}, "", (STANDARD, "own")),
    ({}, "Library_Path=/a\nLibrary_Path=/b\nWidth=8\n", (STANDARD, "own")),
    ({"povray.ini": "Library_Path=mine\n"}, "Library_Path=/a\n", ("mine", "own", STANDARD)),
], ids=["no POV-Ray here", "the system's", "one's own"])
def test_where_the_standard_includes_stand(
    files: Dict[str, str], system: str, expected: Tuple[str, ...], tmp_path: Path
) -> None:
    work, environ = lay_out(Case("", [], files), tmp_path)
    inis = [tmp_path / "system.ini"] if system else []
    for path in inis:
        path.write_text(system)
    options = read_command_line(["s.pov", "+Lown"], work, environ, inis)
    assert options.library == expected
    assert options.width == (8 if "Width" in system else 160)


def test_properties(tmp_path: Path) -> None:
    args = ["s.pov", "+FJ85", "+WT3", "+W7", "-F"]
    options = read_command_line(args, tmp_path, {}, [])
    assert (options.output_type, options.extension) == ("J", ".jpg")
    assert options.values["Bits_Per_Color"] == "85"
    assert (options.values["Work_Threads"], options.width, options.height) == ("3", 7, 120)
    assert options.to_file is False
    assert options.scene == "s.pov"
    assert "Work_Threads" not in read_command_line(["s.pov"], tmp_path, {}, []).values


def test_numbers_without_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Width cannot be"):
        read_command_line(["s.pov", "+W" + "9" * 5000], tmp_path, {}, [])
    with pytest.raises(UserError):
        check_ini(f"Width={'9' * 5000}\n")
    assert read_command_line(["s.pov", "+W" + "0" * 5000 + "7"], tmp_path, {}, []).width == 7


def test_to_ini_is_what_check_ini_takes() -> None:
    text = to_ini(
        {"Width": "5", "Output_File_Name": "a 'b'", "Antialias": "On", "Clock": "0.5"},
        ["n=0.5", 't="a b"'], ["inc dir", "/x"],
    )
    assert text == (
        'Antialias=On\nClock=0.5\nOutput_File_Name="a \'b\'"\nWidth=5\nDeclare="n=0.5"\n'
        "Declare='t=\"a b\"'\nLibrary_Path=\"inc dir\"\nLibrary_Path=\"/x\"\n"
    )
    check_ini(text)
    check_ini("")


@pytest.mark.parametrize("text", [
    "Pre_Scene_Command=ls\n", "Pre_Scene_Command=\n", "Pre_Scene_Return=I\n", "x.ini\n", "+W5\n",
    "Include_Ini=x\n", 'Include_Ini="x"\n', "Unknown=5\n", "width=5\n", "Width = 5\n", " Width=5\n",
    "Width=5 \n", "Width=05\n", "Width=+5\n", "Width=5", "Width=5\r\n", "\nWidth=5\n", "; c\n",
    "[a]\nWidth=5\n", "Width=5;x\n", "Width=5,6\n", 'Width="5"\n', "Width=5\nWidth=5\n",
    "Width=5\nHeight=5\n", "Antialias=on\n", "Antialias=\n", "Clock=1.0\n", "Clock=0x10\n",
    "Output_File_Name=a\n", "Output_File_Name='a'\n", 'Output_File_Name="a"x\n',
    'Output_File_Name="a\n"\n', 'Output_File_Name="a\n', 'Output_File_Name="\u00fc"\n',
    'All_File="x/y"\n', 'All_File="on"\n', 'Create_Ini="x"\n', "Append_File=On\n",
    "Real_Time_Raytracing=Off\n",
    "Palette=g\n", "Declare=a=5\n", 'Library_Path="a"\nWidth=5\n', "Output_File_Type=n\n",
    "Output_File_Type=N16\n", "Width=99999999999\n", "Width=5\x0bPre_Scene_Command=ls\n",
    'Output_File_Name="a\x0bb"\n', "\x00\n", "Buffer_Size=5\n", "'y.ini'\n",
])
def test_check_ini_refuses(text: str) -> None:
    with pytest.raises(UserError) as error:
        check_ini(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "declares", "library"), [
    ({"Output_File_Name": "it's \"x\""}, [], []),
    ({"Output_File_Name": "a\nb"}, [], []),
    ({"Post_Frame_Command": "ls"}, [], []),
    ({"Width": "wide"}, [], []),
    ({"Antialias": "true"}, [], []),
    ({"Include_Ini": "x"}, [], []),
    ({}, ["t=\"it's\""], []),
    ({}, [], ["Bücher"]),
    ({}, [], ["a\r\n+O/etc/x"]),
])
def test_to_ini_refuses(
    values: Dict[str, str], declares: List[str], library: List[str]
) -> None:
    with pytest.raises(UserError):
        to_ini(values, declares, library)


REGIONS = [
    "", "+SR1 +ER1", "+SR3 +ER1", "+SR0 +ER5", "+SR3 +ER3", "+SR10", "+SR2.9 +ER4.9 +SC2.9 +EC4.9",
    "+SR0.7", "+ER0.7", "+SC0.7 +EC0.999", "+SR0.3 +ER0.6", "+SR0.99 +EC1", "+ER0.15", "+SC3 +EC3",
    "+SR0.999999999", "+SR1 +ER0.1", "+H1", "+SR0.96 +ER24 +H25 +W1",
    # refused, or nothing is rendered
    "+SR5 +ER4", "+SR0.5 +ER5", "+SR0.5 +ER0.5", "+SC7 +EC6", "+ER0", "+ER0.05", "+SR11", "+ER11",
    "+SC11", "+EC-3", "+SR-1", "+SC-0.5", "+SR0.5 +ER-0.5",
]
WHITE = "#version 3.7; global_settings { assumed_gamma 1 } background { rgb 1 }"


@pytest.fixture(scope="module")
def white(povray: str, tmp_path_factory: pytest.TempPathFactory) -> Renders:
    """Render white pictures with these arguments and say which pixels are white."""
    root = tmp_path_factory.mktemp("white")
    (root / "s.pov").write_text(WHITE)

    def bounds(name: str, args: Sequence[str]) -> Bounds:
        done = run_povray(["s.pov", "+W10", "+H10", "+FP", f"+O{name}.ppm", *args], root)
        if done.returncode:
            return None
        width, pixels = pixels_of(root / f"{name}.ppm")
        lit = [i for i in range(len(pixels) // 3) if pixels[3 * i]]
        columns = [i % width for i in lit]
        return (lit[0] // width, lit[-1] // width + 1, min(columns), max(columns) + 1) if lit else None

    def many(runs: Sequence[Sequence[str]]) -> List[Bounds]:
        with ThreadPoolExecutor(14) as pool:
            return list(pool.map(bounds, map(str, range(len(runs))), runs))

    return many


def region_or_none(args: Sequence[str], where: Path) -> Region | None:
    options = read_command_line(["s.pov", "+W10", "+H10", *args], where, {}, [])
    try:
        return region_of(options)
    except UserError:
        return None


def test_region_is_what_povray_renders(white: Renders, tmp_path: Path) -> None:
    regions = [region_or_none(text.split(), tmp_path) for text in REGIONS]
    ours = [r and (r.top, r.bottom, r.left, r.right) for r in regions]
    assert dict(zip(REGIONS, ours)) == dict(zip(REGIONS, white([t.split() for t in REGIONS])))


@pytest.mark.parametrize("args", ["", "+SR0.2 +ER8 +SC2", "+H2", "+H1"])
def test_slice_renders_just_its_rows(args: str, white: Renders, tmp_path: Path) -> None:
    options = read_command_line(["s.pov", "+W10", "+H10", *args.split()], tmp_path, {}, [])
    region = region_of(options)
    rows = range(region.top, region.bottom + 1)
    slices = [(a, b) for a in rows for b in rows if a < b and (b - a < 3 or b == region.bottom)]
    extra = [[f"{k}={v}" for k, v in slice_values(options, *rows).items()] for rows in slices]
    found = white([[*args.split(), *more] for more in extra])
    assert found == [(a, b, region.left, region.right) for a, b in slices]


def test_slice_is_cut_to_the_region(tmp_path: Path) -> None:
    options = read_command_line("s.pov +H40 +SR11 +ER30 +BS7".split(), tmp_path, {}, [])
    whole = {"Start_Row": "11", "End_Row": "30", "Render_Block_Size": "7"}
    assert slice_values(options, 0, 40) == whole
    assert slice_values(options, 29, 99)["Start_Row"] == "30"
    for top, bottom in ((0, 10), (30, 40), (15, 15)):
        with pytest.raises(UserError, match="rows 10 to 30"):
            slice_values(options, top, bottom)
    check_ini(to_ini(slice_values(read_command_line(["s.pov"], tmp_path, {}, []), 0, 1), [], []))


@pytest.mark.parametrize(("args", "block"), [
    ("", 1), ("+A", 32), ("+A0.1 +AM1 +BS7", 7), ("+A +AM2", 1), ("-A +A0.1 -A", 1), ("+BS64", 1),
    ("+A +BS200", 100), ("+A +SR41 +ER60", 20), ("+TH", 100), ("+THD1 +SR11", 90), ("+THB2", 1),
    ("+A +THB2", 32), ("+A +AM2 +THD2", 100), ("+THFS -TH", 1), ("+A +AM3", 32),
])
def test_where_slices_may_begin(args: str, block: int, tmp_path: Path) -> None:
    line = ["s.pov", "+H100", *args.split()]
    assert region_of(read_command_line(line, tmp_path, {}, [])).block == block
