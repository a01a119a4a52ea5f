# shellcheck shell=bash
# The test cluster with podferry on it, for e2e.sh. To be sourced behind deploy/setup/lib.sh.

readonly BUILD=$PODFERRY_STATE/testcluster
KEEP=${PODFERRY_KEEP:-}
readonly NAME=e2e-pods${KEEP:-"-$$"}
readonly TESTCLUSTER=$BUILD/bin/testcluster
readonly BINARIES=${PODFERRY_BINARIES:-$PODFERRY_ROOT/target/debug}
# Seconds that anything may take.
PATIENCE=${PATIENCE:-60}

work=''
cases=0
passed=0
# Of the whole run: what is lost, failed requests, and each migration's times in milliseconds.
lost=0
failed_requests=0
freezes=()
gaps=()

first() { "$TESTCLUSTER" --name "$NAME" "$@"; }
kube() { first kubectl --request-timeout=20s "$@"; }
# on MACHINE PROGRAM...: one of podferry's, or any other.
on() { local machine=$1; shift; first exec "$machine" -- env PATH="/opt/podferry/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$@" </dev/null; }
on_with_input() { local machine=$1; shift; first exec "$machine" -- env PATH="/opt/podferry/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$@"; }
ferry() { on control podferry --coordinator 10.77.0.1:7440 --identity /etc/podferry/admin "$@"; }

not() { ! "$@"; }

# check CASE: runs it, apart, so that its failure ends only it. What it adds to the figures is kept.
check() {
    local name=$1 begun=$SECONDS status=0
    cases=$((cases + 1))
    # Not in a condition, where `set -e` would not hold inside it.
    set +e
    (set -e; "$name"; declare -p lost failed_requests freezes gaps >"$work/figures") >"$work/output" 2>&1
    status=$?
    set -e
    if [[ $status -eq 0 ]]; then
        passed=$((passed + 1))
        # shellcheck disable=SC1090 # written by the case
        . <(sed 's/^declare -[-a]* //' "$work/figures")
        printf 'ok      %s (%d s)\n' "${name//_/ }" "$((SECONDS - begun))"
    else
        printf 'FAILED  %s (%d s)\n' "${name//_/ }" "$((SECONDS - begun))"
        sed 's/^/        /' "$work/output"
        what_happened | sed 's/^/        | /'
    fi
}

what_happened() {
    local machine
    kube get pods -o wide || true
    on control tail -6 /var/log/podferry-coordinator.log | cut -c1-300 || true
    for machine in node-a node-b; do on "$machine" tail -5 /var/log/podferry-agent.log | cut -c1-300 || true; done
}

# Programs, configuration and certificates, in two folders that the machines see as /opt/podferry/bin and /etc/podferry.
lay_out() {
    local program machine
    mkdir -p "$work/bin" "$work/etc/coordinator" "$work/images"
    for program in podferry podferry-agent podferry-coordinator podferry-dump-worker podferry-pager podferry-hook podferry-stdio-keeper \
        podferry-runtime podferry-tar podferry-bench libpodferry_criu_shim.so; do
        cp "$BINARIES/$program" "$work/bin/"
    done
    printf '{"runc": "/usr/sbin/runc"}\n' >"$work/bin/runtime.json"
    "$work/bin/podferry" certificates ca "$work/ca" >&2
    for machine in node-a.agent:node-a node-b.agent:node-b coordinator:coordinator admin.client:admin; do
        "$work/bin/podferry" certificates issue "${machine%:*}.podferry.internal" "$work/etc/${machine#*:}" --ca "$work/ca" >&2
    done
}

# The addresses are the same in every test cluster.
agent_config() { # agent_config NODE ADDRESS
    cat <<TOML
node = "$1"
listen = "$2:7443"
state_dir = "/var/lib/podferry"
images_dir = "/run/podferry-images"
coordinator = "10.77.0.1:7440"

[identity]
ca = "/etc/podferry/$1/ca.pem"
certificate = "/etc/podferry/$1/cert.pem"
key = "/etc/podferry/$1/key.pem"

[tools]
criu = "/usr/sbin/criu"
runc = "/usr/sbin/runc"
hook = "/opt/podferry/bin/podferry-hook"
stdio_keeper = "/opt/podferry/bin/podferry-stdio-keeper"
dump_worker = "/opt/podferry/bin/podferry-dump-worker"
criu_shim = "/opt/podferry/bin/libpodferry_criu_shim.so"
pager = "/opt/podferry/bin/podferry-pager"
tar = "/opt/podferry/bin/podferry-tar"

[runtime]
roots = ["/run/containerd/runc/k8s.io"]

[kubernetes]
TOML
}

coordinator_config() {
    cat <<TOML
listen = "10.77.0.1:7440"
state_dir = "/var/lib/podferry-coordinator"

[identity]
ca = "ca.pem"
certificate = "cert.pem"
key = "key.pem"

[kubernetes]
kubeconfig = "kubeconfig"
evacuate_on = [{ taint = "aws-node-termination-handler/spot-itn", deadline_s = 110 }]

[kubernetes.eviction]
listen = "10.77.0.1:7446"
TOML
}

# As the chart makes it, but that the coordinator is no pod, so its Service is told where it is.
webhook() {
    cat <<YAML
apiVersion: v1
kind: Service
metadata: {name: podferry-coordinator, namespace: podferry}
spec: {ports: [{name: eviction, port: 7446}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: podferry-coordinator, namespace: podferry, labels: {kubernetes.io/service-name: podferry-coordinator}}
addressType: IPv4
ports: [{name: eviction, port: 7446}]
endpoints: [{addresses: [10.77.0.1], conditions: {ready: true}}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: podferry-eviction}
webhooks:
- name: eviction.podferry.dev
  rules: [{apiGroups: [""], apiVersions: [v1], resources: [pods/eviction], operations: [CREATE]}]
  clientConfig: {service: {name: podferry-coordinator, namespace: podferry, port: 7446}}
  admissionReviewVersions: [v1]
  sideEffects: NoneOnDryRun
  failurePolicy: Ignore
  timeoutSeconds: 5
YAML
}

start_agent() { # start_agent NODE
    on "$1" sh -c "setsid podferry-agent --config /etc/podferry/$1/agent.toml >>/var/log/podferry-agent.log 2>&1 </dev/null &"
}
start_coordinator() {
    # As a Deployment's pod that is started again: it takes its own lease up at once.
    on control sh -c 'PODFERRY_POD=e2e setsid podferry-coordinator --config /etc/podferry/coordinator/coordinator.toml >>/var/log/podferry-coordinator.log 2>&1 </dev/null &'
}
kill_agent() { on "$1" pkill -9 -x podferry-agent && start_agent "$1"; }
kill_coordinator() { on control pkill -9 -x podferry-coordi && start_coordinator; }

begin_cluster() {
    local node
    require_root
    command -v jq >/dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends jq; } >&2 </dev/null
    "$PODFERRY_ROOT/deploy/testcluster/build.sh"
    work=$BUILD/$NAME
    trap finish EXIT
    if [[ -n $KEEP ]] && first status >/dev/null 2>&1; then
        renew_programs
        return
    fi
    rm -rf "$work"
    lay_out
    "$TESTCLUSTER" image --volume /data podferry.test/redis:1 "$PODFERRY_STATE/images/redis/rootfs" "$work/images/redis.tar"
    first up --runtime /opt/podferry/bin/podferry-runtime --bind "$work/bin:/opt/podferry/bin" --bind "$work/etc:/etc/podferry"
    first load "$work/images/redis.tar"
    sed -E 's#https://127.0.0.1:[0-9]+#https://127.0.0.1:6443#' "$(first kubeconfig)" >"$work/etc/coordinator/kubeconfig"
    coordinator_config >"$work/etc/coordinator/coordinator.toml"
    kube create namespace podferry
    kube apply -f "$PODFERRY_ROOT/deploy/crds"
    kube wait --for=condition=Established --timeout=20s crd/migrations.podferry.dev
    webhook | kube apply -f -
    for node in node-a:10.77.0.11 node-b:10.77.0.12; do
        agent_config "${node%:*}" "${node#*:}" >"$work/etc/${node%:*}/agent.toml"
        kube label node "${node%:*}" podferry.dev/enabled=true
        start_agent "${node%:*}"
    done
    start_coordinator
}

# Of a cluster that was kept.
renew_programs() {
    local program
    for program in "$work"/bin/*podferry*; do
        cp "$BINARIES/${program##*/}" "$program.new"
        mv "$program.new" "$program"
    done
    kill_agent node-a
    kill_agent node-b
    kill_coordinator
}

# shellcheck disable=SC2317 # called by the trap
finish() {
    local status=$?
    if [[ -z $KEEP ]]; then
        first down >&2 || true
        rm -rf "$work"
    fi
    exit "$status"
}
