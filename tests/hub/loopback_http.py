"""The HTTP side of the loopback Hub: routes, tokens, ranges, redirects and faults."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

NAME = r"(?P<repo>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None  # set by the server

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: bytes | dict | list = b"", headers: dict | None = None, cut: bool = False):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.hub.log.append((self.command, unquote(self.path), status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def refuse(self, status: int, code: str, message: str):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def route(self):
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path)
        if isinstance(fault, int):
            self.body()
            return self.answer(fault, {"error": "the loopback Hub was told to fail"})
        if self.headers["Host"].startswith("localhost"):
            return self.file_host(path, fault)
        from tests.hub.loopback import USERS

        if self.token is not None and self.token not in USERS:
            self.body()
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        with self.hub.lock:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return getattr(self, action)(**match.groupdict())
        self.body()
        return self.answer(404, {"error": f"no such page: {path}"})

    # --- the host of large files

    def file_host(self, path: str, fault: str | None):
        if self.token is not None:
            self.hub.leaks.append(path)
        kind, _, name = path.strip("/").partition("/")
        if self.command == "PUT" and kind == "upload":
            data = self.body()
            if fault == "cut":
                self.close_connection = True
                return None
            oid, _, part = name.partition("/")
            if part:
                self.hub.parts.setdefault(oid, {})[int(part)] = data
            elif hashlib.sha256(data).hexdigest() == oid:
                self.hub.lfs[oid] = data
            return self.answer(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        if kind == "lfs" and name in self.hub.lfs:
            return self.send_file(self.hub.lfs[name], name, fault)
        return self.answer(404)

    def send_file(self, data: bytes, etag: str, fault: str | None, headers: dict | None = None):
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **(headers or {})}
        if fault == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            return self.answer(206, data[start : stop + 1], headers, fault == "cut")
        return self.answer(200, data, headers, fault == "cut")

    # --- pages of the Hub

    def find(self, repo: str, revision: str | None = None):
        """The repository, if this token may see it and it has the revision; otherwise None, answered."""
        repository = self.hub.visible(repo, self.token)
        if repository is None:
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif revision is not None and repository.resolve(revision) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def may_write(self, repo: str) -> bool:
        from tests.hub.loopback import USERS

        user, role = USERS.get(self.token or "", ("", ""))
        if role == "write" and repo.startswith(f"{user}/"):
            return True
        self.refuse(403, "", "you have read access only")
        return False

    def whoami(self):
        from tests.hub.loopback import USERS

        if self.token is None:
            return self.refuse(401, "", "Invalid username or password.")
        name, role = USERS[self.token]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return self.answer(200, {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": auth})

    def create(self):
        self.answer(*self.hub.create(json.loads(self.body()), self.token))

    def validate_yaml(self):
        content = json.loads(self.body())["content"]
        try:
            header = yaml.safe_load(content.split("---")[1])
            errors = [] if isinstance(header, dict) else [{"message": "the header is no mapping"}]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        self.answer(200 if not errors else 400, {"errors": errors, "warnings": []})

    def model_info(self, repo: str, revision: str = "main"):
        if repository := self.find(repo, revision):
            self.answer(200, self.hub.info(repository, revision))

    def tree(self, repo: str, revision: str):
        if repository := self.find(repo, revision):
            listing, folders = self.hub.listing(repository, revision), {}
            if parse_qs(urlsplit(self.path).query).get("recursive") != ["true"]:
                folders = {e["path"].partition("/")[0] for e in listing if "/" in e["path"]}
                listing = [e for e in listing if "/" not in e["path"]]
            listing += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
            self.answer(200, listing)

    def subfolder(self, repo: str, revision: str, folder: str):
        if repository := self.find(repo, revision):
            listing = [e for e in self.hub.listing(repository, revision) if e["path"].startswith(f"{folder}/")]
            if listing:
                return self.answer(200, listing)
            self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        return None

    def paths_info(self, repo: str, revision: str):
        wanted = parse_qs(self.body().decode()).get("paths", [])
        if repository := self.find(repo, revision):
            self.answer(200, [e for e in self.hub.listing(repository, revision) if e["path"] in wanted])

    def refs(self, repo: str):
        if repository := self.find(repo):
            tables = {"branches": repository.branches, "tags": repository.tags}
            listed = {
                kind: [{"name": n, "ref": f"refs/{n}", "targetCommit": sha} for n, sha in table.items()]
                for kind, table in tables.items()
            }
            self.answer(200, {**listed, "converts": []})

    def branch(self, repo: str, revision: str):
        payload = json.loads(self.body() or b"{}")
        repository = self.find(repo)
        if repository is None or not self.may_write(repo):
            return
        start = repository.resolve(payload.get("startingPoint") or "main")
        known = repository.branches.setdefault(revision, start)
        self.answer(200 if known == start else 409, {"error": "Reference already exists"})

    def tag(self, repo: str, revision: str):
        name = json.loads(self.body())["tag"]
        if (repository := self.find(repo, revision)) and self.may_write(repo):
            repository.tags[name] = repository.resolve(revision)
            self.answer(200, {})

    def preupload(self, repo: str, revision: str):
        payload = json.loads(self.body())
        pull = "create_pr=1" in self.path
        if (repository := self.find(repo, revision)) and (pull or self.may_write(repo)):
            self.answer(*self.hub.preupload(repository, revision, payload))

    def batch(self, repo: str):
        payload = json.loads(self.body())
        if repository := self.find(repo):
            self.answer(*self.hub.batch(repository, payload))

    def verify(self, repo: str):
        payload = json.loads(self.body())
        stored = self.hub.lfs.get(payload["oid"])
        self.answer(200 if stored is not None and len(stored) == payload["size"] else 422, {})

    def complete(self, oid: str):
        payload = json.loads(self.body())
        parts = self.hub.parts.pop(oid, {})
        data = b"".join(parts[part["partNumber"]] for part in payload["parts"])
        right = hashlib.sha256(data).hexdigest() == oid
        if right:
            self.hub.lfs[oid] = data
        self.answer(200 if right else 422, {})

    def commit(self, repo: str, revision: str):
        from tests.hub.loopback import read_lines

        lines = read_lines(self.body())
        pull = "create_pr=1" in self.path
        if (repository := self.find(repo, revision)) and (pull or self.may_write(repo)):
            self.answer(*self.hub.commit(repository, revision, lines, pull))

    def resolve(self, repo: str, revision: str, file: str):
        repository = self.find(repo, revision)
        if repository is None:
            return None
        headers = {"X-Repo-Commit": repository.resolve(revision)}
        blob = repository.files(revision).get(file)
        if blob is None:
            message = "Entry not found"
            codes = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            return self.answer(404, {"error": message}, {**headers, **codes})
        if not blob.lfs:
            fault = self.hub.fault("FILE", file) if self.command == "GET" else None
            return self.send_file(blob.content, blob.git, fault, headers)
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        location = {"Location": f"{self.hub.file_host}/lfs/{blob.sha256}", "ETag": f'"{blob.git}"'}
        return self.answer(302, b"", {**headers, **linked, **location})


API = rf"/api/models/{NAME}"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("POST",), rf"{API}/preupload/{REVISION}", "preupload"),
    (("POST",), rf"{API}/commit/{REVISION}", "commit"),
    (("POST",), rf"{API}/paths-info/{REVISION}", "paths_info"),
    (("POST",), rf"{API}/branch/{REVISION}", "branch"),
    (("POST",), rf"{API}/tag/{REVISION}", "tag"),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/verify", "verify"),
    (("POST",), r"/complete/(?P<oid>\w+)", "complete"),
    (("GET",), rf"{API}/revision/{REVISION}", "model_info"),
    (("GET",), rf"{API}/tree/{REVISION}", "tree"),
    (("GET",), rf"{API}/tree/{REVISION}/(?P<folder>.+)", "subfolder"),
    (("GET",), rf"{API}/refs", "refs"),
    (("GET",), API, "model_info"),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{REVISION}/(?P<file>.+)", "resolve"),
]
