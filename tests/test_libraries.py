"""libraries.py: what imports leave out. Run: python -m pytest tests/test_libraries.py"""

import gc
import os
import subprocess
import sys

import pytest
from conftest import SCRIPTS

from libraries import quick_imports

CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
SET_THERE = ("TORCHDYNAMO_DISABLE", *CACHES)


def printed(code: str, **more: str) -> str:
    """Return what Python prints of code that imports libraries.py in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in SET_THERE} | more
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPTS, env=env, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


def fail_to_import():
    with quick_imports():
        with quick_imports():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ImportError


def test_garbage_is_left_during_imports_alone():
    assert gc.isenabled()
    with pytest.raises(ImportError):
        fail_to_import()
    assert gc.isenabled()


def test_what_is_imported_is_not_looked_through_again():
    code = """
import gc, libraries
with libraries.quick_imports():
    import json
kept = gc.get_freeze_count()
with libraries.quick_imports():
    import json  # as it was, so that nothing else is kept either
print(kept > 1000, gc.get_freeze_count() == kept)
"""
    assert printed(code) == "True True"


def test_bitsandbytes_does_not_bring_torchs_compiler():
    """As it does without the line in libraries.py."""
    compiler = "torch._inductor.compile_fx"
    code = f"import sys, libraries, bitsandbytes; print({compiler!r} in sys.modules)"
    assert printed(code) == "False"


def test_kernels_of_ever_other_lengths_are_not_all_kept():
    """Where torch has bf16 kernels of oneDNN, each length brought some megabytes.

    How much, and how much free memory is kept besides, depends on the machine: both are measured.
    """
    code = """
import libraries, psutil, torch
from torch.nn.functional import scaled_dot_product_attention

torch.set_num_threads(2)  # each keeps its own

def resident_after(lengths):
    for length in lengths:
        q = torch.ones(1, 2, length, 64, dtype=torch.bfloat16, requires_grad=True)
        scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    return psutil.Process().memory_info().rss

before = resident_after(range(300, 400, 5))
print((resident_after(range(400, 600, 5)) - before) >> 20)
"""
    as_it_would_be = int(printed(code, **dict.fromkeys(CACHES, "1024")))  # MiB, of their defaults
    if as_it_would_be < 100:
        pytest.skip("torch has no such kernels for this CPU")
    assert int(printed(code)) < as_it_would_be / 3
