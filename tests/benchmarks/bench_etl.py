"""20 million orders on disk: join, filter, aggregate and split them with mlkit.data, with plain polars and with pandas, each in a process of its own.

`python tests/benchmarks/bench_etl.py [--json FILE]`; `MLKIT_BENCH_ROWS` makes it smaller. pandas holds the table in memory, so it gets `MLKIT_BENCH_PANDAS` rows (a tenth by default).
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from bench import report

ROWS = int(os.environ.get("MLKIT_BENCH_ROWS", 20_000_000))
PANDAS = int(os.environ.get("MLKIT_BENCH_PANDAS", ROWS // 10))
CUSTOMERS, PART = 200_000, 1_000_000


def generate(folder: Path, rows: int):
    "Write orders in parts of a million rows, and the customers that they belong to."
    (folder / "orders").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for start in range(0, rows, PART):
        n = min(PART, rows - start)
        columns = {f"x{i}": rng.standard_normal(n) for i in range(10)}
        orders = pl.DataFrame({"id": np.arange(start, start + n), "customer": rng.integers(0, CUSTOMERS, n), "price": rng.gamma(2.0, 20.0, n), **columns})
        orders.write_parquet(folder / "orders" / f"{start // PART:03}.parquet", compression="uncompressed")
    regions = [f"region {i}" for i in range(12)]
    pl.DataFrame({"customer": np.arange(CUSTOMERS), "region": rng.choice(regions, CUSTOMERS), "active": rng.random(CUSTOMERS) < 0.8}).write_parquet(folder / "customers.parquet")


def joined(orders: pl.LazyFrame, customers: pl.LazyFrame) -> pl.LazyFrame:
    return orders.filter(pl.col("price") > 10).join(customers.filter("active"), on="customer")


def finish(table: pl.LazyFrame, folder: Path):
    "Write the split table, and what each region bought on each side."
    table.sink_parquet(folder / "table.parquet")
    pl.scan_parquet(folder / "table.parquet").group_by("region", "split").agg(pl.len(), pl.col("price").sum()).sink_parquet(folder / "regions.parquet")


def with_mlkit(folder: Path, out: Path):
    from mlkit.data import scan, split

    finish(joined(scan(folder / "orders"), split(scan(folder / "customers.parquet"), "customer")), out)


def with_polars(folder: Path, out: Path):
    at = pl.col("customer").hash(0) % 1000
    side = pl.when(at < 800).then(pl.lit("train")).when(at < 900).then(pl.lit("validation")).otherwise(pl.lit("test"))
    finish(joined(pl.scan_parquet(folder / "orders/*.parquet"), pl.scan_parquet(folder / "customers.parquet").with_columns(split=side)), out)


def with_pandas(folder: Path, out: Path):
    import pandas as pd

    orders = pl.scan_parquet(folder / "orders/*.parquet").head(PANDAS).collect()
    orders = pd.DataFrame({name: orders[name].to_numpy() for name in orders.columns})
    customers = pl.read_parquet(folder / "customers.parquet")
    customers = pd.DataFrame({name: customers[name].to_numpy() for name in customers.columns})
    at = pd.util.hash_array(customers["customer"].to_numpy()) % 1000
    customers["split"] = np.select([at < 800, at < 900], ["train", "validation"], "test")
    table = orders[orders["price"] > 10].merge(customers[customers["active"]], on="customer")
    pl.DataFrame({name: table[name].to_numpy() for name in table.columns}).write_parquet(out / "table.parquet")
    table.groupby(["region", "split"])["price"].agg(["size", "sum"]).to_csv(out / "regions.csv")


WAYS = {"mlkit": with_mlkit, "polars": with_polars, "pandas": with_pandas}


def measured(way: str, folder: Path) -> tuple[float, float, float, int]:
    "Run one way in a fresh process: seconds on the clock and of all processors, peak memory in MB, rows that came out."
    os.sync()  # or it would wait for the disk to take what the one before it has written
    with tempfile.TemporaryDirectory(dir=folder) as out:
        done = subprocess.run([sys.executable, __file__, way, str(folder), out], capture_output=True, text=True, check=True)
        return *map(float, done.stdout.split()), pl.scan_parquet(f"{out}/table.parquet").select(pl.len()).collect().item()


def one(way: str, folder: str, out: str):
    started, worked = time.perf_counter(), time.process_time()
    WAYS[way](Path(folder), Path(out))
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]  # ru_maxrss would count the parent's before exec
    print(time.perf_counter() - started, time.process_time() - worked, int(peak) / 1000)


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        generate(folder, ROWS)
        gigabytes = sum(p.stat().st_size for p in (folder / "orders").iterdir()) / 1e9
        found = {way: [] for way in WAYS}
        for run in range(5):
            for way in list(WAYS) if not run else ("polars", "mlkit") if run % 2 else ("mlkit", "polars"):
                found[way].append(measured(way, folder))
    rows = []
    for way, runs in found.items():
        given = PANDAS if way == "pandas" else ROWS
        seconds, worked = (statistics.median(run[i] for run in runs) for i in (0, 1))
        rows.append({"way": way, "rows in": given, "rows out": runs[0][3], "seconds": seconds, "CPU seconds": worked, "million rows/s": given / seconds / 1e6, "peak MB": max(run[2] for run in runs)})
    ratios = ", ".join(f"{rows[0][what] / rows[1][what]:.3f} in {what}" for what in ("seconds", "CPU seconds"))
    report(f"ETL: {ROWS:,} orders ({gigabytes:.1f} GB of Parquet) joined, filtered, split and summed", rows, [f"mlkit / polars: {ratios} (medians of 5, in turns; pandas ran once)"])


if __name__ == "__main__":
    one(*sys.argv[1:]) if len(sys.argv) > 1 and sys.argv[1] in WAYS else main()
