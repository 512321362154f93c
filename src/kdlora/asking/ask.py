"""Ask a language model about every row, keep each answer as it comes, and write the table that teaches."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdlora.asking.answers import CUT, MANIFEST, REFUSED, UNREAD, Answers, BudgetSpentError, Key
from kdlora.asking.asked_rows import AskedRows, each_row, read_asked_rows, write_rows
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
from kdlora.asking.server import Server, read_key
from kdlora.configfile import expand_home, expand_target
from kdlora.data.logit_table import LOGIT, RESERVED, write_table
from kdlora.data.spool import read_column
from kdlora.deploy.folder import DECISIONS, MEASURED, Way
from kdlora.deploy.network import find_model
from kdlora.errors import ConfigError, DataError
from kdlora.evidence.records import Asked
from kdlora.system.integrity import hash_files
from kdlora.system.ownership import refuse_foreign
from kdlora.system.storage import hold_lock, write_json_atomic

if TYPE_CHECKING:
    from kdlora.asking.audit import Audit

AUDIT, TABLE = "audit.json", "probabilities.parquet"
_WRITTEN = (TABLE, "train.parquet", "validation.parquet", "unlabelled.parquet")
_SHOWN, _SAMPLE = 3, 200
_CHARACTERS_OF_TOKEN = 4

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True)
class AskSummary:
    """What an asking left.

    Attributes:
        folder: where all of it lies.
        table: probabilities by id, for `teacher.probabilities`.
        rows: rows in the table; 0 where the budget ended before the audit, which comes first: then no table is
            written, and that of an earlier call stays.
        unanswered: questions that got no answer: refusals, nonsense.
        examples: some of these, with their reasons.
        left: rows that were not asked, since the budget was used up.
        resumed: questions that earlier calls had done.
        requests: all that were sent, by earlier calls too; those under way at a kill count.
        tokens_read: likewise.
        tokens_written: likewise.
        cost: of these, where prices are given.
        audit: what people's labels say of the answers.
        asked: rate and price, which the report of an experiment shows that this table teaches.
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
    asked: Asked
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


def ask(data: str | Path, to: str | Path, settings: AskSettings, *, progress: Progress | None = None) -> AskSummary:
    """Ask a language model for the label of every row, and write its probabilities as a table that teaches.

    Every answer is on disk as it comes: the same call goes on where a killed one stopped, and asks about no row twice
    that has an answer. The folder holds `probabilities.parquet` for `teacher.probabilities`, and, for `data`,
    `train.parquet` and `unlabelled.parquet` with the answered rows, and `validation.parquet` with an audit file's rows.

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

    Examples:
        >>> plan = plan_asking("reviews.csv", settings)
        >>> summary = ask("reviews.csv", "asked", settings)
    """
    start = time.perf_counter()
    asking = _Asking(rows := read_asked_rows(data, settings), settings)
    folder = Path(os.path.realpath(expand_target(to)))  # `resolve` fails at a link to itself
    refuse_foreign(folder, MANIFEST, "answers of a language model", "schema_version", "ingredients")
    _refuse_replacing(folder, (data, settings.unlabelled, settings.audit))
    read_key(settings)  # before a folder is made
    with hold_lock(folder / ".lock", f"asks into {folder}", remedy=", or name another folder with --to"):
        answers = Answers(folder, rows.task.num_labels, settings)
        answers.begin(asking.ingredients, {"base_url": settings.url, "data": str(data)})
        before = Asked.read(folder)
        with answers:
            begun = time.perf_counter()
            audit = _run(asking.carry_out(answers, progress or (lambda done, total: None)))
            asked = _sum_up(asking, answers, time.perf_counter() - begun, before)
            if answers.good:  # without an answer, the next call may be of another model
                write_json_atomic(folder / Asked.FILE, asdict(asked))
            written = _write_outcome(folder, rows, answers, audit)
            chosen = 0 if audit is None else audit.chosen
            left = sum(1 for part in rows.chosen.items() for _ in asking.pending(answers, chosen, *part))
    requests, tokens_read, tokens_written = answers.spent.tolist()
    unanswered = [{"split": key.split, "id": key.id, "unanswered": why} for key, why in answers.unanswered()]
    return AskSummary(
        folder=folder,
        table=folder / TABLE,
        rows=written,
        unanswered=len(unanswered),
        examples=tuple(unanswered[:_SHOWN]),
        left=left,
        resumed=answers.resumed,
        requests=requests,
        tokens_read=tokens_read,
        tokens_written=tokens_written,
        cost=settings.cost(tokens_read, tokens_written),
        audit=audit,
        asked=asked,
        seconds=time.perf_counter() - start,
    )


def _refuse_replacing(folder: Path, sources: Iterable[object]) -> None:
    for one in sources:
        source = Path(os.path.realpath(expand_home(str(one))))
        if source.parent == folder and source.name in _WRITTEN:
            raise ConfigError(f"{one} would be replaced by what is written there; name another folder with --to")


def _sum_up(asking: _Asking, answers: Answers, seconds: float, before: Asked | None) -> Asked:
    """Say how fast the longest call had its answers, and what all cost."""
    new, cost = answers.done - answers.resumed, asking.settings.cost(*answers.spent[1:].tolist())
    if before is not None and before.timed >= new:
        timed, rate, concurrency = before.timed, before.per_second, before.concurrency
    else:
        timed, rate, concurrency = new, new / seconds if new else None, asking.settings.concurrency
    return Asked(
        model=asking.settings.model,
        questions=answers.done,
        timed=timed,
        per_second=rate,
        concurrency=concurrency,
        cost_per_million=None if cost is None else 1e6 * cost / answers.done,
        own_labels="label" not in asking.rows.parts["train"].column_names,
    )


def plan_asking(data: str | Path, settings: AskSettings) -> AskPlan:
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


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a thread: a notebook has a loop in this one, and Ctrl-C, which comes here, breaks no task."""
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(runner.run, work)
        try:
            while not wait([running], 0.5).done:  # Windows hears of Ctrl-C only between two waits
                pass
            return running.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(loop.stop)
            raise
        finally:
            pool.submit(runner.close)


class _Asking:
    def __init__(self, rows: AskedRows, settings: AskSettings) -> None:
        self.rows, self.settings = rows, settings
        files = map(expand_home, settings.prompts) if settings.prompts else (None,)
        self.questions = [Questions(file, rows.labels, rows.examples, settings) for file in files]
        row = next(each_row(rows.parts["train"]))
        for one in self.questions:
            one.check(row)

    @cached_property
    def count(self) -> int:
        """Questions in all: audited rows are asked with each prompt, the others with the best."""
        chosen, audit = self.rows.chosen, self.rows.audit
        count = sum(map(len, chosen.values()))
        if audit is None:
            return count
        return count + len(self.questions) * len(audit[1]) - len(np.intersect1d(chosen[audit[0]], audit[1]))

    @property
    def ingredients(self) -> dict[str, Any]:
        rows, settings = self.rows, self.settings
        files = [rows.sources, list(rows.task.text), list(rows.task.label), settings.id_column]
        audited = settings.audit if isinstance(settings.audit, int) else None
        by = None
        if settings.select_by is not None:  # its card and decisions choose no row
            model = find_model(Way(Path(settings.select_by))).path
            found = hash_files(model, [model])
            by = {name: digest for name, digest in found.items() if name not in ("README.md", DECISIONS, MEASURED)}
        return {
            "prompts": [one.source for one in self.questions],
            "labels": [list(label) for label in rows.labels.items()],
            "examples": rows.examples,
            "model": settings.model,
            "data": [*files, audited],
            "method": [settings.protocol, settings.votes, settings.heat, settings.top_logprobs, settings.codes],
            "selection": [settings.select, settings.seed, by, settings.rows if settings.select == "diverse" else None],
        }

    async def carry_out(self, answers: Answers, progress: Progress) -> Audit | None:
        """Ask the audited rows with every prompt, then all others with the best."""
        rows, audit = self.rows, None
        progress(answers.done, self.count)
        server = Server(self.settings, answers, self.questions[0].tokens_of_answer)
        async with server.client:
            enough = True
            if rows.audit is not None:
                asked = [self.pending(answers, prompt, *rows.audit) for prompt in range(len(self.questions))]
                if enough := await self._ask_all(server, answers, chain.from_iterable(asked), progress):
                    audit = self._audit(answers, *rows.audit)
            if enough:
                best = 0 if audit is None else audit.chosen
                asked = [self.pending(answers, best, *part) for part in rows.chosen.items()]
                await self._ask_all(server, answers, chain.from_iterable(asked), progress)
        if not answers.done:
            raise ConfigError("the budget is less than one question may need; raise it, or shorten the prompt")
        return audit

    def pending(self, answers: Answers, prompt: int, split: str, places: np.ndarray) -> Iterator[tuple[Key, Row]]:
        for row in each_row(self.rows.parts[split].select(places)):
            if (key := Key(prompt, split, row["id"])) not in answers.found:
                yield key, row

    async def _ask_all(
        self, server: Server, answers: Answers, pending: Iterator[tuple[Key, Row]], progress: Progress
    ) -> bool:
        """Ask about rows, some at a time; say whether the budget was enough."""
        enough = True

        async def work(rows: Iterable[tuple[Key, Row]]) -> None:
            nonlocal enough
            for key, row in rows:
                try:
                    answers.keep(key, await self._answer(server, key.prompt, row))
                except BudgetSpentError:
                    enough = False
                progress(answers.done, self.count)
                answers.refuse_useless()
                if not enough:
                    return

        # One by one: it may all be wrong, and what an answer costs is not known.
        while not (server.answered and answers.good) and enough and (first := list(islice(pending, 1))):
            await work(first)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.settings.concurrency if enough else 0):
                    group.create_task(work(pending))
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
        return enough

    async def _answer(self, server: Server, number: int, row: Row) -> np.ndarray | str:
        questions = self.questions[number]
        options = questions.choices
        prompt = questions.fill(row, options)
        async with server.row(prompt, self.settings.votes or 1 + (len(questions.groups) > 1)):
            if self.settings.votes:
                return await self._vote(server, prompt, options)
            reply = await server.ask(prompt)
            if (found := read_logprobs(reply.likely, options)) is None or len(questions.groups) == 1:
                return reply.reason if found is None else found
            return await self._ask_within(server, questions, row, found)

    async def _vote(self, server: Server, prompt: str, options: Sequence[Option]) -> np.ndarray | str:
        replies = [await server.ask(prompt, vote) for vote in range(self.settings.votes)]
        votes = [None if reply.refused else read_vote(reply.text, options) for reply in replies]
        if (counted := count_votes(votes, len(options))) is not None:
            return counted
        lost = [reply for reply, vote in zip(replies, votes, strict=True) if vote is None]
        # One whose request failed is asked again in any case; else the first one that was cut, if any.
        reply = max(lost, key=lambda one: (one.refused.startswith((REFUSED, UNREAD)) and not one.cut, one.cut))
        return f"{CUT}{self.settings.answer_tokens}: {reply.reason}" if reply.cut else reply.reason

    async def _ask_within(self, server: Server, questions: Questions, row: Row, found: np.ndarray) -> np.ndarray | str:
        within, options = {}, questions.choices
        for place in likely_groups(found):
            group = questions.groups[place]
            if len(group) == 1:
                continue
            reply = await server.ask(questions.fill(row, group))
            if (inner := read_logprobs(reply.likely, group)) is None:
                return reply.reason
            within[place] = inner
        return join_groups(found, options, within)

    def _audit(self, answers: Answers, split: str, places: np.ndarray) -> Audit:
        from kdlora.asking.audit import audit_answers  # here: it loads much, and is often not needed

        names = [one.name for one in self.questions]
        rows = self.rows.parts[split].select(places)
        ids = read_column(rows, "id").to_pylist()
        tables = [answers.probabilities(prompt, split, ids) for prompt in range(len(names))]
        labels = read_column(rows, "label").to_numpy()
        return audit_answers(self.rows.task, names, tables, labels, self.settings.seed)


def _write_outcome(folder: Path, asked: AskedRows, answers: Answers, audit: Audit | None) -> int:
    """Write the audit, the probabilities by the prompt that it chose, and the rows that have some; count them."""
    from kdlora.asking.audit import correct

    prompt = 0 if audit is None else audit.chosen
    if audit is not None:
        write_json_atomic(folder / AUDIT, asdict(audit))
    elif asked.audit is not None:  # the budget ended before it
        return 0
    ids, splits, tables = list[pa.Array](), list[str](), list[np.ndarray]()
    for split, places in asked.chosen.items():
        if split == "validation":  # with people's labels, whether or not there is an answer
            write_rows(folder / "validation.parquet", asked, asked.parts[split])
        rows = asked.parts[split].select(places)
        table = answers.probabilities(prompt, split, read_column(rows, "id").to_pylist())
        answered = ~np.isnan(table).any(axis=1)
        if not answered.any():
            continue
        rows, table = rows.select(np.flatnonzero(answered)), table[answered]
        if audit is not None:
            table = correct(table, audit.temperature, audit.bias)
        if split != "validation":
            write_rows(folder / f"{split}.parquet", asked, rows, table.argmax(axis=1) if split == "train" else None)
        ids += read_column(rows, "id").chunks
        splits += [split] * len(table)
        tables.append(table)
    if not tables:
        raise DataError(f"none of the {answers.done} rows that were asked about has an answer; see {answers.path}")
    together = np.concatenate(tables)
    parts = {} if {*splits} == {"train"} else {"split": pa.array(splits)}
    columns: dict[str, Any] = {"id": pa.chunked_array(ids), **parts}
    for place, name in enumerate(asked.task.label_names):
        columns[LOGIT + name if name in RESERVED else name] = pa.array(together[:, place], pa.float32())
    write_table(folder / TABLE, columns)
    return len(together)
