# shellcheck shell=bash
# What the job scripts of this folder share: attempts and their logs, roles, signals, restarts. A job script sets the
# variables above its line "filled in", sources this file, and calls begin, start for each role, and finish.
#
# Who gets which signal: SLURM sends USR1 to this shell alone before the time limit (--signal=B:USR1@SECONDS). The shell
# hands it to the role `trainer`, which ends its step, saves and exits with 85. SLURM gives it to all processes of that
# role, of which only the ranks act on it; servers go on until the trainer has ended, since its step may need them. A
# requeue, scancel, and the time limit itself send TERM to all processes of the job, and KILL after SLURM's KillWait.

# shellcheck disable=SC2154 # the job script sets the variables
FINAL=(0 2 3 86 88)   # done, bad configuration, bad data, diverged, no intact checkpoint: a restart changes nothing
NO_SERVERS=87         # no server could generate
NOT_READY=90          # the preflight failed
declare -A process_of # role -> process id of its srun
ended_by_slurm=''

trap 'forward USR1' USR1
trap 'forward TERM' TERM

say() { printf 'job %s: %s\n' "$SLURM_JOB_ID" "$*" >&2; }

# begin: the folder of this attempt's logs, the environment, the next link of a chain.
begin() {
    attempts=$run/logs/attempts.txt # of each attempt: its job, and what the run had at its start
    queued=$run/logs/queued.txt     # jobs that wait to go on with this run
    given_up=$run/logs/given_up.txt # attempts when the run was last given up: submitted again, it starts anew
    mkdir -p "$run/logs"
    touch "$attempts" "$queued"
    if stalled; then
        give_up 1 "$max_restarts_without_progress restarts without progress"
    fi
    local attempt=$(($(wc -l <"$attempts") + 1)) pair
    printf '%s %s\n' "$SLURM_JOB_ID" "$(progress)" >>"$attempts"
    logs=$run/logs/attempt-$attempt
    mkdir -p "$logs"
    ln -sfn "attempt-$attempt" "$run/logs/latest"
    for pair in "${environment[@]}"; do export "${pair?}"; done
    for pair in "${setup[@]}"; do eval "$pair"; done
    if [[ -n $env_file ]]; then
        set -a
        # shellcheck source=/dev/null
        source "$env_file"
        set +a
    fi
    export MASTER_ADDR MASTER_PORT MEGATRON_R1_JOB_ENDS
    MASTER_ADDR=$(address_of_first_node)
    MASTER_PORT=$(port 0)
    MEGATRON_R1_JOB_ENDS=$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e | awk 'NR == 1')" +%s)
    if [[ $restart == chain ]]; then queue_next; fi
    rm -f "$run/logs/stopped.txt"
    say "attempt $attempt on $SLURM_JOB_NODELIST, logs in $logs"
    if [[ $preflight == true ]]; then preflight; fi
}

# preflight: all nodes check themselves and what they share; the job ends here where one is not as it must be.
preflight() {
    export MEGATRON_R1_PORTS=''
    if [[ -n ${servers_per_node:-} ]]; then MEGATRON_R1_PORTS=$(ports "$servers_per_node"); fi
    if [[ -z ${SLURM_HET_SIZE:-} ]]; then
        check_nodes "$SLURM_JOB_NUM_NODES" "$SLURM_NTASKS_PER_NODE"
    else # both components in one step: their nodes share the run folder and reach each other
        check_nodes "$trainer_nodes" "$ranks_per_node" --het-group=0 : "$engine_nodes" 1 --het-group=1
    fi
    rm -rf "$run/.preflight"
}

# check_nodes NODES RANKS_PER_NODE SRUN_OPTION...: the preflight as one step, with components as `start` takes them.
check_nodes() {
    start preflight "$@" -- timeout --kill-after=10 "$preflight_limit_s" \
        "$python" -m megatron_r1.cluster.preflight "$run" "${arguments[@]}"
    while alive preflight; do nap; done
    exit_code_of preflight
    unset 'process_of[preflight]'
    if [[ $code == 0 ]]; then
        cat "$logs"/preflight-*-0.log >&2
        return
    fi
    show_error preflight 200
    if [[ $code == 124 ]]; then
        say "preflight: more than $preflight_limit_s s"
        code=$NOT_READY
    fi
    rm -rf "$run/.preflight"
    conclude "$code"
}

# port N: the job's N-th port, below those that Linux gives to connections (32768 and up); another job has others.
port() { echo $((12000 + (SLURM_JOB_ID * 64 + $1) % 20000)); }

# address_of_first_node [NODES]: its name where it is known here, else the address by which SLURM reaches it.
address_of_first_node() {
    local node
    node=$(scontrol show hostnames "${1:-${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}}" | awk 'NR == 1')
    if getent hosts "$node" >/dev/null; then
        echo "$node"
    else
        scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
    fi
}

# ports NUMBER: ports for the servers of a node, from the job's second port on.
ports() {
    local number list=()
    for ((number = 1; number <= $1; number++)); do list+=("$(port "$number")"); done
    (IFS=, && echo "${list[*]}")
}

# Keys of the servers, new for each attempt; only the environment of the job holds them.
make_keys() {
    export SGLANG_API_KEY SGLANG_ADMIN_API_KEY
    SGLANG_API_KEY=$(od -An -N 24 -t x1 /dev/urandom | tr -d ' \n')
    SGLANG_ADMIN_API_KEY=$(od -An -N 24 -t x1 /dev/urandom | tr -d ' \n')
}

# start ROLE NODES RANKS_PER_NODE SRUN_OPTION... [: NODES RANKS_PER_NODE SRUN_OPTION...] -- COMMAND...: a role in the
# background, a log file for each rank; after the colon the nodes of a second component. Each rank notes its exit code:
# srun reports the largest one, which is that of a rank that died of another's error.
start() {
    local role=$1 components=() step=() program
    : >"$logs/$role.codes"
    shift
    while [[ $1 != -- ]]; do
        components+=("$1")
        shift
    done
    shift
    # shellcheck disable=SC2016 # expanded on the node
    program=(bash -c '
        trap : TERM
        trap "" USR1 # inherited: Python has no answer to it while it starts
        [[ -z ${TMPDIR:-} ]] || mkdir -p "$TMPDIR"
        codes=$1
        shift
        "$@"
        code=$?
        printf "%s %s\n" "$code" "$SLURMD_NODENAME $SLURM_PROCID $(readlink "/proc/$$/fd/1")" >>"$codes"
        exit "$code"' rank "$logs/$role.codes" "${container[@]}" "$@")
    set -- "${components[@]}"
    while (($#)); do
        step+=("--nodes=$1" "--ntasks=$(($1 * $2))" "--ntasks-per-node=$2" "--cpus-per-task=$(cores "$2" "${3:-}")")
        shift 2
        while (($#)) && [[ $1 != : ]]; do
            step+=("$1")
            shift
        done
        step+=("${srun_options[@]}" --job-name="$role" --kill-on-bad-exit=1 --output="$logs/$role-%N-%t.log")
        step+=("${program[@]}")
        if (($#)); then
            step+=(:)
            shift
        fi
    done
    srun "${step[@]}" &
    process_of[$role]=$!
}

# cores RANKS [--het-group=N]: those of each rank where so many share a node, of this job or of its N-th component.
cores() {
    local ranks=$1 on_node=$SLURM_CPUS_ON_NODE component
    if [[ ${2:-} == --het-group=* ]]; then
        component=SLURM_JOB_CPUS_PER_NODE_HET_GROUP_${2#*=}
        on_node=${!component%%[!0-9]*} # such as 96(x2)
    fi
    echo $((on_node > ranks ? on_node / ranks : 1))
}

forward() {
    if [[ $1 == TERM ]]; then
        ended_by_slurm=1
        # SLURM queues a job again that is preempted, but not one whose time is up.
        if [[ $restart == requeue ]] && time_is_up; then requeue; fi
    fi
    if alive trainer; then
        say "$1: the trainer saves after its step"
        kill -s "$1" "${process_of[trainer]}" || true
    fi
}

time_is_up() { [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r) == *TimeLimit* ]]; }

requeue() { scontrol requeue "$SLURM_JOB_ID" || say "SLURM does not requeue it"; }

alive() { [[ -n ${process_of[$1]:-} ]] && kill -0 "${process_of[$1]}" 2>/dev/null; }

all_alive() {
    local role
    for role in "${!process_of[@]}"; do alive "$role" || return 1; done
}

# A sleep that a signal to this shell ends.
nap() {
    sleep 1 &
    wait $! || true
}

# finish: wait for the first role that ends, end the others, then restart or stop.
finish() {
    local role cause
    code=0
    while all_alive; do nap; done
    if ! alive trainer; then exit_code_of trainer; fi
    if [[ $code == "$NO_SERVERS" ]]; then wait_for_servers_end; fi
    cause=$(role_that_ended)
    if [[ $cause != trainer ]] && alive trainer; then let_trainer_save "$cause"; fi
    for role in "${!process_of[@]}"; do
        if alive "$role"; then end_role "$role"; fi
    done
    if [[ $cause != trainer ]]; then exit_code_of "$cause"; fi
    if [[ $code == 0 ]]; then
        cause=trainer
        exit_code_of trainer
    fi
    if [[ $code != 0 ]]; then show_error "$cause"; fi
    conclude "$code"
}

# The role that ended first: the trainer, which servers outlive, unless servers have ended before it or with it.
role_that_ended() {
    local role ended=trainer
    if [[ $code != 0 ]] || alive trainer; then
        for role in "${!process_of[@]}"; do alive "$role" || [[ $role == trainer ]] || ended=$role; done
    fi
    echo "$ended"
}

# A trainer may find that its server is gone before the servers' role has said why.
wait_for_servers_end() {
    local deadline=$((SECONDS + 10)) number
    number=${#process_of[@]}
    while ((number > 1 && SECONDS < deadline)) && [[ $(role_that_ended) == trainer ]]; do nap; done
}

# The trainer of servers that have ended may still save a step that is under way.
let_trainer_save() {
    local deadline=$((SECONDS + grace_s))
    say "$1 ended; the trainer has $grace_s s to save"
    kill -s USR1 "${process_of[trainer]}" || true
    while alive trainer && ((SECONDS < deadline)); do nap; done
}

# End a role: TERM to its srun, which passes it on; after 15 s KILL to srun itself, whose tasks end with the job.
end_role() {
    local pid=${process_of[$1]} deadline=$((SECONDS + 15))
    kill -s TERM "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do nap; done
    kill -s KILL "$pid" 2>/dev/null || true
}

# exit_code_of ROLE: sets `code` to the first error that a rank of the role ended with, else to srun's own exit code; to
# 137 where no rank has noted one: srun itself may end with 0 after SLURM has killed them all at the time limit.
exit_code_of() {
    local first
    code=0
    wait "${process_of[$1]}" || code=$?
    first=$(awk '$1 != 0 && !found { found = 1; print $1 }' "$logs/$1.codes")
    code=${first:-$code}
    if [[ $code == 0 && ! -s $logs/$1.codes ]]; then code=137; fi
}

conclude() {
    local code=$1 final
    for final in "${FINAL[@]}"; do
        if [[ $code == "$final" ]]; then give_up "$code" "exit code $code"; fi
    done
    if stalled; then give_up "$code" "$max_restarts_without_progress restarts without progress"; fi
    say "exit code $code: restart=$restart"
    # After a TERM, SLURM itself queues the job again (scontrol requeue, preemption), or never (scancel).
    if [[ $restart == requeue && -z $ended_by_slurm ]]; then requeue; fi
    exit "$code"
}

# show_error ROLE [LINES]: the end of the log of its rank that failed first, in this job's own output.
show_error() {
    local code node rank log
    read -r code node rank log < <(awk '$1 != 0' "$logs/$1.codes") || return 0
    say "$1: rank $rank on $node ended first, with exit code $code:"
    # A container may hide the log's name. Without it: SLURM gives ranks of a second component other numbers there.
    if [[ ! -f $log ]]; then log=$(find "$logs" -name "$1-*-$rank.log"); fi
    tail -n "${2:-5}" "$log" >&2 || true
}

# give_up CODE REASON: cancel what waits to go on with this run, and say why unless it is done.
give_up() {
    local job
    if [[ $1 != 0 ]]; then
        say "stopped: $2"
        wc -l <"$attempts" >"$given_up"
        printf 'job %s, exit code %s: %s\n' "$SLURM_JOB_ID" "$1" "$2" >"$run/logs/stopped.txt"
    fi
    while read -r job; do
        if [[ $job != "$SLURM_JOB_ID" ]]; then scancel --quiet --state=PENDING "$job" || true; fi
    done <"$queued"
    exit "$1"
}

# What a restart goes on from: the newest checkpoint, rollouts and samples, and the last rewind.
progress() {
    local folder names=()
    for folder in checkpoints rollouts parts rewinds; do
        names+=("$(newest "$output/$folder")")
    done
    (IFS=/ && echo "${names[*]}")
}

# newest FOLDER: the last name in it; empty where there is none, or no folder.
newest() {
    find "$1" -mindepth 1 -maxdepth 1 ! -name '*.tmp' ! -name '.*' -printf '%f\n' 2>/dev/null | sort | tail -n 1 || true
}

# Whether the last attempts all began with what the run has now; those before it was given up do not count.
stalled() {
    local now same before=0
    now=$(progress)
    if [[ -f $given_up ]]; then before=$(<"$given_up"); fi
    same=$(tail -n "+$((before + 1))" "$attempts" | tac |
        awk -v now="$now" '$2 != now { exit } { count++ } END { print count + 0 }')
    ((same > max_restarts_without_progress))
}

# The next link of a chain waits for this job to fail; SLURM itself removes it when this job succeeds. Jobs that wait
# for this one, such as the next stage of a recipe, then wait for either of the two.
queue_next() {
    local script next job
    script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p' | awk 'NR == 1')
    next=$(sbatch --parsable --dependency=afternotok:"$SLURM_JOB_ID" --kill-on-invalid-dep=yes "$script")
    next=${next%%;*}
    echo "$next" >>"$queued"
    for job in $(jobs_that_wait); do
        scontrol update "JobId=$job" "Dependency=afterok:$SLURM_JOB_ID?afterok:$next"
    done
    say "job $next goes on if this one does not finish"
}

# Jobs of the same user that start once this one has succeeded.
jobs_that_wait() {
    squeue --noheader --me --states=PENDING --format='%i %E' |
        awk -v this="afterok:$SLURM_JOB_ID(" 'index($2, this) { print $1 }'
}
