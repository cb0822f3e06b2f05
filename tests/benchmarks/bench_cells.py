"Cost of executing a notebook cell by cell: mlkit's engine against nbclient and papermill. `python tests/benchmarks/bench_cells.py [--json FILE]`"

import socket
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import nbformat
import papermill
from bench import report
from nbclient import NotebookClient

from mlkit.pipeline.engine import execute
from mlkit.pipeline.processes import Channel


def trivial(cells: int):
    "Make a notebook of many cells that do nothing much."
    return notebook([f"x = {n}" for n in range(cells)])


def heavy(cells: int, size: int):
    "Make a notebook with one large output and some cells after it."
    return notebook([f"print('\\n'.join(['x' * 99] * {size // 100}))", *(f"x = {n}" for n in range(cells))])


def notebook(sources: list[str]):
    "Make a notebook from the sources of its cells."
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata=spec)


def by_nbclient(path: Path, out: Path):
    made = nbformat.read(path, 4)
    NotebookClient(made, kernel_name="python3").execute()
    nbformat.write(made, out)


def by_papermill(path: Path, out: Path):
    papermill.execute_notebook(path, out, progress_bar=False)


def by_mlkit(path: Path, out: Path):
    papermill.execute_notebook(path, out, engine_name="mlkit", progress_bar=False)


def by_stage(path: Path, out: Path):
    "Execute as a worker of `mlkit run` does, but for the warm kernel; what it says is read as it comes, since a socket holds only so much."
    ours, theirs = map(Channel, socket.socketpair())
    reader = threading.Thread(target=lambda: [None for _ in iter(ours.receive, None)])
    reader.start()
    request = {"notebook": str(path), "output": str(out), "journal": f"{out}.journal.jsonl", "cwd": str(path.parent), "stage": "bench", "warm": False}
    try:
        assert execute(request, theirs)["state"] == "done"
    finally:
        theirs.close()
        reader.join()
        ours.close()


WAYS = {"nbclient": by_nbclient, "mlkit": by_mlkit, "mlkit stage": by_stage, "papermill": by_papermill}


def measure(repeats: int = 3, cells: int = 300) -> dict:
    "Return the median seconds by case and way; ways take turns, so that all see the same machine."
    cases, times = {f"{cells} trivial cells": trivial(cells), "5 MB output, 50 cells": heavy(50, 5_000_000)}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case, made in cases.items():
            path = Path(folder) / "in.ipynb"
            nbformat.write(made, path)
            for turn in range(repeats):
                for way, function in WAYS.items():
                    if way == "papermill" and turn:  # too slow to be asked twice
                        continue
                    started = time.perf_counter()
                    function(path, Path(folder) / "out.ipynb")
                    times.setdefault(case, {}).setdefault(way, []).append(time.perf_counter() - started)
    return {case: {way: median(seconds) for way, seconds in ways.items()} for case, ways in times.items()}


def main():
    rows = []
    for case, ways in measure().items():
        rows.append({"case": case, **ways, "mlkit / nbclient": ways["mlkit"] / ways["nbclient"], "stage / nbclient": ways["mlkit stage"] / ways["nbclient"]})
    report("Seconds from notebook to executed notebook, kernel start included", rows)


if __name__ == "__main__":
    main()
