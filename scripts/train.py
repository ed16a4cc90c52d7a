"""Fine-tune a causal LM with QLoRA to write the titles of French news articles.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/train.py \\
        --model_name_or_path meta-llama/Llama-2-7b-chat-hf --train_file train.csv \\
        --validation_file validation.csv --output_dir runs/titles

A frozen base in 4-bit NF4, LoRA on every linear layer, one loop over optimizer updates. Defaults
are those of the report in the README, and of the QLoRA paper (arXiv 2305.14314) beyond it.
"""

import argparse
import math
import os
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path

import sharding
from articles import Columns, check_articles, evenly_spaced, open_articles
from exit_codes import (
    STOPPED,
    ArgumentParser,
    LoneError,
    UserError,
    keep_group,
    note,
    printable,
    run,
)
from hub import check_hub, push
from hygiene import Survey, report_rows, report_titles
from libraries import quick_imports
from machine import (
    IN_FP32,
    SLOW_IN_BF16,
    bf16_pays,
    check_devices,
    free_memory,
    resident_memory,
)
from nodes import Nodes, check_precision, from_main_process, process_group
from prompting import PROMPTS, Prompt, load_tokenizer, read_template
from run_folder import (
    LOCK,
    RUN_CONFIG,
    check_links,
    check_model_folder,
    check_output_dir,
    check_tracker,
    first_line,
    locked,
    log_metrics,
    log_titles,
    make_run_config,
    read_run_config,
    resolve_model_folder,
    write_run,
)
from stopping import StopRequest

LOGGED_TITLES = 16  # of each evaluation, that a tracker is given as text
MAX_SKIPPED_IN_A_ROW = 5  # updates whose gradient is not finite, before the run gives up
UNPACKED = "this model takes no packed rows"
LESS_MEMORY = (
    "give --activation_checkpointing full, or less --per_device_train_batch_size and as much more "
    "--gradient_accumulation_steps; --resume_from_checkpoint latest goes on"
)

WEIGHTS_HELP = "QLoRA; the same, dequantized once: faster, larger; plain LoRA"
COOLDOWN_HELP = "share of the updates, the last ones, over which it falls to 0"
PROMPT_LOSS_HELP = "weight of an article's token in the loss; a title's is 1"
BEST_HELP = "figure of the validation that chooses the adapter"
PRECISION_HELP = "default: bf16, or no (all in fp32) on a CPU that is slow in bf16"
CHECKPOINTING_HELP = "auto: what memory asks for; none, full, or a number N for every Nth layer"


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="local folder or Hub id of the base")
    add("--base_weights", choices=["nf4", "nf4-bf16", "bf16"], default="nf4", help=WEIGHTS_HELP)
    add("--prompt_file", default=str(PROMPTS / "fr.txt"), help="template with {article} in it")
    add("--apply_chat_template", action=flag, default=False, help="send it as a user's chat turn")
    add = parser.add_argument_group("data").add_argument
    add("--train_file", required=True, help=".csv[.gz], .json[l], .parquet or a Hub dataset id")
    add("--validation_file", help="the same; without it nothing is evaluated")
    add("--text_column", default="text", help="column of the articles")
    add("--title_column", default="titles", help="column of the titles")
    add("--max_length", type=int, default=1024, help="tokens of prompt, title and EOS together")
    add("--max_title_tokens", type=int, default=128, help="of these, reserved for title and EOS")
    add = parser.add_argument_group("lora").add_argument
    add("--lora_r", type=int, default=64, help="rank")
    add("--lora_alpha", type=int, default=16, help="the update is scaled by alpha / rank")
    add("--lora_dropout", type=float, default=0.1, help="share of the update's inputs dropped")
    add("--target_modules", nargs="+", default=["all-linear"], help="names of layers to adapt")
    add = parser.add_argument_group("optimization").add_argument
    add("--num_train_epochs", type=int, default=2, help="passes over the articles")
    add("--max_train_steps", type=int, help="stop after so many updates")
    add("--per_device_train_batch_size", type=int, default=4, help="articles per forward pass")
    add("--gradient_accumulation_steps", type=int, default=2, help="forward passes per update")
    add("--learning_rate", type=float, default=2e-4, help="between warm-up and cooldown")
    add("--warmup_ratio", type=float, default=0.03, help="share of the updates that warm up")
    add("--cooldown_ratio", type=float, default=0.0, help=COOLDOWN_HELP)
    add("--prompt_loss_weight", type=float, default=0.0, help=PROMPT_LOSS_HELP)
    add("--max_grad_norm", type=float, default=0.3, help="larger gradients are scaled down to it")
    add("--activation_checkpointing", default="auto", metavar="WHEN", help=CHECKPOINTING_HELP)
    add("--mixed_precision", choices=["bf16", "no"], help=PRECISION_HELP)
    add("--seed", type=int, default=42, help="of LoRA's first values, the articles' order, dropout")
    add = parser.add_argument_group("logging and output").add_argument
    add("--output_dir", required=True, help="the run's folder, new or empty")
    add("--checkpointing_steps", type=int, help="checkpoint and evaluate every N updates too")
    add("--save_total_limit", type=int, help="newest checkpoints to keep, beside the best")
    add("--resume_from_checkpoint", help="'latest' or a checkpoint of this run")
    add("--resume_anyway", action=flag, default=False, help="even with other settings or data")
    add("--max_time", type=float, help="minutes after which to save, and stop with exit code 75")
    add("--ddp_timeout", type=float, default=1800, help="seconds processes wait for each other")
    add("--metric_for_best_model", choices=["loss", "rougeL"], default="loss", help=BEST_HELP)
    add("--num_eval_titles", type=int, default=32, help="validation titles to write and score")
    add("--report_to", choices=["none", "tensorboard", "wandb"], default="none", help="tracker")
    add("--push_to_hub", metavar="OWNER/NAME", help="at the end, as a private model of the Hub")
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        if name in ("lora_dropout", "warmup_ratio", "cooldown_ratio"):
            if not 0 <= value < 1:
                parser.error(f"--{name} {value}: give a number from 0 to below 1")
        elif name == "prompt_loss_weight":
            if not 0 <= value <= 1:
                parser.error(f"--{name} {value}: give a number from 0 to 1")
        elif name in ("seed", "num_eval_titles"):
            if not 0 <= value < 2**32:  # numpy takes no larger seed
                parser.error(f"--{name} {value}: give a number from 0 to below 2**32")
        elif type(value) in (int, float) and not 0 < value < math.inf:
            parser.error(f"--{name} {value}: give a {'finite ' * (value > 0)}number above 0")
    if args.warmup_ratio + (ratio := args.cooldown_ratio) > 1:
        parser.error(f"--cooldown_ratio {ratio}: give less, or lower --warmup_ratio")
    when = args.activation_checkpointing
    if when not in ("auto", "none", "full") and not (when.isdecimal() and int(when) > 0):
        parser.error(f"--activation_checkpointing {when}: give auto, none, full or a number")
    if args.metric_for_best_model == "rougeL" and args.num_eval_titles == 0:
        parser.error("--metric_for_best_model rougeL: needs --num_eval_titles above 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    columns = Columns(text=args.text_column, title=args.title_column, id=None)

    # ------------------------------------------------------------------ check all input first
    template = read_template(args.prompt_file)
    check_model_folder(args.model_name_or_path)
    check_tracker(args.report_to)
    check_hub(args.push_to_hub)
    check_links(Path(args.output_dir).rglob("*"))
    if not args.resume_from_checkpoint:  # else `find_checkpoint` looks at what is there
        check_output_dir(args.output_dir)
    files = {"train": args.train_file, "validation": args.validation_file}
    surveys = {split: Survey(file) for split, file in files.items() if file}
    checked = {
        split: check_articles(survey.path, columns, split, survey=survey)
        for split, survey in surveys.items()
    }
    base_folder = resolve_model_folder(args.model_name_or_path)
    check_devices()
    sharding.check_fsdp_config()
    tokenizer = load_tokenizer(str(base_folder))
    prompt = Prompt(
        tokenizer, template, args.apply_chat_template, args.max_length, args.max_title_tokens
    )
    report_rows(surveys)  # nothing is dropped or repaired

    with (
        Nodes(args.ddp_timeout) as nodes,
        locked(Path(args.output_dir, LOCK), args.output_dir),
        StopRequest(args.max_time) as stop,
        nodes.together(),
    ):
        if not args.resume_from_checkpoint:  # again: another run may have come and gone since
            check_output_dir(args.output_dir)
        try:
            return train(args, columns, base_folder, prompt, checked, surveys, stop, nodes)
        except RuntimeError as error:  # as torch.OutOfMemoryError is, too
            from decoding import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            raise LoneError("memory", f"not enough ({first_line(error)})", LESS_MEMORY) from None


def train(args, columns, base_folder, prompt, checked, surveys, stop, nodes):
    """Run the training that the checked arguments ask for; return STOPPED if `stop` was asked."""
    # These take seconds to import, which a complaint about the input should not have to wait for.
    with quick_imports():
        import torch
        from accelerate import Accelerator
        from accelerate.utils import broadcast_object_list, set_seed, tqdm
        from bitsandbytes.optim import PagedAdamW32bit
        from peft import LoraConfig, get_peft_model
        from torch.optim import AdamW

        import batching
        import checkpoints
        import memory
        import modeling
        import packing
        import plan

    # ------------------------------------------------------------------ accelerator
    # The update is spelled out below. Accelerate must not count micro-batches of its own, which
    # this variable would make it do behind the script's back.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    output_dir = Path(args.output_dir)
    asked, slow_in_bf16 = args.mixed_precision, not bf16_pays()
    default = "no" if slow_in_bf16 else "bf16"
    # A run keeps its own, wherever it goes on.
    args.mixed_precision = asked or recorded_precision(args) or default
    plugin = sharding.fsdp_plugin()  # None, unless the config of `accelerate launch` has FSDP
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output_dir / "trackers",
        fsdp_plugin=plugin,
        kwargs_handlers=process_group(args.ddp_timeout),
    )
    keep_group()
    check_precision("--mixed_precision", args.mixed_precision, "give bf16 or no")
    device, num_processes = accelerator.device, accelerator.num_processes
    sharded = sharding.enable_fsdp(accelerator, plugin)
    print_once = accelerator.on_main_process(print)  # its own print() does so once per node
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # for what stays in fp32

    # ------------------------------------------------------------------ articles
    train_articles = open_articles(args.train_file, columns)
    lengths = plan.measure_lengths(prompt, train_articles)
    report_titles(surveys["train"], lengths, args.max_title_tokens)
    validation_articles = None
    if args.validation_file:
        validation_articles = open_articles(args.validation_file, columns, "validation")
        measured = plan.measure_lengths(prompt, validation_articles)
        report_titles(surveys["validation"], measured, args.max_title_tokens)
    articles_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    articles_per_update *= num_processes
    run_config = make_run_config(args, prompt, base_folder, checked, articles_per_update)
    run_config["hygiene"] = {split: survey.counts for split, survey in surveys.items()}
    # What one process takes for whole, another may not see yet, on a disk of several nodes.
    checkpoint = from_main_process(accelerator, checkpoints.find_checkpoint, args, run_config)

    # ------------------------------------------------------------------ plan
    # An epoch's last articles are an update too, however few.
    updates_per_epoch = math.ceil(len(train_articles) / articles_per_update)
    num_training_steps = updates_per_epoch * args.num_train_epochs
    num_training_steps = min(num_training_steps, args.max_train_steps or num_training_steps)
    num_warmup_steps = math.ceil(args.warmup_ratio * num_training_steps)
    num_cooldown_steps = math.ceil(args.cooldown_ratio * num_training_steps)
    schedule = (num_training_steps, updates_per_epoch, num_warmup_steps, num_cooldown_steps)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    nf4 = args.base_weights != "bf16"
    skeleton = modeling.skeleton(str(base_folder), dtype, tell=True)  # the base without weights
    modeling.check_kind(skeleton, args.model_name_or_path, nf4, lora=True, longest=args.max_length)
    modeling.check_ids(skeleton, args.model_name_or_path, lengths["largest_id"])
    if sharded:
        sharding.check_shardable(skeleton, base_folder)
    lora_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modeling.check_targets(skeleton, args.target_modules),
    )
    adapted = modeling.adapted_skeleton(skeleton, lora_config)
    shards = num_processes if sharded else 1
    room, resident = free_memory(device), resident_memory(device)

    def expect(padded: bool) -> dict:
        """Return what `memory.plan_memory` says of this run."""
        size = plan.largest_micro_batch(lengths, args, num_processes, num_training_steps, padded)
        setup = (skeleton, lora_config, args, device, size, shards)
        expected = memory.plan_memory(*setup, room, resident)
        [expected] = broadcast_object_list([expected])  # others may have seen other free memory
        return expected | {"padded": padded}

    unpacked = packing.never_packed(skeleton.config, args.max_length)  # why not, or None
    if unpacked and args.prompt_loss_weight:
        raise needs_packed_rows(unpacked)
    expected = expect(padded=bool(unpacked))
    if expected["this_run"] is None and not unpacked:
        expected = expect(padded=True)
    if slow_in_bf16 and args.mixed_precision == "bf16":
        note(f"{SLOW_IN_BF16}; a run with --mixed_precision no is faster")
    elif slow_in_bf16 and not asked:
        note(f"{SLOW_IN_BF16}; {IN_FP32} (see --mixed_precision)")
    what = (adapted, prompt, checked, lengths, schedule, expected)
    print_once(plan.describe_plan(args, accelerator, *what), flush=True)

    # ------------------------------------------------------------------ 4-bit base
    # NF4 with double quantization, multiplied in bf16: asked for by `nf4_config` in modeling.py,
    # which infer.py shares, and checked there on every loaded layer.
    base = modeling.load_base(str(base_folder), device, dtype, nf4, sharded)
    if args.base_weights == "nf4-bf16":
        modeling.dequantize_base(base)

    # ------------------------------------------------------------------ LoRA
    # Embeddings, norms and head stay as they were loaded (prepare_model_for_kbit_training would
    # copy them to fp32, at twice the memory). The adapter is fp32, for AdamW updates it.
    set_seed(args.seed)  # the same on every process, so that LoRA begins alike everywhere
    model = get_peft_model(base, lora_config)
    modeling.fuse_lora(model)  # PEFT's W x + (alpha / r) B A dropout(x), in fewer steps
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # ------------------------------------------------------------------ optimizer
    if sharded:  # bitsandbytes' kernels know no shards; the rule of an update is the same
        fused = device.type == "cuda"
        adamw = AdamW(trainable, lr=args.learning_rate, weight_decay=0.0, fused=fused)
    else:
        adamw = PagedAdamW32bit(trainable, lr=args.learning_rate, weight_decay=0.0)

    # ------------------------------------------------------------------ prepare
    state = checkpoints.first_state()
    if sharded:
        model, optimizer = sharding.shard(accelerator, model, adamw, base_folder)
        whole = sharding.Whole(skeleton, lora_config, model, adamw)
    else:
        if num_processes > 1:  # DDP waits for every gradient, unless told that some never come
            with accelerator.autocast():
                accelerator.ddp_handler.find_unused_parameters = modeling.leaves_unused(model)
        model, optimizer = accelerator.prepare(model, adamw)
    unwrapped = accelerator.unwrap_model(model)
    make_batch, why_not = choose_rows(accelerator, unwrapped, args)
    if why_not:
        padding = f"{UNPACKED} ({why_not}); shorter articles of a micro-batch are padded"
        if not expected["padded"]:
            expected = expect(padded=True)
            padding += f": {plan.describe_memory(expected)}"
        note(padding)
    run_config["memory"] = expected
    modeling.checkpoint_layers(base, expected["checkpointed_every"])

    def in_one_piece() -> tuple:
        """Return model and optimizer as checkpoints.py takes them; under FSDP, all-gathered."""
        return whole.gather() if sharded else (unwrapped, adamw)

    if checkpoint is not None:
        # After prepare, which would copy paged states into ordinary GPU memory.
        load = checkpoints.load_checkpoint
        [state] = broadcast_object_list([load(checkpoint, *in_one_piece(), run_config)])
        if sharded:
            whole.scatter()
    unfinished = state["completed_steps"] < num_training_steps
    set_aside = checkpoints.set_later_ones_aside
    from_main_process(accelerator, set_aside, output_dir, state["completed_steps"], unfinished)
    from_main_process(accelerator, write_run, output_dir, run_config, prompt.tokenizer, state)
    # What TensorBoard has of updates that a run which went back repeats is not shown.
    purge = {"tensorboard": {"purge_step": state["completed_steps"] + 1}}
    accelerator.init_trackers("manchette", tracked(args), init_kwargs=purge)
    if device.type == "cuda":
        print_once(f"{'loaded':10} {memory.describe_peak(device)}")

    # ------------------------------------------------------------------ train
    def milestone(step: int) -> bool:
        """Return whether a checkpoint and an evaluation are due after so many updates."""
        every = args.checkpointing_steps or updates_per_epoch
        return step == num_training_steps or 0 in (step % updates_per_epoch, step % every)

    def evaluate_and_record(stop_asked=stop.asked) -> bool:
        """Return whether the evaluation of the newest checkpoint came to its end."""
        if validation_articles is not None and not evaluate(
            accelerator, model, make_batch, prompt, validation_articles, args, state, stop_asked
        ):
            return False
        state["evaluated_steps"] = state["completed_steps"]
        limit = args.save_total_limit
        from_main_process(accelerator, checkpoints.record_evaluation, output_dir, state, limit)
        return True

    def read_update(step: int) -> list:
        """Return the articles of an update with their titles, as ids."""
        epoch, update = divmod(step, updates_per_epoch)
        order = batching.epoch_order(len(train_articles), args.seed, epoch)
        order = order[update * articles_per_update : (update + 1) * articles_per_update]
        rows = train_articles[order.tolist()]
        examples = prompt.encode_all(rows["text"], rows["title"])
        if args.prompt_loss_weight:
            weight = args.prompt_loss_weight
            examples = batching.learn_articles_too(examples, weight, args.seed, step)
        return examples

    stop.listen()  # from here on there is something to lose
    model.train()
    progress_bar = tqdm(
        total=num_training_steps,
        initial=state["completed_steps"],
        unit="update",
        disable=not accelerator.is_main_process,
    )
    recent = deque(maxlen=plan.PACE)
    stopping = False
    if state["evaluated_steps"] < state["completed_steps"] and milestone(state["completed_steps"]):
        # A stop came before or in this evaluation. The time limit does not count here: a start that
        # is too short for it would never get on.
        stopping = not evaluate_and_record(stop.asked_by_others)
    first_step, next_examples = state["completed_steps"], None
    # Should another node be lost, all that was done by then is on the first process.
    to_save = (output_dir, unwrapped, adamw, state, first_step, sharded)
    nodes.on_loss(lambda: checkpoints.save_what_is_left(*to_save))
    for step in range(first_step, num_training_steps):
        if stopping:
            break
        start_time = time.perf_counter()
        epoch, update = divmod(step, updates_per_epoch)
        examples = next_examples or read_update(step)
        # Every process knows the whole update, and so what its own share of it weighs.
        num_title_tokens = sum(example.num_title_ids for example in examples)
        micro_batches = batching.deal(
            examples, args.per_device_train_batch_size, accelerator.process_index, num_processes
        )

        # -------------------------------------------------------------- one update
        torch.manual_seed(batching.dropout_seed(args.seed, step, accelerator.process_index))
        # Linear warm-up, then constant; (step + 1), or the first update would have a rate of 0. If
        # there is a cooldown, linear to 0 over the last updates (arXiv 2405.18392).
        warm = (step + 1) / max(1, num_warmup_steps)
        cool = (num_training_steps - step) / (num_cooldown_steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, warm, cool)
        loss_sum = torch.zeros((), device=device)
        for micro_step, micro_batch in enumerate(micro_batches, start=1):
            # Gradients travel once, with the last micro-batch; to shards always, or each process
            # would keep the whole of them.
            last = micro_step == len(micro_batches)
            with nullcontext() if last or sharded else accelerator.no_sync(model):
                with accelerator.autocast():
                    batch_loss = title_loss(model, make_batch(micro_batch, device))
                # Divided by the title tokens of the whole update, so that each counts the same
                # however it is split. (DDP and FSDP take the mean over processes: undo that.)
                accelerator.backward(batch_loss * num_processes / num_title_tokens)
            loss_sum += batch_loss.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if sharded:
            grad_norm = grad_norm.full_tensor()
        # Sums over the processes: all skip this update, or none; all stop after it, or none.
        asked = torch.full_like(loss_sum, stop.asked())  # no copy, which would wait for the GPU
        sums = accelerator.reduce(torch.stack([loss_sum, asked]))
        # A GPU has yet to compute most of this when it has been asked for all: time to read on.
        next_examples = read_update(step + 1) if step + 1 < num_training_steps else None
        loss, num_asked = sums[0].item() / num_title_tokens, sums[1].item()
        if finite := math.isfinite(loss) and bool(grad_norm.isfinite()):
            optimizer.step()
        # DDP keeps gradients in its own buckets (see `process_group`): zeroed there, else freed.
        optimizer.zero_grad(set_to_none=sharded or num_processes == 1)
        # --------------------------------------------------------------

        metrics = {
            "step": step + 1,
            "epoch": epoch + (update + 1) / updates_per_epoch,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),  # before clipping
            "skipped": not finite,
            "articles": len(examples),
            "title_tokens": num_title_tokens,
            "tokens": sum(len(example.ids) for example in examples),  # without padding
            "seconds": time.perf_counter() - start_time,
        }
        log_metrics(accelerator, output_dir, metrics)
        progress_bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, lr {metrics['learning_rate']:.1e}, "
            f"{metrics['tokens'] / metrics['seconds']:,.0f} tokens/s"
        )
        progress_bar.update()
        recent.append(metrics)
        settled = step + 1 == first_step + plan.SETTLING + plan.PACE
        if settled and step + 1 < num_training_steps:
            print_once(plan.describe_time(recent, lengths, step + 1, schedule))
        state["completed_steps"] = step + 1
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
        if not finite:
            note(f"update {step + 1} skipped, its loss or gradient is not finite")
            state["skipped_steps"] += 1
        if state["skipped_in_a_row"] == MAX_SKIPPED_IN_A_ROW:
            checkpoints.give_up(accelerator, output_dir, *in_one_piece(), state)

        # After each epoch, every N updates and at the end, a checkpoint and then an evaluation.
        stopping = num_asked > 0
        if stopping or milestone(step + 1):
            save = checkpoints.save_checkpoint
            from_main_process(accelerator, save, output_dir, *in_one_piece(), state)
        if not stopping and milestone(step + 1):
            stopping = not evaluate_and_record()
    progress_bar.close()

    # ------------------------------------------------------------------ save
    if not stopping:
        # If no update was left to do, the peak is that of an earlier start.
        peak = memory.peak_memory(device) if unfinished else None
        save = checkpoints.save_adapter
        from_main_process(accelerator, save, in_one_piece()[0], state, peak, output_dir)
    accelerator.wait_for_everyone()  # nobody leaves early, see `keep_group`
    accelerator.end_training()
    if stopping:
        by = stop.reason() or "another process"
        print_once(
            f"stopped by {by} after update {state['completed_steps']:,} of {num_training_steps:,}, "
            "with a checkpoint; the same command with --resume_from_checkpoint latest goes on"
        )
        return STOPPED

    print_once(
        f"done: {output_dir}; {state['skipped_steps']:,} updates skipped, peak memory "
        f"{memory.describe_peak(device)}"
    )
    if args.push_to_hub and accelerator.is_main_process:
        push(args.output_dir, args.push_to_hub)
    return None


def recorded_precision(args) -> str | None:
    """Return the --mixed_precision of the run that is to go on, or None if none is."""
    if not args.resume_from_checkpoint or not Path(args.output_dir, RUN_CONFIG).is_file():
        return None
    recorded = read_run_config(args.output_dir)["arguments"].get("mixed_precision")
    return recorded if recorded in ("bf16", "no") else None


def choose_rows(accelerator, model, args):
    """Return how a micro-batch is made, by `batching.pack` or `batching.pad_left`, and what speaks
    against the former, or None. Both are tried; all processes decide alike.

    Raises:
        UserError: rows can only be padded, and `args` asks for what that does not allow.
    """
    from accelerate.utils import gather_object

    import batching
    import packing

    attention = model.config._attn_implementation
    with accelerator.autocast():
        why_not = packing.use_packed_attention(model.eval(), args.max_length)
    reasons = gather_object([why_not])  # all pack, or none: another GPU may have other kernels
    why_not = next((reason for reason in reasons if reason), None)
    if why_not is None:
        return batching.pack, None
    if args.prompt_loss_weight:
        raise needs_packed_rows(why_not)
    model.set_attn_implementation(attention)
    with accelerator.autocast():
        alone = packing.padding_changes(model)
    if alone and args.per_device_train_batch_size > 1:
        raise UserError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size}",
            f"{UNPACKED} ({why_not}), and says something else of padded ones",
            "give 1, and --gradient_accumulation_steps instead",
        )
    return batching.pad_left, why_not


def needs_packed_rows(why_not: str) -> UserError:
    return UserError("--prompt_loss_weight", f"{UNPACKED} ({why_not})", "leave it out")


def tracked(args) -> dict:
    """Return the arguments as trackers take them: numbers and switches as such, else text."""
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(args).items()}


def title_loss(model, batch):
    """Return the cross-entropy of title tokens and EOS, summed over a batch of `batching`.

    Where tokens of articles are among the labels, its gradient is theirs too, by their weights; its
    value is that of titles alone, to be compared with other runs and with the validation's. (It is
    not finite where any of them is not.)
    """
    import torch.nn.functional as F

    from batching import IGNORED

    inputs = {k: v for k, v in batch.items() if k not in ("labels", "weights", "of_titles")}
    logits = model(**inputs, use_cache=False).logits.flatten(0, -2)  # at label positions only
    labels, how = batch["labels"].flatten(), {"ignore_index": IGNORED}
    if (weights := batch.get("weights")) is None:
        return F.cross_entropy(logits.float(), labels, reduction="sum", **how)
    losses = F.cross_entropy(logits.float(), labels, reduction="none", **how)
    weighted = (losses * weights).sum()
    return (losses * batch["of_titles"]).sum().detach() + (weighted - weighted.detach())


def evaluate(accelerator, model, make_batch, prompt, articles, args, state, stop_asked) -> bool:
    """Log validation loss and ROUGE-L, show three titles, and note in `state` if this is the best.

    Returns False, and leaves everything as it was, once `stop_asked()` is true.

    Each process takes its share of the rows; the unwrapped model runs, for the shares may differ
    by a batch and DDP would wait for it. Under FSDP a process that is done runs along (`in_step`).
    """
    import torch
    from accelerate.utils import gather_object

    import batching
    from infer import generate_titles
    from title_figures import rouge_means

    rank, world_size = accelerator.process_index, accelerator.num_processes
    unwrapped = accelerator.unwrap_model(model).eval()
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast(), sharding.in_step(unwrapped):
        mine = list(range(rank, len(articles), world_size))
        for start in range(0, len(mine), 64):
            if stop_asked():  # before reading on: there may be a hundred thousand rows
                break
            rows = articles[mine[start : start + 64]]
            examples = prompt.encode_all(rows["text"], rows["title"])
            for micro_batch in batching.deal(examples, args.per_device_train_batch_size):
                if stop_asked():
                    break
                batch = make_batch(micro_batch, accelerator.device)
                totals[0] += title_loss(unwrapped, batch)
                totals[1] += sum(example.num_title_ids for example in micro_batch)
        # Titles of evenly spaced rows, the same at every evaluation.
        sample = evenly_spaced(len(articles), args.num_eval_titles)
        rows = articles[sample[rank::world_size]]
        budget = args.per_device_train_batch_size * args.max_length  # no more than in training
        if make_batch is batching.pad_left and args.per_device_train_batch_size == 1:
            budget = 1  # one by one there, too: it may bear no padding
        generated = dict(
            generate_titles(
                unwrapped, prompt, rows["text"], max_batch_tokens=budget, stop_asked=stop_asked
            )
        )
        totals[2] = stop_asked()
    model.train()
    loss_sum, num_tokens, num_asked = accelerator.reduce(totals).tolist()
    if num_asked:
        return False
    titles = [(generated[i].title, rows["title"][i]) for i in range(len(generated))]
    figures = {"eval_loss": loss_sum / num_tokens}
    if titles := gather_object(titles):
        predictions, references = zip(*titles, strict=True)
        figures["eval_rougeL"] = rouge_means(predictions, references)["default"]["rougeL"]
        log_titles(accelerator, titles[:LOGGED_TITLES], state["completed_steps"])
        for prediction, reference in titles[:3]:
            shown = f"\n  written: {printable(prediction)}\n  true:    {printable(reference)}"
            accelerator.on_main_process(print)(shown)
    log_metrics(accelerator, Path(args.output_dir), {"step": state["completed_steps"]} | figures)
    accelerator.on_main_process(print)(
        ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    )
    by_loss = args.metric_for_best_model == "loss"
    value = figures["eval_loss"] if by_loss else -figures["eval_rougeL"]  # lower is better
    if math.isfinite(value) and (state["best_value"] is None or value < state["best_value"]):
        state |= {"best_step": state["completed_steps"], "best_value": value}
    return True


if __name__ == "__main__":
    run(main)
