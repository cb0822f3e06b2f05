"What tests have launched processes do: each is called with a request and a channel."

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

from mlkit.pipeline.processes import Channel, launch


def facts(request: dict, channel: Channel):
    "Tell where one is."
    channel.send({"cwd": os.getcwd(), "mark": os.environ.get("MARK"), "stdin": sys.stdin.read(), "parent": os.getppid()})
    print("to stdout")
    print("to stderr", file=sys.stderr)


def leave_behind(request: dict, channel: Channel):
    "Start what does not want to be found: a daemon in a session of its own, a child that ignores signals, a child of a child."
    daemon = subprocess.Popen("setsid sh -c 'echo $$; exec sleep 600' & wait", shell=True, stdout=subprocess.PIPE)
    pids = [daemon.pid, int(daemon.stdout.readline())]
    for deaf in (signal.SIGTERM, signal.SIGINT):
        if (pid := os.fork()) == 0:
            signal.signal(deaf, signal.SIG_IGN)
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0) if request.get("orphans") else time.sleep(600)
        pids.append(pid)
    time.sleep(0.1)
    channel.send({"pids": pids})
    if request.get("stay"):
        time.sleep(600)


def use_memory(request: dict, channel: Channel):
    "Use memory, and have children that share it."
    ballast = bytearray(request["bytes"])
    ballast[::4096] = b"x" * len(ballast[::4096])
    for _ in range(request.get("children", 0)):
        if os.fork() == 0:
            time.sleep(600)
    time.sleep(request.get("seconds", 0.3))
    channel.send({"held": len(ballast)})


def send_much(request: dict, channel: Channel):
    "Send from several threads at once."

    def send(n: int):
        for i in range(50):
            channel.send({"thread": n, "i": i, "text": "ü" * request["length"]})

    threads = [threading.Thread(target=send, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    channel.send({"received": len(channel.receive()["text"])})


def launch_another(request: dict, channel: Channel):
    "Launch a process from a launched one, as a worker does with its kernel."
    inner = launch("targets:leave_behind", {"stay": True}, warm=request["warm"])
    pids = inner.receive(30)["pids"]
    channel.send({"pids": [inner.pid, *pids]})
    if request.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def crash(request: dict, channel: Channel):
    "Die of a bad pointer."
    ctypes.string_at(0)


def make_orphans(request: dict, channel: Channel):
    "Let many children lose their parent, and end."
    for _ in range(request["count"]):
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.wait()
    time.sleep(0.5)
    below = [p for p in os.listdir("/proc") if p.isdigit() and _parent(p) == os.getppid()]
    channel.send({"below the warden": len(below)})


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def own_modules(request: dict, channel: Channel):
    "Tell which modules of mlkit were there from the start."
    channel.send({"modules": [name for name in sys.modules if name.startswith("mlkit.")]})
