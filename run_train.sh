#!/usr/bin/env bash
# Fine-tune with QLoRA: scripts/train.py on one machine, the demo unless told otherwise.
#
#   bash run_train.sh                        the demo: no GPU, no account, about 2 minutes on 2 cores
#   MODEL=... TRAIN_FILE=... bash run_train.sh --num_train_epochs 1     (more options: --help)
#   sbatch run_train.sh                      the same under SLURM; edit the lines below first

# --- SLURM (plain comments under bash) ---
#SBATCH --job-name=manchette      # as the queue shows it
#SBATCH --partition=gpu           # <-- edit
#SBATCH --gres=gpu:1              # GPUs of the node; as many as num_processes of the config
#SBATCH --cpus-per-task=8         # for reading and tokenising
#SBATCH --mem=32G                 # the 7B base passes through it once
#SBATCH --time=24:00:00           # <-- edit

# --- Settings: edit here, or set them in the environment ---
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")}"  # sbatch runs a copy that lies elsewhere
DEMO="${DEMO:-demo}"                          # the demo's folder, made if it is used
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}"  # the machine
MODEL="${MODEL:-$DEMO/model}"                 # folder or Hub id: meta-llama/Llama-2-7b-chat-hf
TRAIN_FILE="${TRAIN_FILE:-$DEMO/train.csv}"
VALIDATION_FILE="${VALIDATION_FILE:-$DEMO/validation.csv}"
PROMPT_FILE="${PROMPT_FILE:-prompts/fr.txt}"
RUN_DIR="${RUN_DIR:-runs/demo}"               # where the run goes

# --- Environment: an active one, else .venv; SETUP=0 leaves it alone ---
source scripts/setup.sh requirements.txt

# --- Train ---
ARGS=(--model_name_or_path "$MODEL" --train_file "$TRAIN_FILE" --prompt_file "$PROMPT_FILE"
  --validation_file "$VALIDATION_FILE" --output_dir "$RUN_DIR")
if [ "$MODEL" = "$DEMO/model" ]; then  # a small model learns faster, and has memory to spare
  python scripts/make_demo.py --output_dir "$DEMO"
  ARGS+=(--learning_rate 2e-3 --per_device_train_batch_size 16 --gradient_accumulation_steps 1
    --no-activation_checkpointing --max_length 256 --max_title_tokens 48)
fi
export EXIT_CODE_FILE="$(mktemp)"  # accelerate answers 1 to whatever the script answered
accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" scripts/train.py "${ARGS[@]}" "$@" \
  || exit "$(grep . "$EXIT_CODE_FILE" || echo 1)"
