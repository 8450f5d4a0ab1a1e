"""The keys of the link: CURVE pairs (RFC 26/CurveZMQ), and who may come in.

    learner.key         the learner's pair
    actors/NAME.pub     an actor that is let in: its public key; delete the file to shut it out
    actors/NAME.key     what its robot needs: its pair and the learner's public key
    actor.key           on the robot: the file above, carried there by hand

They lie in ~/.config/tether/keys, or where TETHER_KEYS says; `.key` files are secret, mode 0600.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

LOOPBACK = re.compile(r"tcp://(?:localhost|127(?:\.\d{1,3}){3}):[^:]*")
NAME = re.compile("[a-z0-9][a-z0-9-]{0,31}")
Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # 32 bytes in text (RFC 32)
LEARNER = "learner"


class KeysError(RuntimeError):
    """Keys that are missing, damaged, or readable by others: says which file and what to do."""


@dataclass(frozen=True)
class Keys:
    """One end's pair, and of an actor the key of the learner it trusts."""

    name: str
    public: str
    secret: str
    learner: str = ""

    def lock(self, socket: zmq.Socket[bytes]) -> None:
        """Encrypt and authenticate what goes through a socket that is not bound or connected yet."""
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()
        if self.learner:
            socket.curve_serverkey = self.learner.encode()
        else:
            socket.curve_server = True
            socket.zap_domain = b"tether"
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a doorman nobody comes in


def folder() -> Path:
    """Where the keys lie."""
    return Path(os.environ.get("TETHER_KEYS") or Path.home() / ".config" / "tether" / "keys")


def make(names: list[str]) -> list[str]:
    """Make the learner's keys, where there are none, and those of the actors `names`. Returns lines to print."""
    for name in names:
        if not NAME.fullmatch(name) or name == LEARNER:
            raise KeysError(f"{name!r}: an actor's name is made of a-z, 0-9 and -, at most 32, and is not {LEARNER!r}")
        if (folder() / "actors" / f"{name}.pub").exists():
            raise KeysError(f"{name} has keys already; delete {folder()}/actors/{name}.pub to make new ones")
    if not names and not (folder() / "learner.key").exists() and (folder() / "actor.key").exists():  # a robot
        mine = _read(folder() / "actor.key")
        return [f"actor {mine.name} {mine.public}, of learner {mine.learner}  {folder()}"]
    if not (folder() / "learner.key").exists():
        _write(folder() / "learner.key", Keys(LEARNER, *_pair()))
    public = _read(folder() / "learner.key").public
    lines = [f"learner {public}  {folder()}"]
    for name in names:
        keys = Keys(name, *_pair(), public)
        _write(folder() / "actors" / f"{name}.key", keys)
        (folder() / "actors" / f"{name}.pub").write_text(keys.public + "\n")
        file = folder() / "actors" / f"{name}.key"
        lines.append(f"bring robot {name} its keys, and delete them here:")
        lines.append("    ssh ROBOT 'mkdir -p -m 700 .config/tether/keys'")
        lines.append(f"    scp -p {file} ROBOT:.config/tether/keys/actor.key && rm {file}")
    return lines + [f"actor {name} {key}" for key, name in allowed(folder()).items()]


def allowed(where: Path) -> dict[str, str]:
    """The name of the actor behind each public key that is let in by the keys in `where`."""
    return {path.read_text().strip(): path.stem for path in sorted((where / "actors").glob("*.pub"))}


def needed(address: str, mine: str) -> Keys | None:
    """The keys of `mine` ("learner.key" or "actor.key") for an address; None on loopback, which needs none."""
    if LOOPBACK.fullmatch(address):
        return None
    if not (folder() / mine).exists():
        how = f"there is no {folder() / mine}; `tether keys NAME` on the learner's machine makes the keys of robot NAME"
        raise KeysError(f"{address} goes beyond this machine, which needs keys: {how}")
    keys = _read(folder() / mine)
    if bool(keys.learner) == (mine == "learner.key"):
        raise KeysError(f"{folder() / mine} is the key of {keys.name!r}; `tether keys` says which file goes where")
    return keys


def admit(request: list[bytes], where: Path) -> list[bytes]:
    """The answer to a ZAP request (RFC 27): yes to CURVE with an allowed key, whose actor's name is the User-Id."""
    name = ""
    if len(request) == 7 and request[5] == b"CURVE" and len(request[6]) == 32:
        name = allowed(where).get(z85.encode(request[6]).decode(), "")
    status, text = (b"200", b"OK") if name else (b"400", b"no actor of this learner")
    return [b"1.0", request[1] if len(request) > 1 else b"", status, text, name.encode(), b""]


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _write(path: Path, keys: Keys) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(keys), file)


def _read(path: Path) -> Keys:
    if path.stat().st_mode & 0o077:
        raise KeysError(f"{path} can be read by others; say `chmod 600 {path}`, or make new keys if somebody may have")
    try:
        keys = Keys(**json.loads(path.read_text(encoding="utf-8")))
        good = all(Z85.fullmatch(key) for key in (keys.public, keys.secret, keys.learner or keys.public))
    except (ValueError, TypeError):
        good = False
    if not good:
        raise KeysError(f"{path} is damaged; make new keys with `tether keys NAME`")
    return keys
