"""The frozen policy on NumPy: equal to the formula, to JAX, and not to be fooled by a damaged bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tether.launch import onboard
from tether.launch.onboard import DAMAGED, BundleError, Policy, read_safetensors

SPEC = {"observation_size": 5, "action_size": 2, "hidden": [16, 8], "max_delta": 0.2}


def weights_of(spec, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * scale).astype(np.float32) for n, s in onboard._shapes(spec).items()}


def reference(spec, weights, obs, previous, noise=None):
    """The same in float64, as written in systems.md section 4 and SPEC of the action-rate limit."""
    w = {n: v.astype(np.float64) for n, v in weights.items()}
    x = obs.astype(np.float64)
    for i in range(len(spec["hidden"])):
        x = x @ w[f"dense{i}/kernel"] + w[f"dense{i}/bias"]
        x = np.maximum(x, 0)
    u = x @ w["mean/kernel"] + w["mean/bias"]
    if noise is not None:
        u = u + np.exp(np.clip(x @ w["log_std/kernel"] + w["log_std/bias"], -20, 2)) * noise
    if spec.get("max_delta") is None:
        return np.tanh(u)
    previous = np.clip(previous, -1, 1)
    low, high = np.maximum(previous - spec["max_delta"], -1), np.minimum(previous + spec["max_delta"], 1)
    return low + (np.tanh(u) + 1) / 2 * (high - low)


@pytest.mark.parametrize("max_delta", [None, 0.2, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_act_is_the_formula(max_delta, sampled):
    spec = SPEC | {"max_delta": max_delta}
    weights = weights_of(spec)
    policy = Policy(spec, weights)
    rng = np.random.default_rng(1)
    for i in range(40):
        obs = rng.standard_normal(5).astype(np.float32)
        previous = rng.uniform(-1, 1, 2).astype(np.float32)
        noise = np.random.default_rng(i).standard_normal(2, np.float32) if sampled else None
        action = policy.act(obs, previous, np.random.default_rng(i) if sampled else None)
        assert action.dtype == np.float32 and action.shape == (2,)
        want = reference(spec, weights, obs, previous, noise)
        np.testing.assert_allclose(action, want, rtol=1e-5, atol=2e-6)


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


@pytest.mark.parametrize("max_delta", [0.2, None])
def test_act_equals_jax(jax, max_delta):
    from tether.agents import rlpd

    cfg = rlpd.Config(ensemble=2, hidden=(32, 32), max_delta=max_delta)
    state = rlpd.init(cfg, jax.random.key(0), 7, 3)
    params = rlpd.policy_params(cfg, state)
    policy = Policy(rlpd.policy_spec(cfg, state), params)
    rng = np.random.default_rng(2)
    obs = rng.standard_normal((50, 7)).astype(np.float32)
    previous = rng.uniform(-1, 1, (50, 3)).astype(np.float32)
    want = np.asarray(rlpd.act(cfg, state.actor, obs, previous))
    for o, p, action in zip(obs, previous, want, strict=True):
        np.testing.assert_allclose(policy.act(o, p), action, rtol=1e-5, atol=1e-6)


@given(
    previous=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2),
    delta=st.floats(0.001, 2),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_an_action_never_leaves_the_box_or_its_window(previous, delta, seed):
    spec = SPEC | {"max_delta": delta}
    policy = Policy(spec, weights_of(spec, seed, scale=5))
    obs = np.random.default_rng(seed).standard_normal(5).astype(np.float32) * 10
    before = np.array(previous, np.float32)
    action = policy.act(obs, before, np.random.default_rng(seed))
    assert (np.abs(action) <= 1).all()
    assert (np.abs(action - np.clip(before, -1, 1)) <= np.float32(delta) * (1 + 1e-6) + 1e-6).all()


def test_the_mean_is_deterministic_and_results_are_not_buffers():
    policy = Policy(SPEC, weights_of(SPEC))
    obs, previous = np.ones(5, np.float32), np.zeros(2, np.float32)
    first = policy.act(obs, previous)
    kept = first.copy()
    policy.act(-obs, previous)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(policy.act(obs, previous), kept)
    assert (policy.act(obs, previous, np.random.default_rng(0)) != kept).any()


def test_weights_are_copied_and_a_wrong_observation_is_refused():
    weights = weights_of(SPEC)
    policy = Policy(SPEC, weights)
    before = policy.act(np.ones(5), np.zeros(2))
    for value in weights.values():
        value[...] = 0
    np.testing.assert_array_equal(policy.act(np.ones(5), np.zeros(2)), before)
    for o, a in ((4, 2), (5, 1), ((1, 5), 2)):
        with pytest.raises(ValueError, match=r"this policy takes \(5,\) and \(2,\)"):
            policy.act(np.ones(o), np.zeros(a))
    assert np.isnan(policy.act(np.full(5, np.nan), np.zeros(2))).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": []}, "layer sizes"),
        ({"hidden": "ab"}, "layer sizes"),
        ({"hidden": [16, 9]}, "dense1/kernel are"),
        ({"hidden": [16]}, "the layers need"),
        ({"hidden": [16, True]}, "whole number"),
        ({"observation_size": 10**9}, "whole number"),
        ({"action_size": None}, "whole number"),
        ({"max_delta": -1}, "max_delta"),
        ({"max_delta": float("nan")}, "max_delta"),
        ({"max_delta": True}, "max_delta"),
        ({"convolution": 3}, "does not know convolution"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(change, says):
    with pytest.raises(BundleError, match=says):
        Policy(SPEC | change, weights_of(SPEC))


def test_weights_that_are_wrong_are_refused():
    for change, says in (
        ({"mean/bias": np.array([0, np.inf], np.float32)}, "mean/bias are not finite"),
        ({"extra": np.zeros(1, np.float32)}, r"extra are \(1,\), the layers need None"),
        ({"mean/bias": np.zeros(3, np.float32)}, "mean/bias are"),
    ):
        with pytest.raises(BundleError, match=says):
            Policy(SPEC, weights_of(SPEC) | change)


def test_the_reader_agrees_with_safetensors():
    weights = weights_of(SPEC) | {"scalar": np.array(3.5, np.float32)}
    found = read_safetensors(save(weights, metadata={"who": "tether"}))
    assert set(found) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].shape == value.shape


def craft(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


NOT_SAFETENSORS = [b"", b"\x01", craft({}, size=2**60), craft(b"{nonsense"), craft([])]
NOT_SAFETENSORS += [craft({"a": 3}), craft(b"[" * 100_000), craft({"a": ONE}), craft({"a": {"dtype": "F32"}}, b"1234")]
NOT_SAFETENSORS += [
    craft({"a": ONE | change}, b"1234")
    for change in (
        {"dtype": "F64"}, {"shape": [2]}, {"shape": [1.0]}, {"shape": [2**62, 4]}, {"shape": [1] * 99},
        {"data_offsets": [4, 8]}, {"data_offsets": [-4, 0]}, {"data_offsets": [0]}, {"data_offsets": "ab"},
        {"data_offsets": {}},
    )
]  # fmt: skip


@pytest.mark.parametrize("payload", NOT_SAFETENSORS)
def test_what_is_not_safetensors_is_refused(payload):
    with pytest.raises(DAMAGED):
        read_safetensors(payload)


@given(at=st.integers(0, 400), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_gives_other_weights_or_an_error_that_is_expected(at, value):
    spec = SPEC | {"hidden": [2]}
    payload = bytearray(save(weights_of(spec)))
    payload[at % len(payload)] = value
    try:
        Policy(spec, read_safetensors(bytes(payload)))
    except DAMAGED:
        pass


def test_the_file_stands_alone():
    """Nothing of ours and nothing but numpy is imported, and the file stays small."""
    source = Path(onboard.__file__)
    assert len(source.read_text().splitlines()) <= 260
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in 'jax safetensors tether gymnasium zmq msgpack'.split(): sys.modules[name] = None\n"
        "import onboard"
    )
    subprocess.run([sys.executable, "-c", code, str(source.parent)], check=True)


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, onboard.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: not a bundle (no policy.json); make one with")
    assert done.stderr.count("\n") == 1
