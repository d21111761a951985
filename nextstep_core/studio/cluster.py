"""Many workers draw one job: one for each GPU of this machine or of a Ray cluster, or so many on CPUs.

Ray starts the workers, places them, moves the data and tells which are lost. What is decided here: a batch goes to a
worker when that is free, one that was lost with its worker goes to another, and one that costs a second worker is tried
picture by picture, so that the one which does the harm is found, reported and left out; where none does, the batch is
drawn whole again, since pictures drawn alone differ in their last bits. A lost worker is replaced, and those that Ray
can place only later join then.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NextStepError, check_text, shown
from ..ranges import Range
from ..runtime.interrupt import Check, go_on
from ..sentences import Sentence
from .drawing import Settled
from .hands import FileKind, Finished, Pictures, Tell
from .jobs import Order
from .planning import Batch, Entry
from .worker import ERROR, Data, Maker, finished_of, order_data, settled_data, settled_of, versions

PACKAGE = Path(__file__).resolve().parents[1]  # sent to the workers, so that theirs is the same
INSTALL = 'python -m pip install "ray[default,client]"'
GPUS, WORKERS = Range("gpus", 1, 4096), Range("workers", 1, 4096)
ADDRESS = re.compile(r"auto|(ray://)?[\w.-]{1,253}:\d{1,5}")
ALL = "all"
TRIES = 2  # that a picture is worth, in workers
FALSE_STARTS = 5  # workers in a row that are lost before they have their model
POLL_SECONDS = 0.2
RECOUNT_SECONDS = 10.0  # between looks at how many GPUs a cluster has
PLACING_SECONDS = 60.0  # that workers may take to be found fit, once one is
SETTLED_AT_ONCE = 100  # orders
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Where:
    """Which workers: of the cluster at `address`, else of this machine; one for each of its GPUs, or for so many
    `gpus`, or `workers` on CPUs."""

    address: str | None = None
    gpus: int | None = None
    workers: int | None = None

    def check(self) -> Where:
        """Itself; NextStepError for what can be no cluster."""
        if self.address is not None and not ADDRESS.fullmatch(check_text("cluster", self.address)):
            raise NextStepError(
                "cluster is {address}; write auto, host:6379 or ray://host:10001.", address=shown(self.address)
            )
        if self.gpus is not None and self.workers is not None:
            raise not_both()
        if self.gpus is not None:
            GPUS.check(self.gpus)
        if self.workers is not None:
            WORKERS.check(self.workers)
        return self

    @property
    def resource(self) -> str:
        """What a worker takes one of, as Ray calls it."""
        return "GPU" if self.workers is None else "CPU"


def not_both() -> NextStepError:
    return NextStepError("Choose gpus or workers, not both: a worker has a GPU, or is on a CPU.")


def where_of(gpus: str | None, workers: int | None, address: str | None) -> Where | None:
    """What is asked for in words, where `gpus` is "all" or a number; None where no cluster is asked for at all."""
    if gpus is None and workers is None and address is None:
        return None
    if gpus is None or gpus == ALL:
        if gpus is not None and workers is not None:
            raise not_both()
        return Where(address, None, workers).check()
    if not check_text("gpus", gpus).isdecimal() or len(gpus) > 9:
        raise NextStepError("gpus is {gpus}; write all, or how many.", gpus=shown(gpus))
    return Where(address, int(gpus), workers).check()


@dataclass(eq=False)
class Member:
    """A worker; `fit` once it is known to draw what the others draw."""

    actor: Any
    host: str = ""
    pid: int = 0
    fit: bool = False


@dataclass(eq=False)
class Task:
    """Something that a worker is asked to do; `answer` is None where it was lost, and `reason` then says how."""

    what: str
    arguments: tuple[Any, ...] = ()
    batch: Batch | None = None
    done: bool = False
    answer: Any = None
    reason: str = ""


@dataclass(eq=False)
class Suspect:
    """A batch that has cost its workers and is tried picture by picture: how many are still to be tried, and what came
    of the others. `harmful` once one of them has cost its workers too."""

    batch: Batch
    left: int
    found: list[tuple[Entry, Finished]] = field(default_factory=list)
    harmful: bool = False

    def take(self, found: Iterable[tuple[Entry, Finished]], harmful: bool = False) -> None:
        """Take in what came of one picture."""
        self.found += found
        self.left -= 1
        self.harmful |= harmful


@dataclass(eq=False)
class Waiting:
    """A batch that is to be drawn, how many workers it has cost, and the suspect that it is a picture of. `cleared`
    once its pictures were found harmless."""

    batch: Batch
    lost: int = 0
    suspect: Suspect | None = None
    cleared: bool = False


class Cluster:
    """Hands for a batch run. Connects, and waits until there are workers that have the model and agree on it."""

    def __init__(
        self, where: Where, choice: Mapping[str, Any], check: Check = go_on, maker: Maker | None = None
    ) -> None:
        """`choice` names the model as every worker finds it; see `model_choice.ModelChoice`. NextStepError where
        there is no cluster, no GPU, no model, or another version of this package or of torch."""
        self.where, self._maker, self._choice = where.check(), maker, dict(choice)
        self.facts: dict[str, str] = {}
        self.identity = ""
        self._identities: dict[str, str] = {}  # of the model as it was found, and as it was loaded
        self._members: list[Member] = []
        self._idle: list[Member] = []
        self._running: dict[Any, tuple[Member, Task]] = {}
        self._false_starts, self._reason = 0, ""
        self._ray = import_ray(self.where.address is None)
        self._ours = not self._ray.is_initialized()
        if self._ours:
            connect(self._ray, self.where)
        self._actor = _actor_class(self._ray, self.where, sent=self._ours)
        try:
            self._wanted, self._counted = self._count(), time.monotonic()
            self._meet(check)
        except BaseException:
            self.shutdown()
            raise

    @property
    def workers(self) -> int:
        """How many have the model, or are about to."""
        return len(self.processes)

    @property
    def processes(self) -> list[tuple[str, int]]:
        """Host and process of each of those."""
        return [(member.host, member.pid) for member in self._members if member.fit]

    def settle(self, orders: Sequence[Order]) -> list[Settled]:
        """What orders come to, as a worker says, which has the model."""
        found: list[Settled] = []
        for start in range(0, len(orders), SETTLED_AT_ONCE):
            part = orders[start : start + SETTLED_AT_ONCE]
            settled = self._ask("settle", [order_data(order) for order in part])["settled"]
            found += [settled_of(one, order) for one, order in zip(settled, part, strict=True)]
        return found

    def draw(self, batches: Sequence[Batch], kind: FileKind, tell: Tell, check: Check) -> Pictures:
        """The wanted pictures of all batches, as they come. How far a single one is, workers do not tell."""
        waiting, at_work = deque(map(Waiting, batches)), dict[Task, Waiting]()
        try:
            while waiting or at_work:
                while waiting and self._idle:
                    next_one = waiting.popleft()
                    at_work[self._give(self._idle.pop(), _drawing(next_one.batch, kind))] = next_one
                check()
                task = self._step()
                if task is None or task not in at_work:
                    continue
                given = at_work.pop(task)
                suspect = given.suspect
                if task.answer is not None:
                    found = [(given.batch.entries[one.place], one) for one in map(finished_of, task.answer)]
                    if suspect is None:
                        yield from found
                        continue
                    suspect.take(found)
                else:
                    given.lost += 1
                    log.warning("A worker was lost while it drew %s: %s", _names([given.batch]), task.reason)
                    if given.lost < TRIES:
                        waiting.append(given)
                        continue
                    if len(given.batch.entries) > 1:
                        singles = given.batch.singles()
                        tried = None if given.cleared else Suspect(given.batch, len(singles))
                        waiting.extend(Waiting(single, suspect=tried) for single in singles)
                        continue
                    given_up = given.batch.entries[0], self._given_up(task)
                    if suspect is None:
                        yield given_up
                        continue
                    suspect.take([given_up], harmful=True)
                if suspect.left == 0:
                    if suspect.harmful:
                        yield from suspect.found
                    else:
                        waiting.append(Waiting(suspect.batch, cleared=True))
        finally:
            for member in [member for member, task in self._running.values() if task in at_work]:
                self._dismiss(member)  # it would go on drawing

    def shutdown(self) -> None:
        """Let the workers go. Nothing can be drawn afterwards."""
        for member in list(self._members):
            self._dismiss(member)
        if self._ours and self._ray.is_initialized():
            self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _given_up(self, task: Task) -> Finished:
        if self._idle or self._running:
            teller = (self._idle or [member for member, _ in self._running.values()])[0]
            teller.actor.count.remote("failures", 1)
        said = Sentence(
            "{count} workers were lost while they drew it, so it is left out ({reason}).",
            count=TRIES,
            reason=task.reason,
        )
        return Finished(0, error=str(said))

    def _count(self) -> int:
        """Workers that there should be."""
        if self.where.workers is not None:
            return self.where.workers
        there = int(self._ray.cluster_resources().get("GPU", 0))
        if there == 0 or (self.where.address is None and there < (self.where.gpus or 0)):
            raise NextStepError(
                "There are {there} GPUs. Ask for as many, or for workers on CPUs: --workers 2.", there=there
            )
        return self.where.gpus or there

    def _meet(self, check: Check) -> None:
        """Wait for the workers that there is room for now. All must be fit; more may join later."""
        free = int(self._ray.available_resources().get(self.where.resource, 0))
        soon, started = max(1, min(self._wanted, free)), time.monotonic()
        while self.workers < soon:
            if self.workers and time.monotonic() - started > PLACING_SECONDS:
                return
            check()
            self._step(strict=True)

    def _recruit(self) -> None:
        """Start workers in the place of those that were lost, and on GPUs that came since."""
        if self.where.workers is None and time.monotonic() - self._counted > RECOUNT_SECONDS:
            self._counted = time.monotonic()
            there = int(self._ray.cluster_resources().get("GPU", 0))
            self._wanted = self.where.gpus or max(1, there)
        if self._false_starts >= FALSE_STARTS:
            if not any(member.fit for member in self._members):
                raise NextStepError("Workers are lost before they have the model ({reason}).", reason=self._reason)
            return
        while len(self._members) < self._wanted:
            member = Member(self._actor.remote(self._maker, self._choice))
            self._members.append(member)
            self._give(member, Task("hello"))

    def _give(self, member: Member, task: Task) -> Task:
        self._running[member.actor.call.remote(task.what, *task.arguments)] = member, task
        return task

    def _step(self, strict: bool = False) -> Task | None:
        """Wait a moment for one task to end. A new worker is asked the next question at once; one that is not fit
        stays idle, or is an error where it is `strict`."""
        self._recruit()
        if not self._running:
            raise NextStepError("No worker is left ({reason}).", reason=self._reason)
        ready, _ = self._ray.wait(list(self._running), timeout=POLL_SECONDS)
        if not ready:
            return None
        member, task = self._running.pop(ready[0])
        task.done = True
        try:
            task.answer = self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            task.reason = self._reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._false_starts += not member.fit or task.what == "load"
            self._dismiss(member)
            return task
        if task.what in NEXT:
            try:
                self._welcome(member, task)
            except NextStepError as error:
                member.fit = False
                if strict or not any(other.fit for other in self._members):
                    raise
                log.warning("NextStep: %s", error)
        else:
            self._idle.append(member)
        return task

    def _welcome(self, member: Member, task: Task) -> None:
        """Take in what a new worker answered, and ask the next; NextStepError where it is not fit."""
        answer: Data = task.answer
        if task.what == "hello":
            member.host, member.pid = answer["host"], answer["pid"]
            for name, version in versions().items():
                if answer["versions"].get(name) != version:
                    raise NextStepError(
                        "{host} has {name} {theirs}, and this machine {ours}. Install the same on both.",
                        host=member.host,
                        name=name,
                        theirs=answer["versions"].get(name),
                        ours=version,
                    )
        elif ERROR in answer:
            raise NextStepError(
                "{host} cannot take part: {reason}", host=member.host, reason=Sentence.from_data(answer[ERROR])
            )
        else:
            self._identities.setdefault(task.what, answer["identity"])
            if answer["identity"] != self._identities[task.what]:
                raise NextStepError(
                    "{host} has other weights than the other workers, or stores them in another way. Name model, "
                    "quantization and dtype so that they are the same everywhere.",
                    host=member.host,
                )
            member.fit = True
        if task.what == "load":
            self.facts, self.identity, self._false_starts = answer["facts"], answer["identity"], 0
        if (following := NEXT[task.what]) is None:
            self._idle.append(member)
        else:
            self._give(member, Task(following))

    def _ask(self, what: str, *arguments: Any) -> Data:
        """The answer of whichever worker is free first."""
        for _ in range(TRIES):
            while not self._idle:
                self._step()
            task = self._give(self._idle.pop(), Task(what, arguments))
            while not task.done:
                self._step()
            if task.answer is not None:
                answer: Data = task.answer
                if ERROR in answer:
                    raise NextStepError.of(Sentence.from_data(answer[ERROR]))
                return answer
        raise NextStepError("Workers are lost before they draw ({reason}).", reason=self._reason)

    def _dismiss(self, member: Member) -> None:
        if member in self._members:
            self._members.remove(member)
        if member in self._idle:
            self._idle.remove(member)
        self._running = {ref: given for ref, given in self._running.items() if given[0] is not member}
        if self._ray.is_initialized():
            self._ray.kill(member.actor)


NEXT = {"hello": "find", "find": "load", "load": None}  # what a new worker is asked


def _drawing(batch: Batch, kind: FileKind) -> Task:
    orders = [order_data(one.order) for one in batch.orders]
    settled = [settled_data(one) for one in batch.orders]
    return Task("draw", (orders, settled, batch.wanted, asdict(kind)), batch)


def _names(batches: Iterable[Batch]) -> str:
    return ", ".join(entry.file for batch in batches for entry in batch.entries)


def import_ray(alone: bool = False) -> Any:
    """Ray; NextStepError, with the line that installs it, where it is not there.

    Ray listens at every address of this machine. Where it is to work `alone`, for this program, others are kept out by
    a token, unless something has loaded it already, which is when it looks for one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if alone and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise NextStepError("Many workers need Ray. Install it: {command}", command=INSTALL) from None
    return ray


def connect(ray: Any, where: Where) -> None:
    """Start Ray on this machine, or connect to a cluster."""
    options: dict[str, Any] = {
        "runtime_env": {"py_modules": [str(PACKAGE)]},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if where.address is None:
        options |= {"address": "local", "num_cpus": where.workers, "include_dashboard": False}
    else:
        options["address"] = where.address
    try:
        ray.init(**options)
    except Exception as error:  # of many kinds, by what does not answer
        raise NextStepError(
            "There is no Ray cluster at {address} ({reason}).",
            address=where.address or Sentence("this machine"),
            reason=(str(error).splitlines() or [type(error).__name__])[0],
        ) from None


def _actor_class(ray: Any, where: Where, sent: bool) -> Any:
    """What Ray makes workers of. They have this package as it was `sent` to them, or, where others have started Ray, in
    its folder."""

    class NextStepWorker:
        """Sent to the workers as it stands here, since they may know this module under another name, or not at all."""

        def __init__(self, maker: Any, choice: dict[str, Any]) -> None:
            from ray.util.metrics import Counter

            from nextstep_core.studio.worker import Worker

            names = ("pictures", "tokens", "seconds", "failures")
            self.meters = {name: Counter(f"nextstep_{name}", f"NextStep: {name}") for name in names}
            self.worker = Worker(maker, choice, self.count)

        def call(self, what: str, *arguments: Any) -> Any:
            return getattr(self.worker, what)(*arguments)

        def count(self, name: str, amount: float) -> None:
            if amount > 0:
                self.meters[name].inc(amount)

    needs: dict[str, Any] = {"num_cpus": 1} | ({"num_gpus": 1} if where.resource == "GPU" else {})
    if not sent:
        needs["runtime_env"] = {"env_vars": {"PYTHONPATH": str(PACKAGE.parent)}}
    return ray.remote(NextStepWorker).options(**needs)
