#!/usr/bin/env bash
# The report's other steps: titles of a test file without fine-tuning, with the adapter, merge,
# titles of the merged model, and the scores side by side.
#
#   bash run_infer.sh                        the demo, after bash run_train.sh; about 1 minute
#   RUN_DIR=... INPUT_FILE=... REFERENCES=... bash run_infer.sh         (more options: --help)
#   sbatch run_infer.sh                      the same under SLURM; edit the lines below first

# --- SLURM (plain comments under bash) ---
#SBATCH --job-name=manchette      # as the queue shows it
#SBATCH --partition=gpu           # <-- edit
#SBATCH --gres=gpu:1              # GPUs of the node; as many as num_processes of the config
#SBATCH --cpus-per-task=8         # for reading and tokenising
#SBATCH --mem=32G                 # merging passes the base through it, piece by piece
#SBATCH --time=04:00:00           # <-- edit

# --- Settings: edit here, or set them in the environment ---
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")}"  # sbatch runs a copy that lies elsewhere
DEMO="${DEMO:-demo}"                          # the demo's folder
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-accelerate_configs/cpu.yaml}"  # the machine
MODEL="${MODEL:-$DEMO/model}"                 # the base of the run
PROMPT_FILE="${PROMPT_FILE:-prompts/fr.txt}"  # for the base without fine-tuning
RUN_DIR="${RUN_DIR:-runs/demo}"               # what run_train.sh wrote
INPUT_FILE="${INPUT_FILE:-$DEMO/test.csv}"    # articles
REFERENCES="${REFERENCES-$DEMO/test_titles.csv}"  # their true titles; empty: no scores
OUTPUT_DIR="${OUTPUT_DIR:-predictions/demo}"  # where titles, merged model and scores go

# --- Environment: an active one, else .venv; SETUP=0 leaves it alone ---
source scripts/setup.sh requirements.txt

# --- Infer, merge, infer merged, score ---
export EXIT_CODE_FILE="$(mktemp)"  # accelerate answers 1 to whatever the script answered
infer() {  # infer NAME OPTIONS...: titles in $OUTPUT_DIR/NAME.csv
  ARGS=(--input_file "$INPUT_FILE" --output_file "$OUTPUT_DIR/$1.csv" "${@:2}")
  accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" scripts/infer.py "${ARGS[@]}" \
    || exit "$(grep . "$EXIT_CODE_FILE" || echo 1)"
}
mkdir -p "$OUTPUT_DIR"
infer untuned --model_name_or_path "$MODEL" --prompt_file "$PROMPT_FILE" "$@"
infer adapter --run_dir "$RUN_DIR" "$@"
[ -d "$OUTPUT_DIR/merged" ] || python scripts/merge.py --run_dir "$RUN_DIR" --output_dir "$OUTPUT_DIR/merged"
infer merged --run_dir "$OUTPUT_DIR/merged" "$@"
if [ -n "$REFERENCES" ]; then
  python scripts/score.py --references "$REFERENCES" --output_dir "$OUTPUT_DIR" \
    --predictions "$OUTPUT_DIR"/{untuned,adapter,merged}.csv
fi
