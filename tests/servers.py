"What the tests of serving need: bundles whose answers are exact, and servers in processes of their own."

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
from onnx import TensorProto, helper, numpy_helper

from mlkit.bundle import Manifest, Tensor, package


def linear_bundle(folder: Path, factor: float = 1.0, name: str = "linear", classes: int = 2) -> Path:
    "Three whole numbers in, two sums out: float32 holds them exactly, so that answers are equal and not only close."
    weights = numpy_helper.from_array(np.array([[1, 0], [0, 1], [1, 1]], np.float32) * factor, "w")
    x, logits = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 3), ("logits", 2)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["logits"])], "linear", [x], [logits], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    tensors = (Tensor("x", "float32", ("batch", 3)),), (Tensor("logits", "float32", ("batch", 2)),)
    package(folder, model, Manifest(name, "classification", *tensors, {"x": {"kind": "numeric", "shape": [3]}}, labels=("no", "yes")), pl.DataFrame({"x": [[1.0, 2, 3]]}))
    return folder


def slow_bundle(folder: Path, side: int = 700, name: str = "slow") -> Path:
    "A network that takes some milliseconds a row: a chain of products, made anew for each row."
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h0"])]
    weights = [numpy_helper.from_array(np.full((3, side), 1e-3, np.float32), "w0"), numpy_helper.from_array(np.full((side, side), 1e-3, np.float32), "w")]
    nodes += [helper.make_node("MatMul", [f"h{i}", "w"], [f"h{i + 1}"]) for i in range(30)]
    nodes += [helper.make_node("MatMul", ["h30", "v"], ["value"])]
    weights.append(numpy_helper.from_array(np.full((side, 1), 1e-3, np.float32), "v"))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 3), ("value", 1)))
    model = helper.make_model(helper.make_graph(nodes, "slow", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    tensors = (Tensor("x", "float32", ("batch", 3)),), (Tensor("value", "float32", ("batch", 1)),)
    package(folder, model, Manifest(name, "regression", *tensors, {"x": {"kind": "numeric", "shape": [3]}}), pl.DataFrame({"x": [[1.0, 2, 3]]}))
    return folder


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    "A server in a process of its own."

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.port, self.log = process, port, log

    def ask(self, path: str, body=None, method=None, timeout=20, **headers) -> tuple[int, dict, bytes]:
        "Send a request; returns status, headers and body."
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        names = {k.replace("_", "-"): v for k, v in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"} | names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def json(self, path: str, body=None, **more):
        status, _, content = self.ask(path, body, **more)
        return status, json.loads(content)

    def talk(self, data: bytes, wait: float = 5.0) -> bytes:
        "Send raw bytes and return what comes back until the connection ends or nothing more comes."
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as sock:
            sock.sendall(data)
            said = b""
            try:
                while part := sock.recv(65_536):
                    said += part
            except (TimeoutError, ConnectionResetError):
                pass
            return said

    def workers(self) -> list[int]:
        return [int(p) for p in subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()]


@contextmanager
def serving(*words, ready: bool = True, environment=None):
    "`mlkit serve` with these words; ends it and sees that it ends well."
    port = free_port()
    log = Path(os.environ["MLKIT_RUNTIME"]) / f"serve-{port}.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "mlkit", "serve", "--port", str(port), "--drain", "0.2", *map(str, words)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, start_new_session=True)
    server = Server(process, port, log)
    try:
        until = time.monotonic() + 60
        while ready and process.poll() is None and time.monotonic() < until:
            try:
                if server.ask("/v2/health/ready")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text()
    assert "Traceback" not in text and '"status":500' not in text, text[-4000:]
