"""A Hub on this machine: the endpoints that the huggingface_hub client uses, over real HTTP, in threads.

Repositories live in memory. Large files are served under another host name (localhost in place of 127.0.0.1), as the
real Hub does, so that a client which sends its token there is found out. `fail` makes requests go wrong.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer

from tests.hub.loopback_http import Handler

OWNER, READER, STRANGER, YOU = (f"hf_{letter * 34}" for letter in "orsy")
USERS = {
    OWNER: ("somebody", "write"),
    READER: ("somebody", "read"),
    STRANGER: ("stranger", "write"),
    YOU: ("you", "write"),
}


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git(self) -> str:
        data = self.content
        if self.lfs:
            version = "https://git-lfs.github.com/spec/v1"
            data = f"version {version}\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git


@dataclass
class Repository:
    name: str
    private: bool = False
    commits: list[tuple[str, str, dict[str, Blob]]] = field(default_factory=list)  # (sha, title, files)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], title: str, branch: str = "main") -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append((sha, title, files))
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if any(sha == known for known, _, _ in self.commits) else None

    def files(self, revision: str) -> dict[str, Blob]:
        sha = self.resolve(revision)
        return next(files for known, _, files in self.commits if known == sha)


@dataclass
class Fault:
    """Something that goes wrong for the next `times` requests that match."""

    method: str
    pattern: str
    kind: str | int  # a status, "cut" (half an answer, then the connection closes) or "corrupt" (a byte changed)
    times: int = 1
    after: int = 0  # matching requests that go well first


class LoopbackHub:
    """The server and what it holds. Tests add repositories and faults, and read `log`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size = 1 << 30
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []  # method, path, status
        self.leaks: list[str] = []  # requests that took a token to the file host
        self.lock = threading.RLock()
        self.connections: list[socket.socket] = []
        self.server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def file_host(self) -> str:
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        ThreadingHTTPServer.allow_reuse_address = True
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), BoundHandler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        for connection in self.connections:  # also those that clients keep open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository as an earlier push left it."""
        blobs = {path: Blob(content, path.endswith((".safetensors", ".bin"))) for path, content in files.items()}
        repository = self.repositories.setdefault(name, Repository(name, private))
        repository.commit(blobs, "made by the test")
        self.lfs.update({blob.sha256: blob.content for blob in blobs.values() if blob.lfs})
        return repository

    def fail(self, method: str, pattern: str, kind: str | int, times: int = 1, after: int = 0) -> None:
        self.faults.append(Fault(method, pattern, kind, times, after))

    def fault(self, method: str, path: str) -> str | int | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.kind
        return None

    def requests(self, method: str, pattern: str) -> list[str]:
        """Paths of the requests so far."""
        return [path for known, path, _ in self.log if known == method and re.search(pattern, path)]

    def visible(self, name: str, token: str | None) -> Repository | None:
        repository = self.repositories.get(name)
        user = USERS.get(token or "", ("", ""))[0]
        allowed = repository is not None and (not repository.private or name.startswith(f"{user}/"))
        return repository if allowed else None

    # --- what the endpoints do; each returns (status, answer)

    def create(self, payload: dict, token: str | None) -> tuple[int, dict]:
        user, role = USERS[token or ""]
        name = f"{payload.get('organization') or user}/{payload['name']}"
        if role == "read" or not name.startswith(f"{user}/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        answer = {"url": f"{self.url}/{name}", "name": name, "id": "0"}
        if name in self.repositories:
            return 409, {**answer, "error": "You already created this model repo"}
        private = bool(payload.get("private")) or payload.get("visibility") == "private"
        repository = self.repositories[name] = Repository(name, private)
        repository.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return 200, answer

    def preupload(self, repository: Repository, revision: str, payload: dict) -> tuple[int, dict]:
        files = repository.files(revision)
        stored = files[".gitignore"].content.decode() if ".gitignore" in files else ""
        ignored = (payload.get("gitIgnore") or stored).split()
        answers = []
        for entry in payload["files"]:
            path, known = entry["path"], files.get(entry["path"])
            large = path.endswith((".safetensors", ".bin")) or entry["size"] > 1_000_000
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                    "oid": known.etag if known else None,
                }
            )
        return 200, {"files": answers}

    def batch(self, repository: Repository, payload: dict) -> tuple[int, dict]:
        objects = []
        for entry in payload["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.lfs:
                header, href = {}, f"{self.file_host}/upload/{entry['oid']}"
                if entry["size"] > self.part_size:
                    count = -(-entry["size"] // self.part_size)
                    header = {str(n): f"{href}/{n}" for n in range(1, count + 1)}
                    header["chunk_size"] = str(self.part_size)
                    href = f"{self.url}/complete/{entry['oid']}"
                verify = {"href": f"{self.url}/{repository.name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repository: Repository, revision: str, lines: list[dict], pull: bool) -> tuple[int, dict]:
        header, *operations = lines
        parent = header["value"].get("parentCommit")
        if parent not in (None, repository.resolve(revision)):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        files = dict(repository.files(revision))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    return 400, {"error": f"LFS object {value['oid']} was never uploaded"}
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                return 404, {"error": "A file with this name doesn't exist"}
        branch = f"refs/pr/{len(repository.branches)}" if pull else revision
        sha = repository.commit(files, header["value"]["summary"], branch)
        answer = {"commitOid": sha, "commitUrl": f"{self.url}/{repository.name}/commit/{sha}", "success": True}
        if pull:
            answer["pullRequestUrl"] = f"{self.url}/{repository.name}/discussions/{branch.rpartition('/')[2]}"
        return 200, answer

    def listing(self, repository: Repository, revision: str) -> list[dict]:
        entries = []
        for path, blob in sorted(repository.files(revision).items()):
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def info(self, repository: Repository, revision: str) -> dict:
        siblings = [{"rfilename": path} for path in sorted(repository.files(revision))]
        base = {"id": repository.name, "modelId": repository.name, "private": repository.private, "tags": []}
        return {**base, "sha": repository.resolve(revision), "siblings": siblings, "downloads": 0, "likes": 0}


def read_lines(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.splitlines() if line.strip()]
