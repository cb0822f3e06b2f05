"""What the benchmarks share: whole commands timed in turn, a table for people, JSON for machines.

Run one with `python tests/benchmarks/bench_start.py [--json FILE]`. Figures are from one run on one machine, so that ratios hold where single times would not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlkit.core.display import text_table


def timed(command: list, **more) -> float:
    "Run a command and return its wall time in seconds; raise if it fails."
    started = time.perf_counter()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **more)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return seconds


def in_turn(runs: int, **calls) -> dict[str, list[float]]:
    "Call functions that return seconds one after the other, `runs` times, so that a change of the machine's speed hits all of them."
    seconds = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append(call())
    return seconds


def summary(seconds: list[float]) -> dict:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": len(seconds)}


def own_places() -> Path:
    "Make a folder for this benchmark with a store, caches and fork servers of its own; processes started from here use them."
    home = Path(tempfile.mkdtemp(prefix="mlkit-bench-"))
    (home / "runtime").mkdir(mode=0o700)
    os.environ |= {"MLKIT_STORE": str(home / "store"), "MLKIT_RUNTIME": str(home / "runtime"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip installs has its bytecode: a checkout may have its own as well
    return home


def report(title: str, rows: list[dict], notes: list[str] = ()):
    "Print rows as a table, and write them to the file of `--json` if it was given."
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    header = list(rows[0])
    print(f"\n{title}\n")
    print(text_table([[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows], header))
    for note in notes:
        print(note)
    if args.json:
        args.json.write_text(json.dumps({"title": title, "rows": rows, "notes": list(notes)}, indent=1))
