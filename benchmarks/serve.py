"""What the HTTP server costs: clients that ask without a pause, beside `Classifier` in a loop of full batches.

    python benchmarks/serve.py --model FOLDER [--file TEXTS] [--clients 64] [--seconds 60] [--each 1 16]

Prints texts a second and latencies for each number of texts in a request, then what 1,000 malformed requests got.
Exits 1 where a request fails, or a malformed one is answered with 500. The clients are one process and share the cores
with the server, so its share of the loop's throughput is a lower bound.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import command_line, markdown, tell_machine

from kdlora import Classifier

WORDS = ("The", "film", "was", "a", "quiet", "and", "moving", "story")
MALFORMED = 1000


def read_texts(file: Path | None) -> list[str]:
    """Read a text a line; without a file, make texts of 4 to 64 words."""
    if file is not None:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [" ".join((WORDS * 8)[:length]) for length in (4, 8, 12, 16, 24, 32, 48, 64)] * 16


def loop_of_batches(folder: Path, texts: list[str], seconds: float, size: int = 64) -> float:
    """Give the texts a second of calls of `predict` with full batches."""
    classifier, done = Classifier.load(folder), 0
    classifier.predict(texts[:size])
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        at = done % max(1, len(texts) - size)
        done += len(classifier.predict(texts[at : at + size]))
    return done / (time.perf_counter() - start)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[int]:
    """Run the server; give its port, and see that it ends well."""
    command = [sys.executable, "-m", "kdlora", "serve", f"model={folder}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("listening at "))
        yield int(line.rpartition(":")[2])
        server.terminate()
        if code := server.wait(60):
            raise SystemExit(f"the server ended with code {code} after SIGTERM")


async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> int:
    """Send a request and read the whole answer; give its status."""
    writer.write(b"POST /predict HTTP/1.1\r\nHost: benchmark\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head = await reader.readuntil(b"\r\n\r\n")
    size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(size.partition(b":")[2]))
    return int(head.split(b" ", 2)[1])


async def load(port: int, bodies: list[bytes], clients: int, seconds: float) -> tuple[list[float], Counter[int]]:
    """Let clients ask without a pause; give the latencies in seconds, and how often each status came."""
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while (start := time.perf_counter()) < end:
            statuses[await send(reader, writer, bodies[turn % len(bodies)])] += 1
            latencies.append(time.perf_counter() - start)
            turn += clients
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return latencies, statuses


def malformed(draw: random.Random) -> bytes:
    """Make a request's body that is wrong in one of many ways."""
    good = json.dumps({"text": "a film", "model": "model"}).encode()
    wrong: list[object] = [None, 3, [], {}, "", " ", [1], True, 1e300, {"text": "a"}, [[]]]
    kind = draw.randrange(6)
    if kind == 0:
        return good[: draw.randrange(len(good))]
    if kind == 1:
        return draw.randbytes(draw.randrange(300))
    if kind == 2:
        return json.dumps({draw.choice(["text", "texts", "model", "label"]): draw.choice(wrong)}).encode()
    if kind == 3:
        text = draw.choice([*wrong, ["a"], ["a", "b", "c"]])
        return json.dumps({"texts": ["a", text], "model": draw.choice(["model", "none"])}).encode()
    if kind == 4:
        return b"[{"[draw.randrange(2) :] * draw.randrange(1, 5000) + good
    return json.dumps({"text": "a" * draw.randrange(20_001, 2_000_000)}).encode()


async def send_malformed(port: int) -> Counter[int]:
    """Send malformed requests, each on a connection of its own."""
    statuses: Counter[int] = Counter()
    draw = random.Random(0)
    for _ in range(MALFORMED):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        statuses[await send(reader, writer, malformed(draw))] += 1
        writer.close()
    return statuses


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    texts = read_texts(options.file)
    before = loop_of_batches(options.model, texts, options.seconds / 4)
    rows, failed = [], False
    with running(options.model) as port:
        for each in options.each:
            bodies = [
                json.dumps({"texts": [texts[(start + k) % len(texts)] for k in range(each)]}).encode()
                for start in range(0, len(texts), each)
            ]
            asyncio.run(load(port, bodies, options.clients, 2))  # warm-up
            latencies, statuses = asyncio.run(load(port, bodies, options.clients, options.seconds))
            failed |= set(statuses) != {200}
            rows.append((each, statuses.total(), statuses.total() * each / options.seconds, latencies, dict(statuses)))
        bad = asyncio.run(send_malformed(port))
    loop = (before + loop_of_batches(options.model, texts, options.seconds / 4)) / 2
    print(f"`Classifier` in a loop of full batches: {loop:,.0f} texts/s; {options.clients} clients:")
    header = ("texts in a request", "requests", "texts/s", "of the loop", "p50 ms", "p99 ms", "statuses")
    table = []
    for each, count, speed, latencies, found in rows:
        p50, p99 = (f"{1e3 * float(np.percentile(latencies, part)):.1f}" for part in (50, 99))
        table.append((each, f"{count:,}", f"{speed:,.0f}", f"{speed / loop:.0%}", p50, p99, found))
    print(markdown(header, table))
    print(f"{bad.total()} malformed requests: {dict(sorted(bad.items()))}")
    tell_machine()
    if failed or any(status >= 500 for status in bad):
        raise SystemExit(1)


if __name__ == "__main__":
    parser = command_line(__doc__, "model")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--each", type=int, nargs="+", default=[1, 16])
    main(parser.parse_args())
