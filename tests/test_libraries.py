"""libraries.py: what imports leave out. Run: python -m pytest tests/test_libraries.py"""

import gc
import os
import subprocess
import sys

import pytest
from conftest import SCRIPTS

from libraries import quick_imports


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


def test_bitsandbytes_does_not_bring_torchs_compiler():
    """As it does without the line in libraries.py."""
    compiler = "torch._inductor.compile_fx"
    code = f"import sys, libraries, bitsandbytes; print({compiler!r} in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPTS, env=env, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().strip() == "False"


def test_kernels_of_ever_other_lengths_are_not_all_kept():
    """Where torch has bf16 kernels of oneDNN, each length brought some megabytes."""
    code = """
import libraries, psutil, torch
from torch.nn.functional import scaled_dot_product_attention

def resident_after(lengths):
    for length in lengths:
        q = torch.ones(1, 2, length, 64, dtype=torch.bfloat16, requires_grad=True)
        scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    return psutil.Process().memory_info().rss

before = resident_after(range(300, 400, 5))
print((resident_after(range(400, 600, 5)) - before) >> 20)
"""
    caches = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    env = {k: v for k, v in os.environ.items() if k not in caches}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPTS, env=env, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 25  # MiB; 100 to 200 without the lines in libraries.py
