#!/usr/bin/env bash
# podferry in a cluster of kind: what can be seen there of installing, of moving a pod, and of uninstalling.
#
#   smoke.sh up ARCHIVE      makes the cluster, and loads the image that `make image` wrote
#   smoke.sh install         the chart; labelled nodes get the handler, and a pod of the class runs by it
#   smoke.sh move            the nodes say that they can move pods, and one moves with its memory, warm and live
#   smoke.sh uninstall       the chart goes, and the nodes' files are as before
#   smoke.sh down
#
# Needs root, Docker, Go (which builds kind and helm) and kubectl. kind's nodes are containers on one kernel; whether CRIU can do there what it has to
# is what `move` finds out.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

# The first with Kubernetes 1.37, containerd 2.3 and runc 1.4.
readonly KIND_VERSION=v0.33.0
readonly KIND=$PODFERRY_STATE/cache/kind/kind
readonly NODES=(podferry-worker podferry-worker2)
# What was on the nodes before.
readonly BEFORE=$PODFERRY_STATE/kind-before
# Seconds that anything may take.
PATIENCE=${PATIENCE:-180}
work=''

# kind's own file, so that nobody's default context is changed.
export KUBECONFIG=$PODFERRY_STATE/kind-kubeconfig

helm() { "$PODFERRY_STATE/cache/helm/helm" "$@" 2> >(grep -v 'symbolic link' >&2); }
ferry() { kubectl --namespace podferry "$@"; }
passed() { log "passed: $*"; }

ensure_kind() {
    [[ -x $KIND && $("$KIND" version) == *" $KIND_VERSION "* ]] && return
    command -v go >/dev/null || die 'kind is built by Go 1.21 or newer: install Go'
    log "builds kind $KIND_VERSION"
    GOBIN=${KIND%/*} go install "sigs.k8s.io/kind@$KIND_VERSION" >&2
}

# The files that an installation touches, or might leave.
files_of() { docker exec "$1" sh -c 'find /etc/containerd /opt /etc/podferry /var/lib/podferry -type f -exec sha256sum {} + 2>/dev/null | sort -k 2'; }

up() {
    local archive=${1:?usage: smoke.sh up ARCHIVE} node
    ensure_kind
    "$KIND" create cluster --config "$PODFERRY_ROOT/deploy/kind/cluster.yaml" --wait 180s
    "$KIND" load image-archive "$archive" --name podferry
    mkdir -p "$BEFORE"
    for node in "${NODES[@]}"; do files_of "$node" >"$BEFORE/$node"; done
}

agents_are_ready() {
    [[ $(ferry get daemonset podferry-agent --output 'jsonpath={.status.numberReady}') == "${#NODES[@]}" ]]
}
coordinator_is_ready() {
    ferry get pods --selector app.kubernetes.io/component=coordinator \
        --output 'jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}' | grep -qx True
}

install() {
    "$PODFERRY_ROOT/deploy/helm/check.sh"
    kubectl create namespace podferry
    kubectl label namespace podferry pod-security.kubernetes.io/enforce=privileged
    helm install podferry "$PODFERRY_ROOT/deploy/helm/podferry" --namespace podferry
    kubectl label node "${NODES[@]}" podferry.dev/enabled=true
    until_true coordinator_is_ready
    passed 'a coordinator leads'
    until_true agents_are_ready
    passed 'both nodes have an agent that answers, behind a restart of containerd'
    counter | kubectl apply -f -
    kubectl rollout status deployment/counter --timeout "${PATIENCE}s"
    passed 'a pod of the class runs by the handler'
}

# A pod that counts in memory, and writes down how far it is. It begins at 1 whenever it is started.
counter() {
    cat <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: counter}
spec:
  selector: {matchLabels: {app: counter}}
  template:
    metadata: {labels: {app: counter}}
    spec:
      runtimeClassName: podferry
      terminationGracePeriodSeconds: 1
      containers:
        - name: counter
          image: $(ferry get daemonset podferry-agent --output 'jsonpath={.spec.template.spec.containers[0].image}')
          imagePullPolicy: Never
          command: [sh, -c, 'i=0; while :; do i=\$((i + 1)); echo \$i >>/counted/so-far; sleep 0.1; done']
          securityContext: {runAsUser: 0}
          volumeMounts: [{name: counted, mountPath: /counted}]
      volumes: [{name: counted, emptyDir: {}}]
YAML
}

of_pod() { kubectl get pods --selector app=counter --field-selector status.phase=Running --output "jsonpath={.items[0]$1}"; }
counted() { kubectl exec "$(of_pod .metadata.name)" -- tail -n 1 /counted/so-far; }
says() { kubectl get node "$1" --output 'jsonpath={.metadata.labels}' | grep -q "\"podferry.dev/strategy-$2\":\"true\""; }
has_one_pod() { [[ $(kubectl get pods --selector app=counter --output name | wc -l) == 1 ]]; }
target_of() { [[ $1 == "${NODES[0]}" ]] && echo "${NODES[1]}" || echo "${NODES[0]}"; }

# One after the other: warm, live.
move_by() {
    local strategy=$1 name from before after phase
    name=move-${strategy,,}
    from=$(of_pod .spec.nodeName)
    before=$(counted)
    kubectl apply -f - <<YAML
apiVersion: podferry.dev/v1alpha1
kind: Migration
metadata: {name: $name}
spec: {podName: $(of_pod .metadata.name), targetNode: $(target_of "$from"), strategy: $strategy}
YAML
    kubectl wait --for=condition=Finished --timeout "${PATIENCE}s" "migration/$name"
    phase=$(kubectl get migration "$name" --output 'jsonpath={.status.phase}')
    [[ $phase == succeeded ]] || { kubectl describe migration "$name" >&2; die "the pod did not move by $strategy: $phase"; }
    until_true has_one_pod
    after=$(counted)
    [[ $(of_pod .spec.nodeName) != "$from" && $(of_pod '.status.containerStatuses[0].restartCount') == 0 ]] || die "the pod is not where it should be after $strategy"
    # Every number is there once: the memory came along, and so did the file.
    kubectl exec "$(of_pod .metadata.name)" -- cat /counted/so-far | awk '$1 != NR { exit 1 }' || die "the pod began to count anew, or skipped something, after $strategy"
    ((after > before)) || die "the pod does not count any more after $strategy: $before, then $after"
    passed "a pod moves by $strategy with its memory: it has counted from $before to $after"
}

move() {
    local node
    for node in "${NODES[@]}"; do until_true says "$node" warm; done
    helm test podferry --namespace podferry
    passed 'the coordinator reaches both agents, and calls both nodes fit'
    move_by Warm
    for node in "${NODES[@]}"; do until_true says "$node" live; done
    move_by Live
}

uninstall() {
    local node
    kubectl delete migration,deployment --namespace default --all --timeout "${PATIENCE}s"
    helm uninstall podferry --namespace podferry --cascade foreground --wait --timeout 8m || {
        ferry logs job/podferry-uninstall >&2
        die 'it is not uninstalled'
    }
    for node in "${NODES[@]}"; do diff "$BEFORE/$node" <(files_of "$node") || die "$node is not as it was"; done
    passed 'the nodes are as they were'
}

# What there is to see after a failure.
show() {
    kubectl get nodes --show-labels
    kubectl get pods --all-namespaces --output wide
    kubectl get migrations --all-namespaces --output yaml
    ferry logs daemonset/podferry-agent --all-containers --all-pods --prefix --tail 100
    ferry logs deployment/podferry-coordinator --all-containers --all-pods --prefix --tail 100
    # What each node lacks, as the installer sees it.
    local pod
    for pod in $(ferry get pods --selector app.kubernetes.io/component=agent --output name); do
        ferry exec "$pod" --container agent -- /opt/podferry/current/bin/podferry-install check || true
    done
}

main() {
    require_root
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    case ${1:-} in
        up) up "${2:-}" ;;
        install | move | uninstall | show) "$1" ;;
        down) ensure_kind && "$KIND" delete cluster --name podferry && rm -rf "$BEFORE" ;;
        *) die 'usage: smoke.sh up ARCHIVE | install | move | uninstall | show | down' ;;
    esac
}

main "$@"
