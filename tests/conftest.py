"Every test session has fork servers, caches and stores of its own, and leaves none behind."

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported; without it a name that nobody has is asked for again and again, for a minute


@pytest.fixture(scope="session", autouse=True)
def own_runtime():
    with tempfile.TemporaryDirectory(prefix="mlkit-") as folder:
        os.chmod(folder, 0o700)
        names = {"MLKIT_RUNTIME": folder, "WANDB_MODE": "offline", "PYTHONDONTWRITEBYTECODE": "1", "JUPYTER_PLATFORM_DIRS": "1"}
        if "PYTEST_XDIST_WORKER" in os.environ:  # threads that spin would wait for those of the other worker
            names |= {"OMP_NUM_THREADS": "1"}
        before = {n: os.environ.get(n) for n in (*names, "MLKIT_STORE", "MLKIT_RUN", "GITHUB_STEP_SUMMARY")}
        os.environ |= names
        for name in before.keys() - names.keys():
            os.environ.pop(name, None)
        yield Path(folder)
        subprocess.run([sys.executable, "-m", "mlkit", "kernel", "stop"], capture_output=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
