#!/usr/bin/env bash
# All that is to be measured on a GPU, in parts:
#
#   bash tests/benchmarks/gpu.sh OUT                  the tests, then training and titles at 7B
#   bash tests/benchmarks/gpu.sh OUT train variants   these parts alone
#   SMOLLM2=FOLDER INF582=FOLDER bash tests/benchmarks/gpu.sh OUT real best    the report's table
#   (the same with CONFIG=accelerate_configs/cpu.yaml SLICE=8, for a try on a CPU)
#   MODEL=tiny UPDATES=8 ROWS=6 bash tests/benchmarks/gpu.sh OUT          a try on a CPU
#
# OUT gets a JSON for each part, with device, versions and command, and a log. The model of random
# weights and its articles are made once, in OUT/llama-2-7b (SCRATCH=FOLDER: in another place than
# OUT, such as one in memory).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT="${1:?give a folder}"
shift
MODEL="${MODEL:-llama-2-7b}" UPDATES="${UPDATES:-100}" ROWS="${ROWS:-1500}"
MADE="${SCRATCH:-$OUT}/$MODEL"
CONFIG="${CONFIG:-accelerate_configs/single_gpu.yaml}"
REAL=(${SLICE:+--train_rows "$SLICE" --validation_rows "$SLICE" --test_rows "$SLICE"})
export HF_HUB_OFFLINE=1
mkdir -p "$OUT"

part() {  # part NAME COMMAND...: its output goes to a log, of which the end is shown
  echo "== $1"
  "${@:2}" > "$OUT/$1.log" 2>&1 || echo "$1 answered $?"
  tail -n 15 "$OUT/$1.log"
}
bench() {
  [ -f "$MADE/articles.csv" ] ||
    python tests/benchmarks/bench_train.py --model "$MODEL" --make "$MADE" || return
  python "tests/benchmarks/$1.py" --model "$MADE/model" --data_file "$MADE/articles.csv" "${@:2}"
}

[ $# -gt 0 ] || set -- tests train variants smallest estimates overhead titles
for name in "$@"; do
  case "$name" in
    tests) part tests python -m pytest -q -rP -m gpu tests/gpu ;;
    train) part train bench bench_train --updates "$UPDATES" --rounds 1 --lora_dropout 0 \
      --ours "nf4-bf16=--base_weights nf4-bf16" --output_file "$OUT/bench_train_gpu.json" ;;
    # What pays: each against the first, at the same articles per update.
    variants) part variants bench bench_train --updates "$UPDATES" --rounds 1 --loops ours \
      --ours "8x1=--per_device_train_batch_size 8 --gradient_accumulation_steps 1" \
      "2x4=--per_device_train_batch_size 2 --gradient_accumulation_steps 4" \
      "no-dropout=--lora_dropout 0" "full=--activation_checkpointing full" \
      "nf4-bf16-8x1=--base_weights nf4-bf16 --lora_dropout 0 --per_device_train_batch_size 8
       --gradient_accumulation_steps 1" --output_file "$OUT/bench_variants_gpu.json" ;;
    smallest) part smallest bench bench_train --updates 20 --rounds 1 --loops --lora_dropout 0 \
      --ours "smallest=--activation_checkpointing full" --output_file "$OUT/bench_small_gpu.json" ;;
    estimates) part estimates bench estimates --updates 24 --output_file "$OUT/estimates_gpu.json" \
      --only "nf4, 4 x 2" "nf4, every layer" "nf4, dropout 0.1, rank 64" "nf4-bf16, 4 x 2" ;;
    overhead) part overhead bench overhead --updates "$UPDATES" \
      --output_file "$OUT/overhead_gpu.json" ;;
    titles) part titles bench bench_infer --rows "$ROWS" --max_new_tokens 50 --pipeline_rows 50 \
      --loops ours adapter unsorted pipeline --rounds 1 \
      --ours "continuous=--engine continuous" --output_file "$OUT/bench_infer_gpu.json" ;;
    real) part real python tests/benchmarks/real_data.py --model "$SMOLLM2" --data_dir "$INF582" \
      --output_dir "$OUT/real" --config_file "$CONFIG" --max_length 1024 "${REAL[@]}" \
      --untuned_prompts prompts/fr.txt prompts/en.txt --submissions untuned adapter ;;
    # What had the lowest validation loss on a CPU (Q and S in README.md), at the full size.
    best) part best python tests/benchmarks/real_data.py --model "$SMOLLM2" --data_dir "$INF582" \
      --output_dir "$OUT/best" --config_file "$CONFIG" --max_length 1024 "${REAL[@]}" \
      --untuned_prompts --submissions adapter chosen drawn --ways "beams=--num_beams 4" \
      "chosen=--no_repeat_ngram_size 6 --min_new_tokens 48" \
      "drawn=--num_samples 16 --no_repeat_ngram_size 6 --min_new_tokens 48" -- \
      --lora_r 256 --lora_alpha 128 --lora_dropout 0 --learning_rate 6e-4 --num_train_epochs 3 \
      --prompt_loss_weight 0.1 --base_weights nf4-bf16 --cooldown_ratio 0.25 ;;
    *) echo "no part is called $name" >&2; exit 2 ;;
  esac
done
