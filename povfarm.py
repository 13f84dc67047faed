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
     7. SLICING      how a picture is shared out: where it is cut, who gets how much
     8. DISCOVERY    the UDP beacon
     9. HTTP         requests, responses, routes, limits, the socket adaptor
    10. STORE        the database and the blobs: all SQL
    11. SCHEDULER    the only writer of states
    12. API          native JSON under /api/v1 and its OpenAPI document
    13. HTTPOV       the protocol of HTTPov's clients
    14. SHEEPIT      the protocol of SheepIt's clients
    15. RENDERONLINE the protocol of RenderOnline's clients
    16. PAGES        the status page
    17. COORDINATOR  puts 10 to 16 together, housekeeping, shutdown
    18. ENGINES      command lines, progress and error patterns of renderers
    19. CLIENT       one request function: retries, authentication, streams
    20. PROCESS      starts, watches, measures and ends a renderer
    21. WORKER       lease, fetch, render, check, upload; heartbeat; cache
    22. CLI          one small function per command

The command line is stable between versions. The Python names in this file
are not: script the commands with ``--json``, or use the HTTP API.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import ctypes
import email.utils
import enum
import errno
import fnmatch
import functools
import getpass
import hashlib
import hmac
import html
import http.client
import http.server
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
import socketserver
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
import typing
import unicodedata
import urllib.parse
import uuid
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import (
    Any,
    BinaryIO,
    Callable,
    Collection,
    ContextManager,
    Dict,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypedDict,
    TypeVar,
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
# durations and hashes. Knows nothing of POV-Ray and of farms, and of HTTP only the
# status with which a refusal is answered.

VERSION = "0.1.0"
BUFFER = 1 << 16  # bytes moved at a time when a file or a body is streamed
PEER_SILENCE, PEER_PAUSE = 20, 5  # seconds after which a silent peer is asked, and asked again
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


class NotFound(FarmError):
    """What was named is not there."""


class Damaged(FarmError):
    """What came is not what it should be: whoever has it is to send it as it is."""


class StoreError(FarmError):
    """The database or the data directory cannot do what was asked."""


class NoRoom(StoreError):
    """A disk takes nothing: who has something to store keeps it, and tries again later."""


class NotYours(FarmError):
    """Somebody asked for what only others may do."""


class Crowded(FarmError):
    """There are as many already as there may be: others have to go first."""


class TryAgain(StoreError):
    """What was sent is gone again, by chance: it is to be sent once more."""


class IllegalTransition(StoreError):
    """A task or a job was asked to change into a state that it cannot reach."""


class StaleLease(StoreError):
    """A lease that has ended was shown: its holder should stop that work."""


class RenderFailed(FarmError):
    """A renderer ran and left no good picture; the message says why."""


class Stopped(FarmError):
    """A person has ended the command; the message says how to go on."""

    exit_code = 130


class ImageError(Damaged):
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


def real_path(path: Path | str) -> Path:
    """Return what a path leads to; unlike ``Path.resolve``, of links in a circle one of them."""
    return Path(os.path.realpath(path))


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


def link_or_copy(source: Path, to: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, to)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, to)


def keep_private(data: Path) -> None:
    """Let no other user of this computer see what a directory holds, or will."""
    os.umask(0o077)
    with contextlib.suppress(OSError):  # it is somebody else's, or comes later
        if not Path.home().samefile(data):
            data.chmod(0o700)


def atomic_write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` so that ``path`` holds all of it or what it held before."""
    with placed(path) as part, open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while a file is made into a ``FarmError`` that names it."""
    try:
        yield
    except OSError as error:
        raise FarmError(f"{path} cannot be written: {error.strerror or error}") from error


def derived(secret: str, *words: str) -> str:
    """Return a secret that whoever has another one can make of it and of words that all may know.

    It leads back to nothing: 64 hexadecimal digits.
    """
    return hmac.new(secret.encode(), "\0".join(words).encode(), "sha256").hexdigest()


def person_key(name: str, secret: str, ticket: str) -> str:
    """Return what a person shows: the name, encoded, and a secret that both ends make of another.

    That is the farm key, or the secret of an invitation; ``ticket`` makes each another one.
    """
    return f"{urllib.parse.quote(name)}:{derived(secret, 'person', name, ticket)}"


def invitation_code(secret: str, ticket: str) -> str:
    """Return a code of ten letters and digits, made of the farm key."""
    digits = int(derived(secret, "invitation", ticket), 16)
    code = "".join(CODE_LETTERS[digits >> 5 * place & 31] for place in range(10))
    return f"{code[:5]}-{code[5:]}"


def invitation_secret(code: str) -> str:
    """Return what is made of a code, slowly: so that what was heard does not lead back to it."""
    plain = re.sub(r"[^A-Z0-9]", "", code.upper())
    return hashlib.pbkdf2_hmac("sha256", plain.encode(), b"povfarm invitation", 200_000).hex()


CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"


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


class Gate:
    """Lets one thread in at a time, in the order in which they came.

    Threads of Python that compute at the same time hinder each other so much that each takes
    twice as long. Who has to wait for something else goes ``outside`` meanwhile, and comes back
    without waiting. Nobody is kept out for long by one that computes for long.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._inside: set[int] = set()  # threads
        self._line: collections.deque[tuple[int, threading.Lock]] = collections.deque()

    def __enter__(self) -> None:
        """Wait for one's turn."""
        me, turn = threading.get_ident(), threading.Lock()
        with self._changing:
            if not self._inside:
                self._inside.add(me)
                return
            turn.acquire()
            self._line.append((me, turn))
            patience = 0.1 + 0.01 * len(self._line)
        if not turn.acquire(timeout=patience):
            with self._changing:
                self._inside.add(me)
                with contextlib.suppress(ValueError):  # it may be let in just now
                    self._line.remove((me, turn))

    def __exit__(self, *_: object) -> None:
        """Let the next one in."""
        with self._changing:
            self._inside.discard(threading.get_ident())
            if self._line and not self._inside:
                thread, turn = self._line.popleft()
                self._inside.add(thread)
                turn.release()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Keep nobody out meanwhile, if one is inside."""
        me = threading.get_ident()
        inside = me in self._inside
        if inside:
            self.__exit__()
        try:
            yield
        finally:
            if inside:
                with self._changing:
                    self._inside.add(me)


class Shares:
    """Who has how many of what there are only so many of: an address, its network, all of them.

    A network is what one can have who has one address of it: a /24, in IPv6 a /64.
    """

    def __init__(self, each: int, network: int, together: int) -> None:
        self._most = each, network, together
        self._taken: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        """How many are taken together."""
        return self._taken[""]

    def take(self, address: str) -> bool:
        """Take one; False when that would be too many."""
        holders = (address, network_of(address), "")
        if any(self._taken[one] >= most for one, most in zip(holders, self._most)):
            return False
        self._taken.update(holders)
        return True

    def give_back(self, address: str) -> None:
        """Give one back."""
        self._taken -= collections.Counter([address, network_of(address), ""])  # drops zeros

    def clear(self) -> None:
        """Take all of them back."""
        self._taken.clear()


@functools.lru_cache(maxsize=1000)
def network_of(address: str) -> str:
    """Return the network of an address, which is no address itself."""
    with contextlib.suppress(ValueError):
        plain_one = ipaddress.ip_address(address.partition("%")[0])
        return str(ipaddress.ip_network((plain_one, 24 if plain_one.version == 4 else 64), False))
    return f"{address}/"


class SharedFlush:
    """A flush to the disk, one at a time: those who ask meanwhile share the next one."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._counting, self._turn = threading.Lock(), threading.Lock()
        self._asked = self._flushed = 0

    def __call__(self) -> None:
        """Return when all that was written before this call has been flushed."""
        with self._counting:
            self._asked += 1
            mine = self._asked
        with self._turn:
            if self._flushed < mine:
                asked = self._asked
                self._flush()
                self._flushed = asked


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


def is_orphan(owner: str) -> bool:
    """Tell whether the process with this number, which made something, is no more."""
    if not owner.isdecimal() or int(owner) == os.getpid():  # in a container, of the one before us
        return True
    if sys.platform == "win32":  # where os.kill would end it
        kernel = ctypes.WinDLL("kernel32")
        handle = kernel.OpenProcess(0x100000, False, int(owner))  # SYNCHRONIZE
        return not (handle and kernel.CloseHandle(handle))
    try:
        os.kill(int(owner), 0)
    except OSError as error:  # another one says that it lives, and is another user's
        return isinstance(error, ProcessLookupError)
    return False


PARTS = ".[0-9]*.*.part"  # the names that ``placed`` gives, as a pattern


def sweep_parts(paths: Iterable[Path], age: float = 0.0) -> None:
    """Delete those files of ``placed`` that were left behind, unchanged for ``age`` seconds."""
    for path in paths:
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime >= age
            if old and is_orphan(path.name.split(".")[1]):
                path.unlink()


def plain(text: str) -> str:
    """Return a text of others without what steers a terminal or turns the order of letters."""
    if text.isprintable():
        return text
    return "".join("?" if letter not in "\t\n" and unicodedata.category(letter) in _STEERING
                   else letter for letter in text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return ``plain`` text that forges no second line."""
    return re.sub(r"\s", " ", plain(text))


_STEERING = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])  # kinds of letters, as Unicode names them


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


def is_directory(path: Path) -> bool:
    """Tell whether a directory is there; False, too, for a name that none can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def file_blocks(source: Path | bytes) -> Iterator[bytes]:
    """Read a file, or what would be in one, a block at a time."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        yield from iter(functools.partial(file.read, BUFFER), b"")


def watch_peer(sock: socket.socket) -> None:
    """Send at once, and find out when the other end has vanished without a word.

    An idle connection to a computer that was switched off would wait for ever (RFC 1122,
    4.2.3.6): the system asks after some seconds of silence, and again, and gives up.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    silence = {"TCP_KEEPIDLE": PEER_SILENCE, "TCP_KEEPALIVE": PEER_SILENCE,  # of macOS
               "TCP_KEEPINTVL": PEER_PAUSE, "TCP_KEEPCNT": 3}
    for name, value in silence.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def sha256_file(*parts: Path | bytes) -> str:
    """Return the SHA-256 of a file, or of its parts, as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    for block in itertools.chain.from_iterable(map(file_blocks, parts)):
        digest.update(block)
    return digest.hexdigest()


def format_size(size: float) -> str:
    """Return a number of bytes as people write it: ``512 B``, ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def counted(number: int, thing: str) -> str:
    """Return a number of things as people write it: ``1 file``, ``2 files``."""
    return f"{number} {thing}{'s' * (number != 1)}"


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


def with_commands(text: str, typed: Callable[[str], str]) -> str:
    """Return a message with its commands as they are typed where it is read.

    Only CLI knows how povfarm was started, so messages write ``povfarm.py NAME``, for
    which ``typed(NAME)`` stands here; or ``typed("")`` for ``povfarm.py``, where options follow
    in the message itself, or where it tells the usage.
    """
    return _COMMAND.sub(lambda found: typed(found[1] or "").rstrip(), text)


_COMMAND = re.compile(
    r"(?<![\w./\\-])(?:(?<!usage: )povfarm\.py ([a-z]+)\b(?! --)|povfarm\.py(?= ))")


def parse_size(text: str) -> int:
    """Return bytes from ``512``, ``64k``, ``1.5G``; anything else is a ``UserError``."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise UserError(f"'{text}' is not a size: write 500M or 2G")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


# === 2. SETTINGS =============================================================
# One row per option. From the rows come the command line, its help, the
# POVFARM_* environment variables and the file DATA/povfarm.ini; the manual's
# table is held to them by a test. So an option has one name, one default and
# one explanation everywhere.


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

    @property
    def shown_default(self) -> str:
        """The default as it would be typed; empty if there is none or the help states it."""
        if "default" in self.help or self.default in (None, ""):
            return ""
        if self.kind is parse_size:
            return f"{self.default // 1000**3}G"
        if isinstance(self.default, Path):
            return f"~/{self.default.name}"
        return {bool: "no", float: f"{self.default}s"}.get(type(self.default), str(self.default))

    def takes(self, value: Any) -> bool:
        """Tell whether a value, from JSON for example, is valid for the option."""
        if self.is_flag:
            return isinstance(value, bool)
        with contextlib.suppress(UserError, ValueError):
            parsed = self.kind(str(value))
            return type(parsed) is type(value) and bool(parsed == value)
        return False

    def parse(self, text: str, source: str) -> Any:
        """Return the value of ``text``; a ``UserError`` names ``source``, where it stands."""
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
    _whole, least=1, most=math.inf, refusal="a whole number from 1 up")
_percent = functools.partial(_whole, least=0, most=100, refusal="between 0 and 100")
_nice = functools.partial(_whole, least=0, most=19, refusal="between 0 and 19")
_retries = functools.partial(_whole, least=1, most=100, refusal="between 1 and 100")
_max_workers = functools.partial(
    _whole, least=0, most=10_000, refusal="a number of workers from 0 to 10000 (0: no limit)")
_slices = functools.partial(_word, pattern="auto|off|[1-9][0-9]{0,3}",
                            refusal="neither auto nor off nor a number of slices")
_version = functools.partial(_word, pattern=r"auto|any|\d+([.-]\w+)*",
                             refusal="neither auto nor any nor a version, such as 3.7")
_tls = functools.partial(
    _word, pattern="auto", refusal="not 'auto': give your own certificate with --tls-cert")


_engine = functools.partial(_word, pattern=r"[A-Za-z][\w.-]{0,39}",
                            refusal="not a name of letters and digits, such as blender")
_role = functools.partial(_word, pattern="user|viewer|submit",
                          refusal="not one of user, viewer, submit")
_most = functools.partial(_whole, least=0, most=2**50, refusal="a whole number from 0 up")
_batch = functools.partial(
    _whole, least=0, most=1000, refusal="a number of frames from 0 to 1000 (0: as many as suit)")
_order = functools.partial(_word, pattern="forward|reverse|spread|random",
                           refusal="not one of forward, reverse, spread, random")
_spans = functools.partial(_word, pattern=r"(\d{1,9}(-\d{1,9})?(,(?=\d)|$)){0,99}",
                           refusal="no list of frames: write 1-10,50")


def _priority(text: str) -> int:
    if not re.fullmatch(r"[-+]?\d{1,4}", text) or abs(int(text)) > 1000:
        raise UserError(f"'{text}' is not a whole number from -1000 to 1000")
    return int(text)


def _radiosity(text: str) -> str:
    return _word(text.removeprefix("share="), "share|animation|off",
                 "not one of share, animation, off")


def _pin(text: str) -> str:
    pin = text.replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", pin):
        raise UserError(f"'{text}' is not the SHA-256 of a certificate: 64 hexadecimal digits")
    return pin


def _lease_time(text: str) -> float:
    seconds = parse_duration(text)
    if seconds < 1:
        raise UserError(f"'{text}' is too short: the least is 1s")
    return seconds


def _rate(text: str) -> Fraction:
    with contextlib.suppress(ValueError, ZeroDivisionError):
        if Fraction(1, 1000) <= Fraction(text) <= 1000:
            return Fraction(text)
    raise UserError(f"'{text}' is not a rate from 0.001 to 1000, such as 24 or 30000/1001")


def _frame_timeout(text: str) -> int:
    seconds = math.ceil(parse_duration(text))
    if seconds > 10**7:
        raise UserError(f"'{text}' is too long: the most is 10000000 seconds")
    return seconds


def _path(text: str) -> Path:
    """Return an absolute path, which means the same wherever a renderer runs."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # the home of an unknown user
        raise UserError(f"'{text}' is not a path: {error}") from None


PORT = 2271  # TCP, of a coordinator, where no other is given

# "talk" stands for every command that talks to a running coordinator, "job" for those that
# describe a new job. The options of "set" are those that say how the farm treats a job.
SETTINGS: tuple[Setting, ...] = (
    Setting("data", _path, Path("~/.povfarm").expanduser(),
            "data directory: database, images, key, cache",
            "serve work render talk doctor backup engines", "DIR"),
    Setting("server", str, "", "address of the coordinator; default: povfarm looks for it",
            "work talk", "URL"),
    Setting("key", str, "", "the farm key, if it is not in DATA/farm.key", "work talk", "KEY"),
    Setting("key-file", str, "",
            "a file with the key, or - for standard input: others can see command lines",
            "work talk", "FILE"),
    Setting("name", str, "", "name of the farm (to name or to choose it), or of the job",
            "serve work talk job", "NAME"),
    Setting("worker-name", str, "", "name of the worker; default: the computer's name", "work",
            "NAME"),
    Setting("port", _port, PORT, "TCP port of the coordinator; 0 picks a free one", "serve", "N"),
    Setting("bind", str, "", "address to listen on; default: all addresses of this computer",
            "serve", "ADDRESS"),
    Setting("host", str, "", "other names by which browsers may call this computer, separated "
            "by commas", "serve", "A,B"),
    Setting("discovery-port", _port, 2269, "UDP port for discovery",
            "serve work talk render", "N"),
    Setting("no-discovery", bool, False, "do not answer computers that look for a farm", "serve"),
    Setting("open", bool, False, "admit every worker with a private address", "serve"),
    Setting("private", bool, False, "show the page and the API only to those with a key", "serve"),
    Setting("tls", _tls, "", "'auto': use TLS, with a certificate that povfarm makes", "serve",
            "auto"),
    Setting("tls-cert", _path, None, "use TLS, with the certificate in this PEM file", "serve",
            "FILE"),
    Setting("tls-key", _path, None, "the key of that certificate, if it is in another file",
            "serve", "FILE"),
    Setting("pin", _pin, "", "SHA-256 of the only certificate to accept from the coordinator",
            "work talk", "SHA256"),
    Setting("code", str, "", "the code of an invitation: it makes you one of the farm's people",
            "work talk", "CODE"),
    Setting("user", str, "", "your name there, with --code; default: that of your account",
            "work talk", "NAME"),
    Setting("invite", _most, 0, "invite so many people: print a code for them", "serve", "N"),
    Setting("role", _role, "user",
            "what one may do: user, viewer (who looks) or submit (a program that submits)",
            "users", "ROLE"),
    Setting("uses", _count, 1, "how many people an invitation is for", "users", "N"),
    Setting("jobs-limit", _most, 0, "most unfinished jobs of a person; 0: no limit",
            "serve users", "N"),
    Setting("frames-limit", _most, 0, "most unfinished frames of a person; 0: no limit",
            "serve users", "N"),
    Setting("priority-limit", _priority, 0, "highest priority of a person's jobs",
            "serve users", "N"),
    Setting("workers-limit", _max_workers, 0, "most workers of a person at a time; 0: no limit",
            "serve users", "N"),
    Setting("space-limit", parse_size, 0,
            "most bytes kept of a person's jobs, such as 5G; default: no limit",
            "serve users", "SIZE"),
    Setting("work", bool, False, "render on this computer, too", "serve"),
    Setting("httpov", bool, False, "let HTTPov clients render, and print the command for them",
            "serve"),
    Setting("sheepit", bool, False, "let SheepIt clients render, and print the command for them",
            "serve"),
    Setting("renderonline", bool, False, "take scenes from RenderOnline's clients", "serve"),
    Setting("lease-time", _lease_time, 30.0,
            "how long a silent worker keeps its frames, such as 30s", "serve", "TIME"),
    Setting("cores", _count, None, "number of cores to keep busy; default: all",
            "work render serve", "N"),
    Setting("until-idle", bool, False, "stop when nothing is left to render", "work"),
    Setting("povray", str, "", "the POV-Ray program to use", "work render serve doctor", "PATH"),
    Setting("nice", _nice, 5, "how much renders give way to other programs, 0 to 19",
            "work serve", "N"),
    Setting("memory", parse_size, 0, "memory limit of each POV-Ray; default: all memory",
            "work render serve", "SIZE"),
    Setting("unconfined", bool, False, "let scenes read and write everything that you can",
            "work render serve"),
    Setting("tags", str, "", "words that describe the worker, separated by commas", "work", "A,B"),
    Setting("cache-size", parse_size, 10 * 1000**3, "size limit of the cache of projects",
            "work render serve", "SIZE"),
    Setting("engine", _engine, "",
            "the program that renders it instead of POV-Ray, such as blender", "job", "NAME"),
    Setting("root", _path, None, "directory of the project; default: the current or the scene's",
            "job", "DIR"),
    Setting("priority", _priority, 0, "jobs with a higher priority go first", "submit set", "N"),
    Setting("max-workers", _max_workers, 0, "most workers on this job at a time; 0: no limit",
            "submit set", "N"),
    Setting("retries", _retries, 3, "how many times a frame is tried, on different workers",
            "job set", "N"),
    Setting("in-order", bool, None,
            "render frames in order on one computer; default if one reads another", "job set"),
    Setting("frames", str, "", "which frames of an animation to render, such as 1-10,50", "job",
            "LIST"),
    Setting("first", _spans, "", "which of the frames go first, such as 50-60", "job set", "LIST"),
    Setting("order", _order, "forward",
            "in which order frames are handed out: forward, reverse, spread or random", "job set",
            "ORDER"),
    Setting("batch", _batch, 0,
            "frames that a worker gets at a time, 1 to stripe them; default: as many as suit",
            "job set", "N"),
    Setting("slices", _slices, "auto",
            "cut each frame into slices for several workers: auto, off or a number", "job set",
            "N"),
    Setting("radiosity", _radiosity, "share",
            "samples shared by slices (share), all frames (animation) or not (off)", "job set",
            "HOW"),
    Setting("povray-version", _version, "auto",
            "which POV-Ray renders the job: auto (the one on most cores), any, or e.g. 3.7",
            "job set", "VERSION"),
    Setting("frame-timeout", _frame_timeout, 0,
            "time limit for a frame, such as 30m; default: 20 times the median",
            "job set", "TIME"),
    Setting("verify", _percent, 0,
            "percentage of frames that two workers render, to compare them", "job set", "P"),
    Setting("wait", bool, False, "wait until the job is finished", "submit"),
    Setting("output", _path, None, "directory for the images", "submit fetch", "DIR"),
    Setting("apng", _path, None, "make an animated PNG of all frames", "render fetch", "FILE"),
    Setting("video", _path, None, "make a film of all frames with ffmpeg, such as film.mp4",
            "render fetch", "FILE"),
    Setting("fps", _rate, Fraction(25), "frames per second, such as 24 or 30000/1001",
            "render fetch", "N"),
    Setting("lan", bool, False, "let other computers on this network help", "render"),
    Setting("log", _path, None,
            "write all that POV-Ray prints to a file, in the order of the frames", "render",
            "FILE"),
    Setting("mine", bool, False, "show only your own jobs", "status"),
    Setting("totals", bool, False, "show what was rendered, and by whom", "workers"),
    Setting("watch", bool, False, "keep showing changes until stopped", "status"),
    Setting("json", bool, False, "print JSON for programs", "render talk doctor backup engines"),
    Setting("verbose", bool, False,
            "say more; a command that waits for images shows all that POV-Ray prints",
            "serve work render submit"),
)


_BY_NAME = {row.name: row for row in SETTINGS}
setting = _BY_NAME.__getitem__  # by the name of an option


def configured_defaults(environ: Mapping[str, str], data: str = "") -> dict[str, Any]:
    """Return every option's value before the rest of the command line is read.

    The environment wins over the file povfarm.ini in the data directory (``data`` is what
    ``--data`` gave, if it did), and the file over the default in the option's row. Raises
    ``UserError`` for a bad value, and for a name in the file that is no option's. The
    lines below [renderonline] are ``renderonline-lines``, as they are.
    """
    values: dict[str, Any] = {row.name: row.default for row in SETTINGS}
    values["renderonline-lines"] = lines = []
    place = setting("data")
    if data or environ.get(place.variable):
        values["data"] = place.parse(data or environ[place.variable],
                                     "--data" if data else place.variable)
    for name, text, source in _read_settings_file(values["data"] / "povfarm.ini"):
        if name in _BY_NAME:
            values[name] = setting(name).parse(text, f"{source}: {name}")
        else:
            lines.append((name, text, source))
    for row in SETTINGS:
        if row is not place and environ.get(row.variable):
            values[row.name] = row.parse(environ[row.variable], row.variable)
    return values


def _read_settings_file(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each option of a file with its text and its place; ``UserError`` for a bad line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it again with that encoding") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    known, section, seen = {row.name for row in SETTINGS} - {"data"}, "", set()
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        source = f"{path}, line {number}"
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" or not section:
            if line != "[povfarm]" and (line != "[renderonline]" or not section):
                raise UserError(f"{source}: expected the line [povfarm], not '{line}'")
            section = line
            continue
        if not equals:
            raise UserError(f"{source}: '{line}' is not NAME = VALUE, such as port = 2281")
        name = name.lower() if section == "[povfarm]" else name
        if name == "data":
            raise UserError(f"{source}: this file is in the data directory: choose another one "
                            "with --data or POVFARM_DATA")
        if name not in known and section == "[povfarm]":
            raise UserError(f"{source}: there is no option '{name}': 'povfarm.py help COMMAND' "
                            "lists the options of a command")
        if name in seen:
            raise UserError(f"{source}: '{name}' is set twice")
        seen.add(name)
        yield name, value, source


# === 3. POV ==================================================================
# POV-Ray's command line and INI files, read as POV-Ray 3.7 or 3.8 reads them on a
# machine that need not have it: the options in the order in which they count,
# the frames with their clocks and file names, and the plain INI text that a
# worker gives to its own POV-Ray. Opens INI files, starts nothing, and does not
# ask which files a scene needs (that is PROJECT's).

STANDARD = "%POVRAY%"  # in a library path: the include directories of the POV-Ray that renders
OLDEST = "3.7"  # the POV-Ray that knows all words which say nothing else
MAX_FRAMES = 1_000_000
MAX_INIS = 1000  # INI files that are read for one job: they can name each other


def release(version: str) -> tuple[int, ...]:
    """Return what counts of a version: (3, 8) of ``3.8.0-beta.2.unofficial``, () of nothing."""
    return tuple(map(int, re.findall(r"\d{1,9}", version)[:2]))


def system_ini(version: str = OLDEST, program: str = "") -> tuple[Path, ...]:
    """Return where a POV-Ray looks for the system's INI file: by its version, and its prefix."""
    folder = "povray/{}.{}/povray.ini".format(*release(version), 0)
    prefix = install_prefix(program)
    places = [prefix / "etc"] if prefix else []
    places += [Path("/etc"), Path("/usr/local/etc")]
    return (*(place / folder for place in places), Path("/etc/povray.ini"))


def install_prefix(program: str) -> Path | None:
    """Return the directory whose ``bin`` holds a program, if that is where it lies."""
    path = Path(program).resolve() if program else Path()
    return path.parent.parent if path.parent.name == "bin" else None


# Every key of POV-Ray by what its value is; "old" keys are read and mean nothing. Behind @ stands
# the first version that knows a word, here and in the tables below.
_KEY_TABLE = {
    "bool": """All_Console Antialias Append_File Bounding Clockless_Animation Continue_Trace
        Create_Continue_Trace_Log@3.8 Cyclic_Animation Debug_Console Display Dither Draw_Vistas
        Fatal_Console Field_Render Grayscale_Output High_Reproducibility Jitter Light_Buffer
        Odd_Field Output_Alpha Output_To_File Pause_When_Done Radiosity_From_File
        Radiosity_To_File Radiosity_Vain_Pretrace Real_Time_Raytracing Remove_Bounds
        Render_Console Split_Unions Statistic_Console Test_Abort Verbose Vista_Buffer
        Warning_Console""",
    "int": """Antialias_Depth Bits_Per_Color Bounding_Method Bounding_Threshold BSP_MaxDepth
        Compression Final_Frame Frame_Step Height Initial_Frame Max_Image_Buffer_Memory
        Preview_End_Size Preview_Start_Size Quality Render_Block_Size Render_Block_Step
        Render_Pattern Sampling_Method Stochastic_Seed@3.8 Test_Abort_Count Warning_Level Width
        Work_Threads""",
    "float": """Antialias_Confidence@3.8 Antialias_Gamma Antialias_Threshold BSP_BaseAccessCost
        BSP_ChildAccessCost BSP_ISectCost BSP_MissChance Clock End_Column End_Row Final_Clock
        Initial_Clock Jitter_Amount Start_Column Start_Row Subset_End_Frame Subset_Start_Frame
        Version""",
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
_KEYS = {key.lower(): (key, kind, since) for kind, keys in _KEY_TABLE.items()
         for key, _, since in (entry.partition("@") for entry in keys.split())}
_KEYS["bits_per_colour"] = _KEYS["bits_per_color"]
_KEYS["greyscale_output"] = ("Grayscale_Output", "bool", "3.8")
_CODES = {
    kind: {code: since for code, _, since in (entry.partition("@") for entry in codes.split())}
    for kind, codes in {
        "dither": "B2 B3 B4 D1 D2 FS AT@3.8 BK@3.8 BN@3.8 BNX@3.8 JN@3.8 S2@3.8 S3@3.8 ST@3.8",
        "gamma": "SRGB BT709@3.8 BT2020@3.8"}.items()
}
_PATTERNS = ("B2", "B3", "B4", "BN", "BNX")  # the other dither methods carry errors on

# SWITCH=KEY for a switch with a parameter, SWITCH=+KEY for one that is on or off, both for both.
# POV-Ray takes the first that fits, so the order counts: "A0" makes +A0.3 a threshold, +A1.5 wrong.
_SWITCH_TABLE = """AC=Antialias_Confidence AG=Antialias_Gamma AM=Sampling_Method
    A0=Antialias_Threshold+Antialias A@3.8=Antialias_Threshold+Antialias A=+Antialias
    BM=Bounding_Method BS=Render_Block_Size B=+Bounding CC=+Create_Continue_Trace_Log
    C=+Continue_Trace D=Video_Mode+Display D=+Display EC=End_Column EF0=Subset_End_Frame
    EF=Subset_End_Frame EP=Preview_End_Size ER=End_Row F=Output_File_Type+Output_To_File
    F=+Output_To_File GA=All_File+All_Console GA=+All_Console GD=Debug_File+Debug_Console
    GD=+Debug_Console GF=Fatal_File+Fatal_Console GF=+Fatal_Console GI=Create_Ini GP=+Append_File
    GR=Render_File+Render_Console GR=+Render_Console GS=Statistic_File+Statistic_Console
    GS=+Statistic_Console GW=Warning_File+Warning_Console GW=+Warning_Console HI=Include_Header
    HR=+High_Reproducibility H=Height I=Input_File_Name J=Jitter_Amount+Jitter J=+Jitter
    KC=+Cyclic_Animation KI=Initial_Clock KFF=Final_Frame KFI=Initial_Frame KF=Final_Clock
    KLA=+Clockless_Animation K=Clock L=Library_Path MB=Bounding_Threshold+Bounding MB=+Bounding
    MI=Max_Image_Buffer_Memory MV=Version O=Output_File_Name P=+Pause_When_Done Q=Quality
    RFI=+Radiosity_From_File RFO=+Radiosity_To_File RF=Radiosity_File_Name RS=Render_Block_Step
    RP=Render_Pattern RTR=+Real_Time_Raytracing RVP=+Radiosity_Vain_Pretrace R=Antialias_Depth
    SC=Start_Column SF0=Subset_Start_Frame SF=Subset_Start_Frame SP=Preview_Start_Size
    SR=Start_Row SS=Stochastic_Seed STP=Frame_Step SU=+Split_Unions TH=Dither_Method+Dither
    TH=+Dither UA=+Output_Alpha UD=+Draw_Vistas UF=+Field_Render UL=+Light_Buffer UO=+Odd_Field
    UR=+Remove_Bounds UV=+Vista_Buffer V=+Verbose WL=Warning_Level WT=Work_Threads W=Width
    X=Test_Abort_Count+Test_Abort X=+Test_Abort"""
_SWITCHES = [(*switch.partition("@")[::2], *parameter.partition("+")[::2])
             for switch, parameter in (entry.split("=") for entry in _SWITCH_TABLE.split())]

# No window opens on a farm, and POV-Ray's text always goes to its stderr, where the farm reads it.
_OF_NO_USE = """Append_File Display Draw_Vistas Fatal_Console Pause_When_Done Preview_End_Size
    Preview_Start_Size Real_Time_Raytracing Render_Console Test_Abort Test_Abort_Count""".split()
_WRITABLE = {
    name: kind for name, kind, _ in _KEYS.values()
    if kind in ("bool", "int", "float", "text", "gamma", "type", "dither", "log")
    and name not in ("Append_File", "Create_Ini", "Real_Time_Raytracing")}
# The files of POV-Ray's streams, and what it calls each whose name is On.
TEXT_FILES: Mapping[str, str] = {
    "All_File": "alltext.out", "Debug_File": "debug.out", "Fatal_File": "fatal.out",
    "Render_File": "render.out", "Statistic_File": "stats.out", "Warning_File": "warning.out",
}
# What POV-Ray has in another order than that of letters, by where it comes in that.
_IN_TABLE = {"Antialias": "antialias_e", "Antialias_Gamma": "antialias_u",
             "Include_Header": "input_g", "Jitter": "jitter_b", "Test_Abort": "test_abort_d",
             "Preview_End_Size": "pre_a", "Preview_Start_Size": "pre_b"}
_UNIX_OPTIONS = "--help -help -h -? --version -version --V --benchmark -benchmark".split()


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
class PovOptions:
    """What one POV-Ray command line says, all its INI files included.

    ``values`` maps INI keys to values as INI text has them, without the keys
    that mean nothing on a farm. ``declares`` are ``name=value`` in order: of
    two with one name POV-Ray takes the FIRST. ``library`` are the directories
    in search order as they were written, relative to the working directory.
    ``warnings`` say what was left out. ``needs`` is the oldest POV-Ray that
    knows every word of it, and the word; nothing where the oldest of all does.
    ``by_file`` are the names and library directories that a person did not type,
    because an INI file names them.
    ``texts`` are the files of its streams by their keys (``TEXT_FILES``), which
    begin anew or, with ``append``, go on. ``creates`` is the INI file that it asks
    for (Create_Ini) and the text of that; two empty ones where it does not.
    """

    values: Mapping[str, str]
    declares: tuple[str, ...]
    library: tuple[str, ...]
    ini_files: tuple[str, ...]
    warnings: tuple[str, ...]
    needs: tuple[str, str] = ("", "")
    by_file: frozenset[str] = frozenset()
    texts: Mapping[str, str] = field(default_factory=dict)
    append: bool = False
    creates: tuple[str, str] = ("", "")

    @property
    def scene(self) -> str:
        """The scene file as it was written; ``UserError`` when none was named."""
        if not (scene := self.values.get("Input_File_Name", "")):
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
        return IMAGE_TYPES[self.output_type].extension

    @property
    def to_file(self) -> bool:
        """False after ``-F``: POV-Ray would render and write no picture."""
        return self.values.get("Output_To_File", "On") == "On"

    @property
    def stochastic(self) -> bool:
        """True when POV-Ray 3.8 draws where it looks for edges; 3.7 takes ``+AM3`` for ``+AM2``."""
        return self.values.get("Antialias") == "On" and self.values.get("Sampling_Method") == "3"

    @property
    def to_stdout(self) -> bool:
        """True after ``+O-``: the pictures go to stdout, one after the other."""
        return self.to_file and self.values.get("Output_File_Name") in ("-", "stdout")


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

    def chosen(self, text: str) -> list[int]:
        """Return the frames that a text such as ``1-10,50`` names, in order; all for no text.

        Raises ``UserError`` for a part of it that names no frame, or one that is not there.
        """
        if text and not self.animation:
            raise UserError(f"'{text}' chooses frames of an animation, and this is a still")
        first, last, step = self.frames[0], self.frames[-1], self.frames.step
        spans = [self.frames] if not text else []
        for part in text.split(",") if text else ():
            match = re.fullmatch(r" *(\d{1,9}) *(?:- *(\d{1,9}) *)?", part)
            if match is None:
                raise UserError(f"'{part}' is neither a frame nor a range of frames: write 1-10,50")
            low, high = int(match[1]), int(match[2] or match[1])
            span = self.frames[max(-(-(low - first) // step), 0):(high - first) // step + 1]
            if not first <= low <= high < last + step or not span:
                every = f" in steps of {step}" if step > 1 else ""
                raise UserError(f"'{part}' names no frames of this animation: it has {first} to "
                                f"{last}{every}")
            spans.append(span)
        chosen: list[int] = []
        for span in sorted(spans, key=operator.itemgetter(0)):
            chosen += range(max(span[0], chosen[-1] + step) if chosen else span[0],
                            span[-1] + 1, step)
        return chosen

    def listed(self, frames: Sequence[int]) -> str:
        """Return the text that ``chosen`` takes for frames that are in order."""
        step = self.frames.step
        spans = [[frame for _, frame in span] for _, span in itertools.groupby(
            enumerate(frames), lambda place: place[1] - place[0] * step)]
        return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}"
                        for span in spans)


def read_command_line(
    args: Sequence[str], cwd: Path, environ: Mapping[str, str],
    system: Sequence[Path] | None = None, version: str = OLDEST, strict: bool = True,
) -> PovOptions:
    """Read ``args`` as POV-Ray of a ``version``, started in ``cwd``, reads its command line.

    The base INI comes first (POVINI, ./povray.ini, the user's, the system's),
    then the arguments; later wins, but Library_Path and Declare add up.
    Raises ``UserError`` for what POV-Ray refuses, for what starts programs and
    for what cannot be done in parts. Words that are newer than the version are
    refused if ``strict``, and noted in ``needs`` otherwise. Unlike POV-Ray 3.7,
    which garbles them, letters beyond ASCII in names are taken as they are.
    """
    reader = _CommandLine(cwd, version if strict else "")
    inis = system_ini(version) if system is None else system
    home = environ.get("HOME", "")
    own = "{}/.povray/{}.{}/povray.ini".format(home, *release(version), 0)
    places = (environ.get("POVINI", ""), "./povray.ini", home and own, *map(str, inis),
              home and f"{home}/.povrayrc")
    base = next((path for path in places if path and is_file(cwd / path)), "")
    if base:
        reader.read_ini(base)
    if not base or Path(base) in inis:
        reader.standard, reader.library = reader.library, [STANDARD]
    if not base.startswith("./"):  # it is the user's own, and no project's
        reader.typed.update(reader.library)
    for arg in args:
        if arg in _UNIX_OPTIONS:
            raise UserError(f"{arg} renders nothing: to ask POV-Ray itself, run povray {arg}")
        if re.search(r"[\s;#'\"]", arg) and is_file(cwd / arg):
            raise UserError(f"POV-Ray would split {arg!r}: put quotes inside the quotes: "
                            + shlex.quote(quoted(arg)))
        reader.read_text(_Text(arg, ""))
    if environ.get("POVINC"):
        reader.set("Library_Path", "library", environ["POVINC"], "POVINC")
    return reader.finish()


def plan_frames(options: PovOptions) -> FramePlan:
    """Return the frames of a command line as POV-Ray counts them.

    Initial and final frame both 0 or both 1 (unset counts as 0) make a still.
    Raises ``UserError`` when there are no frames, or more than ``MAX_FRAMES``,
    or no rows in them, or when POV-Ray would write the pictures to stderr or
    under garbled names.
    """
    region_of(options)
    values = options.values
    stem = _output_stem(options)
    if [int(values.get(key, 0)) for key in ("Initial_Frame", "Final_Frame")] in ([0, 0], [1, 1]):
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
    clocks = _number(values, "Initial_Clock", 0.0), _number(values, "Final_Clock", 1.0)
    return FramePlan(True, frames, initial, final, *clocks, cyclic, digits, stem,
                     options.extension)


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
    if values.get("Dither") == "On" and values.get("Dither_Method") not in _PATTERNS:
        block = options.height  # errors are carried on from row to row
    return Region(top, bottom, left, right, min(block, bottom - top))


def needed_by(values: Mapping[str, str]) -> tuple[str, str]:
    """Return the oldest POV-Ray that knows these keys and values, and what it is needed for."""
    found = [("", "")]
    for key, value in values.items():
        _, kind, since = _KEYS.get(key.lower(), ("", "", ""))
        found += [(since, key), (_CODES.get(kind, {}).get(value, ""), f"{key}={value}")]
    return max(found, key=lambda need: release(need[0]))


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
    lines = [f"{key}={_ini_value(key, values[key])}\n" for key in sorted(values)]
    # Quotes around the whole of name="text" keep the inner ones, which make it a string and not a
    # number. Of a number POV-Ray keeps six digits.
    lines += [f"{key}={_ini_quoted(key, value)}\n" for key, texts in (
        ("Declare", declares), ("Library_Path", library)) for value in texts]
    return "".join(lines)


def check_ini(text: str) -> None:
    """Raise ``UserError`` unless ``text`` is, byte for byte, what ``to_ini`` writes."""
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {"Declare": [], "Library_Path": []}
    for line in text.split("\n")[:-1]:
        key, _, value = line.partition("=")
        if len(value) > 1 and value[0] in _QUOTES and value[-1] == value[0]:
            value = value[1:-1]
        if key in lists:
            lists[key].append(value)
        else:
            values[key] = value
    if to_ini(values, *lists.values()) != text:
        raise UserError("an INI text that povfarm did not write is refused")


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_QUOTES = ('"', "'")
_WORD_START = re.compile(r"[A-Za-z0-9_]")
_BLANKS = re.compile(r"[ \t]*")
_LINES = re.compile(r"[ \t\n]*")
_LINE = re.compile(r"[^\n]*\n?")
_BEFORE_COMMENT = re.compile(r"[^\n;#]*")
_SECTION = re.compile(r"\[([^]]*)\]?")
# On the command line, and in an INI file, where commas separate values.
_KEYS_OF = [re.compile(rf"[^ \t\n\v\f\r{comma};#\"'\[\]=]*") for comma in ("", ",")]
_WORDS_OF = [re.compile(rf"[^ \t\n\v\f\r{comma};#\"']*") for comma in ("", ",")]
_TRUE = ("on", "true", "yes", "1")
_INTEGER = re.compile(r"\s*([+-]?\d+)", re.ASCII)
_DECIMAL = re.compile(r"\s*([+-]?(?!0[xX])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII)


class _Text:
    """A place in an INI file, or in one argument when ``path`` is empty."""

    def __init__(self, text: str, path: str) -> None:
        self.text = re.sub(r"\r\n|\n\r|\r", "\n", text) if path else text
        self.path = path
        self.at = 0
        self._counted = (0, 1)  # up to where, and the line that this is in

    @property
    def where(self) -> str:
        """This place in words, for messages."""
        at, line = self._counted
        self._counted = self.at, line + self.text.count("\n", at, self.at)
        return (f"{self.path}, line {self._counted[1]}" if self.path
                else f"argument {self.text[:100]!r}")

    def peek(self) -> str:
        """Return the next character, empty at the end."""
        return self.text[self.at : self.at + 1]

    def take(self, pattern: re.Pattern[str]) -> str:
        """Return what ``pattern`` matches here and go on behind it."""
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match[0] if match else ""

    def skip_blanks(self) -> None:
        """Go on behind the blanks around a value in an INI file; in an argument they end it."""
        if self.path:
            self.take(_BLANKS)

    def key(self) -> str:
        """Take the name of a key or a switch."""
        return self.take(_KEYS_OF[bool(self.path)])

    def value(self, with_blanks: bool) -> str:
        """Take a value; one without quotes may run on over blanks in an INI file."""
        return self.quoted() if self.peek() in _QUOTES else self.word(with_blanks)

    def quoted(self) -> str:
        """Take a quoted string; without its closing quote it goes on to the end."""
        close = self.text.find(self.peek(), self.at + 1)
        start, end = self.at + 1, close if close >= 0 else len(self.text)
        self.at = end + 1
        return self.text[start:end]

    def word(self, with_blanks: bool) -> str:
        """Take a word without quotes."""
        word = self.take(_WORDS_OF[bool(self.path)])
        if self.path and with_blanks and self.peek() in (" ", "\t") and self._blank_belongs():
            word += self.take(_BEFORE_COMMENT)
        return word

    def _blank_belongs(self) -> bool:
        # POV-Ray's guess whether a blank belongs to a path without quotes. It looks for a key one
        # character too late, which only works at a line's end: there the next line's key ends the
        # word, while a comment, switch or empty line leaves the blank at the end of the value.
        start = self.at
        self.take(_BLANKS)
        first = self.peek()
        self.at += 1
        second, key = self.peek(), self.key()
        self.at = start
        if first in ("+", "-"):
            return not (second.isascii() and second.isalpha())
        return first not in ("", ";", "#", ",") and key.lower() not in _KEYS


class _CommandLine:
    """Reads texts one after the other and holds what they have said so far."""

    def __init__(self, cwd: Path, version: str) -> None:
        self.cwd = cwd
        self.version = version
        self.needs = ("", "")
        self.values: dict[str, str] = {}
        self.places: dict[str, tuple[str, str]] = {}  # names of files, and where they stand
        self.declares: list[str] = []
        self.library: list[str] = []
        self.standard: list[str] = []  # what STANDARD stands for here
        self.folders = [""]  # where INI files are looked for
        self.files: list[str] = []
        self.open: list[str] = []
        self.warnings: list[str] = []
        self.typed: set[str] = set()  # names that stand in no INI file

    def read_ini(self, spec: str) -> None:
        """Read ``file`` or ``file[section]``; the extension .ini may be left out."""
        name, bracket, rest = spec.partition("[")
        if bracket and "]" not in rest:
            raise UserError(f"{spec!r}: the ] of the section is missing")
        if len(self.open) > 30:
            raise UserError(f"INI files include each other without end: {spec!r}")
        if len(self.files) >= MAX_INIS:
            raise UserError(f"INI files name each other more than {MAX_INIS} times")
        path = self._find_ini(name)
        try:
            data = (self.cwd / path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the INI file {path}: {error.strerror}") from None
        self.files.append(path)
        if not self.open:
            self.typed.add(path)
        self.open.append(path)
        section = rest.split("]")[0] if bracket else None
        self.read_text(_Text(self._decoded(data, path), path), section)
        self.open.pop()

    def _decoded(self, data: bytes, path: str) -> str:
        """Return the text of an INI file, also of one that Windows or DOS has saved."""
        if b"\0" in data:
            raise UserError(f"{path} is not plain text, as an INI file is: if an editor has made "
                            "it, save it as UTF-8 (not as \"Unicode\" or UTF-16)")
        if data.startswith(_BYTE_ORDER_MARK):
            self.warnings.append(f"{path} begins with a byte order mark, which POV-Ray itself "
                                 "refuses: it is skipped (to lose it, save as UTF-8 without BOM)")
        data = data.removeprefix(_BYTE_ORDER_MARK).rstrip(b"\x1a")  # Ctrl-Z, the end for DOS
        return "".join(map(_decoded_line, data.splitlines(keepends=True)))

    def _find_ini(self, name: str) -> str:
        dot = name.rfind(".")
        names = [name] if dot >= 0 and len(name) - dot <= 4 else []
        names += [f"{name}.ini", f"{name}.INI"]
        for folder, candidate in itertools.product(self.folders, names):
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
            if not (char := text.peek()):
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
        word = text.key()
        name, kind, since = _KEYS.get(word.lower(), ("", "", ""))
        text.skip_blanks()
        if not name or text.peek() != "=":
            text.at = start
            return False
        text.at += 1
        text.skip_blanks()
        to_end = kind == "program" and text.path
        value = text.take(_BEFORE_COMMENT) if to_end else text.value(True)
        self._need(since, word, where)
        self.set(name, kind, value, where)
        while True:
            text.skip_blanks()
            if not text.path or text.peek() != ",":
                return True
            text.at += 1
            text.skip_blanks()
            self.set(name, kind, text.value(False), where)

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
            self.set("the INI file", "ini", word, where)

    def _read_switch(self, text: _Text, on: bool) -> None:
        where, sign = text.where, "+" if on else "-"
        word = text.key()
        quoted = text.quoted() if text.peek() in _QUOTES else None
        for switch, since, key, flag in _SWITCHES:
            if not word.upper().startswith(switch):
                continue
            parameter = word[len(switch) :]
            if quoted is not None and parameter:
                break
            parameter = quoted or parameter
            if bool(key) != (parameter[:1] > " "):
                continue
            said = f"{sign}{word}{quoted or ''}"
            if flag:
                self._need(since or _KEYS[flag.lower()][2], said, where)
                self.values[flag] = "On" if on else "Off"
            if key == "Output_File_Type":
                parameter = self._file_type(parameter, said, where)
            if key:
                # +SF1.5 is frame 1, though the key that it sets takes fractions.
                kind = "int" if switch in ("EF", "SF") else _KEYS[key.lower()][1]
                self._need(_KEYS[key.lower()][2], said, where)
                self.set(key, kind, parameter, where, said)
            return
        raise UserError(f"{where}: {_switch_problem(sign, word, quoted or '')}")

    def _need(self, since: str, word: str, where: str) -> None:
        """Take note of a word that is not in every POV-Ray; ``UserError`` when not in ours."""
        if self.version and release(since) > release(self.version):
            place = "" if where.startswith("argument ") else f"{where}: "
            raise UserError(f"{place}{word} needs POV-Ray {since}; this is {self.version}")
        if release(since) > release(self.needs[0] or OLDEST):
            self.needs = since, word

    def _file_type(self, parameter: str, word: str, where: str) -> str:
        letter, more = parameter[0], parameter[1:]
        if more[:1] in ("g", "G") and letter in "nNpP":
            self.values["Grayscale_Output"] = "On"
            more = more[1:]
            self._need("3.8" if more else "", word, where)
        if more.isascii() and more.isdigit():
            self.values["Bits_Per_Color"] = _normal("Bits_Per_Color", "int", more, where)
        elif more:
            raise UserError(f"{where}: POV-Ray has no file type {parameter!r}, but +FN and +FN16")
        return letter

    def set(self, name: str, kind: str, value: str, where: str, word: str = "") -> None:
        """Take over one option; ``UserError`` when POV-Ray or povfarm refuses its value.

        ``word`` is how it was written, where that is not ``name=value``.
        """
        if not self.open:
            self.typed.add(value)
        if kind == "program":
            if value.strip(" \t\"'"):
                raise UserError(f"{name} in {where} starts a program; povfarm does not run "
                                "programs from INI files: remove that line")
            self.values[name] = ""
        elif kind == "old":
            self.warnings.append(f"{where}: POV-Ray does not use {name} any more")
        elif kind == "ini":
            self._refuse_windows_path(name, value, where)
            self.read_ini(value)
        elif kind == "library":
            self._refuse_windows_path(name, value, where)
            self.folders.append(_readable(name, value, where))
            self.library.append(value)
        elif kind == "declare":
            self._declare(_readable(name, value, where), where)
        elif kind == "letter":
            # The switch +D1g says both of them.
            self.values |= zip((name, "Palette"), value.upper() if word else value[:1])
        elif kind == "return":
            self.values[name] = value[1:2].upper() if value[:1] in "-!" else value[:1].lower()
        else:
            self.values[name] = _normal(name, kind, value, where)
            if kind in ("text", "log"):
                self.places[name] = value, where
            since = _CODES.get(kind, {}).get(self.values[name], "")
            self._need(since, word or f"{name}={value}", where)

    def _refuse_windows_path(self, name: str, value: str, where: str) -> None:
        drive = re.match(r"[A-Za-z]:[\\/]", value)
        here = os.name == "nt" or os.path.lexists(self.cwd / value.replace("\0", ""))
        if here or not (drive or "\\" in value):
            return
        way = f"write {value.replace(chr(92), '/')}"  # a backslash
        if drive:
            way = "write the directory that is meant here, with forward slashes"
        if name == "Output_File_Name":
            way += ", or give +O"
        raise UserError(f"{where}: {name} is a Windows path, {value}: {way}")

    def _declare(self, value: str, where: str) -> None:
        name, _, rest = value.lstrip("=").partition("=")
        if not name:
            raise UserError(f"{where}: Declare needs a name and a number: Declare=size=5")
        if not rest:
            self.warnings.append(f"{where}: Declare={name} has no value and means nothing")
        self.declares.append(f"{name}={rest}")

    def finish(self) -> PovOptions:
        """Return everything that was read, without what is of no use on a farm."""
        values = self.values
        for key, (name, where) in self.places.items():
            self._refuse_windows_path(key, name, where)
        if values.get("Real_Time_Raytracing") == "On":
            raise UserError("Real_Time_Raytracing (+RTR) shows frames and keeps none: remove it")
        grey = values.get("Grayscale_Output") == "On"
        if grey and values.get("Output_File_Type", "N") not in "NP":
            raise UserError("POV-Ray writes grey pictures as PNG or PPM only: use +FN or +FP")
        for key, least in (("Width", 1), ("Height", 1), ("Render_Block_Size", 4)):
            if int(values.get(key, least)) < least:
                raise UserError(f"{key}={values[key]} is too small: the least is {least}")
        # With a base INI of one's own its includes are POV-Ray's last resort, too.
        library = tuple(dict.fromkeys([*self.library, STANDARD]))
        texts = {key: values[key] for key in TEXT_FILES if key in values}
        append = "On" in (values.get("Append_File"), values.get("Continue_Trace"))
        kept = {key: value for key, value in values.items()
                if key in _WRITABLE and key not in (*_OF_NO_USE, *texts)}
        files = tuple(dict.fromkeys(self.files))
        names = {*self.library, *files, *filter(None, map(values.get, (
            "Input_File_Name", "Create_Ini", "Output_File_Name")))} - self.typed
        declares = tuple(declare for declare in self.declares if not declare.endswith("="))
        return PovOptions(kept, declares, library, files, tuple(self.warnings),
                          self.needs, frozenset(names), texts, append,
                          (values.get("Create_Ini", ""), self._as_created()))

    def _as_created(self) -> str:
        """Return what POV-Ray writes for Create_Ini: all that was said, the base INI file's too."""
        values = {"Work_Threads": str(os.cpu_count()), **self.values}
        lines = [(key, self._created(key, value)) for key, value in values.items()]
        lines += [("Declare", f"{name}={_single(float(number[1])):g}")
                  for name, _, value in (declare.partition("=") for declare in self.declares)
                  if (number := _DECIMAL.match(value or "0"))]  # texts it leaves out
        folders = itertools.chain.from_iterable(
            self.standard if entry == STANDARD else [entry] for entry in self.library)
        lines += [("Library_Path", f'"{folder}"') for folder in dict.fromkeys(folders)]
        lines.sort(key=lambda line: _IN_TABLE.get(line[0], line[0].lower()))
        return "".join(f"{key}={value}\n" for key, value in lines if value is not None)

    def _created(self, key: str, value: str) -> str | None:
        """Return a value as POV-Ray writes it; None where it leaves the key out."""
        kind = _KEYS[key.lower()][1]
        if key in self.places:
            return f'"{self.places[key][0]}"'
        if kind == "float":
            return f"{_single(float(value)):g}"
        alone = kind == "return" and key.replace("Return", "Command") not in self.values
        return None if kind in ("gamma", "dither") or alone else value


def _decoded_line(line: bytes) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return line.decode("utf-8")
    return line.decode("cp1252", "surrogateescape")


def _switch_problem(sign: str, word: str, quoted: str) -> str:
    """Return what is wrong with a switch that POV-Ray refuses."""
    for switch, _, key, flag in _SWITCHES:
        number = _KEYS.get(key.lower(), ("", ""))[1] in ("int", "float")
        if key and not (flag or quoted) and word.upper() == switch:
            such = {"W": "640", "H": "480"}.get(switch, "1") if number else "NAME"
            return (f"{sign}{word} needs a {'number' if number else 'value'} right behind it: "
                    f"{sign}{word}{such}, without a blank")
    return f"POV-Ray has no switch {sign}{word}{quoted}"


def _readable(name: str, value: str, where: str) -> str:
    if any((c < " " and c != "\t") or "\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {name} is not text: close its quotes, or save the file as UTF-8")
    return value


def _normal(name: str, kind: str, value: str, where: str) -> str:
    """Return the one way in which povfarm writes what POV-Ray makes of ``value``."""
    code = value.lstrip().upper()
    integer, decimal = _INTEGER.match(value), _DECIMAL.match(value)
    number = float(decimal[1]) if decimal else 0.0
    normal: str | None = None
    if name in TEXT_FILES:
        normal = TEXT_FILES[name] if _means_on(value) else _readable(name, value, where)
        if "/" in normal:
            raise UserError(f"{where}: {name}={value} names a directory, but POV-Ray puts its text "
                            "files beside the images: leave the directory out")
    elif kind in ("text", "log"):
        normal = _readable(name, value, where)
    elif kind == "bool":
        normal = "On" if _means_on(value) else "Off"
    elif kind == "type" and code[:1] in IMAGE_TYPES:
        normal = code[:1]
    elif code in _CODES.get(kind, ()):
        normal = code
    elif kind == "int" and integer and abs(float(integer[1])) < 2**31:
        normal = str(int(float(integer[1])))  # int() of a text has a limit of its own
    elif (kind == "float" and decimal) or (kind == "gamma" and number >= 0.001):
        normal = _plain(number)
    if normal is None or not math.isfinite(_single(number)):
        raise UserError(f"{where}: {name} cannot be {value!r}")
    return normal


def _means_on(value: str) -> bool:
    # As many letters are compared as both have, so that nothing at all means On.
    return any(word.startswith(value[: len(word)].lower()) for word in _TRUE)


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
    raise UserError(f"no {axis.lower()} to render: Start_{axis}={start:g} and End_{axis}={end:g} "
                    f"must be in order, from 1 to {size}")


def _output_stem(options: PovOptions) -> str:
    """Return the path of the pictures without frame number and extension."""
    name, extension = options.values.get("Output_File_Name", ""), options.extension
    if name == "stderr":
        raise UserError("povfarm writes no pictures to stderr: use +O-, or name a file with +O")
    if name == "-":
        return "stdout"
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
    if not kind or (kind != "text" and _normal(key, kind, value, "the job") != value):
        raise UserError(f"povfarm does not hand {key!r} with {value!r} to POV-Ray")
    return _ini_quoted(key, value) if kind in ("text", "log") else value


def _ini_quoted(key: str, value: str) -> str:
    if set(_QUOTES) <= set(value) or not value.isascii():
        raise UserError(f"POV-Ray 3.7 cannot read {key} from an INI file: {value!r}")
    return quoted(_readable(key, value, "the job"))


# === 4. IMAGE ================================================================
# The picture formats that POV-Ray writes: is this the whole picture that was
# asked for? Its rows, cut out and joined again; frames as an animated PNG.
# A picture is a file, or bytes that would be in one. However large it is, only blocks
# of it are in memory, and a list of where its rows begin; but all of a JPEG.

_ODD = "is of a kind that POV-Ray never writes"
_BLOCK = 1 << 18  # bytes inflated at a time: what a lying header can cost
_HEAD = 1 << 12  # bytes in which a header of text has to end: POV-Ray's have less than 200


@dataclass(frozen=True)
class ImageInfo:
    """What a whole picture is: its size in pixels, its channels and the bits of each.

    ``channels`` is 1 to 4: grey, grey and alpha, colour, colour and alpha.
    """

    width: int
    height: int
    channels: int
    depth: int


def check_image(source: Path | bytes, extension: str, width: int, height: int) -> ImageInfo:
    """Return what ``source`` is when it is one whole picture of this type and size.

    ``extension`` is one of ``IMAGE_TYPES``; with a ``width`` of 0 any size is right.
    Raises ``ImageError`` with one line for a picture that ends early or late, has
    another type or size, or is damaged where its format lets one see it: all of a PNG
    and of an EXR's pixels, but only the structure of the others; and for a file that cannot be
    read. What is expected is what POV-Ray 3.7 writes (measured with 3.7.0.10),
    not all that a format allows.
    """
    check = _CHECKS.get(extension)
    if check is None:
        known = ", ".join(_CHECKS)
        raise ImageError(f"'{extension}' is not a picture that POV-Ray writes: it writes {known}")
    with _opened(source, extension) as data:
        return check(data, (width, height) if width else None).info


def crop_rows(source: Path | bytes, extension: str, top: int, rows: int, to: Path) -> None:
    """Write ``rows`` rows of a picture, from row ``top`` on, as a picture of its own.

    Such a *strip* is of the same type and keeps the notes in the header. The
    picture has passed ``check_image``. Raises ``ImageError`` for rows that it
    does not have, and for a type that is not one of ``STRIP_TYPES``.
    """
    with _opened(source, extension) as data:
        picture = _read(data, extension)
        height = picture.info.height
        _need(0 <= top < top + rows <= height,
              f"a picture of {height} rows has no rows {top} to {top + rows - 1}")
        with open(to, "wb") as out:
            _LAYOUTS[extension].write(out, [_Strip(picture, top, rows)])


def join_rows(strips: Sequence[Path | bytes], extension: str, to: Path) -> None:
    """Write the whole picture that strips make, given from the top to the bottom.

    Its pixels are those of the strips; what its header says besides (software,
    date) is the first strip's. Each strip has passed ``check_image``, and so
    does the result. Raises ``ImageError`` when a strip is of another kind than
    the first.
    """
    _need(bool(strips), "there are no strips to join")
    found: list[_Strip] = []
    for number, strip in enumerate(strips, 1):
        with _opened(strip, extension) as data:
            picture = _read(data, extension)
        found.append(_Strip(picture, 0, picture.info.height))
        _need(picture.form == found[0].picture.form, f"strip {number} does not fit the first: "
                                                     f"{picture.form}, not {found[0].picture.form}")
    with _opened(strips[0], extension), open(to, "wb") as out:
        _LAYOUTS[extension].write(out, found)
    check_image(to, extension, found[0].picture.info.width, _height(found))


def same_pixels(one: Path | bytes, other: Path | bytes, extension: str) -> bool:
    """Tell whether two whole pictures of a type show the same, whatever else is in them.

    Besides the date that POV-Ray writes into most of them, a PNG may be filtered
    otherwise by another libpng. JPEG is compared as it is packed.
    """
    with _opened(one, extension) as data, _opened(other, extension) as more:
        if extension == ".jpg":
            dated = re.compile(rb"Render Date: [-0-9 :Z]+")
            return dated.sub(b"", data[:], count=1) == dated.sub(b"", more[:], count=1)
        if extension == ".png":
            a, b = _png_apart(data), _png_apart(more)
            return (a.form, a.info.height) == (b.form, b.info.height) and (
                _all_same(_png_rows(a), _png_rows(b)) or _all_same(
                    _png_plain(_png_rows(a), a.step), _png_plain(_png_rows(b), b.step)))
        mine, theirs = _read(data, extension), _read(more, extension)
        return mine.form == theirs.form and _all_same(
            *(_LAYOUTS[extension].pixels(_Strip(each, 0, each.info.height))
              for each in (mine, theirs)))


def is_black(source: Path | bytes, extension: str) -> bool:
    """Tell whether a whole PNG picture is black all over, whatever its alpha; else False.

    Filters work on each colour by itself and leave nothing of zeros, so rows
    need not be unfiltered. A picture that is not black is seen in its first rows.
    """
    if extension != ".png":
        return False
    with _opened(source, extension) as data:
        png = _png_apart(data)
        colors = png.step - (png.info.depth // 8 if png.info.channels in (2, 4) else 0)
        return not any(row[at::png.step].strip(b"\0")
                       for row in _png_rows(png) for at in range(1, 1 + colors))


def animated_png(
    frames: Iterable[Path | bytes], count: int, delay: Fraction, loops: int = 0
) -> Iterator[bytes]:
    """Yield the pieces of an animated PNG of ``count`` PNG pictures.

    Each is shown for ``delay`` seconds; 0 ``loops`` go on for ever. The packed
    pixels are copied. Raises ``ImageError`` with the picture's number, from 1,
    when it is unlike the first.
    """
    short = delay.limit_denominator(int(65535 / max(1.0, float(delay))))  # two numbers of 16 bits
    sequence = itertools.count()
    number, first, tail = 0, "", b""
    for number, frame in enumerate(frames, 1):
        with _opened(frame, ".png") as data:
            png = _png_apart(data)
        kind = f"{png.info.height} rows of {png.form}"
        if number == 1:
            first, tail = kind, data[png.end:]
            yield data[:33] + _png_chunk(b"acTL", struct.pack(">II", count, loops))
            yield from data.blocks(33, png.start)
        _need(kind == first, f"picture {number} does not fit the first: {kind}, not {first}")
        yield _png_chunk(b"fcTL", struct.pack(
            ">IIIIIHHBB", next(sequence), png.info.width, png.info.height, 0, 0,
            short.numerator, short.denominator, 0, 0))
        for packed in png.packed():
            yield (_png_chunk(b"IDAT", packed) if number == 1 else
                   _png_chunk(b"fdAT", struct.pack(">I", next(sequence)) + packed))
    _need(number == count > 0, f"there are {number} pictures, not {count}")
    yield tail


class _Data:
    """The bytes of a file, of which only those that were read last are in memory.

    The file is opened anew for each read, because hundreds of pictures may be in use together.
    """

    def __init__(self, source: Path | bytes) -> None:
        self._source, self._start = source, 0
        self._loaded, self._size = b"", 0
        if isinstance(source, bytes):
            self._loaded, self._size = source, len(source)
        else:
            self._look(0, BUFFER)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(self._size)
        end = max(start, end)
        if not self._start <= start <= end <= self._start + len(self._loaded):
            self._look(start, max(end - start, BUFFER))
        return self._loaded[start - self._start:end - self._start]

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """Yield what is between two places, a block at a time."""
        return (self[at:min(at + BUFFER, end)] for at in range(start, end, BUFFER))

    def unpack(self, form: str, at: int) -> tuple[Any, ...]:
        """Return the values at a place, as the module struct reads them."""
        return struct.unpack(form, self[at:at + struct.calcsize(form)])

    def _look(self, start: int, size: int) -> None:
        try:
            with open(self._source, "rb", buffering=0) as file:
                self._size = file.seek(0, os.SEEK_END)
                file.seek(start)
                self._loaded, self._start = file.read(size), start
        except OSError as error:
            raise ImageError(f"{error.filename} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def _opened(source: Path | bytes, extension: str) -> Iterator[_Data]:
    """Open a picture; an ``ImageError`` of one line replaces what damaged data raises."""
    name, data = extension[1:].upper(), _Data(source)
    if not len(data):
        raise ImageError(f"the {name} file is empty")
    try:
        yield data
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


def _need_end(kind: str, end: int, data: _Data) -> None:
    if end > len(data):
        raise ImageError(f"the {kind} file ends too early, after {len(data)} of {end} bytes")
    _need(end == len(data), f"the {kind} file goes on for {len(data) - end} bytes after its end")


class _Picture(NamedTuple):
    """A picture taken apart: its rows, and what two must share to be joined.

    ``rows`` are the places where rows begin and the last one ends, of PNG and
    EXR the picture's parts.
    """

    info: ImageInfo
    form: str
    data: _Data
    rows: Any


class _Strip(NamedTuple):
    """Rows of a picture, from row ``top`` on."""

    picture: _Picture
    top: int
    rows: int

    def blocks(self) -> Iterator[bytes]:
        """Yield the rows as they are in the file, a block at a time."""
        edges = self.picture.rows
        return self.picture.data.blocks(*sorted((edges[self.top], edges[self.top + self.rows])))


class _Layout(NamedTuple):
    """How to take a picture apart, how to write one like the first of strips, what to compare.

    ``read`` checks everything, against a size too; without one the picture has
    passed that, and packed pixels need not be unpacked.
    """

    read: Callable[[_Data, tuple[int, int] | None], _Picture]
    write: Callable[[BinaryIO, Sequence[_Strip]], None]
    pixels: Callable[[_Strip], Iterable[Any]] = _Strip.blocks


def _read(data: _Data, extension: str) -> _Picture:
    _need(extension in _LAYOUTS, f"the rows of a '{extension}' picture cannot be cut and joined")
    return _LAYOUTS[extension].read(data, None)


def _height(strips: Sequence[_Strip]) -> int:
    return sum(strip.rows for strip in strips)


def _write_rows(out: BinaryIO, strips: Iterable[_Strip]) -> None:
    for strip in strips:
        out.writelines(strip.blocks())


def _all_same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(a == b for a, b in itertools.zip_longest(one, other))


def _row_end(kind: str, data: bytes, at: int, width: int, steps: Sequence[tuple[int, int]]) -> int:
    """Return where a row of ``width`` packed values ends.

    ``steps`` tells by the first byte of a packet how many values it has, in how many bytes.
    """
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
    """A PNG picture taken apart: its IDAT chunks are from ``start`` to ``end``."""

    info: ImageInfo
    form: str
    data: _Data
    start: int
    end: int
    row: int  # bytes of a row with its filter byte
    step: int  # bytes of a pixel, at least 1

    def packed(self) -> Iterator[bytes]:
        """Yield what is in the IDAT chunks, a block at a time."""
        at = self.start
        while at < self.end:
            end = at + 12 + self.data.unpack(">I", at)[0]
            yield from self.data.blocks(at + 8, end - 4)
            at = end


def _read_png(data: _Data, size: tuple[int, int] | None) -> _Picture:
    png = _png_apart(data, size)
    if size is not None:
        missing, phase = png.row * png.info.height, 0  # bytes to come, and until the next filter
        for piece in _inflated(png):
            missing -= len(piece)
            _need(missing >= 0, "the PNG file holds more pixels than its size")
            _need(max(piece[phase::png.row], default=0) <= 4,
                  "the PNG file is damaged: an unknown row filter")
            phase = (phase - len(piece)) % png.row
        _need(missing == 0, "the PNG file has too few pixels")
    return _Picture(png.info, png.form, data, png)


def _png_apart(data: _Data, size: tuple[int, int] | None = None) -> _Png:
    """Check everything but the pixels themselves."""
    _need(data[:8] == b"\x89PNG\r\n\x1a\n"[: len(data)], "the file is not a PNG picture")
    chunks = _png_chunks(data)
    _need(next(chunks)[1:] == (b"IHDR", 13), "the PNG file has no header")
    width, height, depth, color, *rest = data.unpack(">IIBBBBB", 16)
    _need_size("PNG", (width, height), size)
    channels, depths = _PNG_TYPES.get(color, (0, ()))
    _need(depth in depths and rest == [0, 0, 0], f"the PNG file {_ODD}")
    start, end, gamma = 0, 0, ""
    for at, kind, length in chunks:
        if kind == b"IDAT":
            _need(at == end or not start, "the PNG file's pixels are not in one piece")
            start, end = start or at, at + 12 + length
        elif kind == b"gAMA":
            gamma = data[at + 8:at + 8 + min(length, 4)].hex()
    _need(start > 0, "the PNG file has no pixels")
    bits = channels * depth
    form = f"{width} pixels a row, colour type {color}, {depth} bits, gamma {gamma}"
    return _Png(ImageInfo(width, height, channels, depth), form, data, start, end,
                1 + (width * bits + 7) // 8, max(1, bits // 8))


def _png_chunks(data: _Data) -> Iterator[tuple[int, bytes, int]]:
    """Yield where each chunk is, its kind and how many bytes are in it."""
    at = 8
    while True:
        length, kind = data.unpack(">I4s", at)
        end = at + 12 + length
        _need(end <= len(data), f"the PNG file ends too early, after {len(data)} bytes")
        check = 0
        for block in data.blocks(at + 4, end - 4):
            check = zlib.crc32(block, check)
        _need(data.unpack(">I", end - 4)[0] == check, "the PNG file is damaged, by its checksum")
        yield at, kind, length
        if kind == b"IEND":
            _need(length == 0, "the PNG file is damaged: its end has contents")
            return _need_end("PNG", end, data)
        at = end


def _inflated(png: _Png) -> Iterator[bytes]:
    """Yield the filtered rows, a block of bytes at a time."""
    inflate = zlib.decompressobj()
    for packed in png.packed():
        piece = inflate.decompress(packed, _BLOCK)
        yield piece
        while inflate.unconsumed_tail or len(piece) == _BLOCK:
            piece = inflate.decompress(inflate.unconsumed_tail, _BLOCK)
            yield piece
        _need(not inflate.unused_data, "the PNG file goes on after its last pixel")
    _need(inflate.eof, "the PNG file has too few pixels")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(body, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(body)), kind, body, struct.pack(">I", check)])


# zlib's header and its end for deflate data that stops at a whole byte (a full flush):
# between the two such data can be put together without packing it anew. Each is in an
# IDAT chunk of its own, and what is between them is copied with its chunks' checksums.
_DEFLATE_HEAD, _DEFLATE_END, _FLUSHED = b"\x78\x9c", b"\x03\x00", b"\x00\x00\xff\xff"
_LOOSE_HEAD = _png_chunk(b"IDAT", _DEFLATE_HEAD)
_LOOSE_END = 12 + len(_DEFLATE_END) + 4


def _png_rows(png: _Png) -> Iterator[bytes]:
    """Yield the rows as they are in the file: a filter byte, then what that filter left."""
    rest = b""
    for piece in _inflated(png):
        rest += piece
        whole = len(rest) - len(rest) % png.row
        yield from (rest[start:start + png.row] for start in range(0, whole, png.row))
        rest = rest[whole:]


def _png_plain(rows: Iterable[bytes], step: int) -> Iterator[bytes]:
    """Yield rows without their filters (PNG, section 9): slow, each byte is computed in Python."""
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


def _png_crop(png: _Png, top: int, rows: int) -> Iterator[bytes]:
    """Yield some rows; only the first is filtered anew, as nothing is above it now."""
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
    return itertools.chain([first], itertools.islice(source, rows - 1))


def _png_is_loose(png: _Png) -> bool:
    """Did ``_write_png`` make this picture, and does no row above matter to its first?"""
    last = png.end - _LOOSE_END  # before it is the checksum of the chunk with the last row
    return (png.data[png.start:png.start + len(_LOOSE_HEAD)] == _LOOSE_HEAD
            and png.data[last - 8:last - 4] == _FLUSHED
            and png.data[last:last + 10] == b"\0\0\0\6IDAT" + _DEFLATE_END
            and next(filter(None, _inflated(png)), b"")[:1] in (b"\0", b"\1"))


def _write_loose(out: BinaryIO, strip: _Strip) -> int:
    """Append the chunks of rows packed so that others can follow; return their Adler-32."""
    png: _Png = strip.picture.rows
    if strip.rows == png.info.height and _png_is_loose(png):
        out.writelines(png.data.blocks(png.start + len(_LOOSE_HEAD), png.end - _LOOSE_END))
        return int.from_bytes(png.data[png.end - 8:png.end - 4], "big")
    # Level 6 and the filtered strategy are what libpng and so POV-Ray itself use.
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 8, zlib.Z_FILTERED)
    packed, check = b"", 1
    for row in _png_crop(png, strip.top, strip.rows):
        packed += deflate.compress(row)
        check = zlib.adler32(row, check)
        if len(packed) > BUFFER:
            out.write(_png_chunk(b"IDAT", packed))
            packed = b""
    out.write(_png_chunk(b"IDAT", packed + deflate.flush(zlib.Z_FULL_FLUSH)))
    return check


def _write_png(out: BinaryIO, strips: Sequence[_Strip]) -> None:
    png: _Png = strips[0].picture.rows
    data, low, high = png.data, 1, 0
    header = data[16:20] + struct.pack(">I", _height(strips)) + data[24:29]
    out.write(data[:8] + _png_chunk(b"IHDR", header))
    out.writelines(data.blocks(33, png.start))
    out.write(_LOOSE_HEAD)
    for strip in strips:
        check = _write_loose(out, strip)
        # Adler-32 of two pieces from that of each, as in zlib's adler32_combine.
        high = (high + (check >> 16) + png.row * strip.rows * (low - 1)) % 65521
        low = (low + (check & 65535) - 1) % 65521
    out.write(_png_chunk(b"IDAT", _DEFLATE_END + struct.pack(">HH", high, low)))
    out.writelines(data.blocks(png.end, len(data)))


def png_of_ppm(source: Path, size: tuple[int, int], depth: int, rows: range, to: Path) -> None:
    """Write some ``rows`` of a PPM picture of a ``size`` as the PNG that POV-Ray makes of them.

    ``ImageError`` for one that is damaged, grey, or not of ``depth`` bits a colour.
    """
    with _opened(source, ".ppm") as data, open(to, "wb") as out:
        picture = _read_ppm(data, size)
        _need(picture.info.channels == 3 and picture.form.endswith(f" to {(1 << depth) - 1}"),
              f"the PPM picture does not have three colours of {depth} bits")
        header = struct.pack(">IIBBBBB", size[0], len(rows), depth, 2, 0, 0, 0)
        out.writelines([b"\x89PNG\r\n\x1a\n", _png_chunk(b"IHDR", header),
                        _png_chunk(b"gAMA", struct.pack(">I", 45455)), _png_chunk(b"sRGB", b"\0")])
        deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 8, zlib.Z_FILTERED)
        left = bytes(3 * depth // 8)
        for row in (data[picture.rows[y]:picture.rows[y + 1]] for y in rows):
            filtered = _differences(row, (left + row)[:len(row)])
            if packed := deflate.compress(b"\1" + filtered.to_bytes(len(row), "little")):
                out.write(_png_chunk(b"IDAT", packed))
        out.writelines([_png_chunk(b"IDAT", deflate.flush()), _png_chunk(b"IEND", b"")])


def _differences(one: bytes, other: bytes) -> int:
    """Return the differences of bytes at the same places, the first lowest."""
    a, b = int.from_bytes(one, "little"), int.from_bytes(other, "little")
    high, low = (int.from_bytes(each * len(one), "little") for each in (b"\x80", b"\x7f"))
    return ((a | high) - (b & low)) ^ ((a ^ b) & high) ^ high


_TEXT_HEADERS = {
    "PPM": re.compile(rb"P([56])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(?P<height>\d{1,9})"
                      rb"(?:\s|#[^\n]*\n)+(\d{1,9})\s"),
    "HDR": re.compile(rb"#\?RADIANCE\n(?:[^\n]+\n)*?FORMAT=32-bit_rle_rgbe\n"
                      rb"(?:[^\n]+\n)*\n-Y (?P<height>\d{1,9}) \+X (\d{1,9})\n"),
}


def _header(kind: str, data: _Data) -> re.Match[bytes]:
    header = _TEXT_HEADERS[kind].match(data[:_HEAD])
    if header is None:
        raise ImageError(f"the {kind} file's header is not whole")
    return header


def _write_under_text(out: BinaryIO, strips: Sequence[_Strip]) -> None:
    """The header of PPM and HDR is text, with the height in it."""
    data = strips[0].picture.data
    header = _header("PPM" if data[:1] == b"P" else "HDR", data)
    start, end = header.span("height")
    out.write(data[:start] + b"%d" % _height(strips) + data[end:header.end()])
    _write_rows(out, strips)


def _read_ppm(data: _Data, size: tuple[int, int] | None) -> _Picture:
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
                    f"{width} pixels a row, P{form}, values to {most}", data, edges)


def _read_tga(data: _Data, size: tuple[int, int] | None) -> _Picture:
    """TGA 2.0: after the pixels come 495 bytes of notes and a signature, as POV-Ray writes them."""
    skip, palette, form, width, height, bits, turned = data.unpack("<BBB9xHHBB", 0)
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
            packed = data[edges[-1]:edges[-1] + width * (1 + bits // 8)]  # it takes no more
            edges.append(edges[-1] + _row_end("TGA", packed, 0, width, steps))
    _need_end("TGA", edges[-1] + 495 + 26, data)
    _need(data.unpack("<H", edges[-1])[0] == 495
          and data[-26:] == struct.pack("<II", edges[-1], 0) + b"TRUEVISION-XFILE.\0",
          "the TGA file is damaged at its end")
    return _Picture(ImageInfo(width, height, bits // 8, 8),
                    f"{width} pixels a row, type {form}, {bits} bits", data, edges)


def _write_tga(out: BinaryIO, strips: Sequence[_Strip]) -> None:
    data = strips[0].picture.data
    head = data[:strips[0].picture.rows[0]]
    out.write(head[:14] + struct.pack("<H", _height(strips)) + head[16:])
    _write_rows(out, strips)
    out.write(data[-521:-26] + struct.pack("<I", out.tell()) + data[-22:])


def _read_bmp(data: _Data, size: tuple[int, int] | None) -> _Picture:
    """The file's rows go from the bottom to the top, each padded to four bytes."""
    _need(data[:2] == b"BM"[: len(data)], "the file is not a BMP picture")
    length, start, head, width, height, planes, bits, packed, pixels = data.unpack(
        "<2xI4xIIiiHHII", 0)
    _need_size("BMP", (width, height), size)
    _need((start, head, planes, packed) == (54, 40, 1, 0) and bits in (24, 32),
          f"the BMP file {_ODD}")
    row = (width * bits + 31) // 32 * 4
    _need_end("BMP", start + row * height, data)
    _need(length == len(data) and pixels == length - start,
          "the BMP file is damaged: its header has another length")
    return _Picture(ImageInfo(width, height, bits // 8, 8), f"{width} pixels a row, {bits} bits",
                    data, range(length, start - 1, -row))


def _write_bmp(out: BinaryIO, strips: Sequence[_Strip]) -> None:
    first, height = strips[0].picture, _height(strips)
    head, size = first.data[:54], -first.rows.step * height
    out.write(b"BM" + struct.pack("<I", 54 + size) + head[6:22] + struct.pack("<i", height)
              + head[26:34] + struct.pack("<I", size) + head[38:])
    _write_rows(out, reversed(strips))


# After a scan: neither a stuffed zero nor a restart.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)


def _check_jpeg(picture: _Data, size: tuple[int, int] | None) -> _Picture:
    data = picture[:]  # it has no rows to look at one by one
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
    _need_end("JPEG", at + 2, picture)
    if info is None or not scanned:
        raise ImageError("the JPEG file holds no picture")
    return _Picture(info, "", picture, ())


# In HDR a byte of 0 would be a run of nothing: it fits no picture.
_HDR_STEPS = [(_BLOCK, 1), *((count, 1 + count) for count in range(1, 129)),
              *((count, 2) for count in range(1, 128))]


def _read_hdr(data: _Data, size: tuple[int, int] | None) -> _Picture:
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
            packed, at = data[edges[-1]:edges[-1] + 4 + 8 * width], 4  # it takes no more
            _need(struct.unpack_from(">HH", packed) == (0x0202, width), "the HDR file is damaged")
            for _ in range(4):
                at = _row_end("HDR", packed, at, width, _HDR_STEPS)
            edges.append(edges[-1] + at)
    _need_end("HDR", edges[-1], data)
    return _Picture(ImageInfo(width, height, 3, 8), f"{width} pixels a row", data, edges)


def _read_exr(data: _Data, size: tuple[int, int] | None) -> _Picture:
    """One scanline image in blocks of 16 rows, each deflated or stored (OpenEXR file layout)."""
    _need(data[:8] == b"\x76\x2f\x31\x01\x02\0\0\0"[: len(data)], "the file is not an EXR picture")
    head = data[:BUFFER]
    fields, at = _exr_fields(head)
    left, top, right, bottom = struct.unpack("<4i", head[fields[b"dataWindow"]])
    width, height = right - left + 1, bottom - top + 1
    _need_size("EXR", (width, height), size)
    display = head[fields[b"displayWindow"]]
    _need(head[fields[b"compression"]] == b"\x03" and len(display) == 16, f"the EXR file {_ODD}")
    types = _exr_channels(head[fields[b"channels"]])
    row = width * sum(2 if kind == 1 else 4 for kind in types.values())
    offsets = data.unpack(f"<{-(-height // 16)}Q", at)
    at += 8 * len(offsets)
    blocks: list[_ExrBlock] = []
    for offset in offsets:
        first, length = data.unpack("<iI", at)
        _need(offset == at and first == top + 16 * len(blocks), "the EXR file is damaged")
        at += 8 + length
        _need(at <= len(data), f"the EXR file ends too early, after {len(data)} bytes")
        blocks.append(_ExrBlock(data, at - length, at, min(16, height - 16 * len(blocks)), row))
        if size is not None:
            blocks[-1].unpacked()
    _need_end("EXR", at, data)
    return _Picture(ImageInfo(width, height, len(types), 16 if 1 in types.values() else 32),
                    f"{width} pixels a row, channels {types}", data, blocks)


def _exr_fields(data: bytes) -> tuple[dict[bytes, slice], int]:
    """Return where the values of a header are, by name, and where the header ends."""
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


class _ExrBlock(NamedTuple):
    """Up to 16 rows as they are packed in a file, ``size`` bytes each when unpacked."""

    data: _Data
    start: int
    end: int
    rows: int
    size: int

    def packed(self) -> bytes:
        """Return the bytes as they are in the file."""
        return self.data[self.start:self.end]

    def unpacked(self) -> bytes:
        """Return the bytes in OpenEXR's order for packing, or as they are where they are stored."""
        packed, wanted = self.packed(), self.rows * self.size
        if len(packed) == wanted:
            return packed
        inflate = zlib.decompressobj()
        steps = inflate.decompress(packed, wanted + 1)
        _need(len(steps) == wanted and inflate.eof and not inflate.unused_data,
              "the EXR file is damaged")
        return steps

    def raw(self) -> bytes:
        """Return the rows: OpenEXR packs differences, of even bytes first, then of the odd ones."""
        steps = self.unpacked()
        if self.end - self.start == len(steps):
            return steps
        order = _exr_sums(steps)
        raw = bytearray(order)
        raw[0::2], raw[1::2] = order[:len(order) // 2], order[len(order) // 2:]
        return bytes(raw)


# Each byte is stored as its difference to the one before, plus 128. All bytes are computed
# at once, as the digits of one number: a loop over them would take ten seconds a picture.

def _exr_differences(order: bytes) -> bytes:
    size = len(order)
    bias = int.from_bytes(b"\0" + b"\x80" * (size - 1), "little")
    return (_differences(order, (b"\0" + order)[:size]) ^ bias).to_bytes(size, "little")


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


def _exr_packed(raw: bytes) -> bytes:
    packed = zlib.compress(_exr_differences(raw[0::2] + raw[1::2]), 4)
    return packed if len(packed) < len(raw) else raw


def _exr_blocks(strips: Sequence[_Strip]) -> Iterator[bytes]:
    """Yield the packed blocks of a picture of these rows; one that was a block is copied."""
    raw, rows_left = b"", _height(strips)
    for picture, top, rows in strips:
        for number, block in enumerate(picture.rows):
            first, last = max(top - 16 * number, 0), min(top + rows - 16 * number, block.rows)
            if not raw and last - first == block.rows == min(16, rows_left):
                yield block.packed()
                rows_left -= block.rows
            elif first < last:
                raw += block.raw()[first * block.size:last * block.size]
            while raw and len(raw) >= min(16, rows_left) * block.size:
                yield _exr_packed(raw[:16 * block.size])
                raw, rows_left = raw[16 * block.size:], rows_left - 16


def _write_exr(out: BinaryIO, strips: Sequence[_Strip]) -> None:
    data, height = strips[0].picture.data, _height(strips)
    fields, end = _exr_fields(data[:BUFFER])
    head = bytearray(data[:end])
    for window in (fields[b"dataWindow"], fields[b"displayWindow"]):
        top = struct.unpack_from("<4xi", head, window.start)[0]
        struct.pack_into("<i", head, window.start + 12, top + height - 1)
    top = struct.unpack_from("<4xi", head, fields[b"dataWindow"].start)[0]
    out.write(head + bytes(-(-height // 16) * 8))  # the places of the blocks are not known yet
    offsets = []
    for number, packed in enumerate(_exr_blocks(strips)):
        offsets.append(out.tell())
        out.write(struct.pack("<iI", top + 16 * number, len(packed)) + packed)
    out.seek(end)
    out.write(struct.pack(f"<{len(offsets)}Q", *offsets))


_LAYOUTS: Mapping[str, _Layout] = {
    ".png": _Layout(_read_png, _write_png), ".ppm": _Layout(_read_ppm, _write_under_text),
    ".tga": _Layout(_read_tga, _write_tga), ".bmp": _Layout(_read_bmp, _write_bmp),
    ".hdr": _Layout(_read_hdr, _write_under_text),
    ".exr": _Layout(_read_exr, _write_exr,
                    lambda strip: (block.raw() for block in strip.picture.rows)),
}
_CHECKS: Mapping[str, Callable[[_Data, tuple[int, int] | None], _Picture]] = {
    **{extension: layout.read for extension, layout in _LAYOUTS.items()}, ".jpg": _check_jpeg,
}
# The types whose rows can be cut and joined: JPEG's cannot without a loss.
STRIP_TYPES = frozenset(_LAYOUTS)


# === 5. PROJECT ==============================================================
# Which files a job needs, where they lie in the tree that a worker gets, which
# of them its own frames write, and projects as zip files. Reads scenes as far as
# the files go that they name, in time by their length, whatever is in them; starts
# nothing, and writes nothing but what a zip file holds and copies of what changes.
#
# The tree: its top is the directory that holds the root (the project's directory),
# the directory in which POV-Ray would run, and what is named from there with
# "../"; every file keeps its place in it. A library directory (+L) that is not
# below lies in _lib1, _lib2 and so on, a root far from the current directory in
# _scene.

MAX_FILES = 100_000  # of a project
MAX_ZIP_SIZE = 4 * 10**9  # bytes, unpacked
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others take memory without a limit
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)
MAX_LIST = 32 << 20  # bytes of a zip file's list of files
MAX_RATIO = 200  # how much larger than a zip file its files may be
GUARD_FILES = 20_000  # a root with more is taken for no project, unless the user says so
GUARD_SIZE = 2 * 10**9
MAX_WRITTEN, MAX_WRITTEN_SIZE = 1000, 64 << 20  # files that a scene may write, and their bytes

# What POV-Ray 3.8 comes with, for a machine that has no such POV-Ray.
_STANDARD_FILES = frozenset([*(f"{name}.inc" for name in """arrays chars colors colors_ral consts
    debug finish functions glass glass_old golds ior logo makegrass math meshmaker meshskeleton
    metals NurbsMesh rad_def rand screen shapes shapes2 shapes3 shapes_old shapesq skies stage1
    stars stdcam stdinc stoneold stones stones1 stones2 strings sunpos textures transforms
    woodmaps woods""".split()),
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
# "ttf" is the type of many more things than files: it counts only before a string.
_FILE_WORDS = frozenset(_EXTENSIONS_TRIED) - {"scene", "ttf"} | {"load_file", "save_file"}
_IMAGE_BLOCKS = frozenset(
    ["image_map", "bump_map", "material_map", "image_pattern", "height_field"])
_BLOCK_STARTS = frozenset(["#if", "#ifdef", "#ifndef", "#switch", "#while", "#for", "#macro"])

# What is sent only when a scene mentions it, and what is not sent even then.
_JUNK = re.compile(r"\..*|CVS|__pycache__|__MACOSX|Thumbs\.db|desktop\.ini|.*\.pov-state")
_NEVER = re.compile(r"\.(?:git|hg|svn|bzr|ssh|gnupg)|CVS|_darcs")
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
    after_frame: Optional[int] = None


@dataclass(frozen=True)
class Manifest:
    """The files of a project, and its directories that hold none of them; sorted."""

    files: tuple[FileEntry, ...]
    directories: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of exactly these contents: a SHA-256 over all but the times."""
        rows = [*([file.path, file.sha256, file.size, file.after_frame] for file in self.files),
                *self.directories]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """Return the form that goes through JSON."""
        return {"files": [{**vars(file)} for file in self.files],
                "directories": list(self.directories)}

    @classmethod
    def from_wire(cls, wire: Any) -> Manifest:
        """Read what ``to_wire`` made on another machine; ``UserError`` when it is not that."""
        wire = wire if isinstance(wire, dict) else {}
        rows, folders = wire.get("files"), wire.get("directories", [])
        if (not isinstance(rows, list) or not isinstance(folders, list)
                or len(rows) + len(folders) > MAX_FILES):
            raise UserError(f"a manifest is a list of at most {MAX_FILES} files and directories")
        try:
            files = sorted((_checked(FileEntry(**row)) for row in rows),
                           key=operator.attrgetter("path"))
        except TypeError:
            raise UserError("a manifest's row is not the description of a file") from None
        directories = sorted(map(_checked_path, folders))
        # No name has a zero byte, so in this order what is in a directory comes next to it.
        names = [*(file.path for file in files), *directories]
        places = sorted(name.replace("/", "\0") for name in names)
        for one, other in zip(places, places[1:]):
            path = one.replace("\0", "/")
            if one == other:
                raise UserError(f"the manifest names '{path}' twice")
            if other.startswith(one + "\0"):
                raise UserError(f"'{path}' is a file and a directory in the manifest")
        return cls(tuple(files), tuple(directories))


@dataclass(frozen=True)
class Project:
    """A job's files and how POV-Ray is started over them.

    ``sources`` tells the local file of each path of the manifest, or its
    contents where they differ from it. ``run_dir`` is the place of the current
    directory in the tree, ``.`` for its top, and ``scene`` is relative to it, or
    to a directory of ``library``. Those are places in the tree too, or
    ``STANDARD``. ``uses`` names what the scene has: ``radiosity``, ``photons``,
    ``own-output`` (it reads what its frames render or write), ``own-files`` (what
    they write), ``load_file NAME`` (POV-Ray looks for that file in its own
    directory only), ``append NAME`` (it may write on there), ``appends NAME`` (to
    names that begin so) and ``system_file SHA256 PATH`` (it reads that file where it
    is). ``reads`` are the names that it may read and write, where they are not all
    written out. ``values`` are options of the command line that have to be others;
    ``named`` are the paths that the scene names, ``writes`` what its text says that it
    writes, from the current directory on. ``explain`` says of a name that
    POV-Ray did not find whether the file could be sent, and why it was not.
    """

    manifest: Manifest
    sources: Mapping[str, Path | bytes]
    run_dir: str
    scene: str
    library: tuple[str, ...]
    warnings: tuple[str, ...]
    uses: frozenset[str]
    reads: frozenset[_Name] = frozenset()
    values: Mapping[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    explain: Callable[[str], tuple[bool, str]] = lambda name: (False, name)

    def read_by_others(self, names: Iterable[str]) -> str:
        """Return the first of the names of what frames wrote that others may have read."""
        return next((name for name in names if any(
            read._replace(text=text).may_be(_Name(name, True))
            for read in self.reads for text in _garbled(read.text))), "")

    def as_it_is_now(self, scratch: Path, sha256: str) -> tuple[Project, list[str]]:
        """Look at the files again, as what was sent for ``sha256`` had another hash.

        Of those that have changed, the ones that the scene names are copied to
        ``scratch`` first, so that they hold still. The others stay out; their
        names are returned, too.
        """
        files, left_out, sources = [], [], dict(self.sources)
        for file in self.manifest.files:
            local = sources[file.path]
            about = None
            if isinstance(local, Path) and file.sha256 != sha256:
                with contextlib.suppress(OSError):
                    about = local.stat()
            if isinstance(local, bytes) or (
                    about and (about.st_size, about.st_mtime) == (file.size, file.mtime)):
                files.append(file)
            elif file.path in self.named:
                sources[file.path] = copy = scratch / f"{len(files)}-{secrets.token_hex(4)}"
                try:
                    shutil.copyfile(local, copy)
                except OSError as error:
                    raise UserError(f"{local} cannot be read: {error.strerror}") from None
                files.append(replace(file, sha256=sha256_file(copy), size=copy.stat().st_size))
            else:
                left_out.append(file.path)
        return replace(self, manifest=replace(self.manifest, files=tuple(files)),
                       sources=sources), left_out


HashCache = Dict[Tuple[str, int, int], str]  # (path, size, mtime in ns) -> SHA-256


def collect_project(
    scene: str, library: Sequence[str], cwd: Path, root: Path | None, outputs: Iterable[str],
    frames: Sequence[int], standard_dirs: Sequence[Path], hash_cache: HashCache | None = None,
    ini_dirs: Sequence[Path] = (), *, values: Mapping[str, str] | None = None,
    by_file: Collection[str] = (), ceiling: Path | None = None,
    made: Callable[[Path], bool] | None = None, also: Iterable[str] = (),
) -> Project:
    """Find the files that a job needs, as POV-Ray 3.7 run in ``cwd`` would find them.

    ``scene`` and ``library`` are as the command line and the INI files have
    them, ``by_file`` those that only INI files named, ``values`` the options
    that name further files; ``root`` is the scene's directory when None, and the
    current one where it is above; ``outputs`` are the images that the job
    writes, relative to ``cwd``; ``standard_dirs`` is what ``STANDARD`` means
    here, empty where there is no POV-Ray; ``ini_dirs`` are the directories of
    the INI files, for a better message; nothing above the ``ceiling`` belongs to
    the project; ``made`` tells whether povfarm has put images into a directory;
    ``also`` are names that POV-Ray was seen to miss. The files are
    those below the root and the library directories, by the rules of ``.bsac``
    files where there are any (``_Listing``), and those that the scene and its
    includes name (``_Scan``), as far as names may lead (``_Reach``). Raises
    ``UserError`` for a scene or a file that is missing or outside.
    """
    reach = _Reach(cwd.resolve(), ceiling)
    search = _Search(cwd.resolve(), library, standard_dirs, reach, by_file)
    found = search.find("scene", scene) or _no_scene(search, scene, ini_dirs)
    if scene in by_file and (why := reach.forbids(found.local)):
        raise UserError(f"the scene {found.path} is {why}: give a --root that holds it")
    tree = _Tree(search, real_path(root) if root else found.path.parent)
    reach.bases.append(real_path(tree.root))
    tree.hold(found)
    renders = _Renders(search.cwd / name for name in outputs)
    listing = _Listing(renders, reach, made)
    listing.add_project(tree, root is None)
    scan = _Scan(tree, renders, reach, listing)
    scan.run(found, values or {}, also)
    scan.check()
    tree.settle()
    members, named = _members(tree, listing, scan, max(frames, default=math.inf))
    if len(members) > MAX_FILES:
        raise UserError(f"{tree.root} holds more than {MAX_FILES} files: name those that the job "
                        f"needs in {tree.root / '.bsac'}")
    entries, unread = _entries(members, named, {} if hash_cache is None else hash_cache)
    directories = _empty_directories(tree, [*listing.folders, *scan.passed], entries)
    name = scene if found.place >= 0 else tree.name_of(found.path)
    return Project(
        Manifest(entries, directories), {file.path: members[file.path][0] for file in entries},
        _as_povray_reads(tree.run_dir),
        _as_povray_reads(name.replace("\\", "/") if os.name == "nt" else name),
        tuple(map(_as_povray_reads, tree.library)),
        (*search.warnings, *listing.warnings(), *scan.warnings, *unread),
        frozenset(scan.uses | {f"system_file {sha256_file(Path(path))} {path}"
                               for path in scan.system}),
        frozenset(scan.reads),
        {key: _as_povray_reads(name) for key, name in scan.new_names("").items()},
        frozenset(named), frozenset(scan.written), scan.explain,
    )


def plain_project(scene: Path) -> Project:
    """Return a project of one file, which is for another program than POV-Ray."""
    if not is_file(scene):
        raise UserError(f"there is no file {scene}")
    entries, _ = _entries({scene.name: (scene, _EVERY_FRAME)}, {scene.name}, {})
    return Project(Manifest(entries, ()), {scene.name: scene}, ".", scene.name, (), (), frozenset(),
                   named=frozenset({scene.name}))


_Members = Dict[str, Tuple[Union[Path, bytes], float]]  # by place: what is there, for frames after


def with_files(project: Project, files: Mapping[str, Path]) -> Project:
    """Return a project with more files, by their names from its current directory on."""
    sources = {os.path.normpath(PurePosixPath(project.run_dir, name)).replace(os.sep, "/"): local
               for name, local in files.items()}
    entries, _ = _entries({path: (local, _EVERY_FRAME) for path, local in sources.items()},
                          sources, {})
    more = {file.path: file for file in (*project.manifest.files, *entries)}
    manifest = replace(project.manifest, files=tuple(more[path] for path in sorted(more)))
    return replace(project, manifest=manifest, sources={**project.sources, **sources})


def _members(tree: _Tree, listing: _Listing, scan: _Scan,
             last: float) -> tuple[_Members, set[str]]:
    """Return what is sent for frames up to ``last``, and the places that the scene names."""
    members: _Members = {tree.place(path): member for path, member in listing.members.items()}
    named = set()
    for path, (local, certain) in scan.files.items():
        place = tree.place(path)
        since = members[place][1] if place in members and not certain else _EVERY_FRAME
        members[place] = (scan.text(path, local), since)
        named.add(place)
    for place, member in list(members.items()):
        for blank in [] if place.isascii() else _garbled(place):
            members.setdefault(blank, member)
            named |= {blank} if place in named else set()
    return {place: member for place, member in members.items() if member[1] < last}, named


def _empty_directories(tree: _Tree, folders: Iterable[str],
                       entries: Iterable[FileEntry]) -> tuple[str, ...]:
    """Return the places of the directories in which nothing else of the tree is."""
    full: set[str] = set()
    for entry in entries:
        _add_parents(entry.path, full)
    places = {tree.place(folder) for folder in folders}
    places |= {blank for place in places if not place.isascii() for blank in _garbled(place)}
    for place in places:
        _add_parents(place, full)
    return tuple(sorted(place for place in places - full - {"."} if _is_portable(place)))


def _add_parents(path: str, to: set[str]) -> None:
    while (path := path.rpartition("/")[0]) and path not in to:
        to.add(path)


def scan_in_place(
    scene: str, library: Sequence[str], cwd: Path, outputs: Iterable[str],
    standard_dirs: Sequence[Path], ini_dirs: Sequence[Path] = (), confined: bool = True,
) -> tuple[Project, Mapping[str, Path], Collection[str]]:
    """Return a project that stays where it is: its tree is the whole file system.

    The arguments are those of ``collect_project``; a ``confined`` scene writes
    nothing by a whole path. With it come the files that
    POV-Ray 3.7 finds under garbled names only, by these names, which start from
    ``cwd``; and the places of directories that the scene may want to write in.
    Whether a file is there is POV-Ray's business: ``UserError`` only without the scene.
    """
    reach = _Reach(cwd.resolve(), in_place=True)
    search = _Search(cwd.resolve(), library, standard_dirs, reach, ())
    found = search.find("scene", scene) or _no_scene(search, scene, ini_dirs)
    top = Path(search.cwd.anchor)
    tree = _Tree(search, top)
    scan = _Scan(tree, _Renders(search.cwd / name for name in outputs), reach, None)
    scan.run(found, {}, ())
    tree.settle()
    links = {garbled: local for name, local in scan.garbled.items() for garbled in _garbled(name)}
    folders = [*filter(is_directory, (search.cwd / name for name in scan.folders)),
               *_folders(search.cwd)]
    places = {_below(Path(os.path.normpath(path)), top) for path in folders}
    whole = {name: f"the scene writes {name}, which its confinement does not let it do: give it a "
             "name without the whole path, or add --unconfined"
             for name in sorted(scan.written) if confined and _is_absolute(name)}
    if sure := [name for name in whole if scan.written[name]]:
        raise UserError(whole[sure[0]])
    warnings = [*search.warnings, *whole.values()]
    project = Project(Manifest(()), {}, tree.run_dir, scene, tuple(tree.library),
                      tuple(warnings), frozenset(scan.uses), frozenset(scan.reads),
                      explain=scan.explain)
    return project, links, sorted(place for place in places if place is not None)


def private_places(data: Path) -> frozenset[Path]:
    """Return what no render in place may read though its user may, ``data`` of a farm among it.

    That is what is hidden in the homes of people, where programs keep their
    secrets, and what the kernel shows of other programs.
    """
    homes = {Path.home().resolve(), Path("/root")}
    hidden = {Path(place) for place in ("/proc", "/sys", "/dev", "/run")}
    with contextlib.suppress(OSError):
        homes |= set(Path("/home").iterdir())
    for home in homes:
        with contextlib.suppress(OSError):
            hidden |= {path for path in home.iterdir() if path.name.startswith(".")}
    return frozenset({*hidden, real_path(data)})


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
            unpacked = Path(place) / into.name
            unpacked.mkdir()
            with _zip_of(path) as archive:
                _unpack(archive, unpacked, path.stat().st_size)
            unpacked.rename(into)
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be unpacked: {why}") from None


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
    raise UserError(f"which INI file or scene of {path} is to be rendered? {what}: "
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


def pack_files(files: Mapping[str, Path], to: Path, left_out: Iterable[str] = ()) -> None:
    """Make a zip file of files by their names; its comment names those that were left out."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, path in files.items():
            with contextlib.suppress(FileNotFoundError):  # the scene may delete it just now
                archive.write(path, name)
        archive.comment = "\n".join(map(ascii, left_out)).encode()[:0xFFFF]


def unpack_files(packed: Path, into: Path, most: int = MAX_WRITTEN_SIZE) -> dict[str, Path | None]:
    """Read what ``pack_files`` made of ``most`` bytes; ``UserError`` for what it never makes.

    The files are put into the new directory ``into`` under other names. What was left
    out is None, under names that are only for people.
    """
    with _zip_of(packed, "what a run left", MAX_LIST // 16) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        size = sum(info.file_size for info in infos)
        if len(infos) > MAX_WRITTEN or size > most or (
                size > MAX_WRITTEN_SIZE and size > MAX_RATIO * packed.stat().st_size):
            raise UserError("a run left more files, or larger ones, than it may")
        if any(info.compress_type not in _ZIP_METHODS for info in infos):
            raise UserError("what a run left is not packed as it should be")
        into.mkdir()
        files: dict[str, Path | None] = {}
        for number, info in enumerate(infos):
            path = files[info.filename] = into / f"{number}"
            with archive.open(info) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, BUFFER)
        left_out = archive.comment.decode("ascii", "replace").splitlines()
    for name in files:
        if not may_be_written(name):
            raise UserError(f"{name!r} is not a name of a file that a run may leave")
    return {**dict.fromkeys(left_out), **files}


def may_be_written(name: str) -> bool:
    """Tell whether a file that a scene wrote under this name is brought back."""
    return _is_portable(name) and not any(part.startswith(".") for part in name.split("/"))


# --- how far names lead

_SYSTEM_DIRS = frozenset(["proc", "sys", "dev", "etc", "private"])  # macOS has etc in the last
# What other computers have too, and confined renderers may read.
_SYSTEM_SHARED = ("/usr/share/", "/usr/local/share/", "/usr/lib/", "/Library/Fonts/",
                  "/System/Library/Fonts/", "C:/Windows/Fonts/")


class _Reach:
    """How far the names in scenes and INI files may lead: less far than what a person typed.

    Below a directory in which the person is or that was typed, a name may lead
    anywhere; else no farther up than to the directory that the file has in
    common with the current one, which must not hold the home directory, and not
    into hidden directories. Nothing is ever sent of the system's own
    directories, of version control, or of a farm's data. Links count as what
    they lead to.
    """

    def __init__(self, cwd: Path, ceiling: Path | None = None, in_place: bool = False) -> None:
        self.bases = [cwd]  # where the person is, and what was typed; without links
        self._cwd = cwd
        self._ceiling = ceiling
        self._in_place = in_place  # what may be read is the renderer's confinement
        self._homes = [Path.home().resolve(), *Path.home().resolve().parents]
        self._folders: dict[tuple[Path, Path], str] = {}

    def is_proper(self, directory: Path) -> bool:
        """Tell whether a directory may be a project's own, as homes and tops of disks are not."""
        return directory != directory.parent and directory not in self._homes

    def forbids(self, path: Path) -> str:
        """Say why a file or directory is never sent, whatever names it; empty if it may be."""
        if self._in_place:
            return ""
        real = real_path(path)
        inside = [base for base in self.bases if _below(real, base) is not None]
        base = max(inside, key=lambda base: len(base.parts), default=None)
        if base is None:
            base = _common(real, self._cwd)
            in_zip = self._ceiling is None or _below(real, self._ceiling) is not None
            if base is None or not self.is_proper(base) or not in_zip:
                return f"outside of the project {self._cwd}"
        parts = real.relative_to(base).parts
        if any(_NEVER.fullmatch(part) for part in parts):
            return "part of version control or of keys"
        if not (inside and self.is_proper(base)) and any(part[0] == "." for part in parts):
            return "in a hidden directory, or hidden itself"
        return self._folder(real.parent if parts else real, base)

    def _folder(self, folder: Path, base: Path) -> str:
        """Say what a directory is that nothing may be taken from; remembered, as many are alike."""
        known = self._folders.get((folder, base))
        if known is None:
            known = "in the data directory of a farm" if _is_farm(folder) else ""
            top = folder.parts[1:2]
            if _SYSTEM_DIRS.intersection(top) and base.parts[1:2] != top:
                known = "the system's"
            known = known or (self._folder(folder.parent, base) if folder != base else "")
            self._folders[folder, base] = known
        return known


def _common(one: Path, other: Path) -> Path | None:
    """Return the directory that holds both; None on different disks of Windows."""
    with contextlib.suppress(ValueError):
        return Path(os.path.commonpath([one, other]))
    return None


def top_of(directory: Path, files: Iterable[Path]) -> Path:
    """Return the directory that one has in common with files, no home or top of a disk."""
    top, reach = real_path(directory), _Reach(directory)
    for file in files:
        common = _common(top, real_path(file).parent)
        top = common if common and reach.is_proper(common) else top
    return top


def is_shared(path: Path) -> bool:
    """Tell whether a file is one of those that systems have alike, such as fonts."""
    return real_path(path).as_posix().startswith(_SYSTEM_SHARED)


# --- finding files as POV-Ray does

_ABSOLUTE, _OWN = -1, -2  # places of what was found, when it is in no directory of the search


class _FoundFile(NamedTuple):
    local: Path  # what to read
    path: Path  # its name without "..", which is its place: the tree has no links
    place: int  # which directory of the search, or _ABSOLUTE, or _OWN for POV-Ray's own files


class _Search:
    """POV-Ray's search: the current directory, then the library path, for each name it tries."""

    def __init__(self, cwd: Path, library: Sequence[str], standard: Sequence[Path],
                 reach: _Reach, by_file: Collection[str]) -> None:
        self.cwd = cwd
        self.warnings: list[str] = []
        self.directories: list[Path | None] = [cwd]  # None stands for POV-Ray's own
        self._standard = [real_path(directory) for directory in standard]
        for name in library:
            directory = None if name == STANDARD else real_path(cwd / name)
            if directory in self._standard:
                directory = None
            why = "" if directory is None or name not in by_file else reach.forbids(directory)
            if directory is not None and not directory.is_dir():
                self.warnings.append(f"the library path '{name}' is not a directory")
            elif why:
                self.warnings.append(f"the library path '{name}' of an INI file is {why}, and not "
                                     f"searched unless you type +L{name}")
            elif directory not in self.directories:
                self.directories.append(directory)
                if directory is not None and name not in by_file:
                    reach.bases.append(directory)

    def find(self, kind: str, name: str, here_only: bool = False) -> _FoundFile | None:
        """Find a file by the name in a scene; ``kind`` tells the extensions that are tried."""
        if _is_absolute(name):
            local = Path(name)
            return (_FoundFile(local, real_path(local.parent) / local.name, _ABSOLUTE)
                    if is_file(local) else None)
        for candidate in _candidates(kind, name):
            bare = Path(candidate)
            for place, directory in enumerate(self.directories[:1 if here_only else None]):
                for folder in self._standard if directory is None else [directory]:
                    local = folder / candidate
                    if is_file(local):
                        path = Path(os.path.normpath(local))
                        return _FoundFile(local, path, _OWN if directory is None else place)
                if directory is None and not self._standard and candidate in _STANDARD_FILES:
                    return _FoundFile(bare, bare, _OWN)
            if kind == "ttf" and candidate in _FONTS:
                return _FoundFile(bare, bare, _OWN)
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
            if directory and (other := _other_case(directory, name)):
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


def _no_scene(search: _Search, scene: str, ini_dirs: Sequence[Path]) -> _FoundFile:
    hints = [f": it is beside its INI file, so do first: cd {directory}"
             for directory in ini_dirs if is_file(directory / scene)]
    beside = (search.cwd / scene.replace("\0", "")).parent
    here = sorted(path.name for path in beside.glob("*.[pP][oO][vV]"))
    hint = (hints or [search.hint(scene, search.cwd)])[-1] or (
        f": there is {_some(here)}" if here else ": give the scene's name")
    raise UserError(f"the scene '{scene}' is {search.places()}{hint}")


class _Tree:
    """Where everything lies for a worker: see the head of this section."""

    def __init__(self, search: _Search, root: Path) -> None:
        self.search, self.root = search, root
        # What has to keep its place to each directory of the search, and to the root.
        self._tops = [*search.directories, root]
        self._prefixes: list[tuple[str, str]] = []  # settled: a top, and what takes its place

    def hold(self, found: _FoundFile) -> None:
        """Let the tree reach up to what was found, so that its name leads there."""
        top = self._tops[max(found.place, 0)]
        if found.place >= 0 or not any(
                top and _below(found.path, top) is not None for top in self._tops):
            self._tops[max(found.place, 0)] = top and _common(top, found.path)

    def settle(self) -> None:
        """Fix where everything lies; nothing can be held from now on."""
        tops = [top for top in dict.fromkeys(self._tops) if top is not None]
        tops = [top for top in tops if not any(
            top != other and _below(top, other) is not None for other in tops)]
        main = next(top for top in tops if _below(self.search.cwd, top) is not None)
        for top in tops:
            place = f"_lib{len(self._prefixes) + (main in tops[tops.index(top):])}"
            while top != main and (main / place).exists():
                place += "_"
            text = str(top).rstrip(os.sep)
            self._prefixes.append((text, "" if top == main else f"{place}/"))

    def place(self, path: str) -> str:
        """Return where a file or directory lies in the tree that it belongs to, such as ``.``."""
        for top, prefix in self._prefixes:
            if path == top:
                return prefix.rstrip("/") or "."
            if path.startswith(top + os.sep):
                return prefix + path[len(top) + 1:].replace(os.sep, "/")
        raise UserError(f"{path} is outside of the project: give a --root that holds both")

    @property
    def run_dir(self) -> str:
        """The place of the current directory."""
        return self.place(str(self.search.cwd))

    @property
    def library(self) -> list[str]:
        """The places of the library directories."""
        return [STANDARD if directory is None else self.place(str(directory))
                for directory in self.search.directories[1:]]

    def name_of(self, path: Path) -> str:
        """Return by what name POV-Ray finds a file or directory, whatever was its name before."""
        return os.path.relpath(self.place(str(path)), self.run_dir).replace(os.sep, "/")


def _below(path: Path, base: Path) -> str | None:
    return path.relative_to(base).as_posix() if path == base or base in path.parents else None


# --- reading scenes

class _Event(NamedTuple):
    """Something in a scene: a file's name by its kind, or ``uses`` of a feature."""

    at: int
    kind: str
    name: str
    certain: bool  # not between #if, #macro and the like and their #end


# A string without its closing quote reaches to the end, so that nothing is tried twice.
_TOKEN = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*("?)|//[^\r\n]*|/\*|#\s*[a-z]+|[A-Za-z_]\w*|[][{}()]', re.DOTALL)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_VERSION = re.compile(r"#\s*version\s+(\d+\.\d+)\s*;")


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Yield the words, strings and brackets of a scene with their positions, without comments."""
    at, depth = 0, 0  # depth of /* */ comments, which nest
    while match := (_COMMENT_EDGE if depth else _TOKEN).search(text, at):
        at, token = match.end(), match[0]
        if token in ("/*", "*/"):
            depth += 1 if token == "/*" else -1
        elif token[0] == "#":
            yield match.start(), "#" + token[1:].lstrip()
        elif token[0] == '"' and not match[1]:
            return  # it is not closed, and POV-Ray reads no further
        elif token[:2] != "//":
            yield match.start(), token


def _events(text: str) -> Iterator[_Event]:
    """Yield what a scene says about files and features."""
    before, last, opened = "", "", None
    depth, blocks = 0, [False]  # of {}: whether they are in global_settings
    for at, token in _tokens(text):
        if token[0] == '"':
            event = _Event(at, _event_kind(before, last), _literal(token), depth == 0)
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
            if last == "radiosity" or (last == "photons" and blocks[-1]):
                yield _Event(at, "uses", last, depth == 0)
            blocks.append(blocks[-1] or last == "global_settings")
        elif token == "}" and len(blocks) > 1:
            blocks.pop()
        before, last = last, token


def _event_kind(before: str, last: str) -> str:
    """Tell what a string is by the two tokens before it."""
    if last in _FILE_WORDS or last == "ttf":
        return "write" if last == "save_file" else last
    if last == "{" and before in _IMAGE_BLOCKS:
        return "guess"
    return "concat" if (before, last) == ("concat", "(") else "string"


class _Scan:
    """Follows a scene through its includes and finds the files that they name.

    Only names written out are seen: what ``concat(...)`` or a variable make is
    not known until POV-Ray runs, but any string that is the name of a file or
    directory takes that along, and any that begins the names of files in a
    directory takes those. What stands between ``#if``, ``#macro`` and the like
    and their ``#end`` may never be reached: what is missing there is a warning.
    """

    def __init__(self, tree: _Tree, renders: _Renders, reach: _Reach,
                 listing: _Listing | None) -> None:
        self.files: dict[str, tuple[Path, bool]] = {}  # by path: what to read, certainly needed
        self.passed: dict[str, None] = {}  # directories that names lead through with ".."
        self.system: dict[str, None] = {}  # files of the system's, read where they are
        self.uses: set[str] = set()
        self.reads: set[_Name] = set()
        self.warnings: list[str] = []
        self.garbled: dict[str, Path] = {}  # by name: files that POV-Ray looks for under another
        self.folders: set[str] = set()  # that are named, or that files are named in
        self._tree = tree
        self._search = tree.search
        self._renders = renders
        self._reach = reach
        self._listing = listing
        self._waiting: tuple[list[Path], list[Path]] = ([], [])  # perhaps and certainly needed
        self._strings: dict[str, dict[str, None]] = {}  # and the files in which they stand
        self._absolute: dict[str, dict[str, tuple[Path, str]]] = {}  # by file: names, what they are
        self.written: dict[str, bool] = {}  # by name: certainly
        self._texts: list[Path] = []  # what was read
        self._writers: dict[Path, set[bytes]] = {}  # the macros of POV-Ray's own files that write
        self._lost: dict[str, tuple[str, bool]] = {}  # by name: what to say, certainly needed

    def run(self, scene: _FoundFile, values: Mapping[str, str], also: Iterable[str]) -> None:
        """Scan everything from the scene on."""
        self._take(scene, True, True)
        self._note_version(scene.local)
        if header := values.get("Include_Header", ""):
            self._refer("#include", header, None, 0, True)
        samples = values.get("Radiosity_File_Name", "object.rca")
        if values.get("Radiosity_From_File") == "On" and is_file(self._search.cwd / samples):
            self._refer("load_file", samples, None, 0, True)
        for name in also:
            # Where one is missed its neighbours will be, too: tex/t1.png, tex/t2.png.
            folder, _, file = name.rpartition("/")
            start = re.match(r"\D*", file)
            self._strings.update({name: {}, f"{folder or '.'}/{start[0] if start else ''}": {}})
        seen: set[Path] = set()
        tried = 0
        while any(self._waiting):
            # What is certain comes first, so that no file need be read twice.
            certain = bool(self._waiting[True])
            path = self._waiting[certain].pop()
            if path not in seen:
                seen.add(path)
                self._read(path, certain)
            if not any(self._waiting):
                for name, readers in list(self._strings.items())[tried:]:
                    self._try_string(name, readers)
                    tried += 1
        # Whether the scene may write a file, or read an image whose name is not a string.
        words = [re.escape(word) for macros in self._writers.values() for word in macros]
        writes = re.compile(b"|".join([_WRITES.pattern, *words]))
        if any(writes.search(path.read_bytes()) for path in self._texts):
            self._trace()

    def _note_version(self, scene: Path) -> None:
        with contextlib.suppress(OSError), open(scene, "rb") as file:
            text = file.read(BUFFER).decode("latin-1")
            at, _ = next(_tokens(text), (0, ""))  # it has to stand first
            asked = _VERSION.match(text, at)
            if asked and release(asked[1]) > release(OLDEST):
                self.uses.add(f"povray {asked[1]} #version {asked[1]}")

    def text(self, path: str, local: Path) -> Path | bytes:
        """Return a file, or what it says when it names others of the tree by their whole paths."""
        if not (names := self.new_names(path)):
            return local
        data = local.read_bytes()
        for old, new in names.items():
            for charset in ("utf-8", "latin-1"):  # the scene's is one of them
                with contextlib.suppress(UnicodeEncodeError):
                    data = data.replace(f'"{old}"'.encode(charset), f'"{new}"'.encode(charset))
        return data

    def new_names(self, reader: str) -> dict[str, str]:
        """Return what a file has to say instead of whole paths; "" is the command line."""
        return {name: self._tree.name_of(path) + rest
                for name, (path, rest) in self._absolute.get(reader, {}).items()}

    def explain(self, name: str) -> tuple[bool, str]:
        """Say why a file that POV-Ray missed was not sent; True if it could be."""
        tried = (self._search.find(kind, name) for kind in ("string", *_EXTENSIONS_TRIED))
        found = next(filter(None, tried), None)
        if found is None:
            hint = self._search.hint(name, self._search.cwd)
            also = " here, either" if self._listing else ""
            return False, f"'{name}' is {self._search.places()}{also}{hint}"
        if found.place == _OWN:
            return False, f"'{name}' is POV-Ray's own here, and that computer's has none"
        if why := self._reach.forbids(found.local):
            return False, (f"{found.path} is here but was not sent, because it is {why}: copy it "
                           "into the project, or name its directory with --root or +L")
        if self._listing is None:
            return False, f"{found.path} is " + (
                "hidden from scenes: name its directory with +L, or let them read everything "
                "with --unconfined" if os.access(found.local, os.R_OK)
                else "here, and you may not read it")
        if str(found.path) in {*self.files, *self._listing.members}:
            return False, f"{found.path} is here and was sent"
        return True, (f"{found.path} is here but was not sent, because the scene does not name it "
                      f"and {self._listing.why_not(found.path)}")

    def _take(self, found: _FoundFile, certain: bool, follow: bool) -> None:
        path = str(found.path)
        certain = certain or self.files.get(path, (path, False))[1]
        self.files[path] = (found.local, certain)
        if follow:
            self._waiting[certain].append(found.local)

    def _accept(self, found: _FoundFile, name: str, certain: bool, readers: Iterable[str],
                follow: bool) -> str:
        """Take along what a name leads to; return as what it has to stay, or nothing."""
        if found.place == _OWN:
            return ""
        why = self._reach.forbids(found.local)
        if why and found.place == _ABSOLUTE and is_shared(found.local):
            self.system[str(found.local)] = None
            if follow:
                self._waiting[certain].append(found.local)
            return ""
        if not why:
            self._take(found, certain, follow)
            self._lead(found, name, "", readers)
            if not name.isascii() and found.place != _ABSOLUTE:
                self.garbled[str(PurePosixPath(name).with_name(found.local.name))] = found.local
        return why

    def _lead(self, found: _FoundFile, name: str, rest: str, readers: Iterable[str]) -> None:
        """Let a name lead to its place in the tree: to what was found, and a ``rest`` behind it."""
        self._tree.hold(found)
        if found.place == _ABSOLUTE:
            for reader in readers:
                self._absolute.setdefault(reader, {})[name] = (found.path, rest)
            return
        # The directories that it goes through only to leave them again have to be there.
        start, parts = self._search.directories[found.place] or Path(), name.split("/")
        for number in [number for number, part in enumerate(parts) if part == ".."]:
            path = Path(os.path.normpath(start.joinpath(*parts[:number])))
            if _below(start, path) is None:
                self._tree.hold(_FoundFile(path, path, found.place))
                self.passed[str(path)] = None

    def _read(self, path: Path, certain: bool) -> None:
        try:
            data = path.read_bytes()
        except OSError:
            return  # the manifest will tell, or POV-Ray
        if len(data) > 1 << 20 and not any(
                word in data for word in (b'"', b"radiosity", b"photons")):
            return  # such as a mesh of many megabytes
        self._texts.append(path)
        text, reader = _decoded(data), os.path.normpath(path)
        line, at = 1, 0
        for event in _events(text):
            self.folders |= {event.name, event.name.rpartition("/")[0]}
            if event.kind == "uses":
                self.uses.add(event.name)
                continue
            if event.kind == "write":
                name = os.path.normpath(event.name)
                self.written[name] = self.written.get(name, False) or (certain and event.certain)
                continue
            if self._renders.has(event.name) or (
                    event.kind == "concat" and self._renders.counts_from(event.name)):
                self.uses.add("own-output")
            if event.kind in ("string", "concat"):
                self._strings.setdefault(event.name, {})[reader] = None
                continue
            line, at = line + text.count("\n", at, event.at), event.at
            self._refer(event.kind, event.name, path, line, certain and event.certain)

    def _look_into(self, own: Path) -> None:
        """Note which macros of one of POV-Ray's own files write."""
        _, *parts = _MACRO.split(own.read_bytes())
        bodies = dict(zip(parts[::2], parts[1::2]))
        writes, writers = _WRITES, self._writers.setdefault(own, set())
        while calling := {name for name, body in bodies.items() if writes.search(body)} - writers:
            writes = re.compile(rb"\b(?:%s)\b" % b"|".join(calling))
            writers |= calling

    def _trace(self) -> None:
        """Find what the scene reads or appends to that it may have written."""
        flow = _Flow()
        for path in (*self._texts, *(path for path, macros in self._writers.items() if macros)):
            flow.read(_decoded(path.read_bytes()))
        uses = flow.live()
        written = {name for how, one in uses if how in _WRITING for name in flow.names(one)}
        for folder in self._search.directories:  # what is written there is found there, too
            place = f"{_below(folder, self._search.cwd)}/" if folder else "/"
            written |= {name._replace(text=name.text[len(place):]) for name in written
                        if name.text.startswith(place)}
        read = {(how, name) for how, one in uses if how not in ("write", "save_file")
                for name in flow.names(one)}
        tried = set()
        for how, name in read:
            if how == "append":
                self._append(name)
            elif how != "#include" and (self._renders.has(name.text) if name.whole
                                        else self._renders.counts_from(name.text)):
                self.uses.add("own-output")
            tried |= {name._replace(text=text) for text in (
                _candidates(how, name.text) if name.whole else [name.text])}
        most = _MANY**2 // max(len(written), len(tried), _MANY)
        (whole, patterns), (exact, vague) = (
            _whole_and_not(names, most) for names in (written, tried))
        if exact & whole:
            self.uses |= {"own-output", "own-files"}
        self.reads |= {name for name in exact - whole if any(map(name.may_be, patterns))}
        self.reads |= {name for name in vague if any(map(name.may_be, whole | patterns))}

    def _append(self, name: _Name) -> None:
        """Take the file along, for the run's own directory, that the scene appends to."""
        for read in _garbled(name.text):
            self.uses.add(f"append {read}" if name.whole else f"appends {read}")
            if name.whole and (found := self._search.find("string", read, here_only=True)):
                self._accept(found, read, True, [], False)

    def _refer(self, kind: str, name: str, path: Path | None, line: int, certain: bool) -> None:
        here, absolute, include = kind == "load_file", _is_absolute(name), kind == "#include"
        # What POV-Ray looks for in its own directory only has no other place on other computers.
        found = None if here and absolute else self._search.find(kind, name, here_only=here)
        reader = os.path.normpath(path) if path else ""
        why = self._accept(found, name, certain, [reader], include) if found else ""
        if found and not why:
            if here and path:
                self.uses.add(f"{kind} {name}")
            if found.place == _OWN and include and found.local not in self._writers:
                with contextlib.suppress(OSError):
                    self._look_into(found.local)
            return
        where = f"{_below(path, self._search.cwd) or path}:{line}" if path else "the command line"
        beside = path.parent if path else self._search.cwd
        if absolute:
            why = ("which other computers do not have there: copy it into the project, or "
                   "leave its directory out and give that with +L")
        elif found:
            why = (f"which is {why}: copy it into the project, or give a --root that holds both, "
                   "or its directory with +L")
        else:
            # To look for what is meant takes time by the number of files here.
            hint = self._search.hint(name, beside) if len(self._lost) < 100 else ""
            why = f"which is {self._search.places()}{hint}"
        problem = f"{where} {'includes' if include else 'reads'} '{name}', {why}"
        self._lost.setdefault(name, (problem, certain))  # what is certain comes first

    def _try_string(self, name: str, readers: Iterable[str]) -> None:
        """Take along what any string happens to name, or to begin the names of."""
        suffix = PurePosixPath(name).suffix.lower()
        found = self._search.find("string", name) if suffix or "/" in name else None
        if found:
            self._accept(found, name, False, readers, suffix in (".inc", ".pov"))
        elif self._listing and ("/" in name or name[:1] == "."):
            for place, directory in enumerate(self._search.directories):
                if directory is not None:
                    self._mention(self._listing, place, directory, name, readers)

    def _mention(self, listing: _Listing, place: int, directory: Path, name: str,
                 readers: Iterable[str]) -> None:
        """Take along a directory that a string names, or what it begins the names of there."""
        whole = directory / name
        folder, start = (whole, "") if is_directory(whole) else (whole.parent, whole.name)
        path = Path(os.path.normpath(folder))
        if not is_directory(folder) or (start and name[-1] == "/"):
            return
        if (start or _below(self._search.cwd, path) is None) and not self._reach.forbids(path):
            listing.mention(path, start)
            self._lead(_FoundFile(path, path, _ABSOLUTE if _is_absolute(name) else place), name,
                       f"/{start}" if start or name[-1] == "/" else "", readers)

    def check(self) -> None:
        """Raise ``UserError`` for files that the scene names and that are not there."""
        wrong = {}
        for name, (problem, certain) in self._lost.items():
            if self._renders.has(name) or os.path.normpath(name) in self.written:
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


class _Name(NamedTuple):
    """What a scene gives as a file's name: a text, or what it begins and ends with.

    A ``variable`` stands before the text for what it may hold.
    """

    text: str
    whole: bool
    end: str = ""
    variable: str = ""

    def may_be(self, other: _Name) -> bool:
        """Tell whether both may be of the same file."""
        if self.whole and other.whole:
            return self.text == other.text
        if self.whole or other.whole:
            one, pattern = (self, other) if self.whole else (other, self)
            return one.text.startswith(pattern.text) and one.text.endswith(pattern.end)
        starts, ends = sorted([self.text, other.text]), sorted([self.end, other.end], key=len)
        return starts[1].startswith(starts[0]) and ends[1].endswith(ends[0])


_WRITING = frozenset(["write", "append", "save_file"])
_WRITES = re.compile(rb"#\s*fopen|save_file|\b(?:exr|gif|hdr|jpeg|png|ppm|tga|tiff)\s+[A-Za-z_]")
_MACRO = re.compile(rb"#\s*macro\s+(\w+)")
_BRANCHES = frozenset(["#else", "#elseif", "#case", "#range", "#default"])
_STRING_FUNCTIONS = frozenset(["str", "vstr", "chr", "strlwr", "strupr", "substr", "datetime"])
_MANY = 1000  # names, beyond which any name may be meant
_UNKNOWN = _Name("", False)


class _Flow:
    """Which files a scene reads that it has written itself, as far as its text tells.

    A name is a string, begins with one (``concat("a", ...)``), or is a
    variable, which may hold whatever is declared under that name anywhere, and
    a macro's parameter whatever any call of that macro is given. Macros that
    nobody calls do not count, nor does what is read after the same block has
    written it: that is of the same frame.
    """

    def __init__(self) -> None:
        self._uses: set[tuple[str, str, _Name]] = set()  # in which macro, what is done with a file
        # Of a variable; and, by its name and a blank, what a macro is given.
        self._values: dict[str, set[_Name]] = collections.defaultdict(set)
        self._takers: dict[str, set[str]] = {}  # the macros with this parameter
        self._mentions: dict[str, set[str]] = {"": set()}  # the words in each macro, and outside
        # Of the file that is read:
        self._words: list[str] = []
        self._concats: dict[int, _Name] = {}
        self._macros = [(0, "")]  # that are open, with the number of blocks
        self._declared: collections.Counter[str] = collections.Counter()
        # What was written and is still open to be read; and what of it in each block that is open.
        self._fresh: set[tuple[_Name, int]] = set()
        self._blocks: list[set[tuple[_Name, int]]] = []
        self._looked = 0  # at values, for all names together

    def read(self, text: str) -> None:
        """Take in one file."""
        self._words = words = [sys.intern(token) for _, token in _tokens(text)] + [""] * 3
        self._concats, self._macros = _concats(words), [(0, "")]
        self._fresh, self._blocks = set(), [set()]
        self._declared.clear()
        calls = [""]
        for index, word in enumerate(words):
            if word in _BLOCK_STARTS or word in _BRANCHES or word == "#end":
                self._turn(index)
            elif word in ("#declare", "#local"):
                self._declare(index + 1)
            elif word == "(":
                call = words[index - 1]
                calls.append(call if call == "#read" or self._name(index - 1) else calls[-1])
            elif word == ")":
                del calls[max(len(calls) - 1, 1):]
            elif calls[-1] and (given := self._name(index)):
                if calls[-1] == "#read":  # whatever is in that file
                    self._values[word].add(_UNKNOWN)
                self._values[f"{calls[-1]} "].add(given)
            self._mentions[self._macros[-1][1]].add(word)
            how, start = _file_use(words, index)
            if how and (name := self._name(start)):
                self._use(how, name)

    def _use(self, how: str, name: _Name) -> None:
        written = name, self._declared[name.variable.rpartition(" ")[2]]
        own = name.whole and written in self._fresh
        if how in _WRITING or not own:
            # To append to what the same block has written is no more than to write.
            self._uses.add((self._macros[-1][1], "write" if own else how, name))
        if how == "write" and not own:
            self._fresh.add(written)
            self._blocks[-1].add(written)

    def _name(self, index: int) -> _Name | None:
        """Read the beginning of an expression that may be a file's name."""
        name, macro = _expression(self._words, index, self._concats), self._macros[-1][1]
        if name and macro in self._takers.get(name.variable, ()):  # two words for a parameter
            return name._replace(variable=f"{macro} {name.variable}")
        return name

    def _turn(self, index: int) -> None:
        """Begin or end a block between words like #if and #end, or go on in another branch."""
        word, macro = self._words[index:index + 2]
        if word == "#end" and self._macros[-1][0] == len(self._blocks):
            self._macros.pop()
        if word not in _BLOCK_STARTS and len(self._blocks) > 1:
            self._fresh -= self._blocks.pop()
        if word != "#end":
            self._blocks.append(set())
        if word == "#macro":
            self._macros.append((len(self._blocks), macro))
            self._mentions.setdefault(macro, set())
            for name in _up_to(")#", self._words, index + 3):
                self._takers.setdefault(name, set()).add(macro)

    def _declare(self, index: int) -> None:
        words, variable = self._words, self._words[index]
        self._declared[variable] += 1
        index += 1
        while words[index] == "[":
            index += len(_up_to("]#", words, index))
            index += words[index] == "]"
        inside = [self._name(index)]
        if words[index] == "array":
            inside = [_Name(_literal(word), True) for word in _up_to("#", words, index)
                      if word[:1] == '"']
        self._values[variable].update(filter(None, inside))

    def live(self) -> set[tuple[str, _Name]]:
        """Return how the scene uses files, and which, without the macros that nobody calls.

        That is ``read``, ``write``, ``append`` or another word before a name.
        """
        reached, open_ = {""}, [""]
        while open_:
            called = {word for word in self._mentions[open_.pop()]
                      if word in self._mentions} - reached
            reached |= called
            open_ += called
        return {(how, name) for macro, how, name in self._uses if macro in reached}

    def names(self, name: _Name) -> set[_Name]:
        """Return the names that a file may have, which are no variables any more."""
        found: set[_Name] = set()
        seen: set[_Name] = set()
        open_ = [name]
        while open_:
            one = open_.pop()
            if one in seen:
                continue
            seen.add(one)
            if not one.variable:
                path = one.text and os.path.normcase(os.path.normpath(one.text))
                found.add(one._replace(text=path))
            macro, _, variable = one.variable.rpartition(" ")
            for values in (self._values.get(variable, ()), self._values.get(f"{macro} ", ())):
                self._looked += len(values)
                if len(open_) + len(seen) + len(values) > _MANY or self._looked > 50 * _MANY:
                    return {_UNKNOWN}
                open_ += [value if one.whole else value._replace(whole=False, end=one.end)
                          for value in values]
        if not found and " " not in name.variable:
            return {_UNKNOWN}
        return found - {_Name("", True)}  # no name opens no file


def _whole_and_not(names: set[_Name], most: int) -> tuple[set[_Name], set[_Name]]:
    """Separate whole names from those that are not; more than ``most`` of these are any name."""
    whole = {name for name in names if name.whole}
    vague = names - whole
    return whole, {_UNKNOWN} if len(vague) > most else vague


def _literal(word: str) -> str:
    return word[1:-1].replace('\\"', '"')  # no other escape counts in a file's name


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _up_to(marks: str, words: Sequence[str], index: int) -> Sequence[str]:
    """Return the words from one on, up to the first that begins with a mark, or the end ("")."""
    end = index
    while words[end][:1] not in marks:
        end += 1
    return words[index:end]


def _concats(words: Sequence[str]) -> dict[int, _Name]:
    """Return what each ``concat(...)`` begins and ends with; from behind, as the inner counts."""
    found: dict[int, _Name] = {}
    closing: list[int] = []
    end = 0
    for index in range(len(words) - 4, -1, -1):
        if words[index] == ")":
            closing.append(index)
        elif words[index] == "(":
            end = closing.pop() if closing else 0
        elif words[index] == "concat":
            last = words[end - 1] if words[index + 1] == "(" else ""
            first = _expression(words, index + 2, found) or _UNKNOWN
            found[index] = first._replace(
                whole=False, end=_literal(last) if last[:1] == '"' else "")
    return found


def _expression(words: Sequence[str], index: int, concats: Mapping[int, _Name]) -> _Name | None:
    word = words[index]
    if word[:1] == '"':
        return _Name(_literal(word), True)
    if word == "concat":
        return concats[index]
    if word in _STRING_FUNCTIONS:
        return _UNKNOWN
    return _Name("", True, variable=word) if word[:1].isalpha() or word[:1] == "_" else None


def _file_use(words: Sequence[str], index: int) -> tuple[str, int]:
    """Return what is done with a file at a word, and where its name stands; or nothing."""
    word = words[index]
    if word == "#fopen":
        modes = [word for word in _up_to("#", words, index + 1)
                 if word in ("read", "write", "append")]
        return (modes or [""])[0], index + 2
    if word == "file_exists":
        return "read", index + 2
    if word == "{" and words[index - 1] in _IMAGE_BLOCKS and words[index + 1][:1] in ('"', "c"):
        return "guess", index + 1
    return (word, index + 1) if word in _FILE_WORDS else ("", 0)


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
    """The images that the job makes."""

    def __init__(self, outputs: Iterable[Path]) -> None:
        self.paths = {os.path.normpath(path) for path in outputs}
        self._names = {Path(path).name for path in self.paths}
        stems = (PurePosixPath(name).stem for name in self._names)
        self._starts = {stem[:end] for stem in stems
                        for end in range(max(len(stem.rstrip("0123456789")), 1), len(stem))}

    def has(self, name: str) -> bool:
        """Tell whether a name in a scene is, directories apart, one of the images."""
        return PurePosixPath(name).name in self._names

    def counts_from(self, start: str) -> bool:
        """Tell whether an image is called ``start`` and a number."""
        return PurePosixPath(start).name in self._starts


MAX_FOLDERS = 300  # that a render in place makes for its scene to write in, named ones apart


def _folders(root: Path) -> list[Path]:
    """Return a directory and those below it, the nearest first; not what links lead to."""
    found = [root]
    for folder in found:
        with contextlib.suppress(OSError), os.scandir(folder) as inside:
            found += [Path(item.path) for item in inside if item.is_dir(follow_symlinks=False)]
        if len(found) >= MAX_FOLDERS:
            break
    return found[:MAX_FOLDERS]


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
    """The files that are sent although the scene does not name them.

    Those are what lies below the project's directory and the library
    directories, and what strings in the scene mention. ``.bsac`` files say
    which, as in BSAC: lines ``Include`` and ``Exclude``
    begin a section, each other line is a name or wildcard of files or
    directories; what is excluded stays out whatever is included; a ``.bsac``
    file in a subdirectory adds its rules for what is below. ``if %f > N``
    makes the names after it, up to the next ``if``, ``endif`` or section, be
    needed by frames after N only. (Under ``Exclude`` such names stay, because
    the other frames need them.) Where no rule includes anything, everything
    goes but the job's own images, what is hidden, and what version control,
    systems and povfarm itself leave; an ``Include`` without wildcards takes even
    those.
    """

    def __init__(self, renders: _Renders, reach: _Reach,
                 made: Callable[[Path], bool] | None) -> None:
        self.members: dict[str, tuple[Path, float]] = {}  # by path, which may lead through links
        self.folders: dict[str, None] = {}  # that were looked through
        self._renders = renders
        self._reach = reach
        self._made = made
        self._large: dict[Path, str] = {}  # what was not looked through, and why
        self._unread: list[tuple[str, str]] = []
        self._links: list[str] = []
        self._odd: list[str] = []
        self._names: dict[Path, list[str]] = {}  # what is in directories, sorted

    def add_project(self, tree: _Tree, guarded: bool) -> None:
        """List the root, or the current directory where it holds the root, and the libraries."""
        cwd = tree.search.cwd
        above = guarded and cwd in tree.root.parents
        if not (above and self.add(cwd, True)):
            self.add(tree.root, guarded)
        for directory in tree.search.directories[1:]:
            if directory is not None:
                self.add(directory, True)

    def add(self, root: Path, guarded: bool) -> bool:
        """Take what lies below a directory; False, and nothing taken, when that is too much."""
        if str(root) in self.folders:
            return True
        members, folders = self.members, self.folders
        guarded = guarded and not is_file(root / ".bsac")
        self.members, self.folders = {}, {}
        if guarded and not self._reach.is_proper(root):
            self._large[root] = "is no project's own directory"
        elif not self._walk(root, guarded):
            self._large[root] = f"holds more than {GUARD_FILES} files or {format_size(GUARD_SIZE)}"
        else:
            members.update(self.members)
            folders.update(self.folders)
        self.members, self.folders = members, folders
        return root not in self._large

    def mention(self, folder: Path, start: str) -> None:
        """Take what is in a directory and begins with ``start``, hidden or not."""
        if str(folder) in self.folders and not _JUNK.fullmatch(f"{start}x"):
            return  # it is there already, or a .bsac file has left it out
        if not start:
            self.add(folder, True)
            return
        if folder not in self._names:
            with contextlib.suppress(OSError):
                self._names[folder] = sorted(path.name for path in folder.iterdir())
        names = self._names.get(folder, [])
        first = bisect.bisect_left(names, start)
        for name in itertools.takewhile(lambda name: name.startswith(start), names[first:]):
            path = folder / name
            if not _is_portable(name) or self._reach.forbids(path):
                continue
            if path.is_file() and str(path) not in self._renders.paths:
                self.members[str(path)] = (path, _EVERY_FRAME)
            elif path.is_dir() and not any(path in (base, *base.parents)
                                           for base in self._reach.bases):
                self.add(path, True)

    def why_not(self, path: Path) -> str:
        """Say why a file that the scene does not name is not here."""
        folder = next((folder for folder in path.parents if folder in self._large), None)
        if folder:
            return f"{folder} {self._large[folder]}"
        if str(path) in self._renders.paths:
            return "it is an image that this job makes"
        if str(path.parent) in self.folders and not _JUNK.fullmatch(path.name):
            return "a .bsac file leaves it out"
        if any(str(folder) in self.folders for folder in path.parents):
            return "hidden files, and images that povfarm has made, are not sent"
        return "it is not below the scene's or the current directory"

    def warnings(self) -> list[str]:
        """Return what to say about files that are not sent."""
        texts = [f"{folder} is left out: {why}" for folder, why in self._unread]
        texts += [f"{folder} {why}, so only those of its files are sent that the scene names: "
                  f"choose others with --root or in {folder / '.bsac'}"
                  for folder, why in self._large.items()]
        if self._links:
            texts.append("links that lead out of the project or in a circle are not followed: "
                         + _some(self._links))
        if self._odd:
            texts.append("files whose names not every system can take are left out: "
                         + _some(repr(name) for name in self._odd))
        return texts

    def _walk(self, root: Path, guarded: bool) -> bool:
        folders = [_Folder(root, "", (), _NO_FRAME, (root.resolve(),))]
        size = 0
        while folders and len(self.members) <= MAX_FILES:
            folder = folders.pop()
            self.folders[str(folder.path)] = None
            try:
                with os.scandir(folder.path) as items:
                    inside = sorted(items, key=lambda item: item.name)
            except OSError as error:
                self._unread.append((str(folder.path), error.strerror or str(error)))
                continue
            rules = (*folder.rules, *_read_bsac(folder.path / ".bsac", folder.prefix))
            folder = folder._replace(rules=rules)
            for item in inside:
                with contextlib.suppress(OSError):
                    folders += self._look(item, folder)
                    if guarded and item.path in self.members:
                        size += item.stat().st_size
            if guarded and (len(self.members) > GUARD_FILES or size > GUARD_SIZE):
                return False
        return True

    def _look(self, item: os.DirEntry[str], folder: _Folder) -> list[_Folder]:
        """Take a file, or return a directory that is to be walked."""
        place = folder.prefix + item.name
        is_folder = item.is_dir()
        since = self._since(item, place, folder)
        if since is None:
            return []
        real = folder.real[-1] / item.name if is_folder else folder.path
        if item.is_symlink():
            real = real_path(item.path)
            round_about = is_folder and any(
                _below(one, real) is not None for one in folder.real)
            if round_about or self._reach.forbids(real):
                self._links.append(place)
                return []
        if not _is_portable(item.name):
            self._odd.append(place)
        elif is_folder and not _is_farm(Path(item.path)):
            return [_Folder(Path(item.path), place + "/", folder.rules, since,
                            (*folder.real, real))]
        elif item.is_file():
            listed = any(not rule.exclude for rule in folder.rules)
            if since < _NO_FRAME or not listed:
                self.members[item.path] = (Path(item.path), since if listed else _EVERY_FRAME)
        return []

    def _since(self, item: os.DirEntry[str], place: str, folder: _Folder) -> float | None:
        """Return from which frame on something is included by name; None to leave it out."""
        hits = [rule for rule in folder.rules if rule.matches(place)]
        if any(rule.exclude and rule.since == _EVERY_FRAME for rule in hits):
            return None
        hits = [rule for rule in hits if not rule.exclude]
        if _JUNK.fullmatch(item.name) or item.path in self._renders.paths or (
                self._made and item.name.endswith("-frames") and self._made(Path(item.path))):
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
    members: _Members, needed: Collection[str], cache: HashCache
) -> tuple[tuple[FileEntry, ...], list[str]]:
    """Hash the files; those that cannot be read and were not asked for are a warning."""
    entries, unread = [], []
    for path, (local, since) in sorted(members.items()):
        try:
            if isinstance(local, bytes):
                about: tuple[str, int, float] = hashlib.sha256(local).hexdigest(), len(local), 0
            else:
                now = local.stat()
                known = (str(local), now.st_size, now.st_mtime_ns)
                if known not in cache:
                    cache[known] = sha256_file(local)
                about = cache[known], now.st_size, now.st_mtime
        except OSError as error:
            if path in needed:
                raise UserError(f"{local!s} cannot be read: {error.strerror}") from None
            unread.append(path)
        else:
            after = None if since == _EVERY_FRAME else int(since)
            entries.append(_checked(FileEntry(path, *about, after)))
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


def _garbled(name: str) -> set[str]:
    """Return what POV-Ray 3.7 reads for a name, by the charset of the scene."""
    return {_as_povray_reads(name, charset) for charset in ("latin-1", "utf-8")}


def _checked(file: FileEntry) -> FileEntry:
    """Return ``file`` when each of its values is one that a file can have."""
    good = (
        isinstance(file.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", file.sha256) is not None
        and type(file.size) is int and 0 <= file.size < 1 << 63
        and type(file.mtime) in (int, float) and abs(file.mtime) < 1 << 63
        and (file.after_frame is None or type(file.after_frame) is int)
    )
    if not good:
        raise UserError(f"the manifest's values for {file.path!r} are wrong")
    _checked_path(file.path)
    return file


def _checked_path(path: Any) -> str:
    if not isinstance(path, str) or len(path) > 1000 or not _is_portable(path):
        raise UserError(f"{path!r} is not a name of a file inside a project")
    return path


def _some(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names for a message."""
    names = [*names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


class _Listed(io.FileIO):
    """A zip file of which no list is read that would take much memory: it comes in one piece."""

    most = MAX_LIST

    def read(self, size: int | None = -1, /) -> Any:
        """Read, but not so much; without a size only the end is asked for."""
        if size is not None and size > self.most:
            raise zipfile.BadZipFile("its list of files is too long")
        return super().read(size)


@contextlib.contextmanager
def _zip_of(path: Path, what: str = "", most: int = MAX_LIST) -> Iterator[zipfile.ZipFile]:
    """Open a zip file to read it; ``UserError`` when it is damaged or none."""
    try:
        with _Listed(path) as file:
            file.most = most
            archive = zipfile.ZipFile(cast(BinaryIO, file))
            yield archive
    except _BAD_ZIP as error:
        raise UserError(f"{what or path} is damaged or no zip file: {error}") from None


def _unpack(archive: zipfile.ZipFile, into: Path, packed_size: int) -> None:
    infos = archive.infolist()
    size = sum(info.file_size for info in infos)
    if len(infos) > MAX_FILES:
        raise UserError(f"it holds more than {MAX_FILES} files")
    if size > MAX_ZIP_SIZE or (size > 10**7 and size > MAX_RATIO * packed_size):
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


class Word(str, enum.Enum):
    """An enumeration whose members read as their values, as ``enum.StrEnum``'s (Python 3.11) do."""

    __str__ = str.__str__


class TaskState(Word):
    """Where a task (a frame, or a slice of one) stands."""

    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobState(Word):
    """Where a job stands; ``WAITING`` is a job whose files have not all come yet."""

    WAITING = "waiting"
    ACTIVE = "active"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkerState(Word):
    """Whether a worker may work here."""

    PENDING = "pending"
    ADMITTED = "admitted"
    REMOVED = "removed"


class AttemptState(Word):
    """How one try of a task on one worker stands or ended."""

    LIVE = "live"
    DONE = "done"
    KEPT = "kept"
    FAILED = "failed"
    EXPIRED = "expired"
    RELEASED = "released"
    LOST = "lost"
    VOID = "void"


# A task may be DONE from any unfinished state, and from FAILED: a good picture
# is never thrown away, however late it comes, unless somebody asks for another.
TRANSITIONS: frozenset[tuple[TaskState, TaskState]] = frozenset(
    (frm, TaskState(to)) for frm, others in {
        TaskState.QUEUED: "leased done cancelled", TaskState.LEASED: "queued done failed cancelled",
        TaskState.FAILED: "done queued", TaskState.CANCELLED: "queued",
        TaskState.DONE: "queued",
    }.items() for to in others.split())

JOB_TRANSITIONS: frozenset[tuple[JobState, JobState]] = frozenset(
    (frm, JobState(to)) for frm, others in {
        JobState.WAITING: "active paused cancelled",
        JobState.ACTIVE: "paused done failed cancelled",
        JobState.PAUSED: "waiting active done failed cancelled",
        JobState.FAILED: "active done", JobState.CANCELLED: "active waiting",
        JobState.DONE: "active",
    }.items() for to in others.split())

PAUSED_BY_HAND = "paused by hand"  # the reason that waits for a person, not for a mended scene
FINISHED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


class Wired:
    """A record that goes through JSON: its annotations say how.

    Texts, numbers, tuples, mappings by text, enumerations and other such records.
    What a value means, and which are too large, ``from_wire`` of the record checks.
    """

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: _to_json_form(value) for name, value in vars(self).items()
                if name in _hints(type(self))}


def fields_of(kind: Any, wire: Any) -> dict[str, Any]:
    """Return the fields of a record in its JSON form; ``UserError`` for what is not that.

    Those that are ``Optional`` may be missing: then they are empty.
    """
    given, found = wire if isinstance(wire, dict) else {}, {}
    for name, hint in _hints(kind).items():
        plain = _OF_JSON[schema_of(hint)["type"]]
        found[name] = plain() if _may_miss(hint) and name not in given else want(given, name, plain)
    return found


def _may_miss(hint: Any) -> bool:
    return typing.get_origin(hint) is Union


def _to_json_form(value: Any) -> Any:
    if isinstance(value, Wired):
        return value.to_wire()
    if isinstance(value, Mapping):
        return dict(value)
    return [*map(_to_json_form, value)] if isinstance(value, tuple) else value


_hints: Callable[[Any], Mapping[str, Any]] = functools.cache(typing.get_type_hints)


@functools.cache
def schema_of(kind: Any) -> Mapping[str, Any]:
    """Return the JSON schema of a record, or of what the annotations of one may name."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if _may_miss(kind):
        return schema_of(inner[0])
    if origin is tuple:
        return {"type": "array", "items": schema_of(inner[0])}
    if origin is not None:
        return {"type": "object", "additionalProperties": schema_of(inner[1])}
    if kind in _PLAIN:
        return _PLAIN[kind]
    if issubclass(kind, Word):
        return {"type": "string", "enum": [member.value for member in kind]}
    hints = _hints(kind)
    return {"type": "object", "required": [name for name in hints if not _may_miss(hints[name])],
            "properties": {name: schema_of(hint) for name, hint in hints.items()}}


_PLAIN: Mapping[Any, Mapping[str, Any]] = {
    str: {"type": "string"}, int: {"type": "integer"}, bool: {"type": "boolean"},
    float: {"type": "number"}, Any: {}}
_OF_JSON = {"array": list, "object": dict, "string": str, "integer": int, "boolean": bool}


@dataclass(frozen=True)
class PovJob(Wired):
    """What POV-Ray is told to do: a normalised command line over a project.

    ``run_dir`` is the directory, inside the project's tree, that POV-Ray's
    relative names start from; ``uses`` names what the scan of the scene found
    (see ``Project``), ``create_ini NAME\\nTEXT`` is the INI file to be written, and what
    begins with ``SENT`` is for who sent it.
    """

    values: Mapping[str, str]
    declares: tuple[str, ...]
    library: tuple[str, ...]
    run_dir: str
    uses: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, wire: Any) -> PovJob:
        """Read the JSON form; ``UserError`` when it has another shape or starts programs."""
        given = fields_of(cls, wire)
        values = given["values"]
        lists = {name: tuple(given[name]) for name in ("declares", "library", "uses")}
        texts = [*values, *values.values(), *itertools.chain(*lists.values())]
        if not all(isinstance(text, str) for text in texts):
            raise UserError("the job's POV-Ray options are not all texts")
        job = cls(**{**given, **lists})
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

    @functools.cached_property
    def options(self) -> PovOptions:
        """The same as the POV section's record, for frames, names and sizes."""
        return PovOptions(self.values, self.declares, self.library, (), ())

    @functools.cached_property
    def plan(self) -> FramePlan:
        """All frames of the command line, whichever of them the job has."""
        return plan_frames(self.options)

    @functools.cached_property
    def needs(self) -> tuple[str, str]:
        """The oldest POV-Ray that can render it and what it is needed for; nothing for any."""
        noted = [(match[1], match[2]) for match in map(_NEEDS.fullmatch, self.uses) if match]
        return max([*noted, needed_by(self.values)], key=lambda need: release(need[0]))

    def appends_to(self, name: str) -> bool:
        """Tell whether the scene may append to a file, which is not replaced then."""
        words = (use.partition(" ")[::2] for use in self.uses)
        return any(name == text if word == "append" else name.startswith(text)
                   for word, text in words if word in ("append", "appends"))

    @functools.cached_property
    def engine(self) -> str:
        """The program that renders it in POV-Ray's place, which a worker's owner has named."""
        named = (use[len(_BY_PROGRAM):] for use in self.uses if use.startswith(_BY_PROGRAM))
        return next(named, "")

    @property
    def arguments(self) -> dict[str, str]:
        """What such a program is given beside the scene, by the names of its placeholders."""
        found = (use.split(" ", 2) for use in self.uses if use.startswith("argument "))
        return {words[1]: words[2] for words in found if len(words) == 3}

    @property
    def width(self) -> int:
        """The width of its pictures, 0 where that is in the scene."""
        return 0 if self.engine else self.options.width

    @property
    def thread_safe(self) -> bool:
        """True when the picture does not depend on the number of threads.

        Radiosity samples and photons are gathered in an order that threads
        change (POV-Ray 3.7: two renders of one scene differ).
        """
        return not {"radiosity", "photons"} & set(self.uses)


_NEEDS = re.compile(r"povray (\d+\.\d+) (.+)")  # among ``uses``
SENT = "renderonline "
_BY_PROGRAM = "engine "  # begins one of ``uses``


@functools.lru_cache(maxsize=1024)
def pov_of(text: str) -> PovJob:
    """Read the JSON text of a job, which is looked at for every frame and with every lease."""
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
    ``frame_timeout`` is in seconds; 0 goes by the frames that are done. The frames in ``first``
    are handed out before others, all in this ``order``, ``batch`` at a time; 0 for as many as suit.
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
    first: str = ""
    order: str = "forward"
    batch: int = 0

    def changed(self, changes: Mapping[str, Any]) -> JobOptions:
        """Return a copy with ``changes``; ``UserError`` for a bad name or value."""
        clean: dict[str, Any] = {name: str(value) if isinstance(getattr(self, name, None), str)
                                 else value for name, value in changes.items()}
        return replace(self, **checked(clean, JOB_OPTIONS))


# The rows of SETTINGS that say how the farm treats a job, by the names of JobOptions' fields.
JOB_OPTIONS: Mapping[str, Setting] = {
    {"retries": "retry_limit", "povray-version": "povray"}.get(
        row.name, row.name.replace("-", "_")): row
    for row in SETTINGS if "set" in row.commands.split()}


def checked(values: Mapping[str, Any], rows: Mapping[str, Setting]) -> dict[str, Any]:
    """Return values that such rows take; ``UserError`` for a bad name or value."""
    for name, value in values.items():
        if name not in rows or not rows[name].takes(value):
            raise UserError(f"'{name}={value}' cannot be set: there are {', '.join(rows)}")
    return dict(values)


class Role(Word):
    """What a person or a program may do that has a secret of its own."""

    USER = "user"
    VIEWER = "viewer"
    SUBMIT = "submit"


ADMIN = "admin"  # the name of whoever has the farm key; nobody else may have it,
_NOT_NAMES = frozenset({ADMIN, "farm", "browser", "guest", "nobody"})  # nor one of these


@dataclass(frozen=True)
class Allowance:
    """What one person may have at a time; 0 is no limit, but of the priority. ``space`` in bytes.

    ``jobs`` and ``frames`` are those that are not finished, ``workers`` those that render for it.
    """

    jobs: int = 0
    frames: int = 0
    priority: int = 0
    workers: int = 0
    space: int = 0


# The rows of SETTINGS that are limits of a person, by the names of Allowance's fields.
ALLOWANCES: Mapping[str, Setting] = {
    row.name[:-len("-limit")]: row for row in SETTINGS if row.name.endswith("-limit")}
BOUNDLESS = Allowance(priority=1000)


def person_name(text: str) -> str:
    """Return the name of a person as it is kept; ``UserError`` for what is none."""
    name = unicodedata.normalize("NFC", text.strip())
    if not re.fullmatch(r"[^\W_][\w.-]{0,39}", name):
        raise UserError(f"{text[:60]!r} cannot be a name: write one word of letters, digits, "
                        "dots and dashes, 40 at most")
    if name.casefold() in _NOT_NAMES or re.fullmatch(r"w\d+", name.casefold()):
        raise UserError(f"'{name}' cannot be the name of a person: choose another one")
    return name


MAX_WORDS = 40  # that a worker says of its engines and tags, of 100 letters each


@dataclass(frozen=True)
class WorkerInfo(Wired):
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
        given = fields_of(cls, wire)
        info = cls(**{**given, "name": one_line(given["name"])[:100],
                      "system": one_line(given["system"])[:100], "tags": tuple(given["tags"])})
        texts = [*info.engines, *info.engines.values(), *info.tags]
        if not 1 <= info.cores <= 10_000 or not 0 <= info.memory < 2**60:
            raise UserError("a worker has one core or more, and a memory of some bytes")
        if len(texts) > MAX_WORDS or not all(
                isinstance(text, str) and len(text) <= 100 and text.isprintable()
                for text in texts):
            raise UserError(f"engines and tags of a worker are at most {MAX_WORDS} texts of 100 "
                            "letters")
        return info


def engine_fits(
    wanted: str, first: Mapping[str, str], engines: Mapping[str, str], least: str = ""
) -> bool:
    """Tell whether a worker's POV-Ray may render frames of a job.

    ``wanted`` is the job's option, ``first`` what the worker has that began the
    job, ``least`` the oldest version that can. What a worker does not know
    of itself fits everything, and so does 3.7 with 3.7.0.10: POV-Ray for
    Windows tells no more.
    """
    version = engines.get("povray", "")
    if version and release(version) < release(least):
        return False
    if wanted == "any":
        return True
    if wanted != "auto":
        first = {"povray": wanted}
    numbers = zip(*(re.split("[.-]", text) for text in (first.get("povray", ""), version)))
    alike = all(mine == theirs or not (mine and theirs) for mine, theirs in numbers)
    includes = {mapping.get("includes", "") for mapping in (first, engines)} - {""}
    return alike and len(includes) < 2


def unrenderable(pov: PovJob, povray: str) -> str:
    """Return why the POV-Ray of a version cannot render a job, or nothing; ``povray`` as chosen."""
    (since, word), chosen = pov.needs, release(povray)
    older = chosen and chosen < release(since)[:len(chosen)]
    return f"{word} needs POV-Ray {since}; this is {povray}" if older else ""


def unverifiable(pov: PovJob, options: JobOptions) -> str:
    """Return why two renders of a frame cannot be compared, or nothing."""
    if pov.engine:
        return f"{pov.engine} renders it, and not POV-Ray"
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


class Verdict(NamedTuple):
    """What becomes of an image of a frame that is compared, or looks wrong.

    ``keep`` says why it waits for another worker's; else it is accepted, and ``doubt`` tells of it.
    """

    keep: str = ""
    doubt: str = ""


# By how an image compares with those kept of its frame, and whether another worker could come next.
VERDICTS: Mapping[tuple[str, bool], Verdict] = {
    ("first", True): Verdict(keep="rendered, and waits for another worker to check it"),
    ("first", False): Verdict(doubt="not verified: there is no other worker"),
    ("differs", True): Verdict(keep="two workers made different pictures: a third decides"),
    ("differs", False): Verdict(
        doubt="not verified: all its pictures differ, and the last was taken"),
    ("again", True): Verdict(keep="rendered, and waits for another worker to check it"),
    ("again", False): Verdict(doubt="not verified: one worker rendered it twice"),
    ("same", True): Verdict(),
    ("same", False): Verdict(),
    ("odd", True): Verdict(keep="black, unlike its neighbours: rendered once more"),
}


def compared(by: Sequence[int], same: Sequence[bool], worker: int) -> str:
    """Return how an image compares with those kept, made ``by`` workers: which are the ``same``."""
    if not by:
        return "first"
    if not any(same):
        return "differs"
    return "again" if set(by) == {worker} else "same"


class TaskKind(Word):
    """What a task renders: a frame, rows of one, or what the slices of one share."""

    FRAME = "frame"
    SLICE = "slice"
    PASS = "pass"


@dataclass(frozen=True)
class TaskSpec(Wired):
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
        given = fields_of(cls, wire)
        task = cls(**{**given, "kind": kinds.get(given["kind"], TaskKind.FRAME)})
        safe_join(Path(), task.name)
        if (task.kind is not TaskKind.FRAME) != (0 <= task.top < task.bottom):
            raise UserError("the rows of a slice are not a part of the picture")
        return task


@dataclass(frozen=True)
class LeaseSpec(Wired):
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

    @classmethod
    def from_wire(cls, wire: Any) -> LeaseSpec:
        """Read the JSON form; ``UserError`` when it has another shape."""
        given = fields_of(cls, wire)
        shares = tuple(given["shares"])
        if not all(type(share) is int for share in shares):
            raise UserError("the passes of a lease are not tasks")
        return cls(**{**given, "tasks": tuple(map(TaskSpec.from_wire, given["tasks"])),
                      "pov": pov_of(json.dumps(given["pov"])), "shares": shares})


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


def lease_size(queued: int, slots: int, cost: Cost | None, runs: int = 0,
               longest: float = 10.0) -> int:
    """Return how many neighbouring frames one run of the renderer should get.

    ``queued`` frames are left for ``slots`` runs at a time; ``cost`` is the
    mean of the frames measured so far. Half of the fair share leaves something
    to even out with at the end, down to single frames. But the start of a
    process costs some 0.04 s of CPU: cheap frames come several to a run, shared
    among those that are free besides the ``runs`` under way, or among a quarter
    of all: they are soon done. No run should be longer than about 10 s, or the
    ``longest`` that others are to wait for their turn. While
    nothing is measured, the first of many frames come by one, two and three in
    turn: what begins together should not end together, or all that follows
    sleeps at the same time, too.
    """
    if cost is None:
        return 1 + runs % 3 if queued > 3 * slots and longest > 2 else 1
    share = math.ceil(queued / max(slots, 1))
    cheap = min(math.ceil(0.4 / max(cost.cpu, 0.001)),
                math.ceil(queued / max(slots - runs, slots // 4, 1)))
    long = max(int(longest / (cost.cpu + 0.25)), 1)  # POV-Ray sleeps so long between two frames
    return max(1, min(max(math.ceil(share / 2), cheap), long, queued))


def spans_of(first: str, frames: range) -> list[tuple[int, int]]:
    """Return the lowest and the highest frame of each span that is handed out before the next."""
    ends = [part.partition("-")[::2] for part in first.split(",") if part]
    return [*((int(low), int(high or low)) for low, high in ends), (frames[0], frames[-1])]


def next_place(order: str, low: int, high: int, job: int, dealt: int) -> int:
    """Return the frame from which on a job's next batch is looked for, when so many are dealt.

    ``spread`` shows soon what the whole is like: the first frame, the middle one, the quarters,
    and so on.
    """
    part = 0.0
    if order == "spread":
        part = int(f"{dealt:b}"[::-1], 2) / 2 ** dealt.bit_length()
    elif order == "random":
        part = random.Random(f"{job} {dealt}").random()
    return low + int(part * (high - low + 1))


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


# --- renderers of the settings file, for scenes that are one file

POVRAY = "povray"
UPLOADED, OUTPUT = "@uploaded_file", "@output"  # the scene, and how its pictures' names begin
FIRST, LAST, FORMAT = "start_frame", "end_frame", "output_format"
_ARGUMENT_TYPES = {kind: re.compile(pattern, re.ASCII) for kind, pattern in {
    "file": r"[a-zA-Z0-9_\-]+\.[a-zA-Z0-9]{1,4}", "path": r"(/[a-zA-Z0-9_\-]+)+/?",
    "extension": r"\.[a-zA-Z0-9]{1,4}", "word": r"\w+", "sentence": r"[a-zA-Z0-9\s,.!?'-]+",
    "natural": r"\d+", "integer": r"-?\d+", "real": r"-?\d+(\.\d+)?"}.items()}
_PLACEHOLDER = re.compile(r"\$RENDERONLINE:(@?\w+)", re.ASCII)
# An option of POV-Ray's whose beginning no client can choose, and that leads nowhere else.
_TEMPLATE_ITEM = re.compile(r"\$RENDERONLINE:@uploaded_file|[+-][A-Za-z]\S*|[A-Za-z_]+=\S*")
_LEADS_ELSEWHERE = re.compile(r"([+-]l|library_path=|include_ini=).*", re.IGNORECASE)
_PLAIN_VALUE = re.compile(r"[^\s;#'\"\x00-\x1f]{1,200}")  # POV-Ray takes no other for one word
# What clients call picture formats, and POV-Ray's letter.
_FORMATS = {"png": "N", "jpeg": "J", "jpg": "J", "bmp": "B", "hdr": "H", "tga": "T"}
NAMES_OF = {"N": "PNG", "J": "JPEG", "B": "BMP", "H": "HDR", "T": "TGA"}


@dataclass(frozen=True)
class OnlineEngine:
    """A renderer, the files with an ``extension`` that it takes, and the words that it is given.

    In these placeholders stand for what a client chooses, or a job. POV-Ray is one of them.
    """

    id: int
    name: str
    extension: str
    template: str

    @property
    def program(self) -> str:
        """The program: its path or name, which may stand before the words."""
        first = shlex.split(self.template)[0]
        return first if self._is_program(first) else self.name

    @property
    def words(self) -> list[str]:
        """The words that follow the program, one by one."""
        words = shlex.split(self.template)
        return words[self._is_program(words[0]):]

    @property
    def places(self) -> list[str]:
        """The names of the placeholders."""
        return _PLACEHOLDER.findall(self.template)

    def _is_program(self, word: str) -> bool:
        return Path(word).is_absolute() or word == self.name

    def arguments(self, values: Mapping[str, str]) -> list[str]:
        """Return the words for these values, no shell; ``UserError`` for what cannot be one."""
        for name in self.places:
            if name not in values:
                raise UserError(f"Argument {name} is missing.")
        for word in self.words:
            first = _PLACEHOLDER.match(word)
            if first and re.match(r"-(?!\d)", values[first[1]]):
                raise UserError(f"Argument {first[1]} cannot begin with a dash.")
        words = [_PLACEHOLDER.sub(lambda found: values[found[1]], word) for word in self.words]
        return words if self.name != POVRAY else [
            re.sub(r"(?i)^(\+F|Output_File_Type=)\.?(\w{3,4})$", lambda found: found[1]
                   + _FORMATS.get(found[2].lower(), found[2]), word) for word in words]

    def job(self, values: Mapping[str, str]) -> PovJob:
        """Return the job of one who chose these values; not for POV-Ray."""
        kind, own = values.get(FORMAT, "PNG"), set(self.places) & set(values)
        first = values[FIRST] if FIRST in own else "0"
        return program_job(
            self.name, values[UPLOADED],
            {"Initial_Frame": first, "Final_Frame": values[LAST] if LAST in own else first,
             "Output_File_Type": _FORMATS.get(kind.lstrip(".").lower(), kind)},
            PurePosixPath(values[UPLOADED]).stem,
            {name: values[name] for name in own - {FIRST, LAST, FORMAT} if name[0] != "@"})

    def values_in(self, words: Sequence[str]) -> dict[str, str] | None:
        """Return the values from which ``arguments`` makes these words; None if it never does."""
        values: dict[str, str] = {}
        for mine, word in zip(self.words, words):
            parts = _PLACEHOLDER.split(mine)  # every second one is a name
            found = re.fullmatch("(.+)".join(map(re.escape, parts[::2])), word)
            values.update(zip(parts[1::2], found.groups() if found else ()))
        with contextlib.suppress(UserError):
            return values if self.arguments(values) == list(words) else None
        return None


@dataclass(frozen=True)
class OnlineRules:
    """The engines, and the arguments by their names: the type, and what a value must match."""

    engines: tuple[OnlineEngine, ...]
    arguments: Mapping[str, tuple[str, re.Pattern[str]]]

    @classmethod
    def of(cls, lines: Iterable[tuple[str, str, str]], node: bool = False) -> OnlineRules:
        """Read lines of the settings file: name, text and place; a ``UserError`` names the place.

        They are ``engine NAME = .EXTENSION TEMPLATE`` and ``argument NAME = TYPE [REGEX]``. For a
        ``node`` the pictures may have any names, as it does not look for them.
        """
        engines: list[tuple[OnlineEngine, str]] = []
        arguments = {}
        for key, text, source in lines:
            what, _, name = key.partition(" ")
            first, _, rest = text.partition(" ")
            if what == "engine" and re.fullmatch(r"[A-Za-z][\w.-]{0,39}", name) and rest.strip():
                engine = OnlineEngine(len(engines) + 1, name, first, rest.strip())
                engines.append((engine, source))
            elif what == "argument" and re.fullmatch(r"\w+", name, re.ASCII):
                arguments[name] = first, _argument_type(first, rest.strip(), source)
            else:
                raise UserError(f"{source}: write 'engine NAME = .EXTENSION ARGUMENTS' or "
                                "'argument NAME = TYPE'")
        for engine, source in engines:
            if problem := _template_problem(engine, arguments, node):
                raise UserError(f"{source}: {problem}")
        return cls(tuple(engine for engine, _ in engines), arguments)

    def engine(self, text: str) -> OnlineEngine:
        """Return an engine by its number; the desktop client counts from 0."""
        for engine in self.engines:
            if text == str(engine.id) or (text == "0" and engine.id == 1):
                return engine
        raise UserError(f"Engine with identifier {text} not found.")

    def named(self, name: str) -> OnlineEngine | None:
        """Return the first engine of a name, which is the same in small letters, or None."""
        return next((one for one in self.engines if one.name.lower() == name.lower()), None)

    def check(self, name: str, value: str) -> None:
        """Raise ``UserError`` for a value that an argument does not take."""
        if name not in self.arguments:
            raise UserError(f"Argument type identifier {name} must be present in database.")
        kind, pattern = self.arguments[name]
        if not (_PLAIN_VALUE.fullmatch(value) and pattern.fullmatch(value)):
            raise UserError(f"Value {value} must be of type {kind}.")


def _argument_type(kind: str, pattern: str, source: str) -> re.Pattern[str]:
    if kind not in _ARGUMENT_TYPES:
        raise UserError(f"{source}: Type {kind} is not valid for RenderOnline: there are "
                        + ", ".join(_ARGUMENT_TYPES))
    try:
        return re.compile(pattern, re.ASCII) if pattern else _ARGUMENT_TYPES[kind]
    except re.error as error:
        raise UserError(f"{source}: '{pattern}' is not a regular expression: {error}") from None


def _template_problem(engine: OnlineEngine, arguments: Collection[str], node: bool) -> str:
    """Say what is wrong with an engine, or nothing."""
    povray = engine.name == POVRAY
    try:
        words = engine.words
    except ValueError as error:
        return f"the options cannot be taken apart: {error}"
    names = _PLACEHOLDER.findall(" ".join(words))
    unknown = [name for name in names if name not in (
        UPLOADED, *arguments, *(() if povray else (OUTPUT, "@threads")))]
    problem = ""
    if povray and engine.extension != ".pov":
        problem = f"povray renders files with the extension .pov, not '{engine.extension}'"
    elif not re.fullmatch(r"\.[A-Za-z0-9]{1,12}", engine.extension):
        problem = f"'{engine.extension}' is not an extension, such as .blend"
    elif unknown:
        problem = f"there is no line 'argument {unknown[0]} = TYPE'"
    elif UPLOADED not in names:
        problem = f"write $RENDERONLINE:{UPLOADED} where the scene's name belongs"
    elif OUTPUT not in names and not (povray or node):
        problem = f"write $RENDERONLINE:{OUTPUT} where the pictures' names begin"
    return problem or (_povray_problem(words) if povray else "")


def _povray_problem(words: Sequence[str]) -> str:
    for word in words:
        if not _TEMPLATE_ITEM.fullmatch(word) or _LEADS_ELSEWHERE.fullmatch(word):
            return f"'{word}' could lead to files of this computer: leave it out"
    try:  # what no client chooses
        read_command_line([word for word in words if "$" not in word], Path("/dev/null"), {}, (),
                          strict=False)
    except UserError as error:
        return str(error)
    return ""


def program_job(engine: str, scene: str, frames: Mapping[str, str], stem: str,
                arguments: Mapping[str, str]) -> PovJob:
    """Return a job for another program than POV-Ray, which renders a scene that is one file.

    ``frames`` are POV-Ray's options for frames and the type of the pictures. ``UserError``
    for what POV-Ray would take and such a program not.
    """
    fitting = {"Initial_Frame", "Final_Frame", "Subset_Start_Frame", "Subset_End_Frame",
               "Output_File_Type", "Output_File_Name", "Input_File_Name"}
    frames = {name: value for name, value in frames.items() if name != "Output_To_File"}
    if others := sorted(set(frames) - fitting):
        raise UserError(f"{engine} does not know {others[0]}: give it only frames (+KFI, +KFF, "
                        "+SF, +EF) and the type of the pictures (+F)")
    if frames.get("Output_File_Type", "N") not in NAMES_OF:
        raise UserError(f"{engine} makes no pictures of this type: choose "
                        + ", ".join(f"+F{letter} ({name})" for letter, name in NAMES_OF.items()))
    if min(int(frames.get(name, "1")) for name in ("Initial_Frame", "Final_Frame")) < 0:
        raise UserError("frames are numbered from 0 up")
    uses = {f"{_BY_PROGRAM}{engine}",
            *(f"argument {name} {value}" for name, value in arguments.items())}
    return PovJob.from_wire(PovJob(
        {**frames, "Input_File_Name": scene, "Output_File_Name": stem}, (), (), ".",
        tuple(sorted(uses))).to_wire())


# === 7. SLICING ==============================================================
# How a picture is shared out: where it may be cut, how high the next slice is, what
# slices share, how long a task still takes, where one that drags is divided. Pure.

START = 0.65  # seconds that a run of POV-Ray 3.7 costs before and after its work
GRAIN = 8  # rows, the least that a slice has which the farm cuts by itself


class SliceCost(NamedTuple):
    """What is known of a job's slices: seconds that a row takes, and those before the first."""

    row: float
    parse: float


def unsliceable(pov: PovJob, in_order: bool, slices: str = "auto") -> str:
    """Return why the frames of a job cannot be put together from slices, or nothing."""
    if pov.engine:
        return f"{pov.engine} renders whole frames"
    if slices == "auto" and pov.options.stochastic:
        return "stochastic anti-aliasing (+AM3) draws other pixels in slices"
    if in_order:
        return "its frames run in order"
    if pov.options.extension not in STRIP_TYPES:
        return "JPEG pictures cannot be put together from slices: choose +FN for PNG"
    region = region_of(pov.options)
    if region.bottom - region.top <= region.block:
        return "the picture is no higher than one block of the renderer"
    return ""


def worth_slicing(region: Region, mean: Cost | None) -> bool:
    """Tell whether a frame is neither small nor, by the ``mean`` of others, cheap."""
    cheap = mean is not None and mean.wall < 8 * START
    return not cheap and region.bottom - region.top > max(8 * GRAIN, region.block)


def slice_end(top: int, height: int, region: Region, slices: str, share: float,
              cost: SliceCost | None) -> int:
    """Choose the height of a slice: return the row before which one that begins at ``top`` ends.

    A slice begins where a block of the whole frame begins, so that the pixels
    are the same; the first and the last slice take along what lies outside the
    user's region. A number of ``slices`` makes them alike in blocks. ``auto``
    gives a worker a quarter of its ``share`` (0 to 1) of what is left, so that
    slices shrink and unequal workers finish together, but no slice whose parsing
    and start would weigh as much as a sixth of its pixels.
    """
    if slices == "off":  # since the frame was begun: then one slice has the rest
        return height
    block = region.block * (1 if slices != "auto" else -(-GRAIN // region.block))
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


def slice_speeds(measured: Sequence[tuple[int, float, float]],
                 cores: Mapping[int, int]) -> tuple[dict[int, float], SliceCost | None]:
    """Return the rows a second of each worker, and what a row and a slice cost on average.

    ``measured`` tells of some workers the rows a second and the seconds before the first row;
    the others are guessed by their ``cores``. Where nothing is measured, speeds are only worth
    comparing.
    """
    speeds = {worker: max(speed, 1e-6) for worker, speed, _ in measured if worker in cores}
    known = sum(cores[worker] for worker in speeds)
    per_core = sum(speeds.values()) / known if known else 1.0
    guesses = {worker: speeds.get(worker, per_core * cores[worker]) for worker in cores}
    if not speeds:
        return guesses, None
    # A slice whose first rows are cheap looks as if it had been parsed for long.
    parse = sorted(parse for _, _, parse in measured)[len(measured) // 2]
    return guesses, SliceCost(len(speeds) / sum(speeds.values()), parse)


def time_left(parts: Sequence[tuple[float, float]], began: float, now: float,
              usual: float = math.inf) -> float:
    """Return the seconds until a task is rendered, as it looks.

    ``parts`` tell how much of it was rendered when. Before any of it was heard, it takes its
    ``usual`` time since it ``began``; for ever when that is over or not known.
    """
    part, heard = parts[-1] if parts else (0.0, began)
    # Rows are rather like those just above them than like all of the picture.
    before, then = parts[0] if len(parts) > 1 else (0.0, began)
    if part <= before:
        left = then + usual - now
        return left if left > 0 else math.inf
    # POV-Ray tells of whole blocks, rows of them at once where they are short. One that takes
    # longer than those before it is dearer, and so may be what comes below it.
    step = (part - before) / max(len(parts) - 1, 1)
    spent = now - heard
    mean = max(heard - then, 0.0) * step / (part - before)
    return max(max(mean, spent) * (1 - part) / step - spent, 0.0)


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


def shared_by(pov: PovJob, radiosity: str) -> frozenset[str]:
    """Return what the runs of a job share that passes render first; ``radiosity`` as chosen."""
    shared = sharable(pov.uses, pov.values)
    if radiosity == "animation":
        return shared & {"radiosity"}  # photons may move from frame to frame
    return shared if radiosity == "share" else shared - {"radiosity"}


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


# === 8. DISCOVERY ============================================================
# How workers find coordinators on a LAN: a probe is broadcast by UDP, each
# coordinator answers it; and how two ends prove to each other that they know a
# secret. Knows names, ports and the farm key, nothing of HTTP.
#
# What the MAC is worth: an answer names the prober's nonce, so an old one is no
# use; it names the address that it is sent from, so a machine without the key
# cannot pass on a true coordinator's answer as its own and have workers come to
# it. Who can take over an address itself (ARP spoofing) is stopped only by TLS.

DISCOVERY_PORT = 2269  # the port of BSAC's meta server; hints go to the next one
_PACKET_LIMIT = 2048
_ANSWERS_A_SECOND = (20, 100, 300)  # to an address, to its network, and to all
_FARMS_LIMIT = 100
_PROBE_TIMES = (0.0, 0.2, 0.6)  # seconds: a lost packet should not cost a round
_STOP_STEP = 0.2  # seconds after which a wait looks whether it should stop
_LOOPBACK = ("127.0.0.1", "127.255.255.255")
# What asks for the address, the broadcast address and the flags of an interface.
_ADDRESS = {"linux": 0x8915, "darwin": 0xC0206921}
_BROADCAST = {"linux": 0x8919, "darwin": 0xC0206923}
_FLAGS = {"linux": 0x8913, "darwin": 0xC0206911}
_RUNNING = 0x40


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

    def __str__(self) -> str:
        """Return it as messages have it."""
        return f"{self.name} ({self.url})"


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
        self._answers = Shares(*_ANSWERS_A_SECOND)  # given in this second

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
        nonce = probe and probe.get("nonce")
        if not (probe and isinstance(nonce, str) and re.fullmatch("[0-9a-f]{32,128}", nonce)):
            return None
        wanted = probe.get("name")
        if isinstance(wanted, str) and wanted.casefold() != self._name.casefold():
            return None
        second = int(self._clock.monotonic())
        if second != self._second:
            self._answers.clear()
        self._second = second
        if not self._answers.take(sender):
            return None
        answer = {
            "povfarm": "answer", "version": 1, "nonce": nonce,
            "address": _address_towards(sender), **self._fields,
        }
        return json.dumps({**answer, "mac": mac(self._key, answer)}).encode()

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
             name: str | None = None) -> list[Found]:
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
        while (elapsed := time.monotonic() - start) < timeout:
            if elapsed >= times[0]:
                del times[0]
                _send_to(sock, probe, port, _broadcast_addresses())
            found = _receive_answer(sock, min(times[0], timeout) - elapsed, nonce, key)
            if found is None or (name is not None and found.name.casefold() != name.casefold()):
                continue
            if found.farm_id in farms or len(farms) < _FARMS_LIMIT:
                farms[found.farm_id] = min(farms.get(found.farm_id, found), found,
                                           key=lambda farm: not farm.address.startswith("127."))
            if name is not None:
                break
    return sorted(farms.values(), key=operator.attrgetter("name", "farm_id"))


def look_out(look: Callable[[], Found | None], stop: threading.Event,
             port: int = DISCOVERY_PORT, pause: float = 5.0) -> Found | None:
    """Return the coordinator that ``look`` finds, as soon as it does; None when stopped.

    It looks every ``pause`` seconds, and at once when a coordinator announces itself.
    """
    with _hint_socket(port) as hints:
        while not stop.is_set():
            found = look()
            if found is not None:
                return found
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not stop.is_set():
                if _hear_hint(hints, _STOP_STEP):
                    break
    return None


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
    sock.settimeout(max(seconds, 0.001))
    try:
        packet, (address, _) = sock.recvfrom(_PACKET_LIMIT + 1)
    except OSError:  # nothing came, or Windows says that a probe found nobody
        return None
    return _read_answer(packet, address, nonce, key)


def _read_answer(packet: bytes, address: str, nonce: str, key: bytes | None) -> Found | None:
    message = _parse_packet(packet, "answer")
    if message is None or message.get("nonce") != nonce:
        return None
    given = str(message.pop("mac", "")).encode(errors="replace")
    name, farm_id, port, pin = (message.get(field) for field in ("name", "id", "port", "pin"))
    scheme = "https" if pin else "http"
    if not (_is_label(name) and _is_label(farm_id) and type(port) is int and 0 < port < 65536
            and isinstance(pin, str) and re.fullmatch("([0-9a-f]{64})?", pin)
            and message.get("scheme") == scheme):
        return None
    if key is not None and not (hmac.compare_digest(given, mac(key, message).encode())
                                and message.get("address") == address):
        log.debug("discovery: %s says that it is %s, without our key", address, name)
        return None
    return Found(str(name), str(farm_id), f"{scheme}://{address}:{port}", key is not None,
                 address, pin)


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


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


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


def own_addresses() -> list[str]:
    """Return this computer's addresses on its networks, the one that leads furthest first.

    They need no router. Loopback alone is returned when it is on no network.
    """
    found: list[str] = []
    with contextlib.suppress(OSError):  # there is no route
        found.append(_address_towards("192.0.2.1"))  # of documentation: nothing is sent
    if sys.platform in _ADDRESS:
        running = {name for name, reply in _ask_interfaces(_FLAGS)
                   if struct.unpack_from("=H", reply, 16)[0] & _RUNNING}
        found += [socket.inet_ntoa(reply[20:24]) for name, reply in _ask_interfaces(_ADDRESS)
                  if name in running]
    else:
        with contextlib.suppress(OSError):
            found += socket.gethostbyname_ex(socket.gethostname())[2]
    return [address for address in dict.fromkeys(found)
            if not address.startswith(("127.", "0."))] or ["127.0.0.1"]


def _broadcast_addresses() -> list[str]:
    """Return the addresses that together reach this machine and every LAN it is on."""
    found = [socket.inet_ntoa(reply[20:24]) for _, reply in _ask_interfaces(_BROADCAST)]
    addresses = [*_LOOPBACK, "255.255.255.255", *found]
    return [address for address in dict.fromkeys(addresses) if address != "0.0.0.0"]


def _ask_interfaces(codes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each interface that answers, and its ``struct ifreq``."""
    code = codes.get(sys.platform)
    if code is None:
        return
    with _udp_socket() as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                yield name, fcntl.ioctl(sock.fileno(), code, request)


def _address_towards(address: str) -> str:
    """Return our own address on the way to another: what an answer to it comes from."""
    with _udp_socket() as sock:
        sock.connect((address, 9))
        return str(sock.getsockname()[0])


# --- who is who: both ends prove that they know a secret, and neither sends it

SESSION_OVER = "session"  # the detail of a refusal after which a client says hello again
HELLO = "/api/v1/hello"
FARM, WORKER = "", "#"  # who has the farm key; what is before a worker's number
_REPLAYED = 4096  # how far the counts of requests that overtake each other may lie apart


def mac(key: bytes, message: Any) -> str:
    """Return the HMAC-SHA256 of what is the same JSON at both ends, as hexadecimal digits."""
    text = json.dumps(message, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def secret_hash(secret: str) -> str:
    """Return what both ends make proofs with, and all that the database has of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def split_key(key: str) -> tuple[str, str]:
    """Return whose key it is, and what is to be proved: the farm's has no name before it,
    and of a person's the name is part of the secret.
    """
    who, _, secret = key.strip().rpartition(":")
    return who, secret if who.startswith(WORKER) else key.strip()


class Session:
    """What two ends have that know the same secret: a key, for this conversation only.

    ``name`` is what the coordinator calls it, ``nonce`` the client's random number.
    ``pin`` is the certificate that each end sees, empty without TLS: a relay with another
    one makes their keys differ. ``proof`` is the coordinator's, that it knows the secret.
    """

    def __init__(self, name: str, nonce: str, secret: str, farm_id: str, pin: str) -> None:
        self.name = name
        self.secret = secret  # its hash
        self.used = 0.0  # when it was used last, for the coordinator
        self._key = mac(secret.encode(), ["session", nonce, name, farm_id, pin]).encode()
        self.proof = mac(self._key, "coordinator")
        self._counts = itertools.count(1)
        self._newest, self._taken = 0, 0  # a bit for each of the counts up to the newest

    def sign(self, method: str, target: str, sha256: str) -> str:
        """Return what makes a request this end's own: it fits no other, and not twice."""
        count = next(self._counts)
        return (f"Povfarm session={self.name},count={count},"
                f"mac={self.mark(count, method, target, sha256)}")

    def takes(self, count: int) -> bool:
        """Tell whether this count comes for the first time. Not for two threads at once."""
        if count > self._newest:
            self._taken = (self._taken << min(count - self._newest, _REPLAYED)) & (
                (1 << _REPLAYED) - 1)
            self._newest = count
        if self._newest - count >= _REPLAYED:
            return False
        bit = 1 << (self._newest - count)
        first, self._taken = not self._taken & bit, self._taken | bit
        return first

    def mark(self, count: int, *request: str) -> str:
        """Return what whoever has this session makes of a request."""
        return mac(self._key, [count, *request])


PAIRING_OVER = "pairing"  # the detail of a refusal after which a worker begins to pair again
# RFC 3526, group 14.
_PRIME = int("""
    ffffffffffffffffc90fdaa22168c234c4c6628b80dc1cd129024e088a67cc74020bbea63b139b22514a0879
    8e3404ddef9519b3cd3a431b302b0a6df25f14374fe1356d6d51c245e485b576625e7ec6f44c42e9a637ed6b
    0bff5cb6f406b7edee386bfb5a899fa5ae9f24117c4b1fe649286651ece45b3dc2007cb8a163bf0598da4836
    1c55d39a69163fa8fd24cf5f83655d23dca3ad961c62f356208552bb9ed529077096966d670c354e4abc9804
    f1746c08ca18217c32905e462e36ce3be39e772c180e86039b2783a2ec07a28fb5c55df06f4c52c9de2bcbf6
    955817183995497cea956ae515d2261898fa051015728e5a8aacaa68ffffffffffffffff
    """.translate({ord(blank): None for blank in " \n"}), 16)


class Pairing:
    """One end of an agreement on a secret between two that know nothing of each other.

    The worker first shows ``commitment`` alone, and its ``share`` and ``nonce`` when it has
    those of the coordinator. So a relay in between, who has to agree with each of them,
    has one try to come to the same code with both: people see that the codes differ.
    """

    def __init__(self, seed: str = "") -> None:
        self._exponent = int(seed or secrets.token_hex(32), 16) | 1 << 255
        self.share = f"{pow(2, self._exponent, _PRIME):x}"
        self.nonce = secrets.token_hex(16)

    @property
    def commitment(self) -> str:
        """The hash of what will be shown later."""
        return secret_hash(f"{self.share} {self.nonce}")

    def agree(self, share: str, said: Sequence[str]) -> tuple[str, str]:
        """Return the secret and the code that belong to the other's share and to all that was
        said; ``UserError`` for a share that is none.
        """
        number = int(share, 16) if re.fullmatch("[0-9a-f]{1,512}", share) else 0
        if not 1 < number < _PRIME - 1:
            raise UserError("the other end has sent no share of a secret")
        key = mac(f"{pow(number, self._exponent, _PRIME):x}".encode(), list(said)).encode()
        digits = int(mac(key, "code"), 16)
        code = "".join(CODE_LETTERS[digits >> 5 * place & 31] for place in range(6))
        return mac(key, "secret"), code


def worker_secret(key: str, farm_id: str, ticket: str) -> str:
    """Return the secret of a worker that has joined with a key, made of the hash of that."""
    return derived(key, "worker", farm_id, ticket)


# === 9. HTTP =================================================================
# Requests, responses, routes and roles, and the one adaptor between them and
# sockets. Router.handle is the only place that turns anything, errors too, into
# a response. Knows nothing of jobs, workers or keys: who somebody is, is decided
# by the function that Router is given. Deadlines here are the real time's, not a
# Clock's: they bound what a socket may cost.

ROLES = ("anyone", "reader", "person", "submit", "user", "pending", "worker", "admin")
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
    threads: int = 4000  # requests under way, most of which wait,
    strangers: int = 128  # those of strangers,
    strangers_network: int = 64  # of strangers from one network,
    strangers_each: int = 32  # and from one address; as many again of those that only wait
    head_bytes: int = 16384
    head_fields: int = 100
    head_seconds: float = 20.0
    body_seconds: float = 30.0  # a body may take this long, and
    body_rate: float = 2000.0  # a second more for each so many bytes that came
    idle_seconds: float = 75.0
    send_seconds: float = 60.0  # in which the client takes nothing of an answer
    answer_seconds: float = 30.0  # a stranger may take so long for one, and
    answer_rate: float = 20_000.0  # a second more for each so many bytes
    linger_seconds: float = 2.0  # reading on after a refusal, so that the client gets to see it
    stop_seconds: float = 2.0


class BodyReader:
    """The body of a request, read once, from front to end.

    ``length`` is the declared size, None when it comes in chunks. ``source``
    gives the blocks, and ``b""`` where the body ends. Reading past ``limit``,
    which the route sets, is a ``ProtocolError`` 413; a body that breaks off is
    a 400, one that comes too slowly a 408, and one with another hash than
    ``expect`` was told a 503, before its last block has been looked at.
    """

    def __init__(self, source: Iterator[bytes], length: int | None) -> None:
        self.length = length
        self.limit = BODY_LIMIT
        self.received = 0
        self.finished = length == 0
        self._source = source
        self._digest: hashlib._Hash | None = None
        self._expected = ""

    @classmethod
    def of(cls, data: bytes) -> BodyReader:
        """Return a body that is already here."""
        return cls(iter([data, b""]), len(data))

    def read(self) -> bytes:
        """Return all of it, or what is left."""
        return b"".join(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """Yield the body as it comes."""
        self._check(self.length or 0)
        for block in self._source:  # one that has broken off gives no more, and never ends
            self.received += len(block)
            self._check(self.received)
            self.finished = not block or self.received == self.length
            if self._digest is not None:
                self._digest.update(block)
                if self.finished and self._digest.hexdigest() != self._expected:
                    raise ProtocolError(503, "the body was damaged on its way: send it again")
            yield block

    def expect(self, sha256: str | None) -> None:
        """Check the body while it is read; None where who reads it does that."""
        self._digest = None if sha256 is None else hashlib.sha256()
        self._expected = sha256 or hashlib.sha256().hexdigest()

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise ProtocolError(413, f"the body is larger than {format_size(self.limit)}")


@dataclass
class Request:
    """One request. ``path`` is decoded; ``headers`` has lower-case names.

    ``params`` holds what the route's wildcards matched; ``secure`` says that it came over TLS,
    ``inside`` that it comes from this process. ``target`` is what the request line has; ``place``
    is what is before the ``path`` for a browser that is logged in. ``alive()`` is False once the
    client has gone or the server is stopping: a handler that waits looks at it now and then.
    ``enter`` is told who it is from, and refuses it when there are too many.
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
    inside: bool = False
    target: str = ""
    place: str = ""
    alive: Callable[[], bool] = lambda: True
    enter: Callable[[Identity, bool], None] = lambda identity, waits: None

    def __post_init__(self) -> None:
        """Take the place off the path."""
        if found := _PLACE.match(self.path):
            self.place, self.path = found[0], self.path[found.end():]

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


def form_parts(request: Request) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the head of each part of a form with files, and what is in it as it comes.

    What is not read of a part is passed over. ``UserError`` when it is no whole form.
    """
    kind = re.fullmatch(r'multipart/form-data *; *boundary="?([^";]{1,200})"?',
                        request.headers.get("content-type", ""))
    if kind is None:
        raise UserError("the client sent no form with a file")
    edge, form = b"\r\n--" + kind[1].encode(), _Form(request.body.blocks())
    for _ in form.until(edge):
        pass
    while not form.ends():
        head, blocks = form.head(), form.until(edge)
        yield head, blocks
        for _ in blocks:
            pass


class _Form:
    """A form that is read as it comes; ``UserError`` where it ends too early."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._data = b"\r\n"  # read and not yet used

    def until(self, mark: bytes) -> Iterator[bytes]:
        """Yield what comes before a mark, and pass over that."""
        while (at := self._data.find(mark)) < 0:
            whole = max(len(self._data) - len(mark) + 1, 0)
            yield self._data[:whole]
            self._data = self._data[whole:] + self._next()
        yield self._data[:at]
        self._data = self._data[at + len(mark):]

    def ends(self) -> bool:
        """Tell whether the mark was the last one."""
        while len(self._data) < 2:
            self._data += self._next()
        return self._data.startswith(b"--")

    def head(self) -> str:
        """Return the head of a part, which has to be short."""
        while b"\r\n\r\n" not in self._data:
            if len(self._data) > BUFFER:
                raise UserError("the form has too long a head")
            self._data += self._next()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        return head.decode("utf-8", "replace")

    def _next(self) -> bytes:
        if not (block := next(self._blocks, b"")):
            raise UserError("the form that the client sent ends too early")
        return block


@dataclass(frozen=True)
class FileSlice:
    """A body that is ``length`` bytes of an open file, from ``start``."""

    file: BinaryIO
    start: int
    length: int

    def close(self) -> None:
        """Close the file."""
        self.file.close()


@dataclass
class Response:
    """What is answered: a status, headers, and bytes, part of a file or a stream."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | FileSlice | Generator[bytes, None, None] = b""

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


def redirect(location: str) -> Response:
    """Send the browser to ``location``, with a GET."""
    return Response(303, {"Location": location})


def stream_response(chunks: Iterator[bytes], mime: str) -> Response:
    """Return a body of unknown length that is made while it is sent.

    The first block is made at once: what fails before it is still an error
    response, not a 200 that breaks off. An iterator that has nothing to say
    for long yields ``b""`` now and then, so that it ends when nobody listens.
    """
    return Response(200, {"Content-Type": mime}, _stream(next(chunks, b""), chunks))


def _stream(first: bytes, chunks: Iterator[bytes]) -> Generator[bytes, None, None]:
    yield first
    try:
        yield from chunks
    except Exception as error:
        log.exception("a response broke off while it was made")
        raise OSError("the response broke off") from error


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
    known = request.headers.get("if-none-match", "").split(",")
    if {"*", quoted, f"W/{quoted}"}.intersection(map(str.strip, known)):
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
    ``takes`` is the record that the JSON body has the fields of.
    What ``waits`` is held open until something happens; what is ``shared`` is made once for all
    strangers who wait for it.
    """

    method: str
    pattern: str
    role: str
    max_body: int = BODY_LIMIT
    summary: str = ""
    takes: Any = None
    waits: bool = False
    shared: bool = False

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


class Router:
    """Finds the handler of a request and makes a response of whatever comes out.

    ``authenticate`` says who sends a request. ``hosts`` are the names that we
    are known by, addresses apart: a browser that was lured to us under another
    one by DNS rebinding is refused; empty stands for any. ``error_page`` makes
    what a browser is shown for an error, where others get JSON. ``gate`` lets
    one request be handled at a time.
    """

    def __init__(self, *providers: object, authenticate: Callable[[Request], Identity],
                 hosts: Collection[str] = (),
                 error_page: Callable[[Request, ProtocolError], Response] | None = None,
                 gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self._authenticate = authenticate
        self._hosts = hosts
        self._error_page = error_page
        self._turn = threading.Lock()  # of strangers
        self._made: dict[tuple[Any, ...], tuple[float, Response]] = {}  # for them, and when
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
            with self.gate:
                response = self._dispatch(request)
            if _UNSENDABLE.search("".join(response.headers.values())):
                response.close()
                raise ValueError(f"a header field cannot be sent: {response.headers}")
            return response
        except Exception as error:
            refusal = refusal_of(error, f"{request.method} {request.path!r}")
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
            request.enter(request.identity, bound.route.waits)
            dear = bound.route.role == "reader" and not bound.route.waits
            response = (self._for_stranger(bound, request)
                        if dear and not request.identity.trusted else bound.handler(request))
            if response.status == 303 and request.place:
                response.headers["Location"] = request.place + response.headers["Location"]
            return response
        if request.identity.name:
            raise ProtocolError(403, f"{request.identity.name} may not do this: it takes the "
                                "farm's key: --key-file with a copy of the coordinator's farm.key")
        raise ProtocolError(401, "log in first: give --key-file with a copy of the coordinator's "
                            "farm.key (there it is not needed), or in a browser open the link that "
                            "'login' prints there",
                            WWW_Authenticate="Povfarm")

    def _for_stranger(self, bound: BoundRoute, request: Request) -> Response:
        """Return the response for a stranger, one at a time, so that others wait for no more.

        What was begun since this one came is as good as new: so all who wait share a page.
        """
        came = time.monotonic()
        key = (request.path, *sorted(request.query.items()), request.secure, request.place,
               request.headers.get("host"))
        with self.gate.outside():
            self._turn.acquire()
        try:
            made, response = self._made.get(key, (-math.inf, None))
            if response is None or made < came:
                made = time.monotonic()
                response = bound.handler(request)
                if bound.route.shared:
                    self._made[key] = made, response
                    if len(self._made) > 20:
                        del self._made[next(iter(self._made))]
            return replace(response, headers={**response.headers})
        finally:
            self._turn.release()

    def _check_host(self, request: Request) -> None:
        # Only browsers can be rebound, and they always send a Host.
        host = request.headers.get("host")
        if host is not None and self._hosts:
            name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return
            if name not in self._hosts:
                raise ProtocolError(403, f"this coordinator does not know that it is called "
                                    f"{name!r}: start it with --host NAME")


class Inside:
    """Serves a ``Router`` to this process alone: nothing listens, nothing is sent."""

    port = 0

    def __init__(self, router: Router) -> None:
        self._router = router
        self._changed = threading.Condition()
        self._under_way = 0
        self._stopped = False

    def start(self) -> None:
        """Serve: it does."""

    def stop(self) -> None:
        """Answer nothing more, and wait for the answers that are under way."""
        with self._changed:
            self._stopped = True
            self._changed.wait_for(lambda: not self._under_way)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: BodyReader,
               alive: Callable[[], bool]) -> Response | None:
        """Return the answer to a request as it would be sent; None after the end."""
        with self._changed:
            if self._stopped:
                return None
            self._under_way += 1
        try:
            path, _, query = target.partition("?")
            return self._router.handle(Request(
                method, _decode(path), _fields(query),
                {name.lower(): value for name, value in headers.items()}, body,
                inside=True, target=target, alive=lambda: alive() and not self._stopped))
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()


class Server(http.server.HTTPServer):
    """Serves a ``Router`` on a TCP port.

    One thread holds every connection from which no whole head of a request has
    come yet, so ten thousand that are idle or slow cost memory only; a request
    gets a thread. The connection that has been idle for longest makes room for
    a new one. Port 0 picks a free one; ``port`` tells which. A port or an
    address that cannot be had is a ``UserError``. With 127.0.0.1 goes [::1], so that
    nobody else on this computer gets what is sent to ``localhost``.
    """

    request_queue_size = 1024  # the base's 5 are too few when all workers come back at once
    allow_reuse_address = os.name != "nt"  # there two servers would have the port

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
        most = self.limits
        self.strangers, self.waiting = (Shares(
            most.strangers_each, most.strangers_network, most.strangers) for _ in range(2))
        self._held: dict[_Connection, None] = {}  # of the holding thread; idle longest first
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Connection)
        except OSError as error:
            raise UserError({
                errno.EADDRINUSE: f"port {port} is in use: is another povfarm running here? "
                                  "choose another with --port",
                errno.EACCES: f"port {port} needs administrator rights: choose one above 1023 "
                              "with --port",
            }.get(error.errno or 0, f"cannot listen on {host} port {port}: {error.strerror}")
            ) from error
        self.port: int = self.server_address[1]
        self._listeners = [self.socket, *self._at_localhost(host)]
        for listener in self._listeners:
            listener.settimeout(0)
        self._most = min(self.limits.connections, _descriptors(self.limits.connections))
        self._wakee, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self.serve_forever, name="http", daemon=True)

    def server_bind(self) -> None:
        """Take the port. The base then asks for this computer's name, which may take long."""
        if self.address_family == socket.AF_INET6:
            only = self.server_address[0] != "::" or not socket.has_dualstack_ipv6()
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        socketserver.TCPServer.server_bind(self)

    def _at_localhost(self, host: str) -> list[socket.socket]:
        if host not in ("0.0.0.0", "127.0.0.1"):
            return []
        try:
            return [socket.create_server(("::1", self.port), family=socket.AF_INET6,
                                         backlog=self.request_queue_size)]
        except OSError as error:  # most often there is no IPv6
            if error.errno == errno.EADDRINUSE:
                log.warning("port %d of [::1] is another program's: write 127.0.0.1 on this "
                            "computer, and not localhost", self.port)
            return []

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
        for one in (*self._listeners, self._wakee, self._waker):
            one.close()
        self._selector.close()
        with self.changed:
            # Not by a Clock: these are threads in system calls.
            self.changed.wait_for(lambda: not self.connections, self.limits.stop_seconds)
            for connection in self.connections:  # the threads that serve them close them then
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection.connection, socket.SHUT_RDWR)

    @property
    def crowded(self) -> bool:
        """Whether no thread may wait for what may come."""
        return (self._threads > self.limits.threads // 2 or self.stopping.is_set()
                or len(self.connections) > self._most // 2)

    # --- the thread that holds the connections

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Hold all connections until the end. The base's serves one, and waits with it."""
        for wanted in (*self._listeners, self._wakee):
            self._selector.register(wanted, selectors.EVENT_READ)
        limits, looked = self.limits, time.monotonic()
        pause = min(poll_interval, limits.head_seconds, limits.idle_seconds, limits.linger_seconds)
        while not self.stopping.is_set():
            for key, _ in self._selector.select(pause if self._held else None):
                if key.data in self._held:  # it may have had to make room meanwhile
                    self._step(key.data, key.data.fill)
                elif key.fileobj is self._wakee:
                    self._wakee.recv(BUFFER)
                elif isinstance(key.fileobj, socket.socket) and key.data is None:
                    self._accept(key.fileobj)
            while self._served:
                self._hold(self._served.popleft())
            now = time.monotonic()
            if now - looked >= pause:
                looked = now
                for connection in [one for one in self._held if one.deadline < now]:
                    self._step(connection, connection.too_late)
        for connection in (*self._held, *self._served):
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(100):  # and then those that are here already have their turn
            try:
                sock, address = listener.accept()
                if len(self.connections) >= self._most and not self._make_room():
                    sock.close()
                    raise OSError(f"there are {self._most} already, and all are busy")
                connection = _Connection(sock, address, self)
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
        self._selector.register(connection.connection, selectors.EVENT_READ, connection)
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
        self._selector.unregister(connection.connection)

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


class _Stage(enum.Enum):
    """Where a connection stands: it is held, or a thread has it."""

    HANDSHAKE = "held, in the TLS handshake"
    IDLE = "held, and nothing is asked"
    BEGUN = "held, and the head of a request is on its way"
    CLOSING = "held, and all is said: what still comes is thrown away"
    ASKED = "a request is under way,"
    ENTERED = "it has been let in,"
    COUNTED = "and is counted as a stranger's"
    OVER = "to be closed"


# Until Python 3.12, looking up _Stage.IDLE takes as long as finding a request's handler.
_HANDSHAKE, _IDLE, _BEGUN, _CLOSING, _ASKED, _ENTERED, _COUNTED, _OVER = _Stage


class _Connection(http.server.BaseHTTPRequestHandler):
    """One client: reads its requests, one after the other, and writes the responses.

    It is held, in ``fill``, ``too_late`` and ``rest``, which never wait, or it
    has a thread, in ``serve`` and what that calls.
    """

    protocol_version = request_version = "HTTP/1.1"
    server: Server

    def __init__(self, sock: socket.socket, address: Any, server: Server) -> None:
        # Not the base's, which makes two files of each socket, and waits for a request at once.
        self.server, self.client_address = server, address
        self.connection = sock
        self.remote = str(address[0]).removeprefix("::ffff:")
        self.deadline = 0.0  # of what is awaited now, while it is held
        self._limits = server.limits
        self._stage = _IDLE
        self._buffer = bytearray()  # received and not yet used
        self._searched = 0  # of the buffer: so far there is no end of a head,
        self._end = 0  # or here it is
        self._body_began = 0.0  # when the body was first asked for,
        self._body_bytes = 0  # and what has come of it, chunk sizes too
        watch_peer(sock)
        if server.tls is not None:
            sock.settimeout(0)
            self._stage = _HANDSHAKE
            self.connection = server.tls.wrap_socket(sock, server_side=True,
                                                     do_handshake_on_connect=False)

    def close(self) -> None:
        """Close the connection."""
        with self.server.changed:
            self.server.connections.discard(self)
            self.server.changed.notify_all()
            self.connection.close()

    # --- while it is held

    def rest(self) -> None:
        """Begin to be held, for as long as the limits allow."""
        limits = self._limits
        if self._stage not in (_HANDSHAKE, _CLOSING):
            self._stage = _BEGUN if self._buffer else _IDLE
        self.deadline = time.monotonic() + {
            _CLOSING: limits.linger_seconds, _IDLE: limits.idle_seconds,
        }.get(self._stage, limits.head_seconds)
        self.connection.settimeout(0)

    def fill(self) -> bool:
        """Take in what has come; True when there is a request to serve, ``OSError`` at the end.

        One block at a time: who sends without end is not alone here.
        """
        try:
            if self._stage is _HANDSHAKE:
                self._shake_hands()
            if self._has_head():
                return True
            self._receive()
            if self._stage is _CLOSING:
                self._buffer.clear()
            elif self._stage is _IDLE:
                self.rest()
            return self._has_head()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except ProtocolError as error:
            self._refuse(error)
            return False

    def too_late(self) -> bool:
        """Give up on a client that did not go on in time."""
        if self._stage is _CLOSING or not self._buffer:
            raise TimeoutError("nothing came for too long")
        self._refuse(ProtocolError(408, "the request came too slowly"))
        return False

    def _shake_hands(self) -> None:
        try:
            self.connection.do_handshake()
        except ssl.SSLError as error:
            if error.reason != "HTTP_REQUEST":
                raise
            raise ProtocolError(400, "this port speaks TLS: write https://") from error
        self._stage = _IDLE
        self.rest()

    def _receive(self) -> None:
        if not (data := self.connection.recv(BUFFER)):
            raise ConnectionError("the client has closed it")
        self._buffer += data

    def _has_head(self) -> bool:
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
        self._end = end.end() if end else 0
        return end is not None

    def _refuse(self, error: ProtocolError) -> None:
        response = _error_in_json(error)
        data = self._head(response, True) + cast(bytes, response.body)
        self.connection.settimeout(0)  # it is little enough for the system to take at once
        kind = socket.socket if self._stage is _HANDSHAKE else type(self.connection)
        kind.send(self.connection, data)
        self._say_goodbye()
        self.rest()

    def _say_goodbye(self) -> None:
        """Send no more, but let the client read what was sent.

        Closing with unread data makes TCP throw away what was sent.
        """
        self._stage = _CLOSING
        self._buffer.clear()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    # --- while it has a thread

    def serve(self) -> bool:
        """Answer what is asked; True when the connection is to be held again."""
        try:
            self.handle()
        except ProtocolError as error:
            # Where the next request would begin is not known now: see RFC 9112, 6.3.
            with contextlib.suppress(OSError):
                self._refuse(error)
        except OSError as error:
            log.debug("%s: connection ended: %s", self.remote, error)
        except Exception:
            log.exception("%s: connection failed", self.remote)
        return self._stage in (_IDLE, _CLOSING)

    def _comes_soon(self) -> bool:
        """Wait a moment for the next request, as to be held again costs more time."""
        if self.server.crowded:
            return False
        self.connection.settimeout(_SOON)
        with contextlib.suppress(socket.timeout, ssl.SSLWantReadError):
            self._receive()
        return self._has_head()

    def enter(self, identity: Identity, waits: bool = False) -> None:
        """Let a request in; ``ProtocolError`` 503 when too many of strangers are under way."""
        if self._stage is not _ASKED:
            return
        if identity.trusted:
            self._stage = _ENTERED
            return
        with self.server.changed:
            self._counted = self.server.waiting if waits else self.server.strangers
            if not self._counted.take(self.remote):
                raise ProtocolError(503, "too many requests at a time: try again in a moment",
                                    Retry_After="1")
        self._stage = _COUNTED

    def alive(self) -> bool:
        """Whether the client still waits and the server is not stopping."""
        if self.server.stopping.is_set():
            return False
        timeout = self.connection.gettimeout()
        self.connection.settimeout(0)
        try:
            # Below TLS: there, a client that waits sends nothing but its farewell.
            data = socket.socket.recv(self.connection, 1, socket.MSG_PEEK)
            return bool(data) and self.server.tls is None
        except OSError as error:
            return isinstance(error, BlockingIOError)
        finally:
            self.connection.settimeout(timeout)

    def handle_one_request(self) -> None:
        """Serve the request whose head is here, and wait a moment for the next one.

        The base's knows a method for each of HTTP's; here Router has the routes.
        """
        self._stage, unread = _ASKED, True
        try:
            self.parse_request()
            request = self.asked
            del self.asked  # or both would wait for the garbage collector
            response = self.server.router.handle(request)
            # Who was refused may read and write as slowly as others.
            with contextlib.suppress(ProtocolError):
                self.enter(request.identity)
            unread = not self._drained(request)
            self.close_connection |= unread or self.server.stopping.is_set()
            log.debug("%s %s %r: %d", self.remote, request.method, request.path, response.status)
            self.connection.settimeout(0 if self._stage is _ASKED else self._limits.send_seconds)
            self._send(response)
        finally:
            if self._stage is _COUNTED:
                with self.server.changed:
                    self._counted.give_back(self.remote)
            self._stage = _OVER
        if unread:
            self._say_goodbye()
        elif not self.close_connection:
            self.close_connection = not (self._has_head() or self._comes_soon())
            self._stage = _IDLE

    def parse_request(self) -> bool:
        """Read the head that is here; ``ProtocolError`` where it is not to the letter.

        The base's takes more: bare line feeds, blanks before a colon, two lengths, of which
        somebody else may make two requests. And email.parser is slower than all the rest here.
        """
        first, *lines = self._buffer[: self._end - 4].decode("latin-1").split("\r\n")
        del self._buffer[: self._end]
        self._searched = 0
        match = _REQUEST_LINE.fullmatch(first)
        if match is None:
            raise ProtocolError(400, "this is not an HTTP/1 request")
        self.command, host, self.path, minor = match.groups()
        headers = _parse_fields(lines, self._limits)
        if host is not None:
            headers["host"] = host
        old = minor == "0"
        self.request_version = f"HTTP/1.{minor}"
        if not old and "host" not in headers:
            raise ProtocolError(400, "the request has no Host")
        path, _, query = self.path.partition("?")
        length = _body_length(headers, old)
        expects = headers.get("expect", "").lower() == "100-continue" and not old
        self.close_connection = old or "close" in headers.get("connection", "").lower()
        self.asked = Request(
            self.command, _decode(path), _fields(query), headers,
            BodyReader(self._body(length, expects), length), self.remote,
            secure=self.server.tls is not None, target=self.path, alive=self.alive,
            enter=self.enter,
        )
        return True

    def _drained(self, request: Request) -> bool:
        """Read away the little that a handler left of a body; False when it is not little."""
        body = request.body
        if body.finished or self._stage is _ASKED or (
                "expect" in request.headers and not body.received):  # it may never be sent
            return body.finished
        body.limit = body.received + _DRAIN_LIMIT
        with contextlib.suppress(ProtocolError):
            body.read()
        return body.finished

    def _head(self, response: Response, last: bool) -> bytes:
        """Return the head of a response: it travels with what follows, in one packet."""
        body = response.body
        with io.BytesIO() as self.wfile:
            self.send_response_only(response.status)
            if isinstance(body, FileSlice):
                self.send_header("Content-Length", str(body.length))
            elif isinstance(body, bytes) and response.status not in (204, 304):
                self.send_header("Content-Length", str(len(body)))
            elif not isinstance(body, bytes) and self.request_version != "HTTP/1.0":
                self.send_header("Transfer-Encoding", "chunked")
            if last:
                self.send_header("Connection", "close")
            self.flush_headers()
            self.wfile.write(_standing(int(time.time()), *response.headers.items()))
            self.end_headers()
            return self.wfile.getvalue()

    def _send(self, response: Response) -> None:
        try:
            head = self._head(response, self.close_connection)
            body = b"" if self.command == "HEAD" else response.body
            if isinstance(body, bytes):
                send_all(self.connection, head + body, self._hurry)
            elif isinstance(body, FileSlice) and self._hurry:
                send_all(self.connection, head)
                body.file.seek(body.start)
                for start in range(0, body.length, 1 << 20):
                    send_all(self.connection, body.file.read(min(1 << 20, body.length - start)),
                             self._hurry)
            elif isinstance(body, FileSlice):
                send_all(self.connection, head)
                if self.connection.sendfile(body.file, body.start, body.length) != body.length:
                    raise OSError("the file became shorter while it was sent")
            else:
                self._send_stream(head, body)
        finally:
            response.close()

    @property
    def _hurry(self) -> tuple[float, float] | None:
        """How long a stranger may take for what is sent, and for each byte of it."""
        if self._stage is not _COUNTED:
            return None
        return self._limits.answer_seconds, 1 / self._limits.answer_rate

    def _send_stream(self, head: bytes, body: Iterator[bytes]) -> None:
        old = self.request_version == "HTTP/1.0"
        for chunk in body:
            if chunk:
                head += chunk if old else b"%x\r\n%b\r\n" % (len(chunk), chunk)
            elif not (head or self.alive()):
                raise OSError("nobody listens to the stream")
            send_all(self.connection, head, self._hurry)
            head = b""
            if self.server.stopping.is_set():
                raise OSError("the server is stopping")
        if not old:
            send_all(self.connection, b"0\r\n\r\n")

    # --- the body of a request

    def _body(self, length: int | None, expects: bool) -> Iterator[bytes]:
        """Yield a body, by its length or chunk by chunk, and ``b""`` where it ends."""
        self._body_began, self._body_bytes = time.monotonic(), 0
        if expects:  # the client waits with it until it is told to send it
            with contextlib.suppress(OSError):  # reading will show it
                self.connection.settimeout(self._limits.send_seconds)
                send_all(self.connection, b"HTTP/1.1 100 Continue\r\n\r\n")
        size = self._chunk_size() if length is None else length
        while size:
            block = self._take(min(size, BUFFER))
            size -= len(block)
            yield block
            if length is None and not size:
                if self._line():
                    raise ProtocolError(400, "a chunk of the body is longer than it said")
                size = self._chunk_size()
        yield b""

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
        while not line.endswith(b"\n"):
            line += self._take(1)
            if len(line) > 1000:
                raise ProtocolError(400, "the body has too long a line between chunks")
        if not line.endswith(b"\r\n"):  # others may not take it for the line's end
            raise ProtocolError(400, "a line of the body ends in another way than CR LF")
        return line[:-2]

    def _take(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes; ``ProtocolError`` when none come in time."""
        limits = self._limits
        end = self._body_began + limits.body_seconds + self._body_bytes / limits.body_rate
        try:
            while not self._buffer:
                left = end - time.monotonic()
                if left < 0:
                    raise socket.timeout
                self.connection.settimeout(max(left, 0.001))
                with self.server.router.gate.outside():
                    self._receive()
        except socket.timeout:
            raise ProtocolError(408, "the body came too slowly") from None
        except OSError as error:
            raise ProtocolError(400, f"the body ended early: {error}") from error
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._body_bytes += len(data)
        return data


def send_all(sock: socket.socket, data: bytes, hurry: tuple[float, float] | None = None) -> None:
    """Send all of it. The socket's timeout is that of a silence: ``sendall``'s is of the whole.

    Where there is ``hurry``, the whole may take so many seconds, and so many for each byte.
    """
    left, end = memoryview(data), math.inf
    if hurry:
        end = time.monotonic() + hurry[0] + hurry[1] * len(data)
    while left:
        left = left[sock.send(left[:BUFFER]):]
        if left and time.monotonic() > end:
            raise OSError("the client takes the answer too slowly")


_PLACE = re.compile("/-[0-9a-f]{16}(?=/)")
_LINE_ENDS = re.compile(rb"(?:\r\n)*")
_HEAD_END = re.compile(rb"\n\r?\n")
_REQUEST_LINE = re.compile(
    r"([A-Z]{1,20}) (?:https?://([A-Za-z0-9.:\[\]_-]+))?(/[^\s\x00-\x1f\x7f]*) HTTP/1\.([0-9])"
)
_UNSENDABLE = re.compile("[\r\n\0\u0100-\U0010ffff]")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\n-\x1f\x7f]*)")
_WILDCARD = re.compile(r"<([a-z]+)(?::(int|path))?>")
_WILDCARD_REGEX = {None: "[^/]+", "int": "[0-9]{1,18}", "path": ".+"}

# What every response says, unless it says otherwise: a browser is to make nothing of it but
# what it is, not to run anything in it, and to keep it from pages of others.
_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "same-origin",
}
@functools.lru_cache(maxsize=64)
def _standing(second: int, *more: tuple[str, str]) -> bytes:
    """Return the fields that say nothing of a body: most responses of a second have the same."""
    fields = {"Date": email.utils.formatdate(second, usegmt=True), **_HEADERS, **dict(more)}
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("latin-1")


# What is answered to an exception; the first that fits counts.
_STATUS: tuple[tuple[type[FarmError], int], ...] = (
    (UserError, 400),
    (NotYours, 403),
    (Crowded, 429),
    (NotFound, 404),
    (Damaged, 422),
    (StaleLease, 410),
    (IllegalTransition, 409),
    (NoRoom, 507),
    (TryAgain, 503),
    (StoreError, 500),
    (FarmError, 409),
)


def _compile(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a route's pattern; its groups are ``name_kind``."""
    return re.compile(_WILDCARD.sub(
        lambda found: f"(?P<{found[1]}_{found[2] or 'str'}>{_WILDCARD_REGEX[found[2]]})",
        re.escape(pattern)), re.DOTALL)


def refusal_of(error: Exception, place: str) -> ProtocolError:
    """Return what to tell a client of an exception; our own mistakes are told to the log."""
    if isinstance(error, ProtocolError):
        return error
    if not isinstance(error, FarmError):
        log.error("%s failed", place, exc_info=error)
        return ProtocolError(500, "the coordinator made a mistake: its log says which")
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    if status == 500:
        log.warning("%s", error)
    return ProtocolError(status, str(error), **({"Retry_After": "30"} if status == 429 else {}))


def _error_in_json(refusal: ProtocolError) -> Response:
    return json_response({"error": str(refusal), "detail": refusal.detail}, refusal.status)


def _fields(text: str) -> dict[str, str]:
    """Return the fields of a query or a form; ``ProtocolError`` 400 for too many."""
    if not text:
        return {}
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


# === 10. STORE ===============================================================
# All SQL, and the directory of blobs. Methods are single statements with a
# name; what they mean for the farm is SCHEDULER's. No network, no rules.

SCHEMA_VERSION = 10  # the database's PRAGMA user_version; 1 to 9 came before the first release
_LESS = """UPDATE turn SET
    active = active - (OLD.state = 'active'), runs = runs - OLD.runs, kept = kept - OLD.kept,
    jobs = jobs - (OLD.finished IS NULL),
    frames = frames - (OLD.finished IS NULL) * (OLD.queued + OLD.leased)
    WHERE owner = OLD.owner AND priority = OLD.priority;"""
# Not INSERT OR IGNORE: in a trigger the statement that sets it off decides about conflicts.
_MORE = """INSERT INTO turn (owner, priority) SELECT NEW.owner, NEW.priority WHERE NOT EXISTS (
      SELECT 1 FROM turn WHERE owner = NEW.owner AND priority = NEW.priority);
    UPDATE turn SET
    active = active + (NEW.state = 'active'), runs = runs + NEW.runs, kept = kept + NEW.kept,
    jobs = jobs + (NEW.finished IS NULL),
    frames = frames + (NEW.finished IS NULL) * (NEW.queued + NEW.leased)
    WHERE owner = NEW.owner AND priority = NEW.priority;"""
SCHEMA = f"""
    CREATE TABLE meta (
        key TEXT PRIMARY KEY, value TEXT NOT NULL
    ) WITHOUT ROWID;
    -- aside: why its pictures are not trusted; owner: with whose key it has joined; frames, with
    -- slices as parts of some, wall (seconds) and failures: what it has done so far
    CREATE TABLE worker (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, token TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL, code TEXT NOT NULL, cores INTEGER NOT NULL, memory INTEGER NOT NULL,
        system TEXT NOT NULL, engines_json TEXT NOT NULL, tags_json TEXT NOT NULL,
        address TEXT NOT NULL, joined REAL NOT NULL, aside TEXT NOT NULL DEFAULT '',
        owner TEXT NOT NULL DEFAULT '', frames REAL NOT NULL DEFAULT 0,
        wall REAL NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0
    );
    -- People and programs, and invitations, which have uses: how many may still come.
    -- token: the hash of what they show, or a secret that keys are made of
    CREATE TABLE person (
        name TEXT PRIMARY KEY, role TEXT NOT NULL, token TEXT NOT NULL,
        limits_json TEXT NOT NULL, added REAL NOT NULL, uses INTEGER
    ) WITHOUT ROWID;
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
    -- priority: as in options_json, to sort by; engines_json: of the worker that began it;
    -- kept: the bytes of its project, images and written files
    CREATE TABLE job (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '', owner TEXT NOT NULL, pov_json TEXT NOT NULL,
        manifest TEXT NOT NULL REFERENCES manifest, priority INTEGER NOT NULL,
        options_json TEXT NOT NULL, engines_json TEXT NOT NULL DEFAULT '{{}}',
        created REAL NOT NULL, started REAL, finished REAL,
        queued INTEGER NOT NULL DEFAULT 0, leased INTEGER NOT NULL DEFAULT 0,
        done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, runs INTEGER NOT NULL DEFAULT 0,
        cpu REAL NOT NULL DEFAULT 0, wall REAL NOT NULL DEFAULT 0,
        kept INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX job_state ON job (state);
    CREATE INDEX job_owner ON job (owner);
    CREATE INDEX job_turn ON job (owner, priority, runs, id, queued, leased)
        WHERE state = 'active';
    CREATE INDEX job_manifest ON job (manifest);
    -- The jobs of one owner and priority together, counted by triggers: what people's turns and
    -- limits go by. jobs and frames: those that are not finished; spent: seconds of cores.
    CREATE TABLE turn (
        owner TEXT NOT NULL, priority INTEGER NOT NULL, active INTEGER NOT NULL DEFAULT 0,
        runs INTEGER NOT NULL DEFAULT 0, spent REAL NOT NULL DEFAULT 0,
        jobs INTEGER NOT NULL DEFAULT 0, frames INTEGER NOT NULL DEFAULT 0,
        kept INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (owner, priority)
    ) WITHOUT ROWID;
    CREATE INDEX turn_next ON turn (priority DESC, runs, spent, owner) WHERE active > 0;
    CREATE TRIGGER job_added AFTER INSERT ON job BEGIN {_MORE} END;
    CREATE TRIGGER job_dropped AFTER DELETE ON job BEGIN {_LESS} END;
    CREATE TRIGGER job_counted AFTER UPDATE OF state, finished, priority, runs, queued, leased, kept
        ON job BEGIN {_LESS} {_MORE} END;
    -- Slices and passes are tasks below their frame. cut of a frame: the row that its next slice
    -- begins with, NULL while it is not sliced; state_of: the POV-Ray that left a state.
    CREATE TABLE task (
        id INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL,
        frame INTEGER NOT NULL, slice INTEGER NOT NULL DEFAULT 0, name TEXT NOT NULL,
        state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, worker INTEGER, finished REAL,
        sha256 TEXT, size INTEGER, cpu REAL, wall REAL, memory INTEGER, parse REAL,
        parent INTEGER REFERENCES task ON DELETE CASCADE, kind TEXT NOT NULL DEFAULT 'frame',
        top INTEGER NOT NULL DEFAULT 0, bottom INTEGER NOT NULL DEFAULT 0, cut INTEGER,
        state_of TEXT NOT NULL DEFAULT '', UNIQUE (job, frame, slice)
    );
    CREATE TRIGGER task_kept AFTER UPDATE OF size ON task WHEN NEW.parent IS NULL BEGIN
        UPDATE job SET kept = kept + NEW.size - COALESCE(OLD.size, 0) WHERE id = NEW.job; END;
    CREATE INDEX task_state ON task (job, state, frame, slice);
    CREATE INDEX task_done ON task (job, finished) WHERE state = 'done' AND parent IS NULL;
    CREATE INDEX task_slice ON task (job, finished) WHERE state = 'done' AND kind = 'slice';
    CREATE INDEX task_parent ON task (parent) WHERE parent IS NOT NULL;
    CREATE INDEX task_part ON task (job, state, kind) WHERE parent IS NOT NULL;
    CREATE INDEX task_cut ON task (state, job) WHERE cut IS NOT NULL;
    CREATE TABLE lease (
        id TEXT PRIMARY KEY, worker INTEGER NOT NULL REFERENCES worker,
        job INTEGER NOT NULL, granted REAL NOT NULL,
        ended REAL, why TEXT NOT NULL DEFAULT ''
    ) WITHOUT ROWID;
    CREATE INDEX lease_job ON lease (job, granted);
    -- given: the row before which a slice was to end when it was given out, 0 for a whole frame;
    -- where its task has fewer rows now, others were given the rest
    CREATE TABLE attempt (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        task INTEGER NOT NULL REFERENCES task ON DELETE CASCADE,
        lease TEXT NOT NULL REFERENCES lease ON DELETE CASCADE, worker INTEGER NOT NULL,
        state TEXT NOT NULL, started REAL NOT NULL, ended REAL,
        message TEXT NOT NULL DEFAULT '', log TEXT NOT NULL DEFAULT '',
        given INTEGER NOT NULL DEFAULT 0, UNIQUE (task, lease)
    );
    CREATE INDEX attempt_lease ON attempt (lease);
    CREATE INDEX attempt_recent ON attempt (worker, id);
    CREATE INDEX attempt_live ON attempt (task) WHERE state = 'live';
    CREATE INDEX attempt_kept ON attempt (task) WHERE state = 'kept';
    CREATE INDEX attempt_failed ON attempt (worker, task) WHERE state = 'failed';
    CREATE VIEW try AS
        SELECT attempt.*, task.job AS job, task.frame AS frame, task.parent AS parent,
               task.kind AS kind, task.top AS top, task.bottom AS bottom
        FROM attempt JOIN task ON task.id = attempt.task;
    -- owner: of the job; who: whoever did it, where it was a person
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job INTEGER, frame INTEGER,
        worker INTEGER, what TEXT NOT NULL, text TEXT NOT NULL,
        owner TEXT NOT NULL, who TEXT NOT NULL
    );
    CREATE INDEX event_job ON event (job);
    -- Files that scenes wrote themselves, as the last frame left them; their contents are blobs.
    CREATE TABLE written (
        job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE, path TEXT NOT NULL,
        frame INTEGER NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL,
        PRIMARY KEY (job, path)
    ) WITHOUT ROWID;
    CREATE INDEX written_sha256 ON written (sha256);
    CREATE TRIGGER written_added AFTER INSERT ON written BEGIN
        UPDATE job SET kept = kept + NEW.size WHERE id = NEW.job; END;
    CREATE TRIGGER written_changed AFTER UPDATE ON written BEGIN
        UPDATE job SET kept = kept + NEW.size - OLD.size WHERE id = NEW.job; END;
"""


@dataclass(frozen=True)
class Job:
    """A job as the database has it; ``engines`` are those of the worker that began it.

    ``queued`` to ``cancelled`` count its frames, ``runs`` its live leases; ``cpu``
    and ``wall`` are the seconds that its frames cost.
    """

    id: int
    name: str
    state: JobState
    reason: str
    owner: str
    pov_json: str
    manifest: str
    options_json: str
    engines_json: str
    created: float
    started: float | None
    finished: float | None
    queued: int
    leased: int
    done: int
    failed: int
    cancelled: int
    runs: int
    cpu: float
    wall: float
    kept: int

    @functools.cached_property
    def pov(self) -> PovJob:
        """What POV-Ray is told."""
        return pov_of(self.pov_json)

    @functools.cached_property
    def options(self) -> JobOptions:
        """How the farm treats it."""
        return _options_in(self.options_json)

    @functools.cached_property
    def engines(self) -> Mapping[str, str]:
        """What the worker had that began it."""
        return engines_of(self.engines_json)

    @functools.cached_property
    def region(self) -> Region:
        """The rows that are rendered."""
        return region_of(self.pov.options)

    @property
    def counts(self) -> dict[TaskState, int]:
        """How many of its frames are in each state."""
        return {state: getattr(self, state.value) for state in TaskState}

    @property
    def mean_cost(self) -> Cost | None:
        """What a frame cost on average, None before the first is done."""
        return Cost(self.cpu / self.done, self.wall / self.done) if self.done else None


@dataclass(frozen=True)
class Task:
    """A frame, or a slice or pass below its ``parent``; see ``SCHEMA`` and ``TaskSpec``."""

    id: int
    job: int
    frame: int
    name: str
    state: TaskState
    tries: int
    worker: int | None
    finished: float | None
    sha256: str | None
    size: int | None
    cpu: float | None
    wall: float | None
    memory: int | None
    parse: float | None
    parent: int | None
    kind: TaskKind
    top: int
    bottom: int
    cut: int | None
    state_of: str

    @property
    def is_part(self) -> bool:
        """True for a slice or a pass."""
        return self.parent is not None


@dataclass(frozen=True)
class Attempt:
    """One try of a task under a lease, and what the task is."""

    id: int
    task: int
    lease: str
    worker: int
    state: AttemptState
    started: float
    message: str
    log: str
    given: int
    job: int
    frame: int
    parent: int | None
    kind: TaskKind
    top: int
    bottom: int


@dataclass(frozen=True)
class Member:
    """A worker as the farm knows it; ``aside`` is why its pictures are not trusted.

    ``owner`` is with whose key it has joined.
    """

    id: int
    name: str
    token: str
    state: WorkerState
    code: str
    cores: int
    memory: int
    system: str
    engines_json: str
    tags_json: str
    address: str
    joined: float
    aside: str
    owner: str

    @functools.cached_property
    def engines(self) -> Mapping[str, str]:
        """What it renders with."""
        return engines_of(self.engines_json)


@dataclass(frozen=True)
class Person:
    """One of the farm's people, or a program; ``token`` is the hash of its secret.

    With ``uses`` it is an invitation for so many more, and ``token`` what their keys are made of.
    """

    name: str
    role: Role
    token: str
    limits_json: str
    added: float
    uses: int | None = None

    @functools.cached_property
    def limits(self) -> dict[str, int]:
        """The limits that are not those of everybody."""
        limits: dict[str, int] = json.loads(self.limits_json)
        return limits


@dataclass(frozen=True)
class Event:
    """Something that happened, for people.

    ``owner`` is whose job it was, ``who`` the person who did it, if it was one.
    """

    id: int
    time: float
    job: int | None
    frame: int | None
    worker: int | None
    what: str
    text: str
    owner: str
    who: str


@dataclass(frozen=True)
class Written:
    """A file that a scene wrote; without a hash where it was left on the worker."""

    path: str
    frame: int
    sha256: str
    size: int


@functools.lru_cache(maxsize=1024)
def _options_in(text: str) -> JobOptions:
    return JobOptions(**json.loads(text))


@functools.lru_cache(maxsize=1024)
def engines_of(text: str) -> Mapping[str, str]:
    """Read a worker's engines: the same for most."""
    engines: dict[str, str] = json.loads(text)
    return engines


DONE = ("frames", "wall", "failures")  # what is counted of a worker's


def _said(info: WorkerInfo) -> dict[str, Any]:
    return {**vars(info), "engines": json.dumps(dict(info.engines)), "tags": json.dumps(info.tags)}


class _Known:
    """The workers by their secrets, and the people by their names in small letters.

    As they were read last, until one ``changes``.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.lists: dict[type, tuple[int, Mapping[str, Any]]] = {}


_Record = TypeVar("_Record")
_MEMBERS: Mapping[str, Mapping[str, Word]] = {kind.__name__: {word.value: word for word in kind}
    for kind in (TaskState, JobState, AttemptState, WorkerState, TaskKind, Role)}


def _records(kind: type[_Record], cursor: sqlite3.Cursor) -> Iterator[_Record]:
    """Make a record of each row, whose columns have the names of the fields and may be more."""
    names = [column[0] for column in cursor.description]
    words = [(name, _MEMBERS[form]) for name, form in kind.__annotations__.items()
             if form in _MEMBERS]
    for row in cursor:
        # Not by __init__, which takes four times as long, and a job may have a million frames.
        record = object.__new__(kind)
        values = record.__dict__
        values.update(zip(names, row))
        for name, members in words:
            values[name] = members[values[name]]
        yield record


def present(record: _Record | None) -> _Record:
    """Return a record that must be there: a foreign key, or the statement, says so."""
    assert record is not None
    return record


_DATABASE_TAKES_NOTHING = re.compile("is full|disk I/O|readonly")  # SQLite's own words
_BACKUP_LOOKS = 5  # at a farm in which jobs are deleted meanwhile


class Store:
    """The farm's database and blobs under one data directory.

    ``durable`` False skips the waits for the disk: for a farm whose data
    nobody needs after its process has ended. Who waits for the disk does so outside of the
    ``gate``. Raises ``StoreError`` when the
    directory or the database cannot be used, and ``NoRoom`` when the disk takes
    nothing: then ``notice`` says so until ``look_for_room`` finds that it does.
    """

    def __init__(self, root: Path, durable: bool = True, gate: Gate | None = None) -> None:
        self.root = root
        self.durable = durable
        self.gate = gate or Gate()
        self._lock = threading.RLock()
        self._readers: list[sqlite3.Connection] = []
        self._flushes: dict[Path, SharedFlush] = {}
        self._known = _Known()
        self._closed = False
        self.notice = ""
        try:
            if version := self._version(root):
                _check_version(root, version)
            for name in ("blobs", "jobs"):
                self._make(root / name)
            self._writer = self._connect()
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                if not version:
                    self._writer.executescript(f"BEGIN IMMEDIATE; {SCHEMA}; PRAGMA user_version = "
                                               f"{SCHEMA_VERSION}; COMMIT;")
                self._log = open(root / "farm.db-wal", "rb+", buffering=0)  # noqa: SIM115
            except (OSError, sqlite3.Error):
                self._writer.close()
                raise
            self._flush_log = SharedFlush(lambda: os.fsync(self._log.fileno()))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the data directory {root} cannot be used: {error}") from None

    def close(self) -> None:
        """Close every connection, those in use as soon as they no longer are."""
        with self._lock:
            self._closed = True
            self._log.close()
            for connection in [self._writer, *self._readers]:
                connection.close()

    @contextlib.contextmanager
    def tx(self) -> Iterator[Tx]:
        """One writer at a time: all of the block is done, or nothing of it.

        It is on the disk at the end; meanwhile others write and see it already.
        """
        with self._noticing():
            with self._lock:
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    tx = Tx(self._writer, self._known)
                    yield tx
                    self._writer.execute("COMMIT")
                    self._known.changes += tx.changes < 0
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    raise
            if self.durable:
                with self.gate.outside():
                    self._flush_log()

    @contextlib.contextmanager
    def read(self) -> Iterator[Look]:
        """Look at the database as it is at this moment."""
        try:  # without a lock: who reads waits for nobody
            connection = self._readers.pop()
        except IndexError:
            connection = self._connect(writes=False)
        try:
            connection.execute("BEGIN")
            yield Look(connection, self._known)
        finally:
            connection.execute("COMMIT")
            if self._closed:
                connection.close()
            else:
                self._readers.append(connection)

    def blob_path(self, sha256: str) -> Path:
        """Return where the contents with this hash are, or would be."""
        return self.root / "blobs" / sha256[:2] / sha256[2:]

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> int:
        """Store contents as they come and return their size in bytes.

        ``Damaged``, and nothing kept, when the hash is another one.
        """
        digest, size = hashlib.sha256(), 0
        with self.placing(self.blob_path(sha256)) as part, open(part, "wb") as file:
            for chunk in chunks:
                self.need(len(chunk))
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise Damaged("the contents do not have the hash that they came under")
        return size

    def job_directory(self, job: int, name: str) -> Path:
        """Return the directory of a job's images, such as ``jobs/7-camera2``."""
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "job"
        return self.root / "jobs" / f"{job}-{slug}"

    def place(self, job: Job, task: Task) -> Path:
        """Return where the file of a task is, or would be."""
        return Path(*place_of(self.job_directory(job.id, job.name), task))

    def state_path(self, job: Job, task: Task) -> Path:
        """Return where the state of a task is that a stopped render has left, if any."""
        return self.job_directory(job.id, job.name) / "parts" / f"{task.id}.state"

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """Make a directory for what comes in, which goes with all that is left in it."""
        place = self.root / "incoming" / secrets.token_hex(8)
        with self._noticing():
            try:
                place.mkdir(parents=True)
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)

    def put_image(self, directory: Path, name: str, data: Path | bytes) -> None:
        """Store a finished image, or the file of one, so that it is there whole or not at all."""
        with self.placing(safe_join(directory, name)) as part:
            if isinstance(data, Path):
                _link(data, part)
            else:
                self.need(len(data))
                part.write_bytes(data)

    def move_image(self, made: Path, directory: Path, name: str) -> None:
        """Bring an image that ``placing`` made elsewhere in the directory to where it belongs."""
        with self._noticing():
            made.replace(safe_join(directory, name))
            self._flush(directory)

    def put_log(self, directory: Path, name: str, text: bytes) -> str:
        """Keep the renderer's text of one attempt; return its name below ``directory``."""
        with self._noticing():
            self._make(directory / "logs")
            safe_join(directory / "logs", name).write_bytes(text)
        return f"logs/{name}"

    @contextlib.contextmanager
    def placing(self, path: Path) -> Iterator[Path]:
        """Name a file to write: it is at ``path`` whole, and durable, or not at all."""
        with self._noticing():
            self._make(path.parent)
            with placed(path) as part:
                yield part
                if self.durable:
                    with open(part, "r+b") as file, self.gate.outside():
                        os.fsync(file.fileno())
            self._flush(path.parent)

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
            with self.placing(self.root / "probe") as part:
                part.write_bytes(bytes(1 << 20))
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
        """Note that the disk is full: while there is a notice, nothing is leased."""
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
                _check_version(root, cls._version(root))
                with contextlib.closing(sqlite3.connect(root / "farm.db", timeout=30)) as source, \
                        contextlib.closing(sqlite3.connect(part / "farm.db")) as copy:
                    source.backup(copy)
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
    def _copy_files(cls, root: Path, to: Path) -> list[str]:
        """Copy what lies beside the database; return what is not there although it should be.

        A file that the database names may be gone because its job was deleted
        after the database was copied: then both are copied again.
        """
        paths = [root / "farm.key", root / "povfarm.ini"]
        for name in ("blobs", "jobs", "workers"):
            paths += [Path(place, file) for place, _, files in os.walk(root / name)
                      for file in files if not re.fullmatch(r"\..*\.part", file)]
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
            jobs, newest = {str(job.id) for job in tx.jobs(0, -1)}, tx.newest_job()
            states = {f"{task}.state" for task in tx.states()}
        idle = [path for path in (self.root / "blobs").glob("*/*") if path not in kept]
        idle += [path for path in (self.root / "jobs").glob("*/parts/*")
                 if path not in kept and path.name not in states]
        idle += [*self.root.glob(".*.part"), *(self.root / "jobs").glob("*/.*.part")]
        for path in idle:
            with contextlib.suppress(OSError):
                path.unlink()
        shutil.rmtree(self.root / "incoming", ignore_errors=True)
        for path in (self.root / "jobs").iterdir():
            number = path.name.partition("-")[0]
            if number.isdecimal() and int(number) <= newest and number not in jobs:
                shutil.rmtree(path, ignore_errors=True)

    def _images(self, tx: Look) -> list[Path]:
        places = {job.id: self.job_directory(job.id, job.name) for job in tx.jobs(0, -1)}
        images = [Path(*place_of(places[task.job], task)) for task in tx.done_tasks()]
        return images + [places[kept.job] / "parts" / kept_name(tx.task(kept.task), kept.id)
                         for kept in tx.kept_images()]

    def _flush(self, directory: Path) -> None:
        if self.durable:
            with self.gate.outside():
                self._flushes.setdefault(directory, SharedFlush(
                    functools.partial(sync_directory, directory)))()

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
            # NORMAL flushes what a checkpoint needs; what a transaction needs is flushed in `tx`.
            level = "PRAGMA synchronous = NORMAL" if self.durable else "PRAGMA synchronous = OFF"
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


def _check_version(root: Path, version: int) -> None:
    """Refuse the database of another version: it is neither read nor changed."""
    if version != SCHEMA_VERSION:
        age = "a newer" if version > SCHEMA_VERSION else "an older"
        raise StoreError(f"{root / 'farm.db'} was written by {age} povfarm: use that version, or "
                         "another --data")


def place_of(directory: Path, task: Task) -> tuple[Path, str]:
    """Return the directory and the name of a task's file: parts have their own until joined."""
    if not task.is_part:
        return directory, task.name
    suffix = PurePosixPath(task.name).suffix if task.kind is TaskKind.SLICE else ".zip"
    return directory / "parts", f"{task.id}{suffix}"


def _link(source: Path, to: Path) -> None:
    """Give a file a second name, or copy it where that cannot be; nothing when it is there."""
    status = source.stat()
    if to.exists():
        there = to.stat()
        if (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            return
        to.unlink()
    to.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(source, to)


def kept_name(task: Task, attempt: int) -> str:
    """Return the name in ``parts`` of an image that waits to be compared."""
    return f"{task.id}.{attempt}{PurePosixPath(task.name).suffix}"


class _Register:
    """One look at the database: the workers and the people."""

    def __init__(self, connection: sqlite3.Connection, known: _Known) -> None:
        self._db = connection
        self._known = known
        self.changes = known.changes  # before the database is looked at; -1 when it has changed

    def _do(self, sql: str, /, **values: Any) -> sqlite3.Cursor:
        return self._db.execute(sql, values)

    def _all(self, kind: type[_Record], sql: str, /, **values: Any) -> list[_Record]:
        return list(_records(kind, self._db.execute(sql, values)))

    def _one(self, kind: type[_Record], sql: str, /, **values: Any) -> _Record | None:
        return next(iter(self._all(kind, sql, **values)), None)

    def worker(self, worker: int) -> Member:
        """Return a worker that is known, or was removed."""
        return present(self.find_worker(worker))

    def find_worker(self, worker: int) -> Member | None:
        """Return one worker."""
        return self._one(Member, "SELECT * FROM worker WHERE id = :id", id=worker)

    def totals(self) -> list[tuple[Member, list[float]]]:
        """Return what each worker has done, also one that is gone or was removed: frames, seconds,
        and tries that failed."""
        return [(row, [vars(row)[name] for name in DONE]) for row in self._all(
            Member, "SELECT * FROM worker ORDER BY id")]

    def idle_guests(self, before: float) -> list[int]:
        """Return the workers of other systems, whose tokens are no hashes, without a try since."""
        return [row["id"] for row in self._do("""
            SELECT id FROM worker WHERE state = 'admitted' AND token LIKE '% %'
            AND joined < :before AND COALESCE((
              SELECT started FROM attempt WHERE attempt.worker = worker.id
              ORDER BY attempt.id DESC LIMIT 1), 0) < :before""", before=before)]

    def was_removed(self, token: str) -> bool:
        """Tell whether a worker that was removed had the secret with this hash."""
        return self._do("""
            SELECT 1 FROM worker WHERE state = 'removed'
              AND token = 'removed ' || id || ' ' || :token""", token=token).fetchone() is not None

    def workers(self) -> list[Member]:
        """Return every worker that was not removed."""
        return list(self._members().values())

    def worker_by_token(self, token: str) -> Member | None:
        """Return the worker whose secret has this hash."""
        return self._members().get(token)

    def _members(self) -> Mapping[str, Member]:
        """Return the workers that were not removed, by the hashes of their secrets."""
        return self._listed(Member, lambda: {row.token: row for row in self._all(Member, """
            SELECT * FROM worker WHERE state != 'removed' ORDER BY id""")})

    def _listed(self, kind: type[_Record],
                read: Callable[[], dict[str, _Record]]) -> Mapping[str, _Record]:
        """Return what is known, read again only after a change."""
        changes, known = self._known.lists.get(kind, (-1, {}))
        if changes != self.changes or changes < 0:
            known = read()
            if self.changes >= 0:
                self._known.lists[kind] = self.changes, known
        return known

    def person(self, name: str, invited: bool = False) -> Person | None:
        """Return one of the people, however large or small the letters are written.

        Or an ``invited`` person, of whom only an invitation is there.
        """
        found = self._people().get(name.casefold())
        return found if found and (found.uses is not None) == invited else None

    def people(self, invited: bool = False) -> list[Person]:
        """Return all people and programs, by name; or the invitations."""
        return [one for one in self._people().values() if (one.uses is not None) == invited]

    def _people(self) -> Mapping[str, Person]:
        return self._listed(Person, lambda: {row.name.casefold(): row for row in self._all(
            Person, "SELECT * FROM person ORDER BY name")})

    def usage(self, owner: str) -> Allowance:
        """Return what somebody has: unfinished jobs and frames, and the bytes that are kept."""
        jobs, frames, kept = self._do("""
            SELECT SUM(jobs), SUM(frames), SUM(kept) FROM turn WHERE owner = :owner""",
            owner=owner).fetchone()
        return Allowance(jobs or 0, frames or 0, space=kept or 0)

    def has_jobs(self, owner: str) -> bool:
        """Tell whether there are jobs, finished or not, of somebody with nearly this name."""
        return owner.casefold() in {row["owner"].casefold() for row in self._do(
            "SELECT DISTINCT owner FROM job")}


class Look(_Register):
    """One look at the database: every question that the farm asks it, by name."""

    # --- the farm itself

    def meta(self, key: str) -> str:
        """Return a value of the farm itself, or an empty text."""
        row = self._do("SELECT value FROM meta WHERE key = :key", key=key).fetchone()
        return row["value"] if row else ""

    def events(self, after: int, limit: int) -> list[Event]:
        """Return events with a higher id, oldest first."""
        return self._all(Event, "SELECT * FROM event WHERE id > :after ORDER BY id LIMIT :limit",
                         after=after, limit=limit)

    def events_of_farm(self, limit: int) -> list[Event]:
        """Return the newest events that are of no frame, the oldest first."""
        return self._all(Event, """
            SELECT * FROM event WHERE frame IS NULL ORDER BY id DESC LIMIT :limit""",
                         limit=limit)[::-1]

    def last_event(self) -> int:
        """Return the id of the newest event, 0 when there is none."""
        return int(self._do("SELECT COALESCE(MAX(id), 0) FROM event").fetchone()[0])

    def first_event(self, job: int) -> int:
        """Return the id of the event with which a job began."""
        return int(self._do("SELECT COALESCE(MIN(id), 0) FROM event WHERE job = :job",
                            job=job).fetchone()[0])

    # --- files

    def stored_blobs(self) -> list[str]:
        """Return the hash of everything that is stored."""
        return [row["sha256"] for row in self._do("SELECT sha256 FROM blob")]

    def is_stored(self, sha256: str) -> bool:
        """Tell whether these contents are recorded."""
        return self._do("SELECT 1 FROM blob WHERE sha256 = :sha256",
                        sha256=sha256).fetchone() is not None

    def blob_wanted(self, sha256: str) -> bool:
        """Tell whether a manifest names these contents."""
        return self._do("SELECT 1 FROM manifest_blob WHERE sha256 = :sha256 LIMIT 1",
                        sha256=sha256).fetchone() is not None

    def manifest(self, key: str) -> str:
        """Return a manifest's JSON text, or an empty text."""
        row = self._do("SELECT wire FROM manifest WHERE key = :key", key=key).fetchone()
        return row["wire"] if row else ""

    def unknown_manifests(self, keys: Sequence[str]) -> list[str]:
        """Return those of the keys that are no job's (any more)."""
        return [row["value"] for row in self._do("""
            SELECT value FROM json_each(:keys) WHERE value NOT IN (SELECT key FROM manifest)""",
            keys=json.dumps(keys))] if keys else []

    def extent(self, job: int) -> tuple[int, int, int]:
        """Return how many files a job's project has (each content once), their bytes, and the
        number of the files that its scene wrote."""
        files, size, written = self._do("""
            SELECT COUNT(*), TOTAL(blob.size),
                   (SELECT COUNT(*) FROM written WHERE written.job = :job)
            FROM job JOIN manifest_blob ON manifest_blob.manifest = job.manifest
            LEFT JOIN blob ON blob.sha256 = manifest_blob.sha256 WHERE job.id = :job""",
            job=job).fetchone()
        return files, int(size), written

    def missing_blobs(self, manifest: str) -> list[str]:
        """Return the hashes that a manifest names and that are not stored."""
        return [row["sha256"] for row in self._do("""
            SELECT sha256 FROM manifest_blob WHERE manifest = :key
            AND sha256 NOT IN (SELECT sha256 FROM blob) ORDER BY sha256""", key=manifest)]

    def missing_files(self) -> dict[int, set[str]]:
        """Return what ``missing_blobs`` does for each job that waits."""
        return {row["id"]: set(self.missing_blobs(row["manifest"])) for row in self._do("""
            SELECT id, manifest FROM job WHERE state = 'waiting'""").fetchall()}

    def unused_blobs(self, before: float) -> list[str]:
        """Return the hashes that nobody names and that are older than ``before``."""
        return [row["sha256"] for row in self._do("""
            SELECT sha256 FROM blob WHERE stored < :before
            AND sha256 NOT IN (SELECT sha256 FROM manifest_blob)
            AND sha256 NOT IN (SELECT sha256 FROM written)""", before=before)]

    def written(self, job: int) -> list[Written]:
        """Return the files that the scene of a job wrote."""
        return self._all(Written, """
            SELECT path, frame, sha256, size FROM written WHERE job = :job ORDER BY path""",
            job=job)

    # --- jobs

    def job(self, job: int) -> Job:
        """Return one job; ``NotFound`` when there is none."""
        found = self.find_job(job)
        if found is None:
            raise NotFound(f"there is no job {job}")
        return found

    def find_job(self, job: int) -> Job | None:
        """Return one job, None when there is none."""
        return self._one(Job, "SELECT * FROM job WHERE id = :id", id=job)

    def jobs(self, after: int, limit: int, owner: str = "") -> list[Job]:
        """Return jobs, the newest first; ``after`` is the last id already seen, or 0."""
        return self._all(Job, """
            SELECT * FROM job WHERE (:after = 0 OR id < :after) AND :owner IN ('', owner)
            ORDER BY id DESC LIMIT :limit""", after=after, limit=limit, owner=owner)

    def newest_job(self) -> int:
        """Return the highest number that a job ever had; numbers are not used again."""
        row = self._do("SELECT seq FROM sqlite_sequence WHERE name = 'job'").fetchone()
        return int(row["seq"]) if row else 0

    def leasable_jobs(self, over: bool = False,
                      may: Callable[[str], bool] | None = None) -> Iterator[Job]:
        """Yield active jobs that have something to give out, in the order in which they are served.

        Frames, slices or passes that wait for a worker, or rows that are not cut; when it is
        looked ``over``, also what others render. Higher priority first; among equals those of
        the owner with the fewest runs under way, then of the one for whom cores were busy for
        the shortest time; of one owner the job with the fewest runs, so that each gets its
        share; then the oldest. Owners whom ``may`` denies get nothing.
        """
        for owner, priority in self._do("""
                SELECT owner, priority FROM turn INDEXED BY turn_next WHERE active > 0
                ORDER BY priority DESC, runs, spent, owner"""):
            yield from () if may and not may(owner) else _records(Job, self._do("""
                SELECT * FROM job INDEXED BY job_turn
                WHERE owner = :owner AND priority = :priority
                  AND state = 'active' AND queued + leased > 0 AND (queued > 0 OR :over
                  OR EXISTS (SELECT 1 FROM task INDEXED BY task_part
                             WHERE task.job = job.id AND state = 'queued' AND parent IS NOT NULL)
                  OR EXISTS (SELECT 1 FROM task INDEXED BY task_cut
                             WHERE task.job = job.id AND state = 'leased' AND cut IS NOT NULL
                             AND cut < bottom))
                ORDER BY runs, id""", owner=owner, priority=priority, over=over))

    def open_tasks(self) -> int:
        """Return how many frames the active jobs have that are not finished."""
        return int(self._do("""
            SELECT TOTAL(queued + leased) FROM job INDEXED BY job_turn
            WHERE state = 'active'""").fetchone()[0])

    def left_rows(self) -> set[int]:
        """Return the numbers of jobs that are not there but of which there may be rows."""
        return {int(row["key"][5:]) for row in self._do("""
            SELECT key FROM meta WHERE key > 'rows ' AND key < 'rows:'""")}

    def half_cancelled(self) -> set[int]:
        """Return the cancelled jobs of which frames still wait or are out."""
        return {row["id"] for row in self._do("""
            SELECT id FROM job WHERE state = 'cancelled' AND queued + leased > 0""")}

    # --- tasks

    def task(self, task: int) -> Task:
        """Return a task that something in the database belongs to."""
        return present(self.find_task(task))

    def find_task(self, task: int) -> Task | None:
        """Return one task, None when it is gone."""
        return self._one(Task, "SELECT * FROM task WHERE id = :id", id=task)

    def task_of_frame(self, job: int, frame: int) -> Task | None:
        """Return the task of one frame."""
        return self._one(Task, """
            SELECT * FROM task WHERE job = :job AND frame = :frame AND slice = 0""",
            job=job, frame=frame)

    def tasks(self, job: int, after: int = -1, limit: int = -1,
              since: float = 0.0) -> list[Task]:
        """Return a job's frames; ``after`` is the last one already seen.

        Those of which something was told ``since`` a time; all where that is longer ago than
        events are kept.
        """
        return self._all(Task, """
            SELECT * FROM task WHERE job = :job AND frame > :after AND slice = 0
            AND (:since <= COALESCE((SELECT time FROM event ORDER BY id LIMIT 1), :since)
                 OR frame IN (SELECT frame FROM event WHERE job = :job AND time > :since))
            ORDER BY frame LIMIT :limit""", job=job, after=after, limit=limit, since=since)

    def starts(self, job: int, tasks: Sequence[Task]) -> dict[int, float]:
        """Return when the renders began that count of frames in order, by their numbers."""
        return dict(map(tuple, self._do("""
            SELECT task.frame, MAX(attempt.started) FROM task
            JOIN attempt ON attempt.task = task.id AND attempt.state IN ('live', 'done', 'failed')
            WHERE task.job = :job AND task.frame BETWEEN :low AND :high GROUP BY task.frame""",
            job=job, low=tasks[0].frame, high=tasks[-1].frame))) if tasks else {}

    def last_start(self, job: int) -> float | None:
        """Return when something of a job was given out last."""
        return cast("float | None", self._do(
            "SELECT MAX(granted) FROM lease WHERE job = :job", job=job).fetchone()[0])

    def frame_states(self, job: int) -> list[tuple[int, str]]:
        """Return the number and the state of each frame of a job."""
        return list(map(tuple, self._do("""
            SELECT frame, state FROM task WHERE job = :job AND slice = 0
            ORDER BY frame""", job=job)))

    def tasks_in(self, job: int, state: TaskState) -> list[Task]:
        """Return the frames of a job that are in one state."""
        return self._all(Task, """
            SELECT * FROM task WHERE job = :job AND state = :state AND slice = 0
            ORDER BY frame""", job=job, state=state.value)

    def next_tasks(self, job: int, worker: int, limit: int, low: int, high: int,
                   fresh: bool = False) -> list[Task]:
        """Return queued whole frames from ``low`` to ``high`` that this worker has not failed or
        rendered yet; only ``fresh`` ones, which nobody failed, or all."""
        return self._all(Task, """
            SELECT * FROM task WHERE job = :job AND state = 'queued' AND slice = 0
            AND frame BETWEEN :low AND :high AND cut IS NULL AND tries * :fresh = 0
            AND NOT EXISTS (
              SELECT 1 FROM attempt WHERE attempt.task = task.id
              AND attempt.worker = :worker AND attempt.state = 'failed')
            AND NOT EXISTS (
              SELECT 1 FROM attempt WHERE attempt.task = task.id
              AND attempt.worker = :worker AND attempt.state = 'kept')
            ORDER BY frame LIMIT :limit""",
            job=job, worker=worker, limit=limit, low=low, high=high, fresh=fresh)

    def last_queued(self, job: int, low: int, high: int) -> int:
        """Return the last frame from ``low`` to ``high`` that is queued, ``low`` if none is."""
        return int(self._do("""
            SELECT COALESCE(MAX(frame), :low) FROM task WHERE job = :job AND state = 'queued'
            AND slice = 0 AND frame BETWEEN :low AND :high""",
            job=job, low=low, high=high).fetchone()[0])

    def newest_task_of(self, job: int) -> Task | None:
        """Return the frame of one job that was finished last."""
        return self._one(Task, """
            SELECT * FROM task INDEXED BY task_done
            WHERE job = :job AND state = 'done' AND parent IS NULL
            ORDER BY finished DESC, id DESC LIMIT 1""", job=job)

    def newest_task_by(self, worker: int) -> Task | None:
        """Return the frame that one worker has finished last."""
        return self._one(Task, """
            SELECT task.* FROM attempt INDEXED BY attempt_recent JOIN task ON task.id = attempt.task
            WHERE attempt.worker = :worker AND task.state = 'done' AND task.parent IS NULL
            AND attempt.state = 'done' ORDER BY attempt.id DESC LIMIT 1""", worker=worker)

    def neighbours(self, job: int, frame: int) -> list[Task]:
        """Return the finished frames that are the nearest before and after a frame."""
        return self._all(Task, """
            SELECT * FROM task WHERE job = :job AND slice = 0 AND frame IN (
              (SELECT MAX(frame) FROM task WHERE job = :job AND state = 'done'
               AND slice = 0 AND frame < :frame),
              (SELECT MIN(frame) FROM task WHERE job = :job AND state = 'done'
               AND slice = 0 AND frame > :frame))""", job=job, frame=frame)

    def states(self) -> list[int]:
        """Return the tasks of which the state of a stopped render is kept."""
        return [row["id"] for row in self._do("SELECT id FROM task WHERE state_of != ''")]

    def recent_walls(self, job: int) -> list[float]:
        """Return how long the frames took that a job finished last, in seconds."""
        return [row["wall"] for row in self._do("""
            SELECT wall FROM task INDEXED BY task_done
            WHERE job = :job AND state = 'done' AND parent IS NULL
            ORDER BY finished DESC LIMIT 99""", job=job) if row["wall"]]

    # --- slices of frames, and the passes that slices share

    def parts(self, frame: int, kind: TaskKind | None = None) -> list[Task]:
        """Return the slices and the passes of a frame, or those of one kind, by their rows."""
        return self._all(Task, """
            SELECT * FROM task WHERE parent = :frame AND kind = COALESCE(:kind, kind)
            ORDER BY top, slice""", frame=frame, kind=kind and kind.value)

    def slice_states(self, frame: int) -> set[TaskState]:
        """Return the states in which slices of a frame are."""
        return {TaskState(row["state"]) for row in self._do("""
            SELECT DISTINCT state FROM task WHERE parent = :frame AND kind = 'slice'""",
            frame=frame)}

    def queued_parts(self, job: int) -> list[Task]:
        """Return the slices and passes of a job that wait for a worker."""
        return self._all(Task, """
            SELECT * FROM task INDEXED BY task_part
            WHERE job = :job AND state = 'queued' AND parent IS NOT NULL
            ORDER BY frame, top""", job=job)

    def frames_with_parts(self, job: int) -> list[Task]:
        """Return the frames of a job that have slices or passes."""
        return self._all(Task, """
            SELECT * FROM task WHERE id IN (
              SELECT parent FROM task WHERE job = :job AND parent IS NOT NULL)
            ORDER BY frame""", job=job)

    def frames_to_cut(self, job: int) -> list[Task]:
        """Return the frames of which some rows are given out as slices, or will be."""
        return self._all(Task, """
            SELECT * FROM task INDEXED BY task_cut
            WHERE job = :job AND state IN ('queued', 'leased') AND cut IS NOT NULL
            ORDER BY frame""", job=job)

    def frames_to_join(self) -> list[Task]:
        """Return the sliced frames that are not done although every slice of them is."""
        return self._all(Task, """
            SELECT * FROM task INDEXED BY task_cut WHERE cut IS NOT NULL AND cut = bottom
            AND state IN ('leased', 'failed') AND job IN (SELECT id FROM job) AND NOT EXISTS (
              SELECT 1 FROM task AS part WHERE part.parent = task.id
              AND part.kind = 'slice' AND part.state != 'done')""")

    def slice_costs(self, job: int) -> list[tuple[int, float, float]]:
        """Return how fast the slices were that were finished last: worker, rows a second and
        the least seconds before the first row."""
        return [(row["worker"], row["rows"] / max(row["wall"], 0.01), row["parse"] or 0.0)
                for row in self._do("""
            SELECT worker, SUM(bottom - top) AS rows, SUM(wall - parse) AS wall,
                   MIN(parse) AS parse
            FROM (SELECT * FROM task INDEXED BY task_slice
                  WHERE job = :job AND kind = 'slice' AND state = 'done' AND wall > 0
                  ORDER BY finished DESC LIMIT 64)
            GROUP BY worker""", job=job)]

    # --- attempts

    def attempt(self, task: int, lease: str) -> Attempt | None:
        """Return the attempt of a task under a lease, also when the task became a slice since."""
        return self._one(Attempt, """
            SELECT * FROM try WHERE lease = :lease AND task IN (
              SELECT :task UNION ALL SELECT id FROM task WHERE parent = :task)""",
            task=task, lease=lease)

    def attempts(self, frame: int) -> list[Attempt]:
        """Return every attempt of a frame and its slices, oldest first."""
        return self._all(Attempt, "SELECT * FROM try WHERE :frame IN (task, parent) ORDER BY id",
                         frame=frame)

    def live_attempts(self) -> list[Attempt]:
        """Return every attempt that is under way, the oldest lease first."""
        return self._all(Attempt, """
            SELECT try.* FROM try JOIN lease ON lease.id = try.lease
            WHERE try.state = 'live' AND lease.ended IS NULL AND try.job IN (SELECT id FROM job)
            ORDER BY lease.granted, try.id""")

    def attempts_of_lease(self, lease: str) -> list[Attempt]:
        """Return every attempt under a lease in the order of frames."""
        return self._all(Attempt, "SELECT * FROM try WHERE lease = :lease ORDER BY frame",
                         lease=lease)

    def failed_workers(self, task: int) -> set[int]:
        """Return the workers that failed a task."""
        return {row["worker"] for row in self._do("""
            SELECT DISTINCT worker FROM attempt WHERE task = :task AND state = 'failed'""",
            task=task)}

    def kept(self, task: int) -> list[Attempt]:
        """Return the attempts of a task whose images wait to be compared, the oldest first."""
        return self._all(Attempt, """
            SELECT * FROM try WHERE task = :task AND state = 'kept' ORDER BY id""", task=task)

    def failures(self, job: int, worker: int) -> int:
        """Return how many attempts of a job failed on one worker."""
        # CROSS JOIN: from the failures, which are few, to their tasks.
        return int(self._do("""
            SELECT COUNT(*) FROM attempt CROSS JOIN task ON task.id = attempt.task
            WHERE attempt.worker = :worker AND attempt.state = 'failed' AND task.job = :job""",
            job=job, worker=worker).fetchone()[0])

    def has_done(self, job: int, worker: int) -> bool:
        """Tell whether one worker rendered a frame of a job."""
        return self._do("""
            SELECT 1 FROM attempt CROSS JOIN task ON task.id = attempt.task
            WHERE attempt.worker = :worker AND attempt.state = 'done' AND task.job = :job
            LIMIT 1""", job=job, worker=worker).fetchone() is not None

    def recent_attempts(self, worker: int, limit: int) -> list[str]:
        """Return how a worker's last attempts ended, the newest first.

        Failures count only in jobs of which some frame was rendered: where
        none was, the scene is to blame.
        """
        return [row["state"] for row in self._do("""
            SELECT attempt.state AS state FROM attempt JOIN task ON task.id = attempt.task
            WHERE attempt.worker = :worker AND (attempt.state IN ('done', 'kept') OR (
                attempt.state = 'failed' AND EXISTS (
                    SELECT 1 FROM job WHERE job.id = task.job AND job.done > 0)))
            ORDER BY attempt.id DESC LIMIT :limit""", worker=worker, limit=limit)]

    def first_failure(self, job: int) -> Attempt | None:
        """Return the last try of the first frame that failed, to show to a person.

        While none has failed for good it is the newest of the tries that failed.
        """
        return self._one(Attempt, """
            SELECT * FROM try WHERE id = COALESCE((
              SELECT attempt.id FROM task CROSS JOIN attempt ON attempt.task = task.id
              WHERE task.job = :job AND task.state = 'failed' AND attempt.state = 'failed'
              ORDER BY task.frame, task.slice, attempt.id DESC LIMIT 1), (
              SELECT attempt.id FROM attempt CROSS JOIN task ON task.id = attempt.task
              WHERE task.job = :job AND attempt.state = 'failed'
              ORDER BY attempt.id DESC LIMIT 1))""", job=job)

    # --- files that are kept

    def done_tasks(self) -> list[Task]:
        """Return every finished task whose file is kept.

        Slices are kept until their frame is put together, passes until it is done,
        or for all frames that share them.
        """
        return self._all(Task, """
            SELECT task.* FROM task JOIN job ON job.id = task.job
            LEFT JOIN task AS frame ON frame.id = task.parent
            WHERE task.state = 'done' AND (COALESCE(frame.state, '') != 'done'
              OR (task.kind = 'pass'
                  AND json_extract(job.options_json, '$.radiosity') = 'animation'))""")

    def kept_images(self) -> list[Attempt]:
        """Return every attempt whose image waits to be compared."""
        return self._all(Attempt, """
            SELECT try.* FROM try JOIN task ON task.id = try.task
            WHERE try.state = 'kept' AND task.state != 'done'
            AND try.job IN (SELECT id FROM job)""")


class Tx(Look):
    """One transaction: every statement that changes something, by name."""

    # --- the farm itself

    def set_meta(self, key: str, value: str) -> None:
        """Set a value of the farm itself."""
        self._do("INSERT OR REPLACE INTO meta (key, value) VALUES (:key, :value)",
                 key=key, value=value)

    def add_event(self, now: float, what: str, text: str, job: int | None = None,
                  frame: int | None = None, worker: int | None = None, who: str = "") -> None:
        """Append to the story of the farm."""
        self._do("""
            INSERT INTO event (time, job, frame, worker, what, text, who, owner)
            VALUES (:now, :job, :frame, :worker, :what, :text, :who,
                    COALESCE((SELECT owner FROM job WHERE id = :job), ''))""",
            now=now, job=job, frame=frame, worker=worker, what=what, text=text, who=who)

    def drop_events(self, before: int) -> None:
        """Forget old events."""
        self._do("DELETE FROM event WHERE id < :before", before=before)

    # --- workers

    def add_worker(self, info: WorkerInfo, token: str, state: WorkerState, code: str,
                   address: str, now: float, owner: str = "") -> int:
        """Add a worker and return its id; ``token`` is the hash of its secret."""
        self.changes = -1
        cursor = self._do("""
            INSERT INTO worker (name, token, state, code, cores, memory, system,
                                engines_json, tags_json, address, joined, owner)
            VALUES (:name, :token, :state, :code, :cores, :memory, :system, :engines, :tags,
                    :address, :now, :owner)""",
            owner=owner, token=token, state=state.value, code=code, address=address, now=now,
            **_said(info))
        return int(cursor.lastrowid or 0)

    def set_worker_info(self, worker: int, info: WorkerInfo, address: str) -> None:
        """Replace what a worker says of itself."""
        self.changes = -1
        self._do("""
            UPDATE worker SET name = :name, cores = :cores, memory = :memory, system = :system,
                              engines_json = :engines, tags_json = :tags,
                              address = :address, aside = ''
            WHERE id = :id""",
            id=worker, address=address, **_said(info))

    def set_worker_state(self, worker: int, state: WorkerState) -> bool:
        """Admit or remove a worker, and forget its secret then; False when there is none."""
        self.changes = -1
        return self._do("""
            UPDATE worker SET state = :state,
              token = CASE WHEN :state = 'removed' THEN 'removed ' || id || ' ' || token
                           ELSE token END
            WHERE id = :id AND state != 'removed'""", id=worker, state=state.value).rowcount == 1

    def forget_worker(self, worker: int) -> None:
        """Forget a worker that was never admitted."""
        self.changes = -1
        self._do("DELETE FROM worker WHERE id = :id AND state = 'pending'", id=worker)

    def forget_guest(self, worker: int) -> None:
        """Forget the token of a worker that has done something: it may come as a new one."""
        self.changes = -1
        self._do("UPDATE worker SET state = 'removed', token = 'gone ' || id WHERE id = :id",
                 id=worker)

    def count_work(self, worker: int, frames: float, wall: float, failures: int = 0) -> None:
        """Add to what a worker has done."""
        self._do("""
            UPDATE worker SET frames = frames + :frames, wall = wall + :wall,
                              failures = failures + :failures WHERE id = :id""",
            id=worker, frames=frames, wall=wall, failures=failures)

    # --- people

    def put_person(self, person: Person) -> None:
        """Add a person or an invitation, or replace it."""
        self.changes = -1
        self._do("""
            INSERT OR REPLACE INTO person (name, role, token, limits_json, added, uses)
            VALUES (:name, :role, :token, :limits_json, :added, :uses)""",
            **{**vars(person), "role": person.role.value})

    def drop_person(self, name: str) -> None:
        """Forget a person, and so the secret; or an invitation."""
        self.changes = -1
        self._do("DELETE FROM person WHERE name = :name", name=name)

    def begin_turn(self, owner: str, priority: int) -> None:
        """Let somebody who has no active job of a priority stand in line with those who have.

        What was not used meanwhile is not made up for: that would be at the others' cost.
        """
        self._do("INSERT OR IGNORE INTO turn (owner, priority) VALUES (:owner, :priority)",
                 owner=owner, priority=priority)
        self._do("""
            UPDATE turn SET spent = MAX(spent, COALESCE((
              SELECT MIN(spent) FROM turn INDEXED BY turn_next
              WHERE priority = :priority AND active > 0), 0))
            WHERE owner = :owner AND priority = :priority AND active = 0""",
            owner=owner, priority=priority)

    def set_aside(self, worker: int, why: str) -> None:
        """Note why the pictures of a worker are not trusted."""
        self.changes = -1
        self._do("UPDATE worker SET aside = :why WHERE id = :id", id=worker, why=why)

    # --- files

    def add_blob(self, sha256: str, size: int, now: float) -> None:
        """Record contents that are on disk already."""
        self._do("INSERT OR IGNORE INTO blob (sha256, size, stored) VALUES (:sha256, :size, :now)",
                 sha256=sha256, size=size, now=now)

    def drop_blob(self, sha256: str) -> None:
        """Forget contents, before their file is deleted."""
        self._do("DELETE FROM blob WHERE sha256 = :sha256", sha256=sha256)

    def add_manifest(self, manifest: Manifest) -> None:
        """Record a manifest, once however many jobs use it."""
        self._do("INSERT OR IGNORE INTO manifest (key, wire) VALUES (:key, :wire)",
                 key=manifest.key, wire=json.dumps(manifest.to_wire()))
        self._db.executemany(
            "INSERT OR IGNORE INTO manifest_blob (manifest, sha256) VALUES (:key, :sha256)",
            [{"key": manifest.key, "sha256": file.sha256} for file in manifest.files])

    def drop_manifests(self) -> None:
        """Forget the manifests that no job uses."""
        self._do("DELETE FROM manifest WHERE key NOT IN (SELECT manifest FROM job)")

    def add_written(self, job: int, path: str, frame: int, sha256: str, size: int) -> None:
        """Record a file that a scene wrote, unless that of a later frame is there."""
        self._do("""
            INSERT INTO written (job, path, frame, sha256, size)
            VALUES (:job, :path, :frame, :sha256, :size)
            ON CONFLICT (job, path) DO UPDATE SET
              frame = excluded.frame, sha256 = excluded.sha256, size = excluded.size
            WHERE excluded.frame >= written.frame""",
            job=job, path=path, frame=frame, sha256=sha256, size=size)

    # --- jobs

    def reserve_job(self) -> int:
        """Return a number for a job, to add tasks under; its rows are left ones until it is added.

        Tasks and leases do not refer to the row of their job, which therefore comes and goes
        in one transaction, however many they are.
        """
        job = self.newest_job() + 1
        self._do("DELETE FROM sqlite_sequence WHERE name = 'job'")
        self._do("INSERT INTO sqlite_sequence (name, seq) VALUES ('job', :job)", job=job)
        self.set_meta(f"rows {job}", "")
        return job

    def add_job(self, job: int, name: str, owner: str, pov: PovJob, manifest: str,
                options: JobOptions, now: float, size: int = 0) -> None:
        """Add a waiting job of which all tasks are there; its files have ``size`` bytes."""
        self._do("""
            INSERT INTO job (id, name, state, owner, pov_json, manifest, priority, options_json,
                             created, queued, kept)
            VALUES (:job, :name, 'waiting', :owner, :pov, :manifest, :priority, :options, :now,
                    (SELECT COUNT(*) FROM task WHERE job = :job), :size)""",
            job=job, name=name, owner=owner, pov=json.dumps(pov.to_wire()), manifest=manifest,
            priority=options.priority, options=json.dumps(vars(options)), now=now, size=size)
        self._do("DELETE FROM meta WHERE key = :key", key=f"rows {job}")

    def add_tasks(self, job: int, tasks: Iterable[tuple[int, str]]) -> None:
        """Add queued tasks, given as frame and file name, for a job that is not there yet."""
        self._db.executemany(
            "INSERT INTO task (job, frame, name, state) VALUES (?, ?, ?, 'queued')",
            ((job, frame, name) for frame, name in tasks))

    def set_job_state(self, job: int, frm: JobState, to: JobState, reason: str,
                      finished: float | None) -> bool:
        """Move a job from one state to another; False when it was in neither."""
        return self._do("""
            UPDATE job SET state = :to, reason = :reason, finished = :finished
            WHERE id = :id AND state = :frm""",
            id=job, frm=frm.value, to=to.value, reason=reason, finished=finished).rowcount == 1

    def set_job_engines(self, job: int, engines: str) -> None:
        """Note what the worker has that begins a job, as JSON text."""
        self._do("UPDATE job SET engines_json = :engines WHERE id = :id", id=job, engines=engines)

    def set_job_options(self, job: int, options: JobOptions) -> None:
        """Change how a job is treated."""
        self._do("UPDATE job SET priority = :priority, options_json = :options WHERE id = :id",
                 priority=options.priority, options=json.dumps(vars(options)), id=job)

    def add_job_cost(self, job: int, cost: Cost) -> None:
        """Add what a finished task cost."""
        self._do("""
            UPDATE job SET cpu = MAX(cpu + :cpu, 0), wall = MAX(wall + :wall, 0)
            WHERE id = :id""", id=job, cpu=cost.cpu, wall=cost.wall)

    def count_task(self, job: int, frm: TaskState, to: TaskState, number: int = 1) -> None:
        """Keep the job's counters equal to its rows when so many tasks change."""
        self._do("""
            UPDATE job SET
              queued = queued + :number * ((:to = 'queued') - (:frm = 'queued')),
              leased = leased + :number * ((:to = 'leased') - (:frm = 'leased')),
              done = done + :number * ((:to = 'done') - (:frm = 'done')),
              failed = failed + :number * ((:to = 'failed') - (:frm = 'failed')),
              cancelled = cancelled + :number * ((:to = 'cancelled') - (:frm = 'cancelled'))
            WHERE id = :id""", id=job, frm=frm.value, to=to.value, number=number)

    def drop_job(self, job: int) -> None:
        """Forget a job with its ticket; its rows are left."""
        self._do("DELETE FROM job WHERE id = :id", id=job)
        self._do("DELETE FROM meta WHERE key LIKE 'ticket %' AND value = :id", id=str(job))
        self.set_meta(f"rows {job}", "")

    def drop_rows(self, job: int, limit: int) -> None:
        """Forget so many of the tasks and leases that were left, with their attempts."""
        parameters = {"job": job, "limit": limit, "key": f"rows {job}"}
        tasks = self._db.execute(
            """DELETE FROM task WHERE id IN (
                 SELECT id FROM task WHERE job = :job LIMIT :limit)""", parameters).rowcount
        if tasks < limit and self._db.execute(
                """DELETE FROM lease WHERE id IN (
                     SELECT id FROM lease WHERE job = :job LIMIT :limit)""",
                parameters).rowcount < limit:
            self._db.execute("DELETE FROM meta WHERE key = :key", parameters)

    def move_frames(self, job: int, frm: TaskState, to: TaskState, why: str, now: float,
                    after: int, limit: int, who: str = "") -> tuple[int, int, int]:
        """Move those without parts of the next so many frames at once, but do not count them.

        They come ``after`` a frame, in order; return how many there were and were moved, and the
        last one. Those that somebody renders stay; what is queued again may be tried by everybody.
        """
        parameters = {"job": job, "frm": frm.value, "to": to.value, "why": why, "now": now,
                      "after": after, "limit": limit, "who": who}
        number, last = self._db.execute(
            """SELECT COUNT(*), COALESCE(MAX(frame), :after) FROM (
                 SELECT frame FROM task WHERE job = :job AND state = :frm AND slice = 0
                 AND frame > :after ORDER BY frame LIMIT :limit)""", parameters).fetchone()
        self._do("CREATE TEMP TABLE IF NOT EXISTS moved (id INTEGER PRIMARY KEY)")
        self._do("DELETE FROM moved")
        self._db.execute(
            """INSERT INTO moved (id) SELECT id FROM task WHERE job = :job AND state = :frm
               AND slice = 0 AND frame > :after AND frame <= :last AND cut IS NULL
               AND NOT EXISTS (SELECT 1 FROM task AS part WHERE part.parent = task.id)
               AND NOT EXISTS (SELECT 1 FROM attempt
                               WHERE attempt.task = task.id AND attempt.state = 'live')""",
            {**parameters, "last": last})
        self._db.execute(
            """INSERT INTO event (time, job, frame, what, text, who, owner)
               SELECT :now, job, frame, :to, :why, :who,
                      COALESCE((SELECT owner FROM job WHERE id = :job), '')
               FROM task WHERE id IN (SELECT id FROM moved) ORDER BY frame""", parameters)
        if to is TaskState.QUEUED:
            self._do("""
                UPDATE attempt SET state = 'released' WHERE state = 'failed'
                AND task IN (SELECT id FROM moved)""")
        moved = self._db.execute(
            """UPDATE task SET state = :to, tries = tries * (:to != 'queued')
               WHERE id IN (SELECT id FROM moved)""", parameters).rowcount
        return number, moved, last

    # --- tasks

    def set_task_state(self, task: int, frm: TaskState, to: TaskState) -> bool:
        """Move a task from one state to another; False when it was not there."""
        return self._do("UPDATE task SET state = :to WHERE id = :id AND state = :frm",
                        id=task, frm=frm.value, to=to.value).rowcount == 1

    def set_task_result(self, task: int, worker: int, sha256: str, size: int, cost: Cost,
                        now: float) -> None:
        """Record the accepted image of a task."""
        self._do("""
            UPDATE task SET worker = :worker, sha256 = :sha256, size = :size, cpu = :cpu,
                            wall = :wall, memory = :memory, parse = :parse, finished = :now,
                            state_of = ''
            WHERE id = :id""",
            id=task, worker=worker, sha256=sha256, size=size, now=now, **vars(cost))

    def make_void(self, task: int) -> None:
        """Forget what became of a task: what was begun counts no more. Its file is there still."""
        self._do("UPDATE attempt SET state = 'void' WHERE task = :id", id=task)
        self._do("""
            UPDATE task SET tries = 0, worker = NULL, finished = NULL, sha256 = NULL, cpu = NULL,
                            wall = NULL, memory = NULL, parse = NULL, state_of = ''
            WHERE id = :id""", id=task)

    def set_tries(self, task: int, tries: int) -> None:
        """Set how often a task has failed."""
        self._do("UPDATE task SET tries = :tries WHERE id = :id", id=task, tries=tries)

    def set_state_of(self, task: int, version: str) -> None:
        """Note which POV-Ray left a state to go on from; empty for none."""
        self._do("UPDATE task SET state_of = :version WHERE id = :id", id=task, version=version)

    def add_part(self, frame: Task, kind: TaskKind, top: int, bottom: int) -> Task:
        """Add a queued slice or pass below a frame and return it."""
        passes, slices = self._do("""
            SELECT MIN(slice) - 1, MAX(slice) + 1 FROM task
            WHERE job = :job AND frame = :frame""", job=frame.job, frame=frame.frame).fetchone()
        number = passes if kind is TaskKind.PASS else slices
        cursor = self._do("""
            INSERT INTO task (job, frame, slice, name, state, parent, kind, top, bottom)
            VALUES (:job, :frame, :number, :name, 'queued', :id, :kind, :top, :bottom)""",
            id=frame.id, job=frame.job, frame=frame.frame, name=frame.name, number=number,
            kind=kind.value, top=top, bottom=bottom)
        return self.task(int(cursor.lastrowid or 0))

    def set_cut(self, frame: int, cut: int, bottom: int) -> None:
        """Note how many rows of a frame are given out as slices, of how many."""
        self._do("UPDATE task SET cut = :cut, bottom = :bottom WHERE id = :id",
                 id=frame, cut=cut, bottom=bottom)

    def set_bottom(self, task: int, bottom: int) -> None:
        """Let a slice end sooner."""
        self._do("UPDATE task SET bottom = :bottom WHERE id = :id", id=task, bottom=bottom)

    def drop_parts(self, frame: int, but_passes: bool = False) -> None:
        """Make a sliced frame a whole one again."""
        self._do("""
            DELETE FROM task WHERE parent = :id AND NOT (kind = 'pass' AND :but)""",
            id=frame, but=but_passes)
        self._do("UPDATE task SET cut = NULL, bottom = 0 WHERE id = :id", id=frame)

    # --- leases and attempts

    def add_lease(self, lease: str, worker: int, job: int, tasks: Iterable[int],
                  now: float) -> None:
        """Add a live lease with one live attempt for each of its tasks."""
        self._do("""
            INSERT INTO lease (id, worker, job, granted)
            VALUES (:lease, :worker, :job, :now)""", lease=lease, worker=worker, job=job, now=now)
        self._do("""
            UPDATE job SET runs = runs + 1, started = COALESCE(started, :now) WHERE id = :job""",
            job=job, now=now)
        self._db.executemany(
            """INSERT INTO attempt (task, lease, worker, state, started, given)
               SELECT id, :lease, :worker, 'live', :now, bottom * (parent IS NOT NULL)
               FROM task WHERE id = :task""",
            [{"task": task, "lease": lease, "worker": worker, "now": now} for task in tasks])

    def end_lease(self, lease: str, job: int, why: str, now: float, spent: float = 0.0) -> None:
        """End a live lease, for which cores were busy for ``spent`` seconds.

        Its attempts are ended by their own statements.
        """
        self._do("UPDATE lease SET ended = :now, why = :why WHERE id = :id",
                 id=lease, why=why, now=now)
        self._do("UPDATE job SET runs = runs - 1 WHERE id = :job", job=job)
        self._do("""
            UPDATE turn SET spent = spent + :spent WHERE (owner, priority) = (
              SELECT owner, priority FROM job WHERE id = :job)""", job=job, spent=spent)

    def end_attempt(self, task: int, lease: str, state: AttemptState, now: float,
                    message: str = "", log: str = "") -> None:
        """End an attempt with its result."""
        self._do("""
            UPDATE attempt SET state = :state, ended = :now, message = :message, log = :log
            WHERE task = :task AND lease = :lease""",
            task=task, lease=lease, state=state.value, now=now, message=message, log=log)

    def end_attempts(self, lease: str, state: AttemptState, now: float, message: str) -> None:
        """End all live attempts under a lease alike."""
        self._do("""
            UPDATE attempt SET state = :state, ended = :now, message = :message
            WHERE lease = :lease AND state = 'live'""",
            lease=lease, state=state.value, now=now, message=message)

    def move_attempts(self, task: int, to: int) -> None:
        """Make attempts at a whole frame attempts at its first slice."""
        self._do("UPDATE attempt SET task = :to WHERE task = :task AND state = 'live'",
                 task=task, to=to)

    def forget_failures(self, task: int) -> None:
        """Let every worker try a task again."""
        self._do("UPDATE attempt SET state = 'released' WHERE task = :task AND state = 'failed'",
                 task=task)


# === 11. SCHEDULER ===========================================================
# The only writer of states, in four rooms. _States: every change of a task or a
# job is held to the tables of MODEL, counted, and ripples, in one transaction.
# _Crew: who is there. _Dealing: who gets what. _Deliveries: what came of it.
# Scheduler is the door to them, and steers jobs. What is in memory (leases that
# live, who was heard of, who waits) may be lost with the process without harm.

KEEP_BLOBS = 24 * 3600.0  # seconds that contents nobody names any more are kept
KEEP_EVENTS = 10_000
KEEP_GUESTS = 7 * 24 * 3600.0  # seconds that a worker of another system is shown when it is gone
LOOK_AGAIN = 1.0  # seconds after which an idle worker looks at what others render
RECENT = 8.0  # seconds over which the speed of a task is taken
SICK_PAUSE = 600.0  # seconds until a sick worker gets one task, to see whether it is well
LEASE_COST = 0.1  # seconds that a lease counts in addition to those that it takes
SHORT_TURN = 1.0  # seconds of frames that a run gets where people take turns
MAX_BROUGHT = 20  # workers of one person
MAX_OPEN = 1000  # workers that nobody answers for
MAX_PENDING = 100  # workers that ask to join,
MAX_PENDING_NETWORK, MAX_PENDING_EACH = 60, 20  # from one network, from one address
INVITED_FOR = 7 * 24 * 3600.0  # seconds that an invitation lasts
STEP = 2000  # frames that one transaction changes at most, so that others have their turn,
STEP_PAUSE = 0.02  # and the seconds that they get for it
LEAST_FREE = 100 << 20  # bytes without which no job is taken: its images need some
ANY_STATE = "any"  # left by a POV-Ray of unknown version


@dataclass(frozen=True)
class Offer:
    """What a worker asks for: up to ``want`` runs at once.

    ``slots`` is how many runs it keeps going at a time, ``idle`` how many of
    its cores have nothing to do. ``job`` is the only one that it takes, 0 for any. It has these
    ``projects``, by their keys, and is answered at once when no job has one of them any more.
    """

    want: int
    slots: int
    idle: int
    job: int = 0
    projects: tuple[str, ...] = ()


class Guest(NamedTuple):
    """How a worker of another system differs from ours.

    It may be silent for ``silence`` seconds, for ``pause`` seconds while it has nothing. It renders
    the jobs that ``takes`` accepts, ``most`` frames at a time, and slices of those that ``cuts``
    does.
    """

    silence: float
    pause: float
    takes: Callable[[Look, Job], bool]
    cuts: Callable[[Job], bool]
    most: int | None = None


class Grant:
    """A lease that lives: what one worker holds of one job, and how far it is.

    It was ``granted`` and last ``heard`` of by the monotonic clock; its ``portions`` are found by
    the tasks that were given. It has so many ``threads``, as far as is known. ``cut`` is the task
    of which others render the lower rows, and the row before which it may end; ``told`` is the row
    that a beat was answered with.
    """

    def __init__(self, lease: str, worker: int, job: Job, now: float) -> None:
        self.id, self.worker, self.job, self.owner = lease, worker, job.id, job.owner
        self.region, self.height = job.region, job.pov.options.height
        self.granted = self.heard = now
        self.threads = 1
        self.portions: dict[int, Portion] = {}
        self.cut: tuple[int, int] | None = None
        self.told = 0


class Portion:
    """A task of a grant, for as long as its worker is at it.

    ``given`` is the task that the worker knows of, and ``task`` the one that it makes: of a frame
    that was divided since, the first slice. It was given the rows from ``top`` to before ``end``;
    others render those from ``bottom`` on. ``notes`` are the last parts of what was given that
    were rendered, and when each was heard of.
    """

    def __init__(self, grant: Grant, row: Task | Attempt, task: int, given: int, end: int) -> None:
        self.grant, self.task, self.given = grant, task, given
        self.kind, self.top = row.kind, row.top
        self.bottom, self.end = row.bottom or grant.height, end or grant.height
        self.notes: tuple[tuple[float, float], ...] = ()
        grant.portions[given] = self

    def note(self, part: float, now: float) -> None:
        """Note how much of what was given is rendered, 0 to 1; forget what is long past."""
        notes = self.notes
        if not notes or notes[-1][0] != part:
            notes = (*notes, (part, now))
            while len(notes) > 2 and notes[1][1] < now - RECENT:
                notes = notes[1:]
            self.notes = notes

    def parts(self) -> list[tuple[float, float]]:
        """Return the parts of what is left to it that were rendered, and when each was heard of."""
        first, last = max(self.top, self.grant.region.top), self.grant.region.bottom
        scale = (min(self.end, last) - first) / (min(self.bottom, last) - first)
        return [(min(part * scale, 1.0), heard) for part, heard in self.notes]


class Grants:
    """All leases that live, also by job, by owner, by worker and by task; the oldest first."""

    def __init__(self, grants: Iterable[Grant] = ()) -> None:
        self._all: dict[str, Grant] = {}
        self._groups: dict[tuple[str, int | str], dict[str, Grant]] = {}  # by job, and so on
        self._tasks: dict[int, tuple[Portion, ...]] = {}
        for grant in grants:
            self.add(grant)

    def __iter__(self) -> Iterator[Grant]:
        """Yield those that there are at this moment."""
        return iter(list(self._all.values()))

    def get(self, lease: str) -> Grant | None:
        """Return one by its id."""
        return self._all.get(lease)

    def of_job(self, job: int) -> list[Grant]:
        """Return those of a job."""
        return list(self._groups.get(("job", job), {}).values())

    def of_owner(self, owner: str) -> list[Grant]:
        """Return those of all jobs of somebody."""
        return list(self._groups.get(("owner", owner), {}).values())

    def of_worker(self, worker: int) -> list[Grant]:
        """Return those of a worker."""
        return list(self._groups.get(("worker", worker), {}).values())

    def at(self, task: int) -> tuple[Portion, ...]:
        """Return who is at a task."""
        return self._tasks.get(task, ())

    def progress(self, task: int) -> float:
        """Return how much of a task is rendered, 0 to 1, as last heard."""
        return max((part for portion in self.at(task) for part, _ in portion.parts()[-1:]),
                   default=0.0)

    def add(self, grant: Grant) -> None:
        """Hold one more."""
        self._all[grant.id] = grant
        for key in self._keys(grant):
            self._groups.setdefault(key, {})[grant.id] = grant
        for portion in grant.portions.values():
            self._tasks[portion.task] = (*self.at(portion.task), portion)

    def remove(self, grant: Grant, *portions: Portion) -> None:
        """Forget a grant, or some portions of it, and with its last the grant."""
        for portion in portions or tuple(grant.portions.values()):
            others = tuple(one for one in self._tasks.pop(portion.task) if one is not portion)
            if others:
                self._tasks[portion.task] = others
            del grant.portions[portion.given]
        if not grant.portions:
            del self._all[grant.id]
            for key in self._keys(grant):
                del self._groups[key][grant.id]
                if not self._groups[key]:
                    del self._groups[key]

    @staticmethod
    def _keys(grant: Grant) -> list[tuple[str, int | str]]:
        return [("job", grant.job), ("owner", grant.owner), ("worker", grant.worker)]

    def divide(self, task: int, upper: Task) -> None:
        """Let those who are at a task make of it what is above: a slice that ends sooner."""
        for portion in self._tasks.pop(task):
            portion.task, portion.kind, portion.bottom = upper.id, upper.kind, upper.bottom
            self._tasks[upper.id] = (*self.at(upper.id), portion)

    def refill(self, grants: Iterable[Grant]) -> None:
        """Hold these and no others, from one moment to the next."""
        vars(self).update(vars(Grants(grants)))


@dataclass
class Presence:
    """A worker, as far as only this process knows of it.

    It was last ``seen`` by the monotonic clock, None since it has left; ``departures`` count that,
    so that a request which it has left open gives it nothing. It keeps ``slots`` runs going.
    When it is sick, ``trial`` is when it last got a task to try, or became sick. ``well`` is True
    where it is known that it did not fail what it did last. Its open requests wait at ``bells``.
    """

    seen: float | None = None
    slots: int = 1
    departures: int = 0
    trial: float | None = None
    well: bool = False
    guest: Guest | None = None
    bells: dict[_Bell, None] = field(default_factory=dict)


class _Bell(threading.Condition):
    """What one request waits on that is held open, so that only those wake whom it concerns."""

    rung = False
    looked = 0  # which offer of work it has seen

    def ring(self) -> None:
        with self:
            self.rung = True
            self.notify_all()

    def heard(self) -> bool:
        with self:
            rung, self.rung = self.rung, False
        return rung


class _Waiting:
    """The requests that are held open, in lines, those first that have waited longest."""

    def __init__(self, clock: Clock, gate: Gate) -> None:
        self.work: dict[_Bell, None] = {}
        self.events: dict[_Bell, None] = {}
        self.offers = 0  # how often there was work for those who wait
        self.closed = False
        self._all: dict[_Bell, None] = {}
        self._clock, self._gate = clock, gate
        self._changing = threading.Lock()

    @contextlib.contextmanager
    def bell(self, *lines: dict[_Bell, None]) -> Iterator[_Bell]:
        """Stand in these lines."""
        bell, lines = _Bell(), (*lines, self._all)
        with self._changing:
            for line in lines:
                line[bell] = None
        try:
            yield bell
        finally:
            with self._changing:
                for line in lines:
                    del line[bell]
            if bell.rung and any(line is self.work for line in lines):
                self.call(1)

    def wait(self, bell: _Bell, seconds: float) -> None:
        with self._gate.outside(), bell:
            if not bell.rung:
                self._clock.wait(bell, seconds)

    def ring(self, line: Mapping[_Bell, None]) -> None:
        with self._changing:
            bells = list(line)
        for bell in bells:
            bell.ring()

    def call(self, number: float) -> None:
        """Call so many more of those who have not looked since there was work."""
        with self._changing:
            fresh = (bell for bell in self.work if bell.looked < self.offers and not bell.rung)
            bells = list(itertools.islice(fresh, int(min(number, len(self.work)))))
        self.ring(dict.fromkeys(bells))

    def close(self) -> None:
        """Answer everybody who waits, now and from now on."""
        self.closed = True
        self.ring(self._all)


class _News:
    """Whom a transaction concerns: some workers, and as many others as may find ``work``.

    ``cuts`` are the grants of whose task others got the lower rows, with what beats tell of it;
    ``who`` is the person who did what is done.
    """

    def __init__(self, who: str = "") -> None:
        self.who = who
        self.workers: set[int] = set()
        self.work = 0.0
        self.cuts: dict[Grant, tuple[int, int]] = {}


class _States:
    """Every change of a task or a job, and what lives of it in memory.

    Memory is changed within the transaction that changes the database; when it
    fails, all of memory is learned from the database again.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store, self.clock = store, clock
        self.grants, self.waiting = Grants(), _Waiting(clock, store.gate)
        self.missing: dict[int, set[str]] = {}  # by job that waits: the files
        self.presences: dict[int, Presence] = {}
        self.news = _News()  # of the transaction under way
        self.recall()

    def presence(self, worker: int) -> Presence:
        return self.presences.get(worker) or self.presences.setdefault(worker, Presence())

    @contextlib.contextmanager
    def tx(self, who: str = "") -> Iterator[Tx]:
        """A transaction, which tells whom it concerns when it is on the disk; ``who`` did it.

        When it fails, what was noted in memory did not happen either.
        """
        news = _News(who)
        try:
            with self.store.tx() as tx:
                self.news = news
                yield tx
        except BaseException:
            self.recall()
            raise
        for grant, cut in news.cuts.items():
            grant.cut = min(grant.cut or cut, cut)  # of two the one that came later
        self.waiting.ring(self.waiting.events)
        for worker in {*news.workers, *(grant.worker for grant in news.cuts)}:
            self.waiting.ring(self.presence(worker).bells)
        self.offer(news.work)

    def offer(self, work: float) -> None:
        """Call so many of those who wait for work, if there is some."""
        if work and self.waiting.work:
            with self.store.read() as look:
                if not any(look.leasable_jobs()):
                    return
            self.waiting.offers += 1
            self.waiting.call(work)

    def recall(self) -> None:
        """Learn from the database which leases live and which files are missing."""
        now, found = self.clock.monotonic(), dict[str, Grant]()
        with self.store.tx() as tx:  # not read(): no lease may be given in between
            self.missing = tx.missing_files()
            for row in tx.live_attempts():
                old, new = self.grants.get(row.lease), found.get(row.lease)
                grant = new or Grant(row.lease, row.worker, tx.job(row.job), now)
                found[row.lease] = grant
                whole = row.kind is TaskKind.SLICE and not row.given  # a frame, divided since
                given = (row.parent or 0) if whole else row.task
                portion = Portion(grant, row, row.task, given, row.given)
                if portion.bottom < portion.end:
                    grant.cut = given, portion.bottom
                if old is not None:
                    grant.granted, grant.heard, grant.told = old.granted, old.heard, old.told
                    portion.notes = old.portions[given].notes if given in old.portions else ()
            self.grants.refill(found.values())
        for presence in list(self.presences.values()):
            presence.well = False

    def shown(self, look: Look, worker: int, lease: str, task: int) -> tuple[Attempt, Task, Job]:
        """Return what a worker shows that it was given; ``StaleLease`` when it was not."""
        attempt = look.attempt(task, lease)
        job = look.find_job(attempt.job) if attempt else None
        if attempt is None or job is None or attempt.worker != worker:
            raise StaleLease("this task is not in a lease of yours")
        if attempt.state is AttemptState.VOID:
            raise StaleLease("this frame is rendered again from the start")
        return attempt, look.task(attempt.task), job  # of a divided frame, the first slice

    def tell(self, tx: Tx, what: str, text: str, job: int | None = None,
             frame: int | None = None, worker: int | None = None) -> None:
        """Add to the story of the farm."""
        tx.add_event(self.clock.time(), what, one_line(text), job, frame, worker, self.news.who)

    # --- jobs

    def move_job(self, tx: Tx, job: Job, to: JobState, reason: str) -> None:
        """Change the state of a job; ``IllegalTransition`` when the table does not allow it."""
        frm, finished = job.state, self.clock.time() if to in FINISHED else None
        if to is JobState.ACTIVE:
            tx.begin_turn(job.owner, job.options.priority)
        if (frm, to) not in JOB_TRANSITIONS or not tx.set_job_state(
                job.id, frm, to, reason, finished):
            raise IllegalTransition(f"job {job.id} is {frm.value}: it cannot become {to.value}")
        self.news.work += math.inf if to is JobState.ACTIVE else 0
        self.tell(tx, f"job {to.value}", reason, job.id)

    def start(self, tx: Tx, job: Job) -> None:
        """Make a job active, or let it wait for its files."""
        if missing := tx.missing_blobs(job.manifest):
            self.missing[job.id] = set(missing)
        self.move_job(tx, job, JobState.WAITING if missing else JobState.ACTIVE, "")

    def activate(self, tx: Tx, job: int) -> None:
        """Make a job active, if it waits, as its last file is here."""
        row = tx.find_job(job)
        if row is not None and row.state is JobState.WAITING:
            self.move_job(tx, row, JobState.ACTIVE, "")
        self.missing.pop(job, None)

    def add_blob(self, tx: Tx, sha256: str, size: int) -> None:
        if not self.store.blob_path(sha256).is_file():
            raise TryAgain("the file was tidied away just now: send it again")
        tx.add_blob(sha256, size, self.clock.time())

    def _settle(self, tx: Tx, job: int, after_failure: bool) -> None:
        """Let the states of its tasks become that of the job."""
        row = tx.job(job)
        self.news.work += bool(row.options.max_workers or row.options.in_order)  # held others up
        to, reason = job_state(row.state, row.counts), ""
        if to is row.state is JobState.ACTIVE and after_failure:
            reason = pause_reason(row.done, row.failed)
            to = JobState.PAUSED if reason else to
        if to is not row.state and row.state is not JobState.CANCELLED:
            self.move_job(tx, row, to, reason)

    # --- tasks

    def move(self, tx: Tx, task: Task, to: TaskState, why: str) -> None:
        """Change the state of a task; ``IllegalTransition`` when the table does not allow it."""
        frm = task.state
        if (frm, to) not in TRANSITIONS or not tx.set_task_state(task.id, frm, to):
            raise IllegalTransition(f"frame {task.frame} cannot go from {frm.value} to {to.value}")
        part = f"{task.kind} " if task.parent else ""
        self.tell(tx, part + to.value, why, task.job, task.frame)
        if to is not TaskState.LEASED:
            self.news.work += math.inf if task.parent else to is TaskState.QUEUED
        if task.parent:
            self.settle_frame(tx, task.parent, why)
            return
        tx.count_task(task.job, frm, to)
        if to is not TaskState.LEASED:
            self._settle(tx, task.job, to is TaskState.FAILED)

    def move_frames(self, tx: Tx, job: int, frm: TaskState, to: TaskState, why: str,
                    after: int = -1) -> tuple[int, int]:
        """Move the next step of those frames that are like each other.

        They come ``after`` a frame; return how many were looked at, and the last.
        """
        if (frm, to) not in TRANSITIONS:
            raise IllegalTransition(f"frames cannot go from {frm.value} to {to.value}")
        number, moved, last = tx.move_frames(job, frm, to, why, self.clock.time(), after, STEP,
                                             self.news.who)
        tx.count_task(job, frm, to, moved)
        self.news.work += moved if to is TaskState.QUEUED else 0
        return number, last

    def settle_frame(self, tx: Tx, frame: int, why: str) -> None:
        """Let the states of its slices become that of a frame."""
        row, slices = tx.task(frame), tx.slice_states(frame)
        to = frame_state(slices, row.state)
        if slices and row.state is not TaskState.DONE and to is not row.state:
            self.move(tx, row, to, why)
            if to in (TaskState.FAILED, TaskState.CANCELLED):
                self.cancel_parts(tx, row)

    def cancel_parts(self, tx: Tx, frame: Task) -> None:
        """End what is under way of a frame that is settled otherwise."""
        for part in tx.parts(frame.id):
            self.end_others(tx, part.id, "the frame is settled")
            if part.state in (TaskState.QUEUED, TaskState.LEASED):
                self.move(tx, part, TaskState.CANCELLED, "the frame is settled")

    def cancel(self, tx: Tx, job: Job) -> None:
        """Cancel a job, and as much of its tasks as is done in one step."""
        self.move_job(tx, job, JobState.CANCELLED, "")
        for frame in tx.frames_with_parts(job.id):
            if frame.state in (TaskState.QUEUED, TaskState.LEASED):
                self.move(tx, frame, TaskState.CANCELLED, "job cancelled")
                self.cancel_parts(tx, frame)
        self.cancel_step(tx, job.id)

    def cancel_step(self, tx: Tx, job: int) -> None:
        """Cancel the next step of those tasks of a job that are open, leased ones first."""
        tasks = 0
        for grant in self.grants.of_job(job):
            if tasks < STEP:
                tasks += len(grant.portions)
                self._end(tx, grant, AttemptState.RELEASED, "job cancelled")
        for frm in (TaskState.LEASED, TaskState.QUEUED):
            self.move_frames(tx, job, frm, TaskState.CANCELLED, "job cancelled")

    # --- leases

    def end_attempt(self, tx: Tx, task: int, lease: str, state: AttemptState, message: str = "",
                    log_name: str = "") -> None:
        """End a try of a task, and with the last one its lease."""
        now = self.clock.time()
        tx.end_attempt(task, lease, state, now, message, log_name)
        for portion in self.grants.at(task):
            grant = portion.grant
            if grant.id == lease:
                self.grants.remove(grant, portion)
                if not grant.portions:
                    tx.end_lease(lease, grant.job, "finished", now, self._spent(grant))
                if state is AttemptState.LOST:  # else its worker has told it
                    self.news.workers.add(grant.worker)

    def end_others(self, tx: Tx, task: int, why: str) -> None:
        """End all tries of a task: what they make is not wanted any more."""
        for portion in self.grants.at(task):
            self.end_attempt(tx, task, portion.grant.id, AttemptState.LOST, why)

    def end_lease(self, tx: Tx, grant: Grant, state: AttemptState, why: str) -> None:
        """Take back what is left of a lease."""
        tasks = [portion.task for portion in grant.portions.values()]
        self._end(tx, grant, state, why)
        for task in map(tx.task, tasks):
            if task.state is TaskState.LEASED and not self.grants.at(task.id):
                self.move(tx, task, TaskState.QUEUED, why)

    def take_leases(self, tx: Tx, worker: int, why: str) -> None:
        """Take back all leases of a worker, which may not come again."""
        self.news.work = math.inf  # also what others failed and this one might have rendered
        for grant in self.grants.of_worker(worker):
            self.end_lease(tx, grant, AttemptState.RELEASED, why)

    def _end(self, tx: Tx, grant: Grant, state: AttemptState, why: str) -> None:
        now = self.clock.time()
        tx.end_attempts(grant.id, state, now, why)
        tx.end_lease(grant.id, grant.job, why, now, self._spent(grant))
        self.forget(grant)

    def _spent(self, grant: Grant) -> float:
        """Return for how long cores were busy; a little also where no time has passed."""
        return (self.clock.monotonic() - grant.granted) * grant.threads + LEASE_COST

    def forget(self, grant: Grant) -> None:
        self.grants.remove(grant)
        self.news.workers.add(grant.worker)


class People:
    """Who has a secret, beside the admin and the workers, and how much they may have."""

    def __init__(self, states: _States, allowance: Allowance) -> None:
        self._states, self._everybody = states, allowance

    def add(self, person: Person, who: str = ADMIN) -> None:
        """Add a person, a program or an invitation.

        The same again, as when an answer was lost, changes nothing.
        """
        with self._states.tx(who) as tx:
            self._add(tx, person)

    def _add(self, tx: Tx, one: Person) -> None:
        known = tx.person(one.name, one.uses is not None)
        if known and known.token != one.token:
            raise UserError(f"'{known.name}' is there already: choose another name")
        if not known:
            tx.put_person(one)
            self._states.tell(tx, *(
                ("invited", counted(one.uses, one.role)) if one.uses else
                ("person added", f"{one.name} ({one.role})")))

    def invitation(self, proven: Callable[[str], bool]) -> Person | None:
        """Return the invitation of which somebody has proven to know the secret."""
        with self._states.store.read() as look:
            return next((one for one in look.people(invited=True) if self._lasts(one)
                         and proven(one.token)), None)

    def _lasts(self, invitation: Person) -> bool:
        return invitation.added + INVITED_FOR > self._states.clock.time()

    def come(self, invitation: str, person: Person) -> None:
        """Add a person who was invited, under a name that nobody has or had."""
        with self._states.tx(person.name) as tx:
            known, left = tx.person(person.name), tx.person(invitation, invited=True)
            if known and known.token == person.token:
                return
            if left is None or not left.uses:
                raise NotYours("as many people have come by this code as were invited: ask for a "
                               "new one ('povfarm.py users invite' makes one)")
            if known is None and tx.has_jobs(person.name):
                raise UserError(f"'{person.name}' was the name of somebody whose jobs are still "
                                "here: choose another name")
            self._add(tx, person)
            tx.put_person(replace(left, uses=left.uses - 1))

    def tidy(self, tx: Tx) -> None:
        """Forget the invitations that have ended."""
        for one in tx.people(invited=True):
            if not self._lasts(one):
                tx.drop_person(one.name)

    def remove(self, name: str, who: str = ADMIN) -> list[int]:
        """Forget a person's secret; the jobs stay. Return the workers that came with it."""
        with self._states.tx(who) as tx:
            person = self._known(tx, name)
            tx.drop_person(person.name)
            self._states.tell(tx, "person removed", person.name)
            return [row.id for row in tx.workers() if row.owner == person.name]

    def change(self, name: str, limits: Mapping[str, int], who: str = ADMIN) -> None:
        """Set some of the limits of a person."""
        with self._states.tx(who) as tx:
            person = self._known(tx, name)
            tx.put_person(replace(person, limits_json=json.dumps({**person.limits, **limits})))
            text = ", ".join(f"{name} = {value}" for name, value in limits.items())
            self._states.tell(tx, "person changed", f"{person.name}: {text}")
            self._states.news.work = math.inf

    def allowance(self, look: Look, owner: str) -> Allowance:
        """Return what somebody may have at a time."""
        if owner == ADMIN:
            return BOUNDLESS
        person = look.person(owner)
        return replace(self._everybody, **person.limits) if person else self._everybody

    def check(self, look: Look, owner: str, frames: int, jobs: int = 1, size: int = 0) -> None:
        """Raise ``UserError`` for more jobs, frames and bytes than somebody may have."""
        most, has = self.allowance(look, owner), look.usage(owner)
        if most.jobs and has.jobs + jobs > max(most.jobs, has.jobs):
            raise UserError(f"you have {counted(has.jobs, 'job')} that "
                            f"{'is' if has.jobs == 1 else 'are'} not finished, and may have "
                            f"{most.jobs}: wait until one is, or cancel one ('povfarm.py cancel "
                            "JOB')")
        if most.frames and frames and has.frames + frames > most.frames:
            raise UserError(f"you may have {counted(most.frames, 'frame')} that are not finished, "
                            f"this would make {has.frames + frames}: wait until others are, cancel "
                            "a job ('povfarm.py cancel JOB'), or give --frames to submit fewer")
        if problem := self.too_much(look, owner, size):
            raise UserError(problem)

    def check_priority(self, look: Look, who: str, priority: int) -> None:
        """Raise ``UserError`` for a priority that somebody may not give a job."""
        most = self.allowance(look, who).priority
        if priority > most:
            raise UserError(f"the highest priority of your jobs is {most}: give --priority {most} "
                            "or less")

    def too_much(self, look: Look, owner: str, more: int = 0) -> str:
        """Say that more is kept of somebody's jobs than may be, or nothing."""
        most = self.allowance(look, owner).space
        if not most or (kept := look.usage(owner).space) + more < most:
            return ""
        new = f", this one's files have {format_size(more)}" if more else ""
        return (f"{format_size(kept)} are kept of {owner}'s jobs{new}, and all may have "
                f"{format_size(most)}: fetch images and delete a job ('povfarm.py delete JOB')")

    def may_have(self, look: Look, worker: int, owner: str) -> bool:
        """Tell whether a worker may render for somebody, beside those that do already."""
        most = self.allowance(look, owner)
        if most.workers:
            others = {grant.worker for grant in self._states.grants.of_owner(owner)} - {worker}
            if len(others) >= most.workers:
                return False
        return not self.too_much(look, owner)

    def _known(self, look: Look, name: str) -> Person:
        person = look.person(name)
        if person is None:
            raise NotFound(f"nobody is called '{name}' here: 'povfarm.py users' shows who there is")
        return person


class _Crew:
    """Who is there: joins, beats and leaves, and whose silence has lasted for too long."""

    def __init__(self, states: _States, lease_time: float, people: People) -> None:
        self.states, self.clock, self._people = states, states.clock, people
        self.lease_time = lease_time
        for grant in states.grants:
            self._see(grant.worker)

    def join(self, info: WorkerInfo, token: str, address: str, code: str = "",
             who: str = "") -> int:
        """Add a worker whose secret hashes to ``token``; return its id.

        With a ``code`` it is pending until ``admit`` is called with that. The same secret
        again, as when an answer was lost, adds no second worker.
        """
        state = WorkerState.PENDING if code else WorkerState.ADMITTED
        with self.states.tx(who) as tx:
            known = tx.worker_by_token(token)
            if known is not None:
                return known.id
            if who not in ("", ADMIN) and sum(
                    row.owner == who for row in tx.workers()) >= MAX_BROUGHT:
                raise UserError(f"{MAX_BROUGHT} workers have joined with your key, which is the "
                                "most: ask for one to be removed ('povfarm.py workers remove')")
            if who == "":
                self._make_room(tx, address)
            worker = tx.add_worker(info, token, state, code, address, self.clock.time(), who)
            self.states.tell(tx, "asks to join" if code else "joined", info.name, worker=worker)
        self._see(worker)
        return worker

    def make_room(self, address: str) -> None:
        """Let one more from this address ask to join, or raise ``Crowded``."""
        with self.states.tx() as tx:
            self._make_room(tx, address)

    def _make_room(self, tx: Tx, address: str) -> None:
        """Forget a worker that asked to join and left, where too many wait to be admitted."""
        strangers = [row for row in tx.workers() if row.owner == ""]
        waiting = [row for row in strangers if row.state is WorkerState.PENDING]
        near = [row for row in waiting if network_of(row.address) == network_of(address)]
        same = [row for row in near if row.address == address]
        for rows, most in ((same, MAX_PENDING_EACH), (near, MAX_PENDING_NETWORK),
                           (waiting, MAX_PENDING)):
            gone = [row for row in rows if row.id not in self.live_workers()]
            if len(rows) >= most and gone:
                tx.forget_worker(gone[0].id)
            elif len(rows) >= most:
                raise Crowded("too many workers ask to join")
        if len(strangers) >= MAX_OPEN:
            raise Crowded(f"{MAX_OPEN} workers have joined without a key, which is the most")

    def rejoin(self, worker: int, info: WorkerInfo, address: str) -> None:
        """Take what a known worker says of itself when it comes again."""
        with self.states.tx() as tx:
            tx.set_worker_info(worker, info, address)
        self._see(worker).trial = -math.inf  # perhaps it comes again because it was mended

    def admit(self, code: str, who: str = ADMIN) -> str:
        """Admit the pending worker with this code and return its name."""
        with self.states.tx(who) as tx:
            for row in tx.workers():
                if row.state is WorkerState.PENDING and hmac.compare_digest(
                        row.code.encode(), code.strip().upper().encode()):
                    tx.set_worker_state(row.id, WorkerState.ADMITTED)
                    self.states.tell(tx, "admitted", row.name, worker=row.id)
                    self._dismiss(row.id)  # its open request is answered, which tells it
                    return row.name
            raise UserError(f"no worker waits with the code '{code}'")

    def remove(self, worker: int, who: str = "") -> None:
        """Take a worker's leases back and forget its secret."""
        with self.states.tx(who) as tx:
            row = tx.find_worker(worker)
            if row is None or not tx.set_worker_state(worker, WorkerState.REMOVED):
                raise UserError(f"there is no worker {worker}")
            self.states.tell(tx, "removed", row.name, worker=worker)
            self._dismiss(worker)
            self.states.take_leases(tx, worker, "worker removed")
        self.states.presence(worker).seen = None

    def leave(self, worker: int) -> None:
        """Hand back every lease of a worker that stops; it may come again."""
        with self.states.tx() as tx:
            self._dismiss(worker)
            self.states.take_leases(tx, worker, "worker stopped")
        self.states.presence(worker).seen = None

    def release(self, worker: int, lease: str) -> None:
        """Take back a lease that its worker hands in unfinished."""
        with self.states.tx() as tx:
            for grant in self._held(worker, [lease]):
                self.states.end_lease(tx, grant, AttemptState.RELEASED, "handed back")
                return
            raise StaleLease("this lease is not yours")

    def beat(self, worker: int, progress: Mapping[str, Mapping[int, float]],
             wait: float) -> tuple[list[str], dict[int, int]]:
        """Keep a worker's leases alive; return those of them that have ended.

        Also the tasks of which others render the lower rows, each with the row
        before which it may end. Answers after ``wait`` seconds, or at once when
        there is such news.
        """
        now, presence = self.clock.monotonic(), self.states.presence(worker)
        end, stays = now + min(wait, self.lease_time / 3), presence.departures
        for grant in self._held(worker, progress):
            for task, part in progress[grant.id].items():
                if task in grant.portions:
                    grant.portions[task].note(part, now)
        with self.states.waiting.bell(presence.bells) as bell:
            while True:
                bell.heard()
                now, held = self.clock.monotonic(), self._held(worker, progress)
                if stays == presence.departures:
                    presence.seen = now
                for grant in held:  # one that was taken back since is in nobody's hands
                    grant.heard = now
                cuts = {grant: grant.cut for grant in held if grant.cut}
                news = any(grant.told != row for grant, (_, row) in cuts.items())
                left = end - now
                if len(held) < len(progress) or news or left <= 0 or self.states.waiting.closed:
                    for grant, (_, row) in cuts.items():
                        grant.told = row
                    alive = {grant.id for grant in held}
                    return [lease for lease in progress if lease not in alive], dict(cuts.values())
                self.states.waiting.wait(bell, left)

    def expire(self) -> None:
        """Take back every lease whose worker has been silent for too long."""
        now = self.clock.monotonic()
        late = [grant.id for grant in self.states.grants
                if grant.heard + self.silence(grant.worker) < now]
        if late:
            with self.states.tx() as tx:
                for grant in filter(None, map(self.states.grants.get, late)):
                    self.states.end_lease(tx, grant, AttemptState.EXPIRED, "worker silent")

    def receive(self, worker: int, guest: Guest) -> None:
        """Treat a worker as one of another system, until the coordinator ends."""
        self.states.presence(worker).guest = guest

    def silence(self, worker: int) -> float:
        """Return the seconds without a beat after which a worker is gone, and its leases too."""
        guest = self.states.presence(worker).guest
        if guest is None:
            return self.lease_time
        busy = self.states.grants.of_worker(worker)
        return max(guest.silence if busy else guest.pause, self.lease_time)

    def live_workers(self) -> set[int]:
        """Return the workers that were heard of within the time that a lease lives."""
        now = self.clock.monotonic()
        return {worker for worker, presence in list(self.states.presences.items())
                if presence.seen is not None and presence.seen >= now - self.silence(worker)}

    def seen(self, worker: int) -> float | None:
        """Return how many seconds ago a worker was heard of, None when never."""
        at = self.states.presence(worker).seen
        return None if at is None else self.clock.monotonic() - at

    def muster(self, look: Look) -> Muster:
        """Return who is there at this moment."""
        return Muster(self.states, look, self.live_workers(), self._people)

    def _held(self, worker: int, leases: Iterable[str]) -> list[Grant]:
        found = filter(None, map(self.states.grants.get, leases))
        return [grant for grant in found if grant.worker == worker]

    def _see(self, worker: int) -> Presence:
        presence = self.states.presence(worker)
        presence.seen = self.clock.monotonic()
        return presence

    def _dismiss(self, worker: int) -> None:
        """Give a worker nothing any more for a request that it has left open."""
        self.states.presence(worker).departures += 1
        self.states.news.workers.add(worker)


class Muster:
    """Who is there at one moment, and what they are good for: each is looked up once."""

    def __init__(self, states: _States, look: Look, live: set[int], people: People) -> None:
        self.live, self.people = live, people
        self._states, self._look = states, look
        self._sick: dict[int, bool] = {}
        self._fitting: dict[tuple[int, bool, str], bool] = {}
        self._helping: dict[tuple[int, bool], set[int]] = {}
        self._elected: dict[tuple[int, str], Collection[str]] = {}

    @functools.cached_property
    def line(self) -> list[int]:
        """The jobs of which nothing is rendered yet, in the order in which they are served."""
        return [job.id for job in self._look.leasable_jobs() if not job.leased]

    @functools.cached_property
    def crew(self) -> list[Member]:
        """The workers that are there and may work."""
        return [row for row in self._look.workers()
                if row.id in self.live and row.state is WorkerState.ADMITTED]

    def sickness(self, worker: Member) -> str:
        """Say what makes a worker sick: wrong pictures, or nothing but failures; else nothing.

        While all fail nobody is sick: then the scenes are to blame.
        """
        if worker.aside:
            return worker.aside
        sick = self._only_fails(worker.id) and self._some_succeed
        return "its last six tasks failed, and others' did not" if sick else ""

    def _only_fails(self, worker: int) -> bool:
        presence = self._states.presence(worker)
        if worker not in self._sick:
            record = [] if presence.well else self._look.recent_attempts(worker, 6)
            presence.well |= record[:1] != ["failed"]
            self._sick[worker] = record == ["failed"] * 6
        return self._sick[worker]

    @functools.cached_property
    def _some_succeed(self) -> bool:
        return any(set(self._look.recent_attempts(worker, 6)) - {"failed"} for worker in self.live)

    def suits(self, job: Job, worker: Member) -> bool:
        """Tell whether a worker makes the pictures of a job as those that are there are made."""
        guest = self._states.presence(worker.id).guest
        return (guest is None or guest.takes(self._look, job)) and self._fits(job, worker)

    def cuts(self, job: Job, worker: Member) -> bool:
        """Tell whether a worker renders slices of a job."""
        guest = self._states.presence(worker.id).guest
        return guest is None or guest.cuts(job)

    def _fits(self, job: Job, worker: Member) -> bool:
        if job.pov.engine:  # a guest takes such a job or not
            return bool(self._states.presence(worker.id).guest) or job.pov.engine in worker.engines
        wanted, least, begun = job.options.povray, job.pov.needs[0], has_begun(job)
        key = job.id, begun, worker.engines_json
        if key not in self._fitting:
            fits = engine_fits(wanted, job.engines if begun else {}, worker.engines, least)
            self._fitting[key] = fits and (
                begun or wanted != "auto" or not worker.engines
                or worker.engines_json in self._prevailing(job))
        return self._fitting[key]

    def _prevailing(self, job: Job) -> Collection[str]:
        """Return the engines (JSON) that may begin a job: a job's version is that of most cores.

        Of the workers that are there and can; of those that have failed in the job only
        where there are no others.
        """
        least = job.pov.needs[0]
        key = job.id if job.started else 0, least
        if key not in self._elected:
            crew = [row for row in self.crew if not row.aside and row.engines
                    and engine_fits("any", {}, row.engines, least)]
            good = [row for row in crew
                    if job.started and not self._look.failures(job.id, row.id)]
            cores: collections.Counter[str] = collections.Counter()
            for row in good or crew:
                cores[row.engines_json] += row.cores
            votes = {mine: sum(number for theirs, number in cores.items() if engine_fits(
                "auto", engines_of(mine), engines_of(theirs), least)) for mine in cores}
            self._elected[key] = {mine for mine, number in votes.items()
                                  if number == max(votes.values())}
        return self._elected[key]

    def is_hopeless(self, job: Job, worker: int) -> bool:
        """Tell whether a worker has failed in a job again and again, and done nothing of it."""
        return self._look.failures(job.id, worker) >= 3 and not self._look.has_done(job.id, worker)

    def helpers(self, job: Job, part: bool = False) -> set[int]:
        """Return the workers that a frame of a job may wait for, or ``part`` of a frame.

        Those that fail all of the job count when there are no others: then
        the scene is to blame, and the job has to find that out.
        """
        if (job.id, part) not in self._helping:
            well = {row.id for row in self.crew if not self.sickness(row) and self.suits(job, row)
                    and (not part or self.cuts(job, row))}
            hopeful = {worker for worker in well if not self.is_hopeless(job, worker)}
            self._helping[job.id, part] = hopeful or well
        return self._helping[job.id, part]

    def why(self, job: Job) -> tuple[str, str]:
        """Return why a job does not go on, in a sentence, and what would cure it; or nothing.

        The cure is ``resume``, ``retry`` or an option of the job to set, such as ``povray=any``.
        """
        if job.reason:
            stuck = job.state is JobState.PAUSED and job.reason != PAUSED_BY_HAND
            return job.reason, "retry" if stuck else "resume" * (job.state is JobState.PAUSED)
        if job.state is JobState.FAILED:
            return f"{counted(job.failed, 'frame')} of {sum(job.counts.values())} failed", "retry"
        if text := self.waiting_for(job):
            return text, "povray=any" if "povray=any" in text else ""
        if job.state is not JobState.ACTIVE or job.id not in self.line:
            return "", ""
        most, owner = self.people.allowance(self._look, job.owner).workers, job.owner
        if most and len({grant.worker for grant in self._states.grants.of_owner(owner)}) >= most:
            return f"as many workers as {owner} may have ({most}) render other jobs of {owner}", ""
        before = self.line.index(job.id)
        return f"{counted(before, 'job')} before it" if before else "next in line", ""

    def waiting_for(self, job: Job) -> str:
        """Return why workers get no frame of a job that has some, in a sentence, or nothing."""
        missing = len(self._states.missing.get(job.id, ()))
        if job.state is JobState.WAITING:
            return f"{missing} of its files {'is' if missing == 1 else 'are'} still to come"
        if job.state is not JobState.ACTIVE or not job.queued:
            return ""
        since, word = job.pov.needs
        versions = [row.engines.get("povray", "") for row in self.crew
                    if not self._states.presence(row.id).guest]
        if since and all(version and release(version) < release(since) for version in versions):
            return (f"{word} needs POV-Ray {since}, which no worker here has: start one with it "
                    "('povfarm.py work --povray PROGRAM')")
        unfit = [row for row in self.crew if not row.aside and not self._fits(job, row)]
        problem = self.people.too_much(self._look, job.owner)
        if problem or unfit:
            return problem or self._why_unfit(job, unfit)
        if job.leased or any(self.suits(job, row) and not self.sickness(row) for row in self.crew):
            return ""
        pending = [row for row in self._look.workers() if row.id in self.live]
        if self.crew:
            why = ("the workers that are there cannot render it: 'povfarm.py workers' shows what "
                   "is wrong with them")
        elif pending:
            why = (f"{_waiting(pending)} to be let in: 'povfarm.py workers' shows the codes, "
                   "'povfarm.py admit CODE' lets one in")
        else:
            why = "no worker is there: start one with 'povfarm.py work'"
        return why

    def _why_unfit(self, job: Job, unfit: Sequence[Member]) -> str:
        if job.pov.engine:
            return (f"{_waiting(unfit)}: {job.pov.engine} renders it, and it must stand in the "
                    "povfarm.ini of a worker's owner (see the manual)")
        wanted = job.options.povray
        if wanted == "auto":
            began = [job.engines_json] if has_begun(job) else self._prevailing(job)
            wanted = engines_of(min(began, default="{}")).get("povray", "")
        theirs = {row.engines.get("povray", "") for row in unfit} - {wanted}
        way = ("" if job.pov.needs[0] else
               f" ('povfarm.py set {job.id} povray=any' lets every worker render)")
        return (f"{_waiting(unfit)}: this job's frames are rendered with POV-Ray {wanted}, theirs "
                f"is {' and '.join(sorted(theirs)) or 'the same with other include files'}{way}")


def has_begun(job: Job) -> bool:
    """Tell whether something is there of what the worker rendered that began a job."""
    there = job.done or job.leased or job.options.verify  # of which one may be kept
    return bool(there and job.engines)


def _waiting(workers: Sequence[Member]) -> str:
    return "1 worker waits" if len(workers) == 1 else f"{len(workers)} workers wait"


class _Dealing:
    """Who gets what: answers those who ask for work, as soon as there is some for them."""

    def __init__(self, states: _States, crew: _Crew) -> None:
        self._states, self._crew = states, crew

    def lease(self, worker: int, offer: Offer, wait: float,
              alive: Callable[[], bool]) -> list[LeaseSpec]:
        """Give out work: waits up to ``wait`` seconds when there is none.

        ``alive`` tells whether the worker still listens: one that was killed
        while it waited gets nothing.
        """
        clock, waiting = self._states.clock, self._states.waiting
        end, looked = clock.monotonic() + wait, -math.inf
        presence = self._states.presence(worker)
        stays = presence.departures
        with waiting.bell(waiting.work, presence.bells) as bell:
            while True:
                called, bell.looked = bell.heard(), waiting.offers
                if stays != presence.departures or not alive():
                    bell.rung = called  # another may take what it was called for
                    return []
                now = presence.seen = clock.monotonic()
                presence.slots = offer.slots
                # What is under way becomes a straggler, or worth dividing, by the passing of time;
                # where many wait it is enough that some of them look.
                pause = LOOK_AGAIN * max(len(waiting.work) / 10, 1)
                over = now - looked >= pause
                looked = now if over else looked
                leases = self._deal(worker, offer, over, stays)
                left = end - clock.monotonic()
                if leases or left <= 0 or waiting.closed or self._are_gone(offer.projects):
                    bell.rung |= called and not leases
                    return leases
                if called:
                    waiting.call(1)
                waiting.wait(bell, min(left, pause if any(self._states.grants) else math.inf,
                                       self._crew.lease_time * 5 / 6))

    def _are_gone(self, projects: Sequence[str]) -> bool:
        with self._states.store.read() as look:
            return bool(look.unknown_manifests(projects))

    def _deal(self, worker: int, offer: Offer, over: bool, stays: int) -> list[LeaseSpec]:
        """Give out what is queued, or else, when that is to be looked ``over``, what is leased."""
        with self._states.store.read() as look:
            if self._states.store.notice or not any(look.leasable_jobs(over)):
                return []
        with self._states.tx() as tx:
            row = tx.worker(worker)
            # Who leaves after this look hands back what it is given.
            if (row.state is not WorkerState.ADMITTED or row.aside
                    or stays != self._states.presence(worker).departures):
                return []
            return _Deal(self._states, self._crew.muster(tx), tx, row, offer).leases()


class _Deal:
    """One request for work, in the transaction in which it is answered.

    The pickers are asked in turn, each for all jobs: what is queued goes before
    what others are at.
    """

    def __init__(self, states: _States, muster: Muster, tx: Tx, worker: Member,
                 offer: Offer) -> None:
        self._states, self._grants = states, states.grants
        self._muster, self._tx = muster, tx
        self._worker, self._presence = worker, states.presence(worker.id)
        self._offer, self._idle = offer, offer.idle  # cores
        self._now = states.clock.monotonic()
        self._sick = bool(muster.sickness(worker))
        self._speeds: dict[int, tuple[dict[int, float], SliceCost | None]] = {}

    def leases(self) -> list[LeaseSpec]:
        """Return what the worker is given; when it is sick, one task now and then."""
        want = self._offer.want
        if self._sick:
            trial = self._presence.trial = self._presence.trial or self._now
            want = int(self._now - trial >= SICK_PAUSE)
        leases: list[LeaseSpec] = []
        while len(leases) < want:
            job, tasks = self._found()
            if job is None:
                break
            leases.append(self._give(job, tasks))
            self._idle -= leases[-1].threads
        if leases or not self._sick:
            self._presence.trial = self._now if self._sick else None
        return leases

    def _found(self) -> tuple[Job | None, list[Task]]:
        """Find what the worker gets next, and the job that it is of."""
        pickers: Sequence[Callable[[Job], list[Task]]] = (
            self._queued, self._divided, self._straggler)
        if guest := self._presence.guest:
            pickers = (functools.partial(self._whole, guest=guest), self._straggler)
        may = functools.partial(self._muster.people.may_have, self._tx, self._worker.id)
        for pick in pickers:
            for job in self._tx.leasable_jobs(pick is not pickers[0], may):
                tasks = pick(job) if self._may_work(job) else []
                if tasks:
                    return job, tasks[:1] if self._sick else tasks
        return None, []

    def _may_work(self, job: Job) -> bool:
        """Tell whether the worker may have something of a job."""
        options, mine = job.options, self._worker.id
        if self._offer.job not in (0, job.id) or not self._muster.suits(job, self._worker):
            return False
        if options.max_workers:
            others = {grant.worker for grant in self._grants.of_job(job.id)} - {mine}
            if len(others) >= options.max_workers:
                return False
        if (options.in_order and job.leased) or not self._has_room(job):
            return False
        return (self._sick or not self._muster.is_hopeless(job, mine)
                or mine in self._muster.helpers(job))

    def _has_room(self, job: Job) -> bool:
        """Tell whether the worker may have another slice or pass beside those that it has."""
        slices = job.options.slices
        parts = [portion for grant in self._grants.of_worker(self._worker.id)
                 for portion in grant.portions.values()
                 if grant.job == job.id and portion.kind is not TaskKind.FRAME]
        # One pass has all cores of a worker, and one slice that the farm has cut by itself; the
        # next may begin when it is nearly done.
        mine = [self._left(portion) for portion in parts
                if portion.kind is TaskKind.PASS or slices == "auto"]
        if len(mine) > 1 or any(left > 2 * START for left in mine):
            return False
        if slices.isdecimal() and parts:  # a fair share: others come in a moment
            share = int(slices) * (job.queued + job.leased) / len(self._muster.helpers(job, True))
            return len(parts) < share
        return True

    # --- what is queued

    def _queued(self, job: Job) -> list[Task]:
        """Find what is queued: all of a job in order, a slice or pass, or neighbouring frames."""
        if job.options.in_order:
            queued = self._tx.tasks_in(job.id, TaskState.QUEUED)
            failed = self._tx.failed_workers(queued[0].id) if queued else set()
            waits = self._worker.id in failed and self._muster.helpers(job) - failed
            return [] if waits else queued
        part = self._part(job)
        if part is not None:
            return [part]
        return self._frames(job) if self._may_begin(job) else []

    def _whole(self, job: Job, guest: Guest) -> list[Task]:
        """Find a slice or frames for a guest; no frames that others had better slice.

        One that fails with a frame may end: so what was failed comes last, unless it fails all.
        """
        if guest.cuts(job) and (part := self._part(job)):
            return [part]
        whole = unsliceable(job.pov, False, job.options.slices) or not self._wants_slices(job)
        fresh = not self._muster.is_hopeless(job, self._worker.id)
        tasks = self._frames(job, fresh) if whole else []
        # It fails with all frames at once: those of which one is bad are tried one by one.
        alike = list(itertools.takewhile(lambda task: not task.tries, tasks))
        return alike[:guest.most] or tasks[:1]

    def _frames(self, job: Job, fresh: bool = False) -> list[Task]:
        """Find queued neighbours, for one run; ``fresh`` ones first, which nobody failed."""
        slots = self._offer.slots + sum(self._states.presence(other).slots
                                        for other in self._muster.live - {self._worker.id})
        longest = SHORT_TURN if job.owner != ADMIN or self._tx.people() else 10.0
        alone = job.options.order in ("spread", "random")
        size = job.options.batch or (1 if alone else lease_size(
            job.queued, slots, job.mean_cost, job.runs, longest))
        tasks = (self._next(job, size, fresh) if fresh else []) or self._next(job, size)
        if not tasks and job.queued:
            return [task for task in self._tx.tasks_in(job.id, TaskState.QUEUED)
                    if task.cut is None and self._may_try(job, task)][:1]
        step = job.pov.plan.frames.step
        for index in range(1, len(tasks)):
            if abs(tasks[index].frame - tasks[index - 1].frame) != step:
                tasks = tasks[:index]
                break
        return sorted(tasks, key=operator.attrgetter("frame"))

    def _next(self, job: Job, size: int, fresh: bool = False) -> list[Task]:
        """Find so many queued frames at most, as the job wants them to be handed out."""
        options, frames = job.options, job.pov.plan.frames
        dealt, backwards = sum(job.counts.values()) - job.queued, options.order == "reverse"
        for low, high in spans_of(options.first, frames):
            start = next_place(options.order, low, high, job.id, dealt // size)
            if backwards:
                last = self._tx.last_queued(job.id, low, high)
                start = max(last - (size - 1) * frames.step, low)
            for begin in (start, low):
                tasks = self._tx.next_tasks(job.id, self._worker.id, size, begin, high,
                                            fresh)
                if tasks:
                    return tasks[::-1] if backwards else tasks
        return []

    def _may_try(self, job: Job, task: Task) -> bool:
        """What a worker failed or had its turn at goes back to it only when nobody else is left."""
        done, mine = self._had_turn(task.id), self._worker.id
        return mine not in done or not self._muster.helpers(job, task.is_part) - done - {mine}

    def _had_turn(self, task: int) -> set[int]:
        return self._tx.failed_workers(task) | {row.worker for row in self._tx.kept(task)}

    # --- slices and passes

    def _part(self, job: Job) -> Task | None:
        """Find a slice or a pass, or cut one off a frame."""
        if unsliceable(job.pov, job.options.in_order, job.options.slices):
            return None
        if job.options.radiosity == "animation" and self._shared(job):
            first = self._first(job)
            if not self._tx.parts(first.id, TaskKind.PASS):
                self._add_passes(job, first)
        for part in self._tx.queued_parts(job.id):
            if self._is_ready(part) and self._may_try(job, part):
                return part
        for frame in self._tx.frames_to_cut(job.id):
            if frame.cut != frame.bottom and self._is_ready(frame):
                return self._cut(job, frame)
        if self._wants_slices(job) and self._may_begin(job):
            for frame in self._next(job, 1):
                if not frame.state_of:  # what is begun is gone on with, and divided if it drags
                    return self._begin_slices(job, frame)
        return None

    def _may_begin(self, job: Job) -> bool:
        """Tell whether what all frames share is there."""
        return job.options.radiosity != "animation" or self._is_ready(self._first(job))

    def _is_ready(self, task: Task) -> bool:
        """Tell whether the pass of a task's frame, if it has one, is over; for good or ill."""
        return task.kind is TaskKind.PASS or not any(
            part.state in (TaskState.QUEUED, TaskState.LEASED)
            for part in self._tx.parts(task.parent or task.id, TaskKind.PASS))

    def _first(self, job: Job) -> Task:
        return self._tx.tasks(job.id, limit=1)[0]

    def _shared(self, job: Job) -> frozenset[str]:
        return shared_by(job.pov, job.options.radiosity)

    def _add_passes(self, job: Job, frame: Task) -> None:
        workers = len(self._muster.helpers(job, True))
        for top, bottom in pass_rows(job.region, self._shared(job), workers):
            self._tx.add_part(frame, TaskKind.PASS, top, bottom)

    def _wants_slices(self, job: Job) -> bool:
        """Tell whether the next whole frame should be sliced at once.

        By itself only where there are fewer frames than workers.
        """
        if job.options.slices != "auto":
            return job.options.slices not in ("off", "1")
        few = job.queued < len(self._muster.live)  # soon found out, and mostly enough
        return (few and worth_slicing(job.region, job.mean_cost)
                and job.queued < len(self._muster.helpers(job, True)))

    def _begin_slices(self, job: Job, frame: Task) -> Task:
        self._tx.set_cut(frame.id, 0, job.pov.options.height)
        if job.options.radiosity != "animation" and self._shared(job):
            self._add_passes(job, frame)
            return self._tx.parts(frame.id)[0]
        return self._cut(job, self._tx.task(frame.id))

    def _cut(self, job: Job, frame: Task) -> Task:
        """Cut the next slice off a frame."""
        (speeds, cost), mine = self._speeds_of(job), self._worker.id
        here = self._muster.helpers(job, True) | {mine}
        share = speeds[mine] / sum(speeds[helper] for helper in here)
        if cost is not None:
            cost = cost._replace(row=1 / speeds[mine])
        top = frame.cut or 0
        bottom = slice_end(top, frame.bottom, job.region, job.options.slices, share, cost)
        self._tx.set_cut(frame.id, bottom, frame.bottom)
        return self._tx.add_part(frame, TaskKind.SLICE, top, bottom)

    def _speeds_of(self, job: Job) -> tuple[dict[int, float], SliceCost | None]:
        """Return the rows a second of each worker, and what is known of the cost of slices."""
        if job.id not in self._speeds:
            cores = {row.id: row.cores for row in self._tx.workers()}
            self._speeds[job.id] = slice_speeds(self._tx.slice_costs(job.id), cores)
        return self._speeds[job.id]

    # --- what others are at

    def _left(self, portion: Portion, job: Job | None = None) -> float:
        """Return the seconds that a portion will still take as it looks.

        Before any of it was heard, a slice of ``job`` takes as long as others did.
        """
        usual = math.inf
        if job is not None and portion.kind is TaskKind.SLICE:
            speeds, cost = self._speeds_of(job)
            if cost is not None:
                usual = (portion.bottom - portion.top) / speeds[portion.grant.worker] + cost.parse
        return time_left(portion.parts(), portion.grant.granted + START, self._now, usual)

    def _divided(self, job: Job) -> list[Task]:
        """Divide what is unrendered of the task that will take longest, if that is worth it."""
        if (job.options.slices != "auto" or unsliceable(job.pov, job.options.in_order)
                or "radiosity" in job.pov.uses):  # with that, a render cannot be stopped midway
            return []
        lefts = []
        for grant in self._grants.of_job(job.id):
            for portion in grant.portions.values():
                if self._may_divide(job, portion):  # where two are at it, who is sooner counts
                    lefts.append(min(((self._left(one, job), one)
                                      for one in self._grants.at(portion.task)),
                                     key=operator.itemgetter(0)))
        worst, found = max((left for left in lefts if left[0] < math.inf),
                           key=operator.itemgetter(0), default=(0.0, None))
        speeds, cost = self._speeds_of(job)
        if found is None or worst <= 3 * (START + (cost.parse if cost else 1.0)):
            return []
        theirs, mine = speeds[found.grant.worker], speeds[self._worker.id]
        return self._lower_part(job, found, theirs / (theirs + mine))

    def _may_divide(self, job: Job, portion: Portion) -> bool:
        at = self._grants.at(portion.task)
        alone = len(at) == len(portion.grant.portions) == 1
        return all(one.grant.worker != self._worker.id for one in at) and (
            portion.kind is TaskKind.SLICE
            or (portion.kind is TaskKind.FRAME and alone and not self._shared(job)))

    def _lower_part(self, job: Job, portion: Portion, share: float) -> list[Task]:
        """Make a slice of its own of what is below a task's ``share`` of its unrendered rows."""
        tx, task, options = self._tx, self._tx.task(portion.task), job.pov.options
        bottom = task.bottom or options.height
        size = slice_block(options) if task.is_part else block_size(options)
        progress = self._grants.progress(task.id)
        middle = split_row(task.top, bottom, job.region, size, progress, share)
        if middle is None:
            return []
        if task.is_part:
            frame, upper = tx.task(task.parent or 0), replace(task, bottom=middle)
            tx.set_bottom(task.id, middle)
        else:
            tx.set_cut(task.id, options.height, options.height)
            frame = tx.task(task.id)
            upper = tx.add_part(frame, TaskKind.SLICE, 0, middle)
            tx.move_attempts(task.id, upper.id)
        self._grants.divide(task.id, upper)
        for one in self._grants.at(upper.id):
            self._states.news.cuts[one.grant] = one.given, middle
        if upper.state is TaskState.QUEUED:
            self._states.move(tx, upper, TaskState.LEASED, "the rest goes to another worker")
        return [tx.add_part(frame, TaskKind.SLICE, middle, bottom)]

    def _straggler(self, job: Job) -> list[Task]:
        """Find a task to lease a second time: of the oldest lease the frame it comes to last."""
        if job.queued or job.options.in_order:
            return []
        portions = [portion for grant in self._grants.of_job(job.id)
                    for portion in reversed(grant.portions.values())]
        mine = self._worker.id
        if any(one.grant.worker == mine and one.kind is TaskKind.SLICE for one in portions):
            return []  # it would slow its own slice down, of which nobody has another copy
        _, cost = self._speeds_of(job)
        frame_cost = job.mean_cost.wall if job.mean_cost else math.inf
        for one in portions:
            mean = frame_cost
            if one.kind is TaskKind.SLICE and cost is not None:
                mean = cost.row * (one.bottom - one.top) + cost.parse + START
            if (self._now - one.grant.granted > max(1.5 * mean, 5.0)
                    and len(self._grants.at(one.task)) == 1
                    and (one.kind is TaskKind.FRAME or self._muster.cuts(job, self._worker))
                    and mine not in self._had_turn(one.task) | {one.grant.worker}):
                return [self._tx.task(one.task)]
        return []

    # --- giving

    def _give(self, job: Job, tasks: Sequence[Task]) -> LeaseSpec:
        tx, worker = self._tx, self._worker
        lease, now = secrets.token_hex(16), self._states.clock.time()
        tx.add_lease(lease, worker.id, job.id, [task.id for task in tasks], now)
        if not has_begun(job):
            tx.set_job_engines(job.id, worker.engines_json)
        grant = Grant(lease, worker.id, job, self._now)
        for task in tasks:
            Portion(grant, task, task.id, task.id, task.bottom)
            if task.state is TaskState.QUEUED:
                self._states.move(tx, task, TaskState.LEASED, worker.name)
        grant.threads = self._threads(job, tasks[0])
        self._grants.add(grant)
        mine = {worker.engines.get("povray") or ANY_STATE, ANY_STATE}
        specs = tuple(
            TaskSpec(task.id, task.frame, task.name, task.kind, task.top,
                     task.bottom if task.is_part else 0, task.state_of in mine)
            for task in tasks)
        return LeaseSpec(
            lease, job.id, job.name, grant.threads, specs, job.manifest, job.pov,
            job.options.in_order, self._passes(job, tasks[0]),
            job.options.frame_timeout or frame_timeout(tx.recent_walls(job.id)))

    def _passes(self, job: Job, task: Task) -> tuple[int, ...]:
        """Return the passes whose results a task reads."""
        if not self._shared(job) or task.kind is TaskKind.PASS:
            return ()
        frame = task.parent
        if job.options.radiosity == "animation":
            frame = self._first(job).id
        return tuple(part.id for part in self._tx.parts(frame or 0, TaskKind.PASS)
                     if part.state is TaskState.DONE)

    def _threads(self, job: Job, task: Task) -> int:
        """Return the threads of one run: more than one only where frames run out.

        A still has whole machines to itself, and so has a slice; the last
        frames of an animation share what is idle, unless their pixels depend
        on the threads.
        """
        frames = sum(job.counts.values())
        if frames > 1 and not job.pov.thread_safe and not task.is_part:
            return 1
        runs = 1 if job.options.in_order else max(job.queued, 1)
        if task.is_part:
            alone = job.options.slices == "auto" or task.kind is TaskKind.PASS
            runs = 1 if alone else len(self._tx.queued_parts(job.id)) + 1
        threads = max(self._idle // runs, 1)
        return max(min(threads, int(job.pov.values.get("Work_Threads", threads))), 1)


class _Deliveries:
    """Takes in what workers have made: pictures, failures, states; puts slices together."""

    def __init__(self, states: _States, crew: _Crew) -> None:
        self.states, self.crew = states, crew
        # Of two images of one frame only the accepted one is on disk: they take turns, by frame.
        self._turns = [threading.Lock() for _ in range(32)]
        self._joining = threading.Lock()

    def check_lease(self, worker: int, lease: str, task: int) -> None:
        """Raise ``StaleLease`` for a task that a worker was not given under this lease."""
        with self.states.store.read() as look:
            self.states.shown(look, worker, lease, task)

    def finish(self, worker: int, lease: str, task: int, image: Path | bytes, log_text: bytes,
               cost: Cost, bottom: int = 0,
               written: Mapping[str, Path | bytes | None] = {}) -> bool:
        """Accept the image of a task; False when another was accepted before.

        The image is checked whole first: ``ImageError`` when it is not the
        picture that was asked for, and the task stays as it was. A late image
        of a task that is still unfinished is taken. Of a slice comes the strip
        of its rows, which may reach further down, to ``bottom``, when its worker
        rendered on while others began with what is below. ``written`` are the
        files that the scene wrote itself: of each, the last frame's stays. None
        stands for one that was left where it was written.
        """
        with self.states.store.read() as look:
            _, row, job = self.states.shown(look, worker, lease, task)
        options = job.pov.options
        if row.kind is not TaskKind.PASS:
            least = row.bottom or options.height
            bottom = bottom or least
            if not least <= bottom <= options.height:
                raise ImageError("the picture does not hold the rows that were asked for")
            with self.aside(image):
                check_image(image, options.extension, job.pov.width, bottom - row.top)
        elif not next(file_blocks(image), b""):
            raise ImageError("nothing came of what the slices should share")
        delivery = _Delivery(self, (worker, lease, task), image, log_text, cost, bottom, written)
        with self.turn(row):
            accepted = delivery.take()
        if delivery.task.is_part:
            self.join_frames()
        return accepted

    def aside(self, image: Path | bytes) -> ContextManager[None]:
        """Let others in while an image is computed with that is not small."""
        small = isinstance(image, bytes) and len(image) <= BUFFER
        return contextlib.nullcontext() if small else self.states.store.gate.outside()

    def fail(self, worker: int, lease: str, task: int, message: str, log_text: bytes,
             scene: bool) -> None:
        """Record a failed try; the task is queued again while tries are left.

        ``scene`` says that the scene itself is wrong: then it is not worth
        more than one try on each worker.
        """
        states = self.states
        with states.store.read() as look:
            attempt, row, job = states.shown(look, worker, lease, task)
        with self.turn(row):
            log_name = states.store.put_log(states.store.job_directory(job.id, job.name),
                                            f"{row.name}.{attempt.id}.txt", log_text)
            with states.tx() as tx:
                tx.set_state_of(row.id, "")  # perhaps it was the state that was wrong
                attempt, row, job = states.shown(tx, worker, lease, task)
                if attempt.state is not AttemptState.LIVE:
                    return
                states.end_attempt(tx, row.id, lease, AttemptState.FAILED, message, log_name)
                tx.count_work(worker, 0, self.states.clock.time() - attempt.started, 1)
                states.presence(worker).well = False
                if row.state is TaskState.LEASED and not states.grants.at(row.id):
                    tx.set_tries(row.id, row.tries + 1)
                    used_up = self._used_up(tx, row, job, scene)
                    states.move(tx, row, TaskState.FAILED if used_up else TaskState.QUEUED, message)

    def _used_up(self, tx: Tx, task: Task, job: Job, scene: bool) -> bool:
        """Tell whether a task that has failed is not tried again.

        Where the ``scene`` is to blame, one try on each worker that could do it is enough.
        """
        if not scene:
            return task.tries + 1 >= job.options.retry_limit
        failed = tx.failed_workers(task.id)
        return (len(failed) >= job.options.retry_limit
                or not self.crew.muster(tx).helpers(job, task.is_part) - failed)

    def keep_state(self, worker: int, lease: str, task: int, state: Path | bytes) -> None:
        """Keep what a worker that stops leaves of an unfinished task, for others to go on from."""
        with self.states.store.read() as look:
            _, row, _ = self.states.shown(look, worker, lease, task)
        with self.turn(row):
            with self.states.store.read() as look:
                _, row, job = self.states.shown(look, worker, lease, task)
                engines = look.worker(worker).engines
            if row.state in (TaskState.LEASED, TaskState.QUEUED):
                self._put_state(job, row, state, engines.get("povray") or ANY_STATE)

    def begin_from(self, job: int, frame: int, state: bytes) -> None:
        """Let a frame that nobody has begun be gone on with from what a POV-Ray left of it."""
        with self.states.store.read() as look:
            row = look.job(job), present(look.task_of_frame(job, frame))
        self._put_state(*row, state, ANY_STATE)

    def _put_state(self, job: Job, task: Task, state: Path | bytes, version: str) -> None:
        path = self.states.store.state_path(job, task)
        self.states.store.put_image(path.parent, path.name, state)
        with self.states.tx() as tx:
            tx.set_state_of(task.id, version)

    def states_of(self, job: int) -> dict[int, Path]:
        """Return what stopped renders have left of the whole frames of a job, by frame."""
        with self.states.store.read() as look:
            tasks = [task for task in map(look.task, look.states())
                     if task.job == job and task.kind is TaskKind.FRAME]
            paths = {task.frame: self.states.store.state_path(look.job(job), task)
                     for task in tasks}
        return {frame: path for frame, path in paths.items() if path.is_file()}

    def turn(self, task: Task) -> threading.Lock:
        return self._turns[task.frame % len(self._turns)]

    def wait_for_all(self) -> None:
        """Wait until whoever has begun to store something has ended."""
        for turn in self._turns:
            with turn:
                pass

    def join_frames(self) -> None:
        """Put together every frame of which all slices are there."""
        with self.states.store.read() as look:
            if not look.frames_to_join():
                return
        with self._joining:
            with self.states.store.read() as look:
                frames = [(frame, look.job(frame.job), look.parts(frame.id))
                          for frame in look.frames_to_join()]
            for frame, job, parts in frames:
                with contextlib.suppress(NoRoom):  # then it is done as soon as there is room
                    self._join_frame(frame, job, parts)

    def _join_frame(self, frame: Task, job: Job, parts: Sequence[Task]) -> None:
        store = self.states.store
        directory = store.job_directory(job.id, job.name)
        places, problem = [Path(*place_of(directory, part)) for part in parts
                           if part.kind is TaskKind.SLICE], ""
        whole = directory / "parts" / f"{frame.id}{Path(frame.name).suffix}"
        try:
            store.need(sum(place.stat().st_size for place in places))
            with store.gate.outside(), store.placing(whole) as part:
                join_rows(places, whole.suffix, part)
            made = sha256_file(whole), whole.stat().st_size
        except (OSError, ImageError) as error:
            problem = f"the slices could not be put together: {error}"
        with self.turn(frame):  # meanwhile all of it may have come whole, or the job be gone
            with store.read() as look:
                if not _is_open(look.find_task(frame.id)):
                    whole.unlink(missing_ok=True)
                    return
            if not problem:
                store.move_image(whole, *place_of(directory, frame))
            with self.states.tx() as tx:
                row = tx.find_task(frame.id)
                if row is None or not _is_open(row):
                    return
                if problem:  # then `retry` renders all of it again
                    tx.drop_parts(frame.id)
                    if row.state is not TaskState.FAILED:
                        self.states.move(tx, row, TaskState.FAILED, problem)
                else:
                    self._joined(tx, row, parts, *made)
        for place in places:
            place.unlink(missing_ok=True)

    def _joined(self, tx: Tx, frame: Task, parts: Sequence[Task], sha256: str, size: int) -> None:
        # A pass that failed has cost nothing that is known.
        cost = Cost(sum(part.cpu or 0.0 for part in parts),
                    sum(part.wall or 0.0 for part in parts),
                    max(part.memory or 0 for part in parts))
        slices = [part for part in parts if part.kind is TaskKind.SLICE]
        last = max(slices, key=lambda part: part.finished or 0.0)
        tx.set_task_result(frame.id, last.worker or 0, sha256, size, cost,
                           self.states.clock.time())
        text = f"put together from {len(slices)} slices" if slices[1:] else "rendered in one piece"
        self.states.move(tx, frame, TaskState.DONE, text)


class _Delivery:
    """An image on its way to its place: prepared, stored, settled, cleaned up after.

    ``pieces`` are the unfinished tasks that it settles, ``stale`` the files of
    which nobody has any more use then.
    """

    def __init__(self, room: _Deliveries, shown: tuple[int, str, int], image: Path | bytes,
                 log_text: bytes, cost: Cost, bottom: int,
                 written: Mapping[str, Path | bytes | None]) -> None:
        self._room, self._states, self._store = room, room.states, room.states.store
        self._shown, self._worker = shown, shown[0]
        self._image, self._bottom = image, bottom
        self._log_text, self._cost, self._written = log_text, cost, written

    def take(self) -> bool:
        """Store the image and accept it; False when it is not wanted."""
        while self._prepare():
            stored = self._store_all()
            with self._states.tx() as tx:
                self._states.shown(tx, *self._shown)  # the job may have been deleted meanwhile
                if any(tx.task(piece.id).bottom != piece.bottom
                       for piece in (self.task, *self.pieces)):
                    continue  # it was divided meanwhile
                accepted = self._settle(tx, stored)
            for path in self.stale if accepted else ():
                path.unlink(missing_ok=True)
            return accepted
        return False

    def _prepare(self) -> bool:
        """Look what the image is for; False when nobody wants it."""
        with self._store.read() as look:
            self.attempt, self.task, self.job = self._states.shown(look, *self._shown)
            self.directory = self._store.job_directory(self.job.id, self.job.name)
            if self.attempt.state is AttemptState.KEPT or look.worker(self._worker).aside:
                return False
            kept = look.kept(self.task.id)
            self.verdict, self.odd = self._compared(look, kept)
            self.pieces, self.stale = [], []
            if not self.verdict.keep:
                self.pieces = self._settled(look)
                self.stale = [self.directory / "parts" / kept_name(self.task, row.id)
                              for row in kept]
                self.stale += [Path(*place_of(self.directory, part))
                               for part in look.parts(self.task.id, TaskKind.SLICE)]
                self.stale += [self._store.state_path(self.job, piece) for piece in self.pieces
                               if piece.state_of]
        return True

    def _settled(self, look: Look) -> list[Task]:
        """Return the unfinished tasks of which all rows are in the image."""
        tasks = [self.task]
        if self.task.kind is TaskKind.SLICE and self._bottom > self.task.bottom:
            tasks += [part for part in look.parts(self.task.parent or 0, TaskKind.SLICE)
                      if self.task.top < part.top and part.bottom <= self._bottom]
        return [task for task in tasks if task.state not in (TaskState.DONE, TaskState.CANCELLED)]

    def _compared(self, look: Look, kept: Sequence[Attempt]) -> tuple[Verdict, Attempt | None]:
        """Say whether the image is to be accepted at once, and whose two others differ from."""
        task, job = self.task, self.job
        if (task.kind is not TaskKind.FRAME or task.cut is not None or job.options.in_order
                or task.state not in (TaskState.QUEUED, TaskState.LEASED)):
            return Verdict(), None
        extension = PurePosixPath(task.name).suffix
        if not is_chosen(job.id, task.frame, job.options.verify):
            odd = not kept and self._is_odd(look, extension)
            return VERDICTS["odd" if odd else "same", True], None
        with self._room.aside(self._image):
            same = [same_pixels(self.directory / "parts" / kept_name(task, row.id), self._image,
                                extension) for row in kept]
        by = [row.worker for row in kept]
        others = self._room.crew.muster(look).helpers(job) - {self._worker, *by}
        how = compared(by, same, self._worker)
        others_left = bool(others) and (how != "differs" or len(set(by)) < 2)
        odd_ones = [row for row, alike in zip(kept, same) if not alike and how == "same"]
        return VERDICTS[how, others_left], odd_ones[0] if odd_ones else None

    def _is_odd(self, look: Look, extension: str) -> bool:
        """Tell whether the image is black and those of its neighbours are not."""
        near = [self.directory / row.name for row in look.neighbours(self.job.id, self.task.frame)]
        return (bool(near) and is_black(self._image, extension)
                and not any(is_black(path, extension) for path in near
                            if path.is_file()))  # a person may have deleted it

    def _store_all(self) -> list[tuple[int, str, int]]:
        """Store the log, the image, and the files that the scene wrote.

        Return the task, the hash and the size of each piece.
        """
        self.log_name = self._store.put_log(
            self.directory, f"{self.task.name}.{self.attempt.id}.txt", self._log_text)
        if self.verdict.keep:
            self._store.put_image(self.directory / "parts", kept_name(self.task, self.attempt.id),
                                  self._image)
        self.files: dict[str, tuple[str, int]] = {}
        for path, data in self._written.items():
            self.files[path] = ("", 0) if data is None else self._put_blob(data)
        return [self._put(piece) for piece in self.pieces]

    def _put_blob(self, data: Path | bytes) -> tuple[str, int]:
        sha256 = sha256_file(data)
        stored = self._store.blob_path(sha256)
        if not stored.is_file():
            self._store.put_blob(sha256, file_blocks(data))
        return sha256, stored.stat().st_size

    def _put(self, piece: Task) -> tuple[int, str, int]:
        place, name = place_of(self.directory, piece)
        if piece.kind is not TaskKind.SLICE or (
                piece.top == self.task.top and piece.bottom >= self._bottom):
            self._store.put_image(place, name, self._image)
        else:
            with self._room.aside(self._image), self._store.placing(place / name) as part:
                crop_rows(self._image, Path(name).suffix, piece.top - self.task.top,
                          piece.bottom - piece.top, part)
        return piece.id, sha256_file(place / name), (place / name).stat().st_size

    def _settle(self, tx: Tx, stored: Sequence[tuple[int, str, int]]) -> bool:
        """Note in the database what became of the image; True when it is taken."""
        if self.verdict.keep:
            self._keep(tx)
            accepted = True
        else:
            accepted = self._accept(tx, stored)
            self._conclude(tx)
        for path, (sha256, size) in self.files.items() if accepted else ():
            if sha256:
                self._states.add_blob(tx, sha256, size)
            tx.add_written(self.job.id, path, self.task.frame, sha256, size)
        return accepted

    def _keep(self, tx: Tx) -> None:
        """Let another worker render a frame whose image is kept beside the finished ones."""
        task, why = tx.task(self.task.id), self.verdict.keep
        tx.add_job_cost(task.job, self._cost)
        tx.count_work(self._worker, 0, self._cost.wall)
        self._end(tx, AttemptState.KEPT, why)
        if task.state is TaskState.LEASED and not self._states.grants.at(task.id):
            self._states.move(tx, task, TaskState.QUEUED, why)

    def _accept(self, tx: Tx, stored: Sequence[tuple[int, str, int]]) -> bool:
        accepted = False
        for piece, sha256, size in stored:
            task = tx.task(piece)
            if task.state in (TaskState.DONE, TaskState.CANCELLED):
                continue
            mine = task.id == self.task.id
            spent = self._cost if mine else Cost()
            tx.set_task_result(task.id, self._worker, sha256, size, spent,
                               self._states.clock.time())
            tx.add_job_cost(task.job, spent)
            if task.kind is not TaskKind.PASS:
                height = self.job.pov.options.height
                rows = (task.bottom or height) - task.top
                tx.count_work(self._worker, rows / height, spent.wall)
            if mine:
                accepted = True
                self._end(tx, AttemptState.DONE)
            self._states.end_others(tx, task.id, "another was first")
            self._states.move(tx, task, TaskState.DONE, "")
            self._states.cancel_parts(tx, task)
        if not accepted and self.attempt.state is AttemptState.LIVE:
            self._end(tx, AttemptState.LOST, "another was first")
        return accepted

    def _end(self, tx: Tx, state: AttemptState, message: str = "") -> None:
        self._states.end_attempt(tx, self.task.id, self.attempt.lease, state, message,
                                 self.log_name)

    def _conclude(self, tx: Tx) -> None:
        """Tell of a doubt, and set the worker aside whose picture is the odd one."""
        task, worker = self.task, self.odd.worker if self.odd else 0
        if self.verdict.doubt:
            self._states.tell(tx, "doubtful", self.verdict.doubt, task.job, task.frame)
        if worker:
            tx.set_aside(worker, f"its picture of frame {task.frame} of job {task.job} differs "
                                 "from that of two others")
            self._states.tell(
                tx, "set aside", f"{tx.worker(worker).name} made another picture of frame "
                f"{task.frame} than two others: look at its other frames of this job",
                task.job, worker=worker)
            self._states.take_leases(tx, worker, "worker set aside")


def _is_open(frame: Task | None) -> bool:
    """Tell whether the picture of a sliced frame is still wanted."""
    return frame is not None and frame.state in (TaskState.LEASED, TaskState.FAILED)


class Scheduler:
    """The farm's rules over a ``Store``: jobs, and the doors of the rooms; all thread-safe.

    ``lease_time`` is how many seconds a lease lives without a beat. It is
    measured by the clock's ``monotonic``, so a jump of the wall clock moves
    nothing; leases found in the database at the start get the full time.
    """

    def __init__(self, store: Store, clock: Clock, lease_time: float = 30.0,
                 allowance: Allowance = Allowance()) -> None:
        self.store = store
        self.clock = clock
        self.lease_time = lease_time
        self._states = states = _States(store, clock)
        self.people = People(states, allowance)
        self._crew = crew = _Crew(states, lease_time, self.people)
        self._deliveries = deliveries = _Deliveries(states, crew)
        self._coming: set[int] = set()  # jobs that are being submitted
        self._stepping = threading.Lock()
        self.grants = states.grants
        self.join, self.rejoin, self.admit = crew.join, crew.rejoin, crew.admit
        self.leave, self.remove_worker, self.receive = crew.leave, crew.remove, crew.receive
        self.make_room = crew.make_room
        self.beat, self.release = crew.beat, crew.release
        self.live_workers, self.seen = crew.live_workers, crew.seen
        self.muster = crew.muster
        self.lease = _Dealing(states, crew).lease
        self.check_lease, self.finish = deliveries.check_lease, deliveries.finish
        self.fail = deliveries.fail
        self.keep_state, self.begin_from = deliveries.keep_state, deliveries.begin_from
        self.states_of = deliveries.states_of
        self.progress = states.grants.progress
        self.close = states.waiting.close

    # --- jobs

    def submit(self, name: str, owner: str, pov: PovJob, manifest: Manifest,
               options: JobOptions, ticket: str = "",
               frames: str = "") -> tuple[int, list[str]]:
        """Add a job; return its id and the hashes of the files that are missing.

        ``frames`` are those of an animation to render, for ``FramePlan.chosen``. The
        same ``ticket`` again, as when an answer was lost, adds no second job.
        Raises ``UserError`` when the command line asks for no frame, when two
        frames would have the same name, for slices that cannot be, or for more than
        its owner may have, and ``NoRoom`` when the disk is as good as full.
        """
        plan = pov.plan
        options = _check_options(pov, options)
        chosen = plan.chosen(frames)
        for file in (_picture_name(plan, chosen[0]), _picture_name(plan, chosen[-1])):
            safe_join(Path(), file)
            if len(file.encode()) > 200:  # its logs have longer names
                raise UserError(f"the file name {file[:40]}... is too long")
        with self.store.read() as look:
            known = look.meta(f"ticket {ticket}") if ticket else ""
            if known:
                return int(known), look.missing_blobs(manifest.key)
            self.people.check_priority(look, owner, options.priority)
            sizes = {file.sha256: file.size for file in manifest.files}
            self.people.check(look, owner, len(chosen), size=sum(sizes.values()))
        with self._adding(plan, chosen, owner) as (tx, job):
            known = tx.meta(f"ticket {ticket}")
            if ticket and known:  # the same request was under way
                return int(known), tx.missing_blobs(manifest.key)
            self.people.check(tx, owner, len(chosen), size=sum(sizes.values()))
            tx.add_manifest(manifest)
            tx.add_job(job, name, owner, pov, manifest.key, options, self.clock.time(),
                       sum(sizes.values()))
            if ticket:
                tx.set_meta(f"ticket {ticket}", str(job))
            self._states.tell(tx, "submitted", counted(len(chosen), "frame"), job)
            missing = tx.missing_blobs(manifest.key)
            _check_room(self.store.root, sum(sizes[sha256] for sha256 in missing))
            self._states.missing[job] = set(missing)
            if not missing:
                self._states.activate(tx, job)
        return job, missing

    @contextlib.contextmanager
    def _adding(self, plan: FramePlan, chosen: Sequence[int],
                owner: str) -> Iterator[tuple[Tx, int]]:
        """Add frames in steps, the last of which adds the job; else they are rows without one."""
        steps = [chosen[start:start + STEP] for start in range(0, len(chosen), STEP)]
        with self.store.tx() as tx:
            job = tx.reserve_job()
            self._coming.add(job)
        try:
            for step in steps[:-1]:
                with self.store.tx() as tx:
                    tx.add_tasks(job, ((frame, _picture_name(plan, frame)) for frame in step))
                self._rest()
            with self._states.tx(owner) as tx:
                tx.add_tasks(job, ((frame, _picture_name(plan, frame)) for frame in steps[-1]))
                yield tx, job
        finally:
            self._coming.discard(job)

    def put_blob(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """Store contents that a job asked for; the last one starts the job.

        ``NotFound`` for contents that nobody asked for.
        """
        with self.store.read() as look:
            if not look.blob_wanted(sha256):
                raise NotFound("no job asked for a file with this hash")
        size = self.store.put_blob(sha256, chunks)
        with self._states.tx() as tx:
            self._states.add_blob(tx, sha256, size)
            for job, missing in list(self._states.missing.items()):
                missing.discard(sha256)
                if not missing:
                    self._states.activate(tx, job)

    def pause(self, job: int, who: str = ADMIN) -> None:
        """Give out no more of a job; what is being rendered is finished."""
        with self._steering(job, who) as tx:
            self._states.move_job(tx, tx.job(job), JobState.PAUSED, PAUSED_BY_HAND)

    def resume(self, job: int, who: str = ADMIN) -> None:
        """Go on with a paused job."""
        with self._steering(job, who) as tx:
            row = tx.job(job)
            if row.state is not JobState.PAUSED:
                raise IllegalTransition(f"job {job} is {row.state}: only a paused job resumes")
            self._states.start(tx, row)

    def cancel(self, job: int, who: str = ADMIN) -> None:
        """End a job; finished images stay, workers are told to stop."""
        with self._steering(job, who) as tx:
            self._states.cancel(tx, tx.job(job))
        self._work_off()

    def retry(self, job: int, who: str = ADMIN) -> int:
        """Queue the failed and cancelled tasks of a job again; return how many."""
        count, begun = 0, False
        after = {TaskState.FAILED: -1, TaskState.CANCELLED: -1}
        while after:
            with self._steering(job, who) as tx:
                row = tx.job(job)
                if begun and row.state is JobState.CANCELLED:  # by hand, since the last step
                    break
                if not begun:
                    self.people.check(tx, who, row.failed + row.cancelled,
                                      int(row.state in FINISHED))
                count += 0 if begun else self._retry_parts(tx, row)
                for frm, frame in list(after.items()):
                    number, after[frm] = self._states.move_frames(
                        tx, job, frm, TaskState.QUEUED, "tried again by hand", frame)
                    count += number
                    if number < STEP:
                        del after[frm]
                row = tx.job(job)
                if count and row.state not in (JobState.ACTIVE, JobState.WAITING):
                    self._states.start(tx, row)
            begun = True
            if after:
                self._rest()
        return count

    def again(self, job: int, frames: str, who: str = ADMIN) -> int:
        """Queue frames again, also finished ones; return how many.

        Those that wait or are being rendered stay as they are. An image is in its place until
        the next one comes, and nothing is taken any more that was begun before.
        """
        with self.store.read() as look:
            plan = look.job(job).pov.plan
            still = not plan.animation and frames == str(plan.frames[0])
            tasks = [look.task_of_frame(job, frame)
                     for frame in (plan.frames if still else plan.chosen(frames))]
        if not any(tasks):
            raise UserError(f"job {job} has none of the frames {frames}")
        count = 0
        for start in range(0, len(tasks), STEP // 10):
            with self._steering(job, who) as tx:
                row = tx.job(job)
                if not start:
                    self.people.check(tx, who, len(tasks), int(row.state in FINISHED))
                count += sum(self._render_again(tx, row, tx.find_task(task.id))
                             for task in tasks[start:start + STEP // 10] if task)
                row = tx.job(job)
                if count and row.state in (JobState.PAUSED, JobState.CANCELLED):
                    self._states.start(tx, row)
            self._rest()
        return count

    def _render_again(self, tx: Tx, job: Job, frame: Task | None) -> bool:
        if frame is None or self.grants.at(frame.id) or frame.state in (
                TaskState.QUEUED, TaskState.LEASED):
            return False
        shared = job.options.radiosity == "animation"  # by all frames, so it stays
        for part in tx.parts(frame.id, TaskKind.SLICE if shared else None):
            self.store.place(job, part).unlink(missing_ok=True)
        tx.drop_parts(frame.id, shared)
        tx.make_void(frame.id)
        if frame.state is TaskState.DONE:
            tx.add_job_cost(job.id, Cost(-(frame.cpu or 0.0), -(frame.wall or 0.0)))
        self._states.move(tx, frame, TaskState.QUEUED, "rendered again by hand")
        return True

    def _retry_parts(self, tx: Tx, job: Job) -> int:
        """Queue again what is missing of sliced frames; return how many frames that were."""
        bad = (TaskState.FAILED, TaskState.CANCELLED)
        frames = [frame for frame in tx.frames_with_parts(job.id) if frame.state in bad]
        for frame in frames:
            for task in (*tx.parts(frame.id), frame):
                tx.forget_failures(task.id)
                tx.set_tries(task.id, 0)
                if task.state in bad:
                    self._states.move(tx, task, TaskState.QUEUED, "tried again by hand")
            self._states.settle_frame(tx, frame.id, "")
        return len(frames)

    def change(self, job: int, changes: Mapping[str, Any], who: str = ADMIN) -> None:
        """Set any of the ``JobOptions`` of a job."""
        with self._steering(job, who) as tx:
            row = tx.job(job)
            options = row.options.changed(changes)
            if "priority" in changes:
                self.people.check_priority(tx, who, options.priority)
            tx.begin_turn(row.owner, options.priority)
            tx.set_job_options(job, _check_options(row.pov, options))
            text = ", ".join(f"{name} = {value}" for name, value in changes.items())
            self._states.tell(tx, "changed", text, job)
            self._states.news.work = math.inf

    def delete(self, job: int, who: str = ADMIN) -> None:
        """Forget a job and delete its images and logs."""
        with self._steering(job, who) as tx:
            row = tx.job(job)
            self._states.tell(tx, "deleted", row.name, job)
            for grant in self.grants.of_job(job):
                self._states.forget(grant)
            self._states.missing.pop(job, None)
            tx.drop_job(job)
            tx.drop_rows(job, STEP)
            tx.drop_manifests()
            self._states.news.work = math.inf  # perhaps its owner had too much
            self._states.news.workers |= self.live_workers()  # they delete its project, too
        self._deliveries.wait_for_all()
        with self.store.gate.outside():
            shutil.rmtree(self.store.job_directory(row.id, row.name), ignore_errors=True)
        self._work_off()

    @contextlib.contextmanager
    def _steering(self, job: int, who: str) -> Iterator[Tx]:
        """A transaction in which somebody steers a job, its owner's or everybody's."""
        with self._states.tx(who) as tx:
            if who not in (ADMIN, owner := tx.job(job).owner):
                raise NotYours(f"job {job} is {owner}'s: only {owner} and who has the farm key may "
                               "do that")
            yield tx

    def _work_off(self, wait: bool = True) -> None:
        """Do in steps what is too much for one transaction, also what a killed coordinator left."""
        if not self._stepping.acquire(blocking=wait):
            return
        try:
            while True:
                with self.store.read() as look:
                    if not look.half_cancelled() | look.left_rows() - self._coming:
                        return
                self._rest()
                with self._states.tx() as tx:
                    for job in [*tx.half_cancelled()][:1]:
                        self._states.cancel_step(tx, job)
                    for job in [*tx.left_rows() - self._coming][:1]:
                        tx.drop_rows(job, STEP)
        finally:
            self._stepping.release()

    def _rest(self) -> None:
        """Let others have their turn."""
        self._states.waiting.wait(_Bell(), STEP_PAUSE)

    # --- keeping house

    def expire(self) -> None:
        """Take back every lease whose worker has been silent for too long."""
        self._deliveries.join_frames()  # what was complete when the coordinator was killed
        self._work_off(wait=False)
        self._crew.expire()

    def tidy(self) -> None:
        """Delete old blobs, which nobody has named for ``KEEP_BLOBS`` seconds, and old events.

        Forget guests that are long gone.
        """
        with self._states.tx() as tx:
            tx.drop_manifests()
            unused = tx.unused_blobs(self.clock.time() - KEEP_BLOBS)
            for sha256 in unused:
                tx.drop_blob(sha256)
            tx.drop_events(tx.last_event() - KEEP_EVENTS)
            self.people.tidy(tx)
            live = self.live_workers()
            for worker in tx.idle_guests(self.clock.time() - KEEP_GUESTS):
                if worker not in live:
                    tx.forget_guest(worker)
        for sha256 in unused:
            with self.store.tx() as tx:  # whoever stores it again looks for the file in a tx too
                if not tx.is_stored(sha256):
                    self.store.blob_path(sha256).unlink(missing_ok=True)

    def look_for_room(self) -> None:
        """Give out nothing while the disk takes nothing, and go on when it does."""
        if self.store.look_for_room():
            self._states.offer(math.inf)

    def wait_events(self, after: int, wait: float, limit: int) -> list[Event]:
        """Return the first events after an id, waiting up to ``wait`` seconds for one."""
        end, waiting = self.clock.monotonic() + wait, self._states.waiting
        with waiting.bell(waiting.events) as bell:
            while True:
                bell.heard()
                with self.store.read() as look:
                    events = look.events(after, limit)
                left = end - self.clock.monotonic()
                if events or left <= 0 or waiting.closed:
                    return events
                waiting.wait(bell, left)


def _picture_name(plan: FramePlan, frame: int) -> str:
    return plan.output_name(frame).rpartition("/")[2]


def _check_options(pov: PovJob, options: JobOptions) -> JobOptions:
    """Refuse what a job cannot be made to do; frames that are compared stay whole."""
    if problem := unrenderable(pov, options.povray):
        raise UserError(problem)
    problem = unsliceable(pov, options.in_order, options.slices)
    if problem and options.slices.isdecimal() and options.slices != "1":
        raise UserError(f"this job cannot be sliced: {problem}")
    if options.in_order and (options.first or options.order != "forward"):
        raise UserError("the frames of this job run in order: give neither --first nor --order")
    if options.first:
        pov.plan.chosen(options.first)  # refuses what is no frame
    if not options.verify:
        return options
    if problem := unverifiable(pov, options):
        raise UserError(f"this job cannot be verified: {problem}")
    return replace(options, slices="off")


def _check_room(place: Path, size: int) -> None:
    """Refuse a job for which there is no room; what its images will take is not known."""
    free, least = free_room(place), max(size, LEAST_FREE)
    if free < least:
        raise NoRoom(f"the coordinator's disk has {format_size(max(free, 0))} to spare and a job "
                     f"needs {format_size(least)} or more: make room there, then submit it again")


# === 12. API =================================================================
# Who may come in, and the farm's own JSON under /api/v1. Decodes, calls
# SCHEDULER, encodes; decides nothing. docs/api.md describes every route.

MAX_WAIT = 300.0  # seconds that a request may ask to be held open
MAX_LISTED = 1000  # jobs or frames in one answer
MAX_EVENTS = 1000
MAX_COST = 1e9  # seconds
MAX_IMAGE = 1 << 30  # bytes
MAX_LOG = 16 << 20  # bytes
MAX_BLOB = 1 << 40  # bytes
SESSION_TIME = 12 * 3600.0  # seconds that a login in a browser lasts
FREE_TRIES = 5  # wrong keys from an address before they are answered more and more slowly,
SLOWEST = 2.0  # seconds at last; forgotten after a minute without one
MAX_HELD = 4  # of an address at a time: while they wait, it gets no other key looked at
MAX_ADDRESSES = 1000  # whose wrong keys are remembered
MAX_INVITED = 10_000  # people by one invitation
MAX_PAIRINGS = 200  # that are begun in a minute
MAX_SESSIONS = 10_000  # of programs that have proved who they are
IDLE_SESSION = 3600.0  # seconds after which such a one may be forgotten
HELLO_TIME = 60.0  # seconds in which its first request has to come


class Access:
    """Tells who sends a request: by proof that a secret is known, or by browser login.

    The farm key is the admin's; workers, people and programs have secrets of their own. Both
    ends prove theirs in ``hello`` and what follows, a ``Session``; no secret is sent. A login
    code works once and is exchanged for a cookie, as Jupyter does it, which is its holder's. Who
    tries wrong ones again and again is answered more and more slowly.
    """

    def __init__(self, store: Store, farm_key: str, private: bool, clock: Clock,
                 people: People, pin: str = "") -> None:
        with store.read() as tx:
            self.farm_id = tx.meta("farm_id")
        self.cookie = f"povfarm-{self.farm_id[:8]}"
        self._store, self._people = store, people
        self._key = farm_key
        self._hash = secret_hash(farm_key)
        self.pin = pin
        self.pairings = Pairings(clock)
        self._boot = secrets.token_bytes(32)  # of this process: marks what it has answered
        self._proven: dict[str, Session] = {}  # by their names, the one used last at the end
        self._closed = -math.inf  # no session begins that is from before this time
        # Travels in addresses, so it is another one. A cookie, of which form tokens are made in
        # the same way, has no zero byte.
        self.guest_key = hmac.new(farm_key.encode(), b"\0guests", "sha256").hexdigest()[:32]
        self._clock = clock
        # With --private a stranger sees nothing of the farm, and may only ask to join.
        self._stranger = Identity(frozenset() if private else frozenset({"reader"}))
        self._lock = threading.Condition()
        self._codes: dict[str, tuple[float, str]] = {}  # when they end and whose, by their hashes
        self._sessions: dict[str, tuple[float, str]] = {}
        self._tries: dict[str, tuple[int, float]] = {}  # by address: how often, when last
        self._held: collections.Counter[str] = collections.Counter()
        self.dialects: list[Callable[[Request], Identity | None]] = []  # that know their guests

    def identify(self, request: Request) -> Identity:
        """Return the sender of a request; a stranger may at most read."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() in ("povfarm", "bearer"):
            self.check_patience(request.remote)
            if scheme.lower() == "povfarm":
                return self._by_proof(request, token.strip())
            who, secret = split_key(token)
            known = self._known(who, secret_hash(secret), request.remote)
            if request.inside or known.roles <= _ROLES_OF[Role.VIEWER]:
                return known  # Prometheus and the like cannot do better, and only look
            raise ProtocolError(401, "this key is not to be sent, requests are signed with it: use "
                                "povfarm.py, or see docs/api.md")
        with self._lock:
            end, name = self._sessions.get(secret_hash(self._session(request)), (0.0, ""))
        identity = self._named(name)
        if end <= self._clock.monotonic() or identity is None:
            return next(filter(None, (one(request) for one in self.dialects)), self._stranger)
        if request.method in ("GET", "HEAD"):
            return identity
        # A page elsewhere can make a browser send the cookie: with it alone one
        # may only look. What the forms of PAGES change, check_form guards as well.
        _check_origin(request.headers)
        looks = replace(identity, roles=identity.roles & {"reader"})
        return looks if request.path.startswith("/api/") else identity

    def _named(self, name: str, secret: str | None = None) -> Identity | None:
        """Return the admin or one of the people, None for who is none (any more).

        With the hash of a ``secret`` only who has that: the one place that compares it.
        """
        if name == ADMIN:
            return _ADMIN
        with self._store.read() as look:
            person = look.person(name)
        if person is None or not hmac.compare_digest(secret or person.token, person.token):
            return None
        return Identity(_ROLES_OF[person.role] | self._stranger.roles, 0, person.name)

    def knows(self, identity: Identity) -> bool:
        """Tell whether somebody is still what it was when it came: a person may be removed."""
        return "person" not in identity.roles or self._named(identity.name) is not None

    def login_code(self, name: str = ADMIN) -> str:
        """Return a new code that logs somebody's browser in, once, within ten minutes."""
        return self._issue(self._codes, name, 600)

    def log_in(self, code: str, remote: str = "127.0.0.1") -> str:
        """Exchange a login code for a session; ``ProtocolError`` 403 when it is no good."""
        self.check_patience(remote)
        with self._lock:
            end, name = self._codes.pop(secret_hash(code), (0.0, ""))
        if end >= self._clock.monotonic():
            return self._issue(self._sessions, name, SESSION_TIME)
        self.slow_down(remote)
        raise ProtocolError(403, "this link was used before or is too old: "
                                 "'povfarm.py login' prints a new one")

    def log_out(self, request: Request) -> None:
        """End the session of a request's cookie."""
        with self._lock:
            self._sessions.pop(secret_hash(self._session(request)), None)

    def form_token(self, request: Request) -> str:
        """Return the token that a form on a page for this browser must hold."""
        session = self._session(request)
        return hmac.new(self._key.encode(), session.encode(), "sha256").hexdigest()

    def check_form(self, request: Request) -> dict[str, str]:
        """Return a form's fields; ``ProtocolError`` 403 where it was not made for this browser."""
        fields = request.form()
        if not hmac.compare_digest(fields.get("token", "").encode(),
                                   self.form_token(request).encode()):
            raise ProtocolError(403, "this form is too old: load the page again")
        return fields

    def _session(self, request: Request) -> str:
        for part in request.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie and request.place == self.place(value):
                return value
        return ""

    def place(self, session: str) -> str:
        """Return what is before the path of every page for a browser's session.

        The cookie is for this place alone. Browsers send cookies to all ports of a host, also to
        one of another user; but only with the paths that a cookie is for.
        """
        return f"/-{derived(session, 'place')[:16]}"

    def _issue(self, ends: dict[str, tuple[float, str]], name: str, seconds: float) -> str:
        """Return a new secret, noted with its end; those that have ended are forgotten."""
        secret, now = secrets.token_urlsafe(24), self._clock.monotonic()
        with self._lock:
            for old in [one for one, (end, _) in ends.items() if end < now]:
                del ends[old]
            ends[secret_hash(secret)] = now + seconds, name
        return secret

    def hello(self, who: str, nonce: str) -> dict[str, str]:
        """Prove to a client that we know the secret of ``who``, as it will have to.

        Nothing of it is kept until then. What is told of somebody who is not known here
        looks like what is told of all others.
        """
        said = f"{who.encode().hex()}.{nonce}.{int(self._clock.monotonic() * 1000):x}"
        session = self._session_called(f"{said}.{mac(self._boot, said)}")
        return {"session": session.name, "farm_id": self.farm_id, "proof": session.proof}

    def _session_called(self, name: str) -> Session:
        """Return the session of a name that ``hello`` has made."""
        secret = self._secret_of(_whose(name)) or mac(self._boot, name)
        return Session(name, name.split(".")[1], secret, self.farm_id, self.pin)

    def _secret_of(self, who: str) -> str:
        """Return the hash of somebody's secret, also of a removed worker; empty for nobody's."""
        if who == FARM:
            return self._hash
        with self._store.read() as tx:
            if not re.fullmatch(WORKER + "[0-9]{1,15}", who):
                person = tx.person(urllib.parse.unquote(who))
                return person.token if person else ""
            worker = tx.find_worker(int(who[1:]))
        known = re.fullmatch("(?:removed [0-9]+ )?([0-9a-f]{64})", worker.token if worker else "")
        return known[1] if known else ""

    def secret_for(self, name: str, ticket: str) -> str:
        """Return the secret of a worker that joins with the key of somebody."""
        key = self._secret_of(FARM if name == ADMIN else urllib.parse.quote(name))
        return worker_secret(key, self.farm_id, ticket)

    def _by_proof(self, request: Request, proof: str) -> Identity:
        """Return who has signed the request, which is taken once."""
        match = _PROOF.fullmatch(proof)
        session = match and (self._proven.get(match[1]) or self._new_session(match[1]))
        sha256 = request.headers.get("x-sha256", "")
        if not (match and session and hmac.compare_digest(match[3], session.mark(
                int(match[2]), request.method, request.target, sha256))):
            raise self._wrong_key(request.remote, _whose(match[1]) if match else FARM)
        self._use(session, int(match[2]))
        request.body.expect(sha256)
        return self._known(_whose(session.name), session.secret, request.remote)

    def _new_session(self, name: str) -> Session:
        """Return a session that nobody has used yet: soon after ``hello``, or what is heard twice
        could be taken twice."""
        said, _, mark = name.rpartition(".")
        if not hmac.compare_digest(mark, mac(self._boot, said)) or (
                _said_at(name) <= max(self._closed, self._clock.monotonic() - HELLO_TIME)):
            raise _session_over()
        return self._session_called(name)

    def _use(self, session: Session, count: int) -> None:
        """Note that a session has signed a request; it is refused when that comes again."""
        now = self._clock.monotonic()
        with self._lock:
            session = self._proven.pop(session.name, session)
            self._proven[session.name] = session
            session.used = now
            if not session.takes(count):
                raise _session_over()
            oldest = next(iter(self._proven.values()))
            if len(self._proven) > MAX_SESSIONS or now - oldest.used > IDLE_SESSION:
                del self._proven[oldest.name]
                self._closed = max(self._closed, _said_at(oldest.name))

    def _known(self, who: str, secret: str, remote: str) -> Identity:
        """Return somebody whose secret has this hash."""
        if hmac.compare_digest(secret, self._hash):
            return _ADMIN
        name = urllib.parse.unquote(who)
        if name != ADMIN and (person := self._named(name, secret)):
            return person
        with self._store.read() as tx:
            row = tx.worker_by_token(secret)
            removed = row is None and tx.was_removed(secret)
        if removed:
            raise ProtocolError(401, "this worker was removed from the farm: to let it work again, "
                                "start it with --key-file and a copy of the coordinator's "
                                "farm.key, or without, and admit it")
        if row is None:
            raise self._wrong_key(remote, who)
        if row.state is WorkerState.PENDING:  # a stranger whose turn may come
            return Identity(self._stranger.roles | {"pending"}, row.id, row.name)
        return Identity(_WORKER, row.id, row.name)

    def _wrong_key(self, remote: str, who: str) -> ProtocolError:
        self.slow_down(remote)
        if who and not who.startswith(WORKER):
            return ProtocolError(401, f"this key of {urllib.parse.unquote(who)[:40]!r} is good for "
                                 "nothing (any more): ask for an invitation, and come with --code")
        return ProtocolError(401, "this key is not the farm's: give a copy of the coordinator's "
                             "farm.key, with --key-file")

    # --- people

    def add(self, name: str, role: Role, limits: Mapping[str, int], ticket: str, uses: int = 0,
            who: str = ADMIN) -> str:
        """Add a person and return the key, or invite so many, without a name: return the code.

        Both ends make it of the farm's key, so that it is not sent.
        """
        person = Person(name, role, "", json.dumps(limits), self._clock.time())
        if uses:
            key = invitation_code(self._key, ticket)
            with self._store.gate.outside():
                secret = invitation_secret(key)
            person = replace(person, name=f"+{ticket}", token=secret, uses=uses)
        else:
            name = person_name(name)
            key = person_key(name, self._key, ticket)
            person = replace(person, name=name, token=secret_hash(key))
        self._people.add(person, who)
        return key

    def come(self, name: str, ticket: str, share: str, proof: str, remote: str) -> dict[str, str]:
        """Let somebody in who proves to know a code; return our proof, and share of the key.

        The code alone does not lead to the key: others may have it, and hear what is said. A
        request that comes again is answered with the same.
        """
        self.check_patience(remote)
        name = person_name(name)
        invitation = self._people.invitation(lambda secret: hmac.compare_digest(
            proof.encode(), derived(secret, "come", name, ticket, share).encode()))
        if invitation is None:
            self.slow_down(remote)
            raise ProtocolError(403, "this code is wrong, or too old: ask for a new one")
        with self._store.gate.outside():
            mine = Pairing(derived(self._key, "come", name, ticket, share))
            secret, _ = mine.agree(share, [name, ticket, share, mine.share])
        person = replace(invitation, name=name, added=self._clock.time(), uses=None,
                         token=secret_hash(person_key(name, secret, ticket)))
        self._people.come(invitation.name, person)
        return {"name": name, "role": person.role, "share": mine.share,
                "proof": derived(invitation.token, "welcome", name, ticket, mine.share)}

    def fits(self, given: str, secret: str, remote: str) -> bool:
        """Tell whether a secret that was sent is the right one; a wrong one is slowed down."""
        self.check_patience(remote)
        good = hmac.compare_digest(given.encode(), secret.encode())
        if not good:
            self.slow_down(remote)
        return good

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

    def check_patience(self, remote: str) -> None:
        """Raise ``ProtocolError`` 429 while too many wrong keys of an address are held up."""
        # Also where the key is right: else wrong ones could be tried as fast as ever, all at
        # the same time, and whatever is not answered at once be taken for wrong.
        # Where as many wait as may, the next wrong one could not be held up.
        full = sum(self._held.values()) >= 8 * MAX_HELD
        if self._held[remote] >= MAX_HELD or (
                full and self._tries.get(remote, (0, 0.0))[0] >= FREE_TRIES):
            raise ProtocolError(429, "too many wrong keys come from this address: wait a little",
                                Retry_After="2")


def _check_origin(headers: Mapping[str, str]) -> None:
    """Refuse what a browser says that a page of another origin made it send."""
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin", "").partition("//")[2]
    if site not in ("same-origin", "none") and (
            site is not None or ("origin" in headers and origin != headers.get("host"))):
        raise ProtocolError(403, "a page of another site has sent this: nothing was done")


def _session_over() -> ProtocolError:
    return ProtocolError(401, "this conversation is over: say hello again", SESSION_OVER)


def _whose(name: str) -> str:
    """Return who has said ``hello``."""
    return bytes.fromhex(name.partition(".")[0]).decode()


def _said_at(name: str) -> float:
    """Return the time at which ``hello`` has made this name."""
    return int(name.split(".")[2], 16) / 1000


_PROOF = re.compile(r"session=([0-9a-f]*(?:\.[0-9a-f]+){3}),count=([0-9]{1,15}),mac=([0-9a-f]{64})")
_ADMIN = Identity(frozenset({"reader", "person", "submit", "user", "admin"}), name=ADMIN)
_ROLES_OF: Mapping[Role, frozenset[str]] = {
    Role.USER: frozenset({"reader", "person", "submit", "user"}),
    Role.VIEWER: frozenset({"reader", "person"}),
    Role.SUBMIT: frozenset({"submit"}),
}
GUEST = Identity(frozenset({"guest"}), name="guest")
_WORKER = frozenset({"reader", "pending", "worker"})


class Views:
    """What is told of jobs, frames and workers, to programs and on the pages."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._farm = scheduler
        self._store = scheduler.store

    def jobs(self, tx: Look, jobs: Iterable[Job], whole: bool = False) -> list[dict[str, Any]]:
        """Return jobs as people want to see them, all of one moment."""
        muster = self._farm.muster(tx)
        return [self.job(tx, job, whole, muster) for job in jobs]

    def job(self, tx: Look, job: Job, whole: bool = False,
            muster: Muster | None = None) -> dict[str, Any]:
        """Return a job as people want to see it; ``whole`` adds the newest failure."""
        muster = muster or self._farm.muster(tx)
        counts = {state.value: number for state, number in job.counts.items()}
        total = sum(counts.values())
        grants = self._farm.grants.of_job(job.id)
        frames = {portion.task: self._farm.progress(portion.task)
                  for grant in grants for portion in list(grant.portions.values())
                  if portion.kind is TaskKind.FRAME}
        slices = [view for frame in tx.frames_to_cut(job.id)
                  for view in self._slices(tx, frame, {})]
        part = sum(frames.values()) + sum(view["share"] * view["progress"] for view in slices)
        rests = job.state is JobState.PAUSED and not job.leased  # since the last frame was done
        last = tx.newest_task_of(job.id) if rests else None
        end = job.finished or (last and last.finished) or self._farm.clock.time()
        spent = end - job.started if job.started else 0.0
        work = job.done + part
        rate = work / spent if spent > 0 else 0.0
        left = job.queued + job.leased - part
        view = {**vars(job.options), "slicing": job.options.slices, **{
            name: getattr(job, name) for name in (
                "id", "name", "state", "reason", "owner", "created", "started", "finished", "cpu",
                "wall")}}
        view["why"], view["cure"] = muster.why(job)
        view.update(
            progress=work / total if total else 0.0, elapsed=spent,
            rate=rate, eta=left / rate if rate and left and grants else None,
            frames={"total": total, **counts},
            slices={"total": len(slices), **{
                name: sum(view["state"] == name for view in slices) for name in counts}},
            waiting_for=muster.waiting_for(job),
        )
        if whole:
            options, failure = job.pov.options, tx.first_failure(job.id)
            files, size, written = tx.extent(job.id)
            view.update(
                files=files, size=size, written=written,
                active=job.state is JobState.ACTIVE, last_start=tx.last_start(job.id),
                directory=f"jobs/{self._store.job_directory(job.id, job.name).name}",
                pov=json.loads(job.pov_json), engine=job.engines.get("povray", ""),
                notice=self._store.notice, width=options.width, height=options.height,
                extension=options.extension,
                failure=failure and {"frame": failure.frame, "message": failure.message + (
                    " (if frames read what others write, submit it with --in-order)"
                    if not job.options.in_order and tx.written(job.id) else "")})
        return view

    def frame(self, tx: Look, task: Task, workers: Mapping[int, str]) -> dict[str, Any]:
        """Return a frame as people want to see it, with its slices while there are any."""
        view = {name: getattr(task, name) for name in (
            "frame", "name", "state", "tries", "finished", "size", "sha256", "cpu", "wall",
            "memory")}
        view["progress"] = (1.0 if task.state == TaskState.DONE else self._farm.progress(task.id))
        at = (portion.grant.worker for portion in self._farm.grants.at(task.id))
        view["worker"] = workers.get(task.worker or next(at, 0), "")
        if task.cut is not None and task.state != TaskState.DONE:
            view["slices"] = self._slices(tx, task, workers)
            view["progress"] = sum(part["share"] * part["progress"] for part in view["slices"])
        return view

    def _slices(self, tx: Look, frame: Task, workers: Mapping[int, str]) -> list[dict[str, Any]]:
        """Return the slices of a frame from top to bottom; ``share`` is of the frame's rows."""
        return [{
            "id": part.id, "top": part.top, "bottom": part.bottom,
            "state": part.state, "worker": workers.get(part.worker or 0, ""),
            "share": (part.bottom - part.top) / frame.bottom,
            "progress": 1.0 if part.state == TaskState.DONE
            else self._farm.progress(part.id),
        } for part in tx.parts(frame.id) if part.kind == TaskKind.SLICE]

    def workers(self, tx: Look) -> list[dict[str, Any]]:
        """Return every worker with what it does and how long ago it was heard of."""
        muster, views = self._farm.muster(tx), []
        for row in tx.workers():
            view = {name: getattr(row, name) for name in (
                "id", "name", "cores", "memory", "system", "address", "joined", "owner")}
            held = self._farm.grants.of_worker(row.id)
            view.update(engines=row.engines, tags=json.loads(row.tags_json), runs=len(held),
                        seen=self._farm.seen(row.id), does=self._does(tx, held))
            if row.state == WorkerState.PENDING:
                view.update(state="pending", code=row.code)
            elif row.id not in muster.live:
                view["state"] = "gone"
            elif sickness := muster.sickness(row):
                view.update(state="sick", reason=sickness)
            else:
                view["state"] = "working" if held else "idle"
            views.append(view)
        return views

    def _does(self, tx: Look, held: Sequence[Grant]) -> dict[str, Any] | None:
        """Return what a worker is at, of what it holds: the task that is furthest."""
        portions = [portion for grant in held for portion in list(grant.portions.values())]
        if not portions:
            return None
        one = max(portions, key=lambda portion: self._farm.progress(portion.task))
        task = tx.find_task(one.task)  # none when it is newer than what is looked at
        return {"job": one.grant.job, "frame": task.frame, "kind": task.kind, "top": task.top,
                "bottom": task.bottom, "tasks": len(portions),
                "threads": sum(grant.threads for grant in held),
                "progress": self._farm.progress(task.id)} if task else None

    def totals(self, tx: Look) -> dict[str, list[dict[str, Any]]]:
        """Return frames, seconds and failures of all workers, computers and groups so far.

        A client of another system may have its computer after an @; tags are the groups.
        """
        sums: dict[str, dict[Any, list[float]]] = {"workers": {}, "computers": {}, "groups": {}}
        for row, done in tx.totals():
            computer, groups = row.name.rpartition("@")[2], json.loads(row.tags_json) or [""]
            for kind, names in ("workers", [(row.name, row.id)]), ("computers", [(computer,)]), (
                    "groups", [(group,) for group in groups]):
                for name in names if any(done) else ():
                    before = sums[kind].get(name, (0, 0, 0))
                    sums[kind][name] = [a + b for a, b in zip(before, done)]
        return {kind: [{"name": name[0], **dict(zip(DONE, done))}
                       for name, done in sorted(named.items(), key=lambda one: -one[1][0])]
                for kind, named in sums.items()}

    def log(self, tx: Look, job: Job, task: Task, plain: bool) -> str:
        """Return what POV-Ray printed of a frame, ``plain`` without lines between the attempts."""
        attempts = tx.attempts(task.id)
        names = {attempt.worker: tx.worker(attempt.worker).name for attempt in attempts}
        if plain:
            attempts = [attempt for attempt in attempts if attempt.kind != TaskKind.PASS
                        and attempt.state == AttemptState.DONE] or attempts[-1:]
            attempts.sort(key=lambda attempt: int(attempt.top))
        directory = self._store.job_directory(job.id, job.name)
        errors = [attempt.message for attempt in attempts if attempt.state == "failed"]
        done = task.state == TaskState.DONE
        parts = [f"{error}\n\n" for error in errors[-1:] if not (done or plain)]
        for attempt in attempts:
            ended = attempt.state + (f": {attempt.message}" if attempt.message else "")
            rows = (f", rows {attempt.top} to {attempt.bottom - 1}"
                    if attempt.kind == TaskKind.SLICE else "")
            what = f"frame {task.frame}{rows}"
            parts += [] if plain else [f"--- {what} on {names[attempt.worker]}: {ended}\n"]
            if attempt.log:
                with contextlib.suppress(OSError):
                    parts.append((directory / attempt.log).read_text("utf-8", "replace"))
        return "".join(parts)

    def made(self, tx: Look, job: Job) -> dict[str, Path]:
        """Return the finished images of a job, and the files that its scene wrote, by name."""
        directory = self._store.job_directory(job.id, job.name)
        files = {row.path: self._store.blob_path(row.sha256)
                 for row in tx.written(job.id) if row.sha256}
        return {**files, **{row.name: safe_join(directory, row.name)
                            for row in tx.tasks_in(job.id, TaskState.DONE)}}

    def figures(self, tx: Look) -> str:
        """Return counters in Prometheus' text format."""
        jobs, workers = tx.jobs(0, -1), tx.workers()
        lines = ["# TYPE povfarm_frames gauge"]
        lines += [f'povfarm_frames{{state="{state}"}} {sum(job.counts[state] for job in jobs)}'
                  for state in TaskState]
        lines += ["# TYPE povfarm_jobs gauge"]
        lines += [f'povfarm_jobs{{state="{state}"}} {sum(job.state is state for job in jobs)}'
                  for state in JobState]
        lines += ["# TYPE povfarm_workers gauge", f"povfarm_workers {len(workers)}",
                  "# TYPE povfarm_workers_live gauge",
                  f"povfarm_workers_live {len(self._farm.live_workers())}",
                  "# TYPE povfarm_cpu_seconds counter",
                  f"povfarm_cpu_seconds {sum(job.cpu for job in jobs):.3f}"]
        return "\n".join(lines) + "\n"


def said_frames(frames: float) -> str:
    """Return a number of frames, with slices as parts of some, for people."""
    return f"{frames:,.1f}".removesuffix(".0")


# What the bodies of requests have, beside the records of MODEL.
Submission = TypedDict("Submission", {
    "name": str, "pov": PovJob, "manifest": Manifest, "options": Mapping[str, Any],
    "ticket": Optional[str], "frames": Optional[str]})
Code = TypedDict("Code", {"code": str})
Comer = TypedDict("Comer", {"name": str, "ticket": str, "share": str, "proof": str})
Hello = TypedDict("Hello", {"who": str, "nonce": str})
Pair = TypedDict("Pair", {"commitment": str, "share": Optional[str], "nonce": Optional[str]})
Wish = TypedDict("Wish", {"want": int, "slots": int, "idle": int})
Beat = TypedDict("Beat", {"leases": Mapping[str, Mapping[str, float]]})
Failure = TypedDict("Failure", {"message": str, "scene": bool, "log": str})


class Pairings:
    """The coordinator's ends of pairings, by the commitments of the workers, for a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Pairing, float]] = {}

    def of(self, commitment: str, begin: bool) -> Pairing:
        """Return the pairing, a new one where that may ``begin``.

        There are few at a time: each is one try to meet a code that somebody is shown.
        """
        if not re.fullmatch("[0-9a-f]{64}", commitment):
            raise UserError("a commitment is a SHA-256 hash")
        now = self._clock.monotonic()
        with self._lock:
            self._known = {one: known for one, known in self._known.items() if known[1] > now}
            if commitment not in self._known:
                if not begin:
                    raise ProtocolError(404, "this took too long: begin again", PAIRING_OVER)
                if len(self._known) >= MAX_PAIRINGS:
                    raise ProtocolError(429, "too many workers ask to join", Retry_After="10")
                self._known[commitment] = Pairing(), now + HELLO_TIME
            return self._known[commitment][0]


@dataclass(frozen=True)
class Newcomer(Wired):
    """A person to be added; with ``uses`` an invitation for so many, without a name.

    ``limits`` are those that are not everybody's.
    """

    name: str
    role: Role
    limits: Mapping[str, int]
    ticket: str
    uses: int

    @classmethod
    def from_wire(cls, wire: Any) -> Newcomer:
        """Read the JSON form; ``UserError`` when it has another shape."""
        given = fields_of(cls, wire)
        if given["role"] not in set(Role) or not re.fullmatch(r"[\w-]{16,100}", given["ticket"]):
            raise UserError("a person has a role (user, viewer or submit), and a ticket 16 letters "
                            "or more")
        if not 0 <= given["uses"] <= MAX_INVITED:
            raise UserError(f"an invitation is for 1 to {MAX_INVITED} people")
        return cls(**{**given, "role": Role(given["role"]),
                      "limits": checked(given["limits"], ALLOWANCES)})


class Api:
    """The routes of /api/v1. ``routes`` is set once the router has them all."""

    def __init__(self, scheduler: Scheduler, access: Access, name: str) -> None:
        self.routes: Sequence[BoundRoute] = ()
        self.views = Views(scheduler)
        self._farm = scheduler
        self._store = scheduler.store
        self._access = access
        self.name = name
        self._started = scheduler.clock.monotonic()

    # --- looking

    @route("GET", "/api/v1/farm", role="reader", summary="The farm as a whole")
    def farm(self, request: Request) -> Response:
        """Name, version, id, the newest event's id; ``notice`` says what is wrong, or nothing."""
        with self._store.read() as tx:
            return json_response({
                "name": self.name, "version": VERSION, "farm_id": tx.meta("farm_id"),
                "event": tx.last_event(), "workers": len(self._farm.live_workers()),
                "notice": self._store.notice, "you": request.identity.name,
                "uptime": self._farm.clock.monotonic() - self._started,
            })

    @route("GET", "/api/v1/jobs", role="reader", summary="The jobs, the newest first")
    def jobs(self, request: Request) -> Response:
        """Query: limit, after (the last id already seen), owner (a name)."""
        with self._store.read() as tx:
            rows = tx.jobs(_query_number(request, "after", 0), _query_limit(request, 100),
                           request.query.get("owner", ""))
            return json_response({"jobs": self.views.jobs(tx, rows)})

    @route("GET", "/api/v1/jobs/<job:int>", role="reader", summary="One job")
    def job(self, request: Request) -> Response:
        """One job with its counters, rate and, when frames failed, the newest failure."""
        with self._store.read() as tx:
            return json_response(self.views.job(tx, tx.job(request.params["job"]), whole=True))

    @route("GET", "/api/v1/jobs/<job:int>/frames", role="reader", summary="The frames of a job")
    def frames(self, request: Request) -> Response:
        """Query: limit, after (the last frame number already seen), since (a time)."""
        with self._store.read() as tx:
            job = tx.job(request.params["job"])
            names = {row.id: row.name for row in tx.workers()}
            rows = tx.tasks(job.id, _query_number(request, "after", -1),
                            _query_limit(request, MAX_LISTED),
                            _seconds(request.query.get("since", 0), math.inf))
            starts = tx.starts(job.id, rows)
            return json_response({"frames": [
                {**self.views.frame(tx, row, names), "started": starts.get(row.frame)}
                for row in rows]})

    @route("GET", "/api/v1/jobs/<job:int>/frames/<frame:int>/image", role="reader",
           summary="A finished image")
    def image(self, request: Request) -> Response:
        """The image as POV-Ray wrote it; takes Range and If-None-Match."""
        with self._store.read() as tx:
            job, task = self._frame(tx, request)
        if task.state != TaskState.DONE:
            raise ProtocolError(404, f"frame {task.frame} is {task.state}")
        path = safe_join(self._store.job_directory(job.id, job.name), task.name)
        return file_response(path, _MIME[path.suffix], request, task.sha256 or "")

    @route("GET", "/api/v1/jobs/<job:int>/slices/<task:int>/image", role="reader",
           summary="A finished slice")
    def slice_image(self, request: Request) -> Response:
        """The rows of a slice as a picture of their own, until its frame is put together."""
        with self._store.read() as tx:
            job, task = tx.job(request.params["job"]), tx.find_task(request.params["task"])
            if (task is None or task.job != job.id or task.kind != TaskKind.SLICE
                    or task.state != TaskState.DONE):
                raise ProtocolError(404, "there is no such slice, or it is not finished")
            path = self._store.place(job, task)
        return file_response(path, _MIME[path.suffix], request, task.sha256 or "")

    @route("GET", "/api/v1/jobs/<job:int>/frames/<frame:int>/log", role="reader",
           summary="What POV-Ray printed")
    def log(self, request: Request) -> Response:
        """The text of every attempt at one frame, the oldest first, as plain text.

        Of a frame that has failed, and has no image, the last error comes before
        them. With ``plain`` only the texts that count: of what was accepted, or
        of the last attempt, without the lines between them.
        """
        plain = "plain" in request.query
        with self._store.read() as tx:
            job, task = self._frame(tx, request)
            return text_response(self.views.log(tx, job, task, plain))

    @route("GET", "/api/v1/jobs/<job:int>/files", role="reader",
           summary="The files that the scene wrote")
    def written(self, request: Request) -> Response:
        """Path, SHA-256, size, and the frame that wrote it last, of each file.

        One that is larger than a run may leave, or has a name that is not brought back,
        has an empty SHA-256: it was not. ``appended`` tells that the scene may append to it.
        """
        with self._store.read() as tx:
            job = tx.job(request.params["job"])
            pov = job.pov
            return json_response({"files": [{**vars(row), "appended": pov.appends_to(row.path)}
                                            for row in tx.written(job.id)]})

    @route("GET", "/api/v1/jobs/<job:int>/files/<hash>", role="reader",
           summary="A file that the scene wrote")
    def written_file(self, request: Request) -> Response:
        """The contents with this hash."""
        sha256 = _sha256(request)
        with self._store.read() as tx:
            job = tx.job(request.params["job"])
            if all(row.sha256 != sha256 for row in tx.written(job.id)):
                raise ProtocolError(404, "the scene wrote no file with this hash")
        return file_response(self._store.blob_path(sha256), "application/octet-stream", request,
                             sha256)

    @route("GET", "/api/v1/jobs/<job:int>/archive.zip", role="reader",
           summary="All finished images of a job")
    def archive(self, request: Request) -> Response:
        """A zip of them and of the files that the scene wrote, made while it is sent."""
        with self._store.read() as tx:
            job = tx.job(request.params["job"])
            made = self.views.made(tx, job)
        response = stream_response(zip_stream(made.items()), "application/zip")
        name = urllib.parse.quote(f"{self._store.job_directory(job.id, job.name).name}.zip")
        response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
        return response

    @route("GET", "/api/v1/workers", role="reader", summary="The workers")
    def workers(self, request: Request) -> Response:
        """Every worker with what it does: working, idle, gone, sick or pending."""
        with self._store.read() as tx:
            return json_response({"workers": self.views.workers(tx)})

    @route("GET", "/api/v1/totals", role="reader", summary="What was rendered, and by whom")
    def totals(self, request: Request) -> Response:
        """Frames (slices as parts of some), seconds and failures by workers, computers, groups."""
        with self._store.read() as tx:
            return json_response(self.views.totals(tx))

    @route("GET", "/api/v1/events", role="reader", waits=True,
           summary="What happens, as it happens")
    def events(self, request: Request) -> Response:
        """Server-sent events after the id ``after`` (or Last-Event-ID), or from now on.

        With ``wait`` (seconds) it is one JSON list instead, answered when there is something.
        """
        with self._store.read() as tx:
            newest = tx.last_event()
        after = _query_number(request, "after", newest)
        if "wait" in request.query:
            events = self._farm.wait_events(after, _seconds(request.query["wait"]), MAX_EVENTS)
            if not self._access.knows(request.identity):
                raise ProtocolError(401, "you were removed from this farm")
            return json_response({
                "events": list(map(vars, events)), "more": len(events) == MAX_EVENTS})
        known = re.fullmatch("[0-9]{1,15}", request.headers.get("last-event-id", ""))
        return stream_response(self._event_stream(int(known[0]) if known else after,
                                                  request.identity), "text/event-stream")

    @route("GET", "/api/v1/openapi.json", role="reader", summary="This API, for programs")
    def openapi(self, request: Request) -> Response:
        """An OpenAPI 3 document, made from the routes themselves."""
        return json_response(openapi_document(self.routes))

    @route("GET", "/api/v1/metrics", role="reader", summary="Figures for Prometheus")
    def metrics(self, request: Request) -> Response:
        """Counters in Prometheus' text format."""
        with self._store.read() as tx:
            return text_response(self.views.figures(tx))

    # --- steering

    @route("POST", "/api/v1/jobs", role="submit", max_body=64 << 20, takes=Submission,
           summary="Submit a job")
    def submit(self, request: Request) -> Response:
        """Body: name, pov, manifest, options, ticket, frames. Answers id and missing hashes.

        ``frames``, such as ``1-10,50``, are those of the animation to render, all without it.
        Everything that happens to the job comes after the event ``event``. The same ticket, any
        text, sent again is answered with the same job.
        """
        wire = fields_of(Submission, request.json())
        job, missing = self._farm.submit(
            one_line(wire["name"])[:100], request.identity.name, PovJob.from_wire(wire["pov"]),
            Manifest.from_wire(wire["manifest"]), JobOptions().changed(wire["options"]),
            wire["ticket"][:100], wire["frames"])
        with self._store.read() as tx:
            event = tx.first_event(job) - 1
        return json_response({"id": job, "missing": missing, "event": event}, 201)

    @route("PUT", "/api/v1/blobs/<hash>", role="submit", max_body=MAX_BLOB,
           summary="Send a file of a job")
    def put_blob(self, request: Request) -> Response:
        """Body: the contents; 422 when they have another hash, 404 when no job asked for them."""
        request.body.expect(None)  # the target is signed, and says it
        self._farm.put_blob(_sha256(request), request.body.blocks())
        return Response(204)

    @route("POST", "/api/v1/jobs/<job:int>/<action>", role="user", summary="Steer a job")
    def steer(self, request: Request) -> Response:
        """Action: pause, resume, cancel or retry.

        Query of retry: frames, such as ``5-9``, which are rendered again, finished or not.
        """
        action, frames = request.params["action"], request.query.get("frames", "")
        if action not in ("pause", "resume", "cancel", "retry"):
            raise ProtocolError(404, f"a job cannot be asked to {action}")
        if action == "retry" and frames:
            self._farm.again(request.params["job"], frames, request.identity.name)
        else:
            getattr(self._farm, action)(request.params["job"], request.identity.name)
        return self.job(request)

    @route("PATCH", "/api/v1/jobs/<job:int>", role="user", summary="Change a job")
    def change(self, request: Request) -> Response:
        """Body: any of a job's options."""
        wire = request.json()
        if not isinstance(wire, dict):
            raise UserError("the body is not a list of changes")
        self._farm.change(request.params["job"], wire, request.identity.name)
        return self.job(request)

    @route("DELETE", "/api/v1/jobs/<job:int>", role="user", summary="Delete a job")
    def delete(self, request: Request) -> Response:
        """Delete a job with its images and logs."""
        self._farm.delete(request.params["job"], request.identity.name)
        return Response(204)

    # --- working

    @route("POST", "/api/v1/lease", role="pending", takes=Wish, waits=True, summary="Ask for work")
    def lease(self, request: Request) -> Response:
        """Body: want, slots, idle, wait, projects. Held open until there is something to render.

        ``open`` is how many tasks the farm has left; ``pending`` that this worker
        is not admitted yet; ``gone`` which of the projects, given by their keys, no job has.
        """
        wire = request.json()
        offer = Offer(**{name: min(max(number, 0), 1000)
                         for name, number in fields_of(Wish, wire).items()},
                      projects=_projects(request, wire))
        worker = request.identity.worker
        leases = self._farm.lease(worker, offer, _seconds(wire.get("wait", 0)), request.alive)
        with self._store.read() as tx:
            pending = tx.worker(worker).state is WorkerState.PENDING
            return json_response({"leases": [lease.to_wire() for lease in leases],
                                  "open": 0 if pending else tx.open_tasks(), "pending": pending,
                                  "gone": tx.unknown_manifests(offer.projects)})

    @route("POST", "/api/v1/beat", role="worker", takes=Beat, summary="Keep leases alive")
    def beat(self, request: Request) -> Response:
        """Body: leases (id -> task -> progress 0 to 1), wait. Answers those that ended.

        ``cuts`` are tasks of which others render what is below a row: that may be left out.
        """
        wire = request.json()
        leases = fields_of(Beat, wire)["leases"]
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
        return Response(204)

    @route("POST", "/api/v1/leases/<lease>/release", role="worker", summary="Hand back a lease")
    def release(self, request: Request) -> Response:
        """What of the lease is unfinished is given to others."""
        self._farm.release(request.identity.worker, request.params["lease"])
        return Response(204)

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
        packed, bottom = _query_number(request, "files", 0), _query_number(request, "bottom", 0)
        cost = Cost(_seconds(request.query.get("cpu", "0"), MAX_COST),
                    _seconds(request.query.get("wall", "0"), MAX_COST),
                    _query_number(request, "memory", 0),
                    _seconds(request.query.get("parse", "0"), MAX_COST))
        with self._delivered(request, _query_number(request, "log", 0)) as (mine, text, image):
            files = _cut_off(image, packed) if packed and isinstance(image, Path) else {}
            accepted = self._farm.finish(*mine, image, text, cost, bottom, files)
        return json_response({"accepted": accepted})

    @route("PUT", "/api/v1/leases/<lease>/tasks/<task:int>/state", role="worker",
           max_body=MAX_IMAGE, summary="Leave a state to go on from")
    def keep_state(self, request: Request) -> Response:
        """Body: what POV-Ray left of an unfinished task when it was stopped."""
        with self._delivered(request) as (mine, _, state):
            self._farm.keep_state(*mine, state)
        return Response(204)

    @route("GET", "/api/v1/tasks/<task:int>/<what>", role="worker",
           summary="What a pass or a stopped render left")
    def part(self, request: Request) -> Response:
        """``result`` of a pass that is done, or the ``state`` of an unfinished task."""
        place = {"result": self._store.place, "state": self._store.state_path}.get(
            request.params["what"])
        with self._store.read() as tx:
            task = tx.find_task(request.params["task"])
            if task is None or place is None:
                raise ProtocolError(404, f"there is no task {request.params['task']}")
            path = place(tx.job(task.job), task)
        return file_response(path, "application/octet-stream", request,
                             "" if place == self._store.state_path else task.sha256 or "")

    @route("POST", "/api/v1/leases/<lease>/tasks/<task:int>/fail", role="worker",
           max_body=MAX_LOG, takes=Failure, summary="Tell of a failed task")
    def fail(self, request: Request) -> Response:
        """Body: message, scene (true when the scene is to blame), log."""
        self._farm.check_lease(request.identity.worker, request.params["lease"],
                               request.params["task"])
        told = fields_of(Failure, request.json())
        self._farm.fail(
            request.identity.worker, request.params["lease"], request.params["task"],
            plain(told["message"][:1000]), told["log"].encode(), told["scene"])
        return Response(204)

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

    # --- inside

    @contextlib.contextmanager
    def _delivered(self, request: Request, log_size: int = 0
                   ) -> Iterator[tuple[tuple[int, str, int], bytes, Path | bytes]]:
        """Give worker, lease and task, the text that a body begins with, and a file of the rest.

        Or the rest itself, where it is little. Whether the worker may deliver is looked at first.
        """
        mine = request.identity.worker, request.params["lease"], request.params["task"]
        self._farm.check_lease(*mine)
        if log_size > MAX_LOG:
            raise ProtocolError(413, f"the log is larger than {format_size(MAX_LOG)}")
        if 0 < (request.body.length or 0) <= BUFFER and "files" not in request.query:
            data = request.body.read()
            yield mine, data[:max(log_size, 0)], data[max(log_size, 0):]
            return
        text = bytearray()
        with self._store.incoming() as place:
            with open(place / "image", "wb") as file:
                for block in request.body.blocks():
                    self._store.need(len(block))
                    head = max(log_size - len(text), 0)
                    text += block[:head]
                    file.write(block[head:])
            yield mine, bytes(text), place / "image"

    def _frame(self, tx: Look, request: Request) -> tuple[Job, Task]:
        job = tx.job(request.params["job"])
        task = tx.task_of_frame(job.id, request.params["frame"])
        if task is None:
            raise ProtocolError(404, f"job {job.id} has no frame {request.params['frame']}")
        return job, task

    def _event_stream(self, after: int, identity: Identity) -> Iterator[bytes]:
        yield b"retry: 2000\n\n"
        while self._access.knows(identity):
            events = self._farm.wait_events(after, 1.0, MAX_EVENTS)
            for event in events:
                after = event.id
                data = json.dumps(vars(event))
                yield f"id: {after}\nevent: change\ndata: {data}\n\n".encode()
            if not events:
                yield b""


class Entrance:
    """The routes under /api/v1 by which people and workers come in, and are shown out."""

    def __init__(self, scheduler: Scheduler, access: Access, admit_private: bool) -> None:
        self._farm = scheduler
        self._access = access
        self._admit_private = admit_private

    @route("POST", HELLO, role="anyone", max_body=4096, takes=Hello,
           summary="Prove to each other that a secret is known")
    def hello(self, request: Request) -> Response:
        """Body: who (``farm`` for the farm key, or the ``who`` of a worker), nonce.

        Answers the coordinator's proof, and the name of a session for signing requests.
        """
        hello = fields_of(Hello, request.json())
        if len(hello["who"]) > 100 or not re.fullmatch("[0-9a-f]{32,64}", hello["nonce"]):
            raise UserError("a nonce has 32 to 64 hexadecimal digits")
        return json_response(self._access.hello(hello["who"], hello["nonce"]))

    @route("POST", "/api/v1/login", role="person", summary="Make a login link")
    def login_link(self, request: Request) -> Response:
        """Answer the path of a link that logs one browser in, as whoever asks for it."""
        return json_response({"path": f"/login/{self._access.login_code(request.identity.name)}"})

    # --- people

    @route("GET", "/api/v1/users", role="person", summary="The people")
    def users(self, request: Request) -> Response:
        """Everybody with role, limits and what they have; to others than the admin themselves."""
        everybody = "admin" in request.identity.roles
        with self._farm.store.read() as tx:
            return json_response({"users": [
                {"name": row.name, "role": row.role, "added": row.added,
                 "limits": vars(self._farm.people.allowance(tx, row.name)),
                 "jobs": has.jobs, "frames": has.frames, "kept": has.space}
                for row in tx.people() for has in [tx.usage(row.name)]
                if everybody or row.name == request.identity.name]})

    @route("POST", "/api/v1/users", role="admin", takes=Newcomer, summary="Add a person, or invite")
    def add_user(self, request: Request) -> Response:
        """Body: name, role, limits, ticket, uses. Both ends make the key, or where there are
        ``uses`` and no name the code, of the farm's key and the ticket."""
        one = Newcomer.from_wire(request.json())
        self._access.add(one.name, one.role, one.limits, one.ticket, one.uses,
                         request.identity.name)
        return Response(204)

    @route("POST", "/api/v1/users/come", role="anyone", max_body=1 << 12, takes=Comer,
           summary="Come by an invitation")
    def come(self, request: Request) -> Response:
        """Body: name, ticket, share, and a proof, which is made of the code. Answers ours."""
        return json_response(self._access.come(
            **fields_of(Comer, request.json()), remote=request.remote), 201)

    @route("PATCH", "/api/v1/users/<name>", role="admin", summary="Change a person's limits")
    def change_user(self, request: Request) -> Response:
        """Body: any of the limits."""
        limits = checked(want({"limits": request.json()}, "limits", dict), ALLOWANCES)
        self._farm.people.change(request.params["name"], limits, request.identity.name)
        return Response(204)

    @route("DELETE", "/api/v1/users/<name>", role="admin", summary="Remove a person")
    def remove_user(self, request: Request) -> Response:
        """Its key is good for nothing from now on, nor are its workers'; the jobs stay."""
        who = request.identity.name
        for worker in self._farm.people.remove(request.params["name"], who):
            self._farm.remove_worker(worker, who)
        return Response(204)

    # --- workers

    @route("POST", "/api/v1/workers", role="anyone", max_body=1 << 16, takes=WorkerInfo,
           summary="Join as a worker")
    def join(self, request: Request) -> Response:
        """Body: name, cores, memory, system, engines, tags. Answers id, admitted.

        With the farm key, and a ticket of 32 letters and digits or more, it is admitted at
        once: its secret is made of both. A known worker is the same worker again. Without,
        it sends a commitment, gets share and nonce, sends its own, and is pending: see
        ``Pairing``. The same again is answered with the same worker.
        """
        wire = request.json()
        info = WorkerInfo.from_wire(wire)
        if worker := request.identity.worker:
            self._farm.rejoin(worker, info, request.remote)
            return json_response({"id": worker, "admitted": "worker" in request.identity.roles})
        if not {"admin", "user"} & request.identity.roles:
            return self._pair(request, info, fields_of(Pair, wire))
        ticket = want(wire, "ticket", str)
        if not re.fullmatch("[A-Za-z0-9_-]{32,100}", ticket):
            raise UserError("a ticket has 32 to 100 letters and digits")
        secret = self._access.secret_for(request.identity.name, ticket)
        worker = self._farm.join(info, secret_hash(secret), request.remote,
                                 who=request.identity.name)
        return json_response({"id": worker, "admitted": True}, 201)

    @route("POST", "/api/v1/workers/admit", role="admin", takes=Code,
           summary="Admit a pending worker")
    def admit(self, request: Request) -> Response:
        """Body: code, as the worker shows it."""
        return json_response({"name": self._farm.admit(
            fields_of(Code, request.json())["code"], request.identity.name)})

    @route("DELETE", "/api/v1/workers/<worker:int>", role="admin", summary="Remove a worker")
    def remove_worker(self, request: Request) -> Response:
        """Take its work back and let it in no more."""
        self._farm.remove_worker(request.params["worker"], request.identity.name)
        return Response(204)

    def _pair(self, request: Request, info: WorkerInfo, pair: Mapping[str, str]) -> Response:
        """Answer one of the two requests of a worker that has no key."""
        share, nonce = pair["share"], pair["nonce"]
        if not share:
            self._access.slow_down(request.remote)
            self._farm.make_room(request.remote)
        mine = self._access.pairings.of(pair["commitment"], begin=not share)
        if not share:
            return json_response({"share": mine.share, "nonce": mine.nonce})
        if secret_hash(f"{share} {nonce}") != pair["commitment"]:
            raise UserError("this is not what the commitment was made of")
        secret, code = mine.agree(share, [self._access.farm_id, self._access.pin, info.name,
                                          share, nonce, mine.share, mine.nonce])
        address = ipaddress.ip_address(request.remote.partition("%")[0])
        admitted = self._admit_private and any(address in network for network in _PRIVATE)
        worker = self._farm.join(info, secret_hash(secret), request.remote,
                                 "" if admitted else code)
        return json_response({"id": worker, "admitted": admitted}, 201)


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
            "summary": tag.summary, "description": " ".join((bound.handler.__doc__ or "").split()),
            "operationId": bound.handler.__name__, "parameters": parameters,
            "x-role": tag.role, "responses": {"default": {"description": "see docs/api.md"}},
            "security": [] if tag.role in ("anyone", "reader") else [{"key": []}],
            **({"requestBody": {"required": True, "content": {
                "application/json": {"schema": schema_of(tag.takes)}}}} if tag.takes else {}),
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


def _cut_off(image: Path, size: int) -> dict[str, Path | None]:
    """Return the files that are packed in so many bytes at the end of an image; cut these off."""
    packed = image.with_name("packed")
    with open(image, "r+b") as file, open(packed, "wb") as target:
        start = file.seek(max(image.stat().st_size - max(size, 0), 0))
        shutil.copyfileobj(file, target, BUFFER)
        file.truncate(start)
    return unpack_files(packed, image.with_name("files"))


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


def _projects(request: Request, wire: Any) -> tuple[str, ...]:
    """Return the keys of projects that a worker says it has; a stranger learns of none."""
    keys = want({"projects": [], **wire}, "projects", list)
    if len(keys) > MAX_LISTED or not all(isinstance(key, str) for key in keys):
        raise UserError(f"the projects of a worker are at most {MAX_LISTED} keys")
    return tuple(keys) if "worker" in request.identity.roles else ()


def _task(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError("that is not the number of a task")
    return int(text)


def _sha256(request: Request) -> str:
    value = str(request.params["hash"])
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise UserError("that is not a SHA-256 hash")
    return value


# === 13. HTTPOV ==============================================================
# The dialect of HTTPov's clients, versions 1.2 and 2.2: decodes what they ask
# at /httpov.php, calls SCHEDULER, encodes its answers as key=value lines, whose
# order is the protocol's. A client, HOST:CID, is a worker; a batch is a lease
# under its own id; its frames have the job's own numbers, so that all that a
# scene can ask POV-Ray for (clock, frame_number, final_frame) is as it should be.

MAX_GUESTS = 100  # computers at a time
CLIENT_SILENCE = 130.0  # seconds: they tell every 60 that they still render
CLIENT_PAUSE = 40.0  # seconds between two questions for work: clients can be told to sleep for 30
CLIENT_FEATURES = 2  # the second number of the version that clients should have
_CLIENT_VERSION = re.compile(r"[1-9][0-9]{0,3}\.[0-9]{1,4}(?:\.[0-9.]*)?")
_CLIENT = re.compile(r"[!-9;-~]{1,80}:[0-9]{1,10}")
_COMMANDS = {"getjob": ("client",), "getbatch": ("job", "client"),
             **dict.fromkeys(("postbatch", "abortbatch", "active"), ("job", "batch", "client"))}
_OWN_INI = ("pov.ini", "povray.ini")  # POV-Ray reads the latter by itself, also shell commands


class Dialect:
    """What the dialects of other systems' clients have in common.

    Their workers' tokens begin with ``mark``, which begins no hash, so that nobody can show the
    secret of one.
    """

    mark = ""
    most: int | None = None  # frames at a time
    formats = "N"  # POV-Ray's letters

    def __init__(self, scheduler: Scheduler, access: Access) -> None:
        self._farm = scheduler
        self._store = scheduler.store
        self._access = access
        self._joining = threading.Lock()
        self._guest = Guest(CLIENT_SILENCE, CLIENT_PAUSE, self._takes, self._cuts, self.most)
        self._portable: dict[str, bool] = {}  # by manifest: whether clients can unpack it
        access.dialects.append(self._identity)
        with self._store.read() as tx:
            known = [row.id for row in tx.workers() if row.token.startswith(self.mark)]
        for worker in known:
            scheduler.receive(worker, self._guest)

    def _identity(self, request: Request) -> Identity | None:
        """Return who sends a request, if it is one of ours and from somebody who may."""
        raise NotImplementedError

    def _join(self, info: WorkerInfo, token: str, remote: str) -> int:
        worker = self._farm.join(info, self.mark + token, remote)
        self._farm.receive(worker, self._guest)
        return worker

    def _save(self, request: Request, name: str, to: Path) -> None:
        """Save the file of a form that has this name."""
        with open(to, "wb") as file:
            for block in uploaded(request, name):
                self._store.need(len(block))
                file.write(block)

    def _finish(self, worker: int, attempt: Attempt, image: Path, text: bytes, cost: Cost) -> None:
        """Deliver all that was given, also where others were given its lower rows since."""
        with self._store.read() as tx:
            height = tx.job(attempt.job).pov.options.height
        self._farm.finish(worker, attempt.lease, attempt.task, image, text, cost,
                          attempt.given or height)

    def _fail(self, worker: int, attempt: Attempt, message: str, text: bytes = b"") -> None:
        if attempt.state == AttemptState.LIVE:
            self._farm.fail(worker, attempt.lease, attempt.task, message, text, False)

    def _takes(self, tx: Look, job: Job) -> bool:
        """Tell whether clients make the same pictures of a job as our workers."""
        key = job.manifest
        if key not in self._portable:
            files = Manifest.from_wire(json.loads(tx.manifest(key))).files
            self._portable[key] = all(file.path.isascii() for file in files)
        options = job.options
        return (self._portable[key] and not options.in_order and options.radiosity != "animation"
                and (options.slices in ("auto", "off", "1") or self._cuts(job))
                and _renders_alike(job.pov_json) and job.pov.options.output_type in self.formats)

    def _cuts(self, job: Job) -> bool:
        """Tell whether clients can render slices of a job."""
        return False

    def _entries(self, job: Job, manifest: Manifest,
                 top: str) -> Iterator[tuple[str, Path | bytes]]:
        """Yield what is in a job's archive, in a directory ``top``; directories first of all."""
        pov = job.pov
        files = {f"{top}{file.path}": self._store.blob_path(file.sha256)
                 for file in manifest.files if file.path.lower() not in _OWN_INI}
        places = [f"{top}{place}/" for place in (*pov.library, *manifest.directories)
                  if place not in (STANDARD, ".")]
        folders = {f"{parent}/" for path in (*files, *(f"{place}x" for place in places))
                   for parent in PurePosixPath(path).parents if parent.name}
        yield from ((folder, b"") for folder in sorted({top, *folders} - {""}))
        yield f"{top}pov.ini", client_ini(pov).encode()
        yield from sorted(files.items())


class Httpov(Dialect):
    """The routes of HTTPov's clients, for a ``Coordinator`` that lets them in.

    The clients know no passwords. The bash one takes a path behind the server's
    address, for the key; the Python one does not, but both send the name of
    their group with every command, so that may be the key as well. What they
    fetch without it, a job's archive, has a name that nobody can guess.
    """

    mark = "HTTPov "

    def __init__(self, scheduler: Scheduler, access: Access) -> None:
        super().__init__(scheduler, access)
        self._workers: dict[str, int] = {}  # by computer: also one that was removed meanwhile
        self._holders: dict[str, str] = {}  # by lease: the client of its computer that has it

    @route("GET", "/httpov.php", role="anyone", summary="What an HTTPov client asks")
    @route("GET", "/<key>/httpov.php", role="anyone", summary="What an HTTPov client asks")
    @route("POST", "/httpov.php", role="anyone", max_body=MAX_IMAGE,
           summary="What an HTTPov client rendered")
    @route("POST", "/<key>/httpov.php", role="anyone", max_body=MAX_IMAGE,
           summary="What an HTTPov client rendered")
    def command(self, request: Request) -> Response:
        """Query: command, client, version; job and batch where there is one; cgroup."""
        return text_response("".join(f"{line}\n" for line in self._answer(request)))

    @route("GET", "/jobs/<name>.zip", role="anyone", summary="A job for HTTPov clients")
    @route("GET", "/<key>/jobs/<name>.zip", role="anyone", summary="A job for HTTPov clients")
    def archive(self, request: Request) -> Response:
        """The project in one directory, with a pov.ini that renders the job's frames."""
        name = request.params["name"]
        number = re.match("[0-9]{1,18}(?=-)", name)
        with self._store.read() as tx:
            job = tx.find_job(int(number[0])) if number else None
            if job is None or not hmac.compare_digest(name.encode(), self._name(job).encode()):
                self._access.slow_down(request.remote)
            elif self._takes(tx, job):
                manifest = Manifest.from_wire(json.loads(tx.manifest(job.manifest)))
                return stream_response(
                    zip_stream(self._entries(job, manifest, f"{name}/")), "application/zip")
        raise ProtocolError(404, f"there is no {name}.zip here")

    def _identity(self, request: Request) -> Identity | None:
        """Return a guest for whoever shows the key, in the path or as the name of a group."""
        if not request.path.endswith("/httpov.php"):
            return None
        key = request.params.get("key", request.query.get("cgroup", ""))
        return GUEST if self._access.fits(key, self._access.guest_key, request.remote) else None

    def _answer(self, request: Request) -> list[str]:
        """Return the lines of an answer; a client prints one with ``error``, and ends."""
        command = request.query.get("command", "")
        if lines := self._problem(request, command):
            return lines
        if not (worker := self._worker(request)):
            return (["command=sleep", "message=Too many clients work here."] if worker is None else
                    ["error=this client was removed from the farm"])
        lines = list(getattr(self, f"_{command}")(request, worker))
        major, minor = request.query["version"].split(".")[:2]
        if command == "getjob" and int(minor) < CLIENT_FEATURES:
            lines.append(f"message=HTTPov client {major}.{CLIENT_FEATURES} or later recommended.")
        return lines

    def _problem(self, request: Request, command: str) -> list[str]:
        """Return the lines for what is no command of a client that may come, or nothing."""
        if request.identity != GUEST:
            return ["error=the key is wrong: set HP_GROUP to the one that 'povfarm.py serve "
                    "--httpov' prints"]
        if not _CLIENT_VERSION.fullmatch(request.query.get("version", "")):
            return ["command=sleep", "message=HTTPov client 1.0 or later required."]
        if command not in _COMMANDS:
            return ["message=HTTPov server version 0.8 ready." if command == "hello" else
                    "command=unknown"]
        missing = [name for name in _COMMANDS[command] if not request.query.get(name)]
        if missing or not _CLIENT.fullmatch(request.query["client"]):
            return [f"error={' and '.join(missing) or 'client'} must be in the request"]
        return []

    # --- the commands

    def _getjob(self, request: Request, worker: int) -> list[str]:
        """Lease something first: a client that is sent to a job in vain asks again at once."""
        lease = self._lease(request, worker, 0)
        if lease is None:
            return ["command=sleep"]
        with self._store.read() as tx:
            job = tx.job(lease[1])
        plan = job.pov.plan
        # Clients take from the number of frames only how many digits a frame's number has.
        frames = plan.final_frame + plan.cyclic if plan.animation else 1
        return ["command=getbatch", f"job={job.id}", f"name={self._name(job)}", f"frames={frames}"]

    def _getbatch(self, request: Request, worker: int) -> list[str]:
        job = request.query["job"]
        lease = self._lease(request, worker, int(job)) if re.fullmatch("[1-9][0-9]{0,17}", job) \
            else None
        if lease is None:
            return ["command=getjob"]
        with self._store.read() as tx:
            attempts = tx.attempts_of_lease(lease[0])
            first, region = attempts[0], tx.job(lease[1]).region
            above = [part for part in tx.parts(first.parent or 0, TaskKind.SLICE)
                     if part.top < first.top]
        lines = ["command=render", f"batch={lease[0]}", f"startframe={first.frame}",
                 f"stopframe={attempts[-1].frame}"]
        if first.given:
            lines += [f"slice={len(above)}", f"startrow={max(first.top, region.top) + 1}",
                      f"endrow={min(first.given, region.bottom)}"]
        return lines

    def _active(self, request: Request, worker: int) -> list[str]:
        self._farm.beat(worker, {request.query["batch"]: {}}, 0.0)
        return ["status=ok"]

    def _abortbatch(self, request: Request, worker: int) -> list[str]:
        attempts = self._attempts(request, worker)
        for attempt in attempts:
            self._fail(worker, attempt, "POV-Ray failed: the log is where the client runs")
        if attempts and not self._farm.grants.of_worker(worker):  # then the client ends
            self._farm.leave(worker)
        return ["status=error"]

    def _postbatch(self, request: Request, worker: int) -> list[str]:
        """What a client delivers a second time changes nothing."""
        attempts = [attempt for attempt in self._attempts(request, worker)
                    if attempt.state not in (AttemptState.DONE, AttemptState.KEPT)]
        if not attempts:
            return [f"status={'ok' if self._attempts(request, worker) else 'error'}"]
        with self._store.incoming() as place:
            images, text, problem = self._images(request, place, attempts[0])
            wall = (self._farm.clock.time() - attempts[0].started) / len(attempts)
            cost, good = Cost(max(wall, 0.0), max(wall, 0.0)), True
            for attempt in attempts:
                missing = problem or f"frame {attempt.frame} is not in what the client sent"
                try:
                    if attempt.frame not in images:
                        raise ImageError(missing)
                    self._finish(worker, attempt, images[attempt.frame], text, cost)
                except ImageError as error:
                    self._fail(worker, attempt, str(error), text)
                    good = False
        return ["status=ok" if good else "status=error"]

    # --- inside

    def _worker(self, request: Request) -> int | None:
        """Return the worker that a client's computer is, 0 when it was removed; None for one too
        many.

        What fails on a computer fails there again, whatever number the next client has.
        """
        computer, group = request.query["client"].rpartition(":")[0], request.query.get("cgroup")
        tags = (one_line(group)[:100],) if group not in (None, "", self._access.guest_key) else ()
        info = WorkerInfo(computer, 1, 0, "HTTPov", {}, tags)
        with self._joining:  # it may ask twice at the same time
            with self._store.read() as tx:
                known = self._workers.get(computer, 0)
                row = tx.find_worker(known) or tx.worker_by_token(self.mark + computer)
            if row is not None and row.token.startswith("removed "):
                return 0
            if row is None or row.state is WorkerState.REMOVED:  # it was forgotten
                live = self._farm.live_workers()
                if sum(worker in live for worker in self._workers.values()) >= MAX_GUESTS:
                    return None
                self._workers[computer] = self._join(info, computer, request.remote)
            elif self._workers.setdefault(computer, row.id) and row.tags_json != json.dumps(tags):
                self._farm.rejoin(row.id, info, request.remote)
            return self._workers[computer]

    def _lease(self, request: Request, worker: int, job: int) -> tuple[str, int] | None:
        """Return lease and job of what a client is to render, of this job or any (0).

        What it has not delivered yet comes first: the answer to an earlier
        request was lost, or it only knows of the job so far.
        """
        client, grants = request.query["client"], self._farm.grants
        for grant in grants.of_worker(worker):
            if job in (0, grant.job) and self._holders.setdefault(grant.id, client) == client:
                self._farm.beat(worker, {grant.id: {}}, 0.0)
                return grant.id, grant.job
        leases = self._farm.lease(worker, Offer(1, 1, 1, job), 0.0, request.alive)
        if not leases:
            return None
        self._holders = {lease: holder for lease, holder in self._holders.items()
                         if grants.get(lease)}
        self._holders[leases[0].id] = client
        return leases[0].id, leases[0].job

    def _cuts(self, job: Job) -> bool:
        """Tell whether the rows of the PPM that clients make of a slice are those of the PNG.

        That has no alpha and no mark of a gamma. What slices share is not in their reach.
        """
        values = job.pov.values
        return (not {"radiosity", "photons"}.intersection(job.pov.uses)
                and "On" not in map(values.get, ("Output_Alpha", "Dither", "Grayscale_Output"))
                and "File_Gamma" not in values
                and values.get("Bits_Per_Color", "8") in ("8", "16"))

    def _images(self, request: Request, place: Path,
                first: Attempt) -> tuple[dict[int, Path], bytes, str]:
        """Return the pictures of an upload by their frames, the log, and what is wrong with it."""
        images, text = {}, b""
        try:
            self._save(request, "filedata", place / "zip")
            files = unpack_files(place / "zip", place / "files", MAX_IMAGE)
            for name, path in files.items():
                number = re.search(r"_([0-9]{1,9})\.(png|ppm)$", name)
                if number and path and number[2] == "png" and not first.given:
                    images[int(number[1])] = path
                elif number and path and number[2] == "ppm" and first.given:
                    images[first.frame] = self._strip(first, path)
                elif re.search(r"batchreport(_[0-9]+)?\.txt$", name) and path:
                    with open(path, "rb") as report:
                        text = report.read(MAX_LOG)
        except (UserError, ImageError) as error:
            return {}, b"", f"{error}"
        return images, text, ""

    def _strip(self, attempt: Attempt, picture: Path) -> Path:
        """Return the rows of a slice as a PNG; a client's picture has all rows of its frame."""
        with self._store.read() as tx:
            options = tx.job(attempt.job).pov.options
        depth, strip = int(options.values.get("Bits_Per_Color", 8)), picture.with_suffix(".strip")
        with self._store.gate.outside():
            png_of_ppm(picture, (options.width, options.height), depth,
                       range(attempt.top, attempt.given), strip)
        return strip

    def _attempts(self, request: Request, worker: int) -> list[Attempt]:
        """Return the tries of a client's batch; none of another's of its computer."""
        batch, client = request.query["batch"], request.query["client"]
        with self._store.read() as tx:
            return [attempt for attempt in tx.attempts_of_lease(batch) if attempt.worker == worker
                    and self._holders.get(batch, client) == client]

    def _name(self, job: Job) -> str:
        """Return what clients call a job: nobody can guess it who was not told."""
        seal = hmac.new(self._access.guest_key.encode(), b"job %d" % job.id, "sha256")
        place = self._store.job_directory(job.id, job.name)
        return f"{place.name}-{seal.hexdigest()[:24]}"


@functools.lru_cache(maxsize=64)
def _renders_alike(text: str) -> bool:
    """Tell whether a command line, as JSON text, gives the same pictures from ``client_ini``."""
    pov = pov_of(text)
    plan = pov.plan
    with contextlib.suppress(UserError):  # of names that are not ASCII
        return (bool(client_ini(pov)) and plan.frames.step == 1
                and {use for use in pov.uses if not use.startswith(SENT)} <= {
                    "radiosity", "photons"} and not pov.options.stochastic
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
    plan = pov.plan
    values = {key: value for key, value in pov.values.items()
              if key not in ("Output_File_Name", "Clock")}
    values.update({
        "Antialias": pov.values.get("Antialias", "Off"), "Width": str(pov.options.width),
        "Height": str(pov.options.height), "Output_File_Type": pov.options.output_type,
        "Output_To_File": "On", "Continue_Trace": "Off", "Warning_Console": "Off"})
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


def uploaded(request: Request, name: str) -> Iterator[bytes]:
    """Yield the file of a form that has this name as it comes; ``UserError`` if there is none."""
    for head, blocks in form_parts(request):
        if f'name="{name}"' in head:
            yield from blocks
            return
    raise UserError("the client sent no file")


# === 14. SHEEPIT =============================================================
# The dialect of SheepIt's clients of 2015 to 2019: decodes what they ask below
# /server, calls SCHEDULER, encodes its answers as XML with the protocol's status
# codes. A login is one of the people who may render; a session is a worker, its
# cookie is made of the worker's number; a request for a job is held open.

SESSION_WAIT = 6 * 3600.0  # seconds that a request for a job is held open
BEAT_PERIOD = 120  # seconds of the protocol: with so few, clients tell every 60 that they render
MAX_CLIENTS = 500  # of one login
OLDEST_CLIENT = 3  # the first number of its version
_SYSTEMS = ("SheepIt linux", "SheepIt mac")  # that run the renderer, a script
_PATHS = {"validate-job": "/server/send_frame.php", "request-job": "/server/request_job.php",
          "download-archive": "/server/download.php", "error": "/server/error.php",
          "keepmealive": "/server/keepmealive.php", "logout": "/account.php?mode=logout&worker=1"}
# What is asked, the element of the answer, and the status when we cannot do it.
_ELEMENTS = {"config": ("config", 999), "request_job": ("jobrequest", 204),
             "send_frame": ("jobvalidate", 303), "error": ("error", 999),
             "keepmealive": ("keepmealive", 999)}
_KILLED = ("14", "22")  # errors of a client whose render was stopped


class _Said(NamedTuple):
    """An answer in the protocol's words."""

    status: int = 0
    inside: str = ""
    cookie: str = ""


class Sheepit(Dialect):
    """The routes of SheepIt's clients, for a ``Coordinator`` that lets them in.

    A login's password is made of the person's secret and does not lead back to it; so is the
    seal of a session's cookie. So sessions outlive us, but not the person.
    """

    mark = "SheepIt "
    most = 1
    formats = "".join(IMAGE_TYPES)

    def __init__(self, scheduler: Scheduler, access: Access, key: str) -> None:
        super().__init__(scheduler, access)
        self._admin = secret_hash(key)
        self._archives: dict[int, str] = {}  # by job: the MD5 of its archive

    @route("GET", "/server/<what>.php", role="anyone", summary="What a SheepIt client asks")
    @route("POST", "/server/<what>.php", role="anyone", max_body=MAX_IMAGE,
           summary="What a SheepIt client sends")
    def command(self, request: Request) -> Response:
        """One of config, request_job, download, send_frame, error, keepmealive."""
        what = request.params["what"]
        if what != "send_frame":
            request.body.limit = MAX_LOG if what == "error" and request.identity.worker \
                else BODY_LIMIT
        if what == "download":
            return self._download(request, _values(request))
        if what not in _ELEMENTS:
            raise ProtocolError(404, f"there is no {request.path} here")
        root, trouble = _ELEMENTS[what]
        try:
            said = getattr(self, f"_{what}")(
                request, request.query if what == "request_job" else _values(request))
        except (FarmError, OSError) as error:
            log.warning("SheepIt client at %s: %s: %s", request.remote, what, error)
            said = _Said(trouble)
        response = text_response('<?xml version="1.0" encoding="utf-8" ?>\n' + _tag(
            root, {"status": said.status}, said.inside), mime="text/xml")
        if said.cookie:
            response.headers["Set-Cookie"] = said.cookie
        return response

    @route("GET", "/account.php", role="anyone", summary="A SheepIt client ends")
    def log_out(self, request: Request) -> Response:
        """Hand back what the client has."""
        if request.identity.worker:
            self._farm.leave(request.identity.worker)
        return text_response("bye\n")

    # --- what is asked

    def _config(self, request: Request, values: Mapping[str, str]) -> _Said:
        secret, old = self._secret(values.get("login", "")), self._member(request)
        problem = self._problem(request, values, secret)
        if problem or (old and old.state is WorkerState.REMOVED):
            return _Said(problem or 103)
        worker = self._worker(values, request, old)
        if worker is None:
            return _Said(999)
        return _Said(0, "".join(_tag("request", {"type": kind, "path": path, **(
            {"max-period": BEAT_PERIOD} if kind == "keepmealive" else {})})
            for kind, path in _PATHS.items()),
            f"PHPSESSID={worker}.{_seal(secret, worker)}; path=/; HttpOnly")

    def _problem(self, request: Request, values: Mapping[str, str], secret: str) -> int:
        """Return the status for a login that is no good, or 0."""
        if not values.get("login") or not values.get("password"):
            return 104
        password = secret and sheepit_password(secret)
        if not self._access.fits(values["password"], password, request.remote):
            return 102
        version = re.match(r"[0-9]{1,4}(?=\.|$)", values.get("version", ""))
        if version is None or int(version[0]) < OLDEST_CLIENT:
            return 101 if values.get("version") else 100
        good = values.get("os") and values.get("bits") and re.fullmatch(
            "[1-9][0-9]{0,3}", values.get("cpu_cores", ""))
        return 0 if good else 104

    def _request_job(self, request: Request, values: Mapping[str, str]) -> _Said:
        """Answer when there is a frame: one that was not delivered yet, or a new one."""
        member, body = self._member(request), request.body.read()  # or nobody seems to go away
        refusal = self._refusal(member, values)
        if member is None or refusal:
            return _Said(refusal)
        held = self._held(member.id)
        if held is None:
            self._farm.lease(member.id, Offer(1, 1, 1), SESSION_WAIT, request.alive)
            held = self._held(member.id)
            if refusal := self._refusal(self._member(request), values):  # meanwhile
                self._farm.leave(member.id)
                return _Said(refusal)
        if held is None:  # when we stop, the client is to come again soon
            return _Said(200 if request.alive() else 204)
        return _Said(0, self._task(*held) + self._stale(body))

    def _download(self, request: Request, values: Mapping[str, str]) -> Response:
        job = _numeral(values.get("job", ""))
        with self._store.read() as tx:
            row = tx.find_job(job) if job is not None and request.identity.worker else None
            row = row if row and self._takes(tx, row) else None
        if row is None or values.get("type") not in ("job", "binary"):
            raise ProtocolError(404, f"there is no such archive of job {values.get('job')}")
        with self._packed(row if values["type"] == "job" else None) as path:
            return file_response(path, "application/zip", request)

    def _send_frame(self, request: Request, values: Mapping[str, str]) -> _Said:
        """A bad image is a failed try; who sends nothing else is told that it is no good."""
        worker = request.identity.worker
        if not worker:
            return _Said(304)
        job, frame = _numeral(values.get("job", "")), _numeral(values.get("frame", ""))
        if job is None or frame is None:
            return _Said(300)
        attempt = self._attempt(worker, job, frame)
        if attempt is None:
            return _Said(0)  # the job was deleted: nobody wants it, go on
        wall = float(_numeral(values.get("rendertime", "")) or 0)
        memory = (_numeral(values.get("memoryused", "")) or 0) * 1000
        with self._store.incoming() as place:
            self._save(request, "file", place / "image")
            try:
                self._finish(worker, attempt, place / "image", b"", Cost(wall, wall, memory))
                return _Said(0)
            except ImageError as error:
                self._fail(worker, attempt, str(error))
        with self._store.read() as tx:
            hopeless = tx.recent_attempts(worker, 6) == ["failed"] * 6
        return _Said(301 if hopeless else 302)

    def _error(self, request: Request, values: Mapping[str, str]) -> _Said:
        worker, kind = request.identity.worker, values.get("type", "")
        job, frame = _numeral(values.get("job", "")), _numeral(values.get("frame", ""))
        if not worker:
            return _Said(999)
        attempt = None if job is None or frame is None else self._attempt(worker, job, frame)
        if attempt is None or attempt.state != AttemptState.LIVE:
            return _Said(0)
        if kind in _KILLED:
            self._farm.release(worker, attempt.lease)
            return _Said(0)
        try:
            text = _printed(b"".join(uploaded(request, "file")))
        except UserError:
            text = b""
        line = next((line for line in text.splitlines() if b"Error" in line), b"")
        self._fail(worker, attempt, f"POV-Ray failed: {line[:300].decode(errors='replace')}"
                   if line else f"the client gave it up (error {kind[:9] or 'unknown'})", text)
        return _Said(0)

    def _keepmealive(self, request: Request, values: Mapping[str, str]) -> _Said:
        worker = request.identity.worker
        job, frame = _numeral(values.get("job", "")), _numeral(values.get("frame", ""))
        if job is None or frame is None:  # it waits, or fetches what it needs
            if worker:
                grants = self._farm.grants.of_worker(worker)
                self._farm.beat(worker, {grant.id: {} for grant in grants}, 0.0)
            return _Said(0)
        attempt = self._attempt(worker, job, frame)
        if attempt is None or attempt.state != AttemptState.LIVE:
            return _Said(400)
        spent, left = (_numeral(values.get(name, "")) or 0
                       for name in ("rendertime", "remainingtime"))
        if limit := self._limit(attempt, spent):
            self._fail(worker, attempt, f"the frame took longer than {format_duration(limit)} "
                                        "(see --frame-timeout)")
            return _Said(400)
        part = {attempt.task: spent / (spent + left)} if left else {}
        self._farm.beat(worker, {attempt.lease: part}, 0.0)
        return _Said(0)

    # --- who asks

    def _identity(self, request: Request) -> Identity | None:
        """Return who has the cookie of a session that is good."""
        if not request.path.startswith(("/server/", "/account.php")):
            return None
        member = self._member(request)
        return Identity(frozenset({"guest"}), member.id, member.name) if member else None

    def _member(self, request: Request) -> Member | None:
        """Return the worker of a session; None when that is dead, or the person was removed."""
        match = re.search(r"PHPSESSID=([0-9]{1,15})\.([0-9a-f]{32})",
                          request.headers.get("cookie", ""))
        with self._store.read() as tx:
            member = tx.find_worker(int(match[1])) if match else None
        secret = self._secret(_login_of(member)) if member else ""
        good = match and member and secret and hmac.compare_digest(
            match[2], _seal(secret, member.id))
        return member if good else None

    def _secret(self, login: str) -> str:
        """Return the hash of somebody's secret, empty for nobody's."""
        with self._store.read() as tx:
            person = tx.person(login)
        return self._admin if login == ADMIN else person.token if person else ""

    def _refusal(self, member: Member | None, values: Mapping[str, str]) -> int:
        """Return the status for one that gets no jobs, or 0."""
        if member is None:
            return 202
        if member.state is not WorkerState.ADMITTED or member.aside:
            return 203
        with self._store.read() as tx:
            person = tx.person(_login_of(member))
        if person and person.role is not Role.USER:
            return 201
        return 205 if member.system not in _SYSTEMS or values.get("computemethod") == "2" else 0

    def _worker(self, values: Mapping[str, str], request: Request,
                old: Member | None) -> int | None:
        """Return the worker that a client is: one of its computer's that is gone, or a new one.

        So the record of a computer stays with it. None when a login has too many.
        """
        login = values["login"]
        host = re.sub(r"[^\w.:-]", "-", values.get("hostname") or request.remote)[:60]
        memory = (_numeral(values.get("ram", "")) or 0) * 1024
        info = WorkerInfo(f"{login}@{host}", int(values["cpu_cores"]), min(memory, 1 << 50),
                          f"{self.mark}{values['os'][:20]}", {})
        with self._joining:
            live, mine = self._farm.live_workers() - {old.id if old else 0}, f"{self.mark}{login} "
            with self._store.read() as tx:
                rows = [row for row in tx.workers() if row.token.startswith(mine)]
            full = len(rows) >= MAX_CLIENTS
            for row in rows:
                if row.id not in live and (full or row.token.startswith(f"{mine}{host} ")):
                    self._farm.rejoin(row.id, info, request.remote)
                    return row.id
            token = f"{login} {host} {secrets.token_hex(8)}"
            return None if full else self._join(info, token, request.remote)

    # --- what there is to do

    def _held(self, worker: int) -> tuple[int, int] | None:
        """Return job and frame of what a client has not delivered yet, and keep its lease."""
        for grant in self._farm.grants.of_worker(worker):
            self._farm.beat(worker, {grant.id: {}}, 0.0)
            with self._store.read() as tx:
                return grant.job, tx.task(next(iter(grant.portions))).frame
        return None

    def _attempt(self, worker: int, job: int, frame: int) -> Attempt | None:
        """Return the last try of a client at a frame."""
        with self._store.read() as tx:
            task = tx.task_of_frame(job, frame)
            tries = [attempt for attempt in (tx.attempts(task.id) if task else [])
                     if attempt.worker == worker]
        return tries[-1] if tries else None

    def _limit(self, attempt: Attempt, spent: float) -> int:
        """Return the seconds that a try may take when it has taken longer, or 0."""
        with self._store.read() as tx:
            limit = (tx.job(attempt.job).options.frame_timeout
                     or frame_timeout(tx.recent_walls(attempt.job)))
        spent = spent or self._farm.clock.time() - attempt.started  # the oldest do not tell
        return limit if spent > limit else 0

    def _task(self, number: int, frame: int) -> str:
        """Return a frame as an answer."""
        with self._store.read() as tx:
            job = tx.job(number)
        renderer = {"md5": self._md5(None), "commandline": ".e .c .o .f",
                    "update_method": "remainingtime"}
        left = job.queued + job.leased
        digits = max(4, len(str(job.pov.plan.final_frame + 1)))
        return _tag("stats", {
            "credits_session": 0, "credits_total": 0, "frame_remaining": left,
            "waiting_project": 1, "connected_machine": len(self._farm.live_workers()),
            "renderable_project": 1}) + _tag("frames", {"remaining": left}) + _tag("job", {
                "id": number, "use_gpu": 0, "archive_md5": self._md5(job), "revision": 0,
                "path": "pov.ini", "frame": str(frame).zfill(digits), "synchronous_upload": 0,
                "extras": number, "name": job.name, "password": ""},
                _tag("renderer", renderer) + _tag("script", {}))

    def _stale(self, cache: bytes) -> str:
        """Tell a client which of the archives that it has are of jobs that have ended."""
        held = set(re.findall('md5="([0-9a-f]{32})"', cache.decode("latin-1")))
        known = [(number, md5) for number, md5 in self._archives.items() if number and md5 in held]
        with self._store.read() as tx:
            jobs = {number: tx.find_job(number) for number, _ in known}
        needed = {md5 for number, md5 in known if (job := jobs[number]) and job.state in (
            JobState.ACTIVE, JobState.PAUSED, JobState.WAITING)}
        return "".join(_tag("file", {"md5": md5, "action": "delete"})
                       for md5 in sorted({md5 for _, md5 in known} - needed))

    def _md5(self, job: Job | None) -> str:
        """Return the hash of an archive, which is made once for that."""
        number = job.id if job else 0
        if number not in self._archives:
            digest = hashlib.md5(usedforsecurity=False)
            with self._packed(job) as path, self._store.gate.outside():
                for block in file_blocks(path):
                    digest.update(block)
            self._archives[number] = digest.hexdigest()
        return self._archives[number]

    @contextlib.contextmanager
    def _packed(self, job: Job | None) -> Iterator[Path]:
        """Make the archive of a job, or of the renderer (None): always the same bytes."""
        program = RENDERER.encode()
        entries: Iterable[tuple[str, Path | bytes]] = [
            ("rend.exe", program), ("Blender/blender.app/Contents/MacOS/blender", program)]
        if job is not None:
            with self._store.read() as tx:
                manifest = Manifest.from_wire(json.loads(tx.manifest(job.manifest)))
            entries = self._entries(job, manifest, "")
        with self._store.incoming() as place:
            with self._store.gate.outside():
                _pack(entries, place / "archive.zip")
            yield place / "archive.zip"


def sheepit_password(secret: str) -> str:
    """Return a person's password for SheepIt's clients, made of the hash of the person's key."""
    return derived(secret, "sheepit password")[:16]


def _seal(secret: str, worker: int) -> str:
    return derived(secret, "sheepit session", str(worker))[:32]


def _login_of(member: Member) -> str:
    match = re.fullmatch(r"(?:removed [0-9]+ )?SheepIt (\S+) .*", member.token)
    return match[1] if match else ""


def _values(request: Request) -> Mapping[str, str]:
    """Return what is asked with a query, a form or both."""
    form = "urlencoded" in request.headers.get("content-type", "")
    return {**request.query, **request.form()} if form else request.query


def _numeral(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def _tag(name: str, attributes: Mapping[str, Any], inside: str = "") -> str:
    """Return an XML element; what XML cannot hold is a question mark."""
    shown = {key: re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", str(value))
             for key, value in attributes.items()}
    words = " ".join([name, *(f'{key}="{html.escape(value)}"' for key, value in shown.items())])
    return f"<{words}>{inside}</{name}>" if inside else f"<{words}/>"


def _printed(text: bytes) -> bytes:
    """Return what the renderer printed, of a client's log; all of it when that is not marked."""
    plain = re.sub(rb"(?m)^\d\d-\d\d \d\d:\d\d:\d\d \(\w{1,9}\) (?:pov: )?", b"", text)
    _, _, part = plain.partition(b"renderer output\n")
    return part.partition(b"end of rendering\n")[0] or plain


def _pack(entries: Iterable[tuple[str, Path | bytes]], to: Path) -> None:
    """Make a zip file as the simplest of clients reads it, without times."""
    with zipfile.ZipFile(to, "w") as archive:
        for name, source in entries:
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            info.external_attr = 0o40755 << 16 | 0x10 if info.is_dir() else 0o100755 << 16
            info.file_size = len(source) if isinstance(source, bytes) else source.stat().st_size
            with archive.open(info, "w") as target:
                for block in file_blocks(source):
                    target.write(block)


# What a client takes for Blender. It deletes the scene when it has read a line of ours, and it
# must read no line of POV-Ray's as its own. Where there is no POV-Ray it waits for five minutes,
# where POV-Ray fails, which pov.crash.txt says, it goes on at once.
RENDERER = r"""#!/bin/sh
# rend.exe [-t THREADS] DIRECTORY/pov.ini [-P SCRIPT] PREFIX FRAME: makes PREFIXFRAME.png, say
threads='' ini='' out='' frame='' child='' watch=''
while [ $# -gt 0 ]; do
  case $1 in
    -t) threads=$2; shift ;;
    -P) shift ;;
    *) if [ -z "$ini" ]; then ini=$1; elif [ -z "$out" ]; then out=$1; else frame=$1; fi ;;
  esac
  shift
done
pov=${POVRAY:-povray} cache=$(dirname "$out") begun=$(date +%s)
command -v "$pov" >/dev/null || { echo "there is no POV-Ray here: install it"; exit 1; }
work=$(mktemp -d) || exit 1
end() { kill -9 $child $watch 2>/dev/null; cd /; rm -rf "$work"; exit "$1"; }
trap 'end 1' HUP INT TERM
cp -R "$(dirname "$ini")" "$work/scene" && cd "$work/scene" && mkdir .made || end 1
if grep -q '^Work_Threads=' pov.ini; then threads=''; fi
number=$(expr "$frame" + 0)
"$pov" -D pov.ini +O.made/f "+SF$number" "+EF$number" ${threads:+"+WT$threads"} \
  >"$work/log" 2>&1 </dev/null &
child=$!
while sleep 1 3>&-; do
  part=$(tail -c 300 "$work/log" | tr '\r' '\n' | sed -n 's/^Rendered .*(\([0-9]*\)%).*/\1/p' |
    tail -n 1)
  memory=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$child/status" 2>/dev/null)
  [ -z "$memory" ] ||
    echo "Mem:1.00M (0.00M, Peak $((memory / 1000)).$((memory % 1000 / 100))0M)" >&3
  [ "${part:-0}" -eq 0 ] || {
    left=$((($(date +%s) - begun) * (100 - part) / part))
    printf 'remaining:%d:%02d:%02d of this frame\n' $((left / 3600)) $((left / 60 % 60)) \
      $((left % 60)) >&3
  }
done 3>&1 >/dev/null 2>&1 &
watch=$!
wait $child && set -- .made/f* && [ -f "$1" ] && mv "$1" "$cache/.made.$$" &&
  mv "$cache/.made.$$" "$out$frame.${1##*.}" && end 0
tr '\r' '\n' <"$work/log" | grep -v '^Rendered' | tail -n 60 | sed 's/^ */pov: /'
: >"$cache/pov.crash.txt"
end 1
"""


# === 15. RENDERONLINE ========================================================
# The dialect of RenderOnline's clients: decodes what they ask at /renderapi/v1,
# calls SCHEDULER, encodes its answers as JSON in the dialect's own words. A task
# is a job under its own number; a user is one of the people, who shows a token
# that is good for nothing else. What a client may choose of POV-Ray's command line
# is in the settings file; a client's values never become words of their own there.

TASKS_SHOWN = 15  # the newest of a user, as the protocol has it
MAX_SCENE = 64 << 20  # bytes of a scene, with the form that it comes in
_ANY_ORIGIN = {f"Access-Control-Allow-{what}": "*" for what in ("Origin", "Methods", "Headers")}
# What a client may ask for, and the field of the answer that says whether it was done.
_ASKED_FOR = {"info": "IsSuccess", "enqueue": "IsAdded", "dequeue": "IsRemoved",
              "download": "DownloadProvided", "delete": "IsDeleted"}


def online_token(farm_key: str, name: str, added: float) -> str:
    """Return what a person shows from a RenderOnline client; it leads to nothing else."""
    return derived(farm_key, "renderonline", name, repr(added))[:32]


class RenderOnline:
    """The routes of RenderOnline's clients, for a ``Coordinator`` that takes their scenes."""

    def __init__(self, scheduler: Scheduler, access: Access, farm_key: str,
                 rules: OnlineRules) -> None:
        self._farm, self._store = scheduler, scheduler.store
        self._access, self._key, self._rules = access, farm_key, rules
        self._views = Views(scheduler)
        self._scanning = threading.Lock()  # one scene at a time: the farm has more to do

    def identify(self, request: Request) -> Identity:
        """Return who sends a request: at our routes a guest, whose token it is.

        The part of an email before the @ is the person's name.
        """
        token = request.headers.get("token", "")
        if not token or not request.path.startswith("/renderapi/"):
            return self._access.identify(request)
        self._access.check_patience(request.remote)
        with self._store.read() as look:
            person = look.person(request.headers.get("email", "").partition("@")[0])
        if person and person.role is Role.USER and hmac.compare_digest(
                token.encode(), online_token(self._key, person.name, person.added).encode()):
            return Identity(frozenset({"guest"}), name=person.name)
        self._access.slow_down(request.remote)
        return Identity()

    @route("GET", "/renderapi/v1/info", role="anyone", summary="A RenderOnline user and tasks")
    @route("POST", "/renderapi/v1/<what>", role="anyone", max_body=MAX_SCENE,
           summary="What a RenderOnline client asks for")
    @route("OPTIONS", "/renderapi/v1/<what>", role="anyone",
           summary="Let pages of RenderOnline's client ask")
    def call(self, request: Request) -> Response:
        """Headers: email, token. What: enqueue, dequeue, download, delete.

        Who shows no token that is good is refused here, in the dialect's words.
        """
        what = request.params.get("what", "info")
        if request.method == "OPTIONS":
            response = Response(204)
        elif what not in _ASKED_FOR or (what == "info") is (request.method == "POST"):
            response = Response(404)
        elif "guest" not in request.identity.roles:
            response = Response(401) if what != "enqueue" else _online_answer(
                what, False, "Unauthorized.", 401)
        else:
            try:
                response = getattr(self, f"_{what}")(request)
            except Exception as error:
                refusal = refusal_of(error, f"{request.method} {request.path!r}")
                response = _online_answer(what, False, str(refusal), refusal.status)
        response.headers.update(_ANY_ORIGIN)
        return response

    # --- what is asked for

    def _info(self, request: Request) -> Response:
        name, mail = request.identity.name, request.headers["email"]
        user = {"UserId": zlib.crc32(name.encode()) % 65535 + 1, "FirstName": name, "LastName": "",
                "Email": mail, "SubscriptionId": 1, "IsActive": True}
        with self._store.read() as tx:
            tasks = list(itertools.islice(self._tasks(tx, name, user["UserId"]), TASKS_SHOWN))
        return json_response({"User": user, "Tasks": tasks})

    def _enqueue(self, request: Request) -> Response:
        owner = request.identity.name
        with self._store.incoming() as place:
            name, engine, given = self._form(request, place)
            with self._store.read() as look:
                most = self._farm.people.allowance(look, owner).jobs
                if most and look.usage(owner).jobs >= most:
                    raise ProtocolError(403, f"Queue limit {most} reached for your subscription.")
            chosen, extension = self._rules.engine(engine), PurePosixPath(name).suffix
            if extension != chosen.extension:
                raise ProtocolError(400, f"Engine extension {chosen.extension} not matching with "
                                    f"files extension {extension}.")
            for argument, value in given:
                self._rules.check(argument, value)
            scene = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("-.")[-100:]
            values = {**dict(reversed(given)), UPLOADED: scene, OUTPUT: "image", "@threads": "1"}
            words = chosen.arguments(values)
            (place / "files").mkdir()
            (place / "upload").rename(place / "files" / scene)
            pov, project = (
                self._read(owner, words, place / "files") if chosen.name == POVRAY else
                (chosen.job(values), plain_project(place / "files" / scene)))
            self._submit(owner, scene, words, chosen, pov, project)
        return _online_answer("enqueue", True, "Task successfully enqueued.")

    def _dequeue(self, request: Request) -> Response:
        job = self._job(request)
        if job.state in FINISHED:
            raise ProtocolError(400, f"Task with identifier {job.id} is not in the queue.")
        self._farm.cancel(job.id, request.identity.name)
        return _online_answer("dequeue", True, "Task successfully dequeued.")

    def _download(self, request: Request) -> Response:
        """Answer a zip of the scene and of what was made so far."""
        job = self._job(request)
        with self._store.read() as tx:
            manifest = Manifest.from_wire(json.loads(tx.manifest(job.manifest)))
            files = {**{file.path: self._store.blob_path(file.sha256) for file in manifest.files},
                     **self._views.made(tx, job)}
        if not all(map(is_file, files.values())):
            raise ProtocolError(500, "Failed to create ZIP archive after multiple attempts!")
        response = stream_response(zip_stream(files.items()), "application/zip")
        response.headers["Content-Disposition"] = f"attachment; filename={uuid.uuid4()}.zip"
        return response

    def _delete(self, request: Request) -> Response:
        self._farm.delete(self._job(request).id, request.identity.name)
        return _online_answer("delete", True, "Task and associated render successfully deleted.")

    # --- inside

    def _job(self, request: Request) -> Job:
        """Return the task that a request names: this user's, and one of such a client's."""
        request.body.limit = BODY_LIMIT
        try:
            number = _any_case(request.json())["taskid"]
            if type(number) is not int or not 0 <= number < 1 << 63:
                raise ValueError
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(400, "Request content type must be application/json."
                                if getattr(error, "status", 0) == 415 else
                                "Request content has an invalid format.") from error
        with self._store.read() as tx:
            job = tx.find_job(number)
        if job is None or job.owner != request.identity.name or not _render_of(job):
            raise ProtocolError(
                400, f"Task with identifier {number} not found for the current user.")
        return job

    def _form(self, request: Request, place: Path) -> tuple[str, str, list[tuple[str, str]]]:
        """Save the file of a form; return its name, and what is wanted of it."""
        names: list[str] = []
        (place / "request").touch()
        try:
            for head, blocks in form_parts(request):
                file = re.search(r'\bfilename=("[^"\r\n]*"|[^;\s]*)', head)
                if file or re.search(r'\bname="?request\b', head):
                    with open(place / ("upload" if file else "request"), "wb") as to:
                        for block in blocks:
                            self._store.need(len(block))
                            to.write(block)
                names += [_base_name(file[1].strip('"'))] if file else []
        except UserError:
            names = []
        if not names:
            raise ProtocolError(400, "No files were uploaded.")
        with open(place / "request", "rb") as text:
            wish = text.read(BODY_LIMIT)
        if not wish.strip():
            raise ProtocolError(400, 'Header "request" is empty.')
        engine, given = _wish(wish)
        if len(names) > 1:
            raise ProtocolError(400, "Only 1 file may be uploaded per request.")
        return names[0], engine, given

    def _read(self, owner: str, words: Sequence[str],
              place: Path) -> tuple[PovJob, Project]:
        """Read POV-Ray's command line for a scene that lies alone in a directory."""
        pov = read_command_line(words, place, {}, (), strict=False)
        plan = plan_frames(pov)
        with self._store.read() as look:  # before the scene is looked into
            self._farm.people.check(look, owner, len(plan.frames))
        try:
            with self._store.gate.outside(), self._scanning:
                project = collect_project(
                    pov.scene, (), place, place, map(plan.output_name, plan.frames), plan.frames,
                    (), values=pov.values, by_file=(pov.scene,), ceiling=place)
        except UserError as error:  # the rest says what there is on this computer
            raise UserError(f"{str(error).partition(', which ')[0]}: it can only use what is in "
                            "the scene itself, and POV-Ray's own files") from None
        uses = {*project.uses, *([f"povray {' '.join(pov.needs)}"] if pov.needs[0] else ())}
        return PovJob({**pov.values, **project.values, "Input_File_Name": project.scene},
                      pov.declares, pov.library, project.run_dir, tuple(uses)), project

    def _submit(self, owner: str, scene: str, words: Sequence[str], engine: OnlineEngine,
                pov: PovJob, project: Project) -> None:
        """Make a job of a scene, with what clients are told of it."""
        render = {"FileName": scene, "FilePath": "", "FileSize": project.manifest.files[0].size,
                  "Arguments": " ".join([engine.name, *words]), "EngineId": engine.id}
        pov = replace(pov, uses=tuple(sorted({*pov.uses, SENT + json.dumps(render)})))
        job, missing = self._farm.submit(
            PurePosixPath(scene).stem, owner, PovJob.from_wire(pov.to_wire()), project.manifest,
            JobOptions(in_order=pov.plan.animation and "own-output" in project.uses))
        try:
            for file in project.manifest.files:
                if file.sha256 in missing:
                    self._farm.put_blob(file.sha256, file_blocks(project.sources[file.path]))
        except Exception:
            self._farm.delete(job, owner)
            raise

    def _tasks(self, tx: Look, owner: str, user: object) -> Iterator[dict[str, Any]]:
        """Yield somebody's tasks, the newest first."""
        after = 0
        while jobs := tx.jobs(after, 100, owner):
            for job in jobs:
                if render := _render_of(job):
                    yield self._task(job, render, user)
            after = jobs[-1].id

    def _task(self, job: Job, render: Mapping[str, Any], user: object) -> dict[str, Any]:
        began = job.started is not None
        # One that waits for its scene to be mended has failed: no client can mend it.
        stuck = job.state is JobState.PAUSED and job.reason != PAUSED_BY_HAND
        engine = next((one for one in self._rules.engines if one.id == render["EngineId"]),
                      OnlineEngine(render["EngineId"], "", "", ""))
        return {
            "Task": {
                "TaskId": job.id, "UserId": user, "QueueTime": _moment(job.created),
                "StartTime": _moment(job.started),
                "EndTime": _moment(job.finished or (job.started if stuck else None)),
                "IsRunning": began and job.state is JobState.ACTIVE,
                "IsSuccess": job.state is JobState.DONE, "RenderId": job.id,
                "MachineId": 1 if began else None},
            "Render": {"RenderId": job.id, **render},
            "Engine": {
                "EngineId": engine.id, "Name": engine.name, "Extension": engine.extension,
                "DownloadPath": "", "RenderArgument": engine.template}}


def _online_answer(what: str, good: bool, text: str, status: int = 200) -> Response:
    return json_response({_ASKED_FOR[what]: good, "ErrorMessage": text}, status)


def _render_of(job: Job) -> dict[str, Any]:
    """Return what is told of a job as a Render; nothing of one that came in another way."""
    for use in job.pov.uses if SENT in job.pov_json else ():
        if use.startswith(SENT):
            with contextlib.suppress(ValueError, RecursionError):
                render = json.loads(use[len(SENT):])
                return render if isinstance(render, dict) and "EngineId" in render else {}
    return {}


def _any_case(value: Any) -> Any:
    """Return JSON with the names of all fields in small letters."""
    if isinstance(value, dict):
        return {name.lower(): _any_case(one) for name, one in value.items()}
    return list(map(_any_case, value)) if isinstance(value, list) else value


def _wish(text: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Return the engine and the arguments, in their order, that a client wants."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        wish = _any_case(json.loads(text))
        given = [(one["argtypeid"], one["value"]) for one in wish["arguments"]]
        texts = [wish["engineid"], *itertools.chain(*given)]
        if isinstance(wish["arguments"], list) and "".join(texts).isprintable():
            return wish["engineid"], given
    raise ProtocolError(400, "Invalid enqueue request arguments.")


def _base_name(text: str) -> str:
    """Return a file's name without its directories, from what clients send: also a file: URI."""
    coded = re.fullmatch(r"=\?utf-8\?b\?([A-Za-z0-9+/=]*)\?=", text, re.IGNORECASE)
    with contextlib.suppress(ValueError):
        text = base64.b64decode(coded[1]).decode() if coded else text
    text = urllib.parse.unquote(text) if text.startswith("file:") else text
    return re.split(r"[/\\]", text)[-1]


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


# === 16. PAGES ===============================================================
# The pages: plain HTML with forms, which a script keeps up to date in place, and
# which reload where none may run. Every text is escaped unless it is Html, which only
# ``element`` makes. Reads the store and shows API's views of it, changes things through
# API and SCHEDULER, decides nothing.

# Not "no-referrer": with that, browsers send "Origin: null" with our own forms.
PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
                               "script-src 'self'; connect-src 'self'; "
                               "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin", "Cache-Control": "no-store",
}
BROWSER_TYPES = frozenset({".png", ".jpg", ".jpeg", ".bmp"})  # what <img> can show
JOBS_SHOWN = 48  # on one page
CELLS_SHOWN = 400  # in a grid of frames; of more frames than that, a cell shows several
CARDS_SHOWN = 12  # computers on the farm's page
EVENTS_READ = 400  # of which the story's few lines are made
NEWS_SHOWN = 14
GONE_FOR = 3600.0  # seconds for which a computer that fell silent keeps its card
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
    start = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(plain(str(value)))}"'
                    for name, value in attributes.items() if value is not None)
    end = "" if tag in ("meta", "link", "img", "input") else f"{_markup(children)}</{tag}>"
    return Html(f"<{tag}{start}>{end}")


class _Need(NamedTuple):
    """What waits for a person: a mark, whether it is ``about`` a computer, words and buttons."""

    mark: str
    about: str
    words: Node
    buttons: Node
    bad: bool = False


class Pages:
    """What people see: the farm, a job, a frame, and the forms that steer them."""

    def __init__(self, api: Api, scheduler: Scheduler, access: Access, pin: str = "",
                 typed: Callable[[str], str] = "povfarm.py {}".format) -> None:
        self._api = api
        self._farm = scheduler
        self._access = access
        self._pin = pin  # of the certificate that is shown
        self._typed = typed  # how commands are written, see with_commands

    @route("GET", "/", role="reader", shared=True, summary="The status page")
    def home(self, request: Request) -> Response:
        """Show jobs, workers and what happened.

        Query: before (a job's id), for older jobs; mine, for those of who looks.
        """
        before, mine = _query_digits(request, "before"), "mine" in request.query
        owner = request.identity.name if mine else ""
        with self._farm.store.read() as tx:
            rows = tx.jobs(before, JOBS_SHOWN, owner)
            older = rows[-1].id if len(rows) == JOBS_SHOWN else None
            shown = {row.id for row in rows}
            order = [row for row in tx.leasable_jobs(may=lambda one: owner in ("", one))
                     if not before]
            rows += [row for row in order if row.id not in shown]
            views = self._views(tx, rows)
            workers = self._api.views.workers(tx)
            _sort(views, workers, [row.id for row in order])
            pictures = {worker["id"]: tx.newest_task_by(worker["id"])
                        for worker in workers[:CARDS_SHOWN]}
            stage = max(_busy(views), key=lambda view: view["frames"]["total"], default=None)
            growing = [self._api.views.frame(tx, task, {}) for task in
                       (tx.frames_to_cut(stage["id"])[:1] if stage else ())]
            story = _story(_latest(tx), views, self._farm.clock.time())
        needs = self._needs(request, views, workers)
        live = [worker for worker in workers if worker["state"] in ("working", "idle")]
        active = any(view["state"] == JobState.ACTIVE for view in views)
        now = self._farm.clock.time()
        return self._page(
            request, _title(views, self._api.name),
            element("h1", "Older jobs" if before else _verdict(views, now)),
            element("p", _at_hand(views, live, workers), [
                " · ", element("a", "Everybody's jobs", href="/") if mine
                else element("a", "Only my jobs", href="/?mine=1")]
                if "user" in request.identity.roles else None, class_="lead"),
            _needs_you(needs),
            element("div", _now(stage, growing), _room(workers, pictures, views), class_="now")
            if (stage or workers) and not before else None,
            _queue(views, functools.partial(self._quick, request)),
            _finished(views), None if views or before else _no_jobs(),
            element("p", element("a", "Older jobs", href=f"/?before={older}{'&mine=1' * mine}"))
            if older else None, story,
            reload=(3 if active else 30) if live else 5,
            state="bad" if any(need.bad for need in needs) else "busy" if _busy(views) else "")

    @route("GET", "/jobs/<job:int>", role="reader", shared=True, summary="The page of a job")
    def job(self, request: Request) -> Response:
        """A job with its frames. Query: from (a frame), to see the frames of its cell."""
        with self._farm.store.read() as tx:
            row = tx.job(request.params["job"])
            view, = self._views(tx, [row])
            states = tx.frame_states(row.id)
            size = -(-len(states) // CELLS_SHOWN)
            first = _query_digits(request, "from")
            shown = [] if size > 1 and first not in (frame for frame, _ in states[::size]) else (
                tx.tasks(row.id, first - 1, size) if size > 1 else tx.tasks(row.id))
            chosen = [self._api.views.frame(tx, task, {}) for task in shown]
            board = [present(tx.task_of_frame(row.id, states[part * len(states) // 8][0]))
                     for part in range(8 if len(states) >= 8 else 0)]
            growing = [self._api.views.frame(tx, task, {}) for task in tx.frames_to_cut(row.id)]
        reloads = {JobState.ACTIVE: 3, JobState.WAITING: 3, JobState.PAUSED: 30}
        return self._page(
            request, _title([view], view["name"]),
            element("div", _growing(view, growing[0]) if growing
                    else _picture(view, view["newest"], "large"), element(
                "div", element("h1", view["name"]), _badge(_state(view)), _bar(view),
                _figures(view), _warnings(view), self._buttons(request, view),
                _job_links(view)), class_="stage"),
            _storyboard(view, board), _frames(view, states, chosen, size), _options(view, row),
            reload=reloads.get(view["state"], 0))

    @route("GET", "/jobs/<job:int>/frames/<frame:int>", role="reader", summary="A frame's page")
    def frame(self, request: Request) -> Response:
        """A frame's image, its numbers, and what POV-Ray printed."""
        number = request.params["frame"]
        with self._farm.store.read() as tx:
            row = tx.job(request.params["job"])
            task = tx.task_of_frame(row.id, number)
            if task is None:
                raise ProtocolError(404, f"job {row.id} has no frame {number}")
            step = row.pov.plan.frames.step
            neighbours = [to for to in (number - step, number + step)
                    if tx.task_of_frame(row.id, to) is not None]
            names = {worker.id: worker.name for worker in tx.workers()}
            (view,), address = self._views(tx, [row]), f"/jobs/{row.id}"
            frame = self._api.views.frame(tx, task, names)
            failures = [] if frame["state"] == TaskState.DONE else [
                attempt.message for attempt in tx.attempts(task.id)
                if attempt.state == AttemptState.FAILED]
        text = cast(bytes, self._api.log(request).body).decode()[-LOG_SHOWN:]
        return self._page(
            request, f"Frame {number} · {row.name}",
            element("h1", element("a", row.name, href=address)),
            element("p", f"{_frame_name(view, number)} ", _badge(frame["state"]), class_="lead"),
            _picture(view, task, "large") if frame["state"] == TaskState.DONE else
            _growing(view, frame) if "slices" in frame else None,
            [element("p", words, class_="notice failed") for words in failures[-1:]],
            _frame_facts(frame),
            self._form(request, f"{address}/retry?frames={number}", "Render again")
            if self._may_steer(request, view) and task.state not in (
                TaskState.QUEUED, TaskState.LEASED) else None,
            element("nav", [element("a", f"Frame {to}", href=f"{address}/frames/{to}")
                            for to in neighbours], class_="links"),
            _section("What POV-Ray printed", element("pre", text or "Nothing yet.", tabindex=0),
                     id="log"),
            reload=5 if frame["state"] in ("queued", "leased") else 0)

    @route("POST", "/jobs/<job:int>/<action>", role="user", summary="Steer a job by a form")
    def steer(self, request: Request) -> Response:
        """Action: pause, resume, cancel, retry, delete, or set, with options of the job."""
        given = self._access.check_form(request)
        if request.params["action"] == "delete":
            self._api.delete(request)
            return redirect("/")
        if request.params["action"] == "set":
            self._farm.change(request.params["job"], {
                name: row.parse(given[name], name) for name, row in JOB_OPTIONS.items()
                if name in given}, request.identity.name)
        else:
            self._api.steer(request)
        return redirect(f"/jobs/{request.params['job']}")

    @route("POST", "/workers/<code>/admit", role="admin", summary="Admit a worker by a form")
    def admit(self, request: Request) -> Response:
        """Admit the worker that shows the code."""
        self._access.check_form(request)
        self._farm.admit(request.params["code"], request.identity.name)
        return redirect("/")

    @route("POST", "/workers/<worker:int>/remove", role="admin",
           summary="Remove a worker by a form")
    def remove(self, request: Request) -> Response:
        """Take its work back and let it in no more."""
        self._access.check_form(request)
        self._farm.remove_worker(request.params["worker"], request.identity.name)
        return redirect("/")

    @route("GET", "/login/<code>", role="anyone", summary="Log a browser in")
    def login(self, request: Request) -> Response:
        """Exchange a login link's code for a cookie."""
        if request.method == "HEAD":  # a link's preview: it must not use the code up
            return redirect("/")
        session = self._access.log_in(request.params["code"], request.remote)
        return self._with_cookie(request, session, self._access.place(session), "")

    @route("POST", "/logout", role="person", summary="Log a browser out")
    def logout(self, request: Request) -> Response:
        """Let the browser forget its cookie."""
        self._access.check_form(request)
        self._access.log_out(request)
        return self._with_cookie(request, "", request.place, "; Max-Age=0")

    @route("GET", "/computers", role="reader", shared=True, summary="The page of the workers")
    def computers(self, request: Request) -> Response:
        """Every worker with what it is and does, and how one more joins."""
        with self._farm.store.read() as tx:
            workers, totals = self._api.views.workers(tx), self._api.views.totals(tx)
        _sort([], workers, [])
        needs = [need for need in self._needs(request, [], workers) if need.about]
        return self._page(
            request, f"Computers · {self._api.name}", element("h1", "Computers"),
            element("p", _at_hand([], [worker for worker in workers if worker["state"] in (
                "working", "idle")], workers), class_="lead"),
            _needs_you(needs), self._workers(request, workers), self._join(request),
            _totals(totals), reload=5)

    @route("GET", "/favicon.svg", role="anyone", summary="The farm's mark")
    @route("GET", "/script.js", role="anyone", summary="What keeps the pages up to date")
    @route("GET", "/style.css", role="anyone", summary="How the pages look")
    def look(self, request: Request) -> Response:
        """The style sheet, the script or the mark, which changes with the state of the farm.

        Their addresses have the hash of what is there, so nothing is asked for twice.
        """
        name = request.path[1:]
        mime, text = _LOOKS[name]
        if name == "favicon.svg":
            text = MARK.replace("</svg>", _MARK_OF.get(request.query.get("state", ""), "</svg>"))
        response = text_response(text, mime=mime)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response

    def error_page(self, request: Request, refusal: ProtocolError) -> Response:
        """Return a page with what is refused, for people to read."""
        text = str(refusal)
        title, words = "That did not work", [f"{text[:1].upper()}{text[1:]}."]
        if refusal.status == 401:
            title, words = "Log in first", [
                "On the computer where the farm runs, or where you submit jobs, type ",
                element("code", "povfarm.py login"),
                ". Open the link that it prints in this browser."]
        return self._page(
            request, title, element("h1", title), element("p", words, class_="lead"),
            element("p", element("a", "To the farm", href="/", class_="button")),
            status=refusal.status)

    # --- inside

    def _page(self, request: Request, title: str, *body: Node, reload: int = 0,
              status: int = 200, state: str = "") -> Response:
        """Return a whole page that loads itself again after ``reload`` seconds, 0 for never.

        Where the script runs, it brings what has changed into the page instead, at the latest
        after so many seconds. ``state`` of the farm is shown by the mark: bad, busy or nothing.
        """
        notice = self._farm.store.notice if request.identity.roles else ""
        still = "still" in request.query
        mark = _address("favicon.svg") + f"&state={state}"
        head = element(
            "head", element("meta", charset="utf-8"),
            element("title", f"{'! ' * (state == 'bad')}{title}"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("noscript", element("meta", http_equiv="refresh", content=reload))
            if reload and not still else None,
            element("link", rel="icon", id="icon", href=mark),
            element("link", rel="stylesheet", href=_address("style.css")),
            element("script", src=_address("script.js"), defer=""))
        switch = element("noscript", element(
            "a", "Reload this page automatically" if still else "Stop reloading this page",
            href=_same_page(request, **({} if still else {"still": "1"}))))
        with self._farm.store.read() as tx:
            event = tx.last_event()
        now = time.strftime("%H:%M:%S", time.localtime(self._farm.clock.time()))
        page = element("html", head, element(
            "body", element("a", "Skip to what is shown", href="#main", class_="skip"),
            self._header(request, mark, now), element(
                "main", element("p", notice, class_="notice failed") if notice else None, body,
                id="main", tabindex=-1, data_event=event,
                data_reload=None if still else reload or 30),
            element("footer", switch if reload else None, element("span", f"povfarm {VERSION}"))),
            lang="en")
        text = with_commands(page, lambda name: html.escape(self._typed(name)))
        if request.place:  # in what is quoted here, no quote is left
            text = re.sub(' (href|src|action)="(?=/)', rf' \1="{request.place}', text)
        response = text_response(f"<!DOCTYPE html>{text}", status, "text/html")
        response.headers.update(PAGE_HEADERS)
        return response

    def _header(self, request: Request, mark: str, now: str) -> Html:
        """Return what is above every page: where one is, and who one is."""
        you = request.identity
        user = element("span", f"You are {you.name} ", self._form(request, "/logout", "Log out"),
                       class_="row") if "person" in you.roles else element(
            "span", "Read-only. To make changes: ", element("code", "povfarm.py login")) \
            if you.roles else None
        places = (("/", "Farm"), ("/computers", "Computers"))
        return element("header", element(
            "a", element("img", src=mark, alt="", width=28, height=28), self._api.name, href="/",
            class_="home"), element("span", element("i"), element("span", f"As of {now}"),
                                    id="live", role="status"), element("nav", [
                element("a", name, href=to, aria_current="page" if to == request.path else None)
                for to, name in places] if you.roles else None, aria_label="Pages"), user)

    def _views(self, tx: Look, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Return API's views of jobs, each with the frame that was finished last as ``newest``."""
        return [{**view, "newest": tx.newest_task_of(view["id"])}
                for view in self._api.views.jobs(tx, jobs, whole=True)]

    def _with_cookie(self, request: Request, value: str, place: str, more: str) -> Response:
        response = redirect("/" if request.place else f"{place}/")
        more += "; Secure" if request.secure else ""
        cookie = f"{self._access.cookie}={value}; HttpOnly; SameSite=Strict; Path={place}/{more}"
        response.headers.update({**PAGE_HEADERS, "Set-Cookie": cookie})
        return response

    def _form(self, request: Request, address: str, label: str, kind: str | None = None,
              **values: str) -> Html:
        fields = {"token": self._access.form_token(request), **values}
        return element("form", [element("input", type="hidden", name=name, value=value)
                                for name, value in fields.items()],
                       element("button", label, class_=kind), method="post", action=address)

    def _needs(self, request: Request, views: Sequence[View],
               workers: Sequence[View]) -> list[_Need]:
        """Return what waits for a person, the worst first, each cause once and with its cure."""
        lately = self._farm.clock.time() - 86400
        needs = [self._failed(request, view) for view in views
                 if view["frames"]["failed"] and (view["finished"] or math.inf) > lately]
        waiting: dict[str, list[View]] = {}
        for view in views:
            if view["waiting_for"] and view["state"] == JobState.ACTIVE:
                text = view["waiting_for"].replace(f"set {view['id']} ", "set JOB ")
                waiting.setdefault(text, []).append(view)
        needs += [self._asks_to_join(request, worker) for worker in workers if "code" in worker]
        for some in waiting.values():
            first, cure = some[0], some[0]["cure"]
            more = f" and {counted(len(some) - 1, 'more job')}" if len(some) > 1 else ""
            needs.append(_Need("◷", "", [element("strong", first["name"]), f"{more}: ",
                                         first["waiting_for"]],
                               self._cures(request, first, cure)))
        admin = "admin" in request.identity.roles
        for worker in workers:
            address, words = f"/workers/{worker['id']}", element("strong", worker["name"])
            if worker["state"] == "sick":
                needs.append(_Need("✕", "computer", [words, f" is set aside: {worker['reason']}"],
                                   self._asked(request, "Remove…", f"{address}/remove",
                                               "Remove it from the farm") if admin else None))
            elif worker["state"] == "gone" and worker["seen"] is not None and (
                    self._farm.lease_time < worker["seen"] < GONE_FOR):
                needs.append(_Need("◌", "computer", [
                    words, f" has been silent for {_lasting(worker['seen'])}. What it rendered "
                    "went to others."], None))
        return needs

    def _failed(self, request: Request, view: View) -> _Need:
        """Return that frames of a job failed, with what POV-Ray said of the first."""
        failure, text = view["failure"], view["why"]
        if view["state"] not in (JobState.PAUSED, JobState.FAILED):
            text = f"{counted(view['frames']['failed'], 'frame')} failed"
        log = failure and element("a", "Log", class_="button", href=(
            f"/jobs/{view['id']}/frames/{failure['frame']}#log"))
        return _Need("✕", "", [
            element("a", element("strong", view["name"]), href=f"/jobs/{view['id']}"), f": {text}",
            [" ", element("q", failure["message"])] if failure else None],
            [log, self._cures(request, view, "retry")], bad=True)

    def _cures(self, request: Request, view: View, cure: str) -> Node:
        """Return the button for what would help a job."""
        if not cure or not self._may_steer(request, view):
            return None
        address = f"/jobs/{view['id']}/{cure if '=' not in cure else 'set'}"
        name, _, value = cure.partition("=")
        return self._form(request, address, {"povray": "Let any POV-Ray render it"}.get(
            name, name.title()), **({name: value} if value else {}))

    def _quick(self, request: Request, view: View) -> Node:
        """Return the button for what is done to a job most often."""
        action = {JobState.ACTIVE.value: "pause", JobState.PAUSED.value: "resume"}.get(
            view["state"], "")
        return self._cures(request, view, action)

    def _asks_to_join(self, request: Request, worker: View) -> _Need:
        code = worker["code"]
        how = [self._form(request, f"/workers/{worker['id']}/remove", "Refuse"),
               self._form(request, f"/workers/{code}/admit", "Admit", "good")] \
            if "admin" in request.identity.roles else element(
                "span", "To let it in: ", element("code", f"povfarm.py admit {code}"))
        return _Need("?", "computer", [
            element("strong", worker["name"]), " asks to join. Does it show the code ",
            element("strong", code), "?"], how)

    def _workers(self, request: Request, workers: Sequence[View]) -> Node:
        """Return the table of the workers."""
        heads = ["Name", "State", "Cores", "Renders", "POV-Ray", "System", "Heard of"]
        admin = "admin" in request.identity.roles
        rows = [element("tr", element("th", worker["name"], scope="row"), [
            element("td", cell) for cell in (
                [_badge(worker["state"]), f" {worker.get('reason', '')}"], worker["cores"],
                worker["runs"], worker["engines"].get("povray", ""), worker["system"],
                "long ago" if worker["seen"] is None else _ago(worker["seen"]))],
            element("td", self._asked(request, "Remove…", f"/workers/{worker['id']}/remove",
                                      "Remove it from the farm")) if admin else None)
            for worker in workers]
        table = element("table", element("thead", element(
            "tr", [element("th", head, scope="col") for head in heads],
            element("td") if admin else None)), element("tbody", rows))
        return element("div", table, class_="scroll") if workers else None

    def _join(self, request: Request) -> Html:
        """Return what to type to bring one more computer."""
        host = request.headers.get("host", "")
        if not re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", host):  # it is to be pasted into a shell
            host = f"HOST:{PORT}"
        here = re.match(r"localhost|127\.|\[::1\]", host)
        server = f"https://{host} --pin {self._pin}" if self._pin else f"http://{host}"
        return _section(
            "Add a computer",
            element("p", "Any computer with Python and POV-Ray can help. "
                    f"{'On this one, type' if here else 'Type there'}:"),
            _typed_there(f"povfarm.py work --server {server}"),
            element("p", "On another computer you can leave --server out: it finds the farm."),
            id="add")

    def _asked(self, request: Request, word: str, address: str, label: str) -> Html:
        """Return a link to the same page with a form in its place; that page does not reload."""
        if request.query.get("ask") != address:
            return element("a", word, class_="button asks",
                           href=f"{_same_page(request, still='1', ask=address)}#asked")
        return element("div", self._form(request, address, label, "bad"),
                       element("a", "No", class_="button", href=_same_page(request)),
                       class_="row", id="asked")

    def _may_steer(self, request: Request, view: View) -> bool:
        you = request.identity
        return "admin" in you.roles or ("user" in you.roles and you.name == view["owner"])

    def _buttons(self, request: Request, view: View) -> Node:
        """Return what can be done to a job by its owner, or the admin.

        Only an ended one can be deleted, after a question.
        """
        if not self._may_steer(request, view):
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
    "waiting": "… waiting for its files", "active": "◷ waiting:",
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
    "removed": "was removed", "doubtful": "is doubtful", "set aside": "had a worker set aside",
    "admitted": "was let in", "deleted": "was deleted", "invited": "can come",
    "person added": "has come", "person removed": "was removed", "person changed": "is the limit",
}
_KIND_WORDS: Mapping[str, str] = {"slice": ", a slice of it,", "pass": ", what its slices share,"}


def _markup(node: Node) -> str:
    if node is None or isinstance(node, Html):
        return node or ""
    if isinstance(node, (str, int)):
        return html.escape(plain(str(node)))
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


def _lasting(seconds: float) -> str:
    """Return a time as people say it, which reads as no time of day."""
    for limit, unit, word in ((100, 1, "second"), (5400, 60, "minute"), (172_800, 3600, "hour")):
        if seconds < limit:
            return _count_of(max(round(seconds / unit), 1), word)
    return _count_of(round(seconds / 86400), "day")


def _clock(at: float, now: float) -> str:
    return time.strftime("%H:%M" if at - now < 72_000 else "%H:%M on %A, %d %B" if at - now < 6e6
                         else "%d %B %Y", time.localtime(at))


def _frame_name(view: View, frame: int) -> str:
    return "The image" if view["frames"]["total"] == 1 else f"Frame {frame}"


def _is_busy(view: View) -> bool:
    return bool(view["state"] == JobState.ACTIVE and view["frames"]["leased"])


def _state(view: View) -> str:
    return "rendering" if _is_busy(view) else str(view["state"])


def _ended(view: View) -> bool:
    return JobState(view["state"]) in FINISHED


def _section(title: str, *children: Node, **attributes: str) -> Html:
    return element("section", element("h2", title), *children, **attributes)


def _totals(totals: Mapping[str, Sequence[View]]) -> Node:
    """Return tables of what was rendered, by each worker, computer and group."""
    tables = [element("table", element("thead", element("tr", [
        element("th", head, scope="col") for head in (
            kind.capitalize()[:-1], "Frames", "Time", "Failed tries")])), element("tbody", [
                element("tr", element("th", view["name"] or "none", scope="row"), [
                    element("td", cell) for cell in (
                        said_frames(view["frames"]), format_duration(view["wall"]),
                        f"{view['failures']:,}")]) for view in views]))
              for kind, views in totals.items()]
    return _section("Rendered so far", *[element("div", table, class_="scroll")
                                         for table in tables]) if totals["workers"] else None


def _badge(state: str) -> Html:
    return element("span", _STATE_WORDS[state], class_=f"badge {state}")


def _busy(views: Sequence[View]) -> list[View]:
    return list(filter(_is_busy, views))


def _title(views: Sequence[View], name: str) -> str:
    return "".join(f"{100 * view['progress']:.0f} % {view['name']} · "
                   for view in _busy(views)[:1]) + name


def _verdict(views: Sequence[View], now: float) -> str:
    busy = _busy(views)
    if not busy:
        idle = [view["name"] for view in views if view["state"] == JobState.ACTIVE]
        return f"{idle[0]} is waiting" if idle else "Nothing to render"
    what = busy[0]["name"] if len(busy) == 1 else counted(len(busy), "job")
    left = max(view["eta"] or 0.0 for view in busy)
    return f"Rendering {what}" + (f", done at about {_clock(now + left, now)}" if left else "")


def _at_hand(views: Sequence[View], live: Sequence[View], workers: Sequence[View]) -> str:
    """Return how long it takes, and who is there for it."""
    if not live:
        return "No computer is here"
    busy = _busy(views)
    left, rate = max((view["eta"] or 0.0 for view in busy), default=0.0), 3600 * sum(
        view["rate"] for view in busy)
    cores = sum(worker["cores"] for worker in live)
    used = sum(min(worker["cores"], worker["does"]["threads"]) for worker in live if worker["does"])
    working = sum(worker["state"] == "working" for worker in live)
    return " · ".join(filter(None, (
        f"{_lasting(left)} left" if left else "",
        f"{working} of {_count_of(len(workers), 'computer')} at work" if working else
        f"{_count_of(len(live), 'computer')} with {_count_of(cores, 'core')} at hand",
        f"{used} of {_count_of(cores, 'core')} busy" if working else "",
        f"{rate:,.0f} frames an hour" if rate >= 1 else "")))


def _sort(views: list[dict[str, Any]], workers: list[dict[str, Any]], order: list[int]) -> None:
    """Put jobs in the order in which they are rendered, and workers in that of their states."""
    place = {job: number for number, job in enumerate(order)}
    views.sort(key=lambda view: (_ended(view), not _is_busy(view), place.get(
        view["id"], len(place)), -view["id"] if _ended(view) else view["id"]))
    workers.sort(key=lambda worker: _WORKER_ORDER.index(worker["state"]))


def _needs_you(needs: Sequence[_Need]) -> Node:
    if not needs:
        return None
    bad = any(need.bad for need in needs)
    return element("section", element("h2", "Needs you ", element(
        "span", len(needs), class_="count")), element("ul", [element(
            "li", element("span", need.mark, class_="mark" + " bad" * need.bad), element(
                "p", need.words), need.buttons) for need in needs]),
        class_="needs" + " bad" * bad)


def _typed_there(command: str) -> Html:
    """Return a command with a button that copies it, which the script shows."""
    return element("div", element("pre", command), element(
        "button", "Copy", type="button", class_="copy"), class_="typed")


def _now(view: View | None, growing: Sequence[View]) -> Node:
    """Return the largest job that is rendered: its newest frame, or the one that grows."""
    if view is None:
        return None
    newest = view["newest"]
    picture = _growing(view, growing[0]) if growing else _picture(view, newest, "large")
    said = f"{_frame_name(view, newest.frame)}, {format_duration(newest.wall or 0)}" \
        if newest and not growing else f"{100 * view['progress']:.0f} %"
    return element("section", picture, element(
        "div", element("h2", element("a", view["name"], href=f"/jobs/{view['id']}"), id="film"),
        element("span", f"● {said}", class_="badge rendering"), class_="cap"), _bar(view),
        class_="film", aria_labelledby="film")


def _room(workers: Sequence[View], pictures: Mapping[int, Task | None],
          views: Sequence[View]) -> Node:
    """Return a card for each computer, those that have been gone for long apart."""
    here = [worker for worker in workers if worker["state"] != "gone"
            or (worker["seen"] or math.inf) < GONE_FOR]
    known = {view["id"]: view for view in views}
    rest = len(workers) - len(here[:CARDS_SHOWN])
    return _section("The room", element("ul", [
        _card(worker, pictures.get(worker["id"]), known) for worker in here[:CARDS_SHOWN]]),
        element("p", element("a", f"{_count_of(rest, 'other computer')}", href="/computers"))
        if rest else None, class_="room") if workers else None


def _card(worker: View, picture: Task | None, views: Mapping[int, View]) -> Html:
    """Return a computer's last picture, what it does, and its cores, those in use filled."""
    does, state = worker["does"], worker["state"]
    what: Node = None
    if does:
        job = views.get(does["job"])
        name = job["name"] if job else f"job {does['job']}"
        rows = f", rows {does['top']} to {does['bottom'] - 1}" if does["kind"] == "slice" else ""
        frame = "" if job and job["frames"]["total"] == 1 else f" frame {does['frame']}"
        more = f", {does['tasks']} in hand" if does["tasks"] > 1 else ""
        what = element("a", f"{name}{frame}{rows}{more}", href=f"/jobs/{does['job']}")
    elif state == "gone" and worker["seen"] is not None:
        what = f"heard of {_ago(worker['seen'])}"
    job = views.get(picture.job) if picture else None
    used, shown = min(does["threads"], worker["cores"]) if does else 0, min(worker["cores"], 16)
    cores = [element("i", class_="on" if core * worker["cores"] < used * shown else None)
             for core in range(shown)]
    return element(
        "li", _picture(job, picture) if job else element("div", class_="picture"), element(
            "div", element("h3", worker["name"]), _badge(state), " ", what,
            element("progress", value=f"{does['progress']:.2f}", max=1, aria_label="how far it is")
            if does else None),
        element("span", cores, class_="cores", role="img",
                aria_label=f"{used} of {_count_of(worker['cores'], 'core')} busy"),
        id=f"w{worker['id']}")


def _queue(views: Sequence[View], button: Callable[[View], Node]) -> Node:
    going = [view for view in views if not _ended(view)]
    return _section("Queue", element(
        "ol", [_job_row(view, button(view)) for view in going], class_="jobs")) if going else None


def _job_row(view: View, button: Node) -> Html:
    frames, state = view["frames"], view["state"]
    still = frames["total"] == 1
    figures = f"{100 * view['progress']:.0f} %" if still else \
        f"{frames['done']:,} of {frames['total']:,}"
    why = view["why"] if view["why"] != PAUSED_BY_HAND else "by hand"
    return element(
        "li", _picture(view, view["newest"]), element(
            "div", element("h3", element("a", view["name"], href=f"/jobs/{view['id']}"),
                           element("span", f" #{view['id']} · {view['owner']}", class_="dim")),
            _badge(_state(view)), element("span", f" {why}", class_="dim") if why else None),
        _bar(view), element("span", figures, class_="fig"), element(
            "span", view["eta"] and f"{_lasting(view['eta'])} left", class_="dim eta"), button,
        id=f"j{view['id']}", class_=state)


def _finished(views: Sequence[View]) -> Node:
    """Return what has ended, as a contact sheet."""
    ended = [view for view in views if _ended(view)]
    return _section("Finished", element("ul", [element(
        "li", _picture(view, view["newest"]), element(
            "h3", element("a", view["name"], href=f"/jobs/{view['id']}")), _badge(_state(view)),
        element("p", f"#{view['id']} · {view['owner']} · "
                f"{_count_of(view['frames']['done'], 'frame')} in {_lasting(view['elapsed'])}",
                class_="dim"), id=f"j{view['id']}")
        for view in ended], class_="sheet")) if ended else None


def _bar(view: View) -> Html:
    """Return a job's progress as a picture, in thousandths: done, in work, failed."""
    total = max(view["frames"]["total"], 1)
    done, failed = view["frames"]["done"] / total, view["frames"]["failed"] / total
    rects = [element("rect", class_=name, x=f"{1000 * x:.1f}", width=f"{1000 * part:.1f}", y=y,
                     height=height)  # told apart by their shapes too
             for name, x, part, y, height in (
                 ("done", 0.0, done, 0, 10), ("live", done, view["progress"] - done, 5, 5),
                 ("failed", view["progress"], failed, -3, 16))]
    return element("svg", rects, class_="bar", viewBox="0 0 1000 10", preserveAspectRatio="none",
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
        "left": f"≈ {_lasting(view['eta'])}"
                if view["eta"] and not _ended(view) else None,
        "spent": _lasting(view["elapsed"]) if view["started"] else None,
        "failed": f"{frames['failed']:,}" if frames["failed"] else None,
    })


def _warnings(view: View) -> Node:
    failure = view["failure"]
    address = failure and f"/jobs/{view['id']}/frames/{failure['frame']}#log"
    return [
        element("p", view["why"], class_="notice") if view["why"] else None,
        element("p", element("a", f"{_frame_name(view, failure['frame'])} failed", href=address),
                f": {failure['message']}", class_="notice failed") if failure else None,
    ]


def _picture(view: View, task: Task | None, kind: str = "") -> Html:
    """Return the image of a finished task, or a box that says why there is none."""
    content, address = element("span", "No image" if _ended(view) else "No image yet"), ""
    if task is not None and task.state == TaskState.DONE:
        suffix = PurePosixPath(task.name).suffix.lower()
        address = f"/api/v1/jobs/{view['id']}/frames/{task.frame}/image"
        content = element(
            "img", src=address, alt=f"frame {task.frame} of {view['name']}",
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


def _no_jobs() -> Html:
    return element(
        "section", element("img", src="/favicon.svg", alt="", width=120, height=120),
        element("p", "Give the farm a scene. In the directory where it is, type:"),
        _typed_there("povfarm.py submit scene.pov +W640 +H480"), class_="empty")


def _latest(tx: Look) -> list[Event]:
    """Return what happened last: a few thousand frames hide nothing of the farm's own."""
    newest = tx.events(tx.last_event() - EVENTS_READ, EVENTS_READ)
    known = {event.id for event in newest}
    older = [event for event in tx.events_of_farm(NEWS_SHOWN) if event.id not in known]
    return [*older, *newest]


def _story(events: Sequence[Event], views: Sequence[View], now: float) -> Node:
    """Return the newest events in words; frames with the same fate share a line."""
    known = {view["id"]: view for view in views}
    lines: dict[Any, list[Event]] = {}
    for event in reversed(events):
        if not event.what.endswith(TaskState.LEASED.value):
            same = (event.job, event.what, event.text)
            lines.setdefault(event.id if event.frame is None else same, []).append(event)
    items = [element("li", _event_line(line[0], len(line) - 1, known), " ", element(
        "time", _ago(now - line[0].time))) for line in itertools.islice(lines.values(), NEWS_SHOWN)]
    return _section("What happened", element("ul", items, class_="story")) if items else None


def _event_line(event: Event, more: int, views: Mapping[int, View]) -> Node:
    job, text = event.job, event.text
    kind, _, what = event.what.rpartition(" ")
    part = _KIND_WORDS.get(kind)
    what = what if part else event.what
    words = f" {_EVENT_WORDS.get(what, what)}"
    by = f", by {event.who}" if event.who else None
    if job is None or what == "deleted":
        return [element("strong", text), words, by]
    view = views.get(job)
    whole = event.frame is None or (view is not None and view["frames"]["total"] == 1)
    return [element("a", view["name"], href=f"/jobs/{job}") if view else f"job {job}",
            None if whole else f" frame {event.frame}", part, words, by,
            f", like {more:,} other{'s' * (more > 1)} before it" if more else None,
            f": {text}" if text else None]


def _job_links(view: View) -> Html:
    address, failure, newest = f"/jobs/{view['id']}", view["failure"], view["newest"]
    frame = failure["frame"] if failure else newest.frame if newest else None
    return element(
        "nav", element("a", "All images (zip)", href=f"/api/v1{address}/archive.zip")
        if view["frames"]["done"] else None,
        None if frame is None else element("a", f"{_frame_name(view, frame)}: log",
                                           href=f"{address}/frames/{frame}#log"), class_="links")


def _storyboard(view: View, board: Sequence[Task]) -> Node:
    """Return eight images from all over an animation, the same ones at every look."""
    if not board or not view["frames"]["done"] or view["extension"] not in BROWSER_TYPES:
        return None
    return _section("Storyboard", element("div", [
        element("a", _picture(view, task), f"Frame {task.frame}",
                href=f"/jobs/{view['id']}/frames/{task.frame}")
        for task in board], class_="cards board"))


def _cell(job: int, frame: View) -> Html:
    state, number = frame["state"], frame["frame"]
    text, tenth = str(number), ""
    if state == TaskState.LEASED and frame["progress"]:
        text, tenth = f"{100 * frame['progress']:.0f}%", f" p{int(10 * frame['progress'])}"
    return element("a", text, class_=state + tenth, title=f"frame {number}: {_STATE_WORDS[state]}",
                   href=f"/jobs/{job}/frames/{number}{'#log' if state == 'failed' else ''}")


def _block(job: int, frames: Sequence[tuple[int, str]]) -> Html:
    """Return one cell for several frames, in the state that a person should look at first."""
    counts = collections.Counter(state for _, state in frames)
    states = [state for state in map(TaskState, ("failed", "leased", "cancelled", "queued", "done"))
              if counts[state]]
    done = counts[TaskState.DONE]
    tenth = f" p{10 * done // len(frames)}" if states[0] in ("leased", "queued") else ""
    first, states_said = frames[0][0], ", ".join(
        f"{counts[state]} {_STATE_WORDS[state]}" for state in states)
    return element("a", first, class_=states[0] + tenth, href=f"/jobs/{job}?from={first}#part",
                   title=f"frames {first} to {frames[-1][0]}: {states_said}")


def _frames(view: View, states: Sequence[tuple[int, str]], chosen: Sequence[View],
            size: int) -> Html:
    """Return a cell for each frame, or for each ``size`` frames and then for each chosen one."""
    job, frames = view["id"], view["frames"]
    legend = [element("li", element("span", _STATE_WORDS[state][0], class_=state),
                      f"{frames[state]:,}{_STATE_WORDS[state][1:]}")
              for state in ("done", "leased", "queued", "failed", "cancelled") if frames[state]]
    blocks = None if size == 1 else [
        element("p", f"A cell is {size} frames: choose one to see them."),
        element("div", [_block(job, states[index:index + size])
                        for index in range(0, len(states), size)], class_="grid"),
        element("h3", f"Frames {chosen[0]['frame']} to {chosen[-1]['frame']}") if chosen else None]
    return _section(
        "Frames", element("ul", legend, class_="legend"), blocks,
        element("div", [_cell(job, frame) for frame in chosen], class_="grid", id="part"))


def _options(view: View, row: Job) -> Html:
    options = [f"{name}={value}" for name, value in sorted(row.pov.values.items())]
    options += [f"Declare={declare}" for declare in row.pov.declares]
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
  --line: #dcd8cd; --edge: #7d7767; --mat: #e3ded2; --link: #1c57a5; --done: #1b7765;
  --live: #8a5600; --bad: #b3261e; --hold: #54509c; --on: #fff; --glow: #f0b850; }
@media (prefers-color-scheme: dark) { :root { --bg: #101317; --card: #181c22; --ink: #e6e9ed;
  --dim: #9ca5b0; --line: #343c47; --edge: #76808c; --mat: #0a0c0e; --link: #93beff;
  --done: #46b39b; --live: #f0b850; --bad: #ff8d7e; --hold: #b3aef5; --on: #07110f;
  --glow: #5a4416; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 0 clamp(1rem, 3vw, 2.5rem); color: var(--ink);
  background: var(--bg); overflow-wrap: anywhere; font: 1rem/1.5 system-ui, "Segoe UI", Roboto,
  "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
header, footer, .row, .links, .legend { display: flex; flex-wrap: wrap; gap: .5rem 1rem;
  align-items: center; }
header { padding: .6rem 0; font-size: .875rem; } header .home { display: flex; gap: .6rem;
  align-items: center; color: inherit; font-size: 1rem; font-weight: 600; text-decoration: none; }
header nav { display: flex; flex: 1; gap: 1rem; } header nav a { padding: .25rem 0; }
[aria-current] { color: inherit; text-decoration-thickness: .15em; }
header .row { margin: 0; }
#live { display: flex; gap: .4rem; align-items: center; color: var(--dim); }
#live i { width: .6rem; height: .6rem; border: 2px solid var(--dim); border-radius: 50%; }
.js #live i { border-color: var(--done); background: var(--done); }
.js #live.away { color: var(--bad); font-weight: 600; }
.js #live.away i { border-color: var(--bad); background: none; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; top: .5rem; z-index: 1;
  padding: .5rem 1rem; background: var(--card); }
main:focus { outline: none; }
footer { margin-top: 2rem; padding: 1rem 0; border-top: 1px solid var(--line); color: var(--dim);
  font-size: .8125rem; justify-content: space-between; }
h1 { margin: .3rem 0 0; font-size: clamp(1.5rem, 3.4vw, 2rem); font-weight: 650; line-height: 1.2; }
h2 { margin: 0 0 .5rem; font-size: 1rem; } h3 { margin: 0; font-size: 1rem; font-weight: 600; }
section { margin: 0 0 1.5rem; } .grid + h3 { margin: 1rem 0 .5rem; }
p { margin: .25rem 0; } .lead { margin: 0 0 .75rem; }
ul, ol { margin: 0; padding: 0; list-style: none; }
a { color: var(--link); text-underline-offset: .2em; } h1 a, h2 a, h3 a { color: inherit; }
h2 a, h3 a { text-decoration: none; } h2 a:hover, h3 a:hover { text-decoration: underline; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: .25rem; }
.lead, .dim, dt, time, thead, section > p { color: var(--dim); } q { color: var(--dim); }
.dim, dt, time { font-size: .8125rem; font-weight: 400; }
.needs { padding: .5rem 1rem; border: 1px solid var(--line); border-left: .3rem solid var(--live);
  border-radius: .5rem; background: var(--card); } .needs.bad { border-left-color: var(--bad); }
.needs h2 { margin: 0; font-size: .875rem; } .needs .row { margin: 0; }
.count { padding: 0 .5rem; border-radius: 1rem; background: var(--live); color: var(--bg);
  font-size: .8125rem; } .bad .count { background: var(--bad); color: var(--on); }
.needs li { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: center;
  padding: .25rem 0; border-top: 1px solid var(--line); } .needs li:first-child { border: 0; }
.needs p { flex: 1 1 16rem; margin: 0; } .mark { color: var(--live); font-weight: 600; }
.mark.bad { color: var(--bad); }
.picture { display: grid; grid-template: minmax(0, 1fr) / minmax(0, 1fr); place-items: center;
  overflow: hidden; aspect-ratio: 16 / 9; border-radius: .4rem; background: var(--mat);
  color: var(--dim); font-size: .8125rem; text-align: center; }
.picture span { padding: .25rem; } .picture img { display: block; width: 100%; height: 100%;
  object-fit: cover; }
.large { min-height: 12rem; aspect-ratio: auto; border-radius: .8rem; font-size: 1rem; }
.large img { width: auto; height: auto; max-width: 100%; max-height: 80vh; object-fit: contain; }
.large svg { display: block; width: 100%; max-height: 80vh; stroke: var(--edge); }
.large .leased { fill: var(--glow); } .large .queued { fill: var(--line); }
.large .done { fill: var(--done); } .large .failed { fill: var(--bad); }
.large + dl { margin-top: 1rem; } .stage .large a, .stage .large img { width: 100%; }
.film { position: relative; } .film .picture { height: 21rem; min-height: 0; }
.film .picture a, .film .picture svg { display: block; height: 100%; max-height: none; }
.film .picture img { width: 100%; height: 100%; max-height: none; }
.cap { position: relative; display: inline-flex; gap: 0 .75rem; flex-wrap: wrap; margin-top: -2rem;
  align-items: baseline; padding: .25rem 1rem; border-radius: 0 .8rem 0 .8rem;
  background: var(--card); } .cap h2 { margin: 0; }
.room li { display: grid; grid-template-columns: 5.6rem 1fr auto; gap: .75rem; align-items: center;
  margin-bottom: .5rem; padding: .3rem .75rem .3rem .3rem; border: 1px solid var(--line);
  border-radius: .6rem; background: var(--card); } .room .picture { height: 3.8rem; width: 5.6rem; }
.room li a { font-size: .875rem; }
progress { display: block; width: 100%; height: .4rem; accent-color: var(--live); }
.cores { display: grid; grid-template-columns: repeat(2, .8rem); gap: 3px; }
.cores:has(:nth-child(7)) { grid-template-columns: repeat(4, .8rem); }
.cores i { height: .8rem; border: 1px solid var(--edge); border-radius: 2px; }
.cores .on { border-color: var(--live); background: var(--live); }
.jobs li { display: grid; grid-template-columns: 6rem minmax(10rem, 1.4fr) minmax(6rem, 2fr) 8rem
  7rem 6rem; gap: 1rem; align-items: center; min-height: 4.5rem; padding: .4rem 0;
  border-top: 1px solid var(--line); } .jobs .picture { height: 3.4rem; } .jobs .bar { margin: 0; }
.sheet { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.sheet .picture { aspect-ratio: 4 / 3; } .sheet p { margin: 0; }
.board { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.board a { color: var(--dim); font-size: .8125rem; text-decoration: none; }
.board .picture span { visibility: hidden; }
@media (min-width: 56rem) { .now, .stage { display: grid; gap: 0 1.5rem;
    grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); } .stage { align-items: start; }
  .now > :only-child { grid-column: 1 / 3; } .now > .room:only-child ul { display: grid;
    gap: 0 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); } }
.badge { display: inline-block; color: var(--dim); font-size: .875rem; font-weight: 600; }
.badge.done, .badge.idle { color: var(--done); } .badge.failed, .badge.sick { color: var(--bad); }
.badge.rendering, .badge.working, .badge.leased, .badge.pending { color: var(--live); }
.badge.paused { color: var(--hold); }
.bar { display: block; width: 100%; height: .9rem; margin: .5rem 0 .75rem; overflow: visible;
  background: var(--line); }
.bar .done { fill: var(--done); } .bar .live { fill: var(--live); } .bar .failed {
  fill: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.3rem; margin: 0; }
dd { margin: 0; font-weight: 600; }
.notice { margin: 1rem 0; padding: .5rem 1rem; border: 1px solid var(--line); border-left:
  .3rem solid var(--live); border-radius: .5rem; background: var(--card); }
.notice.failed { border-left-color: var(--bad); }
.row, .links { margin: .75rem 0; } form { display: flex; flex-wrap: wrap; gap: .5rem; }
button, .button { display: inline-block; min-height: 2rem; padding: .2rem .8rem; font: inherit;
  font-size: .875rem; line-height: 1.5; border: 1px solid var(--edge); border-radius: .5rem;
  background: var(--card); color: var(--ink); text-decoration: none; cursor: pointer; }
button:hover, .button:hover { border-color: var(--ink); }
.good { border-color: var(--done); background: var(--done); color: var(--on); }
.asks { color: var(--bad); } button.bad { border-color: var(--bad); background: var(--bad);
  color: var(--on); }
code, pre { font: .875rem/1.5 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
section > p code { margin-right: .7em; }
pre { overflow: auto; max-height: 40rem; margin: .5rem 0; padding: .75rem 1rem; border: 1px solid
  var(--line); border-radius: .5rem; background: var(--card); white-space: pre-wrap; }
.typed { display: flex; flex-wrap: wrap; gap: 0 .5rem; align-items: center; }
.copy { display: none; } .js .copy { display: inline-block; }
.empty { padding: 2rem 0; text-align: center; } .empty .typed { justify-content: center; }
.scroll { margin-bottom: 1rem; overflow-x: auto; } table { width: 100%; border-collapse: collapse; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); font-weight: 400;
  text-align: left; overflow-wrap: normal; } thead { font-size: .8125rem; }
td, thead th { white-space: nowrap; } tbody th { min-width: 8rem; font-weight: 600; }
.story li { padding: .25rem 0; }
.legend { margin-bottom: .75rem; } .legend span { display: inline-block; width: 1.8rem;
  margin-right: .4rem; }
.grid { display: grid; gap: 3px; grid-template-columns: repeat(auto-fill, minmax(3rem, 1fr)); }
.grid a, .legend span { border: 1px solid var(--edge); border-radius: .25rem; color: var(--dim);
  font-size: .8125rem; line-height: 1.6rem; text-align: center; text-decoration: none; }
.grid .done, .legend .done { border-color: var(--done); background: var(--done); color: var(--on); }
.grid .leased, .legend .leased { outline: 2px solid var(--live); outline-offset: -2px;
  color: var(--ink); }
.grid .queued, .legend .queued { border-style: dashed; }
.grid .failed, .legend .failed { border-color: var(--bad); background: var(--bad);
  color: var(--on); font-weight: 700; } .grid .failed::before { content: "✕ "; }
.grid .cancelled, .legend .cancelled { background: var(--line); color: var(--ink); }
.grid .cancelled { text-decoration: line-through; }
.grid [class*=" p"] { background: linear-gradient(var(--glow) 0 0) bottom / 100% 0 no-repeat;
  color: var(--ink); }
@media (max-width: 56rem) { header nav { order: 9; flex-basis: 100%; } .film .picture {
    height: auto; } .jobs li { grid-template-columns: 5rem 1fr auto; gap: .25rem .75rem; }
  .jobs .picture { grid-row: 1 / 3; } .jobs .bar { grid-column: 2 / 4; grid-row: 2; }
  .jobs .fig, .jobs .eta { grid-row: 3; } .jobs .fig { grid-column: 2; } .jobs form {
    grid-column: 3; grid-row: 1; }
  .sheet { grid-template-columns: 1fr 1fr; } }
@media (pointer: coarse) { button, .button { min-height: 2.75rem; padding: .5rem 1rem; }
  header nav a, .links a, .grid a { padding: .6rem 0; } }
@media (prefers-reduced-motion: no-preference) { progress, .bar rect { transition: .3s; } }
""" + "".join(f".grid .p{tenth} {{ background-size: 100% {tenth}0%; }}\n" for tenth in range(1, 11))
SCRIPT = """\
"use strict";
(() => {
const find = what => document.querySelector(what), main = find("#main"), live = find("#live");
const place = (/^\\/-[0-9a-f]{16}(?=\\/)/.exec(location.pathname) || [""])[0];
const key = node => node.id || (node.getAttribute && node.getAttribute("action")) || "";
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
let event = +main.dataset.event, loaded = Date.now(), away = false, timer = 0, since = loaded;

// Makes one element like another and keeps what is the same, so that focus, selection,
// scrolling, what is open and what is typed stay as they are.
function morph(old, now) {
  if (old.nodeType !== 1) {
    if (old.nodeValue !== now.nodeValue) old.nodeValue = now.nodeValue;
    return;
  }
  const own = name => name === "open" && old.nodeName === "DETAILS";
  for (const {name} of [...old.attributes])
    if (!now.hasAttribute(name) && !own(name)) old.removeAttribute(name);
  for (const {name, value} of now.attributes)
    if (old.getAttribute(name) !== value && !own(name)) {
      old.setAttribute(name, value);
      if (name === "src" && !calm) old.animate([{opacity: .4}, {opacity: 1}], 150);
    }
  const fresh = new Set([...now.childNodes].map(key)), known = new Map();
  for (const child of [...old.childNodes])
    if (!fresh.has(key(child)) || known.has(key(child))) child.remove();
    else if (key(child)) known.set(key(child), child);
  let at = old.firstChild;
  for (const child of [...now.childNodes]) {
    const name = key(child);
    let same = name ? known.get(name) : at;
    known.delete(name);
    while (!name && same && (key(same) || same.nodeName !== child.nodeName))
      same = same.nextSibling;
    if (!same || same.nodeName !== child.nodeName) {
      old.insertBefore(child, at);
      continue;
    }
    while (!name && at !== same && !key(at)) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
    if (same === at) at = at.nextSibling;
    else old.insertBefore(same, at);
    morph(same, child);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function ask(address) {
  const stop = new AbortController(), over = setTimeout(() => stop.abort(), 4000);
  const asked = fetch(address, {headers: {Accept: "text/html"}, signal: stop.signal});
  return asked.then(async answer => {
    if (answer.status >= 500) throw answer;
    return [answer, await answer.text()];
  }).finally(() => clearTimeout(over));
}

async function load() {
  const [answer, text] = await ask(location.href);
  if (answer.status === 401) return location.reload();
  const page = new DOMParser().parseFromString(text, "text/html");
  const icon = page.querySelector("#icon");
  morph(main, page.querySelector("#main"));
  document.title = page.title;
  if (find("#icon").href !== icon.href) find("#icon").href = icon.href;
  loaded = Date.now();
}

function tell(text) {
  live.classList.toggle("away", away);
  if (live.lastChild.textContent !== text) live.lastChild.textContent = text;
}

async function beat() {
  clearTimeout(timer);
  try {
    const farm = JSON.parse((await ask(place + "/api/v1/farm"))[1]), now = Date.now();
    if (farm.event !== event) since = now;
    if ((away || farm.event !== event || now - loaded > 1000 * main.dataset.reload)
        && now - loaded > 1900) {
      await load();
      event = farm.event;
    }
    away = false;
    tell("Live");
  } catch (error) {
    away = true;
    const then = new Date(loaded).toLocaleTimeString([], {timeStyle: "short"});
    tell("Reconnecting, data from " + then);
  }
  timer = setTimeout(beat, document.hidden ? 15000 : Date.now() - since > 60000 ? 2000 : 1000);
}

document.documentElement.classList.add("js");
document.addEventListener("click", click => {
  const copy = click.target.closest(".copy");
  if (!copy) return;
  getSelection().selectAllChildren(copy.previousElementSibling);
  copy.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
});
document.addEventListener("visibilitychange", () => document.hidden || beat());
if (main.dataset.reload) beat();
else tell("Not reloading");
})();
"""
_LOOKS: Mapping[str, tuple[str, str]] = {
    "style.css": ("text/css", STYLE), "script.js": ("text/javascript", SCRIPT),
    "favicon.svg": ("image/svg+xml", MARK)}
_MARK_OF: Mapping[str, str] = {
    state: f'<circle cx="25" cy="7" r="6.5" fill="{color}" stroke="#fff"/></svg>'
    for state, color in (("bad", "#d93025"), ("busy", "#e8a317"))}


@functools.lru_cache(maxsize=8)
def _address(name: str) -> str:
    """Return where a page finds what it looks like: another address for another content."""
    return f"/{name}?{hashlib.sha256(_LOOKS[name][1].encode()).hexdigest()[:12]}"


# === 17. COORDINATOR =========================================================
# Puts sections 10 to 16 together: one data directory, one port, one beacon, and
# a thread that keeps house. Decides nothing about jobs.

HOUSEKEEPING = 1.0  # seconds between two looks for leases that have run out
TIDYING = 3600.0  # seconds between two clean-ups of what nobody needs


class Coordinator:
    """A farm that serves: made, then ``start``ed, then ``stop``ped.

    ``port`` 0 picks a free port; ``url`` tells which; with None only this process
    is served. ``discovery_port`` None answers no probes. ``hosts`` are names that
    this computer has beside its own. ``tls`` are the PEM files of a certificate and
    its key; ``pin`` is then the certificate's SHA-256. ``httpov`` lets HTTPov's
    clients in, ``sheepit`` SheepIt's, ``renderonline`` RenderOnline's. ``typed`` tells how
    commands are typed on this computer, see ``with_commands``. Raises ``UserError`` for a port in
    use or a bad certificate
    and ``StoreError`` for a data directory that cannot be used or that another
    povfarm holds.
    """

    def __init__(self, data: Path, *, bind: str = "", port: int | None = 0, name: str = "",
                 discovery_port: int | None = None, admit_private: bool = False,
                 private: bool = False, hosts: Collection[str] = (),
                 tls: tuple[Path, Path] | None = None, durable: bool = True,
                 lease_time: float = 30.0, httpov: bool = False, sheepit: bool = False,
                 renderonline: OnlineRules | None = None,
                 allowance: Allowance = Allowance(),
                 typed: Callable[[str], str] = "povfarm.py {}".format,
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
        self.scheduler = Scheduler(self.store, self.clock, lease_time, allowance)
        self.access = Access(self.store, self.key, private, self.clock, self.scheduler.people,
                             self.pin)
        self.api = Api(self.scheduler, self.access, self.name)
        entrance = Entrance(self.scheduler, self.access, admit_private)
        pages = Pages(self.api, self.scheduler, self.access, self.pin, typed)
        dialects: list[object] = [Httpov(self.scheduler, self.access)] if httpov else []
        dialects += [Sheepit(self.scheduler, self.access, self.key)] if sheepit else []
        identify = self.access.identify
        if renderonline:
            online = RenderOnline(self.scheduler, self.access, self.key, renderonline)
            dialects, identify = [*dialects, online], online.identify
        self.router = Router(self.api, entrance, pages, *dialects, authenticate=identify,
                             hosts=_own_names(hosts), error_page=pages.error_page,
                             gate=self.store.gate)
        self.api.routes = self.router.routes
        self.server: Server | Inside = Inside(self.router) if port is None else Server(
            self.router, bind or "0.0.0.0", port, context)
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


# === 18. ENGINES =============================================================
# What a renderer is: how it is found, the command line and the files that make it
# render the tasks of a lease, and how to read what it prints and what it leaves of a
# frame that it has not finished. Starts nothing.


@dataclass(frozen=True)
class Run:
    """One start of a renderer: ``frames`` are the numbers that it will render, in order.

    ``tree`` is the project's directory, ``own`` the run's own empty directory,
    the only one where it writes. Its directories are those of the tree, and
    ``place`` is the one in which it is started: relative names, ``../`` too, are
    looked for there first and then, by library paths, in the project, so that
    runs at the same time cannot meet. (POV-Ray 3.7 looks for every file that it
    reads in its current directory first and then in the library paths, in order.)
    """

    lease: LeaseSpec
    tree: Path
    own: Path
    frames: tuple[int, ...]

    @functools.cached_property
    def place(self) -> Path:
        """The directory, of its own, in which it is started."""
        return self.own / self.lease.pov.run_dir

    @property
    def output_file(self) -> str:
        """What POV-Ray is told to call its images; ASCII, whatever they are called later.

        It ends in the type's own extension, which POV-Ray takes off again
        once, so that dots in the name stay.
        """
        return (self._stem or "image") + self.lease.pov.plan.extension

    @property
    def _stem(self) -> str:
        """How the names of the images begin; nothing where POV-Ray would not write such ones.

        A name that is nothing but an extension stands for the scene's.
        """
        stem = self.lease.pov.plan.stem.rpartition("/")[2]
        return stem if _is_plain(stem) else ""

    def made(self, frame: int) -> Path:
        """Return the image that the run makes of a frame: where the scene expects it."""
        plan = self.lease.pov.plan
        if self.lease.pov.engine:  # which has its own way to write numbers
            number = f"0*{frame}" if plan.animation else "[0-9]*"
            found = (path for path in self.place.glob(f"{_IMAGE}*{plan.extension}")
                     if re.fullmatch(_IMAGE + number, path.stem))
            return next(found, self.place / f"{_IMAGE}{plan.extension}")
        name = PurePosixPath(plan.output_name(frame))
        inside = not name.is_absolute() and ".." not in name.parts and _is_plain(str(name.parent))
        number = name.name[len(plan.stem.rpartition("/")[2]):]
        return self.place / (name.parent if inside else "") / f"{self._stem or 'image'}{number}"

    @property
    def state(self) -> Path:
        """Where POV-Ray keeps what is finished of the first frame, and looks for it to go on."""
        return self.made(self.frames[0]).with_suffix(".pov-state")

    @property
    def text_files(self) -> dict[str, Path]:
        """The files of POV-Ray's streams by their keys: a part of each, called by the first frame.

        POV-Ray puts them beside the image.
        """
        folder, values = self.made(self.frames[0]).parent, self.lease.pov.values
        return {key: folder / f"{values[key]}.{self.frames[0]:07d}.part"
                for key in TEXT_FILES if key in values}

    def scene_files(self) -> dict[str, tuple[int, int]]:
        """Return the files of its own that may be the scene's: time in ns and size, by name.

        Names begin at ``place``, so that those of files above it begin with ``../``.
        """
        if self.lease.pov.engine:
            return {}
        images = {str(self.made(frame)) for frame in self.frames}
        found, place = {}, str(self.place)
        for folder, _, names in os.walk(self.own):
            for name in names:
                path = os.path.join(folder, name)  # noqa: PTH118 - this is done for every frame
                if path in images or _OWN_FILES.fullmatch(name):
                    continue
                with contextlib.suppress(OSError):  # POV-Ray may have deleted it just now
                    about = os.lstat(path)
                    if stat.S_ISREG(about.st_mode):
                        known = os.path.relpath(path, place).replace(os.sep, "/")
                        found[known] = about.st_mtime_ns, about.st_size
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

    ``reads`` is what it has to read besides its own directory, the project, and
    the system's programs and libraries.
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

    @property
    def guess(self) -> str:
        """The version as far as the files beside the program tell it; nothing when in doubt."""
        prefix = install_prefix(self.program)
        found = {match[1] for path in (prefix.glob("share/povray-*") if prefix else ())
                 if (match := re.fullmatch(r"povray-(\d+\.\d+)", path.name))}
        return self.version or (found.pop() if len(found) == 1 else "")

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
        values, links = self.values(run), dict[Path, Path]()
        scene = values["Input_File_Name"]
        if not _is_plain(scene):
            found = [path / scene for path in self.library_of(run) if (path / scene).is_file()]
            if not found:
                raise RenderFailed(f"the scene {scene} is not in the project")
            links[run.place / _SCENE] = found[0]
            values["Input_File_Name"] = _SCENE
        library = []
        for number, path in enumerate(self.library_of(run)):
            inside = {run.tree, run.own} & {path, *path.parents}
            library.append(f"{LINK}{number}" if inside else str(path))
            if inside:
                links[run.place / library[-1]] = path
        text = to_ini(values, run.lease.pov.declares, library)
        files = {run.place / ".povray" / version / "povray.conf": _CONF
                 for version in ("3.7", "3.8")}
        files[run.place / _INI] = text
        return Command((self.program,), environment, files, links, self.parts())

    def parts(self) -> tuple[str, ...]:
        """Return the files of POV-Ray, which need not lie where the system's are.

        Beside ``bin`` that is where ``make install`` puts the rest; never the
        whole directory, which may be somebody's home.
        """
        return (*_parts(self.program), *self.library)

    def that_says(self, text: str) -> Engine:
        """Return the same with its version, from what ``--version`` prints.

        Raises ``UserError`` when the program turns out not to be POV-Ray.
        """
        match = re.search(r"POV-Ray (\d+\.\d+\S*)", text)
        if match is None:
            raise UserError(f"{self.program} is not POV-Ray 3.7 or newer: asked for its version, "
                            f"it says {text.partition(chr(10))[0]!r}")
        return replace(self, version=match[1], library=standard_library(match[1], self.program))

    def versions(self) -> dict[str, str]:
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
        if values.get("All_Console") == "Off":  # but we read the other streams
            del values["All_Console"]
            values.update({"Debug_Console": "Off", "Warning_Console": "Off"})
        output = run.made(run.frames[0]).relative_to(run.place).parent / run.output_file
        if "Create_Continue_Trace_Log" in values:  # what a run leaves unfinished is gone on with
            values["Create_Continue_Trace_Log"] = "On"
        if (run.lease.pov.options.stochastic and release(self.version) >= (3, 8)
                and values.get("Stochastic_Seed", "0") == "0"):  # which is the clock's
            # The same when the job is begun again, or gone on with.
            name = run.lease.pov.plan.stem.rpartition("/")[2]
            values["Stochastic_Seed"] = str(zlib.crc32(name.encode()) % (2**31 - 1) + 1)
        values.update({
            "Work_Threads": str(run.lease.threads), "Output_To_File": "On", "Display": "Off",
            "Pause_When_Done": "Off", "Verbose": "On", "Preview_Start_Size": "1",
            "Statistic_Console": "On",
            "Continue_Trace": "On" if run.state.is_file() else "Off",
            "Output_File_Name": output.as_posix(),
            **{key: path.name for key, path in run.text_files.items()},
        })
        task, pov = run.lease.tasks[0], run.lease.pov
        if task.kind is not TaskKind.FRAME:
            values.update(slice_values(pov.options, task.top, task.bottom))
        if task.kind is TaskKind.PASS:
            shared = "radiosity" in sharable(pov.uses, pov.values)
            values.update(RADIOSITY_PASS if shared else {"Antialias": "Off"})
        elif (run.place / SAMPLE_FILE).is_file():
            values.update(RADIOSITY_USE)
        if pov.plan.animation:
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
        """Return the directories that a run reads from, after its own: the project's first.

        In front of each of these is what the run itself has written there.
        """
        paths = [run.tree / run.lease.pov.run_dir]
        for entry in run.lease.pov.library:
            mine = [Path(path) for path in self.library]
            written = [run.own / entry] if (run.own / entry).is_dir() else []
            paths += mine if entry == STANDARD else [*written, run.tree / entry]
        return paths


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


@dataclass(frozen=True)
class Program:
    """A renderer beside POV-Ray that the owner of this computer has named, by its line."""

    line: OnlineEngine
    rules: OnlineRules
    path: str

    def command(self, run: Run) -> Command:
        """Return how to render a run: what the job says are values in the owner's words."""
        pov, plan, values = run.lease.pov, run.lease.pov.plan, run.lease.pov.arguments
        for name, value in values.items():
            self.rules.check(name, value)
        still = [int(pov.values.get("Initial_Frame", "0"))]
        frames = run.frames if plan.animation else still
        words = self.line.arguments({
            FORMAT: NAMES_OF[pov.options.output_type], **values,
            FIRST: str(frames[0]), LAST: str(frames[-1]), "@threads": str(run.lease.threads),
            UPLOADED: str(safe_join(run.tree, pov.values["Input_File_Name"])),
            OUTPUT: str(run.place / _IMAGE)})
        return Command((self.path, *words), program_environment(run.place), {}, {},
                       program_parts(self.path))

    def shared(self, run: Run) -> dict[str, bytes]:
        """Return no files: frames are whole."""
        return {}


def owned_programs(rules: OnlineRules) -> dict[str, Program]:
    """Return the programs for pictures that the lines name and that are here, by name."""
    found: dict[str, Program] = {}
    for line in rules.engines:
        path = shutil.which(line.program) if line.name != POVRAY and OUTPUT in line.places else None
        if path:
            found.setdefault(line.name, Program(line, rules, os.path.abspath(path)))  # noqa: PTH100
    return found


def program_environment(home: Path) -> dict[str, str]:
    """Return the environment of a program that is to write nowhere but in one directory."""
    return {"HOME": str(home), "TMPDIR": str(home), "PATH": os.defpath, "LANG": "C.UTF-8"}


def program_parts(program: str) -> tuple[str, ...]:
    """Return where a program's own files lie; not a whole home, nor all of the system."""
    path = Path(program).resolve()
    home = Path.home().resolve()
    shared = path.parent in (home, *home.parents) or path.parent.name == "bin"
    return _parts(program) if shared else (str(path.parent),)


@functools.lru_cache(maxsize=16)
def _parts(program: str) -> tuple[str, ...]:
    path = Path(program).resolve()
    found = [parent.parent for parent in path.parents if parent.name == "Cellar"]  # Homebrew
    if home := install_prefix(program):
        found += [home / "lib", home / "lib64", home / "etc/povray", *home.glob("share/povray*")]
    return (str(path), *map(str, found))


LINK = "_povfarm"  # begins the names of the links to a project's directories
_INI = "povfarm.ini"
_LOG = "povray.txt"  # what POV-Ray for Windows prints
_OWN_FILES = re.compile(rf"pov\d+|.*\.pov-state|{_LOG}")  # POV-Ray's: pixels of a big image, states
_IMAGE = "image"  # begins the names of what another program than POV-Ray makes
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
    path = shutil.which(program or "povray")
    root = "" if program else os.environ.get("PROGRAMFILES", "")
    if root and path is None:
        found = sorted(Path(root).glob("POV-Ray/*/bin/pvengine*.exe"))
        path = str(found[-1]) if found else None
    if path is None:
        if program:
            raise UserError(f"there is no program '{program}': give the path of POV-Ray")
        hint = _INSTALL.get(sys.platform, "get it from povray.org")
        raise UserError(f"POV-Ray is not installed here: {hint}")
    if Path(path).name.lower().startswith("pvengine"):
        home = Path(path).parent.parent  # such as POV-Ray/v3.7
        named = re.search(r"\d+\.\d+", home.name)
        return WindowsEngine(path, named[0] if named else OLDEST, (str(home / "include"),))
    path = os.path.abspath(path)  # noqa: PTH100 - a link stays one; runs are elsewhere
    engine = Engine(path, "", ())
    return replace(engine, library=standard_library(engine.guess, path))


_INSTALL: Mapping[str, str] = {
    "linux": "sudo apt-get install povray (or your system's package of that name)",
    "darwin": "brew install povray",
}


def standard_library(version: str = OLDEST, program: str = "") -> tuple[str, ...]:
    """Return the include directories of a POV-Ray of this machine, best from its INI file."""
    for ini in system_ini(version or OLDEST, program):
        with contextlib.suppress(OSError):
            text = ini.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r'(?im)^[ \t]*Library_Path[ \t]*=[ \t]*"?([^";\n]+)', text)
            if found:
                return tuple(path.strip() for path in found)
    prefix = install_prefix(program)
    places = [prefix] if prefix else []
    places += [Path("/usr"), Path("/usr/local"), Path("/opt/homebrew")]
    name = "povray-{}.{}*".format(*release(version), 0) if version else "povray-3.*"
    found = [str(path) for place in places
             for path in sorted(place.glob(f"share/{name}/include"))[-1:]]
    return tuple(dict.fromkeys(found))


# --- what the slices of a frame share

# On top of a slice's own values. What the pass of each slice saves is simply put together: the
# files are text, a sample a line. Anti-aliasing takes hardly any further samples.
RADIOSITY_PASS: Mapping[str, str] = {
    "Radiosity_To_File": "On", "Radiosity_File_Name": SAMPLE_FILE, "Antialias": "Off",
}
RADIOSITY_USE: Mapping[str, str] = {
    "Radiosity_From_File": "On", "Radiosity_File_Name": SAMPLE_FILE,
}


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
            if path.suffix.lower() in (".pov", ".inc", ".mac", ".mcr") and path.is_file():
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
    out, a message end off at the end included. Without pixels the copy is of
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
_OUR_LINK = re.compile(rf"\b({LINK}\d+)\b(/?)")
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
    frame began, and ``before`` what was printed in the frame before it, both
    without status lines, and with the names in ``links`` in place of our links'.
    ``done`` is the percent that a run which goes on began with: POV-Ray counts
    only what it adds.
    """

    def __init__(self, done: int = 0) -> None:
        self.index = 0
        self.done = self.percent = done
        self.traced = False
        self.before = ""
        self.lines: list[str] = []
        self.links: Mapping[str, str] = {}
        self.mine: Collection[str] = ()  # links to what the run has of a library directory
        self._status = False  # was printed last: an empty line ends it

    def feed(self, line: str) -> bool:
        """Take a line; True when it says that the next frame of the run has begun."""
        match = _FRAME.match(line)
        begun = match is not None and int(match[1]) - 1 > self.index
        if match is not None:
            self.index = int(match[1]) - 1
            self.traced = False
            if begun:
                self.done = self.percent = 0
                self.before = self.text
                self.lines = []
        if line.endswith("\r"):
            self._status = True
            progress = _PERCENT.search(line[-2 * _WIDTH:])
            if progress is not None:
                self.percent = min(self.done + int(progress[1]), 100)
        elif line or not self._status:
            self.lines.append(line)
            if len(self.lines) > 3 * KEPT_LINES:  # a scene can print without end
                self.lines[KEPT_LINES:-KEPT_LINES] = ["(povfarm left out what came here)"]
            self.traced = self.traced or "Trace Time:" in line
        else:
            self._status = False
        return begun

    @property
    def text(self) -> str:
        """What was printed since the frame began."""
        return self.with_names("\n".join(self.lines) + "\n")

    def with_names(self, text: str) -> str:
        """Return a text with what our links stand for in place of them."""
        return "".join(map(self._with_names, messages_of(text)))

    def _with_names(self, message: str) -> str:
        if LINK not in message:
            return message
        if message.strip() in self.mine:  # it is in the library path, in front of that directory
            return ""
        named = _OUR_LINK.sub(self._name, message.replace("\n", ""))
        return _wrapped(named) if named.strip() else ""  # our own directory, in the library path

    def _name(self, link: re.Match[str]) -> str:
        name = self.links.get(link[1], ".")
        return name + link[2] if name != "." else ""

    @property
    def scene_is_wrong(self) -> bool:
        """True when another worker would fail in the same way."""
        return any(_SCENE_ERROR.search(line) for line in self.lines)

    def error(self) -> str:
        """Return POV-Ray's own words for what went wrong, in one line; or nothing."""
        whole = [message.replace("\n", "").strip() for message in messages_of(self.text)]
        errors = [line for line in whole if _ERROR.search(line) and not _HARMLESS.search(line)]
        best = [line for line in errors if line.startswith("File ")] or errors
        if best and "Cannot open file" in best[0]:
            # Which one stands only in what goes before it.
            best = [line for line in whole if "Cannot find file" in line] + best
        return best[0] if best else ""


class ProgramText(PovText):
    """Follows the text of another program for these ``frames``, as Blender writes it.

    ``Fra:7`` and what follows say that it is at frame 7, ``3/16`` how far.
    """

    def __init__(self, frames: Sequence[int]) -> None:
        super().__init__()
        self._frames = frames

    def feed(self, line: str) -> bool:
        """Take a line; True when it says that the next frame of the run has begun."""
        match = re.match(r"Fra: ?(\d{1,9})\b", line)
        if match is None:
            self.lines.append(line)
            self.traced = self.traced or line.startswith("Saved: ")
            if len(self.lines) > 3 * KEPT_LINES:
                self.lines[KEPT_LINES:-KEPT_LINES] = ["(povfarm left out what came here)"]
            return False
        frame = int(match[1])
        index = self._frames.index(frame) if frame in self._frames else self.index
        begun = index > self.index
        if begun:
            self.index, self.percent, self.traced = index, 0, False
            self.before, self.lines = self.text, []
        if parts := re.findall(r"\b(\d{1,9})/(\d{1,9})\b", line):
            done, of = map(int, parts[-1])
            self.percent = min(100 * done // max(of, 1), 100)
        return begun

    def error(self) -> str:
        """Return the program's own words for what went wrong, in one line; or nothing."""
        return next((line.strip() for line in self.lines
                     if re.match(r"(?i)\W*(?:\w*error|fatal|povfarm)\b", line)), "")


_REMARKS = re.compile(
    # From where the options end to the statistics, or an error: in parsing, and in rendering.
    r"^(?:Information Output Options\n(?:  \w+ Streams? to [^\n]*\n)*"
    r"|Render Options\n(?: [^\n]*\n)*)(.*?)(?=^-{70,}\n(?:Parser|Render) Statistics\b"
    r"|^(?:File '[^\n]*' line \d+: )?Parse Error|^Fatal error in|^Render failed|\Z)",
    re.MULTILINE | re.DOTALL)
_PHASE = re.compile(r"==== \[.*\] =+$")
_WIDTH = 80  # where POV-Ray breaks lines, best at a blank, with which the next line begins


def messages_of(text: str) -> list[str]:
    """Take a text apart where it was not POV-Ray that broke the lines."""
    found: list[str] = re.findall(
        rf".*\n(?:(?: (?! )|(?<=[^\n]{{{_WIDTH}}}\n)(?!File |  )).*\n)*",
        text[: text.rfind("\n") + 1])
    return found


def _wrapped(line: str) -> str:
    """Break a line as POV-Ray does (TextStreamBuffer::lineflush)."""
    lines = []
    while len(line) > _WIDTH:
        least = _WIDTH - _WIDTH // 4
        end = next((at for at in range(_WIDTH, least, -1) if line[at].isspace()), _WIDTH)
        lines.append(line[:end])
        line = line[end:]
    return "\n".join([*lines, line, ""])


def remarks_in(text: str) -> list[str]:
    """Return what #debug, #warning and POV-Ray's own warnings say in the text of a frame.

    They are messages as they were printed. Credits, options, statistics, and
    the error that ends a render are left out.
    """
    return [message for message in messages_of("".join(_REMARKS.findall(text)))
            if not _PHASE.match(message)]


_APPENDED = "\n{0}\n={1}Appending to stream output file{2}=\n{0}\n\n".format(
    "=" * 78, " " * 23, " " * 22)


def joined_texts(key: str, parts: Sequence[str], append: bool) -> str:
    """Put the parts of a text file together as one POV-Ray writes it for all the frames.

    That is with a mark before each frame but the first; with ``append`` before
    the first, too; and never in what #debug prints (RenderFrontend::CreateScene).
    """
    mark = "" if key == "Debug_File" else _APPENDED
    return mark * append + mark.join(part.removeprefix(_APPENDED) for part in parts)


# === 19. CLIENT ==============================================================
# How everything outside the coordinator talks to it: one request, tried again
# while the coordinator cannot be reached, over connections that stay open.
# Knows HTTP and JSON, nothing of the routes. It is http.client below and not
# urllib.request, which makes a new connection for every request. Environment
# variables for proxies are ignored: a coordinator is in the same room.

REPLY_LIMIT = 64 << 20  # bytes of an answer that is kept in memory
DOWNLOAD_LIMIT = 16 << 30
_TRY_LATER = (429, 502, 503, 504)
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 30.0  # seconds between tries
_TELL_FIRST, _TELL_AGAIN = 3.0, 60.0  # seconds without an answer after which a person is told
_CONNECT_SECONDS = 10.0
_SILENCE = 30.0  # seconds after which a connection counts as dead
_STOP_LOOK = 0.5  # seconds after which a wait for an answer looks whether it should stop


class ServerGone(FarmError):
    """The coordinator did not answer for as long as it was tried, or until stopped."""


class WrongFarm(FarmError):
    """Who answers does not know the secret that our coordinator would know."""


class RequestRefused(FarmError):
    """The coordinator answered, and said no: ``status`` and ``detail`` are its."""

    def __init__(self, status: int, message: str, detail: Any = None, later: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.later = later  # seconds after which it wants to be asked again


@dataclass(frozen=True)
class Call:
    """A request as it is sent: ``target`` is encoded, each ``Path`` is sent from the file."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: tuple[Path | bytes, ...]
    timeout: float
    stop: threading.Event
    sign: Callable[[str, str, str], str] | None = None

    def fields(self) -> dict[str, str]:
        """Return the headers, signed anew: a signature is good for one time."""
        signed = {} if self.sign is None else {"Authorization": self.sign(
            self.method, self.target, self.headers.get("X-SHA256", ""))}
        return {**self.headers, **signed}

    def open_body(self, held: contextlib.ExitStack) -> tuple[list[BinaryIO], int]:
        """Return the parts of the body, open until ``held`` closes them, and the size of all."""
        parts: list[BinaryIO] = []
        try:
            for part in self.body:
                parts.append(io.BytesIO(part) if isinstance(part, bytes) else part.open("rb"))
                held.enter_context(parts[-1])
        except OSError as error:
            raise FarmError(
                f"{error.filename} cannot be read: {error.strerror or error}") from error
        return parts, sum(file.seek(0, os.SEEK_END) - file.seek(0) for file in parts)


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
    comes, ``UserError`` when the certificate is wrong. ``signs`` tells that what is
    sent could be changed on its way.
    """

    signs = True
    pin = ""  # of the certificate that was seen

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

    def prove(self, key: str, call: Call) -> Callable[[str, str, str], str]:
        """Return what signs requests once the coordinator has proved that it knows the key.

        It is sent nothing before that but a number. ``WrongFarm`` when it does not know it.
        """
        (who, secret), nonce = split_key(key), secrets.token_hex(16)
        hello = _to_json({"who": who, "nonce": nonce})
        headers = {"Content-Type": "application/json"}
        with contextlib.closing(self.exchange(
                Call("POST", HELLO, headers, (hello,), call.timeout, call.stop))) as answer:
            _raise_refusal(answer)
            told = _told(_in_memory(answer, BUFFER), "session", "farm_id", "proof")
        session = Session(told["session"], nonce, secret_hash(secret), told["farm_id"], self.pin)
        if not hmac.compare_digest(session.proof, told["proof"]):
            raise WrongFarm(f"the coordinator at {self._base_url} does not "
                            f"{_LACKS.get(who[:1], _FORGOTTEN)}. Nothing was sent to it")
        return session.sign

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
        with contextlib.ExitStack() as held, contextlib.suppress(ConnectionError):
            parts, left = call.open_body(held)
            data = self._head(call, left)
            for part in parts:
                if isinstance(part, io.BytesIO):
                    data += part.getvalue()
                    left -= len(part.getvalue())
                    continue
                send_all(sock, data)
                data = b""
                left -= sock.sendfile(part, 0, left) if left else 0
            send_all(sock, data)
            if left:
                raise OSError("what was to be sent became shorter meanwhile")
            return True
        return False

    def _head(self, call: Call, size: int) -> bytes:
        fields = {"Host": self._authority, "User-Agent": f"povfarm/{VERSION}", **call.fields()}
        if size or call.method not in ("GET", "HEAD", "DELETE"):
            fields["Content-Length"] = str(size)
        target = self._prefix + call.target
        text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        if not re.fullmatch("[!-~]+", target) or not re.fullmatch("(?:[ -~]+\r\n)*", text):
            raise UserError("the address or the key has a character in it that cannot be sent")
        return f"{call.method} {target} HTTP/1.1\r\n{text}\r\n".encode()

    def _connect(self, timeout: float) -> socket.socket:
        # Of the two that localhost means, another user could have the other one.
        address = ("127.0.0.1" if self._host == "localhost" else self._host, self._port)
        sock = socket.create_connection(address, min(timeout, _CONNECT_SECONDS))
        try:
            watch_peer(sock)
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
        if self.pin not in ("", seen):  # what is signed from now on must fit this one
            secured.close()
            self.pin = seen
            raise RequestRefused(401, "the coordinator has a new certificate", SESSION_OVER)
        self.pin = seen
        return secured


class Within(Transport):
    """Hands calls to a coordinator in this process: there is nobody else to prove it to."""

    signs = False

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._threads = concurrent.futures.ThreadPoolExecutor(64, "call")

    def exchange(self, call: Call) -> Answer:
        """Return the answer to ``call``."""
        try:
            answered = self._threads.submit(self._ask, call)
        except RuntimeError:  # the client was closed, or the program ends
            raise ServerGone("the coordinator has stopped") from None
        while not concurrent.futures.wait([answered], _STOP_LOOK).done:
            if call.stop.is_set():  # it may be one that is held open
                raise ServerGone("stopped before the coordinator had answered")
        response = answered.result()
        if response is None:
            raise ServerGone("the coordinator has stopped")
        if isinstance(response.body, FileSlice):
            response.body.file.seek(response.body.start)
            read = response.body.file.read  # to the end: no client asks for a part
        else:
            read = io.BytesIO(response.body if isinstance(response.body, bytes)
                              else b"".join(response.body)).read
        return Answer(response.status, {name.lower(): value for name, value
                                        in response.headers.items()}, read, response.close)

    def prove(self, key: str, call: Call) -> Callable[[str, str, str], str]:
        """Return what shows the key."""
        return functools.partial("Bearer {0}".format, key)

    def _ask(self, call: Call) -> Response | None:
        with contextlib.ExitStack() as held:
            parts, size = call.open_body(held)
            blocks = (iter(functools.partial(part.read, BUFFER), b"") for part in parts)
            body = BodyReader(itertools.chain(*blocks, [b""]), size)
            return self._inside.answer(call.method, call.target, call.fields(), body,
                                       lambda: not call.stop.is_set())

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False)


class Client:
    """Talks to one coordinator; may be used by several threads at once.

    What was sent may arrive twice, when an answer was lost: the coordinator's
    routes are made for that. ``token`` is a key, see ``split_key``, and may be changed
    at any time; it is never sent. Who does not know it is told nothing, ``WrongFarm``.
    Addresses that are none are a ``UserError``.
    """

    def __init__(self, base_url: str, token: str = "", *, retry_for: float = 60.0,
                 fingerprint: str = "", clock: Clock | None = None,
                 transport: Transport | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.token, self.fingerprint = token, fingerprint
        self._retry_for = retry_for
        self._clock = clock or Clock()
        self.transport = transport or Transport(base_url, fingerprint)
        self._hurried = 0.0
        self._stop = threading.Event()
        self._longest = _LONGEST_DELAY
        self._tell: Callable[[str], None] = log.info
        self._proving = threading.Lock()
        self._proven: tuple[str, Callable[[str, str, str], str]] | None = None
        self._was_there = False

    def keep_trying(self, tell: Callable[[str], None], stop: threading.Event,
                    longest: float = 5.0) -> None:
        """From now on, try for as long as it takes or until ``stop``, every ``longest`` seconds.

        For somebody who waits: it is told now and then that there is no answer.
        """
        self._retry_for, self._longest, self._tell, self._stop = math.inf, longest, tell, stop

    def request(self, method: str, path: str, *,
                body: Path | bytes | tuple[Path | bytes, ...] = b"", json: Any = None,
                headers: Mapping[str, str] | None = None, timeout: float = _SILENCE,
                retry_for: float | None = None, stop: threading.Event | None = None) -> Reply:
        """Return the answer to one request, which is repeated until there is one.

        ``path`` starts with a slash and is encoded already; a ``body``, or a part of
        one, that is a ``Path`` is streamed from that file. ``timeout`` is the
        silence after which a connection counts as dead, ``retry_for`` how long
        to try, both in seconds; ``stop`` ends both soon. Raises
        ``RequestRefused`` for every status from 300, ``ServerGone`` without one.
        """
        fields = dict(headers or {})
        if json is not None:
            body = _to_json(json)
            fields["Content-Type"] = "application/json"
        parts = body if isinstance(body, tuple) else (body,)
        if self.token and self.transport.signs and any(parts) and not (
                isinstance(body, Path)):  # of a project's file it is in ``path``
            fields["X-SHA256"] = sha256_file(*parts)
        call = Call(method, path, fields, parts, timeout, stop or self._stop)
        return self._persist(call, retry_for, _in_memory)

    def download(self, path: str, to: Path, sha256: str | None = None, *,
                 limit: int = DOWNLOAD_LIMIT, retry_for: float | None = None,
                 stop: threading.Event | None = None) -> None:
        """Get a file; ``to`` appears only when it is whole and has that hash.

        Raises as ``request`` does, and ``FarmError`` when the hash differs, it
        has more than ``limit`` bytes, or ``to`` cannot be written.
        """
        call = Call("GET", path, {}, (), _SILENCE, stop or self._stop)
        self._persist(call, retry_for, functools.partial(_save, to, sha256, limit))

    def get(self, path: str, **how: Any) -> Any:
        """Return the JSON that is at ``path``; ``how`` is as for ``request``."""
        return self.request("GET", path, **how).json()

    def claims(self, stop: threading.Event | None = None) -> str:
        """Return the id of the farm that the coordinator says it is: it may not be true."""
        hello = {"who": "", "nonce": secrets.token_hex(16)}
        answer = self.request("POST", HELLO, json=hello, stop=stop).body
        farm_id = _told(answer, "farm_id")["farm_id"]
        if not re.fullmatch("[0-9a-f]{8,64}", farm_id):
            raise FarmError(f"{self.base_url} is not a povfarm coordinator")
        return farm_id

    def hurry(self) -> None:
        """Try at once what waits to be tried again: there may be a coordinator again."""
        self._hurried = self._clock.monotonic()

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        self.transport.close()

    def _persist(self, call: Call, retry_for: float | None,
                 consume: Callable[[Answer], bytes]) -> Reply:
        """Try until there is an answer that is not "later"."""
        patience = self._retry_for if retry_for is None else retry_for
        start = self._clock.monotonic()
        longest, deadline, tell = _FIRST_DELAY, start + patience, start + _TELL_FIRST
        once_more = True
        while not call.stop.is_set():
            delay = longest * random.uniform(0.5, 1)  # or all workers would come back at once
            try:
                signed = replace(call, sign=self._sign(call)) if self.token else call
                with contextlib.closing(self.transport.exchange(signed)) as answer:
                    _raise_refusal(answer)
                    if tell > start + _TELL_FIRST:
                        self._tell(f"{self.base_url} answers again")
                    return Reply(answer.status, answer.headers, consume(answer))
            except RequestRefused as error:
                if error.detail == SESSION_OVER:
                    known, self._proven = self._proven, None
                    if once_more and known:
                        once_more = False
                        continue
                elif error.status not in _TRY_LATER:
                    raise
                failure: FarmError = error
                delay = max(delay, min(error.later, _LONGEST_DELAY))
            except WrongFarm as error:  # somebody else has its place: perhaps while it is away
                if not self._was_there:
                    raise
                failure = error
            except ServerGone as error:
                failure, once_more = error, True
            if call.stop.is_set():
                break
            if self._clock.monotonic() + delay > deadline:
                raise failure
            if self._clock.monotonic() >= tell:
                tell = self._clock.monotonic() + _TELL_AGAIN
                self._tell(f"{failure} (trying again until it answers)")
            hurried = self._pause(call, delay)
            longest = _FIRST_DELAY if hurried else min(longest * 2, self._longest)
        raise ServerGone(f"stopped before {self.base_url} had answered")

    def _sign(self, call: Call) -> Callable[[str, str, str], str]:
        """Return what signs requests with the key of now."""
        with self._proving:
            token, known = self.token, self._proven
            if known is None or known[0] != token:
                known = self._proven = token, self.transport.prove(token, call)
                self._was_there = True
            return known[1]

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


# What a coordinator lacks that does not prove itself, by the first letter of who it should know.
_LACKS: Mapping[str, str] = {
    FARM: "have your farm's key: it is another farm, or somebody who pretends to be yours "
          "(give the key of the one that is meant with --key)",
    WORKER: "have the secret that this computer and its farm share: it is another farm, or "
            "somebody who pretends to be yours",
}
_FORGOTTEN = ("know your key (any more): it is another farm, or your name was removed there (ask "
              "for an invitation, and come with --code)")


def _told(body: bytes, *names: str) -> dict[str, str]:
    """Return the texts that are in an answer."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = json.loads(body)
        return {name: str(told[name]) for name in names}
    raise FarmError("this is no answer of a povfarm coordinator: wrong address?")


def _split_url(base_url: str) -> urllib.parse.SplitResult:
    try:
        url = urllib.parse.urlsplit(base_url)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if not good or url.query or url.fragment:
        raise UserError(f"'{base_url}' is not an address: write http://NAME:{PORT}")
    return url


def _gone(base_url: str, error: Exception) -> ServerGone:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ServerGone(f"{base_url} does not answer ({reason}): is 'serve' running there?")


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
    with writing(real_path(to.parent) / to.name), placed(to) as part, part.open("wb") as file:
        for block in _pieces(answer, limit, to.name):
            digest.update(block)
            file.write(block)
        if wanted and digest.hexdigest() != wanted:
            raise ServerGone(f"{to.name} arrived with other contents than it should have")
    return b""


# === 20. PROCESS =============================================================
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
    ``reads``, and write only in its own directory, ``writes``; it gets no
    network and starts no programs. ``memory`` and ``file_size`` are bytes.
    """

    reads: tuple[str, ...] | None = None
    memory: int = 0
    file_size: int = 0
    writes: str = "."


class Process:
    """A renderer under way: its output line by line, its end, its processor time."""

    def __init__(self, output: io.BufferedReader, kill: Callable[[], None]) -> None:
        self.kill = kill
        self.pid = 0
        self._output = output
        self.ended: concurrent.futures.Future[Ended] = concurrent.futures.Future()

    def lines(self) -> Iterator[str]:
        """Yield what the process prints, line by line.

        A status line, which ends with a carriage return, keeps it.
        """
        rest = ""
        while data := self._output.read1(BUFFER):
            *whole, rest = re.split(r"(?<=\r)|\n", rest + data.decode("utf-8", "replace"))
            yield from whole
            if len(rest) > BUFFER:
                yield rest
                rest = ""
        self._output.close()
        if rest:
            yield rest

    def wait(self) -> Ended:
        """Wait for the end."""
        return self.ended.result()

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
                   "bounds": vars(bounds)}
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
                    process.ended.set_result(
                        Ended(answer["code"], answer["cpu"], answer["memory"]))
        self.gone = True
        with self._lock:  # no renderer is added any more: sending fails from now on
            for process in self._processes.values():
                if process.pid:  # only Linux ends them by itself
                    _kill_group(process.pid)
                process.ended.set_result(Ended(-signal.SIGKILL, 0.0, 0))


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
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that set_wakeup_fd sees it
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
        kernel.confine((request["argv"][0], *_SYSTEM), bounds.reads, bounds.writes)
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


def all_but(hidden: Collection[Path], top: Path = Path("/")) -> list[str]:
    """Return places that together hold everything below ``top`` but what is ``hidden``.

    Landlock knows no exceptions: what lies beside the hidden places, all the way
    down to them, is named instead. Links are left out, for they may lead to a
    hidden place; where they lead is named by itself.
    """
    if top in hidden or top.is_symlink():
        return []
    below = [path for path in hidden if top in path.parents]
    if not below:
        return [str(top)]
    with contextlib.suppress(OSError):
        return [path for inside in sorted(top.iterdir()) for path in all_but(below, inside)]
    return []


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
        machine = os.uname().machine
        # A 32-bit program on such a machine has other numbers.
        usable = sys.maxsize > 1 << 32 and self._libc.prctl(21) >= 0  # PR_GET_SECCOMP
        self._filter = _filter(_MACHINES[machine][0], _calls_of(machine)) if (
            machine in _MACHINES and usable) else b""

    def end_with(self, parent: int) -> None:
        """Never outlive the process that forked this one, be it gone already."""
        self._call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    def confine(self, runs: Sequence[str], reads: Sequence[str], writes: str) -> None:
        """Give up, for this process and for good, what a renderer does not need.

        It may run and read what is in ``runs``, read what is in ``reads``,
        and write in ``writes``.
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
            self._allow(rules, writes, _WRITE, handled)
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


def _filter(machine: int, calls: Mapping[str, int]) -> bytes:
    """Return a program for seccomp(2), in the instructions of its struct sock_filter."""
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), _REFUSE, (_LOAD, 0, 0, 0),
            (_AT_LEAST, 0, 1, 1 << 30), _REFUSE]  # x86-64 has a second set of numbers there
    for name, number in calls.items():
        test = _TESTS.get(name, (_ALLOW,))
        code += [(_EQUAL, 0, len(test), number), *test]
    # The C library has another way where it finds that a newer call, as clone3, is missing.
    code += [(_AT_LEAST, 0, 1, 435), _MISSING, _REFUSE]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


_LOAD, _AND, _EQUAL, _AT_LEAST, _HAS_BITS, _DONE = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = (_DONE, 0, 0, 0x7FFF0000), (_DONE, 0, 0, 0x50000 | errno.EACCES)
_MISSING = (_DONE, 0, 0, 0x50000 | errno.ENOSYS)
_ITSELF = 0x5E1F5E1F  # stands for the number of the process in the filter


def _one_of(argument: int, *values: int) -> list[tuple[int, int, int, int]]:
    """Return what allows a call whose argument of that number, from 0, has one of the values."""
    tests = [(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *tests, _REFUSE, _ALLOW]


# What is looked at besides the number of a call.
_TESTS: Mapping[str, Sequence[tuple[int, int, int, int]]] = {
    # Threads, no processes: CLONE_THREAD.
    "clone": [(_LOAD, 0, 0, 16), (_HAS_BITS, 0, 1, 0x10000), _ALLOW, _REFUSE],
    "kill": _one_of(0, _ITSELF), "tgkill": _one_of(0, _ITSELF),
    "prlimit64": _one_of(0, 0, _ITSELF),
    "prctl": _one_of(0, 15, 16),  # the names of threads
    # Copies and flags of descriptors, locks; not who gets signals of them.
    "fcntl": _one_of(1, 0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030),
    # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
    "ioctl": _one_of(1, 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    # No memory that is shared and belongs to no file: no limit counts it.
    "mmap": [(_LOAD, 0, 0, 40), (_AND, 0, 0, 0x21), (_EQUAL, 0, 1, 0x21), _REFUSE, _ALLOW],
}
# The system calls that a renderer may make, with their numbers on x86-64 and ARM64 (- where
# there is none of that name). Everything else is refused: a call that only a newer kernel knows,
# too. None of these reaches another process, a network, or what files are apart from contents.
_CALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -,
lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, ioctl 16 29, pread64 17 67, pwrite64 18 68,
readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, msync 26 227, mincore 27 232, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -,
nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172,
sendfile 40 71, clone 56 220, execve 59 221, exit 60 93, kill 62 129, uname 63 160,
fcntl 72 25, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents 78 -,
getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -,
unlink 87 -, readlink 89 -, umask 95 166, gettimeofday 96 169, getrlimit 97 163,
getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176,
geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, getgroups 115 158,
getresuid 118 148, getresgid 120 150, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43, fstatfs 138 44,
sched_get_priority_max 146 125, sched_get_priority_min 147 126, prctl 157 167,
arch_prctl 158 -, gettid 186 178, readahead 187 213, time 201 -, futex 202 98,
sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128,
fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, tgkill 234 131, openat 257 56,
mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, readlinkat 267 78,
faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99,
sync_file_range 277 84, epoll_pwait 281 22, fallocate 285 47, eventfd2 290 19,
epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70,
prlimit64 302 261, getcpu 309 168, renameat2 316 276, getrandom 318 278, membarrier 324 283,
copy_file_range 326 285, preadv2 327 286, pwritev2 328 287, statx 332 291, rseq 334 293,
close_range 436 436, openat2 437 437, faccessat2 439 439
"""
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH; column


def _calls_of(machine: str) -> dict[str, int]:
    """Return the numbers of the calls that a renderer may make on a machine, by name."""
    rows = (row.split() for row in _CALLS.split(","))
    column = _MACHINES[machine][1]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


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
        process.ended.set_result(Ended(code, _windows_cpu(program), 0))


def _windows_cpu(program: subprocess.Popen[bytes]) -> float:
    """Return the CPU seconds of an ended program, by GetProcessTimes (units of 100 ns)."""
    times = [ctypes.c_ulonglong() for _ in range(4)]
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GetProcessTimes(
            int(getattr(program, "_handle", 0)), *(ctypes.byref(time) for time in times)):
        return 0.0
    return (times[2].value + times[3].value) / 1e7


def confined(program: str, reads: str, writes: str) -> Callable[[], None] | None:
    """Return what holds another program to what a renderer may, as ``preexec_fn``; None elsewhere.

    It reads what is in one directory and what was installed with it, and writes in the other.
    """
    if sys.platform != "linux":
        return None
    kernel, installed = _Kernel(), Path(program).resolve()
    prefix = installed.parent.parent
    own = installed.parent.name == "bin" and prefix not in (Path("/"), *Path.home().parents,
                                                            Path.home())
    runs = (*_SYSTEM, str(prefix if own else installed))
    return functools.partial(_confine, kernel, runs, reads, writes)


def _confine(kernel: _Kernel, runs: Sequence[str], reads: str, writes: str) -> None:
    _limit(Bounds(memory=total_memory()))
    kernel.confine(runs, (reads,), writes)


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


# === 21. WORKER ==============================================================
# Asks for leases, fetches projects, renders, and delivers each frame as soon
# as it is there; keeps the cores busy and the leases alive. Decides nothing
# about jobs: what the coordinator says is done.

LEASE_WAIT = 240.0  # seconds that a request for work is held open
PATIENCE = 60.0  # seconds that a worker that is asked to stop renders on, as it looks
HAND_IN_TIME = 20.0  # seconds that a worker that ends at once takes to hand in what it has begun
HANG_TIME = 600.0  # seconds without a sign of life after which a renderer is ended
DISK_RESERVE = 200 * 1000**2  # bytes of disk that no run may come to by writing
BEAT_WAIT = 2.0  # seconds between two signs of life while rendering
SLICE_BEAT_WAIT = 0.5  # the same while the rows of a picture are shared out by how far all are
MOST_RUNS = 16  # a core: as many as it takes to keep it busy with frames that hardly compute
PIXEL_SIZE = 36  # bytes that POV-Ray 3.7 writes for a pixel at most: 20 in its state, and the image
GENEROUS = 1 << 30  # bytes: a scene that writes half of that and more is to blame
MOST_WAITING = 100  # finished frames on their way, beyond which no more work is asked for
MAX_SHARED = 1 << 30  # bytes of samples and photons that a pass may leave
OFFER_TIME = 600.0  # seconds that a frame is offered to a coordinator that makes mistakes with it
START_SLEEP, FRAME_SLEEP = 0.3, 0.22  # seconds that POV-Ray 3.7 sleeps: at its start, per frame


def nearly_full(place: Path) -> bool:
    """Tell whether what runs write may fill the disk of a place; not when the place is gone."""
    try:
        return shutil.disk_usage(place).free < DISK_RESERVE
    except OSError:  # a worker that ends deletes it
        return False


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
        """Return how many more runs to start now: how many POV-Rays run at once is decided here.

        Runs that sleep at random leave cores idle by chance even where their
        load adds up to the cores, so it may go beyond them by its standard
        deviation (of a sum of independent runs, each busy or not).
        """
        if not runs:
            # Two a core: half of a start is sleep, whatever the scene.
            return 2 * self.cores
        duties = [self.duty(run.job) or run.duty_so_far() for run in runs]
        load, spread = self.load(runs), sum(duty * (1 - duty) for duty in duties)
        duty, more = min(duties), 0
        while load + (more + 0.5) * duty <= self.cores + math.sqrt(
                spread + (more + 1) * duty * (1 - duty)):
            more += 1
        memory = max(self._memory.get(run.job, 0) for run in runs)
        unknown = any(self.duty(run.job) is None for run in runs)
        more = min(more, (4 if unknown else MOST_RUNS) * self.cores - len(runs))
        return max(min(more, int(0.8 * free_memory / memory)) if memory else more, 0)


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
        self.measure: _Measure | None = None  # until its last frame was delivered
        self.text = PovText()
        self.own: Path | None = None  # its own directory
        self.reads: tuple[str, ...] = ()  # what it may read of the project
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
        self.sent: dict[str, str] = {}  # the hash of each that was delivered
        self.given: dict[str, Old] = {}  # files to go on with

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
            name = self.lease.pov.engine or "POV-Ray"
            return f"{name} did nothing for {format_duration(HANG_TIME)}"
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

    def begin_from(self, plan: Run, path: Path) -> None:
        """Let the renderer go on from a state, as far as that fits; the file goes."""
        with open(path, "rb") as source, open(plan.state, "wb") as target:
            state = copy_state(source, target, plan.region, plan.block)
        path.unlink()
        if not state.pixels:
            plan.state.unlink()
        region = plan.region
        pixels = (region.bottom - region.top) * (region.right - region.left)
        self.text = PovText(100 * state.pixels // pixels)

    def is_cut(self, plan: Run) -> bool:
        """Tell whether the rows that others did not take over seem to be finished."""
        bottom = self.bottoms.get(self.task.id)
        if bottom is None or self.cut or self.task.frame not in self.open:
            return False
        region = plan.region
        rows = min(bottom, region.bottom) - region.top
        # POV-Ray tells whole percents, rounded down, of what it has added to a state.
        if not 100 * rows / (region.bottom - region.top) - 2 < self.text.percent < 97:
            return False
        # Only the state tells: one thread may be at a block while others are far below it.
        start = self.clock.monotonic()
        if start < self.look_again:
            return False
        finished = False
        with contextlib.suppress(OSError), open(
                replace(plan, frames=(self.task.frame,)).state, "rb") as state:
            finished = copy_state(state, None, region, plan.block).rows >= rows
            now = self.clock.monotonic()
            self.look_again = now + 10 * (now - start)  # it may be hundreds of megabytes
        return finished

    def shortened(self, plan: Run) -> Run:
        """Return the run that makes the picture of what is finished down to where others began."""
        task = self.task
        short = replace(task, kind=TaskKind.SLICE, bottom=self.bottoms[task.id])
        self.open[task.frame] = short
        pov = plan.lease.pov  # the same blocks as before, for the state has those
        pov = replace(pov, values={**pov.values, "Render_Block_Size": str(plan.block)})
        lease = replace(plan.lease, tasks=(short,), pov=pov)
        self.cut, self.lease, self.text, old = True, lease, PovText(), plan.place / "state"
        state = replace(plan, frames=(task.frame,)).state
        shorter = replace(plan, lease=lease, frames=(task.frame,))
        if state.is_file():
            os.replace(state, old)
            self.begin_from(shorter, old)
        return shorter

    def written(self) -> int:
        """Return the bytes in its own directory."""
        return _bytes_in(self.own) if self.own else 0

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
    """A finished frame on its way to the coordinator: its files are deleted when it is there.

    ``packed`` is, if there is such a file, a zip of what the scene wrote.
    """

    run: RunState
    task: TaskSpec
    image: Path
    packed: Path
    bottom: int
    text: str
    cost: Cost


class Old(NamedTuple):
    """A file as it was given to a run: its bytes and their hash."""

    size: int
    sha256: str


_NOTHING = Old(0, hashlib.sha256().hexdigest())


def _copy_rest(source: Path, to: Path, old: Old | None) -> bool:
    """Copy what was added to a file since it was as it was, or all of it; tell which."""
    with open(source, "rb") as file, open(to, "wb") as target:
        digest, left = hashlib.sha256(), old.size if old else 0
        while block := file.read(min(left, BUFFER)):
            digest.update(block)
            left -= len(block)
        added = old is not None and digest.hexdigest() == old.sha256
        file.seek(old.size if old and added else 0)
        shutil.copyfileobj(file, target)
    return added


class Tree(NamedTuple):
    """A project as a run finds it: its directory, and what the run's own has of it.

    ``directories`` are made there, for scenes that write in them, and ``links``
    in the run's current directory. ``reads`` is what the renderer may read of the project.
    """

    path: Path
    directories: Collection[str]
    links: Mapping[str, Path]
    reads: tuple[str, ...]


class Kept(NamedTuple):
    """A copy of what a scene wrote: of the run with that first frame.

    It is ``added`` where it goes to the end of what is there.
    """

    first: int
    copy: Path
    added: bool


class InPlace:
    """The project of a render on one computer, read where it is, instead of a ``Cache``.

    What its scenes write does not go by the coordinator: ``keep`` copies it below
    ``root``, ``take`` gives it to who puts it in its place.
    """

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root = root
        self._tree = tree
        self._lock = threading.Lock()
        self._kept: dict[int, dict[str, Kept]] = collections.defaultdict(dict)  # by job and name
        root.mkdir(parents=True)

    @contextlib.contextmanager
    def project(self, key: str, last_frame: int,
                stop: threading.Event | None = None) -> Iterator[Tree]:
        """Give the file system as it is; of use to the one job that it was made for."""
        yield self._tree

    def known(self) -> list[str]:
        """Return no keys: what is here is not ours."""
        return []

    def empty(self) -> None:
        """Delete nothing."""

    forget = staticmethod(lambda keys: None)

    def keep(self, run: Run, names: Iterable[str], given: Mapping[str, Old]) -> None:
        """Copy what a run has written; of two runs the later frames' stays.

        Of a file that was given to the run, and to which it has only added, the copy is the rest.
        """
        with self._lock:
            kept = self._kept[run.lease.job]
            for name in names:
                before = kept.get(name) or Kept(-1, self.root / secrets.token_hex(8), False)
                if before.first <= run.frames[0]:
                    old = given.get(name) or (_NOTHING if run.lease.pov.appends_to(name) else None)
                    added = _copy_rest(run.place / name, before.copy, old)
                    kept[name] = Kept(run.frames[0], before.copy, added)

    def written(self, job: int) -> list[str]:
        """Return the names of what was written since the last time."""
        with self._lock:
            return sorted(self._kept[job])

    def take(self, job: int) -> dict[str, Kept]:
        """Return the copies of what was written since the last time, by names from ``place`` on."""
        with self._lock:
            return self._kept.pop(job, {})


class Cache:
    """Projects of this worker, by the key of their manifest, within a size in bytes.

    ``near`` tells where the coordinator keeps contents by their hash, for a
    worker in its own process: they are copied, not sent. A project is deleted when the
    coordinator has no job any more that has it, unless one of another ``farm`` has.
    """

    def __init__(self, root: Path, limit: int, client: Client,
                 near: Callable[[str], Path] | None = None, farm: str = "") -> None:
        self.root = root
        self._mark = f"of-{farm}"
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
                stop: threading.Event | None = None) -> Iterator[Tree]:
        """Give a project, with every file that frames up to ``last_frame`` need.

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
            tree = self.root / key / "tree"
            folders = {str(PurePosixPath(file.path).parent) for file in manifest.files}
            yield Tree(tree, {*folders, *manifest.directories}, {}, (str(tree),))
        finally:
            with self._lock:
                self._using[key] -= 1
            with contextlib.suppress(OSError):  # it may never have come
                os.utime(self.root / key)

    def empty(self) -> None:
        """Delete every project that is not in use."""
        self._trim(0)

    def known(self) -> list[str]:
        """Return the keys of projects that this farm has sent, some of them where they are many."""
        return [mark.parent.name for mark in self.root.glob(f"*/{self._mark}")][:1000]

    def forget(self, keys: Iterable[str]) -> None:
        """Delete projects that the farm has no more."""
        for place in (self.root / key for key in {*keys} & {*self.known()}):
            with self._lock, contextlib.suppress(OSError):
                if not self._using[place.name]:
                    (place / self._mark).unlink()
                    if not any(place.glob("of-*")):
                        shutil.rmtree(place)
                        self._ready.pop(place.name, None)

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
        (path.parent / self._mark).touch()
        return manifest

    def _fill(self, key: str, manifest: Manifest, last_frame: int,
              stop: threading.Event | None) -> None:
        tree = self.root / key / "tree"
        tree.mkdir(exist_ok=True)
        for directory in manifest.directories:
            safe_join(tree, directory).mkdir(parents=True, exist_ok=True)
        ready = self._ready.setdefault(key, set())
        for file in manifest.files:
            if file.path in ready or (file.after_frame is not None
                                      and last_frame <= file.after_frame):
                continue
            path = safe_join(tree, file.path)
            if not _holds(path, file):
                path.parent.mkdir(parents=True, exist_ok=True)
                if file.size > free_room(tree):  # or it would be full before that is noticed
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                if self._near is not None:
                    shutil.copyfile(self._near(file.sha256), path)
                elif not self._copy(key, file, path):
                    self._client.download(f"/api/v1/blobs/{file.sha256}", path, file.sha256,
                                          limit=file.size, stop=stop)
            with contextlib.suppress(OSError, OverflowError):  # a time that this system has not
                os.utime(path, (file.mtime, file.mtime))
            ready.add(file.path)

    def _copy(self, key: str, wanted: FileEntry, to: Path) -> bool:
        for other in self.root.iterdir():
            source = safe_join(other / "tree", wanted.path)
            with contextlib.suppress(OSError):  # it may be deleted, or come, just now
                if (other.name != key and (other / "manifest.json").is_file()
                        and source.stat().st_size == wanted.size):
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
    with contextlib.suppress(OSError):
        return path.stat().st_size == file.size and sha256_file(path) == file.sha256
    return False


class Outbox:
    """Finished frames on their way to the coordinator, each kept until it is taken or refused.

    ``trouble`` is told what the coordinator cannot do, ``gone`` each run of which a frame has
    left; ``ending`` gives up what is here.
    """

    def __init__(self, client: Client, cache: Cache | InPlace, clock: Clock,
                 ending: threading.Event, trouble: Callable[[str], None],
                 gone: Callable[[RunState], None]) -> None:
        self.taken = 0
        self.given_up = 0
        self._client = client
        self._cache = cache
        self._clock = clock
        self._ending = ending
        self._trouble = trouble
        self._gone = gone
        self._place = Path()
        self._waiting: queue.Queue[Delivery] = queue.Queue()

    def open(self, place: Path) -> None:
        """Begin to deliver what is put in, from an empty directory."""
        self._place = place
        for number in range(2):
            name = f"deliver-{number}"
            threading.Thread(target=self._deliver_all, name=name, daemon=True).start()

    def __len__(self) -> int:
        """Return how many frames are not delivered yet."""
        return self._waiting.unfinished_tasks

    def put(self, delivery: Delivery) -> None:
        """Deliver a frame, as soon as its turn comes."""
        self._waiting.put(delivery)

    def pack(self, run: RunState, plan: Run, task: TaskSpec, text: str, cost: Cost) -> Delivery:
        """Take what was made of a task out of its run; ``FileNotFoundError`` if that is nothing."""
        bottom = task.bottom or run.lease.pov.options.height
        image = self._kept(run, plan, task, bottom)
        packed = image.with_name(f"{image.name}.zip")
        self._pack_written(run, plan, packed)
        return Delivery(run, task, image, packed, bottom, text, cost)

    def _kept(self, run: RunState, plan: Run, task: TaskSpec, bottom: int) -> Path:
        """Move what was made of a task to where it outlives the run; return the file."""
        made, kept = plan.made(task.frame), self._place / f"{run.started}-{task.id}"
        made.stat()  # it ended well
        if task.kind is TaskKind.SLICE:
            try:
                crop_rows(made, run.lease.pov.options.extension, task.top, bottom - task.top, kept)
            except ImageError as error:
                log.warning("%s: %s", task.name, error)  # the coordinator will find it, too
                shutil.copyfile(made, kept)
        elif task.kind is TaskKind.PASS:
            paths = [plan.place / name for name in (SAMPLE_FILE, PHOTON_FILE)]
            pack_files({path.name: path for path in paths if path.is_file()}, kept)
        elif run.lease.in_order:  # a later frame may read it
            shutil.copyfile(made, kept)
        else:
            made.rename(kept)
        return kept

    def _pack_written(self, run: RunState, plan: Run, packed: Path) -> None:
        """Pack what the scene has written since the last image, if there is something.

        The next frame may be writing the same file already: then its own look comes later.
        """
        if isinstance(self._cache, InPlace):
            if run.lease.in_order:  # else all that the run wrote is kept when it has ended
                self._cache.keep(plan, written_by(run, plan), run.given)
            return
        left: list[str] = []
        files: dict[str, Path] = {}
        number, size = 0, 0
        for name, more in sorted(written_by(run, plan).items()):
            if not (number < MAX_WRITTEN and size + more <= MAX_WRITTEN_SIZE
                    and may_be_written(name)):
                left.append(name)
                continue
            number, size = number + 1, size + more
            with contextlib.suppress(OSError):
                sha256 = sha256_file(plan.place / name)
                if run.sent.get(name) != sha256:
                    files[name], run.sent[name] = plan.place / name, sha256
        if files or left:
            pack_files(files, packed, left)

    def _deliver_all(self) -> None:
        while True:
            delivery = self._waiting.get()
            try:
                self._deliver(delivery)
            except (FarmError, OSError) as error:
                self.given_up += 1
                if not self._ending.is_set():
                    log.warning("frame %d was not taken: %s", delivery.task.frame, error)
            finally:
                for path in (delivery.image, delivery.packed):
                    with contextlib.suppress(OSError):  # a disk may have become read-only
                        path.unlink()
                self._waiting.task_done()
                self._gone(delivery.run)

    def _deliver(self, delivery: Delivery) -> None:
        """Offer a frame until it is taken or refused: it is kept for as long as that takes."""
        text, cost = delivery.text.encode(), delivery.cost
        path = f"/api/v1/leases/{delivery.run.lease.id}/tasks/{delivery.task.id}"
        body: tuple[Path | bytes, ...] = (text, delivery.image)
        size = 0
        if delivery.packed.is_file():
            body, size = (*body, delivery.packed), delivery.packed.stat().st_size
        query = (f"log={len(text)}&files={size}&cpu={cost.cpu:.3f}&wall={cost.wall:.3f}"
                 f"&parse={cost.parse:.3f}&memory={cost.memory}&bottom={delivery.bottom}")
        start = self._clock.monotonic()
        while True:
            try:
                self._client.request("PUT", f"{path}?{query}", body=body, timeout=120,
                                    retry_for=math.inf, stop=self._ending)
                self.taken += 1
                return
            except RequestRefused as error:
                if error.status == 422:
                    self._client.request(
                        "POST", f"{path}/fail", retry_for=300,
                        json={"message": str(error), "scene": False, "log": delivery.text})
                    return
                late = error.status != 507 and self._clock.monotonic() > start + OFFER_TIME
                if error.status < 500 or late:
                    raise
                self._trouble(str(error))
            self._ending.wait(random.uniform(5, 10))


def written_by(run: RunState, plan: Run) -> dict[str, int]:
    """Return the sizes of what the scene has written since the last look, by name."""
    before, run.scene_files = run.scene_files, plan.scene_files()
    if run.task.kind is TaskKind.PASS:
        return {}
    return {name: size for name, (time, size) in run.scene_files.items()
            if before.get(name) != (time, size)}


class Worker:
    """Renders for one coordinator until it is stopped.

    ``stop`` once lets the frames under way finish and hands the rest back, with
    what is done of those that take longer than a minute; twice ends everything
    at once. ``until_idle`` ends when there is nothing left. ``admitted`` is called when
    the coordinator lets a worker in that waits for it. ``programs`` render beside the engine.
    """

    def __init__(self, client: Client, engine: Engine, launcher: Launcher | WindowsLauncher,
                 cache: Cache | InPlace, cores: int, until_idle: bool = False,
                 clock: Clock | None = None, bounds: Bounds = Bounds(()),
                 admitted: Callable[[], Any] | None = None,
                 programs: Mapping[str, Program] = {}) -> None:
        self.client = client
        self.engine = engine
        self.programs = programs
        self.cache = cache
        self.until_idle = until_idle
        self.bounds = bounds
        self._launcher = launcher
        self._admitted = admitted
        self._clock = clock or Clock()
        self._pace = Pace(cores)
        self._runs: set[RunState] = set()  # that use the machine
        self._held: set[RunState] = set()  # whose leases must be kept alive
        self._watched: set[RunState] = set()  # whose renderer has not ended
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._ending = threading.Event()
        self.outbox = Outbox(client, cache, self._clock, self._ending, self._in_trouble, self._gone)
        self._patience = PATIENCE
        self._trouble = ""  # why nothing more is asked for
        self._rest = (0.0, 0)  # until when, unless more is free than then
        self._idle = False

    def run(self) -> None:
        """Work until stopped; raises ``FarmError`` when the coordinator refuses this worker."""
        _sweep(self.cache.root)
        self.outbox.open(self._directory("out-"))
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

    def stop(self, patience: float = PATIENCE) -> None:
        """Finish the frames under way and hand back the rest; a second call ends at once.

        Of frames that will take longer than ``patience`` seconds what is done is handed in.
        """
        if self._stopping.is_set():
            self._ending.set()
        self._patience = patience
        self._stopping.set()
        with self._changed:
            self._stop_long()
            self._changed.notify_all()

    def _stop_long(self) -> None:
        """Stop the runs that are not waited for, in whatever they are."""
        for run in self._runs:
            if self._ending.is_set() or run.process is None or run.left() > self._patience:
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
                if not self._runs and self.outbox and self._clock.monotonic() > told:
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
        if len(self.outbox) > MOST_WAITING:
            return True
        place = self.cache.root.parent
        free, (until, then) = free_room(place), self._rest
        if free < 0 or (self._clock.monotonic() < until and free < then + LEFT_FREE):
            self._in_trouble("the disk is full or cannot be written: make room on the one of "
                             f"{place}; nothing is rendered here until then")
            self.cache.empty()
        elif self._trouble and not self.outbox:
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
        offer = {"want": room, "slots": len(runs) + room, "idle": max(idle, 0), "wait": wait,
                 "projects": self.cache.known()}
        reply = self.client.request("POST", "/api/v1/lease", json=offer, timeout=wait + 30,
                                    retry_for=math.inf, stop=self._stopping).json()
        self.cache.forget(reply.get("gone", ()))
        if self._admitted is not None and not reply["pending"]:
            self._admitted()
            self._admitted = None
        for wire in reply["leases"]:
            run = RunState(LeaseSpec.from_wire(wire), self._clock)
            with self._changed:
                self._runs.add(run)
                self._held.add(run)
                self._changed.notify_all()
            threading.Thread(target=self._work, args=(run,), name=f"run-{run.lease.id[:6]}",
                             daemon=True).start()
        self._idle = self.until_idle and not (reply["leases"] or reply["open"] or reply["pending"])

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
            if nearly_full(self.cache.root):
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
                if scene and "Cannot find file '" in run.text.text and not isinstance(
                        self.cache, InPlace):
                    message = f"{message.rstrip('.')}: it did not come with the project"
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
        lease = run.lease
        frames = tuple(task.frame for task in lease.tasks)
        if lease.in_order:
            frames = tuple(frame for frame in lease.pov.plan.frames if frame <= frames[-1])
        own = run.own = self._directory()
        try:
            with self.cache.project(lease.manifest, frames[-1], run.stopped) as tree:
                plan, run.reads = Run(lease, tree.path, own, frames), tree.reads
                if lease.pov.engine:
                    run.text = ProgramText(frames)
                _check_system_files(lease.pov)
                run.given = _make_directories(plan, tree)
                self._get_shared(run, plan.place)
                if run.task.state and run.task.frame == frames[0]:  # not so where it is in order
                    self._get_state(run, plan)
                measure = run.measure = _Measure(run, self._clock)
                while self._watch(run, plan, measure):
                    plan = run.shortened(plan)
                if run.open and self._stopping.is_set():
                    self._hand_in(run, replace(plan, frames=(run.task.frame,)))
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _get_shared(self, run: RunState, place: Path) -> None:
        """Get what the passes of a frame have rendered, and put it together."""
        for number in run.lease.shares:
            path = place / "pass.zip"
            self.client.download(f"/api/v1/tasks/{number}/result", path, retry_for=300,
                                 stop=run.stopped)
            files = unpack_files(path, place / "pass.files", MAX_SHARED)
            samples, photons = files.get(SAMPLE_FILE), files.get(PHOTON_FILE)
            if samples and has_samples(samples.read_bytes()):
                with open(place / SAMPLE_FILE, "ab") as target, open(samples, "rb") as source:
                    shutil.copyfileobj(source, target, BUFFER)
            if photons and photons.stat().st_size:  # every pass has shot them all
                photons.replace(place / PHOTON_FILE)
            path.unlink()
            shutil.rmtree(place / "pass.files")

    # --- stopped renders

    def _get_state(self, run: RunState, plan: Run) -> None:
        """Go on from where another worker stopped; from the start when its state does not fit."""
        with contextlib.suppress(FarmError):
            path = plan.place / "state"
            self.client.download(f"/api/v1/tasks/{run.task.id}/state", path, retry_for=30,
                                 stop=run.stopped)
            run.begin_from(plan, path)

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
            elif run.bottoms and not cut and run.is_cut(plan):
                cut = True
                process.kill()
            measure.tracing(run.text.percent / 100)
            if run.text.traced and run.text.index == len(plan.frames) - 1 and run.open:
                self._finish_early(run, plan, measure)
        ended = run.ended = process.wait()
        if isinstance(self.cache, InPlace):
            for path in filter(is_file, plan.text_files.values()):
                text = path.read_text("utf-8", "surrogateescape")
                path.write_text(run.text.with_names(text), "utf-8", "surrogateescape")
            self.cache.keep(plan, written_by(run, plan), run.given)
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
        return cut and bool(run.open) and not run.stopped.is_set()

    def _start(self, run: RunState, plan: Run) -> Process | None:
        """Start the renderer, with all that it looks for in its place; None when it is too late."""
        name = plan.lease.pov.engine
        if name and name not in self.programs:
            raise RenderFailed(f"the owner of this computer lets it run no '{name}'")
        engine = self.programs[name] if name else self.engine
        command = engine.command(plan)
        texts = {path: text.encode() for path, text in command.files.items()}
        texts.update({plan.place / name: text for name, text in engine.shared(plan).items()})
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
        _create_ini_of(plan)  # it counts as written, and is delivered
        bounds = replace(
            self.bounds, writes=str(plan.own),
            reads=None if self.bounds.reads is None else (*run.reads, *command.reads),
            # What one scene writes must not fill the disk.
            file_size=shutil.disk_usage(plan.place).free // 2)
        home = plan.tree / plan.lease.pov.run_dir
        mine = {link: plan.tree / to.relative_to(plan.own) for link, to in command.links.items()
                if plan.own in to.parents}  # what the run writes there is called as what is there
        run.text.links = {link.name: min(os.path.relpath(to, home), str(to), key=len)
                          for link, to in {**command.links, **mine}.items()}
        run.text.mine = {link.name for link in mine}
        run.process = self._launcher.start(command.argv, plan.place, command.environment, bounds)
        run.began = self._clock.monotonic()
        with self._changed:
            self._watched.add(run)
            self._changed.notify_all()
        return run.process

    def _finish_early(self, run: RunState, plan: Run, measure: _Measure) -> None:
        """Deliver the last frame before POV-Ray, which sleeps at its end, has ended."""
        if plan.scene_files() != run.scene_files:
            return  # POV-Ray closes some of them, such as radiosity samples, when it ends
        options, path = run.lease.pov.options, plan.made(plan.frames[-1])
        until = self._clock.monotonic() + START_SLEEP
        while run.open and self._clock.monotonic() < until:
            try:
                check_image(path, options.extension, run.lease.pov.width, options.height)
            except ImageError:
                time.sleep(0.01)
                continue
            self._finish(run, plan, run.text.index, run.text.text, measure.frame())
            with self._changed:
                self._runs.discard(run)
                self._changed.notify_all()

    # --- delivering

    def _finish(self, run: RunState, plan: Run, index: int, text: str, cost: Cost) -> None:
        task = run.open.get(plan.frames[index]) if index < len(plan.frames) else None
        if task is None:
            return
        with contextlib.suppress(FileNotFoundError):
            delivery = self.outbox.pack(run, plan, task, text, cost)
            with self._changed:
                del run.open[task.frame]
                run.undelivered += 1
            self.outbox.put(delivery)

    def _gone(self, run: RunState) -> None:
        """Note that a frame of a run is delivered, or given up.

        What a run cost is learned when the coordinator knows it, too: it gives by that.
        """
        with self._changed:
            measure, frames = run.measure, len(run.lease.tasks)
            if measure and measure.frames == frames:
                run.measure = None
                self._pace.measured(run.job, frames, measure.cpu, measure.wall, run.threads)
        self._let_go(run, 1)


class _Measure:
    """What the frames of one run cost, parted at the moments when they ended."""

    def __init__(self, run: RunState, clock: Clock) -> None:
        self.frames = 0
        self.cpu = 0.0
        self.wall = 0.0
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
        if is_orphan(path.name.split("-")[1]):
            shutil.rmtree(path, ignore_errors=True)
    for place in (cache, cache.parent / "workers"):
        sweep_parts(place.rglob(PARTS))


_FILE_TOO_LARGE = 25  # SIGXFSZ, which Windows does not have


def _why_it_failed(run: RunState, bounds: Bounds) -> tuple[str, bool]:
    """Return what went wrong, best in POV-Ray's words, and whether the scene is to blame."""
    error, ended, name = run.text.error(), run.ended, run.lease.pov.engine or "POV-Ray"
    if run.overdue:
        return run.overdue, False
    if run.fills_disk:
        return f"{name} wrote so much that it would have filled the disk", False
    if ended.code == -9:
        return f"{name} was killed, perhaps because the computer ran out of memory", False
    # POV-Ray that gets no more memory often fails without a word about it.
    if re.search("bad_alloc|(Out of|out of|Insufficient) memory", run.text.text) or (
            ended.memory > bounds.memory / 2 > 0 and not error.startswith("File ")):
        return f"{name} needed more than {format_size(bounds.memory)} of memory", False
    error = error or f"{name} ended without a picture (exit code {ended.code})"
    return error, run.text.scene_is_wrong


def _check_system_files(pov: PovJob) -> None:
    """Raise ``RenderFailed`` when the scene would read other files of the system's than it should.

    Nothing is told of other files, whatever they are asked for.
    """
    for word, sha256, path in (f"{use}  ".split(" ", 2) for use in pov.uses):
        local = Path(path.strip())
        if word == "system_file" and not (
                is_shared(local) and is_file(local) and sha256_file(local) == sha256):
            raise RenderFailed(f"the scene reads {local}, and this computer has not the same file "
                               "there: install it here, or copy it into the project")


def _create_ini_of(run: Run) -> None:
    """Write the INI file that the command line asked for (Create_Ini) where it was submitted."""
    for word, _, rest in (use.partition(" ") for use in run.lease.pov.uses):
        name, _, text = rest.partition("\n")
        path = Path(os.path.normpath(run.place / name))
        if word == "create_ini" and run.own in path.parents and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _make_directories(run: Run, tree: Tree) -> dict[str, Old]:
    """Give the run's own directory what POV-Ray wants to find in it and nowhere else.

    The project's directories, for scenes that write there, and the files of
    ``load_file``, ``append`` and radiosity samples, which it does not look for in library paths:
    these are returned, by name.
    """
    pov = run.lease.pov
    home = run.tree / pov.run_dir
    own = (run.own / directory for directory in tree.directories)
    for directory in (home, run.place, *own, run.made(run.frames[0]).parent):
        directory.mkdir(parents=True, exist_ok=True)
    names = [name for word, _, name in (use.partition(" ") for use in pov.uses)
             if word in ("load_file", "append")]
    samples = pov.values.get("Radiosity_File_Name", "object.rca")  # which may be written only
    read = [samples] if pov.values.get("Radiosity_From_File") == "On" else []
    given = {}
    for name, source in [*tree.links.items(), *((name, home / name) for name in (*names, samples))]:
        path, link = Path(os.path.normpath(run.place / name)), name in tree.links
        if run.own not in path.parents or path.is_symlink() or not (
                link or is_directory(source.parent)):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if link:
            path.symlink_to(source)
        elif name in (*names, *read) and is_file(source):
            shutil.copyfile(source, path)
            given[name] = Old(path.stat().st_size, sha256_file(path))
    return given


# === 22. CLI =================================================================
# What a person types. One small function per command, the only place that
# prints, and the only one that sees both towers. Results go to stdout,
# progress and errors to stderr.

Options = argparse.Namespace
_Tools = Tuple[Union[Launcher, WindowsLauncher], Engine]  # what a worker renders with
_WHICH_FARM = ("data", "server", "discovery-port")  # what tells it is put behind commands
CommandFunction = Callable[[Options], int]


@dataclass(frozen=True)
class command:  # noqa: N801 - it is used as a decorator
    """Tags a function as a command, or as several; ``main`` collects the tags.

    ``arguments`` is how the help shows what follows the name, and tells how many words
    that is; POV-Ray's are all that do not start with ``--``. ``groups`` are those of SETTINGS.
    """

    name: str
    arguments: str
    summary: str
    groups: tuple[str, ...] = ()

    def __call__(self, function: CommandFunction) -> CommandFunction:
        """Tag ``function``, and return it as it was."""
        vars(function).setdefault("commands", []).insert(0, self)
        return function

    def takes(self, count: int) -> bool:
        """Tell whether so many words may follow the name."""
        least = len(re.sub(r"\[.*\]|\.\.\.", "", self.arguments).split())
        open_end = "..." in self.arguments or "POVRAY" in self.arguments
        return least <= count and (open_end or count <= len(self.arguments.split()))

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
    frames: Sequence[int]  # of the plan, those to render
    directory: Path
    options: JobOptions
    keeps_files: bool
    collect: functools.partial[Project]  # the project again, with files that were missed
    scratch: Path  # a directory of ours
    owners: _Owners | None = None
    states: Mapping[int, Path] = field(default_factory=dict)  # of frames that are begun
    place: InPlace | None = None  # of a render without others
    to_stdout: bool = False
    append: bool = False
    creates: tuple[str, str] = ("", "")

    @property
    def may_depend(self) -> bool:
        """Whether frames may read what others write, which is seen when they have written it."""
        return bool(self.project.reads) and self.plan.animation and not self.options.in_order

    @property
    def texts(self) -> dict[str, str]:
        """POV-Ray's text files by their keys."""
        return {key: name for key, name in self.pov.values.items() if key in TEXT_FILES}

    def destination(self, frame: int) -> Path:
        """Return where POV-Ray would have put the image of a frame."""
        return self.directory / self.plan.output_name(frame)

    @property
    def goes_on(self) -> bool:
        """Whether images that are there are to be left alone (+C)."""
        return self.pov.values.get("Continue_Trace") == "On"

    def state(self, frame: int) -> Path:
        """Return where POV-Ray would have put what is done of a frame that it was stopped in."""
        return self.destination(frame).with_suffix(".pov-state")

    @property
    def chosen(self) -> str:
        """The frames to render, as text; none when they are all."""
        return self.plan.listed(self.frames) if len(self.frames) < len(self.plan.frames) else ""

    def ordered(self) -> Draft:
        """Return the same job with its frames rendered in order."""
        values = self.pov.values
        if self.chosen:  # begins with the first of them, as with +SF
            values = {**values, "Subset_Start_Frame": str(self.frames[0])}
        return replace(self, pov=replace(self.pov, values=values),
                       options=replace(self.options, in_order=True, first="", order="forward"))

    def over(self, project: Project) -> Draft:
        """Return the same job over the files of a project."""
        values = {**self.pov.values, **project.values, "Input_File_Name": project.scene}
        noted = {use for use in self.pov.uses
                 if use.startswith(("povray ", "append ", "create_ini "))}
        if project.scene != self.pov.values["Input_File_Name"]:
            # The images are named after the scene as it is called here.
            values["Output_File_Name"] = self.plan.stem + self.plan.extension
        # Files that go along and whose computed names the scene may append to.
        begins = tuple(use.removeprefix("appends ") for use in project.uses
                       if use.startswith("appends ") and use != "appends ")
        names = (os.path.relpath(file.path, project.run_dir).replace(os.sep, "/")
                 for file in project.manifest.files) if begins else ()
        noted |= {f"append {name}" for name in names if name.startswith(begins)}
        pov = replace(self.pov, values=values, library=project.library,
                      run_dir=project.run_dir, uses=tuple(sorted(project.uses | noted)))
        return replace(self, pov=pov, project=project)


@command("render", "[POVRAY ARGUMENTS | DIRECTORY | PROJECT.zip]",
         "render here and now, with every core; --lan lets other computers help", ("job",))
def render(options: Options) -> int:
    """The whole farm for one job: coordinator, worker, job, images in their places."""
    launcher = make_launcher()  # before the first thread
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(_scratch())
        stack.callback(launcher.close)
        engine = locate_engine(options.povray)
        probe = _Background(functools.partial(probed, engine, launcher))
        ours = _Renderer(options, probe.join() if options.lan else engine, probe.join)
        draft = _draft(options, scratch, ours)
        _check_destination(draft, options)
        if draft.creates[0]:  # before it renders, as POV-Ray does
            (draft.directory / draft.creates[0]).write_text(draft.creates[1], encoding="utf-8")
        draft = _left_to_do(draft, options)
        if not draft.frames:
            return _all_there(draft, options)
        coordinator = _private_farm(options, scratch, draft)
        coordinator.start()
        stack.callback(coordinator.stop)
        client = _client_of(coordinator)
        worker = stack.enter_context(_joined(
            client, (launcher, ours.engine or engine), options, scratch,
            draft.place or coordinator.store.blob_path))
        job, event = _submit(client, draft, coordinator.scheduler)
        here = _Here(coordinator, worker, (probe, _Background(worker.run)))
        return _Follower(client, draft, options, here).follow(job, event)


@command("serve", "", "start a coordinator: it holds the jobs, the page and the images")
def serve(options: Options) -> int:
    """Coordinate until stopped."""
    keep_private(options.data)
    with contextlib.ExitStack() as stack:
        tools = stack.enter_context(_tools(options)) if options.work else None
        coordinator = Coordinator(
            options.data, bind=options.bind, port=options.port, name=options.name,
            discovery_port=None if options.no_discovery else options.discovery_port,
            admit_private=options.open, private=options.private, hosts=options.host.split(","),
            tls=_tls_files(options), lease_time=options.lease_time, httpov=options.httpov,
            sheepit=options.sheepit,
            renderonline=_online_rules(options) if options.renderonline else None,
            allowance=Allowance(**{name: getattr(options, row.name.replace("-", "_"))
                                   for name, row in ALLOWANCES.items()}),
            typed=_command_typed)
        coordinator.start()
        stack.callback(coordinator.stop)
        code = coordinator.access.add("", Role.USER, {}, secrets.token_hex(16), options.invite) \
            if options.invite else ""
        _greet(coordinator, options, tools and tools[1], code)
        if tools:
            worker = stack.enter_context(_joined(
                _client_of(coordinator), tools, options, options.data, coordinator.store.blob_path))
            threading.Thread(target=_work_here, args=(worker,), daemon=True).start()
        stop = threading.Event()
        _Signals(stop.set)
        while not stop.wait(1):  # a signal that reaches another thread wakes nobody here
            pass
        return 130


@command("work", "", "start a worker: it finds the coordinator and renders until stopped")
def work(options: Options) -> int:
    """Render for a coordinator; the first Ctrl-C finishes the frames under way."""
    keep_private(options.data)
    with contextlib.ExitStack() as stack:
        tools = stack.enter_context(_tools(options))
        stop = threading.Event()
        signals = _Signals(stop.set)
        client = _find_coordinator(options, stop)
        if client is None:
            return 130
        _come(client, options)
        free = "" if landlock_abi() else "this system cannot confine them (it has no Landlock)"
        if options.unconfined:
            free = "--unconfined was given"
        elif free and not client.token:
            raise UserError(f"nobody vouches for the scenes of this farm, and {free}: give the "
                            "farm's --key, or say --unconfined to let them do what you can do")
        try:
            worker = stack.enter_context(
                _joined(client, tools, options, options.data, stop=stop))
        except ServerGone:
            if not signals.count:
                raise
            return 130
        signals.action = worker.stop
        if signals.count:  # while it joined
            return 130
        threading.Thread(target=listen_for_hints, name="hints", daemon=True,
                         args=(worker.client.hurry, options.discovery_port)).start()
        if free:
            _say(f"scenes can read and write whatever you can: {free}")
        if sys.platform != "win32" and os.geteuid() == 0:
            _say("this worker runs as root, so a hole in its confinement would open the whole "
                 "computer: let it run as another user")
        _Background(worker.run).join()
        lost = len(worker.outbox) + worker.outbox.given_up
        _say(f"rendered {counted(worker.outbox.taken, 'frame')}" + (
            f"; {lost} more did not reach the coordinator and will be rendered again"
            if lost else ""))
        return 130 if signals.count else 0


@command("submit", "[POVRAY ARGUMENTS | DIRECTORY | PROJECT.zip]",
         "queue a job and print its number", ("talk", "job"))
def submit(options: Options) -> int:
    """Send a project to a coordinator that runs already."""
    if "output" in options.typed and not options.wait:
        raise UserError("--output needs --wait, which puts the images there; without it, get them "
                        "later: povfarm.py fetch JOB --output DIR")
    client = _coordinator(options)
    with _scratch() as scratch:
        draft = replace(_draft(options, scratch, _Renderer(options, _engine_here())),
                        keeps_files=False)
        if options.wait and options.output is not None:
            owners = _Owners(options.output, options.data)
            draft = _left_to_do(
                replace(draft, directory=options.output, plan=_flat(draft.plan), keeps_files=True,
                        owners=owners), options)
            if not draft.frames:
                return _all_there(draft, options)
            owners.check(map(draft.plan.output_name, draft.frames))
            options.output.mkdir(parents=True, exist_ok=True)
        elif draft.goes_on:
            _say("+C does nothing here: with --wait --output DIR, images that are in DIR are not "
                 "rendered again")
        job, event = _submit(client, draft)
        try:
            if not options.json or not options.wait:
                print(json.dumps({"id": job}) if options.json else job, flush=True)
            if options.wait:
                return _Follower(client, draft, options).follow(job, event)
        except KeyboardInterrupt:
            raise Stopped(_goes_on(job, options)) from None
        try:
            why = client.get(f"/api/v1/jobs/{job}")["waiting_for"]
        except RequestRefused as error:  # a program that submits, and does not look
            if error.status != 403:
                raise
            why = ""
        if why:
            _say(f"job {job} waits: {why}")
    return 0


@command("status", "[JOB ...]", "show the jobs, or all about one", ("talk",))
def status(options: Options) -> int:
    """Print jobs; with --watch again after every change."""
    client = _coordinator(options)
    if options.watch:
        client.keep_trying(_say, threading.Event())
    named = [job["id"] for text in options.rest for job in _jobs(client, text, newest=True)]
    while True:
        farm = client.get("/api/v1/farm")
        if farm["notice"]:
            _say(farm["notice"])
        if options.mine and not farm["you"]:
            raise UserError("the farm does not know you: come by an invitation, with --code")
        mine = f"?owner={urllib.parse.quote(farm['you'], safe='')}" if options.mine else ""
        jobs = ([client.get(f"/api/v1/jobs/{job}") for job in named]
                or client.get(f"/api/v1/jobs{mine}")["jobs"])
        if _is_one(options.rest):
            _show(options, jobs[0], _job_facts(jobs[0], None if options.server else options.data))
        else:
            _show(options, jobs, _job_table(jobs))
        if not options.watch:
            return 0
        client.request("GET", f"/api/v1/events?after={farm['event']}&wait=30", timeout=60)


@command("workers", "[remove NAME|ID]", "show the workers, or remove one", ("talk",))
def workers(options: Options) -> int:
    """Print the workers and what they do, or what was done."""
    client = _coordinator(options)
    if options.totals:
        return _show_totals(client, options)
    views = client.get("/api/v1/workers")["workers"]
    if options.rest:
        return _remove_worker(client, views, options)
    rows: list[Sequence[str] | str] = [
        ("id", "name", "state", "cores", "runs", "POV-Ray", "address")]
    for view in views:
        code = f" (code {view['code']})" if "code" in view else ""
        rows.append((str(view["id"]), view["name"], view["state"] + code, str(view["cores"]),
                     str(view["runs"]), view["engines"].get("povray", ""), view["address"]))
        rows += [view["reason"]] if "reason" in view else []
    _show(options, views, _table(rows, 1) if views else
          _typed("no worker has joined: start one with 'povfarm.py work'"))
    return 0


def _show_totals(client: Client, options: Options) -> int:
    totals, texts = client.get("/api/v1/totals"), []
    for kind, views in totals.items():
        rows = [(kind[:-1], "frames", "time", "failed tries")]
        rows += [(view["name"] or "-", said_frames(view["frames"]), format_duration(view["wall"]),
                  f"{view['failures']:,}") for view in views]
        texts.append(_table(rows, 0))
    _show(options, totals, "\n\n".join(texts))
    return 0


def _remove_worker(client: Client, views: Sequence[dict[str, Any]], options: Options) -> int:
    rest = options.rest
    if rest[0] != "remove" or len(rest) != 2:
        raise UserError(_usage(_command("workers")[0]))
    found = [view for view in views if rest[1] == str(view["id"])] or [
        view for view in views if rest[1] == view["name"]]
    if len(found) != 1:
        raise UserError(f"there {'is no worker' if not found else 'are several workers'} called "
                        f"'{rest[1]}': take the id from 'povfarm.py workers'")
    client.request("DELETE", f"/api/v1/workers/{found[0]['id']}")
    _tell(options, {"id": found[0]["id"], "name": found[0]["name"], "state": "removed"},
          f"{found[0]['name']} is removed; its frames go to others. A worker that has the farm key "
          "can come again: to keep it out, make a new key (see the manual)")
    return 0


@command("logs", "JOB [FRAME]", "show what POV-Ray printed for a frame, the error first",
         ("talk",))
def logs(options: Options) -> int:
    """Print the text of every attempt at a frame; without one, of the frame that failed."""
    client, (word, *frames) = _coordinator(options), options.rest
    job, *others = _jobs(client, word, newest=True)
    if others:
        raise UserError(f"'{word}' are {1 + len(others)} jobs: name one")
    frame = frames[0] if frames else _frame_to_see(client, job["id"])
    if not re.fullmatch(r"[0-9]{1,15}", frame):
        raise UserError(f"'{frame}' is not the number of a frame")
    reply = client.request("GET", f"/api/v1/jobs/{job['id']}/frames/{frame}/log")
    text = reply.body.decode("utf-8", "replace")
    _show(options, {"job": job["id"], "frame": int(frame), "log": text}, text.removesuffix("\n"))
    return 0


def _frame_to_see(client: Client, job: int) -> str:
    """Return the only frame of a job, or the first that failed."""
    view = client.get(f"/api/v1/jobs/{job}")
    if view["failure"] and view["frames"]["total"] > 1:
        return str(view["failure"]["frame"])
    frames = client.get(f"/api/v1/jobs/{job}/frames?limit=2")["frames"]
    if len(frames) > 1:
        raise UserError(f"job {job} has {view['frames']['total']} frames, and none failed: name "
                        f"one, such as 'povfarm.py logs {job} {frames[0]['frame']}'")
    return str(frames[0]["frame"])


@command("fetch", "JOB ...", "get the finished images of a job", ("talk",))
def fetch(options: Options) -> int:
    """Copy finished images that are not here yet into --output or NAME-frames."""
    _check_films(options)
    client = _coordinator(options)
    client.keep_trying(_say, threading.Event())
    jobs = [job for word in options.rest for job in _jobs(client, word, newest=True)]
    if len(jobs) > 1 and (options.apng or options.video):
        raise UserError("a film is made of one job: name one")
    try:
        told = [_fetch_job(client, job, options) for job in jobs]
    except KeyboardInterrupt:
        raise Stopped(f"stopped; get the rest with: {_again(options)}") from None
    if options.json:
        print(json.dumps(told[0] if _is_one(options.rest) else told))
    return 0


def _fetch_job(client: Client, view: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Get what is new of a job and make its films; return what ``fetch --json`` prints of it."""
    job, total = view["id"], view["frames"]["total"]
    directory = options.output or _own_directory(view, options.data)
    done = list(_finished_frames(client, job))
    owners = _Owners(directory, options.data)
    owners.begin(view)
    owners.check(file["path"] for file in _written(client, job))
    strange = owners.claim([file["name"] for file in done])
    frames = [_place_of(directory, frame["name"]) for frame in done]
    fetched = []
    for frame, path in zip(done, frames):
        if frame["name"] in strange and not _has_hash(path, frame["sha256"]):
            raise UserError(f"{path} is here and not of this job: name another directory with "
                            "--output, or delete what is there")
        fetched += _fetch(client, f"/api/v1/jobs/{job}/frames/{frame['frame']}/image", directory,
                          frame["name"], frame["sha256"])
    if not options.json:
        print(f"{len(fetched)} new of {counted(len(frames), 'finished image')} in {directory}"
              if frames else
              one_line(f"job {job} ({view['name']}) is {view['state']}: none of its images is "
                       "finished"),
              flush=True)
    fetched += _fetch_written(client, job, directory, owners)
    if total > len(frames) and (options.apng or options.video):
        raise FarmError(f"{total - len(frames)} of {total} frames are not finished: there can be "
                        "a film when all are")
    return {"job": job, "directory": str(directory), "files": fetched,
            "films": _make_films(frames, options)}


@command("pause", "JOB ...", "hand out no more of a job", ("talk",))
@command("resume", "JOB ...", "go on with a paused job", ("talk",))
@command("cancel", "JOB ...", "end a job; its finished images stay", ("talk",))
def steer(options: Options) -> int:
    """Pause, resume or cancel jobs."""
    return _ask_each(options, options.rest, "POST", f"/{options.command}", {})


@command("retry", "JOB [FRAMES]", "render the failed and cancelled frames again, or those named",
         ("talk",))
def retry(options: Options) -> int:
    """Render frames again: those that failed, or any."""
    job, *frames = options.rest
    if not frames:
        return _ask_each(options, [job], "POST", "/retry", {})
    return _ask_each(options, [job], "POST", f"/retry?frames={urllib.parse.quote(frames[0])}", {},
                     f": frames {frames[0]} are rendered again")


@command("delete", "JOB ...", "delete a job and its images from the farm", ("talk",))
def delete(options: Options) -> int:
    """Delete jobs."""
    return _ask_each(options, options.rest, "DELETE")


@command("set", "JOB ... [KEY=VALUE ...]",
         "change how a job is treated, such as --retries 5 or retries=5", ("talk",))
def set_option(options: Options) -> int:
    """Change the options of jobs, which are called and written as ``submit`` has them."""
    jobs, changes = _assigned(options, options.rest, JOB_OPTIONS)
    if not jobs or not changes:
        raise UserError(_usage(_command("set")[0]))
    return _ask_each(options, jobs, "PATCH", body=changes, said=f": {_options_of(changes)}")


def _assigned(options: Options, words: Sequence[str],
              rows: Mapping[str, Setting]) -> tuple[list[str], dict[str, Any]]:
    """Separate the words that are no KEY=VALUE of these rows from what is set, also by options."""
    names = {key: name for name, row in rows.items() for key in (name, row.name)}
    changes = {name: getattr(options, row.name.replace("-", "_"))
               for name, row in rows.items() if row.name in options.typed}
    others = []
    for word in words:
        name, equals, text = word.partition("=")
        option = names.get(name) or names.get(name.replace("_", "-"))
        if not equals:
            others.append(word)
        elif option is None:
            known = ", ".join(row.name for row in rows.values())
            raise UserError(f"'{name}' cannot be set: there are {known}")
        else:
            changes[option] = rows[option].parse(text, name)
    return others, changes


@command("admit", "CODE", "admit the worker that shows this code", ("talk",))
def admit(options: Options) -> int:
    """Admit a pending worker."""
    worker = _coordinator(options).request(
        "POST", "/api/v1/workers/admit", json={"code": options.rest[0]}).json()
    _tell(options, worker, f"{worker['name']} may work now")
    return 0


@command("login", "", "print a link that makes a browser yours; with --code, come to a farm first",
         ("talk",))
def login(options: Options) -> int:
    """Print a login link, good once; a person's key that is given is kept."""
    client = _coordinator(options)
    if ":" in options.key:
        _keep(client, options)
    url = client.base_url + client.request("POST", "/api/v1/login", json={}).json()["path"]
    _show(options, {"url": url}, url)
    return 0


@command("users", "[add NAME | invite | set NAME KEY=VALUE ... | remove NAME | token NAME | "
         "password]",
         "show the farm's people and what they have, add, invite, limit or remove some", ("talk",))
def users(options: Options) -> int:
    """Print the people, or change who they are and what they may have."""
    word, *rest = options.rest or ["list"]
    names, limits = _assigned(options, rest, ALLOWANCES)
    count = {"list": 0, "add": 1, "invite": 0, "set": 1, "remove": 1,
             "token": 1, "password": 0}.get(word)
    if count != len(names) or (word == "set" and not limits):
        raise UserError(_usage(_command("users")[0]))
    client = _coordinator(options)
    if word == "list":
        return _show_users(client, options)
    if word == "token":
        return _show_token(client, options, names[0])
    if word == "password":
        who, secret = split_key(client.token)
        login = {"login": urllib.parse.unquote(who) or ADMIN,
                 "password": sheepit_password(secret_hash(secret))}
        _show(options, login, f"-login {login['login']} -password {login['password']}")
        return 0
    if word in ("add", "invite"):
        return _new_users(client, options, names, limits)
    person = f"/api/v1/users/{urllib.parse.quote(names[0], safe='')}"
    if word == "set":
        client.request("PATCH", person, json=limits)
        said = f": {_options_of(limits, ALLOWANCES)}"
    else:
        client.request("DELETE", person)
        said = " is removed, with the workers that came with this key; the jobs stay"
    _tell(options, {"name": names[0], "limits": limits}, names[0] + said)
    return 0


def _show_users(client: Client, options: Options) -> int:
    views = client.get("/api/v1/users")["users"]
    rows: list[Sequence[str] | str] = [("name", "role", "jobs", "frames", "kept", "limits")]
    rows += [(view["name"], view["role"], str(view["jobs"]), str(view["frames"]),
              format_size(view["kept"]), _options_of(
                  {name: most for name, most in view["limits"].items() if most}, ALLOWANCES))
             for view in views]
    _show(options, views, _table(rows) if views else _typed(
        "nobody was added: invite people with 'povfarm.py users invite --uses 30'"))
    return 0


def _show_token(client: Client, options: Options, name: str) -> int:
    """Print what a person types into a RenderOnline client. It is made here, and not sent."""
    views = client.get("/api/v1/users")["users"]
    found = [view for view in views if view["name"].casefold() == name.casefold()]
    if not found or ":" in client.token:
        raise UserError(f"nobody is called '{name}' here: 'povfarm.py users' shows who there is"
                        if not found else "only who has the farm key can make tokens")
    name, token = found[0]["name"], online_token(client.token, found[0]["name"], found[0]["added"])
    _show(options, {"email": name, "token": token}, token)
    return 0


def _new_users(client: Client, options: Options, names: Sequence[str],
               limits: Mapping[str, int]) -> int:
    """Add a person or a program, or invite some; show the key or the code, which is not sent."""
    name, ticket = person_name(names[0]) if names else "", secrets.token_hex(16)
    uses = 0 if name else options.uses
    client.request("POST", "/api/v1/users", json={
        "name": name, "role": options.role, "limits": limits, "ticket": ticket, "uses": uses})
    if name:
        key = person_key(name, client.token, ticket)
        _show(options, {"name": name, "role": options.role, "key": key}, key)
        return 0
    code = invitation_code(client.token, ticket)
    _show(options, {"code": code, "uses": uses, "role": options.role}, code)
    many = f"{uses} people" if uses > 1 else "one person"
    _say(f"{many} may come by this code within a week: each types on another computer "
         f"'povfarm.py work --code {code} --user NAME', or login instead of work to render "
         "nothing there")
    return 0


@command("engines", "", "check and show what RenderOnline's clients can render here")
def engines(options: Options) -> int:
    """Print the engines and argument types of the settings file."""
    rules = _online_rules(options)
    found = [vars(engine) for engine in rules.engines]
    types = {name: f"{kind}, {pattern.pattern}" for name, (kind, pattern)
             in rules.arguments.items()}
    rows: list[Sequence[str] | str] = [("engine", "name", "files", "options")]
    rows += [tuple(map(str, engine.values())) for engine in found]
    kinds: list[Sequence[str] | str] = [("argument", "type and what it matches"), *types.items()]
    _show(options, {"engines": found, "arguments": types}, f"{_table(rows)}\n\n{_table(kinds)}")
    return 0


def _online_rules(options: Options) -> OnlineRules:
    rules = OnlineRules.of(options.renderonline_lines)
    if not rules.engines:
        raise UserError(f"{options.data / 'povfarm.ini'} has no engine for RenderOnline's clients: "
                        "add the lines that the manual shows, under [renderonline]")
    return rules


@command("backup", "DIRECTORY", "copy all data of a coordinator, even while it runs")
def backup(options: Options) -> int:
    """Copy a data directory; ``serve --data`` starts from the copy."""
    to = Path(options.rest[0]).expanduser()
    keep_private(to)
    missing = Store.backup(options.data, to)
    _tell(options, {"directory": str(to), "missing": missing}, "the farm is copied: "
          f"'povfarm.py serve --data {_shell_word(str(to))}' starts from there")
    if missing:
        raise FarmError(f"the farm and the copy lack {counted(len(missing), 'file')}, such as "
                        f"{missing[0]}")
    return 0


@command("discover", "", "show the coordinators on this network", ("talk",))
def discover_command(options: Options) -> int:
    """Print every coordinator that answers within a second and a half."""
    key = _known_key(options)
    found = discover(1.5, None, options.discovery_port)
    proven = {_kept(options).get("farm_id", "")} if ":" in key else {
        farm.farm_id for farm in discover(1.0, key.encode(), options.discovery_port)} \
        if key else set()
    views = [{"name": farm.name, "url": farm.url, "farm_id": farm.farm_id,
              "yours": farm.farm_id in proven} for farm in found]
    rows = [("name", "address", "")]
    rows += [(farm.name, farm.url, "has your key" if view["yours"] else "")
             for farm, view in zip(found, views)]
    _show(options, views, _table(rows) if found else
          _typed("no coordinator answers: start one with 'povfarm.py serve'"))
    return 0 if found or options.json else 1


@command("doctor", "", "check whether this computer is ready to render")
def doctor(options: Options) -> int:
    """Look at everything that the farm needs, and say what is missing."""
    with contextlib.closing(make_launcher()) as launcher:
        checks = {
            "Python": (sys.version_info >= (3, 9), platform.python_version()),
            "POV-Ray": _check_povray(options.povray, launcher),
            "confinement": _check_confinement(options.povray, launcher),
            "disk": _check_disk(options.data),
            f"TCP port {PORT}": _check_port(socket.SOCK_STREAM, PORT),
            "UDP port 2269": _check_port(socket.SOCK_DGRAM, 2269),
        }
    _show(options, [{"check": name, "good": good, "text": text}
                    for name, (good, text) in checks.items()],
          _table([("ok" if good else "NO", name, text) for name, (good, text) in checks.items()]))
    return 0 if all(good for good, _ in checks.values()) else 1


@command("help", "[COMMAND]", "show this, or the options of a command")
def help_command(options: Options) -> int:
    """Print the help."""
    print(_command_help(_command(options.rest[0])[0]) if options.rest else _help())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped."""
    _hold_streams()
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


def _hold_streams() -> None:
    """Open what is closed of stdin, stdout and stderr, lest another file takes its place."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


# --- the command line

def _commands() -> dict[str, tuple[command, CommandFunction]]:
    return {tag.name: (tag, function) for function in [*globals().values()] if callable(function)
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
    if threading.current_thread() is threading.main_thread():
        for number in _stop_signals()[1:]:
            signal.signal(number, signal.default_int_handler)
    tag, function = _command(arguments[0])
    if "--help" in arguments:
        print(_command_help(tag))
        return 0
    options = _parse(tag, arguments[1:])
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING,
                        format="%(message)s", handlers=[_Log()])
    return function(options)


def _parse(tag: command, arguments: Sequence[str]) -> Options:
    """Return every option and, as ``rest``, what is none of ours: POV-Ray's command line."""
    given, rest = _given(tag, arguments)
    values = configured_defaults(os.environ, given.get("data", ""))
    values.update({name: setting(name).parse(text, f"--{name}") for name, text in given.items()})
    if not tag.takes(len(rest)):
        raise UserError(_usage(tag))
    return Options(**{name.replace("-", "_"): value for name, value in values.items()},
                   rest=rest, command=tag.name,
                   typed=given)  # neither from the environment nor from the file


def _given(tag: command, arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the options of a command, as texts by their names, from the rest."""
    rows = {f"--{row.name}": row for row in tag.settings()}
    given: dict[str, str] = {}
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
            given[row.name] = value
    return given, rest


def program_typed(script: str, started: Sequence[str], windows: bool = os.name == "nt") -> str:
    """Return what to type to start ``script`` again, which was started by the words ``started``.

    They are an interpreter with its options and the script, whoever wrote the interpreter:
    the person, or the script's first line.
    """
    path, interpreter, words = Path(script), Path(started[0]), list(started)
    found = shutil.which(path.name)
    if interpreter.is_absolute() and shutil.which(interpreter.name) == started[0]:
        words[0] = interpreter.name
    elif windows and interpreter.is_absolute() and shutil.which("py"):
        words[0] = "py"  # which starts the interpreter by its whole name
    if found and Path(found).parent.resolve() == path.parent.resolve():
        words = [path.name]
    elif not windows and path.name != script and os.access(path, os.X_OK) and (
            path.suffix != ".py" or words[0] == "python3"):
        words = [script]
    return " ".join(_shell_word(word, windows) for word in words)


def _shell_word(word: str, windows: bool = os.name == "nt") -> str:
    """Return a word as a shell takes it, if it can be in double quotes: messages have single."""
    if windows:
        return subprocess.list2cmdline([word])
    plain = shlex.quote(word)
    return plain if plain == word or re.search(r'["$`\\!]', word) else f'"{word}"'


@functools.cache
def _program() -> str:
    """Return how povfarm was started; its plain name where it is a part of another program."""
    script = sys.argv[0]
    if Path(script).stem != "povfarm" and Path(script).resolve() != Path(__file__).resolve():
        return "povfarm.py"
    # Python 3.9 does not tell the words.
    words = getattr(sys, "orig_argv", [sys.executable, *sys.argv])
    return program_typed(script, words[:len(words) - len(sys.argv) + 1])


def _command_typed(name: str) -> str:
    """Return a command as it is typed here, with the options that name the farm which is meant."""
    tag, _ = _commands().get(name, (None, None))
    words = [_program(), *filter(None, [name])]
    mine, given = _commands().get("".join(sys.argv[1:2])), {}
    with contextlib.suppress(UserError):  # which is told elsewhere
        given = _given(mine[0], sys.argv[2:])[0] if mine else {}
    for row in tag.settings() if tag else ():
        text = given.get(row.name) or os.environ.get(row.variable)
        if row.name in _WHICH_FARM and text:
            words += [f"--{row.name}", _shell_word(str(row.parse(text, f"--{row.name}")))]
    return " ".join(words)


def _typed(text: str) -> str:
    return with_commands(text, _command_typed)


def _usage(tag: command) -> str:
    return f"usage: povfarm.py {tag.name} {tag.arguments}".rstrip()


def _help() -> str:
    rows = [_beside(f"  {name:<10}", tag.summary) for name, (tag, _) in _commands().items()]
    program = _program()
    return "\n".join([
        f"povfarm {VERSION}: the render farm for POV-Ray, in one file", "",
        f"usage: {program} COMMAND [--OPTIONS] [POVRAY ARGUMENTS]", "", *rows, "",
        f"  {program} render camera2.ini +W640 +H480    what povray does, sooner",
        f"  {program} serve                             on one computer,",
        f"  {program} work                              on every other one,",
        f"  {program} submit camera2.ini +W640 +H480    and render on all of them", "",
        "What starts with -- is povfarm's; everything else is POV-Ray's own command line.",
        f"'{program} help COMMAND' shows a command's options; docs/manual.md has it all."])


def _command_help(tag: command) -> str:
    lines = [f"usage: {_program()} {tag.name} [--OPTIONS] {tag.arguments}".rstrip(), "",
             _beside("", tag.summary), ""]
    for row in tag.settings():
        default = "" if row.is_flag else row.shown_default
        lines.append(_beside(f"  --{f'{row.name} {row.metavar}':<24}  ",
                             row.help + (f" (default {default})" if default else "")))
    return "\n".join([*lines, "", "Each option is also an environment variable, such as "
                      "POVFARM_DATA."])


COLUMNS = 80  # that tables keep to, in a terminal and in a pipe


def _table(rows: Sequence[Sequence[str] | str], flexible: int | None = None) -> str:
    """Lay out rows of cells; a row that is a text goes below the others, from the second column.

    Where it would be wider than ``COLUMNS``, cells of the column ``flexible`` are shortened.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    widths = [max(map(_columns, column)) for column in zip(*cells)]
    if flexible is not None:
        others = sum(widths) - widths[flexible] + 2 * (len(widths) - 1)
        widths[flexible] = min(widths[flexible], max(COLUMNS - others, 8))
    lines = []
    for row in rows:
        if isinstance(row, str):
            lines.append(_beside(" " * (widths[0] + 2), row))
        else:
            texts = [_shortened(text, width) for text, width in zip(row, widths)]
            lines.append("  ".join(text + " " * (width - _columns(text))
                                   for text, width in zip(texts, widths)).rstrip())
    return "\n".join(lines)


def _beside(label: str, text: str) -> str:
    """Return a text to the right of a label, broken so that it keeps to ``COLUMNS``.

    A command between quotes is only broken where a line does not hold it.
    """
    room, lines = COLUMNS - _columns(label), [""]
    phrases = re.findall(r"'[^']*'\S*|\S+", _typed(text))
    for word in itertools.chain.from_iterable(
            [phrase] if _columns(phrase) <= room else phrase.split() for phrase in phrases):
        if lines[-1] and _columns(f"{lines[-1]} {word}") > room:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while _columns(lines[-1]) > room:
            head = _cut(lines[-1], room)
            lines[-1:] = [head, lines[-1][len(head):]]
    return label + ("\n" + " " * _columns(label)).join(lines)


def _columns(text: str) -> int:
    """Return how wide a terminal shows a text: letters of East Asia take two columns."""
    return sum(map(_column, text))


def _column(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # drawn over the letter before
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _cut(text: str, width: int) -> str:
    """Return what of the beginning of a text fits into so many columns."""
    return text[:sum(end <= width for end in itertools.accumulate(map(_column, text)))]


def _shortened(text: str, width: int) -> str:
    """Return a text in one line, without its middle where it is wider."""
    text = re.sub(r"\s", " ", text)
    if _columns(text) <= width:
        return text
    head = _cut(text, (width - 2) // 2)
    return f"{head}...{_cut(text[::-1], width - 3 - _columns(head))[::-1]}"


def _show(options: Options, data: Any, text: str) -> None:
    print(json.dumps(data) if options.json else plain(text), flush=True)


def _tell(options: Options, data: Any, text: str) -> None:
    """Say what was done, to people or to programs."""
    if options.json:
        print(json.dumps(data))
    else:
        _say(text)


def _say(text: str) -> None:
    _write(f"povfarm: {plain(_typed(text))}\n", sys.stderr)


def _write(text: str, file: Any) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed, and nobody there to read it
        print(text, end="", file=file, flush=True)


class _Log(logging.Handler):
    """What other sections log is said as CLI says things."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a record: in one line what others have said, and then a traceback."""
        record.msg, record.args = one_line(record.getMessage()), None
        _say(self.format(record))


@contextlib.contextmanager
def _scratch(place: Path | None = None, prefix: str = "povfarm-") -> Iterator[Path]:
    """Give a directory that is deleted at the end, in ``place`` or where temporary files belong.

    If this process is killed, the next one deletes it: a lock, unlike the number
    of a process, tells of every living one, those of containers too. Nothing is
    in its file before it is held.
    """
    place = place or Path(tempfile.gettempdir())
    for old in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if not hasattr(os, "getuid") or old.lstat().st_uid == os.getuid():
                with open(old / "lock", "rb") as lock:
                    held = lock.read(1)
                    hold_file(lock)
                if held:
                    shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as scratch, open(
            Path(scratch, "lock"), "wb", buffering=0) as lock:
        hold_file(lock)
        lock.write(b"held")
        yield Path(scratch)


# --- jobs

class _Renderer:
    """The POV-Ray that a command line is for: ``engine``, whose version ``ask`` finds out.

    Without ``ask`` others render, and the words of every version are taken.
    """

    def __init__(self, options: Options, engine: Engine | None,
                 ask: Callable[[], Engine] | None = None) -> None:
        self.engine = engine
        self._ask = ask
        self._version = engine.guess if engine else ""
        if not ask and release(options.povray_version):
            self._version = options.povray_version

    def read(self, arguments: Sequence[str], cwd: Path) -> PovOptions:
        """Read POV-Ray's command line; POV-Ray is asked only where its version matters."""
        if self._ask and not self._version:
            self._know(self._ask())
        pov = self._read(arguments, cwd)
        if self._ask and self.engine and not self.engine.version and (
                pov.needs[0] or pov.stochastic):
            self._know(self._ask())
        elif release(pov.needs[0]) > release(self._version or OLDEST):
            self._version = pov.needs[0]  # whose own INI file comes first
        else:
            return pov
        return self._read(arguments, cwd)

    def library(self, pov: PovOptions) -> tuple[str, ...]:
        """Return the include directories here of the POV-Ray that a command line needs."""
        fits = self.engine and release(self.engine.guess or OLDEST) >= release(pov.needs[0])
        return self.engine.library if self.engine and fits else ()

    @property
    def version(self) -> str:
        """The version of the only POV-Ray that may render, if that is known."""
        return self.engine.version if self._ask and self.engine else ""

    def _know(self, engine: Engine) -> None:
        self.engine, self._version = engine, engine.version

    def _read(self, arguments: Sequence[str], cwd: Path) -> PovOptions:
        program = self.engine.program if self.engine else ""
        version = self._version or OLDEST
        inis = system_ini(version, program)
        if self._ask is None:  # what the POV-Ray here says is better than nothing
            inis += system_ini(OLDEST, program)
        return read_command_line(arguments, cwd, os.environ, inis, version,
                                 strict=bool(self.version))


def _engine_here() -> Engine | None:
    with contextlib.suppress(UserError):
        return locate_engine("")
    return None


def _draft(options: Options, scratch: Path, renderer: _Renderer) -> Draft:
    """Read the command line and the project; nothing is started or changed."""
    here = _here()
    if options.engine:
        return _program_draft(options, scratch, here)
    arguments, cwd, named = _whole_project(options.rest, here, scratch)
    if not arguments:
        raise UserError(f"which scene is it? For example: povfarm.py {options.command} "
                        "scene.pov +W640 +H480")
    pov = renderer.read(arguments, cwd)
    plan = plan_frames(pov)
    if pov.to_stdout and (options.json or options.command == "submit"):
        raise UserError("+O- is for 'render' alone, without --json: name a file with +O")
    frames = plan.chosen(options.frames)
    collect, project, place = _collected(options, pov, cwd, {
        plan.output_name(frame) for frame in frames}, frames, renderer.library(pov), scratch)
    lost = [f"{key}={name} is not written: povfarm keeps the logs"
            for key, name in pov.texts.items() if place is None]
    for warning in (*pov.warnings, *lost, *project.warnings):
        _say(warning)
    in_order = options.in_order
    if in_order is None and plan.animation:
        in_order = _is_in_order(project, pov.values, options)
    if pov.stochastic and options.slices not in ("auto", "off", "1"):
        _say("stochastic anti-aliasing (+AM3) draws other pixels in slices: the picture will not "
             "be quite that of a whole frame")
    limits = JobOptions().changed({
        **{name: getattr(options, row.name.replace("-", "_")) for name, row in JOB_OPTIONS.items()},
        "in_order": False, **({"slices": "off"} if pov.texts and place else {})})
    name = options.name or named or PurePosixPath(pov.scene).stem
    plan, directory = (_flat(plan), here / f"{named}-frames") if named else (plan, cwd)
    if options.command == "render":
        _check_names(pov, plan, directory)
    noted = [f"povray {' '.join(pov.needs)}"] * bool(pov.needs[0])
    if options.command == "submit" and pov.creates[0]:
        noted.append("create_ini {}\n{}".format(*pov.creates))
    values = {**pov.values, **(pov.texts if place else {})}
    if place and PurePosixPath(samples := values.get("Radiosity_File_Name", "")).is_absolute():
        values["Radiosity_File_Name"] = os.path.relpath(samples, cwd)  # it is written with the rest
    job = PovJob(values, pov.declares, pov.library, ".", tuple(noted))
    draft = Draft(name, job, project, plan, frames, directory, limits,
                  pov.to_file and not pov.to_stdout, collect, scratch, place=place,
                  to_stdout=pov.to_stdout, append=pov.append, creates=pov.creates).over(project)
    for version in (options.povray_version, renderer.version):
        if problem := unrenderable(draft.pov, version):
            raise UserError(problem)
    return draft.ordered() if in_order else draft


def _here() -> Path:
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise UserError("the current directory was deleted: go to another one first") from None
    if any("\ud800" <= letter <= "\udfff" for letter in str(here)):
        raise UserError(f"the name of the directory {str(here)!r} is not UTF-8: rename it")
    return here


def _program_draft(options: Options, scratch: Path, here: Path) -> Draft:
    """Read the command line of a job that another program renders than POV-Ray."""
    files = [item for item in options.rest if item[:1] not in "+-" and "=" not in item]
    if len(files) != 1:
        raise UserError(f"{options.engine} renders one file, with all in it: name that")
    pov = read_command_line([item for item in options.rest if item not in files], here, {}, (),
                            strict=False)
    if options.command == "render" and not options.lan and options.engine not in owned_programs(
            OnlineRules.of(options.renderonline_lines, node=True)):
        raise UserError(f"no line 'engine {options.engine}' of {options.data / 'povfarm.ini'} "
                        "names a program that is here: the manual shows one")
    collect = functools.partial(plain_project, real_path(here / files[0]))
    project = collect()
    stem = pov.values.get("Output_File_Name") or PurePosixPath(project.scene).stem
    job = program_job(options.engine, project.scene, pov.values, stem, {})
    limits = JobOptions().changed({
        name: getattr(options, row.name.replace("-", "_")) for name, row in JOB_OPTIONS.items()
        if name != "in_order"})
    return Draft(options.name or PurePosixPath(project.scene).stem, job, project, job.plan,
                 job.plan.chosen(options.frames), here, limits, True, collect, scratch)


def _check_names(pov: PovOptions, plan: FramePlan, directory: Path) -> None:
    """Refuse what an INI file, and not a person, puts where it may not.

    It reaches up to the directory that what was typed has in common with the current one.
    """
    image, ini = pov.values.get("Output_File_Name", ""), pov.creates[0]
    base = top_of(directory, [directory / path for path in
                              {*pov.ini_files, pov.scene} - pov.by_file])
    for key, said, name, fits in (
            ("Output_File_Name", image, plan.output_name(plan.frames[0]), True),
            ("Create_Ini", ini, ini, ini.lower().endswith(".ini"))):
        real = real_path(directory / name)
        inside = real.relative_to(base).parts if base in real.parents else ()
        hot = any(part.startswith(".") or part.lower() == "povray.ini" for part in inside)
        if said and said in pov.by_file and not (fits and inside and not hot):
            raise UserError(f"{key} of an INI file leads to {real}, which only you may name: add "
                            + _shell_word(f"{key}={said}"))


def _collected(options: Options, pov: PovOptions, cwd: Path, outputs: set[str],
               frames: Sequence[int], library: Iterable[str],
               scratch: Path) -> tuple[functools.partial[Project], Project, InPlace | None]:
    """Read which files a scene needs, and where they are when it is rendered in their place."""
    standard = [Path(path) for path in library]
    ini_dirs = [(cwd / name).parent for name in pov.ini_files]
    collect = functools.partial(
        collect_project, pov.scene, pov.library, cwd, options.root, outputs, frames, standard, {},
        ini_dirs, values=pov.values, by_file=pov.by_file,
        ceiling=scratch if scratch in cwd.parents else None,
        made=lambda path: _Owners(path, options.data).noted())
    if options.command != "render" or options.lan:
        return collect, collect(), None
    project, links, directories = scan_in_place(
        pov.scene, pov.library, cwd, outputs, standard, ini_dirs, not options.unconfined)
    tree = Tree(Path(cwd.anchor), directories, links, _readable_places(options, cwd))
    return collect, project, InPlace(scratch / "cache", tree)


def _readable_places(options: Options, cwd: Path) -> tuple[str, ...]:
    """Return what scenes of a render in place may read: all but what is private.

    A hidden place that a person names, or stands in, is not hidden from the scene; fonts are not
    secret, nor is what POV-Ray itself keeps in a home.
    """
    hidden = private_places(options.data)
    home = Path.home().resolve()
    typed = [cwd, *((cwd / item).parent for item in options.rest if item[:1] not in "+-"),
             *(cwd / item[2:] for item in options.rest if item[:2] in ("+L", "-L"))]
    open_ = [path for path in map(real_path, typed)
             if any(place in path.parents or place == path for place in hidden)]
    fonts = [home / ".fonts", home / ".local/share/fonts", home / ".povray"]
    return (*all_but(hidden), *map(str, fonts), *map(str, open_))


def _is_in_order(project: Project, values: Mapping[str, str], options: Options) -> bool:
    """Tell whether the frames of an animation need each other's files, and say so.

    Where the names are not written out, what is written decides (``_better``),
    if somebody waits for that.
    """
    samples = all(values.get(key) == "On" for key in ("Radiosity_From_File", "Radiosity_To_File"))
    certain = samples or "own-output" in project.uses
    waits = options.command == "render" or options.wait
    if not (certain or (project.reads and not waits)):
        return False
    _say(f"the scene {'reads' if certain else 'may read'} files that its frames write: they are "
         "rendered in order on one computer (if they need not be, add --in-order=no)")
    return True


def _whole_project(arguments: Sequence[str], here: Path,
                   scratch: Path) -> tuple[list[str], Path, str]:
    """Turn a directory or zip among POV-Ray's arguments into what it holds.

    Returns the arguments, the directory that they are meant in, and the name
    of the project, empty when there is none.
    """
    alone = len([item for item in arguments if item[:1] not in ("+", "-")]) == 1
    for index, item in enumerate(arguments):
        place = here / item
        whole = is_directory(place)  # which just says no to an option that is too long for a name
        if whole and item.endswith("/") and not alone:
            continue  # POV-Ray's way to name a library directory
        if not item or item[0] in "+-" or not (whole or item.lower().endswith(".zip")):
            continue
        name = real_path(place).name if whole else place.stem
        if not whole:
            place = scratch / "project"
            read_zip(here / item, place)
        found = find_project(place)
        return ([*arguments[:index], quoted(found.name), *arguments[index + 1:]], found.parent,
                name)
    return list(arguments), here, ""


def _flat(plan: FramePlan) -> FramePlan:
    """Return a plan whose files have no directory."""
    return replace(plan, stem=plan.stem.rpartition("/")[2])


def _check_destination(draft: Draft, options: Options) -> None:
    """Fail before anything is rendered where images, films or the log could not be written."""
    log = options.log
    if log is not None and (not _is_writable(log.parent) or log.is_dir()):
        raise UserError(f"the log cannot be written to {log}: name another file with --log")
    if options.apng or options.video:
        if not draft.keeps_files:
            raise UserError("a film is made of image files, and Output_To_File is off")
        try:
            _check_films(options, _images_of(draft, options))
        except FarmError as error:
            raise UserError(str(error)) from None
    directory = draft.destination(draft.plan.frames[0]).parent
    if draft.directory.name.endswith("-frames") and draft.directory == directory and (
            not directory.is_dir()):
        directory.mkdir()
        _Owners(directory, options.data).claim([])  # it belongs to no project
    if draft.keeps_files and not directory.is_dir():
        raise UserError(f"the directory {directory} for the images is not there: make it first")
    sweep_parts(directory.glob(PARTS), 60)  # another computer's processes may write here, too
    if draft.keeps_files and not _is_writable(directory):
        raise UserError(f"the images cannot be written into {directory}: choose another with +O")


def _images_of(draft: Draft, options: Options) -> list[Path]:
    """Return where all images that were asked for are in the end."""
    return [draft.destination(frame) for frame in draft.plan.chosen(options.frames)]


def _left_to_do(draft: Draft, options: Options) -> Draft:
    """Return what +C leaves to render: frames without a whole image, and from where to continue.

    What is done it sees by the images themselves (``_is_there``) and by state files (``_states``).

    Frames that need others are rendered again with them; those in place that
    need nothing but their images only from the first that is missing on.
    """
    if not (draft.goes_on and draft.keeps_files):
        return draft
    with concurrent.futures.ThreadPoolExecutor() as pool:
        there = list(pool.map(functools.partial(_is_there, draft), draft.frames))
    left = [frame for frame, whole in zip(draft.frames, there) if not whole]
    values = draft.pov.values
    in_order = draft.options.in_order or (draft.may_depend and options.in_order is None)
    if left and in_order:
        images_only = "own-output" in draft.pov.uses and not (
            "own-files" in draft.pov.uses or draft.project.reads or options.in_order)
        if draft.place is None or not images_only:
            if any(there):
                _say("frames need files that earlier ones write: all are rendered again, in spite "
                     "of +C")
            return draft
        left = [frame for frame in draft.frames if frame >= left[0]]
        values = {**values, "Subset_Start_Frame": str(left[0])}
    if left and len(left) < len(draft.frames):
        _say(f"{len(draft.frames) - len(left)} of {len(draft.frames)} images are there already")
    states = {} if in_order or options.command != "render" else _states(draft, left)
    return replace(draft, frames=left, states=states, pov=replace(draft.pov, values=values))


def _is_there(draft: Draft, frame: int) -> bool:
    """Tell whether the whole image of a frame is in its place."""
    wanted, path = draft.pov.options, draft.destination(frame)
    try:
        if is_file(path):
            check_image(path, draft.plan.extension, draft.pov.width, wanted.height)
            return True
    except ImageError as error:
        _say(f"{path} is rendered again: {error}")
    return False


def _states(draft: Draft, frames: Iterable[int]) -> dict[int, Path]:
    """Return the files in which POV-Ray left something of these frames."""
    found, options = {}, draft.pov.options
    for frame in frames:
        with contextlib.suppress(OSError), open(draft.state(frame), "rb") as file:
            if copy_state(file, None, region_of(options), block_size(options)).pixels:
                found[frame] = draft.state(frame)
            else:
                _say(f"{draft.state(frame)} is of no use for this picture")
    if found:
        _say(f"going on with what is done of {', '.join(path.name for path in found.values())}")
    return found


def _all_there(draft: Draft, options: Options) -> int:
    """Say that nothing is left to render, and make the films that were asked for."""
    films = _make_films(_images_of(draft, options), options) if options.command == "render" else []
    where = draft.destination(draft.plan.frames[0]).parent
    _show(options, {"job": None, "files": [], "films": films, "seconds": 0.0},
          f"nothing is left to render: all images are in {where} already")
    return 0


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
    for _ in range(TRIES_TO_SEND):
        reply = client.request("POST", "/api/v1/jobs", json={
            "name": draft.name, "pov": draft.pov.to_wire(),
            "manifest": draft.project.manifest.to_wire(), "options": vars(draft.options),
            "ticket": secrets.token_hex(16), "frames": draft.chosen,
        }, timeout=120).json()
        sent = False
        try:
            changed = _send_files(client, draft.project, reply["missing"], farm)
            sent = not changed
        finally:
            if not sent:  # it would wait for ever for its files, which is worse than no job
                with contextlib.suppress(FarmError):
                    client.request("DELETE", f"/api/v1/jobs/{reply['id']}", retry_for=0)
        if sent:
            if farm and not draft.options.in_order:
                for frame, state in draft.states.items():
                    farm.begin_from(reply["id"], frame, state.read_bytes())
            return reply["id"], reply["event"]
        project, left = draft.project.as_it_is_now(draft.scratch, changed)
        draft = replace(draft, project=project)
        if left:
            _say("these files change while they are sent, and are left out as the scene does not "
                 f"name them: {', '.join(left[:5])}{', ...' * (len(left) > 5)}")
    raise FarmError("the project's files change faster than they can be sent: try again when they "
                    "hold still")


TRIES_TO_SEND = 20  # of a project whose files change meanwhile


def _send_files(client: Client, project: Project, missing: Iterable[str],
                farm: Scheduler | None) -> str:
    """Send what the farm does not have; return the hash of a file that it has no more, if any."""
    sources = {file.sha256: project.sources[file.path] for file in project.manifest.files}
    for sha256 in missing:
        source = sources[sha256]
        try:
            if farm is not None:
                farm.put_blob(sha256, file_blocks(source))
            else:
                client.request("PUT", f"/api/v1/blobs/{sha256}", body=source)
        except (FarmError, OSError):
            if isinstance(source, Path) and not _has_hash(source, sha256):
                return sha256
            raise
    return ""


def _has_hash(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def _put_image(image: Path, to: Path) -> None:
    """Put an image that is on this computer in its place, whole or not at all.

    Of a link POV-Ray follows only one that leads to nothing yet.
    """
    with writing(to), placed(to if to.exists() else _end_of(to)) as part:
        link_or_copy(image, part)


def _end_of(path: Path) -> Path:
    """Return the file that a path leads to, there or not; ``OSError`` if that is in a circle."""
    end = real_path(path)
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return end


def _give_up(client: Client, job: int, state: str) -> None:
    """Cancel a job of which something may still be delivered; delete one that has ended."""
    if state == JobState.ACTIVE.value:
        try:
            client.request("POST", f"/api/v1/jobs/{job}/cancel")
            return
        except RequestRefused as error:  # it has ended since it was looked at
            if error.status != 409:
                raise
    client.request("DELETE", f"/api/v1/jobs/{job}")


def _goes_on(job: int, options: Options) -> str:
    """Return how to come by the images of a job that nobody waits for any more."""
    words = [f"--{name}={options.typed[name]}" for name in ("key", "pin") if name in options.typed]
    words += ["--output", str(options.output)] if options.output else []
    return (f"job {job} goes on; get its images with: povfarm.py fetch "
            + " ".join(map(_shell_word, [str(job), *words])))


class _Here(NamedTuple):
    """The farm of a render in this process, and what must not fail while its job is waited for."""

    farm: Coordinator
    worker: Worker
    needs: Sequence[_Background]  # the last one is the worker


_NO_FILE, _NO_PHOTONS = r"Cannot find file '(.+?)',", r"Could not load photon map \((.+?)\)"


class _Follower:
    """Waits for a job, shows its progress, and puts its images in their places as they are done."""

    def __init__(self, client: Client, draft: Draft, options: Options,
                 here: _Here | None = None) -> None:
        self._client = client
        self._draft = draft
        self._options = options
        self._here = here
        self._stop = threading.Event()
        self._bar = ProgressBar(draft.name, sys.stderr)
        self._seen: set[str] = set()  # what POV-Ray said and was shown
        self._notice = ""

    def follow(self, job: int, event: int) -> int:
        """Wait for a job, whose events come after that one; return the command's exit code.

        One that cannot end as POV-Ray would is given up and begun again (``_better``).
        """
        started, signals = time.monotonic(), _Signals(self._stop.set)
        self._client.keep_trying(self._bar.say, self._stop)
        try:
            view = self._watch(job, event)
            while better := self._better(view):
                view = self._watch(*self._begin_again(view, *better))
            self._put_images()
            self._tell(to_the_end=True)
            if self._draft.to_stdout and self._near:
                self._pipe(self._near)
            written = self._bring_written()
            log = self._options.log or (self._keep_log(view) if self._here else None)
            for name in self._missed(view)[:1]:
                view["failure"]["message"] += f"; {self._draft.project.explain(name)[1]}"
        except FarmError as error:
            self._bar.close()
            if self._stop.is_set() and self._here:
                signals.release()
                raise Stopped(self._kept(self._here)) from None
            if self._stop.is_set():
                raise Stopped(_goes_on(self._job, self._options)) from None
            if self._here or getattr(error, "status", 0) == 404:
                raise
            raise FarmError(f"{error}; {_goes_on(self._job, self._options)}") from None
        return _conclude(view, self._files, written, self._draft, time.monotonic() - started,
                         self._options, log)

    def _begin_again(self, view: Mapping[str, Any], draft: Draft, why: str) -> tuple[int, int]:
        """Submit a job anew, as a better one."""
        self._draft = draft
        _give_up(self._client, self._job, view["state"])
        job, event = _submit(self._client, draft, self._here and self._here.farm.scheduler)
        _say(why if self._options.command == "render" else f"{why}: this is job {job} now")
        return job, event

    def _watch(self, job: int, event: int) -> dict[str, Any]:
        """Show what happens after an event until the job has ended, or has to begin again."""
        self._job, self._route = job, f"/api/v1/jobs/{job}"
        # The directory of the images where the coordinator is this process.
        self._near = self._here and self._here.farm.store.job_directory(job, self._draft.name)
        self._files: list[str] = []  # the images that are in their places
        self._over = False  # as the farm said when it was asked last
        self._done: set[int] = set()
        self._put: set[int] = set()
        self._failed: set[int] = set()
        self._untold = list(self._draft.frames)[::-1]  # the next one last
        if self._options.log is not None:
            self._options.log.write_bytes(b"")
        if self._draft.owners:
            self._draft.owners.begin(self._client.get(self._route))
        ended = False
        while not ended:
            self._check_needs()
            if self._bar.due():
                self._show()
            told = self._client.get(f"/api/v1/events?after={event}&wait={self._bar.pause}")
            event = max([event, *(each["id"] for each in told["events"])])
            ended = self._note([each for each in told["events"] if each["job"] == job],
                               told["more"])
            if not ended:
                self._stop.wait(0.05)  # what happens in a moment is told in one answer
        self._bar.close()
        self._check_needs()
        # The farm keeps its newest events only: some may have gone while it could not be reached.
        self._done |= {frame["frame"] for frame in _finished_frames(self._client, job)}
        return dict(self._client.get(self._route))

    def _note(self, events: Sequence[Mapping[str, Any]], more: bool) -> bool:
        """Take what has happened to the job; tell whether that was all."""
        done = len(self._done)
        for frames, state in ((self._done, TaskState.DONE), (self._failed, TaskState.FAILED)):
            frames |= {event["frame"] for event in events if event["what"] == state.value}
        if not self._draft.may_depend:
            self._put_images()
            self._tell()
        elif len(self._done) > done and self._draft.project.read_by_others(self._names_written()):
            return True  # the sooner it is begun again
        return not more and (self._over or any(
            event["what"] in _JOB_ENDS and event["text"] != PAUSED_BY_HAND for event in events))

    def _check_needs(self) -> None:
        for need in self._here.needs if self._here else ():
            need.check()

    def _show(self) -> None:
        view = self._client.get(self._route)
        notice = str(view["notice"] or view["waiting_for"])
        if notice not in ("", self._notice):
            self._bar.say(notice)
        self._notice = notice
        self._over = f"job {view['state']}" in _JOB_ENDS and view["reason"] != PAUSED_BY_HAND
        self._bar.show(view)

    def _put_images(self) -> None:
        """Put the images in their places that are done and not there yet."""
        for frame in sorted(self._done - self._put if self._draft.keeps_files else ()):
            to = self._draft.destination(frame)
            if self._draft.owners:
                self._draft.owners.claim([to.name], replaces=True)
            if self._near is None:
                self._client.download(f"{self._route}/frames/{frame}/image", to)
            else:
                _put_image(self._near / to.name, to)
                self._draft.state(frame).unlink(missing_ok=True)
            self._files.append(str(to))
        self._put |= self._done

    def _tell(self, to_the_end: bool = False) -> None:
        """Show what POV-Ray said of the frames, in their order: up to the first that is not done.

        ``to_the_end`` passes over those, and tells of those that failed, too.
        """
        while self._untold and (to_the_end or self._untold[-1] in self._done):
            frame = self._untold.pop()
            if frame in self._done or frame in self._failed:
                self._show_text(self._log_of(frame, "?plain"))

    def _show_text(self, text: bytes) -> None:
        """Put all that POV-Ray said of a frame into --log, and show what is new in it."""
        if self._options.log is not None:
            with open(self._options.log, "ab") as file:
                file.write(text)
        said = text.decode("utf-8", "replace")
        if not self._options.verbose:
            new = [message for message in remarks_in(said) if message not in self._seen]
            self._seen.update(new)
            said = "".join(new)
        if said:
            self._bar.close()
            _write(plain(said), sys.stderr)

    def _log_of(self, frame: int, query: str = "") -> bytes:
        """Return what POV-Ray printed for a frame."""
        return self._client.request("GET", f"{self._route}/frames/{frame}/log{query}").body

    def _pipe(self, near: Path) -> None:
        """Write the images to stdout, in the order of frames, up to the first that is not there."""
        for frame in itertools.takewhile(self._done.__contains__, self._draft.frames):
            with open(near / self._draft.destination(frame).name, "rb") as image:
                shutil.copyfileobj(image, sys.stdout.buffer)

    def _kept(self, here: _Here) -> str:
        """Stop, and put what a render has made in its place; return how to go on."""
        here.worker.stop(patience=0)  # which hands in what is done of the frames under way
        with contextlib.suppress(FarmError):
            here.needs[-1].join()
        draft = self._draft
        if not draft.keeps_files:
            return "stopped"
        self._client = _client_of(here.farm)  # which was not told to stop
        if not draft.may_depend:
            self._done |= {frame["frame"] for frame in _finished_frames(self._client, self._job)}
            self._put_images()
        states = {} if draft.options.in_order else here.farm.scheduler.states_of(self._job)
        for frame in draft.frames:
            if frame in states:
                _put_image(states[frame], draft.state(frame))
            elif frame not in draft.states:
                draft.state(frame).unlink(missing_ok=True)  # of an earlier render
        if not draft.may_depend:
            self._bring_written()
        again = _again(self._options, *([] if draft.goes_on else ["+C"]))
        return (f"stopped; {len(self._files)} of {len(draft.frames)} images are in their places. "
                f"Go on with: {again}")

    def _better(self, view: Mapping[str, Any]) -> tuple[Draft, str] | None:
        """Return what to begin the job again as, and why; None when it is as good as it gets.

        ``view`` is the job's as it has ended, done or failed, before what its scene
        wrote is brought here. What is returned differs from the draft in what was
        wrong, so that no job is begun again twice for the same reason.
        """
        draft = self._draft
        missed = [name for name in self._missed(view) if draft.project.explain(name)[0]]
        if missed:
            also = [*draft.collect.keywords.get("also", ()), *missed]
            collect = functools.partial(draft.collect, also=also)
            project = collect()
            if project.manifest.key != draft.project.manifest.key:
                return replace(draft, collect=collect).over(project), (
                    f"POV-Ray missed '{missed[0]}', which is here and is sent now")
        names, why = self._names_written(), ""
        old = {name: draft.directory / name for name in names if draft.pov.appends_to(name)
               and f"append {name}" not in draft.pov.uses and is_file(draft.directory / name)
               } if draft.keeps_files else {}
        read = draft.project.read_by_others(names)
        if self._options.in_order is None and draft.plan.animation and not draft.options.in_order \
                and (read or ((names or draft.may_depend) and self._fails_later(view))):
            about = f"write {read}, which others may read" if read else (
                "fail, perhaps for want of a file that others write")
            draft, why = draft.ordered(), (
                f"frames {about}: they are rendered again, in order (if they need not be, add "
                "--in-order=no)")
        loads = [f"load_file {name}" for name in self._missed(view, _NO_PHOTONS)
                 if is_file(draft.directory / name)]
        if draft.place and loads and loads[0] not in draft.pov.uses:
            draft = replace(draft, pov=replace(draft.pov, uses=(*draft.pov.uses, *loads)))
            why = why or ("POV-Ray looked for photons elsewhere: the scene is rendered again, "
                          "with them")
        if old:
            project = draft.project if draft.place else with_files(draft.project, old)
            uses = (*draft.pov.uses, *(f"append {name}" for name in old))
            draft = replace(draft, project=project, pov=replace(draft.pov, uses=uses))
            why = why or (f"the scene may append to {next(iter(old))}, which is here already: it "
                          "is rendered again, with that")
        return (draft, why) if why else None

    def _missed(self, view: Mapping[str, Any], words: str = _NO_FILE) -> list[str]:
        """Return the names that POV-Ray did not find for the frame that failed."""
        if view["failure"] is None:
            return []
        text = self._log_of(view["failure"]["frame"]).decode("utf-8", "replace")
        # It breaks lines at 80 columns: at blanks where there are any.
        whole = (re.sub(r"\r?\n ", between, text) for between in (" ", ""))
        return list(dict.fromkeys(
            name for text in whole for name in re.findall(words, text)))

    def _fails_later(self, view: Mapping[str, Any]) -> bool:
        """Tell whether frames failed, but not the first, which may be under way in a pause."""
        return bool(view["frames"]["failed"]) and (
            self._client.get(f"{self._route}/frames?after=-1")["frames"][0]["state"]
            != TaskState.FAILED.value)

    def _keep_log(self, view: Mapping[str, Any]) -> Path | None:
        """Keep what POV-Ray printed for a frame that failed, beside where its image would be.

        A file of that name is overwritten only if it is such a log, too.
        """
        failure = view["failure"]
        if failure is None or view["state"] == JobState.DONE.value:
            return None
        text, image = self._log_of(failure["frame"]), self._draft.destination(failure["frame"])
        with contextlib.suppress(OSError):
            for number in itertools.count(1):
                log = image.with_name(f"{image.stem}{f'-{number}' if number > 1 else ''}.log")
                if not log.exists() or b"--- frame " in log.read_bytes():
                    log.write_bytes(text)
                    return log
        return None

    def _names_written(self) -> list[str]:
        if self._draft.place is not None:
            return self._draft.place.written(self._job)
        return [file["path"] for file in _written(self._client, self._job)]

    def _bring_written(self) -> list[str]:
        """Put what the scene wrote in its place; return where that is."""
        draft = self._draft
        if draft.place is not None:
            copies = _whole_texts(draft.place.take(self._job), draft, draft.place.root)
            return _bring(copies, draft, private_places(self._options.data))
        named = {*draft.project.writes, *draft.texts.values(), draft.creates[0]}
        return (_fetch_written(self._client, self._job, draft.directory, draft.owners, named)
                if draft.keeps_files or self._options.command == "render" else [])


def _again(options: Options, *more: str) -> str:
    """Return the command that was typed, with more words, as messages have it."""
    words = [f"--{name}" if setting(name).is_flag and text == "on" else f"--{name}={text}"
             for name, text in options.typed.items() if name not in _WHICH_FARM]
    words += ["--"] * any(word.startswith("--") for word in options.rest) + options.rest
    return f"povfarm.py {options.command} " + " ".join(map(_shell_word, (*words, *more)))


_JOB_ENDS = frozenset(f"job {state}" for state in ("done", "failed", "cancelled", "paused"))


def _conclude(view: dict[str, Any], files: list[str], written: list[str], draft: Draft,
              seconds: float, options: Options, log: Path | None = None) -> int:
    """Say how a job ended, make the films of its images, and return the exit code."""
    counts, films = view["frames"], []
    done = view["state"] == JobState.DONE.value
    if done and options.command == "render":
        films = _make_films(_images_of(draft, options), options)
    if options.json:
        print(json.dumps({"job": view, "files": files + written, "films": films,
                          "seconds": round(seconds, 3)}))
    elif done:
        print(f"{_made(counts['total'], files, written, draft, options)}, "
              f"{format_duration(seconds)}", file=sys.stderr if draft.to_stdout else sys.stdout)
    if done:
        return 0
    failure, many = view["failure"], counts["total"] > 1
    texts = [f"{counts['failed']} of {counts['total']} frames failed"] * bool(
        counts["failed"] and many)
    if failure:
        texts.append(failure["message"] + (f" (frame {failure['frame']})" if many else "")
                     + (f"\nall that POV-Ray printed is in {log}" if log else ""))
    raise FarmError(": ".join(texts) or f"the job is {view['state']}: {view['reason']}")


def _made(total: int, files: Sequence[str], written: Sequence[str], draft: Draft,
          options: Options) -> str:
    """Return what a job of so many frames has made, and where that is."""
    made = counted(total, "frame")
    where = f" in {Path(files[0]).parent}" if files else ""
    if total == 1:
        made, where = f"1 image{f': {files[0]}' if files else ''}", ""
    if draft.to_stdout:
        where = " on stdout"
    elif not draft.keeps_files and options.command == "render":
        where = "; no file is kept, as Output_To_File is off"
    return made + (f" and {counted(len(written), 'other file')}" if written else "") + where


def _written(client: Client, job: int) -> list[dict[str, Any]]:
    """Return the files that the scene wrote."""
    return list(client.get(f"/api/v1/jobs/{job}/files")["files"])


def _whole_texts(copies: dict[str, Kept], draft: Draft, root: Path) -> dict[str, Kept]:
    """Put the parts of each of POV-Ray's text files together: they are the runs', by frames."""
    folder = draft.destination(draft.frames[0]).parent
    for key, name in draft.texts.items():
        part = re.compile(re.escape(name) + r"\.\d{7}\.part")
        found = sorted((PurePosixPath(path).name, path) for path in copies
                       if part.fullmatch(PurePosixPath(path).name))
        if not found:
            continue
        texts = [copies.pop(path).copy.read_text("utf-8", "surrogateescape") for _, path in found]
        whole = root / secrets.token_hex(8)
        whole.write_text(joined_texts(key, texts, draft.append), "utf-8", "surrogateescape")
        copies[os.path.relpath(folder / name, draft.directory)] = Kept(0, whole, draft.append)
    return copies


def _bring(copies: Mapping[str, Kept], draft: Draft, private: Collection[Path]) -> list[str]:
    """Put what a scene wrote in place where POV-Ray would have left it; return where that is."""
    put, refused, denied = [], [], []
    for name, kept in sorted(copies.items()):
        to = Path(os.path.normpath(draft.directory / name))
        target = real_path(to)  # POV-Ray writes into what a link leads to
        if _may_leave(target, real_path(draft.directory), private):
            try:
                with writing(to):
                    _leave(kept, target)
                put.append(str(to))
            except FarmError as error:  # which is told when all others are there
                denied.append(str(error))
        else:
            refused.append(name)
    _say_left(refused, "a scene replaces no program, INI file or hidden file, and leaves nothing "
              "in hidden or home directories")
    if denied:
        raise FarmError("; ".join(denied[:5]))
    return put


def _leave(kept: Kept, target: Path) -> None:
    """Put what a scene wrote in its place: as POV-Ray does into what is there, or at its end.

    Others may write at the end as well, meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_file(target):
        with open(kept.copy, "rb") as source, open(target, "ab" if kept.added else "wb") as file:
            shutil.copyfileobj(source, file)
    else:
        _put_image(kept.copy, target)


def _say_left(names: Sequence[str], why: str) -> None:
    if names:
        _say(f"{counted(len(names), 'file')} that the scene wrote did not come back, because "
             f"{why}: {', '.join(names[:5])}")


def _is_program(path: Path) -> bool:
    """Tell a file that is there and that makes programs do something."""
    return path.exists() and (path.suffix.lower() == ".ini" or os.access(path, os.X_OK))


def _may_leave(to: Path, base: Path, private: Collection[Path]) -> bool:
    """Tell whether a scene that runs in ``base`` may leave a file there."""
    home, where = real_path(Path.home()), real_path(to.parent)
    hidden = to.name.startswith(".")
    if to.name.lower() == "povray.ini" or (hidden and to.exists()) or _is_program(to):
        return False
    if where in (home, *home.parents) and (hidden or where != base):
        return False
    return not any(place in (where, *where.parents) and place not in (base, *base.parents)
                   for place in private)


def _fetch_written(client: Client, job: int, directory: Path, owners: _Owners | None,
                   named: Collection[str] = ()) -> list[str]:
    """Get the files that the scene wrote and that are not there already; return where they are.

    Of what is there and was never got for this job, only what is ``named`` is replaced.
    """
    fetched, strange, written = [], [], _written(client, job)
    names = [file["path"] for file in written if file["sha256"] and file["path"] not in named]
    unknown = owners.claim(names) if owners else {*names}
    _say_left([file["path"] for file in written if not file["sha256"]],
              f"a frame brings back {MAX_WRITTEN} at most, of {format_size(MAX_WRITTEN_SIZE)}, and "
              "none with a dot in front of its name or outside of the project")
    for file in written:
        path = _place_of(directory, file["path"]) if file["sha256"] else directory
        if not file["sha256"] or _has_hash(path, file["sha256"]):
            continue
        get = _fetch_appended if file["appended"] and is_file(path) else _fetch
        if _is_program(path) or (path.name.lower() == "povray.ini") or (
                get == _fetch and os.path.lexists(path) and file["path"] in unknown):
            strange.append(file["path"])
        else:
            fetched += get(client, f"/api/v1/jobs/{job}/files/{file['sha256']}", directory,
                           file["path"], file["sha256"])
    _say_left(strange, "what is here already may not be of this job (delete it to get the other), "
              "and no program or INI file is replaced")
    return fetched


def _place_of(directory: Path, name: str) -> Path:
    """Return where a file of a farm goes; ``UserError`` where it may lead elsewhere."""
    path = safe_join(directory, name)
    if not may_be_written(name):
        raise UserError(f"the farm has a file {name!r}: with such a name none is put here")
    for place in (path, *path.parents):
        if place == directory:
            break
        if place.is_symlink():
            raise UserError(f"{place} is a link, and nothing is put through links: name another "
                            "directory with --output")
    return path


@contextlib.contextmanager
def _held(directory: Path, name: str) -> Iterator[Path]:
    """Give the place of a farm's file, in directories that nobody can swap for links meanwhile.

    Where the system cannot hold them, they were looked at just before.
    """
    place = _place_of(directory, name)
    with writing(place), contextlib.ExitStack() as stack:
        if sys.platform != "linux":
            place.parent.mkdir(parents=True, exist_ok=True)
            yield place
            return
        directory.mkdir(parents=True, exist_ok=True)
        held = os.open(directory, os.O_DIRECTORY)
        stack.callback(os.close, held)
        for folder in name.split("/")[:-1]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, dir_fd=held)
            held = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=held)
            stack.callback(os.close, held)
        yield Path(f"/proc/self/fd/{held}", place.name)


def _fetch_appended(client: Client, route: str, directory: Path, name: str,
                    sha256: str) -> list[str]:
    """Get a file that a scene appended to, in place of its beginning; beside any other text."""
    path = PurePosixPath(name)
    beside = str(path.with_name(f"{path.stem}-{sha256[:8]}{path.suffix}"))
    fetched = _fetch(client, route, directory, beside, sha256)
    with _held(directory, name) as to, _held(directory, beside) as new:
        old = to.read_bytes()
        with open(new, "rb") as file:
            begins = file.read(len(old)) == old
        if begins:
            os.replace(new, to)
            return [str(directory / name)]
    if fetched:
        _say(f"{directory / name} holds what this job's does not: that is in {directory / beside}")
    return fetched


def _fetch(client: Client, route: str, directory: Path, name: str, sha256: str) -> list[str]:
    """Get a file unless it is there already; return where it is if it was got."""
    with _held(directory, name) as to:
        if is_file(to) and sha256_file(to) == sha256:
            return []
        client.download(route, to, sha256)
    return [str(directory / name)]


def _own_directory(job: Mapping[str, Any], data: Path) -> Path:
    """Return where a job's images go: the directory that it has here already, or a new one."""
    name = _file_name(job["name"])
    places = [Path(f"{name}-frames"), Path(f"{name}-{job['id']}-frames")]
    owners = [_Owners(place, data) for place in places]
    for each in owners:
        each.begin(job)
    fit = ([place for place, each in zip(places, owners) if each.known()]
           or [place for place, each in zip(places, owners) if each.nobody()])
    if not fit:
        raise UserError(f"{places[0]} and {places[1]} have other images: name a directory with "
                        "--output")
    return fit[0]


class _Owners:
    """Whose the images in a directory are, so that no job replaces another one's.

    For each directory, a file below ``data`` has a line for each image: number
    and time of the job, which tell it from those of other farms, too, and the
    name. It is not beside the images, where nothing is that POV-Ray would not write.
    """

    def __init__(self, directory: Path, data: Path) -> None:
        self._directory = directory
        place = hashlib.sha256(os.fsencode(real_path(directory))).hexdigest()[:16]
        self._notes = data / "fetched" / place
        self._read = 0
        self._owners: dict[str, str] = {}
        self._job = ""
        self._ours: set[str] = set()

    def begin(self, job: Mapping[str, Any]) -> None:
        """Go on for a job, which may replace the images of those that it was before."""
        self._job = f"{job['id']} {job['created']}"
        self._ours.add(self._job)

    def known(self) -> bool:
        """Tell whether the job has been here before."""
        self._look()
        return self._job in self._owners.values()

    def noted(self) -> bool:
        """Tell whether the directory was made for images, or a job's were put there."""
        return self._notes.exists()

    def nobody(self) -> bool:
        """Tell whether no job has been here, and nothing is."""
        self._look()
        return not self._owners and not (
            self._directory.exists() and any(self._directory.iterdir()))

    def check(self, names: Iterable[str]) -> None:
        """Raise ``UserError`` when one of these files is here and another job's."""
        self._look()
        for name in names if self._owners else ():
            owner = self._owners.get(name, "")
            if owner and owner not in self._ours and is_file(self._directory / name):
                number = owner.partition(" ")[0]
                raise UserError(f"{self._directory / name} is of job {number}: name "
                                "another directory with --output, or delete what is there")

    def claim(self, names: Sequence[str], replaces: bool = False) -> set[str]:
        """Note that files here are the job's; ``UserError`` when one is another's.

        Those that are here and nobody's are returned, and not noted unless it ``replaces`` them.
        """
        self.check(names)
        strange = {name for name in names if not (replaces or self._owners.get(name))
                   and os.path.lexists(self._directory / name)}
        new = [name for name in names if self._owners.get(name) != self._job
               and name not in strange]
        if new or not self.known():
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            with open(self._notes, "ab") as file:
                file.writelines(os.fsencode(f"{self._job} {name}\n") for name in new or [""])
        return strange

    def _look(self) -> None:
        """Read what was noted since the last look, by others as well."""
        with contextlib.suppress(FileNotFoundError), open(self._notes, "rb") as file:
            file.seek(self._read)
            for line in file:
                if match := re.match(r"(\d+ \S+) (.*)\n", os.fsdecode(line)):
                    self._owners[match[2]] = match[1]
            self._read = file.tell()


def _finished_frames(client: Client, job: int) -> Iterator[dict[str, Any]]:
    after = -1
    while frames := client.get(f"/api/v1/jobs/{job}/frames?after={after}")["frames"]:
        yield from (frame for frame in frames if frame["state"] == TaskState.DONE.value)
        after = frames[-1]["frame"]


def _jobs(client: Client, text: str, newest: bool = False) -> list[dict[str, Any]]:
    """Return the jobs that one word of a command line means, the newest first; one at least.

    The word is a number, a range such as 5-7 (of which some may be missing),
    ``last``, or a name. Of several jobs of one name it is the ``newest``, or
    nobody knows which. ``UserError`` when there is none.
    """
    numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    if numbers:
        low, high = int(numbers[1]), int(numbers[2] or numbers[1])
        listed = _listed(client, high + 1, max(high - low + 1, 1))
        found = list(itertools.takewhile(lambda job: job["id"] >= low, listed))
    else:
        found = list(itertools.islice(_listed(client, limit=1), text == "last"))
    if found:
        return found
    found = [job for job in _listed(client) if job["name"] == text]
    if not found:
        raise UserError(f"there is no job {text if numbers else repr(text)}: "
                        "'povfarm.py status' shows the jobs")
    if len(found) > 1:
        numbers_of = ", ".join(str(job["id"]) for job in found)
        called = f"{len(found)} jobs are called '{text}' ({numbers_of})"
        if not newest:
            raise UserError(f"{called}: give the number of the one that you mean")
        _say(f"{called}: this is the newest")
    return found[:1]


def _listed(client: Client, after: int = 0, limit: int = 100) -> Iterator[dict[str, Any]]:
    """Yield the jobs, the newest first; with ``after`` those of a lower number."""
    while page := client.get(f"/api/v1/jobs?after={after}&limit={min(limit, 100)}")["jobs"]:
        yield from page
        after = page[-1]["id"]


def _is_one(words: Sequence[str]) -> bool:
    """Tell whether words mean one job at most, so that its JSON is no list."""
    return len(words) == 1 and not re.fullmatch(r"\d+-\d+", words[0])


def _ask_each(options: Options, words: Sequence[str], method: str, path: str = "",
              body: Any = None, said: str = "") -> int:
    """Ask the same of every job that is named; one that cannot do it does not stop the others.

    ``said`` is told of those that can, in place of the state that they have then.
    Returns the exit code: 1 when some failed, 2 when the words name no job at all.
    """
    told: list[dict[str, Any]] = []
    for each in _answers(_coordinator(options), words, method, path, body):
        told.append(each)
        if "error" in each or not options.json:
            _say(each.get("error") or f"job {each['job']} ({each['name']})"
                 + (said or f" is {each['state']}"))
    if options.json:
        print(json.dumps(told))
    return 2 if not any("name" in each for each in told) else int(
        any("error" in each for each in told))


def _answers(client: Client, words: Sequence[str], method: str, path: str,
             body: Any) -> Iterator[dict[str, Any]]:
    """Yield what became of each job that was asked something."""
    for word in words:
        jobs = []
        try:
            jobs = _jobs(client, word)
        except UserError as error:
            yield {"job": word, "error": str(error)}
        for job in jobs:
            told = {"job": job["id"], "name": job["name"]}
            try:
                reply = client.request(method, f"/api/v1/jobs/{job['id']}{path}", json=body)
                yield {**told, "state": reply.json()["state"] if reply.body else "deleted"}
            except RequestRefused as error:
                if error.status not in (400, 404, 409):  # the others would hear the same
                    raise
                yield {**told, "error": str(error)}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "job"


def _job_table(jobs: Sequence[dict[str, Any]]) -> str:
    if not jobs:
        return _typed("no jobs: queue one with 'povfarm.py submit'")
    rows: list[Sequence[str] | str] = [
        ("job", "name", "owner", "state", "frames", "", "rate", "left")]
    for job in jobs:
        left = format_duration(job["eta"]) if job["eta"] is not None else ""
        rows.append((
            str(job["id"]), job["name"], _shortened(job["owner"], 12), job["state"],
            f"{job['frames']['done']}/{job['frames']['total']}", f"{100 * job['progress']:.0f} %",
            f"{3600 * job['rate']:.0f}/h" if left else "", left))
        failed = f"{job['frames']['failed']} failed" if job["frames"]["failed"] else ""
        rows += filter(None, (", ".join(filter(None, (failed, _slices_of(job)))), job["why"]))
    return _table(rows, 1)


def _job_facts(job: Mapping[str, Any], data: Path | None) -> str:
    """Return all about a job, a line for each fact; ``data`` may be the coordinator's."""
    frames, failure, pov = job["frames"], job["failure"], job["pov"]
    place = data / job["directory"] if data else None
    states = (f"{frames[state]} {word}" for state, word in (
        ("leased", "in work"), ("failed", "failed"), ("cancelled", "cancelled")) if frames[state])
    facts = {
        "job": str(job["id"]), "name": job["name"], "state": job["state"],
        "reason": job["reason"], "waiting": "" if job["reason"] else job["why"],
        "frames": ", ".join([f"{frames['done']} of {frames['total']} done", *states]),
        "slices": _slices_of(job), "progress": f"{100 * job['progress']:.0f} %",
        "rate": f"{3600 * job['rate']:.1f} frames an hour" if job["eta"] else "",
        "left": format_duration(job["eta"]) if job["eta"] else "",
        "owner": job["owner"], "submitted": _date(job["created"]),
        "started": _date(job["started"]), "finished": _date(job["finished"]),
        "took": format_duration(job["elapsed"]) if job["started"] else "",
        "CPU time": format_duration(job["cpu"]) if job["cpu"] else "",
        "size": f"{job['width']} x {job['height']} pixels, {job['extension']}",
        "POV-Ray": " ".join(filter(None, [job["engine"], f"({job['povray']})"])),
        "options": _options_of({**job, "slices": job["slicing"]}),
        "command": " ".join([f"{name}={value}" for name, value in sorted(pov["values"].items())]
                            + [f"Declare={declare}" for declare in pov["declares"]]),
        "files": f"{job['files']}, {format_size(job['size'])}",
        "written": f"{counted(job['written'], 'file')} of the scene's own" if job["written"]
        else "",
        "images": str(place) if place and place.is_dir() else "",
        "get them": f"'povfarm.py fetch {job['id']}'",
        **({"failure": failure["message"], "its log":
            f"'povfarm.py logs {job['id']} {failure['frame']}'"}
           if failure and job["state"] != JobState.DONE.value else {})}
    return "\n".join(_beside(f"{name:<11}", text) for name, text in facts.items() if text)


def _options_of(values: Mapping[str, Any], rows: Mapping[str, Setting] = JOB_OPTIONS) -> str:
    """Return options of a job or a person as ``set`` takes them, from values by the rows' names."""
    words = {True: "yes", False: "no"}
    return " ".join(f"{row.name}={words[values[name]] if row.is_flag else values[name]}"
                    for name, row in rows.items() if name in values)


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _slices_of(job: Mapping[str, Any]) -> str:
    """Return how many slices of the frames in work are there, for a line about a job."""
    slices = job["slices"]
    return f"{slices['done']}/{slices['total']} slices" if slices["total"] else ""


class ProgressBar:
    """A line that is drawn again on a terminal, or a line now and then in a pipe."""

    def __init__(self, name: str, file: Any) -> None:
        self._name = one_line(name)
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
            line = _cut(line, shutil.get_terminal_size().columns - 1)  # a second row would stay
            _write("\r" + line + " " * (self._width - _columns(line)), self._file)
            self._width = _columns(line)
        elif job["progress"] > 0:
            _write(line + "\n", self._file)

    def line(self, job: Mapping[str, Any]) -> str:
        """Return the line for a job."""
        frames, part = job["frames"], job["progress"]
        filled = int(24 * part)
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if self._terminal else ""
        done = filter(None, [f"{frames['done']}/{frames['total']} frames", _slices_of(job)])
        text = f"{_shortened(self._name, 30)} {bar}{', '.join(done)} {100 * part:3.0f} %"
        if frames["failed"]:
            text += f", {frames['failed']} failed"
        if job["eta"] is not None and part > 0:
            text += f", {job['rate']:.2f}/s, {format_duration(job['eta'])} left"
        return text

    def say(self, text: str) -> None:
        """Print a message where the line is, which comes again below it."""
        self.close()
        _say(text)

    def close(self) -> None:
        """Take the line away."""
        if self._terminal and self._width:
            _write("\r" + " " * self._width + "\r", self._file)


# --- films

def _ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        how = {"darwin": "brew install ffmpeg", "win32": "winget install ffmpeg"}
        raise FarmError("--video needs the program ffmpeg: "
                        + how.get(sys.platform, "sudo apt-get install ffmpeg"))
    return program


def _check_films(options: Options, frames: Sequence[Path] = ()) -> None:
    """Fail where the films that were asked for cannot be made of these images."""
    suffix = frames[0].suffix if frames else ""
    if options.video:
        _ffmpeg()
    if options.apng and suffix not in ("", ".png"):
        raise FarmError(f"an animated PNG is made of PNG images, these are {suffix}: "
                        "--video takes them")
    if options.video and suffix == ".hdr":
        raise FarmError("ffmpeg makes no film of .hdr images: render PNG or EXR for it")
    for film in filter(None, (options.apng, options.video)):
        if not _is_writable(film.parent) or film.is_dir():
            raise FarmError(f"{film} cannot be written: name another file")
        if os.path.realpath(film) in map(os.path.realpath, frames):
            raise FarmError(f"{film} is one of the images: give the film another name")


def _make_films(frames: Sequence[Path], options: Options) -> list[str]:
    """Make the films that were asked for; return where they are."""
    _check_films(options, frames)
    if options.apng:
        with _film(options.apng) as part, open(part, "wb") as file:
            file.writelines(animated_png(frames, len(frames), 1 / options.fps))
    if options.video:
        _make_video(_ffmpeg(), frames, options.video, options.fps)
    return [str(film) for film in (options.apng, options.video) if film]


def _make_video(ffmpeg: str, frames: Sequence[Path], to: Path, rate: Fraction) -> None:
    """Let ffmpeg read the frames under plain numbers: it takes a % in a name for a pattern."""
    kind = frames[0].suffix
    # EXR is the only other type whose values are amounts of light, which ffmpeg would show dark.
    light = ["-apply_trc", "iec61966_2_1"] if kind == ".exr" else []
    with _film(to) as part:
        images = part.parent.with_name("images")
        images.mkdir()
        for number, frame in enumerate(frames):
            link_or_copy(frame.resolve(), images / f"{number}{kind}")
        # Players expect even sizes and colours at half the resolution, and take the colours of
        # large pictures for those of BT.709 where nothing else is said.
        look = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709,format=yuv420p",
                "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
        done = subprocess.run(
            [ffmpeg, "-hide_banner", "-loglevel", "error", "-framerate", str(rate), *light,
             "-i", f"../{images.name}/%d{kind}", *([] if to.suffix == ".gif" else look), part.name],
            cwd=part.parent, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
            # The images come from workers.
            preexec_fn=confined(ffmpeg, str(images), str(part.parent)))
        if done.returncode:
            last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2].strip()
            raise FarmError(
                f"ffmpeg ended with exit code {done.returncode} and said: {last or 'nothing'}")


@contextlib.contextmanager
def _film(to: Path) -> Iterator[Path]:
    """Give a file in an empty directory, which takes its place when it is whole."""
    with writing(to), _scratch(to.parent, ".povfarm-") as scratch:
        part = scratch / "film" / f"film{to.suffix}"
        part.parent.mkdir()
        yield part
        os.replace(part, to)
    _say(f"made {to}")


# --- farms and workers

def _private_farm(options: Options, scratch: Path, draft: Draft) -> Coordinator:
    data = scratch / "farm"
    if not options.lan:
        return Coordinator(data, port=None, name=draft.name, durable=False)
    # Workers that know this user's farm key may help without being asked for.
    data.mkdir()
    atomic_write(data / "farm.key", farm_key(options.data).encode(), 0o600)
    coordinator = Coordinator(data, name=draft.name, durable=False, typed=_command_typed,
                              private=True, discovery_port=options.discovery_port)
    url = f"http://{own_addresses()[0]}:{coordinator.port}"
    _say(f"others help with: povfarm.py work --server {url} (and to let them in, here: povfarm.py "
         f"admit --server {url} CODE, with the code that they show)")
    return coordinator


def _client_of(farm: Coordinator) -> Client:
    """Return a client of a farm in this process."""
    inside = Within(farm.server) if isinstance(farm.server, Inside) else None
    return Client(farm.url, farm.key, fingerprint=farm.pin, transport=inside)


@contextlib.contextmanager
def _tools(options: Options) -> Iterator[_Tools]:
    """Be the only worker of this name over a data directory, or refuse; give what renders."""
    place = options.data / "workers"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / f"{_file_name(_worker_name(options))}.lock", "ab") as lock:
        try:
            hold_file(lock)
        except OSError:
            raise FarmError("a worker runs on this computer already, and uses all of its cores: "
                            "another one beside it needs a --worker-name of its own") from None
        with contextlib.closing(make_launcher(options.nice)) as launcher:  # before any thread
            yield launcher, probed(locate_engine(options.povray), launcher)


@contextlib.contextmanager
def _joined(client: Client, tools: _Tools, options: Options, home: Path,
            near: InPlace | Callable[[str], Path] | None = None,
            stop: threading.Event | None = None) -> Iterator[Worker]:
    """Join a farm as a worker, as the one that this computer was before if it can.

    That is known by the files in ``home``, where projects are kept as well; ``near`` is for
    the ``Cache``, or takes its place. It waits for the coordinator, until ``stop``.
    """
    launcher, engine = tools
    cores = options.cores or _cores()
    programs = owned_programs(OnlineRules.of(options.renderonline_lines, node=True))
    info = {
        "name": _worker_name(options),
        "cores": cores, "memory": total_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "engines": {**(engine.versions() if engine.version else {}), **dict.fromkeys(programs, "")},
        "tags": [tag for tag in options.tags.split(",") if tag],
        "ticket": secrets.token_urlsafe(32),
    }
    own = Client(client.base_url, retry_for=math.inf, transport=client.transport)
    if options.command == "work":
        own.keep_trying(_news(), threading.Event(), longest=30.0)
    farm_id = own.claims(stop)
    kept = _Kept(home / "workers", str(info["name"]), farm_id)
    admitted, code = _admission(own, client.token, kept, info, stop)
    begin = functools.partial(_begin_work, own, engine, programs, options, kept)
    if not admitted:
        _say(f"waiting to be let in: if the status page at {own.base_url} shows the code {code}, "
             f"press Admit there, or type there: povfarm.py admit --server {own.base_url} {code}")
    elif options.command == "work":
        begin()
    projects = near if isinstance(near, InPlace) else Cache(
        home / "cache", options.cache_size, own, near, farm_id)
    bounds = Bounds(None if options.unconfined else (), memory=options.memory or total_memory())
    worker = Worker(own, engine, launcher, projects, cores, options.until_idle, bounds=bounds,
                    admitted=None if admitted else begin, programs=programs)
    try:
        yield worker
    finally:
        worker.stop()
        worker.stop()  # at once


def _admission(own: Client, key: str, kept: _Kept, info: Mapping[str, Any],
               stop: threading.Event | None) -> tuple[bool, str]:
    """Ask a coordinator to be its worker; ``own`` is known to it from then on.

    Tell whether it is let in, and the code if not. A farm that let it in once has to prove it.
    """
    for token in filter(None, (kept.key, key)):
        own.token = token
        try:
            reply = own.request("POST", "/api/v1/workers", json=info, stop=stop).json()
        except (RequestRefused, WrongFarm) as error:
            if getattr(error, "status", 401) != 401 or (
                    token == key or (kept.admitted and not key)):
                raise
            continue
        if token == key:
            secret = worker_secret(secret_hash(split_key(key)[1]), kept.farm_id, info["ticket"])
            own.token = f"{WORKER}{reply['id']}:{secret}"
        if reply["admitted"] or not key:
            return kept.write(own.token, reply["admitted"], kept.code)
    own.token = ""
    while True:
        try:
            return kept.write(*_pair(own, kept.farm_id, info, stop))
        except RequestRefused as error:
            if error.detail != PAIRING_OVER:
                raise


def _pair(own: Client, farm_id: str, info: Mapping[str, Any],
          stop: threading.Event | None) -> tuple[str, bool, str]:
    """Agree with a coordinator on a key; return it, whether that is let in, and the code."""
    mine = Pairing()
    wire = {**info, "commitment": mine.commitment}
    ask = functools.partial(own.request, "POST", "/api/v1/workers", stop=stop)
    theirs = ask(json=wire).json()
    reply = ask(json={**wire, "share": mine.share, "nonce": mine.nonce}).json()
    secret, code = mine.agree(theirs["share"], [
        farm_id, own.transport.pin, info["name"], mine.share, mine.nonce, theirs["share"],
        theirs["nonce"]])
    own.token = f"{WORKER}{reply['id']}:{secret}"
    return own.token, reply["admitted"], code


def _begin_work(client: Client, engine: Engine, programs: Iterable[str], options: Options,
                kept: _Kept) -> None:
    """Say for whom a worker works that was let in, and remember it for the next time."""
    renderers = " and ".join([f"POV-Ray {engine.version}", *programs])
    _say(f"working for {client.base_url} with {renderers} "
         "(Ctrl-C finishes what is under way, twice stops at once)")
    with contextlib.suppress(FarmError, OSError):
        kept.write(client.token, True)
        farm = client.get("/api/v1/farm", retry_for=0)
        known = {name: farm[name] for name in ("name", "farm_id")}
        atomic_write(options.data / "workers" / "farm.json", json.dumps(known).encode())


def _worker_name(options: Options) -> str:
    return str(options.worker_name or socket.gethostname())


class _Kept:
    """What a worker keeps of a farm: its key there, whether it was let in, or else the code."""

    def __init__(self, directory: Path, name: str, farm_id: str) -> None:
        self.farm_id = farm_id
        self.key, self.admitted, self.code = "", False, ""
        self._path = directory / f"{_file_name(name)}-{farm_id}"
        with contextlib.suppress(OSError, ValueError):
            self.key, admitted, self.code = json.loads(self._path.read_bytes())
            self.admitted = bool(admitted)

    def write(self, key: str, admitted: bool, code: str = "") -> tuple[bool, str]:
        """Keep it, in the same file, where a full disk has room; return the latter two."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(0o600)
        self._path.chmod(0o600)
        with open(self._path, "r+", encoding="ascii") as file:
            file.write(json.dumps([key, admitted, code]))
            file.truncate()
        self.key, self.admitted, self.code = key, admitted, code
        return admitted, code


def _work_here(worker: Worker) -> None:
    try:
        worker.run()
    except FarmError as error:
        _say(f"this computer has stopped rendering: {error}")


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


def _greet(coordinator: Coordinator, options: Options, engine: Engine | None,
           code: str = "") -> None:
    """Say where a farm is, and what to type to use it."""
    address, more = coordinator.url, []
    if options.bind in ("", "0.0.0.0", "::"):
        scheme = address.partition(":")[0]
        address, *more = [f"{scheme}://{own}:{coordinator.port}" for own in own_addresses()]
    alone = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "::1", "localhost")
    pin = f" --pin {coordinator.pin}" if coordinator.pin else ""
    login_link = f"{coordinator.url}/login/{coordinator.access.login_code()}"
    lines = [
        f"povfarm '{coordinator.name}' is at {address}" + (
            ", which only this computer can reach" if alone else
            f" (on other networks: {', '.join(more)})" if more else ""),
        f"  control it in a browser:     {login_link}",
        f"  start workers {'here:         ' if alone else 'elsewhere:    '} "
        f"povfarm.py work --server {address}{pin}",
        "  let them in by their codes:  povfarm.py admit CODE",
        *(["  make HTTPov clients join:    mkdir -p ~/.httpovclient && printf 'HP_SERVER=\"%s\"\\n"
           f"HP_GROUP=\"%s\"\\n' {address.removeprefix('http://')} {coordinator.access.guest_key} "
           ">> ~/.httpovclient/prefs"] if options.httpov else []),
        *(["  start SheepIt clients:       java -jar sheepit-client.jar -ui text -server "
           f"{address} -login {ADMIN} -password {sheepit_password(secret_hash(coordinator.key))}"]
          if options.sheepit else []),
        *(["  RenderOnline users' tokens:  povfarm.py users token NAME"]
          if options.renderonline else []),
        *([f"  {options.invite} people can come with:".ljust(31) +
           f"povfarm.py work --server {address} --code {code} --user NAME{pin}\n"
           "                               (or with login instead of work, to render nothing)"]
          if code else []),
        "  queue a job here:            povfarm.py submit scene.pov +W640 +H480",
        f"This computer renders, too (cores: {options.cores or _cores()}, POV-Ray "
        f"{engine.version})."
        if engine else "This computer renders nothing itself. To make it, type in another "
        "terminal:\n                               povfarm.py work",
        "Ctrl-C stops it; nothing is lost."]
    print(_typed("\n".join(lines)), flush=True)


def _kept(options: Options) -> dict[str, str]:
    """Return the farm that this person belongs to: key, farm_id, name, url and pin; or nothing."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if not (options.data / "coordinator.json").exists():  # else it is the admin's
            kept = json.loads((options.data / "person.json").read_bytes())
            return {name: str(kept[name]) for name in ("key", "farm_id", "name", "url", "pin")}
    return {}


def _keep(client: Client, options: Options) -> None:
    """Remember whose key this is and where, for the commands that follow."""
    farm = client.get("/api/v1/farm")
    kept = {"key": client.token, "farm_id": farm["farm_id"], "name": farm["name"],
            "url": client.base_url, "pin": client.fingerprint}
    options.data.mkdir(0o700, parents=True, exist_ok=True)
    atomic_write(options.data / "person.json", json.dumps(kept).encode(), 0o600)
    _say(f"you are {farm['you']} in the farm '{farm['name']}': from now on this computer knows it")


def _come(client: Client, options: Options) -> None:
    """Become one of a farm's people by the code of an invitation, unless one is already."""
    if not options.code:
        return
    if client.token == _kept(options).get("key"):
        with contextlib.suppress(RequestRefused):  # the key is good for nothing any more
            you = str(client.get("/api/v1/farm")["you"])
            if options.user.casefold() in ("", you.casefold()):
                return
    name, ticket = options.user, secrets.token_hex(16)
    with contextlib.suppress(ImportError, LookupError, OSError):  # an account without a name
        name = name or getpass.getuser()
    name = person_name(name)
    secret, mine, client.token = invitation_secret(options.code), Pairing(), ""
    try:
        reply = client.request("POST", "/api/v1/users/come", json={
            "name": name, "ticket": ticket, "share": mine.share,
            "proof": derived(secret, "come", name, ticket, mine.share)}).json()
    except RequestRefused as error:
        if error.status != 400:
            raise
        raise UserError(f"{error}, and give it with --user NAME") from None
    share = want(reply, "share", str)
    if reply.get("proof") != derived(secret, "welcome", name, ticket, share):
        raise FarmError(f"{client.base_url} does not know this code: it is not the farm that you "
                        "were invited to")
    agreed, _ = mine.agree(share, [name, ticket, mine.share, share])
    client.token = person_key(name, agreed, ticket)
    _keep(client, options)


def _key_in(file: str) -> str:
    """Return the key that is in a file, or in standard input."""
    try:
        key = sys.stdin.readline() if file == "-" else Path(file).expanduser().read_text("ascii")
    except (OSError, ValueError) as error:
        raise UserError(f"no key can be read from {file}: {error}") from None
    if not key.strip():
        raise UserError(f"there is no key in {'standard input' if file == '-' else file}")
    return key.strip()


def _known_key(options: Options) -> str:
    if options.key_file and not options.key:
        options.key = _key_in(options.key_file)
    if options.key:
        return str(options.key)
    if kept := _kept(options):
        return kept["key"]
    try:
        return Path(options.data, "farm.key").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _coordinator(options: Options) -> Client:
    client = _find_coordinator(options)
    assert client is not None  # only a wait that was stopped finds none
    _come(client, options)
    return client


def _find_coordinator(options: Options, stop: threading.Event | None = None) -> Client | None:
    """Return a client for the coordinator that is meant.

    With ``stop`` it is waited for; None when that comes first.
    """
    key = _known_key(options)
    patience = 20.0 if stop else 1.0
    if options.server:
        url = _server_url(options.server, bool(options.pin))
        client = _client(options, url, key, "", patience)
        if stop:
            client.keep_trying(_news(), stop)
        try:
            return _check_coordinator(client, options)
        except ServerGone:
            if stop:  # only then it is given up
                return None
            raise
    name = "" if options.command == "submit" else options.name  # there it is the job's
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, FarmError):
        note = json.loads((options.data / "coordinator.json").read_text(encoding="utf-8"))
        if key and name in ("", note["name"]):  # it has to prove that it is the one
            client = _client(options, note["url"], key, note["pin"], patience)
            client.get("/api/v1/farm", timeout=10, retry_for=0)
            return client
    kept = {} if options.key else _kept(options)
    with contextlib.suppress(ServerGone, LookupError, TypeError):
        if kept and name in ("", kept["name"]):
            client = _client(options, kept["url"], key, kept["pin"], patience)
            try:
                farm_id = client.get("/api/v1/farm", timeout=10, retry_for=0)["farm_id"]
            except RequestRefused:  # who was removed may come again
                if not options.code:
                    raise
                farm_id = kept["farm_id"]
            if farm_id == kept["farm_id"]:
                return client
    farm = (look_out(_LookOut(options, key).look, stop, options.discovery_port) if stop
            else _choose(_discover(options, key, name), options, name))
    if farm is None:
        return None
    mine = farm.verified or options.key or farm.farm_id == kept.get("farm_id")
    if options.command == "submit" and not (mine or options.code):
        raise UserError(f"{farm} is the farm that answers here, and does not have your key: it "
                        "would be given your project. If it is the one that is meant, give its "
                        f"key with --key-file, and name it with --server {farm.url}")
    return _client(options, farm.url, key if mine else "", farm.pin, patience)


def _news() -> Callable[[str], None]:
    """Return what says a text unless it has said the same just before."""
    return functools.lru_cache(maxsize=1)(_say)


class _LookOut:
    """How a worker finds its coordinator: whoever else appears, it waits, and says for what."""

    def __init__(self, options: Options, key: str) -> None:
        self._options = options
        self._key = key
        self._last_name = self._last_id = ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            farm = json.loads((options.data / "workers" / "farm.json").read_bytes())
            self._last_name, self._last_id = str(farm["name"]), str(farm["farm_id"])
        kept = _Kept(options.data / "workers", _worker_name(options), self._last_id)
        self._admitted = kept.key if kept.admitted and self._last_id else ""
        self._say = _news()

    def look(self) -> Found | None:
        """Return the coordinator to work for, if it is there now."""
        chosen = self._choose()
        if isinstance(chosen, Found):
            return chosen
        self._say(chosen)
        return None

    def _choose(self) -> Found | str:
        """Return the coordinator to work for, or what is waited for."""
        named = self._options.name
        try:
            found = _discover(self._options, self._key, named)
        except FarmError as error:
            return f"{error}. Waiting for the farm of the key that was given"
        if not found:
            others = _others_than(named, self._options)
            return f"{others}. Waiting for '{named}'" if others else (
                "no coordinator answers yet: waiting for one (start it with 'povfarm.py serve')")
        for farm in found:
            if farm.farm_id == self._last_id and (farm.verified or self._proves(farm)):
                return farm
        if self._admitted and not (named or found[0].verified):
            return (f"waiting for {self._last_name}, which has let this computer in; here is "
                    f"{', '.join(map(str, found))} (--name or --server chooses another)")
        others = ", ".join(map(str, found))
        if len(found) > 1:
            return (f"there are several coordinators: {others}. Waiting until one is alone; "
                    "--name or --server chooses one")
        return found[0]

    def _proves(self, farm: Found) -> bool:
        """Tell whether it is the farm that has let this computer in, as it says."""
        with contextlib.suppress(FarmError):
            client = _client(self._options, farm.url, self._admitted, farm.pin, 0.0)
            with contextlib.suppress(RequestRefused):  # it is removed there, and will be told so
                client.get("/api/v1/farm", timeout=10)
            return True
        return False


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
    if parts.scheme in ("http", "https") and not re.search(r":\d+$", parts.netloc):
        url = parts._replace(netloc=f"{parts.netloc}:{PORT}").geturl()
    return url


def _discover(options: Options, key: str, name: str) -> list[Found]:
    """Return the coordinators that answer; those that hold our key, if any does.

    A key that was typed must be right; one that only lies here may be that of
    another farm, one of this computer.
    """
    known = key and ":" not in key  # else it is a person's, of which coordinators show nothing
    found = discover(1.5, key.encode(), options.discovery_port, name or None) if known else []
    others = [] if found else discover(1.5, None, options.discovery_port, name or None)
    if others and options.key and known:
        raise FarmError(f"{others[0].name} at {others[0].url} has another key than the one given: "
                        "give a copy of that coordinator's farm.key, with --key-file")
    return found or others


def _others_than(name: str, options: Options) -> str:
    """Return in words which farms answer instead of the one that is meant, if any do."""
    others = ", ".join(map(str, discover(1.5, None, options.discovery_port) if name else []))
    return f"no farm called '{name}' answers here; there is {others}" if others else ""


def _choose(found: Sequence[Found], options: Options, name: str) -> Found:
    if not found and (others := _others_than(name, options)):
        raise UserError(f"{others}: choose one with --name or --server")
    if not found:
        raise FarmError("no coordinator answers on this network: start one with "
                        "'povfarm.py serve', or name it with --server URL")
    if len(found) > 1:
        raise UserError("there are several coordinators, choose one with --name or --server: "
                        + ", ".join(map(str, found)))
    return found[0]


def _check_coordinator(client: Client, options: Options) -> Client:
    """Fail, in one line, when there is no coordinator or the key is wrong."""
    ask = functools.partial(client.request, "GET", "/api/v1/farm", timeout=10)
    key = client.token
    try:
        farm = ask().json()
    except (RequestRefused, WrongFarm) as error:
        status = getattr(error, "status", 401)
        if status == 403 or (status == 401 and not key and (
                options.command == "work" or options.code)):
            return client  # a private farm, of which only those see something who were let in
        if status != 401 or options.key or not key:
            raise
        client.token = ""  # a key that only lies here is another farm's
        farm = ask().json()
    if not isinstance(farm, dict) or "farm_id" not in farm:
        raise FarmError(f"{client.base_url} is not a povfarm coordinator")
    return client


class _Signals:
    """Calls ``action`` for every Ctrl-C or SIGTERM, and counts them.

    What a second Ctrl-C does is the action's: ``work`` has ``Worker.stop``, which then
    ends at once; ``render`` lets it end the program (``release``); others ignore it.

    Not by an exception, which would be lost where it hits a ``__del__``, nor
    in the handler itself, which runs in the middle of anything, locks too.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action
        self.count = 0
        for name in _stop_signals():
            signal.signal(name, self._handle)

    def release(self) -> None:
        """Let the next one end the program at once; a terminal that is closed may say so twice."""
        for name in _stop_signals():
            signal.signal(name, signal.SIG_IGN if name == getattr(signal, "SIGHUP", 0)
                          else signal.default_int_handler)
        if self.count > 1:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1
        threading.Thread(target=self._act, args=(self.count,), daemon=True).start()

    def _act(self, count: int) -> None:
        if count == 1:
            _say("stopping")
        self.action()


def _stop_signals() -> list[int]:
    """Return the signals that ask to stop; nohup lets SIGHUP be ignored, which stays so."""
    numbers = [getattr(signal, name, 0) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in numbers[:2 if ignored else 3] if number]


class _Background:
    """A function in a thread whose result or exception comes out of ``join``."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._future.set_result(function())
        except BaseException as error:
            self._future.set_exception(error)

    def join(self) -> Any:
        """Wait for the end; signals are handled while waiting."""
        while not self._future.done():
            concurrent.futures.wait([self._future], timeout=1.0)
        return self._future.result()

    def check(self) -> None:
        """Raise what the function has raised, if it has."""
        if self._future.done():
            self._future.result()


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
    with _scratch() as scratch, socket.create_server(("127.0.0.1", 0)) as server:
        private, place = scratch / "private", scratch / "run"
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
