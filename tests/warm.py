"""One process imports what runs a notebook, another also what the rooms on torch stand on, and each notebook runs in a fork of one of them: the imports take longer than most notebooks do.

`run_notebook` starts such a process when it is first asked for; run as a program, this file is one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path

LIGHT = "nbdev.test", "IPython", "matplotlib.pyplot"  # none of them starts a thread, as polars would
HEAVY = "torch", "pytorch_lightning", "torchmetrics", "timm", "transformers", "peft", "onnxscript", "optuna", "torch_pruning", *LIGHT
ON_TORCH = {"nlp", "optimize", "timeseries", "train", "vision"}


@cache
def _server(names: tuple[str, ...]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return subprocess.Popen([sys.executable, __file__, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_notebook(notebook: Path, root: Path, log: Path, environment: dict[str, str], seconds: int = 600) -> int:
    "Run a notebook as `nbdev-test` does, what it says into a file; the exit code, negative if a signal ended it."
    server = _server(HEAVY if notebook.parent.name in ON_TORCH else LIGHT)
    print(json.dumps([str(notebook), str(root), str(log), environment, seconds]), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def _child(notebook: str, root: str, log: str, environment: dict[str, str]):
    os.setsid()
    os.environ |= environment
    os.chdir(root)
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, file in ((0, nothing), (1, said), (2, said)):
        os.dup2(file, target)
    sys.argv = ["nbdev-test", notebook]
    sys.modules["nbdev.test"].nbdev_test(notebook, n_workers=0)


def _wait(child: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(done[1])


def main():
    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        *job, seconds = json.loads(line)
        if not (child := os.fork()):
            code = 1
            try:
                _child(*job)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(_wait(child, seconds), flush=True)


if __name__ == "__main__":
    main()
