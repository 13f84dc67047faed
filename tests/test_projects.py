"""Small projects in the layouts that people use end as with povray, and leave the same behind.

Every eighth of them, or all with ``--long``.
"""

from __future__ import annotations

import concurrent.futures
from typing import Dict, Iterator

import pytest

from tools.layouts import LAYOUTS, difference

EVERY = 8
Ends = Dict[str, "concurrent.futures.Future[str]"]


@pytest.fixture(scope="module")
def ends(request: pytest.FixtureRequest, povray: str,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """How layouts end: all that are asked for, some at once, as POV-Ray sleeps most of the time."""
    root = tmp_path_factory.mktemp("layouts")
    asked = [
        item.callspec.params["name"] for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
        and hasattr(item, "callspec")]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield {name: pool.submit(difference, LAYOUTS[name], root / str(number))
               for number, name in enumerate(asked)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask for all of them, or for few."""
    if "name" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("long") else EVERY
        metafunc.parametrize("name", list(LAYOUTS)[::step])


def test_render_does_what_povray_does(name: str, ends: Ends) -> None:
    assert ends[name].result() == ""
