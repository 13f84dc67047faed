"""Slices of one frame that share radiosity samples and photons, rendered by the real POV-Ray."""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence

import pytest

import povfarm
from helpers.pictures import seams

SHARED = (povfarm.SAMPLE_FILE, povfarm.PHOTON_FILE)


class Picture(NamedTuple):
    width: int
    rows: List[bytes]


def read_ppm(path: Path) -> Picture:
    data = path.read_bytes()
    head = re.match(rb"P6\s+(?:#.*\s+)*(\d+)\s+(\d+)\s+255\s", data)
    assert head, data[:80]
    size = 3 * int(head[1])
    rows = [data[at:at + size] for at in range(head.end(), len(data), size)]
    assert len(rows) == int(head[2])
    return Picture(int(head[1]), rows)


class Scene:
    """A scene, rendered in parts, each in a directory of its own as on a machine of its own."""

    def __init__(self, place: Path, scene: Path, size: str, *args: str) -> None:
        self.place = place
        self.scene = scene
        self.folders = [scene.parent]
        self.options = povfarm.read_command_line(
            [*size.split(), "+FP", *args, scene.name], scene.parent, dict(os.environ))
        self.height = self.options.height

    def render(
        self, top: int, bottom: int, values: Mapping[str, str], files: Mapping[str, bytes],
        threads: int = 1,
    ) -> Path:
        """Render some rows with files in the directory of the run; return that directory."""
        number = len(list(self.place.iterdir()))
        while True:
            run = self.place / f"run{number}"
            try:
                run.mkdir()
                break
            except FileExistsError:
                number += 1
        for name, data in files.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(data)
        everything: Dict[str, str] = {
            **self.options.values, **povfarm.slice_values(self.options, top, bottom), **values,
            "Output_File_Name": "out.ppm", "Display": "Off", "Work_Threads": str(threads),
        }
        library = [*map(str, self.folders), *povfarm.standard_library()]
        (run / "run.ini").write_text(povfarm.to_ini(everything, self.options.declares, library))
        result = subprocess.run(
            ["povray"], cwd=run, env={**os.environ, "POVINI": "run.ini"}, timeout=300, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        assert result.returncode == 0, result.stderr
        return run

    def slices(
        self, starts: Sequence[int], values: Mapping[str, str], files: Mapping[str, bytes],
        threads: Sequence[int] = (1,),
    ) -> List[Path]:
        """Render slices, some at a time, with so many threads in turn."""
        ends = [*starts[1:], self.height]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(self.render, top, bottom, values, files, threads[n % len(threads)])
                    for n, (top, bottom) in enumerate(zip(starts, ends))]
            return [run.result() for run in runs]

    def joined(self, starts: Sequence[int], runs: Sequence[Path]) -> List[bytes]:
        ends = [*starts[1:], self.height]
        return [row for top, bottom, run in zip(starts, ends, runs)
                for row in read_ppm(run / "out.ppm").rows[top:bottom]]

    def texts(self, photons: str, samples: bool) -> Dict[str, bytes]:
        return povfarm.shared_texts(self.folders, self.scene.name, photons, samples)


def largest_difference(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    assert len(one) == len(other)
    return max(abs(a - b) for x, y in zip(one, other) for a, b in zip(x, y))


# --- radiosity


@pytest.mark.parametrize("name", ["animations/raddem/raddem.pov", "radiosity/radiosity3.pov"])
def test_slices_that_share_their_samples_have_no_seams(
    povray: str, examples: Path, tmp_path: Path, name: str
) -> None:
    scene = Scene(tmp_path, examples / name, "+W320 +H240", "+A0.3")
    starts = [0, 64, 128, 192]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        alone, passes = pool.map(lambda values: scene.slices(starts, values, {}),
                                 ({}, povfarm.RADIOSITY_PASS))
    apart = seams(scene.joined(starts, alone), starts)
    assert max(apart) > 1.9  # or there were nothing to mend

    samples = b"".join((run / povfarm.SAMPLE_FILE).read_bytes() for run in passes)
    assert povfarm.has_samples(samples)
    files = {**scene.texts("", True), povfarm.SAMPLE_FILE: samples}
    shared = seams(
        scene.joined(starts, scene.slices(starts, povfarm.RADIOSITY_USE, files)), starts)
    assert max(shared) <= 1.15, (apart, shared)


def test_a_slice_that_gets_samples_takes_hardly_any_itself(
    povray: str, examples: Path, tmp_path: Path
) -> None:
    scene = Scene(tmp_path, examples / "radiosity/radiosity_37.pov", "+W160 +H128")
    run = scene.render(0, 128, povfarm.RADIOSITY_PASS, {})
    samples = {povfarm.SAMPLE_FILE: (run / povfarm.SAMPLE_FILE).read_bytes()}
    new = []
    for text in ({}, scene.texts("", True)):
        # Loaded and saved: POV-Ray adds the new ones at the end.
        run = scene.render(64, 128, {**povfarm.RADIOSITY_USE, "Radiosity_To_File": "On"},
                           {**text, **samples})
        both = (run / povfarm.SAMPLE_FILE).read_bytes()
        assert both.startswith(samples[povfarm.SAMPLE_FILE])
        new.append(both[len(samples[povfarm.SAMPLE_FILE]):].count(b"\n"))
    assert new[1] * 5 < new[0], new


def test_a_scene_whose_radiosity_is_off_has_no_samples(povray: str, tmp_path: Path) -> None:
    text = "#version 3.7;\n#declare On = 0;\n#if (On) global_settings{radiosity{}} #end\n" \
        "camera{} light_source{1 1} sphere{z*3 1 pigment{rgb 1}}\n"
    (tmp_path / "a.pov").write_text(text)
    runs = tmp_path / "runs"
    runs.mkdir()
    scene = Scene(runs, tmp_path / "a.pov", "+W16 +H12")
    run = scene.render(0, 12, povfarm.RADIOSITY_PASS, {})
    assert not povfarm.has_samples((run / povfarm.SAMPLE_FILE).read_bytes())
    # It would be switched on, which is why it must have samples first.
    on = scene.render(0, 12, povfarm.RADIOSITY_PASS, scene.texts("", True))
    assert povfarm.has_samples((on / povfarm.SAMPLE_FILE).read_bytes())


def test_the_scene_stays_what_it_was_before_the_block_at_its_end() -> None:
    for end in (b"", b"\r\n", b"// the end", b"\r\n\x1a"):
        data = b"#version 3.6;\nsphere{0 1 pigment{rgb 1}} // \xfc" + end
        assert povfarm.sampled_scene(data).startswith(data.rstrip(b"\x1a") + b"\nglobal_settings{")


# --- photons


@pytest.mark.parametrize(("name", "size"), [
    ("lights/phot_met_glass.pov", "+W160 +H80"),
    ("lights/glassthing.pov", "+W120 +H60"),
    ("advanced/optics.pov", "+W64 +H48"),
])
def test_slices_that_share_photons_make_up_the_whole_frame(
    povray: str, examples: Path, tmp_path: Path, name: str, size: str
) -> None:
    check_photons(Scene(tmp_path, examples / name, size))


def test_photons_may_be_in_an_include_under_a_condition_and_have_a_radius(
    povray: str, examples: Path, tmp_path: Path
) -> None:
    text = (examples / "lights/phot_met_glass.pov").read_text("latin-1")
    block = re.search(r"global_settings\s*\{.*?jitter 0\s*\}\s*\}", text, re.DOTALL)
    assert block
    project = tmp_path / "project"
    (project / "lib").mkdir(parents=True)
    (project / "scene.pov").write_text(text.replace(block[0], '#include "set.inc"'), "latin-1")
    (project / "lib" / "set.inc").write_text(
        block[0].replace("photons {", "#if (1) photons { gather 5, 12 radius 0.25")
        .replace("jitter 0\n  }", "jitter 0\n  } #else photons { count 10 } #end"))
    runs = tmp_path / "runs"
    runs.mkdir()
    scene = Scene(runs, project / "scene.pov", "+W120 +H60")
    scene.folders.append(project / "lib")
    assert set(scene.texts("load_file", False)) == {"set.inc", "lib/set.inc"}
    check_photons(scene)


def check_photons(scene: Scene) -> None:
    """One run shoots; slices with one and two threads load that.

    It shoots with one thread: with two, a busy machine makes another order of the photons.
    """
    starts = [0, scene.height // 2]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # POV-Ray sleeps half of the time
        alone = pool.submit(scene.render, 0, scene.height, {}, {}, threads=1)
        shot = scene.render(0, 2, {}, scene.texts("save_file", False), threads=1)
        photons = (shot / povfarm.PHOTON_FILE).read_bytes()
        assert len(photons) > 1000
        files = {**scene.texts("load_file", False), povfarm.PHOTON_FILE: photons}
        nothing = {**files, povfarm.PHOTON_FILE: bytes(8)}
        dark = pool.submit(scene.slices, starts, {}, nothing)
        shared = scene.joined(starts, scene.slices(starts, {}, files, threads=(1, 2)))
        without = scene.joined(starts, dark.result())
    whole = read_ppm(alone.result() / "out.ppm").rows
    assert largest_difference(whole, shared) == 0
    assert largest_difference(whole, without) > 20  # what is loaded counts


@pytest.mark.parametrize(("text", "result"), [
    ("global_settings{photons{spacing 1}}", "global_settings{photons{ LOAD spacing 1}}"),
    ("global_settings { a /* { */ photons // {\n { count 1 } }",
     "global_settings { a /* { */ photons // {\n { LOAD  count 1 } }"),
    ("global_settings{#if(A) photons{count 1} #else photons{count 2} #end}",
     "global_settings{#if(A) photons{ LOAD count 1} #else photons{ LOAD count 2} #end}"),
    ("sphere{0 1 photons{target}} global_settings{photons{}} light_source{0 1 photons{refraction on}}",
     "sphere{0 1 photons{target}} global_settings{photons{ LOAD }} light_source{0 1 photons{refraction on}}"),
    ("#debug \"\xfc\" global_settings{photons{}}", "#debug \"\xfc\" global_settings{photons{ LOAD }}"),
    ("sphere{0 1 photons{target}}", None),
    ("// global_settings{photons{}}\n#debug \"global_settings{photons{}}\"", None),
    ("global_settings{photons{load_file \"mine.ph\"}}", None),
    ("global_settings{photons{count 1 save_file Name}}", None),
])
def test_photons_are_shared_in_the_settings_of_the_scene_only(
    text: str, result: str | None
) -> None:
    changed = povfarm.photon_scene(text.encode("latin-1"), "load_file")
    word = f'load_file "{povfarm.PHOTON_FILE}"'
    assert changed == (None if result is None else result.replace("LOAD", word).encode("latin-1"))


def test_of_files_with_one_name_the_first_in_the_search_counts(tmp_path: Path) -> None:
    for folder, count in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.inc").write_text(f"global_settings{{photons{{count {count}}}}}")
    (tmp_path / "one" / "a.pov").write_text('#include "a.inc"')
    texts = povfarm.shared_texts([tmp_path / "one", tmp_path / "two"], "a.pov", "save_file", True)
    assert b"count 1" in texts["a.inc"] and b"save_file" in texts["a.inc"]
    assert set(texts) == {"a.inc", "a.pov"} and b"pretrace" in texts["a.pov"]


@pytest.mark.parametrize(("uses", "args", "result"), [
    ("radiosity photons", "", "radiosity photons"),
    ("own-output photons", "", "photons"),
    ("radiosity photons", "+RFI", "photons"),
    ("radiosity photons", "+RFO", "photons"),
    ("radiosity", "-RFO", "radiosity"),
    ("own-output", "", ""),
])
def test_a_user_who_shares_himself_is_left_alone(
    uses: str, args: str, result: str, tmp_path: Path
) -> None:
    options = povfarm.read_command_line([*args.split(), "a.pov"], tmp_path, {}, [])
    assert povfarm.sharable(frozenset(uses.split()), options.values) == frozenset(result.split())


def test_photons_that_are_loaded_already_are_not_shared() -> None:
    assert not povfarm.sharable(frozenset(["photons", "load_file mine.ph"]), {})
