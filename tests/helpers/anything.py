"""Whatever can be done to a farm in a box, at random."""

from __future__ import annotations

import random
from typing import Callable, Dict, List, Sequence, Set, Tuple

from helpers.farm_in_a_box import Farm, sha256
from helpers.pictures import png
from povfarm import (
    Damaged,
    IllegalTransition,
    LeaseSpec,
    NotFound,
    StaleLease,
    UserError,
    WorkerInfo,
)

Behaviour = Callable[[int, int], str]  # worker, frame -> what becomes of it


def drive(farm: Farm, workers: Sequence[int], behave: Behaviour, rounds: int = 300) -> None:
    """Let workers render in turn, two runs each, for so many rounds of a second."""
    for _ in range(rounds):
        with farm.store.read() as tx:
            if not any(tx.leasable_jobs(over=True)):
                return
        for worker in workers:
            for lease in farm.leases(worker, want=2, slots=2, idle=2):
                for index, task in enumerate(lease.tasks):
                    how = behave(worker, task.frame)
                    if how == "good":
                        farm.finish(worker, lease, index)
                    elif how == "lost":
                        break
                    else:
                        farm.fail(worker, lease, index, scene=how == "scene")
            farm.beat(worker)
        farm.clock.advance(1)
        farm.scheduler.expire()


class Chaos:
    """Does one thing after the other to a farm, sensible or not."""

    def __init__(self, farm: Farm, seed: int) -> None:
        self.farm = farm
        self.chance = random.Random(seed)
        self.workers = [farm.worker(f"w{number}") for number in range(3)]
        self.removed: Set[int] = set()
        self.jobs: List[int] = []
        self.files: Dict[str, bytes] = {}
        self.leases: List[Tuple[int, LeaseSpec]] = []
        self.done: Dict[Tuple[int, int], str] = {}
        self.count = 0

    def step(self) -> None:
        names = [name[3:] for name in dir(self) if name.startswith("do_")]
        weights = [{"lease": 25, "finish": 40, "fail": 12, "beat": 4, "submit": 6, "retry": 4, "again": 4,
                    "cancel": 1.5, "delete": 0.5, "restart": 0.5, "pause": 2, "resume": 2, "drag": 12}.get(name, 1)
                   for name in names]
        name = self.chance.choices(names, weights)[0]
        try:
            getattr(self, f"do_{name}")()
        except (StaleLease, IllegalTransition, UserError, NotFound, Damaged):
            pass
        problems = self.farm.problems()
        assert problems == [], f"after {name}: {problems}"
        self.count += 1
        if self.count % 10 == 0:
            self.look()

    def look(self) -> None:
        """What was accepted stays accepted, byte for byte, as long as its job is there."""
        with self.farm.store.read() as tx:
            done = {(row.job, row.frame): row.sha256 for row in tx.done_tasks()}
            jobs = {row.id for row in tx.jobs(0, -1)}
        for (job, frame), sha in self.done.items():
            assert job not in jobs or done[job, frame] == sha
        self.done = done

    def job(self) -> int:
        return self.chance.choice(self.jobs) if self.jobs else 99

    def worker(self) -> int:
        return self.chance.choice(self.workers)

    def held(self) -> Tuple[int, LeaseSpec]:
        if not self.leases:
            raise StaleLease("none")
        recent = self.leases[-self.chance.choice([3, 3, 30]):]
        return self.chance.choice(recent)

    def do_submit(self) -> None:
        files = {f"{name}.inc": name.encode() for name in self.chance.sample("abcdef", 2)}
        self.files.update((sha256(data), data) for data in files.values())
        self.jobs.append(self.farm.submit(
            self.chance.randint(1, 8), files=files, send=self.chance.random() < 0.7,
            priority=self.chance.randint(-1, 1), max_workers=self.chance.choice([0, 0, 1]),
            in_order=self.chance.random() < 0.2, retry_limit=self.chance.randint(1, 3)))
        if len(self.jobs) > 5:
            self.farm.scheduler.delete(self.jobs.pop(0))

    def do_send(self) -> None:
        sha, data = self.chance.choice([*self.files.items()] or [("0" * 64, b"")])
        wrong = self.chance.random() < 0.2
        self.farm.scheduler.put_blob(sha, [b"damaged" if wrong else data])

    def do_lease(self) -> None:
        worker = self.worker()
        want = self.chance.randint(1, 3)
        self.leases += [(worker, lease) for lease in
                        self.farm.leases(worker, want=want, slots=want, idle=want)]

    def do_finish(self) -> None:
        worker, lease = self.held()
        index = self.chance.randrange(len(lease.tasks))
        bad = self.chance.random() < 0.1
        self.farm.finish(worker, lease, index, cpu=self.chance.choice([0.01, 0.1, 1, 50]),
                         image=b"no picture" if bad else png(self.chance.randrange(10_000)))

    def do_fail(self) -> None:
        worker, lease = self.held()
        self.farm.fail(worker, lease, self.chance.randrange(len(lease.tasks)),
                       scene=self.chance.random() < 0.3)

    def do_beat(self) -> None:
        worker, lease = self.held()
        self.farm.scheduler.beat(worker, {lease.id: {lease.tasks[0].id: self.chance.random()}}, 0)

    def do_release(self) -> None:
        self.farm.scheduler.release(*[(worker, lease.id) for worker, lease in [self.held()]][0])

    def do_time(self) -> None:
        self.farm.clock.advance(self.chance.choice([1, 6, 15, 31, 90_000]))
        self.farm.scheduler.expire()
        self.farm.scheduler.tidy()

    def do_leave(self) -> None:
        self.farm.scheduler.leave(self.worker())

    def do_rejoin(self) -> None:
        self.farm.scheduler.rejoin(self.worker(), WorkerInfo("again", 2, 1, "", {}), "::1")

    def do_remove(self) -> None:
        self.farm.scheduler.remove_worker(self.worker())
        info = WorkerInfo("new", 1, 1, "", {})
        code = f"CODE{self.count}"
        worker = self.farm.scheduler.join(info, str(self.count), "::1", code)
        if self.chance.random() < 0.8:
            self.farm.scheduler.admit(code)
        self.workers = [*self.workers[-2:], worker]

    def do_pause(self) -> None:
        self.farm.scheduler.pause(self.job())

    def do_resume(self) -> None:
        self.farm.scheduler.resume(self.job())

    def do_cancel(self) -> None:
        self.farm.scheduler.cancel(self.job())

    def do_retry(self) -> None:
        self.farm.scheduler.retry(self.job())

    def do_again(self) -> None:
        job = self.job()
        self.farm.scheduler.again(job, self.chance.choice(["1", "1-2", "2,4-5"]))
        self.done = {key: sha for key, sha in self.done.items() if key[0] != job}

    def do_cancel_frames(self) -> None:
        self.farm.scheduler.cancel_frames(self.job(), self.chance.choice(["1", "1-2", "2,4-5"]))

    def do_change(self) -> None:
        self.farm.scheduler.change(self.job(), {"priority": self.chance.randint(-3, 3),
                                                "max_workers": self.chance.randint(0, 2)})

    def do_delete(self) -> None:
        job = self.job()
        self.farm.scheduler.delete(job)
        self.jobs.remove(job)

    def do_restart(self) -> None:
        self.farm = self.farm.restarted()

    def bring_to_an_end(self) -> None:
        """Good workers, every file, and whatever a person would ask for: then all is rendered."""
        for sha, data in self.files.items():
            try:
                self.farm.scheduler.put_blob(sha, [data])
            except (NotFound, Damaged):
                pass
        helpers = [self.farm.worker(f"good{number}") for number in range(2)]
        for _ in range(3):
            for job in self.jobs:
                for steer in (self.farm.scheduler.resume, self.farm.scheduler.retry):
                    try:
                        steer(job)
                    except IllegalTransition:
                        pass
            self.farm.clock.advance(31)
            self.farm.scheduler.expire()
            drive(self.farm, helpers, lambda worker, frame: "good", rounds=40)
        assert self.farm.problems() == [] and self.farm.leftovers() == []
        self.look()
        assert {self.farm.state(job) for job in self.jobs} == {"done"}
