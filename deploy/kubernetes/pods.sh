# shellcheck shell=bash
# Pods of Redis, their moves and their clients, for e2e.sh and speed.sh. To be sourced behind cluster.sh, which has $work.
# shellcheck disable=SC2154

can() { [[ $(kube get node "$1" -o json | jq -r --arg name "podferry.dev/strategy-$2" '.metadata.labels[$name]') == true ]]; }

# A Deployment of Redis, with a Service: redis NAME [EXTRA], EXTRA being further fields of the pod's spec.
redis() {
    cat <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: $1}
spec:
  selector: {matchLabels: {app: $1}}
  template:
    metadata: {labels: {app: $1}}
    spec:
$(redis_spec "${2:-}" | sed 's/^/      /')
---
apiVersion: v1
kind: Service
metadata: {name: $1}
spec: {selector: {app: $1}, ports: [{port: 6379}]}
YAML
}

# The same as a StatefulSet, with one pod: NAME-0.
stateful() { redis "$1" | sed -E "s/^kind: Deployment/kind: StatefulSet/; s/^spec:\$/spec:\n  serviceName: $1/${2:+; $2}" | kube apply -f - && until_true is_ready "$1"; }

redis_spec() {
    cat <<YAML
runtimeClassName: podferry
terminationGracePeriodSeconds: 1
$1
initContainers:
- {name: set-up, image: "podferry.test/redis:1", imagePullPolicy: Never, command: [sh, -c, 'echo once >>/cache/set-up'], volumeMounts: [{name: cache, mountPath: /cache}]}
containers:
- name: redis
  image: podferry.test/redis:1
  imagePullPolicy: Never
  command: [redis-server, --bind, 0.0.0.0, --protected-mode, "no", --enable-debug-command, "yes", --save, "", --dir, /cache]
  ports: [{containerPort: 6379}]
  resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 512Mi}}
  volumeMounts: [{name: cache, mountPath: /cache}, {name: fast, mountPath: /fast}, {name: settings, mountPath: /settings}]
  env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
volumes:
- {name: cache, emptyDir: {}}
- {name: fast, emptyDir: {medium: Memory}}
- {name: settings, configMap: {name: settings}}
YAML
}

bare() {
    printf 'apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec:\n' "$1" "$1"
    redis_spec "${2:-}" | sed 's/^/  /'
}

settings() { kube create configmap settings --from-literal=colour=blue --dry-run=client -o yaml | kube apply -f -; }

# The one pod of an app that runs; its name.
pod_of() { kube get pods -l "app=$1" -o json | jq -re '[.items[] | select(.metadata.deletionTimestamp | not)] | if length == 1 then .[0].metadata.name else error("there are \(length) pods") end'; }
is_ready() { [[ $(kube get pod "$(pod_of "$1")" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}') == True ]]; }
field() { kube get pod "$1" -o "jsonpath={$2}"; }
node_of() { field "$(pod_of "$1")" .spec.nodeName; }
other() { if [[ $1 == node-a ]]; then printf node-b; else printf node-a; fi; }
in_pod() { local app=$1; shift; kube exec "$(pod_of "$app")" -c redis -- "$@"; }
address_of() { field "$(pod_of "$1")" .status.podIP; }
service_of() { kube get service "$1" -o 'jsonpath={.spec.clusterIP}'; }
start() { redis "$@" | kube apply -f - && until_true is_ready "$1"; }

# move APP STRATEGY [OPTION...]: to the other node; the migration as JSON goes to $work/migration.
move() {
    local app=$1 strategy=$2 name from
    shift 2
    name=$(pod_of "$app") from=$(node_of "$app")
    ferry migrate "default/$name" --to "$(other "$from")" --strategy "$strategy" "$@" --wait --output json </dev/null >"$work/migration" 2>"$work/watched" ||
        { cat "$work/watched"; return 1; }
    freezes+=("$(jq -r .downtime_ms "$work/migration")")
    until_true has_left "$app" "$name"
    [[ $(node_of "$app") == "$(other "$from")" ]]
}

# move_named APP STRATEGY: as move, of a pod of a StatefulSet.
move_named() {
    local from
    from=$(node_of "$1")
    ferry migrate "default/$1-0" --to "$(other "$from")" --strategy "$2" --wait --output json </dev/null >"$work/migration" 2>"$work/watched" ||
        { cat "$work/watched"; return 1; }
    until_true is_ready "$1"
    [[ $(node_of "$1") == "$(other "$from")" ]]
}

# The old pod may be ending still: connections to its address live on.
has_left() { [[ $(kube get pod "$2" -o json | jq .metadata.deletionTimestamp) != null ]] && is_ready "$1"; }
digest() { on node-a podferry-bench redis-digest --target "$(address_of "$1"):6379" | jq -re .digest; }
fill() { on node-a podferry-bench redis-fill --target "$(address_of "$1"):6379" --mib "$2"; }

# load APP: two clients that keep their connections and check every answer, until unload.
load() {
    rm -f "$work/unload"
    # shellcheck disable=SC2034 # the loop's own
    on_with_input node-a podferry-bench load --target "$(service_of "$1"):6379" --kind redis --clients 2 --until-stdin-closes \
        >"$work/load" < <(sleep 1; for ((number = 0; number < 600; number++)); do [[ -e $work/unload ]] && break; sleep 0.2; done) &
    load=$!
    until_true grep -q . "$work/load"
}

# Ends it, and fails when a connection did not live, or an answer was wrong.
unload() {
    touch "$work/unload"
    wait "$load"
    tail -1 "$work/load" | jq -c '[.clients[] | {requests, failed_requests, connection_resets, lost_items, gap_ms_max, problems}]'
    lost=$((lost + $(tail -1 "$work/load" | jq '[.clients[].lost_items] | add')))
    failed_requests=$((failed_requests + $(tail -1 "$work/load" | jq '[.clients[].failed_requests] | add')))
    [[ $lost == 0 && $(tail -1 "$work/load" | jq '[.clients[].requests] | add') -gt 1000 ]]
    [[ $(tail -1 "$work/load" | jq '[.clients[] | .failed_requests, .connection_resets] | add') == 0 ]]
}

median() { # of the numbers that are given
    printf '%s\n' "$@" | jq -s 'sort | if length == 0 then null else .[(length - 1) / 2 | floor] end'
}

has_one_pod() { [[ $(kube get pods -l "app=$1" -o name | wc -l) == 1 ]]; }
no_pods() { [[ $(kube get pods -o name) == '' ]]; }
# What of podferry is on a node and should not be, when none of its pods is there any more.
left_on() { on "$1" sh -c 'cd /; ls -d run/podferry-images/* run/podferry/relays/* var/lib/podferry/fenced/*.asked var/run/netns/* 2>/dev/null; ps -eo args | grep -E "^[^ ]*(podferry-(pager|dump|hook|stdio|runtime)|criu)"' || true; }
