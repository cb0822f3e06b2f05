"Whatever is killed, full, broken or in the way: no good result is lost, nothing is left running, and the next run is right."

import os
import random
import re
import shutil
import signal
import subprocess

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from makers import cell, digests, gone, kill, last_manifest, mlkit, start, write_chain, write_stage

from mlkit.core.digest import file_digest
from mlkit.core.errors import MLKitError
from mlkit.core.store import Artifact, Store
from mlkit.pipeline.events import load_run, run_ids

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and mounts of POSIX systems")


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a store of its own; processes started for it work below it or carry its name."
    monkeypatch.setenv("MLKIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLKIT_TEST_MARK", str(tmp_path))
    return tmp_path


def mark():
    return os.environ["MLKIT_TEST_MARK"]


def assert_whole(store: Store):
    "Every record in the store names objects that are there, with the content that they are named after."
    for record in store.cache.glob("*.json"):
        for data in store.read(record.stem)["outputs"].values():
            artifact = Artifact.from_dict(data)
            assert store.damaged(artifact) == []
            assert file_digest(store.object(artifact.digest)) == artifact.digest


def test_a_runner_killed_at_any_instant_loses_nothing(place):
    write_chain(place / "chain", pause=0.05)
    mlkit("run", place / "chain")
    reference, store, chance = digests(last_manifest(place / "store")), Store(place / "store"), random.Random(0)
    started = time.monotonic()
    mlkit("run", place / "chain", "--force")
    whole = time.monotonic() - started
    for attempt in range(50):
        shutil.rmtree(store.cache)
        runner = start("run", place / "chain")
        time.sleep(chance.uniform(0, whole))
        kill(runner)
        runner.wait()
        assert gone(mark()) == []
        assert_whole(store.make())
        if attempt % 10 == 9:
            mlkit("run", place / "chain")
            assert digests(last_manifest(place / "store")) == reference
    assert {load_run(store, run)["state"] for run in run_ids(store)} == {"done", "interrupted"}
    assert [p for p in store.tmp.iterdir() if p.is_dir() and p.name != "by-hand"] == []


def test_a_killed_kernel_is_told_at_once_and_what_was_done_before_stays(place):
    write_stage(place / "p", "first", 'out = Output("a.txt")', 'open(out, "w").write("a")')
    write_stage(place / "p", "second", 'a = Input("first/a.txt")\nout = Output("b.txt")', "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)", 'open(out, "w").write("b")')
    started = time.monotonic()
    done = mlkit("run", place / "p", check=1)
    assert time.monotonic() - started < 20
    manifest = last_manifest(place / "store")
    assert manifest["jobs"]["first"]["state"] == "done" and manifest["jobs"]["second"]["state"] == "killed"
    assert [c["state"] for c in manifest["jobs"]["second"]["cells"]][-1] == "killed"
    assert "second" in done.stdout and "killed" in done.stdout and gone(mark()) == []


def test_rows_that_break_a_strict_contract_can_be_looked_at_after_the_failure(place):
    write_stage(
        place / "p", "prepare", 'bad = Output("bad.csv")\nmost: int = 1', "import dataframely as dy, polars as pl\nfrom mlkit.data.contracts import check",
        "class Order(dy.Schema):\n    price = dy.Int64(max=most)", 'check(pl.DataFrame({"price": [1, 2, 3]}), Order, quarantine=bad, strict=True)',
    )  # fmt: skip
    told = mlkit("run", place / "p", check=1).stdout
    left = Path(re.search(r"They lie in (\S+bad\.csv)\.", told)[1])
    assert pl.read_csv(left)["price"].to_list() == [2, 3] and f"until the next run: {left.parent}" in told
    mlkit("run", place / "p", "-p", "prepare.most=3")
    assert not left.exists() and not any((place / "store" / "tmp").iterdir())


@pytest.fixture
def small_disk(place):
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_fails_the_stage_and_keeps_the_rest(place, small_disk, monkeypatch):
    monkeypatch.setenv("MLKIT_STORE", str(small_disk / "store"))
    write_stage(place / "p", "first", 'out = Output("a.txt")', 'open(out, "w").write("a" * 1000)')
    write_stage(place / "p", "second", 'a = Input("first/a.txt")\nout = Output("b.bin")\nn: int = 20_000_000', 'file = open(out, "wb")\nfor _ in range(n // 100_000): file.write(bytes(100_000))\nfile.close()')
    mlkit("run", place / "p", check=1)
    store = Store(small_disk / "store")
    assert_whole(store)
    mlkit("run", place / "p", "-p", "second.n=1000000")
    jobs = last_manifest(store.root)["jobs"]
    assert (jobs["first"]["state"], jobs["second"]["state"]) == ("cached", "done")


def test_a_store_that_cannot_be_written_to_is_said_before_anything_runs(place, small_disk, monkeypatch):
    monkeypatch.setenv("MLKIT_STORE", str(small_disk / "store"))
    write_chain(place / "chain", ["first"])
    mlkit("run", place / "chain")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = sorted(p.name for p in (small_disk / "store" / "runs").iterdir())
    assert "cannot be written to" in mlkit("run", place / "chain", "--force", check=2).stderr
    assert sorted(p.name for p in (small_disk / "store" / "runs").iterdir()) == before


def test_a_corrupted_object_is_found_named_and_computed_again(place):
    write_chain(place / "chain")
    mlkit("run", place / "chain")
    first = last_manifest(place / "store")
    digest = first["jobs"]["second"]["outputs"]["text.txt"]["digest"]
    object = Store(place / "store").object(digest)
    object.chmod(0o644)
    object.write_bytes(object.read_bytes().replace(b"s", b"z", 1))
    done = mlkit("run", place / "chain")
    second = last_manifest(place / "store")
    assert {n: j["state"] for n, j in second["jobs"].items()} == {"first": "cached", "second": "done", "third": "cached"}
    assert digest[:12] in done.stdout and "text.txt" in done.stdout
    assert digests(first) == digests(second)


def test_two_runs_at_once_share_the_work(place):
    write_chain(place / "chain", pause=0.5)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: mlkit("run", place / "chain"), range(2)))
    manifests = [last_manifest(place / "store")]
    from mlkit.pipeline.events import load_run, run_ids

    store = Store(place / "store")
    manifests = [load_run(store, r) for r in run_ids(store)]
    assert len(manifests) == 2 and digests(manifests[0]) == digests(manifests[1])
    states = sorted(job["state"] for m in manifests for job in m["jobs"].values())
    assert states == ["cached"] * 3 + ["done"] * 3
    assert_whole(store)


def test_ctrl_c_ends_all_and_tells_the_truth(place):
    write_stage(place / "p", "slow", 'out = Output("a.txt")', "import time", "time.sleep(60)", "1")
    write_stage(place / "p", "after", 'a = Input("slow/a.txt")', "1")
    runner = start("run", place / "p")
    wait_for(lambda: any(c["index"] == 2 for c in last_manifest(place / "store")["jobs"]["slow"]["cells"]))
    kill(runner, signal.SIGINT)
    assert runner.wait(20) == 130
    jobs = last_manifest(place / "store")["jobs"]
    assert jobs["slow"]["state"] == "interrupted" and jobs["after"]["state"] in ("skipped", "not run")
    assert [c["state"] for c in jobs["slow"]["cells"]][-1] == "interrupted"
    assert gone(mark()) == []


def wait_for(condition, within=30.0):
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, LookupError, MLKitError):
            pass
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_a_notebook_that_prints_100_mb_is_no_trouble(place):
    write_stage(place / "p", "loud", 'out = Output("a.txt")', 'for i in range(1000): print("x" * 100_000)', 'open(out, "w").write("a")')
    mlkit("run", place / "p")
    manifest = last_manifest(place / "store")
    notebook = place / "store" / "runs" / manifest["id"] / manifest["jobs"]["loud"]["notebook"]
    assert notebook.stat().st_size < 50_000_000
    assert manifest["jobs"]["loud"]["state"] == "done"


def test_children_of_a_notebook_end_with_it(place):
    write_stage(place / "p", "parent", 'out = Output("a.txt")', "import subprocess, os", 'subprocess.Popen(["sleep", "600"], start_new_session=True)\nif os.fork() == 0:\n    import time\n    time.sleep(600)\n    os._exit(0)', 'open(out, "w").write("a")')
    mlkit("run", place / "p")
    assert gone(mark()) == []


def test_sys_exit_is_a_failure_unless_the_cell_says_so(place):
    write_stage(place / "p", "leaver", 'out = Output("a.txt")', 'open(out, "w").write("a")', "import sys; sys.exit(0)", "1")
    mlkit("run", place / "p", check=1)
    assert last_manifest(place / "store")["jobs"]["leaver"]["state"] == "failed"
    write_stage(place / "p", "leaver", 'out = Output("a.txt")', 'open(out, "w").write("a")', cell("import sys; sys.exit(0)", "may-exit"), "1 / 0")
    mlkit("run", place / "p")


def test_a_stage_that_never_returns_is_stopped_after_its_time(place):
    write_stage(place / "p", "endless", 'out = Output("a.txt")', "while True: pass")
    (place / "p" / "pipeline.yaml").write_text("stages:\n  endless:\n    timeout: 1\n")
    started = time.monotonic()
    done = mlkit("run", place / "p", check=1)
    assert time.monotonic() - started < 30 and "timed out" in done.stdout
    job = last_manifest(place / "store")["jobs"]["endless"]
    assert job["state"] == "timed out" and job["cells"][-1]["state"] == "timed out" and gone(mark()) == []


def test_a_stage_that_catches_the_interrupt_is_killed(place):
    write_stage(place / "p", "stubborn", 'out = Output("a.txt")', "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass")
    (place / "p" / "pipeline.yaml").write_text("stages: {stubborn: {timeout: 1}}\n")
    mlkit("run", place / "p", check=1)
    assert last_manifest(place / "store")["jobs"]["stubborn"]["state"] == "timed out" and gone(mark()) == []


def test_a_stage_that_fails_now_and_then_is_tried_again(place):
    write_stage(place / "p", "moody", f'out = Output("a.txt")\ncount: str = "{place / "count"}"', "from pathlib import Path", "n = int(Path(count).read_text()) if Path(count).exists() else 0\nPath(count).write_text(str(n + 1))", "assert n == 2", 'open(out, "w").write("a")')
    (place / "p" / "pipeline.yaml").write_text("stages: {moody: {retries: 2}}\n")
    mlkit("run", place / "p")
    job = last_manifest(place / "store")["jobs"]["moody"]
    assert job["state"] == "done" and job["attempts"] == 3 and len(job["warnings"]) >= 2


def test_a_stage_over_its_memory_is_stopped_and_called_out_of_memory(place):
    write_stage(place / "p", "hungry", 'out = Output("a.txt")', "import time\nheld = []\nfor _ in range(100):\n    held.append(bytearray(20_000_000))\n    time.sleep(0.02)")
    (place / "p" / "pipeline.yaml").write_text("stages: {hungry: {memory: 300MB}}\n")
    mlkit("run", place / "p", check=1)
    job = last_manifest(place / "store")["jobs"]["hungry"]
    assert job["state"] == "out of memory" and job["peak_memory"] > 200_000_000


def test_a_stage_that_writes_into_its_input_hurts_nobody(place):
    write_stage(place / "p", "first", 'out = Output("a.txt")', 'open(out, "w").write("a")')
    write_stage(place / "p", "second", 'a = Input("first/a.txt")\nout = Output("b.txt")', "import os\nos.chmod(a, 0o644)\nopen(a, 'w').write('changed')", 'open(out, "w").write("b")')
    mlkit("run", place / "p", check=1)
    assert "wrote into its input" in last_manifest(place / "store")["jobs"]["second"]["error"]["value"]
    mlkit("run", place / "p", "--to", "first")
    assert_whole(Store(place / "store"))


def test_a_run_never_changes_a_source_notebook(place):
    write_chain(place / "chain")
    before = {p.name: (file_digest(p), p.stat().st_mtime_ns) for p in (place / "chain").iterdir()}
    mlkit("run", place / "chain", "-p", "first.pause=0.01")
    assert {p.name: (file_digest(p), p.stat().st_mtime_ns) for p in (place / "chain").iterdir()} == before
