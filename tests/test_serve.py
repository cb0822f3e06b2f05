"A server answers each caller with its own answer, whatever else happens to it."

import gzip
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import polars as pl
import pytest
from servers import linear_bundle, serving, slow_bundle

from mlkit.bundle import Registry
from mlkit.serve.app import LARGE
from mlkit.serve.protocol import pack


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    home = tmp_path_factory.mktemp("bundles")
    linear_bundle(home / "first")
    linear_bundle(home / "second", factor=2.0)
    slow_bundle(home / "slow")
    return home


@pytest.fixture(scope="module")
def server(bundles):
    with serving(bundles / "first", bundles / "slow", "--manage", "--repository", bundles) as running:
        yield running


def tensor(*rows) -> dict:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), 3], "data": [v for row in rows for v in row]}]}


def sums(rows) -> list:
    return [v for a, b, c in rows for v in (a + c, b + c)]


def test_the_protocol_answers_in_json_and_in_binary_and_packed(server):
    status, found = server.json("/v2/models/linear/infer", tensor([1, 2, 3], [4, 5, 6]) | {"id": "mine"})
    assert status == 200 and found["id"] == "mine" and found["outputs"][0]["data"] == [4, 5, 10, 11]
    packed = gzip.compress(json.dumps(tensor([1, 2, 3])).encode())
    status, _, body = server.ask("/v2/models/linear/infer", packed, content_encoding="gzip")
    assert json.loads(body)["outputs"][0]["data"] == [4, 5]
    header = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "prediction"}]}).encode()
    status, headers, body = server.ask("/v2/models/linear/infer", header + np.array([1, 2, 3], "<f4").tobytes(), inference_header_content_length=str(len(header)))
    length = int(headers["inference-header-content-length"])
    assert status == 200 and np.frombuffer(body[length:], "<f4").tolist() == [4, 5]
    assert json.loads(body[:length])["outputs"][1] == {"name": "prediction", "datatype": "BYTES", "shape": [1], "data": ["yes"]}


def test_what_was_left_out_may_be_null_as_pydantic_writes_it(server):
    asked = tensor([1, 2, 3]) | {"id": None, "parameters": None, "outputs": None}
    asked["inputs"][0]["parameters"] = None
    assert server.json("/v2/models/linear/infer", asked)[1]["outputs"][0]["data"] == [4, 5]


def test_answers_come_packed_to_those_who_like_them_so(server):
    rows = [[2_000_000 + i, 3_000_000, 3] for i in range(4096)]
    wishes = [{"name": name} for name in ("logits", "prediction", "probabilities")]
    for asked in (tensor(*rows[:300]), tensor(*rows) | {"outputs": wishes}):  # packed on the event loop, and in a thread
        _, headers, packed = server.ask("/v2/models/linear/infer", asked, accept_encoding="gzip, deflate")
        assert headers["content-encoding"] == "gzip" and headers["vary"] == "accept-encoding"
        assert (len(gzip.decompress(packed)) > LARGE) == ("outputs" in asked)
        assert json.loads(gzip.decompress(packed))["outputs"][0]["data"] == sums(rows[: asked["inputs"][0]["shape"][0]])
    for asked, coding in ((tensor(*rows), "identity"), (tensor([1, 2, 3]), "gzip")):
        assert "content-encoding" not in server.ask("/v2/models/linear/infer", asked, accept_encoding=coding)[1]


def test_metadata_names_what_infer_takes(server):
    found = server.json("/v2/models/linear")[1]
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}] and found["versions"]
    version = found["versions"][0]
    assert server.json(f"/v2/models/linear/versions/{version}/infer", tensor([1, 2, 3]))[1]["model_version"] == version
    assert server.json(f"/v2/models/linear/versions/{version}/ready")[0] == 200
    assert server.json("/v2/models/linear/versions/none/ready")[0] == 404
    assert server.json("/v2")[1]["name"] == "mlkit"


def test_rows_come_as_json_csv_and_arrow(server):
    frame = pl.DataFrame({"x": [[1.0, 2, 3], [9.0, 0, 0]]})
    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    expected = ["yes", "no"]
    for body, kind in ((frame.write_json().encode(), "application/json"), (b"1,2,3\n9,0,0\n", "text/csv"), (buffer.getvalue(), "application/vnd.apache.arrow.stream")):
        assert [p["prediction"] for p in server.json("/predict/linear", body, content_type=kind)[1]["predictions"]] == expected
    status, _, body = server.ask("/predict/linear", frame.write_json().encode(), accept="application/vnd.apache.arrow.stream")
    assert pl.read_ipc_stream(body)["prediction"].to_list() == expected


def test_the_clouds_find_what_they_look_for(bundles):
    environment = {"AIP_HTTP_PORT": "1", "AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/v1/endpoints/1:predict", "MLKIT_BUNDLE": str(bundles / "first")}
    with serving(environment=environment) as server:
        assert server.ask("/health")[0] == server.ask("/ping")[0] == 200
        assert server.json("/v1/endpoints/1:predict", {"instances": [{"x": [1, 2, 3]}]})[1]["predictions"][0]["prediction"] == "yes"
        assert server.ask("/invocations", b"1,2,3\n", content_type="text/csv", accept="text/csv")[2].startswith(b"prediction,")
        assert server.json("/score", {"data": [[1, 2, 3]]})[1][0]["prediction"] == "yes"


@pytest.mark.parametrize(
    "path, body, headers, status",
    [
        ("/v2/models/linear/infer", b"{", {}, 400),
        ("/v2/models/linear/infer", b"[" * 5000 + b"]" * 5000, {}, 400),
        ("/v2/models/linear/infer", b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[1,2,NaN]}]}', {}, 400),
        ("/v2/models/linear/infer", b'{"inputs":[{"name":"x","datatype":"FP32","shape":[9223372036854775807,9223372036854775807],"data":[1]}]}', {}, 413),
        ("/v2/models/linear/infer", b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,9223372036854775807,4611686018427387904],"data":[1]}]}', {}, 400),
        ("/v2/models/linear/infer", gzip.compress(bytes(80 << 20)), {"content_encoding": "gzip"}, 413),
        ("/v2/models/linear/infer", b"{}", {"content_encoding": "br"}, 415),
        ("/v2/models/linear/infer", b"{}", {"inference_header_content_length": "-1"}, 400),
        ("/v2/models/..%2f..%2fetc/infer", b"{}", {}, 404),
        ("/v2/models/linear/versions/..%2f1/infer", json.dumps(tensor([1, 2, 3])).encode(), {}, 404),
        ("/v2/repository/models/..%2f..%2fetc/load", b"{}", {}, 404),
        ("/v2/repository/models/none/load", b'{"parameters": {"alias": "../../x"}}', {}, 404),
        ("/predict/linear", b"x", {"content_type": "application/python-pickle"}, 415),
        ("/predict/linear", b'[{"x": [1, 2, 3]}]', {"accept": "application/xml"}, 406),
        ("/predict/linear", b'[{"x": [1, 2]}]', {}, 400),
        ("/predict/linear", b'[{"x": "http://localhost/"}]', {}, 400),
        ("/predict/linear", b"[]", {}, 400),
        ("/predict/linear", b'[{"x": [1, 2, 1e39]}]', {}, 400),
        ("/predict/linear", b"1,2,1e39", {"content_type": "text/csv"}, 400),
        ("/v2/models/linear/infer", json.dumps(tensor([1, 2, 3]) | {"parameters": {"timeout": True}}).encode(), {}, 400),
        ("/predict/linear", b'[{"x": [1, 2, 3]}]', {"x_request_timeout": "nan"}, 400),
        ("/v2/models/linear/infer", json.dumps(tensor([1, 2, True])).encode(), {}, 400),
        ("/predict/linear", b'[{"x": [1, 2, true]}]', {}, 400),
    ],
)
def test_bad_requests_are_told_so(server, path, body, headers, status):
    found, _, said = server.ask(path, body, **headers)
    assert found == status and json.loads(said)["error"]
    assert server.ask("/v2/health/live")[0] == 200


def test_many_callers_at_once_get_their_own_answers(server):
    wrong = []

    def caller(number: int):
        chance = np.random.default_rng(number)
        for _ in range(30):
            rows = chance.integers(-999, 999, (int(chance.integers(1, 90)), 3)).tolist()
            status, found = server.json("/v2/models/linear/infer", tensor(*rows))
            if status != 200 or found["outputs"][0]["data"] != sums(rows):
                wrong.append((status, found))

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


def test_swapping_a_model_under_load_loses_no_request(server, bundles):
    outcomes, stop = [], threading.Event()

    def caller():
        while not stop.is_set():
            status, found = server.json("/v2/models/linear/infer", tensor([1, 2, 3]))
            outcomes.append((status, tuple(found["outputs"][0]["data"]) if status == 200 else found))

    threads = [threading.Thread(target=caller) for _ in range(4)]
    [t.start() for t in threads]
    for name in ("second", "first", "second", "first"):
        os.rename(bundles / name, bundles / "linear")
        assert server.json("/v2/repository/models/linear/load", {})[0] == 200
        os.rename(bundles / "linear", bundles / name)
    stop.set()
    [t.join() for t in threads]
    assert set(outcomes) == {(200, (4.0, 5.0)), (200, (8.0, 10.0))}


def test_what_is_unloaded_is_gone_and_can_come_back(server):
    assert server.json("/v2/repository/models/slow/unload", {})[0] == 200
    assert server.json("/v2/models/slow/ready")[0] == 404
    assert {"name": "slow", "version": "", "state": "UNAVAILABLE", "reason": "unloaded"} in server.json("/v2/repository/index", {})[1]
    assert server.json("/v2/repository/models/slow/load", {})[0] == 200
    assert server.json("/v2/models/slow/ready")[0] == 200


def test_slow_and_endless_clients_are_let_go(bundles):
    with serving(bundles / "first", "--read-timeout", "1") as server:
        begun = time.monotonic()
        assert server.talk(b"POST /predict HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc", 8).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 5
        assert server.talk(b"GET / HTTP/1.1\r\na: " + b"b" * 100_000).startswith(b"HTTP/1.1 431")
        assert server.talk(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 70 + b"\r\n").startswith(b"HTTP/1.1 431")
        assert server.talk(b"\x16\x03\x01\x02").startswith(b"HTTP/1.1 400")
        assert server.talk(b"CONNECT /metrics HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 405")
        assert server.talk(b"CONNECT other:443 HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n").startswith(b"HTTP/1.1 405")
        assert server.talk(b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_liveness_answers_while_large_requests_are_read(server):
    rows = json.dumps(tensor(*np.arange(12_000).reshape(-1, 3).tolist())).encode()
    large = b'{"more": [' + b"1," * 1_900_000 + b"1], " + rows[1:]
    threads = [threading.Thread(target=server.ask, args=("/v2/models/linear/infer", large)) for _ in range(3)]
    [t.start() for t in threads]
    for _ in range(20):
        assert server.ask("/v2/health/live")[0] == 200
    [t.join() for t in threads]


def test_overload_is_answered_with_429_and_a_time(bundles):
    with serving(bundles / "slow", "--queue", "8", "--max-batch", "2", "--max-wait", "0.05") as server:
        outcomes = []

        def caller():
            for _ in range(6):
                status, headers, body = server.ask("/v2/models/slow/infer", tensor([1, 2, 3]))
                outcomes.append((status, headers.get("retry-after")))

        threads = [threading.Thread(target=caller) for _ in range(24)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        statuses = [s for s, _ in outcomes]
        assert set(statuses) <= {200, 429} and 200 in statuses and 429 in statuses and len(outcomes) == 144
        assert all(int(wait) >= 1 for s, wait in outcomes if s == 429)


def test_a_deadline_that_passes_in_the_queue_is_504(bundles):
    with serving(bundles / "slow", "--max-batch", "1", "--max-wait", "60") as server:
        rows = [[1, 2, 3]] * 600
        busy = threading.Thread(target=server.ask, args=("/v2/models/slow/infer", tensor(*rows)))
        busy.start()
        time.sleep(0.15)
        assert server.json("/v2/models/slow/infer", tensor([1, 2, 3]), x_request_timeout="0.001")[0] == 504
        busy.join()


def test_sigterm_finishes_what_has_begun(bundles):
    def until(path: str, said) -> bool:
        end = time.monotonic() + 10
        while not (found := said(*server.ask(path)[::2])) and time.monotonic() < end:
            time.sleep(0.01)
        return found

    with serving(bundles / "slow", "--max-batch", "4", "--max-wait", "60", "--queue", "4096", "--drain", "3") as server:
        outcomes = []
        threads = [threading.Thread(target=lambda: outcomes.append(server.json("/v2/models/slow/infer", tensor(*[[1, 2, 3]] * 40))[0])) for _ in range(8)]
        [t.start() for t in threads]
        assert until("/metrics", lambda status, page: b"http_server_active_requests 9.0" in page), "eight callers, and the one who asks"
        server.process.send_signal(signal.SIGTERM)
        assert until("/v2/health/ready", lambda status, _: status == 503) and server.ask("/v2/health/live")[0] == 200
        [t.join() for t in threads]
        assert outcomes == [200] * 8 and server.process.wait(20) == 0


def test_a_killed_worker_is_replaced_and_its_callers_get_503(bundles):
    with serving(bundles / "first", "--workers", "2") as server:
        outcomes, stop = [], threading.Event()
        body = json.dumps(tensor([1, 2, 3])).encode()
        request = b"POST /v2/models/linear/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

        def caller():
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            while not stop.is_set():
                sock.sendall(request)
                said = sock.recv(65_536)
                outcomes.append(said[9:12])
                if b"connection: close" in said:
                    sock.close()
                    sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)

        time.sleep(1)
        threads = [threading.Thread(target=caller) for _ in range(8)]
        [t.start() for t in threads]
        time.sleep(0.5)
        killed = server.workers()[0]
        os.kill(killed, signal.SIGKILL)
        time.sleep(2.5)
        stop.set()
        [t.join() for t in threads]
        assert set(outcomes) <= {b"200", b"503"} and 0 < outcomes.count(b"503") <= 8
        assert len(server.workers()) == 2 and killed not in server.workers()


def test_a_supervisor_that_did_not_run_for_a_while_still_tells_every_caller_of_a_dead_worker(bundles):
    body = json.dumps(tensor([1, 2, 3])).encode()
    request = b"POST /v2/models/linear/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with serving(bundles / "first", "--workers", "2") as server:
        os.kill(server.process.pid, signal.SIGSTOP)
        callers = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(300)]  # more than the lines of two workers hold
        for sock in callers:
            sock.sendall(request)
            assert sock.recv(65_536)[9:12] in (b"200", b"503")  # one of the workers may still be loading
        os.kill(server.process.pid, signal.SIGCONT)
        time.sleep(2)
        [os.kill(worker, signal.SIGKILL) for worker in server.workers()]
        [sock.sendall(request) for sock in callers]
        assert [sock.recv(65_536)[9:12] for sock in callers] == [b"503"] * 300
        [sock.close() for sock in callers]


def test_a_server_that_is_told_to_end_while_a_worker_starts_ends_well(bundles):
    with serving(bundles / "first", "--workers", "2") as server:
        os.kill(server.workers()[0], signal.SIGKILL)
        end = time.monotonic() + 10
        while server.log.read_text().count("worker started") < 3 and time.monotonic() < end:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log.read_text()


def test_workers_load_what_one_of_them_was_told(bundles):
    with serving(bundles / "first", "--workers", "2", "--manage", "--repository", bundles) as server:
        assert server.json("/v2/repository/models/second/load", {})[0] == 200
        until = time.monotonic() + 10
        while time.monotonic() < until and {server.ask("/v2/models/second/ready")[0] for _ in range(12)} != {200}:
            time.sleep(0.2)
        assert {server.ask("/v2/models/second/ready")[0] for _ in range(12)} == {200}
        time.sleep(1.5)
        text = server.ask("/metrics")[2].decode()
        assert 'http_route="/v2/repository/models/{model_name}/load"' in text


def test_tokens_guard_all_but_health(bundles, tmp_path):
    (tmp_path / "tokens").write_text("shop:0123456789abcdef\nboss:fedcba9876543210:manage\n")
    with serving(bundles / "first", "--tokens", tmp_path / "tokens", "--manage", "--log-requests", "all") as server:
        assert server.ask("/predict", [[1, 2, 3]])[0] == 401
        assert server.ask("/predict", [[1, 2, 3]], authorization="Bearer 0123456789abcdef")[0] == 200
        assert server.ask("/v2/repository/models/linear/unload", {}, authorization="Bearer 0123456789abcdef")[0] == 403
        assert server.ask("/v2/repository/models/linear/unload", {}, authorization="Bearer fedcba9876543210")[0] == 200
        assert server.ask("/v2/health/ready")[0] == 503, "no model is left"
    assert "0123456789abcdef" not in server.log.read_text() and '"client":"shop"' in server.log.read_text()


def certified(home) -> tuple[tuple, ssl.SSLContext]:
    "What a server is to be started with, and what trusts it."
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", home / "key", "-out", home / "cert", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return ("--tls-cert", home / "cert", "--tls-key", home / "key"), ssl.create_default_context(cafile=str(home / "cert"))


def test_tls_works(bundles, tmp_path):
    words, trust = certified(tmp_path)
    with serving(bundles / "first", *words, ready=False) as server:
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"https://localhost:{server.port}/v2/health/ready", context=trust, timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("no answer over TLS")


@pytest.mark.parametrize("encrypted", [False, True])
def test_connections_that_ask_nothing_do_not_keep_a_server_from_ending(bundles, tmp_path, encrypted):
    words, trust = certified(tmp_path) if encrypted else ((), None)
    with serving(bundles / "first", *words, ready=not encrypted) as server:
        until = time.monotonic() + 60
        while '"ready"' not in server.log.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        if encrypted:
            lines = [trust.wrap_socket(line, server_hostname="localhost") for line in lines]
        lines[0].sendall(b"GET /v2/health/live HTTP/1.1\r\n\r\n")
        assert lines[0].recv(1000).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0 and time.monotonic() - begun < 20, "the time for what has begun is 30 seconds"
        [line.close() for line in lines]


def test_shadows_and_challengers_get_their_share_and_samples_are_kept(bundles, tmp_path):
    words = ("--challenger", f"{bundles / 'second'}=0.5", "--samples", tmp_path / "samples", "--sample-share", "1")
    with serving(bundles / "first", *words) as server:
        found = [server.json("/v2/models/linear/infer", tensor([1, 2, 3]))[1]["outputs"][0]["data"] for _ in range(60)]
        assert 10 < found.count([4.0, 5.0]) < 50 and found.count([8.0, 10.0]) == 60 - found.count([4.0, 5.0])
        server.json("/predict", [[1, 2, 3]])
    kept = pl.scan_parquet(tmp_path / "samples/linear/*.parquet", missing_columns="insert", extra_columns="ignore").collect()
    assert len(kept) == 61 and {"request_id", "time", "model", "version", "x", "prediction", "confidence"} <= set(kept.columns)


def test_a_shadow_sees_what_is_asked_and_nobody_sees_its_answers(bundles, tmp_path):
    with serving(bundles / "first", "--shadow", f"{bundles / 'second'}=1", "--samples", tmp_path / "samples", "--sample-share", "1") as server:
        for _ in range(20):
            assert server.json("/v2/models/linear/infer", tensor([1, 2, 3]))[1]["outputs"][0]["data"] == [4.0, 5.0]
        assert server.json("/predict", [[1, 2, 3]])[1]["predictions"][0]["prediction"] == "yes"
        roles = {m["role"]: m["version"] for m in server.json("/v2/models")[1]["models"]}
        metrics = server.ask("/metrics")[2].decode()
    kept = pl.scan_parquet(tmp_path / "samples/linear/*.parquet").collect()
    assert dict(kept.group_by("version").len().iter_rows()) == {roles["champion"]: 21, roles["shadow"]: 21}
    assert kept.filter(version=roles["shadow"])["request_id"].unique().to_list() == ["shadow"]
    assert kept.group_by("version").agg(pl.col("confidence").n_unique()).height == 2 and f'version="{roles["shadow"]}"' in metrics


def test_an_alias_is_followed_and_no_request_is_lost_on_the_way(bundles, tmp_path):
    places = {"MLKIT_REGISTRY": str(tmp_path / "registry"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    registry = Registry(tmp_path / "registry")
    versions = [registry.push(bundles / name) for name in ("first", "second")]
    registry.promote("linear", versions[0], force=True)
    with serving("registry:linear@champion", "--follow", "0.2", "--manage", environment=places) as server:
        outcomes, stop = [], threading.Event()

        def caller():
            while not stop.is_set():
                status, found = server.json("/v2/models/linear/infer", tensor([1, 2, 3]))
                outcomes.append((status, found.get("model_version"), tuple(found["outputs"][0]["data"]) if status == 200 else found))

        def until(version):
            end = time.monotonic() + 20
            while server.json("/v2/models/linear")[1]["versions"] != [str(version)]:
                assert time.monotonic() < end, "the alias is not followed"
                time.sleep(0.05)

        threads = [threading.Thread(target=caller) for _ in range(3)]
        [t.start() for t in threads]
        until(versions[0])
        registry.promote("linear", versions[1], force=True)
        until(versions[1])
        registry.rollback("linear")
        until(versions[0])
        stop.set()
        [t.join() for t in threads]
        assert set(outcomes) == {(200, str(versions[0]), (4.0, 5.0)), (200, str(versions[1]), (8.0, 10.0))}
        assert server.json("/v2/repository/models/linear/load", {"parameters": {"version": str(versions[1])}})[1]["version"] == str(versions[1])


def test_a_bundle_that_cannot_be_proved_takes_nothing_over(bundles, tmp_path):
    shutil.copytree(bundles / "first", tmp_path / "linear")
    with serving(tmp_path / "linear", "--manage", "--repository", tmp_path) as server:
        (tmp_path / "linear/model.onnx").write_bytes(b"nonsense")
        status, found = server.json("/v2/repository/models/linear/load", {})
        assert status == 400 and "model.onnx" in found["error"]
        assert server.json("/v2/models/linear/infer", tensor([1, 2, 3]))[1]["outputs"][0]["data"] == [4.0, 5.0]
        assert server.ask("/v2/health/ready")[0] == 200


def test_requests_that_cannot_be_served_end_the_command_well(tmp_path):
    command = ["-m", "mlkit", "serve", str(tmp_path / "none"), "--port", "0"]
    for more in ((), ("--workers", "2")):
        done = subprocess.run([sys.executable, *command, *more], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "There is no bundle" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (("--shadow", "{slow}=1"), 'is a version of "slow", which is not served'),
        (("--challenger", "{first}=0.5"), "is the champion itself"),
        (("{second}",), 'first and {second} are both called "linear"'),
        (("{second}", "--workers", "2"), 'first and {second} are both called "linear"'),
        (("--shadow", "{stranger}=1"), "has other outputs than the champion"),
        (("--sample-share", "7"), "a share from 0 to 1"),
        (("--tls-cert", "{first}"), "both --tls-cert and --tls-key"),
        (("--tokens", "{first}/nothing"), "cannot be read"),
    ],
)
def test_what_cannot_be_served_as_asked_is_refused_before_it_is_ready(bundles, tmp_path, words, said):
    places = {name: bundles / name for name in ("slow", "first", "second")} | {"stranger": slow_bundle(tmp_path / "stranger", side=2, name="linear")}
    done = subprocess.run([sys.executable, "-m", "mlkit", "serve", bundles / "first", *(w.format(**places) for w in words), "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said.format(**places) in done.stderr and "Traceback" not in done.stderr


def test_strings_in_binary_are_taken_and_told_apart(server):
    header = json.dumps({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 7}}]}).encode()
    status, _, said = server.ask("/v2/models/linear/infer", header + pack([b"abc"]), inference_header_content_length=str(len(header)))
    assert status == 400 and b"x" in said
