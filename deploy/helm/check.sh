#!/usr/bin/env bash
# Checks the chart and the kustomizations with the real helm and kubectl, and without a cluster.
#
#   check.sh            lint, render with many values, and compare deploy/kustomize/base with what the chart makes
#   check.sh --write    write deploy/kustomize/base/podferry.yaml anew
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly HELM_VERSION=v4.3.0
CHART=$PODFERRY_ROOT/deploy/helm/podferry
BASE=$PODFERRY_ROOT/deploy/kustomize/base/podferry.yaml

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

# Each of these has to render, and those behind it must not.
check_values() {
    local values rendered
    for values in '' \
        metrics.enabled=true,metrics.podMonitor.enabled=true,metrics.rules.enabled=true,metrics.dashboard.enabled=true \
        networkPolicy.enabled=true,certificates.certManager.enabled=true,coordinator.rest.enabled=false \
        install.runtime=k3s,install.dir=/data/podferry,uninstall.enabled=false,rbac.create=false; do
        rendered=$(render --set "$values") || die "the chart cannot be rendered with '$values'"
        grep -q '^kind: DaemonSet$' <<<"$rendered" || die "no DaemonSet with '$values'"
    done
    for values in install.runtime=docker coordinator.replicas=0 certificates.hours=0 tpyo=1; do
        ! render --set "$values" >/dev/null 2>&1 || die "the schema lets '$values' through"
    done
}

main() {
    local helm overlay
    ensure_helm
    quiet "$helm" lint --strict "$CHART" >&2
    check_values
    if [[ ${1:-} == --write ]]; then
        base >"$BASE"
    fi
    diff -u "$BASE" <(base) >&2 || die "$BASE is not what the chart makes: run $0 --write"
    for overlay in "$PODFERRY_ROOT"/deploy/kustomize/overlays/*; do
        kubectl kustomize "$overlay" >/dev/null || die "$overlay cannot be built"
    done
    log 'the chart and the kustomizations are sound'
}

main "$@"
