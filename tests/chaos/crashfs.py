"""A file system that ends at its k-th change: every point at which a save can be killed, one after the other.

Inside `CrashFS`, every file opened to be written, write, fsync, rename, unlink, rmdir and mkdir below one folder
has a number. The one with the number `crash_at` does not happen (of a write, the first half does); instead `end()`
is called, which raises Crash or ends the process. What the disk is then left with is one of three fates:

    killed  the process is gone: all that was done stays
    torn    power is gone: of each file only what was synced stays
    lost    power is gone, and with it every name made since its folder was last synced, while removals stay:
            the worst order that a file system may choose
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

FATES = ("killed", "torn", "lost")


class Crash(BaseException):
    """The end. No `except Exception` or `except OSError` survives it."""


def crash() -> NoReturn:
    """End by an exception."""
    raise Crash


class CrashFS:
    """Counts changes below `root` in `count`, and in `done` what they were; ends at number `crash_at` (from 1)."""

    def __init__(
        self, root: str | os.PathLike[str], crash_at: int = 0, fate: str = "killed", end: Callable[[], Any] = crash
    ) -> None:
        self.root, self.crash_at, self.fate, self._end = os.path.realpath(root), crash_at, fate, end
        self.count = 0
        self.done: list[str] = []
        self._real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")}
        self._real_open = io.open
        self._synced: dict[str, int] = {}  # bytes of each file written here that are sure
        self._made: list[tuple[str, str, bytes | None]] = []  # new name, the old one or "", what it replaced
        self._stack = ExitStack()

    def __enter__(self) -> CrashFS:
        calls: dict[str, Any] = dict.fromkeys(("rename", "replace"), self._rename)
        calls |= {"fsync": self._fsync, "mkdir": self._mkdir}
        calls |= {name: self._remover(name) for name in ("unlink", "rmdir")}
        for name, call in calls.items():
            self._stack.enter_context(mock.patch.object(os, name, call))
        self._stack.enter_context(mock.patch.object(io, "open", self._open))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def point(self, what: str, path: str) -> None:
        """One change is due: let it happen, or end here."""
        self.count += 1
        self.done.append(f"{what} {os.path.relpath(path, self.root)}")
        if self.count == self.crash_at:
            self._stack.close()  # whoever cleans up on the way out changes nothing
            self._lose()
            self._end()

    def _lose(self) -> None:
        """Leave what the fate leaves."""
        if self.fate in ("torn", "lost"):
            for path, size in self._synced.items():
                if os.path.isfile(path):
                    os.truncate(path, size)
        if self.fate == "lost":
            for new, old, replaced in reversed(self._made):
                if old and os.path.exists(new):
                    os.rename(new, old)
                elif os.path.isdir(new):
                    shutil.rmtree(new)
                elif os.path.exists(new):
                    os.unlink(new)
                if replaced is not None:
                    Path(new).write_bytes(replaced)

    def _inside(self, path: Any) -> str:
        """The real path, where it is below the root; else empty."""
        full = os.path.join(os.path.realpath(os.path.dirname(os.fspath(path))), os.path.basename(os.fspath(path)))
        return full if full.startswith(self.root + os.sep) else ""

    def _open(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        path = self._inside(file) if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+") else ""
        if not path:
            return self._real_open(file, mode, *rest, **named)
        assert mode == "wb", f"{mode}: not modelled here"
        self.point("open", path)
        if not os.path.exists(path):
            self._made.append((path, "", None))
        self._synced[path] = 0
        return _File(self, path, self._real_open(file, mode, buffering=0))

    def _fsync(self, descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        path = name if name == self.root else self._inside(name)
        if not path:
            self._real["fsync"](descriptor)
            return
        self.point("fsync", path)  # to count as synced is enough: this power never fails
        if os.path.isdir(path):
            self._made = [row for row in self._made if os.path.dirname(row[0]) != path]
        else:
            self._synced[path] = os.path.getsize(path)

    def _rename(self, old: Any, new: Any) -> None:
        source, target = self._inside(old), self._inside(new)
        self.point("rename", target)
        replaced = Path(target).read_bytes() if os.path.isfile(target) else None
        self._real["replace"](source, target)
        moved = [path for path in self._synced if path == source or path.startswith(source + os.sep)]
        for path in moved:
            self._synced[target + path[len(source) :]] = self._synced.pop(path)
        self._made = [(_moved(a, source, target), b, c) for a, b, c in self._made if a != source]
        self._made.append((target, source, replaced))

    def _mkdir(self, path: Any, *rest: Any, **named: Any) -> None:
        if (inside := self._inside(path)) and not os.path.exists(inside):
            self.point("mkdir", inside)
            self._made.append((inside, "", None))
        self._real["mkdir"](path, *rest, **named)

    def _remover(self, name: str) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")  # as shutil.rmtree does
            if inside := self._inside(os.path.join(folder, path)):
                self.point(name, inside)
                self._synced.pop(inside, None)
            self._real[name](path, dir_fd=dir_fd)

        return remove


class _File:
    """A file whose writes are changes, each at once on the disk."""

    def __init__(self, fs: CrashFS, path: str, raw: Any) -> None:
        self._fs, self._path, self._raw = fs, path, raw

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._raw.close()

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self._raw.write(data[:half])
        self._fs.point("write", self._path)
        self._raw.write(data[half:])
        return len(data)

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return int(self._raw.fileno())


def _moved(path: str, source: str, target: str) -> str:
    return target + path[len(source) :] if path.startswith(source + os.sep) else path
