"""The server side by side with FastAPI, LitServe, MLServer and BentoML: rate and latency, then a soak, overload and large bodies of ours, with a probe that asks whether the server is alive.

Every server runs the same ONNX file with one onnxruntime thread on the first core; wrk (or, for want of it, the generator of `mlkit bench`) asks from the last core. Each peer lives in an environment of
its own, made on first use below the temporary folder (or at $MLKIT_BENCH_PEERS); one that cannot be installed is said to be missing. $MLKIT_BENCH_SECONDS is the time of each load (5), $MLKIT_BENCH_SOAK of the soak and of the overload (30).
"""

import asyncio
import functools
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
from bench import own_places, report
from onnx import TensorProto, helper, numpy_helper
from servers import slow_bundle

from mlkit.bundle import Bundle, Manifest, Tensor, package
from mlkit.bundle.inputs import prepared
from mlkit.data.images import encode_png
from mlkit.serve.load import hammer, http_request, serving
from mlkit.serve.protocol import NAMES

SECONDS, SOAK = float(os.environ.get("MLKIT_BENCH_SECONDS", 5)), float(os.environ.get("MLKIT_BENCH_SOAK", 30))
CORES = sorted(os.sched_getaffinity(0))
SESSION = "import sys, numpy as np, onnxruntime as ort\noptions = ort.SessionOptions(); options.intra_op_num_threads = options.inter_op_num_threads = 1\nsession = ort.InferenceSession(sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].endswith('.onnx') else __import__('os').environ['MODEL'], options)\n"
PEERS = {  # package: what else it needs, the program, the command, the path; {port} is filled in
    "fastapi": (
        "uvicorn uvloop httptools", SESSION + """
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
class Values(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]
class Asked(BaseModel):
    inputs: list[Values]
app = FastAPI()
@app.post("/v2/models/mlp/infer")
async def infer(asked: Asked):
    values = asked.inputs[0]
    (y,) = session.run(None, {"x": np.array(values.data, np.float32).reshape(values.shape)})
    return {"model_name": "mlp", "outputs": [{"name": "logits", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}]}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
""", ("python", "peer.py", "{model}", "{port}"), "/v2/models/mlp/infer"),
    "litserve": (
        "", SESSION + """
import litserve as ls
class Net(ls.LitAPI):
    def setup(self, device):
        pass
    def decode_request(self, request):
        return np.array(request["inputs"][0]["data"], np.float32)
    def predict(self, x):
        return session.run(None, {"x": np.atleast_2d(x)})[0]
    def encode_response(self, y):
        return {"outputs": [{"name": "logits", "data": y.ravel().tolist()}]}
if __name__ == "__main__":
    ls.LitServer(Net(max_batch_size=32, batch_timeout=0.001), accelerator="cpu").run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error")
""", ("python", "peer.py", "{model}", "{port}"), "/predict"),
    "mlserver": (
        "", SESSION + """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Net(MLModel):
    async def predict(self, payload):
        (y,) = session.run(None, {"x": NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", y)])
""", ("mlserver", "start", "."), "/v2/models/mlp/infer"),
    "bentoml": (
        "", SESSION + """
import bentoml
@bentoml.service(workers=1)
class Net:
    @bentoml.api(route="/predict")
    def predict(self, inputs: list[dict]) -> dict:
        (y,) = session.run(None, {"x": np.array(inputs[0]["data"], np.float32).reshape(inputs[0]["shape"])})
        return {"outputs": [{"name": "logits", "data": y.ravel().tolist()}]}
""", ("bentoml", "serve", "peer:Net", "--host", "127.0.0.1", "--port", "{port}"), "/predict"),
}  # fmt: skip


def dense(folder: Path, wide: int = 100) -> Path:
    "A bundle of a small MLP."
    random, sizes = np.random.default_rng(0), (wide, 64, 10)
    nodes, weights, name = [], [], "x"
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        weights.append(numpy_helper.from_array(random.normal(0, 0.1, (a, b)).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"h{i}" if i else "h"]))
        name = f"h{i}" if i else "r"
        if not i:
            nodes.append(helper.make_node("Relu", ["h"], ["r"]))
    nodes[-1].output[0] = "logits"
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", wide), ("logits", 10)))
    model = helper.make_model(helper.make_graph(nodes, "mlp", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    sides = (Tensor("x", "float32", ("batch", wide)),), (Tensor("logits", "float32", ("batch", 10)),)
    package(folder, model, Manifest("mlp", "classification", *sides, {"x": {"kind": "numeric", "shape": [wide]}}, labels=tuple("0123456789")), pl.DataFrame({"x": random.normal(size=(4, wide)).tolist()}))
    return folder


def convolutions(folder: Path) -> Path:
    "A bundle of a small network for 28x28 images, as large as one that learns Fashion-MNIST."
    random, weights, nodes, name, before = np.random.default_rng(0), [], [helper.make_node("Cast", ["image"], ["numbers"], to=TensorProto.FLOAT)], "numbers", 1
    for i, (channels, stride) in enumerate(((32, 1), (64, 2), (128, 2))):
        weights.append(numpy_helper.from_array(random.normal(0, 0.1, (channels, before, 3, 3)).astype(np.float32), f"w{i}"))
        nodes += [helper.make_node("Conv", [name, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1], strides=[stride, stride]), helper.make_node("Relu", [f"c{i}"], [f"r{i}"])]
        name, before = f"r{i}", channels
    weights.append(numpy_helper.from_array(random.normal(0, 0.1, (128, 10)).astype(np.float32), "v"))
    nodes += [helper.make_node("GlobalAveragePool", [name], ["pooled"]), helper.make_node("Flatten", ["pooled"], ["flat"]), helper.make_node("MatMul", ["flat", "v"], ["logits"])]
    x, y = (helper.make_tensor_value_info(n, kind, ["batch", *k]) for n, kind, k in (("image", TensorProto.UINT8, (1, 28, 28)), ("logits", TensorProto.FLOAT, (10,))))
    model = helper.make_model(helper.make_graph(nodes, "cnn", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    sides = (Tensor("image", "uint8", ("batch", 1, 28, 28)),), (Tensor("logits", "float32", ("batch", 10)),)
    golden = pl.DataFrame({"image": [encode_png(random.integers(0, 256, (28, 28, 1), np.uint8)) for _ in range(4)]})
    package(folder, model, Manifest("cnn", "classification", *sides, {"image": {"kind": "image", "height": 28, "width": 28, "channels": 1}}, labels=tuple("0123456789")), golden)
    return folder


def as_json(name: str, values: np.ndarray) -> tuple[bytes, dict]:
    data = values.ravel().tolist() if values.dtype == np.uint8 else [round(float(v), 6) for v in values.ravel()]
    content = {"inputs": [{"name": name, "datatype": NAMES[values.dtype.name], "shape": list(values.shape), "data": data}]}
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


def as_binary(name: str, values: np.ndarray) -> tuple[bytes, dict]:
    head = {"inputs": [{"name": name, "datatype": NAMES[values.dtype.name], "shape": list(values.shape), "parameters": {"binary_data_size": values.nbytes}}], "parameters": {"binary_data_output": True}}
    header = json.dumps(head).encode()
    return header + values.tobytes(), {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}


def busy(pid: int) -> float:
    "Seconds of a core that a process and its children have used; unlike the rate, it hardly depends on what else the machine does."
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + sum(map(busy, map(int, children)))


def load(home: Path, port: int, path: str, body: bytes, headers: dict, pid: int, clients: int = 32, seconds: float = SECONDS) -> dict:
    "Ask as fast as answers come; returns the rate, latencies, errors, the server's time on a core for each answer, and its memory."
    url = f"http://127.0.0.1:{port}{path}"
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30).read()
    if not shutil.which("wrk"):
        lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        request = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
        before = busy(pid)
        seen, errors, _ = hammer(port, [request], clients, seconds, CORES[-1])
        return {"answers/s": len(seen) / seconds, "p50 ms": float(np.median(seen)) * 1000, "p99 ms": float(np.quantile(seen, 0.99)) * 1000, "errors": errors, "core µs each": (busy(pid) - before) / len(seen) * 1e6, "memory MB": memory(pid)}
    (home / "body").write_bytes(body)
    script = home / "post.lua"
    script.write_text(f'wrk.method = "POST"\nlocal file = io.open("{home}/body", "rb")\nwrk.body = file:read("*a")\n' + "".join(f'wrk.headers["{k}"] = "{v}"\n' for k, v in headers.items()))
    words = ["taskset", "-c", CORES[-1], "wrk", "-t1", f"-c{clients}", "--latency", "-s", script, url]
    subprocess.run([*map(str, words), "-d1s"], capture_output=True)
    before = busy(pid)
    said = subprocess.run([*map(str, words), f"-d{seconds:g}s"], capture_output=True, text=True, check=True).stdout
    used = busy(pid) - before
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    found = {q: float(v) * units[u] for q, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", said)}
    bad = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", said))) + sum(int(n) for line in re.findall(r"Socket errors:(.*)", said) for n in re.findall(r"\d+", line))
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])
    return {"answers/s": rate, "p50 ms": found["50"], "p99 ms": found["99"], "errors": bad, "core µs each": used / (rate * seconds) * 1e6, "memory MB": memory(pid)}


def memory(pid: int) -> float:
    "Megabytes of a process and its children."
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6 + sum(map(memory, map(int, children)))


def environment(name: str, more: str) -> Path | None:
    "The programs of a peer's environment; None if it cannot be had."
    home = Path(os.environ.get("MLKIT_BENCH_PEERS") or Path(tempfile.gettempdir()) / "mlkit-bench-peers") / name
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        try:
            subprocess.run([python, "-m", "pip", "install", "-q", name, *more.split(), "onnxruntime", "numpy"], capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return None
    return home / "bin" if subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0 else None


@contextmanager
def peer(name: str, home: Path, model: Path):
    "A peer's server while the block lasts: its port, its path and its process; None if it is not to be had."
    more, program, command, path = PEERS[name]
    programs = environment(name, more)
    if programs is None:
        yield None
        return
    (folder := home / name).mkdir()
    (folder / "peer.py").write_text(program)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "settings.json").write_text(json.dumps({"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "parallel_workers": 0, "host": "127.0.0.1", "debug": False, "metrics_endpoint": None}))
    (folder / "model-settings.json").write_text(json.dumps({"name": "mlp", "implementation": "peer.Net", "max_batch_size": 32, "max_batch_time": 0.001}))
    words = [w.format(model=model, port=port) for w in command]
    told = os.environ | {"MODEL": str(model), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "true"}
    process = subprocess.Popen([programs / words[0], *words[1:]], cwd=folder, env=told, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, {CORES[0]}))
    try:
        yield port, path, process, folder / "log"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def beside(name: str, home: Path, model: Path, values: np.ndarray) -> dict:
    "Measure a peer."
    row = {"what": f"{name}: MLP, JSON", "answers/s": None, "p50 ms": None, "p99 ms": None, "errors": "not installed", "core µs each": None, "memory MB": None}
    with peer(name, home, model) as found:
        if found is None:
            return row
        port, path, process, log = found
        body, headers = as_json("x", values)
        until = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers), timeout=10).read()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > until:
                    return row | {"errors": f"{error}: {(log.read_text().strip().splitlines() or ['silent'])[-1][:100]}"}
                time.sleep(0.3)
        return row | load(home, port, path, body, headers, process.pid)


async def paced(port: int, request: bytes, rate: float, seconds: float, connections: int = 64) -> tuple[list, dict[int, list[float]]]:
    "Ask at a steady rate, whatever the answers; returns the latencies by status, each from when the request was due. The number of connections must be enough."
    found: dict[int, list[float]] = {}
    free = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", port))

    async def ask(due: float):
        reader, writer = await free.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        found.setdefault(int(head[9:12]), []).append(time.perf_counter() - due)
        free.put_nowait((reader, writer))

    begun, tasks, sent = time.perf_counter(), set(), 0
    while (now := time.perf_counter() - begun) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(ask(begun + sent / rate))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.001)
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    return sent, found


def steady(port: int, request: bytes, rate: float, seconds: float, connections: int = 64) -> dict[int, np.ndarray]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[-1]})
    gc.disable()  # a pass over everything takes this process as long as a hundred answers, and would be counted as theirs
    try:
        return {status: np.array(seen) for status, seen in asyncio.run(paced(port, request, rate, seconds, connections))[1].items()}
    finally:
        gc.enable()
        os.sched_setaffinity(0, before)


def at_four_fifths(home: Path, port: int, body: bytes, headers: dict, pid: int, rounds: int = 5) -> list[dict]:
    "Latency and memory at 80 % of the peak. A shared machine is not as fast in one second as in the next, so each round follows the peak that was measured just before it."
    request, path = http_request("/v2/models/mlp/infer", body), "/v2/models/mlp/infer"
    peaks, found = [], []
    for _ in range(rounds):
        peaks.append(load(home, port, path, body, headers, pid, seconds=2)["answers/s"])
        found.append(row_of("", steady(port, request, 0.8 * peaks[-1], SECONDS), SECONDS, memory(pid)))
    middle = sorted(found, key=lambda row: row["p99 ms"])[rounds // 2]
    each = ", ".join(f"{row['p99 ms']:.0f}" for row in found)
    middle["what"] = f"mlkit: MLP, JSON, steadily 80 % of the peak, middle of {rounds} rounds (p99 {each} ms)"
    first = memory(pid)
    soak = steady(port, request, 0.8 * min(peaks), SOAK)
    return [middle, row_of(f"mlkit: the same for {SOAK:g} s, {first:.0f} MB before", soak, SOAK, memory(pid))]


def sketched(home: Path, values: np.ndarray, rounds: int = 6) -> list[dict]:
    "What sketches cost: a server that keeps a hundredth of the requests and one that sketches as well, asked at the same time on the same core, so that both meet the same machine. Rates are of half a core."
    body, headers = as_json("x", values)
    with serving(home / "mlp", options=("--samples", home / "kept", "--sketch-share", "0"), core=CORES[0]) as plain, serving(home / "mlp", options=("--samples", home / "seen"), core=CORES[0]) as other, ThreadPoolExecutor() as both:
        for name in ("plain", "other"):
            (home / name).mkdir()

        def ask(server, name):
            return load(home / name, int(server.url.rsplit(":", 1)[1].strip("/")), "/v2/models/mlp/infer", body, headers, server.process.pid, 16)

        found = [list(both.map(ask, (plain, other), ("plain", "other"))) for _ in range(rounds)]
        told = urllib.request.urlopen(other.url.rstrip("/") + "/metrics").read().decode()
    lost = [1 - a["core µs each"] / b["core µs each"] for a, b in found]
    rows = ", ".join(f"{float(n):,.0f} {name}" for name, n in re.findall(r'sampled_rows_total{outcome="(.*?)"} (\S+)', told))
    said = f"{np.mean(lost):.1%} of the throughput (+-{np.std(lost, ddof=1) / rounds**0.5:.1%}); rows {rows}"
    return [{"what": f"mlkit: MLP, JSON, {what}"} | {key: float(np.median([each[i][key] for each in found])) for key in found[0][0]} | {"errors": said if i else 0} for i, what in enumerate(("samples alone", "samples and sketches"))]


def row_of(what: str, found: dict[int, np.ndarray], seconds: float, mb: float | None = None) -> dict:
    good = found.get(200, np.array([np.nan]))
    others = ", ".join(f"{len(v):,} x {status} (p99 {np.quantile(v, 0.99) * 1000:.0f} ms)" for status, v in found.items() if status != 200)
    return {"what": what, "answers/s": len(good) / seconds, "p50 ms": float(np.median(good)) * 1000, "p99 ms": float(np.quantile(good, 0.99)) * 1000, "errors": others or 0, "core µs each": None, "memory MB": mb}


def ours(home: Path, values: np.ndarray) -> list[dict]:
    "Rates of our server, with every cap and metric on."
    rows = []
    with serving(home / "mlp", core=CORES[0]) as server:
        port = int(server.url.rsplit(":", 1)[1].strip("/"))
        for what, (body, headers) in (("JSON", as_json("x", values)), ("binary", as_binary("x", values))):
            rows.append({"what": f"mlkit: MLP, {what}"} | load(home, port, "/v2/models/mlp/infer", body, headers, server.process.pid))
        rows += at_four_fifths(home, port, *as_json("x", values), server.process.pid)
    with serving(home / "cnn", core=CORES[0]) as server:
        port, image = int(server.url.rsplit(":", 1)[1].strip("/")), np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28), np.uint8)
        png = encode_png(np.random.default_rng(0).integers(0, 256, (28, 28, 1), np.uint8)), {"Content-Type": "image/png"}
        for what, (body, headers), path in (("JSON", as_json("image", image), "/v2/models/cnn/infer"), ("binary", as_binary("image", image), "/v2/models/cnn/infer"), ("PNG", png, "/predict/cnn")):
            rows.append({"what": f"mlkit: 28x28 CNN, {what}"} | load(home, port, path, body, headers, server.process.pid))
    return rows


def bare(folder: Path, said: list[str]) -> dict[str, float]:
    "Texts a second of the network alone, without tokenizer and server: one by one, and 16 of exactly one length at once. No server can do better, and batching no more than their ratio."
    bundle = Bundle.load(folder, threads=1)
    lengths = [int(prepared(pl.DataFrame({"text": [text]}), bundle.prepare)["attention_mask"].sum()) for text in said]
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[0]})
    try:
        spent = {rows: sum(_seconds(bundle.session, rows, n) / rows for n in lengths) for rows in (1, 16)}
    finally:
        os.sched_setaffinity(0, before)
    return {"one by one": len(said) / spent[1], "16 of one length": len(said) / spent[16]}


@functools.cache
def _seconds(session, rows: int, length: int) -> float:
    "The median time of a batch."
    values, seen = {n: np.ones((rows, length), np.int64) for n in ("input_ids", "attention_mask")}, []
    for _ in range(5):
        begun = time.perf_counter()
        session.run(None, values)
        seen.append(time.perf_counter() - begun)
    return float(np.median(seen))


def texts(home: Path) -> list[dict]:
    "Short texts of unequal lengths through MiniLM, one by one and in batches of like length."
    try:
        from mlkit.nlp import Embedder

        Embedder.pretrained("minilm").export_bundle(home / "minilm", pl.DataFrame({"text": ["a short text", "another one"]}))
    except ImportError as error:
        return [{"what": "mlkit: MiniLM, short texts", "answers/s": None, "p50 ms": None, "p99 ms": None, "errors": f"not installed: {error.name}", "core µs each": None, "memory MB": None}]
    words, random, rows = "the film is a quiet and often very funny look at what people do when they think that nobody sees them".split(), np.random.default_rng(0), []
    for kind, most in (("queries of 3 to 6 words", 7), ("sentences of 3 to 24 words", 25)):
        said = [" ".join(random.choice(words, random.integers(3, most))) for _ in range(200)]
        requests = [http_request("/predict/minilm", json.dumps([{"text": text}]).encode()) for text in said]
        with serving(home / "minilm", options=("--max-batch", "1", "--max-wait", "30"), core=CORES[0]) as single, serving(home / "minilm", options=("--latency-target", "0.5", "--max-wait", "30"), core=CORES[0]) as batched:
            turns = [(what, hammer(int(server.url.rsplit(":", 1)[1].strip("/")), requests, 64, SECONDS, CORES[-1])) for _ in range(3) for what, server in (("one by one", single), ("batched by length", batched))]
        for what in ("one by one", "batched by length"):  # in turn, so that both meet the same machine; the middle of three
            seen, errors, _ = sorted((found for each, found in turns if each == what), key=lambda found: len(found[0]))[1]
            rows.append({"what": f"mlkit: MiniLM, {kind}, {what}", "answers/s": len(seen) / SECONDS, "p50 ms": float(np.median(seen)) * 1000, "p99 ms": float(np.quantile(seen, 0.99)) * 1000, "errors": errors, "core µs each": None, "memory MB": None})
        rows += [{"what": f"onnxruntime alone: {kind}, {what}", "answers/s": rate, "p50 ms": None, "p99 ms": None, "errors": None, "core µs each": None, "memory MB": None} for what, rate in bare(home / "minilm", said).items()]
    return rows


@contextmanager
def probed(port: int):
    "Ask for liveness every 50 ms, each time on a new connection and from a process of its own, as an orchestrator does; the list holds the seconds of each answer once the block ends."
    program = """
import http.client, json, sys, threading, time
ended, seen = threading.Event(), []
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.wait(0.05):
    begun, line = time.perf_counter(), http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
    line.request("GET", "/v2/health/live")
    seen.append(time.perf_counter() - begun if line.getresponse().status == 200 else 10.0)
    line.close()
print(json.dumps(seen))
"""
    process, seen = subprocess.Popen(["taskset", "-c", str(CORES[-1]), "python", "-c", program, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True), []
    try:
        yield seen
    finally:
        seen += json.loads(process.communicate("")[0])


def liveness(what: str, seen: list[float]) -> dict:
    "A row of what a probe saw: its 99th percentile and, where errors stand, the answers over 100 ms."
    late = sum(s > 0.1 for s in seen)
    return {"what": f"mlkit: liveness while {what}, {len(seen)} probes, slowest {max(seen) * 1000:.0f} ms", "answers/s": None, "p50 ms": float(np.median(seen)) * 1000, "p99 ms": float(np.quantile(seen, 0.99)) * 1000, "errors": f"{late} over 100 ms" if late else 0, "core µs each": None, "memory MB": None}


def overload(home: Path, spells: int = 6) -> list[dict]:
    "Twice of what a slow network can answer at its best number of clients, in spells with the peak measured between them: a shared machine is not as fast in one second as in the next."
    with serving(home / "slow", options=("--max-wait", "0.2"), core=CORES[0]) as server:
        port, path, (body, headers) = int(server.url.rsplit(":", 1)[1].strip("/")), "/v2/models/slow/infer", as_json("x", np.ones((1, 3), np.float32))

        def peak(clients: int) -> dict:
            return load(home, port, path, body, headers, server.process.pid, clients, 2)

        clients = max((16, 32, 64), key=lambda n: peak(n)["answers/s"])
        peaks, found, seen, shares = [peak(clients)], {}, [], []
        for _ in range(spells):
            with probed(port) as probes:
                spell = steady(port, http_request(path, body), 2 * peaks[-1]["answers/s"], SOAK / spells, 1000)
            peaks.append(peak(clients))
            seen += probes
            shares.append(len(spell.get(200, ())) * spells / SOAK * 2 / (peaks[-2]["answers/s"] + peaks[-1]["answers/s"]))
            for status, seconds in spell.items():
                found[status] = np.append(found.get(status, ()), seconds)
        late, each = int((found.get(429, np.array([])) > 0.1).sum()), ", ".join(f"{share:.0%}" for share in shares)
        rows = [{"what": f"mlkit: a slow network, {clients} clients, its {name} peak"} | peak for name, peak in zip(("lowest", "highest"), (f(peaks, key=lambda p: p["answers/s"]) for f in (min, max)))]
        rows.append(row_of(f"mlkit: twice of that for {SOAK:g} s, goodput {np.mean(shares):.0%} of the peaks around ({each}), {late} refusals later than 100 ms", found, SOAK, memory(server.process.pid)))
        return [*rows, liveness("twice its peak is asked", seen)]


def large(home: Path) -> list[dict]:
    "Liveness while large bodies come one after the other: as much JSON as may be, and binary."
    values = np.random.default_rng(2).normal(size=(4096, 100)).astype(np.float32)
    rows = []
    for what, (body, headers) in (("JSON", as_json("x", values)), ("binary", as_binary("x", values))):
        with serving(home / "mlp", core=CORES[0]) as server:
            port = int(server.url.rsplit(":", 1)[1].strip("/"))
            with probed(port) as seen:
                row = load(home, port, "/v2/models/mlp/infer", body, headers, server.process.pid, 4)
        rows += [{"what": f"mlkit: MLP, 4,096 rows in {len(body) / 1e6:.1f} MB of {what}"} | row, liveness(f"bodies of {len(body) / 1e6:.1f} MB of {what} come", seen)]
    return rows


def main():
    home = own_places()
    dense(home / "mlp"), convolutions(home / "cnn"), slow_bundle(home / "slow", side=1400)
    values = np.random.default_rng(1).normal(size=(1, 100)).astype(np.float32)
    rows = ours(home, values)
    peers = [beside(name, home, home / "mlp" / "model.onnx", values) for name in PEERS]
    notes = []
    if good := [r for r in peers if r["answers/s"]]:
        rate, cheap = rows[0]["answers/s"] / max(r["answers/s"] for r in good), min(r["core µs each"] for r in good) / rows[0]["core µs each"]
        notes = [f"mlkit answers {rate:.1f} times as many as the best peer, and an answer takes {cheap:.1f} times less of a core."]
    report("One core for the server, one onnxruntime thread, one core for who asks", [*rows, *sketched(home, values), *texts(home), *peers, *overload(home), *large(home)], notes)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
