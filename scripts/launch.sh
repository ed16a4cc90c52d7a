# Sourced by the launchers: run a script through `accelerate launch`, in a way that can be stopped.
#
#   launch scripts/train.py --lora_r 8      with the config that ACCELERATE_CONFIG names
#
# A first SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP to the launcher makes the file STOP_FILE, that
# all processes of the script look for: they finish what they are at, and the script ends with 75. A
# second signal ends them at once. Under SLURM a job that ran out of time (SIGUSR1 from the line
# `--signal`, or --max_time) or lost a node puts itself back into the queue; one that was cancelled
# does not. In a job of several nodes, srun starts `accelerate launch` once on each.

ON_NODES=() RENDEZVOUS=() RANK_OF_NODE=""
if [ "${SLURM_NNODES:-1}" = 1 ]; then
  EXIT_CODE_FILE="$(mktemp)"
else
  HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" || true)"
  [ -n "$HOSTS" ] || refuse "scontrol: it does not say which nodes the job has; ask who runs SLURM"
  # Without this, srun forgets the job's --cpus-per-task, and may end all nodes with the first one.
  ON_NODES=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
  # The first process is on the first node; ports from 32768 on are given away by the system.
  RENDEZVOUS=(--main_process_ip "${HOSTS%%$'\n'*}"
    --main_process_port $((10000 + SLURM_JOB_ID % 20000)))
  RANK_OF_NODE='--machine_rank "$SLURM_NODEID"'  # not known before a node's own shell reads it
  EXIT_CODE_FILE="$(mktemp "$PWD/slurm-$SLURM_JOB_ID.XXXXXX")"  # where every node sees it
fi
STOP_FILE="$EXIT_CODE_FILE.stop"
# A scheduler may signal every process of a job. What stands between this shell and the script must
# survive that, or this shell ends before the script has saved: it ignores the signals, and torchrun
# is told not to take them back, but to pass on the one that is used here to end all of it.
export EXIT_CODE_FILE STOP_FILE PET_SIGNALS_TO_HANDLE=SIGUSR2 ACCELERATE_CONFIG
# On a CPU: glibc's caches of small blocks would keep it from using freed large ones again, which
# takes up to twice the memory (README). A GPU has no such blocks, only the small ones.
if grep -qs '^use_cpu: *true' "$ACCELERATE_CONFIG"; then
  export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0}"
  export ACCELERATE_USE_CPU=true  # accelerate tells it to a single process alone
fi
job="" asked=""  # from here on, for a signal may come between two scripts
trap 'rm -f "$EXIT_CODE_FILE" "$STOP_FILE"' EXIT
ask() {
  if [ -n "$asked" ] && [ -n "$job" ]; then kill -USR2 -- "-$job"; fi
  asked="${asked:-$1}"
  : > "$STOP_FILE"
}
for name in TERM INT USR1 HUP; do trap "ask $name" "$name"; done

launch() {
  local code
  : > "$EXIT_CODE_FILE"
  set -m  # a process group of its own: Ctrl-C reaches this shell alone
  (trap '' TERM INT USR1 HUP
   exec "${ON_NODES[@]}" bash -c "trap '' TERM INT USR1 HUP  # srun does not hand that on
     exec accelerate launch --quiet --config_file \"\$ACCELERATE_CONFIG\" $RANK_OF_NODE \"\$@\"" \
     - $PROCESSES "${RENDEZVOUS[@]}" "$@") < /dev/null &
  job=$!
  set +m
  while kill -0 "$job" 2> /dev/null; do
    wait "$job" 2> /dev/null || true  # a trapped signal ends `wait` too
  done
  # accelerate answers 1 to whatever went wrong; the script itself says what it was, if it could.
  wait "$job" && code=0 || code="$(grep -vx 0 "$EXIT_CODE_FILE" || echo "${asked:+130}")"
  job=""
  if [ "$code" = 75 ] && [ -n "${SLURM_JOB_ID:-}" ] && [[ "$asked" == @(|USR1) ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "could not requeue; run: sbatch ${0##*/}" >&2
  fi
  [ "$code" = 0 ] || exit "${code:-1}"
}
