#!/usr/bin/env bash
# Fine-tune with QLoRA: scripts/train.py, with the demo unless told otherwise.
#   bash run_train.sh                        the demo: no GPU, no account, minutes on 2 cores
#   MODEL=... TRAIN_FILE=... RUN_DIR=... bash run_train.sh --num_train_epochs 1    (more: --help)
#   sbatch [--nodes 2] run_train.sh          the same under SLURM; edit the lines below first

# --- SLURM (plain comments under bash) ---
#SBATCH --job-name=manchette      # as the queue shows it
#SBATCH --partition=gpu           # <-- edit
#SBATCH --gres=gpu:1              # GPUs of each node; the config has a process for each of them
#SBATCH --cpus-per-task=8         # for reading and tokenizing
#SBATCH --mem=32G                 # the 7B base passes through it once
#SBATCH --time=24:00:00           # <-- edit
#SBATCH --signal=B:USR1@300       # 5 minutes before the end: time to finish and to save
#SBATCH --requeue                 # lets the job put itself back into the queue, and go on
#SBATCH --open-mode=append        # in the same log

# --- Settings: edit here, or set them in the environment ---
set -euo pipefail
refuse() { echo "error: $1" >&2; exit 2; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[ -f scripts/train.py ] || cd "${SLURM_SUBMIT_DIR:-.}"  # sbatch runs a copy that lies elsewhere
[ -f scripts/train.py ] || refuse "$PWD: not the repository; submit the job from its root"
[[ ! " $* " =~ " --help "|" -h " ]] || PATH=".venv/bin:$PATH" exec python3 scripts/train.py --help
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}"  # the machine
DEMO="${DEMO:-demo}"                      # folder of the demo
MODEL="${MODEL:-$DEMO/model}"             # folder or Hub id: meta-llama/Llama-2-7b-chat-hf
TRAIN_FILE="${TRAIN_FILE:-}"              # articles with their titles
VALIDATION_FILE="${VALIDATION_FILE:-}"    # the same; empty: nothing is evaluated
PROMPT_FILE="${PROMPT_FILE:-prompts/fr.txt}"
RUN_DIR="${RUN_DIR:-}"                    # where the run goes
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-0}"  # 1 on nodes without a network

if [ "$MODEL" = "$DEMO/model" ]; then  # a small model learns faster; CPUs are slow to draw dropout
  [ -z "$TRAIN_FILE$VALIDATION_FILE" ] ||
    refuse "MODEL: the demo's, which has its own files; set yours"
  TRAIN_FILE="$DEMO/train.csv" VALIDATION_FILE="$DEMO/validation.csv"
  RUN_DIR="${RUN_DIR:-runs/demo}"
  set -- --learning_rate 2e-3 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 \
    --lora_dropout 0 --activation_checkpointing none --max_length 256 --max_title_tokens 48 "$@"
fi
for name in TRAIN_FILE RUN_DIR; do
  [ -n "${!name}" ] || refuse "$name: not set; give it beside MODEL"; done
[ -f "$ACCELERATE_CONFIG" ] || refuse "$ACCELERATE_CONFIG: no such file; check ACCELERATE_CONFIG"

# --- Environment: an active one, else .venv; SETUP=0 leaves it alone ---
source scripts/setup.sh requirements.txt
source scripts/launch.sh
OPTIONS="$(python scripts/machine.py --config_file "$ACCELERATE_CONFIG")"  # or a complaint

# --- Train ---
[ "$MODEL" != "$DEMO/model" ] || step python scripts/make_demo.py --output_dir "$DEMO"
ARGS=(--model_name_or_path "$MODEL" --train_file "$TRAIN_FILE" --prompt_file "$PROMPT_FILE"
  ${VALIDATION_FILE:+--validation_file "$VALIDATION_FILE"} --output_dir "$RUN_DIR"
  --resume_from_checkpoint latest)  # what was stopped goes on
launch scripts/train.py "${ARGS[@]}" "$@"
step python scripts/score.py --runs "$RUN_DIR" --output_dir "$RUN_DIR"  # its curves, as a page
