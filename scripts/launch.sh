# Sourced by the launchers: run their scripts in a way that can be stopped.
#
#   launch scripts/train.py --lora_r 8      through accelerate, by the config ACCELERATE_CONFIG
#   step python scripts/merge.py ...        as it is
#
# A first SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP to the launcher makes the file STOP_FILE, that
# all processes of a launched script look for: they finish what they are at, and it ends with 75. A
# step is ended at once, with 75 too. So are those processes by a second signal, two seconds later
# or more: terminals that are closed send several. A SLURM job that ran out of time (SIGUSR1 from
# the line `--signal`, or --max_time) or lost a node puts itself back into the queue; one that was
# cancelled does not. In a job of several nodes, srun starts `accelerate launch` once on each.

set +o posix  # in which `sh` of some systems runs bash: it would forget how a job has ended
[[ ! " $* " =~ " --"(run_dir|input_file|output_file|output_dir)[\ =] ]] ||
  refuse "--${BASH_REMATCH[1]}: other steps need it too; set the launcher's variable instead"
ON_NODES=() RENDEZVOUS=() RANK_OF_NODE=""
if [ "${SLURM_NNODES:-1}" = 1 ]; then
  EXIT_CODE_FILE="$(mktemp)"
else
  HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" || true)"
  [ -n "$HOSTS" ] || refuse "scontrol: it does not say which nodes the job has; ask who runs SLURM"
  # Without these, srun forgets the job's --cpus-per-task, leaves out what sbatch was told not to
  # export and what is exported below, and may end all nodes with, or soon after, the first one.
  ON_NODES=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0
    --wait=0 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
  # The first process is on the first node; ports from 32768 on are given away by the system.
  RENDEZVOUS=(--main_process_ip "${HOSTS%%$'\n'*}"
    --main_process_port $((10000 + SLURM_JOB_ID % 20000)))
  RANK_OF_NODE='--machine_rank "$SLURM_NODEID"'  # not known before a node's own shell reads it
  [ "${SLURM_RESTART_COUNT:-0}" = 0 ] ||  # an earlier start may have lost this very node
    rm -f "slurm-$SLURM_JOB_ID.code."*
  EXIT_CODE_FILE="$(mktemp "$PWD/slurm-$SLURM_JOB_ID.code.XXXXXX")"  # where every node sees it
fi
STOP_FILE="$EXIT_CODE_FILE.stop"
# A scheduler may signal every process of a job. What stands between this shell and the script must
# survive that, or this shell ends before the script has saved: it ignores the signals, and torchrun
# is told not to take them back, but to pass on the one that is used here to end all of it.
export EXIT_CODE_FILE STOP_FILE PET_SIGNALS_TO_HANDLE=SIGUSR2 ACCELERATE_CONFIG
# On a CPU: glibc's caches of small blocks would keep it from using freed large ones again, which
# takes a sixth more memory (README). Large blocks of a GPU's run are on the GPU.
if grep -qsiE '^use_cpu: *(true|yes|on) *(#.*)?$' "$ACCELERATE_CONFIG"; then
  export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0}"
  export ACCELERATE_USE_CPU=true  # accelerate tells it to a single process alone
fi
job="" end="" asked="" asked_at=0  # from here on, for a signal may come between two scripts
trap 'rm -f "$EXIT_CODE_FILE" "$EXIT_CODE_FILE".{over,said} "$STOP_FILE"' EXIT
ask() {
  if [ -z "$asked" ]; then
    asked="$1" asked_at=$SECONDS
    : > "$STOP_FILE" || echo "$STOP_FILE cannot be made; a second signal ends all at once" >&2
    [ -z "$job" ] || [ "$end" = TERM ] ||  # ("true": a terminal that is closed takes no message)
      echo "stopping as soon as nothing is half done; once more to stop at once" >&2 || true
    [ "$end" = TERM ] || return 0
  elif [ $((SECONDS - asked_at)) -lt 2 ]; then
    return 0
  fi
  [ -z "$job" ] || kill "-$end" -- "-$job" 2> /dev/null || true
}
for name in TERM INT USR1 HUP; do trap "ask $name" "$name"; done

start() {  # start SIGNAL COMMAND...: SIGNAL ends it; sets `code`
  [ -z "$asked" ] || leave 75
  end="$1"
  set -m  # a process group of its own: Ctrl-C reaches this shell alone
  "${@:2}" < /dev/null &
  job=$!
  set +m
  [ -z "$asked" ] || [ "$end" != TERM ] || kill -TERM -- "-$job" 2> /dev/null || true  # just now
  while kill -0 "$job" 2> /dev/null; do
    wait "$job" 2> /dev/null || true  # a trapped signal ends `wait` too
  done
  wait "$job" && code=0 || code=$?
  job=""
}

leave() {  # with an exit code; if it is a job's own script, which slurmd calls so, the job goes on
  local number="${SLURM_JOB_ID:-}"
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || number="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  if [ "$1" = 75 ] && [ -n "$number" ] && [[ "$0" == */slurm_script && "$asked" == @(|USR1) ]]; then
    scontrol requeue "$number" || echo "could not requeue; submit it again" >&2
  fi
  exit "$1"
}

step() {
  start TERM "$@"
  if [ "$code" != 0 ] && [ -n "$asked" ]; then code=75; fi
  [ "$code" = 0 ] || leave "$code"
}

launch() {
  start USR2 accelerated "$@"
  if [ "$code" != 0 ]; then
    # accelerate answers 1 to whatever went wrong; the script itself says what it was, if it could.
    code="$(grep -vx 0 "$EXIT_CODE_FILE" || echo "${asked:+130}")"
    # Of several processes, what one has complained of: 25 lines of torchrun's stand below it.
    [ ! -e "$EXIT_CODE_FILE.said" ] || cat "$EXIT_CODE_FILE.said" >&2 || true
    leave "${code:-1}"
  fi
  [ -n "$asked" ] || rm -f "$STOP_FILE"  # of a process that was signalled alone, and done by then
}

# srun waits for a node that is gone until SLURM has noticed, which takes it minutes, while the
# others stand idle. Once the first process has failed, or saved, they have so many seconds to end.
give_up_on_nodes() {  # PID of srun, which takes its step with it
  trap '' USR2
  local left="${NODE_PATIENCE:-120}"
  while sleep 5 && kill -0 "$1" 2> /dev/null; do
    if [ -e "$EXIT_CODE_FILE.over" ] && [ $((left -= 5)) -le 0 ]; then
      echo "some nodes have not ended; srun does not wait for them any longer" >&2
      kill -KILL "$1"
    fi
  done
}

accelerated() {
  : > "$EXIT_CODE_FILE"
  rm -f "$EXIT_CODE_FILE".{over,said}
  trap '' TERM INT USR1 HUP
  local srun=$BASHPID  # what this shell becomes
  if [ "${#ON_NODES[@]}" != 0 ]; then give_up_on_nodes "$srun" & fi
  exec "${ON_NODES[@]}" bash -c "trap '' TERM INT USR1 HUP  # srun does not hand that on
    exec accelerate launch --quiet --config_file \"\$ACCELERATE_CONFIG\" $RANK_OF_NODE \"\$@\"" \
    - $OPTIONS "${RENDEZVOUS[@]}" "$@"
}
