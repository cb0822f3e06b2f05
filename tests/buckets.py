"Buckets for tests: emulators of three clouds' storage on this machine, with the environment that leads to them."

import base64
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from email.utils import formatdate
from logging import ERROR, getLogger
from threading import Lock, Thread

import pytest


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def _environment(**names):
    before = dict(os.environ)
    os.environ |= names
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_at_a_time(app):
    "Moto looks whether a name is taken and then writes, which S3 does in one: let no request come in between."
    lock = Lock()

    def locked(environ, start_response):
        with lock:
            return list(app(environ, start_response))

    return locked


@contextmanager
def _moto(bucket: str):
    "Serve one bucket; yields the address and a client."
    server, boto3 = pytest.importorskip("moto.server", reason="an emulator of S3"), pytest.importorskip("boto3")
    from werkzeug.serving import make_server

    getLogger("werkzeug").setLevel(ERROR)
    emulator = make_server("127.0.0.1", 0, _one_at_a_time(server.DomainDispatcherApplication(server.create_backend_app)), threaded=True)
    Thread(target=emulator.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{emulator.port}"
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test")
    client.create_bucket(Bucket=bucket)
    try:
        yield url, client
    finally:
        emulator.shutdown()


@contextmanager
def s3(bucket: str):
    "A bucket of an emulated S3; yields its client."
    with _moto(bucket) as (url, client), _environment(AWS_ENDPOINT_URL=url, AWS_ALLOW_HTTP="true", AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_REGION="us-east-1"):
        yield client


@contextmanager
def gs(bucket: str, folder):
    "A bucket of an emulated Google Cloud Storage, whose XML answers are those of S3; yields a client. Only objects that are public can be read, since nothing here checks Google's signatures."
    with _moto(bucket) as (url, client):
        account = folder / "account.json"
        account.write_text(json.dumps({"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}))
        with _environment(GOOGLE_SERVICE_ACCOUNT=str(account), GOOGLE_ALLOW_HTTP="true"):
            yield client


@contextmanager
def azure(container: str, folder):
    "A container of an emulated Azure storage, if azurite is installed: npm install -g azurite."
    program = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    if not program:
        pytest.skip("no emulator of Azure's storage: npm install -g azurite, or name its azurite-blob in $AZURITE")
    port = free_port()
    emulator = subprocess.Popen([program, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"], cwd=folder)
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # the emulator's, the same everywhere
    url = f"http://127.0.0.1:{port}/devstoreaccount1"
    try:
        _make_container(url, key, container)
        with _environment(AZURE_STORAGE_ENDPOINT=url, AZURE_STORAGE_ACCOUNT_NAME="devstoreaccount1", AZURE_STORAGE_ACCOUNT_KEY=key, AZURE_ALLOW_HTTP="true"):
            yield
    finally:
        emulator.terminate()
        emulator.wait(10)


def _make_container(url: str, key: str, name: str):
    "Make a container with a signed request, so that no further library is needed for a test."
    for _ in range(600):  # on a busy machine the emulator takes its time to start
        date, version = formatdate(usegmt=True), "2023-11-03"
        text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n/devstoreaccount1/devstoreaccount1/{name}\nrestype:container"
        signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
        headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey devstoreaccount1:{signature}", "Content-Length": "0"}
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers), timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read()) from error
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.1)
    raise RuntimeError(f"the emulator at {url} does not answer")
