"""Memory of four kernels side by side, each with torch, pytorch_lightning, timm and transformers imported: forked from the server, and started as usual.

Proportional set size: a page that several processes share counts for each by its share, so that the sum is what the machine has less of. For the warm ones that
includes their wardens and the server itself.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from bench import own_places, report

imports = ["torch", "pytorch_lightning", "timm", "transformers"]
fields = {"Pss:": "all", "Pss_Anon:": "its own", "Pss_File:": "of files"}


def proportional_size(pids: list[int]) -> dict[str, float]:
    "Sum the proportional set size of processes, in megabytes."
    total = dict.fromkeys(fields.values(), 0.0)
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if name := fields.get(line.split()[0]):
                    total[name] += int(line.split()[1]) * 1024 / 1e6
    return total


class Kernel:
    "A kernel that has imported the libraries."

    def __init__(self, warm: bool):
        from jupyter_client.manager import KernelManager
        from mlkit.pipeline.kernels import spec

        self.manager, started = KernelManager(), time.perf_counter()
        if warm:
            self.manager._kernel_spec = spec(imports)
        self.manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=300)
        self.run(f"import {', '.join(imports)}")
        self.seconds = time.perf_counter() - started
        self.pid = self.manager.provisioner.pid

    def run(self, code: str):
        reply = self.client.execute_interactive(code, timeout=300)
        assert reply["content"]["status"] == "ok", reply

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def measure(warm: bool, count: int = 4) -> dict:
    "Start `count` kernels at once; return their memory."
    from mlkit.pipeline import forkserver

    with ThreadPoolExecutor(count) as pool:
        kernels = list(pool.map(lambda _: Kernel(warm), range(count)))
    pids = [k.pid for k in kernels]
    if warm:
        pids += {*map(parent, pids), *(s["pid"] for s in forkserver.ask_all("status"))}
    row = {"what": f"{count} kernels, {'warm' if warm else 'as usual'}", "processes": len(pids)}
    row |= {f"{name}, MB": round(size) for name, size in proportional_size(pids).items()} | {"seconds until all have imported": max(k.seconds for k in kernels)}
    for kernel in kernels:
        kernel.stop()
    return row


if __name__ == "__main__":
    own_places()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mlkit.pipeline import forkserver

    try:
        Kernel(warm=True).stop()  # the server imports the libraries
        rows = [measure(warm=True), measure(warm=False)]
    finally:
        forkserver.stop()
    ratio = rows[1]["all, MB"] / rows[0]["all, MB"]
    report(f"Memory of kernels on Python {sys.version.split()[0]}", rows, [f"warm kernels take {ratio:.1f} times less memory, their server included"])
