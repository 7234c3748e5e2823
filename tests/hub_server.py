"""A Hub on loopback, for tests that use the real `huggingface_hub` client by way of `HF_ENDPOINT`.

It stores repos on disk and implements what the client calls: create a repo, validate a card, preupload, LFS batch with
one part or several, commit, tree, info, refs and branches, pull requests, and resolve with a redirect to another
origin, as to a CDN. It refuses what the Hub refuses: writing without a token, reading a private repo, bytes that do
not match their digest, and a parent commit that is not the last one.

The client prefers Xet if `hf_xet` is installed: a protocol between that library's compiled code and a storage service,
which is not implemented here. `HubServer.environment` sets `HF_HUB_DISABLE_XET=1`, and the client then uploads by LFS,
which the Hub still supports.
"""

import base64
import hashlib
import json
import re
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopbackTokenOfTheTests"
OWNER = "me"
LFS = re.compile(r".*\.(safetensors|parquet|png|bin)")  # as a fresh repo's .gitattributes has it, in short
REPO = r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
GIT = r"(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"


class Refusal(Exception):
    """An error response; the client chooses the exception by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class HubServer:
    """`with HubServer(folder) as hub:` serves at `hub.url`; `hub.uploads` lists the digests in the order of arrival.

    Args:
        folder: Where repos and files are stored; a later server can continue with them.
        part_size: Larger LFS files are uploaded in parts of this many bytes.
    """

    def __init__(self, folder: Path, part_size: int = 1 << 40):
        self.folder, self.part_size = folder, part_size
        self.lock, self.uploads, self.requests = threading.RLock(), [], []
        self.waiting, self.released = frozenset(), threading.Event()
        for name in ("files", "parts", "repos"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        port = self._server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return self

    def __exit__(self, *error) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def hold(self, digests) -> None:
        """Let uploads of these digests wait for a response; a file in parts waits from the second part on."""
        self.waiting = frozenset(digests)
        self.released.clear()

    def release(self) -> None:
        """Close the connections that wait, as if broken, and accept every upload from now on."""
        self.waiting = frozenset()
        self.released.set()

    def has(self, digest: str) -> bool:
        return (self.folder / "files" / digest).exists()

    def repo(self, kind: str, name: str) -> dict:
        path = self._path(kind, name)
        return json.loads(path.read_text()) if path.exists() else None

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, dict]:
        repo = self.repo(kind, name)
        return repo["commits"][self.commit(repo, revision)]["files"]

    def read(self, name: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        return (self.folder / "files" / self.files(name, revision, kind)[path]["sha256"]).read_bytes()

    def commits(self, name: str, revision: str = "main", kind: str = "models") -> list[str]:
        """The hashes, newest first, without the commit that created the repo."""
        repo, hashes = self.repo(kind, name), []
        commit = self.commit(repo, revision)
        while commit:
            hashes.append(commit)
            commit = repo["commits"][commit]["parent"]
        return hashes[:-1]

    def commit(self, repo: dict, revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}"):
            if name in repo["refs"]:
                return repo["refs"][name]
        if revision in repo["commits"]:
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create(self, kind: str, name: str, private: bool) -> None:
        repo = {"private": private, "refs": {}, "commits": {}}
        attributes = self.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.write(kind, name, repo, "refs/heads/main", {".gitattributes": attributes}, "initial commit")

    def write(self, kind: str, name: str, repo: dict, ref: str, files: dict, title: str, parent=None) -> str:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = {"parent": parent, "title": title, "date": date, "files": files}
        oid = hashlib.sha1(json.dumps([commit, time.time_ns()]).encode()).hexdigest()
        repo["commits"][oid], repo["refs"][ref] = commit, oid
        self._path(kind, name).write_text(json.dumps(repo))
        return oid

    def store(self, content: bytes, digest: str | None = None, lfs: bool = False) -> dict:
        """Store bytes under their digest. Returns the entry for a commit."""
        sha256 = hashlib.sha256(content).hexdigest()
        if digest not in (None, sha256):
            raise Refusal(400, f"{len(content)} bytes have the digest {sha256}, not {digest}")
        (self.folder / "files" / sha256).write_bytes(content)
        return self.entry(sha256, lfs)

    def entry(self, sha256: str, lfs: bool) -> dict:
        if not self.has(sha256):
            raise Refusal(400, f"LFS object {sha256} was never uploaded")
        path = self.folder / "files" / sha256
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        blob = pointer if lfs else path.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        return {"oid": oid, "sha256": sha256, "size": size, "lfs": lfs}

    def page(self, kind: str, name: str) -> str:
        return f"{self.url}/{'' if kind == 'models' else f'{kind}/'}{name}"

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / "repos" / f"{kind}--{name.replace('/', '--')}.json"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self._read()
        self.hub.requests.append((self.command, unquote(url.path)))
        for methods, pattern, action in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, url.path)):
                names = {key: value and unquote(value) for key, value in match.groupdict().items()}
                try:
                    action(self, **names)
                except Refusal as refusal:
                    headers = refusal.headers | {"X-Error-Message": refusal.message}
                    headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                    self._send({"error": refusal.message}, refusal.status, headers)
                return
        self._send({"error": f"no route for {self.command} {self.path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def log_message(self, *words) -> None:
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes | dict | list, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self, needed: bool) -> str | None:
        credentials = self.headers.get("Authorization")
        if credentials not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and not credentials:
            raise Refusal(401, "Invalid username or password.")
        return OWNER if credentials else None

    def _repo(self, kind: str, name: str, write: bool = False) -> dict:
        repo, user = self.hub.repo(kind, name), self._user(needed=False)
        if repo is None or (repo["private"] and not user):  # one answer for both, else private names could be guessed
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        self._user(needed=write)
        return repo

    def create_repo(self) -> None:
        request, user = json.loads(self.body), self._user(needed=True)
        kind, name = f"{request.get('type', 'model')}s", f"{request['organization'] or user}/{request['name']}"
        url = self.hub.page(kind, name)
        if kind == "spaces" and request.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "sdk must be one of gradio, docker, static")
        with self.hub.lock:
            if self.hub.repo(kind, name):
                self._send({"error": "You already created this repo", "url": url}, 409)
                return
            self.hub.create(kind, name, request.get("visibility") == "private")
        self._send({"url": url, "name": name, "id": name})

    def validate_card(self) -> None:
        match = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            self._send({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self._send({"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        state = self._repo(kind, repo, write=True)
        there = state["commits"][self.hub.commit(state, revision)]["files"]
        answers = []
        for file in json.loads(self.body)["files"]:
            old = there.get(file["path"])
            oid = old and (old["sha256"] if old["lfs"] else old["oid"])
            mode = "lfs" if LFS.fullmatch(file["path"]) or file["size"] > 10_000_000 else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": answers})

    def lfs_batch(self, kind: str | None, repo: str) -> None:
        self._repo(kind or "models", repo, write=True)
        answers = []
        for item in json.loads(self.body)["objects"]:
            if not self.hub.has(item["oid"]):
                href, header = f"{self.hub.cdn}/lfs/{item['oid']}", {}
                if item["size"] > self.hub.part_size:
                    parts = range(1, -(-item["size"] // self.hub.part_size) + 1)
                    header = {"chunk_size": str(self.hub.part_size)} | {str(n): f"{href}/{n}" for n in parts}
                    href = f"{self.hub.url}/complete/{item['oid']}"
                item |= {"actions": {"upload": {"href": href, "header": header}}}
            answers.append(item)
        self._send({"transfer": "basic", "objects": answers})

    def upload(self, oid: str, part: str | None = None) -> None:
        if oid in self.hub.waiting and part != "1":
            self.hub.released.wait()
            self.close_connection = True
            return
        if part:
            (self.hub.folder / "parts" / f"{oid}-{part}").write_bytes(self.body)
        else:
            self.hub.store(self.body, oid)
        self.hub.uploads.append(oid)
        self._send(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        names = [f"{oid}-{part['partNumber']}" for part in json.loads(self.body)["parts"]]
        self.hub.store(b"".join((self.hub.folder / "parts" / name).read_bytes() for name in names), oid)
        self._send({})

    def make_commit(self, kind: str, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            state = self._repo(kind, repo, write=True)
            parent = self.hub.commit(state, revision)
            ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
            files, header = dict(state["commits"][parent]["files"]), lines[0]["value"]
            if header.get("parentCommit", parent) != parent:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            for line in lines[1:]:
                path = line["value"]["path"]
                if line["key"] == "file":
                    files[path] = self.hub.store(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "lfsFile":
                    files[path] = self.hub.entry(line["value"]["oid"], lfs=True)
                elif files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            number = sum(name.startswith("refs/pr/") for name in state["refs"]) + 1
            opened = f"refs/pr/{number}" if self.query.get("create_pr") else None
            oid = self.hub.write(kind, repo, state, opened or ref, files, header["summary"], parent)
        url = self.hub.page(kind, repo)
        request = {"pullRequestUrl": f"{url}/discussions/{number}"} if opened else {}
        self._send({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"} | request)

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        state = self._repo(kind, repo)
        commit = self.hub.commit(state, revision or "main")
        paths = [{"rfilename": path} for path in state["commits"][commit]["files"]]
        fields = {"_id": repo, "id": repo, "modelId": repo, "sha": commit, "private": state["private"]}
        self._send(fields | {"siblings": paths, "tags": [], "downloads": 0, "likes": 0, "gated": False})

    def refs(self, kind: str, repo: str) -> None:
        stored = self._repo(kind, repo)["refs"].items()
        refs = {"converts": [], "tags": []}
        for key, start in {"branches": "refs/heads/", "pullRequests": "refs/pr/"}.items():
            named = [(ref.removeprefix(start), ref, oid) for ref, oid in stored if ref.startswith(start)]
            refs[key] = [{"name": name, "ref": ref, "targetCommit": oid} for name, ref, oid in named]
        self._send(refs)

    def branch(self, kind: str, repo: str, name: str) -> None:
        with self.hub.lock:
            state = self._repo(kind, repo, write=True)
            if f"refs/heads/{name}" in state["refs"]:
                raise Refusal(409, f"Reference already exists: refs/heads/{name}")
            start = json.loads(self.body).get("startingPoint", "main")
            state["refs"][f"refs/heads/{name}"] = self.hub.commit(state, start)
            self.hub._path(kind, repo).write_text(json.dumps(state))
        self._send({})

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        state = self._repo(kind, repo)
        commit = state["commits"][self.hub.commit(state, revision)]
        start = f"{folder}/" if folder else ""
        below = {path: file for path, file in commit["files"].items() if path.startswith(start)}
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        names = {path: path.removeprefix(start) for path in below}
        folders = sorted({start + name.split("/")[0] for name in names.values() if "/" in name})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        for path, file in below.items():
            if recursive or "/" not in names[path]:
                last = {"id": file["oid"], "title": commit["title"], "date": commit["date"]}
                entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"], "lastCommit": last}
                pointer = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
                entries.append(entry | ({"lfs": pointer} if file["lfs"] else {}))
        self._send(entries)

    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        state = self._repo(kind or "models", repo)
        commit = self.hub.commit(state, revision)
        file = state["commits"][commit]["files"].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file["oid"]}"'}
        if file["lfs"]:
            headers |= {"X-Linked-ETag": f'"{file["sha256"]}"', "X-Linked-Size": file["size"]}
            self._send(b"", 302, headers | {"Location": f"{self.hub.cdn}/cdn/{file['sha256']}"})
        else:
            self._content(file["sha256"], headers)

    def cdn(self, sha256: str) -> None:
        if "Authorization" in self.headers:  # a token has left the Hub
            raise Refusal(400, "Only one auth mechanism allowed")
        self._content(sha256, {"ETag": f'"{sha256}"'})

    def _content(self, sha256: str, headers: dict) -> None:
        content, part = (self.hub.folder / "files" / sha256).read_bytes(), self.headers.get("Range")
        if part is None:
            self._send(content, headers=headers)
            return
        first, last = part.removeprefix("bytes=").split("-")
        stop = min(int(last) + 1, len(content)) if last else len(content)
        span = f"bytes {first}-{stop - 1}/{len(content)}"
        self._send(content[int(first) : stop], 206, headers | {"Content-Range": span})


ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create_repo),
    (("POST",), "/api/validate-yaml", _Handler.validate_card),
    (("POST",), rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/api/{REPO}/commit/(?P<revision>[^/]+)", _Handler.make_commit),
    (("POST",), rf"/api/{REPO}/branch/(?P<name>[^/]+)", _Handler.branch),
    (("GET",), rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), rf"/api/{REPO}/refs", _Handler.refs),
    (("GET",), rf"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("POST",), rf"/{GIT}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>[0-9]+))?", _Handler.upload),
    (("POST",), "/complete/(?P<oid>[0-9a-f]{64})", _Handler.complete),
    (("GET", "HEAD"), rf"/{GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (("GET", "HEAD"), "/cdn/(?P<sha256>[0-9a-f]{64})", _Handler.cdn),
]
