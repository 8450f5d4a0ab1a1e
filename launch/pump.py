"""A ZeroMQ socket, how it is set up, and the one thread that touches it."""

from __future__ import annotations

import math
import re
import select
import socket as sockets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from ..robot_env.record import RecordError
from . import keys
from .wire import Malformed, WireError

LINGER_MS = 300  # for the last messages at close
TICK_MS = 50  # at most between two turns
GATHER_S = 0.25  # for messages that may wait: waking up, and a disk, cost the same for one and for many
# No ZMTP heartbeats: libzmq 4.3.5 aborts the process when one is due while a dead peer's messages wait to be read
# (zeromq/libzmq#4364). The kernel notices a dead peer, and the actor a silent one.
OPTIONS = {
    zmq.MAXMSGSIZE: 1 << 20, zmq.SNDHWM: 64, zmq.RCVHWM: 64, zmq.LINGER: 0, zmq.HANDSHAKE_IVL: 3000,
    zmq.CONNECT_TIMEOUT: 2000, zmq.RECONNECT_IVL: 100, zmq.RECONNECT_IVL_MAX: 500, zmq.TCP_MAXRT: 2000,
    zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 2, zmq.TCP_KEEPALIVE_INTVL: 1, zmq.TCP_KEEPALIVE_CNT: 3,
}


def keys_for(address: str, mine: str) -> keys.Keys | None:
    """The keys that an address needs, if any, of the file `mine`. Raises WireError or KeysError."""
    match = re.fullmatch(r"tcp://[\w.*-]+:(?:\*|(\d{1,5}))", address)
    if match is None or int(match[1] or 0) > 65535:
        raise WireError(f"{address!r} is no address; write one as tcp://127.0.0.1:5555 or tcp://workstation:5555")
    return keys.needed(address, mine)


class Pump:
    """A socket and the one thread that touches it.

    The thread calls `take(frames)` for each message that came, which raises Malformed or RecordError for one to
    drop, and then `turn()`, at least every TICK_MS; it returns True to be called again at once, None to end. While
    `resting()` messages may gather for GATHER_S, or until somebody wakes it. Any other error of the thread ends it,
    and is kept for whoever calls next. Off loopback both ends have keys, or KeysError is raised.
    """

    def __init__(self, kind: int, address: str) -> None:
        mine = keys_for(address, "learner.key" if kind == zmq.ROUTER else "actor.key")
        self.locked, self._keys = mine is not None, keys.folder()
        self._guarded = self.locked and kind == zmq.ROUTER
        self.peer = ""  # name of the actor whose message is being taken; without keys nobody knows
        self._changed = threading.Condition()
        self.error: BaseException | None = None  # ended the thread
        self.malformed = 0  # messages dropped
        self.end_by = math.inf  # set by close
        self.resting: Callable[[], Any] = lambda: False
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        must = zmq.ROUTER_MANDATORY if kind == zmq.ROUTER else zmq.IMMEDIATE
        for option, value in (OPTIONS | {must: 1}).items():
            self._socket.setsockopt(option, value)
        self._door = self._context.socket(zmq.REP)  # where ZeroMQ asks who may come in
        self._door.bind("inproc://zeromq.zap.01")
        try:
            if mine is not None:
                mine.lock(self._socket)
            reach = self._socket.bind if kind == zmq.ROUTER else self._socket.connect
            reach(address.replace("localhost", "127.0.0.1"))
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise WireError(
                f"cannot listen on {address}: {error.strerror}; stop what runs there "
                "(another `tether learner` or `tether run`?), or choose another port with --bind"
            ) from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._bell, self._ear = sockets.socketpair()

    def start(self, take: Callable[[list[bytes]], None], turn: Callable[[], bool | None]) -> None:
        """Let the thread run."""
        self._thread = threading.Thread(target=self._run, args=(take, turn), name="link", daemon=True)
        self._thread.start()

    def send(self, frames: list[bytes]) -> bool:
        """From the thread only. False when the pipe is full or nobody is connected."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def reconnect(self) -> None:
        """From the thread only, for a DEALER: on a new connection; what the old one had not sent is gone."""
        self._socket.disconnect(self.address)
        self._socket.connect(self.address)

    def wake(self) -> None:
        """Have a turn now; from any thread. Raises the error of the thread, if it had one."""
        self.check()
        with suppress(OSError):  # it is awake already, or closed
            self._bell.send(b"!", sockets.MSG_DONTWAIT)

    def wait(self, ready: Callable[[], Any], timeout: float) -> bool:
        """Wait until `ready`, or until the thread failed, which is raised here; whether it is ready."""
        with self._changed:
            self._changed.wait_for(lambda: ready() or self.error, timeout)
            self.check()
            return bool(ready())

    def check(self) -> None:
        """Raise the error that ended the thread, if there is one."""
        if self.error is not None:
            raise WireError(f"the link failed: {self.error}") from self.error

    def close(self, timeout: float = 0.0) -> None:
        """Wait for the thread to end, which `timeout` s from now should be done, and let go of the address."""
        self.end_by = min(self.end_by, time.monotonic() + timeout)
        with suppress(WireError):
            self.wake()
        self._thread.join()
        self._context.term()
        self._bell.close()
        self._ear.close()

    def _run(self, take: Callable[[list[bytes]], None], turn: Callable[[], bool | None]) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        poller.register(self._door, zmq.POLLIN)
        again: bool | None = True
        try:
            while again is not None:
                rest = not again and self.resting()
                if rest:
                    select.select([self._ear], [], [], GATHER_S)
                awake = dict(poller.poll(0 if again or rest else TICK_MS))
                if self._ear.fileno() in awake:
                    self._ear.recv(4096)
                if self._door in awake:
                    self._door.send_multipart(keys.admit(self._door.recv_multipart(), self._keys))
                with suppress(zmq.Again):
                    for _ in range(64):
                        frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                        self.peer = str(frames[0].get("User-Id")) if self._guarded else ""
                        try:
                            take([frame.bytes for frame in frames])
                        except (Malformed, RecordError):
                            self.malformed += 1
                again = turn()
                with self._changed:
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - comes back from the next call
            self.error = error
        self._socket.close(LINGER_MS)
        self._door.close(0)
        with self._changed:
            self._changed.notify_all()
