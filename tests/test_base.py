"""The base: errors, clock, files, paths, sizes, durations, hashes."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import Any, Type

import pytest

import povfarm
from povfarm import (
    Clock,
    FarmError,
    ProtocolError,
    StoreError,
    UserError,
    atomic_write,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    safe_join,
    sha256_file,
)


@pytest.mark.parametrize("kind", [
    UserError, StoreError, povfarm.IllegalTransition, povfarm.StaleLease, povfarm.ImageError,
])
def test_every_error_is_a_farm_error_with_its_text(kind: Type[FarmError]) -> None:
    assert issubclass(kind, FarmError)
    assert str(kind("one line")) == "one line"
    assert kind.exit_code == (2 if kind is UserError else 1)


def test_a_protocol_error_holds_its_status_and_detail() -> None:
    error = ProtocolError(413, "too large", {"limit": 5})
    assert (error.status, str(error), error.detail) == (413, "too large", {"limit": 5})
    assert error.exit_code == 1


# --- the clock

def test_monotonic_time_does_not_go_back() -> None:
    clock = Clock()
    times = [clock.monotonic() for _ in range(1000)]
    assert times == sorted(times)


def test_a_wait_ends_when_it_is_over_or_when_it_is_notified() -> None:
    clock, condition = Clock(), threading.Condition()
    with condition:
        assert clock.wait(condition, 0.001) is False

    def notify() -> None:
        with condition:
            condition.notify_all()

    with condition:
        thread = threading.Thread(target=notify)
        thread.start()
        assert clock.wait(condition, 60) is True
    thread.join()


# --- writing files

def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "note"
    atomic_write(path, b"a long first text")
    atomic_write(path, b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(tmp_path) == ["note"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_atomic_write_never_shows_a_secret_to_others(tmp_path: Path) -> None:
    atomic_write(tmp_path / "key", b"secret", 0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
        step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(povfarm.os, step, full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["note"]


def test_what_is_linked_in_its_place_once_more_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """To rename a file to another name of the same file does nothing."""
    (tmp_path / "image").write_bytes(b"image")
    for _ in range(2):
        with povfarm.placed(tmp_path / "here") as part:
            os.link(tmp_path / "image", part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "image"]


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    atomic_write(tmp_path / ("x" * 255), b"all")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"all"


def test_atomic_writes_at_once_leave_one_of_the_texts(tmp_path: Path) -> None:
    texts = [bytes([65 + n]) * 100_000 for n in range(6)]
    threads = [threading.Thread(target=atomic_write, args=(tmp_path / "x", text))
               for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() in texts
    assert os.listdir(tmp_path) == ["x"]


# --- paths

@pytest.mark.parametrize("name", [
    "a.pov", "a/b/c.png", "name with blanks.inc", "ümläut.png", "..a", "a..b", "...", ".hidden",
    "a~b", "-W640", "$HOME", "con", "a:b", "d/" * 99 + "a",
])
def test_names_inside_a_project_are_taken(name: str, tmp_path: Path) -> None:
    path = safe_join(tmp_path, name, windows=False)
    assert path == tmp_path.joinpath(*name.split("/"))
    assert tmp_path in path.parents


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", [
    "", ".", "..", "/etc/passwd", "a/../../b", "../a", "a/..", "a//b", "a/", "./a", "a/./b",
    "a\\b", "..\\a", "C:\\a", "\\\\host\\share", "a\0b", "a\nb", "a\tb", "a\x1fb",
    "d/" * 100 + "a",  # no way out, but Python could not delete it
])
def test_names_that_could_lead_outside_are_refused(
        name: str, windows: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        safe_join(tmp_path, name, windows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [
    "C:a", "C:/a", "a:stream", "con", "CON", "Nul.png", "aux.tar.gz", "com1", "LPT9.txt", "con .x",
    "a.", "a ", "dir./a", "a?", "a*", 'a"', "a<b", "a>b", "a|b",
])
def test_windows_refuses_the_names_that_it_reserves(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        safe_join(tmp_path, name, windows=True)
    safe_join(tmp_path, name, windows=False)


@pytest.mark.parametrize("name", ["com.png", "com10", "console", "auxiliary.inc", "a.b.c", "nul1"])
def test_windows_takes_names_that_only_look_reserved(name: str, tmp_path: Path) -> None:
    assert safe_join(tmp_path, name, windows=True) == tmp_path / name


# --- hashes, sizes, durations

@pytest.mark.parametrize("size", [0, 1, povfarm.BUFFER - 1, povfarm.BUFFER, povfarm.BUFFER * 2 + 5])
def test_sha256_of_a_file(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size, text", [
    (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.0 kB"), (1500, "1.5 kB"), (99_900, "99.9 kB"),
    (100_000, "100 kB"), (999_000, "999 kB"), (999_999, "1.0 MB"), (2_500_000, "2.5 MB"),
    (3 * 10**9, "3.0 GB"), (4 * 10**12, "4.0 TB"), (5 * 10**15, "5000.0 TB"),
])
def test_sizes_as_people_write_them(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("seconds, text", [
    (-1, "0.0 s"), (0, "0.0 s"), (0.44, "0.4 s"), (9.9, "9.9 s"), (10, "10 s"), (59.4, "59 s"),
    (59.6, "1:00"), (65, "1:05"), (3599, "59:59"), (3599.7, "1:00:00"), (7384, "2:03:04"),
    (100 * 3600, "100:00:00"),
])
def test_durations_as_people_write_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("text, seconds", [
    ("90", 90), ("90s", 90), ("0.5", 0.5), ("1.5s", 1.5), ("5m", 300), ("1h", 3600),
    ("1h30m", 5400), ("30d", 2_592_000), ("1d2h", 93_600), ("1h2m3s", 3723), ("1H 30M".replace(" ", ""), 5400), (" 30s ", 30),
])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "h", "m", "s", "-5", "5x", "1.5h", "30m1h", "inf", "nan",
                                  "1e3", "1:30", "9" * 400, "9" * 400 + "h"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a time"):
        parse_duration(text)


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("512", 512), ("64k", 64_000), ("64kB", 64_000), ("1.5G", 1_500_000_000),
    ("500 MB", 500_000_000), ("2t", 2 * 10**12), ("7b", 7),
])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1x", "1 k b", "1.k", "inf", "1e9", "0x10",
                                  "9" * 400])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)
