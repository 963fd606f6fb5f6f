"""A small Hugging Face Hub on this machine: the real client reads data sets from it, and pushes models to it."""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """`datasets[name][revision]` are the files of a data set, path -> bytes. A context manager, with `url` while it runs.

    `refusals` are answers by the beginning of a path: (status, X-Error-Code). `asked` lists "METHOD path" of every request.
    """

    def __init__(self):
        self.datasets, self.refusals, self.asked = {}, {}, []
        self.repos, self.commits = {}, []  # pushed: id -> what was asked for it; (id, message, {path: bytes})
        self.models = {}  # the files of pushed repositories: id -> {path: bytes}

    def add(self, name, files, *, revision="main"):
        self.datasets.setdefault(name, {})[revision] = files
        return commit_of(files)

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, self.command)

            do_HEAD = do_POST = do_GET

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, method):
        path = urllib.parse.unquote(request.path.partition("?")[0])
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.asked.append(f"{method} {path}")
        for beginning, (status, code) in self.refusals.items():
            if path.startswith(beginning):
                return self._send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
        if path.startswith("/api/datasets/"):
            return self._describe(request, path.removeprefix("/api/datasets/"))
        if path.startswith("/datasets/"):
            return self._file(request, path.removeprefix("/datasets/"))
        return self._push(request, path, body)

    def _files(self, name, revision):
        """(files, error code) of a revision, by its name or commit."""
        revisions = self.datasets.get(name)
        if revisions is None:
            return None, "RepoNotFound"
        found = [files for key, files in revisions.items() if revision in (key, commit_of(files))]
        return (found[0], "") if found else (None, "RevisionNotFound")

    def _describe(self, request, path):
        name, kind, revision = ["/".join(path.split("/")[:2]), *([*path.split("/", 3)[2:], "", ""][:2])]
        files, code = self._files(name, revision or "main")
        if files is None:
            return self._send(request, 404, b"{}", {"X-Error-Code": code})
        if kind == "tree":
            return self._send(request, 200, _tree(files))
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        return self._send(request, 200, json.dumps({"id": name, "sha": commit_of(files), "siblings": siblings}).encode())

    def _file(self, request, path):
        name, (_, commit, file) = "/".join(path.split("/")[:2]), path.split("/", 4)[2:]
        files, code = self._files(name, commit)
        if files is None or file not in files:
            return self._send(request, 404, b"", {"X-Error-Code": code or "EntryNotFound"})
        return self._send(request, 200, files[file], {"X-Repo-Commit": commit, "ETag": f'"{digest(files[file])}"'})

    def _push(self, request, path, body):
        if "authorization" not in {name.lower() for name in request.headers}:
            return self._send(request, 401, b'{"error": "Invalid credentials"}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, asked)
            return self._send(request, 200, json.dumps({"url": f"{self.url}/{name}"}).encode())
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self._send(request, 200, json.dumps({"files": files}).encode())
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
            }
            self.commits.append((name, lines[0]["value"]["summary"], files))
            model = self.models.setdefault(name, {})
            for line in lines:
                if line["key"] == "deletedFile":
                    del model[line["value"]["path"]]
            model.update(files)
            done = {"commitUrl": f"{self.url}/{name}/commit/{commit_of(files)}", "commitOid": commit_of(files)}
            return self._send(request, 200, json.dumps(done).encode())
        if request.command == "GET" and name not in self.repos:
            return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            return self._send(request, 200, _tree(self.models.get(name, {})))
        return self._send(request, 200, json.dumps({"id": name}).encode())

    def _send(self, request, status, body, headers=None):
        with contextlib.suppress(ConnectionError):
            request.send_response(status)
            for header, value in {"Content-Length": len(body), "Content-Type": "application/json", **(headers or {})}.items():
                request.send_header(header, str(value))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(body)


def _tree(files):
    entries = [{"type": "file", "path": name, "size": len(data), "oid": digest(data)} for name, data in files.items()]
    return json.dumps(entries).encode()


def digest(data):
    return hashlib.sha1(data).hexdigest()


def commit_of(files):
    return digest(repr(sorted(files.items())).encode())


@contextlib.contextmanager
def online(monkeypatch, cache, url):
    """The client of this process talks to the Hub at `url` and keeps what it gets in `cache`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
