"""Check that this machine has what an Accelerate config asks for, before anything is made.

    python scripts/machine.py --config_file accelerate_configs/single_gpu.yaml

`accelerate launch` answers a broken config with a traceback, and trains on the CPU where a GPU is
asked for and missing, several processes without knowing of each other. The launchers ask here
first; train.py and infer.py ask `check_devices`, whoever started them. What is printed are options
that go with the config: the nodes of a SLURM job of several, the threads of processes on CPUs.
"""

import math
import os
import shutil
from pathlib import Path

from exit_codes import ArgumentParser, UserError, run

USE_OURS = "give one of accelerate_configs/"
CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
SHARED_MEMORY = Path("/dev/shm")
CACHES = ("inactive_file", "active_file", "slab_reclaimable")  # in memory.stat
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
DEEPSPEED = "DeepSpeed, whose ZeRO-3 cannot hold 4-bit weights"
MEGATRON = "Megatron-LM"
PARALLELISM = "parallelism within a layer or a sequence"
COMPILING = "a compiled model (dynamo)"
UNSUPPORTED_TYPES = {"DEEPSPEED": DEEPSPEED, "MEGATRON_LM": MEGATRON, "XLA": "TPUs", "TPU": "TPUs"}
# Accelerate starts these through MPI alone, and without it one process, which knows of no other.
UNSUPPORTED_TYPES["MULTI_CPU"] = "MPI (for CPUs, MULTI_GPU with use_cpu: true does without)"
UNSUPPORTED_SECTIONS = {"deepspeed_config": DEEPSPEED, "megatron_lm_config": MEGATRON}
UNSUPPORTED_SECTIONS |= {"fp8_config": "fp8", "parallelism_config": PARALLELISM}
UNSUPPORTED_SECTIONS |= {"dynamo_config": COMPILING, "mpirun_config": "MPI"}
# What `accelerate launch` makes of such a config, for whoever has not asked here first.
UNSUPPORTED_VARIABLES = {"ACCELERATE_USE_DEEPSPEED": DEEPSPEED}
UNSUPPORTED_VARIABLES |= {"ACCELERATE_USE_MEGATRON_LM": MEGATRON}
UNSUPPORTED_VARIABLES |= {"ACCELERATE_USE_PARALLELISM_CONFIG": PARALLELISM}
YES = ("1", "true", "yes", "y", "on", "t")
BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86, the last of ARM
SLOW_IN_BF16 = "this CPU multiplies bf16 slowly"
IN_FP32 = "all but 4-bit weights is in fp32"


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--config_file", required=True, help="of accelerate launch")
    return parser.parse_args(argv)


def main(argv=None):
    file = parse_args(argv).config_file
    if not Path(file).is_file():
        raise UserError(file, "there is no such file", USE_OURS)
    import yaml

    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(file, f"not valid YAML ({error})", USE_OURS) from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise UserError(file, "not a config of Accelerate", USE_OURS)
    check_supported(file, config)
    check_names(file, config)
    processes, machines = config.get("num_processes"), config.get("num_machines", 1)
    if type(processes) is not int or type(machines) is not int or not 1 <= machines <= processes:
        problem = f"num_processes is {processes} on num_machines {machines}"
        raise UserError(file, problem, "give a process for each GPU")
    if processes % machines:
        problem = f"num_processes is {processes}, which {machines} machines cannot share evenly"
        raise UserError(file, problem, "give each as many")
    if config["distributed_type"] in ("NO", False) and processes > 1:  # YAML has a bare NO as False
        problem = f"of {processes} processes, Accelerate starts one where distributed_type is NO"
        raise UserError(file, problem, "use accelerate_configs/multi_gpu.yaml")
    nodes = num_nodes()
    if nodes > 1 and machines == 1:
        problem = f"the config is for one machine and the job has {nodes} nodes"
        # FSDP is for one machine; in the other config each GPU has the whole model.
        fsdp = config["distributed_type"] == "FSDP"
        other = "" if fsdp else "accelerate_configs/multi_node.yaml, or "
        raise UserError(file, problem, f"use {other}one node")
    if nodes == 1 and machines > 1:
        problem = f"the config is for {machines} machines and there is one"
        raise UserError(file, problem, f"start it with sbatch --nodes {machines}")
    if not config.get("use_cpu"):
        check_gpus(file, processes // machines, machines)
    options = []
    if nodes > 1:
        options += [f"--num_machines {nodes} --num_processes {processes // machines * nodes}"]
    if config.get("use_cpu") and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _whole_cores() * machines // processes)
        options += [f"--num_cpu_threads_per_process {threads}"]
    if options:
        print(*options)


def _whole_cores() -> int:
    """Return how many whole cores this process may use. (Accelerate would start threads for all of
    the machine, and say so each time.)"""
    import psutil

    logical = os.cpu_count() or 1
    return num_cores() * (psutil.cpu_count(logical=False) or logical) // logical


def num_cores() -> int:
    """Return how many cores this process may use, two of which may be threads of one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_nodes() -> int:
    """Return how many nodes SLURM gave to this job, or to this step of it; 1 without SLURM."""
    nodes = os.environ.get("SLURM_NNODES", "")
    return int(nodes) if nodes.isdecimal() else 1


def check_supported(file: str, config: dict) -> None:
    """Refuse what a config of Accelerate may ask for and the scripts do not do.

    Raises:
        UserError: as said.
    """
    kind = config["distributed_type"]
    wants = UNSUPPORTED_TYPES.get(kind) if isinstance(kind, str) else None
    if config.get("compute_environment") == "AMAZON_SAGEMAKER":
        wants = "Amazon SageMaker"
    for section, what in UNSUPPORTED_SECTIONS.items():
        section = config.get(section)
        if section and section != {"dynamo_backend": "NO"}:
            wants = wants or what
    if wants:
        raise UserError(file, f"it asks for {wants}, which is not supported", USE_OURS)
    if str(config.get("mixed_precision", "no")).lower() in ("fp8", "fp16"):
        problem = f"it asks for {config['mixed_precision']}, and the scripts know bf16 and fp32"
        raise UserError(file, problem, "leave mixed_precision to their option")


def check_names(file: str, config: dict) -> None:
    """Refuse options and kinds of processes that Accelerate does not know.

    Its own reader is asked only about what is in none of accelerate_configs/, for it imports torch.

    Raises:
        UserError: as said.
    """
    import yaml

    ours = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.glob("*.yaml")]
    kinds = {known["distributed_type"] for known in ours}
    if config.keys() <= set().union(*ours) and config["distributed_type"] in kinds:
        return
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(file)
    except (ValueError, TypeError) as error:
        raise UserError(file, f"Accelerate does not take it ({error})", USE_OURS) from None


def check_devices() -> None:
    """Refuse to run otherwise than whoever launched this process has asked for.

    Started by plain `python`, nobody has asked: Accelerate takes a GPU if there is one.

    Raises:
        UserError: Accelerate was told to do what the scripts do not, the job has more nodes than
            the run has processes, there are fewer GPUs than processes on this machine, or no room
            in the shared memory through which NCCL lets them talk.
    """
    for variable, what in UNSUPPORTED_VARIABLES.items():
        if os.environ.get(variable, "").lower() in YES:
            raise UserError(variable, f"it asks for {what}, which is not supported", USE_OURS)
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError("ACCELERATE_MIXED_PRECISION", "fp8 is not supported", USE_OURS)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO") != "NO":
        problem = f"it asks for {COMPILING}, which is not supported"
        raise UserError("ACCELERATE_DYNAMO_BACKEND", problem, USE_OURS)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes < num_nodes():  # each node would train a model of its own
        problem = f"the job has {num_nodes()} nodes, and this run {processes} process(es)"
        advice = "start it by the launchers, or with SLURM_NNODES=1 on this node alone"
        raise UserError("SLURM_NNODES", problem, advice)
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower()  # set by a launch of one process
    if use_cpu in YES:
        return
    # Set by torchrun, and so by a launch of several. Without GPUs, each would take itself for the
    # only process, and all would write to the same folder.
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if wanted := on_this_machine or int(use_cpu != ""):
        check_gpus("accelerate launch", wanted)
    if wanted > 1 and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < 1 << 20:
        raise UserError(
            SHARED_MEMORY,
            "full, and the processes exchange gradients through it",
            "make room there; a container gets more by --ipc=host or --shm-size=1g",
        )


def check_gpus(where: str, wanted: int, machines: int = 1) -> None:
    """Refuse to go on with fewer GPUs than `wanted` on each of so many machines.

    Raises:
        UserError: as said.
    """
    import torch

    found = torch.accelerator.device_count()
    if found < wanted:
        asked = "a GPU" if wanted == 1 else f"{wanted} GPUs"
        there = {0: "there is none", 1: "there is 1"}.get(found, f"there are {found}")
        advice = (
            f"set num_processes to {found * machines}"
            if found
            else "use accelerate_configs/cpu.yaml"
        )
        raise UserError(where, f"the config asks for {asked} and {there}", advice)


def bf16_pays(on_cpu: bool = False) -> bool:
    """Return whether products are faster in bf16 than in fp32 where this process computes.

    GPUs are taken to be so, and CPUs with instructions for it are. On others, torch takes 2 times
    as long, with AVX2 alone 50 times and more (pytorch issues 118499 and 146508).

    Args:
        on_cpu: ask of the CPU, even if this process would compute on a GPU.
    """
    import torch

    on_cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES
    if not on_cpu and torch.accelerator.is_available():
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_PRODUCTS)


def free_memory(device) -> int:
    """Return the bytes of a torch device that this process has free or can have.

    Of a GPU, what nobody has and what torch keeps without using it; of a machine's memory, or of
    what a job or container may take of it, an equal share for each process on it.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # Accelerate's

    available = min(psutil.virtual_memory().available, _left_by_control_groups())
    return int(available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resident_memory(device) -> int:
    """Return the bytes of memory that this process takes, with the pages of files that it has read;
    0 on a GPU, where no more than tensors are counted."""
    if device.type == "cuda":
        return 0
    import psutil

    return psutil.Process().memory_info().rss


def _left_by_control_groups() -> float:
    """Return the bytes that this process may still take by the limits of its control groups, such
    as those of `sbatch --mem` or of a container (the kernel's cgroups, version 1 or 2)."""
    left = math.inf
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            top, limit, usage = CONTROL_GROUPS / "memory", "limit_in_bytes", "usage_in_bytes"
        elif not controllers:
            top, limit, usage = CONTROL_GROUPS, "max", "current"
        else:
            continue
        group = top / path.lstrip("/")
        # A limit holds for all below it. In a container, the group itself may be out of sight.
        for folder in (group, *group.parents)[: len(group.relative_to(top).parts) + 1]:
            try:
                room = int((folder / f"memory.{limit}").read_text())
                room -= int((folder / f"memory.{usage}").read_text())
            except (OSError, ValueError):  # not there; "max": no limit
                continue
            stat = folder / "memory.stat"
            rows = stat.read_text().splitlines() if stat.exists() else ()
            found = {name: int(value) for name, value in map(str.split, rows)}
            # What is cached of files goes when memory is asked for, as psutil counts it too.
            cached = (found.get(f"total_{name}", found.get(name, 0)) for name in CACHES)
            left = min(left, room + sum(cached))
    return max(0, left)


if __name__ == "__main__":
    run(main)
