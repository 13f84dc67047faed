"""A render that is stopped goes on elsewhere, with real POV-Ray."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
from pathlib import Path
from typing import Iterator, Optional, Tuple

import pytest

from helpers.base import run_povray
from helpers.pictures import pixels_of
from povfarm import (
    STANDARD,
    Engine,
    Launcher,
    LeaseSpec,
    PovJob,
    PovText,
    Region,
    Run,
    State,
    TaskSpec,
    copy_state,
    make_launcher,
    region_of,
    slice_values,
    standard_library,
)

BLOCK = 8
WHOLE = Region(0, 72, 0, 96, BLOCK)
PIXELS = 96 * 72


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """A launcher of renderers for all tests here."""
    launcher = make_launcher()
    assert isinstance(launcher, Launcher)
    yield launcher
    launcher.close()


def make_run(place: Path, scene: Path, **values: str) -> Run:
    """Return a still of a scene, 96x72."""
    options = {
        "Input_File_Name": "scene.pov", "Width": "96", "Height": "72", "Output_File_Type": "P",
        "Antialias": "Off", "Render_Block_Size": str(BLOCK), **values}
    (place / "run").mkdir(parents=True)
    (place / "tree").mkdir()
    shutil.copy(scene, place / "tree" / "scene.pov")
    pov = PovJob(options, (), (STANDARD,), ".")
    lease = LeaseSpec("ab", 1, "job", 1, (TaskSpec(1, 0, "scene.ppm"),), "0" * 64, pov, False)
    return Run(lease, place / "tree", place / "run", (0,))


def render(launcher: Launcher, run: Run, stop_at: int = 101) -> PovText:
    """Render, or kill POV-Ray at some percent; return what it said."""
    command = Engine(shutil.which("povray") or "", "", standard_library()).command(run)
    for path, text in command.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path, target in command.links.items():
        path.symlink_to(target)
    process = launcher.start(command.argv, run.place, command.environment)
    said = PovText()
    for line in process.lines():
        said.feed(line)
        if said.percent >= stop_at:
            process.kill()
    assert process.wait().code == (0 if stop_at > 100 else -9), said.text
    return said


def rendered(said: PovText) -> int:
    """Return how many pixels a run has rendered, as POV-Ray's statistics count them."""
    match = re.search(r"Pixels: +(\d+)", said.text)
    assert match, said.text
    return int(match[1])


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A picture, and what is left of a second render of it that was stopped at ``percent``."""

    scene: Path
    picture: bytes
    state: bytes
    percent: int


@pytest.fixture(scope="module")
def stopped(povray: str, examples: Path, launcher: Launcher,
            tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Glass and photons, once to the end and once to a third."""
    scene = examples / "advanced" / "optics.pov"
    whole = make_run(tmp_path_factory.mktemp("whole"), scene)
    part = make_run(tmp_path_factory.mktemp("part"), scene)
    assert rendered(render(launcher, whole)) == PIXELS
    percent = render(launcher, part, stop_at=33).percent
    assert not whole.state.exists() and not part.made(0).exists()
    return Stopped(scene, pixels_of(whole.made(0))[1], part.state.read_bytes(), percent)


def read(data: bytes, region: Region = WHOLE, block: int = BLOCK) -> Tuple[State, bytes]:
    """Return what a state holds, and the copy of it."""
    target = io.BytesIO()
    state = copy_state(io.BytesIO(data), target, region, block)
    assert copy_state(io.BytesIO(data), None, region, block) == state
    return state, target.getvalue()


def test_a_killed_render_goes_on_elsewhere_and_loses_next_to_nothing(
        stopped: Stopped, launcher: Launcher, tmp_path: Path) -> None:
    run = make_run(tmp_path, stopped.scene)
    state, data = read(stopped.state)
    assert stopped.percent <= 100 * state.pixels / PIXELS < 90
    run.state.write_bytes(data)
    said = render(launcher, run)
    assert pixels_of(run.made(0))[1] == stopped.picture
    assert rendered(said) == PIXELS - state.pixels


def test_a_slice_can_end_early_with_what_is_finished(
        stopped: Stopped, launcher: Launcher, tmp_path: Path) -> None:
    """Its rows come without rendering any more of them."""
    state, _ = read(stopped.state)
    rows = state.rows // BLOCK * BLOCK
    assert rows >= BLOCK
    run = make_run(tmp_path, stopped.scene)
    options = run.lease.pov.options
    shorter = make_run(tmp_path / "shorter", stopped.scene, **slice_values(options, 0, rows))
    kept, data = read(stopped.state, region_of(shorter.lease.pov.options))
    assert kept == State(rows * 96, rows)
    shorter.state.write_bytes(data)
    assert rendered(render(launcher, shorter)) == 0
    end = rows * 96 * 3
    assert pixels_of(shorter.made(0))[1][:end] == stopped.picture[:end]


def test_a_state_is_cut_back_to_its_whole_blocks(stopped: Stopped) -> None:
    state, data = read(stopped.state)
    cut, rest = read(stopped.state[:-1])
    assert cut.pixels == state.pixels - BLOCK * BLOCK
    assert data.startswith(rest) and len(rest) < len(data)
    assert read(data) == (state, data)
    again = data + data[512:]
    assert read(again) == (state, data), "POV-Ray leaves a block out for each that comes twice"


def test_what_fits_another_picture_is_not_taken(stopped: Stopped) -> None:
    nothing = State(0, 0)
    assert read(stopped.state, block=BLOCK * 2)[0] == nothing
    assert read(stopped.state, Region(0, 72, 1, 96, BLOCK))[0] == nothing
    assert read(stopped.state, Region(8, 72, 0, 96, BLOCK))[0] == nothing
    for data in (b"", stopped.state[:512], stopped.state[:100], os.urandom(1000),
                 stopped.state[:512] + os.urandom(100_000), b"x" + stopped.state[1:]):
        assert read(data)[0] == nothing


def test_every_damage_is_survived(stopped: Stopped) -> None:
    """Whatever is damaged before the pixels or after them: no block but the own ones is left."""
    head = stopped.state[:512]
    size = 20 + int.from_bytes(stopped.state[524:528], "big")
    block = stopped.state[512:512 + size]
    assert read(head + block)[0].pixels == BLOCK * BLOCK
    pixels = block.index(b"PBlo")
    for at in [*range(pixels + 12), *range(size - 16 * 7, size)]:
        damaged = bytearray(block)
        damaged[at] ^= 0x41
        state, data = read(head + bytes(damaged))
        assert state.pixels == len(data) // size * BLOCK * BLOCK <= BLOCK * BLOCK
        if at in (*range(8), *range(12, 16), *range(24, 28)):  # name, size, number of values
            assert not state.pixels


def test_a_block_below_the_picture_is_left_out(stopped: Stopped) -> None:
    """One of no rows and no pixels, as nobody but an attacker makes it."""
    size = 20 + int.from_bytes(stopped.state[524:528], "big")
    block = stopped.state[512:512 + size]
    pixels = block.index(b"PBlo")
    end = pixels + 12 + 20 * BLOCK * BLOCK
    empty = block[:pixels + 8] + bytes(4) + block[end:]
    for key, value in {b"PiId": PIXELS // BLOCK ** 2, b"Left": 0, b"Top ": WHOLE.bottom,
                       b"Righ": BLOCK - 1, b"Bott": WHOLE.bottom - 1}.items():
        at = empty.index(key) + 12
        empty = empty[:at] + value.to_bytes(4, "big") + empty[at + 4:]
    empty = empty[:12] + (len(empty) - 20).to_bytes(4, "big") + empty[16:]
    assert read(stopped.state[:512] + block + empty) == read(stopped.state[:512] + block)


def test_no_more_is_read_at_once_than_a_block_has(stopped: Stopped) -> None:
    """However large a message says to be: it would be made room for."""
    class Asked(io.BytesIO):
        most = 0

        def read(self, size: Optional[int] = -1) -> bytes:
            self.most = max(self.most, size or 0)
            return super().read(size)

    source = Asked(stopped.state[:524] + b"\xff" * 4 + stopped.state[528:])
    assert copy_state(source, None, WHOLE, BLOCK) == State(0, 0)
    assert source.most < 10_000


def test_radiosity_leaves_no_state(
        povray: str, examples: Path, launcher: Launcher, tmp_path: Path) -> None:
    run = make_run(tmp_path, examples / "radiosity" / "radiosity2.pov", Antialias="On",
                   Antialias_Threshold="0", Antialias_Depth="9")
    render(launcher, run, stop_at=10)
    data = run.state.read_bytes()
    assert len(data) > 512 and read(data)[0] == State(0, 0)


def test_a_state_of_several_threads_and_any_corner_is_read(
        povray: str, tmp_path: Path) -> None:
    """Rows that are finished have no gap, and the blocks at the right and the bottom are short."""
    (tmp_path / "s.pov").write_text(
        "#version 3.7; camera { location -z } background { rgb 1 }"
        " sphere { z, 1 pigment { granite } }")
    region = Region(11, 77, 5, 93, 24)
    name = tmp_path / "s.pov-state"
    kept = tmp_path / "kept"
    name.touch()
    os.link(name, kept)  # POV-Ray deletes it at the end
    result = run_povray(["+Is.pov", "+W100", "+H80", "+SR12", "+ER77", "+SC6", "+EC93", "+BS24",
                         "+WT3", "-A", "+FP"], tmp_path)
    assert result.returncode == 0 and not name.exists()
    state, data = read(kept.read_bytes(), region, 24)
    assert state == State(66 * 88, 66)
    # Without the block that was finished first there is a gap in its row of four blocks.
    first = 512 + 20 + int.from_bytes(data[524:528], "big")
    at = data.index(b"PiId") + 12
    number = int.from_bytes(data[at:at + 4], "big")
    gap, _ = read(data[:512] + data[first:], region, 24)
    assert gap.rows == number // 4 * 24 and gap.pixels < state.pixels
