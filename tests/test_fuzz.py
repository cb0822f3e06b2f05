"Whatever is sent, the answer is the right one or says what was wrong, and never that the server made a mistake."

import http.client
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import linear_bundle, serving

from mlkit.serve.protocol import DATATYPES, Limits, ServeError, decompress, pack, read_json, read_request, write_binary

SCHEMATHESIS = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}")
CHECKS = "status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,negative_data_rejection,unsupported_method"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    linear_bundle(home / "linear")
    with serving(home / "linear", "--manage", "--repository", home) as running:
        yield running  # `serving` fails if the log holds a traceback or a 500


@pytest.mark.skipif(not SCHEMATHESIS, reason="there is no schemathesis here: pip install schemathesis")
def test_the_server_does_what_its_openapi_document_says(server):
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    words = ("--exclude-path-regex", r"unload$|^/(livez|healthz|readyz|ping|swagger.json|predict)$", "-n", "6", "--phases", "examples,coverage,fuzzing", "-c", CHECKS, "--seed", "0", "--no-shrink", "--continue-on-failure", "--warnings", "off")
    done = subprocess.run([SCHEMATHESIS, "run", url, *words], capture_output=True, text=True, cwd=server.log.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert server.ask("/v2/health/live")[0] == 200


def arrays():
    "Arrays of every datatype, with their name in the protocol."
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)

    def of(pair):
        name, shape = pair
        count = int(np.prod(shape, dtype=int))
        if name == "BYTES":
            return st.lists(st.binary(max_size=9), min_size=count, max_size=count).map(lambda found: (name, shape, pack(found), found))
        size = np.dtype(DATATYPES[name]).itemsize
        values = st.binary(min_size=count * size, max_size=count * size)
        values = values.map(lambda raw: bytes(b & 1 for b in raw)) if name == "BOOL" else values
        return values.map(lambda raw: (name, shape, raw, None))

    return st.tuples(st.sampled_from(list(DATATYPES)), shapes).flatmap(of)


@given(st.lists(arrays(), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_binary_tensors_are_read_as_they_were_written(found):
    entries = [{"name": str(i), "datatype": name, "shape": list(shape), "parameters": {"binary_data_size": len(raw)}} for i, (name, shape, raw, _) in enumerate(found)]
    header = json.dumps({"inputs": entries}).encode()
    read = read_request(header + b"".join(raw for _, _, raw, _ in found), len(header), Limits(nonfinite=True)).inputs
    for i, (name, shape, raw, strings) in enumerate(found):
        values = read[str(i)]
        assert values.shape == shape and (values.ravel().tolist() == strings if name == "BYTES" else values.dtype == DATATYPES[name] and values.tobytes() == raw)
    body, length = write_binary({"model_name": "m"}, read, True)
    again = {e["name"]: e["parameters"]["binary_data_size"] for e in json.loads(body[:length])["outputs"]}
    assert list(again.values()) == [len(raw) for _, _, raw, _ in found] and body[length:] == b"".join(raw for _, _, raw, _ in found)


json_values = st.recursive(st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(list(DATATYPES)), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size", "inputs", "outputs", "id", "x"]), inner, max_size=5), max_leaves=12)  # fmt: skip


def tensors():
    "Entries that are nearly right."
    sizes = st.integers(-1, 40) | st.just(2**63)
    return st.fixed_dictionaries(
        {"name": st.sampled_from(["x", "y"]) | json_values, "datatype": st.sampled_from(list(DATATYPES)) | json_values, "shape": st.lists(st.integers(-1, 4) | st.just(2**62), max_size=4) | json_values},
        optional={"data": st.lists(st.integers(-300, 300) | st.floats() | st.text(max_size=2) | st.booleans(), max_size=9) | json_values, "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": sizes | json_values}) | json_values},
    )


@given(st.fixed_dictionaries({"inputs": st.lists(tensors(), max_size=3) | json_values}, optional={"outputs": st.lists(tensors(), max_size=2) | json_values, "parameters": json_values, "id": json_values}) | json_values, st.binary(max_size=40), st.integers(-2, 2) | st.none(), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
@example({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 4}}]}, b"\xff\xff\xff\xff", 0, 0)
@example({"inputs": [{"name": "x", "datatype": "FP16", "shape": [1], "data": [1e300]}]}, b"", None, 0)
@example({"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [2**63]}]}, b"", None, 0)
def test_a_malformed_request_is_the_callers_mistake(content, raw, off, cut):
    header = json.dumps(content).encode()
    body = (header + raw)[: -cut or None] if cut < 40 else header + raw
    try:
        found = read_request(body, None if off is None else len(header) + off)
    except ServeError as error:
        assert 400 <= error.status < 500
    else:
        assert all(isinstance(v, np.ndarray) for v in found.inputs.values())


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:1e-+.\\u0 ', max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_json_or_refused(data):
    for call in (lambda: read_json(data), lambda: decompress(data, "gzip", 1000)):
        try:
            call()
        except ServeError as error:
            assert error.status in (400, 413)


KINDS = ("application/json", "text/csv", "application/vnd.apache.arrow.stream", "application/x-npy", "image/png", "text/plain", "application/octet-stream")
PATHS = ("/predict", "/predict/linear", "/v2/models/linear/infer", "/invocations", "/score", "/vertex/predict", "/v2/repository/index", "/v2/models/%00/infer", "/predict/..%2f..")
BODIES = (b"1,2,3\n", b'[{"x": [1, 2, 3]}]', b'{"instances": [[1, 2, 3]]}', b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }" + b" " * 61 + b"\n" + bytes(12))


@given(
    st.sampled_from(PATHS), st.sampled_from(KINDS), json_values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=80) | st.sampled_from(BODIES),
    st.dictionaries(st.sampled_from(["Content-Encoding", "Accept", "Inference-Header-Content-Length", "X-Request-Timeout", "X-Request-Id", "Authorization", "X-Amzn-SageMaker-Target-Model"]), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12) | st.sampled_from(["gzip", "text/csv", "1", "nan", "linear"]), max_size=2),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_body_and_no_header_is_a_500(server, path, kind, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, body, {"Content-Type": kind} | headers)
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    assert answer.status < 500 or answer.status == 504 and "X-Request-Timeout" in headers
    assert answer.status == 200 or json.loads(said)["error"]
