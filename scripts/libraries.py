"""What the libraries must not do, and how their import takes less time."""

import gc
import logging
import os
import sys
from contextlib import contextmanager

# With this package, bitsandbytes at its import, and transformers for a config.json that asks for
# it, fetch compiled code from the Hub and run it. None makes both believe that there is none.
sys.modules["kernels"] = None
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which warns that there is none
# bitsandbytes hands functions that are hardly ever called here to torch.compile, and that imports
# torch's compiler, a seventh of all imports. Nothing here is compiled.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# On a CPU, torch and oneDNN keep a kernel for each size of a product, the last 1,024 of each thread
# and 1,024 in all. Attention has other sizes for each length that it meets: 4 MB, by two threads.
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")


@contextmanager
def quick_imports():
    """Import without looking for garbage meanwhile, which takes a seventh of the time: what is
    imported stays. Nor is it looked through later, which takes a quarter of a second each time: so
    it is to be done before a model is loaded, whose garbage would stay too."""
    enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if enabled:
            gc.enable()
