"Two workers share the machine: each computes with one thread, unless told otherwise."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
