"""Serve models over HTTP: `/predict`, `/health`, `/metrics`; texts that wait together are computed together.

Everything but the network runs in one event loop, so the queue of a model needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as write_metrics
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kdlora.deploy import Runtime
from kdlora.deploy.folder import Way
from kdlora.deploy.hub import locate_export
from kdlora.deploy.network import find_model
from kdlora.deploy.predict import Text, check_one, check_text
from kdlora.deploy.tagger import Answer, Model, model_type
from kdlora.errors import ConfigError, DataError, KdLoraError
from kdlora.system.environment import default_threads

logger = logging.getLogger(__name__)

_TOGETHER = 64
"""Most texts that are computed at once; they are batched by length."""
_MOST_HEAD_BYTES = 1 << 16
_SECONDS_TO_END = 25
"""How long requests that have begun may take after the server was asked to end; the batch that runs ends after it."""
_SECONDS_KEPT = 620
"""How long an idle connection stays open: a load balancer, which may keep it 600 s, must be the first to close it."""
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Limits:
    """How much a server takes."""

    waiting: int = 1024  # texts that wait for one model; beyond, a request is sent away with 503
    texts: int = 256  # of one request
    characters: int = 20_000  # of one text
    body_bytes: int = 1_000_000  # of one request

    def __post_init__(self) -> None:
        if min(self.waiting, self.texts, self.characters, self.body_bytes) < 1:
            raise ConfigError("serve: every limit must be at least 1")
        if self.texts > self.waiting:
            raise ConfigError(f"serve: {self.texts} texts in one request could never wait among {self.waiting}")


class _Meters:
    """What `/metrics` says."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        kept: dict[str, Any] = {"namespace": "kdlora", "registry": self.registry}
        self.requests = Counter("requests", "Requests to /predict by status.", ["status"], **kept)
        self.seconds = Histogram("request_seconds", "Seconds from a request's head to its answer.", **kept)
        self.texts = Counter("texts", "Texts that were answered.", ["model"], **kept)
        self.batches = Histogram("batch_texts", "Texts computed at once.", ["model"], buckets=_BATCHES, **kept)
        self.waiting = Gauge("waiting_texts", "Texts that wait for the model.", ["model"], **kept)


@dataclass
class _Queue:
    """The texts that wait for one model; tasks empty it as long as there are any."""

    model: Model
    name: str
    most: int
    meters: _Meters
    at_once: int = 1  # batches that are computed at the same time
    share: int = 1  # texts of a batch, so that all that wait are computed at the same time
    asked: deque[tuple[Text, asyncio.Future[Answer]]] = field(default_factory=deque)
    tasks: set[Any] = field(default_factory=set)
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.at_once)  # the loop's own has few threads, which all models share

    async def ask(self, texts: list[Text]) -> list[Answer]:
        """Wait for the predictions of one request; a full queue takes none."""
        if len(self.asked) + len(texts) > self.most:
            detail = f"{len(self.asked)} texts wait for {self.name} already; ask again later"
            raise HTTPException(503, detail, {"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        waited: list[asyncio.Future[Answer]] = [loop.create_future() for _ in texts]
        self.asked.extend(zip(texts, waited, strict=True))
        self.share = min(_TOGETHER, -(-len(self.asked) // self.at_once))
        for _ in range(min(len(texts), self.at_once - len(self.tasks))):
            self.tasks.add(loop.create_task(self._empty()))
        try:
            found = await asyncio.gather(*waited)
        except KdLoraError:
            if len(texts) > 1:  # its error counts the texts as the request does
                predict: Callable[..., object] = self.model.predict
                await loop.run_in_executor(self.pool, predict, texts)
            raise
        self.meters.texts.labels(self.name).inc(len(found))
        return found

    async def _empty(self) -> None:
        while self.asked:
            batch = [self.asked.popleft() for _ in range(min(self.share, len(self.asked)))]
            self.meters.batches.labels(self.name).observe(len(batch))
            await self._answer(batch)
        self.tasks.discard(asyncio.current_task())

    async def _answer(self, batch: list[tuple[Text, asyncio.Future[Answer]]]) -> None:
        """Answer texts together, or one by one where they fail together: a bad text fails its own request."""
        texts = [text for text, _ in batch]
        try:
            predict: Callable[..., Sequence[Answer]] = self.model.predict
            answers = await asyncio.get_running_loop().run_in_executor(self.pool, predict, texts)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for answer, (_, future) in zip(answers, batch, strict=True):
            if not future.done():  # as where the server ends
                future.set_result(answer)


def _question_type(limits: Limits) -> type[BaseModel]:
    one = Annotated[str, Field(max_length=limits.characters)]
    text = one | tuple[one, one]
    many = Annotated[list[text], Field(min_length=1, max_length=limits.texts)]
    strict = ConfigDict(extra="forbid", strict=True)
    fields: dict[str, Any] = {"text": (text | None, None), "texts": (many | None, None), "model": (str | None, None)}
    return create_model("Question", __config__=strict, **fields)


def make_app(
    models: Mapping[str, Model], limits: Limits | None = None, at_once: Mapping[str, int] | None = None
) -> FastAPI:
    """Build the application; the first model answers requests that name none."""
    limits, meters, at_once = limits or Limits(), _Meters(), at_once or {}
    queues = {name: _Queue(one, name, limits.waiting, meters, at_once.get(name, 1)) for name, one in models.items()}
    for name, queue in queues.items():
        meters.waiting.labels(name).set_function(partial(len, queue.asked))
    question = _question_type(limits)
    app = FastAPI(title="kdlora", docs_url=None, redoc_url=None)  # those two would fetch scripts from elsewhere
    content = {"application/json": {"schema": question.model_json_schema()}}

    @app.post("/predict", openapi_extra={"requestBody": {"required": True, "content": content}})
    async def predict(request: Request) -> Response:
        """Classify a text, a pair, or a list of them, or mark their entities."""
        start, status = time.perf_counter(), 500
        try:
            asked = _parse(await _read_body(request, limits.body_bytes), question)
            answer = await _predict(asked, queues)
            status = 200
            return _json(answer)
        except HTTPException as refused:
            status = refused.status_code
            raise
        finally:
            meters.requests.labels(str(status)).inc()
            meters.seconds.observe(time.perf_counter() - start)

    @app.get("/health")
    async def health() -> Response:
        """Say that the server answers, and what it serves."""
        return _json({"status": "ok", "models": {name: describe(one) for name, one in models.items()}})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give the figures in Prometheus' text format."""
        return Response(write_metrics(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def describe(model: Model) -> dict[str, Any]:
    names = ("kind", "label_names", "backend", "precision", "max_length")
    return {name: getattr(model.folder, name) for name in names}


async def _read_body(request: Request, most: int) -> bytes:
    """Read a request, and no more of it than is allowed."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"the body has more than {most:,} bytes; send the texts in several requests")
    except ClientDisconnect:
        raise HTTPException(400, "the request ended before its body did") from None
    return bytes(body)


def _parse(body: bytes, form: type[BaseModel]) -> Any:
    """Check a request; a fault is told by its place, without a word of the text."""
    try:
        asked: Any = form.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        # What is no text was meant as a pair, and the other way round: the fault within counts.
        first = max(faults, key=lambda one: (one["type"] not in ("string_type", "tuple_type"), len(one["loc"])))
        place = ".".join(str(part) for part in first["loc"] if "constrained-str" not in str(part))
        raise HTTPException(422, f"{place}: {first['msg']}" if place else first["msg"]) from None
    if (asked.text is None) == (asked.texts is None):
        raise HTTPException(422, "expected either text (a text, or a pair as a list of two) or texts (a list of them)")
    return asked


async def _predict(asked: Any, queues: Mapping[str, _Queue]) -> dict[str, Any]:
    name = next(iter(queues)) if asked.model is None else asked.model
    if name not in queues:
        raise HTTPException(404, f"no model {name!r:.80}; there are {', '.join(queues)}")
    model, texts = queues[name].model, [asked.text] if asked.texts is None else asked.texts
    try:
        for number, text in enumerate(texts):
            where = "text" if asked.texts is None else f"texts, number {number}"
            if model.marks_entities and isinstance(text, str):  # which may be empty, and then has no entities
                check_one(text, where, whole=True)
            else:
                check_text(text, where, 1 if model.marks_entities else model.folder.texts)
        found = await queues[name].ask(texts)
    except DataError as error:
        raise HTTPException(422, str(error)) from None
    except KdLoraError as error:
        logger.error("%s: %s", name, error)
        raise HTTPException(500, "the model could not answer; the server's log says why") from None
    answers = [{"entities": list(map(asdict, one))} if isinstance(one, list) else asdict(one) for one in found]
    return {"model": name} | (answers[0] if asked.texts is None else {"predictions": answers})


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")


class _Protocol(HttpToolsProtocol):
    """Reads requests as uvicorn does, but no request line, headers or trailers without an end."""

    _around = 0
    """Bytes since the last ones of a body, or the end of a request."""

    def data_received(self, data: bytes) -> None:
        self._around += len(data)
        super().data_received(data)
        if self._around > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request line and headers have more than {_MOST_HEAD_BYTES:,} bytes.")

    def on_body(self, body: bytes) -> None:
        self._around = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._around = 0
        super().on_message_complete()


def name_models(models: Sequence[str]) -> dict[str, Path]:
    """Give the folder of each model by its name: what stands before `=`, else the last part of its path."""
    found: dict[str, Path] = {}
    for model in models:
        name, given, place = model.partition("=")
        if not given or Path(model).exists():
            name, place = Path(model.partition("@")[0]).absolute().name, model
        if not name:
            raise ConfigError(f"serve: {model!r} has no name before =; write NAME=FOLDER")
        if name in found:
            raise ConfigError(f"serve: two models are named {name!r}; give each its own: NAME=FOLDER")
        found[name] = locate_export(place)
    return found


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name == "posix":  # on Windows two servers would share the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"serve: cannot listen on port {port} of {host!r} ({error.strerror}); give an address of this machine "
            "(--host) and a free port (--port)"
        ) from None
    return listener


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    runtime: Runtime = "onnxruntime",
    limits: Limits | None = None,
    ready: Callable[[str, Mapping[str, Model]], None] = lambda address, models: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that have begun are answered first."""
    if threads is not None and threads < 1:
        raise ConfigError(f"serve: threads must be at least 1, got {threads}")
    if not host.strip():  # which the system takes for all addresses
        raise ConfigError("serve: the host is empty; expected 127.0.0.1, or 0.0.0.0 for all addresses of this machine")
    folders = {name: find_model(Way(path, runtime)) for name, path in name_models(models).items()}
    many = threads or default_threads()  # a batch for each thread: in one batch for all, they wait for each other
    at_once = {name: 1 if one.backend == "openvino" else many for name, one in folders.items()}
    with _bind(host, port) as listener:  # before the models are loaded, which may be minutes
        loaded: dict[str, Model] = {
            name: model_type(one).open(one, threads=threads if at_once[name] == 1 else 1)
            for name, one in folders.items()
        }
        settings = uvicorn.Config(
            make_app(loaded, limits, at_once),
            http=_Protocol,
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_keep_alive=_SECONDS_KEPT,
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        server = uvicorn.Server(settings)
        listener.listen(2048)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}", loaded)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes the signal on when all is answered
            server.run(sockets=[listener])
