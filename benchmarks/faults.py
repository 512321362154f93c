"""Break kdlora for a long time: kill it in every stage, let processes fight for a folder, fuzz its readers, run on.

    python benchmarks/faults.py kill  --out DIR --kills 50      # SIGKILL, SIGTERM, Ctrl-C at moments chosen by a seed
    python benchmarks/faults.py share --out DIR --rounds 20     # two processes on one folder, under load
    python benchmarks/faults.py fuzz  --out DIR --minutes 5     # needs: pip install atheris
    python benchmarks/faults.py last  --out DIR                 # 200 epochs, and 20 experiments in one process
    python benchmarks/faults.py summary --out DIR

Each part adds lines of JSON to `DIR/<part>.jsonl` and goes on where it stopped; `--seconds` bounds one call.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

_TESTS = Path(__file__).parent.parent / "tests"


def main() -> None:
    """Run one part."""
    sys.path[:0] = [str(_TESTS), str(_TESTS / "faults")]  # the driver and the tiny models are the tests' own
    import faults_fuzz
    import faults_kill
    import faults_last
    import faults_share
    import faults_summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kill", "share", "fuzz", "last", "summary"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of the work")
    parser.add_argument("--kills", type=int, default=50, help="kills in all, over every call")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of `share` in all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of fuzzing, for each reader")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "kill":
        faults_kill.strike(options.out, kills=options.kills, seed=options.seed, until=until)
    elif options.part == "share":
        faults_share.compete(options.out, rounds=options.rounds, seed=options.seed, until=until)
    elif options.part == "fuzz":
        faults_fuzz.fuzz(options.out, minutes=options.minutes, seed=options.seed, until=until)
    elif options.part == "last":
        faults_last.endure(options.out, until=until)
    print(faults_summary.summarise(options.out))


if __name__ == "__main__":
    main()
