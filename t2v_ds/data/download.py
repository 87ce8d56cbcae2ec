"""A URL -> a file in a cache folder: bounded in size and time, tried again, never half-written, never from a private network.

url -> cached? -> done
    -> connect (address checked) -> redirects (each checked again) -> temporary file (size checked as it grows) -> rename
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import ipaddress
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from t2v_ds.config import DownloadConfig
from t2v_ds.data.gif import RejectedClip

_BACKOFF_S = 0.5  # before the first retry; doubled for each further one
_LONGEST_ATTEMPT = 30  # times timeout_s: a server that drips bytes is given up
_RETRY_STATUS = (408, 425, 429)  # and all of 5xx
_PIECE = 1 << 16
_HEADERS = {"User-Agent": "t2v_ds", "Accept": "image/gif,*/*;q=0.5", "Accept-Encoding": "identity"}


class _PrivateAddress(Exception):
    """The address is not one of the public internet."""


class _TooLarge(Exception):
    """The body is larger than allowed."""


def cache_path(folder: Path, url: str) -> Path:
    """Where the download of `url` is kept."""
    name = hashlib.sha256(url.encode()).hexdigest()[:40]
    return folder / name[:2] / f"{name}.gif"


def fetch(url: str, folder: Path, config: DownloadConfig) -> Path:
    """Download `url` into the cache `folder` unless it is there already; returns the file's path.

    Raises:
        RejectedClip: "download_failed" (after the retries; at once for a refusal such as 404) or "too_large".
    """
    path = cache_path(folder, url)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        try:
            _download(url, path, config)
        except _TooLarge as error:
            raise RejectedClip("too_large", str(error)) from error
        except _PrivateAddress as error:
            raise RejectedClip("download_failed", str(error)) from error
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP {error.code}"
            if error.code < 500 and error.code not in _RETRY_STATUS:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, _PrivateAddress):
                raise RejectedClip("download_failed", str(reason)) from error
            problem = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        else:
            return path
    raise RejectedClip("download_failed", problem)


def _download(url: str, path: Path, config: DownloadConfig) -> None:
    """One attempt."""
    deadline = time.monotonic() + _LONGEST_ATTEMPT * config.timeout_s
    _check_url(url, config.allow_private)
    request = urllib.request.Request(_ascii_url(url), headers=_HEADERS)
    # Threads of one process may fetch the same URL; the process and thread in the name keep them apart.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with _opener(config.allow_private).open(request, timeout=config.timeout_s) as response, temporary.open("wb") as file:
            expected = response.headers.get("Content-Length")
            size = 0
            if expected is not None and int(expected) > config.max_bytes:
                raise _TooLarge(f"{expected} bytes; at most {config.max_bytes}")
            # read1 returns what has arrived: a time-out then means no byte for that long, not a slow piece.
            while piece := response.read1(_PIECE):
                size += len(piece)
                if size > config.max_bytes:
                    raise _TooLarge(f"more than {config.max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not finished after {_LONGEST_ATTEMPT * config.timeout_s:.0f} s")
                file.write(piece)
            if expected is not None and size != int(expected):
                raise ConnectionError(f"the connection closed after {size} of {expected} bytes")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _ascii_url(url: str) -> str:
    """Quote what HTTP does not carry (spaces, letters with accents) and leave what is quoted already."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    safe = "/%:=&?~+!$,;'@()*[]"
    return urllib.parse.urlunsplit((parts.scheme, host, urllib.parse.quote(parts.path, safe), urllib.parse.quote(parts.query, safe), ""))


def _check_url(url: str, allow_private: bool) -> None:
    """Refuse other schemes than http(s), and private addresses written as numbers (a proxy would reach them for us)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _PrivateAddress(f"{url} is not an http or https address")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return
    if not allow_private and not _is_public(str(address)):
        raise _PrivateAddress(f"{address} is a private address; download.allow_private=true allows it")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # ::ffff:127.0.0.1 and the two NAT/6to4 forms reach the IPv4 address inside them
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _connect(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
    """`socket.create_connection` that refuses private addresses.

    The address that is checked is the one that is connected to: a name cannot change its meaning in between.
    """
    refused = None
    problem: OSError | None = None
    for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        if not _is_public(str(place[0])):
            refused = place[0]
            continue
        try:
            return socket.create_connection((str(place[0]), address[1]), timeout, source_address)
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem
    raise _PrivateAddress(f"{address[0]} is the private address {refused}; download.allow_private=true allows it")


def _checked(connection: type[http.client.HTTPConnection]) -> Any:
    def make(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
        made = connection(*args, **kwargs)
        made._create_connection = _connect  # type: ignore[attr-defined]  # where http.client keeps it, plain and TLS alike
        return made

    return make


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        # Through a proxy the connection goes to the proxy, which is allowed to be private.
        connection = http.client.HTTPConnection
        return self.do_open(connection if request.has_proxy() else _checked(connection), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        connection = http.client.HTTPSConnection
        return self.do_open(connection if getattr(request, "_tunnel_host", None) else _checked(connection), request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:
        _check_url(newurl, self.allow_private)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@functools.cache
def _opener(allow_private: bool) -> urllib.request.OpenerDirector:
    """An opener that knows http and https and nothing else (no file:, ftp: or data:)."""
    opener = urllib.request.OpenerDirector()
    http_handlers = (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()) if allow_private else (_Http(), _Https())
    handlers = (urllib.request.ProxyHandler(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor())
    for handler in (*handlers, _Redirects(allow_private), *http_handlers):
        opener.add_handler(handler)
    return opener
