"Training that can be left alone: killed at any moment it goes on to the same weights, and two processes do what one does."
import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from symmbfn import load_data
from symmbfn.core import load_tensors
from symmbfn.data import save_dataset
from symmbfn.train import main

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["--hidden", "64", "--embed", "16", "--layers", "2", "--freqs", "8", "--precision", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with crystals to train on: 41 and 9 of the prototypes, of all sizes."
    folder = tmp_path_factory.mktemp("training")
    data = load_data("prototypes")
    for split, n in (("train", 41), ("val", 9)): save_dataset(folder/f"{split}.safetensors", data[split][::len(data[split])//n][:n])
    return folder


def arguments(folder, run, **options):
    words = [w for name, value in options.items() for w in (f"--{name}", str(value))]
    return [str(folder/"train.safetensors"), str(folder/"val.safetensors"), "--folder", str(folder/run), *words, *SMALL]


def log(folder): return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(folder/"log.csv"))]


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
    whole, killed = (arguments(folder, run, epochs=150, size=8, every=7) for run in ("whole", "killed"))
    start(arguments(folder, "first", epochs=1)).join(60)  # the server has started
    began = time.monotonic()
    process = start(whole)
    process.join(120)
    took, chance, reached, writing = time.monotonic() - began, random.Random(0), [], 0
    for kill in range(10):
        process = start(killed)
        process.join(chance.uniform(0, .09)*took)
        while kill % 2 and process.is_alive() and not list((folder/"killed").glob("*.part")): pass
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "over before it was killed"
        reached.append(len(log(folder/"killed")) if (folder/"killed"/"log.csv").exists() else 0)
        writing += len(list((folder/"killed").glob("*.part")))
    print(f"{took:.1f} s for the whole run; killed after epochs {reached}, {writing} times while it wrote")
    assert 0 < reached[-1] < 150 and len(set(reached)) > 4 and writing, reached
    process = start(killed)
    process.join(120)
    for file in ("checkpoint", "model"):
        a, b = (load_tensors(folder/run/f"{file}.safetensors")[0] for run in ("whole", "killed"))
        assert a.keys() == b.keys()
        for name in a: assert a[name].equal(b[name]), name
    assert log(folder/"whole") == log(folder/"killed") and len(log(folder/"whole")) == 150 and not list((folder/"killed").glob("*.part"))


@pytest.mark.parametrize("world, size", [(2, 10), (3, 8)])
def test_several_processes_have_the_loss_curve_of_one(folder, world, size):
    "The last batch has a single crystal (41 = 4*10 + 1 = 5*8 + 1), so that all processes but one have nothing of it."
    options = dict(epochs=4, size=size, every=2, schedule="cosine")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m", "symmbfn.train"]
    alone, together = f"alone{size}", f"together{size}"
    subprocess.run([sys.executable, "-m", "symmbfn.train", *arguments(folder, alone, **options)], env=ENV, stdout=subprocess.DEVNULL, check=True, timeout=120)
    for minutes in (0, 9) if world == 2 else (9,):  # stopped after the first epoch, then the rest
        done = subprocess.run(launch + arguments(folder, together, minutes=minutes, **options), env=ENV, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    one, many = log(folder/alone), log(folder/together)
    assert len(one) == len(many) == 4 and one[0].keys() == many[0].keys()
    for a, b in zip(one, many):
        for name in a: assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), (name, a, b)
    a, b = (load_tensors(folder/run/"model.safetensors")[0] for run in (alone, together))
    for name in a: assert (a[name] - b[name]).norm() <= 1e-3*a[name].norm(), name
