"""Run a frozen policy with NumPy alone: no JAX, nothing else of tether. Python 3.10 or newer.

A bundle is a folder with `policy.json`, `weights.safetensors` and a copy of this file as `run.py`.
`python run.py` (or `python onboard.py BUNDLE`) checks a bundle and measures it. To drive with it:

    bundle = load_bundle("bundle")
    action = bundle.policies["task"].act(obs, prev_action)  # (o,), (a,) float32 -> (a,) float32 in [-1, 1]

`policy.json` says what an observation is made of and what an action means. Nothing in a bundle is trusted:
layers are bounded, shapes and checksums are compared, weights must be finite, unknown layers are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a matrix-vector product gains nothing from threads, and they make it late
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

FORMAT = "tether-bundle"
VERSION = 1
LOG_STD = (-20.0, 2.0)  # RLPD's clip

# what parsing raises where a file is not what it should be
DAMAGED = (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_SPEC = {"observation_size", "action_size", "hidden", "max_delta"}


class BundleError(ValueError):
    """A bundle or policy that cannot be used: one line with what, why and what to do."""


class Policy:
    """A tanh-Gaussian MLP: dense -> relu, ..., then heads `mean` and `log_std`.

    `spec`: observation_size o, action_size a, hidden [int, ...], and optional max_delta (number or None).
    `weights`: float32 "dense<i>/kernel" (in, out), "dense<i>/bias", "mean/..." and "log_std/..." likewise.
    Raises BundleError when the two do not fit or a weight is not finite.
    """

    def __init__(self, spec: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
        shapes = _shapes(spec)
        _match(shapes, weights)
        self.observation_size, self.action_size = spec["observation_size"], spec["action_size"]
        self.max_delta = None if spec.get("max_delta") is None else np.float32(spec["max_delta"])
        self._hidden = len(spec["hidden"])
        self._weights = {name: np.array(weights[name], np.float32) for name in shapes}

    def act(self, obs: np.ndarray, prev_action: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """(o,) observation and (a,) executed previous action -> (a,) float32 action in [-1, 1].

        Samples when an rng is given, otherwise takes the mean. With max_delta the action stays within
        max_delta of the previous one. An observation that is not finite gives an action that is not.
        """
        x, previous = np.asarray(obs, np.float32), np.asarray(prev_action, np.float32)
        if x.shape != (self.observation_size,) or previous.shape != (self.action_size,):
            raise BundleError(
                f"observation {x.shape} and previous action {previous.shape}; "
                f"this policy takes ({self.observation_size},) and ({self.action_size},)"
            )
        for i in range(self._hidden):
            x = np.maximum(self._dense(f"dense{i}", x), 0.0)
        u = self._dense("mean", x)
        if rng is not None:
            log_std = np.minimum(np.maximum(self._dense("log_std", x), LOG_STD[0]), LOG_STD[1])
            u += np.exp(log_std) * rng.standard_normal(self.action_size, np.float32)
        squashed = np.tanh(u)
        if self.max_delta is None:
            return squashed
        previous = np.minimum(np.maximum(previous, -1.0), 1.0)  # a reset may have left the box
        low = np.maximum(previous - self.max_delta, -1.0)
        high = np.minimum(previous + self.max_delta, 1.0)
        # rounding must not leave the box, or the record says the action left it
        return np.minimum(low + (squashed + 1.0) * 0.5 * (high - low), high)

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.dot(x, self._weights[f"{name}/kernel"]) + self._weights[f"{name}/bias"]


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: its policies by name, and `policy.json` as it was."""

    folder: Path
    policies: dict[str, Policy]
    spec: dict[str, Any]


def load_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read and check a bundle. Raises BundleError with file, cause and remedy."""
    folder = Path(folder)
    if not (folder / "policy.json").is_file():
        raise BundleError(f"{folder}: not a bundle (no policy.json); make one with `tether export RUN`")
    try:
        spec = json.loads((folder / "policy.json").read_bytes())
        if spec["format"] != FORMAT or spec["version"] != VERSION:
            raise BundleError(f"is {spec['format']!r} {spec['version']!r}; this reads {FORMAT!r} {VERSION}")
        payload = (folder / "weights.safetensors").read_bytes()
        found = {"policy.json": digest(spec), "weights.safetensors": hashlib.sha256(payload).hexdigest()}
        for file, checksum in found.items():
            if spec["checksums"][file] != checksum:
                raise BundleError(f"{file} has another checksum: damaged or edited by hand")
        if not 0 < spec["hz"] <= 10_000:
            raise BundleError(f"hz = {spec['hz']!r} is no control rate")
        policies, arrays = {}, read_safetensors(payload)
        for name, layers in spec["policies"].items():
            own = [n for n in arrays if n.startswith(f"{name}/")]
            policies[name] = Policy(layers, {n[len(name) + 1 :]: arrays.pop(n) for n in own})
        if arrays or not policies:
            raise BundleError(f"weights {sorted(arrays)[:3]} belong to no policy")
    except DAMAGED as error:
        what = error if isinstance(error, (BundleError, OSError)) else f"policy.json is damaged ({error!r})"
        raise BundleError(f"{folder}: {what}; export it again") from None
    return Bundle(folder, policies, spec)


def digest(spec: Mapping[str, Any]) -> str:
    """sha256 of a description without its checksums, independent of the order of keys."""
    rest = {k: v for k, v in spec.items() if k != "checksums"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_safetensors(payload: bytes) -> dict[str, np.ndarray]:
    """The float32 arrays of a safetensors file: 8-byte length, JSON header, data (huggingface/safetensors).

    Anything else raises one of DAMAGED.
    """
    size = int.from_bytes(payload[:8], "little")
    if size > len(payload) - 8:
        raise BundleError("weights.safetensors is cut short")
    header, arrays = json.loads(payload[8 : 8 + size]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if entry["dtype"] != "F32" or not 0 <= start <= stop <= len(payload) - 8 - size:
            raise BundleError(f"weights {name} are not float32, or not there")
        arrays[name] = np.frombuffer(payload[8 + size + start : 8 + size + stop], "<f4").reshape(shape)
    return arrays


def _shapes(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights that the layers need. Raises BundleError for layers this runtime cannot be."""
    unknown = sorted(set(spec) - _SPEC)
    if unknown:
        raise BundleError(f"this runtime does not know {', '.join(unknown)} in a policy; use a newer one")
    hidden, delta = spec.get("hidden"), spec.get("max_delta")
    inner = list(hidden) if isinstance(hidden, (list, tuple)) else []
    sizes = [spec.get("observation_size"), *inner, spec.get("action_size")]
    if not 3 <= len(sizes) <= 18 or not all(type(n) is int and 0 < n <= 65_536 for n in sizes):
        raise BundleError(f"layer sizes {sizes!r}: 3 to 18 whole numbers from 1 to 65536")
    if not (delta is None or (type(delta) in (int, float) and 0 < delta <= 2)):
        raise BundleError(f"max_delta = {delta!r}: between 0 and 2, or null")
    kernels: dict[str, tuple[int, ...]] = {f"dense{i}": (sizes[i], sizes[i + 1]) for i in range(len(inner))}
    kernels |= dict.fromkeys(("mean", "log_std"), (sizes[-2], sizes[-1]))
    biases = {f"{layer}/bias": shape[1:] for layer, shape in kernels.items()}
    return {f"{layer}/kernel": shape for layer, shape in kernels.items()} | biases


def _match(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]) -> None:
    for name in {**shapes, **weights}:
        found = np.shape(weights[name]) if name in weights else "missing"
        if found != shapes.get(name):
            raise BundleError(f"weights {name} are {found}, the layers need {shapes.get(name)}")
        if not np.isfinite(weights[name]).all():
            raise BundleError(f"weights {name} are not finite")


def latency_ms(policy: Policy, observations: np.ndarray, prev_actions: np.ndarray) -> dict[str, float]:
    """{p50, p99, max} in ms of one forward pass each on (n, o) observations and (n, a) previous actions."""
    times = []
    for obs, previous in zip(observations, prev_actions, strict=True):
        start = time.perf_counter()
        policy.act(obs, previous)
        times.append((time.perf_counter() - start) * 1e3)
    return {name: float(np.percentile(times, q)) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}


def main(arguments: list[str]) -> None:
    """Check the bundle in the given folder, or the one this file lies in."""
    try:
        bundle = load_bundle(arguments[0] if arguments else Path(__file__).parent)
    except BundleError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{bundle.folder}: {bundle.spec['hz']:g} Hz, from {json.dumps(bundle.spec['from'])}")
    for name, policy in bundle.policies.items():
        sizes = policy.observation_size, policy.action_size
        took = latency_ms(policy, *(np.zeros((1000, size), np.float32) for size in sizes))
        print(f"policy {name}: {sizes[0]} -> {sizes[1]}, ms a forward pass: {json.dumps(took)}")


if __name__ == "__main__":
    main(sys.argv[1:])
