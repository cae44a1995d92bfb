"""What the backward computes again, or fetches from the host, changes no bit of any number."""

import pytest
import torch

from headway.parallel.engines.capabilities import check
from headway.parallel.engines.native import NativeEngine
from headway.parallel.mesh import Layout
from headway.parallel.planner.memory import activation_peak, by_block, peak
from headway.parallel.planner.places import Run, places
from headway.parallel.recompute import offload
from headway.parallel.recompute.budget import GIB, POLICIES, choose, cost
from headway.parallel.recompute.offload import Host
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.sizes import parameters
from headway.pretrain.objectives import build_objective
from headway.tests.parallel.family_cases import CASES
from headway.tests.parallel.proof import Running

SETTINGS = {
    "full": {"recompute": "full"},
    "every second": {"recompute": "full", "recompute_every": 2},
    "attention": {"recompute": "attention"},
    "products": {"recompute": "products"},
    "budget": {"recompute": "budget", "recompute_budget": 0.0016},
    "offload": {"offload": True},
    "products, offload": {"recompute": "products", "offload": True},
}
QUICK = ["t5", "choices"]
BRIEFLY = [
    s if s in ("full", "products, offload") else pytest.param(s, marks=pytest.mark.long) for s in SETTINGS
]


def two_steps(rank, world, parallel, names, precision="fp64", compiled=False):
    """Name -> losses, gradient norms and the whole state after two steps."""
    offload.SMALL = 64  # the test's tensors are small
    found = {}
    for name in names:
        running = Running(name, rank, world, parallel)
        results = [running.step(step) for step in range(2)]
        found[name] = [(r.loss, r.grad_norm) for r in results], running.whole()
    return found


@pytest.fixture(scope="module")
def plain():
    """Curves of one process that computes nothing again, by name."""
    known = {}

    def get(name):
        if name not in known:
            known.update(two_steps(0, 1, {}, [name]))
        return known[name]

    return get


def same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES]
)
def test_every_family_has_the_same_bits(plain, monkeypatch, name, setting):
    monkeypatch.setattr(offload, "SMALL", offload.SMALL)
    same(two_steps(0, 1, SETTINGS[setting], [name])[name], plain(name))


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("full", ["experts", "t5"]),
        ("products, offload", ["spectral"]),
        pytest.param("full", list(CASES), marks=pytest.mark.long),
        pytest.param("products", list(CASES), marks=pytest.mark.long),
        pytest.param("attention", list(CASES), marks=pytest.mark.long),
        pytest.param("offload", list(CASES), marks=pytest.mark.long),
    ],
)
def test_sharded_runs_have_the_same_bits(pool, setting, names):
    expected = pool(two_steps, ranks=2, parallel={"shard": 2}, names=names)
    found = pool(two_steps, ranks=2, parallel={"shard": 2} | SETTINGS[setting], names=names)
    for rank in range(2):
        for name in names:
            same(found[rank][name], expected[rank][name])


def small(parallel=None, precision="fp32", **model):
    tree = {
        "model": {"layers": 4, "hidden": 64, "heads": 2, "dropout": 0.1, **model},
        "data": {"seq_len": 64, "tokenizer": {"kind": "bytes"}},
        "parallel": parallel or {},
        "train": {"steps": 4, "global_batch": 4, "compile": False},
        "schedule": {"warmup": 2},
        "precision": precision,
    }
    return Job.model_validate(tree)


def trained(job, compiled=False):
    """Losses, norms and weights of two steps of a GPT on random tokens."""
    from headway.tests.parallel.test_memory import batch_of, engine_of

    torch.compiler.reset()
    engine = engine_of(job, compiled=compiled)
    results = [engine.train_step(batch_of(job), step) for step in range(2)]
    weights = {name: p.detach().clone().numpy() for name, p in engine.named.items()}
    return [(r.loss, r.grad_norm) for r in results], weights


@pytest.mark.parametrize(
    "setting",
    [s if s in ("full", "products, offload") else pytest.param(s, marks=pytest.mark.long) for s in SETTINGS],
)
def test_autocast_is_the_same_when_it_is_computed_again(setting):
    parallel = SETTINGS[setting] | ({"recompute_budget": 0.01} if setting == "budget" else {})
    same(trained(small(parallel, "bf16")), trained(small(precision="bf16")))


@pytest.mark.long
@pytest.mark.parametrize("setting", ["full", "offload", "attention", "products"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_are_the_same_when_they_are_computed_again(setting, precision):
    found = trained(small(SETTINGS[setting], precision, layers=2), compiled=True)
    expected = trained(small(precision=precision, layers=2), compiled=True)
    if setting in ("full", "offload"):
        same(found, expected)
    else:  # the compiler divides the graph elsewhere, and rounds where it ends its loops
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        assert found[0] == [pytest.approx(pair, rel=tolerance) for pair in expected[0]]


def test_what_is_offloaded_leaves(monkeypatch):
    """States and gradients aside, three of eight blocks are on the device at most: the one in its backward, the one
    that is fetched, the one that is made; and all that left comes back."""
    from headway.tests.parallel.test_memory import measured

    hosts = []
    make = Host.__init__
    monkeypatch.setattr(Host, "__init__", lambda self, device: (make(self, device), hosts.append(self))[0])
    kept = measured(small(layers=8)).peak
    with_host = measured(small({"offload": True}, layers=8), elsewhere=lambda: hosts[0].bytes if hosts else 0)
    run = run_of(small(layers=3))
    states = 4 * 4 * parameters(small(layers=8), run.inputs).total
    assert with_host.peak <= states + activation_peak(run, ["none"] * 3) < kept
    assert hosts[0].moved > 2 * (kept - with_host.peak)
    assert hosts[0].bytes == 0


def run_of(job, rows=4):
    return Run(job, Inputs(300, job.data.seq_len), rows, "sdpa")


@pytest.mark.parametrize("experts", [0, 3])
def test_a_budget_is_held_and_used(experts):
    """From all kept to all computed again: never more bytes than given, and never more FLOPs for more bytes."""
    run = run_of(small(dropout=0.0, experts={"count": experts, "pattern": "DE"}))
    most, least = (activation_peak(run, [policy] * 4) for policy in ("none", "full"))
    costs = []
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        chosen = choose(run, least + share * (most - least))
        assert activation_peak(run, chosen) <= least + share * (most - least)
        costs.append(sum(cost(p, policy) for p, policy in zip(places(run), chosen, strict=True)))
    assert costs == sorted(costs)
    assert costs[0] == 0 < costs[-1]


def test_a_budget_chooses_the_best_of_all_choices():
    from itertools import product

    run = run_of(small(dropout=0.0, layers=3, attention={"kernel": "reference"}))
    run = Run(run.job, run.inputs, run.rows, "reference")
    least, most = (activation_peak(run, [policy] * 3) for policy in ("full", "none"))
    blocks = places(run)
    for share in (0.15, 0.35, 0.65):
        budget = least + share * (most - least)
        costs = [
            sum(cost(p, policy) for p, policy in zip(blocks, chosen, strict=True))
            for chosen in product(POLICIES, repeat=3)
            if activation_peak(run, chosen) <= budget
        ]
        ours = choose(run, budget)
        assert sum(cost(p, policy) for p, policy in zip(blocks, ours, strict=True)) == min(costs)


@pytest.mark.parametrize("share", [0.25, pytest.param(0.7, marks=pytest.mark.long)])
def test_the_tracker_says_that_a_budget_is_held(share):
    from headway.tests.parallel.test_memory import VOCAB, batch_of, measured

    job = small(dropout=0.0, layers=6)
    run = Run(job, Inputs(VOCAB, 64), 4, "sdpa")
    least, most = (activation_peak(run, [policy] * 6) for policy in ("full", "none"))
    budget = least + share * (most - least)
    chosen = choose(run, budget)
    rest = peak(run, chosen).bytes - activation_peak(run, chosen)
    tracker = measured(
        small({"recompute": "budget", "recompute_budget": budget / GIB}, dropout=0.0, layers=6)
    )
    assert tracker.peak - rest <= 1.01 * budget
    assert sum(v.nbytes for v in batch_of(job).values()) < budget
    assert len(set(by_block(run, chosen))) > 1


def test_settings_without_effect_are_refused():
    def refused(message, **parallel):
        with pytest.raises(JobError, match=message):
            check(small(parallel), Layout(), "cpu")

    refused(r"recompute_budget = None: must be given", recompute="budget")
    refused(r"recompute_budget = 1\.0: .* needs parallel\.recompute = budget", recompute_budget=1.0)
    refused(
        r"recompute_every = 2: .* needs parallel\.recompute = full", recompute="products", recompute_every=2
    )
    refused(r"recompute_every = 9: of 4 blocks none", recompute="full", recompute_every=9)
    check(small({"recompute": "full", "recompute_every": 2, "offload": True}), Layout(), "cpu")


def budgeted(gib, **parallel):
    return small(parallel | {"recompute": "budget", "recompute_budget": gib})


BUDGETS = {  # layouts of two ranks
    "shard": (Layout(shard=2), {}),
    "tensor": (Layout(tensor=2), {"tensor": 2}),
    "context": (Layout(context=2), {"context": 2}),
    "pipeline": (Layout(pipeline=2), {"pipeline": 2}),
}


@pytest.mark.parametrize("axis", BUDGETS)
def test_a_budget_that_is_too_small_is_refused_before_a_rank_starts(axis):
    """And the smallest that is named is taken."""
    layout, parallel = BUDGETS[axis]
    with pytest.raises(JobError, match=r"recompute_budget = 0\.0001: with all blocks") as error:
        check(budgeted(0.0001, **parallel), layout, "cpu")
    check(budgeted(error.value.nearest, **parallel), layout, "cpu")
    with pytest.raises(JobError, match="with all blocks"):
        check(budgeted(0.99 * error.value.nearest, **parallel), layout, "cpu")


def test_a_budget_of_a_rank_shrinks_with_what_it_holds():
    """Everything that a micro-batch of four rows needs, of which a layout leaves a rank some."""

    def needed(layout, **parallel):
        with pytest.raises(JobError, match="with all blocks") as error:
            check(budgeted(1e-6, **parallel), layout, "cpu")
        return error.value.nearest

    whole = needed(Layout())
    assert needed(Layout(tensor=2), tensor=2) < 0.8 * whole
    assert needed(Layout(context=2), context=2) < 0.8 * whole
    assert needed(Layout(pipeline=2), pipeline=2, micro_batch=2) < 0.8 * whole


def test_what_is_open_before_the_start_is_refused_only_if_nothing_fits():
    job = budgeted(0.0001).model_copy(update={"precision": "auto"})
    with pytest.raises(JobError, match="with all blocks") as error:
        check(job, Layout(), "cpu")
    for precision in ("fp32", "bf16"):
        check(
            small({"recompute": "budget", "recompute_budget": error.value.nearest}, precision),
            Layout(),
            "cpu",
        )


def budgets_of(rank, world, layouts):
    """Of each layout: its recomputation by a budget in the middle, and the same without: losses and norms."""
    from headway.parallel import mesh
    from headway.parallel.planner.describe import describe
    from headway.tests.parallel import memory_cases as memory

    found = []
    for parallel in layouts:
        curves = []
        for again in (False, True):
            job = memory.job_of("gpt", parallel, rows=4)
            layout = mesh.lay_out(job.parallel, world)
            here = mesh.start(job, layout, rank, world, rank, torch.device("cpu"), "gloo")
            if again:
                inputs, place = memory.inputs_of(job), layout.pipeline - 1  # the stage that needs most
                run = describe(job, inputs, layout, place, precision="fp32", device="cpu", compiled=False)
                least, most = (activation_peak(run, [p] * len(places(run))) for p in ("full", "none"))
                budget = {"recompute": "budget", "recompute_budget": (0.6 * least + 0.4 * most) / GIB}
                job = memory.job_of("gpt", parallel | budget, rows=4)
            objective = build_objective(job, memory.inputs_of(job), device="meta")
            engine = NativeEngine(job, objective, here, precision="fp32", compiled=False)
            results = [engine.train_step(memory.batch_of(job), step) for step in range(2)]
            curves.append([(r.loss, r.grad_norm) for r in results])
        found.append(curves)
    return found


def test_a_budget_changes_no_bit_at_any_layout(pool):
    layouts = [{"tensor": 2}, {"context": 2}, {"pipeline": 2}]
    for found in pool(budgets_of, ranks=2, layouts=layouts, timeout=300):
        for parallel, (plain, again) in zip(layouts, found, strict=True):
            assert plain == again, parallel


def test_a_budget_that_is_too_small_names_the_smallest():
    from headway.tests.parallel.test_memory import engine_of

    with pytest.raises(JobError, match=r"recompute_budget = 0\.0001: with all blocks") as error:
        engine_of(small({"recompute": "budget", "recompute_budget": 0.0001}))
    engine_of(small({"recompute": "budget", "recompute_budget": error.value.nearest}))
