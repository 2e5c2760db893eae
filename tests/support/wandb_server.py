"""A wandb server on this machine that takes runs and keeps their history, as wandb's own reader of a file sends it."""

from __future__ import annotations

import gzip
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROJECT = {"id": "UA==", "name": "project", "entity": {"id": "RQ==", "name": "entity"}}


class WandbServer:
    """What the server was sent."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Rows of each run, by its id; a file that is sent again replaces the rows from its offset on."""
        self.runs: list[dict[str, Any]] = []
        """Variables of each request that made or changed a run."""
        self.artifacts: list[str] = []
        """Types of the artefacts."""
        self.url = ""

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        query, variables = body["query"], body.get("variables") or {}
        if "upsertBucket" in query:
            self.runs.append(variables)
            bucket = {"id": "Qg==", "name": variables["name"], "displayName": variables.get("displayName")}
            bucket |= {
                "description": None,
                "config": "{}",
                "sweepName": None,
                "project": PROJECT,
                "historyLineCount": 0,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            self.artifacts.append(variables["input"]["artifactTypeName"])
            latest = {"id": "QQ==", "latestArtifact": {"id": "QQ==", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "QQ==", "state": "COMMITTED", "artifactSequence": latest}}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        if "viewer" in query:
            teams: dict[str, Any] = {"edges": []}
            return {"viewer": {"id": "VQ==", "entity": "entity", "username": "u", "flags": "{}", "teams": teams}}
        return {"model": None, "project": None}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        sent = body.get("files", {}).get("wandb-history.jsonl")
        if sent:
            rows = self.history.setdefault(run_id, [])
            rows[sent["offset"] : sent["offset"] + len(sent["content"])] = map(json.loads, sent["content"])


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a port that the system chooses."""
    server = WandbServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _reply(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _body(self) -> bytes:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path.endswith("/graphql"):
                self._reply({"data": server.graphql(json.loads(body))})
                return
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})

    class Listener(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # clients end without a word
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    listener = Listener(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
