"""One request to a server of the usual protocol, repeated where that helps, within the budget."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from kdlora.asking.answers import REFUSED, UNREAD, Answers
from kdlora.asking.asksettings import DEFAULT_URL, AskSettings
from kdlora.errors import ConfigError, first_line
from kdlora.extras import check_installed

ATTEMPTS, FIRST_ATTEMPTS, UNREADABLE_ATTEMPTS = 9, 3, 5
FIRST_DELAY, LONGEST_DELAY, LONGEST_WAIT = 0.5, 60.0, 900.0
"""Seconds; the last is the longest `Retry-After` that is obeyed."""
_AGAIN = frozenset({408, 409, 425, 429})
_FRAME_TOKENS = 64
"""What a server's chat template may add to a prompt, at most."""
_ABOVE = 0.01
"""A log-probability may be above 0 by rounding alone."""
_LEAST_KEY = 8
"""Letters of a key that is one; a server of your own may be given `x`."""
_SHOWN = 200
_WORD = re.compile(r"[\w-]+")
"""A parameter's name is one, and no part of a model's."""
_CUT = "max_tokens or model output limit was reached"
"""How OpenAI refuses where thoughts alone pass the limit."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading an answer that is none may raise."""


@dataclass(frozen=True)
class Reply:
    """What came: a text with the likely first tokens where the server gives them, or why there is none."""

    text: str = ""
    likely: Sequence[tuple[str, float]] = ()
    refused: str = ""
    used: tuple[int, int] | None = None
    cut: bool = False

    @property
    def reason(self) -> str:
        return self.refused or f"no label: {self.text!r}"


def read_key(settings: AskSettings) -> str:
    """Read the key from its variable; a server of one's own needs none."""
    key = os.environ.get(settings.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {settings.key_variable} has characters that no key has; set it again")
    if not key and settings.url == DEFAULT_URL:
        raise ConfigError(f"no key: set the environment variable {settings.key_variable}, or name your own server")
    return key


class Server:
    """Counts, waits and repeats; use it inside `async with server.client`."""

    def __init__(self, settings: AskSettings, budget: Answers, tokens_of_answer: int) -> None:
        check_installed("asking a language model", "ask")
        import openai

        self._key = read_key(settings)
        self._settings, self._budget, self._written = settings, budget, tokens_of_answer
        self._openai = openai
        self.client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=settings.url, max_retries=0, timeout=settings.timeout
        )
        self._not_before = 0.0
        self.answered = 0
        # Some servers call the limit otherwise, or take no seed or temperature with a vote, and say so.
        self._limit, self._left_out = "max_tokens", frozenset[str]()
        self._optional = {"seed", "temperature"} if settings.heat == 1 else {"seed"}  # 1 is their default

    def row(self, prompt: str, requests: int) -> contextlib.AbstractAsyncContextManager[None]:
        return self._budget.hold(requests, self._count(prompt))

    def _count(self, prompt: str) -> tuple[int, int]:
        return len(prompt.encode("utf-8", "replace")) + _FRAME_TOKENS, self._written

    async def ask(self, prompt: str, vote: int | None = None) -> Reply:
        """Ask until there is an answer, or no use in asking."""
        tokens = self._count(prompt)
        attempt, answers = 0, self.answered
        while True:
            while (rest := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(rest * random.uniform(1.0, 1.2))  # not all at the same moment
            used = reserved = await self._budget.reserve(tokens)
            patience = ATTEMPTS if self.answered else FIRST_ATTEMPTS
            limited_by, left_out = self._limit, self._left_out
            try:
                async with asyncio.timeout(self._settings.timeout):
                    reply = _read_reply(await self._request(prompt, vote))
                reply = replace(reply, text=self._mask(reply.text), refused=self._mask(reply.refused))
                used = reply.used or reserved
                if vote is None and not (reply.likely or reply.refused or self._budget.good):
                    raise ConfigError("the server gives no log-probabilities; ask with votes in their place: --votes 5")
                self.answered += 1
                return reply
            except self._openai.APIStatusError as fault:
                used = (0, 0)
                if limited_by == "max_tokens" and "max_completion_tokens" in str(fault):
                    self._limit = "max_completion_tokens"
                    continue
                named = self._optional.intersection(_WORD.findall(str(fault))) - left_out
                if named and vote is not None and fault.status_code in (400, 422):
                    self._left_out |= named
                    continue
                if (refusal := self._judge(fault)) is not None:
                    return refusal
                wait, problem = _retry_after(fault.response.headers), self._mask(fault)
                if fault.status_code == 429:
                    patience = ATTEMPTS
                    if answers != self.answered:  # a limit that lets others through is no fault
                        attempt, answers = 0, self.answered
            except (self._openai.APITimeoutError, TimeoutError):
                late = f"none within {self._settings.timeout:g} s (raise timeout, or lower concurrency)"
                wait, problem = None, late
            except self._openai.APIConnectionError as fault:
                wait, problem = None, self._mask(fault.__cause__ or fault)
            except UNREADABLE as fault:
                wait, problem = None, f"{UNREAD} ({type(fault).__name__}: {self._mask(fault)})"
                known = self.answered or self._budget.good  # by the folder: it has spoken the protocol
                if known and attempt + 1 >= min(patience, UNREADABLE_ATTEMPTS):
                    return Reply(refused=problem)
            finally:
                self._budget.settle(tokens, reserved, used)
            attempt += 1
            if attempt >= patience:
                where = f"no answer from {self._settings.url}"
                if not self.answered:
                    raise ConfigError(f"{where}: {problem}. Check the address (base_url), or try again later")
                raise ConnectionError(
                    f"{where} after {attempt} attempts: {problem}. The answers so far are kept; the same command "
                    "goes on"
                )
            await self._hold_off(attempt, wait)

    async def _request(self, prompt: str, vote: int | None) -> str:
        settings = self._settings
        asked: dict[str, Any] = {"model": settings.model, "temperature": settings.heat}
        asked[self._limit] = self._written
        chat = settings.protocol == "chat"
        asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        if vote is None:
            shown = settings.top_logprobs
            asked |= {"logprobs": True, "top_logprobs": shown} if chat else {"logprobs": shown}
        else:
            asked["seed"] = settings.seed + vote
            asked = {name: value for name, value in asked.items() if name not in self._left_out}
        # The typed methods copy the question and check the answer, which takes longer than all else here.
        path = "/chat/completions" if chat else "/completions"
        return str(await self.client.post(path, body=asked, cast_to=str))

    def _judge(self, fault: Any) -> Reply | None:
        """Say what an error means: raise where no row will fare better, None where another try may."""
        status, said, where, whole = fault.status_code, self._mask(fault), self._settings.url, str(fault)
        flagged = "flagged" in whole.casefold()  # a text, by moderation
        unproven = not (self._settings.votes or self.answered or flagged)  # no log-probabilities have come so far
        if unproven and status in (400, 403, 422) and ("logprobs" in whole or "temperature" in whole):
            raise ConfigError(
                f"{where} gives no such log-probabilities ({said}); ask for fewer (--top-logprobs), at another "
                "--temperature, or with votes in their place: --votes 5 (a model that thinks needs --answer-tokens "
                "1000, too)"
            )
        if status == 401 or (status == 403 and not flagged):
            raise ConfigError(f"{where} refuses the key in {self._settings.key_variable} ({said}); set the right one")
        if status == 404:
            raise ConfigError(f"{where} has no model {self._settings.model!r}, or is no such server ({said})")
        if status == 402 or getattr(fault, "code", None) == "insufficient_quota":
            raise ConfigError(f"{where} says that the account is used up ({said}); the answers so far are kept")
        if status in _AGAIN or status >= 500:
            return None
        return Reply(refused=f"{REFUSED}: {said}", cut=_CUT in whole)

    async def _hold_off(self, attempt: int, wait: float | None) -> None:
        """Wait as long as the server says, and let everybody wait; else twice as long each time."""
        if wait:
            self._not_before = max(self._not_before, time.monotonic() + min(wait, LONGEST_WAIT))
            return
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** (attempt - 1))
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    def _mask(self, fault: object) -> str:
        """Quote what somebody else says: without the key, and short."""
        said = first_line(fault) if isinstance(fault, BaseException) else str(fault)
        hidden = said.replace(self._key, "***") if len(self._key) >= _LEAST_KEY else said
        return hidden[:_SHOWN].encode("utf-8", "replace").decode()


def _read_reply(body: str) -> Reply:
    """Read an answer of either protocol; what is none raises one of `UNREADABLE`."""
    content = json.loads(body)
    if said := content.get("error") or content["choices"][0].get("error"):  # OpenRouter's status is 200
        raise ValueError(said)
    choice = content["choices"][0]
    message = choice.get("message") or {}
    text = str(message.get("content") or choice.get("text") or "").rpartition("</think>")[2]
    used, cut = _read_usage(content.get("usage") or {}), choice.get("finish_reason") == "length"
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return Reply(refused=f"refused: {message.get('refusal') or 'content filter'}", used=used)
    likely = _likely_tokens(choice.get("logprobs"))
    if not text.strip() and not likely:
        return Reply(refused="an empty answer", used=used, cut=cut)
    return Reply(text, likely, used=used, cut=cut)


def _read_usage(usage: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read how many tokens were used; None where the server does not say, or says what cannot be."""
    read, written, total = (usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens"))
    if type(read) is type(written) is type(total) is int:
        written = max(written, total - read)  # xAI and gateways to Gemini count thoughts in the total alone
    return (read, written) if type(read) is type(written) is int and 0 < read < 10**9 > written >= 0 else None


def _likely_tokens(logprobs: Any) -> list[tuple[str, float]]:
    """Read the alternatives of the first token, in any of the shapes in use."""
    if not logprobs:
        return []
    if content := logprobs.get("content"):  # chat
        tops = content[0].get("top_logprobs") or content[:1]
    else:
        tops = (logprobs.get("top_logprobs") or [[]])[0]
    found = tops.items() if isinstance(tops, Mapping) else [(one["token"], one["logprob"]) for one in tops]
    kept = [(str(token), float("-inf") if value is None else float(value)) for token, value in found]
    if any(value > _ABOVE for _, value in kept):
        raise ValueError("a log-probability above 0")
    return [(token, value) for token, value in kept if value == value]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read how many seconds the server wants us to wait: a number, or a time."""
    said = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return None
