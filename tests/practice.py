"""How surely the arm practises alone: hours of arm-pick in the twin, each try followed by a reset that puts the object
back. Prints a line for each who practises; the last line is the JSON's path.

    make practice HOURS=2 SEED=0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tether.launch import catalog, teach
from tether.launch.evaluate import Tally
from tether.launch.teach import Teacher
from tether.robot_env.env import RobotEnv
from tether.robot_env.record import Record

BAR = 0.99  # of the resets, without a hand
WISH_S = 1.0  # for so long one at random wishes the same, so that it gets about


def at_random(env: RobotEnv, seed: int) -> Teacher:
    """A wish anywhere in the action box, each second another."""
    rng, ticks = np.random.default_rng(seed), round(WISH_S * env.task.spec.hz)
    wish, left = np.zeros(env.command.size), 0

    def drive(obs: np.ndarray, prev_action: np.ndarray) -> np.ndarray:
        nonlocal wish, left
        wish, left = (rng.uniform(-1.0, 1.0, wish.shape), ticks) if left == 0 else (wish, left)
        left -= 1
        return wish

    return drive


def scripted(env: RobotEnv, seed: int) -> Teacher:
    """As in an arm's demonstrations."""
    return teach.shown(env, teach.SPEED_MPS["manipulate"], teach.TAUGHT["arm-pick"], seed)


POLICIES = {"random": at_random, "script": scripted}


class Hands:
    """Where things were whenever a hand was needed, and how long each reset took."""

    def __init__(self, env: RobotEnv) -> None:
        self.needed: list[dict[str, Any]] = []
        self.reset_s: list[float] = []
        self._began: Record | None = None  # the first step of a reset
        self._before: Record | None = None
        env.on_record.append(self._see)

    def _see(self, record: Record) -> None:
        if record.action is not None and record.source == "reset":
            self._began, self._before = self._began or record, record
        elif record.action is None and "reset" in record.events and self._began is not None:
            assert self._before is not None
            self.reset_s.append(record.time - self._began.time)
            if "intervention" in record.events:
                places = {"at_first": self._began, "in_the_end": self._before}
                self.needed.append({"time_s": round(record.time, 1)} | {
                    when: {k: np.round(r.reading.values[k], 3).tolist() for k in ("object", "tool")}
                    for when, r in places.items()
                })  # fmt: skip
            self._began = None


def practise(policy: str, seconds: float, seed: int, task: str = "arm-pick") -> dict[str, Any]:
    """So much simulated time of tries and resets."""
    env = catalog.make_env(catalog.make_task(catalog.load_spec(task)), seed=seed)
    assert isinstance(env, RobotEnv)
    tally, hands = Tally(env), Hands(env)
    drive = POLICIES[policy](env, seed)
    obs, _ = env.reset()
    while env.robot.now() < seconds:
        obs, _, terminated, truncated, _ = env.step(drive(obs, env.action))
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    episodes = tally.episodes
    return {
        "policy": policy, "hours": round(env.robot.now() / 3600, 3), "tries": len(tally.returns),
        "success_rate": round(float(np.mean(tally.successes)), 3) if tally.successes else None,
        "resets": episodes.resets, "interventions": episodes.interventions,
        "put_back": round(1.0 - episodes.interventions / max(episodes.resets, 1), 4),
        "reset_s": {"mean": round(float(np.mean(hands.reset_s)), 2), "longest": round(max(hands.reset_s), 2)},
        "gate": env.gate.counts, "needed": hands.needed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0, help="simulated, of each policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--out", type=Path, default=Path("practice.json"))
    given = parser.parse_args()
    results = []
    for policy in given.policies:
        found = practise(policy, 3600 * given.hours, given.seed)
        results.append(found)
        print(f"{policy:8}{found['hours']:8.2f} h{found['tries']:7} tries{found['resets']:7} resets"
              f"{found['interventions']:5} hands   put back {100 * found['put_back']:6.2f} %"
              f"   reset {found['reset_s']['mean']:5.1f} s", flush=True)  # fmt: skip
    summary = {"seed": given.seed, "bar": BAR, "pass": all(r["put_back"] >= BAR for r in results)}
    given.out.write_text(json.dumps(summary | {"results": results}, indent=1))
    print(given.out)


if __name__ == "__main__":
    main()
