"""The gate against a model of it and chosen attacks; the attacks against every mutation of the gate."""

from __future__ import annotations

import ast
import copy
import importlib.util
import sys
from dataclasses import FrozenInstanceError
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tether.drivers.base import Channel, Command, Reading
from tether.robot_env import safety
from tether.robot_env.safety import Gate, Limits

CHANNELS = (
    Channel("fast", 1, "m", 100.0, 0.04, (1.0,)),  # may be 0.04 + 5 / 100 s old
    Channel("slow", 2, "m", 10.0, 0.0, (1.0, 1.0)),  # 0.5 s
)
COMMAND = Command(
    ("speed", "steering"),
    ("m/s", "rad"),
    (0.5, -0.4),
    (4.5, 0.4),
    (-1.5, -0.4),
    (4.5, 0.4),
    (9.0, 4.0),
    (0.0, 0.1),
)
LOW, HIGH, RATE, SAFE = (np.array(v) for v in (COMMAND.low, COMMAND.high, COMMAND.rate, COMMAND.safe))


def reading(now: float, **stamps: float | None) -> Reading:
    """Fresh, but for the stamps given (None: the channel is missing)."""
    at = {"fast": now, "slow": now} | stamps
    values = {"fast": np.zeros(1, np.float32), "slow": np.zeros(2, np.float32)}
    return Reading(values, {k: v for k, v in at.items() if v is not None})


def wish(speed: float, steering: float) -> np.ndarray:
    return COMMAND.to_action(np.array([speed, steering]))


# --- properties, for any sequence of anything

ANY = st.one_of(
    st.none(),
    st.lists(st.floats(width=32), min_size=0, max_size=3).map(lambda v: np.array(v, np.float32)),
    st.tuples(st.floats(-3, 3), st.floats(-3, 3)).map(np.array),
)
TICK = st.tuples(
    st.floats(0, 1.5), ANY, st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.6, -0.1]),
    st.lists(st.sampled_from(["estop", "clear", "arm"]), max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(TICK, max_size=40), st.floats(0.2, 4.5))
def test_whatever_is_wished_the_limits_hold(sequence, most):
    limits = Limits.of(CHANNELS, COMMAND, {"max_speed_mps": most})
    gate, now, last, armed, latched = Gate(COMMAND, limits), 0.0, SAFE, False, False
    for dt, wanted, age, events in sequence:
        now += dt
        latched = latched and "clear" not in events
        armed = (
            armed or ("arm" in events and not latched and "clear" not in events)
        ) and "estop" not in events
        latched = latched or "estop" in events
        armed = armed and not latched
        out, state, faults = gate.step(now, reading(now, fast=now - age), wanted, events)
        assert np.isfinite(out).all()
        assert (out >= np.maximum(LOW, [-most, -9]) - 1e-9).all() and (
            out <= np.minimum(HIGH, [most, 9]) + 1e-9
        ).all()
        good = wanted is not None and wanted.shape == (2,) and np.isfinite(wanted).all() and age == 0.0
        assert state == ("estop" if latched else "run" if armed and good else "hold")
        if state != "run":
            assert (out == SAFE).all()
        else:
            assert (np.abs(out - last) <= RATE * min(dt, 0.25) + 1e-9).all()
        assert bool(set(faults) - {"limit", "rate"}) == (latched or not good)
        last = out


# --- attacks: each takes a module that should be the gate, and asserts


def gate_of(m: ModuleType, armed: bool = True, **wanted: float):
    gate = m.Gate(COMMAND, m.Limits.of(CHANNELS, COMMAND, wanted))
    if armed:
        gate.step(0.0, reading(0.0), None, ("arm",))
    return gate


def limits_are_declared(m):
    limits = m.Limits.of(CHANNELS, COMMAND, {})
    assert limits.max_age_s == {"fast": pytest.approx(0.09), "slow": pytest.approx(0.5)}
    for got, want in ((limits.low, LOW), (limits.high, HIGH), (limits.rate, RATE), (limits.safe, SAFE)):
        assert (got == want).all()
    with pytest.raises(FrozenInstanceError):
        limits.low = HIGH


def a_task_only_tightens(m):
    tight = m.Limits.of(CHANNELS, COMMAND, {"max_speed_mps": 1.0, "max_steering_rad": 0.2})
    assert tight.high.tolist() == [1.0, 0.2] and tight.low.tolist() == [-1.0, -0.2]
    assert m.Limits.of(CHANNELS, COMMAND, {"max_speed_mps": 4.5}).low.tolist() == LOW.tolist()  # stays at -1.5
    for bad in ({"max_speed_mps": 4.6}, {"max_speed_mps": 0.0}, {"max_speed_mps": -1.0}, {"speed": 1.0}):
        with pytest.raises(m.SafetyError, match=r"max_speed_mps"):
            m.Limits.of(CHANNELS, COMMAND, bad)


def nothing_moves_before_it_is_armed(m):
    gate = gate_of(m, armed=False)
    for tick in range(20):
        out, state, faults = gate.step(tick * 0.1, reading(tick * 0.1), wish(4, 0))
        assert (out == SAFE).all() and state == m.HOLD and faults == ()
    out, state, _ = gate.step(2.0, reading(2.0), wish(4, 0), ("arm",))
    assert state == m.RUN and out == pytest.approx([0.9, 0.0])  # and then from rest: 9 m/s^2 for 0.1 s


def boxes_and_rates_are_per_second(m):
    for hz in (10, 50):
        gate = gate_of(m)
        for tick in range(1, hz // 5 + 1):  # 0.2 s
            out, _, faults = gate.step(tick / hz, reading(tick / hz), wish(4, 0))
            assert faults == ("rate",)
        assert out == pytest.approx([1.8, 0.0])
    gate = gate_of(m)
    out, _, _ = gate.step(10.0, reading(10.0), wish(4, 0.4))  # a pause buys a quarter of a second
    assert out == pytest.approx([2.25, 0.4])
    out, _, _ = gate.step(9.0, reading(9.0), wish(4, -0.4))  # a clock that goes back buys nothing
    assert out == pytest.approx([2.25, 0.4])
    out, _, _ = gate.step(9.1, reading(9.1), wish(-4, 0.0))
    assert out == pytest.approx([1.35, 0.0])
    gate = gate_of(m)
    for tick in range(1, 30):
        out, state, faults = gate.step(tick / 10, reading(tick / 10), wish(9, -9))
        assert "limit" in faults and state == m.RUN
    assert out == pytest.approx([4.5, -0.4]) and faults == ("limit",)
    for tick in range(30, 60):
        out, _, faults = gate.step(tick / 10, reading(tick / 10), wish(-1.0, 0.2))
    assert out == pytest.approx([-1.0, 0.2]) and faults == ()
    assert gate.step(6.0, reading(6.0), wish(-1.0, 0.2 + 0.5))[2] == ("limit",)
    assert gate.step(6.01, reading(6.01), wish(-1.0, 0.2))[2] == (
        "rate",
    )  # 0.2 rad, of which 0.04 are allowed
    assert gate.counts["limit"] == 30 and gate.counts["no_wish"] == 1


def the_first_command_is_not_a_jump(m):
    gate = gate_of(m, armed=False)
    out, state, _ = gate.step(5.0, reading(5.0), wish(4, 0), ("arm",))
    assert state == m.RUN and (out == SAFE).all()


def tightened_limits_bind(m):
    gate = gate_of(m, max_speed_mps=1.0)
    for tick in range(1, 10):
        out, _, _ = gate.step(tick / 10, reading(tick / 10), wish(4, 0))
    assert out[0] == pytest.approx(1.0)
    for tick in range(10, 20):
        out, _, _ = gate.step(tick / 10, reading(tick / 10), wish(-1.4, 0))
    assert out[0] == pytest.approx(-1.0)


def bad_wishes_stop(m):
    for bad, fault in (
        (None, "no_wish"), (np.zeros(3), "shape"), (np.array([np.nan, 0]), "not_finite"),
        (np.array([0, np.inf]), "not_finite"), (np.zeros((1, 2)), "shape"),
    ):  # fmt: skip
        gate = gate_of(m)
        gate.step(0.1, reading(0.1), wish(4, 0))
        out, state, faults = gate.step(0.2, reading(0.2), bad)
        assert (out == SAFE).all() and state == m.HOLD and faults == (fault,)
        out, state, faults = gate.step(0.3, reading(0.3), wish(0.8, 0.0))  # recovers by itself, from rest
        assert state == m.RUN and out == pytest.approx([0.8, 0.0]) and faults == ()


def stale_is_counted_in_the_channels_own_periods(m):
    for stamps, fault in (
        ({"fast": 0.9101}, ""), ({"fast": 0.9099}, "stale_fast"),
        ({"slow": 0.5001}, ""), ({"slow": 0.4999}, "stale_slow"),
        ({"fast": 1.01}, "stale_fast"), ({"fast": 1.0 + 5e-7}, ""), ({"fast": None}, "stale_fast"),
        ({"fast": np.nan}, "stale_fast"),
    ):  # fmt: skip
        gate = gate_of(m)
        out, state, faults = gate.step(1.0, reading(1.0, **stamps), wish(1, 0))
        assert faults == ((fault,) if fault else ()), (stamps, faults)
        assert state == (m.HOLD if fault else m.RUN) and (not fault or (out == SAFE).all())
    gate, broken = gate_of(m), reading(1.0)
    broken.values["slow"][1] = np.nan
    assert gate.step(1.0, broken, wish(1, 0))[1:] == (m.HOLD, ("not_finite_slow",))


def an_estop_is_latched_and_clear_never_moves(m):
    gate = gate_of(m)
    gate.step(0.1, reading(0.1), wish(4, 0))
    out, state, faults = gate.step(0.2, reading(0.2), wish(4, 0), ("estop",))
    assert (out == SAFE).all() and state == m.ESTOP and faults == ("estop",)
    for events in ((), ("arm",), ("clear", "estop"), ("estop", "clear"), ("arm", "arm")):
        out, state, _ = gate.step(0.3, reading(0.3), wish(4, 0), events)
        assert (out == SAFE).all() and state == m.ESTOP
    for events in (("clear",), (), ("clear", "arm"), ("clear",)):
        out, state, _ = gate.step(0.4, reading(0.4), wish(4, 0), events)
        assert (out == SAFE).all() and state == m.HOLD
    out, state, _ = gate.step(0.5, reading(0.5), wish(4, 0), ("arm",))
    assert state == m.RUN and out[0] == pytest.approx(0.9)
    out, state, _ = gate.step(0.6, reading(0.6), wish(4, 0), ("arm", "estop"))
    assert state == m.ESTOP and (out == SAFE).all()
    with pytest.raises(ValueError, match="unknown gate event 'go'"):
        gate.step(0.7, reading(0.7), None, ("go",))


def a_clear_while_running_changes_nothing(m):
    gate = gate_of(m)
    assert gate.step(0.1, reading(0.1), wish(1, 0), ("clear",))[1] == m.RUN


def what_was_given_out_is_a_copy(m):
    gate = gate_of(m)
    out, _, _ = gate.step(0.1, reading(0.1), wish(4, 0))
    out[:] = 1e9
    out, _, _ = gate.step(0.2, reading(0.2), wish(4, 0))
    assert out[0] == pytest.approx(1.8)
    for _ in range(2):
        out, _, _ = gate.step(0.3, reading(0.3), None)
        assert (out == SAFE).all()
        out[:] = 1e9


ATTACKS = (
    limits_are_declared, a_task_only_tightens, nothing_moves_before_it_is_armed,
    boxes_and_rates_are_per_second, the_first_command_is_not_a_jump, tightened_limits_bind, bad_wishes_stop,
    stale_is_counted_in_the_channels_own_periods, an_estop_is_latched_and_clear_never_moves,
    a_clear_while_running_changes_nothing, what_was_given_out_is_a_copy,
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_attack(attack):
    attack(safety)


# --- and who guards the guards: every mutation of the gate must fail an attack

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
# (code as mutated, why no attack can tell)
EQUIVALENT = {
    "np.abs(slewed - boxed) >= 1e-09": "a clamp of exactly the rounding tolerance",
    "now - stamp < max_age": "an age to the last bit",
    "-1e-06 < now - stamp": "an age to the last bit",
    "-1e-06 < now - stamp <= max_age": "an age to the last bit",
    "-1e-06 <= now - stamp < max_age": "an age to the last bit",
}


def mutations(tree: ast.Module):
    """(line, code, mutated copy of the tree)."""
    nodes = [n for n in ast.walk(tree)]
    for i, node in enumerate(nodes):
        for change in _changes(node):
            mutant = copy.deepcopy(tree)
            target = list(ast.walk(mutant))[i]
            change(target)
            ast.fix_missing_locations(mutant)
            yield getattr(node, "lineno", 0), ast.unparse(target), mutant


def _changes(node: ast.AST):
    if isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            if type(op) in SWAPS:
                yield lambda n, k=k, op=op: n.ops.__setitem__(k, SWAPS[type(op)]())
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield lambda n: setattr(n, "op", ast.UAdd()) if isinstance(n.op, ast.USub) else setattr(
            n, "operand", ast.UnaryOp(ast.Not(), n.operand))  # fmt: skip
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, float, int)):
        if isinstance(node.value, bool):
            yield lambda n: setattr(n, "value", not n.value)
        else:
            yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("min", "max"):
        yield lambda n: setattr(n.func, "id", {"min": "max", "max": "min"}[n.func.id])
    elif isinstance(node, ast.FunctionDef):
        for k, line in enumerate(node.body):
            text = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
            if not text and not isinstance(line, (ast.Return, ast.Assert)):
                yield lambda n, k=k: n.body.__setitem__(k, ast.Pass())


def loaded(tree: ast.Module) -> ModuleType:
    spec = importlib.util.spec_from_loader("tether.robot_env.mutant", None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "tether.robot_env"
    sys.modules[spec.name] = module  # dataclasses look there
    exec(compile(tree, "mutant", "exec"), vars(module))
    return module


def survives(tree: ast.Module) -> bool:
    try:
        module = loaded(tree)
        for attack in ATTACKS:
            attack(module)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - however it dies, it is noticed
        return False
    finally:
        sys.modules.pop("tether.robot_env.mutant", None)
    return True


def test_no_mutation_of_the_gate_survives():
    with open(safety.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    assert survives(tree)
    total, alive = 0, []
    with np.errstate(all="ignore"):
        for line, code, mutant in mutations(tree):
            total += 1
            if survives(mutant) and code not in EQUIVALENT:
                alive.append(f"safety.py:{line}: {code}")
    assert total > 60
    assert not alive, "\n".join(["no attack notices:", *alive])
