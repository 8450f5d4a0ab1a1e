"""The peer of `make curves`: sbx (Stable-Baselines3 in JAX) on the same environment, measured in the same way.

    python -m tests.bench.peer train|eval ENV ALGORITHM FOLDER --seed N [--steps N] [--episodes N]

`train` writes FOLDER/metrics.jsonl, with the keys and the clock of a run of tether (`env/episode_return` at step and
time_s; time_s begins before anything is built or compiled), and the policy. `eval` prints the JSON that `tether eval
--json` would. ENV is a Gymnasium id, or a task of tether's, which is then its registered twin: the very environment
tether's actor drives, with its observation, action limits, resets and laps. There a step is a tick of the robot,
resets included (DESIGN); a peer's own count leaves the ticks of a reset out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
from tether.launch import evaluate
from tether.robot_env.env import RobotEnv
from tether.robot_env.record import Record
from tether.robot_env.task import shipped

# sbx 0.28's class and what is not its default. `sac`: lr 3e-4, 2 critics of 256 x 256, 1 update a step; `crossq`:
# lr 1e-3, critics of 1024 x 1024 with batch renormalisation, 1 update a step, actor every third; both 100 random steps,
# batch 256, gamma 0.99. `droq` is SAC with what sbx's README gives for it; its README's 10,000 random steps are
# meant for a million, so that the default of 100 stays, which is to its advantage here.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sac": ("SAC", {}),
    "crossq": ("CrossQ", {}),
    "droq": ("SAC", {
        "gradient_steps": 20, "policy_delay": 20, "policy_kwargs": {"dropout_rate": 0.01, "layer_norm": True},
    }),
}  # fmt: skip
SAY_EVERY_S = 10.0


def make(name: str, seed: int) -> gymnasium.Env:
    """The environment; `seed` is of a twin's noise, and goes to `reset` besides."""
    if name in shipped():
        return gymnasium.make(f"tether.launch.twins:tether/{name}-v0", seed=seed)
    return gymnasium.make(name)


class Written:
    """FOLDER/metrics.jsonl, and now and then a line for a person."""

    def __init__(self, folder: Path) -> None:
        self._start = self._said = time.monotonic()
        self._file = open(folder / "metrics.jsonl", "w", buffering=1, encoding="utf-8")

    def row(self, step: int, values: dict[str, float]) -> None:
        """What was measured at a step."""
        now = time.monotonic()
        self._file.write(json.dumps({"step": step, "time_s": round(now - self._start, 3), **values}) + "\n")
        if now - self._said > SAY_EVERY_S:
            self._said = now
            print(f"step {step:,} after {now - self._start:.0f} s: {values}", file=sys.stderr, flush=True)


def train(env: gymnasium.Env, algorithm: str, folder: Path, seed: int, steps: int) -> str:
    """Train and keep the policy in `folder`. Returns what to say of it."""
    import sbx
    from stable_baselines3.common.callbacks import BaseCallback

    folder.mkdir(parents=True, exist_ok=True)
    start, written, robot = time.monotonic(), Written(folder), env.unwrapped
    episodes = evaluate.Episodes()  # of a robot of ours
    if isinstance(robot, RobotEnv):

        def see(record: Record) -> None:
            found = episodes.push(record)
            if "env/lap_time_s" in found or "env/episode_return" in found:
                written.row(episodes.steps, found)

        robot.on_record.append(see)

    class Watch(BaseCallback):
        """Writes the episodes of an environment that is not ours, and ends when the steps are done."""

        def _on_step(self) -> bool:
            if isinstance(robot, RobotEnv):
                return episodes.steps < steps
            for info in self.locals["infos"]:
                if "episode" in info:  # of SB3's Monitor
                    sums = info["episode"]
                    found = {"env/episode_return": float(sums["r"]), "env/episode_length": int(sums["l"])}
                    written.row(self.num_timesteps, found)
            return True

    kind, settings = PEERS[algorithm]
    model = getattr(sbx, kind)("MlpPolicy", env, seed=seed, **settings)
    model.learn(steps, callback=Watch())
    done = episodes.steps if isinstance(robot, RobotEnv) else model.num_timesteps
    written.row(done, {"learn/updates": model._n_updates})
    model.save(folder / "policy")
    return f"{done:,} steps in {time.monotonic() - start:.1f} s; the policy is in {folder}"


def test(env: gymnasium.Env, algorithm: str, folder: Path, seed: int, episodes: int) -> dict[str, Any]:
    """Episodes of the deterministic policy, as `tether eval` drives them."""
    import sbx

    model = getattr(sbx, PEERS[algorithm][0]).load(folder / "policy")
    if isinstance(env.unwrapped, RobotEnv):
        driver = lambda obs, before: model.predict(obs, deterministic=True)[0]  # noqa: E731
        return evaluate.drive(env.unwrapped, driver, episodes=episodes, seed=seed)
    returns: list[float] = []
    obs, _ = env.reset(seed=seed)
    while len(returns) < episodes:
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
        obs, _ = env.reset()
    return {"episodes": episodes, "return_mean": sum(returns) / episodes, "returns": returns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "eval"])
    parser.add_argument("env")
    parser.add_argument("algorithm", choices=list(PEERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--episodes", type=int, default=10)
    options = parser.parse_args()
    env = make(options.env, options.seed)
    chosen = env, options.algorithm, options.folder, options.seed
    if options.what == "train":
        print(train(*chosen, options.steps))
    else:
        print(json.dumps(test(*chosen, options.episodes)))


if __name__ == "__main__":
    main()
