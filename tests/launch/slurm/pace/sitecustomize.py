"""Python reads this file at its start, where its folder is on PYTHONPATH: the steps of ranks then take at least
HEADWAY_TEST_PACE seconds, so that a fault meets a small run while it is under way, on a fast machine as on a busy one.
"""

import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder

PACE = float(os.environ.get("HEADWAY_TEST_PACE", 0))
TRAINER = "headway.pretrain.trainer"


def paced(step):
    def take(trainer, number):
        begin = time.monotonic()
        result = step(trainer, number)
        time.sleep(max(0.0, begin + PACE - time.monotonic()))
        return result

    return take


class Finder(MetaPathFinder):
    """Changes the trainer when it is imported, and nothing else: torch is not imported for it."""

    def find_spec(self, name, path, target=None):
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.Trainer._step = paced(module.Trainer._step)

        spec.loader.exec_module = exec_module
        return spec


if PACE:
    sys.meta_path.insert(0, Finder())
