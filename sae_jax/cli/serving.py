"""A small HTTP server for a page beside a run: a few paths, to be read only, and never in the run's way."""

import errno
import ipaddress
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs

from sae_jax.base import InputError, require

CLIENTS = 32
"""Connections at a time; more are hung up on, so that no crowd takes the memory that training needs."""
SECONDS_FOR_A_CLIENT = 5.0
"""To say or to take something, before it is hung up on."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PAGE = "X-Page"
"""The header in which a page says which one it is; where it navigates, `?page=` does."""


class Answer(NamedTuple):
    """What is at a path."""

    kind: str
    """Its media type."""
    body: bytes
    tag: str = ""
    """An ETag; who has this one already is sent no body."""
    sent: Callable[[], None] | None = None
    """To be called when it was sent."""


Answers = Callable[[str, str], Answer | None]
"""(path, name of the page that asks, or "") -> what is there."""


class Server(socketserver.ThreadingTCPServer):
    """Listens from the moment that it is made; answers from `start` until it is closed.

    Args:
      host: a name or an address of this machine.
      port: 0 for any that is free.

    Raises:
      InputError: the port is in use or not allowed, or the address is not this machine's.
    """

    allow_reuse_address, daemon_threads, block_on_close = True, True, False
    request_queue_size = CLIENTS

    def __init__(self, host: str, port: int):
        require(0 <= port < 2**16, f"a port is a number from 0 to 65535, got {port}")
        self.host, self.room = host, threading.Semaphore(CLIENTS)
        self.answers: Answers | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self.address_family, address = found[0], cast(tuple[str, int], found[4])
            super().__init__(address, Handler)
        except OSError as error:
            raise InputError(_told(error, host, port)) from None
        except UnicodeError:
            raise InputError(f"{host} is no address: give one of this machine's") from None
        self.address: str = self.socket.getsockname()[0]
        self.port: int = self.socket.getsockname()[1]

    def start(self, answers: Answers) -> None:
        """Answer from now on, in threads of its own."""
        self.answers = answers
        threading.Thread(target=self.serve_forever, args=(0.2,), daemon=True).start()

    def server_close(self) -> None:
        """Stop answering, and let go of the port."""
        if self.answers is not None:
            self.shutdown()
        super().server_close()

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.address.partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        """Where it is."""
        unspecified = ipaddress.ip_address(self.address.partition("%")[0]).is_unspecified
        host = socket.gethostname() if unspecified else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server, as that of a site whose name was led here does not.

        The port may be another, as where it is forwarded. Beyond this machine any address will do: only
        names can be made to lead elsewhere.
        """
        name = host.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return not self.local and name == socket.gethostname().lower()
        return address.is_loopback or not self.local

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, if there is room for one more."""
        if self.room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One client."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nobody's business; the terminal is the run's."""


class Handler(BaseHTTPRequestHandler):
    """One request of one client."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SECONDS_FOR_A_CLIENT
    server_version, sys_version = "sae-jax", ""

    def do_GET(self) -> None:
        """What is at the path, for a client that names this server."""
        path, _, query = self.path.partition("?")
        page = self.headers.get(PAGE) or parse_qs(query).get("page", [""])[0]
        if not self.server.knows(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        answer = self.server.answers and self.server.answers(path, page)
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        known = bool(answer.tag) and self.headers.get("If-None-Match") == answer.tag
        self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
        if answer.tag:
            self.send_header("ETag", answer.tag)
        if not known:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if not known and self.command == "GET":
            self.wfile.write(answer.body)
        if answer.sent is not None:
            answer.sent()

    do_HEAD = do_GET  # noqa: N815, the name is http.server's

    def end_headers(self) -> None:
        """With what keeps other sites out, whatever is answered."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the run's."""


def _told(error: OSError, host: str, port: int) -> str:
    """Why nothing can be served there, as a sentence."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: give another with --live-port, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} of {host} may not be served by this user: give one above 1023 with --live-port"
    return f"nothing can be served at {host} ({error.strerror}): --live-host takes an address of this machine"
