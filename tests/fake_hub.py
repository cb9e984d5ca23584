"""A Hub on this machine, which speaks to the real client: repositories of models in memory, and failures on demand."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

from ldm.export.card import HUB_LICENCES

TOKEN = "hf_SECRETsecretSECRETsecretSECRETsecre"
DROP = "drop"


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """Message and files of each commit, the newest last."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode(), usedforsecurity=False).hexdigest()


class FakeHub:
    """A server in a thread; a context manager. `url` is what HF_ENDPOINT takes."""

    def __init__(self, role: str = "write"):
        self.role = role
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, list[int | str | None]] = {}
        self.requests: list[str] = []
        self.received: list[bytes] = []
        """Address, headers but the token's, and body of each request."""

    def fail(self, what: str, *how: int | str | None) -> None:
        """Answer the next requests to whoami, create, preupload, lfs or commit with a status, hang up (DROP) or not."""
        self.failures[what] = list(how)

    def serve(self, monkeypatch, folder) -> None:
        """Be the Hub of this process's client, which keeps its files in `folder`."""
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(folder / "no-token"),
            "HF_HUB_CACHE": str(folder / "hub"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # it keeps the Hub that it has first been at
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def __enter__(self) -> "FakeHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # ---- what a request is about ----

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        told = {key: value for key, value in self.headers.items() if key.lower() != "authorization"}
        self.hub.received.append(f"{self.path} {told} ".encode() + body)
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self._for("whoami", self._whoami)
        elif path == "/api/repos/create":
            self._for("create", self._create, json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path.endswith("/info/lfs/objects/batch"):
            self._for("lfs", self._batch, json.loads(body))
        elif parts[0] == "lfs":
            self.hub.objects[parts[1]] = body
            self._send(200, {})
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._model("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._send(404, {"error": f"no such address: {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _for(self, what, answer, *arguments) -> None:
        """Answer, or fail as the test wants; what writes needs the token."""
        planned = self.hub.failures.get(what)
        how = planned.pop(0) if planned else None
        if how == DROP:
            self.close_connection = True
        elif how is not None:
            self._send(how, {"error": f"planned failure of {what}; you sent {self.headers.get('Authorization')}"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        else:
            answer(*arguments)

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            self._for("preupload", self._preupload, repository, json.loads(body))
        elif rest[:1] == ["commit"]:
            self._for("commit", self._commit, name, repository, body)
        elif rest[:1] == ["tree"]:
            self._send(200, [self._entry(path, content) for path, content in repository.files.items()])
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            self._send(200, {"id": name, "sha": repository.sha, "siblings": siblings, "private": repository.private})

    # ---- answers ----

    def _whoami(self) -> None:
        self._send(200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": self.hub.role}}})

    def _create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}"}
        if asked["organization"] != "me":
            self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", **answer})
        else:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.repositories[name] = Repository(private)
            self._send(200, answer)

    def _validate(self, content: str) -> None:
        """Refuse what the Hub refuses of our cards: a licence it does not know, results without their parts."""
        data = yaml.safe_load(content.split("---")[1])
        wrong = [] if data.get("license") in {None, "other", *HUB_LICENCES} else [f"license: {data['license']}"]
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys() or "type" not in result["dataset"]:
                    wrong.append(f"model-index: {result}")
        self._send(400 if wrong else 200, {"errors": [{"message": what} for what in wrong], "warnings": []})

    def _preupload(self, repository: Repository, asked: dict[str, list[dict[str, str]]]) -> None:
        answer = []
        for path in (file["path"] for file in asked["files"]):
            known = {"oid": self._entry(path, repository.files[path])["oid"]} if path in repository.files else {}
            answer.append({"path": path, "uploadMode": _mode(path), "shouldIgnore": False, **known})
        self._send(200, {"files": answer})

    def _batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
        repository.commits.append((lines[0]["value"]["summary"], files))
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha})

    def _resolve(self, name: str, path: str) -> None:
        repository = self.hub.repositories[name]
        commit = {"X-Repo-Commit": repository.sha}
        if path in repository.files:
            etag = self._entry(path, repository.files[path])["oid"]
            self._send(200, repository.files[path], {**commit, "ETag": f'"{etag}"'})
        else:
            self._send(404, {"error": "Entry not found"}, {**commit, "X-Error-Code": "EntryNotFound"})

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        """What the Hub says of a file: its id is git's, or of a large file the SHA-256."""
        if _mode(path) == "lfs":
            oid = hashlib.sha256(content).hexdigest()
            large = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}}
            return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}
        blob = f"blob {len(content)}\0".encode() + content
        oid = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"
