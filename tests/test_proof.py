"Stored results can be computed again, two runs can be compared, and JupyterLab's kernels are warm."

import json
import subprocess
import sys
import time
import urllib.request

import pytest
from makers import last_manifest, mlkit, write_chain, write_stage

from mlkit.pipeline import forkserver


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MLKIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_can_be_computed_again_is_proven(place):
    write_chain(place / "chain")
    assert "nothing to compare with" in mlkit("verify", "chain", check=2).stderr
    mlkit("run", "chain")
    before = last_manifest(place / "store")
    assert "all 3 outputs are the same" in mlkit("verify", "chain").stdout
    assert last_manifest(place / "store") == before, "a proof is no run of this store"


def test_what_comes_out_differently_is_named(place):
    write_stage(place / "p", "stamp", 'folder = Output("made")', "import time, json\nfolder.mkdir()\n(folder / 'same.txt').write_text('a')\n(folder / 'when.json').write_text(json.dumps({'at': time.time_ns()}))")
    mlkit("run", "p")
    told = mlkit("verify", "p", check=1).stdout
    assert "made/when.json" in told and "at 1" in told and "same.txt" not in told


def test_a_second_run_that_fails_proves_nothing(place):
    write_stage(place / "p", "once", f'out = Output("a.txt")\nmark: str = "{place / "mark"}"', "from pathlib import Path\nassert not Path(mark).exists()\nPath(mark).touch()\nPath(out).write_text('a')")
    mlkit("run", "p")
    assert "not proven" in mlkit("verify", "p", check=1).stdout


def test_sweeps_are_proven_variant_by_variant(place):
    write_chain(place / "chain", ["first", "second"])
    mlkit("run", "chain", "-p", "first.pause=0.01,0.02")
    assert "4 jobs ran again" in mlkit("verify", "chain", "-p", "first.pause=0.01,0.02").stdout


def test_two_runs_are_compared_in_words(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    assert "only once" in mlkit("diff", check=2).stderr
    mlkit("run", "chain", "-p", "second.pause=0.01")
    mlkit("run", "chain", "-p", "second.pause=0.01")
    assert "nothing is different" in mlkit("diff", "chain").stdout
    oldest, newest = (sorted(p.name for p in (place / "store" / "runs").iterdir())[i] for i in (0, -1))
    for words in ((oldest,), (oldest, newest), (oldest[:-1], newest)):
        assert "parameter pause: 0.0 -> 0.01" in mlkit("diff", *words).stdout
    assert "There is no run 19" in mlkit("diff", oldest, "19", check=2).stderr
    assert "write more of it" in mlkit("diff", oldest[:4], newest, check=2).stderr


def ask(port: int, path: str, **data):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/{path}", json.dumps(data).encode() if data else None, {"Authorization": "token t"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_kernels_of_the_lab_come_from_the_warm_server(place, monkeypatch):
    monkeypatch.setenv("MLKIT_RUNTIME", str(place / "runtime"))
    (place / "runtime").mkdir(mode=0o700)
    write_stage(place / "p", "look", "", "import PIL.Image")
    port = 8000 + time.time_ns() % 1000
    command = [sys.executable, "-m", "mlkit", "lab", "p", "--", "--no-browser", f"--port={port}", "--allow-root", "--IdentityProvider.token=t"]
    with open(place / "log", "w") as log:
        lab = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                ask(port, "status")
                break
            except OSError:
                assert time.monotonic() < deadline and lab.poll() is None, (place / "log").read_text()
                time.sleep(0.3)
        ask(port, "kernels", name="python3")  # answers while the server is still importing
        deadline = time.monotonic() + 30
        while True:
            [server] = forkserver.ask_all("status")
            if "PIL.Image" in server["modules"] and server["running"] == 2:  # the kernel, and what asked for the modules
                break
            assert time.monotonic() < deadline, server
            time.sleep(0.1)
    finally:
        lab.terminate()
        lab.wait(30)
        subprocess.run([sys.executable, "-m", "mlkit", "kernel", "stop"], capture_output=True)
