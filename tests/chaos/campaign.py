"""`make chaos N=500`: faults at random between a learner and two actors; every record stored once, in order."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.nemesis import Nemesis

BAD = ("lost", "doubled", "disordered", "altered", "spools_left")


def run(faults: int, seed: int, folder: Path, hz: float = 300.0) -> dict:
    """The totals of one campaign, with a line of progress now and then."""
    started = told = time.monotonic()
    with Nemesis(folder, seed, hz) as nemesis:
        for number in range(1, faults + 1):
            what = nemesis.fault()
            if time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{told - started:5.0f} s  {number}/{faults} faults, the last: {what}", flush=True)
        totals = nemesis.finish()
    wall_s = round(time.monotonic() - started, 1)
    return {"seed": seed, "ok": not any(totals[key] for key in BAD), "wall_s": wall_s} | totals


def line(totals: dict) -> str:
    """Totals for people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in totals["by_kind"].items())
    keys = ("records", "streams", "lost", "doubled", "disordered", "altered", "cut_by_kill", "spools_left")
    counts = ", ".join(f"{key} {totals[key]:,}" for key in keys)
    first = totals["first_s"]
    return (f"seed {totals['seed']}, {totals['faults']} faults ({kinds}) in {totals['wall_s']:.0f} s: {counts}; "
            f"first delivery after a fault p50 {first['p50']} s, max {first['max']} s")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--out", default="chaos.json")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tether-chaos-"))
    print(f"seed {options.seed}, in {folder}", flush=True)
    totals = run(options.faults, options.seed, folder)
    for text in totals["worst"]:
        print(text)
    if totals["ok"]:
        shutil.rmtree(folder)
    Path(options.out).write_text(json.dumps(totals, indent=1) + "\n")
    print(line(totals))
    print(Path(options.out).resolve())
    return 0 if totals["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
