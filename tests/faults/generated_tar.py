"""An S3 server with one object that exists nowhere: a tar of as many bytes as one likes, made up as it is asked for.

`GeneratedTar` answers HEAD, listings and range reads; its members are videos in name only, filled with one byte each. `served` counts the
bytes that were read. For tests of what streams: neither side needs the disk or the memory that the object would take.
"""

import contextlib
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

FILL = bytes(range(256)) * 4096


class GeneratedTar:
    """`members` files of `member_bytes` (a multiple of 512) each, at s3://generated/big.tar of the server at `url`."""

    def __init__(self, members: int, member_bytes: int) -> None:
        self.members, self.member_bytes = members, member_bytes
        self.step = tarfile.BLOCKSIZE + member_bytes
        self.bytes = members * self.step + tarfile.RECORDSIZE
        self.served = 0
        self._guard = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, name="generated tar", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, length: int) -> None:
        with self._guard:
            self.served += length

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, a little at a time."""
        while start < end:
            member, offset = divmod(start, self.step)
            if member == self.members:
                yield bytes(end - start)
                return
            header = self.header(member)
            piece = header[offset:] if offset < len(header) else FILL[: self.step - offset]
            yield piece[: end - start]
            start += len(piece)

    def header(self, member: int) -> bytes:
        info = tarfile.TarInfo(f"video-{member:05d}.mp4")
        info.size = self.member_bytes
        return info.tobuf(tarfile.GNU_FORMAT)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tar: GeneratedTar) -> None:
        self.tar = tar
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._begin(200, self.server.tar.bytes, {"ETag": '"big"'})

    def do_GET(self) -> None:
        tar = self.server.tar
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            row = f"<Contents><Key>big.tar</Key><Size>{tar.bytes}</Size><ETag>&quot;big&quot;</ETag></Contents>"
            listing = f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{row}</ListBucketResult>".encode()
            self._begin(200, len(listing), {"Content-Type": "application/xml"})
            self.wfile.write(listing)
            return
        start, end = int(span[1]), min(int(span[2]) + 1, tar.bytes)
        self._begin(206, end - start, {"ETag": '"big"', "Content-Range": f"bytes {start}-{end - 1}/{tar.bytes}"})
        tar.count(end - start)
        with contextlib.suppress(ConnectionError):
            for piece in tar.pieces(start, end):
                self.wfile.write(piece)

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
