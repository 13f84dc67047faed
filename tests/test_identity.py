"""Slices put together are the whole picture: what docs/povray.md says under "Slices".

The wide form, with many scenes of POV-Ray's own, is `python tests/tools/identity.py`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from helpers.base import run_povray
from povfarm import slice_values
from tools.identity import compared, cuts, difference, options_of, render, rows_of, together

pytestmark = pytest.mark.usefixtures("povray")

# Fine detail all over, so that a pixel which is sampled otherwise shows.
START = """#version 3.7; global_settings {{ assumed_gamma 1 {setting} }}
camera {{ location <0, 1, -4> look_at 0 }} light_source {{ <3, 5, -9>, 1 {light} }}
plane {{ y, -1 pigment {{ checker rgb 1 rgb .2 scale .3 rotate clock * 30 * y }} }}
"""
BALL = "sphere { 0, 1 pigment { checker rgb <1, .2, .1> rgb <.1, .2, 1> scale .2 } }"
FOG = ("sphere {{ 0, 1.2 hollow pigment {{ rgbt 1 }} interior {{ media {{ {0} "
"emission 2 density {{ bozo turbulence .5 scale .4 }} }} }} }}")

# Nothing but the place of a pixel counts in these, whatever they look like.
STEADY = {
    "plain": START.format(setting="", light="") + BALL,
    "area light": START.format(setting="", light="area_light x, y, 4, 4 adaptive 1") + BALL,
    "focal blur": START.format(setting="", light="").replace(
        "look_at 0", "look_at 0 aperture .4 blur_samples 12 focal_point -z") + BALL,
    "media": START.format(setting="", light="") + FOG.format("samples 8"),
    "photons": START.format(setting="photons { count 2000 }", light="photons { refraction on }")
    + "sphere { 0, 1 pigment { rgbt 1 } interior { ior 1.4 } photons { target refraction on } }",
}
# Random numbers, or what was computed before, go on from block to block.
UNSTEADY = {
    "jitter of an area light": START.format(setting="", light="area_light x, y, 4, 4 jitter") + BALL,
    "crand": START.format(setting="", light="") + BALL.replace("} }", "} finish { crand .4 } }"),
    "media with jitter": START.format(setting="", light="") + FOG.format("samples 8 jitter .5"),
    "media, method 1": START.format(setting="", light="") + FOG.format("method 1 intervals 9 samples 1, 5"),
    "radiosity": START.format(setting="radiosity { count 9 }", light="") + BALL,
    "subsurface": START.format(setting="mm_per_unit 9 subsurface { samples 9, 3 }", light="")
    + "sphere { 0, 1 pigment { rgb 1 } finish { subsurface { translucency .4 } } interior { ior 1.3 } }",
    "isosurface with evaluate": START.format(setting="", light="")
    + "#declare Bumps = function { pattern { bumps scale .2 } } "
    "isosurface { function { Bumps(x, y, z) * .5 + x*x + y*y + z*z - 1 } evaluate 1, 1.2, .9 "
    "contained_by { box { -1.5, 1.5 } } pigment { rgb x } }",
}
SIZE = ["+W67", "+H93", "+WT1"]
OPTIONS = [
    "-A", "+A0.1 +AM2 +R2 +J", "+A0.02 -J +BS4", "+A0.05 +AM1 +BS7 +SR11 +ER0.9", "+A0.02",
    "+A0.02 +R2 +BS16 +SR0.2 +SC0.3 +EC30", "+A0.02 +BS33 +RP2 +RS3", "+THB4 +A0.1", "+UA +A0.1 +BS5",
]
Case = Tuple[Path, List[str], int, str]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    found = {}
    for number, (name, text) in enumerate({**STEADY, **UNSTEADY}.items()):
        found[name] = folder / f"s{number}.pov"
        found[name].write_text(text)
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """POV-Ray sleeps most of its time in such small pictures: many at a time."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_slices_of_every_kind_are_the_whole(
    scenes: Dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    cases = [(scenes["plain"], [*SIZE, *text.split()], n, "P") for text in OPTIONS for n in (2, 5)]
    cases += [(scenes["plain"], [*SIZE, "+A0.02", "+BS4"], 3, kind) for kind in ("N", "T", "N")]
    cases[-1][1].append("+UA")
    found = pool.map(lambda case: compared(*case), cases)
    assert [(case[1:], much) for case, much in zip(cases, found) if much != (0, 0)] == []


def test_slices_of_every_steady_scene_are_the_whole(
    scenes: Dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    cases = [
        (scenes[name], ["+W50", "+H37", "+WT1", *more.split()], 3, "P")
        for name in STEADY for more in ("-A", "+A0.1 +R2 +BS8", "+A0.1 +R2 +AM2")
    ]
    found = pool.map(lambda case: compared(*case), cases)
    assert [(case[1:], much) for case, much in zip(cases, found) if much != (0, 0)] == []


def test_slices_of_real_scenes_are_the_whole(examples: Path, pool: ThreadPoolExecutor) -> None:
    cases = [
        (examples / name, ["+W40", "+H31", "+WT1", *more.split()], 7, "P")
        for name in ("advanced/sombrero.pov", "camera/fisheye.pov", "textures/patterns/crackle1.pov")
        for more in ("-A", "+A0.02 +R2 +BS4")
    ]
    found = pool.map(lambda case: compared(*case), cases)
    assert [(case[1:], much) for case, much in zip(cases, found) if much != (0, 0)] == []


def test_blocks_are_32_by_themselves(scenes: Dict[str, Path], pool: ThreadPoolExecutor) -> None:
    sizes = [["+W50", "+H40"], ["+W64", "+H48"], ["+W200", "+H150"], ["+W641", "+H479"]]
    wanted = [[*size, "+A0.02", "+R1", *more] for size in sizes
              for more in ([], ["+BS32"], ["+BS15"], ["+WT3", "+BS32"])]
    found = list(pool.map(lambda args: render(scenes["plain"], args), wanted))
    for at in range(0, len(found), 4):
        alone, with_32, with_15, threads = found[at : at + 4]
        assert alone == with_32 == threads
        assert alone != with_15


def test_slices_elsewhere_are_not_the_whole(
    scenes: Dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    """Else the block that slices keep to would be for nothing."""
    lines = [[*SIZE, *args.split()] for args in ("+A0.05", "+TH -A", "+THD1 -A", "+THD2 -A")]
    wholes = pool.map(lambda line: render(scenes["plain"], line), lines)
    parts = pool.map(lambda line: together(scenes["plain"], line, [0, 30, 61, 93]), lines)
    for line, whole, part in zip(lines, wholes, parts):
        assert difference(whole, part) > (0, 0), line
        assert cuts(scenes["plain"], line, 9)[1:] in ([32, 64, 93], [93]), line


def test_unsteady_scenes_are_not_the_whole_in_slices(
    scenes: Dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    """Though by one thread they are the same each time: so docs/povray.md can say which they are."""
    args = ["+W50", "+H37", "+WT1", "-A"]
    twice = {n: [pool.submit(render, scenes[n], args) for _ in "12"] for n in UNSTEADY}
    sliced = {n: pool.submit(compared, scenes[n], args, 2) for n in UNSTEADY}
    assert [n for n, (one, two) in twice.items() if one.result() != two.result()] == []
    assert [n for n, much in sliced.items() if much.result() == (0, 0)] == []


def test_slices_of_an_animation_are_its_frames(
    scenes: Dict[str, Path], pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    scene, args = scenes["plain"], ["+W50", "+H37", "+A0.02", "+R1", "+BS8", "+KFF12", "+KC", "+FP"]

    def frames(name: str, *more: str) -> None:
        done = run_povray([scene.name, *args, *more, f"+O{tmp_path / name}"], scene.parent)
        assert done.returncode == 0, done.stderr[-900:]

    bands = [(0, 8), (8, 24), (24, 37)]
    values = [slice_values(options_of(scene, args), *band).items() for band in bands]
    runs = [("whole",)] + [
        (f"band{i}-", "+SF9", "+EF11", *(f"{key}={value}" for key, value in value_list))
        for i, value_list in enumerate(values)
    ]
    list(pool.map(lambda run: frames(*run), runs))
    wholes = [rows_of(tmp_path / f"whole{n:02}.ppm") for n in (9, 10, 11)]
    assert wholes[0] != wholes[1] != wholes[2]
    for n, whole in zip((9, 10, 11), wholes):
        for i, (top, bottom) in enumerate(bands):
            assert rows_of(tmp_path / f"band{i}-{n:02}.ppm")[top:bottom] == whole[top:bottom]
