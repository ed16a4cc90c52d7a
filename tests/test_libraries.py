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
