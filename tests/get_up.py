"""How surely the quadruped gets up: dropped in the twin from random orientations with random joint angles, fallen as
its own IMU has it (a tilt beyond 30 degrees), then left to `robot_env/stand_up.py` behind the gate. Prints a line a
kind of pose; the last line is the JSON's path.

    make get-up POSES=200 SEED=0
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tether.drivers.quadruped import CHANNELS, COMMAND
from tether.robot_env.legs import TILT_RAD, tilt
from tether.robot_env.safety import Gate, Limits
from tether.robot_env.stand_up import StandUp
from tether.sim.quadruped import QuadrupedTwin

HZ = 20.0
DROP_M, LIE_S = 0.5, 2.5
WITHIN_S = 10.0  # the bar: 98 % of 200 poses stand within this
STANDS, HIGH_M, AFTER_S = 0.97, 0.25, 1.0  # cosine of the tilt and height of the trunk, held for so long afterwards


def armed(robot: QuadrupedTwin) -> Gate:
    """A gate that has armed on the robot."""
    gate = Gate(COMMAND, Limits.of(CHANNELS, COMMAND, {}))
    for _ in range(round(2.0 * HZ)):
        gate.step(robot.now(), robot.read(), None, ("arm",))
        robot.sleep(1 / HZ)
    return gate


def drop(robot: QuadrupedTwin, rng: np.random.Generator) -> float:
    """Let it fall somehow, its motors limp, and lie, until it lies fallen. Returns the cosine of its tilt then."""
    while True:
        quaternion = rng.standard_normal(4)
        qpos = [0.0, 0.0, DROP_M, *quaternion / np.linalg.norm(quaternion), *rng.uniform(COMMAND.low, COMMAND.high)]
        robot.stop()
        robot.settle(np.array(qpos))
        robot.sleep(LIE_S)
        if max(map(abs, tilt(robot.read().values["gravity"]))) > TILT_RAD:
            return robot.truth()["upright"]


def get_up(robot: QuadrupedTwin, gate: Gate) -> dict[str, Any]:
    """From where it lies: seconds until the recovery says that it stands, kicks, whether that holds, and how hard."""
    recovery, began, fastest = StandUp(COMMAND, HZ), robot.now(), 0.0
    seconds = math.inf
    while robot.now() - began < WITHIN_S and not recovery.needs_hand:
        reading = robot.read()
        wish = recovery.wish(reading)
        if wish is None:
            seconds = robot.now() - began
            break
        robot.write(gate.step(robot.now(), reading, wish)[0])
        robot.sleep(1 / HZ)
        fastest = max(fastest, float(np.linalg.norm(reading.values["gyro"])))
    for _ in range(round(AFTER_S * HZ)):  # it goes on standing
        robot.write(gate.step(robot.now(), robot.read(), np.zeros(COMMAND.size))[0])
        robot.sleep(1 / HZ)
    truth = robot.truth()
    stands = seconds <= WITHIN_S and truth["upright"] > STANDS and truth["height"] > HIGH_M
    return {"stands": stands, "seconds": seconds, "kicks": recovery.kicks, "turning_radps": fastest}


def campaign(poses: int, seed: int, **settings: Any) -> list[dict[str, Any]]:
    """One result a pose; the same seed gives the same poses."""
    robot = QuadrupedTwin(seed=seed, **settings)
    robot.open()
    results = []
    for i in range(poses):
        robot.place((0.0, 0.0, 0.0))
        gate, rng = armed(robot), np.random.default_rng([seed, i])
        upright = drop(robot, rng)
        kind = "back" if upright < -0.7 else "belly" if upright > 0.7 else "side"
        results.append({"pose": i, "kind": kind, "upright": upright} | get_up(robot, gate))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--poses", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--terrain", default="flat", choices=QuadrupedTwin.settings["terrain"][1:])
    parser.add_argument("--out", type=Path, default=Path("get-up.json"))
    given = parser.parse_args()
    results = campaign(given.poses, given.seed, terrain=given.terrain)
    print(f"{'kind':8}{'poses':>8}{'stand':>8}{'median s':>10}{'longest s':>11}{'kicks':>8}{'rad/s':>8}")
    for kind in ("belly", "side", "back", "all"):
        chosen = [r for r in results if kind in (r["kind"], "all")]
        stood = [r for r in chosen if r["stands"]]
        if stood:
            seconds, kicks = [r["seconds"] for r in stood], [r["kicks"] for r in stood]
            print(f"{kind:8}{len(chosen):8}{len(stood):8}{np.median(seconds):10.2f}{max(seconds):11.2f}"
                  f"{np.mean(kicks):8.2f}{max(r['turning_radps'] for r in stood):8.1f}")  # fmt: skip
    share = sum(r["stands"] for r in results) / len(results)
    for r in results:
        r["seconds"] = r["seconds"] if math.isfinite(r["seconds"]) else None
    summary = {"poses": len(results), "seed": given.seed, "terrain": given.terrain, "within_s": WITHIN_S}
    given.out.write_text(json.dumps(summary | {"share": share, "results": results}, indent=1))
    print(given.out)


if __name__ == "__main__":
    main()
