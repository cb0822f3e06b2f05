"What one machine has computed, another takes from the bucket."

import buckets
import pytest
from makers import last_manifest, mlkit, write_chain

pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def bucket():
    with buckets.s3("team"):
        yield "s3://team/chain"


def machine(place, name: str, bucket: str, monkeypatch):
    "Be a machine with a cache of its own, whose store is the bucket; return where that store stands here."
    from mlkit.core.config import find_store

    monkeypatch.setenv("XDG_CACHE_HOME", str(place / name))
    monkeypatch.setenv("MLKIT_STORE", bucket)
    return find_store()


def test_what_ci_has_computed_a_laptop_does_not_compute_again(bucket, tmp_path, monkeypatch):
    write_chain(tmp_path / "chain")
    ci = machine(tmp_path, "ci", bucket, monkeypatch)
    mlkit("run", tmp_path / "chain")
    laptop = machine(tmp_path, "laptop", bucket, monkeypatch)
    assert laptop != ci and not laptop.exists()
    mlkit("run", tmp_path / "chain")
    assert {job["state"] for job in last_manifest(laptop)["jobs"].values()} == {"cached"}
    assert [j["outputs"] for j in last_manifest(laptop)["jobs"].values()] == [j["outputs"] for j in last_manifest(ci)["jobs"].values()]


def test_a_bucket_that_is_not_there_is_told_before_anything_runs(bucket, tmp_path, monkeypatch):
    write_chain(tmp_path / "chain")
    machine(tmp_path, "here", "s3://nobody/x", monkeypatch)
    assert "s3://nobody/x cannot be reached" in mlkit("run", tmp_path / "chain", check=2).stderr
