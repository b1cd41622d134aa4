"""What keeps the page to itself: who may reach it, what it gives out, what it takes in, and where browsers may ask.

Gradio serves files below the folders that it is told, fetches addresses that requests name, and allows any host name
when it is reached by one. The guard in front of it is stricter: it knows the names of the page, refuses requests of
other sites and requests that name an address to fetch, bounds their size, and gives out PNGs alone from the folder of
pictures.
"""

import hmac
import ipaddress
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import MlxSfError, option
from .files import MAX_UPLOAD

USER = "mlx-sf"  # name to log in with, where a password is asked for
SHORTEST = 8  # characters of a password
PASSWORD_VARIABLE = "MLX_SF_APP_PASSWORD"
_MAX_BODY = MAX_UPLOAD + (1 << 20)  # an upload with its envelope
_MAX_JSON = 1 << 20  # a request without pictures

# whatever a browser is told by the page, it asks this page alone; Gradio's own scripts are inline and use eval
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_password(host: str, password: str | None) -> str | None:
    """The password that this address needs, None where it needs none. `MlxSfError` where it is missing or short."""
    if is_local(host) and password is None:
        return None
    if not password:
        raise MlxSfError(
            f"{option('host')} {host}: others can reach this address, so it needs a password: set {PASSWORD_VARIABLE}"
        )
    if len(password) < SHORTEST:
        raise MlxSfError(f"{PASSWORD_VARIABLE}: has {len(password)} characters, want at least {SHORTEST}")
    return password


def exposure(host: str, output: Path, runs: Path, evals: Path) -> str:
    """What an address that others can reach gives them, in one line."""
    return (
        f"warning: whoever reaches {host} and has the password can draw on this machine, load any checkpoint and "
        f"measure any folder of pictures that this account can read, and see the pictures in {output}, the runs in "
        f"{runs} and the evaluations in {evals}; the connection is not encrypted"
    )


def login(password: str) -> Callable[[str, str], bool]:
    """The check of a name and a password, in a time that says nothing about either."""

    def check(user: str, given: str) -> bool:
        pairs = ((user, USER), (given, password))
        return all([hmac.compare_digest(a.encode(), b.encode()) for a, b in pairs])

    return check


def names_of(host: str) -> set[str] | None:
    """Host names under which the page answers; None is any, of an address that stands for all of the machine's."""
    if is_local(host):
        return {"localhost", "127.0.0.1", "::1", host.strip("[]")}
    try:
        return None if ipaddress.ip_address(host.strip("[]")).is_unspecified else {host.strip("[]"), "localhost"}
    except ValueError:
        return {host.lower(), "localhost"}


def private_environment() -> Path:
    """Say to Gradio, best before it is imported, to keep quiet and where to put its copies: in the new folder returned.

    `forget_environment` takes that back and deletes the folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="mlx-sf-app-"))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_ROOT_PATH", "GRADIO_VIBE_MODE"):
        os.environ.pop(name, None)
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks itself whether it has started
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost,::1"]))
    return folder


def forget_environment(folder: Path) -> None:
    """Delete the copies, and name their folder no more."""
    if os.environ.get("GRADIO_TEMP_DIR") == str(folder):
        del os.environ["GRADIO_TEMP_DIR"]
    shutil.rmtree(folder, ignore_errors=True)


def port_is_free(host: str, port: int) -> bool:
    """Whether a server can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host.strip("[]"), port))
        except OSError:
            return False
    return True


class Guard:
    """ASGI middleware in front of Gradio; see above. `served`: folders of which PNGs alone are given out."""

    def __init__(self, app: Any, hosts: set[str] | None, served: Iterable[str]) -> None:
        self._app, self._hosts = app, hosts
        self._served = [Path(s) for s in served]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        status, why = self._refusal(scope, headers)
        body = None
        if not status and scope["method"] == "POST" and not headers.get("content-type", "").startswith("multipart/"):
            body = await _body(receive)
            if body is None:
                status, why = 413, "the request is too large"
            elif _names_an_address(body):
                status, why = 403, "the page fetches nothing from other addresses"
        if status:
            await _refuse(send, status, why)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        source = _bounded(receive) if body is None else _replayed(body, receive)
        await self._app(scope, source, send_with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str]:
        """Status and reason of a request that is refused unread, else 0."""
        name = urlsplit(f"//{headers.get('host', '')}")
        if self._hosts is not None and (name.hostname or "") not in self._hosts:
            return 403, "this page does not go by that name"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403, "requests of other sites are refused"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > _MAX_BODY:
            return 413, f"the request is larger than {_MAX_BODY >> 20} MiB"
        path = scope["path"]
        if "/proxy=" in path:
            return 403, "the page fetches nothing from other addresses"
        for mark in ("/file=", "/file/"):
            _, found, file = path.partition(f"/gradio_api{mark}")
            if found and not self._may_give(file):
                return 403, "that file is not given out"
        return 0, ""

    def _may_give(self, file: str) -> bool:
        """Gradio decides on what it copied for the page; of the folders themselves only PNGs that lie in them."""
        if "\0" in file or file.lower().lstrip("/").startswith(("http:", "https:")):
            return False
        path = Path(os.path.abspath(file))
        if not any(path.is_relative_to(s) for s in self._served):
            return True
        real = path.resolve()
        return real.suffix == ".png" and any(real.is_relative_to(s) for s in self._served)


def _names_an_address(body: bytes) -> bool:
    """Whether a request has Gradio fetch a file from an address: an object whose "path" is one."""
    try:
        waiting = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return False  # Gradio refuses what is no JSON, or reads it as a form
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:")):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


async def _body(receive: Receive) -> bytes | None:
    """The whole of a request that is no upload; None where it is too large."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > _MAX_JSON:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receiver that gives a body that was read already, then what comes after it."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _bounded(receive: Receive) -> Receive:
    """A receiver that ends a request that turns out larger than it said."""
    count = 0

    async def bounded() -> dict[str, Any]:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > _MAX_BODY:
            return {"type": "http.disconnect"}
        return message

    return bounded


async def _refuse(send: Send, status: int, why: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})
