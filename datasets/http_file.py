"""A file on a web server, read in pieces."""

from __future__ import annotations

import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 5  # in a row without a new byte
_BLOCK = 1 << 18
_READ_AHEAD = 1 << 18


class SeekableFile(io.RawIOBase):
    """A position that moves about; who derives from it says `size` and how to read from `_at` on."""

    size: int
    """Bytes in the file."""
    _at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence] + offset
        return self._at


class HttpFile(SeekableFile):
    """Random access by HTTP Range requests, for reading a zip archive's directory; `stream` for the bulk.

    Raises:
        ConnectionError: the server cannot be reached or refuses; names it and says what helps.
    """

    ranges: bool
    """Whether the server sends parts of the file."""
    tag: str | None
    """Its name for this version of the file."""
    sha256: str | None
    """Digest of the whole file, if the server states one (Hugging Face does)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._cache: tuple[int, bytes] = (0, b"")
        self._redirects = _Redirects()
        self._opener = urllib.request.build_opener(self._redirects)
        with self._request(0, 1) as response:
            self.ranges = response.status == 206
            headers = response.headers
            total = (
                headers.get("Content-Range", "").rpartition("/")[2]
                if self.ranges
                else headers.get("Content-Length", "")
            )
            if not total.isdigit():
                kind = headers.get_content_type()
                raise ConnectionError(
                    f"{url}: the server does not say how large the file is (it sent {kind}); download it by hand and give --archive PATH"
                )
            self.size = int(total)
            linked = (self._redirects.linked_tag or "").strip('"')
            self.tag = linked or headers.get("ETag")
            self.sha256 = linked if re.fullmatch(r"[0-9a-f]{64}", linked) else None

    def read(self, count: int = -1) -> bytes:
        """Bytes from here on, fetched with some more around them: directories are read in small pieces."""
        end = self.size if count < 0 else min(self._at + count, self.size)
        start, data = self._cache
        if not (start <= self._at and end <= start + len(data)):
            start = max(0, min(self._at, self.size - _READ_AHEAD))
            data = b"".join(self.stream(start, min(max(end, start + _READ_AHEAD), self.size)))
            self._cache = (start, data)
        found = data[self._at - start : end - start]
        self._at += len(found)
        return found

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end` in blocks; a broken connection is taken up again where it broke.

        Without Range requests (`ranges` is False) a second attempt is not possible and `start` must be 0.
        """
        failures = 0
        while start < end:
            try:
                with self._request(start, end) as response:
                    if self.ranges and response.status != 206:
                        raise ConnectionError(
                            f"{self._host}: answered a request for a part of the file with status {response.status}"
                        )
                    while start < end and (block := response.read(min(_BLOCK, end - start))):
                        failures = 0
                        start += len(block)
                        yield block
            except (OSError, HTTPException) as error:
                failures += 1
                if failures >= _ATTEMPTS or not self.ranges:
                    raise ConnectionError(
                        f"{self._host}: the connection broke ({_reason(error)}); the same command goes on where it stopped"
                    ) from error
            else:
                if start < end:
                    failures += 1
                    if failures >= _ATTEMPTS or not self.ranges:
                        raise ConnectionError(
                            f"{self._host}: the connection ends early; the same command goes on where it stopped"
                        )
            if start < end and failures:
                time.sleep(0.2 * 2**failures)

    @property
    def _host(self) -> str:
        return urlsplit(self._url).netloc

    def _request(self, start: int, end: int) -> HTTPResponse:
        headers = {"User-Agent": "prismfield", "Accept-Encoding": "identity"}
        if start > 0 or getattr(self, "ranges", True):
            headers["Range"] = f"bytes={start}-{end - 1}"
        try:
            response: Any = self._opener.open(urllib.request.Request(self._url, headers=headers), timeout=_TIMEOUT)
            return response
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{self._url}: the server answered {error.code} {error.reason}") from error
        except (OSError, HTTPException) as error:
            raise ConnectionError(
                f"no connection to {self._host} ({_reason(error)}): this machine seems to have no network; elsewhere fetch {self._url}, then give --archive PATH"
            ) from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the digest that Hugging Face names when it redirects to its storage."""

    linked_tag: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.linked_tag = headers.get("X-Linked-Etag", self.linked_tag)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner or type(error).__name__)
