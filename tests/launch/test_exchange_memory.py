"""What moves between Hugging Face and Headway is held once: peak memory of processes that import and export.

The checkpoint is transformers' own, in several files. Bounds are sizes of tensors, not times; SLACK is for what a
process allocates beside them: pages of Python and of imports that come late.
"""

import json
import subprocess
import sys

import pytest
import torch

WIDTH, VOCAB, LAYERS = 512, 16384, 8
TABLE = 4 * WIDTH * VOCAB
"""Bytes of the largest tensor."""
SLACK = 24 * 2**20

PROGRAM = f"""
import sys
import torch
from pathlib import Path
torch.set_num_threads(1)
from headway.launch import exchange
from headway.launch.start_from import start_from
from headway.pretrain.hf.folder import open_folder
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
what, place, out = sys.argv[1:]
if what == "start":
    job = open_folder(Path(place)).job
    objective = build_objective(job, Inputs({VOCAB}, 64, 0), device="meta").to_empty(device="cpu")
    weights = {{name: parameter.detach() for name, parameter in objective.named_parameters()}}
    for weight in weights.values():
        weight.zero_()  # pages are there once they are written
def resident(which):  # not resource.getrusage: its peak is inherited from the process that started this one
    (line,) = (line for line in open("/proc/self/status") if line.startswith(which))
    return 1024 * int(line.split()[1])
begin = resident("VmRSS")
if what == "start":
    start_from(weights, job, place)
elif what == "import":
    exchange.import_model("hf", place, out)
else:  # the weights alone: no tokenizer, no card and its pictures
    exchange.find_specials = lambda *_: (None, None, [])
    exchange.write_companions, exchange.write_for_export = lambda *_: [], lambda *_: None
    exchange.export_model(place, "hf", out)
print("GREW", resident("VmHWM") - begin)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A GPT-2 of transformers, random, as safetensors and as files of torch.save; and its size in bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=8,
        vocab_size=VOCAB,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    safe, pickled = tmp_path_factory.mktemp("safe"), tmp_path_factory.mktemp("pickled")
    model.save_pretrained(safe, max_shard_size="40MB")
    assert len(list(safe.glob("*.safetensors"))) >= 4
    config.save_pretrained(pickled)
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    where = {}
    for i in range(3):
        part = {name: tensors[name] for name in list(tensors)[i::3]}
        torch.save(part, pickled / f"pytorch_model-{i}.bin")
        where |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return {"safe": safe, "pickled": pickled, "bytes": sum(t.nbytes for t in tensors.values())}


def grew(*arguments) -> int:
    """Bytes that a process grew by at its peak."""
    command = [sys.executable, "-P", "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("GREW ")[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safe", pytest.param("pickled", marks=pytest.mark.matrix)])
def test_a_run_that_starts_from_a_folder_holds_one_tensor_of_it_at_a_time(folders, kind, tmp_path):
    assert folders["bytes"] > 4 * TABLE
    assert grew("start", folders[kind], tmp_path) <= TABLE + SLACK


@pytest.mark.slow
@pytest.mark.matrix
def test_import_holds_the_model_once_and_export_one_tensor(folders, tmp_path):
    assert grew("import", folders["safe"], tmp_path / "run") <= folders["bytes"] + TABLE + SLACK
    # the table as it is stored, which is mapped, and a copy of it
    assert grew("export", tmp_path / "run", tmp_path / "back") <= 2 * TABLE + SLACK
    from transformers import GPT2LMHeadModel

    first, back = (
        GPT2LMHeadModel.from_pretrained(place).state_dict() for place in (folders["safe"], tmp_path / "back")
    )
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())
