#!/usr/bin/env bash
# Moves pods between two nodes of a real Kubernetes, the test cluster, under load and with everything failing that may, and looks whether
# anything is lost. One line for each case, then one of JSON; exits non-zero when a case failed.
#
#   e2e.sh [CASE...]    builds what is missing first; all cases, unless some are named
#   PODFERRY_KEEP=1     leaves the cluster up, as "e2e-pods", to look into it
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/kubernetes/cluster.sh
. "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
# shellcheck source=deploy/kubernetes/pods.sh
. "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

readonly CASES=(
    nodes_are_fit_and_pods_are_workloads
    a_bare_pod_moves_live_with_all_it_has
    what_a_pod_is_given_is_the_new_pods
    a_deployment_moves_by_every_strategy_and_its_replica_set_makes_no_third_pod
    connections_live_on_through_a_service_over_many_moves
    connections_outlive_the_agents_that_carry_them
    connections_outlive_a_freeze_that_is_undone
    connections_live_for_as_long_as_is_asked_and_are_listed
    a_drain_waits_for_connections_that_need_the_node
    a_connection_that_a_pod_has_opened_itself_lives_on
    a_container_that_came_and_ends_is_started_anew
    a_job_moves_and_counts_one_success
    a_pod_of_a_stateful_set_moves_and_keeps_its_name
    a_pod_that_stands_still_for_long_is_not_killed_by_its_probes
    what_cannot_move_is_refused_with_the_reason
    a_cancel_while_memory_is_copied_costs_nothing
    a_node_that_does_not_take_the_pod_says_why
    an_agent_that_is_killed_while_memory_is_copied_costs_nothing
    a_coordinator_that_is_killed_on_the_way_goes_back_or_on
    a_kubelet_that_is_restarted_costs_nothing
    a_kubelet_that_does_not_wait_behind_the_commit_gets_what_came
    a_pod_that_is_deleted_on_the_way_ends
    two_pods_move_at_once
    an_object_moves_a_pod_and_tells_what_became_of_it
    an_object_empties_a_node_but_for_what_a_policy_keeps
    a_node_that_is_marked_to_go_is_emptied
    a_node_is_drained
    kubectl_drain_moves_what_can_move_and_ends_the_rest
    it_leaves_nothing
)

nodes_are_fit_and_pods_are_workloads() {
    until_true all_fit
    until_true can node-a live
    until_true can node-b postcopy
    settings
    bare one 'nodeName: node-a' | kube apply -f -
    until_true is_ready one
    until_true lists default/one
    # A pod of another class is none.
    bare other 'nodeName: node-a' | sed /runtimeClassName/d | kube apply -f -
    until_true is_ready other
    not lists default/other
    kube delete pod other
}

all_fit() { [[ $(ferry nodes --output json | jq '[.[] | select(.fit)] | length') == 2 ]]; }
lists() { ferry workloads --output json | jq -e --arg name "$1" 'any(.[]; .name == $name)'; }

a_bare_pod_moves_live_with_all_it_has() {
    local before
    fill one 64
    before=$(digest one)
    in_pod one sh -c 'echo kept >/cache/file; echo fast >/fast/file; echo layer >/layer; echo shared >/dev/shm/file; echo declared >/data/file'
    kube logs "$(pod_of one)" | grep -q 'Ready to accept'
    move one live
    [[ $(digest one) == "$before" ]]
    [[ $(in_pod one cat /cache/file /fast/file /layer /dev/shm/file /data/file) == $'kept\nfast\nlayer\nshared\ndeclared' ]]
    # The init container has not run again.
    [[ $(in_pod one cat /cache/set-up) == once ]]
    [[ $(field "$(pod_of one)" '.status.containerStatuses[0].restartCount') == 0 ]]
    # There and back, and what is written meanwhile too.
    in_pod one redis-cli set there yes
    move one live
    [[ $(in_pod one redis-cli get there) == yes && $(pod_of one) == one-* ]]
    in_pod one redis-cli del there
    [[ $(digest one) == "$before" ]]
}

what_a_pod_is_given_is_the_new_pods() {
    local name address
    name=$(pod_of one) address=$(address_of one)
    [[ $(in_pod one cat /proc/sys/kernel/hostname) == "$name" ]]
    in_pod one cat /etc/hosts | grep -q "^$address.*$name"
    in_pod one cat /var/run/secrets/kubernetes.io/serviceaccount/token | cut -d. -f2 | tr '_-' '/+' | base64 -d 2>/dev/null |
        grep -q "\"name\":\"$name\""
    [[ $(in_pod one cat /settings/colour) == blue ]]
    # The volumes go on being the pod's: what is changed in the map comes.
    kube create configmap settings --from-literal=colour=green --dry-run=client -o yaml | kube apply -f -
    PATIENCE=120 until_true is_green
    # What a program writes from now on is in the new pod's log.
    in_pod one redis-cli debug sleep 0 || true
    in_pod one redis-cli config set loglevel verbose
    in_pod one redis-cli ping
    until_true logs_go_on
    kube delete pod "$name"
}

is_green() { [[ $(in_pod one cat /settings/colour) == green ]]; }
logs_go_on() { kube logs "$(pod_of one)" | grep -q Accepted; }

a_deployment_moves_by_every_strategy_and_its_replica_set_makes_no_third_pod() {
    local strategy set uid
    start shop
    in_pod shop redis-cli set hello world
    set=$(field "$(pod_of shop)" '.metadata.ownerReferences[0].name')
    for strategy in warm live postcopy hybrid; do
        if [[ $strategy == warm || $strategy == live ]]; then move shop "$strategy"; else move shop "$strategy" --accept-loss; fi
        [[ $(in_pod shop redis-cli get hello) == world ]]
    done
    [[ $(field "$(pod_of shop)" '.metadata.ownerReferences[0].name') == "$set" ]]
    uid=$(kube get replicaset "$set" -o 'jsonpath={.metadata.uid}')
    [[ $(kube get events -o json | jq --arg uid "$uid" '[.items[] | select(.involvedObject.uid == $uid and .reason == "SuccessfulCreate")] | length') == 1 ]]
    # Nothing of the moves is left on it.
    not is_marked "$(pod_of shop)"
    # And its Deployment still rules: a new template makes new pods.
    kube rollout restart deployment shop
    kube rollout status deployment shop --timeout=60s
    until_true is_ready shop
}

is_marked() { kube get pod "$1" -o json | jq -e '.metadata | (.labels + .annotations) | has("podferry.dev/migration")'; }

# The same two connections from the first move to the last, each of which gives the pod another address.
connections_live_on_through_a_service_over_many_moves() {
    local number load
    start busy
    fill busy 32
    load busy
    for number in 1 2 3 4; do move busy live; done
    unload
    # The longest pauses, one for each move.
    mapfile -t -O "${#gaps[@]}" gaps < <(tail -1 "$work/load" | jq '[.clients[0].gaps[].gap_ms] | sort | reverse | .[:4][]')
    # With the connections the old sandboxes go, and with them their addresses.
    until_true has_one_pod busy
}

# Once for every agent: that at home, that of a pod which has moved on, and that where it is now.
connections_outlive_the_agents_that_carry_them() {
    local number load
    load busy
    for number in 1 2; do
        move busy live
        kill_agent node-a
        kill_agent node-b
        until_true all_fit
    done
    unload
    until_true has_one_pod busy
}

connections_outlive_a_freeze_that_is_undone() {
    local id load
    load busy
    # So that the container stands still for seconds.
    id=$(ferry migrate "default/$(pod_of busy)" --to "$(other "$(node_of busy)")" --strategy warm --bandwidth-limit 16M --output json </dev/null | jq -r .id)
    until_true phase_is "$id" freeze
    sleep 1
    ferry cancel "$id"
    until_true phase_is "$id" cancelled
    unload
    tail -1 "$work/load" | jq -e '.clients[0].gap_ms_max > 900'
    until_true no_target_left
}

connections_live_for_as_long_as_is_asked_and_are_listed() {
    local load home
    load busy
    home=$(node_of busy)
    move busy live --connections keep --connections-deadline 25s
    ferry connections "default/$(pod_of busy)" --output json </dev/null | tee "$work/connections"
    jq -e --arg home "$home" '.kept | length == 1 and (.[0] | .home_node == $home and .connections == 2 and all(.some[]; .received_bytes > 0 and .sent_bytes > 0))' "$work/connections"
    ferry describe "$(jq -r .id "$work/migration")" </dev/null | grep "living  *2 through $home"
    # Then they are reset, and the old pod goes; what was confirmed is there.
    until_true has_one_pod busy
    move busy live --connections close
    jq -e 'any(.notes[]; test("^[0-9]+ established TCP connections are closed: that was asked for$"))' "$work/migration"
    [[ $(ferry connections --output json </dev/null | jq '.kept | length') == 0 ]]
    not unload
    tail -1 "$work/load" | jq -e '[.clients[] | .connection_resets >= 2 and .lost_items == 0] | all'
    # Those were meant.
    failed_requests=$((failed_requests - $(tail -1 "$work/load" | jq '[.clients[].failed_requests] | add')))
}

a_drain_waits_for_connections_that_need_the_node() {
    local load from draining
    load busy
    from=$(node_of busy)
    PATIENCE=120 ferry drain "$from" -l app=busy --strategy live </dev/null >"$work/drained" 2>&1 &
    draining=$!
    until_true grep -q "$from: waiting for connections of 1 that have left" "$work/drained"
    [[ $(ferry evacuations --node "$from" --active --output json </dev/null | jq '.[0].homes') == 1 ]]
    [[ $(node_of busy) == "$(other "$from")" ]]
    kill -0 "$draining"
    unload
    wait "$draining"
    until_true has_one_pod busy
    # It is no place for pods as long as it is being emptied, and no longer.
    move busy live
}

# A replica that moves: were its connection another, it would have to be synchronized again.
a_connection_that_a_pod_has_opened_itself_lives_on() {
    local before
    start replica
    in_pod replica redis-cli replicaof "$(address_of busy)" 6379
    until_true is_replica
    before=$(syncs)
    move replica live
    in_pod busy redis-cli set replicated "$before"
    until_true has_replicated "$before"
    [[ $(syncs) == "$before" ]]
    is_replica
    kube delete deployment replica
}

is_replica() { in_pod replica redis-cli info replication | grep -q master_link_status:up; }
syncs() { in_pod busy redis-cli info stats | grep -E '^sync_(full|partial)' | tr -d '\r' | sort | tr '\n' ' '; }
has_replicated() { [[ $(in_pod replica redis-cli get replicated) == "$1" ]]; }

a_container_that_came_and_ends_is_started_anew() {
    in_pod shop redis-cli set gone soon
    move shop live
    in_pod shop redis-cli shutdown nosave || true
    until_true was_restarted
    until_true is_ready shop
    [[ $(in_pod shop redis-cli get gone) == '' ]]
}

# A Job that nothing may fail: each pod that is lost, and each that is made anew, would be one failure too many.
job() {
    cat <<YAML
apiVersion: batch/v1
kind: Job
metadata: {name: $1}
spec:
  backoffLimit: 0
  template:
    metadata: {labels: {app: $1}}
    spec:
      restartPolicy: Never
$(redis_spec '' | sed 's/^/      /; s/command: .redis-server.*/command: [sh, -c, "i=0; while ! [ -e \/cache\/end ]; do i=$((i+1)); echo $i >>\/cache\/count; sleep 0.05; done"]/')
YAML
}

a_job_moves_and_counts_one_success() {
    local count strategy uid
    job sum | kube apply -f -
    until_true is_ready sum
    for strategy in live warm postcopy; do
        count=$(counted)
        if [[ $strategy == postcopy ]]; then move sum "$strategy" --accept-loss; else move sum "$strategy"; fi
        (($(counted) >= count))
        [[ $(of_job '.status.active') == 1 && $(of_job '.status.failed') == '' ]]
        [[ $(field "$(pod_of sum)" '.metadata.ownerReferences[0].name') == sum ]]
    done
    (($(counted) > 20))
    in_pod sum sh -c ': >/cache/end'
    until_true has_succeeded
    uid=$(of_job .metadata.uid)
    [[ $(of_job '.status.succeeded') == 1 && $(of_job '.status.failed') == '' ]]
    [[ $(kube get events -o json | jq --arg uid "$uid" '[.items[] | select(.involvedObject.uid == $uid and .reason == "SuccessfulCreate")] | length') == 1 ]]
    kube delete job sum
    # Its finalizers went with what it counted.
    until_true has_no_pod sum
}

a_pod_of_a_stateful_set_moves_and_keeps_its_name() {
    local before strategy uid load
    stateful set
    fill set 32
    in_pod set sh -c 'echo kept >/cache/file; echo fast >/fast/file; echo layer >/layer; echo shared >/dev/shm/file'
    before=$(digest set)
    for strategy in live warm; do
        uid=$(field set-0 .metadata.uid)
        move_named set "$strategy"
        [[ $(field set-0 .metadata.uid) != "$uid" && $(digest set) == "$before" ]]
        [[ $(in_pod set cat /cache/file /fast/file /layer /dev/shm/file) == $'kept\nfast\nlayer\nshared' ]]
        [[ $(in_pod set cat /cache/set-up) == once && $(in_pod set cat /proc/sys/kernel/hostname) == set-0 ]]
        [[ $(field set-0 '.status.containerStatuses[0].restartCount') == 0 ]]
        [[ $(field set-0 '.metadata.ownerReferences[0].name') == set ]]
        until_true no_target_left
        has_one_pod set
    done
    # Connections live on, though the old pod is gone at once.
    load set
    for strategy in live warm; do move_named set "$strategy"; done
    unload
    # The set rules still.
    kube delete pod set-0
    until_true is_ready set
    [[ $(in_pod set redis-cli dbsize) == 0 ]]
    kube delete statefulset set
}

counted() { in_pod sum cat /cache/count | tail -1; }
of_job() { kube get job sum -o "jsonpath={$1}"; }
has_succeeded() { [[ $(of_job '.status.conditions[?(@.type=="Complete")].status') == True ]]; }
has_no_pod() { [[ $(kube get pods -l "app=$1" -o name) == '' ]]; }

# Its memory takes seconds to cross, in which its liveness probe fails: first while it stands still before the commit, then behind it,
# when the target has only part of it.
a_pod_that_stands_still_for_long_is_not_killed_by_its_probes() {
    local before way probe name
    probe='livenessProbe: {exec: {command: [redis-cli, ping]}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 1}'
    redis patient | sed "s#^        ports:.*#&\n        $probe#" | kube apply -f -
    until_true is_ready patient
    fill patient 32
    before=$(digest patient)
    for way in warm 'postcopy --accept-loss'; do
        name=$(pod_of patient)
        # shellcheck disable=SC2086 # words
        move patient $way --bandwidth-limit 4M
        # It was to be killed. In post-copy the probe's own process stands still, too, and says nothing.
        [[ $way != warm ]] ||
            kube get events --field-selector "involvedObject.name=$name,reason=Killing" | grep -q 'failed liveness probe'
        [[ $(digest patient) == "$before" ]]
        [[ $(field "$(pod_of patient)" '.status.containerStatuses[0].restartCount') == 0 ]]
    done
    kube delete deployment patient
}

was_restarted() { [[ $(field "$(pod_of shop)" '.status.containerStatuses[0].restartCount') == 1 ]]; }

refused() { # refused POD WORD...
    local name=$1 word
    shift
    until_true lists "default/$name"
    ! ferry migrate "default/$name" --strategy live --wait >"$work/refusal" 2>&1 || return 1
    for word in "$@"; do grep -q -- "$word" "$work/refusal" || { cat "$work/refusal"; return 1; }; done
}

what_cannot_move_is_refused_with_the_reason() {
    bare at-home 'nodeName: node-a' | sed 's#- {name: cache, emptyDir: {}}#- {name: cache, hostPath: {path: /tmp/at-home, type: DirectoryOrCreate}}#' |
        kube apply -f -
    until_true is_ready at-home
    refused at-home hostPath emptyDir
    kube delete pod at-home
    redis each | sed 's/^kind: Deployment/kind: DaemonSet/' | kube apply -f -
    kube rollout status daemonset each --timeout=60s
    refused "$(kube get pods -l app=each -o 'jsonpath={.items[0].metadata.name}')" DaemonSet
    kube delete daemonset each
    bare two 'nodeName: node-a' >"$work/two"
    sed 's#^  containers:#  containers:\n  - {name: second, image: "podferry.test/redis:1", imagePullPolicy: Never, command: [sleep, "1000000"]}#' "$work/two" |
        kube apply -f -
    until_true is_ready two
    refused two '2 containers'
    kube delete pod two
    # Whatever was refused, no second pod was made for it.
    [[ $(kube get pods -l podferry.dev/migration -o name) == '' ]]
}

slowly() { # slowly APP: begins a migration that copies memory for long; its id.
    local name
    name=$(pod_of "$1")
    ferry migrate "default/$name" --to "$(other "$(node_of "$1")")" --strategy live --bandwidth-limit "${2:-4M}" --output json </dev/null |
        jq -r .id
}

phase_is() { [[ $(ferry describe "$1" --output json | jq -r .phase) == "$2" ]]; }
no_target_left() { [[ $(kube get pods -l podferry.dev/migration -o name) == '' ]]; }

# stays APP COMMAND...: copies memory slowly, runs the command, and the pod is where it was, with what it had.
stays() {
    local app=$1 id before name uid
    shift
    name=$(pod_of "$app") before=$(digest "$app")
    uid=$(field "$name" .metadata.uid)
    id=$(slowly "$app")
    until_true phase_is "$id" precopy
    "$@" "$id"
    until_true is_over "$id"
    until_true no_target_left
    [[ $(field "$name" .metadata.uid) == "$uid" && $(field "$name" '.status.containerStatuses[0].restartCount') == 0 ]]
    [[ $(digest "$app") == "$before" ]]
}

is_over() { [[ $(ferry describe "$1" --output json | jq -r .phase) =~ ^(failed|cancelled)$ ]]; }

a_cancel_while_memory_is_copied_costs_nothing() { stays busy ferry cancel; }

a_node_that_does_not_take_the_pod_says_why() {
    # What the scheduler's rules say is known before anything is made.
    bare rooted 'nodeSelector: {kubernetes.io/hostname: node-a}' | kube apply -f -
    until_true is_ready rooted
    until_true lists default/rooted
    not ferry migrate default/rooted --to node-b --strategy live --wait >"$work/refusal" 2>&1
    grep -q 'node_selector' "$work/refusal"
    kube delete pod rooted
    # What only its kubelet knows is known before anything is copied.
    bare rooted 'nodeName: node-a' | sed 's/cpu: 10m/cpu: 1200m/' | kube apply -f -
    bare large 'nodeName: node-b' | sed 's/cpu: 10m/cpu: 1200m/' | kube apply -f -
    until_true is_ready large
    until_true is_ready rooted
    until_true lists default/rooted
    not ferry migrate default/rooted --to node-b --strategy live --wait >"$work/refusal" 2>&1
    grep -q 'OutOfcpu' "$work/refusal"
    until_true no_target_left
    kube delete pod large
    [[ $(in_pod rooted redis-cli ping) == PONG ]]
    kube delete pod rooted
    # A pod that keeps its name needs room beside the one that stands in for it. That is known before anything is copied, too.
    stateful wide 's/cpu: 10m/cpu: 900m/'
    bare large "nodeName: $(other "$(node_of wide)")" | sed 's/cpu: 10m/cpu: 400m/' | kube apply -f -
    until_true is_ready large
    until_true lists default/wide-0
    not ferry migrate default/wide-0 --to "$(other "$(node_of wide)")" --strategy live --wait >"$work/refusal" 2>&1
    grep -q 'stands in' "$work/refusal"
    until_true no_target_left
    kube delete statefulset wide
    kube delete pod large
}

kill_target_agent() { kill_agent "$(ferry describe "$1" --output json | jq -r .target)"; }
kill_source_agent() { kill_agent "$(ferry describe "$1" --output json | jq -r .source)"; }

an_agent_that_is_killed_while_memory_is_copied_costs_nothing() {
    stays busy kill_target_agent
    until_true all_fit
    stays busy kill_source_agent
    until_true all_fit
}

kill_the_coordinator() {
    kill_coordinator
    until_true ferry migrations
}

a_coordinator_that_is_killed_on_the_way_goes_back_or_on() {
    local name id before kill
    stays busy kill_the_coordinator
    # Behind the commit it goes on: killed at once when the source is being released, or soon after.
    name=$(pod_of shop)
    in_pod shop redis-cli set still here
    id=$(ferry migrate "default/$name" --to "$(other "$(node_of shop)")" --strategy live --output json </dev/null | jq -r .id)
    until_true is_committed "$id"
    kill_the_coordinator "$id"
    until_true phase_is "$id" succeeded
    until_true has_left shop "$name"
    [[ $(in_pod shop redis-cli get still) == here ]]
    until_true no_target_left
    # The same with a pod that keeps its name: then the pod of that name is still to be made, or just has been.
    stateful sole
    fill sole 16
    for kill in kill_the_coordinator kill_target_agent kill_source_agent; do
        before=$(digest sole)
        id=$(ferry migrate default/sole-0 --to "$(other "$(node_of sole)")" --strategy live --output json </dev/null | jq -r .id)
        until_true is_committed "$id"
        "$kill" "$id"
        until_true phase_is "$id" succeeded
        until_true is_ready sole
        until_true no_target_left
        [[ $(digest sole) == "$before" && $(field sole-0 '.status.containerStatuses[0].restartCount') == 0 ]]
        until_true all_fit
    done
    kube delete statefulset sole
}

is_committed() { [[ $(ferry describe "$1" --output json | jq -r .phase) =~ ^(release|resume|fill|succeeded)$ ]]; }

a_kubelet_that_is_restarted_costs_nothing() {
    local node
    # Of the pod that waits for its container: what it had begun is begun anew, or the migration is undone.
    node=$(other "$(node_of busy)")
    stays busy restart_kubelet_and_cancel "$node"
    # With a pod that came by a migration.
    first restart "$(node_of shop)" kubelet --signal 9
    sleep 3
    [[ $(in_pod shop redis-cli ping) == PONG && $(field "$(pod_of shop)" '.status.containerStatuses[0].restartCount') -le 1 ]]
}

restart_kubelet_and_cancel() {
    first restart "$1" kubelet --signal 9
    ferry cancel "$2" || true
}

# The commit is held up by the API server until the source cannot be reached any more. So the target waits behind the commit, and its
# kubelet begins the container anew.
a_kubelet_that_does_not_wait_behind_the_commit_gets_what_came() {
    local name id from to before
    name=$(pod_of busy) from=$(node_of busy) before=$(digest busy)
    to=$(other "$from")
    in_pod busy sh -c 'echo late >/cache/late; echo layer >/layer; echo declared >/data/late; echo shared >/dev/shm/late'
    id=$(slowly busy 16M)
    until_true phase_is "$id" precopy
    on control pkill -STOP -f kube-apiserver
    until_true phase_is "$id" commit || { on control pkill -CONT -f kube-apiserver; return 1; }
    sleep 1
    on "$from" nft 'add table inet e2e; add chain inet e2e in { type filter hook input priority 0; }; add rule inet e2e in ip saddr 10.77.0.1 tcp dport 7443 drop'
    on control pkill -CONT -f kube-apiserver
    until_true phase_is "$id" release
    first restart "$to" kubelet --signal 9
    until_true has_come_again "$to" "$id" || { on "$from" nft delete table inet e2e; return 1; }
    on "$from" nft delete table inet e2e
    PATIENCE=120 until_true phase_is "$id" succeeded
    until_true has_left busy "$name"
    [[ $(digest busy) == "$before" ]]
    [[ $(in_pod busy cat /cache/late /layer /data/late /dev/shm/late) == $'late\nlayer\ndeclared\nshared' ]]
}

has_come_again() { [[ $(on "$1" grep -c "container comes.*$2" /var/log/podferry-agent.log) -ge 2 ]]; }

a_pod_that_is_deleted_on_the_way_ends() {
    local id name
    start short
    fill short 32
    name=$(pod_of short)
    id=$(slowly short)
    until_true phase_is "$id" precopy
    kube delete deployment short
    until_true is_over "$id"
    until_true no_target_left
    until_true none_left short
}

none_left() { [[ $(kube get pods -l "app=$1" -o name) == '' ]]; }

two_pods_move_at_once() {
    local shop busy shop_id busy_id
    shop=$(pod_of shop) busy=$(pod_of busy)
    shop_id=$(ferry migrate "default/$shop" --to "$(other "$(node_of shop)")" --strategy live --output json </dev/null | jq -r .id)
    busy_id=$(ferry migrate "default/$busy" --to "$(other "$(node_of busy)")" --strategy live --output json </dev/null | jq -r .id)
    until_true phase_is "$shop_id" succeeded
    until_true phase_is "$busy_id" succeeded
    until_true has_left shop "$shop"
    until_true has_left busy "$busy"
}

object() { # object NAME POD NODE
    printf 'apiVersion: podferry.dev/v1alpha1\nkind: Migration\nmetadata: {name: %s}\nspec: {podName: %s, targetNode: %s, strategy: Live}\n' "$1" "$2" "$3"
}

an_object_moves_a_pod_and_tells_what_became_of_it() {
    local name id
    name=$(pod_of shop)
    in_pod shop redis-cli set by object
    object by-hand "$name" "$(other "$(node_of shop)")" | kube apply -f -
    kube wait --for=condition=Succeeded --timeout=60s migration/by-hand
    until_true has_left shop "$name"
    [[ $(in_pod shop redis-cli get by) == object ]]
    kube get migrations
    # The command line sees it, and what that asks for is an object, too.
    id=$(kube get migration by-hand -o 'jsonpath={.status.id}')
    phase_is "$id" succeeded
    move shop live
    [[ $(kube get migrations -o json | jq --arg id "$(jq -r .id "$work/migration")" 'any(.items[]; .status.id == $id)') == true ]]
    # What cannot be says why, where one looks.
    object nowhere "$(pod_of shop)" no-such-node | kube apply -f -
    until_true says_no nowhere no-such-node
    kube delete migration nowhere by-hand
}

says_no() { kube get migration "$1" -o json | jq -e --arg word "$2" 'any(.status.conditions[]; .status == "False" and (.message | contains($word)))'; }

evacuation() { # NAME NODE
    printf 'apiVersion: podferry.dev/v1alpha1\nkind: NodeEvacuation\nmetadata: {name: %s}\nspec: {nodeName: %s, strategy: Live}\n' "$1" "$2"
}

policy_that_keeps() { # APP
    cat <<YAML
apiVersion: podferry.dev/v1alpha1
kind: MigrationPolicy
metadata: {name: stays}
spec: {podSelector: {matchLabels: {app: $1}}, limits: {movable: false}}
YAML
}

evacuation_is() { [[ $(kube get nodeevacuation "$1" -o 'jsonpath={.status.phase}') == "$2" ]]; }

an_object_empties_a_node_but_for_what_a_policy_keeps() {
    local from one
    from=$(node_of busy)
    for one in goes stays; do bare "$one" "nodeName: $from" | kube apply -f -; done
    for one in goes stays; do until_true is_ready "$one"; until_true lists "default/$one"; done
    policy_that_keeps stays | kube apply -f -
    evacuation empty "$from" | kube apply -f -
    PATIENCE=180 until_true evacuation_is empty incomplete
    until_true is_on goes "$(other "$from")"
    until_true is_on busy "$(other "$from")"
    is_on stays "$from"
    kube get nodeevacuation empty -o json >"$work/evacuation"
    jq -e '.status.pods[0] | .name == "stays" and .outcome == "left_behind" and (.reason | contains("does not allow that this pod is moved"))' "$work/evacuation"
    [[ $(kube get node "$from" -o 'jsonpath={.spec.unschedulable}') == true ]]
    # It says so to whoever asks otherwise, too.
    not ferry migrate default/stays --to "$(other "$from")" --strategy live --wait </dev/null
    kube uncordon "$from"
    kube delete nodeevacuation empty
    kube delete migrationpolicy stays
    for one in goes stays; do kube delete pod "$(pod_of "$one")" --wait=false; done
}

SPOT=aws-node-termination-handler/spot-itn

notices() { kube get nodeevacuations -l podferry.dev/notice-node -o name; }
notices_are() { [[ $(notices | wc -l) == "$1" ]]; }

a_node_that_is_marked_to_go_is_emptied() {
    local from found
    from=$(node_of busy)
    kube taint node "$from" "$SPOT=soon:NoSchedule"
    until_true notices_are 1
    found=$(notices)
    PATIENCE=110 until_true is_on busy "$(other "$from")"
    PATIENCE=110 until_true evacuation_is "${found#*/}" complete
    # Once for as long as it is there, whoever leads.
    kill_the_coordinator
    until_true all_fit
    sleep 3
    notices_are 1
    kube taint node "$from" "$SPOT-"
    until_true notices_are 0
    # The next one is another.
    kube taint node "$from" "$SPOT=again:NoSchedule"
    until_true notices_are 1
    [[ $(notices) != "$found" ]]
    PATIENCE=110 until_true evacuation_is "$(basename "$(notices)")" complete
    kube taint node "$from" "$SPOT-"
    until_true notices_are 0
    kube delete nodeevacuations --all
}

a_node_is_drained() {
    local number from
    from=$(node_of busy)
    for number in 1 2 3 4; do bare "many-$number" "nodeName: $from" | kube apply -f -; done
    for number in 1 2 3 4; do until_true is_ready "many-$number"; until_true lists "default/many-$number"; done
    PATIENCE=180 ferry drain "$from" --strategy live </dev/null
    for number in 1 2 3 4; do until_true is_on "many-$number" "$(other "$from")"; done
    until_true is_on busy "$(other "$from")"
    for number in 1 2 3 4; do kube delete pod "$(pod_of "many-$number")" --wait=false; done
}

is_on() { [[ $(node_of "$1") == "$2" ]] && is_ready "$1"; }

# Whose evictions become migrations.
kubectl_drain_moves_what_can_move_and_ends_the_rest() {
    local from one
    settings
    start kept
    # It keeps kubectl from ending the pod. It is no reason not to move it: there is one at each moment.
    kube create poddisruptionbudget kept --selector app=kept --min-available 1
    from=$(node_of kept)
    bare alone "nodeName: $from" | kube apply -f -
    bare fixed "nodeName: $from"$'\nhostIPC: true' | kube apply -f -
    for one in alone fixed; do until_true is_ready "$one"; until_true lists "default/$one"; done
    for one in kept alone; do in_pod "$one" redis-cli set memory of-old; done
    until_true is_asked_about alone
    [[ $(evicted_migrations | jq length) == 0 ]]
    kube drain "$from" --ignore-daemonsets --delete-emptydir-data --force --timeout 170s >"$work/drained" 2>&1 || { cat "$work/drained"; return 1; }
    cat "$work/drained"
    for one in kept alone; do
        until_true is_on "$one" "$(other "$from")"
        [[ $(in_pod "$one" redis-cli get memory) == of-old ]]
        grep -q "moves the pod default/$one.* instead (Migration evicted-" "$work/drained"
    done
    # What cannot move is evicted, and it is said why.
    not kube get pod fixed
    grep -q 'Warning: podferry does not move this pod.*hostIPC' "$work/drained"
    until_true evicted_have_succeeded
    kube uncordon "$from"
    kube delete migrations -l podferry.dev/evicted-pod
    kube delete deployment,poddisruptionbudget kept
    kube delete pod "$(pod_of alone)" --wait=false
}

evicted_migrations() { kube get migrations -l podferry.dev/evicted-pod -o json | jq '.items'; }
evicted_have_succeeded() { evicted_migrations | jq -e 'length >= 2 and all(.[]; .status.phase == "succeeded")'; }
# The API server learns by a watch whom it may trust.
is_asked_about() {
    printf '{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "%s"}, "deleteOptions": {"dryRun": ["All"]}}' "$1" |
        kube create --raw "/api/v1/namespaces/default/pods/$1/eviction" -f - 2>&1 | grep 'would move this pod'
}

it_leaves_nothing() {
    local node
    # A node that takes part no more is not said to.
    kube label node node-a podferry.dev/enabled-
    PATIENCE=90 until_true not can node-a warm
    kube delete deployment --all
    kube delete pod --all
    until_true no_pods
    for node in node-a node-b; do
        left_on "$node"
        [[ $(on "$node" sh -c 'ls /run/podferry-images /sys/fs/cgroup/*/kubepods 2>/dev/null | grep -c pod') == 0 ]] || on "$node" ls /run/podferry-images
        [[ $(on "$node" sh -c 'pgrep -c "podferry-(pager|dump|hook|stdio|runtime)|criu"') == 0 ]]
        [[ $(on "$node" ls /run/podferry-images) == '' ]]
        [[ $(on "$node" ls /run/podferry/relays) == '' ]]
        [[ $(on "$node" sh -c 'ls /var/lib/podferry/fenced/*.asked 2>/dev/null') == '' ]]
        # Nobody keeps a namespace of a pod that is gone.
        [[ $(on "$node" ls /var/run/netns) == '' ]]
    done
}


summary() {
    printf '{"cases": %d, "passed": %d, "skipped": 0, "lost_items": %d, "failed_requests": %d, "freeze_ms_median": %s, "service_gap_ms_median": %s}\n' \
        "$cases" "$passed" "$lost" "$failed_requests" "$(median "${freezes[@]}")" "$(median "${gaps[@]}")"
}

main() {
    local one
    begin_cluster
    for one in "${@:-${CASES[@]}}"; do check "$one"; done
    summary
    [[ $passed -eq $cases ]]
}

main "$@"
