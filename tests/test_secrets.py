"""Whether a secret is right is decided in constant time, and by nothing else beside it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

import povfarm
from helpers.farm_in_a_box import KEY, Farm
from helpers.sockets import KEY as BEACON_KEY
from helpers.trust import request_of
from povfarm import Httpov, ProtocolError, Request, Router, UserError


def key_of_the_farm(farm: Farm, right: bool) -> bool:
    key = KEY if right else KEY[::-1]
    return farm.ask("POST", "/api/v1/jobs/9/pause", key=key).status != 401


def token_of_a_form(farm: Farm, right: bool) -> bool:
    mine, other = ({"cookie": f"{farm.access.cookie}={name}"} for name in ("mine", "other"))
    token = farm.access.form_token(request_of(farm.access, mine if right else other))
    form = {**mine, "content-type": "application/x-www-form-urlencoded"}
    try:
        farm.access.check_form(request_of(farm.access, form, f"token={token}".encode()))
    except ProtocolError:
        return False
    return True


def code_of_a_worker(farm: Farm, right: bool) -> bool:
    info = povfarm.WorkerInfo("anna", 1, 1, "", {})
    code = "ABCDEF"
    farm.scheduler.join(info, secrets.token_hex(), "::1", code)
    try:
        farm.scheduler.admit(code if right else code[::-1])
    except UserError:
        return False
    return True


def key_of_guests(farm: Farm, right: bool) -> bool:
    router = Router(farm.api, farm.entrance, Httpov(farm.scheduler, farm.access),
                    authenticate=farm.access.identify)
    key = farm.access.guest_key if right else farm.access.guest_key[::-1]
    query = {"command": "getjob", "client": "anna:1", "version": "1.2"}
    answer = router.handle(Request("GET", f"/{key}/httpov.php", query, {"host": "box"}))
    return answer.body == b"command=sleep\n"


def answer_of_a_beacon(farm: Farm, right: bool) -> bool:
    key, nonce = BEACON_KEY if right else b"another key", "ab" * 16
    probe = json.dumps({"povfarm": "probe", "version": 1, "nonce": nonce}).encode()
    packet = povfarm.Beacon("studio", "f1", 2271, key).answer(probe, "127.0.0.1")
    assert packet is not None
    return povfarm._read_answer(packet, "127.0.0.1", nonce, BEACON_KEY) is not None


def pin_of_a_certificate(farm: Farm, right: bool) -> bool:
    class Shaken:
        """A socket after the handshake."""

        def getpeercert(self, binary_form: bool) -> bytes:
            return b"certificate" if right else b"another"

        def close(self) -> None:
            pass

    pin = povfarm.hashlib.sha256(b"certificate").hexdigest()
    transport = povfarm.Transport("https://farm:2271", pin)
    transport._context.wrap_socket = lambda *_, **__: Shaken()  # type: ignore
    try:
        transport._secure(None)  # type: ignore[arg-type]
    except UserError:
        return False
    return True


CHECKS: Dict[str, Callable[[Farm, bool], bool]] = {check.__name__: check for check in (
    key_of_the_farm, token_of_a_form, code_of_a_worker, key_of_guests, answer_of_a_beacon,
    pin_of_a_certificate)}


@pytest.mark.parametrize("name", CHECKS)
def test_a_secret_is_compared_in_constant_time(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a comparison that always says yes the wrong one is let in, with no the right one is not."""
    farm, passes = Farm(tmp_path), CHECKS[name]
    assert passes(farm, True) and not passes(farm, False)
    for says in (True, False):
        def says_so(one: Any, other: Any, says: bool = says) -> bool:
            assert isinstance(one, (bytes, str)) and one and other
            return says

        monkeypatch.setattr(povfarm.hmac, "compare_digest", says_so)
        assert passes(farm, not says) == says
    farm.close()
