"""A small server on this machine that answers as the Hugging Face Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"  # the commit of main; every other revision is SHA backwards


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """This environment without what huggingface-hub heeds, but for a hub and a cache of the test's own."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}


PART = 1 << 20  # bytes


@contextmanager
def serve(folder: Path, pause: float = 0.0) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Serve `folder`/owner/repo/revision/file. Gives the endpoint, and what was asked: path and Authorization.

    Every MB of a body is followed by a `pause` (seconds). A repository named "gated" wants the token "secret".
    Files with "damaged" in their name lose a bit on the way.
    """
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                for at in range(0, len(body), PART):
                    self.wfile.write(body[at : at + PART])
                    time.sleep(pause)

        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            parts = self.path.split("?")[0].strip("/").split("/")
            if "gated" in parts and self.headers.get("Authorization") != "Bearer secret":
                return self.answer(401, b"{}", X_Error_Code="GatedRepo")
            if parts[:2] == ["api", "models"]:
                repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                at = folder / repo / revision
                if not at.is_dir():
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                info = {
                    "id": repo, "modelId": repo, "sha": SHA if revision == "main" else SHA[::-1], "tags": [],
                    "siblings": [self.sibling(p, at) for p in sorted(at.rglob("*")) if p.is_file()],
                    "cardData": {"license": "mit"},
                }  # fmt: skip
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            if len(parts) < 5 or parts[2] != "resolve":
                return self.answer(404)
            repo, revision = "/".join(parts[:2]), parts[3]
            at = folder / repo / ("main" if revision in (SHA, "main") else "v2")
            path = at / "/".join(parts[4:])
            if not path.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            if "damaged" in path.name:
                body = body[:-1] + bytes([body[-1] ^ 1])
            commit = SHA if at.name == "main" else SHA[::-1]
            return self.answer(
                200, body, ETag=etag, X_Repo_Commit=commit, Content_Type="application/octet-stream"
            )

        def sibling(self, path: Path, at: Path) -> dict[str, object]:
            data = path.read_bytes()
            lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            metadata = {"size": len(data), "lfs": lfs} if "blobs=" in self.path else {}
            return {"rfilename": path.relative_to(at).as_posix(), **metadata}

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that are killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
