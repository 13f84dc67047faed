"""One row per option: names, values, where they come from."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Dict

import pytest

import povfarm
from helpers.base import ROOT
from helpers.source import SOURCE
from povfarm import SETTINGS, Setting, UserError, configured_defaults, setting

NAMES = [row.name for row in SETTINGS]
# A text that each kind of value takes, and what it then is.
SAMPLES: Dict[str, Any] = {
    "hpc": "0.0.0.0:5001", "hpc-files": "/srv/hpc",
    "data": "farm", "root": "scenes", "output": "out", "port": "8080", "discovery-port": "8081",
    "lease-time": "1m30s", "since": "10m", "hours": "mon 7-8", "when-idle": "10m", "frame-timeout": "1h", "cores": "3", "nice": "7", "cache-size": "5G", "priority": "-4",
    "max-workers": "2", "retries": "5", "slices": "7", "povray-version": "3.7", "verify": "25",
    "radiosity": "off", "apng": "film.png", "log": "log.txt", "first": "1,50-60", "order": "spread", "batch": "20",
    "status-port": "[::]:8082",
    "video": "film.mp4", "fps": "30000/1001",
    "keep": "30d", "deliver": "drive", "role": "viewer", "uses": "30", "invite": "25", "jobs-limit": "5", "frames-limit": "500", "priority-limit": "3",
    "workers-limit": "4", "space-limit": "5G",
    "memory": "2G", "tls": "auto", "tls-cert": "cert.pem", "tls-key": "key.pem",
    "pin": "AB:" + "0c" * 31,
}
VALUES: Dict[str, Any] = {
    "hpc": "0.0.0.0:5001", "hpc-files": Path("/srv/hpc"),
    "data": Path("farm"), "root": Path("scenes"), "output": Path("out"), "port": 8080,
    "discovery-port": 8081, "lease-time": 90.0, "since": 600.0, "hours": "mon 7-8", "when-idle": 600.0, "frame-timeout": 3600, "cores": 3, "nice": 7, "cache-size": 5 * 10**9,
    "priority": -4, "max-workers": 2, "retries": 5, "slices": "7", "povray-version": "3.7", "verify": 25,
    "radiosity": "off", "first": "1,50-60", "order": "spread", "batch": 20,
    "status-port": "[::]:8082",
    "apng": Path("film.png"), "log": Path("log.txt"), "video": Path("film.mp4"), "fps": Fraction(30000, 1001),
    "keep": povfarm.Keeping.of("30d"), "deliver": Path("drive"), "role": "viewer", "uses": 30, "invite": 25, "jobs-limit": 5, "frames-limit": 500, "priority-limit": 3,
    "workers-limit": 4, "space-limit": 5 * 10**9,
    "memory": 2 * 10**9, "tls": "auto", "tls-cert": Path("cert.pem"), "tls-key": Path("key.pem"),
    "pin": "ab" + "0c" * 31,
}


def sample(row: Setting) -> Any:
    return "on" if row.is_flag else SAMPLES.get(row.name, "text")


def expected(row: Setting) -> Any:
    """A name of a file means the directory that the command is typed in."""
    value = True if row.is_flag else VALUES.get(row.name, "text")
    return value.absolute() if isinstance(value, Path) else value


# --- the table

def test_every_option_has_one_name_and_one_explanation() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for row in SETTINGS:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", row.name), row.name
        assert row.help and not row.help.endswith(".") and len(row.help) < 80, row.name
        assert row.metavar and (row.metavar, row.kind) != ("N", str), f"{row.name}: what is N?"


def test_every_option_belongs_to_commands_that_there_are() -> None:
    commands = set(re.findall(r'^@command\("([a-z]+)"', SOURCE, re.MULTILINE))
    groups = {group for tag, _ in povfarm._commands().values() for group in tag.groups}
    for row in SETTINGS:
        unknown = set(row.commands.split()) - commands - groups
        assert row.commands and not unknown, f"{row.name}: {unknown}"


def test_every_option_does_something() -> None:
    treatment = set(vars(povfarm.JobOptions()))
    for row in SETTINGS:
        name = row.name.replace("-", "_")
        if "set" in row.commands.split():
            assert {name for name, one in povfarm.JOB_OPTIONS.items() if one is row} <= treatment
        elif row.name.endswith("-limit"):
            assert {name for name, one in povfarm.ALLOWANCES.items() if one is row} <= set(
                vars(povfarm.Allowance()))
        else:
            assert re.search(rf'options(\.|, "){name}\b', SOURCE), row.name


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_what_the_option_would_read(name: str) -> None:
    row = setting(name)
    if row.default not in (None, ""):
        text = "off" if row.default is False else str(row.default)
        assert row.parse(text, "here") == row.default


def test_there_is_no_row_for_an_unknown_name() -> None:
    with pytest.raises(KeyError):
        setting("colour")


# --- the manual

MANUAL = (ROOT / "docs" / "manual.md").read_text(encoding="utf-8")
OPTIONS = re.findall(r"^\| `--.*\|$", MANUAL.partition("## Options, ")[2].partition("\n## ")[0],
                     re.MULTILINE)


def line_of(row: Setting) -> str:
    """How the manual shows an option."""
    commands = ", ".join(f"*{name}*" if name in ("talk", "job") else name
                         for name in row.commands.split())
    option = f"--{row.name}" if row.is_flag else f"--{row.name} {row.metavar}"
    return f"| `{option}` | `{row.variable}` | {commands} | {row.shown_default} | {row.help} |"


def test_the_table_of_options_is_that_of_the_program() -> None:
    assert [line_of(row) for row in SETTINGS] == OPTIONS


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_what_is_shown_as_the_default_is_it(row: Setting) -> None:
    if row.shown_default:
        assert row.parse(row.shown_default, "here") == row.default
    else:
        assert not row.default


# --- values

@pytest.mark.parametrize("text, value", [
    ("1", True), ("on", True), ("Yes", True), (" TRUE ", True),
    ("0", False), ("off", False), ("no", False), ("False", False), ("", False),
])
def test_flags_are_on_or_off(text: str, value: bool) -> None:
    assert setting("private").parse(text, "here") is value


@pytest.mark.parametrize("name, text", [
    ("private", "maybe"), ("port", "http"), ("port", "-1"), ("port", "65536"), ("port", ""),
    ("port", "²"), ("tls", "yes"), ("pin", "12:34"), ("discovery-port", "1.5"), ("cores", "0"), ("cores", "-2"), ("cores", "many"),
    ("cores", "³"), ("max-workers", "-1"), ("retries", "0"), ("priority", "high"),
    ("priority", "1.5"), ("priority", "1001"), ("lease-time", "soon"), ("lease-time", "0"), ("cache-size", "much"),
    ("nice", "20"), ("nice", "-1"), ("fps", "0"), ("fps", "-25"), ("fps", "1001"), ("fps", "1/0"),
    ("fps", "fast"), ("fps", "nan"), ("cores", "9" * 5000), ("port", "9" * 5000),
    ("frame-timeout", "9" * 400), ("memory", "9" * 400), ("first", "5-"), ("first", "1,"), ("first", "1-2-3"),
    ("status-port", "here"), ("status-port", "::70000"), ("status-port", "127.0.0.1:"), ("first", ",1"), ("order", "sideways"), ("batch", "-1"), ("batch", "1001"),
])
def test_a_bad_value_is_refused_with_the_place_where_it_stands(name: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        setting(name).parse(text, "the place")
    assert "the place" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, text, value", [
    ("port", "0", 0), ("port", "65535", 65535), ("nice", "0", 0), ("nice", "19", 19),
    ("priority", "-3", -3), ("cores", "1", 1), ("name", "studio 2", "studio 2"),
])
def test_values_at_the_edge_are_taken(name: str, text: str, value: Any) -> None:
    assert setting(name).parse(text, "here") == value


def test_a_path_may_start_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert setting("data").parse("~/farm", "here") == tmp_path / "farm"


# --- where they come from

def test_without_anything_the_defaults_count(tmp_path: Path) -> None:
    found = configured_defaults({"POVFARM_DATA": str(tmp_path)})
    assert found == {**{row.name: row.default for row in SETTINGS}, "data": tmp_path,
                     "renderonline-lines": [], "hooks-lines": []}


def test_lines_for_renderonline_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "povfarm.ini"
    path.write_text("[povfarm]\nPort = 7\n\n[renderonline]\n# one\nengine Povray = .pov +Ka=b\n")
    found = configured_defaults({"POVFARM_DATA": str(tmp_path)})
    assert found["port"] == 7
    assert found["renderonline-lines"] == [("engine Povray", ".pov +Ka=b", f"{path}, line 6")]


@pytest.mark.parametrize("text, words", [
    ("[renderonline]\nengine x = y\n", "line 1: expected the line [povfarm]"),
    ("[povfarm]\n[renderonline]\na = 1\na = 2\n", "line 4: 'a' is set twice"),
    ("[povfarm]\n[renderonline]\na\n", "line 3: 'a' is not NAME = VALUE"),
    ("[povfarm]\n[renderonline]\n[povfarm]\ncolour = red\n", "line 4: there is no option 'colour'"),
])
def test_a_bad_line_for_renderonline_names_its_place(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        configured_defaults({"POVFARM_DATA": str(tmp_path)})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "data"])
def test_every_option_is_read_from_environment_and_file(name: str, tmp_path: Path) -> None:
    row = setting(name)
    assert row.variable == "POVFARM_" + name.upper().replace("-", "_")
    environ = {"POVFARM_DATA": str(tmp_path)}
    found = configured_defaults({**environ, row.variable: sample(row)})
    assert found[name] == expected(row)
    (tmp_path / "povfarm.ini").write_text(f"[povfarm]\n{name} = {sample(row)}\n", encoding="utf-8")
    assert configured_defaults(environ)[name] == expected(row)


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_text("[povfarm]\nport = 1\nname = file\nopen = on\n",
                                          encoding="utf-8")
    found = configured_defaults({"POVFARM_DATA": str(tmp_path), "POVFARM_PORT": "2",
                                 "POVFARM_OPEN": "off", "POVFARM_NAME": ""})
    assert (found["port"], found["name"], found["open"]) == (2, "file", False)


def test_a_percent_sign_in_the_file_means_itself(tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_text("[povfarm]\nname = 50%(x)s\n", encoding="utf-8")
    assert configured_defaults({"POVFARM_DATA": str(tmp_path)})["name"] == "50%(x)s"


def test_a_file_saved_by_notepad_is_read(tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_text("\ufeff[povfarm]\nport = 7\n", encoding="utf-8")
    assert configured_defaults({"POVFARM_DATA": str(tmp_path)})["port"] == 7


@pytest.mark.parametrize("content, line, says", [
    (b"[povfarm]\ncolour = red\n", 2, "no option 'colour'"),
    (b"[povfarm]\nmax_workers = 2\n", 2, "no option 'max_workers'"),
    (b"# mine\n\n[povfarm]\nname = x\nport = red\n", 5, "port: 'red' is not a port"),
    (b"[povfarm]\r\nopen = perhaps\r\n", 2, "open: 'perhaps' is neither on nor off"),
    (b"port = 5\n", 1, "expected the line [povfarm], not 'port = 5'"),
    (b"[povfarm]\nport = 1\n[render]\ncores = 2\n", 3, "expected the line [povfarm], not '[render]'"),
    (b"[povfarm\nport = 1\n", 1, "expected the line [povfarm], not '[povfarm'"),
    (b"[povfarm]\nport = 1\nPort = 2\n", 3, "'port' is set twice"),
    (b"[povfarm]\nopen\n", 2, "'open' is not NAME = VALUE"),
    (b"[povfarm]\ndata = /srv\n", 2, "this file is in the data directory"),
])
def test_a_bad_line_of_the_file_is_named(
        content: bytes, line: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_bytes(content)
    with pytest.raises(UserError) as caught:
        configured_defaults({"POVFARM_DATA": str(tmp_path)})
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'povfarm.ini'}, line {line}: ") and says in text, text
    assert "\n" not in text


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").write_bytes(b"[povfarm]\nname = \xff\xfe\n")
    with pytest.raises(UserError, match=r"povfarm\.ini is not UTF-8"):
        configured_defaults({"POVFARM_DATA": str(tmp_path)})


def test_the_file_of_the_data_directory_that_was_typed_is_read(tmp_path: Path) -> None:
    for name, port in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "povfarm.ini").write_text(f"[povfarm]\n; a farm\nPort = {port}\n")
    environ = {"POVFARM_DATA": str(tmp_path / "one")}
    assert configured_defaults(environ)["port"] == 1
    found = configured_defaults(environ, str(tmp_path / "two"))
    assert (found["port"], found["data"]) == (2, tmp_path / "two")
    tag, _ = povfarm._command("serve")
    assert povfarm._parse(tag, ["--data", str(tmp_path / "two")]).port == 2
    assert povfarm._parse(tag, ["--data", str(tmp_path / "two"), "--port=3"]).port == 3


def test_a_bad_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="POVFARM_PORT"):
        configured_defaults({"POVFARM_DATA": str(tmp_path), "POVFARM_PORT": "red"})


def test_a_file_that_is_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "povfarm.ini").mkdir()
    with pytest.raises(UserError, match=r"povfarm\.ini"):
        configured_defaults({"POVFARM_DATA": str(tmp_path)})
