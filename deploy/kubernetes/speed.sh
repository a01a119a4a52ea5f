#!/usr/bin/env bash
# How long a pod stands still when it moves live between two nodes of a real Kubernetes, the test cluster, and what its clients see of that: two that
# keep their connections, and one that makes a new one for each request, all by the pod's Service. Then a StatefulSet's pod, with the last of them
# alone, which tries again what is refused. A table, then a line of JSON.
#
#   PODFERRY_BINARIES=FOLDER speed.sh [MIB...]    250 and 1000 MiB of data, unless sizes are given; programs of a release build
#   MOVES=N                                       of each, 6 unless it is said
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/kubernetes/cluster.sh
. "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
# shellcheck source=deploy/kubernetes/pods.sh
. "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

readonly MOVES=${MOVES:-6}
# In the machine that asks.
readonly ENOUGH=/tmp/podferry-enough

# A request by a connection of its own each time, until $2 is there; milliseconds between an answer and the next, when they are many. One that comes
# to nothing is told, or tried again where $3 says so.
newcomer() { # newcomer ADDRESS FILE [again]
    local last now
    last=${EPOCHREALTIME/[.,]/}
    while [[ ! -e $2 ]]; do
        if ! ask "$1" "$2"; then
            [[ -z $3 ]] || continue
            cat "$2.why"
            echo failed
        fi
        now=${EPOCHREALTIME/[.,]/}
        ((now - last < 30000)) || echo "$(((now - last) / 1000))"
        last=$now
    done
}

# One request. A shell's connect may be interrupted by a signal of its own; that is no answer.
ask() {
    local answer
    until { exec 3<>"/dev/tcp/$1/6379"; } 2>"$2.why"; do grep -q Interrupted "$2.why" || return 1; done
    printf 'PING\r\n' >&3
    read -r -t 10 answer <&3 || return 1
    exec 3>&-
    [[ $answer == +PONG* ]]
}

# spread NUMBER...: median (lowest-highest)
spread() { printf '%s\n' "$@" | jq -rs 'sort | "\(.[(length - 1) / 2 | floor]) (\(.[0])-\(.[-1]))" | gsub("(?<whole>[0-9]+)\\.[0-9]+"; "\(.whole)")'; }

measure() { # measure MIB
    local mib=$1 number newcomers
    local -a freezes=() kept=() new=()
    redis "speed-$mib" | sed -E 's/memory: 512Mi/memory: 3Gi/' | kube apply -f - >&2
    until_true is_ready "speed-$mib"
    fill "speed-$mib" "$mib" >&2
    load "speed-$mib"
    begin_newcomers "speed-$mib" ''
    for ((number = 0; number < MOVES; number++)); do
        sleep 2
        move "speed-$mib" live >&2
    done
    end_newcomers
    unload >&2
    mapfile -t kept < <(tail -1 "$work/load" | jq --argjson moves "$MOVES" '[.clients[0].gaps[].gap_ms] | sort | reverse | .[:$moves][]')
    if grep -q failed "$work/newcomer"; then grep -B1 failed "$work/newcomer" >&2; return 1; fi
    mapfile -t new < <(sort -rn "$work/newcomer" | head -n "$MOVES")
    printf '| %s MiB | %s | %s | %s |\n' "$mib" "$(spread "${freezes[@]}")" "$(spread "${kept[@]}")" "$(spread "${new[@]}")" >>"$work/table"
    jq -n -c --arg mib "$mib" --argjson freezes "[$(IFS=,; echo "${freezes[*]}")]" --argjson kept "[$(IFS=,; echo "${kept[*]}")]" \
        --argjson new "[$(IFS=,; echo "${new[*]}")]" '{mib: ($mib | tonumber), freeze_ms: $freezes, gap_kept_ms: $kept, gap_new_ms: $new}' >>"$work/json"
    kube delete deployment "speed-$mib" >&2
}

begin_newcomers() { # begin_newcomers SERVICE AGAIN; $newcomers is the process
    (
        functions=$(declare -f newcomer ask)
        on node-a bash -c "$functions; rm -f $ENOUGH; newcomer $(service_of "$1") $ENOUGH '$2' 2>&1" >"$work/newcomer" 2>&1
    ) &
    newcomers=$!
}

end_newcomers() {
    on node-a touch "$ENOUGH"
    wait "$newcomers"
}

measure_named() { # measure_named MIB
    local mib=$1 number newcomers
    local -a freezes=() new=()
    stateful "named-$mib" 's/memory: 512Mi/memory: 3Gi/' >&2
    fill "named-$mib" "$mib" >&2
    begin_newcomers "named-$mib" again
    for ((number = 0; number < MOVES; number++)); do
        sleep 2
        move_named "named-$mib" live >&2
        freezes+=("$(jq -r .downtime_ms "$work/migration")")
    done
    end_newcomers
    mapfile -t new < <(grep -E '^[0-9]+$' "$work/newcomer" | sort -rn | head -n "$MOVES")
    printf '| %s MiB, of a StatefulSet | %s | | %s |\n' "$mib" "$(spread "${freezes[@]}")" "$(spread "${new[@]}")" >>"$work/table"
    jq -n -c --arg mib "$mib" --argjson freezes "[$(IFS=,; echo "${freezes[*]}")]" --argjson new "[$(IFS=,; echo "${new[*]}")]" \
        '{mib: ($mib | tonumber), stateful_set: true, freeze_ms: $freezes, gap_new_ms: $new}' >>"$work/json"
    kube delete statefulset "named-$mib" >&2
}

begin_cluster >&2
until_true can node-a live
until_true can node-b live
settings >&2
rm -f "$work/table" "$work/json"
for mib in "${@:-250 1000}"; do
    # shellcheck disable=SC2086 # the default is two words
    for one in $mib; do measure "$one"; measure_named "$one"; done
done
printf 'milliseconds, median (lowest-highest) of %s moves\n\n' "$MOVES"
echo '| data | downtime | longest gap, kept connections | longest gap, a new connection each time |'
echo '|---|---:|---:|---:|'
cat "$work/table"
echo
jq -s -c . "$work/json"
