"The same seed gives the same weights, bit for bit, even on several threads of a busy machine."

import os
import subprocess
import sys

from symmbfn.data import load_mp20, load_tensors, save_dataset


def test_two_runs_at_the_same_time_end_with_the_same_weights(tmp_path):
    """Two processes with two threads each disturb each other.

    If the order of a sum were left to chance, the two would then differ. The precision is given,
    since 'auto' is measured and might differ between the two."""
    data = load_mp20()
    for split, n in (("train", 256), ("val", 32)):
        save_dataset(tmp_path / f"{split}.safetensors", data[split][:n])
    words = [sys.executable, "-m", "symmbfn", "train", "train.safetensors"]
    words += ["--val", "val.safetensors", "--epochs", "3", "--batch-size", "64", "--eval-n", "0"]
    words += ["--preset", "base", "--precision", "float32", "--set", "hidden=256"]
    words += ["--set", "embed=64", "--set", "layers=3", "--set", "freqs=32", "--run-dir"]
    # four threads on few cores: one that waits should leave its core to another
    env = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    runs = [
        subprocess.Popen([*words, name], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
        for name in ("a", "b")
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    a, b = (load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("a", "b"))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name
