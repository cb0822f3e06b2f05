"Every notebook runs from top to bottom, without a network; the stages of pipelines run as pipelines."

import os
from pathlib import Path

import pytest
from makers import last_manifest, mlkit
from warm import run_notebook

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if "pipelines" not in p.parts and ".ipynb_checkpoints" not in p.parts)
pipelines = sorted(p.parent for p in (root / "nbs" / "pipelines").glob("*/pipeline.yaml") if p.parent.name != "vision")  # that one is run by the installed wheel


@pytest.mark.parametrize("notebook", notebooks, ids=lambda p: str(p.relative_to(root / "nbs")))
def test_a_notebook_runs(notebook, tmp_path):
    environment = {**os.environ, "MLKIT_STORE": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    code, said = run_notebook(notebook, root, tmp_path / "said", environment), (tmp_path / "said").read_text()
    assert code == 0 and "Success" in said, f"exit code {code}\n{said[-8000:]}"


@pytest.mark.parametrize("pipeline", pipelines, ids=lambda p: p.name)
def test_a_pipeline_runs_and_then_has_nothing_to_do(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLKIT_DATA", raising=False)
    mlkit("run", pipeline.name, "--profile", "smoke", timeout=600)
    assert {job["state"] for job in last_manifest(tmp_path / ".mlkit")["jobs"].values()} == {"done"}
    mlkit("run", pipeline.name, "--profile", "smoke")
    assert {job["state"] for job in last_manifest(tmp_path / ".mlkit")["jobs"].values()} == {"cached"}
