"Trainings repeat, keep their best weights, and touch nothing outside."
import os
import socket
import subprocess
import sys
import threading
import time
import polars as pl
import pytest
import torch
import pytorch_lightning as lightning
from mlkit.train import TrainError, evaluate, fit, tune, weights_digest, wilson


class Line(lightning.LightningModule):
    "Two weights."

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.lr = torch.nn.Linear(1, 1), lr

    def training_step(self, batch, index):
        loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("validation_loss", torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Points(lightning.LightningDataModule):
    "y = 2 x."

    def loader(self, shuffle=False):
        x = torch.linspace(-1, 1, 32)[:, None]
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 2 * x), 8, shuffle)

    def train_dataloader(self):
        return self.loader(True)

    def val_dataloader(self):
        return self.loader()


def train(model=None, **options):
    return fit(model or Line(), Points(), progress=False, threads=1, **{"epochs": 3, **options})


def test_the_same_seed_gives_the_same_weights():
    assert weights_digest(train(seed=1).model) == weights_digest(train(seed=1).model) != weights_digest(train(seed=2).model)


def test_machines_that_nothing_started_are_not_waited_for(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainError, match="num_nodes=5 needs a launcher"):
        train(num_nodes=5, accelerator="cpu")


def test_an_error_of_a_users_own_code_stays_what_it_is():
    class Broken(Line):
        def training_step(self, batch, index):
            return torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="size of tensor"):
        train(Broken())

    class Own(lightning.Callback):
        def on_train_start(self, trainer, module):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(callbacks=Own())


def test_the_best_epoch_is_kept_and_not_the_last():
    class Worsening(Line):
        def validation_step(self, batch, index):
            self.log("validation_loss", float(self.current_epoch))

    result, once = train(Worsening()), train(epochs=1)
    assert result.best["epoch"] == 1 and len(result.history) == 3
    assert weights_digest(result.model) == weights_digest(once.model)


def test_a_training_that_blows_up_is_an_error_with_advice():
    with pytest.raises(TrainError, match="smaller learning rate"):
        train(Line(lr=1e30))


def test_lightning_stays_within_reach():
    result = train(epochs=5, limit_train_batches=1)
    assert result.trainer.limit_train_batches == 1 and result.trainer.current_epoch == 5


def test_nothing_is_written_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train()
    assert not list(tmp_path.iterdir())


def test_wandb_keeps_off_the_network_and_in_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [calls.append(server.accept()) for _ in range(1)], daemon=True).start()
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("NETRC", os.devnull)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        train(tracker="wandb", folder=tmp_path / "files", epochs=1)
    assert not calls and not list((tmp_path / "here").iterdir())
    assert list((tmp_path / "files").rglob("run-*.wandb"))


def test_an_interval_holds_what_it_promises():
    import random

    rng, inside = random.Random(0), 0
    for _ in range(2000):
        low, high = wilson(sum(rng.random() < 0.9 for _ in range(100)), 100)
        inside += low <= 0.9 <= high
    assert 0.93 <= inside / 2000 <= 0.97


def test_classes_that_never_occur_do_not_break_the_report():
    report = evaluate(pl.DataFrame({"label": ["a", "b"], "prediction": ["a", "a"]}), labels=("a", "b", "c"))
    assert report.per_class["rows"].to_list() == [1, 1, 0] and report.confusion().png.startswith(b"\x89PNG")
    assert report.per_class["f1"].to_list() == [pytest.approx(2 / 3), 0.0, None]


SEARCH = """
import sys, time
from mlkit.train import tune

def bowl(x, y):
    time.sleep(float(sys.argv[2]))
    return (x - 3) ** 2 + y

print(tune(bowl, {"x": (0.0, 10.0), "y": [0, 1]}, trials=9, storage=sys.argv[1]))
"""


def search(storage, pause: float):
    return subprocess.Popen([sys.executable, "-c", SEARCH, str(storage), str(pause)])


def test_a_search_that_is_killed_in_a_trial_is_gone_on_with_by_two_together(tmp_path):
    storage = tmp_path / "tune.log"
    killed = search(storage, 60)
    while not storage.is_file() or '"process"' not in storage.read_text():  # a trial is running
        time.sleep(0.1)
    time.sleep(0.5)
    killed.kill()  # and stays a zombie until it is waited for
    others = [search(storage, 0.05) for _ in range(2)]
    assert [p.wait(120) for p in others] == [0, 0] and killed.wait() == -9
    kept = tune(lambda x, y: 0.0, {"x": (0.0, 10.0), "y": [0, 1]}, trials=9, storage=storage).trials
    assert dict(kept.group_by("state").len().rows()) == {"complete": 9, "fail": 1}
    done = kept.filter(state="complete")
    assert done["x"].n_unique() == 9 and kept["x"][0] in done["x"].to_list()  # nothing is drawn twice, and what was lost is made


@pytest.mark.parametrize("average", [None, 0.9], ids=["plain", "averaged"])
def test_no_secret_is_written_into_a_checkpoint(tmp_path, average):
    model = Line()
    model.hparams.update({"api_key": "sesame-4711", "url": "https://ada:sesame-4711@host/x", "nested": {"password": "sesame-4711"}, "lr": 0.1})
    train(model, tracker="file", folder=tmp_path, average=average, epochs=1)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"best.ckpt", "resume.ckpt", "config.json"} <= {p.name for p in files} and not [p for p in files if b"sesame-4711" in p.read_bytes()]
    assert torch.load(tmp_path / "resume.ckpt", weights_only=True)["hyper_parameters"] == {"api_key": "***", "url": "https://ada:***@host/x", "nested": {"password": "***"}, "lr": 0.1}
    train(model, folder=tmp_path, average=average, epochs=1, resume=True, tracker="file")
