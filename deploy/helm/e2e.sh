#!/usr/bin/env bash
# Installs the chart on a test cluster of its own, and takes it off again: what was on the nodes before is compared byte for byte with what is
# there afterwards. The last line is the sum, in JSON.
#
#   e2e.sh ARCHIVE [NAME:TAG]       the image, as deploy/image/build.sh makes it
#
# The nodes have no systemd: this script restarts containerd in its place.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly CLUSTER=install
# What Kubernetes, containerd and the network leave by themselves is not looked at.
readonly OTHERS=(/proc /sys /run /var/run /tmp /var/log /var/cache /var/lib/kubelet /var/lib/containerd /var/lib/cni)
CHART=$PODFERRY_ROOT/deploy/helm/podferry
# Seconds that anything may take.
PATIENCE=60
work=''
cases=0

cluster() { "$PODFERRY_STATE/testcluster/bin/testcluster" --name $CLUSTER "$@"; }
helm() { "$PODFERRY_STATE/cache/helm/helm" "$@" 2> >(grep -v 'symbolic link' >&2); }

passed() {
    cases=$((cases + 1))
    log "passed: $*"
}

files_of() {
    local prune
    prune=$(printf -- '-o -path %s ' "${OTHERS[@]}")
    # shellcheck disable=SC2086 # words are meant
    cluster exec "$1" -- find / -xdev \( ${prune#-o} \) -prune -o -printf '%p %y %m %U:%G %l\n' | sort
    cluster exec "$1" -- sh -c 'find /etc /opt -type f -exec sha256sum {} + | sort'
}

restart_containerd() {
    local node
    for node in node-a node-b; do cluster restart "$node" containerd >&2; done
}

pods_log() { kubectl --namespace podferry logs "daemonset/podferry-$1" --container "$2"; }
says() { pods_log "$1" "$2" | grep -q "$3"; }
has_handler() { cluster exec "$1" -- test -e /etc/containerd/conf.d/podferry.toml; }

has_labels() { [[ $(kubectl get node "$1" --output json | jq -r '.metadata.labels["podferry.dev/strategy-live"]') == true ]]; }
no_labels() { [[ $(kubectl get nodes --selector podferry.dev/strategy-warm --output name) == '' ]]; }

# Of podferry's; pods that end count as long as they are there.
no_objects() {
    local found
    found=$(kubectl get all,secrets,configmaps,serviceaccounts,roles,rolebindings --namespace podferry --output name | grep podferry || true)
    [[ -z $found ]] || { log "still there: ${found//$'\n'/ }"; return 1; }
}

start_pod() {
    kubectl apply -f - >&2 <<POD
apiVersion: v1
kind: Pod
metadata: {name: mover, namespace: default, annotations: {podferry.dev/test: "1"}}
spec:
  runtimeClassName: podferry
  nodeName: node-a
  terminationGracePeriodSeconds: 1
  containers: [{name: guest, image: "podferry.test/guest:1", imagePullPolicy: Never, args: [serve]}]
POD
    until_true kubectl wait --namespace default --for=condition=Ready --timeout=1s pod/mover
}

prepare() {
    cluster down >&2 || true
    cluster up >&2
    KUBECONFIG=$(cluster kubeconfig)
    export KUBECONFIG
    cluster load "$archive" >&2
    # The cluster's own handler makes way.
    kubectl delete runtimeclass podferry >&2
    local node
    for node in node-a node-b; do cluster exec "$node" -- rm -f /etc/containerd/conf.d/podferry.toml; done
    restart_containerd
    for node in node-a node-b; do files_of "$node" >"$work/$node.before"; done
    kubectl create namespace podferry >&2
    kubectl label namespace podferry pod-security.kubernetes.io/enforce=privileged >&2
}

install_chart() {
    local node
    helm install podferry "$CHART" --namespace podferry --set "image.repository=${image%:*},image.tag=${image##*:}" \
        --set image.pullPolicy=Never,install.restart=never,uninstall.waitSeconds=5 >&2
    kubectl label nodes node-a node-b podferry.dev/enabled=true >&2
    PATIENCE=120 until_true has_handler node-a
    until_true has_handler node-b
    passed 'labelled nodes get the handler'
    until_true says agent certificates 'issued .*agent.podferry.internal'
    passed 'each node gets a certificate of its own'
    restart_containerd
    for node in node-a node-b; do PATIENCE=120 until_true has_labels $node; done
    passed 'the coordinator hears of both agents what they can do, and labels their nodes'
}

opt_out() {
    start_pod
    passed 'a pod of the class runs by the handler'
    kubectl label node node-a podferry.dev/enabled=false --overwrite >&2
    PATIENCE=120 until_true says leave uninstall 'still run on this node'
    [[ $(cluster exec node-a -- readlink /opt/podferry/current/bin/podferry-runtime) == */runc ]] ||
        die 'the handler does not run runc after podferry has left'
    kubectl delete pod --namespace default mover --timeout=60s >&2
    passed 'a pod that still runs keeps a runc, and ends as it should'
    PATIENCE=120 until_true says leave uninstall 'the node is as it was'
    files_of node-a >"$work/node-a.after"
    diff "$work/node-a.before" "$work/node-a.after" >&2 || die 'node-a is not as it was'
    passed 'a node that leaves is as it was, byte for byte'
    kubectl label node node-a podferry.dev/enabled=true --overwrite >&2
    PATIENCE=120 until_true has_handler node-a
    passed 'it may come back'
}

phase_is() { [[ $(kubectl get migration --namespace default "$1" --output 'jsonpath={.status.phase}') == "$2" ]]; }
no_pods() { [[ $(kubectl get pods --namespace default --output name) == '' ]]; }
asked() { cluster exec node-b -- test -e /tmp/asked; }

# A client asks half a question, and the rest of it when the pod runs elsewhere under another name and address.
move_pod() {
    local address nonce asking
    restart_containerd
    PATIENCE=120 until_true has_labels node-a
    start_pod
    address=$(kubectl get pod --namespace default mover --output 'jsonpath={.status.podIP}')
    nonce=$(cluster exec node-b -- curl -s "http://$address:8080/" | jq -r .nonce)
    cluster exec node-b -- bash -c "exec 3<>/dev/tcp/$address/8080; printf 'GET / HTTP/1.1\r\nHost: mover\r\n' >&3; touch /tmp/asked
        until [[ -e /tmp/moved ]]; do sleep 0.1; done; printf '\r\n' >&3; cat <&3" >"$work/answer" </dev/null &
    asking=$!
    until_true asked
    kubectl apply -f - >&2 <<MIGRATION
apiVersion: podferry.dev/v1alpha1
kind: Migration
metadata: {name: move, namespace: default}
spec: {podName: mover, targetNode: node-b}
MIGRATION
    PATIENCE=90 until_true phase_is move succeeded
    passed 'a pod moves because of an object'
    cluster exec node-b -- touch /tmp/moved
    wait "$asking"
    grep -q "\"nonce\":\"$nonce\"" "$work/answer" || { cat "$work/answer" >&2; die 'the client has no answer'; }
    passed 'and a connection that a client had lives on'
    kubectl delete migration,pod --namespace default --all --wait=false >&2
    until_true no_pods
}

uninstall_chart() {
    local node
    helm uninstall podferry --namespace podferry --cascade foreground --wait --timeout 8m >&2 || {
        kubectl logs --namespace podferry job/podferry-uninstall >&2
        die 'it is not uninstalled'
    }
    for node in node-a node-b; do
        files_of "$node" >"$work/$node.after"
        diff "$work/$node.before" "$work/$node.after" >&2 || die "$node is not as it was"
    done
    no_labels || die 'nodes still say what they can do'
    passed 'helm uninstall leaves all nodes as they were'
    until_true no_objects
    passed 'and no objects but the definitions'
}

main() {
    [[ $# -ge 1 ]] || die 'usage: e2e.sh ARCHIVE [NAME:TAG]'
    require_root
    archive=$1
    image=${2:-podferry.dev/podferry:$(sed -nE '/^\[workspace.package\]/,/^$/s/^version = "(.*)"$/\1/p' "$PODFERRY_ROOT/Cargo.toml")}
    "$PODFERRY_ROOT/deploy/helm/check.sh"
    work=$(mktemp -d)
    trap 'cluster down >&2 || true; rm -rf "$work"' EXIT
    prepare
    install_chart
    opt_out
    move_pod
    uninstall_chart
    printf '{"cases": %d, "passed": %d}\n' "$cases" "$cases"
}

main "$@"
