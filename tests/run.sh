#!/usr/bin/env bash
# Run every test that this machine can run, from a fresh clone on: bash tests/run.sh [pytest options]
#
# It installs what is missing into the active environment, or into .venv if none is active (SETUP=0
# leaves that out). Tests that need a GPU skip themselves where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${SETUP:-1}" = 1 ]; then
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    export PATH="$PWD/.venv/bin:$PATH"
  fi
  python -c 'import accelerate, bitsandbytes, datasets, evaluate, hypothesis, peft, py3langid, pytest
import rouge_score, sentencepiece, tensorboard, torch, transformers' 2>/dev/null \
    || python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
fi

exec python -m pytest "$@"
