"""A Hugging Face Hub on 127.0.0.1 for tests: the routes that the real client asks, for downloads and uploads."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".npz", ".pth", ".png")


class HubServer:
    """`with HubServer() as hub: hub.add("org/name", {"model.safetensors": b"..."})`.

    `gated` repositories refuse their files; `cut` breaks the next body of a path off after so many bytes; `corrupt`
    paths come with one byte flipped; `sizes` are claimed for paths instead of their own. `requests` are all that came.
    `commits` holds what was uploaded, by repository; `role` is that of the token.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.trees: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.corrupt: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.role = "write"
        self.created: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, files: Mapping[str, bytes | Path], sha: str | None = None, branch: str = "main") -> str:
        """A commit of a repository; its branch points there. Returns the commit."""
        tree = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
        told = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in tree.items()}, sort_keys=True)
        commit = sha or hashlib.sha1((repo + told).encode()).hexdigest()
        self.repos.setdefault(repo, {})[branch] = commit
        self.trees[repo, commit] = tree
        return commit

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a process that asks this server; an empty token is none."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for pattern, route in _ROUTES:
                if (match := re.fullmatch(pattern, path)) is not None:
                    route(self, *match.groups())
                    return
            self._error(404, "EntryNotFound", f"no route {path}")

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        given = dict(headers or {})
        for name, value in ({"Content-Length": str(len(body))} | given).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), told)

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None where it was answered that there is none."""
        if repo not in self.hub.repos:
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        commit = self.hub.repos[repo].get(revision, revision)
        if (repo, commit) not in self.hub.trees:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit

    # -- downloads

    def info(self, repo: str, revision: str | None = None) -> None:
        if (commit := self._commit(repo, revision or "main")) is None:
            return
        files = [{"rfilename": name} for name in self.hub.trees[repo, commit]]
        self._json({"id": repo, "sha": commit, "siblings": files, "private": False, "gated": False, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        if (commit := self._commit(repo, revision)) is None:
            return
        entries = []
        for name, data in self.hub.trees[repo, commit].items():
            size = self.hub.sizes.get(name, len(data))
            entry: dict[str, Any] = {
                "type": "file", "path": name, "size": size, "oid": hashlib.sha1(data).hexdigest(),
            }  # fmt: skip
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def file(self, repo: str, revision: str, name: str) -> None:
        if (commit := self._commit(repo, revision)) is None:
            return
        if repo in self.hub.gated:
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return
        data = self.hub.trees[repo, commit].get(name)
        if data is None:
            self._error(404, "EntryNotFound", f"no {name}", {"X-Repo-Commit": commit})
            return
        digest = hashlib.sha256(data) if name.endswith(LARGE) else hashlib.sha1(data)
        headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        cut = self.hub.cut.pop(name, None) if self.command == "GET" else None
        if asked:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers, cut)
        else:
            self._send(200, data, headers, cut)

    # -- uploads

    def whoami(self) -> None:
        if not (self.headers.get("Authorization") or "").startswith("Bearer x"):
            self._error(401, "", "Invalid user token")
            return
        token = {"accessToken": {"displayName": "t", "role": self.hub.role}, "type": "access_token"}
        self._json({"type": "user", "name": "someone", "auth": token})

    def create(self) -> None:
        asked = json.loads(self.body)
        self.hub.created.append(asked)
        repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if repo in self.hub.repos:
            self._json({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        self.hub.add(repo, {})
        self._json({"url": f"{self.hub.url}/{repo}", "id": repo})

    def validate(self) -> None:
        self._json({"warnings": [], "errors": []})

    def preupload(self, repo: str, revision: str) -> None:
        if self._commit(repo, revision) is None:
            return
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, repo: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        self.hub.blobs[oid] = self.body
        self._send(200, b"")

    def commit(self, repo: str, revision: str) -> None:
        files = self.hub.commits.setdefault(repo, {})
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.add(repo, files, branch=revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_REPO}", _Handler.info),
    (rf"/api/models/{_REPO}/revision/([\w.-]+)", _Handler.info),
    (rf"/api/models/{_REPO}/tree/([\w.-]+)/?", _Handler.tree),
    (rf"/api/models/{_REPO}/preupload/([\w.-]+)", _Handler.preupload),
    (rf"/api/models/{_REPO}/commit/([\w.-]+)", _Handler.commit),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs/(\w+)", _Handler.put),
    (rf"/{_REPO}/resolve/([\w.-]+)/(.+)", _Handler.file),
]
