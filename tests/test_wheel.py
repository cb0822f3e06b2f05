"The wheel and the sdist build, and the wheel alone runs the main job from any folder."

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from makers import last_manifest

root = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "The folder with the wheel and the sdist, the wheel made from the sdist."
    target = tmp_path_factory.mktemp("dist")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with FileLock(tmp_path_factory.getbasetemp().parent / "build.lock"):  # setuptools works in the checkout, and another worker of pytest-xdist may do the same
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(target), str(root)], check=True, capture_output=True, env=environment)
    return target


def test_the_sdist_holds_what_the_wheel_is_made_from(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "nbs/index.ipynb", "nbs/pipelines/vision/train.ipynb", "mlkit/cli/main.py"} <= names


def test_the_wheel_carries_the_pipelines(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    stages = {f"mlkit/pipelines/{p.parent.name}/{p.name}" for p in (root / "nbs/pipelines").glob("*/*") if p.suffix in (".ipynb", ".yaml")}
    assert {"mlkit/pipelines/vision/train.ipynb", "mlkit/pipelines/nlp/pipeline.yaml", "mlkit/__init__.py"} <= stages | {"mlkit/__init__.py"} <= names
    assert not any(n.startswith(("nbs/", "tests/")) for n in names)
    plain = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert plain and not any("torch" in line or "timm" in line for line in plain)


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory) -> Path:
    "A virtual environment with the wheel; what it needs is seen through a path file instead of being installed again."
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", with_pip=True, symlinks=True)
    python = home / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", next(built.glob("*.whl"))], check=True, capture_output=True)
    packages = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


@pytest.mark.skipif(os.name != "posix", reason="folders of a virtual environment on POSIX")
def test_the_installed_wheel_runs_the_main_job_from_any_folder(elsewhere):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLKIT_DATA")} | {"PATH": f"{elsewhere / 'venv' / 'bin'}:{os.environ['PATH']}"}
    work = elsewhere / "work"
    work.mkdir()
    where = subprocess.run([elsewhere / "venv" / "bin" / "python", "-c", "import mlkit; print(mlkit.__file__)"], cwd=work, env=environment, capture_output=True, text=True)
    assert str(elsewhere) in where.stdout, "the wheel is what is imported, not the checkout"
    for state in ("done", "cached"):
        done = subprocess.run([elsewhere / "venv" / "bin" / "mlkit", "run", "vision", "--profile", "smoke"], cwd=work, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {job["state"] for job in last_manifest(work / ".mlkit")["jobs"].values()} == {state} and "accuracy" in done.stdout
    subprocess.run([elsewhere / "venv" / "bin" / "mlkit", "kernel", "stop"], env=environment, capture_output=True)
