"""Every answer that was ever paid for, in one SQLite file.

A call is one row of `calls`, what it said about each of its points one row of `answers`; both are committed together,
so an answer is there as a whole or not at all, whenever the process dies. The file is in WAL mode: a report can be
made while answers come in.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

from prefmoe.errors import DataError, OutputError, PrefmoeError
from prefmoe.labeling.judge.answers import Answer, Reason
from prefmoe.labeling.judge.questions import Question

IN_MEMORY = ":memory:"  # SQLite's name for a database that no other process sees and that ends with this one
_APPLICATION_ID = 0x70724D45  # "prME": SQLite's own place for whose file this is
_FORMAT = 1
_SCHEMA = """
CREATE TABLE calls (
    key TEXT PRIMARY KEY, "group" TEXT NOT NULL, judge TEXT NOT NULL, pair TEXT NOT NULL, pair_id TEXT NOT NULL,
    task TEXT NOT NULL, swapped INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    usd REAL NOT NULL
) STRICT;
CREATE TABLE answers (
    key TEXT NOT NULL REFERENCES calls, point TEXT NOT NULL, choice TEXT, reason TEXT, reply TEXT NOT NULL,
    first REAL, second REAL, tie REAL,
    PRIMARY KEY (key, point)
) STRICT, WITHOUT ROWID;
CREATE INDEX calls_by_judge ON calls (judge);
"""


@dataclass(frozen=True, slots=True)
class Call:
    """A question with its answers and what they cost.

    Attributes:
        usd: US dollars; 0 where no price is known.
    """

    question: Question
    answers: dict[str, Answer]
    input_tokens: int
    output_tokens: int
    usd: float


class Spent(NamedTuple):
    """What a judge's answers in the store have cost so far."""

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float


class Stored(NamedTuple):
    """One answer of the store, with where it belongs."""

    judge: str
    group: str
    pair: str
    pair_id: str
    task: str
    point: str
    swapped: bool
    answer: Answer


class AnswerStore:
    """The answers of any number of judges.

    Args:
        path: The file; made where it is not there yet.

    Raises:
        DataError: the file is no store, damaged, or of another version.
        OutputError: it cannot be opened or made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._problems():
            path.parent.mkdir(parents=True, exist_ok=True)
            # The writer is another thread than the maker; never two at the same time.
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise
        self._lock: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; every answer is in it already."""
        if self._lock is not None:
            self._lock.close()
        self._database.close()

    def claim(self) -> None:
        """Keeps other processes from asking into the same store, and so from paying twice, until this one ends.

        Raises:
            PrefmoeError: another one is at it.
        """
        if self._lock is not None or str(self.path) == IN_MEMORY:
            return
        lock = sqlite3.connect(f"{self.path}.lock", timeout=0, isolation_level=None, check_same_thread=False)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            raise PrefmoeError(
                f"{self.path}: another process is asking into this store; wait for it, or choose another --store"
            ) from error
        self._lock = lock

    def record(self, calls: Sequence[Call]) -> None:
        """Commits calls with their answers; when this returns they are on disk.

        Raises:
            OutputError: the disk is full or cannot be written to.
        """
        with self._problems():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany(
                    "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_call_row, calls)
                )
                self._database.executemany(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (row for call in calls for row in _answer_rows(call)),
                )
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    def keys(self, judge: str) -> set[str]:
        """Keys of all questions that the judge has answered, usably or not."""
        with self._problems():
            return {
                row[0] for row in self._database.execute("SELECT key FROM calls WHERE judge = ?", (judge,))
            }

    def spent(self, judge: str) -> Spent:
        """What the judge's answers have cost, in this and in earlier sittings."""
        query = "SELECT count(*), total(input_tokens), total(output_tokens), total(usd) FROM calls WHERE judge = ?"
        with self._problems():
            calls, input_tokens, output_tokens, usd = self._database.execute(query, (judge,)).fetchone()
        return Spent(calls, int(input_tokens), int(output_tokens), usd)

    def judges(self) -> list[str]:
        """All judges that have answered, by name."""
        with self._problems():
            return [
                row[0] for row in self._database.execute("SELECT DISTINCT judge FROM calls ORDER BY judge")
            ]

    def answers(self, judge: str) -> Iterator[Stored]:
        """All answers of a judge, in the order in which they were given."""
        query = """SELECT "group", pair, pair_id, task, point, swapped, choice, reason, reply, first, second, tie
                   FROM calls JOIN answers USING (key) WHERE judge = ? ORDER BY calls.rowid, point"""
        with self._problems():
            for row in self._database.execute(query, (judge,)):
                group, pair, pair_id, task, point, swapped, choice, reason, reply, *mass = row
                probabilities = None if mass[0] is None else cast("tuple[float, float, float]", tuple(mass))
                answer = Answer(choice, cast("Reason | None", reason), reply, probabilities)
                yield Stored(judge, group, pair, pair_id, task, point, bool(swapped), answer)

    def forget_unusable(self, judge: str, questions: Set[str]) -> int:
        """Drops the answers to those questions of which any was unusable, so that they are asked again.

        The calls stay, under another key, for what they cost was spent.

        Args:
            judge: Whose answers.
            questions: Keys of the questions.

        Returns:
            The number of questions to ask again.
        """
        chosen = "SELECT DISTINCT key FROM calls JOIN answers USING (key) WHERE judge = ? AND choice IS NULL"
        with self._problems():
            self._database.execute("BEGIN IMMEDIATE")
            keys = [row for row in self._database.execute(chosen, (judge,)) if row[0] in questions]
            self._database.executemany("DELETE FROM answers WHERE key = ?", keys)
            self._database.executemany(
                "UPDATE calls SET key = 'asked again: ' || rowid || ' ' || key WHERE key = ?", keys
            )
            self._database.execute("COMMIT")
        return len(keys)

    def _prepare(self) -> None:
        (owner,) = self._database.execute("PRAGMA application_id").fetchone()
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not owner:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID};"
                f" PRAGMA user_version = {_FORMAT}; COMMIT"
            )
        elif owner != _APPLICATION_ID:
            raise DataError("is a database of something else; choose another --store", self.path)
        elif version != _FORMAT:
            raise DataError(
                f"is a store of format {version}; this prefmoe reads format {_FORMAT}; choose another --store",
                self.path,
            )
        self._database.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        """SQLite's errors as sentences that name the file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OutputError(
                f"{self.path}: the store cannot be used ({error}); free space or choose another --store"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"is not a store of answers, or is damaged ({error}); restore it, or choose another --store",
                self.path,
            ) from error
        except OSError as error:
            raise OutputError(
                f"{self.path}: the store cannot be made; {error.strerror}; choose another --store"
            ) from error


def default_store(out: str | os.PathLike[str]) -> Path:
    """Where the answers for an output file are kept: beside it."""
    return Path(f"{os.fspath(out)}.answers.sqlite")


def _call_row(call: Call) -> tuple[object, ...]:
    asked = call.question
    judge = asked.judge
    costs = (call.input_tokens, call.output_tokens, call.usd)
    texts = map(_storable, (asked.key, asked.group, judge, asked.pair, asked.pair_id, asked.task))
    return (*texts, int(asked.swapped), *costs)


def _answer_rows(call: Call) -> Iterable[tuple[object, ...]]:
    for point, answer in call.answers.items():
        mass = answer.probabilities or (None, None, None)
        yield (call.question.key, point, answer.choice, answer.reason, _storable(answer.text), *mass)


def _storable(text: str) -> str:
    """Half a character, which JSON can carry and UTF-8 cannot, as a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
