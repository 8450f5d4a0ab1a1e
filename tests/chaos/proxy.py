"""A TCP proxy between actor and learner that does what bad networks do. One thread, no root needed."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress

TURN_S = 0.002
CHUNK = 64 << 10
MAX_WAITING = 64  # chunks of one direction; with more it stops reading, as a router's queue would
BURST_S = 0.01  # a throttled line takes so much at once


class Pipe:
    """One direction of one connection: what was read and when it may be written."""

    def __init__(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        self.source, self.sink, self.from_client = source, sink, from_client
        self.waiting: deque[tuple[float, bytes]] = deque()  # b"" is the end
        self.free_at = 0.0  # when the throttled line is free again


class Proxy:
    """Forwards connections to the learner at `target`; its attributes may be changed at any time by any thread."""

    def __init__(self, target: str, seed: int = 0) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self._target = host, int(port)
        self.delay_s = self.jitter_s = 0.0  # each way
        self.bytes_per_s = 0.0  # each way; 0: no limit
        self.stalled = False  # nothing goes through, nothing is closed
        self.truncate = False  # the next chunk loses its second half, and the connection ends
        self.recorded: list[bytes] | None = None  # with a list: what clients sent
        self.connections = 0  # that were made so far
        self._random = random.Random(seed)
        self._cut = ""
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pipes: list[Pipe] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def cut(self, reset: bool = False) -> None:
        """Close every connection, politely or with RST; what is on its way is lost."""
        self._cut = "reset" if reset else "close"

    def close(self) -> None:
        """End the thread and every connection."""
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            left = False  # readable sockets that are not read would spin
            for key, _ in self._selector.select(TURN_S):
                if self.stalled or (key.data and len(key.data.waiting) >= MAX_WAITING):
                    left = True
                elif key.data:
                    self._read(key.data)
                else:
                    self._accept()
            if self._cut:
                reset, self._cut = self._cut == "reset", ""
                self._drop(self._pipes, reset)
            if not self.stalled:
                for pipe in list(self._pipes):
                    self._write(pipe)
            if left:
                time.sleep(TURN_S)
        self._drop(self._pipes)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=1.0)
        except OSError:  # nobody there: the connection ends
            client.close()
            return
        self.connections += 1
        for source, sink in ((client, server), (server, client)):
            source.setblocking(False)
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pipe = Pipe(source, sink, source is client)
            self._pipes.append(pipe)
            self._selector.register(source, selectors.EVENT_READ, pipe)

    def _read(self, pipe: Pipe) -> None:
        if pipe not in self._pipes:
            return  # dropped in this turn
        data = b""
        with suppress(OSError):
            data = pipe.source.recv(CHUNK)
        if not data:
            self._selector.unregister(pipe.source)
        elif self.recorded is not None and pipe.from_client:
            self.recorded.append(data)
        due = time.monotonic() + self.delay_s + self._random.uniform(0.0, self.jitter_s)
        if pipe.waiting:
            due = max(due, pipe.waiting[-1][0])  # TCP keeps the order
        pipe.waiting.append((due, data))

    def _write(self, pipe: Pipe) -> None:
        now = time.monotonic()
        while pipe.waiting and pipe.waiting[0][0] <= now and pipe.free_at <= now:
            due, data = pipe.waiting.popleft()
            rate = self.bytes_per_s
            part = data[: max(1, int(rate * BURST_S))] if rate else data
            part = part[: len(part) // 2] if self.truncate else part
            try:
                sent = pipe.sink.send(part) if part else 0
            except BlockingIOError:
                pipe.waiting.appendleft((due, data))
                return
            except OSError:
                data = b""
            if not data or self.truncate:
                self.truncate = self.truncate and not data
                ends = {pipe.source, pipe.sink}
                self._drop([each for each in self._pipes if each.source in ends])
                return
            if rate:  # a late turn is made up for, a pause is not
                pipe.free_at = max(pipe.free_at, now - 2 * BURST_S) + sent / rate
            if sent < len(data):
                pipe.waiting.appendleft((due, data[sent:]))

    def _drop(self, pipes: list[Pipe], reset: bool = False) -> None:
        self._pipes = [pipe for pipe in self._pipes if pipe not in pipes]
        for pipe in pipes:
            with suppress(KeyError):
                self._selector.unregister(pipe.source)
            if reset:
                pipe.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            pipe.source.close()
