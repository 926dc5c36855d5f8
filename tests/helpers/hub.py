"""A small hub on loopback: what huggingface_hub asks of the real one, answered from folders."""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Shelf:
    """One repository: a folder for each revision."""

    folders: dict = field(default_factory=dict)  # revision -> folder
    token: str | None = None  # whoever has none is told that there is no such model
    gated: bool = False  # everybody may look, nobody may fetch

    def commit(self, revision):
        return hashlib.sha1(str(self.folders[revision]).encode()).hexdigest()  # the same folder is the same commit

    def folder(self, revision):
        """The folder of a revision or commit; None if there is none."""
        by_commit = {self.commit(name): folder for name, folder in self.folders.items()}
        return self.folders.get(revision) or by_commit.get(revision)


class Hub:
    """The server; a context manager."""

    def __init__(self):
        self.shelves = {}
        self.requests = []  # (method, path, range) in the order of arrival
        self.cuts = {}  # file name -> bytes after which its next answer breaks off
        self.holds = {}  # file name -> event for which its answers wait
        self.delays = {}  # file name -> seconds before its answers
        self.failures = {}  # file name -> how often its download still fails
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, folder, revision="main", **more):
        shelf = self.shelves.setdefault(name, Shelf(**more))
        shelf.folders[revision] = Path(folder)
        return name

    def fetched(self, suffix="", whole=True):
        """Names of the files that were sent, in order; whole: those that were not just looked into."""
        found = []
        for method, path, wanted in self.requests:
            if method == "GET" and "/resolve/" in path and path.endswith(suffix):
                looked_into = wanted is not None and wanted.startswith("bytes=0-")
                if not (whole and looked_into):
                    found.append(path.split("/", 3)[1] + "/" + path.split("/")[2] + "/" + path.rsplit("/", 1)[1])
        return found

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for event in self.holds.values():
            event.set()
        self.server.shutdown()
        self.server.server_close()

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # an answer is sent in parts, none of which shall wait for the one before

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                path = urlsplit(self.path).path
                hub.requests.append((self.command, unquote(path), self.headers.get("Range")))
                parts = [unquote(part) for part in path.strip("/").split("/")]
                if parts[:2] == ["api", "models"]:
                    self.answer_api("/".join(parts[2:4]), parts[4:])
                elif "resolve" in parts:
                    self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
                else:
                    self.refuse(404, "RepoNotFound")

            def refuse(self, status, code=None):
                self.send(json.dumps({"error": code}).encode(), status, {"X-Error-Code": code} if code else {})

            def send(self, content, status=200, headers=None, cut=None):
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **(headers or {})}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[:cut])
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()

            def open_shelf(self, name, revision):
                """The folder that is asked for, or None if that was answered with a refusal."""
                shelf = hub.shelves.get(name)
                if shelf is None or (shelf.token and self.headers.get("Authorization") != f"Bearer {shelf.token}"):
                    return self.refuse(401, "RepoNotFound")
                folder = shelf.folder(revision)
                return self.refuse(404, "RevisionNotFound") if folder is None else folder

            def answer_api(self, name, rest):
                revision = rest[1] if rest else "main"
                folder = self.open_shelf(name, revision)
                if folder is None:
                    return
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
                if rest and rest[0] == "tree":
                    found = [{"type": "file", "path": n, "size": size, "oid": etag(n)} for n, size in sizes.items()]
                else:
                    shelf = hub.shelves[name]
                    commit = next(shelf.commit(r) for r in shelf.folders if shelf.folders[r] == folder)
                    siblings = [{"rfilename": n, "size": size, "blobId": etag(n)} for n, size in sizes.items()]
                    found = {"id": name, "sha": commit, "siblings": siblings, "gated": shelf.gated}
                self.send(json.dumps(found).encode(), headers={"Content-Type": "application/json"})

            def answer_file(self, name, revision, file):
                folder = self.open_shelf(name, revision)
                if folder is None:
                    return
                short = file.rsplit("/", 1)[-1]
                if hub.shelves[name].gated:
                    return self.refuse(403, "GatedRepo")
                if not (folder / file).is_file():
                    return self.refuse(404, "EntryNotFound")
                content = (folder / file).read_bytes()
                shelf = hub.shelves[name]
                commit = next(shelf.commit(r) for r in shelf.folders if shelf.folders[r] == folder)
                headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                wanted, status = self.headers.get("Range"), 200
                looked_into = wanted is not None and wanted.startswith("bytes=0-")
                if wanted is not None:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    end = min(int(last) + 1 if last else len(content), len(content))
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                    content, status = content[int(first) : end], 206
                cut = None
                if self.command == "GET" and not looked_into:
                    if hub.failures.get(short):
                        hub.failures[short] -= 1
                        return self.refuse(500)
                    time.sleep(hub.delays.get(short, 0))
                    if short in hub.holds:
                        hub.holds[short].wait(60)
                    cut = hub.cuts.pop(short, None)
                self.send(content, status, headers, cut)

        return Handler


def etag(name):
    return hashlib.sha1(name.encode()).hexdigest()
