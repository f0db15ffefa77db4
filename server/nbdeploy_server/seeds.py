"""The same random seeds for live, clean and replica runs of a sample, with the process's own states put back after."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch (those already imported) for the length of the block."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    torch = sys.modules.get("torch")
    numpy_state = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else None
    torch_state = torch.get_rng_state() if torch is not None and hasattr(torch, "get_rng_state") else None
    cuda = torch is not None and torch_state is not None and torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if cuda and torch is not None else None
    random.seed(seed)
    if numpy is not None and numpy_state is not None:
        numpy.random.seed(seed)
    if torch is not None and torch_state is not None:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        if torch is not None and torch_state is not None:
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
