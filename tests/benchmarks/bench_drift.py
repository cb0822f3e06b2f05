"""Drift reports side by side with Evidently and NannyML, adaptive windows beside river, memory of a stream, cost in a server, and whether alarms and intervals keep their word.

The peers live in environments of their own, made on first use below the temporary folder (or at $MLKIT_BENCH_PEERS); one that cannot be installed is said to be missing.
The 100 million rows are one Parquet file of 5 million, read twenty times over: what is measured is the stream, not the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import polars as pl
from bench import report

from mlkit.data.profiles import Profiler, find_kinds, profile
from mlkit.monitor import Adwin, Cbpe, Limits, classification, compare
from mlkit.monitor.statistics import chi_squared, ks, ks_pvalue, mmd, tell_apart

ROWS = int(os.environ.get("MLKIT_BENCH_ROWS", 1_000_000))
ended = "import json; peak = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')); print(json.dumps({'seconds': time.perf_counter() - t, 'peak': peak / 1e3, 'found': found}))"
codes = {
    "mlkit": "import sys, time, polars as pl; from mlkit.monitor import check\nt = time.perf_counter(); r = check(pl.scan_parquet(sys.argv[1]), pl.scan_parquet(sys.argv[2])); p = r.page(); found = len(r.drift.alarms.filter(pl.col('kind') != 'rows'))\n",
    "Evidently": "import sys, time, pandas as pd, evidently; from evidently import Report; from evidently.presets import DataDriftPreset\nt = time.perf_counter(); a, b = (pd.read_parquet(p) for p in sys.argv[1:3]); r = Report([DataDriftPreset()]).run(b, a); p = r.json(); found = evidently.__version__\n",
    "NannyML": "import sys, time, pandas as pd, nannyml as n\nt = time.perf_counter(); a, b = (pd.read_parquet(p) for p in sys.argv[1:3]); c = n.UnivariateDriftCalculator(column_names=list(a), chunk_size=len(b)); r = c.fit(a).calculate(b).to_df(); found = n.__version__\n",
}  # fmt: skip


def write_tables(home: Path) -> list[Path]:
    "Write a baseline and a table in which three of twenty columns have moved."
    paths = []
    for name, move in (("before", 0.0), ("now", 0.5)):
        rng = np.random.default_rng(len(paths))
        numbers = {f"x{i}": rng.normal(move * (i < 2), 1, ROWS) for i in range(15)}
        words = {f"c{i}": np.array([f"value {k}" for k in range(5 + 20 * i)])[np.minimum(rng.integers(0, 5 + 20 * i, ROWS), 4 + 20 * i - 2 * bool(move) * (i == 0))] for i in range(5)}
        paths.append(home / f"{name}.parquet")
        pl.DataFrame({**numbers, **words}).write_parquet(paths[-1])
    return paths


def peer(name: str, package: str) -> str | None:
    "Return a Python that has a peer; None if it cannot be installed."
    home = Path(os.environ.get("MLKIT_BENCH_PEERS") or Path(tempfile.gettempdir()) / "mlkit-bench-peers") / package
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", package, "pandas<3", "pyarrow", "statsmodels"], capture_output=True)
    return str(python) if subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode == 0 else None


def timed_report(name: str, python: str | None, paths: list[Path]) -> dict:
    "Run one tool in a process of its own."
    row = {"what": f"{name}, {ROWS:,} x 20 twice", "seconds": None, "peak MB": None, "found": "not installed"}
    if python is None:
        return row
    done = subprocess.run([python, "-W", "ignore", "-c", codes[name] + ended, *map(str, paths)], capture_output=True, text=True)
    if done.returncode:
        return row | {"found": f"failed: {done.stderr.strip().splitlines()[-1][:80]}"}
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return row | {"seconds": figures["seconds"], "peak MB": round(figures["peak"]), "found": str(figures["found"])}


def streamed(home: Path, times: int) -> dict:
    "Profile a file of 5 million rows so many times over."
    path = home / "part.parquet"
    if not path.exists():
        rng = np.random.default_rng(0)
        pl.DataFrame({"x": rng.normal(size=5_000_000).astype(np.float32), "c": rng.integers(0, 100, 5_000_000).astype("U2")}).write_parquet(path)
    code = "import sys, time, polars as pl; from mlkit.data.profiles import profile\nt = time.perf_counter(); p = profile(pl.scan_parquet([sys.argv[1]] * int(sys.argv[2]))); found = p.rows\n"
    done = subprocess.run([sys.executable, "-c", code + ended, str(path), str(times)], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    return {"what": f"profile of a stream, {figures['found']:,} rows", "seconds": figures["seconds"], "peak MB": round(figures["peak"]), "found": ""}


def in_a_server(batch: int, rows: int = 200_000, wide: int = 20) -> dict:
    "Update a profile with batches of requests, as a server would that lets some wait; counts processor time."
    frame = pl.DataFrame({f"x{i}": np.random.default_rng(i).normal(size=rows) for i in range(wide)})
    profiler, made, started = Profiler(find_kinds(frame), 1000), None, time.process_time()
    for at in range(0, rows, batch):
        made = profiler(frame[at : at + batch], made)
    each = (time.process_time() - started) / rows * 1e6
    return {"what": f"sketches in a server, {wide} numbers a row, {batch:,} at a time", "seconds": None, "peak MB": None, "found": f"{each:.2f} µs a row; {each / 1e6 * 8000:.1%} of a core at 8,000 rows/s"}


def streams(rows: int = 20_000) -> list[dict]:
    "Adaptive windows beside river's: rows until a change is noticed, alarms before it, and speed."
    def river():
        python = peer("river", "river")
        code = "import sys, json, time\nfrom river.drift import ADWIN\ntold, t = [], time.perf_counter()\nfor stream in json.load(open(sys.argv[1])):\n    a, hits = ADWIN(delta=0.002), []\n    for i, x in enumerate(stream):\n        a.update(x)\n        hits += [i] if a.drift_detected else []\n    told.append(hits)\nprint(json.dumps([told, time.perf_counter() - t]))"
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([s.tolist() for s in made], file)
            file.flush()
            return json.loads(subprocess.run([python, "-c", code, file.name], capture_output=True, text=True, check=True).stdout) if python else None

    def ours():
        started = time.perf_counter()
        return [[a.at for a in Adwin().add(s).alarms] for s in made], time.perf_counter() - started

    made = [np.concatenate([r.random(rows // 2) < 0.3, r.random(rows // 2) < 0.4]) * 1.0 for r in map(np.random.default_rng, range(20))]
    lines = []
    for name, found in (("mlkit", ours()), ("river", river())):
        if found is None:
            lines.append({"what": f"adaptive windows: {name}", "seconds": None, "peak MB": None, "found": "not installed"})
            continue
        false, late = sum(a < rows // 2 for hits in found[0] for a in hits), [next((a for a in hits if a >= rows // 2), rows) - rows // 2 for hits in found[0]]
        lines.append({"what": f"adaptive windows: {name}, 20 streams of {rows:,}, 30 % to 40 %", "seconds": found[1], "peak MB": None, "found": f"noticed after {np.median(late):.0f} rows (median), {false} false alarms"})
    return lines


def one_column(seed: int, n: int, move: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.normal(move, 1, n)


def tests_alone(rounds: int) -> list[dict]:
    "The share of rounds in which p is at most 0.05."
    def pair(seed):
        rng = np.random.default_rng(seed)
        return rng.normal(size=(150, 8)), rng.normal(size=(150, 8))

    def counts(seed):
        return np.random.default_rng(seed).multinomial(500, [0.3, 0.3, 0.2, 0.1, 0.1], 2)

    calls = {
        "KS": (rounds, lambda s: ks_pvalue(ks(*(v := one_column(s, 200, 0.0))), *map(len, v))), "chi-squared": (rounds, lambda s: chi_squared(*counts(s))[1]),
        "MMD": (rounds // 5, lambda s: mmd(*pair(s), shuffles=99)[1]), "domain classifier": (rounds // 5, lambda s: tell_apart(*pair(s)).pvalue),
    }  # fmt: skip
    shares = {name: (n, np.mean([call(seed) <= 0.05 for seed in range(n)])) for name, (n, call) in calls.items()}
    return [{"what": f"no change: {name}, p <= 0.05", "seconds": None, "peak MB": None, "found": f"{share:.1%} of {n}"} for name, (n, share) in shares.items()]


def verdicts(rounds: int) -> list[dict]:
    "The share of tables of twenty columns with an alarm on an unchanged one, and on the changed one, of 1,000 rows each."
    lines = []
    for effect in (0.0, 0.05, 0.1):
        shares = {}
        for move in (0.0, 0.1, 0.25, 0.5):
            hits = false = 0
            for seed in range(rounds):
                rng = np.random.default_rng([seed, int(move * 100)])
                before, now = (pl.DataFrame({f"x{i}": rng.normal(m * (i == 0), 1, 1000) for i in range(20)}) for m in (0.0, move))
                alarms = set(compare(profile(before, rows=0), profile(now, rows=0), Limits(effect=effect)).alarms["column"])
                hits, false = hits + ("x0" in alarms), false + bool(alarms - {"x0"})
            shares[move] = f"{hits / rounds:.0%} ({false / rounds:.1%} false)"
        lines.append({"what": f"alarm at effect {effect}, q 0.01: shift 0, .1, .25, .5 sd", "seconds": None, "peak MB": None, "found": "  ".join(shares.values())})
    return lines


def estimates(rounds: int, classes: int) -> dict:
    "How often a 95 % interval of CBPE holds the accuracy of rows that are harder than those it learnt from; with two classes confidence tells all, with more it does not quite."
    def answers(seed, n, spread):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, spread, (n, classes))
        true, said = (np.exp(s * logits) / np.exp(s * logits).sum(1, keepdims=True) for s in (1.0, 1.6))
        label = (rng.random((n, 1)) > true.cumsum(1)).sum(1)
        return pl.DataFrame({"label": label.astype("U1"), "prediction": said.argmax(1).astype("U1"), "confidence": said.max(1), "probabilities": said})

    inside, names = {"accuracy": [], "macro_f1": []}, [str(i) for i in range(classes)]
    for seed in range(rounds):
        fresh = answers([seed, 1], 800, 1.3)
        guess, truth = Cbpe.fit(answers([seed, 0], 2000, 2.0), names).estimate(fresh), classification(fresh, names)
        for metric, hits in inside.items():
            row, value = guess.row(by_predicate=pl.col("metric") == metric, named=True), truth.row(by_predicate=pl.col("metric") == metric, named=True)["value"]
            hits.append(row["low"] <= value <= row["high"])
    return {"what": f"CBPE, {classes} classes: 95 % intervals that hold the truth", "seconds": None, "peak MB": None, "found": ", ".join(f"{m} {np.mean(h):.1%} of {rounds}" for m, h in inside.items())}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="mlkit-bench-") as folder:
        home = Path(folder)
        paths = write_tables(home)
        rows = [timed_report("mlkit", sys.executable, paths) for _ in range(3)]
        rows += [timed_report(name, peer(name, name.lower()), paths) for name in ("Evidently", "NannyML")]
        rows += [streamed(home, times) for times in (1, 5, 20)]
        rows += [in_a_server(1000), in_a_server(5000), *streams(), *tests_alone(2000), *verdicts(100), estimates(300, 2), estimates(300, 4)]
    notes = ["aims: under 2.5 s and 500 MB for mlkit, whose time includes joint drift, slices and the page; memory of the stream flat"]
    report("Drift: speed, memory, honesty", rows, notes)
