"""A language model on loopback that speaks the chat and completions protocols, with faults to order.

It reads the options in the prompt (lines `CODE: name`) and answers by the words of the last text.
`python llm_standin.py` prints its address and serves until it is ended.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

WORDS = {
    "positive": ("wonderful", "delightful", "superb", "charming", "brilliant", "moving"),
    "negative": ("dreadful", "boring", "clumsy", "awful", "lifeless", "tedious"),
    "complaint": ("broken", "late", "rude"),
    "praise": ("friendly", "quick", "perfect"),
}
_OPTION = re.compile(r"^([A-Z]|\d+): (.+?)(?: \(.*\))?$", re.MULTILINE)
_TEXT = re.compile(r"^Text: (.*)$", re.MULTILINE)


@dataclass
class StandIn:
    """What it answers, and what it does wrong.

    `fault` is asked with the number of each request: a status with or without a message ("400", "403 flagged"), "cut",
    "garbage", "slow", "empty", "refusal", "nonsense" or none of these. `edit` may change each answer before it is sent.
    """

    delay: float = 0.0
    fault: Callable[[int], str | None] = lambda number: None
    logprobs: bool = True
    models: tuple[str, ...] = ()
    key: str | None = None
    limit: str = "max_tokens"
    edit: Callable[[dict[str, Any]], object] = lambda answer: None
    seen: list[dict[str, Any]] = field(default_factory=list)
    keep: bool = True
    number: int = 0
    port: int = 0
    end: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        """What base_url is set to."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, ready: Callable[[], None]) -> None:
        """Serve until `end` is called."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=256)
        self.port = server.sockets[0].getsockname()[1]
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self.end = lambda: loop.call_soon_threadsafe(ended.set)
        ready()
        await ended.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = int(re.search(r"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        asked = json.loads(await reader.readexactly(length))
        number, self.number = self.number, self.number + 1
        if self.keep:
            self.seen.append(asked)
        fault = self.fault(number)
        await asyncio.sleep(self.delay * random.uniform(0.5, 1.5) if self.keep else self.delay)
        if fault == "slow":
            await asyncio.sleep(2.0)
        if fault == "cut":
            return False
        status, body = self._answer(asked, head, fault)
        extra = f"Content-Length: {len(body)}\r\n" + ("Retry-After: 0.2\r\n" if status == 429 else "")
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}\r\n".encode())
        writer.write(body)
        await writer.drain()
        return True

    def _answer(self, asked: dict[str, Any], head: str, fault: str | None) -> tuple[int, bytes]:
        given = (re.search(r"(?i)authorization: bearer (\S+)", head) or ["", ""])[1]
        if self.key is not None and given != self.key:
            return 401, json.dumps({"error": {"message": f"wrong key {given}"}}).encode()
        if self.models and asked["model"] not in self.models:
            return 404, json.dumps({"error": {"message": f"no model {asked['model']}"}}).encode()
        if self.limit not in asked:
            told = f"Unsupported parameter: 'max_tokens'. Use '{self.limit}' instead."
            return 400, json.dumps({"error": {"message": told}}).encode()
        if fault and fault[:3].isdigit():
            return int(fault[:3]), json.dumps({"error": {"message": fault[4:] or "busy"}}).encode()
        if fault == "garbage":
            return 200, b"<html>a proxy of somebody</html>"
        chat = "messages" in asked
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        tokens = likely(prompt)
        if fault == "nonsense":
            tokens = {"Sorry": 0.9, "The": 0.05}
        text = "" if fault == "empty" else max(tokens, key=lambda token: tokens[token])
        if asked.get("seed") is not None:
            text = random.Random(f"{asked['seed']}{prompt}").choices(list(tokens), list(tokens.values()))[0]
        shown = {token: math.log(p) for token, p in tokens.items()} if self.logprobs and fault != "empty" else {}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 1}
        answer = {"model": asked["model"], "usage": usage, "choices": [_choice(text, shown, chat, fault)]}
        self.edit(answer)
        return 200, json.dumps(answer).encode()


def _choice(text: str, shown: Mapping[str, float], chat: bool, fault: str | None) -> dict[str, Any]:
    if not chat:
        return {"text": text, "logprobs": {"top_logprobs": [dict(shown)]} if shown else None}
    tops = [{"token": token, "logprob": value} for token, value in shown.items()]
    message = {"role": "assistant", "content": text, "refusal": "I would rather not" if fault == "refusal" else None}
    return {"message": message, "logprobs": {"content": [{**tops[0], "top_logprobs": tops}]} if tops else None}


def likely(prompt: str) -> dict[str, float]:
    """Give the probability of each code: most of it to the option whose name, or one of its words, is in the text."""
    text = _TEXT.findall(prompt)[-1]
    options = dict(_OPTION.findall(prompt.rsplit("Labels:", 1)[-1].split("\n\n", 1)[0]))
    hit = [
        code
        for code, names in options.items()
        if any(
            re.search(rf"\b{re.escape(word)}\b", text)
            for name in names.split(", ")
            for word in (name, *WORDS.get(name, ()))
        )
    ]
    rest = 0.1 / max(1, len(options) - 1)
    return {code: 0.9 if [code] == hit[:1] else rest for code in options}


@contextlib.contextmanager
def running() -> Iterator[StandIn]:
    """Serve in a thread."""
    model, started = StandIn(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(model.serve(started.set)), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield model
    finally:
        model.end()
        thread.join(10)


def main() -> None:
    """Serve as a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    given = parser.parse_args()
    model = StandIn(delay=given.delay, keep=False)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(model.serve(lambda: print(model.url, file=sys.stdout, flush=True)))


if __name__ == "__main__":
    main()
