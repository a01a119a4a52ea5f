#!/usr/bin/env bash
# Shows that the test cluster is one: makes it, uses it as Kubernetes is used, takes it away, and looks for what is left.
# One line for each case, then one of JSON; exits non-zero when a case failed.
#
#   e2e.sh          builds what is missing first
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly BUILD=$PODFERRY_STATE/testcluster
readonly NAME=e2e-$$ SECOND=e2e-$$-second
readonly TESTCLUSTER=$BUILD/bin/testcluster
# How long anything may take that is not the start of a cluster.
readonly PATIENCE=60
# The start, on an idle machine; a busy one is given more by setting this.
readonly UP_SECONDS=${PODFERRY_TESTCLUSTER_UP_SECONDS:-60}

readonly CASES=(
    own_programs_are_sound comes_up nodes_have_the_version_that_is_pinned a_pod_runs_on_each_node
    pods_reach_each_other_across_nodes services_reach_pods_of_the_other_node logs_are_read commands_are_executed
    a_stateful_set_keeps_names the_handler_podferry_runs_pods daemons_restart_under_running_pods
    the_control_plane_restarts images_are_imported the_host_keeps_its_settings
    a_second_cluster_stands_beside_the_first a_start_that_was_cut_short_leaves_nothing goes_down_and_leaves_nothing
)

work=''
cases=0
passed=0

first() { "$TESTCLUSTER" --name "$NAME" "$@"; }
second() { "$TESTCLUSTER" --name "$SECOND" "$@"; }
kube() { first kubectl --request-timeout=20s "$@"; }

# The manifest of a pod: pod NAME NODE [EXTRA], EXTRA being further fields of its spec.
pod() {
    cat <<POD
apiVersion: v1
kind: Pod
metadata: {name: $1, labels: {app: $1}, annotations: {podferry.dev/test: "passed on", example.org/test: "kept back"}}
spec:
  nodeName: $2
  terminationGracePeriodSeconds: 1
  ${3:-}
  containers: [$(container)]
POD
}

container() {
    printf '{name: guest, image: "podferry.test/guest:1", imagePullPolicy: Never, ports: [{containerPort: 8080}], %s}' \
        'readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}'
}

service() {
    printf '{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {selector: {app: %s}, ports: [{port: 80, targetPort: 8080}]}}\n' \
        "$1" "$1"
}

ready() { [[ $(kube get pod "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}') == True ]]; }
field() { kube get "$1" "$2" -o "jsonpath={$3}"; }
fetch() { kube exec "$1" -- wget -q -T 3 -O - "http://$2/"; }
host_of() { fetch "$1" "$2" | sed -nE 's/.*"host":"([^"]*)".*/\1/p'; }
nonce_of() { fetch "$1" "$2" | sed -nE 's/.*"nonce":"([^"]*)".*/\1/p'; }
is_host() { [[ $(host_of "$1" "$2") == "$3" ]]; }

own_programs_are_sound() {
    cd "$PODFERRY_ROOT/deploy/testcluster"
    [[ $(gofmt -l .) == '' ]]
    go vet ./... </dev/null
    go test -count=1 ./... </dev/null
}

# What the kubelet and kube-proxy set on a host that is theirs.
settings() {
    sysctl -e vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys \
        kernel.keys.root_maxbytes net.ipv4.ip_forward net.netfilter.nf_conntrack_max net.ipv4.conf.all.route_localnet
}

comes_up() {
    local begun=$SECONDS
    settings >"$work/settings"
    mkdir -p "$work/runtime"
    printf '#!/bin/sh\nprintf "%%s\\n" "$*" >>/opt/testcluster-e2e/calls\nexec /usr/sbin/runc "$@"\n' >"$work/runtime/wrapper"
    chmod 0755 "$work/runtime/wrapper"
    first up --runtime /opt/testcluster-e2e/wrapper --bind "$work/runtime:/opt/testcluster-e2e"
    log "Ready after $((SECONDS - begun)) s"
    [[ $((SECONDS - begun)) -lt $UP_SECONDS ]]
}

nodes_have_the_version_that_is_pinned() {
    local want got
    want=$(sed -nE 's#.*k8s.io/kubernetes (v[0-9.]+)$#\1#p' "$PODFERRY_ROOT/deploy/testcluster/kubernetes/go.mod")
    got=$(kube get nodes -o 'jsonpath={.items[*].status.nodeInfo.kubeletVersion}')
    [[ -n $want && $got == "$want $want" ]]
}

a_pod_runs_on_each_node() {
    { pod on-a node-a && echo --- && pod on-b node-b; } | kube apply -f -
    until_true ready on-a && until_true ready on-b
    [[ $(field pod on-a .spec.nodeName) == node-a && $(field pod on-b .spec.nodeName) == node-b ]]
}

pods_reach_each_other_across_nodes() {
    local a b
    a=$(field pod on-a .status.podIP) b=$(field pod on-b .status.podIP)
    until_true is_host on-a "$b:8080" on-b
    until_true is_host on-b "$a:8080" on-a
}

services_reach_pods_of_the_other_node() {
    local name
    { service on-a && echo --- && service on-b; } | kube apply -f -
    for name in a:b b:a; do
        until_true is_host "on-${name%:*}" "$(field service "on-${name#*:}" .spec.clusterIP)" "on-${name#*:}"
    done
    # kube-proxy does it with nftables, and nodes reach the API server by its Service.
    [[ $(first exec node-a -- nft list table ip kube-proxy) == *default/on-b* ]]
    [[ $(first exec node-b -- curl -sk --max-time 5 https://10.79.0.1/livez) == ok ]]
}

logs_are_read() { until_true log_has_lines on-b; }
log_has_lines() { [[ $(kube logs "$1" | grep -c 'second=') -ge 2 ]]; }

commands_are_executed() {
    [[ $(kube exec on-a -- hostname) == on-a ]]
    [[ $(printf 'through\n' | kube exec -i on-b -- cat) == through ]]
    ! kube exec on-a -- false
}

a_stateful_set_keeps_names() {
    local before nonce
    kube apply -f - <<SET
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: cart}
spec:
  replicas: 2
  serviceName: cart
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart}}
    spec: {terminationGracePeriodSeconds: 1, containers: [$(container)]}
SET
    until_true ready cart-0 && until_true ready cart-1
    before=$(field pod cart-0 .metadata.uid) nonce=$(nonce_of on-a "$(field pod cart-0 .status.podIP):8080")
    kube delete pod cart-0
    until_true ready cart-0
    [[ $(field pod cart-0 .metadata.uid) != "$before" ]]
    [[ $(nonce_of on-a "$(field pod cart-0 .status.podIP):8080") != "$nonce" ]]
}

the_handler_podferry_runs_pods() {
    local config
    : >"$work/runtime/calls"
    pod ferried node-b 'runtimeClassName: podferry' | kube apply -f -
    until_true ready ferried
    # The sandbox and the container went through the wrapper.
    [[ $(grep -c ' create ' "$work/runtime/calls") -eq 2 && $(grep -c ' start ' "$work/runtime/calls") -eq 2 ]]
    # shellcheck disable=SC2016 # expanded on the node
    config=$(first exec node-b -- bash -c 'cat /run/containerd/io.containerd.runtime.v2.task/k8s.io/*/config.json' |
        jq -sc '.[] | select(.annotations["io.kubernetes.cri.sandbox-name"] == "ferried") | .annotations')
    [[ $(jq -r '.["podferry.dev/test"]' <<<"$config" | grep -c '^passed on$') -eq 2 ]]
    ! grep -q 'example.org' <<<"$config"
}

daemons_restart_under_running_pods() {
    local address before
    address=$(field pod on-b .status.podIP):8080
    before=$(nonce_of on-a "$address")
    first restart node-b containerd
    first restart node-b kubelet --signal 9
    first restart node-b kube-proxy
    pod later node-b | kube apply -f -
    until_true ready later
    until_true ready on-b
    [[ $(nonce_of on-a "$address") == "$before" && $(field pod on-b '.status.containerStatuses[0].restartCount') == 0 ]]
}

the_control_plane_restarts() {
    local service
    for service in kube-apiserver kube-controller-manager kube-scheduler; do
        first restart control "$service" --signal 9
    done
    until_true kube create deployment scheduled --image=podferry.test/guest:1
    until_true kube rollout status deployment scheduled --timeout=15s
}

images_are_imported() {
    mkdir -p "$work/image/usr/bin"
    install -m 0755 "$BUILD/bin/guest" "$work/image/usr/bin/guest"
    "$TESTCLUSTER" image podferry.test/imported:2 "$work/image" "$work/imported.tar" /usr/bin/guest serve
    first load "$work/imported.tar"
    pod imported node-a | sed 's#podferry.test/guest:1#podferry.test/imported:2#' | kube apply -f -
    until_true ready imported
}

the_host_keeps_its_settings() { diff "$work/settings" <(settings); }

a_second_cluster_stands_beside_the_first() {
    second up
    pod ferried node-a 'runtimeClassName: podferry' | second kubectl apply -f -
    second kubectl wait --for=condition=Ready pod/ferried --timeout="${PATIENCE}s"
    second down
    [[ $(leftovers "$SECOND") == '' ]]
    ready on-a && ready on-b
}

# Whatever had been made when `up` was killed, `down` takes away.
a_start_that_was_cut_short_leaves_nothing() {
    local after
    for after in 0.1 0.4 1.5 4; do
        timeout -s KILL "$after" "$TESTCLUSTER" --name "$SECOND" up || true
        second down
        [[ $(leftovers "$SECOND") == '' ]] || return 1
    done
    second down # of nothing
    ready on-a
}

goes_down_and_leaves_nothing() {
    local begun=$SECONDS
    find /sys/fs/cgroup -path "*/podferry-testcluster-$NAME/*" -name cgroup.procs -exec cat {} + | sort -u |
        while read -r pid; do identity "$pid"; done >"$work/processes"
    first down
    log "down after $((SECONDS - begun)) s; it ended $(grep -c . "$work/processes") processes"
    [[ -s $work/processes && $(leftovers "$NAME") == '' ]]
    # With its last process a namespace goes, if no mount holds it; their numbers are given again at once, so they tell nothing.
    while read -r pid started; do
        [[ $(identity "$pid") != "$pid $started" ]]
    done <"$work/processes"
    ! grep nsfs /proc/self/mountinfo | grep -F "$BUILD/"
}

# A process, told from a later one with the same number by when it started; nothing if it has ended, collected or not.
identity() {
    sed -E 's/^([0-9]+) .*\) /\1 /' "/proc/$1/stat" 2>/dev/null | awk '$2 != "Z" { print $1, $21 }' || true
}

# leftovers NAME: what there is of a cluster, one thing a line.
leftovers() {
    find /sys/fs/cgroup -maxdepth 2 -name "podferry-testcluster-$1"
    find "$BUILD/clusters" -maxdepth 1 -name "$1"
    grep -F "/clusters/$1/" /proc/self/mountinfo || true
    # Machines and the helpers that make them have the name as an argument; this script has not.
    pgrep -af -- "--name $1 (spawn|init|up)( |$)" || true
}

# check CASE: runs it, apart, so that its failure ends only it.
check() {
    local name=$1 begun=$SECONDS status=0
    cases=$((cases + 1))
    # Not in a condition, where `set -e` would not hold inside it.
    set +e
    (set -e && "$name") >"$work/output" 2>&1
    status=$?
    set -e
    if [[ $status -eq 0 ]]; then
        passed=$((passed + 1))
        printf 'ok      %s (%d s)\n' "${name//_/ }" "$((SECONDS - begun))"
    else
        printf 'FAILED  %s (%d s)\n' "${name//_/ }" "$((SECONDS - begun))"
        sed 's/^/        /' "$work/output"
    fi
}

# shellcheck disable=SC2317 # called by the trap
finish() {
    local status=$?
    first down >&2 || true
    second down >&2 || true
    rm -rf "$work"
    exit "$status"
}

main() {
    local one
    require_root
    command -v jq >/dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends jq; } >&2 </dev/null
    "$PODFERRY_ROOT/deploy/testcluster/build.sh"
    work=$(mktemp -d)
    trap finish EXIT
    for one in "${CASES[@]}"; do
        check "$one"
    done
    printf '{"cases": %d, "passed": %d}\n' "$cases" "$passed"
    [[ $passed -eq $cases ]]
}

main "$@"
