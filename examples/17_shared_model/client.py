"""
Four workers, processes of their own, that use one model.

Prints:

    worker 0: 2000.0
    worker 1: 4000.0
    worker 2: 6000.0
    worker 3: 8000.0
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from doorpool import Proxy


def work(number):
    batch = np.full((1000, 2000), (number + 1) / 1000)
    with Proxy("server.door") as model:
        return model.predict(batch).mean()


if __name__ == "__main__":
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        for number, mean in enumerate(pool.map(work, range(4))):
            print(f"worker {number}: {mean:.1f}")
