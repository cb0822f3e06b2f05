"A warm kernel is a new kernel in everything but the time that it takes, and leaves nothing behind."

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from jupyter_client import KernelManager

from mlkit.pipeline import forkserver, kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


@pytest.fixture(scope="module", autouse=True)
def runtime(tmp_path_factory):
    "Fork servers of our own, gone at the end."
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("runtime")
        home.chmod(0o700)
        patch.setenv("MLKIT_RUNTIME", str(home))
        patch.setenv("MLKIT_KERNEL_IDLE", "120")
        patch.delenv("PYTHONPATH", raising=False)
        yield home
        forkserver.stop()
        assert wait_for(lambda: not servers_below(home))


def wait_for(condition, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def servers_below(home: Path) -> list[int]:
    "List the fork servers, and what they forked, whose sockets are in a folder."
    commands = {int(p.parent.name): p for p in Path("/proc").glob("[0-9]*/cmdline")}
    found = []
    for pid, path in commands.items():
        try:
            if f"{home}/forkserver".encode() in path.read_bytes() and alive(pid):
                found.append(pid)
        except OSError:
            continue
    return found


class Kernel:
    "A kernel under test: `run` returns what code printed, `outputs` all that it sent."

    def __init__(self, manager: KernelManager):
        self.manager, self.client = manager, manager.client()
        self.client.start_channels(hb=False)

    def outputs(self, code: str) -> list[dict]:
        found = []
        reply = self.client.execute_interactive(code, timeout=60, output_hook=lambda m: found.append(m["content"] | {"type": m["msg_type"]}))
        assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
        return found

    def run(self, code: str) -> str:
        return "".join(o["text"] for o in self.outputs(code) if o["type"] == "stream" and o["name"] == "stdout")

    @property
    def warm(self) -> bool:
        return self.manager.provisioner.process.warm


@contextmanager
def kernel(warm: bool = True, modules=(), env: dict | None = None, **more):
    "Start a kernel as `mlkit run` does."
    manager = KernelManager(kernel_name="mlkit")
    manager._kernel_spec = kernels.spec(list(modules), warm=warm, memory_limit=more.pop("memory_limit", None))
    manager.start_kernel(env={**os.environ, **(env or {})}, **more)
    try:
        one = Kernel(manager)
        try:
            one.client.wait_for_ready(timeout=60)
            yield one
        finally:  # a channel left open would stop the whole session when its context is collected
            one.client.stop_channels()
    finally:
        if manager.is_alive():
            manager.shutdown_kernel(now=True)
        else:
            manager.cleanup_resources()


PORTRAIT = """
import builtins, gc, json, locale, os, resource, signal, stat, sys, tempfile, threading
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "argv": sys.argv, "orig_argv": [a for a in sys.orig_argv[1:] if "-c" != a][:2], "path": sys.path, "flags": list(sys.flags), "prompt": sys.ps1,
    "cwd": os.getcwd(), "environment": {k: v for k, v in os.environ.items() if k != "JPY_PARENT_PID"},
    "parent": os.getppid() == int(os.environ["JPY_PARENT_PID"]), "leader": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()],
    "umask": status["Umask"], "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
    "affinity": sorted(os.sched_getaffinity(0)), "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "signals": {int(s): str(signal.getsignal(s)).split(" at ")[0] for s in signal.valid_signals()}, "blocked": status["SigBlk"],
    "stdin": [os.read(0, 1).decode(), type(sys.stdin).__name__], "streams": [type(s).__name__ for s in (sys.stdout, sys.stderr, sys.__stdout__)],
    "encodings": [(s.encoding, s.errors, s.line_buffering) for s in (sys.__stdin__, sys.__stdout__, sys.__stderr__)],
    "files": [stat.S_IFMT(os.stat(n).st_mode) for n in (1, 2)], "main": [__name__, hasattr(sys.modules["__main__"], "__file__"), "__main__" in sys.modules],
    "shell": type(get_ipython()).__name__, "in_builtins": sorted(set(dir(builtins)) & {"__IPYTHON__", "display", "get_ipython"}), "locale": locale.getlocale(),
    "temporary": tempfile.gettempdir(), "threads": sorted(t.name.split("-")[0] for t in threading.enumerate()), "gc": gc.isenabled(), "daemon": os.isatty(0),
    "project": [m for m in sys.modules if "helper_of_mine" in m],
}))
"""


def portrait(**more) -> dict:
    with kernel(**more) as one:
        drawn = json.loads(one.run(PORTRAIT))
        assert one.warm == more["warm"]
    drawn["argv"] = [Path(drawn["argv"][0]).name, *["FILE" if a.startswith("/") else a for a in drawn["argv"][1:]]]
    return drawn


def test_a_warm_kernel_is_in_nothing_different_from_a_cold_one(tmp_path, monkeypatch):
    import resource

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "helper_of_mine.py").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mask, hangup = os.umask(0o027), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 7, hard))
    try:
        setting = {"cwd": str(tmp_path), "env": {"PYTHONPATH": "src", "SETTING": "wörld\n2", "TZ": "Asia/Tokyo", "TMPDIR": str(tmp_path)}}
        cold, warm = portrait(warm=False, **setting), portrait(warm=True, **setting)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.umask(mask)
        signal.signal(signal.SIGHUP, hangup)
    assert cold["umask"].strip() == "0027" and warm["path"][0] != "" and str(tmp_path / "src") in warm["path"]
    for fact in cold:
        assert warm[fact] == cold[fact], fact


def test_two_warm_kernels_draw_different_numbers():
    code = "import random, uuid, numpy, tempfile, multiprocessing as m; print(random.random(), numpy.random.rand(), uuid.uuid4(), uuid.uuid1(), tempfile.mktemp(), bytes(m.current_process().authkey).hex())"
    drawn = []
    for _ in range(2):
        with kernel(modules=["numpy", "multiprocessing"]) as one:
            assert one.warm
            drawn.append(one.run(code).split())
    assert all(a != b for a, b in zip(*drawn))


def test_edits_to_project_code_are_seen_at_once(tmp_path):
    for answer in ("1", "2"):
        (tmp_path / "my_project.py").write_text(f"answer = {answer} + len('{'x' * int(answer)}')")
        with kernel(modules=["numpy", "my_project"], cwd=str(tmp_path), env={"PYTHONDONTWRITEBYTECODE": "1"}) as one:
            assert one.warm and one.run("import sys; print('my_project' in sys.modules); import my_project; print(my_project.answer)").split() == ["False", str(2 * int(answer))]


def test_a_module_of_the_project_hides_an_installed_one_as_ever(tmp_path):
    (tmp_path / "numpy.py").write_text("mine = True")
    (tmp_path / "json.py").write_text("mine = True")  # hides nothing: a kernel has the real one before it sees its folder
    with kernel(modules=["numpy"]) as one:
        assert one.warm
    with kernel(modules=["numpy"], cwd=str(tmp_path)) as one:
        assert one.run("import numpy, json; print(numpy.mine, hasattr(json, 'mine'))").split() == ["True", "False"]
        assert not one.warm


def test_what_was_never_closed_is_written_at_the_end(tmp_path):
    with kernel(cwd=str(tmp_path)) as one:
        one.run("import atexit; file = open('note', 'w'); file.write('whole'); atexit.register(lambda: open('exit', 'w').write('heard'))")
        one.manager.shutdown_kernel()
    assert (tmp_path / "note").read_text() == "whole" and (tmp_path / "exit").read_text() == "heard"


def test_modules_that_leave_threads_are_left_to_the_notebook():
    with kernel(modules=["polars", "numpy"]) as one:
        assert one.warm
        assert one.run("import sys; print('polars' in sys.modules, 'numpy' in sys.modules)").split() == ["False", "True"]
        assert one.run("import polars as pl; print(pl.LazyFrame({'a': range(100_000)}).group_by(pl.col('a') % 7).agg(pl.len()).collect().height)").strip() == "7"
    server = next(s for s in forkserver.ask_all("status") if "polars" in s["unsafe"])
    assert re.fullmatch(r"it leaves [1-9]\d* threads? running", server["unsafe"]["polars"]) and "numpy" in server["modules"]


def test_pyplot_draws_into_the_notebook(tmp_path):
    with kernel(modules=["matplotlib.pyplot"], cwd=str(tmp_path)) as one:
        assert one.warm
        drawn = one.outputs("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('Ünï')")
        assert any("image/png" in o.get("data", {}) for o in drawn)
        assert not any("image/png" in o.get("data", {}) for o in one.outputs("1"))
    (tmp_path / "matplotlibrc").write_text("figure.figsize: 3, 2")
    with kernel(modules=["matplotlib.pyplot"], cwd=str(tmp_path)) as one:
        assert one.run("import matplotlib; print(matplotlib.rcParams['figure.figsize'])").strip() == "[3.0, 2.0]"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_works(tmp_path, method):
    (tmp_path / "work_of_mine.py").write_text("import os\ndef square(x): return x * x, os.getcwd()")
    with kernel(modules=["numpy", "concurrent.futures"], cwd=str(tmp_path)) as one:
        code = f"import multiprocessing as m, work_of_mine\nwith m.get_context({method!r}).Pool(2) as pool: print(pool.map(work_of_mine.square, range(4)))"
        assert eval(one.run(code)) == [(x * x, str(tmp_path)) for x in range(4)]


def test_interrupt_kill_and_restart_work():
    with kernel() as one:
        pid = int(one.run("import os; x = 1; print(os.getpid())"))
        message = one.client.execute("import time; print('begun', flush=True); time.sleep(60)", stop_on_error=False)
        while one.client.get_iopub_msg(timeout=30)["content"].get("text") != "begun\n":
            pass
        one.manager.interrupt_kernel()
        while (reply := one.client.get_shell_msg(timeout=10))["parent_header"]["msg_id"] != message:
            pass
        assert reply["content"]["ename"] == "KeyboardInterrupt" and one.run("print(x)") == "1\n"
        one.manager.restart_kernel(now=True)
        one.client.wait_for_ready(timeout=30)
        assert int(one.run("import os; print(os.getpid())")) != pid and one.run("print('x' in dir())") == "False\n" and not alive(pid)
        os.kill(int(one.run("print(os.getpid())")), signal.SIGKILL)
        assert wait_for(lambda: not one.manager.is_alive(), 1)


def test_nothing_outlives_its_kernel():
    with kernel() as one:
        one.run("import subprocess, os; a = subprocess.Popen(['sleep', '600']); b = subprocess.Popen(['setsid', 'sh', '-c', '(sleep 601 &) ; sleep 602'])")
        pids = [int(p) for p in one.run("print(a.pid, b.pid)").split()]
        assert all(map(alive, pids))
        folder = one.manager.provisioner.sockets
    assert wait_for(lambda: not any(map(alive, pids)), 2) and not folder.exists()


def test_not_even_a_killed_warden_leaves_anything_behind():
    with kernel() as one:
        one.run("import subprocess, os; a = subprocess.Popen(['setsid', 'sleep', '600'])")
        pids = [int(p) for p in one.run("print(a.pid, os.getpid(), os.getppid())").split()]
        os.kill(pids[-1], signal.SIGKILL)
        assert wait_for(lambda: not any(map(alive, pids)), 4)
        assert wait_for(lambda: not one.manager.is_alive(), 2)


def test_kernels_talk_over_private_sockets():
    with kernel() as one:
        info = one.manager.get_connection_info()
        assert info["transport"] == "ipc" and Path(info["ip"]).parent.stat().st_mode & 0o777 == 0o700
    for path in [*Path(os.environ["MLKIT_RUNTIME"]).glob("*.sock")]:
        assert path.stat().st_mode & 0o777 == 0o600


def test_another_user_is_refused(runtime):
    if os.getuid():
        pytest.skip("only root can be another user")
    with kernel():
        path = next(runtime.glob("*.sock"))
        code = f"import os, socket\nfd = os.open({str(runtime)!r}, os.O_PATH)\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX)\ns.connect(f'/proc/self/fd/{{fd}}/{path.name}')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "PermissionError" in done.stderr


def test_twelve_kernels_asked_for_at_once_answer_within_three_seconds():
    def one(_):
        with kernel(modules=["numpy"]) as one:
            return one.run("import numpy; print(numpy.arange(4).sum())"), time.monotonic()

    one(0)  # the server is warm
    started = time.monotonic()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(12)))
    assert {text for text, _ in answers} == {"6\n"}
    assert max(at for _, at in answers) - started < 3


def test_many_that_start_at_once_share_one_server(tmp_path, monkeypatch):
    home = tmp_path / "r"
    home.mkdir(mode=0o700)
    code = "from mlkit.pipeline.processes import launch; p = launch('mlkit.pipeline.processes:echo', {'a': 1}); print(p.receive(60), p.wait.__self__ is p); p.pid; assert p.warm"
    many = [subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "MLKIT_RUNTIME": str(home)}, stdout=subprocess.PIPE) for _ in range(6)]
    assert all("'a': 1" in p.communicate(timeout=60)[0].decode() and p.returncode == 0 for p in many)
    monkeypatch.setenv("MLKIT_RUNTIME", str(home))
    assert [s["forks"] for s in forkserver.ask_all("status")] == [6]
    assert forkserver.stop() == 1 and wait_for(lambda: not servers_below(home))


def test_the_server_ends_when_idle_and_comes_back(tmp_path, monkeypatch):
    home = tmp_path / "r"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("MLKIT_RUNTIME", str(home))
    monkeypatch.setenv("MLKIT_KERNEL_IDLE", "0.5")
    for _ in range(2):
        with kernel() as one:
            time.sleep(1)  # a kernel under way is no idleness
            assert one.run("print(1)") == "1\n" and one.warm and servers_below(home)
        assert wait_for(lambda: not servers_below(home), 5)


def test_papermill_and_nbconvert_use_the_installed_kernel(tmp_path, monkeypatch):
    folder = kernels.install(prefix=str(tmp_path))
    assert json.loads((folder / "kernel.json").read_text())["metadata"]["kernel_provisioner"]["provisioner_name"] == "mlkit-warm"
    monkeypatch.setenv("JUPYTER_PATH", str(folder.parent.parent))
    cells = [{"cell_type": "code", "id": "a", "metadata": {}, "source": "import numpy, sys; print(numpy.arange(4).sum())", "outputs": [], "execution_count": None}]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}))
    command = [sys.executable, "-m", "papermill", "-k", "mlkit", "a.ipynb", "out.ipynb", "--no-progress-bar"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((tmp_path / "out.ipynb").read_text())["cells"][0]["outputs"][0]["text"] == ["6\n"]
    assert any("numpy" in s["modules"] for s in forkserver.ask_all("status"))
    assert "numpy" in kernels.status()


@pytest.fixture(scope="module")
def torch_kernel():
    "One kernel with torch and Lightning for all tests that need them: importing them costs ten seconds."
    pytest.importorskip("pytorch_lightning")
    with kernel(modules=["torch", "pytorch_lightning"], env={"OMP_NUM_THREADS": "2"}) as one:
        assert one.warm
        yield one


def test_torch_uses_its_threads_in_a_fork(torch_kernel):
    code = """
    import os, sys, time
    assert "torch" in sys.modules
    import torch
    a = torch.rand(1500, 1500)
    torch.mm(a, a)
    print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
    """
    before = "import os; before = len(os.listdir('/proc/self/task'))"
    torch_kernel.run(before)
    assert torch_kernel.run("\n".join(line[4:] for line in code.splitlines())).split() == ["2", "1"]
    torch_kernel.run("torch.set_num_threads(1)")


def test_torch_starts_with_a_seed_of_its_own(torch_kernel):
    first = torch_kernel.run("import torch; print(torch.initial_seed())")
    with kernel(modules=["torch", "pytorch_lightning"], env={"OMP_NUM_THREADS": "2"}) as other:
        assert other.warm and other.run("import torch; print(torch.initial_seed())") != first


def test_data_loader_workers_work(torch_kernel):
    code = "import torch\ndata = torch.utils.data.TensorDataset(torch.arange(64.0))\n"
    for context in ("fork", "forkserver"):
        loop = f"print(sum(b[0].sum().item() for b in torch.utils.data.DataLoader(data, 8, num_workers=2, multiprocessing_context={context!r})))"
        assert torch_kernel.run(code + loop) == "2016.0\n"


def test_what_lightning_logs_appears_in_the_notebook(torch_kernel):
    said = torch_kernel.outputs("import pytorch_lightning as pl; pl.seed_everything(7); from lightning_fabric.utilities.imports import _IS_INTERACTIVE; print(_IS_INTERACTIVE)")
    texts = {o["name"]: o["text"] for o in said if o["type"] == "stream"}
    assert "Seed set to 7" in texts["stderr"] and texts["stdout"] == "True\n"


PROGRAM = """
import sys, json
from mlkit.pipeline import forkserver
from mlkit.pipeline.processes import launch
process = launch("mlkit.pipeline.processes:ask", {"code": sys.argv[2]}, modules=sys.argv[1].split())
print(json.dumps([process.receive(60), process.wait(20).signal, process.warm, forkserver.ask_all("status")]))
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    "An environment of its own, in which packages can be upgraded and broken: the installed ones, by links, and what a test adds."
    home = tmp_path / "r"
    home.mkdir(mode=0o700)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    packages = next((tmp_path / "v" / "lib").glob("python*/site-packages"))
    for path in Path(pytest.__file__).parent.parent.iterdir():
        (packages / path.name).symlink_to(path)
    (tmp_path / "helper.py").write_text("def ask(request, channel):\n    channel.send({'answer': eval(request['code'])})\n")
    monkeypatch.setenv("MLKIT_RUNTIME", str(home))
    yield packages
    forkserver.stop()
    assert wait_for(lambda: not servers_below(home))


def asked(packages: Path, modules: str, code: str) -> list:
    "Evaluate code in a process forked by the server of an environment."
    python = packages.parent.parent.parent / "bin" / "python"
    program = PROGRAM.replace("mlkit.pipeline.processes:ask", "helper:ask")
    env = {**os.environ, "PYTHONPATH": str(packages.parents[3])}
    done = subprocess.run([str(python), "-c", program, modules, code], env=env, capture_output=True, text=True, check=True, timeout=90)
    return json.loads(done.stdout)


def test_an_upgraded_package_is_the_new_one_in_the_next_kernel(environment):
    for version in (1, 2):
        (environment / f"upgradable-{version}.dist-info").mkdir()
        (environment / "upgradable.py").write_text(f"version = {version} + 0 * {'9' * version}")
        said, _, warm, servers = asked(environment, "upgradable", "('upgradable' in __import__('sys').modules, __import__('upgradable').version)")
        assert said["answer"] == [True, version] and warm
    home = Path(os.environ["MLKIT_RUNTIME"])
    assert wait_for(lambda: len(list(home.glob("*.sock"))) == 1)  # the old server noticed


def test_an_import_that_crashes_fails_or_brings_project_code_is_undone(environment, tmp_path):
    (environment / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (environment / "failing.py").write_text("import sound\n1 / 0")
    (environment / "leaving.py").write_text("import sys; sys.exit(3)")
    (environment / "meddling.py").write_text("import sys; sys.path.insert(0, '/'); raise ImportError")
    (environment / "plugged.py").write_text(f"import sys; sys.path.append({str(tmp_path)!r}); import helper")
    (environment / "sound.py").write_text("x = 1")
    said, _, warm, servers = asked(environment, "crashing failing leaving meddling plugged numpy", "sorted({'sound', 'numpy', 'plugged', 'failing'} & set(__import__('sys').modules))")
    assert said["answer"] == ["numpy"] and warm
    (server,) = servers
    assert server["modules"] == ["numpy"] and set(server["unsafe"]) == {"crashing", "failing", "leaving", "meddling", "plugged"}
    assert "ended the process" in server["unsafe"]["crashing"] and "helper" in server["unsafe"]["plugged"]


def test_temporary_folders_made_at_import_are_not_shared(environment):
    (environment / "keeping.py").write_text("import tempfile; place = tempfile.TemporaryDirectory('of-mine')")
    code = "(__import__('keeping').place.name, __import__('os').path.isdir(__import__('keeping').place.name), 'keeping' in __import__('sys').modules)"
    answers = [asked(environment, "keeping", code)[0]["answer"] for _ in range(2)]
    assert answers[0][0] != answers[1][0] and all(a[0].endswith("of-mine") and a[1:] == [True, True] for a in answers)
    assert not any(Path(a[0]).exists() for a in answers)
