"""Every number a training run is decided by: presets stacked left to right, then `--set`, checked and saved,
and the run's folder, which says so.

Order, the later wins: `full` (as published), then each preset named by the user; within a preset its tables
`[agent] [learner] [actor]`, then `[family.<kind of task>...]`; last `--set section.key=value`. What `[agent]`
takes is what the algorithm's own `Config` takes. An `[agent]` table is for the algorithm it names, a preset's else
for the one named before; of a family's that names none every algorithm takes what it knows.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

from ..robot_env.takeover import WHO
from . import catalog

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_FORMAT = 1  # of a run folder; another one is refused
FAMILIES = ("course", "walk", "manipulate", "gym")
_SHIPPED = Path(__file__).parent / "presets"
_SPOKEN = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes",
    tuple[int, ...]: "a list of whole numbers", type(None): '"none"',
}  # fmt: skip


class ConfigError(ValueError):
    """A setting that cannot be used: the message names source, key and the valid choices."""


class RunError(ValueError):
    """A run folder that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Learner:
    """How the learner spends its steps."""

    steps: int = 250_000  # of the whole training
    start_steps: int = 5_000  # before the first update; with prior data alone (no --from) updates begin at once
    publish_every: int = 1  # steps between two versions of the weights
    max_lead: int = 2  # steps a twin may run ahead of training
    snapshot_every_s: float = 60.0
    replay_capacity: int = 1_000_000
    log_every: int = 200  # steps between two lines of learn/ metrics
    held_out: int = 20  # one block of 50 steps in so many (2 or more) is kept from training, to measure on; 0: none
    prior_share: float = 0.5  # of each mini-batch, where there is prior data; takeovers count as such too
    prior_share_end: float = 0.0  # reached after prior_anneal updates, linearly
    prior_anneal: int = 0  # updates; 0: prior_share stays as it is
    # of the step before a takeover begins; with it no other step has a reward (RLIF, systems.md 7)
    takeover_reward: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            share, least = name in ("prior_share", "prior_share_end"), 0 if name in ("prior_anneal", "held_out") else 1
            if share and not 0 <= value <= 1:
                raise ValueError(f"{name} = {value:g}: must lie between 0 and 1")
            if not share and name != "takeover_reward" and value < least:
                raise ValueError(f"{name} = {value:g}: must be at least {least}")
        if self.held_out == 1:
            raise ValueError("held_out = 1: nothing is left to train on; must be 0 or at least 2")


@dataclass(frozen=True)
class Actor:
    """How an actor behaves, before it has learned anything and where it goes wrong."""

    random_steps: int = 5_000  # uniformly random actions before the policy drives
    random_bound: float = 1.0  # and their largest magnitude
    auto_reset: bool = True  # off only to show what practice without it is worth
    takeover: str = "none"  # who takes the stick where it goes wrong, one of takeover.WHO
    takeover_quality: float = 1.0  # 0 (missing) to 1 (clean) of the script that does

    def __post_init__(self) -> None:
        if self.takeover not in WHO:
            raise ValueError(f"takeover = {self.takeover!r}: must be one of {', '.join(WHO)}")
        if not 0 <= self.takeover_quality <= 1:
            raise ValueError(f"takeover_quality = {self.takeover_quality:g}: must lie between 0 and 1")
        if not 0 < self.random_bound <= 1:
            raise ValueError(f"random_bound = {self.random_bound:g}: must lie in (0, 1]")


@dataclass(frozen=True)
class Config:
    """The merged settings of one run. `agent` holds the arguments of the algorithm's Config."""

    preset: str
    family: str
    algorithm: str
    agent: Mapping[str, Any]
    learner: Learner
    actor: Actor


def presets() -> list[str]:
    """Names of the presets in the package."""
    return sorted(p.stem for p in _SHIPPED.glob("*.toml"))


def load(preset: str = "cpu", family: str = "course", overrides: Iterable[str] = ()) -> Config:
    """Settings for a task of kind `family`.

    `preset`: shipped names or paths of .toml files, several separated by commas; `overrides`:
    "section.key=value" with a TOML value ("none" where a setting may be absent). Raises ConfigError.
    """
    layers: list[Layer] = []
    algorithm = ""
    for name in ["full", *(n.strip() for n in preset.split(",") if n.strip() != "full")]:
        path = _SHIPPED / f"{name}.toml" if name in presets() else Path(name)
        if path.suffix != ".toml" or not path.is_file():
            raise ConfigError(f"no preset {name!r}; give {', '.join(presets())} or the path of a .toml file")
        table = _toml(path)
        families = table.pop("family", {})
        _known(families, FAMILIES, f"{path}: family.")
        algorithm = _named(table) or algorithm
        own = families.get(family, {})
        layers += [Layer(str(path), table, algorithm), Layer(str(path), own, _named(own) or algorithm, not _named(own))]
    layers += [Layer("--set", _override(text)) for text in overrides]
    return _merge(preset, family, layers)


class Layer(NamedTuple):
    """One table of settings, {section: {key: value}}."""

    source: str
    table: dict[str, Any]
    algorithm: str = ""  # that its [agent] was written for, where it was
    others_too: bool = False  # as far as they know what it sets


def _merge(preset: str, family: str, layers: list[Layer]) -> Config:
    """One Config of several layers, the later ones winning."""
    algorithm = "rlpd"
    for source, table, *_ in layers:
        _known(table, ("agent", "learner", "actor"), f"{source}: ")
        for section, values in table.items():
            _known(values, values, f"{source}: {section}.")
        algorithm = str(table.get("agent", {}).pop("algorithm", algorithm))
    schemas = {"agent": catalog.algorithm(algorithm).Config, "learner": Learner, "actor": Actor}
    built: dict[str, Any] = {}
    for section, schema in schemas.items():
        kinds = get_type_hints(schema)
        merged: dict[str, Any] = {}
        for source, table, written_for, others_too in layers:
            values = table.get(section, {})
            if section == "agent" and written_for not in ("", algorithm):
                values = {k: v for k, v in values.items() if others_too and k in kinds}
            _known(values, kinds, f"{source}: {section}.")
            merged |= {k: _typed(v, kinds[k], f"{source}: {section}.{k}") for k, v in values.items()}
        try:
            built[section] = schema(**merged)
        except ValueError as error:
            raise ConfigError(f"[{section}] {error}") from None
    return Config(preset, family, algorithm, asdict(built["agent"]), built["learner"], built["actor"])


def _named(table: Any) -> str:
    """The algorithm that a table's [agent] names, or ""."""
    agent = table.get("agent", {}) if isinstance(table, dict) else {}
    return str(agent.get("algorithm", "")) if isinstance(agent, dict) else ""


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise ConfigError(f"--set {text}: write section.key=value, such as agent.gamma=0.98")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word: no quotes to get through a shell
    return {section: {name: parsed}}


def _known(table: Any, valid: Iterable[str], where: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{where.rstrip('.')} must be a table of settings, not {table!r}")
    for key in table:
        if key not in valid:
            raise ConfigError(f"{where}{key} is no setting; valid are {', '.join(valid)}")


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` of TOML as the annotated type `kind` of a setting, or ConfigError."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for one in kinds:
        if one is type(None) and value == "none":
            return None
        if one is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if one in (int, bool, str) and type(value) is one:
            return value
        if one == tuple[int, ...] and isinstance(value, list) and {type(v) for v in value} == {int}:
            return tuple(value)
    if set(kinds) <= set(_SPOKEN):
        raise ConfigError(f"{where} must be {' or '.join(_SPOKEN[k] for k in kinds)}, not {value!r}")
    return value  # a plug-in's own type: its Config checks it


def dump(config: Config, **run: Any) -> str:
    """`config.toml`: the settings, the git revision, and what else was decided (task, seed: TOML scalars)."""
    origin = {"format": RUN_FORMAT, "git": revision(), "preset": config.preset, "family": config.family}
    sections = {
        "run": origin | run,
        "agent": {"algorithm": config.algorithm, **config.agent},
        "learner": vars(config.learner),
        "actor": vars(config.actor),
    }
    lines = ["# Written by tether: what this run was decided by."]
    for section, values in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {toml(v)}" for key, v in values.items())]
    return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """A setting as config.toml and --set have it; None is "none"."""
    text = str(value)
    if text.endswith("\n") and text.replace("\n", "").isprintable() and "'''" not in text:
        return f"'''\n{text}'''"  # a task file as it was, for people
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read(run: str | Path, overrides: Iterable[str] = ()) -> tuple[Config, dict[str, Any]]:
    """The settings of a run folder, with `overrides` as in `load`, and its `[run]` table.

    Raises ConfigError with file, cause and remedy.
    """
    path = Path(run) / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{run}: not a run folder (no config.toml); runs lie in runs/, or where --out said")
    data = _toml(path)
    head = data.pop("run", None)
    if not isinstance(head, dict) or head.get("format") != RUN_FORMAT:
        raise ConfigError(
            f"{path}: a run of another format, this version reads {RUN_FORMAT}; "
            "open it with the version that made it, or start a new run"
        )
    layers = [Layer(str(path), data), *(Layer("--set", _override(text)) for text in overrides)]
    return _merge(str(head.get("preset")), str(head.get("family")), layers), head


def revision() -> str:
    """The git revision of this package's checkout ("-dirty" when changed), or "unknown"."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):  # somebody else's repository would say nothing
        return "unknown"
    question = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(question, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"


def new_folder(parent: str, name: str) -> Path:
    """The first of parent/name-1, -2, … that is free."""
    for n in range(1, 100_000):
        path = Path(parent) / f"{name}-{n}"
        if not path.exists():
            return path
    raise RunError(f"{parent} has too many folders called {name}-N; remove some or give --out")


def point_latest(folder: Path) -> None:
    """Make runs/latest point to the newest run, where it lies in a folder called runs."""
    link = Path("runs") / "latest"
    link.parent.mkdir(exist_ok=True)
    fresh = link.with_name(f".latest-{folder.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.resolve())
    fresh.replace(link)
