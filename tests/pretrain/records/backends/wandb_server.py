"""A server that speaks enough of W&B's protocol for its client and for `wandb sync` to upload for real.

W&B's own server is a container image, which no package registry has. This one answers the GraphQL operations that
the client (0.31) sends about a run, its files and its artifacts, and the file stream that carries history, summary
and system metrics. What it keeps, it keeps as the client sent it; it checks nothing that only W&B's server can know.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
"""The API key that is let in."""
ENTITY = "team"


@dataclass
class StoredRun:
    """What was uploaded of a run.

    Attributes:
        bucket: fields of the last `UpsertBucket` that were given.
        lines: of each stream file (`wandb-history.jsonl`, ...) the lines by offset.
        files: bytes by name.
    """

    bucket: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None

    def rows(self, name: str = "wandb-history.jsonl") -> list[dict[str, Any]]:
        """The lines of a stream file, in order of their offset."""
        return [json.loads(line) for _, line in sorted(self.lines.get(name, {}).items())]

    @property
    def config(self) -> dict[str, Any]:
        """The config; what the client adds of its own begins with `_`."""
        found = json.loads(self.bucket.get("config") or "{}")
        return {name: entry["value"] for name, entry in found.items()}

    @property
    def summary(self) -> dict[str, Any]:
        return self.rows("wandb-summary.json")[-1]


class WandbServer:
    """Listens on loopback in a thread; use it as a context.

    Attributes:
        runs: by id.
        artifacts: what `CreateArtifact` said, with the `manifest` once it was uploaded.
        alerts: what `NotifyScriptableRunAlert` said.
        used: artifacts that runs read, by their place in `artifacts`.
        operations: names of the GraphQL operations, in order.
        status: if not 0, every request is answered with this HTTP status.
    """

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.alerts: list[dict[str, Any]] = []
        self.operations: list[str] = []
        self.requests = 0
        self.status = 0
        self.lock = threading.Condition()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Quiet(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody listens any more."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def wait_for(self, happened: Callable[[], Any], patience: float = 60) -> bool:
        """Wait until something is true after a request; whether it became true."""
        with self.lock:
            return bool(self.lock.wait_for(happened, patience))

    # -- GraphQL: one method an operation ---------------------------------------------------------------------

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else "?"
        self.operations.append(name)
        method = getattr(self, f"do_{name}", None)
        if method is None:
            return {"errors": [{"message": f"unknown operation {name}"}]}
        return {"data": method(variables)}

    def do_Viewer(self, _: dict) -> dict:
        user = {"id": "user", "entity": ENTITY, "username": "user", "email": "", "flags": "{}"}
        return {"viewer": {**user, "teams": {"edges": []}}}

    def do_ServerFeaturesQuery(self, _: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def do_OrganizationCoreWeaveOrganizationID(self, _: dict) -> dict:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def do_XXHashDigestsEnabled(self, _: dict) -> dict:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def do_RunResumeStatus(self, v: dict) -> dict:
        run = self.runs.get(v["name"])
        model = {"id": "project", "name": v["project"], "entity": {"id": ENTITY, "name": ENTITY}}
        if run is None:
            return {"model": {**model, "bucket": None}}
        history, events = run.lines.get("wandb-history.jsonl", {}), run.lines.get("wandb-events.jsonl", {})

        def tail(lines: dict[int, str]) -> str:
            return json.dumps([line for _, line in sorted(lines.items())][-1:])

        bucket = {
            "id": v["name"],
            "name": v["name"],
            "summaryMetrics": json.dumps(run.summary if run.rows("wandb-summary.json") else {}),
            "displayName": run.bucket.get("displayName"),
            "logLineCount": len(run.lines.get("output.log", {})),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "historyTail": tail(history),
            "eventsTail": tail(events),
            "config": run.bucket.get("config") or "{}",
            "tags": run.bucket.get("tags") or [],
            "notes": run.bucket.get("notes"),
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**model, "bucket": bucket}}

    def do_UpsertBucket(self, v: dict) -> dict:
        inserted = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], StoredRun())
        run.bucket |= {name: value for name, value in v.items() if value is not None}
        project = {
            "id": "project",
            "name": v["project"],
            "entity": {"id": ENTITY, "name": v["entity"] or ENTITY},
        }
        bucket = {
            "id": v["name"],
            "name": v["name"],
            "displayName": run.bucket.get("displayName"),
            "description": None,
            "config": run.bucket.get("config"),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def do_CreateRunFiles(self, v: dict) -> dict:
        files = [{"name": f, "uploadUrl": f"{self.url}/run/{v['run']}/{f}"} for f in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def do_MarkRunFilesUploaded(self, _: dict) -> dict:
        return {"markRunFilesUploaded": {"success": True}}

    def do_NotifyScriptableRunAlert(self, v: dict) -> dict:
        self.alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    def do_FetchArtifactDigestAlgorithm(self, _: dict) -> dict:
        return {"project": None}

    def do_CreateArtifact(self, v: dict) -> dict:
        self.artifacts.append(dict(v["input"]))
        number = str(len(self.artifacts) - 1)
        created = {
            "id": number,
            "state": "PENDING",
            "artifactSequence": {"id": "s" + number, "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": created}}

    def do_CreateArtifactManifest(self, v: dict) -> dict:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(v["artifactID"])}}

    def do_UpdateArtifactManifest(self, v: dict) -> dict:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(v["artifactManifestID"])}}

    def _manifest(self, number: str) -> dict:
        file = {"id": number, "uploadUrl": f"{self.url}/manifest/{number}", "uploadHeaders": []}
        return {"id": number, "file": file}

    def do_CreateArtifactFiles(self, v: dict) -> dict:
        edges = []
        for spec in v["input"]["artifactFiles"]:
            url = f"{self.url}/artifact/{spec['artifactID']}/{spec['name']}"
            node = {
                "storagePath": spec["name"],
                "uploadUrl": url,
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
            }
            edges.append({"node": {**node, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def do_CommitArtifact(self, v: dict) -> dict:
        artifact = self.artifacts[int(v["artifactID"])]
        artifact["committed"] = True
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": artifact["digest"]}}}

    def do_UseArtifact(self, v: dict) -> dict:
        self.used.append(v["input"]["artifactID"])
        return {"useArtifact": {"artifact": {"id": v["input"]["artifactID"]}}}

    # -- files -----------------------------------------------------------------------------------------------------

    def stream(self, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(run_id, StoredRun())
        for name, chunk in (body.get("files") or {}).items():
            kept = run.lines.setdefault(name, {})
            if name == "wandb-summary.json":  # replaced as a whole
                kept.clear()
            kept.update(enumerate(chunk["content"], chunk["offset"]))
        if body.get("complete"):
            run.complete, run.exit_code = True, body.get("exitcode")
        return {}

    def put(self, path: str, body: bytes) -> None:
        kind, number, *rest = path.strip("/").split("/")
        if kind == "run":
            self.runs[number].files["/".join(rest)] = body
        elif kind == "manifest":
            self.artifacts[int(number)]["stored"] = json.loads(body)
        else:
            self.artifacts[int(number)].setdefault("files", {})["/".join(rest)] = body


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: WandbServer

    def do_POST(self) -> None:
        self._serve()

    do_GET = do_PUT = do_POST

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        owner = self.owner
        with owner.lock:
            status, answer = self._answer(body)
            owner.lock.notify_all()
        self._reply(status, answer)

    def _answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        owner = self.owner
        owner.requests += 1
        if owner.status:
            return owner.status, {"error": "as the test wants it"}
        if self.command == "PUT":
            owner.put(self.path, body)
            return 200, {}
        if self.path.startswith("/sdk/"):  # telemetry
            return 200, {}
        if not self._let_in():
            return 401, {"errors": [{"message": "wrong key"}]}
        if self.path == "/graphql":
            asked = json.loads(body)
            return 200, owner.answer(asked["query"], asked.get("variables") or {})
        if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            return 200, owner.stream(found[1], json.loads(body))
        return 404, {"error": self.path}

    def _let_in(self) -> bool:
        scheme, _, rest = (self.headers.get("Authorization") or "").partition(" ")
        return scheme == "Basic" and b64decode(rest).decode() == f"api:{KEY}"

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
