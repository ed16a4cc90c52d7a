"""What the tests share: tiny models made on the spot, French rows, and a way to run a script.

Nothing here needs a network: the Hub is told to be offline, and sockets to anywhere but this
machine are refused, in the tests and in every script that they start.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
for name in ("EXIT_CODE_FILE", "RANK", "SLURM_SUBMIT_DIR", "SLURM_NNODES"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import yaml  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
BLOCK_NETWORK = """
import socket
_connect = socket.socket.connect
def connect(self, address, *rest):
    local = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
    if not local and not str(address[0]).startswith("127."):
        raise OSError(f"the tests may not connect to {address}")
    return _connect(self, address, *rest)
socket.socket.connect = connect
"""
exec(BLOCK_NETWORK)  # here, and through PYTHONPATH in every Python that a test starts
_site = tempfile.TemporaryDirectory(prefix="manchette-tests-")
Path(_site.name, "sitecustomize.py").write_text(BLOCK_NETWORK)
_others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
os.environ["PYTHONPATH"] = os.pathsep.join([_site.name, *_others])

WORDS = (  # noqa: SIM905
    "le la les un une des à de du en sur pour avec dans maire ville élu élève hôpital œuvre été "
    "forêt âge façade Noël naïf où Nîmes Orléans Besançon l'équipe d'État qu'il aujourd'hui "
    "« victoire » 3,5 % 1 200 € président ministre projet loi vote match but coup crise emploi"
).split()


def french_rows(count: int, seed: int = 0, longest: int = 60) -> list[dict]:
    """Return rows of the challenge's columns with articles and titles of very uneven length."""
    rng = random.Random(seed)
    return [
        {
            "ID": f"a{number}",
            "text": " ".join(rng.choices(WORDS, k=rng.randint(5, longest))).capitalize() + ".",
            "titles": " ".join(rng.choices(WORDS, k=rng.randint(2, 14))).capitalize(),
        }
        for number in range(count)
    ]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def byte_level_tokenizer():
    """Return a tokenizer as SmolLM2's: byte-level BPE, no BOS of its own, pad == eos, a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in french_rows(200)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )


def sentencepiece_tokenizer(folder: Path):
    """Return a tokenizer as Llama-2's: SentencePiece BPE with bytes, BOS put first, no pad."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row["text"] for row in french_rows(200)]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    return tokenizer


def save_tiny_model(folder: Path, tokenizer, tie: bool = False, seed: int = 0, **changes) -> Path:
    """Write a random 2-layer Llama with grouped-query heads as an ordinary model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": tie,
            "initializer_range": 0.1,
        }
        | changes
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A byte-level tiny Llama with tied embeddings, as SmolLM2."""
    folder = tmp_path_factory.mktemp("models") / "byte_level"
    return save_tiny_model(folder, byte_level_tokenizer(), tie=True)


@pytest.fixture(scope="session")
def tiny_llama2(tmp_path_factory) -> Path:
    """A SentencePiece tiny Llama with a head of its own, as Llama-2."""
    folder = tmp_path_factory.mktemp("models") / "sentencepiece"
    return save_tiny_model(folder, sentencepiece_tokenizer(folder))


@pytest.fixture(scope="session")
def rows_17(tmp_path_factory) -> Path:
    """17 training rows: the third update of 8 has one article, and the second process none."""
    folder = tmp_path_factory.mktemp("news17")
    write_csv(folder / "train.csv", french_rows(17, seed=8))
    write_csv(folder / "validation.csv", french_rows(7, seed=2))
    return folder


@pytest.fixture(scope="session")
def news(tmp_path_factory) -> Path:
    """A folder with train.csv (22 rows), validation.csv (7 rows) and test.csv (9, no titles)."""
    folder = tmp_path_factory.mktemp("news")
    write_csv(folder / "train.csv", french_rows(22, seed=1))
    write_csv(folder / "validation.csv", french_rows(7, seed=2))
    test = [{k: v for k, v in row.items() if k != "titles"} for row in french_rows(9, seed=3)]
    write_csv(folder / "test.csv", test)
    return folder


def train_args(model, news, output_dir, *more) -> list[str]:
    """Return a short training run's command line."""
    return [
        *("--model_name_or_path", str(model), "--train_file", str(news / "train.csv")),
        *("--validation_file", str(news / "validation.csv"), "--output_dir", str(output_dir)),
        *("--lora_r", "4", "--max_length", "256", "--max_title_tokens", "24"),
        *("--learning_rate", "0.01", "--num_eval_titles", "3"),
        *("--mixed_precision", "bf16"),  # on any CPU
        *map(str, more),
    ]


def launcher_options(news) -> list[str]:
    """Return the same for run_train.sh, which has variables for model, files and folder."""
    options = train_args("", news, "")
    return options[options.index("--lora_r") :]


def cpu_nodes_config(folder: Path) -> Path:
    """Write the config of several nodes for CPUs."""
    config = yaml.safe_load((ROOT / "accelerate_configs/multi_node.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"use_cpu": True}))
    return folder / "config.yaml"


def call(main, *argv):
    """Return the code of a script's main, called here as if it was the first to use Accelerate."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return main([str(argument) for argument in argv])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


@pytest.fixture(scope="session")
def trained(tiny_model, news, tmp_path_factory) -> Path:
    """The run folder of two epochs on the tiny model, made once for all tests that only read it."""
    import train

    output_dir = tmp_path_factory.mktemp("runs") / "trained"
    call(train.main, *train_args(tiny_model, news, output_dir))
    return output_dir


@pytest.fixture(scope="session")
def run_script():
    """Return a function that runs a script as a user would, and checks its exit code."""

    def run(script: str, *argv, launch: bool = False, code: int = 0, cwd=None, **env):
        command = [sys.executable]
        if launch:
            config = ROOT / "accelerate_configs" / "cpu.yaml"
            cli = "accelerate.commands.accelerate_cli"
            command += ["-m", cli, "launch", "--config_file", str(config)]
        command += [str(SCRIPTS / script), *map(str, argv)]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | env,
            timeout=600,
        )
        assert result.returncode == code, f"{command}\n{result.stdout}\n{result.stderr}"
        return result

    return run
