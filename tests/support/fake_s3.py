"""As much of S3's API as keeps files: PUT, GET, DELETE, a listing, and the deletion of several, in memory."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_TIME = "2026-01-01T00:00:00.000Z"


class FakeS3:
    """The server, inside the `with` block.

    Attributes:
        objects: contents by "bucket/key".
        unsigned: how many requests had no signature of version 4.
        broken: whether every request is answered 500.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.unsigned = 0
        self.broken = False
        outer = self

        class Handler(_Handler):
            store = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FakeS3

    def log_message(self, *given: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"e"')
        self.send_header("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self) -> tuple[str, dict[str, list[str]], bytes] | None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = urlsplit(self.path)
        if not self.headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 Credential="):
            self.store.unsigned += 1
        if self.store.broken:
            self._answer(500)
            return None
        return unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True), body

    def do_PUT(self) -> None:
        if found := self._begin():
            self.store.objects[found[0]] = found[2]
            self._answer(200)

    def do_DELETE(self) -> None:
        if found := self._begin():
            self.store.objects.pop(found[0], None)
            self._answer(204)

    def do_POST(self) -> None:
        if (found := self._begin()) and "delete" in found[1]:
            keys = re.findall(r"<Key>(.*?)</Key>", found[2].decode())
            for key in keys:
                self.store.objects.pop(f"{found[0]}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def do_GET(self) -> None:
        if not (found := self._begin()):
            return
        path, query, _ = found
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            keys = [key.partition("/")[2] for key in sorted(self.store.objects) if key.startswith(f"{path}/{prefix}")]
            listed = "".join(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{_TIME}</LastModified><Size>1</Size></Contents>"
                for key in keys
            )
            self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>".encode())
        elif path in self.store.objects:
            self._answer(200, self.store.objects[path])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET
