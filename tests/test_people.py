"""People: who has a secret, what it is good for, how much they may have, and whose turn it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import pytest

import povfarm
from helpers.base import POVFARM
from helpers.farm import STILL, environment
from helpers.farm_in_a_box import KEY, SCENE, Farm, Reply, farm_fixture, manifest, pov_job
from helpers.pictures import pixels
from helpers.trust import request_of
from povfarm import Allowance, JobOptions, LeaseSpec, Request, Role, UserError, WorkerInfo

__all__ = ["farm_fixture"]

TICKET = "a-ticket-that-is-new"


def add(farm: Farm, name: str = "anna", role: Role = Role.USER, ticket: str = TICKET,
        **limits: int) -> str:
    """Add a person as the admin does; return the key, which is not in the answer."""
    reply = farm.ask("POST", "/api/v1/users", json_body={
        "name": name, "role": role.value, "limits": limits, "ticket": ticket, "uses": 0})
    assert reply.status == 204 and reply.body == b""
    return povfarm.person_key(name, KEY, ticket)


def invite(farm: Farm, uses: int, role: Role = Role.USER, ticket: str = TICKET, **limits: int) -> str:
    """Invite so many; return the code."""
    reply = farm.ask("POST", "/api/v1/users", json_body={
        "name": "", "uses": uses, "role": role.value, "limits": limits, "ticket": ticket})
    assert reply.status == 204 and reply.body == b""
    return povfarm.invitation_code(KEY, ticket)


def come(farm: Farm, code: str, name: str, ticket: str = "its-own-ticket") -> Tuple[Reply, str]:
    """Come by a code; return the answer, and the key that it means."""
    secret = povfarm.invitation_secret(code)
    mine = povfarm.Pairing(povfarm.derived(code, name, ticket))  # the same for the same request
    reply = farm.ask("POST", "/api/v1/users/come", key=None, json_body={
        "name": name, "ticket": ticket, "share": mine.share,
        "proof": povfarm.derived(secret, "come", name, ticket, mine.share)})
    theirs = reply.json().get("share", mine.share)
    agreed, _ = mine.agree(theirs, [name, ticket, mine.share, theirs])
    return reply, povfarm.person_key(name, agreed, ticket)


def submit(farm: Farm, key: str, frames: int = 3, ticket: str = "", **options: Any) -> Reply:
    return farm.ask("POST", "/api/v1/jobs", key=key, json_body={
        "name": "ball", "pov": pov_job(frames).to_wire(), "options": options, "ticket": ticket,
        "manifest": manifest({"scene.pov": SCENE}).to_wire()})


def send(farm: Farm, key: str) -> None:
    assert farm.ask("PUT", f"/api/v1/blobs/{povfarm.hashlib.sha256(SCENE).hexdigest()}", key=key,
                    body=SCENE).status == 204


def error(reply: Reply) -> str:
    text = str(reply.json()["error"])
    assert "\n" not in text
    return text


def story(farm: Farm) -> List[Tuple[str, str, str]]:
    """What happened by whom, to whose job."""
    with farm.store.read() as look:
        return [(event.what, event.who, event.owner) for event in look.events(0, 10_000)]


STEERING: Mapping[str, Tuple[str, str, Any]] = {
    "pause": ("POST", "/pause", {}), "resume": ("POST", "/resume", {}),
    "cancel": ("POST", "/cancel", {}), "retry": ("POST", "/retry", {}),
    "change": ("PATCH", "", {"priority": -1}), "delete": ("DELETE", "", None),
}


# --- who steers what

@pytest.mark.parametrize("what", STEERING)
def test_a_user_steers_what_is_theirs_and_nothing_else(what: str, farm: Farm) -> None:
    anna, bert = add(farm), add(farm, "bert")
    job = submit(farm, anna).json()["id"]
    send(farm, anna)
    if what == "resume":
        farm.scheduler.pause(job)
    if what == "retry":
        farm.scheduler.cancel(job)
    method, path, body = STEERING[what]
    before = farm.job(job)
    refused = farm.ask(method, f"/api/v1/jobs/{job}{path}", key=bert, json_body=body)
    assert refused.status == 403 and error(refused).startswith(f"job {job} is anna's: only anna")
    assert farm.job(job) == before and "bert" not in {who for _, who, _ in story(farm)}
    assert farm.ask(method, f"/api/v1/jobs/{job}{path}", key=anna, json_body=body).status < 300
    assert story(farm)[-1][1:] == ("anna", "anna")


def test_the_ticket_of_another_is_another_ticket(farm: Farm) -> None:
    """Who guesses it neither learns of the job nor is given that one in place of their own."""
    anna, bert = add(farm), add(farm, "bert")
    jobs = [submit(farm, key, ticket="nightly").json()["id"] for key in (anna, bert, anna, KEY, bert)]
    assert jobs == [1, 2, 1, 3, 2]
    assert [farm.job(job).owner for job in (1, 2, 3)] == ["anna", "bert", "admin"]


@pytest.mark.parametrize("what", STEERING)
def test_the_admin_steers_all_and_is_named_in_the_events(what: str, farm: Farm) -> None:
    job = submit(farm, add(farm)).json()["id"]
    send(farm, KEY)
    {"resume": farm.scheduler.pause, "retry": farm.scheduler.cancel}.get(what, lambda job: None)(job)
    method, path, body = STEERING[what]
    assert farm.ask(method, f"/api/v1/jobs/{job}{path}", json_body=body).status < 300
    assert story(farm)[-1][1:] == ("admin", "anna")


@pytest.mark.parametrize("role", [Role.VIEWER, Role.SUBMIT])
def test_who_only_looks_or_submits_steers_nothing_not_even_its_own(role: Role, farm: Farm) -> None:
    key = add(farm, "prog", role)
    job = farm.scheduler.submit("ball", "prog", pov_job(2), manifest({}), JobOptions())[0]
    for method, path, body in STEERING.values():
        assert farm.ask(method, f"/api/v1/jobs/{job}{path}", key=key, json_body=body).status == 403
    assert submit(farm, key).status == (201 if role is Role.SUBMIT else 403)
    assert farm.ask("GET", "/api/v1/metrics", key=key).status == 200


def test_on_a_private_farm_a_viewer_looks_and_a_submitting_program_does_not(tmp_path: Any) -> None:
    farm = Farm(tmp_path, private=True)
    viewer, program = add(farm, "prometheus", Role.VIEWER), add(farm, "nightly", Role.SUBMIT)
    assert farm.ask("GET", "/api/v1/metrics", key=viewer).status == 200
    assert farm.ask("GET", "/api/v1/metrics", key=program).status == 403
    assert submit(farm, program).status == 201
    farm.close()


def test_every_job_and_every_event_says_whose_it_is(farm: Farm) -> None:
    anna = add(farm)
    job = submit(farm, anna).json()["id"]
    send(farm, anna)
    submit(farm, KEY)
    views = farm.ask("GET", "/api/v1/jobs").json()["jobs"]
    assert [view["owner"] for view in views] == ["admin", "anna"]
    mine = farm.ask("GET", "/api/v1/jobs?owner=anna").json()["jobs"]
    assert [view["id"] for view in mine] == [job]
    farm.render(farm.worker())
    events = farm.ask("GET", "/api/v1/events?after=0&wait=0").json()["events"]
    assert {event["owner"] for event in events if event["job"] == job} == {"anna"}
    # What happens by itself is done by nobody.
    assert {event["who"] for event in events if event["what"] in ("done", "leased", "job done")} == {""}
    assert farm.ask("GET", "/api/v1/farm", key=anna).json()["you"] == "anna"


# --- secrets

def test_a_removed_person_is_out_at_once_and_the_jobs_stay(farm: Farm) -> None:
    anna = add(farm)
    job = submit(farm, anna).json()["id"]
    cookie = {"cookie": f"{farm.access.cookie}=" + farm.access.log_in(farm.access.login_code("anna"))}
    link = farm.access.login_code("anna")
    request = request_of(farm.access, cookie)
    assert farm.access.identify(request).name == "anna"
    assert farm.ask("DELETE", "/api/v1/users/Anna").status == 204
    assert farm.ask("GET", "/api/v1/jobs", key=anna).status == 401
    assert farm.access.identify(request).name == ""
    with pytest.raises(povfarm.ProtocolError, match="this link was used before or is too old"):
        farm.access.log_in(link)
    assert farm.job(job).owner == "anna" and farm.ask("DELETE", "/api/v1/users/anna").status == 404


def test_who_is_added_again_is_somebody_else(farm: Farm) -> None:
    """Whose key was lost is removed and added again: what was logged in with the old one is out."""
    old = add(farm)
    cookie = {"cookie": f"{farm.access.cookie}=" + farm.access.log_in(farm.access.login_code("anna"))}
    link, request = farm.access.login_code("anna"), request_of(farm.access, cookie)
    before = farm.access.identify(request)
    assert before.name == "anna" and farm.access.knows(before)
    assert farm.ask("DELETE", "/api/v1/users/anna").status == 204
    new = add(farm, ticket="cd" * 16)
    assert farm.ask("GET", "/api/v1/jobs", key=old).status == 401
    assert farm.ask("GET", "/api/v1/jobs", key=new).status == 200
    assert farm.access.identify(request).name == "", "a browser that somebody has found"
    assert not farm.access.knows(before), "whose events go on"
    with pytest.raises(povfarm.ProtocolError):
        farm.access.log_in(link)


def test_the_workers_of_who_is_removed_go_too(farm: Farm) -> None:
    anna, worker = add(farm), farm.worker("hers")
    info = WorkerInfo("mine", 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
    mine = farm.scheduler.join(info, "a hash", "192.168.1.5", who="anna")
    submit(farm, anna)
    send(farm, anna)
    lease = farm.lease(mine)
    assert {view["name"]: view["owner"] for view in farm.ask("GET", "/api/v1/workers").json()["workers"]} == {
        "hers": "admin", "mine": "anna"}
    assert farm.ask("DELETE", "/api/v1/users/anna").status == 204
    assert farm.beat(mine, lease) == [lease.id] and farm.leases(mine) == []
    assert farm.lease(worker).tasks[0].frame == lease.tasks[0].frame
    assert ("removed", "admin", "") in story(farm)


def test_a_person_brings_so_many_workers(farm: Farm) -> None:
    for number in range(povfarm.MAX_BROUGHT + 1):
        info = WorkerInfo(f"w{number}", 2, 1 << 30, "Linux", {"povray": "3.7.0"}, ())
        how = {"info": info, "token": f"{number}", "address": "192.168.1.5"}
        farm.scheduler.join(who="admin", **how)
        how["token"] = f"anna's {number}"
        if number < povfarm.MAX_BROUGHT:
            farm.scheduler.join(who="anna", **how)
    with pytest.raises(UserError, match="20 workers have joined with your key"):
        farm.scheduler.join(who="anna", **how)


def test_a_new_person_of_an_old_name_has_another_secret(farm: Farm) -> None:
    old = add(farm)
    farm.ask("DELETE", "/api/v1/users/anna")
    new = farm.access.add("anna", Role.USER, {}, "another-ticket-which-is-new")
    assert farm.ask("GET", "/api/v1/users", key=old).status == 401
    assert farm.ask("GET", "/api/v1/users", key=new).status == 200


def test_no_secret_is_in_the_database_nor_in_an_answer(farm: Farm) -> None:
    key, code = add(farm), invite(farm, 2)
    reply, theirs = come(farm, code, "bert")
    data = b"".join(path.read_bytes() for path in farm.root.rglob("*") if path.is_file())
    for secret in (key, theirs, code, code.replace("-", "")):
        for form in (secret, secret.partition(":")[2] or secret):
            assert form.encode() not in data and form not in reply.body.decode()


@pytest.mark.parametrize("name", ["", "admin", "Admin", "farm", "w12", "a b", "../x", "-x", "x" * 41,
                                  "a:b", "a\nb", "<b>", "nobody",
                                  "\uff41\uff44\uff4d\uff49\uff4e", "anna\u3164", "anna\u1160", "w\uff11"])
def test_what_is_no_name_is_refused(name: str, farm: Farm) -> None:
    body = {"name": name, "role": "user", "limits": {}, "ticket": TICKET, "uses": 0}
    reply = farm.ask("POST", "/api/v1/users", json_body=body)
    assert reply.status == 400 and "name" in error(reply)


@pytest.mark.parametrize("change", [
    {"role": "admin"}, {"role": "worker"}, {"role": ""}, {"limits": {"jobs": -1}}, {"limits": {"x": 1}},
    {"limits": {"jobs": "5"}}, {"ticket": "short"}, {"limits": []}, {"ticket": "x" * 101},
    {"ticket": "x y" * 9}, {"uses": -1}, {"uses": 10_001}, {"uses": "3"}])
def test_no_right_is_given_that_there_is_not(change: Dict[str, Any], farm: Farm) -> None:
    for name, uses in (("anna", 0), ("", 1)):
        body = {"name": name, "role": "user", "limits": {}, "ticket": TICKET, "uses": uses, **change}
        assert farm.ask("POST", "/api/v1/users", json_body=body).status == 400
    assert farm.ask("GET", "/api/v1/users").json() == {"users": [], "invited": []}


def test_a_name_is_had_once_whatever_its_letters(farm: Farm) -> None:
    add(farm, "Jörg")
    for name in ("jörg", "JÖRG", "Jo\u0308rg", "\uff2aörg"):
        body = {"name": name, "role": "user", "limits": {}, "ticket": "another-ticket-new", "uses": 0}
        assert "there already" in error(farm.ask("POST", "/api/v1/users", json_body=body))
    key = povfarm.person_key("Jörg", KEY, TICKET)
    assert key.isascii() and farm.ask("GET", "/api/v1/farm", key=key).json()["you"] == "Jörg"


def test_a_request_that_comes_twice_adds_one_person(farm: Farm) -> None:
    assert add(farm) == add(farm)
    code = invite(farm, 1)
    assert [come(farm, code, "bert")[0].status for _ in range(2)] == [201, 201]
    assert len(farm.ask("GET", "/api/v1/users").json()["users"]) == 2


# --- invitations

def test_a_class_comes_by_one_code_and_each_picks_a_name_once(farm: Farm) -> None:
    code = invite(farm, 3, jobs=2)
    keys = {name: come(farm, code, name, f"ticket {name}") for name in ("anna", "bert")}
    for name, (reply, key) in keys.items():
        secret, share = povfarm.invitation_secret(code), reply.json()["share"]
        assert reply.json() == {"name": name, "role": "user", "share": share, "proof": povfarm.derived(
            secret, "welcome", name, f"ticket {name}", share)}
        assert farm.ask("GET", "/api/v1/farm", key=key).json()["you"] == name
    taken, key = come(farm, code, "Anna", "another ticket")
    assert taken.status == 400 and "choose another name" in error(taken)
    assert farm.ask("GET", "/api/v1/users", key=key).status == 401
    assert come(farm, code.lower().replace("-", " "), "cleo", "hers")[0].status == 201
    late, _ = come(farm, code, "dora", "hers")
    assert late.status == 403 and "ask for a new one" in error(late)
    views = farm.ask("GET", "/api/v1/users").json()["users"]
    assert {view["name"]: view["limits"]["jobs"] for view in views} == {"anna": 2, "bert": 2, "cleo": 2}
    assert [event[:2] for event in story(farm) if event[0].startswith(("inv", "person"))] == [
        ("invited", "admin"), ("person added", "anna"), ("person added", "bert"),
        ("person added", "cleo")]


def test_who_has_the_code_and_hears_all_does_not_have_the_key_of_another(farm: Farm) -> None:
    code = invite(farm, 3)
    reply, key = come(farm, code, "anna")
    secret, share = povfarm.invitation_secret(code), reply.json()["share"]
    for guess in (secret, share, povfarm.derived(secret, "secret"), code):
        wrong = povfarm.person_key("anna", guess, "its-own-ticket")
        assert wrong != key and farm.ask("GET", "/api/v1/users", key=wrong).status == 401
    # Another share under the same name and ticket is somebody else.
    mine = povfarm.Pairing()
    taken = farm.ask("POST", "/api/v1/users/come", key=None, json_body={
        "name": "anna", "ticket": "its-own-ticket", "share": mine.share,
        "proof": povfarm.derived(secret, "come", "anna", "its-own-ticket", mine.share)})
    assert taken.status == 400 and farm.ask("GET", "/api/v1/users", key=key).status == 200


@pytest.mark.parametrize("share", ["0", "1", "x", "", "-2", "f" * 513, f"{povfarm._PRIME - 1:x}"])
def test_a_share_that_leads_to_a_known_key_is_refused(share: str, farm: Farm) -> None:
    secret = povfarm.invitation_secret(invite(farm, 1))
    assert farm.ask("POST", "/api/v1/users/come", key=None, json_body={
        "name": "anna", "ticket": "t", "share": share,
        "proof": povfarm.derived(secret, "come", "anna", "t", share)}).status == 400


def test_an_invitation_is_nobody(farm: Farm) -> None:
    code = invite(farm, 3)
    secret = povfarm.invitation_secret(code)
    for key in (f"+{TICKET}:{secret}", f"%2B{TICKET}:{secret}", secret, code):
        assert farm.ask("GET", "/api/v1/users", key=key).status == 401
    assert farm.ask("PATCH", f"/api/v1/users/+{TICKET}", json_body={"jobs": 1}).status == 404
    assert farm.ask("GET", "/api/v1/users").json()["users"] == []


def test_nobody_comes_by_an_invitation_that_is_withdrawn(farm: Farm) -> None:
    code = invite(farm, 3, jobs=2)
    anna = come(farm, code, "anna")[1]
    [one] = farm.ask("GET", "/api/v1/users").json()["invited"]
    assert (one["name"], one["uses"], one["limits"]) == (f"+{TICKET}", 2, {"jobs": 2})
    assert one["until"] == one["added"] + povfarm.INVITED_FOR
    assert farm.ask("GET", "/api/v1/users", key=anna).json()["invited"] == []
    assert farm.ask("DELETE", f"/api/v1/users/+{TICKET}", key=anna).status == 403
    assert farm.ask("DELETE", f"/api/v1/users/+{TICKET}").status == 204
    assert come(farm, code, "bert")[0].status == 403
    assert farm.ask("GET", "/api/v1/users", key=anna).status == 200, "who has come stays"
    assert farm.ask("GET", "/api/v1/users").json()["invited"] == []
    assert farm.ask("DELETE", f"/api/v1/users/+{TICKET}").status == 404
    assert [event[:2] for event in story(farm)][-1] == ("withdrawn", "admin")


def test_a_code_ends_and_a_wrong_one_is_slowed_down(farm: Farm) -> None:
    code = invite(farm, 3)
    before = farm.clock.mono
    assert [come(farm, "AAAAA-AAAAA", "anna")[0].status for _ in range(8)] == [403] * 8
    assert farm.clock.mono > before
    farm.clock.advance(povfarm.INVITED_FOR + 1)
    assert come(farm, code, "anna")[0].status == 403
    farm.scheduler.tidy()
    with farm.store.read() as look:
        assert look.people(invited=True) == []


def test_nobody_comes_under_the_name_of_somebody_whose_jobs_are_there(farm: Farm) -> None:
    submit(farm, add(farm))
    farm.ask("DELETE", "/api/v1/users/anna")
    for name in ("anna", "ANNA"):
        assert "jobs are still here" in error(come(farm, invite(farm, 3), name)[0])


# --- limits

def test_over_a_limit_comes_one_sentence_with_what_to_do(farm: Farm) -> None:
    anna = add(farm, jobs=2, frames=10)
    assert [submit(farm, anna, 4).status for _ in range(2)] == [201, 201]
    assert error(submit(farm, anna, 1)) == (
        "you have 2 jobs that are not finished, and may have 2: wait until one is, or cancel one "
        "('povfarm.py cancel JOB')")
    farm.scheduler.cancel(1)
    assert "you may have 10 frames" in error(submit(farm, anna, 7))
    assert submit(farm, anna, 6).status == 201
    assert submit(farm, KEY, 6).status == 201, "the admin has none"
    back = farm.ask("POST", "/api/v1/jobs/1/retry", key=anna, json_body={})
    assert back.status == 400 and "may have 2" in error(back)


def test_what_is_finished_counts_no_more(farm: Farm) -> None:
    anna = add(farm, jobs=1)
    submit(farm, anna)
    send(farm, anna)
    assert submit(farm, anna).status == 400
    farm.render(farm.worker())
    assert submit(farm, anna).status == 201


def test_the_cap_on_priority_holds(farm: Farm) -> None:
    anna, bert = add(farm), add(farm, "bert", priority=5)
    assert error(submit(farm, anna, priority=1)) == (
        "the highest priority of your jobs is 0: give --priority 0 or less")
    job = submit(farm, anna, priority=-3).json()["id"]
    for priority, status in ((1, 400), (1000, 400), (0, 200)):
        assert farm.ask("PATCH", f"/api/v1/jobs/{job}", key=anna,
                        json_body={"priority": priority}).status == status
    assert submit(farm, bert, priority=5).status == 201
    assert submit(farm, bert, priority=6).status == 400
    # The admin may lift a job above the cap of its owner, who may then change it otherwise.
    assert farm.ask("PATCH", f"/api/v1/jobs/{job}", json_body={"priority": 9}).status == 200
    assert farm.ask("PATCH", f"/api/v1/jobs/{job}", key=anna, json_body={"verify": 0}).status == 200
    assert farm.job(job).options.priority == 9


def test_a_person_has_so_many_workers_at_a_time(farm: Farm) -> None:
    anna = add(farm, workers=2)
    for _ in range(2):
        submit(farm, anna, 9)
    send(farm, anna)
    first, second, third = (farm.worker(name) for name in ("w-one", "w-two", "w-three"))
    lease = farm.lease(first)
    farm.lease(second)
    assert farm.leases(third) == []
    farm.lease(second)  # who renders for her already may have more
    farm.scheduler.release(first, lease.id)
    farm.lease(third)
    assert farm.leases(first) == []
    farm.ask("PATCH", "/api/v1/users/anna", json_body={"workers": 3})
    farm.lease(first)


def test_whose_jobs_take_too_much_room_gets_nothing_until_some_is_deleted(farm: Farm) -> None:
    anna, worker = add(farm, space=300), farm.worker()
    old = submit(farm, anna, 3).json()["id"]
    send(farm, anna)
    farm.render(worker)
    kept = farm.job(old).kept
    images = sum(path.stat().st_size for path in farm.root.glob("jobs/1-ball/*.png"))
    assert kept == images + len(SCENE)
    farm.ask("PATCH", "/api/v1/users/anna", json_body={"space": kept + 10 + len(SCENE)})
    job = submit(farm, anna, 3).json()["id"]
    farm.render(worker)
    assert farm.job(job).done == 1, "what is begun is delivered"
    assert farm.leases(worker) == []
    why = farm.ask("GET", f"/api/v1/jobs/{job}").json()["waiting_for"]
    assert "are kept of anna's jobs" in why and "povfarm.py delete" in why
    assert "this one's files have 16 B" in error(submit(farm, anna))
    farm.ask("DELETE", f"/api/v1/jobs/{old}", key=anna)
    assert farm.render(worker) == [2, 3]


def test_a_project_that_is_larger_than_what_is_left_is_refused(farm: Farm) -> None:
    anna = add(farm, space=1000)
    big = manifest({"scene.pov": SCENE, "big": b"x" * 1000})
    reply = farm.ask("POST", "/api/v1/jobs", key=anna, json_body={
        "name": "big", "pov": pov_job(1).to_wire(), "options": {}, "manifest": big.to_wire()})
    assert reply.status == 400 and "all may have" in error(reply)
    assert submit(farm, anna).status == 201


def test_who_says_that_files_are_smaller_than_they_are_gets_no_more_room(farm: Farm) -> None:
    """Neither sending them, nor naming what others have sent, before or afterwards."""
    def submit_as(key: str, size: int) -> Reply:
        files = manifest({"big": big}).to_wire()
        files["files"][0]["size"] = size
        return farm.ask("POST", "/api/v1/jobs", key=key, json_body={
            "name": "big", "pov": pov_job(1).to_wire(), "options": {}, "manifest": files})

    def send_it(key: str) -> int:
        return farm.ask("PUT", f"/api/v1/blobs/{povfarm.hashlib.sha256(big).hexdigest()}", key=key,
                        body=big).status

    def kept(name: str) -> int:
        with farm.store.read() as look:
            return look.usage(name).space

    big, anna, bert = b"x" * 2000, add(farm, space=1000), add(farm, "bert")
    assert submit_as(anna, 3).status == 201 and kept("anna") == 3
    assert send_it(anna) == 422 and kept("anna") == 3 and not list(farm.root.glob("blobs/*/*"))
    assert submit_as(bert, 2000).status == 201 and send_it(bert) == 204
    assert kept("anna") == kept("bert") == 2000 and farm.states(1) == ["queued"]
    refused = submit_as(anna, 3)
    assert refused.status == 400 and "all may have" in error(refused)
    farm.ask("DELETE", "/api/v1/jobs/1", key=anna)
    assert kept("anna") == 0 and submit_as(anna, 3).status == 400
    assert submit_as(bert, 3).status == 201 and kept("bert") == 4000


@pytest.mark.parametrize("what", ["again", "retry"])
def test_no_more_frames_come_by_many_requests_at_the_same_time(
        what: str, farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is done in steps, another begins."""
    monkeypatch.setattr(povfarm, "STEP", 20)
    add(farm, frames=30)
    todo, rest = [], farm.scheduler._rest
    for frames in (10, 30):
        todo.append(farm.scheduler.submit(
            "ball", "anna", pov_job(frames), manifest({}), JobOptions())[0])
        farm.scheduler.cancel(todo[-1])

    def begin(job: int) -> None:
        if what == "again":
            farm.scheduler.again(job, "1-10" if job == 1 else "1-30", "anna")
        else:
            farm.scheduler.retry(job, "anna")

    def meanwhile() -> None:
        rest()
        if todo:
            begin(todo.pop())

    monkeypatch.setattr(farm.scheduler, "_rest", meanwhile)
    with pytest.raises(UserError, match="you may have 30 frames"):
        begin(todo.pop())
    with farm.store.read() as look:
        assert look.usage("anna").frames <= 30


@pytest.mark.parametrize("wait", ["", "wait=1&"])
def test_the_events_of_a_worker_that_is_removed_end(wait: str, tmp_path: Any) -> None:
    farm = Farm(tmp_path, private=True)
    key, target = f"#{farm.worker()}:anna", f"/api/v1/events?{wait}after=99"
    if wait:
        farm.clock.meanwhile.append(lambda: farm.scheduler.remove_worker(1))
        assert farm.ask("GET", target, key=key).status == 401
    else:
        answer = farm.router.handle(Request(
            "GET", "/api/v1/events", {"after": "0"}, {
                "host": "box", **farm.signer.headers(key, "GET", target)}, target=target))
        assert not isinstance(answer.body, (bytes, povfarm.FileSlice))
        assert next(answer.body).startswith(b"retry") and b"joined" in next(answer.body)
        farm.scheduler.remove_worker(1)
        farm.submit()
        assert b"submitted" not in b"".join(answer.body)
    farm.close()


def test_the_events_of_who_is_removed_end(tmp_path: Any) -> None:
    farm = Farm(tmp_path, private=True)
    key = add(farm, "prom", Role.VIEWER)
    answer = farm.router.handle(Request(
        "GET", "/api/v1/events", {}, {"host": "box", "authorization": f"Bearer {key}"}))
    assert not isinstance(answer.body, (bytes, povfarm.FileSlice))
    assert next(answer.body).startswith(b"retry") and next(answer.body) == b""
    farm.scheduler.people.remove("prom")
    farm.submit()
    assert b"submitted" not in b"".join(answer.body)
    farm.close()


def test_who_is_removed_while_waiting_for_events_hears_none(farm: Farm) -> None:
    key = add(farm, "prom", Role.VIEWER)
    farm.clock.meanwhile.append(lambda: farm.scheduler.people.remove("prom"))
    answer = farm.ask("GET", "/api/v1/events?wait=9", key=key)
    assert answer.status == 401 and "removed" in error(answer)


def test_what_serve_says_holds_for_all_who_have_no_limit_of_their_own(tmp_path: Any) -> None:
    farm = Farm(tmp_path, allowance=Allowance(jobs=1, priority=-2))
    anna, bert = add(farm), add(farm, "bert", jobs=2)
    assert error(submit(farm, anna)).startswith("the highest priority of your jobs is -2")
    assert [submit(farm, anna, priority=-2).status for _ in range(2)] == [201, 400]
    assert [submit(farm, bert, priority=-2).status for _ in range(3)] == [201, 201, 400]
    limits = {view["name"]: view["limits"]["jobs"]
              for view in farm.ask("GET", "/api/v1/users").json()["users"]}
    assert limits == {"anna": 1, "bert": 2}
    farm.close()


# --- whose turn it is

class Room:
    """Workers that render one lease at a time; the clock goes on from one end to the next."""

    def __init__(self, farm: Farm, workers: int, seconds: Mapping[str, float]) -> None:
        self.farm, self.seconds = farm, seconds  # that a frame of an owner takes
        self.busy: Dict[int, Tuple[float, LeaseSpec]] = {}
        self.workers = [farm.worker(f"r{number}") for number in range(workers)]
        self.begun: Dict[str, float] = {}  # when the first frame of each was
        self.spent: Dict[str, float] = {}

    def submit(self, owner: str, jobs: int = 1, frames: int = 20, **options: Any) -> None:
        for _ in range(jobs):
            _, missing = self.farm.scheduler.submit(
                "ball", owner, pov_job(frames), manifest({"scene.pov": SCENE}),
                JobOptions().changed(options))
            for sha256 in missing:
                self.farm.scheduler.put_blob(sha256, [SCENE])

    def run(self, seconds: float) -> None:
        """Let so much time go by."""
        end = self.farm.clock.mono + seconds
        while True:
            for worker in self.workers:
                if worker not in self.busy:
                    self._take(worker)
            worker = min(self.busy, key=lambda one: self.busy[one][0], default=0)
            if not worker or self.busy[worker][0] > end:
                self.farm.clock.advance(end - self.farm.clock.mono)
                return
            at, lease = self.busy.pop(worker)
            self.farm.clock.advance(at - self.farm.clock.mono)
            for index in range(len(lease.tasks)):
                self.farm.finish(worker, lease, index, cpu=self.cost(lease))

    def cost(self, lease: LeaseSpec) -> float:
        return self.seconds.get(self.farm.job(lease.job).owner, 10.0)

    def _take(self, worker: int) -> None:
        for lease in self.farm.leases(worker):
            owner, now = self.farm.job(lease.job).owner, self.farm.clock.mono
            self.begun.setdefault(owner, now)
            took = self.cost(lease) * len(lease.tasks)
            self.spent[owner] = self.spent.get(owner, 0.0) + took
            self.busy[worker] = now + took, lease


PUPILS = [f"p{number:02}" for number in range(25)]


def pupils(farm: Farm) -> None:
    for name in PUPILS:
        farm.access.add(name, Role.USER, {}, TICKET)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("frame", [0.2, 1.0, 10.0])
def test_a_flood_by_one_delays_the_first_frame_of_another_by_one_frame(
        workers: int, frame: float, tmp_path: Any) -> None:
    farm = Farm(tmp_path, lease_time=1e5)
    pupils(farm)
    room = Room(farm, workers, dict.fromkeys(PUPILS, frame))
    room.submit("p00", jobs=25, frames=60)
    room.run(20 * frame)
    for name in ("p13", "p24"):
        asked = farm.clock.mono
        room.submit(name)
        room.run(3 * frame)
        # What a cheap frame costs is its share of a short run.
        assert room.begun[name] - asked <= max(frame, povfarm.SHORT_TURN) + 0.001
    farm.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_twenty_five_who_want_all_get_the_same(workers: int, tmp_path: Any) -> None:
    """However many jobs each has, and how long the frames take."""
    farm = Farm(tmp_path, lease_time=1e5)
    pupils(farm)
    room = Room(farm, workers, {name: 2.0 + 2 * number % 7 for number, name in enumerate(PUPILS)})
    for number, name in enumerate(PUPILS):
        room.submit(name, jobs=1 + number % 5, frames=200)
    room.run(400 / workers + 250)
    times = [room.spent[name] for name in PUPILS]
    assert len(times) == 25 and max(times) - min(times) <= 2 * max(room.seconds.values()), times
    farm.close()


def test_who_comes_late_gets_no_more_than_the_others(tmp_path: Any) -> None:
    farm = Farm(tmp_path, lease_time=1e5)
    pupils(farm)
    room = Room(farm, 1, {})
    room.submit("p00", frames=300)
    room.run(1000)
    room.submit("p01", frames=300)
    before = dict(room.spent)
    room.run(200)
    assert room.spent["p01"] == pytest.approx(room.spent["p00"] - before["p00"], abs=10.1)
    farm.close()


def test_who_takes_a_whole_computer_has_fewer_turns(farm: Farm) -> None:
    """A still is rendered on all four cores, a frame of an animation on one."""
    room = Room(farm, 1, {})
    room.submit("anna", jobs=9, frames=1, slices="off")
    room.submit("bert", frames=40)
    owners = []
    for _ in range(20):
        lease = farm.lease(room.workers[0], idle=4, slots=40)
        owners.append(farm.job(lease.job).owner)
        farm.clock.advance(10)
        farm.finish(room.workers[0], lease, cpu=10.0)
        assert lease.threads == (4 if owners[-1] == "anna" else 1)
    assert owners.count("anna") == 4


def test_a_higher_priority_goes_before_all_people(farm: Farm) -> None:
    room = Room(farm, 1, {})
    room.submit("anna", frames=5)
    room.submit("admin", frames=5, priority=2)
    assert [farm.job(farm.lease(room.workers[0], slots=2).job).owner
            for _ in range(10)] == [
        *["admin"] * 5, *["anna"] * 5]


def test_one_persons_jobs_share_what_is_theirs(farm: Farm) -> None:
    workers = [farm.worker(f"r{number}") for number in range(8)]
    room = Room(farm, 0, {})
    room.submit("anna", jobs=3, frames=30)
    room.submit("bert", frames=30)
    held = [farm.lease(worker).job for worker in workers]
    assert sorted(held.count(job) for job in (1, 2, 3)) == [1, 1, 2] and held.count(4) == 4


@pytest.mark.parametrize("people", [1, 300])
def test_a_lease_costs_the_same_however_many_jobs_and_people_there_are(
        people: int, tmp_path: Any) -> None:
    costs = []
    for jobs in (1, 300):
        farm = Farm(tmp_path / str(jobs))
        room = Room(farm, 0, {})
        for number in range(jobs):
            room.submit(f"somebody{number % people}", frames=2)
        worker = farm.worker()
        steps: List[int] = []
        farm.scheduler.release(worker, farm.lease(worker).id)
        farm.store._writer.set_progress_handler(lambda: steps.append(1), 20)  # noqa: B023 - at once
        farm.lease(worker)
        costs.append(len(steps))
        farm.close()
    assert costs[1] <= 2 * costs[0], costs


# --- what a computer keeps

@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"key": "anna:x"}', "\xff"])
def test_a_spoilt_file_of_a_person_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(text)
    options = povfarm.Options(data=tmp_path, key="", key_file="")
    assert povfarm._kept(options) == {} and povfarm._known_key(options) == ""


def test_the_coordinators_own_computer_uses_the_farms_key(tmp_path: Path) -> None:
    kept = dict.fromkeys(("farm_id", "name", "url", "pin"), "x")
    (tmp_path / "person.json").write_text(json.dumps({"key": "anna:x", **kept}))
    (tmp_path / "farm.key").write_text("the farm's")
    options = povfarm.Options(data=tmp_path, key="", key_file="")
    assert povfarm._known_key(options) == "anna:x"
    (tmp_path / "coordinator.json").write_text("{}")
    assert povfarm._known_key(options) == "the farm's"


# --- a class, with real processes

class Computer:
    """Somebody's computer: a data directory and a place to work in."""

    def __init__(self, place: Path, name: str) -> None:
        self.name, self.place = name, place / name
        self.data = self.place / "data"
        self.started: List["subprocess.Popen[str]"] = []
        self.place.mkdir()
        (self.place / "scene.pov").write_text(STILL)
        self.environ = {**environment(place), "POVFARM_DATA": str(self.data), "POVFARM_WORKER_NAME": name}

    def start(self, typed: str) -> "subprocess.Popen[str]":
        self.started.append(subprocess.Popen(
            [*POVFARM, *typed.split()], cwd=self.place, env=self.environ, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return self.started[-1]

    def run(self, typed: str, code: int = 0) -> str:
        """Type a command; return what it says, if it ends as it should."""
        done = subprocess.run([*POVFARM, *typed.split()], cwd=self.place, env=self.environ, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=120, check=False)
        assert done.returncode == code, done.stdout
        return done.stdout

    def close(self) -> None:
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.communicate(timeout=60)


@pytest.fixture(name="room")
def room_fixture(tmp_path: Path) -> Iterator[Callable[[str], Computer]]:
    """Computers by their names."""
    there: Dict[str, Computer] = {}

    def computer(name: str) -> Computer:
        return there.get(name) or there.setdefault(name, Computer(tmp_path, name))

    yield computer
    for one in reversed(list(there.values())):
        one.close()


def said(process: "subprocess.Popen[str]", words: str) -> str:
    """Read lines until one has these words; return it."""
    assert process.stdout is not None
    enough = threading.Timer(120, process.kill)  # or a test that fails would not end
    enough.start()
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if words in line:
                return line
        raise AssertionError(f"no {words!r} in {lines}")
    finally:
        enough.cancel()


def class_of(teacher: Computer, more: str = "") -> str:
    """The teacher's one command; return what pupils type, without the name and the command."""
    line = said(teacher.start(f"serve --bind 127.0.0.1 --port 0 --no-discovery --invite 3 {more}"),
                "--code")
    return " ".join(re.findall(r"--(?:server|code) \S+", line))


@pytest.mark.slow
def test_a_class_is_ready_in_two_commands(
        room: Callable[[str], Computer], povray: str, no_process_is_left: None) -> None:
    typed = class_of(room("teacher"), "--jobs-limit 2")
    for name in ("Anna", "Bert"):
        process = room(name).start(f"work {typed} --user {name}")
        assert f"you are {name} in the farm" in said(process, "you are")
        said(process, "working for")
    anna, bert = room("Anna"), room("Bert")
    if os.name == "posix":
        assert (anna.data / "person.json").stat().st_mode & 0o777 == 0o600
    # From here on everything is as short as on the coordinator's computer.
    assert anna.run("submit scene.pov +W40 +H30 --wait --output out --name hers").startswith("1\n")
    assert pixels(anna.place / "out" / "scene.png")
    job = bert.run("submit scene.pov +W40 +H30 +KFF50000 --name his").split()[0]
    assert "is anna's" in anna.run(f"cancel {job}", 1).lower().replace("bert's", "anna's")
    assert "highest priority of your jobs is 0" in bert.run(f"set {job} priority=7", 2)
    assert "is cancelled" in bert.run(f"cancel {job}")
    mine = json.loads(bert.run("status --mine --json"))
    assert [(view["name"], view["owner"]) for view in mine] == [("his", "Bert")]
    assert re.search(r"his +Bert +cancelled", anna.run("status"))
    assert re.search(r"Anna +user +0 +0 .*jobs-limit=2", room("teacher").run("users"))
    assert re.fullmatch(r"http://127.0.0.1:\d+/login/\S+\n", anna.run("login"))


@pytest.mark.slow
def test_who_comes_again_is_the_same_and_who_is_removed_is_out(room: Callable[[str], Computer]) -> None:
    typed, teacher, anna = class_of(room("teacher")), room("teacher"), room("anna")
    assert "/login/" in anna.run(f"login {typed} --user anna")
    key = (anna.data / "person.json").read_text()
    assert "you are" not in anna.run(f"login {typed} --user Anna")
    assert (anna.data / "person.json").read_text() == key
    taken = room("other").run(f"login {typed} --user anna", 2)
    assert "'anna' is there already" in taken and "--user NAME" in taken
    assert "code is wrong" in room("other").run(
        re.sub("--code .*", "--code AAAAA-AAAAA", f"login {typed}") + " --user bert", 1)
    assert "you are carl" in anna.run(f"login {typed} --user carl")
    aside, = anna.data.glob("person-*-anna.json")
    assert aside.replace(anna.data / "person.json").read_text() == key
    assert "add its --code" in anna.run("login --user carl", 2)
    teacher.run("users remove anna")
    assert "ask for an invitation" in anna.run("submit scene.pov", 1)
    assert "you are bert" in anna.run(f"login {typed} --user bert"), "the old key is in nobody's way"


@pytest.mark.slow
def test_a_flood_holds_nobody_up(room: Callable[[str], Computer], povray: str) -> None:
    typed, anna, bert = class_of(room("teacher")), room("anna"), room("bert")
    for computer in (anna, bert):
        computer.run(f"login {typed} --user {computer.name}")
    for number in range(4):
        anna.run(f"submit scene.pov +W40 +H30 +KFF5 --name flood{number}")
    bert.run("submit scene.pov +W40 +H30 +KFF3")
    # Whoever comes first, the other one is next.
    anna.run("work --cores 1 --until-idle")
    url, key = re.search(r"http://\S+", typed), (room("teacher").data / "farm.key").read_text()
    assert url
    events = povfarm.Client(url[0], key).get("/api/v1/events?after=0&wait=0")["events"]
    owners = [event["owner"] for event in events if event["what"] == "leased"]
    assert set(owners[:2]) == {"anna", "bert"} and len(owners) >= 23


@pytest.mark.slow
def test_programs_have_keys_of_their_own(room: Callable[[str], Computer]) -> None:
    typed, teacher = class_of(room("teacher"), "--private").partition(" --code")[0], room("teacher")
    keys = {role: json.loads(teacher.run(f"users add the-{role} --role {role} --json"))["key"]
            for role in ("viewer", "submit", "user")}
    look, send, both = room("look"), room("send"), room("both")
    for role, computer in zip(keys, (look, send, both)):
        computer.environ["POVFARM_KEY"] = keys[role]
    job = send.run(f"submit {typed} scene.pov").split()[0]
    assert json.loads(look.run(f"status {typed} --json"))[0]["owner"] == "the-submit"
    for computer, command in ((look, "submit scene.pov"), (look, f"cancel {job}"),
                              (send, "status"), (send, f"cancel {job}"), (both, f"cancel {job}")):
        assert "may" in computer.run(f"{command} {typed}", 1)
    # A key that was given once is kept by login.
    both.run(f"login {typed}")
    del both.environ["POVFARM_KEY"]
    assert "no jobs" in both.run("status --mine")
