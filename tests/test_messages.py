"""Sentences that new users did not understand: what they say now, and when."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import povfarm
from helpers.base import wait_until
from helpers.farm import SMALL, Farm, farm_fixture, project, run

__all__ = ["farm_fixture"]


def test_who_has_no_key_is_told_where_it_is(farm: Farm, tmp_path: Path) -> None:
    place = project(tmp_path)
    url = f"http://127.0.0.1:{farm.port}"
    asked = run(tmp_path, "login", "--data", str(tmp_path / "none"), "--server", url, cwd=place)
    assert asked.returncode == 1 and "log in first: give --data DIR" in asked.stderr
    wrong = run(tmp_path, "status", "--server", url, "--key", "wrong", cwd=place)
    assert wrong.returncode == 1 and "does not have your farm's key" in wrong.stderr
    assert "--key" in wrong.stderr and "Nothing was sent to it" in wrong.stderr


def test_a_removed_worker_is_told_so_and_comes_back(farm: Farm, tmp_path: Path) -> None:
    worker = farm.work("--worker-name", "attic")
    view = wait_until(lambda: farm.client.request("GET", "/api/v1/workers").json()["workers"],
                      "no worker joined")
    removed = run(tmp_path, "workers", "remove", str(view[0]["id"]), cwd=tmp_path)
    assert removed.returncode == 0, removed.stderr
    said, _ = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert "this worker was removed from the farm: to let it work again, start it" in said
    farm.work("--worker-name", "attic")
    wait_until(lambda: farm.client.request("GET", "/api/v1/workers").json()["workers"],
               "it does not come back with the key")


def test_a_worker_can_be_removed_more_than_once(tmp_path: Path) -> None:
    store = povfarm.Store(tmp_path / "farm")
    scheduler = povfarm.Scheduler(store, povfarm.Clock())
    info = povfarm.WorkerInfo("attic", 1, 1, "Linux", {})
    try:
        for _ in range(2):
            worker = scheduler.join(info, "hash", "127.0.0.1")
            scheduler.remove_worker(worker)
        with store.read() as tx:
            assert tx.was_removed("hash") and not tx.was_removed("has")
            assert tx.worker_by_token("hash") is None
    finally:
        store.close()


@pytest.mark.slow
def test_a_still_is_told_by_its_name(tmp_path: Path) -> None:
    place = project(tmp_path)
    done = run(tmp_path, "render", "scene.pov", *SMALL, cwd=place)
    assert done.stdout.startswith(f"1 image: {place / 'scene.png'}, ")
    done = run(tmp_path, "render", "scene.pov", *SMALL, "+KFF2", cwd=place)
    assert done.stdout.startswith(f"2 frames in {place}, ")


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    beacon = povfarm.Beacon("studio", "f1", 2271, b"the farm key", port=port)
    beacon.start()
    try:
        options = povfarm.Options(name="attic", discovery_port=port, key="")
        with pytest.raises(povfarm.UserError) as error:
            povfarm._choose([], options, "attic")
        words = "no farm called 'attic' answers here; there is studio (http://127.0.0.1:2271)"
        assert str(error.value) == f"{words}: choose one with --name or --server"
        assert povfarm._others_than("", options) == ""
    finally:
        beacon.stop()
