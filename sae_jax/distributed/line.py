"""A line from the first process to each other one, so that all know at once when one ends, and how."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sae_jax.base import InputError
from sae_jax.distributed.relay import relay

GONE = 3
"""Exit status of a process whose fellow died."""
REFUSED = 2
"""Exit status where any process was given what cannot be used."""
SECONDS_TO_ANSWER = 5.0
SECONDS_OF_SILENCE, PROBES, SECONDS_BETWEEN_PROBES = 10, 3, 5
"""A host that lost its power or its network is gone after 10 + 3 * 5 seconds."""


@dataclass(frozen=True)
class Line:
    """The connections of one process: the first's to all others, another's to the first."""

    process: int
    processes: int
    jax_port: int
    """Of this machine, where JAX's coordination is reached."""
    hosts: dict[int, str]
    peers: dict[int, socket.socket]
    then: str
    """What a reader should do when a process is gone."""
    listeners: list[threading.Thread] = field(default_factory=list)
    leaving: threading.Lock = field(default_factory=threading.Lock)

    def watch(self) -> None:
        """Listen from now on, and end this process with a sentence when another is gone."""
        for peer in self.peers:
            thread = threading.Thread(target=self._listen, args=(peer,), daemon=True)
            self.listeners.append(thread)
            thread.start()

    def goodbye(self) -> None:
        """Wait until every process comes here; then none need miss another."""
        if self.process > 0:
            _send(self.peers[0], {"bye": True})
        for thread in self.listeners:
            thread.join()
        if self.process == 0:
            self._tell_others({"bye": True})

    def refuse(self, sentence: str) -> None:
        """End all other processes, the first telling the sentence; returns where this one is to tell it."""
        if self.process == 0:
            self.leaving.acquire()
            self._tell_others({"end": [REFUSED, ""]})
        else:
            _send(self.peers[0], {"refused": sentence})
            self.wait()

    def wait(self) -> None:
        """Give the listeners time to end this process, if another has ended."""
        time.sleep(SECONDS_TO_ANSWER)

    def _listen(self, peer: int) -> None:
        for message in _messages(self.peers[peer]):
            if "bye" in message:
                return
            if "refused" in message:
                self._end(REFUSED, f"{message['refused']} ({self._name(peer)})", tell_others="")
            if "end" in message:
                self._end(*message["end"])
        gone = f"{self._name(peer)} is gone: {self.then}"
        self._end(GONE, gone, tell_others=gone)

    def _end(self, status: int, sentence: str, tell_others: str = "") -> None:
        self.leaving.acquire()  # for good: one sentence is enough
        if self.process == 0:
            self._tell_others({"end": [status, tell_others]})
        if sentence:
            shown = "\033[?25h\r" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
            os.write(2, f"{shown}sae-jax: {sentence}\n".encode())
        os._exit(status)

    def _tell_others(self, message: dict[str, Any]) -> None:
        for peer in self.peers.values():
            _send(peer, message)

    def _name(self, process: int) -> str:
        return _name(process, self.processes, self.hosts[process])


def gather(port: int, processes: int, about: dict[str, Any], then: str, seconds: float) -> Line:
    """The first process's side: wait for all others, see that they are alike, and let all go on together.

    Args:
      port: to listen at.
      processes: how many there are, this one counted.
      about: plain values in which all processes must agree, such as versions.
      then: what to do when a process is gone, for its sentence.
      seconds: how long to wait.

    Raises:
      InputError: one did not come, or differs.
    """
    host, until = socket.gethostname(), time.monotonic() + seconds
    about = {"processes": processes, **about}
    callers: list[_Caller] = []
    wrong = None
    with server_at(port) as server:
        while len(callers) < processes - 1 and wrong is None:
            caller = _next_caller(server, until)
            if caller is None:
                come = {caller.process for caller in callers}
                missing = ", ".join(str(process) for process in range(1, processes) if process not in come)
                wrong = f"process {missing} of {processes} did not come to {host}:{port} within {seconds:g} s"
            else:
                wrong = _unfit(caller, callers, about)
                callers.append(caller)
    with server_at(0) as server:
        jax_port = server.getsockname()[1]
    for caller in callers:
        _send(caller.connection, {"wrong": wrong, "jax_port": jax_port, "host": host})
    if wrong is not None:
        raise InputError(wrong)
    hosts = {0: host} | {caller.process: caller.host for caller in callers}
    peers = {caller.process: caller.connection for caller in callers}
    return Line(0, processes, jax_port, hosts, peers, then)


def join(
    host: str, port: int, process: int, processes: int, about: dict[str, Any], then: str, seconds: float
) -> Line:
    """The side of every other process.

    Args:
      host: of the first process.
      port: at which it listens.
      process: this one's number.
      processes: how many there are.
      about: as for `gather`.
      then: as for `gather`.
      seconds: how long to try.

    Raises:
      InputError: the first process cannot be reached.
      SystemExit: something differs, which the first process tells.
    """
    first = _reached(host, port, seconds)
    _keep_alive(first)
    about = {"processes": processes, **about}
    _send(first, {"process": process, "host": socket.gethostname(), "about": about})
    answer = _first_message(first, seconds + SECONDS_TO_ANSWER)
    if not answer.keys() >= {"wrong", "jax_port", "host"}:
        raise InputError(f"{host}:{port} is no first process of a run, or ended before all had come")
    if answer["wrong"] is not None:
        raise SystemExit(REFUSED)  # the first process tells it
    jax_port = relay(host, answer["jax_port"])
    return Line(process, processes, jax_port, {0: answer["host"]}, {0: first}, then)


def difference(first: dict[str, Any], other: dict[str, Any], name: str) -> str | None:
    """The first difference between what two processes have, as a sentence; None where there is none."""
    for key in first | other:
        if first.get(key) != other.get(key):
            return f"{name} has {key} {other.get(key)}, the first process {first.get(key)}"
    return None


def server_at(port: int) -> socket.socket:
    """A server at a port of all this host's addresses; 0 for any port that is free."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise InputError(f"the first process cannot listen at port {port}: {error.strerror}") from error


class _Caller(NamedTuple):
    process: int
    host: str
    about: dict[str, Any]
    connection: socket.socket


def _next_caller(server: socket.socket, until: float) -> _Caller | None:
    """The next process that calls; None if none does in time."""
    while True:
        server.settimeout(max(until - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return None
        hello = _first_message(connection, SECONDS_TO_ANSWER)
        if hello.keys() >= {"process", "host", "about"}:  # and no stranger
            _keep_alive(connection)
            return _Caller(hello["process"], hello["host"], hello["about"], connection)


def _unfit(caller: _Caller, others: Sequence[_Caller], about: dict[str, Any]) -> str | None:
    """Why a process cannot be one of the run."""
    name = _name(caller.process, about["processes"], caller.host)
    twins = [other.host for other in others if other.process == caller.process]
    return f"{name} is on {twins[0]} as well" if twins else difference(about, caller.about, name)


def _name(process: int, processes: int, host: str) -> str:
    return f"process {process} of {processes} on {host}"


def _reached(host: str, port: int, seconds: float) -> socket.socket:
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER)
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"no process 0 at {host}:{port} within {seconds:g} s ({error.strerror or error}): "
                    "see that it was started there, and that the port is open"
                ) from error
        time.sleep(0.2)


def _messages(peer: socket.socket) -> Iterator[dict[str, Any]]:
    """What arrives, until the other side is gone."""
    with suppress(OSError, ValueError), peer.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _first_message(peer: socket.socket, seconds: float) -> dict[str, Any]:
    """The first message, nothing of what follows; empty if none comes."""
    peer.settimeout(seconds)
    data = b""
    with suppress(OSError, ValueError):
        while not data.endswith(b"\n") and (byte := peer.recv(1)):
            data += byte
        peer.settimeout(None)
        return dict(json.loads(data))
    return {}


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # who listens to it notices that it is gone
        peer.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(peer: socket.socket) -> None:
    idle = getattr(socket, "TCP_KEEPIDLE", 0x10)  # macOS has it by another name
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, idle, SECONDS_OF_SILENCE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SECONDS_BETWEEN_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES),
    ):
        peer.setsockopt(level, option, value)
