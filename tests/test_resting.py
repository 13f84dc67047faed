"""Workers that rest: paused, drained, by hand or by themselves."""

from __future__ import annotations

import calendar
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Optional, Tuple

import pytest

import povfarm
from helpers.farm_in_a_box import FakeClock, Farm, farm_fixture
from povfarm import Offer, Usage, UserError, week_of, why_not_now

__all__ = ["farm_fixture"]


def view_of(farm: Farm, worker: int) -> Tuple[str, Optional[str]]:
    with farm.store.read() as tx:
        view = next(one for one in farm.api.views.workers(tx) if one["id"] == worker)
    return view["state"], view.get("reason")


def test_who_rests_gets_nothing_and_says_why_until_it_goes_on(farm: Farm) -> None:
    anna, job = farm.worker(), farm.submit()
    lease = farm.lease(anna)
    for action, reason in (("pause", "paused by hand"), (
            "drain", "drained by hand, until it is resumed or started anew")):
        farm.scheduler.steer_worker(anna, action)
        assert farm.leases(anna) == [] and view_of(farm, anna) == ("working", reason)
    assert farm.beat(anna, lease) == []  # what it has it may finish
    farm.finish(anna, lease)
    assert view_of(farm, anna) == ("resting", reason)
    with farm.store.read() as tx:
        assert farm.scheduler.muster(tx).why(farm.job(job)) == (f"anna rests: {reason}", "")
    farm.scheduler.steer_worker(anna, "resume")
    assert view_of(farm, anna) == ("idle", None)
    offer = Offer(0, 0, 0, rest="paused on this computer")  # as it says by itself
    assert farm.scheduler.lease(anna, offer, 0.0, lambda: True) == []
    assert view_of(farm, anna) == ("resting", "paused on this computer")
    assert len(farm.leases(anna)) == 1 and view_of(farm, anna) == ("working", None)
    told = [(event.what, event.text) for event in farm.scheduler.wait_events(0, 0, 99)]
    assert [what for what in told if what[0].startswith("worker")] == [
        ("worker paused", "anna"), ("worker drained", "anna"), ("worker resumed", "anna")]


def test_a_pause_outlives_every_restart_and_a_drain_ends_when_the_worker_comes_anew(
        tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(9)
    farm.scheduler.steer_worker(anna, "pause")
    farm.scheduler.steer_worker(bert, "drain")
    farm = farm.restarted()
    assert farm.leases(anna) == farm.leases(bert) == []
    for worker, name in ((anna, "anna"), (bert, "bert")):
        farm.scheduler.rejoin(worker, povfarm.WorkerInfo(name, 2, 1 << 30, "", {}), "192.168.1.5")
    assert farm.leases(anna) == [] and len(farm.leases(bert)) == 1 and farm.problems() == []
    farm.close()


def test_who_waits_or_beats_is_told_of_a_pause_at_once(farm: Farm) -> None:
    anna = farm.worker()
    began = farm.clock.mono
    farm.clock.meanwhile.append(lambda: farm.scheduler.steer_worker(anna, "pause"))
    assert farm.leases(anna, wait=25) == [] and farm.clock.mono - began <= 1
    farm.scheduler.steer_worker(anna, "resume")
    farm.submit()
    lease = farm.lease(anna)
    began = farm.clock.mono
    farm.clock.meanwhile.append(lambda: farm.scheduler.steer_worker(anna, "pause"))
    assert farm.beat(anna, lease, wait=9) == [] and farm.clock.mono - began <= 1


def test_no_frame_waits_for_a_worker_that_rests(farm: Farm) -> None:
    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.submit(1)
    farm.fail(bert, farm.lease(bert))
    assert farm.leases(bert) == []  # it is for anna to try
    farm.scheduler.steer_worker(anna, "pause")
    farm.lease(bert)


def test_only_its_owner_and_the_admin_steer_a_worker(farm: Farm) -> None:
    info = povfarm.WorkerInfo("annas", 2, 1 << 30, "", {})
    mine = farm.scheduler.join(info, "a" * 64, "192.168.1.5", who="anna")
    free = farm.worker("free")
    farm.scheduler.steer_worker(mine, "pause", "anna")
    for worker, who in ((mine, "bert"), (free, "anna")):
        with pytest.raises(povfarm.NotYours, match="is not yours: only who has started it"):
            farm.scheduler.steer_worker(worker, "resume", who)
    farm.scheduler.steer_worker(mine, "resume")
    with pytest.raises(povfarm.NotFound, match="cannot be asked to dance"):
        farm.scheduler.steer_worker(mine, "dance")
    with pytest.raises(povfarm.IllegalTransition, match="stranger was not let in"):
        farm.scheduler.steer_worker(farm.worker("stranger", admitted=False), "pause")
    with pytest.raises(UserError, match="there is no worker 99"):
        farm.scheduler.steer_worker(99, "pause")


# --- workers for some jobs

def test_a_job_is_for_workers_with_all_its_tags_or_of_that_name(farm: Farm) -> None:
    def why(job: int) -> str:
        with farm.store.read() as tx:
            return farm.scheduler.muster(tx).why(farm.job(job))[0]

    anna, bert = farm.worker("anna"), farm.worker("bert")
    farm.scheduler.rejoin(bert, povfarm.WorkerInfo(
        "bert", 9, 1 << 30, "", {"povray": "3.8.0"}, ("gpu", "room3")), "192.168.1.6")
    job = farm.submit(1, only="gpu,big")
    assert farm.leases(anna) == farm.leases(bert) == []
    assert why(job).startswith("no worker that is there has gpu and big: start one with ")
    farm.scheduler.change(job, {"only": "gpu,room3"})
    assert why(job) == "next in line" and farm.leases(anna) == []
    farm.finish(bert, farm.lease(bert))
    job = farm.submit(1, only="anna")  # with its POV-Ray, though bert has more cores
    assert farm.leases(bert) == [] and why(job) == "next in line"
    farm.finish(anna, farm.lease(anna))
    job = farm.submit(1, only="anna")
    farm.scheduler.steer_worker(anna, "pause")
    assert why(job).startswith("no worker that is there has anna: start one with ")
    farm.scheduler.change(job, {"only": ""})
    farm.lease(bert)


# --- hours, use, battery

@pytest.mark.parametrize(("text", "spans"), [
    ("mon", ["mon 0:00-24:00"]), ("sat-sun", ["sat 0:00-24:00", "sun 0:00-24:00"]),
    ("fri 19:00-7:00", ["fri 19:00-24:00", "sat 0:00-7:00"]), ("SUN 22-6", ["sun 22-24", "mon 0-6"]),
    ("sat-mon 1-2", ["sat 1-2", "sun 1-2", "mon 1-2"]), ("mon - tue 8:30 - 9", ["mon 8:30-9", "tue 8:30-9"]),
    ("8-9", [f"{day} 8-9" for day in ("mon", "tue", "wed", "thu", "fri", "sat", "sun")]),
])
def test_hours_are_the_minutes_of_a_week(text: str, spans: List[str]) -> None:
    assert week_of(text) == week_of(",".join(spans))
    first = week_of(spans[0])
    assert len(first) == max(first) - min(first) + 1 and first <= week_of(text)


def test_an_hour_has_sixty_minutes_from_its_own_on() -> None:
    assert week_of("tue 3:05-4:05") == {*range(1440 + 185, 1440 + 245)}


@pytest.mark.parametrize("text", [
    "", "mon,", "monday", "mon 7", "25-7", "7:60-8", "24:30-1", "mon fri", "7-8 mon", "mon-fri-sat",
    "mon7-8", "-", "7:5-8"])
def test_what_names_no_hours_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="names no hours: write days, hours or both"):
        week_of(text)


@pytest.fixture(name="berlin")
def berlin_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The local time of a place whose clocks change."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(("utc", "renders"), [
    ((2026, 3, 28, 17, 59), False), ((2026, 3, 28, 18, 0), True),  # Saturday, 18:59 and 19:00
    ((2026, 3, 29, 0, 59), True), ((2026, 3, 29, 1, 0), True),  # 1:59, and a minute later 3:00
    ((2026, 3, 29, 4, 59), True), ((2026, 3, 29, 5, 0), False),  # 6:59 and 7:00 in summer
    ((2026, 10, 25, 0, 30), True), ((2026, 10, 25, 1, 30), True),  # 2:30, and 2:30 again
    ((2026, 10, 25, 5, 59), True), ((2026, 10, 25, 6, 0), False),  # 6:59 and 7:00 in winter
])
def test_hours_are_those_of_the_wall_clock_also_when_it_is_changed(
        utc: Tuple[int, ...], renders: bool) -> None:
    now = calendar.timegm((*utc, 0))
    assert (why_not_now(now, "sat 19:00-7:00", 0, 0, False) == "") is renders
    assert why_not_now(now, "", 0, 0, False) == ""


def test_what_keeps_a_computer_from_rendering_is_one_sentence() -> None:
    assert why_not_now(0, "", 599, 600, False) == "until nobody uses it for 10:00"
    assert why_not_now(0, "", 600, 600, False) == ""
    assert why_not_now(0, "", 600, 600, True) == "on battery (--on-battery lets it render)"


class Computer:
    """The files of a Linux system, as they are wanted."""

    def __init__(self, root: Path) -> None:
        self.root, self.clock = root, FakeClock()
        for name in ("proc", "dev/pts", "sys/class/power_supply"):
            (root / name).mkdir(parents=True)
        self.keys = self.user = self.nice = self.idle = 0
        self.tick()
        self.usage = Usage(self.clock, root=root)

    def tick(self, keys: int = 0, user: int = 0, nice: int = 0, idle: int = 100) -> None:
        """Let a second pass in which so much is done."""
        self.keys, self.user = self.keys + keys, self.user + user
        self.nice, self.idle = self.nice + nice, self.idle + idle
        self.clock.advance(1)
        (self.root / "proc/stat").write_text(f"cpu  {self.user} {self.nice} 0 {self.idle} 0 0 0\n")
        (self.root / "proc/interrupts").write_text(
            "      CPU0  CPU1\n 1:  12  0  IO-APIC  1-edge  i8042\n"
            f" 12:  {self.keys}  7  IO-APIC  12-edge  i8042\n 30:  {self.clock.mono:.0f} 0  nvme\n")

    def supply(self, name: str, **facts: str) -> None:
        place = self.root / "sys/class/power_supply" / name
        place.mkdir(exist_ok=True)
        for fact, text in facts.items():
            (place / fact).write_text(f"{text}\n")


@pytest.fixture(name="computer")
def computer_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
    """A computer that nobody uses, and that has no desktop."""
    monkeypatch.setattr(povfarm, "_desktops", lambda now: iter(()))
    return Computer(tmp_path / "system")


def test_keys_other_programs_and_terminals_are_use_and_renderers_are_none(
        computer: Computer) -> None:
    def unused() -> float:
        return computer.usage.unused()

    assert unused() == 0  # perhaps somebody used it just before
    for _ in range(5):
        computer.tick(nice=200, idle=0)  # others render here
        last = unused()
    assert last == 5
    computer.tick(keys=1)
    assert unused() == 0
    computer.tick(user=20, idle=80)
    assert unused() == 1  # that is little
    computer.tick(user=50, nice=50, idle=0)
    assert unused() == 0
    terminal = computer.root / "dev/pts/3"
    terminal.touch()
    for ago in (1, 7):
        computer.tick()
        os.utime(terminal, (computer.clock.wall - ago, 0))
        assert unused() == 1 if ago == 1 else 2
    all_is_ours = Usage(computer.clock, gives_way=False, root=computer.root)
    for _ in range(3):
        computer.tick(user=100, idle=0)
        last = all_is_ours.unused()
    assert last == 3


def test_a_desktop_tells_when_it_is_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(povfarm, "_said_by", lambda *command: {
        "list-sessions": " 2 1000 anna seat0\n 5 1000 anna -\n",
        "show-session": "Type=x11\nIdleHint=yes\nIdleSinceHintMonotonic=940000000\n\n"
        "Type=tty\nIdleHint=no\nIdleSinceHintMonotonic=0\n\nType=wayland\nIdleHint=no\n"}[command[1]])
    assert [*povfarm._desktops(1000.0)] == [60.0, 0.0]
    monkeypatch.setattr(povfarm, "_said_by", lambda *command: "")
    assert [*povfarm._desktops(1000.0)] == []


def test_a_battery_counts_while_it_is_all_there_is(computer: Computer) -> None:
    assert computer.usage.on_battery() is False  # it has none
    computer.supply("mouse", type="Battery", status="Discharging", scope="Device")
    assert computer.usage.on_battery() is False
    computer.supply("BAT0", type="Battery", status="Discharging")
    computer.supply("AC", type="Mains", online="0")
    assert computer.usage.on_battery() is True
    computer.supply("AC", type="Mains", online="1")
    assert computer.usage.on_battery() is False


def told_by_macos(monkeypatch: pytest.MonkeyPatch, text: str) -> Usage:
    monkeypatch.setattr(povfarm.sys, "platform", "darwin")
    monkeypatch.setattr(povfarm, "_said_by", lambda *command: text)
    return Usage(FakeClock())


@pytest.mark.parametrize(("text", "age", "battery"), [  # as ioreg and pmset print
    ('+-o IOHIDSystem  <class IOHIDSystem, id 0x1000005b6, registered, matched, active>\n  | {\n  |   '
     '"IOClass" = "IOHIDSystem"\n  |   "HIDIdleTime" = 3254341351000\n  | }\n', 3254.341351, False),
    ('      "HIDIdleTime"=1500000000\n', 1.5, False),
    ("Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1234567)\t14%; discharging; 2:31 "
     "remaining present: true\n", 0, True),
    ("Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t83%; charging; 1:00 remaining\n", 0, False),
    ("Now drawing from 'UPS Power'\n -Back-UPS (id=1)\t96%; discharging\n", 0, True), ("", 0, False)])
def test_macos_tells_use_and_power(
        text: str, age: float, battery: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        usage = told_by_macos(patch, text)
        assert (povfarm._last_input(), usage.on_battery()) == (age, battery)


@pytest.mark.parametrize(("tick", "last", "age"), [
    (5000, 2000, 3.0), (1000, 0xfffffc18, 2.0),  # the counter of milliseconds began anew meanwhile
    (-1000, 0xfffffc00, 0.024)])  # ctypes reads it with a sign
def test_windows_tells_use_and_power(
        tick: int, last: int, age: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def last_input(info: Any) -> int:
        assert info[0] == 8
        info[1] = last
        return works

    def power(status: Any) -> int:
        status[0] = lines.pop(0)
        return works

    with monkeypatch.context() as patch:
        patch.setattr(povfarm.sys, "platform", "win32")
        patch.setattr(povfarm.ctypes, "windll", SimpleNamespace(
            user32=SimpleNamespace(GetLastInputInfo=last_input), kernel32=SimpleNamespace(
                GetTickCount=lambda: tick, GetSystemPowerStatus=power)), raising=False)
        usage, works, lines = Usage(FakeClock()), 1, [b"\0", b"\1", b"\xff", b"\0"]
        assert povfarm._last_input() == age  # on battery, on mains, unknown:
        assert [usage.on_battery() for _ in range(3)] == [True, False, False]
        works = 0
        assert povfarm._last_input() == 0 and usage.on_battery() is False


@pytest.mark.parametrize(("arguments", "says"), [
    (["--hours", "monday"], "'monday' names no hours"), (["--when-idle", "soon"], "'soon' is not a time")])
def test_bad_hours_are_one_line(arguments: List[str], says: str, tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    assert povfarm.main(["work", "--data", str(tmp_path / "data"), *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and says in errors[0] and not (tmp_path / "data").exists()
