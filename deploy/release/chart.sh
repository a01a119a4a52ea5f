#!/usr/bin/env bash
# Packs the chart of this version, whose image is in the registry that is named.
#
#   chart.sh IMAGE_REPOSITORY [FOLDER]    say ghcr.io/owner/podferry; writes FOLDER/podferry-VERSION.tgz (target/dist)
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/release/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly HELM=$PODFERRY_STATE/cache/helm/helm

main() {
    local copy version repository=${1:?usage: chart.sh IMAGE_REPOSITORY [FOLDER]} out=${2:-$DIST}
    version=$("$PODFERRY_ROOT/deploy/release/versions.sh")
    # Builds helm where it is missing.
    "$PODFERRY_ROOT/deploy/helm/check.sh"
    mkdir -p "$out"
    copy=$(mktemp -d)
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -rf '$copy'" EXIT
    # The definitions are behind a link, which would lead nowhere in the copy.
    cp -rL "$PODFERRY_ROOT/deploy/helm/podferry" "$copy/podferry"
    sed -i -E "/^image:/,/^[^ ]/s|^  repository: .*|  repository: $repository|" "$copy/podferry/values.yaml"
    grep -qx "  repository: $repository" "$copy/podferry/values.yaml" || die 'values.yaml has no image.repository to put the registry into'
    "$HELM" package "$copy/podferry" --destination "$out" >&2
    "$HELM" template podferry "$out/podferry-$version.tgz" | grep -q "image: $repository:$version\$" ||
        die "$out/podferry-$version.tgz does not name the image $repository:$version"
}

main "$@"
