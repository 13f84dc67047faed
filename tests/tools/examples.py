"""Renders every example that POV-Ray ships, by povray and by povfarm, and compares all files.

    python tests/tools/examples.py [--size WxH] [--limit SECONDS] [PART OF A NAME ...]

Each scene, and the first frames of each INI file, is rendered in two fresh copies of its
directory with the same arguments, with one thread, as some scenes depend on the threads. Both
must end alike, and leave the same files: names, pixels, and the contents of what the scene itself
wrote. Prints what differs, and how many there were; what plain POV-Ray does not finish within the
limit is "too long". Ends with 1 when something differs, or nothing was the same. Needs povray and povray-examples.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

sys.path[:0] = map(str, list(Path(__file__).resolve().parents)[1:3])  # the helpers, and povfarm

from helpers.base import EXAMPLES, POVFARM
from helpers.farm import made_in

TOO_LONG = -1000  # no exit code
FRAMES = ["+SF1", "+EF2"]
TELLS_TIMES = "benchmark.ini"  # it writes POV-Ray's messages to a file


def run(command: List[str], place: Path, limit: float) -> int:
    """Run a command to its end, or to a limit in seconds; return its exit code."""
    try:
        return subprocess.run(command, cwd=place, check=False, timeout=limit,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        return TOO_LONG


def compared(example: Path, size: List[str], limit: float) -> str:
    """Return how the two differ, "same", or "failed" when both fail in the same way."""
    arguments = [example.name, *size, "+WT1", *(FRAMES if example.suffix == ".ini" else [])]
    results, codes = [], []
    with tempfile.TemporaryDirectory() as directory:
        for name, command in (("plain", ["povray", *arguments, "-D"]),
                              ("farm", [*POVFARM, "render",
                                        *arguments])):
            place = Path(directory, name)
            shutil.copytree(example.parent, place)
            before = [str(path.relative_to(place)) for path in place.rglob("*")]
            codes.append(run(command, place, limit if name == "plain" else 3 * limit + 60))
            if name == "plain" and codes == [TOO_LONG]:
                return "too long"
            results.append(made_in(place, before))
    plain, farm = results
    if any(codes):
        return "failed" if all(codes) else f"exit codes {codes}"
    wrong = sorted(name for name in {*plain, *farm} if plain.get(name) != farm.get(name))
    return "same" if not wrong else f"different: {', '.join(wrong[:5])}"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="48x36")
    parser.add_argument("--limit", type=float, default=300)
    parser.add_argument("parts", nargs="*", help="only examples whose path holds one of these")
    options = parser.parse_args()
    width, height = options.size.split("x")
    examples = [path for path in sorted(EXAMPLES.rglob("*"))
                if path.suffix in (".pov", ".ini") and path.is_file()
                and (not options.parts or any(part in str(path) for part in options.parts))]
    counts: Dict[str, int] = {}
    good = True
    os.nice(10)
    with ThreadPoolExecutor(3) as pool:
        for path, result in zip(examples, pool.map(
                lambda path: compared(path, [f"+W{width}", f"+H{height}"], options.limit),
                examples)):
            kind = result.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            good &= kind in ("same", "failed", "too long") or path.name == TELLS_TIMES
            if kind != "same":
                print(f"{path.relative_to(EXAMPLES)}: {result}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 0 if good and counts.get("same") else 1


if __name__ == "__main__":
    sys.exit(main())
