"""Sum up what `faults.py` found, as Markdown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from faults_workshop import read_lines


def summarise(out: Path) -> str:
    """Sum up every part that has results.

    Args:
        out: folder of the results.
    """
    parts = [_kills(out), _shared(out), _fuzzed(out), _lasted(out)]
    return "\n\n".join(part for part in parts if part) or "nothing was run yet"


def _kills(out: Path) -> str:
    lines = read_lines(out / "kill.jsonl")
    struck = [line for line in lines if line["struck"]]
    if not struck:
        return ""
    rounds = [line for line in lines if "differences" in line]
    inside = [line for line in struck if line["hit"]]
    asked = [line for line in struck if line["signal"] in ("SIGTERM", "SIGINT")]
    stages = Counter(str(line["hit"]).rsplit(" seed", 1)[0] for line in inside)
    signals = Counter(line["signal"] + (" to the child" if line["victim"] == "child" else "") for line in struck)
    wrong = [line for line in rounds if line["differences"] or line["repeated"]]
    return "\n".join(
        [
            f"- kills: {len(struck)}, of which {len(inside)} inside a stage; {len(rounds)} experiments finished after "
            f"them, {len(wrong)} with a difference, a leftover or a repeated stage",
            f"- stages hit: {', '.join(f'{stage} {count}' for stage, count in stages.most_common())}",
            f"- signals: {', '.join(f'{name} {count}' for name, count in signals.most_common())}",
            f"- most training lost: {max(line['lost_seconds'] for line in struck):.1f} s",
            f"- from SIGTERM or Ctrl-C to the end: {max((line['ended'] for line in asked), default=0.0):.1f} s at "
            f"most, exit status {sorted({line['code'] for line in asked})}",
        ]
    )


def _shared(out: Path) -> str:
    lines = read_lines(out / "share.jsonl")
    if not lines:
        return ""
    wrong = [line["round"] for line in lines if line["differences"] or not line["fits"]]
    kinds = Counter(line["kind"] for line in lines)
    return f"- rounds of two processes: {dict(kinds)}, wrong: {wrong or 'none'}"


def _fuzzed(out: Path) -> str:
    lines = read_lines(out / "fuzz.jsonl")
    if not lines:
        return ""
    seconds = sum(line["seconds"] for line in lines)
    findings = sorted({name for line in lines for name in line["findings"]})
    targets = sorted({line["target"] for line in lines})
    tries = sum(int(line["said"].split()[1]) for line in lines if line["said"].startswith("Done "))
    return f"- fuzzing: {seconds:.0f} s and {tries:,} tries over {', '.join(targets)}; findings: {findings or 'none'}"


def _lasted(out: Path) -> str:
    found = []
    for line in read_lines(out / "last.jsonl"):
        points = line["points"]
        early, late = points[len(points) // 10], points[-1]
        grown = (late["resident"] - early["resident"]) / 2**20
        found.append(
            f"- {len(points)} {line['what']}: memory {grown:+.1f} MiB from the {len(points) // 10 + 1}th to the last, "
            f"open files {early['files']} -> {late['files']}, threads {early['threads']} -> {late['threads']}"
            + (f", checkpoints {max(point['checkpoints'] for point in points)} at most" if "epoch" in late else "")
        )
    return "\n".join(found)
