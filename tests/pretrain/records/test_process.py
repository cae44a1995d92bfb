"""Whether the process that kept records still lives."""

import os
import subprocess
import sys

from headway.pretrain.records.process import alive, identify


def test_this_process_lives():
    assert alive(identify()) is True


def test_one_that_ended_does_not_nor_does_a_zombie():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = identify(child.pid)
    assert alive(known) is True
    child.kill()
    os.waitid(
        os.P_PID, child.pid, os.WEXITED | os.WNOWAIT
    )  # it has ended, and nobody has taken notice: a zombie
    assert alive(known) is False
    child.wait()
    assert alive(known) is False


def test_a_number_that_is_used_again_is_another_process():
    assert alive({**identify(), "started": 1}) is False


def test_of_other_machines_and_namespaces_nothing_is_claimed():
    assert alive({**identify(), "boot": "another"}) is None
    assert alive({**identify(), "namespace": "pid:[1]"}) is None
    assert alive({}) is None
    assert alive({**identify(), "pid": "x"}) is None
