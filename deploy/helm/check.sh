#!/usr/bin/env bash
# Checks the chart and the kustomizations with the real helm and kubectl, and without a cluster.
#
#   check.sh            lint, render with many values, and compare deploy/kustomize/base with what the chart makes
#   check.sh --write    write deploy/kustomize/base/podferry.yaml and what is generated of deploy/kustomize/components anew
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly HELM_VERSION=v4.3.0
CHART=$PODFERRY_ROOT/deploy/helm/podferry
KUSTOMIZE=$PODFERRY_ROOT/deploy/kustomize
BASE=$KUSTOMIZE/base/podferry.yaml
EVICTION=$KUSTOMIZE/components/eviction

# Built from its Go modules where it is missing.
ensure_helm() {
    helm=$PODFERRY_STATE/cache/helm/helm
    [[ -x $helm ]] && return 0
    command -v go >/dev/null || die "helm is built by Go 1.21 or newer: install Go"
    log "builds helm $HELM_VERSION"
    GOBIN=${helm%/*} go install "helm.sh/helm/v4/cmd/helm@$HELM_VERSION" >&2
}

# Helm tells that it follows the link to deploy/crds.
quiet() { "$@" 2> >(grep -v 'symbolic link' >&2); }

render() { quiet "$helm" template podferry "$CHART" --namespace podferry "$@"; }

base() { render --no-hooks --set certificates.existingAuthority=podferry-authority; }

# The configuration and the webhook of evictions.
eviction() { render --no-hooks --set certificates.existingAuthority=podferry-authority,eviction.enabled=true --show-only "templates/$1.yaml"; }
configuration() { eviction coordinator | awk '/^---$/ {part++} part == 1'; }

# is_written FILE COMMAND...: the file is what the command says; with --write it is made so.
is_written() {
    local file=$1
    shift
    if [[ $write == --write ]]; then
        "$@" >"$file"
    fi
    diff -u "$file" <("$@") >&2 || die "$file is not what the chart makes: run $0 --write"
}

# The component on the base.
check_eviction() {
    local folder built words
    folder=$(mktemp -d "$KUSTOMIZE/overlays/.check-XXXXXX")
    printf 'resources: [../../base]\ncomponents: [../../components/eviction]\n' >"$folder/kustomization.yaml"
    built=$(kubectl kustomize "$folder") || { rm -r "$folder"; die "$EVICTION cannot be built"; }
    rm -r "$folder"
    for words in 'kind: ValidatingWebhookConfiguration' '\[kubernetes.eviction\]' 'containerPort: 7446' 'port: 7446' 'name: grpc'; do
        grep -q "$words" <<<"$built" || die "the component $EVICTION has no '$words'"
    done
}

# Each of these has to render, and those behind it must not.
check_values() {
    local values rendered
    for values in '' \
        metrics.enabled=true,metrics.podMonitor.enabled=true,metrics.rules.enabled=true,metrics.dashboard.enabled=true \
        networkPolicy.enabled=true,certificates.certManager.enabled=true,coordinator.rest.enabled=false \
        eviction.enabled=true,eviction.namespaceSelector.matchLabels.moved=yes,networkPolicy.enabled=true \
        install.runtime=k3s,install.dir=/data/podferry,uninstall.enabled=false,rbac.create=false; do
        rendered=$(render --set "$values") || die "the chart cannot be rendered with '$values'"
        grep -q '^kind: DaemonSet$' <<<"$rendered" || die "no DaemonSet with '$values'"
    done
    for values in install.runtime=docker coordinator.replicas=0 certificates.hours=0 eviction.port=0 tpyo=1; do
        ! render --set "$values" >/dev/null 2>&1 || die "the schema lets '$values' through"
    done
}

main() {
    local helm overlay write=${1:-}
    ensure_helm
    quiet "$helm" lint --strict "$CHART" >&2
    check_values
    is_written "$BASE" base
    is_written "$EVICTION/webhook.yaml" eviction eviction
    is_written "$EVICTION/configuration.yaml" configuration
    check_eviction
    for overlay in "$KUSTOMIZE"/overlays/*; do
        kubectl kustomize "$overlay" >/dev/null || die "$overlay cannot be built"
    done
    log 'the chart and the kustomizations are sound'
}

main "$@"
