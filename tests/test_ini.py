"""INI files that come from Windows and DOS: their paths, marks, letters and ends of lines."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from helpers.base import run_povray
from helpers.farm import run
from helpers.pictures import pixels
from povfarm import UserError, plan_frames, read_command_line

BALL = """#version 3.7; global_settings { assumed_gamma 1 }
camera { location -3*z look_at 0 } light_source { -9, 1 } sphere { 0, 1 pigment { rgb x } }
"""


def read(place: Path, data: bytes) -> "object":
    """Read ball.ini with these bytes in it."""
    (place / "ball.ini").write_bytes(data)
    return read_command_line(["ball.ini"], place, {}, [])


def named(place: Path, data: bytes) -> str:
    """Return what the picture is called after an INI file with these bytes in it."""
    (place / "ball.ini").write_bytes(data)
    return plan_frames(read_command_line(["ball.ini"], place, {}, [])).output_name(0)


@pytest.mark.parametrize(("line", "words"), [
    ('Output_File_Name="D:\\My Pics\\"', "Output_File_Name is a Windows path, D:\\My Pics\\: write "
     "the directory that is meant here, with forward slashes, or give +O"),
    ("+OD:/My", "Output_File_Name is a Windows path, D:/My: write the directory"),
    ("+O..\\out\\", "Output_File_Name is a Windows path, ..\\out\\: write ../out/, or give +O"),
    ("+L..\\lib", "Library_Path is a Windows path, ..\\lib: write ../lib"),
    ("Library_Path=..\\lib", "Library_Path is a Windows path, ..\\lib: write ../lib"),
    ("Library_Path=C:\\POV\\include", "write the directory that is meant here"),
    (".\\scenes\\ball.pov", "Input_File_Name is a Windows path"),
    ("Input_File_Name=scenes\\ball.pov", "Windows path, scenes\\ball.pov: write scenes/ball.pov"),
    ("Include_Ini=sub\\common.ini", "Include_Ini is a Windows path, sub\\common.ini: write sub/common"),
    ("sub\\common.ini", "the INI file is a Windows path, sub\\common.ini: write sub/common.ini"),
    ("Radiosity_File_Name=cache\\a.rca", "write cache/a.rca"),
    ("All_File=log\\all.txt", "write log/all.txt"),
])
def test_paths_of_windows_are_refused_with_their_line(
        line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, b"Input_File_Name=ball.pov\r\nWidth=32\r\n" + line.encode())
    assert str(error.value).startswith("ball.ini, line 3: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_with_a_backslash_that_is_there_is_no_windows_path(tmp_path: Path) -> None:
    (tmp_path / "a\\b").mkdir()
    (tmp_path / "a\\b.pov").touch()
    options = read_command_line(["+La\\b", "+Ia\\b.pov", "+Oout"], tmp_path, {}, [])
    assert options.scene == "a\\b.pov" and "a\\b" in options.library


def test_what_comes_later_takes_the_place_of_a_windows_path(tmp_path: Path) -> None:
    (tmp_path / "ball.ini").write_text('ball.pov\nOutput_File_Name="D:\\Pics\\"\n')
    options = read_command_line(["ball.ini", "+Oout"], tmp_path, {}, [])
    assert options.values["Output_File_Name"] == "out"
    with pytest.raises(UserError, match=r"^argument .*: Library_Path is a Windows path"):
        read_command_line(["ball.ini", "+Oout", "+L..\\lib"], tmp_path, {}, [])


LINES = [b"; made by Notepad", b"Input_File_Name=ball.pov", b"Output_File_Name=gr\xf6\xdfe",
         b"[part]", b"Width=32"]


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n"])
@pytest.mark.parametrize("last", [b"", b"\x1a", b"\r\n\x1a\x1a"])
def test_ends_of_lines_and_of_files_do_not_matter(end: bytes, last: bytes, tmp_path: Path) -> None:
    assert named(tmp_path, end.join(LINES) + last) == "gr\u00f6\u00dfe.png"


@pytest.mark.parametrize(("data", "name"), [
    ("gr\u00f6\u00dfe".encode(), "gr\u00f6\u00dfe.png"), (b"gr\xf6\xdfe", "gr\u00f6\u00dfe.png"),
    (b"it\x92s", "it\u2019s.png"), (b"5\x80", "5\u20ac.png"),
])
def test_letters_are_those_that_were_written(data: bytes, name: str, tmp_path: Path) -> None:
    assert named(tmp_path, b"ball.pov\nOutput_File_Name=" + data) == name


def test_one_line_in_another_encoding_leaves_the_others_alone(tmp_path: Path) -> None:
    data = b"; gr\xf6\xdfer\nball.pov\nOutput_File_Name=" + "gr\u00f6\u00dfe".encode()
    assert named(tmp_path, data) == "gr\u00f6\u00dfe.png"


def test_a_byte_order_mark_is_skipped_and_told_of(tmp_path: Path) -> None:
    (tmp_path / "ball.ini").write_bytes(b"\xef\xbb\xbf; by Notepad\r\nInput_File_Name=ball.pov\r\n")
    options = read_command_line(["ball.ini"], tmp_path, {}, [])
    assert options.scene == "ball.pov"
    assert [text for text in options.warnings if text.startswith("ball.ini begins with a byte order")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_text_is_refused_in_one_line(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^ball\.ini is not plain text.*save it as UTF-8[^\n]*$"):
        read(tmp_path, "ball.pov\nWidth=32\n".encode(encoding))


def test_renders_of_such_files(tmp_path: Path, povray: str) -> None:
    (tmp_path / "ball.pov").write_text(BALL)
    assert run_povray(["ball.pov", "+W32", "+H24", "+Oplain"], tmp_path).returncode == 0
    size = b"Width=32\r\nHeight=24\r\n"
    for name, head, image in (
            ("mark", b"\xef\xbb\xbf; by Notepad\r\nInput_File_Name=ball.pov\r\n", "ball.png"),
            ("latin", b"ball.pov\r\nOutput_File_Name=gr\xf6\xdfe\r\n", "gr\u00f6\u00dfe.png")):
        (tmp_path / f"{name}.ini").write_bytes(head + size + b"\x1a")
        done = run(tmp_path, "render", f"{name}.ini", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert pixels(tmp_path / image) == pixels(tmp_path / "plain.png")
    (tmp_path / "gr\u00f6\u00dfe.pov").write_text(BALL)
    (tmp_path / "both.ini").write_bytes(b"Input_File_Name=gr\xf6\xdfe.pov\r\n+Oboth\r\n" + size)
    done = run(tmp_path, "render", "both.ini", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "both.png") == pixels(tmp_path / "plain.png")
    (tmp_path / "windows.ini").write_bytes(b'ball.pov\r\nOutput_File_Name="D:\\My Pics\\"\r\n' + size)
    done = run(tmp_path, "render", "windows.ini", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(
        "povfarm: windows.ini, line 2: Output_File_Name is a Windows path")


def test_a_long_file_takes_no_longer_than_its_length(tmp_path: Path) -> None:
    def seconds(number: int) -> float:
        start = time.process_time()
        assert named(tmp_path, b"Input_File_Name=a ball.pov\n" * number) == "a ball.png"
        return time.process_time() - start

    assert seconds(5000) < 40 * seconds(500)
