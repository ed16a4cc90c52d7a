"""infer.py: titles of a file. Run: python -m pytest tests/test_infer.py"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    SCRIPTS,
    byte_level_tokenizer,
    call,
    french_rows,
    read_csv,
    save_tiny_model,
    write_csv,
)

import infer
from exit_codes import UserError
from predictions import Parts, part_file, part_files, same_settings
from prompting import Prompt, load_tokenizer

CPU = torch.device("cpu")


def args_for(news, output_file, *more):
    return ("--input_file", news / "test.csv", "--output_file", output_file, *more)


@pytest.fixture(scope="module")
def predicted(trained, news, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted")
    call(infer.main, "--run_dir", trained, *args_for(news, folder / "adapter.csv"))
    return folder


def details(file):
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return lines[0], lines[1:]


def test_predictions_are_a_submission_in_input_order(predicted, news):
    rows = read_csv(predicted / "adapter.csv")
    assert list(rows[0]) == ["ID", "titles"]
    assert [row["ID"] for row in rows] == [row["ID"] for row in read_csv(news / "test.csv")]
    assert all("\n" not in row["titles"] and "<|" not in row["titles"] for row in rows)
    assert {p.name for p in predicted.iterdir()} == {"adapter.csv", "adapter.jsonl"}


def test_details_stand_beside_under_a_line_of_settings(predicted, trained, news):
    record, rows = details(predicted / "adapter.jsonl")
    assert record["adapter"] == str(trained)
    assert record["base_weights"] == "nf4"
    assert record["decoding"] == "greedy"
    assert record["input"]["rows"] == 9
    assert record["prompt"]["max_length"] == 256  # the run's
    assert record["max_new_tokens"] == 24
    assert list(rows[0]) == ["id", "title", "raw", "num_new_tokens", "stopped_by"]
    submitted = read_csv(predicted / "adapter.csv")
    assert [row["title"] for row in rows] == [row["titles"] for row in submitted]
    for row in rows:
        assert row["stopped_by"] == ("length" if row["num_new_tokens"] == 24 else "eos")


def test_same_command_same_bytes(predicted, trained, news, tmp_path):
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "again.csv"))
    assert (tmp_path / "again.csv").read_bytes() == (predicted / "adapter.csv").read_bytes()


def test_the_adapter_changes_the_titles(predicted, tiny_model, news, tmp_path):
    more = ("--max_new_tokens", "24", "--max_length", "256")
    call(infer.main, "--model_name_or_path", tiny_model, *args_for(news, tmp_path / "b.csv", *more))
    assert read_csv(tmp_path / "b.csv") != read_csv(predicted / "adapter.csv")
    assert details(tmp_path / "b.jsonl")[0]["adapter"] is None


def load(folder, dtype=torch.float32, nf4=False):
    from modeling import load_base

    model = load_base(str(folder), CPU, dtype, nf4)
    return model, Prompt(load_tokenizer(str(folder)), "{article}\nTitre :", False, 160, 12)


ARTICLES = [row["text"] for row in french_rows(9, seed=5, longest=50)]


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_llama2"])
def test_in_fp32_batches_write_what_single_articles_write(fixture, request):
    model, prompt = load(request.getfixturevalue(fixture))
    batched = dict(infer.generate_titles(model, prompt, ARTICLES))
    single = dict(infer.generate_titles(model, prompt, ARTICLES, max_batch_tokens=1))
    assert batched == single
    assert len(batched) == 9
    assert len({title.title for title in batched.values()}) > 3


def test_batches_keep_to_their_token_budget_and_go_from_long_to_short(tiny_model, monkeypatch):
    model, prompt = load(tiny_model)
    shapes, generate = [], model.generate

    def spy(input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", spy)
    order = [i for i, _ in infer.generate_titles(model, prompt, ARTICLES, max_batch_tokens=300)]
    lengths = [len(prompt.encode(ARTICLES[index]).ids) for index in order]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(rows for rows, _ in shapes) == 9
    assert len(shapes) > 1
    assert all(rows * (columns + 12) <= 300 or rows == 1 for rows, columns in shapes)


def test_a_repositorys_generation_config_has_no_effect(tiny_model, tmp_path):
    """Sampling would be random; a penalty on repetition would ban the article's own words."""
    expected = [t for _, t in infer.generate_titles(*load(tiny_model), ARTICLES)]
    folder = tmp_path / "sampling"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "repetition_penalty": 1.8}
    config |= {"no_repeat_ngram_size": 2, "max_length": 7, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert [t for _, t in infer.generate_titles(*load(folder), ARTICLES)] == expected


def test_penalties_count_the_article_which_is_why_there_are_none():
    """Documents transformers: after "5 6 7 ... 5 6", a banned bigram bans 7."""
    from transformers import NoRepeatNGramLogitsProcessor

    processor = NoRepeatNGramLogitsProcessor(3)
    scores = processor(torch.tensor([[5, 6, 7, 1, 2, 5, 6]]), torch.zeros(1, 9))
    assert scores[0, 7] == -float("inf")


def test_other_ends_of_turn_stop_a_chat_model_too(tiny_model, monkeypatch):
    model, prompt = load(tiny_model)
    written, decode = [], prompt.decode
    monkeypatch.setattr(prompt, "decode", lambda ids: written.append(ids) or decode(ids))
    list(infer.generate_titles(model, prompt, ARTICLES[:1]))
    model, _ = load(tiny_model)
    model.generation_config.eos_token_id = [prompt.tokenizer.eos_token_id, written[0][2]]
    [(_, cut)] = infer.generate_titles(model, prompt, ARTICLES[:1])
    assert cut.stopped_by == "eos"
    assert cut.num_new_tokens <= 3
    batch, more = {0: prompt.encode(ARTICLES[0]).ids}, (["a0"], 1024, lambda: False)
    [(_, other)] = infer.write_continuously(model, prompt, batch, infer.Decoding(12), *more)
    assert other == cut


def test_learns_to_stop(tiny_model, tmp_path):
    """Four rows learnt by heart: each title is written, and then EOS, though pad == eos."""
    import train

    rows = french_rows(4, seed=6, longest=8)
    write_csv(tmp_path / "train.csv", rows)
    call(
        train.main,
        *("--model_name_or_path", tiny_model, "--train_file", tmp_path / "train.csv"),
        *("--output_dir", tmp_path / "run", "--max_length", "128", "--max_title_tokens", "48"),
        *("--num_train_epochs", "60", "--learning_rate", "0.02", "--lora_r", "32"),
        *("--lora_dropout", "0", "--max_grad_norm", "1", "--activation_checkpointing", "none"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    )
    inputs = ("--input_file", tmp_path / "train.csv", "--output_file", tmp_path / "out.csv")
    call(infer.main, "--run_dir", tmp_path / "run", *inputs)
    assert [r["titles"] for r in read_csv(tmp_path / "out.csv")] == [r["titles"] for r in rows]
    assert {row["stopped_by"] for row in details(tmp_path / "out.jsonl")[1]} == {"eos"}


# ---------------------------------------------------------------------- batches and engines


def test_the_budget_is_chosen_once_and_written_down(
    predicted, trained, news, tmp_path, monkeypatch, capsys
):
    import decoding

    record, rows = details(predicted / "adapter.jsonl")
    assert record["max_batch_tokens"] in [2**n for n in range(10, 15)]
    # With another amount of free memory, what was finished is finished, and a run goes on as it
    # began: other batches would have other roundings.
    monkeypatch.setattr(decoding, "free_memory", lambda _: 1)
    call(infer.main, "--run_dir", trained, *args_for(news, predicted / "adapter.csv"))
    assert "nothing to do" in capsys.readouterr().out
    lines = [json.dumps(record | {"max_batch_tokens": 700}), json.dumps({"index": 0} | rows[0])]
    (tmp_path / "out.part-0.jsonl").write_text("\n".join(lines) + "\n")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    assert details(tmp_path / "out.jsonl")[0]["max_batch_tokens"] == 700
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "new.csv"))
    assert details(tmp_path / "new.jsonl")[0]["max_batch_tokens"] == 1024


def test_a_full_memory_changes_nothing_but_the_batches(
    trained, news, tmp_path, monkeypatch, capsys
):
    import torch

    more, generate = ("--base_weights", "fp32"), infer.generate_batch
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "roomy.csv", *more))
    sizes = []

    def full(model, prompt, prompts, decoding):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, prompt, prompts, decoding)

    monkeypatch.setattr(infer, "generate_batch", full)
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "full.csv", *more))
    assert [size for size in sizes if size > 3] == [9, 5, 4]  # each of other lengths
    assert capsys.readouterr().out.count("articles together") == 1
    for suffix in ("csv", "jsonl"):
        whole, halved = (tmp_path / f"{name}.{suffix}" for name in ("roomy", "full"))
        assert whole.read_bytes() == halved.read_bytes()


def test_dequantizing_once_on_a_cpu_changes_no_byte(
    predicted, trained, news, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(infer, "free_memory", lambda _: 1)
    more = ("--max_batch_tokens", str(details(predicted / "adapter.jsonl")[0]["max_batch_tokens"]))
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "tight.csv", *more))
    assert "dequantized" not in capsys.readouterr().out
    asked = ("--base_weights", "nf4-bf16")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "asked.csv", *more, *asked))
    assert "4-bit weights dequantized once" in capsys.readouterr().out
    for name in ("tight", "asked"):
        assert read_csv(tmp_path / f"{name}.csv") == read_csv(predicted / "adapter.csv")
    assert details(tmp_path / "asked.jsonl")[0]["base_weights"] == "nf4-bf16"


def test_both_engines_keep_the_same_contract(trained, news, tmp_path):
    more = ("--base_weights", "fp32")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "a.csv", *more))
    more += ("--engine", "continuous")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "b.csv", *more))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    record, rows = details(tmp_path / "b.jsonl")
    assert rows == details(tmp_path / "a.jsonl")[1]
    assert record["engine"] == "continuous"
    assert not list(tmp_path.glob("*part*"))


def test_beams_are_recorded(trained, news, tmp_path):
    more = ("--num_beams", "2", "--length_penalty", "0.5", "--min_new_tokens", "3")
    more += ("--no_repeat_ngram_size", "4")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))
    record, rows = details(tmp_path / "out.jsonl")
    assert record["decoding"] == (
        "2 beams, at least 3 tokens, length penalty 0.5, no 4 tokens twice"
    )
    assert all(row["num_new_tokens"] >= 3 for row in rows)


def test_of_drawn_titles_the_one_most_like_the_others_is_written(
    trained, news, tmp_path, monkeypatch
):
    drawn, choose = [], infer.most_alike
    monkeypatch.setattr(infer, "most_alike", lambda titles: drawn.append(titles) or choose(titles))
    more = ("--base_weights", "fp32", "--num_samples", "5", "--temperature", "0.9")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))
    record, rows = details(tmp_path / "out.jsonl")
    assert record["decoding"] == "the most alike of 5 drawn at temperature 0.9, top-k 64"
    assert [len(titles) for titles in drawn] == [5] * len(rows)
    assert len({title.raw for titles in drawn for title in titles}) > 2 * len(rows)
    chosen = {choose(titles).raw for titles in drawn}
    assert {row["raw"] for row in rows} == chosen
    # The same, whatever the batches, and wherever an article stands.
    small = (*more, "--max_batch_tokens", "1")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "one.csv", *small))
    assert read_csv(tmp_path / "one.csv") == read_csv(tmp_path / "out.csv")
    write_csv(tmp_path / "turned.csv", read_csv(news / "test.csv")[::-1])
    turned = ("--input_file", tmp_path / "turned.csv", "--output_file", tmp_path / "back.csv")
    call(infer.main, "--run_dir", trained, *turned, *more)
    assert read_csv(tmp_path / "back.csv")[::-1] == read_csv(tmp_path / "out.csv")


def test_the_most_alike_of_some_titles():
    texts = ("Un incendie à Nîmes", "", "Un hôtel à Nîmes", "Un incendie dans un hôtel à Nîmes")
    titles = [infer.Title(text, text, 3, "eos") for text in texts]
    assert infer.most_alike(titles) == titles[3]
    assert infer.most_alike(titles[:2]) == titles[0]  # as much as the other
    russian = ["Погода", "Мэр уходит", "Мэр города уходит", "Мэр уходит сегодня"]
    titles = [infer.Title(title, title, 3, "eos") for title in russian]
    assert infer.most_alike(titles) == titles[1]


def test_drawn_titles_have_room_in_a_batch():
    args = infer.parse_args(["--model_name_or_path", "m", "--text", "a", "--num_samples", "4"])
    decoding = infer.decoding_of(args, {"max_title_tokens": 10})
    assert (decoding.temperature, decoding.room) == (0.5, 40)
    assert infer.make_batches([[1] * 60, [1] * 50, [1] * 5], decoding.room, 200) == [[0, 1], [2]]


def test_drawing_needs_prompts_that_can_be_shared(trained, news, tmp_path, monkeypatch):
    monkeypatch.setattr("packing.use_packed_attention", lambda *_: "why")
    args = args_for(news, tmp_path / "out.csv", "--num_samples", "2")
    with pytest.raises(UserError, match="--num_samples: titles of this model cannot share what"):
        call(infer.main, "--run_dir", trained, *args)


# ---------------------------------------------------------------------- one article


def test_one_article_has_its_title_on_standard_output(trained, news, tmp_path, capsys):
    import subprocess
    import sys

    more = ("--base_weights", "fp32")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))
    article = read_csv(news / "test.csv")[4]["text"]
    expected = read_csv(tmp_path / "out.csv")[4]["titles"] + "\n"
    capsys.readouterr()
    call(infer.main, "--run_dir", trained, *more, "--text", article)
    assert capsys.readouterr().out == expected
    command = [sys.executable, str(SCRIPTS / "infer.py"), "--run_dir", str(trained), *more]
    piped = subprocess.run(command, input=article, capture_output=True, text=True, check=True)
    assert piped.stdout == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", " \n"], "error: --text: there is no article in it; give its text"),
        ([], "error: standard input: there is no article in it; give its text"),
        (
            ["--text", "a", "--input_file", "b.csv"],
            "infer.py: error: --text: give it or --input_file, not both",
        ),
        (
            ["--input_file", "b.csv"],
            "infer.py: error: --input_file: give --output_file too, the titles' CSV",
        ),
        (
            ["--text", "a", "--output_file", "b.csv"],
            "infer.py: error: --output_file: give --input_file too; the title of one article is "
            "printed",
        ),
        (
            ["--text", "a", "--engine", "continuous"],
            "infer.py: error: --engine continuous: give --input_file too; it is for many articles",
        ),
        (
            ["--text", "a", "--length_penalty", "2"],
            "infer.py: error: --length_penalty: it weighs beams; give --num_beams above 1, or "
            "leave it out",
        ),
        (
            ["--text", "a", "--min_new_tokens", "9", "--max_new_tokens", "8"],
            "infer.py: error: --min_new_tokens 9: above --max_new_tokens 8",
        ),
        (
            ["--text", "a", "--temperature", "2"],
            "infer.py: error: --temperature: titles are drawn with --num_samples above 1; or leave "
            "it out",
        ),
        (
            ["--text", "a", "--num_samples", "2", "--num_beams", "2"],
            "infer.py: error: --num_samples: it is for titles without --num_beams; leave one of "
            "them out",
        ),
        (
            ["--engine", "continuous", "--num_samples", "2"],
            "infer.py: error: --engine continuous: it knows no --num_samples; leave one of them "
            "out",
        ),
        (
            ["--engine", "continuous", "--num_beams", "2"],
            "infer.py: error: --engine continuous: it knows no --num_beams; leave one of them out",
        ),
        (
            ["--engine", "continuous", "--min_new_tokens", "2"],
            "infer.py: error: --engine continuous: it knows no --min_new_tokens; leave one of them "
            "out",
        ),
        (
            ["--engine", "continuous", "--no_repeat_ngram_size", "1"],
            "infer.py: error: --engine continuous: it knows no --no_repeat_ngram_size; leave one "
            "of them out",
        ),
    ],
)
def test_what_makes_no_sense_together_is_refused(trained, argv, message):
    import subprocess
    import sys

    command = [sys.executable, str(SCRIPTS / "infer.py"), "--run_dir", str(trained), *argv]
    result = subprocess.run(command, input="", capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message + "\n")


# ---------------------------------------------------------------------- the run's own prompt


def test_another_prompt_is_used_and_noted(predicted, trained, news, tmp_path, capsys):
    prompt = SCRIPTS.parent / "prompts/en.txt"
    more = ("--prompt_file", prompt)
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "en.csv", *more))
    said = capsys.readouterr().out
    assert "NOTE: --prompt_file" in said
    assert "NOTE: --base_weights" not in said
    more = ("--base_weights", "bf16", "--max_new_tokens", "9")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "other.csv", *more))
    said = capsys.readouterr().out
    assert "NOTE: --base_weights 'bf16' overrides 'nf4' of the run folder" in said
    assert "NOTE: --max_new_tokens 9 overrides 24 of the run folder" in said
    record, _ = details(tmp_path / "en.jsonl")
    assert record["prompt"]["template"].startswith("Here is a news article")
    assert read_csv(tmp_path / "en.csv") != read_csv(predicted / "adapter.csv")


@pytest.mark.parametrize(
    ("mixed_precision", "asked", "precision"),
    [
        ("bf16", None, "bf16"),
        ("no", None, "fp32"),
        ("bf16", "nf4-bf16", "bf16"),
        ("no", "nf4-bf16", "fp32"),
        ("bf16", "fp32", "fp32"),
        ("no", "bf16", "bf16"),
    ],
)
def test_weights_that_are_not_4_bit_say_in_what_is_computed(
    trained, tmp_path, mixed_precision, asked, precision
):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    run_config = json.loads((run_dir / "run_config.json").read_text())
    run_config["arguments"]["mixed_precision"] = mixed_precision
    (run_dir / "run_config.json").write_text(json.dumps(run_config))
    more = ["--base_weights", asked] if asked else []
    source = infer.find_model(infer.parse_args(["--run_dir", str(run_dir), "--text", "a", *more]))
    assert (source["weights"], source["precision"]) == (asked or "nf4", precision)


@pytest.mark.parametrize(
    ("weights", "in_silicon", "dtype", "told"),
    [
        (None, True, "bfloat16", None),
        (None, False, "float32", "all but 4-bit weights is in fp32"),
        ("nf4-bf16", False, "bfloat16", "--base_weights nf4 is faster"),
        ("bf16", False, "bfloat16", "--base_weights fp32 is faster"),
        ("fp32", False, "float32", None),
    ],
)
def test_in_fp32_where_the_cpu_is_slow_in_bf16(
    trained, monkeypatch, capsys, weights, in_silicon, dtype, told
):
    """A 4-bit base takes little more memory by that; other weights would take twice as much."""
    import torch

    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": in_silicon})
    write_batch, used = infer.write_batch, {}

    def look(model, *arguments, **options):
        used["dtype"] = model.get_input_embeddings().weight.dtype
        used["autocast"] = torch.is_autocast_enabled("cpu")
        return write_batch(model, *arguments, **options)

    monkeypatch.setattr(infer, "write_batch", look)
    more = ["--base_weights", weights] if weights else []
    call(infer.main, "--run_dir", trained, "--text", "Le maire a parlé.", *more)
    assert used == {"dtype": getattr(torch, dtype), "autocast": dtype == "bfloat16"}
    notes = [line for line in capsys.readouterr().err.splitlines() if "this CPU" in line]
    assert notes == ([f"NOTE: this CPU multiplies bf16 slowly; {told}"] if told else [])


def test_the_precision_that_is_recorded_is_the_machines(trained, news, tmp_path, monkeypatch):
    """Elsewhere, the same titles are there already all the same."""
    argv = ("--run_dir", trained, *args_for(news, tmp_path / "titles.csv"))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {})
    call(infer.main, *argv)
    record, _ = details(tmp_path / "titles.jsonl")
    assert (record["base_weights"], record["precision"]) == ("nf4", "fp32")
    written = (tmp_path / "titles.csv").stat().st_mtime_ns
    monkeypatch.undo()
    call(infer.main, *argv)
    assert (tmp_path / "titles.csv").stat().st_mtime_ns == written


def test_processes_on_cpus_of_both_kinds_write_no_titles(trained, news, tmp_path, monkeypatch):
    """Half of them would be rounded otherwise, and the file's header would have one precision."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, "fp32"])
    problem = "--base_weights nf4: some of the processes have a CPU that is slow in bf16, and some"
    with pytest.raises(UserError, match=problem):
        call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "titles.csv"))


def test_more_tokens_at_least_than_the_run_has_at_most_are_refused(trained, news, tmp_path):
    with pytest.raises(UserError, match="--min_new_tokens 25: above the 24 tokens that a title"):
        call(
            infer.main,
            "--run_dir",
            trained,
            *args_for(news, tmp_path / "o.csv"),
            "--min_new_tokens",
            25,
        )
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(trained, news, tmp_path):
    from conftest import sentencepiece_tokenizer

    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    for file in run_dir.glob("tokenizer*"):
        file.unlink()
    sentencepiece_tokenizer(tmp_path / "sp").save_pretrained(run_dir)
    with pytest.raises(UserError, match="other ids with this tokenizer"):
        call(infer.main, "--run_dir", run_dir, *args_for(news, tmp_path / "out.csv"))
    assert not list(tmp_path.glob("out*"))


def test_another_base_is_refused(trained, news, tmp_path):
    other = save_tiny_model(tmp_path / "other", byte_level_tokenizer(), tie=True, seed=1)
    more = ("--model_name_or_path", other)
    with pytest.raises(UserError, match=r"not the base that .* was trained on"):
        call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))


def test_a_base_that_has_moved_is_taken_and_noted(
    predicted, trained, tiny_model, news, tmp_path, capsys
):
    shutil.copytree(tiny_model, tmp_path / "moved")
    more = ("--model_name_or_path", tmp_path / "moved")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))
    assert "NOTE: --model_name_or_path" in capsys.readouterr().out
    assert (tmp_path / "out.csv").read_bytes() == (predicted / "adapter.csv").read_bytes()


# ---------------------------------------------------------------------- going on, and not mixing


def test_goes_on_after_a_torn_line_and_ends_with_the_same_bytes(
    predicted, trained, news, tmp_path, capsys
):
    record, rows = details(predicted / "adapter.jsonl")
    part = tmp_path / "out.part-0.jsonl"
    with part.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
        for index in (7, 2):
            stream.write(json.dumps({"index": index} | rows[index], ensure_ascii=False) + "\n")
        stream.write('{"index": 5, "id": "a5", "tit')  # killed here
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    assert "going on after 2 titles" in capsys.readouterr().out
    for suffix in ("csv", "jsonl"):
        again, first = tmp_path / f"out.{suffix}", predicted / f"adapter.{suffix}"
        assert again.read_bytes() == first.read_bytes()
    assert not part.exists()


@pytest.mark.parametrize("engine", ["batched", "continuous"])
def test_a_file_of_many_windows_has_each_title_once(trained, news, tmp_path, monkeypatch, engine):
    """Under its own index, whatever its window; and of what is there, none a second time."""
    more = ("--base_weights", "fp32", "--engine", engine)
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "one.csv", *more))
    record, rows = details(tmp_path / "one.jsonl")
    there = (0, 1, 2, 3, 5, 8)  # all of the first window, and of the others some
    lines = [json.dumps(record), *(json.dumps({"index": n} | rows[n]) for n in there)]
    (tmp_path / "out.part-0.jsonl").write_text("\n".join(lines) + "\n")
    written, write_line = [], infer.write_line
    monkeypatch.setattr(infer, "WINDOW", 4)
    monkeypatch.setattr(
        infer, "write_line", lambda *line: written.append(line[1]) or write_line(*line)
    )
    for name, indices in (("out", {4, 6, 7}), ("new", set(range(9)))):
        call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / f"{name}.csv", *more))
        found = [line["index"] for line in written if "index" in line]
        assert (set(found), len(found)) == (indices, len(indices))
        for suffix in ("csv", "jsonl"):
            whole = tmp_path / f"one.{suffix}"
            assert (tmp_path / f"{name}.{suffix}").read_bytes() == whole.read_bytes()
        written.clear()


def test_goes_on_where_it_was_stopped_between_its_two_files(predicted, trained, news, tmp_path):
    shutil.copy(predicted / "adapter.jsonl", tmp_path / "out.jsonl")
    record, rows = details(predicted / "adapter.jsonl")
    lines = [json.dumps({"index": n} | row, ensure_ascii=False) for n, row in enumerate(rows)]
    part = tmp_path / "out.part-0.jsonl"
    part.write_text("\n".join([json.dumps(record), *lines]) + "\n", encoding="utf-8")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_bytes() == (predicted / "adapter.csv").read_bytes()


def test_parts_that_a_listing_does_not_have_yet_are_looked_for_by_name(tmp_path, monkeypatch):
    """As on a network disk, when another node has just made one."""
    for rank in range(3):
        part_file(tmp_path / "out.csv", rank).touch()
    monkeypatch.setattr(type(tmp_path), "glob", lambda *_: [part_file(tmp_path / "out.csv", 2)])
    expected = [part_file(tmp_path / "out.csv", rank) for rank in (0, 1, 2)]
    assert part_files(tmp_path / "out.csv", ranks=2) == expected


def test_other_line_separators_in_a_title_are_no_ends_of_lines(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and `str.splitlines` would cut there."""
    record = {"input": {"path": "a", "sha256": "b"}, "commit": None}
    output_file = tmp_path / "p[1].csv"  # nor is the name a pattern
    row = {"id": "a\u2029b", "title": "t", "raw": "un\u2028deux\x85trois", "stopped_by": "eos"}
    line = json.dumps({"index": 0} | row, ensure_ascii=False) + "\n"
    part_file(output_file, 0).write_text(json.dumps(record) + "\n" + line, encoding="utf-8")
    parts = Parts(output_file, record, 1)
    assert parts.num_done == 1
    assert parts.join() == 0
    assert details(tmp_path / "p[1].jsonl")[1] == [row]
    assert read_csv(output_file) == [{"ID": "a\u2029b", "titles": "t"}]
    assert not part_files(output_file)


def test_a_run_in_fp32_is_inferred_in_fp32(tiny_model, news, tmp_path):
    from conftest import train_args

    import train

    more = ("--mixed_precision", "no", "--max_train_steps", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    call(infer.main, "--run_dir", tmp_path / "run", *args_for(news, tmp_path / "out.csv"))
    record, _ = details(tmp_path / "out.jsonl")
    assert (record["base_weights"], record["precision"]) == ("nf4", "fp32")


def test_the_same_file_by_another_path_goes_on(predicted, trained, news, monkeypatch, capsys):
    monkeypatch.chdir(trained.parent)
    options = args_for(news, predicted / "adapter.csv")
    call(infer.main, "--run_dir", f"./{trained.name}", *options)
    assert "nothing to do" in capsys.readouterr().out


def test_an_unfinished_run_of_other_settings_is_refused(predicted, trained, news, tmp_path):
    record, _ = details(predicted / "adapter.jsonl")
    part = tmp_path / "out.part-0.jsonl"
    other = json.dumps(record | {"max_new_tokens": 5}) + "\n"
    part.write_text(other + json.dumps({"index": 0}) + "\n")
    with pytest.raises(UserError, match="an unfinished run had other settings"):
        call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    part.write_text(other + '{"ind')  # it had asked for what was then refused, or found no memory
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_bytes() == (predicted / "adapter.csv").read_bytes()


def test_no_file_but_its_own_is_taken_for_a_part(predicted, trained, news, tmp_path, capsys):
    """Whatever is called alike: the articles, and the titles of others."""
    article = json.dumps({"text": "Le maire a dit oui."})  # as torn as a part may be
    for name, output in (
        ("news.part-1.jsonl", "news.csv"),
        ("news.jsonl", "news.csv"),
        ("news.csv", "news.csv"),
    ):
        (tmp_path / name).write_text(article)
        files = ("--input_file", tmp_path / name, "--output_file", tmp_path / output)
        with pytest.raises(UserError, match=f"{name}: the titles' own files are called so"):
            call(infer.main, "--run_dir", trained, *files)
        assert (tmp_path / name).read_text() == article
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"t.part-1.csv: parts of titles are called so; give anoth"):
        call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "t.part-1.csv"))
    for suffix in ("csv", "jsonl"):
        shutil.copy(predicted / f"adapter.{suffix}", tmp_path / f"t.{suffix}")
    (tmp_path / "t.part-one.jsonl").write_text("of another make")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "t.csv"))
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "t.part-one.jsonl").exists()


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json"])
def test_titles_by_another_tokenizer_are_titles_of_other_settings(
    tiny_model, news, tmp_path, file, capsys
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    options = ("--model_name_or_path", model, "--max_length", 200, "--max_new_tokens", 4)
    options += args_for(news, tmp_path / "out.csv", "--apply_chat_template")
    call(infer.main, *options)
    call(infer.main, *options)
    assert "nothing to do" in capsys.readouterr().out
    (model / file).write_text((model / file).read_text().replace("user", "User") + "\n")
    with pytest.raises(UserError, match="there are predictions of other settings already"):
        call(infer.main, *options)


@pytest.mark.parametrize("changed", ["articles", "adapter", "base"])
def test_titles_of_what_has_changed_under_its_name_are_not_taken_for_its_own(
    trained, tiny_model, news, tmp_path, changed, capsys
):
    run_dir, model = (shutil.copytree(a, tmp_path / a.name) for a in (trained, tiny_model))
    articles = shutil.copy(news / "test.csv", tmp_path / "test.csv")
    options = ("--run_dir", run_dir) if changed == "adapter" else ("--model_name_or_path", model)
    options += ("--max_length", 200, "--max_new_tokens", 2)
    options += ("--input_file", articles, "--output_file", tmp_path / "out.csv")
    call(infer.main, *options)
    call(infer.main, *options)
    assert "nothing to do" in capsys.readouterr().out
    if changed == "articles":
        write_csv(articles, read_csv(articles)[::-1])
    else:
        file = run_dir / "adapter_model.safetensors" if changed == "adapter" else None
        file = file or model / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # a bit of the last weight
        file.write_bytes(content)
    with pytest.raises(UserError, match="there are predictions of other settings already"):
        call(infer.main, *options)


def test_every_setting_counts_but_what_only_names_things(predicted):
    record, _ = details(predicted / "adapter.jsonl")
    free = {"commit", "model", "adapter", "adapter_step", "precision"}
    for name in record:
        other = json.dumps(record | {name: "another"})
        assert same_settings(other, record) == (name in free), name


def test_finished_predictions_are_kept(predicted, trained, news, capsys):
    file = predicted / "adapter.csv"
    before = file.stat().st_mtime_ns
    call(infer.main, "--run_dir", trained, *args_for(news, file))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="predictions of other settings already"):
        call(infer.main, "--run_dir", trained, *args_for(news, file, "--max_new_tokens", "5"))
    assert file.stat().st_mtime_ns == before


def test_another_commit_may_go_on(predicted, trained, news, tmp_path, monkeypatch, capsys):
    record, rows = details(predicted / "adapter.jsonl")
    lines = [json.dumps(record | {"commit": "an older one"}), json.dumps({"index": 0} | rows[0])]
    (tmp_path / "out.part-0.jsonl").write_text("\n".join(lines) + "\n")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    assert "going on after 1 titles" in capsys.readouterr().out


# ---------------------------------------------------------------------- from a checkpoint


@pytest.fixture
def stopped(trained, tmp_path):
    """A run as it lies there before its end: without an adapter of its own."""
    run_dir = tmp_path / "run"
    own = ("adapter_model.safetensors", "adapter_config.json", "README.md")
    shutil.copytree(trained, run_dir, ignore=lambda d, _: own if d == str(trained) else ())
    run_config = json.loads((run_dir / "run_config.json").read_text())
    del run_config["adapter_step"]
    (run_dir / "run_config.json").write_text(json.dumps(run_config))
    return run_dir


def test_a_checkpoint_of_a_stopped_run_is_an_adapter(
    predicted, trained, stopped, news, tmp_path, monkeypatch
):
    steps = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert steps == ["step-000003", "step-000006"]
    step = json.loads((trained / "run_config.json").read_text())["adapter_step"]
    found = {}
    for name in steps:
        arguments = args_for(news, tmp_path / f"{name}.csv")
        call(infer.main, "--run_dir", stopped / "checkpoints" / name, *arguments)
        record, found[name] = details(tmp_path / f"{name}.jsonl")
        assert record["adapter"] == str(stopped / "checkpoints" / name)
        assert record["adapter_step"] == int(name[5:])
    assert details(predicted / "adapter.jsonl")[0]["adapter_step"] == step
    assert found[f"step-{step:06d}"] == details(predicted / "adapter.jsonl")[1]
    assert found[steps[0]] != found[steps[1]]
    monkeypatch.chdir(stopped / "checkpoints" / steps[0])  # by a path without its name
    call(infer.main, "--run_dir", ".", *args_for(news, tmp_path / "again.csv"))
    record, again = details(tmp_path / "again.jsonl")
    assert (record["adapter_step"], again) == (3, found[steps[0]])


def test_a_checkpoint_has_the_settings_of_its_runs_adapter(trained):
    from modeling import lora_arguments

    ours = lora_arguments(str(trained / "checkpoints/step-000003"))
    pefts = lora_arguments(str(trained))
    assert ours["target_modules"] == "all-linear"
    for name in ("r", "lora_alpha", "lora_dropout", "task_type"):
        assert ours[name] == pefts[name]


def tear(checkpoint):
    with (checkpoint / "adapter_model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("step-000003", tear, "damaged checkpoint (adapter_model.safetensors is torn or was"),
        ("step-000003", lambda c: (c / "state.json").unlink(), "damaged checkpoint (state.json: N"),
        ("step-000004", lambda c: c.with_name("step-000003").rename(c), "damaged checkpoint (stat"),
        ("step-000003.tmp", lambda c: c.mkdir(), "no whole checkpoint; give a folder step-NNNNNN"),
        ("step-000009", lambda c: None, "no whole checkpoint; give a folder step-NNNNNN of "),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(stopped, news, tmp_path, name, damage, message):
    checkpoint = stopped / "checkpoints" / name
    damage(checkpoint)
    with pytest.raises(UserError) as error:
        call(infer.main, "--run_dir", checkpoint, *args_for(news, tmp_path / "out.csv"))
    assert str(error.value).startswith(f"{checkpoint}: {message}")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_r": "4"}, "no usable run_config.json"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"target_modules": ".*"}, "target_modules is '.*', not a list of names"),
        ({"lora_r": 5}, "does not fit this base"),
    ],
)
def test_a_checkpoint_of_a_damaged_record_is_refused(stopped, news, tmp_path, change, message):
    run_config = json.loads((stopped / "run_config.json").read_text())
    run_config["arguments"] |= change
    (stopped / "run_config.json").write_text(json.dumps(run_config))
    arguments = args_for(news, tmp_path / "out.csv")
    with pytest.raises(UserError) as error:
        call(infer.main, "--run_dir", stopped / "checkpoints/step-000003", *arguments)
    assert message in str(error.value)


# ---------------------------------------------------------------------- as a user runs it


def test_through_accelerate_launch(run_script, predicted, trained, news, tmp_path):
    """And from a clone whose prompts were edited after training: the run folder has the text."""
    clone = tmp_path / "clone"
    shutil.copytree(SCRIPTS, clone / "scripts")
    (clone / "prompts").mkdir()
    (clone / "prompts/fr.txt").write_text("without an article, which nobody would take")
    arguments = ("--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    result = run_script(clone / "scripts/infer.py", *arguments, launch=True, cwd=tmp_path)
    assert "done: 9 titles" in result.stdout
    assert (tmp_path / "out.csv").read_bytes() == (predicted / "adapter.csv").read_bytes()
    assert "FutureWarning" not in result.stderr
    assert " articles/s]" in result.stderr


def test_rows_without_ids_count_from_0(trained, news, tmp_path):
    """And a file's name need not be UTF-8."""
    rows = [{"text": row["text"]} for row in read_csv(news / "test.csv")]
    bare = write_csv(tmp_path / os.fsdecode("né.csv".encode("latin-1")), rows)
    more = ("--input_file", bare)
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))
    assert [row["ID"] for row in read_csv(tmp_path / "out.csv")] == [str(n) for n in range(9)]


def test_columns_go_by_the_names_that_are_given(predicted, trained, news, tmp_path):
    rows = [
        {"ID": "x", "text": "un autre", "key": row["ID"], "body": row["text"]}
        for row in read_csv(news / "test.csv")
    ]
    more = ("--input_file", write_csv(tmp_path / "named.csv", rows))
    more += ("--text_column", "body", "--id_column", "key")
    call(infer.main, "--run_dir", trained, *args_for(news, tmp_path / "out.csv", *more))
    assert (tmp_path / "out.csv").read_bytes() == (predicted / "adapter.csv").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--run_dir", "{tmp}"],
            "error: {tmp}: no run_config.json in it; give the output folder of train.py",
        ),
        (
            ["--run_dir", "{trained}/checkpoints/step-000009"],
            "error: {trained}/checkpoints/step-000009: no whole checkpoint; give a folder "
            "step-NNNNNN of {trained}/checkpoints",
        ),
        (
            ["--input_file", "none.csv"],
            "error: none.csv: there is no such file; check the path",
        ),
        (
            ["--id_column", "id"],
            "error: {news}/test.csv: no column 'id'; correct the name of the ID column",
        ),
        (
            ["--output_file", "{tmp}/no/out.csv"],
            "error: {tmp}/no/out.csv: there is no such folder; make it first",
        ),
        (
            ["--output_file", "out.txt"],
            "infer.py: error: --output_file out.txt: give a name that ends in .csv",
        ),
        (
            ["--max_new_tokens", "0"],
            "infer.py: error: --max_new_tokens 0: give a number above 0",
        ),
        (
            ["--prompt_file", "none.txt"],
            "error: none.txt: no readable prompt ([Errno 2] No such file or directory: "
            "'none.txt'); give a file of prompts/",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run_script, trained, news, tmp_path, change, message
):
    change = [part.format(tmp=tmp_path, trained=trained) for part in change]
    arguments = ("--run_dir", trained, *args_for(news, tmp_path / "out.csv", *change))
    result = run_script("infer.py", *arguments, code=2, cwd=tmp_path)
    assert result.stderr == message.format(tmp=tmp_path, news=news, trained=trained) + "\n"
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "streams", "message"),
    [
        (["--text", b"caf\xe9"], {}, "error: --text: not UTF-8; convert it\n"),
        (
            [],
            {"WORLD_SIZE": "2"},
            "infer.py: error: standard input: only one process can read it; ",
        ),
        (["closed"], {}, "infer.py: error: give --input_file, --text, or one article on standard "),
    ],
)
def test_an_article_that_cannot_be_read(trained, argv, streams, message):
    command = [sys.executable, str(SCRIPTS / "infer.py"), "--run_dir", str(trained)]
    closed = argv == ["closed"]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *command] if closed else [*command, *argv]
    done = subprocess.run(command, capture_output=True, input=b"", env=os.environ | streams)
    assert done.returncode == 2
    assert done.stderr.decode().startswith(message)


def test_an_unfinished_run_has_no_adapter_yet(run_script, trained, news, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    (run_dir / "adapter_model.safetensors").unlink()
    arguments = ("--run_dir", run_dir, *args_for(news, tmp_path / "out.csv"))
    result = run_script("infer.py", *arguments, code=2)
    assert result.stderr == (
        f"error: {run_dir}: no adapter_model.safetensors in it; let training finish first, or give "
        "one of its checkpoints\n"
    )
