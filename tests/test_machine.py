"""What an Accelerate config may ask for. Run: python -m pytest tests/test_machine.py

Whether its GPUs are there is tested in test_launchers.py.
"""

import argparse
import contextlib
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, SCRIPTS

import machine
from exit_codes import UserError

USE_OURS = "give one of accelerate_configs/"
DEEPSPEED = "it asks for DeepSpeed, whose ZeRO-3 cannot hold 4-bit weights, which is not supported"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return a function that has a config checked, and returns the complaint."""
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    file = tmp_path / "config.yaml"

    def run(config="multi_gpu", nodes=None, **changes) -> str | None:
        content = yaml.safe_load((ROOT / f"accelerate_configs/{config}.yaml").read_text())
        file.write_text(yaml.safe_dump(content | changes))
        if nodes:
            monkeypatch.setenv("SLURM_NNODES", str(nodes))
        try:
            machine.main(["--config_file", str(file)])
        except UserError as error:
            return str(error).removeprefix(f"{file}: ")

    return run


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"distributed_type": "DEEPSPEED"}, DEEPSPEED),
        ({"deepspeed_config": {"zero_stage": 3}}, DEEPSPEED),
        ({"distributed_type": "MEGATRON_LM"}, "it asks for Megatron-LM, which is not supported"),
        ({"distributed_type": "XLA"}, "it asks for TPUs, which is not supported"),
        (
            {"distributed_type": "MULTI_CPU"},
            "it asks for MPI (for CPUs, MULTI_GPU with use_cpu: true does without), which is not "
            "supported",
        ),
        (
            {"parallelism_config": {"parallelism_config_tp_size": 2}},
            "it asks for parallelism within a layer or a sequence, which is not supported",
        ),
        (
            {"dynamo_config": {"dynamo_backend": "INDUCTOR"}},
            "it asks for a compiled model (dynamo), which is not supported",
        ),
        ({"fp8_config": {"backend": "TE"}}, "it asks for fp8, which is not supported"),
        (
            {"compute_environment": "AMAZON_SAGEMAKER"},
            "it asks for Amazon SageMaker, which is not supported",
        ),
    ],
)
def test_what_the_scripts_do_not_do_is_refused(check, changes, problem):
    assert check(**changes) == f"{problem}; {USE_OURS}"


def test_precisions_that_the_scripts_do_not_know_are_refused(check):
    for precision in ("fp8", "fp16"):
        assert check(mixed_precision=precision) == (
            f"it asks for {precision}, and the scripts know bf16 and fp32; leave mixed_precision "
            "to their option"
        )


def test_what_accelerate_config_itself_writes_is_taken(check):
    """Its answers to all questions, where none of them asks for anything more."""
    dump = {"debug": False, "downcast_bf16": "no", "enable_cpu_affinity": False, "gpu_ids": "all"}
    dump |= {"main_training_function": "main", "mixed_precision": "bf16", "rdzv_backend": "static"}
    dump |= {"same_network": True, "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False}
    dump |= {"dynamo_config": {"dynamo_backend": "NO"}, "fp8_config": {}}
    assert check(**dump) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_proceses": 4}, r"had unknown keys \(\['num_proceses'\]\)"),
        ({"distributed_type": "MULTI_GPUS"}, "'MULTI_GPUS' is not a valid DistributedType"),
    ],
)
def test_what_accelerate_does_not_know_is_refused(check, changes, said):
    assert re.match(f"Accelerate does not take it \\(.*{said}.*; {USE_OURS}$", check(**changes))


@pytest.mark.parametrize("kind", ["NO", False])  # without quotes, YAML makes the latter of it
def test_several_processes_of_which_accelerate_would_start_one_are_refused(check, kind):
    assert check("cpu", distributed_type=kind, num_processes=2) == (
        "of 2 processes, Accelerate starts one where distributed_type is NO; use "
        "accelerate_configs/multi_gpu.yaml"
    )


@pytest.mark.parametrize(("nodes", "processes", "options"), [(2, 8, "2 8"), (3, 8, "3 12")])
def test_the_nodes_of_a_job_take_the_place_of_those_of_the_config(
    check, capsys, nodes, processes, options
):
    assert check("multi_node", nodes, num_processes=processes) is None
    machines, processes = options.split()
    printed = capsys.readouterr().out
    assert printed == f"--num_machines {machines} --num_processes {processes}\n"


def test_a_job_with_more_or_fewer_nodes_than_the_config_can_have_is_refused(check, capsys):
    assert check("multi_node") == (
        "the config is for 2 machines and there is one; start it with sbatch --nodes 2"
    )
    assert check("multi_gpu", nodes=2) == (
        "the config is for one machine and the job has 2 nodes; use "
        "accelerate_configs/multi_node.yaml, or one node"
    )
    assert check("fsdp", nodes=2) == (
        "the config is for one machine and the job has 2 nodes; use one node"
    )
    assert check("multi_node", nodes=2, num_processes=3) == (
        "num_processes is 3, which 2 machines cannot share evenly; give each as many"
    )
    assert check("multi_node", nodes=2, num_processes=32) == (
        "the config asks for 16 GPUs and there are 8; set num_processes to 16"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, f"ACCELERATE_USE_DEEPSPEED: {DEEPSPEED}"),
        (
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            "ACCELERATE_USE_MEGATRON_LM: it asks for Megatron-LM, which is not supported",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
            "ACCELERATE_USE_PARALLELISM_CONFIG: it asks for parallelism within a layer or a "
            "sequence, which is not supported",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            "ACCELERATE_MIXED_PRECISION: fp8 is not supported",
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "ACCELERATE_DYNAMO_BACKEND: it asks for a compiled model (dynamo), which is not "
            "supported",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, None),
    ],
)
def test_whoever_launches_otherwise_is_told_the_same(monkeypatch, variables, complaint):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if complaint is None:
        machine.check_devices()
        return
    with pytest.raises(UserError) as error:
        machine.check_devices()
    assert str(error.value) == f"{complaint}; {USE_OURS}"


@pytest.mark.parametrize(
    ("nodes", "processes", "refused"),
    [("2", None, True), ("2", "1", True), ("2", "2", False), ("1", None, False), ("", "1", False)],
)
def test_a_world_of_one_on_each_of_several_nodes_is_refused(monkeypatch, nodes, processes, refused):
    monkeypatch.setenv("SLURM_NNODES", nodes)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError) if refused else contextlib.nullcontext() as error:
        machine.check_devices()
    if refused:
        assert str(error.value) == (
            "SLURM_NNODES: the job has 2 nodes, and this run 1 process(es); start it by the "
            "launchers, or with SLURM_NNODES=1 on this node alone"
        )


@pytest.mark.parametrize(
    ("gpu", "variable", "on_cpu", "found", "pays"),
    [
        (False, None, False, {"avx512_bf16": True}, True),
        (False, None, False, {"amx_bf16": True}, True),
        (False, None, False, {"architecture": "aarch64", "bf16": True}, True),
        (False, None, False, {"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        (True, None, False, {}, True),
        (True, "false", False, {}, True),
        (True, "True", False, {}, False),
        (True, None, True, {}, False),
    ],
)
def test_bf16_pays_where_there_are_instructions_for_it(
    monkeypatch, gpu, variable, on_cpu, found, pays
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if variable:
        monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
    assert machine.bf16_pays(on_cpu) == pays


def test_what_torch_says_of_this_cpu_has_the_names_that_are_asked_for():
    import torch

    found = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16") if found["architecture"] == "x86_64" else ("bf16",)
    assert all(type(found[name]) is bool for name in names)


def test_no_complaint_waits_for_torch(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("distributed_type: DEEPSPEED\nnum_processes: 2\n")
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import machine, exit_codes\n"
    code += f"try: machine.main(['--config_file', {str(file)!r}])\n"
    code += "except exit_codes.UserError: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_never_spread_over_devices_by_itself():
    """One process, one device: `device_map="auto"` under several would be another run."""
    text = "\n".join(path.read_text() for path in SCRIPTS.glob("*.py"))
    assert text.count("device_map=") == 1
    assert 'device_map={"": ' in text  # one device for all of it


VERSION_1 = ("4:memory:{}\n0::/\n", "memory", "limit_in_bytes", "usage_in_bytes", "total_")
VERSION_2 = ("0::{}\n", "", "max", "current", "")
GIB = 1 << 30


@pytest.mark.parametrize("version", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
def test_memory_is_what_a_job_or_container_may_take(tmp_path, monkeypatch, version):
    """Of a machine with 64 GiB free: `sbatch --mem=8G`, of which 3 are taken and 1 is of files."""
    groups, top, limit, usage, whole = version
    own, cpu = tmp_path / "groups", argparse.Namespace(type="cpu")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "OWN_GROUPS", own)
    monkeypatch.setattr("psutil.virtual_memory", lambda: argparse.Namespace(available=64 * GIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine.free_memory(cpu) == 64 * GIB  # no control groups at all

    def set_limit(path: str, most: int | None, used: int = 3 * GIB) -> None:
        folder = tmp_path / "fs" / top / path
        folder.mkdir(parents=True, exist_ok=True)
        unlimited = "max" if limit == "max" else str((1 << 63) - 4096)
        (folder / f"memory.{limit}").write_text(f"{unlimited if most is None else most}\n")
        (folder / f"memory.{usage}").write_text(f"{used}\n")
        stat = {"cache": 5, "inactive_file": 1, "active_file": 1}  # version 1: without those below
        stat |= {f"{whole}inactive_file": GIB // 4, f"{whole}active_file": 3 * GIB // 4}
        rows = (f"{name} {number}\n" for name, number in stat.items())
        (folder / "memory.stat").write_text("".join(rows))

    own.write_text(f"7:cpu:/other\n{groups.format('/slurm/job_7/step_0')}")
    for path, most in (("", None), ("slurm/job_7", 8 * GIB), ("slurm/job_7/step_0", None)):
        set_limit(path, most)
    assert machine.free_memory(cpu) == 6 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.free_memory(cpu) == 3 * GIB
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    set_limit("slurm/job_7/step_0", 7 * GIB)  # the lowest limit counts, wherever it is
    assert machine.free_memory(cpu) == 5 * GIB
    set_limit("slurm/job_7/step_0", 9 * GIB)
    assert machine.free_memory(cpu) == 6 * GIB
    (tmp_path / "fs" / top / "slurm/job_7/memory.stat").unlink()
    assert machine.free_memory(cpu) == 5 * GIB

    own.write_text(groups.format("/docker/7"))  # which a container sees as its top, unlimited here
    assert machine.free_memory(cpu) == 64 * GIB
    set_limit("", 3 * GIB)
    assert machine.free_memory(cpu) == 1 * GIB
    set_limit("", 3 * GIB, used=5 * GIB)
    assert machine.free_memory(cpu) == 0
