"""Run a frozen policy with NumPy alone: no JAX, nothing else of tether. Python 3.9 or newer.

A bundle is a folder with `policy.json`, `weights.safetensors` and a copy of this file as `run.py`.
`python run.py` (or `python onboard.py BUNDLE`) checks a bundle and measures it. To drive with it:

    bundle = load_bundle("bundle")
    action = bundle.policies["task"].act(obs, prev_action)  # (o,), (a,) float32 -> (a,) float32 in [-1, 1]

`policy.json` says what an observation is made of and what an action means. Nothing in a bundle is trusted:
sizes are bounded, shapes and checksums are compared, weights must be finite, unknown layers are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
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
MAX_JSON_BYTES = 16_000_000
MAX_WEIGHT_BYTES = 256_000_000
LOG_STD = (-20.0, 2.0)  # RLPD's clip
NORM_EPSILON = 1e-6  # flax.linen.LayerNorm

_SPEC = {"observation_size", "action_size", "hidden", "max_delta", "layer_norm"}
_DESCRIPTION: dict[str, Any] = {
    "format": str, "version": int, "observation": dict, "action": dict, "hz": (int, float), "gate": dict,
    "task": str, "from": dict, "policies": dict, "checked": dict, "checksums": dict,
}  # fmt: skip


class BundleError(ValueError):
    """A bundle or policy that cannot be used: one line with what, why and what to do."""


class Policy:
    """A tanh-Gaussian MLP: dense (-> layer norm) -> relu, ..., then heads `mean` and `log_std`.

    `spec`: observation_size o, action_size a, hidden [int, ...], and optional max_delta (number or None) and
    layer_norm (bool).
    `weights`: float32 "dense<i>/kernel" (in, out), "dense<i>/bias", with layer_norm "norm<i>/scale" and
    "norm<i>/bias", and "mean/...", "log_std/..." likewise. Raises BundleError when the two do not fit or a
    weight is not finite. Buffers are reused between calls: one thread per Policy.
    """

    def __init__(self, spec: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
        shapes = _shapes(spec)
        _match(shapes, weights)
        self.observation_size, self.action_size = int(spec["observation_size"]), int(spec["action_size"])
        self.max_delta = None if spec.get("max_delta") is None else np.float32(spec["max_delta"])
        take = {name: np.array(weights[name], np.float32, order="C") for name in shapes}
        self._layers = []
        for i, width in enumerate(spec["hidden"]):
            norm = (take[f"norm{i}/scale"], take[f"norm{i}/bias"]) if spec.get("layer_norm") else None
            buffer = np.empty(width, np.float32)
            self._layers.append((take[f"dense{i}/kernel"], take[f"dense{i}/bias"], norm, buffer))
        # both heads in one product
        self._head = np.concatenate([take["mean/kernel"], take["log_std/kernel"]], axis=1)
        self._head_bias = np.concatenate([take["mean/bias"], take["log_std/bias"]])
        self._out = np.empty(2 * self.action_size, np.float32)
        self._mean, self._log_std = self._out[: self.action_size], self._out[self.action_size :]

    def act(
        self, obs: np.ndarray, prev_action: np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """(o,) observation and (a,) executed previous action -> (a,) float32 action in [-1, 1].

        Samples when an rng is given, otherwise takes the mean. With max_delta the action stays within
        max_delta of the previous one. An observation that is not finite gives an action that is not.
        """
        x = np.asarray(obs, np.float32)
        previous = np.asarray(prev_action, np.float32)
        if x.shape != (self.observation_size,) or previous.shape != self._mean.shape:
            raise ValueError(
                f"observation {x.shape} and previous action {previous.shape}; "
                f"this policy takes ({self.observation_size},) and ({self.action_size},)"
            )
        for kernel, bias, norm, buffer in self._layers:
            np.dot(x, kernel, out=buffer)
            buffer += bias
            if norm is not None:
                buffer -= buffer.mean()
                buffer *= 1.0 / math.sqrt(float(np.dot(buffer, buffer)) / len(buffer) + NORM_EPSILON)
                buffer *= norm[0]
                buffer += norm[1]
            np.maximum(buffer, 0.0, out=buffer)
            x = buffer
        np.dot(x, self._head, out=self._out)
        self._out += self._head_bias
        if rng is None:
            squashed = np.tanh(self._mean)
        else:
            std = np.exp(np.minimum(np.maximum(self._log_std, LOG_STD[0]), LOG_STD[1]))
            squashed = np.tanh(self._mean + std * rng.standard_normal(self.action_size, np.float32))
        if self.max_delta is None:
            return squashed
        previous = np.minimum(np.maximum(previous, -1.0), 1.0)  # a reset may have left the box
        low = np.maximum(previous - self.max_delta, -1.0)
        high = np.minimum(previous + self.max_delta, 1.0)
        # rounding must not leave the box, or the record says the action left it
        return np.minimum(low + (squashed + 1.0) * 0.5 * (high - low), high)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: its policies by name, and `policy.json` as it was."""

    folder: Path
    policies: dict[str, Policy]
    spec: dict[str, Any]

    @property
    def hz(self) -> float:
        """Control rate the policy was trained at."""
        return float(self.spec["hz"])


def load_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read and check a bundle. Raises BundleError with file, cause and remedy."""
    folder = Path(folder)
    spec = read_description(folder)
    file = folder / "weights.safetensors"
    payload = _read(file, MAX_WEIGHT_BYTES)
    if hashlib.sha256(payload).hexdigest() != spec["checksums"].get("weights.safetensors"):
        raise BundleError(f"{file}: checksum differs: damaged or changed; export it again")
    weights = read_safetensors(payload, str(file))
    stray = [n for n in weights if n.split("/")[0] not in spec["policies"]]
    if stray or not spec["policies"]:
        raise BundleError(f"{folder}: weights {stray[:3]} belong to no policy; export it again")
    policies = {}
    for name, layers in spec["policies"].items():
        if not isinstance(layers, dict):
            raise BundleError(f"{folder}/policy.json: policies.{name} is not an object; export it again")
        own = {n[len(name) + 1 :]: w for n, w in weights.items() if n.startswith(f"{name}/")}
        try:
            policies[name] = Policy(layers, own)
        except BundleError as error:
            raise BundleError(f"{folder}: policy {name!r}: {error}") from None
    return Bundle(folder, policies, spec)


def read_description(folder: Path) -> dict[str, Any]:
    """`policy.json` of a bundle, checked against its own checksum. Raises BundleError."""
    file = folder / "policy.json"
    if not file.is_file():
        raise BundleError(f"{folder}: not a bundle (no policy.json); make one with `tether export RUN`")
    text = _read(file, MAX_JSON_BYTES)
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: not JSON ({error}); export it again") from None
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise BundleError(f"{file}: not a tether bundle; make one with `tether export RUN`")
    if spec.get("version") != VERSION:
        raise BundleError(
            f"{file}: bundle format {spec.get('version')!r}, this version reads {VERSION}; "
            "export it again, or use the run.py beside it"
        )
    for key, kind in _DESCRIPTION.items():
        if not isinstance(spec.get(key), kind) or isinstance(spec[key], bool):
            raise BundleError(f"{file}: {key!r} is missing or of the wrong type; export it again")
    if digest(spec) != spec["checksums"].get("policy.json"):
        raise BundleError(f"{file}: checksum differs: damaged or edited by hand; export it again")
    if not 0 < spec["hz"] <= 10_000:
        raise BundleError(f"{file}: hz = {spec['hz']!r} is no control rate; export it again")
    return spec


def digest(spec: Mapping[str, Any]) -> str:
    """sha256 of a description without its checksums, independent of the order of keys."""
    rest = {k: v for k, v in spec.items() if k != "checksums"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_safetensors(payload: bytes, file: str) -> dict[str, np.ndarray]:
    """The float32 arrays of a safetensors file: 8-byte length, JSON header, data without holes.

    Raises BundleError (naming `file`) for anything else; format: huggingface/safetensors.
    """
    size = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or size > min(len(payload) - 8, MAX_JSON_BYTES):
        raise BundleError(f"{file}: cut short or not safetensors; export it again")
    data, end, arrays = payload[8 + size :], 0, {}
    try:
        header = json.loads(payload[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape = entry["data_offsets"], entry["shape"]
            whole = all(type(v) is int and v >= 0 for v in (start, stop, *shape))
            if entry["dtype"] != "F32" or len(shape) > 4 or not whole:
                raise ValueError(f"{name} is {entry['dtype']} {shape}, not float32")
            if start != end or stop - start != 4 * math.prod(shape) or stop > len(data):
                raise ValueError(f"{name} does not fit its place")
            arrays[name] = np.frombuffer(data[start:stop], "<f4").reshape(shape).astype(np.float32)
            end = stop
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes belong to no array")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{file}: not a valid safetensors file ({error}); export it again") from None
    return arrays


def _read(file: Path, limit: int) -> bytes:
    try:
        if file.stat().st_size > limit:
            raise BundleError(f"{file}: larger than {limit} bytes; this is no bundle of tether's")
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}; export it again") from None


def _shapes(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    unknown = sorted(map(str, set(spec) - _SPEC))
    if unknown:
        raise BundleError(f"this runtime does not know {', '.join(unknown)} in a policy; use a newer one")
    sizes, delta = spec.get("hidden"), spec.get("max_delta")
    if not isinstance(sizes, (list, tuple)) or not sizes or len(sizes) > 16:
        raise BundleError(f"hidden = {sizes!r}: needs the widths of 1 to 16 layers")
    sizes = [spec.get("observation_size"), *sizes, spec.get("action_size")]
    if not all(type(n) is int and 0 < n <= 65_536 for n in sizes):
        raise BundleError(f"layer sizes {sizes!r}: each must be a whole number from 1 to 65536")
    number = isinstance(delta, (int, float)) and not isinstance(delta, bool) and 0 < delta <= 2
    if type(spec.get("layer_norm", False)) is not bool or not (delta is None or number):
        raise BundleError(f"max_delta = {delta!r}: between 0 and 2, or null; layer_norm: true or false")
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(sizes[1:-1]):
        inputs = sizes[i]
        shapes |= {f"dense{i}/kernel": (inputs, width), f"dense{i}/bias": (width,)}
        if spec.get("layer_norm"):
            shapes |= {f"norm{i}/scale": (width,), f"norm{i}/bias": (width,)}
    for head in ("mean", "log_std"):
        shapes |= {f"{head}/kernel": (sizes[-2], sizes[-1]), f"{head}/bias": (sizes[-1],)}
    return shapes


def _match(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]) -> None:
    for name, shape in shapes.items():
        if name not in weights:
            raise BundleError(f"weights {name} are missing")
        if np.shape(weights[name]) != shape:
            raise BundleError(f"weights {name} are {np.shape(weights[name])}, the layers need {shape}")
        if not np.isfinite(weights[name]).all():
            raise BundleError(f"weights {name} are not finite")
    if len(weights) != len(shapes):
        raise BundleError(f"weights {sorted(set(weights) - set(shapes))[:3]} belong to no layer")


def latency_ms(policy: Policy, observations: np.ndarray, prev_actions: np.ndarray) -> dict[str, float]:
    """{p50, p99, max} in ms of one forward pass each on (n, o) observations and (n, a) previous actions."""
    times = []
    for i in range(len(observations)):
        start = time.perf_counter()
        policy.act(observations[i], prev_actions[i])
        times.append((time.perf_counter() - start) * 1e3)
    p50, p99, worst = np.percentile(times, [50, 99, 100])
    return {"p50": float(p50), "p99": float(p99), "max": float(worst)}


def main(arguments: list[str]) -> int:
    """Check the bundle in the given folder, or the one this file lies in."""
    try:
        bundle = load_bundle(arguments[0] if arguments else Path(__file__).parent)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{bundle.folder}: {bundle.hz:g} Hz, from {json.dumps(bundle.spec['from'])}")
    for name, policy in bundle.policies.items():
        obs, rest = np.zeros((1000, policy.observation_size)), np.zeros((1000, policy.action_size))
        took = latency_ms(policy, obs.astype(np.float32), rest.astype(np.float32))
        action = policy.act(obs[0], rest[0])
        sizes = f"{policy.observation_size} -> {policy.action_size}"
        print(f"policy {name}: {sizes}, a zero observation gives {action}")
        print(f"  {took['p50'] * 1e3:.0f} us (p99 {took['p99'] * 1e3:.0f}, max {took['max'] * 1e3:.0f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
