"""examples/serve.py: a real client gets every answer, in order, and each bad request is turned away."""

import http.client
import importlib.util
import json
import os
import re
import shlex
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastbert_hf
from fastbert_hf import FastBertForSequenceClassification, FastBertModel
from tests.clients.helpers import WORDS, tiny_model
from tests.pages.pages import NOT_RUN, beginning, run, steps

pytest.importorskip("fastapi")
sentence_transformers = pytest.importorskip("sentence_transformers")
uvicorn = pytest.importorskip("uvicorn")
numpy = pytest.importorskip("numpy")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
LOAD_SECONDS = float(os.environ.get("FASTBERT_SERVE_SECONDS", "2"))  # 30 to see what a server carries
LOADED_MODEL = os.environ.get("FASTBERT_SERVE_MODEL")  # a sentence embedder of your own to load
CLIENTS = 8


def example():
    specification = importlib.util.spec_from_file_location("serve_example", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextmanager
def running(application):
    """The server in a thread, on a port of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


class Client:
    """A connection that is kept open."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, path, body=None, raw=None):
        data = json.dumps(body).encode() if raw is None else raw
        method = "GET" if body is None and raw is None else "POST"
        self.connection.request(method, path, data, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if response.status < 500 else text


@pytest.fixture
def embedder_folder(saved, tmp_path):
    folder = tmp_path / "embedder"
    sentence_transformers.SentenceTransformer(saved(tiny_model(FastBertModel)), device="cpu").save(str(folder))
    return str(folder)


def texts_of(client, number):
    """Different texts, one to four a request, one to nine words long."""
    words = [WORDS[(client * 7 + number * 3 + place) % len(WORDS)] for place in range(9)]
    return [" ".join(words[: 1 + (number + place) % 9]) for place in range(1 + number % 4)]


def load(port, client, seconds):
    """Questions until the time is up: each with its answer, and how long it took."""
    connection, found, end = Client(port), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        texts = texts_of(client, len(found))
        start = time.perf_counter()
        status, answer = connection.ask("/embed", {"inputs": texts})
        found.append((texts, status, answer, time.perf_counter() - start))
    return found


def test_under_load_every_text_gets_its_own_embedding(embedder_folder):
    folder, expected = LOADED_MODEL or embedder_folder, {}
    reference = sentence_transformers.SentenceTransformer(folder, device="cpu")
    with running(example().application(folder)) as port, ThreadPoolExecutor(CLIENTS) as pool:
        answers = [a for found in pool.map(lambda n: load(port, n, LOAD_SECONDS), range(CLIENTS)) for a in found]
    times = [1000 * seconds for *_, seconds in answers]
    print(
        f"{len(answers) / LOAD_SECONDS:.0f} requests/s of {CLIENTS} clients, p50 {statistics.median(times):.1f} ms, "
        f"p99 {statistics.quantiles(times, n=100)[-1]:.1f} ms"
    )
    assert len(answers) >= CLIENTS
    for texts, status, answer, _ in answers:
        assert status == 200 and len(answer) == len(texts)
        for text, embedding in zip(texts, answer):
            if text not in expected:
                expected[text] = reference.encode(text)
            numpy.testing.assert_allclose(embedding, expected[text], rtol=1e-4, atol=1e-5)


def test_requests_that_wait_are_one_batch(embedder_folder):
    """While the first text is computed nine arrive; they are computed together, four at a time."""
    module, batches, arrived = example(), [], threading.Event()

    def compute(texts):
        batches.append(len(texts))
        if len(batches) == 1:
            arrived.wait(60)
        return [[float(text)] for text in texts]

    module.load = lambda folder, dtype: ("/embed", compute)
    with running(module.application(embedder_folder, most=4)) as port, ThreadPoolExecutor(2) as pool:
        first = pool.submit(Client(port).ask, "/embed", {"inputs": "7"})
        while not batches:
            time.sleep(0.01)
        rest = pool.submit(Client(port).ask, "/embed", {"inputs": [str(i) for i in range(9)]})
        time.sleep(0.2)
        arrived.set()
        assert first.result() == (200, [[7.0]]) and rest.result() == (200, [[float(i)] for i in range(9)])
    assert batches == [1, 4, 4, 1]


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": []},
        {"inputs": 5},
        {"inputs": [["a", "b", "c"]]},
        {"inputs": ["a"] * 257},
        {"texts": ["a"]},
        {"inputs": ["lone \ud800 surrogate"]},
        {"inputs": [None]},
    ],
)
def test_bad_bodies_are_refused_with_a_reason(embedder_folder, body):
    with running(example().application(embedder_folder)) as port:
        status, answer = Client(port).ask("/embed", body)
        assert status == 422 and answer["error_type"] == "Validation" and answer["error"]
        assert Client(port).ask("/embed", {"inputs": "the tree"})[0] == 200


def test_other_mistakes_are_4xx_and_the_server_goes_on(embedder_folder):
    module = example()
    with running(module.application(embedder_folder)) as port:
        client = Client(port)
        assert client.ask("/embed", raw=b"{not json")[0] == 422
        assert client.ask("/predict", {"inputs": "a"})[0] == 404  # an embedder classifies nothing
        assert client.ask("/embed")[0] == 405
        assert client.ask("/health") == (200, {})
        assert client.ask("/info")[1]["model_id"] == "embedder"
        module.MOST_WAITING = 2
        assert client.ask("/embed", {"inputs": ["a", "b", "c"]})[0] == 429
        assert len(client.ask("/embed", {"inputs": "a"})[1]) == 1


def test_an_error_of_the_model_is_the_answer_to_its_batch_alone(embedder_folder):
    module = example()

    def compute(texts):
        if "bad" in texts:
            raise RuntimeError("broken")
        return [[1.0] for _ in texts]

    module.load = lambda folder, dtype: ("/embed", compute)
    with running(module.application(embedder_folder)) as port:
        assert Client(port).ask("/embed", {"inputs": "bad"})[0] == 500
        assert Client(port).ask("/embed", {"inputs": "good"}) == (200, [[1.0]])


@torch.no_grad()
def test_a_classifier_gives_its_labels_most_likely_first(saved, tokenizer):
    model = tiny_model(FastBertForSequenceClassification, num_labels=3)
    questions = ["the tree walks left .", ["one root", "fast node"], "leaf ?"]
    with running(example().application(saved(model))) as port:
        status, answer = Client(port).ask("/predict", {"inputs": questions})
        single = Client(port).ask("/predict", {"inputs": questions[0]})[1]
        assert Client(port).ask("/embed", {"inputs": "a"})[0] == 404
    assert status == 200 and [label["label"] for label in single] == [label["label"] for label in answer[0]]
    for question, labels in zip(questions, answer):
        texts = [question] if isinstance(question, str) else question
        wanted = model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(0)
        assert [label["score"] for label in labels] == sorted((label["score"] for label in labels), reverse=True)
        for label in labels:
            assert label["score"] == pytest.approx(wanted[model.config.label2id[label["label"]]].item(), rel=1e-4)


@pytest.mark.skipif(not hasattr(fastbert_hf, "prepare_for_inference"), reason="nothing prepares models here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_prepared_model_answers_as_it_does_without_a_server(embedder_folder, dtype):
    embedder = sentence_transformers.SentenceTransformer(embedder_folder, device="cpu")
    fastbert_hf.prepare_for_inference(embedder, dtype=dtype)
    with running(example().application(embedder_folder, dtype)) as port:
        status, answer = Client(port).ask("/embed", {"inputs": ["the tree walks left ."]})
        assert Client(port).ask("/info")[1]["model_dtype"] == dtype
    assert status == 200
    numpy.testing.assert_allclose(answer[0], embedder.encode("the tree walks left ."), rtol=1e-5, atol=1e-6)


def test_the_commands_of_the_page_work(embedder_folder, tmp_path, monkeypatch):
    """Those of docs/serve-http.md; a free port takes the place of the page's."""
    install, serve, curl = steps("docs/serve-http.md")
    assert beginning(install, NOT_RUN)
    os.rename(embedder_folder, tmp_path / "MODEL_FOLDER")
    (tmp_path / "examples").symlink_to(EXAMPLE.parent)
    monkeypatch.chdir(tmp_path)
    started = {}
    monkeypatch.setattr(uvicorn, "run", lambda application, host, port: started.update({f"{port}": application}))
    run(serve)
    program, address, *header, data, body = shlex.split(curl.text)
    assert (program, header, data) == ("curl", ["-H", "Content-Type: application/json"], "-d")
    host, port, path = re.fullmatch(r"(\w+):(\d+)(/\w+)", address).groups()
    with running(started[port]) as free:
        status, answer = Client(free).ask(path, raw=body)
    assert host == "localhost" and status == 200 and len(answer) == len(json.loads(body)["inputs"]) == 2
