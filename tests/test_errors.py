from __future__ import annotations

import numpy as np
import pytest
import torch

from ldct_dist.errors import UserError, memory_for


def raising(error):
    raise error


LACKS = {
    "numpy": (lambda: np.empty(1 << 60, np.int8), r"memory ran out \(Unable to allocate 1\.00 EiB .*\)"),
    "python": (lambda: raising(MemoryError()), "memory ran out"),
    "torch": (
        lambda: torch.empty(1 << 50, dtype=torch.int8),
        r"memory ran out \(can't allocate memory: you tried to allocate 1125899906842624 bytes\)",
    ),
    "thread": (
        lambda: raising(RuntimeError("can't start new thread")),
        r"no other thread could be started \(too little memory, or ulimit -u is reached\)",
    ),
    "gpu": (
        lambda: raising(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 1 has 1 GiB. Of the")),
        r"CUDA out of memory\. Tried 2 GiB\. GPU 1 has 1 GiB",
    ),
}


@pytest.mark.parametrize(("take", "said"), LACKS.values(), ids=LACKS)
def test_memory_that_runs_out_is_one_line_that_names_what_it_was_for(take, said):
    with (
        pytest.raises(UserError, match=rf"^patient-7: {said}; take fewer$"),
        memory_for("patient-7", "take fewer"),
    ):
        take()


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), UserError("a mistake")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, memory_for("patient-7"):
        raise error
    assert raised.value is error
