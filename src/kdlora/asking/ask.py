"""Ask a language model about every row, keep each answer as it comes, and write the table that teaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from kdlora.asking.answers import TABLE, AnswerLog, BudgetSpentError, Key, Ledger, begin_folder, collect, write_tables
from kdlora.asking.asked_rows import AskedRows, each_row, read_asked_rows
from kdlora.asking.asksettings import AskSettings
from kdlora.asking.questions import (
    Option,
    Questions,
    Row,
    count_votes,
    join_groups,
    likely_groups,
    read_logprobs,
    read_vote,
)
from kdlora.asking.server import Reply, Server
from kdlora.configfile import expand_home
from kdlora.data.spool import read_column
from kdlora.errors import ConfigError, DataError
from kdlora.system.integrity import hash_file
from kdlora.system.storage import hold_lock, write_json_atomic

if TYPE_CHECKING:
    from kdlora.asking.audit import Audit

AUDIT = "audit.json"
_FIRST_REFUSED, _FIRST_UNANSWERED = 3, 20
_SHOWN = 3
_SAMPLE = 200
_CHARACTERS_OF_TOKEN = 4

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True)
class AskSummary:
    """What an asking left.

    Attributes:
        folder: where all of it lies.
        table: probabilities by id, for `teacher.probabilities`.
        rows: rows in the table; 0 where the budget ended before the audit, which comes first.
        unanswered: questions that got no answer: refusals, nonsense.
        examples: some of these, with their reasons.
        left: rows that were not asked, since the budget was used up.
        resumed: questions that earlier calls had done.
        requests: all that were sent, by earlier calls too; those under way at a kill count.
        tokens_read: likewise.
        tokens_written: likewise.
        cost: of these, where prices are given.
        audit: what people's labels say of the answers.
        seconds: wall-clock time of this call.
    """

    folder: Path
    table: Path
    rows: int
    unanswered: int
    examples: tuple[dict[str, str], ...]
    left: int
    resumed: int
    requests: int
    tokens_read: int
    tokens_written: int
    cost: float | None
    audit: Audit | None
    seconds: float


@dataclass(frozen=True)
class AskPlan:
    """What an asking would do; `tokens` are those read, a quarter of the characters of the filled prompts."""

    rows: int  # audited ones included
    requests: int  # at least: many labels and repeated requests add some
    tokens: int
    cost: float | None
    prompts: tuple[str, ...]
    labels: tuple[str, ...]


def ask(data: str, to: str | Path, settings: AskSettings, *, progress: Progress | None = None) -> AskSummary:
    """Ask a language model for the label of every row, and write its probabilities as a table that teaches.

    Every answer is on disk as it comes: the same call on the folder goes on where a killed one stopped, and asks about
    no row twice. The folder holds `probabilities.parquet` for `teacher.probabilities`, and `train.parquet` (and
    `unlabelled.parquet`) with the rows that have an answer, for `data.train` (and `data.unlabelled`).

    Args:
        data: CSV, TSV, JSON Lines, Parquet or text file (one text a line), with or without labels.
        to: the folder.
        settings: the model and how it is asked.
        progress: called as rows are done.

    Returns:
        Counts, cost and the audit.

    Raises:
        ConfigError: no key, a wrong address or model, a server without log-probabilities, a prompt that cannot be
            filled, a budget too small for one question.
        DataError: no such file or column, an empty text, no row with an answer.
        ArtifactError: the folder holds answers to something else, or another process writes it.
        ConnectionError: the server was lost on the way.
    """
    start = time.perf_counter()
    asking = _Asking(read_asked_rows(data, settings), settings)
    folder = expand_home(str(to)).resolve()
    with hold_lock(folder / ".lock", f"asks into {folder}", remedy=", or name another folder with --to"):
        begin_folder(folder, asking.ingredients, {"base_url": settings.url, "data": str(data)})
        with AnswerLog(folder) as log:
            chosen, audit, left = _run(asking.carry_out(log, progress))
            if audit is not None:
                write_json_atomic(folder / AUDIT, asdict(audit))
            rows = 0
            if (audit is None) == (asking.rows.audit is None):
                rows = write_tables(folder, asking.rows, log, chosen, 1.0 if audit is None else audit.temperature)
            requests, read, written = log.spent.tolist()
            return AskSummary(
                folder=folder,
                table=folder / TABLE,
                rows=rows,
                unanswered=len(log.bad),
                examples=tuple(log.bad[:_SHOWN]),
                left=left,
                resumed=log.resumed,
                requests=requests,
                tokens_read=read,
                tokens_written=written,
                cost=settings.cost(read, written),
                audit=audit,
                seconds=time.perf_counter() - start,
            )


def plan_asking(data: str, settings: AskSettings) -> AskPlan:
    """Fill some prompts and count, without asking anything; errors are those of `ask`."""
    asking = _Asking(read_asked_rows(data, settings), settings)
    sample = list(islice(chain.from_iterable(map(each_row, asking.rows.parts.values())), _SAMPLE))
    first = asking.questions[0]
    filled = [first.fill(row, first.choices) for row in sample]
    steps = settings.votes or (1 if len(first.groups) == 1 else 2)
    count = asking.count
    requests = count * steps
    tokens = round(sum(map(len, filled)) / len(filled) / _CHARACTERS_OF_TOKEN * requests)
    cost = settings.cost(tokens, requests * first.tokens_of_answer)
    return AskPlan(count, requests, tokens, cost, tuple(filled[:_SHOWN]), asking.rows.task.label_names)


def _run(work: Any) -> Any:
    """Run a coroutine, in a thread of its own where this one has a loop already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


class _Asking:
    """All questions, and the way through them."""

    def __init__(self, rows: AskedRows, settings: AskSettings) -> None:
        self.rows, self.settings = rows, settings
        self.questions = [
            Questions(file, rows.labels, rows.examples, most=settings.top_logprobs, votes=bool(settings.votes))
            for file in (map(expand_home, settings.prompts) if settings.prompts else (None,))
        ]
        row = next(each_row(rows.parts["train"]))
        for one in self.questions:
            one.check(row)

    @property
    def count(self) -> int:
        """Questions in all: audited rows are asked with each prompt, the others with the best."""
        rows, audit = self.rows, self.rows.audit
        count = sum(map(len, rows.parts.values()))
        if audit is None:
            return count
        again = 0
        if rows.audit_split in rows.parts:  # drawn from those
            asked = set(read_column(rows.parts[rows.audit_split], "id").to_pylist())
            again = sum(name in asked for name in read_column(audit, "id").to_pylist())
        return count - again + len(audit) * len(self.questions)

    @property
    def ingredients(self) -> dict[str, Any]:
        """What decides the answers."""
        rows, settings = self.rows, self.settings
        files = [rows.sources, list(rows.task.text), list(rows.task.label), settings.id_column]
        audited = settings.audit if isinstance(settings.audit, int) else None
        by = None if settings.select_by is None else _hash_model(settings.select_by)
        return {
            "prompts": [one.source for one in self.questions],
            "labels": [list(label) for label in rows.labels.items()],
            "examples": rows.examples,
            "model": settings.model,
            "data": [*files, audited],
            "method": [settings.protocol, settings.votes, settings.heat, settings.top_logprobs],
            "selection": [settings.select, settings.seed, by, settings.rows if settings.select == "diverse" else None],
        }

    async def carry_out(self, log: AnswerLog, progress: Progress | None) -> tuple[int, Audit | None, int]:
        """Ask the audited rows with every prompt, then all others with the best; count the rows that are left."""
        rows = self.rows
        done, total = len(log.done), self.count

        def hear() -> None:
            if progress is not None:
                progress(len(log.done), total)

        hear()
        server = Server(self.settings, Ledger(log, self.settings), self.questions[0].tokens_of_answer)
        keeping = asyncio.create_task(_keep(log))
        chosen, audit = 0, None
        try:
            async with server:
                if rows.audit is not None:
                    parts = {rows.audit_split: rows.audit}
                    pending = [self._pending(log, place, parts) for place in range(len(self.questions))]
                    if await self._ask_all(server, log, chain.from_iterable(pending), hear):
                        audit = self._audit(log)
                        chosen = audit.chosen
                if rows.audit is None or audit is not None:
                    await self._ask_all(server, log, self._pending(log, chosen, rows.parts), hear)
        finally:
            keeping.cancel()
        if len(log.done) == done == 0:
            raise ConfigError("the budget is less than one question may need; raise it, or shorten the prompt")
        return chosen, audit, sum(1 for _ in self._pending(log, chosen, rows.parts))

    def _pending(self, log: AnswerLog, prompt: int, parts: Mapping[str, Dataset]) -> Iterator[tuple[Key, Row]]:
        for split, rows in parts.items():
            for row in each_row(rows):
                key = Key(prompt, split, row["id"])
                if key not in log.done:
                    yield key, row

    async def _ask_all(
        self, server: Server, log: AnswerLog, pending: Iterable[tuple[Key, Row]], hear: Callable[[], None]
    ) -> bool:
        """Ask about rows, some at a time; say whether the budget was enough."""
        queue = iter(pending)
        enough = True

        async def work(rows: Iterable[tuple[Key, Row]]) -> None:
            nonlocal enough
            for key, row in rows:
                try:
                    log.answer(key, await self._answer(server, self.questions[key.prompt], row, known=log.good > 0))
                except BudgetSpentError:
                    enough = False
                    return
                hear()
                if not log.good:
                    _refuse_if_useless(log)
                if not enough:
                    return

        while not log.good and enough and (first := list(islice(queue, 1))):  # one by one: it may all be wrong
            await work(first)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.settings.concurrency if enough else 0):
                    group.create_task(work(queue))
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
        return enough

    async def _answer(self, server: Server, questions: Questions, row: Row, *, known: bool) -> np.ndarray | str:
        """Find the probabilities of the labels, or say why there are none."""
        options = questions.choices
        prompt = questions.fill(row, options)
        if questions.votes:
            replies = [await server.ask(prompt, vote) for vote in range(self.settings.votes)]
            votes = [None if reply.refused else read_vote(reply.text, options) for reply in replies]
            counted = count_votes(votes, len(options))
            return _reason(replies[votes.index(None)]) if counted is None else counted
        found = _read(reply := await server.ask(prompt), options, known=known)
        if found is None:
            return _reason(reply)
        if len(questions.groups) == 1:
            return found
        within = {}
        for place in likely_groups(found):
            group = questions.groups[place]
            if len(group) == 1:
                continue
            inner = _read(reply := await server.ask(questions.fill(row, group)), group, known=known)
            if inner is None:
                return _reason(reply)
            within[place] = inner
        return join_groups(found, options, within)

    def _audit(self, log: AnswerLog) -> Audit:
        from kdlora.asking.audit import audit_answers  # here: it loads much, and is often not needed

        rows, names = self.rows, [str(one.path or "default prompt") for one in self.questions]
        assert rows.audit is not None  # asked for
        tables = [
            collect(log, place, {rows.audit_split: rows.audit}, rows.task.num_labels) for place in range(len(names))
        ]
        labels = read_column(rows.audit, "label").to_numpy()
        answers = [table[rows.audit_split] for table in tables]
        return audit_answers(rows.task, names, answers, labels, self.settings.seed)


def _read(reply: Reply, options: list[Option], *, known: bool) -> np.ndarray | None:
    """Read the options' probabilities; the server is `known` to give some."""
    if reply.refused or (reply.likely is None and known):
        return None
    if reply.likely is None:
        raise ConfigError("the server gives no log-probabilities; ask with votes in their place: --votes 5")
    return read_logprobs(reply.likely, options)


def _reason(reply: Reply) -> str:
    return reply.refused or f"no label: {reply.text!r}"


def _refuse_if_useless(log: AnswerLog) -> None:
    """End what has no use before it costs more."""
    reasons = [entry["unanswered"] for entry in log.bad]
    refused = [reason for reason in reasons if reason.startswith("the server refuses")]
    if len(refused) >= _FIRST_REFUSED and len(refused) == len(reasons):
        raise ConfigError(f"{refused[0]}, and so for the first {len(refused)} rows; check the model and the prompt")
    if len(reasons) >= _FIRST_UNANSWERED:
        raise DataError(f"none of the first {len(reasons)} rows has an answer ({reasons[0]}); change the prompt")


async def _keep(log: AnswerLog) -> None:
    """Have what was written reach the disk, every second."""
    while True:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(log.synchronise)


def _hash_model(folder: str) -> dict[str, str]:
    place = expand_home(folder)
    return {file.name: hash_file(file) for file in sorted(place.glob("*")) if file.is_file()}
