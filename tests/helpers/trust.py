"""Who is who: signs requests for tests that write them themselves."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, Callable, Dict, Mapping, Optional

import povfarm
from povfarm import Access, Client, Pairing, Session


class Signer:
    """One end of the proofs; ``hello`` asks the coordinator."""

    def __init__(self, hello: Callable[[str, str], Dict[str, Any]], pin: str = "") -> None:
        self._hello = hello
        self._pin = pin
        self._sessions: Dict[str, Session] = {}

    def session(self, key: str) -> Session:
        """Say hello, and return what it came to; the coordinator's proof is not looked at."""
        who, secret = povfarm.split_key(key)
        nonce = secrets.token_hex(16)
        told = self._hello(who, nonce)
        return Session(told["session"], nonce, povfarm.secret_hash(secret), told["farm_id"],
                       self._pin)

    def headers(self, key: Optional[str], method: str, target: str, body: bytes = b"",
                sha256: str = "") -> Dict[str, str]:
        """What a request has to have beside its own headers; nothing without a key."""
        if not key:
            return {}
        if key not in self._sessions:
            self._sessions[key] = self.session(key)
        sha256 = sha256 or (hashlib.sha256(body).hexdigest() if body else "")
        proof = self._sessions[key].sign(method, target, sha256)
        return {"authorization": proof, **({"x-sha256": sha256} if sha256 else {})}


def signer_of(access: Access, pin: str = "") -> Signer:
    """One without sockets."""
    return Signer(access.hello, pin)


def signer_at(url: str) -> Signer:
    """One for a coordinator that listens."""
    client = Client(url)

    def hello(who: str, nonce: str) -> Dict[str, Any]:
        reply = client.request("POST", povfarm.HELLO, json={
            "who": who, "nonce": nonce, "wire": povfarm.WIRE})
        return dict(reply.json())

    return Signer(hello)


def key_of_worker(worker: int, farm_key: str, farm_id: str, ticket: str) -> str:
    """The key of a worker that has joined with the farm key."""
    secret = povfarm.worker_secret(povfarm.secret_hash(farm_key), farm_id, ticket)
    return f"#{worker}:{secret}"


def join_at(client: Client, info: Mapping[str, Any]) -> str:
    """Join as a worker with the client's key; return the worker's."""
    ticket = secrets.token_hex(16)
    reply = client.request("POST", "/api/v1/workers", json={**info, "ticket": ticket}).json()
    return key_of_worker(reply["id"], client.token, client.claims(), ticket)


def join_by(ask: Callable[..., Any], key: Optional[str], info: Mapping[str, Any], farm_id: str,
            **more: Any) -> Dict[str, Any]:
    """Join with the farm key, or pair without; ``ask`` is that of a farm in a box.

    Return the answer, with the worker's ``key`` and ``code``.
    """
    def post(**wire: str) -> Dict[str, Any]:
        reply = ask("POST", "/api/v1/workers", key=key, json_body={**info, **wire}, **more)
        assert reply.status in (200, 201), reply.body
        return dict(reply.json())

    ticket, mine = secrets.token_hex(16), Pairing()
    if key:
        answer = post(ticket=ticket)
        return {**answer, "key": key_of_worker(answer["id"], key, farm_id, ticket), "code": ""}
    theirs = post(commitment=mine.commitment)
    answer = post(commitment=mine.commitment, share=mine.share, nonce=mine.nonce)
    secret, code = mine.agree(theirs["share"], [
        farm_id, "", info["name"], mine.share, mine.nonce, theirs["share"], theirs["nonce"]])
    return {**answer, "key": f"#{answer['id']}:{secret}", "code": code}


def place_of(access: Access, cookie: str) -> str:
    """What is before the path of every page for a browser with this cookie."""
    value = cookie.partition(f"{access.cookie}=")[2].partition(";")[0]
    return access.place(value) if value else ""


def request_of(access: Access, headers: Mapping[str, str], body: bytes = b"") -> povfarm.Request:
    """A request of a browser for the first page, or of its form."""
    path = place_of(access, headers.get("cookie", "")) + "/"
    return povfarm.Request("POST" if body else "GET", path, headers=headers,
                           body=povfarm.BodyReader.of(body))
