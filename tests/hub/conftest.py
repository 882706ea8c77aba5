"""A loopback Hub and one process that talks to it with the unmodified client."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from fastbert_hf import FastBertForMaskedLM
from tests.clients.helpers import VOCABULARY, tiny_model
from tests.hub.loopback import OWNER, USERS, LoopbackHub
from tests.processes import CHILD_SECONDS

INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def hub_environment(url: str, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
    """The environment of a process that knows no other Hub than this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    return {**kept, **settings, **quiet, **({"HF_TOKEN": token} if token else {}), **more}


@dataclass
class Answer:
    code: int
    out: str
    err: str

    def __post_init__(self):
        for token in USERS:
            assert token not in self.out + self.err, "a token was printed"


class Client:
    """A worker process: imports once, then runs scripts and snippets one after another."""

    def __init__(self, url: str, home: Path):
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=hub_environment(url, home),
        )

    def _ask(self, **request) -> Answer:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the worker process ended"
        return Answer(**json.loads(line))

    def script(self, name: str, *arguments: object, token: str | None = OWNER) -> Answer:
        """Run a script's main function as its command line does."""
        return self._ask(script=name, argv=[str(argument) for argument in arguments], token=token)

    def python(self, code: str, token: str | None = OWNER) -> str:
        """Run a snippet, which must succeed; what it prints."""
        answer = self._ask(code=code, token=token)
        assert answer.code == 0, answer.err
        return answer.out


@pytest.fixture(scope="session")
def server():
    hub = LoopbackHub()
    yield hub
    hub.stop()


@pytest.fixture(scope="session")
def client(server, tmp_path_factory):
    worker = Client(server.url, tmp_path_factory.mktemp("hf-home"))
    yield worker
    worker.process.stdin.close()
    worker.process.wait(CHILD_SECONDS)


@pytest.fixture
def hub(server):
    """The loopback Hub, well again and empty."""
    server.faults, server.log, server.part_size = [], [], 1 << 30
    server.repositories, server.lfs = {}, {}
    yield server
    if server.server is None:
        server.start()
    assert not server.leaks, "a token was sent to the host of the files"


_numbers = itertools.count()


@pytest.fixture
def repo() -> str:
    """The name of a repository that no other test uses."""
    return f"somebody/model-{next(_numbers)}"


def save_tokenizer(folder: Path) -> None:
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=32).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny model with its tokenizer."""
    target = tmp_path / "model"
    tiny_model(FastBertForMaskedLM).save_pretrained(target)
    save_tokenizer(target)
    return target


@pytest.fixture
def shards(tmp_path) -> Path:
    """A tiny model in several files."""
    target = tmp_path / "shards"
    tiny_model(FastBertForMaskedLM).save_pretrained(target, max_shard_size="30KB")
    return target


def change_index(folder: Path, name: object) -> str:
    """Have the index name another file for the first tensor; what it was."""
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    old = index["weight_map"][first]
    index["weight_map"][first] = name
    (folder / INDEX).write_text(json.dumps(index))
    return old


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def published_files(name: str = "mlm-1x3") -> dict[str, bytes]:
    """A repository of the published layout, with a tokenizer of the right size."""
    return {file: (FIXTURES / name / file).read_bytes() for file in ("config.json", "model.safetensors")}


def folder_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
