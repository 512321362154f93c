"""The HTTP server: answers, refusals, a full queue, and its end."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import uvicorn

from deploy_folders import TEXTS
from kdlora.deploy import serving
from kdlora.deploy.predict import Classifier, Prediction
from kdlora.deploy.serving import Limits, make_app, name_models, serve
from kdlora.deploy.tagger import Tagger
from kdlora.errors import ConfigError, ModelError

LIMITS = {"waiting": 64, "texts": 64, "characters": 2000, "body-bytes": 20_000}


def call(port, body=None, path="/predict"):
    """Send a request on a connection of its own; give status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, content)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, text if path == "/metrics" else json.loads(text)


@contextlib.contextmanager
def process(*models):
    """Run `kdlora serve` in a process of its own; give it and its port."""
    command = [sys.executable, "-m", "kdlora", "serve", *map(str, models), "--port", "0", "--threads", "1", "--json"]
    command += [part for name, most in LIMITS.items() for part in (f"--{name}", str(most))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = "".join(iter(server.stdout.readline, "}\n"))
            yield server, int(json.loads(said + "}")["address"].rpartition(":")[2])
        finally:
            server.kill()


@pytest.fixture(scope="module")
def port(exported):
    """A server of two files of one export."""
    with process(f"fp32={exported() / 'model.onnx'}", exported()) as (_, found):
        yield found


def test_the_answers_are_those_of_the_classifier(port, exported):
    """Answers that are another text's, since requests are computed together; a model that is served for another."""
    model = Classifier.load(exported(), precision="fp32")
    expected = dict(zip(TEXTS, model.predict(TEXTS), strict=True))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda text: call(port, {"text": text, "model": "fp32"}), expected))
    for (status, answer), (text, one) in zip(found, expected.items(), strict=True):
        assert (status, answer["model"], answer["label"]) == (200, "fp32", one.label), text
        assert answer["probabilities"] == pytest.approx(one.probabilities, abs=1e-4)
    status, many = call(port, {"texts": [*TEXTS[:3], ["a pair", TEXTS[3]]]})
    assert (status, many["model"], len(many["predictions"])) == (200, "fp32", 4), "the first model is the default"
    assert [one["label"] for one in many["predictions"][:3]] == [expected[text].label for text in TEXTS[:3]]
    pair = model.predict([("a pair", TEXTS[3])])[0]
    assert many["predictions"][3]["probabilities"] == pytest.approx(pair.probabilities, abs=1e-4)
    assert call(port, {"text": TEXTS[0], "model": exported().name})[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 422, "JSON"),
        (b"[" * 10_000, 422, "JSON"),
        (b'{"text": "\\ud800"}', 422, "JSON"),
        (b'{"text": NaN}', 422, "text"),
        (b'{"text": ' + b"9" * 9000 + b"}", 422, "JSON"),
        ([], 422, "object"),
        ({}, 422, "either text"),
        ({"text": "a", "texts": ["a"]}, 422, "either text"),
        ({"text": " "}, 422, "empty"),
        ({"texts": ["a", ""]}, 422, "number 1"),
        ({"texts": []}, 422, "texts"),
        ({"texts": ["a"] * 65}, 422, "64"),
        ({"text": ["a", "b", "c"]}, 422, "text"),
        ({"text": "a" * 2001}, 422, "2000"),
        ({"texts": ["a", ["a", "b" * 2001]]}, 422, "texts.1.1: String should have at most 2000"),
        ({"text": "a", "label": "b"}, 422, "label"),
        ({"text": "a", "model": "unknown"}, 404, "fp32"),
        (b" " * 20_001, 413, "20,000"),
    ],
)
def test_a_bad_request_is_refused_with_the_place(port, body, status, said):
    """A 500, which a balancer takes for a broken server, or the label of an empty text."""
    found, answer = call(port, body)
    assert (found, said in answer["detail"]) == (status, True), answer
    assert call(port, {"text": "a"})[0] == 200


def test_health_and_metrics_tell_what_is_served(port, exported):
    """A balancer that finds nothing to ask, and figures that count something else."""
    status, health = call(port, path="/health")
    assert (status, health["status"], set(health["models"])) == (200, "ok", {"fp32", exported().name})

    def count(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", call(port, path="/metrics")[1], re.MULTILINE)[1])

    call(port, {"text": "a", "model": "fp32"})  # so that every figure is there
    call(port, b"{")
    names = ('kdlora_texts_total{model="fp32"}', 'kdlora_requests_total{status="422"}', "kdlora_request_seconds_count")
    before = [count(name) for name in names]
    call(port, {"texts": ["a", "b"], "model": "fp32"})
    call(port, b"{")
    assert [count(name) - start for name, start in zip(names, before, strict=True)] == [2, 1, 2]
    assert count('kdlora_waiting_texts{model="fp32"}') == 0


@contextlib.contextmanager
def in_thread(app):
    """Run an application in a thread; give its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Slow:
    """A classifier that answers when it may, and notes what it was asked at once."""

    folder, marks_entities = SimpleNamespace(texts=1), False

    def __init__(self):
        self.go, self.calls = threading.Event(), []

    def predict(self, texts):
        self.calls.append(list(texts))
        assert self.go.wait(30)
        if "bad" in texts:
            raise ModelError("/home/somebody/model: the output is not a number")
        return [Prediction(text, {}) for text in texts]


def test_texts_that_wait_are_computed_together_and_a_full_queue_sends_away():
    """A queue without end, where every client waits for ever; one text a pass; a bad text that fails its neighbours."""
    model = Slow()
    with in_thread(make_app({"slow": model}, Limits(waiting=6, texts=6))) as port, ThreadPoolExecutor(8) as pool:
        first = pool.submit(call, port, {"text": "first"})
        wait_until(lambda: model.calls)
        texts = ["a", "b", "bad", "c"]
        others = [pool.submit(call, port, {"text": text}) for text in texts]
        wait_until(lambda: 'waiting_texts{model="slow"} 4.0' in call(port, path="/metrics")[1])
        full, answer = call(port, {"texts": ["d", "e", "f"]})
        assert (full, "4 texts wait" in answer["detail"]) == (503, True)
        model.go.set()
        assert first.result()[1]["label"] == "first"
        found = [one.result() for one in others]
        assert [status for status, _ in found] == [200, 200, 500, 200]
        assert [answer.get("label") for _, answer in found] == ["a", "b", None, "c"]
        assert found[2][1] == {"detail": "the model could not answer; the server's log says why"}  # no path
        assert call(port, {"texts": ["d", "e", "f"]})[0] == 200
    assert sorted(model.calls[1]) == sorted(texts)


def test_each_thread_computes_a_batch():
    """Python's own pool has some threads for all models together, so that a large machine was half idle."""
    model, gate = Slow(), threading.Barrier(40, timeout=30)
    model.predict = lambda texts: gate.wait() >= 0 and [Prediction(text, {}) for text in texts]
    with in_thread(make_app({"slow": model}, at_once={"slow": 40})) as port, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(call, port, {"text": str(number)}) for number in range(40)]
        assert [one.result()[0] for one in asked] == [200] * 40
        _, answer = call(port, {"texts": [*map(str, range(80))]})  # of one request, two for each
        assert [one["label"] for one in answer["predictions"]] == [*map(str, range(80))]


def test_what_the_server_is_told(exported, monkeypatch):
    """Balancers that send a request into a closed connection; threads that wait for each other under `auto`."""
    told = []
    monkeypatch.setattr(serving, "make_app", lambda models, limits, at_once: told.append(at_once))
    server = SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(uvicorn, "Server", lambda settings: told.append(settings) or server)
    serve([str(exported())], port=0, threads=3, runtime="auto")
    assert (told[0], told[1].timeout_keep_alive > 600) == ({"onnx": 3}, True)


def wait_until(condition):
    """Wait for what must come soon."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_tagger_gives_entities_and_a_pair_is_refused_where_single_texts_are_read(exported, trained_on):
    """Entities of another text's, or a label at status 200 for a pair, from a model that has only read single texts."""
    tagger = Tagger.load(exported("bert", "tokens"))
    models = {"names": tagger, "reviews": Classifier.load(trained_on("review"))}
    with in_thread(make_app(models, Limits(), {"reviews": 2})) as port:
        status, many = call(port, {"texts": TEXTS[:20]})
        assert (status, call(port, path="/health")[1]["models"]["names"]["kind"]) == (200, "tokens")
        found = [[asdict(one) for one in entities] for entities in tagger.predict(TEXTS[:20])]
        assert sum(map(len, found)) > 20
        assert [one["entities"] for one in many["predictions"]] == found
        assert call(port, {"text": TEXTS[0]})[1]["entities"][0].keys() == {"text", "start", "end", "label", "score"}
        empty = call(port, {"texts": ["", TEXTS[0], "  "]})[1]["predictions"]
        assert [bool(one["entities"]) for one in empty] == [False, True, False], "as kdlora predict says"
        status, refused = call(port, {"text": ["a pair", "of texts"]})
        assert (status, refused["detail"][:23]) == (422, "text: expected one text")
        status, refused = call(port, {"texts": [TEXTS[0], ["one", "another"]], "model": "reviews"})
        assert (status, refused["detail"][:34]) == (422, "texts, number 1: expected one text")


def test_sigterm_ends_it_when_what_has_begun_is_answered(exported):
    """Requests that are cut off at every deployment of a new version, or a process that has to be killed."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n"
    with process(exported()) as (server, port), socket.create_connection(("127.0.0.1", port), 30) as line:
        line.sendall(head)
        assert line.recv(1000).startswith(b"HTTP/1.1 100"), "the server waits for the body"
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(port))
        line.sendall(b'{"text": "a"}')
        assert line.recv(10_000).startswith(b"HTTP/1.1 200")
        assert (server.wait(30), server.stderr.read()) == (0, "")


GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b'POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{"text": "a"}\r\n0\r\n'


@pytest.mark.parametrize("before", [GET, CHUNKED], ids=["head", "trailers"])
@pytest.mark.parametrize("headers", [b"X: " + b"a" * 200_000, b"X: a\r\n" * 40_000], ids=["long", "many"])
def test_headers_without_an_end_are_refused(port, before, headers):
    """One connection could fill the memory with headers, and was answered with 200; then with those after a body."""
    with socket.create_connection(("127.0.0.1", port), 30) as line:
        with contextlib.suppress(ConnectionError):
            line.sendall(before + headers)
        assert line.recv(10_000).startswith(b"HTTP/1.1 400")
    body = json.dumps({"text": "a" * 100_000}).encode()
    with socket.create_connection(("127.0.0.1", port), 30) as line:  # what comes after the head is no part of it
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert line.recv(10_000).startswith(b"HTTP/1.1 413")


def listens(port):
    """Say whether new requests are taken."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 30):
        return True
    return False


def test_what_cannot_be_served_is_refused_before_it_listens(exported, monkeypatch):
    """A server that is up and answers for one of two models of one name, or refuses every request of its own limit."""
    with pytest.raises(ConfigError, match=r"two models are named 'onnx'.*NAME=FOLDER"):
        name_models([str(exported()), f"onnx={exported()}"])
    monkeypatch.chdir(exported())
    assert list(name_models(["."])) == ["onnx"]
    with pytest.raises(ConfigError, match="threads must be at least 1, got -1"):  # none would ever answer
        serve(["."], threads=-1)
    with pytest.raises(ConfigError, match="the host is empty"):  # for the system it is all addresses
        serve(["."], host="")
    monkeypatch.setattr(
        "kdlora.deploy.serving.model_type", None
    )  # a mistyped host, or a port in use, was told after minutes of loading
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigError, match=r"cannot listen.*a free port"),
    ):
        serve(["."], port=other.getsockname()[1])
    with pytest.raises(ConfigError, match=r"of '203\.0\.113\.1' \(.*give an address of this machine"):
        serve(["."], host="203.0.113.1")
    with pytest.raises(ConfigError, match="could never wait"):
        Limits(waiting=2, texts=3)
