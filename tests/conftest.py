"Two workers share the machine: each computes with one thread, unless told otherwise."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    "The notebooks, which take longest, come first: one worker runs them, the other all the rest."
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")  # else the order stays
