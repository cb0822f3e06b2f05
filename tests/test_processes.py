"A launched process is one with its tree: what it starts ends with it, it ends with its launcher, and its end is told truly."

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlkit.pipeline import forkserver
from mlkit.pipeline.processes import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wardens need Linux")
echo = "mlkit.pipeline.processes:echo"


@pytest.fixture(params=[False, True], ids=["cold", "warm"])
def warm(request):
    return request.param


@pytest.fixture(autouse=True)
def path(monkeypatch):
    "Launched processes find the module `targets`."
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left(pids: list[int], within: float = 5.0) -> list[int]:
    "Wait until none of `pids` lives; return those that do all the same."
    end = time.monotonic() + within
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return [p for p in pids if lives(p)]


def test_it_runs_where_and_as_it_was_told(warm, tmp_path):
    env = {**os.environ, "MARK": "ä=b\nc"}
    with open(tmp_path / "said", "w") as said, launch("targets:facts", {}, warm=warm, env=env, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT) as process:
        told = process.receive(30)
        assert process.receive(30) is None and process.wait(5).good and process.warm == warm
    assert told["cwd"] == str(tmp_path) and told["mark"] == "ä=b\nc" and told["stdin"] == "" and told["parent"] != os.getpid()
    assert sorted((tmp_path / "said").read_text().splitlines()) == ["to stderr", "to stdout"]


def test_messages_wait_in_line_and_the_end_is_told_last(warm):
    with launch(echo, {"n": 0}, warm=warm) as process:
        for n in range(100):
            process.send({"n": n})
        process.send({"exit": 0})
        process.wait(30)
        received = []
        while (message := process.receive(timeout=0)) is not None:
            received.append(message["n"])
        assert received == [0, *range(100)]
        assert process.receive(timeout=0) is None and process.receive() is None
        with pytest.raises(OSError):
            process.send({"too": "late"})


def test_nothing_to_receive_is_a_timeout(warm):
    with launch(echo, {}, warm=warm) as process:
        assert process.receive(30) == {}
        with pytest.raises(TimeoutError):
            process.receive(timeout=0)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            process.receive(timeout=0.2)
        assert 0.15 < time.monotonic() - started < 2
        with pytest.raises(TimeoutError):
            process.wait(0.1)


def test_long_messages_from_many_threads_arrive_whole(warm):
    with launch("targets:send_much", {"length": 30_000}, warm=warm) as process:
        threading.Thread(target=process.send, args=[{"text": "x" * 5_000_000}]).start()
        messages = [process.receive(60) for _ in range(200)]
        for n in range(4):
            assert [m["i"] for m in messages if m["thread"] == n] == list(range(50))
        assert {m["text"] for m in messages} == {"ü" * 30_000}
        assert process.receive(60) == {"received": 5_000_000}


@pytest.mark.parametrize("how", ["exit", "signal", "crash", "import", "function"])
def test_how_it_ended_is_told(warm, how, tmp_path):
    target = {"crash": "targets:crash", "import": "no_such_module:f", "function": "targets:no_such_function"}.get(how, echo)
    with open(tmp_path / "said", "w") as said, launch(target, {}, warm=warm, stderr=said) as process:
        if how in ("exit", "signal"):
            process.receive(30)
            process.send({"exit": 7}) if how == "exit" else process.signal(signal.SIGTERM)
        exit = process.wait(30)
    code, signum = {"exit": (7, None), "signal": (0, signal.SIGTERM), "crash": (0, signal.SIGSEGV)}.get(how, (1, None))
    assert (exit.code, exit.signal, exit.oom, exit.good) == (code, signum, False, False)
    expected = {"import": "ModuleNotFoundError", "function": "AttributeError"}.get(how, "")
    assert expected in (tmp_path / "said").read_text()


@pytest.mark.parametrize("request_", [{}, {"orphans": True}, {"stay": True}, {"stay": True, "orphans": True}], ids=str)
def test_what_it_started_ends_with_it(warm, request_):
    with launch("targets:leave_behind", request_, warm=warm) as process:
        pids = process.receive(30)["pids"]
        if "stay" in request_:
            assert lives(pids[1])
            process.kill()
        assert process.receive(30) is None
        assert [p for p in pids if lives(p)] == []  # at once: the end of the stream is the end of the tree
        assert process.wait(5).signal == (signal.SIGKILL if "stay" in request_ else None)


def test_letting_go_ends_it(warm):
    with launch("targets:leave_behind", {"stay": True}, warm=warm) as process:
        pids = [process.pid, *process.receive(30)["pids"]]
    assert left(pids) == []


@pytest.mark.parametrize("nested", [False, True], ids=["one", "nested"])
def test_a_launcher_that_is_killed_takes_all_along(warm, nested):
    target, request = ("targets:launch_another", {"warm": warm}) if nested else ("targets:leave_behind", {"stay": True})
    code = f"from mlkit.pipeline.processes import launch\np = launch({target!r}, {request!r}, warm={warm})\nprint(p.pid, *p.receive(30)['pids'], flush=True)\nimport time; time.sleep(600)"
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, launcher.stdout.readline().split()))
    assert len(pids) == 5 + nested and all(map(lives, pids))
    launcher.kill()
    launcher.wait()
    assert left(pids) == []


@pytest.mark.parametrize("inner_warm", [False, True], ids=["cold inside", "warm inside"])
def test_its_end_waits_for_what_it_launched_itself(warm, inner_warm):
    for _ in range(3):
        with launch("targets:launch_another", {"warm": inner_warm, "die": True}, warm=warm) as process:
            pids = process.receive(30)["pids"]
            assert process.receive(30) is None
            assert [p for p in pids if lives(p)] == []
            assert process.wait(5).signal == signal.SIGKILL


def test_a_signal_sent_as_early_as_can_be_is_not_lost(warm):
    for _ in range(15):
        with launch(echo, {}, warm=warm) as process:
            process.signal(signal.SIGTERM)
            assert process.wait(20).signal == signal.SIGTERM


def test_a_stopped_process_can_be_killed(warm):
    with launch(echo, {}, warm=warm) as process:
        process.receive(30)
        process.signal(signal.SIGSTOP)
        process.kill()
        assert process.wait(10).signal == signal.SIGKILL


def test_orphans_that_ended_are_collected(warm):
    with launch("targets:make_orphans", {"count": 30}, warm=warm) as process:
        assert process.receive(60)["below the warden"] <= 2


def test_peak_memory_is_what_the_tree_used(warm):
    for children in (0, 3):
        with launch("targets:use_memory", {"bytes": 150_000_000, "children": children, "seconds": 1}, warm=warm) as process:
            process.receive(30)
            peak = process.wait(10).peak_memory
        assert 150_000_000 < peak < 175_000_000, f"{peak} bytes with {children} children that share it"


def test_what_wants_too_much_memory_is_ended_and_called_so(warm):
    with launch("targets:use_memory", {"bytes": 300_000_000, "seconds": 60}, warm=warm, memory_limit=150_000_000) as process:
        exit = process.wait(30)
        assert exit.oom and exit.signal == signal.SIGKILL and exit.peak_memory > 150_000_000
    with launch("targets:use_memory", {"bytes": 60_000_000, "children": 4}, warm=warm, memory_limit=150_000_000) as process:
        assert process.receive(30) == {"held": 60_000_000}
        assert not process.wait(10).oom


def test_a_signal_reaches_the_whole_group(warm):
    with launch("targets:leave_behind", {"stay": True}, warm=warm) as process:
        pids = process.receive(30)["pids"]
        process.signal(signal.SIGTERM)
        assert process.wait(10).signal == signal.SIGTERM and left(pids) == []


def test_many_at_once(warm):
    def one(n: int):
        with launch(echo, {"n": n}, warm=warm) as process:
            assert process.receive(60) == {"n": n}
            process.send({"exit": n})
            return process.wait(60).code

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(24))) == list(range(24))


def test_letting_go_at_any_instant_leaves_nothing(warm, monkeypatch):
    mark = f"instant-{random.random()}"
    monkeypatch.setenv("MARK", mark)
    chance = random.Random(1)
    with launch(echo, {}, warm=warm) as process:  # so that there is a server
        process.receive(60)
    before = threading.active_count()
    for _ in range(25):
        with launch("targets:leave_behind", {"stay": True, "mark": mark}, warm=warm):
            time.sleep(chance.uniform(0, 0.25))
    end = time.monotonic() + 10
    while (alive := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive == [] and threading.active_count() <= before + 1


def marked(mark: str) -> list[int]:
    "List the processes with `mark` in their environment: those of a cold start, and all that a warm one has started by exec."
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes() and lives(int(pid)):
                found.append(int(pid))
        except OSError:
            continue
    return found


def test_a_warden_that_is_killed_takes_its_process_along(warm):
    with launch(echo, {}, warm=warm) as process:
        process.receive(30)
        pid, guard = process.pid, int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGKILL)
        assert process.wait(10).signal == signal.SIGKILL and left([pid]) == []


def test_a_server_that_is_killed_leaves_its_processes_alone_and_is_replaced():
    with launch(echo, {}) as process:
        process.receive(60)
        for server in forkserver.ask_all("status"):
            os.kill(server["pid"], signal.SIGKILL)
        process.send({"still": "there"})
        assert process.receive(30)["still"] == "there"
        with launch(echo, {}) as other:
            assert other.receive(60) == {} and other.warm
        process.send({"exit": 5})
        assert process.wait(30).code == 5


def test_a_fork_keeps_what_the_server_has_of_mlkit_until_its_files_change():
    def has_kernels() -> bool:
        with launch("targets:own_modules", {}) as process:
            return "mlkit.pipeline.kernels" in process.receive(60)["modules"]

    file = Path(forkserver.__file__).with_name("kernels.py")
    before = file.stat()
    assert has_kernels()
    try:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert not has_kernels()
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert has_kernels()


def test_letting_go_while_the_server_imports_costs_nothing_but_the_import():
    with launch(echo, {}) as process:
        process.receive(60)
    started = time.monotonic()
    with launch(echo, {}, modules=["unittest.mock", "polars"]):
        pass
    assert time.monotonic() - started < 0.5
    with launch(echo, {}, modules=["polars"]) as process:
        assert process.receive(60) == {} and process.warm


def test_a_folder_that_is_not_there_is_an_error(warm):
    with pytest.raises(OSError):
        with launch(echo, {}, warm=warm, cwd="/not/there") as process:
            process.wait(30)


def test_a_pipe_is_refused():
    with pytest.raises(ValueError, match="channel"):
        launch(echo, {}, stdout=subprocess.PIPE)
