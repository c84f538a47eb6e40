"""A stand-in for the Hugging Face Hub: enough of its HTTP API to make, fill, list and read model repositories.

It keeps what it receives, checks the hash of every upload and that a commit names only files that have arrived, and
fails on demand. Reference: the requests that `huggingface_hub` sends (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`).
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_" + "DoubleOfTheHub" * 3
OWNER = "me"


@dataclass
class Repository:
    """Branches of commits; a commit is the whole tree: path -> content."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and tree of a branch or commit."""
        numbers = {self.name_of(number): number for number in range(len(self.commits))} | self.branches
        number = numbers.get(revision)
        return None if number is None else (self.name_of(number), self.commits[number])

    @staticmethod
    def name_of(number: int) -> str:
        return hashlib.sha1(b"commit %d" % number).hexdigest()


class HubDouble(ThreadingHTTPServer):
    """Serves on a free local port within a `with` block.

    Attributes:
        repositories: id -> what it holds.
        stored: sha256 -> content that was uploaded through git-LFS.
        requests: method and path of everything that was asked.
        drops: number of uploads to cut in the middle.
        conflicts: number of commits to refuse with 409.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drops = self.conflicts = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The tree of a repository."""
        return self.repositories[repo_id].at(revision)[1]

    def handle_error(self, request, client_address):
        """A client that goes away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubDouble

    def log_message(self, *args):
        pass

    # ---- plumbing ----

    def answer(self, status: int, content=None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})
        self.answer(status, {"error": message}, {name: value for name, value in named.items() if value})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.body()
        self.refuse(401, "", "Invalid username or password.")
        return False

    # ---- routes ----

    def route(self) -> None:
        address = urlsplit(self.path)
        path = [unquote(part) for part in address.path.strip("/").split("/")]
        query = parse_qs(address.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {address.path}")
        if self.command in ("GET", "HEAD"):
            if path[:2] == ["api", "models"]:
                return self.describe("/".join(path[2:4]), path[4:])
            if len(path) > 3 and path[2] == "resolve":
                return self.resolve("/".join(path[:2]), path[3], "/".join(path[4:]))
            return self.refuse(404, "", "Not found")
        if self.command == "PUT" and path[0] == "lfs":  # as to S3: the address is the permission
            return self.upload(path[1])
        if path == ["api", "validate-yaml"]:
            return self.validate(json.loads(self.body()))
        if not self.allowed():
            return None
        if path == ["api", "repos", "create"]:
            return self.create(json.loads(self.body()))
        if path[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(json.loads(self.body()))
        repo_id = "/".join(path[2:4])
        if repo_id not in self.server.repositories:
            self.body()
            return self.refuse(404, "RepoNotFound", "Repository not found")
        action = {"preupload": self.preupload, "commit": self.commit, "branch": self.branch}[path[4]]
        return action(self.server.repositories[repo_id], "/".join(path[5:]), query)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def create(self, wanted: dict) -> None:
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.server.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        return self.answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def branch(self, repository: Repository, name: str, query: dict) -> None:
        self.body()
        if name in repository.branches:
            return self.refuse(409, "", "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        return self.answer(200)

    def validate(self, wanted: dict) -> None:
        """What the Hub checks of a card before it takes it."""
        text = wanted["content"]
        errors = []
        try:
            data = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
            if not isinstance(data.get("tags", []), list):
                errors.append({"message": "tags must be an array"})
            for model in data.get("model-index", []):
                for result in model["results"]:
                    if not {"task", "dataset", "metrics"} <= set(result):
                        errors.append({"message": "model-index result lacks a part"})
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            errors.append({"message": str(error)})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repository: Repository, revision: str, query: dict) -> None:
        files = []
        for file in json.loads(self.body())["files"]:
            large = file["path"].endswith((".safetensors", ".bin")) or file["size"] > 10 * 2**20
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def batch(self, wanted: dict) -> None:
        objects = []
        for asked in wanted["objects"]:
            found = dict(asked)
            if asked["oid"] not in self.server.stored:
                found["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
            objects.append(found)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        with self.server.lock:
            drop = self.server.drops > 0
            self.server.drops -= drop
        if drop:
            self.rfile.read(64)
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "", "Content does not match its hash")
        self.server.stored[oid] = content
        return self.answer(200)

    def commit(self, repository: Repository, revision: str, query: dict) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        with self.server.lock:
            if self.server.conflicts:
                self.server.conflicts -= 1
                return self.refuse(409, "", "The branch has moved on")
            if revision not in repository.branches:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            tree = dict(repository.commits[repository.branches[revision]])
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if len(self.server.stored.get(value["oid"], b"")) != value["size"]:
                        return self.refuse(400, "", "LFS pointer points to a file that does not exist")
                    tree[value["path"]] = self.server.stored[value["oid"]]
                elif tree.pop(value["path"], None) is None:
                    return self.refuse(404, "EntryNotFound", "A file with this name doesn't exist")
            repository.commits.append(tree)
            repository.messages.append(message)
            number, request = len(repository.commits) - 1, None
            if query.get("create_pr"):
                request = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
                revision = f"refs/pr/{request}"
            repository.branches[revision] = number
        url = "/".join([self.server.url, *self.path.split("/")[3:5]])
        answer = {"commitUrl": f"{url}/commit/{repository.name_of(number)}", "commitOid": repository.name_of(number)}
        return self.answer(200, answer | ({"pullRequestUrl": f"{url}/discussions/{request}"} if request else {}))

    def describe(self, repo_id: str, rest: list[str]) -> None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        kind = rest[0] if rest else "revision"
        found = repository.at(rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        name, tree = found
        if kind == "tree":
            below = "/".join(rest[2:])
            if below and not any(path.startswith(f"{below}/") for path in tree):
                return self.refuse(404, "EntryNotFound", "Entry not found")
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in tree.items()
                if path.startswith(below)
            ]
            return self.answer(200, entries)
        siblings = [{"rfilename": path} for path in tree]
        return self.answer(200, {"id": repo_id, "modelId": repo_id, "sha": name, "siblings": siblings, "tags": []})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        found = repository.at(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        name, tree = found
        headers = {"X-Repo-Commit": name}
        if path not in tree:
            return self.refuse(404, "EntryNotFound", "Entry not found", headers)
        return self.answer(200, tree[path], headers | {"ETag": f'"{hashlib.sha256(tree[path]).hexdigest()}"'})
