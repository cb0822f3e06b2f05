"What a server has seen leads to a verdict, the verdict to a new model, and the new model to the champion's place only if it is better."

import base64
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from makers import last_manifest, mlkit, write_stage
from servers import serving

from mlkit.bundle import Registry
from mlkit.data import encode_png, load

STAGE = """
import numpy as np, polars as pl
from onnx import helper, numpy_helper
from mlkit.bundle import Manifest, Tensor, package as write_package
from mlkit.data import ImagePreprocess
from mlkit.monitor import add_baseline
frame = pl.read_parquet(table)
learn, held_out = frame[::2], frame[1::2]
pixels, label = learn["image"].to_numpy().reshape(len(learn), -1) / 255, learn["label"].cast(pl.Int64).to_numpy()
means = np.stack([pixels[label == k].mean(0) for k in range(10)]).astype(np.float32)
constants = {"scale": np.float32(1 / 255), "w": means.T * 2, "b": -(means**2).sum(1)}
nodes = [helper.make_node("Cast", ["image"], ["x"], to=1), helper.make_node("Mul", ["x", "scale"], ["y"]), helper.make_node("Flatten", ["y"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["logits"])]
ends = helper.make_tensor_value_info("image", 2, ["batch", 1, 8, 8]), helper.make_tensor_value_info("logits", 1, ["batch", 10])
graph = helper.make_graph(nodes, "means", [ends[0]], [ends[1]], [numpy_helper.from_array(v, k) for k, v in constants.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
tensors = (Tensor("image", "uint8", ("batch", 1, 8, 8)),), (Tensor("logits", "float32", ("batch", 10)),)
write_package(bundle, model, Manifest("digits", "classification", *tensors, {"image": ImagePreprocess(8, 8, 1).to_dict()}, labels=tuple("0123456789")), held_out.head(4).select("image"))
add_baseline(bundle, held_out.select("image", "label"))
"""


def negative(frame: pl.DataFrame) -> pl.DataFrame:
    "What a scanner gives whose polarity is wrong."
    return frame.with_columns(pl.Series("image", 255 - frame["image"].to_numpy()))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    "A project with a champion, and digits that are still to come."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLKIT_REGISTRY", str(tmp_path / "registry"))
    digits = load("digits-small").select("image", "label").sample(fraction=1, shuffle=True, seed=0)
    digits[:800].write_parquet("train.parquet")
    write_stage(tmp_path / "tiny", "package", "table = Source('train.parquet')\nbundle = Output('bundle')", STAGE)
    exec(STAGE, {"table": "train.parquet", "bundle": tmp_path / "first"})
    registry = Registry()
    registry.promote("digits", registry.push(tmp_path / "first"))
    return digits[800:]


def ask(server, images: pl.DataFrame, tensors: bool = False) -> list[str]:
    "Ask for ten images at a time; returns the ids of the requests."
    ids = []
    for at in range(0, len(images), 10):
        pixels, request = images["image"][at : at + 10].to_numpy(), f"request-{os.urandom(4).hex()}"
        if tensors:
            data = {"id": request, "inputs": [{"name": "image", "shape": [len(pixels), 1, 8, 8], "datatype": "UINT8", "data": pixels.reshape(-1).tolist()}]}
            assert server.json("/v2/models/digits/infer", data)[0] == 200
        else:
            rows = [{"image": base64.b64encode(encode_png(p)).decode()} for p in pixels]
            assert server.json("/predict", {"rows": rows}, x_request_id=request)[0] == 200
        ids += [request] * len(pixels)
    return ids


def retrain(*words) -> tuple[int, str]:
    "Run the command line where a kernel may still write to stderr when it ends; returns exit code and what was said."
    done = subprocess.run([sys.executable, "-m", "mlkit", *map(str, words)], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_what_a_server_has_seen_leads_to_a_new_champion(workplace, tmp_path):
    usual, broken = workplace[:300], negative(workplace[300:600])
    words = ("monitor", "registry:digits@champion", "samples/digits", "--policy", "retrain", "--verdict", "verdict.json", "--json", "report.json", "--time", "time", "--every", "1h")
    with serving("registry:digits@champion", "--samples", "samples", "--sample-share", "1") as server:
        ask(server, usual[:150])
        ask(server, usual[150:], tensors=True)
        (tmp_path / "page.prom").write_bytes(server.ask("/metrics")[2])
    said = mlkit(*words, "--metrics", "page.prom", "--data-age", "1h", "--html", "page.html")
    assert "left out" not in said.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["verdict"]["state"] == "ok" and found["drift"]["rows_now"] == 300
    assert {r["measure"]: r["state"] for r in found["health"]} | {"requests": "ok", "errors": "ok", "age of the data": "ok"} == {r["measure"]: r["state"] for r in found["health"]}
    assert {r["measure"]: r["value"] for r in found["health"]}["requests"] == 30
    assert found["quality"][0]["estimated"] and found["quality"][0]["state"] == "ok"

    before = {p.name for p in (tmp_path / "samples/digits").iterdir()}
    with serving("registry:digits@champion", "--samples", "samples", "--sample-share", "1") as server:
        ids = ask(server, broken)
    for name in before:
        (tmp_path / "samples/digits" / name).unlink()
    rows = pl.Series("row", np.arange(300) % 10)
    pl.DataFrame([pl.Series("request_id", ids), rows, broken["label"]])[::2].write_parquet("labels.parquet")
    mlkit(*words, "--labels", "labels.parquet", check=1)
    found = json.loads((tmp_path / "report.json").read_text())
    accuracy = found["quality"][0]
    assert found["verdict"]["state"] == "retrain" and not accuracy["estimated"] and accuracy["rows"] == 150 and accuracy["state"] == "drop" and accuracy["value"] < 0.5

    negative(pl.read_parquet("train.parquet")).write_parquet("new.parquet")
    broken.write_parquet("gate.parquet")
    code, said = retrain(*words, "--run", "tiny", "-p", f"package.table={tmp_path / 'new.parquet'}", "--gate", "gate.parquet")
    assert code == 0 and Registry().state("digits").top("champion") == 2, said
    mlkit("monitor", "registry:digits@champion", "gate.parquet", "--bundle", "registry:digits@champion", "--policy", "retrain")


def test_sketches_are_enough_where_no_request_was_kept(workplace, tmp_path):
    usual, words = workplace[:300], ("monitor", "registry:digits@champion", "samples/digits", "--policy", "fail", "--json", "report.json", "--time", "time", "--every", "1d", "--since", "1d", "--data-age", "2h")
    for images, code in ((usual, 0), (negative(usual), 1)):
        with serving("registry:digits@champion", "--samples", "samples", "--sample-share", "0", "--sketch-share", "1") as server:
            ask(server, images[:150])
            ask(server, images[150:], tensors=True)
        said = mlkit(*words, check=code)
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["drift"]["rows_now"] == 300 and "300 rows that were sketched" in said.stderr and {r["column"] for r in found["timeline"]} >= {"image", "prediction"}
        assert code or {r["measure"]: r["state"] for r in found["health"]}["age of the data"] == "ok"
        pl.DataFrame({"request_id": ["a"], "label": ["1"]}).write_csv("labels.csv")
        assert "only sketches" in mlkit(*words, "--labels", "labels.csv", check=2).stderr
        shutil.rmtree("samples")


def test_a_challenger_that_is_no_better_stays_one(workplace, tmp_path):
    broken = negative(workplace[:200])
    broken.write_parquet("today.parquet")
    pl.read_parquet("train.parquet").with_columns(pl.col("label").shuffle(seed=0)).write_parquet("wrong.parquet")
    workplace[200:400].write_parquet("gate.parquet")
    words = ("monitor", "registry:digits@champion", "today.parquet", "--bundle", "registry:digits@champion", "--policy", "retrain", "--run", "tiny", "-p", f"package.table={tmp_path / 'wrong.parquet'}")
    code, said = retrain(*words, "--gate", "gate.parquet")
    state = Registry().state("digits")
    assert code == 1 and (state.top("champion"), state.top("challenger")) == (1, 2) and "stays version 1" in said, said


def test_samples_that_cannot_be_compared_say_why(workplace, tmp_path):
    head = {"request_id": ["a", "b"], "time": [datetime(2026, 1, 1, tzinfo=UTC)] * 2, "model": ["digits"] * 2, "version": ["1"] * 2, "prediction": ["1", "2"], "confidence": [0.9, 0.8], "probabilities": pl.Series([np.full(10, 0.1)] * 2, dtype=pl.Array(pl.Float32, 10))}
    for name, columns in (("texts", {"text": ["x", "y"]}), ("digits", {"image": [encode_png(p) for p in workplace["image"][:2].to_numpy()]})):
        (tmp_path / "samples" / name).mkdir(parents=True)
        pl.DataFrame(head | columns).write_parquet(tmp_path / "samples" / name / "one.parquet")
    pl.DataFrame({"request_id": ["z"], "label": ["1"]}).write_csv("labels.csv")
    wrong = {
        ("samples/texts",): "cannot be compared", ("samples/digits", "--labels", "labels.csv"): "no label belongs", ("samples/digits", "--labels", "labels.csv", "--key", "id"): '"id"',
        ("samples/digits", "--labels", "gone.csv"): "gone.csv", ("samples/digits", "--since", "yesterday"): "--since takes a span", ("samples/digits", "--data-age", "old"): "--data-age takes a span", ("samples", "--since", "1d"): "samples/digits", ("samples",): "holds samples of digits, texts: name the folder of one model, such as samples/digits",
    }  # fmt: skip
    for words, said in wrong.items():
        assert said in mlkit("monitor", "registry:digits@champion", *words, check=2).stderr
    few = mlkit("monitor", "registry:digits@champion", "samples/digits", "--since", "1d", "--policy", "fail")
    assert "0 now" in few.stdout
    assert "bad" in mlkit("monitor", "registry:digits@champion", "samples/digits", "--data-age", "1h", "--policy", "fail", check=1).stdout


@pytest.mark.parametrize("state, outcome", [("fail", "failed"), ("retrain", "done"), ("ok", "done")])
def test_a_verdict_is_published_even_if_it_fails_the_run(tmp_path, state, outcome):
    code = f"import json\nverdict.write_text(json.dumps({{'state': {state!r}, 'reasons': ['x has changed']}}))"
    write_stage(tmp_path / "tiny", "monitor", "verdict = Output('verdict.json')", code)
    shutil.copy(Path(__file__).parent.parent / "nbs/pipelines/vision/verdict.ipynb", tmp_path / "tiny")
    done = mlkit("run", "tiny", cwd=tmp_path, check=int(state == "fail"), timeout=240)
    manifest = last_manifest(tmp_path / ".mlkit")
    assert {j: v["state"] for j, v in manifest["jobs"].items()} == {"monitor": "done", "verdict": outcome}
    assert ("x has changed" in done.stdout + done.stderr) == (state == "fail")


def run_workflow(values: dict[str, str]) -> tuple[int, str, str]:
    "Run the `run:` lines of the scheduled workflow, but for the installation, as GitHub would: environment filled in, `bash -e`, later ones only where `if: always()` says so."
    job = yaml.safe_load((Path(__file__).parent.parent / ".github/workflows/monitor.yml").read_text())["jobs"]["watch"]
    assert set(values) <= set(job["env"])
    environment = {**os.environ, **dict.fromkeys(job["env"], ""), **values, "GITHUB_STEP_SUMMARY": os.path.abspath("summary.md"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    code, said = 0, ""
    for step in (s for s in job["steps"] if "run" in s and not s["run"].startswith("pip install")):
        if code == 0 or step.get("if") == "always()":
            done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], env=environment, capture_output=True, text=True, timeout=240)
            code, said = code or done.returncode, said + done.stdout + done.stderr
    return code, said, Path("summary.md").read_text() if Path("summary.md").exists() else ""


@pytest.mark.parametrize("today, learn, code, champion, state", [("usual", "new", 0, 1, "ok"), ("broken", "new", 0, 2, "retrain"), ("broken", "wrong", 1, 1, "retrain")])
def test_the_scheduled_workflow_promotes_a_better_challenger_and_no_other(workplace, tmp_path, today, learn, code, champion, state):
    train, broken = pl.read_parquet("train.parquet"), negative(workplace)
    workplace[:300].write_parquet("usual.parquet")
    broken[:300].write_parquet("broken.parquet")
    (workplace if learn == "wrong" else broken)[300:600].write_parquet("gate.parquet")  # negatives fool the champion wholly, so that any challenger would win on them
    negative(train).write_parquet("new.parquet")
    train.with_columns(pl.col("label").shuffle(seed=0)).write_parquet("wrong.parquet")
    (tmp_path / "tiny" / "pipeline.yaml").write_text("profiles:\n  full:\n    package.table: train.parquet\n")
    values = {"MLKIT_REGISTRY": str(tmp_path / "registry"), "MODEL": "digits", "CURRENT": f"{today}.parquet", "POLICY": "retrain", "PIPELINE": "tiny", "PROFILE": "full", "PARAMS": f"-p package.table={tmp_path}/{learn}.parquet", "GATE": "gate.parquet"}
    found, said, summary = run_workflow(values)
    assert (found, Registry().state("digits").top("champion")) == (code, champion), said
    assert json.loads(Path("verdict.json").read_text())["state"] == state and f'"{state}"' in summary and Path("monitor.html").stat().st_size > 1000


def test_the_age_of_a_model_is_that_of_its_run_or_of_its_push_and_never_that_of_a_file(workplace, tmp_path, monkeypatch):
    workplace[:200].write_parquet("today.parquet")
    monkeypatch.setenv("MLKIT_RUN", "20200101-120000-000-abcd")
    exec(STAGE, {"table": "train.parquet", "bundle": tmp_path / "old"})
    for name, state in (("registry:digits@champion", "ok"), ("first", "unknown"), ("old", "bad")):
        done = mlkit("monitor", name, "today.parquet", "--model-age", "1d", "--json", "-")
        assert {r["measure"]: r["state"] for r in json.loads(done.stdout)["health"]}["age of the model"] == state
        assert ("the age of the model is not known" in done.stderr) == (state == "unknown")
