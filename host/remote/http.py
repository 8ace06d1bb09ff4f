"""Which ComfyUI servers may be called, with which token, and one HTTP request to them.

Nothing of a workflow can widen what is allowed: hosts and tokens come from the settings file in the host's user folder
(`__slipstream/remote.json`) and from the environment. Redirects are not followed, certificates are checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...engine.errors import SlipstreamError
from ..profiles.folder import USER_FOLDER

NODE = "Hybrid Remote"
TOKEN_VARIABLE = "SLIPSTREAM_REMOTE_TOKEN"
HOSTS_VARIABLE = "SLIPSTREAM_REMOTE_HOSTS"
SETTINGS = (USER_FOLDER, "remote.json")

# Seconds one answer may take; the host answers in milliseconds unless a model load keeps it busy.
REPLY = 10.0
CHUNK = 1 << 16
# A queue holds the whole graphs of everybody's jobs, a few 10 kB each.
JSON_BYTES = 64 << 20

# Codes with which a gateway says that the server behind it is busy or restarting.
TRANSIENT = (408, 429, 502, 503, 504)
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


class RemoteUnavailable(SlipstreamError):
    """The server is absent, lost the job, failed or took too long; the segment can be sampled elsewhere instead."""


class NoAnswer(Exception):
    """No usable answer to one request; asking again may help."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server that may be called. path: of a gateway that serves ComfyUI below a folder, or empty."""

    scheme: str
    host: str
    port: int
    path: str = ""
    token: str = field(default="", repr=False)

    @property
    def place(self) -> str:
        """For sentences: host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.place}{self.path}"


def locate(server: str) -> Address:
    """The server of this name in the settings file, or at this address, with its token.

    Raises SlipstreamError for an address that is none, a host that is not allowed, and a token that would travel in
    clear text.
    """
    known = _settings()
    entry = known.get(server.strip())
    address = _parse(entry["address"] if entry else server)
    listed = [(_parse(e["address"]), e) for e in known.values()]
    match = next((e for a, e in listed if (a.host, a.port) == (address.host, address.port)), None)
    named_here = bool(match) or _in_environment(address)
    if not (named_here or _loopback(address.host)):
        raise SlipstreamError(
            f"{NODE}: {address.place} is not among the allowed servers; add it to user/{'/'.join(SETTINGS)} or to the "
            f"environment variable {HOSTS_VARIABLE} on this machine."
        )
    # A workflow may name any port of this machine; only who is listed gets the token.
    given = (match or {}).get("token") or (os.environ.get(TOKEN_VARIABLE, "") if named_here else "")
    token = _checked(given)
    if token and address.scheme == "http" and not _loopback(address.host):
        raise SlipstreamError(
            f"{NODE}: the token for {address.place} would travel unencrypted over http; give it an https address."
        )
    return replace(address, token=token)


def _parse(text: str) -> Address:
    text = text.strip()
    host = text.split("://")[-1].split("/")[0].rsplit(":", 1)[0].strip("[]")
    if "://" not in text:
        text = f"{'http' if _loopback(host) else 'https'}://{text}"
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise SlipstreamError(_not_an_address(text)) from None
    if parts.username is not None or parts.password is not None or "@" in text:
        raise SlipstreamError(
            f"{NODE}: a server address must not hold a user name or password, since workflows are shared; put a token "
            f"into user/{'/'.join(SETTINGS)} or into {TOKEN_VARIABLE}."
        )
    name = parts.hostname or ""
    if parts.query or parts.fragment or not (HOST_NAME.fullmatch(name) or _is_ip(name)):
        raise SlipstreamError(_not_an_address(text))
    return Address(parts.scheme, name, port, parts.path.rstrip("/"))


def _not_an_address(text: str) -> str:
    return (
        f"{NODE}: '{text[:80]}' is neither a server in user/{'/'.join(SETTINGS)} nor an address such as "
        "https://gpu.example.com or http://127.0.0.1:8188."
    )


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _loopback(host: str) -> bool:
    return host == "localhost" or (_is_ip(host) and ipaddress.ip_address(host).is_loopback)


def _in_environment(address: Address) -> bool:
    allowed = [item.strip().lower() for item in os.environ.get(HOSTS_VARIABLE, "").split(",")]
    return address.host in allowed or address.place in allowed


def _settings() -> dict[str, dict]:
    """Name -> {"address": ..., "token": ...} from {"servers": {...}}; empty where the file is not there."""
    import folder_paths

    path = Path(folder_paths.get_user_directory(), *SETTINGS)
    try:
        servers = json.loads(path.read_text(encoding="utf-8"))["servers"]
        good = all(isinstance(e["address"], str) and isinstance(e.get("token", ""), str) for e in servers.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:  # the content is not quoted: it holds tokens
        raise SlipstreamError(
            f"{NODE}: user/{'/'.join(SETTINGS)} is not as expected; it holds "
            '{"servers": {"NAME": {"address": "https://...", "token": "..."}}}.'
        )
    return servers


def _checked(token: str) -> str:
    token = token.strip()
    if not all("!" <= c <= "~" for c in token):  # otherwise the HTTP library would quote it in its complaint
        raise SlipstreamError(
            f"{NODE}: the token has a space or another character in it that no header can carry; copy it again."
        )
    return token


def with_query(path: str, values: dict[str, str]) -> str:
    return f"{path}?{urllib.parse.urlencode(values)}"


def path_of(url: str) -> str:
    return urllib.parse.urlsplit(url).path


@dataclass(frozen=True, slots=True)
class Answer:
    """status: the HTTP code, below 500; body: everything that came."""

    status: int
    body: bytes

    def json(self) -> dict:
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise NoAnswer("answered with something that is not a JSON object")
        return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None  # which the library turns into an HTTPError with the redirect's code


class Connection:
    """Requests to one server. pulse: called between chunks and may raise, which ends the request."""

    def __init__(self, address: Address, pulse: Callable[[], None] = lambda: None):
        self.address = address
        self.pulse = pulse
        proxies = urllib.request.ProxyHandler({} if _loopback(address.host) else None)
        secure = urllib.request.HTTPSHandler(context=ssl.create_default_context())
        self._opener = urllib.request.build_opener(proxies, secure, _NoRedirects())

    def request(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json",
        timeout: float = REPLY, limit: int = JSON_BYTES, headers: dict[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        """Send one request and read at most `limit` bytes of the answer.

        Raises NoAnswer where asking again may help, SlipstreamError where the user must do something.
        """
        headers = {"Accept": "*/*", "User-Agent": "ComfyUI-Slipstream", **(headers or {})}
        if self.address.token:
            headers["Authorization"] = f"Bearer {self.address.token}"
        if body is not None:
            headers |= {"Content-Type": content_type, "Content-Length": str(len(body))}
        data = None if body is None else self._pieces(body)
        request = urllib.request.Request(self.address.url + path, data, headers, method=method)
        try:
            try:
                with self._opener.open(request, timeout=timeout) as response:
                    return Answer(response.status, self._read(response, limit))
            except urllib.error.HTTPError as error:
                with error:
                    return self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise SlipstreamError(
                    f"{NODE}: the certificate of {self.address.place} is not trusted ({reason.verify_message}); "
                    "nothing was sent to it."
                ) from None
            raise NoAnswer(self.clean(str(reason) or type(reason).__name__)) from None

    def post(self, path: str, data: dict, timeout: float = REPLY, headers: dict[str, str] | None = None) -> Answer:
        return self.request("POST", path, json.dumps(data).encode(), timeout=timeout, headers=headers)

    def clean(self, text: str) -> str:
        """The server's words without the token, which it may repeat, on one line."""
        return " ".join(self.without_token(text).split())[:400]

    def without_token(self, text: str) -> str:
        """The text with stars where the token was, as it is or as it is written in an address."""
        token = self.address.token
        for form in {token, urllib.parse.quote(token, ""), urllib.parse.quote(token)} - {""}:
            text = text.replace(form, "***")
        return text

    def _pieces(self, body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), CHUNK):
            self.pulse()
            yield body[start : start + CHUNK]

    def _read(self, response, limit: int) -> bytes:
        announced, parts, size = response.headers.get("Content-Length"), [], 0
        while piece := response.read(CHUNK):
            self.pulse()
            parts.append(piece)
            size += len(piece)
            if size > limit:
                raise RemoteUnavailable(f"{NODE}: {self.address.place} sent more than {limit} bytes; nothing was kept.")
        if announced is not None and announced.strip() != str(size):
            raise NoAnswer(f"{size} of {announced} bytes came")
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError) -> Answer:
        place = self.address.place
        if error.code in (401, 403):
            what = "the token was refused" if self.address.token else "it wants a token"
            raise SlipstreamError(
                f"{NODE}: {place} answered {error.code}: {what}; set it in user/{'/'.join(SETTINGS)} or in "
                f"the environment variable {TOKEN_VARIABLE} of this machine."
            )
        if 300 <= error.code < 400:
            target = urllib.parse.urlsplit(error.headers.get("Location", "")).netloc.rsplit("@")[-1] or "another page"
            raise SlipstreamError(
                f"{NODE}: {place} redirects to {target}, which is not followed; if you trust that, enter it instead."
            )
        body = self._read(error, JSON_BYTES)
        if error.code in TRANSIENT or error.code >= 500:
            raise NoAnswer(f"answered {error.code}")
        return Answer(error.code, body)
