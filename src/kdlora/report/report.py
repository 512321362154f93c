"""The report of one or several experiments: Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout
from kdlora.report.blocks import Cell, Inline, Page, Section, Strong, Table, html_frame, to_markdown
from kdlora.report.collect import Experiment, load_experiments
from kdlora.report.experiment_tables import Links
from kdlora.report.findings import retention
from kdlora.report.paper import published_scores
from kdlora.report.sections import experiment_section
from kdlora.report.wording import arm_title, plus_minus
from kdlora.system.ownership import is_ours
from kdlora.system.storage import write_text_atomic

_SIGN = "every figure leads to the record of its run"
"""Stands in every page that kdlora writes."""


@dataclass(frozen=True)
class Report:
    """A rendered report.

    Attributes:
        markdown: the content of `report.md`.
        html: the content of `report.html`: one page with its styles and plots inside, without network.
        paths: the files that were written.
    """

    markdown: str = field(repr=False)
    html: str = field(repr=False)
    paths: tuple[Path, ...]

    def _repr_html_(self) -> str:
        """Show the page in a notebook."""
        return html_frame(self.html)


def make_report(folders: Sequence[Path | str], *, out: Path | str | None = None, draws: int = 2_000) -> Report:
    """Write `report.md` and `report.html` of experiments.

    Args:
        folders: experiment folders; different tasks get sections of their own.
        out: folder to write to; by default that of the one experiment, or the folder that holds all of them.
        draws: bootstrap draws.

    Returns:
        Both texts and where they lie.

    Raises:
        ArtifactError: a folder that is not an experiment, or a record that cannot be read.
        OSError: the folder cannot be written, or the disk is full; nothing half-written is left.
    """
    experiments = load_experiments(folders)
    base = Path(out) if out is not None else _common_folder([Path(folder) for folder in folders])
    sections = [experiment_section(one, number=n, base=base, draws=draws) for n, one in enumerate(experiments, start=1)]
    page = _single_page(sections[0]) if len(sections) == 1 else _joint_page(experiments, sections, base)
    layout = ExperimentLayout(base)
    return write_page(page, layout.report_md, layout.report_html)


def write_page(page: Page, markdown_path: Path, html_path: Path) -> Report:
    """Render a page both ways and write both files atomically."""
    for path in (markdown_path, html_path):
        if path.exists() and not is_ours(path) and _SIGN not in path.read_text(encoding="utf-8", errors="replace"):
            raise ArtifactError(f"{path} was not written by kdlora and stays; name another folder with --out")
    markdown, html = to_markdown(page), to_html(page)
    write_text_atomic(markdown_path, markdown)
    write_text_atomic(html_path, html)
    return Report(markdown, html, (markdown_path, html_path))


def to_html(page: Page) -> str:
    """Render a page as self-contained HTML; every text is escaped by the template engine."""
    environment = Environment(
        loader=PackageLoader("kdlora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup
    return environment.get_template("report.html").render(page=page, script=_script()) + "\n"


def _script() -> dict[str, str]:
    """Give the page's one script, and the hash by which the page allows it and nothing else to run."""
    text = files("kdlora.report").joinpath("templates/report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "hash": f"sha256-{digest}"}


def footer() -> tuple[str, str]:
    """Give the page's origin and date: "kdlora 0.1.0" and a sentence with the time."""
    try:
        name = f"kdlora {version('kdlora')}"
    except PackageNotFoundError:
        name = "kdlora"
    return name, f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {_SIGN}."


def _common_folder(folders: list[Path]) -> Path:
    """Choose where a report goes by default."""
    if len(set(folders)) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _single_page(section: Section) -> Page:
    """Make the page of one experiment; its answer is the first sentence."""
    lead = section.blocks[0].parts  # type: ignore[union-attr]
    whole = Section("In short", section.anchor, section.blocks[1:])
    origin, written = footer()
    return Page(section.title, f"{origin} report", lead, (whole, *section.sections), written)


def _joint_page(experiments: Sequence[Experiment], sections: Sequence[Section], base: Path) -> Page:
    """Make the page of several experiments: all scores in one table, then each in turn."""
    origin, written = footer()
    overview = Section("All experiments", "all", (_joint_table(experiments, base),))
    title = f"{len(experiments)} experiments"
    return Page(title, f"{origin} report", _joint_answer(experiments), (overview, *sections), written)


def _joint_answer(experiments: Sequence[Experiment]) -> tuple[Inline, ...]:
    """Say in one sentence what the students keep on average."""
    kept = [
        value.mean
        for one in experiments
        if one.student_arm is not None and (value := retention(one, one.student_arm, "fft")) is not None
    ]
    if not kept:
        return ("There is ", Strong("no answer yet"), ": no experiment has both a student and a teacher that finished.")
    span = f"from {min(kept):.1f}% to {max(kept):.1f}%, {len(kept)} of {len(experiments)} experiments"
    return (
        "On average over the experiments, the student keeps ",
        Strong(f"{np.mean(kept):.1f}%"),
        f" of its teacher’s score ({span}).",
    )


def _joint_table(experiments: Sequence[Experiment], base: Path) -> Table:
    """Show all experiments in the form of the paper's Table 1, with the mean where every cell is filled."""
    found = {arm for one in experiments for arm in one.arms}
    arms = ["fft", "lora", "kd-lora", *sorted(found - {"fft", "lora", "kd-lora"})]
    rows = []
    for number, one in enumerate(experiments, start=1):
        links = Links(base, f"e{number}-runs")
        cells = [Cell(plus_minus(one.score(arm)), links.to_all(one.finished(arm))) for arm in arms]
        kept = retention(one, one.student_arm, "fft") if one.student_arm else None
        rows.append((Cell(one.name), *cells, links.derived(plus_minus(kept, unit="%"))))
    quiet: frozenset[int] = frozenset()
    if len({one.task.name or one.name for one in experiments}) == len(experiments):
        rows.append(
            (Cell("mean", strong=True), *(Cell(_mean_of(experiments, arm), strong=True) for arm in arms), Cell(""))
        )
        if all(one.task.name for one in experiments):
            quiet = frozenset({len(rows)})
            rows.append(_published_mean(experiments, arms))
    columns = ("experiment", *(arm_title(arm) for arm in arms), "kept of FFT")
    note = "Mean ± sample standard deviation over seeds; the small numbers are the seeds and lead to their records."
    return Table("Scores, 0 to 100", columns, tuple(rows), frozenset(range(1, len(columns))), quiet, note)


def _mean_of(experiments: Sequence[Experiment], arm: str) -> str:
    """Average an arm over the experiments; only where every one has it, or the means could not be compared."""
    scores = [one.score(arm) for one in experiments]
    values = [score.mean for score in scores if score is not None]
    return f"{np.mean(values):.1f}" if len(values) == len(scores) else "–"


def _published_mean(experiments: Sequence[Experiment], arms: Sequence[str]) -> tuple[Cell, ...]:
    """Average the paper's BERT rows over the same tasks."""
    fields = {"fft": "fft", "lora": "lora", "kd-lora": "kd_lora"}
    published = [published_scores(one.task.name).get("bert") for one in experiments]
    texts = ["–"] * len(arms)
    if all(published):
        texts = [
            f"{np.mean([getattr(one, fields[arm]) for one in published]):.1f}" if arm in fields else "–" for arm in arms
        ]
    return (Cell("paper, BERT, same tasks"), *map(Cell, texts), Cell("–"))
