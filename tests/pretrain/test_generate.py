"""Sampling: greedy against transformers, determinism, the context's end."""

import pytest
import torch

from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.generate import generate
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective

VOCAB, CONTEXT = 50, 24


@pytest.fixture(scope="module")
def objective():
    model = config.Model(layers=2, hidden=32, heads=4, init=config.Init(std=0.2))
    return build_objective(config.Job(model=model, data=config.Data(seq_len=CONTEXT)), Inputs(VOCAB, CONTEXT))


def by_hand(objective, tokens, new):
    for _ in range(new):
        logits = objective.logits(tokens[:, -CONTEXT:])[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens


def test_greedy_slides_beyond_the_context(objective):
    prompt = torch.randint(0, VOCAB, (2, 5))
    new = 2 * CONTEXT
    assert torch.equal(
        generate(objective, prompt, new, CONTEXT, temperature=0), by_hand(objective, prompt, new)
    )
    full = torch.randint(0, VOCAB, (1, CONTEXT + 3))  # a prompt that is longer than the context
    assert torch.equal(generate(objective, full, 4, CONTEXT, temperature=0), by_hand(objective, full, 4))


def test_seed_decides_and_rows_do_not_matter_to_each_other(objective):
    prompt = torch.randint(0, VOCAB, (3, 5))
    first, again, other = (generate(objective, prompt, 10, CONTEXT, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(generate(objective, prompt[:1], 10, CONTEXT), first[:1])


def test_draws_follow_the_softmax(objective):
    prompt = torch.randint(0, VOCAB, (1, 5)).expand(4000, 5)
    with torch.no_grad():
        p = torch.softmax(objective.logits(prompt[:1])[0, -1].double() / 2, 0)
    drawn = generate(objective, prompt, 1, CONTEXT, temperature=2.0)[:, -1]
    counts = torch.bincount(drawn, minlength=VOCAB)
    # Pearson's statistic has mean 49 and deviation sqrt(98): six deviations above.
    assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 49 + 6 * 98**0.5


def test_top_k_draws_from_the_likeliest(objective):
    prompt = torch.randint(0, VOCAB, (1, 5)).expand(200, 5)
    with torch.no_grad():
        likely = objective.logits(prompt[:1])[0, -1].topk(3).indices
    drawn = generate(objective, prompt, 1, CONTEXT, top_k=3, temperature=5.0)[:, -1]
    assert set(drawn.tolist()) <= set(likely.tolist())
    assert len(set(drawn.tolist())) > 1


def test_an_empty_prompt_is_refused(objective):
    with pytest.raises(JobError, match="at least one token"):
        generate(objective, torch.zeros(1, 0, dtype=torch.int64), 3, CONTEXT)
