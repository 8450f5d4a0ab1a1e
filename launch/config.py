"""Every number a training run is decided by: presets stacked left to right, then `--set`, checked and saved.

Order, the later wins: `full` (as published), then each preset named by the user; within a preset its tables
`[agent] [learner] [actor]`, then `[family.<kind of task>...]`; last `--set section.key=value`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_FORMAT = 1  # of a run folder; another one is refused
FAMILIES = ("course", "walk", "manipulate", "gym")
_SHIPPED = Path(__file__).parent / "presets"


class ConfigError(ValueError):
    """A setting that cannot be used: the message names source, key and the valid choices."""


def _limited(default: Any, low: float, high: float = 1e9) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Rlpd:
    """The fields of `agents.rlpd.Config`, known here so that no process needs JAX to check its settings."""

    ensemble: int = _limited(10, 1, 100)
    subset: int = _limited(2, 1, 100)
    hidden: tuple[int, ...] = _limited((256, 256), 1, 8192)
    critic_lr: float = _limited(3e-4, 0, 1)
    actor_lr: float = _limited(3e-4, 0, 1)
    temp_lr: float = _limited(3e-4, 0, 1)
    tau: float = _limited(0.005, 0, 1)
    gamma: float = _limited(0.99, 0, 1)
    n_step: int = _limited(1, 1, 100)
    init_temperature: float = _limited(1.0, 1e-6, 1000)
    target_entropy: float | None = _limited(None, -1000, 1000)
    backup_entropy: bool = True
    batch: int = _limited(256, 2, 65_536)
    utd: int = _limited(20, 1, 100)
    max_delta: float | None = _limited(None, 1e-3, 2)
    actor_layer_norm: bool = False
    layer_norm: bool = True


SCHEMAS: dict[str, Any] = {"rlpd": Rlpd}


@dataclass(frozen=True)
class Learner:
    """How the learner spends its steps."""

    steps: int = _limited(250_000, 1)  # of the whole training
    start_steps: int = _limited(5_000, 1)  # before the first update; with prior data updates begin at once
    publish_every: int = _limited(1, 1)  # steps between two versions of the weights
    max_lead: int = _limited(2, 1)  # steps a twin may run ahead of training
    snapshot_every_s: float = _limited(60.0, 1)
    replay_capacity: int = _limited(1_000_000, 1_000)
    log_every: int = _limited(200, 1)  # steps between two lines of learn/ metrics


@dataclass(frozen=True)
class Actor:
    """How an actor behaves before it has learned anything."""

    random_steps: int = _limited(5_000, 0)  # uniformly random actions before the policy drives
    auto_reset: bool = True  # false only to show what practice without it is worth


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
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; valid are {', '.join(FAMILIES)}")
    tables: list[tuple[str, dict[str, Any]]] = []
    for name in ["full", *(n.strip() for n in preset.split(",") if n.strip() != "full")]:
        source, data = _preset(name)
        rows = data.pop("family", {})
        _known(rows, FAMILIES, source, "family")
        tables += [(source, data), (source, rows.get(family, {}))]
    tables += [("--set", _override(text)) for text in overrides]
    return _merge(preset, family, tables)


def _merge(preset: str, family: str, tables: list[tuple[str, dict[str, Any]]]) -> Config:
    for source, table in tables:
        _known(table, ("agent", "learner", "actor"), source)
        for section, values in table.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{source}: {section} must be a table of settings, not {values!r}")
    named = [t["agent"]["algorithm"] for _, t in tables if "algorithm" in t.get("agent", {})]
    algorithm = named[-1] if named else "rlpd"
    schema = _schema(algorithm)
    merged: dict[str, dict[str, Any]] = {}
    for section, kind in (("agent", schema), ("learner", Learner), ("actor", Actor)):
        rows = {f.name: f for f in fields(kind)}
        merged[section] = {n: f.default for n, f in rows.items() if f.default is not MISSING}
        for source, table in tables:
            values = dict(table.get(section, {}))
            if section == "agent":
                values.pop("algorithm", None)
                if source.endswith(".toml") and schema is not Rlpd:  # presets are written for rlpd
                    values = {k: v for k, v in values.items() if k in rows}
            _known(values, rows, source, section)
            for key, value in values.items():
                merged[section][key] = _typed(value, rows[key], f"{source}: {section}.{key}")
    agent = merged["agent"]
    if schema is Rlpd and agent["batch"] % 2:
        raise ConfigError(f"agent.batch = {agent['batch']} must be even: half of it is prior data")
    if schema is Rlpd and agent["subset"] > agent["ensemble"]:
        raise ConfigError(f"agent.subset = {agent['subset']} exceeds agent.ensemble = {agent['ensemble']}")
    return Config(preset, family, algorithm, agent, Learner(**merged["learner"]), Actor(**merged["actor"]))


def _schema(algorithm: Any) -> Any:
    if isinstance(algorithm, str) and algorithm in SCHEMAS:
        return SCHEMAS[algorithm]
    from . import catalog  # an algorithm that plugged in says itself what it takes

    if not isinstance(algorithm, str):
        raise ConfigError(f"agent.algorithm must be a name in quotes, not {algorithm!r}")
    try:
        return catalog.algorithm(algorithm).Config
    except catalog.CatalogError as error:
        raise ConfigError(f"agent.algorithm: {error}") from None


def _preset(name: str) -> tuple[str, dict[str, Any]]:
    if name in presets():
        return f"{name}.toml", _toml(_SHIPPED / f"{name}.toml")
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise ConfigError(f"no preset {name!r}; give {', '.join(presets())} or the path of a .toml file")
    return name, _toml(path)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise ConfigError(f"--set {text}: write section.key=value, such as agent.gamma=0.98")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        if not re.fullmatch(r"[\w.-]+", value.strip()):
            raise ConfigError(f"--set {text}: {value!r} is not a TOML value") from None
        parsed = {"value": value.strip()}  # a bare word: no quotes to get through a shell
    if set(parsed) != {"value"}:
        raise ConfigError(f"--set {text}: one setting at a time")
    return {section: {name: parsed["value"]}}


def _known(table: Any, valid: Iterable[str], source: str, section: str = "") -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: {section} must be a table, not {table!r}")
    for key in table:
        if key not in valid:
            where = f"{section}.{key}" if section else key
            raise ConfigError(f"{source}: unknown setting {where}; valid are {', '.join(valid)}")


def _typed(value: Any, one: Any, where: str) -> Any:
    """`value` as the annotated type of dataclass field `one`, or ConfigError."""
    kind = str(getattr(one.type, "__name__", one.type))
    low, high = one.metadata.get("low", -math.inf), one.metadata.get("high", math.inf)
    if "None" in kind:
        if value == "none" or value is None:
            return None
        kind = kind.replace("| None", "").strip()
    if kind.startswith("tuple"):
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f"{where} must be a list of whole numbers, not {value!r}")
        return tuple(_number(v, "int", low, high, where) for v in value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, not {value!r}")
        return value
    if kind in ("int", "float"):
        return _number(value, kind, low, high, where)
    return value  # a plug-in's own type: its Config checks it


def _number(value: Any, kind: str, low: float, high: float, where: str) -> int | float:
    wanted = (int,) if kind == "int" else (int, float)
    what = "a whole number" if kind == "int" else "a number"
    if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
        raise ConfigError(f"{where} must be {what}, not {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"{where} = {value:g} is out of range; between {low:g} and {high:g}")
    return int(value) if kind == "int" else float(value)


def with_steps(config: Config, steps: int) -> Config:
    """The same settings for another length of training (`--steps`)."""
    return replace(config, learner=replace(config.learner, steps=steps))


def dump(config: Config, **run: Any) -> str:
    """`config.toml`: the settings, the git revision, and what else was decided (task, seed: TOML scalars)."""
    head = {"format": RUN_FORMAT, "git": revision(), "preset": config.preset, "family": config.family}
    sections = {
        "run": head | run,
        "agent": {"algorithm": config.algorithm, **config.agent},
        "learner": vars(config.learner),
        "actor": vars(config.actor),
    }
    lines = ["# Written by tether: what this run was decided by."]
    for section, values in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {_value(v)}" for key, v in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A TOML value; None is "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    text = str(value)
    if text.endswith("\n") and "'''" not in text and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        return f"'''\n{text}'''"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read(run: str | Path) -> tuple[Config, dict[str, Any]]:
    """The settings of a run folder and its `[run]` table. Raises ConfigError with file, cause and remedy."""
    path = Path(run) / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{run}: not a run folder (no config.toml); runs lie in runs/, or where --out said")
    data = _toml(path)
    head = data.pop("run", None)
    if not isinstance(head, dict) or head.get("format") != RUN_FORMAT:
        found = head.get("format") if isinstance(head, dict) else None
        raise ConfigError(
            f"{path}: a run of format {found!r}, this version reads {RUN_FORMAT}; "
            "open it with the version that made it, or start a new run"
        )
    return _merge(str(head.get("preset")), str(head.get("family")), [(str(path), data)]), head


def revision() -> str:
    """The git revision of this package's checkout ("-dirty" when changed), or "unknown"."""
    here = Path(__file__).parent
    try:
        # installed into somebody else's repository, that revision would say nothing
        for question in ("ls-files --error-unmatch config.py", "describe --always --dirty --abbrev=12"):
            answer = subprocess.run(
                ["git", *question.split()], cwd=here, capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
