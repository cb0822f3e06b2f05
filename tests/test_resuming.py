"A training that is killed anywhere ends with the same weights as one that is left alone."
import json
import multiprocessing
import os
import random
import signal
import time

import polars as pl
import pytest
import pytorch_lightning as lightning
import torch

from mlkit.train import TrainError, fit, log_loss, weights_digest

processes = multiprocessing.get_context("forkserver")  # not fork: a process that has trained cannot be forked into one that trains
processes.set_forkserver_preload(["pytorch_lightning", "mlkit.train.fitting"])


class Noise(torch.utils.data.Dataset):
    "Rows that are random each time they are read."

    def __len__(self):
        return 96

    def __getitem__(self, index):
        x = torch.tensor([index / 96, 1.0]) + 0.1 * torch.randn(2)
        return x, x.sum(dim=0, keepdim=True)


class Data(lightning.LightningDataModule):
    def __init__(self, workers=0, generator=None):
        super().__init__()
        self.workers, self.generator = workers, generator

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Noise(), 8, shuffle=True, num_workers=self.workers, generator=self.generator)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Noise(), 48)


class Model(lightning.LightningModule):
    "Dropout, batch norm, momentum and a schedule: everything that has a state."

    def __init__(self, pause=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.pause = pause
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def training_step(self, batch, index):
        time.sleep(self.pause)
        loss = torch.nn.functional.mse_loss(self.body(batch[0]), batch[1])
        log_loss(self, loss, len(batch[0]))
        self.log("train_error", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("validation_loss", torch.nn.functional.mse_loss(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=int(self.trainer.estimated_stepping_batches) + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder, options, pause=0.0, data=None):
    result = fit(Model(pause), data or Data(), epochs=3, threads=1, progress=False, folder=folder, resume=True, save_every=0.0, **options)
    (folder / "end.json").write_text(json.dumps([weights_digest(result.model), result.history.drop("seconds").rows(), result.steps.drop("seconds").rows()]))


def written(path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def killed_again_and_again(folder, options, rng) -> int:
    "Kill a training at a random time after it wrote a place to go on from, until it comes to its end; returns how often."
    for kills in range(60):
        before, patience = written(folder / "resume.ckpt"), rng.uniform(0, 0.3)
        process = processes.Process(target=train, args=(folder, options, 0.01))
        process.start()
        while process.is_alive() and written(folder / "resume.ckpt") == before:
            time.sleep(0.005)
        process.join(patience)
        if process.exitcode == 0:
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:  # it was quicker
            return kills
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("it never came to its end")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such kill here")
@pytest.mark.parametrize("options", [{}, {"average": 0.9, "accumulate": 2, "clip": 0.5}, {"patience": 0}], ids=["plain", "averaged", "early"])
def test_a_killed_training_ends_bit_for_bit_like_one_that_was_left_alone(tmp_path, options):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    train(whole, options)
    kills = killed_again_and_again(cut, options, random.Random(str(options)))
    assert kills >= 2, "the test killed nothing"
    assert (cut / "end.json").read_text() == (whole / "end.json").read_text()


class Stop(lightning.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("make", [lambda: Data(workers=1), lambda: Data(generator=torch.Generator().manual_seed(5))], ids=["workers", "own generator"])
def test_loaders_with_workers_or_a_generator_of_their_own_go_on_too(tmp_path, make):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, {}, data=make())
    with pytest.raises(InterruptedError):
        train(cut, {"callbacks": [Stop(17)]}, data=make())
    train(cut, {}, data=make())
    assert (cut / "end.json").read_text() == (whole / "end.json").read_text()


def test_a_finished_training_that_is_resumed_only_gives_its_result(tmp_path):
    train(tmp_path, {})
    before = (tmp_path / "end.json").read_text()
    train(tmp_path, {})
    assert (tmp_path / "end.json").read_text() == before


def test_another_training_is_not_resumed_by_mistake(tmp_path):
    train(tmp_path, {})
    with pytest.raises(TrainError, match="seed was 42 and is now 7"):
        train(tmp_path, {"seed": 7})
    (tmp_path / "resume.ckpt").write_bytes(b"torn")
    with pytest.raises(TrainError, match="cannot be resumed from"):
        train(tmp_path, {})
    with pytest.raises(TrainError, match="needs a folder"):
        fit(Model(), Data(), resume=True, progress=False)


def test_a_tracked_training_leaves_numbers_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "correct horse battery")
    model = Model()
    model.hparams.update({"api_key": "abcdef", "url": "s3://me:correct horse battery@host"})
    fit(model, Data(), epochs=2, threads=1, progress=False, folder=tmp_path, tracker="file")
    texts = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".json", ".jsonl"))
    assert b"***" in texts and b"abcdef" not in texts and b"horse" not in texts
    assert pl.read_ndjson(tmp_path / "metrics.jsonl")["validation_loss"].drop_nulls().len() == 2
