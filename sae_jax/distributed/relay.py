"""A way round the abort with which JAX's client meets the end of the first process."""

import socket
import threading
import time
from contextlib import suppress

SECONDS_TO_LINGER = 10.0


def relay(host: str, port: int) -> int:
    """A port of this machine that leads to JAX's service in the first process, and outlives it for a while.

    JAX's client aborts its process, with a page of stack traces, as soon as it sees that connection closed.
    Through the relay it does not see it, and the line has the first word.

    Args:
      host: of the first process.
      port: of the service; it may not be there yet.
    """
    server = socket.create_server(("127.0.0.1", 0))
    _in_background(_serve, server, (host, port))
    return server.getsockname()[1]


def _serve(server: socket.socket, address: tuple[str, int]) -> None:
    while True:
        near, _ = server.accept()
        _in_background(_connect, near, address)


def _connect(near: socket.socket, address: tuple[str, int]) -> None:
    far = None
    while far is None:  # JAX's client has its own limit to waiting
        try:
            far = socket.create_connection(address)
        except OSError:
            time.sleep(0.1)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _in_background(_copy, near, far, 0.0)
    _copy(far, near, SECONDS_TO_LINGER)


def _copy(source: socket.socket, sink: socket.socket, linger: float) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    time.sleep(linger)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _in_background(function, *arguments) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()
