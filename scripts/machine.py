"""Check that this machine has what an Accelerate config asks for, before anything is made.

    python scripts/machine.py --config_file accelerate_configs/single_gpu.yaml

`accelerate launch` answers a broken config with a traceback, and trains on the CPU where a GPU is
asked for and missing, several processes without knowing of each other. The launchers ask here
first; train.py and infer.py ask `check_devices`, whoever started them.
"""

import argparse
import os
import shutil
from pathlib import Path

from exit_codes import UserError, run

USE_OURS = "give one of accelerate_configs/"
SHARED_MEMORY = Path("/dev/shm")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config_file", required=True, help="of accelerate launch")
    return parser.parse_args(argv)


def main(argv=None):
    file = parse_args(argv).config_file
    if not Path(file).is_file():
        raise UserError(file, "there is no such file", USE_OURS)
    # Not by Accelerate's own reader, which imports torch: no answer should wait for that in vain.
    import yaml

    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(file, f"not valid YAML ({error})", USE_OURS) from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise UserError(file, "not a config of Accelerate", USE_OURS)
    processes, machines = config.get("num_processes"), config.get("num_machines", 1)
    if type(processes) is not int or type(machines) is not int or not 1 <= machines <= processes:
        problem = f"num_processes is {processes} on num_machines {machines}"
        raise UserError(file, problem, "give a process for each GPU")
    if not config.get("use_cpu"):
        check_gpus(file, processes // machines)


def check_devices() -> None:
    """Refuse to run on a CPU where whoever launched this process asked for a GPU.

    Started by plain `python`, nobody has asked: Accelerate takes a GPU if there is one.

    Raises:
        UserError: as said, or there are fewer GPUs than processes on this machine, or no room in
            the shared memory through which NCCL lets them talk.
    """
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower()  # set by a launch of one process
    if use_cpu in ("1", "true", "yes", "y", "on", "t"):
        return
    # Set by torchrun, and so by a launch of several. Without GPUs, each would take itself for the
    # only process, and all would write to the same folder.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if wanted := processes or int(use_cpu != ""):
        check_gpus("accelerate launch", wanted)
    if wanted > 1 and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < 1 << 20:
        raise UserError(
            SHARED_MEMORY,
            "full, and the processes exchange gradients through it",
            "make room there; a container gets more by --ipc=host or --shm-size=1g",
        )


def check_gpus(where: str, wanted: int) -> None:
    """Refuse to go on with fewer GPUs than `wanted`.

    Raises:
        UserError: as said.
    """
    import torch

    found = torch.accelerator.device_count()
    if found < wanted:
        asked = "a GPU" if wanted == 1 else f"{wanted} GPUs"
        there = {0: "there is none", 1: "there is 1"}.get(found, f"there are {found}")
        advice = f"set num_processes to {found}" if found else "use accelerate_configs/cpu.yaml"
        raise UserError(where, f"the config asks for {asked} and {there}", advice)


def free_memory(device) -> int:
    """Return the bytes of a torch device that this process has free or can have.

    Of a GPU, what nobody has and what torch keeps without using it; of a machine's memory, an equal
    share for each process on it.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # Accelerate's

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


if __name__ == "__main__":
    run(main)
