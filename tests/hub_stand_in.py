"""A stand-in for the hub on this machine: accounts, repositories, and commits whose files it keeps."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

TOKEN = "hf_of_a_test"


class Hub:
    """What was asked of it."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.address = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """The few addresses that an upload asks for; all files go as they are, in the commit."""

        def log_message(self, *given: object) -> None:
            """Say nothing."""

        def answer(self, value: object, status: int = 200) -> None:
            """Send JSON."""
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            """Who asks, and what a repository is."""
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "Invalid credentials"}, 401)
            elif self.path.startswith("/api/whoami-v2"):
                self.answer({"type": "user", "name": "me", "orgs": []})
            else:
                self.answer({"id": "me/student", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            """Make a repository, say how files are sent, take a commit."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self.answer({"url": f"{hub.address}/me/student", "name": "me/student"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [file["path"] for file in json.loads(body)["files"]]
                ways = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                self.answer({"files": ways})
            else:
                for line in body.splitlines():
                    record = json.loads(line)
                    if record["key"] == "file":
                        hub.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
                self.answer({"commitUrl": f"{hub.address}/me/student/commit/1", "commitOid": "1", "success": True})

    return Handler


@contextmanager
def hub_stand_in(token: str = TOKEN) -> Iterator[Hub]:
    """A hub for as long as the block runs, at which this process is logged in."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with (
            mock.patch.object(constants, "ENDPOINT", hub.address),
            mock.patch.object(constants, "HF_HUB_OFFLINE", False),
            mock.patch.dict("os.environ", {"HF_TOKEN": token}),
        ):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
