"""What a coordinator needs before it serves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import povfarm
from helpers.base import wait_until
from helpers.farm_in_a_box import sha256


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_farm_key_opens_nothing(text: str, tmp_path: Path) -> None:
    """Everybody could forge what is signed with it."""
    (tmp_path / "farm.key").write_text(text)
    with pytest.raises(povfarm.StoreError, match=r"farm\.key is empty: delete it"):
        povfarm.Coordinator(tmp_path, bind="127.0.0.1", durable=False)


def test_a_farm_that_ends_for_good_tells_a_worker_that_asks_meanwhile(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "FAREWELL", 60.0)
    farm = povfarm.Coordinator(tmp_path / "farm", bind="127.0.0.1", durable=False)
    farm.start()
    farm.scheduler.join(povfarm.WorkerInfo("w", 1, 0, "", {}, ()), sha256(b"anna"), "::1")
    ask = {"want": 1, "slots": 1, "idle": 1, "wait": 0}
    client = povfarm.Client(farm.url, "#1:anna", retry_for=0)
    assert client.request("POST", "/api/v1/lease", json=ask).json()["ends"] is False
    ending = threading.Thread(target=farm.stop, kwargs={"for_good": True})
    ending.start()
    wait_until(lambda: farm.api.ends)
    assert client.request("POST", "/api/v1/lease", json=ask).json()["ends"] is True
    ending.join(30)
    assert not ending.is_alive()
