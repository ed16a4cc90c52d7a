#!/usr/bin/env bash
# Titles without fine-tuning, with it, by the merged model, and a page that compares them.
#   bash run_infer.sh                        the demo, after bash run_train.sh; about 1 minute
#   MODEL=... RUN_DIR=... INPUT_FILE=... OUTPUT_DIR=... bash run_infer.sh      (more: --help)
#   sbatch [--nodes 2] run_infer.sh          the same under SLURM; edit the lines below first

# --- SLURM (plain comments under bash) ---
#SBATCH --job-name=manchette      # as the queue shows it
#SBATCH --partition=gpu           # <-- edit
#SBATCH --gres=gpu:1              # GPUs of each node; the config has a process for each of them
#SBATCH --cpus-per-task=8         # for reading and tokenizing
#SBATCH --mem=32G                 # merging passes the base through it, piece by piece
#SBATCH --time=04:00:00           # <-- edit
#SBATCH --signal=B:USR1@300       # 5 minutes before the end: time to finish and to save
#SBATCH --requeue                 # lets the job put itself back into the queue, and go on
#SBATCH --open-mode=append        # in the same log

# --- Settings: edit here, or set them in the environment ---
set -euo pipefail
refuse() { echo "error: $1" >&2; exit 2; }
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[ -f scripts/train.py ] || cd "${SLURM_SUBMIT_DIR:-.}"  # sbatch runs a copy that lies elsewhere
[ -f scripts/train.py ] || refuse "$PWD: not the repository; submit the job from its root"
[[ ! " $* " =~ " --help "|" -h " ]] || PATH=".venv/bin:$PATH" exec python3 scripts/infer.py --help
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}"  # the machine
DEMO="${DEMO:-demo}"                          # folder of the demo
MODEL="${MODEL:-$DEMO/model}"                 # the base of the run
PROMPT_FILE="${PROMPT_FILE:-prompts/fr.txt}"  # for the base without fine-tuning
RUN_DIR="${RUN_DIR:-}"                        # what run_train.sh wrote, or a checkpoint in it
INPUT_FILE="${INPUT_FILE:-}"                  # articles
REFERENCES="${REFERENCES:-}"                  # their true titles; empty: a report without scores
OUTPUT_DIR="${OUTPUT_DIR:-}"                  # where titles, merged model and scores go
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-0}"  # 1 on nodes without a network
if [ "$MODEL" = "$DEMO/model" ]; then  # lengths as in its training, for the base too
  [ -z "$INPUT_FILE$REFERENCES" ] || refuse "MODEL: the demo's, which has its own files; set yours"
  INPUT_FILE="$DEMO/test.csv" REFERENCES="$DEMO/test_titles.csv"
  RUN_DIR="${RUN_DIR:-runs/demo}" OUTPUT_DIR="${OUTPUT_DIR:-predictions/demo}"
  set -- --max_length 256 --max_new_tokens 48 "$@"
fi
for name in RUN_DIR INPUT_FILE OUTPUT_DIR; do
  [ -n "${!name}" ] || refuse "$name: not set; give it beside MODEL"; done
[ -f "$ACCELERATE_CONFIG" ] || refuse "$ACCELERATE_CONFIG: no such file; check ACCELERATE_CONFIG"

# --- Environment: an active one, else .venv; SETUP=0 leaves it alone ---
source scripts/setup.sh requirements.txt
source scripts/launch.sh
OPTIONS="$(python scripts/machine.py --config_file "$ACCELERATE_CONFIG")"  # or a complaint

# --- Infer, merge, infer merged, score ---
infer() { launch scripts/infer.py --input_file "$INPUT_FILE" --output_file "$OUTPUT_DIR/$@"; }
mkdir -p "$OUTPUT_DIR"
infer untuned.csv --model_name_or_path "$MODEL" --prompt_file "$PROMPT_FILE" "$@"
infer adapter.csv --run_dir "$RUN_DIR" "$@"
step python scripts/merge.py --run_dir "$RUN_DIR" --output_dir "$OUTPUT_DIR/merged"
infer merged.csv --run_dir "$OUTPUT_DIR/merged" "$@"
mapfile -t NAMES < <(printf '%s\n' "$@" | sed -nE '/^--(text|id)_column/{p;/=/!{n;p}}')
step python scripts/score.py ${REFERENCES:+--references "$REFERENCES"} --articles "$INPUT_FILE" \
  "${NAMES[@]}" --predictions "$OUTPUT_DIR"/{untuned,adapter,merged}.csv --baselines lead1 first40 \
  ${REFERENCES:+ext-oracle} --runs "${RUN_DIR%/checkpoints/step-*}" "$OUTPUT_DIR/merged" \
  --output_dir "$OUTPUT_DIR"
