"Every notebook runs from top to bottom, without a network; the stages of pipelines run as pipelines."

import os
import subprocess
import sys
from pathlib import Path

import pytest
from makers import last_manifest, mlkit
from warm import run_notebook

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if "pipelines" not in p.parts and ".ipynb_checkpoints" not in p.parts)
on_torch = {"nlp", "optimize", "timeseries", "train", "vision"}
pipelines = sorted(p.parent for p in (root / "nbs" / "pipelines").glob("*/pipeline.yaml"))


@pytest.mark.parametrize("notebook", notebooks, ids=lambda p: str(p.relative_to(root / "nbs")))
def test_a_notebook_runs(notebook, tmp_path):
    environment = {**os.environ, "MLKIT_STORE": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    if notebook.parent.name in on_torch:
        code, said = run_notebook(notebook, root, tmp_path / "said", environment), (tmp_path / "said").read_text()
        assert code == 0 and "Success" in said, f"exit code {code}\n{said[-8000:]}"
        return
    done = subprocess.run([str(Path(sys.executable).with_name("nbdev-test")), str(notebook), "--n-workers", "0"], cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("pipeline", pipelines, ids=lambda p: p.name)
def test_a_pipeline_runs_and_then_has_nothing_to_do(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLKIT_DATA", raising=False)
    mlkit("run", pipeline.name, "--profile", "smoke", timeout=600)
    assert {job["state"] for job in last_manifest(tmp_path / ".mlkit")["jobs"].values()} == {"done"}
    mlkit("run", pipeline.name, "--profile", "smoke")
    assert {job["state"] for job in last_manifest(tmp_path / ".mlkit")["jobs"].values()} == {"cached"}
