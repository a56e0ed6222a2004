"Training that can be left alone: killed at any moment it goes on to the same weights, and two processes do what one does."

import contextlib
import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from symmbfn import load_data
from symmbfn.core import Channels, load_tensors
from symmbfn.data import load_dataset, save_dataset
from symmbfn.model import BASE, Model
from symmbfn.train import (
    Objective,
    RecordedEpoch,
    epoch_generator,
    gradient_step,
    main,
    make_optimizers,
    pad_batch,
    sample_time_and_noise,
    stratified_batches,
    update_ema,
)

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = [
    "--hidden",
    "64",
    "--embed",
    "16",
    "--layers",
    "2",
    "--freqs",
    "8",
    "--precision",
    "float32",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with crystals to train on: 41 and 9 of the prototypes, of all sizes."
    folder = tmp_path_factory.mktemp("training")
    data = load_data("prototypes")
    for split, n in (("train", 41), ("val", 9)):
        save_dataset(folder / f"{split}.safetensors", data[split][:: len(data[split]) // n][:n])
    return folder


def arguments(folder, run, **options):
    words = [w for name, value in options.items() for w in (f"--{name}", str(value))]
    return [
        str(folder / "train.safetensors"),
        str(folder / "val.safetensors"),
        "--folder",
        str(folder / run),
        *words,
        *SMALL,
    ]


def log(folder):
    return [
        {k: v for k, v in row.items() if k != "seconds"}
        for row in csv.DictReader(open(folder / "log.csv"))
    ]


@pytest.fixture
def start(monkeypatch):
    "Start a process that has torch already, so that it trains in no time."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["symmbfn.train", "torch._dynamo"])

    def start(words):
        process = context.Process(target=main, args=(words,))
        process.start()
        return process

    return start


def test_killed_ten_times_it_ends_with_the_same_weights(folder, start):
    "SIGKILL at random moments, every other one as soon after it as a file is being written. The last process is left alone."
    whole, killed = (
        arguments(folder, run, epochs=150, size=8, every=7) for run in ("whole", "killed")
    )
    start(arguments(folder, "first", epochs=1)).join(60)  # the server has started
    began = time.monotonic()
    process = start(whole)
    process.join(120)
    took, chance, reached, writing = time.monotonic() - began, random.Random(0), [], 0
    for kill in range(10):
        process = start(killed)
        process.join(chance.uniform(0, 0.09) * took)
        while kill % 2 and process.is_alive() and not list((folder / "killed").glob("*.part")):
            pass
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "over before it was killed"
        reached.append(
            len(log(folder / "killed")) if (folder / "killed" / "log.csv").exists() else 0
        )
        writing += len(list((folder / "killed").glob("*.part")))
    print(
        f"{took:.1f} s for the whole run; killed after epochs {reached}, {writing} times while it wrote"
    )
    assert 0 < reached[-1] < 150 and len(set(reached)) > 4 and writing, reached
    process = start(killed)
    process.join(120)
    for file in ("checkpoint", "model"):
        a, b = (
            load_tensors(folder / run / f"{file}.safetensors")[0] for run in ("whole", "killed")
        )
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].equal(b[name]), name
    assert (
        log(folder / "whole") == log(folder / "killed")
        and len(log(folder / "whole")) == 150
        and not list((folder / "killed").glob("*.part"))
    )


@pytest.mark.parametrize("world, size", [(2, 10), (3, 8)])
def test_several_processes_have_the_loss_curve_of_one(folder, world, size):
    "The last batch has a single crystal (41 = 4*10 + 1 = 5*8 + 1), so that all processes but one have nothing of it."
    options = dict(epochs=4, size=size, every=2, schedule="cosine")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(world),
        "-m",
        "symmbfn.train",
    ]
    alone, together = f"alone{size}", f"together{size}"
    subprocess.run(
        [sys.executable, "-m", "symmbfn.train", *arguments(folder, alone, **options)],
        env=ENV,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    for minutes in (0, 9) if world == 2 else (9,):  # stopped after the first epoch, then the rest
        done = subprocess.run(
            launch + arguments(folder, together, minutes=minutes, **options),
            env=ENV,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, many = log(folder / alone), log(folder / together)
    assert len(one) == len(many) == 4 and one[0].keys() == many[0].keys()
    for a, b in zip(one, many):
        for name in a:
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(
                float(b[name]), rel=1e-4
            ), (name, a, b)
    a, b = (load_tensors(folder / run / "model.safetensors")[0] for run in (alone, together))
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm(), name


class StandIn:
    "For a CUDA graph where there is no GPU: it does the step again."

    def register_generator_state(self, generator):
        pass

    def replay(self):
        self.step()

    def wait_stream(self, stream):
        pass


def test_recorded_epochs_are_those_of_single_batches(folder, monkeypatch):
    "What a GPU plays back, padded batches and all, against steps on the same crystals without padding; and making a recording leaves no trace."
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    data = load_dataset(folder / "train.safetensors")[0].crystals.to(torch.float32)

    def new_run():
        torch.manual_seed(0)
        model, ema = (
            Model(**BASE | dict(hidden=32, embed=8, layers=1, freqs=2)).standardise(data)
            for _ in range(2)
        )
        return SimpleNamespace(
            model=model,
            ema=ema,
            optimizers=make_optimizers(model, 1e-3, "muon"),
            config=dict(size=16, clip=1.0, decay=0.9, seed=3),
            step=0,
        )

    run, plain = new_run(), new_run()
    recorded = RecordedEpoch(run, Objective(run.model, "float32"), data, None)
    recorded.graph.step = recorded.step
    assert all(
        p.equal(q) for p, q in zip(run.model.parameters(), plain.model.parameters())
    ) and not any(v.any() for o in run.optimizers for s in o.state.values() for v in s.values())
    losses = recorded(1)

    generator, objective, sums = epoch_generator(3, 1), Objective(plain.model, "float32"), 0
    for take in stratified_batches(data.n, 16, generator):
        c, which, weight = pad_batch(data, data.n, take, recorded.sites)
        t, noise = sample_time_and_noise(c, generator)
        real, there = c.b < len(take), weight > 0
        total, own = objective(
            data[take[take >= 0]],
            t[there],
            Channels(noise.k[there], noise.x[real], noise.a[real], noise.S[real]),
            None,
        )
        plain.model.zero_grad()
        gradient_step(plain, total)
        plain.step += 1
        update_ema(plain.ema, plain.model, plain.step, 0.9)
        sums = sums + int(there.sum()) * own
    for which in ("model", "ema"):
        there, here, before = (
            torch.cat([p.detach().flatten() for p in getattr(r, which).parameters()])
            for r in (run, plain, new_run())
        )
        assert (there - here).norm() < 0.02 * (there - before).norm()  # Muon rounds to bfloat16
    assert run.step == 3 and torch.allclose(
        torch.tensor([losses[f] for f in "kxaS"]), sums / len(data), rtol=1e-4
    )
