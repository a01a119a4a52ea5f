#!/usr/bin/env bash
# What becomes of many connections to a pod that moves live between two nodes of the test cluster, three times in a row, and what the way through the
# relay costs: how much it carries, and how long an answer takes, each against the direct way between the nodes just before. Ends with a line of JSON.
#
#   PODFERRY_BINARIES=FOLDER connections.sh [CONNECTIONS]    1000 connections unless a number is given; programs of a release build
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/kubernetes/cluster.sh
. "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
# shellcheck source=deploy/kubernetes/pods.sh
. "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

readonly CONNECTIONS=${1:-1000}
readonly MOVES=3
readonly CLIENT_NODES=(node-a node-b)

# clients NODE APP OUT OPTION...: clients of an app on a node until $OUT.end is there; what they report is in $OUT. $! is the process.
clients() {
    local node=$1 app=$2 out=$3
    shift 3
    rm -f "$out.end"
    # shellcheck disable=SC2034 # the loop's own
    on_with_input "$node" podferry-bench load --target "$(service_of "$app"):6379" --until-stdin-closes "$@" \
        >"$out" < <(sleep 1; for ((number = 0; number < 3000; number++)); do [[ -e $out.end ]] && break; sleep 0.1; done) &
}

# The column of a table of counters such as /proc/net/netstat has.
counter() { awk -v name="$1" '$1 == "TcpExt:" { if (!n) { for (i = 2; i <= NF; i++) if ($i == name) n = i } else { print $n; exit } }'; }
# Retransmissions after a timeout: of all that the nodes themselves send, the clients among it.
timeouts() { local node; for node in "${CLIENT_NODES[@]}"; do on "$node" cat /proc/net/netstat | counter TCPTimeouts; done | jq -s add; }

many() {
    local node number before
    local -a running=()
    start crowd
    fill crowd 64
    before=$(timeouts)
    for node in "${CLIENT_NODES[@]}"; do
        clients "$node" crowd "$work/crowd-$node" --kind redis --think 200 --clients $((CONNECTIONS / ${#CLIENT_NODES[@]}))
        running+=($!)
    done
    for node in "${CLIENT_NODES[@]}"; do until_true grep -q . "$work/crowd-$node"; done
    for ((number = 0; number < MOVES; number++)); do
        move crowd live --connections keep
        sleep 3
    done
    ferry connections "default/$(pod_of crowd)" --output json </dev/null | jq -c '[.kept[] | {home_node, connections}]'
    timeouts=$(($(timeouts) - before + $(in_pod crowd cat /proc/net/netstat | counter TCPTimeouts)))
    for node in "${CLIENT_NODES[@]}"; do touch "$work/crowd-$node.end"; done
    wait "${running[@]}"
    tail -qn 1 "$work"/crowd-node-? | jq -s '[.[].clients[]]' >"$work/crowd"
    until_true has_one_pod crowd
    kube delete deployment crowd
}

# Answers of one client, in a second, and how long half of them took at most, within two times in ms since 1970: of_time FROM TO FILE
of_time() {
    tail -1 "$3" | jq --argjson from "$1" --argjson to "$2" '
        .clients[0].samples | [foreach .answers[] as [$since, $took] (.first_us; . + $since; {ms: (. / 1000), took: ($took / 1000)})]
        | map(select(.ms >= $from and .ms < $to)) | {rate: (length / ($to - $from) * 1000), took: (map(.took) | sort | .[length / 2 | floor])}'
}

now() { printf '%d' "$((${EPOCHREALTIME/[.,]/} / 1000))"; }
# CPU time of a node's agent so far, in clock ticks: all that it started, too.
agent_ticks() { local node; for node in "${CLIENT_NODES[@]}"; do on "$node" sh -c "pgrep -ox podferry-agent | sed 's|.*|/proc/&/stat|' | xargs cat" | awk '{ print $14 + $15 + $16 + $17 }'; done | jq -s add; }

# beside KIND: the same client by the direct way from node to node and then through the relay; answers in a second and half's time go to $work/KIND.
beside() {
    local kind=$1 client ticks
    local -a direct relayed
    # So that the first way is from one node to the other.
    [[ $(node_of way) == node-b ]] || { move way live && until_true has_one_pod way; }
    clients node-a way "$work/way" --kind "$kind" --samples --think 0
    client=$!
    until_true grep -q . "$work/way"
    sleep 2
    direct=("$(now)")
    sleep 6
    direct+=("$(now)")
    move way live --connections keep
    sleep 3
    ticks=$(agent_ticks)
    relayed=("$(now)")
    sleep 6
    relayed+=("$(now)")
    ticks=$(($(agent_ticks) - ticks))
    touch "$work/way.end"
    wait "$client"
    [[ $(tail -1 "$work/way" | jq '[.clients[] | .failed_requests, .connection_resets, .lost_items] | add') == 0 ]]
    jq -s --argjson ticks "$ticks" --argjson per "$(getconf CLK_TCK)" \
        '{direct: .[0], relayed: .[1], ratio: (.[1].rate / .[0].rate), agents_cpu_s: ($ticks / $per)}' \
        <(of_time "${direct[@]}" "$work/way") <(of_time "${relayed[@]}" "$work/way") >"$work/$kind"
    until_true has_one_pod way
}

left() { local node; for node in "${CLIENT_NODES[@]}"; do left_on "$node"; done; }

summary() {
    jq -n -c --slurpfile crowd "$work/crowd" --slurpfile bulk "$work/bulk" --slurpfile redis "$work/redis" --argjson connections "$CONNECTIONS" \
        --argjson timeouts "$timeouts" --argjson freezes "[$(IFS=,; echo "${freezes[*]}")]" --argjson leaks "$(left | wc -l)" --argjson moves "$MOVES" '
        def median: sort | .[(length - 1) / 2 | floor];
        def tenths: . * 10 | round / 10;
        ($crowd[0] | map([.gaps[].gap_ms] | sort | reverse | .[:$moves][]) ) as $gaps | {
            connections: $connections,
            survived: ($crowd[0] | map(select(.connection_resets == 0 and .failed_requests == 0 and .lost_items == 0)) | length),
            resets: ($crowd[0] | map(.connection_resets) | add),
            retransmission_timeouts: $timeouts,
            downtime_ms: ($freezes[:$moves] | map(tenths)),
            gap_ms_median: ($gaps | median | tenths), gap_ms_max: ($gaps | max | tenths),
            relay_throughput_ratio: ($bulk[0].ratio * 100 | round / 100),
            direct_mib_per_s: ($bulk[0].direct.rate | tenths), relay_mib_per_s: ($bulk[0].relayed.rate | tenths),
            relay_cpu_s_per_gib: ($bulk[0].agents_cpu_s / ($bulk[0].relayed.rate * 6 / 1024) | tenths),
            direct_latency_ms: $redis[0].direct.took, relay_latency_ms: $redis[0].relayed.took,
            leaks: $leaks}' | tee "$work/summary"
    jq -e '.survived == .connections and .resets == 0 and .leaks == 0' "$work/summary" >/dev/null
}

begin_cluster >&2
until_true can node-a live >&2
until_true can node-b live >&2
settings >&2
many >&2
start way >&2
beside bulk >&2
beside redis >&2
kube delete deployment way >&2
until_true no_pods >&2
summary
