"""From command to finished notebook for a stage that imports torch, pytorch_lightning, timm and transformers: `mlkit run` against papermill.

One stage, and a chain of five; mlkit first cold (no server yet), then warm.
"""

import shutil
import sys
from pathlib import Path

from bench import in_turn, own_places, report, summary, timed
from makers import write_stage

imports = "import torch, pytorch_lightning, timm, transformers"


def write_stages(folder: Path, count: int):
    for n in range(count):
        source = f'text = Input("s{n - 1}/text.txt")\n' if n else ""
        write_stage(folder, f"s{n}", f'{source}out = Output("text.txt")', imports, f'open(out, "w").write("{n}")')


def run(folder: Path) -> float:
    shutil.rmtree(folder.parent / "store", ignore_errors=True)
    return timed([sys.executable, "-m", "mlkit", "run", folder, "--jobs", 1])


def papermill(folder: Path) -> float:
    "Execute all stages one after the other; paths are passed as mlkit would."
    total, made = 0.0, folder.parent / "papermill"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for path in sorted(folder.glob("*.ipynb")):
        total += timed([Path(sys.executable).with_name("papermill"), "--no-progress-bar", path, made / path.name, "-p", "out", made / f"{path.stem}.txt"])
    return total


if __name__ == "__main__":
    home, stop = own_places(), [sys.executable, "-m", "mlkit", "kernel", "stop"]
    write_stages(home / "one", 1)
    write_stages(home / "five", 5)
    papermill(home / "one")  # the files of the libraries are in the page cache from here on

    def cold() -> float:
        timed(stop)
        return run(home / "one")

    first = in_turn(3, **{"papermill, one stage": lambda: papermill(home / "one"), "mlkit run, one stage, first": cold})
    run(home / "one")
    warm = in_turn(5, **{"mlkit run, one stage, warm": lambda: run(home / "one"), "mlkit run, five stages, warm": lambda: run(home / "five")})
    chain = in_turn(1, **{"papermill, five stages": lambda: papermill(home / "five")})
    timed(stop)
    rows = [{"what": n, **summary(s)} for n, s in {**first, **warm, **chain}.items()]
    median = {row["what"]: row["median"] for row in rows}
    notes = [
        f"one stage: {median['papermill, one stage'] / median['mlkit run, one stage, warm']:.1f} times faster warm (aim 20)",
        f"per stage in a chain of five: {median['papermill, five stages'] / median['mlkit run, five stages, warm']:.1f} times faster warm (aim 20)",
        f"the first, cold one takes {median['mlkit run, one stage, first'] / median['papermill, one stage']:.2f} of papermill's time (aim 1.10 at most)",
    ]
    report("Start of a stage with the full ML stack imported, seconds", rows, notes)
