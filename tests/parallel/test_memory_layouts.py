"""Peak bytes of a step of every family and of a rank of model-parallel layouts, against the formulas: within 5%."""

import pytest

from headway.parallel import mesh
from headway.parallel.planner.activations import Place, table, total
from headway.parallel.planner.describe import describe
from headway.parallel.planner.memory import peak
from headway.parallel.planner.spread import in_flight, of_rank
from headway.tests.parallel.memory_cases import inputs_of, job_of, measured

POLICIES = ("none", "products", "attention", "full")
MATRIX = pytest.mark.long


def predicted(job, world=1, place=0):
    layout = mesh.lay_out(job.parallel, world)
    run = describe(job, inputs_of(job), layout, place, precision=job.precision, device="cpu", compiled=False)
    return peak(run)


FAMILIES = {  # name of a case, what is changed in its model
    "bert": ("bert", {}),
    "t5": ("t5", {}),
    "vit": ("vit", {}),
    "mae": ("mae", {}),
    "albert": ("bert", {"unique_layers": 2, "embedding_size": 32}),
    "t5 v1.1": ("t5", {"activation": "geglu_tanh", "tied": False}),
    "vit with layer scale": ("vit", {"layer_scale": 0.1}),
    "deit": ("vit", {"vision": {"patch": 2, "distill_token": True}}),
}
QUICK = {
    ("bert", "fp32", "none"),
    ("t5", "fp32", "products"),
    ("vit", "bf16", "none"),
    ("deit", "fp32", "none"),
    ("mae", "fp32", "full"),
}


@pytest.mark.parametrize(
    ("name", "precision", "policy"),
    [
        pytest.param(*key, marks=() if key in QUICK else MATRIX)
        for key in ((n, p, r) for n in FAMILIES for p in ("fp32", "bf16") for r in POLICIES)
    ],
)
def test_every_family_takes_the_bytes_of_the_formulas(name, precision, policy):
    case, model = FAMILIES[name]
    job = job_of(case, {"recompute": policy}, precision, **model)
    assert predicted(job).bytes == pytest.approx(measured(job).peak, rel=0.05)


LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "positions": "rotary", "kv_heads": 2}
LAYOUTS = {
    "tensor": {"tensor": 2, "sequence": False},
    "sequence": {"tensor": 2},
    "ring": {"context": 2},
    "ulysses": {"context": 2, "context_method": "ulysses"},
    "1f1b": {"pipeline": 2, "micro_batch": 2},
    "gpipe": {"pipeline": 2, "micro_batch": 2, "schedule": "gpipe"},
}


def peaks_of(rank, world, keys, model):
    found = []
    for layout, policy, precision in keys:
        job = laid_out(layout, policy, precision, model)
        found.append(measured(job, rank, world, rows=job.train.global_batch).peak)
    return found


def laid_out(layout, policy, precision, model):
    rows = 8 if "pipeline" in LAYOUTS[layout] else 4
    return job_of("gpt", LAYOUTS[layout] | {"recompute": policy}, precision, rows=rows, **model)


SOME = [("sequence", "none", "fp32"), ("ring", "full", "fp32"), ("1f1b", "full", "fp32")]


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        (SOME, {}),
        *[
            pytest.param([(layout, r, p) for r in POLICIES for p in ("fp32", "bf16")], {}, marks=MATRIX)
            for layout in LAYOUTS
        ],
        pytest.param([(layout, "none", "fp32") for layout in LAYOUTS], LLAMA, marks=MATRIX),
        pytest.param([(layout, "none", "fp32") for layout in LAYOUTS], {"dropout": 0.1}, marks=MATRIX),
        pytest.param([("1f1b", "none", "fp32")], {"tied": False, "layers": 5}, marks=MATRIX),
    ],
)
def test_a_rank_of_two_takes_the_bytes_of_the_formulas(pool, keys, model):
    """Rank 0 has most of what is cut unevenly; ranks of a pipeline have what their stage has."""
    found = pool(peaks_of, ranks=2, keys=keys, model=model, timeout=600)
    for i, key in enumerate(keys):
        job = laid_out(*key, model)
        for place in range(job.parallel.pipeline):
            expected = predicted(job, 2, place)
            assert expected.bytes == pytest.approx(found[place][i], rel=0.05), (key, place, expected.name)


def test_a_schedule_of_many_stages_is_bounded(pool):
    """Of interleaved stages all micro-batches are counted, of which fewer are under way."""
    LAYOUTS["interleaved"] = {"pipeline": 2, "micro_batch": 2, "schedule": "interleaved_1f1b"}
    job = laid_out("interleaved", "none", "fp32", {})
    found = pool(bounded_of, ranks=2)
    assert all(found[place] <= 1.05 * predicted(job, 2, place).bytes for place in range(2))


def bounded_of(rank, world):
    LAYOUTS["interleaved"] = {"pipeline": 2, "micro_batch": 2, "schedule": "interleaved_1f1b"}
    return peaks_of(rank, world, [("interleaved", "none", "fp32")], {})[0]


def test_the_paper_s_equations_of_tensor_parallelism():
    """Korthikanti et al. 2022, equation 2: s b h (10 + 24 / t + 5 a s / (h t)); equation 4: s b h / t (34 + 5 a s / h),
    but for the inputs of the two products, 4 s b h, which stay gathered here."""
    model = job_of("gpt", {}, dropout=0.1, attention={"kernel": "reference", "dropout": 0.1}).model
    s, b, h, a = 128, 3, 128, 4
    for t in (2, 4):
        for cut, lines in ((1, 10 + 24 / t), (t, 4 + 30 / t)):
            place = Place(of_rank(model, t), b, s, kernel="reference", wide=2, narrow=2, tensor=t, cut=cut)
            terms = table(place)
            linear = total(
                term for term in terms if term.part != "attention" and "statistics" not in term.name
            )
            assert linear == s * b * h * lines
            square = total(term for term in terms if "paper" in term.name and term.part == "attention")
            assert square == 5 * a * s**2 * b / t


def test_micro_batches_under_way():
    assert [in_flight("1f1b", 4, place, 8) for place in range(4)] == [4, 3, 2, 1]
    assert [in_flight("1f1b", 4, place, 2) for place in range(4)] == [2, 2, 2, 1]
    assert [in_flight("gpipe", 4, place, 8) for place in range(4)] == [8, 8, 8, 8]
