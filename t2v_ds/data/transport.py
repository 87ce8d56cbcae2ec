"""HTTP for addresses that strangers wrote: only http(s), no private network, and an end to every answer.

The address that is checked is the one that is connected to: a name cannot change its meaning in between. Time is bounded
twice: a time-out without a byte, and a deadline for the whole answer, its headers too, that a server cannot stretch by
sending a byte now and then.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

_HEADERS = {"User-Agent": "t2v_ds", "Accept": "image/gif,*/*;q=0.5", "Accept-Encoding": "identity"}


class RefusedAddress(Exception):
    """Not http(s), or not of the public internet."""


def open_url(url: str, timeout_s: float, deadline: float, allow_private: bool) -> http.client.HTTPResponse:
    """Ask for `url`, following redirects, each of which is checked.

    Args:
        url: http or https.
        timeout_s: seconds without a byte that are too long.
        deadline: of `time.monotonic()`, by which the body must have been read.
        allow_private: allow addresses of private networks and this machine.

    Raises:
        RefusedAddress: as it is, or inside a URLError.
        urllib.error.HTTPError: the answer is not 2xx.
        OSError, http.client.HTTPException, ValueError: no usable answer; also while its body is read.
    """
    _check_url(url, allow_private)
    request = urllib.request.Request(_ascii_url(url), headers=_HEADERS)
    request.deadline = deadline  # type: ignore[attr-defined]  # for the handlers below
    response: http.client.HTTPResponse = _opener(allow_private).open(request, timeout=timeout_s)
    return response


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
        raise RefusedAddress(f"{url} is not an http or https address")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return
    if not allow_private and not is_public(str(address)):
        raise RefusedAddress(f"{address} is a private address; download.allow_private=true allows it")


def is_public(address: str) -> bool:
    """Is this IPv4 or IPv6 address one of the public internet, also when IPv6 wraps it?"""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # ::ffff:127.0.0.1 and the two NAT/6to4 forms reach the IPv4 address inside them
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _connect(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
    """`socket.create_connection` that refuses private addresses."""
    refused = None
    problem: OSError | None = None
    for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        if not is_public(str(place[0])):
            refused = place[0]
            continue
        try:
            return socket.create_connection((str(place[0]), address[1]), timeout, source_address)
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem
    raise RefusedAddress(f"{address[0]} is the private address {refused}; download.allow_private=true allows it")


class _TimedReader(io.RawIOBase):
    """Reads a socket until the deadline; each wait is no longer than the time-out."""

    def __init__(self, connection: socket.socket, timeout: float, deadline: float) -> None:
        self._socket, self._timeout, self._deadline = connection, timeout, deadline
        self._raw = connection.makefile("rb", buffering=0)  # keeps the socket open after http.client has closed its side

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        self._socket.settimeout(max(min(self._timeout, left), 1e-3))
        try:
            if left > 0:
                return self._raw.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        except TimeoutError:
            if self._timeout < left:
                raise TimeoutError(f"no byte for {self._timeout:g} s") from None
        raise TimeoutError("the answer was not complete in time (download.total_s)")

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, timeout: float, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, timeout, deadline))


def _connection(kind: type[http.client.HTTPConnection], request: urllib.request.Request, is_checked: bool) -> Callable[..., Any]:
    """A maker of connections for one request; `is_checked`: they refuse private addresses."""

    def make(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
        made = kind(*args, **kwargs)
        if is_checked:
            made._create_connection = _connect  # type: ignore[attr-defined]  # where http.client keeps it, plain and TLS alike
        limits = {"timeout": request.timeout, "deadline": request.deadline}  # type: ignore[attr-defined]
        made.response_class = functools.partial(_TimedResponse, **limits)  # type: ignore[assignment]
        return made

    return make


class _Http(urllib.request.HTTPHandler):
    def __init__(self, allow_private: bool) -> None:
        super().__init__()
        self.allow_private = allow_private

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        # Through a proxy the connection goes to the proxy, which is allowed to be private.
        is_checked = not self.allow_private and not request.has_proxy()
        return self.do_open(_connection(http.client.HTTPConnection, request, is_checked), request)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, allow_private: bool) -> None:
        super().__init__()
        self.allow_private = allow_private

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        is_checked = not self.allow_private and not getattr(request, "_tunnel_host", None)
        return self.do_open(_connection(http.client.HTTPSConnection, request, is_checked), request)  # type: ignore[arg-type]


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:
        _check_url(newurl, self.allow_private)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.deadline = req.deadline  # type: ignore[attr-defined]
        return request


@functools.cache
def _opener(allow_private: bool) -> urllib.request.OpenerDirector:
    """An opener that knows http and https and nothing else (no file:, ftp: or data:)."""
    opener = urllib.request.OpenerDirector()
    handlers = (urllib.request.ProxyHandler(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor())
    for handler in (*handlers, _Redirects(allow_private), _Http(allow_private), _Https(allow_private)):
        opener.add_handler(handler)
    return opener
