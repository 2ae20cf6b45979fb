"""The campaign of faults: `hatch run faults --kills 200 --damages 200 --kills-of-processes 20`."""

from __future__ import annotations

import argparse

from tests.faults.damage import damages
from tests.faults.kills import kills
from tests.faults.processes import kills_of_processes


def main() -> None:
    """Run as many kills and damages as asked for, and say what came of them; an AssertionError ends it."""
    parser = argparse.ArgumentParser(prog="hatch run faults", description="Kill runs and damage checkpoints.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--kills-of-processes", type=int, default=20, help="of runs of one, two and four processes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.damages:
        found = damages(given.damages, given.seed)
        shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(found.items()))
        print(f"{given.damages} damages: {shown}; 0 silently wrong", flush=True)
    if given.kills:
        kills(given.kills, seed=given.seed, say=lambda line: print(line, flush=True))
    if given.kills_of_processes:
        kills_of_processes(given.kills_of_processes, seed=given.seed, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
