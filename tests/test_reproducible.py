"The same seed gives the same weights, bit for bit, also on several threads of a busy machine."

import os
import subprocess
import sys

from symmbfn import load_data
from symmbfn.core import load_tensors
from symmbfn.data import save_dataset


def test_two_runs_at_the_same_time_end_with_the_same_weights(tmp_path):
    "Two processes with two threads each disturb one another, so sums whose order is left to chance would differ."
    data = load_data("prototypes")
    for split, n in (("train", 256), ("val", 32)):
        save_dataset(tmp_path / f"{split}.safetensors", data[split][:n])
    command = [
        sys.executable,
        "-m",
        "symmbfn.train",
        "train.safetensors",
        "val.safetensors",
        "--epochs",
        "3",
        "--size",
        "64",
        "--hidden",
        "256",
        "--embed",
        "64",
        "--layers",
        "3",
        "--freqs",
        "32",
        "--run",
    ]
    env = os.environ | {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }  # four threads on few cores: they had better not wait by spinning
    runs = [
        subprocess.Popen(command + [name], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
        for name in ("a", "b")
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    a, b = (load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("a", "b"))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name
