#!/usr/bin/env python3
"""povfarm: the render farm for POV-Ray, in one file.

Turns the computers in a room into one renderer: a coordinator (``serve``) and
any number of workers (``work``), or both at once for a single job
(``render``). Needs Python 3.9 or newer and POV-Ray, nothing else.

    python povfarm.py render camera2.ini +W640 +H480     like povray, sooner
    python povfarm.py serve                              a coordinator
    python povfarm.py work --cores 4                     a worker

The sections, from the base to the roof; a section uses only sections above
it, and the coordinator's tower and the worker's tower never use each other:

     1. BASE         errors, clock, logging, files, sizes, durations, hashes
     2. SETTINGS     one row per option: flag, environment, file, type, help
     3. POV          POV-Ray's command line and INI files, frames, file names
     4. IMAGE        the picture formats: check, rows cut and joined, animated PNG
     5. PROJECT      which files belong to a job, manifest, zip in and out
     6. MODEL        records, states, transitions, the wire form
     7. DISCOVERY    the UDP beacon
     8. HTTP         requests, responses, routes, limits, the socket adaptor
     9. STORE        the database and the blobs: all SQL
    10. SCHEDULER    the only writer of states
    11. API          native JSON under /api/v1 and its OpenAPI document
    12. HTTPOV       the protocol of HTTPov's clients
    13. SHEEPIT      the protocol of SheepIt's clients
    14. RENDERONLINE the protocol of RenderOnline's clients
    15. PAGES        the status page
    16. COORDINATOR  puts 9 to 15 together, housekeeping, shutdown
    17. ENGINES      command lines, progress and error patterns of renderers
    18. CLIENT       one request function: retries, authentication, streams
    19. PROCESS      starts, watches, measures and ends a renderer
    20. WORKER       lease, fetch, render, check, upload; heartbeat; cache
    21. CLI          one small function per command

The command line is stable between versions. The Python names in this file
are not: script the commands with ``--json``, or use the HTTP API.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import configparser
import contextlib
import ctypes
import enum
import errno
import fnmatch
import functools
import hashlib
import hmac
import html
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import platform
import queue
import random
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import (
    Any,
    BinaryIO,
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
    Union,
    cast,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource


# === 1. BASE =================================================================
# What every section may use: the error tree, the clock, files, sizes,
# durations and hashes. Knows nothing of POV-Ray, of farms or of the network.

VERSION = "0.1.0"
BUFFER = 1 << 16  # bytes moved at a time when a file or a body is streamed
LEFT_FREE = 16 << 20  # bytes of a disk that are not filled with images and projects

log = logging.getLogger("povfarm")


class FarmError(Exception):
    """A failure that a person can read: one plain line, what to do next in it."""

    exit_code = 1


class UserError(FarmError):
    """Wrong usage or bad input: nothing was started and nothing was changed."""

    exit_code = 2


class ProtocolError(FarmError):
    """A request that is refused: ``status`` is the HTTP status to answer with."""

    def __init__(self, status: int, message: str, detail: Any = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class StoreError(FarmError):
    """The database or the data directory cannot do what was asked."""


class NoRoom(StoreError):
    """A disk takes nothing: who has something to store keeps it, and tries again later."""


class IllegalTransition(StoreError):
    """A task or a job was asked to change into a state that it cannot reach."""


class StaleLease(StoreError):
    """A lease that has ended was shown: its holder should stop that work."""


class RenderFailed(FarmError):
    """A renderer ran and left no good picture; the message says why."""


class ImageError(FarmError):
    """A file is not the whole picture that it should be."""


class Clock:
    """Time as the farm sees it; a test passes another one.

    ``time`` is the wall clock in seconds since 1970, to show to people;
    ``monotonic`` never jumps and is what every wait and lease is measured by.
    """

    def time(self) -> float:
        """Return the wall clock, in seconds since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start that never go backwards."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float) -> bool:
        """Wait on a held condition for at most ``seconds``; True when notified."""
        return condition.wait(seconds)


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Path]:
    """Give the name of a file to make, which becomes ``path`` when it is whole, or is deleted.

    The name, ``.PROCESS.RANDOM.part`` beside it, tells who left it behind.
    """
    part = path.with_name(f".{os.getpid()}.{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # also when both were links to one file: then nothing is replaced


def atomic_write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` so that ``path`` holds all of it or what it held before."""
    with placed(path) as part, open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Let the names in a directory outlive a power cut: fsync of a file does not do that."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def takes_nothing(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, says that a disk stores nothing (more) for us."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _TAKES_NOTHING:
            return True
        error = error.__cause__
    return False


_TAKES_NOTHING = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO, errno.EROFS,
                  errno.EPERM, errno.EACCES}


def free_room(place: Path) -> int:
    """Return the bytes that are free at a place beyond those that the farm leaves free.

    A disk that is full to the brim would not even take the deletion of a job.
    """
    return shutil.disk_usage(place).free - LEFT_FREE


def hold_file(file: BinaryIO) -> None:
    """Lock an open file until this process ends; ``OSError`` when another one holds it."""
    if sys.platform == "win32":
        file.seek(1 << 30)  # nobody else reads or writes the byte that is locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_running(process: int) -> bool:
    """Tell whether there is a process with this number."""
    if sys.platform == "win32":  # where os.kill would end it
        kernel = ctypes.WinDLL("kernel32")
        handle = kernel.OpenProcess(0x100000, False, process)  # SYNCHRONIZE
        return bool(handle) and bool(kernel.CloseHandle(handle))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it lives, and is another user's
    return True


def safe_join(root: Path, relative: str, windows: bool = os.name == "nt") -> Path:
    """Return ``root / relative``, refusing anything that could leave ``root``.

    ``relative`` uses forward slashes. Absolute paths, ``.``, ``..``,
    backslashes and control characters raise ``UserError`` everywhere; on
    ``windows`` so do drive letters and the names and characters that it reserves.
    """
    parts = relative.split("/")
    for part in parts:
        if part in ("", ".", "..") or any(ord(c) < 32 or c == "\\" for c in part):
            raise UserError(f"{relative!r} is not a name of a file inside a project")
        stem = part.split(".")[0].rstrip(" ").upper()
        odd = part != part.rstrip(" .") or any(c in ':*?"<>|' for c in part)
        if windows and (odd or stem in _RESERVED_NAMES):
            raise UserError(f"{relative!r} is not a file name that Windows can take")
    return root.joinpath(*parts)


_RESERVED_NAMES = frozenset(
    ["CON", "PRN", "AUX", "NUL"] + [f"{name}{n}" for name in ("COM", "LPT") for n in range(1, 10)]
)


def is_file(path: Path) -> bool:
    """Tell whether a file is there; False, too, for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, a NUL in it
        return False


def file_blocks(path: Path) -> Iterator[bytes]:
    """Read a file bit by bit."""
    with open(path, "rb") as file:
        yield from iter(functools.partial(file.read, BUFFER), b"")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    for block in file_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def format_size(size: float) -> str:
    """Return a number of bytes as people write it: ``512 B``, ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_duration(seconds: float) -> str:
    """Return seconds as people write them: ``0.4 s``, ``1:05``, ``2:03:04``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parse_duration(text: str) -> float:
    """Return seconds from ``90``, ``90s``, ``5m``, ``1h`` or ``1h30m``; else ``UserError``."""
    parts = r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d+)?)s?)?"
    match = re.fullmatch(parts, text.strip().lower())
    if not text.strip() or match is None:
        raise UserError(f"'{text}' is not a time: write 90, 90s, 5m or 1h30m")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_size(text: str) -> int:
    """Return bytes from ``512``, ``64k``, ``1.5G``; anything else is a ``UserError``."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise UserError(f"'{text}' is not a size: write 500M or 2G")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


# === 2. SETTINGS =============================================================
# One row per option. The rows feed the command line, the POVFARM_*
# environment variables, the file DATA/povfarm.ini and the manual, so that an
# option has one name, one default and one explanation everywhere.


POVRAY_CHOICE = r"auto|any|\d+(\.\w+)*"  # which POV-Ray may render a job


@dataclass(frozen=True)
class Setting:
    """One option: ``--name``, ``POVFARM_NAME`` and ``name`` in povfarm.ini.

    ``kind`` is bool (a flag without a value), or a function from text to a value.
    """

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    commands: str
    metavar: str = ""

    @property
    def is_flag(self) -> bool:
        """True when the option takes no value."""
        return self.kind is bool

    @property
    def variable(self) -> str:
        """The environment variable that sets the option."""
        return "POVFARM_" + self.name.upper().replace("-", "_")

    def parse(self, text: str, source: str) -> Any:
        """Return the value that ``text`` means, or a ``UserError`` that names ``source``."""
        try:
            return (_flag if self.is_flag else self.kind)(text)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except ValueError:
            raise UserError(f"{source}: '{text}' is not a whole number") from None


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word not in _ON + _OFF:
        raise UserError(f"'{text}' is neither on nor off")
    return word in _ON


_ON, _OFF = ("1", "on", "yes", "true"), ("0", "off", "no", "false", "")


def _whole(text: str, least: int, most: float, refusal: str) -> int:
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise UserError(f"'{text}' is not {refusal}")
    return int(text)


def _word(text: str, pattern: str, refusal: str) -> str:
    if not re.fullmatch(pattern, text):
        raise UserError(f"'{text}' is {refusal}")
    return text


_port = functools.partial(
    _whole, least=0, most=65535, refusal="a port: write a number from 0 to 65535")
_count = functools.partial(
    _whole, least=1, most=math.inf, refusal="a count: write a whole number, 1 or more")
_percent = functools.partial(_whole, least=0, most=100, refusal="between 0 and 100")
_nice = functools.partial(_whole, least=0, most=19, refusal="between 0 and 19")
_slices = functools.partial(_word, pattern="auto|off|[1-9][0-9]{0,3}",
                            refusal="neither auto nor off nor a number of slices")
_version = functools.partial(_word, pattern=POVRAY_CHOICE,
                             refusal="neither auto nor any nor a version, such as 3.7")
_tls = functools.partial(
    _word, pattern="auto", refusal="not 'auto': your own certificate is named by --tls-cert")


def _radiosity(text: str) -> str:
    known = {"share": "share", "share=animation": "animation", "off": "off"}
    if text not in known:
        raise UserError(f"'{text}' is not one of {', '.join(known)}")
    return known[text]


def _pin(text: str) -> str:
    pin = text.replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", pin):
        raise UserError(f"'{text}' is not the SHA-256 of a certificate: 64 hexadecimal digits")
    return pin


def _lease_time(text: str) -> float:
    seconds = parse_duration(text)
    if seconds < 1:
        raise UserError(f"'{text}' is too short: a second is the least")
    return seconds


def _rate(text: str) -> Fraction:
    with contextlib.suppress(ValueError, ZeroDivisionError):
        if Fraction(1, 1000) <= Fraction(text) <= 1000:
            return Fraction(text)
    raise UserError(f"'{text}' is not a rate from 0.001 to 1000, such as 24 or 30000/1001")


def _whole_seconds(text: str) -> int:
    return math.ceil(parse_duration(text))


def _path(text: str) -> Path:
    """Return a path that means the same in whatever directory a renderer runs."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # of nobody's home
        raise UserError(f"'{text}' is no path: {error}") from None


# "talk" stands for every command that talks to a coordinator that runs already,
# "job" for those that describe a new job.
SETTINGS: tuple[Setting, ...] = (
    Setting("data", _path, Path("~/.povfarm").expanduser(),
            "directory of the farm: database, images, key, cache",
            "serve work render talk doctor backup", "DIR"),
    Setting("server", str, "", "address of the coordinator, instead of looking for it",
            "work talk", "URL"),
    Setting("key", str, "", "the farm key, where DATA/farm.key is not at hand", "work talk", "KEY"),
    Setting("name", str, "", "name of the farm, to give it one or to choose it; of the job",
            "serve work talk job", "NAME"),
    Setting("worker-name", str, "", "name of the worker; by itself the computer's", "work",
            "NAME"),
    Setting("port", _port, 2271, "TCP port of the coordinator; 0 picks a free one", "serve", "N"),
    Setting("bind", str, "", "address to listen on; by itself every one of this machine",
            "serve", "ADDRESS"),
    Setting("host", str, "", "more names of this computer, parted by commas, that browsers may "
            "call it by", "serve", "A,B"),
    Setting("discovery-port", _port, 2269, "UDP port of the discovery",
            "serve work talk render", "N"),
    Setting("no-discovery", bool, False, "do not answer workers that look for a farm", "serve"),
    Setting("open", bool, False, "admit workers from private addresses by themselves", "serve"),
    Setting("private", bool, False, "show the page and the API only to those with a key", "serve"),
    Setting("tls", _tls, "", "'auto': speak TLS, with a certificate made here", "serve", "auto"),
    Setting("tls-cert", _path, None, "speak TLS, with the certificate in this PEM file", "serve",
            "FILE"),
    Setting("tls-key", _path, None, "the key of that certificate, where it is in another file",
            "serve", "FILE"),
    Setting("pin", _pin, "", "SHA-256 of the only certificate that the coordinator may show",
            "work talk", "SHA256"),
    Setting("work", bool, False, "render on this machine too", "serve"),
    Setting("httpov", bool, False, "let HTTPov's clients render: prints what they need",
            "serve"),
    Setting("lease-time", _lease_time, 30.0,
            "how long a silent worker keeps its frames, such as 30s", "serve", "TIME"),
    Setting("cores", _count, None, "cores to keep busy; by itself all of them",
            "work render serve", "N"),
    Setting("until-idle", bool, False, "end when there is nothing left to render", "work"),
    Setting("povray", str, "", "the POV-Ray program to use", "work render serve doctor", "PATH"),
    Setting("nice", _nice, 5, "how far renders step back behind other programs, 0 to 19",
            "work serve", "N"),
    Setting("memory", parse_size, 0, "most memory of one POV-Ray; by itself all that there is",
            "work render serve", "SIZE"),
    Setting("unconfined", bool, False, "let scenes read and write whatever you can",
            "work render serve"),
    Setting("tags", str, "", "words that describe the worker, parted by commas", "work", "A,B"),
    Setting("cache-size", parse_size, 10 * 1000**3, "most bytes of projects to keep here",
            "work render serve", "SIZE"),
    Setting("root", _path, None, "directory of the project, when it is not the scene's",
            "job", "DIR"),
    Setting("priority", int, 0, "jobs of a higher priority go first", "submit", "N"),
    Setting("max-workers", _count, None, "most workers on this job at a time", "submit", "N"),
    Setting("retries", _count, 3, "how often a frame is tried, on different workers",
            "submit render", "N"),
    Setting("in-order", bool, None,
            "render frames in order on one machine; by itself where one reads another", "job"),
    Setting("slices", _slices, "auto",
            "cut each frame into slices for several workers: auto, off or a number", "job", "N"),
    Setting("radiosity", _radiosity, "share",
            "share (slices share samples), share=animation (frames too) or off", "job", "HOW"),
    Setting("povray-version", _version, "auto",
            "which POV-Ray renders the job: auto (the first worker's), any, or such as 3.7",
            "job", "VERSION"),
    Setting("frame-timeout", _whole_seconds, 0,
            "most time for one frame, such as 30m; by itself 20 times what the others take", "job",
            "TIME"),
    Setting("verify", _percent, 0,
            "percent of the frames that two workers render, to compare them", "job", "P"),
    Setting("wait", bool, False, "wait until the job is finished", "submit"),
    Setting("output", _path, None, "directory for the images", "submit fetch", "DIR"),
    Setting("apng", _path, None, "make an animated PNG of all frames", "fetch", "FILE"),
    Setting("video", _path, None, "make a film of all frames with ffmpeg, such as film.mp4",
            "fetch", "FILE"),
    Setting("fps", _rate, Fraction(25), "frames a second, such as 24 or 30000/1001", "fetch", "N"),
    Setting("lan", bool, False, "let the other computers of this network help", "render"),
    Setting("watch", bool, False, "go on showing changes until stopped", "status"),
    Setting("json", bool, False, "print JSON for programs",
            "render submit status workers logs fetch discover doctor"),
    Setting("verbose", bool, False, "say more about what happens", "serve work render submit"),
)


def setting(name: str) -> Setting:
    """Return the row of an option; KeyError when there is none of that name."""
    return {row.name: row for row in SETTINGS}[name]


def configured_defaults(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return every option's value before the command line is read.

    The environment goes before DATA/povfarm.ini (section ``[povfarm]``),
    which goes before the row's default. Raises ``UserError`` for a bad value
    and for a name in the file that no option has.
    """
    values: dict[str, Any] = {row.name: row.default for row in SETTINGS}
    data = setting("data")
    if environ.get(data.variable):
        values["data"] = data.parse(environ[data.variable], data.variable)
    file = values["data"] / "povfarm.ini"
    for name, text in _read_settings_file(file).items():
        if name not in values:
            raise UserError(f"{file}: there is no option '{name}': see povfarm.py help")
        values[name] = setting(name).parse(text, f"{file}: {name}")
    for row in SETTINGS:
        if environ.get(row.variable):
            values[row.name] = row.parse(environ[row.variable], row.variable)
    return values


def _read_settings_file(path: Path) -> Mapping[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return dict(parser["povfarm"]) if parser.has_section("povfarm") else {}


# === 3. POV ==================================================================
# POV-Ray's command line and INI files, read as POV-Ray 3.7.0.10 reads them on a
# machine that need not have it: the options in the order in which they count,
# the frames with their clocks and file names, and the plain INI text that a
# worker gives to its own POV-Ray. Opens INI files, starts nothing, and does not
# ask which files a scene needs (that is PROJECT's).

STANDARD = "%POVRAY%"  # in a library path: the include directories of the POV-Ray that renders
SYSTEM_INI = tuple(
    Path(folder, "povray.ini")
    for folder in ("/etc/povray/3.7", "/usr/local/etc/povray/3.7", "/etc")
)
MAX_FRAMES = 1_000_000

# Every key of POV-Ray 3.7.0.10 by what its value is; "old" keys are read and mean nothing.
_KEY_TABLE = {
    "bool": """All_Console Antialias Append_File Bounding Clockless_Animation Continue_Trace
        Cyclic_Animation Debug_Console Display Dither Draw_Vistas Fatal_Console Field_Render
        Grayscale_Output High_Reproducibility Jitter Light_Buffer Odd_Field Output_Alpha
        Output_To_File Pause_When_Done Radiosity_From_File Radiosity_To_File
        Radiosity_Vain_Pretrace Real_Time_Raytracing Remove_Bounds Render_Console Split_Unions
        Statistic_Console Test_Abort Verbose Vista_Buffer Warning_Console""",
    "int": """Antialias_Depth Bits_Per_Color Bounding_Method Bounding_Threshold BSP_MaxDepth
        Compression Final_Frame Frame_Step Height Initial_Frame Max_Image_Buffer_Memory
        Preview_End_Size Preview_Start_Size Quality Render_Block_Size Render_Block_Step
        Render_Pattern Sampling_Method Test_Abort_Count Warning_Level Width Work_Threads""",
    "float": """Antialias_Gamma Antialias_Threshold BSP_BaseAccessCost BSP_ChildAccessCost
        BSP_ISectCost BSP_MissChance Clock End_Column End_Row Final_Clock Initial_Clock
        Jitter_Amount Start_Column Start_Row Subset_End_Frame Subset_Start_Frame Version""",
    "text": "Include_Header Input_File_Name Output_File_Name Radiosity_File_Name",
    "log": """All_File Create_Ini Debug_File Fatal_File Render_File Statistic_File
        Warning_File""",
    "gamma": "Display_Gamma File_Gamma",
    "type": "Output_File_Type",
    "dither": "Dither_Method",
    "letter": "Palette Video_Mode",
    "declare": "Declare",
    "library": "Library_Path",
    "ini": "Include_Ini",
    "program": """Fatal_Error_Command Post_Frame_Command Post_Scene_Command Pre_Frame_Command
        Pre_Scene_Command User_Abort_Command""",
    "return": """Fatal_Error_Return Post_Frame_Return Post_Scene_Return Pre_Frame_Return
        Pre_Scene_Return User_Abort_Return""",
    "old": """Buffer_Output Buffer_Size Create_Histogram Histogram_Grid_Size Histogram_Name
        Histogram_Type""",
}
_KEYS = {key.lower(): (key, kind) for kind, keys in _KEY_TABLE.items() for key in keys.split()}
_KEYS["bits_per_colour"] = _KEYS["bits_per_color"]

# SWITCH=KEY for a switch with a parameter, SWITCH=+KEY for one that is on or off, both for both.
# POV-Ray takes the first that fits, so the order counts: "A0" makes +A0.3 a threshold, +A1.5 wrong.
_SWITCH_TABLE = """AG=Antialias_Gamma AM=Sampling_Method A0=Antialias_Threshold+Antialias
    A=+Antialias BM=Bounding_Method BS=Render_Block_Size B=+Bounding C=+Continue_Trace
    D=Video_Mode+Display D=+Display EC=End_Column EF0=Subset_End_Frame EF=Subset_End_Frame
    EP=Preview_End_Size ER=End_Row F=Output_File_Type+Output_To_File F=+Output_To_File
    GA=All_File+All_Console GA=+All_Console GD=Debug_File+Debug_Console GD=+Debug_Console
    GF=Fatal_File+Fatal_Console GF=+Fatal_Console GI=Create_Ini GP=+Append_File
    GR=Render_File+Render_Console GR=+Render_Console GS=Statistic_File+Statistic_Console
    GS=+Statistic_Console GW=Warning_File+Warning_Console GW=+Warning_Console HI=Include_Header
    HR=+High_Reproducibility H=Height I=Input_File_Name J=Jitter_Amount+Jitter J=+Jitter
    KC=+Cyclic_Animation KI=Initial_Clock KFF=Final_Frame KFI=Initial_Frame KF=Final_Clock
    KLA=+Clockless_Animation K=Clock L=Library_Path MB=Bounding_Threshold+Bounding MB=+Bounding
    MI=Max_Image_Buffer_Memory MV=Version O=Output_File_Name P=+Pause_When_Done Q=Quality
    RFI=+Radiosity_From_File RFO=+Radiosity_To_File RF=Radiosity_File_Name RS=Render_Block_Step
    RP=Render_Pattern RTR=+Real_Time_Raytracing RVP=+Radiosity_Vain_Pretrace R=Antialias_Depth
    SC=Start_Column SF0=Subset_Start_Frame SF=Subset_Start_Frame SP=Preview_Start_Size SR=Start_Row
    STP=Frame_Step SU=+Split_Unions TH=Dither_Method+Dither TH=+Dither UA=+Output_Alpha
    UD=+Draw_Vistas UF=+Field_Render UL=+Light_Buffer UO=+Odd_Field UR=+Remove_Bounds
    UV=+Vista_Buffer V=+Verbose WL=Warning_Level WT=Work_Threads W=Width
    X=Test_Abort_Count+Test_Abort X=+Test_Abort"""
_SWITCHES = tuple(
    (switch, *parameter.partition("+")[::2])
    for switch, parameter in (entry.split("=") for entry in _SWITCH_TABLE.split())
)

_EXTENSIONS = {
    "T": ".tga", "C": ".tga", "N": ".png", "J": ".jpg",
    "P": ".ppm", "B": ".bmp", "E": ".exr", "H": ".hdr",
}
# No window opens on a farm, and POV-Ray's text always goes to its stderr, where the farm reads it.
_OF_NO_USE = (
    "All_Console", "Append_File", "Display", "Draw_Vistas", "Fatal_Console", "Pause_When_Done",
    "Preview_End_Size", "Preview_Start_Size", "Real_Time_Raytracing", "Render_Console",
    "Test_Abort", "Test_Abort_Count",
)
_WRITABLE = {
    name: kind
    for name, kind in _KEYS.values()
    if kind in ("bool", "int", "float", "text", "gamma", "type", "dither")
    and name not in ("Append_File", "Real_Time_Raytracing")
}
_LOGS = _KEY_TABLE["log"].split()
_UNIX_OPTIONS = (
    "--help", "-help", "-h", "-?", "--version", "-version", "--V", "--benchmark", "-benchmark",
)


@dataclass(frozen=True)
class PovOptions:
    """What one POV-Ray command line says, all its INI files included.

    ``values`` maps INI keys to values as INI text has them, without the keys
    that mean nothing on a farm. ``declares`` are ``name=value`` in order: of
    two with one name POV-Ray takes the FIRST. ``library`` are the directories
    in search order as they were written, relative to the working directory.
    ``warnings`` say what was left out.
    """

    values: Mapping[str, str]
    declares: tuple[str, ...]
    library: tuple[str, ...]
    ini_files: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def scene(self) -> str:
        """The scene file as it was written; ``UserError`` when none was named."""
        scene = self.values.get("Input_File_Name", "")
        if not scene:
            raise UserError("no scene: name a .pov file, or an INI file with Input_File_Name in it")
        return scene

    @property
    def width(self) -> int:
        """Width of the picture in pixels."""
        return int(self.values.get("Width", 160))

    @property
    def height(self) -> int:
        """Height of the picture in pixels."""
        return int(self.values.get("Height", 120))

    @property
    def output_type(self) -> str:
        """POV-Ray's letter for the file type: one of T C N J P B E H."""
        return self.values.get("Output_File_Type", "N")

    @property
    def extension(self) -> str:
        """The extension of the pictures with its dot; PPM keeps ``.ppm`` also when it is grey."""
        return _EXTENSIONS[self.output_type]

    @property
    def threads(self) -> int | None:
        """``+WT``; None where the command line leaves it to POV-Ray."""
        return int(self.values["Work_Threads"]) if "Work_Threads" in self.values else None

    @property
    def to_file(self) -> bool:
        """False after ``-F``: POV-Ray would render and write no picture."""
        return self.values.get("Output_To_File", "On") == "On"


@dataclass(frozen=True)
class FramePlan:
    """Every frame that a command line asks for, in the order of rendering.

    A still is frame 0 and its clock is ``initial_clock``. ``stem`` is the path
    of a picture up to the frame number, ``digits`` the width of that number.
    """

    animation: bool
    frames: range
    initial_frame: int
    final_frame: int
    initial_clock: float
    final_clock: float
    cyclic: bool
    digits: int
    stem: str
    extension: str

    def clock(self, frame: int) -> float:
        """Return ``clock`` as the scene sees it: computed in double, kept in single precision.

        A cyclic animation runs as if it had one frame more. An animation whose
        first frame is its last divides by zero, as in POV-Ray: its clock is NaN.
        """
        if not self.animation:
            return self.initial_clock
        steps = self.final_frame + self.cyclic - self.initial_frame
        span = _single(self.final_clock - self.initial_clock)
        delta = span / steps if steps else math.inf if span > 0 else -math.inf if span else math.nan
        return _single(delta * (frame - self.initial_frame) + self.initial_clock)

    def output_name(self, frame: int) -> str:
        """Return the file that POV-Ray writes: relative to its working directory, or absolute."""
        number = str(frame).zfill(self.digits) if self.animation else ""
        return self.stem + number + self.extension


def read_command_line(
    args: Sequence[str],
    cwd: Path,
    environ: Mapping[str, str],
    system_ini: Sequence[Path] = SYSTEM_INI,
) -> PovOptions:
    """Read ``args`` as POV-Ray, started in ``cwd``, reads its command line.

    The base INI comes first (POVINI, ./povray.ini, the user's, the system's),
    then the arguments; later wins, but Library_Path and Declare add up.
    Raises ``UserError`` for what POV-Ray refuses, for what starts programs and
    for what cannot be done in parts. Unlike POV-Ray 3.7, which garbles them,
    letters beyond ASCII in names are taken as they are.
    """
    reader = _CommandLine(cwd)
    base = _base_ini(cwd, environ, system_ini)
    if base:
        reader.read_ini(base)
    if not base or Path(base) in system_ini:
        reader.library = [STANDARD]
    for arg in args:
        if arg in _UNIX_OPTIONS:
            raise UserError(f"{arg} renders nothing: to ask POV-Ray itself, run povray {arg}")
        if re.search(r"[\s;#'\"]", arg) and is_file(cwd / arg):
            raise UserError(
                f"POV-Ray would take {arg!r} apart: put quotes inside the quotes: "
                + shlex.quote(quoted(arg))
            )
        reader.read_text(_Text(arg, ""))
    if environ.get("POVINC"):
        reader.set("Library_Path", "library", environ["POVINC"], "POVINC")
    return reader.finish()


def plan_frames(options: PovOptions) -> FramePlan:
    """Return the frames of a command line as POV-Ray counts them.

    Initial and final frame both 0 or both 1 (unset counts as 0) make a still.
    Raises ``UserError`` when there are no frames, or more than ``MAX_FRAMES``,
    or no rows in them, or when POV-Ray would write the pictures to stdout or
    under spoilt names.
    """
    region_of(options)
    values = options.values
    limits = (int(values.get("Initial_Frame", 0)), int(values.get("Final_Frame", 0)))
    stem = _output_stem(options)
    if limits in ((0, 0), (1, 1)):
        clock = _number(values, "Clock", 0.0)
        return FramePlan(False, range(1), 0, 0, clock, clock, False, 0, stem, options.extension)
    initial = max(int(values.get("Initial_Frame", 1)), 0)
    final = int(values.get("Final_Frame", 1))
    if final < initial:
        raise UserError(f"no frames: Final_Frame={final} comes before Initial_Frame={initial}")
    cyclic = values.get("Cyclic_Animation") == "On"
    start = max(_subset(values, "Subset_Start_Frame", initial, initial, final + cyclic), initial)
    end = max(_subset(values, "Subset_End_Frame", final, initial, final + cyclic), start)
    frames = range(start, end + 1, max(int(values.get("Frame_Step", 1)), 1))
    digits = len(str(final + cyclic))
    # POV-Ray keeps subset frames in single precision, which is exact below 2**24.
    if len(frames) > MAX_FRAMES or end >= 2**24:
        raise UserError(f"frames {start} to {end} are too many: povfarm takes {MAX_FRAMES} at most")
    if len(str(end)) > digits:
        raise UserError(f"frame {end} has more digits than Final_Frame={final}: use a larger +KFF")
    return FramePlan(
        True, frames, initial, final,
        _number(values, "Initial_Clock", 0.0), _number(values, "Final_Clock", 1.0),
        cyclic, digits, stem, options.extension,
    )


@dataclass(frozen=True)
class Region:
    """What one frame renders: its rows and columns from 0, without ``bottom`` and ``right``.

    Slices that begin at ``top + k * block`` make up exactly the picture of the
    whole; where no slices do, ``block`` is all of the rows.
    """

    top: int
    bottom: int
    left: int
    right: int
    block: int


def region_of(options: PovOptions) -> Region:
    """Return the part of a frame that a command line asks for; ``UserError`` when it is none.

    POV-Ray itself ends with an error, writes a black picture or hangs for ever
    (POV-Ray/povray issue 312) where this refuses.
    """
    top, bottom = _span(options.values, "Row", options.height)
    left, right = _span(options.values, "Column", options.width)
    values, block = options.values, 1
    if values.get("Antialias") == "On" and values.get("Sampling_Method") != "2":
        # Method 1 looks at the rows above and below a pixel, but not across the edge of a render
        # block. Blocks are counted from the corner of the region.
        block = block_size(options)
    if values.get("Dither") == "On" and values.get("Dither_Method", "FS")[0] != "B":
        block = options.height  # all but the ordered methods carry errors on from row to row
    return Region(top, bottom, left, right, min(block, bottom - top))


def block_size(options: PovOptions) -> int:
    """Return the edge in pixels of the blocks in which POV-Ray 3.7 renders."""
    return int(options.values.get("Render_Block_Size", 32))


def slice_block(options: PovOptions) -> int:
    """Return the edge of the blocks of a slice: small where the pixels do not depend on it.

    Then little is lost of a slice that ends sooner than it was asked to, dear
    rows can be handed on, and threads share few rows evenly. A block costs some
    10 microseconds (chess2.pov: no more CPU time with 4 than with 32).
    """
    fixed = "Render_Block_Size" in options.values or region_of(options).block > 1
    return block_size(options) if fixed else 4


def slice_values(options: PovOptions, top: int, bottom: int) -> dict[str, str]:
    """Return the INI values that render just the rows from ``top`` to before ``bottom``.

    They go on top of the options' own; rows outside of the region are left out.
    The pixels are those of the whole frame when the slice begins at the region's
    ``top + k * block``, and so does the one below it.
    """
    region = region_of(options)
    top, bottom = max(top, region.top), min(bottom, region.bottom)
    if top >= bottom:
        raise UserError(f"no row of rows {region.top} to {region.bottom} is in the slice")
    # End_Row=1 is 100 %: to end with the first row takes a fraction.
    end = str(bottom) if bottom > 1 else _plain(1.5 / options.height)
    size = str(slice_block(options))
    return {"Start_Row": str(top + 1), "End_Row": end, "Render_Block_Size": size}


def quoted(text: str) -> str:
    """Return a text in the quotes without which POV-Ray takes it apart at blanks."""
    quote = "'" if '"' in text else '"'
    return f"{quote}{text}{quote}"


def to_ini(values: Mapping[str, str], declares: Sequence[str], library: Sequence[str]) -> str:
    """Return INI text that POV-Ray reads back to exactly these options, one on a line.

    Raises ``UserError`` for a key or value that povfarm does not hand on, and
    for names that POV-Ray 3.7 cannot read: it has no escapes, so not both kinds
    of quotes in one, and it garbles what is not ASCII.
    """
    lines = [f"{key}={_ini_value(key, values[key])}" for key in sorted(values)]
    # Quotes around the whole of name="text" keep the inner ones, which make it a string and not a
    # number. Of a number POV-Ray keeps six digits.
    lines += [f"Declare={_ini_quoted('Declare', declare)}" for declare in declares]
    lines += [f"Library_Path={_ini_quoted('Library_Path', path)}" for path in library]
    return "".join(f"{line}\n" for line in lines)


def check_ini(text: str) -> None:
    """Raise ``UserError`` unless ``text`` is, byte for byte, what ``to_ini`` writes."""
    values: dict[str, str] = {}
    declares: list[str] = []
    library: list[str] = []
    for line in text.split("\n")[:-1]:
        key, _, value = line.partition("=")
        if len(value) > 1 and value[0] in _QUOTES and value[-1] == value[0]:
            value = value[1:-1]
        if key in ("Declare", "Library_Path"):
            (declares if key == "Declare" else library).append(value)
        else:
            values[key] = value
    if to_ini(values, declares, library) != text:
        raise UserError("an INI text that povfarm did not write is refused")


_QUOTES = ('"', "'")
_WORD_START = re.compile(r"[A-Za-z0-9_]")
_BLANKS = re.compile(r"[ \t]*")
_LINES = re.compile(r"[ \t\n]*")
_LINE = re.compile(r"[^\n]*\n?")
_BEFORE_COMMENT = re.compile(r"[^\n;#]*")
_SECTION = re.compile(r"\[([^]]*)\]?")
_KEY = re.compile(r"[^ \t\n\v\f\r,;#\"'\[\]=]*")
_KEY_ON_COMMAND_LINE = re.compile(r"[^ \t\n\v\f\r;#\"'\[\]=]*")
_WORD = re.compile(r"[^ \t\n\v\f\r,;#\"']*")
_WORD_ON_COMMAND_LINE = re.compile(r"[^ \t\n\v\f\r;#\"']*")
_TRUE = ("on", "true", "yes", "1")
_INTEGER = re.compile(r"\s*([+-]?\d+)", re.ASCII)
_DECIMAL = re.compile(r"\s*([+-]?(?!0[xX])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII)


class _Text:
    """A place in an INI file, or in one argument when ``path`` is empty."""

    def __init__(self, text: str, path: str) -> None:
        self.text = re.sub(r"\r\n|\n\r|\r", "\n", text) if path else text
        self.path = path
        self.at = 0

    @property
    def where(self) -> str:
        """This place in words, for messages."""
        line = self.text.count("\n", 0, self.at) + 1
        return f"{self.path}, line {line}" if self.path else f"argument {self.text!r}"

    def peek(self) -> str:
        """Return the next character, empty at the end."""
        return self.text[self.at : self.at + 1]

    def take(self, pattern: re.Pattern[str]) -> str:
        """Return what ``pattern`` matches here and go on behind it."""
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def skip_blanks(self) -> None:
        """Go on behind the blanks around a value in an INI file; in an argument they end it."""
        if self.path:
            self.take(_BLANKS)

    def key(self) -> str:
        """Take the name of a key or a switch."""
        return self.take(_KEY if self.path else _KEY_ON_COMMAND_LINE)

    def value(self, runs_on: bool) -> str:
        """Take a value; one without quotes may run on over blanks in an INI file."""
        return self.quoted() if self.peek() in _QUOTES else self.word(runs_on)

    def quoted(self) -> str:
        """Take a quoted string; without its closing quote it goes on to the end."""
        close = self.text.find(self.peek(), self.at + 1)
        start, end = self.at + 1, close if close >= 0 else len(self.text)
        self.at = end + 1
        return self.text[start:end]

    def word(self, runs_on: bool) -> str:
        """Take a word without quotes."""
        if not self.path:
            return self.take(_WORD_ON_COMMAND_LINE)
        word = self.take(_WORD)
        if runs_on and self.peek() in (" ", "\t") and self._runs_on():
            word += self.take(_BEFORE_COMMENT)
        return word

    def _runs_on(self) -> bool:
        # POV-Ray's guess whether a blank belongs to a path without quotes. It looks for a key one
        # character too late, which only works at a line's end: there the next line's key ends the
        # word, while a comment, switch or empty line leaves the blank at the end of the value.
        ahead = _Text(self.text, self.path)
        ahead.at = self.at
        ahead.take(_BLANKS)
        first = ahead.peek()
        ahead.at += 1
        if first in ("", ";", "#", ","):
            return False
        if first in ("+", "-"):
            return not (ahead.peek().isascii() and ahead.peek().isalpha())
        return ahead.key().lower() not in _KEYS


class _CommandLine:
    """Reads texts one after the other and holds what they have said so far."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.values: dict[str, str] = {}
        self.declares: list[str] = []
        self.library: list[str] = []
        self.folders = [""]  # where INI files are looked for
        self.files: list[str] = []
        self.open: list[str] = []
        self.warnings: list[str] = []

    def read_ini(self, spec: str) -> None:
        """Read ``file`` or ``file[section]``; the extension .ini may be left out."""
        name, bracket, rest = spec.partition("[")
        if bracket and "]" not in rest:
            raise UserError(f"{spec!r}: the ] of the section is missing")
        if len(self.open) > 30:
            raise UserError(f"INI files include each other without end: {spec!r}")
        path = self._find_ini(name)
        try:
            data = (self.cwd / path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the INI file {path}: {error.strerror}") from None
        self.files.append(path)
        self.open.append(path)
        section = rest.split("]")[0] if bracket else None
        self.read_text(_Text(data.decode("utf-8", "surrogateescape"), path), section)
        self.open.pop()

    def _find_ini(self, name: str) -> str:
        dot = name.rfind(".")
        names = [name] if dot >= 0 and len(name) - dot <= 4 else []
        names += [f"{name}.ini", f"{name}.INI"]
        for folder in self.folders:
            for candidate in names:
                path = f"{folder}/{candidate}" if folder else candidate
                if is_file(self.cwd / path):
                    return path
        whose = f" (named in {self.open[-1]})" if self.open else ""
        hint = "" if dot >= 0 else "; a scene's name ends in .pov"
        raise UserError(f"there is no INI file {name!r}{whose}{hint}")

    def read_text(self, text: _Text, section: str | None = None) -> None:
        """Read an INI file with the lines of ``section``, or one argument."""
        wanted = True
        while True:
            text.take(_LINES if text.path else _BLANKS)
            char = text.peek()
            if not char:
                return
            if text.path and char == "[":
                name = text.take(_SECTION)[1:].rstrip("]")
                wanted = section is not None and name.lower() == section.lower()
            elif not wanted or (text.path and char in (";", "#")):
                text.take(_LINE)
            elif char in ("+", "-"):
                text.at += 1
                self._read_switch(text, char == "+")
            elif char in _QUOTES:
                self._use_word(text.quoted(), text.where)
            elif _WORD_START.match(char) and self._read_option(text):
                if text.path:
                    text.take(_LINE)  # POV-Ray skips what follows an option on its line
            else:
                self._read_word(text)

    def _read_option(self, text: _Text) -> bool:
        start, where = text.at, text.where
        name, kind = _KEYS.get(text.key().lower(), ("", ""))
        text.skip_blanks()
        if not name or text.peek() != "=":
            text.at = start
            return False
        text.at += 1
        text.skip_blanks()
        to_end = kind == "program" and text.path
        value = text.take(_BEFORE_COMMENT) if to_end else text.value(True)
        self.set(name, kind, value, where)
        text.skip_blanks()
        while text.path and text.peek() == ",":
            text.at += 1
            text.skip_blanks()
            self.set(name, kind, text.value(False), where)
            text.skip_blanks()
        return True

    def _read_word(self, text: _Text) -> None:
        where = text.where
        if text.path and text.peek().isascii() and not _WORD_START.match(text.peek()):
            text.at += 1  # POV-Ray loses it: ./a.pov on a line of its own becomes /a.pov
        word = text.word(True)
        if "=" in word:
            raise UserError(f"{where}: POV-Ray has no option {word.partition('=')[0]!r}")
        self._use_word(word, where)

    def _use_word(self, word: str, where: str) -> None:
        if word.lower().endswith(".pov"):
            self.set("Input_File_Name", "text", word, where)
        elif word.endswith("/"):
            self.set("Library_Path", "library", word, where)
        else:
            self.read_ini(word)

    def _read_switch(self, text: _Text, on: bool) -> None:
        where, sign = text.where, "+" if on else "-"
        word = text.key()
        quoted = text.quoted() if text.peek() in _QUOTES else None
        for switch, key, flag in _SWITCHES:
            if not word.upper().startswith(switch):
                continue
            parameter = word[len(switch) :]
            if quoted is not None:
                if parameter:
                    break
                parameter = quoted
            if bool(key) != (parameter[:1] > " "):
                continue
            if flag:
                self.values[flag] = "On" if on else "Off"
            if key == "Output_File_Type":
                parameter = self._file_type(parameter, where)
            if key:
                # +SF1.5 is frame 1, though the key that it sets takes fractions.
                kind = "int" if switch in ("EF", "SF") else _KEYS[key.lower()][1]
                self.set(key, kind, parameter, where)
            return
        raise UserError(f"{where}: POV-Ray has no switch {sign}{word}{quoted or ''}")

    def _file_type(self, parameter: str, where: str) -> str:
        letter, more = parameter[0], parameter[1:]
        if more in ("g", "G") and letter in "nNpP":
            self.values["Grayscale_Output"] = "On"
        elif more.isascii() and more.isdigit():
            self.values["Bits_Per_Color"] = _normal("Bits_Per_Color", "int", more, where)
        elif more:
            raise UserError(f"{where}: POV-Ray has no file type {parameter!r}, but +FN and +FN16")
        return letter

    def set(self, name: str, kind: str, value: str, where: str) -> None:
        """Take over one option; ``UserError`` when POV-Ray or povfarm refuses its value."""
        if kind == "program":
            if value.strip(" \t\"'"):
                raise UserError(
                    f"{name} in {where} starts a program; povfarm does not run programs "
                    "from INI files: remove that line"
                )
        elif kind == "old":
            self.warnings.append(f"{where}: POV-Ray does not use {name} any more")
        elif kind == "ini":
            self.read_ini(value)
        elif kind == "library":
            self.folders.append(_readable(name, value, where))
            self.library.append(value)
        elif kind == "declare":
            self._declare(_readable(name, value, where), where)
        elif kind not in ("return", "letter"):
            self.values[name] = _normal(name, kind, value, where)

    def _declare(self, value: str, where: str) -> None:
        name, _, rest = value.lstrip("=").partition("=")
        if not name:
            raise UserError(f"{where}: Declare needs a name and a number: Declare=size=5")
        if not rest:
            self.warnings.append(f"{where}: Declare={name} has no value and means nothing")
            return
        self.declares.append(f"{name}={rest}")

    def finish(self) -> PovOptions:
        """Return everything that was read, without what is of no use on a farm."""
        values = self.values
        if values.get("Real_Time_Raytracing") == "On":
            raise UserError("Real_Time_Raytracing (+RTR) shows frames and keeps none: remove it")
        grey = values.get("Grayscale_Output") == "On"
        if grey and values.get("Output_File_Type", "N") not in "NP":
            raise UserError("POV-Ray writes grey pictures as PNG or PPM only: use +FN or +FP")
        for key, least in (("Width", 1), ("Height", 1), ("Render_Block_Size", 4)):
            if int(values.get(key, least)) < least:
                raise UserError(f"{key}={values[key]} is too small: {least} is the least")
        for key in _LOGS:
            if values.get(key):
                self.warnings.append(f"{key}={values[key]} is not written: povfarm keeps the logs")
        # With a base INI of one's own its includes are POV-Ray's last resort, too.
        library = tuple(dict.fromkeys([*self.library, STANDARD]))
        kept = {k: v for k, v in values.items() if k not in (*_OF_NO_USE, *_LOGS)}
        files = tuple(dict.fromkeys(self.files))
        return PovOptions(kept, tuple(self.declares), library, files, tuple(self.warnings))


def _base_ini(cwd: Path, environ: Mapping[str, str], system_ini: Sequence[Path]) -> str:
    home = environ.get("HOME", "")
    for path in (
        environ.get("POVINI", ""),
        "./povray.ini",
        home and f"{home}/.povray/3.7/povray.ini",
        *map(str, system_ini),
        home and f"{home}/.povrayrc",
    ):
        if path and is_file(cwd / path):
            return path
    return ""


def _readable(name: str, value: str, where: str) -> str:
    if any((c < " " and c != "\t") or "\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {name} is not text: close its quotes, save the file as UTF-8")
    return value


def _normal(name: str, kind: str, value: str, where: str) -> str:
    """Return the one way in which povfarm writes what POV-Ray makes of ``value``."""
    code = value.lstrip().upper()
    integer, decimal = _INTEGER.match(value), _DECIMAL.match(value)
    number = float(decimal[1]) if decimal else 0.0
    normal: str | None = None
    if kind in ("text", "log"):
        normal = _readable(name, value, where)
    elif kind == "bool":
        # As many letters are compared as both have, so that nothing at all means On.
        true = any(word.startswith(value[: len(word)].lower()) for word in _TRUE)
        normal = "On" if true else "Off"
    elif kind == "type" and code[:1] in _EXTENSIONS:
        normal = code[:1]
    elif code in {"dither": ("B2", "B3", "B4", "D1", "D2", "FS"), "gamma": ("SRGB",)}.get(kind, ()):
        normal = code
    elif kind == "int" and integer and abs(float(integer[1])) < 2**31:
        normal = str(int(float(integer[1])))  # int() of a text has a limit of its own
    elif (kind == "float" and decimal) or (kind == "gamma" and number >= 0.001):
        normal = _plain(number)
    if normal is None or not math.isfinite(_single(number)):
        raise UserError(f"{where}: {name} cannot be {value!r}")
    return normal


def _plain(number: float) -> str:
    return repr(number)[:-2] if repr(number).endswith(".0") else repr(number)


def _single(number: float) -> float:
    return ctypes.c_float(number).value


def _number(values: Mapping[str, str], key: str, default: float) -> float:
    return _single(float(values.get(key, default)))


def _subset(values: Mapping[str, str], key: str, default: int, initial: int, final: int) -> int:
    # Between 0 and 1 it is a fraction of the number of frames; initial is not added to that.
    if key not in values:
        return default
    number = max(_number(values, key, 0.0), 0.0)
    return int(_single((final - initial + 1) * number) if 0 < number < 1 else number)


def _span(values: Mapping[str, str], axis: str, size: int) -> tuple[int, int]:
    """Return first row or column and the one after the last, as POV-Ray computes them."""
    # From 0 to 1 they are fractions: a start without the 1, an end with it. Computed in double from
    # single precision, so that 0.7 of 100 is row 69. int() cuts off towards 0.
    start = _number(values, f"Start_{axis}", 1.0)
    end = _number(values, f"End_{axis}", float(size))
    first = int(size * start) if 0 <= start < 1 else int(start - 1)
    after = int(size * end) if 0 <= end <= 1 else int(end - 1) + 1
    if 0 <= first < after <= size:
        return first, after
    raise UserError(
        f"no {axis.lower()} to render: Start_{axis}={start:g} and End_{axis}={end:g} "
        f"must be in order, from 1 to {size}"
    )


def _output_stem(options: PovOptions) -> str:
    """Return the path of the pictures without frame number and extension."""
    name, extension = options.values.get("Output_File_Name", ""), options.extension
    if name in ("-", "stdout", "stderr"):
        raise UserError(f"povfarm writes pictures to files, not to {name}: name one with +O")
    folder, slash, file = (name or options.scene).rpartition("/")
    if not name or file in ("", extension):
        # The scene's name without its last extension, in the scene's folder or in that of +O.
        file = options.scene.rpartition("/")[2]
        file = file.rpartition(".")[0] if "." in file else file
    elif file.endswith(extension):
        file = file[: -len(extension)]
    elif file.endswith("."):
        file = file[:-1]
    return re.sub("/+", "/", folder + slash) + file


def _ini_value(key: str, value: str) -> str:
    kind = _WRITABLE.get(key, "")
    if kind == "text":
        return _ini_quoted(key, value)
    if not kind or _normal(key, kind, value, "the job") != value:
        raise UserError(f"povfarm does not hand {key!r} with {value!r} to POV-Ray")
    return value


def _ini_quoted(key: str, value: str) -> str:
    if set(_QUOTES) <= set(value) or not value.isascii():
        raise UserError(f"POV-Ray 3.7 cannot read {key} from an INI file: {value!r}")
    return quoted(_readable(key, value, "the job"))


# === 4. IMAGE ================================================================
# The picture formats that POV-Ray writes: is this the whole picture that was
# asked for? Its rows, cut out and joined again; frames as an animated PNG.
# Bytes in, bytes out: opens no file, starts nothing; a check takes no more
# memory than the picture's own data and one block.

_ODD = "is of a kind that POV-Ray never writes"
_BLOCK = 1 << 18  # bytes inflated at a time: what a lying header can cost
_HEAD = 1 << 12  # bytes in which a header of text has to end: POV-Ray's have less than 200


class ImageType(NamedTuple):
    """How a kind of picture is named: its file extension and its MIME type."""

    extension: str
    mime: str


# POV-Ray's letter after +F (Output_File_Type) and what it writes for it.
IMAGE_TYPES: Mapping[str, ImageType] = {
    "N": ImageType(".png", "image/png"),
    "T": ImageType(".tga", "image/x-tga"),
    "C": ImageType(".tga", "image/x-tga"),
    "P": ImageType(".ppm", "image/x-portable-pixmap"),
    "B": ImageType(".bmp", "image/bmp"),
    "J": ImageType(".jpg", "image/jpeg"),
    "E": ImageType(".exr", "image/x-exr"),
    "H": ImageType(".hdr", "image/vnd.radiance"),
}


@dataclass(frozen=True)
class ImageInfo:
    """What a whole picture is: its size in pixels, its channels and the bits of each.

    ``channels`` is 1 to 4: grey, grey and alpha, colour, colour and alpha.
    """

    width: int
    height: int
    channels: int
    depth: int


def check_image(data: bytes, extension: str, width: int, height: int) -> ImageInfo:
    """Return what ``data`` is when it is one whole picture of this type and size.

    ``extension`` is one of ``IMAGE_TYPES``. Raises ``ImageError`` with one line
    for a picture that ends early or late, has another type or size, or is
    damaged where its format lets one see it: all of a PNG and of an EXR's
    pixels, but only the structure of the others. What is expected is what
    POV-Ray 3.7 writes (measured with 3.7.0.10), not all that a format allows.
    """
    check = _CHECKS.get(extension)
    if check is None:
        known = ", ".join(_CHECKS)
        raise ImageError(f"'{extension}' is not a picture that POV-Ray writes: it writes {known}")
    with _told(data, extension):
        return check(data, (width, height)).info


def crop_rows(data: bytes, extension: str, top: int, rows: int) -> bytes:
    """Return ``rows`` rows of a picture, from row ``top`` on, as a picture of its own.

    Such a *strip* is of the same type and keeps the notes in the header. The
    picture has passed ``check_image``. Raises ``ImageError`` for rows that it
    does not have, and for a type that is not one of ``STRIP_TYPES``.
    """
    with _told(data, extension):
        picture = _read(data, extension)
        height = picture.info.height
        _need(0 <= top < top + rows <= height,
              f"a picture of {height} rows has no rows {top} to {top + rows - 1}")
        return _LAYOUTS[extension].build(data, list(picture.rows)[top:top + rows])


def join_rows(strips: Sequence[bytes], extension: str) -> bytes:
    """Return the whole picture that strips make, given from the top to the bottom.

    Its pixels are those of the strips; what its header says besides (software,
    date) is the first strip's. Each strip has passed ``check_image``, and so
    does the result. Raises ``ImageError`` when a strip is of another kind than
    the first.
    """
    _need(bool(strips), "there are no strips to join")
    with _told(strips[0], extension):
        found = [_read(strip, extension) for strip in strips]
        for number, each in enumerate(found, 1):
            _need(each.form == found[0].form, f"strip {number} does not fit the first: "
                                              f"{each.form}, not {found[0].form}")
        rows = [row for each in found for row in each.rows]
        whole = _LAYOUTS[extension].build(strips[0], rows)
    check_image(whole, extension, found[0].info.width, len(rows))
    return whole


def same_pixels(one: bytes, other: bytes, extension: str) -> bool:
    """Tell whether two whole pictures of a type show the same, whatever else is in them.

    Besides the date that POV-Ray writes into most of them, a PNG may be filtered
    otherwise by another libpng. JPEG is compared as it is packed.
    """
    if extension == ".jpg":
        one, other = (re.sub(rb"Render Date: [-0-9 :Z]+", b"", data, count=1)
                      for data in (one, other))
    if one == other or extension == ".jpg":
        return one == other
    with _told(one, extension):
        if extension != ".png":
            mine, theirs = _read(one, extension), _read(other, extension)
            return mine.form == theirs.form and list(mine.rows) == list(theirs.rows)
        a, b = _png_apart(one), _png_apart(other)
        return (a.form, a.info.height) == (b.form, b.info.height) and (
            all(map(operator.eq, _png_rows(a), _png_rows(b)))
            or all(map(operator.eq, _png_plain(_png_rows(a), a.step),
                       _png_plain(_png_rows(b), b.step))))


def is_black(data: bytes, extension: str) -> bool:
    """Tell whether a whole PNG picture is black all over, whatever its alpha; else False.

    Filters work on each colour by itself and leave nothing of zeros, so rows
    need not be unfiltered. A picture that is not black is seen in its first rows.
    """
    if extension != ".png":
        return False
    png = _png_apart(data)
    colors = png.step - (png.info.depth // 8 if png.info.channels in (2, 4) else 0)
    return not any(row[at::png.step].strip(b"\0")
                   for row in _png_rows(png) for at in range(1, 1 + colors))


def animated_png(
    frames: Iterable[bytes], count: int, delay: Fraction, loops: int = 0
) -> Iterator[bytes]:
    """Yield the pieces of an animated PNG of ``count`` PNG pictures.

    Each is shown for ``delay`` seconds; 0 ``loops`` go on for ever. The packed
    pixels are copied, one picture at a time is in memory. Raises ``ImageError``
    with the picture's number, from 1, when it is unlike the first.
    """
    short = delay.limit_denominator(int(65535 / max(1.0, float(delay))))  # two numbers of 16 bits
    sequence = itertools.count()
    number, first, tail = 0, "", b""
    for number, data in enumerate(frames, 1):
        with _told(data, ".png"):
            png = _png_apart(data)
        kind = f"{png.info.height} rows of {png.form}"
        if number == 1:
            first, tail = kind, png.tail
            about = _png_chunk(b"acTL", struct.pack(">II", count, loops))
            yield b"".join([png.head[:33], *about, png.head[33:]])
        _need(kind == first, f"picture {number} does not fit the first: {kind}, not {first}")
        control = struct.pack(">IIIIIHHBB", next(sequence), png.info.width, png.info.height, 0, 0,
                              short.numerator, short.denominator, 0, 0)
        pixels = (_png_chunk(b"IDAT", b"".join(png.packed())) if number == 1 else
                  _png_chunk(b"fdAT", struct.pack(">I", next(sequence)) + b"".join(png.packed())))
        yield b"".join([*_png_chunk(b"fcTL", control), *pixels])
    _need(number == count > 0, f"there are {number} pictures, not {count}")
    yield tail


@contextlib.contextmanager
def _told(data: bytes, extension: str) -> Iterator[None]:
    """Turn what damaged data raises where it is read into one plain line."""
    name = extension[1:].upper()
    if not data:
        raise ImageError(f"the {name} file is empty")
    try:
        yield
    except (IndexError, struct.error):
        raise ImageError(f"the {name} file ends too early, after {len(data)} bytes") from None
    except (zlib.error, ValueError, OverflowError):
        raise ImageError(f"the {name} file is damaged") from None


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise ImageError(problem)


def _need_size(kind: str, found: tuple[int, int], wanted: tuple[int, int] | None) -> None:
    if wanted is not None:
        _need(found == wanted, f"the {kind} picture is {found[0]} x {found[1]} pixels, "
                               f"not {wanted[0]} x {wanted[1]}")


def _need_end(kind: str, end: int, data: bytes) -> None:
    if end > len(data):
        raise ImageError(f"the {kind} file ends too early, after {len(data)} of {end} bytes")
    _need(end == len(data), f"the {kind} file goes on for {len(data) - end} bytes after its end")


class _Picture(NamedTuple):
    """A picture taken apart: its rows from the top, and what two must share to be joined."""

    info: ImageInfo
    form: str
    rows: Iterable[Any]


class _Layout(NamedTuple):
    """How to take a picture apart, and how to make one like ``data`` of other rows.

    ``read`` checks everything, against a size too; without one the picture has
    passed that, and packed pixels need not be unpacked.
    """

    read: Callable[[bytes, tuple[int, int] | None], _Picture]
    build: Callable[[bytes, Sequence[Any]], bytes]


def _read(data: bytes, extension: str) -> _Picture:
    _need(extension in _LAYOUTS, f"the rows of a '{extension}' picture cannot be cut and joined")
    return _LAYOUTS[extension].read(data, None)


def _between(data: bytes, edges: Sequence[int]) -> Iterator[memoryview]:
    """Yield the rows from the places where they begin and the last one ends."""
    view = memoryview(data)
    return (view[start:end] for start, end in zip(edges, edges[1:]))


def _runs_end(kind: str, data: bytes, at: int, width: int, steps: Sequence[tuple[int, int]]) -> int:
    """Step over runs of ``width`` values: by a run's first byte, how many, in how many bytes."""
    done = 0
    while done < width:
        count, size = steps[data[at]]
        done += count
        at += size
    _need(done == width, f"the {kind} file is damaged: its runs do not fit the picture")
    return at


# PNG: https://www.w3.org/TR/png-3/ ; channels and depths that a colour type may have.
_PNG_TYPES = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)),
              4: (2, (8, 16)), 6: (4, (8, 16))}


class _Png(NamedTuple):
    """A PNG picture taken apart: what is before, in and after its IDAT chunks."""

    info: ImageInfo
    head: bytes
    pixels: memoryview
    tail: bytes
    row: int  # bytes of a row with its filter byte
    step: int  # bytes of a pixel, at least 1
    form: str

    def packed(self) -> Iterator[memoryview]:
        """Yield what is in each IDAT chunk: they may be many, so none are kept."""
        at = 0
        while at < len(self.pixels):
            end = at + 12 + struct.unpack_from(">I", self.pixels, at)[0]
            yield self.pixels[at + 8:end - 4]
            at = end


def _read_png(data: bytes, size: tuple[int, int] | None) -> _Picture:
    """A row is its picture, taken apart, and its number there."""
    png = _png_apart(data, size)
    if size is not None:
        left, phase = png.row * png.info.height, 0  # bytes to come, and until the next filter
        for piece in _inflated(png):
            left -= len(piece)
            _need(left >= 0, "the PNG file holds more pixels than its size")
            _need(max(piece[phase::png.row], default=0) <= 4,
                  "the PNG file is damaged: an unknown row filter")
            phase = (phase - len(piece)) % png.row
        _need(left == 0, "the PNG file has too few pixels")
    return _Picture(png.info, png.form, zip(itertools.repeat(png), range(png.info.height)))


def _png_apart(data: bytes, size: tuple[int, int] | None = None) -> _Png:
    """Check everything but the pixels themselves."""
    _need(data[:8] == b"\x89PNG\r\n\x1a\n"[: len(data)], "the file is not a PNG picture")
    chunks = _png_chunks(data)
    _, kind, header = next(chunks)
    _need(kind == b"IHDR", "the PNG file has no header")
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", header)
    _need_size("PNG", (width, height), size)
    channels, depths = _PNG_TYPES.get(color, (0, ()))
    _need(depth in depths and rest == [0, 0, 0], f"the PNG file {_ODD}")
    start, end, gamma = 0, 0, ""
    for at, kind, body in chunks:
        if kind == b"IDAT":
            _need(at == end or not start, "the PNG file's pixels are not in one piece")
            start, end = start or at, at + 12 + len(body)
        elif kind == b"gAMA":
            gamma = body[:4].hex()
    _need(start > 0, "the PNG file has no pixels")
    bits = channels * depth
    return _Png(ImageInfo(width, height, channels, depth), data[:start],
                memoryview(data)[start:end], data[end:], 1 + (width * bits + 7) // 8,
                max(1, bits // 8),
                f"{width} pixels a row, colour type {color}, {depth} bits, gamma {gamma}")


def _png_chunks(data: bytes) -> Iterator[tuple[int, bytes, memoryview]]:
    """Yield where each chunk is, its kind and its contents."""
    view, at = memoryview(data), 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        _need(end <= len(data), f"the PNG file ends too early, after {len(data)} bytes")
        crc = struct.unpack_from(">I", data, end - 4)[0]
        _need(zlib.crc32(view[at + 4:end - 4]) == crc, "the PNG file is damaged, by its checksum")
        yield at, kind, view[at + 8:end - 4]
        if kind == b"IEND":
            _need(length == 0, "the PNG file is damaged: its end has contents")
            return _need_end("PNG", end, data)
        at = end


def _inflated(png: _Png) -> Iterator[bytes]:
    """Yield the filtered rows, a block of bytes at a time."""
    inflate = zlib.decompressobj()
    for body in png.packed():
        for at in range(0, len(body), BUFFER):
            piece = inflate.decompress(body[at:at + BUFFER], _BLOCK)
            yield piece
            while inflate.unconsumed_tail or len(piece) == _BLOCK:
                piece = inflate.decompress(inflate.unconsumed_tail, _BLOCK)
                yield piece
        _need(not inflate.unused_data, "the PNG file goes on after its last pixel")
    _need(inflate.eof, "the PNG file has too few pixels")


# zlib's header and its end for deflate data that stops at a whole byte (a full flush):
# between the two such data can be put together without packing it anew.
_DEFLATE_HEAD, _DEFLATE_END, _FLUSHED = b"\x78\x9c", b"\x03\x00", b"\x00\x00\xff\xff"


def _png_chunk(kind: bytes, body: bytes | memoryview) -> list[bytes | memoryview]:
    check = zlib.crc32(body, zlib.crc32(kind))
    return [struct.pack(">I", len(body)), kind, body, struct.pack(">I", check)]


def _png_rows(png: _Png) -> Iterator[bytes]:
    """Yield the rows as they are in the file: a filter byte, then what that filter left."""
    rest = b""
    for piece in _inflated(png):
        rest += piece
        whole = len(rest) - len(rest) % png.row
        yield from (rest[start:start + png.row] for start in range(0, whole, png.row))
        rest = rest[whole:]


def _png_plain(rows: Iterable[bytes], step: int) -> Iterator[bytes]:
    """Yield rows without their filters (PNG, section 9): slow, each byte is reckoned in Python."""
    above = b""
    for row in rows:
        kind, out = row[0], bytearray(step) + row[1:]
        above = above or bytes(len(out))
        for at in range(step, len(out)):
            a, b, c = out[at - step], above[at], above[at - step]
            if kind == 4:
                p = a + b - c
                guess = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            else:
                guess = (0, a, b, (a + b) // 2)[kind]
            out[at] = (out[at] + guess) & 255
        above = bytes(out)
        yield above[step:]


def _png_packed(png: _Png, top: int, rows: int) -> tuple[bytes | memoryview, int]:
    """Return rows packed so that others can follow, and their Adler-32.

    Those that were packed so before are copied. Of others only the first is
    filtered anew, as nothing is above it now.
    """
    ready = list(itertools.islice(png.packed(), 3))
    if rows == png.info.height and _png_is_loose(ready):
        return ready[0], struct.unpack(">I", ready[1][2:])[0]
    source = _png_rows(png)
    chain: list[bytes] = []  # what the first row's filter may go back to
    for row in itertools.islice(source, top):
        if row[0] <= 1:
            chain = [row]
        elif row[0] != 2 or row.count(0) < png.row - 1:  # else it repeats the row above
            chain.append(row)
    first = next(source, b"")
    if first[0] > 1:
        for plain in _png_plain([*chain, first], png.step):
            first = b"\0" + plain
    # Level 6 and the filtered strategy are what libpng and so POV-Ray itself use.
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 8, zlib.Z_FILTERED)
    packed, check = [_DEFLATE_HEAD], 1
    for row in itertools.chain([first], itertools.islice(source, rows - 1)):
        packed.append(deflate.compress(row))
        check = zlib.adler32(row, check)
    return b"".join([*packed, deflate.flush(zlib.Z_FULL_FLUSH)]), check


def _png_is_loose(packed: Sequence[memoryview]) -> bool:
    """Are these the two pieces that ``_build_png`` makes, and no row above matters?"""
    return (len(packed) == 2 and len(packed[1]) == 6 and packed[1][:2] == _DEFLATE_END
            and packed[0][:2] == _DEFLATE_HEAD and packed[0][-4:] == _FLUSHED
            and zlib.decompressobj().decompress(packed[0], 1) in (b"\0", b"\1"))


def _build_png(data: bytes, rows: Sequence[Any]) -> bytes:
    pieces: list[bytes | memoryview] = []
    low, high = 1, 0
    for _, group in itertools.groupby(rows, lambda row: id(row[0])):
        (png, top), *others = group
        packed, check = _png_packed(png, top, 1 + len(others))
        # Adler-32 of two pieces from that of each, as in zlib's adler32_combine.
        high = (high + (check >> 16) + png.row * (1 + len(others)) * (low - 1)) % 65521
        low = (low + (check & 65535) - 1) % 65521
        pieces += _png_chunk(b"IDAT", packed[2 if pieces else 0:])
    pieces += _png_chunk(b"IDAT", _DEFLATE_END + struct.pack(">HH", high, low))
    first = rows[0][0]
    header = data[16:20] + struct.pack(">I", len(rows)) + data[24:29]
    return b"".join([data[:8], *_png_chunk(b"IHDR", header), first.head[33:], *pieces, first.tail])


_TEXT_HEADERS = {
    "PPM": re.compile(rb"P([56])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(?P<height>\d{1,9})"
                      rb"(?:\s|#[^\n]*\n)+(\d{1,9})\s"),
    "HDR": re.compile(rb"#\?RADIANCE\n(?:[^\n]+\n)*?FORMAT=32-bit_rle_rgbe\n"
                      rb"(?:[^\n]+\n)*\n-Y (?P<height>\d{1,9}) \+X (\d{1,9})\n"),
}


def _header(kind: str, data: bytes) -> re.Match[bytes]:
    header = _TEXT_HEADERS[kind].match(data, 0, _HEAD)
    if header is None:
        raise ImageError(f"the {kind} file's header is not whole")
    return header


def _build_under_text(data: bytes, rows: Sequence[Any]) -> bytes:
    """The header of PPM and HDR is text, with the height in it."""
    header = _header("PPM" if data[:1] == b"P" else "HDR", data)
    start, end = header.span("height")
    return b"".join([data[:start], b"%d" % len(rows), data[end:header.end()], *rows])


def _read_ppm(data: bytes, size: tuple[int, int] | None) -> _Picture:
    _need(data[:2] in (b"P5"[: len(data)], b"P6"[: len(data)]), "the file is not a PPM picture")
    header = _header("PPM", data)
    form, width, height, most = (int(group) for group in header.groups())
    _need_size("PPM", (width, height), size)
    # POV-Ray writes grey values in two bytes, also where its header says 255 (3.7.0.10).
    channels, depth = (1, 16) if form == 5 else (3, 8 if most < 256 else 16)
    row = width * channels * depth // 8
    edges = range(header.end(), header.end() + height * row + 1, row)
    _need_end("PPM", edges[-1], data)
    return _Picture(ImageInfo(width, height, channels, depth),
                    f"{width} pixels a row, P{form}, values to {most}", _between(data, edges))


def _read_tga(data: bytes, size: tuple[int, int] | None) -> _Picture:
    """TGA 2.0: after the pixels come 495 bytes of notes and a signature, as POV-Ray writes them."""
    skip, palette, form, width, height, bits, turned = struct.unpack_from("<BBB9xHHBB", data)
    _need(palette == 0 and form in (2, 3, 10, 11) and bits in (8, 16, 24, 32)
          and turned & 0x30 == 0x20, "the file is not a TGA picture as POV-Ray writes it")
    _need_size("TGA", (width, height), size)
    row, edges = width * bits // 8, [18 + skip]
    if form < 10:
        edges = list(range(edges[0], edges[0] + height * row + 1, row))
    else:  # no run goes on into the next row, nor do POV-Ray's
        counts = [(head & 127) + 1 for head in range(256)]
        steps = [(count, 1 + bits // 8 * (1 if head & 128 else count))
                 for head, count in enumerate(counts)]
        for _ in range(height):
            edges.append(_runs_end("TGA", data, edges[-1], width, steps))
    _need_end("TGA", edges[-1] + 495 + 26, data)
    _need(struct.unpack_from("<H", data, edges[-1])[0] == 495
          and data[-26:] == struct.pack("<II", edges[-1], 0) + b"TRUEVISION-XFILE.\0",
          "the TGA file is damaged at its end")
    return _Picture(ImageInfo(width, height, bits // 8, 8),
                    f"{width} pixels a row, type {form}, {bits} bits", _between(data, edges))


def _build_tga(data: bytes, rows: Sequence[Any]) -> bytes:
    head, end = 18 + data[0], struct.pack("<I", 18 + data[0] + sum(map(len, rows)))
    return b"".join([data[:14], struct.pack("<H", len(rows)), data[16:head], *rows,
                     data[-521:-26], end, data[-22:]])


def _read_bmp(data: bytes, size: tuple[int, int] | None) -> _Picture:
    """The file's rows go from the bottom to the top, each padded to four bytes."""
    _need(data[:2] == b"BM"[: len(data)], "the file is not a BMP picture")
    length, start, head, width, height, planes, bits, packed, pixels = struct.unpack_from(
        "<2xI4xIIiiHHII", data)
    _need_size("BMP", (width, height), size)
    _need((start, head, planes, packed) == (54, 40, 1, 0) and bits in (24, 32),
          f"the BMP file {_ODD}")
    row = (width * bits + 31) // 32 * 4
    _need_end("BMP", start + row * height, data)
    _need(length == len(data) and pixels == length - start,
          "the BMP file is damaged: its header has another length")
    view = memoryview(data)
    return _Picture(ImageInfo(width, height, bits // 8, 8), f"{width} pixels a row, {bits} bits",
                    (view[at:at + row] for at in range(length - row, start - 1, -row)))


def _build_bmp(data: bytes, rows: Sequence[Any]) -> bytes:
    size = sum(map(len, rows))
    return b"".join([b"BM", struct.pack("<I", 54 + size), data[6:22],
                     struct.pack("<i", len(rows)), data[26:34], struct.pack("<I", size),
                     data[38:54], *reversed(rows)])


# After a scan: neither a stuffed zero nor a restart.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)


def _check_jpeg(data: bytes, size: tuple[int, int] | None) -> _Picture:
    _need(data[:2] == b"\xff\xd8"[: len(data)], "the file is not a JPEG picture")
    at, info, scanned = 2, None, False
    while True:
        fill, marker = data[at], data[at + 1]
        _need(fill == 0xFF, "the JPEG file is damaged")
        if marker == 0xD9:
            break
        _need(marker >= 0xC0 and not 0xD0 <= marker <= 0xD8, "the JPEG file is damaged")
        body = at + 4
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
        _need(body <= at <= len(data), f"the JPEG file ends too early, after {len(data)} bytes")
        if marker in (0xC0, 0xC1, 0xC2):
            depth, h, w, channels = struct.unpack_from(">BHHB", data, body)
            _need_size("JPEG", (w, h), size)
            info = ImageInfo(w, h, channels, depth)
        elif marker == 0xDA:
            after = _JPEG_MARKER.search(data, at)
            at, scanned = after.start() if after else len(data), True
    _need_end("JPEG", at + 2, data)
    if info is None or not scanned:
        raise ImageError("the JPEG file holds no picture")
    return _Picture(info, "", ())


# In HDR a byte of 0 would be a run of nothing: it fits no picture.
_HDR_STEPS = [(_BLOCK, 1), *((count, 1 + count) for count in range(1, 129)),
              *((count, 2) for count in range(1, 128))]


def _read_hdr(data: bytes, size: tuple[int, int] | None) -> _Picture:
    """A row is a head, then red, green, blue and exponent in runs (Ward's RGBE)."""
    _need(data[:11] == b"#?RADIANCE\n"[: len(data)], "the file is not an HDR picture")
    header = _header("HDR", data)
    height, width = int(header[1]), int(header[2])
    _need_size("HDR", (width, height), size)
    edges = [header.end()]
    if not 8 <= width < 32768:  # too narrow or too wide for run lengths: plain pixels
        edges = list(range(edges[0], edges[0] + width * height * 4 + 1, width * 4))
    else:
        for _ in range(height):
            _need(struct.unpack_from(">HH", data, edges[-1]) == (0x0202, width),
                  "the HDR file is damaged")
            at = edges[-1] + 4
            for _ in range(4):
                at = _runs_end("HDR", data, at, width, _HDR_STEPS)
            edges.append(at)
    _need_end("HDR", edges[-1], data)
    return _Picture(ImageInfo(width, height, 3, 8), f"{width} pixels a row",
                    _between(data, edges))


def _read_exr(data: bytes, size: tuple[int, int] | None) -> _Picture:
    """One scanline image in blocks of 16 rows, each deflated or stored (OpenEXR file layout).

    A row is its block and its number there.
    """
    _need(data[:8] == b"\x76\x2f\x31\x01\x02\0\0\0"[: len(data)], "the file is not an EXR picture")
    fields, at = _exr_fields(data)
    left, top, right, bottom = struct.unpack("<4i", data[fields[b"dataWindow"]])
    width, height = right - left + 1, bottom - top + 1
    _need_size("EXR", (width, height), size)
    display = data[fields[b"displayWindow"]]
    _need(data[fields[b"compression"]] == b"\x03" and len(display) == 16, f"the EXR file {_ODD}")
    types = _exr_channels(data[fields[b"channels"]])
    row = width * sum(2 if kind == 1 else 4 for kind in types.values())
    offsets = struct.unpack_from(f"<{-(-height // 16)}Q", data, at)
    at += 8 * len(offsets)
    rows: list[tuple[_ExrBlock, int]] = []
    for offset in offsets:
        first, length = struct.unpack_from("<iI", data, at)
        _need(offset == at and first == top + len(rows), "the EXR file is damaged")
        at += 8 + length
        _need(at <= len(data), f"the EXR file ends too early, after {len(data)} bytes")
        block = _ExrBlock(memoryview(data)[at - length:at], min(16, height - len(rows)), row)
        if size is not None:
            block.unpacked()
        rows += [(block, number) for number in range(block.rows)]
    _need_end("EXR", at, data)
    return _Picture(ImageInfo(width, height, len(types), 16 if 1 in types.values() else 32),
                    f"{width} pixels a row, channels {types}", rows)


def _exr_fields(data: bytes) -> tuple[dict[bytes, slice], int]:
    """Return where the header's values are, by name, and where the header ends."""
    names = (b"channels", b"compression", b"dataWindow", b"displayWindow")
    fields = dict.fromkeys(names, slice(0, 0))
    at = 8
    while data[at]:
        name_end = data.index(b"\0", at)
        kind_end = data.index(b"\0", name_end + 1)
        size = struct.unpack_from("<I", data, kind_end + 1)[0]
        if data[at:name_end] in fields:
            fields[data[at:name_end]] = slice(kind_end + 5, kind_end + 5 + size)
        at = kind_end + 5 + size
    return fields, at + 1


def _exr_channels(listed: bytes) -> dict[str, int]:
    """Return each channel's pixel type: 0 and 2 take four bytes, 1 (half) takes two."""
    _need(re.fullmatch(rb"([^\0]+\0.{16}){1,4}\0", listed, re.DOTALL) is not None,
          f"the EXR file {_ODD}")
    return {name.decode("latin-1"): int.from_bytes(kind, "little")
            for name, kind in re.findall(rb"([^\0]+)\0(.{4}).{12}", listed, re.DOTALL)}


class _ExrBlock:
    """Up to 16 rows as they are packed in a file, ``size`` bytes each when unpacked."""

    def __init__(self, packed: memoryview, rows: int, size: int) -> None:
        self.packed, self.rows, self.size = packed, rows, size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ExrBlock) and (
            self.packed == other.packed or self.raw == other.raw)

    __hash__ = None  # type: ignore[assignment]

    def unpacked(self) -> bytes | memoryview:
        """Return the bytes in OpenEXR's order for packing, or as they are where they are stored."""
        wanted = self.rows * self.size
        if len(self.packed) == wanted:
            return self.packed
        inflate = zlib.decompressobj()
        steps = inflate.decompress(self.packed, wanted + 1)
        _need(len(steps) == wanted and inflate.eof and not inflate.unused_data,
              "the EXR file is damaged")
        return steps

    @functools.cached_property
    def raw(self) -> bytes | memoryview:
        """The rows: OpenEXR packs differences, of even bytes first, then of the odd ones."""
        steps = self.unpacked()
        if steps is self.packed:
            return steps
        order = _exr_sums(bytes(steps))
        raw = bytearray(order)
        raw[0::2], raw[1::2] = order[:len(order) // 2], order[len(order) // 2:]
        return bytes(raw)


# Each byte is stored as its difference to the one before, plus 128. All bytes are reckoned
# at once, as the digits of one number: a loop over them would take ten seconds a picture.

def _exr_differences(order: bytes) -> bytes:
    size = len(order)
    number, before = (int.from_bytes(each, "little") for each in (order, b"\0" + order[:-1]))
    high, low = (int.from_bytes(each * size, "little") for each in (b"\x80", b"\x7f"))
    steps = ((number | high) - (before & low)) ^ ((number ^ before) & high) ^ 0x80
    return steps.to_bytes(size, "little")


def _exr_sums(steps: bytes) -> bytes:
    size = len(steps)  # even, as that of every type of channel
    bias = int.from_bytes(b"\0" + b"\x80" * (size - 1), "little")
    number = int.from_bytes(steps, "little") ^ bias
    mask, over = (int.from_bytes(each * (size // 2), "little") for each in (b"\xff\0", b"\0\1"))
    odd = (number >> 8) & mask
    total = ((number & mask) + odd) & mask  # of each pair of bytes, then of 2, 4, 8... pairs
    shift = 16
    while shift < 8 * size:
        total = (total + (total << shift)) & mask
        shift *= 2
    even = ((total | over) - odd) & mask
    return (even | total << 8).to_bytes(size, "little")


def _exr_packed(rows: Sequence[tuple[_ExrBlock, int]]) -> bytes | memoryview:
    """Return a block of these rows; one that was a block before is copied."""
    block = rows[0][0]
    if len(rows) == block.rows and all(row[0] is block for row in rows):
        return block.packed
    raw = b"".join(block.raw[at * block.size:(at + 1) * block.size] for block, at in rows)
    packed = zlib.compress(_exr_differences(raw[0::2] + raw[1::2]), 4)
    return packed if len(packed) < len(raw) else raw


def _build_exr(data: bytes, rows: Sequence[Any]) -> bytes:
    fields, end = _exr_fields(data)
    head = bytearray(data[:end])
    for window in (fields[b"dataWindow"], fields[b"displayWindow"]):
        top = struct.unpack_from("<4xi", head, window.start)[0]
        struct.pack_into("<i", head, window.start + 12, top + len(rows) - 1)
    top = struct.unpack_from("<4xi", head, fields[b"dataWindow"].start)[0]
    blocks, offsets, at = [], [], end + -(-len(rows) // 16) * 8
    for first in range(0, len(rows), 16):
        packed = _exr_packed(rows[first:first + 16])
        blocks += [struct.pack("<iI", top + first, len(packed)), packed]
        offsets.append(at)
        at += 8 + len(packed)
    return b"".join([head, struct.pack(f"<{len(offsets)}Q", *offsets), *blocks])


_LAYOUTS: Mapping[str, _Layout] = {
    ".png": _Layout(_read_png, _build_png), ".ppm": _Layout(_read_ppm, _build_under_text),
    ".tga": _Layout(_read_tga, _build_tga), ".bmp": _Layout(_read_bmp, _build_bmp),
    ".hdr": _Layout(_read_hdr, _build_under_text), ".exr": _Layout(_read_exr, _build_exr),
}
_CHECKS: Mapping[str, Callable[[bytes, tuple[int, int] | None], _Picture]] = {
    **{extension: layout.read for extension, layout in _LAYOUTS.items()}, ".jpg": _check_jpeg,
}
# The types whose rows can be cut and joined: JPEG's cannot without a loss.
STRIP_TYPES = frozenset(_LAYOUTS)


# === 5. PROJECT ==============================================================
# Which files a job needs, where they lie in the tree that a worker gets, and
# projects as zip files. Reads scenes as far as the files go that they name;
# starts nothing, and writes nothing but what a zip file holds.
#
# The tree: its top is the higher of the root (the project's directory) and
# the directory in which POV-Ray would run, when one contains the other, and
# every file keeps its place. Otherwise the root is the top and what is found
# from the current directory lies in _cwd. What is found in a library directory
# (+L) outside lies in _lib1, _lib2 and so on.

MAX_FILES = 100_000  # of a project
MAX_ZIP_SIZE = 4 * 10**9  # bytes, unpacked
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others take memory without a limit
GUARD_FILES = 20_000  # a root with more is taken for no project, unless the user says so
GUARD_SIZE = 2 * 10**9
MAX_WRITTEN, MAX_WRITTEN_SIZE = 1000, 64 << 20  # files that a scene may write, and their bytes

# What POV-Ray 3.7 comes with, for a machine that has no POV-Ray.
_STANDARD_FILES = frozenset([*(f"{name}.inc" for name in """arrays chars colors consts debug finish
    functions glass glass_old golds ior logo makegrass math meshmaker metals rad_def rand screen
    shapes shapes2 shapes3 shapes_old shapesq skies stage1 stars stdcam stdinc stoneold stones
    stones1 stones2 strings sunpos textures transforms woodmaps woods""".split()),
    *(f"{name}.map" for name in """ash benediti bubinga cedar marbteal orngwood pinkmarb rdgranit
    teak whiteash""".split()),
    *"""Mount1.png Mount2.png bumpmap_.png fract003.png mtmand.pot mtmandj.png plasma2.png
    plasma3.png povmap.png spiral.df3 test.png ttffonts.cat""".split()])
_FONTS = frozenset(["crystal.ttf", "cyrvetic.ttf", "povlogo.ttf", "timrom.ttf"])  # built in

# What POV-Ray 3.7.0.10 appends to a name, by the word before it; to others it appends nothing.
_EXTENSIONS_TRIED: Mapping[str, Sequence[str]] = {
    word: [f".{one}" for extension in tried.split() for one in (extension, extension.upper())]
    for word, tried in [
        ("scene", "pov"), ("#include", "inc"), ("sys", ""), ("pot", "gif"), ("jpeg", "jpg jpeg"),
        ("tiff", "tif tiff"),
        *((kind, kind) for kind in "ttf df3 gif tga iff ppm pgm hdr png bmp exr".split())]
}
_READING_WORDS = frozenset(_EXTENSIONS_TRIED) - {"scene"}
_IMAGE_BLOCKS = frozenset(
    ["image_map", "bump_map", "material_map", "image_pattern", "height_field"])
_BLOCK_STARTS = frozenset(["#if", "#ifdef", "#ifndef", "#switch", "#while", "#for", "#macro"])

_JUNK = re.compile(r"\..*|CVS|__pycache__|__MACOSX|Thumbs\.db|desktop\.ini|.*~"
                   r"|.*\.(?:bak|swp|pov-state)")
SAMPLE_FILE, PHOTON_FILE = "povfarm.rca", "povfarm.ph"  # what the slices of a frame share
_EVERY_FRAME, _NO_FRAME = -math.inf, math.inf  # beside N: the frames after N


@dataclass(frozen=True)
class FileEntry:
    """One file of a project.

    ``path`` is its place in the tree with forward slashes, ``size`` in bytes,
    ``mtime`` in seconds since 1970. Only frames after ``after_frame`` need it;
    with None every frame does.
    """

    path: str
    sha256: str
    size: int
    mtime: float
    after_frame: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The files of a project, sorted by path."""

    files: tuple[FileEntry, ...]

    @property
    def key(self) -> str:
        """The name of exactly these contents: a SHA-256 over all but the times."""
        rows = [[file.path, file.sha256, file.size, file.after_frame] for file in self.files]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    @property
    def total_size(self) -> int:
        """The bytes of all files together."""
        return sum(file.size for file in self.files)

    def to_wire(self) -> dict[str, Any]:
        """Return the form that goes through JSON."""
        return {"files": [{**vars(file)} for file in self.files]}

    @classmethod
    def from_wire(cls, wire: Any) -> Manifest:
        """Read what ``to_wire`` made on another machine; ``UserError`` when it is not that."""
        rows = wire.get("files") if isinstance(wire, dict) else None
        if not isinstance(rows, list) or len(rows) > MAX_FILES:
            raise UserError(f"a manifest is a list of at most {MAX_FILES} files")
        files = sorted((_entry(row) for row in rows), key=lambda file: file.path)
        # No name has a zero byte, so in this order what is in a directory comes next to it.
        places = sorted(file.path.replace("/", "\0") for file in files)
        for one, other in zip(places, places[1:]):
            path = one.replace("\0", "/")
            if one == other:
                raise UserError(f"the manifest names '{path}' twice")
            if other.startswith(one + "\0"):
                raise UserError(f"'{path}' is a file and a directory in the manifest")
        return cls(tuple(files))


@dataclass(frozen=True)
class Project:
    """A job's files and how POV-Ray is started over them.

    ``sources`` tells the local file of each path of the manifest. ``run_dir``
    is the place of the current directory in the tree, ``.`` for its top, and
    ``scene`` is relative to it, or to a directory of ``library``. Those are
    places in the tree too, or ``STANDARD``. ``uses`` names what the scene has:
    ``radiosity``, ``photons``, ``own-output`` (it reads what it renders) and
    ``load_file NAME`` (POV-Ray looks for that file in its own directory only).
    """

    manifest: Manifest
    sources: Mapping[str, Path]
    run_dir: str
    scene: str
    library: tuple[str, ...]
    warnings: tuple[str, ...]
    uses: frozenset[str]


HashCache = Dict[Tuple[str, int, int], str]  # (path, size, mtime in ns) -> SHA-256


def collect_project(
    scene: str, library: Sequence[str], cwd: Path, root: Path | None, outputs: Iterable[str],
    frames: Sequence[int], standard_dirs: Sequence[Path], hash_cache: HashCache | None = None,
    ini_dirs: Sequence[Path] = (),
) -> Project:
    """Find the files that a job needs, as POV-Ray 3.7 run in ``cwd`` would find them.

    ``scene`` and ``library`` are as the command line and the INI files have
    them; ``root`` is the scene's directory when None; ``outputs`` are the
    images that the job writes, relative to ``cwd``; ``standard_dirs`` is what
    ``STANDARD`` means here, empty where there is no POV-Ray; ``ini_dirs`` are
    the directories of the INI files, for a better message. The files are those
    below the root, by the rules of ``.bsac`` files where there are any
    (``_Listing``), and those that the scene and its includes name (``_Scan``).
    Raises ``UserError`` for a scene or a file that is missing or outside.
    """
    search = _Search(cwd.resolve(), library, standard_dirs)
    found = search.find("scene", scene) or _no_scene(search, scene, ini_dirs)
    tree = _Tree(search, root.resolve() if root else found.local.parent)
    renders = _Renders([search.cwd / name for name in outputs], frames, found.local)
    listing = _Listing(tree.root, renders, root is None)
    scan = _Scan(tree, renders)
    scan.run(found.local, tree.scene_place(found))
    members = {tree.prefix + path: member for path, member in listing.members.items()}
    for path, (local, certain) in scan.files.items():
        since = members[path][1] if path in members and not certain else _EVERY_FRAME
        members[path] = (local, since)
    for path, member in list(members.items()):
        for charset in ("latin-1", "utf-8"):
            members.setdefault(_as_povray_reads(path, charset), member)
    last = max(frames, default=math.inf)
    members = {path: member for path, member in members.items() if member[1] < last}
    if len(members) > MAX_FILES:
        raise UserError(f"{tree.root} holds more than {MAX_FILES} files: name those that the job "
                        f"needs in {tree.root / '.bsac'}")
    entries, warnings = _entries(members, scan.files, {} if hash_cache is None else hash_cache)
    return Project(
        Manifest(entries), {file.path: members[file.path][0] for file in entries},
        _as_povray_reads(tree.run_dir), _as_povray_reads(tree.scene_name(scene, found)),
        tuple(map(_as_povray_reads, tree.library)),
        (*search.warnings, *listing.warnings, *scan.warnings, *warnings), frozenset(scan.uses),
    )


def read_zip(path: Path, into: Path) -> None:
    """Unpack a project that someone packed into the new directory ``into``.

    Raises ``UserError``, and leaves nothing behind, for a zip file that is
    damaged, encrypted, too large, or holds a file that has no business there:
    one outside, a link or device, a name twice.
    """
    if into.exists():
        raise UserError(f"{into} is there already: {path} is not unpacked over it")
    try:
        with tempfile.TemporaryDirectory(prefix=".unpack", dir=into.parent) as place:
            part = Path(place) / into.name
            part.mkdir()
            with zipfile.ZipFile(path) as archive:
                _unpack(archive, part, path.stat().st_size)
            part.rename(into)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError,
            RuntimeError) as error:
        raise UserError(f"{path} is damaged or no zip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be unpacked: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from None


def find_project(path: Path) -> Path:
    """Return what to render in a directory: its pov.ini, its only INI file, or its only scene.

    A directory that holds nothing but one directory stands for that one.
    Raises ``UserError`` with what there is when the choice is not clear.
    """
    while True:
        inside = sorted(item for item in path.iterdir() if not _JUNK.fullmatch(item.name))
        if len(inside) != 1 or not inside[0].is_dir():
            break
        path = inside[0]
    inis = [item for item in inside if item.suffix.lower() == ".ini" and item.is_file()]
    scenes = [item for item in inside if item.suffix.lower() == ".pov" and item.is_file()]
    best = [item for item in inis if item.name.lower() == "pov.ini"] or inis or scenes
    if len(best) == 1:
        return best[0]
    what = f"it holds {_some(item.name for item in best)}" if best else "it holds neither"
    raise UserError(f"which INI file or scene of {path} shall be rendered? {what}: "
                    "go there and name one, or call one pov.ini")


def zip_stream(entries: Iterable[tuple[str, Path | bytes]],
               timestamp: float = 0) -> Iterator[bytes]:
    """Yield a zip file of ``(name, file)`` pairs piece by piece, stored, not compressed.

    Instead of a file its contents may be given; a name with a slash at its end is a directory.

    Every file has the same time, ``timestamp`` in seconds since 1970 (1980 at
    least), so that the same files are the same bytes.
    """
    date = time.gmtime(max(timestamp, 315532800))[:6]
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, path in entries:
            info = zipfile.ZipInfo(name, date)
            info.create_system, info.external_attr = 3, 0o644 << 16
            if isinstance(path, bytes):
                if info.is_dir():
                    info.external_attr = 0o40755 << 16 | 0x10  # the last for DOS
                archive.writestr(info, path)
                yield sink.take()
                continue
            info.file_size = path.stat().st_size  # a guess that decides about zip64
            with path.open("rb") as source, archive.open(info, "w") as target:
                while block := source.read(BUFFER):
                    target.write(block)
                    yield sink.take()
    yield sink.take()


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Return files by their names as a zip file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return data.getvalue()


def unpack_files(data: bytes, most: int = MAX_WRITTEN_SIZE) -> dict[str, bytes]:
    """Read what ``pack_files`` made of ``most`` bytes; ``UserError`` for what it never makes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            size = sum(info.file_size for info in infos)
            if len(infos) > MAX_WRITTEN or size > most:
                raise UserError("a run left more files, or larger ones, than it may")
            if any(info.compress_type not in _ZIP_METHODS for info in infos):
                raise UserError("what a run left is not packed as it should be")
            files = {}
            for info in infos:
                with archive.open(info) as file:  # without its size a lying one would unpack whole
                    files[info.filename] = file.read(info.file_size)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError,
            RuntimeError) as error:
        raise UserError(f"what a run left is damaged: {error}") from None
    for name in files:
        if not may_be_written(name):
            raise UserError(f"{name!r} is not a name of a file that a run may leave")
    return files


def may_be_written(name: str) -> bool:
    """Tell whether a file that a scene wrote under this name is brought back."""
    return _is_portable(name) and not any(part.startswith(".") for part in name.split("/"))


# --- finding files as POV-Ray does

_ABSOLUTE, _OWN = -1, -2  # places of what was found, when it is in no directory of the search


class _Found(NamedTuple):
    local: Path
    place: int  # which directory of the search, or _ABSOLUTE, or _OWN for POV-Ray's own files


class _Search:
    """POV-Ray's search: the current directory, then the library path, for each name it tries."""

    def __init__(self, cwd: Path, library: Sequence[str], standard: Sequence[Path]) -> None:
        self.cwd = cwd
        self.warnings: list[str] = []
        self.directories: list[Path | None] = [cwd]  # None stands for POV-Ray's own
        self._standard = [Path(directory).resolve() for directory in standard]
        for name in library:
            directory = None if name == STANDARD else (cwd / name).resolve()
            if directory in self._standard:
                directory = None
            if directory is not None and not directory.is_dir():
                self.warnings.append(f"the library path '{name}' is not a directory")
            elif directory not in self.directories:
                self.directories.append(directory)

    def find(self, kind: str, name: str, here_only: bool = False) -> _Found | None:
        """Find a file by the name in a scene; ``kind`` tells the extensions that are tried."""
        if _is_absolute(name):
            local = Path(name)
            return (_Found(local.parent.resolve() / local.name, _ABSOLUTE) if is_file(local)
                    else None)
        for candidate in _candidates(kind, name):
            for place, directory in enumerate(self.directories[:1 if here_only else None]):
                for folder in self._standard if directory is None else [directory]:
                    if is_file(folder / candidate):
                        local = Path(os.path.normpath(folder / candidate))
                        return _Found(local, _OWN if directory is None else place)
                if directory is None and not self._standard and candidate in _STANDARD_FILES:
                    return _Found(Path(candidate), _OWN)
            if kind == "ttf" and candidate in _FONTS:
                return _Found(Path(candidate), _OWN)
        return None

    def places(self) -> str:
        """Say where was searched."""
        libraries = [str(directory) for directory in self.directories[1:] if directory]
        return (f"neither in {self.cwd} nor in a library path"
                + (f" ({_some('+L' + name for name in libraries)})" if libraries else " (+L...)"))

    def hint(self, name: str, beside: Path) -> str:
        """Say what is nearly the file that was not found."""
        if "\\" in name and os.name != "nt":
            return ": write its directories with forward slashes"
        for directory in [*self.directories, *self._standard]:
            other = _other_case(directory, name) if directory else None
            if other:
                return f": there is '{other}', so mind capital and small letters"
        if beside != self.cwd and is_file(beside / name):
            return f", but in {beside}: go there first, or add +L{beside}"
        return ""


def _candidates(kind: str, name: str) -> list[str]:
    """Return the names that POV-Ray tries, in its order (seen with strace, 3.7.0.10)."""
    suffix = PurePosixPath(name).suffix
    if kind == "guess":  # an image without its type: the extension tells, and PNG without one
        kinds = [kind for kind, tried in _EXTENSIONS_TRIED.items() if suffix in tried]
        kind = (kinds or [kind])[-1] if suffix else "png"
    tried = _EXTENSIONS_TRIED.get(kind, ())
    longer = [name + extension for extension in tried]
    return [name, *longer] if suffix in tried else [*longer, name]


def _is_absolute(name: str) -> bool:
    return name.startswith("/") or re.match(r"[A-Za-z]:[\\/]|\\", name) is not None


def _other_case(directory: Path, name: str) -> str | None:
    """Return how ``name`` is spelled on disk when only its letters' case differs."""
    found = directory
    for part in name.split("/"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in it
            alike = [item for item in found.iterdir() if item.name.lower() == part.lower()]
            found = found / part if found / part in alike or not alike else min(alike)
    other = _below(found, directory)
    return other if other != name and other and other.lower() == name.lower() else None


def _no_scene(search: _Search, scene: str, ini_dirs: Sequence[Path]) -> _Found:
    hint = ""
    for directory in ini_dirs:
        if is_file(directory / scene):
            hint = f": it is beside its INI file, so do first: cd {directory}"
    beside = (search.cwd / scene.replace("\0", "")).parent
    here = sorted(path.name for path in beside.glob("*.[pP][oO][vV]"))
    hint = hint or search.hint(scene, search.cwd)
    hint = hint or (here and f": there is {_some(here)}") or ": give the scene's name"
    raise UserError(f"the scene '{scene}' is {search.places()}{hint}")


class _Tree:
    """Where everything lies for a worker: see the head of this section."""

    def __init__(self, search: _Search, root: Path) -> None:
        self.search, self.root = search, root
        self.top = search.cwd if search.cwd in root.parents else root
        self.prefix = "" if root == self.top else f"{_below(root, self.top)}/"
        # For each directory of the search: the directory that moves, and where to.
        self._bases: list[tuple[Path, str]] = []
        places, new = [], 0
        for number, directory in enumerate(search.directories):
            place = STANDARD if directory is None else _below(directory, self.top)
            base = (self.top, "")
            if place is None and directory is not None:
                new += number > 0
                place = f"_lib{new}" if number else "_cwd"
                while (self.top / place).exists():
                    place += "_"
                base = (directory, f"{place}/")
            self._bases.append(base)
            places.append(place or ".")
        self.run_dir, *self.library = places

    def place(self, found: _Found | None) -> str | None:
        """Return where a file lies in the tree; None when it is outside, or was not found."""
        if found is None or found.place < 0:
            return None
        base, prefix = self._bases[found.place]
        path = _below(found.local, base)
        return None if path is None else prefix + path

    def scene_place(self, found: _Found) -> str:
        """Return where the scene lies."""
        path = self.place(found) or _below(found.local, self.top)
        if path is None:
            raise UserError(f"the scene {found.local} is outside of the project {self.top}: "
                            "give a --root that holds it")
        return path

    def scene_name(self, scene: str, found: _Found) -> str:
        """Return the scene's name for POV-Ray: the user's own where it still fits."""
        if self.place(found) is not None:
            return scene.replace("\\", "/") if os.name == "nt" else scene
        return os.path.relpath(self.scene_place(found), self.run_dir).replace(os.sep, "/")


def _below(path: Path, base: Path) -> str | None:
    return path.relative_to(base).as_posix() if path == base or base in path.parents else None


# --- reading scenes

class _Event(NamedTuple):
    """Something in a scene: a file's name by its kind, or ``uses`` of a feature."""

    at: int
    kind: str
    name: str
    certain: bool  # not between #if, #macro and the like and their #end


_TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"|//[^\r\n]*|/\*|#\s*[a-z]+|[A-Za-z_]\w*|[{}(]', re.DOTALL)
_COMMENT_EDGE = re.compile(r"/\*|\*/")


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Yield the words, strings and brackets of a scene with their positions, without comments."""
    at, depth = 0, 0  # depth of /* */ comments, which nest
    while True:
        match = (_COMMENT_EDGE if depth else _TOKEN).search(text, at)
        if match is None:
            return
        at, token = match.end(), match[0]
        if token in ("/*", "*/"):
            depth += 1 if token == "/*" else -1
        elif token[0] == "#":
            yield match.start(), "#" + token[1:].lstrip()
        elif token[:2] != "//":
            yield match.start(), token


def _events(text: str) -> Iterator[_Event]:
    """Yield what a scene says about files and features."""
    before, last, opened = "", "", None
    depth, blocks = 0, []
    for at, token in _tokens(text):
        if token[0] == '"':
            name = token[1:-1].replace('\\"', '"')  # no other escape counts in a file's name
            event = _Event(at, _event_kind(before, last), name, depth == 0)
            if opened is None or last == "(":
                yield event
            opened = None if opened is None or last == "(" else event
        elif token in _BLOCK_STARTS:
            depth += 1
        elif token == "#end":
            depth = max(depth - 1, 0)
        elif token == "#fopen":
            opened = _Event(at, "", "", False)
        elif opened is not None and token in ("read", "write", "append"):
            if opened.name:
                yield opened._replace(kind="read" if token == "read" else "write")
            opened = None
        elif token == "{":
            blocks.append(last)
            if last == "radiosity" or (last == "photons" and "global_settings" in blocks):
                yield _Event(at, "uses", last, depth == 0)
        elif token == "}" and blocks:
            blocks.pop()
        before, last = last, token


def _event_kind(before: str, last: str) -> str:
    """Tell what a string is by the two tokens before it."""
    if last in _READING_WORDS or last == "load_file":
        return last
    if last == "{" and before in _IMAGE_BLOCKS:
        return "guess"
    if last == "(" and before == "concat":
        return "concat"
    return "write" if last == "save_file" else "string"


class _Scan:
    """Follows a scene through its includes and finds the files that they name.

    Only names written out are seen: what ``concat(...)`` or a variable make is
    not known until POV-Ray runs, but any string that is the name of a file
    takes that file along. What stands between ``#if``, ``#macro`` and the like
    and their ``#end`` may never be reached: what is missing there is a warning.
    """

    def __init__(self, tree: _Tree, renders: _Renders) -> None:
        self.files: dict[str, tuple[Path, bool]] = {}  # by place: local file, certainly needed
        self.uses: set[str] = set()
        self.warnings: list[str] = []
        self._tree = tree
        self._search = tree.search
        self._renders = renders
        self._waiting: dict[Path, bool] = {}
        self._strings: dict[str, None] = {}
        self._written: set[str] = set()
        self._lost: dict[str, tuple[str, bool]] = {}  # by name: what to say, certainly needed

    def run(self, scene: Path, place: str) -> None:
        """Scan everything from the scene on; ``UserError`` for a file that is not there."""
        self._take(scene, place, True, True)
        seen: set[Path] = set()
        tried = 0
        while self._waiting:
            # What is certain comes first, so that no file need be read twice.
            path = max(self._waiting, key=self._waiting.__getitem__)
            certain = self._waiting.pop(path)
            if path not in seen:
                seen.add(path)
                self._read(path, certain)
            if not self._waiting:
                for name in list(self._strings)[tried:]:
                    self._try_string(name)
                tried = len(self._strings)
        self._judge()

    def _take(self, local: Path, place: str, certain: bool, follow: bool) -> None:
        certain = certain or self.files.get(place, (local, False))[1]
        self.files[place] = (local, certain)
        if follow:
            self._waiting[local] = certain

    def _read(self, path: Path, certain: bool) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if not any(word in data for word in (b'"', b"radiosity", b"photons")):
            return  # such as a mesh of many megabytes
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        for event in _events(text):
            if event.kind == "uses":
                self.uses.add(event.name)
            elif event.kind == "write":
                self._written.add(os.path.normpath(event.name))
            elif event.kind == "concat":
                if self._renders.counts_from(event.name):
                    self.uses.add("own-output")
            else:
                if self._renders.has(event.name):
                    self.uses.add("own-output")
                if event.kind == "string":
                    self._strings[event.name] = None
                else:
                    line = text.count("\n", 0, event.at) + 1
                    self._refer(event, path, line, certain and event.certain)

    def _refer(self, event: _Event, path: Path, line: int, certain: bool) -> None:
        kind, name = event.kind, event.name
        found = self._search.find(kind, name, here_only=kind == "load_file")
        place = self._tree.place(found)
        if found and place is not None:
            self._take(found.local, place, certain, kind == "#include")
            if kind == "load_file":
                self.uses.add(f"load_file {name}")
        if found and (place is not None or found.place == _OWN):
            return
        shown = _below(path, self._search.cwd) or path
        verb = "includes" if kind == "#include" else "reads"
        problem = f"{shown}:{line} {verb} '{name}', "
        if _is_absolute(name):
            problem += ("which other computers do not have there: copy it into the project, or "
                        "leave its directory out and give that with +L")
        elif found:
            problem += (f"which is outside of the project {self._tree.top}: copy it there, or give "
                        "a --root that holds both, or its directory with +L")
        else:
            problem += f"which is {self._search.places()}{self._search.hint(name, path.parent)}"
        self._lost.setdefault(name, (problem, certain))  # what is certain comes first

    def _try_string(self, name: str) -> None:
        """Take the file along that any string happens to name."""
        suffix = PurePosixPath(name).suffix
        if not suffix or _is_absolute(name) or self._renders.has(name):
            return
        found = self._search.find("string", name)
        place = self._tree.place(found)
        if found and place:
            self._take(found.local, place, False, suffix.lower() in (".inc", ".pov"))

    def _judge(self) -> None:
        wrong = {}
        for name, (problem, certain) in self._lost.items():
            if self._renders.has(name) or os.path.normpath(name) in self._written:
                continue  # the scene makes it, or an earlier frame does
            # A name that is a plain string too may be what a macro is told to write.
            if certain and name not in self._strings:
                wrong[name] = problem
            else:
                self.warnings.append(f"{problem} (it may not be needed)")
        if wrong:
            first, *others = wrong
            more = f"; missing too: {_some(map(repr, others))}" if others else ""
            raise UserError(wrong[first] + more)


def sharable(uses: Collection[str], values: Mapping[str, str]) -> frozenset[str]:
    """Return what the slices of a frame may share: ``radiosity``, ``photons``, both or nothing.

    ``uses`` is what ``Project`` says, ``values`` the command line's. A user who
    saves or loads samples or photons himself is left alone. Whether the scene
    really has any is known only when they were computed and there is a file.
    """
    own = "On" in (values.get("Radiosity_From_File"), values.get("Radiosity_To_File"))
    loads = any(use.startswith("load_file ") for use in uses)
    return frozenset(use for use, alone in (("radiosity", own), ("photons", loads))
                     if use in uses and not alone)


def photon_scene(data: bytes, word: str) -> bytes | None:
    """Return a scene file with ``save_file`` or ``load_file`` in its photons; None without any.

    The word goes into every ``photons`` block of ``global_settings``; of blocks
    between ``#if`` and ``#end`` POV-Ray reads one. A block of its own in a second
    file would not do: it takes the place of the scene's whole block, so that
    nothing is saved, and that what is loaded lacks ``gather`` and ``radius``.
    A file that saves or loads photons itself is left alone.
    """
    text = data.decode("latin-1")  # each byte as it is, whatever the scene's charset
    if any(token in ("load_file", "save_file") for _, token in _tokens(text)):
        return None
    blocks = [event.at + 1 for event in _events(text)
              if event.kind == "uses" and event.name == "photons"]
    for at in reversed(blocks):
        text = f'{text[:at]} {word} "{PHOTON_FILE}" {text[at:]}'
    return text.encode("latin-1") if blocks else None


def sampled_scene(data: bytes) -> bytes:
    """Return a scene that looks for no radiosity samples before it renders, for it gets them.

    POV-Ray's pretrace takes new samples though others were loaded, and each
    slice takes its own: that is what is seen at the seams. The block changes
    nothing else; but where radiosity was off it switches it on, so this is for
    scenes that were seen to save samples. It stands at the end of the file
    because ``#version`` has to stay at the beginning.
    """
    # Editors of DOS times end a file with Ctrl-Z.
    return data.rstrip(b"\x1a") + b"\nglobal_settings{radiosity{pretrace_start 1 pretrace_end 1}}\n"


class _Renders:
    """The images that the job makes, and how older ones of it are called."""

    def __init__(self, outputs: Iterable[Path], frames: Sequence[int], scene: Path) -> None:
        self._paths = {Path(os.path.normpath(path)) for path in outputs}
        self._names = {path.name for path in self._paths}
        self._suffixes = {path.suffix for path in self._paths}
        counted = {scene.with_suffix("")}  # what a number may follow
        stem = _stem_of(sorted(path.stem for path in self._paths), frames)
        for folder in {path.parent for path in self._paths}:
            counted |= {folder / scene.stem, folder / (stem or scene.stem)}
        self._old = re.compile(f"(?:{'|'.join(re.escape(str(path)) for path in counted)})[0-9]+")

    def has(self, name: str) -> bool:
        """Tell whether a name in a scene is, directories apart, one of the images."""
        return PurePosixPath(name).name in self._names

    def counts_from(self, start: str) -> bool:
        """Tell whether an image is called ``start`` and a number."""
        start = PurePosixPath(start).name
        return bool(start) and any(
            name.startswith(start) and PurePosixPath(name).stem[len(start):].isdecimal()
            for name in self._names)

    def is_old(self, path: Path) -> bool:
        """Tell whether a file is one of the images or looks like one with another number."""
        return path in self._paths or (
            path.suffix in self._suffixes
            and self._old.fullmatch(str(path.with_suffix(""))) is not None)


def _stem_of(stems: Sequence[str], frames: Sequence[int]) -> str:
    """Return what the images of an animation are called before the frame's number."""
    for end in range(1, len(stems[0]) if len(frames) > 1 and stems else 0):
        start, number = stems[0][:end], stems[0][end:]
        if number.isdecimal() and int(number) in frames and stems[-1].startswith(start):
            return start
    return ""


# --- listing a directory, .bsac files

class _Rule(NamedTuple):
    """One name in a ``.bsac`` file, for what lies below ``base``."""

    base: str
    pattern: str
    exclude: bool
    since: float

    def matches(self, path: str) -> bool:
        """A pattern with a slash is a path from its ``.bsac`` file, others are names anywhere."""
        names, patterns = path[len(self.base):].split("/"), self.pattern.split("/")
        names = names[-1:] if len(patterns) == 1 else names
        return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


class _Folder(NamedTuple):
    path: Path
    prefix: str  # of the places of what is in it
    rules: tuple[_Rule, ...]
    since: float  # from which frame on it is included as a whole
    real: tuple[Path, ...]  # the directories above it, without links


def _is_farm(path: Path) -> bool:
    """Tell a directory in which povfarm keeps its data, with keys that belong to nobody else."""
    return (path / "farm.key").exists() or (
        (path / "workers").is_dir() and (path / "cache").is_dir())


class _Listing:
    """The files below the root that go along without being named by the scene.

    ``.bsac`` files say which, as in BSAC: lines ``Include`` and ``Exclude``
    begin a section, each other line is a name or wildcard of files or
    directories; what is excluded stays out whatever is included; a ``.bsac``
    file in a subdirectory adds its rules for what is below. ``if %f > N``
    makes the names after it, up to the next ``if``, ``endif`` or section, be
    needed by frames after N only. (Under ``Exclude`` such names stay, because
    the other frames need them.) Where no rule includes anything, everything
    goes but old renders, hidden files and what version control, editors and
    systems leave; an ``Include`` without wildcards takes even those.
    """

    def __init__(self, root: Path, renders: _Renders, guarded: bool) -> None:
        self.members: dict[str, tuple[Path, float]] = {}  # by path below the root
        self.warnings: list[str] = []
        self._root = root.resolve()
        self._renders = renders
        self._links: list[str] = []
        self._odd: list[str] = []
        problem = ""
        guarded = guarded and not is_file(root / ".bsac")
        if guarded and root in (Path.home().resolve(), root.parent):
            problem = "is no project's own directory"
        elif not self._walk(root, guarded):
            problem = f"holds more than {GUARD_FILES} files or {format_size(GUARD_SIZE)}"
        if problem:
            self.members.clear()
            self.warnings.append(
                f"{root} {problem}, so only the files go along that the scene names: say which "
                f"others with --root or in {root / '.bsac'}")
        if self._links:
            self.warnings.append("links that lead outside or in a circle go along only if the "
                                 f"scene names them: {_some(self._links)}")
        if self._odd:
            self.warnings.append("files whose names not every system can take are left out: "
                                 f"{_some(repr(name) for name in self._odd)}")

    def _walk(self, root: Path, guarded: bool) -> bool:
        folders = [_Folder(root, "", (), _NO_FRAME, (self._root,))]
        size = 0
        while folders and len(self.members) <= MAX_FILES:
            folder = folders.pop()
            try:
                inside = sorted(folder.path.iterdir())
            except OSError as error:
                self.warnings.append(f"{folder.path} is left out: {error.strerror}")
                continue
            rules = (*folder.rules, *_read_bsac(folder.path / ".bsac", folder.prefix))
            folder = folder._replace(rules=rules)
            for path in inside:
                with contextlib.suppress(OSError):
                    folders += self._look(path, folder)
                    if folder.prefix + path.name in self.members:
                        size += path.stat().st_size
            if guarded and (len(self.members) > GUARD_FILES or size > GUARD_SIZE):
                return False
        return True

    def _look(self, path: Path, folder: _Folder) -> list[_Folder]:
        """Take a file, or return a directory that is to be walked."""
        place = folder.prefix + path.name
        is_folder = path.is_dir()
        since = self._since(path, place, folder, is_folder)
        if since is None:
            return []
        is_link = path.is_symlink()
        real = path.resolve() if is_link else folder.real[-1] / path.name
        if is_link and (_below(real, self._root) is None or (is_folder and real in folder.real)):
            self._links.append(place)
        elif not _is_portable(path.name):
            self._odd.append(place)
        elif is_folder and not _is_farm(path):
            return [_Folder(path, place + "/", folder.rules, since, (*folder.real, real))]
        elif path.is_file():
            listed = any(not rule.exclude for rule in folder.rules)
            if since < _NO_FRAME or not listed:
                self.members[place] = (path, since if listed else _EVERY_FRAME)
        return []

    def _since(self, path: Path, place: str, folder: _Folder, is_folder: bool) -> float | None:
        """Return from which frame on something is included by name; None to leave it out."""
        hits = [rule for rule in folder.rules if rule.matches(place)]
        if any(rule.exclude and rule.since == _EVERY_FRAME for rule in hits):
            return None
        hits = [rule for rule in hits if not rule.exclude]
        if (_JUNK.fullmatch(path.name) or self._renders.is_old(path)
                or (is_folder and path.name.endswith("-frames"))):
            hits = [rule for rule in hits if not set("*?[") & set(rule.pattern)]
            if not hits:
                return None
        return min([folder.since, *(rule.since for rule in hits)])


_CONDITION = re.compile(r"if\s*%f\s*(.*)", re.IGNORECASE)


def _read_bsac(path: Path, base: str) -> list[_Rule]:
    """Read a ``.bsac`` file; an empty list when there is none."""
    if not is_file(path):
        return []
    try:
        lines = path.read_text("utf-8-sig", "replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    rules: list[_Rule] = []
    exclude, since = None, _EVERY_FRAME
    for number, line in enumerate(lines, 1):
        text = line.strip().replace("\\", "/").rstrip("/")
        word = text.lower()
        condition = _CONDITION.fullmatch(text)
        if word in ("include", "exclude"):
            exclude, since = word == "exclude", _EVERY_FRAME
        elif word == "endif":
            since = _EVERY_FRAME
        elif condition:
            after = re.fullmatch(r">\s*(\d+)", condition[1])
            if after is None:
                raise UserError(f"{path}:{number} cannot be read: a condition is 'if %f > 100'")
            since = int(after[1])
        elif text and exclude is None:
            raise UserError(f"{path}:{number} names '{text}' before any line Include or Exclude")
        elif text:
            rules.append(_Rule(base, text, bool(exclude), since))
    return rules


def _is_portable(path: str) -> bool:
    with contextlib.suppress(UserError, UnicodeEncodeError):
        safe_join(Path(), path, windows=False)
        return bool(path.encode())
    return False


# --- the manifest and zip files

def _entries(
    members: Mapping[str, tuple[Path, float]], needed: Collection[str], cache: HashCache
) -> tuple[tuple[FileEntry, ...], list[str]]:
    """Hash the files; those that cannot be read and were not asked for are a warning."""
    entries, unread = [], []
    for path, (local, since) in sorted(members.items()):
        try:
            about = local.stat()
            known = (str(local), about.st_size, about.st_mtime_ns)
            if known not in cache:
                cache[known] = sha256_file(local)
        except OSError as error:
            if path in needed:
                raise UserError(f"{local} cannot be read: {error.strerror}") from None
            unread.append(path)
            continue
        after = None if since == _EVERY_FRAME else int(since)
        entries.append(_checked(FileEntry(
            path, cache[known], about.st_size, about.st_mtime, after)))
    return tuple(entries), (
        [f"files that cannot be read are left out: {_some(unread)}"] if unread else [])


def _as_povray_reads(name: str, charset: str = "latin-1") -> str:
    """Return a name with the blanks that POV-Ray 3.7 on Unix reads for letters beyond ASCII.

    In a scene each byte of them is one, or each letter where it declares
    ``charset utf8``. An INI file or command line has no way at all to name
    such a file, so each is in the tree also under names that it can be given.
    """
    try:
        return re.sub(r"[^\x00-\x7f]", " ", name.encode().decode(charset))
    except UnicodeEncodeError:
        raise UserError(f"{name!r} is not a name that every system can take: "
                        "give it another") from None


def _entry(row: Any) -> FileEntry:
    try:
        return _checked(FileEntry(**row))
    except TypeError:
        raise UserError("a manifest's row is not the description of a file") from None


def _checked(file: FileEntry) -> FileEntry:
    """Return ``file`` when each of its values is one that a file can have."""
    good = (
        isinstance(file.path, str) and len(file.path) <= 1000 and isinstance(file.sha256, str)
        and re.fullmatch(r"[0-9a-f]{64}", file.sha256) is not None
        and type(file.size) is int and 0 <= file.size < 1 << 63
        and type(file.mtime) in (int, float) and abs(file.mtime) < 1 << 63
        and (file.after_frame is None or type(file.after_frame) is int)
    )
    if not good:
        raise UserError(f"the manifest's values for {file.path!r} are wrong")
    if not _is_portable(file.path):
        raise UserError(f"{file.path!r} is not a name of a file inside a project")
    return file


def _some(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names for a message."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more


def _unpack(archive: zipfile.ZipFile, into: Path, packed_size: int) -> None:
    infos = archive.infolist()
    size = sum(info.file_size for info in infos)
    if len(infos) > MAX_FILES:
        raise UserError(f"it holds more than {MAX_FILES} files")
    if size > MAX_ZIP_SIZE or (size > 10**7 and size > 200 * packed_size):
        raise UserError(f"it would unpack to {format_size(size)}")
    seen: set[str] = set()
    for info in infos:
        name = _zip_name(info)
        path = safe_join(into, name.rstrip("/"))
        kind = stat.S_IFMT(info.external_attr >> 16)
        for wrong, problem in (
            (re.match("[A-Za-z]:", name), f"{name!r} is not a name of a file inside a project"),
            (info.flag_bits & 1, f"'{name}' is encrypted"),
            (info.compress_type not in _ZIP_METHODS,
             f"'{name}' is compressed in a way that not everyone reads: "
             "pack it with a plain zip program"),
            (kind not in (0, stat.S_IFREG, stat.S_IFDIR), f"'{name}' is a link or a device"),
            (name in seen, f"it holds '{name}' twice"),
        ):
            if wrong:
                raise UserError(problem)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        seen.add(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, path.open("xb") as target:
            shutil.copyfileobj(source, target, BUFFER)
        if path.stat().st_size != info.file_size:
            raise UserError(f"'{name}' is damaged")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the name as it was meant: macOS writes UTF-8 without saying so."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


class _Sink(io.RawIOBase):
    """A file that keeps what is written to it until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[bytes] = []

    def write(self, block: Any) -> int:
        """Keep a block."""
        self._blocks.append(bytes(block))
        return len(block)

    def take(self) -> bytes:
        """Return what was written since the last time."""
        data, self._blocks = b"".join(self._blocks), []
        return data


# === 6. MODEL ================================================================
# The records that the coordinator and the worker share, the states and the
# changes between them that are allowed. Pure: no files, no database, no time.


class TaskState(str, enum.Enum):
    """Where a task (a frame, or a slice of one) stands."""

    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobState(str, enum.Enum):
    """Where a job stands; ``WAITING`` is a job whose files have not all come yet."""

    WAITING = "waiting"
    ACTIVE = "active"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkerState(str, enum.Enum):
    """Whether a worker may work here."""

    PENDING = "pending"
    ADMITTED = "admitted"
    REMOVED = "removed"


class AttemptState(str, enum.Enum):
    """How one try of a task on one worker stands or ended."""

    LIVE = "live"
    DONE = "done"
    KEPT = "kept"
    FAILED = "failed"
    EXPIRED = "expired"
    RELEASED = "released"
    LOST = "lost"


# A task may be DONE from any unfinished state, and from FAILED: a good picture
# is never thrown away, however late it comes.
TRANSITIONS: frozenset[tuple[TaskState, TaskState]] = frozenset({
    (TaskState.QUEUED, TaskState.LEASED),
    (TaskState.QUEUED, TaskState.DONE),
    (TaskState.QUEUED, TaskState.CANCELLED),
    (TaskState.LEASED, TaskState.QUEUED),
    (TaskState.LEASED, TaskState.DONE),
    (TaskState.LEASED, TaskState.FAILED),
    (TaskState.LEASED, TaskState.CANCELLED),
    (TaskState.FAILED, TaskState.DONE),
    (TaskState.FAILED, TaskState.QUEUED),
    (TaskState.CANCELLED, TaskState.QUEUED),
})

JOB_TRANSITIONS: frozenset[tuple[JobState, JobState]] = frozenset({
    (JobState.WAITING, JobState.ACTIVE),
    (JobState.WAITING, JobState.PAUSED),
    (JobState.WAITING, JobState.CANCELLED),
    (JobState.ACTIVE, JobState.PAUSED),
    (JobState.ACTIVE, JobState.DONE),
    (JobState.ACTIVE, JobState.FAILED),
    (JobState.ACTIVE, JobState.CANCELLED),
    (JobState.PAUSED, JobState.WAITING),
    (JobState.PAUSED, JobState.ACTIVE),
    (JobState.PAUSED, JobState.DONE),
    (JobState.PAUSED, JobState.FAILED),
    (JobState.PAUSED, JobState.CANCELLED),
    (JobState.FAILED, JobState.ACTIVE),
    (JobState.FAILED, JobState.DONE),
    (JobState.CANCELLED, JobState.ACTIVE),
    (JobState.CANCELLED, JobState.WAITING),
})

PAUSED_BY_HAND = "paused by hand"  # the reason that waits for a person, not for a mended scene
FINISHED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True)
class PovJob:
    """What POV-Ray is told to do: a normalised command line over a project.

    ``run_dir`` is the directory, inside the project's tree, that POV-Ray's
    relative names start from; ``uses`` names what the scan of the scene found
    (see ``Project``).
    """

    values: Mapping[str, str]
    declares: tuple[str, ...]
    library: tuple[str, ...]
    run_dir: str
    uses: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "values": dict(self.values), "declares": list(self.declares),
            "library": list(self.library), "run_dir": self.run_dir, "uses": list(self.uses),
        }

    @classmethod
    def from_wire(cls, wire: Any) -> PovJob:
        """Read the JSON form; ``UserError`` when it has another shape or starts programs."""
        values = want(wire, "values", dict)
        texts = [*values, *values.values()]
        lists = {name: tuple(want(wire, name, list)) for name in ("declares", "library", "uses")}
        texts += [text for items in lists.values() for text in items]
        if not all(isinstance(text, str) for text in texts):
            raise UserError("the job's POV-Ray options are not all texts")
        job = cls(values, lists["declares"], lists["library"], want(wire, "run_dir", str),
                  lists["uses"])
        # File names may have letters that an INI file cannot: workers rename those.
        for name in ("Input_File_Name", "Output_File_Name"):
            if any(ord(c) < 32 for c in values.get(name, "")):
                raise UserError(f"{name} is not a file name")
        checked = {key: value for key, value in values.items()
                   if key not in ("Input_File_Name", "Output_File_Name")}
        check_ini(to_ini(checked, job.declares, ()))
        for path in (job.run_dir, *job.library):
            if path not in (".", STANDARD):
                safe_join(Path(), path)
        return job

    @property
    def options(self) -> PovOptions:
        """The same as the POV section's record, for frames, names and sizes."""
        return PovOptions(self.values, self.declares, self.library, (), ())

    @property
    def thread_safe(self) -> bool:
        """True when the picture does not depend on the number of threads.

        Radiosity samples and photons are gathered in an order that threads
        change (POV-Ray 3.7: two renders of one scene differ).
        """
        return not {"radiosity", "photons"} & set(self.uses)


@functools.lru_cache(maxsize=64)
def pov_of(text: str) -> PovJob:
    """Read the JSON text of a job in the database, which is looked at for every frame."""
    return PovJob.from_wire(json.loads(text))


@dataclass(frozen=True)
class JobOptions:
    """How a job is treated by the farm. ``max_workers`` 0 is no limit.

    ``slices`` is ``auto``, ``off`` or a number, as text: into how many slices
    each frame is cut. ``radiosity`` tells whose samples are shared: those of a
    frame between its slices (``share``), those of the first frame between all
    frames (``animation``), or nobody's (``off``). ``povray`` is the version
    that renders: ``auto`` for that of the first worker, ``any``, or how it begins.
    ``verify`` percent of the frames are rendered by two workers and compared.
    ``frame_timeout`` is in seconds; 0 goes by the frames that are done.
    """

    priority: int = 0
    max_workers: int = 0
    retry_limit: int = 3
    in_order: bool = False
    slices: str = "auto"
    radiosity: str = "share"
    povray: str = "auto"
    verify: int = 0
    frame_timeout: int = 0

    def changed(self, changes: Mapping[str, Any]) -> JobOptions:
        """Return a copy with ``changes``; ``UserError`` for a bad name or value."""
        clean = dict(changes)
        for name, value in changes.items():
            low, high = _OPTION_LIMITS.get(name, (1, 0))
            if name == "in_order":
                good = isinstance(value, bool)
            elif name in _OPTION_TEXTS:
                clean[name] = str(value)
                good = re.fullmatch(_OPTION_TEXTS[name], clean[name]) is not None
            else:
                good = type(value) is int and low <= value <= high
            if not good:
                raise UserError(f"'{name}={value}' cannot be set: there are "
                                f"{', '.join(vars(self))}")
        return replace(self, **clean)


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself when it joins; ``memory`` in bytes."""

    name: str
    cores: int
    memory: int
    system: str
    engines: Mapping[str, str]
    tags: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, wire: Any) -> WorkerInfo:
        """Read the JSON form; ``UserError`` when it has another shape."""
        info = cls(
            want(wire, "name", str)[:100], want(wire, "cores", int), want(wire, "memory", int),
            want(wire, "system", str)[:100], want(wire, "engines", dict),
            tuple(want(wire, "tags", list)),
        )
        texts = [*info.engines, *info.engines.values(), *info.tags]
        if not 1 <= info.cores <= 10_000 or not 0 <= info.memory < 2**60:
            raise UserError("a worker has one core or more, and a memory of some bytes")
        if not all(isinstance(text, str) for text in texts):
            raise UserError("a worker has one core or more, and engines and tags are texts")
        return info


def engine_fits(wanted: str, first: Mapping[str, str], engines: Mapping[str, str]) -> bool:
    """Tell whether a worker's POV-Ray may render frames of a job.

    ``wanted`` is the job's option, ``first`` what the worker that began the
    job has. What a worker does not know of itself fits everything, and so does
    3.7 with 3.7.0.10: POV-Ray for Windows tells no more.
    """
    if wanted == "any":
        return True
    if wanted != "auto":
        first = {"povray": wanted}
    numbers = zip(first.get("povray", "").split("."), engines.get("povray", "").split("."))
    alike = all(mine == theirs or not (mine and theirs) for mine, theirs in numbers)
    includes = {mapping.get("includes", "") for mapping in (first, engines)} - {""}
    return alike and len(includes) < 2


def unverifiable(pov: PovJob, options: JobOptions) -> str:
    """Return why two renders of a frame cannot be compared, or nothing."""
    if not pov.thread_safe:
        return "with radiosity or photons no two renders of a frame are quite the same"
    if options.in_order:
        return "its frames run in order on one worker"
    if options.slices not in ("auto", "off", "1"):
        return "its frames are sliced"
    return "" if options.povray != "any" else "different POV-Rays make different pictures"


def is_chosen(job: int, frame: int, percent: int) -> bool:
    """Tell whether a frame is one of those that are compared; always the same ones."""
    digest = hashlib.sha256(f"{job} {frame}".encode()).digest()
    return int.from_bytes(digest[:4], "big") * 100 < percent << 32


class TaskKind(str, enum.Enum):
    """What a task renders: a frame, rows of one, or what the slices of one share."""

    FRAME = "frame"
    SLICE = "slice"
    PASS = "pass"


@dataclass(frozen=True)
class TaskSpec:
    """One task as a worker gets it, and the file that it makes.

    ``top`` and ``bottom`` are the rows of a slice, counted from 0, the last
    not in it; both are 0 for a whole frame. ``state`` tells that another
    worker has begun, and left a state that this one may go on from.
    """

    id: int
    frame: int
    name: str
    kind: TaskKind = TaskKind.FRAME
    top: int = 0
    bottom: int = 0
    state: bool = False

    @classmethod
    def from_wire(cls, wire: Any) -> TaskSpec:
        """Read the JSON form; ``UserError`` when it has another shape."""
        kinds = {kind.value: kind for kind in TaskKind}
        task = cls(
            want(wire, "id", int), want(wire, "frame", int), want(wire, "name", str),
            kinds.get(want(wire, "kind", str), TaskKind.FRAME), want(wire, "top", int),
            want(wire, "bottom", int), want(wire, "state", bool))
        safe_join(Path(), task.name)
        if (task.kind is not TaskKind.FRAME) != (0 <= task.top < task.bottom):
            raise UserError("the rows of a slice are not a part of the picture")
        return task


@dataclass(frozen=True)
class LeaseSpec:
    """Tasks that one worker holds, and all that it needs to render them.

    The tasks are neighbouring frames for one run of the renderer with
    ``threads`` threads, or one slice, or one pass. In an ``in_order`` job the
    run starts at the job's first frame, whichever tasks are left. ``shares``
    are the passes, by their task, whose results this run reads, ``timeout`` the
    seconds that one task may take, 0 for as long as it likes.
    """

    id: str
    job: int
    job_name: str
    threads: int
    tasks: tuple[TaskSpec, ...]
    manifest: str
    pov: PovJob
    in_order: bool
    shares: tuple[int, ...] = ()
    timeout: int = 0

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "id": self.id, "job": self.job, "job_name": self.job_name, "threads": self.threads,
            "shares": list(self.shares), "timeout": self.timeout,
            "tasks": [vars(task) for task in self.tasks], "manifest": self.manifest,
            "pov": self.pov.to_wire(), "in_order": self.in_order,
        }

    @classmethod
    def from_wire(cls, wire: Any) -> LeaseSpec:
        """Read the JSON form; ``UserError`` when it has another shape."""
        tasks = tuple(TaskSpec.from_wire(task) for task in want(wire, "tasks", list))
        shares = tuple(want(wire, "shares", list))
        if not all(type(share) is int for share in shares):
            raise UserError("the passes of a lease are not tasks")
        return cls(
            want(wire, "id", str), want(wire, "job", int), want(wire, "job_name", str),
            want(wire, "threads", int), tasks, want(wire, "manifest", str),
            PovJob.from_wire(want(wire, "pov", dict)), want(wire, "in_order", bool), shares,
            want(wire, "timeout", int),
        )


@dataclass(frozen=True)
class Cost:
    """What a task cost: processor and wall seconds, and the peak memory in bytes.

    ``parse`` is the part of the wall time before the first pixel: what every
    slice of a frame pays again.
    """

    cpu: float = 0.0
    wall: float = 0.0
    memory: int = 0
    parse: float = 0.0


def want(wire: Any, key: str, kind: type) -> Any:
    """Return ``wire[key]`` when it is there and of that kind, else raise ``UserError``."""
    value = wire.get(key) if isinstance(wire, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"'{key}' is missing or not a {kind.__name__}")
    return value


def pause_reason(done: int, failed: int) -> str:
    """Return why a job that only fails should pause, or nothing when it need not.

    BSAC stops after one: "it can take mere seconds to get 3000 error frames".
    """
    if done == 0 and failed >= 3:
        return "the first frames all failed: see the log of one, mend the scene, then retry"
    return ""


def lease_size(queued: int, slots: int, cost: Cost | None, runs: int = 0) -> int:
    """Return how many neighbouring frames one run of the renderer should get.

    ``queued`` frames are left for ``slots`` runs at a time; ``cost`` is the
    mean of the frames measured so far. Half of the fair share leaves something
    to even out with at the end, down to single frames. But the start of a
    process costs some 0.04 s of CPU: cheap frames come several to a run, up to
    all of the share, for they are soon done. No run should be longer than about
    10 s. While nothing is measured, the first ``runs`` of many
    frames get one, two and three in turn: what begins together should not end
    together, or all that follows sleeps at the same time, too.
    """
    if cost is None:
        return 1 + runs % 3 if queued > 3 * slots else 1
    share = math.ceil(queued / max(slots, 1))
    cheap = min(math.ceil(0.6 / max(cost.cpu, 0.001)), share)
    long = max(int(10 / (cost.cpu + 0.25)), 1)  # POV-Ray sleeps so long between two frames
    return max(1, min(max(math.ceil(share / 2), cheap), long, queued))


START = 0.65  # seconds that a run of POV-Ray 3.7 costs before and after its work
GRAIN = 8  # rows, the least that a slice has which the farm cuts by itself


class SliceCost(NamedTuple):
    """What is known of a job's slices: seconds that a row takes, and those before the first."""

    row: float
    parse: float


def unsliceable(pov: PovJob, in_order: bool) -> str:
    """Return why the frames of a job cannot be put together from slices, or nothing."""
    if in_order:
        return "its frames run in order"
    if pov.options.extension not in STRIP_TYPES:
        return "JPEG pictures cannot be put together from slices: choose +FN for PNG"
    region = region_of(pov.options)
    if region.bottom - region.top <= region.block:
        return "the picture is no higher than one block of the renderer"
    return ""


def next_cut(top: int, height: int, region: Region, slices: str, share: float,
             cost: SliceCost | None) -> int:
    """Return the row before which the slice that begins at ``top`` ends.

    A slice begins where a block of the whole frame begins, so that the pixels
    are the same; the first and the last slice take along what lies outside the
    user's region. A number of ``slices`` makes them alike in blocks. ``auto``
    gives a worker a quarter of its ``share`` (0 to 1) of what is left, so that
    slices shrink and unequal workers finish together, but no slice whose parsing
    and start would weigh as much as a sixth of its pixels.
    """
    if slices == "off":  # since the frame was begun: then one slice has the rest
        return height
    block = region.block if slices != "auto" else _grain(region)
    blocks = -(-(region.bottom - region.top) // block)
    begun = max(-(-(top - region.top) // block), 0)
    if slices != "auto":
        many = min(int(slices), blocks)
        ends = (number * blocks // many for number in range(1, many + 1))
        size = next(end for end in ends if end > begun) - begun
    else:
        size = math.ceil((blocks - begun) * share / 4)
        if cost is not None and cost.row > 0:
            least = math.ceil(6 * (cost.parse + START) / (cost.row * block))
            # At the end no more than a fair share, so that all have something to do.
            fair = math.ceil((blocks - begun) * share)
            size = max(size, min(least, fair), math.ceil(least / 3))
            if blocks - begun - size < least / 3:
                size = blocks
    end = region.top + (begun + max(size, 1)) * block
    return height if end >= region.bottom else end


def _grain(region: Region) -> int:
    return region.block * -(-GRAIN // region.block)


def split_row(top: int, bottom: int, region: Region, size: int, progress: float,
              share: float) -> int | None:
    """Return the row before which a slice may end when others take the rest.

    It keeps a ``share`` (0 to 1) of what is unrendered, in whole blocks of
    ``size`` rows, for those it has begun it cannot hand on. None when that is too little.
    """
    first, last = max(top, region.top), min(bottom, region.bottom)
    blocks = (last - first) / size
    done = max(math.ceil(progress * blocks), 1)
    middle = first + round(done + (blocks - done) * share) * size
    return middle if done < blocks and middle < last else None


def pass_rows(region: Region, shared: Collection[str], workers: int) -> list[tuple[int, int]]:
    """Return the rows of each pass that renders what the slices of a frame will share.

    Radiosity samples are gathered where the picture needs them: by as many
    passes as there are workers. All photons are shot whatever the rows are.
    """
    if "radiosity" not in shared:
        return [(region.top, min(region.top + region.block, region.bottom))] if shared else []
    blocks = -(-(region.bottom - region.top) // region.block)
    many = min(workers, blocks)
    ends = [region.top + number * blocks // many * region.block for number in range(many + 1)]
    return [(top, min(bottom, region.bottom)) for top, bottom in zip(ends, ends[1:])]


def frame_state(slices: Collection[TaskState], state: TaskState) -> TaskState:
    """Return the state of a frame in ``state`` that the states of its slices put it into."""
    for bad in (TaskState.FAILED, TaskState.CANCELLED):
        if state is bad or bad in slices:
            return bad
    begun = {TaskState.LEASED, TaskState.DONE} & set(slices)
    return TaskState.LEASED if begun else TaskState.QUEUED


def frame_timeout(walls: Sequence[float]) -> int:
    """Return the seconds that one frame may take where others took ``walls``; 0 without limit.

    A frame may well be much heavier than the others, and its worker slower.
    """
    return max(math.ceil(20 * statistics.median(walls)), 600) if walls else 0


def job_state(state: JobState, counts: Mapping[TaskState, int]) -> JobState:
    """Return the state that a job's tasks put it into (``state`` when none)."""
    if counts[TaskState.QUEUED] or counts[TaskState.LEASED]:
        return JobState.ACTIVE if state in (JobState.DONE, JobState.FAILED) else state
    if state is JobState.CANCELLED or counts[TaskState.CANCELLED]:
        return JobState.CANCELLED
    return JobState.FAILED if counts[TaskState.FAILED] else JobState.DONE


_OPTION_LIMITS: Mapping[str, tuple[int, int]] = {
    "priority": (-1000, 1000), "max_workers": (0, 10_000), "retry_limit": (1, 100),
    "verify": (0, 100), "frame_timeout": (0, 10**7),
}
_OPTION_TEXTS: Mapping[str, str] = {
    "slices": "auto|off|[1-9][0-9]{0,3}", "radiosity": "share|animation|off",
    "povray": POVRAY_CHOICE,
}


# === 7. DISCOVERY ============================================================
# How workers find coordinators on a LAN: a probe is broadcast by UDP, each
# coordinator answers it. Knows names, ports and the farm key, nothing of HTTP.
#
# What the MAC is worth: an answer names the prober's nonce, so an old one is no
# use; it names the address that it is sent from, so a machine without the key
# cannot pass on a true coordinator's answer as its own and have workers come to
# it. Who can take over an address itself (ARP spoofing) is stopped only by TLS.

DISCOVERY_PORT = 2269  # the port of BSAC's meta server; hints go to the next one
_PACKET_LIMIT = 2048
_ANSWERS_A_SECOND = 50  # at most half of them to one address
_FARMS_LIMIT = 100
_PROBE_TIMES = (0.0, 0.2, 0.6)  # seconds: a lost packet should not cost a round
_STOP_STEP = 0.2  # seconds after which a wait looks whether it should stop
_LOOPBACK = ("127.0.0.1", "127.255.255.255")
# What asks for the broadcast address of an interface.
_SIOCGIFBRDADDR = {"linux": 0x8919, "darwin": 0xC0206923}


@dataclass(frozen=True)
class Found:
    """A coordinator that answered; ``verified`` means that it holds our farm key.

    ``pin`` is the SHA-256 of the certificate that it shows, empty without TLS.
    """

    name: str
    farm_id: str
    url: str
    verified: bool
    address: str
    pin: str = ""


class Beacon:
    """Answers probes for one coordinator, in a thread, and announces its start.

    Several beacons of one machine share the port. A port that cannot be had is
    only warned about: workers can still be told the URL.
    """

    def __init__(self, name: str, farm_id: str, url_port: int, farm_key: bytes, *,
                 pin: str = "", port: int = DISCOVERY_PORT, clock: Clock | None = None) -> None:
        self.port = port  # 0 becomes a free one when started
        self._name = name
        self._fields = {"name": name, "id": farm_id, "port": url_port, "pin": pin,
                        "scheme": "https" if pin else "http"}
        self._key = farm_key
        self._clock = clock or Clock()
        self._stopping = threading.Event()
        self._second = 0
        self._answers: collections.Counter[str] = collections.Counter()  # given in this second

    def start(self) -> None:
        """Listen, and wake the workers that wait for a coordinator."""
        sock = _udp_socket()
        try:
            _share_port(sock, self.port)
        except OSError as error:
            sock.close()
            log.warning("UDP port %d cannot be used (%s): workers will not find this coordinator "
                        "by themselves, start them with --server", self.port, error.strerror)
            return
        self.port = sock.getsockname()[1]
        threading.Thread(target=self._serve, args=(sock,), name="beacon", daemon=True).start()
        # Not signed: all that it does is make workers probe a little sooner.
        _send_to(sock, _packet("hint"), self.port + 1, _broadcast_addresses())

    def stop(self) -> None:
        """Answer no more."""
        self._stopping.set()
        with _udp_socket() as sock:
            _send_to(sock, b"", self.port, _LOOPBACK)  # wakes the thread

    def answer(self, packet: bytes, sender: str) -> bytes | None:
        """Return the answer to a probe from the address ``sender``; None to keep silent."""
        probe = _parse_packet(packet, "probe")
        if probe is None or not _is_nonce(probe.get("nonce")):
            return None
        wanted = probe.get("name")
        if isinstance(wanted, str) and wanted.casefold() != self._name.casefold():
            return None
        second = int(self._clock.monotonic())
        if second != self._second:
            self._answers.clear()
        self._second = second
        if (sum(self._answers.values()) >= _ANSWERS_A_SECOND
                or self._answers[sender] >= _ANSWERS_A_SECOND // 2):
            return None
        self._answers[sender] += 1
        answer = {
            "povfarm": "answer", "version": 1, "nonce": probe["nonce"],
            "address": _address_towards(sender), **self._fields,
        }
        return json.dumps({**answer, "mac": _mac(self._key, answer)}).encode()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            while not self._stopping.is_set():
                try:
                    packet, sender = sock.recvfrom(_PACKET_LIMIT + 1)
                    answer = self.answer(packet, sender[0])
                    if answer is not None and not self._stopping.is_set():
                        sock.sendto(answer, sender)
                except OSError as error:
                    # Windows says here that an earlier answer found nobody.
                    log.debug("discovery: %s", error)
                    self._stopping.wait(0.05)


def discover(timeout: float, key: bytes | None, port: int = DISCOVERY_PORT,
             name: str | None = None, stop: threading.Event | None = None) -> list[Found]:
    """Return the coordinators that answer within ``timeout`` seconds, by name.

    With a ``key``, only those that hold it. With a ``name``, only that one, as
    soon as it answers. A coordinator that is reached by several ways is listed
    once, with its loopback address where it has one.
    """
    nonce = secrets.token_hex(16)
    wanted = {} if name is None else {"name": name}
    probe = _packet("probe", nonce=nonce, **wanted)
    farms: dict[str, Found] = {}
    times = [*_PROBE_TIMES, math.inf]
    start = time.monotonic()
    with _udp_socket() as sock:
        while not (stop and stop.is_set()):
            elapsed = time.monotonic() - start
            if elapsed >= timeout:
                break
            if elapsed >= times[0]:
                del times[0]
                _send_to(sock, probe, port, _broadcast_addresses())
            found = _receive_answer(sock, min(times[0], timeout) - elapsed, nonce, key)
            if found is None or (name is not None and found.name.casefold() != name.casefold()):
                continue
            if found.farm_id in farms or len(farms) < _FARMS_LIMIT:
                farms[found.farm_id] = min(farms.get(found.farm_id, found), found, key=_distance)
            if name is not None:
                break
    return sorted(farms.values(), key=operator.attrgetter("name", "farm_id"))


def wait_for_coordinator(key: bytes | None, stop: threading.Event, port: int = DISCOVERY_PORT,
                         name: str | None = None, pause: float = 5.0) -> list[Found]:
    """Return the coordinators on this LAN as soon as there is one; none when stopped.

    Probes every ``pause`` seconds, and at once when a coordinator announces itself.
    """
    with _hint_socket(port) as hints:
        while not stop.is_set():
            found = discover(_PROBE_TIMES[-1] + 0.2, key, port, name, stop)
            if found:
                return found
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not stop.is_set():
                if _hear_hint(hints, _STOP_STEP):
                    break
    return []


def listen_for_hints(heard: Callable[[], None], port: int = DISCOVERY_PORT) -> None:
    """Call ``heard`` whenever a coordinator announces itself on this LAN; for a thread."""
    with _hint_socket(port) as hints:
        while True:
            if _hear_hint(hints, None):
                heard()


def _hint_socket(port: int) -> socket.socket:
    """Return a socket for what coordinators announce, a silent one where that cannot be had."""
    hints = _udp_socket()
    try:
        _share_port(hints, port + 1)
    except OSError as error:
        log.debug("no hints from coordinators: %s", error)
        hints.bind(("", 0))
    return hints


def _hear_hint(hints: socket.socket, seconds: float | None) -> bool:
    """Wait for a packet, without end for None; True when a coordinator announces itself."""
    hints.settimeout(seconds)
    try:
        return _parse_packet(hints.recv(_PACKET_LIMIT + 1), "hint") is not None
    except socket.timeout:
        return False
    except OSError as error:
        log.debug("discovery: %s", error)
        time.sleep(_STOP_STEP)
        return False


def _receive_answer(sock: socket.socket, seconds: float, nonce: str,
                    key: bytes | None) -> Found | None:
    """Return the next answer worth believing, None when this was not one."""
    sock.settimeout(max(min(seconds, _STOP_STEP), 0.001))
    try:
        packet, (address, _) = sock.recvfrom(_PACKET_LIMIT + 1)
    except OSError:  # nothing came, or Windows says that a probe found nobody
        return None
    return _read_answer(packet, address, nonce, key)


def _read_answer(packet: bytes, address: str, nonce: str, key: bytes | None) -> Found | None:
    message = _parse_packet(packet, "answer")
    if message is None or message.get("nonce") != nonce:
        return None
    mac = str(message.pop("mac", "")).encode(errors="replace")
    name, farm_id, port, pin = (message.get(field) for field in ("name", "id", "port", "pin"))
    scheme = "https" if pin else "http"
    if not (_is_label(name) and _is_label(farm_id) and type(port) is int and 0 < port < 65536
            and isinstance(pin, str) and re.fullmatch("([0-9a-f]{64})?", pin)
            and message.get("scheme") == scheme):
        return None
    if key is not None and not (hmac.compare_digest(mac, _mac(key, message).encode())
                                and message.get("address") == address):
        log.debug("discovery: %s says that it is %s, without our key", address, name)
        return None
    return Found(str(name), str(farm_id), f"{scheme}://{address}:{port}", key is not None,
                 address, pin)


def _mac(key: bytes, message: Mapping[str, Any]) -> str:
    """Return the HMAC-SHA256 of a message, as hexadecimal digits."""
    text = json.dumps(message, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def _packet(kind: str, **fields: str) -> bytes:
    return json.dumps({"povfarm": kind, "version": 1, **fields}).encode()


def _parse_packet(packet: bytes, kind: str) -> dict[str, Any] | None:
    if len(packet) > _PACKET_LIMIT:
        return None
    try:
        message = json.loads(packet)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or message.get("povfarm") != kind:
        return None
    return message if message.get("version") == 1 else None


def _is_nonce(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32,128}", value) is not None


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _distance(found: Found) -> bool:
    return not found.address.startswith("127.")


def _udp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    return sock


def _share_port(sock: socket.socket, port: int) -> None:
    """Bind to a port that others may bind too: each of them gets every broadcast.

    A packet to 127.0.0.1 reaches only one of them, so probes go to
    127.255.255.255 as well.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("", port))


def _send_to(sock: socket.socket, packet: bytes, port: int, addresses: Sequence[str]) -> None:
    for address in addresses:
        # A host without a default route has "Network is unreachable" for 255.255.255.255.
        with contextlib.suppress(OSError):
            sock.sendto(packet, (address, port))


def _broadcast_addresses() -> list[str]:
    """Return the addresses that together reach this machine and every LAN it is on."""
    addresses = [*_LOOPBACK, "255.255.255.255"]
    code = _SIOCGIFBRDADDR.get(sys.platform)
    if code is not None:
        with _udp_socket() as sock:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # an interface without an IPv4 address
                    reply = fcntl.ioctl(sock.fileno(), code, request)
                    addresses.append(socket.inet_ntoa(reply[20:24]))
    return [address for address in dict.fromkeys(addresses) if address != "0.0.0.0"]


def _address_towards(address: str) -> str:
    """Return our own address on the way to another: what an answer to it comes from."""
    with _udp_socket() as sock:
        sock.connect((address, 9))
        return str(sock.getsockname()[0])


# === 8. HTTP =================================================================
# Requests, responses, routes and roles, and the one adaptor between them and
# sockets. Router.handle is the only place that turns anything, errors too, into
# a response. Knows nothing of jobs, workers or keys: who somebody is, is decided
# by the function that Router is given. Deadlines here are the real time's, not a
# Clock's: they bound what a socket may cost.

ROLES = ("anyone", "reader", "user", "pending", "worker", "guest", "admin")
BODY_LIMIT = 1 << 20  # bytes that a request's body may have where its route says nothing
_SOON = 0.02  # seconds that a thread stays with a connection for its next request
_DRAIN_LIMIT = 1 << 16  # an unread body up to this size is read away to keep the connection


@dataclass(frozen=True)
class Identity:
    """Who sends a request: the roles held, a worker's number or 0, a name for people.

    Roles imply nothing: an admin who may read holds ``reader`` as well. An
    empty ``name`` is a stranger, who is told 401 instead of 403.
    """

    roles: frozenset[str] = frozenset()
    worker: int = 0
    name: str = ""

    @property
    def trusted(self) -> bool:
        """Whether somebody has let this one in: it may do more than look or ask to join."""
        return bool(self.roles - {"reader", "pending"})


@dataclass(frozen=True)
class Limits:
    """What one connection, or all of them, may cost; bytes and seconds.

    Requests of strangers, as many as there may be, leave threads for those who
    were let in.
    """

    connections: int = 12_000
    threads: int = 1000  # requests under way,
    strangers: int = 128  # those of strangers,
    strangers_each: int = 32  # and of strangers from one address
    head_bytes: int = 16384
    head_fields: int = 100
    head_seconds: float = 20.0
    body_seconds: float = 30.0  # a body may take this long, and
    body_rate: float = 2000.0  # a second more for each so many bytes that came
    idle_seconds: float = 75.0
    send_seconds: float = 60.0  # in which the client takes nothing of an answer
    linger_seconds: float = 2.0  # reading on after a refusal, so that the client gets to see it
    stop_seconds: float = 2.0


class BodyReader:
    """The body of a request, read once, from front to end.

    ``length`` is the declared size, None when it comes in chunks. ``source``
    gives the blocks, and ``b""`` where the body ends. Reading past ``limit``,
    which the route sets, is a ``ProtocolError`` 413; a body that breaks off is
    a 400, one that comes too slowly a 408.
    """

    def __init__(self, source: Iterator[bytes], length: int | None) -> None:
        self.length = length
        self.limit = BODY_LIMIT
        self.received = 0
        self.finished = length == 0
        self._source = source

    @classmethod
    def of(cls, data: bytes) -> BodyReader:
        """Return a body that is already here."""
        return cls(iter([data, b""]), len(data))

    def read(self) -> bytes:
        """Return all of it, or what is left."""
        return b"".join(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """Yield the body as it comes."""
        if self.length is not None and self.length > self.limit:
            raise self._too_large()
        for block in self._source:  # one that has broken off gives no more, and never ends
            self.received += len(block)
            if self.received > self.limit:
                raise self._too_large()
            self.finished = not block or self.received == self.length
            yield block

    def _too_large(self) -> ProtocolError:
        return ProtocolError(413, f"the body is larger than {format_size(self.limit)}")


@dataclass
class Request:
    """One request. ``path`` is decoded; ``headers`` has lower-case names.

    ``params`` holds what the route's wildcards matched; ``secure`` says that it
    came over TLS. ``alive()`` is False once the client has gone or the server is
    stopping: a handler that waits looks at it now and then. ``enter`` is told who
    it is from, and refuses it when there are too many.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: BodyReader = field(default_factory=lambda: BodyReader.of(b""))
    remote: str = "127.0.0.1"
    identity: Identity = field(default_factory=Identity)
    params: Mapping[str, Any] = field(default_factory=dict)
    secure: bool = False
    alive: Callable[[], bool] = lambda: True
    enter: Callable[[Identity], None] = lambda identity: None

    def json(self) -> Any:
        """Return the JSON body; ``ProtocolError`` 415, 413 or 400 when it is none."""
        text = self._text("application/json")
        try:
            value = json.loads(text)
            # What is no number, and half a surrogate, could not be stored or told again.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            return value
        except (ValueError, RecursionError) as error:
            raise ProtocolError(400, "the body is not JSON", str(error)) from error

    def form(self) -> dict[str, str]:
        """Return the fields of an HTML form; of a field given twice the last."""
        return _fields(self._text("application/x-www-form-urlencoded"))

    def _text(self, wanted: str) -> str:
        given = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != wanted:
            raise ProtocolError(415, f"the body must be {wanted}")
        try:
            return self.body.read().decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(400, "the body is not UTF-8 text") from error


@dataclass(frozen=True)
class FileSlice:
    """A body that is ``length`` bytes of an open file, from ``start``."""

    file: BinaryIO
    start: int
    length: int

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Stream:
    """A body that is made while it is sent.

    The first block is made at once: what fails before it is still an error
    response, not a 200 that breaks off. An iterator that has nothing to say
    for long yields ``b""`` now and then, so that it ends when nobody listens.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._first = next(chunks, b"")

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks as they are made; ``OSError`` when one cannot be made."""
        yield self._first
        try:
            yield from self._chunks
        except Exception as error:
            log.exception("a response broke off while it was made")
            raise OSError("the response broke off") from error

    def close(self) -> None:
        """End the iterator where it waits, if it is a generator."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()


@dataclass
class Response:
    """What is answered: a status, headers, and bytes, part of a file or a stream."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | FileSlice | Stream = b""

    def close(self) -> None:
        """Let go of what the body holds."""
        if not isinstance(self.body, bytes):
            self.body.close()


def json_response(value: Any, status: int = 200) -> Response:
    """Return ``value`` as JSON."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(status, {"Content-Type": "application/json"}, text.encode())


def text_response(text: str, status: int = 200, mime: str = "text/plain") -> Response:
    """Return UTF-8 text of the type ``mime``."""
    return Response(status, {"Content-Type": f"{mime}; charset=utf-8"}, text.encode())


def html_response(text: str, status: int = 200) -> Response:
    """Return an HTML page."""
    return text_response(text, status, "text/html")


def empty_response() -> Response:
    """Return that it is done, and nothing else."""
    return Response(204)


def redirect(location: str) -> Response:
    """Send the browser to ``location``, with a GET."""
    return Response(303, {"Location": location})


def stream_response(chunks: Iterator[bytes], mime: str) -> Response:
    """Return a body of unknown length that is made while it is sent: see ``Stream``."""
    return Response(200, {"Content-Type": mime}, Stream(chunks))


def file_response(path: Path, mime: str, request: Request, etag: str = "") -> Response:
    """Return a file, or the one range of it that was asked for, or 304 or 416.

    ``etag`` names the contents, best by their hash; without it size and time
    do. No such file is a ``ProtocolError`` 404.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ProtocolError(404, f"{path.name} is not here") from error
    status = os.fstat(file.fileno())
    size = status.st_size
    quoted = f'"{etag or f"{status.st_mtime_ns:x}-{size:x}"}"'
    known = re.split(" *, *", request.headers.get("if-none-match", "").strip())
    if {"*", quoted, f"W/{quoted}"}.intersection(known):
        file.close()
        return Response(304, {"ETag": quoted})
    part = _byte_range(request.headers, quoted, size)
    start, end = part or (0, size)
    if part and start == end:
        file.close()
        raise ProtocolError(416, f"the file has {size} bytes", Content_Range=f"bytes */{size}")
    response = Response(206 if part else 200, {
        "Content-Type": mime, "ETag": quoted, "Accept-Ranges": "bytes",
        **({"Content-Range": f"bytes {start}-{end - 1}/{size}"} if part else {}),
    }, FileSlice(file, start, end - start))
    if end - start <= BUFFER:  # little enough to travel with the head
        with file:
            file.seek(start)
            response.body = file.read(end - start)
    return response


Handler = Callable[..., Response]


@dataclass(frozen=True)
class route:  # noqa: N801 - it is used as a decorator
    """Tags a method as the handler of a path; ``Router`` collects the tags.

    In ``pattern``, ``<name>`` matches anything but a slash, ``<n:int>`` a
    number, and ``<rest:path>`` slashes too. ``role`` is who may come in, one
    of ``ROLES``; it has no default so that nothing is open by forgetfulness.
    """

    method: str
    pattern: str
    role: str
    max_body: int = BODY_LIMIT
    summary: str = ""

    def __call__(self, function: Handler) -> Handler:
        """Tag ``function``, and return it as it was."""
        if self.role not in ROLES:
            raise ValueError(f"{self.pattern}: there is no role {self.role!r}")
        vars(function).setdefault("routes", []).append(self)
        return function


@dataclass(frozen=True)
class BoundRoute:
    """A route and the bound method that handles it."""

    route: route
    handler: Handler
    regex: re.Pattern[str]

    @property
    def doc(self) -> str:
        """The handler's docstring."""
        return self.handler.__doc__ or ""


class Router:
    """Finds the handler of a request and makes a response of whatever comes out.

    ``authenticate`` says who sends a request. ``hosts`` are the names that we
    are known by, addresses apart: a browser that was lured to us under another
    one by DNS rebinding is refused; empty stands for any. ``error_page`` makes
    what a browser is shown for an error, where others get JSON.
    """

    def __init__(self, *providers: object, authenticate: Callable[[Request], Identity],
                 hosts: Collection[str] = (),
                 error_page: Callable[[Request, ProtocolError], Response] | None = None) -> None:
        self._authenticate = authenticate
        self._hosts = hosts
        self._error_page = error_page
        found = [BoundRoute(tag, getattr(provider, name), _compile(tag.pattern))
                 for provider in providers for name, member in vars(type(provider)).items()
                 for tag in getattr(member, "routes", ())]
        # The more a pattern leaves open, the later it is tried.
        self.routes = sorted(
            found, key=lambda one: (":path>" in one.route.pattern, one.route.pattern.count("<"))
        )
        seen = collections.Counter((one.route.method, one.regex.pattern) for one in self.routes)
        if seen and seen.most_common(1)[0][1] > 1:
            raise ValueError(f"two routes are the same: {seen.most_common(1)[0][0]}")

    def handle(self, request: Request) -> Response:
        """Return the response to a request, an error response for any exception."""
        try:
            response = self._dispatch(request)
            if _UNSENDABLE.search("".join(response.headers.values())):
                response.close()
                raise ValueError(f"a header field cannot be sent: {response.headers}")
            return response
        except Exception as error:
            refusal = _refusal(error, f"{request.method} {request.path!r}")
            page = "text/html" in request.headers.get("accept", "") and self._error_page
            response = page(request, refusal) if page else _error_in_json(refusal)
            response.headers.update(refusal.headers)
            return response

    def _dispatch(self, request: Request) -> Response:
        self._check_host(request)
        # HEAD is a GET of which the adaptor sends the head.
        method = "GET" if request.method == "HEAD" else request.method
        allowed: set[str] = set()
        for bound in self.routes:
            match = bound.regex.fullmatch(request.path)
            if match is None:
                continue
            if bound.route.method == method:
                return self._call(bound, match, request)
            allowed.add(bound.route.method)
        if not allowed:
            raise ProtocolError(404, f"there is no {request.path} here")
        allowed.update(["HEAD"] if "GET" in allowed else [])
        raise ProtocolError(405, f"{request.path} does not take {request.method}",
                            Allow=", ".join(sorted(allowed)))

    def _call(self, bound: BoundRoute, match: re.Match[str], request: Request) -> Response:
        request.params = {
            name: int(value) if kind == "int" else value
            for group, value in match.groupdict().items() for name, kind in [group.split("_")]
        }
        request.body.limit = bound.route.max_body
        request.identity = self._authenticate(request)
        if bound.route.role == "anyone" or bound.route.role in request.identity.roles:
            request.enter(request.identity)
            return bound.handler(request)
        if request.identity.name:
            raise ProtocolError(403, f"this needs the role '{bound.route.role}'")
        raise ProtocolError(401, f"log in first: this needs the role '{bound.route.role}'",
                            WWW_Authenticate="Bearer")

    def _check_host(self, request: Request) -> None:
        # Only browsers can be rebound, and they always send a Host.
        host = request.headers.get("host")
        if host is not None and self._hosts:
            name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
            if name not in self._hosts and not _is_address(name):
                raise ProtocolError(403, f"this coordinator does not know that it is called "
                                    f"{name!r}: start it with --host NAME")


class Server:
    """Serves a ``Router`` on a TCP port.

    One thread holds every connection from which no whole head of a request has
    come yet, so ten thousand that are idle or slow cost memory only; a request
    gets a thread. The connection that has been idle for longest makes room for
    a new one. Port 0 picks a free one; ``port`` tells which. A port or an
    address that cannot be had is a ``UserError``.
    """

    def __init__(self, router: Router, host: str, port: int,
                 tls: ssl.SSLContext | None = None, limits: Limits | None = None) -> None:
        self.router = router
        self.tls = tls
        self.limits = limits or Limits()
        self.stopping = threading.Event()
        self.changed = threading.Condition()  # held to touch what follows
        self.connections: set[_Connection] = set()  # all that are open
        self._ready: collections.deque[_Connection] = collections.deque()  # for a thread
        self._served: collections.deque[_Connection] = collections.deque()  # to be held again
        self._threads = 0
        self._strangers: collections.Counter[str] = collections.Counter()  # by address
        self._held: dict[_Connection, None] = {}  # of the holding thread; idle longest first
        self._listener = _listen(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._most = min(self.limits.connections, _descriptors(self.limits.connections))
        self._wakee, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._hold_all, name="http", daemon=True)

    def start(self) -> None:
        """Begin to answer, in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, let those that run end, close all connections."""
        with self.changed:
            self.stopping.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(self.limits.stop_seconds)
        for one in (self._listener, self._wakee, self._waker, self._selector):
            one.close()
        with self.changed:
            # Not by a Clock: these are threads in system calls.
            self.changed.wait_for(lambda: not self.connections, self.limits.stop_seconds)
            for connection in self.connections:
                connection.cut()

    @property
    def crowded(self) -> bool:
        """Whether no thread may wait for what may come."""
        return (self._threads > self.limits.threads // 2 or self.stopping.is_set()
                or len(self.connections) > self._most // 2)

    def enter(self, remote: str) -> None:
        """Count a request of a stranger; ``ProtocolError`` 503 when too many are under way."""
        with self.changed:
            if (self._strangers[remote] >= self.limits.strangers_each
                    or sum(self._strangers.values()) >= self.limits.strangers):
                raise ProtocolError(503, "too many requests at a time: try again in a moment",
                                    Retry_After="1")
            self._strangers[remote] += 1

    def leave(self, remote: str) -> None:
        """Forget a request that ``enter`` has counted."""
        with self.changed:
            self._strangers -= collections.Counter([remote])  # which drops the zeros

    # --- the thread that holds the connections

    def _hold_all(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakee, selectors.EVENT_READ)
        limits, looked = self.limits, time.monotonic()
        pause = min(1.0, limits.head_seconds, limits.idle_seconds, limits.linger_seconds)
        while not self.stopping.is_set():
            for key, _ in self._selector.select(pause if self._held else None):
                if key.data in self._held:  # it may have had to make room meanwhile
                    self._step(key.data, key.data.fill)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wakee:
                    self._wakee.recv(BUFFER)
            while self._served:
                self._hold(self._served.popleft())
            now = time.monotonic()
            if now - looked >= pause:
                looked = now
                for connection in [one for one in self._held if one.deadline < now]:
                    self._step(connection, connection.too_late)
        for connection in (*self._held, *self._served):
            connection.close()

    def _accept(self) -> None:
        for _ in range(100):  # and then those that are here already have their turn
            try:
                sock, (address, *_) = self._listener.accept()
                if len(self.connections) >= self._most and not self._make_room():
                    sock.close()
                    raise OSError(f"there are {self._most} already, and all are busy")
                connection = _Connection(self, sock, address)
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("a connection cannot be taken: %s", error)
                if error.errno in (errno.EMFILE, errno.ENFILE) and not self._make_room():
                    time.sleep(0.05)  # the selector would call again at once
                return
            with self.changed:
                self.connections.add(connection)
            self._hold(connection)

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest; False when all are busy."""
        oldest = next(iter(self._held), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _hold(self, connection: _Connection) -> None:
        self._held[connection] = None
        connection.rest()
        self._selector.register(connection.sock, selectors.EVENT_READ, connection)
        self._step(connection, connection.fill)

    def _step(self, connection: _Connection, step: Callable[[], bool]) -> None:
        """Go on with a held connection, which ends it or gives it a thread."""
        try:
            if step():
                self._let_go(connection)
                self._ready.append(connection)
                self._need_thread()
        except OSError as error:
            log.debug("%s: connection ended: %s", connection.remote, error)
            self._drop(connection)
        except Exception:
            log.exception("%s: connection failed", connection.remote)
            self._drop(connection)

    def _let_go(self, connection: _Connection) -> None:
        del self._held[connection]
        self._selector.unregister(connection.sock)

    def _drop(self, connection: _Connection) -> None:
        self._let_go(connection)
        connection.close()

    # --- the threads that serve requests

    def _need_thread(self) -> None:
        with self.changed:
            if self._threads >= self.limits.threads:
                return  # the next that has served its request takes it
            self._threads += 1
        try:
            threading.Thread(target=self._serve, name="http request", daemon=True).start()
        except RuntimeError:
            log.exception("no more threads can be started")
            with self.changed:
                self._threads -= 1

    def _serve(self) -> None:
        while True:
            with self.changed:
                if not self._ready:
                    self._threads -= 1
                    return
                connection = self._ready.popleft()
            more = connection.serve()
            with self.changed:
                more = more and not self.stopping.is_set()
                if more:
                    self._served.append(connection)
            if more:
                self._wake()
            else:
                connection.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")


class _Connection:
    """One client: reads its requests, one after the other, and writes the responses.

    It is held, in ``fill``, ``too_late`` and ``rest``, which never wait, or it
    has a thread, in ``serve`` and what that calls.
    """

    def __init__(self, server: Server, sock: socket.socket, remote: str) -> None:
        self.sock = sock
        self.remote = remote[7:] if remote.startswith("::ffff:") else remote
        self.deadline = 0.0  # of what is awaited now, while it is held
        self._server = server
        self._limits = server.limits
        self._buffer = bytearray()  # received and not yet used
        self._searched = 0  # of the buffer: so far there is no end of a head
        self._idle = True  # nothing is asked at the moment
        self._closing = False  # all is said: what still comes is thrown away
        self._inside = False  # the request under way has been let in,
        self._counted = False  # and is counted as a stranger's
        self._body_began = 0.0  # when the body was first asked for,
        self._body_bytes = 0  # and what has come of it, chunk sizes too
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._handshake = server.tls is not None
        if server.tls is not None:
            sock.settimeout(0)
            self.sock = server.tls.wrap_socket(sock, server_side=True,
                                               do_handshake_on_connect=False)

    def close(self) -> None:
        """Close the connection."""
        with self._server.changed:
            self._server.connections.discard(self)
            self._server.changed.notify_all()
            self.sock.close()

    def cut(self) -> None:
        """Break the connection; the thread that serves it then closes it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    # --- while it is held

    def rest(self) -> None:
        """Begin to be held, for as long as the limits allow."""
        limits = self._limits
        self._idle = not self._buffer
        self.deadline = time.monotonic() + (
            limits.linger_seconds if self._closing else
            limits.idle_seconds if self._idle and not self._handshake else limits.head_seconds)
        self.sock.settimeout(0)

    def fill(self) -> bool:
        """Take in what has come; True when there is a request to serve, ``OSError`` at the end.

        One block at a time: who sends without end is not alone here.
        """
        try:
            if self._handshake:
                self._shake_hands()
            if self._has_head():
                return True
            data = self.sock.recv(BUFFER)
            if not data:
                raise ConnectionError("the client has closed it")
            if self._closing:
                return False
            if self._idle:
                self._idle = False
                self.deadline = time.monotonic() + self._limits.head_seconds
            self._buffer += data
            return self._has_head()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except ProtocolError as error:
            self._refuse(error)
            return False

    def too_late(self) -> bool:
        """Give up on a client that did not go on in time."""
        if self._closing or not self._buffer:
            raise TimeoutError("nothing came for too long")
        self._refuse(ProtocolError(408, "the request came too slowly"))
        return False

    def _shake_hands(self) -> None:
        try:
            cast(ssl.SSLSocket, self.sock).do_handshake()
        except ssl.SSLError as error:
            if error.reason != "HTTP_REQUEST":
                raise
            raise ProtocolError(400, "this port speaks TLS: write https://") from error
        self._handshake = False
        self.rest()

    def _has_head(self) -> bool:
        if self._closing:
            return False
        # Some clients end a body with a line end.
        del self._buffer[: cast("re.Match[bytes]", _LINE_ENDS.match(self._buffer)).end()]
        if self._buffer[:2] == b"\x16\x03":  # how TLS begins
            raise ProtocolError(400, "this port speaks no TLS: write http://")
        end = _HEAD_END.search(self._buffer, self._searched)
        if (end.end() if end else len(self._buffer)) > self._limits.head_bytes:
            raise ProtocolError(431, "the head of the request is too long")
        if end and self._buffer[max(end.start() - 1, 0) : end.end()] != b"\r\n\r\n":
            raise ProtocolError(400, "a line of the request ends in another way than CR LF")
        self._searched = max(len(self._buffer) - 3, 0)
        return end is not None

    def _refuse(self, error: ProtocolError) -> None:
        response = _error_in_json(error)
        data = _head(response, "Connection: close\r\n") + cast(bytes, response.body)
        self.sock.settimeout(0)  # it is little enough for the system to take at once
        send = socket.socket.send if self._handshake else type(self.sock).send
        send(self.sock, data)
        self._say_goodbye()
        self.rest()

    def _say_goodbye(self) -> None:
        """Send no more, but let the client read what was sent.

        Closing with unread data makes TCP throw away what was sent.
        """
        self._closing, self._handshake = True, False
        self._buffer.clear()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    # --- while it has a thread

    def serve(self) -> bool:
        """Answer what is asked; True when the connection is to be held again."""
        try:
            while self._next_request():
                if not self._has_head() and not self._comes_soon():
                    return True
        except ProtocolError as error:
            # Where the next request would begin is not known now: see RFC 9112, 6.3.
            with contextlib.suppress(OSError):
                self._refuse(error)
        except OSError as error:
            log.debug("%s: connection ended: %s", self.remote, error)
        except Exception:
            log.exception("%s: connection failed", self.remote)
        return self._closing

    def _comes_soon(self) -> bool:
        """Wait a moment for the next request, as to be held again costs more time."""
        if self._server.crowded:
            return False
        self.sock.settimeout(_SOON)
        with contextlib.suppress(socket.timeout, ssl.SSLWantReadError):
            data = self.sock.recv(BUFFER)
            if not data:
                raise ConnectionError("the client has closed it")
            self._buffer += data
        return self._has_head()

    def enter(self, identity: Identity) -> None:
        """Let a request in; ``ProtocolError`` 503 when too many of strangers are under way."""
        if not self._inside and not identity.trusted:
            self._server.enter(self.remote)
            self._counted = True
        self._inside = True

    def alive(self) -> bool:
        """Whether the client still waits and the server is not stopping."""
        if self._server.stopping.is_set():
            return False
        timeout = self.sock.gettimeout()
        self.sock.settimeout(0)
        try:
            # Below TLS: there, a client that waits sends nothing but its farewell.
            data = socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
            return bool(data) and self._server.tls is None
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        finally:
            self.sock.settimeout(timeout)

    def _next_request(self) -> bool:
        """Serve the request whose head is here; False when it was the last."""
        end = cast("re.Match[bytes]", _HEAD_END.search(self._buffer))
        head = bytes(self._buffer[: end.start() + 1])
        del self._buffer[: end.end()]
        self._searched = 0
        try:
            request, old, last = self._parse(head)
            response = self._server.router.handle(request)
            # Who was refused may read and write as slowly as others.
            with contextlib.suppress(ProtocolError):
                self.enter(request.identity)
            unread = not self._drained(request)
            last = last or unread or self._server.stopping.is_set()
            log.debug("%s %s %r: %d", self.remote, request.method, request.path, response.status)
            self.sock.settimeout(self._limits.send_seconds if self._inside else 0)
            self._send(response, request.method, old, last)
        finally:
            if self._counted:
                self._server.leave(self.remote)
            self._inside = self._counted = False
        if unread:
            self._say_goodbye()
        return not last

    def _parse(self, head: bytes) -> tuple[Request, bool, bool]:
        """Return the request, whether it is HTTP/1.0, whether it is to be the last."""
        first, *lines = head.decode("latin-1").removesuffix("\r\n").split("\r\n")
        match = _REQUEST_LINE.fullmatch(first)
        if match is None:
            raise ProtocolError(400, "this is not an HTTP/1 request")
        method, host, target, minor = match.groups()
        headers = _parse_fields(lines, self._limits)
        if host is not None:
            headers["host"] = host
        old = minor == "0"
        if not old and "host" not in headers:
            raise ProtocolError(400, "the request has no Host")
        path, _, query = target.partition("?")
        length = _body_length(headers, old)
        expects = headers.get("expect", "").lower() == "100-continue" and not old
        request = Request(
            method, _decode(path), _fields(query), headers,
            BodyReader(self._body(length, expects), length), self.remote,
            secure=self._server.tls is not None, alive=self.alive, enter=self.enter,
        )
        return request, old, old or "close" in headers.get("connection", "").lower()

    def _drained(self, request: Request) -> bool:
        """Read away the little that a handler left of a body; False when it is not little."""
        body = request.body
        awaited = "expect" in request.headers and not body.received  # it may never be sent
        if body.finished or awaited or not self._inside:
            return body.finished
        body.limit = body.received + _DRAIN_LIMIT
        with contextlib.suppress(ProtocolError):
            body.read()
        return body.finished

    def _send(self, response: Response, method: str, old: bool, last: bool) -> None:
        body = response.body
        extra = "Connection: close\r\n" if last else ""
        try:
            if isinstance(body, Stream) and not old:
                extra += "Transfer-Encoding: chunked\r\n"
            head = _head(response, extra)
            if method == "HEAD":
                body = b""
            if isinstance(body, bytes):
                send_all(self.sock, head + body)
            elif isinstance(body, FileSlice):
                send_all(self.sock, head)
                if self.sock.sendfile(body.file, body.start, body.length) != body.length:
                    raise OSError("the file became shorter while it was sent")
            else:
                self._send_stream(head, body, old)
        finally:
            response.close()

    def _send_stream(self, head: bytes, body: Stream, old: bool) -> None:
        for chunk in body:
            if chunk:
                data = chunk if old else b"%x\r\n%b\r\n" % (len(chunk), chunk)
                send_all(self.sock, head + data)
            elif head:
                send_all(self.sock, head)
            elif not self.alive():
                raise OSError("nobody listens to the stream")
            head = b""
            if self._server.stopping.is_set():
                raise OSError("the server is stopping")
        if not old:
            send_all(self.sock, b"0\r\n\r\n")

    # --- the body of a request

    def _body(self, length: int | None, expects: bool) -> Iterator[bytes]:
        """Yield a body, by its length or chunk by chunk, and ``b""`` where it ends."""
        self._body_began, self._body_bytes = time.monotonic(), 0
        if expects:  # the client waits with it until it is told to send it
            with contextlib.suppress(OSError):  # reading will show it
                self.sock.settimeout(self._limits.send_seconds)
                send_all(self.sock, b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is not None:
            yield from self._blocks(length)
        else:
            while size := self._chunk_size():
                yield from self._blocks(size)
                if self._line():
                    raise ProtocolError(400, "a chunk of the body is longer than it said")
        yield b""

    def _blocks(self, size: int) -> Iterator[bytes]:
        while size:
            block = self._take(min(size, BUFFER))
            size -= len(block)
            yield block

    def _chunk_size(self) -> int:
        """Return the size of the chunk that comes next, 0 after the trailer behind the last."""
        size = self._line().partition(b";")[0].strip(b" \t")
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,12}", size):
            raise ProtocolError(400, "the body has a chunk without a size")
        if int(size, 16):
            return int(size, 16)
        for _ in range(self._limits.head_fields):
            if not self._line():
                return 0
        raise ProtocolError(431, "the body has too long a trailer")

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            line += self._take(1)
            if len(line) > 1000:
                raise ProtocolError(400, "the body has too long a line between chunks")
        if b"\n" in line[:-2]:  # others may take it for the line's end
            raise ProtocolError(400, "a line of the body ends in another way than CR LF")
        return line[:-2]

    def _take(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes; ``ProtocolError`` when none come in time."""
        limits = self._limits
        paid = self._body_bytes / limits.body_rate
        try:
            while not self._buffer:
                left = self._body_began + limits.body_seconds + paid - time.monotonic()
                if left < 0:
                    raise ProtocolError(408, "the body came too slowly")
                self.sock.settimeout(max(left, 0.001))
                data = self.sock.recv(BUFFER)
                if not data:
                    raise ProtocolError(400, "the body ended early")
                self._buffer += data
        except socket.timeout:
            raise ProtocolError(408, "the body came too slowly") from None
        except OSError as error:
            raise ProtocolError(400, f"the connection broke: {error}") from error
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._body_bytes += len(data)
        return data


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of it. The socket's timeout is that of a silence: ``sendall``'s is of the whole."""
    left = memoryview(data)
    while left:
        left = left[sock.send(left[:BUFFER]):]


_LINE_ENDS = re.compile(rb"(?:\r\n)*")
_HEAD_END = re.compile(rb"\n\r?\n")
_REQUEST_LINE = re.compile(
    r"([A-Z]{1,20}) (?:https?://([A-Za-z0-9.:\[\]_-]+))?(/[^\s\x00-\x1f\x7f]*) HTTP/1\.([0-9])"
)
_UNSENDABLE = re.compile("[\r\n\0\u0100-\U0010ffff]")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\n-\x1f\x7f]*)")
_WILDCARD = re.compile(r"<([a-z]+)(?::(int|path))?>")
_WILDCARD_REGEX = {"str": "[^/]+", "int": "[0-9]{1,18}", "path": ".+"}

# What every response says, unless it says otherwise: a browser is to make nothing of it but
# what it is, not to run anything in it, and to keep it from pages of others.
_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "same-origin",
}
# What is answered to an exception; the first that fits counts.
_STATUS: tuple[tuple[type[FarmError], int], ...] = (
    (UserError, 400),
    (StaleLease, 410),
    (IllegalTransition, 409),
    (NoRoom, 507),
    (StoreError, 500),
    (FarmError, 409),
)


def _compile(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a route's pattern; its groups are ``name_kind``."""
    return re.compile(_WILDCARD.sub(_group, re.escape(pattern)), re.DOTALL)


def _group(wildcard: re.Match[str]) -> str:
    kind = wildcard[2] or "str"
    return f"(?P<{wildcard[1]}_{kind}>{_WILDCARD_REGEX[kind]})"


def _refusal(error: Exception, place: str) -> ProtocolError:
    """Return what to tell a client of an exception; our own mistakes are told to the log."""
    if isinstance(error, ProtocolError):
        return error
    if not isinstance(error, FarmError):
        log.error("%s failed", place, exc_info=error)
        return ProtocolError(500, "the coordinator made a mistake: its log says which")
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    if status == 500:
        log.warning("%s", error)
    return ProtocolError(status, str(error))


def _error_in_json(refusal: ProtocolError) -> Response:
    return json_response({"error": str(refusal), "detail": refusal.detail}, refusal.status)


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def _fields(text: str) -> dict[str, str]:
    """Return the fields of a query or a form; ``ProtocolError`` 400 for too many."""
    try:
        return dict(urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=1000))
    except ValueError as error:
        raise ProtocolError(400, "the request has too many fields") from error


def _decode(path: str) -> str:
    """Return a path as people write it, from its form in the request line."""
    try:
        text = urllib.parse.unquote_to_bytes(path.encode("latin-1")).decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(400, "the path is not UTF-8") from error
    if "\0" in text:
        raise ProtocolError(400, "the path has a zero byte in it")
    return text


def _parse_fields(lines: list[str], limits: Limits) -> dict[str, str]:
    """Return the header fields; those given twice are joined where that has a meaning."""
    if len(lines) > limits.head_fields:
        raise ProtocolError(431, "the request has too many header fields")
    headers: dict[str, str] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise ProtocolError(400, "a header field is malformed")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding", "authorization"):
                raise ProtocolError(400, f"the request has two {name} fields")
            value = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}"
        headers[name] = value
    return headers


def _body_length(headers: Mapping[str, str], old: bool) -> int | None:
    """Return how long the body is, None when it is chunked; anything odd is refused.

    Two parties that disagree about where a body ends can be made to see
    different requests, so nothing is guessed.
    """
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is None:
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise ProtocolError(400, "the Content-Length is not a number")
        return int(length or 0)
    if length is not None or old:
        raise ProtocolError(400, "a body has either a length or chunks, those only in HTTP/1.1")
    if coding.lower() != "chunked":
        raise ProtocolError(501, f"the transfer coding {coding!r} is not known here")
    return None


def _head(response: Response, extra: str) -> bytes:
    """Return the status line and the header of a response, with the empty line."""
    status = response.status
    headers = {**_HEADERS, **response.headers}
    if isinstance(response.body, FileSlice):
        headers["Content-Length"] = str(response.body.length)
    elif isinstance(response.body, bytes) and status not in (204, 304):
        headers["Content-Length"] = str(len(response.body))
    fields = [f"{name}: {value}" for name, value in headers.items()]
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    reason = http.client.responses.get(status, "")
    lines = [f"HTTP/1.1 {status} {reason}", f"Date: {date}", *fields, extra + "\r\n"]
    return "\r\n".join(lines).encode("latin-1")


def _byte_range(headers: Mapping[str, str], etag: str, size: int) -> tuple[int, int] | None:
    """Return start and end of the range that is asked for, None for the whole file.

    Several ranges are answered with the whole file, as is allowed; a range
    that the file does not have comes out empty.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", headers.get("range", ""))
    if match is None or match[0] == "bytes=-" or headers.get("if-range", etag) != etag:
        return None
    if not match[1]:
        return (max(size - int(match[2]), 0), size) if int(match[2]) else (size, size)
    start = int(match[1])
    end = min(int(match[2]) + 1, size) if match[2] else size
    return None if match[2] and int(match[2]) < start else (start, max(start, end))


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6())
    except OSError as error:
        reason, _, _ = str(error.strerror).partition(" (while ")  # Python adds the address
        raise UserError({
            errno.EADDRINUSE: f"port {port} is in use: is another povfarm running here? "
                              "choose another with --port",
            errno.EACCES: f"port {port} needs administrator rights: choose one above 1023 "
                          "with --port",
        }.get(error.errno or 0, f"cannot listen on {host} port {port}: {reason}")) from error
    listener.settimeout(0)
    return listener


def _descriptors(wanted: int) -> int:
    """Return how many connections this process can have; it asks the system for what is missing."""
    if sys.platform == "win32":
        return 450  # what select() takes on Windows is 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = wanted + 256 if hard == resource.RLIM_INFINITY else hard
    for most in (wanted + 256, 10_240, 4096):  # macOS allows less than it says
        if soft == resource.RLIM_INFINITY or soft >= min(most, top):
            break
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, top), hard))
            soft = min(most, top)
    return wanted if soft == resource.RLIM_INFINITY else max(soft - 256, soft // 2)


# === 9. STORE ================================================================
# All SQL, and the directory of blobs. Methods are single statements with a
# name; what they mean for the farm is SCHEDULER's. No network, no rules.

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (
        key TEXT PRIMARY KEY, value TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE worker (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, token TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL, code TEXT NOT NULL, cores INTEGER NOT NULL, memory INTEGER NOT NULL,
        system TEXT NOT NULL, engines TEXT NOT NULL, tags TEXT NOT NULL, address TEXT NOT NULL,
        joined REAL NOT NULL
    );
    CREATE TABLE blob (
        sha256 TEXT PRIMARY KEY, size INTEGER NOT NULL, stored REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE manifest (
        key TEXT PRIMARY KEY, wire TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE manifest_blob (
        manifest TEXT NOT NULL REFERENCES manifest ON DELETE CASCADE, sha256 TEXT NOT NULL,
        PRIMARY KEY (manifest, sha256)
    ) WITHOUT ROWID;
    CREATE INDEX manifest_blob_sha256 ON manifest_blob (sha256);
    CREATE TABLE job (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '', owner TEXT NOT NULL, pov TEXT NOT NULL,
        manifest TEXT NOT NULL REFERENCES manifest, priority INTEGER NOT NULL,
        max_workers INTEGER NOT NULL, retry_limit INTEGER NOT NULL, in_order INTEGER NOT NULL,
        created REAL NOT NULL, started REAL, finished REAL,
        queued INTEGER NOT NULL DEFAULT 0, leased INTEGER NOT NULL DEFAULT 0,
        done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, cpu REAL NOT NULL DEFAULT 0,
        wall REAL NOT NULL DEFAULT 0
    );
    CREATE INDEX job_state ON job (state, priority);
    CREATE INDEX job_manifest ON job (manifest);
    CREATE TABLE task (
        id INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
        frame INTEGER NOT NULL, slice INTEGER NOT NULL DEFAULT 0, name TEXT NOT NULL,
        state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, worker INTEGER, finished REAL,
        sha256 TEXT, size INTEGER, cpu REAL, wall REAL, memory INTEGER,
        UNIQUE (job, frame, slice)
    );
    CREATE INDEX task_state ON task (job, state, frame, slice);
    CREATE INDEX task_done ON task (job, finished) WHERE state = 'done';
    CREATE TABLE lease (
        id TEXT PRIMARY KEY, worker INTEGER NOT NULL REFERENCES worker,
        job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE, granted REAL NOT NULL,
        ended REAL, why TEXT NOT NULL DEFAULT ''
    ) WITHOUT ROWID;
    CREATE INDEX lease_live ON lease (job) WHERE ended IS NULL;
    CREATE TABLE attempt (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        task INTEGER NOT NULL REFERENCES task ON DELETE CASCADE,
        lease TEXT NOT NULL REFERENCES lease ON DELETE CASCADE, worker INTEGER NOT NULL,
        state TEXT NOT NULL, started REAL NOT NULL, ended REAL,
        message TEXT NOT NULL DEFAULT '', log TEXT NOT NULL DEFAULT '',
        UNIQUE (task, lease)
    );
    CREATE INDEX attempt_lease ON attempt (lease);
    CREATE INDEX attempt_recent ON attempt (worker, id);
    CREATE INDEX attempt_live ON attempt (task) WHERE state = 'live';
    CREATE INDEX attempt_failed ON attempt (worker, task) WHERE state = 'failed';
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job INTEGER, frame INTEGER,
        worker INTEGER, what TEXT NOT NULL, text TEXT NOT NULL
    );
    CREATE INDEX event_job ON event (job);
    """,
    # `engines` of a job are those of the worker that began it, `aside` says of a worker why its
    # pictures are not trusted.
    # Slices and passes are tasks below their frame; `cut` of a frame is the row that its next
    # slice begins with, NULL while it is not sliced; `state_of` the POV-Ray that left a state.
    """
    ALTER TABLE job ADD COLUMN slices TEXT NOT NULL DEFAULT 'auto';
    ALTER TABLE job ADD COLUMN radiosity TEXT NOT NULL DEFAULT 'share';
    ALTER TABLE job ADD COLUMN povray TEXT NOT NULL DEFAULT 'auto';
    ALTER TABLE job ADD COLUMN engines TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE job ADD COLUMN verify INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE job ADD COLUMN frame_timeout INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE worker ADD COLUMN aside TEXT NOT NULL DEFAULT '';
    CREATE INDEX attempt_kept ON attempt (task) WHERE state = 'kept';
    ALTER TABLE task ADD COLUMN parent INTEGER REFERENCES task ON DELETE CASCADE;
    ALTER TABLE task ADD COLUMN kind TEXT NOT NULL DEFAULT 'frame';
    ALTER TABLE task ADD COLUMN top INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE task ADD COLUMN bottom INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE task ADD COLUMN cut INTEGER;
    ALTER TABLE task ADD COLUMN parse REAL;
    ALTER TABLE task ADD COLUMN state_of TEXT NOT NULL DEFAULT '';
    CREATE INDEX task_parent ON task (parent) WHERE parent IS NOT NULL;
    CREATE INDEX task_part ON task (job, state, kind) WHERE parent IS NOT NULL;
    CREATE INDEX task_cut ON task (state, job) WHERE cut IS NOT NULL;
    """,
    # Files that scenes wrote themselves, as the last frame left them; their contents are blobs.
    """
    CREATE TABLE written (
        job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE, path TEXT NOT NULL,
        frame INTEGER NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL,
        PRIMARY KEY (job, path)
    ) WITHOUT ROWID;
    CREATE INDEX written_sha256 ON written (sha256);
    """,
    # The row before which an attempt at a slice was to end when it was given out, 0 for a whole
    # frame: where its task has fewer rows now, others were given the rest.
    """
    ALTER TABLE attempt ADD COLUMN given INTEGER NOT NULL DEFAULT 0;
    UPDATE attempt SET given = (SELECT bottom FROM task WHERE task.id = attempt.task)
    WHERE state = 'live' AND task IN (SELECT id FROM task WHERE parent IS NOT NULL);
    DROP INDEX task_done;
    CREATE INDEX task_done ON task (job, finished) WHERE state = 'done' AND parent IS NULL;
    CREATE INDEX task_slice ON task (job, finished) WHERE state = 'done' AND kind = 'slice';
    """,
)

Row = sqlite3.Row

_DATABASE_TAKES_NOTHING = re.compile("is full|disk I/O|readonly")  # SQLite's own words
_BACKUP_LOOKS = 5  # at a farm in which jobs are deleted meanwhile


class Store:
    """The farm's database and blobs under one data directory.

    ``durable`` False skips the waits for the disk: for a farm whose data
    nobody needs after its process has ended. Raises ``StoreError`` when the
    directory or the database cannot be used, and ``NoRoom`` when the disk takes
    nothing: then ``notice`` says so until ``look_for_room`` finds that it does.
    """

    def __init__(self, root: Path, durable: bool = True) -> None:
        self.root = root
        self.durable = durable
        self._lock = threading.RLock()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self.notice = ""
        try:
            if self._version(root) > len(MIGRATIONS):
                raise StoreError(
                    f"{root / 'farm.db'} was written by a newer povfarm: use that version")
            for name in ("blobs", "jobs"):
                self._make(root / name)
            self._writer = self._connect()
            try:
                self._migrate()
            except sqlite3.Error:
                self._writer.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the data directory {root} cannot be used: {error}") from None

    def close(self) -> None:
        """Close every connection, those in use as soon as they no longer are."""
        with self._lock:
            self._closed = True
            for connection in [self._writer, *self._readers]:
                connection.close()

    @contextlib.contextmanager
    def tx(self) -> Iterator[Tx]:
        """One writer at a time: all of the block is done, or nothing of it."""
        with self._lock, self._noticing():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield Tx(self._writer)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def read(self) -> Iterator[Tx]:
        """Look at the database as it is at this moment; writes are refused."""
        with self._lock:
            connection = self._readers.pop() if self._readers else self._connect(writes=False)
        try:
            connection.execute("BEGIN")
            yield Tx(connection)
        finally:
            connection.execute("COMMIT")
            with self._lock:
                if self._closed:
                    connection.close()
                else:
                    self._readers.append(connection)

    def blob_path(self, sha256: str) -> Path:
        """Return where the contents with this hash are, or would be."""
        return self.root / "blobs" / sha256[:2] / sha256[2:]

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> int:
        """Store contents as they come and return their size in bytes.

        ``ProtocolError`` 422, and nothing kept, when the hash is another one.
        """
        digest, size = hashlib.sha256(), 0
        with self._placed(self.blob_path(sha256)) as file:
            for chunk in chunks:
                self.need(len(chunk))
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise ProtocolError(422, "the contents do not have the hash that they came under")
        return size

    def job_directory(self, job: int, name: str) -> Path:
        """Return the directory of a job's images, such as ``jobs/7-camera2``."""
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "job"
        return self.root / "jobs" / f"{job}-{slug}"

    def put_image(self, directory: Path, name: str, data: bytes) -> None:
        """Write a finished image so that it is there whole or not at all."""
        self.need(len(data))
        with self._placed(safe_join(directory, name)) as file:
            file.write(data)

    def put_log(self, directory: Path, name: str, text: bytes) -> str:
        """Keep the renderer's text of one attempt; return its name below ``directory``."""
        with self._noticing():
            self._make(directory / "logs")
            safe_join(directory / "logs", name).write_bytes(text)
        return f"logs/{name}"

    def need(self, size: int) -> None:
        """Raise ``NoRoom`` when not so many bytes are free."""
        if free_room(self.root) < size:
            raise self._no_room()

    def look_for_room(self) -> bool:
        """Look whether the disk still takes something; True when it does so again."""
        try:
            self.need(LEFT_FREE if self.notice else 0)
            if not self.notice:
                return False
            with self._placed(self.root / "probe") as file:
                file.write(bytes(1 << 20))
            (self.root / "probe").unlink()
            with self.tx() as tx:
                tx.set_meta("probe", "")
        except (OSError, NoRoom):
            return False
        log.warning("the disk of %s takes something again: the farm goes on", self.root)
        self.notice = ""
        return True

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """Make ``NoRoom`` of every error that means it."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if not _DATABASE_TAKES_NOTHING.search(str(error)):
                raise
            raise self._no_room() from error
        except OSError as error:
            if not takes_nothing(error):
                raise
            raise self._no_room() from error

    def _no_room(self) -> NoRoom:
        if not self.notice:
            self.notice = ("the coordinator's disk is full or cannot be written. Nothing is lost: "
                           "make room there ('povfarm.py delete JOB' deletes a job's images) and "
                           "the farm goes on by itself")
            log.warning("%s (%s)", self.notice, self.root)
        return NoRoom(self.notice)

    @classmethod
    def backup(cls, root: Path, to: Path) -> list[str]:
        """Copy a farm's data into a new directory, also while its coordinator runs.

        Images and blobs are linked where that is possible, for what is in them
        never changes. Returns the names of files that the database names and
        that are not there: none, unless the farm is damaged.
        """
        if not (root / "farm.db").is_file():
            raise UserError(f"there is no farm in {root}: name its directory with --data")
        if to.exists():
            raise UserError(f"{to} is there already: name a directory that is not")
        part = to.with_name(f".{to.name}.{os.getpid()}.part")
        try:
            part.mkdir(mode=0o700, parents=True)
            for _ in range(_BACKUP_LOOKS):
                cls._copy_database(root, part)
                missing = cls._copy_files(root, part)
                if not missing:
                    break
            part.replace(to)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the backup in {to} cannot be made: {error}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return missing

    @classmethod
    def _copy_database(cls, root: Path, to: Path) -> None:
        if cls._version(root) != len(MIGRATIONS):
            raise StoreError(f"{root / 'farm.db'} is of another version of povfarm: use that one")
        with contextlib.closing(sqlite3.connect(root / "farm.db", timeout=30)) as source, \
                contextlib.closing(sqlite3.connect(to / "farm.db")) as copy:
            source.backup(copy)

    @classmethod
    def _copy_files(cls, root: Path, to: Path) -> list[str]:
        """Copy what lies beside the database; return what is not there although it should be.

        A file that the database names may be gone because its job was deleted
        after the database was copied: then both are copied again.
        """
        paths = [root / "farm.key", root / "povfarm.ini"]
        for name in ("blobs", "jobs", "workers"):
            paths += [Path(place, file) for place, _, files in os.walk(root / name)
                      for file in files if not _is_part(file)]
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                _link(path, to / path.relative_to(root))
        with contextlib.closing(cls(to, durable=False)) as copy, copy.read() as tx:
            named = [*map(copy.blob_path, tx.stored_blobs()), *copy._images(tx)]
        return [str(path.relative_to(to)) for path in named if not path.is_file()]

    def sweep(self) -> None:
        """Delete what a program that was killed left behind: half of a file, files without a row.

        Of jobs that the database has not heard of yet, as it may be an older
        copy, nothing is deleted.
        """
        with self.read() as tx:
            kept = {*map(self.blob_path, tx.stored_blobs()), *self._images(tx)}
            jobs, newest = {str(row["id"]) for row in tx.jobs(0, -1)}, tx.newest_job()
            states = {f"{task}.state" for task in tx.states()}
        idle = [path for path in (self.root / "blobs").glob("*/*") if path not in kept]
        idle += [path for path in (self.root / "jobs").glob("*/parts/*")
                 if path not in kept and path.name not in states]
        idle += [*self.root.glob(".*.part"), *(self.root / "jobs").glob("*/.*.part")]
        for path in idle:
            with contextlib.suppress(OSError):
                path.unlink()
        for path in (self.root / "jobs").iterdir():
            number = path.name.partition("-")[0]
            if number.isdecimal() and int(number) <= newest and number not in jobs:
                shutil.rmtree(path, ignore_errors=True)

    def _images(self, tx: Tx) -> list[Path]:
        images = [Path(*place_of(self.job_directory(row["job"], row["job_name"]), row))
                  for row in tx.done_tasks()]
        return images + [
            self.job_directory(row["job"], row["job_name"]) / "parts"
            / kept_name(row, row["attempt"]) for row in tx.kept_images()]

    @contextlib.contextmanager
    def _placed(self, path: Path) -> Iterator[BinaryIO]:
        """Write a file that is there whole, and outlives a power cut, or not at all."""
        with self._noticing():
            self._make(path.parent)
            with placed(path) as part, open(part, "wb") as file:
                yield file
                file.flush()
                if self.durable:
                    os.fsync(file.fileno())
            if self.durable:
                sync_directory(path.parent)

    def _make(self, directory: Path) -> None:
        if not directory.is_dir():
            self._make(directory.parent)
            directory.mkdir(exist_ok=True)
            if self.durable:
                sync_directory(directory.parent)

    def _connect(self, writes: bool = True) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.root / "farm.db", timeout=30, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        if writes:
            level = "PRAGMA synchronous = FULL" if self.durable else "PRAGMA synchronous = OFF"
            connection.execute(level)
        else:
            connection.execute("PRAGMA query_only = ON")
        return connection

    @staticmethod
    def _version(root: Path) -> int:
        """Return the version of the database, 0 without one, and leave every byte as it is."""
        path = root / "farm.db"
        if not path.exists():
            return 0
        # Whoever may write merges a log that was left behind by a crash into the database;
        # whoever may not leaves files behind where there was no log.
        mode = "ro" if path.with_name("farm.db-wal").exists() else "rw"
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        with contextlib.closing(sqlite3.connect(uri, timeout=30, uri=True)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])

    def _migrate(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        self._writer.execute("PRAGMA journal_mode = WAL")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            self._writer.executescript(
                f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;"
            )


def place_of(directory: Path, task: Row) -> tuple[Path, str]:
    """Return the directory and the name of a task's file: parts have their own until joined."""
    if not task["parent"]:
        return directory, task["name"]
    suffix = PurePosixPath(task["name"]).suffix if task["kind"] == TaskKind.SLICE else ".zip"
    return directory / "parts", f"{task['id']}{suffix}"


def _is_part(name: str) -> bool:
    """Tell the temporary name of a file that is being written."""
    return name.startswith(".") and name.endswith(".part")


def _link(source: Path, to: Path) -> None:
    """Give a file a second name, or copy it where that cannot be; nothing when it is there."""
    status = source.stat()
    if to.exists():
        there = to.stat()
        if (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            return
        to.unlink()
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, to)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, to)


def kept_name(task: Row, attempt: int) -> str:
    """Return the name in ``parts`` of an image that waits to be compared."""
    return f"{task['id']}.{attempt}{PurePosixPath(task['name']).suffix}"


class Tx:
    """One transaction: every statement that the farm runs, by name."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    # --- the farm itself

    def meta(self, key: str) -> str:
        """Return a value of the farm itself, or an empty text."""
        row = self._db.execute("SELECT value FROM meta WHERE key = :key", {"key": key}).fetchone()
        return row["value"] if row else ""

    def set_meta(self, key: str, value: str) -> None:
        """Set a value of the farm itself."""
        self._db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (:key, :value)",
                         {"key": key, "value": value})

    def add_event(self, now: float, what: str, text: str, job: int | None = None,
                  frame: int | None = None, worker: int | None = None) -> None:
        """Append to the story of the farm."""
        self._db.execute(
            """INSERT INTO event (time, job, frame, worker, what, text)
               VALUES (:now, :job, :frame, :worker, :what, :text)""",
            {"now": now, "job": job, "frame": frame, "worker": worker, "what": what, "text": text})

    def events(self, after: int, limit: int) -> list[Row]:
        """Return events with a higher id, oldest first."""
        return self._db.execute(
            "SELECT * FROM event WHERE id > :after ORDER BY id LIMIT :limit",
            {"after": after, "limit": limit}).fetchall()

    def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        return int(self._db.execute("SELECT COALESCE(MAX(id), 0) FROM event").fetchone()[0])

    def first_event(self, job: int) -> int:
        """Return the id of the event with which a job began."""
        return int(self._db.execute("SELECT COALESCE(MIN(id), 0) FROM event WHERE job = :job",
                                    {"job": job}).fetchone()[0])

    def drop_events(self, before: int) -> None:
        """Forget old events."""
        self._db.execute("DELETE FROM event WHERE id < :before", {"before": before})

    # --- workers

    def add_worker(self, info: WorkerInfo, token: str, state: WorkerState, code: str,
                   address: str, now: float) -> int:
        """Add a worker and return its id; ``token`` is the hash of its secret."""
        cursor = self._db.execute(
            """INSERT INTO worker (name, token, state, code, cores, memory, system, engines, tags,
                                   address, joined)
               VALUES (:name, :token, :state, :code, :cores, :memory, :system, :engines, :tags,
                       :address, :now)""",
            {"name": info.name, "token": token, "state": state.value, "code": code,
             "cores": info.cores, "memory": info.memory, "system": info.system,
             "engines": json.dumps(dict(info.engines)), "tags": json.dumps(info.tags),
             "address": address, "now": now})
        return int(cursor.lastrowid or 0)

    def set_worker_info(self, worker: int, info: WorkerInfo, address: str) -> None:
        """Replace what a worker says of itself."""
        self._db.execute(
            """UPDATE worker SET name = :name, cores = :cores, memory = :memory, system = :system,
                                 engines = :engines, tags = :tags, address = :address,
                                 aside = ''
               WHERE id = :id""",
            {"id": worker, "name": info.name, "cores": info.cores, "memory": info.memory,
             "system": info.system, "engines": json.dumps(dict(info.engines)),
             "tags": json.dumps(info.tags), "address": address})

    def worker(self, worker: int) -> Row | None:
        """Return one worker."""
        return cast("Row | None", self._db.execute(
            "SELECT * FROM worker WHERE id = :id", {"id": worker}).fetchone())

    def worker_by_token(self, token: str) -> Row | None:
        """Return the worker whose secret has this hash."""
        return cast("Row | None", self._db.execute(
            "SELECT * FROM worker WHERE token = :token", {"token": token}).fetchone())

    def workers(self) -> list[Row]:
        """Return every worker that was not removed."""
        return self._db.execute(
            "SELECT * FROM worker WHERE state != 'removed' ORDER BY id").fetchall()

    def set_worker_state(self, worker: int, state: WorkerState) -> bool:
        """Admit or remove a worker, and forget its secret then; False when there is none."""
        return self._db.execute(
            """UPDATE worker SET state = :state,
                 token = CASE WHEN :state = 'removed' THEN 'removed ' || id ELSE token END
               WHERE id = :id AND state != 'removed'""",
            {"id": worker, "state": state.value}).rowcount == 1

    def set_aside(self, worker: int, why: str) -> None:
        """Note why the pictures of a worker are not trusted."""
        self._db.execute("UPDATE worker SET aside = :why WHERE id = :id",
                         {"id": worker, "why": why})

    # --- files

    def add_blob(self, sha256: str, size: int, now: float) -> None:
        """Record contents that are on disk already."""
        self._db.execute(
            "INSERT OR IGNORE INTO blob (sha256, size, stored) VALUES (:sha256, :size, :now)",
            {"sha256": sha256, "size": size, "now": now})

    def stored_blobs(self) -> list[str]:
        """Return the hash of everything that is stored."""
        return [row["sha256"] for row in self._db.execute("SELECT sha256 FROM blob")]

    def is_stored(self, sha256: str) -> bool:
        """Tell whether these contents are recorded."""
        return self._db.execute("SELECT 1 FROM blob WHERE sha256 = :sha256",
                                {"sha256": sha256}).fetchone() is not None

    def blob_wanted(self, sha256: str) -> bool:
        """Tell whether a manifest names these contents."""
        return self._db.execute("SELECT 1 FROM manifest_blob WHERE sha256 = :sha256 LIMIT 1",
                                {"sha256": sha256}).fetchone() is not None

    def add_manifest(self, manifest: Manifest) -> None:
        """Record a manifest, once however many jobs use it."""
        self._db.execute("INSERT OR IGNORE INTO manifest (key, wire) VALUES (:key, :wire)",
                         {"key": manifest.key, "wire": json.dumps(manifest.to_wire())})
        self._db.executemany(
            "INSERT OR IGNORE INTO manifest_blob (manifest, sha256) VALUES (:key, :sha256)",
            [{"key": manifest.key, "sha256": file.sha256} for file in manifest.files])

    def manifest(self, key: str) -> str:
        """Return a manifest's JSON text, or an empty text."""
        row = self._db.execute("SELECT wire FROM manifest WHERE key = :key",
                               {"key": key}).fetchone()
        return row["wire"] if row else ""

    def missing_blobs(self, manifest: str) -> list[str]:
        """Return the hashes that a manifest names and that are not stored."""
        return [row["sha256"] for row in self._db.execute(
            """SELECT sha256 FROM manifest_blob WHERE manifest = :key
               AND sha256 NOT IN (SELECT sha256 FROM blob) ORDER BY sha256""", {"key": manifest})]

    def drop_manifests(self) -> None:
        """Forget the manifests that no job uses."""
        self._db.execute("DELETE FROM manifest WHERE key NOT IN (SELECT manifest FROM job)")

    def unused_blobs(self, before: float) -> list[str]:
        """Return the hashes that nobody names and that are older than ``before``."""
        return [row["sha256"] for row in self._db.execute(
            """SELECT sha256 FROM blob WHERE stored < :before
               AND sha256 NOT IN (SELECT sha256 FROM manifest_blob)
               AND sha256 NOT IN (SELECT sha256 FROM written)""", {"before": before})]

    def add_written(self, job: int, path: str, frame: int, sha256: str, size: int) -> None:
        """Record a file that a scene wrote, unless that of a later frame is there."""
        self._db.execute(
            """INSERT INTO written (job, path, frame, sha256, size)
               VALUES (:job, :path, :frame, :sha256, :size)
               ON CONFLICT (job, path) DO UPDATE SET
                 frame = excluded.frame, sha256 = excluded.sha256, size = excluded.size
               WHERE excluded.frame >= written.frame""",
            {"job": job, "path": path, "frame": frame, "sha256": sha256, "size": size})

    def written(self, job: int) -> list[Row]:
        """Return the files that the scene of a job wrote."""
        return self._db.execute(
            "SELECT path, frame, sha256, size FROM written WHERE job = :job ORDER BY path",
            {"job": job}).fetchall()

    def drop_blob(self, sha256: str) -> None:
        """Forget contents, before their file is deleted."""
        self._db.execute("DELETE FROM blob WHERE sha256 = :sha256", {"sha256": sha256})

    # --- jobs

    def add_job(self, name: str, owner: str, pov: PovJob, manifest: str, options: JobOptions,
                now: float) -> int:
        """Add a waiting job without tasks and return its id."""
        cursor = self._db.execute(
            """INSERT INTO job (name, state, owner, pov, manifest, priority, max_workers,
                                retry_limit, in_order, slices, radiosity, povray, verify,
                                frame_timeout, created)
               VALUES (:name, 'waiting', :owner, :pov, :manifest, :priority, :max_workers,
                       :retry_limit, :in_order, :slices, :radiosity, :povray, :verify,
                       :frame_timeout, :now)""",
            {**vars(options), "name": name, "owner": owner, "pov": json.dumps(pov.to_wire()),
             "manifest": manifest, "now": now})
        return int(cursor.lastrowid or 0)

    def add_tasks(self, job: int, tasks: Iterable[tuple[int, str]]) -> None:
        """Add queued tasks, given as frame and file name, and count them."""
        rows = [{"job": job, "frame": frame, "name": name} for frame, name in tasks]
        self._db.executemany(
            "INSERT INTO task (job, frame, name, state) VALUES (:job, :frame, :name, 'queued')",
            rows)
        self._db.execute("UPDATE job SET queued = queued + :count WHERE id = :job",
                         {"job": job, "count": len(rows)})

    def job(self, job: int) -> Row | None:
        """Return one job."""
        return cast("Row | None", self._db.execute(
            "SELECT * FROM job WHERE id = :id", {"id": job}).fetchone())

    def jobs(self, after: int, limit: int) -> list[Row]:
        """Return jobs, the newest first; ``after`` is the last id already seen, or 0."""
        return self._db.execute(
            """SELECT * FROM job WHERE (:after = 0 OR id < :after)
               ORDER BY id DESC LIMIT :limit""", {"after": after, "limit": limit}).fetchall()

    def newest_job(self) -> int:
        """Return the highest number that a job ever had; numbers are not used again."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'job'").fetchone()
        return int(row["seq"]) if row else 0

    def waiting_jobs(self) -> list[Row]:
        """Return the jobs whose files have not all come."""
        return self._db.execute("SELECT * FROM job WHERE state = 'waiting'").fetchall()

    def leasable_jobs(self) -> list[Row]:
        """Return active jobs in the order in which they may be served.

        Higher priority first; among equals the one with the fewest runs under
        way, so that each gets its share; then the oldest.
        """
        return self._db.execute(
            """SELECT job.*, (SELECT COUNT(*) FROM lease
                              WHERE lease.job = job.id AND lease.ended IS NULL) AS runs
               FROM job WHERE state = 'active' AND queued + leased > 0
               ORDER BY priority DESC, runs, id""").fetchall()

    def set_job_state(self, job: int, frm: JobState, to: JobState, reason: str,
                      finished: float | None) -> bool:
        """Move a job from one state to another; False when it was in neither."""
        return self._db.execute(
            """UPDATE job SET state = :to, reason = :reason, finished = :finished
               WHERE id = :id AND state = :frm""",
            {"id": job, "frm": frm.value, "to": to.value, "reason": reason,
             "finished": finished}).rowcount == 1

    def set_job_started(self, job: int, now: float) -> None:
        """Note when the first task of a job was given out."""
        self._db.execute("UPDATE job SET started = :now WHERE id = :id AND started IS NULL",
                         {"id": job, "now": now})

    def set_job_engines(self, job: int, engines: str) -> None:
        """Note what the worker has that begins a job, as JSON text."""
        self._db.execute("UPDATE job SET engines = :engines WHERE id = :id",
                         {"id": job, "engines": engines})

    def set_job_options(self, job: int, options: JobOptions) -> None:
        """Change how a job is treated."""
        self._db.execute(
            """UPDATE job SET priority = :priority, max_workers = :max_workers,
                              retry_limit = :retry_limit, in_order = :in_order,
                              slices = :slices, radiosity = :radiosity, povray = :povray,
                              verify = :verify, frame_timeout = :frame_timeout
               WHERE id = :id""", {**vars(options), "id": job})

    def add_job_cost(self, job: int, cost: Cost) -> None:
        """Add what a finished task cost."""
        self._db.execute("UPDATE job SET cpu = cpu + :cpu, wall = wall + :wall WHERE id = :id",
                         {"id": job, "cpu": cost.cpu, "wall": cost.wall})

    def drop_job(self, job: int) -> None:
        """Forget a job with its tasks, leases, attempts and ticket."""
        self._db.execute("DELETE FROM job WHERE id = :id", {"id": job})
        self._db.execute("DELETE FROM meta WHERE key LIKE 'ticket %' AND value = :id",
                         {"id": str(job)})

    def count_task(self, job: int, frm: TaskState, to: TaskState) -> None:
        """Keep the job's counters equal to its rows when one task changes."""
        self._db.execute(
            """UPDATE job SET
                 queued = queued + (:to = 'queued') - (:frm = 'queued'),
                 leased = leased + (:to = 'leased') - (:frm = 'leased'),
                 done = done + (:to = 'done') - (:frm = 'done'),
                 failed = failed + (:to = 'failed') - (:frm = 'failed'),
                 cancelled = cancelled + (:to = 'cancelled') - (:frm = 'cancelled')
               WHERE id = :id""", {"id": job, "frm": frm.value, "to": to.value})

    # --- tasks

    def task(self, task: int) -> Row | None:
        """Return one task."""
        return cast("Row | None", self._db.execute(
            "SELECT * FROM task WHERE id = :id", {"id": task}).fetchone())

    def task_of_frame(self, job: int, frame: int) -> Row | None:
        """Return the task of one frame."""
        return cast("Row | None", self._db.execute(
            "SELECT * FROM task WHERE job = :job AND frame = :frame AND slice = 0",
            {"job": job, "frame": frame}).fetchone())

    def tasks(self, job: int, after: int = -1, limit: int = -1) -> list[Row]:
        """Return a job's frames; ``after`` is the last one already seen."""
        return self._db.execute(
            """SELECT * FROM task WHERE job = :job AND frame > :after AND slice = 0
               ORDER BY frame LIMIT :limit""",
            {"job": job, "after": after, "limit": limit}).fetchall()

    def tasks_in(self, job: int, state: TaskState) -> list[Row]:
        """Return the frames of a job that are in one state."""
        return self._db.execute(
            """SELECT * FROM task WHERE job = :job AND state = :state AND slice = 0
               ORDER BY frame""", {"job": job, "state": state.value}).fetchall()

    def next_tasks(self, job: int, worker: int, limit: int) -> list[Row]:
        """Return queued whole frames that this worker has not failed or rendered yet."""
        return self._db.execute(
            """SELECT * FROM task WHERE job = :job AND state = 'queued' AND slice = 0
               AND cut IS NULL AND NOT EXISTS (
                 SELECT 1 FROM attempt WHERE attempt.task = task.id
                 AND attempt.worker = :worker AND attempt.state = 'failed')
               AND NOT EXISTS (
                 SELECT 1 FROM attempt WHERE attempt.task = task.id
                 AND attempt.worker = :worker AND attempt.state = 'kept')
               ORDER BY frame LIMIT :limit""",
            {"job": job, "worker": worker, "limit": limit}).fetchall()

    def newest_task_of(self, job: int) -> Row | None:
        """Return the frame of one job that was finished last."""
        return cast("Row | None", self._db.execute(
            """SELECT * FROM task INDEXED BY task_done
               WHERE job = :job AND state = 'done' AND parent IS NULL
               ORDER BY finished DESC, id DESC LIMIT 1""", {"job": job}).fetchone())

    def neighbours(self, job: int, frame: int) -> list[Row]:
        """Return the finished frames that are the nearest before and after a frame."""
        return self._db.execute(
            """SELECT * FROM task WHERE job = :job AND slice = 0 AND frame IN (
                 (SELECT MAX(frame) FROM task WHERE job = :job AND state = 'done'
                  AND slice = 0 AND frame < :frame),
                 (SELECT MIN(frame) FROM task WHERE job = :job AND state = 'done'
                  AND slice = 0 AND frame > :frame))""", {"job": job, "frame": frame}).fetchall()

    # --- slices of frames, and the passes that slices share

    def add_part(self, frame: Row, kind: TaskKind, top: int, bottom: int) -> Row:
        """Add a queued slice or pass below a frame and return it."""
        passes, slices = self._db.execute(
            """SELECT MIN(slice) - 1, MAX(slice) + 1 FROM task
               WHERE job = :job AND frame = :frame""",
            {"job": frame["job"], "frame": frame["frame"]}).fetchone()
        number = passes if kind is TaskKind.PASS else slices
        cursor = self._db.execute(
            """INSERT INTO task (job, frame, slice, name, state, parent, kind, top, bottom)
               VALUES (:job, :frame, :number, :name, 'queued', :id, :kind, :top, :bottom)""",
            {**dict(frame), "number": number, "kind": kind.value, "top": top, "bottom": bottom})
        return cast(Row, self.task(int(cursor.lastrowid or 0)))

    def parts(self, frame: int, kind: TaskKind | None = None) -> list[Row]:
        """Return the slices and the passes of a frame, or those of one kind, by their rows."""
        return self._db.execute(
            """SELECT * FROM task WHERE parent = :frame AND kind = COALESCE(:kind, kind)
               ORDER BY top, slice""",
            {"frame": frame, "kind": kind and kind.value}).fetchall()

    def slice_states(self, frame: int) -> set[TaskState]:
        """Return the states in which slices of a frame are."""
        return {TaskState(row["state"]) for row in self._db.execute(
            "SELECT DISTINCT state FROM task WHERE parent = :frame AND kind = 'slice'",
            {"frame": frame})}

    def queued_parts(self, job: int) -> list[Row]:
        """Return the slices and passes of a job that wait for a worker."""
        return self._db.execute(
            """SELECT * FROM task INDEXED BY task_part
               WHERE job = :job AND state = 'queued' AND parent IS NOT NULL
               ORDER BY frame, top""", {"job": job}).fetchall()

    def frames_to_cut(self, job: int) -> list[Row]:
        """Return the frames of which some rows are given out as slices, or will be."""
        return self._db.execute(
            """SELECT * FROM task INDEXED BY task_cut
               WHERE job = :job AND state IN ('queued', 'leased') AND cut IS NOT NULL
               ORDER BY frame""", {"job": job}).fetchall()

    def has_rows(self, job: int) -> bool:
        """Tell whether slices or passes of a job wait for a worker, or rows that are not cut."""
        return self._db.execute(
            """SELECT 1 FROM task INDEXED BY task_part
               WHERE job = :job AND state = 'queued' AND parent IS NOT NULL
               UNION ALL SELECT 1 FROM task INDEXED BY task_cut
               WHERE job = :job AND state = 'leased' AND cut IS NOT NULL AND cut < bottom
               LIMIT 1""", {"job": job}).fetchone() is not None

    def frames_to_join(self) -> list[Row]:
        """Return the sliced frames that are not done although every slice of them is."""
        return self._db.execute(
            """SELECT * FROM task INDEXED BY task_cut WHERE cut IS NOT NULL AND cut = bottom
               AND state IN ('leased', 'failed') AND NOT EXISTS (
                 SELECT 1 FROM task AS part WHERE part.parent = task.id
                 AND part.kind = 'slice' AND part.state != 'done')""").fetchall()

    def set_cut(self, frame: int, cut: int, bottom: int) -> None:
        """Note how many rows of a frame are given out as slices, of how many."""
        self._db.execute("UPDATE task SET cut = :cut, bottom = :bottom WHERE id = :id",
                         {"id": frame, "cut": cut, "bottom": bottom})

    def drop_parts(self, frame: int) -> None:
        """Make a sliced frame a whole one again."""
        self._db.execute("DELETE FROM task WHERE parent = :id", {"id": frame})
        self._db.execute("UPDATE task SET cut = NULL, bottom = 0 WHERE id = :id", {"id": frame})

    def set_bottom(self, task: int, bottom: int) -> None:
        """Let a slice end sooner."""
        self._db.execute("UPDATE task SET bottom = :bottom WHERE id = :id",
                         {"id": task, "bottom": bottom})

    def states(self) -> list[int]:
        """Return the tasks of which the state of a stopped render is kept."""
        return [row["id"] for row in self._db.execute("SELECT id FROM task WHERE state_of != ''")]

    def set_state_of(self, task: int, version: str) -> None:
        """Note which POV-Ray left a state to go on from; empty for none."""
        self._db.execute("UPDATE task SET state_of = :version WHERE id = :id",
                         {"id": task, "version": version})

    def move_attempts(self, task: int, to: int) -> None:
        """Make attempts at a whole frame attempts at its first slice."""
        self._db.execute("UPDATE attempt SET task = :to WHERE task = :task AND state = 'live'",
                         {"task": task, "to": to})

    def slice_costs(self, job: int) -> list[Row]:
        """Return rows and seconds of the slices that were finished last, by worker."""
        return self._db.execute(
            """SELECT worker, SUM(bottom - top) AS rows, SUM(wall - parse) AS wall,
                      MIN(parse) AS parse
               FROM (SELECT * FROM task INDEXED BY task_slice
                     WHERE job = :job AND kind = 'slice' AND state = 'done' AND wall > 0
                     ORDER BY finished DESC LIMIT 64)
               GROUP BY worker""", {"job": job}).fetchall()

    def recent_walls(self, job: int) -> list[float]:
        """Return how long the frames took that a job finished last, in seconds."""
        return [row["wall"] for row in self._db.execute(
            """SELECT wall FROM task INDEXED BY task_done
               WHERE job = :job AND state = 'done' AND parent IS NULL
               ORDER BY finished DESC LIMIT 99""", {"job": job}) if row["wall"]]

    def set_task_state(self, task: int, frm: TaskState, to: TaskState) -> bool:
        """Move a task from one state to another; False when it was not there."""
        return self._db.execute(
            "UPDATE task SET state = :to WHERE id = :id AND state = :frm",
            {"id": task, "frm": frm.value, "to": to.value}).rowcount == 1

    def set_task_result(self, task: int, worker: int, sha256: str, size: int, cost: Cost,
                        now: float) -> None:
        """Record the accepted image of a task."""
        self._db.execute(
            """UPDATE task SET worker = :worker, sha256 = :sha256, size = :size, cpu = :cpu,
                               wall = :wall, memory = :memory, parse = :parse, finished = :now,
                               state_of = ''
               WHERE id = :id""",
            {**vars(cost), "id": task, "worker": worker, "sha256": sha256, "size": size,
             "now": now})

    def set_tries(self, task: int, tries: int) -> None:
        """Set how often a task has failed."""
        self._db.execute("UPDATE task SET tries = :tries WHERE id = :id",
                         {"id": task, "tries": tries})

    # --- leases and attempts

    def add_lease(self, lease: str, worker: int, job: int, tasks: Iterable[int],
                  now: float) -> None:
        """Add a live lease with one live attempt for each of its tasks."""
        self._db.execute(
            """INSERT INTO lease (id, worker, job, granted)
               VALUES (:lease, :worker, :job, :now)""",
            {"lease": lease, "worker": worker, "job": job, "now": now})
        self._db.executemany(
            """INSERT INTO attempt (task, lease, worker, state, started, given)
               SELECT id, :lease, :worker, 'live', :now, bottom * (parent IS NOT NULL)
               FROM task WHERE id = :task""",
            [{"task": task, "lease": lease, "worker": worker, "now": now} for task in tasks])

    def lease(self, lease: str) -> Row | None:
        """Return one lease."""
        return cast("Row | None", self._db.execute(
            "SELECT * FROM lease WHERE id = :id", {"id": lease}).fetchone())

    def live_leases(self) -> list[Row]:
        """Return every lease that has not ended."""
        return self._db.execute(
            "SELECT * FROM lease WHERE ended IS NULL ORDER BY granted").fetchall()

    def job_workers(self, job: int) -> set[int]:
        """Return the workers that hold a live lease of a job."""
        return {row["worker"] for row in self._db.execute(
            "SELECT DISTINCT worker FROM lease WHERE job = :job AND ended IS NULL",
            {"job": job})}

    def end_lease(self, lease: str, why: str, now: float) -> None:
        """End a lease; its attempts are ended by their own statements."""
        self._db.execute(
            "UPDATE lease SET ended = :now, why = :why WHERE id = :id AND ended IS NULL",
            {"id": lease, "why": why, "now": now})

    def attempt(self, task: int, lease: str) -> Row | None:
        """Return the attempt of a task under a lease, also when the task became a slice since."""
        return cast("Row | None", self._db.execute(
            """SELECT attempt.* FROM attempt JOIN task ON task.id = attempt.task
               WHERE :task IN (task.id, task.parent) AND lease = :lease""",
            {"task": task, "lease": lease}).fetchone())

    def attempts(self, frame: int) -> list[Row]:
        """Return every attempt of a frame and its slices, oldest first, with the worker's name."""
        return self._db.execute(
            """SELECT attempt.*, worker.name AS worker_name, task.kind AS kind, task.top AS top,
                      task.bottom AS bottom
               FROM attempt JOIN worker ON worker.id = attempt.worker
               JOIN task ON task.id = attempt.task
               WHERE :frame IN (task.id, task.parent) ORDER BY attempt.id""",
            {"frame": frame}).fetchall()

    def live_attempts_of_task(self, task: int) -> list[Row]:
        """Return the attempts of a task that are under way."""
        return self._db.execute(
            "SELECT * FROM attempt WHERE task = :task AND state = 'live' ORDER BY id",
            {"task": task}).fetchall()

    def live_attempts_of_lease(self, lease: str) -> list[Row]:
        """Return the attempts under a lease that are under way."""
        return self._db.execute(
            "SELECT * FROM attempt WHERE lease = :lease AND state = 'live' ORDER BY id",
            {"lease": lease}).fetchall()

    def live_attempts_of_job(self, job: int) -> list[Row]:
        """Return the attempts of a job's tasks that are under way, oldest lease first."""
        return self._db.execute(
            """SELECT attempt.*, task.frame AS frame, task.kind AS kind, task.top AS top,
                      task.bottom AS bottom
               FROM task CROSS JOIN attempt ON attempt.task = task.id
               WHERE task.job = :job AND task.state = 'leased' AND attempt.state = 'live'
               ORDER BY attempt.started, task.frame DESC""", {"job": job}).fetchall()

    def live_attempts_at_parts(self, job: int) -> list[Row]:
        """Return those of a job's attempts under way that are at slices or passes: mostly few."""
        return self._db.execute(
            """SELECT attempt.*, task.kind AS kind, task.top AS top, task.bottom AS bottom
               FROM task INDEXED BY task_part CROSS JOIN attempt ON attempt.task = task.id
               WHERE task.job = :job AND task.state = 'leased' AND task.parent IS NOT NULL
               AND attempt.state = 'live' ORDER BY attempt.started""", {"job": job}).fetchall()

    def cut_attempts(self) -> list[Row]:
        """Return the attempts under way at slices that had more rows when they were given out."""
        return self._db.execute(
            """SELECT attempt.lease AS lease, attempt.given AS given, task.*, job.pov AS pov
               FROM attempt CROSS JOIN task ON task.id = attempt.task
               JOIN job ON job.id = task.job
               WHERE attempt.state = 'live' AND task.kind = 'slice'
               AND attempt.given != task.bottom""").fetchall()

    def attempts_of_lease(self, lease: str) -> list[Row]:
        """Return every attempt under a lease, with the frame, in the order of frames."""
        return self._db.execute(
            """SELECT attempt.*, task.frame AS frame, task.job AS job
               FROM attempt JOIN task ON task.id = attempt.task
               WHERE attempt.lease = :lease ORDER BY task.frame""", {"lease": lease}).fetchall()

    def end_attempt(self, attempt: int, state: AttemptState, now: float, message: str = "",
                    log: str = "") -> None:
        """End a live attempt with its result."""
        self._db.execute(
            """UPDATE attempt SET state = :state, ended = :now, message = :message, log = :log
               WHERE id = :id""",
            {"id": attempt, "state": state.value, "now": now, "message": message, "log": log})

    def failed_workers(self, task: int) -> set[int]:
        """Return the workers that failed a task."""
        return {row["worker"] for row in self._db.execute(
            "SELECT DISTINCT worker FROM attempt WHERE task = :task AND state = 'failed'",
            {"task": task})}

    def kept(self, task: int) -> list[Row]:
        """Return the attempts of a task whose images wait to be compared, the oldest first."""
        return self._db.execute(
            """SELECT attempt.*, worker.name AS worker_name
               FROM attempt JOIN worker ON worker.id = attempt.worker
               WHERE task = :task AND attempt.state = 'kept' ORDER BY attempt.id""",
            {"task": task}).fetchall()

    def forget_failures(self, task: int) -> None:
        """Let every worker try a task again."""
        self._db.execute(
            "UPDATE attempt SET state = 'released' WHERE task = :task AND state = 'failed'",
            {"task": task})

    def failures(self, job: int, worker: int) -> int:
        """Return how many attempts of a job failed on one worker."""
        # CROSS JOIN: from the failures, which are few, to their tasks.
        return int(self._db.execute(
            """SELECT COUNT(*) FROM attempt CROSS JOIN task ON task.id = attempt.task
               WHERE attempt.worker = :worker AND attempt.state = 'failed' AND task.job = :job""",
            {"job": job, "worker": worker}).fetchone()[0])

    def has_done(self, job: int, worker: int) -> bool:
        """Tell whether one worker rendered a frame of a job."""
        return self._db.execute(
            """SELECT 1 FROM attempt CROSS JOIN task ON task.id = attempt.task
               WHERE attempt.worker = :worker AND attempt.state = 'done' AND task.job = :job
               LIMIT 1""", {"job": job, "worker": worker}).fetchone() is not None

    def recent_attempts(self, worker: int, limit: int) -> list[str]:
        """Return how a worker's last attempts ended, the newest first.

        Failures count only in jobs of which some frame was rendered: where
        none was, the scene is to blame.
        """
        return [row["state"] for row in self._db.execute(
            """SELECT attempt.state AS state FROM attempt JOIN task ON task.id = attempt.task
               WHERE attempt.worker = :worker AND (attempt.state IN ('done', 'kept') OR (
                   attempt.state = 'failed' AND EXISTS (
                       SELECT 1 FROM job WHERE job.id = task.job AND job.done > 0)))
               ORDER BY attempt.id DESC LIMIT :limit""", {"worker": worker, "limit": limit})]

    def first_failure(self, job: int) -> Row | None:
        """Return the newest failed attempt of a job with its frame, to show to a person."""
        return cast("Row | None", self._db.execute(
            """SELECT attempt.*, task.frame AS frame
               FROM attempt CROSS JOIN task ON task.id = attempt.task
               WHERE task.job = :job AND attempt.state = 'failed'
               ORDER BY attempt.id DESC LIMIT 1""", {"job": job}).fetchone())

    # --- invariants

    def wrong_counters(self) -> list[int]:
        """Return the jobs whose counters differ from their rows."""
        return [row["id"] for row in self._db.execute(
            """SELECT job.id AS id FROM job
               LEFT JOIN task ON task.job = job.id AND task.slice = 0 GROUP BY job.id
               HAVING queued != COALESCE(SUM(task.state = 'queued'), 0)
                   OR leased != COALESCE(SUM(task.state = 'leased'), 0)
                   OR done != COALESCE(SUM(task.state = 'done'), 0)
                   OR failed != COALESCE(SUM(task.state = 'failed'), 0)
                   OR cancelled != COALESCE(SUM(task.state = 'cancelled'), 0)""")]

    def tasks_out_of_step(self) -> list[int]:
        """Return tasks that are leased without a live attempt, or the other way round."""
        return [row["id"] for row in self._db.execute(
            """SELECT id FROM task WHERE cut IS NULL AND (state = 'leased') != EXISTS (
                 SELECT 1 FROM attempt WHERE attempt.task = task.id AND attempt.state = 'live')""")]

    def parts_out_of_step(self) -> list[int]:
        """Return frames in work whose slices leave a gap, overlap or say another state."""
        return [row["id"] for row in self._db.execute(
            """SELECT frame.id AS id FROM task AS frame JOIN task AS part
                 ON part.parent = frame.id AND part.kind = 'slice'
               WHERE frame.state IN ('queued', 'leased', 'failed') GROUP BY frame.id
               HAVING SUM(part.bottom - part.top) != frame.cut - frame.top
                   OR (frame.state = 'queued' AND SUM(part.state IN ('leased', 'done')) > 0)""")]

    def leases_out_of_step(self) -> list[str]:
        """Return live leases without a live attempt or of a removed worker, and the reverse."""
        return [row["id"] for row in self._db.execute(
            """SELECT lease.id AS id FROM lease JOIN worker ON worker.id = lease.worker
               WHERE (lease.ended IS NULL) != EXISTS (
                   SELECT 1 FROM attempt
                   WHERE attempt.lease = lease.id AND attempt.state = 'live')
               OR (lease.ended IS NULL AND worker.state != 'admitted')""")]

    def done_tasks(self) -> list[Row]:
        """Return every finished task whose file is kept, with its job's name.

        Slices are kept until their frame is put together, passes until it is done,
        or for all frames that share them.
        """
        return self._db.execute(
            """SELECT task.*, job.name AS job_name FROM task JOIN job ON job.id = task.job
               LEFT JOIN task AS frame ON frame.id = task.parent
               WHERE task.state = 'done' AND (COALESCE(frame.state, '') != 'done'
                 OR (task.kind = 'pass' AND job.radiosity = 'animation'))""").fetchall()

    def kept_images(self) -> list[Row]:
        """Return every task of which an image waits to be compared, with attempt and job."""
        return self._db.execute(
            """SELECT task.*, attempt.id AS attempt, job.name AS job_name
               FROM attempt JOIN task ON task.id = attempt.task JOIN job ON job.id = task.job
               WHERE attempt.state = 'kept' AND task.state != 'done'""").fetchall()

    def twice_accepted(self) -> list[int]:
        """Return tasks of which more than one attempt was accepted."""
        return [row["task"] for row in self._db.execute(
            """SELECT task FROM attempt WHERE state = 'done'
               GROUP BY task HAVING COUNT(*) > 1""")]

    def live_blobs(self) -> list[str]:
        """Return the hashes that jobs in work need, and of what scenes wrote."""
        return [row["sha256"] for row in self._db.execute(
            """SELECT manifest_blob.sha256 AS sha256
               FROM job JOIN manifest_blob ON manifest_blob.manifest = job.manifest
               WHERE job.state = 'active' UNION SELECT sha256 FROM written""")]


# === 10. SCHEDULER ===========================================================
# The only writer of states. Every change of a task goes through _move, which
# holds it to TRANSITIONS, counts it, and lets it ripple to the job, in one
# transaction. Knows nothing of HTTP; what it keeps in memory (deadlines,
# progress, who was seen) may be lost with the process without harm.

KEEP_BLOBS = 24 * 3600.0  # seconds that contents nobody names any more are kept
KEEP_EVENTS = 10_000
LOOK_AGAIN = 1.0  # seconds after which an idle worker looks at what others render
RECENT = 8.0  # seconds over which the speed of a task is taken
SICK_PAUSE = 600.0  # seconds until a sick worker gets one task, to see whether it is well
LEAST_FREE = 100 << 20  # bytes without which no job is taken: its images need some


@dataclass(frozen=True)
class Offer:
    """What a worker asks for: up to ``want`` runs at once.

    ``slots`` is how many runs it keeps going at a time, ``idle`` how many of
    its cores have nothing to do. ``job`` is the only one that it takes, 0 for any.
    """

    want: int
    slots: int
    idle: int
    job: int = 0


class Guest(NamedTuple):
    """How a worker of another system differs from ours, beside rendering whole frames only.

    It may be silent for ``silence`` seconds, and renders the jobs that ``takes`` accepts.
    """

    silence: float
    takes: Callable[[Tx, Row], bool]


class Cut(NamedTuple):
    """What became of the task of a lease of which others render the lower rows.

    ``given`` is the task that its worker knows of, ``task`` the slice that it still
    makes of it, down to the row ``bottom``; ``scale`` turns progress in the one
    into progress in the other.
    """

    given: int
    task: int
    bottom: int
    scale: float


class Verdict(NamedTuple):
    """What becomes of the image of a frame that is compared, or looks wrong.

    ``keep`` says why it waits for another worker's, else it is accepted and
    ``doubt`` tells of it; ``odd`` is the worker of whose image two others differ.
    """

    keep: str = ""
    doubt: str = ""
    odd: Row | None = None


class Scheduler:
    """The rules of the farm over a ``Store``; every method is thread-safe.

    ``lease_time`` is how many seconds a lease lives without a beat. It is
    measured by the clock's ``monotonic``, so a jump of the wall clock moves
    nothing; leases found in the database at the start get the full time.
    """

    def __init__(self, store: Store, clock: Clock, lease_time: float = 30.0) -> None:
        self.store = store
        self.clock = clock
        self.lease_time = lease_time
        self._changed = threading.Condition()
        self._version = 0
        self._closed = False
        self._delivery = threading.Lock()
        self._joining = threading.Lock()
        # By task and lease: the last parts of what was given that were rendered, and when each was
        # heard of.
        self._progress: dict[int, dict[str, list[tuple[float, float]]]] = {}
        self._cuts: dict[str, Cut] = {}  # by lease
        self._told: dict[str, int] = {}  # by lease, the row that a beat was answered with
        self._seen: dict[int, float] = {}
        self._slots: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._trials: dict[int, float] = {}  # when sick workers got a task to try, or became sick
        self._deadlines: dict[str, float] = {}
        self._granted: dict[str, float] = {}
        self._owners: dict[str, int] = {}
        self._guests: dict[int, Guest] = {}
        self._missing: dict[int, set[str]] = {}
        self._recall()
        self._seen.update(dict.fromkeys(self._owners.values(), clock.monotonic()))

    # --- jobs

    def submit(self, name: str, owner: str, pov: PovJob, manifest: Manifest,
               options: JobOptions, ticket: str = "") -> tuple[int, list[str]]:
        """Add a job; return its id and the hashes of the files that are missing.

        The same ``ticket`` again, as when an answer was lost, adds no second job.
        Raises ``UserError`` when the command line asks for no frame, when two
        frames would have the same name, or for slices that cannot be, and
        ``NoRoom`` when the disk is as good as full.
        """
        plan = plan_frames(pov.options)
        _check_slices(pov, options)
        options = _check_verify(pov, options)
        tasks = [(frame, PurePosixPath(plan.output_name(frame)).name) for frame in plan.frames]
        if len({file for _, file in tasks}) < len(tasks):
            raise UserError("two frames of this job would have the same file name")
        for _, file in (tasks[0], tasks[-1]):
            safe_join(Path(), file)
            if len(file.encode()) > 200:  # its logs have longer names
                raise UserError(f"the file name {file[:40]}... is too long")
        now = self.clock.time()
        with self._tx() as tx:
            known = tx.meta(f"ticket {ticket}")
            if ticket and known:
                return int(known), tx.missing_blobs(manifest.key)
            tx.add_manifest(manifest)
            job = tx.add_job(name, owner, pov, manifest.key, options, now)
            tx.add_tasks(job, tasks)
            if ticket:
                tx.set_meta(f"ticket {ticket}", str(job))
            tx.add_event(now, "submitted", f"{len(tasks)} frames", job)
            missing = tx.missing_blobs(manifest.key)
            sizes = {file.sha256: file.size for file in manifest.files}
            _check_room(self.store.root, sum(sizes[sha256] for sha256 in missing))
            self._missing[job] = set(missing)
            if not missing:
                self._activate(tx, job)
        self._wake()
        return job, missing

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """Store contents that a job asked for; the last one starts the job.

        ``ProtocolError`` 404 for contents that nobody asked for.
        """
        with self.store.read() as tx:
            if not tx.blob_wanted(sha256):
                raise ProtocolError(404, "no job asked for a file with this hash")
        size = self.store.put_blob(sha256, chunks)
        with self._tx() as tx:
            self._add_blob(tx, sha256, size)
            for job, missing in list(self._missing.items()):
                missing.discard(sha256)
                if not missing:
                    self._activate(tx, job)
        self._wake()

    def pause(self, job: int) -> None:
        """Give out no more of a job; what is being rendered is finished."""
        with self._tx() as tx:
            self._move_job(tx, self._job(tx, job), JobState.PAUSED, PAUSED_BY_HAND)
        self._wake()

    def resume(self, job: int) -> None:
        """Go on with a paused job."""
        with self._tx() as tx:
            row = self._job(tx, job)
            if row["state"] != JobState.PAUSED:
                raise IllegalTransition(f"job {job} is {row['state']}: only a paused job resumes")
            self._start(tx, row)
        self._wake()

    def cancel(self, job: int) -> None:
        """End a job; finished images stay, workers are told to stop."""
        with self._tx() as tx:
            row = self._job(tx, job)
            self._move_job(tx, row, JobState.CANCELLED, "")
            self._cancel_tasks(tx, row)
        self._wake()

    def retry(self, job: int) -> int:
        """Queue the failed and cancelled tasks of a job again; return how many."""
        with self._tx() as tx:
            row = self._job(tx, job)
            failed = [*tx.tasks_in(job, TaskState.FAILED), *tx.tasks_in(job, TaskState.CANCELLED)]
            for frame in failed:
                for task in (*tx.parts(frame["id"]), frame):
                    tx.forget_failures(task["id"])
                    tx.set_tries(task["id"], 0)
                    if task["state"] in (TaskState.FAILED, TaskState.CANCELLED):
                        self._move(tx, task, TaskState.QUEUED, "tried again by hand")
                self._settle_frame(tx, frame["id"], "")
            row = self._job(tx, job)
            if failed and row["state"] != JobState.ACTIVE:
                self._start(tx, row)
        self._wake()
        return len(failed)

    def change(self, job: int, changes: Mapping[str, Any]) -> None:
        """Set any of the ``JobOptions`` of a job."""
        with self._tx() as tx:
            row = self._job(tx, job)
            options = self._options(row).changed(changes)
            _check_slices(pov_of(row["pov"]), options)
            tx.set_job_options(job, _check_verify(pov_of(row["pov"]), options))
            text = ", ".join(f"{name} = {value}" for name, value in changes.items())
            tx.add_event(self.clock.time(), "changed", text, job)
        self._wake()

    def delete(self, job: int) -> None:
        """Forget a job and delete its images and logs."""
        with self._delivery, self._tx() as tx:
            row = self._job(tx, job)
            self._cancel_tasks(tx, row)
            tx.drop_job(job)
            tx.drop_manifests()
            tx.add_event(self.clock.time(), "deleted", row["name"], job)
        self._missing.pop(job, None)
        shutil.rmtree(self.store.job_directory(row["id"], row["name"]), ignore_errors=True)
        self._wake()

    # --- workers

    def join(self, info: WorkerInfo, token: str, address: str, admitted: bool) -> tuple[int, str]:
        """Add a worker whose secret hashes to ``token``; return its id and its code.

        A worker that is not admitted yet is pending until ``admit`` is
        called with its code. The same secret again, as when an answer was lost,
        adds no second worker.
        """
        state = WorkerState.ADMITTED if admitted else WorkerState.PENDING
        code = "".join(secrets.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(6))
        now = self.clock.time()
        with self._tx() as tx:
            known = tx.worker_by_token(token)
            if known is not None:
                if admitted:
                    tx.set_worker_state(known["id"], state)
                return known["id"], known["code"]
            worker = tx.add_worker(info, token, state, code, address, now)
            tx.add_event(now, "joined" if admitted else "asks to join", info.name, worker=worker)
        self._seen[worker] = self.clock.monotonic()
        self._wake()
        return worker, code

    def rejoin(self, worker: int, info: WorkerInfo, address: str) -> None:
        """Take what a known worker says of itself when it comes again."""
        with self._tx() as tx:
            tx.set_worker_info(worker, info, address)
        self._trials[worker] = -math.inf  # perhaps it comes again because it was mended
        self._seen[worker] = self.clock.monotonic()
        self._wake()

    def admit(self, code: str) -> str:
        """Admit the pending worker with this code and return its name."""
        with self._tx() as tx:
            for row in tx.workers():
                if row["state"] == WorkerState.PENDING and hmac.compare_digest(
                        row["code"].encode(), code.strip().upper().encode()):
                    tx.set_worker_state(row["id"], WorkerState.ADMITTED)
                    tx.add_event(self.clock.time(), "admitted", row["name"], worker=row["id"])
                    break
            else:
                raise UserError(f"no worker waits with the code '{code}'")
        self._wake()
        return str(row["name"])

    def remove_worker(self, worker: int) -> None:
        """Take a worker's leases back and forget its secret."""
        with self._tx() as tx:
            row = tx.worker(worker)
            if row is None or not tx.set_worker_state(worker, WorkerState.REMOVED):
                raise UserError(f"there is no worker {worker}")
            self._take_leases(tx, worker, "worker removed")
            tx.add_event(self.clock.time(), "removed", row["name"], worker=worker)
        self._left[worker] = self._left.get(worker, 0) + 1
        self._seen.pop(worker, None)
        self._wake()

    def receive(self, worker: int, guest: Guest) -> None:
        """Treat a worker as one of another system, until the coordinator ends."""
        self._guests[worker] = guest
        for lease, owner in list(self._owners.items()):
            if owner == worker:  # since before the coordinator started
                self._deadlines[lease] = self.clock.monotonic() + self._silence(worker)

    def live_workers(self) -> set[int]:
        """Return the workers that were heard of within the time that a lease lives."""
        now = self.clock.monotonic()
        return {worker for worker, seen in list(self._seen.items())
                if seen >= now - self._silence(worker)}

    def seen(self, worker: int) -> float | None:
        """Return how many seconds ago a worker was heard of, None when never."""
        at = self._seen.get(worker)
        return None if at is None else self.clock.monotonic() - at

    def progress(self, task: int) -> float:
        """Return how much of a task is rendered, 0 to 1, as last heard."""
        return max((self._notes(task, lease)[-1][0]
                    for lease in list(self._progress.get(task, {}))), default=0.0)

    def sickness(self, tx: Tx, worker: Row) -> str:
        """Return what is wrong with a worker's work: wrong pictures, or nothing but failures.

        While all fail nobody is sick: then the scenes are to blame.
        """
        if worker["aside"]:
            return str(worker["aside"])
        sick = self._only_fails(tx, worker["id"]) and self._some_succeed(tx)
        return "its last six tasks failed, and others' did not" if sick else ""

    def _only_fails(self, tx: Tx, worker: int) -> bool:
        return tx.recent_attempts(worker, 6) == ["failed"] * 6

    def _some_succeed(self, tx: Tx) -> bool:
        return any(set(tx.recent_attempts(worker, 6)) - {"failed"}
                   for worker in self.live_workers())

    def waiting_for(self, tx: Tx, job: Row) -> str:
        """Return why workers get no frame of a job that has some, when POV-Ray is the reason."""
        if job["state"] != JobState.ACTIVE or not job["queued"]:
            return ""
        live = self.live_workers()
        unfit = [json.loads(row["engines"]) for row in tx.workers() if row["id"] in live
                 and row["state"] == WorkerState.ADMITTED and not self._fits(job, row)]
        if not unfit:
            return ""
        wanted = job["povray"]
        if wanted == "auto":
            wanted = json.loads(job["engines"]).get("povray", "")
        theirs = {engines.get("povray", "") for engines in unfit} - {wanted}
        return (f"{'1 worker waits' if len(unfit) == 1 else f'{len(unfit)} workers wait'}: this "
                f"job's frames are rendered with POV-Ray {wanted}, theirs is "
                f"{' and '.join(sorted(theirs)) or 'the same with other include files'} "
                f"('povfarm.py set {job['id']} povray=any' lets every worker render)")

    # --- leases

    def lease(self, worker: int, offer: Offer, wait: float,
              alive: Callable[[], bool]) -> list[LeaseSpec]:
        """Give out work: waits up to ``wait`` seconds when there is none.

        ``alive`` tells whether the worker still listens: one that was killed
        while it waited gets nothing.
        """
        end, looked = self.clock.monotonic() + wait, -math.inf
        stays = self._left.get(worker, 0)
        while True:
            with self._changed:
                version = self._version
            if stays != self._left.get(worker, 0) or not alive():
                return []
            now = self._seen[worker] = self.clock.monotonic()
            self._slots[worker] = offer.slots
            # Many may be idle, and are woken by whatever happens: what is under way becomes a
            # straggler, or worth dividing, by the passing of time.
            over = now - looked >= LOOK_AGAIN
            looked = now if over else looked
            leases = self._grant(worker, offer, over, stays)
            if any(lease.tasks[0].kind is TaskKind.SLICE for lease in leases):
                self._tell_cuts()
            left = end - self.clock.monotonic()
            if leases or left <= 0 or self._closed:
                return leases
            self._wait(version, min(left, LOOK_AGAIN if self._deadlines else self.lease_time / 3))

    def beat(self, worker: int, progress: Mapping[str, Mapping[int, float]],
             wait: float) -> tuple[list[str], dict[int, int]]:
        """Keep a worker's leases alive; return those of them that have ended.

        Also the tasks of which others render the lower rows, each with the row
        before which it may end. Answers after ``wait`` seconds, or at once when
        there is such news.
        """
        end = self.clock.monotonic() + min(wait, self.lease_time / 3)
        stays = self._left.get(worker, 0)
        for lease, tasks in progress.items():
            for task, part in tasks.items() if self._owners.get(lease) == worker else ():
                self._note(task, lease, part)
        while True:
            with self._changed:
                version = self._version
            now = self.clock.monotonic()
            if stays == self._left.get(worker, 0):
                self._seen[worker] = now
            ended = []
            for lease in progress:
                if self._owners.get(lease) != worker:
                    ended.append(lease)
                    continue
                self._deadlines[lease] = now + self._silence(worker)
            left = end - now
            cuts = {lease: cut for lease, cut in list(self._cuts.items()) if lease in progress}
            news = [lease for lease, cut in cuts.items() if self._told.get(lease) != cut.bottom]
            if ended or news or left <= 0 or self._closed:
                self._told.update({lease: cut.bottom for lease, cut in cuts.items()})
                return ended, {cut.given: cut.bottom for cut in cuts.values()}
            self._wait(version, left)

    def leave(self, worker: int) -> None:
        """Hand back every lease of a worker that stops; it may come again."""
        self._left[worker] = self._left.get(worker, 0) + 1
        with self._tx() as tx:
            self._take_leases(tx, worker, "worker stopped")
        self._seen.pop(worker, None)
        self._wake()

    def release(self, worker: int, lease: str) -> None:
        """Take back a lease that its worker hands in unfinished."""
        with self._tx() as tx:
            row = tx.lease(lease)
            if row is None or row["worker"] != worker:
                raise StaleLease("this lease is not yours")
            self._end_lease(tx, row, AttemptState.RELEASED, "handed back")
        self._wake()

    def finish(self, worker: int, lease: str, task: int, image: bytes, log_text: bytes,
               cost: Cost, bottom: int = 0, written: Mapping[str, bytes] = {}) -> bool:
        """Accept the image of a task; False when another was accepted before.

        The image is checked whole first: ``ImageError`` when it is not the
        picture that was asked for, and the task stays as it was. A late image
        of a task that is still unfinished is taken. Of a slice comes the strip
        of its rows, which may reach further down, to ``bottom``, when its worker
        rendered on while others began with what is below. ``written`` are the
        files that the scene wrote itself: of each, the last frame's stays.
        """
        with self.store.read() as tx:
            _, row, job = self._attempt(tx, worker, lease, task)
        pov = pov_of(job["pov"])
        if row["kind"] != TaskKind.PASS:
            least = row["bottom"] or pov.options.height
            bottom = bottom or least
            if not least <= bottom <= pov.options.height:
                raise ImageError("the picture does not hold the rows that were asked for")
            check_image(image, pov.options.extension, pov.options.width, bottom - row["top"])
        elif not image:
            raise ImageError("nothing came of what the slices should share")
        with self._delivery:
            accepted = None
            while accepted is None:
                accepted = self._take(worker, lease, task, image, log_text, cost, bottom, written)
        self.join_frames()
        self._wake()
        return accepted

    def _take(self, worker: int, lease: str, task: int, image: bytes, log_text: bytes, cost: Cost,
              bottom: int, written: Mapping[str, bytes]) -> bool | None:
        """Store an image and accept it; None when its task was divided while it was written."""
        with self.store.read() as tx:
            attempt, row, job = self._attempt(tx, worker, lease, task)
            if attempt["state"] == AttemptState.KEPT or cast(Row, tx.worker(worker))["aside"]:
                return False
            verdict, kept = self._judge(tx, job, row, worker, image), tx.kept(row["id"])
            pieces = self._pieces(tx, row, image, pov_of(job["pov"]).options.extension, bottom)
            slices = tx.parts(row["id"], TaskKind.SLICE)  # of which nobody has any more use
        directory = self.store.job_directory(job["id"], job["name"])
        log_name = self.store.put_log(directory, f"{row['name']}.{attempt['id']}.txt", log_text)
        if verdict.keep:
            self.store.put_image(directory / "parts", kept_name(row, attempt["id"]), image)
            pieces, kept = [], []
        for piece, data in pieces:
            self.store.put_image(*place_of(directory, piece), data)
        files = self._put_written(written)
        with self._tx() as tx:
            if any(cast(Row, tx.task(piece["id"]))["bottom"] != piece["bottom"]
                   for piece in (row, *(piece for piece, _ in pieces))):
                return None
            if verdict.keep:
                self._keep(tx, attempt, verdict.keep, log_name, cost)
                accepted = True
            else:
                accepted = self._accept(tx, attempt, pieces, log_name, cost)
                self._conclude(tx, row, verdict)
            for path, (sha256, size) in files.items() if accepted else ():
                self._add_blob(tx, sha256, size)
                tx.add_written(job["id"], path, row["frame"], sha256, size)
        for old in kept:
            (directory / "parts" / kept_name(row, old["id"])).unlink(missing_ok=True)
        for part in slices if accepted else ():
            Path(*place_of(directory, part)).unlink(missing_ok=True)
        for piece, _ in pieces:
            if piece["state_of"]:
                (directory / "parts" / f"{piece['id']}.state").unlink(missing_ok=True)
        return accepted

    def _put_written(self, written: Mapping[str, bytes]) -> dict[str, tuple[str, int]]:
        """Store files that are not stored yet; return hash and size of each."""
        files = {}
        for path, data in written.items():
            sha256 = hashlib.sha256(data).hexdigest()
            if not self.store.blob_path(sha256).is_file():
                self.store.put_blob(sha256, [data])
            files[path] = sha256, len(data)
        return files

    def part_path(self, tx: Tx, task: Row, suffix: str = "") -> Path:
        """Return where the file of a slice or pass is, or the state of a task by its suffix."""
        job = self._job(tx, task["job"])
        directory = self.store.job_directory(job["id"], job["name"])
        place, name = place_of(directory, task)
        return directory / "parts" / f"{task['id']}{suffix}" if suffix else place / name

    def keep_state(self, worker: int, lease: str, task: int, state: bytes) -> None:
        """Keep what a worker that stops leaves of an unfinished task, for others to go on from."""
        with self._delivery:
            with self.store.read() as tx:
                _, row, _ = self._attempt(tx, worker, lease, task)
                engines = cast(Row, tx.worker(worker))["engines"]
                path = self.part_path(tx, row, ".state")
            if row["state"] in (TaskState.LEASED, TaskState.QUEUED):
                self.store.put_image(path.parent, path.name, state)
                with self._tx() as tx:
                    tx.set_state_of(row["id"], json.loads(engines).get("povray", ""))

    def join_frames(self) -> None:
        """Put together every frame of which all slices are there."""
        with self._joining:
            with self.store.read() as tx:
                frames = [(frame, self._job(tx, frame["job"]), tx.parts(frame["id"]))
                          for frame in tx.frames_to_join()]
            for frame, job, parts in frames:
                with contextlib.suppress(NoRoom):  # then it is done as soon as there is room
                    self._join_frame(frame, job, parts)
                    self._wake()

    def fail(self, worker: int, lease: str, task: int, message: str, log_text: bytes,
             scene: bool) -> None:
        """Record a failed try; the task is queued again while tries are left.

        ``scene`` says that the scene itself is wrong: then it is not worth
        more than one try on each worker.
        """
        with self._delivery:
            with self.store.read() as tx:
                attempt, row, job = self._attempt(tx, worker, lease, task)
            directory = self.store.job_directory(job["id"], job["name"])
            log_name = self.store.put_log(directory, f"{row['name']}.{attempt['id']}.txt", log_text)
            with self._tx() as tx:
                tx.set_state_of(row["id"], "")  # perhaps it was the state that was wrong
                self._fail(tx, self._attempt(tx, worker, lease, task), message, log_name, scene)
        self._wake()

    def expire(self) -> None:
        """Take back every lease whose worker has been silent for too long."""
        self.join_frames()  # what was complete when the coordinator was killed
        now = self.clock.monotonic()
        late = [lease for lease, deadline in list(self._deadlines.items()) if deadline < now]
        if not late:
            return
        with self._tx() as tx:
            for lease in late:
                row = tx.lease(lease)
                if row is not None:
                    self._end_lease(tx, row, AttemptState.EXPIRED, "worker silent")
                self._forget_lease(lease)
        self._wake()

    def tidy(self) -> None:
        """Delete contents that nobody names any more, and old events."""
        with self._tx() as tx:
            tx.drop_manifests()
            unused = tx.unused_blobs(self.clock.time() - KEEP_BLOBS)
            for sha256 in unused:
                tx.drop_blob(sha256)
            tx.drop_events(tx.last_event() - KEEP_EVENTS)
        for sha256 in unused:
            with self.store.tx() as tx:  # whoever stores it again looks for the file in a tx too
                if not tx.is_stored(sha256):
                    self.store.blob_path(sha256).unlink(missing_ok=True)

    def look_for_room(self) -> None:
        """Give out nothing while the disk takes nothing, and go on when it does."""
        if self.store.look_for_room():
            self._wake()

    # --- waiting

    def wait_events(self, after: int, wait: float, limit: int) -> list[Row]:
        """Return the first events after an id, waiting up to ``wait`` seconds for one."""
        end = self.clock.monotonic() + wait
        while True:
            with self._changed:
                version = self._version
            with self.store.read() as tx:
                events = tx.events(after, limit)
            left = end - self.clock.monotonic()
            if events or left <= 0 or self._closed:
                return events
            self._wait(version, left)

    def close(self) -> None:
        """Answer everybody who waits, now and from now on."""
        self._closed = True
        self._wake()

    def check_invariants(self) -> list[str]:
        """Return what is wrong with the farm's data, in words: nothing, always."""
        with self.store.read() as tx:
            problems = [f"job {job}: counters differ from its tasks" for job in tx.wrong_counters()]
            problems += [f"task {task}: leased and not in work, or the reverse"
                         for task in tx.tasks_out_of_step()]
            problems += [f"lease {lease}: live and empty, or the reverse"
                         for lease in tx.leases_out_of_step()]
            problems += [f"task {task}: two accepted results" for task in tx.twice_accepted()]
            problems += [f"frame {task}: its slices do not make it up"
                         for task in tx.parts_out_of_step()]
            problems += [f"lease {row['id']}: live and not known to the scheduler"
                         for row in tx.live_leases() if row["id"] not in self._deadlines]
            problems += [f"job {row['id']}: {row['state']} does not fit its tasks"
                         for row in tx.jobs(0, -1) if self._state(row) != row["state"]]
            blobs, stored = tx.live_blobs(), set(tx.stored_blobs())
            done = tx.done_tasks()
        problems += [f"blob {sha256}: needed and not stored" for sha256 in blobs
                     if sha256 not in stored or not self.store.blob_path(sha256).is_file()]
        for row in done:
            directory = self.store.job_directory(row["job"], row["job_name"])
            place, name = place_of(directory, row)
            path = place / name
            if path.parent != place or not path.is_file() or sha256_file(path) != row["sha256"]:
                problems.append(f"task {row['id']}: {path} is missing or not what was accepted")
        return problems

    # --- inside

    @contextlib.contextmanager
    def _tx(self) -> Iterator[Tx]:
        """A transaction; when it fails, what was noted in memory did not happen either."""
        try:
            with self.store.tx() as tx:
                yield tx
        except BaseException:
            self._recall()
            raise

    def _recall(self) -> None:
        """Learn from the database which leases live and which files are missing."""
        now = self.clock.monotonic()
        with self.store.tx() as tx:  # not read(): no lease may be given in between
            leases = {row["id"]: row["worker"] for row in tx.live_leases()}
            self._missing = {
                job["id"]: set(tx.missing_blobs(job["manifest"])) for job in tx.waiting_jobs()
            }
            self._deadlines = {lease: self._deadlines.get(lease, now + self._silence(worker))
                               for lease, worker in leases.items()}
            self._granted = {lease: self._granted.get(lease, now) for lease in leases}
            self._owners = leases
            self._told = {lease: row for lease, row in self._told.items() if lease in leases}
            self._recall_cuts(tx)

    def _tell_cuts(self) -> None:
        """Let beats tell whose rows were given to others: only when that is in the database."""
        before = self._cuts
        with self.store.tx() as tx:
            self._recall_cuts(tx)
        if self._cuts != before:
            self._wake()

    def _recall_cuts(self, tx: Tx) -> None:
        """Learn from the database of which tasks under way others render the lower rows."""
        cuts = {}
        for row in tx.cut_attempts():
            options = pov_of(row["pov"]).options
            region = region_of(options)
            before, now = (min(bottom, region.bottom) - max(row["top"], region.top)
                           for bottom in (row["given"] or options.height, row["bottom"]))
            given = row["id"] if row["given"] else row["parent"]
            cuts[row["lease"]] = Cut(given, row["id"], row["bottom"], before / now)
        with self._changed:  # no progress is noted in between
            for lease, cut in cuts.items():
                notes = self._progress.get(cut.given, {}).pop(lease, None)
                if notes:
                    self._progress.setdefault(cut.task, {})[lease] = notes
            self._cuts = cuts

    def _wake(self) -> None:
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def _wait(self, version: int, seconds: float) -> None:
        with self._changed:
            if self._version == version:
                self.clock.wait(self._changed, seconds)

    def _job(self, tx: Tx, job: int) -> Row:
        row = tx.job(job)
        if row is None:
            raise ProtocolError(404, f"there is no job {job}")
        return row

    def _options(self, job: Row) -> JobOptions:
        options = {name: job[name] for name in vars(JobOptions())}
        return JobOptions(**{**options, "in_order": bool(job["in_order"])})

    def _attempt(self, tx: Tx, worker: int, lease: str, task: int) -> tuple[Row, Row, Row]:
        attempt = tx.attempt(task, lease)
        if attempt is None or attempt["worker"] != worker:
            raise StaleLease("this task is not in a lease of yours")
        row = tx.task(attempt["task"])  # of a frame that was divided since, the first slice
        assert row is not None  # the attempt's foreign key
        return attempt, row, self._job(tx, row["job"])

    def _add_blob(self, tx: Tx, sha256: str, size: int) -> None:
        if not self.store.blob_path(sha256).is_file():
            raise ProtocolError(503, "the file was tidied away just now: send it again")
        tx.add_blob(sha256, size, self.clock.time())

    def _start(self, tx: Tx, job: Row) -> None:
        """Make a job active, or let it wait for its files."""
        missing = tx.missing_blobs(job["manifest"])
        if missing:
            self._missing[job["id"]] = set(missing)
        self._move_job(tx, job, JobState.WAITING if missing else JobState.ACTIVE, "")

    def _activate(self, tx: Tx, job: int) -> None:
        row = tx.job(job)
        if row is not None and row["state"] == JobState.WAITING:
            self._move_job(tx, row, JobState.ACTIVE, "")
        self._missing.pop(job, None)

    def _move(self, tx: Tx, task: Row, to: TaskState, why: str) -> None:
        frm = TaskState(task["state"])
        if (frm, to) not in TRANSITIONS or not tx.set_task_state(task["id"], frm, to):
            raise IllegalTransition(
                f"frame {task['frame']} cannot go from {frm.value} to {to.value}")
        part = f"{task['kind']} " if task["parent"] else ""
        tx.add_event(self.clock.time(), part + to.value, why, task["job"], task["frame"])
        if to is not TaskState.LEASED:
            self._progress.pop(task["id"], None)
        if task["parent"]:
            self._settle_frame(tx, task["parent"], why)
            return
        tx.count_task(task["job"], frm, to)
        if to is not TaskState.LEASED:
            self._settle(tx, task["job"], to is TaskState.FAILED)

    def _settle_frame(self, tx: Tx, frame: int, why: str) -> None:
        row = cast(Row, tx.task(frame))
        slices = tx.slice_states(frame)
        frm = TaskState(row["state"])
        to = frame_state(slices, frm)
        if not slices or frm is TaskState.DONE or to is frm:
            return
        self._move(tx, row, to, why)
        if to in (TaskState.FAILED, TaskState.CANCELLED):
            self._cancel_parts(tx, row)

    def _cancel_parts(self, tx: Tx, frame: Row) -> None:
        """End what is under way of a frame that is settled otherwise."""
        for part in tx.parts(frame["id"]):
            for attempt in tx.live_attempts_of_task(part["id"]):
                self._end_attempt(tx, attempt, AttemptState.LOST, "the frame is settled", "")
            if part["state"] in (TaskState.QUEUED, TaskState.LEASED):
                self._move(tx, part, TaskState.CANCELLED, "the frame is settled")

    def _move_job(self, tx: Tx, job: Row, to: JobState, reason: str) -> None:
        frm = JobState(job["state"])
        now = self.clock.time()
        finished = now if to in FINISHED else None
        if (frm, to) not in JOB_TRANSITIONS or not tx.set_job_state(
                job["id"], frm, to, reason, finished):
            raise IllegalTransition(f"job {job['id']} is {frm.value}: it cannot become {to.value}")
        tx.add_event(now, f"job {to.value}", reason, job["id"])

    def _settle(self, tx: Tx, job: int, after_failure: bool) -> None:
        row = self._job(tx, job)
        frm = JobState(row["state"])
        to, reason = self._state(row), ""
        if to is frm is JobState.ACTIVE and after_failure:
            reason = pause_reason(row["done"], row["failed"])
            to = JobState.PAUSED if reason else to
        if to is not frm and frm is not JobState.CANCELLED:
            self._move_job(tx, row, to, reason)

    def _state(self, job: Row) -> JobState:
        return job_state(JobState(job["state"]), {state: job[state.value] for state in TaskState})

    def _cancel_tasks(self, tx: Tx, job: Row) -> None:
        for lease in tx.live_leases():
            if lease["job"] == job["id"]:
                self._end_lease(tx, lease, AttemptState.RELEASED, "job cancelled",
                                TaskState.CANCELLED)
        for frame in tx.frames_to_cut(job["id"]):
            self._move(tx, frame, TaskState.CANCELLED, "job cancelled")
            self._cancel_parts(tx, frame)
        for task in tx.tasks_in(job["id"], TaskState.QUEUED):
            self._move(tx, task, TaskState.CANCELLED, "job cancelled")

    def _pieces(self, tx: Tx, row: Row, image: bytes, extension: str,
                bottom: int) -> list[tuple[Row, bytes]]:
        """Return the unfinished tasks that an image settles, each with its own rows of it."""
        wanted = [row]
        if row["kind"] == TaskKind.SLICE and bottom > row["bottom"]:
            wanted += [part for part in tx.parts(row["parent"], TaskKind.SLICE)
                       if row["top"] < part["top"] and part["bottom"] <= bottom]
        pieces = []
        for part in wanted:
            if part["state"] in (TaskState.DONE, TaskState.CANCELLED):
                continue
            data = image
            if part["kind"] == TaskKind.SLICE and (
                    part["top"] > row["top"] or part["bottom"] < bottom):
                data = crop_rows(image, extension, part["top"] - row["top"],
                                 part["bottom"] - part["top"])
            pieces.append((part, data))
        return pieces

    def _judge(self, tx: Tx, job: Row, task: Row, worker: int, image: bytes) -> Verdict:
        """Say whether the image of a frame is to be accepted at once."""
        if (task["kind"] != TaskKind.FRAME or task["cut"] is not None or job["in_order"]
                or task["state"] not in (TaskState.QUEUED, TaskState.LEASED)):
            return Verdict()
        kept = tx.kept(task["id"])
        directory = self.store.job_directory(job["id"], job["name"])
        extension = PurePosixPath(task["name"]).suffix
        if not is_chosen(job["id"], task["frame"], job["verify"]):
            near = [directory / row["name"] for row in tx.neighbours(job["id"], task["frame"])]
            odd = (near and not kept and is_black(image, extension)
                   and not any(is_black(path.read_bytes(), extension) for path in near
                               if path.is_file()))  # a person may have deleted it
            return Verdict(keep="black, unlike its neighbours: rendered once more" if odd else "")
        done = {row["worker"] for row in kept}
        others = self._helpers(tx, job) - {worker} - done
        if not kept:
            return (Verdict(keep="rendered, and waits for another worker to check it") if others
                    else Verdict(doubt="not verified: there is no other worker"))
        same = [same_pixels((directory / "parts" / kept_name(task, row["id"])).read_bytes(), image,
                            extension) for row in kept]
        if not any(same):
            return (Verdict(keep="two workers made different pictures: a third decides")
                    if others and len(done) < 2 else
                    Verdict(doubt="not verified: all its pictures differ, and the last was taken"))
        if done == {worker}:
            return (Verdict(keep="rendered, and waits for another worker to check it") if others
                    else Verdict(doubt="not verified: one worker rendered it twice"))
        odd_ones = [row for row, alike in zip(kept, same) if not alike]
        return Verdict(odd=odd_ones[0] if odd_ones else None)

    def _keep(self, tx: Tx, attempt: Row, why: str, log_name: str, cost: Cost) -> None:
        """Let another worker render a frame whose image is kept beside the finished ones."""
        task = cast(Row, tx.task(attempt["task"]))
        tx.add_job_cost(task["job"], cost)
        self._end_attempt(tx, attempt, AttemptState.KEPT, why, log_name)
        if task["state"] == TaskState.LEASED and not tx.live_attempts_of_task(task["id"]):
            self._move(tx, task, TaskState.QUEUED, why)

    def _conclude(self, tx: Tx, task: Row, verdict: Verdict) -> None:
        """Tell of a doubt, and set the worker aside whose picture is the odd one."""
        now = self.clock.time()
        if verdict.doubt:
            tx.add_event(now, "doubtful", verdict.doubt, task["job"], task["frame"])
        if verdict.odd is None:
            return
        worker = verdict.odd["worker"]
        tx.set_aside(worker, f"its picture of frame {task['frame']} of job {task['job']} differs "
                             "from that of two others")
        tx.add_event(now, "set aside", f"{verdict.odd['worker_name']} made another picture of "
                     f"frame {task['frame']} than two others: look at its other frames of this job",
                     task["job"], worker=worker)
        self._take_leases(tx, worker, "worker set aside")

    def _accept(self, tx: Tx, attempt: Row, pieces: Sequence[tuple[Row, bytes]], log_name: str,
                cost: Cost) -> bool:
        accepted = False
        for piece, data in pieces:
            task = tx.task(piece["id"])
            if task is None or task["state"] in (TaskState.DONE, TaskState.CANCELLED):
                continue
            mine = task["id"] == attempt["task"]
            spent = cost if mine else Cost()
            tx.set_task_result(task["id"], attempt["worker"], hashlib.sha256(data).hexdigest(),
                               len(data), spent, self.clock.time())
            tx.add_job_cost(task["job"], spent)
            if mine:
                accepted = True
                self._end_attempt(tx, attempt, AttemptState.DONE, "", log_name)
            for other in tx.live_attempts_of_task(task["id"]):
                self._end_attempt(tx, other, AttemptState.LOST, "another was first", "")
            self._move(tx, task, TaskState.DONE, "")
            self._cancel_parts(tx, task)
        if not accepted and attempt["state"] == AttemptState.LIVE:
            self._end_attempt(tx, attempt, AttemptState.LOST, "another was first", log_name)
        return accepted

    def _join_frame(self, frame: Row, job: Row, parts: Sequence[Row]) -> None:
        directory = self.store.job_directory(job["id"], job["name"])
        slices = [part for part in parts if part["kind"] == TaskKind.SLICE]
        places = [Path(*place_of(directory, part)) for part in slices]
        extension = pov_of(job["pov"]).options.extension
        try:
            image, problem = join_rows([place.read_bytes() for place in places], extension), ""
        except (OSError, ImageError) as error:
            image, problem = b"", f"the slices could not be put together: {error}"
        with self._delivery:  # meanwhile all of it may have come in one piece, or the job be gone
            with self.store.read() as tx:
                if not _is_open(tx.task(frame["id"])):
                    return
            if image:
                self.store.put_image(*place_of(directory, frame), image)
            with self._tx() as tx:
                row = tx.task(frame["id"])
                if row is None or not _is_open(row):
                    return
                if problem:  # then `retry` renders all of it again
                    tx.drop_parts(frame["id"])
                    if row["state"] != TaskState.FAILED:
                        self._move(tx, row, TaskState.FAILED, problem)
                else:
                    self._joined(tx, row, parts, image)
        for place in places:
            place.unlink(missing_ok=True)

    def _joined(self, tx: Tx, frame: Row, parts: Sequence[Row], image: bytes) -> None:
        # A pass that failed has cost nothing that is known.
        cost = Cost(sum(part["cpu"] or 0.0 for part in parts),
                    sum(part["wall"] or 0.0 for part in parts),
                    max(part["memory"] or 0 for part in parts))
        slices = [part for part in parts if part["kind"] == TaskKind.SLICE]
        last = max(slices, key=operator.itemgetter("finished"))
        tx.set_task_result(frame["id"], last["worker"], hashlib.sha256(image).hexdigest(),
                           len(image), cost, self.clock.time())
        self._move(tx, frame, TaskState.DONE, f"put together from {len(slices)} slices")

    def _fail(self, tx: Tx, tried: tuple[Row, Row, Row], message: str, log_name: str,
              scene: bool) -> None:
        attempt, row, job = tried
        if attempt["state"] != AttemptState.LIVE:
            return
        self._end_attempt(tx, attempt, AttemptState.FAILED, message, log_name)
        if row["state"] == TaskState.LEASED and not tx.live_attempts_of_task(row["id"]):
            tx.set_tries(row["id"], row["tries"] + 1)
            used_up = self._used_up(tx, row, job, scene)
            self._move(tx, row, TaskState.FAILED if used_up else TaskState.QUEUED, message)

    def _end_attempt(self, tx: Tx, attempt: Row, state: AttemptState, message: str,
                     log_name: str) -> None:
        tx.end_attempt(attempt["id"], state, self.clock.time(), message, log_name)
        self._progress.get(attempt["task"], {}).pop(attempt["lease"], None)
        if not tx.live_attempts_of_lease(attempt["lease"]):
            tx.end_lease(attempt["lease"], "finished", self.clock.time())
            self._forget_lease(attempt["lease"])

    def _end_lease(self, tx: Tx, lease: Row, state: AttemptState, why: str,
                   to: TaskState = TaskState.QUEUED) -> None:
        for attempt in tx.live_attempts_of_lease(lease["id"]):
            tx.end_attempt(attempt["id"], state, self.clock.time(), why)
            self._progress.get(attempt["task"], {}).pop(lease["id"], None)
            task = tx.task(attempt["task"])
            if (task is not None and task["state"] == TaskState.LEASED
                    and not tx.live_attempts_of_task(task["id"])):
                self._move(tx, task, to, why)
        tx.end_lease(lease["id"], why, self.clock.time())
        self._forget_lease(lease["id"])

    def _take_leases(self, tx: Tx, worker: int, why: str) -> None:
        for lease in tx.live_leases():
            if lease["worker"] == worker:
                self._end_lease(tx, lease, AttemptState.RELEASED, why)

    def _forget_lease(self, lease: str) -> None:
        self._deadlines.pop(lease, None)
        self._granted.pop(lease, None)
        self._owners.pop(lease, None)
        self._told.pop(lease, None)

    def _used_up(self, tx: Tx, task: Row, job: Row, scene: bool) -> bool:
        failed = tx.failed_workers(task["id"])
        if scene:
            helpers = self._helpers(tx, job, bool(task["parent"]))
            return len(failed) >= job["retry_limit"] or not helpers - failed
        return bool(task["tries"] + 1 >= job["retry_limit"])

    def _silence(self, worker: int) -> float:
        """Return the seconds without a beat after which a worker's leases run out."""
        guest = self._guests.get(worker)
        return self.lease_time if guest is None else max(guest.silence, self.lease_time)

    def _grant(self, worker: int, offer: Offer, over: bool, stays: int) -> list[LeaseSpec]:
        """Give out what is queued, or else, when that is to be looked ``over``, what is leased."""
        leases: list[LeaseSpec] = []
        with self.store.read() as tx:
            if self.store.notice or not any(over or job["queued"] or tx.has_rows(job["id"])
                                            for job in tx.leasable_jobs()):
                return leases
        with self._tx() as tx:
            row = tx.worker(worker)
            # Who leaves after this look hands back what it is given.
            if (row is None or row["state"] != WorkerState.ADMITTED or row["aside"]
                    or stays != self._left.get(worker, 0)):
                return leases
            if self.sickness(tx, row):
                return self._try_sick(tx, row, offer)
            self._trials.pop(worker, None)
            while len(leases) < offer.want:
                idle = offer.idle - sum(lease.threads for lease in leases)
                lease = self._grant_one(tx, row, replace(offer, idle=idle))
                if lease is None:
                    break
                leases.append(lease)
        return leases

    def _try_sick(self, tx: Tx, worker: Row, offer: Offer) -> list[LeaseSpec]:
        """Give a sick worker one task now and then: when it succeeds, it is well."""
        now = self.clock.monotonic()
        if now - self._trials.setdefault(worker["id"], now) < SICK_PAUSE:
            return []
        lease = self._grant_one(tx, worker, offer, sick=True)
        if lease is None:
            return []
        self._trials[worker["id"]] = now
        return [lease]

    def _grant_one(self, tx: Tx, row: Row, offer: Offer, sick: bool = False) -> LeaseSpec | None:
        worker = row["id"]
        jobs = [job for job in tx.leasable_jobs() if offer.job in (0, job["id"])
                and self._suits(tx, job, row) and self._may_work(tx, job, worker, sick)]
        waves: Sequence[Sequence[Picker]] = (
            (self._take_back, self._split_early, self._pick), (self._split,),
            (self._pick_straggler,))
        if worker in self._guests:
            waves = ((self._pick_whole,), (self._pick_straggler,))
        for wave in waves:
            for job, pick in itertools.product(jobs, wave):
                tasks = pick(tx, job, worker, offer)
                if tasks:
                    return self._give(tx, job, row, tasks[:1] if sick else tasks, offer.idle)
        return None

    def _has_begun(self, job: Row) -> bool:
        """Tell whether something is there of what the worker rendered that began a job."""
        return bool(job["done"] or job["leased"] or job["verify"])  # of which one may be kept

    def _fits(self, job: Row, worker: Row) -> bool:
        return _engine_fits(job["povray"], job["engines"] if self._has_begun(job) else "{}",
                            worker["engines"])

    def _suits(self, tx: Tx, job: Row, worker: Row) -> bool:
        guest = self._guests.get(worker["id"])
        return (guest is None or guest.takes(tx, job)) and self._fits(job, worker)

    def _may_work(self, tx: Tx, job: Row, worker: int, sick: bool) -> bool:
        if job["max_workers"]:
            workers = tx.job_workers(job["id"]) - {worker}
            if len(workers) >= job["max_workers"]:
                return False
        if job["in_order"] and job["leased"]:
            return False
        # One pass has all cores of a worker, and one slice that the farm has cut by itself; the
        # next may begin when it is nearly done.
        alone = (TaskKind.PASS, TaskKind.SLICE)[:1 + (job["slices"] == "auto")]
        parts = [attempt for attempt in tx.live_attempts_at_parts(job["id"])
                 if attempt["worker"] == worker]
        mine = [self._left_of(attempt) for attempt in parts if attempt["kind"] in alone]
        if len(mine) > 1 or any(left > 2 * START for left in mine):
            return False
        if job["slices"].isdecimal() and parts:  # a fair share: others come in a moment
            slices = int(job["slices"]) * (job["queued"] + job["leased"])
            if len(parts) >= slices / len(self._helpers(tx, job, True)):
                return False
        return (sick or not self._is_hopeless(tx, job, worker)
                or worker in self._helpers(tx, job))

    def _is_hopeless(self, tx: Tx, job: Row, worker: int) -> bool:
        return tx.failures(job["id"], worker) >= 3 and not tx.has_done(job["id"], worker)

    def _helpers(self, tx: Tx, job: Row, part: bool = False) -> set[int]:
        """Return the workers that a frame of a job may wait for, or ``part`` of a frame.

        Those that fail all of the job count when there are no others: then
        the scene is to blame, and the job has to find that out.
        """
        live, some_succeed = self.live_workers(), self._some_succeed(tx)
        well = {row["id"] for row in tx.workers()
                if row["id"] in live and row["state"] == WorkerState.ADMITTED
                and not row["aside"] and self._suits(tx, job, row)
                and not (part and row["id"] in self._guests)
                and not (some_succeed and self._only_fails(tx, row["id"]))}
        return {worker for worker in well if not self._is_hopeless(tx, job, worker)} or well

    def _pick(self, tx: Tx, job: Row, worker: int, offer: Offer) -> list[Row]:
        """Find what is queued: all of a job in order, a slice or pass, or neighbouring frames."""
        if job["in_order"]:
            queued = tx.tasks_in(job["id"], TaskState.QUEUED)
            failed = tx.failed_workers(queued[0]["id"]) if queued else set()
            return [] if worker in failed and self._helpers(tx, job) - failed else queued
        part = self._pick_part(tx, job, worker)
        if part is not None:
            return [part]
        return self._pick_frames(tx, job, worker, offer) if self._may_begin(tx, job) else []

    def _pick_whole(self, tx: Tx, job: Row, worker: int, offer: Offer) -> list[Row]:
        """Find frames for a guest, unless others had better slice them."""
        sliced = not unsliceable(pov_of(job["pov"]), False) and self._wants_slices(tx, job)
        tasks = [] if sliced else self._pick_frames(tx, job, worker, offer)
        # It fails with all frames at once: those of which one is bad are tried one by one.
        return list(itertools.takewhile(lambda task: not task["tries"], tasks)) or tasks[:1]

    def _pick_frames(self, tx: Tx, job: Row, worker: int, offer: Offer) -> list[Row]:
        """Find queued neighbours, for one run."""
        others = self.live_workers() - {worker}
        slots = offer.slots + sum(self._slots.get(other, 1) for other in others)
        size = lease_size(job["queued"], slots, _mean_cost(job), job["runs"])
        tasks = tx.next_tasks(job["id"], worker, size)
        if not tasks and job["queued"]:
            return [task for task in tx.tasks_in(job["id"], TaskState.QUEUED)
                    if task["cut"] is None and self._may_try(tx, job, worker, task)][:1]
        step = plan_frames(pov_of(job["pov"]).options).frames.step
        for index in range(1, len(tasks)):
            if tasks[index]["frame"] != tasks[index - 1]["frame"] + step:
                return tasks[:index]
        return tasks

    def _may_try(self, tx: Tx, job: Row, worker: int, task: Row) -> bool:
        """What a worker failed or had its turn at goes back to it only when nobody else is left."""
        done = tx.failed_workers(task["id"]) | {row["worker"] for row in tx.kept(task["id"])}
        helpers = self._helpers(tx, job, bool(task["parent"]))
        return worker not in done or not helpers - done - {worker}

    def _pick_part(self, tx: Tx, job: Row, worker: int) -> Row | None:
        """Find a slice or a pass for a worker, or cut one off a frame."""
        if unsliceable(pov_of(job["pov"]), bool(job["in_order"])):
            return None
        if job["radiosity"] == "animation" and self._shared(job):
            first = self._first(tx, job)
            if not tx.parts(first["id"], TaskKind.PASS):
                self._add_passes(tx, job, first)
        for part in tx.queued_parts(job["id"]):
            if self._is_ready(tx, part) and self._may_try(tx, job, worker, part):
                return part
        for frame in tx.frames_to_cut(job["id"]):
            if frame["cut"] < frame["bottom"] and self._is_ready(tx, frame):
                return self._cut(tx, job, worker, frame)
        if self._wants_slices(tx, job) and self._may_begin(tx, job):
            for frame in tx.next_tasks(job["id"], worker, 1):
                if not frame["state_of"]:  # what is begun is gone on with, and divided if it drags
                    return self._begin_slices(tx, job, worker, frame)
        return None

    def _may_begin(self, tx: Tx, job: Row) -> bool:
        """Tell whether what all frames share is there."""
        return job["radiosity"] != "animation" or self._is_ready(tx, self._first(tx, job))

    def _is_ready(self, tx: Tx, task: Row) -> bool:
        """Tell whether the pass of a task's frame, if it has one, is over; for good or ill."""
        return task["kind"] == TaskKind.PASS or not any(
            part["state"] in (TaskState.QUEUED, TaskState.LEASED)
            for part in tx.parts(task["parent"] or task["id"], TaskKind.PASS))

    def _first(self, tx: Tx, job: Row) -> Row:
        return tx.tasks(job["id"], limit=1)[0]

    def _shared(self, job: Row) -> frozenset[str]:
        """Return what the runs of a job share that passes render first."""
        pov = pov_of(job["pov"])
        shared = sharable(pov.uses, pov.values)
        if job["radiosity"] == "animation":
            return shared & {"radiosity"}  # photons may move from frame to frame
        return shared if job["radiosity"] == "share" else shared - {"radiosity"}

    def _add_passes(self, tx: Tx, job: Row, frame: Row) -> None:
        region = region_of(pov_of(job["pov"]).options)
        for top, bottom in pass_rows(region, self._shared(job), len(self._helpers(tx, job, True))):
            tx.add_part(frame, TaskKind.PASS, top, bottom)

    def _wants_slices(self, tx: Tx, job: Row) -> bool:
        """Tell whether the next whole frame should be sliced at once.

        By itself only where there are fewer frames than workers, and where a
        frame is not small or known to cost less than cutting it up is worth.
        """
        if job["slices"] != "auto":
            return bool(job["slices"] not in ("off", "1"))
        region, cost = region_of(pov_of(job["pov"]).options), _mean_cost(job)
        cheap = cost is not None and cost.wall < 8 * START
        small = region.bottom - region.top <= max(8 * GRAIN, region.block)
        few = job["queued"] < len(self.live_workers())  # soon found out, and mostly enough
        return few and not (cheap or small) and job["queued"] < len(self._helpers(tx, job, True))

    def _begin_slices(self, tx: Tx, job: Row, worker: int, frame: Row) -> Row:
        height = pov_of(job["pov"]).options.height
        tx.set_cut(frame["id"], 0, height)
        if job["radiosity"] != "animation" and self._shared(job):
            self._add_passes(tx, job, frame)
            return tx.parts(frame["id"])[0]
        return self._cut(tx, job, worker, cast(Row, tx.task(frame["id"])))

    def _speeds(self, tx: Tx, job: Row) -> tuple[dict[int, float], SliceCost | None]:
        """Return rows a second by worker, and what a row and a slice cost on average.

        By cores where nothing is measured yet, and then only worth comparing.
        """
        costs = tx.slice_costs(job["id"])
        cores = {row["id"]: row["cores"] for row in tx.workers()}
        speeds = {row["worker"]: row["rows"] / max(row["wall"], 0.01) for row in costs
                  if row["worker"] in cores}
        known = sum(cores[worker] for worker in speeds)
        per_core = sum(speeds.values()) / known if known else 1.0
        guesses = {worker: speeds.get(worker, per_core * cores[worker]) for worker in cores}
        if not speeds:
            return guesses, None
        # A slice whose first rows are cheap looks as if it had been parsed for long.
        parse = sorted(row["parse"] or 0.0 for row in costs)[len(costs) // 2]
        return guesses, SliceCost(len(speeds) / max(sum(speeds.values()), 1e-6), parse)

    def _cut(self, tx: Tx, job: Row, worker: int, frame: Row) -> Row:
        """Cut the next slice off a frame."""
        speeds, cost = self._speeds(tx, job)
        here = self._helpers(tx, job, True) | {worker}
        share = speeds[worker] / max(sum(speeds[helper] for helper in here), 1e-6)
        if cost is not None:
            cost = cost._replace(row=1 / max(speeds[worker], 1e-6))
        bottom = next_cut(frame["cut"], frame["bottom"], region_of(pov_of(job["pov"]).options),
                          job["slices"], share, cost)
        tx.set_cut(frame["id"], bottom, frame["bottom"])
        return tx.add_part(frame, TaskKind.SLICE, frame["cut"], bottom)

    def _note(self, given: int, lease: str, part: float) -> None:
        with self._changed:
            cut = self._cuts.get(lease)
            task = cut.task if cut and cut.given == given else given
            notes = self._progress.setdefault(task, {}).setdefault(lease, [])
            now = self.clock.monotonic()
            if not notes or notes[-1][0] != part:
                notes.append((part, now))
                while len(notes) > 2 and notes[1][1] < now - RECENT:
                    notes.pop(0)

    def _notes(self, task: int, lease: str) -> list[tuple[float, float]]:
        """Return which parts of a task were rendered as was heard of a lease, and when."""
        notes = list(self._progress.get(task, {}).get(lease, [])) or [(0.0, 0.0)]
        cut = self._cuts.get(lease)
        scale = cut.scale if cut and cut.task == task else 1.0
        return [(min(part * scale, 1.0), heard) for part, heard in notes]

    def _left_of(self, attempt: Row, speeds: Mapping[int, float] = {},
                 cost: SliceCost | None = None) -> float:
        """Return the seconds that an attempt will still take as it looks.

        Before any of it was heard, a slice takes as long as others did, with ``speeds`` in rows
        a second by worker and their ``cost``; for ever when that is over or not known.
        """
        notes = self._notes(attempt["task"], attempt["lease"])
        part, heard = notes[-1]
        # Rows are rather like those just above them than like all of the picture.
        before, then = notes[0] if len(notes) > 1 else (
            0.0, self._granted.get(attempt["lease"], heard) + START)
        if part <= before:
            if attempt["kind"] != TaskKind.SLICE or cost is None:
                return math.inf
            rows = (attempt["bottom"] - attempt["top"]) / max(speeds[attempt["worker"]], 1e-6)
            left = then + rows + cost.parse - self.clock.monotonic()
            return left if left > 0 else math.inf
        # POV-Ray tells of whole blocks, rows of them at once where they are short. One that takes
        # longer than those before it is dearer, and so may be what comes below it.
        step = (part - before) / max(len(notes) - 1, 1)
        spent = self.clock.monotonic() - heard
        usual = max(heard - then, 0.0) * step / (part - before)
        return max(max(usual, spent) * (1 - part) / step - spent, 0.0)

    def _take_back(self, tx: Tx, job: Row, worker: int, offer: Offer) -> list[Row]:
        """Take a slice from a worker that got it ahead of time, and is held up by another."""
        if not offer.idle or job["slices"] != "auto":
            return []
        attempts = [attempt for attempt in tx.live_attempts_at_parts(job["id"])
                    if attempt["kind"] == TaskKind.SLICE and attempt["worker"] != worker]
        held_up = {attempt["worker"] for attempt in attempts
                   if 3 * START < self._left_of(attempt) < math.inf}
        for attempt in attempts:
            if attempt["worker"] in held_up and not self.progress(attempt["task"]):
                lease = cast(Row, tx.lease(attempt["lease"]))
                self._end_lease(tx, lease, AttemptState.RELEASED, "given to an idle worker")
                self._wake()  # its beat
                return [cast(Row, tx.task(attempt["task"]))]
        return []

    def _split_early(self, tx: Tx, job: Row, worker: int, offer: Offer) -> list[Row]:
        """Divide a task that looks as if it would outlast all the rows that are not cut yet."""
        rows: int = sum(frame["bottom"] - frame["cut"] for frame in tx.frames_to_cut(job["id"]))
        if not rows or job["queued"]:
            return []
        here, (speeds, _) = self._helpers(tx, job, True) | {worker}, self._speeds(tx, job)
        lefts = [left for left in map(self._left_of, tx.live_attempts_of_job(job["id"]))
                 if left < math.inf]
        rest = rows / max(sum(speeds[worker] for worker in here), 1e-6) + sum(lefts) / len(here)
        return self._split(tx, job, worker, offer, 1.2 * rest, 8)

    def _split(self, tx: Tx, job: Row, worker: int, offer: Offer, least: float = 0.0,
               worth: int = 3) -> list[Row]:
        """Divide what is unrendered of the task that will take longest.

        It takes more than ``least`` seconds, and ``worth`` times what dividing it costs.
        """
        pov = pov_of(job["pov"])
        if (job["slices"] != "auto" or unsliceable(pov, bool(job["in_order"]))
                or "radiosity" in pov.uses):  # a render with radiosity cannot be stopped midway
            return []
        speeds, cost = self._speeds(tx, job)
        overhead = START + (cost.parse if cost else 1.0)
        attempts = tx.live_attempts_of_job(job["id"])
        mine = {attempt["task"] for attempt in attempts if attempt["worker"] == worker}
        counts = collections.Counter(attempt[key] for attempt in attempts
                                     for key in ("task", "lease"))
        soonest: dict[int, tuple[float, Row]] = {}  # by task: who will be the first to end it
        for attempt in attempts:
            alone = counts[attempt["task"]] == counts[attempt["lease"]] == 1
            if attempt["task"] not in mine and (
                    attempt["kind"] == TaskKind.SLICE
                    or (attempt["kind"] == TaskKind.FRAME and alone and not self._shared(job))):
                left = self._left_of(attempt, speeds, cost), attempt
                soonest[attempt["task"]] = min(
                    left, soonest.get(attempt["task"], left), key=operator.itemgetter(0))
        lefts = [left for left in soonest.values() if left[0] < math.inf]
        worst, found = max(lefts, key=operator.itemgetter(0), default=(0.0, None))
        if found is None or worst <= max(worth * overhead, least):
            return []
        share = speeds[found["worker"]] / max(speeds[found["worker"]] + speeds[worker], 1e-6)
        return self._part(tx, found, pov.options, share)

    def _part(self, tx: Tx, attempt: Row, options: PovOptions, share: float) -> list[Row]:
        """Make a slice of its own of what is below a task's ``share`` of its unrendered rows."""
        task, height = cast(Row, tx.task(attempt["task"])), options.height
        bottom = task["bottom"] or height
        size = slice_block(options) if task["parent"] else block_size(options)
        region = region_of(options)
        middle = split_row(task["top"], bottom, region, size, self.progress(task["id"]), share)
        if middle is None:
            return []
        if task["kind"] == TaskKind.SLICE:
            frame = cast(Row, tx.task(task["parent"]))
            tx.set_bottom(task["id"], middle)
        else:
            tx.set_cut(task["id"], height, height)
            frame = cast(Row, tx.task(task["id"]))
            first = tx.add_part(frame, TaskKind.SLICE, 0, middle)
            tx.move_attempts(task["id"], first["id"])
            self._move(tx, first, TaskState.LEASED, "the rest goes to another worker")
        return [tx.add_part(frame, TaskKind.SLICE, middle, bottom)]

    def _pick_straggler(self, tx: Tx, job: Row, worker: int, offer: Offer) -> list[Row]:
        """Find a task to lease a second time: of the oldest lease the frame it comes to last."""
        if job["queued"] or job["in_order"]:
            return []
        _, cost = self._speeds(tx, job)
        mean_cost = _mean_cost(job)
        frame_cost = mean_cost.wall if mean_cost else math.inf
        attempts = tx.live_attempts_of_job(job["id"])
        if any(attempt["worker"] == worker and attempt["kind"] == TaskKind.SLICE
               for attempt in attempts):
            return []  # it would slow its own slice down, of which nobody has another copy
        counts = collections.Counter(attempt["task"] for attempt in attempts)
        now = self.clock.monotonic()
        for attempt in attempts:
            mean = frame_cost
            if attempt["kind"] == TaskKind.SLICE and cost is not None:
                mean = cost.row * (attempt["bottom"] - attempt["top"]) + cost.parse + START
            if now - self._granted.get(attempt["lease"], now) <= max(1.5 * mean, 5.0):
                continue
            done = tx.failed_workers(attempt["task"]) | {
                attempt["worker"], *(row["worker"] for row in tx.kept(attempt["task"]))}
            if attempt["kind"] != TaskKind.FRAME and worker in self._guests:
                continue
            if counts[attempt["task"]] == 1 and worker not in done:
                task = tx.task(attempt["task"])
                return [task] if task is not None else []
        return []

    def _give(self, tx: Tx, job: Row, worker: Row, tasks: Sequence[Row], idle: int) -> LeaseSpec:
        pov = pov_of(job["pov"])
        lease = secrets.token_hex(16)
        now = self.clock.time()
        tx.add_lease(lease, worker["id"], job["id"], [task["id"] for task in tasks], now)
        tx.set_job_started(job["id"], now)
        if not self._has_begun(job) or job["engines"] == "{}":
            tx.set_job_engines(job["id"], worker["engines"])
        for task in tasks:
            if task["state"] == TaskState.QUEUED:
                self._move(tx, task, TaskState.LEASED, worker["name"])
        self._granted[lease] = self.clock.monotonic()
        self._deadlines[lease] = self._granted[lease] + self._silence(worker["id"])
        self._owners[lease] = worker["id"]
        version = json.loads(worker["engines"]).get("povray", "")
        specs = tuple(
            TaskSpec(task["id"], task["frame"], task["name"], TaskKind(task["kind"]), task["top"],
                     task["bottom"] if task["parent"] else 0,
                     version != "" and task["state_of"] == version)
            for task in tasks)
        return LeaseSpec(
            lease, job["id"], job["name"], self._threads(tx, job, tasks[0], idle), specs,
            job["manifest"], pov, bool(job["in_order"]), self._passes(tx, job, tasks[0]),
            job["frame_timeout"] or frame_timeout(tx.recent_walls(job["id"])))

    def _passes(self, tx: Tx, job: Row, task: Row) -> tuple[int, ...]:
        """Return the passes whose results a task reads."""
        if not self._shared(job) or task["kind"] == TaskKind.PASS:
            return ()
        frame = task["parent"]
        if job["radiosity"] == "animation":
            frame = self._first(tx, job)["id"]
        return tuple(part["id"] for part in tx.parts(frame or 0, TaskKind.PASS)
                     if part["state"] == TaskState.DONE)

    def _threads(self, tx: Tx, job: Row, task: Row, idle: int) -> int:
        """Return the threads of one run: more than one only where frames run out.

        A still has whole machines to itself, and so has a slice; the last
        frames of an animation share what is idle, unless their pixels depend
        on the threads.
        """
        pov = pov_of(job["pov"])
        frames = sum(job[state.value] for state in TaskState)
        if frames > 1 and not pov.thread_safe and not task["parent"]:
            return 1
        runs = 1 if job["in_order"] else max(job["queued"], 1)
        if task["parent"]:
            alone = job["slices"] == "auto" or task["kind"] == TaskKind.PASS
            runs = 1 if alone else len(tx.queued_parts(job["id"])) + 1
        threads = max(idle // runs, 1)
        return max(min(threads, int(pov.values.get("Work_Threads", threads))), 1)


Picker = Callable[[Tx, Row, int, Offer], list[Row]]


@functools.lru_cache(maxsize=1024)
def _engine_fits(wanted: str, first: str, engines: str) -> bool:
    """Tell it of what is in the database as JSON text: the same for most workers."""
    return engine_fits(wanted, json.loads(first), json.loads(engines))


def _mean_cost(job: Row) -> Cost | None:
    """Return what a frame of a job cost on average, None before the first is done."""
    return Cost(job["cpu"] / job["done"], job["wall"] / job["done"]) if job["done"] else None


def _is_open(frame: Row | None) -> bool:
    """Tell whether the picture of a sliced frame is still wanted."""
    return frame is not None and frame["state"] in (TaskState.LEASED, TaskState.FAILED)


def _check_slices(pov: PovJob, options: JobOptions) -> None:
    """Refuse a number of slices where there can be none."""
    problem = unsliceable(pov, options.in_order)
    if problem and options.slices.isdecimal() and options.slices != "1":
        raise UserError(f"this job cannot be sliced: {problem}")


def _check_verify(pov: PovJob, options: JobOptions) -> JobOptions:
    """Refuse to compare what cannot be; frames that are compared stay whole."""
    if not options.verify:
        return options
    problem = unverifiable(pov, options)
    if problem:
        raise UserError(f"this job cannot be verified: {problem}")
    return replace(options, slices="off")


def _check_room(place: Path, size: int) -> None:
    """Refuse a job for which there is no room; what its images will take is not known."""
    free, least = free_room(place), max(size, LEAST_FREE)
    if free < least:
        raise NoRoom(f"the coordinator's disk has {format_size(max(free, 0))} to spare and a job "
                     f"needs {format_size(least)} or more: make room there, then submit it again")


# === 11. API =================================================================
# Who may come in, and the farm's own JSON under /api/v1. Decodes, calls
# SCHEDULER, encodes; decides nothing. docs/api.md describes every route.

MAX_WAIT = 60.0  # seconds that a request may ask to be held open
MAX_LISTED = 1000  # jobs or frames in one answer
MAX_EVENTS = 1000
MAX_COST = 1e9  # seconds
MAX_IMAGE = 1 << 30  # bytes
MAX_BLOB = 1 << 40  # bytes
SESSION_TIME = 12 * 3600.0  # seconds that a login in a browser lasts
FREE_TRIES = 5  # wrong keys from an address before they are answered more and more slowly,
SLOWEST = 2.0  # seconds at last; forgotten after a minute without one
MAX_HELD = 4  # of an address at a time: while they wait, it gets no other key looked at
MAX_ADDRESSES = 1000  # whose wrong keys are remembered
MAX_PENDING = 100  # workers that ask to join


class Access:
    """Tells who sends a request: by farm key, worker's token or browser login.

    The farm key is the admin's; a worker has a token of its own. A login code
    works once and is exchanged for a cookie, as Jupyter does it. Who tries
    wrong ones again and again is answered more and more slowly.
    """

    def __init__(self, store: Store, farm_key: str, private: bool, clock: Clock) -> None:
        with store.read() as tx:
            self.cookie = f"povfarm-{tx.meta('farm_id')[:8]}"
        self._store = store
        self._key = farm_key
        # Travels in addresses, so it is another one. A cookie, of which form tokens are made in
        # the same way, has no zero byte.
        self.guest_key = hmac.new(farm_key.encode(), b"\0guests", "sha256").hexdigest()[:32]
        self._clock = clock
        self._stranger = Identity(frozenset() if private else frozenset({"reader"}))
        self._lock = threading.Condition()
        self._codes: dict[str, float] = {}  # when they end, by their hashes
        self._sessions: dict[str, float] = {}
        self._tries: dict[str, tuple[int, float]] = {}  # by address: how often, when last
        self._held: collections.Counter[str] = collections.Counter()

    def identify(self, request: Request) -> Identity:
        """Return the sender of a request; a stranger may at most read."""
        if "guest" in request.params or request.path == "/httpov.php":
            shown = request.params.get("guest", request.query.get("cgroup", ""))
            return self._by_guest_key(shown, request)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token:
            return self._by_token(token.strip(), request.remote)
        with self._lock:
            end = self._sessions.get(_secret_hash(self._session(request)), 0.0)
        if end <= self._clock.monotonic():
            return self._stranger
        if request.method in ("GET", "HEAD"):
            return _ADMIN
        # A page elsewhere can make a browser send the cookie: with it alone one
        # may only look. What the forms of PAGES change, check_form guards as well.
        _check_origin(request.headers)
        return _READER if request.path.startswith("/api/") else _ADMIN

    def login_code(self) -> str:
        """Return a new code that logs a browser in, once, within ten minutes."""
        return self._issue(self._codes, 600)

    def log_in(self, code: str, remote: str = "127.0.0.1") -> str:
        """Exchange a login code for a session; ``ProtocolError`` 403 when it is no good."""
        self._check_patience(remote)
        with self._lock:
            end = self._codes.pop(_secret_hash(code), 0.0)
        if end >= self._clock.monotonic():
            return self._issue(self._sessions, SESSION_TIME)
        self.slow_down(remote)
        raise ProtocolError(403, "this link was used before or is too old: "
                                 "'povfarm.py login' prints a new one")

    def log_out(self, request: Request) -> None:
        """End the session of a request's cookie."""
        with self._lock:
            self._sessions.pop(_secret_hash(self._session(request)), None)

    def form_token(self, request: Request) -> str:
        """Return the token that a form on a page for this browser must hold."""
        session = self._session(request)
        return hmac.new(self._key.encode(), session.encode(), "sha256").hexdigest()

    def check_form(self, request: Request) -> None:
        """Raise ``ProtocolError`` 403 for a form that was not made for this browser."""
        if not hmac.compare_digest(request.form().get("token", "").encode(),
                                   self.form_token(request).encode()):
            raise ProtocolError(403, "this form is too old: load the page again")

    def _session(self, request: Request) -> str:
        for part in request.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie:
                return value
        return ""

    def _issue(self, ends: dict[str, float], seconds: float) -> str:
        """Return a new secret, noted with its end; those that have ended are forgotten."""
        secret, now = secrets.token_urlsafe(24), self._clock.monotonic()
        with self._lock:
            for old in [one for one, end in ends.items() if end < now]:
                del ends[old]
            ends[_secret_hash(secret)] = now + seconds
        return secret

    def _by_token(self, token: str, remote: str) -> Identity:
        self._check_patience(remote)
        if hmac.compare_digest(token.encode(), self._key.encode()):
            return _ADMIN
        with self._store.read() as tx:
            row = tx.worker_by_token(_secret_hash(token))
        if row is None:
            self.slow_down(remote)
            raise ProtocolError(401, "this key is not the farm's")
        return Identity(_WORKER_ROLES[WorkerState(row["state"])], row["id"], row["name"])

    def _by_guest_key(self, key: str, request: Request) -> Identity:
        self._check_patience(request.remote)
        if hmac.compare_digest(key.encode(), self.guest_key.encode()):
            return _GUEST
        self.slow_down(request.remote)
        raise ProtocolError(404, f"there is no {request.path} here")

    def slow_down(self, remote: str) -> None:
        """Count a wrong key of an address, and hold up its answer when there were too many."""
        with self._lock:
            now = self._clock.monotonic()
            count, last = self._tries.pop(remote, (0, now))
            count = count + 1 if now - last < 60 else 1
            self._tries[remote] = count, now
            if len(self._tries) > MAX_ADDRESSES:
                del self._tries[next(iter(self._tries))]
            if count > FREE_TRIES and sum(self._held.values()) < 8 * MAX_HELD:
                self._held[remote] += 1
                self._clock.wait(self._lock, min(0.1 * 2 ** min(count - FREE_TRIES, 9), SLOWEST))
                self._held[remote] -= 1
                self._held += collections.Counter()  # drops the zeros

    def _check_patience(self, remote: str) -> None:
        # Also where the key is right: else wrong ones could be tried as fast as ever, all at
        # the same time, and whatever is not answered at once be taken for wrong.
        if self._held[remote] >= MAX_HELD:
            raise ProtocolError(429, "too many wrong keys come from this address: wait a little",
                                Retry_After="2")


def _check_origin(headers: Mapping[str, str]) -> None:
    """Refuse what a browser says that a page of another origin made it send."""
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin", "").partition("//")[2]
    if site not in ("same-origin", "none") and (
            site is not None or ("origin" in headers and origin != headers.get("host"))):
        raise ProtocolError(403, "a page of another site has sent this: nothing was done")


def _secret_hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


_READER = Identity(frozenset({"reader"}), name="browser")
_ADMIN = Identity(frozenset({"reader", "user", "admin"}), name="admin")
_GUEST = Identity(frozenset({"guest"}), name="guest")
_WORKER_ROLES: Mapping[WorkerState, frozenset[str]] = {
    WorkerState.PENDING: frozenset({"reader", "pending"}),
    WorkerState.ADMITTED: frozenset({"reader", "pending", "worker"}),
}


class Api:
    """The routes of /api/v1. ``routes`` is set once the router has them all."""

    def __init__(self, scheduler: Scheduler, access: Access, name: str,
                 admit_private: bool) -> None:
        self.routes: Sequence[BoundRoute] = ()
        self._farm = scheduler
        self._store = scheduler.store
        self._access = access
        self.name = name
        self._admit_private = admit_private
        self._started = scheduler.clock.monotonic()

    # --- looking

    @route("GET", "/api/v1/farm", role="reader", summary="The farm as a whole")
    def farm(self, request: Request) -> Response:
        """Name, version, id, the newest event's id; ``notice`` says what is wrong, or nothing."""
        with self._store.read() as tx:
            return json_response({
                "name": self.name, "version": VERSION, "farm_id": tx.meta("farm_id"),
                "event": tx.last_event(), "workers": len(self._farm.live_workers()),
                "notice": self._store.notice,
                "uptime": self._farm.clock.monotonic() - self._started,
            })

    @route("GET", "/api/v1/jobs", role="reader", summary="The jobs, the newest first")
    def jobs(self, request: Request) -> Response:
        """Query: limit, after (the last id already seen)."""
        with self._store.read() as tx:
            rows = tx.jobs(_query_number(request, "after", 0), _query_limit(request, 100))
            return json_response({"jobs": [self.job_view(tx, row) for row in rows]})

    @route("GET", "/api/v1/jobs/<job:int>", role="reader", summary="One job")
    def job(self, request: Request) -> Response:
        """One job with its counters, rate and, when frames failed, the newest failure."""
        with self._store.read() as tx:
            return json_response(self.job_view(tx, self._job(tx, request), whole=True))

    @route("GET", "/api/v1/jobs/<job:int>/frames", role="reader", summary="The frames of a job")
    def frames(self, request: Request) -> Response:
        """Query: limit, after (the last frame number already seen)."""
        with self._store.read() as tx:
            job = self._job(tx, request)
            names = {row["id"]: row["name"] for row in tx.workers()}
            rows = tx.tasks(job["id"], _query_number(request, "after", -1),
                            _query_limit(request, MAX_LISTED))
            return json_response({"frames": [self.frame_view(tx, row, names) for row in rows]})

    @route("GET", "/api/v1/jobs/<job:int>/frames/<frame:int>/image", role="reader",
           summary="A finished image")
    def image(self, request: Request) -> Response:
        """The image as POV-Ray wrote it; takes Range and If-None-Match."""
        with self._store.read() as tx:
            job, task = self._frame(tx, request)
        if task["state"] != TaskState.DONE:
            raise ProtocolError(404, f"frame {task['frame']} is {task['state']}")
        path = safe_join(self._store.job_directory(job["id"], job["name"]), task["name"])
        return file_response(path, _MIME[path.suffix], request, task["sha256"])

    @route("GET", "/api/v1/jobs/<job:int>/slices/<task:int>/image", role="reader",
           summary="A finished slice")
    def slice_image(self, request: Request) -> Response:
        """The rows of a slice as a picture of their own, until its frame is put together."""
        with self._store.read() as tx:
            job, task = self._job(tx, request), tx.task(request.params["task"])
            if (task is None or task["job"] != job["id"] or task["kind"] != TaskKind.SLICE
                    or task["state"] != TaskState.DONE):
                raise ProtocolError(404, "there is no such slice, or it is not finished")
            path = self._farm.part_path(tx, task)
        return file_response(path, _MIME[path.suffix], request, task["sha256"])

    @route("GET", "/api/v1/jobs/<job:int>/frames/<frame:int>/log", role="reader",
           summary="What POV-Ray printed")
    def log(self, request: Request) -> Response:
        """The text of every attempt at one frame, the oldest first, as plain text."""
        with self._store.read() as tx:
            job, task = self._frame(tx, request)
            attempts = tx.attempts(task["id"])
        directory = self._store.job_directory(job["id"], job["name"])
        parts = []
        for attempt in attempts:
            ended = attempt["state"] + (f": {attempt['message']}" if attempt["message"] else "")
            rows = (f", rows {attempt['top']} to {attempt['bottom'] - 1}"
                    if attempt["kind"] == TaskKind.SLICE else "")
            what = f"frame {task['frame']}{rows}"
            parts.append(f"--- {what} on {attempt['worker_name']}: {ended}\n")
            if attempt["log"]:
                with contextlib.suppress(OSError):
                    parts.append((directory / attempt["log"]).read_text("utf-8", "replace"))
        return text_response("".join(parts))

    @route("GET", "/api/v1/jobs/<job:int>/files", role="reader",
           summary="The files that the scene wrote")
    def written(self, request: Request) -> Response:
        """Path, SHA-256, size, and the frame that wrote it last, of each file."""
        with self._store.read() as tx:
            job = self._job(tx, request)
            return json_response({"files": [dict(row) for row in tx.written(job["id"])]})

    @route("GET", "/api/v1/jobs/<job:int>/files/<hash>", role="reader",
           summary="A file that the scene wrote")
    def written_file(self, request: Request) -> Response:
        """The contents with this hash."""
        sha256 = _sha256(request)
        with self._store.read() as tx:
            job = self._job(tx, request)
            if all(row["sha256"] != sha256 for row in tx.written(job["id"])):
                raise ProtocolError(404, "the scene wrote no file with this hash")
        return file_response(self._store.blob_path(sha256), "application/octet-stream", request,
                             sha256)

    @route("GET", "/api/v1/jobs/<job:int>/archive.zip", role="reader",
           summary="All finished images of a job")
    def archive(self, request: Request) -> Response:
        """A zip of them and of the files that the scene wrote, made while it is sent."""
        with self._store.read() as tx:
            job = self._job(tx, request)
            done, written = tx.tasks_in(job["id"], TaskState.DONE), tx.written(job["id"])
        directory = self._store.job_directory(job["id"], job["name"])
        images = {row["name"]: safe_join(directory, row["name"]) for row in done}
        files = {row["path"]: self._store.blob_path(row["sha256"]) for row in written}
        response = stream_response(zip_stream({**files, **images}.items()), "application/zip")
        name = urllib.parse.quote(f"{directory.name}.zip")
        response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
        return response

    @route("GET", "/api/v1/workers", role="reader", summary="The workers")
    def workers(self, request: Request) -> Response:
        """Every worker with what it does: working, idle, gone, sick or pending."""
        with self._store.read() as tx:
            return json_response({"workers": self.worker_views(tx)})

    @route("GET", "/api/v1/events", role="reader", summary="What happens, as it happens")
    def events(self, request: Request) -> Response:
        """Server-sent events after the id ``after`` (or Last-Event-ID), or from now on.

        With ``wait`` (seconds) it is one JSON list instead, answered when there is something.
        """
        with self._store.read() as tx:
            newest = tx.last_event()
        after = _query_number(request, "after", newest)
        if "wait" in request.query:
            events = self._farm.wait_events(after, _seconds(request.query["wait"]), MAX_EVENTS)
            return json_response({
                "events": [dict(event) for event in events], "more": len(events) == MAX_EVENTS})
        known = re.fullmatch("[0-9]{1,15}", request.headers.get("last-event-id", ""))
        return stream_response(self._event_stream(int(known[0]) if known else after),
                               "text/event-stream")

    @route("GET", "/api/v1/openapi.json", role="reader", summary="This API, for programs")
    def openapi(self, request: Request) -> Response:
        """An OpenAPI 3 document, made from the routes themselves."""
        return json_response(openapi_document(self.routes))

    @route("GET", "/api/v1/metrics", role="reader", summary="Figures for Prometheus")
    def metrics(self, request: Request) -> Response:
        """Counters in Prometheus' text format."""
        with self._store.read() as tx:
            jobs = tx.jobs(0, -1)
            workers = tx.workers()
        lines = ["# TYPE povfarm_frames gauge"]
        lines += [f'povfarm_frames{{state="{state.value}"}} {sum(job[state.value] for job in jobs)}'
                  for state in TaskState]
        lines += ["# TYPE povfarm_jobs gauge"]
        lines += [f'povfarm_jobs{{state="{state.value}"}} '
                  f'{sum(job["state"] == state for job in jobs)}' for state in JobState]
        lines += ["# TYPE povfarm_workers gauge", f"povfarm_workers {len(workers)}",
                  "# TYPE povfarm_workers_live gauge",
                  f"povfarm_workers_live {len(self._farm.live_workers())}",
                  "# TYPE povfarm_cpu_seconds counter",
                  f"povfarm_cpu_seconds {sum(job['cpu'] for job in jobs):.3f}"]
        return text_response("\n".join(lines) + "\n")

    # --- steering

    @route("POST", "/api/v1/jobs", role="user", max_body=64 << 20, summary="Submit a job")
    def submit(self, request: Request) -> Response:
        """Body: name, pov, manifest, options, ticket. Answers the id and the hashes still missing.

        Everything that happens to the job comes after the event ``event``. The
        same ticket, any text, sent again is answered with the same job.
        """
        wire = request.json()
        job, missing = self._farm.submit(
            want(wire, "name", str)[:100], request.identity.name,
            PovJob.from_wire(want(wire, "pov", dict)),
            Manifest.from_wire(want(wire, "manifest", dict)),
            JobOptions().changed(want(wire, "options", dict)),
            want({"ticket": "", **wire}, "ticket", str)[:100],
        )
        with self._store.read() as tx:
            event = tx.first_event(job) - 1
        return json_response({"id": job, "missing": missing, "event": event}, 201)

    @route("PUT", "/api/v1/blobs/<hash>", role="user", max_body=MAX_BLOB,
           summary="Send a file of a job")
    def put_blob(self, request: Request) -> Response:
        """Body: the contents; 422 when they have another hash, 404 when no job asked for them."""
        self._farm.put_blob(_sha256(request), request.body.blocks())
        return empty_response()

    @route("POST", "/api/v1/jobs/<job:int>/<action>", role="user", summary="Steer a job")
    def steer(self, request: Request) -> Response:
        """Action: pause, resume, cancel or retry."""
        action = request.params["action"]
        if action not in ("pause", "resume", "cancel", "retry"):
            raise ProtocolError(404, f"a job cannot be asked to {action}")
        getattr(self._farm, action)(request.params["job"])
        return self.job(request)

    @route("PATCH", "/api/v1/jobs/<job:int>", role="user", summary="Change a job")
    def change(self, request: Request) -> Response:
        """Body: any of a job's options."""
        wire = request.json()
        if not isinstance(wire, dict):
            raise UserError("the body is not a list of changes")
        self._farm.change(request.params["job"], wire)
        return self.job(request)

    @route("DELETE", "/api/v1/jobs/<job:int>", role="user", summary="Delete a job")
    def delete(self, request: Request) -> Response:
        """Delete a job with its images and logs."""
        self._farm.delete(request.params["job"])
        return empty_response()

    @route("POST", "/api/v1/workers/admit", role="admin", summary="Admit a pending worker")
    def admit(self, request: Request) -> Response:
        """Body: code, as the worker shows it."""
        return json_response({"name": self._farm.admit(want(request.json(), "code", str))})

    @route("DELETE", "/api/v1/workers/<worker:int>", role="admin", summary="Remove a worker")
    def remove_worker(self, request: Request) -> Response:
        """Take its work back and let it in no more."""
        self._farm.remove_worker(request.params["worker"])
        return empty_response()

    @route("POST", "/api/v1/login", role="admin", summary="Make a login link")
    def login_link(self, request: Request) -> Response:
        """Answer the path of a link that logs one browser in."""
        return json_response({"path": f"/login/{self._access.login_code()}"})

    # --- working

    @route("POST", "/api/v1/workers", role="anyone", max_body=1 << 16, summary="Join as a worker")
    def join(self, request: Request) -> Response:
        """Body: name, cores, memory, system, engines, tags, ticket. Answers the worker's token.

        With the farm key it is admitted at once; else it is pending, and shows ``code``.
        A worker that shows the token it once got is the same worker again. A ticket, 32
        letters and digits or more that nobody can guess, becomes the token, and sent again
        is answered with the same worker.
        """
        wire = request.json()
        info = WorkerInfo.from_wire(wire)
        ticket = want({"ticket": "", **wire}, "ticket", str)
        if ticket and not re.fullmatch("[A-Za-z0-9_-]{32,100}", ticket):
            raise UserError("a ticket has 32 to 100 letters and digits")
        if request.identity.worker:
            return self._rejoin(request, info)
        has_key = "admin" in request.identity.roles
        admitted = has_key or (self._admit_private and _is_private(request.remote))
        if not has_key:
            self._access.slow_down(request.remote)
            self._make_room()
        token = ticket or secrets.token_urlsafe(32)
        worker, code = self._farm.join(info, _secret_hash(token), request.remote, admitted)
        return json_response(
            {"id": worker, "token": token, "admitted": admitted, "code": code}, 201)

    @route("POST", "/api/v1/lease", role="pending", summary="Ask for work")
    def lease(self, request: Request) -> Response:
        """Body: want, slots, idle, wait. Held open until there is something to render.

        ``open`` is how many tasks the farm has left; ``pending`` that this worker
        is not admitted yet.
        """
        wire = request.json()
        offer = Offer(*(min(max(want(wire, name, int), 0), 1000)
                        for name in ("want", "slots", "idle")))
        worker = request.identity.worker
        leases = self._farm.lease(worker, offer, _seconds(wire.get("wait", 0)), request.alive)
        with self._store.read() as tx:
            open_tasks = sum(job["queued"] + job["leased"] for job in tx.leasable_jobs())
            row = tx.worker(worker)
        return json_response({
            "leases": [lease.to_wire() for lease in leases], "open": open_tasks,
            "pending": row is not None and row["state"] == WorkerState.PENDING,
        })

    @route("POST", "/api/v1/beat", role="worker", summary="Keep leases alive")
    def beat(self, request: Request) -> Response:
        """Body: leases (id -> task -> progress 0 to 1), wait. Answers those that ended.

        ``cuts`` are tasks of which others render what is below a row: that may be left out.
        """
        wire = request.json()
        leases = want(wire, "leases", dict)
        progress = {
            lease: {_task(task): _seconds(part, 1.0)
                    for task, part in want(leases, lease, dict).items()}
            for lease in leases
        }
        ended, cuts = self._farm.beat(request.identity.worker, progress,
                                      _seconds(wire.get("wait", 0)))
        return json_response({"ended": ended, "cuts": cuts})

    @route("POST", "/api/v1/leave", role="pending", summary="Stop working here")
    def leave(self, request: Request) -> Response:
        """Hand back every lease of this worker."""
        self._farm.leave(request.identity.worker)
        return empty_response()

    @route("POST", "/api/v1/leases/<lease>/release", role="worker", summary="Hand back a lease")
    def release(self, request: Request) -> Response:
        """What of the lease is unfinished is given to others."""
        self._farm.release(request.identity.worker, request.params["lease"])
        return empty_response()

    @route("PUT", "/api/v1/leases/<lease>/tasks/<task:int>", role="worker", max_body=MAX_IMAGE,
           summary="Deliver an image")
    def deliver(self, request: Request) -> Response:
        """Body: ``log`` bytes of POV-Ray's text, the image, ``files`` bytes of a zip of the
        files that the scene wrote.

        Query: log, files, cpu, wall, parse, memory, and the row before which the picture ends,
        bottom. 422 when the image is not the whole picture that was asked for.
        ``accepted`` is False when another worker was first. 503 when the body is
        not what the header X-SHA256 says.
        """
        size, files = _query_number(request, "log", 0), _query_number(request, "files", 0)
        data = _whole_body(request)
        end = max(len(data) - files, 0)
        cost = Cost(_seconds(request.query.get("cpu", "0"), MAX_COST),
                    _seconds(request.query.get("wall", "0"), MAX_COST),
                    _query_number(request, "memory", 0),
                    _seconds(request.query.get("parse", "0"), MAX_COST))
        try:
            accepted = self._farm.finish(
                request.identity.worker, request.params["lease"], request.params["task"],
                data[size:end], data[:size], cost, _query_number(request, "bottom", 0),
                unpack_files(data[end:]) if files else {})
        except ImageError as error:
            raise ProtocolError(422, str(error)) from None
        return json_response({"accepted": accepted})

    @route("PUT", "/api/v1/leases/<lease>/tasks/<task:int>/state", role="worker",
           max_body=MAX_IMAGE, summary="Leave a state to go on from")
    def keep_state(self, request: Request) -> Response:
        """Body: what POV-Ray left of an unfinished task when it was stopped."""
        self._farm.keep_state(request.identity.worker, request.params["lease"],
                              request.params["task"], _whole_body(request))
        return empty_response()

    @route("GET", "/api/v1/tasks/<task:int>/<what>", role="worker",
           summary="What a pass or a stopped render left")
    def part(self, request: Request) -> Response:
        """``result`` of a pass that is done, or the ``state`` of an unfinished task."""
        suffix = {"result": "", "state": ".state"}.get(request.params["what"])
        with self._store.read() as tx:
            task = tx.task(request.params["task"])
            if task is None or suffix is None:
                raise ProtocolError(404, f"there is no task {request.params['task']}")
            path = self._farm.part_path(tx, task, suffix)
        return file_response(path, "application/octet-stream", request,
                             "" if suffix else task["sha256"] or "")

    @route("POST", "/api/v1/leases/<lease>/tasks/<task:int>/fail", role="worker",
           max_body=16 << 20, summary="Tell of a failed task")
    def fail(self, request: Request) -> Response:
        """Body: message, scene (true when the scene is to blame), log."""
        wire = request.json()
        self._farm.fail(
            request.identity.worker, request.params["lease"], request.params["task"],
            want(wire, "message", str)[:1000], want(wire, "log", str).encode(),
            want(wire, "scene", bool))
        return empty_response()

    @route("GET", "/api/v1/manifests/<key>", role="worker", summary="The files of a project")
    def manifest(self, request: Request) -> Response:
        """Path, SHA-256, size and time of each file."""
        with self._store.read() as tx:
            wire = tx.manifest(request.params["key"])
        if not wire:
            raise ProtocolError(404, "there is no such project")
        return text_response(wire, mime="application/json")

    @route("GET", "/api/v1/blobs/<hash>", role="worker", summary="A file of a project")
    def blob(self, request: Request) -> Response:
        """The contents with this hash."""
        sha256 = _sha256(request)
        return file_response(self._store.blob_path(sha256), "application/octet-stream", request,
                             sha256)

    # --- views, which the pages use too

    def job_view(self, tx: Tx, job: Row, whole: bool = False) -> dict[str, Any]:
        """Return a job as people want to see it; ``whole`` adds the newest failure."""
        counts = {state.value: job[state.value] for state in TaskState}
        total = sum(counts.values())
        live = tx.live_attempts_of_job(job["id"]) if job["leased"] else []
        frames = {attempt["task"]: self._farm.progress(attempt["task"]) for attempt in live
                  if attempt["kind"] == TaskKind.FRAME}
        slices = [view for frame in tx.frames_to_cut(job["id"])
                  for view in self._slice_views(tx, frame, {})]
        part = sum(frames.values()) + sum(view["share"] * view["progress"] for view in slices)
        end = job["finished"] or self._farm.clock.time()
        spent = end - job["started"] if job["started"] else 0.0
        work = job["done"] + part
        rate = work / spent if spent > 0 else 0.0
        left = job["queued"] + job["leased"] - part
        view = {name: job[name] for name in (
            "id", "name", "state", "reason", "owner", "priority", "max_workers", "retry_limit",
            "created", "started", "finished", "cpu", "wall")}
        view.update(
            in_order=bool(job["in_order"]), progress=work / total if total else 0.0, elapsed=spent,
            rate=rate, eta=left / rate if rate and left else None,
            frames={"total": total, **counts},
            slices={"total": len(slices), **{
                name: sum(view["state"] == name for view in slices) for name in counts}},
            slicing=job["slices"], radiosity=job["radiosity"], povray=job["povray"],
            verify=job["verify"], frame_timeout=job["frame_timeout"],
            waiting_for=self._farm.waiting_for(tx, job),
        )
        if whole:
            options, failure = pov_of(job["pov"]).options, tx.first_failure(job["id"])
            view.update(
                notice=self._store.notice, width=options.width, height=options.height,
                extension=options.extension,
                failure=failure and {"frame": failure["frame"], "message": failure["message"]})
        return view

    def frame_view(self, tx: Tx, task: Row, workers: Mapping[int, str]) -> dict[str, Any]:
        """Return a frame as people want to see it, with its slices while there are any."""
        view = {name: task[name] for name in (
            "frame", "name", "state", "tries", "finished", "size", "sha256", "cpu", "wall",
            "memory")}
        view["progress"] = (
            1.0 if task["state"] == TaskState.DONE else self._farm.progress(task["id"]))
        view["worker"] = workers.get(task["worker"], "")
        if task["cut"] is not None and task["state"] != TaskState.DONE:
            view["slices"] = self._slice_views(tx, task, workers)
            view["progress"] = sum(part["share"] * part["progress"] for part in view["slices"])
        return view

    def _slice_views(self, tx: Tx, frame: Row, workers: Mapping[int, str]) -> list[dict[str, Any]]:
        """Return the slices of a frame from top to bottom; ``share`` is of the frame's rows."""
        return [{
            "id": part["id"], "top": part["top"], "bottom": part["bottom"],
            "state": part["state"], "worker": workers.get(part["worker"], ""),
            "share": (part["bottom"] - part["top"]) / frame["bottom"],
            "progress": 1.0 if part["state"] == TaskState.DONE
            else self._farm.progress(part["id"]),
        } for part in tx.parts(frame["id"]) if part["kind"] == TaskKind.SLICE]

    def worker_views(self, tx: Tx) -> list[dict[str, Any]]:
        """Return every worker with what it does and how long ago it was heard of."""
        live = self._farm.live_workers()
        runs = collections.Counter(lease["worker"] for lease in tx.live_leases())
        views = []
        for row in tx.workers():
            view = {name: row[name] for name in (
                "id", "name", "cores", "memory", "system", "address", "joined")}
            view.update(engines=json.loads(row["engines"]), tags=json.loads(row["tags"]),
                        runs=runs[row["id"]], seen=self._farm.seen(row["id"]))
            if row["state"] == WorkerState.PENDING:
                view.update(state="pending", code=row["code"])
            elif row["id"] not in live:
                view["state"] = "gone"
            elif sickness := self._farm.sickness(tx, row):
                view.update(state="sick", reason=sickness)
            else:
                view["state"] = "working" if runs[row["id"]] else "idle"
            views.append(view)
        return views

    # --- inside

    def _make_room(self) -> None:
        """Forget a worker that asked to join and left, when too many wait to be admitted."""
        with self._store.read() as tx:
            waiting = [row["id"] for row in tx.workers() if row["state"] == WorkerState.PENDING]
        if len(waiting) >= MAX_PENDING:
            gone = [worker for worker in waiting if worker not in self._farm.live_workers()]
            if not gone:
                raise ProtocolError(429, "too many workers ask to join", Retry_After="30")
            self._farm.remove_worker(gone[0])

    def _rejoin(self, request: Request, info: WorkerInfo) -> Response:
        worker = request.identity.worker
        self._farm.rejoin(worker, info, request.remote)
        with self._store.read() as tx:
            row = tx.worker(worker)
        return json_response({
            "id": worker, "admitted": "worker" in request.identity.roles,
            "code": row["code"] if row else "", "token": ""})

    def _job(self, tx: Tx, request: Request) -> Row:
        row = tx.job(request.params["job"])
        if row is None:
            raise ProtocolError(404, f"there is no job {request.params['job']}")
        return row

    def _frame(self, tx: Tx, request: Request) -> tuple[Row, Row]:
        job = self._job(tx, request)
        task = tx.task_of_frame(job["id"], request.params["frame"])
        if task is None:
            raise ProtocolError(404, f"job {job['id']} has no frame {request.params['frame']}")
        return job, task

    def _event_stream(self, after: int) -> Iterator[bytes]:
        yield b"retry: 2000\n\n"
        while True:
            events = self._farm.wait_events(after, 1.0, MAX_EVENTS)
            for event in events:
                after = event["id"]
                data = json.dumps(dict(event))
                yield f"id: {after}\nevent: change\ndata: {data}\n\n".encode()
            if not events:
                yield b""


def openapi_document(routes: Sequence[BoundRoute]) -> dict[str, Any]:
    """Return the OpenAPI 3 document of the routes below /api."""
    paths: dict[str, dict[str, Any]] = {}
    for bound in routes:
        tag = bound.route
        if not tag.pattern.startswith("/api/"):
            continue
        parameters = [
            {"name": name, "in": "path", "required": True,
             "schema": {"type": "integer" if kind == ":int" else "string"}}
            for name, kind in re.findall(r"<(\w+)(:\w+)?>", tag.pattern)
        ]
        path = re.sub(r"<(\w+)(?::\w+)?>", r"{\1}", tag.pattern)
        paths.setdefault(path, {})[tag.method.lower()] = {
            "summary": tag.summary, "description": " ".join(bound.doc.split()),
            "operationId": bound.handler.__name__, "parameters": parameters,
            "x-role": tag.role, "responses": {"default": {"description": "see docs/api.md"}},
            "security": [] if tag.role in ("anyone", "reader") else [{"key": []}],
        }
    return {
        "openapi": "3.0.3", "info": {"title": "povfarm", "version": VERSION}, "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


_MIME: Mapping[str, str] = {kind.extension: kind.mime for kind in IMAGE_TYPES.values()}


# Not ip_address().is_private, which takes in more, such as tunnels from anywhere (RFC 4380).
_PRIVATE = tuple(map(ipaddress.ip_network, (
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
    "::1/128", "fc00::/7", "fe80::/10")))


def _is_private(remote: str) -> bool:
    address = ipaddress.ip_address(remote.partition("%")[0])
    return any(address in network for network in _PRIVATE)


def _whole_body(request: Request) -> bytes:
    """Return a body; one that was damaged on its way shall be sent again."""
    data = request.body.read()
    named = request.headers.get("x-sha256")
    if named is not None and hashlib.sha256(data).hexdigest() != named:
        raise ProtocolError(503, "the body was damaged on its way: send it again")
    return data


def _query_number(request: Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not re.fullmatch(r"-?\d{1,15}", text):
        raise UserError(f"'{name}' is not a whole number")
    return int(text)


def _query_limit(request: Request, default: int) -> int:
    limit = _query_number(request, "limit", default)
    return limit if 0 <= limit <= MAX_LISTED else MAX_LISTED


def _seconds(value: Any, most: float = MAX_WAIT) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UserError("that is not a number of seconds")
    return min(max(number, 0.0), most)


def _task(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError("that is not the number of a task")
    return int(text)


def _sha256(request: Request) -> str:
    value = str(request.params["hash"])
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise UserError("that is not a SHA-256 hash")
    return value


# === 12. HTTPOV ==============================================================
# The dialect of HTTPov's clients, versions 1.2 and 2.2: decodes what they ask
# at /httpov.php, calls SCHEDULER, encodes its answers as key=value lines, whose
# order is the protocol's. A client, HOST:CID, is a worker; a batch is a lease
# under its own id; its frames have the job's own numbers, so that all that a
# scene can ask POV-Ray for (clock, frame_number, final_frame) is as it should be.

CLIENT_SILENCE = 130.0  # seconds: they tell every 60 that they still render
CLIENT_FEATURES = 2  # the second number of the version that clients should have
_CLIENT_VERSION = re.compile(r"([1-9][0-9]{0,3})\.([0-9]{1,4})(?:\.[0-9.]*)?")
_CLIENT = re.compile(r"[!-9;-~]{1,80}:[0-9]{1,10}")
_CLIENT_TOKEN = "HTTPov "  # begins what is no hash, so that nobody can show the secret of it
_COMMANDS = {"getjob": ("client",), "getbatch": ("job", "client"),
             **dict.fromkeys(("postbatch", "abortbatch", "active"), ("job", "batch", "client"))}
_OWN_INI = ("pov.ini", "povray.ini")  # POV-Ray reads the latter by itself, also shell commands


class Httpov:
    """The routes of HTTPov's clients, for a ``Coordinator`` that lets them in.

    The clients know no passwords. The bash one takes a path behind the server's
    address, for the key; the Python one does not, but both send the name of
    their group with every command, so that may be the key as well. What they
    fetch without it, a job's archive, has a name that nobody can guess.
    """

    def __init__(self, scheduler: Scheduler, access: Access) -> None:
        self._farm = scheduler
        self._store = scheduler.store
        self._access = access
        self._joining = threading.Lock()
        self._workers: dict[str, int] = {}  # by client: also one that was removed meanwhile
        self._guest = Guest(CLIENT_SILENCE, self._takes)
        self._portable: dict[str, bool] = {}  # by manifest: whether clients can unpack it
        with self._store.read() as tx:
            known = [row["id"] for row in tx.workers() if row["token"].startswith(_CLIENT_TOKEN)]
        for worker in known:
            scheduler.receive(worker, self._guest)

    @route("GET", "/httpov.php", role="guest", summary="What an HTTPov client asks")
    @route("GET", "/<guest>/httpov.php", role="guest", summary="What an HTTPov client asks")
    @route("POST", "/httpov.php", role="guest", max_body=MAX_IMAGE,
           summary="What an HTTPov client rendered")
    @route("POST", "/<guest>/httpov.php", role="guest", max_body=MAX_IMAGE,
           summary="What an HTTPov client rendered")
    def command(self, request: Request) -> Response:
        """Query: command, client, version; job and batch where there is one; cgroup."""
        version = _CLIENT_VERSION.fullmatch(request.query.get("version", ""))
        if version is None:
            return _lines("command=sleep", "message=HTTPov client 1.0 or later required.")
        command = request.query.get("command", "")
        if command == "hello":
            return _lines("message=HTTPov server version 0.8 ready.")
        if command not in _COMMANDS:
            return _lines("command=unknown")
        missing = [name for name in _COMMANDS[command] if not request.query.get(name)]
        if missing or not _CLIENT.fullmatch(request.query["client"]):
            return _lines(f"error={' and '.join(missing) or 'client'} must be in the request")
        worker = self._worker(request)
        if worker is None:
            return _lines("error=this client was removed from the farm")
        answer = _lines(*getattr(self, f"_{command}")(request, worker))
        if command == "getjob" and int(version[2]) < CLIENT_FEATURES:
            answer.body = cast(bytes, answer.body) + (
                f"message=HTTPov client {version[1]}.{CLIENT_FEATURES} or later recommended.\n"
            ).encode()
        return answer

    @route("GET", "/jobs/<name>.zip", role="anyone", summary="A job for HTTPov clients")
    @route("GET", "/<guest>/jobs/<name>.zip", role="guest", summary="A job for HTTPov clients")
    def archive(self, request: Request) -> Response:
        """The project in one directory, with a pov.ini that renders the job's frames."""
        name = request.params["name"]
        number = re.match("[0-9]{1,18}(?=-)", name)
        with self._store.read() as tx:
            job = tx.job(int(number[0])) if number else None
            if job is None or not hmac.compare_digest(name.encode(), self._name(job).encode()):
                job = None
            elif self._takes(tx, job):
                manifest = Manifest.from_wire(json.loads(tx.manifest(job["manifest"])))
                return stream_response(zip_stream(self._entries(job, manifest)), "application/zip")
        if job is None:
            self._access.slow_down(request.remote)
        raise ProtocolError(404, f"there is no {name}.zip here")

    # --- the commands

    def _getjob(self, request: Request, worker: int) -> list[str]:
        """Lease something first: a client that is sent to a job in vain asks again at once."""
        lease = self._lease(request, worker, 0)
        if lease is None:
            return ["command=sleep"]
        with self._store.read() as tx:
            job = cast(Row, tx.job(lease[1]))
        plan = plan_frames(pov_of(job["pov"]).options)
        # Clients take from the number of frames only how many digits a frame's number has.
        frames = plan.final_frame + plan.cyclic if plan.animation else 1
        return ["command=getbatch", f"job={job['id']}", f"name={self._name(job)}",
                f"frames={frames}"]

    def _getbatch(self, request: Request, worker: int) -> list[str]:
        job = request.query["job"]
        lease = self._lease(request, worker, int(job)) if re.fullmatch("[1-9][0-9]{0,17}", job) \
            else None
        if lease is None:
            return ["command=getjob"]
        with self._store.read() as tx:
            frames = [attempt["frame"] for attempt in tx.attempts_of_lease(lease[0])]
        return ["command=render", f"batch={lease[0]}", f"startframe={frames[0]}",
                f"stopframe={frames[-1]}"]

    def _active(self, request: Request, worker: int) -> list[str]:
        self._farm.beat(worker, {request.query["batch"]: {}}, 0.0)
        return ["status=ok"]

    def _abortbatch(self, request: Request, worker: int) -> list[str]:
        attempts = self._attempts(request, worker)
        for attempt in attempts:
            self._fail(worker, attempt, "POV-Ray failed: the log is where the client runs")
        if attempts:  # then the client ends
            self._farm.leave(worker)
        return ["status=error"]

    def _postbatch(self, request: Request, worker: int) -> list[str]:
        attempts = self._attempts(request, worker)
        if all(attempt["state"] in (AttemptState.DONE, AttemptState.KEPT) for attempt in attempts):
            return ["status=error"]
        images, text, problem = _images(request)
        wall = (self._farm.clock.time() - attempts[0]["started"]) / len(attempts)
        cost, good = Cost(max(wall, 0.0), max(wall, 0.0)), True
        for attempt in attempts:
            missing = problem or f"frame {attempt['frame']} is not in what the client sent"
            try:
                if attempt["frame"] not in images:
                    raise ImageError(missing)
                self._farm.finish(worker, attempt["lease"], attempt["task"],
                                  images[attempt["frame"]], text, cost)
            except ImageError as error:
                self._fail(worker, attempt, str(error), text)
                good = False
        return ["status=ok" if good else "status=error"]

    # --- inside

    def _worker(self, request: Request) -> int | None:
        """Return the worker that a client is, None when it was removed."""
        client = request.query["client"]
        with self._joining:  # it may ask twice at the same time
            with self._store.read() as tx:
                row = (tx.worker(self._workers[client]) if client in self._workers
                       else tx.worker_by_token(_CLIENT_TOKEN + client))
            if row is not None:
                self._workers[client] = row["id"]
                return None if row["state"] == WorkerState.REMOVED else int(row["id"])
            info = WorkerInfo(client.replace(":", "-"), 1, 0, "HTTPov", {})
            worker, _ = self._farm.join(info, _CLIENT_TOKEN + client, request.remote, True)
            self._farm.receive(worker, self._guest)
            self._workers[client] = worker
            return worker

    def _lease(self, request: Request, worker: int, job: int) -> tuple[str, int] | None:
        """Return lease and job of what a client is to render, of this job or any (0).

        What it has not delivered yet comes first: the answer to an earlier
        request was lost, or it only knows of the job so far.
        """
        with self._store.read() as tx:
            for lease in tx.live_leases():
                if lease["worker"] == worker and job in (0, lease["job"]):
                    self._farm.beat(worker, {lease["id"]: {}}, 0.0)
                    return lease["id"], lease["job"]
        leases = self._farm.lease(worker, Offer(1, 1, 1, job), 0.0, request.alive)
        return (leases[0].id, leases[0].job) if leases else None

    def _attempts(self, request: Request, worker: int) -> list[Row]:
        with self._store.read() as tx:
            return [attempt for attempt in tx.attempts_of_lease(request.query["batch"])
                    if attempt["worker"] == worker]

    def _fail(self, worker: int, attempt: Row, message: str, text: bytes = b"") -> None:
        if attempt["state"] == AttemptState.LIVE:
            self._farm.fail(worker, attempt["lease"], attempt["task"], message, text, False)

    def _name(self, job: Row) -> str:
        """Return what clients call a job: nobody can guess it who was not told."""
        seal = hmac.new(self._access.guest_key.encode(), b"job %d" % job["id"], "sha256")
        place = self._store.job_directory(job["id"], job["name"])
        return f"{place.name}-{seal.hexdigest()[:24]}"

    def _takes(self, tx: Tx, job: Row) -> bool:
        """Tell whether clients make the same pictures of a job as our workers."""
        key = job["manifest"]
        if key not in self._portable:
            files = Manifest.from_wire(json.loads(tx.manifest(key))).files
            self._portable[key] = all(
                file.path.isascii() and file.after_frame is None for file in files)
        return (self._portable[key] and not job["in_order"] and job["radiosity"] != "animation"
                and job["slices"] in ("auto", "off", "1") and _renders_alike(job["pov"]))

    def _entries(self, job: Row, manifest: Manifest) -> Iterator[tuple[str, Path | bytes]]:
        """Yield what is in a job's archive: first of all the directories."""
        pov, top = pov_of(job["pov"]), self._name(job)
        files = {f"{top}/{file.path}": self._store.blob_path(file.sha256)
                 for file in manifest.files if file.path.lower() not in _OWN_INI}
        places = [f"{top}/{place}/" for place in pov.library if place not in (STANDARD, ".")]
        folders = {f"{parent}/" for path in (*files, *(f"{place}x" for place in places))
                   for parent in PurePosixPath(path).parents if parent.name}
        yield from ((folder, b"") for folder in sorted({f"{top}/", *folders}))
        yield f"{top}/pov.ini", client_ini(pov).encode()
        yield from sorted(files.items())


@functools.lru_cache(maxsize=64)
def _renders_alike(text: str) -> bool:
    """Tell whether a command line, as JSON text, gives the same pictures from ``client_ini``."""
    pov = pov_of(text)
    plan = plan_frames(pov.options)
    with contextlib.suppress(UserError):  # of names that are not ASCII
        return (bool(client_ini(pov)) and plan.extension == ".png" and plan.frames.step == 1
                and set(pov.uses) <= {"radiosity", "photons"}
                and pov.run_dir == "." and pov.library[:1] == (STANDARD,)
                and not (plan.animation and plan.initial_frame == plan.final_frame))
    return False


def client_ini(pov: PovJob) -> str:
    """Return the pov.ini with which a client's POV-Ray renders a job's frames.

    POV-Ray's own include files are where the client's own INI file says, which
    comes before this one. A still becomes the first frame of an animation, as
    the client looks for a file with a number. Warnings are not printed: clients
    take "Possible Parse Error", of a scene without assumed_gamma, for an error.
    ``UserError`` for names that an INI file cannot hold.
    """
    plan = plan_frames(pov.options)
    values = {key: value for key, value in pov.values.items()
              if key not in ("Output_File_Name", "Clock")}
    values.update({
        "Antialias": pov.values.get("Antialias", "Off"), "Width": str(pov.options.width),
        "Height": str(pov.options.height), "Output_File_Type": "N", "Output_To_File": "On",
        "Continue_Trace": "Off", "Warning_Console": "Off"})
    declares = list(pov.declares)
    if plan.animation and not pov.thread_safe:
        values["Work_Threads"] = "1"
    if not plan.animation:
        clock = pov.values.get("Clock", "0")
        values.update(Initial_Frame="0", Final_Frame="2", Initial_Clock=clock, Final_Clock=clock)
        number = pov.values.get("Final_Frame", "0")
        declares += [f"final_frame={number}", "initial_clock=0", "final_clock=0"]
    library = [place for place in pov.library if place != STANDARD]
    return to_ini(values, declares, library)


def _lines(*lines: str) -> Response:
    return text_response("".join(f"{line}\n" for line in lines))


def _images(request: Request) -> tuple[dict[int, bytes], bytes, str]:
    """Return the pictures of an upload by their frames, the log, and what is wrong with it."""
    try:
        files = unpack_files(_uploaded(request), MAX_IMAGE)
    except UserError as error:
        return {}, b"", f"{error}"
    images, text = {}, b""
    for path, data in files.items():
        number = re.search(r"_([0-9]{1,9})\.png$", path)
        if number:
            images[int(number[1])] = data
        elif path.endswith("batchreport.txt"):
            text = data
    return images, text, ""


def _uploaded(request: Request) -> bytes:
    """Return the file of a form; ``UserError`` when there is none."""
    kind = re.fullmatch(r'multipart/form-data *; *boundary="?([^";]{1,200})"?',
                        request.headers.get("content-type", ""))
    if kind is not None:
        edge = b"\r\n--" + kind[1].encode()
        for part in (b"\r\n" + request.body.read()).split(edge)[1:-1]:
            head, _, data = part.partition(b"\r\n\r\n")
            if b'name="filedata"' in head:
                return data
    raise UserError("the client sent no file")


# === 13. SHEEPIT =============================================================
# The dialect of SheepIt's clients: decodes their requests below /server,
# calls SCHEDULER, encodes its answers as XML.


# === 14. RENDERONLINE ========================================================
# The dialect of RenderOnline's clients and machines: decodes their JSON, calls
# SCHEDULER, encodes its answers.


# === 15. PAGES ===============================================================
# The status page: plain HTML that loads itself again, and the forms on it. Every
# text is escaped unless it is Html, which only ``element`` makes. Reads through
# API's views, changes things through API and SCHEDULER, decides nothing.

# Not "no-referrer": with that, browsers send "Origin: null" with our own forms.
PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
                               "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin", "Cache-Control": "no-store",
}
BROWSER_TYPES = frozenset({".png", ".jpg", ".jpeg", ".bmp"})  # what <img> can show
JOBS_SHOWN = 48  # on one page
CELLS_SHOWN = 400  # in a grid of frames; of more frames than that, a cell shows several
EVENTS_READ = 400  # of which the story's few lines are made
LOG_SHOWN = 50_000  # characters of POV-Ray's text on a page

Node = Union[None, str, int, Iterable["Node"]]
View = Mapping[str, Any]


class Html(str):
    """Text that is HTML already."""


def element(tag: str, /, *children: Node, **attributes: str | int | None) -> Html:
    """Return an HTML element; everything in it that is not ``Html`` is escaped.

    ``class_`` and ``http_equiv`` are written ``class`` and ``http-equiv``; an
    attribute that is None is left out.
    """
    start = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for name, value in attributes.items() if value is not None)
    end = "" if tag in ("meta", "link", "img", "input") else f"{_markup(children)}</{tag}>"
    return Html(f"<{tag}{start}>{end}")


class Pages:
    """What people see: the farm, a job, a frame, and the forms that steer them."""

    def __init__(self, api: Api, scheduler: Scheduler, access: Access, pin: str = "") -> None:
        self._api = api
        self._farm = scheduler
        self._access = access
        self._pin = pin  # of the certificate that is shown

    @route("GET", "/", role="reader", summary="The status page")
    def home(self, request: Request) -> Response:
        """Show jobs, workers and what happened. Query: before (a job's id), for older jobs."""
        before = _query_digits(request, "before")
        with self._farm.store.read() as tx:
            rows = tx.jobs(before, JOBS_SHOWN)
            older = rows[-1]["id"] if len(rows) == JOBS_SHOWN else None
            shown = {row["id"] for row in rows}
            rows += [row for row in tx.leasable_jobs() if row["id"] not in shown and not before]
            views = [self._view(tx, row) for row in rows]
            workers = self._api.worker_views(tx)
            events = tx.events(tx.last_event() - EVENTS_READ, EVENTS_READ)
        live = [worker for worker in workers if worker["state"] in ("working", "idle")]
        active = any(view["state"] == JobState.ACTIVE for view in views)
        story = _story(events, views, self._farm.clock.time())
        return self._page(
            request, _title(views, self._api.name),
            element("h1", "Older jobs" if before else _summary(views)),
            element("p", _at_hand(live), class_="lead"),
            [self._asks_to_join(request, worker) for worker in workers if "code" in worker],
            _job_cards(views) if views else _no_jobs(),
            element("p", element("a", "Older jobs", href=f"/?before={older}")) if older else None,
            element("div", self._workers(request, workers), story, class_="columns"),
            reload=(3 if active else 30) if live else 5)

    @route("GET", "/jobs/<job:int>", role="reader", summary="The page of a job")
    def job(self, request: Request) -> Response:
        """A job with its frames. Query: from (a frame), to see the frames of its cell."""
        with self._farm.store.read() as tx:
            row = self._row(tx, request)
            view = self._view(tx, row)
            tasks = tx.tasks(row["id"])
            size = -(-len(tasks) // CELLS_SHOWN)
            first = _query_digits(request, "from")
            chosen = [self._api.frame_view(tx, task, {}) for index, task in enumerate(tasks)
                      if size == 1 or tasks[index - index % size]["frame"] == first]
            growing = [self._api.frame_view(tx, task, {}) for task in tx.frames_to_cut(row["id"])]
        reloads = {JobState.ACTIVE: 3, JobState.WAITING: 3, JobState.PAUSED: 30}
        return self._page(
            request, _title([view], view["name"]),
            element("div", _growing(view, growing[0]) if growing
                    else _picture(view, view["newest"], "large"), element(
                "div", element("h1", view["name"]), _badge(_state(view)), _bar(view),
                _figures(view), _warnings(view), self._buttons(request, view),
                _job_links(view)), class_="stage"),
            _storyboard(view, tasks), _frames(view, tasks, chosen, size), _options(view, row),
            reload=reloads.get(view["state"], 0))

    @route("GET", "/jobs/<job:int>/frames/<frame:int>", role="reader", summary="A frame's page")
    def frame(self, request: Request) -> Response:
        """A frame's image, its numbers, and what POV-Ray printed."""
        number = request.params["frame"]
        with self._farm.store.read() as tx:
            row = self._row(tx, request)
            task = tx.task_of_frame(row["id"], number)
            if task is None:
                raise ProtocolError(404, f"job {row['id']} has no frame {number}")
            step = plan_frames(pov_of(row["pov"]).options).frames.step
            near = [to for to in (number - step, number + step)
                    if tx.task_of_frame(row["id"], to) is not None]
            names = {worker["id"]: worker["name"] for worker in tx.workers()}
            view, address = self._view(tx, row), f"/jobs/{row['id']}"
            frame = self._api.frame_view(tx, task, names)
            failures = [] if frame["state"] == TaskState.DONE else [
                attempt["message"] for attempt in tx.attempts(task["id"])
                if attempt["state"] == AttemptState.FAILED]
        text = cast(bytes, self._api.log(request).body).decode()[-LOG_SHOWN:]
        return self._page(
            request, f"Frame {number} · {row['name']}",
            element("h1", element("a", row["name"], href=address)),
            element("p", f"{_frame_name(view, number)} ", _badge(frame["state"]), class_="lead"),
            _picture(view, task, "large") if frame["state"] == TaskState.DONE else
            _growing(view, frame) if "slices" in frame else None,
            [element("p", words, class_="notice failed") for words in failures[-1:]],
            _frame_facts(frame),
            element("nav", [element("a", f"Frame {to}", href=f"{address}/frames/{to}")
                            for to in near], class_="links"),
            _section("What POV-Ray printed", element("pre", text or "Nothing yet.", tabindex=0),
                     id="log"),
            reload=5 if frame["state"] in ("queued", "leased") else 0)

    @route("POST", "/jobs/<job:int>/<action>", role="user", summary="Steer a job by a form")
    def steer(self, request: Request) -> Response:
        """Action: pause, resume, cancel, retry or delete."""
        self._access.check_form(request)
        if request.params["action"] == "delete":
            self._api.delete(request)
            return redirect("/")
        self._api.steer(request)
        return redirect(f"/jobs/{request.params['job']}")

    @route("POST", "/workers/<code>/admit", role="admin", summary="Admit a worker by a form")
    def admit(self, request: Request) -> Response:
        """Admit the worker that shows the code."""
        self._access.check_form(request)
        self._farm.admit(request.params["code"])
        return redirect("/")

    @route("POST", "/workers/<worker:int>/remove", role="admin",
           summary="Remove a worker by a form")
    def remove(self, request: Request) -> Response:
        """Take its work back and let it in no more."""
        self._access.check_form(request)
        self._api.remove_worker(request)
        return redirect("/")

    @route("GET", "/login/<code>", role="anyone", summary="Log a browser in")
    def login(self, request: Request) -> Response:
        """Exchange a login link's code for a cookie."""
        if request.method == "HEAD":  # a link's preview: it must not use the code up
            return redirect("/")
        session = self._access.log_in(request.params["code"], request.remote)
        return self._with_cookie(request, session, "")

    @route("POST", "/logout", role="user", summary="Log a browser out")
    def logout(self, request: Request) -> Response:
        """Let the browser forget its cookie."""
        self._access.check_form(request)
        self._access.log_out(request)
        return self._with_cookie(request, "", "; Max-Age=0")

    @route("GET", "/favicon.svg", role="anyone", summary="The farm's mark")
    @route("GET", "/style.css", role="anyone", summary="How the pages look")
    def look(self, request: Request) -> Response:
        """The style sheet, or the mark; both are asked for once a day at most."""
        style = request.path == "/style.css"
        response = text_response(STYLE if style else MARK,
                                 mime="text/css" if style else "image/svg+xml")
        response.headers["Cache-Control"] = "public, max-age=86400"
        return response

    def error_page(self, request: Request, refusal: ProtocolError) -> Response:
        """Return a page with what is refused, for people to read."""
        text = str(refusal)
        title, words = "That did not work", [f"{text[:1].upper()}{text[1:]}."]
        if refusal.status == 401:
            title, words = "Log in first", [
                "On the computer where the farm runs, type ",
                element("code", "python povfarm.py login"),
                ". Open the link that it prints in this browser."]
        return self._page(
            request, title, element("h1", title), element("p", words, class_="lead"),
            element("p", element("a", "To the farm", href="/", class_="button")),
            status=refusal.status)

    # --- inside

    def _page(self, request: Request, title: str, *body: Node, reload: int = 0,
              status: int = 200) -> Response:
        """Return a whole page that loads itself again after ``reload`` seconds, 0 for never."""
        notice = self._farm.store.notice if request.identity.roles else ""
        still = "still" in request.query
        head = element(
            "head", element("meta", charset="utf-8"), element("title", title),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", http_equiv="refresh", content=reload) if reload and not still else None,
            element("link", rel="icon", href="/favicon.svg"),
            element("link", rel="stylesheet", href=_STYLE_ADDRESS))
        user = self._form(request, "/logout", "Log out") if "user" in request.identity.roles else \
            element("span", "Just looking. To steer: ", element(
                "code", "python povfarm.py login")) if request.identity.roles else None
        mark = element("img", src="/favicon.svg", alt="", width=28, height=28)
        switch = element("a", "Load this page again and again" if still else
                         "Stop loading this page again",
                         href=_same_page(request, **({} if still else {"still": "1"})))
        page = element("html", head, element(
            "body", element("header", element("a", mark, self._api.name, href="/"), user),
            element("main", element("p", notice, class_="notice failed") if notice else None, body),
            element("footer", switch if reload else None,
                    element("span", f"povfarm {VERSION}"))), lang="en")
        response = html_response(f"<!DOCTYPE html>{page}", status)
        response.headers.update(PAGE_HEADERS)
        return response

    def _row(self, tx: Tx, request: Request) -> Row:
        row = tx.job(request.params["job"])
        if row is None:
            raise ProtocolError(404, f"there is no job {request.params['job']}")
        return row

    def _view(self, tx: Tx, job: Row) -> View:
        """Return API's view of a job, and the frame that was finished last as ``newest``."""
        return {**self._api.job_view(tx, job, whole=True), "newest": tx.newest_task_of(job["id"])}

    def _with_cookie(self, request: Request, value: str, more: str) -> Response:
        response = redirect("/")
        more += "; Secure" if request.secure else ""
        cookie = f"{self._access.cookie}={value}; HttpOnly; SameSite=Strict; Path=/{more}"
        response.headers.update({**PAGE_HEADERS, "Set-Cookie": cookie})
        return response

    def _form(self, request: Request, address: str, label: str, kind: str | None = None) -> Html:
        token = self._access.form_token(request)
        return element("form", element("input", type="hidden", name="token", value=token),
                       element("button", label, class_=kind), method="post", action=address)

    def _asks_to_join(self, request: Request, worker: View) -> Html:
        code = worker["code"]
        how = self._form(request, f"/workers/{code}/admit", "Admit", "good") \
            if "admin" in request.identity.roles else element(
                "span", "To let it in: ", element("code", f"python povfarm.py admit {code}"))
        return element("div", element("p", element("strong", worker["name"]), " asks to join. "
                                      "Does it show the code ", element("strong", code), "?"),
                       how, class_="notice")

    def _workers(self, request: Request, workers: Sequence[View]) -> Html:
        """Return the table of the workers, and what to type to be one."""
        heads = ["Name", "State", "Cores", "Renders", "POV-Ray", "Heard of"]
        admin = "admin" in request.identity.roles
        rows = [element("tr", element("th", worker["name"], scope="row"), [
            element("td", cell) for cell in (
                [_badge(worker["state"]), f" {worker.get('reason', '')}"], worker["cores"],
                worker["runs"], worker["engines"].get("povray", ""),
                "long ago" if worker["seen"] is None else _ago(worker["seen"]))],
            element("td", self._asked(request, "Remove…", f"/workers/{worker['id']}/remove",
                                      "Let it in no more")) if admin else None)
            for worker in sorted(workers, key=lambda worker: _WORKER_ORDER.index(worker["state"]))]
        table = element("table", element("thead", element(
            "tr", [element("th", head, scope="col") for head in heads],
            element("td") if admin else None)), element("tbody", rows))
        host = request.headers.get("host", "")
        if not re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", host):  # it is to be pasted into a shell
            host = "HOST:2271"
        here = re.match(r"localhost|127\.|\[::1\]", host)
        server = f"https://{host} --pin {self._pin}" if self._pin else f"http://{host}"
        return _section(
            "Workers", element("div", table, class_="scroll") if workers else None,
            element("p", "Any computer with Python and POV-Ray can help. "
                    f"{'On this one, type' if here else 'Type there'}:"),
            element("pre", f"python povfarm.py work --server {server}"),
            element("p", "On another one leave --server out: it looks for the farm by itself."))

    def _asked(self, request: Request, word: str, address: str, label: str) -> Html:
        """Return a link to the same page with a form in its place; that page does not reload."""
        if request.query.get("ask") != address:
            return element("a", word, class_="button asks",
                           href=f"{_same_page(request, still='1', ask=address)}#asked")
        return element("div", self._form(request, address, label, "bad"),
                       element("a", "No", class_="button", href=_same_page(request)),
                       class_="row", id="asked")

    def _buttons(self, request: Request, view: View) -> Node:
        """Return what can be done to a job; only an ended one can be deleted, after a question."""
        if "user" not in request.identity.roles:
            return None
        state, frames, address = JobState(view["state"]), view["frames"], f"/jobs/{view['id']}"
        possible = {
            "Resume": state is JobState.PAUSED,
            "Pause": (state, JobState.PAUSED) in JOB_TRANSITIONS,
            "Cancel": (state, JobState.CANCELLED) in JOB_TRANSITIONS,
            "Retry": frames["failed"] + frames["cancelled"] > 0,
        }
        delete = self._asked(request, "Delete…", f"{address}/delete", "Delete it and "
                             + _count_of(frames["done"], "image")) if state in FINISHED else None
        return element("div", [self._form(request, f"{address}/{action.lower()}", action)
                               for action, can in possible.items() if can], delete, class_="row")


# --- parts of pages

def _same_page(request: Request, **query: str) -> str:
    """Return the address of a request's page, which reloads and asks nothing unless told here."""
    kept = {name: value for name, value in request.query.items() if name not in ("still", "ask")}
    text = urllib.parse.urlencode({**query, **kept})
    return f"{request.path}?{text}" if text else request.path


_STATE_WORDS: Mapping[str, str] = {
    "waiting": "… waiting for its files", "active": "◷ waiting for its turn",
    "rendering": "● rendering", "paused": "‖ paused", "done": "✓ finished", "failed": "✕ failed",
    "cancelled": "⊘ cancelled", "queued": "◷ queued", "leased": "● in work",
    "working": "● working", "idle": "○ idle", "gone": "◌ gone", "sick": "✕ sick",
    "pending": "? asks to join",
}
_WORKER_ORDER = ("pending", "working", "idle", "sick", "gone")
# What happened, after the name of a job, a frame or a worker.
_EVENT_WORDS: Mapping[str, str] = {
    "submitted": "was submitted", "job active": "is ready to render", "job done": "is finished",
    "job failed": "ended with failed frames", "job paused": "is paused",
    "job cancelled": "was cancelled", "job waiting": "waits for its files", "done": "is done",
    "queued": "is queued again", "cancelled": "was cancelled", "changed": "was changed",
    "removed": "was removed", "doubtful": "is doubtful", "set aside": "has odd pictures",
    "admitted": "was let in", "deleted": "was deleted",
}
_PART_WORDS: Mapping[str, str] = {"slice": ", a slice of it,", "pass": ", what its slices share,"}


def _markup(node: Node) -> str:
    if node is None or isinstance(node, Html):
        return node or ""
    if isinstance(node, (str, int)):
        return html.escape(str(node))
    return "".join(_markup(child) for child in node)


def _query_digits(request: Request, name: str) -> int:
    text = request.query.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else 0


def _count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _ago(seconds: float) -> str:
    for limit, unit, word in ((100, 1, "s"), (5400, 60, "min"), (130_000, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {word} ago" if seconds >= 5 else "now"
    return f"{_count_of(int(seconds / 86400 + 0.5), 'day')} ago"


def _frame_name(view: View, frame: int) -> str:
    return "The image" if view["frames"]["total"] == 1 else f"Frame {frame}"


def _state(view: View) -> str:
    busy = view["state"] == JobState.ACTIVE and view["frames"]["leased"]
    return "rendering" if busy else str(view["state"])


def _ended(view: View) -> bool:
    return JobState(view["state"]) in FINISHED


def _section(title: str, *children: Node, **attributes: str) -> Html:
    return element("section", element("h2", title), *children, **attributes)


def _badge(state: str) -> Html:
    return element("span", _STATE_WORDS[state], class_=f"badge {state}")


def _busy(views: Sequence[View]) -> list[View]:
    return [view for view in views if _state(view) == "rendering"]


def _title(views: Sequence[View], name: str) -> str:
    return "".join(f"{100 * view['progress']:.0f} % {view['name']} · "
                   for view in _busy(views)[:1]) + name


def _summary(views: Sequence[View]) -> str:
    busy = _busy(views)
    if not busy:
        idle = [view["name"] for view in views if view["state"] == JobState.ACTIVE]
        return f"{idle[0]} is waiting" if idle else "Nothing to render"
    more = f" and {_count_of(len(busy) - 1, 'more job')}" if len(busy) > 1 else ""
    left = max(view["eta"] or 0.0 for view in busy)
    return f"Rendering {busy[0]['name']}{more}" + (
        f", about {format_duration(left)} left" if left else "")


def _at_hand(live: Sequence[View]) -> str:
    cores = sum(worker["cores"] for worker in live)
    return (f"{_count_of(len(live), 'worker')} with {_count_of(cores, 'core')} at hand"
            if live else "No worker is here")


def _bar(view: View) -> Html:
    """Return a job's progress as a picture, in thousandths: done, in work, failed."""
    total = max(view["frames"]["total"], 1)
    done, failed = view["frames"]["done"] / total, view["frames"]["failed"] / total
    rects = [element("rect", class_=name, x=f"{1000 * x:.1f}", width=f"{1000 * part:.1f}", height=1)
             for name, x, part in (("done", 0.0, done), ("live", done, view["progress"] - done),
                                   ("failed", view["progress"], failed))]
    return element("svg", rects, class_="bar", viewBox="0 0 1000 1", preserveAspectRatio="none",
                   role="img", aria_label=f"{100 * view['progress']:.0f} percent")


def _facts(facts: Mapping[str, str | None]) -> Html:
    return element("dl", [element("div", element("dt", name), element("dd", value))
                          for name, value in facts.items() if value])


def _figures(view: View) -> Html:
    frames, slices, rate = view["frames"], view["slices"], 3600 * view["rate"]
    still = frames["total"] == 1
    return _facts({
        "frames": None if still else f"{frames['done']:,} of {frames['total']:,}",
        "slices done": f"{slices['done']}" if slices["total"] else None,
        "finished": f"{100 * view['progress']:.0f} %" if still and not _ended(view) else None,
        "an hour": None if still or not rate else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
        "left": f"≈ {format_duration(view['eta'])}"
                if view["eta"] and not _ended(view) else None,
        "spent": format_duration(view["elapsed"]) if view["started"] else None,
        "failed": f"{frames['failed']:,}" if frames["failed"] else None,
    })


def _warnings(view: View) -> Node:
    failure = view["failure"]
    address = failure and f"/jobs/{view['id']}/frames/{failure['frame']}#log"
    return [
        element("p", f"Paused: {view['reason']}", class_="notice") if view["reason"] else None,
        element("p", view["waiting_for"], class_="notice") if view["waiting_for"] else None,
        element("p", element("a", f"{_frame_name(view, failure['frame'])} failed", href=address),
                f": {failure['message']}", class_="notice failed") if failure else None,
    ]


def _picture(view: View, task: Row | None, kind: str = "") -> Html:
    """Return the image of a finished task, or a box that says why there is none."""
    content, address = element("span", "No image" if _ended(view) else "No image yet"), ""
    if task is not None and task["state"] == TaskState.DONE:
        suffix = PurePosixPath(task["name"]).suffix.lower()
        address = f"/api/v1/jobs/{view['id']}/frames/{task['frame']}/image"
        content = element(
            "img", src=address, alt=f"frame {task['frame']} of {view['name']}",
            width=view["width"], height=view["height"]) if suffix in BROWSER_TYPES else element(
            "span", f"{suffix[1:].upper()} image: a browser cannot show it")
    return element("div", element("a", content, href=address) if kind and address else content,
                   class_=f"picture {kind}")


def _growing(view: View, frame: View) -> Html:
    """Return a frame as far as its slices are there, each in its place."""
    shown = PurePosixPath(frame["name"]).suffix.lower() in BROWSER_TYPES
    parts = []
    for part in frame["slices"]:
        place = {"x": 0, "y": part["top"], "width": view["width"],
                 "height": part["bottom"] - part["top"]}
        if part["state"] == TaskState.DONE and shown:
            address = f"/api/v1/jobs/{view['id']}/slices/{part['id']}/image"
            parts.append(element("image", href=address, **place))
        else:
            words = f"rows {part['top']} to {part['bottom'] - 1}: {_STATE_WORDS[part['state']]}"
            parts.append(element("rect", element("title", words), class_=part["state"], **place))
    done = sum(part["state"] == TaskState.DONE for part in frame["slices"])
    return element("div", element(
        "svg", parts, viewBox=f"0 0 {view['width']} {view['height']}", role="img",
        aria_label=f"{_frame_name(view, frame['frame'])}, {done} slices of it finished"),
        class_="picture large")


def _job_card(view: View) -> Html:
    counts = _count_of(view["frames"]["done"], "frame")
    return element(
        "article", _picture(view, view["newest"]), element(
            "div", element("h3", element("a", view["name"], href=f"/jobs/{view['id']}")),
            _badge(_state(view)),
            element("p", f"{counts} in {format_duration(view['elapsed'])}") if _ended(view) else
            [_bar(view), _figures(view)], _warnings(view)), class_="card")


def _job_cards(views: Sequence[View]) -> Node:
    going = sorted((view for view in views if not _ended(view)),
                   key=lambda view: _state(view) != "rendering")
    return [_section(title, element("div", map(_job_card, some), class_=f"cards {title.lower()}"))
            for title, some in (("Jobs", going), ("Ended", list(filter(_ended, views)))) if some]


def _no_jobs() -> Html:
    return element(
        "section", element("img", src="/favicon.svg", alt="", width=120, height=120),
        element("p", "Give the farm a scene. In the directory where it is, type:"),
        element("pre", "python povfarm.py submit scene.pov +W640 +H480"), class_="empty")


def _story(events: Sequence[Row], views: Sequence[View], now: float) -> Node:
    """Return the newest events in words; frames with the same fate share a line."""
    known = {view["id"]: view for view in views}
    lines: dict[Any, list[Row]] = {}
    for event in reversed(events):
        if not event["what"].endswith(TaskState.LEASED.value):
            same = (event["job"], event["what"], event["text"])
            lines.setdefault(event["id"] if event["frame"] is None else same, []).append(event)
    items = [element("li", _event_line(line[0], len(line) - 1, known), " ", element(
        "time", _ago(now - line[0]["time"]))) for line in itertools.islice(lines.values(), 14)]
    return _section("What happened", element("ul", items, class_="story")) if items else None


def _event_line(event: Row, more: int, views: Mapping[int, View]) -> Node:
    job, text = event["job"], event["text"]
    kind, _, what = event["what"].rpartition(" ")
    part = _PART_WORDS.get(kind)
    what = what if part else event["what"]
    words = f" {_EVENT_WORDS.get(what, what)}"
    if job is None or what == "deleted":
        return [element("strong", text), words]
    view = views.get(job)
    whole = event["frame"] is None or (view is not None and view["frames"]["total"] == 1)
    return [element("a", view["name"], href=f"/jobs/{job}") if view else f"job {job}",
            None if whole else f" frame {event['frame']}", part, words,
            f", and {more:,} before it" if more else None, f": {text}" if text else None]


def _job_links(view: View) -> Html:
    address, shown = f"/jobs/{view['id']}", view["failure"] or view["newest"]
    return element(
        "nav", element("a", "All images (zip)", href=f"/api/v1{address}/archive.zip")
        if view["frames"]["done"] else None,
        element("a", f"{_frame_name(view, shown['frame'])}: log",
                href=f"{address}/frames/{shown['frame']}#log") if shown else None, class_="links")


def _storyboard(view: View, tasks: Sequence[Row]) -> Node:
    """Return eight images from all over an animation, the same ones at every look."""
    if len(tasks) < 8 or not view["frames"]["done"] or view["extension"] not in BROWSER_TYPES:
        return None
    return _section("Storyboard", element("div", [
        element("a", _picture(view, task), f"Frame {task['frame']}",
                href=f"/jobs/{view['id']}/frames/{task['frame']}")
        for task in (tasks[part * len(tasks) // 8] for part in range(8))], class_="cards board"))


def _cell(job: int, frame: View) -> Html:
    state, number = frame["state"], frame["frame"]
    text, tenth = str(number), ""
    if state == TaskState.LEASED and frame["progress"]:
        text, tenth = f"{100 * frame['progress']:.0f}%", f" p{int(10 * frame['progress'])}"
    return element("a", text, class_=state + tenth, title=f"frame {number}: {_STATE_WORDS[state]}",
                   href=f"/jobs/{job}/frames/{number}{'#log' if state == 'failed' else ''}")


def _block(job: int, tasks: Sequence[Row]) -> Html:
    """Return one cell for several frames, in the state that a person should look at first."""
    counts = collections.Counter(task["state"] for task in tasks)
    states = [state for state in ("failed", "leased", "cancelled", "queued", "done")
              if counts[state]]
    tenth = f" p{10 * counts['done'] // len(tasks)}" if states[0] in ("leased", "queued") else ""
    first, told = tasks[0]["frame"], ", ".join(
        f"{counts[state]} {_STATE_WORDS[state]}" for state in states)
    return element("a", first, class_=states[0] + tenth, href=f"/jobs/{job}?from={first}#part",
                   title=f"frames {first} to {tasks[-1]['frame']}: {told}")


def _frames(view: View, tasks: Sequence[Row], chosen: Sequence[View], size: int) -> Html:
    """Return a cell for each frame, or for each ``size`` frames and then for each chosen one."""
    job, frames = view["id"], view["frames"]
    legend = [element("li", element("span", _STATE_WORDS[state][0], class_=state),
                      f"{frames[state]:,}{_STATE_WORDS[state][1:]}")
              for state in ("done", "leased", "queued", "failed", "cancelled") if frames[state]]
    blocks = None if size == 1 else [
        element("p", f"A cell is {size} frames: choose one to see them."),
        element("div", [_block(job, tasks[index:index + size])
                        for index in range(0, len(tasks), size)], class_="grid"),
        element("h3", f"Frames {chosen[0]['frame']} to {chosen[-1]['frame']}") if chosen else None]
    return _section(
        "Frames", element("ul", legend, class_="legend"), blocks,
        element("div", [_cell(job, frame) for frame in chosen], class_="grid", id="part"))


def _options(view: View, row: Row) -> Html:
    pov = json.loads(row["pov"])
    options = [f"{name}={value}" for name, value in sorted(pov["values"].items())]
    options += [f"Declare={declare}" for declare in pov["declares"]]
    return _section("Options", _facts({
        "job": str(view["id"]), "submitted by": view["owner"], "priority": str(view["priority"]),
        "most workers": str(view["max_workers"] or "no limit"),
        "tries for a frame": str(view["retry_limit"]),
        "in order": "yes" if view["in_order"] else None,
        "processor time": format_duration(view["cpu"]),
    }), element("p", [[element("code", option), " "] for option in options]))


def _frame_facts(frame: View) -> Html:
    facts = {"file": frame["name"], "failed tries": str(frame["tries"] or "")}
    if frame["state"] == TaskState.DONE:
        facts.update({
            "size": format_size(frame["size"]), "rendered by": frame["worker"],
            "took": format_duration(frame["wall"]), "processor time": format_duration(frame["cpu"]),
            "memory": format_size(frame["memory"]) if frame["memory"] else ""})
    return _facts(facts)


# --- how it looks: a glass marble on a chequered floor, and the style sheet

MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><radialGradient id="g" cx=".36" '
    'cy=".28" r=".8"><stop offset="0" stop-color="#fff"/><stop offset=".22" stop-color="#8fe3d0"/>'
    '<stop offset=".62" stop-color="#1c8a76"/><stop offset="1" stop-color="#06342d"/>'
    '</radialGradient><path fill="#d8cfb8" d="M6 20h20l6 11H0z"/><path fill="#6f553a" d="M6 20h5'
    'l-1.3 4.5H3.5zM16 20h5l1.3 4.5H16zM9.7 24.5H16V31H8zM22.3 24.5h6.2L32 31h-8z"/>'
    '<circle cx="16" cy="13" r="12" fill="url(#g)"/></svg>'
)
STYLE = """\
:root { color-scheme: light dark; --bg: #f4f2ec; --card: #fffefb; --ink: #1d2126; --dim: #575d65;
  --line: #dcd8cd; --mat: #e9e5db; --link: #1c57a5; --done: #1b7765; --live: #976000;
  --bad: #b3261e; --on: #fff; --glow: #f3dfb0; }
@media (prefers-color-scheme: dark) { :root { --bg: #101317; --card: #181c22; --ink: #e6e9ed;
  --dim: #9ca5b0; --line: #2c333c; --mat: #0a0c0e; --link: #93beff; --done: #46b39b;
  --live: #f0b850; --bad: #ff8d7e; --on: #07110f; --glow: #5a4416; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 0 clamp(1rem, 3vw, 2.5rem); color: var(--ink);
  background: var(--bg); overflow-wrap: anywhere; font: 1rem/1.55 system-ui, "Segoe UI", Roboto,
  "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
header, footer, .notice, .row, .links, .legend { display: flex; flex-wrap: wrap;
  gap: .5rem 1rem; align-items: center; }
header, footer { padding: 1rem 0; color: var(--dim); font-size: .875rem; }
header, footer, div.notice { justify-content: space-between; }
header a { display: flex; gap: .6rem; align-items: center; color: inherit; font-weight: 600;
  text-decoration: none; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); }
h1 { margin: .5rem 0; font-size: clamp(1.6rem, 4vw, 2.3rem); font-weight: 650; line-height: 1.2; }
h2 { margin: 2.2rem 0 .8rem; font-size: 1.05rem; } h3 { margin: 0; font-size: 1.15rem; }
.grid + h3 { margin: 1.2rem 0 .6rem; }
p { margin: .5rem 0; } ul { margin: 0; padding: 0; list-style: none; }
a { color: var(--link); text-underline-offset: .2em; } h1 a { color: inherit;
  text-decoration-thickness: .06em; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: .3rem; }
.lead, dt, time, thead, section > p { color: var(--dim); } .lead { font-size: 1.1rem; }
.cards { display: grid; gap: 1.25rem; }
.jobs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.ended { grid-template-columns: repeat(auto-fill, minmax(clamp(9rem, 18vw, 13rem), 1fr)); }
.card { position: relative; overflow: hidden; border: 1px solid var(--line);
  border-radius: .9rem; background: var(--card); }
.card:hover { border-color: var(--dim); } .card > :last-child { padding: 1rem 1.2rem 1.1rem; }
.card h3 a { color: inherit; text-decoration: none; }
.card h3 a::after { content: ""; position: absolute; inset: 0; }
.picture { display: grid; grid-template: minmax(0, 1fr) / minmax(0, 1fr); place-items: center;
  overflow: hidden; aspect-ratio: 16 / 9; background: var(--mat); color: var(--dim);
  text-align: center; }
.picture span { padding: 1rem; }
.picture img { display: block; width: 100%; height: 100%; object-fit: contain; }
.large { min-height: 12rem; aspect-ratio: auto; border-radius: .9rem; }
.large img { width: auto; height: auto; max-width: 100%; max-height: 80vh; }
.large svg { display: block; width: 100%; max-height: 80vh; stroke: var(--mat); }
.large .leased { fill: var(--glow); } .large .queued { fill: var(--line); }
.large .done { fill: var(--done); } .large .failed { fill: var(--bad); }
.large + dl { margin-top: 1rem; } .stage .large a, .stage .large img { width: 100%; }
.board { gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.board a { color: var(--dim); font-size: .8rem; text-decoration: none; }
.board .picture { border-radius: .4rem; } .board span { visibility: hidden; }
@media (min-width: 56rem) { .columns, .stage, .jobs > :only-child { display: grid;
    gap: 0 3rem; grid-template-columns: 3fr 2fr; }
  .stage, .jobs > :only-child { align-items: center; } .jobs:has(> :only-child) {
    display: block; } .jobs > :only-child { gap: 0; } }
.badge { display: inline-block; color: var(--dim); font-size: .9rem; font-weight: 600; }
.badge.done, .badge.idle { color: var(--done); } .badge.failed, .badge.sick { color: var(--bad); }
.badge.rendering, .badge.working, .badge.leased, .badge.pending { color: var(--live); }
.bar { display: block; width: 100%; height: .6rem; margin: .5rem 0 .8rem; border-radius: .3rem;
  background: var(--line); }
.bar .done { fill: var(--done); } .bar .live { fill: var(--live); }
.bar .failed { fill: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.3rem; margin: 0; }
dt { font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.notice { margin: 1rem 0; padding: .7rem 1rem; border: 1px solid var(--line); border-left:
  .3rem solid var(--live); border-radius: .5rem; background: var(--card); }
.notice.failed { display: block; border-left-color: var(--bad); } .notice a { position: relative; }
.card .notice { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
  overflow: hidden; margin: .8rem 0 0; padding: 0 0 0 .7rem; border-width: 0 0 0 .2rem;
  border-radius: 0; font-size: .85rem; }
.row, .links { margin: 1rem 0; align-items: start; }
button, .button { display: inline-block; padding: .4rem 1rem; font: inherit;
  border: 1px solid var(--dim); border-radius: .5rem; background: var(--card); color: var(--ink);
  text-decoration: none; cursor: pointer; }
button:hover, .button:hover { border-color: var(--ink); }
.good { background: var(--done); color: var(--on); } .asks { color: var(--bad); }
.bad { background: var(--bad); color: var(--on); }
code, pre { font: .9em/1.5 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
section > p code { margin-right: .7em; }
pre { overflow: auto; max-height: 40rem; padding: .8rem 1rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--card); }
.empty { padding: 2rem 0; text-align: center; } .empty pre { display: inline-block; }
.scroll { margin-bottom: 1rem; overflow-x: auto; } table { width: 100%; border-collapse: collapse; }
th, td { padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); font-weight: 400;
  text-align: left; overflow-wrap: normal; } thead { font-size: .8rem; }
td, time, thead th { white-space: nowrap; } tbody th { min-width: 8rem; font-weight: 600; }
.story li { padding: .3rem 0; } time { font-size: .85rem; }
.legend { margin-bottom: .8rem; } .legend span { display: inline-block; width: 1.8rem;
  margin-right: .4rem; }
.grid { display: grid; gap: 3px; grid-template-columns: repeat(auto-fill, minmax(3rem, 1fr)); }
.grid a, .legend span { border: 1px solid var(--dim); border-radius: .25rem; color: var(--dim);
  font-size: .75rem; line-height: 1.6rem; text-align: center; text-decoration: none; }
.grid .done, .legend .done { border-color: var(--done); background: var(--done); color: var(--on); }
.grid .leased, .legend .leased { outline: 2px solid var(--live); outline-offset: -2px;
  color: var(--ink); }
.grid .queued, .legend .queued { border-style: dashed; }
.grid .failed, .legend .failed { border-color: var(--bad); background: var(--bad);
  color: var(--on); font-weight: 700; } .grid .failed::before { content: "✕ "; }
.grid .cancelled, .legend .cancelled { background: var(--line); }
.grid .cancelled { text-decoration: line-through; }
.grid [class*=" p"] { background: linear-gradient(var(--glow) 0 0) bottom / 100% 0 no-repeat; }
""" + "".join(f".grid .p{tenth} {{ background-size: 100% {tenth}0%; }}\n" for tenth in range(1, 11))
_STYLE_ADDRESS = f"/style.css?{hashlib.sha256(STYLE.encode()).hexdigest()[:12]}"


# === 16. COORDINATOR =========================================================
# Puts sections 9 to 15 together: one data directory, one port, one beacon, and
# a thread that keeps house. Decides nothing about jobs.

HOUSEKEEPING = 1.0  # seconds between two looks for leases that have run out
TIDYING = 3600.0  # seconds between two clean-ups of what nobody needs


class Coordinator:
    """A farm that serves: made, then ``start``ed, then ``stop``ped.

    ``port`` 0 picks a free port; ``url`` tells which. ``discovery_port`` None
    answers no probes. ``hosts`` are names that this computer has beside its
    own. ``tls`` are the PEM files of a certificate and its key; ``pin`` is then
    the certificate's SHA-256. ``httpov`` lets HTTPov's clients in. Raises
    ``UserError`` for a port in use or a bad certificate and ``StoreError`` for a
    data directory that cannot be used or that another povfarm holds.
    """

    def __init__(self, data: Path, *, bind: str = "", port: int = 0, name: str = "",
                 discovery_port: int | None = None, admit_private: bool = False,
                 private: bool = False, hosts: Collection[str] = (),
                 tls: tuple[Path, Path] | None = None, durable: bool = True,
                 lease_time: float = 30.0, httpov: bool = False,
                 clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.data = data
        context, self.pin = _tls_context(*tls) if tls else (None, "")
        self.key = farm_key(data)
        self._lock = _hold(data)
        self.store = Store(data, durable)
        self.store.sweep()
        with self.store.tx() as tx:
            if not tx.meta("farm_id"):
                tx.set_meta("farm_id", secrets.token_hex(8))
            farm_id = tx.meta("farm_id")
        self.name = name or socket.gethostname()
        self.scheduler = Scheduler(self.store, self.clock, lease_time)
        self.access = Access(self.store, self.key, private, self.clock)
        self.api = Api(self.scheduler, self.access, self.name, admit_private)
        pages = Pages(self.api, self.scheduler, self.access, self.pin)
        dialects = [Httpov(self.scheduler, self.access)] if httpov else []
        self.router = Router(self.api, pages, *dialects, authenticate=self.access.identify,
                             hosts=_own_names(hosts), error_page=pages.error_page)
        self.api.routes = self.router.routes
        self.server = Server(self.router, bind or "0.0.0.0", port, context)
        host = "127.0.0.1" if bind in ("", "0.0.0.0", "::") else bind
        host = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self.beacon = None if discovery_port is None else Beacon(
            name=self.name, farm_id=farm_id, url_port=self.port, farm_key=self.key.encode(),
            pin=self.pin, port=discovery_port)
        self._stopped = threading.Event()
        self._house = threading.Thread(target=self._keep_house, name="house", daemon=True)

    @property
    def port(self) -> int:
        """The TCP port that is served."""
        return self.server.port

    def start(self) -> None:
        """Serve, and note in the data directory where."""
        self.server.start()
        if self.beacon is not None:
            self.beacon.start()
        self._house.start()
        note = {"url": self.url, "pin": self.pin, "name": self.name, "pid": os.getpid()}
        atomic_write(self.data / "coordinator.json", json.dumps(note).encode())

    def stop(self) -> None:
        """Answer everybody who waits, and stop serving. Leases live on in the database."""
        self._stopped.set()
        self.scheduler.close()
        if self.beacon is not None:
            self.beacon.stop()
        self.server.stop()
        if self._house.is_alive():
            self._house.join()
        (self.data / "coordinator.json").unlink(missing_ok=True)
        self.store.close()
        self._lock.close()

    def _keep_house(self) -> None:
        tidied = self.clock.monotonic()
        while not self._stopped.wait(HOUSEKEEPING):
            try:
                self.scheduler.look_for_room()
                self.scheduler.expire()
                if self.clock.monotonic() - tidied > TIDYING:
                    tidied = self.clock.monotonic()
                    self.scheduler.tidy()
            except NoRoom:
                pass  # the notice says it
            except (FarmError, OSError, sqlite3.Error):
                log.exception("housekeeping failed; it is tried again")


def farm_key(data: Path) -> str:
    """Return the farm key of a data directory, made at the first call."""
    path = data / "farm.key"
    try:
        data.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            atomic_write(path, secrets.token_hex(32).encode(), 0o600)
        key = path.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise StoreError(f"the data directory {data} cannot be used: {error.strerror}") from None
    if not key:
        raise StoreError(f"{path} is empty: delete it, and a new farm key is made")
    return key


def _own_names(more: Collection[str]) -> Collection[str]:
    """Return the names, in lower case, by which browsers may know this computer."""
    name = socket.gethostname()
    short = name.partition(".")[0]
    return {one.strip(" .").lower() for one in
            ("localhost", name, short, f"{short}.local", f"{name}.local", *more)} - {""}


def own_certificate(data: Path, names: Collection[str] = ()) -> tuple[Path, Path]:
    """Return a certificate of our own and its key, made at the first call, as PEM files."""
    certificate, key = data / "tls.crt", data / "tls.key"
    if certificate.is_file() and key.is_file():
        return certificate, key
    known = sorted(name for name in _own_names(names) if re.fullmatch("[a-z0-9.-]+", name))
    try:
        data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data) as place:
            Path(place, "config").write_text(_OPENSSL_CONFIG + ", ".join(
                ["IP:127.0.0.1", *(f"DNS:{name}" for name in known)]) + "\n", encoding="ascii")
            subprocess.run(
                ["openssl", "req", "-x509", "-config", "config", "-newkey", "ec", "-pkeyopt",
                 "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650", "-keyout", "key",
                 "-out", "certificate"], cwd=place, check=True, capture_output=True,
                stdin=subprocess.DEVNULL, timeout=60)
            atomic_write(key, Path(place, "key").read_bytes(), 0o600)
            atomic_write(certificate, Path(place, "certificate").read_bytes())
    except FileNotFoundError:
        raise UserError(
            "--tls auto needs the program openssl, to make a certificate: install it (sudo apt-get "
            "install openssl), or name a certificate with --tls-cert") from None
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", b"") or str(error).encode()
        raise StoreError("no certificate could be made: "
                         + words.decode(errors="replace").strip().splitlines()[-1]) from error
    return certificate, key


_OPENSSL_CONFIG = """\
[req]
distinguished_name = name
x509_extensions = more
prompt = no
[name]
CN = povfarm
[more]
subjectAltName = """


def _tls_context(certificate: Path, key: Path) -> tuple[ssl.SSLContext, str]:
    """Return what a server needs, and the SHA-256 of the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # clients keep connections, and take what arrives for an answer
    try:
        # Without a password, an empty one, it would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password=str)
        found = re.findall("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----",
                           certificate.read_text(encoding="latin-1"), re.DOTALL)
        der = ssl.PEM_cert_to_DER_cert("".join(found[:1]))
    except (OSError, ValueError) as error:
        raise UserError(f"the certificate {certificate} with the key {key} cannot be used: "
                        f"{getattr(error, 'reason', None) or error}") from None
    return context, hashlib.sha256(der).hexdigest()


def _hold(data: Path) -> BinaryIO:
    """Lock the data directory for this process; the lock goes when the process goes."""
    try:
        file = open(data / "farm.lock", "ab")  # noqa: SIM115 - held until stop
    except OSError as error:
        raise StoreError(f"the data directory {data} cannot be used: {error.strerror}") from None
    try:
        hold_file(file)
    except OSError:
        file.close()
        raise StoreError(f"another povfarm uses {data}: give this one its own --data") from None
    return file


# === 17. ENGINES =============================================================
# What a renderer is: how it is found, the command line and the files that make
# it render the tasks of a lease, and how to read what it prints. Starts nothing.


@dataclass(frozen=True)
class Run:
    """One start of a renderer: ``frames`` are the numbers that it will render, in order.

    ``tree`` is the project's directory, ``place`` the run's own empty
    directory, where it runs and writes: relative names are looked for there
    first and then, by library paths, in the project, so that runs at the same
    time cannot meet. (POV-Ray 3.7 looks for every file that it reads in its
    current directory first and then in the library paths, in order.)
    """

    lease: LeaseSpec
    tree: Path
    place: Path
    frames: tuple[int, ...]

    @property
    def output_file(self) -> str:
        """What POV-Ray is told to call its images; ASCII, whatever they are called later.

        It ends in the type's own extension, which POV-Ray takes off again
        once, so that dots in the name stay.
        """
        options = self.lease.pov.options
        stem = PurePosixPath(plan_frames(options).stem).name
        return (stem if _is_plain(stem) else "image") + options.extension

    def made(self, frame: int) -> Path:
        """Return the image that the run makes of a frame: where the scene expects it."""
        plan = plan_frames(self.lease.pov.options)
        name = PurePosixPath(plan.output_name(frame))
        inside = not name.is_absolute() and ".." not in name.parts and _is_plain(str(name.parent))
        stem = PurePosixPath(plan.stem).name
        number = "" if _is_plain(stem) else name.name[len(stem):]
        return self.place / (name.parent if inside else "") / (
            f"image{number}" if number else name.name)

    @property
    def state(self) -> Path:
        """Where POV-Ray keeps what is finished of the first frame, and looks for it to go on."""
        return self.made(self.frames[0]).with_suffix(".pov-state")

    def scene_files(self) -> dict[str, tuple[int, int]]:
        """Return the files in its place that may be the scene's: time in ns and size, by name."""
        own = {self.made(frame) for frame in self.frames}
        found = {}
        for folder, _, names in os.walk(self.place):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.place).as_posix()
                if path in own or _OWN_FILES.fullmatch(path.name) or not may_be_written(name):
                    continue
                with contextlib.suppress(OSError):  # POV-Ray may have deleted it just now
                    about = path.lstat()
                    if stat.S_ISREG(about.st_mode):
                        found[name] = about.st_mtime_ns, about.st_size
        return found

    @property
    def block(self) -> int:
        """The edge of the blocks, in pixels, in which the run renders."""
        options = self.lease.pov.options
        whole = self.lease.tasks[0].kind is TaskKind.FRAME
        return block_size(options) if whole else slice_block(options)

    @property
    def region(self) -> Region:
        """What the run renders of its frames."""
        region, task = region_of(self.lease.pov.options), self.lease.tasks[0]
        if task.kind is TaskKind.FRAME:
            return region
        return replace(region, top=max(region.top, task.top),
                       bottom=min(region.bottom, task.bottom))


@dataclass(frozen=True)
class Command:
    """What to start: a program, its environment, and files and links to make first.

    ``reads`` is all that it may read besides its own directory and the
    system's programs and libraries.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[Path, str]
    links: Mapping[Path, Path]
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """A POV-Ray of this machine; ``library`` holds its own include directories."""

    program: str
    version: str
    library: tuple[str, ...]

    def command(self, run: Run) -> Command:
        """Return how to render a run.

        Everything is in one INI file that POVINI names: no other INI file of
        this machine is read, so every worker renders the same picture. What it
        names is linked into the run's place under short ASCII names: POV-Ray
        3.7 garbles other letters there, also those of a home directory, and
        breaks long names in what it prints.
        """
        environment = {
            "POVINI": _INI, "HOME": str(run.place), "PATH": os.defpath, "LANG": "C.UTF-8",
            "POV_TEMP_DIR": ".",  # for the pixels of a big image, else they lie in /tmp
        }
        values = self.values(run)
        scene = values["Input_File_Name"]
        links = {} if _is_plain(scene) else {run.place / _SCENE: self._scene(run, scene)}
        values["Input_File_Name"] = scene if _is_plain(scene) else _SCENE
        library = []
        for number, path in enumerate(self.library_of(run)):
            inside = path == run.tree or run.tree in path.parents
            library.append(f"{LINK}{number}" if inside else str(path))
            if inside:
                links[run.place / library[-1]] = path
        text = to_ini(values, run.lease.pov.declares, library)
        files = {run.place / ".povray" / version / "povray.conf": _CONF
                 for version in ("3.7", "3.8")}
        files[run.place / _INI] = text
        return Command((self.program,), environment, files, links, (str(run.tree), *self.parts()))

    def parts(self) -> tuple[str, ...]:
        """Return the files of POV-Ray, which need not lie where the system's are.

        Beside ``bin`` that is where ``make install`` puts the rest; never the
        whole directory, which may be somebody's home.
        """
        path = Path(self.program).resolve()
        home = path.parent.parent
        found = [parent.parent for parent in path.parents if parent.name == "Cellar"]  # Homebrew
        if path.parent.name == "bin":
            found += [home / "lib", home / "lib64", home / "etc/povray",
                      *home.glob("share/povray*")]
        return (str(path), *map(str, found), *self.library)

    def that_says(self, text: str) -> Engine:
        """Return the same with its version, from what ``--version`` prints.

        Raises ``UserError`` when the program turns out not to be POV-Ray.
        """
        match = re.search(r"POV-Ray (\d+\.\d+\S*)", text)
        if match is None:
            raise UserError(f"{self.program} is not POV-Ray 3.7 or newer: asked for its version, "
                            f"it says {text.partition(chr(10))[0]!r}")
        return replace(self, version=match[1])

    def told(self) -> dict[str, str]:
        """Return what makes two workers' pictures alike: the version, and the include files.

        Of a file that is in several places POV-Ray takes the first. The ends of
        lines do not count: they are others on Windows. A few milliseconds.
        """
        texts: dict[str, bytes] = {}
        for place in self.library:
            for path in Path(place).glob("*.inc"):
                with contextlib.suppress(OSError):
                    text = path.read_bytes().replace(b"\r\n", b"\n")
                    texts.setdefault(path.name, hashlib.sha256(text).digest())
        includes = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()
        return {"povray": self.version, "includes": includes if texts else ""}

    def values(self, run: Run) -> dict[str, str]:
        """Return the options of a run: the job's, and where and how much this run renders.

        A run whose ``state`` is there goes on from it. There is no preview: it
        costs time, shows nothing without a display, and would be in the state.
        """
        values = dict(run.lease.pov.values)
        output = run.made(run.frames[0]).relative_to(run.place).parent / run.output_file
        values.update({
            "Work_Threads": str(run.lease.threads), "Output_To_File": "On", "Display": "Off",
            "Pause_When_Done": "Off", "Verbose": "On", "Preview_Start_Size": "1",
            "Continue_Trace": "On" if run.state.is_file() else "Off",
            "Output_File_Name": output.as_posix(),
        })
        task = run.lease.tasks[0]
        shared = sharable(run.lease.pov.uses, run.lease.pov.values)
        if task.kind is not TaskKind.FRAME:
            values.update(slice_values(run.lease.pov.options, task.top, task.bottom))
        if task.kind is TaskKind.PASS:
            values.update(RADIOSITY_PASS if "radiosity" in shared else {"Antialias": "Off"})
        elif (run.place / SAMPLE_FILE).is_file():
            values.update(RADIOSITY_USE)
        if plan_frames(run.lease.pov.options).animation:
            values["Subset_Start_Frame"] = str(run.frames[0])
            values["Subset_End_Frame"] = str(run.frames[-1])
        return values

    def shared(self, run: Run) -> dict[str, bytes]:
        """Return the scene files that a run has for itself because of what slices share."""
        task, pov = run.lease.tasks[0], run.lease.pov
        word = "load_file" if (run.place / PHOTON_FILE).is_file() else ""
        if task.kind is TaskKind.PASS and "photons" in sharable(pov.uses, pov.values):
            word = "save_file"
        samples = (run.place / SAMPLE_FILE).is_file()
        if not (word or samples):
            return {}
        folders = [path for path in self.library_of(run) if run.tree in (path, *path.parents)]
        scene = pov.values["Input_File_Name"]
        texts = shared_texts(folders, scene, word, samples)
        return {_SCENE if name == scene and not _is_plain(name) else name: text
                for name, text in texts.items()}

    def library_of(self, run: Run) -> list[Path]:
        """Return the directories that a run reads from, after its own: the project's first."""
        paths = [run.tree / run.lease.pov.run_dir]
        for entry in run.lease.pov.library:
            mine = [Path(path) for path in self.library]
            paths += mine if entry == STANDARD else [run.tree / entry]
        return paths

    def _scene(self, run: Run, scene: str) -> Path:
        found = [path / scene for path in self.library_of(run) if (path / scene).is_file()]
        if not found:
            raise RenderFailed(f"the scene {scene} is not in the project")
        return found[0]


@dataclass(frozen=True)
class WindowsEngine(Engine):
    """POV-Ray for Windows, which is a program with a window and no console.

    ``/RENDER`` renders one INI file, ``/EXIT`` ends the program afterwards
    and ``/NR`` keeps it from restoring what was open (POV-Ray for Windows,
    Command-Line Options; POV-Ray/povray issue 227). POVINI does not exist
    there, and what it prints goes into a file.
    """

    def command(self, run: Run) -> Command:
        """Return how to render a run with pvengine.exe."""
        library = [str(path) for path in self.library_of(run)]
        text = to_ini(self.values(run), run.lease.pov.declares, library)
        text += f"All_File={_LOG}\n"
        argv = (self.program, "/NR", "/RENDER", str(run.place / _INI), "/EXIT")
        return Command(argv, dict(os.environ), {run.place / _INI: text}, {})


LINK = "_povfarm"  # begins the names of the links to a project's directories
_INI = "povfarm.ini"
_LOG = "povray.txt"  # what POV-Ray for Windows prints
_OWN_FILES = re.compile(rf"pov\d+|.*\.pov-state|{_LOG}")  # POV-Ray's: pixels of a big image, states
_SCENE = "scene.pov"  # the name of a scene whose own name POV-Ray cannot read


def _is_plain(name: str) -> bool:
    """Tell whether an INI file can hold a name, and POV-Ray 3.7 read it from there."""
    return name.isascii() and not ('"' in name and "'" in name)


# POV-Ray 3.7 minds the second setting, and the first only where it writes All_File
# and its like. Without the file its text begins with a complaint.
_CONF = """[File I/O Security]
restricted
[Shellout Security]
forbidden
[Permitted Paths]
read+write* = .
"""


def locate_engine(program: str) -> Engine:
    """Find POV-Ray, ``program`` or the one of this machine, without starting it.

    Its version is not known yet: see ``probed``. Raises ``UserError``
    with what to install when there is none.
    """
    path = shutil.which(program or "povray") or (None if program else _windows_program())
    if path is None:
        if program:
            raise UserError(f"there is no program '{program}': give the path of POV-Ray")
        raise UserError(f"POV-Ray is not installed here: {_INSTALL.get(sys.platform, _DOWNLOAD)}")
    if Path(path).name.lower().startswith("pvengine"):
        return WindowsEngine(path, "3.7", _windows_library(Path(path)))
    return Engine(path, "", standard_library())


_DOWNLOAD = "get it from povray.org"
_INSTALL: Mapping[str, str] = {
    "linux": "sudo apt-get install povray (or your system's package of that name)",
    "darwin": "brew install povray",
}


def standard_library() -> tuple[str, ...]:
    """Return the include directories of this machine's own POV-Ray, best from its INI file."""
    for ini in SYSTEM_INI:
        with contextlib.suppress(OSError):
            text = ini.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r'(?im)^\s*Library_Path\s*=\s*"?([^";\n]+)', text)
            if found:
                return tuple(path.strip() for path in found)
    places = ("/usr", "/usr/local", "/opt/homebrew")
    found = [str(path) for place in places
             for path in sorted(Path(place).glob("share/povray-3.*/include"))[-1:]]
    return tuple(found)


def _windows_program() -> str | None:
    root = os.environ.get("PROGRAMFILES", "")
    found = sorted(Path(root).glob("POV-Ray/*/bin/pvengine*.exe")) if root else []
    return str(found[-1]) if found else None


def _windows_library(program: Path) -> tuple[str, ...]:
    return (str(program.parent.parent / "include"),)


# --- what the slices of a frame share

# On top of a slice's own values. What the pass of each slice saves is simply put together: the
# files are text, a sample a line. Anti-aliasing takes hardly any further samples.
RADIOSITY_PASS: Mapping[str, str] = {
    "Radiosity_To_File": "On", "Radiosity_File_Name": SAMPLE_FILE, "Antialias": "Off",
}
RADIOSITY_USE: Mapping[str, str] = {
    "Radiosity_From_File": "On", "Radiosity_File_Name": SAMPLE_FILE,
}
_SCENE_SUFFIXES = (".pov", ".inc", ".mac", ".mcr")


def has_samples(data: bytes) -> bool:
    """Tell whether a file of radiosity samples holds any: POV-Ray makes one always."""
    return re.search(rb"^C", data, re.MULTILINE) is not None


def shared_texts(
    folders: Sequence[Path], scene: str, photons: str, samples: bool
) -> dict[str, bytes]:
    """Return the scene files that a run has to have in its own directory, by name.

    ``folders`` are the project's in the order of POV-Ray's search, which comes
    to the run's directory first; of files with one name the first counts. The
    scene is in one of them. ``photons`` is ``save_file``, ``load_file`` or
    nothing, ``samples`` whether radiosity samples are loaded.
    """
    files = {scene: next(path / scene for path in folders if (path / scene).is_file())}
    for folder in folders if photons else ():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in _SCENE_SUFFIXES and path.is_file():
                files.setdefault(path.relative_to(folder).as_posix(), path)
    texts: dict[str, bytes] = {}
    for name, path in files.items():
        data = path.read_bytes()
        text = photon_scene(data, photons) if photons and b"photons" in data else None
        if samples and name == scene:
            text = sampled_scene(text or data)
        if text is not None:
            texts[name] = text
    return texts


# --- a frame that is rendered in part

@dataclass(frozen=True)
class State:
    """How much of a region is finished: its pixels, and its rows without a gap from the top."""

    pixels: int
    rows: int


def copy_state(source: BinaryIO, target: BinaryIO | None, region: Region, block: int) -> State:
    """Copy the finished blocks of a ``.pov-state`` that belong to a region; tell how much it is.

    ``block`` is the Render_Block_Size of the run. POV-Ray believes its state
    file: with one of a larger picture it crashes, with one of another block
    size it paints what is wrong. So what is no block of this region is left
    out, a message cut off at the end included. Without pixels the copy is of
    no use, as always with radiosity: its pretrace is in the file too, but the
    samples are not (POV-Ray/povray issue 138).
    """
    width, height = region.right - region.left, region.bottom - region.top
    size = max(min(block, max(width, height)), 4)  # as POV-Ray's View::StartRender
    columns = -(-width // size)
    done: dict[int, int] = {}
    if not source.read(_STATE_HEADER).startswith(_STATE):
        return State(0, 0)
    if target is not None:
        target.write(_STATE.ljust(_STATE_HEADER, b"\0"))
    for message, found in _state_messages(source, 20 * size * size):
        if found.get(b"MIDE") != b"PxBS":
            return State(0, 0)
        number = int.from_bytes(found.get(b"PiId", b""), "big")
        left = region.left + number % columns * size
        top = region.top + number // columns * size
        right, bottom = min(left + size, region.right), min(top + size, region.bottom)
        pixels = (right - left) * (bottom - top)
        box = (number, 1, left, top, right - 1, bottom - 1)
        fits = len(found.get(b"PBlo", b"")) == 20 * pixels and box == tuple(
            int.from_bytes(found.get(key, b""), "big")
            for key in (b"PiId", b"PiSi", b"Left", b"Top ", b"Righ", b"Bott"))
        if fits and number not in done:
            done[number] = pixels
            if target is not None:
                target.write(message)
    first = next(number for number in itertools.count() if number not in done)
    return State(sum(done.values()), min(first // columns * size, height))


# The file (renderfrontend.h): 28 bytes of name, 4 of version, reserved ones up to 512; then a
# message for each finished block, as POV-Ray sends them inside of itself (povms.c), big-endian.
_STATE = b"POV-Ray Render State File\0\0\0" + b"0001"
_STATE_HEADER = 512


def _state_messages(source: BinaryIO, pixels: int) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """Yield whole messages with at most so many bytes of pixels, and what is in them by key."""
    while len(head := source.read(28)) == 28:
        magic, _, size, count = struct.unpack(">8sII8xI", head)
        if magic != b"POVRAYMS" or size > pixels + 1000:
            return
        body = source.read(size - 8) if size >= 8 else b""
        found, at = {}, 0
        while at + 12 <= len(body):
            key, kind, length = struct.unpack_from(">4s4sI", body, at)
            length *= 4 if kind in {b"VFL4", b"VIN4"} else 1  # vectors count their numbers
            found[key] = body[at + 12:at + 12 + length]
            at += 12 + length
        if not at == len(body) == size - 8 or len(found) != count:
            return
        yield head + body, found


# --- reading what POV-Ray prints

KEPT_LINES = 2000  # of what is printed for a frame: at its beginning and at its end
_OUR_LINK = re.compile(rf"\b{LINK}\d+/")
_FRAME = re.compile(r"Rendering frame (\d+) of \d+")
_PERCENT = re.compile(r"(?:Rendered|pretrace:) .*\((\d+)%\)")
_SCENE_ERROR = re.compile(r"(?<!Possible )Parse Error|Cannot parse input|Fatal error in parser")
_HARMLESS = re.compile(r"Possible Parse Error|configuration file")
_ERROR = re.compile(r"(?<!Possible )(?:Parse Error|Fatal error|Cannot|rror:|failed)"
                    r"|^povfarm: |shared libraries")


class PovText:
    """Follows the text of one run: which frame, how far, and what went wrong.

    ``feed`` takes a line; afterwards ``index`` is the place of the frame in
    the run (a still has one, 0), ``percent`` 0 to 100, ``traced`` whether the
    frame's last statistics have come, ``text`` what was printed since the
    frame began, and ``before`` what was printed in the frame before it. The
    names of our links are taken out of every line. ``done`` is the percent
    that a run which goes on began with: POV-Ray counts only what it adds.
    """

    def __init__(self, done: int = 0) -> None:
        self.index = 0
        self.done = self.percent = done
        self.traced = False
        self.before = ""
        self.lines: list[str] = []

    def feed(self, line: str) -> bool:
        """Take a line; True when it says that the next frame of the run has begun."""
        line = _OUR_LINK.sub("", line)
        match = _FRAME.match(line)
        begun = match is not None and int(match[1]) - 1 > self.index
        if match is not None:
            self.index = int(match[1]) - 1
            self.traced = False
            if begun:
                self.done = self.percent = 0
                self.before = self.text
                self.lines = []
        progress = _PERCENT.search(line)
        if progress is not None:
            self.percent = min(self.done + int(progress[1]), 100)
        elif line.strip():
            self.lines.append(line)
            if len(self.lines) > 3 * KEPT_LINES:  # a scene can print without end
                self.lines[KEPT_LINES:-KEPT_LINES] = ["(povfarm left out what came here)"]
            self.traced = self.traced or "Trace Time:" in line
        return begun

    @property
    def text(self) -> str:
        """What was printed since the frame began."""
        return "\n".join(self.lines) + "\n"

    @property
    def scene_is_wrong(self) -> bool:
        """True when another worker would fail in the same way."""
        return any(_SCENE_ERROR.search(line) for line in self.lines)

    def error(self) -> str:
        """Return POV-Ray's own words for what went wrong, in one line; or nothing."""
        whole: list[str] = []
        for line in self.lines:
            # The console wraps at 80 columns: what goes on starts with a blank.
            if line.startswith(" ") and whole:
                whole[-1] += " " + line.strip()
            else:
                whole.append(line.strip())
        errors = [line for line in whole if _ERROR.search(line) and not _HARMLESS.search(line)]
        best = [line for line in errors if line.startswith("File ")] or errors
        if best and "Cannot open file" in best[0]:
            # Which one stands only in what goes before it.
            best = [line for line in whole if "Cannot find file" in line] + best
        return best[0] if best else ""


# === 18. CLIENT ==============================================================
# How everything outside the coordinator talks to it: one request, tried again
# while the coordinator cannot be reached, over connections that stay open.
# Knows HTTP and JSON, nothing of the routes. It is http.client below and not
# urllib.request, which makes a new connection for every request. Environment
# variables for proxies are ignored: a coordinator is in the same room.

REPLY_LIMIT = 64 << 20  # bytes of an answer that is kept in memory
DOWNLOAD_LIMIT = 16 << 30
_TRY_LATER = (429, 502, 503, 504)
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 30.0  # seconds between tries
_CONNECT_SECONDS = 10.0
_SILENCE = 30.0  # seconds after which a connection counts as dead
_STOP_LOOK = 0.5  # seconds after which a wait for an answer looks whether it should stop


class ServerGone(FarmError):
    """The coordinator did not answer for as long as it was tried, or until stopped."""


class RequestRefused(FarmError):
    """The coordinator answered, and said no: ``status`` and ``detail`` are its."""

    def __init__(self, status: int, message: str, detail: Any = None, later: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.later = later  # seconds after which it wants to be asked again


@dataclass(frozen=True)
class Call:
    """A request as it is sent: ``target`` is encoded, a ``Path`` is sent from the file."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes | Path
    timeout: float
    stop: threading.Event


@dataclass(frozen=True)
class Answer:
    """The head of an answer; ``read(n)`` gets the body, ``close()`` must follow.

    ``read`` returns ``b""`` at the end and raises ``ServerGone`` when the body breaks off.
    """

    status: int
    headers: Mapping[str, str]  # lower-case names
    read: Callable[[int], bytes]
    close: Callable[[], None]


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # lower-case names
    body: bytes

    def json(self) -> Any:
        """Return the JSON in the body; ``FarmError`` when it is none."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise FarmError("this is no answer of a povfarm coordinator: wrong address?") from error


class Transport:
    """Sends one call to one coordinator, on a connection that is kept for the next.

    ``fingerprint`` is the SHA-256 of the only certificate that is accepted;
    without it, the system says which are. Raises ``ServerGone`` when no answer
    comes, ``UserError`` when the certificate is wrong.
    """

    def __init__(self, base_url: str, fingerprint: str = "") -> None:
        url = _split_url(base_url)
        self._base_url = base_url
        self._tls = url.scheme == "https"
        self._host = url.hostname or ""
        self._port = url.port or (443 if self._tls else 80)
        self._authority = url.netloc.rpartition("@")[2]
        self._prefix = url.path.rstrip("/")
        self._fingerprint = fingerprint.replace(":", "").lower()
        self._idle: list[socket.socket] = []  # append and pop are atomic

    def exchange(self, call: Call) -> Answer:
        """Send ``call`` and return the head of the answer."""
        try:
            if sock := self._take_idle():
                with contextlib.suppress(ConnectionError):  # it was closed while it was idle
                    return self._exchange(sock, call)
            return self._exchange(self._connect(call.timeout), call)
        except (OSError, http.client.HTTPException) as error:
            self.close()  # after a sleep of this computer they are all dead, and tell it by silence
            raise _gone(self._base_url, error) from error

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        while sock := self._take_idle():
            sock.close()

    def _take_idle(self) -> socket.socket | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _exchange(self, sock: socket.socket, call: Call) -> Answer:
        try:
            whole = self._send(sock, call)
            _await_answer(sock, call)
            sock.settimeout(call.timeout)
            response = http.client.HTTPResponse(sock, method=call.method)
            response.begin()
            if response.length is None and not response.chunked:
                # http.client takes a head that was cut short for a whole one.
                raise http.client.HTTPException("the answer is cut short")
        except BaseException:
            sock.close()
            raise
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, functools.partial(self._read, response),
                      functools.partial(self._put_away, sock, response, whole))

    def _read(self, response: http.client.HTTPResponse, size: int) -> bytes:
        try:
            data = response.read(size)
            if not data and response.length:  # http.client takes that for the end
                raise ConnectionError("the answer ended early")
            return data
        except (OSError, http.client.HTTPException) as error:
            raise _gone(self._base_url, error) from error

    def _put_away(self, sock: socket.socket, response: http.client.HTTPResponse,
                  whole: bool) -> None:
        """Keep the connection of an answer that was read to its end."""
        whole = whole and response.isclosed() and not response.will_close
        response.close()
        if whole:
            self._idle.append(sock)
        else:
            sock.close()

    def _send(self, sock: socket.socket, call: Call) -> bool:
        """Send the request; False when the other side stopped listening to it.

        It may have answered before the end, so that is no error yet.
        """
        sock.settimeout(call.timeout)
        try:
            if isinstance(call.body, bytes):
                send_all(sock, self._head(call, len(call.body)) + call.body)
                return True
            try:
                file = call.body.open("rb")
            except OSError as error:
                raise FarmError(
                    f"{call.body} cannot be read: {error.strerror or error}") from error
            with file:
                size = os.fstat(file.fileno()).st_size
                send_all(sock, self._head(call, size))
                if size and sock.sendfile(file, 0, size) != size:
                    raise OSError(f"{call.body.name} became shorter while it was sent")
            return True
        except ConnectionError:
            return False

    def _head(self, call: Call, size: int) -> bytes:
        fields = {"Host": self._authority, "User-Agent": f"povfarm/{VERSION}", **call.headers}
        if size or call.method not in ("GET", "HEAD", "DELETE"):
            fields["Content-Length"] = str(size)
        target = self._prefix + call.target
        text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        if not re.fullmatch("[!-~]+", target) or not re.fullmatch("(?:[ -~]+\r\n)*", text):
            raise UserError("the address or the key has a character in it that cannot be sent")
        return f"{call.method} {target} HTTP/1.1\r\n{text}\r\n".encode()

    def _connect(self, timeout: float) -> socket.socket:
        address = (self._host, self._port)
        sock = socket.create_connection(address, min(timeout, _CONNECT_SECONDS))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._secure(sock) if self._tls else sock
        except BaseException:
            sock.close()
            raise

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        if not self._fingerprint:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def _secure(self, sock: socket.socket) -> socket.socket:
        try:
            secured = self._context.wrap_socket(sock, server_hostname=self._host)
        except ssl.SSLCertVerificationError as error:
            raise UserError(
                f"the certificate of {self._host} is not trusted ({error.verify_message}): "
                "use the worker command that 'serve' prints there, or its --pin"
            ) from error
        except ssl.SSLError as error:
            if error.reason not in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                raise
            raise UserError(f"{self._base_url} speaks no TLS: write http://") from error
        seen = hashlib.sha256(secured.getpeercert(binary_form=True) or b"").hexdigest()
        if self._fingerprint and not hmac.compare_digest(seen, self._fingerprint):
            secured.close()
            raise UserError(
                f"{self._host} shows another certificate than it should: it is not your "
                "coordinator, or has a new one (its worker command shows which)"
            )
        return secured


class Client:
    """Talks to one coordinator; may be used by several threads at once.

    What was sent may arrive twice, when an answer was lost: the coordinator's
    routes are made for that. ``token`` may be changed at any time. Addresses
    that are none are a ``UserError``.
    """

    def __init__(self, base_url: str, token: str = "", *, retry_for: float = 60.0,
                 fingerprint: str = "", clock: Clock | None = None,
                 transport: Transport | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.token = token
        self.fingerprint = fingerprint
        self._retry_for = retry_for
        self._clock = clock or Clock()
        self._transport = transport or Transport(base_url, fingerprint)
        self._hurried = 0.0

    def request(self, method: str, path: str, *, body: bytes | Path = b"", json: Any = None,
                headers: Mapping[str, str] | None = None, timeout: float = _SILENCE,
                retry_for: float | None = None, stop: threading.Event | None = None) -> Reply:
        """Return the answer to one request, which is repeated until there is one.

        ``path`` starts with a slash and is encoded already; a ``body`` that is a
        ``Path`` is streamed from that file. ``timeout`` is the
        silence after which a connection counts as dead, ``retry_for`` how long
        to try, both in seconds; ``stop`` ends both soon. Raises
        ``RequestRefused`` for every status from 300, ``ServerGone`` without one.
        """
        fields = dict(headers or {})
        if json is not None:
            body = _to_json(json)
            fields["Content-Type"] = "application/json"
        if method == "PUT" and isinstance(body, bytes):
            fields["X-SHA256"] = hashlib.sha256(body).hexdigest()
        call = Call(method, path, fields, body, timeout, stop or threading.Event())
        return self._persist(call, retry_for, _in_memory)

    def download(self, path: str, to: Path, sha256: str | None = None, *,
                 limit: int = DOWNLOAD_LIMIT, retry_for: float | None = None,
                 stop: threading.Event | None = None) -> None:
        """Get a file; ``to`` appears only when it is whole and has that hash.

        Raises as ``request`` does, and ``FarmError`` when the hash differs, it
        has more than ``limit`` bytes, or ``to`` cannot be written.
        """
        call = Call("GET", path, {}, b"", _SILENCE, stop or threading.Event())
        self._persist(call, retry_for, functools.partial(_save, to, sha256, limit))

    def hurry(self) -> None:
        """Try at once what waits to be tried again: there may be a coordinator again."""
        self._hurried = self._clock.monotonic()

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        self._transport.close()

    def _persist(self, call: Call, retry_for: float | None,
                 consume: Callable[[Answer], bytes]) -> Reply:
        """Try until there is an answer that is not "later"."""
        if self.token:
            call = replace(call, headers={**call.headers, "Authorization": f"Bearer {self.token}"})
        patience = self._retry_for if retry_for is None else retry_for
        deadline = self._clock.monotonic() + patience
        longest = _FIRST_DELAY
        while not call.stop.is_set():
            delay = longest * random.uniform(0.5, 1)  # or all workers would come back at once
            try:
                with contextlib.closing(self._transport.exchange(call)) as answer:
                    _raise_refusal(answer)
                    return Reply(answer.status, answer.headers, consume(answer))
            except RequestRefused as error:
                if error.status not in _TRY_LATER:
                    raise
                failure: FarmError = error
                delay = max(delay, min(error.later, _LONGEST_DELAY))
            except ServerGone as error:
                failure = error
            if self._clock.monotonic() + delay > deadline:
                raise failure
            level = logging.INFO if longest == _FIRST_DELAY else logging.DEBUG
            log.log(level, "%s (trying again)", failure)
            hurried = self._pause(call, delay)
            longest = _FIRST_DELAY if hurried else min(longest * 2, _LONGEST_DELAY)
        raise ServerGone(f"stopped before {self.base_url} had answered")

    def _pause(self, call: Call, seconds: float) -> bool:
        """Wait until it is time to try again; True when ``hurry`` ended the wait.

        Not at once: anybody can send hints, and many.
        """
        start = now = self._clock.monotonic()
        while now < start + seconds and not call.stop.wait(min(start + seconds - now, _STOP_LOOK)):
            now = self._clock.monotonic()
            if self._hurried > start and now > start + _STOP_LOOK:
                return True
        return False


def _split_url(base_url: str) -> urllib.parse.SplitResult:
    try:
        url = urllib.parse.urlsplit(base_url)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if not good or url.query or url.fragment:
        raise UserError(f"'{base_url}' is not an address: write http://NAME:2271")
    return url


def _gone(base_url: str, error: Exception) -> ServerGone:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ServerGone(
        f"{base_url} does not answer ({reason}): is 'povfarm.py serve' running there?"
    )


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _await_answer(sock: socket.socket, call: Call) -> None:
    """Wait until an answer begins, or ``call.stop``: a long poll must not hold up a stop."""
    deadline = time.monotonic() + call.timeout
    while not call.stop.is_set():
        sock.settimeout(max(min(_STOP_LOOK, deadline - time.monotonic()), 0.001))
        try:
            socket.socket.recv(sock, 1, socket.MSG_PEEK)  # below TLS, which cannot peek
            return
        except socket.timeout:
            if time.monotonic() >= deadline:
                raise
    raise ServerGone("stopped while waiting for an answer")


def _raise_refusal(answer: Answer) -> None:
    """Raise ``RequestRefused`` when the status says so, in the coordinator's own words."""
    if answer.status < 300:
        return
    try:
        message = json.loads(_in_memory(answer, BUFFER))
        text, detail = str(message["error"]), message.get("detail")
    except (ValueError, TypeError, KeyError, AttributeError):
        text, detail = f"the coordinator answered with status {answer.status}", None
    later = answer.headers.get("retry-after", "")
    raise RequestRefused(answer.status, text, detail, float(later) if later.isdecimal() else 0.0)


def _pieces(answer: Answer, limit: int, what: str) -> Iterator[bytes]:
    """Read the body of an answer, which may have ``limit`` bytes."""
    size = 0
    for block in iter(functools.partial(answer.read, BUFFER), b""):
        size += len(block)
        if size > limit:
            raise FarmError(f"{what} is larger than {format_size(limit)}")
        yield block


def _in_memory(answer: Answer, limit: int = REPLY_LIMIT) -> bytes:
    return b"".join(_pieces(answer, limit, "the coordinator's answer"))


def _save(to: Path, sha256: str | None, limit: int, answer: Answer) -> bytes:
    """Write an answer to a file, beside it first; its ETag may tell the hash."""
    named = re.fullmatch('"([0-9a-f]{64})"', answer.headers.get("etag", ""))
    wanted = sha256 or (named and named[1])
    digest = hashlib.sha256()
    try:
        with placed(to) as part, part.open("wb") as file:
            for block in _pieces(answer, limit, to.name):
                digest.update(block)
                file.write(block)
            if wanted and digest.hexdigest() != wanted:
                raise ServerGone(f"{to.name} arrived with other contents than it should have")
    except OSError as error:
        raise FarmError(f"{to} cannot be written: {error.strerror or error}") from error
    return b""


# === 19. PROCESS =============================================================
# Starts, watches, measures and ends renderers. On POSIX a launcher, forked
# before there are threads, starts them: fork is safe there, it can wait for
# them with wait4, and when the worker dies in whatever way, it ends them all.


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit ``code`` (negative: a signal), CPU seconds, peak bytes."""

    code: int
    cpu: float
    memory: int


@dataclass(frozen=True)
class Bounds:
    """What a renderer may use of this machine; 0 and None leave it free.

    It may read its own directory, the system's programs and libraries and
    ``reads``, and write only in its own directory; it gets no network and
    starts no programs. ``memory`` and ``file_size`` are bytes.
    """

    reads: tuple[str, ...] | None = None
    memory: int = 0
    file_size: int = 0


class Process:
    """A renderer under way: its output line by line, its end, its processor time."""

    def __init__(self, output: io.BufferedReader, kill: Callable[[], None]) -> None:
        self.kill = kill
        self.pid = 0
        self._output = output
        self._ended: concurrent.futures.Future[Ended] = concurrent.futures.Future()

    def lines(self) -> Iterator[str]:
        """Yield what the process prints, parted at line feeds and carriage returns.

        A progress line comes as soon as it is written, not when it is ended.
        """
        rest = ""
        while True:
            data = self._output.read1(BUFFER)
            if not data:
                break
            *whole, rest = re.split(r"[\r\n]", rest + data.decode("utf-8", "replace"))
            yield from whole
            if len(rest) > BUFFER:
                yield rest
                rest = ""
        self._output.close()
        if rest:
            yield rest

    def ended(self, result: Ended) -> None:
        """Record the end; for the launcher."""
        self._ended.set_result(result)

    def wait(self) -> Ended:
        """Wait for the end."""
        return self._ended.result()

    def cpu_now(self) -> float | None:
        """Return the CPU seconds used so far, or None where the system does not tell."""
        fields = _proc_stat(self.pid)
        return None if fields is None else (int(fields[11]) + int(fields[12])) / _TICKS

    def wanted_now(self) -> float | None:
        """Return the CPU seconds used so far and those that it waited for a core.

        Unlike the first alone they tell, on a busy machine, a renderer that
        computes from one that sleeps. None where the system does not tell.
        """
        try:
            return sum(
                int(field) for path in Path(f"/proc/{self.pid}/task").iterdir()
                for field in (path / "schedstat").read_text(encoding="ascii").split()[:2]) / 1e9
        except (OSError, ValueError):
            return None

    def memory_now(self) -> int:
        """Return the bytes of memory in use, 0 where the system does not tell."""
        fields = _proc_stat(self.pid)
        return 0 if fields is None else int(fields[21]) * _PAGE


_PROBE_SECONDS = 20.0  # that POV-Ray may take to tell its version
LAUNCHER_GONE = "the process that starts the renderers was killed: start the worker again"


class Launcher:
    """Starts renderers on POSIX systems. Make it before the first thread.

    ``gone`` tells that it was killed: with it die all renderers.
    """

    def __init__(self, nice: int = 0) -> None:
        self.gone = False
        self._ids = itertools.count(1)
        self._processes: dict[int, Process] = {}
        self._lock = threading.Lock()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _LauncherProcess(other, nice).run()
        other.close()
        threading.Thread(target=self._listen, name="launcher", daemon=True).start()

    def start(self, argv: Sequence[str], cwd: Path, environment: Mapping[str, str],
              bounds: Bounds = Bounds()) -> Process:
        """Start a program whose output, both streams, comes out of ``Process.lines``."""
        reading, writing = os.pipe()
        number = next(self._ids)
        process = Process(os.fdopen(reading, "rb"), functools.partial(self._kill, number))
        request = {"id": number, "argv": argv, "cwd": str(cwd), "env": dict(environment),
                   "bounds": asdict(bounds)}
        with self._lock:
            self._processes[number] = process
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [writing])
            except OSError:
                raise RenderFailed(LAUNCHER_GONE) from None
            finally:
                os.close(writing)
        return process

    def close(self) -> None:
        """End every process that is still there, and the launcher; wait until they are gone."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _kill(self, number: int) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps({"kill": number}).encode() + b"\n")

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("r") as answers:
            for line in answers:
                answer = json.loads(line)
                process = self._processes[answer["id"]]
                if "pid" in answer:
                    process.pid = answer["pid"]
                else:
                    del self._processes[answer["id"]]
                    process.ended(Ended(answer["code"], answer["cpu"], answer["memory"]))
        self.gone = True
        with self._lock:  # no renderer is added any more: sending fails from now on
            for process in self._processes.values():
                if process.pid:  # only Linux ends them by itself
                    _kill_group(process.pid)
                process.ended(Ended(-signal.SIGKILL, 0.0, 0))


class _LauncherProcess:
    """The other side: a process without threads that forks, waits and kills."""

    def __init__(self, link: socket.socket, nice: int) -> None:
        self._link = link
        self._nice = nice
        self._pid = os.getpid()
        self._kernel = _Kernel() if sys.platform == "linux" else None
        self._ids: dict[int, int] = {}
        self._buffer = b""
        self._descriptors: list[int] = []

    def run(self) -> None:
        """Serve until the worker is gone; never returns."""
        with contextlib.suppress(BaseException):
            self._serve()
        for pid in self._ids:
            _kill_group(pid)
        os._exit(0)

    def _serve(self) -> None:
        os.setsid()
        _close_all_but(self._link.fileno())
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, _ignore_signal)
        signal.set_wakeup_fd(wake_write)
        if self._nice:
            os.nice(self._nice)
        while True:
            ready, _, _ = select.select([self._link.fileno(), wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, BUFFER)
                self._reap()
            if self._link.fileno() in ready:
                data, descriptors, _, _ = socket.recv_fds(self._link, BUFFER, 16)
                if not data:
                    return
                self._buffer += data
                for descriptor in descriptors:
                    os.set_inheritable(descriptor, False)  # received ones are
                self._descriptors += descriptors
                self._handle()

    def _handle(self) -> None:
        while b"\n" in self._buffer:
            line, self._buffer = self._buffer.split(b"\n", 1)
            request = json.loads(line)
            if "argv" in request:
                self._start(request, self._descriptors.pop(0))
                continue
            for pid, number in self._ids.items():
                if number == request["kill"]:
                    _kill_group(pid)

    def _start(self, request: dict[str, Any], output: int) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                if self._kernel is not None:
                    self._kernel.end_with(self._pid)
                _become(request, output, self._kernel)
            except BaseException as error:  # whatever it is, nobody else may go on from here
                os.write(2, f"povfarm: cannot start {request['argv'][0]}: {error}\n".encode())
            os._exit(127)
        # Both sides set the group, so that it exists before either goes on.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        os.close(output)
        self._ids[pid] = request["id"]
        self._answer({"id": request["id"], "pid": pid})

    def _reap(self) -> None:
        while self._ids:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
            unit = 1 if sys.platform == "darwin" else 1024
            self._answer({
                "id": self._ids.pop(pid), "code": code,
                "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * unit,
            })

    def _answer(self, answer: dict[str, Any]) -> None:
        self._link.sendall(json.dumps(answer).encode() + b"\n")


def _kill_group(pid: int) -> None:
    """End a renderer and what it has started; macOS refuses when it has just ended by itself."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _become(request: dict[str, Any], output: int, kernel: _Kernel | None) -> None:
    """Turn the forked child into the renderer."""
    os.setpgid(0, 0)
    # Python ignores the last two, and what is ignored stays so in the next program.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD,
                   signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    os.umask(0o077)
    bounds = Bounds(**request["bounds"])
    _limit(bounds)
    if bounds.reads is not None and kernel is not None:
        kernel.confine((request["argv"][0], *_SYSTEM), bounds.reads)
    os.execve(request["argv"][0], request["argv"], request["env"])


def _close_all_but(keep: int) -> None:
    """Close what this process has inherited: renderers get nothing but 0, 1 and 2."""
    with contextlib.suppress(OSError):
        for descriptor in [int(path.name) for path in Path("/dev/fd").iterdir()]:
            if descriptor > 2 and descriptor != keep:
                with contextlib.suppress(OSError):
                    os.close(descriptor)


# --- what the kernel holds a renderer to; run in the child, between fork and exec

def _limit(bounds: Bounds) -> None:
    # Not RLIMIT_AS: a thread reserves far more addresses than it ever uses.
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 1024),
                         (resource.RLIMIT_DATA, bounds.memory or resource.RLIM_INFINITY),
                         (resource.RLIMIT_FSIZE, bounds.file_size or resource.RLIM_INFINITY)):
        most = resource.getrlimit(limit)[1]
        best = most if value < 0 else value if most < 0 else min(value, most)
        with contextlib.suppress(OSError, ValueError):  # macOS does not take all of them
            resource.setrlimit(limit, (best, best))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out: this one, and no program of the user's


def landlock_abi() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(int(ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), 1)), 0)


# Where programs and what they need lie on every Linux that we know of.
_SYSTEM = (
    "/usr", "/bin", "/lib", "/lib64", "/nix/store", "/gnu/store", "/etc/povray",
    "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu", "/dev/null", "/dev/urandom",
)
# Bits of landlock(7): READ_FILE READ_DIR; EXECUTE too; and where it may write those,
# WRITE_FILE REMOVE_DIR REMOVE_FILE MAKE_DIR MAKE_REG REFER TRUNCATE, but no links, pipes,
# sockets and devices: who reads a renderer's files must not be led elsewhere by them.
_READ, _RUN, _WRITE = 0xC, 0xD, 0x61BE
_OF_FILES = 0xC007  # those that a rule for a file may have
_OF_ABI = (0, 0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF)


class _Kernel:
    """Linux, asked in the child between fork and exec; what can be is prepared before."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._abi = landlock_abi()
        calls = _CALLS.get(os.uname().machine)
        # A 32-bit program on such a machine has other numbers.
        usable = sys.maxsize > 1 << 32 and self._libc.prctl(21) >= 0  # PR_GET_SECCOMP
        self._filter = _filter(*calls) if calls and usable else b""

    def end_with(self, parent: int) -> None:
        """Never outlive the process that forked this one, be it gone already."""
        self._call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    def confine(self, runs: Sequence[str], reads: Sequence[str]) -> None:
        """Give up, for this process and for good, what a renderer does not need.

        It may run and read what is in ``runs``, read what is in ``reads``,
        and write in the current directory.
        """
        self._call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        if self._abi:
            handled = _OF_ABI[min(self._abi, 5)]
            # Of later ABIs all TCP, then signals and abstract sockets to processes outside.
            rules = self._call("syscall", 444, struct.pack(
                "QQQ", handled, 3 if self._abi >= 4 else 0, 3 if self._abi >= 6 else 0), 24, 0)
            for path in runs:
                self._allow(rules, path, _RUN, handled)
            for path in reads:
                self._allow(rules, path, _READ, handled)
            self._allow(rules, ".", _WRITE, handled)
            self._call("syscall", 446, rules, 0)
        if self._filter:
            code = self._filter.replace(struct.pack("=I", _ITSELF), struct.pack("=I", os.getpid()))
            buffer = ctypes.create_string_buffer(code, len(code))
            # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            self._call("prctl", 22, 2, struct.pack(
                "HP", len(code) // 8, ctypes.addressof(buffer)), 0, 0)

    def _allow(self, rules: int, path: str, rights: int, handled: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            there = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= handled if stat.S_ISDIR(os.fstat(there).st_mode) else _OF_FILES
            self._call("syscall", 445, rules, 1, struct.pack("=Qi", rights, there), 0)
            os.close(there)

    def _call(self, function: str, *arguments: int | bytes) -> int:
        """Call into C with whole machine words, and raise what goes wrong."""
        words = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
        result = int(self._libc[function](*words))
        if result < 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses to confine")
        return result


def _filter(machine: int, clone: int, kill: int, tgkill: int, refused: Sequence[int]) -> bytes:
    """Return a program for seccomp(2), in the instructions of its struct sock_filter."""
    load, equal, at_least, has_bits, done = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, missing = 0x7FFF0000, 0x50000 | errno.EACCES, 0x50000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (done, 0, 0, refuse), (load, 0, 0, 0),
            # x86-64 has a second set of numbers from here on
            (at_least, 0, 1, 1 << 30), (done, 0, 0, refuse),
            # the C library takes clone, whose flags can be looked at, instead of clone3
            (equal, 0, 1, 435), (done, 0, 0, missing)]
    for number in refused:
        code += [(equal, 0, 1, number), (done, 0, 0, refuse)]
    # Threads, no processes (CLONE_THREAD); signals to itself alone.
    for number, test, value in ((clone, has_bits, 0x10000), (kill, equal, _ITSELF),
                                (tgkill, equal, _ITSELF)):
        code += [(equal, 0, 4, number), (load, 0, 0, 16), (test, 0, 1, value),
                 (done, 0, 0, allow), (done, 0, 0, refuse)]
    code.append((done, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


_ITSELF = 0x5E1F5E1F  # stands for the number of the process in the filter
# System calls by machine: AUDIT_ARCH, clone, kill, tgkill, and those that are refused:
# socket io_uring_setup, fork vfork, tkill rt_sigqueueinfo rt_tgsigqueueinfo
# pidfd_send_signal pidfd_open ptrace process_vm_readv process_vm_writev shmat; what changes
# files and is unknown to Landlock: truncate, chmod, chown, utime and setxattr in all of their
# forms; and what no renderer needs: bpf perf_event_open userfaultfd keyctl add_key
# request_key unshare setns.
_CALLS: Mapping[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 56, 62, 234, (
        41, 425, 57, 58, 200, 129, 297, 424, 434, 101, 310, 311, 30,
        76, 90, 91, 268, 452, 92, 94, 93, 260, 132, 235, 261, 280,
        188, 189, 190, 197, 198, 199, 463, 466, 321, 298, 323, 250, 248, 249, 272, 308)),
    "aarch64": (0xC00000B7, 220, 129, 131, (
        198, 425, 130, 138, 240, 424, 434, 117, 270, 271, 196,
        45, 52, 53, 452, 55, 54, 88, 5, 6, 7, 14, 15, 16, 463, 466,
        280, 241, 282, 219, 217, 218, 97, 268)),
}


def _ignore_signal(number: int, frame: Any) -> None:
    """Let set_wakeup_fd see a signal."""


class WindowsLauncher:
    """Starts renderers where there is no fork; same methods as ``Launcher``."""

    def __init__(self, nice: int = 0) -> None:
        self.gone = False
        # BELOW_NORMAL_PRIORITY_CLASS and CREATE_NO_WINDOW of the Windows API
        self._flags = (0x4000 if nice else 0) | 0x08000000
        self._running: set[subprocess.Popen[bytes]] = set()

    def start(self, argv: Sequence[str], cwd: Path, environment: Mapping[str, str],
              bounds: Bounds = Bounds()) -> Process:
        """Start a program whose output, both streams, comes out of ``Process.lines``."""
        program = subprocess.Popen(
            argv, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            creationflags=self._flags if os.name == "nt" else 0)
        self._running.add(program)
        process = Process(cast(io.BufferedReader, program.stdout), program.kill)
        process.pid = program.pid
        threading.Thread(target=self._wait, args=(program, process), daemon=True).start()
        return process

    def close(self) -> None:
        """End every process that is still there."""
        for program in list(self._running):
            program.kill()

    def _wait(self, program: subprocess.Popen[bytes], process: Process) -> None:
        code = program.wait()
        self._running.discard(program)
        process.ended(Ended(code, _windows_cpu(program), 0))


def _windows_cpu(program: subprocess.Popen[bytes]) -> float:
    """Return the CPU seconds of an ended program, by GetProcessTimes (units of 100 ns)."""
    times = [ctypes.c_ulonglong() for _ in range(4)]
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GetProcessTimes(
            int(getattr(program, "_handle", 0)), *(ctypes.byref(time) for time in times)):
        return 0.0
    return (times[2].value + times[3].value) / 1e7


def make_launcher(nice: int = 0) -> Launcher | WindowsLauncher:
    """Return the launcher for this system; call it before any thread is started."""
    return Launcher(nice) if hasattr(os, "fork") else WindowsLauncher(nice)


def probed(engine: Engine, launcher: Launcher | WindowsLauncher) -> Engine:
    """Return an engine with its version, which takes POV-Ray a quarter of a second.

    Raises ``UserError`` when the program turns out not to be POV-Ray.
    """
    if isinstance(engine, WindowsEngine):  # it cannot be asked without opening a window
        return engine
    process = launcher.start((engine.program, "--version"), Path(), os.environ)
    limit = threading.Timer(_PROBE_SECONDS, process.kill)
    limit.start()
    text = "\n".join(process.lines())
    ended = process.wait()
    limit.cancel()
    if ended.code < 0:
        raise UserError(f"{engine.program} was ended before it had told its version, or takes "
                        f"longer than {format_duration(_PROBE_SECONDS)}: try it by hand")
    return engine.that_says(text)


def available_memory() -> int:
    """Return the bytes of memory that programs could still take; a guess where unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 1000**3


def total_memory() -> int:
    """Return the bytes of memory of this machine; a guess where unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * _PAGE
    except (AttributeError, ValueError, OSError):
        return available_memory()


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096


def _proc_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name (proc(5): field 3 is index 0)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


# === 20. WORKER ==============================================================
# Asks for leases, fetches projects, renders, and delivers each frame as soon
# as it is there; keeps the cores busy and the leases alive. Decides nothing
# about jobs: what the coordinator says is done.

LEASE_WAIT = 25.0  # seconds that a request for work is held open
PATIENCE = 60.0  # seconds that a worker that is asked to stop renders on, as it looks
HAND_IN_TIME = 20.0  # seconds that a worker that ends at once takes to hand in what it has begun
HANG_TIME = 600.0  # seconds without a sign of life after which a renderer is ended
DISK_RESERVE = 200 * 1000**2  # bytes of disk that no run may come to by writing
BEAT_WAIT = 2.0  # seconds between two signs of life while rendering
SLICE_BEAT_WAIT = 0.5  # the same while the rows of a picture are shared out by how far all are
MOST_RUNS = 12  # a core: more than it takes to keep it busy with frames that hardly compute
PIXEL_SIZE = 36  # bytes that POV-Ray 3.7 writes for a pixel at most: 20 in its state, and the image
GENEROUS = 1 << 30  # bytes: a scene that writes half of that and more is to blame
MOST_WAITING = 100  # finished frames on their way, beyond which no more work is asked for
MAX_SHARED = 1 << 30  # bytes of samples and photons that a pass may leave
OFFER_TIME = 600.0  # seconds that a frame is offered to a coordinator that makes mistakes with it
START_SLEEP, FRAME_SLEEP = 0.3, 0.22  # seconds that POV-Ray 3.7 sleeps: at its start, per frame


class Pace:
    """How many runs to keep going: POV-Ray sleeps, so there are more than cores.

    A job's *duty* is the share of its time in which a run uses a core:
    CPU / (CPU + sleep). The sleep is what POV-Ray is known to sleep, or less
    where the measured wall time says so: wall time alone would take the
    waiting for a core, when too many run, for sleep.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._cpu: dict[int, float] = {}
        self._sleep: dict[int, float] = {}
        self._memory: dict[int, int] = {}

    def measured(self, job: int, frames: int, cpu: float, wall: float, threads: int) -> None:
        """Learn from a finished run of ``frames`` frames; seconds."""
        busy = cpu / max(threads, 1)
        sleep = min(START_SLEEP + FRAME_SLEEP * frames, max(wall - busy, 0.0))
        self._cpu[job] = 0.7 * self._cpu.get(job, busy) + busy
        self._sleep[job] = 0.7 * self._sleep.get(job, sleep) + sleep

    def measured_memory(self, job: int, memory: int) -> None:
        """Learn the peak memory of a run, in bytes."""
        self._memory[job] = max(self._memory.get(job, 0), memory)

    def duty(self, job: int) -> float | None:
        """Return the duty of a job's runs, 0.02 to 1, or None when nothing is known."""
        if job not in self._cpu:
            return None
        return max(self._cpu[job] / max(self._cpu[job] + self._sleep[job], 0.001), 0.02)

    def load(self, runs: Iterable[RunState]) -> float:
        """Return how many cores the runs use, as measured or as they look so far."""
        return sum(run.threads * (self.duty(run.job) or run.duty_so_far()) for run in runs)

    def room(self, runs: Sequence[RunState], free_memory: int) -> int:
        """Return how many more runs to start now.

        Runs that sleep at random leave cores idle by chance even where their
        load adds up to the cores, so it may go beyond them by its standard
        deviation (of a sum of independent runs, each busy or not).
        """
        if not runs:
            # Two a core: half of a start is sleep, whatever the scene.
            return 2 * self.cores
        duties = [self.duty(run.job) or run.duty_so_far() for run in runs]
        load = sum(run.threads * duty for run, duty in zip(runs, duties))
        spread = sum(duty * (1 - duty) for duty in duties)
        duty, more = min(duties), 0
        while load + (more + 0.5) * duty <= self.cores + math.sqrt(
                spread + (more + 1) * duty * (1 - duty)):
            more += 1
        memory = max((self._memory.get(run.job, 0) for run in runs), default=0)
        unknown = any(self.duty(run.job) is None for run in runs)
        more = min(more, (4 if unknown else MOST_RUNS) * self.cores - len(runs))
        if memory:
            more = min(more, int(0.8 * free_memory / memory))
        return max(more, 0)


class RunState:
    """One run of the renderer as the worker sees it."""

    def __init__(self, lease: LeaseSpec, clock: Clock) -> None:
        self.lease = lease
        self.job = lease.job
        self.threads = lease.threads
        self.started = clock.monotonic()
        self.began = self.started  # with the task under way
        self.clock = clock
        self.process: Process | None = None
        self.text = PovText()
        self.place: Path | None = None  # its own directory
        self.stopped = threading.Event()
        self.fills_disk = False
        self.overdue = ""  # why it was ended before it was finished
        self._signs: tuple[float, ...] = ()  # of life, as last seen
        self._alive = self.started
        self.ended = Ended(0, 0.0, 0)
        self.no_room = False
        self.free = 0  # bytes on the disk when the renderer started
        self.crowd = 1  # the runs that shared them then
        self.undelivered = 0
        self.open = {task.frame: task for task in lease.tasks}
        self.bottoms: dict[int, int] = {}  # of tasks whose lower rows others render
        self.cut = False
        self.look_again = 0.0  # when to read the state next
        self.scene_files: dict[str, tuple[int, int]] = {}  # as they were at the last look
        self.told: dict[str, str] = {}  # the hash of each that was delivered

    def duty_so_far(self) -> float:
        """Guess the duty of a run under way; a half while it is starting."""
        age = self.clock.monotonic() - self.started
        wanted = self.process.wanted_now() if self.process else None
        if wanted is None or age < START_SLEEP + 0.1:
            return 0.5
        return min(max(wanted / self.threads / (age - START_SLEEP), 0.02), 1.0)

    def progress(self) -> dict[str, float]:
        """Return how far the task under way is, by its id, 0 to 1."""
        return {str(self.task.id): 1.0 if self.cut else self.text.percent / 100}

    @property
    def task(self) -> TaskSpec:
        """The task under way."""
        return self.lease.tasks[min(self.text.index, len(self.lease.tasks) - 1)]

    def left(self) -> float:
        """Return the seconds that the task under way will still take as it looks."""
        made, spent = self.text.percent - self.text.done, self.clock.monotonic() - self.began
        return spent * (100 - self.text.percent) / made if made else spent

    def too_long(self) -> str:
        """Return why the renderer should be ended: it takes too long, or does nothing; or nothing.

        A renderer that waits for something that never comes still polls: that
        took 0.6 % of a core (POV-Ray 3.7.0).
        """
        now, limit = self.clock.monotonic(), self.lease.timeout
        if limit and self.open and now - self.began > limit:
            return f"the frame took longer than {format_duration(limit)} (see --frame-timeout)"
        used = self.process.cpu_now() if self.process else None
        if used is None:
            return ""
        index, percent, cpu = self._signs or (-1, 0, 0.0)
        if (index, percent) != (self.text.index, self.text.percent) or (
                used - cpu > 0.02 * HANG_TIME):
            self._signs, self._alive = (self.text.index, self.text.percent, used), now
        if now - self._alive > HANG_TIME:
            return f"POV-Ray did nothing for {format_duration(HANG_TIME)}"
        return ""

    def lacked_room(self, free: int) -> bool:
        """Tell whether POV-Ray failed for want of room on a disk that has ``free`` bytes now.

        POV-Ray 3.7 is aborted when it cannot write, and does not say why; or killed when it writes
        more than it may, which where little is free is not the scene's fault. Now there may be
        room again: what another run wrote is gone, which failed at the same moment.
        """
        if self.fills_disk:
            return self.free < GENEROUS
        options = self.lease.pov.options
        most = 0 if self.text.scene_is_wrong else PIXEL_SIZE * options.width * options.height
        return self.ended.code != 0 and min(self.free, free) < most * self.crowd

    def written(self) -> int:
        """Return the bytes in its own directory."""
        return _bytes_in(self.place) if self.place else 0

    def stop(self) -> None:
        """End the renderer, at once unless it is writing the image that it has finished."""
        self.stopped.set()
        if not self.text.traced:
            self.kill()

    def kill(self) -> None:
        """End the renderer, if there is one."""
        if self.process is not None:
            self.process.kill()


@dataclass(frozen=True)
class Delivery:
    """A finished frame on its way to the coordinator.

    Its file ``image`` ends with ``files`` bytes of a zip of what the scene wrote.
    """

    run: RunState
    task: TaskSpec
    image: Path
    files: int
    bottom: int
    text: str
    cost: Cost


class Cache:
    """Projects of this worker, by the key of their manifest, within a size in bytes.

    ``near`` tells where the coordinator keeps contents by their hash, for a
    worker in its own process: they are copied, not sent.
    """

    def __init__(self, root: Path, limit: int, client: Client,
                 near: Callable[[str], Path] | None = None) -> None:
        self.root = root
        self.limit = limit
        self._client = client
        self._near = near
        self._lock = threading.Lock()  # of what follows
        self._using: collections.Counter[str] = collections.Counter()
        # Held while a project comes, which may take long: those that are here do not wait for it.
        self._coming: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._ready: dict[str, set[str]] = {}
        root.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def project(self, key: str, last_frame: int,
                stop: threading.Event | None = None) -> Iterator[tuple[Path, Manifest]]:
        """Give a project's directory, with every file that frames up to ``last_frame`` need.

        Files that another project of the cache has are taken from there.
        ``stop`` ends the fetching with ``ServerGone``.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise UserError("the coordinator named a project that has no valid key")
        with self._lock:
            self._using[key] += 1
            coming = self._coming[key]
        try:
            with coming:
                manifest = self._manifest(key, stop)
                self._fill(key, manifest, last_frame, stop)
            yield self.root / key / "tree", manifest
        finally:
            with self._lock:
                self._using[key] -= 1
            with contextlib.suppress(OSError):  # it may never have come
                os.utime(self.root / key)

    def empty(self) -> None:
        """Delete every project that is not in use."""
        self._trim(0)

    def _trim(self, limit: int) -> None:
        """Delete the projects that were not used for longest until the rest fits."""
        with self._lock:
            projects = sorted(
                (path.stat().st_mtime, path) for path in self.root.iterdir() if path.is_dir())
            sizes = {path: _bytes_in(path) for _, path in projects}
            total = sum(sizes.values())
            for _, path in projects:
                if total > limit and not self._using[path.name]:
                    shutil.rmtree(path, ignore_errors=True)
                    self._ready.pop(path.name, None)
                    total -= sizes[path]

    def _manifest(self, key: str, stop: threading.Event | None) -> Manifest:
        path = self.root / key / "manifest.json"
        try:
            manifest = Manifest.from_wire(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, UserError):
            reply = self._client.request("GET", f"/api/v1/manifests/{key}", retry_for=300,
                                         stop=stop)
            manifest = Manifest.from_wire(reply.json())
            self._trim(self.limit)
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, reply.body)
        if manifest.key != key:
            raise ServerGone("the coordinator sent another project than the one asked for")
        return manifest

    def _fill(self, key: str, manifest: Manifest, last_frame: int,
              stop: threading.Event | None) -> None:
        tree = self.root / key / "tree"
        tree.mkdir(exist_ok=True)
        ready = self._ready.setdefault(key, set())
        for file in manifest.files:
            if file.path in ready or (file.after_frame is not None
                                      and last_frame <= file.after_frame):
                continue
            path = safe_join(tree, file.path)
            if not _holds(path, file):
                path.parent.mkdir(parents=True, exist_ok=True)
                if self._near is not None:
                    shutil.copyfile(self._near(file.sha256), path)
                elif not self._copy(key, file, path):
                    self._client.download(f"/api/v1/blobs/{file.sha256}", path, file.sha256,
                                          limit=file.size, stop=stop)
            ready.add(file.path)

    def _copy(self, key: str, wanted: FileEntry, to: Path) -> bool:
        for other in self.root.iterdir():
            if other.name == key or not (other / "manifest.json").is_file():
                continue
            source = safe_join(other / "tree", wanted.path)
            with contextlib.suppress(OSError):  # it may be deleted, or come, just now
                if source.stat().st_size == wanted.size:
                    shutil.copyfile(source, to)
                    if _holds(to, wanted):
                        return True
        return False


def _bytes_in(directory: Path) -> int:
    """Return the size of what is in a directory, while others may write and delete there."""
    size = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size


def _holds(path: Path, file: FileEntry) -> bool:
    try:
        return path.stat().st_size == file.size and sha256_file(path) == file.sha256
    except OSError:
        return False


class Worker:
    """Renders for one coordinator until it is stopped.

    ``stop`` once lets the frames under way finish and hands the rest back, with
    what is done of those that take longer than a minute; twice ends everything
    at once. ``until_idle`` ends when there is nothing left.
    """

    def __init__(self, client: Client, engine: Engine, launcher: Launcher | WindowsLauncher,
                 cache: Cache, cores: int, until_idle: bool = False,
                 clock: Clock | None = None, bounds: Bounds = Bounds(())) -> None:
        self.client = client
        self.engine = engine
        self.cache = cache
        self.until_idle = until_idle
        self.bounds = bounds
        self.rendered = 0
        self._launcher = launcher
        self._clock = clock or Clock()
        self._pace = Pace(cores)
        self._runs: set[RunState] = set()  # that use the machine
        self._held: set[RunState] = set()  # whose leases must be kept alive
        self._watched: set[RunState] = set()  # whose renderer has not ended
        self._changed = threading.Condition()
        self._deliveries: queue.Queue[Delivery] = queue.Queue()
        self._outbox = Path()
        self._stopping = threading.Event()
        self._ending = threading.Event()
        self._trouble = ""  # why nothing more is asked for
        self._rest = (0.0, 0)  # until when, unless more is free than then
        self._idle = False

    def run(self) -> None:
        """Work until stopped; raises ``FarmError`` when the coordinator refuses this worker."""
        _sweep(self.cache.root)
        self._outbox = self._directory("out-")
        for number in range(2):
            name = f"deliver-{number}"
            threading.Thread(target=self._deliver_all, name=name, daemon=True).start()
        for function in (self._beat_all, self._guard):
            threading.Thread(target=function, name=function.__name__, daemon=True).start()
        try:
            while not self._stopping.is_set() and not self._idle:
                try:
                    self._ask()
                except ServerGone:  # only when it was stopped meanwhile
                    break
                except RequestRefused as error:
                    if error.status < 500:
                        raise
                    log.warning("the coordinator is in trouble: %s", error)
                    self._stopping.wait(5)
            self._finish_all()
            if self._launcher.gone:
                raise FarmError(LAUNCHER_GONE)
        finally:
            for run in list(self._runs):
                run.stop()
            # Also of runs whose frames are delivered and whose POV-Ray sleeps before it ends.
            for path in self.cache.root.parent.glob(f"run-{os.getpid()}-*"):
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(FarmError):
                self.client.request("POST", "/api/v1/leave", json={}, retry_for=0, timeout=5)

    def stop(self) -> None:
        """Finish the frames under way and hand back the rest; a second call ends at once."""
        if self._stopping.is_set():
            self._ending.set()
        self._stopping.set()
        with self._changed:
            self._stop_long()
            self._changed.notify_all()

    def _stop_long(self) -> None:
        """Stop the runs that are not waited for, in whatever they are."""
        for run in self._runs:
            if self._ending.is_set() or run.process is None or run.left() > PATIENCE:
                run.stop()

    def _finish_all(self) -> None:
        """Wait until what is under way is rendered and delivered, or given up."""
        told, late = self._clock.monotonic() + 5, math.inf
        with self._changed:
            while (self._runs or (self._held and not self._ending.is_set())
                   ) and self._clock.monotonic() < late:
                self._changed.wait(1.0)
                if self._stopping.is_set():
                    self._stop_long()  # what is longer than it looked, or began just now
                if self._ending.is_set():
                    late = min(late, self._clock.monotonic() + HAND_IN_TIME)
                if not self._runs and self._clock.monotonic() > told:
                    told = math.inf
                    log.warning("finished frames wait for the coordinator: "
                                "to stop again gives them up")

    def _directory(self, kind: str = "") -> Path:
        """Make a directory that ``_sweep`` knows as this process's."""
        return Path(tempfile.mkdtemp(
            prefix=f"run-{os.getpid()}-{kind}", dir=self.cache.root.parent))

    # --- asking for work

    def _in_trouble(self, trouble: str) -> None:
        """Say why nothing more is asked for, once; or that it is again."""
        with self._changed:
            if trouble and trouble != self._trouble:
                log.warning("%s", trouble)
            elif self._trouble and not trouble:
                log.warning("the trouble is over: asking for work again")
            self._trouble = trouble
            self._changed.notify_all()

    def _must_rest(self) -> bool:
        """Tell whether to ask for nothing for the moment: full disks, here or there."""
        if self._deliveries.qsize() > MOST_WAITING:
            return True
        place = self.cache.root.parent
        free, (until, then) = free_room(place), self._rest
        if free < 0 or (self._clock.monotonic() < until and free < then + LEFT_FREE):
            self._in_trouble("the disk is full or cannot be written: make room on the one of "
                             f"{place}; nothing is rendered here until then")
            self.cache.empty()
        elif self._trouble and not self._deliveries.unfinished_tasks:
            self._in_trouble("")
        return bool(self._trouble)

    def _ask(self) -> None:
        if self._must_rest():
            with self._changed:
                self._changed.wait(1.0)
            return
        with self._changed:
            runs = list(self._runs)
            # What is known of a run grows by the moment until the first of its job has ended.
            growing = any(self._pace.duty(run.job) is None for run in runs)
            room = self._pace.room(runs, available_memory())
            if room == 0:
                self._changed.wait(0.1 if growing else 5.0)
                return
        wait = 0.1 if growing else LEASE_WAIT
        if self.until_idle:
            wait = min(wait, 1.0)
        idle = int(self._pace.cores - self._pace.load(runs) + 0.5)
        offer = {"want": room, "slots": len(runs) + room, "idle": max(idle, 0), "wait": wait}
        reply = self.client.request("POST", "/api/v1/lease", json=offer, timeout=wait + 30,
                                    retry_for=math.inf, stop=self._stopping).json()
        for wire in reply["leases"]:
            run = RunState(LeaseSpec.from_wire(wire), self._clock)
            with self._changed:
                self._runs.add(run)
                self._held.add(run)
                self._changed.notify_all()
            threading.Thread(target=self._work, args=(run,), name=f"run-{run.lease.id[:6]}",
                             daemon=True).start()
        self._idle = self.until_idle and not reply["leases"] and reply["open"] == 0

    def _beat_all(self) -> None:
        while True:
            with self._changed:
                while not self._held:
                    self._changed.wait()
                runs = {run.lease.id: run for run in self._held}
            progress = {lease: run.progress() for lease, run in runs.items()}
            slices = any(run.task.kind is TaskKind.SLICE for run in runs.values())
            wait = SLICE_BEAT_WAIT if slices else BEAT_WAIT
            try:
                reply = self.client.request(
                    "POST", "/api/v1/beat", json={"leases": progress, "wait": wait},
                    timeout=wait + 10, retry_for=math.inf).json()
            except FarmError as error:  # it is refused, which is no reason to ask without a pause
                log.debug("no beat: %s", error)
                time.sleep(BEAT_WAIT)
                continue
            for lease in reply["ended"]:
                if runs[lease].open:
                    runs[lease].stop()
            cuts = {int(task): bottom for task, bottom in reply["cuts"].items()}
            for run in runs.values():
                run.bottoms.update(cuts)

    def _guard(self) -> None:
        """End renderers that take too long or, when the disk is nearly full, have written most."""
        while True:
            with self._changed:
                while not self._watched:
                    self._changed.wait()
                runs = list(self._watched)
            for run in runs:
                run.overdue = run.overdue or run.too_long()
                if run.overdue:
                    run.kill()
            if shutil.disk_usage(self.cache.root).free < DISK_RESERVE:
                largest = max(runs, key=RunState.written)
                if largest.written() > DISK_RESERVE:
                    largest.fills_disk = True
                    largest.kill()
            time.sleep(1)

    # --- one run

    def _work(self, run: RunState) -> None:
        message, scene = "", False
        try:
            self._render(run)
            if run.open and not run.stopped.is_set() and not self._stopping.is_set():
                message, scene = _why_it_failed(run, self.bounds)
        except ServerGone:
            pass  # the frame is not to blame: it is handed back
        except (FarmError, OSError) as error:
            message = str(error)
            run.no_room = takes_nothing(error)
        except Exception as error:  # a run that ends without a word would be kept alive for ever
            log.exception("a run failed")
            message = f"the worker made a mistake: {error}"
        with self._changed:
            self._runs.discard(run)
            self._changed.notify_all()
        if run.no_room:
            message = ""
            then = run.free or free_room(self.cache.root.parent)
            self._rest = (self._clock.monotonic() + 60, then)
        if self._launcher.gone:
            message = ""
            self._stopping.set()  # not stop(), which gives up what is finished when it comes twice
        if run.open and not run.stopped.is_set():
            self._give_up(run, message, scene)
        run.open.clear()
        self._let_go(run)

    def _let_go(self, run: RunState, delivered: int = 0) -> None:
        """Beat no more for a lease of which nothing is left to render or to deliver."""
        with self._changed:
            run.undelivered -= delivered
            if not run.open and not run.undelivered:
                self._held.discard(run)
                self._changed.notify_all()

    def _give_up(self, run: RunState, message: str, scene: bool) -> None:
        """Tell of the frame that failed, and hand back what was not begun."""
        lease = f"/api/v1/leases/{run.lease.id}"
        with contextlib.suppress(FarmError):
            if message:
                task = run.open.pop(min(run.open))
                self.client.request(
                    "POST", f"{lease}/tasks/{task.id}/fail", retry_for=300,
                    json={"message": message, "scene": scene, "log": run.text.text})
            if run.open:
                self.client.request("POST", f"{lease}/release", json={}, retry_for=30)

    def _render(self, run: RunState) -> None:
        frames = self._frames(run.lease)
        place = run.place = self._directory()
        try:
            with self.cache.project(
                    run.lease.manifest, frames[-1], run.stopped) as (tree, manifest):
                plan = Run(run.lease, tree, place, frames)
                _make_directories(plan, manifest)
                self._get_shared(run, place)
                if run.task.state:
                    self._get_state(run, plan)
                measure = _Measure(run, self._clock)
                while self._watch(run, plan, measure):
                    plan = self._shortened(run, plan)
                if run.open and self._stopping.is_set():
                    self._hand_in(run, replace(plan, frames=(run.task.frame,)))
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _get_shared(self, run: RunState, place: Path) -> None:
        """Get what the passes of a frame have rendered, and put it together."""
        for number in run.lease.shares:
            path = place / "pass.zip"
            self.client.download(f"/api/v1/tasks/{number}/result", path, retry_for=300,
                                 stop=run.stopped)
            files = unpack_files(path.read_bytes(), MAX_SHARED)
            if has_samples(files.get(SAMPLE_FILE, b"")):
                with open(place / SAMPLE_FILE, "ab") as target:
                    target.write(files[SAMPLE_FILE])
            if PHOTON_FILE in files:  # every pass has shot them all
                (place / PHOTON_FILE).write_bytes(files[PHOTON_FILE])
            path.unlink()

    # --- stopped renders

    def _get_state(self, run: RunState, plan: Run) -> None:
        """Go on from where another worker stopped; from the start when its state does not fit."""
        with contextlib.suppress(FarmError):
            path = plan.place / "state"
            self.client.download(f"/api/v1/tasks/{run.task.id}/state", path, retry_for=30,
                                 stop=run.stopped)
            self._begin_from(run, plan, path)

    def _begin_from(self, run: RunState, plan: Run, path: Path) -> None:
        with open(path, "rb") as source, open(plan.state, "wb") as target:
            state = copy_state(source, target, plan.region, plan.block)
        path.unlink()
        if not state.pixels:
            plan.state.unlink()
        region = plan.region
        pixels = (region.bottom - region.top) * (region.right - region.left)
        run.text = PovText(100 * state.pixels // pixels)

    def _hand_in(self, run: RunState, plan: Run) -> None:
        """Give what is finished of a frame to whoever goes on with it."""
        if run.task.kind is TaskKind.PASS:
            return
        whole = io.BytesIO()  # of a state with radiosity nothing is taken, see copy_state
        with contextlib.suppress(FarmError, OSError), open(plan.state, "rb") as source:
            if copy_state(source, whole, plan.region, plan.block).pixels:
                self.client.request(
                    "PUT", f"/api/v1/leases/{run.lease.id}/tasks/{run.task.id}/state",
                    body=whole.getvalue(), timeout=60, retry_for=20)

    def _is_cut(self, run: RunState, plan: Run) -> bool:
        """Tell whether the rows that others did not take over seem to be finished."""
        bottom = run.bottoms.get(run.task.id)
        if bottom is None or run.cut or run.task.frame not in run.open:
            return False
        region = plan.region
        rows = min(bottom, region.bottom) - region.top
        # POV-Ray tells whole percents, rounded down, of what it has added to a state.
        if not 100 * rows / (region.bottom - region.top) - 2 < run.text.percent < 97:
            return False
        # Only the state tells: one thread may be at a block while others are far below it.
        start = self._clock.monotonic()
        if start < run.look_again:
            return False
        with contextlib.suppress(OSError), open(
                replace(plan, frames=(run.task.frame,)).state, "rb") as state:
            finished = copy_state(state, None, region, plan.block).rows >= rows
            now = self._clock.monotonic()
            run.look_again = now + 10 * (now - start)  # it may be hundreds of megabytes
            return finished
        return False

    def _shortened(self, run: RunState, plan: Run) -> Run:
        """Return the run that makes the picture of what is finished down to where others began."""
        task = run.task
        short = replace(task, kind=TaskKind.SLICE, bottom=run.bottoms[task.id])
        run.open[task.frame] = short
        pov = plan.lease.pov  # the same blocks as before, for the state has those
        pov = replace(pov, values={**pov.values, "Render_Block_Size": str(plan.block)})
        lease = replace(plan.lease, tasks=(short,), pov=pov)
        run.cut, run.lease, run.text, old = True, lease, PovText(), plan.place / "state"
        state = replace(plan, frames=(task.frame,)).state
        shorter = replace(plan, lease=lease, frames=(task.frame,))
        if state.is_file():
            os.replace(state, old)
            self._begin_from(run, shorter, old)
        return shorter

    def _frames(self, lease: LeaseSpec) -> tuple[int, ...]:
        last = lease.tasks[-1].frame
        if not lease.in_order:
            return tuple(task.frame for task in lease.tasks)
        return tuple(frame for frame in plan_frames(lease.pov.options).frames if frame <= last)

    def _watch(self, run: RunState, plan: Run, measure: _Measure) -> bool:
        """Render; True when it was ended because others render what is left."""
        process = self._start(run, plan)
        cut = False
        if process is None:
            return False
        for line in process.lines():
            done = run.text.index
            if run.text.feed(line):
                self._finish(run, plan, done, run.text.before, measure.frame())
                run.began = self._clock.monotonic()
                if self._stopping.is_set() or run.stopped.is_set():
                    process.kill()
            elif not cut and self._is_cut(run, plan):
                cut = True
                process.kill()
            measure.tracing(run.text.percent / 100)
            if run.text.traced and run.text.index == len(plan.frames) - 1 and run.open:
                self._finish_early(run, plan, measure)
        ended = run.ended = process.wait()
        with self._changed:
            self._watched.discard(run)
        run.fills_disk |= ended.code == -_FILE_TOO_LARGE
        run.no_room = run.lacked_room(free_room(plan.place))
        self._pace.measured_memory(run.job, ended.memory)
        if run.open and ended.code == 0:
            cost = measure.frame(ended)
            # More than the last only where the renderer does not tell of its frames.
            for index in range(run.text.index, len(plan.frames)):
                self._finish(run, plan, index, run.text.text, cost)
        self._measured(run, measure, len(plan.frames))
        return cut and bool(run.open) and not run.stopped.is_set()

    def _start(self, run: RunState, plan: Run) -> Process | None:
        """Start the renderer, with all that it looks for in its place; None when it is too late."""
        command = self.engine.command(plan)
        texts = {path: text.encode() for path, text in command.files.items()}
        texts.update({plan.place / name: text for name, text in self.engine.shared(plan).items()})
        for path, data in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for path, target in command.links.items():
            if not path.exists():  # a text of its own, or the link of the run before
                path.symlink_to(target)
        if run.stopped.is_set():
            return None
        run.free, run.crowd = free_room(plan.place), len(self._runs)
        run.scene_files = plan.scene_files()
        bounds = replace(
            self.bounds, reads=None if self.bounds.reads is None else command.reads,
            # What one scene writes must not fill the disk.
            file_size=shutil.disk_usage(plan.place).free // 2)
        run.process = self._launcher.start(command.argv, plan.place, command.environment, bounds)
        run.began = self._clock.monotonic()
        with self._changed:
            self._watched.add(run)
            self._changed.notify_all()
        return run.process

    def _finish_early(self, run: RunState, plan: Run, measure: _Measure) -> None:
        """Deliver the last frame before POV-Ray, which sleeps at its end, has ended."""
        options = run.lease.pov.options
        path = plan.made(plan.frames[-1])
        until = self._clock.monotonic() + START_SLEEP
        while run.open and self._clock.monotonic() < until:
            try:
                check_image(path.read_bytes(), options.extension, options.width, options.height)
            except (OSError, ImageError):
                time.sleep(0.01)
                continue
            self._finish(run, plan, run.text.index, run.text.text, measure.frame())
            self._measured(run, measure, len(plan.frames))
            with self._changed:
                self._runs.discard(run)
                self._changed.notify_all()

    def _measured(self, run: RunState, measure: _Measure, frames: int) -> None:
        if measure.frames == frames and not measure.told:
            measure.told = True
            self._pace.measured(run.job, frames, measure.cpu, measure.wall, run.threads)

    # --- delivering

    def _finish(self, run: RunState, plan: Run, index: int, text: str, cost: Cost) -> None:
        task = run.open.get(plan.frames[index]) if index < len(plan.frames) else None
        if task is None:
            return
        bottom = task.bottom or run.lease.pov.options.height
        try:
            image = self._kept(run, plan, task, bottom)
        except FileNotFoundError:
            return
        size, problem = self._add_written(run, plan, image)
        with self._changed:
            del run.open[task.frame]
            run.undelivered += 1
        self._deliveries.put(Delivery(run, task, image, size, bottom, text + problem, cost))

    def _kept(self, run: RunState, plan: Run, task: TaskSpec, bottom: int) -> Path:
        """Move what was made of a task to where it outlives the run; return the file."""
        made, kept = plan.made(task.frame), self._outbox / f"{run.started}-{task.id}"
        if task.kind is TaskKind.SLICE:
            data = made.read_bytes()
            try:
                data = crop_rows(data, run.lease.pov.options.extension, task.top, bottom - task.top)
            except ImageError as error:
                log.warning("%s: %s", task.name, error)  # the coordinator will find it, too
            kept.write_bytes(data)
        elif task.kind is TaskKind.PASS:
            made.stat()  # it ended well
            kept.write_bytes(_packed(plan.place))
        elif run.lease.in_order:  # a later frame may read it
            shutil.copyfile(made, kept)
        else:
            made.rename(kept)
        return kept

    def _add_written(self, run: RunState, plan: Run, image: Path) -> tuple[int, str]:
        """Append to an image what the scene has written since the last one; the size, a problem.

        The next frame may be writing the same file already: then its own look comes later.
        """
        before, run.scene_files = run.scene_files, plan.scene_files()
        changed = {name: size for name, (time, size) in run.scene_files.items()
                   if before.get(name) != (time, size)}
        if not changed or run.task.kind is TaskKind.PASS:
            return 0, ""
        if len(changed) > MAX_WRITTEN or sum(changed.values()) > MAX_WRITTEN_SIZE:
            return 0, ("povfarm: the scene's own files are not brought back: there may be "
                       f"{MAX_WRITTEN}, of {format_size(MAX_WRITTEN_SIZE)} together\n")
        files = {}
        for name in changed:
            with contextlib.suppress(OSError):
                files[name] = (plan.place / name).read_bytes()
                sha256 = hashlib.sha256(files[name]).hexdigest()
                if run.told.get(name) == sha256:
                    del files[name]
                run.told[name] = sha256
        packed = pack_files(files) if files else b""
        with open(image, "ab") as file:
            file.write(packed)
        return len(packed), ""

    def _deliver_all(self) -> None:
        while True:
            delivery = self._deliveries.get()
            try:
                self._deliver(delivery)
            except (FarmError, OSError) as error:
                log.warning("frame %d was not taken: %s", delivery.task.frame, error)
            finally:
                with contextlib.suppress(OSError):  # a disk may have become read-only
                    delivery.image.unlink()
                self._deliveries.task_done()
                self._let_go(delivery.run, 1)

    def _deliver(self, delivery: Delivery) -> None:
        """Offer a frame until it is taken or refused: it is kept for as long as that takes."""
        text, cost = delivery.text.encode(), delivery.cost
        path = f"/api/v1/leases/{delivery.run.lease.id}/tasks/{delivery.task.id}"
        query = (f"log={len(text)}&files={delivery.files}&cpu={cost.cpu:.3f}&wall={cost.wall:.3f}"
                 f"&parse={cost.parse:.3f}&memory={cost.memory}&bottom={delivery.bottom}")
        body = text + delivery.image.read_bytes()
        start = self._clock.monotonic()
        while True:
            try:
                self.client.request("PUT", f"{path}?{query}", body=body, timeout=120,
                                    retry_for=math.inf, stop=self._ending)
                self.rendered += 1
                return
            except RequestRefused as error:
                if error.status == 422:
                    refused = str(error)
                    break
                late = error.status != 507 and self._clock.monotonic() > start + OFFER_TIME
                if error.status < 500 or late:
                    raise
                self._in_trouble(str(error))
            self._ending.wait(random.uniform(5, 10))
        self.client.request(
            "POST", f"{path}/fail", retry_for=300,
            json={"message": refused, "scene": False, "log": delivery.text})


class _Measure:
    """What the frames of one run cost, parted at the moments when they ended."""

    def __init__(self, run: RunState, clock: Clock) -> None:
        self.frames = 0
        self.cpu = 0.0
        self.wall = 0.0
        self.told = False
        self._run = run
        self._clock = clock
        self._start = clock.monotonic()
        self._seen = (0.0, 0.0)  # when the first pixels of a frame came, and what part they were

    def frame(self, ended: Ended | None = None) -> Cost:
        """Return what the frame that has just ended cost."""
        process = self._run.process
        assert process is not None  # frames end only once there is a renderer
        cpu, wall = self.cpu, self.wall
        self.wall = self._clock.monotonic() - self._start
        now = ended.cpu if ended else process.cpu_now()
        self.cpu = self.wall if now is None else max(now, cpu)
        self.frames += 1
        memory = ended.memory if ended else process.memory_now()
        (first, part), self._seen = self._seen, (0.0, 0.0)
        spent = self.wall - wall
        # As if all rows were alike: what the first took before they were seen is no parsing.
        parse = (first - wall - part * spent) / (1 - part) if part < 1 else 0.0
        return Cost(self.cpu - cpu, spent, memory, min(max(parse, 0.0), spent))

    def tracing(self, part: float) -> None:
        """Take what part of a frame is rendered, 0 to 1."""
        if part and not self._seen[1]:
            self._seen = (self._clock.monotonic() - self._start, part)


def _sweep(cache: Path) -> None:
    """Delete what workers left that were killed: their runs, and files that came by half."""
    for path in cache.parent.glob("run-*-*"):
        if _is_orphan(path.name.split("-")[1]):
            shutil.rmtree(path, ignore_errors=True)
    for path in cache.rglob(".[0-9]*.*.part"):
        if _is_orphan(path.name.split(".")[1]):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_orphan(owner: str) -> bool:
    """Tell whether the process with this number, which made something, is no more."""
    if not owner.isdecimal() or int(owner) == os.getpid():  # in a container, of the one before us
        return True
    return not is_running(int(owner))


def _packed(place: Path) -> bytes:
    """Return what a pass has made for the slices, as a zip file."""
    paths = [place / name for name in (SAMPLE_FILE, PHOTON_FILE)]
    return pack_files({path.name: path.read_bytes() for path in paths if path.is_file()})


_FILE_TOO_LARGE = 25  # SIGXFSZ, which Windows does not have


def _why_it_failed(run: RunState, bounds: Bounds) -> tuple[str, bool]:
    """Return what went wrong, best in POV-Ray's words, and whether the scene is to blame."""
    error, ended = run.text.error(), run.ended
    if run.overdue:
        return run.overdue, False
    if run.fills_disk:
        return "POV-Ray wrote so much that it would have filled the disk", False
    if ended.code == -9:
        return "POV-Ray was killed, perhaps because the computer ran out of memory", False
    # POV-Ray that gets no more memory often fails without a word about it.
    if re.search("bad_alloc|(Out of|out of|Insufficient) memory", run.text.text) or (
            ended.memory > bounds.memory / 2 > 0 and not error.startswith("File ")):
        return f"POV-Ray needed more than {format_size(bounds.memory)} of memory", False
    error = error or f"POV-Ray ended without a picture (exit code {ended.code})"
    return error, run.text.scene_is_wrong


def _make_directories(run: Run, manifest: Manifest) -> None:
    """Give the run's own directory what POV-Ray wants to find in it and nowhere else.

    The project's directories, for scenes that write there, and the files of
    ``load_file``, which it does not look for in library paths.
    """
    home = PurePosixPath(run.lease.pov.run_dir)
    (run.tree / home).mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        parent = PurePosixPath(file.path).parent
        if home in (parent, *parent.parents):
            (run.place / parent.relative_to(home)).mkdir(parents=True, exist_ok=True)
    for use in run.lease.pov.uses:
        word, _, name = use.partition(" ")
        if word == "load_file":
            shutil.copyfile(safe_join(run.tree / home, name), safe_join(run.place, name))
    run.made(run.frames[0]).parent.mkdir(parents=True, exist_ok=True)


# === 21. CLI =================================================================
# What a person types. One small function per command, the only place that
# prints, and the only one that sees both towers. Results go to stdout,
# progress and errors to stderr.

Options = argparse.Namespace
CommandFunction = Callable[[Options], int]


@dataclass(frozen=True)
class command:  # noqa: N801 - it is used as a decorator
    """Tags a function as a command, or as several; ``main`` collects the tags.

    ``arguments`` is how the help shows what follows the name; ``pov`` says that
    everything that does not start with ``--`` is POV-Ray's command line.
    """

    name: str
    arguments: str
    summary: str
    pov: bool = False
    count: tuple[int, int] = (0, 0)
    groups: tuple[str, ...] = ()

    def __call__(self, function: CommandFunction) -> CommandFunction:
        """Tag ``function``, and return it as it was."""
        vars(function).setdefault("commands", []).insert(0, self)
        return function

    def settings(self) -> list[Setting]:
        """Return the options that the command takes."""
        mine = {self.name, *self.groups}
        return [row for row in SETTINGS if mine & set(row.commands.split())]


@dataclass(frozen=True)
class Draft:
    """A job before it is submitted, and where its images belong on this machine."""

    name: str
    pov: PovJob
    project: Project
    plan: FramePlan
    directory: Path
    options: JobOptions
    keeps_files: bool

    def destination(self, frame: int) -> Path:
        """Return where POV-Ray would have put the image of a frame."""
        return self.directory / self.plan.output_name(frame)


@command("render", "[POVRAY ARGUMENTS | DIRECTORY | PROJECT.zip]",
         "render here and now, with every core; --lan lets other computers help",
         pov=True, groups=("job",))
def render(options: Options) -> int:
    """The whole farm for one job: coordinator, worker, job, images in their places."""
    launcher = make_launcher()  # before the first thread
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="povfarm-")))
        stack.callback(launcher.close)
        engine = locate_engine(options.povray)
        ask = functools.partial(probed, engine, launcher)
        engine = ask() if options.lan else engine  # others are to have the same
        probe = _Background(ask)
        draft = _draft(options, scratch)
        _check_destination(draft)
        coordinator = _private_farm(options, scratch, draft)
        coordinator.start()
        stack.callback(coordinator.stop)
        client = Client(coordinator.url, coordinator.key)
        worker = _join(client, engine, launcher, scratch / "cache", options, None,
                       coordinator.store.blob_path)
        stack.callback(worker.stop)
        stack.callback(worker.stop)
        job, event = _submit(client, draft, coordinator.scheduler)
        directory = coordinator.store.job_directory(job, draft.name)
        needs = (probe, _Background(worker.run))
        return _follow(client, job, event, draft, options, directory, needs)


@command("serve", "", "start a coordinator: it holds the jobs, the page and the images")
def serve(options: Options) -> int:
    """Coordinate until stopped."""
    with contextlib.ExitStack() as stack:
        launcher = engine = None
        if options.work:
            launcher = make_launcher(options.nice)  # before the first thread
            stack.callback(launcher.close)
            engine = probed(locate_engine(options.povray), launcher)
        coordinator = Coordinator(
            options.data, bind=options.bind, port=options.port, name=options.name,
            discovery_port=None if options.no_discovery else options.discovery_port,
            admit_private=options.open, private=options.private, hosts=options.host.split(","),
            tls=_tls_files(options), lease_time=options.lease_time, httpov=options.httpov)
        coordinator.start()
        stack.callback(coordinator.stop)
        _greet(coordinator, options.bind in ("", "0.0.0.0", "::"), options.httpov)
        if launcher is not None and engine is not None:
            client = Client(coordinator.url, coordinator.key, fingerprint=coordinator.pin)
            worker = _join(client, engine, launcher, options.data / "cache", options,
                           options.data / "workers", coordinator.store.blob_path)
            stack.callback(worker.stop)
            stack.callback(worker.stop)
            threading.Thread(target=_work_here, args=(worker,), daemon=True).start()
        _until_signal()
        return 130


@command("work", "", "start a worker: it finds the coordinator and renders until stopped")
def work(options: Options) -> int:
    """Render for a coordinator; the first Ctrl-C finishes the frames under way."""
    with contextlib.closing(make_launcher(options.nice)) as launcher:
        engine = probed(locate_engine(options.povray), launcher)
        stop = threading.Event()
        signals = _Signals(stop.set)
        client = _find_coordinator(options, stop, waits=True)
        if client is None:
            return 130
        free = _why_unconfined(options)
        if free and not client.token and not options.unconfined:
            raise UserError(f"nobody vouches for the scenes of this farm, and {free}: give the "
                            "farm's --key, or say --unconfined to let them do what you can do")
        try:
            worker = _join(client, engine, launcher, options.data / "cache", options,
                           options.data / "workers", stop=stop)
        except ServerGone:
            if not signals.count:
                raise
            return 130
        signals.action = worker.stop
        if signals.count:  # while it joined
            return 130
        threading.Thread(target=listen_for_hints, name="hints", daemon=True,
                         args=(worker.client.hurry, options.discovery_port)).start()
        _say(f"working for {client.base_url} with POV-Ray {engine.version} "
             f"(Ctrl-C finishes what is under way, twice stops at once)")
        if free:
            _say(f"scenes can read and write whatever you can: {free}")
        _Background(worker.run).join()
        _say(f"rendered {worker.rendered} frame{'s' * (worker.rendered != 1)}")
        return 130 if signals.count else 0


@command("submit", "[POVRAY ARGUMENTS | DIRECTORY | PROJECT.zip]",
         "queue a job and print its number", pov=True, groups=("talk", "job"))
def submit(options: Options) -> int:
    """Send a project to a coordinator that runs already."""
    client = _coordinator(options)
    with tempfile.TemporaryDirectory(prefix="povfarm-") as scratch:
        draft = _draft(options, Path(scratch))
        if options.output is not None:
            draft = replace(draft, directory=options.output, plan=_flat(draft.plan))
            options.output.mkdir(parents=True, exist_ok=True)
        job, event = _submit(client, draft)
        if not options.json or not options.wait:
            print(json.dumps({"id": job}) if options.json else job, flush=True)
        if options.wait:
            draft = replace(draft, keeps_files=options.output is not None)
            return _follow(client, job, event, draft, options)
    return 0


@command("status", "[JOB]", "show the jobs, or one job", count=(0, 1), groups=("talk",))
def status(options: Options) -> int:
    """Print jobs; with --watch again after every change."""
    path = f"/api/v1/jobs/{_job_number(options.rest[0])}" if options.rest else "/api/v1/jobs"
    client = _coordinator(options)
    while True:
        farm = client.request("GET", "/api/v1/farm").json()
        if farm["notice"]:
            _say(farm["notice"])
        reply = client.request("GET", path).json()
        jobs = [reply] if options.rest else reply["jobs"]
        _show(options, reply if options.rest else jobs, _job_table(jobs))
        if not options.watch:
            return 0
        client.request("GET", f"/api/v1/events?after={farm['event']}&wait=30", timeout=60)


@command("workers", "[remove NAME|ID]", "show the workers, or let one in no more", count=(0, 2),
         groups=("talk",))
def workers(options: Options) -> int:
    """Print the workers and what they do."""
    client = _coordinator(options)
    views = client.request("GET", "/api/v1/workers").json()["workers"]
    if options.rest:
        return _remove_worker(client, views, options.rest)
    rows = [("id", "name", "state", "cores", "runs", "POV-Ray", "address")]
    rows += [(str(view["id"]), view["name"],
              view["state"] + (f" (code {view['code']})" if "code" in view else "")
              + (f": {view['reason']}" if "reason" in view else ""),
              str(view["cores"]), str(view["runs"]), view["engines"].get("povray", ""),
              view["address"]) for view in views]
    _show(options, views, _table(rows) if views else
          "no worker has joined: start one with 'povfarm.py work'")
    return 0


def _remove_worker(client: Client, views: Sequence[dict[str, Any]], rest: Sequence[str]) -> int:
    if rest[0] != "remove" or len(rest) != 2:
        raise UserError("usage: povfarm.py workers [remove NAME|ID]")
    found = [view for view in views if rest[1] == str(view["id"])] or [
        view for view in views if rest[1] == view["name"]]
    if len(found) != 1:
        raise UserError(f"there {'is no worker' if not found else 'are several workers'} called "
                        f"'{rest[1]}': take the id from 'povfarm.py workers'")
    client.request("DELETE", f"/api/v1/workers/{found[0]['id']}")
    _say(f"{found[0]['name']} is removed; its frames go to others. A worker that has the farm key "
         "can come again: to keep it out, make a new key (see the manual)")
    return 0


@command("logs", "JOB FRAME", "show what POV-Ray printed for a frame", count=(2, 2),
         groups=("talk",))
def logs(options: Options) -> int:
    """Print the text of every attempt at a frame."""
    job, frame = (_job_number(text) for text in options.rest)
    reply = _coordinator(options).request("GET", f"/api/v1/jobs/{job}/frames/{frame}/log")
    text = reply.body.decode("utf-8", "replace")
    _show(options, {"log": text}, text.removesuffix("\n"))
    return 0


@command("fetch", "JOB", "get the finished images of a job", count=(1, 1), groups=("talk",))
def fetch(options: Options) -> int:
    """Copy finished images that are not here yet into --output or NAME-frames."""
    job = _job_number(options.rest[0])
    ffmpeg = _ffmpeg() if options.video else ""
    client = _coordinator(options)
    view = client.request("GET", f"/api/v1/jobs/{job}").json()
    directory = options.output or Path(f"{_file_name(view['name'])}-frames")
    directory.mkdir(parents=True, exist_ok=True)
    frames, fetched = [], []
    for frame in _finished_frames(client, job):
        path = safe_join(directory, frame["name"])
        fetched += _fetch(client, f"/api/v1/jobs/{job}/frames/{frame['frame']}/image", path,
                          frame["sha256"])
        frames.append(path)
    if not options.json:
        print(f"{len(fetched)} new of {len(frames)} finished images in {directory}", flush=True)
    fetched += _fetch_written(client, job, directory)
    missing = view["frames"]["total"] - len(frames)
    if missing and (options.apng or options.video):
        raise FarmError(f"{missing} of {view['frames']['total']} frames are not finished: there "
                        "can be a film when all are")
    if options.apng:
        _make_apng(frames, options.apng, options.fps)
    if options.video:
        _make_video(ffmpeg, frames, options.video, options.fps)
    films = [str(film) for film in (options.apng, options.video) if film]
    if options.json:
        print(json.dumps({"files": fetched, "films": films}))
    return 0


@command("pause", "JOB", "give out no more of a job", count=(1, 1), groups=("talk",))
@command("resume", "JOB", "go on with a paused job", count=(1, 1), groups=("talk",))
@command("cancel", "JOB", "end a job; its finished images stay", count=(1, 1), groups=("talk",))
@command("retry", "JOB", "render the failed and cancelled frames again", count=(1, 1),
         groups=("talk",))
def steer(options: Options) -> int:
    """Pause, resume, cancel or retry a job."""
    job = _job_number(options.rest[0])
    path = f"/api/v1/jobs/{job}/{options.command}"
    view = _coordinator(options).request("POST", path, json={}).json()
    _say(f"job {job} ({view['name']}) is {view['state']}")
    return 0


@command("delete", "JOB", "delete a job and its images from the farm", count=(1, 1),
         groups=("talk",))
def delete(options: Options) -> int:
    """Delete a job."""
    job = _job_number(options.rest[0])
    _coordinator(options).request("DELETE", f"/api/v1/jobs/{job}")
    _say(f"job {job} is deleted")
    return 0


@command("set", "JOB KEY=VALUE ...",
         "change priority, max_workers, povray and other options of a job", count=(2, 9),
         groups=("talk",))
def set_option(options: Options) -> int:
    """Change how a job is treated."""
    job = _job_number(options.rest[0])
    changes: dict[str, Any] = {}
    for item in options.rest[1:]:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"'{item}' is not KEY=VALUE, such as priority=5")
        known = {"true": True, "on": True, "false": False, "off": False}
        whole = re.fullmatch(r"-?\d{1,15}", text)
        name = name.replace("-", "_")
        value = known.get(text.lower(), text) if name == "in_order" else text
        changes[name] = int(text) if whole else value
    _coordinator(options).request("PATCH", f"/api/v1/jobs/{job}", json=changes)
    _say(f"job {job}: {', '.join(options.rest[1:])}")
    return 0


@command("admit", "CODE", "let a worker in that shows this code", count=(1, 1), groups=("talk",))
def admit(options: Options) -> int:
    """Admit a pending worker."""
    reply = _coordinator(options).request(
        "POST", "/api/v1/workers/admit", json={"code": options.rest[0]})
    _say(f"{reply.json()['name']} may work now")
    return 0


@command("login", "", "print a link that lets one browser steer the farm", groups=("talk",))
def login(options: Options) -> int:
    """Print a login link, good once."""
    client = _coordinator(options)
    print(client.base_url + client.request("POST", "/api/v1/login", json={}).json()["path"])
    return 0


@command("backup", "DIRECTORY", "copy all that a coordinator keeps, also while it runs",
         count=(1, 1))
def backup(options: Options) -> int:
    """Copy a data directory; ``serve --data`` starts from the copy."""
    to = Path(options.rest[0]).expanduser()
    missing = Store.backup(options.data, to)
    _say(f"the farm is copied: 'povfarm.py serve --data {shlex.quote(str(to))}' starts from there")
    if missing:
        raise FarmError(f"{len(missing)} files are missing in the farm and in the copy, such as "
                        f"{missing[0]}")
    return 0


@command("discover", "", "show the coordinators on this network", groups=("talk",))
def discover_command(options: Options) -> int:
    """Print every coordinator that answers within a second and a half."""
    key = _known_key(options)
    found = discover(1.5, None, options.discovery_port)
    proven = {farm.farm_id for farm in discover(1.0, key.encode(), options.discovery_port)} \
        if key else set()
    views = [{"name": farm.name, "url": farm.url, "farm_id": farm.farm_id,
              "yours": farm.farm_id in proven} for farm in found]
    rows = [("name", "address", "")]
    rows += [(farm.name, farm.url, "has your key" if farm.farm_id in proven else "")
             for farm in found]
    _show(options, views, _table(rows) if found else
          "no coordinator answers: start one with 'povfarm.py serve'")
    return 0 if found or options.json else 1


@command("doctor", "", "check whether this computer is fit for rendering")
def doctor(options: Options) -> int:
    """Look at everything that the farm needs, and say what is missing."""
    with contextlib.closing(make_launcher()) as launcher:
        checks = {
            "Python": (sys.version_info >= (3, 9), platform.python_version()),
            "POV-Ray": _check_povray(options.povray, launcher),
            "confinement": _check_confinement(options.povray, launcher),
            "disk": _check_disk(options.data),
            "TCP port 2271": _check_port(socket.SOCK_STREAM, 2271),
            "UDP port 2269": _check_port(socket.SOCK_DGRAM, 2269),
        }
    _show(options, [{"check": name, "good": good, "text": text}
                    for name, (good, text) in checks.items()],
          _table([("ok" if good else "NO", name, text) for name, (good, text) in checks.items()]))
    return 0 if all(good for good, _ in checks.values()) else 1


@command("help", "[COMMAND]", "show this, or the options of a command", count=(0, 1))
def help_command(options: Options) -> int:
    """Print the help."""
    print(_command_help(_command(options.rest[0])[0]) if options.rest else _help())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in letters that it has not got
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except FarmError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None and not takes_nothing(error):
            raise
        _say(f"{error.filename or 'the disk'} cannot be used: {error.strerror}")
        return 1


# --- the command line

def _commands() -> dict[str, tuple[command, CommandFunction]]:
    return {tag.name: (tag, function) for function in globals().values() if callable(function)
            for tag in getattr(function, "__dict__", {}).get("commands", ())}


def _command(name: str) -> tuple[command, CommandFunction]:
    if name not in _commands():
        raise UserError(f"there is no command '{name}': see 'povfarm.py help'")
    return _commands()[name]


def _run(arguments: list[str]) -> int:
    if arguments in ([], ["--help"], ["-h"], ["help"]):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"povfarm {VERSION}")
        return 0
    for number in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, number) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, number), signal.default_int_handler)
    tag, function = _command(arguments[0])
    if "--help" in arguments:
        print(_command_help(tag))
        return 0
    options = _parse(tag, arguments[1:])
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="povfarm: %(message)s")
    return function(options)


def _parse(tag: command, arguments: list[str]) -> Options:
    """Part our options from the rest, which for POV-Ray commands is POV-Ray's."""
    rows = {f"--{row.name}": row for row in tag.settings()}
    options = Options(**{name.replace("-", "_"): value
                         for name, value in configured_defaults(os.environ).items()})
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--":
            rest += items
        elif not item.startswith("--"):
            rest.append(item)
        else:
            name, equals, text = item.partition("=")
            row = rows.get(name)
            if row is None:
                raise UserError(
                    f"'{tag.name}' has no option {name}: see 'povfarm.py help {tag.name}'")
            value = text if equals else "on" if row.is_flag else next(items, None)
            if value is None:
                raise UserError(f"{name} needs a value")
            setattr(options, row.name.replace("-", "_"), row.parse(value, name))
    least, most = tag.count
    if not tag.pov and not least <= len(rest) <= most:
        raise UserError(f"usage: povfarm.py {tag.name} {tag.arguments}".rstrip())
    options.rest = rest
    options.command = tag.name
    return options


def _help() -> str:
    rows = [(f"  {name}", tag.summary) for name, (tag, _) in _commands().items()]
    return "\n".join([
        f"povfarm {VERSION}: the render farm for POV-Ray, in one file", "",
        "usage: povfarm.py COMMAND [--OPTIONS] [POVRAY ARGUMENTS]", "", _table(rows), "",
        "  povfarm.py render camera2.ini +W640 +H480    what povray does, sooner",
        "  povfarm.py serve                             on one computer,",
        "  povfarm.py work                              on every other one,",
        "  povfarm.py submit camera2.ini +W640 +H480    and render on all of them", "",
        "What starts with -- is povfarm's; everything else is POV-Ray's own command line.",
        "'povfarm.py help COMMAND' shows a command's options; docs/manual.md has it all."])


def _command_help(tag: command) -> str:
    lines = [f"usage: povfarm.py {tag.name} [--OPTIONS] {tag.arguments}".rstrip(), "",
             tag.summary, ""]
    rows = []
    for row in tag.settings():
        metavar = row.metavar and f" {row.metavar}"
        plain = row.default not in (None, "", False)
        default = f" (by itself {row.default:g})" if isinstance(row.default, float) else (
            f" (by itself {row.default})" if plain and row.name != "cache-size" else "")
        rows.append((f"  --{row.name}{metavar}", row.help + default))
    return "\n".join([*lines, _table(rows), "",
                      "Each option is also an environment variable, such as "
                      f"{tag.settings()[0].variable if rows else 'POVFARM_DATA'}."])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# Names and messages come from others: none of them is to steer the terminal.
_CONTROLS = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


def _show(options: Options, data: Any, text: str) -> None:
    print(json.dumps(data) if options.json else text.translate(_CONTROLS), flush=True)


def _say(text: str) -> None:
    print(f"povfarm: {text.translate(_CONTROLS)}", file=sys.stderr, flush=True)


# --- jobs

def _draft(options: Options, scratch: Path) -> Draft:
    """Read the command line and the project; nothing is started or changed."""
    here = Path.cwd()
    arguments, cwd, named = _whole_project(options.rest, here, scratch)
    if not arguments:
        raise UserError(f"what shall be rendered? For example: povfarm.py {options.command} "
                        "scene.pov +W640 +H480")
    pov = read_command_line(arguments, cwd, os.environ)
    plan = plan_frames(pov)
    outputs = {plan.output_name(frame) for frame in plan.frames}
    project = collect_project(
        pov.scene, pov.library, cwd, options.root, outputs, plan.frames,
        [Path(path) for path in standard_library()],
        ini_dirs=[(cwd / name).parent for name in pov.ini_files])
    uses = tuple(sorted(project.uses))
    for warning in (*pov.warnings, *project.warnings):
        _say(warning)
    in_order = options.in_order
    if in_order is None and "own-output" in uses and plan.animation:
        in_order = True
        _say("the scene reads images that its frames write: they are rendered in order on one "
             "computer (if they need not be, add --in-order=no)")
    values = {**pov.values, "Input_File_Name": project.scene}
    if project.scene != pov.scene:
        # The images are named after the scene as it is called here.
        values["Output_File_Name"] = plan.stem + plan.extension
    job = PovJob(values, pov.declares, project.library, project.run_dir, uses)
    limits = JobOptions().changed({
        "priority": options.priority, "max_workers": options.max_workers or 0,
        "retry_limit": options.retries, "in_order": bool(in_order),
        "slices": options.slices, "radiosity": options.radiosity,
        "povray": options.povray_version, "verify": options.verify,
        "frame_timeout": options.frame_timeout})
    name = options.name or named or PurePosixPath(pov.scene).stem
    if named:
        plan, directory = _flat(plan), here / f"{named}-frames"
    else:
        directory = cwd
    return Draft(name, job, project, plan, directory, limits, pov.to_file)


def _whole_project(arguments: Sequence[str], here: Path,
                   scratch: Path) -> tuple[list[str], Path, str]:
    """Turn a directory or zip among POV-Ray's arguments into what it holds.

    Returns the arguments, the directory that they are meant in, and the name
    of the project, empty when there is none.
    """
    for index, item in enumerate(arguments):
        path = here / item
        # An option may be longer than the name of a directory can be.
        whole = os.path.isdir(path)  # noqa: PTH112 - which just says no then
        if item.startswith(("+", "-")) or not (whole or item.lower().endswith(".zip")):
            continue
        if whole:
            place, name = path, path.resolve().name
        else:
            place, name = scratch / "project", path.stem
            read_zip(path, place)
        found = find_project(place)
        return ([*arguments[:index], quoted(found.name), *arguments[index + 1:]], found.parent,
                name)
    return list(arguments), here, ""


def _flat(plan: FramePlan) -> FramePlan:
    """Return a plan whose files have no directory."""
    return replace(plan, stem=PurePosixPath(plan.stem).name)


def _check_destination(draft: Draft) -> None:
    """Fail before anything is rendered where the images could not be written."""
    directory = draft.destination(draft.plan.frames[0]).parent
    if draft.directory.name.endswith("-frames") and draft.directory == directory:
        directory.mkdir(exist_ok=True)
    if draft.keeps_files and not directory.is_dir():
        raise UserError(f"the directory {directory} for the images is not there: make it first")
    if draft.keeps_files and not _is_writable(directory):
        raise UserError(f"the images cannot be written into {directory}: choose another with +O")


def _is_writable(directory: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True


def _submit(client: Client, draft: Draft, farm: Scheduler | None = None) -> tuple[int, int]:
    """Submit a job and send the files that the farm does not have.

    Returns the job's number and that of the last event before it. A ``farm``
    in this process is handed the files; nothing is sent.
    """
    reply = client.request("POST", "/api/v1/jobs", json={
        "name": draft.name, "pov": draft.pov.to_wire(),
        "manifest": draft.project.manifest.to_wire(), "options": vars(draft.options),
        "ticket": secrets.token_hex(16),
    }, timeout=120).json()
    files = {file.sha256: draft.project.sources[file.path]
             for file in draft.project.manifest.files}
    try:
        for sha256 in reply["missing"]:
            if farm is not None:
                farm.put_blob(sha256, file_blocks(files[sha256]))
            else:
                client.request("PUT", f"/api/v1/blobs/{sha256}", body=files[sha256])
    except BaseException:
        # A job that would wait for ever for its files is worse than none.
        with contextlib.suppress(FarmError):
            client.request("DELETE", f"/api/v1/jobs/{reply['id']}", retry_for=0)
        raise
    return reply["id"], reply["event"]


def _link_or_copy(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, to)


def _put_image(image: Path, to: Path) -> None:
    """Put an image that is on this computer in its place, whole or not at all."""
    try:
        with placed(to) as part:
            _link_or_copy(image, part)
    except OSError as error:
        raise FarmError(f"{to} cannot be written: {error.strerror or error}") from error


def _follow(client: Client, job: int, event: int, draft: Draft, options: Options,
            near: Path | None = None, needs: Sequence[_Background] = ()) -> int:
    """Show a job's progress and put its images in their places until it is finished.

    They are in the directory ``near`` where the coordinator is this process,
    which ends with what one of the ``needs`` of its only worker has raised.
    """
    bar = ProgressBar(draft.name, sys.stderr)
    started = time.monotonic()
    stop = threading.Event()
    _Signals(stop.set)
    files: list[str] = []
    seen, ended, notice = event, False, ""
    have: set[int] = set()
    while not ended:
        for need in needs:
            need.check()
        try:
            if bar.due():
                view = client.request("GET", f"/api/v1/jobs/{job}", stop=stop).json()
                if view["notice"] not in ("", notice):
                    bar.close()
                    _say(view["notice"])
                notice = view["notice"]
                bar.show(view)
            reply = client.request("GET", f"/api/v1/events?after={seen}&wait={bar.pause}",
                                   stop=stop)
        except ServerGone:
            if not stop.is_set():
                raise
        if stop.is_set():
            raise KeyboardInterrupt
        events = [event for event in reply.json()["events"] if event["job"] == job]
        seen = max([seen, *(event["id"] for event in reply.json()["events"])])
        done = {event["frame"] for event in events if event["what"] == TaskState.DONE.value}
        for frame in sorted(done - have if draft.keeps_files else ()):
            to = draft.destination(frame)
            if near is None:
                client.download(f"/api/v1/jobs/{job}/frames/{frame}/image", to)
            else:
                _put_image(near / to.name, to)
            files.append(str(to))
        have |= done
        ended = not reply.json()["more"] and any(
            event["what"] in _JOB_ENDS and event["text"] != PAUSED_BY_HAND for event in events)
        if not ended:
            stop.wait(0.05)  # what happens in a moment is told in one answer
    bar.close()
    for need in needs:
        need.check()
    written = _fetch_written(client, job, draft.directory) if draft.keeps_files or near else []
    view = client.request("GET", f"/api/v1/jobs/{job}").json()
    return _conclude(view, files, written, draft, time.monotonic() - started, options)


_JOB_ENDS = frozenset(f"job {state}" for state in ("done", "failed", "cancelled", "paused"))


def _conclude(view: dict[str, Any], files: list[str], written: list[str], draft: Draft,
              seconds: float, options: Options) -> int:
    """Say how a job ended, and return the exit code."""
    counts = view["frames"]
    if options.json:
        print(json.dumps({"job": view, "files": files + written, "seconds": round(seconds, 3)}))
    if view["state"] == JobState.DONE.value:
        where = f" in {Path(files[0]).parent}" if files else ""
        frames = f"{counts['total']} frames" if counts["total"] > 1 else "1 image"
        if not draft.keeps_files and options.command == "render":
            where = "; no file is kept, as Output_To_File is off"
        more = f" and {len(written)} other file{'s' * (len(written) > 1)}" if written else ""
        if not options.json:
            print(f"{frames}{more}{where}, {format_duration(seconds)}")
        return 0
    failure = view["failure"]
    failed = counts["failed"] and counts["total"] > 1
    text = f"{counts['failed']} of {counts['total']} frames failed" if failed else ""
    if failure:
        where = f" (frame {failure['frame']})" if counts["total"] > 1 else ""
        text = f"{text + ': ' if text else ''}{failure['message']}{where}"
    raise FarmError(text or f"the job is {view['state']}: {view['reason']}")


def _fetch_written(client: Client, job: int, directory: Path) -> list[str]:
    """Get the files that the scene wrote and that are not there already; return where they are."""
    fetched = []
    for file in client.request("GET", f"/api/v1/jobs/{job}/files").json()["files"]:
        path = safe_join(directory, file["path"])
        fetched += _fetch(client, f"/api/v1/jobs/{job}/files/{file['sha256']}", path,
                          file["sha256"])
    return fetched


def _fetch(client: Client, route: str, to: Path, sha256: str) -> list[str]:
    """Get a file unless it is there already; return where it is if it was got."""
    if is_file(to) and sha256_file(to) == sha256:
        return []
    to.parent.mkdir(parents=True, exist_ok=True)
    client.download(route, to, sha256)
    return [str(to)]


def _finished_frames(client: Client, job: int) -> Iterator[dict[str, Any]]:
    after = -1
    while True:
        frames = client.request("GET", f"/api/v1/jobs/{job}/frames?after={after}").json()["frames"]
        if not frames:
            return
        yield from (frame for frame in frames if frame["state"] == TaskState.DONE.value)
        after = frames[-1]["frame"]


def _job_number(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise UserError(f"'{text}' is not a number: 'povfarm.py status' shows the jobs")
    return int(text)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "job"


def _job_table(jobs: Sequence[dict[str, Any]]) -> str:
    if not jobs:
        return "no jobs: queue one with 'povfarm.py submit'"
    rows = [("job", "name", "state", "frames", "", "rate", "left")]
    for job in jobs:
        frames = job["frames"]
        failed = f", {frames['failed']} failed" if frames["failed"] else ""
        left = format_duration(job["eta"]) if job["eta"] is not None else ""
        rows.append((
            str(job["id"]), job["name"], job["state"],
            f"{frames['done']}/{frames['total']}{failed}{_slices_of(job)}",
            f"{100 * job['progress']:.0f} %",
            f"{3600 * job['rate']:.0f}/h" if left else "",
            left))
        rows += [("", job[why], "", "", "", "", "") for why in ("reason", "waiting_for")
                 if job[why]]
    return _table(rows)


def _slices_of(job: Mapping[str, Any]) -> str:
    """Return how many slices of the frames in work are there, for a line about a job."""
    slices = job["slices"]
    return f", {slices['done']}/{slices['total']} slices" if slices["total"] else ""


class ProgressBar:
    """A line that is drawn again on a terminal, or a line now and then in a pipe."""

    def __init__(self, name: str, file: Any) -> None:
        self._name = name
        self._file = file
        self._terminal = file.isatty()
        self.pause = 0.25 if self._terminal else 5.0
        self._last = -math.inf
        self._width = 0

    def due(self) -> bool:
        """Tell whether it is time to show something new."""
        return time.monotonic() - self._last >= self.pause

    def show(self, job: Mapping[str, Any]) -> None:
        """Show how far a job is, as the API describes it."""
        self._last = time.monotonic()
        line = self.line(job)
        if self._terminal:
            line = line[:shutil.get_terminal_size().columns - 1]  # a second row would stay
            self._file.write("\r" + line.ljust(self._width))
            self._width = len(line)
        elif job["progress"] > 0:
            self._file.write(line + "\n")
        self._file.flush()

    def line(self, job: Mapping[str, Any]) -> str:
        """Return the line for a job."""
        frames, part = job["frames"], job["progress"]
        filled = int(24 * part)
        text = f"{self._name} "
        text += f"[{'#' * filled}{'.' * (24 - filled)}] " if self._terminal else ""
        text += f"{frames['done']}/{frames['total']} frames{_slices_of(job)} {100 * part:3.0f} %"
        if frames["failed"]:
            text += f", {frames['failed']} failed"
        if job["eta"] is not None and part > 0:
            text += f", {job['rate']:.2f}/s, {format_duration(job['eta'])} left"
        return text

    def close(self) -> None:
        """Take the line away."""
        if self._terminal and self._width:
            self._file.write("\r" + " " * self._width + "\r")
            self._file.flush()


# --- films

def _ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        how = {"darwin": "brew install ffmpeg", "win32": "winget install ffmpeg"}
        raise FarmError("--video needs the program ffmpeg: "
                        + how.get(sys.platform, "sudo apt-get install ffmpeg"))
    return program


def _make_apng(frames: Sequence[Path], to: Path, rate: Fraction) -> None:
    if any(frame.suffix != ".png" for frame in frames):
        raise FarmError(f"an animated PNG is made of PNG images, these are {frames[0].suffix}: "
                        "--video takes them")
    images = (frame.read_bytes() for frame in frames)
    with _film(to) as part, open(part, "wb") as file:
        file.writelines(animated_png(images, len(frames), 1 / rate))


def _make_video(ffmpeg: str, frames: Sequence[Path], to: Path, rate: Fraction) -> None:
    """Let ffmpeg read the frames under plain numbers: it takes a % in a name for a pattern."""
    kind = frames[0].suffix
    if kind == ".hdr":
        raise FarmError("ffmpeg makes no film of .hdr images: render PNG or EXR for it")
    # EXR is the only other type whose values are amounts of light, which ffmpeg would show dark.
    light = ["-apply_trc", "iec61966_2_1"] if kind == ".exr" else []
    with _film(to) as part:
        for number, frame in enumerate(frames):
            _link_or_copy(frame.resolve(), part.with_name(f"{number}{kind}"))
        # Players expect even sizes and colours at half the resolution, and take the colours of
        # large pictures for those of BT.709 where nothing else is said.
        look = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709,format=yuv420p",
                "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
        done = subprocess.run(
            [ffmpeg, "-hide_banner", "-loglevel", "error", "-framerate", str(rate), *light,
             "-i", f"%d{kind}", *([] if to.suffix == ".gif" else look), part.name],
            cwd=part.parent, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
            raise FarmError(f"ffmpeg ended with exit code {done.returncode} and said: {last}")


@contextlib.contextmanager
def _film(to: Path) -> Iterator[Path]:
    """Give a file in an empty directory, which takes its place when it is whole."""
    try:
        with tempfile.TemporaryDirectory(prefix=".povfarm-", dir=to.parent) as scratch:
            part = Path(scratch, f"film{to.suffix}")
            yield part
            os.replace(part, to)
    except OSError as error:
        raise FarmError(f"{to} cannot be written: {error.strerror}") from None
    _say(f"made {to}")


# --- farms and workers

def _private_farm(options: Options, scratch: Path, draft: Draft) -> Coordinator:
    data = scratch / "farm"
    if not options.lan:
        return Coordinator(data, bind="127.0.0.1", name=draft.name, durable=False)
    # Workers that know this user's farm key may help without being asked for.
    data.mkdir()
    atomic_write(data / "farm.key", farm_key(options.data).encode(), 0o600)
    coordinator = Coordinator(data, name=draft.name, durable=False,
                              discovery_port=options.discovery_port)
    _say(f"others help with: povfarm.py work --server http://{_lan_address()}:{coordinator.port} "
         f"--key {coordinator.key}")
    return coordinator


def _join(client: Client, engine: Engine, launcher: Launcher | WindowsLauncher, cache: Path,
          options: Options, tokens: Path | None,
          near: Callable[[str], Path] | None = None,
          stop: threading.Event | None = None) -> Worker:
    """Join a farm as a worker, as the one that this computer was before if it can.

    That is known by the files in ``tokens``; ``near`` is for the ``Cache``. It
    waits for the coordinator, until ``stop``.
    """
    cores = options.cores or _cores()
    info = {
        "name": options.worker_name or socket.gethostname(),
        "cores": cores, "memory": total_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "engines": engine.told() if engine.version else {},
        "tags": [tag for tag in options.tags.split(",") if tag],
        "ticket": secrets.token_urlsafe(32),
    }
    token = _Token(tokens, str(info["name"]), client.base_url)
    info["name"] = token.name
    own = Client(client.base_url, retry_for=math.inf, fingerprint=client.fingerprint)
    # What it kept may be of no use any more, or of a time when it came without the key.
    kept = token.read()
    for secret in (kept, client.token) if kept else (client.token,):
        own.token = secret
        try:
            reply = own.request("POST", "/api/v1/workers", json=info, stop=stop).json()
        except RequestRefused as error:
            if error.status != 401 or secret == client.token:
                raise
        else:
            if reply["admitted"] or not client.token:
                break
    if reply["token"]:
        own.token = reply["token"]
        token.write(reply["token"])
    if not reply["admitted"]:
        _say(f"waiting to be admitted: the status page at {client.base_url} shows the code "
             f"{reply['code']}, or type there: povfarm.py admit {reply['code']}")
    projects = Cache(cache, options.cache_size, own, near)
    bounds = Bounds(None if options.unconfined else (), options.memory or total_memory())
    return Worker(own, engine, launcher, projects, cores, options.until_idle, bounds=bounds)


def _why_unconfined(options: Options) -> str:
    """Return why this computer does not confine renders, nothing when it does."""
    if options.unconfined:
        return "--unconfined was given"
    return "" if landlock_abi() else "this system cannot confine them (it has no Landlock)"


class _Token:
    """A worker's secret on disk, held by one process at a time under one name."""

    def __init__(self, directory: Path | None, name: str, url: str) -> None:
        self.name = name
        self._path: Path | None = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        farm = hashlib.sha256(url.encode()).hexdigest()[:12]
        for number in itertools.count(1):
            self.name = name if number == 1 else f"{name}-{number}"
            self._path = directory / f"{_file_name(self.name)}-{farm}"
            self._lock = open(self._path, "ab")  # noqa: SIM115 - held until the end
            try:
                hold_file(self._lock)
                return
            except OSError:
                self._lock.close()  # another worker of this computer has that name

    def read(self) -> str:
        """Return the secret, empty when there is none."""
        return self._path.read_text(encoding="ascii").strip() if self._path else ""

    def write(self, token: str) -> None:
        """Keep a secret; in the same file, which is locked, and where a full disk has room."""
        if self._path is not None:
            self._path.chmod(0o600)
            with open(self._path, "r+", encoding="ascii") as file:
                file.write(token)
                file.truncate()


def _work_here(worker: Worker) -> None:
    try:
        worker.run()
    except FarmError as error:
        _say(f"this computer renders no more: {error}")


def _cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tls_files(options: Options) -> tuple[Path, Path] | None:
    if options.tls_key and not options.tls_cert:
        raise UserError("--tls-key needs the certificate, too: --tls-cert FILE")
    if options.tls_cert:
        return options.tls_cert, options.tls_key or options.tls_cert
    return own_certificate(options.data, options.host.split(",")) if options.tls else None


def _greet(coordinator: Coordinator, everywhere: bool, httpov: bool) -> None:
    address = coordinator.url
    if everywhere:
        address = f"{address.partition(':')[0]}://{_lan_address()}:{coordinator.port}"
    pin = f" --pin {coordinator.pin}" if coordinator.pin else ""
    login_link = f"{coordinator.url}/login/{coordinator.access.login_code()}"
    print("\n".join([
        f"povfarm '{coordinator.name}' is at {address}",
        f"  steer it in a browser here:  {login_link}",
        "  start workers elsewhere:     "
        f"python povfarm.py work --server {address} --key {coordinator.key}{pin}",
        *(["  make HTTPov clients join:    mkdir -p ~/.httpovclient && printf 'HP_SERVER=\"%s\"\\n"
           f"HP_GROUP=\"%s\"\\n' {address.removeprefix('http://')} {coordinator.access.guest_key} "
           ">> ~/.httpovclient/prefs"] if httpov else []),
        "  queue a job here:            python povfarm.py submit scene.pov +W640 +H480",
        "Ctrl-C stops it; nothing is lost."]), flush=True)


def _lan_address() -> str:
    """Return the address by which others on the LAN reach this machine, or loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation address: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _known_key(options: Options) -> str:
    if options.key:
        return str(options.key)
    try:
        return Path(options.data, "farm.key").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _coordinator(options: Options) -> Client:
    client = _find_coordinator(options, threading.Event(), waits=False)
    assert client is not None  # only a wait that was stopped finds none
    return client


def _find_coordinator(options: Options, stop: threading.Event, waits: bool) -> Client | None:
    """Return a client for the coordinator that is meant; None when stopped while waiting."""
    key = _known_key(options)
    patience = 20.0 if waits else 1.0
    if options.server:
        url = _server_url(options.server, bool(options.pin))
        return _check_coordinator(_client(options, url, key, "", patience), options)
    name = "" if options.command == "submit" else options.name  # there it is the job's
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, FarmError):
        note = json.loads((options.data / "coordinator.json").read_text(encoding="utf-8"))
        if name in ("", note["name"]):
            client = _client(options, note["url"], key, note["pin"], patience)
            return _check_coordinator(client, options, retry_for=0)
    found = _discover(options, key, name, waiting=False)
    if not found and waits:
        _say("no coordinator answers yet: waiting for one (start it with 'povfarm.py serve')")
        only = options.key.encode() if options.key else None
        while not found and not stop.is_set():
            wait_for_coordinator(only, stop, options.discovery_port, name or None)
            found = _discover(options, key, name, waiting=True)
    if stop.is_set():
        return None
    farm = _choose(found)
    return _client(options, farm.url, key if farm.verified or options.key else "", farm.pin,
                   patience)


def _client(options: Options, url: str, key: str, pin: str, patience: float) -> Client:
    """Return a client that believes the certificate of the command line, if there is one."""
    if options.pin and not url.startswith("https:"):
        raise UserError(f"{url} speaks no TLS, which --pin asks for")
    return Client(url, key, retry_for=patience, fingerprint=options.pin or pin)


def _server_url(text: str, tls: bool) -> str:
    """Return the address of a coordinator from what a person types for it."""
    bare = "//" not in text
    url = f"{'https' if tls else 'http'}://{text}" if bare else text
    parts = urllib.parse.urlsplit(url)
    if (bare or parts.scheme == "http") and not re.search(r":\d+$", parts.netloc):
        url = parts._replace(netloc=f"{parts.netloc}:2271").geturl()
    return url


def _discover(options: Options, key: str, name: str, waiting: bool) -> list[Found]:
    """Return the coordinators that answer; those that hold our key, if any does.

    A key that was typed must be right; one that only lies here may be that of
    another farm, one of this computer. Who is ``waiting`` already is not stopped
    by somebody else's answer.
    """
    found = discover(1.5, key.encode(), options.discovery_port, name or None) if key else []
    others = [] if found else discover(1.5, None, options.discovery_port, name or None)
    if not others or not options.key:
        return found or others
    refusal = (f"{others[0].name} at {others[0].url} has another key than the one given: "
               "copy the worker command that 'serve' prints there")
    if not waiting:
        raise FarmError(refusal)
    log.warning("%s", refusal)
    return []


def _choose(found: Sequence[Found]) -> Found:
    if not found:
        raise FarmError("no coordinator answers on this network: start one with "
                        "'povfarm.py serve', or name it with --server URL")
    if len(found) > 1:
        names = ", ".join(f"{farm.name} ({farm.url})" for farm in found)
        raise UserError("there are several coordinators, choose one with --name or --server: "
                        + names)
    return found[0]


def _check_coordinator(client: Client, options: Options, retry_for: float | None = None) -> Client:
    """Fail now, in one line, when there is no coordinator or the key is wrong."""
    ask = functools.partial(client.request, "GET", "/api/v1/farm", timeout=10, retry_for=retry_for)
    key = client.token
    try:
        farm = ask().json()
    except RequestRefused as error:
        if error.status == 401 and not key and options.command == "work":
            return client  # a private farm, which a worker without the key may ask to let it in
        if error.status != 401 or options.key or not key:
            raise
        client.token = ""  # a key that only lies here is another farm's
        farm = ask().json()
    if not isinstance(farm, dict) or "farm_id" not in farm:
        raise FarmError(f"{client.base_url} is not a povfarm coordinator")
    return client


class _Signals:
    """Calls ``action`` for every Ctrl-C or SIGTERM, and counts them.

    Not by an exception, which would be lost where it hits a ``__del__``, nor
    in the handler itself, which runs in the middle of anything, locks too.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action
        self.count = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1
        threading.Thread(target=self._act, args=(self.count,), daemon=True).start()

    def _act(self, count: int) -> None:
        if count == 1:
            _say("stopping")
        self.action()


class _Background:
    """A function in a thread whose exception comes out of ``join``."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._future: concurrent.futures.Future[None] = concurrent.futures.Future()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            function()
            self._future.set_result(None)
        except BaseException as error:
            self._future.set_exception(error)

    def join(self) -> None:
        """Wait for the end; signals are handled while waiting."""
        while not self._future.done():
            concurrent.futures.wait([self._future], timeout=1.0)
        self.check()

    def check(self) -> None:
        """Raise what the function has raised, if it has."""
        if self._future.done():
            self._future.result()


def _until_signal() -> None:
    stop = threading.Event()
    _Signals(stop.set)
    while not stop.wait(1):  # a signal that reaches another thread wakes nobody here
        pass


# --- doctor

def _check_povray(program: str, launcher: Launcher | WindowsLauncher) -> tuple[bool, str]:
    try:
        engine = probed(locate_engine(program), launcher)
    except UserError as error:
        return False, str(error)
    if not engine.library:
        return False, (f"{engine.version} at {engine.program}, but its include files "
                       "are not found: install povray-includes")
    return True, f"{engine.version} at {engine.program}"


# What every program may do and a render may not; "end" tells that all of it was tried.
_TRIES = """
import os, socket, sys
for what, attempt in (
        ("read your files", lambda: open(sys.argv[1])),
        ("write your files", lambda: open(sys.argv[1], "a")),
        ("use the network", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
        ("connect", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])))),
        ("start programs", lambda: os.fork() or os._exit(0))):
    try:
        attempt()
        print(what)
    except OSError:
        pass
print("end")
"""


def _check_confinement(program: str, launcher: Launcher | WindowsLauncher) -> tuple[bool, str]:
    """Start a program that tries everything, and POV-Ray, as renders are started."""
    if sys.platform != "linux":
        return True, "not on this system: work only for farms whose people you trust"
    with tempfile.TemporaryDirectory(prefix="povfarm-") as scratch, socket.create_server(
            ("127.0.0.1", 0)) as server:
        private, place = Path(scratch, "private"), Path(scratch, "run")
        private.touch()
        place.mkdir()
        try:
            python = tuple({sys.prefix, sys.base_prefix})
            argv = [sys.executable, "-I", "-S", "-c", _TRIES, str(private),
                    str(server.getsockname()[1])]
            got = list(launcher.start(argv, place, {}, Bounds(python)).lines())
            engine = locate_engine(program)
            told = list(launcher.start(
                (engine.program, "--version"), place, {"HOME": str(place)},
                Bounds(engine.parts())).lines())
        except UserError:
            told = ["POV-Ray"]  # the check of POV-Ray says what is wrong with it
    if got[-1:] != ["end"]:
        return False, f"cannot be tried: {' '.join(got[-1:])}"
    if len(got) > 1:
        return False, f"a scene can {', '.join(got[:-1])}: work only for people you trust"
    if not any("POV-Ray" in line for line in told):
        return False, f"POV-Ray does not start so: {' '.join(told[-1:])} (see --unconfined)"
    return True, (f"Landlock {landlock_abi()}: a scene can read and write only its own "
                  "files, and has no network")


def _check_disk(data: Path) -> tuple[bool, str]:
    place = next(path for path in (data, *data.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    return free > 10**9 and _is_writable(place), f"{format_size(free)} free at {place}"


def _check_port(kind: int, port: int) -> tuple[bool, str]:
    with socket.socket(socket.AF_INET, kind) as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return True, "in use: a coordinator seems to run here"
    return True, "free"


if __name__ == "__main__":
    sys.exit(main())
