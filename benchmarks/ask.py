"""How fast a language model is asked, and in how much memory: `python benchmarks/ask.py [--rows N] [--rate-only]`.

A stand-in (a process of its own on loopback) answers each request after `--delay` seconds. What it can serve is
measured by a client that sends bytes and looks at none of the answers; beside it stands `kdlora.ask`, as many requests
at a time. Then `--rows` rows are asked about without a delay: memory at its highest, against that for a tenth of them.
"""

from __future__ import annotations

import asyncio
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from harness import command_line, markdown, tell_machine

STAND_IN = Path(__file__).parents[1] / "tests" / "llm_standin.py"


def write_rows(path: Path, rows: int) -> Path:
    """Write rows of some thirty words."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "text", "label"])
        for number in range(rows):
            word, label = (("superb", "positive"), ("awful", "negative"))[number % 2]
            table.writerow(
                [f"r{number}", f"number {number}: " + "a film and its story, " * 5 + f"{word} to the end", label]
            )
    return path


async def bare_rate(url: str, body: bytes, requests: int, concurrency: int) -> float:
    """Give the requests per second of a client that does nothing else."""
    place = urlsplit(url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    left = iter(range(requests))

    async def work() -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        for _ in left:
            writer.write(head + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode()
            await reader.readexactly(int(answer.split("Content-Length: ")[1].split("\r\n")[0]))
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return requests / (time.perf_counter() - start)


def ask(data: Path, to: Path, url: str, concurrency: int) -> tuple[float, float]:
    """Ask in a process of its own; give the rows per second of the asking, and the most memory of the process in MB."""
    code = (
        "import json, resource, sys, time; from kdlora.asking.ask import ask; from kdlora.asking.asksettings import *\n"
        "data, to, url, concurrency = sys.argv[1:]; seen = []\n"
        "def note(done, total): seen.append((done, time.perf_counter())) if done % 100 == 0 else None\n"
        "ask(data, to, AskSettings('m', base_url=url, concurrency=int(concurrency)), progress=note)\n"
        "(first, start), (last, end) = seen[1], seen[-1]\n"
        "most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "print(json.dumps([(last - first) / (end - start), most]))"
    )
    command = [sys.executable, "-c", code, str(data), str(to), url, str(concurrency)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rate, most = json.loads(done.stdout)
    return rate, most


def main() -> None:
    """Measure, and print two tables."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--rate-only", action="store_true")
    given = parser.parse_args()
    tell_machine()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rates = []
        for delay, rows in ((given.delay, min(given.rows, 5_000)), *([] if given.rate_only else [(0.0, given.rows)])):
            service = subprocess.Popen(
                [sys.executable, str(STAND_IN), "--delay", str(delay)], stdout=subprocess.PIPE, text=True
            )
            try:
                url = service.stdout.readline().strip()  # type: ignore[union-attr]
                if delay:
                    prompt = "Labels:\nA: negative\nB: positive\n\nText: a superb film\nAnswer:" + " x" * 60
                    body = json.dumps(
                        {"model": "m", "messages": [{"role": "user", "content": prompt}], "logprobs": True}
                    )
                    bare = asyncio.run(bare_rate(url, body.encode(), rows, given.concurrency))
                    rate, _ = ask(write_rows(folder / "rows.csv", rows), folder / "rate", url, given.concurrency)
                    rates.append((given.concurrency, f"{bare:.0f}", f"{rate:.0f}", f"{rate / bare:.1%}"))
                    print(markdown(("at a time", "it can serve a second", "kdlora ask", "share"), rates))
                    continue
                sizes = (max(1000, rows // 10), rows)
                found = [
                    ask(write_rows(folder / f"{n}.csv", n), folder / f"m{n}", url, given.concurrency) for n in sizes
                ]
                table = [(n, f"{most:.0f}", f"{rate:.0f}") for n, (rate, most) in zip(sizes, found, strict=True)]
                print(markdown(("rows", "most memory, MB", "rows a second, no delay"), table))
            finally:
                service.kill()
                service.wait()


if __name__ == "__main__":
    main()
