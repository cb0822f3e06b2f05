"What several tests need: small pipelines, the command line as a person uses it, and a look at what processes are left."

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path


def cell(source: str, *tags: str) -> dict:
    "Make a code cell."
    return {"cell_type": "code", "id": uuid.uuid4().hex[:8], "metadata": {"tags": list(tags)}, "source": source, "outputs": [], "execution_count": None}


def write_stage(folder: Path, name: str, parameters: str, *cells: str | dict) -> Path:
    "Write a stage notebook: a parameters cell, then code cells."
    contract = "from mlkit.pipeline import Input, Output, Secret, Source, record\n"
    made = [cell(contract + parameters, "parameters"), *(c if isinstance(c, dict) else cell(c) for c in cells)]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}))
    return path


def write_chain(folder: Path, names=("first", "second", "third"), pause: float = 0.0) -> Path:
    "Write a pipeline in which each stage appends its name to what the one before it wrote."
    before = None
    for name in names:
        source = f'text = Input("{before}/text.txt")\n' if before else ""
        read = "open(text).read()" if before else '""'
        write_stage(
            folder, name, source + f'out = Output("text.txt")\npause: float = {pause}', "import time", "time.sleep(pause)",
            f'open(out, "w").write({read} + "{name}\\n" * 1000)', f'record(lines=len(open(out).read().splitlines()), last="{name}")',
        )  # fmt: skip
        before = name
    return folder


def mlkit(*words, check: int | None = 0, timeout: float = 120, **more) -> subprocess.CompletedProcess:
    "Run the command line and return what it said; `check` is the exit code that is expected."
    done = subprocess.run([sys.executable, "-m", "mlkit", *map(str, words)], capture_output=True, text=True, timeout=timeout, **more)
    assert check is None or done.returncode == check, f"exit code {done.returncode}, expected {check}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def start(*words, **more) -> subprocess.Popen:
    "Start the command line in a session of its own and return at once."
    return subprocess.Popen([sys.executable, "-m", "mlkit", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **more)


def last_manifest(store: Path) -> dict:
    "Return the manifest of the newest run in a store."
    from mlkit.core.store import Store
    from mlkit.pipeline.events import load_run, run_ids

    store = Store(store)
    return load_run(store, run_ids(store)[0])


def digests(manifest: dict) -> dict:
    "Return the digest of each output of each job."
    return {(name, output): a["digest"] for name, job in manifest["jobs"].items() for output, a in (job.get("outputs") or {}).items()}


def marked(mark: str) -> list[str]:
    """List the processes whose environment holds the folder `mark` or that work below it, but for fork servers, which outlive a run on purpose.

    A forked process shows the environment that its server was started with, so its working folder must do.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment, here = (entry / "environ").read_bytes(), os.readlink(entry / "cwd")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if (mark.encode() in environment and here != "/" or here.startswith(mark)) and state != "Z":
                found.append(f"{entry.name} {state} in {here}: {(entry / 'cmdline').read_bytes().replace(bytes(1), b' ')[-200:].decode()}")
    return found


def gone(mark: str, within: float = 15.0) -> list[str]:
    "Wait until no process with `mark` is left; return those that are left all the same."
    end = time.monotonic() + within
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def kill(process: subprocess.Popen, signum=signal.SIGKILL):
    "Send a signal to a process that may have ended already."
    try:
        os.kill(process.pid, signum)
    except ProcessLookupError:
        pass
