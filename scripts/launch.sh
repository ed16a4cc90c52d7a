# Sourced by the launchers: run a script through `accelerate launch`, in a way that can be stopped.
#
#   launch scripts/train.py --lora_r 8      with the config that ACCELERATE_CONFIG names
#
# A first SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 to the launcher makes the file STOP_FILE, which all
# processes of the script look for: they finish what they are at, and the script ends with 75. A
# second signal ends them at once. Under SLURM a job that ran out of time (SIGUSR1 from the line
# `--signal`, or --max_time) puts itself back into the queue; one that was cancelled does not.

launch() {
  local job="" code asked=""
  EXIT_CODE_FILE="$(mktemp)" && STOP_FILE="$EXIT_CODE_FILE.stop"
  export EXIT_CODE_FILE STOP_FILE
  trap 'rm -f "$EXIT_CODE_FILE" "$STOP_FILE"' EXIT
  ask() {
    if [ -n "$asked" ] && [ -n "$job" ]; then kill -- "-$job"; else asked="$1"; : > "$STOP_FILE"; fi
  }
  for name in TERM INT USR1; do trap "ask $name" "$name"; done
  set -m  # a process group of its own: Ctrl-C reaches this shell alone
  accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" "$@" < /dev/null &
  job=$!
  set +m
  while kill -0 "$job" 2> /dev/null; do
    wait "$job" || true  # a trapped signal ends `wait` too
  done
  trap - TERM INT USR1
  # accelerate answers 1 to whatever went wrong; the script itself says what it was, if it could.
  wait "$job" && code=0 || code="$(grep -vx 0 "$EXIT_CODE_FILE" || echo "${asked:+130}")"
  rm -f "$EXIT_CODE_FILE" "$STOP_FILE"
  if [ "$code" = 75 ] && [ -n "${SLURM_JOB_ID:-}" ] && [[ "$asked" != @(TERM|INT) ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "could not requeue; run: sbatch ${0##*/}" >&2
  fi
  [ "$code" = 0 ] || exit "${code:-1}"
}
