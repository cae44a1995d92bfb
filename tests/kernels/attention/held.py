"""What a forward keeps for its backward."""

import gc

import torch


def held_by(forward) -> int:
    """Bytes that live as long as forward()'s output: all that its graph saves, and what Python reaches from there."""
    gc.collect()
    before = {x.untyped_storage().data_ptr() for x in _tensors()}
    out = forward()
    gc.collect()
    found, waiting, met = list(_tensors()), [out.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        waiting += [other for other, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += list(getattr(node, "saved_tensors", ()))
        found += [x for x in torch.utils._pytree.tree_leaves(saved) if torch.is_tensor(x)]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(size for where, size in sizes.items() if where not in before)


def _tensors():
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
