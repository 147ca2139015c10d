"""A small Hugging Face Hub on the loopback interface, to which the real huggingface_hub uploads and downloads.

Repositories with commits, branches, pull requests and visibility; users with tokens and roles; files in git or in LFS,
in one part or several, or in the storage of the Xet protocol. Everything is kept in memory. `Hub.on` adds a fault: an
error status, a dropped connection, a pause, or any function that a test wants to run at that moment.

    with Hub() as hub:
        hub.on("PUT", "/lfs/", answer(503), times=2)
        ...  # run a client with HF_ENDPOINT=hub.url
        assert hub.count("PUT", "/lfs/") == 3
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .xet_storage import Storage


TOKEN = "hf_thisMustNeverBePrinted"
XET_TOKEN = "xet_shortLived"


@dataclass
class User:
    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()


@dataclass
class File:
    """A file of a commit: its content in git, or the hash of an LFS object."""

    content: bytes | None = None
    lfs: str | None = None


@dataclass
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)  # branches and refs/pr/N

    def commit(self, branch: str, title: str, files: dict[str, File], parent: str | None) -> str:
        named = {path: (file.lfs or hashlib.sha1(file.content or b"").hexdigest()) for path, file in files.items()}
        seed = json.dumps([title, parent, len(self.commits), sorted(named.items())])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, files)
        self.heads[branch] = oid
        return oid


class Answer(Exception):
    """Ends a request with a status, and with the Hub's error headers and body."""

    def __init__(self, status: int, message: str = "", code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message or f"error {status}", code


class Dropped(Exception):
    """Ends a request by closing the connection."""


def answer(status: int, message: str = "", code: str | None = None) -> Callable[["Request"], None]:
    """A fault: an error status."""

    def act(request: "Request") -> None:
        request.body()
        raise Answer(status, message, code)

    return act


def reply(content: Any, headers: dict[str, str] | None = None) -> Callable[["Request"], None]:
    """A fault: 200, with any content."""

    def act(request: "Request") -> None:
        request.body()
        request.send(content, headers=headers)
        raise Dropped

    return act


def drop(after: int = 0) -> Callable[["Request"], None]:
    """A fault: the connection closes after `after` bytes of the request's body, at the latest after half of it."""

    def act(request: "Request") -> None:
        request.rfile.read(min(after, int(request.headers.get("Content-Length") or 0) // 2))
        raise Dropped

    return act


def lose_answer(request: "Request") -> None:
    """A fault: the request takes effect, but the connection closes before the answer."""
    request.lost = True


class Hold:
    """A fault: the request blocks. It sets `reached`, and is dropped once the test sets `release`."""

    def __init__(self) -> None:
        self.reached, self.release = threading.Event(), threading.Event()

    def __call__(self, request: "Request") -> None:
        self.reached.set()
        self.release.wait(120)
        raise Dropped


@dataclass
class _Fault:
    method: str
    path: re.Pattern
    act: Callable[["Request"], None]
    times: int


class Hub:
    """The server; a context manager that runs it in a thread."""

    def __init__(self, part_bytes: int | None = None) -> None:
        self.part_bytes = part_bytes  # LFS objects above this size are uploaded in several parts
        self.users: dict[str, User] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by SHA-256
        self.storage = Storage()  # the same, as far as they were sent by Xet
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[tuple[str, str]] = []  # method and path of every request
        self.faults: list[_Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundRequest", (Request,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def on(self, method: str, path: str, act: Callable[["Request"], None], times: int = 1) -> None:
        """Run `act` on the next `times` requests whose path (query included) matches the regular expression `path`."""
        with self.lock:
            self.faults.append(_Fault(method, re.compile(path), act, times))

    def count(self, method: str, path: str) -> int:
        """The number of such requests since the log was last cleared."""
        with self.lock:
            return sum(m == method and re.search(path, p) is not None for m, p in self.log)

    def add_repository(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        """A repository as created on the Hub's web page, optionally with more files."""
        repository = self.repositories[repo_id] = Repository(private)
        tree = {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        tree |= {path: File(content) for path, content in (files or {}).items()}
        repository.commit("main", "initial commit", tree, None)
        return repository

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The content of a file."""
        repository = self.repositories[repo_id]
        file = repository.commits[repository.heads.get(revision, revision)].files[path]
        return self.objects[file.lfs] if file.lfs else file.content or b""

    def take_fault(self, method: str, path: str) -> Callable[["Request"], None] | None:
        with self.lock:
            self.log.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault.act
        return None


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Request(BaseHTTPRequestHandler):
    """One connection. `ROUTES`, at the end, maps requests to methods."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    user: User | None = None
    lost = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        """The request's body, read once."""
        if self._body is None:
            self._body = self._read_body()
        return self._body

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            if len(content) < length:
                raise Dropped  # the client was killed
            return content
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json(self) -> Any:
        return json.loads(self.body())

    def send(self, content: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.lost:
            raise Dropped
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        self._body = None
        try:
            if fault := self.hub.take_fault(self.command, self.path):
                fault(self)
            self.body()
            url = urlsplit(self.path)
            self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            self._authenticate()
            for method, pattern, respond in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    with self.hub.lock:
                        return respond(self, **{name: unquote(text) for name, text in match.groupdict("").items()})
            raise Answer(404, f"no such endpoint: {self.command} {url.path}")
        except Answer as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self.send({"error": error.message}, error.status, headers)
        except (Dropped, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _authenticate(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == XET_TOKEN:  # of the storage, which knows no users
            return
        self.user = self.hub.users.get(token)
        if token and self.user is None:
            raise Answer(401, "Invalid credentials in Authorization header")

    def _repository(self, repo: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo)
        namespace = repo.split("/")[0]
        mine = self.user is not None and namespace in (self.user.name, *self.user.organisations)
        if repository is None or (repository.private and not mine):
            raise Answer(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not (mine and self.user and self.user.role == "write"):
            raise Answer(403, "You don't have the rights to write to this repository")
        return repository

    def _commit(self, repo: str, revision: str) -> Commit:
        repository = self._repository(repo)
        oid = repository.heads.get(revision, revision)
        if oid not in repository.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[oid]

    # Users and repositories

    def whoami(self) -> None:
        if self.user is None:
            raise Answer(401, "Invalid username or password.")
        organisations = [{"name": name} for name in self.user.organisations]
        token = {"displayName": "test", "role": self.user.role}
        self.send({"type": "user", "name": self.user.name, "orgs": organisations, "auth": {"accessToken": token}})

    def create(self) -> None:
        wanted = self.json()
        if self.user is None or self.user.role != "write":
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        namespace = wanted.get("organization") or self.user.name
        if namespace not in (self.user.name, *self.user.organisations):
            raise Answer(404, f"No such namespace: {namespace}")
        repo = f"{namespace}/{wanted['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            return self.send({"error": "You already created this model repo", "url": url}, 409)
        self.hub.add_repository(repo, private=wanted.get("visibility") == "private")
        self.send({"url": url})

    def info(self, repo: str, revision: str = "") -> None:
        commit = self._commit(repo, revision or "main")
        private = self.hub.repositories[repo].private
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send(
            {"id": repo, "modelId": repo, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []}
        )

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        commit = self._commit(repo, revision)
        paths = [path for path in sorted(commit.files) if not folder or path.startswith(folder + "/")]
        if folder and not paths:
            raise Answer(404, f"{folder} does not exist", "EntryNotFound")
        self.send([self._entry(path, commit.files[path]) for path in paths])

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        if file.lfs is None:
            content = file.content or b""
            return {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
        size = len(self.hub.objects[file.lfs])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.lfs}\nsize {size}\n".encode()
        lfs = {"oid": file.lfs, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "size": size, "oid": _git_sha1(pointer), "lfs": lfs}

    def paths_info(self, repo: str, revision: str) -> None:
        files = self._commit(repo, revision).files
        wanted = self.json()["paths"]
        self.send([self._entry(path, files[path]) for path in wanted if path in files])

    def commits(self, repo: str, revision: str) -> None:
        known, commit, found = self._repository(repo).commits, self._commit(repo, revision), []
        while commit:
            entry = {"id": commit.oid, "title": commit.title, "message": "", "authors": []}
            found.append({**entry, "date": "2024-01-01T00:00:00.000Z"})
            commit = known[commit.parent] if commit.parent else None
        self.send(found)

    def branch(self, repo: str, name: str) -> None:
        repository = self._repository(repo, write=True)
        if name in repository.heads:
            raise Answer(409, "Reference already exists")
        repository.heads[name] = self._commit(repo, self.json().get("startingPoint") or "main").oid
        self.send({})

    # Uploads

    def validate_yaml(self) -> None:
        front = re.match(r"\A---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        if front is None or not re.search(r"^license: ", front.group(1), re.MULTILINE):
            return self.send({"errors": [{"message": '"license" is required'}], "warnings": []}, 400)
        self.send({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self._repository(repo, write=not self.query.get("create_pr"))
        files = self._commit(repo, revision).files
        self.send({"files": [self._mode(wanted["path"], files) for wanted in self.json()["files"]]})

    def _mode(self, path: str, files: dict[str, File]) -> dict[str, Any]:
        mode = "lfs" if path.endswith((".safetensors", ".model", ".bin")) else "regular"
        found = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in files:
            found["oid"] = files[path].lfs or _git_sha1(files[path].content or b"")
        return found

    def batch(self, repo: str) -> None:
        self._repository(repo)
        self.send({"transfer": "basic", "objects": [self._object(wanted) for wanted in self.json()["objects"]]})

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size, url = wanted["oid"], wanted["size"], self.hub.url
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{url}/lfs/{oid}"}
        if self.hub.part_bytes and size > self.hub.part_bytes:
            count = -(-size // self.hub.part_bytes)
            header = {str(n): f"{url}/lfs/{oid}/{n}" for n in range(1, count + 1)}
            upload = {
                "href": f"{url}/lfs/{oid}/complete",
                "header": {"chunk_size": str(self.hub.part_bytes), **header},
            }
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{url}/lfs/{oid}/verify"}}}

    def put(self, oid: str, part: str = "") -> None:
        if part:
            self.hub.parts[oid, int(part)] = self.body()
        else:
            self._store(oid, self.body())
        self.send(b"", headers={"ETag": f'"{hashlib.md5(self.body()).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in self.json()["parts"]]
        self._store(oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        self.send({})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Answer(400, "The content does not have the announced hash")
        self.hub.objects[oid] = content

    def verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != self.json()["size"]:
            raise Answer(404, "No such object")
        self.send({})

    def commit(self, repo: str, revision: str) -> None:
        pull_request = "create_pr" in self.query
        repository = self._repository(repo, write=not pull_request)
        parent = self._commit(repo, revision)
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent.oid):
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = File(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.hub.objects:
                    raise Answer(400, f"{path} points to an LFS object that was never uploaded")
                files[path] = File(lfs=line["value"]["oid"])
            elif files.pop(path, None) is None:
                raise Answer(404, "A file with this name doesn't exist", "EntryNotFound")
        number = sum(name.startswith("refs/pr/") for name in repository.heads) + 1
        branch = f"refs/pr/{number}" if pull_request else revision
        oid = repository.commit(branch, header["summary"], files, parent.oid)
        url = f"{self.hub.url}/{repo}"
        made = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "success": True}
        self.send({**made, **({"pullRequestUrl": f"{url}/discussions/{number}"} if pull_request else {})})

    # The storage, in the Xet protocol

    def xet_token(self, repo: str, revision: str, kind: str) -> None:
        self._repository(repo, write=kind == "write" and "create_pr" not in self.query)
        token = {"accessToken": XET_TOKEN, "exp": int(time.time()) + 3600, "casUrl": self.hub.url}
        names = {"accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration", "casUrl": "X-Xet-Cas-Url"}
        self.send(token, headers={names[name]: str(value) for name, value in token.items()})

    def xorb(self, hash: str) -> None:
        self.hub.storage.xorbs[hash] = self.body()
        self.send({"was_inserted": True})

    def shard(self) -> None:
        try:
            self.hub.objects |= self.hub.storage.add_shard(self.body())
        except (ValueError, KeyError) as error:
            raise Answer(400, f"bad shard: {error}") from error
        self.send(b'{"type": "result", "result": 1}\n')

    def telemetry(self) -> None:
        self.send({})

    def reconstruction(self, hash: str) -> None:
        if hash not in self.hub.storage.files:
            raise Answer(404, "No such file")
        self.send(self.hub.storage.reconstruction(hash, f"{self.hub.url}/xorbs"))

    def xorb_bytes(self, hash: str) -> None:
        self._send_range(self.hub.storage.xorbs[hash])

    # Downloads

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        content = self.hub.objects[file.lfs] if file.lfs else file.content or b""
        etag = f'"{file.lfs or _git_sha1(content)}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        if file.lfs in self.hub.storage.ids:
            route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self.hub.storage.ids[file.lfs], "X-Xet-Refresh-Route": route}
        self._send_range(content, headers)

    def _send_range(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            part = {"Content-Range": f"bytes {start}-{stop}/{len(content)}"}
            return self.send(content[start : stop + 1], 206, {**(headers or {}), **part})
        self.send(content, headers=headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+|refs/pr/\d+)"
_OID = r"(?P<oid>[0-9a-f]{64})"
_HASH = r"(?P<hash>[0-9a-f]{64})"
ROUTES = [
    ("GET", "/api/whoami-v2", Request.whoami),
    ("POST", "/api/repos/create", Request.create),
    ("POST", "/api/validate-yaml", Request.validate_yaml),
    ("GET", f"/api/models/{_REPO}", Request.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", Request.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?:/(?P<folder>.+))?", Request.tree),
    ("GET", f"/api/models/{_REPO}/commits/{_REV}", Request.commits),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REV}", Request.paths_info),
    ("POST", f"/api/models/{_REPO}/branch/(?P<name>[^/]+)", Request.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", Request.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", Request.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Request.batch),
    ("PUT", f"/lfs/{_OID}(?:/(?P<part>[0-9]+))?", Request.put),
    ("POST", f"/lfs/{_OID}/complete", Request.complete),
    ("POST", f"/lfs/{_OID}/verify", Request.verify),
    ("GET", f"/api/models/{_REPO}/xet-(?P<kind>read|write)-token/{_REV}", Request.xet_token),
    ("POST", f"/v1/xorbs/default/{_HASH}", Request.xorb),
    ("POST", "/v2/shards", Request.shard),
    ("POST", "/v1/telemetry", Request.telemetry),
    ("GET", f"/v1/reconstructions/{_HASH}", Request.reconstruction),
    ("GET", f"/xorbs/{_HASH}", Request.xorb_bytes),
    ("GET", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", Request.resolve),
    ("HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", Request.resolve),
]


def environment(hub: Hub, home: Path, transfer: str) -> dict[str, str]:
    """What a process needs to talk to this Hub and to nothing else; `transfer` of large files is by "xet" or "lfs"."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    by = {"HF_XET_XORB_COMPRESSION_POLICY": "none"} if transfer == "xet" else {"HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **settings, **by, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
