#!/usr/bin/env bash
# Run every test that this machine can run, from a fresh clone on: bash tests/run.sh [pytest options]
#
# It installs what is missing into the active environment, or into .venv if none is active (SETUP=0
# leaves that out). Tests that need a GPU skip themselves where there is none. Without options, a
# process for each core takes a file at a time; beside a GPU, whose memory is measured, one takes all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/setup.sh requirements.txt tests/requirements.txt
[ $# -gt 0 ] || command -v nvidia-smi > /dev/null ||
  set -- --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
exec python -m pytest "$@"
