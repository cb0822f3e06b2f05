"""Training windows per second and peak memory: a linear model, context 336, horizon 96, on 32 series of 50,000 points, one thread.

Beside ours stand a bare torch loop over one contiguous tensor with the same model, loss, optimiser and batch; a simpler one that neither scales windows nor knows the units of series; and darts, gluonts and neuralforecast with their own linear models. The peers live in an environment
of their own over the present one, so that all use one torch; name it with MLKIT_PEERS=folder to keep it. What does not install is left out and named.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import median

from bench import report

COMMON = """
import json, os, resource, sys, time, warnings, logging
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import numpy as np, torch
torch.set_num_threads(1)
series, points, context, horizon, batch = 32, 50_000, 336, 96, 1024
def values():
    random = np.random.default_rng(0)
    return (np.sin(np.arange(points) / 24 * 2 * np.pi) + random.normal(size=(series, points)) * 0.3).astype(np.float32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
def say(train, few=40, many=640):
    "Time two trainings of different length, so that what comes before the first step does not count."
    imported = peak()
    train(few)
    seconds = []
    for steps in (few, many):
        started = time.perf_counter(); train(steps); seconds.append(time.perf_counter() - started)
    print("\\n" + json.dumps({"windows": (many - few) * batch / (seconds[1] - seconds[0]), "imported": imported, "peak": peak()}))
"""
BARE = """
own = values()
flat, deviation = torch.from_numpy(own.ravel()), torch.from_numpy(own.std(1))
linear = torch.nn.Linear(context, horizon); optimizer = torch.optim.AdamW(linear.parameters(), 1e-3)
def train(steps):
    view = flat.unfold(0, context + horizon, 1)
    for _ in range(steps):
        one = torch.randint(0, series, (batch,))
        window = view.index_select(0, torch.randint(0, points - context - horizon, (batch,)) + points * one)
        x, y = window[:, :context], window[:, context:]
        loss = LOSS
        optimizer.zero_grad(); loss.backward(); optimizer.step()
say(train)
"""
SAME = """
def loss_of(x, y, unit):
    last = x[:, -1:]
    scale = torch.linalg.vector_norm(x - x.mean(1, keepdim=True), dim=1, keepdim=True) / context**0.5
    return ((linear((x - last) / scale) * scale + last - y).abs() / unit[:, None]).mean()
""" + BARE.replace("LOSS", "loss_of(x, y, deviation[one])")
SIMPLEST = BARE.replace("LOSS", "(linear(x - x[:, -1:]) + x[:, -1:] - y).abs().mean()")
OURS = """
from mlkit.data.series import Grid, Panel
from mlkit.timeseries import Forecaster, SeriesData
panel = Panel(tuple(map(str, range(series))), np.arange(series + 1) * points, np.zeros(series, np.int64), Grid(1, "n"), {"value": values().ravel()}, "value")
data = SeriesData(panel, horizon=horizon, context=context, season=24, batch_size=batch)
model = Forecaster("linear", data, centre="last")
"""
LOOP = OURS + """
from mlkit.timeseries.models import window_loss
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
def train(steps):
    for _, part in zip(range(steps), data.loader("train", shuffle=True)):
        loss = window_loss(model.network(part["history"]), part)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
say(train)
"""
FIT = OURS + """
from mlkit.train import fit
def train(steps):
    fit(model, data, epochs=1, threads=1, progress=False, limit_train_batches=steps, limit_val_batches=1)
say(train)
"""
DARTS = """
from darts import TimeSeries
from darts.models import NLinearModel
own = [TimeSeries.from_values(v) for v in values()]
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
def train(steps):
    NLinearModel(context, horizon, n_epochs=1, batch_size=batch, pl_trainer_kwargs={**quiet, "limit_train_batches": steps}).fit(own)
say(train, 10, 60)
"""
GLUONTS = """
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import DLinearEstimator
own = ListDataset([{"start": pd.Period("2000-01-01", "h"), "target": v} for v in values()], freq="h")
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "max_epochs": 1, "enable_model_summary": False}
def train(steps):
    DLinearEstimator(prediction_length=horizon, context_length=context, batch_size=batch, num_batches_per_epoch=steps, trainer_kwargs=quiet).train(own)
say(train, 2, 10)
"""
NEURALFORECAST = """
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NLinear
table = pd.DataFrame({"unique_id": np.repeat(np.arange(series), points), "ds": np.tile(np.arange(points), series), "y": values().ravel()})
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
def train(steps):
    NeuralForecast([NLinear(h=horizon, input_size=context, max_steps=steps, windows_batch_size=batch, batch_size=series, **quiet)], freq=1).fit(table)
say(train, 2, 10)
"""
PEERS = {"darts": ("darts", DARTS), "gluonts": ("gluonts[torch]", GLUONTS), "neuralforecast": ("neuralforecast", NEURALFORECAST)}


def peer_python(name: str, package: str, home: Path) -> Path:
    "Make an environment for one peer over the present one, unless it is there."
    folder = home / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        inside = next((folder / "lib").glob("python*/site-packages"))
        (inside / "beneath.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run([python, "-m", "pip", "install", "-q", package], check=True, capture_output=True, text=True)
    return python


def measured(python, code: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([python, "-c", COMMON + code], capture_output=True, text=True, env=environment, cwd=folder, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-800:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, rounds: list[dict], bare: list[dict]) -> dict:
    shares = [found["windows"] / beside["windows"] for found, beside in zip(rounds, bare)]
    return {
        "what": name, "windows/s": round(median(found["windows"] for found in rounds)), "of the bare loop": median(shares), "least": min(shares), "most": max(shares),
        "peak MB": round(max(found["peak"] for found in rounds)), "of that after imports": round(max(found["peak"] - found["imported"] for found in rounds)),
    }  # fmt: skip


if __name__ == "__main__":
    same = "bare torch loop, the same model and loss"
    ways = {same: SAME, "bare torch loop, without scaling and units": SIMPLEST, "ours, windows in a plain loop": LOOP, "ours, mlkit.train.fit": FIT}
    rounds = {name: [] for name in ways}
    for number in range(7):
        for name, code in list(ways.items())[:: (-1) ** number]:  # in turn from either end, so that a machine that grows slower favours nobody
            rounds[name].append(measured(sys.executable, code))
    rows = [row(name, found, rounds[same]) for name, found in rounds.items()]
    notes = ["the loops and ours: medians of seven rounds, each share within its round; a peer: one run beside the bare loop's median"]
    beside = [{"windows": rows[0]["windows/s"]}]
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(os.environ.get("MLKIT_PEERS", temporary))
        for name, (package, code) in PEERS.items():
            try:
                rows.append(row(name, [measured(peer_python(name, package, home), code)], beside))
            except (RuntimeError, subprocess.SubprocessError) as error:
                notes.append(f"{name} is left out: {(getattr(error, 'stderr', None) or str(error)).strip().splitlines()[-1][:200]}")
    report("Training windows per second: linear model, context 336, horizon 96, 32 series of 50,000 points, one thread", rows, notes)
