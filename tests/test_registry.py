"Versions never change, aliases move by consent, and whoever writes at once loses nothing."

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import buckets
import numpy as np
import polars as pl
import pytest
from makers import mlkit
from onnx import TensorProto, helper, numpy_helper

from mlkit.bundle import Bundle, BundleError, Gates, Manifest, Registry, Tensor, make_keys, package, resolve, sign, verify
from mlkit.bundle.ledger import append, entries
from mlkit.core.digest import bytes_digest
from mlkit.core.errors import MLKitError

FRAME = pl.DataFrame({"x": [1.0, 2.0, 3.0]})
DATA = {"data": {"table": "d1"}}


def line(place, slope=2.0, column="x", **changes):
    "Package a model that multiplies by `slope`; return its folder."
    x, value = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 1]) for n in (column, "value"))
    node, weight = helper.make_node("Mul", [column, "slope"], ["value"]), numpy_helper.from_array(np.float32([slope]), "slope")
    model = helper.make_model(helper.make_graph([node], "line", [x], [value], [weight]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    signature = (Tensor(column, "float32", ("batch", 1)),), (Tensor("value", "float32", ("batch", 1)),)
    settings = {"metrics": {"mae": 0.3}, "provenance": DATA} | changes
    said = Manifest("line", "regression", *signature, {column: {"kind": "numeric", "shape": [1]}}, **settings)
    return package(place, model.SerializeToString(), said, FRAME.rename({"x": column})).folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def s3():
    with buckets.s3("models"):
        yield "s3://models/team"


@pytest.fixture(scope="module")
def azure(tmp_path_factory):
    with buckets.azure("models", tmp_path_factory.mktemp("azurite")):
        yield "az://models/team"


@pytest.fixture(params=["folder", "s3", "azure"])
def where(request, tmp_path):
    "A registry in each kind of place."
    if request.param == "folder":
        return str(tmp_path / "registry")
    return f"{request.getfixturevalue(request.param)}/{tmp_path.name}"


def act(where: str, folders: list[str], seed: int, actions: int) -> list[tuple]:
    "Push and promote at random; return what this process was told."
    registry, told, rng = Registry(where), [], np.random.default_rng(seed)
    for _ in range(actions):
        if rng.random() < 0.5:
            told.append(("push", registry.push(folders[rng.integers(len(folders))], note=f"by {seed}")))
        else:
            version = int(rng.choice(list(registry.state("line").versions)))
            promotion = registry.promote("line", version, alias=f"alias-{rng.integers(3)}", force=True)
            told.append(("promote", promotion.alias, promotion.version, promotion.was))
    return told


def test_hundreds_of_writers_lose_nothing(where, tmp_path):
    processes, each = 4, 52
    registry = Registry(where)
    folders = [str(line(tmp_path / f"bundle-{i}", slope=float(i + 1))) for i in range(12)]
    registry.push(folders[0])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        told = [t for answers in pool.map(act, [where] * processes, [folders] * processes, range(processes), [each] * processes) for t in answers]
    state = registry.state("line")
    assert sorted(state.versions) == list(range(1, len(state.versions) + 1)) and len(state.versions) <= 12
    assert len({json.dumps(e["files"]) for e in state.versions.values()}) == len(state.versions), "the same bundle has two versions"
    assert {v for what, v, *_ in told if what == "push"} <= set(state.versions)
    wanted = Counter(t[1:] for t in told if t[0] == "promote" and t[2] != t[3])
    assert Counter((e["alias"], e["version"], e["was"]) for e in state.entries if e["what"] == "promote") == wanted
    for alias in state.aliases:  # each promotion saw what the one before had left: compare-and-swap
        moves = [e for e in state.entries if e.get("alias") == alias]
        assert [e["was"] for e in moves] == [None, *(e["version"] for e in moves[:-1])]
    assert Bundle.load(registry.pull("line", "alias-0")).manifest.name == "line"


def test_a_version_is_the_same_bytes_wherever_it_is_pulled(where, tmp_path):
    registry, made = Registry(where), line(tmp_path / "made")
    sign(made, make_keys(tmp_path / "keys")[0])
    registry.push(made)
    pulled = registry.pull("line", 1, tmp_path / "pulled")
    assert {p.name: p.read_bytes() for p in pulled.iterdir()} == {p.name: p.read_bytes() for p in made.iterdir()}
    verify(pulled, tmp_path / "keys/public.pem")


def test_the_gates_keep_out_what_is_worse_or_different(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.push(line(tmp_path / "a"))
    assert registry.promote("line").passed
    worse = registry.push(line(tmp_path / "worse", 2.1, metrics={"mae": 0.31}))
    other_data = registry.push(line(tmp_path / "data", 2.2, provenance={"data": {"table": "d2"}}))
    other_column = registry.push(line(tmp_path / "column", 2.3, column="y"))
    better = registry.push(line(tmp_path / "better", 2.4, metrics={"mae": 0.29}))
    refused = {v: registry.promote("line", v) for v in (worse, other_data, other_column)}
    assert not any(p.passed for p in refused.values()) and registry.state("line").top("champion") == 1
    assert "0.31" in str(refused[worse]) and "other data" in str(refused[other_data]) and 'column "y"' in str(refused[other_column])
    assert registry.promote("line", worse, gates=Gates(max_drop=0.02)).passed and registry.promote("line", better).passed
    assert [e["what"] for e in registry.state("line").entries].count("refuse") == 3


def test_a_bundle_that_answers_otherwise_is_not_promoted(tmp_path):
    registry, good, bad = Registry(tmp_path / "registry"), line(tmp_path / "a"), line(tmp_path / "b", 3.0)
    said = json.loads((good / "bundle.json").read_text())
    said["files"]["model.onnx"] = json.loads((bad / "bundle.json").read_text())["files"]["model.onnx"]
    shutil.copy(bad / "model.onnx", good / "model.onnx")
    (good / "bundle.json").write_text(json.dumps(said))
    registry.push(good)
    refusal = registry.promote("line")
    assert not refusal.passed and "golden" in str(refusal) and "champion" not in registry.state("line").aliases


def test_only_what_is_signed_passes_where_a_key_is_asked_for(tmp_path):
    registry, (private, public) = Registry(tmp_path / "registry"), make_keys(tmp_path / "keys")
    registry.push(line(tmp_path / "a"))
    assert "not signed" in str(registry.promote("line", gates=Gates(key=public)))
    for key in (private, tmp_path, tmp_path / "none.pem"):
        with pytest.raises(BundleError, match="cannot be used as a public key"):
            verify(tmp_path / "a", key)
    with pytest.raises(BundleError, match="There is no public key"):
        Gates(key=tmp_path / "none.pem")
    sign(tmp_path / "a", private)
    assert registry.push(tmp_path / "a") == 2 and registry.promote("line", gates=Gates(key=public)).passed


def test_other_tools_verify_the_signature(tmp_path):
    private, public = make_keys(tmp_path / "keys")
    signature = sign(line(tmp_path / "a"), private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signature, "--public_key", public, tmp_path / "a"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (tmp_path / "a/model.onnx").write_bytes(b"other")
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_a_push_that_dies_leaves_nothing_to_see(tmp_path, monkeypatch):
    registry, made = Registry(tmp_path / "registry"), line(tmp_path / "a")
    add, calls = registry.place.add, []

    def dying(name, content):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(name, content)

    monkeypatch.setattr(registry.place, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        registry.push(made)
    assert Registry(tmp_path / "registry").names() == []
    assert Registry(tmp_path / "registry").push(made) == 1


def test_a_request_that_was_repeated_recognises_its_own_entry(tmp_path, monkeypatch):
    place = Registry(tmp_path).place
    add = place.add
    monkeypatch.setattr(place, "add", lambda name, content: add(name, content) and False)  # the answer is lost, the repetition finds the name taken
    assert append(place, "models/m", lambda log: {"what": "push", "version": len(log) + 1})["version"] == 1
    assert len(entries(place, "models/m")) == 1


def test_a_damaged_object_is_never_handed_out(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.push(line(tmp_path / "a"))
    for file in (tmp_path / "registry/objects").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with pytest.raises(BundleError, match="damaged"):
        registry.pull("line", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_in_a_registry_cannot_write_outside_of_the_bundle(tmp_path):
    registry, made = Registry(tmp_path / "registry"), line(tmp_path / "a")
    registry.push(made)
    evil = (made / "bundle.json").read_bytes().replace(b'"model.onnx": {', b'"../../escaped": {')
    digest = bytes_digest(evil)
    registry.place.add(f"objects/{digest[:2]}/{digest}", evil)
    push = {"what": "push", "version": 2, "files": {"bundle.json": digest}, "size": 1, "task": "regression", "metrics": {}, "by": "a stranger"}
    append(registry.place, "models/line", lambda log: push)
    with pytest.raises(BundleError, match="not a plain name"):
        registry.pull("line", 2, tmp_path / "below/out")
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path / "below").exists()


def test_a_version_that_another_process_brings_at_the_same_moment_is_taken(tmp_path, monkeypatch):
    registry, rename, waiting = Registry(tmp_path / "registry"), os.replace, [True]
    registry.push(line(tmp_path / "a"))

    def late(source, target):
        if waiting and Path(source).name.startswith(".line-"):
            waiting.clear()
            Registry(tmp_path / "registry").pull("line")
        rename(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert Bundle.load(registry.pull("line")).manifest.name == "line" and not waiting


def test_pulling_never_replaces_what_is_no_bundle(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.push(line(tmp_path / "a"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for way in (tmp_path / "mine", tmp_path / "nowhere/../mine"):
        with pytest.raises(BundleError, match="is no bundle"):
            registry.pull("line", 1, way)
        assert (tmp_path / "mine/notes.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "7", "x" * 101, "a b"])
def test_names_stay_inside_the_registry(tmp_path, name):
    registry, made = Registry(tmp_path / "registry"), line(tmp_path / "a")
    if name:
        with pytest.raises(BundleError, match="cannot be the name"):
            registry.push(made, name)
    with pytest.raises(BundleError, match="There is no model"):
        registry.state(name)


def test_a_bucket_that_is_not_there_is_told(s3):
    with pytest.raises(MLKitError, match="cannot be reached"):
        Registry("s3://nobody/x")


def test_the_command_line_from_push_to_rollback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLKIT_REGISTRY", str(tmp_path / "registry"))
    line(tmp_path / "a")
    line(tmp_path / "b", 3.0, metrics={"mae": 0.9})
    pl.DataFrame({"x": [1.0, 2.0], "label": [3.0, 6.0]}).write_parquet("test.parquet")
    mlkit("bundle", "keys", "keys")
    mlkit("bundle", "sign", "a", "--key", "keys/private.pem")
    assert "signed by" in mlkit("bundle", "check", "a", "--key", "keys/public.pem").stdout
    assert "version 1" in mlkit("registry", "push", "a", "--note", "first").stdout
    mlkit("registry", "promote", "line", "--key", "keys/public.pem")
    assert "version 2" in mlkit("registry", "push", "b").stdout
    assert "mae 0.9, was 0.3" in mlkit("registry", "promote", "line", check=1).stdout
    assert "champion is version 2" in mlkit("registry", "promote", "line", "--data", "test.parquet").stdout
    assert Bundle.load(resolve("registry:line")).predict(FRAME)["prediction"][0] == 3.0
    assert "champion is version 1" in mlkit("registry", "rollback", "line", "--note", "alarms").stdout
    assert "champion 1" in mlkit("registry", "list").stdout
    shown = mlkit("registry", "show", "line", "--log").stdout
    assert "alarms" in shown and "refuse" in shown and "first" in shown
    mlkit("registry", "pull", "line", "here")
    assert "mae" in mlkit("bundle", "card", "here").stdout
    (tmp_path / "here/model.onnx").write_bytes(b"damaged")
    assert "is damaged" in mlkit("bundle", "check", "here", check=1).stderr
    assert 'no model "lime"' in mlkit("registry", "promote", "lime", check=2).stderr
    assert "There is no bundle" in mlkit("bundle", "check", "nowhere", check=2).stderr
    assert "nothing to go back to" in mlkit("registry", "rollback", "line", check=2).stderr
    assert "two slashes" in mlkit("registry", "push", "a", "--registry", "s3:/models", check=2).stderr
    assert "max_drop is a number" in mlkit("registry", "promote", "line@2", "--max-drop", "nan", check=2).stderr
    for words in (("bundle", "keys", "test.parquet/below"), ("bundle", "mlflow", "a", "test.parquet/below"), ("registry", "pull", "line", "test.parquet/below"), ("registry", "push", "a", "--registry", "test.parquet")):
        assert "Not a directory" in mlkit(*words, check=2).stderr


def test_mlflow_reads_what_is_exported_for_it(tmp_path):
    pyfunc = pytest.importorskip("mlflow.pyfunc", reason="mlflow is not installed: pip install mlflow-skinny")
    mlkit("bundle", "mlflow", line(tmp_path / "a"), tmp_path / "exported")
    model = pyfunc.load_model(str(tmp_path / "exported"))
    assert model.predict(FRAME.to_dict(as_series=False))["prediction"].to_list() == [2.0, 4.0, 6.0]
    assert model.metadata.get_input_schema().input_names() == ["x"]
    assert pyfunc.mlflow.onnx.load_model(str(tmp_path / "exported")).graph.input[0].name == "x"
    assert "has no MLmodel" in mlkit("bundle", "mlflow", tmp_path / "a", tmp_path / "a", check=2).stderr
