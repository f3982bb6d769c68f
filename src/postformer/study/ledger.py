"""The ledger of a study: which trials there are, who works on which, and how each ended. One SQLite file.

Trials and outcomes are only ever added. A runner holds a trial by a lease that it renews; the lease of a runner that
died lapses, and another takes the trial over. An outcome is written once, whoever is first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from postformer.study.trial import Trial

SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, cell TEXT NOT NULL, stage TEXT NOT NULL, spec TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS leases (trial TEXT PRIMARY KEY, owner TEXT NOT NULL, renewed REAL NOT NULL);
CREATE TABLE IF NOT EXISTS outcomes (
    trial TEXT PRIMARY KEY, status TEXT NOT NULL, data TEXT NOT NULL, ended REAL NOT NULL);
CREATE TABLE IF NOT EXISTS test_reads (trial TEXT PRIMARY KEY, cell TEXT NOT NULL, at REAL NOT NULL);
"""
VERSION = "1"
LAPSE = 60.0
"""Seconds without renewal after which a lease of another machine's runner no longer counts."""


class LedgerError(ValueError):
    """The file is no ledger, or of another version; the message says what to do."""


class TestSplitRead(ValueError):
    """Something would look at the test split a second time, or tune what it has already judged."""

    __test__ = False


class Outcome(NamedTuple):
    """How a trial ended."""

    status: str
    """finished or failed"""
    data: dict[str, Any]
    """finished: `result` (result.json), for finals `test`, by setting; failed: `error`, `log`"""


class Ledger:
    """A study's ledger; safe for several processes at once. Close it, or use it as a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open or make it. Raises LedgerError."""
        self.path = Path(path)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.db = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
        try:
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=FULL")
            with self._alone():
                for statement in SCHEMA.split(";"):
                    self.db.execute(statement)
                self.db.execute("INSERT OR IGNORE INTO about VALUES ('version', ?)", (VERSION,))
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path} is not a ledger ({error}); give another directory, or move it "
                              "away") from None
        if (found := self.about("version")) != VERSION:
            raise LedgerError(f"{self.path} is a ledger of version {found}, this program reads {VERSION}; export it "
                              "with the program that made it, and import it here")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this runner holds."""
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("DELETE FROM leases WHERE owner = ?", (self.owner,))
        self.db.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    # -- what is known -----------------------------------------------------------------------------------------------

    def about(self, key: str) -> str | None:
        """A fact about the study."""
        row = self.db.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def note(self, key: str, value: str) -> str:
        """Record a fact, unless it is known already -> what the ledger has."""
        self.db.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (key, value))
        return self.about(key) or value

    def trials(self) -> list[Trial]:
        """All trials, in the order in which they were added."""
        rows = self.db.execute("SELECT spec FROM trials ORDER BY number")
        return [Trial.model_validate_json(spec) for (spec,) in rows]

    def outcomes(self) -> dict[str, Outcome]:
        """Outcomes by the trial's id."""
        rows = self.db.execute("SELECT trial, status, data FROM outcomes")
        return {trial: Outcome(status, json.loads(data)) for trial, status, data in rows}

    def ended(self) -> float | None:
        """When the last trial ended, in seconds since 1970."""
        return self.db.execute("SELECT MAX(ended) FROM outcomes").fetchone()[0]

    def held(self) -> set[str]:
        """Trials that some living runner works on."""
        return {trial for trial, owner, renewed in self.db.execute("SELECT * FROM leases") if _alive(owner, renewed)}

    # -- what happens ------------------------------------------------------------------------------------------------

    def add(self, trials: Iterable[Trial]) -> None:
        """Add those that are not there yet.

        Raises TestSplitRead for a new sweep of a design whose test figures are known: it would be tuned to them.
        """
        with self._alone():
            for trial in trials:
                if self.db.execute("SELECT 1 FROM trials WHERE id = ?", (trial.id,)).fetchone():
                    continue
                read = self.db.execute("SELECT 1 FROM test_reads WHERE cell = ?", (trial.cell,)).fetchone()
                if trial.stage == "sweep" and read:
                    raise TestSplitRead(
                        f"{trial.design} on {trial.entry.key} has been judged on the test split; trying the rate "
                        f"{trial.rate:g} now would tune it to that split. Keep the rates, or start a study in a new "
                        "directory, with all designs.")
                self.db.execute("INSERT INTO trials (id, cell, stage, spec) VALUES (?, ?, ?, ?)",
                                (trial.id, trial.cell, trial.stage, trial.model_dump_json(exclude_unset=True)))

    def take(self, wanted: Iterable[Trial]) -> Trial | None:
        """The first of these that nobody has finished or works on; this runner then holds it."""
        with self._alone():
            done = {row[0] for row in self.db.execute("SELECT trial FROM outcomes")} | self.held()
            for trial in wanted:
                if trial.id not in done:
                    self.db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)",
                                    (trial.id, self.owner, time.time()))
                    return trial
        return None

    def renew(self) -> None:
        """Say that this runner lives."""
        self.db.execute("UPDATE leases SET renewed = ? WHERE owner = ?", (time.time(), self.owner))

    def finish(self, trial: Trial, outcome: Outcome) -> bool:
        """Record how a trial ended and give it back; False if its outcome was known, which then stays."""
        with self._alone():
            data = json.dumps(outcome.data, allow_nan=False)
            made = self.db.execute("INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?, ?)",
                                   (trial.id, outcome.status, data, time.time()))
            self.db.execute("DELETE FROM leases WHERE trial = ? AND owner = ?", (trial.id, self.owner))
        return made.rowcount == 1

    def release(self, trial: Trial) -> None:
        """Give a trial back without an outcome: it was interrupted."""
        self.db.execute("DELETE FROM leases WHERE trial = ? AND owner = ?", (trial.id, self.owner))

    def open_test(self, trial: Trial) -> None:
        """Leave to read the test split: for a final trial whose outcome is not known, and for nothing else.

        A trial that was killed after this may ask again: nobody has seen what it read. A cell has one rate: a second
        one would be a choice by test figures. Raises TestSplitRead.
        """
        with self._alone():
            specs = self.db.execute("SELECT spec FROM trials JOIN test_reads ON trial = id WHERE trials.cell = ?",
                                    (trial.cell,))
            rates = {Trial.model_validate_json(spec).rate for (spec,) in specs}
            if rates - {trial.rate}:
                raise TestSplitRead(f"{trial.label()}: the test split has judged {trial.design} at the rate "
                                    f"{rates.pop():g}, and may not judge a second one. Start a study in a new "
                                    "directory, with all designs.")
            if trial.stage != "final":
                raise TestSplitRead(f"{trial.label()} chooses a learning rate: it may not see the test split")
            if self.db.execute("SELECT 1 FROM outcomes WHERE trial = ?", (trial.id,)).fetchone():
                raise TestSplitRead(f"{trial.label()} has read the test split; its figures are in the ledger")
            self.db.execute("INSERT OR IGNORE INTO test_reads VALUES (?, ?, ?)", (trial.id, trial.cell, time.time()))

    # -- as text -----------------------------------------------------------------------------------------------------

    def export(self) -> str:
        """The whole ledger as JSON lines, which `merge` takes; two ledgers of the same content give the same text."""
        lines = [{"about": key, "value": value} for key, value in
                 self.db.execute("SELECT key, value FROM about ORDER BY key")]
        reads = {row[0] for row in self.db.execute("SELECT trial FROM test_reads")}
        ends = {t: (s, json.loads(d), e) for t, s, d, e in self.db.execute("SELECT * FROM outcomes")}
        for trial in self.trials():
            line: dict[str, Any] = {"trial": trial.model_dump(mode="json", exclude_unset=True)}
            if trial.id in reads:
                line["test_read"] = True
            if trial.id in ends:
                line["status"], line["data"], line["ended"] = ends[trial.id]
            lines.append(line)
        return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)

    def merge(self, text: str) -> int:
        """Add what an exported ledger has and this one does not -> new outcomes. Raises LedgerError, adding nothing."""
        found = 0
        with self._alone():
            for number, line in enumerate(text.splitlines(), 1):
                try:
                    value = json.loads(line)
                    if "about" in value:
                        if value["about"] == "version" and value["value"] != VERSION:
                            raise LedgerError(f"the text is of version {value['value']}, this program reads {VERSION}")
                        self.db.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (value["about"], value["value"]))
                        continue
                    trial = Trial.model_validate(value["trial"])
                except LedgerError:
                    raise
                except (ValueError, KeyError, TypeError) as error:
                    raise LedgerError(f"line {number} is none of an exported ledger: {error}") from None
                self.db.execute("INSERT OR IGNORE INTO trials (id, cell, stage, spec) VALUES (?, ?, ?, ?)",
                                (trial.id, trial.cell, trial.stage, trial.model_dump_json(exclude_unset=True)))
                if value.get("test_read"):
                    self.db.execute("INSERT OR IGNORE INTO test_reads VALUES (?, ?, ?)",
                                    (trial.id, trial.cell, value.get("ended", time.time())))
                if "status" in value:
                    found += self.db.execute("INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?, ?)", (
                        trial.id, value["status"], json.dumps(value["data"]), value["ended"])).rowcount
        return found


def _alive(owner: str, renewed: float) -> bool:
    host, pid, _ = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return time.time() - renewed < LAPSE
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
