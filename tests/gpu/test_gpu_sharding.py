"""FSDP-QLoRA on GPUs, through NCCL. Run: python -m pytest -m gpu tests/gpu/test_gpu_sharding.py"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, byte_level_tokenizer, call, read_csv, save_tiny_model, train_args
from safetensors.torch import load_file

import infer
import merge
import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]
# Wide enough for weights to count beside what CUDA itself takes.
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 4, "num_hidden_layers": 4, "initializer_range": 0.02}
EPOCHS = ("--num_train_epochs", "4", "--lora_dropout", "0", "--checkpointing_steps", "3")
BATCH = "--per_device_train_batch_size"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("wide"), byte_level_tokenizer(), **WIDE)


def launch(processes: int, *argv) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs/fsdp.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += [str(ROOT / "scripts/train.py"), *map(str, argv)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def losses(run_dir) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter_model.safetensors")


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_qlora_trains_resumes_merges_and_is_read(wide_model, news, tmp_path, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"there is {torch.cuda.device_count()} GPU, not {processes}")
    run_dir, alone, again = (tmp_path / name for name in ("run", "alone", "again"))
    argv = (*EPOCHS, BATCH, 4 // processes)
    printed = launch(processes, *train_args(wide_model, news, run_dir, *argv))
    assert "on cuda" in printed
    assert f"spread over {processes} processes" in printed
    call(train.main, *train_args(wide_model, news, alone, *EPOCHS, BATCH, 4))

    # LoRA begins as zero whatever its random half, so that the first losses are of the base: as
    # NF4 was made on a CPU here, and on the GPU there.
    assert losses(run_dir)[0] == pytest.approx(losses(alone)[0], rel=0.01)
    assert losses(run_dir)[-1] == pytest.approx(losses(alone)[-1], rel=0.2)
    assert losses(run_dir)[-1] < losses(run_dir)[0]
    form = [{k: (t.shape, t.dtype) for k, t in weights(r).items()} for r in (run_dir, alone)]
    assert form[0] == form[1]

    shutil.copytree(run_dir, again)
    step = ("--resume_from_checkpoint", again / "checkpoints/step-000003")
    launch(processes, *train_args(wide_model, news, again, *argv, *step))
    assert losses(again) == pytest.approx(losses(run_dir), rel=0.01)

    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "merged")
    for name in ("run", "merged"):
        output = ("--output_file", tmp_path / f"{name}.csv")
        call(infer.main, "--run_dir", tmp_path / name, "--input_file", news / "test.csv", *output)
        assert len(read_csv(tmp_path / f"{name}.csv")) == 9


def test_a_sharded_base_goes_through_the_gpu_a_layer_at_a_time(wide_model, tmp_path):
    """What `shard` takes at its peak stays well below all of the base, in bf16 for it to count."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE.format(scripts=str(ROOT / "scripts"), folder=str(wide_model)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    asked |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    result = subprocess.run(
        [*command, str(probe)], capture_output=True, text=True, env=os.environ | asked, timeout=300
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    before, peak, after, layer = json.loads(result.stdout.splitlines()[-1])
    assert before < layer / 4  # loaded in main memory
    assert peak - after < 2.5 * layer  # one layer as it came, beside its shard


PROBE = """
import json, sys
sys.path.insert(0, {scripts!r})
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from modeling import load_base
from sharding import fsdp_plugin, layers_of, shard, enable_fsdp

plugin = fsdp_plugin()
accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
assert enable_fsdp(accelerator, plugin)
base = load_base({folder!r}, accelerator.device, torch.bfloat16, False, True)
layer = sum(parameter.nbytes for parameter in layers_of(base)[0].parameters())
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
adamw = torch.optim.AdamW(trainable, fused=True)
before = torch.cuda.memory_allocated()
shard(accelerator, model, adamw, {folder!r})
figures = before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), layer
print(json.dumps(figures))
accelerator.end_training()
"""
