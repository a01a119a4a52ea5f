#!/usr/bin/env bash
# Brings a release's image and chart to a registry that `docker login` knows. Prints what they are called there, by digest: `image=...` and `chart=...`.
#
#   push.sh FOLDER REGISTRY    FOLDER has what build.sh --registry wrote; say ghcr.io/owner
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

main() {
    local version pushed folder=${1:?usage: push.sh FOLDER REGISTRY} registry=${2:?usage: push.sh FOLDER REGISTRY}
    version=$("$PODFERRY_ROOT/deploy/release/versions.sh")
    pushed=$(mktemp)
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -f '$pushed'" EXIT
    skopeo copy --digestfile "$pushed" "docker-archive:$folder/podferry-$version-image-$(uname -m).tar" "docker://$registry/podferry:$version" >&2
    printf 'image=%s/podferry@%s\n' "$registry" "$(cat "$pushed")"
    helm push "$folder/podferry-$version.tgz" "oci://$registry/charts" >"$pushed" 2>&1 || { cat "$pushed" >&2; die "the chart could not be pushed to $registry/charts"; }
    printf 'chart=%s/charts/podferry@%s\n' "$registry" "$(sed -n 's/^Digest: *//p' "$pushed")"
}

main "$@"
