"A run of 50 and of 500 cached stages with nothing to do: whole process, and how it grows."

import sys

from bench import in_turn, own_places, report, summary, timed
from makers import write_stage

from mlkit.core.store import Store
from mlkit.pipeline.graph import load_pipeline, plan_jobs
from mlkit.pipeline.plan import plan


def write_layers(folder, count: int):
    "Write stages in chains of ten."
    for n in range(count):
        source = f'text = Input("s{n - 1:03d}/text.txt")\n' if n % 10 else ""
        write_stage(folder, f"s{n:03d}", f'{source}out = Output("text.txt")\nn: int = {n}', "import json, pathlib", f"def work(x):\n    return x * {n}", 'open(out, "w").write(str(work(n)))')


def fill(folder, store: Store):
    "Put a result for each job into the store, as if all had run."
    pipeline, text = load_pipeline(folder), store.root.parent / "text.txt"
    jobs = plan_jobs(pipeline)
    while waiting := [d for d in plan(store, pipeline, jobs) if d.state == "run"]:
        for decision in waiting:
            text.write_text(decision.job.id)
            store.write(decision.key, {"outputs": {"text.txt": store.put(text).to_dict()}, "components": decision.components, "records": {}, "seconds": 1.0, "cells": []})


if __name__ == "__main__":
    home = own_places()
    store, calls = Store(home / "store").make(), {}
    for count in (50, 250, 500):
        write_layers(home / f"layers{count}", count)
        fill(home / f"layers{count}", store)
        calls[f"{count} stages"] = lambda count=count: timed([sys.executable, "-m", "mlkit", "run", home / f"layers{count}"])
    calls["python -c pass"] = lambda: timed([sys.executable, "-c", "pass"])
    seconds = in_turn(7, **calls)
    per = (summary(seconds["500 stages"])["median"] - summary(seconds["50 stages"])["median"]) / 450 * 1000
    report("A run with nothing to do, seconds", [{"what": n, **summary(s)} for n, s in seconds.items()], [f"each further stage: {per:.2f} ms", "aims: 50 stages under 0.5 s, 500 under 2 s"])
