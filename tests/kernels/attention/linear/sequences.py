"""Rows of two documents, padding and odd lengths, for mechanisms that go along the sequence."""

from contextlib import contextmanager

import torch

from headway.kernels.attention.masks import Mask

KEYS = 303
DOCUMENTS = torch.tensor(
    [[0] * 100 + [1] * 33 + [2] * 170, [4] * 128 + [5] * 128 + [-1] * 47], dtype=torch.int32
)
TARGETS = torch.tensor(
    [[0] * 50 + [1] * 50 + [7] * 5, [5] * 50 + [4] * 55]
)  # of document 7 there are no keys
FORWARD = {"causal": Mask(), "documents": Mask(True, DOCUMENTS)}
MASKS = FORWARD | {
    "full": Mask(False),
    "pairs": Mask(False, DOCUMENTS),
    "cross": Mask(False),
    "cross documents": Mask(False, TARGETS, DOCUMENTS),
}
QUERIES = {"cross": 105, "cross documents": 105}


def heads(mask="causal", queries=4, keys=2, length=KEYS, dim=20, dtype=torch.float64):
    """q, k, v."""
    generator = torch.Generator().manual_seed(1)
    rows = QUERIES.get(mask, length)
    shapes = [(2, queries, rows, dim), (2, keys, length, dim), (2, keys, length, dim)]
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in made]


def value_and_gradients(compute, inputs, mask, **own):
    """Output and gradients of the inputs and of what is given by name and learns."""
    out = compute(*inputs, mask, **own)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learned = [x for x in own.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return out, *torch.autograd.grad(out, [*inputs, *learned], upstream.to(out.dtype))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = (t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
        self.elements = max([self.elements, *found])
        return out


@contextmanager
def kept():
    """Elements of each storage that autograd keeps for the backward: storage -> elements."""
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
