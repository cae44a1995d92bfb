"""The Megatron-Core engine. Imported where it is chosen only: `megatron.core` takes seconds.

Megatron says four times, on every rank, that Transformer Engine and Apex are not there, and calls collectives by names
that torch is giving up: nothing that a user of ours could change.
"""

import warnings

for _text in (
    "(Transformer Engine and )?Apex (is|are) not installed",
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
):
    warnings.filterwarnings("ignore", _text)
