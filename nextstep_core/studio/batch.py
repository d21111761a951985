"""A batch run: every picture of a job into a folder, whatever happens in between.

A picture is there when its file has its name; only then it is written down. A run that was killed, cancelled or that
failed is started again with the same command and draws what is missing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..decoding.progress import Progress
from ..errors import not_written
from ..images.saving import FORMATS
from ..loading.locks import held
from ..ranges import Range
from ..runtime.interrupt import Check, go_on
from ..sentences import Sentence
from .drawing import Settled
from .hands import FileKind, Finished, Hands
from .jobs import BatchJob
from .manifest import PART, Manifest, Record, read_sidecar, sidecar_of, write_whole
from .names import file_name
from .planning import Entry, plan

TOGETHER = Range("together", 1, 256)
LOCK = ".running"


@dataclass(frozen=True)
class BatchProgress:
    """How far a run is: pictures that are there or failed, of all; `drawing` is the state of those in work, and
    `record` the picture that was just finished."""

    done: int
    failed: int
    total: int
    seconds: float
    drawn: int
    drawing: Progress | None = None
    record: Record | None = None

    @property
    def share(self) -> float:
        """Of all pictures, what is done."""
        drawing = self.drawing
        within = 0.0 if drawing is None else drawing.done / drawing.total * len(drawing.tokens)
        return min(1.0, (self.done + self.failed + within) / self.total)  # pictures may be drawn again beside others

    @property
    def seconds_left(self) -> float | None:
        """Time that the rest will take at the rate so far; None before the first picture."""
        return (self.total - self.done - self.failed) * self.seconds / self.drawn if self.drawn else None

    @property
    def a_minute(self) -> float | None:
        """Pictures, at the rate so far; None before the first."""
        return 60 * self.drawn / self.seconds if self.drawn and self.seconds else None

    @property
    def in_words(self) -> str:
        """One line: how many are done, how many failed, the rate, the time left."""
        words = [f"{self.done + self.failed} of {self.total} pictures"]
        if self.failed:
            words.append(f"{self.failed} failed")
        if self.a_minute is not None:
            words.append(f"{self.a_minute:.1f} a minute")
        if self.seconds_left is not None:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            words.append(f"{minutes}:{seconds:02d} left")
        return ", ".join(words)


@dataclass(frozen=True)
class Summary:
    """What came of a run, with the records of its pictures in the order of the job."""

    records: tuple[Record, ...]
    drawn: int
    kept: int
    failed: int
    seconds: float


class BatchRun:
    """A job on its way into a folder, which must not be used by two runs at once."""

    def __init__(self, job: BatchJob, hands: Hands, folder: Path) -> None:
        """Check everything against the checkpoint and give every picture its file. Nothing is drawn yet."""
        self.job, self.hands, self.folder = job, hands, folder
        settled = hands.settle(job.orders)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(folder, error) from None
        self.manifest = Manifest(folder)
        self.entries = list(self._entries(settled))

    @property
    def records(self) -> tuple[Record, ...]:
        """The pictures that are there, and those that failed, in the order of the job."""
        found = (self.manifest.records.get(entry.key) for entry in self.entries)
        return tuple(record for record in found if record is not None)

    def run(
        self,
        together: int = 8,
        report: Callable[[BatchProgress], None] = lambda _: None,
        check: Check = go_on,
    ) -> Summary:
        """Draw what is missing, at most `together` pictures at once.

        A picture that cannot be drawn is recorded with its error, and the others go on. `report` is called after every
        token and every picture; it and `check` stop the run by raising.
        """
        together = TOGETHER.check(together)
        refusal = Sentence(
            "Another run is writing to {folder}. Wait for it, or choose another folder.", folder=self.folder
        )
        with held(self.folder / LOCK, refusal):
            started, drawn, failed = time.monotonic(), 0, 0
            missing = [entry for entry in self.entries if not self._is_there(entry)]
            kept = len(self.entries) - len(missing)

            def tell(drawing: Progress | None = None, record: Record | None = None) -> None:
                seconds = time.monotonic() - started
                state = BatchProgress(kept + drawn, failed, len(self.entries), seconds, drawn, drawing, record)
                report(state)

            tell()
            batches = plan(self.folder, self.entries, missing, together)
            kind = FileKind(self.job.format, self.job.quality)
            with closing(self.hands.draw(batches, kind, tell, check)) as pictures:
                for entry, finished in pictures:
                    record = self._record(entry, finished)
                    if not record.error:
                        self._save(entry, finished.data, record)
                    self.manifest.add(record)
                    failed, drawn = failed + bool(record.error), drawn + (not record.error)
                    tell(record=record)
            return Summary(self.records, drawn, kept, failed, time.monotonic() - started)

    def _entries(self, settled: Sequence[Settled]) -> Iterator[Entry]:
        """A file for every order: the one that it has already, else a name that nothing else has."""
        digits = max(3, len(str(len(settled))))
        owners = {record.file: key for key, record in self.manifest.records.items() if not record.error}
        twice: Counter[str] = Counter()
        for n, one in enumerate(settled, 1):
            key = one.key(self.hands.identity)
            twice[key] += 1
            if twice[key] > 1:
                key = f"{key}-{twice[key]}"
            if self.manifest.has(key):
                yield Entry(one, key, self.manifest.records[key].file)
                continue
            stem, ending = file_name(self.job.pattern, _fields(one, f"{n:0{digits}}")), FORMATS[self.job.format]
            file, count = stem + ending, 1
            while owners.get(file, key) != key or self._is_foreign(file, key):
                count += 1
                file = f"{stem}-{count}{ending}"
            owners[file] = key
            yield Entry(one, key, file)

    def _is_foreign(self, file: str, key: str) -> bool:
        """Whether a file lies there that is not the picture of this key."""
        path = self.folder / file
        if not path.exists():
            return False
        record = read_sidecar(path)
        return record is None or record.key != key

    def _is_there(self, entry: Entry) -> bool:
        """Whether a picture is done. One that was complete when the run was killed, but not written down, is now."""
        if self.manifest.has(entry.key):
            return True
        path = self.folder / entry.file
        record = read_sidecar(path) if path.is_file() else None
        if record is None or record.key != entry.key or record.file != entry.file:
            return False
        self.manifest.add(record)
        return True

    def _record(self, entry: Entry, finished: Finished) -> Record:
        one, order = entry.settled, entry.order
        return Record(
            entry.key,
            entry.file,
            one.prompt,
            order.negative_prompt,
            order.seed,
            order.asked.label,
            order.name,
            one.width,
            one.height,
            asdict(one.settings),
            self.hands.facts,
            round(finished.seconds, 3),
            finished.scores,
            finished.error,
        )

    def _save(self, entry: Entry, data: bytes, record: Record) -> None:
        """The sidecar first, the picture last, each under its name only when it is complete."""
        path = self.folder / entry.file
        part = path.with_name(path.name + PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            write_whole(sidecar_of(path), record.to_json(indent=2))
            os.replace(part, path)
        except OSError as error:
            raise not_written(path, error) from None
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _fields(one: Settled, index: str) -> dict[str, object]:
    order = one.order
    return {
        "index": index,
        "name": order.name or order.prompt,
        "prompt": order.prompt,
        "label": order.asked.label,
        "seed": order.seed,
        "width": one.width,
        "height": one.height,
        "steps": one.settings.steps,
        "cfg": f"{one.settings.cfg:g}",
    }
