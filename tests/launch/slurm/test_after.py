"""What a batch script does when its ranks have ended."""

import pytest

from headway.launch.slurm import jobs
from headway.launch.slurm.after import Rules, decide, first_to_end, since_start, this_job
from headway.launch.slurm.client import parse_job
from headway.launch.slurm.show import logs, progress
from headway.pretrain.errors import JobError


def ended(code, *, state="RUNNING", rules=Rules(), ends=(), next_link=False, cancelled=False):
    decision = decide(code, state, rules, ends, next_link=next_link, cancelled=cancelled)
    return decision.what, decision.exclude


def fault(step: int, *nodes: str) -> dict:
    return {"step": step, "nodes": list(nodes)}


def test_a_run_that_is_done_or_wrong_ends_with_its_chain():
    assert ended(0) == ("end", ())
    assert ended(0, next_link=True) == ("end", ())
    assert ended(2, next_link=True) == ("end", ())


@pytest.mark.parametrize("code", [75, 138, 143])
def test_a_run_that_was_asked_to_stop_goes_on(code):
    here = [fault(5), fault(10)]
    assert ended(code, ends=here) == ("again", ())
    assert ended(code, ends=here, next_link=True) == ("next", ())
    assert ended(code, ends=here, rules=Rules(requeue=False)) == ("end", ())
    assert ended(code, ends=here, rules=Rules(max_faults=0)) == ("again", ())
    assert ended(code, ends=here, cancelled=True) == ("end", ())


def test_stops_in_vain_are_not_borne_for_ever():
    assert ended(138, ends=[fault(5)] * 4) == ("again", ())
    assert ended(138, ends=[fault(5)] * 5, next_link=True) == ("end", ())
    assert ended(138, ends=[fault(5)] * 5 + [fault(6)]) == ("again", ())


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "PENDING", "NODE_FAIL"])
def test_what_slurm_has_ended_is_left_to_slurm(state):
    assert ended(75, state=state, next_link=True) == ("leave", ())
    assert ended(0, state=state, next_link=True) == ("leave", ())  # srun ends with 0 when a node is lost


def test_faults_are_borne_until_there_is_no_progress():
    assert ended(70, ends=[fault(5)]) == ("again", ())
    assert ended(70, ends=[fault(5)] * 3) == ("again", ())
    assert ended(70, ends=[fault(5)] * 4) == ("end", ())
    assert ended(70, ends=[fault(5)] * 4 + [fault(10)]) == ("again", ())
    assert ended(137, ends=[fault(5)], rules=Rules(max_faults=0)) == ("end", ())


def test_a_node_of_repeated_faults_is_left_out():
    faults = [fault(5, "a"), fault(9, "b"), fault(12, "a")]
    assert ended(70, ends=faults) == ("again", ("a",))
    assert ended(70, ends=faults, next_link=True) == ("next", ("a",))
    assert ended(70, ends=faults, rules=Rules(exclude_after=0)) == ("again", ())


# As srun 22.05 writes them, in the order in which ranks end.
KILLED = """\
srun: error: node2: task 1: Killed
srun: error: node1: task 0: Exited with exit code 70
"""
FAILED = """\
srun: error: node2: tasks 1,3: Exited with exit code 70
srun: launch/slurm: _step_signal: Terminating StepId=1.0
srun: error: node1: task 0: Terminated
"""
SAVED = """\
srun: error: node2: task 1: Exited with exit code 75
srun: error: node1: task 0: Terminated
"""
ALL = "srun: error: node[1-2]: tasks 0-1: Exited with exit code 70\n"
EARLY = "srun: error: node1: task 0: User defined signal 1\n"
BY_SLURM = "srun: error: node1: task 0: Terminated\n"


@pytest.mark.parametrize(
    ("code", "log", "found"),
    [
        (137, KILLED, (137, ["node2"])),
        (143, FAILED, (70, ["node2"])),
        (143, SAVED, (75, ["node2"])),
        (70, ALL, (70, [])),
        (138, EARLY, (138, ["node1"])),
        (143, BY_SLURM, (143, [])),
        (0, "", (0, [])),
        (1, "slurmstepd: error: execve(): headway: No such file or directory\n", (1, [])),
    ],
)
def test_the_first_rank_to_end_by_itself_tells_what_happened(code, log, found):
    assert first_to_end(code, log) == found


def test_only_the_last_start_counts():
    log = f"== one\n{KILLED}== job 1 is requeued\n== two\n{SAVED}"
    assert first_to_end(143, since_start(log)) == (75, ["node2"])


def test_a_job_as_the_controller_shows_it():
    line = (
        "JobId=7 ArrayJobId=5 ArrayTaskId=2 JobName=x UserId=root(0) JobState=PENDING Reason=Dependency "
        "Restarts=1 RunTime=00:00:04 TimeLimit=00:10:00 ExitCode=0:0 NodeList=(null) Comment=two words "
        "TRES=cpu=2,node=2 Command=/a b/job.sbatch WorkDir=/a b StdOut=/a b/5_2.log Power= "
    )
    job = parse_job(line)
    assert (job.job, job.state, job.reason, job.restarts) == ("5_2", "PENDING", "Dependency", 1)
    assert (job.nodes, job.script, job.log) == ("", "/a b/job.sbatch", "/a b/5_2.log")
    assert not job.over


def test_outside_of_a_job():
    assert this_job({"SLURM_JOB_ID": "3"}) == "3"
    assert this_job({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "7_2"
    with pytest.raises(JobError, match="part of batch scripts"):
        this_job({})


def test_logs_of_a_run_of_a_sweep_are_the_sweeps(tmp_path, capsys):
    log = tmp_path / "sweep/slurm/7_1.log"
    jobs.note(tmp_path / "sweep-1", "submitted", job="7_1", log=str(log))
    with pytest.raises(JobError, match="no log yet"):
        logs(str(tmp_path / "sweep-1"), 2, follow=False)
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\nthree\n")
    logs(str(tmp_path / "sweep-1"), 2, follow=False)
    assert capsys.readouterr().out == f"{log}:\ntwo\nthree\n"


def test_a_run_that_waits_has_not_begun(tmp_path):
    assert progress(tmp_path) == "has not begun"
