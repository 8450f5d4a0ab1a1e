"""A ZeroMQ socket, how it is set up, and the one thread that touches it."""

from __future__ import annotations

import ipaddress
import re
import socket as sockets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from .wire import WireError

LINGER_MS = 300  # for the last messages at close
OPTIONS = {
    zmq.MAXMSGSIZE: 1 << 20, zmq.SNDHWM: 64, zmq.RCVHWM: 64, zmq.LINGER: 0, zmq.HANDSHAKE_IVL: 3000,
    zmq.HEARTBEAT_IVL: 500, zmq.HEARTBEAT_TIMEOUT: 1500, zmq.HEARTBEAT_TTL: 2000, zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 2000, zmq.TCP_KEEPALIVE: 1,
}


def configure(socket: zmq.Socket, address: str) -> str:
    """Set a socket up, before it binds or connects, for `address`, which is returned as ZeroMQ wants it.

    Keys belong here. Until they exist, raises WireError for an address off loopback.
    """
    match = re.fullmatch(r"tcp://([^:/]+):(\*|\d{1,5})", address)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise WireError(f"{address!r} is not an address; it looks like tcp://127.0.0.1:5555")
    host, loopback = "127.0.0.1" if match[1] == "localhost" else match[1], False
    with suppress(ValueError):
        loopback = ipaddress.ip_address(host).is_loopback
    if not loopback:
        raise WireError(
            f"{address} is not on this machine: the link has no keys yet, so it works on "
            "tcp://127.0.0.1:PORT only; between machines use a tunnel: "
            "`ssh -L 5555:127.0.0.1:5555 WORKSTATION`"
        )
    for option, value in OPTIONS.items():
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.ROUTER_MANDATORY if socket.type == zmq.ROUTER else zmq.IMMEDIATE, 1)
    return f"tcp://{host}:{match[2]}"


class Pump:
    """A socket and the one thread that touches it.

    The thread calls `turn(messages that came)`, which says for how many milliseconds to sleep at most, or
    None to end. `changed` guards what the thread shares with others; an error of the thread is kept for them.
    """

    def __init__(self, kind: int, address: str, turn: Callable[[list[list[bytes]]], int | None]) -> None:
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self._turn = turn
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        try:
            where = configure(self._socket, address)
            self._socket.bind(where) if kind == zmq.ROUTER else self._socket.connect(where)
        except (zmq.ZMQError, WireError) as error:
            self._context.destroy(0)
            if isinstance(error, WireError):
                raise
            raise WireError(
                f"cannot listen on {address}: {error.strerror}; stop what runs there "
                "(another `tether learner` or `tether run`?), or choose another port with --bind"
            ) from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._bell, self._ear = sockets.socketpair()
        for end in (self._bell, self._ear):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        """Let the thread run."""
        self._thread.start()

    def wake(self) -> None:
        """Have a turn now; from any thread."""
        with suppress(OSError):  # it is awake already, or closed
            self._bell.send(b"!")

    def send(self, frames: list[bytes]) -> bool:
        """From the thread only. False when the pipe is full or nobody is connected."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wait(self, ready: Callable[[], Any], timeout: float | None) -> None:
        """Holding `changed`: wait until `ready`, or until the thread failed, which is raised here."""
        self.changed.wait_for(lambda: ready() or self.error, timeout)
        self.check()

    def check(self) -> None:
        """Raise the error of the thread, if it had one."""
        if self.error is not None:
            prefix = "" if isinstance(self.error, WireError) else "the link failed: "
            raise WireError(f"{prefix}{self.error}") from self.error

    def fail(self, error: BaseException) -> None:
        """End the thread with an error for whoever calls next."""
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def close(self) -> None:
        """Wait for the thread to end, and let go of the address."""
        self.wake()
        self._thread.join()
        self._context.term()
        self._bell.close()
        self._ear.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._ear.fileno(), zmq.POLLIN)
        sleep_ms: int | None = 0
        try:
            while sleep_ms is not None and self.error is None:
                poller.poll(sleep_ms)
                with suppress(BlockingIOError):
                    self._ear.recv(4096)
                came: list[list[bytes]] = []
                with suppress(zmq.Again):
                    while len(came) < 64:
                        came.append(self._socket.recv_multipart(zmq.NOBLOCK))
                sleep_ms = self._turn(came)
        except BaseException as error:  # noqa: BLE001 - comes back from the next call
            self.fail(error)
        finally:
            self._socket.close(LINGER_MS)
