"""sharding.py: two processes with half of the model each. Run: pytest tests/test_sharding.py

Real processes over gloo, as `accelerate launch` starts them with accelerate_configs/fsdp.yaml; the
4-bit weights are real too.
"""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, SCRIPTS, call, read_csv, train_args
from test_distributed import start_two
from test_families import SIZES, Family, save
from test_train import EXACT, adapter, difference, metrics, updates

import infer
import merge
import sharding
import train
from exit_codes import STOPPED, UserError

LORA = (*EXACT, "--base_weights", "bf16")  # in fp32, on the base as it is


def launch(script, *argv, processes=2, fails=False, **env) -> str:
    """Return what the processes of fsdp.yaml print, started by the true command."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs/fsdp.yaml")]
    command += ["--num_processes", str(processes), str(script)]
    result = subprocess.run(
        [*command, *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"} | env,
        timeout=300,
    )
    assert (result.returncode != 0) == fails, f"{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def run_two(script, *argv, code=0, **env) -> None:
    """Run two processes of fsdp.yaml by what the true command would tell them, which takes less."""
    config = yaml.safe_load((ROOT / "accelerate_configs/fsdp.yaml").read_text())["fsdp_config"]
    told = {name.upper(): str(value) for name, value in config.items()}
    processes = start_two(script, *argv, ACCELERATE_USE_FSDP="true", **told, **env)
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [code, code], printed


def split(processes: int) -> tuple:
    batch = {1: 4, 2: 2}[processes]
    return ("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 2)


@pytest.fixture(scope="module")
def runs(tiny_model, rows_17, tmp_path_factory):
    """The same training by one process and sharded over two, and what the latter printed."""
    folder = tmp_path_factory.mktemp("shards")
    call(train.main, *train_args(tiny_model, rows_17, folder / "1", *LORA, *split(1)))
    argv = train_args(tiny_model, rows_17, folder / "2", *LORA, *split(2))
    return folder, launch(SCRIPTS / "train.py", *argv)


def test_shards_train_the_same_adapter(runs):
    folder, printed = runs
    assert "2 per device x 2 accumulated x 2 processes" in printed
    assert "torch's AdamW, by the rule of PagedAdamW32bit" in printed
    assert "GiB expected at the peak of each of 2 processes" in printed
    assert [row["articles"] for row in updates(folder / "2")] == [8, 8, 1]
    for one, two in zip(updates(folder / "1"), updates(folder / "2"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        for name in ("learning_rate", "title_tokens", "tokens", "articles"):
            assert two[name] == one[name]
    one, two = adapter(folder / "1"), adapter(folder / "2")
    assert difference(two, one) < 1e-3
    form = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (one, two)]
    assert form[0] == form[1]
    files = [{path.relative_to(folder / n) for path in (folder / n).rglob("*")} for n in "12"]
    assert files[0] == files[1]
    configs = [(folder / n / "adapter_config.json").read_bytes() for n in "12"]
    assert configs[0] == configs[1]


def test_shards_evaluate_each_row_once(runs):
    """Seven rows and three titles: one process has a row and a title more than the other."""
    one, two = ([r for r in metrics(runs[0] / n) if "eval_loss" in r] for n in ("1", "2"))
    assert len(one) == len(two) == 1
    assert two[0]["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-4)
    assert two[0]["eval_rougeL"] == pytest.approx(one[0]["eval_rougeL"], rel=1e-4)
    assert runs[1].count("written:") == 3


def test_what_was_trained_in_shards_is_read_and_merged(runs, rows_17, tmp_path):
    titles = {}
    for name in ("1", "2"):
        run_dir, merged = runs[0] / name, tmp_path / f"merged{name}"
        call(merge.main, "--run_dir", run_dir, "--output_dir", merged, "--base", "original")
        for source in (run_dir, merged):
            output = tmp_path / f"{source.name}.csv"
            given = ("--input_file", rows_17 / "validation.csv", "--base_weights", "fp32")
            call(infer.main, "--run_dir", source, *given, "--output_file", output)
            titles[source.name] = [row["titles"] for row in read_csv(output)]
    assert len(titles["1"]) == 7
    assert titles["1"] == titles["2"]
    assert titles["merged1"] == titles["merged2"]


PROBE = """
import json, os, sys
sys.path.insert(0, {scripts!r})
import train
from torch.distributed.tensor import DTensor

original, seen = train.title_loss, dict()

def title_loss(model, batch):
    seen["model"] = model
    return original(model, batch)

train.title_loss = title_loss
train.main({argv!r})
shards = dict()
for name, parameter in seen["model"].named_parameters():
    if ".layers." in name:
        assert isinstance(parameter, DTensor), name
        local = parameter.to_local()
        shards[name] = [parameter.numel(), local.numel(), str(local.dtype)]
with open({out!r} + os.environ["RANK"], "w") as stream:
    json.dump(shards, stream)
"""


@pytest.fixture(scope="module")
def nf4_run(tiny_llama2, rows_17, tmp_path_factory):
    """QLoRA in shards with all that there is, and what each process had of it in the end."""
    folder = tmp_path_factory.mktemp("nf4")
    more = ("--activation_checkpointing", "full", "--checkpointing_steps", 1, "--lora_dropout", 0.1)
    # One title: the second process has none to write.
    more += ("--max_train_steps", 3, "--num_eval_titles", 1, *split(2))
    argv = train_args(tiny_llama2, rows_17, folder / "run", *more)
    (folder / "probe.py").write_text(
        PROBE.format(scripts=str(SCRIPTS), argv=argv, out=str(folder / "rank"))
    )
    run_two(folder / "probe.py")
    return folder, argv


def test_each_process_has_half_of_the_4_bit_base_and_of_the_adapter(nf4_run):
    folder, _ = nf4_run
    ranks = [json.loads((folder / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert sum("lora_" in name for name in ranks[0]) == 28
    for name, (whole, local, dtype) in ranks[0].items():
        assert local + ranks[1][name][1] == whole
        assert abs(local - ranks[1][name][1]) <= whole / 64  # rows are not halved
        assert dtype == ("torch.float32" if "lora_" in name else "torch.bfloat16")
    # Two 4-bit weights pass for one of 16 bits.
    query = next(
        v for name, v in ranks[0].items() if name.endswith("0.self_attn.q_proj.base_layer.weight")
    )
    assert query[0] == 64 * 64 / 4


def test_a_sharded_run_that_was_asked_to_stop_ends_with_the_same_bytes(nf4_run, tmp_path):
    folder, argv = nf4_run
    run_dir, stop, code = (tmp_path / name for name in ("run", "stop", "code"))
    argv = [str(run_dir) if arg == str(folder / "run") else arg for arg in argv]
    stop.touch()
    asked = {"STOP_FILE": str(stop), "EXIT_CODE_FILE": str(code)}
    run_two("train.py", *argv, code=STOPPED, **asked)
    assert code.read_text() == f"{STOPPED}\n"
    assert len(updates(run_dir)) == 1
    run_two("train.py", *argv, "--resume_from_checkpoint", "latest")
    for name in ("adapter_model.safetensors", "checkpoints/step-000003/optimizer.safetensors"):
        assert (run_dir / name).read_bytes() == (folder / "run" / name).read_bytes()
    assert len(updates(run_dir)) == 3


def test_one_process_goes_on_from_a_sharded_checkpoint(runs, tiny_model, rows_17, tmp_path):
    """With moments that fit: the adapter ends as that of one process, up to rounding."""
    run_dir, epochs = tmp_path / "run", ("--num_train_epochs", 2, "--num_eval_titles", 1)
    shutil.copytree(runs[0] / "2", run_dir)
    latest = ("--resume_from_checkpoint", "latest", "--resume_anyway")
    call(train.main, *train_args(tiny_model, rows_17, run_dir, *LORA, *split(1), *epochs, *latest))
    alone = train_args(tiny_model, rows_17, tmp_path / "alone", *LORA, *split(1), *epochs)
    call(train.main, *alone)
    assert difference(adapter(run_dir), adapter(tmp_path / "alone")) < 1e-3


# ---------------------------------------------------------------------- what is refused


def with_adapter(folder, nf4, shardable=False):
    from peft import LoraConfig, get_peft_model

    from modeling import load_base

    base = load_base(str(folder), torch.device("cpu"), torch.bfloat16, nf4, shardable)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))


def test_shards_may_be_of_bf16_and_4_bits_beside_an_adapter_in_fp32(tiny_model):
    model = with_adapter(tiny_model, nf4=True, shardable=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    sharding.check_dtypes(model, tiny_model)


def test_4_bit_weights_in_bytes_are_refused(tiny_model):
    model = with_adapter(tiny_model, nf4=True, shardable=False)
    with pytest.raises(UserError, match=r"q_proj\S* is stored as torch.uint8, which FSDP would"):
        sharding.check_dtypes(model, tiny_model)


def test_an_adapter_of_two_types_is_refused(tiny_model):
    model = with_adapter(tiny_model, nf4=False)
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weight.data = weight.data.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"several types \(torch.bfloat16, torch.float32\)"):
        sharding.check_dtypes(model, tiny_model)


def test_a_base_that_was_quantized_before_is_refused(tiny_model, rows_17, tmp_path):
    """Its 4-bit weights are stored in bytes, whatever this project asks for."""
    from modeling import load_base
    from prompting import load_tokenizer

    model = load_base(str(tiny_model), torch.device("cpu"), torch.bfloat16, nf4=True)
    model.save_pretrained(tmp_path / "quantized")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "quantized")
    argv = train_args(tmp_path / "quantized", rows_17, tmp_path / "run")
    more = {"processes": 1, "fails": True, "EXIT_CODE_FILE": str(tmp_path / "code")}
    printed = launch(SCRIPTS / "train.py", *argv, **more)
    assert printed.count("error:") == 1
    assert "is stored as torch.uint8, which FSDP would leave whole on every card" in printed
    assert (tmp_path / "code").read_text() == "2\n"


ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ASKED |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def test_the_config_is_what_is_counted_on(monkeypatch):
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    sharding.check_fsdp_config()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("FSDP_VERSION", "1", "fsdp_version 1: a layer's"),
        ("FSDP_VERSION", None, "fsdp_version 1: a layer's"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "fsdp_auto_wrap_policy NO_WRAP: all"),
        ("FSDP_AUTO_WRAP_POLICY", None, "fsdp_auto_wrap_policy no_wrap: all"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward false: all layers"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading true: weights"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params true: that"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing true: --activ"),
    ],
)
def test_other_settings_of_fsdp_are_refused(monkeypatch, name, value, problem):
    for key, setting in (ASKED | {name: value}).items():
        monkeypatch.delenv(key, raising=False)
        if setting is not None:
            monkeypatch.setenv(key, setting)
    with pytest.raises(UserError, match=problem) as error:
        sharding.check_fsdp_config()
    config = yaml.safe_load((ROOT / "accelerate_configs/fsdp.yaml").read_text())["fsdp_config"]
    wanted = str(config.get(problem.split()[0], False)).lower()
    assert str(error.value).endswith(f"; give {wanted}, as accelerate_configs/fsdp.yaml does")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    sharding.check_fsdp_config()


def test_nothing_is_cast_though_accelerate_is_told_of_bf16(monkeypatch):
    """Gradients are summed in fp32, as the adapter is; a CPU would not show it, for Accelerate
    tells the plugin there of no precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    assert sharding.fsdp_plugin() is None
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    plugin = sharding.fsdp_plugin()
    plugin.set_mixed_precision("bf16")  # as `Accelerator(mixed_precision="bf16")` does on a GPU
    assert plugin.fsdp_version == 2
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(None, None, None)


@pytest.mark.parametrize("given", [None, ["LlamaMLP"]])
def test_what_is_sharded_are_the_layers_that_are_there_inside_of_the_wrapper(tiny_model, given):
    """Some families name layers too that a model of text alone has not."""
    model = with_adapter(tiny_model, nf4=True, shardable=True)
    inner = model.get_base_model()
    inner._no_split_modules = ["LlamaDecoderLayer", "LlamaVisionLayer"]
    linear = inner.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    linear.quant_state = None
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=given)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, prepare=lambda *objects: objects)
    assert sharding.shard(accelerator, model, "optimizer", tiny_model) == (inner, "optimizer")
    assert plugin.transformer_cls_names_to_wrap == (given or ["LlamaDecoderLayer"])
    # Its weight will be an ordinary tensor, which cannot say how it was quantized.
    assert linear.quant_state is linear.weight.quant_state


def test_a_single_process_of_no_launcher_is_refused(tiny_model, rows_17, tmp_path, monkeypatch):
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="FSDP: this process was started alone"):
        call(train.main, *train_args(tiny_model, rows_17, tmp_path / "run"))


def test_a_model_that_does_not_name_its_layers_is_refused():
    with pytest.raises(UserError, match="base: Linear does not name its layers"):
        sharding.check_shardable(torch.nn.Linear(1, 1), "base")


# ---------------------------------------------------------------------- in step


STEPS = """
import json, os, sys
sys.path.insert(0, {scripts!r})
import torch
from torch.distributed.fsdp import fully_shard
from sharding import in_step

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.calls, self.device = torch.nn.Embedding(4, 6), 0, torch.device("cpu")

    def forward(self, input_ids, use_cache=False):
        if input_ids.numel() == 3 and rank == 1:
            raise ValueError("no room")
        self.calls += 1
        return self.embed(input_ids)

torch.manual_seed(0)
model = Model()
whole = model.embed.weight.detach().clone()
fully_shard(model)
counts = []
for runs in ((2, 5), (3, 0), (0, 0)):
    model.calls = 0
    with torch.no_grad(), in_step(model):
        for _ in range(runs[rank]):
            assert torch.equal(model(input_ids=torch.tensor([[1, 2]]))[0], whole[1:3])
    counts.append(model.calls)
try:
    with torch.no_grad(), in_step(model):
        try:
            model(input_ids=torch.tensor([[1, 2, 3]]))
        except ValueError:
            model(input_ids=torch.tensor([[1, 2]]))
except RuntimeError as error:
    counts.append(str(error))
    torch.distributed.all_reduce(torch.tensor(0))  # the other one asks whether anybody still runs
with open({out!r} + str(rank), "w") as stream:
    json.dump(counts, stream)
os._exit(0)  # here as below: at its own end, Python may not get the group of processes down
"""


def test_who_has_fewer_runs_runs_along(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(STEPS.format(scripts=str(SCRIPTS), out=str(tmp_path / "rank")))
    run_two(probe)
    counts = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    error = "a forward pass failed in this process, and others wait in it"
    assert counts == [[5, 3, 0], [5, 3, 0, error]]


def test_other_models_are_left_alone():
    model = torch.nn.Linear(2, 2)
    with sharding.in_step(model):
        assert not model._forward_pre_hooks


ROUNDS = """
import json, os, sys
sys.path[:0] = [{scripts!r}]
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from decoding import ROUND, generate_ids
from prompting import Ends
from sharding import in_step, layers_of

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32).eval()
ends = Ends(frozenset({{0}}), 0, b"")
prompts, limit = ([[[7, 8, 9]], [[9, 8], [7]]][rank]), (2 * ROUND + 3, 5)[rank]
alone = generate_ids(model, prompts, ends, limit)
for layer in layers_of(model):
    fully_shard(layer)
fully_shard(model)
with in_step(model):
    assert generate_ids(model, prompts, ends, limit) == alone
with open({out!r} + str(rank), "w") as stream:
    json.dump([len(ids) for ids in alone], stream)
os._exit(0)
"""


def test_titles_may_take_more_rounds_on_one_process_than_on_another(tiny_llama2, tmp_path):
    """`generate` would ask the other processes too, by a question of its own."""
    probe, out = tmp_path / "probe.py", str(tmp_path / "rank")
    probe.write_text(ROUNDS.format(scripts=str(SCRIPTS), model=str(tiny_llama2), out=out))
    run_two(probe)
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)] == [[35], [5, 5]]


LOADED = """
import os, sys
sys.path[:0] = [{scripts!r}]
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from modeling import load_base, skeleton
from sharding import Whole, enable_fsdp, fsdp_plugin, shard

plugin, folder, fp32 = fsdp_plugin(), {model!r}, torch.float32
accelerator = Accelerator(fsdp_plugin=plugin)
assert enable_fsdp(accelerator, plugin)
config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

def adapted(sharded):
    return get_peft_model(load_base(folder, accelerator.device, fp32, False, sharded), config)

def fill(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(0.1)

model = adapted(sharded=True)
adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=False)
model, _ = shard(accelerator, model, adamw, folder)
whole = Whole(skeleton(folder, fp32), config, model, adamw)
for name, parameter in whole.model.named_parameters():  # the base is not there once more
    assert parameter.is_meta == ("lora_" not in name), name
assert len(whole.pairs) == len(adamw.param_groups[0]["params"])
ids = torch.tensor([[7, 8, 9]])
with torch.no_grad():
    begun = model(input_ids=ids).logits
    fill(whole.gather()[0])
    for parameter, _ in whole.pairs:
        moments = dict(state1=torch.full_like(parameter, 0.5), state2=parameter.square())
        whole.adamw.state[parameter] = dict(step=3) | moments
    whole.scatter()
    assert not whole.adamw.state  # the shards have it now
    _, again = whole.gather()
    for parameter, shard in whole.pairs:
        found = adamw.state[shard]
        assert (found["step"].item(), found["step"].dtype) == (3, torch.float32)
        assert found["exp_avg"].full_tensor().eq(0.5).all()
        assert found["exp_avg_sq"].full_tensor().eq(parameter.new_tensor(0.1).square()).all()
        if os.environ["RANK"] == "0":  # which alone saves it
            assert again.state[parameter]["step"] == 3
            assert again.state[parameter]["state1"].eq(0.5).all()
    assert len(again.state) == (len(whole.pairs) if os.environ["RANK"] == "0" else 0)
    again.state.clear()
    found = model(input_ids=ids).logits
    alone = adapted(sharded=False)
    fill(alone)
    expected = alone(input_ids=ids).logits
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
assert (begun - expected).abs().max() > 0.01 * expected.abs().max()
os._exit(0)
"""


def test_what_is_loaded_counts_in_layers_beside_the_decoders_too(tmp_path):
    """So do AdamW's moments, and what is not trained is not there twice.

    Such layers stay all-gathered from one forward pass to the next. (Of OPT-350m's kind, which
    projects its embeddings; a Llama has no such linear layer.)
    """
    settings = {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
    model = save(Family("OPTConfig", SIZES | settings), tmp_path / "model")
    probe = tmp_path / "probe.py"
    probe.write_text(LOADED.format(scripts=str(SCRIPTS), model=str(model)))
    run_two(probe)
