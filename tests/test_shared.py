"What one machine has computed, another takes from the bucket."

import os

import pytest
from makers import last_manifest, mlkit, write_chain

pytest.importorskip("obstore")
server = pytest.importorskip("moto.server", reason="an emulator of S3")


@pytest.fixture(scope="module")
def bucket():
    "A bucket of an emulated S3 on this machine."
    boto3 = pytest.importorskip("boto3")
    emulator = server.ThreadedMotoServer(port=0)
    emulator.start()
    host, port = emulator.get_host_and_port()
    url, before = f"http://127.0.0.1:{port}", dict(os.environ)
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="team")
    yield "s3://team/chain"
    emulator.stop()
    os.environ.clear()
    os.environ.update(before)


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
